"""`run_all.sh grid FILE.yaml`: a study for every combination of settings, and one table of all.

    profile: tiny                  # a name, or a YAML file
    seeds: [0, 1]                  # default: as without --seeds
    domains: [questions, maths]    # each in a study of its own; default: all in one
    vary:                          # profile keys, each with the values to try
      method.share: [0.05, 0.1, 0.2]
      domains.miniature.pairs.train: [450, 900]

A combination has a folder of its own, named by its values, in `results/<name of the file>`, and is
run as `run_all.sh` runs any study: what is done is not done again. `--task 3` runs the fourth one
alone, as an array job does; whichever ends last leaves the whole table, `grid.csv`: a column a
varied key, then those of measurements.csv.
"""

import itertools
import re
from pathlib import Path

import pandas as pd

from allo_lib.cli.driver import Run
from allo_lib.errors import AlloError, short
from allo_lib.evaluation import outcomes
from allo_lib.profiles.profile_files import parse_yaml

TABLE = "grid.csv"
_KEYS = ("profile", "seeds", "domains", "vary")


def read(path: Path) -> dict:
    """The description of a grid; AlloError, one line, for a file that is none."""
    try:
        told = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, AlloError) as error:
        raise AlloError(f"{path} is not a readable grid ({error}): name a YAML file") from None
    if not isinstance(told, dict) or "profile" not in told or not set(told) <= set(_KEYS):
        raise AlloError(f"{path}: expected the keys {', '.join(_KEYS)}, of which profile is a must")
    vary = told.setdefault("vary", {})
    lists = [told.get("seeds", [0]), told.get("domains", [""])]
    lists += vary.values() if isinstance(vary, dict) else [None]
    if not all(isinstance(values, list) and values for values in lists):
        raise AlloError(f"{path}: seeds, domains and each key under vary need a list of values")
    return told


def combinations(told: dict) -> list[dict]:
    """Every combination: varied key -> value, with `domains` among the keys where they are told."""
    axes = dict(told["vary"])
    if "domains" in told:
        axes = {"domains": told["domains"]} | axes
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def folder_name(combination: dict) -> str:
    """A name for its folder: "share=0.05,train=450"; AlloError for values that name none."""
    lasts = [key.rpartition(".")[2] for key in combination]
    keys = lasts if len(set(lasts)) == len(lasts) else list(combination)
    name = ",".join(f"{k}={v}" for k, v in zip(keys, combination.values(), strict=True)) or "all"
    if not re.fullmatch(r"[A-Za-z0-9._=,+-]{1,200}", name):
        raise AlloError(f"grid: {short(name)} cannot name a folder; vary numbers and plain words")
    return name


def merge(runs: list[tuple[dict, Run]], folder: Path) -> None:
    """Write the measurements of all combinations that have some into one table.

    runs: (combination, its run) each.
    """
    frames = []
    for combination, one in runs:
        path = one.results / "measurements.csv"
        if path.is_file():
            frame = pd.DataFrame(outcomes.read_measurements(path), columns=outcomes.MEASURED)
            for key, value in reversed(combination.items()):
                frame.insert(0, key, value)
            frames.append(frame)
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    outcomes.replace_file(folder / TABLE, table.to_csv(index=False).encode())
