"""The two files that hold a study's results, and what every table and claim comes from.

`outcomes.parquet`: what every method did on every problem and held-out pair, one row each. Columns:
`model`, the seed of the SFT model; `replicate`, the run on it; `method`; `domain`; `dataset`, for
held-out pairs the domain's own name; `problem`, its id; `right`, for pairs whether the chosen
response has the larger implicit reward; `answered`; `margin`, that reward's difference (float32,
null for problems).

`measurements.csv`: one row a measurement, for readers and spreadsheets. Comparisons of methods are
no rows of it: they come from the outcomes (`comparisons`). Values are fractions; timings are kept
elsewhere, so that two runs of one seed write the same bytes.
"""

import contextlib
import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from allo_lib.errors import AlloError

NAME = "outcomes.parquet"
_WORDS = ("method", "domain", "dataset", "problem")
SCHEMA = pa.schema(
    [("model", pa.int64()), ("replicate", pa.int16())]
    + [(word, pa.dictionary(pa.int32(), pa.string())) for word in _WORDS]
    + [("right", pa.bool_()), ("answered", pa.bool_()), ("margin", pa.float32())]
)
COLUMNS = SCHEMA.names


def frame(results: Iterable[tuple[int, int, str, str, dict[str, Any], list[str]]]) -> pd.DataFrame:
    """The outcomes of results as `training.result` gives them.

    results: (model, replicate, method, domain, result, ids of the held-out pairs) each.
    """
    rows = []
    for model, replicate, method, domain, found, heldout in results:
        run = (model, replicate, method, domain)
        for problem, dataset, answered, right in found.get("answers", ()):
            rows.append((*run, dataset, problem, bool(right), bool(answered), None))
        for problem, margin in zip(heldout, found["margins"], strict=True):
            rows.append((*run, domain, problem, margin > 0, True, margin))
    return pd.DataFrame(rows, columns=COLUMNS)


