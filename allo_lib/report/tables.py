"""The paper's tables, measured beside published, built from outcomes and measurements alone.

CSV files hold fractions and one row a cell; Markdown files hold per cent as the paper prints them,
with the best of a column in bold and the second best underlined. An empty cell has its reason, as
far as the results themselves can tell.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.ablations import single_changes
from allo_lib.evaluation.comparisons import (
    NOBODY,
    WIN,
    Domain,
    StudyResults,
    columns_of,
    judged_by,
    was_judged,
)
from allo_lib.evaluation.outcomes import AVERAGE, REWARD
from allo_lib.evaluation.stats import Interval

# What stands beside data sets that the paper does not have.
PAPER_AVERAGES = {
    "qa_avg": "paper, 4 question sets",
    "math_avg": "paper, 4 maths sets",
    "instructions_avg": "paper, 2 instruction sets",
}
_PRINTED = {
    frozenset(published.QUESTIONS): "qa_avg",
    frozenset(published.MATHS): "math_avg",
    frozenset(published.INSTRUCTIONS): "instructions_avg",
}
# Methods that preference pairs of people leave no room for.
_PAIRS = {
    "sft_base": "the starting model is the reference itself and gives every pair the margin 0",
    "rft": "nothing is sampled where people gave the pairs, so it would be SFT",
    "ppo": "needs a verifier of answers as its reward, and pairs of people have none",
    "a2c": "needs a verifier of answers as its reward, and pairs of people have none",
}
_ON_POLICY = (
    " PPO and A2C are measured with a linear critic on the policy's hidden states and the verifier "
    "as reward (`on_policy`); the paper tells no settings of its own."
)
METHOD = "allo"


@dataclass(frozen=True)
class Table:
    """A table in both forms: `records` for the CSV, `header` and `body` (text) for Markdown."""

    name: str
    title: str
    caption: str
    records: list[dict[str, object]]
    header: list[str]
    body: list[list[str]]


def build(results: StudyResults, paper_dir: str | Path | None = None) -> list[Table]:
    """Every table that the results allow, for each domain they have."""
    tables = []
    for domain in results.domains:
        tables += [
            main_table(results, domain, paper_dir),
            empirical_table(results, domain, paper_dir),
            ablation_table(results, domain),
            comparison_table(results, domain),
        ]
    return [table for table in tables if table.body]


def write(tables: Sequence[Table], folder: str | Path) -> list[Path]:
    """Write `name`.csv and `name`.md of each table, LF ends; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(table.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: plain(cell) for key, cell in row.items()} for row in table.records)
        for suffix, text in ((".csv", buffer.getvalue()), (".md", markdown(table))):
            paths.append(folder / f"{table.name}{suffix}")
            paths[-1].write_bytes(text.encode("utf-8"))
    return paths


def markdown(table: Table) -> str:
    """The table with its title and caption as Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.body]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {table.title}\n\n{grid}\n\n{table.caption}\n"


# --- cells ---------------------------------------------------------------------------------------


def rank(column: Sequence[str]) -> list[str]:
    """Text cells with the best number in bold and the second best underlined, ties alike.

    A cell counts by its leading number; cells without one are left alone.
    """
    numbers = [_leading(cell) for cell in column]
    best = sorted({number for number in numbers if number is not None}, reverse=True)[:2]
    forms = dict(zip(best, ("**{}**", "<u>{}</u>"), strict=False))
    return [
        forms.get(number, "{}").format(cell) for number, cell in zip(numbers, column, strict=True)
    ]


def _leading(cell: str) -> float | None:
    try:
        return float(cell.split(" ")[0])
    except ValueError:
        return None


def plain(cell: object) -> object:
    """Numbers with six decimals; nothing and NaN as an empty cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:z.6f}" if isinstance(cell, float) else cell


def change_text(change: Interval | None) -> list[str]:
    """A difference and its interval in points."""
    if change is None:
        return ["", ""]
    effect, low, high = (100 * part for part in (change.effect, change.low, change.high))
    return [f"{effect:+z.2f}", f"[{low:+z.2f}, {high:+z.2f}]" if change.defined else ""]


def _percent(cell: Interval | None, missing: str = "") -> str:
    """Per cent with its standard error; `missing` where nothing was measured."""
    if cell is None:
        return missing
    error = "" if math.isnan(cell.stderr) else f" ± {100 * cell.stderr:.1f}"
    return f"{100 * cell.effect:.1f}{error}"


def _ends(cell: Interval | None) -> str:
    """The interval in per cent; empty where there is none."""
    if cell is None or not cell.defined:
        return ""
    return f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def seeds_of(cell: Interval | None) -> str:
    """The seeds of an interval, for a CSV."""
    return " ".join(map(str, cell.seeds)) if cell else ""


