"""Questions of a domain: no question in two splits, prompts, targets, verdicts and corrections."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from test_rows import ROW

from allo_lib.data import answers, miniature, tasks
from allo_lib.data.benchmarks import check_row, options
from allo_lib.profiles import config
from allo_lib.profiles.config import Supervised

FAMILIES = miniature.FAMILIES
SIZES = {"gsm8k": 6000, "math": 6000, "mawps": 1144, "tabmwp": 1000}


def domain(names=tuple(SIZES), kind="questions", sft=0, pairs=0, dev=0, **phase):
    return config.Domain(
        kind=kind, datasets=names, sft=Supervised(examples=sft, **phase),
        pairs=config.Pairs(questions=pairs), dev=dev,
    )  # fmt: skip


# --- how many rows -------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 400), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_equal_shares_give_way_to_what_there_is(count, rooms):
    room = {f"set{i}": rows for i, rows in enumerate(rooms)}
    found = tasks.spread(count, room)
    if count > sum(rooms):
        assert found is None
        return
    assert sum(found.values()) == count and list(found) == list(room)
    assert all(0 <= found[name] <= room[name] for name in room)
    # Water finds its level: who has rows to spare gives the most, but for rounding.
    spare = [found[name] for name in room if found[name] < room[name]]
    assert not spare or max(found.values()) <= min(spare) + 1


def test_small_data_sets_give_what_they_have():
    found = tasks.plan(domain(sft=4000, pairs=2500, dev=500), SIZES)
    assert found["dev"] == dict.fromkeys(SIZES, 125)
    assert found["pairs"] == dict.fromkeys(SIZES, 625)
    assert found["sft"] == {"gsm8k": 1678, "math": 1678, "mawps": 394, "tabmwp": 250}


def test_more_rows_than_there_are_is_told():
    with refused(
        "gsm8k/train has 6000 rows, math/train has 6000 rows, mawps/train has 1144 rows, "
        "tabmwp/train has 1000 rows, but the profile requests 500 of dev, 14000 of sft: lower"
    ):
        tasks.plan(domain(sft=14000, dev=500), SIZES)
    assert tasks.counts_of_test(10, {"a": 2, "b": 20}) == {"a": 2, "b": 8}
    with refused("a/test has 2 rows, b/test has 20 rows, but the profile requests 23 of test"):
        tasks.counts_of_test(23, {"a": 2, "b": 20})


# --- one question --------------------------------------------------------------------------------


def test_the_options_stand_on_one_line_and_explanations_are_cut():
    assert tasks.prompt("ecqa", ROW) == (
        "Where does one light a fire\nat night?\nOptions: synagogue, bedroom, St. Paul\nAnswer:"
    )
    sleep, lit = " A bedroom is where one sleeps.", " Candles can be lit in a bedroom."
    for explain, before in ((0, ""), (1, sleep), (9, sleep + lit)):
        expected = f"{before} The answer is: bedroom"
        assert tasks.target("ecqa", ROW, explain=explain) == expected
    assert tasks.target("ecqa", ROW | {"solution": None}, 1) == " The answer is: bedroom"
    assert tasks.target("gsm8k", ROW | {"solution": " "}) == " The answer is: bedroom"


@pytest.mark.parametrize(
    "response, expected",
    [
        (" The answer is: bedroom", "B"),
        (" So what. The answer is:  Bedroom. ", "B"),
        ("The answer is: st. paul", "C"),
        ("The answer is: synagogue. No! The answer is: bedroom", "B"),
        ("The answer is: B", None),
        ("The answer is: bedroom or synagogue", None),
        ("The answer is: bedroom. Good night.", None),
        ("The answer is bedroom", None),
        ("The answer is:", None),
    ],
)
def test_answers_are_read_strictly(response, expected):
    assert tasks.read("ecqa", ROW, response) == expected
    assert tasks.is_right("ecqa", ROW, response) == (expected == "B")


@pytest.mark.parametrize(
    "response, corrected",
    [
        (" So. The answer is: synagogue", " So. The answer is: bedroom"),
        (" So. The answer is: bedroom.", " So. The answer is: bedroom."),
        (" So. The answer is", " So. The answer is: bedroom"),
        (" So it goes \n", " So it goes The answer is: bedroom"),
        ("", " The answer is: bedroom"),
    ],
)
def test_correction_changes_the_final_answer_only(response, corrected):
    assert tasks.correction("ecqa", ROW, response) == corrected


words = st.text("abcdefg XYZ.,'()-é", min_size=1, max_size=12).filter(
    lambda text: answers.plain(text) and answers.MARKER not in text
)


@st.composite
def multiple_choice(draw):
    choices = draw(st.lists(words, min_size=2, max_size=6, unique_by=answers.plain))
    return {
        "id": "q",
        "question": "\n".join([draw(words), *options(choices)]),
        "solution": draw(st.none() | words),
        "answer": draw(st.sampled_from(answers.LETTERS[: len(choices)])),
        "choices": choices,
    }


@settings(deadline=None)
@given(multiple_choice(), st.integers(0, 2), st.text(max_size=40))
def test_targets_are_right_and_corrections_become_right(row, explain, response):
    check_row(row)
    assert tasks.is_right("ecqa", row, tasks.target("ecqa", row, explain))
    corrected = tasks.correction("ecqa", row, response)
    assert tasks.is_right("ecqa", row, corrected)
    assert tasks.correction("ecqa", row, corrected) == corrected
    for letter, option in zip(answers.LETTERS, row["choices"], strict=False):
        assert tasks.read("ecqa", row, f"Hm. The answer is: {option}") == letter


# --- generated questions -------------------------------------------------------------------------


@pytest.mark.parametrize("split", miniature.SPLITS)
def test_generated_questions_are_equally_many_of_each_family(split):
    mini = tasks.Miniature(domain(FAMILIES, "miniature"), 0)
    questions = mini.questions(split, 30)
    assert [q.dataset for q in questions[:6]] == [*FAMILIES, *FAMILIES]
    assert len({q.id for q in questions}) == len({q.prompt for q in questions}) == 30
    assert questions == tasks.Miniature(domain(FAMILIES, "miniature"), 0).questions(split, 30)
    assert questions != tasks.Miniature(domain(FAMILIES, "miniature"), 1).questions(split, 30)
    mixed = [q.dataset for q in mini.questions(split, 40, (0.5, 0.25, 0.25))]
    assert [mixed.count(family) for family in FAMILIES] == [20, 10, 10]
    assert [mixed[:20].count(family) for family in FAMILIES] == [10, 5, 5]


def test_generated_solutions_are_judged_right_and_their_parts_as_wrong_or_not():
    task = tasks.Miniature(domain(FAMILIES, "miniature"), 0)
    wrong = 0
    for question in task.questions("sft", 30):
        assert task.answered(question, question.solution)
        assert task.right(question, question.solution)
        assert task.correction(question, question.solution) == question.solution
        assert not any(task.wrong_tokens(question, question.solution))
        said = task.demonstration(question, Supervised())
        assert said == task.demonstration(question, Supervised()) and task.right(question, said)
        habit = task.demonstration(question, Supervised(error_scale=1.0))
        flags = task.wrong_tokens(question, habit)
        assert len(flags) == len(habit.split())
        assert task.right(question, task.correction(question, habit))
        if not task.right(question, habit):
            wrong += 1
            assert any(flags)
    assert wrong > 5


# --- real questions ------------------------------------------------------------------------------

FEW = {"strategyqa": 8, "gsm8k": 40, "openbookqa": 40}


def row(name, split, number):
    free = {"solution": "It is.", "choices": None, "id": f"{split}-{number}"}
    if name == "strategyqa":
        return free | {"question": f"Is it {split}{number}?", "answer": "yes"}
    if name == "gsm8k":
        return free | {"question": f"How many {split}{number}?", "answer": str(number)}
    text = f"Which {split}{number}?\n(A) this\n(B) that"
    return free | {"question": text, "answer": "B", "choices": ["this", "that"], "solution": None}


@pytest.fixture
def folder(tmp_path):
    for name, rows in FEW.items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps(row(name, split, i)) for i in range(rows)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


@pytest.mark.parametrize("sft, pairs, dev", [(30, 12, 6), (31, 29, 28), (5, 7, 70), (35, 50, 3)])
def test_kinds_of_questions_are_mixed_and_no_question_is_in_two_splits(folder, sft, pairs, dev):
    settings = domain(tuple(FEW), sft=sft, pairs=pairs, dev=dev)
    task = tasks.open_task(settings, 0, folder)
    counts = {"sft": sft, "pairs": pairs, "dev": dev, "test": 30}
    found = {split: task.questions(split, count) for split, count in counts.items()}
    ids = [one.id for part in found.values() for one in part]
    # The data sets use the same ids for different questions.
    assert len(ids) == len(set(ids)) == sum(counts.values())
    assert {one.dataset for one in found["dev"]} == set(FEW)
    for one in found["sft"]:
        assert task.right(one, one.solution) and task.answered(one, one.solution)
        assert task.demonstration(one, settings.sft) == one.solution
        assert not task.answered(one, "It is what it is.")
        assert task.right(one, task.correction(one, "It is. The answer is: 7 or so"))
        other = {"yes": "no", "B": "this"}.get(one.source["answer"], "999")
        wrong = f"So. The answer is: {other}"
        assert task.answered(one, wrong) and not task.right(one, wrong)
    other_seed = tasks.open_task(settings, 1, folder)
    assert other_seed.questions("test", 30) == found["test"]
    assert other_seed.questions("pairs", pairs) != found["pairs"]


def test_what_real_data_sets_cannot_give_is_told(folder):
    task = tasks.open_task(domain(tuple(FEW), sft=30, pairs=12, dev=6), 0, folder)
    with refused("99 questions of pairs are requested, but the profile sets 4 of strategyqa, 4 of"):
        task.questions("pairs", 99)
    with refused("mix is of the miniature's families"):
        tasks.open_task(domain(tuple(FEW), sft=30, mix=(0.5, 0.25, 0.25)), 0, folder)
    with refused("has no options; expected multiple choice"):
        tasks.open_task(domain(("gsm8k",), "choice"), 0, folder).questions("test", 3)
