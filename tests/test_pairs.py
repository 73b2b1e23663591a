"""Questions and preference pairs: no question in two splits, every pair as the verifier says."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import DOMAIN, open_study

from allo_lib.data import miniature
from allo_lib.data import pairs as pairs_module
from allo_lib.data.pairs import COLUMNS, SPLITS, Pairs, make_pairs
from allo_lib.data.realdata import pair_tokens
from allo_lib.data.tasks import Miniature, RealQuestions, open_task
from allo_lib.engine.encoding import encode_pairs
from allo_lib.engine.store import Artifact
from allo_lib.errors import AlloError
from allo_lib.profiles import config
from allo_lib.profiles.config import Supervised

FAMILIES = ("chain", "scan", "story")


def rows(questions: int, each: int = 1) -> list[dict]:
    return [{"id": f"q{i}", "number": n} for i in range(questions) for n in range(each)]


def split(given, counts):
    return pairs_module._split(given, counts, "toy")


# --- splits ------------------------------------------------------------------------------------


def test_a_question_is_in_one_split_with_all_its_pairs():
    parts = split(rows(10, each=3), {"train": 5, "heldout": 3, "mask": 2})
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 15, "heldout": 9, "mask": 6
    }  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_splits_never_share_a_question_and_shrink_alike(questions, each, sizes):
    counts = {f"s{i}": size for i, size in enumerate(sizes)}
    shrink = min(1.0, questions / sum(sizes)) if sum(sizes) else 0
    wanted = {name: int(size * shrink) for name, size in counts.items()}
    if not any(sizes) or min(wanted[n] for n, size in counts.items() if size) < 2:
        with pytest.raises(AlloError, match=f"only {questions} questions gave a pair"):
            split(rows(questions, each), counts)
        return
    parts = split(rows(questions, each), counts)
    ids = {name: {row["id"] for row in part} for name, part in parts.items()}
    assert {name: len(found) for name, found in ids.items()} == wanted
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    assert all(len(parts[name]) == each * len(ids[name]) for name in parts)


def test_all_wrong_samples_go_where_the_pairs_of_their_question_go(tiny_study):
    """Also those of questions without a right sample, in proportion; none is a held-out one's."""
    two = open_study(tiny_study.results_dir, replicates__pair_sets=2)
    found = two.pairs(DOMAIN)
    first, second = found.rows["wrong"], found.rows["wrong1"]
    ids = {split: {row["id"] for row in found.rows[split]} for split in found.rows}
    assert not ids["wrong"] & ids["wrong1"]
    assert ids["train"] <= ids["wrong"] and ids["train1"] <= ids["wrong1"]
    elsewhere = ids["mask"] | ids["heldout"]
    assert not elsewhere & (ids["wrong"] | ids["wrong1"])
    without = len(ids["wrong"] - ids["train"]), len(ids["wrong1"] - ids["train1"])
    assert min(without) > 0 and abs(without[0] - without[1]) <= 1
    assert {row["rejected"] for row in found.rows["train"]} <= {row["rejected"] for row in first}
    task, questions = two.task(DOMAIN), two.pair_questions(DOMAIN)
    for row in first + second:
        assert task.answered(questions[row["id"]], row["rejected"])
        assert not task.right(questions[row["id"]], row["rejected"])
    told = [(row["id"], row["rejected"]) for row in first + second]
    assert len(set(told)) == len(told)


def test_no_pairs_at_all_is_told():
    with pytest.raises(AlloError, match="toy: only 0 questions gave a pair, 4 were asked for"):
        split([], {"train": 4})


def test_the_study_s_splits_are_disjoint_by_question(tiny_study):
    found = tiny_study.pairs(DOMAIN).rows
    assert set(found) == {*SPLITS, "wrong"} and found["dev"] == []
    ids = [{row["id"] for row in found[name]} for name in ("train", "heldout", "mask")]
    assert all(ids) and sum(map(len, ids)) == len(set().union(*ids))
    prompts = [{row["prompt"] for row in found[name]} for name in ("train", "heldout", "mask")]
    assert sum(map(len, prompts)) == len(set().union(*prompts))


# --- sampled pairs -----------------------------------------------------------------------------


