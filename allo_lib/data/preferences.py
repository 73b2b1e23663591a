"""Preference pairs for `align`, in all forms of TRL's columns, as token ids.

The forms: strings or chat messages; the prompt in a column of its own or as what both replies begin
with. Prompt and reply are encoded together and parted after what the prompt alone has in common
with that, as TRL 1.16 does, so that both are read as at inference. A response ends as the chat
template ends a turn; the blank that a template puts behind its end token is no part of it. Keys of
messages and tools whose value is None are left out, as Arrow's columns fill in what a row lacks.
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
_REPLY = "\n\nAssistant:"  # before a reply in strings of hh-rlhf's form
_EXPECTED = (
    "expected one split of a datasets.Dataset, or a list of dicts, with the columns "
    + ", ".join(COLUMNS)
)


@dataclass(frozen=True)
class Preference:
    """A pair as token ids (`prompt`, `chosen`, `rejected`) and the texts of its two replies.

    merged: the prompt alone does not end as it does before a reply; what differs counts to those.
    asked: the prompt as it was given, the same for all pairs of it; guessed: as far as both replies
    begin alike, which may be with words of theirs.
    """

    ids: dict[str, list[int]]
    texts: dict[str, str]
    merged: bool
    asked: str = ""
    guessed: bool = False


@dataclass
class Encoded:
    """The pairs that are used, as token ids, and what becomes of the others.

    longest: tokens of a row at most. rows: `prompt`, `chosen`, `rejected` of each pair as lists of
    ids. numbers: places of these pairs among all. corrections: of each the rows of the rewriting
    reward model, to train it and to read its probabilities; None where they do not fit. asked: of
    each the prompt as it was given. overlong:
    places of the pairs that are too long. merged: how many have a prompt that ends otherwise before
    a reply than alone. plain: how many are strings, though the tokenizer has a chat template.
    count: of all pairs.
    """

    longest: int
    rows: list[dict] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    corrections: list[tuple[dict, dict] | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    merged: int = 0
    plain: int = 0
    count: int = 0

    def split(self, share: float, seed: int) -> "tuple[Encoded, Encoded]":
        """Return (the others, a share of the pairs), drawn by prompt: none stands on both sides."""
        of_prompt: dict[str, list[int]] = {}  # token ids of one prompt can end in several ways
        for place, asked in enumerate(self.asked):
            of_prompt.setdefault(asked, []).append(place)
        prompts, drawn = list(of_prompt.values()), set()
        random.Random(seed).shuffle(prompts)
        while prompts and len(drawn) < share * len(self.rows):
            drawn.update(prompts.pop())
        others = [place for place in range(len(self.rows)) if place not in drawn]
        return self._only(others), self._only(sorted(drawn))

    def _only(self, places: list[int]) -> "Encoded":
        kept = {key: [getattr(self, key)[i] for i in places]
                for key in ("rows", "numbers", "corrections", "asked")}  # fmt: skip
        return replace(self, **kept)


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
    pairs, too_long, guessed = list(pairs), [], []
    if not pairs:
        raise AlloError("align: no pairs were given; expected at least one")
    result = Encoded(min(n for n in (context, max_length) if n), count=len(pairs))
    for number, row in enumerate(pairs):
        place = f"align: pair {number}"
        if not isinstance(row, Mapping):
            raise AlloError(f"{place} is a {type(row).__name__}, not a dict; {_EXPECTED}")
        missing = [name for name in SIDES if name not in row]
        if missing:
            raise AlloError(f"align: pairs lack the column {missing[0]!r} (pair {number}); "
                            f"expected {', '.join(COLUMNS)}")  # fmt: skip
        pair = encode_preference(tokenizer, dict(row), place)
        length = len(pair.ids["prompt"]) + max(len(pair.ids[side]) for side in SIDES)
        if length > result.longest:
            message = f"{place}: {length} tokens, but the longest row is {result.longest}; "
            too_long.append(AlloError(f"{message}shorten the prompt or leave the pair out"))
            result.overlong.append(number)
            continue
        result.merged += pair.merged
        strings = all(isinstance(row[side], str) for side in SIDES)
        result.plain += bool(strings and getattr(tokenizer, "chat_template", None))
        result.rows.append(pair.ids)
        result.numbers.append(number)
        guessed += [len(result.asked)] * pair.guessed
        result.asked.append(pair.asked)
        result.corrections.append(_correction(tokenizer, pair, context or result.longest))
    shortest = None  # of the prompts that begin alike: the others have words of their replies, too
    for place in sorted(guessed, key=result.asked.__getitem__):
        if shortest is None or not result.asked[place].startswith(shortest):
            shortest = result.asked[place]
        result.asked[place] = shortest
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
        asked, prompt, guessed = row["prompt"], row["prompt"], False
    else:  # the characters that both begin with, as TRL's extract_prompt
        prompt = texts["chosen"][: shared_length(*texts.values())].removesuffix(" ")
        # Words that both replies begin with are no part of what was asked.
        asked = prompt.rpartition(_REPLY)[0] or prompt
        guessed = asked == prompt
        texts = {side: text[len(prompt) :] for side, text in texts.items()}
    begin, bos = encoding.beginning(tokenizer), tokenizer.bos_token
    if bos and prompt.startswith(bos):
        begin, prompt = begin or [tokenizer.bos_token_id], prompt.removeprefix(bos)
    if not prompt:
        raise AlloError(
            f"{place}: no prompt, and the replies begin with none; expected a column `prompt`, or "
            "chosen and rejected that both begin with it"
        )
    apart = {}
    for key, text in {"prompt": prompt, **texts}.items():
        _refuse_special(tokenizer, text, f"{place}: the {key} string")
        if text.startswith("[{") and '"role"' in text:
            raise AlloError(
                f"{place}: the {key} string is a list of chat messages as JSON; give the list "
                "itself, in a .jsonl or .parquet file"
            )
        with _named(f"{place}, {key}"):
            apart[key] = encode_text(tokenizer, text)
    joints, unknown = [], tokenizer.unk_token_id
    for side, text in texts.items():
        joint, two = encode_text(tokenizer, prompt + text), apart["prompt"] + apart[side]
        # A vocabulary of words may know the last and the first word, but not both as one.
        joint = two if joint.count(unknown) > two.count(unknown) else joint
        joints.append([*begin, *joint, tokenizer.eos_token_id])
    pair = _parted([*begin, *apart["prompt"]], joints, texts)
    return replace(pair, asked=" ".join(asked.split()), guessed=guessed)


def _of_messages(tokenizer, row: dict, place: str) -> Preference:
    prompt, replies = _conversation(tokenizer, row, place)
    settings = dict(row.get("chat_template_kwargs") or {})
    if tools := row.get("tools"):
        with _named(f"{place}, tools"):
            tools = json.loads(tools) if isinstance(tools, str) else tools
            if not isinstance(tools, list):
                raise AlloError("expected a list of JSON schemas, or its JSON")
        settings["tools"] = _without_none(tools)
    with _named(f"{place}, prompt"):
        head = encode_chat(tokenizer, prompt, add_generation_prompt=True, **settings)
        stated = shared_length(head, encode_chat(tokenizer, prompt, **settings))
    with _named(place):
        _refuse_left_out(tokenizer, prompt, [*replies.values()], settings)
    joints = []
    for side, reply in replies.items():
        with _named(f"{place}, {side}"):
            joints.append(encode_chat(tokenizer, [*prompt, reply], **settings))
    asked = repr([(one["role"], " ".join(one["content"].split())) for one in prompt])
    pair = replace(_parted(head, joints, {}), asked=asked)
    if len(pair.ids["prompt"]) < stated:
        raise AlloError(
            f"{place}: the chat template writes the prompt's messages otherwise before a reply "
            "than alone (some write a system message into the last turn only): take it into the "
            "user's message, or set tokenizer.chat_template"
        )
    for side, reply in replies.items():
        other = reply | {
            "content": reply["content"] + "xy"[reply["content"].rstrip().endswith("x")]
        }
        behind = encode_chat(tokenizer, [*prompt, other], **settings)[::-1]
        behind = shared_length(pair.ids[side][::-1], behind)  # tokens of the template itself
        ids = pair.ids[side] = _ended(tokenizer, pair.ids[side], behind)
        plain = not any(key in reply for key in _WRITTEN)
        pair.texts[side] = (
            reply["content"] if plain else tokenizer.decode(ids, skip_special_tokens=True)
        )
    return pair


def _parted(head: list[int], joints: list[list[int]], texts: dict[str, str]) -> Preference:
    cut = min(shared_length(head, joint) for joint in joints)
    replies = {side: joint[cut:] for side, joint in zip(SIDES, joints, strict=True)}
    return Preference({"prompt": head[:cut]} | replies, texts, cut < len(head))


def _ended(tokenizer, ids: list[int], behind: int) -> list[int]:
    """Cut a response after the last of the added tokens that the template writes behind what was
    said, `behind` tokens in all; add the end token if there is none.

    Some tokenizers have blanks among their added tokens: these end nothing.
    """
    own = encoding.added_tokens(tokenizer)
    for past in range(len(ids), len(ids) - behind, -1):
        if tokenizer.decode(ids[past - 1 : past]).strip():
            return ids[:past] if ids[past - 1] in own else [*ids, tokenizer.eos_token_id]
    return [*ids, tokenizer.eos_token_id]


def _conversation(tokenizer, row: dict, place: str) -> tuple[list[dict], dict[str, dict]]:
    """Return the messages of the prompt, and the reply of each side as one message."""
    columns = {key: row[key] for key in COLUMNS if key in row}
    for key, value in columns.items():
        if isinstance(value, str):
            _refuse_special(tokenizer, value, f"{place}: the {key} string")
            columns[key] = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
    turns, prompts, replies = [], {}, {}
    for key, messages in columns.items():
        with _named(f"{place}, {key}"):
            messages = _checked(messages, BEFORE_A_REPLY if key == "prompt" else ("assistant",))
        if key == "prompt":
            turns = messages
            continue
        *before, replies[key] = messages
        # A string is repeated by one of the messages; the others give what stood before it.
        repeated = isinstance(row.get("prompt"), str) and turns[0]["content"].strip() in [
            message["content"].strip() for message in before
        ]
        if before and turns and before != turns and not repeated:
            raise AlloError(
                f"{place}: {key} has {len(before)} messages before the reply that are not the "
                "prompt; put them into the prompt"
            )
        prompts[key] = before or turns
    if not prompts["chosen"] or prompts["chosen"] != prompts["rejected"]:
        raise AlloError(
            f"{place}: chosen and rejected do not follow the same messages; put those before the "
            "reply into the prompt"
        )
    with _named(f"{place}, prompt"):
        return _checked(prompts["chosen"], BEFORE_A_REPLY), replies


def _checked(messages, last: tuple[str, ...]) -> list[dict]:
    """Drop what is None, as columns of data sets have it; a call needs no content."""
    if isinstance(messages, (list, tuple)):
        messages = [_filled(one) if isinstance(one, dict) else one for one in messages]
    check_messages(messages, last)
    return list(messages)


def _filled(message: dict) -> dict:
    kept = {key: value for key, value in message.items() if value or key not in _WRITTEN}
    if "tool_calls" in kept:
        kept["content"] = kept.get("content") or ""
    return _without_none(kept)


def _without_none(value):
    """Without the keys, at any depth, whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, (list, tuple)) else value