def merge(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """`new` together with the rows of `old` that are of other models or domains."""
    if not len(old):
        return new
    of, fresh = (pd.MultiIndex.from_frame(rows[["model", "domain"]]) for rows in (old, new))
    return pd.concat([old[~of.isin(fresh.unique())], new], ignore_index=True)


def write(path: Path, rows: pd.DataFrame) -> None:
    """Write the rows, sorted; the file is whole or as it was, equal rows give equal bytes.

    AlloError for a disk that does not take it, or an outcome given twice.
    """
    keys = ["model", "replicate", "domain", "dataset", "method", "problem"]
    if rows.duplicated(keys).any():
        twice = rows[rows.duplicated(keys)].iloc[0][keys].to_dict()
        raise AlloError(f"{path}: the outcome {twice} is given twice; expected each once")
    words = {word: pd.Categorical(rows[word], sorted(rows[word].unique())) for word in _WORDS}
    ordered = rows.assign(**words).sort_values(keys, kind="stable", ignore_index=True)
    table = pa.Table.from_pandas(ordered[COLUMNS], preserve_index=False).cast(SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", store_schema=False)
    replace_file(path, buffer.getvalue())


def read(path: Path) -> pd.DataFrame:
    """The rows of an `outcomes.parquet`, none where there is no file; AlloError for any other."""
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    try:
        found = pq.read_table(path, read_dictionary=list(_WORDS)).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise AlloError(f"{path} is not a readable Parquet file ({error}): restore it") from None
    if list(found.columns) != COLUMNS:
        raise AlloError(f"{path} has columns {list(found.columns)}: expected {COLUMNS}")
    return found


# --- measurements.csv -----------------------------------------------------------------------------

AVERAGE = "average"
# Overlap of random masks that keep as much of every tensor as the two that are compared.
CHANCE_IN_TENSORS = "mask_overlap_chance_per_tensor"
# The prefix of a metric that counts held-out preference pairs instead of answered problems.
REWARD = "reward_"
_NAME = re.compile(r"[A-Za-z0-9_.:+\-]+")


@dataclass(frozen=True)
class Measurement:
    """One number: `value` (a fraction unless the metric says otherwise) with its standard error.

    `stderr` is 0 where none is known; `n` is the number of problems, pairs or steps behind it.
    """

    seed: int
    method: str
    dataset: str
    metric: str
    value: float
    stderr: float
    n: int


MEASURED = tuple(field.name for field in fields(Measurement))
_key = attrgetter("seed", "method", "dataset", "metric")


def proportion(
    seed: int, method: str, dataset: str, metric: str, outcomes: Sequence[bool]
) -> Measurement:
    """The share p of true outcomes, with standard error sqrt(p (1 - p) / n).

    Raises AlloError when there are no outcomes.
    """
    n = len(outcomes)
    if n == 0:
        raise AlloError(f"no outcomes for {method} on {dataset}: {metric} needs at least one")
    share = sum(bool(outcome) for outcome in outcomes) / n
    return Measurement(seed, method, dataset, metric, share, math.sqrt(share * (1 - share) / n), n)


def average(rows: Sequence[Measurement], name: str = AVERAGE) -> Measurement:
    """The unweighted mean over data sets of one seed, method and metric, as data set `name`.

    The standard error takes the data sets as independent; n is their sum. Raises AlloError when
    the rows are none, of several seeds, methods or metrics, or name a data set twice.
    """
    keys = {(row.seed, row.method, row.metric) for row in rows}
    if len(keys) != 1 or len({row.dataset for row in rows}) != len(rows):
        raise AlloError(
            f"average was given {len(rows)} rows of {len(keys)} (seed, method, metric): "
            "expected one of these and each data set once"
        )
    (seed, method, metric), count = keys.pop(), len(rows)
    stderr = math.sqrt(sum(row.stderr**2 for row in rows)) / count
    mean = sum(row.value for row in rows) / count
    return Measurement(seed, method, name, metric, mean, stderr, sum(row.n for row in rows))


def merge_measurements(
    old: Iterable[Measurement], new: Iterable[Measurement], datasets: Collection[str] | None = None
) -> list[Measurement]:
    """`new` together with the rows of `old` that it does not replace, sorted.

    It replaces those of its seeds: all of them, or those on `datasets`.
    """
    new = list(new)
    fresh = {row.seed for row in new}
    kept = [
        row
        for row in old
        if row.seed not in fresh or (datasets is not None and row.dataset not in datasets)
    ]
    return sorted(kept + new, key=_key)


def write_measurements(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Write rows sorted, with fixed number formats and LF ends; the file is whole or unchanged.

    Raises AlloError for a value that is not finite, a bad name, a row given twice, or a disk that
    does not take the file.
    """
    rows = sorted(rows, key=_key)
    for row in rows:
        _check(row, str(path))
    _check_unique(rows, str(path))
    write_csv(path, MEASURED, ([_format(cell) for cell in astuple(row)] for row in rows))


def read_measurements(path: str | Path) -> list[Measurement]:
    """The rows of a `measurements.csv`; AlloError names the file and line of the first mistake."""
    rows = []
    for where, cells in read_csv(path, MEASURED, "run the notebooks 00 to 05 first"):
        seed, method, dataset, metric, value, stderr, n = cells
        try:
            numbers = int(seed), float(value), float(stderr), int(n)
        except ValueError as error:
            raise AlloError(f"{where} has a cell that is not a number ({error})"[:200]) from None
        rows.append(Measurement(numbers[0], method, dataset, metric, *numbers[1:]))
        _check(rows[-1], where)
    _check_unique(rows, str(path))
    return rows


def seeds_of(rows: Iterable[Measurement]) -> list[int]:
    """The seeds that have rows, ascending."""
    return sorted({row.seed for row in rows})


def _format(cell: object) -> str:
    # Ten significant digits survive a round trip through text; adding 0.0 turns -0.0 into 0.
    return f"{cell + 0.0:.10g}" if isinstance(cell, float) else str(cell)


def _check(row: Measurement, where: str) -> None:
    for name in (row.method, row.dataset, row.metric):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AlloError(
                f"{where} has the name {str(name)[:40]!r}: expected letters, digits or _.:+-"
            )
    what = f"{where}, {row.method} {row.metric} on {row.dataset}"
    if not math.isfinite(row.value) or not math.isfinite(row.stderr):
        raise AlloError(f"{what}: value {row.value} and stderr {row.stderr} must both be finite")
    if row.stderr < 0 or row.n < 0 or row.seed < 0:
        raise AlloError(f"{what}: seed {row.seed}, stderr {row.stderr} and n {row.n} must be >= 0")


def _check_unique(rows: Iterable[Measurement], where: str) -> None:
    for (seed, method, dataset, metric), count in Counter(map(_key, rows)).items():
        if count > 1:
            raise AlloError(
                f"{where} has seed {seed} {method} {metric} on {dataset} twice: expected each "
                "measurement once"
            )


# --- files ----------------------------------------------------------------------------------------


def read_csv(path: str | Path, columns: Sequence[str], missing: str) -> list[tuple[str, list[str]]]:
    """(the file and line, its cells) of every line of a CSV file with just these columns.

    AlloError, in one line, where there is no such file; `missing` says what to do then.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except FileNotFoundError:
        raise AlloError(f"{path} does not exist: {missing}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AlloError(f"{path} is no CSV file in UTF-8 ({error}): restore it") from None
    if not lines or lines[0] != list(columns):
        found = ",".join(lines[0])[:80] if lines else "an empty file"
        raise AlloError(f"{path} has columns {found!r}: expected {','.join(columns)}")
    for line, cells in enumerate(lines, 1):
        if len(cells) != len(columns):
            raise AlloError(f"{path} line {line} has {len(cells)} cells: expected {len(columns)}")
    return [(f"{path} line {line}", cells) for line, cells in enumerate(lines[1:], 2)]


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with LF ends; the file is whole or unchanged."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    replace_file(Path(path), buffer.getvalue().encode("utf-8"))


def replace_file(path: Path, content: bytes) -> None:
    """Write `path`, which is whole or as it was; AlloError for a disk that does not take it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise AlloError(
            f"cannot write {path} ({reason}): free space or permit writing, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
