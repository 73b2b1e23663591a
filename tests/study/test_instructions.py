"""Replies to instructions in a study: which, how they are kept and written, and who wins."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from real_like import THINGS, write_data, write_model
from refusals import refused, tree
from test_judges import classifier, saved
from tiny_study import open_study
from transformers import AutoModelForCausalLM, AutoTokenizer

from allo_lib.engine import provenance
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.evaluation import comparisons, outcomes
from allo_lib.profiles.config import fingerprint
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import tables
from allo_lib.study import judges, results, scoring, training
from allo_lib.study.study import Study
from tests import synthetic_results

DOMAIN = "helpfulness"
METHODS = ("dpo", "allo")
ROWS = (scoring.REFERENCE, *METHODS)
INSTRUCTIONS = comparisons.INSTRUCTIONS
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


# Replies of the starting model: some longer and some shorter than what the pairs prefer.
KNOWN = ("no tea", "surely milk is good to have", "no", "surely snow is good to have to have")


def write_all(folder: Path) -> None:
    """Data, model and profile; the instructions have the fields of the real files."""
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    teach(folder / "model")
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


def teach(folder: Path) -> None:
    """Train the model in `folder` to give the reply of KNOWN that belongs to the thing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        thing = step % len(THINGS)
        asked = [{"role": "user", "content": f"tell 0 of {THINGS[thing]}"}]
        prompt = encode_prompt(tokenizer, asked)
        ids = torch.tensor([prompt + encode_response(tokenizer, KNOWN[thing])])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def open_instructed(folder: Path, **judge) -> Study:
    """The study in `folder`, with a judge's settings if they are given."""
    overrides = {f"judge.{key}": value for key, value in judge.items()}
    study = Study.open(str(folder / "instructed.yaml"), 0, str(folder / "out"), overrides)
    study.data_dir = str(folder / "data")
    return study


def results_of(study: Study) -> dict[str, dict]:
    return {method: training.result(study, DOMAIN, method) for method in METHODS}


@torch.no_grad()
def length_judge(folder: Path, sign: int = 1) -> Path:
    """A reward model that likes a reply of more words better (or, with sign -1, of fewer).

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
    model.score.weight[0, 0] = -1.0 * sign
    return saved(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a study whose methods are trained and have replied."""
    folder = tmp_path_factory.mktemp("instructed")
    write_all(folder)
    results_of(open_instructed(folder))
    length_judge(folder / "longer")
    length_judge(folder / "shorter", sign=-1)
    return folder


@pytest.fixture(scope="module")
def study(folder):
    return open_instructed(folder)


def judged(folder, name, **settings):
    return open_instructed(folder, kind="reward_model", model=str(folder / name), **settings)


def rows_of(study):
    return judges.reply_rows(study, DOMAIN, results_of(study))


def by_metric(rows, metric):
    return {(row.method, row.dataset): row for row in rows if row.metric == metric}


def never(*_, **__):
    raise AssertionError("asked for again")


# --- keys and hashes -----------------------------------------------------------------------------

# Of `training._method_inputs` of allo and dpo, in which nothing is of instructions.
KEY_OF_TINY = "db2205c5171045e73042d71ce2226e56810266fe96d6760708ce717242b321d7"


def inputs_of(profile, name, folder, monkeypatch):
    """What the results of allo and dpo are known by, with nothing made or loaded."""
    monkeypatch.setattr(Study, "pairs", lambda self, name: SimpleNamespace(key="pairs"))
    monkeypatch.setattr(Study, "_data_hash", lambda self, name: "data")
    monkeypatch.setattr(Study, "dtype", "float32" if profile == "tiny" else "bfloat16")
    asked = Study(load_profile(profile, device="cpu"), 0, folder)
    return [training._method_inputs(asked, name, method) for method in ("allo", "dpo")]


def test_without_instructions_results_are_known_as_before(tmp_path, monkeypatch):
    assert fingerprint(inputs_of("tiny", "miniature", tmp_path, monkeypatch)) == KEY_OF_TINY


