"""The learning-rate search: the same number of trained models for every method.

One rate (methods of one stage): the centre, one factor below and above, then, as long as the best
stands at an edge, one more beyond it; else the gaps beside the best are halved. Two rates: the same
three steps of both together (two stages add up, so their common size matters most, and even three
candidates search it), one more beyond the best if that stands at an edge, then the first stage's
rate alone, below and above at the best of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from allo_lib.errors import AlloError

Rates = tuple[float, ...]
_COARSE = (0, -1, 1)  # exponents of the factor


@dataclass(frozen=True)
class Tried:
    """A trained candidate: its rates, one per stage, and its score on the development split."""

    rates: Rates
    score: float


def best(tried: list[Tried]) -> Tried:
    """The highest score; of equal ones the smallest rates."""
    return max(tried, key=lambda one: (one.score, tuple(-rate for rate in one.rates)))


def search(
    centre: Rates, candidates: int, factor: float, evaluate: Callable[[Rates], float]
) -> list[Tried]:
    """Train and score exactly `candidates` models (one without rates); returns them in order.

    Raises:
        AlloError: fewer than one candidate, or a factor not above 1.
    """
    if candidates < 1 or not factor > 1:
        raise AlloError(
            f"search: candidates is {candidates} and factor {factor}, expected 1 candidate or more "
            "and a factor above 1; change the profile's `search`"
        )
    tried: list[Tried] = []

    def attempt(rates: Rates) -> None:
        rates = tuple(float(f"{rate:.4g}") for rate in rates)
        tried.append(Tried(rates, evaluate(rates)))

    if not centre:
        attempt(())
        return tried
    for exponent in _COARSE[:candidates]:
        attempt(tuple(rate * factor**exponent for rate in centre))
    while len(tried) < candidates:
        attempt(_next_of_one(tried, factor) if len(centre) == 1 else _next_of_two(tried, factor))
    return tried


def _next_of_one(tried: list[Tried], factor: float) -> Rates:
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


def _next_of_two(tried: list[Tried], factor: float) -> Rates:
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
