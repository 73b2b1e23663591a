"""Texts become token ids, ids become batches padded on the right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib import miniature
from allo_lib.encoding import (
    collate,
    encode_pairs,
    encode_prompt,
    encode_response,
    pair_batch,
    rejected_batch,
)
from allo_lib.errors import AlloError

PAD = 0
PAIR = {"prompt": "calc 1 ?", "chosen": "so 2", "rejected": "guess 3 4"}


@pytest.fixture(scope="module")
def tokenizer():
    return miniature.tokenizer()


def row(prompt, response, **extras):
    return {"prompt": prompt, "response": response} | extras


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


def test_collate_pads_on_the_right_and_labels_the_response_only():
    batch = collate([row([5, 6], [7, 8, 9]), row([3], [4])], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 4, -100, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "labels"}


def test_a_pad_token_inside_a_response_is_learned_like_any_other():
    assert collate([row([5], [PAD, 6])], PAD)["labels"].tolist() == [[-100, PAD, 6]]


def test_further_values_lie_under_their_tokens():
    rows = [row([5, 6], [7, 8], w=[0.25, 0.5]), row([3], [4], w=[1.0])]
    batch = collate(rows, PAD)
    assert batch["w"].tolist() == [[0, 0, 0.25, 0.5], [0, 1, 0, 0]]
    assert batch["w"].dtype == torch.float32


def test_a_batch_of_pairs_holds_chosen_then_rejected():
    pairs = [
        {"prompt": [5], "chosen": [6], "rejected": [7, 8],
         "chosen_reference": [-1.0], "rejected_reference": [-2.0, -3.0]},
        {"prompt": [2, 3], "chosen": [4, 4], "rejected": [9],
         "chosen_reference": [-4.0, -5.0], "rejected_reference": [-6.0]},
    ]  # fmt: skip
    batch = pair_batch(pairs, PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [2, 3, 4, 4], [5, 7, 8, 0], [2, 3, 9, 0]]
    assert batch["reference"].tolist() == [
        [0, -1, 0, 0], [0, 0, -4, -5], [0, -2, -3, 0], [0, 0, -6, 0]
    ]  # fmt: skip
    alone = rejected_batch(pairs, PAD)
    assert torch.equal(alone["input_ids"], batch["input_ids"][2:, :3])
    assert torch.equal(alone["reference"], batch["reference"][2:, :3])


ids = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
def test_every_row_can_be_read_back_from_its_batch(rows):
    values = [[float(t) / 4 for t in response] for _, response in rows]
    batch = collate([row(p, r, w=w) for (p, r), w in zip(rows, values, strict=True)], PAD)
    longest = max(len(p) + len(r) for p, r in rows)
    assert {tuple(value.shape) for value in batch.values()} == {(len(rows), longest)}
    for i, ((prompt, response), w) in enumerate(zip(rows, values, strict=True)):
        inside = batch["labels"][i] != -100
        assert batch["labels"][i][inside].tolist() == response
        assert batch["w"][i][inside].tolist() == w and not batch["w"][i][~inside].any()
        end = len(prompt) + len(response)
        assert batch["input_ids"][i, :end].tolist() == prompt + response
        assert not batch["input_ids"][i, end:].any()
