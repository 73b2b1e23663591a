"""Real questions and human preferences: reading them, prompting, and judging answers.

A data folder holds `<name>/<split>.jsonl` or `.jsonl.gz`, one JSON object a line (UTF-8):
questions as {id, question, solution, answer, choices}, preferences as {prompt, chosen, rejected}.
`question` is the text with its options, `(A) ...`, one a line; `answer` is the letter; `solution`
is the human explanation or null. Without a folder the same rows are made from the hub's copies.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from pathlib import Path

from allo_lib.encoding import encode_prompt, encode_response
from allo_lib.errors import AlloError

QUESTION_FIELDS = ("id", "question", "solution", "answer", "choices")
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKER = "The answer is"

# name -> (hub id, data_dir), read with `datasets.load_dataset`.
HUB = {
    "ecqa": ("yangdong/ecqa", None),
    "hh_helpful": ("Anthropic/hh-rlhf", "helpful-base"),
}


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
        return _load_from_hub(name, split)
    path = _data_file(Path(folder).expanduser(), name, split)
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
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
        + _both_ways(name)
    )


def _both_ways(name) -> str:
    hub = HUB[name][0] if name in HUB else f"it has {', '.join(HUB)} here"
    return (
        "there are two ways: a data folder named with --data DIR or the environment variable "
        f"ALLO_DATA, or, with neither, the hub through `datasets` ({hub})"
    )


def _text(path: Path) -> str:
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
    """Raise AlloError, naming `place`, unless `row` is a well-formed question or preference."""
    if not isinstance(row, dict):
        raise AlloError(f"{place}: {type(row).__name__}, expected a JSON object")
    preference = any(key in row for key in PREFERENCE_FIELDS) and "question" not in row
    fields = PREFERENCE_FIELDS if preference else QUESTION_FIELDS
    missing = [key for key in fields if key not in row]
    if missing:
        raise AlloError(f"{place}: no {', '.join(missing)}; expected the keys {', '.join(fields)}")
    for key in fields:
        if key not in ("solution", "choices") and not _filled(row[key]):
            raise AlloError(
                f"{place}: {key} is {_short(row[key])}, expected non-empty text of valid Unicode"
            )
    if preference and row["chosen"] == row["rejected"]:
        raise AlloError(f"{place}: chosen equals rejected; drop the row or correct one of them")
    if not preference:
        _check_question(row, place)


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
    # `_stem` takes the options off the end again; without them it would take the question.
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


# --- the hub -----------------------------------------------------------------------------------


def _load_from_hub(name, split) -> list[dict]:
    if name not in HUB:
        raise AlloError(f"data set {name!r} is not there: {_both_ways(name)}")
    import datasets

    path, inner = HUB[name]
    try:
        table = datasets.load_dataset(path, data_dir=inner, split=split)
    except Exception as error:
        # Every layer below (http, cache, parquet) has exceptions of its own.
        reason = " ".join(str(error).split())[:200]
        raise AlloError(
            f"data set {name!r} cannot be read from the hub ({reason}); {_both_ways(name)}"
        ) from error
    convert = ecqa_row if name == "ecqa" else hh_row
    try:
        rows = [convert(entry, f"{name}-{split}-{i}") for i, entry in enumerate(table)]
    except (KeyError, TypeError, AttributeError) as error:
        raise AlloError(
            f"data set {name!r} of the hub has columns of another form ({_short(error)}); "
            f"{_both_ways(name)}"
        ) from error
    rows = [row for row in rows if row is not None]
    for row in rows:
        check_row(row, row.get("id", f"{path} {split}"))
    return rows


def ecqa_row(entry, row_id) -> dict | None:
    """One ECQA entry of the hub as a question row; None if its answer is not exactly one option."""
    choices = [entry[f"q_op{i}"] for i in range(1, 6)]
    if choices.count(entry["q_ans"]) != 1:
        return None
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    statements = [line.strip() for line in (entry["taskA_pos"] or "").split("\n")]
    return {
        "id": row_id,
        "question": "\n".join([entry["q_text"], *lines]),
        "solution": "\n".join(filter(None, statements)) or None,
        "answer": LETTERS[choices.index(entry["q_ans"])],
        "choices": choices,
    }


def hh_row(entry, row_id=None) -> dict | None:
    """Two whole conversations as a preference row.

    None when they differ before the last reply, or when the last replies are empty or equal.
    """
    turn = "\n\nAssistant:"
    halves = [entry[key].rpartition(turn) for key in ("chosen", "rejected")]
    (before, _, chosen), (other, _, rejected) = halves
    chosen, rejected = chosen.strip(), rejected.strip()
    if not before or before != other or not chosen or not rejected or chosen == rejected:
        return None
    return {"prompt": before + turn, "chosen": chosen, "rejected": rejected}


# --- questions ---------------------------------------------------------------------------------


def qa_prompt(row, style="text") -> str:
    """The prompt of a multiple-choice question.

    style "text": the stem, the option texts on one line, and `Answer:`. Small models tell texts
    apart but not letters. style "letter": the paper's form, an instruction with lettered options
    that ends in "Let's think step by step.".
    """
    _check_style(style, row)
    if style == "letter":
        return (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{row['question']}\n\n"
            "### Response: Let's think step by step."
        )
    return f"{_stem(row)}\nOptions: {', '.join(row['choices'])}\nAnswer:"


def qa_target(row, style="text", explain=0) -> str:
    """The gold response, starting with a space, without the end token.

    `explain` statements of the human explanation (0 none, at most what there is; True is 1) come
    before `The answer is: <option>`.
    """
    _check_style(style, row)
    statements = [_sentence(line) for line in (row["solution"] or "").split("\n") if line.strip()]
    return " " + " ".join(statements[: int(explain)] + [_final(row, style)])


def read_choice(response, row, style="text") -> str | None:
    """Letter of the option that a response ends in, or None.

    Read strictly: the text after the last `The answer is:` up to the end must be one option, case,
    outer blanks and a last full stop aside.
    """
    _check_style(style, row)
    _, marker, given = response.rpartition(MARKER)
    if not marker or not given.startswith(":"):
        return None
    given = _plain(given[1:])
    names = [_option(row, i, style) for i in range(len(row["choices"]))]
    for index, option in enumerate(names):
        if given == _plain(option) or (style == "letter" and given == LETTERS[index].lower()):
            return LETTERS[index]
    return None


def is_right(row, response, style="text") -> bool:
    """Whether the response's final answer, read strictly, is the gold one."""
    return read_choice(response, row, style) == row["answer"]


