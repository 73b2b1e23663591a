"""ALLO against every other row of the main tables, and the p-values behind the claims."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import Domain, StudyResults, columns_of, paper_effect
from allo_lib.evaluation.stats import Interval, holm
from allo_lib.evaluation.verdicts import RULE, UNDECIDED, Claim, PValues, decide, p_values, tags_of
from allo_lib.report.tables import METHOD, Table, change_text, how, reason, seeds_of

# The two families of comparisons: what a reader takes home, and what stands behind it.
AVERAGES, SINGLE = "averages", "single data sets"


@dataclass(frozen=True)
class Comparison:
    """METHOD minus `baseline` on one data set, or on the average of a domain.

    `paper` is the paper's effect; `p` is None where no verdict can rest on the interval, and
    `missing` says why nothing was measured. `sign` and `small` are p-values after correction.
    """

    domain: str
    dataset: str
    baseline: str
    family: str
    interval: Interval | None
    paper: float | None
    p: PValues | None = None
    missing: str = ""
    sign: float | None = None
    small: float | None = None

    @property
    def verdict(self) -> str:
        """On "METHOD is above the row", by the rule of `verdicts`."""
        return UNDECIDED if self.p is None else decide(self.p, self.sign, self.small)

    @property
    def tags(self) -> list[str]:
        """What stands beside the verdict (`verdicts.tags_of`)."""
        if self.p is None:
            return []
        return tags_of(self.verdict, self.small, self.paper, self.interval.low, self.interval.high)


def compare_rows(results: StudyResults, paper_dir: str | Path | None = None) -> list[Comparison]:
    """Every comparison of METHOD with a row of the main tables, each family corrected by Holm."""
    paper = published.main_results(paper_dir), published.empirical_study(paper_dir)
    found = [
        _compared(results, paper, domain, dataset, baseline)
        for domain in results.domains
        for dataset in columns_of(domain)
        for baseline in published.LABELS
        if baseline != METHOD
    ]
    for family in (AVERAGES, SINGLE):
        places = [i for i, one in enumerate(found) if one.family == family and one.p]
        signs = holm([found[i].p.sign for i in places])
        smalls = holm([found[i].p.small for i in places])
        for place, sign, small in zip(places, signs, smalls, strict=True):
            found[place] = replace(found[place], sign=sign, small=small)
    return found


def _compared(
    results: StudyResults, paper, domain: Domain, dataset: str, baseline: str
) -> Comparison:
    part, missing = domain.only(dataset), ""
    interval = results.compare(METHOD, baseline, part)
    if interval is None:
        whole = results.datasets_of(METHOD, part) == list(part.datasets)
        lacking = baseline if whole else METHOD
        missing = f"{lacking}: {reason(results, lacking, dataset, domain)}"
    return Comparison(
        domain.name,
        dataset,
        baseline,
        AVERAGES if dataset == columns_of(domain)[-1] else SINGLE,
        interval,
        paper_effect(paper, METHOD, baseline, part),
        p_values(interval, domain.unit, models=results.models),
        missing,
    )


def row_comparisons(results: StudyResults, paper_dir: str | Path | None = None) -> Table:
    """`comparisons.csv` and `.md`: effects in fractions and points, verdicts before and after."""
    found = compare_rows(results, paper_dir)
    sizes = [sum(one.family == family and one.p is not None for one in found)
             for family in (AVERAGES, SINGLE)]  # fmt: skip
    records, body = [], []
    for one in found:
        interval = one.interval
        records.append(
            {
                "domain": one.domain,
                "dataset": one.dataset,
                "method": METHOD,
                "baseline": one.baseline,
                "effect": interval and interval.effect,
                "ci_low": interval and interval.low,
                "ci_high": interval and interval.high,
                "published": one.paper,
                "family": one.family,
                **_ps(one),
                "verdict": one.verdict if interval else "",
                "tags": "; ".join(one.tags),
                "interval": interval.kind if interval else "",
                "seeds": seeds_of(interval),
                "n": interval.n if interval else "",
                "reason": one.missing,
            }
        )
        if interval:
            paper = "" if one.paper is None else f"{100 * one.paper:+z.2f}"
            body.append([one.domain, one.dataset, published.LABELS[one.baseline],
                         *change_text(interval), paper, _p_text(one.sign), _p_text(one.small),
                         with_tags(one.verdict, one.tags)])  # fmt: skip
    return Table(
        "comparisons",
        "ALLO against every other row of the main tables, points",
        f"{how(results)} Difference: ALLO minus the row, with its 95% interval over SFT models "
        "(of one model, over its problems). p: two-sided, that it is none; p size: that it is a "
        "point or more. Verdict: on ALLO being above the row, by the rule of the claims, corrected "
        f"by Holm's method in two families over all domains: the {sizes[0]} comparisons on "
        f"averages (or on a domain's only data set), and the {sizes[1]} on single data sets. "
        "Beside data sets that the paper does not have stands its mean over its eight question and "
        "maths sets. Rows that were not run: comparisons.csv says why.",
        records,
        ["domain", "data set", "against", "difference", "95% interval", "paper", "p, Holm",
         "p size, Holm", "verdict"],
        body,
    )  # fmt: skip


def _ps(one: Comparison | Claim) -> dict[str, float | None]:
    return {"p": one.p and one.p.sign, "p_holm": one.sign,
            "p_size": one.p and one.p.small, "p_size_holm": one.small}  # fmt: skip


def claims_table(claims: Sequence[Claim]) -> Table:
    """`verdicts.csv` and `.md`: the p-values behind the verdicts, before and after correction."""
    return Table(
        "verdicts",
        "The verdicts and the p-values behind them",
        f"{RULE} p: two-sided, that the effect (of C3 above minus its margin) is none; p size: "
        "that it is a point or more; each before and after Holm's method. Claims that were not "
        "measured, or on fewer SFT models than were fixed beforehand, are left out, and so are "
        "verdicts that rest on no p.",
        [
            {"id": c.id, "family": c.family, **_ps(c), "published": c.paper, "verdict": c.verdict,
             "tags": "; ".join(c.tags)} for c in claims
        ],
        ["id", "family", "p", "p, Holm", "p size", "p size, Holm", "verdict"],
        [
            [c.id, c.family, *map(_p_text, _ps(c).values()), with_tags(c.verdict, c.tags)]
            for c in claims if c.p is not None
        ],
    )  # fmt: skip


def with_tags(verdict: str, tags: Sequence[str]) -> str:
    """A verdict and its tags in words."""
    return f"{verdict} ({'; '.join(tags)})" if tags else verdict


def _p_text(p: float | None) -> str:
    """A p-value with three decimals; those below a thousandth as such."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
