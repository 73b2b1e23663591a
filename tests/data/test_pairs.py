"""Preference pairs: no question in two splits, every pair as the verifier or people say."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_like import TEMPLATE, write_data
from refusals import refused
from tiny_models import words
from tiny_study import DOMAIN, open_study

from allo_lib.data import pairs as pairs_module
from allo_lib.data.pairs import (
    COLUMNS,
    Pairs,
    helpful_prompt,
    make_pairs,
    preference_pairs,
)
from allo_lib.engine.store import Artifact
from allo_lib.profiles import config

# --- sampled pairs -------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_splits_never_share_a_question_and_shrink_alike(questions, each, sizes):
    counts = {f"s{i}": size for i, size in enumerate(sizes)}
    rows = [{"id": f"q{i}", "number": n} for i in range(questions) for n in range(each)]
    shrink = min(1.0, questions / sum(sizes)) if sum(sizes) else 0
    wanted = {name: int(size * shrink) for name, size in counts.items()}
    if not any(sizes) or min(wanted[n] for n, size in counts.items() if size) < 2:
        with refused(f"only {questions} questions gave a pair"):
            pairs_module._split(rows, counts, "toy")
        return
    parts = pairs_module._split(rows, counts, "toy")
    ids = {name: {row["id"] for row in part} for name, part in parts.items()}
    assert {name: len(found) for name, found in ids.items()} == wanted
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    assert all(len(parts[name]) == each * len(ids[name]) for name in parts)


def test_chosen_is_right_rejected_is_wrong_and_no_question_in_two_splits(tiny_study):
    task, questions = tiny_study.task(DOMAIN), tiny_study.pair_questions(DOMAIN)
    found = tiny_study.pairs(DOMAIN)
    assert set(found.rows) == {"train", "heldout", "dev", "mask", "wrong"}
    assert found.rows["dev"] == []
    for part in found.rows.values():
        for row in part:
            question = questions[row["id"]]
            assert (row["prompt"], row["dataset"]) == (question.prompt, question.dataset)
            assert task.right(question, row["chosen"]) and task.right(question, row["solution"])
            assert task.answered(question, row["rejected"])
            assert not task.right(question, row["rejected"])
            assert row["corrected"] == task.correction(question, row["rejected"])
    for what in ("id", "prompt"):
        seen = [{row[what] for row in found.rows[name]} for name in ("train", "heldout", "mask")]
        assert all(seen) and sum(map(len, seen)) == len(set().union(*seen))
    summary, settings_ = found.summary, tiny_study.domain(DOMAIN).pairs
    assert summary["questions"] == settings_.questions and summary["samples"] == settings_.samples
    assert 0 < summary["right"] < 1
    most = summary["questions_with_both"] * settings_.per_question
    assert 0 < summary["questions_with_both"] <= summary["pairs"] <= most
    train = [{key: row[key] for key in COLUMNS} for row in found.rows["train"]]
    assert [dict(row) for row in found.dataset("train")] == train


def test_all_wrong_samples_go_where_the_pairs_of_their_question_go(tiny_study):
    """Also those of questions without a right sample, in proportion; none is a held-out one's."""
    two = open_study(tiny_study.results_dir, replicates__pair_sets=2)
    rows = two.pairs(DOMAIN).rows
    ids = {split: {row["id"] for row in rows[split]} for split in rows}
    assert not ids["wrong"] & ids["wrong1"] and not ids["train"] & ids["train1"]
    assert ids["train"] <= ids["wrong"] and ids["train1"] <= ids["wrong1"]
    assert not (ids["mask"] | ids["heldout"]) & (ids["wrong"] | ids["wrong1"])
    without = len(ids["wrong"] - ids["train"]), len(ids["wrong1"] - ids["train1"])
    assert min(without) > 0 and abs(without[0] - without[1]) <= 1
    rejected = {row["rejected"] for row in rows["train"]}
    assert rejected <= {row["rejected"] for row in rows["wrong"]}
    listed = [(row["id"], row["rejected"]) for row in rows["wrong"] + rows["wrong1"]]
    assert len(set(listed)) == len(listed)


def test_pairs_come_again_from_the_same_seed_and_from_their_files(tiny_study, tmp_path):
    again, kept = make_pairs(tiny_study, DOMAIN), tiny_study.pairs(DOMAIN)
    assert (again.rows, again.summary) == (kept.rows, kept.summary)
    again.save(tmp_path)
    read = Pairs.load(Artifact("pairs", "key", tmp_path))
    assert read == dataclasses.replace(again, key="key")


