"""A run that is killed at any moment goes on, and ends with the bytes of one that was not.

`ALLO_CRASHES=20` asks for 20 killed runs of the study of seconds; 5 are the default.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_study import DOMAIN, open_study

from allo_lib.machine.runtime import fork_server
from allo_lib.study import arms, manifest, results
from allo_lib.study.study import STORE

CRASHES = int(os.environ.get("ALLO_CRASHES", "5"))
CHAIN = 3  # kills in a row
SFT_SHARE = 0.4  # of the runs are killed in the longest stage; the others begin behind it
LONGEST = 300  # seconds that nothing here takes
KINDS = ("sft", "pairs", "reference", "drafts", "scores", "mask", "reward_model",
         "keep_probabilities", "candidate", "result")  # fmt: skip
# A checkpoint about every half second, so that some kills come before the first and most after it.
SETTINGS = {"methods": ["sft", "dpo", "allo"], "ablations": [],
            "compute__checkpoint_minutes": 0.01}  # fmt: skip

pytestmark = pytest.mark.slow


# --- the study of seconds ----------------------------------------------------------------------


def work(folder: Path, told) -> None:
    """All of a small study, in a process group of its own; `told` hears how far it is."""
    os.setsid()
    with open(f"{folder}.log", "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    told.send("begun")
    study = open_study(folder, **SETTINGS)
    study.sft(DOMAIN)
    told.send("sft")
    study.pairs(DOMAIN)
    study.scores(DOMAIN)
    study.mask(DOMAIN)
    study.keep_probabilities(DOMAIN, "train")
    for method in ("allo", "dpo"):
        arms.result(study, DOMAIN, method)
    results.update(study, [0])


class Child:
    """One process that does the work in `folder`, from the moment at which it has begun."""

    def __init__(self, folder: Path):
        self.folder, context = folder, fork_server()
        self.heard, told = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(folder, told), daemon=True)
        self.process.start()
        told.close()
        self.hear("begun")
        self.start = time.monotonic()

    def hear(self, message: str) -> float:
        """Wait for a message; seconds since the beginning."""
        assert self.heard.poll(LONGEST), self.log()
        assert self.heard.recv() == message
        return time.monotonic() - getattr(self, "start", time.monotonic())

    def log(self) -> str:
        return Path(f"{self.folder}.log").read_text(errors="replace")[-2000:]

    def finish(self) -> float:
        """Wait until all is done; seconds since the beginning."""
        self.process.join(LONGEST)
        assert self.process.exitcode == 0, self.log()
        return time.monotonic() - self.start

    def kill(self, moment: float) -> bool:
        """SIGKILL to the whole group, `moment` seconds after the beginning; False if too late."""
        self.process.join(max(0, self.start + moment - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the measurements and of every file of every artifact, without wall seconds."""
    found = {"measurements.csv": _sha256((folder / "measurements.csv").read_bytes())}
    assert not list(folder.rglob("*.damaged-*")), "a kill damaged an artifact"
    for kind in KINDS:
        for path in (folder / STORE / kind).glob("[!.]*/*"):
            if path.name != "manifest.json":
                name = path.relative_to(folder).as_posix()
                found[name] = _sha256(_without_seconds(path))
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _without_seconds(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    return re.sub(rb'"seconds": [\d.e+-]+', b'"seconds": 0', path.read_bytes())


@dataclass
class Whole:
    """The unbroken run, how long it takes, and a folder in which only its SFT model is."""

    digests: dict[str, str]
    sft_seconds: float
    later_seconds: float
    begun: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash") / "whole"
    child = Child(folder)
    sft_seconds = child.hear("sft")
    child.finish()
    found = digests(folder)
    for kind in KINDS:
        assert any(name.startswith(f"{STORE}/{kind}/") for name in found), kind
    begun, again = folder.with_name("begun"), folder.with_name("again")
    shutil.copytree(folder / STORE / "sft", begun / STORE / "sft")
    shutil.copytree(begun, again)
    later_seconds = Child(again).finish()
    assert digests(again) == found
    return Whole(found, sft_seconds, later_seconds, begun)


def killed_once(tmp_path: Path, begun: Path | None, moment: float) -> Path:
    """A folder in which a run was killed; earlier than asked where that came too late."""
    for number in range(5):
        folder = tmp_path / f"try{number}"
        if begun is not None:
            shutil.copytree(begun, folder)
        if Child(folder).kill(moment):
            return folder
        moment *= 0.7
    raise AssertionError("every run ended before it was killed")


@pytest.mark.parametrize("number", range(CRASHES))
def test_a_killed_run_ends_with_the_same_bytes(number, whole, tmp_path):
    in_sft = number % 5 < 5 * SFT_SHARE
    seconds, begun = (whole.sft_seconds, None) if in_sft else (whole.later_seconds, whole.begun)
    folder = killed_once(tmp_path, begun, random.Random(number).random() * seconds)
    Child(folder).finish()
    assert digests(folder) == whole.digests


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(whole, tmp_path):
    folder, draw = tmp_path / "chain", random.Random(CRASHES)
    moments = [draw.uniform(0.1, 0.5) * whole.sft_seconds for _ in range(CHAIN)]
    assert sum(Child(folder).kill(moment) for moment in moments) >= 2
    Child(folder).finish()
    assert digests(folder) == whole.digests


# --- the real commands -------------------------------------------------------------------------


def start(project: Path) -> subprocess.Popen:
    """`run_all.sh` on the stand-in notebooks, in a process group of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [project / "run_all.sh", "toy.yaml", "--seeds", "0,1"],
        cwd=project,
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, err.decode()


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file that a reader sees; of the manifest all but the wall seconds."""
    found = {name: (folder / name).read_bytes() for name in manifest.file_names(folder)}
    told = manifest.read(folder)
    for run in told["runs"].values():
        run["seconds"] = sorted(run["seconds"])
    return found | {manifest.NAME: json.dumps(told).encode()}


def test_killed_commands_end_with_the_same_bytes(project, tmp_path):
    whole = tmp_path / "whole" / "project"
    shutil.copytree(project, whole)
    begun = time.monotonic()
    finish(start(whole))
    seconds, draw, kills = time.monotonic() - begun, random.Random(0), 0
    for _ in range(max(3, CRASHES // 3)):
        process = start(project)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Short enough for all kills to come before the end of what is left.
            process.wait(draw.uniform(0.05, 0.3) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert kills >= 2
    finish(start(project))
    assert outputs(project / "results" / "toy") == outputs(whole / "results" / "toy")
