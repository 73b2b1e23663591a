"""The figures of 05_ablations, functions from plain data to a Figure, and the numbers behind them.

Values are fractions, intervals 95%. A cell or point that was not run is told as such, never drawn.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from scipy.stats import norm

from allo_lib.evaluation.ablations import REWARD_MODELS
from allo_lib.report.figure_style import GREY, PALETTE, Z95, row_names, subplots
from allo_lib.study import importance, scoring
from allo_lib.study.importance import Overlap
from allo_lib.study.study import Study

Effect = tuple[float, float, float]  # effect, low, high


def effects(found: dict[str, dict], rows: Mapping, reference: str) -> dict:
    """Label -> (effect, low, high) of rows (method -> label) against a row, 95% intervals."""
    differences = {
        label: scoring.difference(found[row], found[reference]) for row, label in rows.items()
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
        area = 1.0 if quality == "oracle" else importance.separation(study, name, quality)["auc"]
        points.append((label, area, *scoring.score_of(found[row])))
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


def neuron_shares(
    cells: Mapping[tuple[float, float], tuple[float, float]],
    own: float,
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """The grid of shares where at least half of it was run, else lines through ALLO's own share.

    cells: (share of forgetting, share of learning) -> (score, standard error).
    """
    rows, columns = _axes_of(cells)
    if 2 * len(cells) >= len(rows) * len(columns) > max(len(rows), len(columns)):
        return share_grid(cells, title, unit)
    lines = {
        "forgetting trains it": {a: one for (a, b), one in cells.items() if b == own},
        "learning trains it": {b: one for (a, b), one in cells.items() if a == own},
        "both train it": {a: one for (a, b), one in cells.items() if a == b},
    }
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    figure, axis = _share_lines(lines, f"{unit} (%)", title)
    axis.set_xlabel(f"share of neurons (%); what is not varied trains {100 * own:g}%")
    axis.legend()
    return figure


def share_sweep(
    shares: Sequence[float],
    values: Sequence[float],
    errs: Sequence[float],
    reference: tuple[str, float] | None = None,
    title: str = "",
    xlabel: str = "share of neurons kept (%)",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """Accuracy by the share kept, all fractions; `errs` are standard errors.

    `reference` = (label, value) draws a level to compare with, such as DPO on all neurons.
    """
    points = dict(zip(shares, zip(values, errs, strict=True), strict=True))
    figure, axis = _share_lines({"measured": points}, ylabel, title)
    axis.set_xlabel(xlabel)
    if reference:
        axis.axhline(100 * reference[1], color=GREY, ls="--", label=reference[0])
        axis.legend()
    return figure


def _share_lines(lines: Mapping[str, Mapping[float, tuple[float, float]]], ylabel: str, title: str):
    """Score by a share, `lines[label][share]` = (score, standard error): figure and axis."""
    figure, axis = subplots(size=(6.0, 3.6))
    ticks = sorted({share for points in lines.values() for share in points})
    for number, (label, points) in enumerate(lines.items()):
        # Side by side, so that their intervals can be told apart.
        shares = np.array(sorted(points)) * 1.06 ** (number - (len(lines) - 1) / 2)
        values, errors = np.array([points[share] for share in sorted(points)]).T
        axis.errorbar(100 * shares, 100 * values, 100 * Z95 * errors, capsize=4, lw=1.5,
                      color=PALETTE[number], marker="osD"[number], label=label)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks([100 * share for share in ticks], [f"{100 * share:g}" for share in ticks])
    axis.minorticks_off()
    axis.set(ylabel=f"{ylabel}, 95% interval", title=title)
    return figure, axis


def share_grid(
    cells: Mapping[tuple[float, float], tuple[float, float]],
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """Score by the shares of neurons of both stages.

    cells: (share of forgetting, share of learning) -> (score, standard error).
    """
    texts = {
        place: f"{100 * value:.1f}\n±{100 * Z95 * error:.1f}"
        for place, (value, error) in cells.items()
    }
    rows, columns = _axes_of(cells)
    figure, axis = subplots(size=(2.4 + 0.8 * len(columns), 1.5 + 0.56 * len(rows)))
    scores = {place: 100 * value for place, (value, _) in cells.items()}
    image, values = _grid(axis, scores, cmap="cividis")
    figure.colorbar(image, ax=axis).set_label(f"{unit} (%)")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    _write(axis, texts, rows, columns, np.where(values > middle, "black", "white"))
    axis.set_xticks(range(len(columns)), [f"{100 * share:g}" for share in columns])
    axis.set_yticks(range(len(rows)), [f"{100 * share:g}" for share in rows])
    axis.set(xlabel="neurons that learning trains (%)", ylabel="neurons that forgetting trains (%)")
    axis.set_title(f"{title} (±: half of the 95% interval)".strip())
    return figure


def rate_region(
    effects: Mapping[tuple[float, float], Effect],
    reference: str,
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """Where ALLO is above `reference`, by both stages' learning rates over their best ones.

    effects: (factor of forgetting, factor of learning) -> effect; the line is where it is 0,
    interpolated between the cells.
    """
    texts = {
        place: f"{100 * effect:+z.1f}\n[{100 * low:+z.1f}, {100 * high:+z.1f}]"
        for place, (effect, low, high) in effects.items()
    }
    # Ruined models are far below: beyond twice the best, colours say no more.
    largest = float(np.clip(200 * max(effect for effect, *_ in effects.values()), 3, 10))
    rows, columns = _axes_of(effects)
    figure, axis = subplots(size=(2.5 + 1.12 * len(columns), 1.7 + 0.62 * len(rows)))
    differences = {place: 100 * one[0] for place, one in effects.items()}
    image, values = _grid(axis, differences, cmap="RdBu", norm=TwoSlopeNorm(0, -largest, largest))
    figure.colorbar(image, ax=axis, extend="both").set_label(f"{unit}, points")
    _write(axis, texts, rows, columns, np.where(abs(values) > 0.6 * largest, "white", "black"))
    for text in axis.texts:  # the line must not run through numbers
        value = values[text.get_position()[::-1]]
        shade = image.to_rgba(value) if np.isfinite(value) else "white"
        text.set_bbox({"facecolor": shade, "edgecolor": "none", "pad": 1})
    if min(values.shape) > 1 and np.nanmin(values) < 0 < np.nanmax(values):
        axis.contour(np.ma.masked_invalid(values), levels=[0], colors="black", linewidths=2)
    axis.set_xticks(range(len(columns)), [f"x{factor:g}" for factor in columns])
    axis.set_yticks(range(len(rows)), [f"x{factor:g}" for factor in rows])
    axis.set(xlabel="learning: rate over its best", ylabel="forgetting: rate over its best")
    heading = f"{title}: " if title else ""
    told = "(line: no difference; brackets: 95% intervals)"
    axis.set_title(f"{heading}ALLO minus {reference}\n{told}")
    return figure


def reward_quality(
    points: Sequence[tuple[str, float, float, float]],
    levels: Mapping[str, float] | None = None,
    title: str = "",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """Final score by how well the reward model finds wrong tokens.

    points: (label, area under its ROC curve on held-out pairs, score, standard error); levels:
    label -> score of rows without a reward model.
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


