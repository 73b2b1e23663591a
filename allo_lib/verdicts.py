"""The rule that turns an effect's interval into a verdict, and the p-value that goes with it.

Every effect is turned so that a positive number supports the claim.

- *above*: `reproduced` when the 95% interval lies above zero; `not reproduced` when it lies below
  zero, or when it ends below half the paper's own effect (the smallest effect of interest), where
  the paper publishes one; else `inconclusive`.
- *no worse*: `reproduced` when the interval lies above minus MARGIN, `not reproduced` when it lies
  below it, else `inconclusive`.

The p-value of a verdict is the level a at which an interval of coverage 1 - a would just fail to
give it, so that it is below 5% where the 95% interval gives it. At most one of the two ways to
decide can be wrong for any true effect, and each is tested at a/2: rejecting wherever p is below a
errs with a chance of at most a, and Holm's method (`multiple.holm`) applies.
"""

import math
from dataclasses import dataclass, field

from allo_lib.stats import LEVEL, Interval

MARGIN = 0.02  # C3: a loss of accuracy below two points counts as no worse
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"


@dataclass(frozen=True)
class Claim:
    """One row of `claims.csv`; `effect` and the interval are None where nothing was measured.

    `p` is the p-value of the verdict, None where chance has no part in it; it is no column of the
    file (`claims_holm.csv` has it).
    """

    id: str
    claim: str
    effect: float | None
    ci_low: float | None
    ci_high: float | None
    unit: str
    verdict: str
    evidence: str
    p: float | None = field(default=None, compare=False)


def judge(interval: Interval | None, kind: str, paper: float | None = None) -> tuple[str, str]:
    """The verdict on one effect and the reason where it is not plain from the interval.

    The rule stands at the top of this module. `kind` is "above" or "no worse".
    """
    if interval is None or not interval.defined:
        return INCONCLUSIVE, ""
    bar, half = _bar(kind), _half(kind, paper)
    if interval.low > bar:
        small = half is not None and interval.high < half
        return REPRODUCED, "the sign holds, at less than half the paper's size" if small else ""
    if interval.high < bar:
        return NOT_REPRODUCED, ""
    if half is not None and interval.high < half:
        return NOT_REPRODUCED, "the interval ends below half the paper's effect"
    return INCONCLUSIVE, ""


def p_values(
    interval: Interval | None, kind: str, paper: float | None = None
) -> tuple[float, float]:
    """The p-values of `reproduced` and of `not reproduced`; both 1 where nothing is known."""
    if interval is None or not interval.defined:
        return 1.0, 1.0
    bar = _bar(kind)
    return interval.p_at_most(bar), interval.p_at_least(max(bar, _half(kind, paper) or bar))


def deciding_p(verdict: str, support: float, refute: float) -> float:
    """The p-value of a verdict, given those of its two ways to decide."""
    return {REPRODUCED: support, NOT_REPRODUCED: refute}.get(verdict, min(support, refute))


def after(verdict: str, adjusted: float | None) -> str:
    """What is left of a verdict once its p-value is corrected for many comparisons."""
    if adjusted is None or math.isnan(adjusted) or adjusted < 1 - LEVEL:
        return verdict
    return INCONCLUSIVE


def _bar(kind: str) -> float:
    return -MARGIN if kind == "no worse" else 0.0


def _half(kind: str, paper: float | None) -> float | None:
    return paper / 2 if kind == "above" and paper and paper > 0 else None
