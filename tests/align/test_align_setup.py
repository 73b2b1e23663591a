"""What a model comes back as from `align`: trained, or as it was given; and which are refused."""

import json
import math

import pytest
import torch
from refusals import refused
from test_bad_models import PAIRS, QUICK, words
from tiny_models import VOCABULARY, tiny_llama, weights_of
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from allo_lib import align, align_setup, allo
from allo_lib.engine.trainer import Checkpoints
from allo_lib.errors import Diverged
from allo_lib.method.masked_adamw import MaskedAdamW

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
    bos_token_id=2, initializer_range=0.3,
)  # fmt: skip


def same(before, model) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.named_parameters())


# --- few pairs, and none that count ---


@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_single_step_trains(tmp_path, count):
    pairs = [{"prompt": f"w{i}", "chosen": "w3", "rejected": f"w{4 + i}"} for i in range(count)]
    model, rates = tiny_llama(), {key: 1e-2 for key in QUICK if key.endswith("rate")}
    before = weights_of(model)
    result = align(model, words(), pairs, config=rates, output_dir=tmp_path)
    moved = sum(int((before[n] != value).sum()) for n, value in model.named_parameters())
    assert [len(log.loss) for log in result.logs.values()] == [1, 1, 1, 1]
    assert 0.5 * result.mask.kept < moved <= result.mask.kept
    assert result.logs["learning"].metrics["moved"][0] > 0.9


def test_an_alignment_that_changed_nothing_is_refused(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    config = {"importance_rate": 1e-2, "forgetting_rate": 1e-12, "learning_rate": 1e-12}
    with refused("the stages changed no weight (in torch.bfloat16); raise forgetting_rate"):
        align(model, words(), PAIRS, config=config, output_dir=tmp_path)
    assert same(before, model) and not (tmp_path / "model.safetensors").exists()


# --- stopped calls ---

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
        (MaskedAdamW, "step", 1, KeyboardInterrupt),
        (MaskedAdamW, "step", 3, RuntimeError("out of memory")),
        (MaskedAdamW, "step", 6, Diverged("x")),
        (Checkpoints, "write", 2, KeyboardInterrupt),  # the end of a stage
        (Checkpoints, "write", 5, KeyboardInterrupt),
        (Checkpoints, "write", 8, KeyboardInterrupt),  # of the last one
    ],
)
def test_the_same_call_after_a_stop_is_the_unstopped_one(
    tmp_path, monkeypatch, unstopped, owner, method, number, stop
):
    """The model is the same object in both calls."""
    model = tiny_llama().eval()
    before, count, real = weights_of(model), [], getattr(owner, method)

    def interrupted(*arguments):
        result = real(*arguments)
        count.append(1)
        if len(count) == number:
            raise stop
        return result

    with monkeypatch.context() as patch, pytest.raises(BaseException) as caught:
        patch.setattr(owner, method, interrupted)
        align(model, words(), PAIRS, config=TWO_STEPS, output_dir=tmp_path)
    assert caught.type is (stop if isinstance(stop, type) else type(stop))
    assert same(before, model) and not model.training and model.config.use_cache
    assert all(value.requires_grad for value in model.parameters())
    assert (tmp_path / ".checkpoints").is_dir() or number == 1
    align(model, words(), PAIRS, config=TWO_STEPS, output_dir=tmp_path)
    assert same(unstopped, model) and not (tmp_path / ".checkpoints").exists()


def test_a_save_that_fails_gives_the_weights_back(tmp_path, monkeypatch):
    model = tiny_llama()
    before = weights_of(model)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        align(model, words(), PAIRS, config=QUICK, output_dir=tmp_path)
    assert same(before, model)


# --- dropout and states ---


def dropping(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1))
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                            pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip
        return GPT2LMHeadModel(config)  # 0.1 in embeddings, attention and layers, by default
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
        attention_dropout=0.1, dropout=0.1, layerdrop=0.1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_drops_out_and_all_rates_and_modes_are_given_back(tmp_path, kind, mode):
    model = getattr(dropping(kind), mode)()
    rates = {
        (name, key): value
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, float)
    }
    settings = {key: value for key, value in vars(model.config).items() if key != "architectures"}
    stages = ("importance", "learning")
    result = align(model, words(), PAIRS, stages=stages, config=QUICK, output_dir=tmp_path)
    for log in result.logs.values():
        assert log.loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(part.training == (mode == "train") for part in model.modules())
    parts = dict(model.named_modules())
    assert rates and all(getattr(parts[name], key) == value for (name, key), value in rates.items())
    assert {key: vars(model.config)[key] for key in settings if key != "dtype"} == {
        key: value for key, value in settings.items() if key != "dtype"
    }
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: settings[key] for key in saved if "drop" in key} == {
        key: value for key, value in saved.items() if "drop" in key
    }
    assert model.config.use_cache is True and saved.get("use_cache", True) is True


