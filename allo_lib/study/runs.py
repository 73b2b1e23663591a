"""Runs of the methods: which a domain has, side by side in workers, and the tuning of their rates.

Small models use one thread each better than all threads together. Workers only fill the store; what
they compute is read from there, so that a result does not depend on how many of them there were.

`./run_all.sh tune PROFILE --seeds 100,101,102,103` finds rates and second knobs on SFT models that
are never reported: each method is trained on their first replicates, and the rates with the best
mean score on the development problems are taken. Averaging over models leaves less to the luck of
one run than a search on each reported seed does. `tuning.csv` holds every score; `tuned.yaml` the
rates, which a profile takes by `tuned: NAME` in a domain from `profiles/rates/NAME.yaml`. ALLO with
another reward model, density or official detail takes ALLO's own rates (`methods.tuned_as`).
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.machine.environment import ROOT
from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.method.losses import ON_POLICY
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import stages_of, tuned_as
from allo_lib.study import scoring, training
from allo_lib.study.search import proposals
from allo_lib.study.study import Study

Run = tuple[Study, str, str]  # a seed's study, at one of its replicates; domain, method


# --- which methods -------------------------------------------------------------------------------


def methods_of(study: Study, name: str) -> list[str]:
    """Methods that the profile runs on a domain of this seed, in order, without repeats."""
    profile, domain = study.profile, study.domain(name)
    number = study.seed - profile.first_seed
    if domain.models and number not in range(domain.models):
        return []
    own = domain if domain.methods or domain.ablations else profile
    left_out = set(profile.replicates.once if study.replicate else ())
    left_out |= set(domain.one_model if number else ())
    if domain.kind != "miniature":
        left_out |= {"allo_oracle_tokens", "allo_rm_oracle"}
    if domain.kind == "preferences":
        # SFT on chosen replies is RFT, as nothing is sampled; the starting model, which is the
        # reference itself, gives every pair the margin 0: it ranks nothing; and without a verifier
        # no sampled response is rewarded.
        left_out |= {"rft", "sft_base", *ON_POLICY}
    requested = dict.fromkeys(("sft_base", *own.methods, *own.ablations))
    return [method for method in requested if method not in left_out]


def domains_of(study: Study) -> list[str]:
    """The domains that this seed's SFT model is made for."""
    return [name for name in study.profile.domains if methods_of(study, name)]


def chosen_domain(study: Study, name: str = "") -> str:
    """The domain that a notebook looks at: `name`, or the first that this seed has a model for.

    Raises:
        AlloError: an unknown domain, or one that this seed has no SFT model for (`Domain.models`).
    """
    has = domains_of(study)
    if not has or (name and not methods_of(study, name)):
        raise AlloError(
            f"seed {study.seed} has no SFT model for {name or 'any domain'} of "
            f"{study.profile.name}; name another seed{' or domain' * bool(has)}"
        )
    return name or has[0]


def missing(study: Study) -> list[str]:
    """One line a domain: methods that lack the result of a replicate; nothing is made."""
    lines = []
    for name in study.profile.domains:
        lacking = [
            method
            for method in methods_of(study, name)
            if not all(
                training.is_done(study.at(r), name, method) for r in study.replicates_of(method)
            )
        ]
        lines.append(f"seed {study.seed}, {name}: methods {', '.join(lacking) or 'none'}")
    return lines


# --- side by side --------------------------------------------------------------------------------


