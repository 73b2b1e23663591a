"""Intervals for effects: Student's t over independent SFT models; Holm's correction; warnings.

The unit of inference is the SFT model (one a seed): it gives one effect, of several replicates
their mean, and these effects are independent draws. Problems of one model share its weights, so
they are never counted as draws of their own; they only say how precisely the model's effect is
known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit  # of scipy.stats.t, but quick for one number

from allo_lib.errors import AlloError

LEVEL = 0.95
_DIGITS = 1e-9  # what ten digits in a text file leave of equal effects


@dataclass(frozen=True)
class Interval:
    """An effect with its 95% interval; `low` and `high` are NaN where none can be given.

    `kind` says in words how the interval was made, `n` counts problems over all SFT models,
    `by_seed` holds each model's own effect in the order of `seeds`, `errors` the standard errors
    that their problems alone give them (empty where unknown). `scales` holds (degrees of freedom,
    standard error) of the t intervals of which this is the widest.
    """

    effect: float
    low: float
    high: float
    kind: str
    seeds: tuple[int, ...]
    n: int
    by_seed: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    scales: tuple[tuple[float, float], ...] = ()

    @property
    def stderr(self) -> float:
        """The larger standard error; NaN where none is known."""
        return max((error for _, error in self.scales), default=math.nan)

    @property
    def seed_sd(self) -> float:
        """The standard deviation over SFT models; NaN with one."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else math.nan

    @property
    def defined(self) -> bool:
        """Whether there is an interval at all."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def decides(self) -> bool:
        """Whether a verdict can rest on it: an interval over at least two SFT models."""
        return self.defined and len(self.by_seed) > 1

    def ends(self, level: float) -> tuple[float, float]:
        """The interval of another coverage."""
        half = _half(self.scales, level)
        return self.effect - half, self.effect + half

    def within(self, least: float, most: float) -> "Interval":
        """The interval cut to where its quantity can lie; cutting loses no coverage."""
        low, high = (min(max(end, least), most) for end in (self.low, self.high))
        return replace(self, low=low, high=high) if self.defined else self

    def p_above(self, bar: float) -> float:
        """One-sided p-value against "the effect is `bar` or less"; needs an interval."""
        return max(float(stdtr(df, (bar - self.effect) / error)) for df, error in self.scales)

    def p_below(self, bar: float) -> float:
        """One-sided p-value against "the effect is `bar` or more"; needs an interval."""
        return max(float(stdtr(df, (self.effect - bar) / error)) for df, error in self.scales)


def mean_and_error(
    groups: Sequence[np.ndarray], extra: Sequence[float] = ()
) -> tuple[float, float]:
    """The mean over data sets of the mean over their problems, and its standard error.

    groups: a data set's values each, [problems]; data sets count equally. `extra` values join those
    of every data set where its variance is taken, not its mean: for differences of outcomes -1 and
    1, one problem more on either side than were seen to tell two methods apart (Bonett & Price
    2012, doi:10.3102/1076998611411915): that none was seen does not mean that there is none.
    """
    variances = [np.var(np.append(group, extra)) / (len(group) + len(extra)) for group in groups]
    mean = float(np.mean([np.mean(group) for group in groups]))
    return mean, float(np.sum(variances)) ** 0.5 / len(groups)


def mean_interval(
    values: Mapping[int, float], stderrs: Mapping[int, float] | None = None, n: int = 0
) -> Interval:
    """The mean of one value an SFT model, whose standard error may be known from its problems.

    Several models: Student's t over their values, or the normal interval of what their problems
    alone would make them vary, if that is wider: no set of models agrees better than each of them
    is known. In simulation it covers 95% where models differ by more than their problems explain,
    and where they do not 97% (8 models) to 99% (2). One model: a normal interval over its problems,
    on which no verdict rests. Without any error: none.
    """
    seeds = tuple(sorted(values))
    by_seed, count = tuple(float(values[seed]) for seed in seeds), len(seeds)
    errors = tuple(stderrs.get(seed, 0.0) for seed in seeds) if stderrs else ()
    mean, kind = float(np.mean(by_seed)), f"t interval over {count} SFT models"
    alone = math.inf, math.hypot(*errors) / count
    both: list[tuple[float, float]] = [alone]
    if count > 1:
        both.append((count - 1, float(np.std(by_seed, ddof=1)) / count**0.5))
        if _half([alone], LEVEL) > _half(both[1:], LEVEL):
            kind = f"{count} SFT models, which differ less than their problems explain"
    else:
        kind = "over problems alone, one SFT model"
    scales = tuple(scale for scale in both if scale[1] > _DIGITS * max(1.0, abs(mean)))
    if not scales:
        kind = "no interval: nothing tells how precise it is"
    half = _half(scales, LEVEL)
    return Interval(mean, mean - half, mean + half, kind, seeds, n, by_seed, errors, scales)


def share_interval(right: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The 95% interval of a share of items (each right, 1, wrong, 0, or between) that come in
    groups, as pairs of one prompt do.

    That of a share with two more items on each side (Agresti & Coull 1998), of as many items as
    would vary as much if they were independent: their number over Kish's design effect.
    """
    n, share = len(right), sum(right) / len(right)
    beyond = dict.fromkeys(groups, 0.0)
    for group, one in zip(groups, right, strict=True):
        beyond[group] += one - share
    own = n * share * (1 - share)  # what independent items vary by
    effect = sum(value**2 for value in beyond.values()) / own if own else n / len(beyond)
    count = n / max(1.0, effect)
    rough = (share * count + 2) / (count + 4)
    half = _half([(math.inf, math.sqrt(rough * (1 - rough) / (count + 4)))], LEVEL)
    return max(rough - half, 0.0), min(rough + half, 1.0)


