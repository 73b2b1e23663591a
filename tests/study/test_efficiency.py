"""The cost of a step: what is compared does the same arithmetic on the same pairs, and sizes are
counted right."""

import csv
import importlib.util
import math
import mmap
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from refusals import refused
from test_trainer import pairs
from tiny_models import tiny_llama, weights_of
from tiny_study import DOMAIN, open_study
from transformers import LlamaConfig, LlamaForCausalLM

from allo_lib.data import miniature
from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.encoding import encode_pairs
from allo_lib.engine.forward import response_logps
from allo_lib.engine.models import micro_llama
from allo_lib.errors import AlloError
from allo_lib.method.losses import objective
from allo_lib.method.masked_adamw import DenseMaskedAdamW, MaskedAdamW
from allo_lib.method.neurons import select_neurons
from allo_lib.profiles.config import Timing
from allo_lib.profiles.profile_files import load_profile
from allo_lib.report import notebook
from allo_lib.report.notebook import percent
from allo_lib.study import efficiency, timed_steps
from allo_lib.study.timed_steps import PEERS, OwnSteps, TrlSteps


def mask_of(model, share: float):
    return select_neurons({name: p.detach().abs() for name, p in model.named_parameters()}, share)


def steps(model, optimizer, count: int = 4) -> dict[str, torch.Tensor]:
    loss, rows = objective("dpo", beta=0.1), pairs(tiny_llama())
    for number in range(count):
        batch = pair_batch(rows[2 * number : 2 * number + 2], Layout(0))
        loss(response_logps(model, batch), batch)[0].backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_dense_mask_and_the_masked_optimizer_train_the_same(share):
    """Else a comparison of their costs would compare different methods."""
    ours, theirs = tiny_llama(), tiny_llama()
    settings = dict(lr=1e-3)
    masked = steps(ours, MaskedAdamW(ours, mask_of(ours, share), **settings))
    dense = steps(theirs, DenseMaskedAdamW(theirs, mask_of(theirs, share), **settings))
    for name in masked:
        assert torch.allclose(masked[name], dense[name], atol=2e-6), name
    assert any(not torch.equal(masked[n], value) for n, value in weights_of(tiny_llama()).items())


