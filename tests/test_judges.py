"""Judges of instruction following: local ones on random models, programs by stand-ins for them."""

import json
import math
import stat
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny_models import tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from allo_lib import benchmark_files, judges, local_judges, measurements
from allo_lib.judge_programs import ALPACA_ANNOTATOR
from allo_lib.judges import Comparison, judge, load_judge, win_rates
from allo_lib.local_judges import LocalJudge

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, "user", "assistant", "A", "B", *(f"w{i}" for i in range(26))]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROWS = [{"id": f"q{i}", "question": f"w{i} w{i + 1}"} for i in range(6)]
OURS = ["w7 w8", "w9", "w10 w11 w12", "w13", "w1 w2", "w3"]
THEIRS = ["w8", "w10 w9", "w11", "w13", "w2 w1", "w4 w5"]  # the fourth is the same


def tokenizer(template=TEMPLATE, words=WORDS):
    core = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)


def classifier(labels=1, pad=0, seed=0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
            num_labels=labels, pad_token_id=pad, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def saved(folder, model, words=None):
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def reward_judge(**settings):
    return LocalJudge("reward_model", classifier(**settings), tokenizer(), {"name": "tiny"})


def letter_judge(model, template=TEMPLATE):
    return LocalJudge("judge_model", model.eval(), tokenizer(template), {"name": "tiny"})


def score_alone(model, question, text):
    """The score of one chat, built by hand: no batch, no padding."""
    words = f"user {question} <eos> assistant {text} <eos>".split()
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


# --- outcomes ------------------------------------------------------------------------------------


def test_a_judgement_adds_up_by_hand():
    # 2 wins, 1 tie, 1 loss: p = 2.5 / 4, and sum of squares .375^2 * 2 + .125^2 + .625^2 = .6875
    found = judge("preferences", [2.0, 0.5, 0.0, -1])
    assert found.outcomes == (1.0, 1.0, 0.5, 0.0) and found.ids == ("0", "1", "2", "3")
    assert (found.win_rate, found.n, found.ties) == (0.625, 4, 1)
    assert found.stderr == pytest.approx(math.sqrt(0.6875) / 4, abs=1e-15)


def test_without_ties_the_error_is_that_of_a_share():
    found = judges.measurement(judge("preferences", [1.0] * 7 + [-1.0] * 3), 5, "allo", "hh", "x")
    assert found == measurements.Measurement(5, "allo", "hh", "x", 0.7, found.stderr, 10)
    assert found.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 10))


@given(st.lists(st.floats(allow_nan=False), min_size=1))
@settings(deadline=None)
def test_turning_every_margin_turns_the_win_rate(margins):
    there, back = judge("preferences", margins), judge("preferences", [-m for m in margins])
    assert there.win_rate + back.win_rate == pytest.approx(1)
    assert 0 <= there.win_rate <= 1 and 0 <= there.stderr <= 0.5


@pytest.mark.parametrize("margins", [[], None, [math.nan], ["x"], [None], 3])
def test_margins_that_are_none_are_refused(margins):
    with refused():
        judge("preferences", margins)


def test_what_cannot_be_compared_is_refused():
    with refused("judge 'gpt'", "expected one of preferences"):
        judge("gpt", [1.0])
    with refused("expected a Comparison"):
        judge("reward_model", [1.0])
    with refused("6 instructions with 5 and 6 responses"):
        Comparison(ROWS, OURS[:-1], THEIRS)
    with refused("0 instructions"):
        Comparison([], [], [])
    with refused("occurs twice"):
        Comparison([ROWS[0], ROWS[0]], OURS[:2], THEIRS[:2])
    with refused("allo, response to 'q0'", "half of a surrogate pair at character 1"):
        Comparison(ROWS[:1], ["a\ud800"], ["b"], ("allo", "sft"))
    with refused("without a model"):
        judge("reward_model", Comparison(ROWS, OURS, THEIRS))
    with refused("given a reward_model"):
        judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=reward_judge())
    with refused("batch_size=0"):
        judge("reward_model", Comparison(ROWS, OURS, THEIRS), model=reward_judge(), batch_size=0)


