"""Searches of learning rates: which to try next, given the scores of those that were tried.

Rates are powers of one factor, times those where a search begins. Of one stage it moves in the rate
and, where one is searched, in a second knob: beta, or SimPO's gamma (`methods.knob_of`). Of two
stages it moves in their common size, which matters most as two stages add up, and in the first
one's against the second's.

`proposals` goes first around the initial rates, then around the best so far until nothing beside it
is better; then it halves the step. `runs.tune`, on models that are not reported, follows it to that
interior optimum. `search`, on the model that is reported, trains the same number of models for
every method.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

from allo_lib.errors import AlloError

Rates = tuple[float, ...]
Place = tuple[float, ...]  # exponents of the factor, one a direction
_BEYOND = 4  # times the budget that may be taken to find an interior optimum


@dataclass(frozen=True)
class Trial:
    """A trained candidate: its rates, one per stage, and its score on the development split."""

    rates: Rates
    score: float


@dataclass
class Found:
    """What a search came to. scores: rates -> mean score. interior: nothing beside it is better."""

    rates: Rates
    scores: dict[Rates, float]
    interior: bool


def best(tried: list[Trial]) -> Trial:
    """The highest score; of equal ones the smallest rates."""
    return max(tried, key=lambda one: (one.score, tuple(-rate for rate in one.rates)))


def search(
    initial: Rates,
    candidates: int,
    factor: float,
    evaluate: Callable[[Rates], float],
    knob: bool = False,
) -> list[Trial]:
    """Train and score exactly `candidates` models (one without rates); returns them in order.

    The arguments are those of `proposals`.
    """
    if not initial:
        return [Trial((), evaluate(()))]
    tried: list[Trial] = []
    proposed = proposals(initial, factor, math.inf, knob)
    while len(tried) < candidates:
        wanted = proposed.send({one.rates: one.score for one in tried} or None)
        for rates in wanted[: candidates - len(tried)]:
            tried.append(Trial(rates, evaluate(rates)))
    return tried


def proposals(
    initial: Rates, factor: float, budget: float, knob: bool = False
) -> Generator[list[Rates], dict[Rates, float], Found]:
    """Yields rates to try, is sent the score of each, and returns what it found.

    initial: a rate a stage; with `knob` the rate of one stage and what else is searched.
    budget: how many rates to try; more where the optimum is not interior yet, at most four times.
        With less than 5 only the rate is searched, or the common size of two.

    Raises:
        AlloError: a factor not above 1, or a budget that does not reach around the initial rate.
    """
    if budget < 3 or not factor > 1:
        raise AlloError(
            f"{budget:g} candidates at a factor of {factor:g} cannot surround a rate; set "
            "search.candidates to at least 3 and search.factor above 1"
        )
    directions = min(len(initial), 2 if budget >= 5 else 1)
    scores: dict[Place, float] = {}
    place, step = (0.0,) * min(len(initial), 2), 1.0  # of the best so far

    def rates_at(where: Place) -> Rates:
        powers = where if knob else [sum(where), *(where[0] for _ in initial[1:])]
        rates = (rate * factor**power for rate, power in zip(initial, powers, strict=True))
        return tuple(float(f"{rate:.4g}") for rate in rates)

    while True:
        around = [
            tuple(power + way * (i == direction) for i, power in enumerate(place))
            for direction in range(directions)
            for way in (-step, step)
        ]
        wanted = [one for one in (place, *around) if one not in scores]
        if not wanted and len(scores) < budget:
            step /= 2
            continue
        if not wanted or len(scores) + len(wanted) > (budget if step < 1 else _BEYOND * budget):
            by_rates = {rates_at(one): score for one, score in scores.items()}
            return Found(rates_at(place), by_rates, not wanted or step < 1)
        sent = yield [rates_at(one) for one in wanted]
        scores |= {one: sent[rates_at(one)] for one in wanted}
        # Of equal scores the smallest rates.
        place = max(scores, key=lambda one: (scores[one], [-power for power in one]))
