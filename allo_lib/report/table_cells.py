"""What the tables are made of: a table, its cells as numbers and as text, and writing it."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allo_lib.evaluation import published
from allo_lib.evaluation.comparisons import Domain, StudyResults
from allo_lib.evaluation.stats import Interval


@dataclass(frozen=True)
class Table:
    """A table in both forms: `records` for the CSV, `header` and `body` (text) for Markdown."""

    name: str
    title: str
    caption: str
    records: list[dict[str, object]]
    header: list[str]
    body: list[list[str]]


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


def record_of(domain: Domain, method: str, dataset: str, cell: Interval | None, paper) -> dict:
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
        "seeds": " ".join(map(str, cell.seeds)) if cell else "",
        "n": cell.n if cell else "",
        "published": paper,
    }


def percent(cell: Interval | None, missing: str = "") -> str:
    """Per cent with its standard error; `missing` where nothing was measured."""
    if cell is None:
        return missing
    error = "" if math.isnan(cell.stderr) else f" ± {100 * cell.stderr:.1f}"
    return f"{100 * cell.effect:.1f}{error}"


def printed(value: float, column: str) -> str:
    """Per cent with as many decimals as the paper prints: one for maths, two for the others."""
    return f"{100 * value:.{1 if column in (*published.MATHS, 'math_avg') else 2}f}"


def ends(cell: Interval | None) -> str:
    """The interval in per cent; empty where there is none."""
    if cell is None or not cell.defined:
        return ""
    return f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def change_text(change: Interval | None) -> list[str]:
    """A difference and its interval in points."""
    if change is None:
        return ["", ""]
    effect, low, high = (100 * part for part in (change.effect, change.low, change.high))
    return [f"{effect:+z.2f}", f"[{low:+z.2f}, {high:+z.2f}]" if change.defined else ""]


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
