"""Searches of learning rates: which to try next, given the scores of those that were tried.

`search`, on the model that is reported, trains the same number of models for every method. One rate
(methods of one stage): the initial one, one factor below and above, then, as long as the best
stands at an edge, one more beyond it; else the gaps beside the best are halved. Two rates: the same
three steps of both together (two stages add up, so their common size matters most, and even three
candidates search it), one more beyond the best if that stands at an edge, then the first stage's
rate alone, below and above at the best of them.

`proposals`, on models that are not reported (`runs.tune`), goes on to an interior optimum in two
directions, the same for every method. Of one stage these are its rate and its beta (SimPO's gamma;
SFT, RFT and the on-policy methods have the rate alone), of two their common rate and the first
one's against the second's. It goes first around the initial rates, then around the best so far
until nothing beside it is better. With what is left of the budget, the step is halved.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

from allo_lib.errors import AlloError

Rates = tuple[float, ...]
Place = tuple[float, ...]  # exponents of the factor, one a direction
_COARSE = (0, -1, 1)  # exponents of the factor
_BEYOND = 4  # times the budget that `proposals` may take to find an interior optimum


@dataclass(frozen=True)
class Trial:
    """A trained candidate: its rates, one per stage, and its score on the development split."""

    rates: Rates
    score: float


def best(tried: list[Trial]) -> Trial:
    """The highest score; of equal ones the smallest rates."""
    return max(tried, key=lambda one: (one.score, tuple(-rate for rate in one.rates)))


def search(
    initial: Rates, candidates: int, factor: float, evaluate: Callable[[Rates], float]
) -> list[Trial]:
    """Train and score exactly `candidates` models (one without rates); returns them in order.

    Raises:
        AlloError: fewer than one candidate, or a factor not above 1.
    """
    if candidates < 1 or not factor > 1:
        raise AlloError(
            f"search: candidates is {candidates} and factor {factor}, expected 1 candidate or more "
            "and a factor above 1; change the profile's `search`"
        )
    tried: list[Trial] = []

    def attempt(rates: Rates) -> None:
        rates = _rounded(rates)
        tried.append(Trial(rates, evaluate(rates)))

    if not initial:
        attempt(())
        return tried
    for exponent in _COARSE[:candidates]:
        attempt(tuple(rate * factor**exponent for rate in initial))
    while len(tried) < candidates:
        attempt(_next_of_one(tried, factor) if len(initial) == 1 else _next_of_two(tried, factor))
    return tried


def _next_of_one(tried: list[Trial], factor: float) -> Rates:
    rates = sorted(one.rates[0] for one in tried)
    place = rates.index(best(tried).rates[0])
    if place == 0:
        return (rates[0] / factor,)
    if place == len(rates) - 1:
        return (rates[-1] * factor,)
    # The wider gap first, so that both sides are halved before either is quartered.
    below, above = rates[place] / rates[place - 1], rates[place + 1] / rates[place]
    side = place - 1 if below >= above else place
    return (math.sqrt(rates[side] * rates[side + 1]),)


def _next_of_two(tried: list[Trial], factor: float) -> Rates:
    first, *rest = best(tried).rates
    last = sorted({one.rates[-1] for one in tried})
    if len(tried) == len(_COARSE) and rest[-1] in (last[0], last[-1]):
        beyond = 1 / factor if rest[-1] == last[0] else factor
        return tuple(rate * beyond for rate in (first, *rest))
    at_best = sorted(one.rates[0] for one in tried if one.rates[1:] == tuple(rest))
    step = at_best[0] / factor if first == at_best[0] else at_best[-1] * factor
    if len(at_best) == 1:
        step = first / factor
    elif len(at_best) == 2 and first == at_best[1]:
        step = first * factor
    return (step, *rest)


# --- to an interior optimum ----------------------------------------------------------------------


@dataclass
class Found:
    """What a search came to. scores: rates -> mean score. interior: nothing beside it is better."""

    rates: Rates
    scores: dict[Rates, float]
    interior: bool


def proposals(
    initial: Rates, factor: float, budget: int, knob: bool = False
) -> Generator[list[Rates], dict, Found]:
    """Yields rates to try, is sent the mean score of each, and returns what it found.

    initial: a rate a stage; with `knob` the rate of one stage and what else is searched. AlloError
    for a budget that does not reach around the initial rates.
    """
    directions = min(len(initial), 2)
    if budget < 1 + 2 * directions or not factor > 1:
        raise AlloError(
            f"tuning: {budget} candidates at a factor of {factor} cannot surround {len(initial)} "
            f"rates; set search.candidates to at least {1 + 2 * directions} and "
            "search.factor above 1"
        )
    scores: dict[Place, float] = {}
    best_place, step = (0.0,) * directions, 1.0

    def rates_at(place: Place) -> Rates:
        powers = place if knob else [sum(place), *(place[0] for _ in initial[1:])]
        return _rounded(r * factor**p for r, p in zip(initial, powers, strict=True))

    while True:
        around = [_moved(best_place, d, way * step) for d in range(directions) for way in (-1, 1)]
        wanted = [place for place in (best_place, *around) if place not in scores]
        at_most = budget if step < 1 else _BEYOND * budget
        interior = not wanted
        if not wanted and len(scores) < budget:
            step /= 2
            continue
        if not wanted or len(scores) + len(wanted) > at_most:
            by_rates = {rates_at(place): score for place, score in scores.items()}
            return Found(rates_at(best_place), by_rates, interior or step < 1)
        sent = yield [rates_at(place) for place in wanted]
        scores |= {place: sent[rates_at(place)] for place in wanted}
        # Of equal scores the smallest rates.
        best_place = max(scores, key=lambda place: (scores[place], [-e for e in place]))


def _moved(place: Place, direction: int, by: float) -> Place:
    return tuple(e + by * (d == direction) for d, e in enumerate(place))


def _rounded(rates) -> Rates:
    return tuple(float(f"{rate:.4g}") for rate in rates)
