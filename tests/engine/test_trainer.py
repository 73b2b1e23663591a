"""The training loop: every row once an epoch, a cosine schedule, a clear end when it diverges."""

import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny_llama, weights_of

from allo_lib.allo import run_stage
from allo_lib.engine.batching import Layout, collate
from allo_lib.engine.checkpoints import Checkpoints
from allo_lib.engine.forward import logps_of_rows
from allo_lib.engine.trainer import Diverged, Numbers, Schedule, train
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.method.losses import objective
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


@pytest.mark.parametrize("warmup, steps", [(0.1, 20), (0.25, 8), (0.0, 5)])
def test_the_rate_rises_and_falls_as_a_cosine(warmup, steps):
    model = tiny_llama()
    optimizer = Watched(model, None, lr=0.5)
    rows = solutions(steps)
    plain = Layout(0)
    train(model, rows, lambda batch: collate(batch, plain), lambda logps, _: (0 * logps.sum(), {}),
          optimizer, Schedule(1e-2, 1, 1, 0, warmup=warmup))  # fmt: skip
    optimizer.close()
    rising = math.ceil(warmup * steps)
    expected = [
        step / rising if step < rising
        else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        for step in range(steps)
    ]  # fmt: skip
    assert optimizer.rates == pytest.approx([0.5 * part for part in expected], abs=1e-9)


def test_it_learns_and_logs():
    model = tiny_llama()
    rows = pairs(model)
    log = dpo(model, rows, Schedule(3e-3, 6, 4, 0))
    assert log.loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert log.loss[-1] < 0.6 * log.loss[0]
    assert len(log.loss) == len(log.metrics["reward_margin"]) == 12
    assert log.metrics["reward_accuracy"][-1] == 1
    # What the two responses of a pair share is read once; padding is not counted.
    read = 0
    for r in rows:
        both = [r["prompt"] + r[side] for side in ("chosen", "rejected")]
        read += len({tuple(s[: n + 1]) for s in both for n in range(len(s))})
    assert log.tokens == 6 * read and log.seconds > 0


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    ends = []
    for seed in (1, 1, 2):
        model = tiny_llama()
        torch.manual_seed(len(ends))  # whatever the global generator stands at
        log = dpo(model, pairs(model), Schedule(1e-3, 1, 2, seed))
        ends.append((log.loss, weights_of(model)))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])
    assert any(not torch.equal(ends[0][1][name], ends[2][1][name]) for name in ends[0][1])


def test_accumulated_passes_are_one_step():
    ends = {}
    for accumulation in (1, 2):
        model = tiny_llama()
        log = dpo(model, pairs(model), Schedule(1e-3, 2, 4, 0, accumulation=accumulation))
        losses = torch.tensor(log.loss).view(-1, accumulation).mean(dim=1)
        ends[accumulation] = losses, weights_of(model)
    assert len(ends[1][0]) == 4
    assert torch.allclose(ends[1][0], ends[2][0], atol=1e-5)
    for name, value in ends[1][1].items():
        assert torch.allclose(value, ends[2][1][name], atol=1e-5), name


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


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_max_steps_ends_a_training_and_never_prolongs_it(most, steps):
    model = tiny_llama()
    before = weights_of(model)
    log = run_stage(
        model, pairs(model), "dpo", Schedule(1e-3, 2, 4, 0, max_steps=most), pad_token_id=0
    )
    assert len(log.loss) == steps
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_batches_that_do_not_divide_are_refused():
    model = tiny_llama()
    with pytest.raises(AlloError, match="batch_size 5 is no multiple of accumulation 2"):
        dpo(model, pairs(model), Schedule(1e-3, 1, 5, 0, accumulation=2))


def test_no_rows_is_told():
    with pytest.raises(AlloError, match="study: no rows"):
        dpo(tiny_llama(), [], Schedule(1e-3, 1, 4, 0), label="study")


