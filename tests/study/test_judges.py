"""Replies to instructions: which, their files in the benchmarks' formats, and who judges them."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_like import TEMPLATE, THINGS, write_data, write_model
from refusals import refused
from tiny_models import tiny_llama, words
from tiny_study import open_study
from transformers import LlamaConfig, LlamaForSequenceClassification

from allo_lib.engine.encoding import encode_prompt
from allo_lib.evaluation import comparisons
from allo_lib.profiles.config import fingerprint
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import tables
from allo_lib.study import judges, manifest, results, scoring, training
from allo_lib.study.judges import RewardModel, load_reward_model, read_verdicts, scores, win_rate
from allo_lib.study.study import Study

ROWS = [
    {"id": "q-1", "question": "Name a \u00e9clair.", "subset": "koala"},
    {"id": "q-2", "question": "Write\ntwo lines", "cluster": "Lines"},
]
TEXTS = ["<script>alert(1)</script>\u2028", 'A "quote"\r\nand \U0001f600']
BOTH = {"sft_base": ["of sft_base", "of sft_base"], "allo": TEXTS}
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
# After data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl of lmarena/arena-hard-auto, 196f6b8.
ARENA = (
    r'{"uid": "q-1", "ans_id": "q-1", "model": "allo", "messages": [{"role": "user", "content": '
    r'"Name a \u00e9clair."}, {"role": "assistant", "content": {"answer": '
    r'"<script>alert(1)</script>\u2028"}}], "tstamp": 0}'
)


def test_a_win_rate_adds_up_by_hand():
    rows = [{"id": str(i)} for i in range(5)]
    ours, theirs = ["a", "b", "c", "d", "same"], ["x", "y", "z", "w", "same"]
    # 1 win, 2 ties, 1 loss, and row 2 without a verdict: p = 2 / 4, sum of squares .5
    found = win_rate(rows, ours, theirs, {"0": [1.0], "1": [0.5], "3": [0.0]})
    assert found == (0.5, pytest.approx(math.sqrt(0.5) / 4), 4)
    # More verdicts weigh more, and a tie of equal texts counts twice, as Arena-Hard asks twice.
    verdicts = {"0": [1.0, 1.0, 1.0, 0.5], "1": [0.0, 0.0]}
    gaps = [4 * (0.875 - 0.5625), 2 * 0.5625, 2 * 0.0625]
    error = math.sqrt(sum(g * g for g in gaps)) / 8
    found = win_rate([rows[i] for i in (0, 1, 4)], ["1", "2", "3"], ["4", "5", "3"], verdicts)
    assert found == (pytest.approx(0.5625), pytest.approx(error), 3)
    with refused("no verdict on any of 4"):
        win_rate(rows[:4], ours[:4], theirs[:4], {"0": []})


# --- files of the benchmarks ---------------------------------------------------------------------


def test_outputs_are_as_in_the_golden_examples(tmp_path):
    texts = {"sft_base": ["a", "b"], "allo": TEXTS}
    judges.write_outputs("alpaca_eval", tmp_path, ROWS, texts)
    assert (tmp_path / "allo.json").read_bytes() == ALPACA.encode("ascii")
    judges.write_outputs("arena_hard", tmp_path, ROWS, texts)
    answers = tmp_path / "model_answer"
    assert {path.name for path in answers.iterdir()} == {
        "allo.jsonl", "sft_base.jsonl", "gpt-4-0314.jsonl"}  # fmt: skip
    first = (answers / "allo.jsonl").read_bytes().decode("ascii").split("\n")[0]
    assert first == ARENA
    # What their script compares with goes by this name; the rows in it say whose they are.
    baseline = (answers / "gpt-4-0314.jsonl").read_bytes()
    assert baseline == (answers / "sft_base.jsonl").read_bytes() and b'"sft_base"' in baseline
    question = json.loads((tmp_path / "question.jsonl").read_text().split("\n")[1])
    assert question["uid"] == "q-2" and question["category"] == "arena-hard-v0.1"
    assert (question["cluster"], question["prompt"]) == ("Lines", "Write\ntwo lines")


def alpaca(folder, *entries, judge="gpt"):
    path = folder / "allo" / judge / "annotations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return lambda: read_verdicts("alpaca_eval", folder, ROWS, BOTH, "allo")


def test_alpaca_eval_preferences_become_verdicts(tmp_path):
    first = {
        "instruction": ROWS[0]["question"],
        "preference": 1.75,
        "output_2": TEXTS[0],
        "output_1": "of sft_base",
    }
    other = {"instruction": "of another set", "preference": 2}
    none = {"instruction": ROWS[1]["question"], "preference": None}
    with refused("0 files", str(tmp_path / "allo" / "*"), "as docs/run.md says"):
        read_verdicts("alpaca_eval", tmp_path, ROWS, BOTH, "allo")
    assert alpaca(tmp_path, first, other, none)() == ({"q-1": [0.75]}, "gpt")
    for draw in (0, 1.5):
        assert alpaca(tmp_path, first | {"preference": draw})()[0] == {"q-1": [0.5]}
    for wrong, told in (
        (first | {"preference": 3}, "preference 3, expected 1 to 2"),
        (first | {"preference": "2"}, "TypeError"),
        (first | {"output_2": "older"}, "another reply to q-1, as output_2"),
        (first | {"output_1": "of GPT-4"}, "another reply to q-1, as output_1"),
        ({"instruction": ROWS[0]["question"]}, "preference"),
        ([], "TypeError"),
    ):
        with refused("annotations.json holds no verdicts on these replies", told, "again"):
            alpaca(tmp_path, wrong)()
    with refused("2 files", "expected one judge's"):
        alpaca(tmp_path, judge="claude")()


def arena(folder, *rows):
    path = folder / "model_judgment" / "gpt-4" / "allo.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda: read_verdicts("arena_hard", folder, ROWS, BOTH, "allo")


# In the first game ours is B, in the second A; a double sign counts three times.
@pytest.mark.parametrize(("first", "second", "verdicts"), [
    ("A>B", "A>B", [1, 0]), ("B>>A", "A>>B", [1] * 6), ("A<<B", "B=A", [0.5, 1, 1, 1]),
    ("A=B", "B>A", [0, 0.5]), ("A>>B", "A<B", [0, 0, 0, 0]), ("B<A", "B<<A", [1, 1, 1, 0]),
    ("A=B", None, None), ("A=B", "A>A", None), ("A>>>B", "A=B", None), ("A=B", "", None),
])  # fmt: skip
def test_arena_hard_scores_become_verdicts(tmp_path, first, second, verdicts):
    games = [
        {"score": first, "prompt": [{"content": f"of sft_base {TEXTS[0]}"}]},
        {"score": second},
    ]
    expected = {} if verdicts is None else {"q-1": verdicts}
    missing = {"uid": "q-2", "games": [None, {"score": "A=B"}]}
    assert arena(tmp_path, {"uid": "q-1", "games": games}, missing)() == (expected, "gpt-4")
    older, alone = ([{"score": "A=B", "prompt": [{"content": text}]}, {"score": "A=B"}]
                    for text in ("of sft_base, older", f"of GPT-4 {TEXTS[0]}"))  # fmt: skip
    for row in (
        {"uid": "q-1", "games": older},
        {"uid": "q-1", "games": alone},
        {"uid": "q-1"},
        [],
        {"uid": "q", "games": ["x"]},
    ):
        with refused("allo.jsonl holds no verdicts on these replies"):
            arena(tmp_path, row)()


# --- a reward model ------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(26)), *THINGS]
TURNS = TEMPLATE.replace("{{ m.content }} ", "{{ m.content }} <eos> ")


def tokenizer(template: str | None = TURNS):
    return words(WORDS, template)


def classifier(labels: int = 1, pad: int | None = 0, context: int = 64, layers: int = 2):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=context, initializer_range=0.3,
            num_labels=labels, pad_token_id=pad, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def saved(model, folder: Path, words=None) -> Path:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def score_alone(model, question, text):
    """The score of one chat, built by hand: no batch, no padding."""
    words = f"user {question} <eos> assistant {text} <eos>".split()[:64]
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


@pytest.mark.parametrize("pad", [0, None])
def test_a_reward_model_scores_replies_in_batches_as_alone(tmp_path, pad, caplog):
    judge = load_reward_model(saved(classifier(pad=pad), tmp_path))
    assert len(judge.sha256) == 64
    questions, texts = [f"w{i} w{i + 1}" for i in range(4)], ["w7 w8", "w9", "w10 w11 w12", "w13"]
    alone = [score_alone(judge.model, *pair) for pair in zip(questions, texts, strict=True)]
    assert len(set(alone)) == 4
    for size in (1, 3, 64):
        assert scores(judge, questions, texts, size) == pytest.approx(alone, abs=1e-5)
    # A reply cannot end its turn by naming the end token; "<" and "eos>" are unknown words.
    found = scores(judge, ["w1 <eos>"], ["w2 <eos> user <pad> w3 <<eos>eos>"], 2)
    plain = "w1 <unk> <unk>", "w2 <unk> <unk> user <unk> <unk> w3 <unk> <unk>"
    assert found == [pytest.approx(score_alone(judge.model, *plain), abs=1e-5)]
    cut = pytest.approx(score_alone(judge.model, "w1", "w7 " * 100), abs=1e-5)
    assert scores(judge, ["w1"], ["w7 " * 100], 2) == [cut]
    assert "a chat of 105 tokens cut to 64" in caplog.text


def test_what_is_no_reward_model_is_refused(tmp_path):
    for model, reads, lacks in (
        (tiny_llama(), tokenizer(), "no weights for its score"),
        (classifier(labels=2), tokenizer(), "2 labels"),
        (classifier(), tokenizer(template=None), "no chat template"),
    ):
        with refused(f"has {lacks}", "expected a hub id or a folder of a sequence classifier"):
            load_reward_model(saved(model, tmp_path / lacks[:4], reads))
    with refused("cannot be loaded", "expected a hub id or a folder of a sequence classifier"):
        load_reward_model(tmp_path / "none")
    broken = RewardModel(classifier(), tokenizer(), "hash")
    broken.model.score.weight.data.fill_(math.nan)
    with refused("a score that is no number"):
        scores(broken, ["w1"], ["w2"], 1)


# --- a study -------------------------------------------------------------------------------------

DOMAIN, METHODS = "helpfulness", ("dpo", "allo")
PROFILE = """
name: instructed
model: {{name: {folder}/model, dtype: float32}}
search: {{candidates: 1}}
stability: []
compute: {{threads: 1, generation_batch: 8}}
domains:
  helpfulness:
    kind: preferences
    datasets: [hh_helpful]
    pairs: {{mask: 16, train: 48, dev: 12, heldout: 12}}
    rewriter: {{examples: 8, batch_size: 4}}
    rates: {{dense: 4.0e-3, top: 8.0e-3, forgetting: 2.0e-3, learning: 4.0e-3}}
    max_length: 64
    batch_size: 8
    instructions: {{datasets: [alpaca_eval, arena_hard], count: 20, max_new_tokens: 24}}
