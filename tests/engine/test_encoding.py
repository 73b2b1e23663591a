"""Texts become token ids."""

import pytest

from allo_lib.data import miniature
from allo_lib.engine.encoding import encode_pairs, encode_prompt, encode_response
from allo_lib.errors import AlloError

PAIR = {"prompt": "calc 1 ?", "chosen": "so 2", "rejected": "guess 3 4"}


@pytest.fixture(scope="module")
def tokenizer():
    return miniature.tokenizer()


def test_a_response_ends_in_the_end_token_and_a_prompt_does_not(tokenizer):
    assert encode_prompt(tokenizer, "calc 1 ?") == [
        tokenizer.convert_tokens_to_ids(word) for word in ("calc", "1", "?")
    ]
    ids = encode_response(tokenizer, "so 2")
    assert tokenizer.convert_ids_to_tokens(ids) == ["so", "2", tokenizer.eos_token]
    assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]


def test_chat_messages_take_the_template_and_the_last_message_is_the_response():
    tokenizer = miniature.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}ask {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}so {% endif %}"
    )
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "calc 1"}])
    assert tokenizer.convert_ids_to_tokens(ids) == ["ask", "calc", "1", "so"]
    chat = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "so 2"}]
    assert encode_response(tokenizer, chat) == encode_response(tokenizer, "so 2")


def test_pairs_are_encoded_side_by_side(tokenizer):
    (encoded,) = encode_pairs(tokenizer, [PAIR], max_length=7)
    assert encoded == {
        "prompt": encode_prompt(tokenizer, PAIR["prompt"]),
        "chosen": encode_response(tokenizer, PAIR["chosen"]),
        "rejected": encode_response(tokenizer, PAIR["rejected"]),
    }


@pytest.mark.parametrize(
    "pair, longest, told",
    [
        (PAIR | {"rejected": PAIR["chosen"]}, 64, "pair 1: chosen equals rejected"),
        (PAIR | {"rejected": "so  2"}, 64, "pair 1: chosen equals rejected"),
        (PAIR, 6, "pair 1: 7 tokens, but the longest row is 6"),
        (PAIR | {"chosen": "so so so so", "rejected": ""}, 7, "pair 1: 8 tokens"),
        (PAIR | {"prompt": "calc " * 70}, 64, "pair 1: 74 tokens"),
    ],
)
def test_bad_pairs_are_named_in_one_line(tokenizer, pair, longest, told):
    short = {"prompt": "?", "chosen": "2", "rejected": "3"}
    with pytest.raises(AlloError, match=told) as caught:
        encode_pairs(tokenizer, [short, pair], longest)
    assert "\n" not in str(caught.value)
