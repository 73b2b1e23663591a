"""A study in short windows: ended by the clock, carried without weights, gone on with elsewhere."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROW, run_all, write_notebook
from test_run_all import make_run
from test_run_all import study as toy  # noqa: F401  (a fixture)
from test_store import never, stamps
from tiny_study import DOMAIN, open_study

from allo_lib import allo
from allo_lib.cli import cli, driver, status, verify
from allo_lib.engine import provenance
from allo_lib.engine.store import MANIFEST, NotMade, Store, sha256, write_json
from allo_lib.errors import AlloError
from allo_lib.machine import weights
from allo_lib.study import manifest, results, runs, scoring, training
from allo_lib.study.manifest import STORE

TENSORS = {"a": torch.arange(6.0)}
INPUTS = {"seed": 0}
METHODS = ["dpo", "dpo_top10"]


# --- an artifact without its tensors -------------------------------------------------------------


def make(value: float = 1.0, text: str = "first"):
    """A maker of two files of tensors, one of them in a subfolder, and a record."""

    def write(folder):
        (folder / "deep").mkdir()
        weights.save_tensors(TENSORS, folder / "same.safetensors")
        weights.save_tensors({"b": torch.tensor([value])}, folder / "deep" / "b.safetensors")
        write_json(folder / "record.json", {"text": text})

    return write


def value_of(artifact) -> float:
    return weights.read_tensors(artifact.file("deep/b.safetensors"))["b"].item()


def lose(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def carried(folder: Path, target: Path) -> Path:
    """A copy without a single tensor."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


def test_what_is_known_of_it_is_read_and_nothing_is_made(tmp_path):
    made = Store(tmp_path).get("stage", INPUTS, make())
    lose(tmp_path)
    shutil.rmtree(made.path / "deep")  # as after a carrier that knows no empty folders
    store = Store(tmp_path)
    assert store.has("stage", INPUTS)
    found = store.get("stage", INPUTS, never)
    assert found == made and found.json() == {"text": "first"}
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"record.json", MANIFEST}
    with store.only_reading(), pytest.raises(NotMade):
        found.file("same.safetensors")


def test_equal_tensors_join_what_is_there(tmp_path, capsys):
    made = Store(tmp_path).get("stage", INPUTS, make())
    lose(tmp_path)
    before = {p.name: p.read_bytes() for p in made.path.iterdir() if p.is_file()}
    # The record may hold wall seconds: it stays as it was.
    found = Store(tmp_path).get("stage", INPUTS, make(text="second"), changed=pytest.fail)
    assert value_of(found) == 1.0 and found.file("same.safetensors").exists()
    assert {p.name: p.read_bytes() for p in made.path.iterdir() if p.name in before} == before
    assert capsys.readouterr().err == ""
    assert value_of(Store(tmp_path).get("stage", INPUTS, never)) == 1.0
    assert [p.name for p in (tmp_path / "stage").iterdir()] == [made.key]


def test_other_bits_replace_all_of_it_and_are_told(tmp_path, capsys):
    made, told = Store(tmp_path).get("stage", INPUTS, make()), []
    lose(tmp_path)
    store = Store(tmp_path)
    changed = lambda: told.append(made.json())  # noqa: E731
    found = store.get("stage", INPUTS, make(2.0, "second"), changed)
    assert value_of(found) == 2.0 and found.json() == {"text": "second"}
    assert told == [{"text": "first"}]  # heard before anything was replaced
    assert capsys.readouterr().err == f"stage/{made.key}: made again with other bits\n"
    files = found.json(MANIFEST)["files"]
    assert files == {name: sha256(made.path / name) for name in files}
    assert value_of(Store(tmp_path).get("stage", INPUTS, never)) == 2.0


def test_a_file_that_is_not_made_again_is_told(tmp_path):
    Store(tmp_path).get("stage", INPUTS, make())
    lose(tmp_path)
    found = Store(tmp_path).get("stage", INPUTS, lambda f: write_json(f / "record.json", {}))
    with pytest.raises(AlloError, match="made again and has no same.safetensors now: run again"):
        found.file("same.safetensors")
    assert Store(tmp_path).get("stage", INPUTS, never).json() == {}


def _ask(folder, gate, told):
    mine = float(os.getpid())
    found = Store(folder).get("stage", INPUTS, make(mine, str(mine)))
    gate.wait()
    told.put((value_of(found), found.json()["text"]))


def test_processes_that_make_it_again_with_other_bits_go_on_from_the_same(tmp_path):
    Store(tmp_path).get("stage", INPUTS, make())
    lose(tmp_path)
    context = multiprocessing.get_context("fork")
    gate, told = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_ask, args=(tmp_path, gate, told)) for _ in range(3)]
    for worker in workers:
        worker.start()
    ((value, text),) = {told.get(timeout=30) for _ in workers}
    assert text == str(value) and value in [float(worker.pid) for worker in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list((tmp_path / "stage").iterdir())) == 1


