"""What a batch reads and what it judges, laid out as trees or as padded rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine.batching import (
    STEP,
    Layout,
    attention_mask,
    collate,
    pair_batch,
    rejected_batch,
)

PAD = 0
PLAIN, SHARED = Layout(PAD), Layout(PAD, shared=True)
PAIRS = [
    {"prompt": [5, 6], "chosen": [7], "rejected": [8, 9],
     "chosen_reference": [-1.0], "rejected_reference": [-2.0, -3.0]},
    {"prompt": [2], "chosen": [3, 4, 4], "rejected": [3, 9],
     "chosen_reference": [0.0, -4.0, -5.0], "rejected_reference": [0.0, -6.0]},
]  # fmt: skip


def row(prompt, response, **extras):
    return {"prompt": prompt, "response": response} | extras


def test_plain_rows_are_padded_on_the_right():
    """A pad token inside a response is judged like any other."""
    batch = collate([row([5, 6], [7, PAD, 9]), row([3], [4])], PLAIN)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, PAD, 9], [3, 4, PAD, PAD, PAD]],
        "labels": [[7, PAD, 9], [4, -100, -100]],
        "before": [1, 2, 3, 5],
        "targets": [7, PAD, 9, 4],
        "place": [[0, 1, 2], [3, 4, 4]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_pair_shares_its_prompt_and_the_first_words_of_its_responses():
    batch = pair_batch(PAIRS[1:], SHARED)
    assert batch["input_ids"].tolist() == [[2, 3, 4, 4, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["ends"].tolist() == [[5, 5, 4, 4, 5]]
    # chosen 3 4 4, rejected 3 9: the 3 is judged once, both 4 and 9 are predicted by it.
    assert batch["targets"].tolist() == [3, 4, 4, 9]
    assert batch["before"].tolist() == [0, 1, 2, 1]
    assert batch["place"].tolist() == [[0, 1, 2], [0, 3, 4]]


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_pairs_are_chosen_first_and_carry_their_values(layout):
    batch = pair_batch(PAIRS, layout)
    assert batch["labels"].tolist() == [[7, -100, -100], [3, 4, 4], [8, 9, -100], [3, 9, -100]]
    assert batch["reference"].tolist() == [[-1, 0, 0], [0, -4, -5], [-2, -3, 0], [0, -6, 0]]
    alone = rejected_batch(PAIRS, layout)
    assert torch.equal(alone["labels"], batch["labels"][2:, :2])
    assert torch.equal(alone["reference"], batch["reference"][2:, :2])


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_without_a_prompt_nothing_predicts_the_first_token(layout):
    batch = collate([row([], [4, 5], w=[1.0, 2.0])], layout)
    assert batch["labels"].tolist() == [[-100, 5]] and batch["w"].tolist() == [[0, 2]]
    assert batch["targets"].tolist() == [5] and batch["before"].tolist() == [0]


ids = st.lists(st.integers(1, 3), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_every_row_can_be_read_back_from_its_batch(rows, shared, one_row):
    """Going up from the place of each judged token leads through exactly its own sequence."""
    values = [[float(t) / 4 for t in response] for _, response in rows]
    examples = [row(p, r, w=w) for (p, r), w in zip(rows, values, strict=True)]
    batch = collate(examples, Layout(PAD, shared, one_row))
    flat, length = batch["input_ids"].view(-1), batch["input_ids"].shape[1]
    assert ("sizes" in batch) == (shared and one_row)
    if "sizes" in batch:  # equal prefixes of one prompt are read once, and padding is a last tree
        read = {(tuple(p), tuple(r[:n])) for p, r in rows for n in range(len(r) + 1)}
        prompts = {tuple(p) for p, _ in rows}
        tokens, sums = len(read) + sum(len(p) - 1 for p in prompts), batch["sizes"].cumsum(0)
        assert len(flat) == sums[-1] == math.ceil(tokens / STEP) * STEP and tokens in sums
        assert batch["ends"][0, tokens:].tolist() == list(range(tokens + 1, len(flat) + 1))
    for i, ((prompt, response), w) in enumerate(zip(rows, values, strict=True)):
        inside = batch["labels"][i] != -100
        assert batch["labels"][i][inside].tolist() == response
        assert batch["w"][i][inside].tolist() == w and not batch["w"][i][~inside].any()
        numbers = batch["place"][i][inside]
        assert batch["targets"][numbers].tolist() == response
        assert (batch["place"][i][~inside] == len(batch["targets"])).all()
        last = int(batch["before"][numbers[-1]])
        start = last // length * length
        path = list(range(start, last + 1))
        if shared:
            seen = attention_mask(batch["ends"])[last // length, 0, last - start]
            path = (start + seen.nonzero()[:, 0]).tolist()
            assert batch["position_ids"].view(-1)[path].tolist() == list(range(len(path)))
        assert flat[path].tolist() == prompt + response[:-1]
