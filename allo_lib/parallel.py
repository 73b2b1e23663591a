"""Methods trained side by side: small models use one thread each better than all threads together.

Workers only fill the store. What they compute is read from there, so that a result does not depend
on how many of them there were.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache

from allo_lib import arms
from allo_lib.config import Profile
from allo_lib.methods import PAPER_PROTOCOL, stages_of
from allo_lib.runtime import give_back_freed_memory
from allo_lib.study import Study
from allo_lib.workers import fork_server

# Rows that read the trained model of another row, which has to be there first.
_AFTER_DPO = ("allo_key_reference",)


def run_methods(study: Study, name: str, methods: list[str]) -> dict[str, dict]:
    """Results of methods on a domain, in the order asked; missing ones are trained first."""
    missing = [method for method in methods if not arms.is_done(study, name, method)]
    groups = [missing]
    later = [m for m in missing if m.endswith(PAPER_PROTOCOL) or m in _AFTER_DPO]
    if later and not arms.is_done(study, name, "dpo"):
        first = [m for m in missing if m not in later]
        groups = [first if "dpo" in first else ["dpo", *first], later]
    if missing:
        prepare(study, name)
        _run_groups(study, name, groups)
    return {method: arms.result(study, name, method) for method in methods}


def prepare(study: Study, name: str) -> None:
    """Make what several methods share before they ask for it at the same time."""
    study.encoded(name, "train")
    study.encoded(name, "heldout")
    study.scores(name)
    study.keep_probabilities(name, "train")


def _run_groups(study: Study, name: str, groups: list[list[str]]) -> None:
    """Train the methods of each group side by side, one group after the other."""
    most = max(map(len, groups))
    workers = min(study.profile.compute.workers, os.cpu_count() or 1, most)
    started = time.perf_counter()
    if workers < 2:
        for method in (method for group in groups for method in group):
            _tell(method, arms.result(study, name, method), started)
        return
    give_back_freed_memory()  # the workers need it, this process only waits
    with ProcessPoolExecutor(workers, mp_context=fork_server()) as pool:
        for group in groups:
            _wait_for_group(pool, study, name, group, started)


def _wait_for_group(pool, study: Study, name: str, group: list[str], started: float) -> None:
    settings = (study.profile, study.seed, str(study.results_dir), study.data_dir)
    waiting = {
        pool.submit(_in_worker, *settings, name, method): method
        for method in _longest_first(study.profile, group)
    }
    try:
        for future in as_completed(waiting):
            future.result()
            _tell(waiting[future], arms.result(study, name, waiting[future]), started)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


def _longest_first(profile: Profile, methods: list[str]) -> list[str]:
    """By epochs of training in all, so that no worker ends long after the others."""

    def epochs(method: str) -> int:
        candidates = 1 if method.endswith(PAPER_PROTOCOL) else profile.search.candidates
        return candidates * sum(stage.epochs for stage in stages_of(method, profile))

    return sorted(methods, key=epochs, reverse=True)


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


def _tell(method: str, found: dict, started: float) -> None:
    rates = ", ".join(f"{rate:g}" for rate in found["rates"]) or "none"
    seconds = time.perf_counter() - started
    print(f"{method}: best rates {rates}, dev {found['dev']:.3f} ({seconds:.0f} s)", flush=True)
    sys.stdout.flush()
