"""Rates and second knobs of every method, found on SFT models that are never reported.

`./run_all.sh tune PROFILE --seeds 100,101,102,103` trains each method on the first replicate of
these models and takes the rates with the best mean score on the development problems. Averaging
over models leaves less to the luck of one run than a search on each reported seed does, and what is
reported was never looked at. `tuning.csv` holds every score; `tuned.yaml` the rates, which
a profile takes by `tuned: NAME` in a domain from `profiles/rates/NAME.yaml`.

The search is the same for every method: two directions, a factor apart. Of one stage these are its
rate and its beta (SimPO's gamma; SFT, RFT and the on-policy methods have the rate alone), of two
their common rate and the first one's against the second's. It goes first around where the profile's
`rates` say, then around the best so far until nothing beside it is better: an interior optimum.
With what is left of the method's `search.candidates`, the step is halved. ALLO with another reward
model, density or official detail takes ALLO's own rates (`methods.tuned_as`).
"""

import csv
import math
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from allo_lib.errors import AlloError
from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import knob_of, relative_rates, stages_of, tuned_as
from allo_lib.study import arms, runs
from allo_lib.study.results import methods_of
from allo_lib.study.search import Rates
from allo_lib.study.study import Study

COLUMNS = ("domain", "method", "rates", "model", "score")
_BEYOND = 2  # times `search.candidates` that a search may take to find an interior optimum
Place = tuple[float, ...]  # exponents of the factor, one a direction


@dataclass
class Found:
    """What a search came to. scores: rates -> mean score. interior: nothing beside it is better."""

    rates: Rates
    scores: dict[Rates, float]
    interior: bool


def proposals(
    centre: Rates, factor: float, budget: int, knob: bool = False
) -> Generator[list[Rates], dict, Found]:
    """Yields rates to try, is sent the mean score of each, and returns what it found.

    centre: a rate a stage; with `knob` the rate of one stage and what else is searched. AlloError
    for a budget that does not reach around the centre.
    """
    directions = min(len(centre), 2)
    if budget < 1 + 2 * directions or not factor > 1:
        raise AlloError(
            f"tuning: {budget} candidates at a factor of {factor} cannot surround {len(centre)} "
            f"rates; set search.candidates to at least {1 + 2 * directions} and "
            "search.factor above 1"
        )
    scores: dict[Place, float] = {}
    best, step = (0.0,) * directions, 1.0

    def rates_at(place: Place) -> Rates:
        powers = place if knob else [sum(place), *(place[0] for _ in centre[1:])]
        return tuple(float(f"{r * factor**p:.4g}") for r, p in zip(centre, powers, strict=True))

    while True:
        around = [_moved(best, d, way * step) for d in range(directions) for way in (-1, 1)]
        wanted = [place for place in (best, *around) if place not in scores]
        at_most = budget if step < 1 else _BEYOND * budget
        interior = not wanted
        if not wanted and len(scores) < budget:
            step /= 2
            continue
        if not wanted or len(scores) + len(wanted) > at_most:
            told = {rates_at(place): score for place, score in scores.items()}
            return Found(rates_at(best), told, interior or step < 1)
        told = yield [rates_at(place) for place in wanted]
        scores |= {place: told[rates_at(place)] for place in wanted}
        # Of equal scores the smallest rates.
        best = max(scores, key=lambda place: (scores[place], [-e for e in place]))


def _moved(place: Place, direction: int, by: float) -> Place:
    return tuple(e + by * (d == direction) for d, e in enumerate(place))


def tune(profile: Profile, seeds: tuple[int, ...], folder: Path, data: str | None) -> Path:
    """Tune every method of a profile that has rates of its own; returns the file of the rates."""
    studies = [Study(profile, seed, folder, data) for seed in seeds]
    asked = {
        (name, method): stages_of(method, profile)
        for name in profile.domains
        for method in methods_of(studies[0], name)
        if method == tuned_as(method) and not relative_rates(method)
    }
    runs.prepare_all([(study, name) for study in studies for name in profile.domains])
    searches = {}
    for (name, method), stages in asked.items():
        if stages:
            centre, knob = arms.centre(studies[0], name, stages, knob=True), knob_of(stages)
            settings = profile.search.factor, profile.search.candidates
            searches[name, method] = proposals(centre, *settings, knob is not None)
    return _write(folder, *_run(studies, searches, data), seeds)


def _run(studies: list[Study], searches: dict, data) -> tuple[dict, list[tuple]]:
    """All searches side by side: domain and method -> Found, and rows of `tuning.csv`."""
    found: dict[tuple[str, str], Found] = {}
    rows: list[tuple] = []
    wanted = {key: next(search) for key, search in searches.items()}
    give_back_freed_memory()  # the workers need it, this process only waits
    settings = {"mp_context": fork_server(), "initializer": leave_with_parent}
    with ProcessPoolExecutor(max(1, studies[0].profile.compute.workers), **settings) as pool:
        while wanted:
            # Model by model, so that a worker seldom opens another study.
            jobs = [
                (study, key, rates) for study in studies for key in wanted for rates in wanted[key]
            ]
            scores = pool.map(_score, *zip(*map(_arguments, jobs), strict=True))
            told: dict = {}
            for (study, key, rates), score in zip(jobs, scores, strict=True):
                told.setdefault(key, {}).setdefault(rates, []).append(score)
                rows.append((*key, " ".join(f"{rate:g}" for rate in rates), study.seed, score))
            means = {k: {r: math.fsum(v) / len(v) for r, v in of.items()} for k, of in told.items()}
            wanted = {}
            for key, of_rates in means.items():
                try:
                    wanted[key] = searches[key].send(of_rates)
                except StopIteration as end:
                    found[key] = end.value
                    print(_line(key, end.value), flush=True)
    return found, rows


def _arguments(job) -> tuple:
    study, (name, method), rates = job
    return (study.profile, study.seed, str(study.results_dir), study.data_dir, name, method, rates)


def _score(profile, seed, results_dir, data_dir, name, method, rates) -> float:
    study = runs.study_of(profile, seed, results_dir, data_dir)
    return arms.score_at(study, name, method, rates)


def _line(key: tuple[str, str], found: Found) -> str:
    rates = ", ".join(f"{rate:g}" for rate in found.rates)
    edge = "" if found.interior else ", at the edge of what was tried"
    score = found.scores[found.rates]
    return f"{': '.join(key)}: {rates}, mean {score:.4f} ({len(found.scores)} tried{edge})"


def _write(folder: Path, found: dict, rows: list[tuple], seeds) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tuning.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*row[:-1], f"{row[-1]:.6f}") for row in sorted(rows))
    lines = [f"# By `./run_all.sh tune` on seeds {', '.join(map(str, seeds))}; see tuning.csv."]
    for name in dict.fromkeys(name for name, _ in found):
        lines.append(f"{name}:")
        for (domain, method), one in found.items():
            if domain == name:
                rates = ", ".join(f"{rate:.4e}" for rate in one.rates)
                edge = "" if one.interior else "  # at the edge of what was tried"
                lines.append(f"  {method}: [{rates}]{edge}")
    path = folder / "tuned.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
