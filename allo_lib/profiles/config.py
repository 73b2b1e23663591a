"""One configuration object per profile, checked by pydantic.

Every key, with its unit and its source, is described beside its field here; the YAML files in
`allo_lib/profiles/` hold the values, and `profile_files` reads them.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import field
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from allo_lib.errors import AlloError, short

# --- kinds of values -----------------------------------------------------------------------------

STRICT = pydantic.ConfigDict(extra="forbid")


def _number(value):
    if isinstance(value, bool):
        raise ValueError(f"got {value}, expected a number")
    return value


def _text(value: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"half of a surrogate pair in {short(value)}; expected text")
    return value


def _name(value: str) -> str:
    # Profiles, domains and data sets become names of folders and of rows of tables.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(f"{short(value)} cannot name a folder; use letters, digits, . _ -")
    return value


def _distinct(words: tuple) -> tuple:
    if twice := [word for word in words if words.count(word) > 1]:
        raise ValueError(f"{short(twice[0])} is named twice; name each once")
    return words


Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
# Not strict: YAML 1.1 reads 1e-4, which has no dot, as text.
Finite = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Number = Annotated[Finite, Field(ge=0)]
Rate = Annotated[Finite, Field(gt=0)]
Share = Annotated[Finite, Field(gt=0, le=1)]
Fraction = Annotated[Finite, Field(ge=0, le=1)]
AboveOne = Annotated[Finite, Field(gt=1)]
BelowOne = Annotated[Finite, Field(ge=0, lt=1)]
Text = Annotated[str, Field(strict=True), AfterValidator(_text)]
Name = Annotated[Text, AfterValidator(_name)]
Flag = Annotated[bool, Field(strict=True)]
Words = Annotated[tuple[Text, ...], AfterValidator(_distinct)]
Names = Annotated[tuple[Name, ...], AfterValidator(_distinct)]

# --- the keys ------------------------------------------------------------------------------------

INSTRUCTIONS = ("alpaca_eval", "arena_hard")  # data sets that replies are written to
Overlap = Literal["orders", "halves", "estimators", "magnitude"]


@dataclass(frozen=True, config=STRICT)
class Model:
    """Which weights the study starts from."""

    name: Text = "micro"  # "micro" (trained here), "smollm2-135m-instruct", a hub id, or a folder
    # Micro only, of `models.MICRO`: the seeds take them in turn.
    architectures: tuple[Text, ...] = ("llama",)
    # Of the weights (masters are always float32); "auto": bfloat16 on devices with units for it.
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    # Hidden size, a multiple of 2 * heads (micro only, as are the next five).
    width: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    feed_forward: Positive = 384
    context: Positive = 256  # tokens; longest row the model is asked to read
    initializer_range: Rate = 0.05  # standard deviation of the initial weights


@dataclass(frozen=True, config=STRICT)
class Phase:
    """One phase of training by cross-entropy on the tokens of the solution alone."""

    examples: Count = 0  # distinct questions; 0 leaves a supervised phase out
    epochs: Positive = 1
    batch_size: Positive = 32
    learning_rate: Rate = 1e-3
    beta2: BelowOne = 0.999  # AdamW's decay of second moments


@dataclass(frozen=True, config=STRICT)
class Supervised(Phase):
    """A supervised phase, and what its examples are like."""

    error_scale: Number = 0.0  # miniature only: odds of each habitual error, times this
    plain_wording: Flag = False  # miniature only: one word for every meaning, no manner
    mix: tuple[Number, ...] = ()  # share of each data set of the domain; () is equal shares


@dataclass(frozen=True, config=STRICT)
class Pairs:
    """How preference pairs come about: sampled and verified, or given by people."""

    questions: Count = 0  # questions that responses are sampled to (kinds with a verifier)
    samples: Positive = 4  # responses per question, temperature sampling
    temperature: Rate = 1.0
    per_question: Positive = 1  # (right, wrong) pairs per question at most; paper: 5
    mask: Count = 0  # pairs that only the importance scores and the reward model see
    train: Count = 0  # pairs that the compared methods are trained on, disjoint from `mask`
    heldout: Count = 0  # pairs for reward accuracy, never trained on
    dev: Count = 0  # preference domains: pairs for the learning-rate search


@dataclass(frozen=True, config=STRICT)
class Rates:
    """Where each method's learning-rate search begins (per step of AdamW)."""

    dense: Rate = 1e-4  # methods that train every entry
    top: Rate = 3e-4  # ... the top-scored share; a sparser update needs a larger rate
    random: Rate = 1e-3
    last: Rate = 1e-3
    forgetting: Rate = 3e-4
    learning: Rate = 3e-4
    supervised: Rate = 1e-4  # SFT and RFT continued from the SFT model


