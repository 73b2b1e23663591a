"""Made-up but complete results with planted effects, for tests of what reads them."""

import numpy as np
import pandas as pd

from allo_lib.evaluation import outcomes
from allo_lib.evaluation.comparisons import StudyResults

# The planted accuracy of each method.
ACCURACY = {
    "sft_base": 0.50,
    "sft": 0.55,
    "dpo": 0.70,
    "dpo_top10": 0.78,
    "dpo_last10": 0.60,
    "dpo_random10": 0.69,
    "dpo_paper": 0.70,
    "dpo_top10_paper": 0.62,
    "dpo_last10_paper": 0.55,
    "dpo_long": 0.70,
    "dpo_top10_long": 0.72,
    "dpo_random10_long": 0.66,
    "dpo_last10_long": 0.70,
    "allo": 0.80,
    "allo_no_forgetting": 0.80,
    "allo_all_tokens_forgetting": 0.74,
    "allo_all_tokens_learning": 0.73,
    "allo_rm_shuffled": 0.72,
    "allo_rm_oracle": 0.82,
    "allo_rm_inverted": 0.68,
    "allo_official": 0.78,
}
# The planted margin of held-out pairs, where it is not that of all others.
MARGIN = {"dpo_top10": 0.8, "dpo_top10_paper": 0.3}
LOSS = {"dpo": 0.60, "dpo_top10": 0.55, "dpo_paper": 0.60, "dpo_top10_paper": 0.66}
OVERLAP = {"orders": 0.20, "halves": 0.12, "estimators": 0.15}
CHANCE = 0.0526


def table(
    models=(0, 1, 2), datasets=("chain", "scan", "story"), n=1000, domain="miniature",
    pairs=200, replicates=1,
):  # fmt: skip
    """Outcomes of every planted method; those of a problem are correlated over methods.

    Of every data set, model and replicate exactly the planted share is right. Without data sets the
    pairs are all that is measured, and the planted share of them is ranked right.
    """
    rng = np.random.default_rng(7)
    frames = []
    for model in models:
        for dataset in datasets:
            hardness = rng.random(n)
            for replicate in range(replicates):
                right = {m: _right(rng, hardness, share) for m, share in ACCURACY.items()}
                # Learning alone is right as often as ALLO, on other problems.
                if "allo_no_forgetting" in right:
                    right["allo_no_forgetting"] = right["allo"][::-1]
                place = model, replicate, domain, dataset
                frames += [_frame(place, m, one, None) for m, one in right.items()]
        hardness = rng.random(pairs)
        for replicate in range(replicates):
            place = model, replicate, domain, domain
            frames += [_frame(place, *one) for one in _pairs(rng, hardness, bool(datasets))]
    found = pd.concat(frames, ignore_index=True)
    return found.astype(dict.fromkeys(("method", "domain", "dataset", "problem"), "category"))


def _right(rng, hardness, share) -> np.ndarray:
    difficulty = 0.8 * hardness + 0.2 * rng.random(len(hardness))
    return difficulty <= np.quantile(difficulty, share)


def _pairs(rng, hardness, answered: bool):
    """(method, right, margin) each; where nothing is answered the margins' signs are planted."""
    for method, share in ACCURACY.items():
        margin = MARGIN.get(method, 0.5) + (0.5 - hardness) + 0.1 * rng.random(len(hardness))
        if not answered:
            margin = np.where(_right(rng, hardness, share), 1.0, -1.0) * np.abs(margin)
        yield method, margin > 0, margin


def _frame(place, method, right, margin) -> pd.DataFrame:
    model, replicate, domain, dataset = place
    return pd.DataFrame(
        {"model": model, "replicate": replicate, "method": method, "domain": domain,
         "dataset": dataset, "problem": [f"p{i}" for i in range(len(right))], "right": right,
         "answered": True, "margin": np.nan if margin is None else margin}
    )[outcomes.COLUMNS]  # fmt: skip


def rows(models=(0, 1, 2), domain="miniature"):
    """Measurements that are no outcomes: training losses, and overlaps of masks with chance."""
    rng = np.random.default_rng(7)
    make, found = outcomes.Measurement, []
    for seed in models:
        found += [
            make(seed, method, domain, "train_loss", loss + rng.normal(0, 0.002), 0.002, 50)
            for method, loss in LOSS.items()
        ]
        for method, overlap in OVERLAP.items():
            value = overlap + rng.normal(0, 0.003)
            found.append(make(seed, method, domain, "mask_overlap", value, 0.0, 1))
            found.append(make(seed, method, domain, outcomes.CHANCE_IN_TENSORS, CHANCE, 0.0, 1))
    return found


def results(models=(0, 1, 2), domain="miniature", **options) -> StudyResults:
    """The study of all that is planted on one domain; `options` are those of `table`."""
    made = table(models, domain=domain, **options)
    return StudyResults(made, rows(models, domain), max(models) + 1)


def joined(*parts: tuple[str, tuple[str, ...]], models=(0, 1, 2), n=1000) -> StudyResults:
    """The study of several domains, (name, data sets) each."""
    tables = [table(models, sets, n, domain=name) for name, sets in parts]
    measured = [row for name, _ in parts for row in rows(models, name)]
    return StudyResults(pd.concat(tables, ignore_index=True), measured, max(models) + 1)


def write(folder, models=(0, 1, 2), **options) -> None:
    """`outcomes.parquet` and `measurements.csv` of `results` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes.write_measurements(folder / "measurements.csv", rows(models))
    outcomes.write(folder / outcomes.NAME, table(models, **options))
