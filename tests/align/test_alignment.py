"""`align` on a small model: the stages do what they say, and bad input is told in one line."""

import contextlib
import gc
import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from refusals import refused
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from allo_lib import align, allo
from allo_lib.data import miniature
from allo_lib.engine import models
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
    begun, real = {}, allo.run_stage

    def spy(model, rows, objective, schedule, *, masters=None, **settings):
        begun[objective] = None if masters is None else dict(masters)
        return real(model, rows, objective, schedule, masters=masters, **settings)

    monkeypatch.setattr(allo, "run_stage", spy)
    model = small_model(tokenizer).bfloat16()
    # Rates at which bf16 weights hardly move: only the masters know of the forgetting.
    rates = {"forgetting_rate": 1e-7, "importance_rate": 1e-3}
    result = align(model, tokenizer, pairs, config=FAST | rates, output_dir=tmp_path)
    assert begun["sft"] is None and begun["forgetting"] == {}
    assert begun["learning"].keys() == {n for n, i in result.mask.indices.items() if i.numel()}
    unrounded = [values != values.bfloat16().float() for _, values in begun["learning"].values()]
    assert torch.cat(unrounded).float().mean() > 0.5


LEAN = {"estimator": "gradient", "rewriter_neurons": "kept"}


def test_lean_settings_keep_by_gradient_and_train_kept_entries_only(
    tokenizer, pairs, tmp_path, monkeypatch
):
    masks, real = {}, allo.run_stage

    def spy(model, rows, objective, schedule, *, mask=None, **settings):
        masks[objective] = mask
        return real(model, rows, objective, schedule, mask=mask, **settings)

    monkeypatch.setattr(allo, "run_stage", spy)
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
                    storage = tensor.untyped_storage()
                    with contextlib.suppress(RuntimeError):  # a compiler's fakes have no bytes
                        found[storage.data_ptr()] = storage.nbytes()
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
    stage = [""]
    begin = allo.run_stage

    def step(optimizer, closure=None):
        most[stage[0]] = max(most.get(stage[0], 0), float_bytes_alive() - before)
        return real(optimizer, closure)

    def spy(model, rows, objective, schedule, **settings):
        stage[0] = objective
        return begin(model, rows, objective, schedule, **settings)

    monkeypatch.setattr(MaskedAdamW, "step", step)
    monkeypatch.setattr(allo, "run_stage", spy)
    config = FAST | (LEAN if lean else {})
    align(model, tokenizer, pairs, config=config, output_dir=tmp_path)
    # Master, two moments, the gradient and the value to go back to of a tenth: 20 bytes of 4. Some
    # hundred bytes are buffers of the model and of the test.
    kept = 0.1 * size * 5 + 4096
    assert most["forgetting"] <= kept and most["learning"] <= kept
    if lean:
        assert "dpo" not in most  # no optimizer at all
        assert size <= most["sft"] <= size + kept  # the weights to go back to, on the host
    else:
        assert min(most["dpo"], most["sft"]) > 3 * size


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


LONG = {"prompt": "calc " * 300, "chosen": "so 1", "rejected": "so 2"}


@pytest.mark.parametrize(("pairs", "told"), [([], "no pairs"), ([LONG], "longest row is 128")])
def test_no_pair_that_fits_is_told(tokenizer, tmp_path, pairs, told):
    with refused(told):
        align(small_model(tokenizer), tokenizer, pairs, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind", "feed_forward", "key_value_heads", "part"),
    [pytest.param("llama2-7b", LlamaConfig, 11008, 32, 1, marks=pytest.mark.slow),
     ("llama2-7b", LlamaConfig, 11008, 32, 4), ("mistral-7b", MistralConfig, 14336, 8, 4)],
)  # fmt: skip
def test_two_layers_of_a_7b_model_are_aligned_by_its_profile(
    name, kind, feed_forward, key_value_heads, part, tokenizer, pairs, tmp_path
):
    """Of its widths, or a quarter of them, in the dtype that this CPU multiplies fastest."""
    config = kind(
        vocab_size=len(tokenizer), hidden_size=4096 // part, intermediate_size=feed_forward // part,
        num_hidden_layers=2, num_attention_heads=32 // part,
        num_key_value_heads=key_value_heads // part, pad_token_id=0, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = models.DTYPES[models.dtype_on("cpu")]
    profile, model = load_profile(name), AutoModelForCausalLM.from_config(config).to(dtype)
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
        "checkpoint_minutes": 0,
    } | LEAN
    result = align(model, tokenizer, pairs.select([0, 1]), config=settings, output_dir=tmp_path)
    assert result.mask.kept == round(method.share * result.mask.total)
    assert result.mask.total == sum(value.numel() for value in model.parameters())
    assert result.logs["learning"].loss == pytest.approx([math.log(2)], abs=1e-3)
    again = type(model).from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    shutil.rmtree(tmp_path)  # gigabytes, at the real widths
