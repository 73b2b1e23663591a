"""Figures of the method: what it does to neurons and tokens, and what one seed makes of it.

Scores are fractions with standard errors, and drawn with 95% intervals.
`python -m allo_lib.report.method_figures FOLDER` writes the drawing of the method.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator

from allo_lib.evaluation.published import method_label
from allo_lib.report.figure_style import (
    GREY,
    PALETTE,
    Z95,
    method_colour,
    row_names,
    save,
    subplots,
)

BLUE, ORANGE, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
# All light enough for black text: what is worked on is orange, what became less likely blue.
_WARM = LinearSegmentedColormap.from_list("warm", ["#FFFFFF", "#FBD0A8", "#F28E2B"])
_CHANGE = LinearSegmentedColormap.from_list("change", ["#5BA3D9", "#FFFFFF", "#F28E2B"])
_COLUMN, _ROW, _LABEL = 0.35, 0.28, 2.1  # inches of a token, a row, and the labels before them
_LINE, _MOST = 24, 72  # tokens a line of a panel, and in all

Scores = Mapping[str, tuple[float, float]]  # method -> score, standard error


def method_drawing() -> Figure:
    """The method on one page: neurons above, tokens in the middle, the two stages below."""
    figure, axis = subplots(size=(10.6, 4.9))
    boxes = {
        "pairs": (0, 2, "preference pairs\n$x,\\ y^+,\\ y^-$  (00)", GREY),
        "warm-up": (1, 2, "warm-up: plain DPO,\none epoch, $\\theta \\to \\theta'$  (01)", BLUE),
        "scores": (2, 2, "scores of neurons\n$|\\theta'_i - \\theta_i|\\,/\\,\\alpha$  (01)", BLUE),
        "mask": (3, 2, "mask: the top 10%\nof all neurons  (01)", BLUE),
        "rewriter": (0, 1, "rewriter reads $x$, a right\nsolution and $y^-$: $p_t$  (02)", GREEN),
        "weights": (1, 1, "weights of tokens\n$w_t = 1[p_t < 0.5]$  (02)", GREEN),
        "sft": (0, 0, "SFT model $\\theta$\n(00)", GREY),
        "forget": (1, 0, "1  forgetting: NPO on the\ntokens of $y^-$ with $w_t = 1$  (03)", ORANGE),
        "learn": (2, 0, "2  learning: DPO on $y^+$ and\nthe key tokens of $y^-$  (04)", ORANGE),
        "allo": (3, 0, "ALLO\n(04 to 07)", ORANGE),
    }  # fmt: skip
    place = {name: (2.7 * column, 1.75 * row) for name, (column, row, *_) in boxes.items()}
    for name, (_, _, text, colour) in boxes.items():
        x, y = place[name]
        axis.add_patch(FancyBboxPatch(
            (x, y), 2.2, 0.85, "round,pad=0.05", fc="white", ec=colour, lw=1.8))  # fmt: skip
        axis.text(x + 1.1, y + 0.42, text, ha="center", va="center", size=9.5)
    style = {"arrowstyle": "-|>", "color": "#333333", "lw": 1.3}
    rows = (("pairs", "warm-up", "scores", "mask"), ("rewriter", "weights"),
            ("sft", "forget", "learn", "allo"))  # fmt: skip
    for row in rows:
        for start, end in zip(row, row[1:], strict=False):
            (x, y), (to, _) = place[start], place[end]
            axis.annotate("", (to - 0.05, y + 0.42), (x + 2.25, y + 0.42), arrowprops=style)
    for start, end, shift in (("pairs", "rewriter", 1.1), ("weights", "forget", 0.8)):
        (x, top), (_, low) = place[start], place[end]
        axis.annotate("", (x + shift, low + 0.9), (x + shift, top - 0.05), arrowprops=style)
    right, level = place["mask"][0] + 1.1, 1.35
    ends = [place["forget"][0] + 1.6, place["learn"][0] + 1.1]
    axis.plot([right, right, ends[0]], [3.45, level, level], color=BLUE, lw=1.3)
    for x in ends:
        axis.annotate("", (x, 0.9), (x, level + 0.02), arrowprops=style | {"color": BLUE})
    axis.text(right - 0.1, level + 0.1, "only these neurons move", ha="right", color=BLUE, size=9.5)
    axis.set(xlim=(-0.15, 10.45), ylim=(-0.15, 4.55))
    axis.axis("off")
    return figure


def token_panel(tokens: Sequence[str], rows: Sequence[tuple[str, str, Sequence]]) -> Figure:
    """One response, a column a token, and below it what each step says of every token.

    rows: (label, kind, a value a token). Kinds: "words" (text), "marks" (true or false), "low" and
    "high" (numbers in [0, 1], that end orange), "change" (log-ratios, blue below 0). Text is drawn
    as it is. Only the first tokens are shown of a response that is very long.
    """
    for label, _, values in rows:
        if len(values) != len(tokens):
            raise ValueError(
                f"{len(tokens)} tokens with {len(values)} values of {label!r}: give one each"
            )
    shown = min(len(tokens), _MOST)
    columns = math.ceil(shown / math.ceil(shown / _LINE))  # lines of about equal length
    words = [_printable(token) for token in tokens[:shown]]
    heights = [
        0.09 * max(map(len, words[i : i + columns])) + 0.12 for i in range(0, shown, columns)
    ]
    tall = [0.09 * max((len(_printable(v)) for v in values[:shown]), default=0) + 0.12
            if kind == "words" else _ROW for _, kind, values in rows]  # fmt: skip
    height = sum(heights) + len(heights) * (sum(tall) + 0.2)
    figure, axis = subplots(size=(_LABEL + columns * _COLUMN + 0.1, height + 0.1))
    top = 0.0
    for block, first in enumerate(range(0, shown, columns)):
        part = slice(first, min(first + columns, shown))
        _words(axis, words[part], top + heights[block])
        top += heights[block]
        for (label, kind, values), room in zip(rows, tall, strict=True):
            axis.text(_LABEL - 0.1, top + room / 2, label, ha="right", va="center", size=9.5)
            if kind == "words":
                _words(axis, [_printable(value) for value in values[part]], top + room)
            else:
                _cells(axis, kind, values[part], top)
            top += room
        top += 0.2
    axis.set(xlim=(0, _LABEL + columns * _COLUMN + 0.03), ylim=(top, 0))
    axis.axis("off")
    return figure


def _printable(token: str) -> str:
    text = str(token).strip(" ").replace("\n", "\u21b5")
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= 12 else text[:11] + "\u2026"


def _words(axis, words: Sequence[str], bottom: float) -> None:
    for i, word in enumerate(words):
        axis.text(
            _LABEL + (i + 0.5) * _COLUMN, bottom - 0.05, word, rotation=90, ha="center",
            va="bottom", size=9, family="monospace", parse_math=False,
        )  # fmt: skip


def _cells(axis, kind: str, values: Sequence, top: float) -> None:
    for i, value in enumerate(values):
        left = _LABEL + i * _COLUMN
        if kind == "marks":
            colour, text = "white", "\u25cf" if value else "\u00b7"
        elif kind == "change":
            colour = _CHANGE((np.clip(value, -1, 1) + 1) / 2)
            text = f"{value:+.1f}" if abs(value) >= 0.05 else "0"
        else:
            colour = _WARM(value if kind == "high" else 1 - value)
            text = f"{value:.2f}".removeprefix("0") if 0.005 <= value < 0.995 else f"{value:.0f}"
        axis.add_patch(Rectangle((left, top), _COLUMN, _ROW, fc=colour, ec="#DDDDDD", lw=0.5))
        middle = (left + _COLUMN / 2, top + _ROW / 2)
        axis.text(*middle, text, ha="center", va="center", size=9)


# --- scores, a row a method -----------------------------------------------------------------------


def method_dots(found: Scores, title: str = "", xlabel: str = "accuracy (%)") -> Figure:
    """Scores of methods, a row a method."""
    figure, axis = subplots(size=(6.4, 0.95 + 0.32 * len(found)))
    _dots(axis, found, list(found))
    for place, (value, _) in enumerate(found.values()):
        axis.annotate(f"{100 * value:.1f}", (100 * value, place), (0, 5),
                      textcoords="offset points", ha="center", size=9)  # fmt: skip
    axis.set(xlabel=f"{xlabel}, 95% interval over problems", title=title)
    return figure


def empirical_panels(
    losses: Mapping[str, Sequence[float]], fair: Scores, paper: Scores, xlabel: str = "accuracy (%)"
) -> Figure:
    """The empirical study of one seed: training loss by step at one rate, and scores.

    losses: method -> loss of every step; fair: scores at the method's own best rate; paper: at the
    one rate that is best for all neurons.
    """
    figure, (left, right) = subplots(1, 2, (9.6, 3.4), width_ratios=(1, 1.15))
    for method, values in losses.items():
        window = max(1, len(values) // 6)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        steps = np.arange(window, len(values) + 1)
        left.plot(steps, smooth, color=method_colour(method), label=method_label(method))
    left.set(xlabel="step (running mean)", ylabel="training loss of DPO")
    left.set_title("all at one rate" if paper else "each at its own rate and beta: not comparable")
    methods = list(dict.fromkeys([*fair, *paper]))
    _dots(right, fair, methods, -0.12)
    _dots(right, paper, methods, 0.12, mfc="white")
    right.plot([], [], "o", color=GREY, label="own best rate")
    right.plot([], [], "o", color=GREY, mfc="white", label="one rate for all")
    right.set_xlabel(f"{xlabel}, 95% interval over problems")
    right.legend(loc="upper center", bbox_to_anchor=(0.4, 1.17), ncols=2)
    return figure


def _dots(axis, found: Scores, rows: Sequence[str], shift: float = 0.0, **style) -> None:
    for method, (value, error) in found.items():
        axis.errorbar(100 * value, rows.index(method) + shift, xerr=100 * Z95 * error, fmt="o",
                      color=method_colour(method), capsize=3, **style)  # fmt: skip
    row_names(axis, [method_label(method) for method in rows])
    axis.grid(axis="x", color="#EEEEEE")


# --- curves ---------------------------------------------------------------------------------------


def concentration_curve(label: str, shares: np.ndarray, held: np.ndarray, mark: float) -> Figure:
    """Share of negative log-ratio held by the lowest share of tokens; see `stats.concentration`.

    The legend tells the curve's value at the share `mark`.
    """
    figure, axis = subplots(size=(5.6, 3.8))
    at_mark = float(np.interp(mark, shares, held))
    text = f"{label}: {100 * at_mark:.0f}% in the lowest {100 * mark:g}%"
    axis.plot(100 * shares, 100 * held, color=BLUE, label=text)
    axis.plot([100 * mark], [100 * at_mark], "o", color=BLUE)
    axis.plot([0, 100], [0, 100], color=GREY, ls=":", label="spread evenly")
    axis.set(xlabel="rejected tokens, lowest log-ratio first (%)", xlim=(0, 100), ylim=(0, 102))
    axis.set_ylabel("share of negative log-ratio (%)")
    axis.legend(loc="lower right")
    return figure


def sweep_panels(tried: Mapping[str, Sequence[dict]], start: float | None, count: int) -> Figure:
    """Every model behind the rates (`runs.tried`) by rate, by displacement and by margin.

    The last two need models of this study. A ring marks a best rate at the edge of its search: a
    better one may lie beyond.
    start: the score before alignment; count: problems behind each score, for 95% intervals.
    """
    columns = (
        ("learning rate", lambda one: one["rates"][0]),
        (r"displacement $\|\theta' - \theta\|_2$", lambda one: one["displacement"]),
        ("training reward margin (nats)", lambda one: one["train_margin"]),
    )
    known = [one["displacement"] is not None for records in tried.values() for one in records]
    columns = columns if all(known) else columns[:1]
    size = (10.6 if len(columns) > 1 else 5.4, 3.3)
    figure, (axes,) = subplots(1, len(columns), size, sharey=True, squeeze=False)
    for axis, (label, read) in zip(axes, columns, strict=True):
        for number, (method, records) in enumerate(tried.items()):
            where, values = np.array(sorted((read(one), one["dev"]) for one in records)).T
            error = 100 * Z95 * np.sqrt(values * (1 - values) / count)
            axis.errorbar(where, 100 * values, error, color=method_colour(method),
                          label=method_label(method), marker="osD^"[number % 4], elinewidth=0.7,
                          lw=1.4)  # fmt: skip
            best = int(np.argmax(values))
            if axis is axes[0] and len(values) > 1 and best in (0, len(values) - 1):
                axis.plot(where[best], 100 * values[best], "o", mfc="none", mec="black", ms=12)
        if start is not None:
            axis.axhline(100 * start, color=GREY, ls=":", label="before alignment")
        axis.set_xlabel(label)
        if "margin" not in label:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
    axes[0].set_ylabel("development score (%), 95% interval")
    axes[0].plot([], [], "o", mfc="none", mec="black", ms=12, label="best at the edge: unsettled")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def change_curve(steps: Sequence[int], changes: Mapping[str, Sequence[float]]) -> Figure:
    """Mean change of the log-probability of groups of tokens over the steps of a training."""
    figure, axis = subplots(size=(6.4, 3.2))
    for (label, values), colour in zip(changes.items(), (ORANGE, GREY, BLUE), strict=False):
        axis.plot(steps, values, "o-", ms=3, color=colour, label=label)
    axis.axhline(0, color="black", lw=0.7)
    axis.set(xlabel="optimizer step", ylabel="change of log-probability\n(nats a token)")
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def share_sweep(
    points: Mapping[float, tuple[float, float]],
    reference: tuple[str, float] | None = None,
    title: str = "",
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
    axis.set(xlabel="share of neurons kept (%)", ylabel=f"{ylabel}, 95% interval", title=title)
    if reference:
        axis.axhline(100 * reference[1], color=GREY, ls="--", label=reference[0])
        axis.legend()
    return figure


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


# --- histograms -----------------------------------------------------------------------------------


def score_histogram(scores: np.ndarray, cut: float, title: str = "") -> Figure:
    """How often each score occurs, on a logarithmic axis, and where the mask cuts.

    scores: all entries, at least 0, one dimension; zeros cannot be drawn there and are counted.
    """
    figure, axis = subplots(size=(6.4, 3.4))
    moved = scores[scores > 0]
    low, high = np.log10(moved.min() / cut), np.log10(moved.max() / cut)
    step = (high - low) / 80  # the cut is an edge, and all bins are equally wide
    edges = cut * 10 ** (step * np.arange(np.floor(low / step), np.ceil(high / step) + 1))
    kept = scores >= cut
    for part, colour, label in (
        (moved[moved < cut], GREY, f"left as they are: {1 - kept.mean():.1%} of the neurons"),
        (moved[moved >= cut], method_colour("dpo_top"), f"kept: {kept.mean():.1%}, which made "
         f"{scores[kept].sum() / scores.sum():.0%} of the movement"),
    ):  # fmt: skip
        axis.hist(part, edges, color=colour, label=label)
    axis.axvline(cut, color="black", lw=1.2, label=f"the cut, at a score of {cut:.3g}")
    axis.set_xscale("log")
    axis.set_xlim(left=np.quantile(moved, 0.002))  # a few moved a thousand times less
    still = int((scores == 0).sum())
    zeros = f"; {still:,} did not move" if still else ""
    axis.set(xlabel=rf"score $|\theta'_i - \theta_i|\,/\,\alpha${zeros}", ylabel="neurons")
    axis.set_title(title)
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def probability_histogram(groups: Mapping[str, Sequence[float]], threshold: float) -> Figure:
    """Distribution of p_t in groups of tokens, each in per cent of its own, and the threshold."""
    figure, axis = subplots(size=(6.4, 3.2))
    for number, (label, values) in enumerate(groups.items()):
        weights = np.full(len(values), 100 / max(1, len(values)))
        axis.hist(values, np.linspace(0, 1, 21), weights=weights, alpha=0.6,
                  color=(ORANGE, BLUE)[number % 2], label=f"{label} ({len(values)})")  # fmt: skip
    axis.axvline(threshold, color="black", lw=1.2, label=f"threshold {threshold:g}")
    axis.set(xlabel="$p_t$, the rewriter's probability of keeping the token", xlim=(0, 1))
    axis.set_ylabel("tokens of the group (%)")
    axis.legend()
    return figure


# --- neurons --------------------------------------------------------------------------------------


def importance_heatmap(
    matrix, layers: Sequence[str], modules: Sequence[str], share: float, title: str
) -> Figure:
    """Share of each tensor's entries that are key neurons, `matrix[layer][module]` in [0, 1].

    NaN marks tensors that do not exist. `share` is the overall share, what chance would give.
    """
    values = 100 * np.asarray(matrix, dtype=float)
    size = max(5.2, 1.6 + 0.72 * len(modules)), max(2.6, 1.4 + 0.36 * len(layers))
    figure, axis = subplots(size=size)
    texts = [["" if np.isnan(value) else f"{value:.1f}" for value in row] for row in values]
    light = values > 0.55 * np.nanmax(values)
    image = labelled_grid(axis, values, layers, modules, texts, light, cmap="cividis", vmin=0)
    figure.colorbar(image, ax=axis).set_label("kept entries (%)")
    axis.set_title(f"{title} (chance: {100 * share:g}%)")
    return figure


def overlap_matrix(labels: Sequence[str], matrix, chance: float, title: str) -> Figure:
    """Intersection over union of masks, `matrix[i][j]` in [0, 1], beside what chance would give."""
    values = np.asarray(matrix, dtype=float)
    side = 2.6 + 0.62 * len(labels)
    figure, axis = subplots(size=(side + 0.9, side * 0.86))
    texts = [[f"{value:.2f}" for value in row] for row in values]
    image = labelled_grid(axis, values, labels, labels, texts, values > 0.3, cmap="cividis",
                  norm=PowerNorm(0.5, 0, 1))  # fmt: skip
    bar = figure.colorbar(image, ax=axis, shrink=0.85)
    bar.set_label("intersection over union")
    bar.ax.axhline(chance, color="white", lw=2)
    axis.set_title(f"{title} (chance: {chance:.3f})")
    return figure


def labelled_grid(axis, values: np.ndarray, rows, columns, texts, light, **style):
    """A picture of values with a text in every cell, black where the cell is `light`."""
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", **style)
    for (row, column), value in np.ndenumerate(values):
        colour = GREY if np.isnan(value) else "black" if light[row, column] else "white"
        axis.text(column, row, texts[row][column], ha="center", va="center", color=colour, size=9)
    slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(columns)), columns, **slant if max(map(len, columns)) > 5 else {})
    axis.set_yticks(range(len(rows)), rows)
    axis.spines[:].set_visible(False)
    return image


if __name__ == "__main__":
    print(save(method_drawing(), sys.argv[1], "method", "ALLO, step by step; (NN): notebook."))
