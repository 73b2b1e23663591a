"""The study in one figure: ALLO's score relative to DPO's on every data set, beside the paper's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import StudyResults, columns_of
from allo_lib.evaluation.stats import Interval
from allo_lib.report.figure_style import GREY, PALETTE, subplots
from allo_lib.report.main_table import PAPER_AVERAGES, published_columns

CAPTION = (
    "ALLO relative to DPO on every data set: score of ALLO over that of DPO, minus 1, with its 95% "
    "interval over SFT models (of one model, over its problems), beside the paper's own change. "
    "The paper publishes no intervals."
)
_OWN, _FURTHEST = "paper, same data", 100.0  # per cent; what lies further is cut, with an arrow
# Marker and its inside; black is the number that compares best.
_MARKERS = dict(zip((_OWN, *PAPER_AVERAGES.values()), "DDs^", strict=True))
_INSIDE = {_OWN: "black"}
# Of the paper's averages the one of the same kind, where there is one.
_LIKE = {"helpfulness": ("instructions_avg",), "instructions": ("instructions_avg",)}


@dataclass(frozen=True)
class Change:
    """One line of the figure: `paper` holds (label, relative change), all fractions.

    `why_none` says in words why there is no interval.
    """

    domain: str
    unit: str
    dataset: str
    interval: Interval | None
    paper: tuple[tuple[str, float], ...]
    why_none: str = "not run"


def changes_of(
    results: StudyResults,
    paper_dir: str | Path | None = None,
    method: str = "allo",
    baseline: str = "dpo",
) -> list[Change]:
    """The relative change on each data set of each domain and on their averages.

    Data sets that the paper does not have stand alone, and their average beside the paper's
    averages.
    """
    paper, found = published.main_results(paper_dir), []
    for domain in results.domains:
        columns, beside = columns_of(domain), published_columns(paper, domain)
        for name in columns:
            part = domain.only(name)
            interval = results.compare(method, baseline, part, relative=True)
            points = [(_OWN, beside[name])] if name in beside else []
            if name == columns[-1] and not set(columns) & set(beside):
                like = _LIKE.get(domain.name, tuple(beside))
                points = [(PAPER_AVERAGES[key], beside[key]) for key in like]
            told = tuple((label, row[method] / row[baseline] - 1) for label, row in points)
            both = results.compare(method, baseline, part) is not None
            why = f"{baseline.upper()}: none right" if both else "not run"
            found.append(Change(domain.name, domain.unit, name, interval, told, why))
    return found


def draw(changes: Sequence[Change]) -> Figure:
    """One line a data set, domains apart: the measured change with its interval, and the paper's.

    Numbers at the right repeat the measured change and its interval, in per cent.
    """
    places, headings, place = {}, {}, -1
    for change in changes:
        if change.domain not in headings:
            place += 1
            headings[change.domain] = place, change.unit
        place += 1
        places[change] = place
    figure, axis = subplots(size=(8.6, 1.5 + 0.34 * (place + 1)))
    for change, y in places.items():
        _line(axis, change, y)
    for name, (y, unit) in headings.items():
        style = {"weight": "bold", "size": 9, "va": "center", "color": GREY}
        style["bbox"] = {"fc": "white", "ec": "none", "pad": 1}
        axis.text(0.008, y, f"{name}: {unit}", transform=axis.get_yaxis_transform(), **style)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(list(places.values()), [change.dataset for change in places])
    axis.set_ylim(place + 0.6, -0.6)
    axis.set_xlim(*_limits(changes))
    axis.set_xlabel("relative change from DPO to ALLO (%), 95% interval")
    _legend(figure, axis, changes)
    return figure


def _line(axis, change: Change, y: float) -> None:
    whole = change.dataset == "average"
    for label, value in change.paper:
        axis.plot(100 * value, y - 0.28, _MARKERS[label], **_paper_style(label))
    axis.axhline(y, color="#eeeeee", zorder=0)
    text = change.why_none
    if change.interval is not None:
        colour, low, high = PALETTE[1], 100 * change.interval.low, 100 * change.interval.high
        axis.plot((low, high), (y, y), color=colour, lw=3 if whole else 1.8)
        axis.plot(100 * change.interval.effect, y, "o", color=colour, ms=8 if whole else 6)
        for end, arrow in ((low, "<"), (high, ">")):
            if abs(end) > _FURTHEST:
                edge = _FURTHEST if end > 0 else -_FURTHEST
                axis.plot(edge, y, arrow, color=colour, ms=6, clip_on=False)
        text = f"{100 * change.interval.effect:+z.1f} [{low:+z.1f}, {high:+z.1f}]"
    style = {"color": "black" if change.interval else GREY, "weight": "bold" if whole else "normal"}
    place = axis.get_yaxis_transform()
    axis.text(1.02, y, text, size=9, va="center", transform=place, **style)


def _limits(changes: Sequence[Change]) -> tuple[float, float]:
    """Of the x axis, in per cent: all that is shown, but no further than _FURTHEST."""
    values = [100 * value for change in changes for _, value in change.paper] + [0.0]
    for change in changes:
        if change.interval is not None:
            values += [100 * change.interval.low, 100 * change.interval.high]
    low, high = (min(max(end, -_FURTHEST), _FURTHEST) for end in (min(values), max(values)))
    room = 0.05 * (high - low) + 0.5
    return low - room, high + room


def _legend(figure: Figure, axis, changes: Sequence[Change]) -> None:
    axis.plot([], [], "o-", color=PALETTE[1], label="measured")
    shown = {label for change in changes for label, _ in change.paper}
    for label in [label for label in _MARKERS if label in shown]:
        axis.plot([], [], _MARKERS[label], **_paper_style(label), label=label)
    lines = axis.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=min(len(lines[0]), 4))


def _paper_style(label: str) -> dict:
    return {"mfc": _INSIDE.get(label, "white"), "mec": "black", "ms": 5.5}
