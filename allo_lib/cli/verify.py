"""`run_all.sh status`: what is done and what it cost; `run_all.sh verify`: results against their
hashes, or against a new run."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from allo_lib.cli import driver
from allo_lib.cli.driver import Run, Step
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.comparisons import StudyResults
from allo_lib.evaluation.stats import LEVEL
from allo_lib.profiles.config import settings_hash
from allo_lib.profiles.profile_files import load_profile, part_of
from allo_lib.study import manifest

TOLERANCE = 1e-9  # absolute, on values and standard errors
_ONLY = "only in the"  # of a row that one of two runs lacks
ROW_KEY = ["seed", "method", "dataset", "metric"]
CELLS = ["value", "stderr", "n"]
# Settings of two runs that may explain different numbers.
CIRCUMSTANCES = ("commit", "dirty", "size", "python", "platform", "processor", "device", "threads")


# --- status --------------------------------------------------------------------------------------


def describe(run: Run) -> str:
    """The state of a results folder as text: every notebook, methods without a result, and the
    store's artifacts by kind."""
    from allo_lib.study import runs  # loads torch
    from allo_lib.study.study import Study

    profile = run.profile
    lines = [f"{profile.name}, profile hash {profile.hash()[:12]}, {run.results}"]
    recorded = manifest.read(run.results) or manifest.owner(run.results) or {}
    if recorded.get("profile_hash", profile.hash()) != profile.hash():
        lines.append(f"it holds results of another profile hash, {recorded['profile_hash'][:12]}")
    runs_of = recorded.get("runs", {})
    seconds = {group: one.get("seconds", {}) for group, one in runs_of.items()}
    lines.append("")
    for step in driver.steps(run):
        known = seconds.get(step.group, {}).get(step.notebook.stem)
        lines.append(f"{step.group}  {step.notebook.stem}: {_state(step, known)}")
    if others := sorted(seconds.keys() - {step.group for step in driver.steps(run)}):
        lines += ["", "other seeds, or run in pieces (--seeds and --domains show them):"]
        for group in others:
            total = sum(seconds[group].values())
            lines.append(f"{group}: {len(seconds[group])} notebooks, {total:.1f} s")
    try:
        profile = part_of(profile, run.domains) if run.domains else profile
        data = None if run.data is None else str(run.data)
        for seed in run.seeds:
            lines += ["", *runs.missing(Study(profile, seed, run.results, data))]
    except (AlloError, OSError) as error:  # such as no data
        lines += ["", f"missing methods: unknown ({error})"]
    records = [manifest.read_json(p) for p in (run.results / manifest.STORE).rglob(manifest.NAME)]
    if artifacts := [record for record in records if record and "kind" in record]:
        table = pd.DataFrame(artifacts).assign(artifacts=1, MB=lambda t: t["bytes"] / 1e6)
        costs = table.groupby("kind")[["artifacts", "seconds", "MB"]].sum().reset_index()
        lines += ["", costs.to_string(index=False, float_format="{:.1f}".format)]
    return "\n".join(lines)


def _state(step: Step, recorded: float | None) -> str:
    stamp = step.stamp()
    if stamp is None:
        return "missing" if recorded is None else f"{recorded:.1f} s by the manifest, not here"
    return f"{stamp['seconds']:.1f} s" if step.is_done() else "to redo"


# --- verify --------------------------------------------------------------------------------------


def as_recorded(run: Run) -> Run:
    """The same run with the size and the `-p` values that its results were made with.

    Raises AlloError when there is no manifest.
    """
    recorded = manifest.read(run.results)
    if recorded is None:
        raise AlloError(f"{run.results} has no {manifest.NAME}: run the profile first")
    overrides = run.overrides or recorded.get("overrides", {})
    profile = load_profile(run.profile_name, overrides, device=recorded.get("size"))
    return dataclasses.replace(run, overrides=overrides, profile=profile)


def check_files(run: Run) -> list[str]:
    """One line for every file that is not what the manifest says, and for a changed profile."""
    recorded = manifest.read(run.results)
    problems = []
    if settings_hash(recorded.get("settings") or {}) != recorded["profile_hash"]:
        problems.append(f"{manifest.NAME}: its settings do not have its profile hash")
    if recorded["profile_hash"] != run.profile.hash():
        problems.append(
            f"made by profile hash {recorded['profile_hash'][:12]}, but {run.profile.name} now has "
            f"{run.profile.hash()[:12]}"
        )
    expected, present = recorded["files"], manifest.file_hashes(run.results)
    for name in sorted({*expected, *present}):
        if name not in present:
            problems.append(f"{name}: missing")
        elif name not in expected:
            problems.append(f"{name}: not in the manifest")
        elif expected[name] != present[name]:
            problems.append(f"{name}: differs from the manifest")
    return problems


