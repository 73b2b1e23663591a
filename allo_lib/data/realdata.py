"""Real questions, instructions and human preferences: reading and checking their rows.

A data folder holds `<name>/<split>.jsonl` or `.jsonl.gz`, one JSON object a line (UTF-8):
questions as {id, question, solution, answer, choices}, instructions as {id, question, outputs},
preferences as {prompt, chosen, rejected}. `question` is the text with its options, `(A) ...`, one a
line; `answer` is the letter, and where `choices` is null the answer itself; `solution` is the human
explanation or null; `outputs` are others' responses by the names of their models. Without a folder
the same rows are made from the hub's copies.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from pathlib import Path

from allo_lib.data import hub
from allo_lib.data.answers import LETTERS
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.errors import AlloError

QUESTION_FIELDS = ("id", "question", "solution", "answer", "choices")
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")
INSTRUCTION_FIELDS = ("id", "question", "outputs")


# --- reading -----------------------------------------------------------------------------------


def load_rows(name, split, data_dir=None) -> list[dict]:
    """All rows of one split, checked.

    Args:
        name: folder name, such as "ecqa" or "hh_helpful".
        split: "train" or "test".
        data_dir: the data folder; default the environment variable ALLO_DATA; without either the
            hub's copy is read through `datasets`.

    Raises:
        AlloError: nothing there (both ways are named), or a malformed row (file and line named).
    """
    folder = data_dir or os.environ.get("ALLO_DATA")
    if not folder:
        rows = hub.load(name, split)
        for row in rows:
            check_row(row, row.get("id", f"{name} {split} of the hub"))
        _check_ids(rows, f"{name} {split} of the hub")
        return rows
    path = _data_file(Path(folder).expanduser(), name, split)
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}"))
            if ("question" in rows[-1]) != ("question" in rows[0]):
                raise AlloError(
                    f"{path}, line {number}: questions and preferences in one file; give each "
                    "data set one kind"
                )
    if not rows:
        raise AlloError(f"{path} holds no rows; expected one JSON object a line")
    _check_ids(rows, path)
    return rows


def _data_file(folder: Path, name, split) -> Path:
    for path in (folder / name / f"{split}.jsonl", folder / name / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    state = "has no such file" if folder.is_dir() else "does not exist"
    raise AlloError(
        f"data folder {folder} {state}: expected {name}/{split}.jsonl or {name}/{split}.jsonl.gz; "
        + hub.both_ways(name)
    )


def text_of(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz; AlloError where it cannot be read."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise AlloError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AlloError(f"{path} cannot be read ({error}); restore or replace the file") from error


def _parse(line, place) -> dict:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AlloError(f"{place}: not JSON ({error}); expected one object a line") from error
    check_row(row, place)
    return row


def _unique(pairs) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_short(twice)} is there twice")
    return row


def check_row(row, place="row") -> None:
    """Raise AlloError, naming `place`, unless `row` is well-formed: one of the three kinds."""
    if not isinstance(row, dict):
        raise AlloError(f"{place}: {type(row).__name__}, expected a JSON object")
    preference = any(key in row for key in PREFERENCE_FIELDS) and "question" not in row
    instruction = "outputs" in row and "answer" not in row
    fields = QUESTION_FIELDS
    if preference or instruction:
        fields = PREFERENCE_FIELDS if preference else INSTRUCTION_FIELDS
    missing = [key for key in fields if key not in row]
    if missing:
        raise AlloError(f"{place}: no {', '.join(missing)}; expected the keys {', '.join(fields)}")
    for key in fields:
        if key not in ("solution", "choices", "outputs") and not _filled(row[key]):
            raise AlloError(
                f"{place}: {key} is {_short(row[key])}, expected non-empty text of valid Unicode"
            )
    if preference and row["chosen"] == row["rejected"]:
        raise AlloError(f"{place}: chosen equals rejected; drop the row or correct one of them")
    if instruction and not preference:
        _check_outputs(row["outputs"], place)
    elif not preference:
        _check_question(row, place)


def _check_outputs(outputs, place) -> None:
    texts = [*outputs, *outputs.values()] if isinstance(outputs, dict) else [None]
    if not all(_is_text(text) for text in texts):
        raise AlloError(
            f"{place}: outputs is {_short(outputs)}, expected an object of responses by model"
        )


def _check_question(row, place) -> None:
    solution, choices, answer = row["solution"], row["choices"], row["answer"]
    if solution is not None and not _is_text(solution):
        raise AlloError(f"{place}: solution is {_short(solution)}, expected a string or null")
    if choices is None:
        return
    if not (isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS)):
        raise AlloError(f"{place}: choices is {_short(choices)}, expected null or 2 to 26 strings")
    if not all(_filled(choice) for choice in choices):
        raise AlloError(f"{place}: an option is empty or no string, expected non-empty strings")
    if answer not in LETTERS[: len(choices)] or len(answer) != 1:
        raise AlloError(
            f"{place}: answer is {_short(answer)}, expected a letter from A to "
            f"{LETTERS[len(choices) - 1]}, one for each option"
        )
    # `questions.prompt` takes the options off the end again; without them, the question.
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    options = "\n" + "\n".join(lines)
    if not _filled(row["question"].removesuffix(options)) or not row["question"].endswith(options):
        raise AlloError(
            f"{place}: question is {_short(row['question'])}, expected a text and then its "
            f"options, one a line, from {_short(lines[0])} to {_short(lines[-1])}"
        )


def _check_ids(rows, path) -> None:
    seen = set()
    for row in rows:
        if "question" in row:
            if row["id"] in seen:
                raise AlloError(
                    f"{path}: id {_short(row['id'])} occurs twice; expected one row an id"
                )
            seen.add(row["id"])


def _filled(value) -> bool:
    return _is_text(value) and bool(value.strip())


def _is_text(value) -> bool:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def data_hash(rows) -> str:
    """SHA-256 (hexadecimal) over rows as canonical JSON, one a line; order of rows counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