def test_a_prediction_that_cannot_be_corrected_is_kept_as_it_is():
    row = {"prompt": "p", "solution": "s", "rejected": "r", "corrected": None}
    first, second = Pairs({"mask": [row, row | {"corrected": ""}]}, {}).corrections("mask")
    assert (first.prompt, first.solution, first.prediction, first.corrected) == ("p", "s", "r", "r")
    assert second.corrected == ""


# --- human pairs ---------------------------------------------------------------------------------

PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello!", "rejected": "Go."}


def tokenizer(template=None):
    """One token a word; a message is its role and its words."""
    return words(["<unk>", "<eos>"], template, pad_token=None)


def test_a_conversation_becomes_chat_messages():
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello! Human: me\n\nHuman: And?\n\nAssistant:"
    assert helpful_prompt(text) == [
        {"role": "user", "content": "Hi\n\nthere"},
        {"role": "assistant", "content": "Hello! Human: me"},
        {"role": "user", "content": "And?"},
    ]
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert [m["content"] for m in helpful_prompt(twice)] == ["a", "b\n\nc", "d"]


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "\n\nHuman: hi", "x\n\nHuman: hi\n\nAssistant:", "\n\nHuman: " + "a" * 10**6,
        "\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant: hi\n\nHuman: ho\n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant: ho\n\nAssistant:", "\n\nHuman:\n\nAssistant:",
    ],
)  # fmt: skip
def test_conversations_of_another_form_are_refused_in_one_line(text):
    with refused("prompt '", "': expected turns with text, '\\n\\nHuman: ...' first"):
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


@pytest.mark.parametrize("template, heldout", [(TEMPLATE, 3), (None, 3), (None, 12)])
def test_human_pairs_are_one_a_conversation_and_split_by_it(tmp_path, template, heldout):
    write_data(tmp_path, train=30, test=5)
    file = tmp_path / "hh_helpful" / "train.jsonl"
    lines = file.read_text().splitlines()
    # Nine conversations are compared twice, five of them again after a further turn.
    later = [line.replace("Assistant:", "Assistant: so\\n\\nHuman: and?\\n\\nAssistant:", 1)
             for line in lines[:5]]  # fmt: skip
    # One has no open turn at its end, which a chat template could not take.
    if template is None:
        lines[9] = lines[9].replace("\\n\\nAssistant:", "")
    file.write_text("\n".join(lines + lines[:9] + later))
    test = tmp_path / "hh_helpful" / "test.jsonl"
    held_out = test.read_text().splitlines()
    test.write_text("\n".join([*held_out, lines[0]]))  # one of them is trained on, or dealt out
    counts = {"train": 10, "dev": 4, "mask": 6, "heldout": heldout}
    domain = config.Domain(
        kind="preferences", datasets=("hh_helpful",), pairs=config.Pairs(**counts)
    )
    study = SimpleNamespace(
        domain=lambda name: domain, tokenizer=tokenizer(template), data_dir=tmp_path, seed=0,
        profile=config.Profile(name="toy", domains={"toy": domain}),
    )  # fmt: skip
    found = make_pairs(study, "toy")
    assert found.summary == {"given": 44, "pairs": 30}
    assert {split: len(rows) for split, rows in found.rows.items()} == counts
    rows = [row for split in ("train", "dev", "mask", "heldout") for row in found.rows[split]]
    prompts = {str(row["prompt"]) for row in rows}
    assert len({row["id"] for row in rows}) == len(prompts) == 20 + heldout
    # Of the test file first, then of the training file what no other split took.
    asked = [re.search("tell .* of [a-z]+", str(row["prompt"]))[0] for row in rows]
    first = [text for text in re.findall("tell .* of [a-z]+", test.read_text())
             if text not in asked[:20]]  # fmt: skip
    assert asked[20:][: len(first)] == first[:heldout]
    replies = {json.loads(line)["chosen"] for line in lines}
    for row in rows:
        assert row["chosen"].strip() in replies and row["rejected"].strip()[:2] == "no"
        assert row["solution"] == row["corrected"] == row["chosen"]
        assert isinstance(row["prompt"], str) == (template is None)
        assert row["dataset"] == "hh_helpful" and row["id"].startswith("hh_helpful-")
