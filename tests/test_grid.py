"""A grid: every combination in a folder of its own, one table, safe to stop and to run twice."""

import pandas as pd
import pytest
from test_run_all import make_run, study  # noqa: F401  (a fixture)

from allo_lib.cli import cli, driver, grid
from allo_lib.errors import AlloError

GRID = """
profile: {profile}
seeds: [0, 3]
vary:
  method.share: [0.05, 0.2]
  domains.toy.test: [7, 9]
"""


@pytest.fixture
def given(study, project, monkeypatch):  # noqa: F811
    """The file of a grid of four combinations over the stand-in notebooks; what ran."""
    _, ran = study
    path = project / "some.yaml"
    path.write_text(GRID.format(profile=project / "toy.yaml"))
    monkeypatch.setattr(cli, "ROOT", project)
    real = cli._run_of
    notebooks = make_run(project).notebooks
    monkeypatch.setattr(
        cli, "_run_of",
        lambda options: cli.dataclasses.replace(real(options), notebooks=notebooks),
    )  # fmt: skip
    return path, ran


def test_every_combination_is_run_once_and_in_one_table(given, project, capsys):
    path, ran = given
    assert cli.main(["grid", str(path)]) == 0
    folders = sorted(p.name for p in (project / "results" / "some").iterdir() if p.is_dir())
    assert folders == ["share=0.05,test=7", "share=0.05,test=9", "share=0.2,test=7",
                       "share=0.2,test=9"]  # fmt: skip
    assert len(ran) == 12 and "wrote results/some/grid.csv" in capsys.readouterr().out
    table = pd.read_csv(project / "results" / "some" / grid.TABLE)
    assert list(table)[:3] == ["method.share", "domains.toy.test", "seed"]
    cells = set(zip(table["method.share"], table["domains.toy.test"], table["seed"], strict=True))
    assert cells == {(a, b, s) for a in (0.05, 0.2) for b in (7, 9) for s in (0, 3)}
    before = (project / "results" / "some" / grid.TABLE).read_bytes()
    assert cli.main(["grid", str(path)]) == 0
    assert len(ran) == 12 and (project / "results/some" / grid.TABLE).read_bytes() == before


def test_tasks_of_an_array_make_the_same_table_in_any_order(given, project):
    path, ran = given
    for number in (2, 0, 3, 1):
        one = ["--task", str(number), "--out", f"{project}/apart"]
        assert cli.main(["grid", str(path), *one]) == 0
    assert cli.main(["grid", str(path)]) == 0
    tables = [project / name / grid.TABLE for name in ("apart", "results/some")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert cli.main(["grid", str(path), "--task", "4"]) == cli.BAD_INPUT


def test_without_seeds_a_grid_runs_those_of_the_profile(given, project):
    path, ran = given
    text = path.read_text().replace("seeds: [0, 3]\n", "")
    path.write_text(text.replace("domains.toy.test: [7, 9]", "models: [2]"))
    assert cli.main(["grid", str(path)]) == 0
    assert [seeds for name, seeds in ran if name == "06_merge"] == [[0, 1], [0, 1]]


def test_a_failed_combination_keeps_what_is_done(given, project, monkeypatch):
    path, ran = given
    real = driver.run_study

    def once(run):
        if "share=0.2" in run.results.name:
            raise driver.NotebookError("01_second failed")
        return real(run)

    monkeypatch.setattr(driver, "run_study", once)
    assert cli.main(["grid", str(path)]) == 1
    table = pd.read_csv(project / "results" / "some" / grid.TABLE)
    assert set(table["method.share"]) == {0.05}


@pytest.mark.parametrize("text, message", [
    ("- a\n", "expected the keys profile"),
    ("vary: {a: [1]}\n", "expected the keys profile"),
    ("profile: tiny\nvary: {method.share: 0.1}\n", "need a list of values"),
    ("profile: tiny\nvary: [1]\n", "need a list of values"),
    ("profile: tiny\nseeds: []\n", "need a list of values"),
    ("profile: [\n", "not a readable grid"),
])  # fmt: skip
def test_a_file_that_is_no_grid_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(AlloError, match=message) as told:
        grid.read(tmp_path / "g.yaml")
    assert "\n" not in str(told.value)


def test_domains_are_studies_of_their_own():
    told = {"profile": "tiny", "domains": ["a", "b"], "vary": {"method.share": [0.1]}}
    names = [grid.folder_name(one) for one in grid.combinations(told)]
    assert names == ["domains=a,share=0.1", "domains=b,share=0.1"]
    with pytest.raises(AlloError, match="cannot name a folder"):
        grid.folder_name({"model.name": "org/name"})