# --- preferences -------------------------------------------------------------------------------


def preference_pairs(rows, tokenizer=None, max_tokens=None):
    """Preference rows as a `datasets.Dataset` with TRL's columns prompt, chosen, rejected.

    With a tokenizer that has a chat template, prompts in the `\\n\\nHuman: ... \\n\\nAssistant:`
    form become chat messages and both replies one assistant message each; else all stay strings, a
    reply to that form with a blank before it. Pairs of which prompt and longer reply, end token
    included, exceed `max_tokens` are dropped, and a warning says how many.

    Raises:
        AlloError: no pair left, `max_tokens` without a tokenizer, or a malformed row or prompt.
    """
    import datasets

    for number, row in enumerate(rows):
        check_row(row, f"pair {number}")
        if "question" in row:
            raise AlloError(
                f"pair {number} is a question; expected the keys {', '.join(PREFERENCE_FIELDS)}"
            )

    if max_tokens is not None and tokenizer is None:
        raise AlloError(f"max_tokens={max_tokens} without a tokenizer: give the one to count with")
    chat = tokenizer is not None and getattr(tokenizer, "chat_template", None)
    pairs = [_chat_pair(row) if chat else _plain_pair(row) for row in rows]
    if max_tokens is not None:
        pairs = [pair for pair in pairs if pair_tokens(pair, tokenizer) <= max_tokens]
    if not pairs:
        if not rows:
            raise AlloError("no preference pairs were given; expected at least one")
        raise AlloError(
            f"none of {len(rows)} pairs has at most {max_tokens} tokens; raise the limit"
        )
    if len(pairs) < len(rows):
        dropped = len(rows) - len(pairs)
        logging.getLogger(__name__).warning(
            "%d of %d pairs dropped: longer than %d tokens", dropped, len(rows), max_tokens
        )
    return datasets.Dataset.from_list(pairs)


def pair_tokens(pair, tokenizer) -> int:
    """Tokens of a pair's prompt with its longer reply, end token included, as the model sees it."""
    prompt = len(encode_prompt(tokenizer, pair["prompt"]))
    return prompt + max(len(encode_response(tokenizer, pair[key])) for key in PREFERENCE_FIELDS[1:])


def helpful_prompt(text) -> list[dict]:
    """Chat messages of a conversation in the `\\n\\nHuman: ... \\n\\nAssistant:` form.

    The form ends in an open Assistant turn; the messages end with the human turn before it. Turns
    of one speaker in a row, as a few prompts have them, become one message.

    Raises:
        AlloError: the text does not start with a human turn or not end in an open Assistant turn.
    """
    parts = re.split(r"\n\n(Human|Assistant):", text)
    speakers, turns = parts[1::2], [turn.strip() for turn in parts[2::2]]
    messages = []
    for speaker, turn in zip(speakers[:-1], turns[:-1], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{turn}".strip()
        else:
            messages.append({"role": role, "content": turn})
    is_open = speakers[-1:] == ["Assistant"] and not turns[-1]
    roles = [message["role"] for message in messages]
    by_turns = roles[:1] == ["user"] and roles[-1:] == ["user"]
    if parts[0].strip() or not is_open or not by_turns:
        raise AlloError(
            f"prompt {_short(text)}: expected '\\n\\nHuman: ...' first, and the open turn "
            "'\\n\\nAssistant:' after a human one last"
        )
    if not all(message["content"] for message in messages):
        raise AlloError(f"prompt {_short(text)}: an empty turn; expected text in each")
    return messages


def _chat_pair(row) -> dict:
    if not _is_conversation(row):
        return _plain_pair(row)
    replies = {
        key: [{"role": "assistant", "content": row[key].strip()}] for key in ("chosen", "rejected")
    }
    return {"prompt": helpful_prompt(row["prompt"]), **replies}


def _plain_pair(row) -> dict:
    # A conversation's prompt ends in "Assistant:"; the blank after it belongs to the reply.
    space = " " if _is_conversation(row) else ""
    replies = {key: space + row[key] for key in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **replies}


def _is_conversation(row) -> bool:
    return row["prompt"].startswith("\n\nHuman:")
