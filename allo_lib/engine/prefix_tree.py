"""Sequences that begin alike, as one tree: what they share is read, and paid for, once.

The chosen and the rejected response of a pair follow the same prompt, several pairs may ask the
same question, and responses to it often begin with the same words. Laid out in depth-first order,
a token may look at exactly those before it whose subtree it lies in: its own prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Time of an operation of masked attention over that of one in a matrix product, roughly: on a CPU
# attention took 26% of a step's time for a tenth of its operations. Not measured on a GPU.
_MASKED = 3


@dataclass(frozen=True)
class Tree:
    """Tokens in depth-first order; lists over nodes, but for `paths`.

    tokens: ids. depths: number of tokens before the node in its sequence, its position. ends: one
    past the node's last descendant. paths: for each sequence the nodes of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def grow(sequences: Sequence[Sequence[int]]) -> Tree:
    """The tree of some token sequences; equal prefixes become the same nodes.

    In sorted order each sequence shares with the tree so far exactly what it shares with the one
    before it, so that one pass gives the depth-first order.
    """
    tree = Tree([], [], [], [[] for _ in sequences])
    before: Sequence[int] = ()
    path: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[i]
        shared = shared_length(before, sequence)
        size = len(tree)
        for node in path[shared:]:
            tree.ends[node] = size
        path = path[:shared] + list(range(size, size + len(sequence) - shared))
        tree.tokens.extend(sequence[shared:])
        tree.depths.extend(range(shared, len(sequence)))
        tree.ends.extend([0] * (len(sequence) - shared))
        tree.paths[i] = path
        before = sequence
    for node in path:
        tree.ends[node] = len(tree)
    return tree


def separate(sequences: Sequence[Sequence[int]]) -> list[Tree]:
    """Every sequence as a tree of its own: nothing shared."""
    return [grow([sequence]) for sequence in sequences]


def sees(ends: Tensor) -> Tensor:
    """Which token may look at which: bool [R, 1, L, L], True at [r, 0, i, j] where i sees j.

    ends: int64 [R, L]. Token i sees j if j does not stand after it and i lies in j's subtree,
    j <= i < ends[j]; each sees itself.
    """
    places = torch.arange(ends.shape[1], device=ends.device)
    before = places[:, None] >= places[None, :]
    return (before & (places[:, None] < ends[:, None, :]))[:, None]


def blocks(ends: Tensor):
    """`sees` as a block mask of FlexAttention [R, 1, L, L], which skips blocks that see nothing."""
    from torch.nn.attention.flex_attention import create_block_mask  # slow to load, seldom used

    def visible(row, head, i, j):
        return (j <= i) & (i < ends[row, j])

    rows, length = ends.shape
    return create_block_mask(visible, rows, None, length, length, device=ends.device)


def arrange(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Rows of a batch, each a list of trees (by number), that cost the least arithmetic.

    sizes: tokens of each tree. width: the model's hidden size; at L tokens a row the attention of a
    transformer layer makes about L / (6 width) of the operations of its matrix products, each of
    which takes about three times as long under a mask. That is what speaks against long rows, while
    padding speaks against rows of unequal length.
    """
    longest = max(sizes)
    lengths = {longest * k for k in range(1, 1 + min(len(sizes), 8))} | {sum(sizes)}
    plans = [_first_fit(sizes, length) for length in sorted(lengths)]
    return min(plans, key=lambda plan: _cost(plan, sizes, width))


def _cost(plan: list[list[int]], sizes: Sequence[int], width: int) -> float:
    length = max(sum(sizes[i] for i in row) for row in plan)
    return len(plan) * length * (1 + _MASKED * length / (6 * width))


def _first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """First-fit decreasing: each tree, largest first, goes into the first row with room for it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = next((r for r, room in enumerate(free) if room >= sizes[i]), None)
        if fits is None:
            rows.append([])
            free.append(length)
            fits = len(rows) - 1
        rows[fits].append(i)
        free[fits] -= sizes[i]
    return rows


def shared_length(a: Sequence, b: Sequence) -> int:
    """How many first members two sequences have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
