"""`manifest.json`: what made a results folder, and the SHA-256 of every file in it."""

import contextlib
import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from allo_lib.engine.store import Store, sha256
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.machine import runtime

NAME = "manifest.json"
STORE = ".store"  # artifacts and marks of finished notebooks; local, never committed
SEED_FOLDER = "seed"  # with the seed's number behind it
ALL_SEEDS = "all"  # the group of the notebooks that run once over all seeds
# The manifest itself, copies of notebooks that failed, and hidden files: what a killed run leaves
# beside a file that it wrote, and what Jupyter and desktops leave.
_NOT_LISTED = re.compile(r"manifest\.json|.*\.failed\.ipynb|(.*/)?\..*")
# Notes that a study leaves in its store: weights, data, the device of each cell, and where lost
# weights were trained again with other bits.
FOLDER = "notes"
WEIGHTS, DATA, CELLS, AGAIN, COMMITS = "weights", "data-", "cells-", "again-", "commits-"
OWNER = "done/profile.json"  # in the store: whose it is, before there is a manifest
UNKNOWN = "not told"  # the device of results that were stored before devices were noted

Cells = dict[str, dict[str, dict[str, list[str]]]]  # seed -> device -> domain -> methods


def file_names(results: Path) -> list[str]:
    """Relative paths, sorted, of the files that a manifest lists: none of the store's."""
    found = [
        path.relative_to(results).as_posix()
        for top in results.glob("*")
        if top.name != STORE
        for path in (top.rglob("*") if top.is_dir() else [top])
        if not path.is_dir()
    ]
    return sorted(name for name in found if not _NOT_LISTED.fullmatch(name))


def file_hashes(results: Path) -> dict[str, str]:
    """SHA-256 (hex) of each of these files, by relative path."""
    return {name: sha256(results / name) for name in file_names(results)}


def read(results: Path) -> dict | None:
    """The manifest of a results folder, or None when it has none.

    Raises AlloError when the file is there but is no manifest.
    """
    path = results / NAME
    if not path.exists():
        return None
    advice = "restore it, or start over with --fresh"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AlloError(f"{path} is not readable JSON ({error}): {advice}") from error
    for key, kind in {"profile": str, "profile_hash": str, "seeds": list, "files": dict}.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise AlloError(f"{path} has no {kind.__name__} {key!r}: {advice}")
    return found


def owner(folder: Path) -> dict | None:
    """`profile` and `profile_hash` of an unfinished run, which has no manifest yet; or None."""
    return read_json(folder / STORE / OWNER)


def own(folder: Path, profile) -> None:
    """Leave in the folder's store whose it is."""
    mine = {"profile": profile.name, "profile_hash": profile.hash()}
    if owner(folder) != mine:
        write_json(folder / STORE / OWNER, mine)


def check_folder(folder: Path, profile) -> None:
    """AlloError when `folder` holds the results of another profile, or the store of one."""
    found = read(folder) or owner(folder)
    if found and found["profile_hash"] != profile.hash():
        raise AlloError(
            f"{folder} holds results of profile hash {found['profile_hash'][:12]}, but this run's "
            f"is {profile.hash()[:12]}: choose another --out, or replace these results with --fresh"
        )


def read_json(path: Path) -> dict | None:
    """The content of a JSON file; None where there is none, or half of one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def write_json(path: Path, value) -> None:
    """Write `value` as JSON so that `path` is at any moment the old file or the new one, whole."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    outcomes.replace_file(path, text.encode("utf-8"))


def build(
    results: Path, profile, overrides: dict, runs: dict[str, dict], machine: dict, commit: dict
) -> dict:
    """The manifest of `results` as it is now.

    `runs` maps "seed0", "seed1", ... and "all" to `{"seconds": {notebook: seconds}, ...}` with the
    commit and the machine that ran it; those of an earlier manifest are kept where `runs` has none.
    """
    merged = {**(read(results) or {}).get("runs", {}), **runs}
    in_order = sorted(merged, key=lambda name: (name == ALL_SEEDS, len(name), name))
    return {
        "profile": profile.name,
        "profile_hash": profile.hash(),
        "size": profile.size,
        "overrides": overrides,
        "settings": profile.to_dict(),
        "seeds": measured_seeds(results),
        **commit,
        **machine,
        "deterministic": runtime.ON_GPU if profile.size == "gpu" else runtime.ON_CPU,
        **noted(results),
        "runs": {name: merged[name] for name in in_order},
        "process_seconds": process_seconds(results),
        "files": file_hashes(results),
    }


