"""The training loop: every row once an epoch, a cosine schedule, a clear end when it diverges, and
the same bytes after a stop as without one; and scores that are what their formulas say."""

import errno
import math

import pytest
import torch
from tiny_models import VOCABULARY, moved, tiny_llama, weights_of

from allo_lib.allo import delta_of_dpo, find_neurons, gradient_scores, run_stage
from allo_lib.engine import trainer
from allo_lib.engine.batching import Layout, collate
from allo_lib.engine.forward import logps_of_rows
from allo_lib.engine.trainer import Checkpoints, Schedule, train
from allo_lib.errors import AlloError, Diverged
from allo_lib.machine import devices
from allo_lib.method.losses import dpo_loss, objective, token_logps
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import select_neurons


def draw(generator, length: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


def solutions(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"prompt": draw(generator, 3), "response": draw(generator, 2 + i % 3)}
            for i in range(count)]  # fmt: skip


def pairs(model, count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = [{"prompt": draw(generator, 2 + i % 2), "chosen": draw(generator, 3),
             "rejected": draw(generator, 2 + i % 4)} for i in range(count)]  # fmt: skip
    for side in ("chosen", "rejected"):
        sides = [{"prompt": row["prompt"], "response": row[side]} for row in rows]
        for row, values in zip(rows, logps_of_rows(model, sides, 0, 4), strict=True):
            row[f"{side}_reference"] = values
    return rows


def dpo(model, rows, schedule, **settings):
    return run_stage(model, rows, "dpo", schedule, pad_token_id=0, **settings)


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


class Watched(MaskedAdamW):
    """Notes the rate of every step."""

    def step(self, closure=None):
        self.rates = getattr(self, "rates", []) + [self.param_groups[0]["lr"]]
        return super().step(closure)


def test_every_row_is_used_once_an_epoch_in_a_seeded_order():
    seen = []

    def collator(rows):
        seen.append([row["response"] for row in rows])
        return collate([{k: row[k] for k in ("prompt", "response")} for row in rows], Layout(0))

    def orders(seed):
        seen.clear()
        model = tiny_llama()
        optimizer = MaskedAdamW(model, None, lr=1e-3)
        log = train(model, rows, collator, objective("sft", beta=0.1), optimizer,
                    Schedule(1e-3, 2, 3, seed))  # fmt: skip
        optimizer.close()
        assert [len(batch) for batch in seen] == [3, 3, 2] * 2 and len(log.loss) == 6
        return [tuple(map(tuple, sum(seen[i : i + 3], []))) for i in (0, 3)]

    rows = solutions(8)
    first, second = orders(5)
    wanted = sorted(tuple(row["response"]) for row in rows)
    assert sorted(first) == sorted(second) == wanted and first != second
    assert orders(5) == [first, second] and orders(6)[0] != first
    # The order that the committed results were trained in.
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(5)).tolist()
    assert list(first) == [tuple(rows[i]["response"]) for i in shuffled]


@pytest.mark.parametrize(
    "warmup, steps", [(0.1, 20), (0.25, 8), (0.0, 5), (1.0, 5), (0.1, 2), (0.1, 1)]
)
def test_the_rate_rises_and_falls_as_a_cosine(warmup, steps):
    model = tiny_llama()
    optimizer = Watched(model, None, lr=0.5)
    rows = solutions(steps)
    plain = Layout(0)
    train(model, rows, lambda batch: collate(batch, plain), lambda logps, _: (0 * logps.sum(), {}),
          optimizer, Schedule(1e-2, 1, 1, 0, warmup=warmup))  # fmt: skip
    optimizer.close()
    rising = math.ceil(warmup * steps)
    rising *= steps > 1  # a single step at rate 0 would train nothing
    expected = [
        step / rising if step < rising
        else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        for step in range(steps)
    ]  # fmt: skip
    assert optimizer.rates == pytest.approx([0.5 * part for part in expected], abs=1e-9)


def test_a_warm_up_is_a_share_and_no_count():
    with pytest.raises(AlloError, match="warmup is 10, expected a share of the steps, 0 to 1"):
        Schedule(1e-2, 1, 1, 0, warmup=10)


def test_it_learns_and_logs():
    model = tiny_llama()
    model.config.pad_token_id = None  # the caller's is used
    rows = pairs(model)
    log = dpo(model, rows, Schedule(3e-3, 6, 4, 0))
    assert log.loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert log.loss[-1] < 0.6 * log.loss[0]
    assert len(log.loss) == len(log.metrics["reward_margin"]) == 12
    assert log.metrics["reward_accuracy"][-1] == 1
    assert 0 < log.seconds < 60


