"""Weights of a model to and from safetensors, by the names of `named_parameters` (ties once).

Of a sharded model each process's own part.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.machine import devices

# What safetensors and torch raise for one damaged file or another.
UNREADABLE = (
    SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    OverflowError,
)  # fmt: skip


def snapshot(model, device=None) -> dict[str, Tensor]:
    """name -> copy of each parameter, on `device` (None: where the parameter is)."""
    return {
        name: value.to(device or value.device, copy=True) for name, value in _parts(model).items()
    }


@torch.no_grad()
def restore(model, weights: dict[str, Tensor]) -> None:
    """Copy `weights` into the model; AlloError when names or shapes differ."""
    parameters = _parts(model)
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))[0]
        raise AlloError(f"weights and model differ: {odd!r} is in only one of them")
    for name, value in weights.items():  # all first: a refusal leaves the model as it was
        if parameters[name].shape != value.shape:
            shapes = tuple(value.shape), tuple(parameters[name].shape)
            raise AlloError(f"weights of {name} have shape {shapes[0]}, the model has {shapes[1]}")
    for name, value in weights.items():
        parameters[name].copy_(value)


def save(model, path: Path) -> None:
    """Write all parameters to one safetensors file, in their own dtypes."""
    save_tensors(_parts(model), path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors to one safetensors file."""
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; AlloError when it is damaged."""
    try:
        return load_file(str(path))
    except UNREADABLE as error:
        raise AlloError(
            f"{path} is not a readable safetensors file ({one_line(error)}); make it again"
        ) from error


def one_line(error: Exception) -> str:
    """What an exception says, in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of (name, tensor) pairs, in their order."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        flat = devices.whole(value.detach()).cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def displacement(model, before: dict[str, Tensor]) -> float:
    """Euclidean distance of the weights from `before`, ||theta' - theta||, in float32."""
    squares = [
        (value.float() - before[name].float()).square().sum().item()
        for name, value in _parts(model).items()
    ]
    return sum(squares) ** 0.5


def _parts(model) -> dict[str, Tensor]:
    return {name: devices.local(value) for name, value in model.named_parameters()}
