"""All shortcuts together against the plain way: two padded forward passes, whole logits, dense
gradients of which the kept entries are taken."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama, weights_of
from transformers import LlamaConfig, LlamaForCausalLM

from allo_lib.batches import pair_batch
from allo_lib.forward import layout_of, response_logps
from allo_lib.importance import select_neurons
from allo_lib.objectives import objective
from allo_lib.optim import MaskedAdamW

BETA = 0.1


def grouped_queries():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"tied": lambda: tiny_llama(tied=True), "grouped queries": grouped_queries}


def plain_logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *response]])
    logps = F.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    places = torch.arange(len(prompt), ids.shape[1])
    return logps[places - 1, ids[0, places]].sum()


def plain_loss(model, rows) -> torch.Tensor:
    """DPO, arXiv 2305.18290 equation 7, a mean over pairs."""
    losses = []
    for row in rows:
        chosen, rejected = (
            plain_logp(model, row["prompt"], row[side]) - sum(row[f"{side}_reference"])
            for side in ("chosen", "rejected")
        )
        losses.append(-F.logsigmoid(BETA * (chosen - rejected)))
    return torch.stack(losses).mean()


tokens = st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=9)
pair = st.tuples(tokens, tokens, tokens).filter(lambda parts: parts[1] != parts[2])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("granularity", ["scalar", "row"])
@settings(deadline=None, max_examples=25)
@given(parts=st.lists(pair, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_loss_and_every_packed_gradient_are_those_of_the_plain_way(kind, granularity, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        | {
            f"{side}_reference": (-5 * torch.rand(len(text), generator=generator)).tolist()
            for side, text in (("chosen", chosen), ("rejected", rejected))
        }
        for prompt, chosen, rejected in parts
    ]
    plain, ours = MODELS[kind](), MODELS[kind]()
    expected = plain_loss(plain, rows)
    expected.backward()

    mask = select_neurons(
        weights_of(ours), 0.2, order="random", granularity=granularity, seed=seed
    )
    optimizer = MaskedAdamW(ours, mask, lr=1e-3)
    batch = pair_batch(rows, layout_of(ours, 0))
    assert "ends" in batch  # else nothing is shared, and nothing shown
    loss = objective("dpo", beta=BETA)(response_logps(ours, batch), batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: p.grad.flatten() for name, p in plain.named_parameters()}
    for packed in optimizer._packed:
        kept = gradients[packed.name][mask.indices[packed.name]]
        found = packed.master.grad
        found = torch.zeros_like(kept) if found is None else found
        assert torch.allclose(found, kept, atol=1e-5), packed.name
    assert all(p.grad is None for p in ours.parameters())
