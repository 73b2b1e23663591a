"""Profiles: what a YAML file may say, and that everything else is refused in one line."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from allo_lib.errors import AlloError
from allo_lib.profiles import config, methods
from allo_lib.profiles.config import fingerprint
from allo_lib.profiles.profile_files import load_profile

SMALL = {
    "domains": {"miniature": {"kind": "miniature", "datasets": ["chains", "shops"]}},
    "method": {"beta": 0.2},
}


@pytest.fixture
def write(tmp_path):
    """A function that writes text, or a dict as YAML, and returns the path."""

    def write_file(content, name="small.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write_file


def test_values_are_read_and_the_rest_has_defaults(write):
    profile = load_profile(str(write(SMALL)))
    assert profile.name == "small" and profile.size == "cpu"
    assert profile.method.beta == 0.2 and profile.method.share == 0.1
    assert profile.domains["miniature"].datasets == ("chains", "shops")
    assert profile.model == config.Model()


def test_numbers_come_in_every_spelling_of_yaml(write):
    text = """
    domains:
      a: {datasets: [x], rates: {dense: 1e-4, top: 2, last: 3.5e-4, random: "0.5"}}
    method: {shares: [1, 0.5]}
    """
    profile = load_profile(write(text))
    rates = profile.domains["a"].rates
    assert (rates.dense, rates.top, rates.last, rates.random) == (1e-4, 2.0, 3.5e-4, 0.5)
    assert all(type(value) is float for value in (rates.dense, rates.top, rates.random))
    assert profile.method.shares == (1.0, 0.5) and type(profile.method.shares[0]) is float


def test_round_trip_through_yaml_and_json(write):
    profile = load_profile(write(SMALL))
    again = load_profile(write(profile.to_dict(), "again.yaml"))
    assert again == profile and again.hash() == profile.hash()
    assert json.loads(json.dumps(profile.to_dict())) == profile.to_dict()


def test_sizes_are_chosen_by_the_device_and_laid_over_the_rest(write):
    gpu = {"model": {"width": 256}, "domains": {"miniature": {"epochs": 3}}}
    path = write(SMALL | {"model": {"layers": 5}, "sizes": {"cpu": None, "gpu": gpu}})
    small, large = load_profile(path, device="cpu"), load_profile(path, device="cuda")
    assert (small.size, small.model.width, small.domains["miniature"].epochs) == ("cpu", 128, 1)
    assert (large.size, large.model.width, large.domains["miniature"].epochs) == ("gpu", 256, 3)
    assert large.model.layers == 5 and large.domains["miniature"].datasets == ("chains", "shops")
    assert large.hash() != small.hash()
    assert load_profile(path, {"model.width": 64}, device="cuda").model.width == 64


def test_the_device_is_looked_up_when_it_is_not_given(write, monkeypatch):
    import torch

    path = write(SMALL | {"sizes": {"cpu": {}, "gpu": {}}})
    for available, size in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert load_profile(path).size == size


def test_a_profile_that_extends_another_says_what_is_different(write):
    gpu = {"model": {"width": 256, "layers": 4}}
    write(SMALL | {"description": "base", "sizes": {"cpu": {"methods": ["sft"]}, "gpu": gpu}})
    own = {"domains": {"miniature": {"epochs": 3}}, "model": {"layers": 7}, "methods": ["dpo"]}
    profile = load_profile(write({"extends": "small.yaml"} | own, "own.yaml"), device="cuda")
    domain = profile.domains["miniature"]
    assert (domain.datasets, domain.epochs, profile.method.beta) == (("chains", "shops"), 3, 0.2)
    # What is its own goes before the sizes of the other.
    assert (profile.model.width, profile.model.layers, profile.methods) == (256, 7, ("dpo",))
    assert (profile.name, profile.description, profile.size) == ("own", "", "gpu")
    further = load_profile(write({"extends": "own.yaml", "models": 2}, "more.yaml"), device="cuda")
    assert further.models == 2 and further.to_dict() == profile.to_dict() | {
        "name": "more", "models": 2}  # fmt: skip
    tiny = load_profile(write({"extends": "tiny"}, "mine.yaml"))
    assert tiny.to_dict() == load_profile("tiny").to_dict() | {"name": "mine", "description": ""}


@pytest.mark.parametrize(
    "base", ["nothing", "own.yaml", "./own.yaml", 3, ["tiny"], "", "x" * 5000 + ".yaml"]
)
def test_what_cannot_be_extended_is_told(write, base):
    path = write(SMALL | {"extends": base}, "own.yaml")
    with pytest.raises(AlloError, match="own.yaml: extends: .*(expected one of|extends itself)"):
        load_profile(path)


def test_an_override_changes_one_of_two_places_that_yaml_reads_from_one(write):
    text = "domains: {a: {datasets: [x], rates: &r {top: 2}}, b: {datasets: [y], rates: *r}}"
    domains = load_profile(write(text), {"domains.b.rates.top": 1}).domains
    assert (domains["a"].rates.top, domains["b"].rates.top) == (2, 1)


def test_overrides_reach_into_sections(write):
    overrides = {"method.beta": 0.5, "domains.miniature.pairs.train": 7, "methods": ["dpo", "allo"]}
    profile = load_profile(write(SMALL), overrides)
    assert profile.method.beta == 0.5 and profile.methods == ("dpo", "allo")
    assert profile.domains["miniature"].pairs.train == 7
    assert profile.domains["miniature"].datasets == ("chains", "shops")


def test_the_hash_follows_every_value_and_nothing_else(write):
    def hash_of(overrides=None):
        return load_profile(write(SMALL), overrides).hash()

    assert hash_of() == hash_of() == hash_of({"method.beta": 0.2})
    changed = [{"method.beta": 0.3}, {"model.width": 64}, {"methods": ["dpo"]}]
    changed += [{"domains.miniature.sft.epochs": 9}, {"method.shares": [0.1]}]
    assert len({hash_of(), *map(hash_of, changed)}) == 1 + len(changed)
    assert len(hash_of()) == 64 and int(hash_of(), 16)
    # How many SFT models have to be there decides verdicts, and changes no result.
    assert load_profile(write(SMALL)).models == 1 and hash_of({"models": 8}) == hash_of()
    once = {"replicates.pair_sets": 1, "replicates.orders": 1}
    assert hash_of(once) == hash_of() != hash_of({"replicates.orders": 2})


def test_settings_that_came_later_count_in_the_hash_only_where_they_are_used(write):
    known = load_profile(write(SMALL))
    before = known.to_dict()
    del before["judge"], before["replicates"], before["model"]["architectures"], before["models"]
    del before["domains"]["miniature"]["instructions"], before["domains"]["miniature"]["tuned"]
    assert config.settings_hash(before) == known.hash() == fingerprint(
        before | {"compute": {k: v for k, v in before["compute"].items()
                              if k != "checkpoint_minutes"}}
    )  # fmt: skip
    asked = {"kind": "preferences", "instructions": {"datasets": ["arena_hard"], "count": 4}}
    path = write(SMALL | {"domains": {"toy": {"datasets": ["hh"]} | asked}})
    hashes = {load_profile(path, {f"domains.toy.instructions.{key}": value}).hash()
              for key, value in (("count", 4), ("count", 5), ("max_new_tokens", 9))}  # fmt: skip
    assert len(hashes) == 3 and known.hash() not in hashes
    judge = {"judge": {"kind": "reward_model", "model": "some/model"}}
    named = load_profile(path, judge)
    assert named.judge.model == "some/model" and named.hash() == load_profile(path).hash()


# Committed results and what users have in their stores are known by these.
HASHES = {
    "tiny": "32f99c84974ded8ff7af077e2762024a69c8b2361d2157c5d2c4cbb27124defa",
    "tiny-full": "3418074d41fdd132929029c83bb93cff4ecebfa58ed76feb8eee4b0c0a7e1a59",
    "architectures": "4ae6f7a46827524b75c134a2ae1253c7e162fe0d29f452abcfbebf000cff893a",
    "smollm2": "34525a69f86547c67c0bc9d9e44990139cc187768968d1b26a4b256ae4e8bfe7",
}


def test_profiles_keep_their_hashes():
    # A profile that is changed on purpose gets a new hash, and its results are made again.
    assert {name: load_profile(name, device="cpu").hash() for name in HASHES} == HASHES
    gpu = "8046cfe29267a3596f0756429c29d9ea654075e85da7505893fd63115927daeb"
    assert load_profile("smollm2", device="cuda").hash() == gpu


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
).filter(lambda value: "inf" not in repr(value))


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_fingerprints_ignore_the_order_of_keys(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))
    assert fingerprint(value) != fingerprint(value | {"another key": 1, "x": len(value)})


def test_fingerprint_refuses_nan():
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
