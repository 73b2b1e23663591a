"""`measurements.csv`: one row a measurement, for readers and spreadsheets.

Comparisons of methods are no rows of it: they come from the outcomes (`outcomes`, `comparisons`).
Values are fractions; timings are kept elsewhere, so that two runs of one seed write the same bytes.
"""

import contextlib
import csv
import io
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from allo_lib.errors import AlloError

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


COLUMNS = tuple(field.name for field in fields(Measurement))


def proportion(
    seed: int, method: str, dataset: str, metric: str, outcomes: Sequence[bool]
) -> Measurement:
    """The share p of true outcomes, with standard error sqrt(p (1 - p) / n).

    Raises AlloError when there are no outcomes.
    """
    if len(outcomes) == 0:
        raise AlloError(f"no outcomes for {method} on {dataset}: {metric} needs at least one")
    n = len(outcomes)
    share = sum(bool(outcome) for outcome in outcomes) / n
    stderr = math.sqrt(share * (1 - share) / n)
    return Measurement(seed, method, dataset, metric, share, stderr, n)


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


def merge(
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
    return _sorted(kept + new)


def write(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Write rows sorted, with fixed number formats and LF ends; the file is whole or unchanged.

    Raises AlloError for a value that is not finite, a bad name, a row given twice, or a disk that
    does not take the file.
    """
    rows = _sorted(rows)
    for row in rows:
        _check(row, str(path))
    _check_unique(rows, str(path))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_format(cell) for cell in astuple(row)] for row in rows)
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


def read(path: str | Path) -> list[Measurement]:
    """The rows of a `measurements.csv`; AlloError names the file and line of the first mistake."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise AlloError(f"{path} does not exist: run the notebooks 00 to 05 first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AlloError(
            f"{path} cannot be read as UTF-8 text ({error}): restore the file"
        ) from None
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise AlloError(f"{path} is not valid CSV ({error}): restore the file") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        found = ",".join(lines[0])[:80] if lines else "an empty file"
        raise AlloError(f"{path} starts with {found!r}: expected {','.join(COLUMNS)}")
    rows = [_parse(cells, f"{path} line {line}") for line, cells in enumerate(lines[1:], 2)]
    _check_unique(rows, str(path))
    return rows


def seeds_of(rows: Iterable[Measurement]) -> list[int]:
    """The seeds that have rows, ascending."""
    return sorted({row.seed for row in rows})


def _sorted(rows: Iterable[Measurement]) -> list[Measurement]:
    return sorted(rows, key=lambda row: (row.seed, row.method, row.dataset, row.metric))


def _format(cell) -> str:
    # Ten significant digits survive a round trip through text; adding 0.0 turns -0.0 into 0.
    return f"{cell + 0.0:.10g}" if isinstance(cell, float) else str(cell)


def _parse(cells: list[str], where: str) -> Measurement:
    if len(cells) != len(COLUMNS):
        raise AlloError(f"{where} has {len(cells)} cells: expected {len(COLUMNS)}")
    seed, method, dataset, metric, value, stderr, n = cells
    try:
        numbers = int(seed), float(value), float(stderr), int(n)
    except ValueError as error:
        raise AlloError(f"{where} has a cell that is not a number ({error})"[:200]) from None
    row = Measurement(numbers[0], method, dataset, metric, *numbers[1:])
    _check(row, where)
    return row


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


def _check_unique(rows: Sequence[Measurement], where: str) -> None:
    seen = set()
    for row in rows:
        key = row.seed, row.method, row.dataset, row.metric
        if key in seen:
            raise AlloError(
                f"{where} has seed {row.seed} {row.method} {row.metric} on "
                f"{row.dataset} twice: expected each measurement once"
            )
        seen.add(key)
