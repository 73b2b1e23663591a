"""The paper's claims C1-C10 and their verdicts, computed from outcomes and never typed in.

`verdicts` has the rule. C3 (no worse) takes a DPO that learned something (assay sensitivity, ICH
E10): nothing can be worse than a DPO that is not shown to beat the starting model, so that this is
part of what supports it. Likewise C9 takes a planted difference that is seen: where ALLO is not
shown to beat forgetting on exactly the tokens that the rewriter would keep, the choice of tokens
can make no difference that this study sees, and "no difference" between reward models says nothing.

A claim of several parts is followed by one row a part, as in `C2.dpo_last10`. Its own row has the
smallest of their effects, of those over several models if any are; the interval of that begins at
the lowest of their lower ends (the least decided part's) and ends at the lowest of their upper
ends, these held together (Bonferroni), so that it is on one side of zero where the p-values of
`verdicts.jointly` are below 5%.

C1-C3 tune each method by itself; C1p-C3p use the paper's protocol, one rate for
all. C2s and C3s ask what C2 and C3 do of methods with as many updates as ALLO makes in both stages;
they are secondary, corrected in a family of their own. C4s is primary. The first domain that was
measured has the plain ids; others add theirs, as in `C4:helpfulness`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from allo_lib.errors import AlloError
from allo_lib.evaluation.comparisons import Domain, StudyResults, paper_effect
from allo_lib.evaluation.outcomes import CHANCE_IN_TENSORS, REWARD, plain, read_csv, write_csv
from allo_lib.evaluation.stats import LEVEL, Interval, mean_interval
from allo_lib.evaluation.verdicts import (
    CONTRADICTED,
    MARGIN,
    POINTS,
    Claim,
    PValues,
    corrected,
    jointly,
    p_values,
)

Pair = tuple[str, str]  # of methods: the first against the second
Ends = tuple[float | None, float | None]  # of an interval


def _maybe(cell: str) -> float | None:
    return float(cell) if cell else None


# The columns of `claims.csv`, and how a cell of each is read.
COLUMNS = {"id": str, "claim": str, "effect": _maybe, "ci_low": _maybe, "ci_high": _maybe,
           "unit": str, "verdict": str, "evidence": str}  # fmt: skip
# Row -> quality of its reward model and how figures name it, from the least trained on.
REWARD_MODELS = {
    "allo_rm_untrained": ("untrained", "untrained"),
    "allo_rm_shuffled": ("shuffled", "shuffled targets"),
    "allo_rm_early": ("early", "1/4 of the examples"),
    "allo": ("trained", "trained"),
    "allo_rm_oracle": ("oracle", "oracle"),
}
# Forgetting on exactly the tokens that the rewriter would keep: a difference that must be seen.
INVERTED = "allo_rm_inverted"
BASELINES = ("sft", "rft", "rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c")
_OVERLAPS = ("orders", "halves", "estimators")
_LOSS = (
    "DPO on the top 10% of neurons has a lower loss on held-out pairs than on all, at equal steps"
)
_TOP = "DPO on the top 10% of neurons is more accurate than on all neurons and than on the last 10%"
_LAST = f"DPO on the last 10% of neurons is no worse than on all (margin {MARGIN:g})"
_OWN, _ONE = "each method tuned by itself", "the paper's protocol, one rate for all"
# Id, claim, kind ("above", "no worse", "lower loss" or "overlap"), pairs of methods to compare.
DECLARED: tuple[tuple[str, str, str, tuple[Pair, ...]], ...] = (
    ("C1", f"{_LOSS} ({_OWN})", "lower loss", (("dpo_top10", "dpo"),)),
    ("C1p", f"{_LOSS} ({_ONE})", "lower loss", (("dpo_top10_paper", "dpo_paper"),)),
    ("C2", f"{_TOP} ({_OWN})", "above", (("dpo_top10", "dpo"), ("dpo_top10", "dpo_last10"))),
    ("C2p", f"{_TOP} ({_ONE})", "above",
     (("dpo_top10_paper", "dpo_paper"), ("dpo_top10_paper", "dpo_last10_paper"))),
    ("C2s", "after twice the updates, DPO on the top 10% of neurons is more accurate than on all, "
     "on random and on the last 10%", "above",
     tuple(("dpo_top10_long", f"dpo{other}_long") for other in ("", "_random10", "_last10"))),
    ("C3", f"{_LAST} ({_OWN})", "no worse", (("dpo_last10", "dpo"),)),
    ("C3p", f"{_LAST} ({_ONE})", "no worse", (("dpo_last10_paper", "dpo_paper"),)),
    ("C3s", "after twice the updates, DPO on the last 10% of neurons is no worse than on all "
     f"(margin {MARGIN:g})", "no worse", (("dpo_last10_long", "dpo_long"),)),
    ("C4", "ALLO beats vanilla DPO on average (DPO with one epoch, half of ALLO's updates)",
     "above", (("allo", "dpo"),)),
    ("C4s", "ALLO beats a DPO that makes as many updates as its two stages together", "above",
     (("allo", "dpo_long"),)),
    ("C5", "ALLO beats every other baseline on average", "above",
     tuple(("allo", baseline) for baseline in BASELINES)),
    ("C6", "forgetting before learning helps (ALLO against learning alone, as many updates)",
     "above", (("allo", "allo_no_forgetting"),)),
    ("C7", "choosing tokens by rewards helps in each stage (ALLO against all tokens)", "above",
     (("allo", "allo_all_tokens_forgetting"), ("allo", "allo_all_tokens_learning"))),
    ("C8", "the masks of key neurons overlap above chance (orders, halves, estimators)",
     "overlap", ()),
    ("C9", "a better rewriting reward model gives a better aligned model", "above", ()),
)  # fmt: skip
_UNITS = {
    "lower loss": "held-out loss (reduction)",
    "overlap": "intersection over union above chance",
}
_C10 = "ALLO costs less than full optimisation with a dense mask (time, peak memory, state)"
_C10_UNIT = "ln(time of dense / time of ALLO)"
_ALONE = "one SFT model decides nothing"


@dataclass(frozen=True)
class Part:
    """One comparison inside a claim that was measured, if `interval` is not None.

    `key` names it behind the claim's id, `notes` are further sentences of its evidence; `p` is None
    where no verdict can rest on the interval.
    """

    key: str
    name: str
    interval: Interval | None
    p: PValues | None
    paper: float | None = None
    notes: tuple[str, ...] = ()


def compute(results: StudyResults, efficiency: Sequence[Mapping[str, str]] = ()) -> list[Claim]:
    """All claims, each with the rows of its parts, for every domain of the results, corrected for
    many comparisons; C10 from the efficiency table."""
    claims = []
    for position, domain in enumerate(results.domains or [Domain("no domain", ())]):
        suffix, here = f":{domain.name}" if position else "", results.on(domain)
        for number, text, kind, pairs in DECLARED:
            parts, notes = _parts(number, kind, pairs, here, domain)
            empty = Claim(number + suffix, text, unit=_UNITS.get(kind, domain.unit))
            claims += _rows(empty, domain, parts, notes, here)
    return corrected([*claims, efficiency_claim(efficiency)])


def by_architecture(results: StudyResults, names: Sequence[str]) -> dict[str, list[Claim]]:
    """The claims on the SFT models of each architecture, which seeds take in turn; not corrected
    for their number. {} where there is one architecture only."""
    if len(names) < 2:
        return {}
    turns = enumerate(names)
    each = {name: [s for s in results.fixed if s % len(names) == turn] for turn, name in turns}
    return {name: compute(results.of_models(seeds)) for name, seeds in each.items()}


def _parts(
    number: str, kind: str, pairs: Sequence[Pair], results: StudyResults, domain: Domain
) -> tuple[list[Part], list[str]]:
    """The parts of a claim and what else its evidence should say."""
    if kind == "overlap":
        return [_overlap_part(results, name, domain) for name in _OVERLAPS], []
    if kind == "lower loss":
        ((first, second),) = pairs
        gap = results.loss_reduction(first, second, domain)
        p = p_values(gap, _UNITS[kind], models=results.models)
        return [Part(second, f"held-out loss of {second} minus {first}", gap, p)], []
    if number == "C9":
        return _reward_parts(results, domain)
    parts = []
    for first, second in pairs:
        interval = results.compare(first, second, domain)
        bar, word = (-MARGIN, "no worse than") if kind == "no worse" else (0.0, "above")
        p = p_values(interval, domain.unit, bar, results.models)
        notes: tuple[str, ...] = ()
        if kind == "no worse" and p is not None:
            learned, notes = _sensitive(results, second.removesuffix("_paper"), domain)
            p = replace(p, above=max(p.above, learned), over=max(p.over, learned))
        if number == "C5" and (better := results.improvement(first, second, domain)):
            ends = f" [{better.low:.2f}, {better.high:.2f}]" if better.decides else ""
            notes = (f"probability of improvement over {second} {better.effect:.2f}{ends}",)
        paper = paper_effect(first, second, domain)
        parts.append(Part(second, f"{first} {word} {second}", interval, p, paper, notes))
    if number == "C5" and (known := _measured(parts)):
        strongest, _ = min(known, key=lambda one: (not one[1].decides, one[1].effect))
        some = " of those on several models" if not all(one.decides for _, one in known) else ""
        return parts, [f"strongest baseline{some}: {strongest.key}", *strongest.notes]
    if number != "C7":
        return parts, []
    _, caveat = _assay(results, domain)
    parts[0] = replace(parts[0], notes=caveat)  # of forgetting
    return parts, [*caveat, *_mentions(results, [("allo", "allo_random_tokens")], domain)]


def _reward_parts(results: StudyResults, domain: Domain) -> tuple[list[Part], list[str]]:
    """C9: a trend over three or more reward models, else ALLO against one with a worse one.

    Where three are there but not on the same SFT models, as in the middle of a run, nothing is.
    """
    order = [name for name in REWARD_MODELS if results.datasets_of(name, domain)]
    worse = [name for name in order if name not in ("allo", "allo_rm_oracle")]
    others = [("allo", name) for name in worse] + [("allo_rm_oracle", "allo")]
    # Neither untrained nor shuffled targets know anything of the task: they share the lowest rank.
    ranks = {name: max(0, place - 1) for place, name in enumerate(REWARD_MODELS)}
    if len(order) > 2:
        found = results.trend({name: ranks[name] for name in order}, "allo", domain)
        ranking = order[0]
        for before, name in pairwise(order):
            ranking += f" {'=' if ranks[before] == ranks[name] else '<'} {name}"
        name = f"rise from the worst to the best reward model ({ranking})"
    else:
        first, second = others.pop(0) if worse else ("allo", "allo_rm_shuffled")
        found, name = results.compare(first, second, domain), f"{first} above {second}"
    p = p_values(found, domain.unit, models=results.models)
    seen, notes = _assay(results, domain)
    if p is not None:
        p = replace(p, under=max(p.under, seen), over=max(p.over, seen))
    return [Part("", name, found, p)], [*notes, *_mentions(results, others, domain)]


def _assay(results: StudyResults, domain: Domain) -> tuple[float, tuple[str, ...]]:
    """The p-value of "the choice of tokens can be seen", and what to say where that is not shown:
    ALLO against forgetting on exactly the tokens that the rewriter would keep."""
    found = results.compare("allo", INVERTED, domain)
    p = p_values(found, domain.unit, models=results.models) or PValues()
    if p.above < 1 - LEVEL:
        return p.above, ()
    if found is None:
        return p.above, (f"planted check ({INVERTED}) not run: nothing tells what this assay sees",)
    gap = f"{size(found.effect, domain.unit)} points"
    return p.above, (
        "planted check: ALLO is not shown to beat forgetting on the tokens that the rewriter would "
        f"keep ({INVERTED}: {gap}), so this assay is insensitive to the choice of tokens",
    )


def _sensitive(
    results: StudyResults, reference: str, domain: Domain
) -> tuple[float, tuple[str, ...]]:
    """The p-value of "the reference learned something", and what to say where that is not shown."""
    learned = results.compare(reference, "sft_base", domain)
    right = results.score(reference, domain) if domain.prefix == REWARD else None
    if right is not None:  # the starting model ranks no pair: chance is what there is to beat
        above = {s: value - 0.5 for s, value in zip(right.seeds, right.by_seed, strict=True)}
        learned = mean_interval(above, dict(zip(right.seeds, right.errors, strict=True)))
    p = p_values(learned, domain.unit, models=results.models) or PValues()
    if p.above < 1 - LEVEL:
        return p.above, ()
    gap = "" if learned is None else f" ({size(learned.effect, domain.unit)} points)"
    return p.above, (f"{reference} itself is not shown to beat the starting model{gap}",)


def _overlap_part(results: StudyResults, name: str, domain: Domain) -> Part:
    """Against chance within each tensor: masks that only agree on tensors are no more stable."""
    interval = results.metric(name, "mask_overlap", domain.name, CHANCE_IN_TENSORS)
    p = p_values(interval, _UNITS["overlap"], models=results.models)
    note = "chance: of random masks as large in every tensor"
    return Part(name, f"masks of two {name}, overlap minus chance", interval, p, notes=(note,))


def _measured(parts: Sequence[Part]) -> list[tuple[Part, Interval]]:
    return [(part, part.interval) for part in parts if part.interval is not None]


# --- the rows of a claim, and its evidence in words ----------------------------------------------


def _rows(
    claim: Claim, domain: Domain, parts: Sequence[Part], notes: Sequence[str], results: StudyResults
) -> list[Claim]:
    """The claim's row, and one a part where it has several and some were measured."""
    measured, unit = _measured(parts), claim.unit
    missing = [part.name for part in parts if part.interval is None]
    lost = f"not measured: {', '.join(missing)}" if missing else ""
    if not measured:
        return [replace(claim, evidence=lost)]
    where = f"on {domain.name} ({', '.join(domain.datasets)})"
    # What only one SFT model of several has moves neither the smallest effect nor its interval.
    sure = [interval for _, interval in measured if interval.decides]
    if len(parts) == 1:
        ((part, interval),) = measured
        ends: Ends = (interval.low, interval.high) if interval.defined else (None, None)
        words, paper, held = [_tell(part, interval, unit, ends)], part.paper, []
    else:
        held, paper = [_held(interval, len(sure)) for _, interval in measured], None
        words = [_effect(part.name, interval.effect, ends, unit)
                for (part, interval), ends in zip(measured, held, strict=True)]  # fmt: skip
        alone = [part.key for part, interval in measured if not interval.decides]
        words += [f"{', '.join(alone)}: {_ALONE}"] if sure and alone else [_ALONE] * bool(alone)
    ways = dict.fromkeys(_how(interval, results) for _, interval in measured)
    low = min((interval.low for interval in sure), default=None)
    high = min((end for _, end in held if end is not None), default=sure[0].high if sure else None)
    rows = [replace(
        claim, effect=min(interval.effect for interval in sure or [one for _, one in measured]),
        ci_low=low, ci_high=high,
        evidence="; ".join(filter(None, [*words, *notes, where, *ways, lost])),
        p=jointly([part.p for part in parts]), paper=paper,
    )]  # fmt: skip
    number, colon, name = claim.id.partition(":")
    for (part, interval), ends in zip(measured, held, strict=bool(held)):
        own, (low, high) = (_tell(part, interval, unit, ends), where, _how(interval, results)), ends
        rows.append(Claim(
            f"{number}.{part.key}{colon}{name}", part.name, interval.effect, low, high, unit,
            evidence="; ".join(own), p=part.p, paper=part.paper,
        ))  # fmt: skip
    return rows


