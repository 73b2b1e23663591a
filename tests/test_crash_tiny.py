"""`./run_all.sh tiny` itself, killed at random moments, ends with the bytes of a run that was not.

An hour of work at its full size, so it is asked for: `ALLO_TINY_CRASHES=20` kills twenty times, in
as many runs as `KILLS_A_RUN` leaves. `test_crash` does the same to a study of seconds, always.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_crash import KINDS, digests

from allo_lib.study import manifest

CRASHES = int(os.environ.get("ALLO_TINY_CRASHES", "0"))
KILLS_A_RUN = 5
NOTEBOOKS = "00,01,02,03,04,05,06"  # 07 measures seconds, which no two runs share
LONGEST = 3600  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CRASHES == 0, reason="an hour of work: ask for it with ALLO_TINY_CRASHES"),
]


def start(folder: Path) -> subprocess.Popen:
    """The command of the README, in a process group of its own; its checkpoints come often."""
    options = ["--only", NOTEBOOKS, "--out", folder, "-p", "compute.checkpoint_minutes", "0.25"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(
            [ROOT / "run_all.sh", "tiny", *options],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "PYTHONPATH": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(folder: Path) -> float:
    """Run to the end; seconds."""
    begun = time.monotonic()
    assert start(folder).wait(LONGEST) == 0, Path(f"{folder}.log").read_text()[-2000:]
    return time.monotonic() - begun


def kill(folder: Path, seconds: float) -> bool:
    """Run, and SIGKILL after so long all that it started; False if it had ended before."""
    process = start(folder)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return False
    # Kernels sit in groups of their own, as they do for a user whose machine dies.
    groups = {os.getpgid(pid) for pid in family(process.pid)}
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return [one for one in found if one == pid or one in parents]


def shown(folder: Path) -> dict[str, bytes | str]:
    """What a reader cites, and every artifact; notebooks and manifest tell wall seconds."""
    names = [n for n in manifest.file_names(folder) if not n.startswith(("notebooks", "report"))]
    return {name: (folder / name).read_bytes() for name in names} | digests(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "whole"
    seconds = finish(folder)
    found = shown(folder)
    for kind in KINDS:
        assert any(f"/{kind}/" in name for name in found), kind
    return seconds, found


@pytest.mark.parametrize("number", range(-(-CRASHES // KILLS_A_RUN)))
def test_killed_again_and_again_tiny_ends_with_the_same_bytes(number, whole, tmp_path):
    seconds, expected = whole
    kills = min(KILLS_A_RUN, CRASHES - number * KILLS_A_RUN)
    draw = random.Random(number)
    moments = sorted(draw.uniform(0, seconds) for _ in range(kills))
    folder, last, told = tmp_path / "killed", 0.0, []
    for moment in moments:
        assert kill(folder, moment - last), "the run had ended before it was killed"
        told.append(f"{moment:.0f} s")
        last = moment
    finish(folder)
    print(f"killed at {', '.join(told)} of {seconds:.0f} s")
    found = shown(folder)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    shutil.rmtree(folder)
