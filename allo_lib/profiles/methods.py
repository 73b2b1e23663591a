"""Every method as a sequence of training stages: what differs between two rows of a table.

Learning rates are not here: each method gets the same search (`search`, `tuning`), except for rows
whose names fix them (`PAPER_PROTOCOL`, `relative_rates`). Names are those of measurements.csv;
sweeps have names by a rule, in which "2p5" is 2.5:

    allo_f5_l20          ALLO that forgets on the top 5% of the neurons and learns on the top 20%
    allo_key5            ALLO whose key tokens are 5% of a rejected response
    allo_rates_x0p25_x4  ALLO at a quarter of its best forgetting rate and 4 times its best learning
                         rate
"""

import re
from dataclasses import asdict, dataclass
from decimal import Decimal

from allo_lib.errors import AlloError
from allo_lib.profiles.config import Method, Profile, Rates

PAPER_PROTOCOL = "_paper"  # suffix of rows that run at the one rate that is best for plain DPO
KEY_REFERENCE = "allo_key_reference"  # whose key tokens a model trained by DPO picks
ROWS = "_rows"  # suffix of rows whose neurons are whole rows of the weight matrices
# Importance scores that ALLO is also trained with, by their variant (`score_variants`).
ESTIMATORS = ("gradient", "magnitude", "lr_x0.3", "lr_x3", "half_epoch")
# Reward models that ALLO is also trained with (`rewriter.QUALITIES`).
REWARD_MODELS = ("sixteenth", "eighth", "early", "half", "shuffled", "untrained")

_NUMBER = r"(\d+(?:p\d+)?)"
_GRID = re.compile(rf"allo_f{_NUMBER}_l{_NUMBER}")
_KEY = re.compile(rf"allo_key{_NUMBER}")
_RATES = re.compile(rf"(allo)_rates_x{_NUMBER}_x{_NUMBER}")
_BY_RULE = ("allo_f5_l20", "allo_key5", "allo_rates_x0p5_x2")
# Fields of a stage that came after results had been stored; at these values the store knows it
# without them.
_LATER = {"scope": "global", "pairs": "train"}
# What is searched besides the rate of a method of one stage: beta, the scale of its rewards, or
# SimPO's target margin gamma. Of two stages it is the ratio of their rates.
KNOBS = {"simpo": "gamma"} | dict.fromkeys(
    ("dpo", "rdpo", "ipo", "bco", "npo", "forgetting", "learning", "merged"), "beta"
)
# ALLO with another reward model, share or official detail, which shows what that alone changes.
_AT_RATES_OF_ALLO = re.compile(
    r"allo_(rm_.+|key.+|f\d.*|scores_.+|soft|released|all_wrong|official)"
)
# Random and last neurons need a larger rate than the top ones: as much larger as with plain DPO.
_WIDER = {"random": "random", "bottom": "last"}


@dataclass(frozen=True)
class Stage:
    """One training stage.

    objective: see `objectives`. rate: the field of config.Rates where its search begins.
    epochs: in units of the domain's `epochs`. neurons: "all", "top", "bottom" or "random" share.
    granularity: what is kept or not, "scalar" entries or whole "row"s (`importance`); scope: a
    share of all neurons, "global", or of each "tensor"'s. estimator: variant of the scores.
    tokens: what forgetting weighs tokens by: "rewriter", "all", "random", "oracle", or "kept" for
    the very tokens that the rewriter would keep.
    reward_model: quality of the rewriter, see `rewriter`. rule: see `tokens`.
    key: whence the key tokens of learning: "policy", "reference" (a DPO model), "random", "oracle";
    pairs: "train"; "all", which adds those of the importance scores and the reward model; "wrong"
    for every distinct wrong sample, also to questions without a right one (forgetting only).
    """

    objective: str
    rate: str
    epochs: int = 1
    neurons: str = "all"
    share: float = 0.1
    granularity: str = "scalar"
    estimator: str = "delta"
    tokens: str = "rewriter"
    reward_model: str = "trained"
    rule: str = "threshold"
    key: str = "policy"
    key_share: float = 1.0
    scope: str = "global"
    pairs: str = "train"

    def settings(self) -> dict:
        """The stage as the store knows it: every field, the later ones where they say something."""
        told = asdict(self)
        kept = {k: v for k, v in told.items() if k not in _LATER or v != _LATER[k]}
        return kept | ({"centre": self._wider} if self._wider else {})

    def centre(self, rates: Rates) -> float:
        """The learning rate where the stage's search begins."""
        rate = getattr(rates, self.rate)
        return rate * getattr(rates, self._wider) / rates.top if self._wider else rate

    @property
    def _wider(self) -> str:
        """Field of the rates over `top` that multiplies an ALLO stage's rate; "" for none."""
        return _WIDER.get(self.neurons, "") if self.rate in ("forgetting", "learning") else ""


