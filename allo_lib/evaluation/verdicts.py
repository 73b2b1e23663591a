"""The rule of the verdicts, fixed before a run; RULE has it in words, for wherever verdicts stand.

Every effect is turned so that a positive number supports the claim; it is a mean over independent
SFT models (`stats.mean_interval`). A claim is about the smallest effect of its parts: that all
parts are above a bar takes the largest of their p-values (Berger 1982, intersection-union test),
that any is below it k times the smallest of k (Bonferroni).

Within one claim at most one sign is wrong, and the two-sided p-value bounds its chance; so Holm's
method over the claims' signs, and again over their tests of a negligible size, keeps the chance of
even one wrong sign, and that of one wrong "no difference", at 5% each in a family.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from allo_lib.evaluation.stats import LEVEL, Interval, holm

MARGIN = 0.02  # C3: a loss of accuracy below two points counts as no worse
SMALL = 0.01  # an effect within one point of accuracy is negligible
SUPPORTED, CONTRADICTED = "supported", "contradicted"
NO_DIFFERENCE, UNDECIDED = "no difference", "undecided"
NEGLIGIBLE = "negligible size"
INSIDE, OUTSIDE = (f"published effect {side} the interval" for side in ("inside", "outside"))
POINTS = ("accuracy", "held-out reward accuracy", "win rate")  # units that are shown in points
_RULE = f"""
Rule, fixed before the runs. Each independent SFT model gives one effect, the mean over its
replicates; intervals are Student's t over these effects (of C10 over processes), or the normal one
of their problems where that is wider. One model decides nothing; the number of models is fixed
beforehand: fewer decide nothing yet, and more are not counted. **supported**: the 95% interval lies
above zero (C3: above minus {100 * MARGIN:g} points); **contradicted**: below it; **no difference**:
the 90% interval lies within ±{100 * SMALL:g} point (accuracies and win rates only); else
**undecided**. Three claims need more: C3, to be supported or of no difference, that DPO on all
neurons beats the SFT model; C9, for no difference, that forgetting the very tokens which the reward
model would keep is seen to be worse; C10, to be supported, less optimizer state and at least 5%
less peak memory. Verdicts are corrected for many comparisons by Holm's method, at 5% in each
family, over all domains: C1 to C9 with each method tuned by itself (of C4 and C4s only C4s, a DPO
of as many updates; C4 is tested as one more hypothesis beside them); C1p to C3p, the paper's one
rate for all; C2s and C3s, secondary, of methods with as many updates as ALLO; and the costs (C10).
So a verdict can be undecided beside an interval that leaves out zero. A claim of several parts is
about the smallest of their effects, and so is its interval: all must be above zero to support it,
any below contradicts it. Its parts follow it, their intervals held together (Bonferroni) and their
verdicts corrected over all parts. Tags: **negligible size**, where the sign is sure but the 90%
interval lies within ±{100 * SMALL:g} point; **published effect inside** or **outside the
interval**.
"""
RULE = " ".join(_RULE.split())


@dataclass(frozen=True)
class PValues:
    """p-values of what can be shown of an effect: 1 where it cannot.

    `above` and `below` the bar are two-sided (below 5% where the 95% interval is clear of it);
    `under` plus SMALL and `over` minus SMALL are the two one-sided tests of a negligible size.
    """

    above: float = 1.0
    below: float = 1.0
    under: float = 1.0
    over: float = 1.0

    @property
    def sign(self) -> float:
        """Of either sign."""
        return min(self.above, self.below)

    @property
    def small(self) -> float:
        """Of a negligible size: both one-sided tests."""
        return max(self.under, self.over)


@dataclass(frozen=True)
class Claim:
    """One row of `claims.csv`; `effect` and the interval are None where nothing was measured.

    The last four are no columns of the file (`tables/verdicts.csv` has them): the p-values (None
    where no verdict can rest on the interval), the paper's effect, and what Holm's method makes of
    `p.sign` and `p.small`.
    """

    id: str
    claim: str
    effect: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    unit: str = POINTS[0]
    verdict: str = UNDECIDED
    evidence: str = ""
    p: PValues | None = field(default=None, compare=False)
    paper: float | None = field(default=None, compare=False)
    sign: float | None = field(default=None, compare=False)
    small: float | None = field(default=None, compare=False)

    @property
    def shown(self) -> PValues:
        """Its p-values; where no verdict can rest on the interval, those of nothing shown."""
        return self.p or PValues()

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the verdict, with which the evidence begins."""
        known = (NEGLIGIBLE, INSIDE, OUTSIDE)
        return tuple(words for words in self.evidence.split("; ") if words in known)

    @property
    def in_words(self) -> str:
        """The verdict and its tags in words."""
        return f"{self.verdict} ({'; '.join(self.tags)})" if self.tags else self.verdict

    @property
    def whole(self) -> str:
        """The id of the claim that this row is a part of; its own for a whole claim."""
        name, colon, domain = self.id.partition(":")
        return name.partition(".")[0] + colon + domain

    @property
    def family(self) -> str:
        """The family of claims that it is corrected in."""
        name = self.whole.partition(":")[0]
        named = {"C4": "secondary", "C10": "costs"} | dict.fromkeys(("C2s", "C3s"), "equal updates")
        return named.get(name, "paper's protocol" if name.endswith("p") else "primary")