def _held(interval: Interval, count: int) -> Ends:
    """The interval that holds together with those of the other of `count` parts."""
    if not interval.decides:
        return None, None
    low, high = (min(max(end, -1.0), 1.0) for end in interval.ends(1 - (1 - LEVEL) / count))
    return low, high


def _effect(name: str, effect: float, ends: Ends, unit: str) -> str:
    """One part in words: its effect and interval."""
    known = ", ".join(size(end, unit) for end in ends if end is not None)
    words = f"{name}: {size(effect, unit)}" + (f" [{known}]" if known else "")
    return words + " points" * (unit in POINTS)


def _tell(part: Part, interval: Interval, unit: str, ends: Ends) -> str:
    """One part in words: effect, interval, each model's effect, and the paper's."""
    details = [_ALONE]
    if len(interval.by_seed) > 1:
        each = ", ".join(size(effect, unit) for effect in interval.by_seed)
        details = [f"by model {each}", f"SD {size(interval.seed_sd, unit).lstrip('+')}"]
    details += [] if part.paper is None else [f"paper {size(part.paper, unit)}"]
    words = "; ".join([*details, *filter(None, part.notes)])
    return f"{_effect(part.name, interval.effect, ends, unit)} ({words})"


def _how(interval: Interval, results: StudyResults) -> str:
    """How the interval was made, from which models and problems."""
    seeds, count = ", ".join(map(str, interval.seeds)), len(interval.seeds)
    way = f"{interval.kind}; seed{'s' * (count > 1)} {seeds}"
    if count < results.models:
        late = len(results.seeds) < results.models
        why = "so far, and no verdict before all" if late else "alone, on which no verdict rests"
        way = f"{count} of {results.models} models {why}; {way}"
    return f"{way}; n = {interval.n}" if interval.n else way


