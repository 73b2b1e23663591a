"""A run that is killed, stopped, cut off by the clock, or carried on without its weights, ends with
the bytes of one that was not.

`ALLO_CRASHES=20` kills a study of seconds 20 times; 3 are the default.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROW, run_all, start_run_all, write_notebook
from test_run_all import ALL, make_run, until
from test_run_all import study as toy  # noqa: F401  (a fixture)
from tiny_study import DOMAIN, open_study

from allo_lib import allo
from allo_lib.cli import cli, driver, verify
from allo_lib.engine.store import MANIFEST, sha256, write_json
from allo_lib.machine import weights
from allo_lib.machine.runtime import fork_server
from allo_lib.study import manifest, results, runs, scoring, training

CRASHES = int(os.environ.get("ALLO_CRASHES", "3"))
LONGEST = 300  # seconds that nothing here takes

# --- a study that is killed ----------------------------------------------------------------------

KINDS = ("sft", "pairs", "reference", "drafts", "scores", "mask", "reward_model",
         "keep_probabilities", "candidate", "result")  # fmt: skip


def work(folder: Path) -> None:
    """All of a small study, in a process group of its own, with a checkpoint every half second."""
    os.setsid()
    settings = {"methods": ["sft", "dpo", "allo"], "compute__checkpoint_minutes": 0.01}
    study = open_study(folder, ablations=[], **settings)
    for method in ("allo", "dpo"):
        training.result(study, DOMAIN, method)
    results.update(study, [0])


def start(folder: Path):
    process = fork_server().Process(target=work, args=(folder,), daemon=True)
    process.start()
    return process


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the measurements and of every file of every artifact, without wall seconds."""
    paths = [p for kind in KINDS for p in (folder / manifest.STORE / kind).glob("[!.]*/*")]
    contents = {p: p.read_bytes() for p in paths if p.name != MANIFEST}
    contents[folder / "measurements.csv"] = (folder / "measurements.csv").read_bytes()
    seconds = re.compile(rb'"seconds": [\d.e+-]+')
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            seconds.sub(b"", content) if path.suffix == ".json" else content
        ).hexdigest()
        for path, content in contents.items()
    }


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    begun, whole = time.monotonic(), start(tmp_path / "whole")
    whole.join(LONGEST)
    seconds, expected = time.monotonic() - begun, digests(tmp_path / "whole")
    for kind in KINDS:
        assert any(name.startswith(f"{manifest.STORE}/{kind}/") for name in expected), kind
    draw, kills = random.Random(0), 0
    for _ in range(CRASHES):
        process = start(tmp_path / "killed")
        process.join(draw.uniform(0.1, 0.4) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    last = start(tmp_path / "killed")
    last.join(LONGEST)
    assert kills and last.exitcode == 0 and digests(tmp_path / "killed") == expected


# --- a command that is killed, stopped, or out of time -------------------------------------------

WAIT = f"""
import os, time
from pathlib import Path
store = Path(results_dir, ".store")
(store / "kernel").write_text(str(os.getpid()))
while (store / "wait").exists():
    time.sleep(0.05)
{ROW}
"""


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file that a reader sees; of the manifest all but the wall seconds."""
    contents = {name: (folder / name).read_bytes() for name in manifest.file_names(folder)}
    read = manifest.read(folder)
    for run in read["runs"].values():
        run["seconds"] = sorted(run["seconds"])
    return contents | {manifest.NAME: json.dumps(read).encode()}


@pytest.mark.slow
def test_a_command_that_was_stopped_in_every_way_ends_with_the_same_bytes(project, tmp_path):
    write_notebook(project / "notebooks", "01_second", WAIT)
    whole = shutil.copytree(project, tmp_path / "whole" / "project")
    assert run_all(whole, "toy.yaml").returncode == 0
    store = project / "results" / "toy" / ".store"
    store.mkdir(parents=True)
    (store / "wait").touch()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGALRM):
        (store / "kernel").unlink(missing_ok=True)
        at_clock = number is signal.SIGALRM
        process = start_run_all(project, "toy.yaml", *["--minutes", "0.7"] * at_clock)
        until(lambda: (store / "kernel").exists() and (store / "kernel").read_text())
        if not at_clock:
            process.send_signal(number)
        out, err = process.communicate(timeout=LONGEST)
        ends = {signal.SIGKILL: -number, signal.SIGTERM: 128 + number, signal.SIGALRM: cli.TIME_UP}
        assert process.returncode == ends[number], err
        assert number is not signal.SIGTERM or "goes on from here" in err
        until(lambda: not Path("/proc", (store / "kernel").read_text()).exists())
    assert "time is up, and the same command goes on from here" in out
    for line in ("seed0  01_second: missing", "all  06_merge: missing"):
        assert f"\n{line}\n" in out
    assert "seed 0, toy: methods sft_base" in out
    assert run_all(project, "verify", "toy.yaml").returncode == 0
    (store / "wait").unlink()
    ended = run_all(project, "toy.yaml", "--minutes", "60")
    assert ended.returncode == 0, ended.stderr
    assert "00_first (seed 0): done before" in ended.stdout
    assert outputs(project / "results" / "toy") == outputs(whole / "results" / "toy")


def test_a_run_that_is_cut_off_is_whole_and_goes_on(toy, project, monkeypatch):  # noqa: F811
    run, ran = toy
    fake = driver.execute

    def slow(notebook, *rest):
        if notebook.stem == "01_second":
            time.sleep(60)
        fake(notebook, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "execute", slow)
        late = make_run(project, deadline=time.monotonic() + 1)
        assert [step.notebook.stem for step in driver.run_study(late)] == ["00_first"]
    assert verify.check_files(run) == [] and ran == ALL[:1]
    assert list(manifest.read(run.results)["runs"]["seed0"]["seconds"]) == ["00_first"]
    assert driver.run_study(late) == [] and ran == ALL[:1]  # nothing begins when time is up
    driver.run_study(run)
    assert ran == ALL
    assert all(step.is_done() for step in driver.steps(late))


# --- a study without its weights -----------------------------------------------------------------

METHODS = ["dpo", "dpo_top10"]


@pytest.fixture
def trained(monkeypatch):
    """Labels of all trainings, in their order."""
    labels, real = [], allo.train

    def train(model, rows, collator, loss, optimizer, schedule, label, *others):
        labels.append(label)
        return real(model, rows, collator, loss, optimizer, schedule, label, *others)

    monkeypatch.setattr(allo, "train", train)
    return labels


def opened(folder: Path, methods=("dpo",), **changes):
    return open_study(folder, methods=list(methods), ablations=[], **changes)


@pytest.fixture(scope="module")
def measured(tiny_study, tmp_path_factory):
    """Results of the SFT model and of DPO and their rows; another method is cut off in its end."""
    begun = tiny_study.results_dir.with_name("tiny_study_begun")
    folder = shutil.copytree(begun, tmp_path_factory.mktemp("measured") / "results")
    study = opened(folder)
    results.update(study, [0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(driver.Stopped):
        patch.setattr(scoring, "measure", lambda *_: (_ for _ in ()).throw(driver.Stopped(15)))
        training.result(study, DOMAIN, "dpo_top10")
    return folder


@pytest.fixture
def there(measured, tmp_path):
    """A copy of it without a single tensor."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(measured, tmp_path / "there", ignore=ignored)


def test_nothing_is_trained_whose_result_is_there_and_the_rest_is_listed(measured, there, trained):
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    (line,) = runs.missing(opened(there, [*METHODS, "npo"]))
    assert line.partition(" (")[0] == f"seed 0, {DOMAIN}: methods dpo_top10, npo"
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    (there / "measurements.csv").unlink()
    results.update(opened(there), [0])
    name = "measurements.csv"
    assert (there / name).read_bytes() == (measured / name).read_bytes()
    assert trained == [] and not list(there.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_next_method_is_measured_to_the_same_bits(measured, there, tmp_path, trained):
    here = shutil.copytree(measured, tmp_path / "here")
    answers, models = {}, {}
    for folder in (here, there):
        study = opened(folder, METHODS)
        answers[folder] = runs.run_methods(study, {DOMAIN: ["sft_base", *METHODS]})
        models[folder] = weights.snapshot(training.trained_model(study, DOMAIN, "dpo")[0])
    assert answers[here] == answers[there]
    assert all(torch.equal(models[there][name], value) for name, value in models[here].items())
    # Both candidates were there; without their weights the chosen one is trained again, and DPO's,
    # which is asked for here, as by a notebook. Pairs and reward model are not needed.
    *shared, chosen, kept = trained
    assert shared == [f"{DOMAIN}, {x}" for x in ("pretrain", "sft", "importance (delta)")]
    assert all(label.startswith(f"{DOMAIN}, dpo at ") for label in (chosen, kept))
    assert "trained_again" not in manifest.noted(there)


@pytest.mark.slow
def test_weights_with_other_bits_are_told(measured, there, monkeypatch, capsys):
    """As on another GPU: here a copy of the SFT model of which one weight is another."""
    (first,) = measured.glob(f"{manifest.STORE}/sft/*/model.safetensors")

    def elsewhere(self, name, target):
        tensors = weights.read_tensors(first)
        next(iter(tensors.values()))[0, 0] += 1e-3
        weights.save_tensors(tensors, target / "model.safetensors")
        write_json(target / "record.json", {})

    monkeypatch.setattr("allo_lib.study.study.Study._make_sft", elsewhere)
    monkeypatch.setattr("allo_lib.study.study.device_name", lambda device: "Another GPU")
    monkeypatch.setattr("allo_lib.study.training.device_name", lambda device: "Another GPU")
    study = opened(there, METHODS)
    results.update(study, [0])
    assert re.search(r"^sft/\w+: made again with other bits$", capsys.readouterr().err, re.M)
    before, after = (training.result(study, DOMAIN, method) for method in METHODS)
    # The chosen candidate was trained again, and its result tells of that training.
    records = [
        json.loads(p.read_text())
        for p in measured.glob(f"{manifest.STORE}/candidate/*/record.json")
    ]
    assert after["displacement"] not in [record["displacement"] for record in records]
    assert before["sft"] == sha256(first)[:12] != after["sft"]
    noted = manifest.noted(there)
    again = {f"seed0.{DOMAIN}.{kind}": "Another GPU" for kind in ("sft", "scores")}
    assert noted["trained_again"] == again
    cells = noted["cells"]["seed0"]
    assert cells[f"Another GPU, SFT model {after['sft']}"] == {DOMAIN: ["dpo_top10"]}
    assert cells[f"{before['device']}, SFT model {before['sft']}"] == {DOMAIN: ["sft_base", "dpo"]}
