"""From text to token ids: prompts, responses, and pairs of them.

What people wrote is text: the name of a special token inside it, such as `<|im_end|>`, is encoded
as the letters that it is made of, and only the chat template and the end of a response give the
token itself. A tokenizer that cannot tell the two apart refuses such a text.
"""

import json
import weakref
from typing import Any, NamedTuple

from allo_lib.errors import AlloError, short

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
BEFORE_A_REPLY = ("user", "tool", "function")  # what the last message of a prompt may be
# Tokens that published models reserve for padding; then, for models that pad with their end token,
# others that never occur inside a text.
_MADE_FOR_PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|PAD|>", "<|finetune_right_pad_id|>")
_NEVER_IN_TEXT = ("<|endoftext|>", "<unk>", "[UNK]", "<|unk|>")


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt: a string as it stands, chat messages by the tokenizer's template.

    A string begins as the tokenizer begins every text, with its BOS token if it adds one.

    Raises:
        AlloError: neither of the two, messages in an order that leaves nothing to reply to or that
            the template refuses, text that is no Unicode, or a special token's name in it that the
            tokenizer cannot read as text.
    """
    if isinstance(prompt, str):
        return [*beginning(tokenizer), *encode_text(tokenizer, prompt)]
    check_messages(prompt, BEFORE_A_REPLY)
    return encode_chat(tokenizer, prompt, add_generation_prompt=True)


def beginning(tokenizer: Any) -> list[int]:
    """Ids of the special tokens that the tokenizer puts before every text: none, or BOS."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in places if whole[i : i + len(bare)] == bare), 0)]


def encode_response(tokenizer: Any, response: Any) -> list[int]:
    """Token ids of a response, ended by the end token, which is part of it.

    A response may be a string or chat messages, of which the last one is the reply. Raises
    AlloError as `encode_prompt` does, and when the last message is not the assistant's.
    """
    if not isinstance(response, str):
        check_messages(response, ("assistant",))
        response = response[-1]["content"]
    return [*encode_text(tokenizer, response), tokenizer.eos_token_id]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, without any special token; AlloError where that cannot be."""
    _check_text(text)
    special = _tokens_of(tokenizer).special
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not special.isdisjoint(ids):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for token in ids:
        if token in special:
            raise _unreadable(tokenizer.convert_ids_to_tokens(token))
    return ids


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise AlloError(f"{short(text)} is no text; expected a string")
    try:
        text.encode("utf-8")  # tokenizers need whole characters
    except UnicodeEncodeError as error:
        raise AlloError(
            f"half of a surrogate pair at character {error.start}; expected valid Unicode: mend or "
            "drop the text"
        ) from None


def check_messages(messages: Any, last: tuple[str, ...]) -> None:
    """AlloError unless `messages` are chat messages of which the last has one of the roles `last`.

    A message is a dict with `role`, one of ROLES, and `content`, text. A system message is first.
    """
    if not isinstance(messages, (list, tuple)):
        raise AlloError(f"{short(messages)} given; expected a string or a list of chat messages")
    if not messages:
        raise AlloError("the list of chat messages is empty; expected at least one")
    for number, message in enumerate(messages):
        place = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise AlloError(f"{place} is {short(message)}; expected a dict with role and content")
        role = message["role"]
        if role not in ROLES:
            raise AlloError(f"{place}: role is {short(role)}, expected one of {', '.join(ROLES)}")
        try:
            _check_text(message["content"])
        except AlloError as error:
            raise AlloError(f"{place}: {error}") from None
        if number and role in ("system", "developer"):
            raise AlloError(f"{place} is the {role}'s; put it first")
    if role not in last:
        raise AlloError(f"the last message is of role {role!r}, expected {' or '.join(last)}")


class _Tokens(NamedTuple):
    """Special tokens by id and, grouped by their first two letters, by name; all added ones."""

    special: frozenset[int]
    names: dict[str, list[str]]
    added: frozenset[int]


# tokenizer -> (what it is asked for, its tokens): some have thousands, and tell of them slowly
_known: weakref.WeakKeyDictionary[Any, tuple[Any, _Tokens]] = weakref.WeakKeyDictionary()


def _tokens_of(tokenizer: Any) -> _Tokens:
    # Any word may be unknown; that one only counts where it has another meaning, too.
    meant = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    state = (len(tokenizer), tokenizer.unk_token_id, *meant)
    if _known.get(tokenizer, (None,))[0] != state:
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        special -= {tokenizer.unk_token_id} - set(meant)
        names: dict[str, list[str]] = {}
        for name in tokenizer.convert_ids_to_tokens(sorted(special)):
            names.setdefault(name[:2], []).append(name)
        everything = frozenset(added) | set(tokenizer.all_special_ids)
        _known[tokenizer] = state, _Tokens(frozenset(special), names, everything)
    return _known[tokenizer][1]


def special_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """Names of the tokenizer's special tokens that a text contains, the one for unknown aside."""
    groups = _tokens_of(tokenizer).names.items()
    return [name for start, names in groups if start in text for name in names if name in text]


