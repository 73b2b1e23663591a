"""Rows of a data folder: read as they are written, and refused in one line where they are bad."""

import gzip
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree

from allo_lib.data import tasks
from allo_lib.data.benchmarks import check_row, data_hash, load_rows

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


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def line(row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def written(folder, raw: bytes, name="train.jsonl"):
    """Make a data folder with `raw` as a file of ecqa."""
    (folder / "ecqa").mkdir(parents=True, exist_ok=True)
    (folder / "ecqa" / name).write_bytes(raw)
    return folder


def test_rows_come_back_as_written_plain_and_gzipped(tmp_path, monkeypatch):
    # U+2028 ends a line for str.splitlines, but not in this format.
    other = ROW | {"id": "q-2", "question": "a\u2028b\n(A) x\n(B) y", "choices": ["x", "y"]}
    for kind in ([ROW, other], [PAIR, PAIR], [TASK, TASK | {"id": "b", "outputs": {}}]):
        raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in kind).encode() + b"\n\n"
        folder = written(tmp_path, raw)
        assert load_rows("ecqa", "train", folder) == kind
        written(tmp_path, gzip.compress(raw), "test.jsonl.gz")
        assert load_rows("ecqa", "test", folder) == kind
        monkeypatch.setenv("ALLO_DATA", str(folder))
        assert load_rows("ecqa", "train") == kind


def test_missing_data_names_both_ways(tmp_path):
    both = ("--data DIR", "ALLO_DATA", "hub through `datasets`")
    with refused("absent does not exist", *both):
        load_rows("ecqa", "train", tmp_path / "absent")
    with refused("has no such file", *both):
        load_rows("ecqa", "train", tmp_path)


BAD = {
    "null": (None, "NoneType, expected a JSON object"),
    "list": ([ROW], "list, expected a JSON object"),
    "empty": ({}, "no id, question, solution, answer, choices"),
    "no choices": (without(ROW, "choices"), "no choices; expected the keys id, question"),
    "no prompt": (without(PAIR, "prompt"), "no prompt; expected the keys prompt, chosen"),
    "answer empty": (ROW | {"answer": ""}, "answer is '', expected non-empty text"),
    "answer null": (ROW | {"answer": None}, "answer is None, expected a valid string"),
    "answer beyond": (ROW | {"answer": "D"}, "answer is 'D', expected a letter from A to C"),
    "answer two": (ROW | {"answer": "AB"}, "answer is 'AB', expected a letter"),
    "answer small": (ROW | {"answer": "b"}, "answer is 'b', expected a letter from A to C"),
    "question blank": (ROW | {"question": "\n\t "}, "question is '\\n\\t ', expected non-empty"),
    "question half": (ROW | {"question": "so " + HALF}, "question is 'so \\ud83d', half of a"),
    "solution half": (ROW | {"solution": HALF}, "solution is '\\ud83d', half of a surrogate pair"),
    "solution number": (ROW | {"solution": 0}, "solution is 0, expected a valid string"),
    "id number": (ROW | {"id": 3}, "id is 3, expected a valid string"),
    "id true": (ROW | {"id": True}, "id is True, expected"),
    "one choice": (ROW | {"choices": ["x"]}, "choices is ['x'], List should have at least 2"),
    "27 choices": (ROW | {"choices": ["x"] * 27}, "List should have at most 26 items"),
    "choice blank": (ROW | {"choices": ["x", " "]}, "choices is ' ', expected non-empty text"),
    "choice number": (ROW | {"choices": ["here", 2]}, "choices is 2, expected a valid string"),
    "text after the options": (
        ROW | {"question": ROW["question"] + "\nChoose one."},
        "expected a text and then its options",
    ),
    "options alone": (
        ROW | {"question": "\n(A) x\n(B) y", "choices": ["x", "y"]},
        "question is '\\n(A) x\\n(B) y', expected a text and then",
    ),
    "outputs a list": (TASK | {"outputs": ["La."]}, "outputs is ['La.'], expected a valid dict"),
    "outputs a number": (TASK | {"outputs": {"weak": 3}}, "outputs is 3, expected a valid string"),
    "outputs null": (TASK | {"outputs": {"weak": None}}, "outputs is None, expected"),
    "prompt empty": (PAIR | {"prompt": ""}, "prompt is '', expected non-empty text"),
    "reply a number": (PAIR | {"chosen": 1}, "chosen is 1, expected a valid string"),
    "reply half": (PAIR | {"chosen": "\udc00 Hi"}, "chosen is '\\udc00 Hi', half of"),
    "reply messages": (PAIR | {"rejected": [{"role": "assistant"}]}, "rejected is [{'role': 'ass"),
    "equal replies": (PAIR | {"chosen": "Go."}, "chosen equals rejected; drop the row or correct"),
}


