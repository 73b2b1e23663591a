"""The notebooks: their form, and the whole study at a size of seconds through the real commands."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from real_like import write_data, write_model
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.evaluation import claims, outcomes
from allo_lib.study import results, runs

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.with_suffix("") for path in (ROOT / "notebooks").glob("*.py"))
NAMES = [path.name for path in NOTEBOOKS]
SHARED = ("profile", "seed", "results_dir", "overrides")


def cells(path: Path, kind: str | None = None) -> list:
    return [c for c in jupytext.read(path).cells if kind is None or c.cell_type == kind]


# --- their form --------------------------------------------------------------------------------


def test_there_are_eight_in_pairs():
    numbers = [name[:2] for name in NAMES]
    assert numbers == [f"{n:02}" for n in range(8)]
    found = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert found == set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_both_halves_of_a_pair_hold_the_same_cells(path):
    def content(half):
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in cells(half)]

    text, notebook = content(path.with_suffix(".py")), content(path.with_suffix(".ipynb"))
    assert text == notebook, f"run: jupytext --sync {path.name}.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_sources_are_valid_and_carry_no_outputs(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_one_cell_holds_the_parameters_that_all_share(path):
    found = cells(path.with_suffix(".py"))
    (tagged,) = [c for c in found if "parameters" in c.metadata.get("tags", [])]
    given: dict = {}
    exec(tagged.source, given)  # assignments of plain values
    first = {name: given[name] for name in SHARED}
    assert first == {"profile": "tiny", "seed": 0, "results_dir": "", "overrides": {}}
    more = set(given) - set(SHARED) - {"__builtins__"}
    assert more <= {"seeds", "domain"} and given.get("domain", "") == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_reads_like_a_section_of_a_paper(path):
    prose = "\n".join(c.source for c in cells(path.with_suffix(".py"), "markdown"))
    assert prose.startswith(f"# {path.name[:2]} ") and "**Question.**" in prose
    assert "$" in prose, "no equation"


@pytest.mark.parametrize("path", NOTEBOOKS[:5], ids=NAMES[:5])
def test_those_that_teach_show_the_step_and_the_library_doing_the_same(path):
    code = "\n".join(c.source for c in cells(path.with_suffix(".py"), "code"))
    assert "[T]" in code and "backward()" in code or path.name.startswith("00")
    assert "assert_close(" in code or "assert " in code
    assert "for name in study.profile.domains" not in code


def test_all_find_the_library_from_any_folder_of_the_repository():
    """Jupyter starts a notebook in its own folder, and nobody has set PYTHONPATH."""
    imports = [
        next(c.source for c in cells(path.with_suffix(".py"), "code") if "import" in c.source)
        for path in NOTEBOOKS
    ]
    (beginning,) = {text.partition("[:1]")[0] + "[:1]" for text in imports}
    code = f"{beginning}\nimport allo_lib\nprint(allo_lib.__file__)"
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for folder in ("notebooks", ".", "results/paper"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=ROOT / folder, env=kept,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert Path(done.stdout.strip()).parent == ROOT / "allo_lib"


# --- the whole study ---------------------------------------------------------------------------


def environment(**more) -> dict:
    kept = {k: v for k, v in os.environ.items() if k not in ("ALLO_DATA", "PYTEST_CURRENT_TEST")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path} | more


def command(*arguments, cwd=ROOT, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment(**more), capture_output=True, text=True,
    )  # fmt: skip


def driver(*arguments, **more):
    return command("-m", "allo_lib.cli.cli", *arguments, **more)


def papermill(name: str, target: Path, cwd=ROOT, ALLO_DATA="", **parameters):
    source = next(path for path in NOTEBOOKS if path.name.startswith(name))
    given = [x for key, value in parameters.items() for x in ("-p", key, value)]
    arguments = ("-m", "papermill", source.with_suffix(".ipynb"), target, *given)
    return command(*arguments, cwd=cwd, **({"ALLO_DATA": str(ALLO_DATA)} if ALLO_DATA else {}))


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
        )
        for path in folder.rglob("*")
        if path.is_file()
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of one run of everything, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = driver(PROFILE, "--out", folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


def outputs_of(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    return json.dumps([c.get("outputs") for c in notebook.cells])


@pytest.mark.slow
def test_everything_that_was_promised_is_there(whole):
    folder, printed = whole
    for pattern in ("tables/*.csv", "tables/*.md", "figures/*.png", "figures/*.pdf"):
        files = list(folder.glob(pattern))
        assert files and all(path.stat().st_size for path in files), pattern
    for name in ("measurements.csv", "claims.csv", "manifest.json", "../report.html"):
        assert (folder / name).stat().st_size, name
    for name in NAMES:
        place = "" if name[:2] in ("06", "07") else "seed0"
        assert (folder / "notebooks" / place / f"{name}.ipynb").is_file(), name
    assert not list(folder.rglob("*.failed.ipynb"))
    assert "measurements.csv" in printed and "report.html" in printed


@pytest.mark.slow
def test_its_rows_are_those_of_the_profile(whole):
    rows = outcomes.read_measurements(whole[0] / "measurements.csv")
    study = open_study(whole[0])
    wanted = set(runs.methods_of(study, DOMAIN))
    accuracy = {(row.method, row.dataset): row for row in rows if row.metric == "accuracy"}
    datasets = (*study.domain(DOMAIN).datasets, "average")
    assert set(accuracy) == {(method, dataset) for method in wanted for dataset in datasets}
    assert len({row.value for row in accuracy.values()}) > 2
    assert {row.seed for row in rows} == {0}


@pytest.mark.slow
def test_its_claims_are_computed_from_its_rows(whole, tmp_path):
    folder, _ = whole
    told = claims.read(folder / "claims.csv")
    assert {"C1", "C2", "C3", "C1p", "C4", "C6", "C7", "C8", "C10"} <= {c.id for c in told}
    verdicts = {"supported", "contradicted", "no difference", "undecided"}
    assert {c.verdict for c in told} <= verdicts


@pytest.mark.slow
def test_its_manifest_has_the_hash_of_every_file(whole):
    folder, _ = whole
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["profile_hash"] == open_study(folder).profile.hash()
    listed = manifest["files"]
    found = {name: digest for name, (digest, _) in contents(folder).items()
             if not name.startswith(".store") and name != "manifest.json"}  # fmt: skip
    told = {name: value["sha256"] if isinstance(value, dict) else value
            for name, value in listed.items()}  # fmt: skip
    assert told == found


@pytest.mark.slow
def test_executed_notebooks_are_free_of_this_machine(whole):
    folder, _ = whole
    for path in folder.rglob("notebooks/**/*.ipynb"):
        text = path.read_text()
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, path.name
        assert "Traceback" not in text and path.stat().st_size < 2e6
        assert "indexing errors" not in text, f"{path.name} shows a tokenizer's false alarm"
        if path.name[:2] != "07":
            assert "image/png" in outputs_of(path), path.name


@pytest.mark.slow
def test_a_second_run_is_quick_and_changes_no_byte(whole):
    folder, _ = whole
    before, start = contents(folder), time.monotonic()
    done = driver(PROFILE, "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - start < 60
    assert contents(folder) == before


@pytest.mark.slow
def test_another_run_of_the_seed_measures_the_same_bytes(whole, tmp_path):
    """Made by the library alone, in another order: what a method gives hangs on nothing else."""
    study = open_study(tmp_path / "out")
    for method in reversed(runs.methods_of(study, DOMAIN)):
        runs.run_methods(study, {DOMAIN: [method]})
    results.update(study, [0])
    first = (whole[0] / "measurements.csv").read_bytes()
    assert (study.results_dir / "measurements.csv").read_bytes() == first


@pytest.mark.slow
def test_two_workers_measure_the_same_bytes_in_a_notebook_by_itself(whole, tmp_path):
    """06 makes all that it needs; no other notebook has run."""
    text = PROFILE.read_text().replace("workers: 1", "workers: 2")
    assert "workers: 2" in text
    profile = tmp_path / "two.yaml"
    profile.write_text(text)
    done = papermill("06", tmp_path / "06.ipynb", profile=profile, results_dir=tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    first = (whole[0] / "measurements.csv").read_bytes()
    assert (tmp_path / "out" / "measurements.csv").read_bytes() == first


@pytest.mark.slow
def test_a_notebook_works_on_its_own_with_another_seed(whole, tmp_path):
    target = tmp_path / "05.ipynb"
    done = papermill("05", target, profile=PROFILE, seed=7, results_dir=tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in target.read_text() and "image/png" in outputs_of(target)
    assert list((tmp_path / "out" / "figures").glob("05_*_seed7.png"))
    assert not (tmp_path / "out" / "measurements.csv").exists()


@pytest.mark.slow
def test_a_failing_notebook_ends_the_run_and_leaves_earlier_results(whole, tmp_path):
    before = contents(whole[0])
    profile = tmp_path / "bad.yaml"
    profile.write_text(PROFILE.read_text().replace("questions: 150", "questions: 3"))
    done = driver(profile, "--out", tmp_path / "bad")
    assert done.returncode != 0
    assert "gave a pair" in done.stderr and "00_setup.failed.ipynb" in done.stderr
    other = driver(profile, "--out", whole[0])
    assert other.returncode != 0 and "profile hash" in other.stderr
    assert contents(whole[0]) == before


@pytest.mark.slow
def test_real_questions_and_preferences_run_through_every_notebook(tmp_path):
    """The domains of `smollm2` on made-up data and a model of a few weights, from a folder."""
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    profile = Path(__file__).with_name("seconds_real.yaml")
    text = profile.read_text().replace("MODEL", str(tmp_path / "model"))
    (tmp_path / "real.yaml").write_text(text)
    folder = tmp_path / "out"
    given = (tmp_path / "real.yaml", "--out", folder)
    done = driver(*given, "--data", tmp_path / "data")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = outcomes.read_measurements(folder / "measurements.csv")
    right = {row.method: row for row in rows if row.metric == "reward_accuracy"
             and row.dataset == "hh_helpful"}  # fmt: skip
    assert {"dpo", "allo"} <= set(right) and "sft_base" not in right
    # Long replies are chosen here: that can be learned, and the search must see it.
    assert right["dpo"].value > 0.7
    dev = {row.method: row.value for row in rows if row.metric == "dev_score"
           and row.dataset == "helpfulness"}  # fmt: skip
    assert dev["dpo"] > 0.7
    assert {row.dataset for row in rows} >= {"ecqa", "hh_helpful"}
    for name in NAMES[:5]:  # the other domain, which answers nothing, and from the own folder
        done = papermill(
            name, tmp_path / f"{name}.ipynb", ROOT / "notebooks", ALLO_DATA=tmp_path / "data",
            profile=tmp_path / "real.yaml", results_dir=folder, domain="helpfulness",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    again = driver(*given, "--data", tmp_path / "empty")
    assert again.returncode != 0 and "no such folder" in again.stderr