def added_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that no text is made of: special ones and those added for templates."""
    return _tokens_of(tokenizer).added


def encode_chat(tokenizer: Any, messages: Any, **settings: Any) -> list[int]:
    """Token ids of chat messages by the tokenizer's template; `settings` go to `render_chat`.

    Names of special tokens in what people wrote are letters. AlloError where that cannot be, or
    where the template does not take the messages.
    """
    texts = json.dumps([messages, settings.get("tools")], ensure_ascii=False, default=str)
    names = sorted(special_tokens_in(tokenizer, texts), key=len, reverse=True)
    expected = "give messages in its order, or strings"
    if not names:
        return render_chat(tokenizer, messages, expected, **settings)
    ids = render_chat(tokenizer, messages, expected, sanitize_control_tokens=True, **settings)
    # Versions of transformers that do not know this argument pass over it in silence; but without
    # these names the template gives as many special tokens.
    for name in names:
        texts = texts.replace(name, "x")
    without, tools = json.loads(texts)
    bare = settings | ({"tools": tools} if tools else {})
    harmless = render_chat(tokenizer, without, expected, **bare)
    special = _tokens_of(tokenizer).special
    if sum(token in special for token in ids) != sum(token in special for token in harmless):
        raise _unreadable(names[0])
    return ids


def render_chat(
    tokenizer: Any, messages: Any, expected: str, whose: str = "tokenizer", **settings: Any
) -> list[int]:
    """Token ids of a chat, as a plain list of ints, by the chat template of a tokenizer.

    `settings` go to `apply_chat_template`. AlloError, one line that ends in `expected`, if the
    template does not take the messages; `whose` names the model in it.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=False, **settings
        )
    except Exception as error:
        # Templates are programs: each has exceptions of its own for what it does not take.
        reason = " ".join(str(error).split())[:200]
        raise AlloError(
            f"the {whose}'s chat template does not take these messages ({reason}); {expected}"
        ) from error


def _unreadable(name: str) -> AlloError:
    return AlloError(
        f"the text contains the special token {name!r}, which this tokenizer cannot read as plain "
        "text; take it out of the text"
    )


def encode_demonstration(tokenizer: Any, prompt: Any, response: Any) -> dict[str, list[int]]:
    """A row of supervised training: `prompt` and `response` as token ids."""
    return {
        "prompt": encode_prompt(tokenizer, prompt),
        "response": encode_response(tokenizer, response),
    }


def encode_pairs(tokenizer: Any, pairs: Any, max_length: int) -> list[dict[str, list[int]]]:
    """`prompt`, `chosen`, `rejected` of each pair as token ids.

    Raises:
        AlloError: a pair that cannot be encoded, whose chosen equals its rejected response, whose
            prompt is empty, or whose prompt and longer response do not fit into `max_length`
            tokens.
    """
    rows = []
    for number, pair in enumerate(pairs):
        row = {}
        for key in ("prompt", "chosen", "rejected"):
            try:
                encode = encode_prompt if key == "prompt" else encode_response
                row[key] = encode(tokenizer, pair[key])
            except AlloError as error:
                raise AlloError(f"pair {number}, {key}: {error}") from error
        length = len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))
        if row["chosen"] == row["rejected"]:
            why = "chosen equals rejected;"
        elif not row["prompt"]:
            why = "the prompt has no tokens; give one or"
        elif length > max_length:
            why = f"{length} tokens, but the longest row is {max_length}; shorten the prompt or"
        else:
            rows.append(row)
            continue
        raise AlloError(f"pair {number}: {why} leave the pair out")
    return rows


def choose_pad(tokenizer: Any) -> None:
    """Give a tokenizer a pad token of its own where its vocabulary has a suitable one."""
    shared = tokenizer.pad_token is not None
    if shared and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    for token in _MADE_FOR_PADDING + (_NEVER_IN_TEXT if shared else ()):
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Make sure that training and generation can tell text, end and padding apart.

    A response's end token is learned and padding is not, so the two must differ.

    Raises:
        AlloError: no pad or end token, the same one for both, token ids beyond the embedding, or
            not a language model with its tokenizer at all.
    """
    if not hasattr(tokenizer, "eos_token_id") or not hasattr(tokenizer, "get_vocab"):
        raise AlloError(
            f"the tokenizer is a {type(tokenizer).__name__}; expected one of transformers"
        )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None:
        raise AlloError("the tokenizer has no end token; set tokenizer.eos_token to one")
    if pad is None or pad == end:
        found = "no pad token" if pad is None else "one token for pad and end"
        raise AlloError(
            f"the tokenizer has {found}; expected a pad token other than {tokenizer.eos_token!r}: "
            "set tokenizer.pad_token to a token of its vocabulary that no text contains"
        )
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise AlloError(
            f"the model is a {type(model).__name__} without token embeddings; expected a causal "
            "language model of transformers"
        ) from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise AlloError(
            f"the tokenizer's highest token id is {highest}, the model's embedding has {rows} "
            f"rows; call model.resize_token_embeddings({highest + 1}) and train the new rows, or "
            "use the tokenizer that belongs to the model"
        )
