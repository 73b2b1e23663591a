"""One configuration object per profile: plain dataclasses, filled from a YAML file.

Every key, with its unit and its source, is described beside its field here; the YAML files in
`allo_lib/profiles/` hold the values. `load_profile` checks names and types before anything runs.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from allo_lib.errors import AlloError

PROFILES = Path(__file__).parent / "profiles"
SIZES = ("cpu", "gpu")
MODEL_DTYPES = ("float32", "bfloat16", "auto")
DOMAIN_KINDS = ("miniature", "choice", "preferences")
TOKEN_RULES = ("threshold", "soft", "released")  # of token_rewards, which would import torch
STABILITY = ("orders", "halves", "estimators", "magnitude")
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
_MISREAD = re.compile(r"[+-]?0[0-7_]+|.*:.*")  # octal and base 60 in YAML 1.1: 010 is 8, 1:30 is 90


@dataclass(frozen=True)
class Model:
    """Which weights the study starts from."""

    name: str = "micro"  # "micro" (trained here), "smollm2-135m-instruct", a hub id, or a folder
    # Of the weights: "float32", "bfloat16", or "auto" for bfloat16 on devices with units for it
    # (`models.dtype_on`). Masters are always float32.
    dtype: str = "float32"
    width: int = 128  # hidden size (micro only, as are the next five)
    layers: int = 3
    heads: int = 4
    feed_forward: int = 384
    context: int = 256  # tokens; longest row the model is asked to read
    initializer_range: float = 0.05  # standard deviation of the initial weights


@dataclass(frozen=True)
class Supervised:
    """One supervised phase; cross-entropy on the tokens of the solution only."""

    examples: int = 0  # distinct questions; 0 leaves the phase out
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    beta2: float = 0.999  # AdamW's decay of second moments
    error_scale: float = 0.0  # miniature only: odds of each habitual error, times this
    plain_wording: bool = False  # miniature only: one word for every meaning, no manner
    mix: tuple[float, ...] = ()  # share of each data set of the domain; () is equal shares


@dataclass(frozen=True)
class Pairs:
    """How preference pairs come about: sampled and verified, or given by people."""

    questions: int = 0  # questions that responses are sampled to (kinds with a verifier)
    samples: int = 4  # responses per question, temperature sampling
    temperature: float = 1.0
    per_question: int = 1  # (right, wrong) pairs per question at most; paper: 5
    mask: int = 0  # pairs that only the importance scores and the reward model see
    train: int = 0  # pairs that the compared methods are trained on, disjoint from `mask`
    heldout: int = 0  # pairs for reward accuracy, never trained on
    dev: int = 0  # preference domains: pairs for the learning-rate search


@dataclass(frozen=True)
class Rewriter:
    """Training of the rewriting reward model (RLMEC, arXiv 2401.06081), on the `mask` pairs."""

    examples: int = 0  # (question, solution, wrong prediction) -> corrected prediction
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    beta2: float = 0.999


@dataclass(frozen=True)
class Rates:
    """Where each method's learning-rate search begins (per step of AdamW)."""

    dense: float = 1e-4  # methods that train every entry
    top: float = 3e-4  # ... the top-scored share; a sparser update needs a larger rate
    random: float = 1e-3
    last: float = 1e-3
    forgetting: float = 3e-4
    learning: float = 3e-4
    supervised: float = 1e-4  # SFT and RFT continued from the SFT model


@dataclass(frozen=True)
class Domain:
    """One training domain: its questions, its SFT model, its pairs and its rates."""

    kind: str = "miniature"  # "miniature", "choice" (gold option) or "preferences" (human pairs)
    datasets: tuple[str, ...] = ()  # folder names of the data, or families of the miniature
    pretrain: Supervised = field(default_factory=Supervised)  # miniature: nearly right solutions
    sft: Supervised = field(default_factory=Supervised)
    pairs: Pairs = field(default_factory=Pairs)
    rewriter: Rewriter = field(default_factory=Rewriter)
    rates: Rates = field(default_factory=Rates)
    dev: int = 0  # problems for choosing learning rates (all data sets together)
    test: int = 0  # problems for the reported accuracy (all data sets together)
    explain: int = 0  # choice: statements of the human explanation that come before the answer
    max_new_tokens: int = 48  # longest response; one that has not ended by then has no answer
    max_length: int = 256  # tokens of prompt and response; longer rows are an error or left out
    batch_size: int = 16  # pairs per optimizer step; official code: 128
    epochs: int = 1  # of each ALLO stage; controls get the sum over both stages; paper: 1
    methods: tuple[str, ...] = ()  # rows of this domain in place of the profile's methods ...
    ablations: tuple[str, ...] = ()  # ... and ablations, where a domain cannot afford them all


