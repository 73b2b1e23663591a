"""Reference log-probs: computed once for the same weights and pairs, never mixed with others'."""

import pytest
import torch
from tiny_models import tiny_llama

from allo_lib.engine import forward, reference
from allo_lib.engine.store import Store
from allo_lib.errors import AlloError
from allo_lib.machine import weights

ROWS = [
    {"prompt": [3, 4], "chosen": [5, 6], "rejected": [5, 7, 8]},
    {"prompt": [9], "chosen": [10], "rejected": [11]},
]


@pytest.fixture
def passes(monkeypatch):
    """How many forward passes were made."""
    made = []
    inner = forward.response_logps
    monkeypatch.setattr(forward, "response_logps", lambda *a: made.append(1) or inner(*a))
    return made


def with_reference(model, store, rows=ROWS, batch_size=8):
    return reference.with_reference(
        model, rows, pad_token_id=0, batch_size=batch_size, store=Store(store)
    )


def test_the_same_weights_and_pairs_need_no_second_pass(tmp_path, passes):
    model = tiny_llama()
    first = with_reference(model, tmp_path)
    for row, values in zip(first, forward.pair_logps(model, ROWS, 0, 8), strict=True):
        assert {side: row[f"{side}_reference"] for side in reference.SIDES} == values
    assert passes
    passes.clear()
    assert with_reference(tiny_llama(), tmp_path) == first
    assert with_reference(model, tmp_path, batch_size=1) == first  # batches are no part of the key
    assert not passes
    for path in tmp_path.rglob("*.safetensors"):  # as where a store was carried without them
        path.unlink()
    assert with_reference(model, tmp_path) == first and passes


@pytest.mark.parametrize("change", [
    lambda rows: rows[:1],
    lambda rows: rows[::-1],
    lambda rows: [rows[0] | {"chosen": [5, 7]}, rows[1]],
    lambda rows: [rows[0] | {"prompt": [3], "chosen": [4, 5, 6]}, rows[1]],
    "a weight",
    "a setting",
])  # fmt: skip
def test_other_pairs_and_weights_are_computed_again(tmp_path, passes, change):
    model, rows = tiny_llama(), ROWS
    with_reference(model, tmp_path)
    passes.clear()
    if change == "a weight":
        with torch.no_grad():
            model.model.norm.weight[0] += 0.5
    elif change == "a setting":  # the same weights, used otherwise
        other = tiny_llama(rope_theta=100.0)
        assert forward.pair_logps(other, rows, 0, 8) != forward.pair_logps(model, rows, 0, 8)
        model = other
        passes.clear()
    else:
        rows = change(rows)
    got = with_reference(model, tmp_path, rows)
    assert passes
    for row, values in zip(got, forward.pair_logps(model, rows, 0, 8), strict=True):
        assert row["chosen_reference"] == pytest.approx(values["chosen"], abs=1e-6)


def test_a_file_of_other_pairs_is_refused(tmp_path):
    path = tmp_path / "logps.safetensors"
    reference.write(forward.pair_logps(tiny_llama(), ROWS, 0, 8), path)
    assert reference.attach(ROWS, path)[0]["chosen_reference"]
    with pytest.raises(AlloError, match="4 rejected tokens, the pairs have 5.*other pairs"):
        reference.attach(ROWS[:1] + [ROWS[1] | {"rejected": [11, 12]}], path)
    weights.save_tensors({"chosen": torch.zeros(3)}, path)
    with pytest.raises(AlloError, match="0 rejected tokens"):
        reference.attach(ROWS, path)
