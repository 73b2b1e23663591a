"""Which methods of a study have a result in its store, and which have none yet; nothing is made.

`status.missing` runs it in a process of its own.
"""

import json
import sys

from allo_lib import analysis, results
from allo_lib.profile_files import load_profile
from allo_lib.study import Study


def lines(study: Study) -> list[str]:
    """One line a domain: what is missing, and the scores of what is there."""
    told = []
    for name in study.profile.domains:
        asked = results.methods_of(study, name)
        found = analysis.trained_before(study, name)
        missing = [method for method in asked if method not in found]
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
