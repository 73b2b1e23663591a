"""Rows of real questions, instructions and human preferences: reading and checking them.

A data folder holds `<name>/<split>.jsonl` or `.jsonl.gz`, one JSON object a line (UTF-8):
questions as {id, question, solution, answer, choices}, instructions as {id, question, outputs},
preferences as {prompt, chosen, rejected}. `question` is the text with its options, `(A) ...`, one a
line; `answer` is the letter, and where `choices` is null the answer itself; `solution` is the human
explanation or null; `outputs` are others' responses by the names of their models. Without a folder
the same rows are made from the hub's copies (`benchmarks`).
"""

import collections
import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from allo_lib.data.answers import LETTERS
from allo_lib.data.benchmarks import both_ways, load_from_hub, options
from allo_lib.errors import AlloError, short
from allo_lib.profiles.settings import Text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("expected non-empty text")
    return text


# JSON can spell half of a surrogate pair, which no tokenizer takes: `Text` refuses it.
Filled = Annotated[Text, AfterValidator(_filled)]


class Instruction(BaseModel):
    """What a judge compares replies to; `outputs` are others' replies by model."""

    id: Filled
    question: Filled
    outputs: dict[Text, Text]


class Preference(BaseModel):
    """A human comparison of two replies."""

    prompt: Filled
    chosen: Filled
    rejected: Filled

    @model_validator(mode="after")
    def _differ(self):
        if self.chosen == self.rejected:
            raise ValueError("chosen equals rejected; drop the row or correct one of them")
        return self


class Question(BaseModel):
    """A question with a gold answer."""

    id: Filled
    question: Filled
    solution: Text | None
    answer: Filled
    choices: Annotated[list[Filled], Field(min_length=2, max_length=len(LETTERS))] | None

    @model_validator(mode="after")
    def _options_match(self):
        if self.choices is None:
            return self
        letters, lines = LETTERS[: len(self.choices)], options(self.choices)
        if self.answer not in tuple(letters):
            raise ValueError(
                f"answer is {short(self.answer)}, expected a letter from A to {letters[-1]}"
            )
        # `tasks.prompt` takes the options off the end again; without them, the question.
        stem = self.question.removesuffix("\n" + "\n".join(lines))
        if stem == self.question or not stem.strip():
            raise ValueError(
                f"question is {short(self.question)}, expected a text and then its options, one a "
                f"line, from {short(lines[0])} to {short(lines[-1])}"
            )
        return self


def load_rows(name: str, split: str, data_dir: str | Path | None = None) -> list[dict]:
    """Return all rows of one split, checked.

    Args:
        name: folder name, such as "ecqa" or "hh_helpful".
        split: "train" or "test".
        data_dir: the data folder; default the environment variable ALLO_DATA; without either the
            hub's copy is read through `datasets`.

    Raises:
        AlloError: nothing there (both ways are named), or a malformed row (file and line named).
    """
    folder = data_dir or os.environ.get("ALLO_DATA")
    if folder:
        source = _data_file(Path(folder).expanduser(), name, split)
        lines = enumerate(text_of(source).split("\n"), start=1)
        rows = [_parse(line, f"{source}, line {i}") for i, line in lines if line.strip()]
    else:
        source, rows = f"{name} {split} of the hub", load_from_hub(name, split)
        for row in rows:
            check_row(row, row.get("id", source))
    if not rows:
        raise AlloError(f"{source} holds no rows; expected one JSON object a line")
    if len({"question" in row for row in rows}) > 1:
        raise AlloError(f"{source}: questions and preferences in one file; expected one kind")
    counts = collections.Counter(row["id"] for row in rows if "question" in row)
    for row_id, count in counts.most_common(1):
        if count > 1:
            raise AlloError(f"{source}: id {short(row_id)} occurs twice; expected one row an id")
    return rows


def _data_file(folder: Path, name: str, split: str) -> Path:
    for path in (folder / name / f"{split}.jsonl", folder / name / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    state = "has no such file" if folder.is_dir() else "does not exist"
    raise AlloError(
        f"data folder {folder} {state}: expected {name}/{split}.jsonl or {name}/{split}.jsonl.gz; "
        + both_ways(name)
    )


def text_of(path: Path) -> str:
    """Return the text of a file, unpacked if its name ends in .gz.

    Raises:
        AlloError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise AlloError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AlloError(f"{path} cannot be read ({error}); restore or replace the file") from error


def _parse(line: str, place: str) -> dict:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AlloError(f"{place}: not JSON ({error}); expected one object a line") from error
    check_row(row, place)
    return row


def _unique(items: list[tuple]) -> dict:
    for key, count in collections.Counter(key for key, _ in items).items():
        if count > 1:  # `json` would take the last one in silence
            raise ValueError(f"the key {short(key)} is there twice")
    return dict(items)


def check_row(row, place: str = "row") -> None:
    """Raise AlloError, naming `place`, unless `row` is well-formed: one of the three kinds."""
    if not isinstance(row, dict):
        raise AlloError(f"{place}: {type(row).__name__}, expected a JSON object")
    kind = Question
    if "question" not in row and not row.keys().isdisjoint(Preference.model_fields):
        kind = Preference
    elif "outputs" in row and "answer" not in row:
        kind = Instruction
    missing = [key for key in kind.model_fields if key not in row]
    if missing:
        keys = ", ".join(kind.model_fields)
        raise AlloError(f"{place}: no {', '.join(missing)}; expected the keys {keys}")
    try:
        kind.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        expected = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            expected = expected.replace("Input should be", "expected", 1)
            expected = f"{first['loc'][0]} is {short(first['input'])}, {expected}"
        raise AlloError(f"{place}: {expected}") from error


def data_hash(rows: list[dict]) -> str:
    """SHA-256 (hexadecimal) over rows as canonical JSON, one a line; order of rows counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
