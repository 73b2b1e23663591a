"""The claims on models of several architectures, one beside the other: a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from allo_lib.evaluation.claims import effect_text
from allo_lib.evaluation.verdicts import Claim
from allo_lib.report.figure_style import method_colour, save, subplots
from allo_lib.report.figures import Line, forest
from allo_lib.report.tables import Table, split

# What is compared between architectures.
BY_ARCHITECTURE = {
    "C2.dpo": "DPO: top 10% above all neurons",
    "C2.dpo_last10": "DPO: top 10% above last 10%",
    "C4s": "ALLO above DPO, equal steps",
    "C8.orders": "masks of two orders",
    "C8.halves": "masks of two halves",
    "C8.estimators": "masks of two estimators",
}
_CAPTION = (
    "The same claims on models of several architectures, as large and trained "
    "alike: effects with 95% intervals over the SFT models of each, those of a claim's parts held "
    "together, not corrected for the number of architectures; overlaps of masks (intersection over "
    "union) are those above chance within each tensor."
)


def draw(groups: Mapping[str, Sequence[Claim]], folder: Path) -> list[Path]:
    """Write the figure as PNG and PDF; returns their paths."""
    path = save(architectures_figure(groups), folder, "architectures", _CAPTION)
    return [path, path.with_suffix(".pdf")]


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


def architectures_table(groups: Mapping[str, Sequence[Claim]]) -> Table:
    """`architectures.csv` and `.md`: the effects on the models of each (`by_architecture`)."""
    rows = []
    for name, claims in groups.items():
        for claim in claims:
            ends = {"ci_low": claim.ci_low, "ci_high": claim.ci_high}
            record = {"architecture": name, "id": claim.id, "effect": claim.effect, **ends}
            known = claim.effect is not None and claim.ci_low is not None
            texts = [name, claim.id, claim.claim, *effect_text(claim)]
            rows.append((record, texts if known else []))
    return Table(
        "architectures",
        "The claims on each architecture",
        "Effects with 95% intervals over the SFT models of an architecture, those of one claim's "
        "parts held together; not corrected for their number, so that they have no verdicts.",
        ["architecture", "id", "claim", "effect", "95% interval"],
        *split(rows),
    )
