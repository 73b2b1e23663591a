"""C10, what ALLO costs: its verdict from `tables/efficiency.csv`."""

import math
from collections.abc import Mapping, Sequence

from allo_lib.errors import AlloError
from allo_lib.stats import log_ratio_interval
from allo_lib.verdicts import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    deciding_p,
    judge,
    p_values,
)

_C10 = "ALLO costs less than full optimisation with a dense mask (time, peak memory, state)"
_C10_UNIT = "ln(time of dense / time of ALLO)"


def efficiency_claims(table: Sequence[Mapping[str, str]]) -> list[Claim]:
    """C10 for every device of `tables/efficiency.csv`: `allo_scalar` against `dense_masked`.

    The effect is ln(dense time / ALLO time) for a pair, above zero when ALLO is faster. Its
    interval needs the columns `seconds_per_pair_low` and `seconds_per_pair_high`. `reproduced` asks
    for a time interval above zero and for less peak memory and less optimizer state.
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
    return claims or [Claim("C10", _C10, None, None, None, _C10_UNIT, INCONCLUSIVE, text)]


def _efficiency_claim(device: str, variants, suffix: str) -> Claim:
    ours, dense = variants["allo_scalar"], variants["dense_masked"]
    seconds = [_number(row, "seconds_per_pair") for row in (dense, ours)]
    effect = math.log(seconds[0] / seconds[1])
    ends = [
        (_number(row, "seconds_per_pair_low"), _number(row, "seconds_per_pair_high"))
        for row in (dense, ours)
    ]
    interval = None
    if not any(math.isnan(end) for pair in ends for end in pair):
        interval = log_ratio_interval((seconds[0], *ends[0]), (seconds[1], *ends[1]))
    verdict, _ = judge(interval, "above")
    p = None if interval is None else deciding_p(verdict, *p_values(interval, "above"))
    words = [f"on {device}: time of allo_scalar over dense_masked {seconds[1] / seconds[0]:.3f}"]
    for column, name in (
        ("peak_bytes_above_model", "peak memory"),
        ("state_bytes_per_parameter", "optimizer state"),
    ):
        pair = [_number(row, column) for row in (ours, dense)]
        known = not any(map(math.isnan, pair)) and pair[1] > 0
        words.append(f"{name} {pair[0] / pair[1]:.3f}" if known else f"{name} not measured")
        if verdict == REPRODUCED and not (known and pair[0] < pair[1]):
            verdict, p = (NOT_REPRODUCED if known else INCONCLUSIVE), None  # no matter of chance
    words.append(interval.kind if interval else "no interval of the timings")
    low, high = (interval.low, interval.high) if interval else (None, None)
    return Claim(f"C10{suffix}", _C10, effect, low, high, _C10_UNIT, verdict, ", ".join(words), p)


def _number(row: Mapping[str, str], column: str) -> float:
    cell = row.get(column)
    try:
        return float(cell) if cell not in (None, "") else math.nan
    except ValueError:
        raise AlloError(f"efficiency table, {column} is {cell!r}: expected a number") from None
