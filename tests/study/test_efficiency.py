"""The cost of a step: what is compared does the same arithmetic on the same pairs, and operations,
sizes and times are counted right."""

import csv
import importlib.util
import math
import mmap
import os

import pytest
import torch
from peft import get_peft_model
from refusals import refused
from test_trainer import pairs
from tiny_models import tiny_llama, weights_of
from tiny_study import DOMAIN, open_study
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from allo_lib.engine.encoding import encode_pairs
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import select_neurons
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import efficiency, timed_steps
from allo_lib.study.timed_steps import PEERS, DenseMaskedAdamW, OwnSteps, TrlSteps


def mask_of(model, share: float, granularity: str = "scalar"):
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    return select_neurons(scores, share, granularity=granularity)


def own_steps(model, variant: str, **settings):
    settings = {"beta": 0.1, "lr": 1e-3} | settings
    return OwnSteps(model, mask_of(model, 0.1), pairs(model)[:2], variant, 0, **settings)


def test_the_dense_mask_and_the_masked_optimizer_train_the_same():
    """Else a comparison of their costs would compare different methods."""
    found = []
    for variant in ("allo_scalar", "dense_masked"):
        model = tiny_llama()
        own_steps(model, variant).run(1, 3)
        found.append(weights_of(model))
    for name, start in weights_of(tiny_llama()).items():
        assert torch.allclose(found[0][name], found[1][name], atol=2e-6), name
        assert "layers" not in name or not torch.equal(found[0][name], start)


@pytest.mark.parametrize("dtype, per_entry", [(torch.float32, 14), (torch.bfloat16, 16)])
def test_bytes_of_the_dense_mask(dtype, per_entry):
    """bf16 mask, two float32 moments, the gradient, and masters where weights are bf16."""
    model = tiny_llama(dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = DenseMaskedAdamW(model, mask_of(model, 0.1), lr=1e-3)
    assert optimizer.state_bytes() == per_entry * count


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_layer_costs_three_products_and_fewer_when_rows_are_kept(kept):
    layer, x = nn.Linear(4, 6, bias=False), torch.randn(7, 4, requires_grad=True)

    def operations() -> int:
        with FlopCounterMode(display=False) as counted:
            layer(x).sum().backward()
        return counted.get_total_flops()

    # y = x W', dx = dy W, dW = dy' x: each 2 * batch * inputs * outputs.
    assert operations() == 3 * 2 * 7 * 4 * 6
    MaskedAdamW(layer, mask_of(layer, kept / 6, "row"))
    assert operations() == 2 * 7 * 4 * (2 * 6 + kept)


def test_a_product_that_is_added_counts_once_also_with_another_dtype_of_its_result():
    bias, left, right = torch.ones(7, 5), torch.ones(7, 3), torch.ones(3, 5)
    with timed_steps.counter() as counted:
        torch.addmm(bias, left, right)
    assert counted.get_total_flops() == 2 * 7 * 3 * 5
    addmm = counted.flop_registry[torch.ops.aten.addmm]  # as TRL calls it on a GPU
    assert addmm(bias, left, right, torch.float32, out_val=bias) == 2 * 7 * 3 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_that_of_a_product_and_leaves_random_numbers_alone(dtype):
    state = torch.random.get_rng_state()
    assert 1e8 < timed_steps.matrix_rate(dtype) < 1e15
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("variant", ["dense_masked", "allo_scalar"])
def test_the_clock_and_the_peak_begin_after_the_warm_up(variant):
    own = own_steps(tiny_llama(), variant)
    made, step = [], own.optimizer.step
    own.optimizer.step = lambda: made.append("step") or step()
    assert own.run(2, 3, lambda: made.append("begun")) > 0
    assert made == ["step"] * 2 + ["begun"] + ["step"] * 3


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


# --- whole studies -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("work, argument, told", [
    (os._exit, 3, "BrokenProcessPool: "),
    (torch.ones, -1, "RuntimeError: Trying to create tensor with negative dimension"),
    (load_profile, "nothing.yaml", "no profile 'nothing.yaml'"),  # an AlloError as it is
])  # fmt: skip
def test_what_fails_in_a_process_of_its_own_is_said_in_one_line(work, argument, told):
    with refused(told):
        efficiency.in_own_process(work, argument)


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