@dataclass(frozen=True)
class Method:
    """Constants of the method that every domain shares."""

    beta: float = 0.1  # of DPO and NPO; official code
    share: float = 0.1  # of all neurons that are kept; paper: 10%
    warmup_rate_factor: float = 0.1  # importance warm-up's rate over `rates.dense`: small as theirs
    key_share: float = 0.2  # epsilon: share of a rejected response's tokens that are key tokens
    token_rule: str = "threshold"  # "threshold" | "soft" | "released", see token_rewards
    token_threshold: float = 0.5
    forgetting_warmup: float = 0.03  # share of steps with rising rate; official code
    learning_warmup: float = 0.1  # likewise
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # over the kept entries
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)  # the share sweep of 05_ablations


@dataclass(frozen=True)
class Search:
    """The learning-rate search that every method gets, always on the development split."""

    candidates: int = 5  # trained models per method and domain
    factor: float = 2.0  # ratio of neighbouring rates


@dataclass(frozen=True)
class Compute:
    """Batches, threads and repeats: they change cost, and results only by rounding."""

    threads: int = 0  # of torch for what methods share; 0 leaves torch's choice
    method_threads: int = 0  # ... and for training and measuring a method; 0 is the same as above
    workers: int = 1  # processes that train methods side by side

    generation_batch: int = 256  # rows decoded together
    forward_batch: int = 64  # rows of a forward pass without gradients
    # Of training, between two checkpoints that a stopped run goes on from; 0 makes none.
    checkpoint_minutes: float = 5.0


@dataclass(frozen=True)
class Timing:
    """The DPO steps that 07_efficiency measures."""

    domain: str = ""  # whose pairs; "" is the profile's first
    pairs: int = 0  # in one step; 0 is the domain's batch size
    # Tokens of a prompt, and of both responses together, of the pairs that are taken: those of the
    # domain that come nearest. 0 takes the domain's training pairs as they come.
    prompt: int = 0
    responses: int = 0
    repeats: int = 5  # processes of each variant, in turn
    warm_up: int = 2  # steps of each before its clock starts
    steps: int = 3  # ... and those it times
    peers: bool = False  # also TRL's and PEFT's ways, as far as they are installed


