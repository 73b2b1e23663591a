"""Methods compared on the outcomes of a study: the domains, the pairing, the intervals.

A method's effect on an SFT model is the mean over its replicates and over the problems of each data
set; the data sets of a domain count equally. Two methods are compared on the same problems and in
the replicates that both have. Intervals are those of `stats.mean_interval` over the models.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes, published
from allo_lib.evaluation.outcomes import AVERAGE, REWARD, Measurement
from allo_lib.evaluation.stats import Interval, mean_and_error, mean_interval

# Rows of measurements by (seed, method, dataset, metric).
Index = Mapping[tuple[int, str, str, str], Measurement]
# (model, data set) -> method -> values [problems, replicates], NaN where a replicate was not run.
Cells = dict[tuple[int, str], dict[str, np.ndarray]]

WIN = "win_"
# The first domain has the plain ids of the claims; domains of a user's own come after these.
_DOMAINS = ("miniature", "questions", "maths", "helpfulness")
_DATASETS = (*published.QUESTIONS, *published.MATHS, *published.INSTRUCTIONS)


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
        """What an effect is a difference of, in words."""
        return {REWARD: "held-out reward accuracy", WIN: "win rate"}.get(self.prefix, "accuracy")

    @property
    def metric(self) -> str:
        """The metric of a method's own score."""
        return "win_rate" if self.prefix == WIN else f"{self.prefix}accuracy"

    def only(self, dataset: str) -> "Domain":
        """The domain with one data set of it; with all for `average`."""
        return self if dataset == AVERAGE else replace(self, datasets=(dataset,))


INSTRUCTIONS = Domain("instructions", published.INSTRUCTIONS, WIN)
# A metric `judged_by:<kind>:<model>[+<8 hex digits of its weights>]` stands beside the win rates of
# a seed on a data set, so that tables name the judge from measurements alone.
JUDGED_BY = "judged_by:"
NOBODY = "no judge was named"


def index_of(rows: Iterable[Measurement]) -> Index:
    """Rows by (seed, method, dataset, metric)."""
    return {(row.seed, row.method, row.dataset, row.metric): row for row in rows}


def columns_of(domain: Domain) -> list[str]:
    """The columns of the domain's tables: its data sets, and their mean where there are several."""
    return [*domain.datasets, AVERAGE] if len(domain.datasets) > 1 else list(domain.datasets)