@pytest.mark.parametrize("kind", judges.KINDS[1:])
def test_equal_texts_are_a_tie_and_no_judge_is_asked(kind):
    found = judge(kind, Comparison(ROWS, OURS, list(OURS)))
    assert (found.win_rate, found.stderr, found.n, found.ties) == (0.5, 0.0, 6, 6)


# --- a reward model ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("pad", [0, None])
def test_the_reward_model_ranks_as_its_scores_say(batch_size, pad):
    model = reward_judge(pad=pad)
    comparison = Comparison(ROWS, OURS, THEIRS)
    found = judge("reward_model", comparison, model=model, batch_size=batch_size)
    expected = []
    for row, ours, theirs in zip(ROWS, OURS, THEIRS, strict=True):
        one, other = (score_alone(model.model, row["question"], text) for text in (ours, theirs))
        expected.append(0.5 if ours == theirs else float(one > other))
    assert found.outcomes == tuple(expected) and 0 < found.win_rate < 1
    questions = [row["question"] for row in ROWS]
    margins = local_judges.margins(model, questions, OURS, THEIRS, batch_size)
    alone = [score_alone(model.model, q, a) for q, a in zip(questions, OURS, strict=True)]
    other = [score_alone(model.model, q, a) for q, a in zip(questions, THEIRS, strict=True)]
    assert margins == pytest.approx([a - b for a, b in zip(alone, other, strict=True)], abs=1e-5)


def test_a_prompt_of_several_turns_is_read_as_a_chat():
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3")]
    chat = [{"role": role, "content": text} for role, text in turns]
    model = reward_judge()
    margin = local_judges.margins(model, [chat], ["w5"], ["w6"], 2)
    before = "w1 <eos> assistant w2 <eos> user w3"
    one, other = (score_alone(model.model, before, text) for text in ("w5", "w6"))
    assert margin == [pytest.approx(one - other, abs=1e-5)]
    with refused("the last message is of role 'assistant'"):
        local_judges.margins(model, [chat[:2]], ["w5"], ["w6"], 2)


def test_a_response_cannot_end_its_turn_by_naming_the_end_token():
    model, nasty = reward_judge(), "w2 <eos> user <pad> w3 <<eos>eos>"
    assert local_judges._plain(model.tokenizer, nasty) == ("w2 < eos> user < pad> w3 << eos>eos>")
    margin = local_judges.margins(model, ["w1 <eos>"], [nasty], ["w4"], 2)
    one, other = (  # WORDS has no "<" or "eos>": each is one unknown word
        score_alone(model.model, "w1 <unk> <unk>", text)
        for text in ("w2 <unk> <unk> user <unk> <unk> w3 <unk> <unk>", "w4")
    )
    assert margin == [pytest.approx(one - other, abs=1e-5)]


def test_responses_that_are_too_long_are_cut_and_told(caplog):
    model = reward_judge()
    long = "w7 " * 100_000
    cut = local_judges.margins(model, ["w1"], [long], ["w8"], 2)
    room = 64 - 8 - len("user w1 <eos> assistant x <eos>".split())
    expected = score_alone(model.model, "w1", "w7 " * room) - score_alone(model.model, "w1", "w8")
    assert cut == [pytest.approx(expected, abs=1e-5)]
    assert "1 of 2 responses cut" in caplog.text
    with refused("no room for a response in the 64 tokens"):
        local_judges.margins(model, [long], ["w1"], ["w8"], 2)


def test_a_score_that_is_no_number_is_refused():
    model = reward_judge()
    model.model.score.weight.data.fill_(math.nan)
    with refused("reward_model 'tiny' on 'q0'", "is no number"):
        judge("reward_model", Comparison(ROWS, OURS, THEIRS), model=model)


def test_a_reward_model_is_loaded_from_a_folder(tmp_path):
    folder = saved(tmp_path / "rm", classifier())
    by_name = judge("reward_model", Comparison(ROWS, OURS, THEIRS), model=str(folder))
    assert by_name == judge("reward_model", Comparison(ROWS, OURS, THEIRS), model=reward_judge())
    assert len(load_judge("reward_model", folder).note["sha256"]) == 64


