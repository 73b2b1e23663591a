"""Preference pairs as people have them, in all forms of TRL's columns, to token ids.

The forms: strings or chat messages; the prompt in a column of its own or as what both replies begin
with. Prompt and reply are encoded together and parted after what the prompt alone has in common
with that, as TRL 1.16 does, so that both are read as at inference. A response ends as the chat
template ends a turn; the blank that a template puts behind its end token is no part of it.
"""

import contextlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from allo_lib.engine import encoding, rewriter
from allo_lib.engine.batching import shared_length
from allo_lib.engine.encoding import BEFORE_A_REPLY, check_messages, encode_chat, encode_text
from allo_lib.errors import AlloError

SIDES = ("chosen", "rejected")
COLUMNS = ("prompt", *SIDES)
# Of messages, beside their content: what templates write only if they know of it.
_WRITTEN = ("tool_calls", "reasoning_content", "thinking")
_OF_EACH = ("rows", "numbers", "corrections")
_EXPECTED = (
    "expected one split of a datasets.Dataset, or a list of dicts, with the columns "
    + ", ".join(COLUMNS)
)


@dataclass(frozen=True)
class Preference:
    """A pair as token ids (`prompt`, `chosen`, `rejected`) and the texts of its two replies.

    merged: the prompt alone does not end as it does before a reply; what differs counts to those.
    """

    ids: dict[str, list[int]]
    texts: dict[str, str]
    merged: bool


