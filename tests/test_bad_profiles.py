"""Profiles that would run something else than their author meant: each is refused in one line."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree

from allo_lib import config
from allo_lib.profile_files import load_profile, parse_yaml

SMALL = {"domains": {"toy": {"datasets": ["chain", "scan"]}}}
TOY = "domains: {toy: {datasets: [chain]}}\n"
HUGE = 10**400
fuzzing = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def profile_of(folder, text: str | bytes, name="own.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- texts ---------------------------------------------------------------------------------------

RUNS = "open('ran', 'w')"  # what each tag below would do if it constructed what it names
TAGS = {
    "apply": f'!!python/object/apply:builtins.eval ["{RUNS}"]',
    "new": '!!python/object/new:os.mkdir ["ran"]',
    "object": "!!python/object:pathlib.Path {}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "tuple": "!!python/tuple [1, 2]",
    "str": "!!python/str text",
    "unicode": "!!python/unicode text",
    "bytes": "!!python/bytes Zm9v",
    "long": "!!python/long 3",
    "own tag": "!Environment HOME",
    "include": "!include /etc/passwd",
    "unknown tag": "!!nothing 3",
}


@pytest.mark.parametrize("value", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("place", ["description: {}", "method: {{beta: {} }}", "? {}\n: 1"])
def test_tags_construct_nothing(tmp_path, monkeypatch, value, place):
    monkeypatch.chdir(tmp_path)
    path = profile_of(tmp_path, TOY + place.format(value) + "\n")
    before = tree(tmp_path)
    with refused("own.yaml is not readable YAML", "could not determine a constructor for the tag"):
        load_profile(path)
    assert tree(tmp_path) == before  # nothing named `ran`


TEXTS = {
    # No YAML.
    "tab": ("domains:\n\ttoy: 1\n", "is not readable YAML (line 2, column 1: while scanning"),
    "open bracket": (TOY + "methods: [dpo\n", "while parsing a flow sequence"),
    "open quote": (TOY + "description: 'text\n", "while scanning a quoted scalar"),
    "two colons": (TOY + "description: a: b\n", "mapping values are not allowed here"),
    "wrong indent": ("domains:\n  toy:\n datasets: [x]\n", "not readable YAML (line 3, column 2"),
    "percent": ("%YAML 3.0\n---\n" + TOY, "found incompatible YAML document"),
    "two documents": (TOY + "---\n" + TOY, "expected a single document"),
    "unknown alias": (TOY + "method: *nowhere\n", "found undefined alias"),
    "control character": (TOY + "description: \x07\n", "special characters are not allowed"),
    "NUL": (TOY.encode() + b"\x00", "special characters are not allowed"),
    "Latin-1": (TOY.encode() + "description: é\n".encode("latin-1"), "'utf-8' codec can't decode"),
    "cut UTF-16": ("n".encode("utf-16")[:3], "'utf-8' codec can't decode"),
    "binary": (bytes(range(256)), "is not readable YAML"),
    "very deep": ("[" * 5000, "it is nested too deeply; expected a few levels"),
    "very deep dicts": ("{a: " * 3000, "it is nested too deeply; expected a few levels"),
    # YAML, but no profile.
    "number": ("3\n", "own.yaml holds a int: expected keys with values"),
    "comment only": ("# name: x\n", "own.yaml holds a NoneType: expected keys with values"),
    "list of profiles": ("- name: x\n", "own.yaml holds a list: expected keys with values"),
    "JSON text": ('"name"\n', "own.yaml holds a str: expected keys with values"),
    "set": ("!!set {a, b}\n", "own.yaml holds a set: expected keys with values"),
    # Values that YAML itself does not take.
    "no such day": (TOY + "description: 2020-13-45\n", "month must be in 1..12"),
    "no number": (TOY + "method: {beta: !!float x}\n", "could not convert string to float: 'x'"),
    "no whole number": (TOY + "domains: !!int x\n", "is not readable YAML ("),
    "empty number": (TOY + "method: {beta: !!int ''}\n", "is not readable YAML ("),
    "no boolean": (TOY + "timing: {peers: !!bool maybe}\n", "is not readable YAML ('maybe')"),
    "no date": (TOY + "description: !!timestamp x\n", "is not readable YAML ("),
    "number on a list": (TOY + "model: !!int [1]\n", "is not readable YAML ("),
    "thousands of digits": (TOY + "model: {width: " + "9" * 5000 + "}\n", "Exceeds the limit"),
    "list as a key": (TOY + "[a, b]: 1\n", "found unhashable key"),
    # What YAML would quietly read in another way.
    "key twice": (TOY + "method: {beta: 0.1, beta: 0.2}\n", "the key 'beta' is given twice; give"),
    "section twice": (TOY + "method: {}\nmethod: {}\n", "the key 'method' is given twice"),
    "domain twice": ("domains: {a: {}, a: {}}\n", "the key 'a' is given twice"),
    "twice, once quoted": (TOY + "method: {}\n'method': {}\n", "the key 'method' is given twice"),
    "octal": (TOY + "model: {width: 0100}\n", "'0100' is octal or base 60 in YAML; write a dec"),
    "base 60": (TOY + "model: {width: 2:08}\n", "'2:08' is octal or base 60 in YAML"),
    "base 60 with a point": (TOY + "method: {beta: 1:30.5}\n", "'1:30.5' is octal or base 60"),
    # Names and characters.
    "name null": (TOY + "name: null\n", "name: expected str, got None"),
    "name a number": (TOY + "name: 2024\n", "name: expected str, got 2024"),
    "name a date": (TOY + "name: 2024-01-01\n", "name: expected str, got datetime.date(2024"),
    "name no": (TOY + "name: no\n", "name: expected str, got False"),
    "name bytes": (TOY + "name: !!binary Zm9v\n", "name: expected str, got b'foo'"),
    "half a pair": (TOY + 'description: "\\ud83d"\n', "half of a surrogate pair in '\\ud83d'"),
    "unknown key with a line break": (TOY + '"a\\nb": 1\n', "unknown key 'a\\nb'; expected one of"),
    "unknown key of a mile": (TOY + "? " + "k" * 5000 + "\n: 1\n", "unknown key 'kkkk"),
    "unknown key 7": (TOY + "7: 1\n", "unknown key 7; expected one of"),
    "unknown key null": (TOY + "null: 1\n", "unknown key None; expected one of"),
    "unknown key true": (TOY + "on: 1\n", "unknown key True; expected one of"),
    "domain with a slash": ("domains: {a/b: {datasets: [x]}}\n", "'a/b' cannot name a folder; use"),
    "domain upwards": ("domains: {..: {datasets: [x]}}\n", "'..' cannot name a folder"),
    "domain with a line break": ('domains: {"a\\nb": {}}\n', "'a\\nb' cannot name a folder"),
    "domain empty": ("domains: {'': {datasets: [x]}}\n", "'' cannot name a folder"),
    "domain 1": ("domains: {1: {datasets: [x]}}\n", "domains: 1 cannot name a folder"),
    "data set upwards": ("domains: {a: {datasets: [../../etc]}}\n", "'../../etc' cannot name a"),
    "data set absolute": ("domains: {a: {datasets: [/etc]}}\n", "'/etc' cannot name a folder"),
    "data set empty": ("domains: {a: {datasets: ['']}}\n", "a.datasets: '' cannot name a folder"),
    "data set twice": ("domains: {a: {datasets: [x, x]}}\n", "'x' is named twice; name each once"),
    # Sections that hold themselves, or a world.
    "holds itself": ("domains: &d {a: *d}\n", "domains.a: unknown key 'a'"),
    "list in itself": (TOY + "methods: &m [*m]\n", "methods: expected str, got [[[...]]]"),
    "merges itself": ("&a {<<: *a}\n" , "`domains` names no domain"),
    "sizes hold themselves": (
        "model: &m {name: *m}\nsizes: {cpu: {model: *m}, gpu: {}}\n" + TOY,
        "sizes: a section that holds itself; write it out",
    ),
    "a thousand million laughs": (
        "x0: &x0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
        + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9))
        + "methods: [*x8]\n" + TOY,
        "unknown key 'x0'; expected one of",
    ),
    "laughs in a list": (
        "description: &a [ha, ha]\nmethods: [&b [*a, *a, *a], [*b, *b, *b]]\n" + TOY,
        "description: expected str, got ['ha', 'ha']",
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
    with refused("methods: expected str, got ['ha', 'ha', 'ha', 'ha', ...]"):
        load_profile(profile_of(tmp_path, f"{TOY}methods: [{text}]\n"))


NO_PROFILES = {
    "long name": ("x" * 5000 + ".yaml", "no profile 'xxxx"),
    "NUL": ("a\x00b.yaml", "no profile 'a\\x00b.yaml'"),
    "line break": ("a\nb", "no profile 'a\\nb'"),
    "option": ("--help.yml", "no profile '--help.yml'"),
    "another ending": ("own.json", "no profile 'own.json'"),
    "folder": ("folder.yaml", "no profile 'folder.yaml'"),
    "with spaces": (" tiny", "no profile ' tiny'"),
    "in capitals": ("TINY", "no profile 'TINY'"),
    "code": ("$(touch ran)", "no profile '$(touch ran)'"),
}


@pytest.mark.parametrize(("name", "told"), NO_PROFILES.values(), ids=NO_PROFILES)
def test_what_names_no_profile_is_told(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "own.json").write_text("{}")
    names = "smollm2, tiny, tiny-ablations, tiny-full"
    with refused(told, f"expected one of {names}, or the path of a YAML file"):
        load_profile(name)
    assert not (tmp_path / "ran").exists()


# --- values --------------------------------------------------------------------------------------

ZEROS = [
    "model.width", "model.layers", "model.heads", "model.feed_forward", "model.context",
    "model.initializer_range", "method.beta", "method.warmup_rate_factor", "method.max_grad_norm",
    "compute.workers", "compute.generation_batch", "compute.forward_batch",
    "domains.toy.batch_size", "domains.toy.epochs", "domains.toy.max_new_tokens",
    "domains.toy.max_length", "domains.toy.sft.batch_size", "domains.toy.sft.learning_rate",
    "domains.toy.pretrain.epochs", "domains.toy.pairs.samples", "domains.toy.pairs.temperature",
    "domains.toy.pairs.per_question", "domains.toy.rewriter.epochs", "domains.toy.rates.dense",
    "domains.toy.rates.learning",
]  # fmt: skip
NEGATIVE = [
    "compute.threads", "search.candidates", "search.factor", "timing.pairs", "domains.toy.dev",
    "domains.toy.explain", "domains.toy.pairs.train", "domains.toy.sft.examples",
    "domains.toy.sft.error_scale", "method.weight_decay", "domains.toy.rates.forgetting",
]  # fmt: skip


@pytest.mark.parametrize("key", ZEROS)
def test_a_zero_that_means_nothing_is_told(tmp_path, key):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    with refused(f"{key}: got 0", ", expected more than zero"):
        load_profile(path, {key: 0})


@pytest.mark.parametrize("key", NEGATIVE)
def test_a_negative_number_is_told(tmp_path, key):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    with refused(f"{key}: got -2", ", expected zero or more"):
        load_profile(path, {key: -2})


VALUES = {
    "beta NaN in a text": ("method.beta", "NaN", "beta: expected a finite number, got nan"),
    "beta minus infinity": ("method.beta", float("-inf"), "beta: expected a finite number, got"),
    "beta of 400 digits": ("method.beta", HUGE, "beta: expected a finite number, got inf"),
    "beta too large": ("method.beta", "1e999", "beta: expected a finite number, got inf"),
    "beta in percent": ("method.beta", "10%", "beta: expected a number, got '10%'"),
    "beta with a comma": ("method.beta", "0,1", "beta: expected a number, got '0,1'"),
    "beta code": ("method.beta", "__import__('os')", "beta: expected a number, got"),
    "beta empty": ("method.beta", "", "beta: expected a number, got ''"),
    "beta null": ("method.beta", None, "beta: expected float, got None"),
    "beta section": ("method.beta", {"x": 1}, "beta: expected float, got {'x': 1}"),
    "width of 400 digits": ("model.width", HUGE, "width: got 1000000000"),
    "width past 32 bits": ("model.width", 2**31, "width: got 2147483648, expected at most"),
    "width NaN": ("model.width", float("nan"), "width: expected int, got nan"),
    "width with a point": ("model.width", 64.0, "width: expected int, got 64.0"),
    "width list": ("model.width", [64], "width: expected int, got [64]"),
    "width not of the heads": ("model.width", 100, "width: got 100, expected a multiple of 2 * h"),
    "heads too many": ("model.heads", 128, "expected a multiple of 2 * heads = 256"),
    "peers a number": ("timing.peers", 1, "peers: expected bool, got 1"),
    "peers a text": ("timing.peers", "yes", "peers: expected bool, got 'yes'"),
    "dtype number": ("model.dtype", 16, "dtype: expected str, got 16"),
    "dtype in capitals": ("model.dtype", "Float32", "expected one of float32, bfloat16, auto, got"),
    "decay of one": ("domains.toy.sft.beta2", 1.0, "sft.beta2: got 1.0, expected less than 1"),
    "decay of two": ("domains.toy.rewriter.beta2", 2, "rewriter.beta2: got 2.0, expected less"),
    "threshold": ("method.token_threshold", 1.5, "token_threshold: got 1.5, expected at most 1"),
    "warm-up in steps": ("method.learning_warmup", 100, "learning_warmup: got 100.0, expected at"),
    "forgetting warm-up": ("method.forgetting_warmup", 3, "forgetting_warmup: got 3.0, expected"),
    "share in percent": ("method.share", 10, "a share of 10.0 was given; expected 0 < share <= 1"),
    "share negative": ("method.key_share", -0.2, "method.key_share: got -0.2, expected zero or"),
    "shares with zero": ("method.shares", [0.1, 0], "a share of 0.0 was given; expected 0 < share"),
    "shares with NaN": ("method.shares", [0.1, "nan"], "shares: expected a finite number, got nan"),
    "shares with null": ("method.shares", [None], "shares: expected float, got None"),
    "shares nested": ("method.shares", [[0.1]], "shares: expected float, got [0.1]"),
    "rule": ("method.token_rule", "hard", "token_rule: expected one of threshold, soft, released"),
    "stability": ("stability", ["order"], "stability: expected some of orders, halves, est"),
    "stability twice": ("stability", ["halves", "halves"], "stability: 'halves' is named twice"),
    "method twice": ("methods", ["dpo", "sft", "dpo"], "methods: 'dpo' is named twice; name each"),
    "ablation twice": ("domains.toy.ablations", ["a", "a"], "domains.toy.ablations: 'a' is named"),
    "methods null": ("methods", None, "methods: expected a list, got None"),
    "methods a section": ("methods", {"dpo": 1}, "methods: expected a list, got {'dpo': 1}"),
    "kind in capitals": ("domains.toy.kind", "Choice", "kind: got 'Choice', expected miniature"),
    "kind null": ("domains.toy.kind", None, "kind: expected str, got None"),
    "datasets text": ("domains.toy.datasets", "chain", "datasets: expected a list, got 'chain'"),
    "datasets number": ("domains.toy.datasets", [3], "datasets: expected str, got 3"),
    "mix short": ("domains.toy.sft.mix", [1], "sft.mix: got [1.0], expected a share for each of"),
    "mix long": ("domains.toy.pretrain.mix", [0.5, 0.25, 0.25], "for each of the 2 data sets, 1"),
    "mix above one": ("domains.toy.sft.mix", [0.9, 0.9], "sft.mix: got [0.9, 0.9], expected a"),
    "mix in percent": ("domains.toy.sft.mix", [50, 50], "sft.mix: got [50.0, 50.0], expected"),
    "mix negative": ("domains.toy.sft.mix", [1.5, -0.5], "sft.mix: got -0.5, expected zero or"),
    "timing elsewhere": ("timing.domain", "moon", "timing.domain: got 'moon', expected one of toy"),
    "timing never": ("timing.repeats", 0, "repeats, warm_up and steps must be at least 1 each"),
    "no domains": ("domains", None, "domains: expected named sections, got None"),
    "domain null": ("domains.toy", None, "domains.toy: expected a section with keys, got None"),
    "section list": ("search", [3, 2.0], "search: expected a section with keys, got [3, 2.0]"),
    "size none": ("size", "", "profile: size is empty"),
    "description number": ("description", 5, "description: expected str, got 5"),
    "instructions of none": ("domains.toy.instructions", {"count": 8}, "instructions.datasets: em"),
    "judge without a kind": ("judge.model", "me/rm", "judge.model without judge.kind; name one of"),
    "judge of no kind": ("judge.kind", "gpt", "judge.kind: got 'gpt', expected one of reward_mode"),
    "pairs as a judge": ("judge.kind", "preferences", "judge.kind: got 'preferences', expected on"),
    "judge a text": ("judge", "reward_model", "judge: expected a section with keys, got 'reward"),
    "judge of nothing": ("judge.kind", "programs", "programs has nothing to judge; give a domain"),
    "judge without a model": ("judge.kind", "reward_model", "judge.model: reward_model needs one;"),
    "judges at once": ("judge.batch_size", 0, "judge.batch_size: got 0, expected more than zero"),
    # Keys.
    "empty key": ("", 1, "unknown key ''; expected one of"),
    "dot": (".", 1, "unknown key ''; expected one of"),
    "dot at the end": ("method.", 1, "method: unknown key ''; expected one of"),
    "dots inside": ("method..beta", 1, "method: unknown key ''; expected one of"),
    "capitals": ("Method.beta", 1, "unknown key 'Method'; expected one of"),
    "blank": ("method. beta", 1, "method: unknown key ' beta'; expected one of"),
    "dunder": ("__class__", "x", "unknown key '__class__'; expected one of"),
    "into a list": ("methods.0", "dpo", "methods: expected a list, got {'0': 'dpo'}"),
    "into a text": ("model.name.x", 1, "name: expected str, got {'x': 1}"),
    "sizes": ("sizes.cpu.method.beta", 1, "unknown key 'sizes'; expected one of"),
    "below a domain": ("domains.toy.x.y", 1, "domains.toy: unknown key 'x'; expected one of"),
    "domain of no folder": ("domains.a b.dev", 1, "domains: 'a b' cannot name a folder; use"),
}


@pytest.mark.parametrize(("key", "value", "told"), VALUES.values(), ids=VALUES)
def test_a_bad_value_is_told(tmp_path, key, value, told):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    given_ = copy.deepcopy(value)
    with refused(told):
        load_profile(path, {key: value})
    assert value == given_ or value != value


ASKED = {"datasets": ["alpaca_eval", "arena_hard"], "count": 8}
INSTRUCTED = {
    "unknown": ({"datasets": ["mt_bench"], "count": 8}, {}, "got 'mt_bench', expected some of alp"),
    "questions": ({"datasets": ["ecqa"], "count": 8}, {}, "got 'ecqa', expected some of alpaca_ev"),
    "none of each": (ASKED | {"count": 0}, {}, "instructions.count: got 0, expected at least one"),
    "one for two": (ASKED | {"count": 1}, {}, "count: got 1, expected at least one for each of th"),
    "negative": (ASKED | {"count": -1}, {}, "instructions.count: got -1, expected zero or more"),
    "no tokens": (ASKED | {"max_new_tokens": 0}, {}, "max_new_tokens: got 0, expected more than z"),
    "twice": ({"datasets": ["arena_hard"] * 2, "count": 8}, {}, "'arena_hard' is named twice; nam"),
    "judge key": (ASKED, {"name": "me/rm"}, "judge: unknown key 'name'; expected one of batch_siz"),
    "no model": (ASKED, {"kind": "reward_model"}, "judge.model: reward_model needs one; give a hu"),
    "blank model": (ASKED, {"kind": "reward_model", "model": " "}, "reward_model needs one; give"),
    "program's model": (ASKED, {"kind": "programs", "model": "x"}, "judge by models of their own"),
    "program's dtype": (ASKED, {"kind": "programs", "dtype": "auto"}, "judge.dtype: programs"),
    "dtype": (ASKED, {"kind": "reward_model", "model": "x", "dtype": "int8"}, "got 'int8'"),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "judge", "told"), INSTRUCTED.values(), ids=INSTRUCTED)
def test_instructions_and_judges_that_cannot_be_are_told(tmp_path, asked, judge, told):
    domain = {"kind": "preferences", "datasets": ["hh_helpful"], "instructions": asked}
    path = profile_of(tmp_path, yaml.safe_dump({"domains": {"toy": domain}, "judge": judge}))
    with refused(told):
        load_profile(path)


def test_instructions_of_two_domains_or_of_the_miniature_are_told(tmp_path):
    domain = {"kind": "preferences", "datasets": ["hh_helpful"], "instructions": ASKED}
    both = profile_of(tmp_path, yaml.safe_dump({"domains": {"a": domain, "b": domain}}))
    with refused("domains.b.instructions.datasets: alpaca_eval is also named by domains.a.instru"):
        load_profile(both)
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    with refused("domains.toy.instructions: the miniature has no words for them; leave them out"):
        load_profile(path, {"domains.toy.instructions": ASKED})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method.beta", 1], "overrides: expected a dict of keys and values, got ['method.beta'"),
        ("method.beta=1", "overrides: expected a dict of keys and values, got 'method.beta=1'"),
        (3, "overrides: expected a dict of keys and values, got 3"),
    ],
)
def test_overrides_of_another_form_are_told(tmp_path, overrides, told):
    with refused(told):
        load_profile(profile_of(tmp_path, TOY), overrides)


# --- any input -----------------------------------------------------------------------------------


@fuzzing
@given(st.binary(max_size=120))
def test_any_bytes_are_a_profile_or_refused(tmp_path, raw):
    read_or_refused(lambda: load_profile(profile_of(tmp_path, raw), device="cpu"))


yaml_like = st.text(st.sampled_from(list("ab01-:,.[]{}&*!|>'\"%@?#~<=\n\t \\")), max_size=40)


@fuzzing
@given(yaml_like | yaml_like.map(lambda text: f"{TOY}method: {text}\n"))
def test_any_text_of_yamls_characters_is_read_or_refused(tmp_path, text):
    read_or_refused(lambda: parse_yaml(text))
    read_or_refused(lambda: load_profile(profile_of(tmp_path, text), device="cpu"))


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


@fuzzing
@given(st.dictionaries(st.sampled_from(fields), values, max_size=3))
def test_any_value_is_taken_whole_or_refused(tmp_path, overrides):
    path = profile_of(tmp_path, yaml.safe_dump(SMALL))
    profile = read_or_refused(lambda: load_profile(path, overrides))
    if profile is not None:  # it can be hashed, stored and read again
        again = profile_of(tmp_path, yaml.safe_dump(profile.to_dict()), "again.yaml")
        assert load_profile(again).hash() == profile.hash()
