"""The figures of a results folder, drawn from its outcomes, measurements and claims alone.

Error bars and intervals are 95% unless a label says otherwise. What lies far outside is cut, with
an arrow and its number at the right. A small dot is one SFT model, a diamond the paper's value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import Domain, StudyResults, judged_by
from allo_lib.evaluation.stats import Interval
from allo_lib.evaluation.verdicts import MARGIN, POINTS, Claim
from allo_lib.report.figure_style import (
    GREY,
    VERDICT_STYLE,
    method_colour,
    row_names,
    save,
    subplots,
)

# Claims in a few words; `claims.csv` has them in full.
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
}
# What is compared between architectures.
BY_ARCHITECTURE = {
    "C2.dpo": "DPO: top 10% above all neurons",
    "C2.dpo_last10": "DPO: top 10% above last 10%",
    "C4s": "ALLO above DPO, equal steps",
    "C8.orders": "masks of two orders",
    "C8.halves": "masks of two halves",
    "C8.estimators": "masks of two estimators",
}
# The parts of the neurons that DPO trains, and the protocols: ending of the method, words, marker.
_PARTS = ("dpo_top10", "dpo_random10", "dpo_last10", "dpo")
_PROTOCOLS = (("", "own best rate", "full"), ("_paper", "one rate for all", "none"),
              ("_long", "own best rate, as many updates as ALLO", "left"))  # fmt: skip
_SIDES = (("#E69F00", "D"), ("#56B4E9", "o"), (GREY, "s"))  # below, above, around zero
_SAME = "paper, same data"
_PAPER_MARKERS = dict(zip(("paper", _SAME, *published.AVERAGES.values()), "DDDs^", strict=True))
# By the figure's name, or what stands before the domain's.
CAPTIONS = {
    "claims": "Claims and, below each, its parts with 95% intervals over SFT models, those of "
    "one claim's parts held together; right of zero supports it. Diamonds: the paper's effects.",
    "relative_change": "ALLO relative to DPO on every data set: score of ALLO over that of DPO, "
    "minus 1, with its 95% interval over SFT models (of one model, over its problems), beside the "
    "paper's own change. The paper publishes no intervals. DPO makes half the updates of ALLO.",
    "main": "All methods: measured, with 95% intervals, and the paper's own numbers on its models "
    "and data; a point is equally long on both scales. DPO is one epoch, half the updates of ALLO.",
    "empirical": "DPO on a tenth of the neurons and on all, with 95% intervals, beside the paper, "
    "which trained all at one rate and publishes no intervals.",
    "ablations": "ALLO with one thing changed: paired differences to ALLO on the same problems, "
    "with 95% intervals; left: removing this part hurts.",
    "architectures": "The same claims on models of several architectures, as large and trained "
    "alike: effects with 95% intervals over the SFT models of each, those of a claim's parts held "
    "together, not corrected for the number of architectures; overlaps of masks (intersection over "
    "union) are those above chance within each tensor.",
    "efficiency": "Cost of one pair: time (line: the floor of its operations), peak memory above "
    "the loaded model, optimizer state.",
}
_MOST_DOTS = 10  # SFT models; of more, their spread is in the interval


def draw(
    results: StudyResults,
    claims: Sequence[Claim],
    efficiency: Sequence[Mapping[str, str]],
    groups: Mapping[str, Sequence[Claim]],
    folder: Path,
) -> list[Path]:
    """Write every figure that the results allow; returns the PNGs and PDFs."""
    by_domain: dict[str, list[Claim]] = {}
    for claim in claims:  # those of the first domain have plain ids
        name = claim.id.partition(":")[2]
        if claim.family != "costs":  # which have a figure of their own
            by_domain.setdefault(f"claims_{name}" if name else "claims", []).append(claim)
    found = {name: claims_figure(group) for name, group in by_domain.items()}
    said = {}
    for name, group in by_domain.items():
        missing = [claim.id for claim in group if claim.effect is None and claim.whole == claim.id]
        said[name] = f" Not measured: {', '.join(missing)}." if missing else ""
    if changes := relative_change(results):
        found["relative_change"] = changes
    for domain in results.domains:
        here = results.on(domain)
        own = {method: here.score(method, domain) for method in published.LABELS}
        if any(own.values()):
            found[f"main_{domain.name}"] = main_table_figure(own, domain)
            said[f"main_{domain.name}"] = judged_by(results.index, domain)
        parts = [part + end for part in _PARTS for end, *_ in _PROTOCOLS]
        study = {part: one for part in parts if (one := here.score(part, domain))}
        if len(study) > 1:
            found[f"empirical_{domain.name}"] = empirical_dots(study, domain.unit)
        names = ["dpo", "dpo_long", *sorted(m for m in here.methods if m.startswith("allo_"))]
        if gaps := {n: gap for n in names if (gap := here.compare(n, "allo", domain))}:
            found[f"ablations_{domain.name}"] = ablation_bars(gaps, domain.unit)
    if efficiency:
        found["efficiency"] = efficiency_bars(efficiency)
    if groups:
        found["architectures"] = architectures_figure(groups)
    paths = []
    for name, figure in found.items():
        caption = CAPTIONS.get(name) or CAPTIONS[name.partition("_")[0]]
        lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "."]
        if any(len(line.get_xdata()) for line in lines):
            caption += " Small dots: SFT models."
        paths.append(save(figure, folder, name, caption + said.get(name, "")))
    return [path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf")]


# --- lines with intervals, one below the other ---------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a panel, in the unit of its axis: effect, interval, what stands beside it.

    dots: SFT models; paper: (label, value) each; small: a part of what stands above. Without an
    effect `why` is shown.
    """

    label: str
    effect: float | None
    low: float | None = None
    high: float | None = None
    colour: str = GREY
    marker: str = "o"
    dots: tuple[float, ...] = ()
    paper: tuple[tuple[str, float], ...] = ()
    small: bool = False
    fill: str = "full"
    why: str = "not run"


