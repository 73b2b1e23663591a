"""What a study leaves in its store for the manifest: weights, data, the device of each cell, and
where lost weights were trained again with other bits.
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
    notes: dict[str, Any] = {}
    for path in sorted((store / FOLDER).glob(f"{prefix}*.json")):
        with contextlib.suppress(ValueError, OSError):
            notes[path.stem.removeprefix(prefix)] = json.loads(path.read_text(encoding="utf-8"))
    return notes


def cells_of(results: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """device -> methods, from the results of one domain of one seed: method -> result.

    Methods that started from SFT models of different bits have those named beside the device.
    """
    starts = {result["sft"] for result in results.values() if "sft" in result}
    cells: dict[str, list[str]] = {}
    for method, result in results.items():
        place = result.get("device", UNKNOWN)
        if len(starts) > 1:
            place += f", SFT model {result.get('sft', UNKNOWN)}"
        cells.setdefault(place, []).append(method)
    return cells


def with_cells(known: Cells, notes: dict[str, Any]) -> Cells:
    """The devices of cells as they were known, with those that notes of a store name.

    notes: "seed0.maths" -> device -> methods; the seed's other domains stay as they were known.
    """
    cells = dict(known)
    for name, measured in sorted(notes.items()):
        seed, _, domain = name.partition(".")
        by_device = {
            device: {other: methods for other, methods in domains.items() if other != domain}
            for device, domains in cells.get(seed, {}).items()
        }
        for device, methods in measured.items():
            by_device.setdefault(device, {})[domain] = methods
        cells[seed] = {device: domains for device, domains in by_device.items() if domains}
    return cells


def several_devices(cells: Cells) -> str:
    """Which cells were measured where, in one line; "" where one device measured all of them, and
    each seed and domain from one SFT model."""
    if len({device for of_seed in cells.values() for device in of_seed} - {UNKNOWN}) < 2:
        return ""
    places = [
        f"{device}: {seed}, {name}: {', '.join(methods)}"
        for seed, of_seed in cells.items()
        for device, domains in of_seed.items()
        for name, methods in domains.items()
    ]
    return f"Cells were measured on several devices or SFT models. {'; '.join(places)}."
