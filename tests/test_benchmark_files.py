"""Files of AlpacaEval and Arena-Hard: golden examples, round trips, and what is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused

from allo_lib import benchmark_files as files

ROWS = [
    {"id": "q-1", "question": "Name a \u00e9clair.", "subset": "koala", "outputs": {"m": "One."}},
    {"id": "q-2", "question": "Write\ntwo lines", "cluster": "Lines", "outputs": {}},
]
TEXTS = ["<script>alert(1)</script>\u2028", 'A "quote"\r\nand \U0001f600']
# Written by hand after results/alpaca-7b/model_outputs.json of tatsu-lab/alpaca_eval.
ALPACA = r"""[
  {
    "dataset": "koala",
    "instruction": "Name a \u00e9clair.",
    "output": "<script>alert(1)</script>\u2028",
    "generator": "allo"
  },
  {
    "dataset": "alpaca_eval",
    "instruction": "Write\ntwo lines",
    "output": "A \"quote\"\r\nand \ud83d\ude00",
    "generator": "allo"
  }
]
"""
# After data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl of lmarena/arena-hard-auto, 196f6b8 and
# 9a1d386~1; ANS stands for the identifier of the answer.
MESSAGES = (
    r'{"uid": "q-1", "ans_id": "ANS", "model": "allo", "messages": [{"role": "user", "content": '
    r'"Name a \u00e9clair."}, {"role": "assistant", "content": {"answer": '
    r'"<script>alert(1)</script>\u2028"}}], "tstamp": 0}'
)
CHOICES = (
    r'{"question_id": "q-1", "answer_id": "ANS", "model_id": "allo", "choices": [{"index": 0, '
    r'"turns": [{"content": "<script>alert(1)</script>\u2028", "token_len": 26}]}], "tstamp": 0}'
)
whole_text = st.text(st.characters(exclude_categories=["Cs"]))
any_text = st.text(st.characters())
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_alpaca_eval_outputs_are_as_in_the_golden_example(tmp_path):
    path = files.write_alpaca_eval(tmp_path / "new" / "model_outputs.json", ROWS, TEXTS, "allo")
    assert path.read_bytes() == ALPACA.encode("ascii")


@pytest.mark.parametrize("form, golden", [("messages", MESSAGES), ("choices", CHOICES)])
def test_arena_hard_answers_are_as_in_the_golden_example(tmp_path, form, golden):
    path = files.write_arena_hard(tmp_path / "a.jsonl", ROWS, TEXTS, "allo", form=form, count=len)
    first = path.read_bytes().decode("ascii").split("\n")[0]
    row = json.loads(first)
    name = row.get("ans_id") or row["answer_id"]
    assert len(name) == 22 and first == golden.replace("ANS", name)


def test_lengths_are_left_out_where_nobody_counts(tmp_path):
    path = files.write_arena_hard(tmp_path / "a.jsonl", ROWS, TEXTS, "allo", form="choices")
    assert "token_len" not in path.read_text()


def test_two_equal_runs_write_equal_bytes_and_other_answers_have_other_names(tmp_path):
    texts = (TEXTS, TEXTS, ["no", "yes"])
    made = [files.write_arena_hard(tmp_path / str(i), ROWS, t, "m") for i, t in enumerate(texts)]
    assert made[0].read_bytes() == made[1].read_bytes()
    names = [json.loads(p.read_text().split("\n")[0])["ans_id"] for p in made]
    assert names[0] == names[1] != names[2]


@given(st.lists(whole_text, min_size=1, max_size=4))
@quick
def test_any_text_comes_back_from_every_file(tmp_path, texts):
    rows = [{"id": f"{i}", "question": f"do {i}"} for i in range(len(texts))]
    path = files.write_alpaca_eval(tmp_path / "a.json", rows, texts, "m")
    assert [entry["output"] for entry in files.read_alpaca_eval(path)] == texts
    for form in files.ARENA_FORMS:
        path = files.write_arena_hard(tmp_path / "a.jsonl", rows, texts, "m", form=form, count=len)
        with open(path, encoding="ascii") as lines:  # as their reader does: line by line
            assert len([json.loads(line) for line in lines]) == len(texts)
        assert files.read_arena_hard(path) == {f"{i}": text for i, text in enumerate(texts)}


@given(any_text)
@quick
def test_half_a_surrogate_pair_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    read_or_refused(lambda: files.write_alpaca_eval(path, ROWS[:1], [text], "m"))
    with refused("m, row 'q-1'", "half of a surrogate pair at character 0"):
        files.write_alpaca_eval(path, ROWS[:1], ["\udc00" + text], "m")
    with refused("half of a surrogate pair"):
        files.write_arena_hard(path, [{"id": "a", "question": "\ud800"}], ["x"], "m")


def test_a_huge_response_is_written_and_read(tmp_path):
    text = "spam \x00 " * 500_000
    path = files.write_arena_hard(tmp_path / "a.jsonl", ROWS[:1], [text], "m")
    assert files.read_arena_hard(path) == {"q-1": text}


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden", "a\n", "x" * 101, None, 3])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with refused("model name", "expected letters, digits"):
        files.write_alpaca_eval(tmp_path / "a.json", ROWS, TEXTS, name)


def test_outputs_that_do_not_fit_their_rows_are_refused(tmp_path):
    path = tmp_path / "a.json"
    with refused("1 texts for 2 rows"):
        files.write_alpaca_eval(path, ROWS, TEXTS[:1], "m")
    with refused("0 texts for 0 rows"):
        files.write_alpaca_eval(path, [], [], "m")
    with refused("'q-2'", "occurs twice"):
        files.write_alpaca_eval(path, [ROWS[0], ROWS[0] | {"id": "q-2"}], TEXTS, "m")
    with refused("3 is no text"):
        files.write_alpaca_eval(path, ROWS, ["x", 3], "m")
    with refused("form 'old'"):
        files.write_arena_hard(path, ROWS, TEXTS, "m", form="old")
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with refused("cannot write"):
        files.write_alpaca_eval(tmp_path / "file" / "a.json", ROWS, TEXTS, "m")


def test_files_that_are_no_text_or_no_json_are_told(tmp_path):
    path = tmp_path / "a.json"
    cases = {b"\xff": "cannot be read", b"{": "not JSON", b"[" * 100_000: "not JSON"}
    cases |= {b'{"a": 1, "a": 2}': "a key is there twice", b"[NaN]": "NaN is no number"}
    for raw, told in cases.items():
        path.write_bytes(raw)
        with refused("a.json", told):
            files.read_alpaca_eval(path)
    with refused("none.json", "cannot be read"):
        files.read_alpaca_eval(tmp_path / "none.json")


# --- judgements ----------------------------------------------------------------------------------


def test_alpaca_eval_preferences_become_outcomes(tmp_path):
    given_by = [
        {"instruction": ROWS[0]["question"], "preference": 1.75, "annotator": "x"},
        {"instruction": ROWS[1]["question"], "preference": None},
        {"instruction": "of another set", "preference": 2},
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(given_by))
    assert files.alpaca_outcomes(path, ROWS) == {"q-1": 0.75}
    for draw in (0, 1.5):
        path.write_text(json.dumps([given_by[0] | {"preference": draw}]))
        assert files.alpaca_outcomes(path, ROWS) == {"q-1": 0.5}
    for wrong in ("2", 3, -1, []):
        path.write_text(json.dumps([given_by[0] | {"preference": wrong}]))
        with refused("preference", "expected a number from 1 to 2"):
            files.alpaca_outcomes(path, ROWS)
    path.write_text("{}")
    with refused("expected entries with a preference"):
        files.alpaca_outcomes(path, ROWS)


# In the first game ours is B, in the second A; a double sign counts three times.
@pytest.mark.parametrize(
    "first, second, scores",
    [
        ("A>B", "A>B", [1, 0]),
        ("B>>A", "A>>B", [1] * 6),
        ("A<<B", "B=A", [0.5, 1, 1, 1]),
        ("A=B", "B>A", [0, 0.5]),
        ("A>>B", "A<B", [0, 0, 0, 0]),
    ],
)
def test_arena_hard_verdicts_become_scores(tmp_path, first, second, scores):
    path = tmp_path / "m.jsonl"
    games = [{"score": first, "judgment": {}}, {"score": second}]
    path.write_text(json.dumps({"uid": "q", "games": games}) + "\n")
    assert files.arena_scores(path) == {"q": scores}


@pytest.mark.parametrize("score", [None, "A>A", "A>>>B", "", 3, []])
def test_a_question_without_two_verdicts_has_no_scores(tmp_path, score):
    path = tmp_path / "m.jsonl"
    rows = [{"uid": "q", "games": [{"score": "A=B"}, {"score": score}]}]
    rows.append({"uid": "r", "games": [None, {"score": "A=B"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert files.arena_scores(path) == {}


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x, max_size=2)))
@quick
def test_malformed_judgements_are_refused_in_one_line(tmp_path, value):
    path = tmp_path / "m.jsonl"
    for row in (value, {"uid": value, "games": value}, {"uid": value, "games": [value, value]}):
        path.write_text(json.dumps(row) + "\n")
        read_or_refused(lambda: files.arena_scores(path))
        read_or_refused(lambda: files.read_arena_hard(path))
        read_or_refused(lambda: files.alpaca_outcomes(path, ROWS))
        read_or_refused(lambda: files.read_alpaca_eval(path))
    entry = {"instruction": value, "preference": value, "output": value, "uid": value}
    path.write_text(json.dumps([entry]))
    read_or_refused(lambda: files.alpaca_outcomes(path, ROWS))
    read_or_refused(lambda: files.read_alpaca_eval(path))
