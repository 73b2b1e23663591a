"""Runs: done only once, whole or absent, and never over somebody else's results."""

import csv
import json
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import ROOT, run_all, write_notebook
from refusals import refused

from allo_lib.cli import cli, driver, execute, verify
from allo_lib.study import manifest


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
    assert "toy: 3 notebooks ran; took 0 min" in first.stdout
    for name in ("00_first_seed3", "01_second_seed3", "06_merge"):
        text = (results / "notebooks" / f"{name}.ipynb").read_text()
        assert str(project.parent) not in text and "papermill" not in text
    with (results / "measurements.csv").open() as handle:
        assert [row["metric"] for row in csv.DictReader(handle)] == ["00_first", "01_second"]
    before = contents(results)
    again = run_all(project, "toy.yaml", "--seeds", "3")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert contents(results) == before
    figure = results / "figures" / "all.txt"
    figure.write_text(figure.read_text().replace("3", "4"))
    changed = run_all(project, "verify", "toy.yaml")
    assert changed.returncode == 1
    assert "figures/all.txt: differs from the manifest" in changed.stderr


def test_a_failing_notebook_is_kept_named_and_ends_the_run(project):
    write_notebook(project / "notebooks", "00_first", 'raise ValueError("the loss\\nis NaN")')
    ended = run_all(project, "toy.yaml")
    results = project / "results" / "toy"
    kept = results / "notebooks" / "00_first.failed.ipynb"
    assert ended.returncode == 1
    assert f"run_all: 00_first failed: ValueError: the loss; see {kept}" in ended.stderr
    assert "ValueError" in kept.read_text()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert not (results / manifest.NAME).exists()


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- in this process, with the kernel replaced by a function ----------------------------------


@pytest.fixture
def study(project, monkeypatch):
    """A `Run` over the stand-in notebooks, and the list of (notebook, seed) that really ran."""
    ran = []

    def fake(notebook, parameters, target, scratch):
        stem, seed = notebook.stem, parameters["seed"]
        ran.append((stem, parameters.get("seeds", seed)))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{stem} {seed} {len(ran)}\n")
        if "seeds" in parameters:
            seeds = parameters["seeds"]
            rows = "".join(f"{seed},sft,chain,accuracy,0.5,0.1,10\n" for seed in seeds)
            header = "seed,method,dataset,metric,value,stderr,n\n"
            target.parents[1].joinpath("measurements.csv").write_text(header + rows)

    machine = {"device": "cpu", "threads": 1, "python": "3", "versions": {"torch": "2"}}
    monkeypatch.setattr(driver, "execute", fake)
    monkeypatch.setattr(driver, "machine", lambda: dict(machine))
    return make_run(project), ran


def make_run(project: Path, **settings) -> driver.Run:
    path = project / "toy.yaml"
    profile = cli.load_profile(str(path), settings.get("overrides"))
    settings = {"results": project / "results" / "toy", **settings}
    notebooks = project / "notebooks"
    return driver.Run(profile_name=str(path), profile=profile, notebooks=notebooks, **settings)


ALL = [("00_first", 0), ("01_second", 0), ("06_merge", [0])]


def test_notebooks_run_once_for_the_first_seed_and_all_seeds_are_measured(study, project):
    run, ran = study
    assert driver.run_study(run)
    assert ran == ALL
    before = contents(run.results)
    assert driver.run_study(run) == []
    assert ran == ALL and contents(run.results) == before
    for _ in range(2):
        driver.run_study(make_run(project, seeds=(2, 1)))
    assert ran[3:] == [("00_first", 2), ("01_second", 2), ("06_merge", [2, 1])]
    written = manifest.read(run.results)
    assert written["seeds"] == [1, 2]  # as the stand-in for 06 forgets the earlier ones
    assert list(written["runs"]) == ["seed0", "seed2", "all"]


def _change_data(project, run, monkeypatch):
    (project / "data" / "ecqa" / "test.jsonl").write_text('{"answer": "B"}\n')  # as long as before


def _change_library(project, run, monkeypatch):
    monkeypatch.setattr(driver, "library_hash", lambda: "another")


