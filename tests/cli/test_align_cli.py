"""`python -m allo_lib`: what it reads, what it says, and what the held-out pairs tell."""

import csv
import gzip
import json

import datasets
import pytest
import torch
from refusals import assert_one_line, refused
from tiny_models import tiny_llama, words
from transformers import AutoModelForCausalLM, AutoTokenizer

from allo_lib import delta, select_neurons
from allo_lib.cli import align_cli
from allo_lib.study import footprint

PAIRS = [{"prompt": f"w{i} w2", "chosen": "w3 w4", "rejected": f"w{5 + i} w4"} for i in range(20)]
FAST = ["batch_size=4", "estimator=gradient", "rewriter_neurons=kept", "forgetting_rate=1e-3",
        "learning_rate=2e-2", "epochs=2"]  # fmt: skip


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = align_cli.main([str(one) for one in arguments])
    return status, *capsys.readouterr()


def test_every_kind_of_file_gives_the_same_pairs(tmp_path, pairs):
    text = pairs.read_text()
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "p.json").write_text(json.dumps(PAIRS))
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8-sig") as file:  # as Excel does
        writer = csv.DictWriter(file, PAIRS[0])
        writer.writeheader()
        writer.writerows(PAIRS)
    table = datasets.Dataset.from_list(PAIRS)
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(tmp_path / "two")
    for name in ("pairs.jsonl", "p.jsonl.gz", "p.json", "p.csv", "p.parquet", "disk", "two"):
        assert align_cli.read(str(tmp_path / name)) == PAIRS, name
    assert align_cli.read(f"{tmp_path / 'two'}:test") == [PAIRS[3]]
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PAIRS]
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "p.parquet")
    assert align_cli.read(str(tmp_path / "p.parquet")) == chats


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "No such file"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "p.jsonl, line 2: cannot be read"),
        ("p.json", b"[1, 2", "cannot be read"),
        ("p.parquet", b"PAR1", "cannot be read"),
        ("p.jsonl", b"\xff\xfe", "not UTF-8"),
        ("disk", b"a file", "cannot be read"),
    ],
)
def test_pairs_that_cannot_be_read_are_told_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(message):
        align_cli.read(str(tmp_path / name))


OF_ALIGN = ["align", "--model", "M", "--pairs", "P", "--out", "O"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command, align or merge"),
        (["learn"], "expected a command"),
        (["align", "--model", "m"], "required: --pairs, --out"),
        ([*OF_ALIGN, "rate"], "expected key=value"),
        ([*OF_ALIGN, "rate=1"], "unknown key 'rate'"),
        ([*OF_ALIGN, "batch_size=6", "accumulation=4"], "6 is no multiple of accumulation 4"),
        ([*OF_ALIGN, "held_out=1"], "held_out: got 1"),
        ([*OF_ALIGN, "--stages", "x"], "stages ['x']"),
        ([*OF_ALIGN, "--dtype", "int4"], "--dtype"),
        ([*OF_ALIGN, "--out", "M"], "is the model's own folder; name another"),
        ([*OF_ALIGN, "--model", "GONE"], "cannot be loaded"),
        ([*OF_ALIGN, "--model", "GONE", "--dry-run"], "cannot be loaded"),
        ([*OF_ALIGN, "held_out=0.9", "search=2", "development=0.9"], "none of the 20 pairs"),
        (["merge", "--base", "M", "--delta", "GONE", "--out", "O"], "is no sound delta"),
    ],
)
def test_a_bad_command_is_one_line(arguments, message, base, pairs, tmp_path, capsys):
    names = {"M": base, "P": pairs, "O": tmp_path / "out", "GONE": tmp_path / "gone"}
    status, out, told = run(capsys, *(names.get(one, one) for one in arguments))
    assert status == align_cli.BAD_INPUT and out == "" and message in told, told
    assert_one_line(told[told.index("allo_lib: ") :].removesuffix("\n"))  # behind bars of loading
    assert not (tmp_path / "out").exists()