@pytest.mark.parametrize("name", ["learning", "forgetting", "sft"])
def test_unequal_passes_count_by_their_terms(name):
    """Seven rows in batches of four, passes of two: the last one holds a single row, and tokens are
    spread unevenly. Weights are compared that one whole batch gives."""
    ends = {}
    for accumulation in (1, 2):
        model = tiny_llama()
        rows = pairs(model)[:7]
        for number, row in enumerate(rows):
            kept = [float(t <= number) for t in range(len(row["rejected"]))]
            row["rejected_weights"] = kept if number != 2 else [0.0] * len(kept)
        if name == "sft":
            rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
            rows[0]["response"] = rows[0]["response"][:1]
        schedule = Schedule(1e-3, 2, 4, 0, accumulation=accumulation)
        log = run_stage(model, rows, name, schedule, pad_token_id=0, key_share=0.5)
        ends[accumulation] = weights_of(model)
    assert len(log.loss) == 2 * 4
    for key, value in ends[1].items():
        assert torch.allclose(value, ends[2][key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (3, 3), (99, 4)])
def test_max_steps_ends_a_training_and_never_prolongs_it(most, steps):
    model = tiny_llama()
    before = weights_of(model)
    log = dpo(model, pairs(model), Schedule(1e-3, 2, 4, 0, max_steps=most))
    assert len(log.loss) == steps and not same(before, weights_of(model))


