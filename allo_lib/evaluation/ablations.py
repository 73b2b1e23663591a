"""Which rows make which figure of 05_ablations, and how many models each figure costs.

A figure is drawn where a profile asks for one of the rows that it is about: its *own* rows. Others,
such as ALLO itself, only stand beside them. `python -m allo_lib.evaluation.ablations PROFILE`
prints the rows and the cost of every figure.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import (
    ESTIMATORS,
    PAPER_PROTOCOL,
    grid_name,
    key_name,
    rates_name,
    relative_rates,
    stages_of,
)
from allo_lib.profiles.profile_files import load_profile

SHARES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0)  # of the neurons, for each stage
KEY_SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the tokens of a rejected response
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of each stage's best learning rate
REFERENCE = "allo"

_MASKS = {
    "allo_random_neurons": "random neurons",
    "allo_last_neurons": "last neurons",
    "allo_all_neurons": "all neurons",
    "allo_rows": "whole rows",
    "allo_per_tensor": "top of every tensor",
}
_SCORES = {
    "gradient": "sum of |gradient|",
    "magnitude": "magnitude of the weights",
    "lr_x0.3": "warm-up at 0.3 of the rate",
    "lr_x3": "warm-up at 3 times the rate",
    "half_epoch": "warm-up of half an epoch",
}
_TOKENS = {
    "allo_soft": "forgetting by 1 - p",
    "allo_released": "forgetting by p (released code)",
    "allo_all_tokens_forgetting": "forgetting all tokens",
    "allo_random_tokens": "random tokens in both stages",
    "allo_oracle_tokens": "oracle tokens in both stages",
    "allo_key_reference": "key tokens of a DPO model",
    "allo_all_tokens_learning": "learning from all tokens",
}
_ORDER = {
    "allo_reversed": "learning, then forgetting",
    "allo_merged": "both in one stage",
    "allo_no_forgetting": "learning alone",
    "allo_no_learning": "forgetting alone",
}
# Row -> quality of its reward model and how figures name it, from the least trained on.
REWARD_MODELS = {
    "allo_rm_untrained": ("untrained", "untrained"),
    "allo_rm_shuffled": ("shuffled", "shuffled targets"),
    "allo_rm_sixteenth": ("sixteenth", "1/16 of the examples"),
    "allo_rm_eighth": ("eighth", "1/8 of the examples"),
    "allo_rm_early": ("early", "1/4 of the examples"),
    "allo_rm_half": ("half", "1/2 of the examples"),
    "allo": ("trained", "trained"),
    "allo_rm_oracle": ("oracle", "oracle"),
}
# Forgetting on exactly the tokens that the rewriter would keep: a difference that must be seen.
INVERTED = "allo_rm_inverted"
# ALLO as the official code departs from the paper, one departure at a time and all together.
OFFICIAL = ("allo_all_wrong", "allo_key10", "allo_f5_l5", "allo_official")


@dataclass(frozen=True)
class Figure:
    """rows: method -> how the figure names it; own: those of which one must be asked for."""

    rows: dict[str, str]
    own: frozenset[str]


def figures_of(profile: Profile) -> dict[str, Figure]:
    """Every figure, by its name in the files of 05_ablations."""
    scores = {f"allo_scores_{word.replace('.', 'p')}": _SCORES[word] for word in ESTIMATORS}
    return {
        "neurons": _figure({cell(a, b, profile): "" for a in SHARES for b in SHARES}),
        "masks": _figure(_MASKS),
        "scores": _figure(scores),
        "token_rules": _figure(_TOKENS, ("allo_soft", "allo_released", "allo_key_reference",
                                         "allo_random_tokens", "allo_oracle_tokens")),
        "key_tokens": _figure({key_row(share, profile): "" for share in KEY_SHARES}),
        "order": _figure(_ORDER, ("allo_reversed", "allo_merged")),
        "reward_models": _figure(
            {row: text for row, (_, text) in REWARD_MODELS.items()},
            set(REWARD_MODELS) - {"allo", "allo_rm_shuffled", "allo_rm_oracle"},
        ),
        "rates": _figure({rates_row(a, b): "" for a in FACTORS for b in FACTORS}),
    }  # fmt: skip


def _figure(rows: dict[str, str], own: Iterable[str] = ()) -> Figure:
    """`own`: by default every row that is not drawn by another figure too."""
    shared = {REFERENCE, "allo_all_tokens_learning"}
    return Figure(rows, frozenset(own) or frozenset(set(rows) - shared))


def asked(figure: str, profile: Profile, methods: Collection[str]) -> dict[str, str]:
    """Row -> label of those rows of a figure that are among `methods`; none without an own one."""
    about = figures_of(profile)[figure]
    if not about.own & set(methods):
        return {}
    return {row: label for row, label in about.rows.items() if row in methods}


def wanted(
    figure: str, profile: Profile, methods: Mapping[str, Collection[str]]
) -> list[tuple[str, dict[str, str]]]:
    """Domains that ask for a figure, each with its rows and labels; `methods` are those of each."""
    found = [(name, asked(figure, profile, rows)) for name, rows in methods.items()]
    return [(name, labels) for name, labels in found if labels]


def single_changes(methods: Iterable[str]) -> list[str]:
    """Rows that change one part of ALLO, or as the official code does, without points of sweeps."""
    sweeps = ("allo_f", "allo_key", "allo_rates_")
    kept = ("allo_key_reference", *OFFICIAL)
    return [
        method for method in methods
        if method.startswith("allo_") and (method in kept or not method.startswith(sweeps))
    ]  # fmt: skip


def cell(forgetting: float, learning: float, profile: Profile) -> str:
    """The row of a cell of the grid of shares: ALLO itself at the profile's own share."""
    if forgetting == learning == profile.method.share:
        return REFERENCE
    return grid_name(forgetting, learning)


