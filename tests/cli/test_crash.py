"""A run that is killed at any moment goes on, and ends with the bytes of one that was not.

`ALLO_CRASHES=20` asks for 20 killed runs of the study of seconds; 2 are the default.
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
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import start_run_all
from tiny_study import DOMAIN, open_study

from allo_lib.machine.runtime import fork_server
from allo_lib.study import manifest, results, training
from allo_lib.study.manifest import STORE

CRASHES = int(os.environ.get("ALLO_CRASHES", "2"))
LONGEST = 300  # seconds that nothing here takes
KINDS = ("sft", "pairs", "reference", "drafts", "scores", "mask", "reward_model",
         "keep_probabilities", "candidate", "result")  # fmt: skip
# A checkpoint about every half second, so that some kills come before the first and most after it.
SETTINGS = {"methods": ["sft", "dpo", "allo"], "ablations": [],
            "compute__checkpoint_minutes": 0.01}  # fmt: skip

pytestmark = pytest.mark.slow


# --- the study of seconds ----------------------------------------------------------------------


def work(folder: Path, pipe) -> None:
    """All of a small study, in a process group of its own; `pipe` is sent how far it is."""
    os.setsid()
    with open(f"{folder}.log", "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    pipe.send("begun")
    study = open_study(folder, **SETTINGS)
    study.sft(DOMAIN)
    pipe.send("sft")
    study.keep_probabilities(DOMAIN, "train")
    for method in ("allo", "dpo"):
        training.result(study, DOMAIN, method)
    results.update(study, [0])


class Child:
    """One process that does the work in `folder`, from the moment at which it has begun."""

    def __init__(self, folder: Path):
        self.folder, context = folder, fork_server()
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.start = self.hear("begun")

    def hear(self, message: str) -> float:
        """Wait for a message; the time at which it came."""
        assert self.pipe.poll(LONGEST) and self.pipe.recv() == message, self.log()
        return time.monotonic()

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
    assert "is damaged" not in Path(f"{folder}.log").read_text(), "a kill damaged it"
    paths = [p for kind in KINDS for p in (folder / STORE / kind).glob("[!.]*/*")]
    contents = {p: p.read_bytes() for p in paths if p.name != "manifest.json"}
    contents[folder / "measurements.csv"] = (folder / "measurements.csv").read_bytes()
    seconds = re.compile(rb'"seconds": [\d.e+-]+')
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            seconds.sub(b"", content) if path.suffix == ".json" else content
        ).hexdigest()
        for path, content in contents.items()
    }


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
    sft_seconds = child.hear("sft") - child.start
    seconds = child.finish()
    expected, begun = digests(folder), folder.with_name("begun")
    for kind in KINDS:
        assert any(name.startswith(f"{STORE}/{kind}/") for name in expected), kind
    shutil.copytree(folder / STORE / "sft", begun / STORE / "sft")
    return Whole(expected, sft_seconds, seconds - sft_seconds, begun)


@pytest.mark.parametrize("number", range(CRASHES))
def test_a_killed_run_ends_with_the_same_bytes(number, whole, tmp_path):
    """Every other run is killed again and again in the longest stage, the rest once behind it."""
    folder, draw, in_sft = tmp_path / "killed", random.Random(number), number % 2 == 0
    seconds = 0.5 * whole.sft_seconds if in_sft else whole.later_seconds
    for patience in (1, 0.5, 0.25, 0.1):  # the machine may be faster now than it was for `whole`
        shutil.rmtree(folder, ignore_errors=True)
        if not in_sft:
            shutil.copytree(whole.begun, folder)
        if Child(folder).kill(draw.uniform(0.1, 0.9) * seconds * patience):
            break
    else:
        pytest.fail("every run ended before it was killed")
    for _ in range(2 * in_sft):
        Child(folder).kill(draw.uniform(0.1, 0.9) * seconds)
    Child(folder).finish()
    assert digests(folder) == whole.digests


# --- the real commands -------------------------------------------------------------------------


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file that a reader sees; of the manifest all but the wall seconds."""
    found = {name: (folder / name).read_bytes() for name in manifest.file_names(folder)}
    read = manifest.read(folder)
    for run in read["runs"].values():
        run["seconds"] = sorted(run["seconds"])
    return found | {manifest.NAME: json.dumps(read).encode()}


def test_killed_commands_end_with_the_same_bytes(project, tmp_path):
    def start(folder: Path) -> subprocess.Popen:
        return start_run_all(folder, "toy.yaml", "--seeds", "0,1", start_new_session=True)

    def finish(process: subprocess.Popen) -> None:
        _, err = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, err

    whole = shutil.copytree(project, tmp_path / "whole" / "project")
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
        process.stdout.close(), process.stderr.close()  # which its orphans may hold a while
    assert kills >= 2
    finish(start(project))
    assert outputs(project / "results" / "toy") == outputs(whole / "results" / "toy")
