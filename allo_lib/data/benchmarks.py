r"""The data sets of the paper: where the hub has each, how it is answered, reading and checking.

A data folder holds `<name>/<split>.jsonl` or `.jsonl.gz`, one JSON object a line (UTF-8):
questions as {id, question, solution, answer, choices}, instructions as {id, question, outputs},
preferences as {prompt, chosen, rejected}. `question` is the text with its options, `(A) ...`, one a
line; `answer` is the letter, and where `choices` is null the answer itself; `solution` is the human
explanation or null; `outputs` are others' responses by the names of their models. Without a folder
the same rows are made from the hub's copies.

A revision is the git commit of the hub's copy that other public projects pin too (named beside it),
so that rows cannot change unseen; where it is None, the hash of the rows in manifest.json is what
tells a change. Splits of the hub's copies differ from those of a data folder where there is no
official one (MAWPS), or the official test labels are not public (QASC, StrategyQA).
"""

import collections
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, model_validator

from allo_lib.data.answers import LETTERS, group
from allo_lib.errors import AlloError, short
from allo_lib.profiles.config import Text


def options(choices: list[str] | None) -> list[str]:
    """Return the options of a question as they stand at its end, a line each: `(A) first`."""
    return [f"({letter}) {text}" for letter, text in zip(LETTERS, choices or (), strict=False)]


def _question(question: str, solution: str | None, answer: str, choices=None) -> dict:
    text = "\n".join([question, *options(choices)])
    return {"question": text, "solution": solution, "answer": answer, "choices": choices}


def _statements(text: str | None) -> str | None:
    lines = [line.strip() for line in (text or "").split("\n")]
    return "\n".join(filter(None, lines)) or None


# Each converter takes an entry of the hub and returns a row without its id, or None for an entry
# that cannot be used.


def _ecqa(entry) -> dict | None:
    choices = [entry[f"q_op{i}"] for i in range(1, 6)]
    if choices.count(entry["q_ans"]) != 1:
        return None
    answer = LETTERS[choices.index(entry["q_ans"])]
    return _question(entry["q_text"], _statements(entry["taskA_pos"]), answer, choices)


def _qasc(entry) -> dict | None:
    facts = [entry[key] for key in ("fact1", "fact2", "combinedfact")]
    return _labelled(entry, entry["question"], _statements("\n".join(filter(None, facts))))


def _openbookqa(entry) -> dict | None:
    return _labelled(entry, entry["question_stem"], None)


def _labelled(entry, question: str, solution: str | None) -> dict | None:
    choices, labels = list(entry["choices"]["text"]), list(entry["choices"]["label"])
    if entry["answerKey"] not in labels:
        return None  # the test questions of QASC have no label
    return _question(question, solution, LETTERS[labels.index(entry["answerKey"])], choices)


def _strategyqa(entry) -> dict:
    facts = entry["facts"]  # a text or a list
    facts = facts if isinstance(facts, str) else "\n".join(facts or [])
    answer = {True: "yes", False: "no"}[entry["answer"]]
    return _question(entry["question"], _statements(facts), answer)


def _gsm8k(entry) -> dict:
    solution, answer = entry["answer"].rsplit("####", 1)
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()  # the calculator's marks
    return _question(entry["question"], solution, answer.strip().replace(",", ""))


def _math(entry) -> dict | None:
    _, boxed, rest = entry["solution"].rpartition(r"\boxed{")
    answer = (group("{" + rest) or "")[1:-1].strip() if boxed else ""
    return _question(entry["problem"], entry["solution"], answer) if answer else None


def _mawps(entry) -> dict:
    answer = entry["result"].replace("_", "")  # thousands are set apart by `_`
    return _question(entry["question"], entry["equation"] or None, answer)


def _tabmwp(entry) -> dict:
    title = f" {entry['table_title']}" if entry["table_title"] else ""
    unit = f" (Unit: {entry['unit']})" if entry["unit"] else ""
    stem = f"Table:{title}\n{entry['table']}\n\nQuestion: {entry['question']}{unit}"
    answer, choices = entry["answer"], list(entry["choices"] or ()) or None
    if choices:
        answer = LETTERS[choices.index(answer)]
    return _question(stem, entry["solution"], answer, choices)


def _alpaca(entry) -> dict:
    outputs = {entry["generator"]: entry["output"]}
    return {"question": entry["instruction"], "subset": entry["dataset"], "outputs": outputs}


def _arena(entry) -> dict:
    instruction = {"question": entry["turns"][0]["content"], "cluster": entry["cluster"]}
    return {"id": entry["question_id"], **instruction, "outputs": {}}


