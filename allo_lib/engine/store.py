"""Expensive results on disk, each whole or absent, keyed by what made it.

An artifact is a folder `<store>/<kind>/<key>/` with a `manifest.json` that lists the SHA-256 of
every file in it. It is written beside its place, forced to the disk and renamed last, so that a
killed run leaves no half artifact. It is read only after its hashes agree; else it is made again.

Tensors (`*.safetensors`) are large and can be made again: an artifact that lacks nothing else is
sound, and whoever asks for a lost file has it made again, in the same way, by its own maker. So a
store can be carried to another machine without them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from allo_lib.errors import AlloError
from allo_lib.profiles.config import fingerprint

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
_KEY_LENGTH = 24  # hex digits in the folder's name: 96 bits


@dataclass(frozen=True)
class Artifact:
    """A complete result: `path` its folder, `key` the hash of what made it.

    make_again: puts back tensors that were lost; see `Store.get`.
    """

    kind: str
    key: str
    path: Path
    make_again: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    def file(self, name: str) -> Path:
        """Path of a file in the artifact; tensors that were lost are made again.

        AlloError when it is not there then: on another machine the same may end otherwise.
        """
        path = self.path / name
        if self.make_again and path.suffix == TENSORS and not path.exists():
            self.make_again()
            if not path.exists():
                raise AlloError(
                    f"{self.kind}/{self.key} was made again and has no {name} now: run again, "
                    "which goes on from what it has"
                )
        return path

    def json(self, name: str = "record.json") -> Any:
        """A JSON file of the artifact, parsed."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))


class NotMade(AlloError):
    """An artifact is not in the store, and it was only to be read."""


class Store:
    """A folder of artifacts. Several processes may share it: the first to finish one wins."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._checked: dict[Path, Artifact] = {}
        self.reading = False  # nothing is made or noted

    def get(
        self,
        kind: str,
        inputs: dict[str, Any],
        make: Callable[[Path], None],
        changed: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """The artifact that `inputs` determine: read if it is there and sound, made if not.

        Args:
            kind: a word that names the stage; part of the key.
            inputs: JSON values: settings that matter, keys of input artifacts, a version of the
                stage's meaning.
            make: called with an empty folder to write the files of the artifact into.
            changed: called when lost tensors were made again and are other bits than they were,
                before these take the place of the whole artifact as it was.

        Raises:
            AlloError: the disk takes no data, or an OSError of `make`; nothing is changed.
            NotMade: it is not there, inside `only_reading`.
        """
        path = self._place(kind, inputs)
        if path in self._checked and path.is_dir():
            return self._checked[path]

        def make_here() -> None:
            if self.reading:
                raise NotMade(
                    f"{kind}/{path.name} is not in {self.folder}; run the notebook that makes it"
                )
            temporary, start = _beside(path), time.perf_counter()
            try:
                temporary.mkdir(parents=True)
                make(temporary)
                seconds = round(time.perf_counter() - start, 3)
                about = {"kind": kind, "key": path.name, "seconds": seconds, "inputs": inputs}
                seal(temporary, about)
                with _locked(path.parent):
                    _publish(temporary, path, changed)
                shutil.rmtree(partial_of(temporary), ignore_errors=True)
            except (OSError, SafetensorError) as error:
                raise AlloError(
                    f"cannot make {kind} in {self.folder} ({' '.join(str(error).split())}): mend "
                    "that, free space or permit writing, then run again; what is done is kept"
                ) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

        if not _is_sound(path):
            make_here()
        self._checked[path] = Artifact(kind, path.name, path, make_here)
        return self._checked[path]

    @contextlib.contextmanager
    def only_reading(self) -> Iterator[None]:
        """Inside it nothing is made, neither what is requested nor what its key depends on."""
        before, self.reading = self.reading, True
        try:
            yield
        finally:
            self.reading = before

    def has(self, kind: str, inputs: dict[str, Any]) -> bool:
        """Whether `get` would find the artifact without making it; its tensors may be lost."""
        return _is_sound(self._place(kind, inputs))

    def drop(self, artifact: Artifact) -> None:
        """Delete an artifact that nothing needs any more; making it again stays possible."""
        self._checked.pop(artifact.path, None)
        _remove(artifact.path)

    def _place(self, kind: str, inputs: dict[str, Any]) -> Path:
        return self.folder / kind / fingerprint({"kind": kind, "inputs": inputs})[:_KEY_LENGTH]


def _publish(made: Path, path: Path, changed: Callable[[], None]) -> None:
    """Rename a sealed folder to its place, where a damaged artifact may be, or one that another
    process finished first and whose bytes serve as well, or one that lost its tensors.

    Lost tensors that came back with the same bits join what is there. With any other bits all of it
    is replaced, as its JSON files tell of the tensors.
    """
    before = read_manifest(path)
    if before is not None:
        digests, files = before["files"], json.loads((made / MANIFEST).read_text("utf-8"))["files"]
        lost = [name for name in digests if not (path / name).exists()]
        if all(files.get(name) == digests[name] for name in lost):
            for name in lost:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(made / name, path / name)
            return
        print(f"{path.parent.name}/{path.name}: made again with other bits", file=sys.stderr)
        changed()
    _remove(path)
    made.rename(path)
    fsync(path.parent)


def _is_sound(path: Path) -> bool:
    """Whether an artifact is there; a damaged one is named."""
    if read_manifest(path) is not None:
        return True
    if path.is_dir():
        print(f"{path.parent.name}/{path.name} is damaged: to be made again", file=sys.stderr)
    return False


def _remove(path: Path) -> None:
    """Delete a folder, if it is there, in such a way that nobody reads half of it."""
    aside = _beside(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network disks may know no locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def partial_of(folder: Path) -> Path:
    """Where a maker may keep what an interrupted run goes on from.

    folder: the one that `Store.get` calls `make` with. Every try at the same artifact has the same
    place, and it is removed as soon as the artifact is whole.
    """
    key = folder.name.split(".")[1]
    return folder.with_name(f".{key}.partial")


# --- sealed folders ------------------------------------------------------------------------------


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder, with the hashes of its files, and all of it to the disk.

    Raises OSError when the disk does not take it all.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {str(path.relative_to(folder)): sha256(path) for path in files}
    manifest["bytes"] = sum(path.stat().st_size for path in files)
    write_json(folder / MANIFEST, manifest)
    for path in (*files, folder / MANIFEST, folder):
        fsync(path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a sealed folder; None unless all of its files have their hashes.

    Tensors may be missing. Raises OSError when the disk does not say what is there.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            path = folder / name
            if (path.exists() or path.suffix != TENSORS) and sha256(path) != digest:
                return None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, one value per line, LF at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    """Have the disk take what was written to a file or folder; OSError when it does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
