"""Rows of the hub's documented columns become the rows of a data folder; nothing is downloaded."""

import datasets
import pytest
from refusals import refused

from allo_lib.data import hub, questions, realdata
from allo_lib.data.benchmarks import BENCHMARKS

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
    """A hub of the entries above; returns what it was asked for."""
    asked = []
    monkeypatch.delenv("ALLO_DATA", raising=False)

    def serve(name, entries=None):
        def load_dataset(path, **given):
            asked.append((path, given))
            return [entry for entry, _ in ENTRIES[name]] if entries is None else entries

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


@pytest.mark.parametrize("name", BENCHMARKS)
def test_entries_become_rows_of_a_data_folder(online, name):
    online(name)
    found = realdata.load_rows(name, "test")
    expected = [(i, new) for i, (_, new) in enumerate(ENTRIES[name]) if new is not None]
    assert len(found) == len(expected)
    for row, (number, new) in zip(found, expected, strict=True):
        own = {} if "prompt" in new or "id" in new else {"id": f"{name}-test-{number}"}
        assert row == own | new
        if BENCHMARKS[name].answer:
            questions.check(name, row)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_pinned_revision_is_asked_for_and_a_missing_one_is_told(online, caplog, name):
    asked, entry = online(name), BENCHMARKS[name]
    hub.load(name, "test")
    path, given = asked[0]
    if entry.file:
        assert path == "json" and entry.revision in given["data_files"]
        assert given["data_files"].startswith(f"hf://datasets/{entry.hub}@")
    else:
        assert path == entry.hub and given.get("revision") == entry.revision
        assert (given.get("name"), given.get("data_dir")) == (entry.config, entry.folder)
    assert given["split"] == entry.test
    told = f"{name} of {entry.hub} is read without a pinned revision" in caplog.text
    assert told == (entry.revision is None)


def test_splits_go_by_the_hubs_names(online):
    asked = online("qasc")
    hub.load("qasc", "test")
    hub.load("qasc", "train")
    assert [given["split"] for _, given in asked] == ["validation", "train"]
    with refused("data set 'tabmwp' has no split 'train' on the hub; there are two ways"):
        hub.load("tabmwp", "train")
    with refused("data set 'gsm8k' has no split 'dev' on the hub"):
        hub.load("gsm8k", "dev")
    with refused("data set 'gossip' is not there: there are two ways"):
        hub.load("gossip", "test")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_columns_of_another_form_are_told(online, name):
    for entry in ({"other": 1}, {}, dict.fromkeys(ENTRIES[name][0][0]), "text", None):
        online(name, [entry])
        with refused(name):
            realdata.load_rows(name, "test")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1}", "1"), (r"\boxed{\sqrt{2}} so", r"\sqrt{2}"), (r"\boxed{1}\boxed{2}", "2"),
        ("1", None), (r"\boxed{", None), (r"\boxed{}", None), (r"\boxed{ {a} }", "{a}"), ("", None),
    ],
)  # fmt: skip
def test_the_last_box_is_read_with_its_braces(text, boxed):
    assert hub.last_boxed(text) == boxed
