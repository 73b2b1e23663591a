"""The paper's tables, measured beside published, built from `measurements.csv` alone.

CSV files hold fractions and one row a cell; Markdown files hold per cent as the paper prints them,
with the best of a column in bold and the second best underlined.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allo_lib import published
from allo_lib.comparisons import Domain, compare, domains_of, index_of, metric_by_seed, shared_names
from allo_lib.measurements import AVERAGE, GAIN, Measurement, seeds_of
from allo_lib.stats import Interval, mean_interval

NOT_RUN = "not run"
_PAPER_AVERAGES = {
    "qa_avg": "paper, 4 question sets",
    "math_avg": "paper, 4 maths sets",
    "instructions_avg": "paper, 2 instruction sets",
}


@dataclass(frozen=True)
class Table:
    """A table in both forms: `records` for the CSV, `header` and `body` (text) for Markdown."""

    name: str
    title: str
    caption: str
    records: list[dict[str, object]]
    header: list[str]
    body: list[list[str]]


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
        writer.writerows({key: _plain(cell) for key, cell in row.items()} for row in table.records)
        for suffix, text in ((".csv", buffer.getvalue()), (".md", markdown(table))):
            paths.append(folder / f"{table.name}{suffix}")
            paths[-1].write_bytes(text.encode("utf-8"))
    return paths


def markdown(table: Table) -> str:
    """The table with its title and caption as Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.body]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {table.title}\n\n{grid}\n\n{table.caption}\n"


