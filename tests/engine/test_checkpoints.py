"""A training that was stopped anywhere goes on from its checkpoint and ends with the same bytes."""

import errno
import math

import pytest
import torch
from tiny_models import tiny_llama, weights_of

from allo_lib.allo import run_stage
from allo_lib.engine.checkpoints import Checkpoints
from allo_lib.engine.trainer import Schedule
from allo_lib.errors import AlloError, Diverged
from allo_lib.method.neurons import select_neurons

ALWAYS = 1e-9  # minutes: a checkpoint after every step
NEVER = 1e9
ROWS = [
    {"prompt": [2 + i, 3, 4], "response": [5 + (7 * i + j) % 25 for j in range(2 + i % 3)]}
    for i in range(8)
]
STEPS = 8  # two epochs of four batches of two rows


class Stop(BaseException):
    """What Ctrl-C would be."""


def stopping_at(step: int):
    """What to call after a checkpoint: it ends the training when that many steps were made."""

    def check(done: int) -> None:
        if done == step:
            raise Stop

    return check


def train(model, folder, minutes=ALWAYS, stop=None, accumulation=1, granularity=None, **settings):
    mask = None
    if granularity:
        scores = {name: value.float().abs() for name, value in weights_of(tiny_llama(7)).items()}
        mask = select_neurons(scores, 0.3, granularity=granularity)
    checkpoints = Checkpoints(folder, minutes)
    if stop is not None:
        written = checkpoints.write

        def write_then_stop(step, fill):
            written(step, fill)
            stop(step)

        checkpoints.write = write_then_stop
    schedule = Schedule(0.02, 2, 2, seed=5, accumulation=accumulation)
    return run_stage(
        model, ROWS, "sft", schedule, pad_token_id=0, mask=mask, checkpoints=checkpoints, **settings
    )


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stop", [1, 4, STEPS - 1])
def test_stopped_after_any_step_it_ends_with_the_same_bits(stop, tmp_path):
    whole, broken, again = tiny_llama(), tiny_llama(), tiny_llama()
    log = train(whole, tmp_path / "whole", NEVER)
    with pytest.raises(Stop):
        train(broken, tmp_path / "broken", stop=stopping_at(stop))
    resumed = train(again, tmp_path / "broken", NEVER)
    assert same(weights_of(whole), weights_of(again))
    assert not same(weights_of(whole), weights_of(broken))
    assert resumed.loss == log.loss and len(log.loss) == STEPS
    assert resumed.metrics == log.metrics and resumed.tokens == log.tokens


@pytest.mark.parametrize(
    "granularity, dtype, accumulation",
    [
        (None, torch.float32, 2),
        ("scalar", torch.float32, 1),
        ("row", torch.float32, 2),
        (None, torch.bfloat16, 1),
        ("scalar", torch.bfloat16, 2),
        ("row", torch.bfloat16, 1),
    ],
)
def test_every_kind_of_optimizer_state_comes_back(granularity, dtype, accumulation, tmp_path):
    settings = {"granularity": granularity, "accumulation": accumulation}
    whole, broken, again = (tiny_llama(dtype=dtype) for _ in range(3))
    masters, resumed = {}, {}
    train(whole, tmp_path / "whole", NEVER, masters=masters, **settings)
    with pytest.raises(Stop):
        train(broken, tmp_path / "broken", stop=stopping_at(3), **settings)
    train(again, tmp_path / "broken", NEVER, masters=resumed, **settings)
    assert same(weights_of(whole), weights_of(again))
    assert same({n: v[1] for n, v in masters.items()}, {n: v[1] for n, v in resumed.items()})


