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

import contextlib
import csv
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from allo_lib.engine.store import NotMade
from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import (
    KEY_REFERENCE,
    PAPER_PROTOCOL,
    knob_of,
    relative_rates,
    stages_of,
    tuned_as,
    waits_for,
)
from allo_lib.study import arms
from allo_lib.study.search import Found, proposals
from allo_lib.study.study import Study

Row = tuple[Study, str, str, int]  # a seed's study, domain, method and replicate
COLUMNS = ("domain", "method", "rates", "model", "score")  # of tuning.csv


# --- which methods -------------------------------------------------------------------------------


def methods_of(study: Study, name: str) -> list[str]:
    """Methods that the profile runs on a domain, in order, without repeats."""
    profile, domain = study.profile, study.domain(name)
    if domain.methods or domain.ablations:
        requested = ("sft_base", *domain.methods, *domain.ablations)
    else:
        requested = ("sft_base", *profile.methods, *profile.ablations)
    left_out = set(profile.replicates.once if study.replicate else ())
    if domain.kind != "miniature":
        left_out |= {"allo_oracle_tokens", "allo_rm_oracle"}
    if domain.kind == "preferences":
        # SFT on chosen replies is RFT, as nothing is sampled; and the starting model, which is the
        # reference itself, gives every pair the margin 0: it ranks nothing.
        left_out |= {"rft", "sft_base"}
    return [
        method
        for method in dict.fromkeys(requested)
        if method not in left_out and arms.why_not(study, name, method) is None
    ]


def trained_before(study: Study, name: str) -> dict[str, dict]:
    """Method -> result of those of the profile's methods whose results the store has.

    Makes nothing: of a domain without an SFT model none is trained, and that is the answer.
    """
    found = {}
    for method in methods_of(study, name):
        with study.store.only_reading(), contextlib.suppress(NotMade):
            found[method] = arms.result(study, name, method)
    return found


def missing(study: Study) -> list[str]:
    """One line a domain: methods that lack a replicate, and the scores of the first ones; nothing
    is made."""
    lines = []
    for name in study.profile.domains:
        runs = [trained_before(study.at(replicate), name) for replicate in study.replicates]
        lacking = [m for m in methods_of(study, name) if not all(m in run for run in runs)]
        scores = [f"{m} {_score(result):.3f}" for m, result in runs[0].items()]
        line = f"seed {study.seed}, {name}: methods {', '.join(lacking) or 'none'}"
        lines.append(f"{line} (there: {', '.join(scores) or 'none'})")
    return lines


def _score(result: dict) -> float:
    """Test accuracy, or held-out reward accuracy where nothing is answered."""
    if "answers" in result:
        return statistics.fmean(right for *_, right in result["answers"])
    return statistics.fmean(margin > 0 for margin in result["margins"])


# --- side by side --------------------------------------------------------------------------------


