"""Runs: done only once, whole or absent, and never over somebody else's results."""

import csv
import json
import signal
import time
from pathlib import Path

import nbformat
import pytest
from conftest import PROFILE, run_all, start_run_all, write_notebook

from allo_lib.cli import cli, driver, execute, verify
from allo_lib.evaluation import outcomes
from allo_lib.study import manifest
from tests import synthetic_results

SECOND = 'raise ValueError("the loss\\nis NaN")'


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file that a reader sees."""
    paths = [folder / name for name in [*manifest.file_names(folder), manifest.NAME]]
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths if p.exists()}


# ---- through the shell, with real kernels -----------------------------------------------------


def test_a_run_is_whole_repeatable_and_verifiable(project):
    first = run_all(project, "toy.yaml", "--seeds", "3")
    assert first.returncode == 0, first.stderr
    results = project / "results" / "toy"
    assert "here is 00_first with seed 3" in first.stdout
    assert "toy: 5 files written; took 0 min" in first.stdout
    for name in ("00_first_seed3", "01_second_seed3", "06_merge"):
        text = (results / "notebooks" / f"{name}.ipynb").read_text()
        assert str(project.parent) not in text and "papermill" not in text
    with (results / "measurements.csv").open() as handle:
        assert [row["metric"] for row in csv.DictReader(handle)] == ["00_first", "01_second"]
    before = contents(results)
    again = run_all(project, "toy.yaml", "--seeds", "3")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert contents(results) == before
    assert run_all(project, "verify", "toy.yaml").returncode == 0
    figure = results / "figures" / "all.txt"
    figure.write_text(figure.read_text().replace("3", "4"))
    changed = run_all(project, "verify", "toy.yaml")
    assert changed.returncode == 1
    assert "figures/all.txt: differs from the manifest" in changed.stderr


def test_a_failing_notebook_is_kept_named_and_ends_the_run(project):
    write_notebook(project / "notebooks", "01_second", SECOND)
    ended = run_all(project, "toy.yaml")
    kept = project / "results" / "toy" / "notebooks" / "01_second.failed.ipynb"
    assert ended.returncode == 1
    assert f"run_all: 01_second failed: ValueError: the loss; see {kept}" in ended.stderr
    assert "ValueError" in kept.read_text()
    assert not kept.with_name("01_second.ipynb").exists()
    assert not (project / "results" / "toy" / "notebooks" / "06_merge.ipynb").exists()
    assert not (project / "results" / "toy" / manifest.NAME).exists()


@pytest.mark.slow
def test_the_server_of_workers_starts_with_the_kernel(project):
    look = "import pathlib, psutil\n"
    look += "found = [' '.join(child.cmdline()) for child in psutil.Process().children()]\n"
    look += "pathlib.Path(results_dir, '.store', 'children').write_text('\\n'.join(found))"
    write_notebook(project / "notebooks", "00_first", look)
    ended = run_all(project, "toy.yaml", "-p", "compute.workers", "2", "--only", "00")
    assert ended.returncode == 0, ended.stderr
    children = (project / "results" / "toy" / ".store" / "children").read_text()
    assert "forkserver" in children


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_kernel_and_goes_on(project, number):
    waiting = "from pathlib import Path\nimport os, time\n"
    waiting += "Path(results_dir, '.store', 'kernel').write_text(str(os.getpid()))\ntime.sleep(60)"
    write_notebook(project / "notebooks", "01_second", waiting)
    process = start_run_all(project, "toy.yaml")
    told = project / "results" / "toy" / ".store" / "kernel"
    until(lambda: told.exists() and told.read_text())
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number is signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and "goes on from here" in err
    until(lambda: not Path("/proc", told.read_text()).exists())
    write_notebook(project / "notebooks", "01_second", "pass")
    ended = run_all(project, "toy.yaml")
    assert ended.returncode == 0, ended.stderr
    assert "00_first (seed 0): done before" in ended.stdout


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- in this process, with the kernel replaced by a function ----------------------------------


@pytest.fixture
def study(project, monkeypatch):
    """A `Run` over the stand-in notebooks, and the list of (notebook, seed) that really ran."""
    ran = []

    def fake(run, job):
        stem, seed = Path(job.notebook).stem, job.parameters["seed"]
        if "raise" in Path(job.notebook).read_text():
            raise driver.NotebookError(f"{stem} failed")
        ran.append((stem, job.parameters.get("seeds", seed)))
        target = Path(job.target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{stem} {seed} {len(ran)}\n")
        if "seeds" in job.parameters:
            seeds = job.parameters["seeds"]
            rows = "".join(f"{seed},sft,chain,accuracy,0.5,0.1,10\n" for seed in seeds)
            header = "seed,method,dataset,metric,value,stderr,n\n"
            Path(run.results, "measurements.csv").write_text(header + rows)

    machine = {"device": "cpu", "threads": 1, "python": "3", "versions": {"torch": "2"}}
    monkeypatch.setattr(driver, "execute", fake)
    monkeypatch.setattr(driver, "machine", lambda: machine)
    return make_run(project), ran


def make_run(project: Path, **settings) -> driver.Run:
    path = project / "toy.yaml"
    profile = cli.load_profile(str(path), settings.get("overrides"))
    settings = {"results": project / "results" / "toy", **settings}
    notebooks = project / "notebooks"
    return driver.Run(given=str(path), profile=profile, notebooks=notebooks, **settings)


ALL = [("00_first", 0), ("01_second", 0), ("06_merge", [0])]


def test_notebooks_run_once_for_the_first_seed_and_all_seeds_are_measured(study, project):
    run, ran = study
    assert driver.run_study(run)
    assert ran == ALL
    before = contents(run.results)
    assert driver.run_study(run) == []
    assert ran == ALL and contents(run.results) == before
    driver.run_study(make_run(project, seeds=(2, 1)))
    assert ran[3:] == [("00_first", 2), ("01_second", 2), ("06_merge", [2, 1])]
    told = manifest.read(run.results)
    assert told["seeds"] == [1, 2]  # as the stand-in for 06 forgets the earlier ones
    assert list(told["runs"]) == ["seed0", "seed2", "all"]
    driver.run_study(make_run(project, seeds=(2, 1)))
    assert len(ran) == 6


def test_a_changed_notebook_alone_runs_again_and_all_when_the_library_changed(
    study, project, monkeypatch
):
    run, ran = study
    driver.run_study(run)
    write_notebook(project / "notebooks", "01_second", "another = True")
    driver.run_study(run)
    assert ran[3:] == [("01_second", 0)]
    monkeypatch.setattr(driver, "library_hash", lambda: "another")
    driver.run_study(run)
    assert ran[4:] == ALL


def test_library_hash_follows_code_but_not_the_commands(tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "losses.py").write_text("beta = 0.1\n")
    (tmp_path / "cli" / "cli.py").write_text("usage = 1\n")
    before = driver.library_hash.__wrapped__(tmp_path)
    (tmp_path / "cli" / "cli.py").write_text("usage = 2\n")
    assert driver.library_hash.__wrapped__(tmp_path) == before
    (tmp_path / "losses.py").write_text("beta = 0.2\n")
    assert driver.library_hash.__wrapped__(tmp_path) != before


def test_measurements_of_the_last_notebook_leave_the_others_done(study, project, monkeypatch):
    run, ran = study
    write_notebook(project / "notebooks", "07_more", "pass")
    fake = driver.execute

    def append(run, job):
        fake(run, job)
        if "07" in job.notebook:
            with (run.results / "measurements.csv").open("a") as handle:
                handle.write("0,dpo,chain,accuracy,0.5,0.1,10\n")

    monkeypatch.setattr(driver, "execute", append)
    driver.run_study(run)
    assert driver.run_study(run) == [] and len(ran) == 4


def test_a_lost_file_or_foreign_measurements_are_made_anew(study):
    run, ran = study
    driver.run_study(run)
    (run.results / "notebooks" / "00_first.ipynb").unlink()
    driver.run_study(run)
    assert ran[3:] == [("00_first", 0)]
    (run.results / "measurements.csv").write_text("something else\n")
    driver.run_study(run)
    assert ran[4:] == [("06_merge", [0])]


def test_other_data_counts_and_unnamed_data_does_not(study, project, tmp_path):
    run, ran = study
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text("{}\n")
    driver.run_study(make_run(project, data=data))
    driver.run_study(run)
    assert ran == ALL
    (data / "rows.jsonl").write_text("{}\n{}\n")
    driver.run_study(make_run(project, data=data))
    assert ran == ALL * 2


def test_only_runs_what_it_names(study, project):
    _, ran = study
    driver.run_study(make_run(project, only=("06",)))
    assert ran == [("06_merge", [0])]
    driver.run_study(make_run(project, only=("01",), seeds=(4,)))
    assert ran[1:] == [("01_second", 4)]


def test_fresh_starts_over_and_spares_other_files(study):
    run, ran = study
    driver.run_study(run)
    (run.results / "my notes.txt").write_text("keep me")
    driver.run_study(run, fresh=True)
    assert ran == ALL * 2
    assert (run.results / "my notes.txt").read_text() == "keep me"
    assert (run.results / "notebooks" / "06_merge.ipynb").read_text() == "06_merge 0 6\n"


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_another_profile_are_left_alone(study, project, finished):
    run, ran = study
    driver.run_study(run)
    if not finished:
        (run.results / manifest.NAME).unlink()
    before = contents(run.results)
    other = make_run(project, overrides={"method.beta": 0.2})
    with pytest.raises(cli.AlloError, match="--out, or replace these results with --fresh") as told:
        driver.run_study(other)
    for profile in (run.profile, other.profile):
        assert profile.hash()[:12] in str(told.value)
    assert ran == ALL and contents(run.results) == before
    driver.run_study(other, fresh=True)
    assert manifest.read(run.results)["profile_hash"] == other.profile.hash()


def test_a_manifest_that_was_not_written_in_time_is_written_later(study, monkeypatch):
    run, ran = study
    with monkeypatch.context() as patch, pytest.raises(cli.AlloError, match="full.*free space"):
        patch.setattr(driver, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("full")))
        driver.run_study(run)
    assert manifest.read(run.results) is None
    driver.run_study(run)
    assert ran == ALL and manifest.read(run.results)["seeds"] == [0]


@pytest.mark.parametrize("fresh", [False, True])
def test_two_runs_never_write_into_one_folder(study, monkeypatch, fresh):
    run, _ = study
    driver.run_study(make_run(run.notebooks.parent, only=("00",)))
    fake = driver.execute

    def meddle(run, job):
        with pytest.raises(cli.AlloError, match="another run is writing"):
            driver.run_study(run)
        fake(run, job)

    monkeypatch.setattr(driver, "execute", meddle)
    driver.run_study(run, fresh=fresh)


def test_manifest_lists_every_file_and_keeps_earlier_wall_times(study, project):
    run, _ = study
    driver.run_study(run)
    told = manifest.read(run.results)
    told["runs"]["seed0"]["device"] = "an earlier one"
    told["runs"]["seed9"] = {"device": "another", "seconds": {"00_first": 9.0}}
    manifest.write_json(run.results / manifest.NAME, told)
    driver.run_study(make_run(project, seeds=(1,)))
    told = manifest.read(run.results)
    assert told["runs"]["seed9"] == {"device": "another", "seconds": {"00_first": 9.0}}
    assert [told["runs"][name]["device"] for name in ("seed0", "seed1")] == [
        "an earlier one",
        "cpu",
    ]
    assert sorted(told["files"]) == manifest.file_names(run.results)
    assert told["settings"] == run.profile.to_dict()


def test_status_shows_done_missing_and_changed(study, project, capsys):
    run, _ = study
    driver.run_study(run)
    write_notebook(project / "notebooks", "01_second", "another = True")
    artifact = run.results / ".store" / "abc"
    artifact.mkdir()
    (artifact / "manifest.json").write_text('{"kind": "mask", "seconds": 2.5, "bytes": 3000000}')
    lines = [" ".join(line.split()) for line in cli.status.describe(run).splitlines()]
    assert "00_first 0.0 s" in lines and "01_second to redo" in lines
    assert "abc mask 2.5 3.0" in lines
    (run.results / ".store" / "done" / "seed0" / "00_first.json").unlink()
    assert "00_first 0.0 s recorded" in " ".join(cli.status.describe(run).split())


# ---- what is left of a machine in an executed notebook ----------------------------------------


def test_sanitised_notebooks_tell_nothing_of_the_machine():
    stream = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(
        f'results_dir = "{execute.ROOT}/results/tiny"',
        metadata={
            "tags": ["injected-parameters"],
            "papermill": {"start_time": "2024-01-01"},
            "execution": {"iopub.execute_input": "2024-01-01"},
        },
        outputs=[
            stream("stream", name="stderr", text="step 1/3\rstep 2/3"),
            stream("stream", name="stderr", text="\rstep 3/3\n/x/ipykernel_12/345.py:1: Warning\n"),
            stream(
                "display_data", data={"image/png": "aGVsbG8=", "text/plain": f"{Path.home()}/a"}
            ),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/x"}})
    execute.sanitise(notebook, f"{execute.ROOT}/results/tiny")
    nbformat.validate(notebook)
    (cell,) = notebook.cells
    assert "papermill" not in notebook.metadata
    assert cell.metadata == {"tags": ["injected-parameters"]}
    assert cell.id == "injected-parameters"
    assert cell.source == 'results_dir = "results/tiny"'
    assert cell.outputs[0].text == "step 3/3\ncell:1: Warning\n"
    assert cell.outputs[1].data == {"image/png": "aGVsbG8=", "text/plain": "~/a"}


def test_bars_leave_their_last_line_or_nothing():
    texts = ["\rtraining: 1/9", "\rtraining: 5/9", "\r             \r", "\rmethods: 0/2"]
    texts += ["\rmethods: 2/2", "\rmethods: 2/2\n", "and more\n"]
    texts += ["\rtrained:  40%|## | 2/5", "\rtrained: 100%|###| 5/5 [00:04, dev 0.1]\n"]
    gone = ["\rtraining: 1/9", "\r             \r"]
    cells = [
        nbformat.v4.new_code_cell("x", outputs=[
            nbformat.v4.new_output("stream", name="stdout", text=text) for text in given
        ])
        for given in (texts, gone)
    ]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute.sanitise(notebook, "/nowhere/results")
    first, second = notebook.cells
    assert [output.text for output in first.outputs] == ["methods: 2/2\nand more\n"]
    assert second.outputs == []


# ---- comparing two runs -----------------------------------------------------------------------

HEADER = "seed,method,dataset,metric,value,stderr,n\n"


def table(path: Path, *rows: str) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return path


def test_compare_tells_equal_near_different_and_absent_cells(tmp_path):
    old = table(
        tmp_path / "old.csv",
        "0,dpo,chain,accuracy,0.5,0.1,10",
        "0,sft,chain,accuracy,0.25,0.1,10",
        "0,ipo,chain,accuracy,0.25,0.1,10",
    )
    new = table(
        tmp_path / "new.csv",
        "0,dpo,chain,accuracy,0.5000000001,0.1,10",
        "0,sft,chain,accuracy,0.26,0.1,10",
        "0,allo,chain,accuracy,0.25,0.1,10",
    )
    counts, problems = verify.compare(old, new)
    assert counts == {"equal": 4, "within tolerance": 1, "different": 7}
    assert problems == [
        "0 allo chain accuracy: only in the new run",
        "0 ipo chain accuracy: only in the earlier run",
        "0 sft chain accuracy: value was 0.25, is now 0.26",
    ]


def test_differences_name_versions_and_devices():
    old = {"device": "cpu", "threads": 2, "versions": {"torch": "2.13.0", "numpy": "2"}}
    new = {"device": "cpu", "threads": 4, "versions": {"torch": "2.11.0", "numpy": "2"}}
    assert verify.differences(old, new) == [
        "threads was 2, is now 4",
        "torch was 2.13.0, is now 2.11.0",
    ]
    assert verify.differences(old, old) == [
        "no package version, device or setting differs between the two runs"
    ]


def test_verify_names_lost_changed_added_and_outdated(study, project):
    run, _ = study
    driver.run_study(run)
    assert verify.check_files(verify.as_recorded(run)) == []
    (run.results / "notebooks" / "06_merge.ipynb").unlink()
    (run.results / "notebooks" / "00_first.ipynb").write_text("changed")
    (run.results / "stray.txt").write_text("stray")
    (project / "toy.yaml").write_text(PROFILE + "method: {beta: 0.3}\n")
    problems = verify.check_files(verify.as_recorded(run))
    assert "now has" in problems[0]
    assert problems[1:] == [
        "notebooks/00_first.ipynb: differs from the manifest",
        "notebooks/06_merge.ipynb: missing",
        "stray.txt: not in the manifest",
    ]


def test_verify_runs_again_and_compares(study, monkeypatch, tmp_path, capsys):
    run, ran = study
    driver.run_study(run)
    new = tmp_path / "again"
    monkeypatch.setattr(verify.tempfile, "mkdtemp", lambda prefix: str(new))
    assert verify.rerun(verify.as_recorded(run)) == []
    assert ran == ALL * 2 and not new.exists()
    assert "3 cells equal, 0 cells within tolerance, 0 cells different" in capsys.readouterr().out
    path = run.results / "measurements.csv"
    path.write_text(path.read_text().replace("0.5", "0.75"))
    problems = verify.rerun(verify.as_recorded(run))
    assert problems[0] == "0 sft chain accuracy: value was 0.75, is now 0.5"
    assert problems[-1] == f"the new run is in {new}" and new.exists()


def test_a_rerun_on_another_processor_is_judged_by_the_spread_of_the_runs(
    study, monkeypatch, tmp_path, capsys
):
    run, _ = study
    driver.run_study(run)
    path = run.results / manifest.NAME
    told = json.loads(path.read_text()) | {"processor": "another"}
    manifest.write_json(path, told)
    monkeypatch.setattr(verify.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "again"))
    monkeypatch.setattr(verify, "outside_spread", lambda before, after: (7, []))
    monkeypatch.setattr(verify, "compare", None)
    assert verify.rerun(verify.as_recorded(run)) == []
    assert "another processor: 7 runs judged by the spread" in capsys.readouterr().out


def test_runs_outside_the_committed_spread_are_told(tmp_path, monkeypatch):
    """Eight committed runs, of two models: .700 to .707 and, of one method, all alike."""
    planted = {"dpo": 0.7, "allo": 0.8}
    monkeypatch.setattr(synthetic_results, "ACCURACY", planted)

    def write(name, models, shift):
        table = synthetic_results.table(models, ("chain",), replicates=4, pairs=4)
        dpo = (table["method"] == "dpo") & (table["dataset"] == "chain")
        for (model, replicate), rows in table[dpo].groupby(["model", "replicate"]):
            wrong = rows.index[~rows["right"]]
            table.loc[wrong[: shift + 4 * model + replicate], "right"] = True
        (tmp_path / name).mkdir()
        outcomes.write_measurements(tmp_path / name / "measurements.csv", [])
        outcomes.write(tmp_path / name / outcomes.NAME, table)
        return tmp_path / name

    before = write("before", (0, 1), 0)
    assert verify.outside_spread(before, write("same", (0, 1), 0)) == (16, [])
    assert verify.outside_spread(before, write("near", (0,), 8)) == (8, [])
    judged, problems = verify.outside_spread(before, write("far", (0,), 60))
    assert judged == 8 and len(problems) == 4
    # Mean .7035, SD .00245 of 8 runs; t of 7 degrees of freedom at 1 - .025 / 8.
    half = 3.81 * 0.00245 * (1 + 1 / 8) ** 0.5
    low, high = map(float, problems[0].split("[")[1].split("]")[0].split(", "))
    assert (low, high) == pytest.approx((0.7035 - half, 0.7035 + half), abs=2e-4)
    assert problems[0].startswith("miniature, dpo: accuracy 0.7600 lies outside [0.69")
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7})
    lacking = verify.outside_spread(before, write("lacking", (0,), 0))[1]
    assert lacking == ["miniature, allo: not in the new run"]
    alone = tmp_path / "alone"
    synthetic_results.write(alone, (0,), datasets=("chain",))
    told = "one committed run has no spread by which another processor can be judged"
    assert verify.outside_spread(alone, alone) == (0, [told])


def test_a_damaged_manifest_is_named_and_kept(study):
    run, _ = study
    driver.run_study(run)
    path = run.results / manifest.NAME
    for text in ("{", "[]", json.dumps({"profile": "toy"})):
        path.write_text(text)
        with pytest.raises(cli.AlloError, match="manifest.json .*--fresh"):
            driver.run_study(run)
        assert path.read_text() == text