def test_random_generators_come_back(tmp_path):
    def noisy():
        model = tiny_llama()
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model

    whole, again = noisy(), noisy()
    train(whole, tmp_path / "whole", NEVER)
    with pytest.raises(Stop):
        train(noisy(), tmp_path / "broken", stop=stopping_at(3))
    torch.manual_seed(99)  # whatever another process did before
    train(again, tmp_path / "broken", NEVER)
    plain = tiny_llama()
    train(plain, tmp_path / "plain", NEVER)
    assert not same(weights_of(whole), weights_of(plain)), "the dropout should do something"
    assert same(weights_of(whole), weights_of(again))


def test_a_finished_training_is_not_made_again(tmp_path):
    first, second = tiny_llama(), tiny_llama()
    train(first, tmp_path)
    log = train(second, tmp_path, stop=stopping_at(0))
    assert same(weights_of(first), weights_of(second)) and len(log.loss) == STEPS


def test_one_checkpoint_is_kept_and_holds_no_pickle(tmp_path):
    with pytest.raises(Stop):
        train(tiny_llama(), tmp_path, stop=stopping_at(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
    files = {path.name for path in (tmp_path / "step-000000003").iterdir()}
    assert files == {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
        "trainer_state.json",
    }


def test_none_is_written_before_its_time_or_when_switched_off(tmp_path):
    for minutes in (NEVER, 0):
        train(tiny_llama(), tmp_path / "none", minutes)
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_not_used(name, tmp_path, capsys):
    whole, again = tiny_llama(), tiny_llama()
    train(whole, tmp_path / "whole", NEVER)
    with pytest.raises(Stop):
        train(tiny_llama(), tmp_path / "broken", stop=stopping_at(3))
    path = tmp_path / "broken" / "step-000000003" / name
    data = path.read_bytes()
    path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    log = train(again, tmp_path / "broken", NEVER)
    assert "step-000000003 is damaged" in capsys.readouterr().err
    assert same(weights_of(whole), weights_of(again)) and len(log.loss) == STEPS


def test_half_a_checkpoint_is_never_taken_for_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALWAYS)

    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise Stop

    with pytest.raises(Stop):
        checkpoints.write(1, half)
    assert checkpoints.latest() is None and not list(tmp_path.iterdir())


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, model = tiny_llama(), tiny_llama()
    train(whole, tmp_path / "whole", NEVER)
    monkeypatch.setattr("allo_lib.engine.checkpoints.seal", full)
    train(model, tmp_path / "full")
    assert same(weights_of(whole), weights_of(model))
    assert "No space left" in capsys.readouterr().err


def test_a_checkpoint_of_another_mask_is_refused(tmp_path):
    with pytest.raises(Stop):
        train(tiny_llama(), tmp_path, stop=stopping_at(3), granularity="scalar")
    with pytest.raises(AlloError, match="another mask"):
        train(tiny_llama(), tmp_path, granularity="row")


# --- what is watched at every step --------------------------------------------------------------


def test_moved_is_the_share_of_kept_entries_that_changed(tmp_path):
    def moved(dtype, rate):
        model = tiny_llama(dtype=dtype)
        before = weights_of(model)
        log = run_stage(model, ROWS[:2], "sft", Schedule(rate, 1, 2, 0, 0), pad_token_id=0)
        after = weights_of(model)
        changed = sum(int((before[name] != after[name]).sum()) for name in before)
        return log.metrics["moved"][0], changed / sum(v.numel() for v in before.values())

    for dtype, rate in ((torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 1e-5)):
        told, counted = moved(dtype, rate)
        assert told == pytest.approx(counted, abs=1e-12)
    assert moved(torch.bfloat16, 1e-5)[0] < moved(torch.float32, 1e-5)[0]


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(tmp_path):
    model = tiny_llama()
    before = weights_of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(Diverged, match="gradient norm became nan at step 0") as told:
        train(model, tmp_path, NEVER)
    assert same(before, weights_of(model))
    assert str(told.value.batch) in str(told.value) and "\n" not in str(told.value)
    from safetensors.torch import load_file

    assert load_file(told.value.batch)["input_ids"].dtype == torch.int64
