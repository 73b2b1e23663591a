"""A study in pieces: some domains at a time add up to what one run makes."""

import pytest
import yaml
from test_run_all import make_run
from test_run_all import study as toy  # noqa: F401  (a fixture)
from tiny_study import PROFILE, open_study

from allo_lib.cli import cli, driver, verify
from allo_lib.errors import AlloError
from allo_lib.profiles import profile_files
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import manifest, results, runs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The path of a seconds-long profile with the domains `miniature` and `other`."""
    settings = yaml.safe_load(PROFILE.read_text())
    (one,) = settings["domains"].values()
    phases = {phase: one[phase] | {"mix": []} for phase in ("pretrain", "sft") if phase in one}
    names = {"other": ["story"], "miniature": ["chain", "scan"]}
    settings["domains"] = {k: one | phases | {"datasets": v} for k, v in names.items()}
    path = tmp_path_factory.mktemp("two") / "two.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_a_part_has_the_settings_and_the_hash_of_the_whole(two):
    whole = load_profile(str(two))
    part = load_profile(str(two), {profile_files.KEY: ["other"]})
    assert list(part.domains) == ["other"] and part.domains["other"] == whole.domains["other"]
    assert part.hash() == whole.hash() and part.to_dict() == whole.to_dict()
    assert profile_files.part_of(whole, list(reversed(whole.domains))) is whole


@pytest.mark.parametrize("names", [[], "maths", ["other", "other"], ["other", "maths"], [1], 3])
def test_domains_that_there_are_not_are_refused(two, names):
    with pytest.raises(AlloError, match="expected one or more of other, miniature, each once"):
        load_profile(str(two), {profile_files.KEY: names})


def test_pieces_add_up_to_the_measurements_of_one_run(two, tmp_path):
    methods = {"methods": ["dpo"], "ablations": [], "stability": [], "search.candidates": 1}

    def opened(folder, **changes):
        return results.Study.open(str(two), 0, str(tmp_path / folder), methods | changes)

    results.update(opened("whole"), [0])
    for name in ("other", "miniature"):
        results.update(opened("pieces", **{profile_files.KEY: name}), [0])
    files = [tmp_path / name / "measurements.csv" for name in ("whole", "pieces")]
    assert files[0].read_bytes() == files[1].read_bytes()
    noted = [manifest.noted(tmp_path / name)["cells"] for name in ("whole", "pieces")]
    assert noted[0] == noted[1]
    (domains,) = noted[0]["seed0"].values()
    assert set(domains) == {"other", "miniature"}


def test_averages_of_several_domains_have_names_of_their_own(two):
    study = open_study("unused")
    assert results.average_name(study, "miniature") == "average"
    several = load_profile(
        str(two), {"domains.other.kind": "questions", "domains.other.datasets": ["ecqa", "qasc"]}
    )
    for profile in (several, profile_files.part_of(several, "other")):
        study = results.Study(profile, 0, "unused")
        assert results.average_name(study, "other") == "average:other"
    assert "average:other" in results.datasets_of(study)


# --- commands ------------------------------------------------------------------------------------


def test_a_run_of_some_domains_has_marks_and_notebooks_of_its_own(toy, project):  # noqa: F811
    run, ran = toy
    piece = make_run(project, domains=("b",))
    driver.run_study(piece)
    assert ran == [("00_first", 0), ("01_second", 0), ("06_merge", [0])]
    assert sorted(p.name for p in (run.results / "notebooks").iterdir()) == [
        "00_first_b.ipynb", "01_second_b.ipynb", "06_merge.ipynb"]  # fmt: skip
    assert list(manifest.read(run.results)["runs"]) == ["seed0_b", "all"]
    driver.run_study(piece)
    assert len(ran) == 3
    shown = verify.describe(run)
    assert "run in pieces" in shown and "seed0_b: 2 notebooks" in shown
    assert "in pieces" not in verify.describe(piece)
    driver.run_study(run)  # the whole: its notebooks look at all domains
    assert ran[3:] == ran[:3]
    assert list(manifest.read(run.results)["runs"]) == ["seed0", "seed0_b", "all"]


def test_some_domains_are_tuned_by_themselves_and_replace_no_rates(
    two, tmp_path, monkeypatch, capsys
):
    tuned, arguments = [], ["tune", str(two), "--out", str(tmp_path), "--domains", "other"]

    def tune(profile, seeds, folder, data):
        tuned.extend(profile.domains)
        (folder / "tuned.yaml").touch()
        return folder / "tuned.yaml"

    monkeypatch.setattr(runs, "tune", tune)
    assert cli.main(arguments) == 0 and tuned == ["other"]
    assert cli.main(arguments) == cli.BAD_INPUT and tuned == ["other"]
    assert "has rates already, which would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--domains", "maths"], "domains 'maths': expected one or more of other, miniature"),
    (["--domains", ""], "--domains is empty"),
    (["--domains", "other", "--fresh"], "leave out --only and --domains"),
    (["--domains", "other", "--only", "07"], "leave it out for --only 07"),
])  # fmt: skip
def test_domains_that_cannot_be_run_end_in_one_line(two, arguments, words, capsys, tmp_path):
    assert cli.main([str(two), "--out", str(tmp_path / "new"), *arguments]) == cli.BAD_INPUT
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
    assert not (tmp_path / "new").exists()
    whole = load_profile(str(two))  # in whatever order they are typed
    assert cli.parse_domains("miniature, other", whole) == cli.parse_domains("", whole) == ()