def rerun(run: Run) -> list[str]:
    """Run the same seeds again into a temporary folder and compare the two.

    By the cells of `measurements.csv` and the outcomes; where these differ and the committed ones
    were made on another device, every run by `outside_spread`. Prints what was compared; returns a
    line for each thing that is not as it should be, and what differs between the two runs. The new
    results are kept when there is any.
    """
    old = manifest.read(run.results)
    if load_profile(run.profile_name, run.overrides).hash() != run.profile.hash():
        raise AlloError(
            f"these results are of size {run.profile.size}, which this machine's device does not "
            "run: verify --rerun needs one that does"
        )
    folder = Path(tempfile.mkdtemp(prefix="allo-verify-"))
    seeds = tuple(old["seeds"]) or run.seeds
    driver.run_study(dataclasses.replace(run, results=folder, seeds=seeds))
    new = manifest.read(folder)
    counts, problems = compare(run.results / "measurements.csv", folder / "measurements.csv")
    print(", ".join(f"{count} cells {kind}" for kind, count in counts.items()))
    before, after = (outcomes.read(one / outcomes.NAME) for one in (run.results, folder))
    told = len(before) > 0  # results of earlier designs have none
    if told and not before.drop(columns="margin").equals(after.drop(columns="margin")):
        problems.append(f"{outcomes.NAME}: other outcomes")
    if told and problems and made_on(old) != made_on(new):
        lacking = [line for line in problems if _ONLY in line]
        judged, problems = outside_spread(run.results, folder)
        problems = lacking + problems
        print(f"another processor: {judged} runs judged by the spread of the committed ones")
    if not problems:
        shutil.rmtree(folder)
        return []
    return [*problems, *differences(old, new), f"the new run is in {folder}"]


def made_on(recorded: dict) -> set[str]:
    """The devices on which the results of a manifest were made."""
    cells = recorded.get("cells", {}).values()
    devices = {device.partition(", SFT model ")[0] for of_seed in cells for device in of_seed}
    return devices - {manifest.UNKNOWN} or {recorded.get("processor")}


def outside_spread(before: Path, after: Path) -> tuple[int, list[str]]:
    """Runs of `after` judged by those of `before`: how many, and a line for each that is outside.

    Of every method and domain with n committed runs (one a model and replicate), and of every
    overlap of masks with one a model, of mean m and standard deviation s, a run is to lie within m
    +- t s sqrt(1 + 1/n), Student's prediction interval for one more run; t is such that of all runs
    judged not even one lies outside by chance in 95% of reruns (Bonferroni). One committed run has
    no spread: another score is a problem, too.

    On another processor the log-probs of equal weights differ by up to 2.9e-6
    (tests/study/test_repeat.py), and a study draws and decodes by them: it is another draw.
    """
    old, new = (StudyResults.load(folder, models=2**32) for folder in (before, after))
    pairs = [
        (f"{domain.name}, {method}: {domain.metric}", old.runs(method, domain),
         new.runs(method, domain))
        for domain in old.domains
        for method in sorted(old.methods)
    ]  # fmt: skip
    masks, others = (_overlaps(folder) for folder in (before, after))
    pairs += [(what, masks[what], others.get(what, [])) for what in masks]
    judged, problems = sum(len(later) for _, earlier, later in pairs if len(earlier) > 1), []
    for what, earlier, later in pairs:
        if len(later) < len(earlier):
            problems.append(f"{what} of {len(later)} runs, and not of {len(earlier)} as before")
        if (n := len(earlier)) < 2:
            differ = n and len(later) and abs(earlier[0] - later[0]) > TOLERANCE
            told = f"{what}: one committed run has no spread to judge another by"
            problems += [told] if differ else []
            continue
        mean, spread = float(np.mean(earlier)), float(np.std(earlier, ddof=1))
        t = float(stdtrit(n - 1, 1 - (1 - LEVEL) / 2 / max(judged, 1)))
        half = t * spread * (1 + 1 / n) ** 0.5 + TOLERANCE
        problems += [
            f"{what} {score:.4f} lies outside "
            f"[{mean - half:.4f}, {mean + half:.4f}], where one more of {n} runs is expected"
            for score in later
            if abs(score - mean) > half
        ]
    return judged, problems


def _overlaps(folder: Path) -> dict[str, list[float]]:
    """Overlaps of masks, one a SFT model, by domain and comparison."""
    found: dict[str, list[float]] = {}
    for row in outcomes.read_measurements(folder / "measurements.csv"):
        if row.metric == "mask_overlap":
            found.setdefault(f"{row.dataset}, {row.method}: {row.metric}", []).append(row.value)
    return found


def compare(before: Path, after: Path) -> tuple[dict[str, int], list[str]]:
    """Cells of two `measurements.csv`: counts by verdict, and a line for each that differs."""
    for path in (before, after):
        if not path.is_file():
            raise AlloError(f"{path} is missing: nothing to compare")
    # As texts, so that equal means the same bytes.
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in (before, after)]
    both = pd.merge(*tables, on=ROW_KEY, how="outer", suffixes=(" was", " is"), indicator=True)
    counts, problems = {"equal": 0, "within tolerance": 0, "different": 0}, []
    for _, row in both.sort_values(ROW_KEY).iterrows():
        name = " ".join(row[ROW_KEY])
        if row["_merge"] != "both":
            counts["different"] += len(CELLS)
            side = "earlier" if row["_merge"] == "left_only" else "new"
            problems.append(f"{name}: {_ONLY} {side} run")
            continue
        for column in CELLS:
            was, now = row[f"{column} was"], row[f"{column} is"]
            if was == now:
                counts["equal"] += 1
            elif was and now and abs(float(was) - float(now)) <= TOLERANCE:
                counts["within tolerance"] += 1
            else:
                counts["different"] += 1
                problems.append(f"{name}: {column} was {was}, is now {now}")
    return counts, problems


def differences(old: dict, new: dict) -> list[str]:
    """Circumstances and package versions in which two manifests differ, one line each."""
    was, now = (one | one.get("versions", {}) for one in (old, new))
    packages = sorted({*old.get("versions", {}), *new.get("versions", {})})
    lines = [
        f"{name} was {was.get(name)}, is now {now.get(name)}"
        for name in (*CIRCUMSTANCES, *packages)
        if was.get(name) != now.get(name)
    ]
    return lines or ["no package version, device or setting differs between the two runs"]
