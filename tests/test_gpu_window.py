"""A window on a GPU, rehearsed on a CPU: what comes back of it is enough to go on from."""

import argparse
import contextlib
import io
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
from test_gpu import check_study
from test_notebooks import environment
from test_run_all import until
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.study import results, runs

METHODS = ["dpo", "allo"]
REST = ("--", "--only", "00,01,02,03,04,05,06")  # of the study; 07 is a phase of its own
SETTINGS = {"methods": METHODS, "ablations": [], "stability": ["orders"]}
ARCHIVES = f"{gpu_window.CARRY}[0-9][0-9]"


class Window:
    """The script on a machine of its own, which knows no more than what was carried to it."""

    def __init__(self, folder: Path, minutes: float, *given, more=()):
        self.out, self.results = folder / "out", folder / "results"
        self.out.mkdir(parents=True)
        given = ("--minutes", minutes, "--profile", PROFILE, "--results", self.results, *given)
        for name, value in SETTINGS.items():
            given += ("-p", name, json.dumps(value))
        script = [sys.executable, ROOT / "tests" / "gpu_window.py", "--out", self.out]
        script += [*given, *more]
        self.process = subprocess.Popen([str(part) for part in script], env=environment())

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
        assert len(files) <= gpu_window.MOST and all(size <= 16e6 for size in files)
        names: set[str] = set()
        for path in self.out.glob(ARCHIVES):
            with tarfile.open(path) as archive:
                names |= set(archive.getnames())
        assert not any(name.endswith(".safetensors") for name in names)
        return names

    def told(self) -> dict:
        return json.loads((self.out / gpu_window.TOLD).read_text())

    def log(self) -> str:
        return (self.out / gpu_window.LOG).read_text()


@pytest.mark.slow
def test_windows_that_are_cut_off_add_up_to_one_run(tmp_path):
    """All phases, until it is killed; the study, until its time is up; and the study to its end."""
    first, begun = Window(tmp_path / "first", 10), time.monotonic()
    while ".store/done/seed0/00_setup.json" not in first.carried():
        assert first.process.poll() is None and time.monotonic() - begun < 500, first.log()
        time.sleep(0.5)
    first.kill()
    phases = first.told()["phases"]
    assert [phases[name].get("status") for name in gpu_window.PHASES] == [5, 0, 0, None]
    assert "tests marked gpu are left out: no CUDA device here" in first.log()
    assert first.told()["trace"]["training"]["steps_per_second"] > 0
    names = {path.name for path in first.out.iterdir()}
    assert {"operations.txt", "training.trace.json.gz", "decoding.trace.json.gz"} <= names
    assert "tables/efficiency.csv" in first.carried()

    carried = ("--only", "study", "--carried", first.out)
    second = Window(tmp_path / "second", 0.6, *carried, more=REST)
    second.process.wait()
    # Out of time; on a busy machine too late to say what is missing, and then it is ended.
    assert second.told()["phases"]["study"]["status"] in (3, -signal.SIGTERM), second.log()
    carried = ("--only", "study", "--carried", second.out)
    third = Window(tmp_path / "third", 10, *carried, more=REST)
    assert third.process.wait() == 0, third.log()
    for window in (second, third):
        assert "00_setup (seed 0): done before" in window.log()
    assert {"measurements.csv", "manifest.json"} <= third.carried()

    check_study(third.results, "cpu")

    whole = open_study(tmp_path / "whole", **SETTINGS)
    runs.run_methods(whole, {DOMAIN: METHODS})
    results.update(whole, [0])
    expected = (whole.results_dir / "measurements.csv").read_bytes()
    assert (third.results / "measurements.csv").read_bytes() == expected


def test_one_that_is_asked_to_end_leaves_what_it_has(tmp_path):
    kept = tmp_path / "results" / "kept.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    window = Window(tmp_path, 1, "--only", "tests")
    until(lambda: (window.out / gpu_window.TOLD).exists() and "tests" in window.told()["phases"])
    window.process.send_signal(signal.SIGTERM)
    assert window.process.wait(20) == 128 + signal.SIGTERM
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


def test_large_results_come_in_parts_of_which_each_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_window, "PART", 500_000)
    noise = random.Random(0).randbytes
    contents = {f"{number}.bin": noise(200_000) for number in range(7)}
    fill(tmp_path / "results", **contents, **{"huge.bin": noise(500_001)})
    archives, too_large = gpu_window.archives_of(tmp_path / "results")
    assert too_large == ["huge.bin"] and len(archives) == 4
    assert all(len(archive) < 550_000 for archive in archives)
    found = {}
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            found |= {one.name: members.extractfile(one).read() for one in members}
    assert found == contents


def test_an_archive_that_was_damaged_is_told_and_the_others_are_read(tmp_path):
    for number in range(2):
        fill(tmp_path / "results", **{f"{number}.txt": b"x"})
    (archive,), _ = gpu_window.archives_of(tmp_path / "results")
    parts = {f"{gpu_window.CARRY}00": b"no archive", f"{gpu_window.CARRY}01": archive}
    fill(tmp_path / "carried", **parts)
    told = gpu_window.unpack(tmp_path / "carried", tmp_path / "back")
    assert len(told) == 2 and told[0].startswith(f"{gpu_window.CARRY}00: ")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"0.txt", "1.txt"}


@pytest.mark.parametrize("parts, gone", [(1, 0), (2, 0), (3, 1), (5, 3), (6, 4), (9, 7)])
def test_what_matters_least_is_left_out_and_told(parts, gone, window, monkeypatch):
    monkeypatch.setattr(gpu_window, "PART", 500_000)
    rest = gpu_window.LESS_IMPORTANT
    fill(window.out, **dict.fromkeys(rest, b"x"), **{f"{gpu_window.CARRY}08": b"of before"})
    noise = random.Random(0).randbytes
    fill(window.results, **{f"{number}.bin": noise(400_000) for number in range(parts)})
    window.pack()
    names = {path.name for path in window.out.iterdir()}
    archives = [f"{gpu_window.CARRY}{number:02}" for number in range(parts)]
    expected = [*rest[:gone], *archives[parts - max(0, gone - len(rest)) :]]
    told = json.loads((window.out / gpu_window.TOLD).read_text())
    assert told["left_out"] == sorted(expected)
    assert names == {gpu_window.TOLD, *rest, *archives} - set(expected)
    assert len(names) <= gpu_window.MOST


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