@pytest.mark.parametrize("rows, batch, told", [
    (8, 5, "batch_size 5 is no multiple of accumulation 2"),
    (0, 4, "study: no rows"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(rows, batch, told):
    model = tiny_llama()
    schedule = Schedule(1e-3, 1, batch, 0, accumulation=2)
    with pytest.raises(AlloError, match=told):
        dpo(model, pairs(model)[:rows], schedule, label="study")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("what", ["log-probs", "loss", "gradient norm"])
def test_a_divergence_names_its_step_and_leaves_the_weights_before_it(what, accumulation):
    """In the second pass of the third step, where there are two."""
    model, ends, calls = tiny_llama(), [], []
    bad = 3 * accumulation

    def turns_bad(logps, batch):
        calls.append(1)
        if len(calls) == bad and what == "gradient norm":
            logps.register_hook(lambda gradient: gradient * math.nan)
        return logps.sum() * (math.inf if len(calls) == bad and what == "loss" else 1.0), {}

    def collator(rows):
        if len(calls) >= bad - accumulation and not ends:
            ends.append(weights_of(model))
            if what == "log-probs":
                model.model.norm.register_forward_hook(lambda module, given, out: out * math.nan)
        return collate(rows, Layout(0))

    optimizer = MaskedAdamW(model, None, lr=1e-3)
    with pytest.raises(Diverged, match=f"the {what} became .* at step 2; lower the learning rate"):
        train(model, solutions(12), collator, turns_bad, optimizer,
              Schedule(1e-3, 1, accumulation, 0, accumulation=accumulation))  # fmt: skip
    optimizer.close()
    assert same(ends[0], weights_of(model))
    assert optimizer.refused is None and not hasattr(optimizer, "found_inf")


# --- checkpoints ---------------------------------------------------------------------------------

ALWAYS, NEVER = 1e-9, 1e9  # minutes: a checkpoint after every step, and none
STEPS = 8  # two epochs of four batches of two rows


class Stop(BaseException):
    """What Ctrl-C would be."""


def supervise(model, folder, minutes=NEVER, stop=None, accumulation=1, kind=None, **settings):
    """Train on solutions; the training ends right behind the checkpoint of the step `stop`."""
    mask = None
    if kind:
        scores = {name: value.float().abs() for name, value in weights_of(tiny_llama(7)).items()}
        mask = select_neurons(scores, 0.3, granularity=kind)
    checkpoints = Checkpoints(folder, minutes)
    write = checkpoints.write

    def write_then_stop(step, fill):
        write(step, fill)
        if step == stop:
            raise Stop

    checkpoints.write = write_then_stop
    schedule = Schedule(0.02, 2, 2, seed=5, accumulation=accumulation)
    return run_stage(model, solutions(), "sft", schedule, pad_token_id=0, mask=mask,
                     checkpoints=checkpoints, **settings)  # fmt: skip


def stopped(folder, step=3, **settings):
    with pytest.raises(Stop):
        supervise(tiny_llama(dtype=settings.pop("dtype", torch.float32)), folder, ALWAYS, step,
                  **settings)  # fmt: skip


@pytest.mark.parametrize("step, kind, dtype, accumulation", [
    (1, None, torch.float32, 1),
    (4, None, torch.float32, 2),  # at the end of an epoch
    (STEPS - 1, "scalar", torch.float32, 1),
    (3, "row", torch.float32, 2),
    (3, None, torch.bfloat16, 1),
    (3, "scalar", torch.bfloat16, 2),
    (3, "row", torch.bfloat16, 1),
])  # fmt: skip
def test_a_stopped_training_ends_with_the_same_bits(step, kind, dtype, accumulation, tmp_path):
    settings = {"kind": kind, "accumulation": accumulation}
    whole, again, masters, resumed = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype), {}, {}
    log = supervise(whole, tmp_path / "whole", masters=masters, **settings)
    stopped(tmp_path, step, dtype=dtype, **settings)
    kept = tmp_path / f"step-{step:09d}"
    assert [*tmp_path.iterdir()] == [kept]
    assert {path.suffix for path in kept.iterdir()} == {".json", ".safetensors"}
    torch.manual_seed(99)  # whatever another process did before
    log_again = supervise(again, tmp_path, masters=resumed, **settings)
    assert same(weights_of(whole), weights_of(again))
    assert same({n: v[1] for n, v in masters.items()}, {n: v[1] for n, v in resumed.items()})
    assert log_again.loss == log.loss and len(log.loss) == STEPS * accumulation
    assert log_again.metrics == log.metrics


def test_random_generators_come_back(tmp_path):
    def noisy():
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    whole, plain, broken, again = noisy(), tiny_llama(), noisy(), noisy()
    supervise(whole, tmp_path)
    supervise(plain, tmp_path)
    with pytest.raises(Stop):
        supervise(broken, tmp_path, ALWAYS, 3)
    supervise(again, tmp_path)
    assert not same(weights_of(whole), weights_of(plain)), "the dropout should do something"
    assert same(weights_of(whole), weights_of(again))


def test_a_finished_training_is_not_made_again_and_none_is_kept_before_its_time(tmp_path):
    first, second = tiny_llama(), tiny_llama()
    for minutes in (NEVER, 0):
        supervise(tiny_llama(), tmp_path, minutes)
        assert not [*tmp_path.iterdir()]
    supervise(first, tmp_path, ALWAYS)
    log = supervise(second, tmp_path, ALWAYS, stop=0)
    assert same(weights_of(first), weights_of(second)) and len(log.loss) == STEPS


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "manifest.json", None])
def test_a_damaged_checkpoint_is_named_and_not_used(name, tmp_path, capsys):
    """None: a file of it is gone."""
    whole, again = tiny_llama(), tiny_llama()
    supervise(whole, tmp_path / "whole")
    stopped(tmp_path)
    path = tmp_path / "step-000000003" / (name or "optimizer.safetensors")
    data = path.read_bytes()
    path.unlink()
    if name:
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    log = supervise(again, tmp_path)
    assert "step-000000003 is damaged" in capsys.readouterr().err
    assert same(weights_of(whole), weights_of(again)) and len(log.loss) == STEPS


def test_half_a_checkpoint_is_never_taken_for_one(tmp_path):
    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise Stop

    with pytest.raises(Stop):
        Checkpoints(tmp_path, ALWAYS).write(1, half)
    assert Checkpoints(tmp_path, ALWAYS).latest() is None and not list(tmp_path.iterdir())


def test_processes_with_checkpoints_of_different_steps_start_over_and_keep_none(
    tmp_path, monkeypatch
):
    """One that stayed would later stand in the place of a new one of its name."""
    stopped(tmp_path, 3)
    monkeypatch.setattr(trainer.devices, "each", lambda own: torch.stack([own, own - 1]))
    assert Checkpoints(tmp_path, ALWAYS).latest() is None and not [*tmp_path.iterdir()]


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, model = tiny_llama(), tiny_llama()
    supervise(whole, tmp_path)
    monkeypatch.setattr("allo_lib.engine.trainer.seal", full)
    supervise(model, tmp_path, ALWAYS)
    assert same(weights_of(whole), weights_of(model))
    assert "No space left" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_checkpoint_of_another_mask_is_refused(tmp_path):
    stopped(tmp_path, kind="scalar")
    with pytest.raises(AlloError, match="another mask"):
        supervise(tiny_llama(), tmp_path, kind="row")