@pytest.mark.parametrize(("row", "told"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, told):
    folder = written(tmp_path, line(PAIR if isinstance(row, dict) and "chosen" in row else ROW)
                     + line(row))  # fmt: skip
    before = tree(tmp_path)
    with refused("train.jsonl, line 2: ", told):
        load_rows("ecqa", "train", folder)
    assert tree(tmp_path) == before


GOOD = line(ROW)
FILES = {
    "empty": (b"", "holds no rows; expected one JSON object a line"),
    "blank": (b"\n \n", "holds no rows; expected one JSON object a line"),
    "cut off": (GOOD + GOOD[:-20], "line 2: not JSON (Unterminated string"),
    "one array": (b"[" + GOOD.strip() + b"]", "line 1: list, expected a JSON object"),
    "Latin-1": (GOOD + "{'é'}".encode("latin-1"), "line 2: not UTF-8"),
    "very deep": (b"[" * 100_000, "line 1: not JSON"),
    "key twice": (
        GOOD[:-2] + b', "answer": "A"}\n',
        "line 1: not JSON (the key 'answer' is there twice)",
    ),
    "id twice": (GOOD + line(ROW | {"answer": "A"}), "id 'q-1' occurs twice; expected one row"),
    "both kinds": (GOOD + line(PAIR), "questions and preferences in one file"),
}


@pytest.mark.parametrize(("raw", "told"), FILES.values(), ids=FILES)
def test_a_bad_file_is_told(tmp_path, raw, told):
    with refused("train.jsonl", told):
        load_rows("ecqa", "train", written(tmp_path, raw))
    packed = written(tmp_path / "packed", gzip.compress(raw), "train.jsonl.gz")
    with refused("train.jsonl.gz", told):
        load_rows("ecqa", "train", packed)


PACKED = gzip.compress(GOOD * 50)


@pytest.mark.parametrize("raw", [GOOD, PACKED[:30] + b"\xff" * 8 + PACKED[38:], PACKED[:-9]])
def test_a_bad_archive_is_told(tmp_path, raw):
    with refused("train.jsonl.gz cannot be read ("):
        load_rows("ecqa", "train", written(tmp_path, raw, "train.jsonl.gz"))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
near_rows = st.sampled_from([ROW, PAIR, TASK]).flatmap(
    lambda row: st.dictionaries(st.sampled_from([*row, "other"]), anything, max_size=3).map(
        lambda changes: row | changes
    )
)


@settings(max_examples=150, deadline=None)
@given(near_rows, st.sets(st.sampled_from([*ROW, *PAIR]), max_size=2))
def test_any_row_passes_whole_or_is_refused(row, dropped):
    row = without(row, *dropped)
    if read_or_refused(lambda: check_row(row) or row) is not None and row.get("choices"):
        assert tasks.is_right("ecqa", row, tasks.target("ecqa", row))
        assert tasks.prompt("ecqa", row)


def test_data_hash_sees_values_and_order_but_not_key_order():
    other = ROW | {"id": "q-2"}
    shuffled = dict(reversed(ROW.items()))
    assert data_hash([ROW]) == data_hash([shuffled])
    assert data_hash([ROW, other]) != data_hash([other, ROW])
    assert data_hash([{"b": 1, "a": "é"}]) == (
        hashlib.sha256(b'{"a":"\\u00e9","b":1}\n').hexdigest()
    )
