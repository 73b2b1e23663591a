"""What the commands accept, and the one clear line for what they do not: status 2, nothing run."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import assert_one_line, read_or_refused, tree

from allo_lib.cli import cli
from allo_lib.errors import AlloError

TOY = "domains: {toy: {datasets: [chain]}}\n"
fuzzing = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# --- what is accepted --------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("0,1,2", (0, 1, 2)), (" 7, 3", (7, 3))])
def test_seeds_are_read_in_their_order(text, seeds):
    assert cli.parse_seeds(text) == seeds


def test_without_seeds_the_models_that_the_profile_fixes_are_run(monkeypatch):
    ran = []
    monkeypatch.setattr(cli.driver, "run_study", lambda run, fresh: ran.append(run.seeds) or [])
    assert cli.main(["tiny", "-p", "models", "3"]) == 0 == cli.main(["tiny", "--seeds", "5,1"])
    assert ran == [(0, 1, 2), (5, 1)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("true", True),
        ("top", "top"),
        ("null", None),
        ("[0.1, 1e-2]", [0.1, 0.01]),
        ("$(touch ran)", "$(touch ran)"),
        ("__import__('os').system('false')", "__import__('os').system('false')"),
    ],
)
def test_values_are_numbers_texts_or_flat_lists(text, value):
    read = cli.parse_value("name", text)
    assert read == value and type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_its_own_notation(number):
    assert math.isclose(float(cli.parse_value("name", repr(number))), number, rel_tol=1e-15)


@fuzzing
@given(st.text(max_size=30), st.text(max_size=30))
def test_anything_typed_is_plain_data_or_refused(tmp_path, name, text):
    value = read_or_refused(lambda: cli.parse_value(name.replace("\n", " "), text))
    items = value if isinstance(value, list) else [value]
    assert all(item is None or type(item) in (str, int, float, bool) for item in items)
    read_or_refused(lambda: cli.parse_seeds(text))
    read_or_refused(lambda: cli.parse_only(text, [cli.Path("00_setup.ipynb")]))
    read_or_refused(lambda: cli.folder_of(text, "--out"))
    assert not list(tmp_path.iterdir())


def test_data_folder_comes_from_the_option_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.delenv(cli.DATA_VARIABLE, raising=False)
    assert cli.data_folder(None) is None
    assert cli.data_folder(str(tmp_path)) == tmp_path.resolve()
    monkeypatch.setenv(cli.DATA_VARIABLE, str(tmp_path))
    assert cli.data_folder(None) == tmp_path.resolve()
    for name, problem in (("nowhere", "no such folder"), ("gsm8k", "the folder is empty")):
        monkeypatch.setenv(cli.DATA_VARIABLE, str(tmp_path / name))
        with pytest.raises(AlloError, match=f"{cli.DATA_VARIABLE} .*: {problem}; name one that"):
            cli.data_folder(None)


@pytest.mark.parametrize(("typed", "passed"), [([], ["-m", "not slow"]), (["-x"], ["-x"])])
def test_the_quick_tests_are_run_unless_something_is_asked_for(typed, passed, monkeypatch):
    ran = []
    monkeypatch.setattr(cli.os, "chdir", lambda folder: ran.append(folder))
    monkeypatch.setattr(cli.os, "execv", lambda program, command: ran.append(command[1:]))
    cli.test(typed)
    assert ran == [cli.ROOT, ["-m", "pytest", *passed]]


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A function that runs a command on a profile of its own and returns its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DATA_VARIABLE, raising=False)
    names = ("00_setup", "01_importance", "06_evaluation")
    notebooks = [cli.Path(f"{name}.ipynb") for name in names]
    monkeypatch.setattr(cli.driver, "notebooks", lambda run: notebooks)
    monkeypatch.setattr(cli.driver, "_run_all", lambda *_: pytest.fail("the study ran"))
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tag.yaml").write_text(
        f"{TOY}description: !!python/object/apply:os.system ['touch ran']\n"
    )
    (tmp_path / "colour.yaml").write_text(f"{TOY}colour: red\n")

    def run(*arguments) -> str:
        before = tree(tmp_path)
        assert cli.main(list(arguments)) == cli.BAD_INPUT, arguments
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("run_all: ")
        assert printed.err[-1] == "\n"
        assert_one_line(printed.err[:-1])
        assert tree(tmp_path) == before
        return printed.err

    return run


NO_DATA = "expected a number, a text, or a list of them"
OVERRIDES = [
    # Values that look like numbers.
    ("model.width", "0200", "'0200' is octal or base 60 in YAML; write a decimal number"),
    ("method.beta", "-1", "got -1"),
    ("method.beta", "-" * 5000, "argument -p: expected 2 arguments"),
    ("method.share", "10%", "share: got '10%', expected a valid number"),
    ("model.width", "1e2", "width: got 100.0, expected a valid integer"),
    ("model.width", "4294967296", "width: got 4294967296, expected less than"),
    ("model.width", "", "width: got None, expected a valid integer"),
    ("description", "2026-01-01", NO_DATA),
    ("description", "2026-02-30", "not a number, text or list of them (day is out"),
    # ... like code.
    ("method.beta", "$(touch ran)", "beta: got '$(touch ran)', expected a valid"),
    ("method.beta", "`touch ran`", "not a number, text or list of them ("),
    ("method.beta", "lambda x: x", NO_DATA),
    ("method.beta", "!!python/object/apply:os.system ['touch ran']", "could not determine a cons"),
    ("timing.peers", "!!bool x", "not a number, text or list of them ('x')"),
    # ... like structure.
    ("method", "{beta: 0.1}", NO_DATA),
    ("methods", "[[1]]", NO_DATA),
    ("methods", "&a [*a]", NO_DATA),
    ("methods", "[" * 3000, "it is nested too deeply; expected a few levels"),
    ("methods", "--- dpo\n--- sft", "expected a single document"),
    ("description", "\x1b[31m", "special characters are not allowed"),
    ("description", '"\\ud83d"', "half of a surrogate pair in '\\ud83d'"),
    ("methods", "dpo,sft", "methods: got 'dpo,sft', expected a list"),
    # Names of keys, and of methods.
    ("size_of_hat", "3", "unknown key 'size_of_hat'"),
    ("a\nb", "1", "unknown key 'a\\nb'; expected one of"),
    ("method.beta=0.2", "1", "unknown key 'beta=0'; expected one of"),
    ("--seeds", "1", "argument -p: expected 2 arguments"),
    ("methods", "[dpoo]", "method 'dpoo' is not known; expected one of sft_base, dpo"),
    ("ablations", "[allo_none]", "method 'allo_none' is not known; expected one of"),
    ("domains.toy.methods", "[SFT]", "method 'SFT' is not known; expected"),
    ("name", "../evil", "profile name '../evil' cannot name a folder"),
    ("name", ".store", "profile name '.store' cannot name a folder"),
    ("name", "' '", "profile name ' ' cannot name a folder"),
]


@pytest.mark.parametrize(("name", "value", "problem"), OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_bad_value_is_refused(command, name, value, problem):
    assert problem in command("toy.yaml", "-p", name, value)


BAD_OPTIONS = {
    "--seeds": (
        (
            "",
            "a",
            "0,",
            ",1",
            "-1",
            "1.0",
            "1,-2",
            "0-2",
            "1_0",
            "4294967296",
            "1" * 5000,
            "٣",
            "²",
        ),
        "expected whole numbers from 0 to 2^32 - 1, as in 0,1,2",
    ),
    "--seeds ": (("0,0", "7,1,7", "1,01"), "a seed is named twice; name each once"),
    "--only": (
        ("07", "00,07", "00,", "00_setup", "000", "٠٠"),
        "expected numbers of notebooks: 00, 01, 06",
    ),
    "--minutes": (
        ("0", "-1", "", "nan", "1e3", "9m", "9" * 5000),
        "expected a number of minutes above 0, as in 9 or 0.5",
    ),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_a_bad_option_is_refused(command, option):
    texts, problem = BAD_OPTIONS[option]
    for text in texts:
        line = command("toy.yaml", f"{option.strip()}={text}")
        assert option.strip() in line and problem in line


LINES = [
    (["toy.yaml", "--data="], "--data is empty: give it a value, or leave the option"),
    (["toy.yaml", "--out="], "--out is empty: give it a value, or leave the option"),
    (["toy.yaml", "--only="], "--only is empty: give it a value, or leave the"),
    (["status", "toy.yaml", "--out="], "--out is empty: give it a"),
    (["toy.yaml", "--data", "file"], "--data file: no such folder; name one that"),
    (["toy.yaml", "--data", "empty"], "the folder is empty"),
    (["toy.yaml", "--data", "x" * 5000], "no path (File name too long); name a"),
    (["toy.yaml", "--data", "a\x00b"], "no path (embedded null byte); name a"),
    (["toy.yaml", "--out", "x" * 5000], "--out 'xxxx"),
    (["toy.yaml", "--out", "file"], "is a file; name a folder"),
    (["toy.yaml", "--out", "."], "holds other files"),
    (["toy.yaml", "--out", str(cli.ROOT)], "holds the project itself"),
    (["toy.yaml", "tiny"], "unrecognized arguments: tiny; ./run_all.sh --help"),
    (["toy.yaml", "--fre"], "unrecognized arguments: --fre"),
    (["toy.yaml", "--fresh=yes"], "ignored explicit argument 'yes'"),
    (["toy.yaml", "--data"], "argument --data: expected one argument"),
    (["toy.yaml", "-p", "method.beta=1"], "argument -p: expected 2 arguments"),
    (["toy.yaml", "--rerun"], "unrecognized arguments: --rerun"),
    (["toy.yaml", "--fresh", "--only", "00"], "leave out --only"),
    (["status", "toy.yaml", "--minutes", "9"], "arguments: --minutes 9"),
    (["status", "toy.yaml", "--data", "."], "unrecognized arguments: --data ."),
    (["status", "toy.yaml", "-p", "method.beta", "$(x)"], "expected a valid number"),
    (["verify", "toy.yaml", "-p", "method.beta", "$(x)"], "expected a valid number"),
    (["verify", "toy.yaml", "--out", "empty"], "has no manifest.json"),
    (["Status"], "no profile 'Status': expected one of architectures, llama2-7b, "),
    (["a\nb"], "no profile 'a\\nb'"),
    (["\udcff.yaml"], "no profile '\\udcff.yaml'"),
    (["colour.yaml"], "unknown key 'colour'"),
    (["tag.yaml"], "tag.yaml is not readable YAML (line 2, column 14: could not determine a const"),
]


@pytest.mark.parametrize(("arguments", "problem"), LINES)
def test_a_bad_command_line_is_refused(command, arguments, problem):
    assert problem in command(*arguments)