def key_row(share: float, profile: Profile) -> str:
    """The row of a share of key tokens: one that has a name of its own where there is one."""
    if share == 1:
        return "allo_all_tokens_learning"
    return REFERENCE if share == profile.method.key_share else key_name(share)


def rates_row(forgetting: float, learning: float) -> str:
    """The row of ALLO at its best rates times these factors."""
    return REFERENCE if forgetting == learning == 1 else rates_name(forgetting, learning)


def grid_cells(profile: Profile, methods: Collection[str]) -> dict[tuple[float, float], str]:
    """(share of forgetting, share of learning) -> row, of the cells that are among `methods`."""
    rows = {(a, b): cell(a, b, profile) for a in SHARES for b in SHARES}
    return {place: row for place, row in rows.items() if row in methods}


def rate_cells(methods: Collection[str]) -> dict[tuple[float, float], str]:
    """(factor of forgetting, factor of learning) -> row, of the cells that are among `methods`."""
    rows = {(a, b): rates_row(a, b) for a in FACTORS for b in FACTORS}
    return {place: row for place, row in rows.items() if row in methods}


def key_points(profile: Profile, methods: Collection[str]) -> dict[float, str]:
    """Share of key tokens -> row, of the points that are among `methods`."""
    rows = {share: key_row(share, profile) for share in KEY_SHARES}
    return {share: row for share, row in rows.items() if row in methods}


def models_of(method: str, profile: Profile) -> tuple[int, int]:
    """How many models a row trains, and in how many epochs of a stage altogether."""
    epochs = sum(stage.epochs for stage in stages_of(method, profile))
    fixed = method.endswith(PAPER_PROTOCOL) or relative_rates(method) is not None or not epochs
    models = 1 if fixed else profile.search.candidates
    return models, models * epochs


def cost(
    profile: Profile,
    rows: Iterable[str],
    done: Collection[str] = (),
    seconds_a_model: float = 4.0,
    seconds_an_epoch: float = 5.0,
) -> dict[str, float]:
    """What training rows costs: `rows`, `models`, `epochs`, and `seconds` of one core.

    done: rows that are there anyhow; a row of equal stages and equal search costs nothing again.
    The seconds are those of the miniature: to evaluate a model, and to train it for an epoch.
    """

    def identity(row: str):
        return stages_of(row, profile), row.endswith(PAPER_PROTOCOL), relative_rates(row)

    there = {identity(row) for row in done}
    new = {identity(row): row for row in rows if identity(row) not in there}
    counts = [models_of(row, profile) for row in new.values()]
    models, epochs = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    seconds = models * seconds_a_model + epochs * seconds_an_epoch
    return {"rows": len(new), "models": models, "epochs": epochs, "seconds": seconds}


def told_costs(profile: Profile) -> list[str]:
    """A line a figure: rows, models and core seconds, all of them and those that are asked for."""
    asks = (*profile.methods, *profile.ablations)
    lines = []
    for name, figure in figures_of(profile).items():
        extra = [row for row in figure.rows if row not in profile.methods]
        whole = cost(profile, extra, profile.methods)
        now = cost(profile, [row for row in extra if row in asks], profile.methods)
        lines.append(
            f"{name:14} all: {whole['rows']:3} rows, {whole['models']:3} models, "
            f"{whole['seconds']:5.0f} core seconds; asked for: {now['rows']} rows, "
            f"{now['models']} models, {now['seconds']:.0f} s"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(told_costs(load_profile(*sys.argv[1:2]))))
