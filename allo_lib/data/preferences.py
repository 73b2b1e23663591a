"""Preference pairs for `align`, in all forms of TRL's columns, as token ids.

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


@dataclass
class Encoded:
    """The pairs that are used, as token ids, and what becomes of the others.

    longest: tokens of a row at most. rows: `prompt`, `chosen`, `rejected` of each pair as lists of
    ids. numbers: places of these pairs among all. corrections: of each the rows of the rewriting
    reward model, to train it and to read its probabilities; None where they do not fit. overlong:
    places of the pairs that are too long. merged: how many have a prompt that ends otherwise before
    a reply than alone. count: of all pairs.
    """

    longest: int
    rows: list[dict] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    corrections: list[tuple[dict, dict] | None] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    merged: int = 0
    count: int = 0

    def split(self, share: float, seed: int) -> "tuple[Encoded, Encoded]":
        """Return (the others, a share of the pairs), drawn by prompt: none stands on both sides."""
        of_prompt: dict[tuple, list[int]] = {}
        for place, row in enumerate(self.rows):
            of_prompt.setdefault(tuple(row["prompt"]), []).append(place)
        prompts, drawn = list(of_prompt.values()), set()
        random.Random(seed).shuffle(prompts)
        while prompts and len(drawn) < share * len(self.rows):
            drawn.update(prompts.pop())
        others = [place for place in range(len(self.rows)) if place not in drawn]
        return self._only(others), self._only(sorted(drawn))

    def _only(self, places: list[int]) -> "Encoded":
        lists = {"rows": self.rows, "numbers": self.numbers, "corrections": self.corrections}
        return replace(self, **{key: [one[i] for i in places] for key, one in lists.items()})


def read_pairs(
    tokenizer, pairs, context: int | None, max_length: int | None, overlong: str
) -> Encoded:
    """Encode all pairs of a dataset, or of a list of dicts.

    Args:
        tokenizer: of the model.
        pairs: rows with `chosen`, `rejected` and mostly `prompt`, see `encode_preference`.
        context: tokens that the model reads at most, None for no limit.
        max_length: tokens of a row at most, None for no limit other than `context`.
        overlong: what becomes of longer pairs, "drop" or "raise".

    Raises:
        AlloError: no pairs or something else, what `encode_preference` raises, a pair that is
            longer, if those are to be raised, and none that fits.
    """
    if not isinstance(pairs, Iterable):
        raise AlloError(f"align: pairs is a {type(pairs).__name__}; {_EXPECTED}")
    pairs, too_long = list(pairs), []
    if not pairs:
        raise AlloError("align: no pairs were given; expected at least one")
    result = Encoded(min(n for n in (context, max_length) if n), count=len(pairs))
    for number, row in enumerate(pairs):
        place = f"align: pair {number}"
        if not isinstance(row, Mapping):
            raise AlloError(f"{place} is a {type(row).__name__}, not a dict; {_EXPECTED}")
        for name in SIDES:
            if name not in row:
                raise AlloError(f"align: pairs lack the column {name!r} (pair {number}); "
                                f"expected {', '.join(COLUMNS)}")  # fmt: skip
        pair = encode_preference(tokenizer, dict(row), place)
        length = len(pair.ids["prompt"]) + max(len(pair.ids[side]) for side in SIDES)
        if length > result.longest:
            message = f"{place}: {length} tokens, but the longest row is {result.longest}; "
            too_long.append(AlloError(f"{message}shorten the prompt or leave the pair out"))
            result.overlong.append(number)
            continue
        result.merged += pair.merged
        result.rows.append(pair.ids)
        result.numbers.append(number)
        result.corrections.append(_correction(tokenizer, pair, context or result.longest))
    if too_long and (overlong == "raise" or not result.rows):
        raise too_long[0]
    return result


def _correction(tokenizer, pair: Preference, longest: int) -> tuple[dict, dict] | None:
    """Return the rows that train the reward model on this pair, and that ask it about it."""
    heading = rewriter.heading(pair.texts["chosen"], pair.texts["rejected"])
    prompt = pair.ids["prompt"] + encode_text(tokenizer, heading)
    if len(prompt) + max(len(pair.ids[side]) for side in SIDES) > longest:
        return None
    right, wrong = ({"prompt": prompt, "response": pair.ids[side]} for side in SIDES)
    return right, wrong


def encode_preference(tokenizer, row: dict, place: str) -> Preference:
    """Encode one pair.

    Args:
        tokenizer: of the model.
        row: `chosen` and `rejected`, and `prompt` unless both begin with it; for chat messages also
            `tools` (a list, or its JSON) and `chat_template_kwargs`, as TRL has them.
        place: names the pair in errors.

    Raises:
        AlloError: what cannot be encoded, a special token's name in a string, replies that are
            equal or follow different conversations, a prompt without tokens, or something in the
            messages that the chat template leaves out.
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
    head = _encoded(f"{place}, prompt", encode_text, tokenizer, prompt)
    joints = []
    for side, text in texts.items():
        apart = head + _encoded(f"{place}, {side}", encode_text, tokenizer, text)
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
    prompting = settings | {"add_generation_prompt": True}
    head = _encoded(where, encode_chat, tokenizer, prompt, **prompting)
    if row.get("tools"):
        without = encode_chat(tokenizer, prompt, **prompting | {"tools": None})
        _refuse_left_out(head == without, where, "tools")
    for number, message in enumerate(prompt):
        if message["role"] not in ("user", "assistant"):
            other = [*prompt]
            other[number] = message | {"content": message["content"] + "x"}
            same = head == _encoded(where, encode_chat, tokenizer, other, **prompting)
            _refuse_left_out(same, where, f"messages of role {message['role']!r}")
    for message in (*prompt, *replies.values()):
        for key in _WRITTEN:
            if key in message:
                question = {"role": "user", "content": "x"}
                written, without = (
                    _encoded(place, encode_chat, tokenizer, [question, one], **settings)
                    for one in (message, {k: v for k, v in message.items() if k != key})
                )
                _refuse_left_out(written == without, place, key)
    joints = [
        _encoded(f"{place}, {side}", encode_chat, tokenizer, [*prompt, reply], **settings)
        for side, reply in replies.items()
    ]
    pair = _parted(head, joints, {})
    for side, reply in replies.items():
        ids = pair.ids[side] = _ended(tokenizer, pair.ids[side])
        plain = not any(key in reply for key in _WRITTEN)
        pair.texts[side] = (
            reply["content"] if plain else tokenizer.decode(ids, skip_special_tokens=True)
        )
    return pair


