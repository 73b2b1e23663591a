"""Objectives hand the right part of a batch to the right loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import OURS, close, log_sigmoid

from allo_lib.engine.batching import Layout, collate, pair_batch, rejected_batch
from allo_lib.method.losses import ON_PAIRS, ON_POLICY, ON_REJECTED, ON_SOLUTIONS, objective

BETA = 0.1
SIDES = ("chosen", "rejected")


def pairs(count: int = 3, seed: int = 0, **extras) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        row = {"prompt": [5] * (1 + i), "chosen": [6] * (2 + i), "rejected": [7] * (4 - i)}
        for side in SIDES:
            row[f"{side}_reference"] = (-torch.rand(len(row[side]), generator=generator)).tolist()
        result.append(row | {key: value(row) for key, value in extras.items()})
    return result


def policy(batch, seed: int = 1):
    """Random log-probs where a response token stands, and 0 elsewhere, as the forward gives."""
    noise = -3 * torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed))
    return (noise * (batch["labels"] != -100)).requires_grad_()


def loss_and_gradient(name, logps, batch, **settings):
    loss, metrics = objective(name, beta=BETA, **settings)(logps, batch)
    (gradient,) = torch.autograd.grad(loss, logps)
    # What stands outside the response is a constant 0 of the forward pass.
    return loss.detach(), gradient * (batch["labels"] != -100), metrics


def test_dpo_and_its_metrics_by_hand():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy(batch).detach()
    loss, metrics = objective("dpo", beta=BETA)(logps, batch)
    ratio = (logps - batch["reference"]).sum(dim=1).tolist()
    margins = [BETA * (ratio[i] - ratio[i + 3]) for i in range(3)]
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3)
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-6)
    assert metrics["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)


@pytest.mark.parametrize("name", OURS)
def test_losses_of_responses_get_sums_references_and_lengths_of_both_sides(name):
    rows = pairs()
    batch = (rejected_batch if name == "npo" else pair_batch)(rows, Layout(0))
    logps = policy(batch).detach()
    loss, _ = objective(name, beta=BETA)(logps, batch)
    sums = [sum(row) for row in logps.tolist()]
    reference = [torch.tensor([sum(r[f"{s}_reference"]) for r in rows]) for s in SIDES]
    lengths = [torch.tensor([float(len(r[side])) for r in rows]) for side in SIDES]
    ours = [None, torch.tensor(sums)] if name == "npo" else torch.tensor(sums).chunk(2)
    close(loss, OURS[name](ours, reference, lengths).mean())


@pytest.mark.parametrize("name", ["dpo", "bco", "learning", *ON_REJECTED])
def test_the_first_loss_of_every_objective(name):
    weights = {"rejected_weights": lambda row: [1.0, 0.0, 0.0, 1.0][: len(row["rejected"])]}
    if name in ON_REJECTED:
        batch, expected = rejected_batch(pairs(**weights), Layout(0)), 2 / BETA * math.log(2)
    else:
        batch, expected = pair_batch(pairs(), Layout(0)), math.log(2)
    loss, metrics = objective(name, beta=BETA, key_share=0.3)(batch["reference"], batch)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert not any(metrics.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_learning_on_every_token_is_dpo(seed, other):
    batch = pair_batch(pairs(seed=seed), Layout(0))
    logps = policy(batch, other)
    ours = loss_and_gradient("learning", logps, batch, key_share=1.0)
    plain = loss_and_gradient("dpo", logps, batch)
    assert torch.allclose(ours[0], plain[0], atol=1e-6)
    assert torch.allclose(ours[1], plain[1], atol=1e-6)
    assert ours[2].keys() == plain[2].keys()
    for key, value in ours[2].items():
        assert torch.allclose(value, plain[2][key], atol=1e-6), key


def test_learning_takes_the_lowest_ratios_of_the_rejected_response_only():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy(batch)
    loss, gradient, _ = loss_and_gradient("learning", logps, batch, key_share=0.3)
    ratio = logps.detach() - batch["reference"]
    inside = batch["labels"] != -100
    expected = []
    for i in range(3):
        own = ratio[i + 3][inside[i + 3]].tolist()
        lowest = sorted(own)[: max(1, round(0.3 * len(own)))]
        expected.append(math.log1p(math.exp(-BETA * (sum(ratio[i].tolist()) - sum(lowest)))))
    assert float(loss) == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert ((gradient != 0) == inside)[:3].all()  # all chosen tokens are learned
    assert (gradient != 0)[3:].sum(dim=1).tolist() == [1, 1, 1]


def test_fixed_key_tokens_take_the_place_of_the_policy_s():
    extras = {
        "rejected_key": lambda row: [0.0] * (len(row["rejected"]) - 1) + [1.0],
        "chosen_key": lambda row: [0.0] * len(row["chosen"]),
    }
    batch = pair_batch(pairs(**extras), Layout(0))
    _, gradient, _ = loss_and_gradient("learning", policy(batch), batch, key_share=1.0)
    assert torch.equal((gradient != 0)[3:], batch["key"][3:].bool())
    assert torch.equal((gradient != 0)[:3], (batch["labels"] != -100)[:3])


def test_forgetting_uses_weights_and_touches_weighted_tokens_only():
    extras = {"rejected_weights": lambda row: [0.5] + [0.0] * (len(row["rejected"]) - 1)}
    batch = rejected_batch(pairs(**extras), Layout(0))
    logps = policy(batch)
    loss, gradient, metrics = loss_and_gradient("forgetting", logps, batch)
    ratio = (logps - batch["reference"])[:, 0].tolist()
    close(loss, -(2 / BETA) * sum(0.5 * log_sigmoid(-BETA * one) for one in ratio) / 3)
    assert torch.equal(gradient != 0, batch["weights"] != 0)
    assert (gradient[gradient != 0] > 0).all() and metrics == {}


@pytest.mark.parametrize("name", ON_SOLUTIONS)
def test_supervised_objectives_are_cross_entropy_per_token(name):
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs()]
    batch = collate(rows, Layout(0))
    logps = policy(batch).detach()
    loss, metrics = objective(name, beta=BETA)(logps, batch)
    count = sum(len(row["response"]) for row in rows)
    assert float(loss) == pytest.approx(-float(logps.sum()) / count) and metrics == {}


def test_on_policy_objectives_leave_padding_out_and_ppo_counts_what_it_clips():
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs()]
    batch = collate(rows, Layout(0))
    inside = batch["labels"] != -100
    assert not inside.all()
    batch["before_update"] = policy(batch).detach()
    batch["advantages"] = policy(batch, seed=2).detach() + 1.5 * inside
    logps = (batch["before_update"] + 0.3 * policy(batch, seed=3)).detach().requires_grad_()
    for name in ON_POLICY:
        before = loss_and_gradient(name, logps, batch)
        changed = batch | {"advantages": batch["advantages"] + 9 * ~inside}
        assert torch.equal(loss_and_gradient(name, logps, changed)[0], before[0])
    ratio = (logps.detach() - batch["before_update"]).exp()[inside].tolist()
    _, metrics = objective("ppo", beta=BETA)(logps, batch)
    expected = sum(not 0.8 <= one <= 1.2 for one in ratio) / len(ratio)
    assert list(metrics) == ["clipped"] and float(metrics["clipped"]) == pytest.approx(expected)
    assert 0 < expected < 1
    assert objective("a2c", beta=BETA)(logps, batch)[1] == {}


def with_weights() -> list[dict]:
    """Pairs whose rejected tokens are weighed, as forgetting does."""
    return pairs(
        rejected_weights=lambda row: [float(t % 2) for t in range(len(row["rejected"]))],
        chosen_weights=lambda row: [0.0] * len(row["chosen"]),
    )


def test_merged_is_the_sum_of_both_stages():
    both = pair_batch(with_weights(), Layout(0))
    logps = policy(both).detach()
    merged, metrics = objective("merged", beta=BETA, key_share=0.3)(logps, both)
    learning, margin = objective("learning", beta=BETA, key_share=0.3)(logps, both)
    ratio, weights = (logps - both["reference"])[3:], both["weights"][3:]
    terms = [2 / BETA * math.log1p(math.exp(BETA * x)) for x in ratio[weights != 0].tolist()]
    assert float(merged - learning) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert metrics == margin


@pytest.mark.parametrize("name", ON_PAIRS)
def test_objectives_on_pairs_raise_chosen_and_lower_rejected(name):
    batch = pair_batch(with_weights(), Layout(0))
    logps = batch["reference"].clone().requires_grad_()
    _, gradient, metrics = loss_and_gradient(name, logps, batch)
    inside = batch["labels"] != -100
    assert (gradient[:3][inside[:3]] < 0).all() and (gradient[3:][inside[3:]] > 0).all()
    assert set(metrics) == {"reward_margin", "reward_accuracy"}


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="'orpo'"):
        objective("orpo", beta=BETA)