def stages_of(method: str, profile: Profile) -> tuple[Stage, ...]:
    """The stages of a method by its name in measurements.csv; AlloError for an unknown name."""
    name = method.removesuffix(PAPER_PROTOCOL)
    relative = relative_rates(name)
    if relative:
        name = relative[0]
    known = _methods(profile)
    found = known.get(name) or _by_rule(name, profile.method)
    if found is None and name not in known:
        names = ", ".join((*known, *_BY_RULE))
        raise AlloError(f"method {method!r} is not known; expected one of {names}")
    return found or ()


def relative_rates(method: str) -> tuple[str, tuple[float, ...]] | None:
    """(the method, factors) of a row whose rates are another row's best, times one factor a stage.

    "allo_rates_x0p25_x4" -> ("allo", (0.25, 4.0)); None for any other name.
    """
    found = _RATES.fullmatch(method)
    if not found or any(_parsed(text) == 0 for text in found.groups()[1:]):
        return None
    factors = tuple(float(_parsed(text)) for text in found.groups()[1:])
    return (found[1], factors) if rates_name(*factors) == method else None


def knob_of(stages: tuple[Stage, ...]) -> str | None:
    """What is searched besides the rate of these stages: "beta", "gamma" or None (`KNOBS`)."""
    return KNOBS.get(stages[0].objective) if len(stages) == 1 else None


def tuned_as(method: str) -> str:
    """The method whose tuned rates a row takes where it has none of its own."""
    return "allo" if _AT_RATES_OF_ALLO.fullmatch(method) else method.removesuffix(PAPER_PROTOCOL)


def waits_for(method: str) -> str | None:
    """The row whose result must be known before this one can be trained; None for most."""
    if method.endswith(PAPER_PROTOCOL) or method == KEY_REFERENCE:
        return "dpo"
    relative = relative_rates(method)
    return relative[0] if relative else None


def share_name(share: float) -> str:
    """Method name of DPO on the top share of neurons: 0.1 -> "dpo_top10"; 1 -> "dpo"."""
    return "dpo" if share == 1 else f"dpo_top{_percent(share)}"


def grid_name(forgetting: float, learning: float) -> str:
    """Method name of ALLO on these top shares of the neurons: (0.025, 1) -> "allo_f2p5_l100"."""
    return f"allo_f{_percent(forgetting)}_l{_percent(learning)}"


def key_name(share: float) -> str:
    """Method name of ALLO with this share of key tokens: 0.05 -> "allo_key5"."""
    return f"allo_key{_percent(share)}"


def rates_name(forgetting: float, learning: float) -> str:
    """Method name of ALLO at its best rates times these factors: (0.25, 4) -> "..._x0p25_x4"."""
    factors = (f"{factor:g}".replace(".", "p") for factor in (forgetting, learning))
    return "allo_rates_x{}_x{}".format(*factors)


def _percent(share: float) -> str:
    return f"{share * 100:g}".replace(".", "p")


def _parsed(text: str) -> Decimal:
    return Decimal(text.replace("p", "."))


def _share(text: str) -> float:
    return float(_parsed(text) / 100)


def _by_rule(method: str, settings: Method) -> tuple[Stage, ...] | None:
    """The stages of a row of a sweep; None when the name follows no rule."""
    grid, key = _GRID.fullmatch(method), _KEY.fullmatch(method)
    shares = [_share(text) for text in (grid or key).groups()] if grid or key else []
    name = {1: key_name, 2: grid_name}.get(len(shares))
    if not shares or not all(0 < share <= 1 for share in shares) or name(*shares) != method:
        return None
    if key:
        return _allo(settings, None, {"key_share": shares[0]})
    return _allo(settings, *map(_on_top, shares))


def _on_top(share: float) -> dict:
    """Changes to a stage that trains the top share of the neurons; 1 is all of them."""
    return {"share": share} if share < 1 else {"neurons": "all", "rate": "dense"}


def _allo(settings: Method, forgetting_changes=None, learning_changes=None) -> tuple[Stage, Stage]:
    """Forgetting, then learning, with changes to the fields of either stage."""
    forgetting, learning = _stage_fields(settings)
    return (
        Stage("forgetting", **(forgetting | (forgetting_changes or {}))),
        Stage("learning", **(learning | (learning_changes or {}))),
    )


