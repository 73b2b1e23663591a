"""Every method as a sequence of training stages: what differs between two rows of a table.

Learning rates are not here: each method gets the same search (`search`, `tuning`), except for rows
at the one rate of plain DPO (`PAPER_PROTOCOL`). Names are those of measurements.csv; in those of
shares "2p5" is 2.5.
"""

from dataclasses import asdict, dataclass, replace

from allo_lib.errors import AlloError
from allo_lib.profiles.config import Profile, Rates

PAPER_PROTOCOL = "_paper"  # suffix of rows that run at the one rate that is best for plain DPO
ROWS = "_rows"  # suffix of rows whose neurons are whole rows of the weight matrices
# Importance scores that ALLO is also trained with, by their variant (`score_variants`).
ESTIMATORS = ("gradient", "magnitude")
# Reward models that ALLO is also trained with (`rewriter.training_rows`).
REWARD_MODELS = ("early", "shuffled", "untrained")


def _both(**changes) -> tuple[dict, dict]:
    return changes, changes


# ALLO with something changed: row -> changes to fields of forgetting, and of learning.
_CHANGES: dict[str, tuple[dict, dict]] = (
    {
        "allo": ({}, {}),
        "allo_all_tokens_forgetting": ({"tokens": "all"}, {}),
        "allo_all_tokens_learning": ({}, {"key_share": 1.0}),
        "allo_random_tokens": ({"tokens": "random"}, {"key": "random"}),
        "allo_oracle_tokens": ({"tokens": "oracle"}, {"key": "oracle"}),
        "allo_soft": ({"rule": "soft"}, {}),
        "allo_released": ({"rule": "released"}, {}),
        "allo_all_neurons": _both(neurons="all", rate="dense"),
        "allo_random_neurons": _both(neurons="random"),
        "allo_last_neurons": _both(neurons="bottom"),
        "allo_rows": _both(granularity="row"),
        "allo_per_tensor": _both(scope="tensor"),
        "allo_rm_oracle": ({"tokens": "oracle"}, {}),
        # Must do harm, else forgetting's choice of tokens cannot be judged by accuracy here.
        "allo_rm_inverted": ({"tokens": "kept"}, {}),
        # As the official code has it: all wrong samples, its key tokens and densities.
        "allo_all_wrong": ({"pairs": "wrong"}, {}),
        "allo_key10": ({}, {"key_share": 0.1}),
        "allo_f5_l5": _both(share=0.05),
        "allo_official": ({"pairs": "wrong", "share": 0.05}, {"share": 0.05, "key_share": 0.1}),
    }
    | {f"allo_rm_{quality}": ({"reward_model": quality}, {}) for quality in REWARD_MODELS}
    | {f"allo_scores_{word}": _both(estimator=word) for word in ESTIMATORS}
)
# Those of them that take ALLO's own rates, which shows what the change alone does: another reward
# model, share or score, or a detail of the official code.
_AT_RATES_OF_ALLO = {
    "allo_soft", "allo_released", "allo_all_wrong", "allo_key10", "allo_f5_l5", "allo_official",
    *(name for name in _CHANGES if name.startswith(("allo_rm_", "allo_scores_"))),
}  # fmt: skip
# Fields of a stage that came after results had been stored; at these values the store knows it
# without them.
_LATER = {"scope": "global", "pairs": "train"}
# What is searched besides the rate of a method of one stage: beta, the scale of its rewards, or
# SimPO's target margin gamma. Of two stages it is the ratio of their rates.
KNOBS = {"simpo": "gamma"} | dict.fromkeys(
    ("dpo", "rdpo", "ipo", "bco", "npo", "forgetting", "learning"), "beta"
)
# Fields of `config.Rates` over `top`, by which ALLO's rates are multiplied: random and last neurons
# need a larger rate than the top ones, as much larger as with plain DPO.
_WIDER = {"random": "random", "bottom": "last"}


