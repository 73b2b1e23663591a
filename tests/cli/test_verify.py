"""Results against their hashes, and a new run against them."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import PROFILE, ROOT
from test_run_all import study  # noqa: F401  (a fixture)

from allo_lib.cli import driver, verify
from allo_lib.evaluation import outcomes
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import manifest
from tests import synthetic_results

NAMES = sorted(path.parent.name for path in (ROOT / "results").glob(f"*/{manifest.NAME}"))


@pytest.mark.parametrize("name", NAMES)
def test_committed_results_are_what_their_manifest_says_and_one_changed_bit_is_found(
    name, tmp_path
):
    ignored = shutil.ignore_patterns(manifest.STORE)
    folder = shutil.copytree(ROOT / "results" / name, tmp_path / name, ignore=ignored)
    run = verify.as_recorded(driver.Run(name, load_profile(name), folder))
    assert verify.check_files(run) == []
    rng = random.Random(0)
    for changed in rng.sample(manifest.file_names(folder), 2):
        whole = (folder / changed).read_bytes()
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (folder / changed).write_bytes(raw)
        assert verify.check_files(run) == [f"{changed}: differs from the manifest"]
        (folder / changed).write_bytes(whole)
    recorded = manifest.read(folder)
    recorded["settings"]["method"]["beta"] += 0.1
    manifest.write_json(folder / manifest.NAME, recorded)
    expected = "manifest.json: its settings do not have its profile hash"
    assert verify.check_files(run) == [expected]


def test_the_profiles_of_this_project_are_committed():
    assert {"smollm2", "tiny"} <= set(NAMES)


def test_lost_changed_added_and_outdated_files_are_named(study, project):  # noqa: F811
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


def test_a_new_run_is_compared_with_the_old_one(study, monkeypatch, tmp_path, capsys):  # noqa: F811
    run, ran = study
    driver.run_study(run)
    new = tmp_path / "again"
    monkeypatch.setattr(verify.tempfile, "mkdtemp", lambda prefix: str(new))
    assert verify.rerun(verify.as_recorded(run)) == []
    assert ran[:3] == ran[3:] and not new.exists()
    assert "3 cells equal, 0 cells within tolerance, 0 cells different" in capsys.readouterr().out
    path = run.results / "measurements.csv"
    path.write_text(path.read_text().replace("0.5", "0.75"))
    problems = verify.rerun(verify.as_recorded(run))
    assert problems[0] == "0 sft chain accuracy: value was 0.75, is now 0.5"
    assert problems[1:] == [
        "no package version, device or setting differs between the two runs",
        f"the new run is in {new}",
    ]
    # What was made on another processor is judged by the spread, whoever wrote the folder last.
    path = run.results / manifest.NAME
    elsewhere = {"cells": {"seed0": {"another": {"miniature": ["sft"]}}}}
    outcomes.write(
        run.results / outcomes.NAME, synthetic_results.table((0,), ("chain",), 9, pairs=2)
    )
    manifest.write_json(path, json.loads(path.read_text()) | elsewhere)
    monkeypatch.setattr(verify, "outside_spread", lambda before, after: (7, []))
    assert verify.rerun(verify.as_recorded(run)) == []
    assert "another processor: 7 runs judged by the spread" in capsys.readouterr().out


def test_equal_measurements_do_not_hide_other_outcomes(study, monkeypatch, tmp_path):  # noqa: F811
    """Every verdict comes from these."""
    run, _ = study
    driver.run_study(run)
    new, table = tmp_path / "again", synthetic_results.table((0,), ("chain",), 20, pairs=4)
    monkeypatch.setattr(verify.tempfile, "mkdtemp", lambda prefix: str(new))
    outcomes.write(run.results / outcomes.NAME, table)
    real = driver.run_study

    def rerun(again):
        real(again)
        table.loc[3, "right"] = ~table.loc[3, "right"]
        outcomes.write(again.results / outcomes.NAME, table)

    monkeypatch.setattr(driver, "run_study", rerun)
    assert verify.rerun(run)[0] == "outcomes.parquet: other outcomes"


def test_cells_are_equal_near_different_or_absent(tmp_path):
    def table(name: str, *rows: str) -> Path:
        header = "seed,method,dataset,metric,value,stderr,n\n"
        (tmp_path / name).write_text(header + "".join(f"0,{row}\n" for row in rows))
        return tmp_path / name

    old = table(
        "old.csv",
        "dpo,chain,accuracy,0.5,,10",
        "sft,chain,accuracy,0.25,0.1,10",
        "ipo,chain,accuracy,0.25,0.1,10",
    )
    new = table(
        "new.csv",
        "dpo,chain,accuracy,0.5000000001,,10",
        "sft,chain,accuracy,0.26,0.1,10",
        "allo,chain,accuracy,0.25,0.1,10",
    )
    counts, problems = verify.compare(old, new)
    assert counts == {"equal": 4, "within tolerance": 1, "different": 7}
    assert problems == [
        "0 allo chain accuracy: only in the new run",
        "0 ipo chain accuracy: only in the earlier run",
        "0 sft chain accuracy: value was 0.25, is now 0.26",
    ]


def test_runs_outside_the_committed_spread_are_named(tmp_path, monkeypatch):
    """Eight committed runs, of two models: .700 to .707 and, of one method, all alike."""
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7, "allo": 0.8})

    def write(name, models, shift, masks=(0.300, 0.301)):
        table = synthetic_results.table(models, ("chain",), replicates=4, pairs=4)
        dpo = (table["method"] == "dpo") & (table["dataset"] == "chain")
        for (model, replicate), rows in table[dpo].groupby(["model", "replicate"]):
            wrong = rows.index[~rows["right"]]
            table.loc[wrong[: shift + 4 * model + replicate], "right"] = True
        (tmp_path / name).mkdir()
        overlaps = [
            outcomes.Measurement(model, "orders", "miniature", "mask_overlap", value, 0.0, 9)
            for model, value in zip(models, masks, strict=False)
        ]
        outcomes.write_measurements(tmp_path / name / "measurements.csv", overlaps)
        outcomes.write(tmp_path / name / outcomes.NAME, table)
        return tmp_path / name

    before = write("before", (0, 1), 0)
    assert verify.outside_spread(before, write("same", (0, 1), 0)) == (18, [])
    assert verify.outside_spread(before, write("near", (0, 1), 8)) == (18, [])
    # Mean .3005, SD .000707 of 2 models; t of 1 degree of freedom at 1 - .025 / 18: 229.
    assert verify.outside_spread(before, write("masks", (0, 1), 0, (0.3, 0.9)))[1] == [
        "miniature, orders: mask_overlap 0.9000 lies outside [0.1020, 0.4990], where one more of 2 "
        "runs is expected"
    ]
    judged, problems = verify.outside_spread(before, write("far", (0, 1), 60))
    assert judged == 18 and len(problems) == 8
    # Mean .7035, SD .00245 of 8 runs; t of 7 degrees of freedom at 1 - .025 / 18.
    half = 4.506 * 0.00245 * (1 + 1 / 8) ** 0.5
    low, high = map(float, problems[0].split("[")[1].split("]")[0].split(", "))
    assert (low, high) == pytest.approx((0.7035 - half, 0.7035 + half), abs=2e-4)
    assert problems[0].startswith("miniature, dpo: accuracy 0.7600 lies outside [0.69")
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7})
    lacking = verify.outside_spread(before, write("lacking", (0,), 0))[1]
    assert lacking == [
        "miniature, allo: accuracy of 0 runs, and not of 8 as before",
        "miniature, dpo: accuracy of 4 runs, and not of 8 as before",
        "miniature, orders: mask_overlap of 1 runs, and not of 2 as before",
    ]
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"ipo": 0.7})
    judged, problems = verify.outside_spread(before, write("none", (0,), 0, ()))
    assert judged == 0 and problems and all(" of 0 runs, " in line for line in problems)
    alone = tmp_path / "alone"
    monkeypatch.setattr(synthetic_results, "ACCURACY", {"dpo": 0.7})
    synthetic_results.write(alone, (0,), datasets=("chain",))
    assert verify.outside_spread(alone, alone) == (0, [])
    told = "miniature, dpo: accuracy: one committed run has no spread to judge another by"
    judged, problems = verify.outside_spread(alone, write("other", (0,), 8))
    assert judged == 0 and [line for line in problems if "mask_overlap" not in line] == [told]