# --- a study without its weights -----------------------------------------------------------------


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


def test_nothing_is_trained_whose_result_is_there(measured, tmp_path, trained):
    folder = carried(measured, tmp_path / "there")
    (folder / "measurements.csv").unlink()
    results.update(opened(folder), [0])
    name = "measurements.csv"
    assert (folder / name).read_bytes() == (measured / name).read_bytes()
    assert trained == [] and not list(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_next_method_is_measured_to_the_same_bits(measured, tmp_path, trained):
    there = carried(measured, tmp_path / "there")
    here = shutil.copytree(measured, tmp_path / "here")
    found, models = {}, {}
    for folder in (here, there):
        study = opened(folder, METHODS)
        found[folder] = runs.run_methods(study, {DOMAIN: ["sft_base", *METHODS]})
        models[folder] = weights.snapshot(training.trained_model(study, DOMAIN, "dpo")[0])
    assert found[here] == found[there]
    assert all(torch.equal(models[there][name], value) for name, value in models[here].items())
    # Both candidates were there; without their weights the chosen one is trained again, and DPO's,
    # which is asked for here, as by a notebook. Pairs and reward model are not needed.
    *shared, chosen, kept = trained
    assert shared == [f"{DOMAIN}, {x}" for x in ("pretrain", "sft", "importance (delta)")]
    assert all(label.startswith(f"{DOMAIN}, dpo at ") for label in (chosen, kept))
    assert "trained_again" not in manifest.noted(there)
    for kind in ("sft", "mask", "scores", "reference"):
        again = [p.relative_to(there) for p in there.glob(f"{STORE}/{kind}/*/*.safetensors")]
        assert again and all((there / p).read_bytes() == (here / p).read_bytes() for p in again)


def test_lost_weights_are_made_again_on_as_many_threads(measured, tmp_path, monkeypatch):
    study, seen = opened(carried(measured, tmp_path / "there")), []
    found = study.sft(DOMAIN)
    made = lambda self, name, folder: seen.append(torch.get_num_threads())  # noqa: E731
    monkeypatch.setattr(type(study), "_make_sft", made)
    torch.set_num_threads(2)
    try:
        with pytest.raises(AlloError):
            found.file("model.safetensors")
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_with_other_bits_are_told(measured, tmp_path, monkeypatch, capsys):
    """As on another GPU: here a copy of the SFT model of which one weight is another."""
    folder = carried(measured, tmp_path / "there")
    (first,) = measured.glob(f"{STORE}/sft/*/model.safetensors")

    def elsewhere(self, name, target):
        tensors = weights.read_tensors(first)
        next(iter(tensors.values()))[0, 0] += 1e-3
        weights.save_tensors(tensors, target / "model.safetensors")
        write_json(target / "record.json", {})

    monkeypatch.setattr("allo_lib.study.study.Study._make_sft", elsewhere)
    monkeypatch.setattr("allo_lib.study.study.device_name", lambda device: "Another GPU")
    monkeypatch.setattr("allo_lib.study.training.device_name", lambda device: "Another GPU")
    study = opened(folder, METHODS)
    results.update(study, [0])
    assert re.search(r"^sft/\w+: made again with other bits$", capsys.readouterr().err, re.M)
    before, after = (training.result(study, DOMAIN, method) for method in METHODS)
    # The chosen candidate was trained again, and its result tells of that training.
    records = [json.loads(p.read_text()) for p in measured.glob(f"{STORE}/candidate/*/record.json")]
    assert after["displacement"] not in [record["displacement"] for record in records]
    (chosen,) = [one for one in after["tried"] if one["rates"] == after["rates"]]
    assert {key: after[key] for key in ("dev", "displacement")}.items() <= chosen.items()
    assert before["sft"] == sha256(first)[:12] != after["sft"]
    told = manifest.noted(folder)
    assert told["trained_again"] == {
        f"seed0.{DOMAIN}.{kind}": "Another GPU" for kind in ("sft", "scores")}  # fmt: skip
    cells = told["cells"]["seed0"]
    assert cells[f"Another GPU, SFT model {after['sft']}"] == {DOMAIN: ["dpo_top10"]}
    assert cells[f"{before['device']}, SFT model {before['sft']}"] == {DOMAIN: ["sft_base", "dpo"]}


def test_one_device_and_two_sft_models_are_told_too():
    starts = {"dpo": "aa", "npo": "bb"}
    found = {method: {"device": "GPU", "sft": sft} for method, sft in starts.items()}
    cells = provenance.cells_of(found | {"old": {}})
    assert cells == {
        "GPU, SFT model aa": ["dpo"],
        "GPU, SFT model bb": ["npo"],
        "not told, SFT model not told": ["old"],
    }
    line = provenance.several_devices({"seed0": {place: {"toy": m} for place, m in cells.items()}})
    assert "GPU, SFT model bb: seed0, toy: npo" in line
    assert provenance.cells_of({"dpo": found["dpo"], "old": {}}) == {
        "GPU": ["dpo"],
        "not told": ["old"],
    }


# --- what is missing -----------------------------------------------------------------------------


def test_methods_without_a_result_are_told_and_nothing_is_made(measured, tmp_path, trained):
    folder = carried(measured, tmp_path / "there")
    study, before = opened(folder, [*METHODS, "npo"]), stamps(folder / STORE)
    (line,) = runs.missing(study)
    assert line == f"seed 0, {DOMAIN}: methods dpo_top10, npo"
    (line,) = runs.missing(opened(folder, METHODS, seed=1))
    assert line == f"seed 1, {DOMAIN}: methods sft_base, dpo, dpo_top10"
    assert stamps(folder / STORE) == before and trained == []


def test_what_cannot_be_told_is_told(toy, monkeypatch):  # noqa: F811
    run, _ = toy
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: no data\n")
    monkeypatch.setattr(status.subprocess, "run", lambda *_, **__: failed)
    assert status.missing(run).splitlines() == [
        "seed0: notebooks 00_first, 01_second", "all: notebooks 06_merge",
        "methods: cannot be told (OSError: no data)"]  # fmt: skip


# --- the clock -----------------------------------------------------------------------------------


def test_minutes_leave_time_for_the_end(monkeypatch):
    monkeypatch.delenv(cli.STARTED_VARIABLE, raising=False)
    assert cli.parse_minutes("9") == pytest.approx(540 - cli.ENDING_SECONDS, abs=0.1)
    assert cli.parse_minutes("0.2") == pytest.approx(9, abs=0.1)
    monkeypatch.setenv(cli.STARTED_VARIABLE, str(time.time() - 100))
    assert cli.parse_minutes("9.") == pytest.approx(440 - cli.ENDING_SECONDS, abs=0.1)


def test_a_run_that_is_cut_off_is_whole_and_goes_on(toy, monkeypatch):  # noqa: F811
    run, ran = toy
    fake = driver.execute

    def cut(run, job):
        if "01_second" in job.notebook:
            raise driver.TimeUp
        fake(run, job)

    with monkeypatch.context() as patch, pytest.raises(driver.TimeUp) as stopped:
        patch.setattr(driver, "execute", cut)
        driver.run_study(run)
    assert stopped.value.written == ["notebooks/00_first.ipynb"]
    assert verify.check_files(run) == [] and ran == [("00_first", 0)]
    assert list(manifest.read(run.results)["runs"]["seed0"]["seconds"]) == ["00_first"]
    driver.run_study(run)
    assert ran == [("00_first", 0), ("01_second", 0), ("06_merge", [0])]


def test_no_notebook_begins_when_time_is_up(toy, project):  # noqa: F811
    _, ran = toy
    late = make_run(project, deadline=time.monotonic() - 1)
    with pytest.raises(driver.TimeUp):
        driver.run_study(late)
    assert ran == []
    driver.run_study(make_run(project))
    assert driver.run_study(late) == []  # done before: there is nothing to be late with


SLOW_ONCE = f"""
import time
from pathlib import Path
flag = Path(results_dir, ".store", "flag")
if not flag.exists():
    flag.touch()
    time.sleep(300)
{ROW}
"""


@pytest.mark.slow
def test_time_that_runs_out_ends_the_command_and_the_same_one_goes_on(project):
    write_notebook(project / "notebooks", "01_second", SLOW_ONCE)
    flag = project / "results" / "toy" / ".store" / "flag"
    for minutes in ("0.3", "0.5", "1"):  # on a busy machine the first one may not get to the flag
        ended = run_all(project, "toy.yaml", "--minutes", minutes)
        assert ended.returncode == cli.TIME_UP, ended.stderr
        if flag.exists():
            break
    assert ended.stdout.split("missing:\n")[1].splitlines() == [
        "seed0: notebooks 01_second",
        "all: notebooks 06_merge",
        "seed 0, toy: methods sft_base",
    ]
    assert run_all(project, "verify", "toy.yaml").returncode == 0
    ended = run_all(project, "toy.yaml", "--minutes", "60")
    assert ended.returncode == 0, ended.stderr
    assert "00_first (seed 0): done before" in ended.stdout