def _hh(entry) -> dict | None:
    """Of two conversations that are the same up to their last, different replies."""
    turn = "\n\nAssistant:"
    halves = [entry[key].rpartition(turn) for key in ("chosen", "rejected")]
    (before, _, chosen), (other, _, rejected) = halves
    chosen, rejected = chosen.strip(), rejected.strip()
    if not before or before != other or not chosen or not rejected or chosen == rejected:
        return None
    return {"prompt": before + turn, "chosen": chosen, "rejected": rejected}


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    answer: kind of its answers, see `answers.KINDS`, or "" where a judge is needed. Questions with
        options are choices whatever stands here (a quarter of TabMWP).
    hub, config, folder, file, revision: what `datasets.load_dataset` gets, as the hub id, its
        name, data_dir, one JSON file of the repository, and the git commit.
    row: the converter of its entries.
    train, test: the hub's names of our two splits; None where it has none.
    worked: whether the solution is a derivation, to be learned whole. Otherwise it is a list of
        statements, one a line, of which a profile's `explain` says how many to learn.
    """

    answer: str
    hub: str
    row: Callable[[dict], dict | None]
    revision: str | None = None
    config: str | None = None
    folder: str | None = None
    file: str | None = None
    train: str | None = "train"
    test: str = "test"
    worked: bool = False


BENCHMARKS = {
    # ECQA (Aggarwal et al. 2021) on CommonsenseQA's questions.
    "ecqa": Benchmark("choice", "yangdong/ecqa", _ecqa),
    # QASC (arXiv 1910.11473); several projects' pin, among them training mixtures.
    "qasc": Benchmark("choice", "allenai/qasc", _qasc,
        "a34ba204eb9a33b919c10cc08f4f1c8dae5ec070", test="validation"),
    # OpenBookQA (arXiv 1809.02789); pinned by lighteval's task lists.
    "openbookqa": Benchmark("choice", "allenai/openbookqa", _openbookqa,
        "388097ea7776314e93a529163e0fea805b8a6454", config="main"),
    # StrategyQA (arXiv 2101.02235), a split of its labelled questions; the hub shows this commit.
    "strategyqa": Benchmark("yes_no", "ChilleD/StrategyQA", _strategyqa,
        "705562638fe1d8ca6bb98c66fc8f94d45fda8c83"),
    # GSM8k (arXiv 2110.14168); pinned by inspect_evals.
    "gsm8k": Benchmark("number", "openai/gsm8k", _gsm8k,
        "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", config="main", worked=True),
    # MATH (arXiv 2103.03874); pinned by inspect_evals.
    "math": Benchmark("latex", "DigitalLearningGmbH/MATH-lighteval", _math,
        "0530c78699ea5e8eb5530600900e1f328b48acad", config="default", worked=True),
    # MAWPS (Koncel-Kedziorski et al. 2016), without training problems close to test ones.
    "mawps": Benchmark("number", "MU-NLPC/Calc-mawps", _mawps,
        "38c10053efeafd20ab6ff4e08c3ec17de26c19b7", config="default", worked=True),
    # TabMWP (arXiv 2209.14610); this copy holds test problems only.
    "tabmwp": Benchmark("number", "Arietem/tabmwp", _tabmwp,
        train=None, test="train", worked=True),
    # AlpacaEval 2.0 (arXiv 2404.04475) with the outputs of its reference model.
    "alpaca_eval": Benchmark("", "tatsu-lab/alpaca_eval", _alpaca,
        "2edc6fad8be6b14ea7230aabfd08188da6b8b814", file="alpaca_eval_gpt4_baseline.json",
        train=None, test="train"),
    # Arena-Hard 0.1 (arXiv 2406.11939), without outputs.
    "arena_hard": Benchmark("", "lmarena-ai/arena-hard-auto-v0.1", _arena,
        "2a69efe86cff85c593cfd4c2b4491c128e52c6f1", train=None, test="train"),
    # The helpful part of HH-RLHF (arXiv 2204.05862).
    "hh_helpful": Benchmark("", "Anthropic/hh-rlhf", _hh,
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", folder="helpful-base"),
}  # fmt: skip


# --- reading -------------------------------------------------------------------------------------


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
        rows = [_parsed(line, f"{source}, line {i}") for i, line in lines if line.strip()]
    else:
        source, rows = f"{name} {split} of the hub", load_from_hub(name, split)
        for row in rows:
            check_row(row, row.get("id", source))
    if not rows:
        raise AlloError(f"{source} holds no rows; expected one JSON object a line")
    counts = collections.Counter(row["id"] for row in rows if "question" in row)
    for row_id, count in counts.most_common(1):
        if count > 1:
            raise AlloError(f"{source}: id {short(row_id)} occurs twice; expected one row an id")
    return rows


def _data_file(folder: Path, name: str, split: str) -> Path:
    for path in (folder / name / f"{split}.jsonl", folder / name / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    raise _absent(name, f"has no {split}.jsonl or {split}.jsonl.gz in {folder / name}")


def _absent(name: str, reason: str) -> AlloError:
    hub = BENCHMARKS[name].hub if name in BENCHMARKS else f"which has {', '.join(BENCHMARKS)}"
    return AlloError(
        f"data set {name!r} {reason}; there are two ways: a data folder, named with --data DIR or "
        f"the environment variable ALLO_DATA, or, with neither, the hub through `datasets` ({hub})"
    )


def text_of(path: Path) -> str:
    """Return the text of a file, unpacked if its name ends in .gz; AlloError if it has none."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise AlloError(
            f"{path} cannot be read: damaged, or not UTF-8 ({error}); restore or replace the file"
        ) from error


