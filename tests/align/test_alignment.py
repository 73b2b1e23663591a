"""`align` on small models: what it trains and gives back, and what is refused in one line."""

import json
import math
import shutil
import types

import pytest
import torch
from datasets import Dataset
from refusals import refused
from test_bad_models import PAIRS, QUICK
from tiny_models import ROUTED, made, micro, moved, tiny_llama, weights_of, words
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from allo_lib import align, align_setup, allo
from allo_lib.data import miniature
from allo_lib.engine import models
from allo_lib.engine.trainer import Checkpoints
from allo_lib.errors import Diverged
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask
from allo_lib.profiles.profile_files import load_profile

FAST = {"batch_size": 4, "importance_rate": 1e-3, "forgetting_rate": 1e-2, "learning_rate": 1e-2}
LEAN = {"estimator": "gradient", "rewriter_neurons": "kept"}
NO_FORGETTING = ("importance", "learning")


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


def same(before, model) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.fixture
def stages(monkeypatch):
    """Calls of `allo.run_stage`: name of the loss -> (number of rows, mask, masters it begins
    from)."""
    calls, real = {}, allo.run_stage

    def spy(model, rows, name, schedule, **settings):
        calls[name] = len(rows), settings["mask"], dict(settings.get("masters") or {})
        return real(model, rows, name, schedule, **settings)

    monkeypatch.setattr(allo, "run_stage", spy)
    return calls


# --- what is trained, and what is written --------------------------------------------------------


def test_all_stages_move_kept_entries_only_and_the_folder_loads(tokenizer, pairs, tmp_path):
    model = micro(tokenizer)
    before = weights_of(model)
    result = align(model, tokenizer, pairs, config=FAST | {"epochs": 2}, output_dir=tmp_path)
    assert set(result.logs) == {"importance", "rewriter", "forgetting", "learning"}
    assert result.mask.kept == round(0.1 * result.mask.total)
    assert moved(before, weights_of(model), result.mask) > 0.5 * result.mask.kept
    assert same(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path)), model)
    assert NeuronMask.load(tmp_path / "mask.safetensors").overlap(result.mask) == 1
    record = json.loads((tmp_path / "align.json").read_text())
    assert record["config"]["learning_rate"] == FAST["learning_rate"]
    assert record["loss"]["learning"] == result.logs["learning"].loss
    # A later call without "importance" trains the neurons that are saved there.
    model = micro(tokenizer)
    later = align(
        model, tokenizer, pairs, stages=("learning",), config=FAST, output_dir=tmp_path
    )  # fmt: skip
    assert later.mask.overlap(result.mask) == 1 and moved(before, weights_of(model), later.mask)


def test_learning_goes_on_from_the_masters_of_forgetting(tokenizer, pairs, tmp_path, stages):
    model = micro(tokenizer).bfloat16()
    # Rates at which bf16 weights hardly move: only the masters know of the forgetting.
    rates = {"forgetting_rate": 1e-7, "importance_rate": 1e-3}
    result = align(model, tokenizer, pairs, config=FAST | rates, output_dir=tmp_path)
    masters = stages["learning"][2]
    assert stages["sft"][2] == stages["forgetting"][2] == {}
    assert masters.keys() == {n for n, i in result.mask.indices.items() if i.numel()}
    unrounded = [values != values.bfloat16().float() for _, values in masters.values()]
    assert torch.cat(unrounded).float().mean() > 0.5


def test_lean_settings_use_no_dense_state(tokenizer, pairs, tmp_path, stages):
    """No optimizer for the scores, and the same neurons in every stage, the reward model's too."""
    model = micro(tokenizer)
    before = weights_of(model)
    result = align(model, tokenizer, pairs, config=FAST | LEAN, output_dir=tmp_path)
    assert [*stages] == ["sft", "forgetting", "learning"]
    assert all(mask is result.mask for _, mask, _ in stages.values())
    assert moved(before, weights_of(model), result.mask) > 0.5 * result.mask.kept


@pytest.mark.parametrize(
    ("name", "kind", "feed_forward", "key_value_heads", "part"),
    [pytest.param("llama2-7b", "llama", 11008, 32, 1, marks=pytest.mark.slow),
     ("llama2-7b", "llama", 11008, 32, 4), ("mistral-7b", "mistral", 14336, 8, 4)],
)  # fmt: skip
def test_two_layers_of_a_7b_model_are_aligned_by_its_profile(
    name, kind, feed_forward, key_value_heads, part, tokenizer, pairs, tmp_path
):
    """Of its widths, or a quarter of them, in the dtype that this CPU multiplies fastest."""
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=4096 // part,
        intermediate_size=feed_forward // part, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=32 // part, num_key_value_heads=key_value_heads // part,
        max_position_embeddings=2048,
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
    assert same(weights_of(type(model).from_pretrained(tmp_path)), model)
    shutil.rmtree(tmp_path)  # gigabytes, at the real widths


