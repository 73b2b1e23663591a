"""The figures of 05_ablations that no other notebook draws: functions from plain data to a Figure.

Values are fractions, intervals 95%. A cell or point that was not run is told as such, never drawn.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from allo_lib.report.figure_style import GREY, PALETTE, side_style, subplots
from allo_lib.study.key_neurons import Overlap

Z95 = 1.959964  # half-width of a 95% interval in standard errors
Effect = tuple[float, float, float]  # effect, low, high


def effects_against(
    effects: Mapping[str, Effect], reference: str, title: str = "", unit: str = "accuracy"
) -> Figure:
    """Change against `reference`, `effects[label]`; coloured where the interval leaves out 0."""
    figure, axis = subplots(size=(6.4, 1.3 + 0.34 * len(effects)))
    for place, (effect, low, high) in enumerate(effects.values()):
        colour, marker = side_style(low, high)
        axis.plot((100 * low, 100 * high), (place, place), color=colour, lw=2)
        axis.plot(100 * effect, place, marker, color=colour, ms=7)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(effects)), list(effects))
    axis.set_ylim(len(effects) - 0.4, -0.6)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlabel(f"{unit}, points above {reference}\n(95% interval; grey: includes 0)")
    axis.set_title(title)
    return figure


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
    return share_lines(lines, own, title, unit)


def share_lines(
    lines: Mapping[str, Mapping[float, tuple[float, float]]],
    own: float,
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """Score by a share of the neurons, `lines[label][share]` = (score, standard error).

    own: the share of whatever a line does not vary. Lines of one point are left out.
    """
    figure, axis = subplots(size=(6.4, 3.6))
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    ticks = sorted({share for points in lines.values() for share in points})
    for number, (label, points) in enumerate(lines.items()):
        # Side by side, so that their intervals can be told apart.
        shares = np.array(sorted(points)) * 1.06 ** (number - (len(lines) - 1) / 2)
        values, errors = np.array([points[share] for share in sorted(points)]).T
        axis.errorbar(100 * shares, 100 * values, 100 * Z95 * errors, capsize=4, lw=1.5,
                      color=PALETTE[number], marker="osD"[number % 3], label=label)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks([100 * share for share in ticks], [f"{100 * share:g}" for share in ticks])
    axis.minorticks_off()
    axis.legend()
    axis.set(xlabel=f"share of neurons (%); what is not varied trains {100 * own:g}%",
             ylabel=f"{unit} (%), 95% interval", title=title)  # fmt: skip
    return figure


def share_grid(
    cells: Mapping[tuple[float, float], tuple[float, float]],
    title: str = "",
    unit: str = "accuracy",
) -> Figure:
    """Score by the shares of neurons of both stages.

    cells: (share of forgetting, share of learning) -> (score, standard error).
    """
    rows, columns = _axes_of(cells)
    values = _matrix({place: 100 * value for place, (value, _) in cells.items()}, rows, columns)
    texts = {
        place: f"{100 * value:.1f}\n±{100 * Z95 * error:.1f}"
        for place, (value, error) in cells.items()
    }
    figure, axis = subplots(size=(2.4 + 0.8 * len(columns), 1.5 + 0.56 * len(rows)))
    image = axis.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto", origin="lower")
    figure.colorbar(image, ax=axis).set_label(f"{unit} (%)")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    _write(axis, texts, rows, columns, lambda r, c: "black" if values[r, c] > middle else "white")
    axis.set_xticks(range(len(columns)), [f"{100 * share:g}" for share in columns])
    axis.set_yticks(range(len(rows)), [f"{100 * share:g}" for share in rows])
    axis.set(xlabel="neurons that learning trains (%)", ylabel="neurons that forgetting trains (%)")
    axis.set_title(f"{title} (±: half of the 95% interval)".strip())
    axis.spines[:].set_visible(False)
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
    rows, columns = _axes_of(effects)
    values = _matrix({place: 100 * one[0] for place, one in effects.items()}, rows, columns)
    texts = {
        place: f"{100 * effect:+z.1f}\n[{100 * low:+z.1f}, {100 * high:+z.1f}]"
        for place, (effect, low, high) in effects.items()
    }
    # Ruined models are far below: beyond twice the best, colours say no more.
    largest = float(np.clip(2 * np.nanmax(values), 3, 10))
    figure, axis = subplots(size=(2.5 + 1.12 * len(columns), 1.7 + 0.62 * len(rows)))
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap="RdBu", aspect="auto", origin="lower",
        norm=TwoSlopeNorm(0, -largest, largest),
    )  # fmt: skip
    figure.colorbar(image, ax=axis, extend="both").set_label(f"{unit}, points")
    _write(axis, texts, rows, columns,
           lambda r, c: "white" if abs(values[r, c]) > 0.6 * largest else "black")  # fmt: skip
    for text in axis.texts:  # the line must not run through numbers
        value = values[text.get_position()[::-1]]
        shade = image.to_rgba(value) if np.isfinite(value) else "white"
        text.set_bbox({"facecolor": shade, "edgecolor": "none", "pad": 1})
    if min(values.shape) > 1 and np.nanmin(values) < 0 < np.nanmax(values):
        axis.contour(np.ma.masked_invalid(values), levels=[0], colors="black", linewidths=2)
    for ticks, factors in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        ticks(range(len(factors)), [f"x{factor:g}" for factor in factors])
    axis.set(xlabel="learning: rate over its best", ylabel="forgetting: rate over its best")
    heading = f"{title}: " if title else ""
    told = "(line: no difference; brackets: 95% intervals)"
    axis.set_title(f"{heading}ALLO minus {reference}\n{told}")
    axis.spines[:].set_visible(False)
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
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlim(0, None)
    axis.set(xlabel="intersection over union of the kept neurons", title=title)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _axes_of(cells) -> tuple[list[float], list[float]]:
    """The values of the first stage (rows) and of the second (columns), ascending."""
    return sorted({first for first, _ in cells}), sorted({second for _, second in cells})


def _matrix(cells: Mapping, rows: Sequence[float], columns: Sequence[float]) -> np.ndarray:
    """NaN where no cell is."""
    return np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])


def _write(axis, texts: Mapping, rows, columns, colour) -> None:
    """The text of every cell, and which were not run."""
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            text = texts.get((row, column))
            shade = colour(r, c) if text else GREY
            axis.text(c, r, text or "not run", ha="center", va="center", size=9, color=shade)
