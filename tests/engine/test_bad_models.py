"""Models, tokenizers and settings that `align` and `load` cannot use, told before anything runs."""

import json
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from allo_lib import align
from allo_lib.align_setup import checked
from allo_lib.alignment import AlignConfig, AlignResult
from allo_lib.engine import models

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(30))]  # as many as tiny_llama has
PAIRS = [{"prompt": "w1 w2", "chosen": "w3", "rejected": f"w{4 + i}"} for i in range(4)]
NAN, INF = float("nan"), float("inf")
QUICK = {"batch_size": 4, "importance_rate": 1e-3, "forgetting_rate": 1e-3, "learning_rate": 1e-3}
fuzzing = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def words(vocabulary=WORDS, **special):
    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>") | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


# --- what is usable, however odd -----------------------------------------------------------------


def tied():
    return tiny_llama(tied=True)


def partly_frozen():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def without_pad_in_its_config():
    model = tiny_llama()
    model.config.pad_token_id = None
    return model


@pytest.mark.parametrize("make", [tied, without_pad_in_its_config])
def test_models_that_differ_in_what_does_not_matter_are_aligned(tmp_path, make):
    stages = ("importance", "learning")
    result = align(make(), words(), PAIRS, stages=stages, config=QUICK, output_dir=tmp_path)
    assert isinstance(result, AlignResult) and result.mask.kept
    assert (tmp_path / "model.safetensors").is_file()


def test_a_partly_frozen_model_keeps_its_frozen_weights(tmp_path):
    model = partly_frozen()
    frozen = model.model.embed_tokens.weight.clone()
    config = QUICK | {"estimator": "gradient"}
    result = align(model, words(), PAIRS, config=config, output_dir=tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, frozen) and result.mask.kept


# --- models --------------------------------------------------------------------------------------