@dataclass(frozen=True)
class Stage:
    """One training stage."""

    objective: str  # see `objectives`
    rate: str  # the field of config.Rates where its search begins
    epochs: int = 1  # in units of the domain's `epochs`
    neurons: str = "all"  # or the "top", "bottom" or "random" share
    share: float = 0.1
    granularity: str = "scalar"  # what is kept or not: "scalar" entries or whole "row"s
    estimator: str = "delta"  # variant of the scores
    # What forgetting weighs tokens by: "rewriter", "all", "random", "oracle", or "kept" for those
    # that the rewriter would keep.
    tokens: str = "rewriter"
    reward_model: str = "trained"  # quality of the rewriter, see `rewriter`
    rule: str = "threshold"  # see `tokens`
    # Whence the key tokens of learning: the "policy", the "oracle", or at "random".
    key: str = "policy"
    key_share: float = 1.0
    scope: str = "global"  # a share of all neurons, or of each "tensor"'s
    # "train"; "all", which adds those of the importance scores and the reward model; "wrong" for
    # every distinct wrong sample, also to questions without a right one (forgetting only).
    pairs: str = "train"

    def settings(self) -> dict:
        """The stage as the store knows it: every field, the later ones where they say something."""
        fields = asdict(self).items()
        kept = {key: value for key, value in fields if _LATER.get(key) != value}
        return kept | ({"wider": self._wider} if self._wider else {})

    def initial_rate(self, rates: Rates) -> float:
        """The learning rate where the stage's search begins."""
        rate = getattr(rates, self.rate)
        return rate * getattr(rates, self._wider) / rates.top if self._wider else rate

    @property
    def _wider(self) -> str:
        """Field of the rates over `top` that multiplies an ALLO stage's rate; "" for none."""
        return _WIDER.get(self.neurons, "") if self.rate in ("forgetting", "learning") else ""


def stages_of(method: str, profile: Profile) -> tuple[Stage, ...]:
    """The stages of a method by its name in measurements.csv; AlloError for an unknown name."""
    known = _methods(profile)
    if (name := method.removesuffix(PAPER_PROTOCOL)) not in known:
        raise AlloError(f"method {method!r} is not known; expected one of {', '.join(known)}")
    return known[name]


def knob_of(stages: tuple[Stage, ...]) -> str | None:
    """What is searched besides the rate of these stages: "beta", "gamma" or None (`KNOBS`)."""
    return KNOBS.get(stages[0].objective) if len(stages) == 1 else None


def tuned_as(method: str) -> str:
    """The method whose tuned rates a row takes where it has none of its own."""
    return "allo" if method in _AT_RATES_OF_ALLO else method.removesuffix(PAPER_PROTOCOL)


def share_name(share: float) -> str:
    """Method name of DPO on the top share of neurons: 0.1 -> "dpo_top10"; 1 -> "dpo"."""
    return "dpo" if share == 1 else f"dpo_top{_percent(share)}"


def _percent(share: float) -> str:
    return f"{100 * share:g}".replace(".", "p")


def _methods(profile: Profile) -> dict[str, tuple[Stage, ...]]:
    """Every method but those that differ from another in their rates alone."""
    settings, share = profile.method, profile.method.share
    percent, rule = _percent(share), settings.token_rule
    kept = {"neurons": "top", "share": share}
    forgetting = Stage("forgetting", "forgetting", rule=rule, **kept)
    learning = Stage("learning", "learning", key_share=settings.key_share, **kept)
    known: dict[str, tuple[Stage, ...]] = {
        "sft_base": (),
        "dpo": (Stage("dpo", "dense"),),
        "dpo_long": (Stage("dpo", "dense", 2),),
        # What ALLO makes of pairs that the others never see, given to plain DPO.
        "dpo_all_pairs": (Stage("dpo", "dense", 2, pairs="all"),),
    }
    for name in ("sft", "rft"):
        known[name] = (Stage(name, "supervised", 2, tokens="all"),)
    for name in ("rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c"):
        known[name] = (Stage(name, "dense", 2),)
    for value in (*settings.shares, share):
        if value < 1:
            stage = Stage("dpo", "top", neurons="top", share=value)
            known[share_name(value)] = (stage,)
            known[share_name(value) + ROWS] = (replace(stage, granularity="row"),)
    for order, neurons in (("top", "top"), ("last", "bottom"), ("random", "random")):
        for suffix, epochs in (("", 1), ("_long", 2)):
            known[f"dpo_{order}{percent}{suffix}"] = (Stage("dpo", order, epochs, neurons, share),)
    for estimator in ("gradient", "magnitude"):
        stage = Stage("dpo", "top", estimator=estimator, **kept)
        known[f"dpo_top{percent}_{estimator}"] = (stage,)
    for name, (first, second) in _CHANGES.items():
        known[name] = (replace(forgetting, **first), replace(learning, **second))
    return known | {
        "allo_no_forgetting": (replace(learning, epochs=2),),
        "allo_no_learning": (replace(forgetting, epochs=2),),
        "allo_reversed": known["allo"][::-1],
    }