def _score(domain: Domain, method: str, dataset: str, cell: Interval | None) -> dict:
    """One row of a CSV of scores: fractions, empty where nothing was measured."""
    return {
        "domain": domain.name,
        "method": method,
        "dataset": dataset,
        "metric": domain.metric,
        "value": cell and cell.effect,
        "stderr": cell and cell.stderr,
        "ci_low": cell and cell.low,
        "ci_high": cell and cell.high,
        "seed_sd": cell and cell.seed_sd,
        "seeds": seeds_of(cell),
        "n": cell.n if cell else "",
    }


def how(results: StudyResults) -> str:
    """How the numbers of a table came about, for its caption."""
    seeds, late = (", ".join(map(str, some)) for some in (results.seeds, results.left_out))
    beyond = (
        f" Not counted, beyond the number of models fixed beforehand: seeds {late}." if late else ""
    )
    if len(results.seeds) > 1:
        return (
            f"Means over the SFT models of seeds {seeds} (of each over its replicates) ± standard "
            "error over them, or of their problems where that is larger; intervals: Student's t "
            f"over SFT models, cut at 0 and 100%.{beyond}"
        )
    return (
        f"One SFT model (seed {seeds}), which decides nothing: ± standard error over problems; "
        f"normal intervals.{beyond}"
    )


# --- the main table ------------------------------------------------------------------------------


def main_table(results: StudyResults, domain: Domain, paper_dir: str | Path | None = None) -> Table:
    """Twelve methods on the domain's data sets and their mean, each beside the paper's number.

    It has no body where nothing was measured, unless methods replied and only a judge is missing.
    """
    sets = columns_of(domain)
    beside = published_columns(published.main_results(paper_dir), domain)
    alone = [name for name in beside if name not in sets]
    cells = {
        (m, name): results.score(m, domain.only(name)) for m in published.LABELS for name in sets
    }
    records, missing, letters = [], {}, {}
    for method in published.LABELS:
        for name in sets:
            cell, why = cells[method, name], ""
            if cell is None:
                why = reason(results, method, name, domain)
                letter = letters.setdefault(why, chr(ord("a") + len(letters)))
                missing[method, name] = f"({letter})"
            paper = {"published": beside.get(name, {}).get(method), "reason": why}
            records.append(_score(domain, method, name, cell) | paper)
        for name in alone:
            paper = {"published": beside[name][method], "reason": ""}
            records.append(_score(domain, method, name, None) | paper)
    columns = {"method": list(published.LABELS.values())}
    for name in sets:
        texts = [_percent(cells[m, name], missing.get((m, name), "")) for m in published.LABELS]
        columns[f"{name} (measured)"] = rank(texts)
        if name == sets[-1]:
            columns[f"{name}: 95% interval"] = [_ends(cells[m, name]) for m in published.LABELS]
        if name in beside:
            columns[f"{name} (paper)"] = _paper_column(beside[name], name, domain)
    columns |= {PAPER_AVERAGES[n]: _paper_column(beside[n], n, domain) for n in alone}
    reasons = "; ".join(f"({letter}) {why}" for why, letter in letters.items())
    return Table(
        f"main_{domain.name}",
        f"All methods, {domain.name}: {domain.unit}, %",
        f"{how(results)} Bold: best of a column; underlined: second best. The paper publishes no "
        f"intervals.{judged_by(results.index, domain)}"
        f"{_ON_POLICY if results.methods & {'ppo', 'a2c'} else ''}"
        f"{f' Cells without a number were not run: {reasons}.' if reasons else ''}",
        records,
        list(columns),
        [list(line) for line in zip(*columns.values(), strict=True)]
        if any(cells.values()) or domain.prefix == WIN
        else [],
    )


def published_columns(paper: published.Table, domain: Domain) -> dict[str, dict[str, float]]:
    """The paper's numbers that stand beside a domain: column -> method -> fraction.

    Those of its own data sets, and their mean (as printed, where the paper prints it); where the
    paper has none of them, the paper's averages.
    """
    own = [name for name in domain.datasets if name in paper["dpo"]]
    found = {name: {m: row[name] for m, row in paper.items()} for name in own or PAPER_AVERAGES}
    if own == list(domain.datasets) and len(own) > 1:
        as_printed = _PRINTED.get(frozenset(own))
        found[AVERAGE] = {
            method: row[as_printed] if as_printed else sum(row[name] for name in own) / len(own)
            for method, row in paper.items()
        }
    return found


def _paper_column(values: dict[str, float], name: str, domain: Domain) -> list[str]:
    """Per cent with as many decimals as the paper prints: one for maths, two for the others."""
    maths = set(domain.datasets) == set(published.MATHS) if name == AVERAGE else (
        name in (*published.MATHS, "math_avg")
    )  # fmt: skip
    return rank([f"{100 * values[method]:.{1 if maths else 2}f}" for method in published.LABELS])


