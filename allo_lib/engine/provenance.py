"""What a study leaves in its store for the manifest: weights, data, and the device of each cell.

Of weights that were lost and trained again with other bits it leaves where that was.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from allo_lib.engine.store import write_json

FOLDER = "notes"
WEIGHTS, DATA, CELLS, AGAIN = "weights", "data-", "cells-", "again-"
UNKNOWN = "not told"  # the device of results that were stored before devices were noted

Cells = dict[str, dict[str, dict[str, list[str]]]]  # seed -> device -> domain -> methods


def leave(store: Path, name: str, value: Any) -> None:
    """Write a note, whole or not at all: other processes read it while this one writes."""
    path = store / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(temporary, value)
    os.replace(temporary, path)


def collect(store: Path, prefix: str) -> dict[str, Any]:
    """Notes whose names start with `prefix`, by the rest of their names; unreadable ones not."""
    found: dict[str, Any] = {}
    for path in sorted((store / FOLDER).glob(f"{prefix}*.json")):
        with contextlib.suppress(ValueError, OSError):
            found[path.stem.removeprefix(prefix)] = json.loads(path.read_text(encoding="utf-8"))
    return found


def cells_of(results: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """device -> methods, from the results of one domain of one seed: method -> result.

    Methods that started from SFT models of different bits have those named beside the device.
    """
    starts = {found["sft"] for found in results.values() if "sft" in found}
    cells: dict[str, list[str]] = {}
    for method, found in results.items():
        place = found.get("device", UNKNOWN)
        if len(starts) > 1:
            place += f", SFT model {found.get('sft', UNKNOWN)}"
        cells.setdefault(place, []).append(method)
    return cells


def with_cells(known: Cells, found: dict[str, Any]) -> Cells:
    """Devices of cells as they were known, with what the notes `found` in a store say of them.

    A note is of a seed ("seed0": device -> domain -> methods) or of a domain of it
    ("seed0.maths": device -> methods), which leaves the seed's other domains as they were known.
    """
    cells = dict(known)
    for name, told in sorted(found.items()):
        seed, _, domain = name.partition(".")
        if not domain:
            cells[seed] = told
            continue
        others = {
            device: {other: methods for other, methods in of_device.items() if other != domain}
            for device, of_device in cells.get(seed, {}).items()
        }
        for device, methods in told.items():
            others.setdefault(device, {})[domain] = methods
        cells[seed] = {device: of_device for device, of_device in others.items() if of_device}
    return cells


def several_devices(cells: Cells) -> str:
    """Which cells were measured where, in one line; "" where one device measured all of them, and
    each seed and domain from one SFT model."""
    if len({device for of_seed in cells.values() for device in of_seed} - {UNKNOWN}) < 2:
        return ""
    told = [
        f"{device}: {seed}, {name}: {', '.join(methods)}"
        for seed, of_seed in cells.items()
        for device, domains in of_seed.items()
        for name, methods in domains.items()
    ]
    return f"Cells were measured on several devices or SFT models. {'; '.join(told)}."
