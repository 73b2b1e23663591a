"""What the rewriting reward model is trained on, and what its probabilities are."""

import math

import pytest
import torch

from allo_lib.data import miniature
from allo_lib.engine import models
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.rewriter import (
    QUALITIES,
    STOPPED,
    Correction,
    keep_probabilities,
    rewriter_prompt,
    training_rows,
)
from allo_lib.method.losses import token_logps
from allo_lib.profiles.methods import REWARD_MODELS


class Letters:
    """A tokenizer whose tokens are characters, so that nothing in a prompt is lost."""

    eos_token_id, pad_token_id, bos_token_id, unk_token_id = 1, 0, None, None
    added_tokens_decoder, all_special_ids = {}, [0, 1]

    def __len__(self):
        return 0x110000

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, chat, **_):
        return [ord(letter) for letter in f"<{chat[-1]['content']}>"]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def corrections(count: int) -> list[Correction]:
    return [Correction(f"q{i}", f"s{i}", f"w{i}", f"c{i}") for i in range(count)]


def test_the_prompt_of_words_parts_its_parts_by_the_question_mark():
    ids = rewriter_prompt(Letters(), "calc 1 ?", "so 2", "guess 3", plain=True)
    assert text_of(ids) == "calc 1 ? so 2 ? guess 3 ?"
    tokenizer = miniature.tokenizer()
    assert tokenizer.unk_token_id not in rewriter_prompt(
        tokenizer, "calc 1 ?", "so 2", "guess 3", plain=True
    )


@pytest.mark.parametrize("space", ["", " "])
def test_the_prompt_of_texts_has_headings(space):
    ids = rewriter_prompt(Letters(), "Q: x\nA:", f"{space}good", f"{space}bad", plain=False)
    assert text_of(ids) == "Q: x\nA:\nCorrect solution: good\nPrediction: bad\nCorrected:"


def test_the_prompt_of_a_chat_takes_its_template():
    ids = rewriter_prompt(Letters(), [{"role": "user", "content": "x"}], "y", "z", plain=False)
    assert text_of(ids).startswith("<x>\nCorrect solution: y")


def test_rows_teach_the_correction_and_its_end():
    rows = training_rows(Letters(), corrections(3), "trained", 0, plain=True)
    assert [text_of(row["prompt"]) for row in rows] == [f"q{i} s{i} ? w{i} ?" for i in range(3)]
    assert [row["response"] for row in rows] == [[ord("c"), ord(str(i)), 1] for i in range(3)]


@pytest.mark.parametrize(
    "quality, seen", [("sixteenth", 2), ("eighth", 4), ("early", 8), ("half", 16)]
)
def test_reward_models_stopped_on_the_way_see_the_first_rows_and_at_least_one(quality, seen):
    whole = training_rows(Letters(), corrections(33), "trained", 0, plain=True)
    assert training_rows(Letters(), corrections(33), quality, 0, plain=True) == whole[:seen]
    assert len(training_rows(Letters(), corrections(1), quality, 0, plain=True)) == 1
    assert STOPPED["early"] == 0.25


def test_shuffled_deals_out_the_same_targets_by_seed():
    whole, first, again, other = (
        training_rows(Letters(), corrections(20), quality, seed, plain=True)
        for quality, seed in (("trained", 0), ("shuffled", 1), ("shuffled", 1), ("shuffled", 2))
    )
    assert [row["prompt"] for row in first] == [row["prompt"] for row in whole]
    targets = [[row["response"] for row in rows] for rows in (whole, first, again, other)]
    assert sorted(targets[0]) == sorted(targets[1]) and targets[0] != targets[1]
    assert targets[1] == targets[2] != targets[3]


def test_qualities_are_those_that_the_notebooks_name():
    assert {"trained", "early", "half", "shuffled", "untrained"} <= set(QUALITIES)
    assert set(REWARD_MODELS) == set(QUALITIES) - {"trained"}


def test_keep_probabilities_are_those_of_the_prediction_itself():
    tokenizer = miniature.tokenizer()
    model = models.micro_llama(
        len(tokenizer), width=16, layers=1, heads=2, feed_forward=16, context=64,
        initializer_range=0.5, seed=0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    examples = [
        Correction("calc 1 ?", "so 2", "guess 3", "guess 2"),
        Correction("?", "so 4", "first from 4 less 1 makes 3 so 3", "so 4"),
    ]
    values = keep_probabilities(model, tokenizer, examples, batch_size=2, plain=True)
    for example, found in zip(examples, values, strict=True):
        prompt = encode_prompt(
            tokenizer, f"{example.prompt} {example.solution} ? {example.prediction} ?"
        )
        response = encode_response(tokenizer, example.prediction)
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            expected = token_logps(model(input_ids=ids).logits, labels)[0, len(prompt) :].exp()
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        assert all(0 <= value <= 1 for value in found)


def test_rounding_never_makes_a_probability_above_one(monkeypatch):
    monkeypatch.setattr(
        "allo_lib.engine.rewriter.logps_of_rows", lambda *args: [[1e-7, -math.inf, math.log(0.5)]]
    )
    values = keep_probabilities(None, Letters(), corrections(1), 1, plain=True)
    assert values == [[1.0, 0.0, 0.5]]
