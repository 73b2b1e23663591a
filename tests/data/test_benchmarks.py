"""Rows of a data folder and entries of the hub: read whole, or refused in one line."""

import gzip
import hashlib
import json
import re

import datasets
import pytest
from refusals import refused

from allo_lib.data.benchmarks import BENCHMARKS, data_hash, load_rows

ROW = {
    "id": "q-1",
    "question": "Where does one light a fire\nat night?\n(A) synagogue\n(B) bedroom\n(C) St. Paul",
    "solution": "A bedroom is where one sleeps\n\nCandles can be lit in a bedroom.",
    "answer": "B",
    "choices": ["synagogue", "bedroom", "St. Paul"],
}
PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello!", "rejected": "Go."}
TASK = {"id": "a", "question": "Sing.", "subset": "x", "outputs": {"weak": "", "strong": "La."}}
HALF = "\ud83d"  # of a surrogate pair
GOOD = json.dumps(ROW).encode() + b"\n"


def written(folder, raw: bytes, name="train.jsonl"):
    """Make a data folder with `raw` as a file of ecqa."""
    (folder / "ecqa").mkdir(parents=True, exist_ok=True)
    (folder / "ecqa" / name).write_bytes(raw)
    return folder


# --- a data folder -------------------------------------------------------------------------------


def test_rows_come_back_as_written_plain_and_gzipped(tmp_path, monkeypatch):
    # U+2028 ends a line for str.splitlines, but not in this format.
    other = ROW | {"id": "q-2", "question": "a\u2028b\n(A) x\n(B) y", "choices": ["x", "y"]}
    for kind in ([ROW, other], [PAIR, PAIR], [TASK, TASK | {"id": "b", "outputs": {}}]):
        raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in kind).encode() + b"\n\n"
        folder = written(tmp_path, raw)
        assert load_rows("ecqa", "train", folder) == kind
        written(tmp_path, gzip.compress(raw), "test.jsonl.gz")
        monkeypatch.setenv("ALLO_DATA", str(folder))
        assert load_rows("ecqa", "test") == kind


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