# --- few pairs, and none that count --------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 16])
def test_a_single_step_trains(tmp_path, count):
    pairs = [{"prompt": f"w{i}", "chosen": "w3", "rejected": f"w{4 + i}"} for i in range(count)]
    model, rates = tiny_llama(), {key: 1e-2 for key in QUICK if key.endswith("rate")}
    before = weights_of(model)
    result = align(model, words(), pairs, config=rates, output_dir=tmp_path)
    assert [len(log.loss) for log in result.logs.values()] == [1, 1, 1, 1]
    assert moved(before, weights_of(model), result.mask) > 0.5 * result.mask.kept


def test_an_alignment_that_changed_nothing_is_refused(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    config = {"importance_rate": 1e-2, "forgetting_rate": 1e-12, "learning_rate": 1e-12}
    with refused("the stages changed no weight (in torch.bfloat16); raise forgetting_rate"):
        align(model, words(), PAIRS, config=config, output_dir=tmp_path)
    assert same(before, model) and not (tmp_path / "model.safetensors").exists()


# --- stopped calls -------------------------------------------------------------------------------

# Four stages of two steps each, and a checkpoint after every step.
TWO_STEPS = QUICK | {"epochs": 2, "checkpoint_minutes": 1e-9}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    model = tiny_llama()
    align(model, words(), PAIRS, config=TWO_STEPS, output_dir=tmp_path_factory.mktemp("whole"))
    return weights_of(model)


@pytest.mark.parametrize(
    ("owner", "method", "number", "stop"),
    [
        (MaskedAdamW, "step", 1, KeyboardInterrupt()),
        (MaskedAdamW, "step", 3, RuntimeError("out of memory")),
        (MaskedAdamW, "step", 6, Diverged("x")),
        (Checkpoints, "write", 8, KeyboardInterrupt()),  # the end of the last stage
        (torch.nn.Module, "save_pretrained", 1, OSError("no space left on device")),
    ],
)
def test_the_same_call_after_a_stop_is_the_unstopped_one(
    tmp_path, monkeypatch, unstopped, owner, method, number, stop
):
    """The model is the same object in both calls."""
    model = tiny_llama().eval()
    owner = type(model) if owner is torch.nn.Module else owner
    before, count, real = weights_of(model), [], getattr(owner, method)

    def interrupted(*arguments, **settings):
        result = real(*arguments, **settings)
        count.append(1)
        if len(count) == number:
            raise stop
        return result

    with monkeypatch.context() as patch, pytest.raises(type(stop)):
        patch.setattr(owner, method, interrupted)
        align(model, words(), PAIRS, config=TWO_STEPS, output_dir=tmp_path)
    assert same(before, model) and not model.training and model.config.use_cache
    assert all(value.requires_grad for value in model.parameters())
    assert (tmp_path / ".checkpoints").is_dir() or number == 1 and method == "step"
    align(model, words(), PAIRS, config=TWO_STEPS, output_dir=tmp_path)
    assert same(unstopped, model) and not (tmp_path / ".checkpoints").exists()


def test_what_a_stopped_call_with_other_pairs_left_is_told(tmp_path, capsys):
    left = tmp_path / ".checkpoints" / "0123"
    left.mkdir(parents=True)
    config = QUICK | {"learning_rate": 1e-2}
    align(tiny_llama(), words(), PAIRS, stages=["learning"], config=config, output_dir=tmp_path)
    assert f"{left.parent} has what a stopped call with other pairs" in capsys.readouterr().out
    assert left.exists()


def test_the_folder_that_the_model_is_of_is_not_written_to(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model, here = AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path.parent / tmp_path.name
    with refused("is the model's own folder; name another"):
        align(model, words(), PAIRS, config=QUICK, output_dir=here)


# --- dropout and states --------------------------------------------------------------------------

WITH_DROPOUT = {
    "llama": dict(attention_dropout=0.1),
    "gpt2": {},  # 0.1 in embeddings, attention and layers, by default
    "opt": dict(dropout=0.1, attention_dropout=0.1, layerdrop=0.1, word_embed_proj_dim=16),
    "mixtral": ROUTED | dict(router_jitter_noise=0.5, router_aux_loss_coef=0.0),
}


@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", "eval"), ("gpt2", "train"), ("opt", "train"), ("mixtral", "eval")]
)
def test_nothing_drops_out_and_all_rates_and_modes_are_given_back(tmp_path, kind, mode):
    model = getattr(made(kind, **WITH_DROPOUT[kind]), mode)()
    parts = dict(model.named_modules())
    rates = {
        (name, key): value
        for name, part in parts.items()
        for key, value in vars(part).items()
        if isinstance(value, float)
    }
    settings = model.config.to_dict()
    result = align(
        model, words(), PAIRS, stages=NO_FORGETTING, config=QUICK, output_dir=tmp_path
    )  # fmt: skip
    for log in result.logs.values():
        assert log.loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(part.training == (mode == "train") for part in parts.values())
    assert rates and all(getattr(parts[name], key) == value for (name, key), value in rates.items())
    saved = AutoConfig.from_pretrained(tmp_path).to_dict()
    for after in (model.config.to_dict(), saved):
        drops = {k for k in settings if "drop" in k or "jitter" in k or k == "use_cache"}
        assert drops and all(after[key] == settings[key] for key in drops)


def test_the_row_of_an_end_token_that_pads_gets_its_gradient():
    model = made("llama", tie_word_embeddings=False)
    read = model.get_input_embeddings()
    read.padding_idx = 1  # torch gives this row none
    with align_setup.as_found(model):
        model(torch.tensor([[3, 1, 4]])).logits[0, -1, 0].backward()
    assert read.weight.grad[[1, 3]].any(dim=1).all() and read.padding_idx == 1


# --- lengths -------------------------------------------------------------------------------------

LONG = {"prompt": "w1 " * 70, "chosen": "w3", "rejected": "w4"}
# 3 + 2 tokens and headings of 6 words: the reward model's row is longer than the pair's.
CLOSE = {"prompt": "w1 " * 50, "chosen": "w3 " * 5, "rejected": "w5 " * 4}


def test_long_pairs_are_dropped_counted_and_listed(tmp_path, capsys):
    model, pairs = tiny_llama(), [PAIRS[0], LONG, *PAIRS[1:], LONG]
    align(model, words(), pairs, config=QUICK, output_dir=tmp_path / "a")
    assert "2 of 6 pairs are longer than 64 tokens and dropped" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "align.json").read_text())
    left_out = {"overlong": [1, 5], "not_forgotten": [], "held_out": [], "development": []}
    assert record["left_out"] == left_out
    without = tiny_llama()
    align(without, words(), PAIRS, config=QUICK, output_dir=tmp_path / "b")
    assert same(weights_of(without), model)
    for some, config, why in (
        (pairs, {"overlong": "raise"}, "pair 1: 72 tokens, but the longest row is 64"),
        ([LONG], {}, "pair 0: 72 tokens"),
        (pairs, {"overlong": "cut"}, "overlong: got 'cut', expected 'drop' or 'raise'"),
        ([], {}, "no pairs were given"),
    ):
        with refused(why):
            align(tiny_llama(), words(), some, config=config, output_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_rows_of_the_reward_model_that_do_not_fit_are_told_before_training(
    tmp_path, capsys, stages
):
    config = QUICK | {"estimator": "gradient"}
    align(tiny_llama(), words(), [*PAIRS, CLOSE], config=config, output_dir=tmp_path)
    assert "1 pairs take no part in 'forgetting'" in capsys.readouterr().out
    assert json.loads((tmp_path / "align.json").read_text())["left_out"]["not_forgotten"] == [4]
    read = {name: rows for name, (rows, *_) in stages.items()}
    assert read == {"sft": 4, "forgetting": 4, "learning": 5}
    with refused("no pair's prompt, chosen and rejected response fit into 64 tokens"):
        align(tiny_llama(), words(), [CLOSE], output_dir=tmp_path / "none")
    align(
        tiny_llama(), words(), [CLOSE], stages=NO_FORGETTING, config=QUICK, output_dir=tmp_path
    )  # fmt: skip


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "count", "environment", "told"),
    [("cuda", 2, {"RANK": "0"}, True), ("cuda", 2, {"LOCAL_RANK": "0"}, False),
     ("cuda", 1, {}, False), ("cpu", 2, {}, False)],
)  # fmt: skip
def test_other_gpus_are_told_of_where_no_launcher_shares_them(
    monkeypatch, device, count, environment, told
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(align_setup.os, "environ", environment)
    found = align_setup.other_gpus(types.SimpleNamespace(device=torch.device(device)))
    assert told == any("uses one of 2 visible GPUs; start it by `accelerate" in x for x in found)
