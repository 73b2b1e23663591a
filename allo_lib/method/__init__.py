"""The method's own parts (losses, key neurons, token weights, the masked optimizer), and what its
losses and weights require of their arguments."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from allo_lib.errors import AlloError

_reads_values = True


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


def check(name: str, *tensors: Tensor, lengths: tuple[Tensor, ...] = (), beta: float = 1.0) -> None:
    """AlloError unless shapes are equal, values no NaN, lengths at least 1, and beta above 0."""
    shapes = {tuple(tensor.shape) for tensor in (*tensors, *lengths)}
    if len(shapes) > 1:
        raise AlloError(f"{name}: shapes {sorted(shapes)} given; expected them all equal")
    if not beta > 0:
        raise AlloError(f"{name}: beta is {beta}, expected a number above 0")
    if not _reads_values:
        return
    if any(bool(torch.isnan(tensor).any()) for tensor in tensors):
        raise AlloError(f"{name}: an argument holds NaN; check the model's outputs")
    if any(bool((length < 1).any()) for length in lengths):
        raise AlloError(f"{name}: a response has no tokens; leave such pairs out")