def _line(label: str, one: Interval | None, **options) -> Line:
    if one is None:
        return Line(label, None, **options)
    ends = (100 * one.low, 100 * one.high) if one.defined else (None, None)
    dots = one.by_seed if 1 < len(one.by_seed) <= _MOST_DOTS else ()
    return Line(label, 100 * one.effect, *ends, dots=tuple(100 * x for x in dots), **options)


def forest(axis, lines: Sequence[Line], digits: int = 1) -> None:
    """Draw the lines from top to bottom, their numbers at the right, around zero.

    The axis ends at five times the median distance from zero, or at the paper's furthest value:
    few lines far outside must not flatten all others.
    """
    known = [line for line in lines if line.effect is not None]
    ends = [x for line in known for x in (line.effect, line.low, line.high) if x is not None]
    papers = [value for line in lines for _, value in line.paper]
    reach = max(5 * np.median(np.abs(ends)) if ends else 0, *map(abs, papers), 1e-9)
    for place, line in enumerate(lines):
        axis.axhline(place, color="#eeeeee", lw=0.8, zorder=0)
        for label, value in line.paper:
            axis.plot(value, place - 0.27, _PAPER_MARKERS[label], mfc="white", mec="black", ms=4.5,
                      zorder=4)  # fmt: skip
        text, colour = line.why, GREY
        if line.effect is not None:
            _point(axis, place, line, reach)
            text, colour = f"{line.effect:+z.{digits}f}", "black"
            if line.low is not None:
                text += f" [{line.low:+z.{digits}f}, {line.high:+z.{digits}f}]"
        axis.text(1.02, place, text, size=9, va="center", color=colour,
                  transform=axis.get_yaxis_transform())  # fmt: skip
    shown = np.clip([0.0, *ends, *papers], -reach, reach)
    room = 0.06 * np.ptp(shown) or 1.0
    axis.set_xlim(shown.min() - room, shown.max() + room)
    axis.axvline(0, color="black", lw=0.8)
    row_names(axis, [line.label for line in lines])


