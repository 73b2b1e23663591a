"""Log-probs of preference pairs under the model that a stage starts from: computed once, kept.

Per token, as key tokens are chosen by them; keyed by the model's weights and settings and by the
pairs' token ids, which say all of tokenizer, template and data that a log-prob depends on.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from allo_lib.engine.batching import Row
from allo_lib.engine.forward import SIDES, pair_logps
from allo_lib.engine.store import Store, write_json
from allo_lib.errors import AlloError
from allo_lib.machine import devices, weights

VERSION = 2  # of what is stored; raised when its meaning changes
_FILE = "logps.safetensors"
# Keys of a config that say nothing of log-probs; dtypes are those of the tensors.
_UNUSED = ("_name_or_path", "transformers_version", "architectures", "use_cache", "pad_token_id",
           "dtype")  # fmt: skip


def with_reference(
    model: Any, rows: list[Row], *, pad_token_id: int, batch_size: int, store: Store
) -> list[Row]:
    """Encoded pairs with `chosen_reference` and `rejected_reference` under the model as it stands.

    Computed by a forward pass over all pairs, unless the store has them.
    """
    inputs = {"model": state_hash(model), "pairs": rows_hash(rows), "version": VERSION}
    first, known = devices.rank() == 0, False
    values: list[dict[str, list[float]]] = []

    def make(folder: Path) -> None:
        write(values, folder / _FILE)
        write_json(folder / "record.json", {"pairs": len(rows)})

    if first and store.has("reference", inputs):
        known = (store.get("reference", inputs, make).path / _FILE).is_file()
    if not devices.of_first(known):  # of several processes all compute, or none does
        values = pair_logps(model, rows, pad_token_id, batch_size)
    return attach(rows, store.get("reference", inputs, make).file(_FILE) if first else None)


def write(values: list[dict[str, list[float]]], path: Path) -> None:
    """Keep the `chosen` and `rejected` log-probs of pairs as one safetensors file, float32."""
    flat = {side: torch.tensor([x for row in values for x in row[side]]) for side in SIDES}
    weights.save_tensors(flat, path)


def attach(rows: list[Row], path: Path | None) -> list[Row]:
    """Copies of the rows with the log-probs of a file; of several processes the first one reads it.

    AlloError when the file holds another number of tokens than the rows: it is of other pairs.
    """
    flat = devices.of_first(None if path is None else weights.read_tensors(path))
    result = [dict(row) for row in rows]
    for side in SIDES:
        lengths = [len(row[side]) for row in rows]
        stored = flat[side].numel() if side in flat else 0
        if stored != sum(lengths):
            raise AlloError(
                f"{path} has reference log-probs of {stored} {side} tokens, the pairs have "
                f"{sum(lengths)}: it was made for other pairs; delete it to make it again"
            )
        for row, part in zip(result, flat[side].split(lengths), strict=True):
            row[f"{side}_reference"] = part.tolist()
    return result


def state_hash(model: Any) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of all parameters and buffers, and of what
    the config says of how they are used."""
    config = model.config.to_dict() | {"attention": model.config._attn_implementation}
    used = {key: value for key, value in config.items() if key not in _UNUSED}
    tensors = weights.tensors_hash(sorted(model.state_dict().items()))
    return hashlib.sha256(f"{tensors} {sorted(used.items())}".encode()).hexdigest()


def rows_hash(rows: list[Row]) -> str:
    """SHA-256 (hex) of the token ids of pairs, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr([list(row[key]) for key in ("prompt", *SIDES)]).encode())
    return digest.hexdigest()
