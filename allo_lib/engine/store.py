"""Expensive results on disk, each whole or absent, keyed by what made it.

An artifact is a folder `<store>/<kind>/<key>/` with a `manifest.json` that lists the SHA-256 of
every file in it. It is written beside its place and renamed last, so that a killed run leaves no
half artifact, and it is read only after its hashes agree.

Tensors (`*.safetensors`) are large and can be made again: an artifact that has lost nothing else is
sound, and whoever asks for a lost file has it made again, in the same way, by its own maker. So a
store can be carried to another machine without them.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from allo_lib.errors import AlloError
from allo_lib.profiles.config import fingerprint

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
_KEY_LENGTH = 24  # hex digits in the folder's name: 96 bits
# What is not there is damage, which is made anew; any other OSError tells of the disk, not of what
# lies on it.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_SAFETENSORS_ON_DISK = re.compile(r"Error while serializing: (I/O error|IoError)")


@dataclass(frozen=True)
class Artifact:
    """A complete result: `path` its folder, `key` the hash of what made it, `seconds` its cost.

    make_again: puts back tensors that were lost; see `Store.get`.
    """

    kind: str
    key: str
    path: Path
    seconds: float
    make_again: Callable[[], float] | None = field(default=None, compare=False, repr=False)

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
        """A JSON file of the artifact, parsed; AlloError when it was damaged after its check."""
        try:
            return json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AlloError(
                f"cannot read {self.file(name)} ({_one_line(error)}): run again; what is damaged "
                "is made anew"
            ) from error


class NotMade(AlloError):
    """An artifact is not in the store, and it was only to be read."""


class Store:
    """A folder of artifacts. Two processes may share it: the first to finish an artifact wins."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._checked: dict[Path, Artifact] = {}
        self._only_reading = False

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
            AlloError: the disk takes or gives no data, or an OSError of `make`; nothing is changed.
            NotMade: it is not there, inside `only_reading`.
        """
        key = fingerprint({"kind": kind, "inputs": inputs})[:_KEY_LENGTH]
        path = self.folder / kind / key
        if path in self._checked and os.path.isdir(path):
            return self._checked[path]

        def make_here() -> float:
            if self._only_reading:
                raise NotMade(
                    f"{kind}/{key} is not in {self.folder}; run the notebook that makes it"
                )
            return self._make(kind, key, path, inputs, make, changed)

        seconds = self._read(kind, key, path)
        seconds = make_here() if seconds is None else seconds
        self._checked[path] = Artifact(kind, key, path, seconds, make_here)
        return self._checked[path]

    @contextlib.contextmanager
    def only_reading(self) -> Iterator[None]:
        """Inside it nothing is made, neither what is asked for nor what its key depends on."""
        before, self._only_reading = self._only_reading, True
        try:
            yield
        finally:
            self._only_reading = before

    def has(self, kind: str, inputs: dict[str, Any]) -> bool:
        """Whether `get` would find the artifact without making it; its tensors may be lost."""
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

    def _read(self, kind: str, key: str, path: Path) -> float | None:
        """What a sound artifact cost, in seconds; None if there is none."""
        try:
            if not path.is_dir():
                return None
            damaged, seconds = _inspect(path)
            if damaged is not None:
                damaged, seconds = _set_aside(path)
            if damaged is None:
                return seconds
        except OSError as error:
            raise AlloError(
                f"cannot read {kind} in {path} ({_one_line(error)}): mend the disk or permit "
                "reading, then run again; or delete that folder to have it made anew"
            ) from error
        print(f"{kind}/{key}: {damaged} is damaged; set aside, made anew", file=sys.stderr)
        return None

    def _make(
        self,
        kind: str,
        key: str,
        path: Path,
        inputs: dict[str, Any],
        make: Callable[[Path], None],
        changed: Callable[[], None],
    ) -> float:
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}")
        start = time.perf_counter()
        try:
            temporary.mkdir(parents=True)
            make(temporary)
            seconds = round(time.perf_counter() - start, 3)
            seal(temporary, {"kind": kind, "key": key, "seconds": seconds, "inputs": inputs})
            self._publish(temporary, path, changed)
            shutil.rmtree(partial_of(temporary), ignore_errors=True)
        except OSError as error:
            raise AlloError(self._failure(kind, error)) from error
        except SafetensorError as error:
            if not _SAFETENSORS_ON_DISK.match(str(error)):
                raise
            raise AlloError(self._failure(kind, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return seconds

    def _failure(self, kind: str, error: OSError | SafetensorError) -> str:
        """One line that blames the store's disk only for what happened there."""
        if self._happened_here(error):
            return (
                f"cannot write {kind} to {self.folder} ({_one_line(error)}): free space or permit "
                "writing, then run again; what is done is kept"
            )
        return (
            f"cannot make {kind} ({_one_line(error)}): mend that, then run again; what is done is "
            "kept"
        )

    def _happened_here(self, error: OSError | SafetensorError) -> bool:
        if isinstance(error, SafetensorError):
            return True
        if isinstance(error, FileNotFoundError):  # what was to be read, nothing that was written
            return False
        if isinstance(error.filename, (str, os.PathLike)):
            return Path(error.filename).absolute().is_relative_to(self.folder.absolute())
        return error.errno in _FULL_OR_BROKEN  # a failing write names no file

    def _publish(self, temporary: Path, path: Path, changed: Callable[[], None]) -> None:
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            # Another process finished the same artifact first: its bytes serve as well. Or it was
            # there without its tensors.
            _put_back(temporary, path, changed)
            return
        fsync(path.parent)