def _point(axis, place: float, line: Line, reach: float = 100) -> None:
    size, width = (4.5, 1.0) if line.small else (7.0, 2.0)
    if line.low is not None:
        ends = np.clip((line.low, line.high), -reach, reach)
        axis.plot(ends, (place, place), color=line.colour, lw=width)
    dots = [dot for dot in line.dots if abs(dot) <= reach]
    axis.plot(dots, [place + 0.22] * len(dots), ".", color=line.colour, ms=3.5, mew=0)
    if abs(line.effect) <= reach:
        axis.plot(line.effect, place, line.marker, color=line.colour, ms=size, zorder=3,
                  fillstyle=line.fill, markerfacecoloralt="white")  # fmt: skip
    known = [x for x in (line.effect, line.low, line.high) if x is not None]
    for edge, arrow, cut in ((-reach, "<", min(known) < -reach), (reach, ">", max(known) > reach)):
        if cut:
            axis.plot(edge, place, arrow, color=line.colour, ms=6, clip_on=False, zorder=3)


# --- what the study comes to ---------------------------------------------------------------------


def main_table_figure(measured: Mapping[str, Interval | None], domain: Domain) -> Figure:
    """Every method's score, best first, beside the paper's number; the dashed line is DPO.

    Hollow and below the others: scores on fewer SFT models, which compare with none of those.
    """
    paper, title = paper_beside(domain)
    known = {name: one for name, one in measured.items() if one}
    most = max(len(one.seeds) for one in known.values())
    few = {name for name, one in known.items() if len(one.seeds) < most}
    names = sorted(known, key=lambda name: (name in few, -known[name].effect))
    names += [name for name in published.LABELS if name not in known]
    figure, axes = subplots(1, 2, (9, 1.4 + 0.3 * len(names)), sharey=True)
    spans = []
    for place, name in enumerate(names):
        colour = method_colour(name)
        if name in known:
            fill = "none" if name in few else "full"
            _point(axes[0], place, _line(name, known[name], colour=colour, fill=fill))
        else:
            axes[0].text(0.02, place, "not run", color=GREY, size=9, va="center",
                         transform=axes[0].get_yaxis_transform())  # fmt: skip
        axes[1].plot(100 * paper[name], place, "D", color=colour)
    ours = {name: one.effect for name, one in known.items()}
    for axis, scores in zip(axes, (ours, paper), strict=True):
        if "dpo" in scores:
            axis.axvline(100 * scores["dpo"], color=GREY, ls="--", lw=1)
        axis.grid(axis="y", color="#e5e5e5")
        spans.append(axis.get_xlim())
    longest = max(high - low for low, high in spans)
    for axis, (low, high) in zip(axes, spans, strict=True):
        start = min(max((low + high - longest) / 2, 0), max(low, 0))
        axis.set_xlim(start, start + longest)
    row_names(axes[0], [published.LABELS[name] for name in names])
    axes[0].set_title(f"{domain.name}: {', '.join(domain.datasets)}")
    words = f"{domain.unit} (%), 95% interval; dashed: {published.method_label('dpo')}"
    axes[0].set_xlabel(words + "\nhollow: fewer SFT models, compare with no other row" * bool(few))
    axes[1].set(title=title, xlabel="published (%), no intervals")
    return figure


def paper_beside(domain: Domain) -> tuple[dict[str, float], str]:
    """The paper's number of each method on the domain's own data sets, as far as it has them, else
    an average of its own; and which it is."""
    table = published.main_results()
    columns = [name for name in domain.datasets if name in table["dpo"]]
    title = f"paper, {', '.join(columns)}"
    if not columns and domain.prefix:
        columns, title = ["instructions_avg"], "paper, instruction following (win rate)"
    elif not columns:
        columns, title = ["qa_avg"], "paper, mean of 4 question sets"
    mean = {m: sum(row[name] for name in columns) / len(columns) for m, row in table.items()}
    return mean, title


