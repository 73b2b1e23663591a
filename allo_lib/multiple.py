"""Correction for many comparisons: Holm's step-down method, which scipy does not have."""

from collections.abc import Sequence

from allo_lib.errors import AlloError


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given, each in [0, 1].

    Rejecting wherever the adjusted value is below a keeps the chance of even one false rejection
    in the whole family at a or less, whatever the dependence of the tests (Holm 1979, Scandinavian
    Journal of Statistics 6, 65-70). AlloError for a value outside [0, 1], NaN among them.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise AlloError(f"p-values {list(p_values)}: expected each from 0 to 1")
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return adjusted
