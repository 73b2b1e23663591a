"""Which rows make which figure of 05_ablations.

A figure is drawn where a profile asks for one of the rows that it is about: its *own* rows. Others,
such as ALLO itself, only stand beside them.
"""

from collections.abc import Collection, Iterable
from typing import TypeVar

from allo_lib.evaluation.published import arm_label
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import ESTIMATORS, GRID, KEY_REFERENCE, KEYS, RATES

Place = TypeVar("Place")
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
# Rows of the main table and of `tiny` that only stand beside the own rows of a figure.
_BESIDE = {
    "allo", "allo_no_forgetting", "allo_no_learning", "allo_all_tokens_forgetting",
    "allo_all_tokens_learning", "allo_rm_shuffled", "allo_rm_oracle",
}  # fmt: skip
# Figure, by its name in the files of 05_ablations -> its rows.
ROWS = {
    "masks": ("allo_random_neurons", "allo_last_neurons", "allo_all_neurons", "allo_rows",
              "allo_per_tensor"),
    "scores": tuple(f"allo_scores_{word.replace('.', 'p')}" for word in ESTIMATORS),
    "token_rules": ("allo_soft", "allo_released", "allo_all_tokens_forgetting",
                    "allo_random_tokens", "allo_oracle_tokens", KEY_REFERENCE,
                    "allo_all_tokens_learning"),
    "order": ("allo_reversed", "allo_merged", "allo_no_forgetting", "allo_no_learning"),
    "reward_models": tuple(REWARD_MODELS),
    "neurons": tuple(GRID.values()),
    "key_tokens": tuple(KEYS.values()),
    "rates": tuple(RATES.values()),
}  # fmt: skip


_SWEPT = {*GRID.values(), *KEYS.values(), *RATES.values()}


def grid_cells(profile: Profile, methods: Collection[str]) -> dict[tuple[float, float], str]:
    """(share of forgetting, share of learning) -> row, of the cells that are among `methods`."""
    own = profile.method.share, profile.method.share  # at which a row of the grid is ALLO itself
    return _among(methods, {place: "allo" if place == own else row for place, row in GRID.items()})


def key_points(profile: Profile, methods: Collection[str]) -> dict[float, str]:
    """Share of key tokens -> row, of the points that are among `methods`."""
    named = {profile.method.key_share: "allo", 1.0: "allo_all_tokens_learning"}
    return _among(methods, {share: named.get(share, row) for share, row in KEYS.items()})


def rate_cells(methods: Collection[str]) -> dict[tuple[float, float], str]:
    """(factor of forgetting, factor of learning) -> row, of the cells that are among `methods`."""
    return _among(methods, RATES | {(1.0, 1.0): "allo"})


def _among(methods: Collection[str], rows: dict[Place, str]) -> dict[Place, str]:
    return {place: row for place, row in rows.items() if row in methods}


def asked(figure: str, profile: Profile, methods: Collection[str]) -> dict[str, str]:
    """Row -> label of those rows of a figure that are among `methods`; none without an own one."""
    sweeps = {
        "neurons": [*grid_cells(profile, methods).values()],
        "key_tokens": [*key_points(profile, methods).values()],
        "rates": [*rate_cells(methods).values()],
    }
    rows = sweeps.get(figure, [*ROWS[figure]])
    if not set(rows) & set(methods) - _BESIDE:
        return {}
    labels = {row: label for row, (_, label) in REWARD_MODELS.items()}
    short = labels if figure == "reward_models" else {}
    return {row: short.get(row, arm_label(row)) for row in rows if row in methods}


def single_changes(methods: Iterable[str]) -> list[str]:
    """Rows that change one part of ALLO, or as the official code does, without points of sweeps."""
    return [
        method for method in methods
        if method.startswith("allo_") and (method in OFFICIAL or method not in _SWEPT)
    ]  # fmt: skip
