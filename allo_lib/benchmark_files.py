"""AlpacaEval's and Arena-Hard's files: outputs to be judged, and judgements of them.

Formats as read in the sources of tatsu-lab/alpaca_eval (cd543a1) and lmarena/arena-hard-auto
(196f6b8, and 9a1d386~1 for the older form); `judge_programs` has their programs judge.

Texts are written as ASCII JSON, because Arena-Hard's scripts open files in the encoding of the
machine. Files of two equal runs are equal: what those projects draw from the clock or at random,
and no script of theirs needs, is constant here or follows from the text.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from allo_lib.encoding import check_text
from allo_lib.errors import AlloError

# "messages": what arena-hard-auto reads since 2025-04-18; "choices": what it read before.
ARENA_FORMS = ("messages", "choices")
ARENA_BENCH = "arena-hard-v0.1"
STRONG = 3  # how often Arena-Hard counts a verdict such as A>>B
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]{0,99}")
_VERDICT = re.compile(r"([AB])(>>|>|=|<|<<)([AB])")


# --- AlpacaEval ----------------------------------------------------------------------------------


def write_alpaca_eval(path, rows: Sequence[dict], texts: Sequence[str], generator: str) -> Path:
    """`model_outputs.json`: a list of {dataset, instruction, output, generator}, one a row.

    Args:
        path: of the file; its folder is made.
        rows: instructions (`realdata.load_rows`); `subset` becomes `dataset`.
        texts: the responses, in the order of the rows.
        generator: name of the model.

    Raises:
        AlloError: unequal lengths, a text that is no valid Unicode, a name that no file could
            have, or an instruction that occurs twice (AlpacaEval matches outputs by instruction).
    """
    _check_outputs(rows, texts, generator)
    outputs = [
        {
            "dataset": row.get("subset", "alpaca_eval"),
            "instruction": row["question"],
            "output": text,
            "generator": generator,
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    return write_text(path, json.dumps(outputs, indent=2) + "\n")


def read_alpaca_eval(path) -> list[dict]:
    """The list in a `model_outputs.json`; AlloError where an entry lacks instruction or output."""
    outputs = parse_json(read_text(Path(path)), str(path))
    if not isinstance(outputs, list) or not outputs:
        raise AlloError(f"{path}: {short(outputs)}; expected a list of outputs")
    for number, entry in enumerate(outputs):
        for key in ("instruction", "output"):
            if not isinstance(entry, dict) or key not in entry:
                raise AlloError(f"{path}, entry {number}: no {key}; expected instruction, output")
            checked(entry[key], f"{path}, entry {number}, {key}")
    return outputs


def alpaca_outcomes(path, rows) -> dict[str, float]:
    """Outcomes in [0, 1] by row id from AlpacaEval's `annotations.json`; unjudged rows left out."""
    ids = {row["question"]: row["id"] for row in rows}
    found = parse_json(read_text(Path(path)), str(path))
    outcomes = {}
    for entry in found if isinstance(found, list) else [None]:
        if not isinstance(entry, dict) or "preference" not in entry:
            raise AlloError(f"{path}: {short(entry)}; expected entries with a preference")
        given = entry["preference"]
        instruction = entry.get("instruction")
        if given is None or not isinstance(instruction, str) or instruction not in ids:
            continue
        given = 1.5 if given == 0 else given  # 0 is an older sign for a draw
        if not isinstance(given, (int, float)) or not 1 <= given <= 2:
            raise AlloError(f"{path}: preference {short(given)}, expected a number from 1 to 2")
        outcomes[ids[instruction]] = given - 1.0
    return outcomes


# --- Arena-Hard ----------------------------------------------------------------------------------