methods: [dpo, allo]
"""


def open_instructed(folder: Path, **overrides) -> Study:
    """The study in `folder`; a double underscore stands for the dot of a key."""
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    study = Study.open(str(folder / "instructed.yaml"), 0, str(folder / "out"), overrides)
    study.data_dir = str(folder / "data")
    return study


def judged(folder, **settings):
    given = {"judge__kind": "reward_model", "judge__model": str(folder / "longer")}
    return open_instructed(folder, **(given | settings))


def results_of(study: Study) -> dict[str, dict]:
    return {method: training.result(study, DOMAIN, method) for method in METHODS}


@torch.no_grad()
def length_judge(folder: Path) -> None:
    """A reward model that likes a reply of more words better.

    Attention is uniform and sees the word `user`, with which every chat begins, alone: what comes
    out at the last token is 1 / (tokens), of which the score is the negative.
    """
    model = classifier(context=512, layers=1)
    tokens = model.model.embed_tokens.weight
    tokens.zero_()
    tokens[:, 1] = 1.0
    tokens[3] = 0.0
    tokens[3, 0] = 1.0
    (layer,) = model.model.layers
    attention = layer.self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.down_proj):
        part.weight.zero_()
    attention.v_proj.weight[0, 0] = 1.0
    attention.o_proj.weight.copy_(torch.eye(16))
    model.score.weight.zero_()
    model.score.weight[0, 0] = -1.0
    saved(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a study whose methods are trained and have replied."""
    folder = tmp_path_factory.mktemp("instructed")
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    for name, extra in (("alpaca_eval", "subset"), ("arena_hard", "cluster")):
        rows = [
            {"id": f"{name}-{i}", "question": f"tell {'me ' * (i % 5)}{i} of {THINGS[i % 4]}",
             extra: f"kind {i % 3}", "outputs": {"some-model": "surely"}}
            for i in range(15)
        ]  # fmt: skip
        rows[3]["question"] = rows[2]["question"]  # AlpacaEval could not tell them apart
        rows[4]["question"] = "too long " * 200
        path = folder / "data" / name / "test.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructed.yaml").write_text(PROFILE.format(folder=folder))
    results_of(open_instructed(folder))
    length_judge(folder / "longer")
    return folder