class StudyResults:
    """The outcomes and measurements of a study on the SFT models that were fixed beforehand.

    Args:
        table: outcomes (`outcomes.COLUMNS`).
        rows: measurements; of them come win rates, overlaps of masks, training losses.
        models: number of SFT models that the profile fixes. Those of later seeds are left out.
    """

    def __init__(self, table: pd.DataFrame, rows: Iterable[Measurement] = (), models: int = 1):
        rows = list(rows)
        known = {*map(int, table["model"].unique()), *(row.seed for row in rows)}
        self.models = models
        self.seeds = sorted(seed for seed in known if seed < models)
        self.left_out = sorted(seed for seed in known if seed >= models)
        self.index = index_of(row for row in rows if row.seed < models)
        table = table[table["model"] < models]
        answered = table["margin"].isna()
        self._right = _cells(table[answered], lambda part: part["right"])
        self._ranked = _cells(table[~answered], lambda part: part["right"])
        self._losses = _cells(
            table[~answered], lambda part: np.logaddexp(0, -part["margin"].astype(float))
        )
        self._known: dict[tuple[str, str, Domain, bool], Interval | None] = {}

    @classmethod
    def load(cls, folder: str | Path, models: int = 1) -> "StudyResults":
        """Those of a results folder; AlloError where it has no measurements or no outcomes."""
        folder = Path(folder)
        rows = outcomes.read_measurements(folder / "measurements.csv")
        table = outcomes.read(folder / outcomes.NAME)
        if not len(table):
            raise AlloError(f"{folder} has no {outcomes.NAME}: run the notebooks 00 to 06")
        return cls(table, rows, models)

    @cached_property
    def domains(self) -> list[Domain]:
        """The domains with outcomes, and instructions where replies to any were written."""
        found = []
        for name in _in_order({*self._right, *self._ranked}, _DOMAINS):
            if name in self._right:
                sets = {dataset for _, dataset in self._right[name]}
                found.append(Domain(name, tuple(_in_order(sets, _DATASETS))))
            else:
                found.append(Domain(name, (name,), REWARD))
        named = {dataset for _, _, dataset, _ in self.index}
        if replied := tuple(name for name in INSTRUCTIONS.datasets if name in named):
            found.append(replace(INSTRUCTIONS, datasets=replied))
        return found

    @cached_property
    def methods(self) -> set[str]:
        """Every method of which anything was measured."""
        cells = [*self._right.values(), *self._ranked.values()]
        found = {method for of_domain in cells for cell in of_domain.values() for method in cell}
        return found | {method for _, method, *_ in self.index}

    def datasets_of(self, method: str, domain: Domain) -> list[str]:
        """The domain's data sets on which any model has a score of the method."""
        if domain.prefix == WIN:
            had = {key[2] for key in self.index if key[1::2] == (method, domain.metric)}
        else:
            had = {name for (_, name), cell in self._cells(domain).items() if method in cell}
        return [name for name in domain.datasets if name in had]

    def score(self, method: str, domain: Domain) -> Interval | None:
        """A method's own score, a fraction; None where no model has it on all data sets."""
        if domain.prefix == WIN:
            found = self._win_rates(method, domain)
        else:
            found = {model: (*mean_and_error(groups), sum(map(len, groups)))
                     for model in self.seeds
                     if (groups := self._groups(model, method, domain))}  # fmt: skip
        return _interval_of(found, 0.0, 1.0)

    def compare(
        self, first: str, second: str, domain: Domain, *, relative: bool = False
    ) -> Interval | None:
        """First minus second on the same problems; None where no model has both on all data sets.

        `relative` divides by the second method's score, model by model, of several data sets by its
        mean over them, as the paper does; models on which that is 0 are left out. Win rates are
        compared as if they were independent.
        """
        key = first, second, domain, relative
        if key not in self._known:  # claims, tables and figures ask for the same pairs
            if domain.prefix == WIN:
                found = self._win_gaps(*key)
            else:
                found = {model: gap for model in self.seeds if (gap := self._gap(model, *key))}
            # Scores differ by 1 at most, and fall by all at most.
            most = math.inf if relative else 1.0
            self._known[key] = _interval_of(found, -1.0, most)
        return self._known[key]

    def _gap(
        self, model: int, first: str, second: str, domain: Domain, relative: bool
    ) -> tuple[float, float, int] | None:
        """(difference, standard error, n) on one model; None where it lacks a side."""
        groups = _common(self._cells(domain), model, first, second, domain.datasets)
        if groups is None:
            return None
        gaps = [ours - theirs for ours, theirs in groups]
        (gap, error), n = mean_and_error(gaps, (1.0, -1.0)), sum(map(len, gaps))
        if not relative:
            return gap, error, n
        base = float(np.mean([theirs.mean() for _, theirs in groups]))
        if not base:
            return None
        # (mean d) / (mean b) varies like the mean of d - ratio b over the mean of b.
        ratio = gap / base
        rest = [one - ratio * theirs for one, (_, theirs) in zip(gaps, groups, strict=True)]
        return ratio, mean_and_error(rest, (1.0, -1.0 - ratio))[1] / base, n

    def _win_gaps(
        self, first: str, second: str, domain: Domain, relative: bool
    ) -> dict[int, tuple[float, float, int]]:
        ours, theirs = (self._win_rates(method, domain) for method in (first, second))
        found = {}
        for seed in [seed for seed in ours if seed in theirs]:
            (value, error, n), (base, other, _) = ours[seed], theirs[seed]
            if not relative:
                found[seed] = value - base, math.hypot(error, other), n
            elif base:
                change = math.hypot(error, value / base * other) / base
                found[seed] = value / base - 1, change, n
        return found

    def loss_reduction(self, first: str, second: str, domain: Domain) -> Interval | None:
        """Held-out DPO loss of the second method minus that of the first, pair by pair."""
        found, cells = {}, self._losses.get(domain.name, {})
        for model in self.seeds:
            groups = _common(cells, model, first, second, (domain.name,))
            if groups is not None:
                ((ours, theirs),) = groups
                found[model] = *mean_and_error([theirs - ours]), len(ours)
        return _interval_of(found)

    def improvement(self, first: str, second: str, domain: Domain) -> Interval | None:
        """The chance that a run of the first method is better than one of the second.

        Agarwal et al. 2021 (arXiv 2108.13264, `probability_of_improvement` of rliable): the mean
        over data sets and pairs of runs of 1 where it is better, 1/2 where they are equal; here of
        runs from one SFT model, whose mean over models has the interval.
        """
        values = {}
        for model in self.seeds:
            sides = [self._runs(model, method, domain) for method in (first, second)]
            if all(sides):
                won = [
                    np.mean((a[:, None] > b) + (a[:, None] == b) / 2)
                    for a, b in zip(*sides, strict=True)
                ]
                values[model] = float(np.mean(won))
        return mean_interval(values).within(0.0, 1.0) if values else None

    def runs(self, method: str, domain: Domain) -> list[float]:
        """The score of each run (model, replicate), the mean over the domain's data sets."""
        sides = [self._runs(model, method, domain) for model in self.seeds]
        return [float(value) for side in sides if side for value in np.mean(side, axis=0)]

    def _runs(self, model: int, method: str, domain: Domain) -> list[np.ndarray]:
        """A run's score each, [replicates], by data set; empty where one is missing."""
        if domain.prefix == WIN:
            return [np.array([row.value]) for row in self._wins(model, method, domain)]
        scores = [values.mean(axis=0) for values in self._values(model, method, domain)]
        return [score[~np.isnan(score)] for score in scores]

    def trend(self, ranks: Mapping[str, int], own: str, domain: Domain) -> Interval | None:
        """The rise in score from the lowest to the highest rank, by a straight line.

        Least squares, model by model, over the differences to `own`, on the same problems. None
        with fewer than three methods, or one that was not compared with `own` on the same models.
        """
        compared = {name: self.compare(name, own, domain) for name in ranks if name != own}
        gaps = {name: gap for name, gap in compared.items() if gap is not None}
        if len(gaps) < 2 or own not in ranks or len(gaps) < len(compared):
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
            parts = (weights[name] * gap.errors[i] for name, gap in gaps.items())
            errors[seed] = math.hypot(*parts)
        return mean_interval(values, errors, next(iter(gaps.values())).n)

    def metric(self, method: str, metric: str, place: str) -> dict[int, Measurement]:
        """The measurements of one metric, by seed; `place` is a data set or a domain's name."""
        rows = {seed: self.index.get((seed, method, place, metric)) for seed in self.seeds}
        return {seed: row for seed, row in rows.items() if row}

    def metric_interval(self, method: str, metric: str, place: str) -> Interval | None:
        """The mean of a metric over models; None where it was not measured."""
        found = self.metric(method, metric, place)
        return _interval_of({seed: (r.value, r.stderr, r.n) for seed, r in found.items()})

    def metric_difference(
        self, method: str, metrics: tuple[str, str], place: str
    ) -> Interval | None:
        """The first minus the second metric of a method, by seed; None where no seed has both."""
        ours, theirs = (self.metric(method, metric, place) for metric in metrics)
        values = {
            seed: row.value - theirs[seed].value for seed, row in ours.items() if seed in theirs
        }
        return mean_interval(values) if values else None

    def _win_rates(self, method: str, domain: Domain) -> dict[int, tuple[float, float, int]]:
        """(value, standard error, n) of the mean win rate over the data sets, by seed."""
        found = {}
        for seed in self.seeds:
            if rows := self._wins(seed, method, domain):
                error = math.hypot(*(row.stderr for row in rows)) / len(rows)
                value = sum(row.value for row in rows) / len(rows)
                found[seed] = value, error, sum(row.n for row in rows)
        return found

    def _wins(self, model: int, method: str, domain: Domain) -> list[Measurement]:
        """The win rates on every data set; none where one is missing."""
        keys = [(model, method, name, domain.metric) for name in domain.datasets]
        return [self.index[key] for key in keys] if all(key in self.index for key in keys) else []

    def _cells(self, domain: Domain) -> Cells:
        table = self._ranked if domain.prefix == REWARD else self._right
        return table.get(domain.name, {})

    def _values(self, model: int, method: str, domain: Domain) -> list[np.ndarray]:
        """Outcomes, [problems, replicates], by data set; empty where one is missing."""
        cells = [self._cells(domain).get((model, name), {}) for name in domain.datasets]
        return [cell[method] for cell in cells] if all(method in cell for cell in cells) else []

    def _groups(self, model: int, method: str, domain: Domain) -> list[np.ndarray]:
        """Means over replicates, [problems], by data set; empty where one is missing."""
        return [np.nanmean(values, axis=1) for values in self._values(model, method, domain)]