def run_methods(study: Study, requested: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Results of methods by domain, in the order requested: domain -> method -> result.

    What is missing is trained first (`fill`); the results are those of the study's own replicate.
    """
    fill([study], requested)
    return {
        name: {method: arms.result(study, name, method) for method in methods}
        for name, methods in requested.items()
    }


def fill(studies: Sequence[Study], requested: Mapping[str, Sequence[str]]) -> None:
    """Train and measure what is missing: of all seeds, domains and replicates, side by side."""
    rows = [
        (study, name, method, replicate)
        for study in studies
        for name, methods in requested.items()
        for method in methods
        for replicate in study.replicates_of(method)
        if not arms.is_done(study.at(replicate), name, method)
    ]
    prepare_all(list(dict.fromkeys((study, name) for study, name, *_ in rows)))
    _side_by_side(_result, _groups(rows), "methods trained", _label)


def prepare_all(shared: list[tuple[Study, str]]) -> None:
    """`prepare` for every (study, domain), side by side where there are several."""
    _side_by_side(prepare, [shared], "studies prepared", lambda *_: "")


def prepare(study: Study, name: str) -> None:
    """Make what several methods share before they ask for it at the same time."""
    splits = {study.at(replicate).train for replicate in study.replicates}
    for split in (*sorted(splits), "heldout"):
        study.encoded(name, split)
    study.scores(name).file("scores.safetensors")
    for split in sorted(splits):
        study.keep_probabilities(name, split)
    if study.task(name) is not None:
        study.drafts(name, "dev"), study.drafts(name, "test")
    if study.domain(name).instructions.datasets:
        study.replies(name)


def _result(study: Study, name: str, method: str, replicate: int) -> dict:
    return arms.result(study.at(replicate), name, method)


def _label(row: Row, result: dict) -> str:
    study, name, method, replicate = row
    label = f"seed {study.seed}, {name}, {method}{f', replicate {replicate}' if replicate else ''}"
    return f"{label}: dev {result['dev']:.3f}"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """What can be trained at once; then what reads another row's result, and so on."""
    groups: dict[int, dict[Row, None]] = {}

    def place(row: Row) -> int:
        """The group that a row belongs to, after those that it waits for."""
        study, name, method, replicate = row
        if arms.is_done(study.at(replicate), name, method):
            return -1
        others = []
        if not study.domain(name).tuned:  # whose rates it takes
            others += [(study, name, method, 0)] if replicate else []
        if waits_for(method) and not (study.domain(name).tuned and method != KEY_REFERENCE):
            others.append((study, name, waits_for(method), replicate))
        number = 1 + max((place(other) for other in others), default=-1)
        groups.setdefault(number, {})[row] = None
        return number

    for row in rows:
        place(row)
    return [_longest_first(list(groups[number])) for number in sorted(groups)]


def _longest_first(rows: list[Row]) -> list[Row]:
    """Seed by seed, as a worker holds one study; then by tokens of training in all, so that no
    worker ends long after the others."""

    @cache
    def tokens(study: Study, name: str) -> int:
        keys = ("prompt", "chosen", "rejected")
        return sum(len(pair[key]) for pair in study.encoded(name, "train") for key in keys)

    def size(row: Row) -> tuple[int, int]:
        study, name, method, replicate = row
        fixed = replicate or method.endswith(PAPER_PROTOCOL) or relative_rates(method)
        candidates = 1 if fixed else study.profile.search.candidates
        epochs = sum(stage.epochs for stage in stages_of(method, study.profile))
        return study.seed, -candidates * epochs * tokens(study, name)

    return sorted(rows, key=size)


def _side_by_side(
    work: Callable, groups: Sequence[Sequence[tuple]], title: str, label: Callable
) -> None:
    """Call `work` with the rows of each group, in workers, one group after the other.

    A row begins with its study. A bar named `title` counts them, and shows `label` of the last row
    and what `work` made of it.
    """
    most = max(map(len, groups), default=0)
    if not most:
        return
    workers = min(groups[0][0][0].profile.compute.workers, os.cpu_count() or 1, most)
    total = sum(map(len, groups))
    with tqdm(desc=title, total=total, file=sys.stdout, position=0, disable=total < 2) as bar:

        def done(row: tuple, made) -> None:
            bar.set_postfix_str(label(row, made), refresh=False)
            bar.update()

        if workers < 2:
            for row in (row for group in groups for row in group):
                done(row, work(*row))
            return
        with _pool(workers) as pool:
            for group in groups:
                waiting = {
                    pool.submit(_in_worker, work, _opened_by(study), *rest): (study, *rest)
                    for study, *rest in group
                }
                try:
                    for future in as_completed(waiting):
                        done(waiting[future], future.result())
                except BaseException:
                    for future in waiting:
                        future.cancel()
                    raise


def _pool(workers: int) -> ProcessPoolExecutor:
    give_back_freed_memory()  # the workers need it, this process only waits
    return ProcessPoolExecutor(workers, mp_context=fork_server(), initializer=leave_with_parent)


def _opened_by(study: Study) -> tuple:
    """What a worker opens the same study by."""
    return study.profile, study.seed, str(study.results_dir), study.data_dir


_STUDY: dict[tuple, Study] = {}  # in a worker: the study that it opened last


def _in_worker(work: Callable, opened_by: tuple, *row):
    profile, *rest = opened_by
    key = (profile.hash(), *rest)
    if key not in _STUDY:
        _STUDY.clear()
        _STUDY[key] = Study(*opened_by)
    return work(_STUDY[key], *row)


# --- tuning --------------------------------------------------------------------------------------


def tune(profile: Profile, seeds: tuple[int, ...], folder: Path, data: str | None) -> Path:
    """Tune every method of a profile that has rates of its own; returns the file of the rates."""
    studies = [Study(profile, seed, folder, data) for seed in seeds]
    prepare_all([(study, name) for study in studies for name in profile.domains])
    searches = {}
    for name in profile.domains:
        for method in methods_of(studies[0], name):
            stages = stages_of(method, profile)
            if stages and method == tuned_as(method) and not relative_rates(method):
                centre, knob = arms.centre(studies[0], name, stages, knob=True), knob_of(stages)
                settings = profile.search.factor, profile.search.candidates
                searches[name, method] = proposals(centre, *settings, knob is not None)
    found, rows = _search_all(studies, searches)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tuning.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*row, f"{score:.6f}") for *row, score in sorted(rows))
    path = folder / "tuned.yaml"
    path.write_text(_tuned_yaml(found, seeds), encoding="utf-8")
    return path


