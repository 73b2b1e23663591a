"""Artifacts are whole or absent, whatever interrupts the making of them."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_lib.engine import store as store_module
from allo_lib.engine.store import MANIFEST, NotMade, Store, sha256, write_json
from allo_lib.errors import AlloError

INPUTS = {"seed": 0, "rate": 1e-4}


def write(text: str = "ten"):
    """A maker of an artifact of two files, one of them in a subfolder."""

    def make(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "data.txt").write_text(text)
        write_json(folder / "record.json", {"text": text})

    return make


def never(folder):
    raise AssertionError("the artifact was there and is made again")


def artifacts(store: Store, kind: str = "stage") -> list[str]:
    """Names in the folder of a kind, hidden ones included."""
    folder = store.folder / kind
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_artifact_is_made_once_and_then_read(tmp_path):
    first = Store(tmp_path).get("stage", INPUTS, write())
    again = Store(tmp_path).get("stage", INPUTS, never)
    assert again == first
    assert first.json() == {"text": "ten"} and first.file("deep/data.txt").read_text() == "ten"
    assert artifacts(Store(tmp_path)) == [first.key]


def test_who_only_reads_makes_nothing_not_even_what_a_key_depends_on(tmp_path):
    store = Store(tmp_path)

    def second():
        return store.get("second", {"of": store.get("stage", INPUTS, write()).key}, write("two"))

    with store.only_reading(), pytest.raises(NotMade, match="stage/.* is not in"):
        second()
    assert not artifacts(store)
    made = second()
    with Store(tmp_path).only_reading(), store.only_reading():
        assert second() == made
    with pytest.raises(KeyError), store.only_reading():
        raise KeyError
    assert store.get("third", INPUTS, write()).json() == {"text": "ten"}


def test_its_manifest_tells_inputs_hashes_and_cost(tmp_path):
    made = Store(tmp_path).get("stage", INPUTS, write())
    told = made.json(MANIFEST)
    assert told["inputs"] == INPUTS and told["seconds"] == made.seconds
    files = {"deep/data.txt", "record.json"}
    assert told["files"] == {name: sha256(made.file(name)) for name in files}
    assert told["bytes"] == sum(made.file(name).stat().st_size for name in files)


def test_other_inputs_and_kinds_have_other_places(tmp_path):
    store = Store(tmp_path)
    keys = {
        store.get(kind, inputs, write()).path
        for kind in ("stage", "other")
        for inputs in (INPUTS, INPUTS | {"seed": 1}, {"seed": 0})
    }
    assert len(keys) == 6


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_the_order_of_inputs_does_not_matter(tmp_path_factory, inputs):
    store = Store(tmp_path_factory.getbasetemp() / "ordered")
    made = store.get("stage", inputs, write())
    assert store.get("stage", dict(reversed(list(inputs.items()))), never).key == made.key


def test_has_tells_without_making(tmp_path):
    store = Store(tmp_path)
    assert not store.has("stage", INPUTS)
    assert artifacts(store) == []
    store.get("stage", INPUTS, write())
    assert store.has("stage", INPUTS) and not store.has("stage", {})


def test_a_dropped_artifact_is_made_again(tmp_path):
    store = Store(tmp_path)
    store.drop(store.get("stage", INPUTS, write()))
    assert not store.has("stage", INPUTS)
    assert store.get("stage", INPUTS, write("new")).json() == {"text": "new"}


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing(tmp_path, error):
    store = Store(tmp_path)

    def make(folder):
        write()(folder)
        raise error

    with pytest.raises(type(error)):
        store.get("stage", INPUTS, make)
    assert artifacts(store) == []
    assert store.get("stage", INPUTS, write()).json() == {"text": "ten"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_disk_is_told_and_leaves_the_rest_alone(tmp_path, number):
    store = Store(tmp_path)
    before = store.get("stage", {"seed": 1}, write())

    def make(folder):
        (folder / "half").write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(AlloError, match=os.strerror(number)) as caught:
        store.get("stage", INPUTS, make)
    assert "\n" not in str(caught.value) and "stage" in str(caught.value)
    assert artifacts(store) == [before.key]
    assert Store(tmp_path).get("stage", {"seed": 1}, never) == before


def test_a_store_that_is_a_file_is_told(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(AlloError, match="cannot write stage"):
        Store(tmp_path / "store").get("stage", INPUTS, write())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "deep" / "data.txt").write_text("tex"),
        lambda path: (path / "deep" / "data.txt").unlink(),
        lambda path: (path / MANIFEST).write_text("{"),
        lambda path: (path / MANIFEST).write_text("[]"),
        lambda path: (path / MANIFEST).write_text('{"files": []}'),
        lambda path: (path / MANIFEST).unlink(),
    ],
)
def test_a_damaged_artifact_is_set_aside_and_made_anew(tmp_path, damage, capsys):
    made = Store(tmp_path).get("stage", INPUTS, write())
    damage(made.path)
    store = Store(tmp_path)
    assert store.get("stage", INPUTS, write("anew")).json() == {"text": "anew"}
    assert "damaged" in capsys.readouterr().err
    kept = [name for name in artifacts(store) if name.startswith(f"{made.key}.damaged-")]
    assert len(kept) == 1 and len(artifacts(store)) == 2
    assert Store(tmp_path).get("stage", INPUTS, never).path == made.path


KILLED = """
import os, signal, sys
from allo_lib.engine.store import Store
def make(folder):
    (folder / "half").write_text("half")
    print("in make", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
Store(sys.argv[1]).get("stage", {"seed": 0}, make)
"""


def test_a_killed_process_leaves_no_artifact(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == "in make\n"
    store = Store(tmp_path)
    assert not store.has("stage", {"seed": 0})
    assert store.get("stage", {"seed": 0}, write()).json() == {"text": "ten"}


def test_threads_that_make_the_same_artifact_all_get_a_whole_one(tmp_path):
    gate, found = threading.Barrier(4), []

    def make(folder):
        gate.wait()
        write()(folder)
        time.sleep(0.01)

    def work():
        found.append(Store(tmp_path).get("stage", INPUTS, make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({one.path for one in found}) == 1
    assert artifacts(Store(tmp_path)) == [found[0].key]
    assert Store(tmp_path).get("stage", INPUTS, never).json() == {"text": "ten"}


def _read_damaged(folder, gate, told):
    gate.wait()
    told.put(Store(folder).get("stage", INPUTS, write("anew")).json())


def test_processes_that_find_the_same_damage_all_go_on(tmp_path):
    made = Store(tmp_path).get("stage", INPUTS, write())
    made.file("record.json").write_text("{}")
    context = multiprocessing.get_context("fork")
    gate, told = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_read_damaged, args=(tmp_path, gate, told)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [told.get(timeout=30) for _ in workers] == [{"text": "anew"}] * 3
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def test_what_was_made_anew_meanwhile_stays_where_it_is(tmp_path, monkeypatch):
    made = Store(tmp_path).get("stage", INPUTS, write())
    made.file("record.json").write_text("{}")
    inspect, quicker = store_module._inspect, []

    def slow(path):
        seen = inspect(path)
        if not quicker:
            quicker.append(None)
            quicker[0] = Store(tmp_path).get("stage", INPUTS, write("anew"))
        return seen

    monkeypatch.setattr(store_module, "_inspect", slow)
    assert Store(tmp_path).get("stage", INPUTS, never).json() == {"text": "anew"}
    assert quicker[0].json() == {"text": "anew"}


def test_json_files_are_the_same_bytes_whatever_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, "é"]})
    write_json(tmp_path / "b", {"a": [1.5, "é"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"a": [1.5, "é"], "b": 1}
    with pytest.raises(ValueError):
        write_json(tmp_path / "c", float("nan"))
