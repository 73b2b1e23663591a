"""C10, what ALLO costs: its verdict from `tables/efficiency.csv`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from allo_lib.errors import AlloError
from allo_lib.evaluation.stats import mean_interval
from allo_lib.evaluation.verdicts import CONTRADICTED, UNDECIDED, Claim, p_values

_C10 = "ALLO costs less than full optimisation with a dense mask (time, peak memory, state)"
_C10_UNIT = "ln(time of dense / time of ALLO)"


def efficiency_claims(table: Sequence[Mapping[str, str]]) -> list[Claim]:
    """C10 for every device of `tables/efficiency.csv`: `allo_scalar` against `dense_masked`.

    The effect is ln(dense time / ALLO time) for a pair, above zero when ALLO is faster. Its
    interval is Student's t over the processes, which ran in turns, so that the first of one is
    compared with the first of the other; one process of each decides nothing of time.
    To support the claim ALLO must also take less peak memory and less optimizer state.
    """
    by_device: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in table:
        by_device.setdefault(row["device"], {})[row["variant"]] = row
    claims = []
    for device, variants in by_device.items():
        if {"allo_scalar", "dense_masked"} <= set(variants):
            suffix = f":{device}" if claims else ""
            claims.append(_efficiency_claim(device, variants, suffix))
    text = "not measured: allo_scalar and dense_masked on one device"
    return claims or [Claim("C10", _C10, None, None, None, _C10_UNIT, UNDECIDED, text)]


def _efficiency_claim(device: str, variants, suffix: str) -> Claim:
    ours, dense = variants["allo_scalar"], variants["dense_masked"]
    seconds = [_number(row, "seconds_per_pair") for row in (dense, ours)]
    each = [_each(row) for row in (dense, ours)]
    if not all(time > 0 or math.isnan(time) for time in (*seconds, *each[0], *each[1])):
        raise AlloError(
            f"efficiency table, {device} has a time that is not above 0: measure it again"
        )
    words = [f"on {device}: time of allo_scalar over dense_masked {seconds[1] / seconds[0]:.3f}"]
    lasting = []  # whether ALLO takes less of what is no matter of chance; None where unknown
    for column, name in (
        ("peak_bytes_above_model", "peak memory"),
        ("state_bytes_per_parameter", "optimizer state"),
    ):
        pair = [_number(row, column) for row in (ours, dense)]
        known = not any(map(math.isnan, pair)) and pair[1] > 0
        words.append(f"{name} {pair[0] / pair[1]:.3f}" if known else f"{name} not measured")
        lasting.append(pair[0] < pair[1] if known else None)
    claim = Claim(f"C10{suffix}", _C10, math.log(seconds[0] / seconds[1]), None, None, _C10_UNIT,
                  UNDECIDED, "")  # fmt: skip
    if len(each[0]) == len(each[1]) > 1:
        ratios = [math.log(first / second) for first, second in zip(*each, strict=True)]
        found = mean_interval(dict(enumerate(ratios)))
        words.append(f"t interval over {len(ratios)} processes of each, in turns")
        claim = replace(claim, effect=found.effect, p=p_values(found, _C10_UNIT))
        if found.defined:
            claim = replace(claim, ci_low=found.low, ci_high=found.high)
    else:
        words.append("one process of each, which tells no spread")
    if False in lasting:
        claim = replace(claim, verdict=CONTRADICTED, p=None)
    elif None in lasting and claim.p is not None:
        claim = replace(claim, p=replace(claim.p, above=1.0))
    return replace(claim, evidence=", ".join(words))


def _each(row: Mapping[str, str]) -> list[float]:
    """The seconds a pair of each process, in the order in which they ran."""
    cell = row.get("seconds_per_pair_each") or ""
    try:
        return [float(text) for text in cell.split()]
    except ValueError:
        raise AlloError(
            f"efficiency table, seconds_per_pair_each is {cell[:80]!r}: expected numbers"
        ) from None


def _number(row: Mapping[str, str], column: str) -> float:
    cell = row.get(column)
    try:
        return float(cell) if cell not in (None, "") else math.nan
    except ValueError:
        raise AlloError(f"efficiency table, {column} is {cell!r}: expected a number") from None
