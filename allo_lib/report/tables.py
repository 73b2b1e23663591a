"""The paper's tables, measured beside published, built from outcomes and measurements alone.

CSV files hold fractions and one row a cell; Markdown files hold per cent as the paper prints them,
with the best of a column in bold and the second best underlined. An empty cell has its reason, as
far as the results themselves can tell.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.claims import effect_text
from allo_lib.evaluation.comparisons import (
    NOBODY,
    WIN,
    Domain,
    StudyResults,
    judged_by,
    paper_effect,
    was_judged,
)
from allo_lib.evaluation.outcomes import AVERAGE, REWARD, plain, replace_file, write_csv
from allo_lib.evaluation.published import LABELS, method_label
from allo_lib.evaluation.stats import Interval
from allo_lib.evaluation.verdicts import RULE, Claim, corrected_together, p_values

METHOD = "allo"
# Methods that preference pairs of people leave no room for.
_NO_VERIFIER = "needs a verifier of answers as its reward, and pairs of people have none"
_PAIRS = {
    "sft_base": "the starting model is the reference itself and gives every pair the margin 0",
    "rft": "nothing is sampled where people gave the pairs, so it would be SFT",
    "ppo": _NO_VERIFIER,
    "a2c": _NO_VERIFIER,
}
_ON_POLICY = (
    " PPO and A2C are measured with a linear critic on the policy's hidden states and the verifier "
    "as reward (`on_policy`); the paper tells no settings of its own."
)
# The two families of comparisons: what a reader takes home, and what stands behind it.
AVERAGES, SINGLE = "averages", "single data sets"
FEWER = "†"  # behind a score on fewer SFT models than other rows have
_NOTHING = Interval(math.nan, math.nan, math.nan, "", (), 0)  # of a cell that was not measured


@dataclass(frozen=True)
class Table:
    """A table in both forms: `records` for the CSV, `header` and `body` (text) for Markdown."""

    name: str
    title: str
    caption: str
    header: Sequence[str]
    records: Sequence[dict[str, object]]
    body: Sequence[Sequence[str]]


def build(results: StudyResults) -> list[Table]:
    """Every table that the results allow, for each domain they have, and ALLO against every row."""
    makers = (main_table, empirical_table, ablation_table, comparison_table)
    tables = [make(results.on(domain), domain) for domain, make in product(results.domains, makers)]
    return [table for table in (*tables, row_comparisons(results)) if table.body]


def write(tables: Iterable[Table], folder: str | Path) -> list[Path]:
    """Write `name`.csv and `name`.md of each table, LF ends; returns their paths."""
    paths = []
    for table in tables:
        path = Path(folder) / f"{table.name}.csv"
        cells = ([plain(cell) for cell in record.values()] for record in table.records)
        write_csv(path, table.records[0], cells)
        lines = [table.header, ["---"] * len(table.header), *table.body]
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = f"# {table.title}\n\n{grid}\n\n{table.caption}\n"
        replace_file(path.with_suffix(".md"), text.encode("utf-8"))
        paths += [path, path.with_suffix(".md")]
    return paths


# --- cells ---------------------------------------------------------------------------------------


def rank(column: Sequence[str]) -> list[str]:
    """Text cells with the best number in bold and the second best underlined, ties alike.

    A cell counts by its leading number; cells without one, or with FEWER, are left alone.
    """
    found = [re.match(rf"\d+\.\d+(?!.*{FEWER})", cell) for cell in column]
    numbers = [float(number[0]) if number else None for number in found]
    best = sorted({number for number in numbers if number is not None}, reverse=True)[:2]
    forms = dict(zip(best, ("**{}**", "<u>{}</u>"), strict=False))
    return [forms.get(n, "{}").format(cell) for n, cell in zip(numbers, column, strict=True)]


def change_text(change: Interval | None) -> list[str]:
    """A difference and its interval in points."""
    if change is None:
        return ["", ""]
    effect, low, high = (100 * part for part in (change.effect, change.low, change.high))
    return [f"{effect:+z.2f}", f"[{low:+z.2f}, {high:+z.2f}]" if change.defined else ""]


def _score_text(cell: Interval, most: int) -> tuple[str, str]:
    """Per cent with its standard error, and the interval; empty where there is none.

    most: SFT models of the rows beside it; a score on fewer of them is marked.
    """
    error = "" if math.isnan(cell.stderr) else f" ± {100 * cell.stderr:.1f}"
    ends = f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]" if cell.defined else ""
    return f"{100 * cell.effect:.1f}{error}{f' {FEWER}' * (len(cell.seeds) < most)}", ends


def _most(cells: Iterable[Interval | None]) -> int:
    """How many SFT models the cell of the most has."""
    return max((len(cell.seeds) for cell in cells if cell), default=0)


def _p_text(p: float | None) -> str:
    """A p-value with three decimals; those below a thousandth as such."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _ends(cell: Interval | None, *names: str) -> dict[str, object]:
    """Effect and interval under these names."""
    cell = cell or _NOTHING
    return dict(zip(names, (cell.effect, cell.low, cell.high), strict=True))