def test_chosen_is_right_and_rejected_is_wrong(tiny_study):
    task, questions = tiny_study.task(DOMAIN), tiny_study.pair_questions(DOMAIN)
    for part in tiny_study.pairs(DOMAIN).rows.values():
        for row in part:
            question = questions[row["id"]]
            assert (row["prompt"], row["dataset"]) == (question.prompt, question.dataset)
            assert task.right(question, row["chosen"]) and task.right(question, row["solution"])
            assert task.answered(question, row["rejected"])
            assert not task.right(question, row["rejected"])
            assert row["corrected"] == task.correction(question, row["rejected"])


def test_pairs_of_one_question_are_distinct_and_limited(tiny_study):
    task, question = tiny_study.task(DOMAIN), tiny_study.task(DOMAIN).questions("pairs", 3)[0]
    right, wrong = ["so 1", "so 2", "so 3"], ["so 4", "so 5"]

    def made(most):
        found = pairs_module._pairs_of(tiny_study, task, question, right, wrong, most)
        return [(row["chosen"], row["rejected"]) for row in found]

    assert sorted(made(9)) == [(c, r) for c in right for r in wrong]
    assert made(4) == made(9)[:4] and made(9) != sorted(made(9))
    assert pairs_module._pairs_of(tiny_study, task, question, [], wrong, 5) == []


def test_the_summary_counts_what_was_sampled(tiny_study):
    summary = tiny_study.pairs(DOMAIN).summary
    settings_ = tiny_study.domain(DOMAIN).pairs
    assert summary["questions"] == settings_.questions and summary["samples"] == settings_.samples
    assert 0 < summary["right"] < 1
    assert 0 < summary["questions_with_both"] <= summary["pairs"] <= summary["questions"]


