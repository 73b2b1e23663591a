"""The paper's claims C1-C10 and their verdicts, computed from measurements and never typed in.

`verdicts` has the rule; of several parts the paper's smallest effect is the one that counts. C3
(no worse) takes a DPO that learned something (assay sensitivity, ICH E10): where DPO is not shown
to beat the starting model, nothing could have been worse than it, and `reproduced` becomes
`inconclusive`.

A claim of several parts needs all of them: its verdict is the weakest part's, which is the one
shown (of equals, the smallest effect). To reproduce such a conjunction takes no correction
for its parts (Berger 1982, intersection-union test); to refute it by any
of k parts does, so the p-value of `not reproduced` is k times the smallest. Verdicts in
`claims.csv` are those of the intervals; which of them survive Holm's correction over all claims is
in `tables/claims_holm.csv` (`corrected`).

Training losses (C1, C1p) are compared step by step, as both arms read the same pairs in the same
order. C1-C3 give each arm its own best learning rate; C1p-C3p use the paper's protocol, one rate
for all.
The first domain that was measured has the plain ids; others add theirs, as in `C4:helpfulness`.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from allo_lib import published
from allo_lib.comparisons import (
    Domain,
    compare,
    domains_of,
    index_of,
    metric_by_seed,
    metric_difference,
    paper_effect,
    shared_names,
)
from allo_lib.cost_claims import efficiency_claims
from allo_lib.declared import BASELINES, DECLARED, Declared, loss_pairs, wanted_pairs
from allo_lib.errors import AlloError
from allo_lib.measurements import LOSS_GAP, Measurement
from allo_lib.multiple import holm
from allo_lib.stats import WIDE, Interval, difference_interval, mean_interval
from allo_lib.verdicts import (
    INCONCLUSIVE,
    MARGIN,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    after,
    deciding_p,
    judge,
    p_values,
)

__all__ = [
    "BASELINES",
    "COLUMNS",
    "DECLARED",
    "INCONCLUSIVE",
    "MARGIN",
    "NOT_REPRODUCED",
    "REPRODUCED",
    "Claim",
    "compute",
    "corrected",
    "efficiency_claims",
    "judge",
    "loss_pairs",
    "protocol_disagreements",
    "read",
    "wanted_pairs",
    "write",
]
COLUMNS = tuple(field.name for field in fields(Claim) if field.name != "p")
# From weakest to strongest, for claims of several parts.
_ORDER = (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED)
_POINTS = {"accuracy", "held-out reward accuracy", "win rate"}
_OVERLAPS = ("orders", "halves", "estimators")
# C9 compares with the first of these that was measured, and mentions the others.
_WORSE_REWARDS = ("allo_rm_shuffled", "allo_rm_untrained", "allo_rm_early")


@dataclass(frozen=True)
class Part:
    """One comparison inside a claim, with its own verdict; `interval` None when not measured.

    `p` holds the p-values of `reproduced` and of `not reproduced`.
    """

    name: str
    interval: Interval | None
    verdict: str
    paper: float | None = None
    reason: str = ""
    p: tuple[float, float] = (1.0, 1.0)


def compute(
    rows: Sequence[Measurement],
    efficiency: Sequence[Mapping[str, str]] = (),
    paper_dir: str | Path | None = None,
) -> list[Claim]:
    """All claims, in order, for every domain that `rows` has; C10 from the efficiency table."""
    paper = published.main_results(paper_dir), published.empirical_study(paper_dir)
    index = index_of(rows)
    claims = []
    for position, domain in enumerate(domains_of(rows)):
        shared = shared_names(rows, domain)
        suffix = f":{domain.name}" if position else ""
        for declared in DECLARED:
            parts, notes = _parts(declared, domain, index, shared, paper)
            claims.append(_claim(declared, domain, parts, notes, suffix))
    return claims + efficiency_claims(efficiency)


def _parts(declared, domain, index, shared, paper) -> tuple[list[Part], list[str]]:
    """The parts of a claim and what else its evidence should say."""
    if declared.id == "C8":
        return [_overlap_part(index, name, domain, shared) for name in _OVERLAPS], []
    pairs, notes = declared.pairs, []
    if declared.id == "C9":
        measured = {key[1] for key in index}
        present = [name for name in _WORSE_REWARDS if name in measured] or list(_WORSE_REWARDS[:1])
        pairs = (("allo", present[0]),)
        notes = [("allo", name) for name in present[1:]] + [("allo_rm_oracle", "allo")]
    if declared.id == "C7":
        notes = [("allo", "allo_random_tokens")]
    told = [_mention(*pair, compare(index, *pair, domain), domain.unit) for pair in notes]
    if declared.kind == "lower loss":
        return [_loss_part(index, *pair, domain, shared) for pair in pairs], []
    effects = [paper_effect(paper, *pair, domain) for pair in pairs]
    # One bar for the whole claim: a baseline that failed in the paper must not raise it.
    smallest = min((effect for effect in effects if effect is not None), default=None)
    word = "above" if declared.kind == "above" else "no worse than"
    parts = []
    for (first, second), effect in zip(pairs, effects, strict=True):
        interval = compare(index, first, second, domain)
        verdict, reason = judge(interval, declared.kind, smallest)
        p = p_values(interval, declared.kind, smallest)
        if declared.kind == "no worse" and verdict == REPRODUCED:
            reference = second.removesuffix("_paper")
            verdict, reason, least = _sensitive(index, reference, domain, shared)
            p = max(p[0], least), p[1]
        parts.append(Part(f"{first} {word} {second}", interval, verdict, effect, reason, p))
    return parts, [text for text in told if text]


def _sensitive(index, reference: str, domain: Domain, shared) -> tuple[str, str, float]:
    """The verdict on "no worse than reference" where the interval allows it, why, and its p."""
    if domain.prefix:  # the starting model ranks no pair: chance is what there is to beat
        right = metric_by_seed(index, reference, domain.metric, domain, shared)
        values = {seed: value[:2] for seed, value in right.items()}
        chance = dict.fromkeys(values, (0.5, 0.0))
        learned = difference_interval(values, chance) if values else None
    else:
        learned = compare(index, reference, "sft_base", domain)
    if learned is not None and learned.defined and learned.low > 0:
        return REPRODUCED, "", learned.p_at_most(0.0)
    size = "" if learned is None else f" ({_size(learned.effect, domain.unit)} points)"
    reason = f"{reference} itself is not shown to beat the starting model{size}"
    return INCONCLUSIVE, reason, 1.0


def _loss_part(index, first, second, domain, shared) -> Part:
    sides = (second, "train_loss"), (first, "train_loss")
    interval = metric_difference(index, *sides, domain, shared)
    gaps = metric_by_seed(index, first, f"{LOSS_GAP}{second}", domain, shared)
    if interval is not None and interval.seeds == tuple(gaps):
        values, stderrs, steps = zip(*gaps.values(), strict=True)
        values = dict(zip(gaps, (-value for value in values), strict=True))
        stderrs = dict(zip(gaps, stderrs, strict=True))
        interval = mean_interval(values, stderrs, sum(steps), few=True)
    return _plain_part(f"loss of {second} minus {first}", interval)


def _overlap_part(index, name, domain, shared) -> Part:
    sides = (name, "mask_overlap"), (name, "mask_overlap_chance")
    interval = metric_difference(index, *sides, domain, shared)
    if interval is not None:
        interval = replace(interval, n=0)  # the count of neurons is no sample size
    return _plain_part(f"masks of two {name}, overlap minus chance", interval)


def _plain_part(name: str, interval: Interval | None) -> Part:
    """A part to which the paper has no number."""
    verdict, reason = judge(interval, "above")
    return Part(name, interval, verdict, None, reason, p_values(interval, "above"))


def _claim(declared: Declared, domain: Domain, parts: list[Part], notes, suffix: str) -> Claim:
    unit = domain.unit
    if declared.kind == "lower loss":
        unit = "training loss (reduction)"
    if declared.kind == "overlap":
        unit = "intersection over union above chance"
    measured = [part for part in parts if part.interval is not None]
    missing = [part.name for part in parts if part.interval is None]
    name, text = declared.id + suffix, declared.text
    lost = f"not measured: {', '.join(missing)}" if missing else ""
    if not measured:
        return Claim(name, text, None, None, None, unit, INCONCLUSIVE, lost)
    shown = min(measured, key=lambda part: (_ORDER.index(part.verdict), part.interval.effect))
    verdict = shown.verdict
    if missing and verdict == REPRODUCED:
        verdict = INCONCLUSIVE
    where = f"on {domain.name} ({', '.join(domain.datasets)})"
    evidence = [_tell(part, unit) for part in measured]
    evidence += [*notes, where, _how(measured), lost]
    effect, low, high = shown.interval.effect, shown.interval.low, shown.interval.high
    if not shown.interval.defined:
        low = high = None
    told = "; ".join(text for text in evidence if text)
    return Claim(name, text, effect, low, high, unit, verdict, told, _p(verdict, parts))


def _p(verdict: str, parts: Sequence[Part]) -> float | None:
    """The p-value of a claim's verdict; parts that were not measured support nothing."""
    known = [part for part in parts if part.interval is not None and part.interval.defined]
    if not known:
        return None
    support = max(part.p[0] for part in parts)
    refute = min(1.0, len(known) * min(part.p[1] for part in known))
    return deciding_p(verdict, support, refute)


