"""The steps of the method: importance scores are what their formulas say, ties are told."""

import pytest
import torch
from test_trainer import pairs
from tiny_models import tiny_llama, weights_of

from allo_lib.allo import delta_of_dpo, find_neurons, gradient_scores, run_stage
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError
from allo_lib.method.losses import dpo_loss, token_logps

COMMON = {"beta": 0.1, "pad_token_id": 0}


def schedule(lr=1e-3, seed=4, **settings):
    return Schedule(lr, 1, 3, seed, **settings)


@pytest.mark.parametrize(
    ("tied", "steps", "accumulation"),
    [(False, None, 1), (True, None, 1), (False, 2, 1), (False, 2, 3)],
)
def test_gradient_scores_are_summed_absolute_gradients(tied, steps, accumulation):
    model = tiny_llama(tied=tied)
    rows, before = pairs(model), weights_of(model)
    sum(value.square().sum() for value in model.parameters()).backward()  # of something before
    plan = schedule(max_steps=steps, accumulation=accumulation)
    scores = gradient_scores(model, rows, plan, **COMMON)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())

    def policy_sum(row, side):
        ids = torch.tensor([row["prompt"] + row[side]])
        labels = ids.clone()
        labels[:, : len(row["prompt"])] = -100
        return token_logps(model(input_ids=ids).logits, labels).sum()

    def reference_sum(row, side):
        return torch.tensor(row[f"{side}_reference"]).sum()

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4)).tolist()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    size = 3 // accumulation  # every forward pass by itself, of as many pairs together
    for chunk in [order[i : i + size] for i in range(0, 8, size)][: steps and steps * accumulation]:
        sides = [
            torch.stack([value(rows[i], side) for i in chunk])
            for value in (policy_sum, reference_sum)
            for side in ("chosen", "rejected")
        ]
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(dpo_loss(*sides, beta=0.1).mean(), parameters)
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.abs()
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name].dtype == torch.float32
        assert torch.allclose(scores[name], value, rtol=1e-3, atol=1e-6), name


def test_a_loss_of_whole_batches_is_not_made_of_several_passes():
    """BCO's shift is the mean of the batch."""
    model = tiny_llama()
    plan = schedule(accumulation=3)
    with pytest.raises(AlloError, match="bco judges whole batches: .* accumulation 1"):
        run_stage(model, pairs(model), "bco", plan, pad_token_id=0)


def test_delta_scores_are_the_way_of_the_weights_over_the_rate():
    model = tiny_llama()
    rows, before = pairs(model), weights_of(model)
    scores, record = delta_of_dpo(model, rows, schedule(), **COMMON)
    for name, after in weights_of(model).items():
        assert torch.allclose(scores[name], (after - before[name]).abs() / 1e-3, rtol=1e-5), name
    assert record["lr"] == 1e-3 and len(record["loss"]) == 3
    assert record["moved_float32"] > 0.9


def test_small_updates_of_bf16_weights_are_seen_in_the_masters():
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    scores, record = delta_of_dpo(model, pairs(model), schedule(lr=1e-6), **COMMON)
    after = weights_of(model)
    same = sum(int((before[n] == after[n]).sum()) for n in before)
    total = sum(value.numel() for value in before.values())
    assert same > 0.9 * total and record["moved_bfloat16"] == pytest.approx(1 - same / total)
    assert record["moved_float32"] > 0.9
    assert sum(int((score > 0).sum()) for score in scores.values()) > 0.9 * total


def test_scores_are_reproducible_and_their_order_is_seeded():
    def scores(seed):
        model = tiny_llama()
        return delta_of_dpo(model, pairs(model), schedule(seed=seed), **COMMON)[0]["lm_head.weight"]

    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


def test_ties_are_told_where_all_neurons_are_ranked_together():
    scores = {"a": torch.tensor([3.0, 1, 1, 0]), "b": torch.tensor([[1.0, 2]])}
    mask, ties = find_neurons(scores, 0.5)
    assert {name: places.tolist() for name, places in mask.indices.items()} == {
        "a": [0, 1],
        "b": [1],
    }
    assert ties == {"zeros": 1, "tied": 3, "tied_kept": 1}
    for other in ({"scope": "tensor"}, {"granularity": "row"}):
        assert find_neurons(scores, 0.5, **other)[1] == {}