# --- lengths ---

LONG = {"prompt": "w1 " * 70, "chosen": "w3", "rejected": "w4"}
# 3 + 2 tokens and headings of 6 words: the reward model's row is longer than the pair's.
CLOSE = {"prompt": "w1 " * 50, "chosen": "w3 " * 5, "rejected": "w5 " * 4}


def test_long_pairs_are_dropped_counted_and_listed(tmp_path, capsys):
    model, pairs = tiny_llama(), [PAIRS[0], LONG, *PAIRS[1:], LONG]
    result = align(model, words(), pairs, config=QUICK, output_dir=tmp_path / "a")
    assert "2 of 6 pairs are longer than 64 tokens and dropped" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "align.json").read_text())
    left_out = {"overlong": [1, 5], "not_forgotten": [], "held_out": [], "development": []}
    assert record["left_out"] == left_out
    without = tiny_llama()
    align(without, words(), PAIRS, config=QUICK, output_dir=tmp_path / "b")
    assert same(weights_of(without), model) and result.mask.kept
    with refused("pair 1: 72 tokens, but the longest row is 64"):
        align(tiny_llama(), words(), pairs, config={"overlong": "raise"}, output_dir=tmp_path / "c")
    with refused("pair 0: 72 tokens"):
        align(tiny_llama(), words(), [LONG], output_dir=tmp_path / "c")
    with refused("overlong: got 'cut', expected 'drop' or 'raise'"):
        align(tiny_llama(), words(), pairs, config={"overlong": "cut"}, output_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_rows_of_the_reward_model_that_do_not_fit_are_told_before_training(
    tmp_path, capsys, monkeypatch
):
    read, real = [], allo.run_stage

    def spy(model, rows, name, schedule, **settings):
        longest = max(
            len(r["prompt"]) + max(len(r[k]) for k in ("chosen", "rejected", "response") if k in r)
            for r in rows
        )
        read.append((name, len(rows), longest))
        return real(model, rows, name, schedule, **settings)

    monkeypatch.setattr(allo, "run_stage", spy)
    config = QUICK | {"estimator": "gradient"}
    align(tiny_llama(), words(), [*PAIRS, CLOSE], config=config, output_dir=tmp_path)
    assert "1 pairs take no part in 'forgetting'" in capsys.readouterr().out
    assert json.loads((tmp_path / "align.json").read_text())["left_out"]["not_forgotten"] == [4]
    assert [one[:2] for one in read] == [("sft", 4), ("forgetting", 4), ("learning", 5)]
    assert all(longest <= 64 for *_, longest in read)
    with refused("no pair's prompt, chosen and rejected response fit into 64 tokens"):
        align(tiny_llama(), words(), [CLOSE], output_dir=tmp_path / "none")
    stages = ("importance", "learning")
    align(tiny_llama(), words(), [CLOSE], stages=stages, config=QUICK, output_dir=tmp_path / "l")


# --- models that are refused ---


def peft_wrapped():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )


def quantised():
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def on_disk():
    model = tiny_llama()
    model.model.layers[1].to("meta")
    return model


def multimodal():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(SIZES, head_dim=8, num_key_value_heads=2)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def routed(**settings):
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, **settings)
    return MixtralForCausalLM(config)


REFUSED = {
    "PEFT": (peft_wrapped, "carries PEFT adapters; give what model.merge_and_unload() returns"),
    "quantised": (quantised, "is quantised; load its weights in float32"),
    "disk": (on_disk, "lies partly on disk or nowhere; load it without device_map"),
    "multimodal": (multimodal, "reads more than text (Gemma3ForConditionalGeneration)"),
    "router loss": (lambda: routed(output_router_logits=True), "adds a router loss"),
    "replicas": (lambda: torch.nn.DataParallel(tiny_llama()), "is wrapped in DataParallel; give"),
}


@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_aligned_are_told_at_the_start(tmp_path, make, told):
    with refused("align: the model ", told):
        align(make(), words(), PAIRS, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}]
)
def test_experts_without_a_router_loss_are_aligned(tmp_path, settings):
    model = routed(**settings, router_jitter_noise=0.5)
    result = align(model, words(), PAIRS, stages=("importance", "learning"), config=QUICK,
                   output_dir=tmp_path)  # fmt: skip
    assert result.logs["learning"].loss[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("device", "count", "environment", "told"),
    [
        ("cuda", 2, {}, "uses one of 2 visible GPUs; start it by `accelerate launch` to use all"),
        ("cuda", 8, {"RANK": "0"}, "uses one of 8 visible GPUs"),
        ("cuda", 2, {"LOCAL_RANK": "0"}, None),
        ("cuda", 1, {}, None),
        ("cpu", 2, {}, None),
    ],
)
def test_other_gpus_are_told_of_where_no_launcher_shares_them(device, count, environment, told):
    found = align_setup.several_gpus(device, count, environment)
    assert found is None if told is None else told in found
