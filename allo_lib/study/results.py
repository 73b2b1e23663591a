"""From the results of a seed to rows of `measurements.csv`, and whose results a folder holds."""

import dataclasses
import json
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from allo_lib.engine import provenance
from allo_lib.engine.store import write_json
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.outcomes import Measurement, seeds_of
from allo_lib.evaluation.stats import Interval, mean_and_error, mean_interval
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.config import Profile
from allo_lib.profiles.profile_files import Part
from allo_lib.study import arms, instructions, scoring, win_rates
from allo_lib.study.overlaps import chance_within
from allo_lib.study.parallel import fill
from allo_lib.study.study import Study

__all__ = ["OVERLAPS", "check_folder", "difference", "methods_of", "overlap_rows", "seed_rows",
           "seeds_of", "top_masks", "unit", "update"]  # fmt: skip
# Pairs of score variants whose masks are compared, by the name of the comparison.
OVERLAPS = {
    "orders": ("delta", "order"),
    "halves": ("half_a", "half_b"),
    "estimators": ("delta", "gradient"),
    "magnitude": ("delta", "magnitude"),
}


def check_folder(folder: Path, profile: Profile) -> None:
    """AlloError when `folder` holds the results of another profile."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return
    try:
        given = json.loads(path.read_text(encoding="utf-8"))["profile_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise AlloError(f"{path} is not a readable manifest; use another --out") from error
    if given != profile.hash():
        raise AlloError(
            f"{folder} holds results of profile hash {given[:12]}, this run is "
            f"{profile.hash()[:12]}: choose another --out, or start over with --fresh"
        )


def methods_of(study: Study, name: str) -> list[str]:
    """Methods that the profile runs on a domain, in order, without repeats."""
    profile, domain = study.profile, study.domain(name)
    if domain.methods or domain.ablations:
        asked = ("sft_base", *domain.methods, *domain.ablations)
    else:
        asked = ("sft_base", *profile.methods, *profile.ablations)
    if domain.kind != "miniature":
        asked = tuple(m for m in asked if m not in ("allo_oracle_tokens", "allo_rm_oracle"))
    if domain.kind == "preferences":
        # SFT on chosen replies is RFT, as nothing is sampled; and the starting model, which is the
        # reference itself, gives every pair the margin 0: it ranks nothing.
        asked = tuple(m for m in asked if m not in ("rft", "sft_base"))
    once = profile.replicates.once if study.replicate else ()
    asked = tuple(m for m in asked if m not in once and arms.why_not(study, name, m) is None)
    return list(dict.fromkeys(asked))


def seed_rows(study: Study) -> list[Measurement]:
    """All rows of the study's seed; whatever is not in the store yet is made.

    Of several replicates a row tells the mean: what a method does to this seed's SFT model.
    """
    rows = []
    for name in study.profile.domains:
        runs = [results_of(study.at(replicate), name) for replicate in study.replicates]
        rows += mean_rows([_result_rows(study, name, results) for results in runs])
        instructions.write_outputs(study, name, runs[0])
        rows += win_rates.rows(study, name, runs[0])
        rows += overlap_rows(study, name)
        note = f"{provenance.CELLS}seed{study.seed}.{name}"
        provenance.leave(study.store.folder, note, provenance.cells_of(runs[0]))
    return rows


def results_of(study: Study, name: str) -> dict[str, dict]:
    """Results of all methods of a domain, of the study's replicate: method -> result."""
    return {method: arms.result(study, name, method) for method in methods_of(study, name)}


def _result_rows(study: Study, name: str, results: dict[str, dict]) -> list[Measurement]:
    """The rows of one replicate's results."""
    rows = []
    for method, found in results.items():
        rows += _method_rows(study, name, method, found)
    return rows


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
            value, stderr = (
                statistics.fmean(getattr(one, part) for one in same) for part in ("value", "stderr")
            )
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


def _method_rows(study: Study, name: str, method: str, found: dict) -> list[Measurement]:
    seed = study.seed
    rows = [
        Measurement(seed, method, name, metric, float(value), 0.0, count)
        for metric, value, count in (
            ("displacement", found["displacement"], 1),
            ("dev_score", found["dev"], scoring.dev_count(study, name)),
        )
        if value is not None  # as for weights that are NaN
    ]
    for number, rate in enumerate(found["rates"], start=1):
        rows.append(Measurement(seed, method, name, f"learning_rate_{number}", rate, 0.0, 1))
    if found["loss"]:
        rows.append(train_loss(seed, method, name, found["loss"][-1]))
    rows += _margin_rows(study, name, method, found["margins"])
    if "answers" not in found:
        return rows
    by_metric = {"accuracy": 3, "no_answer": 2}
    for metric, column in by_metric.items():
        parts = []
        for dataset in study.domain(name).datasets:
            rights = [row[column] == (metric == "accuracy") for row in _of(found, dataset)]
            parts.append(outcomes.proportion(seed, method, dataset, metric, rights))
        rows += parts
        if len(parts) > 1:
            rows.append(outcomes.average(parts, average_name(study, name)))
    return rows


