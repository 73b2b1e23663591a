"""The paper's claims C1-C10 and their verdicts, computed from measurements and never typed in.

Every effect is turned so that a positive number supports the claim. Verdicts:

- *superiority* (all claims but C3): `reproduced` when the 95% interval lies above zero;
  `not reproduced` when it lies below zero, or when it ends below half the paper's own effect on the
  same data sets (the smallest effect of interest; of several parts the smallest), where the paper
  publishes one; else `inconclusive`.
- *no worse* (C3): `reproduced` when the interval lies above minus MARGIN, `not reproduced` when it
  lies below it, else `inconclusive`. It takes a DPO that learned something (assay sensitivity, ICH
  E10): where DPO is not shown to beat the starting model, nothing could have been worse than it,
  and `reproduced` becomes `inconclusive`.
- a claim of several parts needs all of them: its verdict is the weakest part's, which is the one
  shown (of equals, the smallest effect). Such a conjunction needs no correction for multiplicity
  (Berger 1982, intersection-union test); the claims themselves are not corrected for one another.

Training losses (C1, C1p) are compared step by step, as both arms read the same pairs in the same
order. C1-C3 give each arm its own best learning rate; C1p-C3p use the paper's protocol, one rate
for all.
The first domain that was measured has the plain ids; others add theirs, as in `C4:helpfulness`.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from allo_lib import published
from allo_lib.comparisons import (
    Domain,
    compare,
    domains_of,
    index_of,
    metric_by_seed,
    metric_difference,
    shared_names,
)
from allo_lib.errors import AlloError
from allo_lib.measurements import LOSS_GAP, Measurement
from allo_lib.stats import WIDE, Interval, difference_interval, log_ratio_interval, mean_interval

MARGIN = 0.02  # C3: a loss of accuracy below two points counts as no worse
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
# From weakest to strongest, for claims of several parts.
_ORDER = (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED)
BASELINES = ("sft", "rft", "rdpo", "ipo", "bco", "simpo", "npo", "ppo", "a2c")
_POINTS = {"accuracy", "held-out reward accuracy"}


@dataclass(frozen=True)
class Claim:
    """One row of `claims.csv`; `effect` and the interval are None where nothing was measured."""

    id: str
    claim: str
    effect: float | None
    ci_low: float | None
    ci_high: float | None
    unit: str
    verdict: str
    evidence: str


COLUMNS = tuple(field.name for field in fields(Claim))


@dataclass(frozen=True)
class Declared:
    """A claim about methods: `kind` is "above", "no worse" or "lower loss"."""

    id: str
    text: str
    kind: str
    pairs: tuple[tuple[str, str], ...]


_TOP_LOSS = (
    "DPO on the top 10% of neurons ends at a lower training loss than on all, at equal steps"
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
    Declared("C3", f"{_LAST} ({_OWN})", "no worse", (("dpo_last10", "dpo"),)),
    Declared("C3p", f"{_LAST} ({_ONE})", "no worse", (("dpo_last10_paper", "dpo_paper"),)),
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
_OVERLAPS = ("orders", "halves", "estimators")
# C9 compares with the first of these that was measured, and mentions the others.
_WORSE_REWARDS = ("allo_rm_shuffled", "allo_rm_untrained", "allo_rm_early")


@dataclass(frozen=True)
class Part:
    """One comparison inside a claim, with its own verdict; `interval` None when not measured."""

    name: str
    interval: Interval | None
    verdict: str
    paper: float | None = None
    reason: str = ""


def wanted_pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """The (method, baseline) pairs of `methods` whose paired counts claims and tables want.

    Every method against `dpo` and `allo`, and what the declared claims compare.
    """
    methods = list(dict.fromkeys(methods))
    wanted = [pair for declared in DECLARED for pair in declared.pairs]
    for baseline in ("dpo", "allo"):
        wanted += [(method, baseline) for method in methods if method != baseline]
    kept = [pair for pair in dict.fromkeys(wanted) if set(pair) <= set(methods)]
    # One direction is enough: the other one is its mirror image.
    return [pair for i, pair in enumerate(kept) if pair[::-1] not in kept[:i]]


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
    effects = [_paper_effect(paper, *pair, domain) for pair in pairs]
    # One bar for the whole claim: a baseline that failed in the paper must not raise it.
    smallest = min((effect for effect in effects if effect is not None), default=None)
    word = "above" if declared.kind == "above" else "no worse than"
    parts = []
    for (first, second), effect in zip(pairs, effects, strict=True):
        interval = compare(index, first, second, domain)
        verdict, reason = judge(interval, declared.kind, smallest)
        if declared.kind == "no worse" and verdict == REPRODUCED:
            verdict, reason = _sensitive(index, second.removesuffix("_paper"), domain, shared)
        parts.append(Part(f"{first} {word} {second}", interval, verdict, effect, reason))
    return parts, [text for text in told if text]


def _sensitive(index, reference: str, domain: Domain, shared) -> tuple[str, str]:
    """The verdict on "no worse than reference" where the interval allows it."""
    if domain.prefix:  # the starting model ranks no pair: chance is what there is to beat
        right = metric_by_seed(index, reference, "reward_accuracy", domain, shared)
        values = {seed: value[:2] for seed, value in right.items()}
        chance = dict.fromkeys(values, (0.5, 0.0))
        learned = difference_interval(values, chance) if values else None
    else:
        learned = compare(index, reference, "sft_base", domain)
    if learned is not None and learned.defined and learned.low > 0:
        return REPRODUCED, ""
    size = "" if learned is None else f" ({_size(learned.effect, domain.unit)} points)"
    return INCONCLUSIVE, f"{reference} itself is not shown to beat the starting model{size}"


def loss_pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """The (method, baseline) pairs of `methods` whose training losses are compared."""
    methods = set(methods)
    declared = [pair for one in DECLARED if one.kind == "lower loss" for pair in one.pairs]
    return [pair for pair in declared if set(pair) <= methods]


def _loss_part(index, first, second, domain, shared) -> Part:
    sides = (second, "train_loss"), (first, "train_loss")
    interval = metric_difference(index, *sides, domain, shared)
    gaps = metric_by_seed(index, first, f"{LOSS_GAP}{second}", domain, shared)
    if interval is not None and interval.seeds == tuple(gaps):
        values, stderrs, steps = zip(*gaps.values(), strict=True)
        values = dict(zip(gaps, (-value for value in values), strict=True))
        stderrs = dict(zip(gaps, stderrs, strict=True))
        interval = mean_interval(values, stderrs, sum(steps), few=True)
    return Part(f"loss of {second} minus {first}", interval, *_named(judge(interval, "above")))


def _overlap_part(index, name, domain, shared) -> Part:
    sides = (name, "mask_overlap"), (name, "mask_overlap_chance")
    interval = metric_difference(index, *sides, domain, shared)
    if interval is not None:
        interval = replace(interval, n=0)  # the count of neurons is no sample size
    return Part(
        f"masks of two {name}, overlap minus chance", interval, *_named(judge(interval, "above"))
    )


def _named(verdict_and_reason: tuple[str, str]) -> tuple[str, None, str]:
    return verdict_and_reason[0], None, verdict_and_reason[1]


def _paper_effect(paper, first: str, second: str, domain: Domain) -> float | None:
    """The paper's effect on the same data sets; on all of its own for the miniature."""
    main, empirical = paper
    first, second = first.removesuffix("_paper"), second.removesuffix("_paper")
    if domain.name in ("miniature", "other"):
        datasets = published.QUESTIONS + published.MATHS
    else:
        datasets = domain.datasets
    table = main if {first, second} <= set(main) else empirical
    return published.difference(table, first, second, datasets)


