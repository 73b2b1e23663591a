"""Intervals for effects: Student's t over independent SFT models.

The unit of inference is the SFT model (today one a seed): it gives one effect, of several
replicates their mean, and these effects are independent draws. Problems of one model share its
weights, so they are never counted as draws of their own; they only say how precisely the model's
effect is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
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


@dataclass(frozen=True)
class PairedCounts:
    """Two methods on n problems: the share that only the first, or only the second, gets right.

    `base` is the share that the second gets right, needed for relative changes only. `paired` is
    False where the two were not compared problem by problem and the shares are those of independent
    outcomes (`independent`).
    """

    gain: float
    loss: float
    n: int
    base: float | None = None
    paired: bool = True

    def __post_init__(self):
        if self.n < 1 or min(self.gain, self.loss) < 0 or self.gain + self.loss > 1 + 1e-9:
            raise AlloError(
                f"paired counts gain={self.gain}, loss={self.loss}, n={self.n}: expected shares "
                ">= 0 that add up to at most 1 and n >= 1"
            )

    @classmethod
    def independent(cls, first: float, second: float, n: int) -> "PairedCounts":
        """Counts of two accuracies as if a problem told nothing from one method to the other.

        The variance of the difference is then that of two independent proportions, which is too
        large rather than too small where methods find the same problems hard.
        """
        return cls(first * (1 - second), second * (1 - first), n, second, paired=False)

    @property
    def effect(self) -> float:
        return self.gain - self.loss


def paired_interval(
    cells: Mapping[int, Mapping[str, PairedCounts]], *, relative: bool = False
) -> Interval:
    """The difference in accuracy (first minus second method), averaged over data sets and models.

    `relative`: divided by the second method's accuracy, model by model (of several data sets by its
    mean over them, as the paper does); every cell then needs its `base`.

    `cells[seed][dataset]` holds the counts; every seed must have the same data sets, which count
    equally. Each seed's SFT model gives one effect, and `mean_interval` does the rest, with the
    standard errors that the problems give. On a fixed test set that all models share the interval
    is about that test set.
    """
    seeds = tuple(sorted(cells))
    if not seeds:
        raise AlloError("no paired counts were given: expected at least one seed with a data set")
    datasets = sorted(cells[seeds[0]])
    if not datasets or any(sorted(cells[seed]) != datasets for seed in seeds):
        raise AlloError(
            "paired counts name different data sets in different seeds: give common ones"
        )
    table = {seed: [cells[seed][dataset] for dataset in datasets] for seed in seeds}
    effects = {seed: _effect(row, relative) for seed, row in table.items()}
    errors = {
        seed: _variance(row, effects[seed] if relative else None) ** 0.5
        for seed, row in table.items()
    }
    n = sum(cell.n for row in table.values() for cell in row)
    found = mean_interval(effects, errors, n)
    if not all(cell.paired for row in table.values() for cell in row):
        found = replace(found, kind=f"{found.kind}, accuracies taken as independent")
    # Accuracies differ by 1 at most, and fall by all at most.
    return found.within(-1.0, math.inf if relative else 1.0)


def _effect(row: Sequence[PairedCounts], relative: bool) -> float:
    difference = float(np.mean([cell.effect for cell in row]))
    if not relative:
        return difference
    for cell in row:
        if cell.base is None or not cell.loss - 1e-9 <= cell.base <= 1 - cell.gain + 1e-9:
            raise AlloError(
                f"a relative change with gain={cell.gain}, loss={cell.loss}, base={cell.base}: "
                "expected the second method's accuracy as base, from the loss to 1 minus the gain"
            )
    if not any(cell.base for cell in row):
        raise AlloError("a relative change to a method that gets nothing right is not defined")
    return difference / float(np.mean([cell.base for cell in row]))


def mean_interval(
    values: Mapping[int, float], stderrs: Mapping[int, float] | None = None, n: int = 0
) -> Interval:
    """The mean of one value an SFT model, whose standard error may be known from its problems.

    Several models: Student's t over their values, or the normal interval of what their problems
    alone would make them vary, if that is wider: no set of models agrees better than each of them
    is known, and equal effects of two would else give an interval of no width. In simulation it
    covers 95% where models differ by more than their problems explain, and where they do not 97%
    (8 models) to 99% (2).
    One model: a normal interval over its problems, on which no verdict rests. Without any error:
    none.
    """
    seeds = tuple(sorted(values))
    if not seeds:
        raise AlloError("no values were given: expected one a seed")
    by_seed, count = tuple(float(values[seed]) for seed in seeds), len(seeds)
    errors = tuple(stderrs.get(seed, 0.0) for seed in seeds) if stderrs else ()
    mean, kind = float(np.mean(by_seed)), f"t interval over {count} SFT models"
    alone = math.inf, math.hypot(*errors) / count
    scales = [alone]
    if count > 1:
        scales.append((count - 1, float(np.std(by_seed, ddof=1)) / count**0.5))
        if _half([alone], LEVEL) > _half(scales[1:], LEVEL):
            kind = f"{count} SFT models, which differ less than their problems explain"
    else:
        kind = "over problems alone, one SFT model"
    scales = tuple(scale for scale in scales if scale[1] > _DIGITS * max(1.0, abs(mean)))
    if not scales:
        kind = "no interval: nothing tells how precise it is"
    half = _half(scales, LEVEL)
    return Interval(mean, mean - half, mean + half, kind, seeds, n, by_seed, errors, scales)


def _half(scales: Sequence[tuple[float, float]], level: float) -> float:
    """The widest half-width of t intervals of these (degrees of freedom, standard error)."""
    halves = (float(stdtrit(df, (1 + level) / 2)) * error for df, error in scales)
    return max(halves, default=math.nan)


def _variance(row: Sequence[PairedCounts], ratio: float | None) -> float:
    """Variance of one model's effect over its problems; of a `ratio` by the delta method.

    One problem more on either side than were seen to tell the methods apart (Bonett & Price 2012,
    doi:10.3102/1076998611411915): that none was seen does not mean that there is none.
    """
    total = 0.0
    for c in row:
        gain, loss = ((share * c.n + 1) / (c.n + 2) for share in (c.gain, c.loss))
        change = 0.0 if ratio is None else ratio
        # (mean d) / (mean b) varies like the mean of u = d - ratio b over the mean of b.
        square = gain + loss * (1 + change) ** 2
        mean = gain - loss
        if change:
            square += max(c.base - c.loss, 0.0) * change**2
            mean -= change * c.base
        total += max(square - mean**2, 0.0) / (c.n + 2)
    scale = len(row) if ratio is None else sum(c.base for c in row)
    return total / scale**2


def concentration(ratios, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
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
