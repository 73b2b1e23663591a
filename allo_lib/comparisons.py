"""Two methods compared on a domain: the data sets that are averaged, the pairing, the interval."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from allo_lib import published
from allo_lib.measurements import AVERAGE, GAIN, LOSS, REWARD, Measurement, is_average
from allo_lib.stats import Interval, PairedCounts, mean_interval, paired_interval

# Rows by (seed, method, dataset, metric).
Index = Mapping[tuple[int, str, str, str], Measurement]


@dataclass(frozen=True)
class Domain:
    """Data sets that are averaged together.

    `prefix` picks answered problems (""), held-out pairs (REWARD) or games won (WIN).
    """

    name: str
    datasets: tuple[str, ...]
    prefix: str = ""

    @property
    def unit(self) -> str:
        return {REWARD: "held-out reward accuracy", WIN: "win rate"}.get(self.prefix, "accuracy")

    @property
    def metric(self) -> str:
        """The metric of a method's own score."""
        return "win_rate" if self.prefix == WIN else f"{self.prefix}accuracy"

    def only(self, dataset: str) -> "Domain":
        """The domain with one data set of it; with all for `average`."""
        return self if dataset == AVERAGE else replace(self, datasets=(dataset,))


WIN = "win_"
# A metric `judged_by:<kind>:<model>[+<8 hex digits of its weights>]` stands beside the win rates of
# a seed on a data set, so that tables name the judge from measurements alone.
JUDGED_BY = "judged_by:"
NOBODY = "no judge was named"
DOMAINS = (
    Domain("miniature", ("chain", "scan", "story")),
    Domain("questions", published.QUESTIONS),
    Domain("maths", published.MATHS),
    Domain("helpfulness", ("hh_helpful",), REWARD),
    # Last, as the first one has the plain ids of the claims: nothing is trained on instructions.
    Domain("instructions", published.INSTRUCTIONS, WIN),
)


def index_of(rows: Iterable[Measurement]) -> Index:
    """Rows by (seed, method, dataset, metric)."""
    return {(row.seed, row.method, row.dataset, row.metric): row for row in rows}


def domains_of(rows: Collection[Measurement]) -> list[Domain]:
    """The domains measured, each with its data sets that have rows.

    Data sets of no known domain whose answers were counted form the domain `other`.
    """
    names = {row.dataset for row in rows}
    answered = {row.dataset for row in rows if row.metric == "accuracy"}
    answered = {name for name in answered if not is_average(name)}
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
    # Instructions are replied to by models of another domain: nothing is trained on them.
    if domain.prefix == WIN or sum(found.prefix != WIN for found in domains_of(rows)) > 1:
        return (domain.name,)
    others = {row.dataset for row in rows} - set(domain.datasets)
    return (domain.name, AVERAGE, *sorted(others))


def columns_of(domain: Domain) -> list[str]:
    """The columns of the domain's tables: its data sets, and their mean where there are several."""
    return [*domain.datasets, AVERAGE] if len(domain.datasets) > 1 else list(domain.datasets)


def compare(
    index: Index,
    first: str,
    second: str,
    domain: Domain,
    *,
    unpaired: bool = False,
    relative: bool = False,
) -> Interval | None:
    """The difference first minus second over the domain's data sets, on the same problems.

    Uses the seeds that have counts on all of them; None when no seed has. `unpaired` takes two
    accuracies as independent where a seed has no paired counts. `relative` divides by the second
    method's accuracy; None also where that is 0 throughout.
    """
    cells: dict[int, dict[str, PairedCounts]] = {}
    for seed in _seeds(index):
        found = {
            name: _counts(index, seed, first, second, name, domain, unpaired)
            for name in domain.datasets
        }
        if all(found.values()) and not (relative and _nothing_right(found.values())):
            cells[seed] = found
    if not cells:
        return None
    return _interval(tuple((seed, tuple(found.items())) for seed, found in cells.items()), relative)


@lru_cache(maxsize=1024)  # claims, tables and figures ask for the same pairs
def _interval(cells: tuple[tuple[int, tuple], ...], relative: bool) -> Interval:
    counts = {seed: dict(found) for seed, found in cells}
    return paired_interval(counts, relative=relative)


def _seeds(index: Index) -> list[int]:
    return sorted({key[0] for key in index})


def _nothing_right(cells: Iterable[PairedCounts]) -> bool:
    bases = [cell.base for cell in cells]
    return None in bases or not any(bases)


def _counts(index, seed, first, second, dataset, domain, unpaired) -> PairedCounts | None:
    """Counts of first against second, from the rows of either direction."""
    own = [index.get((seed, method, dataset, domain.metric)) for method in (first, second)]
    base = own[1] and own[1].value
    for ours, theirs, flip in ((first, second, False), (second, first, True)):
        gain = index.get((seed, ours, dataset, f"{domain.prefix}{GAIN}{theirs}"))
        loss = index.get((seed, ours, dataset, f"{domain.prefix}{LOSS}{theirs}"))
        if gain and loss:
            pair = (loss.value, gain.value) if flip else (gain.value, loss.value)
            return PairedCounts(*pair, gain.n, base)
    if unpaired and all(own) and min(row.n for row in own) > 0:
        return PairedCounts.independent(own[0].value, base, min(row.n for row in own))
    return None


