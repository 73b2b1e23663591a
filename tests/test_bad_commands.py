"""Command lines that nobody meant: status 2, one line, nothing written and nothing run."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import assert_one_line, read_or_refused, tree

from allo_lib import cli

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
    monkeypatch.setattr(cli.marks, "notebooks", lambda run: notebooks)
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
    "base 60": ("model.width", "1:30", "'1:30' is octal or base 60 in YAML"),
    "base 60 with a point": ("method.beta", "0:00.1", "'0:00.1' is octal or base 60 in YAML"),
    "thousands of digits": ("model.width", "9" * 5000, "Exceeds the limit (4300 digits)"),
    "thousands of signs": ("method.beta", "-" * 5000, "argument -p: expected 2 arguments"),
    "hexadecimal fraction": ("method.beta", "0x1p-3", "beta: expected a number, got '0x1p-3'"),
    "comma": ("method.beta", "0,1", "beta: expected a number, got '0,1'"),
    "percent": ("method.share", "10%", "share: expected a number, got '10%'"),
    "with a unit": ("model.width", "128px", "width: expected int, got '128px'"),
    "power": ("model.width", "2**7", "width: expected int, got '2**7'"),
    "sum": ("model.width", "64+64", "width: expected int, got '64+64'"),
    "blanks inside": ("model.width", "1 28", "width: expected int, got '1 28'"),
    "exponent for a count": ("model.width", "1e2", "width: expected int, got 100.0"),
    "fraction for a count": ("domains.toy.epochs", "1.5", "epochs: expected int, got 1.5"),
    "digits of another script": ("model.width", "١٢٨", "width: expected int, got '١٢٨'"),
    "full-width digits": ("model.width", "１２８", "width: expected int, got '１２８'"),
    "superscript": ("model.width", "2²", "width: expected int, got '2²'"),
    "infinity": ("method.beta", ".inf", "beta: expected a finite number, got inf"),
    "not a number": ("method.beta", ".nan", "beta: expected a finite number, got nan"),
    "too large": ("method.beta", "1e400", "beta: expected a finite number, got inf"),
    "past 32 bits": ("model.width", "4294967296", "model.width: got 4294967296, expected at most"),
    "minus zero": ("method.beta", "-0", "method.beta: got 0.0, expected more than zero"),
    "tiny": ("method.beta", "1e-999", "method.beta: got 0.0, expected more than zero"),
    "list of one": ("method.beta", "[0.1]", "beta: expected float, got [0.1]"),
    "empty": ("model.width", "", "width: expected int, got None"),
    "blank": ("model.width", "   ", "width: expected int, got None"),
    "tilde": ("method.beta", "~", "beta: expected float, got None"),
    "true": ("model.width", "true", "width: expected int, got True"),
    "on": ("method.beta", "on", "beta: expected float, got True"),
    "no for a text": ("description", "no", "description: expected str, got False"),
    "number for a text": ("description", "3", "description: expected str, got 3"),
    "date": ("description", "2026-01-01", "expected a number, a text, or a list of them"),
    "no such date": ("description", "2026-02-30", "not a number, text or list of them (day is out"),
    # ... like code.
    "import": ("method.beta", "__import__('os').system('touch ran')", "beta: expected a number"),
    "shell": ("method.beta", "$(touch ran)", "beta: expected a number, got '$(touch ran)'"),
    "backquotes": ("method.beta", "`touch ran`", "not a number, text or list of them ("),
    "template": ("method.beta", "{{ 1 }}", "not a number, text or list of them ("),
    "percent sign": ("method.beta", "%(x)s", "not a number, text or list of them ("),
    "lambda": ("method.beta", "lambda x: x", "expected a number, a text, or a list of them"),
    "tag apply": (
        "method.beta",
        "!!python/object/apply:os.system ['touch ran']",
        "could not determine a constructor for the tag",
    ),
    "tag name": ("method.beta", "!!python/name:os.system", "could not determine a constructor"),
    "tag on a number": ("method.beta", "!!int x", "not a number, text or list of them ("),
    "tag on a truth": ("timing.peers", "!!bool x", "not a number, text or list of them ('x')"),
    "bytes": ("method.beta", "!!binary Zm9v", "expected a number, a text, or a list of them"),
    "own tag": ("method.beta", "!env HOME", "could not determine a constructor for the tag '!env'"),
    # ... like structure.
    "mapping": ("method", "{beta: 0.1}", "expected a number, a text, or a list of them"),
    "nested list": ("methods", "[[dpo]]", "expected a number, a text, or a list of them"),
    "itself": ("methods", "&a [*a]", "expected a number, a text, or a list of them"),
    "alias of nothing": ("methods", "*a", "found undefined alias 'a'"),
    "set": ("methods", "!!set {dpo}", "expected a number, a text, or a list of them"),
    "open bracket": ("methods", "[dpo", "line 1, column 5: while parsing a flow sequence"),
    "open quote": ("methods", "'dpo", "while scanning a quoted scalar"),
    "very deep": ("methods", "[" * 3000, "it is nested too deeply; expected a few levels"),
    "two documents": ("methods", "--- dpo\n--- sft", "expected a single document"),
    "equals": ("methods", "=", "could not determine a constructor for the tag"),
    "control character": ("description", "\x1b[31m", "special characters are not allowed"),
    "half a pair": ("description", '"\\ud83d"', "half of a surrogate pair in '\\ud83d'"),
    "raw half a pair": ("description", "\udcff", "special characters are not allowed"),
    "commas for a list": ("methods", "dpo,sft", "methods: expected a list, got 'dpo,sft'"),
    "number in a list": ("methods", "[dpo, 1]", "methods: expected str, got 1"),
    # Names of keys, and of methods.
    "empty name": ("", "1", "unknown key ''; expected one of"),
    "name with a line break": ("a\nb", "1", "unknown key 'a\\nb'; expected one of"),
    "name with an equals sign": ("method.beta=0.2", "1", "unknown key 'beta=0'; expected one of"),
    "name like an option": ("--seeds", "1", "argument -p: expected 2 arguments"),
    "name of a class": ("__class__.x", "1", "unknown key '__class__'; expected one of"),
    "method": ("methods", "[dpoo]", "method 'dpoo' is not known; expected one of sft_base, dpo"),
    "ablation": ("ablations", "[allo_none]", "method 'allo_none' is not known; expected one of"),
    "method of a domain": ("domains.toy.methods", "[SFT]", "method 'SFT' is not known; expected"),
    "method with code": ("methods", "[os.system]", "method 'os.system' is not known; expected"),
    "profile's name upwards": ("name", "../evil", "profile name '../evil' cannot name a folder"),
    "profile's name absolute": ("name", "/tmp/x", "profile name '/tmp/x' cannot name a folder"),
    "profile's name hidden": ("name", ".store", "profile name '.store' cannot name a folder"),
    "profile's name blank": ("name", "' '", "profile name ' ' cannot name a folder"),
    "profile's name long": ("name", "[" + "x" * 9 + "]", "name: expected str, got ['xxxxxxxxx']"),
}


@pytest.mark.parametrize(("name", "value", "told"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_bad_value_of_p_is_told(command, name, value, told):
    assert told in command("toy.yaml", "-p", name, value)


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_every_command_refuses_bad_values(command, verb):
    assert "beta: expected a number" in command(verb, "toy.yaml", "-p", "method.beta", "$(x)")


SEEDS = {
    "empty": "",
    "blank": " ",
    "comma": ",",
    "comma first": ",1",
    "point": "1.0",
    "exponent": "1e3",
    "sign": "+1",
    "negative": "1,-2",
    "range": "0-2",
    "dots": "0..2",
    "list": "[0, 1]",
    "hexadecimal": "0x1",
    "underscore": "1_0",
    "past 32 bits": "4294967296",
    "thousands of digits": "1" * 5000,
    "another script": "٣",
    "blanks inside": "1 2",
    "words": "one,two",
    "code": "__import__('os')",
    "semicolon": "0;1",
    "NaN": "nan",
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
    "comma": ",",
    "comma last": "00,",
    "name": "00_setup",
    "range": "00-01",
    "negative": "-1",
    "three digits": "000",
    "point": "0.0",
    "star": "*",
    "path": "../00",
    "long": "0" * 5000,
    "another script": "٠٠",
}


@pytest.mark.parametrize("text", ONLY.values(), ids=ONLY)
def test_notebooks_that_there_are_not_are_told(command, text):
    told = command("toy.yaml", f"--only={text}")
    assert "--only" in told and "expected numbers of notebooks: 00, 01, 06" in told


MINUTES = {
    "zero": "0",
    "zero with a point": "0.00",
    "negative": "-1",
    "empty": "",
    "blank": " ",
    "text": "nine",
    "NaN": "nan",
    "infinity": "inf",
    "exponent": "1e3",
    "comma": "0,5",
    "point": ".",
    "unit": "9m",
    "clock": "9:30",
    "thousands of digits": "9" * 5000,
    "another script": "٩",
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
    "out with NUL": (["toy.yaml", "--out", "a\x00b"], "--out 'a\\x00b': no path (embedded null"),
    "two profiles": (["toy.yaml", "tiny"], "unrecognized arguments: tiny; ./run_all.sh --help"),
    "unknown option": (["toy.yaml", "--sede", "1"], "unrecognized arguments: --sede 1"),
    "option shortened": (["toy.yaml", "--fre"], "unrecognized arguments: --fre"),
    "value for a switch": (["toy.yaml", "--fresh=yes"], "ignored explicit argument 'yes'"),
    "nothing after data": (["toy.yaml", "--data"], "argument --data: expected one argument"),
    "nothing after out": (["toy.yaml", "--out"], "argument --out: expected one argument"),
    "one after p": (["toy.yaml", "-p", "method.beta"], "argument -p: expected 2 arguments"),
    "nothing after p": (["toy.yaml", "-p"], "argument -p: expected 2 arguments"),
    "equals after p": (["toy.yaml", "-p", "method.beta=1"], "argument -p: expected 2 arguments"),
    "rerun of a run": (["toy.yaml", "--rerun"], "unrecognized arguments: --rerun"),
    "nothing after minutes": (["toy.yaml", "--minutes"], "--minutes: expected one argument"),
    "minutes of status": (["status", "toy.yaml", "--minutes", "9"], "arguments: --minutes 9"),
    "fresh status": (["status", "toy.yaml", "--fresh"], "unrecognized arguments: --fresh"),
    "only of verify": (["verify", "toy.yaml", "--only", "00"], "unrecognized arguments: --only"),
    "data of status": (["status", "toy.yaml", "--data", "."], "unrecognized arguments: --data ."),
    "unknown command": (["Status"], "no profile 'Status': expected one of smollm2, tiny, tiny-"),
    "empty profile": ([""], "no profile '': expected one of smollm2, tiny, tiny-"),
    "profile too long": (["x" * 5000 + ".yaml"], "no profile 'xxxx"),
    "profile with NUL": (["a\x00.yaml"], "no profile 'a\\x00.yaml'"),
    "profile with a line break": (["a\nb"], "no profile 'a\\nb'"),
    "profile of bytes": (["\udcff.yaml"], "no profile '\\udcff.yaml'"),
    "profile a folder": (["."], "no profile '.': expected one of"),
    "profile with code": (["$(touch ran)"], "no profile '$(touch ran)'"),
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
