"""Lock, ranges and conda file agree; set-up is idempotent; workers end with their run."""

import importlib.metadata
import signal
import subprocess
import sys
import time
import tomllib

import psutil
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from allo_lib.errors import AlloError
from allo_lib.machine import environment


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct(*extras: str) -> list[Requirement]:
    texts = [t for extra in extras for t in project()["optional-dependencies"][extra]]
    return [*map(Requirement, [*texts, *environment.requirements()])]


def pins() -> dict[str, str]:
    """name -> version; every line of the lock is an exact pin."""
    lines = (ROOT / environment.LOCK).read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version.split(";")[0].strip() for name, version in split}


def test_every_direct_requirement_is_pinned_within_its_range():
    for wanted in direct("test", "docs"):
        assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("extra", ["test", pytest.param("docs", marks=pytest.mark.site)])
def test_lock_holds_every_indirect_requirement(extra):
    todo, seen = direct(extra), set()
    while todo:
        name = canonicalize_name(todo.pop().name)
        # What torch itself needs depends on its build (CPU or CUDA); torch pins it.
        if name in seen or name == "torch":
            continue
        seen.add(name)
        assert name in pins(), f"{name} is not in the lock"
        needed = map(Requirement, importlib.metadata.requires(name) or [])
        todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_conda_file_installs_the_lock_and_the_same_python():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    assert conda == [f"python{project()['requires-python']}", "pip"]


@pytest.mark.parametrize("installed, missing", [
    ({}, []),
    ({"torch": "2.14.0a0+nightly"}, []),  # another build of it is used as it is
    ({"torch": "2.10.9", "datasets": None},
     ["datasets>=4.0: not installed", "torch>=2.11: 2.10.9 is installed"]),
])  # fmt: skip
def test_ranges_that_are_not_met_are_named(monkeypatch, installed, missing):
    real = environment._version
    there = lambda name: installed[name] if name in installed else real(name)  # noqa: E731
    monkeypatch.setattr(environment, "_version", there)
    assert environment.unmet(tests=True) == missing
    if not missing:
        assert environment.prepare(tests=True) == sys.executable


def test_set_up_installs_once_and_again_after_a_failure_or_another_lock(tmp_path, monkeypatch):
    commands, fails = [], [True]

    def run(command, check, **_):
        commands.append(command[2])
        if fails and "pip" in command:
            raise subprocess.CalledProcessError(fails.pop(), command)

    (tmp_path / environment.LOCK).write_text("torch==2.13.0\n")
    monkeypatch.setattr(environment, "unmet", lambda root, tests: ["torch: not installed"])
    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(AlloError, match="could not install requirements.lock"):
        environment.prepare(tmp_path)
    for _ in range(2):
        assert environment.prepare(tmp_path) == str(tmp_path / ".venv" / "bin" / "python")
    assert commands == ["venv", "pip"] * 2
    (tmp_path / environment.LOCK).write_text("torch==2.13.1\n")
    for _ in range(2):
        environment.prepare(tmp_path)
    assert commands == ["venv", "pip"] * 3


def test_a_checkout_that_cannot_be_written_ends_in_a_line(monkeypatch, capsys):
    def refused(**_):
        raise PermissionError(13, "Permission denied", "/there/.venv")

    monkeypatch.setattr(environment, "prepare", refused)
    assert environment.main() == 2
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("run_all: cannot make .venv here ([Errno 13] Perm")
    assert told.err.count("\n") == 1


RUN = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from allo_lib.machine.runtime import fork_server, leave_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=fork_server(), initializer=leave_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def runs(pid: int) -> bool:
    # A dead process stays listed until its parent asks how it ended.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_the_process_that_asked_for_it(tmp_path, number):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True,
        env=environment.child_environment(),
    )  # fmt: skip
    with run.stdout:
        worker = int(run.stdout.readline())
    try:
        assert runs(worker)
        run.send_signal(number)
        run.wait()
        until = time.monotonic() + 10
        while runs(worker) and time.monotonic() < until:
            time.sleep(0.1)
        assert not runs(worker)
    finally:
        run.kill()
        run.wait()
        if psutil.pid_exists(worker):
            psutil.Process(worker).kill()


INTERRUPTED = """
import os, signal, time
from allo_lib.machine.runtime import start_early

start_early()
time.sleep(0.5)  # the server imports for seconds
try:
    os.killpg(0, signal.SIGINT)
except KeyboardInterrupt:
    time.sleep(1)
    print("the caller alone")
"""


def test_an_interrupted_caller_leaves_no_traceback_of_the_server_behind():
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True,
        env=environment.child_environment(), start_new_session=True,
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("the caller alone\n", "")
