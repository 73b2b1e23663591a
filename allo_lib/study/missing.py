"""Which methods of a study have a result in its store, and which have none yet; nothing is made.

`status.missing` runs it in a process of its own.
"""

import json
import sys

from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import analysis, results
from allo_lib.study.study import Study


def lines(study: Study) -> list[str]:
    """One line a domain: methods that lack a replicate, and the scores of the first ones."""
    told = []
    for name in study.profile.domains:
        asked = results.methods_of(study, name)
        runs = [analysis.trained_before(study.at(r), name) for r in study.replicates]
        found = runs[0]
        missing = [method for method in asked if not all(method in run for run in runs)]
        scores = [f"{method} {analysis.score_of(one)[0]:.3f}" for method, one in found.items()]
        line = f"seed {study.seed}, {name}: methods {', '.join(missing) or 'none'}"
        told.append(f"{line} (there: {', '.join(scores) or 'none'})")
    return told


def main(given: str, overrides: dict, seeds: list[int], folder: str, data: str | None) -> None:
    profile = load_profile(given, overrides)
    for seed in seeds:
        print("\n".join(lines(Study(profile, seed, folder, data))))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
