"""Log-probs of responses agree with the plain forward pass, whatever the model and the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from allo_lib.encoding import collate
from allo_lib.evaluation import pair_logps
from allo_lib.forward import logps_of_rows, response_logps
from allo_lib.losses import token_logps

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)


def make(kind: str):
    torch.manual_seed(0)
    if kind == "tied":
        return tiny_llama(tied=True)
    if kind == "llama":
        return tiny_llama()
    if kind == "grouped queries":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES))
    if kind == "gemma2":  # capped logits
        config = Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=2.0)
        return Gemma2ForCausalLM(config)
    if kind == "cohere":  # scaled logits
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


KINDS = ("llama", "tied", "grouped queries", "qwen2", "gemma2", "cohere", "granite")


def rows_of_many_lengths(count: int = 7, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    return [{"prompt": draw(9), "response": draw(12)} for _ in range(count)]


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_plain_forward_pass_in_value_and_gradient(kind):
    model = make(kind).eval()
    batch = collate(rows_of_many_lengths(), pad_token_id=0)
    ours = response_logps(model, batch["input_ids"], batch["labels"])
    mask = batch["input_ids"].new_ones(batch["input_ids"].shape)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    plain = token_logps(logits, batch["labels"])
    assert ours.shape == plain.shape and ours.dtype == torch.float32
    assert torch.allclose(ours, plain, atol=1e-5)
    assert not ours[batch["labels"] == -100].any() and ours[batch["labels"] != -100].all()
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    got = gradients(model, (ours * weights).sum())
    expected = gradients(model, (plain * weights).sum())
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1)
        assert torch.allclose(got[name] / scale, value / scale, atol=1e-5), name


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_changes_after_the_head_do_change_the_result(kind):
    """The comparison above can tell: without the change the numbers would be others."""
    model = make(kind).eval()
    batch = collate(rows_of_many_lengths(), pad_token_id=0)
    ours = response_logps(model, batch["input_ids"], batch["labels"])
    hidden = model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state
    bare = token_logps(model.get_output_embeddings()(hidden), batch["labels"])
    assert (ours - bare).abs().max() > 0.1


def test_padding_does_not_change_a_row():
    model, rows = tiny_llama().eval(), rows_of_many_lengths()
    together = collate(rows, pad_token_id=0)
    values = response_logps(model, together["input_ids"], together["labels"])
    for i, row in enumerate(rows):
        alone = collate([row], pad_token_id=0)
        one = response_logps(model, alone["input_ids"], alone["labels"])[0]
        assert torch.allclose(values[i, : one.numel()], one, atol=1e-5)


def test_bf16_weights_give_float32_log_probs():
    model = tiny_llama(dtype=torch.bfloat16).eval()
    batch = collate(rows_of_many_lengths(), pad_token_id=0)
    values = response_logps(model, batch["input_ids"], batch["labels"])
    assert values.dtype == torch.float32
    plain = token_logps(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert torch.allclose(values, plain, atol=1e-5)


def test_a_batch_without_response_tokens_is_all_zero():
    ids = torch.tensor([[3, 4, 5]])
    values = response_logps(tiny_llama(), ids, torch.full((1, 3), -100))
    assert values.tolist() == [[0, 0, 0]]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 8))
def test_rows_get_the_same_values_in_any_order_and_batch(order, batch_size):
    model, rows = tiny_llama(), rows_of_many_lengths()
    alone = [logps_of_rows(model, [row], 0, 1)[0] for row in rows]
    values = logps_of_rows(model, [rows[i] for i in order], 0, batch_size)
    for i, got in zip(order, values, strict=True):
        assert len(got) == len(rows[i]["response"])
        assert got == pytest.approx(alone[i], abs=1e-5)


def test_rows_leave_further_keys_aside_and_the_model_in_eval_mode():
    model = tiny_llama().train()
    rows = [row | {"reference": [0.0]} for row in rows_of_many_lengths()]
    assert len(logps_of_rows(model, rows, 0, 3)) == len(rows)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_both_sides_of_pairs_stay_with_their_pair():
    model = tiny_llama()
    rows = rows_of_many_lengths(8)
    pairs = [
        {"prompt": rows[i]["prompt"], "chosen": rows[i]["response"],
         "rejected": rows[i + 1]["response"]}
        for i in range(0, 8, 2)
    ]  # fmt: skip
    for pair, values in zip(pairs, pair_logps(model, pairs, 0, 3), strict=True):
        for side in ("chosen", "rejected"):
            row = {"prompt": pair["prompt"], "response": pair[side]}
            alone = logps_of_rows(model, [row], 0, 1)[0]
            assert values[side] == pytest.approx(alone, abs=1e-5)