def _search_all(studies: list[Study], searches: dict) -> tuple[dict, list[tuple]]:
    """All searches side by side: (domain, method) -> Found, and rows of `tuning.csv`."""
    found: dict[tuple[str, str], Found] = {}
    rows: list[tuple] = []
    wanted = {key: next(search) for key, search in searches.items()}
    with _pool(max(1, studies[0].profile.compute.workers)) as pool:
        while wanted:
            # Model by model, so that a worker seldom opens another study.
            jobs = [(study, *key, rates) for study in studies for key in wanted
                    for rates in wanted[key]]  # fmt: skip
            arguments = [(_opened_by(study), *rest) for study, *rest in jobs]
            values = pool.map(partial(_in_worker, arms.score_at), *zip(*arguments, strict=True))
            scores: dict = {}
            for (study, name, method, rates), score in zip(jobs, values, strict=True):
                scores.setdefault((name, method), {}).setdefault(rates, []).append(score)
                rows.append((name, method, _shown(rates, " "), study.seed, score))
            wanted = {}
            for key, by_rates in scores.items():
                means = {rates: math.fsum(v) / len(v) for rates, v in by_rates.items()}
                try:
                    wanted[key] = searches[key].send(means)
                except StopIteration as end:
                    found[key] = one = end.value
                    edge = "" if one.interior else ", at the edge of what was tried"
                    print(f"{': '.join(key)}: {_shown(one.rates, ', ')}, mean "
                          f"{one.scores[one.rates]:.4f} ({len(one.scores)} tried{edge})",
                          flush=True)  # fmt: skip
    return found, rows


def _shown(rates: tuple[float, ...], between: str) -> str:
    return between.join(f"{rate:g}" for rate in rates)


def _tuned_yaml(found: dict, seeds) -> str:
    lines = [f"# By `./run_all.sh tune` on seeds {', '.join(map(str, seeds))}; see tuning.csv."]
    for name in dict.fromkeys(name for name, _ in found):
        lines.append(f"{name}:")
        for (domain, method), one in found.items():
            if domain == name:
                rates = ", ".join(f"{rate:.4e}" for rate in one.rates)
                edge = "" if one.interior else "  # at the edge of what was tried"
                lines.append(f"  {method}: [{rates}]{edge}")
    return "\n".join(lines) + "\n"
