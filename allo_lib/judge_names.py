"""Who judged: how `measurements.csv` tells it, and the sentence that tables say.

A row with the metric `judged_by:<kind>:<model>[+<8 hex digits of its weights>]` stands beside the
win rates of a seed on a data set, under the method that all are compared with. So tables name the
judge from measurements alone, and seeds that were judged by several judges are seen.
"""

import re
from collections.abc import Mapping

from allo_lib.comparisons import WIN, Domain, Index

JUDGED_BY = "judged_by:"
NOBODY = "no judge was named"
_WORDS = {
    "reward_model": "reward model",
    "judge_model": "judge model",
    "alpaca_eval": "AlpacaEval's program",
    "arena_hard": "Arena-Hard's program",
}


def metric_of(kind: str, note: Mapping) -> str:
    """The metric of a judge; `note` has its name (a hub id, or a folder, of which the last part
    counts) and, where they are known, the SHA-256 (hex) of its weights."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", str(note["name"]).rstrip("/").rpartition("/")[2]) or "_"
    weights = f"+{note['sha256'][:8]}" if note.get("sha256") else ""
    return f"{JUDGED_BY}{kind}:{name}{weights}"


def judges_of(index: Index, domain: Domain) -> dict[str, list[str]]:
    """Judge, in words -> seeds and data sets of the domain that it judged, such as `0 arena_hard`.

    Where all replies were the SFT model's own no weights were asked; they are not another judge.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for seed, _, dataset, metric in sorted(index):
        if metric.startswith(JUDGED_BY) and dataset in domain.datasets:
            name, _, weights = metric.removeprefix(JUDGED_BY).partition("+")
            found.setdefault(name, {}).setdefault(weights, []).append(f"{seed} {dataset}")
    for places in found.values():
        if "" in places and len(places) == 2:
            unasked = places.pop("")
            places[next(iter(places))] += unasked
    return {_words(name, w): places[w] for name, places in found.items() for w in places}


def _words(name: str, weights: str) -> str:
    kind, _, model = name.partition(":")
    told = f"{_WORDS.get(kind, kind)} `{model}`"
    return f"{told} (weights {weights})" if weights else told


def was_judged(index: Index, domain: Domain) -> bool:
    """Whether anything has a win rate on the domain's data sets."""
    return any(key[2] in domain.datasets and key[3] == domain.metric for key in index)


def sentence(index: Index, domain: Domain) -> str:
    """What win rates are and whose, for the caption of a table; "" for other measures."""
    if domain.prefix != WIN:
        return ""
    if not was_judged(index, domain):
        return f" Replies were written; {NOBODY} to compare them."
    found = judges_of(index, domain)
    told = "; ".join(found) or "not told"
    if len(found) > 1:
        each = [f"{judge} (seed and data set {', '.join(on)})" for judge, on in found.items()]
        told = f"several, and only what one of them judged compares: {'; '.join(each)}"
    return (
        " Win rate: the share of instructions on which the judge prefers the row's reply to that "
        "of the SFT model, which is at 50 by construction; a tie counts half. It says what this "
        f"judge prefers. Judge: {told}."
    )
