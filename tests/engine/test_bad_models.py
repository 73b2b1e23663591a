"""Models, tokenizers and settings that `align` cannot use, told before anything runs."""

import types

import pytest
import torch
from refusals import refused
from tiny_models import ROUTED, SIZES, made, tiny_llama, words
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from allo_lib import align
from allo_lib.align_setup import checked
from allo_lib.alignment import AlignConfig
from allo_lib.engine import models

PAIRS = [{"prompt": "w1 w2", "chosen": "w3", "rejected": f"w{4 + i}"} for i in range(4)]
NAN = float("nan")
QUICK = {"batch_size": 4, "importance_rate": 1e-3, "forgetting_rate": 1e-3, "learning_rate": 1e-3}


def partly_frozen():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def test_a_partly_frozen_model_keeps_its_frozen_weights(tmp_path):
    """And is aligned though its config names no pad token."""
    model = partly_frozen()
    model.config.pad_token_id = None
    frozen = model.model.embed_tokens.weight.clone()
    config = QUICK | {"estimator": "gradient"}
    result = align(model, words(), PAIRS, config=config, output_dir=tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, frozen) and result.mask.kept
    assert (tmp_path / "model.safetensors").is_file()


class Buffers(torch.nn.Module):
    """A module without a single parameter that looks like a language model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3, 3))
        self.config = tiny_llama().config

    def get_input_embeddings(self):
        return self


def without_context():
    model = tiny_llama()
    model.config = types.SimpleNamespace(pad_token_id=0)
    return model


def with_entry(value, dtype=torch.float32):
    model = tiny_llama(dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    return model


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
    text = SIZES | dict(intermediate_size=24, head_dim=8, num_key_value_heads=2)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


DOWN = "weights of model.layers.1.mlp.down_proj.weight hold NaN or infinity in "
SOME_OF = "given; expected a tuple with some of ('importance',"
REFUSED = {  # argument of `align` -> (value, what is told); models and tokenizers are made
    "model": [
        (lambda: None, "the model is a NoneType without token embeddings; expected a"),
        (Buffers, "highest token id is 32, the model's embedding has 3 rows"),
        (lambda: tiny_llama().requires_grad_(False), "every parameter of the model is"),
        (lambda: with_entry(NAN), DOWN + "float32; load them in a dtype of larger range"),
        (lambda: with_entry(1e6, torch.float16), DOWN + "float16"),
        (partly_frozen, "embed_tokens.weight is frozen, but the scores of estimator"),
        (without_context, "the model's config does not say how many tokens it reads"),
        (peft_wrapped, "the model carries PEFT adapters; give what model.merge_and_unload() retu"),
        (quantised, "the model is quantised; load its weights in float32"),
        (on_disk, "the model lies on several devices, on disk or nowhere; load it without device"),
        (multimodal, "the model reads more than text (Gemma3ForConditionalGeneration)"),
        (lambda: made("mixtral", **ROUTED), "the model adds a router loss"),
        (lambda: torch.nn.DataParallel(tiny_llama()), "the model is a DataParallel without token"),
    ],
    "tokenizer": [
        (lambda: "gpt2", "the tokenizer is a str; expected one of transformers"),
        (lambda: words(pad_token=None), "the tokenizer has no pad token; expected a pad"),
        (lambda: words(eos_token=None, pad_token=None), "the tokenizer has no end token"),
        (lambda: words(pad_token="<eos>"), "the tokenizer has one token for pad and end"),
        (lambda: words(pad_token="<more>"), "call model.resize_token_embeddings(34) and train"),
    ],
    "pairs": [
        ("pairs.jsonl", "align: pair 0 is a str, not a dict; expected one split"),
        ({"train": PAIRS}, "align: pair 0 is a str, not a dict; expected one split"),
        ([PAIRS[0], {"prompt": "w1", "rejected": "w2"}], "column 'chosen' (pair 1)"),
        ([PAIRS[0] | {"prompt": ""}], "pair 0: no prompt, and the replies begin with none"),
        ([PAIRS[0] | {"rejected": "\ud83d"}], "pair 0, rejected: half of a surrogate pair"),
        ([PAIRS[0] | {"chosen": "w4"}], "pair 0: chosen equals rejected"),
    ],
    "config": [
        ([("share", 0.1)], "align: config is a list; expected an AlignConfig or a dict"),
        (AlignConfig, "align: config is a type; expected an AlignConfig or a dict"),
        ({"lr": 1e-4}, "align: unknown key 'lr'; expected one of accumulation"),
        ({"share": 0}, "align: share: got 0, expected greater than 0"),
        ({"share": NAN}, "align: share: got nan, expected a finite number"),
        ({"share": True}, "align: share: got True, expected a number"),
        ({"estimator": "hessian"}, "estimator: got 'hessian', expected 'delta' or"),
        ({"token_rule": "hard"}, "token_rule: got 'hard', expected 'threshold', 's"),
        ({"batch_size": 16.0}, "got 16.0, expected a valid integer"),
        ({"seed": None}, "align: seed: got None, expected a valid integer"),
    ],
    "stages": [
        (None, f"align: stages None {SOME_OF}"),
        ("learning", f"align: stages 'learning' {SOME_OF}"),
        ([], f"align: stages [] {SOME_OF}"),
        (("learning", "rewriter"), f"align: stages ('learning', 'rewriter') {SOME_OF}"),
        ([["learning"]], f"align: stages [['learning']] {SOME_OF}"),
    ],
    "output_dir": [(folder, f"align: output_dir is {folder!r}") for folder in (None, "", ["o"])],
}  # fmt: skip


@pytest.mark.parametrize(("key", "bad", "told"), [(k, *row) for k in REFUSED for row in REFUSED[k]])
def test_what_cannot_be_used_is_told_before_anything_is_written(
    tmp_path, monkeypatch, key, bad, told
):
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny_llama, "tokenizer": words, "pairs": PAIRS, "output_dir": "out", key: bad}
    model, tokenizer = given.pop("model")(), given.pop("tokenizer")()
    with refused(told):
        align(model, tokenizer, **given)
    if isinstance(bad, dict) and set(bad) <= set(AlignConfig.__dataclass_fields__):
        with refused(told):  # a dict of the fields and the class itself are checked alike
            checked(AlignConfig(**bad))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("estimator", "told"),
    [("delta", "importance: the log-probs became nan at step 0"), ("gradient", "holds NaN; check")],
)
def test_activations_that_overflow_are_told_and_no_weight_is_lost(tmp_path, estimator, told):
    model = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(0).add_(6e4)
        model.model.norm.weight.fill_(6e4)
    before = models.weights_hash(model)
    with refused(told):
        align(model, words(), PAIRS, config={"estimator": estimator}, output_dir=tmp_path)
    assert models.weights_hash(model) == before
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_in_the_place_of_the_folder_is_told_and_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with refused("align: output_dir", "is a file; name a folder"):
        align(tiny_llama(), words(), PAIRS, output_dir=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
