"""ALLO against every other row of the main tables, and what is left of verdicts after Holm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from allo_lib import published
from allo_lib.claims import corrected
from allo_lib.comparisons import Domain, columns_of, compare, domains_of, index_of, paper_effect
from allo_lib.measurements import Measurement
from allo_lib.multiple import holm
from allo_lib.not_run import reason
from allo_lib.stats import Interval
from allo_lib.table_cells import Table, change_text, how
from allo_lib.verdicts import INCONCLUSIVE, Claim, after, deciding_p, judge, p_values

METHOD = "allo"
# The two families of comparisons: what a reader takes home, and what stands behind it.
AVERAGES, SINGLE = "averages", "single data sets"


@dataclass(frozen=True)
class Comparison:
    """METHOD minus `baseline` on one data set, or on the average of a domain.

    `paper` is the paper's effect; `p` is None and `missing` says why where nothing was measured.
    """

    domain: str
    dataset: str
    baseline: str
    family: str
    interval: Interval | None
    paper: float | None
    verdict: str = INCONCLUSIVE
    p: float | None = None
    adjusted: float | None = None
    missing: str = ""

    @property
    def verdict_after(self) -> str:
        return after(self.verdict, self.adjusted)


def compare_rows(
    rows: Sequence[Measurement], paper_dir: str | Path | None = None
) -> list[Comparison]:
    """Every comparison of METHOD with a row of the main tables, each family corrected by Holm.

    The verdict is on the paper's own sign: `reproduced` where METHOD is better here too, or worse
    where it is worse in the paper. Where no paired counts exist the accuracies are taken as
    independent, and the interval says so.
    """
    index = index_of(rows)
    paper = published.main_results(paper_dir), published.empirical_study(paper_dir)
    found = [
        _one(index, paper, domain, dataset, baseline)
        for domain in domains_of(rows)
        for dataset in columns_of(domain)
        for baseline in published.LABELS
        if baseline != METHOD
    ]
    for family in (AVERAGES, SINGLE):
        places = [i for i, one in enumerate(found) if one.family == family and one.p is not None]
        for place, adjusted in zip(places, holm([found[i].p for i in places]), strict=True):
            found[place] = replace(found[place], adjusted=adjusted)
    return found


def _one(index, paper, domain: Domain, dataset: str, baseline: str) -> Comparison:
    part = domain.only(dataset)
    family = AVERAGES if dataset == columns_of(domain)[-1] else SINGLE
    effect = paper_effect(paper, METHOD, baseline, part)
    interval = compare(index, METHOD, baseline, part, unpaired=True)
    one = Comparison(domain.name, dataset, baseline, family, interval, effect)
    if interval is None:
        lacking = METHOD if not _measured(index, METHOD, part) else baseline
        return replace(one, missing=f"{lacking}: {reason(index, lacking, dataset, domain)}")
    turned, bar = interval, effect
    if effect is not None and effect < 0:  # the paper has it the other way round
        turned, bar = interval.flipped(), -effect
    verdict, _ = judge(turned, "above", bar)
    return replace(one, verdict=verdict, p=deciding_p(verdict, *p_values(turned, "above", bar)))


def _measured(index, method: str, domain: Domain) -> bool:
    names = set(domain.datasets)
    return names <= {k[2] for k in index if k[1] == method and k[3] == domain.metric}


def row_comparisons(rows: Sequence[Measurement], paper_dir: str | Path | None = None) -> Table:
    """`comparisons.csv` and `.md`: effects in fractions and points, verdicts before and after."""
    found = compare_rows(rows, paper_dir)
    measured = [one for one in found if one.interval is not None]
    sizes = {
        family: sum(one.family == family and one.p is not None for one in found)
        for family in (AVERAGES, SINGLE)
    }
    return Table(
        "comparisons",
        "ALLO against every other row of the main tables, points",
        f"{how(rows)} Difference: ALLO minus the row, with the bootstrap's 95% interval over "
        "problems (and seeds, where there are several). Verdict: whether the paper's sign holds, "
        "by the rule of the claims; p is the level at which the interval would just fail to give "
        "it. Corrected by Holm's method in two families over all domains: the "
        f"{sizes[AVERAGES]} comparisons on averages (or on a domain's only data set), and the "
        f"{sizes[SINGLE]} on single data sets. Beside data sets that the paper does not have "
        "stands its mean over its eight question and maths sets. Rows that were not run: "
        "comparisons.csv says why.",
        [_record(one) for one in found],
        ["domain", "data set", "against", "difference", "95% interval", "paper", "p", "p, Holm",
         "verdict", "after Holm"],
        [_line(one) for one in measured],
    )  # fmt: skip


def _record(one: Comparison) -> dict:
    interval = one.interval
    return {
        "domain": one.domain,
        "dataset": one.dataset,
        "method": METHOD,
        "baseline": one.baseline,
        "effect": interval and interval.effect,
        "ci_low": interval and interval.low,
        "ci_high": interval and interval.high,
        "published": one.paper,
        "family": one.family,
        "p": one.p,
        "p_holm": one.adjusted,
        "verdict": one.verdict if interval else "",
        "verdict_holm": one.verdict_after if interval else "",
        "interval": interval.kind if interval else "",
        "seeds": " ".join(map(str, interval.seeds)) if interval else "",
        "n": interval.n if interval else "",
        "reason": one.missing,
    }


def _line(one: Comparison) -> list[str]:
    paper = "" if one.paper is None else f"{100 * one.paper:+z.2f}"
    return [one.domain, one.dataset, published.LABELS[one.baseline], *change_text(one.interval),
            paper, p_text(one.p), p_text(one.adjusted), one.verdict, one.verdict_after]  # fmt: skip


def p_text(p: float | None) -> str:
    """A p-value with three decimals; those below a thousandth as such."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def claims_table(claims: Sequence[Claim]) -> Table:
    """`claims_holm.csv` and `.md`: which verdicts of `claims.csv` survive Holm's correction."""
    left = corrected(claims)
    family = sum(adjusted is not None for adjusted, _ in left)
    records, body = [], []
    for claim, (adjusted, verdict) in zip(claims, left, strict=True):
        records.append({"id": claim.id, "verdict": claim.verdict, "p": claim.p,
                        "p_holm": adjusted, "verdict_holm": verdict})  # fmt: skip
        if claim.effect is not None:
            body.append([claim.id, claim.verdict, p_text(claim.p), p_text(adjusted), verdict])
    return Table(
        "claims_holm",
        "The claims, corrected for one another",
        f"Holm's method over the {family} claims of claims.csv that have an interval. p is the "
        "level at which the interval would just fail to give the verdict; of a claim of k parts "
        "the largest p of its parts where all must hold, and k times the smallest where one that "
        "fails is enough. Claims that were not measured are left out. A verdict without a p rests "
        "on no interval.",
        records,
        ["claim", "verdict", "p", "p, Holm", "after Holm"],
        body,
    )
