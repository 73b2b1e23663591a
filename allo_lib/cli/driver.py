"""Run the notebooks of a study in order, doing only what is not done yet.

A notebook that ran through leaves a *stamp* in the local store, with a hash of all that decides its
outcome. While that still holds it is not run again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from allo_lib.cli.execute import execute
from allo_lib.engine.store import sha256
from allo_lib.errors import AlloError
from allo_lib.evaluation import outcomes
from allo_lib.machine.environment import ROOT, machine
from allo_lib.profiles.config import Profile, fingerprint
from allo_lib.profiles.profile_files import KEY
from allo_lib.study import manifest

DATA_VARIABLE = "ALLO_DATA"
_OLD = 7 * 24 * 3600  # seconds
# Everything that --fresh takes away from a results folder, besides the store.
OUTPUTS = (
    "notebooks", "figures", "tables", "instructions", "outcomes.parquet", "measurements.csv",
    "claims.csv", manifest.NAME,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One invocation: which profile, with which settings, into which folder."""

    profile_name: str  # as the notebooks get it: a name, or the absolute path of a YAML file
    profile: Profile
    results: Path
    overrides: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()  # two-digit numbers; empty means all
    domains: tuple[str, ...] = ()  # those to work on, in the profile's order; empty means all
    data: Path | None = None
    notebooks: Path = ROOT / "notebooks"
    deadline: float | None = None  # when notebooks are stopped, on the clock of time.monotonic()


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came, or SIGALRM at the deadline; `number` is the signal's.

    A KeyboardInterrupt, so that nothing on the way takes it for an error of a notebook.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Step:
    """A notebook of a run: with one seed, or, where that is None, over all of them."""

    run: Run
    notebook: Path
    seed: int | None

    @property
    def group(self) -> str:
        """The name under which stamps and manifest file a seed's notebooks, or those of all seeds.

        Runs of some domains have names of their own: "seed0_maths".
        """
        if self.seed is None:
            return manifest.ALL_SEEDS
        return "_".join((f"{manifest.SEED_FOLDER}{self.seed}", *self.run.domains))

    @property
    def target(self) -> Path:
        """`notebooks/00_setup.ipynb`; of other seeds or a piece `00_setup_seed3_maths.ipynb`."""
        own = "" if self.seed is None else self.group.removeprefix(f"{manifest.SEED_FOLDER}0")
        own = own and f"_{own.removeprefix('_')}"
        return self.run.results / "notebooks" / f"{self.notebook.stem}{own}.ipynb"

    @property
    def stamp_path(self) -> Path:
        """The file that the notebook leaves when it ran through."""
        return stamps(self.run.results) / self.group / f"{self.notebook.stem}.json"

    def stamp(self) -> dict | None:
        """What the notebook left: key, seconds, data, measurements; None without it."""
        return manifest.read_json(self.stamp_path)

    def is_done(self) -> bool:
        """Whether the notebook ran through with the same code, settings, seed and data.

        Its executed copy must still be there. Notebooks over all seeds also run again when
        `measurements.csv` is no longer the one that they left, or other files of theirs are gone.
        Without a data folder given, whatever data was used before is accepted.
        """
        stamp, data = self.stamp(), data_hash(self.run)
        return (
            stamp is not None
            and stamp["key"] == self.key()
            and data in (None, stamp["data"])
            and (self.seed is not None or stamp["measurements"] == _measured(self.run))
            and all(path.is_file() for path in self._left())
        )

    def _left(self) -> list[Path]:
        """Files that there must be after the notebook: its copy and, of those that 06 writes, what
        the manifest lists."""
        results, made = self.run.results, (outcomes.NAME, "claims.csv")
        listed = (manifest.read(results) or {}).get("files", ())
        own = [name for name in made if name in listed and self.notebook.stem.startswith("06")]
        return [self.target, *(results / name for name in own)]

    def key(self) -> str:
        """SHA-256 of what decides the notebook's outcome, besides the data."""
        run, profile = self.run, self.run.profile
        made_by = [notebook_hash(self.notebook), library_hash(), profile.hash(), self.seed]
        # No part of the profile's hash: which seeds a domain has, and what changes verdicts alone.
        models = [profile.models, *(one.models for one in profile.domains.values())]
        made_by += [list(run.domains), profile.first_seed, models[1:]]
        if self.seed is None:
            made_by += [list(run.seeds), dataclasses.asdict(profile.judge), models]
        return fingerprint(made_by)