def paper_effect(
    paper: tuple[published.Table, published.Table], first: str, second: str, domain: Domain
) -> float | None:
    """The paper's effect on the same data sets; for data sets of ours on all eight of its
    questions and maths. `paper` holds its main results and its empirical study."""
    main, empirical = paper
    first, second = first.removesuffix("_paper"), second.removesuffix("_paper")
    if domain.name in ("miniature", "other"):
        datasets = published.QUESTIONS + published.MATHS
    else:
        datasets = domain.datasets
    table = main if {first, second} <= set(main) else empirical
    return published.difference(table, first, second, datasets)


def metric_by_seed(
    index, method, metric, domain: Domain, shared
) -> dict[int, tuple[float, float, int]]:
    """(value, standard error, n) a seed: the mean over the domain's data sets or a shared row."""
    found = {}
    for seed in _seeds(index):
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
    ours, theirs = (metric_by_seed(index, *side, domain, shared) for side in (first, second))
    values = {seed: ours[seed][0] - theirs[seed][0] for seed in set(ours) & set(theirs)}
    return mean_interval(values, n=sum(ours[seed][2] for seed in values)) if values else None


def improvement(index: Index, first: str, second: str, domain: Domain) -> Interval | None:
    """The chance that a run of the first method is better than one of the second.

    Agarwal et al. 2021 (arXiv 2108.13264, `probability_of_improvement` of rliable): the mean over
    data sets of 1 where it is better, 1/2 where they are equal; here of runs from one SFT
    model, whose mean over models has the interval.
    """
    values = {}
    for seed in _seeds(index):
        rows = [[index.get((seed, method, name, domain.metric)) for method in (first, second)]
                for name in domain.datasets]  # fmt: skip
        if all(map(all, rows)):
            won = [(a.value > b.value) + (a.value == b.value) / 2 for a, b in rows]
            values[seed] = sum(won) / len(won)
    return mean_interval(values).within(0.0, 1.0) if values else None


def trend(index: Index, ranks: Mapping[str, int], own: str, domain: Domain) -> Interval | None:
    """The rise in accuracy from the lowest to the highest rank by a straight line over the methods.

    Least squares, model by model, over the differences to `own`, on the same problems. None with
    fewer than three methods, or one that was not compared with `own` on the same seeds.
    """
    gaps = {name: compare(index, name, own, domain) for name in ranks if name != own}
    if len(gaps) < 2 or own not in ranks or None in gaps.values():
        return None
    seeds = {gap.seeds for gap in gaps.values()}
    levels = sorted(set(ranks.values()))
    places = {name: levels.index(rank) for name, rank in ranks.items()}
    mean = sum(places.values()) / len(places)
    spread = sum((place - mean) ** 2 for place in places.values())
    if len(seeds) > 1 or not spread:
        return None
    weights = {name: (places[name] - mean) / spread * (len(levels) - 1) for name in gaps}
    values, errors = {}, {}
    for i, seed in enumerate(next(iter(seeds))):
        values[seed] = sum(weights[name] * gap.by_seed[i] for name, gap in gaps.items())
        errors[seed] = math.hypot(*(weights[name] * gap.errors[i] for name, gap in gaps.items()))
    return mean_interval(values, errors, next(iter(gaps.values())).n)


# --- who judged ----------------------------------------------------------------------------------


def was_judged(index: Index, domain: Domain) -> bool:
    """Whether anything has a win rate on the domain's data sets."""
    return any(key[2] in domain.datasets and key[3] == domain.metric for key in index)


def judges_of(index: Index, domain: Domain) -> dict[str, list[str]]:
    """Judge, in words -> seeds and data sets of the domain that it judged: `0 arena_hard`."""
    found: dict[str, list[str]] = {}
    for seed, _, dataset, metric in sorted(index):
        if metric.startswith(JUDGED_BY) and dataset in domain.datasets:
            kind, _, model = metric.removeprefix(JUDGED_BY).partition(":")
            name, _, weights = model.partition("+")
            told = f"{kind.replace('_', ' ')} `{name}`"
            told += f" (weights {weights})" if weights else ""
            found.setdefault(told, []).append(f"{seed} {dataset}")
    return found


def judged_by(index: Index, domain: Domain) -> str:
    """What win rates are and whose, for the caption of a table; "" for other measures."""
    if domain.prefix != WIN:
        return ""
    if not was_judged(index, domain):
        return f" Replies were written; {NOBODY} to compare them."
    found = judges_of(index, domain)
    told = "; ".join(found) or "not told"
    if len(found) > 1:
        each = [f"{judge} (seed and data set {', '.join(on)})" for judge, on in found.items()]
        told = f"several, and only what one of them judged compares: {'; '.join(each)}"
    return (
        " Win rate: the share of instructions on which the judge prefers the row's reply to that "
        "of the SFT model, which is at 50 by construction; a tie counts half. It says what this "
        f"judge prefers. Judge: {told}."
    )