def _parsed(line: str, place: str) -> dict:
    try:
        row = json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise AlloError(f"{place}: not JSON ({error}); expected one object a line") from error
    check_row(row, place)
    return row


def _each_once(items: list[tuple]) -> dict:
    row = dict(items)
    if len(row) < len(items):  # `json` would take the last one in silence
        raise ValueError("a key is there twice")
    return row


def load_from_hub(name: str, split: str) -> list[dict]:
    """Return all rows of "train" or "test", unchecked.

    Raises:
        AlloError: no such data set or split on the hub, no way to it, or columns of another form.
    """
    benchmark = BENCHMARKS.get(name)
    its_split = benchmark and {"train": benchmark.train, "test": benchmark.test}.get(split)
    if not its_split:
        raise _absent(name, f"has no split {split!r} on the hub")
    import datasets  # slow to load

    path, revision = benchmark.hub, benchmark.revision
    settings = dict(name=benchmark.config, data_dir=benchmark.folder, revision=revision)
    if benchmark.file:
        # The repository also holds a script, which `datasets` refuses; the file alone is JSON.
        path, settings = "json", {"data_files": f"hf://datasets/{path}@{revision}/{benchmark.file}"}
    try:
        rows = map(benchmark.row, datasets.load_dataset(path, split=its_split, **settings))
        return [
            row if "prompt" in row else {"id": f"{name}-{split}-{number}"} | row
            for number, row in enumerate(rows)
            if row is not None
        ]
    except Exception as error:
        # Every layer below (http, cache, parquet) has exceptions of its own; columns of another
        # form give those of the converters.
        reason = " ".join(repr(error).split())[:200]
        raise _absent(name, f"cannot be read from the hub ({reason})") from error


# --- checking ------------------------------------------------------------------------------------


# JSON can spell half of a surrogate pair, which no tokenizer takes: `Text` refuses it.
Filled = Annotated[Text, Field(min_length=1)]


class InstructionRow(BaseModel):
    """What a judge compares replies to; `outputs` are others' replies by model."""

    id: Filled
    question: Filled
    outputs: dict[Text, Text]


class PreferenceRow(BaseModel):
    """A human comparison of two replies."""

    prompt: Filled
    chosen: Filled
    rejected: Filled


class QuestionRow(BaseModel):
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
        if self.answer not in tuple(LETTERS[: len(self.choices)]):
            raise ValueError("expected an answer that is the letter of one of the choices")
        # `tasks.prompt` takes the options off the end again; without them, the question.
        end = "\n" + "\n".join(options(self.choices))
        if not self.question.endswith(end) or not self.question.removesuffix(end).strip():
            raise ValueError(f"expected a question that ends in its options, {short(end)}")
        return self


def check_row(row, place: str = "row") -> None:
    """Raise AlloError, naming `place`, unless `row` is well-formed: one of the three kinds."""
    keys = row if isinstance(row, dict) else ()
    kind = QuestionRow
    if "question" not in keys and "prompt" in keys:
        kind = PreferenceRow
    elif "outputs" in keys and "answer" not in keys:
        kind = InstructionRow
    try:
        kind.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "row"
        message = first["msg"].removeprefix("Value error, ")
        raise AlloError(f"{place}: {where}: {message}; given {short(first['input'])}") from error


def data_hash(rows: list[dict]) -> str:
    """SHA-256 (hexadecimal) over rows as canonical JSON, one a line; order of rows counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
