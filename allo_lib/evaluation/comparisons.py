"""Methods compared on the outcomes of a study: the domains, the pairing, the intervals.

A method's effect on an SFT model is the mean over its replicates and over the problems of each data
set; the data sets of a domain count equally. Two methods are compared on the same problems and in
the replicates that both have. Intervals are those of `stats.mean_interval` over the models.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes, published
from allo_lib.evaluation.outcomes import AVERAGE, REWARD, Measurement
from allo_lib.evaluation.stats import Interval, mean_and_error, mean_interval

# Rows of measurements by (seed, method, dataset, metric).
Index = Mapping[tuple[int, str, str, str], Measurement]
Estimate = tuple[float, float, int]  # value, standard error, number of problems

WIN = "win_"
_LOSS = "loss_"
# The first domain has the plain ids of the claims; domains of a user's own come after these.
DOMAINS = ("miniature", "questions", "maths", "helpfulness")
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

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of its tables: its data sets, and their mean where there are several."""
        return (*self.datasets, AVERAGE) if len(self.datasets) > 1 else self.datasets

    def only(self, dataset: str) -> "Domain":
        """The domain with one data set of it; with all for `average`."""
        return self if dataset == AVERAGE else replace(self, datasets=(dataset,))


INSTRUCTIONS = Domain("instructions", published.INSTRUCTIONS, WIN)
# A metric `judged_by:<kind>:<model>[+<8 hex digits of its weights>]` stands beside the win rates of
# a seed on a data set, so that tables name the judge from measurements alone.
JUDGED_BY = "judged_by:"
NOBODY = "no judge was named"


