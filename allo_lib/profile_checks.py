"""What a profile may hold: names, types and ranges, checked before anything runs."""

import dataclasses
import math
import re
import reprlib
import types
import typing

from allo_lib.config import DOMAIN_KINDS, MODEL_DTYPES, STABILITY, TOKEN_RULES, Domain, Profile
from allo_lib.errors import AlloError

LARGEST = 2**31 - 1  # of any count

# Numbers that must be above zero wherever they stand, by their last name ...
_POSITIVE = {
    "width", "layers", "heads", "feed_forward", "context", "initializer_range", "epochs",
    "batch_size", "learning_rate", "samples", "per_question", "temperature", "dense", "top",
    "random", "last", "forgetting", "learning", "supervised", "max_new_tokens", "max_length",
    "beta", "warmup_rate_factor", "max_grad_norm", "workers", "generation_batch", "forward_batch",
}  # fmt: skip
# ... and those that must not exceed one, which a decay of moments may not even reach.
_AT_MOST_ONE = {"token_threshold", "forgetting_warmup", "learning_warmup"}
_BELOW_ONE = {"beta2"}
# Domains and data sets become names of folders and of rows of tables.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def build(kind, raw, where: str):
    """Fill dataclass `kind` from dict `raw`; AlloError for an unknown name or a wrong type."""
    if not isinstance(raw, dict):
        raise AlloError(f"{where}: expected a section with keys, got {short(raw)}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(short(key) for key in raw if key not in hints)
    if unknown:
        raise AlloError(
            f"{where}: unknown key {unknown[0]}; expected one of {', '.join(sorted(hints))}"
        )
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()}
    return kind(**values)


def _convert(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is dict:
        if not isinstance(value, dict):
            raise AlloError(f"{where}: expected named sections, got {short(value)}")
        for key in value:
            _check_name(key, where)
        kind = hint.__args__[1]
        return {key: _convert(kind, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is tuple:
        if not isinstance(value, (list, tuple)):
            raise AlloError(f"{where}: expected a list, got {short(value)}")
        return tuple(_convert(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, str):
        value = _number(value, where)  # YAML 1.1 reads 1e-4 (no dot) as text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise AlloError(f"{where}: expected {hint.__name__}, got {short(value)}")
    if hint is float and not math.isfinite(value):
        raise AlloError(f"{where}: expected a finite number, got {value!r}")
    if hint is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise AlloError(f"{where}: half of a surrogate pair in {short(value)}; expected text")
    return value


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AlloError(f"{where}: expected a number, got {short(text)}") from None


def _check_name(name, where: str) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise AlloError(f"{where}: {short(name)} cannot name a folder; use letters, digits, . _ -")


def short(value) -> str:
    """`repr`, cut: a list that repeats itself by YAML's aliases can be longer than the memory."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxlist, cut.maxdict, cut.maxstring, cut.maxlong = 2, 4, 4, 60, 40
    try:
        return cut.repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return "a number of thousands of digits"


def check(profile: Profile) -> None:
    """Raise AlloError, one line, for the first value that is out of range or unknown."""
    for key in ("name", "size"):
        if not getattr(profile, key):
            raise AlloError(f"profile: {key} is empty")
    if not profile.domains:
        raise AlloError(f"profile {profile.name}: `domains` names no domain; name at least one")
    if profile.model.dtype not in MODEL_DTYPES:
        raise AlloError(
            f"model.dtype: expected one of {', '.join(MODEL_DTYPES)}, got {profile.model.dtype!r}"
        )
    _check_numbers(dataclasses.asdict(profile), "")
    for share in (profile.method.share, profile.method.key_share, *profile.method.shares):
        if not 0 < share <= 1:
            raise AlloError(f"method: a share of {share} was given; expected 0 < share <= 1")
    timing = profile.timing
    if timing.domain and timing.domain not in profile.domains:
        raise AlloError(
            f"timing.domain: got {timing.domain!r}, expected one of {', '.join(profile.domains)}"
        )
    if min(timing.repeats, timing.warm_up, timing.steps) < 1:
        raise AlloError("timing: repeats, warm_up and steps must be at least 1 each")
    if min(profile.replicates.pair_sets, profile.replicates.orders) < 1:
        raise AlloError("replicates: pair_sets and orders must be at least 1 each")
    if profile.models < 1:
        raise AlloError(f"models: got {profile.models}, expected at least 1")
    _check_words(profile)
    for name, domain in profile.domains.items():
        _check_domain(name, domain)


def _check_words(profile: Profile) -> None:
    rule = profile.method.token_rule
    if rule not in TOKEN_RULES:
        raise AlloError(
            f"method.token_rule: expected one of {', '.join(TOKEN_RULES)}, got {short(rule)}"
        )
    for word in profile.stability:
        if word not in STABILITY:
            raise AlloError(
                f"stability: expected some of {', '.join(STABILITY)}, got {short(word)}"
            )
    for key in ("stability", "methods", "ablations"):
        _check_once(getattr(profile, key), key)
    width, heads = profile.model.width, profile.model.heads
    if profile.model.name == "micro" and width % (2 * heads):
        raise AlloError(f"model.width: got {width}, expected a multiple of 2 * heads = {2 * heads}")


def _check_domain(name: str, domain: Domain) -> None:
    if domain.kind not in DOMAIN_KINDS:
        raise AlloError(
            f"domains.{name}.kind: got {short(domain.kind)}, expected {', '.join(DOMAIN_KINDS)}"
        )
    if not domain.datasets:
        raise AlloError(f"domains.{name}.datasets: empty; name at least one data set")
    for dataset in domain.datasets:
        _check_name(dataset, f"domains.{name}.datasets")
    for key in ("datasets", "methods", "ablations"):
        _check_once(getattr(domain, key), f"domains.{name}.{key}")
    _check_once(domain.instructions.datasets, f"domains.{name}.instructions.datasets")
    for phase in ("pretrain", "sft"):
        _check_mix(getattr(domain, phase).mix, len(domain.datasets), f"domains.{name}.{phase}.mix")


def _check_once(words: tuple[str, ...], where: str) -> None:
    twice = [word for word in dict.fromkeys(words) if words.count(word) > 1]
    if twice:
        raise AlloError(f"{where}: {short(twice[0])} is named twice; name each once")


def _check_mix(mix: tuple[float, ...], datasets: int, where: str) -> None:
    if mix and (len(mix) != datasets or abs(sum(mix) - 1) > 1e-6):
        raise AlloError(
            f"{where}: got {short(list(mix))}, expected a share for each of the {datasets} data "
            "sets, 1 together"
        )


def _check_numbers(value, where: str) -> None:
    """Numbers of a profile are counts, rates or shares: none is negative, some not zero."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_numbers(item, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, where, where.rpartition(".")[2])


def _check_number(value, where: str, name: str) -> None:
    expected = None
    if value < 0:
        expected = "zero or more"
    elif value == 0 and name in _POSITIVE:
        expected = "more than zero"
    elif isinstance(value, int) and value > LARGEST:
        expected = f"at most {LARGEST}"
    elif value > 1 and name in _AT_MOST_ONE:
        expected = "at most 1"
    elif value >= 1 and name in _BELOW_ONE:
        expected = "less than 1"
    if expected:
        raise AlloError(f"{where}: got {short(value)}, expected {expected}")
