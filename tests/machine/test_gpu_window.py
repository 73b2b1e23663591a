"""A window on a GPU, rehearsed on a CPU: what comes back of it is enough to go on from."""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_window
import psutil
import pytest
from conftest import ROOT
from test_notebooks import driver
from test_run_all import until
from tiny_study import PROFILE

from allo_lib.machine.environment import child_environment

METHODS = {"methods": ["dpo"], "ablations": [], "stability": ["orders"]}
FIRST = ("--", "--only", "00")  # of the study


class Window:
    """The script on a machine of its own, which knows no more than what was carried to it."""

    def __init__(self, folder: Path, minutes: float, *given, more=()):
        self.out, self.results = folder / "out", folder / "results"
        self.out.mkdir(parents=True)
        given = ("--minutes", minutes, "--profile", PROFILE, "--results", self.results, *given)
        for name, value in METHODS.items():
            given += ("-p", name, json.dumps(value))
        script = [sys.executable, ROOT / "tests" / "gpu_window.py", "--out", self.out]
        script += [*given, *more]
        self.process = subprocess.Popen([str(part) for part in script], env=child_environment())

    def kill(self) -> None:
        """The whole machine, at once."""
        script = psutil.Process(self.process.pid)
        for one in [script, *script.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def carried(self) -> set[str]:
        """Names of the carried files; everything in the folder has to be as promised."""
        files = [path.stat().st_size for path in self.out.iterdir() if path.suffix != ".part"]
        assert len(files) <= 7 and all(size <= 16e6 for size in files)
        names: set[str] = set()
        for path in self.out.glob(f"{gpu_window.CARRY}[0-9][0-9]"):
            with tarfile.open(path) as archive:
                names |= set(archive.getnames())
        assert not any(name.endswith(".safetensors") for name in names)
        return names

    def told(self) -> dict:
        return json.loads((self.out / gpu_window.TOLD).read_text())

    def log(self) -> str:
        return (self.out / gpu_window.LOG).read_text()


@pytest.mark.slow
def test_a_window_goes_on_from_what_a_killed_one_left(tmp_path):
    """All phases but the costs, which are a study's too, until it is killed; then the study again,
    whose first notebook is done."""
    phases = ("--only", "tests,trace,study")
    first, begun = Window(tmp_path / "first", 10, *phases, more=FIRST), time.monotonic()
    while ".store/done/seed0/00_setup.json" not in first.carried():
        assert first.process.poll() is None and time.monotonic() - begun < 500, first.log()
        time.sleep(0.5)
    first.kill()
    assert [first.told()["phases"][name].get("status") for name in ("tests", "trace")] == [5, 0]
    assert "tests marked gpu are left out: no CUDA device here" in first.log()
    assert first.told()["trace"]["training"]["steps_per_second"] > 0
    names = {path.name for path in first.out.iterdir()}
    assert {"operations.txt", "training.trace.json.gz", "decoding.trace.json.gz"} <= names

    carried = ("--only", "study", "--carried", first.out)
    second = Window(tmp_path / "second", 10, *carried, more=FIRST)
    assert second.process.wait() == 0, second.log()
    assert "00_setup (seed 0): done before" in second.log()
    assert second.told()["carried"] == [f"{gpu_window.CARRY}00"]
    verified = driver("verify", PROFILE, "--out", second.results)
    assert verified.returncode == 0, verified.stderr


def test_one_that_is_asked_to_end_leaves_what_it_has(tmp_path):
    kept = tmp_path / "results" / "kept.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    window = Window(tmp_path, 9, "--only", "tests")
    log = window.out / gpu_window.LOG
    until(lambda: log.exists() and "test session starts" in log.read_text(), 200)
    window.process.send_signal(signal.SIGTERM)
    assert window.process.wait(60) == 128 + signal.SIGTERM
    assert window.carried() == {"kept.json"}
    assert window.told()["phases"]["tests"]["status"] == -signal.SIGTERM


# --- what comes back ---------------------------------------------------------------------------


@pytest.fixture
def window(tmp_path):
    (tmp_path / "out").mkdir()
    return gpu_window.Window(
        argparse.Namespace(
            out=tmp_path / "out", results=tmp_path / "results", minutes=1, profile="toy"
        )
    )


def fill(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_archives_hold_all_but_weights_and_what_is_half_made(tmp_path):
    names = [
        "measurements.csv", "figures/a.png", ".store/result/abc/record.json",
        ".store/done/seed0/00.json", ".store/notes/cells-seed0.json",
    ]  # fmt: skip
    left_out = [
        ".store/sft/abc/model.safetensors", ".store/sft/.abc.partial/step/trainer.json",
        ".store/lock", ".store/running/report.json", ".manifest.json.17",
    ]  # fmt: skip
    for name in names + left_out:
        fill(tmp_path / "results", **{name: name.encode()})
    archives, too_large = gpu_window.archives_of(tmp_path / "results")
    assert len(archives) == 1 and too_large == []
    fill(tmp_path / "carried", **{f"{gpu_window.CARRY}00": archives[0]})
    assert gpu_window.unpack(tmp_path / "carried", tmp_path / "back") == [f"{gpu_window.CARRY}00"]
    found = [path for path in (tmp_path / "back").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "back").as_posix() for path in found} == set(names)
    assert all(path.read_text().endswith(path.name) for path in found)


def test_large_results_come_in_parts_of_which_each_can_be_read(tmp_path, monkeypatch, window):
    monkeypatch.setattr(gpu_window, "PART", 500_000)
    noise = random.Random(0).randbytes
    contents = {f"{number}.bin": noise(200_000) for number in range(4)}
    fill(window.results, **contents, **{"huge.bin": noise(500_001), "last.bin": noise(200_000)})
    window.pack()
    assert window.told["left_out"] == ["huge.bin", "last.bin"]
    names = [f"{gpu_window.CARRY}00", f"{gpu_window.CARRY}01"]
    assert gpu_window.unpack(window.out, tmp_path / "back") == names
    found = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert found == contents
    fill(window.out, **{names[0]: b"no archive"})
    told = gpu_window.unpack(window.out, tmp_path / "rest")
    assert len(told) == 2 and told[0].startswith(f"{names[0]}: ")
    assert {path.name for path in (tmp_path / "rest").iterdir()} == {"2.bin", "3.bin"}


def test_of_a_log_that_is_too_long_the_end_is_kept(window, monkeypatch):
    monkeypatch.setattr(gpu_window, "LARGEST", 100)
    fill(window.out, **{gpu_window.LOG: b"a" * 90 + b"b" * 50})
    monkeypatch.setattr(window, "told", window.told | {"phases": {}})
    window.pack()
    assert (window.out / gpu_window.LOG).read_bytes() == b"b" * 50


def test_a_phase_ends_when_its_share_of_the_time_is_over(window):
    window.length, window.patience = 8.0, 0.2
    begun = time.monotonic()
    window.run("trace", "-c", "import time; time.sleep(60)")
    assert time.monotonic() - begun < 4
    assert window.told["phases"]["trace"]["status"] == -signal.SIGTERM
    window.start -= 8
    window.run("study", "-c", "print(1)")
    assert window.told["phases"]["study"]["status"] == "no time left"
