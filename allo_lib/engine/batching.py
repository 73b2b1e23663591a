"""From encoded rows to the tensors of one forward pass: which tokens are read, which are judged.

A batch has two sides. What the model reads: `input_ids` and, where sequences share their prefixes
(`Tree`), `position_ids` and `ends`, all int64 [R, L]; where all trees stand in one row, `sizes`,
int64 [trees], padding as a last one. What the loss judges: response tokens of B sequences, T the
longest response; `labels` int64 [B, T] (-100 behind the end), and float32 [B, T] for every further
value that goes along with the tokens. Between them stand `before` and `targets`, int64 [N]: the
flat place whose hidden state predicts a token, and the token; and `place`, int64 [B, T]: which of
the N log-probs belongs here, N where there is none.

Sequences that begin alike are one tree: what they share is read, and paid for, once. The chosen and
the rejected response of a pair follow the same prompt, several pairs may ask the same question, and
responses to it often begin with the same words. Laid out in depth-first order, a token may look at
exactly those before it whose subtree it lies in: its own prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allo_lib.method.losses import IGNORED, Batch

# A row of all trees is padded to a multiple of this: oneDNN makes code for every shape it meets.
STEP = 64

Row = dict[str, Any]  # `prompt` and its responses as lists of token ids, further lists of floats


@dataclass(frozen=True)
class Layout:
    """How sequences become padded rows. shared: one tree a row, for what begins alike; else one
    sequence a row, which every causal model can read. one_row: all trees in one row, padded to a
    multiple of STEP, for attention tree by tree (`TreeByTree`). window: tokens that attention looks
    back where it does not see all, so that longer sequences are not shared; 0 for all."""

    pad_token_id: int
    shared: bool = False
    one_row: bool = False
    window: int = 0


class Tree(NamedTuple):
    """Tokens in depth-first order; lists over nodes, but for `paths`.

    tokens: ids. depths: number of tokens before the node in its sequence, its position. ends: one
    past the node's last descendant. paths: for each sequence the nodes of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]


def collate(rows: list[Row], layout: Layout) -> Batch:
    """The batch of rows.

    rows: each has `prompt` and `response`, lists of token ids; further keys are lists of floats,
    one per response token. Without a prompt the first token of a response is predicted by nothing
    and left out, as in `losses.token_logps`.
    """
    sequences = [[*row["prompt"], *row["response"]] for row in rows]
    shared = layout.shared and not 0 < layout.window < max(map(len, sequences))
    groups: dict[Any, list[int]] = {}  # sequences of one tree
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row["prompt"]) if shared else i, []).append(i)
    trees = [build_trie([sequences[i] for i in group]) for group in groups.values()]
    sizes = [len(tree.tokens) for tree in trees]
    one_row = shared and layout.one_row
    count, length = (1, sum(sizes)) if one_row else (len(trees), max(sizes))
    padding = -length % STEP if one_row else 0
    length += padding
    input_ids = torch.full((count, length), layout.pad_token_id)
    # Padding stands behind everything else and sees only itself.
    position_ids = torch.zeros(count, length, dtype=torch.int64)
    ends = torch.arange(1, length + 1).repeat(count, 1)
    nodes: list[list[int]] = [[] for _ in rows]  # flat places of each sequence's tokens
    place, start = 0, 0  # of the next tree: its row, and its first token
    for tree, size, group in zip(trees, sizes, groups.values(), strict=True):
        part = slice(start, start + size)
        input_ids[place, part] = torch.tensor(tree.tokens)
        position_ids[place, part] = torch.tensor(tree.depths)
        ends[place, part] = torch.tensor(tree.ends) + start
        for i, path in zip(group, tree.paths, strict=True):
            nodes[i] = [place * length + start + node for node in path]
        place, start = (0, start + size) if one_row else (place + 1, 0)
    batch = {"input_ids": input_ids}
    if shared:
        batch |= {"position_ids": position_ids, "ends": ends}
    if one_row:
        batch["sizes"] = torch.tensor([*sizes, padding] if padding else sizes)
    return batch | _judged(rows, nodes, input_ids)


def pair_batch(pairs: list[Row], layout: Layout) -> Batch:
    """The chosen responses of B pairs, then their rejected ones in that order: 2B sequences.

    Each pair has `prompt`, `chosen`, `rejected`; further keys `chosen_<name>` and `rejected_<name>`
    become the further key `<name>` of the batch.
    """
    return collate([_side(p, which) for which in ("chosen", "rejected") for p in pairs], layout)


