"""`outcomes.parquet`: what every method did on every problem and held-out pair, one row each.

Columns: `model`, the seed of the SFT model; `replicate`, the run on it; `method`; `domain`;
`dataset`, for held-out pairs the domain's own name; `problem`, its id; `right`, for pairs whether
the chosen response has the larger implicit reward; `answered`; `margin`, that reward's difference
(float32, null for problems).
"""

import os
from collections.abc import Iterable
from pathlib import Path

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


def frame(results: Iterable[tuple[int, int, str, str, dict, list[str]]]) -> pd.DataFrame:
    """The outcomes of results as `arms.result` gives them.

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", store_schema=False)
        os.replace(temporary, path)
    except OSError as error:
        raise AlloError(
            f"cannot write {path} ({error}): free space or permit writing, then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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