def process_seconds(results: Path) -> int:
    """What making the artifacts of a store took, one process at a time; what was known before
    where that is more. Seconds of notebooks miss what an earlier run made that was stopped."""
    seconds = 0.0
    for path in (results / STORE).glob(f"*/[!.]*/{NAME}"):
        made = read_json(path) or {}  # of one that is being written
        # A candidate is made within a result, whose seconds hold its own.
        seconds += made.get("seconds", 0) if made.get("kind") != "candidate" else 0
    return max(round(seconds), (read(results) or {}).get("process_seconds", 0))


def note_redrawn(results: Path, written: list[Path], root: Path) -> None:
    """Take files that were made again into the manifest, and by which commit, if any changed."""
    before = read(results)
    if before is None:
        return
    names, known = {path.relative_to(results).as_posix() for path in written}, before["files"]
    now = {name: sha for name, sha in file_hashes(results).items() if name in names}
    if not now.items() <= known.items():
        new = {"files": dict(sorted((known | now).items())), "redrawn": commit_of(root)}
        write_json(results / NAME, before | new)


def measured_seeds(results: Path) -> list[int]:
    """Seeds that `measurements.csv` holds, sorted; without that file those with notebooks."""
    path = results / "measurements.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8") as handle:
            texts = {row.get("seed") or "" for row in csv.DictReader(handle)}
    else:
        stems = [path.stem for path in (results / "notebooks").glob("0[0-5]_*.ipynb")]
        texts = {(re.search(r"_seed(\d+)", stem) or ("", "0"))[1] for stem in stems}
    return sorted(int(text) for text in texts if text.isdecimal())


def noted(results: Path) -> dict:
    """What the library noted of the weights that ran (source, licence, SHA-256), of the data (rows
    and SHA-256 of every file) and of the device that made each cell; else what was known before.

    "trained_again": "seed0.maths.sft" -> the device on which these weights got other bits.
    "trained_at": "seed0.maths" -> the commits whose code finished its results.
    """
    before = read(results) or {}
    kinds = WEIGHTS, DATA, CELLS, AGAIN, COMMITS
    notes = {kind: collect(results / STORE, kind) for kind in kinds}
    every = *before.get("weights", []), *notes[WEIGHTS].values()
    models = {one.get("name"): one for one in every}
    found = {
        "weights": list(models.values()),
        "data": before.get("data", {}) | notes[DATA],
        "cells": with_cells(before.get("cells", {}), notes[CELLS]),
        "trained_again": before.get("trained_again", {}) | notes[AGAIN],
        "trained_at": before.get("trained_at", {}) | notes[COMMITS],
    }
    return {key: value for key, value in found.items() if value or not key.startswith("trained")}


def commit_of(root: Path) -> dict:
    """The checkout's git commit, and whether anything but results differed from it."""

    def git(*args: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    # A folder inside somebody else's repository has no commit of its own.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    changed = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": bool(changed)}


def leave(store: Store, name: str, value: Any) -> None:
    """Write a note, whole or not at all: other processes read it while this one writes. None where
    the store is only read."""
    if not store.reading:
        write_json(store.folder / FOLDER / f"{name}.json", value)


def leave_data(store: Store, results: Path, name: str, summary: dict[str, dict]) -> None:
    """Note the data of a domain: "ecqa/test" -> rows and SHA-256.

    AlloError where `results` holds results of other data of these names.
    """
    known = noted(results)["data"].get(name, {})
    for source, one in summary.items():
        was, now = (each.get("sha256") for each in (known.get(source, {}), one))
        if was and was != now:
            raise AlloError(
                f"{results} holds results of other data: {source} had SHA-256 {was[:12]}, and has "
                f"{now[:12]} now; name another results folder, or start over with --fresh"
            )
    leave(store, f"{DATA}{name}", summary)


def collect(store: Path, prefix: str) -> dict[str, Any]:
    """Notes whose names start with `prefix`, by the rest of their names; unreadable ones not."""
    paths = sorted((store / FOLDER).glob(f"{prefix}*.json"))
    notes = {path.stem.removeprefix(prefix): read_json(path) for path in paths}
    return {name: note for name, note in notes.items() if note is not None}


def cells_of(runs: list[dict[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """device -> methods, from all replicates of one domain of one seed, method -> result each.

    A method of which replicates were made on several devices stands under each. Methods that
    started from SFT models of different bits have those named beside the device.
    """
    starts = {result["sft"] for run in runs for result in run.values() if "sft" in result}
    cells: dict[str, list[str]] = {}
    for method, result in [one for run in runs for one in run.items()]:
        place = result.get("device", UNKNOWN)
        if len(starts) > 1:
            place += f", SFT model {result.get('sft', UNKNOWN)}"
        if method not in cells.setdefault(place, []):
            cells[place].append(method)
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