@pytest.fixture(scope="module")
def study(folder):
    return open_instructed(folder)


def by_metric(rows, metric):
    return {(row.method, row.dataset): row for row in rows if row.metric == metric}


def test_without_instructions_results_are_known_as_before(tmp_path, monkeypatch):
    """By the key of `training._method_inputs` of allo and dpo, with nothing made or loaded."""
    monkeypatch.setattr(Study, "pairs", lambda self, name: SimpleNamespace(key="pairs"))
    monkeypatch.setattr(Study, "_data_hash", lambda self, name: "data")
    monkeypatch.setattr(Study, "dtype", "float32")
    study = Study(load_profile("tiny-full", device="cpu"), 0, tmp_path)
    inputs = [training._method_inputs(study, "miniature", method) for method in ("allo", "dpo")]
    key = "3cc8f2c685d2602117e389551e80fc9935dca460029b8ec7720865f3692985eb"
    assert fingerprint(inputs) == key


def test_results_hang_on_the_instructions_but_not_on_the_judge(folder, study):
    inputs = training._method_inputs(study, DOMAIN, "dpo")
    settings = {"datasets": ["alpaca_eval", "arena_hard"], "count": 20, "max_new_tokens": 24}
    data = inputs["instructions"]["data"]
    assert inputs["instructions"] == settings | {"data": data} and len(data) == 2
    assert training._method_inputs(judged(folder), DOMAIN, "dpo") == inputs
    noted = manifest.collect(study.store.folder, manifest.DATA)[f"{DOMAIN}.instructions"]
    counts = {name: one["rows"] for name, one in noted.items()}
    assert counts == {"alpaca_eval/test": 15, "arena_hard/test": 15}