# --- the steps of the method ---------------------------------------------------------------------

COMMON = {"beta": 0.1, "pad_token_id": 0}


def schedule(lr=1e-3, seed=4, **settings):
    return Schedule(lr, 1, 3, seed, **settings)


@pytest.mark.parametrize(
    ("tied", "steps", "accumulation"),
    [(False, None, 1), (True, None, 1), (False, 2, 1), (False, 2, 3)],
)
def test_gradient_scores_are_summed_absolute_gradients(tied, steps, accumulation):
    model = tiny_llama(tied=tied)
    rows, before = pairs(model), weights_of(model)
    sum(value.square().sum() for value in model.parameters()).backward()  # of something before
    plan = schedule(max_steps=steps, accumulation=accumulation)
    scores = gradient_scores(model, rows, plan, **COMMON)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())

    def policy_sum(row, side):
        ids = torch.tensor([row["prompt"] + row[side]])
        labels = ids.clone()
        labels[:, : len(row["prompt"])] = -100
        return token_logps(model(input_ids=ids).logits, labels).sum()

    def reference_sum(row, side):
        return torch.tensor(row[f"{side}_reference"]).sum()

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4)).tolist()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    size = 3 // accumulation  # every forward pass by itself, of as many pairs together
    for chunk in [order[i : i + size] for i in range(0, 8, size)][: steps and steps * accumulation]:
        sides = [
            torch.stack([value(rows[i], side) for i in chunk])
            for value in (policy_sum, reference_sum)
            for side in ("chosen", "rejected")
        ]
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(dpo_loss(*sides, beta=0.1).mean(), parameters)
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.abs()
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name].dtype == torch.float32
        assert torch.allclose(scores[name], value, rtol=1e-3, atol=1e-6), name


def test_a_loss_of_whole_batches_is_not_made_of_several_passes(monkeypatch):
    """Nor by several processes: BCO's shift is the mean of the batch."""
    model = tiny_llama()
    plan = schedule(accumulation=3)
    with pytest.raises(AlloError, match="bco judges whole batches: .* accumulation 1"):
        run_stage(model, pairs(model), "bco", plan, pad_token_id=0)
    monkeypatch.setattr(devices, "count", lambda: 2)
    with pytest.raises(AlloError, match="bco judges whole batches"):
        run_stage(None, [], "bco", None, pad_token_id=0)


def test_delta_scores_are_the_way_of_the_weights_over_the_rate():
    model = tiny_llama()
    rows, before = pairs(model), weights_of(model)
    scores, record = delta_of_dpo(model, rows, schedule(), **COMMON)
    for name, after in weights_of(model).items():
        assert torch.allclose(scores[name], (after - before[name]).abs() / 1e-3, rtol=1e-5), name
    assert record["lr"] == 1e-3 and len(record["loss"]) == 3
    assert record["moved_float32"] > 0.9


def test_small_updates_of_bf16_weights_are_seen_in_the_masters():
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    scores, record = delta_of_dpo(model, pairs(model), schedule(lr=1e-6), **COMMON)
    total = sum(value.numel() for value in before.values())
    changed = moved(before, weights_of(model)) / total
    assert changed < 0.1 and record["moved_bfloat16"] == pytest.approx(changed)
    assert record["moved_float32"] > 0.9
    assert sum(int((score > 0).sum()) for score in scores.values()) > 0.9 * total


def test_scores_are_reproducible_and_their_order_is_seeded():
    def scores(seed):
        model = tiny_llama()
        return delta_of_dpo(model, pairs(model), schedule(seed=seed), **COMMON)[0]["lm_head.weight"]

    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


def test_ties_are_told_where_all_neurons_are_ranked_together():
    scores = {"a": torch.tensor([3.0, 1, 1, 0]), "b": torch.tensor([[1.0, 2]])}
    mask, ties = find_neurons(scores, 0.5)
    assert {name: places.tolist() for name, places in mask.indices.items()} == {
        "a": [0, 1],
        "b": [1],
    }
    assert ties == {"zeros": 1, "tied": 3, "tied_kept": 1}
    for other in ({"scope": "tensor"}, {"granularity": "row"}):
        assert find_neurons(scores, 0.5, **other)[1] == {}
