"""`run_all.sh verify`: results against the hashes in their manifest, or against a new run."""

import csv
import dataclasses
import shutil
import tempfile
from pathlib import Path

from allo_lib import driver, manifest
from allo_lib.config import settings_hash
from allo_lib.errors import AlloError
from allo_lib.marks import Run
from allo_lib.profile_files import load_profile

TOLERANCE = 1e-9  # absolute, on values and standard errors
# Another number of threads, or another processor, adds up in another order. Of 48 pairs under a
# model of width 128, in float32, 1 thread against 2, 3, 4 and 8 and against the instructions of
# older processors (AVX2; SSE alone), tests/test_repeat.py measured
# - per-token log-probs of the same weights, absolute: at most 2.9e-6 (by threads 1.4e-6);
LOGP_TOLERANCE = 1e-5
# - weights after 12 steps of DPO on a mask, as a share of the learning rate: at most 1.2e-4;
WEIGHT_TOLERANCE = 0.01
# - intersection over union of masks from a warm-up of 12 steps: 1.
MASK_AGREEMENT = 0.999
# Whole studies draw and decode by such numbers: a near tie that falls to the other side is another
# response, so cells of measurements.csv from elsewhere are not held to TOLERANCE but are reported.
ROW_KEY = ("seed", "method", "dataset", "metric")
CELLS = ("value", "stderr", "n")
# Settings of two runs that may explain different numbers.
CIRCUMSTANCES = ("commit", "dirty", "size", "python", "platform", "processor", "device", "threads")


def as_recorded(run: Run) -> Run:
    """The same run with the size and the `-p` values that its results were made with.

    Raises AlloError when there is no manifest.
    """
    told = manifest.read(run.results)
    if told is None:
        raise AlloError(f"{run.results} has no {manifest.NAME}: run the profile first")
    overrides = run.overrides or told.get("overrides", {})
    profile = load_profile(run.given, overrides, device=told.get("size"))
    return dataclasses.replace(run, overrides=overrides, profile=profile)


def check_files(run: Run) -> list[str]:
    """One line for every file that is not what the manifest says, and for a changed profile."""
    told = manifest.read(run.results)
    problems = []
    if settings_hash(told.get("settings") or {}) != told["profile_hash"]:
        problems.append(f"{manifest.NAME}: its settings do not have its profile hash")
    if told["profile_hash"] != run.profile.hash():
        problems.append(
            f"made by profile hash {told['profile_hash'][:12]}, but {run.profile.name} now has "
            f"{run.profile.hash()[:12]}"
        )
    expected, found = told["files"], manifest.file_hashes(run.results)
    for name in sorted({*expected, *found}):
        if name not in found:
            problems.append(f"{name}: missing")
        elif name not in expected:
            problems.append(f"{name}: not in the manifest")
        elif expected[name] != found[name]:
            problems.append(f"{name}: differs from the manifest")
    return problems


def rerun(run: Run) -> list[str]:
    """Run the same seeds again into a temporary folder and compare `measurements.csv` by cells.

    Prints how many cells are equal and within tolerance; returns a line for each that is not, and
    what differs between the two runs. The new results are kept when anything differs.
    """
    told = manifest.read(run.results)
    if load_profile(run.given, run.overrides).hash() != run.profile.hash():
        raise AlloError(
            f"these results are of size {run.profile.size}, which this machine's device does not "
            "run: verify --rerun needs one that does"
        )
    folder = Path(tempfile.mkdtemp(prefix="allo-verify-"))
    seeds = tuple(told["seeds"]) or run.seeds
    again = dataclasses.replace(run, results=folder, seeds=seeds)
    driver.run_study(again)
    counts, problems = compare(run.results / "measurements.csv", folder / "measurements.csv")
    print(", ".join(f"{count} cells {kind}" for kind, count in counts.items()))
    if not problems:
        shutil.rmtree(folder)
        return []
    return [*problems, *differences(told, manifest.read(folder)), f"the new run is in {folder}"]


def compare(before: Path, after: Path) -> tuple[dict[str, int], list[str]]:
    """Cells of two `measurements.csv`: counts by verdict, and a line for each that differs."""
    old, new = _rows(before), _rows(after)
    counts, problems = {"equal": 0, "within tolerance": 0, "different": 0}, []
    for row in sorted({*old, *new}):
        name = " ".join(row)
        if row not in old or row not in new:
            counts["different"] += len(CELLS)
            problems.append(f"{name}: only in the {'earlier' if row in old else 'new'} run")
            continue
        for column in CELLS:
            verdict = _verdict(old[row][column], new[row][column])
            counts[verdict] += 1
            if verdict == "different":
                problems.append(
                    f"{name}: {column} was {old[row][column]}, is now {new[row][column]}"
                )
    return counts, problems


def _rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    if not path.is_file():
        raise AlloError(f"{path} is missing: nothing to compare")
    with path.open(newline="", encoding="utf-8") as handle:
        return {tuple(row[name] for name in ROW_KEY): row for row in csv.DictReader(handle)}


def _verdict(old: str, new: str) -> str:
    if old == new:
        return "equal"
    try:
        near = abs(float(old) - float(new)) <= TOLERANCE
    except ValueError:
        near = False
    return "within tolerance" if near else "different"


def differences(old: dict, new: dict) -> list[str]:
    """Circumstances and package versions in which two manifests differ, one line each."""
    lines = [
        f"{name} was {old.get(name)}, is now {new.get(name)}"
        for name in CIRCUMSTANCES
        if old.get(name) != new.get(name)
    ]
    then, now = old.get("versions", {}), new.get("versions", {})
    lines += [
        f"{name} was {then.get(name)}, is now {now.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    return lines or ["no package version, device or setting differs between the two runs"]
