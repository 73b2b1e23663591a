"""Artifacts are whole or absent, whatever interrupts or breaks the making of them."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from refusals import stamps
from safetensors import SafetensorError

from allo_lib.engine.store import MANIFEST, NotMade, Store, sha256, write_json
from allo_lib.errors import AlloError
from allo_lib.machine import weights

INPUTS = {"seed": 0, "rate": 1e-4}


def write(text: str = "ten", value: float = 1.0):
    """A maker of a record and of tensors in a subfolder."""

    def make(folder):
        (folder / "deep").mkdir()
        weights.save_tensors({"a": torch.full((5,), value)}, folder / "deep" / "a.safetensors")
        write_json(folder / "record.json", {"text": text})

    return make


def never(folder):
    raise AssertionError("the artifact was there and is made again")


def names_in(folder: Path) -> list[str]:
    """Names in the folder of a kind, hidden ones included."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_artifact_is_made_once_and_then_read(tmp_path):
    assert not Store(tmp_path).has("stage", INPUTS) and names_in(tmp_path) == []
    first = Store(tmp_path).get("stage", INPUTS, write())
    assert Store(tmp_path).get("stage", dict(reversed(INPUTS.items())), never) == first
    assert first.json() == {"text": "ten"} and names_in(tmp_path / "stage") == [first.key]
    assert Store(tmp_path).has("stage", INPUTS) and not Store(tmp_path).has("stage", {})
    manifest = first.json(MANIFEST)
    assert manifest["inputs"] == INPUTS and manifest["seconds"] >= 0
    files = {"deep/a.safetensors", "record.json"}
    assert manifest["files"] == {name: sha256(first.file(name)) for name in files}
    assert manifest["bytes"] == sum(first.file(name).stat().st_size for name in files)


def test_keys_are_those_of_stores_that_exist():
    key = Store("x")._place("stage", INPUTS).name
    assert key == "670e0006baf168d78840df44"


def test_other_inputs_and_kinds_have_other_places(tmp_path):
    store = Store(tmp_path)
    keys = {
        store.get(kind, inputs, write()).path
        for kind in ("stage", "other")
        for inputs in (INPUTS, INPUTS | {"seed": 1}, {"seed": 0})
    }
    assert len(keys) == 6


def test_who_only_reads_makes_nothing_not_even_what_a_key_depends_on(tmp_path):
    store = Store(tmp_path)

    def second():
        return store.get("second", {"of": store.get("stage", INPUTS, write()).key}, write("two"))

    with store.only_reading(), pytest.raises(NotMade, match="stage/.* is not in"):
        second()
    assert names_in(tmp_path) == []
    made = second()
    with Store(tmp_path).only_reading(), store.only_reading():
        assert second() == made
    with pytest.raises(KeyError), store.only_reading():
        raise KeyError
    assert store.get("third", INPUTS, write()).json() == {"text": "ten"}


def test_a_dropped_artifact_is_made_again(tmp_path):
    store = Store(tmp_path)
    store.drop(store.get("stage", INPUTS, write()))
    assert not store.has("stage", INPUTS) and names_in(tmp_path / "stage") == []
    assert store.get("stage", INPUTS, write("new")).json() == {"text": "new"}


@pytest.mark.parametrize("error, told", [
    (ValueError("bad"), None),
    (KeyboardInterrupt(), None),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (OSError("the model is not there:\n- nor there"), "the model is not there: - nor there"),
])  # fmt: skip
def test_an_error_of_the_maker_leaves_nothing_and_the_rest_alone(tmp_path, error, told):
    store = Store(tmp_path)
    before = store.get("stage", {"seed": 1}, write())

    def make(folder):
        write()(folder)
        raise error

    with pytest.raises(AlloError if told else type(error), match=told) as caught:
        store.get("stage", INPUTS, make)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "stage") == [before.key]
    assert Store(tmp_path).get("stage", {"seed": 1}, never) == before


def test_a_store_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(AlloError, match="cannot make stage"):
        Store(tmp_path / "store").get("stage", INPUTS, write())


@pytest.mark.parametrize("name, content", [
    ("deep/a.safetensors", "torn"),
    ("record.json", "{}"),
    ("record.json", None),
    (MANIFEST, "{"),
    (MANIFEST, "[]"),
    (MANIFEST, '{"files": []}'),
    (MANIFEST, None),
])  # fmt: skip
def test_a_damaged_artifact_is_told_and_made_again(tmp_path, name, content, capsys):
    path = Store(tmp_path).get("stage", INPUTS, write()).path
    (path / name).unlink() if content is None else (path / name).write_text(content)
    assert Store(tmp_path).get("stage", INPUTS, write("again")).json() == {"text": "again"}
    assert f"stage/{path.name} is damaged" in capsys.readouterr().err
    assert names_in(tmp_path / "stage") == [path.name]
    assert Store(tmp_path).get("stage", INPUTS, never).path == path


def test_what_the_disk_does_not_give_is_no_damage(tmp_path, monkeypatch):
    made = Store(tmp_path).get("stage", INPUTS, write())
    before, real = stamps(tmp_path), Path.read_text

    def fail(path, *rest, **more):
        if path.name == MANIFEST:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(Path, "read_text", fail)
        Store(tmp_path).get("stage", INPUTS, never)
    assert stamps(tmp_path) == before and Store(tmp_path).get("stage", INPUTS, never) == made


