"""MaskedAdamW against torch.optim.AdamW, a dense update times the mask, and in TRL's trainer."""

import copy
import math

import pytest
import torch
from refusals import refused
from tiny_models import masters_of, moved, tiny_llama, token_batch, weights_of, words
from torch import nn

from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask, select_neurons

STEPS = 5
KINDS = [torch.float32, torch.bfloat16]


def random_mask(model, share=0.1, seed=0, granularity="scalar"):
    """Keeps this share of every tensor."""
    how = {"order": "random", "scope": "tensor", "granularity": granularity}
    return select_neurons(weights_of(model), share, seed=seed, **how)


def backward(model, seed, rows=4):
    ids, labels = token_batch(seed, rows)
    model(input_ids=ids, labels=labels).loss.backward()


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


# --- what is kept is trained as torch does, what is not does not move ---


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


@pytest.mark.parametrize("everything", ["none", "mask"])
@pytest.mark.parametrize("tied", [False, True])
def test_share_one_is_torch_adamw(everything, tied):
    ours, theirs = tiny_llama(tied=tied), tiny_llama(tied=tied)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    start, mask = weights_of(ours), None if everything == "none" else random_mask(ours, 1.0)
    ours_after = train(ours, MaskedAdamW(ours, mask, **settings))
    fused = torch.optim.AdamW(theirs.parameters(), fused=True, **settings)
    assert_equal(ours_after, train(theirs, fused))
    assert moved(start, ours_after) > 0.9 * sum(w.numel() for w in start.values())


