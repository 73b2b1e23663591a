"""What the rewriting reward model is trained on, and what its probabilities are."""

import math

import pytest
from test_forward import plainly
from tiny_models import bytewise, tiny_llama, words

from allo_lib.data import miniature
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.engine.rewriter import (
    Correction,
    keep_probabilities,
    rewriter_prompt,
    training_rows,
)

# Its tokens are bytes, so that nothing in a prompt is lost.
LETTERS = bytewise("<{{ messages[-1].content }}>")


def rows_of(count: int, quality: str, seed: int = 0) -> list[dict]:
    corrections = [Correction(f"q{i}", f"s{i}", f"w{i}", f"c{i}") for i in range(count)]
    return training_rows(LETTERS, corrections, quality, seed, plain=True)


@pytest.mark.parametrize(
    ("prompt", "solution", "prediction", "plain", "expected"),
    [
        ("calc 1 ?", "so 2", "guess 3", True, "calc 1 ? so 2 ? guess 3 ?"),
        ("Q: x\nA:", "good", " bad", False,
         "Q: x\nA:\nCorrect solution: good\nPrediction: bad\nCorrected:"),
        ([{"role": "user", "content": "x"}], "y", "z", False,
         "<x>\nCorrect solution: y\nPrediction: z\nCorrected:"),
    ],
)  # fmt: skip
def test_the_prompt_holds_question_solution_and_prediction(
    prompt, solution, prediction, plain, expected
):
    ids = rewriter_prompt(LETTERS, prompt, solution, prediction, plain)
    assert LETTERS.decode(ids) == expected
    if plain:
        tokenizer = miniature.tokenizer()
        known = rewriter_prompt(tokenizer, prompt, solution, prediction, plain)
        assert tokenizer.unk_token_id not in known


def test_rows_teach_the_correction_and_its_end():
    rows = rows_of(3, "trained")
    prompts, responses = ([LETTERS.decode(row[k]) for row in rows] for k in ("prompt", "response"))
    assert prompts == [f"q{i} s{i} ? w{i} ?" for i in range(3)]
    assert responses == [f"c{i}<eos>" for i in range(3)]


def test_a_reward_model_that_was_stopped_early_saw_the_first_quarter_and_at_least_one_row():
    assert rows_of(33, "early") == rows_of(33, "trained")[:8]
    assert len(rows_of(1, "early")) == 1


def test_shuffled_deals_out_the_same_targets_by_seed():
    qualities = (("trained", 0), ("shuffled", 1), ("shuffled", 1), ("shuffled", 2))
    whole, first, again, other = (rows_of(20, *one) for one in qualities)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in whole]
    targets = [[row["response"] for row in rows] for rows in (whole, first, again, other)]
    assert sorted(targets[0]) == sorted(targets[1]) and targets[0] != targets[1]
    assert targets[1] == targets[2] != targets[3]


def test_keep_probabilities_are_those_of_the_prediction_itself(monkeypatch):
    """And never above one, whatever rounding does."""
    model, tokenizer = tiny_llama(), words()
    examples = [
        Correction("w1 w2", "w3", "w4 w5", "w3 w5"),
        Correction("w2", "w6 w7", "w8 w9 w1 w2 w3", "w6"),
    ]
    values = keep_probabilities(model, tokenizer, examples, batch_size=2, plain=True)
    for e, found in zip(examples, values, strict=True):
        prompt = encode_prompt(tokenizer, f"{e.prompt} {e.solution} ? {e.prediction} ?")
        row = {"prompt": prompt, "response": encode_response(tokenizer, e.prediction)}
        assert found == pytest.approx(plainly(model, row).exp().tolist(), abs=1e-5)
    monkeypatch.setattr(
        "allo_lib.engine.rewriter.logps_of_rows", lambda *args: [[1e-7, -math.inf, math.log(0.5)]]
    )
    assert keep_probabilities(model, tokenizer, examples, 1, plain=True) == [[1.0, 0.0, 0.5]]