def _stage_fields(settings: Method) -> tuple[dict, dict]:
    share = settings.share
    return (
        dict(rate="forgetting", neurons="top", share=share, rule=settings.token_rule),
        dict(rate="learning", neurons="top", share=share, key_share=settings.key_share),
    )


def _methods(profile: Profile) -> dict[str, tuple[Stage, ...]]:
    settings = profile.method
    return (
        {"sft_base": (), "dpo": (Stage("dpo", "dense"),)}
        | {"dpo_long": (Stage("dpo", "dense", epochs=2),), "allo": _allo(settings)}
        # What ALLO makes of pairs that the others never see, given to plain DPO.
        | {"dpo_all_pairs": (Stage("dpo", "dense", epochs=2, pairs="all"),)}
        | _baselines()
        | _masked(settings)
        | _ablations(settings)
    )


def _baselines() -> dict[str, tuple[Stage, ...]]:
    baselines = {
        name: (Stage(name, "supervised", epochs=2, tokens="all"),)
        for name in ("sft", "rft")
    } | {
        name: (Stage(name, "dense", epochs=2),)
        for name in ("rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c")
    }  # fmt: skip
    return baselines


def _masked(settings: Method) -> dict[str, tuple[Stage, ...]]:
    """DPO on a part of the neurons."""
    share, percent = settings.share, _percent(settings.share)
    shares = [value for value in (*settings.shares, share) if value < 1]

    def dpo(rate: str, neurons: str, share: float = share, **changes) -> tuple[Stage]:
        return (Stage("dpo", rate, neurons=neurons, share=share, **changes),)

    return (
        {share_name(value): dpo("top", "top", value) for value in shares}
        | {
            f"{share_name(value)}{ROWS}": dpo("top", "top", value, granularity="row")
            for value in shares
        }
        | {
            f"dpo_last{percent}": dpo("last", "bottom"),
            f"dpo_random{percent}": dpo("random", "random"),
            f"dpo_top{percent}_gradient": dpo("top", "top", estimator="gradient"),
            f"dpo_top{percent}_magnitude": dpo("top", "top", estimator="magnitude"),
        }
        | {
            f"dpo_{order}{percent}_long": dpo(order, neurons, epochs=2)
            for order, neurons in (("top", "top"), ("last", "bottom"), ("random", "random"))
        }
    )


def _ablations(settings: Method) -> dict[str, tuple[Stage, ...]]:
    """ALLO with one thing changed."""
    forgetting, learning = _stage_fields(settings)

    def allo(forgetting_changes=None, learning_changes=None) -> tuple[Stage, Stage]:
        return _allo(settings, forgetting_changes, learning_changes)

    def both(**changes) -> tuple[Stage, Stage]:
        return allo(changes, changes)

    merged = learning | {"rule": settings.token_rule}
    return (
        {
            "allo_no_forgetting": (Stage("learning", epochs=2, **learning),),
            "allo_no_learning": (Stage("forgetting", epochs=2, **forgetting),),
            "allo_reversed": allo()[::-1],
            "allo_merged": (Stage("merged", epochs=2, **merged),),
            "allo_all_tokens_forgetting": allo({"tokens": "all"}),
            "allo_all_tokens_learning": allo(None, {"key_share": 1.0}),
            "allo_random_tokens": allo({"tokens": "random"}, {"key": "random"}),
            "allo_oracle_tokens": allo({"tokens": "oracle"}, {"key": "oracle"}),
            "allo_soft": allo({"rule": "soft"}),
            "allo_released": allo({"rule": "released"}),
            "allo_key_reference": allo(None, {"key": "reference"}),
            "allo_all_neurons": both(neurons="all", rate="dense"),
            "allo_random_neurons": both(neurons="random"),
            "allo_last_neurons": both(neurons="bottom"),
            "allo_rows": both(granularity="row"),
            "allo_per_tensor": both(scope="tensor"),
            "allo_rm_oracle": allo({"tokens": "oracle"}),
            # Must do harm, else forgetting's choice of tokens cannot be judged by accuracy here.
            "allo_rm_inverted": allo({"tokens": "kept"}),
            # As the official code has it: all wrong samples, its densities and key tokens.
            "allo_all_wrong": allo({"pairs": "wrong"}),
            "allo_official": allo(
                {"pairs": "wrong", "share": 0.05}, {"share": 0.05, "key_share": 0.1}
            ),
        }
        | {f"allo_rm_{quality}": allo({"reward_model": quality}) for quality in REWARD_MODELS}
        | {f"allo_scores_{word.replace('.', 'p')}": both(estimator=word) for word in ESTIMATORS}
    )