@pytest.mark.parametrize(
    "dtype, per_entry", [(torch.float32, 2 + 8 + 4), (torch.bfloat16, 2 + 8 + 4 + 2)]
)
def test_bytes_of_the_dense_mask(dtype, per_entry):
    """bf16 mask, two float32 moments, the gradient, and masters where weights are bf16."""
    model = tiny_llama(dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = DenseMaskedAdamW(model, mask_of(model, 0.1), lr=1e-3)
    assert optimizer.state_bytes() == per_entry * count


def test_a_ratio_of_columns_and_the_file(tmp_path):
    row = dict.fromkeys(efficiency.COLUMNS, 2)
    rows = [row | {"variant": "dense", "seconds_per_pair": "0.5"}, row | {"variant": "allo_row"}]
    assert efficiency.ratio(rows, "allo_row", "dense", "seconds_per_pair") == 4
    rows[0]["seconds_per_pair"] = 0
    assert math.isnan(efficiency.ratio(rows, "allo_row", "dense", "seconds_per_pair"))
    efficiency.write(rows, tmp_path / "tables" / "efficiency.csv")
    with open(tmp_path / "tables" / "efficiency.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["variant"] for r in read] == ["dense", "allo_row"]
    assert tuple(read[0]) == efficiency.COLUMNS


# --- processes -----------------------------------------------------------------------------------


MEASURED = {
    "seconds": 2.0, "steps": 1, "pairs": 2, "tokens_per_step": 8, "peak": 3, "trained": 4,
    "state": 5.0, "flops_per_step": 6, "rate": 7.0, "device": "a device",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("work, argument, told", [
    (os._exit, 3, "a process that measures the cost of a step ended before its time"),
    (int, "two\nlines", "ValueError: invalid literal"),  # in one line
    (load_profile, "nothing.yaml", "no profile 'nothing.yaml'"),  # an AlloError as it is
])  # fmt: skip
def test_what_fails_in_a_process_of_its_own_is_said_in_one_line(work, argument, told):
    with refused(told):
        efficiency.in_own_process(work, argument)


def test_a_peer_that_fails_is_left_out_and_said(tiny_study, monkeypatch, capsys):
    def run(work, *arguments):
        if arguments[-1] == "trl_default":
            raise AlloError("no kernel for this")
        return MEASURED

    monkeypatch.setattr(efficiency, "in_own_process", run)
    wanted = ["trl_default", "peft", "dense"]
    monkeypatch.setattr(efficiency, "variants", lambda study: wanted)
    assert [row["variant"] for row in efficiency.measure(tiny_study)] == ["peft", "dense"]
    told = capsys.readouterr().out
    assert "trl_default is left out: no kernel for this\n" in told
    assert "dense, repeat 1: 1 s a pair, 4 values trained" in told
    # Of this project's own variants any failure ends the comparison.
    monkeypatch.setattr(timed_steps, "PEERS", ())
    with refused("no kernel for this"):
        efficiency.measure(tiny_study)


def test_a_peak_is_of_what_comes_after_its_reset():
    """Memory that was taken and given back before does not count."""
    block, page = 64 * 2**20, 4096

    def touch(size: int) -> mmap.mmap:
        memory = mmap.mmap(-1, size)
        memory[::page] = b"x" * (size // page)
        return memory

    base = efficiency.reset_peak("cpu")
    touch(4 * block).close()
    assert efficiency.peak("cpu") - base > 3 * block
    efficiency.reset_peak("cpu")
    touch(block).close()
    assert 0.9 * block < efficiency.peak("cpu") - base < 3 * block


@pytest.mark.parametrize("variant", ["dense", "dense_masked", "allo_scalar"])
def test_the_clock_and_the_peak_begin_after_the_warm_up(variant):
    model = tiny_llama()
    rows = pairs(model)[:2]
    own = OwnSteps(model, mask_of(model, 0.1), rows, variant, 0, beta=0.1, lr=1e-3)
    made, step = [], own.optimizer.step
    own.optimizer.step = lambda: made.append("step") or step()
    assert own.run(2, 3, lambda: made.append("begun")) > 0
    assert made == ["step"] * 2 + ["begun"] + ["step"] * 3


@pytest.mark.slow
def test_every_variant_is_measured(tiny_study):
    rows = efficiency.measure(tiny_study)
    assert [row["variant"] for row in rows] == list(efficiency.VARIANTS)
    state = {row["variant"]: float(row["state_bytes_per_parameter"]) for row in rows}
    assert state["allo_scalar"] == pytest.approx(2.0, rel=0.02)  # 20 bytes for a tenth
    assert state["allo_scalar"] < state["dense"] < state["dense_masked"]
    for row in rows:
        low, middle, high = (float(row[f"seconds_per_pair{end}"]) for end in ("_low", "", "_high"))
        each = [float(text) for text in row["seconds_per_pair_each"].split()]
        assert (min(each), max(each)) == (low, high)
        assert len(each) == tiny_study.profile.timing.repeats
        assert 0 < low <= middle <= high and float(row["tokens_per_second"]) > 0
        assert row["peak_bytes_above_model"] >= 0


# --- the pairs -----------------------------------------------------------------------------------


def words(count: int) -> str:
    return " ".join(["1"] * count)


@given(
    st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(1, 24),
    st.integers(1, 4),
)
def test_the_nearest_pairs_are_taken(lengths, prompt, responses, count):
    pairs = [
        {"prompt": words(p), "chosen": words(c), "rejected": words(r) + " 2"} for p, c, r in lengths
    ]
    timing = Timing(prompt=prompt, responses=responses, pairs=count)
    study = SimpleNamespace(
        profile=SimpleNamespace(timing=timing), tokenizer=miniature.tokenizer(), context=99
    )
    taken = efficiency.nearest(study, pairs, count)
    # An end token follows every response, and the rejected one has one word more.
    distance = [abs(p - prompt) + abs(c + r + 3 - responses) for p, c, r in lengths]
    assert len(taken) == min(count, len(pairs))
    found = [distance[next(i for i, p in enumerate(pairs) if p is one)] for one in taken]
    assert found == sorted(distance)[: len(taken)]


@pytest.mark.slow
def test_the_batch_is_the_training_pairs_with_their_reference(tiny_study):
    study, load = tiny_study, efficiency.workload(tiny_study)
    expected = study.encoded(DOMAIN, "train")[: study.domain(DOMAIN).batch_size]
    ids = [{key: row[key] for key in efficiency.PAIR} for row in load.rows]
    assert ids == [{key: row[key] for key in efficiency.PAIR} for row in expected]
    assert ids == encode_pairs(study.tokenizer, load.texts, study.context)
    for ours, theirs in zip(load.rows, expected, strict=True):
        assert ours["chosen_reference"] == pytest.approx(theirs["chosen_reference"], abs=1e-5)
    assert load.tokens == sum(len(row[key]) for row in load.rows for key in efficiency.PAIR)
    other = open_study(study.results_dir, timing__prompt=9, timing__pairs=2)  # another artifact
    assert len(efficiency.workload(other).texts) == 2
    assert efficiency.workload(study).texts == load.texts


def test_bad_timings_are_refused(tmp_path):
    with pytest.raises(AlloError, match="timing.domain: got 'nowhere', expected one of miniature"):
        open_study(tmp_path, timing__domain="nowhere")
    with pytest.raises(AlloError, match="greater than or equal to 1"):
        open_study(tmp_path, timing__steps=0)


# --- other projects ------------------------------------------------------------------------------


def steps_of(study, variant: str):
    load = efficiency.workload(study)
    model = study.load_sft("miniature").train()
    if variant in PEERS:
        return TrlSteps(model, study.tokenizer, load.texts, variant, beta=0.1, share=0.1, lr=1e-3)
    return OwnSteps(model, None, load.rows, variant, study.tokenizer.pad_token_id, beta=0.1, lr=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", PEERS)
def test_every_peer_trains_and_is_timed(tiny_study, variant):
    study = open_study(tiny_study.results_dir, timing__pairs=4)
    assert timed_steps.missing(variant) is None  # the tests' requirements hold both
    dense = steps_of(study, "dense")
    own = dense.count()
    dense.close()
    before = {name: p.detach().clone() for name, p in study.model.named_parameters()}
    steps = steps_of(study, variant)
    begun = []
    assert steps.run(1, 2, lambda: begun.append(steps.trainer.state.global_step)) > 0
    assert begun == [1]
    # Prompts read twice, a padded batch, and the whole head: more than this project's own step.
    # LoRA alone makes no gradient of whole weights.
    assert steps.flops > (own * 2 / 3 if variant == "peft" else own)
    after = dict(study.model.named_parameters())
    moved = any(n in after and not torch.equal(p, after[n]) for n, p in before.items())
    assert moved == (not variant.startswith("peft"))
    total = sum(p.numel() for p in before.values())
    # Two moments and the gradient, in float32; of an adapter its values, and indices if it has any.
    each = {"peft": 16, "peft_supertuning": 20}.get(variant, 12)
    assert steps.state_bytes() == each * steps.trained()
    assert steps.trained() == pytest.approx(0.1 * total if each > 12 else total, rel=0.2)
    # A second model, or none: each way of TRL's has its reference, before training or beside it.
    assert (steps.trainer.ref_model is not None) == (variant == "trl_default")
    assert steps.trainer.precompute_ref_logps == (variant != "trl_default")


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("variant", [v for v in PEERS if v.startswith("peft")])
def test_adapters_train_as_many_values_as_the_scalar_neurons(variant, share):
    """At the shape of SmolLM2-135M, within 1%."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    steps = TrlSteps(model, None, [], variant, beta=0.1, share=share, lr=1e-3)
    adapted = get_peft_model(model, steps._adapter())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == pytest.approx(round(share * total), rel=0.01)


def micro(layers: int):
    return micro_llama(
        len(miniature.tokenizer()), width=32, layers=layers, heads=2, feed_forward=64, context=64,
        initializer_range=0.05, seed=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def test_supertuning_trains_the_largest_entries_of_linear_layers():
    model = micro(1)
    weights = {name: p.detach().abs() for name, p in model.named_parameters()}
    steps = TrlSteps(model, None, [], "peft_supertuning", beta=0.1, share=0.1, lr=1e-3)
    get_peft_model(model, steps._adapter())
    found = {name: b.long() for name, b in model.named_buffers() if "supertuning_indices" in name}
    assert len(found) == 7
    for name, index in found.items():
        weight = weights[name.replace("supertuning_indices.default", "weight")].flatten()
        assert weight[index].min() >= weight.kthvalue(weight.numel() - len(index)).values


def test_the_rank_is_the_nearest_to_the_share():
    model = micro(2)
    rank = TrlSteps(model, None, [], "peft", beta=0.1, share=0.1, lr=1e-3).rank()
    # Four square projections of 32 and three of 32 x 64 a layer: A has rank * in, B rank * out.
    per_rank = 2 * (4 * (32 + 32) + 3 * (32 + 64))
    total = sum(p.numel() for p in model.parameters())
    assert min(range(1, 40), key=lambda r: abs(r * per_rank - 0.1 * total)) == rank


def test_replies_become_messages_where_the_prompt_is_messages():
    chat = [{"role": "user", "content": "hi"}]
    pair = {"prompt": chat, "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    found = timed_steps._all_messages(pair)
    assert found["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert found["rejected"] == pair["rejected"] and found["prompt"] == chat
    plain = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert timed_steps._all_messages(plain) == plain


@pytest.mark.parametrize("lacking", ["peft.tuners.supertuning", "peft", "trl"])
def test_what_is_not_installed_is_left_out_and_said(monkeypatch, capsys, tmp_path, lacking):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == lacking else real(name)
    )
    kept = {"peft.tuners.supertuning": ["trl_default", "trl_best", "peft"],
            "peft": ["trl_default", "trl_best"], "trl": []}[lacking]  # fmt: skip
    assert timed_steps.installed() == kept
    assert f"peft_supertuning is left out: {lacking} is not installed" in capsys.readouterr().out
    study = open_study(tmp_path)
    assert efficiency.variants(study) == list(efficiency.VARIANTS)
    wanting = open_study(tmp_path, timing__peers=True)
    assert efficiency.variants(wanting) == [*kept, *efficiency.VARIANTS]


def test_notebooks_show_text_as_text(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.table([{"prompt": "<script>alert(1)</script>", "share": 0.123456}], "A caption.")
    assert "&lt;script&gt;" in shown[0].data and "<script>" not in shown[0].data
    assert "0.1235" in shown[0].data and shown[1].data == "*A caption.*"
    assert percent(0.4567) == "45.7%" and percent(0.1, 0) == "10%"
