"""From the results of a seed to rows of `measurements.csv` and to outcomes."""

import dataclasses
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

from allo_lib.engine.store import write_json
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.outcomes import Measurement
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.profile_files import Part
from allo_lib.study import judges, manifest, scoring, training
from allo_lib.study.importance import chance_within
from allo_lib.study.runs import domains_of, fill, methods_of
from allo_lib.study.study import Study

# Pairs of score variants whose masks are compared, by the name of the comparison.
OVERLAPS = {
    "orders": ("delta", "order"),
    "halves": ("half_a", "half_b"),
    "estimators": ("delta", "gradient"),
    "magnitude": ("delta", "magnitude"),
}


# --- the two files -------------------------------------------------------------------------------


def update(study: Study, seeds: list[int]) -> list[Measurement]:
    """Write the rows of `seeds` into `measurements.csv`, beside those of others; returns all.

    Others are rows of other seeds and, where only some domains are worked on, of other domains.
    """
    path, target = study.results_dir / "measurements.csv", study.results_dir / outcomes.NAME
    open_seed = partial(Study, results_dir=study.results_dir, data_dir=study.data_dir)
    studies = [study if seed == study.seed else open_seed(study.profile, seed) for seed in seeds]
    domains = [(one, name) for one in studies for name in domains_of(one)]
    fill((one, name, method) for one, name in domains for method in methods_of(one, name))
    # Only now: another process may have written while this one trained.
    rows = outcomes.read_measurements(path) if path.is_file() else []
    answers = outcomes.read(target)
    ours = datasets_of(study)
    for of_seed in studies:
        rows = [
            row
            for row in rows
            if row.seed != of_seed.seed or (ours is not None and row.dataset not in ours)
        ]
        rows += seed_rows(of_seed)
        for name in domains_of(of_seed):
            answers = outcomes.merge(answers, outcomes_of(of_seed, name))
    if len(answers):
        outcomes.write(target, answers)
    outcomes.write_measurements(path, rows)
    return rows


def outcomes_of(study: Study, name: str):
    """The outcomes of all methods and replicates on a domain (`outcomes`), a DataFrame."""
    ids = [row["id"] for row in study.pairs(name).rows["heldout"]]
    # A question can have several pairs: q7, q7+1, ...
    heldout = [f"{one}+{n}" if (n := ids[:at].count(one)) else one for at, one in enumerate(ids)]
    return outcomes.frame(
        (study.seed, replicate, method, name, found, heldout)
        for replicate in study.replicates
        for method, found in results_of(study.at(replicate), name).items()
    )


def seed_rows(study: Study) -> list[Measurement]:
    """All rows of the study's seed; whatever is not in the store yet is made.

    Of several replicates a row tells the mean: what a method does to this seed's SFT model.
    """
    rows = []
    for name in domains_of(study):
        runs = [results_of(study.at(replicate), name) for replicate in study.replicates]
        rows += mean_rows(
            [
                [row for found in run.values() for row in _method_rows(study, name, found)]
                for run in runs
            ]
        )
        rows += judges.reply_rows(study, name, runs[0])
        rows += overlap_rows(study, name)
        made_by = {one.get("commit") or manifest.UNKNOWN for run in runs for one in run.values()}
        notes = {manifest.CELLS: manifest.cells_of(runs), manifest.COMMITS: sorted(made_by)}
        for kind, note in notes.items():
            manifest.leave(study.store, f"{kind}seed{study.seed}.{name}", note)
    return rows


def results_of(study: Study, name: str) -> dict[str, dict]:
    """Results of all methods of a domain, of the study's replicate: method -> result."""
    return {method: training.result(study, name, method) for method in methods_of(study, name)}


def mean_rows(runs: list[list[Measurement]]) -> list[Measurement]:
    """The mean of every row over the replicates of its method, where all of these have it.

    The standard error is that of one replicate, as all answer the same problems; n is theirs.
    """
    if len(runs) == 1:
        return runs[0]
    by_run = [{(row.method, row.dataset, row.metric): row for row in rows} for rows in runs]
    times = Counter(method for rows in by_run for method in {method for method, *_ in rows})
    means = []
    for key, row in by_run[0].items():
        same = [rows[key] for rows in by_run if key in rows]
        if len(same) == times[row.method]:
            value, stderr = (statistics.fmean(getattr(one, part) for one in same)
                             for part in ("value", "stderr"))  # fmt: skip
            means.append(dataclasses.replace(row, value=value, stderr=stderr))
    return means