def test_results_hang_on_the_instructions_but_candidates_and_the_judge_do_not(folder, study):
    inputs = training._method_inputs(study, DOMAIN, "dpo")
    data = inputs["instructions"].pop("data")
    assert inputs["instructions"] == {
        "datasets": ["alpaca_eval", "arena_hard"], "count": 20, "max_new_tokens": 24,
    }  # fmt: skip
    assert {len(digest) for digest in data.values()} == {64} and len(data) == 2
    inputs["instructions"]["data"] = data
    stages = training.stages_of("dpo", study.profile)
    assert "instructions" not in training._stage_inputs(study, DOMAIN, stages)
    assert training._method_inputs(judged(folder, "longer"), DOMAIN, "dpo") == inputs
    noted = provenance.collect(study.store.folder, provenance.DATA)[f"{DOMAIN}.instructions"]
    counts = {name: one["rows"] for name, one in noted.items()}
    assert counts == {"alpaca_eval/test": 15, "arena_hard/test": 15}


# --- which and what ------------------------------------------------------------------------------


def test_every_seed_gets_the_same_instructions_and_none_that_cannot_be_read(folder, study):
    chosen = scoring.chosen(study, DOMAIN)
    assert {name: len(rows) for name, rows in chosen.items()} == {
        "alpaca_eval": 10, "arena_hard": 10,
    }  # fmt: skip
    for name, rows in chosen.items():
        ids = [row["id"] for row in rows]
        assert len({row["question"] for row in rows}) == 10 and f"{name}-4" not in ids
        assert not {f"{name}-2", f"{name}-3"} <= set(ids)
        assert ids != sorted(ids)
        for row in rows:
            prompt = scoring.prompt_of(study.tokenizer, row["question"])
            assert prompt == [{"role": "user", "content": row["question"]}]
            assert len(encode_prompt(study.tokenizer, prompt)) + 24 <= study.context
    other = Study(study.profile, 5, folder / "other", study.data_dir)
    assert scoring.chosen(other, DOMAIN) == chosen


@pytest.mark.parametrize("count, told", [
    (30, ["15 instructions of alpaca_eval are asked for, but the model can read 13"]),
    (100, ["alpaca_eval/test has 15 rows", "lower the counts of the profile"]),
])  # fmt: skip
def test_more_than_there_are_is_refused(folder, count, told):
    changes = {f"domains.{DOMAIN}.instructions.count": count}
    more = Study.open(str(folder / "instructed.yaml"), 0, str(folder / "more"), changes)
    more.data_dir = str(folder / "data")
    with refused(*told):
        scoring.chosen(more, DOMAIN)


def test_a_result_keeps_its_replies_which_are_those_of_its_weights(study):
    found = results_of(study)
    asked = scoring.chosen(study, DOMAIN)
    order = [[row["id"], name] for name, rows in asked.items() for row in rows]
    for method in METHODS:
        kept = found[method]["instructions"]
        assert [row[:2] for row in kept] == order
        model, _ = training.trained_model(study, DOMAIN, method)
        assert scoring.reply(study, DOMAIN, model) == kept  # no draft: the same
    assert found["dpo"]["instructions"] != study.replies(DOMAIN)


def test_prompts_without_a_chat_template(study):
    prompt = scoring.prompt_of(SimpleNamespace(chat_template=None), "Why?")
    assert prompt == "\n\nHuman: Why?\n\nAssistant:"


# --- files ---------------------------------------------------------------------------------------


def test_outputs_are_written_in_the_benchmarks_own_formats(folder, study):
    found = results_of(study)
    paths = judges.write_replies(study, DOMAIN, found)
    place = study.results_dir / "instructions" / "seed0" / DOMAIN
    assert {path.relative_to(place).as_posix() for path in paths} == {
        "arena_hard/question.jsonl",
        *(f"alpaca_eval/{method}.json" for method in ROWS),
        *(f"arena_hard/model_answer/{method}.jsonl" for method in (*ROWS, "gpt-4-0314")),
    }
    asked = scoring.chosen(study, DOMAIN)["alpaca_eval"]
    texts = {row[0]: row[2].strip() for row in found["dpo"]["instructions"]}
    outputs = json.loads((place / "alpaca_eval" / "dpo.json").read_text())
    assert [(row["instruction"], row["output"]) for row in outputs] == [
        (row["question"], texts[row["id"]]) for row in asked
    ]
    before = tree(place)
    judges.write_replies(open_instructed(folder), DOMAIN, found)
    assert tree(place) == before