@dataclass(frozen=True)
class Profile:
    """Everything a run depends on besides the seed, the data and the code."""

    name: str
    size: str = "cpu"
    description: str = ""
    model: Model = field(default_factory=Model)
    domains: dict[str, Domain] = field(default_factory=dict)
    method: Method = field(default_factory=Method)
    search: Search = field(default_factory=Search)
    compute: Compute = field(default_factory=Compute)
    timing: Timing = field(default_factory=Timing)
    # Which mask overlaps 01_importance measures: of "orders", "halves", "estimators", "magnitude".
    stability: tuple[str, ...] = STABILITY
    # Methods of the main table and rows of the ablation, by their names in measurements.csv.
    methods: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """The profile as plain lists, dicts and scalars, ready for JSON or YAML."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def hash(self) -> str:
        """SHA-256 (hex) of every value that can change a result."""
        return settings_hash(self.to_dict())


def settings_hash(settings: dict) -> str:
    """Profile.hash of `Profile.to_dict`: all of it but what cannot change a result."""
    compute = dict(settings.get("compute", {}))
    compute.pop("checkpoint_minutes", None)
    return fingerprint(settings | {"compute": compute})


def fingerprint(value) -> str:
    """SHA-256 (hex) of `value` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_profile(name: str, overrides: dict | None = None, device: str | None = None) -> Profile:
    """Read a profile by name or path of a YAML file, apply `overrides`, check every value.

    `overrides` maps keys to values; a dotted key reaches into a section
    (`{"domains.miniature.epochs": 2}`). A profile with sizes has a section `sizes` whose entry for
    the device ("cpu", or "gpu" for any accelerator) is laid over the rest. `device` None means an
    accelerator when torch sees one and the profile has sizes, else the CPU.

    Raises:
        AlloError: unknown profile, unreadable YAML, unknown key, wrong type, or a value out of
            range.
    """
    path = _profile_path(name)
    raw = _read_yaml(path)
    sizes = raw.pop("sizes", None)
    if sizes is not None:
        size = _size(device)
        if not isinstance(sizes, dict) or set(sizes) != set(SIZES):
            raise AlloError(f"{path.name}: `sizes` needs exactly the keys {', '.join(SIZES)}")
        if not isinstance(sizes[size] or {}, dict):
            given = _short(sizes[size])
            raise AlloError(f"{path.name}: sizes.{size}: expected a section, got {given}")
        raw = _laid_over(raw, sizes[size] or {}, path)
        raw["size"] = size
    raw.setdefault("name", path.stem)
    if not isinstance(overrides or {}, dict):
        raise AlloError(f"overrides: expected a dict of keys and values, got {_short(overrides)}")
    for key, value in (overrides or {}).items():
        _set_dotted(raw, key, value)
    profile = _build(Profile, raw, where=path.name)
    _check(profile)
    return profile


def _profile_path(name: str) -> Path:
    known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if str(name) in known:
        return PROFILES / f"{name}.yaml"
    path = Path(str(name))
    with contextlib.suppress(OSError):  # a name too long for the file system
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    raise AlloError(
        f"no profile {_short(str(name))}: expected one of {', '.join(known)}, or the path of a "
        "YAML file"
    )


class _Loader(yaml.SafeLoader):
    """Plain values of YAML, no objects; what it would quietly misread is an error.

    That is a key given twice, of which YAML keeps the last, and octal and base-60 numbers.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {_short(key.value)} is given twice; give it once",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _decimal(loader: _Loader, node):
    kind = node.tag.rpartition(":")[2]
    if _MISREAD.fullmatch(str(node.value)):
        raise yaml.MarkedYAMLError(
            problem=f"{_short(node.value)} is octal or base 60 in YAML; write a decimal number, or "
            "a text in quotes",
            problem_mark=node.start_mark,
        )
    return getattr(loader, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def parse_yaml(text: str):
    """The value of a YAML text: plain scalars, lists and dicts; nothing is ever constructed or run.

    Raises:
        AlloError: for everything else, in one line: where it is and what is wrong with it.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise AlloError("it is nested too deeply; expected a few levels") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # yaml lets through what Python says of a date without such a day or of a tag on a wrong
        # value.
        reason = " ".join(_reason(error).split())
        raise AlloError(reason if len(reason) <= 300 else f"{reason[:297]}...") from error


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    context = f"{error.context}: " if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"


def _read_yaml(path: Path) -> dict:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (AlloError, UnicodeDecodeError, OSError) as error:
        raise AlloError(f"{path.name} is not readable YAML ({error}): mend the file") from error
    if not isinstance(raw, dict):
        raise AlloError(f"{path.name} holds a {type(raw).__name__}: expected keys with values")
    return raw


def _size(device: str | None) -> str:
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "gpu"


def _laid_over(raw: dict, top: dict, path: Path) -> dict:
    try:
        return _overlay(raw, top)
    except RecursionError:
        raise AlloError(f"{path.name}: sizes: a section that holds itself; write it out") from None