def test_responses_that_training_could_not_read_are_left_out(tiny_study, monkeypatch):
    kept, whole = tiny_study.pairs(DOMAIN), tiny_study.domain(DOMAIN)
    lengths = [pair_tokens(r, tiny_study.tokenizer) for part in SPLITS for r in kept.rows[part]]
    shorter = dataclasses.replace(whole, max_length=sorted(lengths)[len(lengths) // 2])
    assert shorter.max_length < max(lengths)
    sft = tiny_study.sft(DOMAIN)
    monkeypatch.setattr(tiny_study, "load_sft", lambda name: tiny_study.load(sft))
    monkeypatch.setattr(tiny_study, "domain", lambda name: shorter)
    made = make_pairs(tiny_study, DOMAIN)
    assert made.summary["too_long"] > kept.summary["too_long"] == 0
    assert 0 < made.summary["pairs"] < kept.summary["pairs"]
    assert made.summary["right"] == kept.summary["right"]  # what was sampled is the same
    for part in ("train", "heldout", "mask"):
        assert encode_pairs(tiny_study.tokenizer, made.rows[part], shorter.max_length)


def test_pairs_come_again_from_the_same_seed(tiny_study, tmp_path):
    again = make_pairs(tiny_study, DOMAIN)
    kept = tiny_study.pairs(DOMAIN)
    assert (again.rows, again.summary) == (kept.rows, kept.summary)
    again.save(tmp_path)
    read = Pairs.load(Artifact("pairs", "key", tmp_path, 0.0))
    assert read == dataclasses.replace(again, key="key")


def test_the_dataset_has_the_columns_of_trl(tiny_study):
    found = tiny_study.pairs(DOMAIN).dataset("train")
    assert tuple(found.column_names) == COLUMNS
    train = tiny_study.pairs(DOMAIN).rows["train"]
    assert [dict(row) for row in found] == [{key: row[key] for key in COLUMNS} for row in train]


def test_a_prediction_that_cannot_be_corrected_is_kept_as_it_is():
    row = {"prompt": "p", "solution": "s", "rejected": "r", "corrected": None}
    first, second = Pairs({"mask": [row, row | {"corrected": ""}]}, {}).corrections("mask")
    assert (first.prompt, first.solution, first.prediction, first.corrected) == ("p", "s", "r", "r")
    assert second.corrected == ""


# --- tasks -------------------------------------------------------------------------------------


def domain(**settings):
    return config.Domain(datasets=FAMILIES, **settings)


@pytest.mark.parametrize("split_name", ["sft", "pairs", "dev", "test"])
def test_generated_questions_are_equally_many_of_each_family(split_name):
    questions = Miniature(domain(), 0).questions(split_name, 30)
    assert [q.dataset for q in questions[:6]] == [*FAMILIES, *FAMILIES]
    assert len({q.id for q in questions}) == len({q.prompt for q in questions}) == 30
    assert questions == Miniature(domain(), 0).questions(split_name, 30)
    assert questions != Miniature(domain(), 1).questions(split_name, 30)


def test_a_mix_changes_the_shares_of_the_families():
    questions = Miniature(domain(), 0).questions("sft", 40, (0.5, 0.25, 0.25))
    families = [q.dataset for q in questions]
    assert [families.count(family) for family in FAMILIES] == [20, 10, 10]
    assert [families[:20].count(family) for family in FAMILIES] == [10, 5, 5]


def test_generated_solutions_are_judged_right_and_their_parts_as_wrong_or_not():
    task = Miniature(domain(), 0)
    wrong = 0
    for question in task.questions("sft", 30):
        assert task.answered(question, question.solution)
        assert task.right(question, question.solution)
        assert task.correction(question, question.solution) == question.solution
        assert not any(task.wrong_tokens(question, question.solution))
        assert task.demonstration(question, Supervised()) == task.demonstration(
            question, Supervised()
        )
        assert task.right(question, task.demonstration(question, Supervised()))
        habit = task.demonstration(question, Supervised(error_scale=1.0))
        flags = task.wrong_tokens(question, habit)
        assert len(flags) == len(habit.split())
        assert task.right(question, task.correction(question, habit))
        if not task.right(question, habit):
            wrong += 1
            assert any(flags)
    assert wrong > 5
    assert miniature.read_answer("nothing here") is None


def choice_file(folder, name: str, split_name: str, count: int):
    path = folder / name / f"{split_name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": f"{name}-{split_name}-{i}", "question": f"Which?\n(A) tea {i}\n(B) milk {i}",
         "solution": "", "answer": "AB"[i % 2], "choices": [f"tea {i}", f"milk {i}"]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


@pytest.fixture
def choices(tmp_path):
    for name in ("one", "two", "three"):
        choice_file(tmp_path, name, "train", 60)
        choice_file(tmp_path, name, "test", 20)
    return tmp_path


def choice(folder, seed=0, names=("one", "two", "three"), sft=30, pairs=30, dev=30, **phases):
    settings_ = config.Domain(
        kind="choice", datasets=names, sft=config.Supervised(examples=sft, **phases),
        pairs=config.Pairs(questions=pairs), dev=dev, test=30,
    )  # fmt: skip
    return open_task(settings_, seed, str(folder))


def ids_of(task, split_name, count, *mix):
    return {question.id for question in task.questions(split_name, count, *mix)}


@pytest.mark.parametrize("sft, pairs", [(30, 30), (31, 29), (32, 34), (5, 7), (35, 50)])
def test_real_questions_are_in_one_split_only(choices, sft, pairs):
    task = choice(choices, sft=sft, pairs=pairs)
    parts = [ids_of(task, "sft", sft), ids_of(task, "pairs", pairs), ids_of(task, "dev", 30)]
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_a_mix_of_real_questions_keeps_the_splits_apart(choices):
    mix = (0.8, 0.1, 0.1)
    task = choice(choices, sft=40, mix=mix)
    parts = [ids_of(task, "sft", 40, mix), ids_of(task, "pairs", 30), ids_of(task, "dev", 30)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 100


def test_seeds_share_the_test_questions_and_draw_others_apart(choices):
    first, second = choice(choices, 0), choice(choices, 1)
    assert first.questions("test", 30) == second.questions("test", 30)
    assert first.questions("sft", 30) != second.questions("sft", 30)
    assert isinstance(first, RealQuestions)


def test_a_gold_option_is_right_and_another_is_not(choices):
    task = choice(choices)
    for question in task.questions("dev", 6):
        assert task.right(question, question.solution)
        assert task.answered(question, question.solution)
        gold = question.source["choices"]["AB".index(question.source["answer"])]
        other = next(c for c in question.source["choices"] if c != gold)
        wrong = question.solution.replace(gold, other)
        assert task.answered(question, wrong) and not task.right(question, wrong)
        assert task.right(question, task.correction(question, wrong))
        assert task.demonstration(question, Supervised(error_scale=1.0)) == question.solution


def test_too_few_rows_are_told(choices):
    with pytest.raises(AlloError, match="one/train has 60 rows, but dev needs rows 20 to 70"):
        choice(choices, dev=150).questions("dev", 150)
