"""The paper's tables, measured beside published, built from outcomes and measurements alone.

CSV files hold fractions and one row a cell; Markdown files hold per cent as the paper prints them,
with the best of a column in bold and the second best underlined.
"""

from itertools import product
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.ablations import single_changes
from allo_lib.evaluation.comparisons import Domain, StudyResults, columns_of
from allo_lib.report.main_table import main_table
from allo_lib.report.row_comparisons import row_comparisons
from allo_lib.report.table_cells import (
    Table,
    change_text,
    ends,
    how,
    markdown,
    percent,
    rank,
    record_of,
    write,
)

__all__ = ["Table", "build", "main_table", "markdown", "rank", "write"]


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
    tables.append(row_comparisons(results, paper_dir))
    return [table for table in tables if table.body]


def empirical_table(
    results: StudyResults, domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """DPO on the top, last and random 10% and on all neurons, under both protocols."""
    paper = published.empirical_study(paper_dir)
    arms = ["dpo_top10", "dpo_last10", "dpo_random10", "dpo"]
    methods = [f"{arm}{suffix}" for suffix in ("", "_long", "_paper") for arm in arms]
    name = columns_of(domain)[-1]
    records, body = [], []
    for method in methods:
        cell = results.score(method, domain)
        if cell is None:
            continue
        loss = results.metric_interval(method, "train_loss", domain.name)
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
        f"{how(results)} Each arm at its own best learning rate; 'long' and 'as long as both "
        "stages': with as many updates as ALLO; 'one rate': the paper's protocol. Training loss: "
        "mean of the last quarter of the steps.",
        records,
        header,
        body,
    )


def ablation_table(results: StudyResults, domain: Domain) -> Table:
    """ALLO with one thing changed, the official code's variants, and its controls, each with its
    paired difference to ALLO."""
    name = columns_of(domain)[-1]
    methods = ["dpo", "dpo_long", *sorted(single_changes(results.methods))]
    records, body = [], []
    for method in ["allo", *methods] if "allo" in results.methods else []:
        cell = results.score(method, domain)
        if cell is None:
            continue
        change = None if method == "allo" else results.compare(method, "allo", domain)
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
        f"{how(results)} Differences on the same problems, with t intervals over SFT models (of "
        "one model, over its problems); no verdicts, as they are not corrected for many "
        "comparisons (the table `comparisons` has ALLO against the rows of the main tables, "
        "corrected).",
        records,
        ["method", "baseline", "difference", "95% interval"],
        body,
    )
