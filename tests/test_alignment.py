"""`align` on a small model: the stages do what they say, and bad input is told in one line."""

import gc
import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.initialization import no_init_weights

from allo_lib import align, alignment
from allo_lib.alignment import AlignConfig
from allo_lib.data import miniature
from allo_lib.engine import models
from allo_lib.engine.checkpoints import Checkpoints
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.profile_files import load_profile

FAST = {"batch_size": 4, "importance_rate": 1e-3, "forgetting_rate": 1e-2, "learning_rate": 1e-2}


def small_model(tokenizer):
    return models.micro_llama(
        len(tokenizer),
        width=16,
        layers=2,
        heads=2,
        feed_forward=32,
        context=128,
        initializer_range=0.05,
        seed=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture
def tokenizer():
    return miniature.tokenizer()


@pytest.fixture
def pairs():
    rows = [
        {"prompt": p.prompt, "chosen": "therefore 1", "rejected": f"so {2 + i % 5}"}
        for i, p in enumerate(miniature.problems("chain", "pairs", 12, 0))
    ]
    return Dataset.from_list(rows)


def test_all_stages_move_kept_entries_only(tokenizer, pairs, tmp_path):
    model = small_model(tokenizer)
    before = weights.snapshot(model)
    result = align(model, tokenizer, pairs, config=FAST | {"epochs": 2}, output_dir=tmp_path)
    assert set(result.logs) == {"importance", "rewriter", "forgetting", "learning"}
    assert result.mask.kept == round(0.1 * result.mask.total)
    moved = 0
    for name, parameter in model.named_parameters():
        kept = result.mask.dense(name)
        assert torch.equal(parameter[~kept], before[name][~kept])
        moved += int((parameter[kept] != before[name][kept]).sum())
    assert moved > 0.5 * result.mask.kept


def test_learning_goes_on_from_the_masters_of_forgetting(tokenizer, pairs, tmp_path, monkeypatch):
    begun, real = {}, alignment.run_stage

    def spy(model, rows, objective, schedule, *, masters, **settings):
        begun[objective] = None if masters is None else dict(masters)
        return real(model, rows, objective, schedule, masters=masters, **settings)

    monkeypatch.setattr(alignment, "run_stage", spy)
    model = small_model(tokenizer).bfloat16()
    # Rates at which bf16 weights hardly move: only the masters know of the forgetting.
    rates = {"forgetting_rate": 1e-7, "importance_rate": 1e-3}
    result = align(model, tokenizer, pairs, config=FAST | rates, output_dir=tmp_path)
    assert begun["sft"] is None and begun["forgetting"] == {}
    assert begun["learning"].keys() == {n for n, i in result.mask.indices.items() if i.numel()}
    unrounded = [values != values.bfloat16().float() for _, values in begun["learning"].values()]
    assert torch.cat(unrounded).float().mean() > 0.5


LEAN = {"estimator": "gradient", "rewriter_neurons": "kept"}


@pytest.mark.parametrize("stopped", [3, 6, 11, 14, 22])
def test_a_stopped_call_goes_on_and_ends_with_the_same_weights(
    stopped, tokenizer, pairs, tmp_path, monkeypatch
):
    """Four stages of six steps each: the call is stopped within one or at the end of one."""
    settings = FAST | {"epochs": 2, "checkpoint_minutes": 1e-9}
    whole = small_model(tokenizer)
    align(whole, tokenizer, pairs, config=settings, output_dir=tmp_path / "whole")
    written, write = [], Checkpoints.write

    def stop(self, step, fill):
        write(self, step, fill)
        written.append(step)
        if len(written) == stopped:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "write", stop)
        model = small_model(tokenizer)
        align(model, tokenizer, pairs, config=settings, output_dir=tmp_path / "again")
    assert (tmp_path / "again" / ".checkpoints").is_dir()
    again = small_model(tokenizer)
    align(again, tokenizer, pairs, config=settings, output_dir=tmp_path / "again")
    for (name, first), second in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert not (tmp_path / "again" / ".checkpoints").exists()