def overlap_dots(overlaps: Sequence[Overlap], title: str = "") -> Figure:
    """Overlaps of masks beside both chances, one line a label; several pairs may share a line."""
    labels = list(dict.fromkeys(one.label for one in overlaps))
    figure, axis = subplots(size=(7.0, 1.9 + 0.32 * len(labels)))
    for label_place, label in enumerate(labels):
        group = [one for one in overlaps if one.label == label]
        places = label_place + 0.26 * (np.arange(len(group)) - (len(group) - 1) / 2)
        for place, one in zip(places, group, strict=True):
            axis.plot((one.low, one.high), (place, place), color=PALETTE[0], lw=1.5)
            axis.plot(one.value, place, "o", color=PALETTE[0], ms=6)
            axis.plot(one.within, place, "D", mfc="white", mec=PALETTE[1], ms=6)
            axis.plot(one.chance, place, "|", color=GREY, ms=12, mew=2)
    axis.plot([], [], "o-", color=PALETTE[0], label="measured, 95% interval over tensors")
    axis.plot([], [], "D", mfc="white", mec=PALETTE[1], ls="", label="chance within each tensor")
    axis.plot([], [], "|", color=GREY, ms=12, mew=2, ls="", label="chance over all neurons")
    row_names(axis, labels)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlim(0, None)
    axis.set(xlabel="intersection over union of the kept neurons", title=title)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _axes_of(cells) -> tuple[list[float], list[float]]:
    """The values of the first stage (rows) and of the second (columns), ascending."""
    return sorted({first for first, _ in cells}), sorted({second for _, second in cells})


def _grid(axis, cells: Mapping[tuple[float, float], float], **style):
    """Draw the cells, the first stage upwards: the picture, and the values, NaN where none is."""
    rows, columns = _axes_of(cells)
    values = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    axis.spines[:].set_visible(False)
    shown = np.ma.masked_invalid(values)
    return axis.imshow(shown, aspect="auto", origin="lower", **style), values


def _write(axis, texts: Mapping, rows, columns, colours: np.ndarray) -> None:
    """The text of every cell, and which were not run."""
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            text = texts.get((row, column))
            shade = colours[r, c] if text else GREY
            axis.text(c, r, text or "not run", ha="center", va="center", size=9, color=shade)