def test_json_files_are_the_same_bytes_whatever_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, "é"]})
    write_json(tmp_path / "b", {"a": [1.5, "é"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"a": [1.5, "é"], "b": 1}
    with pytest.raises(ValueError):
        write_json(tmp_path / "c", float("nan"))


# --- lost tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_lost_tensors_are_made_again_when_they_are_requested(value, tmp_path, capsys):
    """Equal ones join what is there, whose record may hold wall seconds; with other bits all of it
    is replaced, and whoever keeps account hears of it before."""
    made, heard = Store(tmp_path).get("stage", INPUTS, write()), []
    shutil.rmtree(made.path / "deep")
    store = Store(tmp_path)
    again = store.get("stage", INPUTS, write("second", value), lambda: heard.append(made.json()))
    assert again == made and again.json() == {"text": "ten"} and store.has("stage", INPUTS)
    tensors = weights.read_tensors(again.file("deep/a.safetensors"))
    assert tensors["a"].tolist() == [value] * 5
    other = value != 1.0
    assert heard == [{"text": "ten"}] * other
    assert again.json() == {"text": "second" if other else "ten"}
    assert ("made again with other bits" in capsys.readouterr().err) == other
    assert names_in(tmp_path / "stage") == [made.key]
    assert Store(tmp_path).get("stage", INPUTS, never).file("deep/a.safetensors").exists()


def test_lost_tensors_that_cannot_be_made_again_are_told(tmp_path):
    made = Store(tmp_path).get("stage", INPUTS, write())
    shutil.rmtree(made.path / "deep")
    store = Store(tmp_path)
    again = store.get("stage", INPUTS, lambda folder: write_json(folder / "record.json", {}))
    with store.only_reading(), pytest.raises(NotMade):
        again.file("deep/a.safetensors")
    with pytest.raises(AlloError, match="made again and has no deep/a.safetensors now: run again"):
        again.file("deep/a.safetensors")


# --- several processes ---------------------------------------------------------------------------


def _get(folder, gate, results):
    artifact = Store(folder).get("stage", INPUTS, lambda at: gate.wait() and None or own(at))
    results.put((artifact.json(), artifact.file("deep/a.safetensors").exists()))


def own(folder):
    write(f"by {os.getpid()}", os.getpid())(folder)


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_make_the_same_artifact_all_get_the_first(damaged, tmp_path):
    if damaged:
        Store(tmp_path).get("stage", INPUTS, write()).file("record.json").write_text("{}")
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_get, args=(tmp_path, gate, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    (first, *others) = [results.get(timeout=60) for _ in workers]
    assert others == [first, first] and first[1]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(names_in(tmp_path / "stage")) == 1


# --- every operation that changes the disk goes wrong once ---------------------------------------


class Died(BaseException):
    """The process is gone: nothing of it runs any more, no clean-up either."""


def faulty(patch, kind: str, at: int) -> list[str]:
    """Let the operation number `at` fail: "full" as on a full disk, "killed" as if the process had
    been, in the middle of a write. Returns the names of all that were tried."""
    tried: list[str] = []

    def wrap(owner, name, half=None):
        real = getattr(owner, name)

        def call(*arguments, **more):
            tried.append(name)
            number = len(tried) - 1
            if number < at or (kind == "full" and number > at) or at < 0:
                return real(*arguments, **more)
            if half and number == at:
                half(*arguments)
            if kind == "killed":
                raise Died
            if name == "serialize_file":
                raise SafetensorError("I/O error: No space left on device")
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(owner, name, call)

    for name in ("mkdir", "rename", "replace", "fsync"):
        wrap(os, name)
    wrap(
        Path, "write_text", lambda path, text, *_: path.write_bytes(text[: len(text) // 2].encode())
    )
    wrap(safetensors.torch, "serialize_file", lambda _, path: Path(path).write_bytes(b"\x40"))
    if kind == "killed":
        wrap(shutil, "rmtree")
    return tried


def damage(store: Store) -> None:
    store.get("scores", {"n": 2}, write()).file("record.json").write_text("{}")


def lose(store: Store) -> None:
    """As after a run on another device, of which the tensors were not carried here."""
    store.get("scores", {"n": 2}, write("of another", 2.0)).file("deep/a.safetensors").unlink()


@pytest.mark.parametrize("kind", ["full", "killed"])
@pytest.mark.parametrize("prepare", [None, damage, lose])
def test_no_fault_at_any_write_leads_to_a_wrong_result(prepare, kind, tmp_path, monkeypatch):
    folder = tmp_path / "store"

    def work():
        """As a method does: train a candidate, measure it, drop it."""
        store = Store(folder)

        def measure(target):
            candidate = store.get("scores", {"n": 2}, write())
            tensors = weights.read_tensors(candidate.file("deep/a.safetensors"))
            write_json(
                target / "record.json", candidate.json() | {"sum": tensors["a"].sum().item()}
            )
            store.drop(candidate)

        return store.get("result", {"n": 3}, measure).json()

    for at in itertools.count(-1):
        shutil.rmtree(folder, ignore_errors=True)
        Store(folder).get("earlier", {"n": 0}, write())
        if prepare:
            prepare(Store(folder))
        earlier, result = stamps(folder / "earlier"), None
        with monkeypatch.context() as patch:
            tried = faulty(patch, kind, at)
            try:
                result = work()
            except AlloError as error:
                assert kind == "full" and "\n" not in str(error)
            except Died:
                assert kind == "killed"
        assert result in (None, {"text": "ten", "sum": 5.0})
        if kind == "full":
            assert not [p for p in folder.glob("*/.*") if not p.name.endswith(".partial")]
        assert work() == {"text": "ten", "sum": 5.0}
        assert stamps(folder / "earlier") == earlier
        if at >= len(tried):
            break
    assert at > 15