# A row, the column that is told, and what of it.
BAD_ROWS = [
    (None, "row: ", "given None"), ([ROW], "row: ", "valid dictionary"),
    ({}, "id: ", "required"), (without(ROW, "choices"), "choices: ", "required"),
    (without(PAIR, "chosen"), "chosen: ", "required"),
    (ROW | {"answer": ""}, "answer: ", "at least 1"), (ROW | {"answer": None}, "answer: ", "None"),
    (ROW | {"answer": "D"}, "row: ", "letter of one of the choices"),
    (ROW | {"answer": "AB"}, "row: ", "letter of one"), (ROW | {"answer": "b"}, "row: ", "letter"),
    (ROW | {"question": "so " + HALF}, "question: ", "half of a surrogate pair"),
    (ROW | {"solution": HALF}, "solution: ", "half of"), (ROW | {"solution": 0}, "solution: ", "0"),
    (ROW | {"id": 3}, "id: ", "valid string; given 3"),
    (ROW | {"choices": ["x"]}, "choices: ", "at least 2"),
    (ROW | {"choices": ["x"] * 27}, "choices: ", "at most 26"),
    (ROW | {"choices": ["here", 2]}, "choices.1: ", "given 2"),
    (ROW | {"question": ROW["question"] + "\nChoose."}, "row: ", "ends in its options"),
    (ROW | {"question": "\n(A) x\n(B) y", "choices": ["x", "y"]}, "row: ", "ends in its options"),
    (TASK | {"outputs": ["La."]}, "outputs: ", "dictionary"),
    (TASK | {"outputs": {"weak": None}}, "outputs.weak: ", "valid string"),
    (PAIR | {"prompt": ""}, "prompt: ", "at least 1"), (PAIR | {"chosen": 1}, "chosen: ", "valid"),
    (PAIR | {"chosen": "\udc00 Hi"}, "chosen: ", "half of"),
    (PAIR | {"rejected": [{"role": "assistant"}]}, "rejected: ", "valid string"),
]  # fmt: skip
BAD_FILES = [
    (b"", "holds no rows; expected one JSON object a line"), (b"\n \n", "holds no rows"),
    (GOOD + GOOD[:-20], "line 2: not JSON (Unterminated string"),
    (b"[" + GOOD.strip() + b"]", "line 1: row: "),
    (GOOD + "{'é'}".encode("latin-1"), "not UTF-8"), (b"[" * 100_000, "line 1: not JSON"),
    (GOOD[:-2] + b', "answer": "A"}\n', "line 1: not JSON (a key is there twice)"),
    (GOOD + json.dumps(ROW | {"answer": "A"}).encode(), "id 'q-1' occurs twice; expected one row"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "place", "told"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path, row, place, told):
    with refused(f"train.jsonl, line 2: {place}", told):
        load_rows("ecqa", "train", written(tmp_path, GOOD + json.dumps(row).encode()))


@pytest.mark.parametrize(("raw", "told"), BAD_FILES)
def test_a_bad_file_is_told(tmp_path, raw, told):
    with refused("train.jsonl", told):
        load_rows("ecqa", "train", written(tmp_path, raw))


PACKED = gzip.compress(GOOD * 50)


@pytest.mark.parametrize("raw", [GOOD, PACKED[:30] + b"\xff" * 8 + PACKED[38:], PACKED[:-9]])
def test_a_bad_archive_is_told(tmp_path, raw):
    with refused("train.jsonl.gz cannot be read: damaged"):
        load_rows("ecqa", "train", written(tmp_path, raw, "train.jsonl.gz"))


def test_data_hash_sees_values_and_order_but_not_key_order():
    other = ROW | {"id": "q-2"}
    assert data_hash([ROW]) == data_hash([dict(reversed(ROW.items()))])
    assert data_hash([ROW, other]) != data_hash([other, ROW])
    expected = hashlib.sha256(b'{"a":"\\u00e9","b":1}\n').hexdigest()
    assert data_hash([{"b": 1, "a": "é"}]) == expected


def test_missing_data_names_both_ways(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with refused("has no train.jsonl", "--data DIR", "ALLO_DATA", "hub through `datasets`"):
            load_rows("ecqa", "train", folder)


# --- the hub -------------------------------------------------------------------------------------

TALK = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And?\n\nAssistant:"
ECQA = {f"q_op{i}": text for i, text in enumerate(["cake", "mess", "fun", "air", "sun"], 1)}
ECQA |= {"q_text": "What is on a table?", "q_ans": "mess", "taskA_pos": " A mess.\n\nIt is."}
LABELLED = {"choices": {"text": ["sun", "moon"], "label": ["A", "B"]}, "answerKey": "B"}
FACTS = {"fact1": "One.", "fact2": "", "combinedfact": "Both."}
TABLE = {"table_title": "Pets", "table": "cat | 3\ndog | 4", "unit": None, "choices": None}


def row(question, answer, solution=None, choices=None):
    return {"question": question, "solution": solution, "answer": answer, "choices": choices}


# Entries of the hub, and the rows that they become (None: left out).
ENTRIES = {
    "ecqa": [
        (ECQA, row("What is on a table?\n(A) cake\n(B) mess\n(C) fun\n(D) air\n(E) sun", "B",
                   "A mess.\nIt is.", ["cake", "mess", "fun", "air", "sun"])),
        (ECQA | {"q_op1": "mess"}, None), (ECQA | {"q_ans": "none"}, None),
    ],
    "qasc": [
        (LABELLED | {"question": "What glows?"} | FACTS,
         row("What glows?\n(A) sun\n(B) moon", "B", "One.\nBoth.", ["sun", "moon"])),
        (LABELLED | {"question": "No label?", "answerKey": ""} | FACTS, None),
    ],
    "openbookqa": [
        ({"id": "7-980", "question_stem": "What glows?"} | LABELLED,
         row("What glows?\n(A) sun\n(B) moon", "B", None, ["sun", "moon"])),
    ],
    "strategyqa": [
        ({"question": "Does it glow?", "answer": True, "facts": "It is lit."},
         row("Does it glow?", "yes", "It is lit.")),
        ({"question": "Is it cheese?", "answer": False, "facts": ["Rock.", "No milk."]},
         row("Is it cheese?", "no", "Rock.\nNo milk.")),
    ],
    "gsm8k": [
        ({"question": "How many?", "answer": "2*500=<<2*500=1000>>1000 eggs\nSo.\n#### 1,000"},
         row("How many?", "1000", "2*500=1000 eggs\nSo.")),
    ],
    "math": [
        ({"problem": "Half?", "solution": r"Not \boxed{1} but $\boxed{\frac{1}{2}}$."},
         row("Half?", r"\frac{1}{2}", r"Not \boxed{1} but $\boxed{\frac{1}{2}}$.")),
        ({"problem": "Half open?", "solution": r"\boxed{[0,1)}"},
         row("Half open?", "[0,1)", r"\boxed{[0,1)}")),
        ({"problem": "No box?", "solution": "None."}, None),
        ({"problem": "Open box?", "solution": r"\boxed{1"}, None),
        ({"problem": "Empty box?", "solution": r"\boxed{}"}, None),
    ],
    "mawps": [
        ({"question": "How many?", "result": "1_234", "equation": "x=1_000+234"},
         row("How many?", "1234", "x=1_000+234")),
    ],
    "tabmwp": [
        (TABLE | {"question": "How many?", "answer": "3", "solution": "Look.", "unit": "cats"},
         row("Table: Pets\ncat | 3\ndog | 4\n\nQuestion: How many? (Unit: cats)", "3", "Look.")),
        (TABLE | {"question": "More?", "answer": "dog", "solution": "4 > 3.", "table_title": "",
                  "choices": ["cat", "dog"]},
         row("Table:\ncat | 3\ndog | 4\n\nQuestion: More?\n(A) cat\n(B) dog", "B", "4 > 3.",
             ["cat", "dog"])),
    ],
    "alpaca_eval": [
        ({"dataset": "helpful_base", "instruction": "Sing.", "output": "La.", "generator": "gpt4"},
         {"question": "Sing.", "subset": "helpful_base", "outputs": {"gpt4": "La."}}),
    ],
    "arena_hard": [
        ({"question_id": "328c", "cluster": "Songs", "turns": [{"content": "Sing."}]},
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
def serve(monkeypatch):
    """Return what gives entries to whoever asks the hub, and lists what it is asked for."""
    monkeypatch.delenv("ALLO_DATA", raising=False)

    def start(entries):
        calls = []

        def load_dataset(path, **settings):
            calls.append((path, settings))
            return entries

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return start


@pytest.mark.parametrize("name", BENCHMARKS)
def test_entries_become_rows_and_the_pinned_revision_is_requested(serve, name):
    calls, entry = serve([entry for entry, _ in ENTRIES[name]]), BENCHMARKS[name]
    expected = [
        new if "prompt" in new else {"id": f"{name}-test-{number}"} | new
        for number, (_, new) in enumerate(ENTRIES[name])
        if new is not None
    ]
    assert load_rows(name, "test") == expected
    path, settings = calls[0]
    if entry.file:
        assert path == "json"
        assert settings["data_files"] == f"hf://datasets/{entry.hub}@{entry.revision}/{entry.file}"
    else:
        assert path == entry.hub and settings["revision"] == entry.revision
        assert (settings["name"], settings["data_dir"]) == (entry.config, entry.folder)
    assert settings["split"] == entry.test
    pinned = entry.revision is not None and re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert bool(pinned) == (name not in ("ecqa", "tabmwp"))  # of these no commit is known


@pytest.mark.parametrize("name", BENCHMARKS)
def test_columns_of_another_form_are_told(serve, name):
    for entry in ({"other": 1}, dict.fromkeys(ENTRIES[name][0][0]), "text", None):
        serve([entry])
        with refused(name):
            load_rows(name, "test")


def test_what_the_hub_does_not_have_or_give_is_told(serve, monkeypatch):
    for name, split in (("tabmwp", "train"), ("gsm8k", "dev"), ("gossip", "test")):
        with refused(f"data set {name!r} has no split {split!r} on the hub; there are two ways"):
            load_rows(name, split)

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with refused("cannot be read from the hub (ConnectionError('no route", "there are two ways"):
        load_rows("ecqa", "train")
