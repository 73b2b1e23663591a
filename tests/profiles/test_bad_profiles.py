"""Profiles that would run something else than their author meant: each is refused in one line."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree

from allo_lib.profiles import config
from allo_lib.profiles.profile_files import load_profile, parse_yaml

SMALL = {"domains": {"toy": {"datasets": ["chain", "scan"]}}}
TOY = "domains: {toy: {datasets: [chain]}}\n"
HUGE = 10**400
fuzzing = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def profile_of(folder, text: str | bytes, name="own.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- texts ---------------------------------------------------------------------------------------

TAGS = ("!!python/object/apply:builtins.eval [\"open('ran', 'w')\"]", "!!python/name:os.system",
        "!!python/tuple [1, 2]", "!Environment HOME")  # fmt: skip


@pytest.mark.parametrize("value", TAGS)
@pytest.mark.parametrize("place", ["description: {}", "? {}\n: 1"])
def test_tags_construct_nothing(tmp_path, monkeypatch, value, place):
    monkeypatch.chdir(tmp_path)
    path = profile_of(tmp_path, TOY + place.format(value) + "\n")
    before = tree(tmp_path)
    with refused("own.yaml is not readable YAML", "could not determine a constructor for the tag"):
        load_profile(path)
    assert tree(tmp_path) == before  # nothing named `ran`


TEXTS = {
    # No YAML, or no profile.
    "tab": ("domains:\n\ttoy: 1\n", "is not readable YAML (line 2, column 1: while scanning"),
    "Latin-1": (TOY.encode() + "description: é\n".encode("latin-1"), "'utf-8' codec can't decode"),
    "very deep": ("[" * 5000, "it is nested too deeply; expected a few levels"),
    "list of profiles": ("- name: x\n", "own.yaml holds a list: expected keys with values"),
    # Values that YAML itself does not take, and of which Python says what yaml lets through.
    "no such day": (TOY + "description: 2020-13-45\n", "month must be in 1..12"),
    "no boolean": (TOY + "timing: {peers: !!bool maybe}\n", "is not readable YAML ('maybe')"),
    "thousands of digits": (TOY + "model: {width: " + "9" * 5000 + "}\n", "Exceeds the limit"),
    # What YAML would quietly read in another way.
    "key twice": (TOY + "method: {beta: 0.1, beta: 0.2}\n", "the key 'beta' is given twice; give"),
    "octal": (TOY + "model: {width: 0100}\n", "'0100' is octal or base 60 in YAML; write a dec"),
    "base 60": (TOY + "model: {width: 2:08}\n", "'2:08' is octal or base 60 in YAML"),
    "set": (TOY + "methods: !!set {dpo}\n", "methods: got {'dpo'}, expected a list"),
    # Names and characters.
    "name no": (TOY + "name: no\n", "name: got False, expected a valid string"),
    "half a pair": (TOY + 'description: "\\ud83d"\n', "half of a surrogate pair in '\\ud83d'"),
    "key with a line break": (TOY + '"a\\nb": 1\n', "unknown key 'a\\nb'; expected one of abl"),
    "domain upwards": ("domains: {..: {datasets: [x]}}\n", "'..' cannot name a folder; use"),
    "domain 1": ("domains: {1: {datasets: [x]}}\n", "domains.1: got 1, expected a valid string"),
    "data set upwards": ("domains: {a: {datasets: [../../etc]}}\n", "'../../etc' cannot name a"),
    "data set twice": ("domains: {a: {datasets: [x, x]}}\n", "'x' is named twice; name each once"),
    # Sections that hold themselves, or a world.
    "list in itself": (TOY + "methods: &m [*m]\n", "methods.0: got [[[...]]], expected a valid"),
    "sizes hold themselves": (
        "model: &m {name: *m}\nsizes: {cpu: {model: *m}, gpu: {}}\n" + TOY,
        "a section that holds itself; write it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), TEXTS.values(), ids=TEXTS)
def test_a_bad_text_is_told(tmp_path, text, told):
    path = profile_of(tmp_path, text)
    before = tree(tmp_path)
    with refused(told):
        load_profile(path, device="cpu")
    assert tree(tmp_path) == before


def test_a_list_that_is_larger_than_the_memory_is_shown_cut(tmp_path):
    levels = ["[ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    levels += ["[" + ", ".join([f"*x{i}"] * 10) + "]" for i in range(30)]
    text = ", ".join(f"&x{i} {level}" for i, level in enumerate(levels))
    with refused("methods.0: got ['ha', 'ha', 'ha', 'ha', ...], expected a valid string"):
        load_profile(profile_of(tmp_path, f"{TOY}methods: [{text}]\n"))


@pytest.mark.parametrize("name", ["nope", "none.yaml", "", ".", "TINY", "a\x00b.yaml", "own.json",
                                  "folder.yaml", "x" * 5000 + ".yaml"])  # fmt: skip
def test_what_names_no_profile_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "own.json").write_text("{}")
    with refused("no profile", "expected one of architectures, ", "tiny-full, or the path"):
        load_profile(name)


# --- values --------------------------------------------------------------------------------------

VALUES = {
    # A kind of value each, and what each kind does not take.
    "zero of a positive count": ("model.width", 0, "model.width: got 0, expected greater than or"),
    "negative count": ("domains.toy.pairs.train", -2, "domains.toy.pairs.train: got -2, expected"),
    "count of 400 digits": ("model.width", HUGE, "model.width: got 1000000000"),
    "count with a point": ("model.width", 64.0, "model.width: got 64.0, expected a valid integer"),
    "zero of a rate": ("domains.toy.rates.dense", 0, "rates.dense: got 0, expected greater than 0"),
    "number NaN": ("method.weight_decay", float("nan"), "weight_decay: got nan, expected a finite"),
    "number of a text NaN": ("method.beta", "NaN", "method.beta: got 'NaN', expected a finite"),
    "number true": ("method.beta", True, "method.beta: got True, expected a number"),
    "number null": ("method.beta", None, "method.beta: got None, expected a valid number"),
    "share in percent": ("method.share", 10, "share: got 10, expected less than or equal to 1"),
    "decay of one": ("domains.toy.sft.beta2", 1.0, "sft.beta2: got 1.0, expected less than 1"),
    "flag a number": ("timing.peers", 1, "timing.peers: got 1, expected a valid boolean"),
    "list a text": ("methods", "dpo", "methods: got 'dpo', expected a list"),
    "word twice": ("methods", ["dpo", "sft", "dpo"], "methods: 'dpo' is named twice; name each"),
    "choice": ("model.dtype", "float16", "got 'float16', expected 'float32', 'bfloat16' or 'auto'"),
    "section null": ("domains.toy", None, "domains.toy: got None, expected a section with keys"),
    "section a list": ("search", [3, 2.0], "search: got [3, 2.0], expected a section with keys"),
    # Values that do not fit together.
    "width not of the heads": ("model.width", 100, "width: got 100, expected a multiple of 2 * h"),
    "mix short": ("domains.toy.sft.mix", [1], "sft.mix: got [1.0], expected a share for each of"),
    "no data sets": ("domains.toy.datasets", [], "domains.toy: datasets: empty; name at least"),
    "no domains": ("domains", {}, "domains: names no domain; name at least one"),
    "timing elsewhere": ("timing.domain", "moon", "timing.domain: got 'moon', expected one of toy"),
    "no name": ("name", "", "name and size: expected a text in each"),
    "judge without a kind": ("judge.model", "me/rm", "judge: model: only the kind reward_model"),
    "judge of no kind": ("judge.kind", "gpt", "judge.kind: got 'gpt', expected '', 'reward_model'"),
    "judge of nothing": ("judge.kind", "programs", "programs has nothing to judge; give a domain"),
    "judge without a model": ("judge.kind", "reward_model", "judge: model: reward_model needs one"),
    "instructions of none": ("domains.toy.instructions", {"count": 8}, "datasets: empty, with a c"),
    "instructions of the miniature": (
        "domains.toy.instructions", {"datasets": ["arena_hard"], "count": 8}, "has no words for"),
    # Keys.
    "unknown": ("method.bta", 1, "method: unknown key 'bta'; expected one of beta, forgetting_w"),
    "unknown at the top": ("Method.beta", 1, "own.yaml: unknown key 'Method'; expected one of abl"),
    "empty": ("method.", 1, "method: unknown key ''; expected one of"),
    "sizes": ("sizes.cpu.method.beta", 1, "unknown key 'sizes'; expected one of"),
    "domain of no folder": ("domains.a b.dev", 1, "'a b' cannot name a folder; use letters, dig"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "told"), VALUES.values(), ids=VALUES)
def test_a_bad_value_is_told(tmp_path, key, value, told):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    with refused("own.yaml: ", told):
        load_profile(path, {key: value})


ASKED = {"datasets": ["alpaca_eval", "arena_hard"], "count": 8}
TOGETHER = {
    "questions": ({"datasets": ["ecqa"], "count": 8}, {}, "got 'ecqa', expected some of alpaca_ev"),
    "one for two": (ASKED | {"count": 1}, {}, "count: got 1, expected at least one for each of th"),
    "blank model": (ASKED, {"kind": "reward_model", "model": " "}, "reward_model needs one; give"),
    "program's model": (ASKED, {"kind": "programs", "model": "x"}, "only the kind reward_model ha"),
    "two domains": (ASKED, {}, "the instructions of two name alpaca_eval; measurements have one"),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "judge", "told"), TOGETHER.values(), ids=TOGETHER)
def test_instructions_and_judges_that_cannot_be_are_told(tmp_path, asked, judge, told):
    domain = {"kind": "preferences", "datasets": ["hh_helpful"], "instructions": asked}
    domains = {"a": domain} | ({"b": domain} if "of two" in told else {})
    with refused(told):
        load_profile(profile_of(tmp_path, yaml.safe_dump({"domains": domains, "judge": judge})))


def test_overrides_of_another_form_are_told(tmp_path):
    path = profile_of(tmp_path, TOY + "method: {beta: 0.1}\n")
    with refused("overrides: expected a dict of keys and values, got "):
        load_profile(path, "method.beta=1")
    with refused("'beta' is a value, not a section"):
        load_profile(path, {"method.beta.x": 1})


@pytest.mark.parametrize("sizes", [{"cpu": {}}, {"cpu": {}, "gpu": {}, "tpu": {}}, 3])
def test_sizes_need_both_devices_and_sections(tmp_path, sizes):
    with refused("`sizes` needs exactly the keys cpu, gpu"):
        load_profile(profile_of(tmp_path, yaml.safe_dump(SMALL | {"sizes": sizes})))
    path = profile_of(tmp_path, yaml.safe_dump(SMALL | {"sizes": {"cpu": 3, "gpu": {}}}))
    with refused("sizes.cpu: expected a section, got 3"):
        load_profile(path, device="cpu")


# --- any input -----------------------------------------------------------------------------------

yaml_like = st.text(st.sampled_from(list("ab01-:,.[]{}&*!|>'\"%@?#~<=\n\t \\")), max_size=40)


@fuzzing
@given(yaml_like | yaml_like.map(lambda text: f"{TOY}method: {text}\n") | st.text(max_size=60))
def test_any_text_is_a_profile_or_refused(tmp_path, text):
    read_or_refused(lambda: parse_yaml(text))
    raw = text.encode("utf-8", "surrogatepass")
    read_or_refused(lambda: load_profile(profile_of(tmp_path, raw), device="cpu"))


fields = [f"{section}.{name}" for section, kind in (
    ("model", config.Model), ("method", config.Method), ("search", config.Search),
    ("compute", config.Compute), ("timing", config.Timing), ("domains.toy", config.Domain),
    ("domains.toy.sft", config.Supervised), ("domains.toy.pairs", config.Pairs),
    ("domains.toy.rates", config.Rates), ("domains.toy.instructions", config.Instructions),
    ("judge", config.Judge),
) for name in kind.__dataclass_fields__]  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(fuzzing, max_examples=300)
@given(st.dictionaries(st.sampled_from(fields), values, max_size=3))
def test_any_value_is_taken_whole_or_refused(tmp_path, overrides):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    profile = read_or_refused(lambda: load_profile(path, overrides))
    if profile is not None:  # it can be hashed, stored and read again
        again = profile_of(tmp_path, yaml.safe_dump(profile.to_dict()), "again.yaml")
        assert load_profile(again).hash() == profile.hash()