def average_name(study: Study, name: str) -> str:
    """What the mean over a domain's data sets is called: `average` where no other has one."""
    domains = study.profile.to_dict()["domains"].values()
    several = [d for d in domains if d["kind"] != "preferences" and len(d["datasets"]) > 1]
    return outcomes.AVERAGE if len(several) < 2 else f"{outcomes.AVERAGE}:{name}"


def datasets_of(study: Study) -> set[str] | None:
    """Every data set that rows of the study can name; None where the profile is a whole one."""
    if not isinstance(study.profile, Part):
        return None
    names = {average_name(study, name) for name in study.profile.domains}
    for name, domain in study.profile.domains.items():
        names |= {name, *domain.datasets, *domain.instructions.datasets}
    return names


def _method_rows(study: Study, name: str, found: dict) -> list[Measurement]:
    """Rows of one result."""
    row = partial(Measurement, study.seed, found["method"])
    share = partial(outcomes.proportion, study.seed, found["method"])
    rows = [row(name, "dev_score", float(found["dev"]), 0.0, scoring.dev_count(study, name))]
    if found["displacement"] is not None:  # as for weights that are NaN
        rows.append(row(name, "displacement", float(found["displacement"]), 0.0, 1))
    for number, rate in enumerate(found["rates"], start=1):
        rows.append(row(name, f"learning_rate_{number}", rate, 0.0, 1))
    if found["loss"]:  # of the last quarter of the steps of the last stage
        losses = found["loss"][-1]
        rows.append(row(name, "train_loss", *_mean(losses[-max(2, len(losses) // 4) :])))
    margins = found["margins"]
    if margins and found["method"] != scoring.REFERENCE:  # which ranks nothing: every pair is a tie
        place = study.domain(name).datasets[0] if study.task(name) is None else name
        rows.append(share(place, "reward_accuracy", [margin > 0 for margin in margins]))
        rows.append(row(place, "reward_margin", *_mean(margins)))
    for metric, column, counted in (("accuracy", 3, 1), ("no_answer", 2, 0)):
        parts = [
            share(
                dataset, metric, [a[column] == counted for a in found["answers"] if a[1] == dataset]
            )
            for dataset in study.domain(name).datasets
            if "answers" in found
        ]
        rows += parts
        if len(parts) > 1:
            rows.append(outcomes.average(parts, average_name(study, name)))
    return rows


def _mean(values: list[float]) -> tuple[float, float, int]:
    """Mean, its standard error (0 of a single value), and count."""
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), stderr, len(values)


# --- overlaps of masks ---------------------------------------------------------------------------


def top_masks(study: Study, name: str) -> dict[str, NeuronMask]:
    """Masks of the profile's share by every score variant that the profile compares."""
    variants = [v for key in study.profile.stability for v in OVERLAPS[key]]
    share = study.profile.method.share
    return {v: study.mask(name, "top", share, v) for v in dict.fromkeys(["delta", *variants])}


def overlap_rows(study: Study, name: str) -> list[Measurement]:
    """Overlap of each compared pair of masks, and what either chance would give (`importance`)."""
    rows = []
    for comparison in study.profile.stability:
        found = _overlap(study, name, *OVERLAPS[comparison])
        for metric in ("mask_overlap", "mask_overlap_chance", outcomes.CHANCE_IN_TENSORS):
            value, n = found[metric], found["kept"]
            rows.append(Measurement(study.seed, comparison, name, metric, value, 0.0, n))
    return rows


def _overlap(study: Study, name: str, first: str, second: str) -> dict:
    """Kept, so that rows can be written again where the masks themselves are no longer."""
    share = study.profile.method.share
    masks = [study.kept_neurons(name, "top", share, variant) for variant in (first, second)]

    def make(folder: Path) -> None:
        one, other = (NeuronMask.load(mask.file("mask.safetensors")) for mask in masks)
        found = {"mask_overlap": one.overlap(other), "kept": one.kept}
        found["mask_overlap_chance"] = neurons.chance_overlap(one.share)
        found[outcomes.CHANCE_IN_TENSORS] = chance_within(one, other)
        write_json(folder / "record.json", found)

    return study.store.get("overlap", {"masks": [mask.key for mask in masks]}, make).json()
