"""The numbers behind the figures of 05_ablations: differences between rows, and what they mean."""

import math
from collections.abc import Collection, Mapping

import numpy as np
from scipy.stats import norm

from allo_lib.evaluation.ablations import REWARD_MODELS
from allo_lib.study import analysis, results
from allo_lib.study.study import Study


def effects(found: dict[str, dict], rows: Mapping, reference: str) -> dict:
    """Label -> (effect, low, high) of rows (method -> label) against a row, 95% intervals."""
    differences = {
        label: results.difference(found[row], found[reference]) for row, label in rows.items()
    }
    return {label: (one.effect, one.low, one.high) for label, one in differences.items()}


def luck_of_the_best(scores: Collection[tuple[float, float]]) -> float:
    """How far the best of these (score, standard error) would stand above the mean by luck alone.

    The expected largest of as many normal errors of their mean size, as if they were independent;
    rows of one seed are right on much the same problems, so that it is an upper bound.
    """
    errors = np.random.default_rng(0).standard_normal((10_000, len(scores)))
    return float(np.mean([error for _, error in scores]) * errors.max(axis=1).mean())


def reward_points(study: Study, name: str, found: dict[str, dict], rows) -> list[tuple]:
    """(label, area under the ROC curve, score, standard error) of rows of REWARD_MODELS.

    Empty where no generator knows the wrong tokens. The oracle's area is 1 by construction.
    """
    if not hasattr(study.task(name), "wrong_tokens"):
        return []
    points = []
    for row in rows:
        quality, label = REWARD_MODELS[row]
        area = 1.0 if quality == "oracle" else analysis.separation(study, name, quality)["auc"]
        points.append((label, area, *analysis.score_of(found[row])))
    return points


def slope_of(points: list[tuple]) -> tuple[float, float, float]:
    """Points of score per unit of area of `reward_points`, with its 95% interval.

    Weighted least squares, whose errors are those of the scores; NaN where all areas are equal.
    """
    areas, scores, errors = np.array([point[1:] for point in points], dtype=float).T
    weights = 1 / np.maximum(errors, 1e-9) ** 2
    centred = areas - np.average(areas, weights=weights)
    spread = float((weights * centred**2).sum())
    if spread == 0:
        return (math.nan,) * 3
    slope = float((weights * centred * scores).sum()) / spread
    half = float(norm.ppf(0.975)) / spread**0.5
    return 100 * slope, 100 * (slope - half), 100 * (slope + half)