def _mentions(results: StudyResults, pairs: Sequence[Pair], domain: Domain) -> list[str]:
    """Comparisons beside those of a claim, in words."""
    return [
        "also " + _effect(f"{first} against {second}", gap.effect, (gap.low, gap.high), domain.unit)
        for first, second in pairs
        if (gap := results.compare(first, second, domain)) is not None
    ]


def size(value: float, unit: str) -> str:
    """An effect as text: in points where the unit is one of POINTS."""
    return f"{100 * value:+z.2f}" if unit in POINTS else f"{value:+z.4f}"


def effect_text(claim: Claim) -> tuple[str, str]:
    """Effect and interval as text: points for accuracies, the plain number for other units."""
    if claim.effect is None:
        return "not measured", ""
    words = size(claim.effect, claim.unit) + " points" * (claim.unit in POINTS)
    ends = [size(end, claim.unit)
            for end in (claim.ci_low, claim.ci_high) if end is not None]  # fmt: skip
    return words, f"[{', '.join(ends)}]" if ends else "none"


def protocol_disagreements(claims: Sequence[Claim]) -> list[str]:
    """One sentence for each claim whose verdict depends on who chose the learning rate."""
    by_id = {claim.id: claim for claim in claims}
    sentences = []
    for name, fair in by_id.items():
        number, colon, domain = name.partition(":")
        other = by_id.get(f"{number}p{colon}{domain}")
        if other is None or None in (fair.effect, other.effect):
            continue
        if other.verdict != fair.verdict:
            sentences.append(
                f"{name} is {fair.verdict} when each method is tuned by itself, "
                f"but {other.verdict} under the paper's single rate."
            )
    return sentences


