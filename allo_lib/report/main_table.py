"""The paper's main tables: every row on every data set, measured and published side by side.

An empty cell has its reason, as far as the results themselves can tell.
"""

from pathlib import Path

from allo_lib.evaluation import published
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
from allo_lib.report.table_cells import Table, ends, how, percent, printed, rank, record_of

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


def main_table(results: StudyResults, domain: Domain, paper_dir: str | Path | None = None) -> Table:
    """Twelve methods on the domain's data sets and their mean, each beside the paper's number.

    It has no body where nothing was measured, unless methods replied and only a judge is missing.
    """
    paper, sets, reasons = published.main_results(paper_dir), columns_of(domain), Reasons()
    beside = published_columns(paper, domain)
    cells = {
        (m, name): results.score(m, domain.only(name)) for m in published.LABELS for name in sets
    }
    records, missing = [], {}
    for method in published.LABELS:
        for name in sets:
            cell = cells[method, name]
            told = record_of(domain, method, name, cell, beside.get(name, {}).get(method))
            why = "" if cell else reasons.of(results, method, name, domain)
            missing[method, name] = reasons.mark(why)
            records.append(told | {"reason": why})
        for name in [name for name in beside if name not in sets]:
            told = record_of(domain, method, name, None, beside[name][method])
            records.append(told | {"reason": ""})
    columns, header = [list(published.LABELS.values())], ["method"]
    for name in sets:
        header.append(f"{name} (measured)")
        texts = [percent(cells[m, name], missing[m, name]) for m in published.LABELS]
        columns.append(rank(texts))
        if name == sets[-1]:
            header.append(f"{name}: 95% interval")
            columns.append([ends(cells[m, name]) for m in published.LABELS])
        if name in beside:
            header.append(f"{name} (paper)")
            columns.append(_paper_column(beside[name], name, domain))
    for name in [name for name in beside if name not in sets]:
        header.append(PAPER_AVERAGES[name])
        columns.append(_paper_column(beside[name], name, domain))
    return Table(
        f"main_{domain.name}",
        f"All methods, {domain.name}: {domain.unit}, %",
        f"{how(results)} Bold: best of a column; underlined: second best. The paper publishes no "
        f"intervals.{judged_by(results.index, domain)}{_on_policy(results)}"
        f"{reasons.text()}",
        records,
        header,
        [list(line) for line in zip(*columns, strict=True)]
        if any(cells.values()) or domain.prefix == WIN
        else [],
    )


def _on_policy(results: StudyResults) -> str:
    if not results.methods & {"ppo", "a2c"}:
        return ""
    return (
        " PPO and A2C are measured with a linear critic on the policy's hidden states and the "
        "verifier as reward (`on_policy`); the paper tells no settings of its own."
    )


def published_columns(paper: published.Table, domain: Domain) -> dict[str, dict[str, float]]:
    """The paper's numbers that stand beside a domain: column -> method -> fraction.

    Those of its own data sets, and their mean (as printed, where the paper prints it); where the
    paper has none of them, the paper's averages.
    """
    own = [name for name in domain.datasets if name in paper["dpo"]]
    if not own:
        return {name: {m: row[name] for m, row in paper.items()} for name in PAPER_AVERAGES}
    found = {name: {m: row[name] for m, row in paper.items()} for name in own}
    if own == list(domain.datasets) and len(own) > 1:
        as_printed = _PRINTED.get(frozenset(own))
        found[AVERAGE] = {
            method: row[as_printed] if as_printed else sum(row[name] for name in own) / len(own)
            for method, row in paper.items()
        }
    return found


def _paper_column(values: dict[str, float], name: str, domain: Domain) -> list[str]:
    maths = name == AVERAGE and set(domain.datasets) == set(published.MATHS)
    name = "math_avg" if maths else name
    return rank([printed(values[method], name) for method in published.LABELS])


def reason(results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
    """Why `method` has no score on a data set of the domain (or on `average`), in words."""
    if domain.prefix == REWARD and method in _PAIRS:
        return _PAIRS[method]
    if domain.prefix == WIN and not was_judged(results.index, domain):
        replied = {key[1] for key in results.index if key[2] in domain.datasets}
        return NOBODY if method in replied else _without_scores(results, method)
    here = results.datasets_of(method, domain)
    if not here:
        return _without_scores(results, method)
    if dataset == AVERAGE and here == list(domain.datasets):
        return "no seed has it on all data sets"
    return f"run on {', '.join(here)} only"


def _without_scores(results: StudyResults, method: str) -> str:
    elsewhere = method in results.methods
    return "run on other domains only" if elsewhere else "not among the methods of this run"


class Reasons:
    """The reasons of one table, each with a letter that its empty cells show."""

    def __init__(self):
        self.letters: dict[str, str] = {}

    def of(self, results: StudyResults, method: str, dataset: str, domain: Domain) -> str:
        """The reason of one cell; it has a letter from now on."""
        told = reason(results, method, dataset, domain)
        self.letters.setdefault(told, chr(ord("a") + len(self.letters)))
        return told

    def mark(self, told: str) -> str:
        """What the cell shows: `(a)`, or nothing without a reason."""
        return f"({self.letters[told]})" if told else ""

    def text(self) -> str:
        """A sentence for the caption; empty where no cell is."""
        if not self.letters:
            return ""
        listed = "; ".join(f"({letter}) {told}" for told, letter in self.letters.items())
        return f" Cells without a number were not run: {listed}."