def judge(interval: Interval | None, kind: str, paper: float | None = None) -> tuple[str, str]:
    """The verdict on one effect and the reason where it is not plain from the interval.

    The rule stands at the top of this module. `kind` is "above" or "no worse".
    """
    if interval is None or not interval.defined:
        return INCONCLUSIVE, ""
    bar = -MARGIN if kind == "no worse" else 0.0
    half = paper / 2 if kind == "above" and paper and paper > 0 else None
    if interval.low > bar:
        small = half is not None and interval.high < half
        return REPRODUCED, "the sign holds, at less than half the paper's size" if small else ""
    if interval.high < bar:
        return NOT_REPRODUCED, ""
    if half is not None and interval.high < half:
        return NOT_REPRODUCED, "the interval ends below half the paper's effect"
    return INCONCLUSIVE, ""


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
    return Claim(name, text, effect, low, high, unit, verdict, told)


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
    return f"{100 * value:+.2f}" if unit in _POINTS else f"{value:+.4f}"


def efficiency_claims(table: Sequence[Mapping[str, str]]) -> list[Claim]:
    """C10 for every device of `tables/efficiency.csv`: `allo_scalar` against `dense_masked`.

    The effect is ln(dense time / ALLO time) for a pair, above zero when ALLO is faster. Its
    interval needs the columns `seconds_per_pair_low` and `seconds_per_pair_high`. `reproduced` asks
    for a time interval above zero and for less peak memory and less optimizer state.
    """
    by_device: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in table:
        by_device.setdefault(row["device"], {})[row["variant"]] = row
    claims = []
    for device, variants in by_device.items():
        if {"allo_scalar", "dense_masked"} <= set(variants):
            suffix = f":{device}" if claims else ""
            claims.append(_efficiency_claim(device, variants, suffix))
    text = "not measured: allo_scalar and dense_masked on one device"
    return claims or [Claim("C10", _C10, None, None, None, _C10_UNIT, INCONCLUSIVE, text)]