def test_every_seed_gets_the_same_instructions_and_none_that_cannot_be_read(folder, study):
    chosen = scoring.chosen(study, DOMAIN)
    for name, rows in chosen.items():
        ids = [row["id"] for row in rows]
        assert len({row["question"] for row in rows}) == 10 and f"{name}-4" not in ids
        assert not {f"{name}-2", f"{name}-3"} <= set(ids)
        assert ids != sorted(ids)
        for row in rows:
            prompt = scoring.prompt_of(study.tokenizer, row["question"])
            assert len(encode_prompt(study.tokenizer, prompt)) + 24 <= study.context
    other = Study(study.profile, 5, folder / "other", study.data_dir)
    assert scoring.chosen(other, DOMAIN) == chosen
    more = open_instructed(folder, **{f"domains__{DOMAIN}__instructions__count": 30})
    with refused("15 instructions of alpaca_eval are asked for, but the model can read 13"):
        scoring.chosen(more, DOMAIN)


def test_a_result_keeps_the_replies_of_its_weights_and_they_are_written(study):
    found, chosen = results_of(study), scoring.chosen(study, DOMAIN)
    order = [[row["id"], name] for name, rows in chosen.items() for row in rows]
    for method in METHODS:
        kept = found[method]["instructions"]
        assert [row[:2] for row in kept] == order
        model, _ = training.trained_model(study, DOMAIN, method)
        assert scoring.reply(study, DOMAIN, model) == kept  # no draft: the same
    judges.reply_rows(study, DOMAIN, found)
    outputs = json.loads((judges.folder_of(study, DOMAIN) / "alpaca_eval/dpo.json").read_text())
    texts = {row[0]: row[2].strip() for row in found["dpo"]["instructions"]}
    assert [(row["instruction"], row["output"]) for row in outputs] == [
        (row["question"], texts[row["id"]]) for row in chosen["alpaca_eval"]
    ]


def test_a_judge_of_length_gives_the_win_rates_of_word_counts(folder, study):
    theirs = study.replies(DOMAIN)
    changed = [f"{row[2].strip()}{(' tea', '', ' no tea')[i % 3]}" for i, row in enumerate(theirs)]
    longer = [[*row[:2], text, 1] for row, text in zip(theirs, changed, strict=True)]
    shorter = [[*row[:2], "", i % 2] for i, row in enumerate(theirs)]
    found = {"dpo": {"instructions": longer}, "allo": {"instructions": shorter}}
    without = judges.reply_rows(study, DOMAIN, found)
    assert {row.metric for row in without} == {"response_characters", "response_cut"}
    rows = judges.reply_rows(judged(folder), DOMAIN, found)
    assert set(without) < set(rows)
    won, lengths, cut = (
        by_metric(rows, key) for key in ("win_rate", "response_characters", "response_cut")
    )
    for dataset, first in (("alpaca_eval", 0), ("arena_hard", 10)):
        texts = [len(text) for text in changed[first : first + 10]]
        assert lengths["dpo", dataset].value == pytest.approx(statistics.fmean(texts))
        assert lengths["dpo", dataset].stderr == pytest.approx(statistics.pstdev(texts) / 10**0.5)
        assert cut["allo", dataset].value == 0.5 and cut["allo", dataset].n == 10
        rights = [0.5 if i % 3 == 1 else 1.0 for i in range(first, first + 10)]
        expected = (statistics.fmean(rights), statistics.pstdev(rights) / 10**0.5, 10)
        ties = [0.0 if row[2].strip() else 0.5 for row in theirs[first : first + 10]]
        for method, values in (
            ("dpo", expected), ("sft_base", (0.5, 0.0, 10)), ("allo", (statistics.fmean(ties),)),
        ):  # fmt: skip
            one = won[method, dataset]
            assert (one.value, one.stderr, one.n)[: len(values)] == pytest.approx(values)


