"""Bytes are counted without memory; where there is memory they are the ones in use."""

import pytest
import torch
from tiny_models import tiny_llama
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from allo_lib.batches import Layout, pair_batch
from allo_lib.footprint import _rows, footprint, saved_bytes
from allo_lib.forward import response_logps
from allo_lib.importance import select_neurons
from allo_lib.optim import MaskedAdamW


def llama(hidden, feed_forward, layers, heads):
    """LLaMA 2 (arXiv 2307.09288) by its shape."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=feed_forward,
        num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip


def test_weights_and_state_of_a_known_shape():
    found = footprint(llama(4096, 11008, 32, 32), 0.1, 16, 8, 1)
    count = 6_738_415_616  # of LLaMA 2 7B, as its model card and every loader counts them
    assert found.weights == 2 * count
    assert found.state == round(2 * count)  # 20 bytes of a tenth
    assert found.gradient == round(32000 * 4096 * 2.4)
    assert found.total > found.weights + found.state


def test_activations_grow_with_layers_and_pairs():
    shapes = [(2, 1), (4, 1), (4, 2)]
    two, four, pairs = (
        footprint(llama(64, 96, layers, 4), 0.1, 16, 8, count).activations
        for layers, count in shapes
    )
    assert two < four < 2 * two
    assert 1.8 * four < pairs < 2.2 * four


def test_saved_bytes_are_those_that_a_forward_pass_leaves_in_use():
    """Against the allocator's own account: what it gave minus what it got back."""
    model = tiny_llama().train()
    batch = pair_batch(_rows(9, 7, 3), Layout(0, True, 16))
    counted = saved_bytes(model, batch)
    response_logps(model, batch).sum().backward()  # what is made once and stays
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logps = response_logps(model, batch)
    outermost = [event for event in seen.events() if not event.cpu_parent]
    in_use = sum(event.cpu_memory_usage for event in outermost)
    assert logps.requires_grad
    assert counted == pytest.approx(in_use, rel=0.15)


def test_state_is_what_the_optimizer_holds():
    model = tiny_llama(dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    mask = select_neurons({n: p.detach().float() for n, p in model.named_parameters()}, 0.1)
    held = MaskedAdamW(model, mask, lr=1e-3).state_bytes()
    step = 8 * mask.kept  # moments come with the first step
    assert footprint(model.config, 0.1, 4, 4, 1).state == pytest.approx(20 * 0.1 * count, abs=1)
    whole = sum(i.numel() for n, i in mask.indices.items() if i.numel() == count_of(model, n))
    assert held + step == 20 * mask.kept - 4 * whole  # a tensor kept whole needs no index


def count_of(model, name: str) -> int:
    return model.get_parameter(name).numel()