class Buffers(torch.nn.Module):
    """A module without a single parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3, 3))
        self.config = tiny_llama().config


class Frozen(Buffers):
    """Embeddings and all else as buffers: a module that looks like a language model."""

    def get_input_embeddings(self):
        return self


def altered(**changes):
    model = tiny_llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def without_context():
    model = tiny_llama()
    model.config = types.SimpleNamespace(pad_token_id=0)
    return model


def with_entry(value, dtype=torch.float32):
    model = tiny_llama(dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    return model


DOWN = "weights of model.layers.1.mlp.down_proj.weight hold NaN or infinity in "
MODELS = {
    "nothing": (lambda: None, "the model is a NoneType without token embeddings; expected a"),
    "buffers as embeddings": (Frozen, "highest token id is 32, the model's embedding has 3 rows"),
    "all frozen": (lambda: tiny_llama().requires_grad_(False), "every parameter of the model is"),
    "NaN": (lambda: with_entry(NAN), DOWN + "float32; load them in a dtype of larger range"),
    "float16 overflow": (lambda: with_entry(1e6, torch.float16), DOWN + "float16"),
    "partly frozen": (partly_frozen, "embed_tokens.weight is frozen, but the scores of estimator"),
    "no context": (without_context, "the model's config does not say how many tokens it reads"),
    "context too short": (
        lambda: altered(max_position_embeddings=3),
        "pair 0: 4 tokens, but the longest row is 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "told"), MODELS.values(), ids=MODELS)
def test_a_bad_model_is_told_before_anything_is_written(tmp_path, make, told):
    with refused(told):
        align(make(), words(), PAIRS, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


# --- tokenizers ----------------------------------------------------------------------------------

TOKENIZERS = {
    "a name": (lambda: "gpt2", "the tokenizer is a str; expected one of transformers"),
    "one of tokenizers": (lambda: words().backend_tokenizer, "the tokenizer is a Tokenizer; exp"),
    "no pad": (lambda: words(pad_token=None), "the tokenizer has no pad token; expected a pad"),
    "neither": (lambda: words(eos_token=None, pad_token=None), "the tokenizer has no end token"),
    "pad is end": (lambda: words(pad_token="<eos>"), "the tokenizer has one token for pad and end"),
    "a pad added": (
        lambda: words(pad_token="<padding>"),
        "call model.resize_token_embeddings(34) and train the new rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "told"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_bad_tokenizer_is_told_before_anything_is_written(tmp_path, make, told):
    model = tiny_llama()
    with refused(told):
        align(model, make(), PAIRS, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- settings ------------------------------------------------------------------------------------

SETTINGS = {
    "list": ([("share", 0.1)], "align: config is a list; expected an AlignConfig or a dict"),
    "class": (AlignConfig, "align: config is a type; expected an AlignConfig or a dict"),
    "unknown": ({"lr": 1e-4}, "align: unknown key 'lr'; expected one of accumulation"),
    "no name": ({3: 1}, "align: unknown key 3; expected one of"),
    "share zero": ({"share": 0}, "align: share: got 0, expected greater than 0"),
    "share in percent": ({"share": 10}, "share: got 10, expected less than or equal to 1"),
    "share NaN": ({"share": NAN}, "align: share: got nan, expected a finite number"),
    "share true": ({"share": True}, "align: share: got True, expected a number"),
    "rate infinite": ({"importance_rate": INF}, "importance_rate: got inf, expected a finite"),
    "key share two": ({"key_share": 2.0}, "align: key_share: got 2.0, expected less"),
    "estimator": ({"estimator": "hessian"}, "estimator: got 'hessian', expected 'delta' or"),
    "neurons": ({"rewriter_neurons": "top"}, "rewriter_neurons: got 'top', expected 'all' or"),
    "rule": ({"token_rule": "hard"}, "token_rule: got 'hard', expected 'threshold', 's"),
    "threshold below": ({"token_threshold": -1}, "token_threshold: got -1, expected greater"),
    "no batch": ({"batch_size": 0}, "batch_size: got 0, expected greater than or equal to 1"),
    "a batch of 16.0": ({"batch_size": 16.0}, "got 16.0, expected a valid integer"),
    "length zero": ({"max_length": 0}, "max_length: got 0, expected greater than or equal"),
    "norm zero": ({"max_grad_norm": 0}, "max_grad_norm: got 0, expected greater than 0"),
    "seed none": ({"seed": None}, "align: seed: got None, expected a valid integer"),
    "minutes negative": ({"checkpoint_minutes": -1}, "minutes: got -1, expected greater than"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "told"), SETTINGS.values(), ids=SETTINGS)
def test_a_bad_setting_is_told_before_anything_is_written(tmp_path, config, told):
    with refused(told):
        align(tiny_llama(), words(), PAIRS, config=config, output_dir=tmp_path / "out")
    if isinstance(config, dict) and set(config) <= set(AlignConfig.__dataclass_fields__):
        with refused(told):  # a dict of the fields and the class itself are checked alike
            checked(AlignConfig(**config))
    assert not (tmp_path / "out").exists()


STAGES = {
    "none": (None, "align: stages None given; expected a tuple with some of ('importance',"),
    "a word": ("learning", "align: stages 'learning' given; expected a tuple with some of"),
    "empty list": ([], "align: stages [] given; expected a tuple with some of"),
    "one too many": (("learning", "rewriter"), "align: stages ('learning', 'rewriter') given"),
    "list inside": ([["learning"]], "align: stages [['learning']] given; expected a tuple"),
}


@pytest.mark.parametrize(("stages", "told"), STAGES.values(), ids=STAGES)
def test_bad_stages_are_told_before_anything_is_written(tmp_path, stages, told):
    with refused(told):
        align(tiny_llama(), words(), PAIRS, stages=stages, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", [None, "", 3, ["out"]])
def test_a_folder_is_named(folder):
    with refused("align: output_dir is", repr(folder), "name the folder"):
        align(tiny_llama(), words(), PAIRS, output_dir=folder)


def test_a_file_in_the_place_of_the_folder_is_told_and_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with refused("align: output_dir", "is a file; name a folder"):
        align(tiny_llama(), words(), PAIRS, output_dir=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("raw", [b"", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", b"x" * 99])
def test_a_damaged_mask_in_the_folder_is_told_and_kept(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.safetensors").write_bytes(raw)
    model = tiny_llama()
    before = models.weights_hash(model)
    with refused("mask.safetensors is not a readable mask file"):
        align(model, words(), PAIRS, stages=("learning",), config=QUICK, output_dir=tmp_path)
    assert models.weights_hash(model) == before
    assert tree(tmp_path) == {(tmp_path / "mask.safetensors").relative_to(tmp_path): raw}


values = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3)


@fuzzing
@given(st.dictionaries(st.sampled_from([*AlignConfig.__dataclass_fields__]), values, max_size=3))
def test_any_settings_are_taken_or_refused(config):
    taken = read_or_refused(lambda: checked(config))
    assert taken is None or checked(taken) == taken


# --- folders of models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    words().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_with(**changes):
    def change(files):
        told = json.loads(files["config.json"]) | changes
        return files | {"config.json": json.dumps(told).encode()}

    return change


def file_as(name, raw):
    return lambda files: files | {name: raw}


def file_dropped(name):
    return lambda files: {key: raw for key, raw in files.items() if key != name}


PICKLE = b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."
FOLDERS = {
    "no config": file_dropped("config.json"),
    "no language model": config_with(model_type="vit"),
    "wider than its weights": config_with(hidden_size=32),
    "only pickled weights": lambda files: file_dropped("model.safetensors")(
        files | {"pytorch_model.bin": PICKLE}
    ),
    "no tokenizer": lambda files: {k: v for k, v in files.items() if "tokenizer" not in k},
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_holds_no_model_is_told(tmp_path, monkeypatch, saved, change):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, raw in change(saved).items():
        (folder / name).write_bytes(raw)
    before = tree(tmp_path)
    with refused(
        f"model '{folder}' cannot be loaded (", "; expected 'smollm2-135m-instruct', a hub"
    ):
        models.load(str(folder))
    assert tree(tmp_path) == before  # no pickle ran


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (NAN, "float32", "hold NaN or infinity in float32"),
        (INF, "bfloat16", "hold NaN or infinity in bfloat16"),
        (1e6, "float16", "model.norm.weight hold NaN or infinity in float16; load them in a dtype"),
    ],
)
def test_weights_that_no_dtype_or_not_this_one_holds_are_told(tmp_path, saved, value, dtype, told):
    for name, raw in saved.items():
        (tmp_path / name).write_bytes(raw)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][2] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused(told):
        models.load(str(tmp_path), dtype=dtype)


NAMES = {
    "upwards": "../../../none",
    "NUL": "a\x00b",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_of_no_model_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused("cannot be loaded ("):
        models.load(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["", "half", "torch.float32", "FLOAT32", "int8", None, 32])
def test_an_unknown_dtype_is_told(dtype):
    with refused(f"dtype {dtype!r}: expected one of float32, bfloat16, float16"):
        models.load("smollm2-135m-instruct", dtype=dtype)


# --- micro models --------------------------------------------------------------------------------

MICRO = dict(vocab_size=9, width=8, layers=1, heads=2, feed_forward=8, context=8, seed=0)
MICRO |= dict(initializer_range=0.05, pad_token_id=0, eos_token_id=1)
SIZES = {
    "no words": ({"vocab_size": 0}, "vocab_size=0: expected a whole number of at least 1"),
    "half a head": ({"heads": 0.5}, "heads=0.5: expected a whole number of at least 1"),
    "context NaN": ({"context": NAN}, "context=nan: expected a whole number of at least 1"),
    "odd heads": ({"width": 6}, "width=6: expected a multiple of 2 * heads = 4"),
    "pad none": ({"pad_token_id": None}, "pad_token_id=None, eos_token_id=1: expected two"),
    "end past": ({"eos_token_id": 9}, "eos_token_id=9: expected two different ids from 0 to 8"),
}


@pytest.mark.parametrize(("change", "told"), SIZES.values(), ids=SIZES)
def test_a_micro_model_of_no_size_is_told(change, told):
    with refused(told):
        models.micro_llama(**MICRO | change)
