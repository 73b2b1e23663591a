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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
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
    """The outcomes of results as the study gives them.

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


MEASURED = {field.name: field.type for field in fields(Measurement)}
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

    The standard error takes the data sets as independent; n is their sum.
    """
    stderr = math.sqrt(sum(row.stderr**2 for row in rows)) / len(rows)
    mean, n = sum(row.value for row in rows) / len(rows), sum(row.n for row in rows)
    return replace(rows[0], dataset=name, value=mean, stderr=stderr, n=n)


def write_measurements(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Write rows sorted, with fixed number formats and LF ends; the file is whole or unchanged.

    Raises AlloError for a value that is not finite, a bad name, a row given twice, or a disk that
    does not take the file.
    """
    # Ten significant digits survive a round trip through text; adding 0.0 turns -0.0 into 0.
    cells = (
        [f"{cell + 0.0:.10g}" if isinstance(cell, float) else cell for cell in astuple(row)]
        for row in _checked(rows, path)
    )
    write_csv(path, MEASURED, cells)


def read_measurements(path: str | Path) -> list[Measurement]:
    """The rows of a `measurements.csv`, sorted; AlloError names the file and the first mistake."""
    rows = read_csv(path, MEASURED, "run the notebooks 00 to 06 first")
    return _checked((Measurement(*cells) for cells in rows), path)


def _checked(rows: Iterable[Measurement], path: str | Path) -> list[Measurement]:
    """The rows, sorted; AlloError for the first that cannot be."""
    rows = sorted(rows, key=_key)
    for row in rows:
        for name in (row.method, row.dataset, row.metric):
            if not _NAME.fullmatch(name):
                raise AlloError(f"{path} has the name {name[:40]!r}: use letters, digits or _.:+-")
        what = f"{path}, seed {row.seed}, {row.method} {row.metric} on {row.dataset}"
        if not math.isfinite(row.value) or not math.isfinite(row.stderr):
            raise AlloError(
                f"{what}: value {row.value} and stderr {row.stderr} must both be finite"
            )
        if row.stderr < 0 or row.n < 0 or row.seed < 0:
            raise AlloError(f"{what}: seed, stderr {row.stderr} and n {row.n} must be >= 0")
    for row, other in pairwise(rows):
        if _key(row) == _key(other):
            raise AlloError(f"{path} has {_key(row)} twice: expected each measurement once")
    return rows


# --- files ----------------------------------------------------------------------------------------


def read_csv(path: str | Path, columns: Mapping[str, Any], missing: str) -> list[list[Any]]:
    """The rows of a CSV file with just these columns, each cell read by its column's function.

    AlloError, in one line, for any other file, or none; `missing` says what to do then.
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
    rows = []
    for line, cells in enumerate(lines[1:], 2):
        try:
            rows.append([f(cell) for f, cell in zip(columns.values(), cells, strict=True)])
        except ValueError as error:
            raise AlloError(f"{path} line {line} cannot be read ({error})"[:300]) from None
    return rows


def write_csv(path: str | Path, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with LF ends; the file is whole or unchanged."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    replace_file(Path(path), buffer.getvalue().encode("utf-8"))


def plain(cell: object) -> object:
    """Numbers with six decimals; nothing and NaN as an empty cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:z.6f}" if isinstance(cell, float) else cell


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
