"""Entries of the hub become the rows of a data folder; nothing is downloaded."""

import re

import datasets
import pytest
from refusals import refused

from allo_lib.data import tasks
from allo_lib.data.benchmarks import BENCHMARKS, load_from_hub, load_rows, math_row

TALK = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And?\n\nAssistant:"
ECQA = {f"q_op{i}": text for i, text in enumerate(["cake", "mess", "fun", "air", "sun"], 1)}
ECQA |= {"q_text": "What is on a table?", "q_ans": "mess", "taskA_pos": " A mess.\n\nIt is."}
LABELLED = {"choices": {"text": ["sun", "moon"], "label": ["A", "B"]}, "answerKey": "B"}
TABLE = {"table_title": "Pets", "table": "cat | 3\ndog | 4", "unit": None, "choices": None}

# Entries of the hub, and the rows that they become (None: left out).
ENTRIES = {
    "ecqa": [
        (ECQA, {"question": "What is on a table?\n(A) cake\n(B) mess\n(C) fun\n(D) air\n(E) sun",
                "solution": "A mess.\nIt is.", "answer": "B",
                "choices": ["cake", "mess", "fun", "air", "sun"]}),
        (ECQA | {"q_op1": "mess"}, None),
        (ECQA | {"q_ans": "none"}, None),
    ],
    "qasc": [
        (LABELLED | {"id": "x", "question": "What glows?", "fact1": "One.", "fact2": "Two.",
                     "combinedfact": "Both.", "formatted_question": "What glows? (A) sun"},
         {"question": "What glows?\n(A) sun\n(B) moon", "solution": "One.\nTwo.\nBoth.",
          "answer": "B", "choices": ["sun", "moon"]}),
        (LABELLED | {"question": "No label?", "fact1": "", "fact2": "", "combinedfact": "",
                     "answerKey": ""}, None),
    ],
    "openbookqa": [
        ({"id": "7-980", "question_stem": "What glows?"} | LABELLED,
         {"question": "What glows?\n(A) sun\n(B) moon", "solution": None, "answer": "B",
          "choices": ["sun", "moon"]}),
    ],
    "strategyqa": [
        ({"qid": "q", "term": "Moon", "question": "Does it glow?", "answer": True,
          "facts": "It is lit.", "decomposition": "[]"},
         {"question": "Does it glow?", "solution": "It is lit.", "answer": "yes",
          "choices": None}),
        ({"question": "Is it cheese?", "answer": False, "facts": ["Rock.", "No milk."]},
         {"question": "Is it cheese?", "solution": "Rock.\nNo milk.", "answer": "no",
          "choices": None}),
    ],
    "gsm8k": [
        ({"question": "How many?", "answer": "2*500=<<2*500=1000>>1000 eggs\nSo.\n#### 1,000"},
         {"question": "How many?", "solution": "2*500=1000 eggs\nSo.", "answer": "1000",
          "choices": None}),
    ],
    "math": [
        ({"problem": "Half?", "level": "Level 1", "type": "Algebra",
          "solution": r"Not \boxed{1} but $\boxed{\frac{1}{2}}$."},
         {"question": "Half?", "solution": r"Not \boxed{1} but $\boxed{\frac{1}{2}}$.",
          "answer": r"\frac{1}{2}", "choices": None}),
        ({"problem": "No box?", "solution": "None."}, None),
        ({"problem": "Open box?", "solution": r"\boxed{1"}, None),
    ],
    "mawps": [
        ({"id": "m", "question": "How many?", "chain": "<gadget>", "result": "1_234",
          "result_float": 1234.0, "equation": "x=1_000+234", "expression": "1_000+234"},
         {"question": "How many?", "solution": "x=1_000+234", "answer": "1234", "choices": None}),
    ],
    "tabmwp": [
        (TABLE | {"question": "How many cats?", "answer": "3", "solution": "Look.\n\n3 cats.",
                  "ques_type": "free_text", "unit": "cats"},
         {"question": "Table: Pets\ncat | 3\ndog | 4\n\nQuestion: How many cats? (Unit: cats)",
          "solution": "Look.\n\n3 cats.", "answer": "3", "choices": None}),
        (TABLE | {"question": "More?", "answer": "dog", "solution": "4 > 3.", "table_title": "",
                  "choices": ["cat", "dog"], "ques_type": "multi_choice"},
         {"question": "Table:\ncat | 3\ndog | 4\n\nQuestion: More?\n(A) cat\n(B) dog",
          "solution": "4 > 3.", "answer": "B", "choices": ["cat", "dog"]}),
    ],
    "alpaca_eval": [
        ({"dataset": "helpful_base", "instruction": "Sing.", "output": "La.",
          "generator": "gpt4_1106_preview"},
         {"question": "Sing.", "subset": "helpful_base", "outputs": {"gpt4_1106_preview": "La."}}),
    ],
    "arena_hard": [
        ({"question_id": "328c", "category": "arena-hard-v0.1", "cluster": "Songs",
          "turns": [{"content": "Sing."}]},
         {"id": "328c", "question": "Sing.", "cluster": "Songs", "outputs": {}}),
    ],
    "hh_helpful": [
        ({"chosen": TALK + " Fine.", "rejected": TALK + " No."},
         {"prompt": TALK, "chosen": "Fine.", "rejected": "No."}),
        ({"chosen": TALK + " Fine.", "rejected": "\n\nHuman: Ho\n\nAssistant: No."}, None),
        ({"chosen": TALK + " Fine.", "rejected": TALK + " Fine. "}, None),
    ],
}  # fmt: skip


