"""Row masks: only kept rows get a gradient, and it is the one that the plain way gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama, token_batch, weights_of, word_tokenizer
from torch import nn

from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask, select_neurons
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


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_products_and_gradients_are_those_of_the_plain_layer(inputs, outputs, batch, bias, seed):
    torch.manual_seed(seed)
    plain, layer = nn.Linear(inputs, outputs, bias), nn.Linear(inputs, outputs, bias)
    layer.load_state_dict(plain.state_dict())
    rows = torch.randperm(outputs)[: 1 + seed % outputs].sort().values
    masters = nn.Parameter(plain.weight.detach()[rows].flatten())
    layer.weight.requires_grad_(False)
    layer.forward = row_forward(layer, rows, masters)
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
    monkeypatch.setattr("allo_lib.method.masked_adamw._linears_by_weight", lambda model: {})
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


# --- in TRL's own DPOTrainer, under bf16 autocast, its default ---

PAIRS = [{"prompt": f"w{i} w2", "chosen": " w3 w4", "rejected": f" w{5 + i} w6"} for i in range(8)]


def trained(folder, granularity: str, bf16: bool):
    """(the model, its weights before, its mask, log history) of three epochs at a share of 30%."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(v.shape, generator=generator) for n, v in model.named_parameters()}
    mask = select_neurons(scores, 0.3, granularity=granularity)
    before = weights_of(model)
    optimizer = MaskedAdamW(model, mask, lr=5e-3, max_grad_norm=1.0)
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, bf16=bf16,
        max_grad_norm=0, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=tiny_llama(), args=config, train_dataset=Dataset.from_list(PAIRS),
        processing_class=word_tokenizer(),
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    optimizer.close()
    return model, before, mask, [one["loss"] for one in trainer.state.log_history if "loss" in one]


@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_kept_entries_are_trained_and_no_others_in_trls_trainer(tmp_path, granularity):
    results = [trained(tmp_path, granularity, bf16) for bf16 in (True, False)]
    for model, before, mask, losses in results:
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.6
        for name, value in model.named_parameters():
            kept = mask.dense(name)
            assert value.dtype == torch.float32
            assert torch.equal(value[~kept], before[name][~kept])
    # Of those kept some are of words that no pair has: they move in neither.
    (half, before, *_, losses), (full, *_, exact) = results
    assert losses == pytest.approx(exact, abs=0.02)
    assert any(
        not torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True)
    )
    way = [
        torch.cat([(v - before[n]).flatten() for n, v in m.named_parameters()])
        for m in (half, full)
    ]
    assert torch.cosine_similarity(*way, dim=0) > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_row_gradients_under_autocast_are_those_of_a_plain_linear_layer(bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias), torch.nn.Linear(5, 3, bias=bias))
    x = torch.randn(7, 6, requires_grad=True)
    scores = {n: torch.rand(v.shape) for n, v in model.named_parameters()}
    mask = select_neurons(scores, 0.6, granularity="row")

    def gradients(step):
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return [x.grad, *step()]

    plain = gradients(lambda: [v.grad.clone() for v in model.parameters()])
    model.zero_grad(set_to_none=True)
    optimizer = MaskedAdamW(model, mask)
    packed = {p.name: p for p in optimizer._packed}
    taken = gradients(lambda: [packed[n].master.grad for n in packed])
    assert any(p.linear is not None for p in packed.values())
    assert torch.equal(plain[0], taken[0])
    named = dict(zip([n for n, _ in model.named_parameters()], plain[1:], strict=True))
    for name, gradient in zip(packed, taken[1:], strict=True):
        expected = named[name].flatten()[mask.indices[name]]
        assert torch.allclose(gradient, expected, rtol=1e-2, atol=1e-3), name