def _source(cell: Interval | None) -> dict[str, object]:
    """What an effect rests on."""
    cell = cell or _NOTHING
    return {"seeds": " ".join(map(str, cell.seeds)), "n": cell.n or ""}


def _score(domain: Domain, method: str, dataset: str, cell: Interval | None) -> dict[str, object]:
    """One row of a CSV of scores: fractions, empty where nothing was measured."""
    cell = cell or _NOTHING
    place = {"domain": domain.name, "method": method, "dataset": dataset, "metric": domain.metric}
    ends = {"stderr": cell.stderr, "ci_low": cell.low, "ci_high": cell.high}
    return place | {"value": cell.effect} | ends | {"seed_sd": cell.seed_sd} | _source(cell)


def _ps(claim: Claim) -> dict[str, float | None]:
    before = (claim.p.sign, claim.p.small) if claim.p else (None, None)
    return {"p": before[0], "p_holm": claim.sign, "p_size": before[1], "p_size_holm": claim.small}


def split(rows: Sequence[tuple[dict, list[str]]]) -> tuple[list[dict], list[list[str]]]:
    """Records, and the texts of those that have any."""
    return [record for record, _ in rows], [texts for _, texts in rows if texts]


def how(results: StudyResults, cells: Iterable[Interval | None]) -> str:
    """How the numbers of a table, which are in `cells`, came about, for its caption."""
    known = [cell for cell in cells if cell]
    models = sorted({seed for cell in known for seed in cell.seeds}) or results.seeds
    seeds, late = (", ".join(map(str, some)) for some in (models, results.left_out))
    more = (
        f" Not counted, beyond the number of models fixed beforehand: seeds {late}." if late else ""
    )
    if few := sorted({cell.seeds for cell in known if len(cell.seeds) < _most(known)}):
        alone = "; ".join(", ".join(map(str, some)) for some in few)
        more += f" {FEWER}: of seeds {alone} alone, so that it compares with no other row."
    if len(models) > 1:
        return (
            f"Means over the SFT models of seeds {seeds} (of each over its replicates) ± standard "
            "error over them, or of their problems where that is larger; intervals: Student's t "
            f"over SFT models, cut at 0 and 100%.{more}"
        )
    return (
        f"One SFT model (seed {seeds}), which decides nothing: ± standard error over problems; "
        f"normal intervals.{more}"
    )


# --- the main table ------------------------------------------------------------------------------