@pytest.fixture
def online(monkeypatch):
    """Stand in for the hub with the entries above; return what it is asked for."""
    calls = []
    monkeypatch.delenv("ALLO_DATA", raising=False)

    def serve(name, entries=None):
        def load_dataset(path, **settings):
            calls.append((path, settings))
            return [entry for entry, _ in ENTRIES[name]] if entries is None else entries

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


@pytest.mark.parametrize("name", BENCHMARKS)
def test_entries_become_rows_and_the_pinned_revision_is_asked_for(online, caplog, name):
    calls, entry = online(name), BENCHMARKS[name]
    found = load_rows(name, "test")
    expected = [(i, new) for i, (_, new) in enumerate(ENTRIES[name]) if new is not None]
    assert len(found) == len(expected)
    for one, (number, new) in zip(found, expected, strict=True):
        own = {} if "prompt" in new or "id" in new else {"id": f"{name}-test-{number}"}
        assert one == own | new
        if entry.answer:
            tasks.check(name, one)
    path, settings = calls[0]
    if entry.file:
        assert path == "json"
        assert settings["data_files"] == f"hf://datasets/{entry.hub}@{entry.revision}/{entry.file}"
    else:
        assert path == entry.hub and settings["revision"] == entry.revision
        assert (settings["name"], settings["data_dir"]) == (entry.config, entry.folder)
    assert settings["split"] == entry.test
    assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
    warned = f"{name} of {entry.hub} is read without a pinned revision" in caplog.text
    assert warned == (entry.revision is None)
    # A warning is all that a reader gets of these.
    assert warned == (name in ("ecqa", "tabmwp"))


def test_splits_go_by_the_hubs_names(online):
    calls = online("qasc")
    load_from_hub("qasc", "test"), load_from_hub("qasc", "train")
    assert [settings["split"] for _, settings in calls] == ["validation", "train"]
    with refused("data set 'tabmwp' has no split 'train' on the hub; there are two ways"):
        load_from_hub("tabmwp", "train")
    with refused("no split 'dev' on the hub"):
        load_from_hub("gsm8k", "dev")
    with refused("data set 'gossip' is not there: there are two ways", "--data DIR", "ALLO_DATA"):
        load_from_hub("gossip", "test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_columns_of_another_form_are_told(online, name):
    for entry in ({"other": 1}, {}, dict.fromkeys(ENTRIES[name][0][0]), "text", None):
        online(name, [entry])
        with refused(name):
            load_rows(name, "test")


def test_a_hub_out_of_reach_is_told(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.delenv("ALLO_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with refused("cannot be read from the hub (no route to host); there are two ways"):
        load_rows("ecqa", "train")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1}", "1"), (r"\boxed{\sqrt{2}} so", r"\sqrt{2}"), (r"\boxed{1}\boxed{2}", "2"),
        ("1", None), (r"\boxed{", None), (r"\boxed{}", None), (r"\boxed{ {a} }", "{a}"), ("", None),
        (r"\boxed{[0,1)}", "[0,1)"),
    ],
)  # fmt: skip
def test_the_last_box_is_read_with_its_braces(text, boxed):
    row = math_row({"problem": "x", "solution": text})
    assert (row and row["answer"]) == boxed
