"""Figures of what the study comes to: all methods, the claims, the costs.

`figures` has them too, beside those of single experiments.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from allo_lib.evaluation.claims import MARGIN
from allo_lib.evaluation.published import LABELS, arm_label
from allo_lib.report.figure_style import GREY, PALETTE, VERDICT_STYLE, subplots

# Claims in a few words, for the forest plot; `claims.csv` has them in full.
SHORT = {
    "C1": "top 10%: lower loss",
    "C1p": "same, one rate",
    "C2": "top 10%: more accurate",
    "C2p": "same, one rate",
    "C2s": "same, twice the updates",
    "C3": "last 10%: no worse (bar: margin)",
    "C3p": "same, one rate",
    "C3s": "same, twice the updates",
    "C4": "ALLO above DPO",
    "C4s": "ALLO above DPO, equal steps",
    "C5": "ALLO above all baselines",
    "C6": "forgetting first helps",
    "C7": "choosing tokens helps",
    "C8": "masks overlap above chance",
    "C9": "better rewards help",
    "C10": "ALLO is faster",
}


def main_table_figure(
    measured: Mapping[str, tuple[float, float, float]],
    paper: Mapping[str, float],
    reference: str = "dpo",
    title: str = "measured",
    paper_title: str = "paper",
    unit: str = "accuracy",
) -> Figure:
    """Every method measured, `measured[method]` = (value, low, high), beside the paper's number.

    Fractions; the dashed line is the reference method in each panel.
    """
    names = [name for name in LABELS if name in measured or name in paper]
    names += [name for name in measured if name not in names]
    figure, axes = subplots(1, 2, (9, 1.4 + 0.3 * len(names)), sharey=True)
    places = {name: place for place, name in enumerate(names)}
    for name, (value, low, high) in measured.items():
        colour = PALETTE[1] if name.startswith("allo") else PALETTE[0]
        ends = [[100 * (value - low)], [100 * (high - value)]]
        axes[0].errorbar(100 * value, places[name], xerr=ends, fmt="o", color=colour, capsize=4)
    for name, value in paper.items():
        colour = PALETTE[1] if name.startswith("allo") else PALETTE[0]
        axes[1].plot(100 * value, places[name], "D", color=colour)
    for axis, known in zip(axes, ({k: v[0] for k, v in measured.items()}, paper), strict=True):
        if reference in known:
            axis.axvline(100 * known[reference], color=GREY, ls="--", lw=1)
        axis.grid(axis="y", color="#e5e5e5")
        for name in [name for name in names if name not in known]:
            axis.text(
                0.02,
                places[name],
                "not run",
                color=GREY,
                size=9,
                va="center",
                transform=axis.get_yaxis_transform(),
            )
    axes[0].set_yticks(range(len(names)), [_main_label(name) for name in names])
    axes[0].invert_yaxis()
    axes[0].set(title=title, xlabel=f"{unit} (%), 95% interval; dashed: {arm_label(reference)}")
    axes[1].set(title=paper_title, xlabel="published (%), no intervals")
    return figure


def claims_figure(claims: Sequence, title: str = "") -> Figure:
    """Forest plot of `claims.Claim` rows: one panel a unit, right of zero supports the claim.

    Parts stand below their claim, thinner. Without an interval over SFT models only the effect is
    drawn.
    """
    groups: dict[str, list] = {}
    for claim in claims:
        groups.setdefault(claim.unit, []).append(claim)
    heights = [len(group) + 1.2 for group in groups.values()]
    size = (7.6, 1.0 + 0.36 * sum(heights))
    figure, axes = subplots(len(groups), 1, size, height_ratios=heights, squeeze=False)
    for axis, (unit, group) in zip(axes[:, 0], groups.items(), strict=True):
        _forest(axis, unit, group)
    for verdict, (colour, marker) in VERDICT_STYLE.items():
        axes[0, 0].plot([], [], marker, color=colour, label=verdict)
    legend = figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4
    )
    legend.set_title("right of zero supports the claim; lines: 95% intervals over SFT models")
    figure.suptitle(title or None)
    return figure


def efficiency_bars(rows: Sequence[Mapping[str, str]], title: str = "") -> Figure:
    """Rows of `tables/efficiency.csv`: time a pair (the line is the floor of its operations), peak
    memory and bytes of optimizer state."""
    peaks = [float(row["peak_bytes_above_model"] or 0) for row in rows]
    unit, name = (1e9, "GB") if max(peaks) >= 1e9 else (1e6, "MB")
    panels = (
        ("seconds_per_pair", "seconds a pair", 1.0),
        ("peak_bytes_above_model", f"peak memory\nabove the model ({name})", unit),
        ("state_bytes_per_parameter", "optimizer state\n(bytes a model parameter)", 1.0),
    )
    figure, axes = subplots(1, 3, (9.6, 1.6 + 0.42 * len(rows)), sharey=True)
    several = len({row["device"] for row in rows}) > 1
    names = [row["variant"] + f" ({row['device']})" * several for row in rows]
    for axis, (column, label, scale) in zip(axes, panels, strict=True):
        values = [float(row[column]) / scale if row.get(column) else np.nan for row in rows]
        ours = [row["variant"].startswith("allo") for row in rows]
        bars = axis.barh(
            range(len(names)), values, color=[PALETTE[1] if own else PALETTE[0] for own in ours]
        )
        texts = [f"{value:.3g}" if np.isfinite(value) else "not measured" for value in values]
        axis.bar_label(bars, texts, padding=3, size=9)
        axis.set_xlabel(label)
        axis.margins(x=0.22)
    for place, row in enumerate(rows):
        if row.get("floor_seconds_per_pair"):
            floor = float(row["floor_seconds_per_pair"])
            axes[0].plot((floor, floor), (place - 0.4, place + 0.4), color="black", lw=2)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(title or None)
    return figure


def _forest(axis, unit: str, group: Sequence) -> None:
    scale = 100 if "accuracy" in unit or unit == "win rate" else 1
    names = []
    for place, claim in enumerate(group):
        colour, marker = VERDICT_STYLE[claim.verdict]
        part = claim.whole != claim.id
        words = "" if part else SHORT.get(claim.id.split(":")[0], "")
        names.append(f"{words}  {claim.id}")
        if claim.id.startswith("C3"):
            axis.plot(-scale * MARGIN, place, "|", color="black", ms=14)
        if claim.effect is None:
            axis.text(
                0.02,
                place,
                "not measured",
                transform=axis.get_yaxis_transform(),
                va="center",
                color=GREY,
                size=9,
            )
            continue
        axis.plot(scale * claim.effect, place, marker, color=colour, ms=4.5 if part else 7)
        if claim.ci_low is not None:
            ends = scale * claim.ci_low, scale * claim.ci_high
            axis.plot(ends, (place, place), color=colour, lw=1 if part else 2)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(group)), names)
    axis.set_ylim(len(group) - 0.4, -0.6)
    axis.grid(axis="y", color="#eeeeee")
    axis.set_xlabel(f"{unit}, points" if scale == 100 else unit)
    axis.locator_params(axis="x", nbins=7)  # more of them, in small units, run into each other


def _main_label(method: str) -> str:
    return LABELS.get(method) or arm_label(method)