@dataclass(frozen=True, config=STRICT)
class Instructions:
    """Instructions that every method of a domain replies to, greedily, besides its own measure."""

    # Some of INSTRUCTIONS; () replies to none.
    datasets: Annotated[tuple[Literal[INSTRUCTIONS], ...], AfterValidator(_distinct)] = ()
    count: Count = 0  # instructions of all data sets together, in equal shares
    # Of the longest reply; one that has not ended by then is judged as it is.
    max_new_tokens: Positive = 200

    @model_validator(mode="after")
    def _fits(self):
        if bool(self.count) != bool(self.datasets) or self.count < len(self.datasets):
            raise ValueError(
                f"count: got {self.count}, expected at least one for each of the "
                f"{len(self.datasets)} data sets"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Judge:
    """Who compares replies to instructions with those of the SFT model (`judges`).

    It is no part of Profile.hash: it changes no reply, and rows of measurements.csv name it.
    """

    # "reward_model", a model that runs here; "programs", AlpacaEval's and Arena-Hard's own, whose
    # verdicts are read beside the replies; "" is nobody.
    kind: Literal["", "reward_model", "programs"] = ""
    model: Text = ""  # the reward model: a hub id or a folder
    revision: Text = ""  # of a hub model; "" is its newest
    # Of its weights, as for `Model`; "" is that of the study's own model.
    dtype: Literal["", "float32", "bfloat16", "auto"] = ""
    batch_size: Positive = 8  # texts that it reads at once

    @model_validator(mode="after")
    def _fits(self):
        if bool(self.model.strip()) != (self.kind == "reward_model"):
            raise ValueError("model: the kind reward_model needs one, and no other kind has one")
        return self


@dataclass(frozen=True, config=STRICT)
class Domain:
    """One training domain: its questions, its SFT model, its pairs and its rates."""

    # "miniature", "questions" (a gold answer: an option, yes or no, a number, a formula) or
    # "preferences" (human pairs).
    kind: Literal["miniature", "questions", "preferences"] = "miniature"
    datasets: Names = ()  # folder names of the data, or families of the miniature
    pretrain: Supervised = field(default_factory=Supervised)  # miniature: nearly right solutions
    sft: Supervised = field(default_factory=Supervised)
    pairs: Pairs = field(default_factory=Pairs)
    # The rewriting reward model (RLMEC, arXiv 2401.06081), trained on the `mask` pairs: (question,
    # solution, wrong prediction) -> corrected prediction.
    rewriter: Phase = field(default_factory=Phase)
    rates: Rates = field(default_factory=Rates)
    # method -> a rate a stage, found on other SFT models (`tuning`), in place of a search on every
    # seed; in a profile's file the name of a file in `profiles/rates` that holds them.
    tuned: dict[Name, tuple[Number, ...]] = field(default_factory=dict)
    tuning: Text = ""  # the name of that file, by which `results/tuning` has its evidence
    dev: Count = 0  # problems for choosing learning rates (all data sets together)
    test: Count = 0  # problems for the reported accuracy (all data sets together)
    explain: Count = 0  # of questions without a worked solution: statements before the answer
    max_new_tokens: Positive = 48  # longest response; one that has not ended by then has no answer
    max_length: Positive = 256  # tokens of prompt and response; longer ones: an error or left out
    batch_size: Positive = 16  # pairs per optimizer step; official code: 128
    epochs: Positive = 1  # of each ALLO stage; controls get the sum over both stages; paper: 1
    methods: Words = ()  # rows of this domain in place of the profile's methods ...
    ablations: Words = ()  # ... and ablations, where a domain cannot afford them all
    one_model: Words = ()  # of these, rows that only the first SFT model has: they get no verdict
    models: Count = 0  # SFT models of this domain, where they are fewer than the profile's
    instructions: Instructions = field(default_factory=Instructions)

    @model_validator(mode="after")
    def _fits(self):
        if not self.datasets:
            raise ValueError("datasets: empty; name at least one data set")
        for phase in ("pretrain", "sft"):
            mix = getattr(self, phase).mix
            if mix and (len(mix) != len(self.datasets) or abs(sum(mix) - 1) > 1e-6):
                raise ValueError(
                    f"{phase}.mix: got {short(list(mix))}, expected a share for each of the "
                    f"{len(self.datasets)} data sets, 1 together"
                )
        if self.instructions.datasets and self.kind == "miniature":
            raise ValueError("instructions: the miniature has no words for them; leave them out")
        return self


@dataclass(frozen=True, config=STRICT)
class Method:
    """Constants of the method that every domain shares."""

    beta: Rate = 0.1  # of DPO and NPO; official code
    share: Share = 0.1  # of all neurons that are kept; paper: 10%
    warmup_rate_factor: Rate = 0.1  # importance warm-up's rate over `rates.dense`: small as theirs
    key_share: Share = 0.2  # epsilon: share of a rejected response's tokens that are key tokens
    token_rule: Literal["threshold", "soft", "released"] = "threshold"  # see token_rewards
    token_threshold: Fraction = 0.5
    forgetting_warmup: Fraction = 0.03  # share of steps with rising rate; official code
    learning_warmup: Fraction = 0.1  # likewise
    weight_decay: Number = 0.0
    max_grad_norm: Rate = 1.0  # over the kept entries
    # The share sweep of 05_ablations.
    shares: tuple[Share, ...] = (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)


@dataclass(frozen=True, config=STRICT)
class Search:
    """The learning-rate search that every method gets, always on the development split."""

    candidates: Positive = 5  # trained models per method and domain
    factor: AboveOne = 2.0  # ratio of neighbouring rates
    per_run: bool = False  # every run searches, if rates were tuned on other models around those


@dataclass(frozen=True, config=STRICT)
class Replicates:
    """Runs of every method on one SFT model: each pair set in each order of its pairs.

    One training run is a noisy draw; what a method does to an SFT model is the mean over these,
    which all methods share. Learning rates are searched on the first alone, or by every run
    (`Search.per_run`).
    """

    pair_sets: Positive = 1  # disjoint sets of `pairs.train` training pairs
    orders: Positive = 1  # of the pairs of a set
    once: Words = ()  # methods that are run on the first of these alone


@dataclass(frozen=True, config=STRICT)
class Compute:
    """Batches, threads and repeats: they change cost, and results by rounding.

    Training makes more of that: another number of threads or another type of CPU is another draw,
    as another order of the pairs is; a study is a mean over such draws.
    """

    threads: Count = 0  # of torch for what methods share; 0 leaves torch's choice
    method_threads: Count = 0  # ... and for training and measuring a method; 0 is the same as above
    workers: Positive = 1  # processes that train methods side by side
    generation_batch: Positive = 256  # rows decoded together
    forward_batch: Positive = 64  # rows of a forward pass without gradients
    # Of training, between two checkpoints that a stopped run goes on from; 0 makes none.
    checkpoint_minutes: Number = 5.0


@dataclass(frozen=True, config=STRICT)
class Timing:
    """The DPO steps that 07_efficiency measures."""

    domain: Text = ""  # whose pairs; "" is the profile's first
    pairs: Count = 0  # in one step; 0 is the domain's batch size
    # Tokens of a prompt, and of both responses together, of the pairs that are taken: those of the
    # domain that come nearest. 0 takes the domain's training pairs as they come.
    prompt: Count = 0
    responses: Count = 0
    repeats: Positive = 5  # processes of each variant, in turn
    warm_up: Positive = 2  # steps of each before its clock starts
    steps: Positive = 3  # ... and those it times
    peers: Flag = False  # also TRL's and PEFT's ways, as far as they are installed


@dataclass(frozen=True, config=STRICT)
class Profile:
    """Everything a run depends on besides the seed, the data and the code."""

    name: Name
    size: Literal["cpu", "gpu"] = "cpu"
    description: Text = ""
    model: Model = field(default_factory=Model)
    domains: dict[Name, Domain] = field(default_factory=dict)
    method: Method = field(default_factory=Method)
    search: Search = field(default_factory=Search)
    replicates: Replicates = field(default_factory=Replicates)
    # Independent SFT models, those of seeds first_seed and on: no verdict before all are there, and
    # none that counts more. Both change no result, so they are no part of Profile.hash.
    models: Positive = 1
    first_seed: Count = 0  # after those that were looked at while the design was made
    compute: Compute = field(default_factory=Compute)
    timing: Timing = field(default_factory=Timing)
    judge: Judge = field(default_factory=Judge)
    # Which mask overlaps 01_importance measures.
    stability: Annotated[tuple[Overlap, ...], AfterValidator(_distinct)] = get_args(Overlap)
    # Methods of the main table and rows of the ablation, by their names in measurements.csv.
    methods: Words = ()
    ablations: Words = ()

    @model_validator(mode="after")
    def _fits(self):
        if not self.domains:
            raise ValueError("domains: names no domain; name at least one")
        if self.timing.domain and self.timing.domain not in self.domains:
            raise ValueError(
                f"timing.domain: got {short(self.timing.domain)}, expected one of "
                f"{', '.join(self.domains)}"
            )
        if "instructions" in self.domains:
            raise ValueError("domains: 'instructions' names replies in the results; choose another")
        requested = [name for one in self.domains.values() for name in one.instructions.datasets]
        every = requested + [name for one in self.domains.values() for name in one.datasets]
        if twice := [name for name in every if every.count(name) > 1]:
            raise ValueError(
                f"domains: {twice[0]} is in two; name each data set in one, as measurements have "
                "one row for it"
            )
        if self.judge.kind and not requested:
            raise ValueError("judge.kind: nothing to judge; give a domain `instructions`")
        return self

    def to_dict(self) -> dict:
        """The profile as plain lists, dicts and scalars, ready for JSON or YAML."""
        return _plain(self)

    def hash(self) -> str:
        """SHA-256 (hex) of every value that can change a result, but the judge's."""
        return settings_hash(self.to_dict())


def _plain(settings) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def settings_hash(settings: dict) -> str:
    """Profile.hash of `Profile.to_dict`: all of it but what cannot change a result.

    Settings that came later count only where they are used, so that older results keep their hash.
    """
    later = {"judge": ..., "models": ..., "first_seed": ..., "replicates": _plain(Replicates())}
    hashed = _without(settings, **later)
    hashed["search"] = _without(settings.get("search", {}), per_run=False)
    hashed["compute"] = _without(settings.get("compute", {}), checkpoint_minutes=...)
    if "model" in settings:
        hashed["model"] = _without(settings["model"], architectures=["llama"])
    later = {"instructions": _plain(Instructions()), "tuned": {}, "tuning": ..., "one_model": [],
             "models": ...}  # fmt: skip
    if "domains" in settings:
        domains = settings["domains"].items()
        hashed["domains"] = {name: _without(domain, **later) for name, domain in domains}
    return fingerprint(hashed)


def _without(section: dict, **left_out) -> dict:
    """A section without some keys: where they have the value named here, or any for `...`."""
    return {
        key: value
        for key, value in section.items()
        if key not in left_out or left_out[key] not in (..., value)
    }


def fingerprint(value) -> str:
    """SHA-256 (hex) of `value` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --- checks --------------------------------------------------------------------------------------


def check_settings(kind: type, requested, where: str):
    """Settings of the dataclass `kind` from plain values, every one of them checked.

    Raises:
        AlloError: one line for the first value that is unknown, of a wrong type or out of range:
            `where` and its key, what was given, what was expected.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(requested)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place, problem = [part for part in first["loc"] if part != "[key]"], first["msg"]
    if first["type"] in ("unexpected_keyword_argument", "invalid_key"):
        problem = f"unknown key {short(place.pop())}; expected one of {_keys(kind, place)}"
    elif first["type"] == "value_error":
        problem = problem.removeprefix("Value error, ")
    else:
        section = first["type"] in ("dataclass_type", "dict_type")
        expected = "a section with keys" if section else problem.removeprefix("Input should be ")
        expected = expected.replace("tuple", "list")
        problem = f"got {short(first['input'])}, expected {expected}"
    raise AlloError(": ".join(part for part in (where, ".".join(map(str, place)), problem) if part))


def _keys(kind: type, place: list) -> str:
    """Keys of the section of `kind` at a place in it."""
    for step in place:
        is_dict = get_origin(kind) is dict  # of named sections
        kind = get_args(kind)[1] if is_dict else get_type_hints(kind)[step]
    return ", ".join(sorted(one.name for one in dataclasses.fields(kind)))