def _overlay(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _set_dotted(raw: dict, key: str, value) -> None:
    *sections, last = str(key).split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise AlloError(f"override {key!r}: {section!r} is a value, not a section")
    raw[last] = value


def _build(kind, raw, where: str):
    """Fill dataclass `kind` from dict `raw`, checking names and types all the way down."""
    if not isinstance(raw, dict):
        raise AlloError(f"{where}: expected a section with keys, got {_short(raw)}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(_short(key) for key in raw if key not in hints)
    if unknown:
        raise AlloError(
            f"{where}: unknown key {unknown[0]}; expected one of {', '.join(sorted(hints))}"
        )
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()}
    return kind(**values)


def _convert(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is dict:
        if not isinstance(value, dict):
            raise AlloError(f"{where}: expected named sections, got {_short(value)}")
        for key in value:
            _check_name(key, where)
        kind = hint.__args__[1]
        return {key: _convert(kind, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, types.GenericAlias) and hint.__origin__ is tuple:
        if not isinstance(value, (list, tuple)):
            raise AlloError(f"{where}: expected a list, got {_short(value)}")
        return tuple(_convert(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, str):
        value = _number(value, where)  # YAML 1.1 reads 1e-4 (no dot) as text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise AlloError(f"{where}: expected {hint.__name__}, got {_short(value)}")
    if hint is float and not math.isfinite(value):
        raise AlloError(f"{where}: expected a finite number, got {value!r}")
    if hint is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise AlloError(f"{where}: half of a surrogate pair in {_short(value)}; expected text")
    return value


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AlloError(f"{where}: expected a number, got {_short(text)}") from None


def _check_name(name, where: str) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise AlloError(f"{where}: {_short(name)} cannot name a folder; use letters, digits, . _ -")


def _short(value) -> str:
    """`repr`, cut: a list that repeats itself by YAML's aliases can be longer than the memory."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxlist, cut.maxdict, cut.maxstring, cut.maxlong = 2, 4, 4, 60, 40
    try:
        return cut.repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return "a number of thousands of digits"


def _check(profile: Profile) -> None:
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
    _check_words(profile)
    for name, domain in profile.domains.items():
        _check_domain(name, domain)


def _check_words(profile: Profile) -> None:
    rule = profile.method.token_rule
    if rule not in TOKEN_RULES:
        raise AlloError(
            f"method.token_rule: expected one of {', '.join(TOKEN_RULES)}, got {_short(rule)}"
        )
    for word in profile.stability:
        if word not in STABILITY:
            raise AlloError(
                f"stability: expected some of {', '.join(STABILITY)}, got {_short(word)}"
            )
    for key in ("stability", "methods", "ablations"):
        _check_once(getattr(profile, key), key)
    width, heads = profile.model.width, profile.model.heads
    if profile.model.name == "micro" and width % (2 * heads):
        raise AlloError(f"model.width: got {width}, expected a multiple of 2 * heads = {2 * heads}")


def _check_domain(name: str, domain: Domain) -> None:
    if domain.kind not in DOMAIN_KINDS:
        raise AlloError(
            f"domains.{name}.kind: got {_short(domain.kind)}, expected {', '.join(DOMAIN_KINDS)}"
        )
    if not domain.datasets:
        raise AlloError(f"domains.{name}.datasets: empty; name at least one data set")
    for dataset in domain.datasets:
        _check_name(dataset, f"domains.{name}.datasets")
    for key in ("datasets", "methods", "ablations"):
        _check_once(getattr(domain, key), f"domains.{name}.{key}")
    for phase in ("pretrain", "sft"):
        _check_mix(getattr(domain, phase).mix, len(domain.datasets), f"domains.{name}.{phase}.mix")


def _check_once(words: tuple[str, ...], where: str) -> None:
    twice = [word for word in dict.fromkeys(words) if words.count(word) > 1]
    if twice:
        raise AlloError(f"{where}: {_short(twice[0])} is named twice; name each once")


def _check_mix(mix: tuple[float, ...], datasets: int, where: str) -> None:
    if mix and (len(mix) != datasets or abs(sum(mix) - 1) > 1e-6):
        raise AlloError(
            f"{where}: got {_short(list(mix))}, expected a share for each of the {datasets} data "
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
        raise AlloError(f"{where}: got {_short(value)}, expected {expected}")
