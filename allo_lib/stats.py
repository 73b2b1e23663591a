"""Intervals for effects: the bootstrap of binary outcomes, and plain means over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from allo_lib.errors import AlloError

RESAMPLES = 10_000
LEVEL = 0.95
WIDE = 2.0  # times that seeds may differ more than their problems explain


@dataclass(frozen=True)
class Interval:
    """An effect with its 95% interval; `low` and `high` are NaN where none can be given.

    `kind` says in words how the interval was made, `n` counts problems (or steps) over all seeds,
    `by_seed` holds each seed's own effect in the order of `seeds`, and `spread` is the seeds'
    standard deviation over what the problems alone would give (NaN where unknown): far above 1
    says that a new seed would move the effect more than new problems would. `stderr` is the
    standard error of a plain mean (over seeds, or the one seed's own). `draws` are the bootstrap's,
    sorted; without them the interval is Student's t of `df` degrees of freedom (inf: normal).
    """

    effect: float
    low: float
    high: float
    kind: str
    seeds: tuple[int, ...]
    n: int
    by_seed: tuple[float, ...] = ()
    spread: float = math.nan
    stderr: float = math.nan
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    df: float = math.inf

    @property
    def seed_sd(self) -> float:
        """The standard deviation over seeds; NaN with one."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else math.nan

    def within(self, least: float, most: float) -> "Interval":
        """The interval cut to where its quantity can lie; cutting loses no coverage."""
        low, high = (min(max(end, least), most) for end in (self.low, self.high))
        return replace(self, low=low, high=high) if self.defined else self

    def flipped(self) -> "Interval":
        """The interval of the opposite difference."""
        draws = None if self.draws is None else -self.draws[::-1]
        by_seed = tuple(-effect for effect in self.by_seed)
        ends = {"low": -self.high, "high": -self.low}
        return replace(self, effect=-self.effect, by_seed=by_seed, draws=draws, **ends)

    @property
    def defined(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def p_at_most(self, bar: float) -> float:
        """Two-sided p-value of "the effect is `bar` or less"; NaN without an interval.

        The level a at which an interval of coverage 1 - a, made like this one, begins to touch the
        bar: below 1 - LEVEL where `low` is above it. Of a bootstrap twice the share of draws at or
        below the bar, with one draw added (Davison & Hinkley 1997, section 4.2.1).
        """
        return self._p(bar, upper=False)

    def p_at_least(self, bar: float) -> float:
        """Two-sided p-value of "the effect is `bar` or more"; see `p_at_most`."""
        return self._p(bar, upper=True)

    def _p(self, bar: float, upper: bool) -> float:
        from scipy.stats import t

        if not self.defined:
            return math.nan
        if self.draws is not None:
            below = np.searchsorted(self.draws, bar, "left" if upper else "right")
            beyond = len(self.draws) - below if upper else below
            return min(1.0, 2 * (1 + float(beyond)) / (1 + len(self.draws)))
        half = self.high - self.effect if upper else self.effect - self.low
        away = bar - self.effect if upper else self.effect - bar
        if half <= 0:
            return 0.0 if away > 0 else 1.0
        return min(1.0, 2 * float(t.sf(away / half * t.ppf((1 + LEVEL) / 2, self.df), self.df)))


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

    @property
    def swapped(self) -> "PairedCounts":
        """The second method against the first; without `base`, which is not known from here."""
        return PairedCounts(self.loss, self.gain, self.n, paired=self.paired)


def paired_interval(
    cells: Mapping[int, Mapping[str, PairedCounts]],
    *,
    resamples: int = RESAMPLES,
    rng_seed: int = 0,
    relative: bool = False,
) -> Interval:
    """The difference in accuracy (first minus second method), averaged over data sets and seeds.

    `relative`: divided by the second method's accuracy, seed by seed (of several data sets by its
    mean over them, as the paper does); every cell then needs its `base`.

    `cells[seed][dataset]` holds the counts; every seed must have the same data sets, which count
    equally. With one seed problems are resampled within each data set: an exact paired bootstrap,
    because drawing n pairs of outcomes with replacement is a multinomial draw of (gain, loss, tie).
    With several seeds the bootstrap is hierarchical: seeds first, then problems within each drawn
    seed. Percentile intervals in both cases (Efron & Tibshirani 1993, chapter 13; resampling order
    as in Davison & Hinkley 1997, section 3.8).

    One problem more is drawn from on either side than were observed (Bonett & Price 2012,
    doi:10.3102/1076998611411915): where two methods differ on a handful of problems only, a plain
    bootstrap knows no others, and of none it gives an interval of no width.

    Differences are drawn in the direction in which they are positive: that of A minus B and that of
    B minus A are then the same interval turned round, to the last draw (`Interval.flipped`).

    `scipy.stats.bootstrap` resamples one level, from a list of outcomes; this is its percentile
    method from counts (the tests compare the two), with the level of seeds above it.

    Few seeds make the hierarchical interval coarse: it cannot reach far past the extreme seeds.
    In simulation it covers 97% where seeds differ only by their problems (`spread` near 1) and
    91, 93 and 96% (2, 3 and 5 seeds) where they add as much variance again (near 1.4); where
    seeds differ by three times what problems explain it covers only 71, 82 and 87%. So where
    `spread` is above WIDE, Student's t interval over the seeds' effects is given instead if it is
    wider. Problems of different seeds are taken as independent, as they are in the miniature; on
    a fixed real test set shared by all seeds that is slightly optimistic.
    """
    seeds = tuple(sorted(cells))
    if not seeds:
        raise AlloError("no paired counts were given: expected at least one seed with a data set")
    datasets = sorted(cells[seeds[0]])
    if not datasets or any(sorted(cells[seed]) != datasets for seed in seeds):
        raise AlloError(
            "paired counts name different data sets in different seeds: give common ones"
        )
    table = [[cells[seed][dataset] for dataset in datasets] for seed in seeds]
    by_seed = tuple(_effect(row, relative) for row in table)
    rng = np.random.default_rng(rng_seed)
    draws = np.sort(_draws(table, resamples, rng, relative))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    n, spread = sum(cell.n for row in table for cell in row), _spread(table, by_seed, relative)
    over_seeds = mean_interval(dict(zip(seeds, by_seed, strict=True)), n=n)
    if spread > WIDE and over_seeds.high - over_seeds.low > high - low:
        # Student's t knows no bounds; accuracies differ by 1 at most, and fall by all at most.
        low, high = max(over_seeds.low, -1.0), min(over_seeds.high, math.inf if relative else 1.0)
        return replace(over_seeds, low=low, high=high, spread=spread, stderr=math.nan)
    kind, effect = _kind(table), float(np.mean(by_seed))
    return Interval(effect, float(low), float(high), kind, seeds, n, by_seed, spread, draws=draws)


def _kind(table: Sequence[Sequence[PairedCounts]]) -> str:
    paired = all(cell.paired for row in table for cell in row)
    kind = f"{'paired' if paired else 'unpaired'} bootstrap over"
    if len(table) > 1:
        return f"hierarchical {kind} {len(table)} seeds and problems"
    return f"{kind} problems, one seed"


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
    values: Mapping[int, float],
    stderrs: Mapping[int, float] | None = None,
    n: int = 0,
    few: bool = False,
) -> Interval:
    """The mean of one value a seed.

    Several seeds: Student's t interval over seeds. One seed: a normal interval from its standard
    error if that is known and positive, else none at all; with `few`, Student's t interval of n - 1
    degrees of freedom, as the error itself is known from `n` values only.
    """
    from scipy.stats import norm, t

    seeds = tuple(sorted(values))
    if not seeds:
        raise AlloError("no values were given: expected one a seed")
    by_seed = tuple(float(values[seed]) for seed in seeds)
    mean, df = float(np.mean(by_seed)), math.inf
    if len(seeds) > 1:
        df = len(seeds) - 1
        stderr = float(np.std(by_seed, ddof=1)) / len(seeds) ** 0.5
        half = t.ppf((1 + LEVEL) / 2, df) * stderr
        kind = f"t interval over {len(seeds)} seeds"
    elif stderrs and stderrs.get(seeds[0], 0) > 0:
        stderr = stderrs[seeds[0]]
        half = norm.ppf((1 + LEVEL) / 2) * stderr
        kind = "normal interval from the standard error, one seed"
        if few:
            df = n - 1
            half = t.ppf((1 + LEVEL) / 2, df) * stderr
            kind = f"t interval over {n} steps, one seed"
    else:
        stderr, half, kind = math.nan, math.nan, "one seed without a standard error: no interval"
    ends = float(mean - half), float(mean + half)
    return Interval(mean, *ends, kind, seeds, n, by_seed, stderr=stderr, df=df)


def difference_interval(
    first: Mapping[int, tuple[float, float]], second: Mapping[int, tuple[float, float]], n: int = 0
) -> Interval:
    """First minus second over the seeds that both have; each value is (value, standard error).

    The seeds pair the values. With one seed the two errors are taken as independent.
    """
    common = sorted(set(first) & set(second))
    values = {seed: first[seed][0] - second[seed][0] for seed in common}
    stderrs = {seed: math.hypot(first[seed][1], second[seed][1]) for seed in common}
    return mean_interval(values, stderrs, n)


def log_ratio_interval(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> Interval:
    """ln(first / second) of two positive quantities, each (value, low, high).

    The two half-widths are joined in quadrature on the log scale, each side with its own.
    """
    if min(*first, *second) <= 0:
        raise AlloError(f"a ratio of {first} and {second}: expected positive numbers")
    (a, a_low, a_high), (b, b_low, b_high) = np.log(first), np.log(second)
    effect = a - b
    low, high = math.hypot(a - a_low, b_high - b), math.hypot(a_high - a, b - b_low)
    kind = "intervals of both timings joined on the log scale"
    return Interval(float(effect), float(effect - low), float(effect + high), kind, (), 0)


def _draws(
    table: Sequence[Sequence[PairedCounts]],
    resamples: int,
    rng: np.random.Generator,
    relative: bool,
) -> np.ndarray:
    """Draws of the mean effect, for the swapped table the same ones with the other sign."""
    if relative:  # a change relative to the other method is another quantity, not the negative
        return _resample(table, resamples, rng, relative)
    swapped = [[cell.swapped for cell in row] for row in table]
    ours, theirs = _direction(table), _direction(swapped)
    if ours == theirs:  # as for two methods that agree everywhere: no direction is before the other
        half = _resample(table, resamples // 2, rng, relative)
        return np.concatenate([half, -half])
    if ours > theirs:
        return _resample(table, resamples, rng, relative)
    return -_resample(swapped, resamples, rng, relative)


def _direction(table: Sequence[Sequence[PairedCounts]]) -> tuple:
    """What says which of two tables, one the other's swapped, is drawn from: the larger."""
    effect = float(np.mean([[cell.effect for cell in row] for row in table]))
    return effect, [[(cell.gain, cell.loss) for cell in row] for row in table]


def _resample(
    table: Sequence[Sequence[PairedCounts]],
    resamples: int,
    rng: np.random.Generator,
    relative: bool,
) -> np.ndarray:
    """`resamples` draws of the mean effect from a table of counts [seed][data set]."""
    seeds, datasets = len(table), len(table[0])
    chosen = rng.integers(0, seeds, size=(resamples, seeds))
    total, base = np.zeros((resamples, seeds)), np.zeros((resamples, seeds))
    for column in range(datasets):
        cells = [row[column] for row in table]
        sizes = np.array([cell.n for cell in cells])
        shares = np.array([_shares(cell, relative) for cell in cells])
        counts = rng.multinomial(sizes[chosen], shares[chosen])
        total += (counts[..., 0] - counts[..., 1]) / sizes[chosen]
        # Half a problem where a draw has none: the change is then large, but a number.
        base += np.maximum(counts[..., 1] + counts[..., 2], 0.5) / sizes[chosen]
    return (total / base if relative else total / datasets).mean(axis=1)


def _shares(cell: PairedCounts, relative: bool) -> tuple[float, ...]:
    """Gain, loss, both right (only where `relative`), and the rest; they add up to 1."""
    # Whole counts, so that rounding in a text file cannot make the shares add up to more than 1.
    gain, loss = round(cell.gain * cell.n) + 1, round(cell.loss * cell.n) + 1
    n = cell.n + 2
    if not relative:
        return gain / n, loss / n, max(0.0, (n - gain - loss) / n)
    both = min(max(round(cell.base * cell.n) - loss + 1, 0), n - gain - loss)
    return gain / n, loss / n, both / n, max(0.0, (n - gain - loss - both) / n)


def _spread(
    table: Sequence[Sequence[PairedCounts]], by_seed: Sequence[float], relative: bool = False
) -> float:
    """Standard deviation of the seeds' effects over the one that their problems would give."""
    if len(by_seed) < 2:
        return math.nan
    pairs = zip(table, by_seed, strict=True)
    within = [_variance(row, effect if relative else None) for row, effect in pairs]
    expected = float(np.mean(within)) ** 0.5
    return float(np.std(by_seed, ddof=1) / expected) if expected > 0 else math.nan


def _variance(row: Sequence[PairedCounts], ratio: float | None) -> float:
    """Variance of one seed's effect over its problems; of a `ratio` by the delta method."""
    if ratio is None:
        return sum((c.gain + c.loss - c.effect**2) / c.n for c in row) / len(row) ** 2
    # (mean d) / (mean b) varies like the mean of u = d - ratio b over the mean of b.
    total = 0.0
    for c in row:
        square = c.gain + c.loss * (1 + ratio) ** 2 + (c.base - c.loss) * ratio**2
        total += (square - (c.effect - ratio * c.base) ** 2) / c.n
    return total / sum(c.base for c in row) ** 2


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