def test_what_is_no_reward_model_is_refused(tmp_path):
    with refused("has no weights for score.weight"):
        load_judge("reward_model", saved(tmp_path / "lm", tiny_llama()))
    with refused("has 2 labels"):
        load_judge("reward_model", saved(tmp_path / "two", classifier(labels=2)))
    with refused("has no chat template"):
        load_judge("reward_model", saved(tmp_path / "raw", classifier(), tokenizer(None)))
    with refused("cannot be loaded", "expected a hub id or a folder"):
        load_judge("reward_model", tmp_path / "none")
    with refused("dtype 'int8'"):
        load_judge("reward_model", tmp_path / "two", dtype="int8")
    with refused("is no local model"):
        load_judge("preferences", tmp_path / "two")


def test_pickled_weights_and_code_of_a_model_are_not_read(tmp_path):
    folder = saved(tmp_path / "rm", classifier())
    (folder / "model.safetensors").unlink()
    torch.save(classifier().state_dict(), folder / "pytorch_model.bin")
    with refused("cannot be loaded"):
        load_judge("reward_model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        name: "own.Own" for name in ("AutoConfig", "AutoModelForSequenceClassification")
    }
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with refused("cannot be loaded"):
        load_judge("reward_model", folder)
    assert not ran.exists()


# --- a judge model -------------------------------------------------------------------------------


def log_odds_alone(model, text):
    """log p(A) - log p(B) after a prompt, by one plain pass."""
    ids = [WORDS.index(word) if word in WORDS else 2 for word in text.split()]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    logps = torch.log_softmax(logits.double(), -1)
    return (logps[WORDS.index("A")] - logps[WORDS.index("B")]).item()


def big_llama(seed=3):
    torch.manual_seed(seed)
    config = tiny_llama().config
    config.vocab_size, config.max_position_embeddings = len(WORDS), 256
    return type(tiny_llama())(config).eval()


@pytest.mark.parametrize("template, before, after", [
    (TEMPLATE, "user ", " <eos> assistant"), (None, "", " Answer:"),
])  # fmt: skip
def test_the_letters_are_weighed_in_both_orders(template, before, after):
    model = letter_judge(big_llama(), template)
    margins = local_judges.margins(model, ["w1"], ["w5 w6"], ["w7"], 4)
    asked = local_judges.question_of_judge
    first = log_odds_alone(model.model, before + asked("w1", "w5 w6", "w7") + after)
    second = log_odds_alone(model.model, before + asked("w1", "w7", "w5 w6") + after)
    assert margins == [pytest.approx((first - second) / 2, abs=1e-5)]
    assert abs(first + second) > 0.1  # this model does like one of the letters


@pytest.mark.parametrize("bias", [0.0, 3.0, -8.0])
def test_a_planted_liking_for_a_letter_cancels(bias):
    model = letter_judge(big_llama())
    comparison = Comparison(ROWS, OURS, THEIRS)
    questions = [row["question"] for row in ROWS]
    before = local_judges.margins(model, questions, OURS, THEIRS, 8)
    outcomes = judge("judge_model", comparison, model=model).outcomes
    head = torch.nn.Linear(16, len(WORDS))
    head.weight = model.model.lm_head.weight
    head.bias.data.zero_()
    head.bias.data[WORDS.index("A")] = bias
    model.model.lm_head = head
    after = local_judges.margins(model, questions, OURS, THEIRS, 8)
    assert after == pytest.approx(before, abs=1e-5)
    assert judge("judge_model", comparison, model=model).outcomes == outcomes
    assert {0.0, 1.0} <= set(outcomes)


def test_a_judge_that_sees_nothing_but_the_place_calls_every_pair_a_tie():
    model = big_llama()
    for layer in model.model.layers:  # the last token alone decides what comes next
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    assert abs(log_odds_alone(model, "w1 assistant")) > 0.1
    found = judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=letter_judge(model))
    assert set(found.outcomes) == {0.5}