@pytest.fixture
def late(monkeypatch):
    """Numbers are looked at a step late, as on a GPU."""
    begin = Numbers.__init__

    def begin_late(self, *given, **named):
        begin(self, *given, **named)
        self.late = True

    monkeypatch.setattr(Numbers, "__init__", begin_late)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_numbers_read_late_are_the_same_numbers(accumulation, request):
    def run():
        model = tiny_llama()
        schedule = Schedule(3e-3, 2, 4, 0, accumulation=accumulation)
        return dpo(model, pairs(model), schedule), weights_of(model)

    log, end = run()
    request.getfixturevalue("late")
    log_late, end_late = run()
    assert log_late.loss == log.loss and log_late.metrics == log.metrics
    assert log_late.tokens == log.tokens
    assert all(torch.equal(end[name], end_late[name]) for name in end)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_divergence_told_late_leaves_the_weights_before_it_and_names_its_own_batch(
    what, request, tmp_path
):
    """The steps that a GPU has begun by then change nothing."""

    def run(folder):
        model, calls, seen = tiny_llama(), [], []

        def turns_bad(logps, batch):
            calls.append(1)
            seen.append(batch["input_ids"])
            bad = len(calls) == 3
            if bad and what == "gradient norm":
                logps.register_hook(lambda grad: grad * math.nan)
            return logps.sum() * (math.inf if bad and what == "loss" else 1.0), {}

        optimizer = MaskedAdamW(model, None, lr=1e-3)
        with pytest.raises(Diverged, match=f"the {what} became .* at step 2") as told:
            train(model, solutions(12), lambda rows: collate(rows, Layout(0)), turns_bad, optimizer,
                  Schedule(1e-3, 1, 2, 0), checkpoints=Checkpoints(folder, 1e9))  # fmt: skip
        optimizer.close()
        batch = weights.read_tensors(told.value.batch)
        assert torch.equal(batch["input_ids"], seen[2])
        assert optimizer.refused is None and not hasattr(optimizer, "found_inf")
        return weights_of(model), len(calls)

    end, calls = run(tmp_path / "at once")
    request.getfixturevalue("late")
    end_late, calls_late = run(tmp_path / "late")
    assert calls_late > calls == 3
    assert all(torch.equal(end[name], end_late[name]) for name in end)


def test_a_rate_that_is_far_too_large_ends_clearly_and_frees_the_model():
    model = tiny_llama()
    with pytest.raises(Diverged, match="lower the learning rate"):
        dpo(model, pairs(model), Schedule(1e38, 3, 2, 0, warmup=0), max_grad_norm=None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ["sft", "npo", "dpo", "learning", "forgetting"])
def test_a_masked_stage_keeps_every_other_bit(name):
    model = tiny_llama()
    before = weights_of(model)
    mask = select_neurons({n: p.abs() for n, p in before.items()}, 0.1)
    rows = solutions() if name == "sft" else pairs(model)
    if name == "forgetting":
        rows = [row | {"rejected_weights": [1.0] * len(row["rejected"])} for row in rows]
    schedule = Schedule(1e-2, 1, 4, 0)
    run_stage(model, rows, name, schedule, pad_token_id=0, mask=mask, key_share=0.5)
    moved = 0
    for key, value in weights_of(model).items():
        kept = mask.dense(key)
        assert torch.equal(value[~kept], before[key][~kept]), key
        moved += int((value[kept] != before[key][kept]).sum())
    assert moved > 0.9 * mask.kept
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_from_their_file(tmp_path, tied):
    model, other = tiny_llama(1, tied), tiny_llama(2, tied)
    weights.save(model, tmp_path / "model.safetensors")
    weights.restore(other, weights.read_tensors(tmp_path / "model.safetensors"))
    ids = torch.arange(2, 12)[None]
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_snapshot_does_not_follow_the_model_and_displacement_is_euclidean():
    model = tiny_llama()
    before = weights.snapshot(model)
    assert weights.displacement(model, before) == 0
    with torch.no_grad():
        model.model.norm.weight += 3
        model.lm_head.weight[0, 0] += 4
    assert weights.displacement(model, before) == pytest.approx((16 * 9 + 16) ** 0.5)
    weights.restore(model, before)
    assert weights.displacement(model, before) == 0
