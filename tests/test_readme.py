"""README and the committed results agree."""

from pathlib import Path

from allo_lib.evaluation import claims, outcomes
from allo_lib.evaluation.comparisons import StudyResults
from allo_lib.report import report, row_comparisons, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FOLDERS = [RESULTS / name for name in report.PROFILES]
COMMITTED = [folder for folder in FOLDERS if (folder / outcomes.NAME).exists()]


def test_readme_shows_the_committed_results():
    assert report.readme_is_current(ROOT / "README.md", RESULTS), (
        "README.md and results/ disagree: run "
        "allo_lib.report.report.update_readme('README.md', 'results')"
    )


def test_committed_claims_and_tables_follow_from_the_committed_outcomes(tmp_path):
    """Every number of them, and of README's sentence on Holm."""
    for folder in COMMITTED:
        results = StudyResults.load(folder, report.models_of(folder))
        efficiency = report.read_efficiency(folder / "tables" / "efficiency.csv")
        found = claims.compute(results, efficiency)
        claims.write(tmp_path / "claims.csv", found)
        assert (folder / "claims.csv").read_bytes() == (tmp_path / "claims.csv").read_bytes()
        made = [*tables.build(results), row_comparisons.claims_table(found)]
        for path in tables.write(made, tmp_path / folder.name):
            committed = folder / "tables" / path.name
            assert committed.exists(), f"{committed} is missing: run notebook 06_evaluation"
            assert committed.read_bytes() == path.read_bytes(), f"{committed} is out of date"
