"""The figures of 05_ablations, functions from plain data to a Figure, and the numbers behind them.

Scores and effects are fractions, errors standard errors, intervals 95%. What was not run is told as
such, never drawn.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from allo_lib.evaluation.claims import REWARD_MODELS
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import GRID, KEYS, RATES
from allo_lib.report.figure_style import GREY, PALETTE, Z95, row_names, subplots
from allo_lib.report.method_figures import labelled_grid
from allo_lib.study import importance, scoring
from allo_lib.study.importance import Overlap
from allo_lib.study.study import Study


def effects(found: Mapping[str, dict], rows: Mapping, reference: str) -> dict:
    """Label -> (effect, low, high) of rows (method -> label) against a row, 95% intervals."""
    gaps = {label: scoring.difference(found[row], found[reference]) for row, label in rows.items()}
    return {label: (one.effect, one.low, one.high) for label, one in gaps.items()}


def sweeps(profile: Profile, methods: Collection[str]) -> dict[str, dict]:
    """Setting -> row of the three sweeps, as far as the rows are among `methods`.

    "neurons": shares of (forgetting, learning); "key_tokens": their share; "rates": factors of both
    stages' rates. One of two rows or less, which other figures show too, is left out.
    """
    share, key = profile.method.share, profile.method.key_share
    found = {
        "neurons": GRID | {(share, share): "allo"},
        "key_tokens": KEYS | {key: "allo", 1.0: "allo_all_tokens_learning"},
        "rates": RATES | {(1.0, 1.0): "allo"},
    }
    had = {
        name: {place: row for place, row in rows.items() if row in methods}
        for name, rows in found.items()
    }
    return {name: rows for name, rows in had.items() if len(rows) > 2}


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


def effect_grid(
    effects: Mapping[tuple[float, float], tuple[float, float, float]],
    reference: str,
    title: str = "",
    unit: str = "accuracy",
    what: str = "rate over its best",
    form: str = "x{:g}",
) -> Figure:
    """Where ALLO is above `reference`, by one setting of both stages, such as their learning rates.

    effects: settings of (forgetting, learning) -> effect, low, high; the line is where the effect
    is 0, interpolated between the cells. what, form: the setting in words, and how to write one.
    """
    rows, columns = sorted({first for first, _ in effects}), sorted({last for _, last in effects})
    figure, axis = subplots(size=(2.5 + 1.12 * len(columns), 1.7 + 0.62 * len(rows)))
    values, texts = (
        np.full((len(rows), len(columns)), np.nan),
        [["not run"] * len(columns) for _ in rows],
    )
    for (first, last), one in effects.items():
        place = rows.index(first), columns.index(last)
        effect, low, high = (100 * x for x in one)
        values[place], texts[place[0]][place[1]] = (
            effect,
            f"{effect:+z.1f}\n[{low:+z.1f}, {high:+z.1f}]",
        )
    # Ruined models are far below: beyond twice the best, colours say no more.
    largest = float(np.clip(2 * np.nanmax(values), 3, 10))
    names = [[form.format(x) for x in places] for places in (rows, columns)]
    image = labelled_grid(axis, values, *names, texts, abs(values) < 0.6 * largest, origin="lower",
                          cmap="RdBu", norm=TwoSlopeNorm(0, -largest, largest))  # fmt: skip
    figure.colorbar(image, ax=axis, extend="both").set_label(f"{unit}, points")
    for text in axis.texts:  # the line must not run through numbers
        value = values[text.get_position()[::-1]]
        shade = image.to_rgba(value) if np.isfinite(value) else "white"
        text.set_bbox({"facecolor": shade, "edgecolor": "none", "pad": 1})
    if min(values.shape) > 1 and np.nanmin(values) < 0 < np.nanmax(values):
        axis.contour(np.ma.masked_invalid(values), levels=[0], colors="black", linewidths=2)
    axis.set(xlabel=f"learning: {what}", ylabel=f"forgetting: {what}")
    heading = f"{title}: " if title else ""
    told = "(line: no difference; brackets: 95% intervals)"
    axis.set_title(f"{heading}ALLO minus {reference}\n{told}")
    return figure


def overlap_dots(overlaps: Sequence[Overlap], title: str = "") -> Figure:
    """Overlaps of masks beside both chances, one line a label; several pairs may share a line."""
    labels = list(dict.fromkeys(one.label for one in overlaps))
    figure, axis = subplots(size=(7.0, 1.9 + 0.32 * len(labels)))
    measured = {"color": PALETTE[0], "marker": "o", "ms": 6, "lw": 1.5}
    within = {"mfc": "white", "mec": PALETTE[1], "marker": "D", "ms": 6, "ls": ""}
    chance = {"color": GREY, "marker": "|", "ms": 12, "mew": 2, "ls": ""}
    for row, label in enumerate(labels):
        group = [one for one in overlaps if one.label == label]
        places = row + 0.26 * (np.arange(len(group)) - (len(group) - 1) / 2)
        for y, one in zip(places, group, strict=True):
            axis.plot((one.low, one.value, one.high), (y, y, y), **measured, markevery=[1])
            axis.plot(one.within, y, **within)
            axis.plot(one.chance, y, **chance)
    axis.plot([], [], **measured, label="measured, 95% interval over tensors")
    axis.plot([], [], **within, label="chance within each tensor")
    axis.plot([], [], **chance, label="chance over all neurons")
    row_names(axis, labels)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlim(0, None)
    axis.set(xlabel="intersection over union of the kept neurons", title=title)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