# --- which notebooks, and what is done -----------------------------------------------------------


def notebooks(run: Run) -> list[Path]:
    """The study's notebooks in number order. AlloError when there are none."""
    paths = sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise AlloError(f"no notebooks in {run.notebooks}: run from a checkout of the project")
    return paths


def steps(run: Run) -> list[Step]:
    """All that the run asks for, in order: 00 to 05 look at the first seed, 06 and 07 at all
    together, and 07 at all domains."""
    numbers = {path: path.name[:2] for path in notebooks(run)}
    return [
        Step(run, path, run.seeds[0] if number <= "05" else None)
        for path, number in numbers.items()
        if (not run.only or number in run.only) and not (run.domains and number > "06")
    ]


def stamps(results: Path) -> Path:
    """The folder of all stamps, a folder in it for each group."""
    return results / manifest.STORE / "done"


@functools.cache
def library_hash(folder: Path = Path(__file__).parent.parent) -> str:
    """Hash of all library code that a notebook can call; commands only start notebooks."""
    kinds = ".py", ".j2", ".js"
    paths = [path for path in sorted(folder.rglob("*"))
             if path.suffix in kinds and path.parent != folder / "cli"]  # fmt: skip
    return fingerprint([[p.relative_to(folder).as_posix(), sha256(p)] for p in paths])


def notebook_hash(notebook: Path) -> str:
    """Hash of a notebook's cells, whatever outputs and metadata it carries."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return fingerprint([[cell["cell_type"], "".join(cell["source"])] for cell in cells])


def data_hash(run: Run) -> str | None:
    """Hash of the run's data sets in its data folder; None without such a folder, or without data
    sets, as of the miniature."""
    domains = [one for one in run.profile.domains.values() if one.kind != "miniature"]
    names = {name for one in domains for name in (*one.datasets, *one.instructions.datasets)}
    if run.data is None or not names:
        return None
    files = [path for name in sorted(names) for path in sorted((run.data / name).glob("*.jsonl*"))]
    return fingerprint([[path.relative_to(run.data).as_posix(), sha256(path)] for path in files])


def _measured(run: Run) -> str | None:
    path = run.results / "measurements.csv"
    return sha256(path) if path.is_file() else None


# --- a run -------------------------------------------------------------------------------------


def run_study(run: Run, fresh: bool = False) -> list[Step]:
    """Run what is not done until the deadline, and write the manifest when anything was.

    Returns the steps that ran. Raises NotebookError at the first notebook that fails, Stopped on a
    signal, and AlloError when the results folder belongs to something else or cannot be written.
    """
    check_folder(run, fresh)
    with signals(), sole_run(run.results):
        if fresh:
            _clear(run.results)
        manifest.own(run.results, run.profile)
        behind = stamps(run.results) / "manifest-is-behind"  # while notebooks run
        ran: list[Step] = []
        try:
            _run_all(run, behind, ran)
        except Stopped as stopped:
            if stopped.number != signal.SIGALRM:
                raise
        if behind.exists() or not (run.results / manifest.NAME).exists():
            write_manifest(run, {step.group for step in ran})
            behind.unlink(missing_ok=True)
        return ran


def check_folder(run: Run, fresh: bool) -> None:
    """Raise AlloError unless the results folder is new, or this profile's own."""
    results = run.results
    if results.exists() and not results.is_dir():
        raise AlloError(f"--out {results} is a file; name a folder")
    if results == ROOT or results in ROOT.parents:
        raise AlloError(f"--out {results} holds the project itself; name another folder")
    if not fresh:
        manifest.check_folder(results, run.profile)
    ours = (results / manifest.NAME).exists() or manifest.owner(results) is not None
    if not ours and any(path.name != manifest.STORE for path in results.glob("*")):
        raise AlloError(f"{results} holds other files; name a new or empty folder with --out")