def _refuse_special(tokenizer, text: str, what: str) -> None:
    names = encoding.special_tokens_in(tokenizer, text)
    if names:
        raise AlloError(
            f"{what} contains the special token {names[0]!r}; give chat messages, whose template "
            "writes such tokens and whose content is read as plain text, or take it out"
        )


def _refuse_left_out(tokenizer, prompt: list[dict], replies: list[dict], settings: dict) -> None:
    """AlloError where the template writes the same without the tools, a message, or a call."""
    compared = []  # what, messages and settings, the same without it
    if "tools" in settings:
        compared.append(("tools", (prompt, settings), (prompt, settings | {"tools": None})))
    for place, message in enumerate(prompt):
        if message["role"] not in ("user", "assistant"):
            other = [*prompt]
            other[place] = message | {"content": message["content"] + "x"}
            what = f"messages of role {message['role']!r}"
            compared.append((what, (prompt, settings), (other, settings)))
    for message in (*prompt, *replies):
        for key in (key for key in _WRITTEN if key in message):
            # Some templates write thoughts behind the last question only.
            one, less = (
                [{"role": "user", "content": "x"}, {k: v for k, v in message.items() if k != left}]
                for left in (None, key)
            )
            compared.append((key, (one, settings), (less, settings)))
    for reply in replies:
        if "</think>" in (said := reply["content"]):  # where some templates cut
            texts = [[{"role": "user", "content": "x"}, reply | {"content": one}]
                     for one in (said, said.replace("</think>", "x</think>"))]  # fmt: skip
            compared.append(("thoughts in a reply", *((one, settings) for one in texts)))
    for what, *both in compared:
        written, without = (encode_chat(tokenizer, texts, **more) for texts, more in both)
        if written == without:
            raise AlloError(
                f"the tokenizer's chat template leaves out {what}; expected one that writes them: "
                "take them out of the pairs, or set tokenizer.chat_template"
            )


@contextlib.contextmanager
def _named(place: str):
    """Put the place before an error."""
    try:
        yield
    except ValueError as error:
        raise AlloError(f"{place}: {error}") from error
