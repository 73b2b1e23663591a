"""Expensive results on disk, each whole or absent, keyed by what made it.

An artifact is a folder `<store>/<kind>/<key>/` with a `manifest.json` that lists the SHA-256 of
every file in it. It is written beside its place and renamed last, so that a killed run leaves no
half artifact, and it is read only after its hashes agree.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allo_lib.config import fingerprint
from allo_lib.errors import AlloError

MANIFEST = "manifest.json"
_KEY_LENGTH = 24  # hex digits in the folder's name: 96 bits


@dataclass(frozen=True)
class Artifact:
    """A complete result: `path` its folder, `key` the hash of what made it, `seconds` its cost."""

    kind: str
    key: str
    path: Path
    seconds: float

    def file(self, name: str) -> Path:
        """Path of a file in the artifact."""
        return self.path / name

    def json(self, name: str = "record.json"):
        """A JSON file of the artifact, parsed."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))


class Store:
    """A folder of artifacts. Two processes may share it: the first to finish an artifact wins."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._checked: dict[Path, Artifact] = {}

    def get(self, kind: str, inputs: dict, make: Callable[[Path], None]) -> Artifact:
        """The artifact that `inputs` determine: read if it is there and sound, made if not.

        Args:
            kind: a word that names the stage; part of the key.
            inputs: JSON values: settings that matter, keys of input artifacts, a version of the
                stage's meaning.
            make: called with an empty folder to write the files of the artifact into.
        """
        key = fingerprint({"kind": kind, "inputs": inputs})[:_KEY_LENGTH]
        path = self.folder / kind / key
        if path in self._checked and path.is_dir():
            return self._checked[path]
        artifact = self._read(kind, key, path) or self._make(kind, key, path, inputs, make)
        self._checked[path] = artifact
        return artifact

    def has(self, kind: str, inputs: dict) -> bool:
        """Whether `get` would find the artifact without making it."""
        key = fingerprint({"kind": kind, "inputs": inputs})[:_KEY_LENGTH]
        path = self.folder / kind / key
        return self._read(kind, key, path) is not None

    def drop(self, artifact: Artifact) -> None:
        """Delete an artifact that nothing needs any more; making it again stays possible."""
        self._checked.pop(artifact.path, None)
        aside = artifact.path.with_name(f".{artifact.key}.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):  # at once, so that nobody reads half of it
            artifact.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _read(self, kind: str, key: str, path: Path) -> Artifact | None:
        if not path.is_dir():
            return None
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            damaged = [n for n, digest in manifest["files"].items() if sha256(path / n) != digest]
            seconds = float(manifest["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged, seconds = [MANIFEST], 0.0
        if not damaged:
            return Artifact(kind, key, path, seconds)
        aside = path.with_name(f"{key}.damaged-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            path.rename(aside)
        print(f"{kind}/{key}: {damaged[0]} is damaged; set aside, made anew", file=sys.stderr)
        return None

    def _make(self, kind, key, path, inputs, make) -> Artifact:
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}")
        start = time.perf_counter()
        try:
            temporary.mkdir(parents=True)
            make(temporary)
            seconds = round(time.perf_counter() - start, 3)
            _seal(temporary, {"kind": kind, "key": key, "seconds": seconds, "inputs": inputs})
            self._publish(temporary, path)
        except OSError as error:
            raise AlloError(
                f"cannot write {kind} to {self.folder} ({error}): free space or permit writing, "
                "then run again; what is done is kept"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Artifact(kind, key, path, seconds)

    def _publish(self, temporary: Path, path: Path) -> None:
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            return  # another process finished the same artifact first; its bytes serve as well
        _fsync(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    """JSON with sorted keys, one value per line, LF at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _seal(folder: Path, manifest: dict) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _fsync(path)
    manifest["files"] = {str(p.relative_to(folder)): sha256(p) for p in files}
    manifest["bytes"] = sum(p.stat().st_size for p in files)
    write_json(folder / MANIFEST, manifest)
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
