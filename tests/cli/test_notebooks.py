"""The notebooks: their form, and the whole study at a size of seconds through the real commands."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import IPython.display
import jupytext
import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from real_like import write_data, write_model
from refusals import stamps
from tiny_study import DOMAIN, PROFILE, open_study

from allo_lib.evaluation import claims, outcomes, published
from allo_lib.profiles.methods import stages_of
from allo_lib.report import notebook
from allo_lib.study import importance, runs, scoring

ROOT = conftest.ROOT
NOTEBOOKS = sorted(path.with_suffix("") for path in (ROOT / "notebooks").glob("*.py"))
NAMES = [path.name for path in NOTEBOOKS]


def cells(path: Path, kind: str | None = None) -> list:
    return [c for c in jupytext.read(path).cells if kind is None or c.cell_type == kind]


# --- their form --------------------------------------------------------------------------------


def test_there_are_eight_in_pairs():
    assert [name[:2] for name in NAMES] == [f"{n:02}" for n in range(8)]
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_its_form(path):
    """Halves that agree, the shared parameters, a section of a paper, outputs of a real run."""
    source, built = path.with_suffix(".py"), path.with_suffix(".ipynb")
    halves = [
        [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in cells(half)]
        for half in (source, built)
    ]
    assert halves[0] == halves[1], f"run: jupytext --sync {source.name}"

    (tagged,) = [c for c in cells(source) if "parameters" in c.metadata.get("tags", [])]
    given: dict = {}
    exec(tagged.source, given)  # assignments of plain values
    shared = {"profile": "tiny", "seed": 0, "results_dir": "", "overrides": {}}
    assert shared.items() <= given.items() and given.get("domain", "") == ""
    assert set(given) - set(shared) - {"__builtins__"} <= {"seeds", "domain"}

    prose = "\n".join(c.source for c in cells(source, "markdown"))
    assert prose.startswith(f"# {path.name[:2]} ") and "**Question.**" in prose
    assert "$" in prose, "no equation"
    meaning = prose.split("## What it means")[-1].partition("## Appendix")[0]
    assert [*NAMES[1:], "docs/align"][NAMES.index(path.name)] in meaning, "what comes next"
    code = "\n".join(c.source for c in cells(source, "code"))
    assert "in study.profile.domains" not in code, "it looks at one domain"
    if "01" <= path.name[:2] <= "04":  # those that teach assert the step
        assert "[T]" in code and "backward()" in code and "assert" in code

    shown = nbformat.read(built, as_version=4)
    nbformat.validate(shown)
    committed = ROOT / "results" / "tiny" / "notebooks" / built.name
    ran = nbformat.read(committed, as_version=4)
    of_the_run = [output for cell in ran.cells for output in cell.get("outputs", [])]
    for output in (output for cell in shown.cells for output in cell.get("outputs", [])):
        assert output in of_the_run, "typed in, or of an earlier run"
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert "%|" not in output.get("text", ""), "a progress bar"
    assert built.stat().st_size < 1e6


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


# --- 05 with every row that there is, without training one ----------------------------------------


def run_cells(number: str, monkeypatch, **parameters) -> list:
    """Run a notebook's cells in this process, as papermill would; returns what they displayed."""
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(number)]
    shown: list = []
    monkeypatch.setattr(notebook, "display", shown.append)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    names: dict = {"__name__": "__main__"}
    for cell in cells(path.with_suffix(".py"), "code"):
        exec(compile(cell.source, path.name, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters)
    return shown


def pictures(shown: list) -> int:
    return sum(isinstance(one, (Figure, IPython.display.Image)) for one in shown)


def texts(shown: list) -> str:
    return "\n".join(str(one.data) for one in shown if isinstance(one, IPython.display.Markdown))


def invented(method: str, profile, number: int) -> dict:
    """A result of a method that nobody trained: right on three quarters of 40 problems."""
    right = np.random.default_rng(number).random(40) < 0.75
    rates = [1e-4 * (1 + number % 3)] * len(stages_of(method, profile))
    one = {"rates": rates, "dev": 0.7, "displacement": 1.0 + number, "train_margin": 0.5}
    answers = [(str(i), "chain", "", bool(ok)) for i, ok in enumerate(right)]
    return {"method": method, "answers": answers, "rates": rates, "tried": [one] if rates else []}


@pytest.mark.parametrize("asked", ["few", "all"])
def test_05_draws_what_was_trained_and_tells_what_was_not(asked, tmp_path, monkeypatch):
    study = open_study(tmp_path)
    rows = ["sft_base", "dpo", "dpo_long", "allo"]
    if asked == "all":
        rows = list(dict.fromkeys([*rows, "dpo_top1", "dpo_top10", *published.NAMES]))
    found = {row: invented(row, study.profile, i) for i, row in enumerate(rows)}
    points = [("early", 0.7, 0.7, 0.05), ("trained", 0.9, 0.8, 0.05)]
    for place, name, value in (
        (runs, "run_methods", {DOMAIN: found}),
        (importance, "reward_points", points if asked == "all" else []),
        (scoring, "dev_count", 40),
    ):
        monkeypatch.setattr(place, name, lambda *_, value=value: value)
    shown = run_cells("05", monkeypatch, profile=str(PROFILE), results_dir=str(tmp_path))
    told = texts(shown)
    assert "trains none of these" in told if asked == "few" else "none of these" not in told
    # Five questions; of the appendix: masks and scores.
    assert pictures(shown) == (1 if asked == "few" else 5 + 2)


# --- the whole study ---------------------------------------------------------------------------


def command(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("ALLO_DATA", "PYTEST_CURRENT_TEST")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=kept | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def driver(*arguments):
    return command("-m", "allo_lib.cli.cli", *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of one run of everything, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = driver(PROFILE, "--out", folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


def outputs_of(path: Path) -> str:
    ran = nbformat.read(path, as_version=4)
    return json.dumps([c.get("outputs") for c in ran.cells])


@pytest.mark.slow
def test_everything_that_was_promised_is_there_and_of_this_run(whole):
    folder, printed = whole
    for pattern in ("tables/*.csv", "tables/*.md", "figures/*.png", "figures/*.pdf"):
        files = list(folder.glob(pattern))
        assert files and all(path.stat().st_size for path in files), pattern
    notebooks = sorted((folder / "notebooks").iterdir())
    assert [path.name for path in notebooks] == [f"{name}.ipynb" for name in NAMES]
    assert not list(folder.glob("figures/0*")), "figures of one seed stay inside the notebooks"
    assert "05_ablations (seed 0): done in" in printed
    for path in notebooks:
        text = path.read_text()
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, path.name
        assert "Traceback" not in text and path.stat().st_size < 2e6
        assert "indexing errors" not in text, f"{path.name} shows a tokenizer's false alarm"
        assert "image/png" in outputs_of(path), path.name
        assert "%|" not in outputs_of(path) and '"stderr"' not in outputs_of(path), path.name

    rows = outcomes.read_measurements(folder / "measurements.csv")
    study = open_study(folder)
    accuracy = {(row.method, row.dataset): row for row in rows if row.metric == "accuracy"}
    datasets = (*study.domain(DOMAIN).datasets, "average")
    wanted = set(runs.methods_of(study, DOMAIN))
    assert set(accuracy) == {(method, dataset) for method in wanted for dataset in datasets}
    assert len({row.value for row in accuracy.values()}) > 2
    assert {row.seed for row in rows} == {0}
    computed = claims.read(folder / "claims.csv")
    assert {"C1", "C2", "C3", "C1p", "C4", "C6", "C7", "C8", "C10"} <= {c.id for c in computed}
    verdicts = {"supported", "contradicted", "no difference", "undecided"}
    assert {c.verdict for c in computed} <= verdicts

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["profile_hash"] == study.profile.hash()
    shown = {name: data for name, (data, _) in stamps(folder).items()
             if not name.startswith(".store") and name != "manifest.json"}  # fmt: skip
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in shown.items()}
    assert manifest["files"] == expected


@pytest.mark.slow
def test_a_second_run_changes_no_byte(whole):
    folder, _ = whole
    before = stamps(folder)
    done = driver(PROFILE, "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing to do" in done.stdout and stamps(folder) == before


@pytest.mark.slow
def test_two_workers_measure_the_same_bytes_in_a_notebook_by_itself(whole, tmp_path, monkeypatch):
    """06 makes all that it needs: in other processes, in another order, with no other notebook."""
    text = PROFILE.read_text().replace("workers: 1", "workers: 2")
    assert "workers: 2" in text
    profile = tmp_path / "two.yaml"
    profile.write_text(text)
    shown = run_cells("06", monkeypatch, profile=str(profile), results_dir=str(tmp_path / "out"))
    assert pictures(shown)
    first = (whole[0] / "measurements.csv").read_bytes()
    assert (tmp_path / "out" / "measurements.csv").read_bytes() == first


@pytest.mark.slow
def test_papermill_runs_one_alone_from_its_own_folder_with_another_seed(tmp_path):
    given = {"profile": PROFILE, "seed": 7, "results_dir": tmp_path / "out"}
    parameters = [text for name, value in given.items() for text in ("-p", name, value)]
    target = tmp_path / "02.ipynb"
    source = f"{NAMES[2]}.ipynb"
    done = command("-m", "papermill", source, target, *parameters, cwd=ROOT / "notebooks")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in target.read_text() and "image/png" in outputs_of(target)
    assert not (tmp_path / "out" / "measurements.csv").exists()


@pytest.mark.slow
def test_real_questions_and_preferences_run_through_every_notebook(tmp_path, monkeypatch):
    """The domains of `smollm2` on made-up data and a model of a few weights, from a folder."""
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    text = (ROOT / "tests" / "seconds_real.yaml").read_text()
    (tmp_path / "real.yaml").write_text(text.replace("MODEL", str(tmp_path / "model")))
    monkeypatch.setenv("ALLO_DATA", str(tmp_path / "data"))
    given = {"profile": str(tmp_path / "real.yaml"), "results_dir": str(tmp_path / "out")}
    for domain in ("questions", "helpfulness"):  # the second answers nothing
        for number in ("00", "01", "02", "03", "04", "05"):
            assert pictures(run_cells(number, monkeypatch, domain=domain, **given)), number
    for number in ("06", "07"):
        assert pictures(run_cells(number, monkeypatch, **given)), number
    rows = outcomes.read_measurements(tmp_path / "out" / "measurements.csv")
    right = {row.method: row for row in rows if row.metric == "reward_accuracy"
             and row.dataset == "hh_helpful"}  # fmt: skip
    assert {"dpo", "allo"} <= set(right) and "sft_base" not in right
    # Long replies are chosen here: that can be learned, and the search must see it.
    assert right["dpo"].value > 0.7
    dev = {row.method: row.value for row in rows if row.metric == "dev_score"
           and row.dataset == "helpfulness"}  # fmt: skip
    assert dev["dpo"] > 0.7
    assert {row.dataset for row in rows} >= {"ecqa", "hh_helpful"}