def empirical_dots(measured: Mapping[str, Interval], unit: str) -> Figure:
    """DPO on the top, random and last 10% and on all neurons, a row each, beside the paper's."""
    figure, (ours, theirs) = subplots(1, 2, (9.2, 3.6), sharey=True, width_ratios=(1.4, 1))
    row_names(ours, [published.method_label(part) for part in _PARTS])
    shown = [one for one in _PROTOCOLS if any(part + one[0] in measured for part in _PARTS)]
    for number, (end, label, fill) in enumerate(shown):
        for place, part in enumerate(_PARTS):
            if part + end in measured:
                y = place + 0.22 * (number - (len(shown) - 1) / 2)
                _point(ours, y, _line("", measured[part + end], colour=method_colour(part),
                                      fill=fill))  # fmt: skip
        ours.plot([], [], "o", color=GREY, fillstyle=fill, markerfacecoloralt="white", label=label)
    ours.set(xlabel=f"{unit} (%), 95% interval", title="measured")
    paper = published.empirical_study()
    for dataset, marker in zip(paper["dpo"], "D^s", strict=True):
        for place, part in enumerate(_PARTS):
            if part in paper:
                gap = 100 * (paper[part][dataset] - paper["dpo"][dataset])
                theirs.plot(gap, place, marker, mfc="none", mec=method_colour(part), mew=1.5)
        theirs.plot([], [], marker, mfc="none", mec=GREY, label=dataset)
    theirs.axvline(0, color="black", lw=0.8)
    theirs.set(xlabel="accuracy, points above all neurons", title="paper (one rate, no intervals)")
    for axis in (ours, theirs):
        axis.grid(axis="y", color="#e5e5e5")
    handles = [a.get_legend_handles_labels() for a in (ours, theirs)]
    figure.legend(*(sum(parts, []) for parts in zip(*handles, strict=True)),
                  loc="outside lower center", ncols=3)  # fmt: skip
    return figure


def ablation_bars(effects: Mapping[str, Interval], unit: str, title: str = "") -> Figure:
    """What each method is above ALLO, a fraction."""
    lines = []
    for name, one in effects.items():
        colour, marker = _SIDES[0 if one.high < 0 else 1 if one.low > 0 else 2]
        lines.append(_line(published.method_label(name), one, colour=colour, marker=marker))
    figure, axis = subplots(size=(8.0, 1.3 + 0.34 * len(lines)))
    forest(axis, lines)
    axis.set_xlabel(f"{unit}, points above ALLO\n(95% interval; grey: includes 0)")
    axis.set_title(title)
    return figure


def relative_change(results: StudyResults) -> Figure | None:
    """ALLO over DPO, minus 1: a panel a domain, a line a data set, beside the paper's change.

    Data sets that the paper does not have stand alone, and their average beside the paper's
    averages. None where no data set has both methods.
    """
    panels = {domain: [_change(results, domain, name) for name in domain.columns]
              for domain in results.domains}  # fmt: skip
    lines = [line for group in panels.values() for line in group]
    if all(line.effect is None for line in lines):
        return None
    heights = [len(group) + 0.8 for group in panels.values()]
    size = 8.6, 1.2 + 0.36 * sum(heights) + 0.3 * len(panels)
    figure, axes = subplots(len(panels), 1, size, height_ratios=heights, squeeze=False)
    for axis, (domain, group) in zip(axes[:, 0], panels.items(), strict=True):
        forest(axis, group)
        axis.set_title(f"{domain.name}: {domain.unit}", loc="left")
    axes[-1, 0].set_xlabel("relative change from DPO to ALLO (%), 95% interval")
    axes[0, 0].plot([], [], "o-", color=method_colour("allo"), label="measured")
    shown = {label for line in lines for label, _ in line.paper}
    for label in [label for label in _PAPER_MARKERS if label in shown]:
        style = {"mfc": "white", "mec": "black", "ms": 5.5}
        axes[0, 0].plot([], [], _PAPER_MARKERS[label], **style, label=label)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4)
    return figure


def _change(results: StudyResults, domain: Domain, dataset: str) -> Line:
    beside, part = published.beside(domain.datasets), domain.only(dataset)
    points = {_SAME: beside[dataset]} if dataset in beside else {}
    if dataset == domain.columns[-1] and not set(domain.columns) & set(beside):
        like = ("instructions_avg",) if domain.prefix else published.AVERAGES
        points = {published.AVERAGES[name]: beside[name] for name in like}
    results = results.on(domain)
    both = results.compare("allo", "dpo", part) is not None
    return _line(
        dataset, results.compare("allo", "dpo", part, relative=True),
        colour=method_colour("allo"), why="DPO: none right" if both else "not run",
        paper=tuple((label, 100 * (row["allo"] / row["dpo"] - 1)) for label, row in points.items()),
        small=dataset != domain.columns[-1],
    )  # fmt: skip


