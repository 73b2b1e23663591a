"""What a batch reads and what it judges, laid out as trees or as padded rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine.batching import (
    Layout,
    attention_mask,
    block_mask,
    build_trie,
    collate,
    pack,
    pair_batch,
    rejected_batch,
)

PAD = 0
PLAIN, SHARED = Layout(PAD), Layout(PAD, shared=True, width=64)
PAIRS = [
    {"prompt": [5, 6], "chosen": [7], "rejected": [8, 9],
     "chosen_reference": [-1.0], "rejected_reference": [-2.0, -3.0]},
    {"prompt": [2], "chosen": [3, 4, 4], "rejected": [3, 9],
     "chosen_reference": [0.0, -4.0, -5.0], "rejected_reference": [0.0, -6.0]},
]  # fmt: skip


def row(prompt, response, **extras):
    return {"prompt": prompt, "response": response} | extras


def test_plain_rows_are_padded_on_the_right():
    batch = collate([row([5, 6], [7, 8, 9]), row([3], [4])], PLAIN)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 9], [4, -100, -100]]
    assert batch["before"].tolist() == [1, 2, 3, 5]
    assert batch["targets"].tolist() == [7, 8, 9, 4]
    assert batch["place"].tolist() == [[0, 1, 2], [3, 4, 4]]
    assert "ends" not in batch
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


def test_trees_of_unequal_length_are_packed_into_one_row():
    rows = [row([5], list(range(10, 40))), row([6], [7, 8]), row([7], [7, 8])]
    batch = collate(rows, SHARED)
    assert batch["input_ids"].numel() < 3 * 31


def test_a_pad_token_inside_a_response_is_judged_like_any_other():
    assert collate([row([5], [PAD, 6])], PLAIN)["labels"].tolist() == [[PAD, 6]]


@pytest.mark.parametrize("layout", [PLAIN, SHARED])
def test_without_a_prompt_nothing_predicts_the_first_token(layout):
    batch = collate([row([], [4, 5], w=[1.0, 2.0])], layout)
    assert batch["labels"].tolist() == [[-100, 5]] and batch["w"].tolist() == [[0, 2]]
    assert batch["targets"].tolist() == [5] and batch["before"].tolist() == [0]


ids = st.lists(st.integers(1, 3), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.booleans(), st.integers(1, 99))
def test_every_row_can_be_read_back_from_its_batch(rows, shared, width):
    """Going up from the place of each judged token leads through exactly its own sequence."""
    values = [[float(t) / 4 for t in response] for _, response in rows]
    examples = [row(p, r, w=w) for (p, r), w in zip(rows, values, strict=True)]
    batch = collate(examples, Layout(PAD, shared, width))
    flat, positions = batch["input_ids"].view(-1), batch["position_ids"].view(-1)
    length = batch["input_ids"].shape[1]
    for i, ((prompt, response), w) in enumerate(zip(rows, values, strict=True)):
        inside = batch["labels"][i] != -100
        assert batch["labels"][i][inside].tolist() == response
        assert batch["w"][i][inside].tolist() == w and not batch["w"][i][~inside].any()
        numbers = batch["place"][i][inside]
        assert batch["targets"][numbers].tolist() == response
        assert (batch["place"][i][~inside] == len(batch["targets"])).all()
        last = int(batch["before"][numbers[-1]])
        if shared:
            ends = batch["ends"][last // length]
            start = last // length * length
            path = [start + j for j in range(last - start + 1) if ends[j] > last - start]
        else:
            path = list(range(last // length * length, last + 1))
        assert flat[path].tolist() == prompt + response[:-1]
        assert positions[path].tolist() == list(range(len(path)))


# --- trees of token sequences ---

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=6)


def test_a_pair_by_hand():
    """Prompt 5 6, responses 7 8 and 7 9: the first word of the responses is shared too."""
    tree = build_trie([[5, 6, 7, 9], [5, 6, 7, 8]])
    assert tree.tokens == [5, 6, 7, 8, 9]
    assert tree.depths == [0, 1, 2, 3, 3]
    assert tree.ends == [5, 5, 5, 4, 5]
    assert tree.paths == [[0, 1, 2, 4], [0, 1, 2, 3]]
    seen = attention_mask(torch.tensor([tree.ends]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]


@settings(deadline=None)
@given(SEQUENCES)
def test_paths_spell_the_sequences_and_equal_prefixes_are_one(sequences):
    tree = build_trie(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert [tree.tokens[node] for node in path] == sequence
        assert [tree.depths[node] for node in path] == list(range(len(sequence)))
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(tree) == len(prefixes)


@settings(deadline=None)
@given(SEQUENCES)
def test_a_token_sees_exactly_its_path(sequences):
    tree = build_trie(sequences)
    seen = attention_mask(torch.tensor([tree.ends]))[0, 0]
    for path in tree.paths:
        for place, node in enumerate(path):
            assert seen[node].nonzero()[:, 0].tolist() == path[: place + 1]


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1,
                         max_size=3), min_size=1, max_size=3))  # fmt: skip
def test_block_masks_say_the_same(rows):
    trees = [build_trie(sequences) for sequences in rows]
    length = max(map(len, trees))
    ends = torch.tensor([t.ends + list(range(len(t) + 1, length + 1)) for t in trees])
    mask = block_mask(ends)
    places = torch.arange(length)
    told = [
        [[bool(mask.mask_mod(r, 0, i, j)) for j in places] for i in places]
        for r in range(len(rows))
    ]
    assert told == attention_mask(ends)[:, 0].tolist()
    assert mask.shape == (len(rows), 1, length, length)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 512))
def test_every_tree_gets_one_place_and_no_plan_costs_more_than_plain_padding(sizes, width):
    plan = pack(sizes, width)
    assert sorted(i for row in plan for i in row) == list(range(len(sizes)))

    def cost(rows):
        length = max(sum(sizes[i] for i in row) for row in rows)
        return len(rows) * length * (1 + length / (6 * width))

    assert cost(plan) <= cost([[i] for i in range(len(sizes))]) * (1 + 1e-9)


def test_short_trees_are_packed_into_the_length_of_the_longest():
    plan = pack([8, 3, 5, 4, 4], width=100_000)
    assert len(plan) * 8 == 24 or len(plan) == 1
    assert pack([100, 50, 50], width=1) == [[0], [1, 2]]