def corrected(claims: Sequence[Claim]) -> list[tuple[float | None, str]]:
    """Holm's adjusted p-value of each claim and the verdict that is left; over all with a p."""
    places = [place for place, claim in enumerate(claims) if claim.p is not None]
    values = holm([claims[place].p for place in places])
    adjusted = dict(zip(places, values, strict=True))
    return [
        (adjusted.get(place), after(claim.verdict, adjusted.get(place)))
        for place, claim in enumerate(claims)
    ]


def _tell(part: Part, unit: str) -> str:
    """One part in words: effect, interval, each seed's effect, and the paper's."""
    interval = part.interval
    words = f"{part.name}: {_size(interval.effect, unit)}"
    if interval.defined:
        words += f" [{_size(interval.low, unit)}, {_size(interval.high, unit)}]"
    if unit in _POINTS:
        words += " points"
    details = []
    if len(interval.seeds) > 1:
        details.append("by seed " + ", ".join(_size(effect, unit) for effect in interval.by_seed))
    if interval.spread > WIDE:
        details.append(f"seeds differ {interval.spread:.1f} times more than problems explain")
    if len(interval.seeds) == 1:
        details.append("one seed: other seeds may differ by more than this interval")
    details.append("" if part.paper is None else f"paper {_size(part.paper, unit)}")
    details.append(part.reason)
    details = "; ".join(detail for detail in details if detail)
    return f"{words} ({details})" if details else words


