"""Profiles: what a YAML file may say, and that everything else is refused in one line."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused, refused, tree

from allo_lib.profiles import config, methods
from allo_lib.profiles.config import fingerprint
from allo_lib.profiles.profile_files import load_profile, parse_yaml

SMALL = {
    "domains": {"toy": {"kind": "miniature", "datasets": ["chain", "scan"]}},
    "method": {"beta": 0.2},
}
TOY = "domains: {toy: {datasets: [chain]}}\n"
fuzzing = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def write(tmp_path):
    """A function that writes text, bytes, or a dict as YAML, and returns the path."""

    def write_file(content, name="own.yaml"):
        path = tmp_path / name
        text = yaml.safe_dump(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    return write_file


# --- what a file may say -------------------------------------------------------------------------


def test_values_are_read_and_the_rest_has_defaults(write):
    profile = load_profile(write(SMALL))
    assert (profile.name, profile.size) == ("own", "cpu")
    assert (profile.method.beta, profile.method.share) == (0.2, 0.1)
    assert profile.domains["toy"].datasets == ("chain", "scan")
    assert profile.model == config.Model()
    again = load_profile(write(profile.to_dict(), "again.yaml"))
    assert again == profile and again.hash() == profile.hash()
    assert json.loads(json.dumps(profile.to_dict())) == profile.to_dict()


def test_numbers_come_in_every_spelling_of_yaml(write):
    rates = "rates: {dense: 1e-4, top: 2, last: 3.5e-4, random: '0.5'}"
    profile = load_profile(write(f"domains: {{a: {{datasets: [x], {rates}}}}}"))
    read = profile.domains["a"].rates
    numbers = (read.dense, read.top, read.last, read.random)
    assert numbers == (1e-4, 2.0, 3.5e-4, 0.5) and {type(n) for n in numbers} == {float}


def test_sizes_are_chosen_by_the_device_and_laid_over_the_rest(write, monkeypatch):
    import torch

    gpu = {"model": {"width": 256}, "domains": {"toy": {"epochs": 3}}}
    path = write(SMALL | {"model": {"layers": 5}, "sizes": {"cpu": None, "gpu": gpu}})
    small, large = load_profile(path, device="cpu"), load_profile(path, device="cuda")
    assert (small.size, small.model.width, small.domains["toy"].epochs) == ("cpu", 128, 1)
    assert (large.size, large.model.width, large.domains["toy"].epochs) == ("gpu", 256, 3)
    assert large.model.layers == 5 and large.domains["toy"].datasets == ("chain", "scan")
    assert large.hash() != small.hash()
    for available, profile in ((True, large), (False, small)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        assert load_profile(path) == profile


def test_a_profile_that_extends_another_says_what_is_different(write):
    gpu = {"model": {"width": 256, "layers": 4}}
    base = SMALL | {"description": "base", "sizes": {"cpu": {"methods": ["sft"]}, "gpu": gpu}}
    write(base, "base.yaml")
    own = {"domains": {"toy": {"epochs": 3}}, "model": {"layers": 7}, "methods": ["dpo"]}
    profile = load_profile(write({"extends": "base.yaml"} | own), device="cuda")
    domain = profile.domains["toy"]
    assert (domain.datasets, domain.epochs, profile.method.beta) == (("chain", "scan"), 3, 0.2)
    # What is its own goes before the sizes of the other.
    assert (profile.model.width, profile.model.layers, profile.methods) == (256, 7, ("dpo",))
    assert (profile.name, profile.description, profile.size) == ("own", "", "gpu")
    tiny = load_profile(write({"extends": "tiny"}, "mine.yaml"))
    assert tiny.to_dict() == load_profile("tiny").to_dict() | {"name": "mine", "description": ""}
    for base in ("nothing", "own.yaml", "./own.yaml", 3, ["tiny"]):
        path = write(SMALL | {"extends": base})
        with refused("extends itself" if "own" in str(base) else "no profile"):
            load_profile(path)


def test_overrides_reach_into_sections_and_into_no_other(write):
    text = "domains: {a: {datasets: [x], rates: &r {top: 2}}, b: {datasets: [y], rates: *r}}"
    overrides = {"domains.b.rates.top": 1, "method.beta": 0.5, "methods": ["dpo", "allo"]}
    profile = load_profile(write(text), overrides)
    assert (profile.domains["a"].rates.top, profile.domains["b"].rates.top) == (2, 1)
    assert profile.domains["b"].datasets == ("y",)
    assert profile.method.beta == 0.5 and profile.methods == ("dpo", "allo")


# --- hashes --------------------------------------------------------------------------------------

# Committed results and what users have in their stores are known by these.
HASHES = {
    "tiny": "d5015b55d9e9360412924a031166969dfa503e892ebf7ff46e0e2b04fdfbbdf7",
    "tiny-full": "4bfa6391d68656d71ce0062205336b51fb67274839db2560695393a287898115",
    "architectures": "60c951e8ab76e27286c1cd439d015165462559c8afdf7b12cb88fa31f6e0b4b4",
    "smollm2": "34525a69f86547c67c0bc9d9e44990139cc187768968d1b26a4b256ae4e8bfe7",
}


def test_profiles_keep_their_hashes():
    # A profile that is changed on purpose gets a new hash, and its results are made again.
    assert {name: load_profile(name, device="cpu").hash() for name in HASHES} == HASHES
    gpu = "a169519f15e88bebd4da9d544bc04b5e562938e4cb1ae12c53d9fcccaf741b03"
    assert load_profile("smollm2", device="cuda").hash() == gpu


def test_the_hash_follows_every_value_that_can_change_a_result(write):
    text = {"kind": "preferences", "datasets": ["hh"]}
    path = write({"domains": {"toy": text}})
    replies = {"datasets": ["arena_hard"], "count": 4}
    same = [{}, {"models": 8}, {"compute.checkpoint_minutes": 1}, {"domains.toy.models": 1}]
    same += [{"first_seed": 8}]
    different = [{"method.beta": 0.3}, {"model.width": 64}, {"methods": ["dpo"]}]
    different += [{"domains.toy.sft.epochs": 9}, {"method.shares": [0.1]}]
    different += [{"replicates.orders": 2}, {"model.architectures": ["gpt2"]}]
    different += [{"domains.toy.tuned": {"dpo": [1e-4]}}, {"domains.toy.instructions": replies}]
    different += [{"domains.toy.instructions": replies | {"max_new_tokens": 9}}]
    different += [{"domains.toy.one_model": ["rft"]}, {"search.per_run": True}]
    assert len({load_profile(path, changes).hash() for changes in same}) == 1
    assert len({load_profile(path, changes).hash() for changes in [{}, *different]}) == 13
    # A judge reads replies; it changes none.
    judge = {"judge.kind": "reward_model", "judge.model": "some/model"}
    judged = load_profile(path, {"domains.toy.instructions": replies} | judge)
    assert judged.judge.model == "some/model"
    assert judged.hash() == load_profile(path, {"domains.toy.instructions": replies}).hash()


def test_fingerprints_ignore_the_order_of_keys_and_refuse_nan():
    value = {"b": [1, {"d": 0.5, "c": None}], "a": "text"}
    again = {"a": "text", "b": [1, {"c": None, "d": 0.5}]}
    assert fingerprint(value) == fingerprint(again) != fingerprint(value | {"a": "texts"})
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llama2-7b", "meta-llama/Llama-2-7b-hf"), ("mistral-7b", "mistralai/Mistral-7B-v0.1")],
)
def test_the_7b_profiles_hold_the_published_settings(name, weights):
    profile, other = (load_profile(name, device=device) for device in ("cpu", "cuda"))
    assert other.to_dict() == profile.to_dict() | {"size": "gpu"} and profile.name == name
    assert profile.model.name == weights and name.split("-")[0][:5].title() in profile.description
    method = profile.method
    assert (method.beta, method.share, method.key_share) == (0.1, 0.1, 0.1)
    assert (method.forgetting_warmup, method.learning_warmup) == (0.03, 0.1)
    assert profile.model.dtype == "bfloat16" and profile.search.candidates == 1
    for domain in profile.domains.values():
        rates = domain.rates
        assert (rates.forgetting, rates.learning) == (5e-7, 5e-6)
        assert rates.dense * method.warmup_rate_factor == pytest.approx(1e-6)
        assert (domain.batch_size, domain.epochs, domain.max_length) == (128, 1, 1200)
        for method_name in domain.methods:
            methods.stages_of(method_name, profile)


# --- what is refused -----------------------------------------------------------------------------

TEXTS = {
    # Tags construct nothing.
    "call": (TOY + "name: !!python/object/apply:os.system ['touch ran']", "constructor for"),
    # No YAML, or no profile.
    "Latin-1": (TOY.encode() + "description: é\n".encode("latin-1"), "'utf-8' codec can't decode"),
    "very deep": ("[" * 5000, "it is nested too deeply; expected a few levels"),
    "list of profiles": ("- name: x\n", "own.yaml holds a list: expected keys with values"),
    # Values of which Python says what yaml lets through.
    "no such day": (TOY + "description: 2020-13-45\n", "month must be in 1..12"),
    "thousands of digits": (TOY + "model: {width: " + "9" * 5000 + "}\n", "Exceeds the limit"),
    # What YAML would quietly read in another way.
    "key twice": (TOY + "method: {beta: 0.1, beta: 0.2}\n", "the key 'beta' is given twice; give"),
    "octal": (TOY + "model: {width: 0100}\n", "'0100' is octal or base 60 in YAML; write a dec"),
    "base 60": (TOY + "model: {width: 2:08}\n", "'2:08' is octal or base 60 in YAML"),
    # Names and characters.
    "half a pair": (TOY + 'description: "\\ud83d"\n', "half of a surrogate pair in '\\ud83d'"),
    "key with a line break": (TOY + '"a\\nb": 1\n', "unknown key 'a\\nb'; expected one of abl"),
    "domain upwards": ("domains: {..: {datasets: [x]}}\n", "'..' cannot name a folder; use"),
    "domain 1": ("domains: {1: {datasets: [x]}}\n", "domains.1: got 1, expected a valid string"),
    "replies": ("domains: {instructions: {datasets: [x]}}\n", "'instructions' names replies in"),
    "data set upwards": ("domains: {a: {datasets: [../../etc]}}\n", "'../../etc' cannot name a"),
    "data set twice": ("domains: {a: {datasets: [x, x]}}\n", "'x' is named twice; name each once"),
    "list in itself": (TOY + "methods: &m [*m]\n", "methods.0: got [[[...]]], expected a valid"),
    # Sizes.
    "one size": (TOY + "sizes: {cpu: {}}\n", "`sizes` needs exactly the keys cpu, gpu"),
    "size 3": (TOY + "sizes: {cpu: 3, gpu: {}}\n", "sizes.cpu: expected keys, got 3"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), TEXTS.values(), ids=TEXTS)
def test_a_bad_text_is_refused(write, tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    path = write(text)
    before = tree(tmp_path)
    with refused("own.yaml", problem):
        load_profile(path, device="cpu")
    assert tree(tmp_path) == before  # nothing named `ran`


@pytest.mark.parametrize("name", ["nope", "none.yaml", "", ".", "TINY", "a\x00b.yaml", "own.json",
                                  "folder.yaml", "x" * 5000 + ".yaml"])  # fmt: skip
def test_what_names_no_profile_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "own.json").write_text("{}")
    with refused("no profile", "expected one of architectures, ", "tiny-full, or the path"):
        load_profile(name)


REPLIES = {"datasets": ["alpaca_eval", "arena_hard"], "count": 8}
TEXT_DOMAIN = {"kind": "preferences", "datasets": ["hh_helpful"], "instructions": REPLIES}
VALUES = [
    # A kind of value each, and what each kind does not take.
    ("model.width", 0, "model.width: got 0, expected greater than or"),
    ("model.width", 10**400, "model.width: got 1000000000"),
    ("method.weight_decay", float("nan"), "weight_decay: got nan, expected a finite"),
    ("method.beta", True, "method.beta: got True, expected a number"),
    ("method.beta.x", 1, "method.beta: got {'x': 1}, expected a valid number"),
    ("method.share", 10, "share: got 10, expected less than or equal to 1"),
    ("methods", "dpo", "methods: got 'dpo', expected a valid list"),
    ("methods", ["dpo", "sft", "dpo"], "methods: 'dpo' is named twice; name each"),
    ("size", "tpu", "size: got 'tpu', expected 'cpu' or 'gpu'"),
    ("name", "", "name: '' cannot name a folder"),
    ("domains.toy", None, "domains.toy: got None, expected a section with keys"),
    ("search", [3, 2.0], "search: got [3, 2.0], expected a section with keys"),
    ("search.candidates", 0, "search.candidates: got 0, expected greater than or equal to 1"),
    ("search.factor", 1, "search.factor: got 1, expected greater than 1"),
    # Values that do not fit together.
    (
        "domains.a",
        TEXT_DOMAIN | {"datasets": ["scan"]},
        "scan is in two; name each data set in one",
    ),
    ("domains.toy.sft.mix", [1], "sft.mix: got [1.0], expected a share for each of"),
    ("domains.toy.datasets", [], "domains.toy: datasets: empty; name at least"),
    ("timing.domain", "moon", "timing.domain: got 'moon', expected one of toy"),
    ("judge.model", "me/rm", "judge: model: the kind reward_model needs one, and no other"),
    ("judge.kind", "reward_model", "judge: model: the kind reward_model needs one"),
    ("judge.kind", "programs", "judge.kind: nothing to judge; give a domain"),
    ("domains.toy.instructions", REPLIES, "the miniature has no words for them"),
    ("domains.a", TEXT_DOMAIN | {"instructions": REPLIES | {"datasets": ["ecqa"]}}, "got 'ecqa'"),
    ("domains.a", TEXT_DOMAIN | {"instructions": REPLIES | {"count": 1}}, "at least one for each"),
    ("domains.a", TEXT_DOMAIN | {"instructions": {"count": 8}}, "count: got 8, expected at least"),
    ("domains", {"a": TEXT_DOMAIN, "b": TEXT_DOMAIN}, "is in two; name each data set in one"),
    # Keys.
    ("method.bta", 1, "method: unknown key 'bta'; expected one of beta, forgetting_w"),
    ("Method.beta", 1, "own.yaml: unknown key 'Method'; expected one of abl"),
    ("method.", 1, "method: unknown key ''; expected one of"),
    ("domains.a b.dev", 1, "'a b' cannot name a folder; use letters, dig"),
]


def test_the_size_is_the_devices_where_a_profile_has_sizes(write):
    assert load_profile(write(SMALL), {"size": "gpu"}).size == "gpu"
    with refused("smollm2.yaml: size: the device chooses among its `sizes`"):
        load_profile("smollm2", {"size": "cpu"}, device="cuda")


@pytest.mark.parametrize(("key", "value", "problem"), VALUES, ids=range(len(VALUES)))
def test_a_bad_value_is_refused(write, key, value, problem):
    path = write(SMALL)
    with refused("own.yaml: ", problem):
        load_profile(path, {key: value})


def test_overrides_that_are_no_dict_are_refused(write):
    with refused("overrides: expected a dict of keys and values, got 'method.beta=1'"):
        load_profile(write(SMALL), "method.beta=1")


yaml_like = st.text(st.sampled_from(list("ab01-:,.[]{}&*!|>'\"%@?#~<=\n\t \\")), max_size=40)


@fuzzing
@given(yaml_like | yaml_like.map(lambda text: f"{TOY}method: {text}\n") | st.text(max_size=60))
def test_any_text_is_a_profile_or_refused(write, text):
    read_or_refused(lambda: parse_yaml(text))
    read_or_refused(lambda: load_profile(write(text), device="cpu"))
