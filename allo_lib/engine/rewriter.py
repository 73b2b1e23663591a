"""The rewriting reward model: trained to correct wrong responses with as few changes as it can.

Source: RLMEC (arXiv 2401.06081), as ALLO uses it. Given question, correct solution and wrong
prediction it learns to write the minimally corrected prediction; the probability it gives to each
token of the prediction itself then tells whether it would keep that token.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

from allo_lib.engine.encoding import encode_prompt, encode_response, encode_text
from allo_lib.engine.forward import logps_of_rows


@dataclass(frozen=True)
class Correction:
    """One training example, all texts; `prompt` may be chat messages."""

    prompt: str | list[Any]
    solution: str
    prediction: str
    corrected: str


def rewriter_prompt(
    tokenizer: Any, prompt: str | list[Any], solution: str, prediction: str, plain: bool
) -> list[int]:
    """Token ids of the rewriter's prompt: question, correct solution, wrong prediction.

    plain: for the miniature, whose tokenizer knows no headings: parts are told apart by "?", which
    ends every question there too.
    """
    if plain:
        return encode_prompt(tokenizer, f"{prompt} {solution} ? {prediction} ?")
    return encode_prompt(tokenizer, prompt) + encode_text(tokenizer, heading(solution, prediction))


def heading(solution: str, prediction: str) -> str:
    """What stands between a question and the corrected prediction."""
    solution, prediction = (
        text if text.startswith(" ") else f" {text}" for text in (solution, prediction)
    )
    return f"\nCorrect solution:{solution}\nPrediction:{prediction}\nCorrected:"


def training_rows(
    tokenizer: Any, corrections: list[Correction], quality: str, seed: int, plain: bool
) -> list[dict[str, Any]]:
    """Rows (`prompt`, `response` ids) to train a reward model of the given quality.

    "trained": all corrections; "early": the first quarter of them, at least one; "shuffled":
    corrected predictions dealt out to other questions at random, which teaches the form without
    the sense.
    """
    targets = [example.corrected for example in corrections]
    if quality == "shuffled":
        random.Random(seed).shuffle(targets)
    rows = _rows(tokenizer, corrections, targets, plain)
    return rows[: max(1, len(rows) // 4)] if quality == "early" else rows


def keep_probabilities(
    model: Any, tokenizer: Any, examples: list[Correction], batch_size: int, plain: bool
) -> list[list[float]]:
    """p_t of every token (end token included) of each example's prediction, in [0, 1]."""
    rows = _rows(tokenizer, examples, [example.prediction for example in examples], plain)
    return probabilities(model, rows, tokenizer.pad_token_id, batch_size)


def _rows(
    tokenizer: Any, examples: list[Correction], responses: list[str], plain: bool
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": rewriter_prompt(tokenizer, e.prompt, e.solution, e.prediction, plain),
            "response": encode_response(tokenizer, response),
        }
        for e, response in zip(examples, responses, strict=True)
    ]


def probabilities(
    model: Any, rows: list[dict[str, Any]], pad_token_id: int, batch_size: int
) -> list[list[float]]:
    """The model's probability of every token of each row's `response`."""
    logps = logps_of_rows(model, rows, pad_token_id, batch_size)
    return [[math.exp(min(0.0, value)) for value in row] for row in logps]