# What is changed after a run -> the notebooks that run again.
CHANGES = {
    "a notebook": (
        lambda project, *_: write_notebook(project / "notebooks", "01_second", "x = 1"),
        ALL[1:2],
    ),
    "the library": (_change_library, ALL),
    "the data": (_change_data, ALL),
    "a lost file": (
        lambda _, run, __: (run.results / "notebooks" / "00_first.ipynb").unlink(),
        ALL[:1],
    ),
    "other measurements": (
        lambda _, run, __: (run.results / "measurements.csv").write_text("something else\n"),
        ALL[2:],
    ),
    "the number of models": (
        lambda project, *_: (project / "toy.yaml").open("a").write("models: 2\n"),
        ALL[2:],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_change_concerns_runs_again_and_nothing_else(what, study, project, monkeypatch):
    _, ran = study
    data, reads = project / "data", {"domains.a": {"kind": "questions", "datasets": ["ecqa"]}}
    (data / "ecqa").mkdir(parents=True)
    (data / "ecqa" / "test.jsonl").write_text('{"answer": "A"}\n')
    run = make_run(project, data=data, overrides=reads)
    driver.run_study(run)
    driver.run_study(make_run(project, overrides=reads))  # data that is not named is not asked for
    (data / "README").write_text("read by nobody")
    driver.run_study(run)
    assert ran == ALL
    change, again = CHANGES[what]
    change(project, run, monkeypatch)
    driver.run_study(make_run(project, data=data, overrides=reads))
    assert ran[3:] == again


def test_data_that_is_named_later_is_looked_at(study, project):
    _, ran = study
    (project / "data" / "ecqa").mkdir(parents=True)
    (project / "data" / "ecqa" / "test.jsonl").write_text("{}\n")
    reads = {"domains.a": {"kind": "questions", "datasets": ["ecqa"]}}
    for data in (None, project / "data", project / "data"):
        driver.run_study(make_run(project, data=data, overrides=reads))
    assert ran == [*ALL, *ALL]
    # The miniature reads none.
    mine = project / "results" / "mine"
    for data in (None, project / "data"):
        driver.run_study(make_run(project, data=data, results=mine))
    assert ran == [*ALL, *ALL, *ALL]


def test_a_lost_manifest_or_lost_claims_are_made_again(study, project):
    run, ran = study
    driver.run_study(run)
    (run.results / manifest.NAME).unlink()
    driver.run_study(run)
    assert ran == ALL and manifest.read(run.results)["seeds"] == [0]
    (run.results / "claims.csv").write_text("")
    write_notebook(project / "notebooks", "01_second", "x = 1")
    driver.run_study(run)  # takes the file into the manifest
    (run.results / "claims.csv").unlink()
    driver.run_study(run)
    assert ran == [*ALL, ALL[1], ALL[2]]


def test_a_folder_of_other_files_stays_so_whatever_is_asked_of_it(study, project):
    run, _ = study
    (run.results / "notebooks").mkdir(parents=True)
    (run.results / "notebooks" / "thesis.ipynb").write_text("mine")
    (run.results / manifest.STORE / "notes").mkdir(parents=True)
    for fresh in (False, True):
        with refused("holds other files; name a new or empty folder"):
            driver.run_study(run, fresh=fresh)
    assert (run.results / "notebooks" / "thesis.ipynb").exists()


def test_a_rerun_that_reads_what_was_made_keeps_the_time_that_it_took(study, project, monkeypatch):
    run, _ = study
    driver.run_study(run)
    step = driver.steps(run)[0]
    manifest.write_json(step.stamp_path, step.stamp() | {"seconds": 335.8})
    _change_library(project, run, monkeypatch)
    assert [ran.notebook.stem for ran in driver.run_study(run)][0] == "00_first"
    assert manifest.read(run.results)["runs"]["seed0"]["seconds"]["00_first"] == 335.8


def test_library_hash_follows_code_but_not_the_commands(tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "losses.py").write_text("beta = 0.1\n")
    before = driver.library_hash.__wrapped__(tmp_path)
    (tmp_path / "cli" / "cli.py").write_text("usage = 2\n")
    assert driver.library_hash.__wrapped__(tmp_path) == before
    (tmp_path / "report.html.j2").write_text("<p>")  # which 06 writes reports by
    assert (page := driver.library_hash.__wrapped__(tmp_path)) != before
    (tmp_path / "losses.py").write_text("beta = 0.2\n")
    assert driver.library_hash.__wrapped__(tmp_path) != page


def test_measurements_of_the_last_notebook_leave_the_others_done(study, project, monkeypatch):
    run, ran = study
    write_notebook(project / "notebooks", "07_more", "pass")
    fake = driver.execute

    def append(notebook, *rest):
        fake(notebook, *rest)
        if "07" in notebook.name:
            with (run.results / "measurements.csv").open("a") as handle:
                handle.write("0,dpo,chain,accuracy,0.5,0.1,10\n")

    monkeypatch.setattr(driver, "execute", append)
    driver.run_study(run)
    assert driver.run_study(run) == [] and len(ran) == 4


def test_only_and_fresh(study, project):
    run, ran = study
    driver.run_study(make_run(project, only=("06",)))
    driver.run_study(make_run(project, only=("01",), seeds=(4,)))
    assert ran == [("06_merge", [0]), ("01_second", 4)]
    (run.results / "my notes.txt").write_text("keep me")
    driver.run_study(run, fresh=True)
    assert ran[2:] == ALL
    assert (run.results / "my notes.txt").read_text() == "keep me"
    assert not (run.results / "notebooks" / "01_second_seed4.ipynb").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_results_of_another_profile_are_left_alone(study, project, finished):
    run, ran = study
    driver.run_study(run)
    if not finished:
        (run.results / manifest.NAME).unlink()
    before = contents(run.results)
    other = make_run(project, overrides={"method.beta": 0.2})
    with pytest.raises(cli.AlloError, match="--out, or replace these results with --fresh") as said:
        driver.run_study(other)
    for profile in (run.profile, other.profile):
        assert profile.hash()[:12] in str(said.value)
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

    def meddle(*job):
        with pytest.raises(cli.AlloError, match="another run is writing"):
            driver.run_study(run)
        fake(*job)

    monkeypatch.setattr(driver, "execute", meddle)
    driver.run_study(run, fresh=fresh)


def test_manifest_lists_every_file_and_keeps_earlier_wall_times(study, project):
    run, _ = study
    driver.run_study(run)
    written = manifest.read(run.results)
    elsewhere = {"device": "another", "seconds": {"00_first": 9.0}}
    written["runs"]["seed0"]["device"] = "an earlier one"
    written["runs"]["seed9"] = elsewhere
    manifest.write_json(run.results / manifest.NAME, written)
    driver.run_study(make_run(project, seeds=(1,)))
    written = manifest.read(run.results)
    assert written["runs"]["seed9"] == elsewhere
    devices = [written["runs"][name]["device"] for name in ("seed0", "seed1")]
    assert devices == ["an earlier one", "cpu"]
    assert sorted(written["files"]) == manifest.file_names(run.results)
    assert written["settings"] == run.profile.to_dict()


def test_status_shows_done_missing_changed_and_costs(study, project):
    run, _ = study
    driver.run_study(run)
    write_notebook(project / "notebooks", "01_second", "another = True")
    for name, seconds in (("abc", 2.5), ("def", 1.0)):
        artifact = run.results / ".store" / "mask" / name
        artifact.mkdir(parents=True)
        record = {"kind": "mask", "seconds": seconds, "bytes": 3_000_000}
        (artifact / "manifest.json").write_text(json.dumps(record))
    lines = [" ".join(line.split()) for line in verify.describe(run).splitlines()]
    assert {"seed0 00_first: 0.0 s", "seed0 01_second: to redo", "mask 2 3.5 6.0"} <= set(lines)
    assert any(line.startswith("seed 0, toy: methods sft_base") for line in lines)
    (run.results / ".store" / "done" / "seed0" / "00_first.json").unlink()
    assert "00_first: 0.0 s by the manifest, not here" in verify.describe(run)
    other = verify.describe(make_run(project, seeds=(5,), domains=("moon",)))
    assert "00_first: missing" in other and "seed0: 2 notebooks" in other
    assert "missing methods: unknown (domains 'moon': expected" in other


# ---- executed notebooks -----------------------------------------------------------------------


def test_executed_notebooks_tell_nothing_of_the_machine():
    output = nbformat.v4.new_output
    text = f"{Path.home()}/a and {Path.home()}-b"
    picture = f"aGVs{Path.home()}/bG8/{Path.home()}b="
    cell = nbformat.v4.new_code_cell(
        f'results_dir = "{ROOT}/results/tiny"',
        metadata={
            "tags": ["injected-parameters"],
            "papermill": {"start_time": "2024-01-01"},
            "execution": {"iopub.execute_input": "2024-01-01"},
        },
        outputs=[
            output("stream", name="stderr", text="step 1/3\rstep 2/3"),
            output("stream", name="stderr", text=f"\rstep 3/3\nin {ROOT}/x.py\n"),
            output("display_data", data={"image/png": picture, "text/plain": text}),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/x"}})
    notebook = nbformat.reads(execute.sanitised(notebook, f"{ROOT}/results/tiny"), as_version=4)
    nbformat.validate(notebook)
    (cell,) = notebook.cells
    assert "papermill" not in notebook.metadata
    assert cell.metadata == {"tags": ["injected-parameters"]}
    assert (cell.id, cell.source) == ("injected-parameters", 'results_dir = "results/tiny"')
    assert cell.outputs[0].text == "step 3/3\nin ./x.py\n"
    shown = {"image/png": picture, "text/plain": f"~/a and {Path.home()}-b"}
    assert cell.outputs[1].data == shown


def test_slashes_stay_where_the_home_is_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    source = "kept / total  # <br />"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    text = execute.sanitised(notebook, f"{ROOT}/results/tiny")
    assert nbformat.reads(text, as_version=4).cells[0].source == source


def test_bars_leave_their_last_line_or_nothing():
    texts = ["\rtraining: 1/9", "\rtraining: 5/9", "\r             \r", "\rmethods: 0/2"]
    texts += ["\rmethods: 2/2", "\rmethods: 2/2\n", "and more\n"]
    texts += ["\rtrained:  40%|## | 2/5", "\rtrained: 100%|###| 5/5 [00:04, dev 0.1]\n"]
    for given, left in ((texts, "methods: 2/2\nand more\n"), (["\ra: 1/9", "\r      \r"], "")):
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in given]
        assert "".join(output.text for output in execute._merge_streams(outputs)) == left


def test_a_run_at_a_notebook_s_own_values_injects_nothing_and_any_other_what_differs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        own = papermill.inspect_notebook(path)
        given = {"profile": "tiny", "seed": 0, "overrides": {}}
        given |= {"results_dir": str(ROOT / "results" / "tiny")}
        given |= {"seeds": [0]} if "seeds" in own else {}
        assert execute.injected(given, own) == {}
        elsewhere = {"results_dir": str(ROOT / "elsewhere"), "seeds": [0, 1]}
        assert execute.injected(given | elsewhere, own) == elsewhere
