"""The figures of 05_ablations, functions from plain data to a Figure, and the numbers behind them.

Scores and effects are fractions, errors standard errors, intervals 95%. What was not run is
named, never drawn.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from allo_lib.evaluation.claims import REWARD_MODELS
from allo_lib.report.figure_style import GREY, PALETTE, Z95, subplots
from allo_lib.study import importance, scoring
from allo_lib.study.study import Study


def effects(found: Mapping[str, dict], rows: Mapping, reference: str) -> dict:
    """Label -> (effect, low, high) of rows (method -> label) against a row, 95% intervals."""
    gaps = {label: scoring.difference(found[row], found[reference]) for row, label in rows.items()}
    return {label: (one.effect, one.low, one.high) for label, one in gaps.items()}


def share_sweep(
    points: Mapping[float, tuple[float, float]],
    reference: tuple[str, float] | None = None,
    title: str = "",
    xlabel: str = "share of neurons kept (%)",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """(Score, standard error) by the share kept; `reference` = (label, score) draws a level."""
    figure, axis = subplots(size=(6.0, 3.6))
    shares = np.array(sorted(points))
    values, errors = np.array([points[share] for share in shares]).T
    style = {"color": PALETTE[0], "marker": "o", "lw": 1.5}
    axis.errorbar(100 * shares, 100 * values, 100 * Z95 * errors, capsize=4, **style)
    axis.set_xscale("log")
    axis.set_xticks(100 * shares, [f"{100 * share:g}" for share in shares])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=f"{ylabel}, 95% interval", title=title)
    if reference:
        axis.axhline(100 * reference[1], color=GREY, ls="--", label=reference[0])
        axis.legend()
    return figure


def reward_points(study: Study, name: str, found: Mapping[str, dict]) -> list[tuple]:
    """(label, area under the ROC curve, score, standard error) of those of REWARD_MODELS.

    Empty where no generator knows the wrong tokens. The oracle's area is 1 by construction.
    """
    if not hasattr(study.task(name), "wrong_tokens"):
        return []
    points = []
    for row, (quality, label) in REWARD_MODELS.items():
        if row in found:
            oracle = quality == "oracle"
            area = 1.0 if oracle else importance.separation(study, name, quality)["auc"]
            points.append((label, area, *scoring.score_of(found[row])))
    return points


def slope_of(points: Sequence[tuple]) -> tuple[float, float, float]:
    """Points of score per unit of area of `reward_points`, with its 95% interval.

    Least squares weighted by the errors of the scores; NaN where all areas are equal.
    """
    areas, scores, errors = np.array([point[1:] for point in points], dtype=float).T
    if np.ptp(areas) == 0:
        return (np.nan,) * 3
    weights = 1 / np.maximum(errors, 1e-9)
    (slope, _), covariance = np.polyfit(areas, scores, 1, w=weights, cov="unscaled")
    half = Z95 * covariance[0, 0] ** 0.5
    return 100 * slope, 100 * (slope - half), 100 * (slope + half)


def reward_quality(
    points: Sequence[tuple[str, float, float, float]],
    levels: Mapping[str, float] | None = None,
    title: str = "",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """Final score by how well the reward model finds wrong tokens.

    points: those of `reward_points`; levels: label -> score of rows without a reward model.
    """
    figure, axis = subplots(size=(7.2, 3.8))
    for number, (label, area, value, error) in enumerate(sorted(points, key=lambda p: p[1])):
        style = {"color": PALETTE[number % len(PALETTE)], "marker": "osD^vPX*"[number % 8]}
        axis.errorbar(area, 100 * value, 100 * Z95 * error, ls="", capsize=4, ms=7,
                      label=f"{label} ({area:.2f})", **style)  # fmt: skip
    for number, (label, value) in enumerate((levels or {}).items()):
        axis.axhline(100 * value, color=GREY, ls=("--", ":")[number % 2], label=label)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(xlabel="how well it finds wrong tokens (area under the ROC curve, held-out pairs)",
             ylabel=f"{ylabel}, 95% interval", title=title)  # fmt: skip
    return figure