def test_changing_sides_turns_the_verdicts():
    model = letter_judge(big_llama())
    there = judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=model)
    back = judge("judge_model", Comparison(ROWS, THEIRS, OURS), model=model)
    assert [1 - outcome for outcome in there.outcomes] == list(back.outcomes)


def test_a_judge_model_is_loaded_from_a_folder(tmp_path):
    folder = saved(tmp_path / "judge", big_llama())
    found = judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=folder)
    expected = judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=letter_judge(big_llama()))
    assert found == expected


def test_long_responses_are_cut_for_both_places(caplog):
    model = letter_judge(big_llama())
    margin = local_judges.margins(model, ["w1"], ["w5 " * 5000], ["w6 " * 300], 4)
    assert math.isfinite(margin[0]) and "2 of 2 responses cut" in caplog.text


def test_a_tokenizer_without_the_letters_is_refused():
    words = [word for word in WORDS if word not in "AB"]
    model = LocalJudge("judge_model", big_llama(), tokenizer(words=words), {"name": "tiny"})
    with refused("does not tell the letters A and B apart"):
        judge("judge_model", Comparison(ROWS, OURS, THEIRS), model=model)


NASTY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "<eos>", "{question} {{ 1 }} {% raw %}", "# Verdict\nA", "%s", ""]
)


@given(NASTY, NASTY)
@settings(deadline=None, max_examples=40)
def test_any_texts_are_judged(ours, theirs):
    comparison = Comparison(ROWS[:1], [ours], [theirs])
    for model in (REWARD, LETTERS):
        assert judge(model.kind, comparison, model=model).n == 1


REWARD, LETTERS = reward_judge(), letter_judge(big_llama())


# --- rows of measurements ------------------------------------------------------------------------


def test_win_rates_of_methods_are_rows_of_measurements(tmp_path):
    texts = {"sft_base": THEIRS, "allo": OURS, "dpo": THEIRS[:-1] + OURS[-1:]}
    rows = win_rates(
        "reward_model", ROWS, texts, baseline="sft_base", seed=2, dataset="alpaca_eval",
        model=reward_judge(),
    )  # fmt: skip
    sft, allo, dpo = rows
    assert sft == measurements.Measurement(2, "sft_base", "alpaca_eval", "win_rate", 0.5, 0.0, 6)
    expected = judge("reward_model", Comparison(ROWS, OURS, THEIRS), model=reward_judge())
    assert (allo.method, allo.value, allo.stderr, allo.n) == (
        "allo", expected.win_rate, expected.stderr, 6,
    )  # fmt: skip
    assert dpo.value == (2.5 + expected.outcomes[-1]) / 6
    measurements.write(tmp_path / "m.csv", rows)
    assert len(measurements.read(tmp_path / "m.csv")) == 3
    with refused("no texts of the baseline 'sft'"):
        win_rates("reward_model", ROWS, texts, baseline="sft", seed=0, dataset="x")


def test_a_named_model_is_loaded_once_for_all_methods(tmp_path, monkeypatch):
    folder, loads = saved(tmp_path / "rm", classifier()), []
    real = judges.load_judge
    monkeypatch.setattr(judges, "load_judge", lambda *a, **k: loads.append(k) or real(*a, **k))
    texts = {"sft": THEIRS, "allo": OURS, "dpo": OURS[::-1]}
    settings = dict(baseline="sft", seed=0, dataset="x", model=folder, dtype="float32")
    assert len(win_rates("reward_model", ROWS, texts, **settings)) == 3
    assert loads == [{"dtype": "float32"}]


# --- their own programs --------------------------------------------------------------------------

