"""A disk that is full, breaks or tears what it was given never leads to a wrong result.

Every operation by which the store changes the disk is counted; then each of them in turn goes wrong
in every way, always in a fresh folder, and what is left and what a second run gives are looked at.
"""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import PROFILE, write_notebook
from safetensors import SafetensorError

from allo_lib.cli import cli, driver
from allo_lib.engine.store import MANIFEST, Store, write_json
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.machine import weights
from allo_lib.method.neurons import NeuronMask
from allo_lib.study import manifest

ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}
TORN = ("torn", "torn later")
KINDS = ("full once", "full", "broken", "killed", "power cut", *TORN)
DEADLY = ("killed", "power cut")
# What is left of a torn file; a missing line end alone would not make JSON wrong.
CUTS = {"nothing": lambda size: 0, "half": lambda size: size // 2, "most": lambda size: size - 2}
NEEDS_SPACE = ("mkdir", "open", "write", "fsync", "tensors")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing is forced to the real disk: the injector only counts who asks for it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Died(BaseException):
    """The process is gone: nothing of it may run any more, no clean-up either."""


# --- the injector ------------------------------------------------------------------------------


class Faults:
    """Counts what changes the disk under `root`; one of these operations goes wrong.

    kind: one of KINDS, or "none". at: the number of the operation; of the file written for TORN.
    steps: (operation, path) of all that were tried.
    """

    def __init__(self, root: Path, kind: str = "none", at: int = -1, cut: str = "half"):
        self.root, self.kind, self.at, self.cut = root, kind, at, CUTS[cut]
        self.steps: list[tuple[str, str]] = []
        self.written: list[int] = []  # inodes, in the order of writing
        self.unsynced: set[int] = set()
        self.dead = self.paused = False

    def step(self, name: str, path) -> None:
        """Called before each operation; raises what it fails with."""
        if self.dead:
            raise Died
        number = len(self.steps)
        self.steps.append((name, str(path)))
        if number == self.at and self.kind in DEADLY:
            self.dead = True
            if self.kind == "power cut":
                self.tear(self.unsynced)
            raise Died
        what, once = self.kind.split(" ")[0], self.kind.endswith(" once")
        if what not in ERRORS or number < self.at or (once and number > self.at):
            return
        if number == self.at or what == "broken" or name in NEEDS_SPACE:
            raise OSError(ERRORS[what], os.strerror(ERRORS[what]))

    def landed(self, path) -> None:
        """Called when a file was written, before anything was forced to the disk."""
        inode, number = os.stat(path).st_ino, len(self.written)
        self.written.append(inode)
        self.unsynced.add(inode)
        if number == self.at and self.kind == "torn":
            self.tear({inode})

    def tear(self, inodes: set[int]) -> None:
        """Cut the files of these inodes off, wherever they have been moved to."""
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino in inodes:
                os.truncate(path, self.cut(path.stat().st_size))

    def mine(self, path) -> bool:
        if self.paused or not isinstance(path, (str, os.PathLike)):
            return False
        return Path(path).is_relative_to(self.root)

    @contextlib.contextmanager
    def injected(self, monkeypatch):
        """Let the operations of this process go through here."""
        with monkeypatch.context() as patch:
            for module in (builtins, io):
                patch.setattr(module, "open", self._open(io.open))
            patch.setattr(os, "fsync", self._fsync(os.fsync))
            for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            real = safetensors.torch.serialize_file
            patch.setattr(safetensors.torch, "serialize_file", self._serialize(real))
            yield self

    def _counted(self, name, real):
        def call(path, *rest, **more):
            # A folder that is removed is opened by its parent's descriptor: that is no writing.
            if name in ("unlink", "rmdir") or "dir_fd" in more:
                if self.dead:
                    raise Died
            elif self.mine(path):
                self.step(name, path)
            return real(path, *rest, **more)

        return call

    def _fsync(self, real):
        def call(descriptor):
            inode = os.fstat(descriptor).st_ino
            if not self.paused:
                self.step("fsync", inode)
            real(descriptor)
            self.unsynced.discard(inode)

        return call

    def _open(self, real):
        def call(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
            if not self.mine(path) or mode.startswith("r"):
                return real(path, mode, buffering, encoding, errors, newline)
            self.step("open", path)
            file = io.BufferedWriter(Raw(self, path, mode))
            return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

        return call

    def _serialize(self, real):
        def call(tensors, path, metadata=None):
            if not self.mine(path):
                return real(tensors, path, metadata=metadata)
            try:
                self.step("tensors", path)
            except OSError as error:
                Path(path).write_bytes(b"\x40")  # some versions of safetensors leave a part
                reason = f"{error.strerror} (os error {error.errno})"
                raise SafetensorError(f"Error while serializing: I/O error: {reason}") from None
            real(tensors, path, metadata=metadata)
            self.landed(path)

        return call


class Raw(io.FileIO):
    """A file of which a write that goes wrong leaves half."""

    def __init__(self, faults: Faults, path, mode: str):
        super().__init__(path, mode.replace("t", ""))
        self.faults = faults

    def write(self, data) -> int:
        try:
            self.faults.step("write", self.name)
        except BaseException:
            super().write(bytes(data)[: len(data) // 2])
            raise
        size = super().write(data)
        self.faults.landed(self.name)
        return size


# --- what is stored ----------------------------------------------------------------------------


ROWS = {"train": [{"id": i, "text": "x" * i} for i in range(9)], "dev": [], "record": {"pairs": 9}}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.full((5,), 0.25)}
MASK = NeuronMask({"a": torch.tensor([0, 4]), "b": torch.tensor([], dtype=torch.int64)},
                  {"a": (2, 3), "b": (5,)})  # fmt: skip


def never(folder):
    raise AssertionError("the artifact was there and is made again")


def write_rows(folder: Path) -> None:
    for name, rows in ROWS.items():
        write_json(folder / f"{name}.json", rows)


def write_tensors(folder: Path) -> None:
    weights.save_tensors(TENSORS, folder / "model.safetensors")
    (folder / "deep").mkdir()
    weights.save_tensors({"c": TENSORS["b"]}, folder / "deep" / "scores.safetensors")
    MASK.save(folder / "mask.safetensors")
    write_json(folder / "record.json", {"kept": MASK.kept})


def make_tensors(folder: Path):
    made = Store(folder).get("scores", {"n": 2}, write_tensors)
    model = weights.read_tensors(made.file("model.safetensors"))
    deep = weights.read_tensors(made.file("deep/scores.safetensors"))
    mask = NeuronMask.load(made.file("mask.safetensors"))
    kept = {name: index.tolist() for name, index in mask.indices.items()}
    return {n: t.tolist() for n, t in (model | deep).items()}, kept, made.json()


def make_result(folder: Path):
    """As a method does: train candidates, measure the better one, drop the other."""
    store = Store(folder)

    def write(target: Path) -> None:
        tried = [store.get("candidate", {"rate": r}, candidate(r)) for r in (1, 2)]
        best = max(tried, key=lambda one: one.json()["dev"])
        values = weights.read_tensors(best.file("model.safetensors"))
        write_json(target / "record.json", {"sum": sum(values["a"].flatten().tolist())})
        store.drop(tried[0])

    return store.get("result", {"n": 3}, write).json()


def candidate(rate: int):
    def write(target: Path) -> None:
        weights.save_tensors({"a": TENSORS["a"] * rate}, target / "model.safetensors")
        write_json(target / "record.json", {"dev": rate / 2})

    return write


def damage(folder: Path) -> None:
    make_tensors(folder)
    (path,) = folder.glob("scores/*/deep/scores.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def lose_others(folder: Path) -> None:
    """As after a run on another device, of which the tensors were not carried here."""

    def write(target: Path) -> None:
        write_tensors(target)
        weights.save_tensors({"a": TENSORS["a"] + 1}, target / "model.safetensors")
        write_json(target / "record.json", {"kept": "others"})

    Store(folder).get("scores", {"n": 2}, write)
    for path in folder.glob("scores/*/**/*.safetensors"):
        path.unlink()


# What meets the faults and gives its result, and what is done before without any.
CASES = {
    "tensors": (make_tensors, lambda folder: None),
    "result": (make_result, lambda folder: None),
    "damaged": (make_tensors, damage),
    "lost others": (make_tensors, lose_others),
}


# --- what must hold ----------------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def left_behind(folder: Path) -> list[str]:
    """Temporary folders and files."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".")]


def run_with(faults: Faults, act, monkeypatch):
    """(how it ended, its result) of an action that meets faults."""
    try:
        with faults.injected(monkeypatch):
            return "done", act()
    except AlloError as error:
        assert "\n" not in str(error) and str(error)
        return "told", None
    except Died:
        return "died", None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_no_fault_at_any_write_leads_to_a_wrong_result(name, kind, tmp_path, monkeypatch, capsys):
    act, prepare = CASES[name]
    folder = tmp_path / "store"

    def begin() -> dict:
        shutil.rmtree(folder, ignore_errors=True)
        Store(folder).get("earlier", {"n": 0}, write_rows)
        prepare(folder)
        return stamps(folder / "earlier")

    begin()
    with Faults(folder).injected(monkeypatch) as faults:
        right = act(folder)
    number = len(faults.written) if kind in TORN else len(faults.steps)
    assert number >= 4
    for at, cut in itertools.product(range(number), CUTS if kind in TORN else ("half",)):
        earlier = begin()
        faults = Faults(folder, kind, at, cut)
        ended, value = run_with(faults, lambda: act(folder), monkeypatch)
        if kind in ERRORS or kind in DEADLY:
            assert ended == ("died" if kind in DEADLY else "told")
        assert value == right or ended != "done"
        assert ended == "died" or left_behind(folder) == []
        if kind == "torn later":
            assert ended == "done"
            faults.tear({faults.written[at]})
        # Whatever is there is right or is made again, and nothing else was touched.
        assert act(folder) == right
        assert Store(folder).get("earlier", {"n": 0}, never) and earlier == stamps(
            folder / "earlier"
        )
        if kind not in TORN:  # whole or absent: what was published had reached the disk before
            assert len(list(folder.glob("*/*.damaged-*"))) <= (prepare in (damage, lose_others))


# --- safetensors, reading, and what is not the store's fault ------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", [MANIFEST, "train.json"])
def test_what_cannot_be_read_is_told_and_stays_where_it_is(number, name, tmp_path, monkeypatch):
    Store(tmp_path).get("pairs", {"n": 1}, write_rows)
    before, real = stamps(tmp_path), io.open

    def fail(path, *rest, **more):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **more)

    for method in ("get", "has"):
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", fail)
            patch.setattr(builtins, "open", fail)
            given = ("pairs", {"n": 1}, never)[: 3 if method == "get" else 2]
            with pytest.raises(AlloError, match=f"cannot read pairs .*{os.strerror(number)}"):
                getattr(Store(tmp_path), method)(*given)
    assert stamps(tmp_path) == before
    Store(tmp_path).get("pairs", {"n": 1}, never)


def test_damage_that_cannot_be_set_aside_is_told(tmp_path, monkeypatch):
    damage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "no")))
        with pytest.raises(AlloError, match="cannot read scores"):
            make_tensors(tmp_path)
    assert make_tensors(tmp_path)


def test_a_file_that_is_torn_after_its_check_is_never_taken_for_another(tmp_path):
    store = Store(tmp_path)
    for name, content in ROWS.items():
        made = store.get("pairs", {"n": 1}, write_rows)
        path = made.file(f"{name}.json")
        whole = path.read_bytes()
        for size in range(len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(AlloError, match="run again") as told:
                store.get("pairs", {"n": 1}, never).json(f"{name}.json")
            assert "\n" not in str(told.value)
        path.write_bytes(whole)
        assert made.json(f"{name}.json") == content


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "/scratch/cache"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError("the model is not there:\n- neither here\n- nor there"),
])  # fmt: skip
def test_an_error_of_the_maker_is_not_blamed_on_the_store(error, tmp_path):
    def make(folder):
        raise error

    with pytest.raises(AlloError, match="cannot make sft") as told:
        Store(tmp_path).get("sft", {}, make)
    assert "\n" not in str(told.value) and "free space" not in str(told.value)
    assert str(error).split("\n")[0] in str(told.value) and told.value.__cause__ is error
    assert left_behind(tmp_path) == []


# --- measurements ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:5])
def test_measurements_are_at_any_moment_the_old_or_the_new(kind, tmp_path, monkeypatch):
    path = tmp_path / "measurements.csv"
    rows = [outcomes.Measurement(s, "dpo", "toy", "accuracy", 0.5, 0.1, 9) for s in range(3)]
    outcomes.write_measurements(path, rows[:1])
    with Faults(tmp_path).injected(monkeypatch) as faults:
        outcomes.write_measurements(path, rows)
    for at in range(len(faults.steps)):
        outcomes.write_measurements(path, rows[:1])
        broken = Faults(tmp_path, kind, at)
        run_with(broken, lambda: outcomes.write_measurements(path, rows), monkeypatch)
        assert outcomes.read_measurements(path) in (rows[:1], rows)
        outcomes.write_measurements(path, rows)
        assert outcomes.read_measurements(path) == rows


# --- marks and the manifest of the driver -------------------------------------------------------


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """Starts an empty results folder, and gives its `Run` and how to run it under faults."""
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    (project / "toy.yaml").write_text(PROFILE)
    for name in ("00_first", "06_merge"):
        write_notebook(project / "notebooks", name, "pass")
    machine = {"device": "cpu", "threads": 1, "python": "3", "versions": {"torch": "2"}}
    monkeypatch.setattr(driver, "machine", lambda: machine)
    monkeypatch.setattr(manifest, "commit_of", lambda root: {"commit": "abc", "dirty": False})
    path = project / "toy.yaml"
    run = driver.Run(str(path), cli.load_profile(str(path)), project / "results" / "toy",
                    notebooks=project / "notebooks")  # fmt: skip

    def start(kind: str = "none", at: int = -1, cut: str = "half"):
        faults = Faults(run.results, kind, at, cut)
        monkeypatch.setattr(driver, "execute", lambda job: _notebook(faults, run, job))
        ended, _ = run_with(faults, lambda: driver.run_study(run), monkeypatch)
        return ended, faults.steps

    return run, start


def _notebook(faults: Faults, run, job) -> None:
    """Stands in for a notebook's own process, whose disk works."""
    faults.paused = True
    target = Path(job.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{target.name}\n")
    if "seeds" in job.parameters:
        lines = "".join(f"{s},sft,toy,accuracy,0.5,0.1,9\n" for s in job.parameters["seeds"])
        header = ",".join(outcomes.MEASURED)
        (run.results / "measurements.csv").write_text(f"{header}\n{lines}")
    faults.paused = False


def outputs(results: Path) -> dict[str, str]:
    """What a reader sees, without wall times."""
    found = {name: (results / name).read_text() for name in manifest.file_names(results)}
    told = json.dumps(manifest.read(results))
    return found | {manifest.NAME: re.sub(r'("\d\d_\w+": )[\d.]+', r"\1 0", told)}


@pytest.mark.parametrize("kind", KINDS[:5])
def test_a_run_goes_on_after_any_fault_of_its_marks_and_manifest(kind, small_run):
    run, start = small_run
    run.results.parent.mkdir()
    ended, steps = start()
    right = outputs(run.results)
    assert ended == "done" and {"replace", "write", "fsync"} <= {step for step, _ in steps}
    for at in range(len(steps)):
        shutil.rmtree(run.results)
        ended, _ = start(kind, at)
        harmless = kind.endswith("once") and steps[at][0] == "mkdir"  # of a folder that is there
        assert ended == ("died" if kind in DEADLY else "told") or harmless
        assert start()[0] == "done"
        assert outputs(run.results) == right