def reason(results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
    """Why `method` has no score on a data set of the domain (or on `average`), in words."""
    if domain.prefix == REWARD and method in _PAIRS:
        return _PAIRS[method]
    here = results.datasets_of(method, domain)
    if domain.prefix == WIN and not was_judged(results.index, domain):
        if any(key[1] == method and key[2] in domain.datasets for key in results.index):
            return NOBODY
        here = []
    if not here:
        elsewhere = method in results.methods
        return "run on other domains only" if elsewhere else "not among the methods of this run"
    if dataset == AVERAGE and here == list(domain.datasets):
        return "no seed has it on all data sets"
    return f"run on {', '.join(here)} only"


# --- the other tables of a domain ----------------------------------------------------------------


def empirical_table(
    results: StudyResults, domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """DPO on the top, last and random 10% and on all neurons, under both protocols."""
    paper = published.empirical_study(paper_dir)
    arms = ["dpo_top10", "dpo_last10", "dpo_random10", "dpo"]
    name = columns_of(domain)[-1]
    records, body = [], []
    for suffix, arm in product(("", "_long", "_paper"), arms):
        method = arm + suffix
        cell = results.score(method, domain)
        if cell is None:
            continue
        loss = results.metric_interval(method, "train_loss", domain.name)
        row = paper.get(method.removesuffix("_paper"), {})
        records.append(
            _score(domain, method, name, cell)
            | {
                "train_loss": loss and loss.effect,
                "train_loss_ci_low": loss and loss.low,
                "train_loss_ci_high": loss and loss.high,
            }
            | {f"paper_{dataset}": row.get(dataset) for dataset in paper["dpo"]}
        )
        shown = [_percent(cell), _ends(cell), f"{loss.effect:.4f}" if loss else ""]
        shown += [f"{100 * row[dataset]:.1f}" if row else "" for dataset in paper["dpo"]]
        body.append([published.arm_label(method), *shown])
    header = ["neurons", f"{name} (measured)", "95% interval", "training loss"]
    return Table(
        f"empirical_{domain.name}",
        f"Which neurons DPO may change, {domain.name}: {domain.unit}, %",
        f"{how(results)} Each arm at its own best learning rate; 'long' and 'as long as both "
        "stages': with as many updates as ALLO; 'one rate': the paper's protocol. Training loss: "
        "mean of the last quarter of the steps.",
        records,
        header + [f"{dataset} (paper)" for dataset in paper["dpo"]],
        body,
    )


def ablation_table(results: StudyResults, domain: Domain) -> Table:
    """ALLO with one thing changed, the official code's variants, and its controls, each with its
    paired difference to ALLO."""
    name = columns_of(domain)[-1]
    methods = [METHOD, "dpo", "dpo_long", *sorted(single_changes(results.methods))]
    records, body = [], []
    for method in methods if METHOD in results.methods else []:
        cell = results.score(method, domain)
        if cell is None:
            continue
        change = None if method == METHOD else results.compare(method, METHOD, domain)
        changed = {
            "change_to_allo": change and change.effect,
            "change_ci_low": change and change.low,
            "change_ci_high": change and change.high,
            "interval": change.kind if change else "",
        }
        records.append(_score(domain, method, name, cell) | changed)
        body.append([published.arm_label(method), _percent(cell), *change_text(change)])
    return Table(
        f"ablations_{domain.name}",
        f"ALLO with one thing changed, {domain.name}: {domain.unit}, %",
        f"{how(results)} Change: paired difference to ALLO on the same problems, in points, with "
        "its interval over SFT models (of one model, over its problems).",
        records,
        ["variant", f"{name} (measured)", "change to ALLO", "95% interval"],
        body,
    )


def comparison_table(results: StudyResults, domain: Domain) -> Table:
    """Every method against DPO, and against a DPO of as many updates as ALLO."""
    records, body = [], []
    for method, baseline in product(sorted(results.methods), ("dpo", "dpo_long")):
        found = results.compare(method, baseline, domain) if method != baseline else None
        if found is None:
            continue
        ends = {"effect": found.effect, "ci_low": found.low, "ci_high": found.high}
        made = {"interval": found.kind, "seeds": seeds_of(found), "n": found.n}
        names = {"domain": domain.name, "method": method, "baseline": baseline}
        records.append(names | ends | made)
        body.append([f"`{method}`", f"`{baseline}`", *change_text(found)])
    return Table(
        f"comparisons_{domain.name}",
        f"Paired differences, {domain.name}: {domain.unit}, points",
        f"{how(results)} Differences on the same problems, with t intervals over SFT models (of "
        "one model, over its problems); no verdicts, as they are not corrected for many "
        "comparisons (the table `comparisons` has ALLO against the rows of the main tables, "
        "corrected).",
        records,
        ["method", "baseline", "difference", "95% interval"],
        body,
    )