def results_with(rows):
    """The results of a study of which these are the only measurements, without outcomes."""
    return comparisons.StudyResults(pd.DataFrame(columns=outcomes.COLUMNS), rows)


# --- rows ----------------------------------------------------------------------------------------


def test_without_a_judge_there_are_lengths_alone(study):
    rows = rows_of(study)
    assert {row.metric for row in rows} == {"response_characters", "response_cut"}
    assert len(rows) == 2 * 2 * len(ROWS)
    replies = [row for row in study.replies(DOMAIN) if row[1] == "arena_hard"]
    length = by_metric(rows, "response_characters")["sft_base", "arena_hard"]
    lengths = [len(row[2].strip()) for row in replies]
    assert length.value == statistics.fmean(lengths)
    assert length.stderr == pytest.approx(statistics.pstdev(lengths) / 10**0.5)
    cut = by_metric(rows, "response_cut")["sft_base", "arena_hard"]
    assert cut.value == sum(not row[3] for row in replies) / 10 and cut.n == 10


@pytest.mark.parametrize("name, sign", [("longer", 1), ("shorter", -1)])
def test_a_judge_of_length_gives_the_win_rates_of_word_counts(folder, name, sign):
    study = judged(folder, name)
    rows, found = rows_of(study), results_of(study)
    won = by_metric(rows, "win_rate")
    assert len(won) == 2 * len(ROWS)
    rights = {}
    for dataset in ("alpaca_eval", "arena_hard"):
        sides = {m: [r for r in found[m]["instructions"] if r[1] == dataset] for m in METHODS}
        theirs = [r for r in study.replies(DOMAIN) if r[1] == dataset]
        for method, ours in sides.items():
            gaps = [
                sign * (len(a[2].split()) - len(b[2].split()))
                for a, b in zip(ours, theirs, strict=True)
            ]
            rights[method, dataset] = [(gap > 0) + 0.5 * (gap == 0) for gap in gaps]
            row = won[method, dataset]
            assert row.value == pytest.approx(statistics.fmean(rights[method, dataset]))
            assert row.n == 10
            error = statistics.pstdev(rights[method, dataset]) / 10**0.5
            assert row.stderr == pytest.approx(error)
        same = won["sft_base", dataset]
        assert (same.value, same.stderr, same.n) == (0.5, 0.0, 10)
    assert {0.5, (1 + sign) / 2} == {one for each in rights.values() for one in each}
    assert len({tuple(each) for each in rights.values()}) > 2  # methods do differ


def test_tables_name_the_judge_and_compare_win_rates(folder, tmp_path):
    study = judged(folder, "longer")
    rows = rows_of(study)
    outcomes.write_measurements(
        tmp_path / "measurements.csv", rows
    )  # names are valid, none is twice
    assert outcomes.read_measurements(tmp_path / "measurements.csv")
    found = results_with(rows)
    (domain,) = found.domains
    assert domain == INSTRUCTIONS
    table = tables.main_table(found, domain)
    sha = judges.load_reward_model(folder / "longer").sha256
    assert f"Judge: reward model `longer` (weights {sha[:8]})." in table.caption
    assert table.body[0][0] == "SFT LLM"
    assert {cell.strip("*<>u/").split(" ")[0] for cell in table.body[0][1:4:2]} == {"50.0"}
    interval = found.compare("allo", "dpo", domain)
    values = by_metric(rows, "win_rate")
    expected = statistics.fmean(
        values["allo", name].value - values["dpo", name].value for name in domain.datasets
    )
    assert interval.effect == pytest.approx(expected)
    assert found.compare("allo", "sft_base", domain).effect == pytest.approx(
        statistics.fmean(values["allo", name].value for name in domain.datasets) - 0.5
    )
    assert "main_instructions" in {made.name for made in tables.build(found)}
    measured = [one for one in tables.compare_rows(found) if one.interval]
    assert {(one.baseline, one.dataset) for one in measured} == {
        (baseline, dataset) for baseline in ("sft_base", "dpo")
        for dataset in (*domain.datasets, "average")
    }  # fmt: skip


