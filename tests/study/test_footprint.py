"""Bytes and operations are counted without memory; where there is memory they are those in use."""

import pytest
import torch
from live_bytes import LiveBytes
from tiny_models import VOCABULARY, tiny_llama, words
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from allo_lib.align_setup import STAGES, checked, parts_of
from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.forward import response_logps
from allo_lib.errors import AlloError
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.study import efficiency
from allo_lib.study import footprint as module
from allo_lib.study.footprint import (
    KNOWN,
    _model,
    _rows,
    activation_bytes,
    footprint,
    memory,
    passes_of,
    shape_of,
    spread_mask,
)
from allo_lib.study.timed_steps import OwnSteps

BF16, FP32 = torch.bfloat16, torch.float32


def llama(hidden, feed_forward, layers, heads, *, vocabulary=32000, tied=False, key_heads=None):
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )  # fmt: skip


SEVEN = KNOWN["LLaMA 2 7B"]
OF_SEVEN = 6_738_415_616  # parameters of LLaMA 2 7B, as its model card counts them


def smollm(layers):
    """SmolLM2-135M has 30 of these layers."""
    return llama(576, 1536, layers, 9, vocabulary=49152, tied=True, key_heads=3)


def small(tied):
    return llama(128, 384, 4, 4, vocabulary=2000, tied=tied)


# --- bytes of a step -----------------------------------------------------------------------------


def peak_of_a_step(config, share, prompt, response, pairs, dtype) -> int:
    """Bytes alive at most in a step of training, the second, on tensors without memory."""
    batch = pair_batch(_rows(prompt, response, pairs), Layout(0, True))
    with FakeTensorMode() as mode, LiveBytes() as live:
        batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        model = _model(config, dtype, "cpu")
        optimizer = MaskedAdamW(model, spread_mask(model, share), lr=1e-3)
        for _ in range(2):
            live.reset()
            response_logps(model, batch).sum().backward()
            optimizer.step()
    return live.peak


