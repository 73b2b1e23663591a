"""The generated tasks: distinct, split by prompt, right when meant to be, wrong in known places."""

import hashlib
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from allo_lib.data import miniature as mini

SEEDS = st.integers(0, 2**32 - 1)
FAMILY = st.sampled_from(mini.FAMILIES)
every_family = pytest.mark.parametrize("family", mini.FAMILIES)


def independent_answer(problem):
    """Work out the answer from the prompt's text alone, in another way than the library's."""
    words = problem.prompt.split()
    numbers = [int(n) for n in re.findall(r"(?:[a-z]+|[+-]) (\d+)", problem.prompt)]
    if problem.family == "chain":
        signs = [1 if w == "+" else -1 for w in words if w in "+-"]
        return numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True))
    if problem.family == "scan":
        return (max if words[0] == "largest" else min)(numbers)
    has = {"ann": numbers[0], "bob": numbers[1]}
    for who, event, n in zip(words[6::4], words[7::4], numbers[2:], strict=False):
        other = "bob" if who == "ann" else "ann"
        has[who] += n if event in ("gets", "finds") else -n
        has[other] += {"gives": n, "gets": -n}.get(event, 0)
    return has[words[-2]]


@every_family
def test_answers_agree_with_an_independent_reading_of_the_prompt(family):
    for problem in mini.problems(family, "dev", 300, 5):
        assert problem.answer == str(independent_answer(problem))


@every_family
def test_problems_are_distinct_repeatable_and_in_one_split_whatever_the_seed(family):
    found = {(split, seed): mini.problems(family, split, 500, seed)
             for split in mini.SPLITS for seed in (0, 1)}  # fmt: skip
    prompts = {key: {problem.prompt for problem in some} for key, some in found.items()}
    assert all(len(one_split) == 500 for one_split in prompts.values())
    splits = [prompts[split, 0] | prompts[split, 1] for split in mini.SPLITS]
    assert len(set.union(*splits)) == sum(map(len, splits))
    assert found["test", 0][:50] == mini.problems(family, "test", 50, 0)
    assert len(prompts["test", 0] & prompts["test", 1]) < 125


def test_problems_solutions_and_vocabulary_are_those_of_the_committed_results():
    digest, rng, tokenizer = hashlib.sha256(), random.Random(0), mini.tokenizer()
    for family in mini.FAMILIES:
        for split in mini.SPLITS:
            for problem in mini.problems(family, split, 20, 3):
                texts = [mini.solution(problem, rng, scale) for scale in (0.0, 0.15, 1.0)]
                judged = [(mini.correct(problem, t), mini.wrong_tokens(problem, t)) for t in texts]
                digest.update(repr((problem.id, problem.prompt, texts, judged)).encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    assert digest.hexdigest()[:16] == "33acc6b32cad5f7b"


@given(FAMILY, SEEDS)
@settings(max_examples=60, deadline=None)
def test_solutions_are_right_or_wrong_from_a_known_token_on(family, seed):
    problem = mini.problems(family, "sft", 1, seed)[0]
    right = mini.solution(problem, random.Random(seed), 0.0)
    plain = {mini.solution(problem, random.Random(i), plain=True) for i in range(3)}
    for text in (right, *plain):
        assert mini.read_answer(text) == problem.answer and not any(
            mini.wrong_tokens(problem, text)
        )
        assert mini.correct(problem, text) == text
    assert len(plain) == 1
    response = mini.solution(problem, random.Random(seed), 1.0)
    corrected = mini.correct(problem, response)
    assert mini.read_answer(corrected) == problem.answer and not any(
        mini.wrong_tokens(problem, corrected)
    )
    flags = mini.wrong_tokens(problem, response)
    changed = [a != b for a, b in zip(response.split(), corrected.split(), strict=True)]
    assert any(changed) == any(flags)
    assert not any(flags) or changed.index(True) == flags.index(True)


def test_consequences_of_a_wrong_decision_are_not_wrong():
    problem = next(p for p in mini.problems("chain", "sft", 500, 0) if p.facts[1] == ("+", 2))
    words = mini.solution(problem, random.Random(1), 0.0).split()
    value = problem.facts[0] + 1
    words[6] = str(value)
    for i, (sign, n) in enumerate(problem.facts[2:], start=1):
        words[7 * i + 2] = str(value)
        value = max(0, min(19, value + (n if sign == "+" else -n)))
        words[7 * i + 6] = str(value)
    words[-1] = str(value)
    assert [i for i, f in enumerate(mini.wrong_tokens(problem, " ".join(words))) if f] == [6]


@every_family
def test_the_habit_makes_a_good_part_wrong_and_every_word_is_one_token(family):
    rng, tokenizer, some = random.Random(0), mini.tokenizer(), mini.problems(family, "sft", 400, 1)
    for scale, low, high in ((0.0, 1.0, 1.0), (0.15, 0.65, 0.95), (1.0, 0.2, 0.65)):
        solutions = [mini.solution(problem, rng, scale) for problem in some]
        right = [mini.read_answer(s) == p.answer for p, s in zip(some, solutions, strict=True)]
        assert low <= sum(right) / len(some) <= high
        lines = [f"{p.prompt} {text}" for p, text in zip(some, solutions, strict=True)]
        ids = tokenizer(lines)["input_ids"]
        # Prompts have one length, and so have solutions.
        assert {len(row) for row in ids} == {len(lines[0].split())} and len(ids[0]) < mini.CONTEXT
        assert not any(tokenizer.unk_token_id in row for row in ids)
        assert tokenizer.batch_decode(ids) == lines


@pytest.mark.parametrize(
    ("response", "answer"),
    [("answer 7", "7"), ("first 3 guess 12", "12"), ("", None), ("7", None), ("answer", None),
     ("answer 7 ?", None), ("answer 20", None), ("answer 07", None), ("answer \u0667", None),
     ("makes 7", None), ("so bob 7", "7"), ("bob 7", None), ("so ann bob 7", None)],
)  # fmt: skip
def test_the_final_answer_is_read_strictly(response, answer):
    assert mini.read_answer(response) == answer


@given(FAMILY, st.text(max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_text_is_judged_without_an_error(family, text):
    problem = mini.problems(family, "sft", 1, 0)[0]
    right = mini.solution(problem, random.Random(0))
    for response in (text, right.rsplit(" ", 1)[0], f"{right} ?"):
        flags = mini.wrong_tokens(problem, response)
        assert len(flags) == len(response.split()) and mini.correct(problem, response) is None
    assert flags == [False] * len(right.split()) + [True]


def test_bad_requests_are_named():
    with refused("unknown family 'cards'"):
        mini.problems("cards", "sft", 1, 0)
    with refused("1000000 distinct problems of chain/dev requested", "ask for fewer"):
        mini.problems("chain", "dev", 10**6, 0)