def rejected_batch(pairs: list[Row], layout: Layout) -> Batch:
    """The rejected responses alone."""
    return collate([_side(pair, "rejected") for pair in pairs], layout)


def _side(pair: Row, which: str) -> Row:
    start = f"{which}_"
    extras = {key.removeprefix(start): pair[key] for key in pair if key.startswith(start)}
    return {"prompt": pair["prompt"], "response": pair[which]} | extras


def _judged(rows: list[Row], nodes: list[list[int]], input_ids: Tensor) -> Batch:
    """Which hidden states predict which tokens, and what goes along with the tokens."""
    longest = max(len(row["response"]) for row in rows)
    extras = [key for key in rows[0] if key not in ("prompt", "response")]
    labels = torch.full((len(rows), longest), IGNORED)  # [B, T]
    place = torch.full_like(labels, -1)
    values = {key: torch.zeros(labels.shape) for key in extras}
    known: dict[int, int] = {}  # flat place of a judged token -> its number, up to N
    before: list[int] = []
    for i, (row, path) in enumerate(zip(rows, nodes, strict=True)):
        first = max(1, len(row["prompt"]))  # nothing predicts the first token of all
        for previous, node in zip(path[first - 1 : -1], path[first:], strict=True):
            if node not in known:
                known[node] = len(known)
                before.append(previous)
        skipped = first - len(row["prompt"])  # of the response: 0, or 1 without a prompt
        part = slice(skipped, len(row["response"]))
        labels[i, part] = torch.tensor(row["response"])[skipped:]
        place[i, part] = torch.tensor([known[node] for node in path[first:]], dtype=torch.int64)
        for key in extras:
            values[key][i, part] = torch.as_tensor(row[key], dtype=torch.float32)[skipped:]
    place[place < 0] = len(known)
    targets = input_ids.view(-1)[torch.tensor(list(known))]  # [N]
    return {"labels": labels, "before": torch.tensor(before), "targets": targets,
            "place": place} | values  # fmt: skip


def build_trie(sequences: Sequence[Sequence[int]]) -> Tree:
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
        size = len(tree.tokens)
        for node in path[shared:]:
            tree.ends[node] = size
        path = path[:shared] + list(range(size, size + len(sequence) - shared))
        tree.tokens.extend(sequence[shared:])
        tree.depths.extend(range(shared, len(sequence)))
        tree.ends.extend([0] * (len(sequence) - shared))
        tree.paths[i] = path
        before = sequence
    for node in path:
        tree.ends[node] = len(tree.tokens)
    return tree


def attention_mask(ends: Tensor) -> Tensor:
    """Which token may look at which: bool [R, 1, L, L], True at [r, 0, i, j] where i sees j.

    ends: int64 [R, L]. Token i sees j if j does not stand after it and i lies in j's subtree,
    j <= i < ends[j]; each sees itself.
    """
    places = torch.arange(ends.shape[1], device=ends.device)
    before = places[:, None] >= places[None, :]
    return (before & (places[:, None] < ends[:, None, :]))[:, None]


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first members two sequences have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class TreeByTree(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` over one row of trees is made for each tree alone.

    For devices that gain by it (CPUs): a row of several trees needs no padding, but a mask over the
    whole row makes every token pay for all others, 26 to 31% of a step's time for a tenth of its
    arithmetic. Here the row is cut at the trees' ends, inside attention only.

    ends: int64 [1, L] (`attention_mask`). sizes: int64 [trees], tokens of each tree, in order;
    they add up to L. The mask that the model hands over is not looked at: see `no_mask`.
    """

    def __init__(self, ends: Tensor, sizes: Tensor):
        super().__init__()
        self.sizes = sizes.tolist()
        starts = sizes.cumsum(0) - sizes
        own = (ends[0] - starts.repeat_interleave(sizes)).split(self.sizes)  # [l] each
        self.masks = [attention_mask(one[None]) for one in own]  # bool [1, 1, l, l]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of each of its functions; only attention is another one."""
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **settings: Any
    ) -> Tensor:
        # [1, heads, L, head size] -> one [1, heads, l, head size] a tree
        parts = (part.split(self.sizes, dim=-2) for part in (query, key, value))
        each = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)
            for q, k, v, mask in zip(*parts, self.masks, strict=True)
        ]
        return torch.cat(each, dim=-2)


def no_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """What a model is given for a mask inside `TreeByTree`: NaN, [1, 1, L, L], of one number.

    A model that attended with it, by another function than that one, would give NaN and not
    something that looks right.
    """
    nothing = torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=ends.device)
    return nothing.expand(1, 1, *ends.shape[1:] * 2)
