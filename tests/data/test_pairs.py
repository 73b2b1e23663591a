"""Preference pairs: no question in two splits, every pair as the verifier or people say."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_like import TEMPLATE, write_data
from refusals import refused
from tiny_study import DOMAIN, open_study
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from allo_lib.data import pairs as pairs_module
from allo_lib.data.pairs import (
    COLUMNS,
    SPLITS,
    Pairs,
    helpful_prompt,
    make_pairs,
    pair_tokens,
    preference_pairs,
)
from allo_lib.engine.encoding import encode_pairs
from allo_lib.engine.store import Artifact
from allo_lib.errors import AlloError
from allo_lib.profiles import config


def rows(questions: int, each: int = 1) -> list[dict]:
    return [{"id": f"q{i}", "number": n} for i in range(questions) for n in range(each)]


def split(given, counts):
    return pairs_module._split(given, counts, "toy")


# --- splits ------------------------------------------------------------------------------------


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
    read = Pairs.load(Artifact("pairs", "key", tmp_path))
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


# --- human pairs ---------------------------------------------------------------------------------

PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello!", "rejected": "Go."}


def tokenizer(template=None):
    """One token a word; a message is its role and its words."""
    core = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", chat_template=template
    )


def test_a_conversation_becomes_chat_messages():
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello! Human: me\n\nHuman: And?\n\nAssistant:"
    assert helpful_prompt(text) == [
        {"role": "user", "content": "Hi\n\nthere"},
        {"role": "assistant", "content": "Hello! Human: me"},
        {"role": "user", "content": "And?"},
    ]
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert [m["content"] for m in helpful_prompt(twice)] == ["a", "b\n\nc", "d"]


ORDER = "': expected '\\n\\nHuman: ...' first, and the open turn '\\n\\nAssistant:' after a human"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ORDER),
        ("hello", ORDER),
        ("\n\nHuman: hi", ORDER),
        ("x\n\nHuman: hi\n\nAssistant:", ORDER),
        ("\n\nHuman: hi\n\nAssistant: ho", ORDER),
        ("\n\nAssistant: hi\n\nHuman: ho\n\nAssistant:", ORDER),
        ("\n\nHuman: hi\n\nAssistant: ho\n\nAssistant:", ORDER),
        ("\n\nHuman: Hi\n\nAssistant:\n\nAssistant:", ORDER),
        ("\n\nHuman: " + "a" * 10**6, "aaa': expected '"),
        ("\n\nHuman:\n\nAssistant:", "': an empty turn; expected text in each"),
    ],
)
def test_conversations_of_another_form_are_refused_in_one_line(text, told):
    with refused("prompt '", told):
        helpful_prompt(text)


def test_human_pairs_have_trls_columns_as_messages_or_strings():
    assert preference_pairs([PAIR], tokenizer(TEMPLATE), 99) == [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "Hello!"}],
            "rejected": [{"role": "assistant", "content": "Go."}],
        }
    ]
    spaced = PAIR | {"chosen": " Hello!", "rejected": " Go."}
    assert preference_pairs([PAIR], tokenizer(), 99) == [spaced]
    plain = PAIR | {"prompt": "Q:"}
    assert preference_pairs([plain], tokenizer(TEMPLATE), 99) == [plain]
    with refused("rows are no preferences; expected the keys prompt, chosen, rejected"):
        preference_pairs([{"id": "a", "question": "Sing.", "outputs": {}}], tokenizer(), 99)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_pairs_over_the_limit_are_dropped_and_counted(caplog, template):
    # `user Hi assistant` or `Human: Hi Assistant:`, then three words and the end token.
    length = 7
    long = PAIR | {"rejected": "one two three"}
    assert len(preference_pairs([long, PAIR], tokenizer(template), length)) == 2
    assert caplog.text == ""
    assert len(preference_pairs([long, PAIR], tokenizer(template), length - 1)) == 1
    assert f"1 of 2 pairs dropped: longer than {length - 1} tokens" in caplog.text
    with refused("none of 2 pairs has at most 2 tokens"):
        preference_pairs([long, PAIR], tokenizer(template), 2)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_human_pairs_are_one_a_conversation_and_split_by_it(tmp_path, template):
    write_data(tmp_path, train=30, test=5)
    file = tmp_path / "hh_helpful" / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines + lines[:9]))  # nine conversations are compared twice
    settings_ = config.Pairs(train=10, dev=4, mask=6, heldout=3)
    domain = config.Domain(kind="preferences", datasets=("hh_helpful",), pairs=settings_)
    study = SimpleNamespace(
        domain=lambda name: domain, tokenizer=tokenizer(template), data_dir=tmp_path, seed=0,
        profile=config.Profile(name="toy", domains={"toy": domain}),
    )  # fmt: skip
    found = make_pairs(study, "toy")
    assert found.summary == {"given": 39, "pairs": 30}
    counts = {"train": 10, "dev": 4, "mask": 6, "heldout": 3}
    assert {split: len(rows) for split, rows in found.rows.items()} == counts
    rows = [row for split in ("train", "dev", "mask") for row in found.rows[split]]
    assert len({row["id"] for row in rows}) == len({str(row["prompt"]) for row in rows}) == 20
    for row in rows + found.rows["heldout"]:
        assert row["chosen"].strip().startswith("surely") and row["rejected"].strip()[:2] == "no"
        assert row["solution"] == row["corrected"] == row["chosen"]
        assert isinstance(row["prompt"], str) == (template is None)
        assert row["dataset"] == "hh_helpful" and row["id"].startswith("hh_helpful-")
