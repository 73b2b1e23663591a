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


def ask(model, store, rows=ROWS, batch_size=8):
    return reference.with_reference(
        model, rows, pad_token_id=0, batch_size=batch_size, store=Store(store)
    )


def test_values_are_those_of_the_model(tmp_path):
    model = tiny_llama()
    for row, values in zip(
        ask(model, tmp_path), forward.pair_logps(model, ROWS, 0, 8), strict=True
    ):
        for side in ("chosen", "rejected"):
            assert row[f"{side}_reference"] == values[side]


def test_the_same_weights_and_pairs_need_no_second_pass(tmp_path, passes):
    model = tiny_llama()
    first = ask(model, tmp_path)
    assert passes
    passes.clear()
    assert ask(tiny_llama(), tmp_path) == first
    assert ask(model, tmp_path, batch_size=1) == first  # batches are no part of the key
    assert not passes


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        ROWS[::-1],
        [ROWS[0] | {"prompt": [3, 5]}, ROWS[1]],
        [ROWS[0] | {"chosen": [5, 7]}, ROWS[1]],
        [ROWS[0] | {"prompt": [3], "chosen": [4, 5, 6]}, ROWS[1]],
    ],
)
def test_other_pairs_are_computed_anew(tmp_path, passes, rows):
    model = tiny_llama()
    ask(model, tmp_path)
    passes.clear()
    got = ask(model, tmp_path, rows)
    assert passes
    for row, values in zip(got, forward.pair_logps(model, rows, 0, 8), strict=True):
        assert row["chosen_reference"] == pytest.approx(values["chosen"], abs=1e-6)


def test_one_changed_weight_is_another_model(tmp_path, passes):
    model = tiny_llama()
    first = ask(model, tmp_path)
    passes.clear()
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert ask(model, tmp_path) != first and passes


def test_a_file_of_other_pairs_is_refused(tmp_path):
    path = tmp_path / "logps.safetensors"
    reference.write(forward.pair_logps(tiny_llama(), ROWS, 0, 8), path)
    assert reference.attach(ROWS, path)[0]["chosen_reference"]
    with pytest.raises(AlloError, match="4 rejected tokens, the pairs have 5.*other pairs"):
        reference.attach(ROWS[:1] + [ROWS[1] | {"rejected": [11, 12]}], path)
    weights.save_tensors({"chosen": torch.zeros(3)}, path)
    with pytest.raises(AlloError, match="0 rejected tokens"):
        reference.attach(ROWS, path)
