"""One configuration object per profile: plain dataclasses.

Every key, with its unit and its source, is described beside its field here; the YAML files in
`allo_lib/profiles/` hold the values, `profile_files` reads them and `profile_checks` checks them.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

SIZES = ("cpu", "gpu")
MODEL_DTYPES = ("float32", "bfloat16", "auto")
DOMAIN_KINDS = ("miniature", "choice", "questions", "preferences")
TOKEN_RULES = ("threshold", "soft", "released")  # of token_rewards, which would import torch
STABILITY = ("orders", "halves", "estimators", "magnitude")


@dataclass(frozen=True)
class Model:
    """Which weights the study starts from."""

    name: str = "micro"  # "micro" (trained here), "smollm2-135m-instruct", a hub id, or a folder
    # Micro only, of `models.MICRO`: the seeds take them in turn.
    architectures: tuple[str, ...] = ("llama",)
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
class Instructions:
    """Instructions that every method of a domain replies to, greedily, besides its own measure."""

    datasets: tuple[str, ...] = ()  # of published.INSTRUCTIONS; () replies to none
    count: int = 0  # instructions of all data sets together, in equal shares
    max_new_tokens: int = 200  # longest reply; one that has not ended by then is judged as it is


@dataclass(frozen=True)
class Judge:
    """Who compares replies to instructions with those of the SFT model (`judges.judge`).

    It is no part of Profile.hash: it changes no reply, and rows of measurements.csv name it.
    """

    kind: str = ""  # "reward_model", "judge_model", "alpaca_eval" or "arena_hard"; "" is nobody
    model: str = ""  # of the first two kinds: a hub id or a folder
    revision: str = ""  # of a hub model; "" is its newest
    dtype: str = ""  # of its weights, as for `Model`; "" is that of the study's own model
    batch_size: int = 8  # texts that a model judges at once
    checkout: str = ""  # "arena_hard": clone of its programs; "" is ARENA_HARD_AUTO's


@dataclass(frozen=True)
class Domain:
    """One training domain: its questions, its SFT model, its pairs and its rates."""

    # "miniature", "choice" (a gold option), "questions" (any gold answer: options, yes or no,
    # numbers, formulas) or "preferences" (human pairs).
    kind: str = "miniature"
    datasets: tuple[str, ...] = ()  # folder names of the data, or families of the miniature
    pretrain: Supervised = field(default_factory=Supervised)  # miniature: nearly right solutions
    sft: Supervised = field(default_factory=Supervised)
    pairs: Pairs = field(default_factory=Pairs)
    rewriter: Rewriter = field(default_factory=Rewriter)
    rates: Rates = field(default_factory=Rates)
    # method -> a rate a stage, found on other SFT models (`tuning`), in place of a search on every
    # seed; in a profile's file the name of a file in `profiles/rates` that holds them.
    tuned: dict[str, tuple[float, ...]] = field(default_factory=dict)
    dev: int = 0  # problems for choosing learning rates (all data sets together)
    test: int = 0  # problems for the reported accuracy (all data sets together)
    explain: int = 0  # of questions without a worked solution: statements before the answer
    max_new_tokens: int = 48  # longest response; one that has not ended by then has no answer
    max_length: int = 256  # tokens of prompt and response; longer rows are an error or left out
    batch_size: int = 16  # pairs per optimizer step; official code: 128
    epochs: int = 1  # of each ALLO stage; controls get the sum over both stages; paper: 1
    methods: tuple[str, ...] = ()  # rows of this domain in place of the profile's methods ...
    ablations: tuple[str, ...] = ()  # ... and ablations, where a domain cannot afford them all
    instructions: Instructions = field(default_factory=Instructions)


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
class Replicates:
    """Runs of every method on one SFT model: each pair set in each order of its pairs.

    One training run is a noisy draw; what a method does to an SFT model is the mean over these,
    which all methods share. Learning rates are searched on the first run alone.
    """

    pair_sets: int = 1  # disjoint sets of `pairs.train` training pairs
    orders: int = 1  # of the pairs of a set
    once: tuple[str, ...] = ()  # methods that are run on the first of these alone


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
    replicates: Replicates = field(default_factory=Replicates)
    compute: Compute = field(default_factory=Compute)
    timing: Timing = field(default_factory=Timing)
    judge: Judge = field(default_factory=Judge)
    # Which mask overlaps 01_importance measures: of "orders", "halves", "estimators", "magnitude".
    stability: tuple[str, ...] = STABILITY
    # Methods of the main table and rows of the ablation, by their names in measurements.csv.
    methods: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """The profile as plain lists, dicts and scalars, ready for JSON or YAML."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def hash(self) -> str:
        """SHA-256 (hex) of every value that can change a result, but the judge's."""
        return settings_hash(self.to_dict())


def settings_hash(settings: dict) -> str:
    """Profile.hash of `Profile.to_dict`: all of it but what cannot change a result, and the judge.

    Settings that came later count only where they are used, so that older results keep their hash.
    """
    compute = dict(settings.get("compute", {}))
    compute.pop("checkpoint_minutes", None)
    hashed = {key: value for key, value in settings.items() if key != "judge"}
    if settings.get("replicates") == json.loads(json.dumps(dataclasses.asdict(Replicates()))):
        del hashed["replicates"]
    if settings.get("model", {}).get("architectures") == ["llama"]:
        hashed["model"] = {k: v for k, v in settings["model"].items() if k != "architectures"}
    if isinstance(settings.get("domains"), dict):
        hashed["domains"] = {k: _without_unused(v) for k, v in settings["domains"].items()}
    return fingerprint(hashed | {"compute": compute})


def _without_unused(domain):
    """Settings of a domain without `instructions` and `tuned` where it has none."""
    unused = {"instructions": json.loads(json.dumps(dataclasses.asdict(Instructions())))}
    unused["tuned"] = {}
    if not isinstance(domain, dict):
        return domain
    return {k: v for k, v in domain.items() if k not in unused or v != unused[k]}


def fingerprint(value) -> str:
    """SHA-256 (hex) of `value` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