def write(path: str | Path, claims: Iterable[Claim]) -> None:
    """Write `claims.csv`: six decimals, empty cells where nothing was measured, LF ends."""
    write_csv(path, COLUMNS, ([plain(getattr(one, name)) for name in COLUMNS] for one in claims))


def read(path: str | Path) -> list[Claim]:
    """The rows of a `claims.csv`; AlloError when it is missing, no text, or no such table."""
    return [Claim(*cells) for cells in read_csv(path, COLUMNS, "run notebook 06_evaluation first")]


# --- C10, what ALLO costs -------------------------------------------------------------------------

_NOISE = (0.05, 0.0)  # of the ratio of two peaks, and of two states


def efficiency_claim(table: Sequence[Mapping[str, str]]) -> Claim:
    """C10 of `tables/efficiency.csv`, which is of one device: `allo_scalar` against `dense_masked`.

    The effect is ln(dense time / ALLO time) for a pair, above zero when ALLO is faster. Its
    interval is Student's t over the processes, which ran in turns, so that the first of one is
    compared with the first of the other; one process of each decides nothing of time.
    To support the claim ALLO must also take less optimizer state and less peak memory, that by at
    least 5%: the peak of a process on a CPU differs by a few per cent from one to the next.
    """
    rows = {row["variant"]: row for row in table}
    pair = [rows.get(variant, {}) for variant in ("dense_masked", "allo_scalar")]
    if not all(pair) or pair[0]["device"] != pair[1]["device"]:
        text = "not measured: allo_scalar and dense_masked on one device"
        return Claim("C10", _C10, unit=_C10_UNIT, evidence=text)
    try:
        return _cost(*pair)
    except (ValueError, ArithmeticError) as error:
        device = pair[0]["device"]
        raise AlloError(f"efficiency table, {device}: {error}; measure it again") from None