def _inspect(path: Path) -> tuple[str | None, float]:
    """A damaged file of an artifact, None if it is sound; and what it cost, in seconds.

    Raises OSError when the disk does not say whether there is damage.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        seconds = float(manifest["seconds"])
        files = manifest["files"].items()
        damaged = [name for name, digest in files if _is_damaged(path / name, digest)]
    except (*_GONE, ValueError, KeyError, TypeError, AttributeError):
        return MANIFEST, 0.0
    return (damaged[0] if damaged else None), seconds


def _set_aside(path: Path) -> tuple[str | None, float]:
    """Move a damaged artifact out of its place; what `_inspect` says of it then.

    Of several processes that saw the damage, the first moves it and makes it anew; another that
    acted on what it had seen before would move what was made anew away from its readers.
    """
    with _alone(path.parent):
        damaged, seconds = _inspect(path)
        if damaged is not None:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
    return damaged, seconds


def _put_back(made: Path, path: Path, changed: Callable[[], None]) -> None:
    """Give an artifact the tensors that it lost, from one that was made again in the folder `made`.

    Equal tensors join what is there. With any other bits all of it is replaced, as its JSON files
    tell of the tensors; whoever looks in between sees damage, and waits in `_set_aside`.
    """
    with _alone(path.parent):
        if _inspect(path)[0] is not None:
            return  # the next reader sets it aside
        before, after = _digests(path), _digests(made)
        names = [name for name in before if not (path / name).exists()]
        if any(after.get(name) != before[name] for name in names):
            print(f"{path.parent.name}/{path.name}: made again with other bits", file=sys.stderr)
            changed()
            names = [*after, MANIFEST]
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / name, path / name)
            fsync((path / name).parent)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder of the store."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network disks may know no locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digests(folder: Path) -> dict[str, str]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


def _is_damaged(path: Path, digest: str) -> bool:
    try:
        return sha256(path) != digest
    except FileNotFoundError:
        return path.suffix != TENSORS
    except _GONE:
        return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, one value per line, LF at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def partial_of(folder: Path) -> Path:
    """Where a maker may keep what an interrupted run goes on from.

    folder: the one that `Store.get` calls `make` with. Every try at the same artifact has the same
    place, and it is removed as soon as the artifact is whole.
    """
    key = folder.name.split(".")[1]
    return folder.with_name(f".{key}.partial")


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder, with the hashes of its files, and all of it to the disk.

    Raises OSError when the disk does not take it all.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        fsync(path)
        _check_whole(path)
    manifest["files"] = {str(p.relative_to(folder)): sha256(p) for p in files}
    manifest["bytes"] = sum(p.stat().st_size for p in files)
    write_json(folder / MANIFEST, manifest)
    fsync(folder / MANIFEST)
    _check_whole(folder / MANIFEST)
    fsync(folder)


def _check_whole(path: Path) -> None:
    """OSError when a file ends too early by its own form: the hash of a torn file would seal it."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == TENSORS:
            with safe_open(str(path), framework="np"):
                pass  # opening it compares the length of the file with its header
    except (ValueError, SafetensorError) as error:
        raise OSError(errno.EIO, "less arrived than was written", str(path)) from error


def fsync(path: Path) -> None:
    """Have the disk take what was written to a file or folder; OSError when it does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
