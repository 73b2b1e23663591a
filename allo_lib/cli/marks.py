"""What of a study is done: one mark for each notebook that ran through, kept in the local store."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

from allo_lib.errors import AlloError
from allo_lib.machine.environment import ROOT
from allo_lib.profiles.config import Profile, fingerprint
from allo_lib.study import manifest

# Notebooks up to this number look at one seed, the first; later ones at all seeds together.
LAST_OF_A_SEED = 5
# Later ones after this one look at no domain by itself.
LAST_OF_A_DOMAIN = 6
# Modules that start notebooks and never run inside one: changing them makes no result stale.
STARTERS = {
    "cli", "driver", "environment", "execute", "grid", "harness", "kernel", "manifest", "marks",
    "missing", "status", "verify",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One invocation: which profile, with which settings, into which folder."""

    given: str  # the profile as the notebooks get it: a name, or the absolute path of a YAML file
    profile: Profile
    results: Path
    overrides: dict = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()  # two-digit numbers; empty means all
    domains: tuple[str, ...] = ()  # those to work on, in the profile's order; empty means all
    data: Path | None = None
    notebooks: Path = ROOT / "notebooks"
    deadline: float | None = None  # when notebooks are stopped, on the clock of time.monotonic()


def notebooks(run: Run) -> list[Path]:
    """The study's notebooks in number order. AlloError when there are none."""
    found = sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise AlloError(f"no notebooks in {run.notebooks}: run from a checkout of the project")
    return found


def of_a_seed(notebook: Path) -> bool:
    """Whether this notebook looks at one seed."""
    return int(notebook.name[:2]) <= LAST_OF_A_SEED


def of_a_domain(notebook: Path) -> bool:
    """Whether this notebook can be run for some of the domains."""
    return int(notebook.name[:2]) <= LAST_OF_A_DOMAIN


def group(run: Run, seed: int | None) -> str:
    """The name under which marks and manifest file a seed's notebooks, or those over all seeds.

    Runs of some domains have names of their own: "seed0_maths".
    """
    if seed is None:
        return manifest.ALL_SEEDS
    return "_".join((f"{manifest.SEED_FOLDER}{seed}", *run.domains))


def steps(run: Run) -> list[tuple[Path, int | None]]:
    """(notebook, seed) of all that the run asks for, in order; no seed for those over all seeds.

    One seed is looked at, the first; 06 trains and measures all of them.
    """
    asked = [n for n in notebooks(run) if not run.only or n.name[:2] in run.only]
    if run.domains:
        asked = [notebook for notebook in asked if of_a_domain(notebook)]
    return [(n, run.seeds[0] if of_a_seed(n) else None) for n in asked]


def executed_path(run: Run, notebook: Path, seed: int | None) -> Path:
    folder = run.results / "notebooks"
    return (folder if seed is None else folder / group(run, seed)) / notebook.name


def mark_path(run: Run, notebook: Path, seed: int | None) -> Path:
    return run.results / manifest.STORE / "done" / group(run, seed) / f"{notebook.stem}.json"


def read_mark(run: Run, notebook: Path, seed: int | None) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        mark = json.loads(mark_path(run, notebook, seed).read_text(encoding="utf-8"))
        return mark if isinstance(mark, dict) else None
    return None


@functools.cache
def library_hash(folder: Path = Path(__file__).parent.parent) -> str:
    """Hash of all library code that a notebook can call."""
    paths = [path for path in sorted(folder.rglob("*.py")) if path.stem not in STARTERS]
    return fingerprint(
        [
            [p.relative_to(folder).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()]
            for p in paths
        ]
    )


def notebook_hash(notebook: Path) -> str:
    """Hash of a notebook's cells, whatever outputs and metadata it carries."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return fingerprint([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    except (ValueError, KeyError, TypeError) as error:
        raise AlloError(f"{notebook} is not a notebook ({error}): restore the file") from error


def key(run: Run, notebook: Path, seed: int | None) -> str:
    """SHA-256 of what decides a notebook's outcome, besides the data."""
    made_by = [notebook_hash(notebook), library_hash(), run.profile.hash(), seed]
    made_by += [list(run.domains)] if run.domains else []
    if seed is None:
        made_by.append(list(run.seeds))
        # No part of the profile's hash, as it changes no result but the verdicts read here.
        judge = run.profile.judge
        made_by += [dataclasses.asdict(judge)] if judge.kind else []
        made_by += [run.profile.models] if run.profile.models > 1 else []
    return fingerprint(made_by)


def begun_seeds(run: Run) -> list[int]:
    """Seeds of which the store holds at least one mark for this run's domains, sorted."""
    marks = (run.results / manifest.STORE / "done").glob(f"{manifest.SEED_FOLDER}*/*.json")
    names = {path.parent.name for path in marks}
    numbers = {name.removeprefix(manifest.SEED_FOLDER).partition("_")[0] for name in names}
    seeds = sorted(int(number) for number in numbers if number.isdecimal())
    return [seed for seed in seeds if group(run, seed) in names]


def is_done(run: Run, notebook: Path, seed: int | None) -> bool:
    """Whether this notebook ran through with the same code, settings, seed and data.

    All files that it wrote must still be there. Notebooks over all seeds also run anew when
    `measurements.csv` is no longer the one that they left. Without a data folder given, whatever
    data was used before is accepted.
    """
    mark = read_mark(run, notebook, seed)
    if mark is None or mark.get("key") != key(run, notebook, seed):
        return False
    data = data_hash(run.data)
    if data is not None and mark.get("data") not in (None, data):
        return False
    if seed is None and mark.get("measurements") != measurements_hash(run):
        return False
    return all((run.results / name).is_file() for name in mark.get("files", []))


def measurements_hash(run: Run) -> str | None:
    path = run.results / "measurements.csv"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def data_hash(folder: Path | None) -> str | None:
    """Names and sizes of the data files; their contents are hashed where they are read."""
    if folder is None:
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return fingerprint([[p.relative_to(folder).as_posix(), p.stat().st_size] for p in files])