def main_table(results: StudyResults, domain: Domain) -> Table:
    """Twelve methods on the domain's data sets and their mean, each beside the paper's number.

    It has no body where nothing was measured, unless methods replied and only a judge is missing.
    """
    beside, last = published.beside(domain.datasets), domain.columns[-1]
    alone = [name for name in beside if name not in domain.columns]
    cells = {(method, name): results.score(method, domain.only(name))
             for method, name in product(LABELS, domain.columns)}  # fmt: skip
    records, letters, most = [], {}, _most(cells.values())
    maths = {*published.MATHS, "math_avg"}  # of which the paper prints one decimal
    maths |= {AVERAGE} if set(domain.datasets) == set(published.MATHS) else set()
    columns: dict[str, list[str]] = {"method": list(LABELS.values())}
    for method, name in product(LABELS, (*domain.columns, *alone)):
        cell, why = cells.get((method, name)), ""
        if name not in alone:
            why = "" if cell else reason(results, method, name, domain)
            letter = letters.setdefault(why, chr(ord("a") + len(letters))) if why else ""
            text, ends = _score_text(cell, most) if cell else (f"({letter})", "")
            columns.setdefault(f"{name} (measured)", []).append(text)
            if name == last:
                columns.setdefault(f"{name}: 95% interval", []).append(ends)
        if name in beside:
            digits = 1 if name in maths else 2
            heading = published.AVERAGES[name] if name in alone else f"{name} (paper)"
            columns.setdefault(heading, []).append(f"{100 * beside[name][method]:.{digits}f}")
        paper = {"published": beside.get(name, {}).get(method), "reason": why}
        records.append(_score(domain, method, name, cell) | paper)
    unranked = ("method", f"{last}: 95% interval")
    ranked = [texts if name in unranked else rank(texts) for name, texts in columns.items()]
    shown = zip(*ranked, strict=True) if most or domain.prefix == WIN else ()
    reasons = "; ".join(f"({letter}) {why}" for why, letter in letters.items())
    return Table(
        f"main_{domain.name}",
        f"All methods, {domain.name}: {domain.unit}, %",
        f"{how(results, cells.values())} Bold: best of a column; underlined: second best. The "
        f"paper publishes no intervals.{judged_by(results.index, domain)}"
        f"{_ON_POLICY if results.methods & {'ppo', 'a2c'} else ''}"
        f"{f' Cells without a number were not run: {reasons}.' if reasons else ''}",
        list(columns),
        records,
        [list(line) for line in shown],
    )


