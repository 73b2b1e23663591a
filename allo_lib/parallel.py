"""Methods trained side by side: small models use one thread each better than all threads together.

Workers only fill the store. What they compute is read from there, so that a result does not depend
on how many of them there were.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache

from allo_lib import arms
from allo_lib.config import Profile
from allo_lib.methods import PAPER_PROTOCOL, relative_rates, stages_of, waits_for
from allo_lib.runtime import give_back_freed_memory
from allo_lib.study import Study
from allo_lib.workers import fork_server, leave_with_parent

Row = tuple[str, str]  # domain and method


def run_methods(study: Study, asked: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict]]:
    """Results of methods by domain, in the order asked: domain -> method -> result.

    What is missing is trained first, that of all domains side by side.
    """
    missing = {
        name: [method for method in methods if not arms.is_done(study, name, method)]
        for name, methods in asked.items()
    }
    for name, methods in missing.items():
        if methods:
            prepare(study, name)
    _run_groups(study, _groups(study, missing))
    return {
        name: {method: arms.result(study, name, method) for method in methods}
        for name, methods in asked.items()
    }


def prepare(study: Study, name: str) -> None:
    """Make what several methods share before they ask for it at the same time."""
    study.encoded(name, "train")
    study.encoded(name, "heldout")
    study.scores(name).file("scores.safetensors")
    study.keep_probabilities(name, "train")
    if study.task(name) is not None:
        study.drafts(name, "dev"), study.drafts(name, "test")
    if study.domain(name).instructions.datasets:
        study.replies(name)


def _groups(study: Study, missing: Mapping[str, Sequence[str]]) -> list[list[Row]]:
    """What can be trained at once; then what reads the trained model of another row."""
    first: list[Row] = []
    later: list[Row] = []
    for name, methods in missing.items():
        for method in methods:
            other = waits_for(method)
            if other is None or arms.is_done(study, name, other):
                first.append((name, method))
            else:
                first.append((name, other))
                later.append((name, method))
    return [list(dict.fromkeys(group)) for group in (first, later) if group]


def _run_groups(study: Study, groups: list[list[Row]]) -> None:
    """Train the rows of each group side by side, one group after the other."""
    most = max(map(len, groups), default=0)
    workers = min(study.profile.compute.workers, os.cpu_count() or 1, most)
    started = time.perf_counter()
    if workers < 2:
        for name, method in (row for group in groups for row in group):
            _tell(name, method, arms.result(study, name, method), started)
        return
    give_back_freed_memory()  # the workers need it, this process only waits
    settings = {"mp_context": fork_server(), "initializer": leave_with_parent}
    with ProcessPoolExecutor(workers, **settings) as pool:
        for group in groups:
            _wait_for_group(pool, study, group, started)


def _wait_for_group(pool, study: Study, group: list[Row], started: float) -> None:
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    waiting = {
        pool.submit(_in_worker, *settings, *row): row
        for row in _longest_first(study, group)
    }
    try:
        for future in as_completed(waiting):
            future.result()
            _tell(*waiting[future], arms.result(study, *waiting[future]), started)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


def _longest_first(study: Study, rows: list[Row]) -> list[Row]:
    """By tokens of training in all, so that no worker ends long after the others."""
    tokens = {name: _tokens(study.encoded(name, "train")) for name in dict(rows)}

    def size(row: Row) -> int:
        name, method = row
        fixed = method.endswith(PAPER_PROTOCOL) or relative_rates(method)
        candidates = 1 if fixed else study.profile.search.candidates
        epochs = sum(stage.epochs for stage in stages_of(method, study.profile))
        return candidates * epochs * tokens[name]

    return sorted(rows, key=size, reverse=True)


def _tokens(pairs: list[dict]) -> int:
    return sum(len(pair[key]) for pair in pairs for key in ("prompt", "chosen", "rejected"))


def _in_worker(profile: Profile, seed: int, results_dir: str, data_dir, name, method) -> None:
    arms.result(_study(profile.hash(), seed, results_dir, data_dir, _Held(profile)), name, method)


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


def _tell(name: str, method: str, found: dict, started: float) -> None:
    rates = ", ".join(f"{rate:g}" for rate in found["rates"]) or "none"
    told = f"{name}, {method}: best rates {rates}, dev {found['dev']:.3f}"
    print(f"{told} ({time.perf_counter() - started:.0f} s)", flush=True)