def correction(row, response, style="text") -> str:
    """The response with as little changed as makes its final answer right.

    What follows the last `The answer is` is replaced by the gold option; a response without one
    gets it appended. Made from the gold answer alone, so an explanation before it stays as it was.
    """
    if is_right(row, response, style):
        return response
    before, marker, _ = response.rpartition(MARKER)
    if not marker:
        before = response.rstrip() + " "
    return before + _final(row, style)


def _final(row, style) -> str:
    _check_style(style, row)
    return f"{MARKER}: {_option(row, LETTERS.index(row['answer']), style)}"


def _option(row, index, style) -> str:
    text = row["choices"][index]
    return text if style == "text" else f"({LETTERS[index]}) {text}"


def _stem(row) -> str:
    # The options stand in the question too, one a line; they are always its last lines.
    return "\n".join(row["question"].split("\n")[: -len(row["choices"])])


def _sentence(line) -> str:
    line = " ".join(line.split())
    return line if line[-1] in ".!?" else line + "."


def _plain(text) -> str:
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().casefold()


def _check_style(style, row) -> None:
    if style not in ("text", "letter"):
        raise AlloError(f"style {style!r}: expected 'text' or 'letter'")
    if not row.get("choices"):
        raise AlloError(
            f"question {_short(row.get('id'))} has no options; expected multiple choice"
        )


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