def _half(scales: Sequence[tuple[float, float]], level: float) -> float:
    """The widest half-width of t intervals of these (degrees of freedom, standard error)."""
    halves = (float(stdtrit(df, (1 + level) / 2)) * error for df, error in scales)
    return max(halves, default=math.nan)


def held_together(parts: int, models: int) -> float:
    """Half width of t intervals that hold together (Bonferroni), over that of one alone."""
    each = [(models - 1, 1.0)]
    return _half(each, 1 - (1 - LEVEL) / parts) / _half(each, LEVEL)


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjusted p-values, in the order given, each in [0, 1].

    Rejecting wherever the adjusted value is below a keeps the chance of even one false rejection
    in the whole family at a or less, whatever the dependence of the tests (Holm 1979, Scandinavian
    Journal of Statistics 6, 65-70; section 3 of it for positive `weights`, 1 each by default).
    AlloError for a value outside [0, 1], NaN among them.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise AlloError(f"p-values {list(p_values)}: expected each from 0 to 1")
    weights = list(weights or [1.0] * len(p_values))
    adjusted, floor, left = [0.0] * len(p_values), 0.0, sum(weights)
    for place in sorted(range(len(p_values)), key=lambda i: p_values[i] / weights[i]):
        floor = max(floor, min(1.0, left / weights[place] * p_values[place]))
        adjusted[place] = floor
        left -= weights[place]
    return adjusted


def concentration(ratios: ArrayLike, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """How much of the negative log-ratio sits in how few tokens: (share of tokens, share of it).

    `ratios` are the log-ratios of all response tokens, in any shape. The second array says what
    part of the sum of negative log-ratios the lowest x of the tokens hold; both have `points` steps
    from 0 to 1. Raises AlloError when no ratio is negative.
    """
    values = np.sort(np.asarray(ratios, dtype=np.float64).ravel())
    negative = np.minimum(values, 0.0)
    if not np.isfinite(values).all() or negative.sum() == 0:
        raise AlloError("log-ratios must be finite and some of them negative: check the responses")
    held = np.concatenate([[0.0], np.cumsum(negative) / negative.sum()])
    shares = np.linspace(0, 1, points)
    return shares, np.interp(shares, np.linspace(0, 1, len(held)), held)


# --- signs that a stage has nothing to work with, each a line with its number, or None ------------

NEAR_CHANCE = 1.5  # masks that overlap less than this many times chance hardly agree
MOSTLY_TIES = 0.5  # of the kept entries, that tie with entries left out
NO_CHOICE = 0.02  # share of tokens, or of all but these, that is as good as none or all of them
FAR_BELOW = 0.05  # accuracy that a stage lost, if it is twice its standard error too


def arbitrary_mask(zeros: int, tied: int, tied_kept: int, kept: int, total: int) -> str | None:
    """`neurons.count_ties` of a mask that keeps `kept` of `total` entries."""
    if zeros > total - kept:
        return (
            f"{zeros} of {total} scores are exactly 0, so that the mask of {kept} keeps some of "
            "them; take the scores in float32, at a larger rate"
        )
    if tied > tied_kept > MOSTLY_TIES * kept:
        return (
            f"{tied_kept} of {kept} kept entries tie with entries left out; the order of the "
            "tensors chose among them"
        )
    return None


def no_choice_of_tokens(weights: Sequence[Sequence[float]]) -> str | None:
    """Token weights of forgetting, a list for each response: are none or all of them chosen?"""
    values = [value for row in weights for value in row]
    share = sum(value != 0 for value in values) / max(1, len(values))
    if NO_CHOICE <= share <= 1 - NO_CHOICE:
        return None
    effect, way = (
        ("has next to nothing to work on", "raise")
        if share < NO_CHOICE
        else ("does not choose", "lower")
    )
    return (
        f"the token rule selects {100 * share:.1f}% of {len(values)} rejected tokens: forgetting "
        f"{effect}; train the reward model longer, or {way} its threshold"
    )


def far_below(what: str, score: float, start: float, noise: float) -> str | None:
    """A stage's score against the one it started from, both in [0, 1]; `noise` is the standard
    error of their difference."""
    if start - score <= max(FAR_BELOW, 2 * noise):
        return None
    return (
        f"{what} scores {100 * score:.1f}%, the model before it {100 * start:.1f}% (standard error "
        f"of the difference {100 * noise:.1f} points): it does harm, lower its learning rate"
    )