def read_rows(pairs) -> list[dict]:
    """The pairs as dicts with both replies; AlloError for anything else."""
    if not isinstance(pairs, Iterable):
        raise AlloError(f"align: pairs is a {type(pairs).__name__}; {_EXPECTED}")
    rows = list(pairs)
    if not rows:
        raise AlloError("align: no pairs were given; expected at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise AlloError(f"align: pair {number} is a {kind}, not a dict; {_EXPECTED}")
        missing = [name for name in SIDES if name not in row]
        if missing:
            raise AlloError(
                f"align: pairs lack the column {missing[0]!r} (pair {number}); expected "
                f"{', '.join(COLUMNS)}"
            )
    return [dict(row) for row in rows]


@dataclass
class Given:
    """The pairs that are used, as token ids, and what becomes of the others.

    longest: tokens of a row at most. numbers: of these pairs among those given. corrections: of
    each the rows of the rewriting reward model, to train it and to ask it; None where they do not
    fit. overlong: numbers of the pairs that are too long. merged: how many have a prompt that ends
    otherwise before a reply than alone. count: of the pairs that were given.
    """

    longest: int
    rows: list[dict] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    corrections: list[tuple[dict, dict] | None] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    merged: int = 0
    count: int = 0

    def split(self, share: float, seed: int) -> "tuple[Given, Given]":
        """(the others, a share of the pairs), drawn by prompt: none stands on both sides."""
        of_prompt: dict[tuple, list[int]] = {}
        for place, row in enumerate(self.rows):
            of_prompt.setdefault(tuple(row["prompt"]), []).append(place)
        prompts, drawn = list(of_prompt.values()), set()
        random.Random(seed).shuffle(prompts)
        while prompts and len(drawn) < share * len(self.rows):
            drawn.update(prompts.pop())
        others = [place for place in range(len(self.rows)) if place not in drawn]
        return self._only(others), self._only(sorted(drawn))

    def _only(self, places: list[int]) -> "Given":
        kept = {key: [getattr(self, key)[place] for place in places] for key in _OF_EACH}
        return replace(self, **kept)


def read_pairs(tokenizer, pairs, context: int | None, max_length: int | None, overlong: str):
    """The pairs as `Given`.

    context: tokens that the model reads at most; max_length: of a row at most; None for no limit,
    but not both. overlong: what becomes of longer pairs, "drop" or "raise".

    Raises:
        AlloError: what `read_rows` and `encode_preference` raise, a pair that is longer, if those
            are to be raised, and none that fits.
    """
    found = Given(min(length for length in (context, max_length) if length))
    given, too_long = read_rows(pairs), []
    for number, row in enumerate(given):
        place = f"align: pair {number}"
        pair = encode_preference(tokenizer, row, place)
        length = len(pair.ids["prompt"]) + max(len(pair.ids[side]) for side in SIDES)
        if length > found.longest:
            told = f"{place}: {length} tokens, but the longest row is {found.longest}; shorten the "
            too_long.append(AlloError(f"{told}prompt or leave the pair out"))
            found.overlong.append(number)
            continue
        found.merged += pair.merged
        found.rows.append(pair.ids)
        found.numbers.append(number)
        found.corrections.append(_correction(tokenizer, pair, context or found.longest))
    if too_long and (overlong == "raise" or not found.rows):
        raise too_long[0]
    found.count = len(given)
    return found


def _correction(tokenizer, pair: "Preference", longest: int) -> tuple[dict, dict] | None:
    """The rows by which the reward model learns of this pair and is asked about it."""
    heading = rewriter.heading(pair.texts["chosen"], pair.texts["rejected"])
    asked = pair.ids["prompt"] + encode_text(tokenizer, heading)
    if len(asked) + max(len(pair.ids[side]) for side in SIDES) > longest:
        return None
    learnt, read = ({"prompt": asked, "response": pair.ids[side]} for side in SIDES)
    return learnt, read


def encode_preference(tokenizer, row: dict, place: str) -> Preference:
    """One pair as token ids.

    row: `chosen` and `rejected`, and `prompt` unless both begin with it; for chat messages also
    `tools` (a list, or its JSON) and `chat_template_kwargs`, as TRL has them.

    Raises:
        AlloError: what cannot be encoded, a special token's name in a string, replies that are
            equal or follow different conversations, a prompt without tokens, or something in the
            messages that the chat template leaves out; `place` names the pair.
    """
    if all(isinstance(row[key], str) for key in COLUMNS if key in row):
        preference = _of_strings(tokenizer, row, place)
    else:
        preference = _of_messages(tokenizer, row, place)
    if preference.ids["chosen"] == preference.ids["rejected"]:
        raise AlloError(f"{place}: chosen equals rejected; leave the pair out")
    if not preference.ids["prompt"]:
        raise AlloError(
            f"{place}: the prompt has no tokens of its own; give one or leave the pair out"
        )
    return preference


def _of_strings(tokenizer, row: dict, place: str) -> Preference:
    if row.get("tools"):
        raise AlloError(f"{place}: tools need chat messages, whose template writes them")
    texts = {side: row[side] for side in SIDES}
    if "prompt" in row:
        prompt = row["prompt"]
    else:  # the characters that both begin with, as TRL's extract_prompt
        prompt = texts["chosen"][: shared_length(*texts.values())].removesuffix(" ")
        texts = {side: text[len(prompt) :] for side, text in texts.items()}
    begin, bos = encoding.beginning(tokenizer), tokenizer.bos_token
    if bos and prompt.startswith(bos):
        begin, prompt = begin or [tokenizer.bos_token_id], prompt.removeprefix(bos)
    for key, text in {"prompt": prompt, **texts}.items():
        _refuse_special(tokenizer, text, f"{place}: the {key} string")
    head = _told(f"{place}, prompt", encode_text, tokenizer, prompt)
    joints = []
    for side, text in texts.items():
        apart = head + _told(f"{place}, {side}", encode_text, tokenizer, text)
        joint = encode_text(tokenizer, prompt + text)
        # A vocabulary of words may know the last and the first word, but not both as one.
        unknown = tokenizer.unk_token_id
        joint = apart if joint.count(unknown) > apart.count(unknown) else joint
        joints.append([*begin, *joint, tokenizer.eos_token_id])
    return _parted([*begin, *head], joints, texts)


def _of_messages(tokenizer, row: dict, place: str) -> Preference:
    prompt, replies = _conversation(tokenizer, row, place)
    settings = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        settings["tools"] = _tools(row["tools"], place)
    where = f"{place}, prompt"
    ask = settings | {"add_generation_prompt": True}
    head = _told(where, encode_chat, tokenizer, prompt, **ask)
    if row.get("tools"):
        without = encode_chat(tokenizer, prompt, **ask | {"tools": None})
        _refuse_left_out(head == without, where, "tools")
    for number, message in enumerate(prompt):
        if message["role"] not in ("user", "assistant"):
            other = [*prompt]
            other[number] = message | {"content": message["content"] + "x"}
            same = head == _told(where, encode_chat, tokenizer, other, **ask)
            _refuse_left_out(same, where, f"messages of role {message['role']!r}")
    for message in (*prompt, *replies.values()):
        for key in _WRITTEN:
            if key in message:
                asked = {"role": "user", "content": "x"}
                with_it, without = (
                    _told(place, encode_chat, tokenizer, [asked, one], **settings)
                    for one in (message, {k: v for k, v in message.items() if k != key})
                )
                _refuse_left_out(with_it == without, place, key)
    joints = [
        _told(f"{place}, {side}", encode_chat, tokenizer, [*prompt, reply], **settings)
        for side, reply in replies.items()
    ]
    found = _parted(head, joints, {})
    for side, reply in replies.items():
        ids = found.ids[side] = _ended(tokenizer, found.ids[side])
        plain = not any(key in reply for key in _WRITTEN)
        found.texts[side] = (
            reply["content"] if plain else tokenizer.decode(ids, skip_special_tokens=True)
        )
    return found


def _parted(head: list[int], joints: list[list[int]], texts: dict[str, str]) -> Preference:
    cut = min(shared_length(head, joint) for joint in joints)
    replies = {side: joint[cut:] for side, joint in zip(SIDES, joints, strict=True)}
    return Preference({"prompt": head[:cut]} | replies, texts, cut < len(head))


def _ended(tokenizer, ids: list[int]) -> list[int]:
    """A response up to the last token of the template's own; the end token if it writes none."""
    own = encoding.added_tokens(tokenizer)
    past = max((place + 1 for place, token in enumerate(ids) if token in own), default=0)
    if past and not tokenizer.decode(ids[past:]).strip():
        return ids[:past]
    return [*ids, tokenizer.eos_token_id]


def _conversation(tokenizer, row: dict, place: str) -> tuple[list[dict], dict[str, dict]]:
    """The messages of the prompt, and the reply of each side as one message."""
    prompt = row.get("prompt")
    for key in COLUMNS:
        if isinstance(row.get(key), str):
            _refuse_special(tokenizer, row[key], f"{place}: the {key} string")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if "prompt" in row:
        asked = _told(f"{place}, prompt", _checked, asked, BEFORE_A_REPLY)
    replies, inside = {}, {}
    for side in SIDES:
        given = row[side]
        given = [{"role": "assistant", "content": given}] if isinstance(given, str) else given
        *before, replies[side] = _told(f"{place}, {side}", _checked, given, ("assistant",))
        inside[side] = before
        if not before or "prompt" not in row:
            continue
        same = _turns(before) == _turns(asked)
        if isinstance(prompt, str):  # beside what the messages say once more, with all before it
            same = prompt.strip() in [message["content"].strip() for message in before]
        if not same:
            raise AlloError(
                f"{place}: {side} has {len(before)} messages before the reply that are not the "
                "prompt; put them into the prompt"
            )
    before = inside["chosen"] or inside["rejected"]
    if "prompt" not in row or all(inside.values()):
        if _turns(inside["chosen"]) != _turns(inside["rejected"]) or not before:
            raise AlloError(
                f"{place}: chosen and rejected do not follow the same messages; put those before "
                "the reply into the prompt"
            )
    prompt = before if before and ("prompt" not in row or isinstance(prompt, str)) else asked
    return _told(f"{place}, prompt", _checked, prompt, BEFORE_A_REPLY), replies


def _tools(given, place: str) -> list:
    with contextlib.suppress(ValueError):
        tools = json.loads(given) if isinstance(given, str) else given
        if isinstance(tools, list):
            return tools
    raise AlloError(f"{place}: tools is no list; expected a list of JSON schemas, or its JSON")


def _checked(messages, last: tuple[str, ...]) -> list[dict]:
    """Messages without what is None, as columns of data sets have it; a call needs no content."""
    if isinstance(messages, (list, tuple)):
        messages = [_filled(message) for message in messages]
    check_messages(messages, last)
    return list(messages)


def _filled(message):
    if not isinstance(message, dict):
        return message
    kept = {key: value for key, value in message.items() if value or key not in _WRITTEN}
    if "tool_calls" in kept and kept.get("content") is None:
        kept["content"] = ""
    return {k: v for k, v in kept.items() if v is not None or k in ("role", "content")}


def _turns(messages) -> list[tuple]:
    return [(message["role"], message["content"]) for message in messages]


def _refuse_special(tokenizer, text: str, what: str) -> None:
    found = encoding.special_tokens_in(tokenizer, text)
    if found:
        raise AlloError(
            f"{what} contains the special token {found[0]!r}; give chat messages, whose template "
            "writes such tokens and whose content is read as plain text, or take it out"
        )


def _refuse_left_out(is_left_out: bool, place: str, what: str) -> None:
    if is_left_out:
        raise AlloError(
            f"{place}: the tokenizer's chat template leaves out {what}; expected one that writes "
            "them: take them out of the pairs, or set tokenizer.chat_template"
        )


def _told(place: str, encode, *arguments, **settings):
    """What `encode` gives; its AlloError with the place before it."""
    try:
        return encode(*arguments, **settings)
    except AlloError as error:
        raise AlloError(f"{place}: {error}") from error