def _of(found: dict, dataset: str) -> list[list]:
    return [row for row in found["answers"] if row[1] == dataset]


def train_loss(seed: int, method: str, name: str, losses: list[float]) -> Measurement:
    """Mean training loss of the last quarter of the steps of the last stage."""
    return _mean(seed, method, name, "train_loss", losses[-max(2, len(losses) // 4) :])


def _mean(seed: int, method: str, name: str, metric: str, values: list[float]) -> Measurement:
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Measurement(seed, method, name, metric, statistics.fmean(values), stderr, len(values))


def _margin_rows(study: Study, name: str, method: str, margins: list[float]) -> list[Measurement]:
    if not any(margins):  # the reference itself: every pair is a tie, nothing is ranked
        return []
    place = study.domain(name).datasets[0] if study.task(name) is None else name
    right = [margin > 0 for margin in margins]
    n = len(margins)
    stderr = statistics.stdev(margins) / n**0.5 if n > 1 else 0.0
    mean = statistics.fmean(margins)
    return [
        outcomes.proportion(study.seed, method, place, "reward_accuracy", right),
        Measurement(study.seed, method, place, "reward_margin", mean, stderr, n),
    ]


def top_masks(study: Study, name: str) -> dict[str, NeuronMask]:
    """Masks of the profile's share by every score variant that the profile compares."""
    variants = [v for key in study.profile.stability for v in OVERLAPS[key]]
    share = study.profile.method.share
    return {v: study.mask(name, "top", share, v) for v in dict.fromkeys(["delta", *variants])}


def overlap_rows(study: Study, name: str) -> list[Measurement]:
    """Overlap of each compared pair of masks, and what either chance would give (`overlaps`)."""
    rows = []
    for comparison in study.profile.stability:
        found = _overlap(study, name, *OVERLAPS[comparison])
        for metric in ("mask_overlap", "mask_overlap_chance", outcomes.CHANCE_IN_TENSORS):
            told = found[metric], 0.0, found["kept"]
            rows.append(Measurement(study.seed, comparison, name, metric, *told))
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


def update(study: Study, seeds: list[int]) -> list[Measurement]:
    """Write the rows of `seeds` into `measurements.csv`, beside those of others; returns all.

    Others are rows of other seeds and, where only some domains are worked on, of other domains.
    """
    path = study.results_dir / "measurements.csv"
    rows = outcomes.read_measurements(path) if path.is_file() else []
    answers = outcomes.read(study.results_dir / outcomes.NAME)
    studies = [
        study
        if seed == study.seed
        else Study(study.profile, seed, study.results_dir, study.data_dir)
        for seed in seeds
    ]
    fill(studies, {name: methods_of(study, name) for name in study.profile.domains})
    for of_seed in studies:
        rows = outcomes.merge_measurements(rows, seed_rows(of_seed), datasets_of(study))
        for name in study.profile.domains:
            answers = outcomes.merge(answers, outcomes_of(of_seed, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    outcomes.write_measurements(path, rows)
    if len(answers):
        outcomes.write(study.results_dir / outcomes.NAME, answers)
    return rows


def outcomes_of(study: Study, name: str):
    """The outcomes of all methods and replicates on a domain (`outcomes`), a DataFrame."""
    heldout = [row["id"] for row in study.pairs(name).rows["heldout"]]
    return outcomes.frame(
        (study.seed, replicate, method, name, found, heldout)
        for replicate in study.replicates
        for method, found in results_of(study.at(replicate), name).items()
    )


def difference(found: dict, baseline: dict) -> Interval:
    """Paired difference of two results on one seed's problems (or held-out pairs)."""
    groups: dict[str, list[int]] = {}
    for (place, ours), (_, theirs) in zip(_outcomes(found), _outcomes(baseline), strict=True):
        groups.setdefault(place, []).append(ours - theirs)
    effect, error = mean_and_error([np.array(group) for group in groups.values()], (1.0, -1.0))
    n = sum(map(len, groups.values()))
    return mean_interval({0: effect}, {0: error}, n).within(-1.0, 1.0)


def unit(found: dict) -> str:
    """What a result's outcomes are."""
    return "accuracy" if "answers" in found else "held-out reward accuracy"


def _outcomes(found: dict) -> list[tuple[str, bool]]:
    if "answers" in found:
        return [(row[1], bool(row[3])) for row in found["answers"]]
    return [("pairs", margin > 0) for margin in found["margins"]]
