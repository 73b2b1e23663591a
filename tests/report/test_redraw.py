"""`run_all.sh figures`: claims, tables and figures from the committed files, to the byte."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from allo_lib.cli import cli
from allo_lib.evaluation import outcomes
from allo_lib.report import report
from allo_lib.study import manifest

COMMITTED = ROOT / "results" / "tiny"
FIGURES = ("claims", "main_miniature", "relative_change")


def copied(source, target):
    ignored = shutil.ignore_patterns(manifest.STORE, "notebooks")
    return shutil.copytree(source, target, ignore=ignored)


@pytest.fixture
def folder(tmp_path):
    return copied(COMMITTED, tmp_path / "tiny")


@pytest.mark.slow
def test_all_are_made_again_as_committed_without_torch(tmp_path):
    code = "import sys; from allo_lib.cli import cli; status = cli.main(sys.argv[1:]); "
    code += "sys.exit(status or ('torch' in sys.modules and 'torch was loaded'))"
    results = [path.parent for path in (ROOT / "results").glob(f"*/{outcomes.NAME}")]
    folders = [copied(path, tmp_path / path.name) for path in results]
    assert folders
    for folder, committed in zip(folders, results, strict=True):
        gone = [folder / "figures" / f"{name}{end}" for name in FIGURES for end in (".png", ".pdf")]
        gone = [path for path in gone if path.exists()]
        gone += [folder / "claims.csv", *(folder / "tables").glob("*.md")]
        for path in gone:
            path.unlink()
        command = [sys.executable, "-c", code, "figures", folder.name, "--out", str(folder)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert all(f"wrote {path}\n" in ended.stdout for path in gone)
        made = [*gone, *(folder / "tables").glob("*.csv"), folder / manifest.NAME]
        for path in made:
            same = committed / path.relative_to(folder)
            assert path.read_bytes() == same.read_bytes(), f"{same} is out of date"
    report_of = (root / report.NAME for root in (tmp_path, ROOT / "results"))
    assert len({path.read_bytes() for path in report_of}) == 1, "results/report.html is out of date"


def test_one_is_made_again_and_nothing_else(folder, monkeypatch, capsys):
    def remake(copy):
        made = [copy / "figures" / "a.png", copy / "tables" / "a.csv", copy / "tables" / "b.csv"]
        for path in made:
            path.write_text("new")
        shutil.copy(COMMITTED / "figures" / "claims.png", copy / "figures" / "a.png")
        return made

    monkeypatch.setattr(report, "remake", remake)
    (folder / "tables" / "b.csv").write_text("old")
    assert cli.main(["figures", "tiny", "a", "--out", str(folder)]) == 0
    assert (folder / "figures" / "a.png").is_file()
    assert (folder / "tables" / "a.csv").read_text() == "new"
    assert (folder / "tables" / "b.csv").read_text() == "old"
    told = manifest.read(folder)  # knows what was made again, and by which commit
    files = manifest.file_hashes(folder)
    assert told["files"]["tables/a.csv"] == files["tables/a.csv"] and "redrawn" in told
    assert "tables/b.csv" not in told["files"]
    assert cli.main(["figures", "tiny", "c", "--out", str(folder)]) == 2
    assert capsys.readouterr().err == ("run_all: no figure or table 'c': expected one of a, b\n")


def test_a_folder_without_measurements_is_refused(tmp_path, capsys):
    assert cli.main(["figures", "--out", str(tmp_path)]) == 2
    assert "holds no measurements.csv: run the profile first" in capsys.readouterr().err