def write_arena_hard(
    path, rows: Sequence[dict], texts: Sequence[str], model: str, *, form="messages", count=None
) -> Path:
    """`model_answer/<model>.jsonl`: one answer a line, in the order of the rows.

    form "messages" is what arena-hard-auto reads today: uid, ans_id, model, messages, tstamp.
    "choices" is what it read until April 2025: question_id, answer_id, model_id,
    choices [{index, turns: [{content, token_len}]}], tstamp.

    `tstamp` is 0, not the time, and the id of an answer follows from the answer: no script of
    theirs reads either, and two equal runs shall write equal files.

    Args:
        path, rows, texts, model: as for `write_alpaca_eval`; `id` is the question's.
        count: of "choices" only, text -> number of tokens, for the mean length that their table
            shows (they count with tiktoken); default: the key is left out.
    """
    if form not in ARENA_FORMS:
        raise AlloError(f"form {form!r}: expected one of {', '.join(ARENA_FORMS)}")
    _check_outputs(rows, texts, model)
    answers = []
    for row, text in zip(rows, texts, strict=True):
        name = hashlib.sha256(json.dumps([row["id"], model, text]).encode()).hexdigest()[:22]
        if form == "messages":
            said = [{"role": "user", "content": row["question"]}]
            said.append({"role": "assistant", "content": {"answer": text}})
            answer = {"uid": row["id"], "ans_id": name, "model": model, "messages": said}
        else:
            turn = {"content": text} | ({"token_len": count(text)} if count else {})
            choices = [{"index": 0, "turns": [turn]}]
            answer = {"question_id": row["id"], "answer_id": name, "model_id": model}
            answer["choices"] = choices
        answers.append(answer | {"tstamp": 0})
    return write_lines(path, answers)


def write_arena_questions(path, rows: Sequence[dict]) -> Path:
    """`question.jsonl` of Arena-Hard 0.1: uid, category, cluster and prompt, one row a line."""
    questions = [
        {
            "uid": row["id"],
            "category": ARENA_BENCH,
            "cluster": row.get("cluster", ""),
            "prompt": row["question"],
        }
        for row in rows
    ]
    return write_lines(path, questions)


def read_arena_hard(path) -> dict[str, str]:
    """Response by question id from an answer file of either form."""
    answers = {}
    for number, line in enumerate(read_text(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        row, place = parse_json(line, f"{path}, line {number}"), f"{path}, line {number}"
        try:
            if "uid" in row:
                key, text = row["uid"], row["messages"][-1]["content"]["answer"]
            else:
                key, text = row["question_id"], row["choices"][0]["turns"][0]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise AlloError(
                f"{place}: {short(line)}; expected uid with messages, or question_id with choices"
            ) from error
        answers[checked(key, place)] = checked(text, place)
    return answers


def arena_scores(path) -> dict[str, list[float]]:
    """Scores of our answers, by question id, from a judgement file of Arena-Hard's script."""
    scores = {}
    for number, line in enumerate(read_text(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = parse_json(line, place)
            verdicts = [game and game["score"] for game in row["games"]]
            key, (first, second) = row["uid"], verdicts
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AlloError):
                raise
            raise AlloError(f"{place}: {short(line)}; expected uid and two games") from error
        first, second = _for_a(first), _for_a(second)
        if first and second:  # ours is B in the first game and A in the second
            scores[checked(key, place)] = second + [1.0 - score for score in first]
    return scores


def _for_a(verdict) -> list[float]:
    found = _VERDICT.fullmatch(verdict) if isinstance(verdict, str) else None
    if not found or found[1] == found[3]:
        return []
    if found[2] == "=":
        return [0.5]
    winner = found[1] if found[2][0] == ">" else found[3]
    return [float(winner == "A")] * (STRONG if len(found[2]) == 2 else 1)


# --- files ---------------------------------------------------------------------------------------


def _check_outputs(rows, texts, name) -> None:
    if not rows or len(rows) != len(texts):
        raise AlloError(f"{len(texts)} texts for {len(rows)} rows; expected one for each, some")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AlloError(f"model name {short(name)}: expected letters, digits or _.+- for a file")
    seen = set()
    for row, text in zip(rows, texts, strict=True):
        for value in (row["id"], row["question"], text):
            checked(value, f"{name}, row {short(row['id'])}")
        if row["question"] in seen:
            raise AlloError(f"row {short(row['id'])}: its instruction occurs twice; leave one out")
        seen.add(row["question"])


def checked(value, place: str) -> str:
    """`value` if it is text of whole characters; AlloError naming `place` else."""
    try:
        check_text(value)
    except AlloError as error:
        raise AlloError(f"{place}: {error}") from None
    return value


def read_text(path: Path) -> str:
    """A UTF-8 file; AlloError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AlloError(f"{path} cannot be read ({reason}); restore or replace the file") from error


def parse_json(text: str, place: str):
    """The value of a JSON text without doubled keys or NaN; AlloError naming `place` else."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AlloError(f"{place}: not JSON ({error}); restore or replace the file") from error


def _unique(pairs) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def write_lines(path, rows: list[dict]) -> Path:
    """Write one JSON object a line."""
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path, text: str) -> Path:
    """Write a file so that it is at any moment the old one or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        raise AlloError(f"cannot write {path} ({reason}): free space or permit writing") from error
    return path


def short(value) -> str:
    """A value for a message: its representation on one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