def _cost(dense: Mapping[str, str], ours: Mapping[str, str]) -> Claim:
    """C10; ValueError or ArithmeticError for what cannot be a measurement."""
    columns = ("seconds_per_pair", "seconds_per_pair_each", "peak_bytes_above_model",
               "state_bytes_per_parameter")  # fmt: skip
    once, each, *lasting = (
        [[float(number) for number in (row.get(column) or "").split()] for row in (dense, ours)]
        for column in columns
    )
    (seconds,), (own,) = once
    words = [f"on {ours['device']}: time of allo_scalar over dense_masked {own / seconds:.3f}"]
    less = []  # whether ALLO takes less; None where that is not known
    for pair, what, noise in zip(lasting, ("peak memory", "optimizer state"), _NOISE, strict=True):
        known = [other[0] / one[0] for one, other in [pair] if one and other and one[0] * other[0]]
        words.append(f"{what} {known[0]:.3f}" if known else f"{what} not measured")
        less.append(known[0] < 1 if known and abs(known[0] - 1) >= noise else None)
    claim = Claim("C10", _C10, math.log(seconds / own), unit=_C10_UNIT)
    if len(each[0]) == len(each[1]) > 1:
        ratios = [math.log(first / second) for first, second in zip(*each, strict=True)]
        found = mean_interval(dict(enumerate(ratios)))
        words.append(f"t interval over {len(ratios)} processes of each, in turns")
        claim = replace(claim, effect=found.effect, p=p_values(found, _C10_UNIT))
        if found.defined:
            claim = replace(claim, ci_low=found.low, ci_high=found.high)
    else:
        words.append("one process of each, which tells no spread")
    if False in less:
        claim = replace(claim, verdict=CONTRADICTED, p=None)
    elif None in less and claim.p is not None:
        claim = replace(claim, p=replace(claim.p, above=1.0))
    return replace(claim, evidence=", ".join(words))