def masked_update_reference(model, mask, lr, betas, eps, weight_decay, max_grad_norm):
    """AdamW with dense moments of all entries in float64; the update is multiplied by the mask, and
    clipping takes the norm of the kept entries."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    kept = {name: mask.dense(name) for name in weights}
    for step in range(1, STEPS + 1):
        model.zero_grad()
        backward(model, step - 1)
        grads = {name: p.grad.double() for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float((grads[name] ** 2)[kept[name]].sum()) for name in grads))
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
        for name, parameter in model.named_parameters():
            grad = grads[name] * factor
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
            mean = first[name] / (1 - betas[0] ** step)
            spread = (second[name] / (1 - betas[1] ** step)).sqrt() + eps
            update = -lr * (mean / spread + weight_decay * weights[name])
            weights[name] = weights[name] + update * kept[name]
            with torch.no_grad():
                parameter.copy_(weights[name])
    return weights_of(model), norm


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("granularity", ["scalar", "row"])
@pytest.mark.parametrize("tied", [False, True])
def test_ten_percent_is_the_dense_update_times_the_mask(max_grad_norm, granularity, tied):
    model, reference = tiny_llama(tied=tied), tiny_llama(tied=tied)
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.2}
    settings["max_grad_norm"] = max_grad_norm
    mask, start = random_mask(model, granularity=granularity), weights_of(model)
    optimizer = MaskedAdamW(model, mask, **settings)
    by_row = [packed.name for packed in optimizer._packed if packed.linear is not None]
    assert bool(by_row) == (granularity == "row")
    after = train(model, optimizer)
    expected, norm = masked_update_reference(reference, mask, **settings)
    assert_close(after, expected, 1e-5)
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-3)
    assert 0.9 * mask.kept < moved(start, after) <= mask.kept


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
    masters = masters_of(model, optimizer)["weight"]
    torch.testing.assert_close(masters, torch.tensor([[1.0, 0.994, 1.0, 0.994]]))
    assert model.weight.tolist() == [[1.0, masters[0, 1].bfloat16().item()] * 2]
    assert seen[0] == 1.0 > seen[-1]  # a single step is lost in bf16, six are not


@pytest.mark.parametrize("second", [0.1, 0.3, None])
def test_handed_over_masters_go_on_where_rounded_weights_would_not(second):
    settings = {"lr": 1e-6, "betas": (0.0, 0.0)}  # far below what bf16 resolves; no other memory
    whole, parts = (tiny_llama(dtype=torch.bfloat16) for _ in range(2))
    mask = random_mask(whole)
    optimizer = MaskedAdamW(whole, mask, **settings)
    train(whole, optimizer, 6)
    first = MaskedAdamW(parts, mask, **settings)
    train(parts, first, 3)
    first.close()
    other = random_mask(parts, second or 1.0)
    weights, masters = weights_of(parts), first.packed_masters()
    with pytest.raises(ValueError, match="learning rate"):  # a refused call takes none
        MaskedAdamW(parts, None, lr=-1.0, masters=masters)
    going_on = MaskedAdamW(parts, other if second else None, **settings, masters=masters)
    assert not masters
    begun = masters_of(parts, going_on)
    for name, value in masters_of(parts, first).items():
        both = mask.dense(name) & other.dense(name)
        assert torch.equal(begun[name][both], value[both])
        assert torch.equal(begun[name][~mask.dense(name)], weights[name][~mask.dense(name)].float())
    assert moved(begun, {name: value.float() for name, value in weights.items()}) > 0
    if second == 0.1:  # the same mask: the two are one
        train(parts, going_on, 3, first=3)
        assert_equal(masters_of(parts, going_on), masters_of(whole, optimizer))


# --- gradients ---


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_accumulated_batches_equal_one_big_batch(dtype, granularity):
    parts, whole = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    mask = random_mask(parts, granularity=granularity)
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
    assert_close(masters_of(parts, one), masters_of(whole, two), tolerance)


@pytest.mark.parametrize("kind", ["all", "scalar", "row"])
def test_at_most_one_dense_gradient_is_alive_and_of_whole_rows_none(kind):
    model = tiny_llama()
    alive = {}

    def count(parameter):
        alive[parameter] = sum(p.grad is not None for p in model.parameters())

    # Hooks run in the order of registration: this one before the optimizer's, so at the peak.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    mask = None if kind == "all" else random_mask(model, granularity=kind)
    optimizer = MaskedAdamW(model, mask)
    backward(model, 0)
    dense = {name for name, p in model.named_parameters() if p in alive}
    assert dense == {packed.name for packed in optimizer._packed if packed.linear is None}
    assert set(alive.values()) == {1} and all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(packed.master.grad is None for packed in optimizer._packed)
    after = weights_of(model)
    optimizer.step(lambda: None)  # nothing was accumulated since: as torch's AdamW it does nothing
    assert_equal(weights_of(model), after)


@pytest.mark.parametrize("bias", [True, False])
def test_row_gradients_under_autocast_are_those_of_a_plain_linear_layer(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Linear(5, 3, bias=bias))
    x = torch.randn(7, 6, requires_grad=True)
    mask = random_mask(model, 0.6, granularity="row")

    def gradients():
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return x.grad

    plain = gradients()
    expected = {n: v.grad.flatten()[mask.indices[n]] for n, v in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    optimizer = MaskedAdamW(model, mask)
    assert torch.equal(gradients(), plain)
    assert any(packed.linear is not None for packed in optimizer._packed)
    for packed in optimizer._packed:
        torch.testing.assert_close(packed.master.grad, expected[packed.name], rtol=1e-2, atol=1e-3)


# --- frozen parameters, closing, refusing ---


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_parameters_without_kept_entries_are_frozen_until_close(granularity):
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before, start = flags(model), weights_of(model)
    mask = random_mask(model, 0.5, granularity=granularity)
    upper = {n: i if "layers.1." in n else i[:0] for n, i in mask.indices.items()}
    optimizer = MaskedAdamW(model, NeuronMask(upper, mask.shapes), lr=0.01)
    states = model(input_ids=token_batch(0)[0], output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, True]
    twin = copy.deepcopy(model)  # as trainers make their reference: it has its own weights
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(input_ids=token_batch(0)[0]).logits.any()
    after = train(model, optimizer)
    changed = [name for name in start if not torch.equal(start[name], after[name])]
    assert changed == [name for name, index in upper.items() if len(index)]
    for _ in range(2):  # once more does no harm
        optimizer.close()
        assert flags(model) == before
        assert all("forward" not in vars(module) for module in model.modules())
    backward(model, 0)
    assert all((p.grad is not None) == before[name] for name, p in model.named_parameters())


def test_what_cannot_be_trained_is_refused_and_leaves_the_model_alone():
    model = tiny_llama()
    mask = random_mask(model)
    nothing = NeuronMask({n: i[:0] for n, i in mask.indices.items()}, mask.shapes)
    odd = select_neurons({"odd": torch.rand(3)}, 0.5)
    for arguments, told in (
        ({"mask": odd}, "'odd', which the model lacks"),
        ({"mask": nothing}, "keeps no entry"),
        *(({"mask": None, "max_grad_norm": limit}, f"max_grad_norm is {limit}, expected > 0")
          for limit in (0.0, -1.0, math.nan)),
    ):  # fmt: skip
        with refused(told):
            MaskedAdamW(model, **arguments)
    with pytest.raises(ValueError, match="learning rate"):
        MaskedAdamW(model, None, lr=-1.0)
    backward(model, 0)  # no hook is left behind
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    for given, told in ((mask, "frozen"), (None, "no trainable parameter")):
        with refused(told):
            MaskedAdamW(model, given)


# --- state ---


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", ["all", "scalar", "row"])
def test_a_resumed_run_is_the_uninterrupted_run(dtype, kind):
    def fresh():
        model = tiny_llama(dtype=dtype)
        mask = None if kind == "all" else random_mask(model, granularity=kind)
        return model, MaskedAdamW(model, mask, lr=0.003, weight_decay=0.1, max_grad_norm=0.5)

    model, optimizer = fresh()
    train(model, optimizer, 3)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, 4, first=3)

    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_equal(train(again, resumed, 4, first=3), expected)
    assert_equal(masters_of(again, resumed), masters_of(model, optimizer))


@pytest.mark.parametrize("kind", ["all", "scalar", "row"])
@pytest.mark.parametrize("asked", [False, True])
def test_weights_that_are_loaded_later_are_trained_and_not_written_over(kind, asked):
    """As a trainer does that resumes from a checkpoint of weights alone."""
    first, model = tiny_llama(dtype=torch.bfloat16), tiny_llama(dtype=torch.bfloat16)
    with torch.no_grad():
        for value in first.parameters():
            value.add_(1.0)
    mask = None if kind == "all" else random_mask(model, granularity=kind)
    optimizer = MaskedAdamW(model, mask, lr=0.003)
    model.load_state_dict(first.state_dict())
    if asked:  # as accelerate's wrapper does
        optimizer.load_state_dict(optimizer.state_dict())
    expected = train(first, MaskedAdamW(first, mask, lr=0.003), 2)
    assert_equal(train(model, optimizer, 2), expected)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_loss_that_is_scaled_for_16_bits_trains_as_one_that_is_not(clip):
    after = {}
    for scale in (1.0, 65536.0):
        model = tiny_llama()
        optimizer = MaskedAdamW(model, random_mask(model), lr=0.003, max_grad_norm=clip, eps=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(3):
            ids, labels = token_batch(step, 4)
            scaler.scale(model(input_ids=ids, labels=labels).loss).backward()
            scaler.step(optimizer)
            scaler.update()
        after[scale] = weights_of(model)
        assert 0.1 < optimizer.grad_norm < 50  # before clipping, of the loss itself
    assert_close(after[1.0], after[65536.0], 1e-5)


def test_state_of_another_mask_is_refused():
    model = tiny_llama()
    # The first two keep as many entries of every tensor, at other places.
    masks = [random_mask(model, seed=0), random_mask(model, seed=1), None]
    states = [MaskedAdamW(tiny_llama(), mask).state_dict() for mask in masks]
    states.append(torch.optim.AdamW(model.parameters()).state_dict())
    for i, mask in enumerate(masks):
        for j, state in enumerate(states):
            if i != j:
                with refused("another mask"):
                    MaskedAdamW(tiny_llama(), mask).load_state_dict(state)


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


# --- in TRL's own DPOTrainer, under bf16 autocast, its default ---

PAIRS = [{"prompt": f"w{i} w2", "chosen": " w3 w4", "rejected": f" w{5 + i} w6"} for i in range(8)]


@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_kept_entries_are_trained_and_no_others_in_trls_trainer(tmp_path, granularity):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses, way = [], []
    for bf16 in (True, False):
        model = tiny_llama()
        before = weights_of(model)
        mask = random_mask(model, 0.3, granularity=granularity)
        optimizer = MaskedAdamW(model, mask, lr=5e-3, max_grad_norm=1.0)
        config = DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, bf16=bf16,
            max_grad_norm=0, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = DPOTrainer(
            model, ref_model=tiny_llama(), args=config, train_dataset=Dataset.from_list(PAIRS),
            processing_class=words(), optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()
        optimizer.close()
        losses.append([one["loss"] for one in trainer.state.log_history if "loss" in one])
        assert losses[-1][0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1][-1] < 0.6
        after = weights_of(model)
        assert {value.dtype for value in after.values()} == {torch.float32}
        assert moved(before, after, mask)
        steps = [(v - before[n]).flatten() for n, v in after.items()]
        way.append(torch.cat(steps))
    # Of those kept some are of words that no pair has: they move in neither.
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and not torch.equal(*way)
    assert torch.cosine_similarity(*way, dim=0) > 0.95