def run_methods(study: Study, requested: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Results of methods by domain, in the order requested: domain -> method -> result.

    What is missing is trained first (`fill`); the results are those of the study's own replicate.
    """
    fill((study, name, method) for name, methods in requested.items() for method in methods)
    return {
        name: {method: training.result(study, name, method) for method in methods}
        for name, methods in requested.items()
    }


def fill(requested: Iterable[Run]) -> None:
    """Train and measure what is missing of these methods, in all replicates, side by side."""
    before: dict[Run, list[Run]] = {}

    def add(run: Run) -> None:
        if run not in before and not training.is_done(*run):
            other = training.run_before(*run)
            before[run] = [other] if other and not training.is_done(*other) else []
            for needed in before[run]:
                add(needed)

    for study, name, method in requested:
        for replicate in study.replicates_of(method):
            add((study.at(replicate), name, method))
    prepare_all((study.at(0), name) for study, name, _ in before)
    side_by_side(_train, before, "methods trained")


def _train(study: Study, name: str, method: str) -> None:
    """Leave a result in the store, and hand nothing back: together they can be large."""
    training.result(study, name, method)


def prepare_all(shared: Iterable[tuple]) -> None:
    """`prepare` with each of these arguments, side by side where there are several."""
    side_by_side(prepare, dict.fromkeys(shared, ()), "studies prepared")


def prepare(study: Study, name: str, splits: tuple[str, ...] = ("dev", "test")) -> None:
    """Make what several methods share before they ask for it at the same time.

    splits: those whose problems they will answer.
    """
    trained_on = sorted({study.at(replicate).train for replicate in study.replicates})
    for split in (*trained_on, "heldout"):
        study.encoded(name, split)
    study.scores(name).file("scores.safetensors")
    for split in trained_on:
        study.keep_probabilities(name, split)
    for split in splits if study.task(name) is not None else ():
        study.drafts(name, split)
    if study.domain(name).instructions.datasets:
        study.replies(name)


def side_by_side(
    work: Callable, jobs: Mapping[tuple, Iterable[tuple]], title: str
) -> dict[tuple, Any]:
    """What `work` makes of the arguments of every job, in workers; job -> that.

    jobs: a job's arguments, of which the first is its study -> the jobs that have to end before it.
    A bar named `title` counts them.
    """
    most = max((study.profile.compute.workers for study, *_ in jobs), default=1)
    workers, total = min(most, os.cpu_count() or 1, len(jobs)), len(jobs)
    order, found = TopologicalSorter(jobs), {}
    with tqdm(desc=title, total=total, file=sys.stdout, position=0, disable=total < 2) as bar:

        def done(job: tuple, made) -> None:
            found[job] = made
            bar.set_postfix_str(", ".join(map(str, job[1:])), refresh=False)
            bar.update()

        if workers < 2:
            for job in order.static_order():
                done(job, work(*job))
            return found
        give_back_freed_memory()  # the workers need it, this process only waits
        pool = ProcessPoolExecutor(workers, fork_server(), leave_with_parent)
        running: dict = {}
        order.prepare()
        try:
            while order.is_active():
                for study, *rest in order.get_ready():
                    opened_by = study.profile, study.seed, study.results_dir, study.data_dir
                    future = pool.submit(_in_worker, work, opened_by, study.replicate, *rest)
                    running[future] = (study, *rest)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    done(job, future.result())
                    order.done(job)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


_STUDY: dict[tuple, Study] = {}  # in a worker: the study that it opened last


def _in_worker(work: Callable, opened_by: tuple, replicate: int, *arguments):
    profile, *rest = opened_by
    key = (profile.hash(), *rest)
    if key not in _STUDY:
        _STUDY.clear()
        for part in (*Study.__mro__, scoring):  # they would keep the study, and its model
            for function in vars(part).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
        _STUDY[key] = Study(profile, *rest)
    return work(_STUDY[key].at(replicate), *arguments)


# --- tuning --------------------------------------------------------------------------------------


def tune(profile: Profile, seeds: tuple[int, ...], folder: Path, data: str | None) -> Path:
    """Tune every method of a profile that has rates of its own; returns the file of the rates.

    All searches go on together, round by round, so that no worker waits for the end of another's.
    """
    studies = [Study(profile, seed, folder, data) for seed in seeds]
    # The first seed has every method, whatever later ones lack.
    first = Study(profile, profile.first_seed, folder, data)
    prepare_all((study, name, ("dev",)) for study in studies for name in profile.domains)
    searches = {}
    for name in profile.domains:
        for method in methods_of(first, name):
            if (stages := stages_of(method, profile)) and method == tuned_as(method):
                start = training.initial_rates(studies[0], name, stages, knob=True)
                budget = profile.search.factor, profile.search.candidates
                searches[name, method] = proposals(start, *budget, len(start) > len(stages))
    wanted = {which: next(going) for which, going in searches.items()}
    found, rows = {}, []
    while wanted:
        # Model by model, so that a worker seldom opens another study.
        jobs = [
            (study, *which, rates)
            for study in studies
            for which, several in wanted.items()
            for rates in several
        ]
        scores = side_by_side(training.score_at, dict.fromkeys(jobs, ()), "rates tried")
        rows += [
            (name, method, " ".join(f"{rate:g}" for rate in rates), study.seed, score)
            for (study, name, method, rates), score in scores.items()
        ]
        for which, several in [*wanted.items()]:
            means = {
                rates: math.fsum(scores[study, *which, rates] for study in studies) / len(studies)
                for rates in several
            }
            try:
                wanted[which] = searches[which].send(means)
            except StopIteration as end:
                found[which] = end.value
                del wanted[which]
    columns = ("domain", "method", "rates", "model", "score")
    scored = [(*row, f"{score:.6f}") for *row, score in sorted(rows)]
    outcomes.write_csv(folder / "tuning.csv", columns, scored)
    tuned: dict[str, dict] = {name: {} for name in profile.domains}
    for name, method in searches:
        tuned[name][method] = list(found[name, method].rates)
    at_edge = [
        f"{method} of {name}" for name, method in searches if not found[name, method].interior
    ]
    path = folder / "tuned.yaml"
    path.write_text(
        f"# By `./run_all.sh tune` on seeds {', '.join(map(str, seeds))}; see tuning.csv.\n"
        f"# At the edge of what was tried: {', '.join(at_edge) or 'none'}.\n"
        f"{yaml.safe_dump(tuned, sort_keys=False, default_flow_style=None)}",
        encoding="utf-8",
    )
    return path


def tried(study: Study, name: str, found: Mapping[str, dict]) -> tuple[dict[str, list[dict]], int]:
    """Every model behind the rates of some results, and the development problems of each.

    Those of their own searches; where rates were tuned on other models and `results/tuning` has the
    scores, the mean over these, at the best second knob of every rate. A record has
    `rates`, `dev`, `displacement`, `train_margin`.
    """
    count = scoring.dev_count(study, name)
    evidence = ROOT / "results" / "tuning" / f"{study.domain(name).tuning}.csv"
    if training.is_searched(study, name) or not evidence.is_file():
        searched = {
            method: [one for one in result["tried"] if one["displacement"] is not None]
            for method, result in found.items()
        }
        return {method: several for method, several in searched.items() if several}, count
    table = pd.read_csv(evidence)
    table = table[(table["domain"] == name) & (table["score"] != training.DIVERGED)]
    means = table.groupby(["method", "rates"])["score"].mean().reset_index()
    means["rate"] = means["rates"].str.split().str[0].astype(float)
    best: dict[str, list[dict]] = {}
    for (method, rate), score in means.groupby(["method", "rate"])["score"].max().items():
        record = {"rates": [rate], "dev": score, "displacement": None, "train_margin": None}
        best.setdefault(method, []).append(record)
    own = {method: best[tuned_as(method)] for method in found if tuned_as(method) in best}
    return own, count * table["model"].nunique()