class StudyResults:
    """The outcomes and measurements of a study on the SFT models that were fixed beforehand.

    Args:
        table: outcomes (`outcomes.COLUMNS`).
        rows: measurements; of them come win rates, overlaps of masks, training losses.
        models: number of SFT models that the profile fixes. Those of other seeds are left out.
        by_domain: domain -> number of its SFT models, where it has fewer.
        first: seed of the first of them.
    """

    def __init__(
        self, table: pd.DataFrame, rows: Iterable[Measurement] = (), models: int = 1,
        by_domain: Mapping[str, int] | None = None, first: int = 0,
    ):  # fmt: skip
        rows = list(rows)
        known = {*map(int, table["model"].unique()), *(row.seed for row in rows)}
        self.models, self.by_domain = models, by_domain or {}
        self.fixed: Sequence[int] = range(first, first + models)
        self.whole = self.fixed  # of which `fixed` can become a part
        self.seeds = sorted(seed for seed in known if seed in self.fixed)
        self.left_out = sorted(known - {*self.seeds})
        self.index: Index = {
            (row.seed, row.method, row.dataset, row.metric): row
            for row in rows
            if row.seed in self.fixed
        }
        table = table[table["model"].isin(self.seeds)]
        self.methods = {*table["method"].unique()} | {name for _, name, *_ in self.index}
        pairs = table[table["margin"].notna()]
        losses = pairs.assign(right=np.logaddexp(0, -pairs["margin"].astype(float)))
        # Prefix -> (domain, data set, model) -> method -> outcomes [problems, replicates].
        self._outcomes = {
            "": _by_place(table[table["margin"].isna()]),
            REWARD: _by_place(pairs),
            _LOSS: _by_place(losses),
        }

    @classmethod
    def load(
        cls, folder: str | Path, models: int = 1, by_domain: Mapping[str, int] | None = None,
        first: int = 0,
    ) -> "StudyResults":  # fmt: skip
        """Those of a results folder; AlloError where it has no measurements or no outcomes."""
        folder = Path(folder)
        rows = outcomes.read_measurements(folder / "measurements.csv")
        table = outcomes.read(folder / outcomes.NAME)
        if not len(table):
            raise AlloError(f"{folder} has no {outcomes.NAME}: run the notebooks 00 to 06")
        return cls(table, rows, models, by_domain, first)

    def of_models(self, seeds: Iterable[int]) -> "StudyResults":
        """The same results of some of the SFT models alone, all of which a verdict then needs."""
        part, chosen = copy.copy(self), {*seeds}
        part.fixed = [seed for seed in self.fixed if seed in chosen]
        part.seeds, part.models = [s for s in self.seeds if s in chosen], len(chosen)
        return part

    @cache
    def on(self, domain: Domain) -> "StudyResults":
        """These results, as to the SFT models that the domain has."""
        count = self.by_domain.get(domain.name)
        return self.of_models({*self.whole[:count]} & {*self.fixed}) if count else self

    @cached_property
    def domains(self) -> list[Domain]:
        """The domains with outcomes, and instructions where replies to any were written."""
        answered: dict[str, set[str]] = {}
        for name, dataset, _ in self._outcomes[""]:
            answered.setdefault(name, set()).add(dataset)
        found = [
            Domain(name, tuple(_in_order(answered[name], _DATASETS)))
            if name in answered
            else Domain(name, (name,), REWARD)
            for name in _in_order({*answered, *(name for name, *_ in self._outcomes[REWARD])},
                                  DOMAINS)
        ]  # fmt: skip
        named = {dataset for _, _, dataset, _ in self.index}
        if replied := tuple(name for name in INSTRUCTIONS.datasets if name in named):
            found.append(replace(INSTRUCTIONS, datasets=replied))
        return found

    def datasets_of(self, method: str, domain: Domain) -> list[str]:
        """The domain's data sets on which any model has a score of the method."""
        return [name for name in domain.datasets if self.score(method, domain.only(name))]

    def score(self, method: str, domain: Domain) -> Interval | None:
        """A method's own score, a fraction; None where no model has it on all data sets."""
        return self._interval(lambda model: self._score(model, domain, method), 0.0, 1.0)

    @cache  # claims, tables and figures ask for the same pairs
    def compare(
        self, first: str, second: str, domain: Domain, *, relative: bool = False
    ) -> Interval | None:
        """First minus second on the same problems; None where no model has both on all data sets.

        `relative` divides by the second method's score, model by model, of several data sets by its
        mean over them, as the paper does; models on which that is 0 are left out. Win rates are
        compared as if they were independent.
        """
        gap = self._win_gap if domain.prefix == WIN else self._gap
        # Scores differ by 1 at most, and fall by all at most.
        most = math.inf if relative else 1.0
        return self._interval(lambda model: gap(model, domain, first, second, relative), -1.0, most)

    def loss_reduction(self, first: str, second: str, domain: Domain) -> Interval | None:
        """Held-out DPO loss of the second method minus that of the first, pair by pair."""
        losses = Domain(domain.name, (domain.name,), _LOSS)

        def reduction(model: int) -> Estimate | None:
            gaps = [theirs - ours for ours, theirs in self._means(model, losses, first, second)]
            return (*mean_and_error(gaps), len(gaps[0])) if gaps else None

        return self._interval(reduction)

    def improvement(self, first: str, second: str, domain: Domain) -> Interval | None:
        """The chance that a run of the first method is better than one of the second.

        Agarwal et al. 2021 (arXiv 2108.13264, `probability_of_improvement` of rliable): the mean
        over data sets and pairs of runs of 1 where it is better, 1/2 where they are equal; here of
        runs from one SFT model, whose mean over models has the interval.
        """

        def chance(model: int) -> Estimate | None:
            ours, theirs = (self._runs(model, domain, method) for method in (first, second))
            if not ours or not theirs:
                return None
            sides = zip(ours, theirs, strict=True)
            won = [np.mean((a[:, None] > b) + (a[:, None] == b) / 2) for a, b in sides]
            return float(np.mean(won)), 0.0, 0

        return self._interval(chance, 0.0, 1.0)

    def runs(self, method: str, domain: Domain) -> list[float]:
        """The score of each run (model, replicate), the mean over the domain's data sets."""
        sides = [self._runs(model, domain, method) for model in self.seeds]
        return [float(value) for side in sides if side for value in np.mean(side, axis=0)]

    def trend(self, ranks: Mapping[str, int], own: str, domain: Domain) -> Interval | None:
        """The rise in score from the lowest to the highest rank, by a straight line.

        Least squares, model by model, over the differences to `own`, on the same problems. None
        with fewer than three methods, or one that was not compared with `own` on the same models.
        """
        gaps = {name: self.compare(name, own, domain) for name in ranks if name != own}
        known = [gap for gap in gaps.values() if gap is not None]
        if own not in ranks or len(known) < max(2, len(gaps)) or len(set(ranks.values())) < 2:
            return None
        if len({gap.seeds for gap in known}) > 1:
            return None
        places = np.unique([*ranks.values()], return_inverse=True)[1]
        slopes = (places - places.mean()) / places.var() / len(places) * places.max()
        weights = np.array([w for name, w in zip(ranks, slopes, strict=True) if name != own])
        values = weights @ [gap.by_seed for gap in known]
        errors = np.hypot.reduce(weights[:, None] * [gap.errors for gap in known])
        seeds = known[0].seeds
        return mean_interval(
            dict(zip(seeds, values, strict=True)), dict(zip(seeds, errors, strict=True)), known[0].n
        )

    def metric(
        self, method: str, metric: str, place: str, minus: str | None = None
    ) -> Interval | None:
        """The mean of a metric over models, or of what it is above the metric `minus`; None where
        it was not measured. `place` is a data set or a domain's name."""

        def value(model: int) -> Estimate | None:
            row, other = (
                self.index.get((model, method, place, name or "")) for name in (metric, minus)
            )
            if row is None or (minus and other is None):
                return None
            return (row.value - other.value, 0.0, 0) if other else (row.value, row.stderr, row.n)

        return self._interval(value)

    def _interval(
        self,
        of_model: Callable[[int], Estimate | None],
        least: float = -math.inf,
        most: float = math.inf,
    ) -> Interval | None:
        """The mean over models, cut to where it can lie; None where none has a value."""
        found = {model: one for model in self.seeds if (one := of_model(model))}
        if not found:
            return None
        values, errors = ({model: one[place] for model, one in found.items()} for place in (0, 1))
        n = sum(count for _, _, count in found.values())
        return mean_interval(values, errors, n).within(least, most)

    def _score(self, model: int, domain: Domain, method: str) -> Estimate | None:
        if domain.prefix == WIN:
            rows = self._wins(model, domain, method)
            if not rows:
                return None
            error = math.hypot(*(row.stderr for row in rows)) / len(rows)
            return sum(row.value for row in rows) / len(rows), error, sum(row.n for row in rows)
        groups = [values for (values,) in self._means(model, domain, method)]
        return (*mean_and_error(groups), sum(map(len, groups))) if groups else None

    def _gap(
        self, model: int, domain: Domain, first: str, second: str, relative: bool
    ) -> Estimate | None:
        groups = self._means(model, domain, first, second)
        if not groups:
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

    def _win_gap(
        self, model: int, domain: Domain, first: str, second: str, relative: bool
    ) -> Estimate | None:
        ours, theirs = (self._score(model, domain, method) for method in (first, second))
        if ours is None or theirs is None:
            return None
        (value, error, n), (base, other, _) = ours, theirs
        if not relative:
            return value - base, math.hypot(error, other), n
        return (
            (value / base - 1, math.hypot(error, value / base * other) / base, n) if base else None
        )

    def _runs(self, model: int, domain: Domain, method: str) -> list[np.ndarray]:
        """A run's score each, [replicates], by data set; empty where one is missing."""
        if domain.prefix == WIN:
            return [np.array([row.value]) for row in self._wins(model, domain, method)]
        scores = [values.mean(axis=0) for (values,) in self._sides(model, domain, method)]
        return [score[~np.isnan(score)] for score in scores]

    def _wins(self, model: int, domain: Domain, method: str) -> list[Measurement]:
        """The win rates on every data set; none where one is missing."""
        keys = [(model, method, name, domain.metric) for name in domain.datasets]
        return [self.index[key] for key in keys] if all(key in self.index for key in keys) else []

    def _means(self, model: int, domain: Domain, *methods: str) -> list[tuple[np.ndarray, ...]]:
        """Of every data set the methods' outcomes, [problems] each: means over the replicates that
        all of them have; empty where there are none on a data set."""
        found = []
        for values in self._sides(model, domain, *methods):
            shared = ~np.isnan(sum(values)).any(axis=0)
            if not shared.any():
                return []
            found.append(tuple(one[:, shared].mean(axis=1) for one in values))
        return found

    def _sides(self, model: int, domain: Domain, *methods: str) -> list[tuple[np.ndarray, ...]]:
        """Of every data set the methods' outcomes, [problems, replicates] each; empty where one is
        missing."""
        known = self._outcomes[domain.prefix]
        places = [known.get((domain.name, name, model), {}) for name in domain.datasets]
        if any(method not in place for place in places for method in methods):
            return []
        return [tuple(place[method] for method in methods) for place in places]


