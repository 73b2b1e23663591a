"""Which pairs the importance scores come from, and how: the variants that are compared.

"delta" is the warm-up as it is, "order" the same in another order of the data; "half_a", "half_b"
see the first and the second half of the pairs, "third_a" to "third_c" every third one, which is as
many as each of three data sets has, and "family:NAME" the pairs of one data set. "lr_x0.3" and
"lr_x3" change the warm-up's learning rate, "half_epoch" and "two_epochs" its length. "gradient" and
"magnitude" are the other estimators, see `Study.scores`.
"""

from collections.abc import Sequence

from allo_lib.errors import AlloError

FAMILY = "family:"
_RATES = {"lr_x0.3": 0.3, "lr_x3": 3.0}
_EPOCHS = {"half_epoch": 0.5, "two_epochs": 2}
_THIRDS = ("third_a", "third_b", "third_c")
_PLAIN = ("delta", "order", "half_a", "half_b", "gradient", "magnitude")
VARIANTS = (*_PLAIN, *_THIRDS, *_RATES, *_EPOCHS)


def check(variant: str, datasets: Sequence[str]) -> None:
    """AlloError unless `variant` is known; `datasets` are those that can be a family."""
    families = [FAMILY + dataset for dataset in datasets]
    if variant not in (*VARIANTS, *families):
        known = ", ".join((*VARIANTS, *families))
        raise AlloError(f"importance scores {variant!r} are not known; expected one of {known}")


def pairs_of(variant: str, rows: list, datasets: Sequence[str]) -> list:
    """The rows that a variant sees; `datasets` holds the data set of each row."""
    half = len(rows) // 2
    if variant in _THIRDS:
        return rows[_THIRDS.index(variant) :: len(_THIRDS)]
    if variant.startswith(FAMILY):
        family = variant.removeprefix(FAMILY)
        return [row for row, dataset in zip(rows, datasets, strict=True) if dataset == family]
    return {"half_a": rows[:half], "half_b": rows[half:]}.get(variant, rows)


def warmup_rate(variant: str, rate: float) -> float:
    """The learning rate of a variant's warm-up, given the usual one."""
    return rate * _RATES.get(variant, 1)


def warmup_epochs(variant: str) -> float:
    """How often a variant's warm-up goes through its pairs."""
    return _EPOCHS.get(variant, 1)
