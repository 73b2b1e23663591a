"""Every method as a sequence of training stages: what differs between two rows of a table.

Learning rates are not here: each method gets the same search (`search`).
"""

from dataclasses import dataclass

from allo_lib.config import Profile
from allo_lib.errors import AlloError

PAPER_PROTOCOL = "_paper"  # suffix of rows that run at the one rate that is best for plain DPO
ROWS = "_rows"  # suffix of rows whose neurons are whole rows of the weight matrices


@dataclass(frozen=True)
class Stage:
    """One training stage.

    objective: see `objectives`. rate: the field of config.Rates where its search begins.
    epochs: in units of the domain's `epochs`. neurons: "all", "top", "bottom" or "random" share.
    granularity: what is kept or not, "scalar" entries or whole "row"s (`importance`).
    tokens: what forgetting weighs tokens by: "rewriter", "all", "random" or "oracle".
    reward_model: quality of the rewriter, see `rewriter`. rule: see token_rewards.
    key: whence the key tokens of learning: "policy", "reference" (a DPO model), "random", "oracle";
    key_share: None for the profile's.
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


def stages_of(method: str, profile: Profile) -> tuple[Stage, ...]:
    """The stages of a method by its name in measurements.csv; AlloError for an unknown name."""
    known = _methods(profile)
    name = method.removesuffix(PAPER_PROTOCOL)
    if name not in known:
        raise AlloError(f"method {method!r} is not known; expected one of {', '.join(known)}")
    return known[name]


def share_name(share: float) -> str:
    """Method name of DPO on the top share of neurons: 0.1 -> "dpo_top10"; 1 -> "dpo"."""
    return "dpo" if share == 1 else f"dpo_top{share * 100:g}".replace(".", "p")


def _methods(profile: Profile) -> dict[str, tuple[Stage, ...]]:
    settings = profile.method
    share = settings.share
    forgetting = dict(rate="forgetting", neurons="top", share=share, rule=settings.token_rule)
    learning = dict(rate="learning", neurons="top", share=share, key_share=settings.key_share)
    forget, learn = Stage("forgetting", **forgetting), Stage("learning", **learning)

    def allo(forgetting_changes=None, learning_changes=None) -> tuple[Stage, Stage]:
        return (
            Stage("forgetting", **(forgetting | (forgetting_changes or {}))),
            Stage("learning", **(learning | (learning_changes or {}))),
        )

    percent = f"{share * 100:g}".replace(".", "p")
    baselines = {
        name: (Stage(name, "supervised", epochs=2, tokens="all"),)
        for name in ("sft", "rft")
    } | {
        name: (Stage(name, "dense", epochs=2),)
        for name in ("rdpo", "ipo", "simpo", "npo")
    }  # fmt: skip
    masked = {
        share_name(value): (Stage("dpo", "top", neurons="top", share=value),)
        for value in (*settings.shares, share)
        if value < 1
    } | {
        f"{share_name(value)}{ROWS}": (
            Stage("dpo", "top", neurons="top", share=value, granularity="row"),
        )
        for value in (*settings.shares, share)
        if value < 1
    } | {
        f"dpo_last{percent}": (Stage("dpo", "last", neurons="bottom", share=share),),
        f"dpo_random{percent}": (Stage("dpo", "random", neurons="random", share=share),),
        f"dpo_top{percent}_gradient": (
            Stage("dpo", "top", neurons="top", share=share, estimator="gradient"),
        ),
        f"dpo_top{percent}_magnitude": (
            Stage("dpo", "top", neurons="top", share=share, estimator="magnitude"),
        ),
        f"dpo_top{percent}_long": (Stage("dpo", "top", epochs=2, neurons="top", share=share),),
    }
    ablations = {
        "allo_no_forgetting": (Stage("learning", epochs=2, **learning),),
        "allo_no_learning": (Stage("forgetting", epochs=2, **forgetting),),
        "allo_all_tokens_forgetting": allo({"tokens": "all"}),
        "allo_all_tokens_learning": allo(None, {"key_share": 1.0}),
        "allo_random_tokens": allo({"tokens": "random"}, {"key": "random"}),
        "allo_oracle_tokens": allo({"tokens": "oracle"}, {"key": "oracle"}),
        "allo_soft": allo({"rule": "soft"}),
        "allo_released": allo({"rule": "released"}),
        "allo_key_reference": allo(None, {"key": "reference"}),
        "allo_all_neurons": allo(*[{"neurons": "all", "rate": "dense"}] * 2),
        "allo_random_neurons": allo(*[{"neurons": "random"}] * 2),
        "allo_rm_early": allo({"reward_model": "early"}),
        "allo_rm_shuffled": allo({"reward_model": "shuffled"}),
        "allo_rm_untrained": allo({"reward_model": "untrained"}),
        "allo_rm_oracle": allo({"tokens": "oracle"}),
    }
    return (
        {"sft_base": (), "dpo": (Stage("dpo", "dense"),)}
        | {"dpo_long": (Stage("dpo", "dense", epochs=2),), "allo": (forget, learn)}
        | baselines
        | masked
        | ablations
    )
