"""Command lines that nobody meant: status 2, one line, nothing written and nothing run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import assert_one_line, read_or_refused, tree

from allo_lib.cli import cli

TOY = "domains: {toy: {datasets: [chain]}}\n"
fuzzing = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A function that runs a command on a profile of its own and returns what it told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DATA_VARIABLE, raising=False)
    names = ("00_setup", "01_importance", "06_evaluation")
    notebooks = [cli.Path(f"{name}.ipynb") for name in names]
    monkeypatch.setattr(cli.driver, "notebooks", lambda run: notebooks)
    monkeypatch.setattr(cli.driver, "run_study", lambda *_, **__: pytest.fail("the study ran"))
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "file").write_text("mine")

    def run(*arguments) -> str:
        before = tree(tmp_path)
        assert cli.main(list(arguments)) == cli.BAD_INPUT, arguments
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("run_all: ") and told.err[-1] == "\n"
        assert_one_line(told.err[:-1])
        assert tree(tmp_path) == before
        return told.err

    return run


OVERRIDES = {
    # Values that look like numbers.
    "octal": ("model.width", "0200", "'0200' is octal or base 60 in YAML; write a decimal number"),
    "thousands of signs": ("method.beta", "-" * 5000, "argument -p: expected 2 arguments"),
    "percent": ("method.share", "10%", "share: got '10%', expected a valid number"),
    "exponent for a count": ("model.width", "1e2", "width: got 100.0, expected a valid integer"),
    "past 32 bits": ("model.width", "4294967296", "width: got 4294967296, expected less than"),
    "empty": ("model.width", "", "width: got None, expected a valid integer"),
    "date": ("description", "2026-01-01", "expected a number, a text, or a list of them"),
    "no such date": ("description", "2026-02-30", "not a number, text or list of them (day is out"),
    # ... like code.
    "shell": ("method.beta", "$(touch ran)", "beta: got '$(touch ran)', expected a valid"),
    "backquotes": ("method.beta", "`touch ran`", "not a number, text or list of them ("),
    "lambda": ("method.beta", "lambda x: x", "expected a number, a text, or a list of them"),
    "tag apply": (
        "method.beta",
        "!!python/object/apply:os.system ['touch ran']",
        "could not determine a constructor for the tag",
    ),
    "tag on a truth": ("timing.peers", "!!bool x", "not a number, text or list of them ('x')"),
    # ... like structure.
    "mapping": ("method", "{beta: 0.1}", "expected a number, a text, or a list of them"),
    "itself": ("methods", "&a [*a]", "expected a number, a text, or a list of them"),
    "very deep": ("methods", "[" * 3000, "it is nested too deeply; expected a few levels"),
    "two documents": ("methods", "--- dpo\n--- sft", "expected a single document"),
    "control character": ("description", "\x1b[31m", "special characters are not allowed"),
    "half a pair": ("description", '"\\ud83d"', "half of a surrogate pair in '\\ud83d'"),
    "commas for a list": ("methods", "dpo,sft", "methods: got 'dpo,sft', expected a list"),
    # Names of keys, and of methods.
    "name with a line break": ("a\nb", "1", "unknown key 'a\\nb'; expected one of"),
    "name with an equals sign": ("method.beta=0.2", "1", "unknown key 'beta=0'; expected one of"),
    "name like an option": ("--seeds", "1", "argument -p: expected 2 arguments"),
    "method": ("methods", "[dpoo]", "method 'dpoo' is not known; expected one of sft_base, dpo"),
    "ablation": ("ablations", "[allo_none]", "method 'allo_none' is not known; expected one of"),
    "method of a domain": ("domains.toy.methods", "[SFT]", "method 'SFT' is not known; expected"),
    "profile's name upwards": ("name", "../evil", "profile name '../evil' cannot name a folder"),
    "profile's name hidden": ("name", ".store", "profile name '.store' cannot name a folder"),
    "profile's name blank": ("name", "' '", "profile name ' ' cannot name a folder"),
}


@pytest.mark.parametrize(("name", "value", "told"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_bad_value_of_p_is_told(command, name, value, told):
    assert told in command("toy.yaml", "-p", name, value)


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_every_command_refuses_bad_values(command, verb):
    assert "beta: got '$(x)', expected a valid number" in command(
        verb, "toy.yaml", "-p", "method.beta", "$(x)"
    )


SEEDS = {
    "empty": "",
    "comma first": ",1",
    "point": "1.0",
    "negative": "1,-2",
    "range": "0-2",
    "underscore": "1_0",
    "past 32 bits": "4294967296",
    "thousands of digits": "1" * 5000,
    "another script": "٣",
}


@pytest.mark.parametrize("text", SEEDS.values(), ids=SEEDS)
def test_bad_seeds_are_told(command, text):
    told = command("toy.yaml", f"--seeds={text}")
    assert "--seeds" in told and "expected whole numbers from 0 to 2^32 - 1, as in 0,1,2" in told


@pytest.mark.parametrize("text", ["0,0", "7,1,7", "1,01", "3, 3"])
def test_seeds_named_twice_are_told(command, text):
    assert "a seed is named twice; name each once" in command("toy.yaml", "--seeds", text)


ONLY = {
    "none of them": "07",
    "one of none": "00,07",
    "comma last": "00,",
    "name": "00_setup",
    "three digits": "000",
    "another script": "٠٠",
}


@pytest.mark.parametrize("text", ONLY.values(), ids=ONLY)
def test_notebooks_that_there_are_not_are_told(command, text):
    told = command("toy.yaml", f"--only={text}")
    assert "--only" in told and "expected numbers of notebooks: 00, 01, 06" in told


MINUTES = {
    "zero": "0",
    "negative": "-1",
    "empty": "",
    "NaN": "nan",
    "exponent": "1e3",
    "unit": "9m",
    "thousands of digits": "9" * 5000,
}


@pytest.mark.parametrize("text", MINUTES.values(), ids=MINUTES)
def test_minutes_that_are_none_are_told(command, text):
    told = command("toy.yaml", f"--minutes={text}")
    assert "--minutes" in told and "expected a number of minutes above 0, as in 9 or 0.5" in told


LINES = {
    "no data": (["toy.yaml", "--data="], "--data is empty: give it a value, or leave the option"),
    "no folder": (["toy.yaml", "--out="], "--out is empty: give it a value, or leave the option"),
    "no notebooks": (["toy.yaml", "--only="], "--only is empty: give it a value, or leave the"),
    "status without a folder": (["status", "toy.yaml", "--out="], "--out is empty: give it a"),
    "data a file": (["toy.yaml", "--data", "file"], "--data file: no such folder; name one that"),
    "data too long": (["toy.yaml", "--data", "x" * 5000], "no path (File name too long); name a"),
    "data with NUL": (["toy.yaml", "--data", "a\x00b"], "no path (embedded null byte); name a"),
    "out too long": (["toy.yaml", "--out", "x" * 5000], "--out 'xxxx"),
    "two profiles": (["toy.yaml", "tiny"], "unrecognized arguments: tiny; ./run_all.sh --help"),
    "option shortened": (["toy.yaml", "--fre"], "unrecognized arguments: --fre"),
    "value for a switch": (["toy.yaml", "--fresh=yes"], "ignored explicit argument 'yes'"),
    "nothing after data": (["toy.yaml", "--data"], "argument --data: expected one argument"),
    "equals after p": (["toy.yaml", "-p", "method.beta=1"], "argument -p: expected 2 arguments"),
    "rerun of a run": (["toy.yaml", "--rerun"], "unrecognized arguments: --rerun"),
    "minutes of status": (["status", "toy.yaml", "--minutes", "9"], "arguments: --minutes 9"),
    "data of status": (["status", "toy.yaml", "--data", "."], "unrecognized arguments: --data ."),
    "unknown command": (
        ["Status"],
        "no profile 'Status': expected one of architectures, llama2-7b, ",
    ),
    "profile with a line break": (["a\nb"], "no profile 'a\\nb'"),
    "profile of bytes": (["\udcff.yaml"], "no profile '\\udcff.yaml'"),
    "fresh and only": (["toy.yaml", "--fresh", "--only", "00"], "leave out --only"),
}


@pytest.mark.parametrize(("arguments", "told"), LINES.values(), ids=LINES)
def test_a_bad_command_line_is_told(command, arguments, told):
    assert told in command(*arguments)


def test_an_empty_or_missing_data_folder_of_the_environment_is_told(command, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for value, told in (("empty", "the folder is empty"), ("none", "no such folder")):
        monkeypatch.setenv(cli.DATA_VARIABLE, value)
        assert f"{cli.DATA_VARIABLE} {value}: {told}; name one that holds" in command("toy.yaml")


def test_a_profile_that_runs_code_runs_none(command, tmp_path):
    bad = "description: !!python/object/apply:os.system ['touch ran']\n"
    (tmp_path / "bad.yaml").write_text(TOY + bad)
    told = command("bad.yaml")
    assert "bad.yaml is not readable YAML (line 2, column 14: could not determine a const" in told


def test_values_that_look_like_code_stay_text():
    for text in ("os.system", "$(touch ran)", "__import__('os')", "a; b", "1 + 1", "f(x)", "../x"):
        assert cli.parse_value("description", text) == text


@fuzzing
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_value_typed_is_plain_data_or_refused(name, text):
    value = read_or_refused(lambda: cli.parse_value(name.replace("\n", " "), text))
    items = value if isinstance(value, list) else [value]
    assert all(item is None or type(item) in (str, int, float, bool) for item in items)


@fuzzing
@given(st.text(max_size=30))
def test_any_seeds_and_folders_typed_are_read_or_refused(tmp_path, text):
    read_or_refused(lambda: cli.parse_seeds(text))
    read_or_refused(lambda: cli.parse_only(text, [cli.Path("00_setup.ipynb")]))
    read_or_refused(lambda: cli.folder_of(text, "--out"))
    assert not list(tmp_path.iterdir())