def _parted(head: list[int], joints: list[list[int]], texts: dict[str, str]) -> Preference:
    cut = min(shared_length(head, joint) for joint in joints)
    replies = {side: joint[cut:] for side, joint in zip(SIDES, joints, strict=True)}
    return Preference({"prompt": head[:cut]} | replies, texts, cut < len(head))


def _ended(tokenizer, ids: list[int]) -> list[int]:
    """Cut a response after the template's own last token; add the end token if it writes none."""
    own = encoding.added_tokens(tokenizer)
    past = max((place + 1 for place, token in enumerate(ids) if token in own), default=0)
    if past and not tokenizer.decode(ids[past:]).strip():
        return ids[:past]
    return [*ids, tokenizer.eos_token_id]


def _conversation(tokenizer, row: dict, place: str) -> tuple[list[dict], dict[str, dict]]:
    """Return the messages of the prompt, and the reply of each side as one message."""
    prompt = row.get("prompt")
    for key in COLUMNS:
        if isinstance(row.get(key), str):
            _refuse_special(tokenizer, row[key], f"{place}: the {key} string")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if "prompt" in row:
        turns = _encoded(f"{place}, prompt", _checked, turns, BEFORE_A_REPLY)
    replies, inside = {}, {}
    for side in SIDES:
        said = row[side]
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        *before, replies[side] = _encoded(f"{place}, {side}", _checked, said, ("assistant",))
        inside[side] = before
        if not before or "prompt" not in row:
            continue
        same = _turns(before) == _turns(turns)
        if isinstance(prompt, str):  # beside what the messages say once more, with all before it
            same = prompt.strip() in [message["content"].strip() for message in before]
        if not same:
            raise AlloError(
                f"{place}: {side} has {len(before)} messages before the reply that are not the "
                "prompt; put them into the prompt"
            )
    before = inside["chosen"] or inside["rejected"]
    differ = _turns(inside["chosen"]) != _turns(inside["rejected"])
    if ("prompt" not in row or all(inside.values())) and (differ or not before):
        raise AlloError(
            f"{place}: chosen and rejected do not follow the same messages; put those before the "
            "reply into the prompt"
        )
    prompt = before if before and ("prompt" not in row or isinstance(prompt, str)) else turns
    return _encoded(f"{place}, prompt", _checked, prompt, BEFORE_A_REPLY), replies


def _tools(tools, place: str) -> list:
    with contextlib.suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if isinstance(tools, list):
            return tools
    raise AlloError(f"{place}: tools is no list; expected a list of JSON schemas, or its JSON")


def _checked(messages, last: tuple[str, ...]) -> list[dict]:
    """Drop what is None, as columns of data sets have it; a call needs no content."""
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


def _encoded(place: str, encode, *arguments, **settings):
    """Return what `encode` does; put the place before its AlloError."""
    try:
        return encode(*arguments, **settings)
    except AlloError as error:
        raise AlloError(f"{place}: {error}") from error
