"""The paper's claims C1-C10 and their verdicts, computed from outcomes and never typed in.

`verdicts` has the rule. C3 (no worse) takes a DPO that learned something (assay sensitivity, ICH
E10): nothing can be worse than a DPO that is not shown to beat the starting model, so that this is
part of what supports it. Likewise C9 takes a planted difference that is seen: where ALLO is not
shown to beat forgetting on exactly the tokens that the rewriter would keep, the choice of tokens
can make no difference that this study sees, and "no difference" between reward models says nothing.

A claim of several parts is followed by one row a part, as in `C2.dpo_last10`. Its own row has the
smallest of their effects; the interval of that begins at the lowest of their lower ends (the
least decided part's) and ends at the lowest of their upper ends, these held together (Bonferroni),
so that it is on one side of zero where the p-values of `verdicts.jointly` are below 5%.

C1-C3 give each arm its own best learning rate; C1p-C3p use the paper's protocol, one rate for all.
The first domain that was measured has the plain ids; others add theirs, as in `C4:helpfulness`.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from allo_lib.errors import AlloError
from allo_lib.evaluation import published
from allo_lib.evaluation.ablations import INVERTED, REWARD_MODELS
from allo_lib.evaluation.comparisons import Domain, StudyResults, paper_effect
from allo_lib.evaluation.cost_claims import efficiency_claims
from allo_lib.evaluation.declared import DECLARED, Declared
from allo_lib.evaluation.measurements import CHANCE_IN_TENSORS, REWARD
from allo_lib.evaluation.stats import LEVEL, Interval, mean_interval
from allo_lib.evaluation.verdicts import (
    MARGIN,
    POINTS,
    UNDECIDED,
    Claim,
    PValues,
    corrected,
    jointly,
    p_values,
)

__all__ = ["COLUMNS", "DECLARED", "MARGIN", "Claim", "compute", "efficiency_claims",
           "protocol_disagreements", "read", "write"]  # fmt: skip
COLUMNS = ("id", "claim", "effect", "ci_low", "ci_high", "unit", "verdict", "evidence")
_OVERLAPS = ("orders", "halves", "estimators")


@dataclass(frozen=True)
class Part:
    """One comparison inside a claim; `interval` and `p` are None when not measured.

    `key` names it behind the claim's id, `notes` are further sentences of its evidence.
    """

    key: str
    name: str
    interval: Interval | None
    p: PValues | None
    paper: float | None = None
    notes: tuple[str, ...] = ()


def compute(
    results: StudyResults,
    efficiency: Sequence[Mapping[str, str]] = (),
    paper_dir: str | Path | None = None,
) -> list[Claim]:
    """All claims, each with the rows of its parts, for every domain of the results, corrected for
    many comparisons; C10 from the efficiency table."""
    paper = published.main_results(paper_dir), published.empirical_study(paper_dir)
    claims = []
    for position, domain in enumerate(results.domains or [Domain("no domain", ())]):
        suffix = f":{domain.name}" if position else ""
        for declared in DECLARED:
            parts, notes = _parts(declared, results, domain, paper)
            claims += _rows(declared, domain, parts, notes, suffix, results.models)
    return corrected(claims + efficiency_claims(efficiency))


def _parts(declared, results: StudyResults, domain: Domain, paper) -> tuple[list[Part], list[str]]:
    """The parts of a claim and what else its evidence should say."""
    models = results.models
    if declared.kind == "overlap":
        return [_overlap_part(results, name, domain) for name in _OVERLAPS], []
    if declared.kind == "lower loss":
        ((first, second),) = declared.pairs
        gap = results.loss_reduction(first, second, domain)
        name = f"held-out loss of {second} minus {first}"
        return [Part(second, name, gap, p_values(gap, "loss", models=models))], []
    if declared.id == "C9":
        return _reward_parts(results, domain)
    parts, bar = [], -MARGIN if declared.kind == "no worse" else 0.0
    word = "above" if declared.kind == "above" else "no worse than"
    for first, second in declared.pairs:
        interval = results.compare(first, second, domain)
        p, notes = p_values(interval, domain.unit, bar, models), ()
        if declared.kind == "no worse" and p is not None:
            learned, notes = _sensitive(results, second.removesuffix("_paper"), domain)
            p = replace(p, above=max(p.above, learned), over=max(p.over, learned))
        if declared.id == "C5" and interval is not None:
            notes = (_improvement(results, first, second, domain),)
        effect = paper_effect(paper, first, second, domain)
        parts.append(Part(second, f"{first} {word} {second}", interval, p, effect, notes))
    if declared.id == "C5" and (known := [part for part in parts if part.interval is not None]):
        strongest = min(known, key=lambda part: part.interval.effect)
        return parts, [f"strongest baseline: {strongest.key}", *strongest.notes]
    if declared.id != "C7":
        return parts, []
    forgetting, caveat = parts[0], _assay(results, domain)[1]
    parts[0] = replace(forgetting, notes=caveat)
    return parts, [*caveat, *_mentions(results, [("allo", "allo_random_tokens")], domain)]


def _reward_parts(results: StudyResults, domain: Domain) -> tuple[list[Part], list[str]]:
    """C9: a trend over three or more reward models, else ALLO against one with a worse one."""
    order = [name for name in REWARD_MODELS if results.datasets_of(name, domain)]
    worse = [name for name in order if name not in ("allo", "allo_rm_oracle")]
    others = [("allo", name) for name in worse] + [("allo_rm_oracle", "allo")]
    # Neither untrained nor shuffled targets know anything of the task: they share the lowest rank.
    ranks = {name: max(0, place - 1) for place, name in enumerate(REWARD_MODELS)}
    found = results.trend({name: ranks[name] for name in order}, "allo", domain)
    if found is not None:
        told = order[0]
        for before, name in pairwise(order):
            told += f" {'=' if ranks[before] == ranks[name] else '<'} {name}"
        name = f"rise from the worst to the best reward model ({told})"
    else:
        first, second = others[0] if worse else ("allo", "allo_rm_shuffled")
        found, name = results.compare(first, second, domain), f"{first} above {second}"
        others = others[1:]
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
    gap = "not run" if found is None else f"{_size(found.effect, domain.unit)} points"
    return p.above, (
        "planted check: ALLO is not shown to beat forgetting on the tokens that the rewriter would "
        f"keep ({INVERTED}: {gap}), so this assay is insensitive to the choice of tokens",
    )


def _sensitive(
    results: StudyResults, reference: str, domain: Domain
) -> tuple[float, tuple[str, ...]]:
    """The p-value of "the reference learned something", and what to say where that is not shown."""
    learned = results.compare(reference, "sft_base", domain)
    if domain.prefix == REWARD:  # the starting model ranks no pair: chance is what there is to beat
        right = results.score(reference, domain)
        above = {s: value - 0.5 for s, value in zip(right.seeds, right.by_seed, strict=True)}
        learned = mean_interval(above, dict(zip(right.seeds, right.errors, strict=True)))
    p = p_values(learned, domain.unit, models=results.models) or PValues()
    if p.above < 1 - LEVEL:
        return p.above, ()
    size = "" if learned is None else f" ({_size(learned.effect, domain.unit)} points)"
    return p.above, (f"{reference} itself is not shown to beat the starting model{size}",)


def _improvement(results: StudyResults, first: str, second: str, domain: Domain) -> str:
    found = results.improvement(first, second, domain)
    if found is None:
        return ""
    ends = f" [{found.low:.2f}, {found.high:.2f}]" if found.decides else ""
    return f"probability of improvement over {second} {found.effect:.2f}{ends}"


def _overlap_part(results: StudyResults, name: str, domain: Domain) -> Part:
    """Against chance within each tensor, where that was measured, else chance over all neurons."""
    ways = {
        CHANCE_IN_TENSORS: "of random masks as large in every tensor",
        "mask_overlap_chance": "of random masks over all neurons (the global one)",
    }
    for metric in ways:
        interval = results.metric_difference(name, ("mask_overlap", metric), domain.name)
        if interval is not None:
            break
    told, notes = f"masks of two {name}, overlap minus chance", (f"chance: {ways[metric]}",)
    p = p_values(interval, "overlap", models=results.models)
    return Part(name, told, interval, p, notes=notes)


def _rows(
    declared: Declared, domain: Domain, parts, notes, suffix: str, models: int
) -> list[Claim]:
    """The claim's row, and one a part where it has several and some were measured."""
    units = {"lower loss": "held-out loss (reduction)",
             "overlap": "intersection over union above chance"}  # fmt: skip
    unit, name = units.get(declared.kind, domain.unit), declared.id + suffix
    measured = [part for part in parts if part.interval is not None]
    missing = [part.name for part in parts if part.interval is None]
    lost = f"not measured: {', '.join(missing)}" if missing else ""
    if not measured:
        return [Claim(name, declared.text, None, None, None, unit, UNDECIDED, lost)]
    where = f"on {domain.name} ({', '.join(domain.datasets)})"
    count = sum(part.interval.decides for part in measured)
    held, told, paper = [], [_tell(measured[0], unit)], measured[0].paper
    if len(parts) > 1:
        held, paper = [_held(part.interval, count) for part in measured], None
        told = [_ends(part.name, *both, unit) for part, both in zip(measured, held, strict=True)]
        told += ["one SFT model decides nothing"] * (len(measured[0].interval.seeds) < 2)
    told += [*notes, where]
    told += [*dict.fromkeys(_how(part.interval, models) for part in measured), lost]
    effect, low, high = min(part.interval.effect for part in measured), None, None
    if count == len(measured):
        low = min(part.interval.low for part in measured)
        high = min(high for _, (_, high) in held) if held else measured[0].interval.high
    p = jointly([part.p for part in parts])
    evidence = "; ".join(text for text in told if text)
    found = [Claim(name, declared.text, effect, low, high, unit, UNDECIDED, evidence, p, paper)]
    for part, (effect, (low, high)) in zip(measured, held, strict=bool(held)):
        evidence = "; ".join([_tell(part, unit), where, _how(part.interval, models)])
        key = f"{declared.id}.{part.key}{suffix}"
        found.append(Claim(key, part.name, effect, low, high, unit, UNDECIDED, evidence,
                           part.p, part.paper))  # fmt: skip
    return found