def p_values(
    interval: Interval | None, unit: str, bar: float = 0.0, models: int = 2
) -> PValues | None:
    """The p-values of an effect; None where it has no interval over (all the) SFT models."""
    if interval is None or not interval.decides or len(interval.seeds) < models:
        return None
    above, below = (min(1.0, 2 * p) for p in (interval.p_above(bar), interval.p_below(bar)))
    if unit not in POINTS:
        return PValues(above, below)
    return PValues(above, below, interval.p_below(SMALL), interval.p_above(-SMALL))


def jointly(parts: Sequence[PValues | None]) -> PValues | None:
    """The p-values of the smallest effect of several parts; a part without any shows nothing."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    every = [part or PValues() for part in parts]
    below, under = (
        min(1.0, len(known) * min(getattr(part, way) for part in known))
        for way in ("below", "under")
    )
    return PValues(max(p.above for p in every), below, under, max(p.over for p in every))


def decide(p: PValues, sign: float, small: float) -> str:
    """The verdict, given the p-values of its sign and of a negligible size after correction."""
    if sign < 1 - LEVEL:
        return SUPPORTED if p.above <= p.below else CONTRADICTED
    return NO_DIFFERENCE if small < 1 - LEVEL else UNDECIDED


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with their verdicts and tags, each family corrected by Holm's method."""
    pending = [claim for claim in claims if claim.p is not None]
    whole = {claim.id: claim for claim in pending if claim.whole == claim.id}
    parts = [claim for claim in pending if claim.id not in whole]
    sizes = {name: sum(part.whole == name for part in parts) for name in whole}
    found: dict[str, tuple[float, float]] = {}
    for family in dict.fromkeys(claim.family for claim in pending):
        own = [claim for claim in whole.values() if claim.family == family]
        if family == "secondary":  # each pays as if it were one more of the primary family
            primary = [claim for claim in whole.values() if claim.family == "primary"]
            found |= {claim.id: _adjusted([*primary, claim])[claim.id] for claim in own}
            continue
        found |= _adjusted(own)
        single = [claim for claim in own if not sizes[claim.id]]
        single += [part for part in parts if part.family == family]
        alone = _adjusted(single, [1 / max(1, sizes[claim.whole]) for claim in single])
        found |= {name: p for name, p in alone.items() if name not in whole}
    for part in parts:
        (sign, _), p = found[part.whole], whole[part.whole].shown
        if p.above < p.below:  # where all parts are shown to be above, each of them is
            found[part.id] = min(sign, found[part.id][0]), found[part.id][1]
    return [_decided(claim, *found[claim.id]) if claim.id in found else claim for claim in claims]


def corrected_together(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with their verdicts and tags, corrected as one family without parts."""
    found = _adjusted([claim for claim in claims if claim.p is not None])
    return [_decided(claim, *found[claim.id]) if claim.id in found else claim for claim in claims]


def _adjusted(
    claims: Sequence[Claim], weights: Sequence[float] | None = None
) -> dict[str, tuple[float, float]]:
    """Holm's adjusted p-values of sign and size by id; of size 1 where no margin is set for it."""
    weights = weights or [1.0] * len(claims)
    signs = holm([claim.shown.sign for claim in claims], weights)
    sized = [place for place, claim in enumerate(claims) if claim.unit in POINTS]
    smalls = holm([claims[i].shown.small for i in sized], [weights[i] for i in sized])
    small = dict(zip(sized, smalls, strict=True))
    return {claim.id: (signs[place], small.get(place, 1.0)) for place, claim in enumerate(claims)}


def _decided(claim: Claim, sign: float, small: float) -> Claim:
    verdict, low, high = decide(claim.shown, sign, small), claim.ci_low, claim.ci_high
    tags = [NEGLIGIBLE] * (verdict in (SUPPORTED, CONTRADICTED) and small < 1 - LEVEL)
    if claim.paper is not None and low is not None and high is not None:
        tags.append(INSIDE if low <= claim.paper <= high else OUTSIDE)
    evidence = "; ".join(filter(None, [*tags, claim.evidence]))
    return replace(claim, verdict=verdict, evidence=evidence, sign=sign, small=small)
