"""Methods trained side by side: small models use one thread each better than all threads together.

Workers only fill the store. What they compute is read from there, so that a result does not depend
on how many of them there were.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache

from tqdm import tqdm

from allo_lib import arms
from allo_lib.config import Profile
from allo_lib.methods import PAPER_PROTOCOL, relative_rates, stages_of, waits_for
from allo_lib.runtime import give_back_freed_memory
from allo_lib.study import Study
from allo_lib.workers import fork_server, leave_with_parent

Row = tuple[str, str, int]  # domain, method and replicate


def run_methods(study: Study, asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict]]:
    """Results of methods by domain, in the order asked: domain -> method -> result.

    What is missing is trained first, that of all domains and replicates side by side; the results
    are those of the study's own replicate.
    """
    missing = {
        name: [
            (method, replicate)
            for method in methods
            for replicate in study.replicates
            if not arms.is_done(study.at(replicate), name, method)
        ]
        for name, methods in asked.items()
    }
    for name, runs in missing.items():
        if runs:
            prepare(study, name)
    _run_groups(study, _groups(study, missing))
    return {
        name: {method: arms.result(study, name, method) for method in methods}
        for name, methods in asked.items()
    }


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


def _groups(study: Study, missing: Mapping[str, Sequence[tuple[str, int]]]) -> list[list[Row]]:
    """What can be trained at once; then what reads another row's result, and so on."""
    groups: dict[int, list[Row]] = {}

    def place(row: Row) -> int:
        """The group that a row belongs to, after those that it waits for."""
        name, method, replicate = row
        if arms.is_done(study.at(replicate), name, method):
            return -1
        others = [(name, method, 0)] if replicate else []  # whose rates it takes
        if waits_for(method):
            others.append((name, waits_for(method), replicate))
        number = 1 + max((place(other) for other in others), default=-1)
        groups.setdefault(number, []).append(row)
        return number

    for name, runs in missing.items():
        for run in runs:
            place((name, *run))
    return [list(dict.fromkeys(groups[number])) for number in sorted(groups)]


def _run_groups(study: Study, groups: list[list[Row]]) -> None:
    """Train the rows of each group side by side, one group after the other."""
    most = max(map(len, groups), default=0)
    workers = min(study.profile.compute.workers, os.cpu_count() or 1, most)
    total = sum(map(len, groups))
    with tqdm(
        desc="methods trained", total=total, file=sys.stdout, position=0, disable=not total
    ) as bar:
        if workers < 2:
            for row in (row for group in groups for row in group):
                _tell(row, _result(study, *row), bar)
            return
        give_back_freed_memory()  # the workers need it, this process only waits
        settings = {"mp_context": fork_server(), "initializer": leave_with_parent}
        with ProcessPoolExecutor(workers, **settings) as pool:
            for group in groups:
                _wait_for_group(pool, study, group, bar)


def _wait_for_group(pool, study: Study, group: list[Row], bar: tqdm) -> None:
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    waiting = {
        pool.submit(_in_worker, *settings, *row): row for row in _longest_first(study, group)
    }
    try:
        for future in as_completed(waiting):
            future.result()
            _tell(waiting[future], _result(study, *waiting[future]), bar)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


def _longest_first(study: Study, rows: list[Row]) -> list[Row]:
    """By tokens of training in all, so that no worker ends long after the others."""
    tokens = {name: _tokens(study.encoded(name, "train")) for name, *_ in rows}

    def size(row: Row) -> int:
        name, method, replicate = row
        fixed = replicate or method.endswith(PAPER_PROTOCOL) or relative_rates(method)
        candidates = 1 if fixed else study.profile.search.candidates
        epochs = sum(stage.epochs for stage in stages_of(method, study.profile))
        return candidates * epochs * tokens[name]

    return sorted(rows, key=size, reverse=True)


def _tokens(pairs: list[dict]) -> int:
    return sum(len(pair[key]) for pair in pairs for key in ("prompt", "chosen", "rejected"))


def _in_worker(profile: Profile, seed: int, results_dir: str, data_dir, *row) -> None:
    _result(study_of(profile, seed, results_dir, data_dir), *row)


def _result(study: Study, name: str, method: str, replicate: int) -> dict:
    return arms.result(study.at(replicate), name, method)


def study_of(profile: Profile, seed: int, results_dir: str, data_dir) -> Study:
    """In a worker: the study, the one that it opened last if it is the same."""
    return _study(profile.hash(), seed, results_dir, data_dir, _Held(profile))


class _Held:
    """Carries an unhashable profile through the cache of `_study`, whose key is the hash."""

    def __init__(self, profile: Profile):
        self.profile = profile

    def __eq__(self, other):
        return isinstance(other, _Held)

    def __hash__(self):
        return 0


@lru_cache(maxsize=1)
def _study(profile_hash: str, seed: int, results_dir: str, data_dir, held: _Held) -> Study:
    return Study(held.profile, seed, results_dir, data_dir)


def _tell(row: Row, found: dict, bar: tqdm) -> None:
    name, method, replicate = row
    told = f"{name}, {method}{f', replicate {replicate}' if replicate else ''}"
    bar.set_postfix_str(f"{told}: dev {found['dev']:.3f}", refresh=False)
    bar.update()
