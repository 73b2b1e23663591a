"""What the commands accept, and the one clear line for what they do not: status 2, nothing run."""

import time

import pytest
from refusals import assert_one_line, tree

from allo_lib.cli import cli

TOY = "domains: {toy: {datasets: [chain]}}\n"


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """A function that runs a command in a folder with files, and returns its status and its run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALLO_DATA", raising=False)
    names = ("00_setup", "01_importance", "06_evaluation", "07_efficiency")
    notebooks = [cli.Path(f"{name}.ipynb") for name in names]
    monkeypatch.setattr(cli.driver, "notebooks", lambda run: notebooks)
    monkeypatch.setattr(cli.driver.Step, "is_done", lambda step: True)
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "tag.yaml").write_text(f"{TOY}name: !!python/object/apply:os.system ['touch ran']")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    ran = []

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(cli.driver, "run_study", lambda run, fresh: ran.append(run) or [])
            return cli.main(list(arguments)), ran[-1] if ran else None

    return run


# --- what is accepted ----------------------------------------------------------------------------


def test_what_is_typed_becomes_a_run(typed, tmp_path, monkeypatch):
    status, run = typed("toy.yaml", "-p", "models", "3", "-p", "method.beta", "2e-1")
    assert status == 0 and run.seeds == (0, 1, 2) and run.profile.method.beta == 0.2
    assert run.profile_name == str(tmp_path / "toy.yaml") and run.data is None
    assert run.results == cli.ROOT / "results" / "toy"
    _, run = typed("toy.yaml", "--seeds", " 7, 3", "--only", "6,00", "--out=new", "--data=data")
    assert (run.seeds, run.only) == ((7, 3), ("06", "00"))
    assert (run.results, run.data) == (tmp_path / "new", tmp_path / "data")
    for minutes, seconds in (("9", 540 - cli.ENDING_SECONDS), ("0.2", 9)):
        _, run = typed("toy.yaml", "--minutes", minutes)
        assert run.deadline - time.monotonic() == pytest.approx(seconds, abs=5)
    monkeypatch.setenv("ALLO_DATA", str(tmp_path / "data"))
    assert typed("tiny")[1].data == tmp_path / "data"


@pytest.mark.parametrize(("typed", "passed"), [([], ["-m", "not slow"]), (["-x"], ["-x"])])
def test_the_quick_tests_are_run_unless_others_are_named(typed, passed, monkeypatch):
    ran = []
    monkeypatch.setattr(cli.os, "chdir", ran.append)
    monkeypatch.setattr(cli.os, "execv", lambda program, command: ran.append(command[1:]))
    cli.main(["test", *typed])
    assert ran == [cli.ROOT, ["-m", "pytest", *passed]]


# --- what is refused -----------------------------------------------------------------------------

SEEDS = "expected whole numbers from 0 to 2^32 - 1, each once, as in 0,1,2"
ONLY = "expected numbers of notebooks"
MINUTES = "expected a number of minutes above 0, as in 9 or 0.5"
EMPTY = "is empty: give it a value, or leave the option out"
REFUSED = [
    *(
        (f"--seeds={text}", f"--seeds {text!r}: {SEEDS}")
        for text in ("a", "0,", "-1", "1.0", "0-2")
    ),
    *((f"--seeds={text}", SEEDS) for text in ("4294967296", "1" * 5000, "0,0", "7,1,7", "1,01")),
    *((f"--only={text}", ONLY) for text in ("08", "00,08", "00,", "00_setup")),
    *((f"--minutes={text}", MINUTES) for text in ("0", "-1", "nan", "9m", "9" * 5000)),
    *((f"--{name}=", f"--{name} {EMPTY}") for name in ("seeds", "only", "data", "out", "domains")),
    ("--data file", "--data 'file': expected a folder that holds the data sets"),
    ("--data empty", "--data 'empty': expected a folder that holds the data sets"),
    ("--data " + "x" * 5000, "(File name too long): expected a folder"),
    ("--out a\0b", "--out 'a\\x00b': expected a path that can be a folder"),
    ("--out file", "is a file; name a folder"),
    ("--out .", "holds other files; name a new or empty folder"),
    (f"--out {cli.ROOT}", "holds the project itself"),
    ("--domains moon", "domains 'moon': expected one or more of toy, each once"),
    ("tiny", "unrecognized arguments: tiny; ./run_all.sh --help"),
    ("--fre", "unrecognized arguments: --fre"),
    ("--data", "--data expected one argument"),
    ("-p method.beta=1", "-p expected 2 arguments"),
    ("--rerun", "unrecognized arguments: --rerun"),
    ("--fresh --only 00", "leave out --only and --domains"),
    # Values that look like code.
    ("-p method.beta $(ran)", "beta: got '$(ran)', expected a valid number"),
    ("-p method.beta `ran`", "-p 'method.beta' '`ran`': no value ("),
    ("-p method.beta !!python/name:os.system", "could not determine a constructor for the tag"),
    # Names of keys, and of methods.
    ("-p hat 3", "unknown key 'hat'; expected one of ablations, "),
    ("-p a\nb 1", "unknown key 'a\\nb'"),
    ("-p methods [alo2]", "method 'alo2' is not known"),
    ("-p methods [dpoo]", "method 'dpoo' is not known; expected one of sft_base, dpo"),
    ("-p domains.toy.ablations [SFT]", "method 'SFT' is not known"),
    ("-p name ../evil", "name: '../evil' cannot name a folder"),
]


def one_line(printed) -> str:
    assert printed.out == "" and printed.err.startswith("run_all: ") and printed.err[-1] == "\n"
    assert_one_line(printed.err[:-1])
    return printed.err


@pytest.mark.parametrize(("arguments", "problem"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_command_line_is_refused(typed, arguments, problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.driver, "_run_all", lambda *_: pytest.fail("the study ran"))
    before = tree(tmp_path)
    assert cli.main(["toy.yaml", *arguments.split(" ")]) == cli.BAD_INPUT
    assert problem in one_line(capsys.readouterr())
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["status", "toy.yaml", "--minutes", "9"], "unrecognized arguments: --minutes 9"),
        (["status", "toy.yaml", "--out="], f"--out {EMPTY}"),
        (["verify", "toy.yaml", "--out", "empty"], "has no manifest.json"),
        (["figures", "--out", "empty"], "empty holds no measurements.csv: run the profile first"),
        (["figures", "toy.yaml"], "results/toy holds no measurements.csv"),
        (
            ["tune", "toy.yaml", "--seeds", "0", "--out", "new"],
            "--seeds 0: a model that is reported",
        ),
        (["Status"], "no profile 'Status': expected one of architectures, llama2-7b, "),
        (["a\nb"], "no profile 'a\\nb'"),
        (["\udcff.yaml"], "no profile '\\udcff.yaml'"),
        (["tag.yaml"], "tag.yaml is not readable YAML (could not determine a constructor"),
    ],
)
def test_other_commands_and_profiles_are_refused(typed, arguments, problem, tmp_path, capsys):
    before = tree(tmp_path)
    assert cli.main(arguments) == cli.BAD_INPUT
    assert problem in one_line(capsys.readouterr())
    assert tree(tmp_path) == before


def test_tuning_is_alone_in_its_folder_and_replaces_no_rates(typed, tmp_path, capsys):
    command = ["tune", "toy.yaml", "--out", str(tmp_path / "rates")]
    with cli.driver.sole_run(tmp_path / "rates"):
        assert cli.main(command) == cli.BAD_INPUT
    assert "another run is writing" in one_line(capsys.readouterr())
    cli.manifest.own(tmp_path / "rates", cli.load_profile("toy.yaml"))
    (tmp_path / "rates" / "tuned.yaml").write_text("toy: {dpo: [1.0e-4]}")
    assert cli.main([*command, "--seeds", "105"]) == cli.BAD_INPUT
    assert "has rates already, which would be replaced" in one_line(capsys.readouterr())
