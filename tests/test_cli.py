"""What the commands accept, and the one clear line for what they do not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_lib.cli import cli
from allo_lib.errors import AlloError


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("0,1,2", (0, 1, 2)), (" 7, 3", (7, 3))])
def test_seeds_are_read_in_their_order(text, seeds):
    assert cli.parse_seeds(text) == seeds


def test_without_seeds_the_models_that_the_profile_fixes_are_run(monkeypatch):
    asked = []
    monkeypatch.setattr(cli.driver, "run_study", lambda run, fresh: asked.append(run.seeds) or [])
    assert cli.main(["tiny", "-p", "models", "3"]) == 0 == cli.main(["tiny", "--seeds", "5,1"])
    assert asked == [(0, 1, 2), (5, 1)]


@pytest.mark.parametrize("text", ["", "a", "0,", "-1", "1.5", "0,0", "1,01", "²", "4294967296"])
def test_other_seeds_are_refused(text):
    with pytest.raises(AlloError, match="--seeds"):
        cli.parse_seeds(text)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, unique=True))
def test_any_distinct_seeds_come_back(seeds):
    assert cli.parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


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
        ("__import__('os').system('false')", "__import__('os').system('false')"),
    ],
)
def test_values_are_numbers_texts_or_flat_lists(text, value):
    read = cli.parse_value("name", text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["{a: 1}", "[[1]]", "2020-01-01", "!!python/object/apply:os.getcwd []", "[", "a: b: c"]
)
def test_values_with_structure_or_tags_are_refused(text):
    with pytest.raises(AlloError, match="-p name"):
        cli.parse_value("name", text)


@given(st.text())
def test_any_typed_value_is_read_as_data_or_refused(text):
    try:
        value = cli.parse_value("name", text)
    except AlloError:
        return
    items = value if isinstance(value, list) else [value]
    assert all(item is None or isinstance(item, (str, int, float)) for item in items)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_its_own_notation(number):
    assert math.isclose(float(cli.parse_value("name", repr(number))), number, rel_tol=1e-15)


def bad_inputs(folder):
    empty = folder / "empty"
    empty.mkdir()
    profile = folder / "toy.yaml"
    profile.write_text("domains: {toy: {datasets: [chain]}}\n")
    wrong = folder / "wrong.yaml"
    wrong.write_text("domains: {toy: {datasets: [chain]}}\ncolour: red\n")
    (folder / "results").write_text("a file\n")
    toy = str(profile)
    return {
        "no profile 'nosuch'": ["nosuch"],
        "no profile 'missing.yaml'": ["missing.yaml"],
        "unknown key 'colour'": [str(wrong)],
        "unknown key 'size_of_hat'": [toy, "-p", "size_of_hat", "3"],
        "got -1": [toy, "-p", "method.beta", "-1"],
        "expected 2 arguments": [toy, "-p", "method.beta"],
        "unrecognized arguments: --colour": [toy, "--colour"],
        "unrecognized arguments: --see": [toy, "--see", "1"],
        "argument --seeds: expected one argument": [toy, "--seeds"],
        "--seeds 'one'": [toy, "--seeds", "one"],
        "a seed is named twice": [toy, "--seeds", "1,1"],
        "--only '9x'": [toy, "--only", "9x"],
        "--only '99'": [toy, "--only", "99"],
        "leave out --only": [toy, "--fresh", "--only", "00"],
        "no such folder": [toy, "--data", str(folder / "nowhere")],
        "the folder is empty": [toy, "--data", str(empty)],
        "is a file; name a folder": [toy, "--out", str(folder / "results")],
        "holds other files": [toy, "--out", str(folder)],
        "holds the project itself": [toy, "--out", str(cli.ROOT)],
        "has no manifest.json": ["verify", toy, "--out", str(empty)],
        "unrecognized arguments: --seeds": ["status", toy, "--seeds", "1"],
    }


def test_bad_input_gets_one_line_and_touches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(cli.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(cli.driver, "notebooks", lambda run: [cli.Path("00_setup.ipynb")])
    cases = bad_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in cases.items():
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "new")]
        assert cli.main([*arguments, *out]) == 2, arguments
        told = capsys.readouterr().err
        assert told.startswith("run_all: ") and told.count("\n") == 1, (arguments, told)
        assert message in told
    assert sorted(tmp_path.rglob("*")) == before


def test_data_folder_comes_from_the_option_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.delenv(cli.DATA_VARIABLE, raising=False)
    assert cli.data_folder(None) is None
    assert cli.data_folder(str(tmp_path)) == tmp_path.resolve()
    monkeypatch.setenv(cli.DATA_VARIABLE, str(tmp_path))
    assert cli.data_folder(None) == tmp_path.resolve()
    monkeypatch.setenv(cli.DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(AlloError, match=cli.DATA_VARIABLE):
        cli.data_folder(None)
