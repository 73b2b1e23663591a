"""Bytes are counted without memory; where there is memory they are the ones in use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from tiny_models import tiny_llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from allo_lib.engine.batching import Layout, pair_batch
from allo_lib.engine.forward import response_logps
from allo_lib.errors import AlloError
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.study import efficiency
from allo_lib.study import footprint as module
from allo_lib.study.footprint import KNOWN, _model, _rows, footprint, random_mask, saved_bytes
from allo_lib.study.timed_steps import OwnSteps


def llama(hidden, feed_forward, layers, heads, *, vocabulary=32000, tied=False, key_heads=None):
    """LLaMA 2 (arXiv 2307.09288) by its shape."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )  # fmt: skip


SEVEN, THIRTEEN = (llama(*shape) for shape in KNOWN.values())
BF16, FP32 = torch.bfloat16, torch.float32


def smollm(layers):
    """SmolLM2-135M has 30 of these layers."""
    return llama(576, 1536, layers, 9, vocabulary=49152, tied=True, key_heads=3)


def small(tied):
    return llama(128, 384, 4, 4, vocabulary=2000, tied=tied)


def peak_of_a_step(config, share, prompt, response, pairs, dtype) -> int:
    """Bytes alive at most in a step of training, the second, on tensors without memory."""
    batch = pair_batch(_rows(prompt, response, pairs), Layout(0, True))
    with FakeTensorMode() as mode, LiveBytes() as live:
        batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        model = _model(config, dtype, "cpu")
        optimizer = MaskedAdamW(model, random_mask(model, share), lr=1e-3)
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
        (small(False), 0.1, 40, 60, 2, FP32),
        (small(False), 0.5, 4, 4, 1, BF16),  # at the end, with all gradients of kept entries
        pytest.param((smollm(30), 0.1, 115, 165, 4, FP32), marks=pytest.mark.slow),
        pytest.param((SEVEN, 0.1, 128, 192, 1, BF16), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_the_peak_of_a_step_that_only_counts(asked):
    assert footprint(*asked).total == pytest.approx(peak_of_a_step(*asked), rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("lengths", [(40, 60, 2), (4, 4, 1)])
def test_the_estimate_is_the_peak_of_real_steps(tied, dtype, lengths):
    """DPO by the code that is timed, on real tensors, each counted while it is alive."""
    rows = [
        row | {f"{side}_reference": [0.0] * lengths[1] for side in ("chosen", "rejected")}
        for row in _rows(*lengths)
    ]
    with LiveBytes() as live:
        model = _model(small(tied), dtype, "cpu")
        mask = random_mask(model, 0.1)
        steps = OwnSteps(model, mask, rows, "allo_scalar", 0, beta=0.1, lr=1e-3)
        steps.run(1, 2, live.reset)
    assert footprint(small(tied), 0.1, *lengths, dtype).total == pytest.approx(live.peak, rel=0.1)


def test_what_fits_which_card():
    """A pair of 512 tokens: the released script's 5% and the paper's 10%."""
    for config, share, card in ((SEVEN, 0.05, 24e9), (SEVEN, 0.1, 40e9), (THIRTEEN, 0.1, 80e9)):
        assert footprint(config, share, 128, 192, 1).total < card


def test_no_copy_of_the_weights_is_made_with_them():
    with FakeTensorMode(), LiveBytes() as live:
        model = _model(small(False), BF16, "cpu")
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert live.peak == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1.0, 0.5, 0.25, 0.1, 0.05]))
def test_a_random_mask_keeps_one_of_every_so_many(outputs, inputs, share):
    model = nn.Linear(inputs, outputs)
    mask = random_mask(model, share)
    mask.check(model)
    for name, parameter in model.named_parameters():
        index, every = mask.indices[name], round(1 / share)
        assert index.dtype == torch.int32 and mask.shapes[name] == tuple(parameter.shape)
        assert (index // every).tolist() == list(range(parameter.numel() // every))


def test_random_masks_reach_every_entry():
    model = nn.Linear(10, 10, bias=False)
    drawn = [set(random_mask(model, 0.1).indices["weight"].tolist()) for _ in range(200)]
    assert set().union(*drawn) == set(range(100))


@pytest.fixture
def card(monkeypatch):
    """A stand-in for a GPU of 1 GB: what would run there runs here, and its live bytes count."""
    monkeypatch.setattr(module, "KNOWN", {"small": (64, 96, 2, 4)})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    live = LiveBytes()
    monkeypatch.setattr(efficiency, "reset_peak", lambda device: live.reset())
    monkeypatch.setattr(efficiency, "peak", lambda device: live.peak)

    def here(work, *arguments):
        assert work is module.train and arguments[-1] == "cuda"
        with live:
            return work(*arguments[:-1], "cpu")

    monkeypatch.setattr(efficiency, "in_own_process", here)


def test_measured_beside_estimated_where_there_is_a_gpu(card, tmp_path):
    (row,) = module.of_known_models([0.1], 6, 5, "cuda")
    assert row["device"] == "a card" and float(row["seconds_per_pair"]) > 0
    assert float(row["ratio"]) == pytest.approx(1, abs=0.1)
    assert row["measured_peak_bytes"] == pytest.approx(row["estimated_bytes"], rel=0.1)
    efficiency.write([row], tmp_path / "footprint.csv", module.COLUMNS)
    header, line = (tmp_path / "footprint.csv").read_text().splitlines()
    assert header == "model,kept,device,estimated_bytes,measured_peak_bytes,ratio,seconds_per_pair"
    assert line.startswith(
        f"small,0.1,a card,{row['estimated_bytes']},{row['measured_peak_bytes']}"
    )
    (shown,) = module.in_gigabytes([row])
    assert shown["all"] == round(row["estimated_bytes"] / 1e9, 2)


@pytest.mark.parametrize("free, error, told", [
    (10**6, "", "of its 0.0 GB 0.0 are free"),
    (10**9, "OutOfMemoryError: CUDA out of memory", "OutOfMemoryError: CUDA out of memory"),
])  # fmt: skip
def test_what_does_not_fit_is_said_and_left_empty(card, monkeypatch, capsys, free, error, told):
    def full(*_):
        raise AlloError(error)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    monkeypatch.setattr(efficiency, "in_own_process", full)
    (row,) = module.of_known_models([0.1], 6, 5, "cuda")
    assert row["measured_peak_bytes"] == row["ratio"] == row["seconds_per_pair"] == ""
    assert row["estimated_bytes"] > 0
    assert f"small, 10% kept: not measured on a card: {told}" in capsys.readouterr().out


def test_nothing_is_measured_on_a_cpu():
    rows = module.of_known_models([0.05], 8, 8)
    assert [row["model"] for row in rows] == list(KNOWN)
    assert {row["measured_peak_bytes"] for row in rows} == {""} == {row["device"] for row in rows}


@pytest.mark.slow
def test_a_size_is_trained_in_a_process_of_its_own():
    config = llama(64, 96, 2, 4, vocabulary=1000)
    run = efficiency.in_own_process(module.train, config, 0.1, 6, 5, "cpu", 2)
    assert run["seconds"] > 0 and run["peak"] > footprint(config, 0.1, 6, 5, 1).total


def test_weights_and_state_of_a_known_shape():
    found = footprint(SEVEN, 0.1, 16, 8, 1)
    count = 6_738_415_616  # of LLaMA 2 7B, as its model card and every loader counts them
    assert found.weights == 2 * count
    # 16 bytes of a tenth, and 4 when its gradient is there
    assert found.state == round(1.6 * count)
    assert found.gradient == round(0.4 * count) + 2 * 32000 * 4096
    assert found.total == found.weights + found.state + found.gradient


def test_saved_bytes_are_those_that_a_forward_pass_leaves_in_use():
    """Against the allocator's own account: what it gave minus what it got back."""
    model = tiny_llama().train()
    batch = pair_batch(_rows(9, 7, 3), Layout(0, True))
    counted = saved_bytes(model, batch)
    response_logps(model, batch).sum().backward()  # what is made once and stays
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logps = response_logps(model, batch)
    outermost = [event for event in seen.events() if not event.cpu_parent]
    in_use = sum(event.cpu_memory_usage for event in outermost)
    assert logps.requires_grad
    assert counted == pytest.approx(in_use, rel=0.15)