@pytest.mark.slow
def test_the_batch_is_the_training_pairs_with_their_reference_or_those_of_the_wanted_length(
    tiny_study,
):
    study, load = tiny_study, efficiency.workload(tiny_study)
    expected = study.encoded(DOMAIN, "train")[: study.domain(DOMAIN).batch_size]
    ids = [{key: row[key] for key in efficiency.PAIR} for row in load.rows]
    assert ids == [{key: row[key] for key in efficiency.PAIR} for row in expected]
    assert ids == encode_pairs(study.tokenizer, load.texts, study.context)
    for ours, theirs in zip(load.rows, expected, strict=True):
        assert ours["chosen_reference"] == pytest.approx(theirs["chosen_reference"], abs=1e-5)
    assert load.tokens == sum(len(row[key]) for row in load.rows for key in efficiency.PAIR)
    other = open_study(study.results_dir, timing__prompt=9, timing__responses=20, timing__pairs=2)

    def distance(row):
        return abs(len(row["prompt"]) - 9) + abs(len(row["chosen"]) + len(row["rejected"]) - 20)

    every = sorted(map(distance, study.encoded(DOMAIN, "train")))
    assert [distance(row) for row in efficiency.workload(other).rows] == every[:2]
    assert efficiency.workload(study).texts == load.texts


@pytest.mark.slow
@pytest.mark.parametrize("variant", PEERS)
def test_every_peer_trains_and_is_timed(tiny_study, variant):
    study = open_study(tiny_study.results_dir, timing__pairs=4)
    load, model = efficiency.workload(study), study.load_sft(DOMAIN).train()
    pad = study.tokenizer.pad_token_id
    dense = OwnSteps(model, None, load.rows, "dense", pad, beta=0.1, lr=0.0)
    dense.run(1, 1)
    own = dense.flops
    dense.optimizer.close()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"beta": 0.1, "share": 0.1, "lr": 1e-3}
    steps, begun = TrlSteps(model, study.tokenizer, load.texts, variant, **settings), []
    assert steps.run(1, 2, lambda: begun.append(steps.trainer.state.global_step)) > 0
    assert begun == [1]
    # Prompts read twice, a padded batch, and the whole head: more than this project's own step.
    # LoRA alone makes no gradient of whole weights.
    assert steps.flops > (own * 2 / 3 if variant == "peft" else own)
    after = dict(model.named_parameters())
    moved = any(n in after and not torch.equal(p, after[n]) for n, p in before.items())
    assert moved == (variant != "peft")
    trained = sum(p.numel() for p in steps.trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in before.values())
    assert trained == pytest.approx(0.1 * total if variant == "peft" else total, rel=0.2)
    # Two moments and the gradient, in float32; of an adapter its values.
    assert steps.state_bytes() == (16 if variant == "peft" else 12) * trained
    assert steps.trainer.ref_model is None and steps.trainer.precompute_ref_logps


# --- other projects ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_lora_trains_as_many_values_as_the_scalar_neurons(share):
    """At the shape of SmolLM2-135M, within 1%."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    steps = TrlSteps(model, None, [], "peft", beta=0.1, share=share, lr=1e-3)
    adapted = get_peft_model(model, steps.adapter())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == pytest.approx(round(share * total), rel=0.01)


def test_replies_become_messages_where_the_prompt_is_messages():
    chat = [{"role": "user", "content": "hi"}]
    pair = {"prompt": chat, "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    plain = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    found = TrlSteps(None, None, [pair, plain], "trl_best", beta=0.1, share=0.1, lr=0.0).texts
    assert found == [pair | {"chosen": [{"role": "assistant", "content": "yes"}]}, plain]


@pytest.mark.parametrize("lacking, kept", [("peft", ["trl_best"]), ("trl", []), ("", [*PEERS])])
def test_what_is_not_installed_is_left_out_and_said(monkeypatch, capsys, lacking, kept):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == lacking else real(name)
    )
    assert timed_steps.installed() == kept
    told = [line.split(" is left out: it needs ") for line in capsys.readouterr().out.splitlines()]
    assert [variant for variant, _ in told] == [v for v in PEERS if v not in kept]
    assert all(lacking in needs for _, needs in told)
