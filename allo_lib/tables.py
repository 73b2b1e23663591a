"""The paper's tables, measured beside published, built from `measurements.csv` alone.

CSV files hold fractions and one row a cell; Markdown files hold per cent as the paper prints them,
with the best of a column in bold and the second best underlined.
"""

from collections.abc import Sequence
from pathlib import Path

from allo_lib import published
from allo_lib.ablations import single_changes
from allo_lib.comparisons import (
    Domain,
    columns_of,
    compare,
    domains_of,
    index_of,
    metric_by_seed,
    shared_names,
)
from allo_lib.main_table import main_table
from allo_lib.measurements import GAIN, Measurement
from allo_lib.row_comparisons import row_comparisons
from allo_lib.stats import Interval
from allo_lib.table_cells import (
    Table,
    cell_of,
    change_text,
    ends,
    how,
    markdown,
    method_interval,
    over_seeds,
    percent,
    rank,
    record_of,
    write,
)

__all__ = ["Table", "build", "main_table", "markdown", "method_interval", "rank", "write"]


def build(rows: Sequence[Measurement], paper_dir: str | Path | None = None) -> list[Table]:
    """Every table that the measurements allow, for each domain they have."""
    tables = []
    for domain in domains_of(rows):
        tables += [
            main_table(rows, domain, paper_dir),
            empirical_table(rows, domain, paper_dir),
            ablation_table(rows, domain),
            comparison_table(rows, domain),
        ]
    tables.append(row_comparisons(rows, paper_dir))
    return [table for table in tables if table.body]


def empirical_table(
    rows: Sequence[Measurement], domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """DPO on the top, last and random 10% and on all neurons, under both protocols."""
    index, paper = index_of(rows), published.empirical_study(paper_dir)
    arms = ["dpo_top10", "dpo_last10", "dpo_random10", "dpo"]
    methods = arms + [f"{arm}_paper" for arm in arms]
    name = columns_of(domain)[-1]
    records, body = [], []
    for method in methods:
        cell = cell_of(index, method, name, domain)
        if cell is None:
            continue
        loss = _loss(index, method, domain)
        row = paper.get(method.removesuffix("_paper"), {})
        record = record_of(domain, method, name, cell, None) | {
            "train_loss": loss and loss.effect,
            "train_loss_ci_low": loss and loss.low,
            "train_loss_ci_high": loss and loss.high,
        }
        del record["published"]
        records.append(record | {f"paper_{dataset}": row.get(dataset) for dataset in paper["dpo"]})
        shown = [percent(cell), ends(cell), f"{loss.effect:.4f}" if loss else ""]
        shown += [f"{100 * row[dataset]:.1f}" if row else "" for dataset in paper["dpo"]]
        body.append([published.arm_label(method), *shown])
    header = ["neurons", f"{name} (measured)", "95% interval", "training loss"]
    header += [f"{dataset} (paper)" for dataset in paper["dpo"]]
    return Table(
        f"empirical_{domain.name}",
        f"Which neurons DPO may change, {domain.name}: {domain.unit}, %",
        f"{how(rows)} Rows without a remark: each arm at its own best learning rate; 'one rate': "
        "the paper's protocol. Training loss: mean of the last quarter of the steps.",
        records,
        header,
        body,
    )


def ablation_table(rows: Sequence[Measurement], domain: Domain) -> Table:
    """ALLO with one thing changed, and its controls, each with its paired difference to ALLO."""
    index, name = index_of(rows), columns_of(domain)[-1]
    measured = {row.method for row in rows}
    methods = [method for method in ("dpo", "dpo_long") if method in measured]
    methods += sorted(single_changes(measured))
    records, body = [], []
    for method in ["allo", *methods] if "allo" in measured else []:
        cell = cell_of(index, method, name, domain)
        if cell is None:
            continue
        change = None if method == "allo" else compare(index, method, "allo", domain)
        records.append(
            {
                **record_of(domain, method, name, cell, None),
                "change_to_allo": change and change.effect,
                "change_ci_low": change and change.low,
                "change_ci_high": change and change.high,
                "interval": change.kind if change else "",
            }
        )
        del records[-1]["published"]
        body.append([published.arm_label(method), percent(cell), *change_text(change)])
    return Table(
        f"ablations_{domain.name}",
        f"ALLO with one thing changed, {domain.name}: {domain.unit}, %",
        f"{how(rows)} Change: paired difference to ALLO on the same problems, in points, with its "
        "interval over SFT models (of one model, over its problems).",
        records,
        ["variant", f"{name} (measured)", "change to ALLO", "95% interval"],
        body,
    )


def comparison_table(rows: Sequence[Measurement], domain: Domain) -> Table:
    """Every pair of methods that was compared on the same problems."""
    index, prefix = index_of(rows), f"{domain.prefix}{GAIN}"
    pairs = sorted(
        {
            (row.method, row.metric.removeprefix(prefix))
            for row in rows
            if row.metric.startswith(prefix) and row.dataset in domain.datasets
        }
    )
    records, body = [], []
    for method, baseline in pairs:
        found = compare(index, method, baseline, domain)
        if found is None:
            continue
        records.append(
            {
                "domain": domain.name,
                "method": method,
                "baseline": baseline,
                "effect": found.effect,
                "ci_low": found.low,
                "ci_high": found.high,
                "interval": found.kind,
                "seeds": " ".join(map(str, found.seeds)),
                "n": found.n,
            }
        )
        body.append([f"`{method}`", f"`{baseline}`", *change_text(found)])
    return Table(
        f"comparisons_{domain.name}",
        f"Paired differences, {domain.name}: {domain.unit}, points",
        f"{how(rows)} Differences on the same problems, with t intervals over SFT models (of one "
        "model, over its problems); no verdicts, as they are not corrected for many comparisons "
        "(the table `comparisons` has ALLO against the rows of the main tables, corrected).",
        records,
        ["method", "baseline", "difference", "95% interval"],
        body,
    )


def _loss(index, method: str, domain: Domain) -> Interval | None:
    found = metric_by_seed(
        index, method, "train_loss", domain, shared_names(index.values(), domain)
    )
    return over_seeds(found)
