"""A made-up but complete set of measurements with planted effects, for tests of what reads them."""

import numpy as np

from allo_lib import claims, measurements

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
    "allo": 0.80,
    "allo_no_forgetting": 0.80,
    "allo_all_tokens_forgetting": 0.74,
    "allo_all_tokens_learning": 0.73,
    "allo_rm_shuffled": 0.72,
    "allo_rm_oracle": 0.82,
}
LOSS = {"dpo": 0.60, "dpo_top10": 0.55, "dpo_paper": 0.60, "dpo_top10_paper": 0.66}
OVERLAP = {"orders": 0.20, "halves": 0.12, "estimators": 0.15}
CHANCE = 0.0526


def rows(seeds=(0, 1, 2), datasets=("chain", "scan", "story"), n=1000, prefix=""):
    """Measurements of every planted method; outcomes of a problem are correlated over methods."""
    rng = np.random.default_rng(7)
    found = []
    for seed in seeds:
        for dataset in datasets:
            found += _dataset(rng, seed, dataset, n, prefix)
        shared = "average" if len(datasets) > 1 else datasets[0]
        found += _losses_and_overlaps(rng, seed, shared)
    return found


def _dataset(rng, seed, dataset, n, prefix):
    hardness = rng.random(n)
    outcomes = {}
    for method, share in ACCURACY.items():
        difficulty = 0.8 * hardness + 0.2 * rng.random(n)
        outcomes[method] = list(difficulty <= np.quantile(difficulty, share))
    # Same accuracy by construction: learning alone is right as often as ALLO, on other problems.
    outcomes["allo_no_forgetting"] = outcomes["allo"][::-1]
    found = [
        measurements.proportion(seed, method, dataset, f"{prefix}accuracy", right)
        for method, right in outcomes.items()
    ]
    for method, baseline in claims.wanted_pairs(outcomes):
        found += measurements.paired(
            seed, method, baseline, dataset, outcomes[method], outcomes[baseline], prefix
        )
    return found


def _losses_and_overlaps(rng, seed, dataset):
    make = measurements.Measurement
    found = [
        make(seed, method, dataset, "train_loss", loss + rng.normal(0, 0.002), 0.002, 50)
        for method, loss in LOSS.items()
    ]
    for method, overlap in OVERLAP.items():
        value = overlap + rng.normal(0, 0.003)
        found.append(make(seed, method, dataset, "mask_overlap", value, 0.0, 1))
        found.append(make(seed, method, dataset, "mask_overlap_chance", CHANCE, 0.0, 1))
    return found
