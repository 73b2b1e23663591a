"""Objectives hand the right part of a batch to the right loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine.batches import Layout, collate, pair_batch, rejected_batch
from allo_lib.method.objectives import ON_PAIRS, ON_POLICY, ON_REJECTED, ON_SOLUTIONS, objective

BETA = 0.1


def pairs(count: int = 3, seed: int = 0, **extras) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        row = {"prompt": [5] * (1 + i), "chosen": [6] * (2 + i), "rejected": [7] * (4 - i)}
        for side in ("chosen", "rejected"):
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


def test_dpo_by_hand():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy(batch).detach()
    loss, metrics = objective("dpo", beta=BETA)(logps, batch)
    ratio = (logps - batch["reference"]).sum(dim=1).tolist()
    margins = [BETA * (ratio[i] - ratio[i + 3]) for i in range(3)]
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3)
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-6)
    assert metrics["reward_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)


@pytest.mark.parametrize("name", ["dpo", "bco", "learning"])
def test_the_first_loss_is_ln_2(name):
    batch = pair_batch(pairs(), Layout(0))
    loss, metrics = objective(name, beta=BETA, key_share=0.3)(batch["reference"], batch)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    assert metrics == {"reward_margin": 0, "reward_accuracy": 0}


def test_the_first_losses_of_forgetting_and_npo():
    extras = {"rejected_weights": lambda row: [1.0, 0.0] * (len(row["rejected"]) // 2)
              + [1.0] * (len(row["rejected"]) % 2)}  # fmt: skip
    batch = rejected_batch(pairs(**extras), Layout(0))
    for name in ON_REJECTED:
        loss, _ = objective(name, beta=BETA)(batch["reference"], batch)
        assert float(loss) == pytest.approx(2 / BETA * math.log(2), rel=1e-6)


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
    logps = policy(batch)
    _, gradient, _ = loss_and_gradient("learning", logps, batch, key_share=1.0)
    assert torch.equal((gradient != 0)[3:], batch["key"][3:].bool())
    assert torch.equal((gradient != 0)[:3], (batch["labels"] != -100)[:3])


def test_forgetting_uses_weights_and_touches_weighted_tokens_only():
    extras = {"rejected_weights": lambda row: [0.5] + [0.0] * (len(row["rejected"]) - 1)}
    batch = rejected_batch(pairs(**extras), Layout(0))
    logps = policy(batch)
    loss, gradient, metrics = loss_and_gradient("forgetting", logps, batch)
    first = (batch["weights"] != 0).float().argmax(dim=1)
    ratio = (logps - batch["reference"])[torch.arange(3), first]
    expected = -(2 / BETA) * (0.5 * F.logsigmoid(-BETA * ratio)).sum() / 3
    assert torch.allclose(loss, expected)
    assert torch.equal(gradient != 0, batch["weights"] != 0)
    assert (gradient[gradient != 0] > 0).all() and metrics == {}


def test_npo_is_over_whole_rejected_responses():
    batch = rejected_batch(pairs(), Layout(0))
    logps = policy(batch).detach()
    loss, _ = objective("npo", beta=BETA)(logps, batch)
    ratios = (logps - batch["reference"]).sum(dim=1).tolist()
    expected = [2 / BETA * math.log1p(math.exp(BETA * ratio)) for ratio in ratios]
    assert float(loss) == pytest.approx(sum(expected) / 3, rel=1e-5)


@pytest.mark.parametrize("name", ON_SOLUTIONS)
def test_supervised_objectives_are_cross_entropy_per_token(name):
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs()]
    batch = collate(rows, Layout(0))
    logps = policy(batch).detach()
    loss, metrics = objective(name, beta=BETA)(logps, batch)
    count = sum(len(row["response"]) for row in rows)
    assert float(loss) == pytest.approx(-float(logps.sum()) / count) and metrics == {}


def test_bco_shifts_by_the_mean_reward_of_the_batch():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy(batch).detach()
    loss, _ = objective("bco", beta=BETA)(logps, batch)
    rewards = [BETA * ratio for ratio in (logps - batch["reference"]).sum(dim=1).tolist()]
    delta = sum(rewards) / 6
    expected = [math.log1p(math.exp(delta - r)) for r in rewards[:3]]
    expected += [math.log1p(math.exp(r - delta)) for r in rewards[3:]]
    assert float(loss) == pytest.approx(sum(expected) / 6, abs=1e-6)


def own_responses():
    """A batch of the policy's own responses, and the log-probs of a policy that has moved on."""
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs()]
    batch = collate(rows, Layout(0))
    batch["before_update"] = policy(batch).detach()
    batch["advantages"] = policy(batch, seed=2).detach() + 1.5 * (batch["labels"] != -100)
    return batch, (batch["before_update"] + 0.3 * policy(batch, seed=3)).detach().requires_grad_()


def test_on_policy_objectives_leave_padding_out():
    batch, logps = own_responses()
    inside = batch["labels"] != -100
    assert not inside.all()
    for name in ON_POLICY:
        before = loss_and_gradient(name, logps, batch)
        changed = batch | {"advantages": batch["advantages"] + 9 * ~inside}
        assert torch.equal(loss_and_gradient(name, logps, changed)[0], before[0])


def test_ppo_counts_the_tokens_whose_ratio_is_beyond_the_clip():
    batch, logps = own_responses()
    inside = batch["labels"] != -100
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
    terms = [
        2 / BETA * math.log1p(math.exp(BETA * ratio[i, t]))
        for i in range(3) for t in range(ratio.shape[1]) if weights[i, t]
    ]  # fmt: skip
    assert float(merged - learning) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert metrics == margin


def test_simpo_does_not_read_the_reference():
    batch = pair_batch(pairs(), Layout(0))
    logps = policy(batch)
    before, _ = objective("simpo", beta=BETA)(logps, batch)
    batch["reference"] = batch["reference"] - 7
    after, _ = objective("simpo", beta=BETA)(logps, batch)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_objectives_on_pairs_raise_chosen_and_lower_rejected(name):
    batch = pair_batch(with_weights(), Layout(0))
    logps = batch["reference"].clone().requires_grad_()
    _, gradient, metrics = loss_and_gradient(name, logps, batch)
    inside = batch["labels"] != -100
    assert (gradient[:3][inside[:3]] < 0).all() and (gradient[3:][inside[3:]] > 0).all()
    assert set(metrics) == {"reward_margin", "reward_accuracy"}


def test_unknown_objectives_are_refused():
    batch = pair_batch(pairs(), Layout(0))
    with pytest.raises(ValueError, match="'orpo'"):
        objective("orpo", beta=BETA)(batch["reference"], batch)