def _clear(results: Path) -> None:
    """Remove the store and every output; nothing else that lies in the folder."""
    stored = [path for path in (results / manifest.STORE).glob("*") if path.name != "lock"]
    for path in (*stored, *(results / name for name in OUTPUTS)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _run_all(run: Run, behind: Path, ran: list[Step]) -> None:
    """Run what is not done, and add it to `ran`."""
    for step in steps(run):
        name = step.notebook.stem + ("" if step.seed is None else f" (seed {step.seed})")
        if step.is_done():
            print(f"{name}: done before", flush=True)
            continue
        with _until(run.deadline):
            behind.touch()
            print(f"{name}: started", flush=True)
            _run_one(step)
        ran.append(step)
        print(f"{name}: done in {step.stamp()['seconds']:.1f} s, {step.target}", flush=True)
    # The last of them may have written measurements; all have seen what stands there now.
    for step in (step for step in ran if step.seed is None):
        manifest.write_json(step.stamp_path, step.stamp() | {"measurements": _measured(run)})


def _run_one(step: Step) -> None:
    """Run one notebook, which leaves its stamp."""
    run, seed = step.run, step.seed
    parameters = {
        "profile": run.profile_name,
        "seed": run.seeds[0] if seed is None else seed,
        "results_dir": str(run.results),
        "overrides": run.overrides | ({KEY: list(run.domains)} if run.domains else {}),
    } | ({"seeds": list(run.seeds)} if seed is None else {})
    scratch = run.results / manifest.STORE / "running" / step.notebook.name
    made_by, start = step.key(), time.monotonic()
    before = (step.stamp() or {"seconds": 0})["seconds"]
    step.stamp_path.unlink(missing_ok=True)
    if run.data is not None:
        os.environ[DATA_VARIABLE] = str(run.data)
    execute(step.notebook, parameters, step.target, scratch)
    stamp = {
        "key": made_by,
        # A later run reads from the store what an earlier one made: what it took is the longest.
        "seconds": max(before, round(time.monotonic() - start, 1)),
        "data": data_hash(run),
        "measurements": None if seed is not None else _measured(run),
    }
    manifest.write_json(step.stamp_path, stamp)


def write_manifest(run: Run, ran: set[str]) -> None:
    """Describe the results folder as it is now; `ran` names the groups that ran just now."""
    computer, commit = machine(), manifest.commit_of(ROOT)
    if run.profile.size == "cpu":  # whatever else is in the machine
        computer |= {"device": "cpu", "cuda": None}
    here = {name: computer[name] for name in ("device", "threads", "python")}
    here |= {"torch": computer["versions"].get("torch"), **commit}
    runs = dict((manifest.read(run.results) or {}).get("runs", {}))
    for folder in sorted(path for path in stamps(run.results).glob("*") if path.is_dir()):
        known = runs.get(folder.name, {})
        left = {path.stem: manifest.read_json(path) for path in sorted(folder.glob("*.json"))}
        seconds = {stem: stamp["seconds"] for stem, stamp in left.items() if stamp}
        if seconds:
            origin = here if folder.name in ran or not known else known
            runs[folder.name] = origin | {"seconds": known.get("seconds", {}) | seconds}
    built = manifest.build(run.results, run.profile, run.overrides, runs, computer, commit)
    manifest.write_json(run.results / manifest.NAME, built)


@contextlib.contextmanager
def sole_run(results: Path):
    """Hold the results folder's lock, so that two runs never write into one folder at once; an
    error of the disk becomes an AlloError."""
    try:
        stamps(results).mkdir(parents=True, exist_ok=True)
        with (results / manifest.STORE / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (results / manifest.STORE).glob("*/.*"):  # by killed runs, long ago
                if not left.match("*.partial") and time.time() - left.stat().st_mtime > _OLD:
                    shutil.rmtree(left, ignore_errors=True)
            yield
    except BlockingIOError:
        raise AlloError(
            f"another run is writing into {results}; wait for it, or name another --out"
        ) from None
    except OSError as error:
        raise AlloError(
            f"cannot write into {results} ({' '.join(str(error).split())}): free space or permit "
            "writing, then run again; what is done is kept"
        ) from error


@contextlib.contextmanager
def signals():
    """Turn SIGINT, SIGTERM and SIGALRM into Stopped."""

    def stop(number, frame):
        raise Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _until(deadline: float | None):
    """A block that SIGALRM ends at the deadline."""
    if deadline is not None:
        if (left := deadline - time.monotonic()) <= 0:
            raise Stopped(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
