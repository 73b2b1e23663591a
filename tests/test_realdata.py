"""Reading, prompting and judging real questions and preferences, without network."""

import gzip
import hashlib
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from allo_lib.data import answers, questions, realdata
from allo_lib.errors import AlloError

ROW = {
    "id": "q-1",
    "question": "Where does one light a fire\nat night?\n(A) synagogue\n(B) bedroom\n(C) St. Paul",
    "solution": "A bedroom is where one sleeps\n\nCandles can be lit in a bedroom.",
    "answer": "B",
    "choices": ["synagogue", "bedroom", "St. Paul"],
}
NAME = "ecqa"
PAIR = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello!", "rejected": "Go."}


def write(folder, lines, name="ecqa", split="train"):
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- reading -----------------------------------------------------------------------------------


def test_rows_come_back_as_written_plain_and_gzipped(tmp_path):
    # U+2028 ends a line for str.splitlines, but not in this format.
    rows = [ROW, ROW | {"id": "q-2", "question": "a\u2028b\n(A) x\n(B) y", "choices": ["x", "y"]}]
    path = write(tmp_path, [json.dumps(row, ensure_ascii=False) for row in rows] + [""])
    assert realdata.load_rows("ecqa", "train", tmp_path) == rows
    (tmp_path / "ecqa" / "test.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert realdata.load_rows("ecqa", "test", tmp_path) == rows


def test_folder_comes_from_the_environment(tmp_path, monkeypatch):
    write(tmp_path, [json.dumps(PAIR)], "hh_helpful")
    monkeypatch.setenv("ALLO_DATA", str(tmp_path))
    assert realdata.load_rows("hh_helpful", "train") == [PAIR]


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "list, expected a JSON object"),
        ({}, "no id, question, solution, answer, choices"),
        ({k: v for k, v in ROW.items() if k != "answer"}, "no answer; expected the keys id"),
        (ROW | {"answer": ""}, "answer is '', expected non-empty text"),
        (ROW | {"answer": None}, "answer is None"),
        (ROW | {"answer": "D"}, "answer is 'D', expected a letter from A to C"),
        (ROW | {"answer": "AB"}, "answer is 'AB'"),
        (ROW | {"question": " "}, "question is ' '"),
        (ROW | {"id": 3}, "id is 3"),
        (ROW | {"question": "half \ud800"}, "valid Unicode"),
        (ROW | {"solution": ["x"]}, "expected a string or null"),
        (ROW | {"choices": ["x"]}, "expected null or 2 to 26 strings"),
        (ROW | {"choices": ["x", " "]}, "an option is empty"),
        (PAIR | {"rejected": "Hello!"}, "chosen equals rejected"),
        (PAIR | {"prompt": ""}, "prompt is ''"),
        (PAIR | {"chosen": 1}, "chosen is 1"),
        ({"prompt": "x", "chosen": "y"}, "no rejected; expected the keys prompt"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path, [json.dumps(ROW), json.dumps(row)])
    with pytest.raises(AlloError, match=f"{path}, line 2: .*{message}") as caught:
        realdata.load_rows("ecqa", "train", tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_lines_and_files_are_named(tmp_path):
    path = write(tmp_path, [json.dumps(ROW), "{"])
    with pytest.raises(AlloError, match="line 2: not JSON"):
        realdata.load_rows("ecqa", "train", tmp_path)
    path.write_bytes(b'{}\n{"id": "\xff"}')
    with pytest.raises(AlloError, match="line 2: not UTF-8"):
        realdata.load_rows("ecqa", "train", tmp_path)
    path.write_text("\n \n")
    with pytest.raises(AlloError, match="holds no rows"):
        realdata.load_rows("ecqa", "train", tmp_path)
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW))
    with pytest.raises(AlloError, match="'q-1' occurs twice"):
        realdata.load_rows("ecqa", "train", tmp_path)
    path.unlink()
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(AlloError, match="cannot be read"):
        realdata.load_rows("ecqa", "train", tmp_path)
    packed.write_bytes(b"no gzip")
    with pytest.raises(AlloError, match="cannot be read"):
        realdata.load_rows("ecqa", "train", tmp_path)