def main_table(
    rows: Sequence[Measurement], domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """Twelve methods on the domain's data sets and their mean, beside the paper's numbers."""
    index, paper = index_of(rows), published.main_results(paper_dir)
    sets = _columns(domain)
    beside = [name for name in domain.datasets if name in paper["dpo"]] or list(_PAPER_AVERAGES)
    cells = {(m, d): _cell(index, m, d, domain) for m in published.LABELS for d in sets}
    records = [
        _record(domain, method, name, cells.get((method, name)), paper[method].get(name))
        for method in published.LABELS
        for name in sets + [name for name in beside if name not in sets]
    ]
    columns = [[_percent(cells[method, name]) for method in published.LABELS] for name in sets]
    columns += [[_printed(paper[m][name], name) for m in published.LABELS] for name in beside]
    marked = [rank(column) for column in columns]
    whole = [_interval(cells[method, sets[-1]]) for method in published.LABELS]
    header = ["method", *[f"{name} (measured)" for name in sets], f"{sets[-1]}: 95% interval"]
    header += [_PAPER_AVERAGES.get(name, f"{name} (paper)") for name in beside]
    body = [
        [label, *[column[i] for column in marked[: len(sets)]], whole[i]]
        + [column[i] for column in marked[len(sets) :]]
        for i, label in enumerate(published.LABELS.values())
    ]
    return Table(
        f"main_{domain.name}",
        f"All methods, {domain.name}: {domain.unit}, %",
        f"{_how(rows)} Bold: best of a column; underlined: second best. A cell that was not "
        "run says so; the paper publishes no intervals.",
        records,
        header,
        body if any(cells.values()) else [],
    )


def empirical_table(
    rows: Sequence[Measurement], domain: Domain, paper_dir: str | Path | None = None
) -> Table:
    """DPO on the top, last and random 10% and on all neurons, under both protocols."""
    index, paper = index_of(rows), published.empirical_study(paper_dir)
    arms = ["dpo_top10", "dpo_last10", "dpo_random10", "dpo"]
    methods = arms + [f"{arm}_paper" for arm in arms]
    name = _columns(domain)[-1]
    records, body = [], []
    for method in methods:
        cell = _cell(index, method, name, domain)
        if cell is None:
            continue
        loss = _loss(index, method, domain)
        row = paper.get(method.removesuffix("_paper"), {})
        record = _record(domain, method, name, cell, None) | {
            "train_loss": loss and loss.effect,
            "train_loss_ci_low": loss and loss.low,
            "train_loss_ci_high": loss and loss.high,
        }
        del record["published"]
        records.append(record | {f"paper_{dataset}": row.get(dataset) for dataset in paper["dpo"]})
        shown = [_percent(cell), _interval(cell), f"{loss.effect:.4f}" if loss else ""]
        shown += [f"{100 * row[dataset]:.1f}" if row else "" for dataset in paper["dpo"]]
        body.append([published.arm_label(method), *shown])
    header = ["neurons", f"{name} (measured)", "95% interval", "training loss"]
    header += [f"{dataset} (paper)" for dataset in paper["dpo"]]
    return Table(
        f"empirical_{domain.name}",
        f"Which neurons DPO may change, {domain.name}: {domain.unit}, %",
        f"{_how(rows)} Rows without a remark: each arm at its own best learning rate; 'one rate': "
        "the paper's protocol. Training loss: mean of the last quarter of the steps.",
        records,
        header,
        body,
    )


def ablation_table(rows: Sequence[Measurement], domain: Domain) -> Table:
    """ALLO with one thing changed, and its controls, each with its paired difference to ALLO."""
    index, name = index_of(rows), _columns(domain)[-1]
    measured = {row.method for row in rows}
    methods = [method for method in ("dpo", "dpo_long") if method in measured]
    methods += sorted(method for method in measured if method.startswith("allo_"))
    records, body = [], []
    for method in ["allo", *methods] if "allo" in measured else []:
        cell = _cell(index, method, name, domain)
        if cell is None:
            continue
        change = None if method == "allo" else compare(index, method, "allo", domain)
        records.append(
            {
                **_record(domain, method, name, cell, None),
                "change_to_allo": change and change.effect,
                "change_ci_low": change and change.low,
                "change_ci_high": change and change.high,
                "interval": change.kind if change else "",
            }
        )
        del records[-1]["published"]
        body.append([published.arm_label(method), _percent(cell), *_change(change)])
    return Table(
        f"ablations_{domain.name}",
        f"ALLO with one thing changed, {domain.name}: {domain.unit}, %",
        f"{_how(rows)} Change: paired difference to ALLO on the same problems, in points.",
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
        body.append([f"`{method}`", f"`{baseline}`", *_change(found)])
    return Table(
        f"comparisons_{domain.name}",
        f"Paired differences, {domain.name}: {domain.unit}, points",
        f"{_how(rows)} Paired bootstrap on the same problems; not corrected for many comparisons.",
        records,
        ["method", "baseline", "difference", "95% interval"],
        body,
    )


def rank(column: Sequence[str]) -> list[str]:
    """Text cells with the best number in bold and the second best underlined, ties alike.

    A cell counts by its leading number; cells without one are left alone.
    """
    numbers = [_leading(cell) for cell in column]
    best = sorted({number for number in numbers if number is not None}, reverse=True)[:2]
    marks = dict(zip(best, ("**{}**", "<u>{}</u>"), strict=False))
    return [
        marks.get(number, "{}").format(cell) for number, cell in zip(numbers, column, strict=True)
    ]


def method_interval(
    rows: Sequence[Measurement], method: str, domain: Domain, dataset: str | None = None
) -> Interval | None:
    """A method's own accuracy on one data set, or the mean over the domain's; None if not run."""
    return _cell(index_of(rows), method, dataset or _columns(domain)[-1], domain)


def _columns(domain: Domain) -> list[str]:
    """The domain's data sets, and their mean where there are several."""
    return [*domain.datasets, AVERAGE] if len(domain.datasets) > 1 else list(domain.datasets)


def _cell(index, method: str, dataset: str, domain: Domain) -> Interval | None:
    names = domain.datasets if dataset == AVERAGE else (dataset,)
    metric = f"{domain.prefix}accuracy"
    found = metric_by_seed(index, method, metric, Domain(domain.name, names), ())
    interval = _over_seeds(found)
    return interval and interval.within(0.0, 1.0)


def _loss(index, method: str, domain: Domain) -> Interval | None:
    found = metric_by_seed(
        index, method, "train_loss", domain, shared_names(index.values(), domain)
    )
    return _over_seeds(found)


def _over_seeds(found: dict[int, tuple[float, float, int]]) -> Interval | None:
    if not found:
        return None
    values = {seed: value for seed, (value, _, _) in found.items()}
    stderrs = {seed: stderr for seed, (_, stderr, _) in found.items()}
    return mean_interval(values, stderrs, sum(n for _, _, n in found.values()))


def _record(domain: Domain, method: str, dataset: str, cell: Interval | None, paper) -> dict:
    return {
        "domain": domain.name,
        "method": method,
        "dataset": dataset,
        "metric": f"{domain.prefix}accuracy",
        "value": cell and cell.effect,
        "stderr": cell and cell.stderr,
        "ci_low": cell and cell.low,
        "ci_high": cell and cell.high,
        "seed_sd": cell and cell.seed_sd,
        "seeds": " ".join(map(str, cell.seeds)) if cell else "",
        "n": cell.n if cell else "",
        "published": paper,
    }


def _percent(cell: Interval | None) -> str:
    if cell is None:
        return NOT_RUN
    error = "" if math.isnan(cell.stderr) else f" ± {100 * cell.stderr:.1f}"
    return f"{100 * cell.effect:.1f}{error}"


def _printed(value: float, column: str) -> str:
    """Per cent with as many decimals as the paper prints: one for maths, two for the others."""
    return f"{100 * value:.{1 if column in (*published.MATHS, 'math_avg') else 2}f}"


def _interval(cell: Interval | None) -> str:
    if cell is None or not cell.defined:
        return ""
    return f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def _change(change: Interval | None) -> list[str]:
    if change is None:
        return ["", ""]
    return [f"{100 * change.effect:+.2f}", f"[{100 * change.low:+.2f}, {100 * change.high:+.2f}]"]


def _how(rows: Sequence[Measurement]) -> str:
    seeds = seeds_of(rows)
    if len(seeds) > 1:
        return (
            f"Means over seeds {', '.join(map(str, seeds))} ± standard error over seeds; "
            "intervals of single methods: Student's t over seeds, cut at 0 and 100%."
        )
    return f"Seed {seeds[0]}, ± standard error over problems; normal intervals."


def _leading(cell: str) -> float | None:
    try:
        return float(cell.split(" ")[0])
    except ValueError:
        return None


def _plain(cell: object) -> object:
    """Numbers with six decimals; nothing and NaN as an empty cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell + 0.0:.6f}" if isinstance(cell, float) else cell