def _held(interval: Interval, count: int) -> tuple[float, tuple[float | None, float | None]]:
    """Effect and the interval that holds together with those of the other of `count` parts."""
    if not interval.decides:
        return interval.effect, (None, None)
    ends = interval.ends(1 - (1 - LEVEL) / count)
    return interval.effect, tuple(min(max(end, -1.0), 1.0) for end in ends)


def _ends(name: str, effect: float, ends: tuple, unit: str) -> str:
    """One part in words: its effect and interval."""
    words = f"{name}: {_size(effect, unit)}"
    if ends[0] is not None:
        words += f" [{_size(ends[0], unit)}, {_size(ends[1], unit)}]"
    return words + " points" * (unit in POINTS)


def _tell(part: Part, unit: str) -> str:
    """One part in words: effect, 95% interval, each model's effect, and the paper's."""
    interval = part.interval
    known = interval.low, interval.high
    words = _ends(part.name, interval.effect, known if interval.defined else (None, None), unit)
    if len(interval.by_seed) > 1:
        each = ", ".join(_size(effect, unit) for effect in interval.by_seed)
        details = [f"by model {each}", f"SD {_size(interval.seed_sd, unit).lstrip('+')}"]
    else:
        details = ["one SFT model decides nothing"]
    details += [] if part.paper is None else [f"paper {_size(part.paper, unit)}"]
    return f"{words} ({'; '.join([*details, *filter(None, part.notes)])})"


def _how(interval: Interval, models: int) -> str:
    """How the interval was made, from which models and problems."""
    seeds = ", ".join(map(str, interval.seeds))
    way = f"{interval.kind}; seed{'s' * (len(interval.seeds) > 1)} {seeds}"
    if len(interval.seeds) < models:
        way = f"{len(interval.seeds)} of {models} models so far, and no verdict before all; {way}"
    return f"{way}; n = {interval.n}" if interval.n else way


def _mentions(results: StudyResults, pairs, domain: Domain) -> list[str]:
    """Comparisons beside those of a claim, in words."""
    found = [(*pair, results.compare(*pair, domain)) for pair in pairs]
    return [
        "also " + _ends(f"{first} against {second}", gap.effect, (gap.low, gap.high), domain.unit)
        for first, second, gap in found
        if gap is not None
    ]


def _size(value: float, unit: str) -> str:
    return f"{100 * value:+z.2f}" if unit in POINTS else f"{value:+z.4f}"


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
        found = repr(",".join(header)[:80])
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
