"""Correction for many comparisons: Holm's step-down method, which scipy does not have."""

from collections.abc import Sequence

from allo_lib.errors import AlloError


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
