"""Two methods compared on a domain: the data sets that are averaged, the pairing, the interval."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from allo_lib import published
from allo_lib.measurements import AVERAGE, GAIN, LOSS, REWARD, Measurement
from allo_lib.stats import Interval, PairedCounts, difference_interval, paired_interval

# Rows by (seed, method, dataset, metric).
Index = Mapping[tuple[int, str, str, str], Measurement]


@dataclass(frozen=True)
class Domain:
    """Data sets that are averaged together; `prefix` picks answered problems or held-out pairs."""

    name: str
    datasets: tuple[str, ...]
    prefix: str = ""

    @property
    def unit(self) -> str:
        return "held-out reward accuracy" if self.prefix else "accuracy"


DOMAINS = (
    Domain("miniature", ("chain", "scan", "story")),
    Domain("questions", published.QUESTIONS),
    Domain("maths", published.MATHS),
    Domain("helpfulness", ("hh_helpful",), REWARD),
)


def index_of(rows: Iterable[Measurement]) -> Index:
    """Rows by (seed, method, dataset, metric)."""
    return {(row.seed, row.method, row.dataset, row.metric): row for row in rows}


def domains_of(rows: Collection[Measurement]) -> list[Domain]:
    """The domains measured, each with its data sets that have rows.

    Data sets of no known domain whose answers were counted form the domain `other`.
    """
    names = {row.dataset for row in rows}
    answered = {row.dataset for row in rows if row.metric == "accuracy"} - {AVERAGE}
    found = []
    for domain in DOMAINS:
        datasets = tuple(name for name in domain.datasets if name in names)
        answered -= set(datasets)
        if datasets:
            found.append(Domain(domain.name, datasets, domain.prefix))
    if answered:
        found.append(Domain("other", tuple(sorted(answered))))
    return found


def shared_names(rows: Collection[Measurement], domain: Domain) -> tuple[str, ...]:
    """Names under which a loss or an overlap of the whole domain may stand as data set.

    Its own name; where it is the only domain also `average` and what a user's profile calls it.
    """
    if len(domains_of(rows)) > 1:
        return (domain.name,)
    others = {row.dataset for row in rows} - set(domain.datasets)
    return (domain.name, AVERAGE, *sorted(others))


def compare(index: Index, first: str, second: str, domain: Domain) -> Interval | None:
    """The paired difference first minus second over the domain's data sets.

    Uses the seeds that have counts on all of them; None when no seed has.
    """
    cells: dict[int, dict[str, PairedCounts]] = {}
    for seed in sorted({key[0] for key in index}):
        found = {
            name: _counts(index, seed, first, second, name, domain.prefix)
            for name in domain.datasets
        }
        if all(found.values()):
            cells[seed] = found
    return paired_interval(cells) if cells else None


def _counts(index, seed, first, second, dataset, prefix) -> PairedCounts | None:
    """Counts of first against second, from the rows of either direction."""
    for ours, theirs, flip in ((first, second, False), (second, first, True)):
        gain = index.get((seed, ours, dataset, f"{prefix}{GAIN}{theirs}"))
        loss = index.get((seed, ours, dataset, f"{prefix}{LOSS}{theirs}"))
        if gain and loss:
            pair = (loss.value, gain.value) if flip else (gain.value, loss.value)
            return PairedCounts(*pair, gain.n)
    return None


def metric_by_seed(
    index, method, metric, domain: Domain, shared
) -> dict[int, tuple[float, float, int]]:
    """(value, standard error, n) a seed: the mean over the domain's data sets or a shared row."""
    found = {}
    for seed in sorted({key[0] for key in index}):
        rows = [index.get((seed, method, name, metric)) for name in domain.datasets]
        if not all(rows):
            rows = [row for name in shared if (row := index.get((seed, method, name, metric)))][:1]
        if rows:
            value = sum(row.value for row in rows) / len(rows)
            stderr = math.sqrt(sum(row.stderr**2 for row in rows)) / len(rows)
            found[seed] = value, stderr, sum(row.n for row in rows)
    return found


def metric_difference(index, first, second, domain, shared) -> Interval | None:
    """First minus second, each a (method, metric), by seed; None when no seed has both."""
    ours = metric_by_seed(index, *first, domain, shared)
    theirs = metric_by_seed(index, *second, domain, shared)
    common = set(ours) & set(theirs)
    if not common:
        return None
    values = [{seed: side[seed][:2] for seed in common} for side in (ours, theirs)]
    return difference_interval(*values, n=sum(ours[seed][2] for seed in common))
