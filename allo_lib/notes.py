"""What a study leaves in its store for the manifest: weights, data, and the device of each cell."""

import contextlib
import json
import os
from pathlib import Path

from allo_lib.store import write_json

FOLDER = "notes"
WEIGHTS, DATA, CELLS = "weights", "data-", "cells-"
UNKNOWN = "not told"  # the device of results that were stored before devices were noted


def leave(store: Path, name: str, value) -> None:
    """Write a note, whole or not at all: other processes read it while this one writes."""
    path = store / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(temporary, value)
    os.replace(temporary, path)


def collect(store: Path, prefix: str) -> dict:
    """Notes whose names start with `prefix`, by the rest of their names; unreadable ones not."""
    found = {}
    for path in sorted((store / FOLDER).glob(f"{prefix}*.json")):
        with contextlib.suppress(ValueError, OSError):
            found[path.stem.removeprefix(prefix)] = json.loads(path.read_text(encoding="utf-8"))
    return found


def cells_of(results: dict[str, dict[str, dict]]) -> dict[str, dict[str, list[str]]]:
    """device -> domain -> methods, from the results of one seed: domain -> method -> result."""
    cells: dict[str, dict[str, list[str]]] = {}
    for name, methods in results.items():
        for method, found in methods.items():
            on = cells.setdefault(found.get("device", UNKNOWN), {})
            on.setdefault(name, []).append(method)
    return cells


def several_devices(cells: dict[str, dict]) -> str:
    """Which cells were measured where, in one line; "" where one device measured all of them."""
    if len({device for of_seed in cells.values() for device in of_seed} - {UNKNOWN}) < 2:
        return ""
    told = [
        f"{device}: {seed}, {name}: {', '.join(methods)}"
        for seed, of_seed in cells.items()
        for device, domains in of_seed.items()
        for name, methods in domains.items()
    ]
    return f"Cells were measured on several devices. {'; '.join(told)}."
