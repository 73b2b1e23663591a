"""Key neurons: scores of every weight entry, and the mask of those that are trained.

A *neuron* here is one scalar entry of a trainable weight tensor, as in the paper; rows of weight
matrices are kept as the variant `granularity="row"`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.machine.weights import UNREADABLE, one_line

ORDERS = ("top", "bottom", "random")
SCOPES = ("global", "tensor")
GRANULARITIES = ("scalar", "row")
_HEADER, _FORMAT = "allo_neuron_mask", 1
# Keys are ranked by their 32 bits in two passes of 16: exact, and without a sorted copy.
_HALF = 16
_CHUNK = 1 << 22  # entries handled at once, so that temporaries stay small beside the scores


def _countable(sizes: list[int]) -> list[int]:
    if math.prod(max(size, 1) for size in sizes) >= 2**63:
        raise ValueError("more entries than int64 can count")
    return sizes


_Sum = Callable[[Tensor], Tensor]  # over all processes that share a tensor
_Shape = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_countable)]


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
        return sum(_numel(shape) for shape in self.shapes.values())

    @property
    def share(self) -> float:
        """Kept entries over all entries."""
        return self.kept / self.total

    def dense(self, name: str) -> Tensor:
        """Bool tensor of the shape of `name`, True where kept."""
        if name not in self.indices:
            known = ", ".join(list(self.indices)[:3])
            raise AlloError(f"mask has no tensor {name!r}; expected one of {known}, ...")
        flat = torch.zeros(_numel(self.shapes[name]), dtype=torch.bool)
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
            if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= _numel(shape)):
                raise AlloError(f"{name}: mask indices reach {int(index[-1])}, past the tensor")
            if index.numel() and not parameters[name].requires_grad:
                raise AlloError(
                    f"{name}: the mask keeps entries of it, but it is frozen: unfreeze it"
                )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: int32 (or int64) indices per tensor, shapes as metadata.

        Equal masks give equal bytes.
        """
        tensors = {
            name: index.to(torch.int32 if _numel(self.shapes[name]) < 2**31 else torch.int64)
            for name, index in self.indices.items()
        }
        header = {
            "format": _FORMAT,
            "granularity": self.granularity,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        # One key only: safetensors writes several in an order that changes from run to run.
        save_file(tensors, str(path), metadata={_HEADER: json.dumps(header)})

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

    @classmethod
    def load(cls, path: str | Path) -> "NeuronMask":
        """Read what `save` wrote; AlloError when the file is damaged or of another kind."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except UNREADABLE as error:
            raise AlloError(
                f"{path} is not a readable mask file ({one_line(error)}): make it anew"
            ) from error
        if _HEADER not in metadata:
            raise AlloError(f"{path} is no mask: it lacks the header {_HEADER!r}; expected a mask")
        try:
            header = _Header.model_validate_json(metadata[_HEADER])
        except ValidationError as error:
            raise AlloError(
                f"{path}: the header of this mask file is damaged; make it anew"
            ) from error
        shapes = {name: tuple(shape) for name, shape in header.shapes.items()}
        if set(shapes) != set(tensors):
            raise AlloError(f"{path}: header and tensors name different tensors; make it anew")
        for name, index in tensors.items():
            if not _well_formed(index, _numel(shapes[name])):
                raise AlloError(
                    f"{path}: {_name(name)} has unsorted or out-of-range indices; make it anew"
                )
            if header.granularity == "row" and not _whole_rows(index.long(), shapes[name]):
                raise AlloError(f"{path}: {_name(name)} keeps parts of rows; make it anew")
        if not sum(index.numel() for index in tensors.values()):
            raise AlloError(f"{path} keeps nothing of any tensor; make it anew")
        indices = {name: tensors[name].long() for name in shapes}
        return cls(indices, shapes, header.granularity)


class _Header(BaseModel):
    """What a mask file says of itself, beside its tensors."""

    model_config = ConfigDict(strict=True)
    format: Annotated[int, Field(ge=_FORMAT, le=_FORMAT)]
    granularity: Literal["scalar", "row"]
    shapes: dict[str, _Shape]


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
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))[0]
        raise AlloError(f"delta_scores: {odd!r} is in only one of `before` and `after`")
    scores = {}
    for name, start in before.items():
        if start.shape != after[name].shape:
            raise AlloError(
                f"delta_scores: {name} has shape {tuple(start.shape)} before and "
                f"{tuple(after[name].shape)} after; expected equal shapes"
            )
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
    its own part of the mask that one process would find. They exchange histograms, never scores.

    Raises:
        AlloError: share out of range, unknown word, no scores, or NaN scores.
    """
    _check_selection(scores, share, order, scope, granularity)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    sharded = any(map(devices.is_sharded, scores.values()))
    if sharded and (order == "random" or granularity == "row"):
        raise AlloError("select_neurons: of sharded scores only single ones are ranked, by score")
    rows = {
        name: _neuron_scores(devices.local(score), granularity) for name, score in scores.items()
    }
    keys = {name: _sortable(row, order, seed, name) for name, row in rows.items()}
    if scope == "global":
        chosen = _largest(keys, share, sharded)
    else:
        chosen = {name: _largest({name: key}, share, sharded)[name] for name, key in keys.items()}
    if sharded:
        chosen = {name: index + devices.begin(scores[name]) for name, index in chosen.items()}
    if granularity == "row":
        chosen = {name: _expand_rows(rows_, shapes[name]) for name, rows_ in chosen.items()}
    return NeuronMask(chosen, shapes, granularity)


def count_ties(scores: dict[str, Tensor], mask: NeuronMask) -> dict[str, int]:
    """How arbitrary a "top" mask is: exact zeros, and entries that tie with the lowest kept score.

    Returns:
        `zeros`: scores equal to 0; `tied`: entries equal to the threshold; `tied_kept`: those of
        them that the mask keeps.
    """
    flat = {name: devices.local(score).flatten() for name, score in scores.items()}
    kept = {
        name: flat[name][devices.held(index, scores[name])] for name, index in mask.indices.items()
    }
    lowest = min(
        (float(values.min()) for values in kept.values() if values.numel()), default=math.inf
    )
    sharded = any(map(devices.is_sharded, scores.values()))
    if sharded:
        lowest = float(devices.total(torch.tensor(lowest), devices.SMALLEST))
    counts = [
        sum(int((score == 0).sum()) for score in flat.values()),
        sum(int((score == lowest).sum()) for score in flat.values()),
        sum(int((values == lowest).sum()) for values in kept.values()),
    ]
    counts = devices.total(torch.tensor(counts)).tolist() if sharded else counts
    return dict(zip(("zeros", "tied", "tied_kept"), counts, strict=True))


def chance_overlap(share: float) -> float:
    """Expected intersection over union of two random masks of the same share (large n)."""
    return share / (2 - share)


def _check_selection(
    scores: dict[str, Tensor], share: float, order: str, scope: str, granularity: str
) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise AlloError(f"select_neurons: share is {share!r}, expected 0 < share <= 1")
    words = (("order", order, ORDERS), ("scope", scope, SCOPES))
    for name, given, known in (*words, ("granularity", granularity, GRANULARITIES)):
        if given not in known:
            raise AlloError(f"select_neurons: {name} is {given!r}, expected {' | '.join(known)}")
    if not sum(score.numel() for score in scores.values()):
        raise AlloError("select_neurons: no scores were given; expected at least one tensor")
    for name, score in scores.items():
        if torch.isnan(devices.local(score)).any():
            raise AlloError(f"select_neurons: scores of {name} hold NaN; check the run they are of")


def _neuron_scores(score: Tensor, granularity: str) -> Tensor:
    if granularity == "scalar":
        return score.detach().flatten().float()
    matrix = score.detach().float().reshape(1 if score.ndim < 2 else score.shape[0], -1)
    return matrix.mean(dim=1)  # [rows, entries of a row] -> [rows]


def _sortable(values: Tensor, order: str, seed: int, name: str) -> Tensor:
    """int32 keys whose order is the order of preference."""
    if order == "random":
        # The name in the seed gives every tensor its own stream, whatever the others' sizes.
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        low, high = -(2**31), 2**31
        return torch.randint(low, high, values.shape, generator=generator, dtype=torch.int32)
    # IEEE floats compare like their bits once the negative ones are flipped; + 0.0 removes -0.0.
    bits = (values.cpu() + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys if order == "top" else ~keys


def _largest(keys: dict[str, Tensor], share: float, sharded: bool) -> dict[str, Tensor]:
    """Places of the largest keys; `sharded`: each process has a part of every tensor's."""
    add: _Sum = devices.total if sharded else lambda values: values
    total = int(add(torch.tensor(sum(key.numel() for key in keys.values()))))
    count = min(total, max(1, round(share * total)))
    if count == total:
        return {name: torch.arange(key.numel()) for name, key in keys.items()}
    threshold, ties = _threshold(keys, count, add)
    # Equal keys go by tensor and then by place, which is by process: how many come before ours?
    equal = torch.tensor([int((key == threshold).sum()) for key in keys.values()])
    of_each = devices.each(equal) if sharded else equal[None]  # [processes, tensors]
    before = of_each.T.flatten().cumsum(0).view(of_each.T.shape) - of_each.T
    chosen = {}
    own = before[:, devices.rank() if sharded else 0].tolist()
    for (name, key), first in zip(keys.items(), own, strict=True):
        keep = key > threshold
        keep[(key == threshold).nonzero().flatten()[: max(0, ties - first)]] = True
        chosen[name] = keep.nonzero().flatten()
    return chosen


def _threshold(keys: dict[str, Tensor], count: int, add: _Sum) -> tuple[int, int]:
    """The count-th largest key, and how many keys equal to it belong to the largest `count`."""
    high, above = _bucket(keys, count, add, lambda part: (part >> _HALF) + (1 << (_HALF - 1)))
    prefix = high - (1 << (_HALF - 1))

    def low_half(part: Tensor) -> Tensor:
        return (part[(part >> _HALF) == prefix]) & ((1 << _HALF) - 1)

    low, above_low = _bucket(keys, count - above, add, low_half)
    return (prefix << _HALF) | low, count - above - above_low


def _bucket(
    keys: dict[str, Tensor], count: int, add: _Sum, bucket_of: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
    """The bucket that holds the count-th largest key, and how many keys lie in higher ones."""
    histogram = torch.zeros(1 << _HALF, dtype=torch.int64)
    for key in keys.values():
        for part in key.split(_CHUNK):
            histogram += torch.bincount(bucket_of(part.long()), minlength=1 << _HALF)
    histogram = add(histogram)
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top >= count).nonzero()[0])
    above = int(from_top[position - 1]) if position else 0
    return (1 << _HALF) - 1 - position, above


def _expand_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    width = _numel(shape) if len(shape) < 2 else _numel(shape[1:])
    return (rows.unsqueeze(1) * width + torch.arange(width)).flatten()  # [rows * width]


def _whole_rows(index: Tensor, shape: tuple[int, ...]) -> bool:
    if not index.numel():
        return True
    width = _numel(shape) if len(shape) < 2 else _numel(shape[1:])
    rows = index[::width].div(width, rounding_mode="floor")
    return torch.equal(index, _expand_rows(rows, shape))


def _name(name: str) -> str:
    """A tensor's name as a message can show it: a damaged file may hold any characters."""
    return name if len(name) <= 80 and name.isprintable() else f"{ascii(name)[:77]}..."


def _well_formed(index: Tensor, size: int) -> bool:
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        return False
    if not index.numel():
        return True
    # Compared, not subtracted: differences of damaged numbers can wrap around.
    ascending = bool((index[1:] > index[:-1]).all())
    return ascending and int(index[0]) >= 0 and int(index[-1]) < size


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
