"""Row masks: only kept rows get a gradient, and it is the one that the plain way gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama, token_batch, weights_of
from torch import nn

from allo_lib.method.importance import NeuronMask, select_neurons
from allo_lib.method.optim import MaskedAdamW
from allo_lib.method.row_linear import RowLinear, whole_rows


def backward(model, seed=0):
    ids, labels = token_batch(seed, 4)
    model(input_ids=ids, labels=labels).loss.backward()


def rows_of(model, share=0.3, seed=0):
    return select_neurons(
        weights_of(model), share, order="random", granularity="row", scope="tensor", seed=seed
    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_whole_rows_are_told_from_any_other_index(rows, columns, data):
    shape = torch.Size([rows, columns])
    kept = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    index = torch.tensor([r * columns + c for r in kept for c in range(columns)])
    assert whole_rows(index, shape).tolist() == kept
    places = sorted(data.draw(st.sets(st.integers(0, rows * columns - 1), min_size=1)))
    expected = [r for r in range(rows) if all(r * columns + c in places for c in range(columns))]
    found = whole_rows(torch.tensor(places), shape)
    assert (found is not None) == (len(expected) * columns == len(places))


def test_vectors_and_empty_indices_have_no_rows():
    assert whole_rows(torch.arange(3), torch.Size([5])) is None
    assert whole_rows(torch.empty(0, dtype=torch.long), torch.Size([5, 2])) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_products_and_gradients_are_those_of_the_plain_layer(inputs, outputs, batch, bias, seed):
    torch.manual_seed(seed)
    plain, layer = nn.Linear(inputs, outputs, bias), nn.Linear(inputs, outputs, bias)
    layer.load_state_dict(plain.state_dict())
    rows = torch.randperm(outputs)[: 1 + seed % outputs].sort().values
    masters = nn.Parameter(plain.weight.detach()[rows].flatten())
    taken = RowLinear(layer, rows, masters)
    taken.attach()
    x = torch.randn(2, batch, inputs)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.randn(2, batch, outputs)
    for module, at in ((layer, ours), (plain, theirs)):
        y = module(at)
        y.backward(gradient)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.allclose(masters.grad.view(len(rows), -1), plain.weight.grad[rows], atol=1e-5)
    assert layer.weight.grad is None
    if bias:
        assert torch.allclose(layer.bias.grad, plain.bias.grad, atol=1e-5)
    taken.detach()
    assert layer.weight.requires_grad and torch.equal(layer(x), plain(x))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.booleans())
def test_every_packed_gradient_is_that_of_a_plain_backward(seed, share, tied):
    model, plain = tiny_llama(tied=tied), tiny_llama(tied=tied)
    mask = rows_of(model, share, seed)
    optimizer = MaskedAdamW(model, mask)
    backward(model, seed), backward(model, seed + 1)  # accumulates
    backward(plain, seed), backward(plain, seed + 1)
    dense = dict(plain.named_parameters())
    assert any(packed.linear is not None for packed in optimizer._packed)
    for packed in optimizer._packed:
        expected = dense[packed.name].grad.view(-1)[mask.indices[packed.name]]
        assert torch.allclose(packed.master.grad, expected, atol=1e-5), packed.name
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_training_whether_rows_are_taken_apart_or_gathered(dtype, monkeypatch):
    ours, theirs = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    before = weights_of(ours)

    def train(model):
        optimizer = MaskedAdamW(model, rows_of(model), lr=0.01, max_grad_norm=1.0)
        for step in range(4):
            backward(model, step)
            optimizer.step()
        state = optimizer.state_dict(), optimizer.packed_masters(), optimizer.master_weights()
        optimizer.close()
        return state

    state, packed, full = train(ours)
    monkeypatch.setattr("allo_lib.method.optim._linears_by_weight", lambda model: {})
    plain_state, plain_packed, plain_full = train(theirs)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert state["mask"] == plain_state["mask"]
    for name, (places, values) in plain_packed.items():
        assert (places is None and packed[name][0] is None) or torch.equal(packed[name][0], places)
        assert torch.allclose(packed[name][1], values, atol=tolerance), name
        assert torch.allclose(full[name], plain_full[name], atol=tolerance), name
        assert not torch.equal(full[name], before[name].float())


def test_no_gradient_as_large_as_a_weight_is_made():
    """Counted over every tensor that the backward pass leaves on a parameter or leaf."""
    model = tiny_llama()
    mask = rows_of(model, 0.1)
    linear = {n: i for n, i in mask.indices.items() if "_proj" in n}
    only = NeuronMask({n: linear.get(n, i[:0]) for n, i in mask.indices.items()}, mask.shapes)
    optimizer = MaskedAdamW(model, only)
    backward(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    for packed in optimizer._packed:
        assert packed.linear is not None
        assert packed.master.grad.numel() == mask.indices[packed.name].numel()


def test_closing_gives_every_layer_its_own_forward_pass_back():
    model = tiny_llama()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer = MaskedAdamW(model, rows_of(model))
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    optimizer.close()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all("forward" not in vars(module) for module in model.modules())
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_index_of_rows_is_smaller_than_one_of_entries():
    model = tiny_llama()
    optimizer = MaskedAdamW(model, rows_of(model, 0.1))
    backward(model)
    optimizer.step()
    kept = sum(i.numel() for i in rows_of(model, 0.1).indices.values())
    assert optimizer.state_bytes() < 20 * kept
