"""MaskedAdamW against torch.optim.AdamW and against a dense update multiplied by the mask."""

import copy
import math

import pytest
import torch
from tiny_models import tiny_llama, token_batch, weights_of
from torch import nn

from allo_lib.errors import AlloError
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask, select_neurons

STEPS = 5
KINDS = [torch.float32, torch.bfloat16]


def random_mask(model, share=0.1, seed=0):
    """Keeps this share of every tensor."""
    return select_neurons(weights_of(model), share, order="random", scope="tensor", seed=seed)


def backward(model, seed, rows=4, scale=1.0):
    ids, labels = token_batch(seed, rows)
    (model(input_ids=ids, labels=labels).loss * scale).backward()


def train(model, optimizer, steps=STEPS, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
    return weights_of(model)


def same_bits(one, two):
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert same_bits(one[name], two[name]), name


def assert_close(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance)


def moved(one, two):
    return sum(int((one[name] != two[name]).sum()) for name in one)


# --- what is not kept does not move ---


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_entries_outside_the_mask_keep_every_bit(dtype, granularity):
    model = tiny_llama(dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight[3] = -0.0  # a sign that arithmetic would lose
    before = weights_of(model)
    mask = select_neurons(before, 0.1, order="random", granularity=granularity)
    mask.indices["model.norm.weight"] = torch.arange(5, 9)
    after = train(model, MaskedAdamW(model, mask, lr=0.05, weight_decay=0.5, max_grad_norm=1.0))
    kept_moved = 0
    for name in before:
        kept = mask.dense(name)
        assert same_bits(before[name][~kept], after[name][~kept]), name
        kept_moved += int((before[name][kept] != after[name][kept]).sum())
    assert kept_moved > 0.95 * mask.kept


# --- the same as torch ---


@pytest.mark.parametrize("everything", ["none", "mask"])
@pytest.mark.parametrize("tied", [False, True])
def test_share_one_is_torch_adamw(everything, tied):
    ours, theirs = tiny_llama(tied=tied), tiny_llama(tied=tied)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    mask = None if everything == "none" else random_mask(ours, 1.0)
    start = weights_of(ours)
    ours_after = train(ours, MaskedAdamW(ours, mask, **settings))
    fused = torch.optim.AdamW(theirs.parameters(), fused=True, **settings)
    assert_equal(ours_after, train(theirs, fused))
    assert moved(start, ours_after) > 0.9 * sum(w.numel() for w in start.values())
    plain = tiny_llama(tied=tied)
    looped = torch.optim.AdamW(plain.parameters(), foreach=False, **settings)
    assert_close(ours_after, train(plain, looped), 1e-5)


def masked_update_reference(model, mask, lr, betas, eps, weight_decay, max_grad_norm=None):
    """AdamW with dense moments of all entries in float64; the update is multiplied by the mask."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    kept = {name: mask.dense(name) for name in weights}
    for step in range(1, STEPS + 1):
        model.zero_grad()
        backward(model, step - 1)
        grads = {name: p.grad.double() for name, p in model.named_parameters()}
        if max_grad_norm is not None:
            norm = math.sqrt(sum(float((grads[name] ** 2)[kept[name]].sum()) for name in grads))
            grads = {name: grad * min(1.0, max_grad_norm / norm) for name, grad in grads.items()}
        for name, parameter in model.named_parameters():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grads[name]
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grads[name] ** 2
            mean = first[name] / (1 - betas[0] ** step)
            spread = (second[name] / (1 - betas[1] ** step)).sqrt() + eps
            update = -lr * (mean / spread + weight_decay * weights[name])
            weights[name] = weights[name] + update * kept[name]
            with torch.no_grad():
                parameter.copy_(weights[name])
    return weights_of(model)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("tied", [False, True])
def test_ten_percent_is_the_dense_update_times_the_mask(max_grad_norm, tied):
    model, reference = tiny_llama(tied=tied), tiny_llama(tied=tied)
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.2}
    settings["max_grad_norm"] = max_grad_norm
    mask, start = random_mask(model), weights_of(model)
    after = train(model, MaskedAdamW(model, mask, **settings))
    assert_close(after, masked_update_reference(reference, mask, **settings), 1e-5)
    assert 0.95 * mask.kept < moved(start, after) <= mask.kept


def test_bf16_weights_are_trained_through_float32_masters():
    model = nn.Linear(4, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    mask = NeuronMask({"weight": torch.tensor([1, 3])}, {"weight": (1, 4)})
    optimizer = MaskedAdamW(model, mask, lr=1e-3)
    seen = []
    for _ in range(6):  # steps of lr: a quarter of what bf16 resolves below 1
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        seen.append(model.weight[0, 1].item())
    masters = optimizer.master_weights()["weight"]
    torch.testing.assert_close(masters, torch.tensor([[1.0, 0.994, 1.0, 0.994]]))
    assert model.weight.tolist() == [[1.0, masters[0, 1].bfloat16().item()] * 2]
    assert seen[0] == 1.0 > seen[-1]  # a single step is lost in bf16, six are not


@pytest.mark.parametrize("second", [0.1, 0.3, None])
@pytest.mark.parametrize("first", [0.1, None])
def test_masters_handed_over_go_on_where_rounded_weights_would_not(first, second):
    model = tiny_llama(dtype=torch.bfloat16)
    masks = [share and random_mask(model, share) for share in (first, second)]
    start = {name: value.float() for name, value in weights_of(model).items()}
    one = MaskedAdamW(model, masks[0], lr=1e-6)  # far below what bf16 resolves
    train(model, one)
    moved_to, masters = one.master_weights(), one.packed_masters()
    one.close()
    plain = MaskedAdamW(model, masks[1], lr=0.0)
    assert moved(plain.master_weights(), moved_to) > 0  # what is lost without
    plain.close()
    other = MaskedAdamW(model, masks[1], lr=1e-6, masters=masters)
    begun = other.master_weights()
    for name, value in begun.items():
        expected = start[name].flatten().clone()
        kept = range(expected.numel()) if masks[1] is None else masks[1].indices[name].tolist()
        before = moved_to.get(name, start[name]).flatten()
        for place in kept:
            expected[place] = before[place]
        # Where only the first optimizer trained, the weights themselves hold the rounded value.
        inside = torch.zeros(expected.numel(), dtype=torch.bool)
        inside[list(kept)] = True
        assert torch.equal(value.flatten()[inside], expected[inside]), name
    other.close()


def test_two_optimizers_with_handed_over_masters_are_one():
    def fresh():
        return tiny_llama(dtype=torch.bfloat16)

    settings = {"lr": 1e-4, "betas": (0.0, 0.0)}  # no memory beside the masters
    whole, parts = fresh(), fresh()
    mask = random_mask(whole)
    optimizer = MaskedAdamW(whole, mask, **settings)
    train(whole, optimizer, 6)
    first = MaskedAdamW(parts, mask, **settings)
    train(parts, first, 3)
    first.close()
    second = MaskedAdamW(parts, mask, **settings, masters=first.packed_masters())
    train(parts, second, 3, first=3)
    assert_equal(second.master_weights(), optimizer.master_weights())


# --- gradients ---


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5, 1e3, None])
def test_clipping_takes_the_norm_of_kept_entries(max_grad_norm):
    model, plain = tiny_llama(), tiny_llama()
    mask = random_mask(model, 0.05)
    memoryless = {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1.0}
    optimizer = MaskedAdamW(model, mask, max_grad_norm=max_grad_norm, **memoryless)
    before = weights_of(model)
    backward(plain, 0)
    kept = torch.cat([p.grad[mask.dense(name)] for name, p in plain.named_parameters()])
    norm = float(kept.double().norm())
    whole = math.sqrt(sum(float(p.grad.double().norm()) ** 2 for p in plain.parameters()))
    assert norm < 0.5 * whole
    after = train(model, optimizer, 1)
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-5)
    clipped = kept * min(1.0, (max_grad_norm or math.inf) / norm)
    step = torch.cat([(before[name] - after[name])[mask.dense(name)] for name in before])
    expected = 0.1 * clipped / (clipped.abs() + 1.0)  # AdamW without memory: g / (|g| + eps)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", KINDS)
def test_accumulated_batches_equal_one_big_batch(dtype):
    parts, whole = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    mask = random_mask(parts)
    one, two = (MaskedAdamW(m, mask, lr=0.01, eps=1e-3, max_grad_norm=0.1) for m in (parts, whole))
    for _ in range(3):
        ids, labels = token_batch(0, 6)
        for rows in (slice(0, 3), slice(3, 6)):
            (parts(input_ids=ids[rows], labels=labels[rows]).loss / 2).backward()
            parts.zero_grad()  # as Trainer may: accumulation does not live in the model
        whole(input_ids=ids, labels=labels).loss.backward()
        one.step()
        two.step()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert_close(one.master_weights(), two.master_weights(), tolerance)


@pytest.mark.parametrize("share", [None, 0.1])
@pytest.mark.parametrize("tied", [False, True])
def test_at_most_one_dense_gradient_is_alive(share, tied):
    model = tiny_llama(tied=tied)
    alive, seen = [], []

    def count(parameter):
        seen.append(parameter.grad is not None)
        alive.append(sum(p.grad is not None for p in model.parameters()))

    # Hooks run in the order of registration: this one before the optimizer's, so at the peak.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    MaskedAdamW(model, share and random_mask(model, share))
    backward(model, 0)
    assert len(seen) == len(list(model.parameters())) and all(seen)
    assert max(alive) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_clears_the_gradients_it_has_used():
    model = tiny_llama()
    optimizer = MaskedAdamW(model, random_mask(model), lr=0.01, weight_decay=0.1)
    after = train(model, optimizer, 1)
    assert all(master.grad is None for master in optimizer.param_groups[0]["params"])
    optimizer.step()  # nothing was accumulated since: torch's AdamW, too, then does nothing
    assert_equal(weights_of(model), after)
    assert optimizer.grad_norm is None


def test_step_takes_a_closure():
    model, plain = tiny_llama(), tiny_llama()
    optimizer = MaskedAdamW(model, random_mask(model), lr=0.01)
    other = MaskedAdamW(plain, random_mask(plain), lr=0.01)

    def closure():
        backward(model, 0)
        return torch.tensor(3.25)

    assert optimizer.step(closure) == 3.25
    assert_equal(weights_of(model), train(plain, other, 1))


# --- frozen parameters, closing, refusing ---


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def upper_mask(model):
    """Keeps entries of the last layer only."""
    mask = random_mask(model, 1.0)
    indices = {n: i if "layers.1." in n else i[:0] for n, i in mask.indices.items()}
    return NeuronMask(indices, mask.shapes)


def test_parameters_without_kept_entries_are_frozen_until_close():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before, start = flags(model), weights_of(model)
    optimizer = MaskedAdamW(model, upper_mask(model), lr=0.01)
    upper = [name for name in start if "layers.1." in name]
    assert [name for name, on in flags(model).items() if on] == upper
    after = train(model, optimizer)
    assert [name for name in start if moved({0: start[name]}, {0: after[name]})] == upper
    optimizer.close()
    assert flags(model) == before
    backward(model, 0)
    assert all((p.grad is not None) == before[name] for name, p in model.named_parameters())
    optimizer.close()  # once more does no harm
    assert flags(model) == before


def test_backward_ends_at_the_lowest_kept_parameter():
    model = tiny_llama()
    MaskedAdamW(model, upper_mask(model))
    states = model(input_ids=token_batch(0)[0], output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, True]


def test_masks_of_another_model_are_refused_and_leave_the_model_alone():
    model = tiny_llama()
    scores = weights_of(model)
    nothing = {name: torch.zeros(0, dtype=torch.long) for name in scores}
    empty = NeuronMask(nothing, random_mask(model).shapes)
    odd = select_neurons({"odd": torch.rand(3)}, 0.5)
    for arguments, told in (
        ((odd,), "'odd', which the model lacks"),
        ((empty,), "keeps no entry"),
        ((None, -1.0), "learning rate"),
    ):
        with pytest.raises(ValueError, match=told):
            MaskedAdamW(model, *arguments)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(AlloError, match="max_grad_norm is .*expected > 0 or None"):
            MaskedAdamW(model, None, max_grad_norm=limit)
    assert all(flags(model).values())
    backward(model, 0)  # no hook is left behind
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_models_are_refused():
    model = tiny_llama()
    mask = random_mask(model)
    model.requires_grad_(False)
    with pytest.raises(AlloError, match="frozen"):
        MaskedAdamW(model, mask)
    with pytest.raises(AlloError, match="no trainable parameter"):
        MaskedAdamW(model, None)


# --- state ---


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("share", [None, 0.1])
def test_a_resumed_run_is_the_uninterrupted_run(dtype, share):
    def fresh():
        model = tiny_llama(dtype=dtype)
        mask = None if share is None else random_mask(model, share)
        return model, MaskedAdamW(model, mask, lr=0.003, weight_decay=0.1, max_grad_norm=0.5)

    model, optimizer = fresh()
    train(model, optimizer, 3)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, 4, first=3)

    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_equal(train(again, resumed, 4, first=3), expected)
    assert_equal(resumed.master_weights(), optimizer.master_weights())


def test_state_of_another_mask_is_refused():
    model = tiny_llama()

    def optimizer(mask):
        return MaskedAdamW(tiny_llama(), mask)

    # The first two keep as many entries of every tensor, at other places.
    masks = [random_mask(model, seed=0), random_mask(model, seed=1), random_mask(model, 0.2), None]
    for saved in masks:
        for present in masks:
            if saved is not present:
                with pytest.raises(AlloError, match="another mask"):
                    optimizer(present).load_state_dict(optimizer(saved).state_dict())
    with pytest.raises(AlloError, match="another mask"):
        optimizer(None).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("share", [0.1, 1.0, None])
def test_state_bytes(dtype, share):
    model = tiny_llama(dtype=dtype)
    mask = None if share is None else random_mask(model, share)
    optimizer = MaskedAdamW(model, mask)
    entries = sum(p.numel() for p in model.parameters())
    kept = entries if mask is None else mask.kept
    index = 0 if kept == entries else 4
    master = 0 if kept == entries and dtype == torch.float32 else 4
    assert optimizer.state_bytes() == kept * (index + master + 4)
    train(model, optimizer, 1)
    assert optimizer.state_bytes() == kept * (index + master + 4 + 4 + 4)


# --- transformers.Trainer ---


@pytest.mark.parametrize("dtype", KINDS)
def test_trainer_with_accumulation_equals_a_plain_loop(dtype, tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(*token_batch(3, rows=8), strict=True)
    ]
    settings = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.3}
    model, plain = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    mask = random_mask(model)
    optimizer = MaskedAdamW(model, mask, **settings)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        num_train_epochs=2,
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=model, args=arguments, train_dataset=examples, optimizers=(optimizer, None)
    ).train()

    reference = MaskedAdamW(plain, mask, **settings)
    for step in range(4):
        reference.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
        first = 4 * (step % 2)
        for start in (first, first + 2):
            rows = examples[start : start + 2]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            (plain(**batch).loss / 2).backward()
        reference.step()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_close(optimizer.master_weights(), reference.master_weights(), tolerance)
    assert moved(weights_of(tiny_llama(dtype=dtype)), weights_of(model)) > 0.8 * mask.kept