def _common(
    cells: Cells, model: int, first: str, second: str, datasets: Iterable[str]
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Of every data set both methods' values, [problems], means over the replicates of both."""
    found = []
    for dataset in datasets:
        ours, theirs = (cells.get((model, dataset), {}).get(m) for m in (first, second))
        if ours is None or theirs is None:
            return None
        both = ~np.isnan(ours + theirs).any(axis=0)
        if not both.any():
            return None
        found.append((ours[:, both].mean(axis=1), theirs[:, both].mean(axis=1)))
    return found


def _cells(table: pd.DataFrame, value: Callable[[pd.DataFrame], pd.Series]) -> dict[str, Cells]:
    """Domain -> cells of the rows' values."""
    found: dict[str, Cells] = {}
    places = table.groupby(["domain", "model", "dataset"], observed=True)
    for (domain, model, dataset), part in places:
        method, methods = pd.factorize(part["method"])
        problem, problems = pd.factorize(part["problem"])
        replicate = part["replicate"].to_numpy()
        values = np.full((len(methods), len(problems), replicate.max() + 1), np.nan)
        values[method, problem, replicate] = value(part)
        found.setdefault(domain, {})[int(model), dataset] = dict(zip(methods, values, strict=True))
    return found


def _in_order(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Known names in their order, then others by the alphabet."""
    return sorted(
        names, key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def _interval_of(
    found: Mapping[int, tuple[float, float, int]], least: float = -math.inf, most: float = math.inf
) -> Interval | None:
    """The mean of (value, standard error, n) a seed, cut to where it can lie; None without any."""
    if not found:
        return None
    values, errors = ({seed: one[place] for seed, one in found.items()} for place in (0, 1))
    n = sum(count for _, _, count in found.values())
    return mean_interval(values, errors, n).within(least, most)


def paper_effect(
    paper: tuple[published.Table, published.Table], first: str, second: str, domain: Domain
) -> float | None:
    """The paper's effect on the same data sets; for data sets of ours on all eight of its
    questions and maths. `paper` holds its main results and its empirical study."""
    main, empirical = paper
    first, second = first.removesuffix("_paper"), second.removesuffix("_paper")
    own = [name for name in domain.datasets if name in _DATASETS]
    answered = not own and not domain.prefix
    datasets = published.QUESTIONS + published.MATHS if answered else domain.datasets
    table = main if {first, second} <= set(main) else empirical
    return published.difference(table, first, second, datasets)


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