def test_lean_settings_keep_by_gradient_and_train_kept_entries_only(
    tokenizer, pairs, tmp_path, monkeypatch
):
    masks, real = {}, alignment.run_stage

    def spy(model, rows, objective, schedule, *, mask, **settings):
        masks[objective] = mask
        return real(model, rows, objective, schedule, mask=mask, **settings)

    monkeypatch.setattr(alignment, "run_stage", spy)
    model = small_model(tokenizer)
    before = weights.snapshot(model)
    result = align(model, tokenizer, pairs, config=FAST | LEAN, output_dir=tmp_path)
    assert masks["sft"] is masks["forgetting"] is masks["learning"] is result.mask
    dense = align(
        small_model(tokenizer), tokenizer, pairs, stages=("importance",), config=FAST,
        output_dir=tmp_path / "delta",
    )  # fmt: skip
    assert result.mask.kept == dense.mask.kept and 0 < result.mask.overlap(dense.mask) < 1
    for name, parameter in model.named_parameters():
        kept = result.mask.dense(name)
        assert torch.equal(parameter[~kept], before[name][~kept])


def float_bytes_alive() -> int:
    """Bytes of all floating-point tensors that Python knows of, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.is_floating_point():
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("lean", [True, False])
def test_stages_hold_one_model_and_state_for_kept_entries(
    tokenizer, pairs, tmp_path, monkeypatch, lean
):
    """Counted when most is alive, between backward and update: no second model, no dense state."""
    model = small_model(tokenizer)
    size = sum(p.nbytes for p in model.parameters())
    before = float_bytes_alive()
    most, real = {}, MaskedAdamW.step
    stage = ["importance"]
    begin = alignment.run_stage

    def step(optimizer, closure=None):
        most[stage[0]] = max(most.get(stage[0], 0), float_bytes_alive() - before)
        return real(optimizer, closure)

    def spy(model, rows, objective, schedule, **settings):
        stage[0] = objective
        return begin(model, rows, objective, schedule, **settings)

    monkeypatch.setattr(MaskedAdamW, "step", step)
    monkeypatch.setattr(alignment, "run_stage", spy)
    config = FAST | (LEAN if lean else {})
    align(model, tokenizer, pairs, config=config, output_dir=tmp_path)
    # Master, two moments, the gradient and the value to go back to of a tenth: 20 bytes of 4. Some
    # hundred bytes are buffers of the model and of the test.
    kept = 0.1 * size * 5 + 4096
    assert most["forgetting"] <= kept and most["learning"] <= kept
    if lean:
        assert "importance" not in most  # no optimizer at all
        assert size <= most["sft"] <= size + kept  # the weights to go back to, on the host
    else:
        assert most["sft"] > 3 * size


def test_learning_raises_the_margin(tokenizer, pairs, tmp_path):
    model = small_model(tokenizer)
    config = FAST | {"epochs": 20, "learning_rate": 3e-3}
    result = align(
        model, tokenizer, pairs, stages=("importance", "learning"), config=config,
        output_dir=tmp_path,
    )  # fmt: skip
    losses = result.logs["learning"].loss
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert sum(losses[-3:]) / 3 < 0.6


def test_what_is_written_loads_again(tokenizer, pairs, tmp_path):
    model = small_model(tokenizer)
    result = align(model, tokenizer, pairs, config=FAST, output_dir=tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in again.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name])
    mask = NeuronMask.load(tmp_path / "mask.safetensors")
    assert mask.overlap(result.mask) == 1
    record = json.loads((tmp_path / "align.json").read_text())
    assert record["config"]["learning_rate"] == FAST["learning_rate"]
    assert record["loss"]["learning"] == result.logs["learning"].loss


def test_later_stages_take_the_saved_mask(tokenizer, pairs, tmp_path):
    first = align(
        small_model(tokenizer), tokenizer, pairs, stages=("importance",), config=FAST,
        output_dir=tmp_path,
    )  # fmt: skip
    model = small_model(tokenizer)
    before = weights.snapshot(model)
    second = align(model, tokenizer, pairs, stages=("learning",), config=FAST, output_dir=tmp_path)
    assert second.mask.overlap(first.mask) == 1
    for name, parameter in model.named_parameters():
        kept = first.mask.dense(name)
        assert torch.equal(parameter[~kept], before[name][~kept])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("learn",)}, "stages"),
        ({"stages": ()}, "stages"),
        ({"config": {"rate": 1}}, "unknown key 'rate'"),
        ({"config": {"estimator": "hessian"}}, "estimator: got 'hessian', expected 'delta' or"),
        ({"config": AlignConfig(rewriter_neurons="top")}, "rewriter_neurons: got 'top'"),
        ({"pairs": []}, "no pairs"),
        ({"pairs": [{"prompt": "calc", "chosen": "so 1"}]}, "lack the column 'rejected'"),
        ({"pairs": [{"prompt": "calc", "chosen": "so 1", "rejected": "so 1"}]}, "chosen equals"),
        (
            {"pairs": [{"prompt": "calc " * 300, "chosen": "so 1", "rejected": "so 2"}]},
            "longest row is 128",
        ),
    ],
)
def test_bad_input_is_one_line(tokenizer, pairs, tmp_path, change, message):
    arguments = {"pairs": pairs, "output_dir": tmp_path / "out"} | change
    with pytest.raises(AlloError, match=message) as caught:
        align(small_model(tokenizer), tokenizer, **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_a_tokenizer_without_pad_or_end_token_is_told(tokenizer, pairs, tmp_path, missing):
    model = small_model(tokenizer)
    setattr(tokenizer, missing, None)
    with pytest.raises(AlloError, match=missing.removesuffix("_token")):
        align(model, tokenizer, pairs, output_dir=tmp_path)


def two_layers(vocabulary: int):
    """A model of the widths of Llama-2-7B's config.json, and two of its 32 layers.

    Its dtype is what this CPU multiplies fastest: without units for bfloat16 that takes 20 times as
    long.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        pad_token_id=0,
    )
    dtype = models.DTYPES[models.dtype_on("cpu")]
    with no_init_weights():  # which would take longer than all that follows
        model = LlamaForCausalLM(config).to(dtype)
    for seed, value in enumerate(model.parameters()):
        # Of prime length, so that no two rows are alike.
        few = torch.randn(4099, generator=torch.Generator().manual_seed(seed)) * 0.02
        value.data = few.to(dtype).repeat(value.numel() // 4099 + 1)[: value.numel()].view_as(value)
        if value.ndim == 1:
            value.data.fill_(1.0)
    return model


@pytest.mark.slow
def test_two_layers_of_a_7b_model_are_aligned_by_its_profile(tokenizer, pairs, tmp_path):
    profile, model = load_profile("llama2-7b"), two_layers(len(tokenizer))
    method, domain = profile.method, profile.domains["questions"]
    settings = {
        "share": method.share,
        "beta": method.beta,
        "key_share": method.key_share,
        "max_grad_norm": method.max_grad_norm,
        "forgetting_rate": domain.rates.forgetting,
        "learning_rate": domain.rates.learning,
        "batch_size": domain.batch_size,
        "max_length": domain.max_length,
        "estimator": "gradient",
        "rewriter_neurons": "kept",
        "checkpoint_minutes": 0,
    }
    result = align(model, tokenizer, pairs.select([0, 1]), config=settings, output_dir=tmp_path)
    assert result.mask.kept == round(0.1 * result.mask.total)
    assert result.mask.total == sum(value.numel() for value in model.parameters())
    assert result.logs["learning"].loss == pytest.approx([math.log(2)], abs=1e-3)
    again = type(model).from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    shutil.rmtree(tmp_path)  # gigabytes