def reason(results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
    """Why `method` has no score on a data set of the domain (or on `average`), in words."""
    if domain.prefix == REWARD and method in _PAIRS:
        return _PAIRS[method]
    here = results.datasets_of(method, domain)
    replied = any(key[1] == method and key[2] in domain.datasets for key in results.index)
    if domain.prefix == WIN and replied and not was_judged(results.index, domain):
        return NOBODY
    if not here:
        elsewhere = method in results.methods
        return "run on other domains only" if elsewhere else "not among the methods of this run"
    if dataset == AVERAGE and here == list(domain.datasets):
        return "no seed has it on all data sets"
    return f"run on {', '.join(here)} only"


# --- the other tables of a domain ----------------------------------------------------------------


def _scores(results: StudyResults, domain: Domain, methods: Iterable[str]) -> dict[str, Interval]:
    """The scores of those methods that have one."""
    return {name: cell for name in methods if (cell := results.score(name, domain))}


def empirical_table(results: StudyResults, domain: Domain) -> Table:
    """DPO on the top, last and random 10% and on all neurons, under both protocols."""
    paper, name, rows = published.empirical_study(), domain.columns[-1], []
    sets, ends = list(paper["dpo"]), ("_top10", "_last10", "_random10", "")
    names = [f"dpo{part}{end}" for end, part in product(("", "_long", "_paper"), ends)]
    cells = _scores(results, domain, names)
    for method, cell in cells.items():
        loss = results.metric(method, "train_loss", domain.name)
        own = paper.get(method.removesuffix("_paper"), {})
        record = _score(domain, method, name, cell)
        record |= _ends(loss, "train_loss", "train_loss_ci_low", "train_loss_ci_high")
        record |= {f"paper_{dataset}": own.get(dataset) for dataset in sets}
        texts = [method_label(method), *_score_text(cell, _most(cells.values()))]
        texts.append(f"{loss.effect:.4f}" if loss else "")
        rows.append((record, texts + [f"{100 * own[s]:.1f}" if own else "" for s in sets]))
    return Table(
        f"empirical_{domain.name}",
        f"Which neurons DPO may change, {domain.name}: {domain.unit}, %",
        f"{how(results, cells.values())} Each method is tuned by itself; 'long' and 'as "
        "long as both stages': with as many updates as ALLO; 'one rate': the paper's protocol. "
        "Training loss: mean of the last quarter of the steps, at each row's own beta, so that "
        "losses compare among the rows of one rate alone.",
        ["neurons", f"{name} (measured)", "95% interval", "training loss",
         *[f"{dataset} (paper)" for dataset in sets]],
        *split(rows),
    )  # fmt: skip


def ablation_table(results: StudyResults, domain: Domain) -> Table:
    """ALLO with one thing changed, the official code's variants, and its controls, each with its
    paired difference to ALLO."""
    name, rows = domain.columns[-1], []
    changed = sorted(method for method in results.methods if method.startswith("allo_"))
    methods = [METHOD, "dpo", "dpo_long", *changed] if METHOD in results.methods else []
    cells = _scores(results, domain, methods)
    for method, cell in cells.items():
        change = None if method == METHOD else results.compare(method, METHOD, domain)
        record = _score(domain, method, name, cell)
        record |= _ends(change, "change_to_allo", "change_ci_low", "change_ci_high")
        record["interval"] = change.kind if change else ""
        score, _ = _score_text(cell, _most(cells.values()))
        rows.append((record, [method_label(method), score, *change_text(change)]))
    return Table(
        f"ablations_{domain.name}",
        f"ALLO with one thing changed, {domain.name}: {domain.unit}, %",
        f"{how(results, cells.values())} Change: paired difference to ALLO on the same problems, "
        "in the runs that both have, in points; interval: over SFT models (of one, its problems).",
        ["variant", f"{name} (measured)", "change to ALLO", "95% interval"],
        *split(rows),
    )


def comparison_table(results: StudyResults, domain: Domain) -> Table:
    """Every method against DPO, and against a DPO of as many updates as ALLO."""
    rows, every = [], []
    for method, baseline in product(sorted(results.methods), ("dpo", "dpo_long")):
        found = results.compare(method, baseline, domain) if method != baseline else None
        if found is not None:
            every.append(found)
            record = {"domain": domain.name, "method": method, "baseline": baseline}
            record |= _ends(found, "effect", "ci_low", "ci_high") | {"interval": found.kind}
            texts = [f"`{method}`", f"`{baseline}`", *change_text(found)]
            rows.append((record | _source(found), texts))
    return Table(
        f"comparisons_{domain.name}",
        f"Paired differences, {domain.name}: {domain.unit}, points",
        f"{how(results, every)} Differences on the same problems, in the runs that "
        "both have, with t intervals over SFT models (of one, over its problems); no verdicts, as "
        "they are not corrected for many comparisons (the table `comparisons` has ALLO against the "
        "rows of the main tables, corrected).",
        ["method", "baseline", "difference", "95% interval"],
        *split(rows),
    )


# --- ALLO against every other row of the main tables ---------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """METHOD minus `baseline` on one data set, or on the average of a domain.

    `claim` holds the verdict on "METHOD is above the row" with its p-values and the paper's effect;
    `missing` says why nothing was measured.
    """

    domain: str
    dataset: str
    baseline: str
    family: str
    interval: Interval | None
    claim: Claim
    missing: str


def compare_rows(results: StudyResults) -> list[Comparison]:
    """Every comparison of METHOD with a row of the main tables, each family corrected by Holm."""
    found, others = [], [name for name in LABELS if name != METHOD]
    for domain in results.domains:
        here = results.on(domain)
        for dataset, baseline in product(domain.columns, others):
            part, missing = domain.only(dataset), ""
            interval = here.compare(METHOD, baseline, part)
            if interval is None:
                whole = here.datasets_of(METHOD, part) == list(part.datasets)
                lacking = baseline if whole else METHOD
                missing = f"{lacking}: {reason(here, lacking, dataset, domain)}"
            family = AVERAGES if dataset == domain.columns[-1] else SINGLE
            claim = Claim(
                f"{domain.name} {dataset} {baseline}", "", unit=domain.unit,
                **_ends(interval, "effect", "ci_low", "ci_high"),
                p=p_values(interval, domain.unit, models=here.models),
                paper=paper_effect(METHOD, baseline, part),
            )  # fmt: skip
            own = domain.name, dataset, baseline, family, interval, claim, missing
            found.append(Comparison(*own))
    decided = {}
    for family in (AVERAGES, SINGLE):
        claims = corrected_together([one.claim for one in found if one.family == family])
        decided |= {claim.id: claim for claim in claims}
    return [replace(one, claim=decided[one.claim.id]) for one in found]


def row_comparisons(results: StudyResults) -> Table:
    """`comparisons.csv` and `.md`: effects in fractions and points, verdicts before and after."""
    found, rows = compare_rows(results), []
    way = how(results, [one.interval for one in found]).partition(f" {FEWER}:")[0]
    sizes = [sum(one.family == family and one.claim.p is not None for one in found)
             for family in (AVERAGES, SINGLE)]  # fmt: skip
    for one in found:
        claim, interval, texts = one.claim, one.interval, []
        record = {
            "domain": one.domain, "dataset": one.dataset, "method": METHOD,
            "baseline": one.baseline, **_ends(interval, "effect", "ci_low", "ci_high"),
            "published": claim.paper, "family": one.family, **_ps(claim),
            "verdict": claim.verdict if interval else "",
            "tags": "; ".join(claim.tags), "interval": interval.kind if interval else "",
            **_source(interval), "reason": one.missing,
        }  # fmt: skip
        if interval:
            paper = "" if claim.paper is None else f"{100 * claim.paper:+z.2f}"
            texts = [one.domain, one.dataset, LABELS[one.baseline], *change_text(interval), paper,
                     _p_text(claim.sign), _p_text(claim.small), claim.in_words]  # fmt: skip
        rows.append((record, texts))
    return Table(
        "comparisons",
        "ALLO against every other row of the main tables, points",
        f"{way} Difference: ALLO minus the row, with its 95% interval over the SFT models that "
        "both have (of one model, over its problems). p: two-sided, that it is none; p size: that "
        "it is a point or more. Verdict: on ALLO being above the row, by the rule of the claims, "
        f"corrected by Holm's method in two families over all domains: the {sizes[0]} comparisons "
        f"on averages (or on a domain's only data set), and the {sizes[1]} on single data sets. "
        "Beside data sets that the paper does not have stands its mean over its eight question and "
        "maths sets. Rows that were not run: comparisons.csv says why.",
        ["domain", "data set", "against", "difference", "95% interval", "paper", "p, Holm",
         "p size, Holm", "verdict"],
        *split(rows),
    )  # fmt: skip


def claims_table(claims: Sequence[Claim]) -> Table:
    """`verdicts.csv` and `.md`: the p-values behind the verdicts, before and after correction."""
    rows = []
    for claim in claims:
        ps = _ps(claim)
        record = {"id": claim.id, "family": claim.family, **ps, "published": claim.paper,
                  "verdict": claim.verdict, "tags": "; ".join(claim.tags)}  # fmt: skip
        texts = [claim.id, claim.family, *map(_p_text, ps.values()), claim.in_words]
        rows.append((record, texts if claim.p else []))
    return Table(
        "verdicts",
        "The verdicts and the p-values behind them",
        f"{RULE} p: two-sided, that the effect (of C3 above minus its margin) is none; p size: "
        "that it is a point or more; each before and after Holm's method. Claims that were not "
        "measured, or on fewer SFT models than were fixed beforehand, are left out, and so are "
        "verdicts that rest on no p.",
        ["id", "family", "p", "p, Holm", "p size", "p size, Holm", "verdict"],
        *split(rows),
    )


def architectures_table(groups: Mapping[str, Sequence[Claim]]) -> Table:
    """`architectures.csv` and `.md`: the effects on the models of each (`by_architecture`)."""
    rows = []
    for name, claims in groups.items():
        for claim in claims:
            ends = {"ci_low": claim.ci_low, "ci_high": claim.ci_high}
            record = {"architecture": name, "id": claim.id, "effect": claim.effect, **ends}
            texts = [name, claim.id, claim.claim, *effect_text(claim)]
            rows.append((record, texts if claim.ci_low is not None else []))
    return Table(
        "architectures",
        "The claims on each architecture",
        "Effects with 95% intervals over the SFT models of an architecture, those of one claim's "
        "parts held together; not corrected for their number, so that they have no verdicts.",
        ["architecture", "id", "claim", "effect", "95% interval"],
        *split(rows),
    )
