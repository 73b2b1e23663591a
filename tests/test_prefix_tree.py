"""Trees of token sequences: every sequence can be read back, and sees its own prefix alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine import prefix_tree

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=6)


def test_a_pair_by_hand():
    """Prompt 5 6, responses 7 8 and 7 9: the first word of the responses is shared too."""
    tree = prefix_tree.grow([[5, 6, 7, 9], [5, 6, 7, 8]])
    assert tree.tokens == [5, 6, 7, 8, 9]
    assert tree.depths == [0, 1, 2, 3, 3]
    assert tree.ends == [5, 5, 5, 4, 5]
    assert tree.paths == [[0, 1, 2, 4], [0, 1, 2, 3]]
    seen = prefix_tree.sees(torch.tensor([tree.ends]))[0, 0].int().tolist()
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
    tree = prefix_tree.grow(sequences)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert [tree.tokens[node] for node in path] == sequence
        assert [tree.depths[node] for node in path] == list(range(len(sequence)))
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(tree) == len(prefixes)


@settings(deadline=None)
@given(SEQUENCES)
def test_a_token_sees_exactly_its_path(sequences):
    tree = prefix_tree.grow(sequences)
    seen = prefix_tree.sees(torch.tensor([tree.ends]))[0, 0]
    for path in tree.paths:
        for place, node in enumerate(path):
            assert seen[node].nonzero()[:, 0].tolist() == path[: place + 1]


@given(st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1,
                         max_size=3), min_size=1, max_size=3))  # fmt: skip
def test_block_masks_say_the_same(rows):
    trees = [prefix_tree.grow(sequences) for sequences in rows]
    length = max(map(len, trees))
    ends = torch.tensor([t.ends + list(range(len(t) + 1, length + 1)) for t in trees])
    mask = prefix_tree.blocks(ends)
    places = torch.arange(length)
    told = [
        [[bool(mask.mask_mod(r, 0, i, j)) for j in places] for i in places]
        for r in range(len(rows))
    ]
    assert told == prefix_tree.sees(ends)[:, 0].tolist()
    assert mask.shape == (len(rows), 1, length, length)


@settings(deadline=None)
@given(SEQUENCES)
def test_separate_trees_share_nothing(sequences):
    trees = prefix_tree.separate(sequences)
    assert [tree.tokens for tree in trees] == sequences


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 512))
def test_every_tree_gets_one_place_and_no_plan_costs_more_than_plain_padding(sizes, width):
    plan = prefix_tree.arrange(sizes, width)
    assert sorted(i for row in plan for i in row) == list(range(len(sizes)))

    def cost(rows):
        length = max(sum(sizes[i] for i in row) for row in rows)
        return len(rows) * length * (1 + length / (6 * width))

    assert cost(plan) <= cost([[i] for i in range(len(sizes))]) * (1 + 1e-9)


def test_short_trees_are_packed_into_the_length_of_the_longest():
    plan = prefix_tree.arrange([8, 3, 5, 4, 4], width=100_000)
    assert len(plan) * 8 == 24 or len(plan) == 1
    assert prefix_tree.arrange([100, 50, 50], width=1) == [[0], [1, 2]]
