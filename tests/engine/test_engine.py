"""All shortcuts together against the plain way: two padded forward passes, whole logits, dense
gradients of which the kept entries are taken."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forward import make, plainly
from tiny_models import VOCABULARY, weights_of

from allo_lib.allo import collator_of
from allo_lib.engine.forward import layout_of, response_logps
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import select_neurons

BETA, KEY_SHARE = 0.1, 0.4


def plain_ratio(model, row: dict, side: str) -> torch.Tensor:
    logps = plainly(model, {"prompt": row["prompt"], "response": row[side]})
    return logps - torch.tensor(row[f"{side}_reference"])


def plain_dpo(model, rows) -> torch.Tensor:
    """arXiv 2305.18290 equation 7, a mean over pairs."""
    margins = [
        plain_ratio(model, row, "chosen").sum() - plain_ratio(model, row, "rejected").sum()
        for row in rows
    ]
    return -F.logsigmoid(BETA * torch.stack(margins)).mean()


def plain_forgetting(model, rows) -> torch.Tensor:
    """Token-level NPO (arXiv 2404.05868) on rejected responses, over the number of weights."""
    weights = torch.cat([torch.tensor(row["rejected_weights"]) for row in rows])
    ratios = torch.cat([plain_ratio(model, row, "rejected") for row in rows])
    total = (weights * F.logsigmoid(-BETA * ratios)).sum()
    return -(2 / BETA) * total / max(1, int((weights != 0).sum()))


def plain_learning(model, rows) -> torch.Tensor:
    """DPO whose rejected log-ratio is summed over the key tokens, the lowest ones, alone."""
    margins = []
    for row in rows:
        rejected = plain_ratio(model, row, "rejected")
        count = max(1, round(KEY_SHARE * len(rejected)))
        lowest = sorted(range(len(rejected)), key=lambda i: (rejected[i].item(), i))[:count]
        margins.append(plain_ratio(model, row, "chosen").sum() - rejected[lowest].sum())
    return -F.logsigmoid(BETA * torch.stack(margins)).mean()


PLAIN = {"dpo": plain_dpo, "forgetting": plain_forgetting, "learning": plain_learning}


def encoded(parts, seed: int) -> list[dict]:
    """Pairs with reference log-probs, and weights of which about half are zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, chosen, rejected in parts:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for side in ("chosen", "rejected"):
            drawn = torch.rand(2, len(row[side]), generator=generator)
            row[f"{side}_reference"] = (-5 * drawn[0]).tolist()
            row[f"{side}_weights"] = (drawn[1] - 0.5).clamp_min(0).tolist()
        rows.append(row)
    return rows


tokens = st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=9)
pair = st.tuples(tokens, tokens, tokens).filter(lambda parts: parts[1] != parts[2])


@pytest.mark.parametrize("kind", ["tied", "grouped queries"])
@pytest.mark.parametrize("granularity", ["scalar", "row"])
@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=12)
@given(parts=st.lists(pair, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_loss_and_every_packed_gradient_are_those_of_the_plain_way(
    name, kind, granularity, parts, seed
):
    rows = encoded(parts, seed)
    plain, ours = make(kind), make(kind)
    expected = PLAIN[name](plain, rows)
    expected.backward()

    mask = select_neurons(weights_of(ours), 0.2, order="random", granularity=granularity, seed=seed)
    optimizer = MaskedAdamW(ours, mask, lr=1e-3)
    batch = collator_of(name, layout_of(ours, 0))(rows)
    assert "ends" in batch  # else nothing is shared, and nothing shown
    loss = objective(name, beta=BETA, key_share=KEY_SHARE)(response_logps(ours, batch), batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: p.grad.flatten() for name, p in plain.named_parameters()}
    for packed in optimizer._packed:
        kept = gradients[packed.name][mask.indices[packed.name]]
        found = packed.master.grad
        found = torch.zeros_like(kept) if found is None else found
        assert torch.allclose(found, kept, atol=1e-5), packed.name
    assert all(p.grad is None for p in ours.parameters())