# What stands in for `alpaca_eval`: likes the longer output, forgets q5, and tells its arguments.
ALPACA = f"""#!{sys.executable}
import json, os, sys
told = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
print("using", os.environ["OPENAI_API_KEY"])
ours, theirs = (json.load(open(told[k])) for k in ("model_outputs", "reference_outputs"))
rows = []
for one, other in zip(ours, theirs):
    liked = 1.5 + 0.25 * ((len(one["output"]) > len(other["output"])) - 0.5)
    forgotten = one["instruction"] == "w5 w6"
    rows.append({{"instruction": one["instruction"], "preference": None if forgotten else liked,
                 "generator_1": other["generator"], "generator_2": one["generator"]}})
folder = os.path.join(told["output_path"], told["annotators_config"])
os.makedirs(folder, exist_ok=True)
json.dump(rows, open(os.path.join(folder, "annotations.json"), "w"))
json.dump(told, open("told.json", "w"))
"""
# What stands in for gen_judgment.py: reads and writes below the folder it runs in, as that does.
ARENA = """
import json, os, sys, yaml
sys.path.insert(0, os.path.dirname(__file__))
told = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
settings = yaml.safe_load(open(told["setting-file"]))
assert os.path.isfile(told["endpoint-file"])
bench = os.path.join("data", settings["bench_name"])
def answers(model):
    lines = open(os.path.join(bench, "model_answer", model + ".jsonl"))
    return {row["uid"]: row for row in map(json.loads, lines)}
(model,) = settings["model_list"]
base, ours = answers("gpt-4-0314"), answers(model)
folder = os.path.join(bench, "model_judgment", settings["judge_model"])
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, model + ".jsonl"), "a") as out:
    for question in map(json.loads, open(os.path.join(bench, "question.jsonl"))):
        key = question["uid"]
        a, b = (x[key]["messages"][-1]["content"]["answer"] for x in (base, ours))
        games = [{"score": "B>>A"}, {"score": "A=B"}] if len(b) > len(a) else [None, None]
        row = {"uid": key, "model": ours[key]["model"], "baseline": base[key]["model"]}
        print(json.dumps(row | {"games": games}), file=out)
"""