def claims_figure(claims: Sequence[Claim]) -> Figure:
    """One panel a unit, right of zero supports the claim; what was not measured is left out.

    Without an interval over SFT models only the effect is drawn.
    """
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        if claim.effect is not None:
            groups.setdefault(claim.unit, []).append(claim)
    heights = [len(group) + 1.2 for group in groups.values()] or [1]
    figure, axes = subplots(
        len(heights), 1, (8.4, 1.0 + 0.3 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (unit, group) in zip(axes[:, 0], groups.items(), strict=False):
        scale, digits = (100, 1) if unit in POINTS else (1, 3)
        forest(axis, [_claim_line(claim, scale) for claim in group], digits)
        for place, claim in enumerate(group):
            if claim.id.startswith("C3"):
                axis.plot(-100 * MARGIN, place, "|", color="black", ms=14)
        axis.set_xlabel(f"{unit}, points" if unit in POINTS else unit)
        axis.locator_params(axis="x", nbins=7)  # more of them, in small units, run into each other
    for verdict, (colour, marker) in VERDICT_STYLE.items():
        axes[0, 0].plot([], [], marker, color=colour, label=verdict)
    axes[0, 0].plot([], [], "D", mfc="white", mec="black", ms=4.5, label="paper")
    handles = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside upper center", ncols=5)
    domains = {claim.id.partition(":")[2] for claim in claims} - {""}
    about = "".join(f"{domain}: " for domain in sorted(domains))
    legend.set_title(f"{about}right of zero supports the claim; lines: 95% intervals")
    return figure


def architectures_figure(groups: Mapping[str, Sequence[Claim]]) -> Figure:
    """A panel each of BY_ARCHITECTURE, in it a line an architecture."""
    size = 9.0, 1.6 + 0.75 * len(groups)
    figure, axes = subplots(2, 3, size, sharey=True)
    by_id = {name: {claim.id: claim for claim in claims} for name, claims in groups.items()}
    for axis, (key, title) in zip(axes.flat, BY_ARCHITECTURE.items(), strict=True):
        lines = []
        for name, claims in by_id.items():
            claim = claims.get(key, Claim(key, ""))
            ends, scale = (claim.ci_low, claim.ci_high), 1 if key.startswith("C8") else 100
            values = [None if end is None else scale * end for end in (claim.effect, *ends)]
            lines.append(Line(name, *values, colour=method_colour("allo")))
        forest(axis, lines, 2 if key.startswith("C8") else 1)
        axis.set_title(title)
        axis.set_xlabel("overlap above chance" if key.startswith("C8") else "accuracy, points")
    return figure


def _claim_line(claim: Claim, scale: float) -> Line:
    name, _, part = claim.id.partition(":")[0].partition(".")
    words = f"\u00b7 {published.method_label(part)}" if part else f"{SHORT.get(name, '')}  {name}"
    colour, marker = VERDICT_STYLE[claim.verdict]
    ends = [None if end is None else scale * end for end in (claim.ci_low, claim.ci_high)]
    paper = () if claim.paper is None or scale == 1 else (("paper", scale * claim.paper),)
    return Line(words, scale * claim.effect, *ends, colour, marker, paper=paper, small=bool(part))


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
    names = [row["variant"] for row in rows]
    ours = ["allo" if row["variant"].startswith("allo") else "dpo" for row in rows]
    for axis, (column, label, scale) in zip(axes, panels, strict=True):
        values = [float(row[column]) / scale if row.get(column) else np.nan for row in rows]
        bars = axis.barh(range(len(names)), values, color=[method_colour(one) for one in ours])
        texts = [f"{value:.3g}" if np.isfinite(value) else "not measured" for value in values]
        axis.bar_label(bars, texts, padding=3, size=9)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=4)  # more numbers run into each other
        axis.margins(x=0.22)
    for place, row in enumerate(rows):
        if row.get("floor_seconds_per_pair"):
            floor = float(row["floor_seconds_per_pair"])
            axes[0].plot((floor, floor), (place - 0.4, place + 0.4), color="black", lw=2)
    row_names(axes[0], names)
    figure.suptitle(title or None)
    return figure
