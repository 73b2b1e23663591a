"""The generated tasks: distinct, split by prompt, right when meant to be, wrong in known places."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.data import miniature as mini
from allo_lib.errors import AlloError

SEEDS = st.integers(0, 2**32 - 1)
FAMILY = st.sampled_from(mini.FAMILIES)
every_family = pytest.mark.parametrize("family", mini.FAMILIES)


def one(family, seed):
    return mini.problems(family, "sft", 1, seed)[0]


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
    found = {(split, seed): mini.problems(family, split, 1000, seed)
             for split in mini.SPLITS for seed in (0, 1)}  # fmt: skip
    prompts = {key: {problem.prompt for problem in some} for key, some in found.items()}
    assert all(len(one_split) == 1000 for one_split in prompts.values())
    splits = [prompts[split, 0] | prompts[split, 1] for split in mini.SPLITS]
    assert len(set.union(*splits)) == sum(map(len, splits))
    assert len({problem.id for problem in found["test", 0]}) == 1000
    assert found["test", 0][:50] == mini.problems(family, "test", 50, 0)
    assert len(prompts["test", 0] & prompts["test", 1]) < 250


@given(FAMILY, SEEDS)
@settings(max_examples=100, deadline=None)
def test_without_errors_a_solution_is_right_in_every_word(family, seed):
    problem = one(family, seed)
    response = mini.solution(problem, random.Random(seed), 0.0)
    assert mini.is_right(problem, response)
    assert not any(mini.wrong_tokens(problem, response))
    assert mini.correct(problem, response) == response
    plain = {mini.solution(problem, random.Random(i), plain=True) for i in range(5)}
    assert len(plain) == 1 and mini.is_right(problem, plain.pop())
    assert len({mini.solution(problem, random.Random(i)) for i in range(5)}) > 1


@settings(max_examples=50, deadline=None)
@given(FAMILY, SEEDS)
def test_a_correction_is_right_keeps_length_and_starts_at_a_wrong_token(family, seed):
    problem = one(family, seed)
    response = mini.solution(problem, random.Random(seed), 1.0)
    corrected = mini.correct(problem, response)
    assert mini.is_right(problem, corrected)
    assert not any(mini.wrong_tokens(problem, corrected))
    flags = mini.wrong_tokens(problem, response)
    pairs = zip(response.split(), corrected.split(), strict=True)
    changed = [a != b for a, b in pairs]
    assert any(changed) == any(flags)
    if any(flags):
        assert changed.index(True) == flags.index(True)


def test_a_correction_keeps_the_wording():
    problem = mini.problems("chain", "sft", 1, 0)[0]
    response = mini.solution(problem, random.Random(0), 0.0)
    *words, answer = response.split()
    wrong = " ".join([*words, str((int(answer) + 1) % 20)])
    assert mini.wrong_tokens(problem, wrong) == [False] * len(words) + [True]
    assert not mini.is_right(problem, wrong) and mini.correct(problem, wrong) == response
    # "adding" and "plus" mean the same: what replaces the second careful word for - is "adding".
    sign = next(p for p in mini.problems("chain", "sft", 50, 0) if p.facts[1][0] == "+")
    words = mini.solution(sign, random.Random(0), plain=True).split()
    assert words[3] == "plus"
    for said, right in (("less", "adding"), ("minus", "plus"), ("off", "and"), ("down", "up")):
        words[3] = said
        assert mini.correct(sign, " ".join(words)).split()[3] == right


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
def test_the_habit_makes_a_good_part_of_the_solutions_wrong(family):
    rng = random.Random(0)
    some = mini.problems(family, "sft", 800, 1)
    texts = {scale: [mini.solution(p, rng, scale) for p in some] for scale in (0.0, 0.15, 1.0)}
    share = {
        scale: sum(map(mini.is_right, some, solutions)) / len(some)
        for scale, solutions in texts.items()
    }
    assert share[0.0] == 1.0
    assert 0.65 < share[0.15] < 0.95
    assert 0.2 < share[1.0] < 0.65
    # Prompts have one length, and so have solutions.
    assert len({len(p.prompt.split()) for p in some}) == 1
    assert len({len(text.split()) for solutions in texts.values() for text in solutions}) == 1
    assert len((some[0].prompt + " " + texts[0.0][0]).split()) < mini.CONTEXT


@pytest.mark.parametrize(
    ("response", "answer"),
    [("answer 7", "7"), ("first 3 guess 12", "12"), ("", None), ("7", None), ("answer", None),
     ("answer 7 ?", None), ("answer 20", None), ("answer 07", None), ("answer \u0667", None),
     ("makes 7", None), ("so bob 7", "7"), ("bob 7", None), ("so ann bob 7", None)],
)  # fmt: skip
def test_the_final_answer_is_read_strictly(response, answer):
    assert mini.read_answer(response) == answer


@given(FAMILY, st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_judged_without_an_error(family, response):
    problem = one(family, 0)
    assert len(mini.wrong_tokens(problem, response)) == len(response.split())
    assert mini.correct(problem, response) is None
    assert mini.is_right(problem, response) == (mini.read_answer(response) == problem.answer)


def test_a_truncated_or_overlong_response_cannot_be_corrected():
    problem = one("scan", 0)
    response = mini.solution(problem, random.Random(0), 0.0)
    assert mini.correct(problem, response.rsplit(" ", 1)[0]) is None
    assert mini.correct(problem, response + " ?") is None
    assert mini.wrong_tokens(problem, response + " ?")[-1]


def test_every_word_is_one_known_token():
    tok = mini.tokenizer()
    rng = random.Random(0)
    assert tok.pad_token_id != tok.eos_token_id
    assert tok.model_max_length == mini.CONTEXT
    for family in mini.FAMILIES:
        for problem in mini.problems(family, "sft", 200, 0):
            line = problem.prompt + " " + mini.solution(problem, rng, 1.0)
            ids = tok(line)["input_ids"]
            assert len(ids) == len(line.split())
            assert tok.unk_token_id not in ids
            assert tok.decode(ids) == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cards", "sft", 1, 0), "unknown family 'cards'"),
        (("chain", "train", 1, 0), "unknown split 'train'"),
        (("chain", "sft", -1, 0), "count is -1"),
        (("chain", "dev", 10**6, 0), "ask for fewer"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(AlloError, match=re.escape(message)):
        mini.problems(*arguments)