_C10 = "ALLO costs less than full optimisation with a dense mask (time, peak memory, state)"
_C10_UNIT = "ln(time of dense / time of ALLO)"


def _efficiency_claim(device: str, variants, suffix: str) -> Claim:
    ours, dense = variants["allo_scalar"], variants["dense_masked"]
    seconds = [_number(row, "seconds_per_pair") for row in (dense, ours)]
    effect = math.log(seconds[0] / seconds[1])
    ends = [
        (_number(row, "seconds_per_pair_low"), _number(row, "seconds_per_pair_high"))
        for row in (dense, ours)
    ]
    interval = None
    if not any(math.isnan(end) for pair in ends for end in pair):
        interval = log_ratio_interval((seconds[0], *ends[0]), (seconds[1], *ends[1]))
    verdict, _ = judge(interval, "above")
    words = [f"on {device}: time of allo_scalar over dense_masked {seconds[1] / seconds[0]:.3f}"]
    for column, name in (
        ("peak_bytes_above_model", "peak memory"),
        ("state_bytes_per_parameter", "optimizer state"),
    ):
        pair = [_number(row, column) for row in (ours, dense)]
        known = not any(map(math.isnan, pair)) and pair[1] > 0
        words.append(f"{name} {pair[0] / pair[1]:.3f}" if known else f"{name} not measured")
        if verdict == REPRODUCED and not (known and pair[0] < pair[1]):
            verdict = NOT_REPRODUCED if known else INCONCLUSIVE
    words.append(interval.kind if interval else "no interval of the timings")
    low, high = (interval.low, interval.high) if interval else (None, None)
    return Claim(f"C10{suffix}", _C10, effect, low, high, _C10_UNIT, verdict, ", ".join(words))


def _number(row: Mapping[str, str], column: str) -> float:
    cell = row.get(column)
    try:
        return float(cell) if cell not in (None, "") else math.nan
    except ValueError:
        raise AlloError(f"efficiency table, {column} is {cell!r}: expected a number") from None


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
        cells = [
            value + 0.0 if isinstance(value, float) else value for value in asdict(claim).values()
        ]
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(buffer.getvalue().encode("utf-8"))


def read(path: str | Path) -> list[Claim]:
    """The rows of a `claims.csv`; AlloError when the file is missing or has other columns."""
    try:
        lines = list(
            csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline=""))
        )
    except OSError:
        raise AlloError(f"{path} cannot be read: run notebook 06_evaluation first") from None
    if lines and tuple(lines[0]) != COLUMNS:
        raise AlloError(f"{path} has columns {','.join(lines[0])}: expected {','.join(COLUMNS)}")
    numbers = ("effect", "ci_low", "ci_high")
    return [
        Claim(**{k: (float(v) if v else None) if k in numbers else v for k, v in line.items()})
        for line in lines
    ]