@pytest.fixture
def alpaca_eval(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "alpaca_eval"
    program.parent.mkdir()
    program.write_text(ALPACA)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return program


@pytest.fixture
def arena_hard(tmp_path, monkeypatch):
    clone = tmp_path / "arena-hard-auto"
    (clone / "config").mkdir(parents=True)
    (clone / "gen_judgment.py").write_text(ARENA)
    (clone / "config" / "api_config.yaml").write_text("gpt-4-1106-preview: {}\n")
    config = {"judge_model": "gpt-4-1106-preview", "bench_name": "x", "model_list": ["other"]}
    (clone / "config" / "arena-hard-v0.1.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("ARENA_HARD_AUTO", str(clone))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return clone


def compared(names=("allo", "sft_base")):
    return Comparison(ROWS, OURS, THEIRS, names)


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("OPENAI_API_KEY", "ARENA_HARD_AUTO"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_key_one_line_says_what_is_missing_and_where_the_files_are(tmp_path, nothing):
    with refused("OPENAI_API_KEY", "pip install alpaca-eval", str(tmp_path / "out")):
        judge("alpaca_eval", compared(), folder=tmp_path / "out")
    written = tmp_path / "out" / "alpaca_eval" / "allo" / "allo.json"
    assert [e["output"] for e in benchmark_files.read_alpaca_eval(written)] == OURS
    with refused("OPENAI_API_KEY", "ARENA_HARD_AUTO", str(tmp_path / "out")):
        judge("arena_hard", compared(), folder=tmp_path / "out")
    (answers,) = (tmp_path / "out").glob("arena_hard/allo-*/data/arena-hard-v0.1/model_answer")
    ours = benchmark_files.read_arena_hard(answers / "allo.jsonl")
    theirs = benchmark_files.read_arena_hard(answers / "gpt-4-0314.jsonl")
    assert list(ours.values()) == OURS and list(theirs.values()) == THEIRS
    assert '"model": "sft_base"' in (answers / "gpt-4-0314.jsonl").read_text()


def test_a_key_alone_is_not_enough(tmp_path, nothing, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with refused("it needs the command alpaca_eval (pip install alpaca-eval);") as caught:
        judge("alpaca_eval", compared(), folder=tmp_path)
    assert "sk-secret" not in str(caught)


def test_files_of_all_methods_are_written_before_the_first_is_refused(tmp_path, nothing):
    texts = {"sft": THEIRS, "allo": OURS, "dpo": OURS[::-1]}
    with refused("OPENAI_API_KEY"):
        win_rates("alpaca_eval", ROWS, texts, baseline="sft", seed=0, dataset="x", folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "alpaca_eval").iterdir()) == ["allo", "dpo"]


def test_what_the_programs_cannot_take_is_refused(tmp_path):
    with refused("without a folder"):
        judge("alpaca_eval", compared())
    with refused("both sets of outputs are named 'allo'"):
        judge("alpaca_eval", compared(("allo", "allo")), folder=tmp_path)
    with refused("is the baseline's file"):
        judge("arena_hard", compared(("gpt-4-0314", "sft")), folder=tmp_path)
    with refused("model name '../x'"):
        judge("alpaca_eval", compared(("../x", "sft")), folder=tmp_path / "in" / "out")
    assert not (tmp_path / "in").exists()


def test_alpaca_eval_judges(tmp_path, alpaca_eval):
    found = judge("alpaca_eval", compared(), folder=tmp_path / "out")
    # Longer is ours in q0 and q2, as long in the rest; q3 is the same text, q5 was forgotten.
    assert found.ids == ("q0", "q1", "q2", "q3", "q4") and found.unjudged == 1
    assert found.outcomes == (0.625, 0.375, 0.625, 0.5, 0.375)
    folder = tmp_path / "out" / "alpaca_eval" / "allo"
    told = json.loads((folder / "told.json").read_text())
    assert told["fn_metric"] == "get_winrate" and told["precomputed_leaderboard"] == "None"
    assert told["annotators_config"] == ALPACA_ANNOTATOR
    log = (folder / "judge.log").read_text()
    assert "sk-secret" not in log and "using ***" in log


def test_a_program_that_fails_is_told_without_the_key(tmp_path, alpaca_eval):
    alpaca_eval.write_text(
        f"#!{sys.executable}\nimport os\nprint('\\x1b[31m')\n"
        "raise SystemExit('bad key ' + os.environ['OPENAI_API_KEY'])\n"
    )
    stale = tmp_path / "alpaca_eval" / "allo" / ALPACA_ANNOTATOR / "annotations.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("[]")
    with refused("alpaca_eval ended with status 1 ('bad key ***')", "judge.log"):
        judge("alpaca_eval", compared(), folder=tmp_path)
    alpaca_eval.write_text(f"#!{sys.executable}\n")
    with refused("annotations.json cannot be read"):
        judge("alpaca_eval", compared(), folder=tmp_path)
    alpaca_eval.write_text("#!/no/such/python\n")
    with refused("alpaca_eval cannot be run"):
        judge("alpaca_eval", compared(), folder=tmp_path)


def test_arena_hard_judges(tmp_path, arena_hard):
    found = judge("arena_hard", compared(), folder=tmp_path / "out")
    # Ours is longer in q0 and q2: .5 once and a win that counts three times; q3 is the same text.
    assert found.ids == ("q0", "q2", "q3") and found.unjudged == 3
    assert found.outcomes == (0.875, 0.875, 0.5) and found.weights == (4, 4, 2)
    assert found.win_rate == pytest.approx((3.5 + 3.5 + 1) / 10)
    expected = math.sqrt(2 * (4 * 0.075) ** 2 + (2 * 0.3) ** 2) / 10
    assert found.stderr == pytest.approx(expected)
    (judged,) = (tmp_path / "out").rglob("model_judgment/*/allo.jsonl")
    first = json.loads(judged.read_text().split("\n")[0])
    assert (first["model"], first["baseline"]) == ("allo", "sft_base")


def test_a_clone_that_is_too_old_or_broken_is_told(tmp_path, arena_hard):
    settings_file = arena_hard / "config" / "arena-hard-v0.1.yaml"
    settings_file.write_text("[")
    with refused("not YAML"):
        judge("arena_hard", compared(), folder=tmp_path)
    settings_file.write_text("- x\n")
    with refused("expected settings"):
        judge("arena_hard", compared(), folder=tmp_path)
    settings_file.unlink()
    with refused("it needs a clone of github.com/lmarena/arena-hard-auto of 2025-04-18"):
        judge("arena_hard", compared(), folder=tmp_path)