def _by_place(table: pd.DataFrame) -> dict[tuple[str, str, int], dict[str, np.ndarray]]:
    """(domain, data set, model) -> method -> `right` [problems, replicates], NaN where not run."""
    found = {}
    for place, part in table.groupby(["domain", "dataset", "model"], observed=True):
        method, methods = pd.factorize(part["method"])
        problem, problems = pd.factorize(part["problem"])
        replicate = part["replicate"].to_numpy()
        values = np.full((len(methods), len(problems), replicate.max() + 1), np.nan)
        values[method, problem, replicate] = part["right"]
        found[place] = dict(zip(methods, values, strict=True))
    return found


def _in_order(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Known names in their order, then others by the alphabet."""
    return sorted(
        names, key=lambda name: (known.index(name) if name in known else len(known), name)
    )


def paper_effect(first: str, second: str, domain: Domain) -> float | None:
    """The paper's effect on the same data sets, None where it lacks one; for data sets of ours on
    all eight of its questions and maths, as far as it has them. From its main results, or its
    empirical study where these lack a method."""
    sides = first.removesuffix("_paper"), second.removesuffix("_paper")
    for table in (published.main_results(), published.empirical_study()):
        if set(sides) <= set(table):
            ours = not domain.prefix and not set(domain.datasets) & set(_DATASETS)
            datasets = published.QUESTIONS + published.MATHS if ours else domain.datasets
            one, other = (table[method] for method in sides)
            gaps = [one[name] - other[name] for name in datasets if name in one]
            return sum(gaps) / len(gaps) if gaps and (ours or len(gaps) == len(datasets)) else None
    return None


# --- who judged ----------------------------------------------------------------------------------


def was_judged(index: Index, domain: Domain) -> bool:
    """Whether anything has a win rate on the domain's data sets."""
    return any(key[2] in domain.datasets and key[3] == domain.metric for key in index)


def judged_by(index: Index, domain: Domain) -> str:
    """What win rates are and whose, for the caption of a table; "" for other measures."""
    if domain.prefix != WIN:
        return ""
    if not was_judged(index, domain):
        return f" Replies were written; {NOBODY} to compare them."
    found: dict[str, list[str]] = {}
    for seed, _, dataset, metric in sorted(index):
        if metric.startswith(JUDGED_BY) and dataset in domain.datasets:
            kind, _, model = metric.removeprefix(JUDGED_BY).partition(":")
            name, _, weights = model.partition("+")
            judge = f"{kind.replace('_', ' ')} `{name}`"
            judge += f" (weights {weights})" if weights else ""
            found.setdefault(judge, []).append(f"{seed} {dataset}")
    judge_names = "; ".join(found) or "not named"
    if len(found) > 1:
        each = [f"{judge} (seed and data set {', '.join(on)})" for judge, on in found.items()]
        judge_names = f"several, and only what one of them judged compares: {'; '.join(each)}"
    return (
        " Win rate: the share of instructions on which the judge prefers the row's reply to that "
        "of the SFT model, which is at 50 by construction; a tie counts half. It says what this "
        f"judge prefers. Judge: {judge_names}."
    )