def _how(parts: Sequence[Part]) -> str:
    """How the intervals were made, from which seeds and problems; once where they agree."""
    ways = {}
    for part in parts:
        interval = part.interval
        seeds = ", ".join(map(str, interval.seeds))
        way = f"{interval.kind}; seed{'s' * (len(interval.seeds) > 1)} {seeds}"
        way += f"; n = {interval.n}" if interval.n else ""
        ways.setdefault(way, []).append(part.name)
    if len(ways) == 1:
        return next(iter(ways))
    return "; ".join(f"{', '.join(names)}: {way}" for way, names in ways.items())


def _mention(first: str, second: str, interval: Interval | None, unit: str) -> str:
    if interval is None:
        return ""
    ends = f"[{_size(interval.low, unit)}, {_size(interval.high, unit)}]"
    return f"also {first} against {second}: {_size(interval.effect, unit)} {ends} points"


def _size(value: float, unit: str) -> str:
    return f"{100 * value:+z.2f}" if unit in _POINTS else f"{value:+z.4f}"


def protocol_disagreements(claims: Sequence[Claim]) -> list[str]:
    """One sentence for each claim whose verdict depends on who chose the learning rate."""
    by_id = {claim.id: claim for claim in claims}
    sentences = []
    for name, fair in by_id.items():
        number, _, domain = name.partition(":")
        other = by_id.get(f"{number}p" + (f":{domain}" if domain else ""))
        if other is not None and other.verdict != fair.verdict:
            sentences.append(
                f"{name} is {fair.verdict} when each arm has its own best learning rate, "
                f"but {other.verdict} under the paper's single rate."
            )
    return sentences


def write(path: str | Path, claims: Iterable[Claim]) -> None:
    """Write `claims.csv`: six decimals, empty cells where nothing was measured, LF ends."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for claim in claims:
        cells = [getattr(claim, column) for column in COLUMNS]
        writer.writerow([f"{cell:z.6f}" if isinstance(cell, float) else cell for cell in cells])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(buffer.getvalue().encode("utf-8"))


def read(path: str | Path) -> list[Claim]:
    """The rows of a `claims.csv`; AlloError when it is missing, no text, or no such table."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise AlloError(f"{path} cannot be read: run notebook 06_evaluation first") from None
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        raise AlloError(f"{path} is no CSV file: run notebook 06_evaluation again") from None
    if tuple(header) != COLUMNS:
        found = ",".join(header)[:80]
        raise AlloError(f"{path} has columns {found}: expected {','.join(COLUMNS)}")
    return [_claim_of(cells, f"{path} line {line}") for line, cells in enumerate(lines, 2)]


def _claim_of(cells: list[str], where: str) -> Claim:
    if len(cells) != len(COLUMNS):
        raise AlloError(f"{where} has {len(cells)} cells: expected {len(COLUMNS)}")
    try:
        numbers = [float(cell) if cell else None for cell in cells[2:5]]
    except ValueError as error:
        raise AlloError(f"{where} has a cell that is not a number ({error})"[:200]) from None
    return Claim(*cells[:2], *numbers, *cells[5:])