def test_verdicts_of_the_benchmarks_programs_are_read_beside_the_replies(folder):
    study = open_instructed(folder, kind="programs")
    judges.write_replies(study, DOMAIN, results_of(study))
    with refused("0 files", "alpaca_eval/dpo", "as docs/run.md says"):
        rows_of(study)
    asked, place = scoring.chosen(study, DOMAIN), judges.folder_of(study, DOMAIN)
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
    rows, by_dataset = rows_of(study), judges.replies(study, DOMAIN, results_of(study))
    won = by_metric(rows, "win_rate")
    for dataset, wins, weight in (("alpaca_eval", 0.8, 1), ("arena_hard", 3.5, 4)):
        texts = {m: [r[2].strip() for r in found] for m, found in by_dataset[dataset].items()}
        same = sum(a == b for a, b in zip(texts["dpo"], texts["sft_base"], strict=True))
        ties = same * (1 if weight == 1 else 2)
        expected = ((10 - same) * wins + ties / 2) / ((10 - same) * weight + ties)
        assert won["dpo", dataset].value == pytest.approx(expected) and expected > 0.5
    who = {row.metric for row in rows if row.metric.startswith(comparisons.JUDGED_BY)}
    assert who == {"judged_by:alpaca_eval:gpt4", "judged_by:arena_hard:gpt-4-1106"}
    told = comparisons.judged_by(comparisons.index_of(rows), INSTRUCTIONS)
    assert "Judge: several, and only what one of them judged compares: alpaca eval `gpt4` (" in told


def test_a_judge_named_later_judges_what_was_written_and_is_asked_once(folder, monkeypatch):
    out = folder / "out"

    def measured(study):
        """All rows and the table of win rates, as 06 makes them."""
        rows = results.update(study, [0])
        return rows, tables.main_table(comparisons.StudyResults.load(out, 1), INSTRUCTIONS)

    first, table = measured(open_instructed(folder))
    assert "no judge was named" in table.caption and len(table.body) == 12
    reasons = {(r["method"], r["dataset"]): r["reason"] for r in table.records}
    assert {reasons[method, "alpaca_eval"] for method in ROWS} == {"no judge was named"}
    assert reasons["npo", "alpaca_eval"] == "not among the methods of this run"
    files = {path.name for path in (out / "instructions" / "seed0" / DOMAIN).rglob("*.json")}
    assert files >= {f"{method}.json" for method in ROWS}
    monkeypatch.setattr(training, "_make_result", never)
    monkeypatch.setattr(training, "_make_candidate", never)
    monkeypatch.setattr(scoring, "generate", never)
    judge = judged(folder, "longer")
    assert judge.profile.hash() == open_instructed(folder).profile.hash()
    longer, table = measured(judge)
    assert "reward model `longer`" in table.caption and set(first) < set(longer)
    shorter, _ = measured(judged(folder, "shorter", dtype="bfloat16"))
    assert longer != shorter and set(first) < set(shorter)
    monkeypatch.setattr(judges, "load_reward_model", never)
    monkeypatch.setattr(judges, "scores", never)
    assert measured(judged(folder, "longer"))[0] == longer


def test_a_study_without_instructions_has_no_rows_and_no_files(tmp_path):
    study = open_study(tmp_path)
    assert judges.reply_rows(study, "miniature", {}) == []
    assert judges.write_replies(study, "miniature", {}) == []
    assert scoring.instruction_inputs(study, "miniature") == {}
    assert not (tmp_path / "instructions").exists()


def test_claims_of_training_keep_their_plain_ids():
    row = outcomes.Measurement(0, "allo", "arena_hard", "win_rate", 0.5, 0.1, 9)
    found = comparisons.StudyResults(synthetic_results.table((0,), (), domain="own"), [row])
    assert [domain.name for domain in found.domains] == ["own", "instructions"]
