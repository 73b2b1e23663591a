"""What an alignment changed, as one small file beside the model: `allo_delta.safetensors`.

For every tensor of the checkpoint of which bytes differ, by its name there: `<name>.indices`, flat
and ascending, int32 where they fit, else int64, and `<name>.values` in the base's dtype. Values
overwrite what is there and are never added, so that the result is the same to the byte. The header,
`allo_delta`, is JSON: id and revision of the base, its dtype, and SHA-256 over the tensors of base
and result.

Base and result are compared as transformers saves both, since a checkpoint has other names and
shapes than a model in memory (mixtures of experts), and tied tensors once.
"""

import json
import shutil
import tempfile
import uuid
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allo_lib.engine import models
from allo_lib.engine.reference import tensors_hash
from allo_lib.errors import AlloError
from allo_lib.machine.weights import UNREADABLE, one_line

NAME = "allo_delta.safetensors"
_HEADER, _FORMAT = "allo_delta", 1
_KEYS = {"format", "base", "revision", "dtype", "base_sha256", "result_sha256"}
_WEIGHTS = "model*.safetensors"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write(base: Path, result: Path, path: Path, about: dict) -> int:
    """Write the delta of two `save_pretrained` folders of one architecture; returns its bytes.

    about: `base` (id or folder), `revision` and `dtype` of the base, for the header.
    """
    changed = {}
    with _Checkpoint(base) as old, _Checkpoint(result) as new:
        for name in new.names:
            before, after = old[name], new[name]
            at = (_bits(before) != _bits(after)).nonzero().flatten()
            if at.numel():
                fits = after.numel() <= 2**31
                changed[f"{name}.indices"] = at.to(torch.int32 if fits else torch.int64)
                changed[f"{name}.values"] = after.flatten()[at]
        header = {"format": _FORMAT, "base_sha256": old.hash(), "result_sha256": new.hash()} | about
    # One key only: safetensors writes several in an order that changes from run to run.
    save_file(changed, str(path), metadata={_HEADER: json.dumps(header, sort_keys=True)})
    return path.stat().st_size


def merge(base, delta, output_dir) -> Path:
    """Write the aligned model as an ordinary `save_pretrained` folder, equal to the byte.

    Args:
        base: what the delta was made from: a hub id, a folder, or a transformers model.
        delta: path of an `allo_delta.safetensors`.
        output_dir: a folder that is not there yet; gets model and (of an id or folder) tokenizer.

    Raises:
        AlloError: another base than the delta's, a damaged delta, or `output_dir` is there.
    """
    output_dir, (header, changed) = Path(output_dir), _read(delta)
    if output_dir.exists():
        raise AlloError(f"merge: {output_dir} is there already; name a folder that is not")
    tokenizer = None
    if isinstance(base, (str, Path)):
        same = str(base) == header["base"]
        revision = header["revision"] if same else None
        base, tokenizer = models.pretrained(str(base), header["dtype"], revision)
    if getattr(base.config, "pad_token_id", None) is None and tokenizer is not None:
        base.config.pad_token_id = tokenizer.pad_token_id
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    part = output_dir.with_name(f".{output_dir.name}-{uuid.uuid4().hex[:8]}")
    try:
        base.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        _overwrite(part, delta, header, changed, base.name_or_path)
        part.rename(output_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output_dir


def load_aligned(base, delta):
    """The aligned model, of `base` and a delta as `merge` takes them, on the CPU in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        merged = merge(base, delta, Path(folder) / "merged")
        return AutoModelForCausalLM.from_pretrained(merged, dtype="auto")


def _overwrite(folder: Path, delta, header: dict, changed: dict, name: str) -> None:
    with _Checkpoint(folder) as there:
        if there.hash() != header["base_sha256"]:
            raise AlloError(
                f"{delta} was made from {header['base']!r} (revision {header['revision']}, sha256 "
                f"{header['base_sha256'][:12]}), and {name!r} has other weights "
                f"({there.hash()[:12]}); give the base that it was made from"
            )
    for file in sorted(folder.glob(_WEIGHTS)):
        tensors = load_file(str(file))
        for key, tensor in tensors.items():
            if key in changed:
                at, values = changed.pop(key)
                if values.dtype != tensor.dtype or int(at[-1]) >= tensor.numel():
                    raise _damaged(delta, f"{key} does not fit the base's")
                tensor.view(-1)[at] = values
        written = file.with_suffix(".part")  # what was read may still be mapped from the file
        save_file(tensors, str(written), metadata={"format": "pt"})
        written.replace(file)
    with _Checkpoint(folder) as there:
        if changed or there.hash() != header["result_sha256"]:
            raise _damaged(delta, "what it gives has another hash than it names")


def _read(path) -> tuple[dict, dict]:
    """The header, and name -> (indices, values) of each tensor."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            names = [key.removesuffix(".indices") for key in file.keys() if key.endswith("indices")]
            changed = {
                name: (file.get_tensor(f"{name}.indices").long(), file.get_tensor(f"{name}.values"))
                for name in names
            }
            sound = len(file.keys()) == 2 * len(names) and header.keys() >= _KEYS
            sound = sound and header["format"] == _FORMAT and type(header["base_sha256"]) is str
    except UNREADABLE as error:
        raise _damaged(path, one_line(error)) from error
    for name, (at, values) in changed.items():
        flat = at.ndim == 1 and at.shape == values.shape and at.numel()
        if not flat or int(at[0]) < 0 or not bool((at.diff() > 0).all()):
            raise _damaged(path, f"indices of {name}")
    if not sound:
        raise _damaged(path, "header")
    return header, changed


def _damaged(path, what: str) -> AlloError:
    return AlloError(
        f"{path} is no sound delta ({what}); expected the {NAME} that align wrote: copy it again"
    )


class _Checkpoint:
    """The tensors of a `save_pretrained` folder, read one at a time."""

    def __init__(self, folder: Path):
        self._files = [safe_open(str(f), framework="pt") for f in sorted(folder.glob(_WEIGHTS))]
        self._file_of = {name: file for file in self._files for name in file.keys()}
        self.names = sorted(self._file_of)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file_of.clear()
        self._files.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
        return tensors_hash((name, self[name]) for name in self.names)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes as integers, flat: a NaN equals itself, and 0.0 is not -0.0."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])
