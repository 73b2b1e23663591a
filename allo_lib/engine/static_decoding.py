"""Decoding on a GPU: steps that are replayed, on a cache with a place for every token to come.

A small model on a GPU waits for its kernels to be launched, not for arithmetic. Recorded once as a
CUDA graph, all kernels of a step are launched together. That takes tensors that stay where they
are: the cache is as long from the start as it will be at the end, and rows that have ended stay
until most have, when the others go on as a smaller batch. No step is compiled, which would take
longer than a small study decodes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from allo_lib.machine.runtime import plain_writes

# Steps between two looks at which rows have ended; up to as many are made in vain at the end.
_LOOK_AFTER = 8
# A batch of more rows than this begins anew with those left when a quarter is: a new recording and
# a copied cache cost about as much as a dozen steps.
_SMALL = 32


def finish(decoding) -> list[list[int]]:
    """The tokens of every response of a batch that has been read (`generation._Decoding`), with its
    end token if it has come to it."""
    decoding.take()
    if bool(decoding.over.all()):
        return decoding.ids
    most = decoding.limit - int(decoding.lengths.min()) + 2 * _LOOK_AFTER
    place = torch.tensor([decoding.mask.shape[1]], device=decoding.mask.device)
    layers = decoding.cache.layers
    decoding.cache.layers = [_Places(layer, most, place) for layer in layers]
    decoding.mask = F.pad(decoding.mask, (0, most)).bool()[:, None, None]  # [rows, 1, 1, places]
    with plain_writes():
        while not bool(decoding.over.all()):
            decoding.keep((~decoding.over).nonzero()[:, 0])
            _go_on(decoding, place, most)
    return decoding.ids


def _go_on(decoding, place: Tensor, most: int) -> None:
    """Go on with rows that are all under way until most of them have ended, of few rows all."""
    rows, device = len(decoding.rows), place.device
    left = rows // 4 if rows > _SMALL else 0
    written = torch.full((rows, most), -1, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)  # of the next column of `written`
    step = _recorded(lambda: _step(decoding, place, written, number), device)
    while rows - int(decoding.over.sum()) > left:
        for _ in range(_LOOK_AFTER):
            step()
    for row, tokens in zip(decoding.rows.tolist(), written.tolist(), strict=True):
        decoding.ids[row].extend(token for token in tokens if token >= 0)


def _step(decoding, place: Tensor, written: Tensor, number: Tensor) -> None:
    """Read the chosen tokens and choose the next ones; every tensor is changed in its place."""
    decoding.mask.index_fill_(3, place, True)
    decoding.positions.add_((~decoding.over).long()[:, None])  # an ended row stays in its context
    chosen = decoding.choose(decoding.read(decoding.chosen[:, None], decoding.positions))
    decoding.chosen.copy_(chosen)
    told = torch.where(decoding.over, -1, chosen)
    written.index_copy_(1, number, told[:, None])
    decoding.lengths.add_((~decoding.over).long())
    decoding.over.logical_or_((chosen == decoding.end) | (decoding.lengths >= decoding.limit))
    place.add_(1)
    number.add_(1)


def _recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What makes the same step again, its kernels launched together. One step is made here, as
    whatever a kernel sets up at its first call cannot be recorded."""
    if device.type != "cuda":
        return step
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Places(DynamicLayer):
    """A layer's keys and values, [rows, heads, places, head size], with `more` places behind those
    that are taken; the next token's go to `place`, int64 [1], which all layers share."""

    def __init__(self, layer: DynamicLayer, more: int, place: Tensor):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys = F.pad(layer.keys, (0, 0, 0, more))
        self.values = F.pad(layer.values, (0, 0, 0, more))
        self.place = place

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Put the states of one token into their place; returns all, the mask says which count."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values
