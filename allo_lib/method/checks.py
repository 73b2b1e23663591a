"""What the losses ask of their arguments, and how a training loop leaves their values unread."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from allo_lib.errors import AlloError

_reads_values = True  # whether arguments are looked at, besides their shapes


@contextlib.contextmanager
def values_unread() -> Iterator[None]:
    """A block in which arguments are not searched for NaN and the like: a look at a value makes the
    host wait for a GPU. For training loops, which find such numbers in what they log."""
    global _reads_values
    before, _reads_values = _reads_values, False
    try:
        yield
    finally:
        _reads_values = before


def any_of(values: Tensor) -> bool:
    """Whether a bool tensor holds True; False where values are not read (`values_unread`)."""
    return _reads_values and bool(values.any())


def check(name: str, *tensors: Tensor, lengths: tuple[Tensor, ...] = (), **positive: float) -> None:
    """AlloError unless shapes are equal, values no NaN, lengths at least 1, settings above 0."""
    shapes = {tuple(tensor.shape) for tensor in (*tensors, *lengths)}
    if len(shapes) > 1:
        raise AlloError(f"{name}: shapes {sorted(shapes)} given; expected them all equal")
    for tensor in tensors:
        if tensor.is_floating_point() and any_of(torch.isnan(tensor)):
            raise AlloError(f"{name}: an argument holds NaN; check the model's outputs")
    for key, value in positive.items():
        if not value > 0:
            raise AlloError(f"{name}: {key} is {value}, expected a number above 0")
    for length in lengths:
        if any_of(length < 1):
            raise AlloError(f"{name}: a response has no tokens; leave such pairs out")
