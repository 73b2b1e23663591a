"""Key neurons: scores of every weight entry, and the mask of those that are trained.

A *neuron* here is one scalar entry of a trainable weight tensor, as in the paper; rows of weight
matrices are kept as the variant `granularity="row"`.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.machine.weights import UNREADABLE, one_line

WORDS = {
    "order": ("top", "bottom", "random"),
    "scope": ("global", "tensor"),
    "granularity": ("scalar", "row"),
}
_HEADER, _FORMAT = "allo_neuron_mask", 1


@dataclass(frozen=True)
class NeuronMask:
    """Which entries of which tensors are trained.

    Attributes:
        indices: tensor name -> int64 [kept in that tensor], flat positions, ascending. Every
            tensor that was scored has an entry, empty when nothing of it is kept.
        shapes: tensor name -> shape of the tensor.
        granularity: "scalar" or "row".

    Of a model that several processes share in parts, each has its own part of the mask.
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    granularity: str = "scalar"

    @property
    def kept(self) -> int:
        """Number of kept entries."""
        return sum(index.numel() for index in self.indices.values())

    @property
    def total(self) -> int:
        """Number of entries that were scored."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def share(self) -> float:
        """Kept entries over all entries."""
        return self.kept / self.total

    def dense(self, name: str) -> Tensor:
        """Bool tensor of the shape of `name`, True where kept."""
        if name not in self.indices:
            known = ", ".join(list(self.indices)[:3])
            raise AlloError(f"mask has no tensor {name!r}; expected one of {known}, ...")
        flat = torch.zeros(math.prod(self.shapes[name]), dtype=torch.bool)
        flat[self.indices[name]] = True
        return flat.view(self.shapes[name])

    def overlap(self, other: "NeuronMask") -> float:
        """Intersection over union of the two kept sets, in [0, 1]."""
        if self.shapes != other.shapes:
            raise AlloError("overlap: the masks are of different models; expected equal shapes")
        both = sum(
            int(torch.isin(self.indices[name], other.indices[name], assume_unique=True).sum())
            for name in self.indices
        )
        return both / (self.kept + other.kept - both)

    def check(self, model: torch.nn.Module) -> None:
        """Raise AlloError naming the first mismatch between mask and trainable tensors.

        Mismatches: a name that the model lacks, another shape, an index out of range, or kept
        entries in a parameter that does not require gradients.
        """
        parameters = dict(model.named_parameters())
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise AlloError(f"mask names {name!r}, which the model lacks: use its own mask")
            if tuple(parameters[name].shape) != tuple(shape):
                given = tuple(parameters[name].shape)
                raise AlloError(f"{name}: mask expects shape {tuple(shape)}, the model has {given}")
            index = self.indices[name]
            if not _is_index(index, math.prod(shape)):
                raise AlloError(f"{name}: mask indices are unsorted or reach past the tensor")
            if index.numel() and not parameters[name].requires_grad:
                raise AlloError(
                    f"{name}: the mask keeps entries of it, but it is frozen: unfreeze it"
                )

    def part_of(self, model: torch.nn.Module) -> "NeuronMask":
        """The kept entries that lie in what this process holds of the model (`devices`)."""
        tensors = dict(model.named_parameters())
        own = {
            name: devices.held(index, tensors[name]) + devices.begin(tensors[name])
            for name, index in self.indices.items()
        }
        return NeuronMask(own, self.shapes, self.granularity)

    def joined(self) -> "NeuronMask | None":
        """The parts of all processes as one, on the first; None on the others."""
        joined: dict[str, Tensor] = {}
        for name, index in self.indices.items():
            parts = devices.gathered(index)
            joined[name] = index if parts is None else torch.cat(parts)
        return NeuronMask(joined, self.shapes, self.granularity) if devices.rank() == 0 else None

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: int32 (or int64) indices per tensor, shapes as metadata.

        Equal masks give equal bytes.
        """
        tensors = {
            name: index.to(torch.int32 if math.prod(self.shapes[name]) < 2**31 else torch.int64)
            for name, index in self.indices.items()
        }
        header = {
            "format": _FORMAT,
            "granularity": self.granularity,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        # One key only: safetensors writes several in an order that changes from run to run.
        save_file(tensors, str(path), metadata={_HEADER: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "NeuronMask":
        """Read what `save` wrote; AlloError when the file is damaged or of another kind."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
            sound = header["format"] == _FORMAT and set(shapes) == set(tensors)
            sound = sound and header["granularity"] in WORDS["granularity"]
            sizes = [size for shape in shapes.values() for size in shape]
            sound = sound and all(type(size) is int and size >= 0 for size in sizes)
            sound = sound and all(_is_index(tensors[n], math.prod(s)) for n, s in shapes.items())
            if not sound or not any(index.numel() for index in tensors.values()):
                raise ValueError("its header and its indices do not fit together")
        except UNREADABLE as error:
            raise AlloError(
                f"{path} is not a readable mask file ({one_line(error)}): make it again"
            ) from error
        indices = {name: tensors[name].long() for name in shapes}
        return cls(indices, shapes, header["granularity"])


def _is_index(index: Tensor, size: int) -> bool:
    """Whether these are flat places, each once and ascending, of a tensor of so many entries."""
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        return False
    # Compared, not subtracted: differences of damaged numbers can wrap around.
    ascending = bool((index[1:] > index[:-1]).all())
    return not index.numel() or (ascending and int(index[0]) >= 0 and int(index[-1]) < size)


def delta_scores(
    before: dict[str, Tensor], after: dict[str, Tensor], lr: float = 1.0
) -> dict[str, Tensor]:
    """Importance of every neuron by how far vanilla DPO moved it: |after - before| / lr.

    Source: ALLO (arXiv 2406.12606), the importance estimate of "locating key neurons". Pass
    float32 master weights: in bfloat16 small updates round to nothing and scores become ties.

    Args:
        before, after: tensor name -> weights before and after the warm-up, equal shapes.
        lr: the warm-up's learning rate; it scales all scores alike and never their order.

    Returns:
        name -> float32 tensor of the same shape.

    Raises:
        AlloError: different names or shapes, NaN or infinite weights, or lr not above 0.
    """
    if not lr > 0:
        raise AlloError(f"delta_scores: lr is {lr}, expected a number above 0")
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (before, after)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())[0]
        given = " and ".join(str(one.get(odd, "missing")) for one in shapes)
        raise AlloError(f"delta_scores: {odd} is {given}; expected equal names and shapes")
    scores = {}
    for name, start in before.items():
        scores[name] = (after[name].float() - start.float()).abs_().div_(lr)
        if not torch.isfinite(scores[name]).all():
            raise AlloError(f"delta_scores: {name} holds NaN or infinity; check the warm-up run")
    return scores


def select_neurons(
    scores: dict[str, Tensor],
    share: float,
    *,
    order: str = "top",
    scope: str = "global",
    granularity: str = "scalar",
    seed: int = 0,
) -> NeuronMask:
    """Keep a share of all neurons, exactly.

    Args:
        scores: tensor name -> scores, any float dtype (compared as float32).
        share: 0 < share <= 1. Kept are round(share * n) neurons, at least 1, where n counts the
            entries ("scalar") or the rows ("row") of all tensors (scope "global") or of each one
            (scope "tensor"). The official code keeps ties and pre-selects per tensor, so that its
            share is not exact.
        order: "top" (largest scores), "bottom" (smallest), or "random" (scores are not read).
        granularity: "row" ranks rows (slices along the first dimension) by their mean score; a
            tensor of one dimension is one row.
        seed: for order "random" only.

    Equal scores are taken in the order of `scores` and then of the flat position, so that the
    result depends on nothing else.

    Of scores that are sharded over several processes (DTensors, as the parameters are) each gets
    its own part of the mask that one process would find. They exchange counts, never scores.

    Raises:
        AlloError: share out of range, unknown word, no scores, or NaN scores.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise AlloError(f"select_neurons: share is {share!r}, expected 0 < share <= 1")
    for word, value in (("order", order), ("scope", scope), ("granularity", granularity)):
        if value not in WORDS[word]:
            known = " | ".join(WORDS[word])
            raise AlloError(f"select_neurons: {word} is {value!r}, expected {known}")
    if not sum(score.numel() for score in scores.values()):
        raise AlloError("select_neurons: no scores were given; expected at least one tensor")
    for name, score in scores.items():
        if torch.isnan(devices.local(score)).any():
            raise AlloError(f"select_neurons: scores of {name} hold NaN; check the run they are of")
    sharded = any(map(devices.is_sharded, scores.values()))
    if sharded and (order == "random" or granularity == "row"):
        raise AlloError("select_neurons: of sharded scores only single ones are ranked, by score")
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    keys = {}
    for name, score in scores.items():
        values = devices.local(score).float()
        if granularity == "row":
            rows = values.shape[0] if values.ndim > 1 else 1
            values = values.reshape(rows, -1).mean(dim=1)  # [rows, entries of a row] -> [rows]
        keys[name] = _sortable(values.flatten(), order, f"{seed}:{name}")
    chosen: dict[str, Tensor] = {}
    for group in [keys] if scope == "global" else [{name: key} for name, key in keys.items()]:
        chosen |= _largest(group, share, sharded)
    for name, index in chosen.items():
        if granularity == "row":
            width = math.prod(shapes[name]) // keys[name].numel()
            index = (index[:, None] * width + torch.arange(width)).flatten()  # [rows * width]
        chosen[name] = index + devices.begin(scores[name])
    return NeuronMask(chosen, shapes, granularity)


def _sortable(values: Tensor, order: str, stream: str) -> Tensor:
    """int32 keys whose order is the order of preference."""
    if order == "random":
        # The name in the seed gives every tensor its own stream, whatever the others' sizes.
        digest = hashlib.sha256(stream.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        low, high = -(2**31), 2**31
        return torch.randint(low, high, values.shape, generator=generator, dtype=torch.int32)
    # IEEE floats compare like their bits once the negative ones are flipped; + 0.0 removes -0.0.
    bits = (values.cpu() + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys if order == "top" else ~keys


def _largest(keys: dict[str, Tensor], share: float, sharded: bool) -> dict[str, Tensor]:
    """Places of the largest keys; `sharded`: each process has a part of every tensor's."""

    def of_all(number: int) -> int:
        return int(devices.total(torch.tensor(number))) if sharded else number

    def above(key: int) -> int:
        return of_all(sum(int((values > key).count_nonzero()) for values in keys.values()))

    total = of_all(sum(key.numel() for key in keys.values()))
    kept = min(total, max(1, round(share * total)))
    # The smallest key that is kept, found by halving: exact, and without a sorted copy.
    low, high = -(2**31), 2**31 - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle) < kept else (middle + 1, high)
    ties = kept - above(low)
    # Equal keys go by tensor and then by place, which is by process: how many come before ours?
    equal = torch.tensor([int((key == low).count_nonzero()) for key in keys.values()])
    of_each = devices.each(equal) if sharded else equal[None]  # [processes, tensors]
    before = of_each.T.flatten().cumsum(0).view(of_each.T.shape) - of_each.T
    own = before[:, devices.rank() if sharded else 0].tolist()
    chosen = {}
    for (name, key), first in zip(keys.items(), own, strict=True):
        keep = key > low
        keep[(key == low).nonzero().flatten()[: max(0, ties - first)]] = True
        chosen[name] = keep.nonzero().flatten()
    return chosen


def count_ties(scores: dict[str, Tensor], mask: NeuronMask) -> dict[str, int]:
    """How arbitrary a "top" mask is: exact zeros, and entries that tie with the lowest kept score.

    Returns:
        `zeros`: scores equal to 0; `tied`: entries equal to the threshold; `tied_kept`: those of
        them that the mask keeps.
    """
    flat = {name: devices.local(score).flatten() for name, score in scores.items()}
    kept = [flat[name][devices.held(index, scores[name])] for name, index in mask.indices.items()]
    sharded = any(map(devices.is_sharded, scores.values()))
    least = min((float(values.min()) for values in kept if values.numel()), default=math.inf)
    lowest = torch.tensor(least, dtype=torch.float64)
    if sharded:
        lowest = devices.total(lowest, devices.SMALLEST)
    every, zero = [*flat.values()], torch.zeros_like(lowest)
    pairs = (every, zero), (every, lowest), (kept, lowest)
    counts = torch.tensor([sum(int((v == score).sum()) for v in group) for group, score in pairs])
    counts = devices.total(counts) if sharded else counts
    return dict(zip(("zeros", "tied", "tied_kept"), counts.tolist(), strict=True))


def chance_overlap(share: float) -> float:
    """Expected intersection over union of two random masks of the same share (large n)."""
    return share / (2 - share)
