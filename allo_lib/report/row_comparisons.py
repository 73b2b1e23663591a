"""ALLO against every other row of the main tables, and the p-values behind the claims."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import Domain, StudyResults, columns_of, paper_effect
from allo_lib.evaluation.stats import Interval, holm
from allo_lib.evaluation.verdicts import RULE, UNDECIDED, Claim, PValues, decide, p_values, tags_of
from allo_lib.report.main_table import reason
from allo_lib.report.table_cells import Table, change_text, how

METHOD = "allo"
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
    sign: float | None = None
    small: float | None = None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """On "METHOD is above the row", by the rule of `verdicts`."""
        return UNDECIDED if self.p is None else decide(self.p, self.sign, self.small)

    @property
    def tags(self) -> list[str]:
        if self.p is None:
            return []
        ends = self.interval.low, self.interval.high
        return tags_of(self.verdict, self.small, self.paper, *ends)


def compare_rows(results: StudyResults, paper_dir: str | Path | None = None) -> list[Comparison]:
    """Every comparison of METHOD with a row of the main tables, each family corrected by Holm."""
    paper = published.main_results(paper_dir), published.empirical_study(paper_dir)
    found = [
        _one(results, paper, domain, dataset, baseline)
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


def _one(results: StudyResults, paper, domain: Domain, dataset: str, baseline: str) -> Comparison:
    part = domain.only(dataset)
    family = AVERAGES if dataset == columns_of(domain)[-1] else SINGLE
    effect = paper_effect(paper, METHOD, baseline, part)
    interval = results.compare(METHOD, baseline, part)
    p = p_values(interval, domain.unit, models=results.models)
    one = Comparison(domain.name, dataset, baseline, family, interval, effect, p)
    if interval is None:
        whole = results.datasets_of(METHOD, part) == list(part.datasets)
        lacking = baseline if whole else METHOD
        return replace(one, missing=f"{lacking}: {reason(results, lacking, dataset, domain)}")
    return one


def row_comparisons(results: StudyResults, paper_dir: str | Path | None = None) -> Table:
    """`comparisons.csv` and `.md`: effects in fractions and points, verdicts before and after."""
    found = compare_rows(results, paper_dir)
    measured = [one for one in found if one.interval is not None]
    sizes = {
        family: sum(one.family == family and one.p is not None for one in found)
        for family in (AVERAGES, SINGLE)
    }
    return Table(
        "comparisons",
        "ALLO against every other row of the main tables, points",
        f"{how(results)} Difference: ALLO minus the row, with its 95% interval over SFT models (of "
        "one model, over its problems). p: two-sided, that it is none; p size: that it is a point "
        "or more. Verdict: on ALLO being above the row, by the rule of the claims, corrected "
        f"by Holm's method in two families over all domains: the {sizes[AVERAGES]} comparisons on "
        f"averages (or on a domain's only data set), and the {sizes[SINGLE]} on single data sets. "
        "Beside data sets that the paper does not have stands its mean over its eight question and "
        "maths sets. Rows that were not run: comparisons.csv says why.",
        [_record(one) for one in found],
        ["domain", "data set", "against", "difference", "95% interval", "paper", "p, Holm",
         "p size, Holm", "verdict"],
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
        "p": one.p and one.p.sign,
        "p_holm": one.sign,
        "p_size": one.p and one.p.small,
        "p_size_holm": one.small,
        "verdict": one.verdict if interval else "",
        "tags": "; ".join(one.tags),
        "interval": interval.kind if interval else "",
        "seeds": " ".join(map(str, interval.seeds)) if interval else "",
        "n": interval.n if interval else "",
        "reason": one.missing,
    }


def _line(one: Comparison) -> list[str]:
    paper = "" if one.paper is None else f"{100 * one.paper:+z.2f}"
    words = with_tags(one.verdict, one.tags)
    return [one.domain, one.dataset, published.LABELS[one.baseline], *change_text(one.interval),
            paper, p_text(one.sign), p_text(one.small), words]  # fmt: skip


def p_text(p: float | None) -> str:
    """A p-value with three decimals; those below a thousandth as such."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def with_tags(verdict: str, tags: Sequence[str]) -> str:
    """A verdict and its tags in words."""
    return f"{verdict} ({'; '.join(tags)})" if tags else verdict


def claims_table(claims: Sequence[Claim]) -> Table:
    """`verdicts.csv` and `.md`: the p-values behind the verdicts, before and after correction."""
    records, body = [], []
    for claim in claims:
        p = claim.p
        records.append({"id": claim.id, "family": claim.family, "p": p and p.sign,
                        "p_holm": claim.sign, "p_size": p and p.small,
                        "p_size_holm": claim.small, "published": claim.paper,
                        "verdict": claim.verdict, "tags": "; ".join(claim.tags)})  # fmt: skip
        if p is not None:
            numbers = (p.sign, claim.sign, p.small, claim.small)
            body.append([claim.id, claim.family, *map(p_text, numbers),
                         with_tags(claim.verdict, claim.tags)])  # fmt: skip
    return Table(
        "verdicts",
        "The verdicts and the p-values behind them",
        f"{RULE} p: two-sided, that the effect (of C3 above minus its margin) is none; p size: "
        "that it is a point or more; each before and after Holm's method. Claims that were not "
        "measured, or on fewer SFT models than were fixed beforehand, are left out, and so are "
        "verdicts that rest on no p.",
        records,
        ["id", "family", "p", "p, Holm", "p size", "p size, Holm", "verdict"],
        body,
    )
