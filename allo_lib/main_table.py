"""The paper's main tables: every row on every data set, measured and published side by side."""

from collections.abc import Sequence
from pathlib import Path

from allo_lib import published
from allo_lib.comparisons import WIN, Domain, columns_of, index_of, judged_by
from allo_lib.measurements import AVERAGE, Measurement
from allo_lib.not_run import Reasons
from allo_lib.table_cells import Table, cell_of, ends, how, percent, printed, rank, record_of

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


def main_table(
    rows: Sequence[Measurement], domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """Twelve methods on the domain's data sets and their mean, each beside the paper's number.

    It has no body where nothing was measured, unless methods replied and only a judge is missing.
    """
    index, paper = index_of(rows), published.main_results(paper_dir)
    sets, beside, reasons = columns_of(domain), published_columns(paper, domain), Reasons()
    cells = {(m, d): cell_of(index, m, d, domain) for m in published.LABELS for d in sets}
    records, missing = [], {}
    for method in published.LABELS:
        for name in sets:
            cell = cells[method, name]
            told = record_of(domain, method, name, cell, beside.get(name, {}).get(method))
            why = "" if cell else reasons.of(index, method, name, domain)
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
        f"{how(rows)} Bold: best of a column; underlined: second best. The paper publishes no "
        f"intervals.{judged_by(index, domain)}{_named_for_what_they_are(index)}"
        f"{reasons.text()}",
        records,
        header,
        [list(line) for line in zip(*columns, strict=True)]
        if any(cells.values()) or domain.prefix == WIN
        else [],
    )


def _named_for_what_they_are(index) -> str:
    measured = {method for _, method, *_ in index}
    if not measured & {"ppo", "a2c"}:
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
