"""What the paper claims, C1-C9, as pairs of methods to compare; `claims` gives the verdicts.

C2s and C3s ask what C2 and C3 do of arms with as many updates as ALLO makes in both stages, at
their own best rates; they are secondary, corrected in a family of their own. C4s is primary.
"""

from dataclasses import dataclass

from allo_lib.evaluation.verdicts import MARGIN

BASELINES = ("sft", "rft", "rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c")


@dataclass(frozen=True)
class Declared:
    """A claim about methods: `kind` is "above", "no worse", "lower loss" or "overlap"."""

    id: str
    text: str
    kind: str
    pairs: tuple[tuple[str, str], ...]


_TOP_LOSS = (
    "DPO on the top 10% of neurons has a lower loss on held-out pairs than on all, at equal steps"
)
_TOP = "DPO on the top 10% of neurons is more accurate than on all neurons and than on the last 10%"
_LAST = f"DPO on the last 10% of neurons is no worse than on all (margin {MARGIN:g})"
_OWN, _ONE = "each arm at its own best learning rate", "the paper's protocol, one rate for all"
DECLARED = (
    Declared("C1", f"{_TOP_LOSS} ({_OWN})", "lower loss", (("dpo_top10", "dpo"),)),
    Declared("C1p", f"{_TOP_LOSS} ({_ONE})", "lower loss", (("dpo_top10_paper", "dpo_paper"),)),
    Declared(
        "C2", f"{_TOP} ({_OWN})", "above", (("dpo_top10", "dpo"), ("dpo_top10", "dpo_last10"))
    ),
    Declared(
        "C2p",
        f"{_TOP} ({_ONE})",
        "above",
        (("dpo_top10_paper", "dpo_paper"), ("dpo_top10_paper", "dpo_last10_paper")),
    ),
    Declared(
        "C2s",
        "after twice the updates, DPO on the top 10% of neurons is more accurate than on all, "
        "on random and on the last 10%",
        "above",
        tuple(("dpo_top10_long", f"dpo{arm}_long") for arm in ("", "_random10", "_last10")),
    ),
    Declared("C3", f"{_LAST} ({_OWN})", "no worse", (("dpo_last10", "dpo"),)),
    Declared("C3p", f"{_LAST} ({_ONE})", "no worse", (("dpo_last10_paper", "dpo_paper"),)),
    Declared(
        "C3s",
        "after twice the updates, DPO on the last 10% of neurons is no worse than on all "
        f"(margin {MARGIN:g})",
        "no worse",
        (("dpo_last10_long", "dpo_long"),),
    ),
    Declared(
        "C4",
        "ALLO beats vanilla DPO on average (DPO with one epoch, half of ALLO's updates)",
        "above",
        (("allo", "dpo"),),
    ),
    Declared(
        "C4s",
        "ALLO beats a DPO that makes as many updates as its two stages together",
        "above",
        (("allo", "dpo_long"),),
    ),
    Declared(
        "C5",
        "ALLO beats every other baseline on average",
        "above",
        tuple(("allo", baseline) for baseline in BASELINES),
    ),
    Declared(
        "C6",
        "forgetting before learning helps (ALLO against learning alone, as many updates)",
        "above",
        (("allo", "allo_no_forgetting"),),
    ),
    Declared(
        "C7",
        "choosing tokens by rewards helps in each stage (ALLO against all tokens)",
        "above",
        (("allo", "allo_all_tokens_forgetting"), ("allo", "allo_all_tokens_learning")),
    ),
    Declared(
        "C8",
        "the masks of key neurons are stable (orders, halves, estimators)",
        "overlap",
        (),
    ),
    Declared("C9", "a better rewriting reward model gives a better aligned model", "above", ()),
)