@pytest.mark.parametrize(
    "asked",
    [
        (smollm(2), 0.1, 115, 165, 1, FP32),  # at the end of backward, three gradients of the head
        (smollm(6), 0.05, 115, 165, 4, BF16),  # at its start, with all activations
        pytest.param((SEVEN, 0.1, 128, 192, 1, BF16), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_the_peak_of_a_step_that_only_counts(asked):
    assert sum(footprint(*asked).values()) == pytest.approx(peak_of_a_step(*asked), rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_estimate_is_the_peak_of_real_steps(tied, dtype):
    """DPO by the code that is timed, on real tensors, each counted while it is alive."""
    lengths = 40, 60, 2
    rows = [
        row | {f"{side}_reference": [0.0] * lengths[1] for side in ("chosen", "rejected")}
        for row in _rows(*lengths)
    ]
    with LiveBytes() as live:
        model = _model(small(tied), dtype, "cpu")
        mask = spread_mask(model, 0.1)
        OwnSteps(model, mask, rows, "allo_scalar", 0, beta=0.1, lr=1e-3).run(1, 2, live.reset)
    estimate = sum(footprint(small(tied), 0.1, *lengths, dtype).values())
    assert estimate == pytest.approx(live.peak, rel=0.1)


def test_recomputing_keeps_of_each_layer_what_it_is_given():
    one_layer = LlamaConfig.from_dict(SEVEN.to_dict() | {"num_hidden_layers": 1})
    less = activation_bytes(SEVEN, 64, 64, 1, BF16, recomputed=True)
    assert less == activation_bytes(one_layer, 64, 64, 1, BF16) + 31 * 192 * 4096 * 2


# --- known models --------------------------------------------------------------------------------


def test_the_estimates_are_the_committed_ones():
    rows = module.of_known_models([0.05, 1.0], 128, 192)
    found = [row["estimated_bytes"] for row in rows]
    assert found == [22275647693, 121553625088, 41651237888, 234613237760]
    assert found[0] < 24e9  # a card for the released script's 5%
    assert rows[0]["weights"] == 2 * OF_SEVEN and rows[0]["state"] == round(0.8 * OF_SEVEN)
    assert {row[key] for row in rows for key in ("measured_peak_bytes", "device")} == {""}
    (shown, *_) = module.in_gigabytes(rows)
    assert shown["all"] == 22.28 and shown["weights"] == 13.48 and shown["measured"] == ""


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a GPU of 1 GB: what would run there runs here, and its live bytes count."""
    monkeypatch.setattr(module, "KNOWN", {"small": llama(64, 96, 2, 4)})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    live = LiveBytes()
    monkeypatch.setattr(efficiency, "reset_peak", lambda device: live.reset())
    monkeypatch.setattr(efficiency, "peak", lambda device: live.peak)

    def here(work, *arguments):
        with live:
            return work(*arguments[:-1], "cpu")

    monkeypatch.setattr(efficiency, "in_own_process", here)


def test_measured_beside_estimated_where_there_is_a_gpu(card):
    (row,) = module.of_known_models([0.1], 6, 5, "cuda")
    assert row["device"] == "a card" and float(row["seconds_per_pair"]) > 0
    assert float(row["ratio"]) == pytest.approx(1, abs=0.1)
    assert row["measured_peak_bytes"] == pytest.approx(row["estimated_bytes"], rel=0.1)


@pytest.mark.parametrize(("free", "why"), [(10**6, "of its 0.0 GB 0.0 are free"), (10**9, "OOM")])
def test_what_does_not_fit_is_said_and_left_empty(card, monkeypatch, capsys, free, why):
    def full(*_):
        raise AlloError(why)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    monkeypatch.setattr(efficiency, "in_own_process", full)
    (row,) = module.of_known_models([0.1], 6, 5, "cuda")
    assert row["measured_peak_bytes"] == row["ratio"] == "" and row["estimated_bytes"] > 0
    assert f"small, 10% kept: not measured on a card: {why}" in capsys.readouterr().out


# --- what an `align` takes -----------------------------------------------------------------------

PAIRS = [
    {"prompt": f"w1 w2 w{i}", "chosen": "w3 w4 w5", "rejected": "w3 w5 w6 w7"[: 5 + 3 * (i % 3)]}
    for i in range(10)
]


def parts(config):
    return parts_of(PAIRS, words(), tiny_llama().config, config, STAGES)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied):
    """Forward and backward, all of it: attention and positions that are not judged make up for one
    another."""
    model = AutoModelForCausalLM.from_config(small(tied))
    batch = pair_batch(_rows(40, 60, 2), Layout(0))
    with FlopCounterMode(display=False) as counter:
        response_logps(model, batch).sum().backward()
    counted = 3 * 2 * shape_of(model.config).active * batch["input_ids"].numel()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3Config])
def test_experts_that_a_token_passes_by_are_not_counted(kind):
    experts = dict(num_local_experts=8, num_experts_per_tok=2) if kind is MixtralConfig else {}
    config = kind(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, **experts,
    )  # fmt: skip
    shape, each = shape_of(config), 3 * 16 * 24
    read = 16 * 8 + 2 * each if experts else each  # router, and two of eight
    assert shape.active == 2 * (4 * 16 * 16 + read) + 16 * VOCABULARY
    parameters = AutoModelForCausalLM.from_config(config).parameters()
    assert shape.parameters == sum(p.numel() for p in parameters)
    asked = checked({})
    needed = memory(config, shape, parts(asked)[0], asked, STAGES, FP32, 1)
    assert needed["other stages"] > 4 * shape.parameters


def test_tokens_and_steps_of_every_pass():
    config = checked({"batch_size": 4, "epochs": 2, "max_steps": 4, "search": 3, "held_out": 0.2})
    given, held_out, development = found = parts(config)
    shape = shape_of(SEVEN)
    passes = {one.name: one for one in passes_of(found, config, STAGES, shape)}
    read = 0  # of every tree a node once
    for row in given.rows:
        both = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        read += len({tuple(s[: n + 1]) for s in both for n in range(len(s))})
    rejected = sum(len(row["prompt"] + row["rejected"]) for row in given.rows)
    assert {name: (one.rows, one.steps) for name, one in passes.items()} == {
        "reference": (10, 0), "importance": (7, 4), "reward model": (7, 4), "token rewards": (7, 0),
        "forgetting x 3": (7, 12), "its reference x 3": (7, 0), "learning x 3": (7, 12),
        "ranking": (5, 0),
    }  # fmt: skip
    assert passes["importance"].tokens == 2 * read and passes["learning x 3"].tokens == 6 * read
    assert passes["forgetting x 3"].tokens == 6 * rejected
    assert passes["its reference x 3"].tokens == 3 * read
    assert passes["learning x 3"].flops == 3 * 2 * 6 * read * shape.active
    # A limit of steps ends a stage within its epochs.
    short = checked({"batch_size": 4, "epochs": 2, "max_steps": 3})
    one = {o.name: o for o in passes_of(found, short, STAGES, shape)}["importance"]
    assert one.steps == 3 and one.tokens == round(2 * read * 12 / 14)


def test_bytes_of_seven_billion_on_1_2_and_8_devices():
    # So few neurons that a step of many pairs has its peak where backward begins.
    lean = {"share": 0.01, "estimator": "gradient", "rewriter_neurons": "kept"}
    config = checked({"batch_size": 8} | lean)
    given, shape = parts(config)[0], shape_of(SEVEN)
    assert shape.parameters == OF_SEVEN and shape.active == OF_SEVEN - 32000 * 4096 - 65 * 4096
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # bytes in bf16
    prompt = max(len(row["prompt"]) for row in given.rows)
    response = max(len(row[side]) for row in given.rows for side in ("chosen", "rejected"))
    for n in (1, 2, 8):
        found = memory(SEVEN, shape, given, config, STAGES, BF16, n)
        own = footprint(SEVEN, 0.01, prompt, response, 8 // n)
        sharded = own["weights"] + own["state"] + own["gradient"]
        expected = sharded / n + own["activations"] + own["logits"] + 2 * layer * (n > 1)
        assert found["other stages"] == found["reward model"] == pytest.approx(expected)
        assert found["importance"] == pytest.approx(expected - own["state"] / n)
    # Two bytes a weight, sixteen a kept one; the default needs dense state, and scores.
    default = memory(SEVEN, shape, given, checked({}), STAGES, BF16, 8)
    assert 8 * default["reward model"] > (2 + 12 + 4) * OF_SEVEN
    assert default["importance"] == pytest.approx(default["reward model"] + 4 * OF_SEVEN / 8)
