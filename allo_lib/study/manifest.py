"""`manifest.json`: what made a results folder, and the SHA-256 of every file in it."""

import contextlib
import csv
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

from allo_lib.engine import provenance
from allo_lib.errors import AlloError
from allo_lib.machine import runtime

NAME = "manifest.json"
STORE = ".store"  # artifacts and marks of finished notebooks; local, never committed
SEED_FOLDER = "seed"  # with the seed's number behind it
ALL_SEEDS = "all"  # the group of the notebooks that run once over all seeds
# What a run that was killed while it wrote a file may leave beside it.
_HALF_WRITTEN = re.compile(r"\.(manifest\.json|measurements\.csv|outcomes\.parquet)\.\d+(\.tmp)?")


def file_hashes(results: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file under `results`, by relative path.

    Left out: the store, the manifest itself, copies of notebooks that failed, and half-written
    files of a killed run.
    """
    return {
        name: hashlib.sha256((results / name).read_bytes()).hexdigest()
        for name in file_names(results)
    }


def file_names(results: Path) -> list[str]:
    """Relative paths, sorted, of the files that a manifest lists."""
    found = []
    for folder, subfolders, names in os.walk(results):
        if Path(folder) == results:
            subfolders[:] = [name for name in subfolders if name != STORE]
        found += [Path(folder, name).relative_to(results).as_posix() for name in names]
    found = [name for name in found if not _HALF_WRITTEN.fullmatch(name)]
    return sorted(n for n in found if n != NAME and not n.endswith(".failed.ipynb"))


def read(results: Path) -> dict | None:
    """The manifest of a results folder, or None when it has none.

    Raises AlloError when the file is there but is no manifest.
    """
    path = results / NAME
    if not path.exists():
        return None
    advice = "restore it, or start over with --fresh"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AlloError(f"{path} is not readable JSON ({error}): {advice}") from error
    kinds = {"profile": str, "profile_hash": str, "seeds": list, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(told, dict) or not isinstance(told.get(key), kind):
            raise AlloError(f"{path} has no {kind.__name__} {key!r}: {advice}")
    return told


def write_json(path: Path, value) -> None:
    """Write `value` as JSON so that `path` is at any moment the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=1, ensure_ascii=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def build(
    results: Path,
    profile,
    overrides: dict,
    runs: dict[str, dict],
    machine: dict,
    commit: dict,
) -> dict:
    """The manifest of `results` as it is now.

    `runs` maps "seed0", "seed1", ... and "all" to `{"seconds": {notebook: seconds}, ...}` with the
    commit and the machine that ran it; those of an earlier manifest are kept where not given anew.
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
        "files": file_hashes(results),
    }


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
    """
    store, before = results / STORE, read(results) or {}
    found = {
        "weights": list(provenance.collect(store, provenance.WEIGHTS).values()),
        "data": provenance.collect(store, provenance.DATA),
    }
    known = {key: value or before.get(key, type(value)()) for key, value in found.items()}
    cells = provenance.with_cells(
        before.get("cells", {}), provenance.collect(store, provenance.CELLS)
    )
    again = before.get("trained_again", {}) | provenance.collect(store, provenance.AGAIN)
    return known | {"cells": cells} | ({"trained_again": again} if again else {})


def commit_of(root: Path) -> dict:
    """The checkout's git commit, and whether anything but results differed from it."""

    def git(*args: str) -> str | None:
        with contextlib.suppress(OSError):
            told = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True)
            return told.stdout.strip() if told.returncode == 0 else None
        return None

    # A folder inside somebody else's repository has no commit of its own.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    changed = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": bool(changed)}