def test_missing_data_names_both_ways(tmp_path, monkeypatch):
    both = "--data DIR.*ALLO_DATA.*hub through `datasets`"
    with pytest.raises(AlloError, match=f"absent does not exist.*{both}"):
        realdata.load_rows("ecqa", "train", tmp_path / "absent")
    with pytest.raises(AlloError, match=f"has no such file.*{both}"):
        realdata.load_rows("ecqa", "train", tmp_path)
    monkeypatch.delenv("ALLO_DATA", raising=False)
    with pytest.raises(AlloError, match=f"'gossip' is not there.*{both}"):
        realdata.load_rows("gossip", "train")

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(AlloError, match=f"cannot be read from the hub.*no route to host.*{both}"):
        realdata.load_rows("ecqa", "train")


def test_instructions_with_others_outputs_are_rows_too(tmp_path):
    rows = [
        {"id": "a", "question": "Sing.", "subset": "x", "outputs": {"weak": "", "strong": "La."}},
        {"id": "b", "question": "Sing more.", "cluster": "y", "outputs": {}},
    ]
    path = write(tmp_path, [json.dumps(row) for row in rows], "alpaca_eval", "test")
    assert realdata.load_rows("alpaca_eval", "test", tmp_path) == rows
    for outputs in (["La."], None, {"weak": 3}, {"weak": None}):
        path.write_text(json.dumps(rows[0] | {"outputs": outputs}))
        with pytest.raises(AlloError, match="outputs is .*, expected an object of responses by"):
            realdata.load_rows("alpaca_eval", "test", tmp_path)


def test_data_hash_sees_values_and_order_but_not_key_order():
    other = ROW | {"id": "q-2"}
    shuffled = dict(reversed(ROW.items()))
    assert realdata.data_hash([ROW]) == realdata.data_hash([shuffled])
    assert realdata.data_hash([ROW, other]) != realdata.data_hash([other, ROW])
    assert realdata.data_hash([{"b": 1, "a": "é"}]) == (
        hashlib.sha256(b'{"a":"\\u00e9","b":1}\n').hexdigest()
    )


# --- questions ---------------------------------------------------------------------------------


def test_prompt_and_target_in_both_styles():
    assert questions.prompt(NAME, ROW) == (
        "Where does one light a fire\nat night?\nOptions: synagogue, bedroom, St. Paul\nAnswer:"
    )
    assert questions.target(NAME, ROW) == " The answer is: bedroom"
    assert questions.target(NAME, ROW, explain=True) == (
        " A bedroom is where one sleeps. The answer is: bedroom"
    )
    paper = questions.prompt(NAME, ROW, "letter")
    assert ROW["question"] in paper and paper.endswith("Let's think step by step.")
    assert questions.target(NAME, ROW, "letter", explain=9) == (
        " A bedroom is where one sleeps. Candles can be lit in a bedroom."
        " The answer is: (B) bedroom"
    )
    assert questions.target(NAME, ROW | {"solution": None}, explain=1) == " The answer is: bedroom"


@pytest.mark.parametrize(
    "response, style, expected",
    [
        (" The answer is: bedroom", "text", "B"),
        (" So what. The answer is:  Bedroom. ", "text", "B"),
        ("The answer is: st. paul", "text", "C"),
        ("The answer is: synagogue. No! The answer is: bedroom", "text", "B"),
        ("The answer is: B", "text", None),
        ("The answer is: bedroom or synagogue", "text", None),
        ("The answer is: bed", "text", None),
        ("The answer is: bedroom. Good night.", "text", None),
        ("The answer is bedroom", "text", None),
        ("bedroom", "text", None),
        ("", "text", None),
        ("The answer is:", "text", None),
        ("The answer is: (C) St. Paul", "letter", "C"),
        ("The answer is: A.", "letter", "A"),
        ("The answer is: (A) bedroom", "letter", None),
        ("The answer is: bedroom", "letter", None),
    ],
)
def test_answers_are_read_strictly(response, style, expected):
    assert questions.read(NAME, ROW, response, style) == expected
    assert questions.is_right(NAME, ROW, response, style) == (expected == "B")


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
    assert questions.correction(NAME, ROW, response) == corrected


words = st.text("abcdefg XYZ.,'()-é", min_size=1, max_size=12).filter(
    lambda text: answers.plain(text) and answers.MARKER not in text
)