def test_verdicts_of_the_benchmarks_programs_are_read_beside_the_replies(folder):
    study = open_instructed(folder, judge__kind="programs")
    found, place = results_of(study), judges.folder_of(study, DOMAIN)
    with refused("0 files", "alpaca_eval/dpo", "as docs/run.md says"):
        judges.reply_rows(study, DOMAIN, found)
    asked = scoring.chosen(study, DOMAIN)
    for method in METHODS:
        path = place / "alpaca_eval" / method / "gpt4" / "annotations.json"
        path.parent.mkdir(parents=True)
        said = [{"instruction": r["question"], "preference": 1.8} for r in asked["alpaca_eval"]]
        path.write_text(json.dumps(said))
        path = place / "arena_hard" / "model_judgment" / "gpt-4-1106" / f"{method}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        games = [{"score": "B>>A"}, {"score": "A=B"}]
        lines = [json.dumps({"uid": r["id"], "games": games}) for r in asked["arena_hard"]]
        path.write_text("\n".join(lines))
    rows, by_dataset = (make(study, DOMAIN, found) for make in (judges.reply_rows, judges.replies))
    won = by_metric(rows, "win_rate")
    for dataset, wins, weight in (("alpaca_eval", 0.8, 1), ("arena_hard", 3.5, 4)):
        texts = {m: [r[2].strip() for r in one] for m, one in by_dataset[dataset].items()}
        same = sum(a == b for a, b in zip(texts["dpo"], texts["sft_base"], strict=True))
        ties = same * (1 if weight == 1 else 2)
        expected = ((10 - same) * wins + ties / 2) / ((10 - same) * weight + ties)
        assert won["dpo", dataset].value == pytest.approx(expected)
    who = {row.metric for row in rows if row.metric.startswith(comparisons.JUDGED_BY)}
    assert who == {"judged_by:alpaca_eval:gpt4", "judged_by:arena_hard:gpt-4-1106"}
    (place / "alpaca_eval/allo/gpt4").rename(place / "alpaca_eval/allo/claude")
    with refused("holds verdicts of ['claude', 'gpt4']; have one judge all"):
        judges.reply_rows(study, DOMAIN, found)


def test_a_judge_named_later_judges_what_was_written_and_is_asked_once(folder, monkeypatch):
    def measured(study):
        """All rows and the table of win rates, as 06 makes them."""
        rows = results.update(study, [0])
        found = comparisons.StudyResults.load(folder / "out", 1)
        return rows, tables.main_table(found, comparisons.INSTRUCTIONS)

    def never(*_, **__):
        raise AssertionError("asked for again")

    first, table = measured(open_instructed(folder))
    assert "no judge was named" in table.caption
    for name in ("_make_result", "_make_candidate"):
        monkeypatch.setattr(training, name, never)
    monkeypatch.setattr(scoring, "generate", never)
    assert judged(folder).profile.hash() == open_instructed(folder).profile.hash()
    longer, table = measured(judged(folder))
    sha = load_reward_model(folder / "longer").sha256
    assert f"Judge: reward model `longer` (weights {sha[:8]})." in table.caption
    assert set(first) < set(longer)
    monkeypatch.setattr(judges, "load_reward_model", never)
    assert measured(judged(folder))[0] == longer


def test_a_study_without_instructions_has_no_rows_and_no_files(tmp_path):
    study = open_study(tmp_path)
    assert judges.reply_rows(study, "miniature", {}) == []
    assert scoring.instruction_inputs(study, "miniature") == {}
    assert not (tmp_path / "instructions").exists()
