"""Every figure of the study: functions from plain data to a matplotlib Figure, and `save`.

Error bars and intervals are 95% unless a label says otherwise. Verdicts differ by colour and
marker.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from allo_lib.evaluation.published import arm_label
from allo_lib.report.figure_style import GREY, PALETTE, save, side_style, subplots
from allo_lib.report.outcome_figures import claims_figure, efficiency_bars, main_table_figure

__all__ = [
    "ablation_bars",
    "claims_figure",
    "concentration_curve",
    "efficiency_bars",
    "empirical_bars",
    "importance_heatmap",
    "main_table_figure",
    "overlap_matrix",
    "quality_against_cost",
    "save",
    "share_sweep",
]

Z95 = 1.959964  # half-width of a 95% interval in standard errors


def empirical_bars(
    measured: Mapping[str, tuple[float, float]],
    paper: Mapping[str, Mapping[str, float]],
    title: str = "measured",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """The empirical study: our arms, `measured[method]` = (value, standard error), beside the
    paper's, `paper[method][dataset]` (both fractions). The axes do not start at zero."""
    figure, (ours, theirs) = subplots(1, 2, (9.2, 3.8), width_ratios=(1, 1.1))
    arms = [name.removesuffix("_paper") for name in measured]
    colours = dict(zip(dict.fromkeys([*arms, *paper]), _colours(), strict=False))
    values = np.array([measured[name] for name in measured]) * 100
    places = np.arange(len(measured))
    ours.bar(places, values[:, 0], 0.7, color=[colours[name] for name in arms])
    ours.errorbar(places, values[:, 0], Z95 * values[:, 1], fmt="none", ecolor="black", capsize=4)
    labels = [arm_label(name).replace(", ", ",\n").replace(" (", "\n(") for name in measured]
    ours.set_xticks(places, labels)
    _cut(ours, values[:, 0] - Z95 * values[:, 1], values[:, 0] + Z95 * values[:, 1])
    ours.set(ylabel=ylabel, title=f"{title} (cut axis, whiskers: 95% interval)")
    datasets = list(next(iter(paper.values())))
    width = 0.8 / len(paper)
    for i, (name, row) in enumerate(paper.items()):
        heights = [100 * row[dataset] for dataset in datasets]
        offset = np.arange(len(datasets)) + (i - (len(paper) - 1) / 2) * width
        theirs.bar(offset, heights, width * 0.92, color=colours[name], label=arm_label(name))
    every = np.array([100 * row[dataset] for row in paper.values() for dataset in datasets])
    _cut(theirs, every, every * 1.03)
    theirs.set_xticks(np.arange(len(datasets)), datasets)
    theirs.set(ylabel="accuracy (%)", title="paper (cut axis, no intervals published)")
    theirs.legend(ncols=1, loc="upper right")
    return figure


def importance_heatmap(
    matrix, layers: Sequence[str], modules: Sequence[str], share: float, title: str = ""
) -> Figure:
    """Share of each tensor's entries that are key neurons, `matrix[layer][module]` in [0, 1].

    NaN marks tensors that do not exist. `share` is the overall share, what chance would give.
    """
    values = 100 * np.asarray(matrix, dtype=float)
    size = (1.6 + 0.72 * len(modules), 1.4 + 0.36 * len(layers))
    figure, axis = subplots(size=(max(5.2, size[0]), max(2.6, size[1])))
    image = axis.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto", vmin=0)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("kept entries (%)")
    axis.set_xticks(range(len(modules)), modules, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(layers)), layers)
    middle = np.nanmax(values) * 0.55
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, size=9)
    axis.set_title(f"{title or 'where key neurons sit'} (chance: {100 * share:g}%)")
    axis.spines[:].set_visible(False)
    return figure


def overlap_matrix(labels: Sequence[str], matrix, chance: float, title: str = "") -> Figure:
    """Intersection over union of masks, `matrix[i][j]` in [0, 1], beside what chance would give."""
    values = np.asarray(matrix, dtype=float)
    side = 2.6 + 0.62 * len(labels)
    figure, axis = subplots(size=(side + 0.9, side * 0.86))
    image = axis.imshow(values, cmap="cividis", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, ax=axis, shrink=0.85)
    bar.set_label("intersection over union")
    bar.ax.axhline(chance, color="white", lw=2)
    axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.3 else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=9)
    axis.set_title(f"{title or 'overlap of masks'} (chance: {chance:.3f})")
    axis.spines[:].set_visible(False)
    return figure


