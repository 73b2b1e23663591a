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
from allo_lib.errors import AlloError
from allo_lib.machine.weights import UNREADABLE, one_line, tensors_hash

NAME = "allo_delta.safetensors"
_HEADER, _FORMAT = "allo_delta", 1
_KEYS = {"format", "base", "revision", "dtype", "base_sha256", "result_sha256"}
_WEIGHTS = "model*.safetensors"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write(base: Path, result: Path, path: Path, about: dict) -> None:
    """Write the delta of two `save_pretrained` folders of one architecture.

    about: `base` (id or folder), `revision` and `dtype` of the base, for the header.
    """
    old, new, changed = _tensors(base), _tensors(result), {}
    for name, after in new.items():
        at = (_bits(old[name]) != _bits(after)).nonzero().flatten()
        if at.numel():
            fits = after.numel() <= 2**31
            changed[f"{name}.indices"] = at.to(torch.int32 if fits else torch.int64)
            changed[f"{name}.values"] = after.flatten()[at]
    hashes = {"base_sha256": tensors_hash(old.items()), "result_sha256": tensors_hash(new.items())}
    header = json.dumps({"format": _FORMAT} | hashes | about, sort_keys=True)
    # One key only: safetensors writes several in an order that changes from run to run.
    save_file(changed, str(path), metadata={_HEADER: header})


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
        revision = header["revision"] if str(base) == header["base"] else None
        base, tokenizer = models.pretrained(str(base), header["dtype"], revision)
        if getattr(base.config, "pad_token_id", None) is None:  # as `align` has set it
            base.config.pad_token_id = tokenizer.pad_token_id
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    part = output_dir.with_name(f".{output_dir.name}-{uuid.uuid4().hex[:8]}")
    try:
        base.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        found = tensors_hash(_tensors(part).items())
        if found != header["base_sha256"]:
            raise AlloError(
                f"{delta} was made from {header['base']!r} (revision {header['revision']}, sha256 "
                f"{header['base_sha256'][:12]}), and {base.name_or_path!r} has other weights "
                f"({found[:12]}); give the base that it was made from"
            )
        try:
            _overwrite(part, changed)
        except UNREADABLE as error:  # indices or values that do not fit
            raise _damaged(delta, one_line(error)) from error
        if tensors_hash(_tensors(part).items()) != header["result_sha256"]:
            raise _damaged(delta, "what it gives has another hash than it names")
        part.rename(output_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output_dir


def load_aligned(base, delta):
    """The aligned model, of `base` and a delta as `merge` takes them, on the CPU in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        merged = merge(base, delta, Path(folder) / "merged")
        return AutoModelForCausalLM.from_pretrained(merged, dtype="auto")


def _overwrite(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    """Write the values into the checkpoint's files."""
    for file in sorted(folder.glob(_WEIGHTS)):
        tensors = load_file(str(file))
        for name, tensor in tensors.items():
            if f"{name}.indices" in changed:
                at = changed[f"{name}.indices"].long()
                tensor.view(-1)[at] = changed[f"{name}.values"]
        written = file.with_suffix(".part")  # what was read may still be mapped from the file
        save_file(tensors, str(written), metadata={"format": "pt"})
        written.replace(file)


def _read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The header, and the tensors `<name>.indices` and `<name>.values`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
        if header["format"] != _FORMAT or not header.keys() >= _KEYS:
            raise ValueError("header")
        return header, load_file(str(path))
    except UNREADABLE as error:
        raise _damaged(path, one_line(error)) from error


def _damaged(path, what: str) -> AlloError:
    return AlloError(
        f"{path} is no sound delta ({what}); expected the {NAME} that align wrote: copy it again"
    )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a `save_pretrained` folder by name; mapped from its files, not read yet."""
    files = sorted(folder.glob(_WEIGHTS))
    return dict(sorted(pair for file in files for pair in load_file(str(file)).items()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes as integers, flat: a NaN equals itself, and 0.0 is not -0.0."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])