@st.composite
def multiple_choice(draw):
    choices = draw(st.lists(words, min_size=2, max_size=6, unique_by=answers.plain))
    letters = answers.LETTERS[: len(choices)]
    stem = draw(words)
    lines = [f"({letter}) {text}" for letter, text in zip(letters, choices, strict=True)]
    return {
        "id": "q",
        "question": "\n".join([stem, *lines]),
        "solution": draw(st.none() | words),
        "answer": draw(st.sampled_from(letters)),
        "choices": choices,
    }


@given(
    multiple_choice(), st.sampled_from(["text", "letter"]), st.integers(0, 2), st.text(max_size=40)
)
def test_targets_are_right_and_corrections_become_right(row, style, explain, response):
    realdata.check_row(row)
    assert questions.is_right(NAME, row, questions.target(NAME, row, style, explain), style)
    corrected = questions.correction(NAME, row, response, style)
    assert questions.is_right(NAME, row, corrected, style)
    assert questions.correction(NAME, row, corrected, style) == corrected
    for index, letter in enumerate(answers.LETTERS[: len(row["choices"])]):
        said = f"Hm. The answer is: {answers.option(row['choices'], index, style)}"
        assert questions.read(NAME, row, said, style) == letter


def test_unusable_styles_and_questions_are_refused():
    with pytest.raises(AlloError, match="style 'number'"):
        questions.prompt(NAME, ROW, "number")
    with pytest.raises(AlloError, match="'q-1' has no options"):
        questions.check(NAME, ROW | {"choices": None})


# --- preferences -------------------------------------------------------------------------------


def chat_tokenizer(template=True):
    """One token a word; a message is its role, its words and an end token."""
    words = {"<unk>": 0, "<eos>": 1}
    core = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", eos_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' end ' }}{% endfor %}"
        )
    return tokenizer


def test_helpful_prompts_become_chat_messages():
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello! Human: me\n\nHuman: And?\n\nAssistant:"
    assert realdata.helpful_prompt(text) == [
        {"role": "user", "content": "Hi\n\nthere"},
        {"role": "assistant", "content": "Hello! Human: me"},
        {"role": "user", "content": "And?"},
    ]
    twice = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert [m["content"] for m in realdata.helpful_prompt(twice)] == ["a", "b\n\nc", "d"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "\n\nHuman: hi",
        "x\n\nHuman: hi\n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant: ho",
        "\n\nHuman: \n\nAssistant:",
        "\n\nAssistant: hi\n\nHuman: ho\n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant: ho\n\nAssistant:",
    ],
)
def test_conversations_of_another_form_are_refused_in_one_line(text):
    with pytest.raises(AlloError, match="expected") as caught:
        realdata.helpful_prompt(text)
    assert "\n" not in str(caught.value)


def test_pairs_have_trls_columns_as_messages_or_strings():
    as_chat = realdata.preference_pairs([PAIR], chat_tokenizer())
    assert as_chat[0] == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go."}],
    }
    for tokenizer in (None, chat_tokenizer(template=False)):
        spaced = PAIR | {"chosen": " Hello!", "rejected": " Go."}
        assert realdata.preference_pairs([PAIR], tokenizer).to_list() == [spaced]
    plain = PAIR | {"prompt": "Q:"}
    assert realdata.preference_pairs([plain], chat_tokenizer()).to_list() == [plain]


@pytest.mark.parametrize("template", [True, False])
def test_pairs_over_the_limit_are_dropped_and_counted(caplog, template):
    # `user Hi end` or `Human: Hi Assistant:`, then three words and the end token.
    length = 7
    long = PAIR | {"rejected": "one two three"}
    tokenizer = chat_tokenizer(template)
    assert len(realdata.preference_pairs([long, PAIR], tokenizer, length)) == 2
    assert caplog.text == ""
    assert len(realdata.preference_pairs([long, PAIR], tokenizer, length - 1)) == 1
    assert f"1 of 2 pairs dropped: longer than {length - 1} tokens" in caplog.text
    with pytest.raises(AlloError, match="none of 2 pairs has at most 2 tokens"):
        realdata.preference_pairs([long, PAIR], tokenizer, 2)


def test_a_limit_needs_a_tokenizer_and_pairs_are_needed():
    with pytest.raises(AlloError, match="max_tokens=9 without a tokenizer"):
        realdata.preference_pairs([PAIR], None, 9)
    with pytest.raises(AlloError, match="no preference pairs were given"):
        realdata.preference_pairs([])