def logps(model, tokenizer, row) -> float:
    """Sums of chosen minus rejected log-probs, by the plain model."""
    sums = []
    for side in ("chosen", "rejected"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(float(every[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
    return sums[0] - sums[1]


def test_align_searches_ranks_and_is_merged_again(base, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["align", "--model", base, "--pairs", pairs, "--out", out, "--dtype", "float32"]
    status, told, error = run(capsys, *command, *FAST, "held_out=0.3", "search=3",
                              "development=0.3")  # fmt: skip
    assert status == 0, error
    record = json.loads((out / "align.json").read_text())
    held_out, development = (record["left_out"][key] for key in ("held_out", "development"))
    assert len(held_out) == 6 and len(development) == 5 and not set(held_out) & set(development)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out))
    starts, ends = ([logps(m, tokenizer, PAIRS[i]) for i in held_out] for m in (before, after))
    rewards = [b - a for a, b in zip(starts, ends, strict=True)]
    found = record["held_out"]
    assert found["pairs"] == 6 and f"on 6 held-out pairs: {50:.1f}% before" in told
    assert found["reward_margin"] == pytest.approx(0.1 * sum(rewards) / 6, abs=1e-5)
    assert found["reward_accuracy"]["before"] == 0.5
    assert found["reward_accuracy"]["after"] == pytest.approx(sum(r > 0 for r in rewards) / 6)
    change = found["reward_accuracy"]
    rough = (6 * change["after"] + 2) / 10  # two pairs more on each side
    half = 1.96 * (rough * (1 - rough) / 10) ** 0.5
    assert change["change"] == change["after"] - 0.5
    assert change["high"] == pytest.approx(min(0.5, rough - 0.5 + half), rel=1e-4)
    assert change["low"] == pytest.approx(max(-0.5, rough - 0.5 - half), rel=1e-4)
    assert record["share"] == pytest.approx(0.1, abs=1e-3)
    # Of three candidates, a factor of two apart, the best one's weights are kept.
    tried = record["search"]
    assert [one["learning_rate"] for one in tried] == [2e-2, 1e-2, 4e-2]
    assert [one["forgetting_rate"] for one in tried] == [1e-3, 5e-4, 2e-3]
    its = [logps(after, tokenizer, PAIRS[i]) - logps(before, tokenizer, PAIRS[i])
           for i in development]  # fmt: skip
    assert sum(x > 0 for x in its) / 5 == max(one["accuracy"] for one in tried)
    # Trained at its rates alone, on the same pairs, it is the same: each candidate begins anew.
    best = max(tried, key=lambda one: (one["accuracy"], -one["learning_rate"]))
    left = [row for i, row in enumerate(PAIRS) if i not in (*held_out, *development)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in left))
    rates = [f"{key}={best[key]}" for key in ("forgetting_rate", "learning_rate")]
    command[command.index(out)] = tmp_path / "alone"
    assert run(capsys, *command, *FAST, *rates)[0] == 0
    alone = tmp_path / "alone" / "model.safetensors"
    assert alone.read_bytes() == (out / "model.safetensors").read_bytes()
    status, _, error = run(
        capsys, "merge", "--base", base, "--delta", out / delta.NAME, "--out", tmp_path / "merged"
    )
    assert status == 0, error
    merged = tmp_path / "merged" / "model.safetensors"
    assert merged.read_bytes() == (out / "model.safetensors").read_bytes()


def test_gradient_checkpointing_and_accumulation_give_the_same_model(base, pairs, tmp_path, capsys):
    command = ["align", "--model", base, "--pairs", pairs, "--dtype", "float32", *FAST,
               "--stages", "importance,learning", "estimator=delta"]  # fmt: skip
    ways = {"plain": [], "less": ["gradient_checkpointing=true", "accumulation=2"]}
    for name, settings in ways.items():
        status, _, error = run(capsys, *command, "--out", tmp_path / name, *settings)
        assert status == 0, error
    plain, less = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ways)
    for (name, one), other in zip(plain.named_parameters(), less.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5), name
    log = json.loads((tmp_path / "less" / "align.json").read_text())["loss"]["learning"]
    assert len(log) == 2 * 10  # passes of two pairs each


def test_a_dry_run_needs_no_weights_and_writes_nothing(base, pairs, tmp_path, capsys):
    (base / "model.safetensors").unlink()
    rows = [*PAIRS, {"prompt": "w1 " * 80, "chosen": "w3", "rejected": "w4"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["align", "--model", base, "--pairs", pairs, "--out", tmp_path / "out", "--dry-run",
               "--flops", "1e6", "--dtype", "float32", "held_out=0.25", "max_length=40",
               "batch_size=8"]  # fmt: skip
    status, told, error = run(capsys, *command, "--device-gb", "0.0002")
    assert status == 0, error
    assert "15 of 21 pairs are trained on" in told and "\x1b" not in told
    assert "1 of 21 pairs are longer than 40 tokens and dropped: numbers 20 (" in told
    first = int(told.partition("first pair (number ")[2].partition(")")[0])
    shown = f"  prompt w{first}|w2\n  chosen w3|w4\n     end <eos>\nrejected w{5 + first}|w4\n"
    assert shown in told
    assert "GB on each device, which has 0.0, and hours at 1e+06 FLOP/s each" in told
    of_devices = told.splitlines()[-4:-1]
    assert [line.partition(":")[0] for line in of_devices] == ["1 device", "2 devices", "8 devices"]
    hours = [float(line.split("; ")[1].removesuffix(" h")) for line in of_devices]
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.01)
    assert hours[0] == pytest.approx(8 * hours[2], rel=0.01)
    passes = told.partition("TFLOP\n")[2].partition("\n\n")[0].splitlines()
    operations = [float(line.split()[-1]) for line in passes]
    assert hours[0] == pytest.approx(sum(operations) * 1e12 / 1e6 / 3600, rel=0.01)
    advice = "to fit on one: it fits with estimator=gradient rewriter_neurons=kept"
    assert told.splitlines()[-1] == advice, told
    _, told, _ = run(capsys, *command, "--device-gb", "1e-6")
    assert told.count("DOES NOT FIT") == 3 and "to fit on one: more devices, a sm" in told
    _, told, _ = run(capsys, *command, "--device-gb", "1")
    assert "DOES NOT FIT" not in told and "to fit" not in told
    assert not (tmp_path / "out").exists()


def test_a_plan_without_importance_counts_the_saved_mask_or_all_neurons(
    base, pairs, tmp_path, capsys, monkeypatch
):
    model, out, shares = AutoModelForCausalLM.from_pretrained(base), tmp_path / "out", []

    def memory(config, shape, train, settings, *more):
        shares.append(settings.share)
        return {"learning": 1.0}

    monkeypatch.setattr(footprint, "memory", memory)
    scores = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    for kept in (None, 0.3):
        if kept:
            out.mkdir()
            select_neurons(scores, kept).save(out / "mask.safetensors")
        status, _, error = run(capsys, "align", "--model", base, "--pairs", pairs, "--out", out,
                               "--dry-run", "--stages", "learning", "share=0.05")  # fmt: skip
        assert status == 0, error
        assert shares == pytest.approx([kept or 1.0] * len(shares), abs=1e-3) and shares
        shares.clear()


def test_the_first_pair_is_shown_as_it_is_read():
    tokenizer, row = words(), {"prompt": [4, 5], "chosen": [6, 1], "rejected": [7, 8, 1]}
    plain = align_cli.shown_pair(tokenizer, row, colour=False)
    coloured = align_cli.shown_pair(tokenizer, row, colour=True)
    assert len({line[:5] for line in coloured}) == 4 and all("\x1b[0m" in x for x in coloured)
    assert plain[0] == "  prompt w1|w2" and plain[0] in coloured[0]
    long = align_cli.shown_pair(tokenizer, row | {"prompt": [3] + [4] * 98 + [5]}, False)[0]
    parts = ["w0"] + ["w1"] * 39 + ["... 20 more ..."] + ["w1"] * 39 + ["w2"]
    assert long == f"  prompt {'|'.join(parts)}"

    class Hostile:
        def decode(self, ids):
            return "\x1b[2J\n"

    assert "\x1b" not in "".join(align_cli.shown_pair(Hostile(), row, colour=False))
