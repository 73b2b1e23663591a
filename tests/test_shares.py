"""Rows dealt out to the splits of a domain of several data sets, some of them small."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from allo_lib.data import realdata, shares, tasks
from allo_lib.profiles import config

SIZES = {"gsm8k": 6000, "math": 6000, "mawps": 1144, "tabmwp": 1000}


def domain(names=tuple(SIZES), sft=0, pairs=0, dev=0, **phase):
    return config.Domain(
        kind="questions", datasets=names, sft=config.Supervised(examples=sft, **phase),
        pairs=config.Pairs(questions=pairs), dev=dev,
    )  # fmt: skip


@given(st.integers(0, 400), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_equal_shares_give_way_to_what_there_is(count, rooms):
    room = {f"set{i}": rows for i, rows in enumerate(rooms)}
    found = shares.spread(count, room)
    if count > sum(rooms):
        assert found is None
        return
    assert sum(found.values()) == count and list(found) == list(room)
    assert all(0 <= found[name] <= room[name] for name in room)
    # Water finds its level: who has rows to spare gives the most, but for rounding.
    spare = [found[name] for name in room if found[name] < room[name]]
    assert not spare or max(found.values()) <= min(spare) + 1


@given(st.integers(0, 999), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_mix_is_met_to_the_row_and_adds_up(count, weights):
    mix = tuple(weight / sum(weights) for weight in weights)
    names = [f"set{i}" for i in range(len(mix))]
    found = shares.by_mix(count, names, mix)
    assert sum(found.values()) == count
    assert all(abs(found[n] - count * share) <= 1 for n, share in zip(names, mix, strict=True))


def test_small_data_sets_give_what_they_have():
    found = shares.plan(domain(sft=4000, pairs=2500, dev=500), SIZES)
    assert found["dev"] == dict.fromkeys(SIZES, 125)
    assert found["pairs"] == dict.fromkeys(SIZES, 625)
    assert found["sft"] == {"gsm8k": 1678, "math": 1678, "mawps": 394, "tabmwp": 250}


def test_a_mix_comes_before_the_other_splits():
    mix = (0.25, 0.25, 0.25, 0.25)
    found = shares.plan(domain(sft=3600, pairs=2500, dev=500, mix=mix), SIZES)
    assert found["sft"] == dict.fromkeys(SIZES, 900)
    assert found["dev"]["tabmwp"] == 100 and found["pairs"]["tabmwp"] == 0
    assert sum(found["pairs"].values()) == 2500 and sum(found["dev"].values()) == 500
    for name, rows in SIZES.items():
        assert sum(parts[name] for parts in found.values()) <= rows


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (dict(sft=14000, dev=500), "mawps/train has 1144 rows, but sft needs rows 0 to 3500"),
        (dict(pairs=20000), "gsm8k"),
        (dict(dev=14145), "mawps/train has 1144 rows, but dev needs rows 0 to 3537"),
        (dict(sft=6000, mix=(0.7, 0.1, 0.1, 0.1), dev=9000), "has 1144 rows, but dev needs"),
        (dict(sft=8000, mix=(0.5, 0.2, 0.2, 0.1)), "mawps/train has 1144 rows, but sft needs"),
    ],
)
def test_what_cannot_be_is_told(asked, told):
    with refused("lower the counts of the profile", told if "train" in told else ""):
        shares.plan(domain(**asked), SIZES)


def test_too_few_test_questions_are_told():
    assert shares.of_test(10, {"a": 2, "b": 20}) == {"a": 2, "b": 8}
    with refused("a/test has 2 rows, but test needs rows 0 to 12: lower the counts"):
        shares.of_test(23, {"a": 2, "b": 20})


# --- a task of several data sets -----------------------------------------------------------------

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


def test_kinds_of_questions_are_mixed_and_no_question_is_in_two_splits(folder):
    settings = domain(tuple(FEW), sft=30, pairs=12, dev=6)
    task = tasks.open_task(settings, 0, folder)
    counts = {"sft": 30, "pairs": 12, "dev": 6, "test": 30}
    found = {split: task.questions(split, count) for split, count in counts.items()}
    ids = [one.id for part in found.values() for one in part]
    # The data sets use the same ids for different questions.
    assert len(ids) == len(set(ids)) == 78
    assert {one.dataset for one in found["dev"]} == set(FEW)
    assert sum(one.dataset == "strategyqa" for one in found["sft"]) == 8 - 4 - 2
    for one in found["sft"]:
        assert task.right(one, one.solution) and task.answered(one, one.solution)
        assert task.demonstration(one, settings.sft) == one.solution
        assert not task.answered(one, "It is what it is.")
        assert task.right(one, task.correction(one, "It is. The answer is: 7 or so"))
    with refused("99 questions of pairs asked for, but the profile sets 4 of strategyqa, 4 of"):
        task.questions("pairs", 99)


def test_a_choice_domain_takes_options_only(folder):
    settings = config.Domain(kind="choice", datasets=("gsm8k",), test=3)
    with refused("has no options; expected multiple choice"):
        tasks.open_task(settings, 0, folder).questions("test", 3)
    assert realdata.load_rows("openbookqa", "test", folder)
