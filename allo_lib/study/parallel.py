"""Methods trained side by side: small models use one thread each better than all threads together.

Workers only fill the store. What they compute is read from there, so that a result does not depend
on how many of them there were.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, lru_cache

from tqdm import tqdm

from allo_lib.machine.runtime import fork_server, give_back_freed_memory, leave_with_parent
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import (
    KEY_REFERENCE,
    PAPER_PROTOCOL,
    relative_rates,
    stages_of,
    waits_for,
)
from allo_lib.study import arms
from allo_lib.study.study import Study

Row = tuple[Study, str, str, int]  # seed's study, domain, method and replicate


def run_methods(study: Study, asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict]]:
    """Results of methods by domain, in the order asked: domain -> method -> result.

    What is missing is trained first (`fill`); the results are those of the study's own replicate.
    """
    fill([study], asked)
    return {
        name: {method: arms.result(study, name, method) for method in methods}
        for name, methods in asked.items()
    }


def fill(studies: Sequence[Study], asked: Mapping[str, Sequence[str]]) -> None:
    """Train and measure what is missing: of all seeds, domains and replicates, side by side."""
    missing = [
        (study, name, method, replicate)
        for study in studies
        for name, methods in asked.items()
        for method in methods
        for replicate in study.replicates_of(method)
        if not arms.is_done(study.at(replicate), name, method)
    ]
    prepare_all(list(dict.fromkeys((study, name) for study, name, *_ in missing)))
    _side_by_side(_result, _groups(missing), "methods trained", _told)


def prepare_all(shared: list[tuple[Study, str]]) -> None:
    """`prepare` for every (study, domain), side by side where there are several."""
    _side_by_side(_prepared, [shared], "studies prepared", lambda *_: "")


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


def _groups(missing: Sequence[Row]) -> list[list[Row]]:
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

    for row in missing:
        place(row)
    return [_longest_first(list(groups[number])) for number in sorted(groups)]


def _side_by_side(work, groups: Sequence[Sequence[tuple]], what: str, told) -> None:
    """Call `work` with the rows of each group, in workers, one group after the other.

    A row begins with its study. A bar named `what` counts them, and says `told` of the last row and
    what `work` made of it.
    """
    most = max(map(len, groups), default=0)
    if not most:
        return
    workers = min(groups[0][0][0].profile.compute.workers, os.cpu_count() or 1, most)
    total = sum(map(len, groups))
    with tqdm(desc=what, total=total, file=sys.stdout, position=0, disable=total < 2) as bar:

        def done(row: tuple, made) -> None:
            bar.set_postfix_str(told(row, made), refresh=False)
            bar.update()

        if workers < 2:
            for row in (row for group in groups for row in group):
                done(row, work(*row))
            return
        give_back_freed_memory()  # the workers need it, this process only waits
        settings = {"mp_context": fork_server(), "initializer": leave_with_parent}
        with ProcessPoolExecutor(workers, **settings) as pool:
            for group in groups:
                waiting = {pool.submit(_in_worker, work, _opened(row[0]), *row[1:]): row
                           for row in group}  # fmt: skip
                try:
                    for future in as_completed(waiting):
                        done(waiting[future], future.result())
                except BaseException:
                    for future in waiting:
                        future.cancel()
                    raise


def _opened(study: Study) -> tuple:
    """What `study_of` opens a study by, in a worker."""
    return study.profile, study.seed, str(study.results_dir), study.data_dir


def _longest_first(rows: list[Row]) -> list[Row]:
    """Seed by seed, as a worker holds one study; then by tokens of training in all, so that no
    worker ends long after the others."""

    @cache
    def tokens(study: Study, name: str) -> int:
        return _tokens(study.encoded(name, "train"))

    def size(row: Row) -> tuple[int, int]:
        study, name, method, replicate = row
        fixed = replicate or method.endswith(PAPER_PROTOCOL) or relative_rates(method)
        candidates = 1 if fixed else study.profile.search.candidates
        epochs = sum(stage.epochs for stage in stages_of(method, study.profile))
        return study.seed, -candidates * epochs * tokens(study, name)

    return sorted(rows, key=size)


def _tokens(pairs: list[dict]) -> int:
    return sum(len(pair[key]) for pair in pairs for key in ("prompt", "chosen", "rejected"))


def _in_worker(work, opened: tuple, *row):
    return work(study_of(*opened), *row)


def _result(study: Study, name: str, method: str, replicate: int) -> dict:
    return arms.result(study.at(replicate), name, method)


def _prepared(study: Study, name: str) -> None:
    prepare(study, name)


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


def _told(row: Row, found: dict) -> str:
    study, name, method, replicate = row
    told = f"seed {study.seed}, {name}, {method}{f', replicate {replicate}' if replicate else ''}"
    return f"{told}: dev {found['dev']:.3f}"
