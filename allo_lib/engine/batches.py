"""From encoded rows to the tensors of one forward pass: which tokens are read, which are judged.

A batch has two sides. What the model reads: `input_ids`, `position_ids` and, where sequences share
their prefixes (`prefix_tree`), `ends`, all int64 [R, L]; where all trees stand in one row, `sizes`,
int64 [trees]. What the loss judges: response tokens of B sequences, T the longest response;
`labels` int64 [B, T] (-100 behind the end), and float32 [B, T] for every further value that goes
along with the tokens. Between them stand `before` and `targets`, int64 [N]: the flat place whose
hidden state predicts a token, and the token; and `place`, int64 [B, T]: which of the N log-probs
belongs here, N where there is none.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allo_lib.engine import prefix_tree
from allo_lib.engine.prefix_tree import Tree
from allo_lib.method.losses import IGNORED


@dataclass(frozen=True)
class Layout:
    """How sequences become rows. shared: one tree for what begins alike, several trees a row; else
    one padded row a sequence, which every causal model can read. width: the model's hidden size.
    one_row: all trees in one row without padding, for attention tree by tree (`tree_attention`).
    multiple: tokens of which a row's length is a multiple. window: tokens that attention looks back
    where it does not see all, so that longer sequences are not shared; 0 for all."""

    pad_token_id: int
    shared: bool = False
    width: int = 1
    one_row: bool = False
    multiple: int = 1
    window: int = 0


def collate(rows: list[dict], layout: Layout) -> dict[str, Tensor]:
    """The batch of rows.

    rows: each has `prompt` and `response`, lists of token ids; further keys are lists of floats,
    one per response token. Without a prompt the first token of a response is predicted by nothing
    and left out, as in `losses.token_logps`.
    """
    sequences = [[*row["prompt"], *row["response"]] for row in rows]
    if layout.window and max(map(len, sequences)) > layout.window:
        layout = replace(layout, shared=False)
    if layout.shared:
        groups = _by_prompt(rows)
        trees = [prefix_tree.grow([sequences[i] for i in group]) for group in groups]
        sizes = [len(tree) for tree in trees]
        one_row = [list(range(len(trees)))]
        plan = one_row if layout.one_row else prefix_tree.arrange(sizes, layout.width)
    else:
        groups = [[i] for i in range(len(rows))]
        trees = prefix_tree.separate(sequences)
        plan = groups
    batch, starts = _read(trees, plan, layout)
    nodes: list[list[int]] = [[] for _ in rows]
    for tree, start, group in zip(trees, starts, groups, strict=True):
        for i, path in zip(group, tree.paths, strict=True):
            nodes[i] = [start + node for node in path]
    return batch | _judged(rows, nodes, batch["input_ids"])


def pair_batch(pairs: list[dict], layout: Layout) -> dict[str, Tensor]:
    """The chosen responses of B pairs, then their rejected ones in that order: 2B sequences.

    Each pair has `prompt`, `chosen`, `rejected`; further keys `chosen_<name>` and `rejected_<name>`
    become the further key `<name>` of the batch.
    """
    both = [side(pair, "chosen") for pair in pairs] + [side(pair, "rejected") for pair in pairs]
    return collate(both, layout)


def rejected_batch(pairs: list[dict], layout: Layout) -> dict[str, Tensor]:
    """The rejected responses alone."""
    return collate([side(pair, "rejected") for pair in pairs], layout)


def side(pair: dict, which: str) -> dict:
    """One response of a pair, "chosen" or "rejected", as a row."""
    extras = {
        key.removeprefix(f"{which}_"): value
        for key, value in pair.items()
        if key.startswith(f"{which}_")
    }
    return {"prompt": pair["prompt"], "response": pair[which]} | extras


def _by_prompt(rows: list[dict]) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row["prompt"]), []).append(i)
    return list(groups.values())


def _read(trees: list[Tree], plan: list[list[int]], layout: Layout):
    """What the model reads, and the flat place at which each tree starts."""
    length = max(sum(len(trees[i]) for i in row) for row in plan)
    length = -(-length // layout.multiple) * layout.multiple
    shape = len(plan), length
    input_ids = torch.full(shape, layout.pad_token_id)
    # Padding stands behind everything else and sees only itself.
    position_ids = torch.arange(length).repeat(len(plan), 1)
    ends = position_ids + 1
    starts = [0] * len(trees)
    for r, row in enumerate(plan):
        place = 0
        for i in row:
            tree, part = trees[i], slice(place, place + len(trees[i]))
            input_ids[r, part] = torch.tensor(tree.tokens)
            position_ids[r, part] = torch.tensor(tree.depths)
            ends[r, part] = torch.tensor(tree.ends) + place
            starts[i] = r * length + place
            place += len(tree)
    batch = {"input_ids": input_ids, "position_ids": position_ids}
    if layout.shared:
        batch["ends"] = ends
    if layout.shared and layout.one_row:
        batch["sizes"] = torch.tensor([len(tree) for tree in trees])
    return batch, starts


def _judged(rows: list[dict], nodes: list[list[int]], input_ids: Tensor) -> dict[str, Tensor]:
    """Which hidden states predict which tokens, and what goes along with the tokens."""
    longest = max(len(row["response"]) for row in rows)
    labels = torch.full((len(rows), longest), IGNORED)
    place = torch.empty_like(labels)
    known: dict[int, int] = {}  # flat place of a judged token -> its number
    before: list[int] = []
    numbers = []
    for row, path in zip(rows, nodes, strict=True):
        first = max(1, len(row["prompt"]))  # nothing predicts the first token of all
        for previous, node in zip(path[first - 1 : -1], path[first:], strict=True):
            if node not in known:
                known[node] = len(known)
                before.append(previous)
        numbers.append((first - len(row["prompt"]), [known[node] for node in path[first:]]))
    place.fill_(len(known))
    extras = [key for key in rows[0] if key not in ("prompt", "response")]
    values = {key: torch.zeros(labels.shape) for key in extras}
    for i, (row, (first, own)) in enumerate(zip(rows, numbers, strict=True)):
        part = slice(first, first + len(own))
        labels[i, part] = torch.tensor(row["response"])[first:]
        place[i, part] = torch.tensor(own)
        for key in extras:
            values[key][i, part] = torch.as_tensor(row[key], dtype=torch.float32)[first:]
    targets = input_ids.view(-1)[torch.tensor(list(known))]
    return {"labels": labels, "before": torch.tensor(before), "targets": targets,
            "place": place} | values  # fmt: skip