def concentration_curve(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], mark: float = 0.1
) -> Figure:
    """Share of negative log-ratio held by the lowest share of tokens; see `stats.concentration`.

    The legend tells each curve's value at the share `mark`.
    """
    figure, axis = subplots(size=(5.6, 3.8))
    for (label, (shares, held)), colour in zip(curves.items(), _colours(), strict=False):
        at_mark = float(np.interp(mark, shares, held))
        text = f"{label}: {100 * at_mark:.0f}% in the lowest {100 * mark:g}%"
        axis.plot(100 * np.asarray(shares), 100 * np.asarray(held), color=colour, label=text)
        axis.plot([100 * mark], [100 * at_mark], "o", color=colour)
    axis.plot([0, 100], [0, 100], color=GREY, ls=":", label="spread evenly")
    axis.set(xlabel="rejected tokens, lowest log-ratio first (%)", xlim=(0, 100), ylim=(0, 102))
    axis.set_ylabel("share of negative log-ratio (%)")
    axis.legend(loc="lower right")
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
    figure, axis = subplots(size=(5.6, 3.6))
    order = np.argsort(shares)
    where, heights, errors = (
        100 * np.asarray(cells, float)[order] for cells in (shares, values, errs)
    )
    axis.errorbar(
        where, heights, Z95 * errors, fmt="o-", color=PALETTE[0], capsize=4, label="measured"
    )
    if reference:
        axis.axhline(100 * reference[1], color=PALETTE[1], ls="--", label=reference[0])
        axis.legend()
    axis.set_xscale("log")
    axis.set_xticks(where, [f"{share:g}" for share in where])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=f"{ylabel}, 95% interval", title=title)
    return figure


def quality_against_cost(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    reference: tuple[str, float] | None = None,
    title: str = "",
    ylabel: str = "accuracy (%)",
) -> Figure:
    """Score by what a training step costs: one line a series of (cost, score, error, share).

    Costs are relative (1 is a step that trains all neurons), scores and standard errors fractions;
    each point is labelled with its share, a fraction. `reference` = (label, score) draws a level.
    """
    figure, axis = subplots(size=(6.0, 3.8))
    for place, (label, points) in enumerate(series.items()):
        costs, values, errors, shares = np.asarray(sorted(points), float).T
        axis.errorbar(
            costs, 100 * values, yerr=100 * Z95 * errors, capsize=4, label=label, **_series(place)
        )
        for number, (cost, value, share) in enumerate(zip(costs, values, shares, strict=True)):
            # Scalar masks all cost the same: labels on alternate sides stay apart.
            axis.annotate(
                f"{100 * share:g}%",
                (cost, 100 * value),
                xytext=(-6 if number % 2 else 6, -12 if place else 6),
                textcoords="offset points",
                ha="right" if number % 2 else "left",
                size=9,
            )
    if reference:
        axis.axhline(100 * reference[1], color=GREY, ls="--", label=reference[0])
    axis.legend()
    axis.margins(x=0.12)
    axis.set(
        xlabel="operations of a step (all neurons: 1)",
        ylabel=f"{ylabel}, 95% interval",
        title=title,
    )
    return figure


def ablation_bars(
    effects: Mapping[str, tuple[float, float, float]],
    reference: str = "allo",
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """Change against `reference`, `effects[method]` = (effect, low, high) as fractions."""
    figure, axis = subplots(size=(6.8, 1.3 + 0.36 * len(effects)))
    places = np.arange(len(effects))
    for place, (effect, low, high) in zip(places, effects.values(), strict=True):
        axis.barh(place, 100 * effect, 0.6, color=side_style(low, high)[0], alpha=0.75)
        ends = [[100 * (effect - low)], [100 * (high - effect)]]
        axis.errorbar(100 * effect, place, xerr=ends, fmt="none", ecolor="black", capsize=4)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(places, [arm_label(name) for name in effects])
    axis.invert_yaxis()
    effect = f"{unit}, points above {arm_label(reference)}"
    axis.set_xlabel(f"{effect}\n(95% interval; grey: includes 0)")
    axis.set_title(title)
    return figure


def _colours():
    while True:
        yield from PALETTE


def _series(position: int) -> dict[str, str]:
    """Colour and marker of a line, so that neighbours differ in both."""
    markers = "osD^vPX"
    return {
        "color": PALETTE[position % len(PALETTE)],
        "marker": markers[position % len(markers)],
        "lw": 1.5,
    }


def _cut(axis, lows: np.ndarray, highs: np.ndarray) -> None:
    """Start the bars a little below the lowest interval, where the differences can be seen."""
    room = max(1.0, 0.35 * (highs.max() - lows.min()))
    axis.set_ylim(max(0, lows.min() - 2 * room), highs.max() + room)
