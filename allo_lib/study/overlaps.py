"""How far masks agree: of other data, orders, tasks, estimators and seeds, each beside chance.

Two chances: of masks that are drawn at random from all neurons, and of masks that are random within
each tensor but keep as much of it as they do. What lies between the two is agreement on tensors,
what lies above both is agreement on neurons.
"""

import contextlib
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from allo_lib.engine.store import NotMade
from allo_lib.evaluation.stats import LEVEL
from allo_lib.machine import weights
from allo_lib.method import neurons
from allo_lib.method.neurons import NeuronMask
from allo_lib.study.score_variants import FAMILY
from allo_lib.study.study import Study

RESAMPLES = 2000


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of two masks, all values in [0, 1].

    low, high: 95% by the bootstrap over tensors: how even the agreement is over the model, not what
    other data would give. chance: of random masks of these sizes; within: of masks that are random
    within each tensor and as large there as these.
    """

    label: str
    first: str
    second: str
    value: float
    low: float
    high: float
    chance: float
    within: float


def overlap(label: str, first: str, second: str, one: NeuronMask, other: NeuronMask) -> Overlap:
    """The overlap of two masks of one model, with its interval and both chances."""
    value = one.overlap(other)
    both, union = _by_tensor(one, other)
    draws = np.random.default_rng(0).integers(0, len(both), (RESAMPLES, len(both)))
    unions = union[draws].sum(1)
    ratios = both[draws].sum(1)[unions > 0] / unions[unions > 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    kept = one.kept * other.kept / one.total
    chance = kept / (one.kept + other.kept - kept)
    return Overlap(label, first, second, value, float(low), float(high), chance,
                   chance_within(one, other))  # fmt: skip


def chance_within(one: NeuronMask, other: NeuronMask) -> float:
    """Expected overlap of masks that keep as much of every tensor as these, at random places."""
    sizes = [torch.Size(shape).numel() for shape in one.shapes.values()]
    kept = [
        one.indices[name].numel() * other.indices[name].numel() / size
        for name, size in zip(one.shapes, sizes, strict=True)
    ]
    return sum(kept) / (one.kept + other.kept - sum(kept))


def _by_tensor(one: NeuronMask, other: NeuronMask) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union of each tensor."""
    both = [
        int(torch.isin(one.indices[name], other.indices[name], assume_unique=True).sum())
        for name in one.indices
    ]
    sizes = [one.indices[name].numel() + other.indices[name].numel() for name in one.indices]
    return np.array(both), np.array(sizes) - np.array(both)


def comparisons(study: Study, name: str) -> list[tuple[str, str, str]]:
    """(label, variant, variant) of every two score variants that are compared on a domain."""
    given = {row["dataset"] for row in study.pairs(name).rows["mask"]}
    families = [family for family in study.domain(name).datasets if family in given]
    thirds = combinations(("third_a", "third_b", "third_c"), 2)
    return [
        ("order of the data", "delta", "order"),
        ("halves of the pairs", "half_a", "half_b"),
        *(("thirds of the pairs", *two) for two in thirds),
        *((f"tasks: {a} and {b}", FAMILY + a, FAMILY + b) for a, b in combinations(families, 2)),
        ("warm-up at 0.3 of the rate", "delta", "lr_x0.3"),
        ("warm-up at 3 times the rate", "delta", "lr_x3"),
        ("warm-up of half an epoch", "delta", "half_epoch"),
        ("warm-up of two epochs", "delta", "two_epochs"),
        ("sum of |gradient|", "delta", "gradient"),
        ("magnitude of the weights", "delta", "magnitude"),
    ]


def compare(study: Study, name: str) -> list[Overlap]:
    """Overlaps of all compared score variants, and with the seeds before this one.

    Masks keep the profile's share. Other seeds count if their scores are in the store: each has
    its own model, trained from its own weights.
    """
    share, masks = study.profile.method.share, {}

    def mask(variant: str) -> NeuronMask:
        if variant not in masks:
            masks[variant] = study.mask(name, "top", share, variant)
        return masks[variant]

    rows = [overlap(label, a, b, mask(a), mask(b)) for label, a, b in comparisons(study, name)]
    for seed, scores in scores_of_earlier_seeds(study, name).items():
        other = neurons.select_neurons(scores, share)
        rows.append(overlap(f"seed {seed}", "delta", "delta", mask("delta"), other))
    return rows


def scores_of_earlier_seeds(study: Study, name: str) -> dict[int, dict[str, torch.Tensor]]:
    """Scores of lower seeds that the store has; nothing is made.

    Lower ones only, so that what a seed shows does not depend on the seeds that came after it.
    """
    found = {}
    for seed in range(study.seed):
        other = Study(study.profile, seed, study.results_dir, study.data_dir)
        with other.store.only_reading(), contextlib.suppress(NotMade):
            found[seed] = weights.read_tensors(other.scores(name).file("scores.safetensors"))
    return found
