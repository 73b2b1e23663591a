"""Run the notebooks of a study in order, doing only what is not done yet.

A notebook that ran through leaves a *stamp* in the local store: a hash of all that decides its
outcome, and the files that it wrote. While that still holds it is not run again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from allo_lib.cli.execute import PATIENCE, Job
from allo_lib.errors import AlloError
from allo_lib.machine.environment import ROOT, child_environment, machine
from allo_lib.profiles.config import Profile, fingerprint
from allo_lib.profiles.profile_files import KEY
from allo_lib.study import manifest

# Everything that --fresh takes away from a results folder, besides the store.
OUTPUTS = (
    "notebooks", "figures", "tables", "instructions", "outcomes.parquet", "measurements.csv",
    "claims.csv", manifest.NAME,
)  # fmt: skip


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


class NotebookError(Exception):
    """A notebook did not run through; the message is one line."""


class Stopped(Exception):
    """SIGINT or SIGTERM came; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class TimeUp(Exception):
    """The run's deadline has come; `written` is what `run_study` would have returned."""

    def __init__(self, written: list[str] | None = None):
        super().__init__()
        self.written = written or []


# --- which notebooks, for which seed -----------------------------------------------------------


def notebooks(run: Run) -> list[Path]:
    """The study's notebooks in number order. AlloError when there are none."""
    found = sorted(run.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise AlloError(f"no notebooks in {run.notebooks}: run from a checkout of the project")
    return found


def of_a_seed(notebook: Path) -> bool:
    """Whether this notebook looks at one seed, the first; 06 and 07 look at all together."""
    return int(notebook.name[:2]) <= 5


def of_a_domain(notebook: Path) -> bool:
    """Whether this notebook can be run for some of the domains."""
    return int(notebook.name[:2]) <= 6


def steps(run: Run) -> list[tuple[Path, int | None]]:
    """(notebook, seed) of all that the run asks for, in order; no seed for those over all seeds."""
    asked = [n for n in notebooks(run) if not run.only or n.name[:2] in run.only]
    asked = [n for n in asked if not run.domains or of_a_domain(n)]
    return [(n, run.seeds[0] if of_a_seed(n) else None) for n in asked]


def group(run: Run, seed: int | None) -> str:
    """The name under which stamps and manifest file a seed's notebooks, or those over all seeds.

    Runs of some domains have names of their own: "seed0_maths".
    """
    if seed is None:
        return manifest.ALL_SEEDS
    return "_".join((f"{manifest.SEED_FOLDER}{seed}", *run.domains))


def executed_path(run: Run, notebook: Path, seed: int | None) -> Path:
    """`notebooks/00_setup.ipynb`; of other seeds or of a piece `00_setup_seed3_maths.ipynb`."""
    own = "" if seed is None else group(run, seed).removeprefix(f"{manifest.SEED_FOLDER}0")
    own = own and f"_{own.removeprefix('_')}"
    return run.results / "notebooks" / f"{notebook.stem}{own}.ipynb"


# --- what is done ------------------------------------------------------------------------------


def stamp_path(run: Run, notebook: Path, seed: int | None) -> Path:
    """Where a notebook that ran through leaves what it was run of."""
    return run.results / manifest.STORE / "done" / group(run, seed) / f"{notebook.stem}.json"


def read_stamp(run: Run, notebook: Path, seed: int | None) -> dict | None:
    """The stamp of a notebook: key, seconds, data, measurements, files. None without one."""
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads(stamp_path(run, notebook, seed).read_text(encoding="utf-8"))
        return stamp if isinstance(stamp, dict) else None
    return None


def begun_seeds(run: Run) -> list[int]:
    """Seeds of which the store holds at least one stamp for this run's domains, sorted."""
    stamps = (run.results / manifest.STORE / "done").glob(f"{manifest.SEED_FOLDER}*/*.json")
    names = {path.parent.name for path in stamps}
    numbers = {name.removeprefix(manifest.SEED_FOLDER).partition("_")[0] for name in names}
    seeds = sorted(int(number) for number in numbers if number.isdecimal())
    return [seed for seed in seeds if group(run, seed) in names]


def is_done(run: Run, notebook: Path, seed: int | None) -> bool:
    """Whether this notebook ran through with the same code, settings, seed and data.

    All files that it wrote must still be there. Notebooks over all seeds also run again when
    `measurements.csv` is no longer the one that they left. Without a data folder given, whatever
    data was used before is accepted.
    """
    stamp = read_stamp(run, notebook, seed)
    if stamp is None or stamp.get("key") != key(run, notebook, seed):
        return False
    data = data_hash(run.data)
    if data is not None and stamp.get("data") not in (None, data):
        return False
    if seed is None and stamp.get("measurements") != measurements_hash(run):
        return False
    return all((run.results / name).is_file() for name in stamp.get("files", []))


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


@functools.cache
def library_hash(folder: Path = Path(__file__).parent.parent) -> str:
    """Hash of all library code that a notebook can call; commands only start notebooks."""
    paths = [path for path in sorted(folder.rglob("*.py")) if path.parent != folder / "cli"]
    return fingerprint([[p.relative_to(folder).as_posix(), _file_hash(p)] for p in paths])


def notebook_hash(notebook: Path) -> str:
    """Hash of a notebook's cells, whatever outputs and metadata it carries."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return fingerprint([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    except (ValueError, KeyError, TypeError) as error:
        raise AlloError(f"{notebook} is not a notebook ({error}): restore the file") from error


def measurements_hash(run: Run) -> str | None:
    """SHA-256 of a run's measurements.csv; None where there is none yet."""
    path = run.results / "measurements.csv"
    return _file_hash(path) if path.is_file() else None


def data_hash(folder: Path | None) -> str | None:
    """Names and sizes of the data files; their contents are hashed where they are read."""
    if folder is None:
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return fingerprint([[p.relative_to(folder).as_posix(), p.stat().st_size] for p in files])


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- a run -------------------------------------------------------------------------------------


def run_study(run: Run, fresh: bool = False) -> list[str]:
    """Run every asked notebook that is not done, and write the manifest when any was.

    Returns the files that were written or changed, relative to the results folder. Raises
    NotebookError at the first notebook that fails, Stopped on a signal, TimeUp at the deadline but
    with the manifest written, and AlloError when the results folder belongs to something else or
    cannot be written.
    """
    check_folder(run, fresh)
    with _signals(), _sole_run(run.results):
        if fresh:
            _clear(run.results)
        before = _files(run.results)
        noted = {"profile": run.profile.name, "profile_hash": run.profile.hash()}
        if _noted_profile(run) != noted:  # an unfinished run has no manifest yet
            manifest.write_json(_noted_path(run), noted)
        behind = _noted_path(run).with_name("manifest-is-behind")  # while notebooks run
        ran: set[str] = set()
        late = not _run_all(run, behind, ran)
        if behind.exists():
            write_manifest(run, ran)
            behind.unlink()
        written = _changed(before, run.results)
        if late:
            raise TimeUp(written)
        return written


def check_folder(run: Run, fresh: bool) -> None:
    """Raise AlloError unless the results folder is new, or this profile's own."""
    results = run.results
    if results.exists() and not results.is_dir():
        raise AlloError(f"--out {results} is a file; name a folder")
    if results == ROOT or results in ROOT.parents:
        raise AlloError(f"--out {results} holds the project itself; name another folder")
    told = None if fresh else manifest.read(results) or _noted_profile(run)
    if told and told["profile_hash"] != run.profile.hash():
        raise AlloError(
            f"{results} holds results of profile hash {told['profile_hash'][:12]}, but this run's "
            f"is {run.profile.hash()[:12]}; name another folder with --out, or replace these "
            "results with --fresh"
        )
    ours = (results / manifest.NAME).exists() or (results / manifest.STORE).exists()
    if not ours and results.exists() and any(results.iterdir()):
        raise AlloError(f"{results} holds other files; name a new or empty folder with --out")


def _noted_path(run: Run) -> Path:
    return run.results / manifest.STORE / "done" / "profile.json"


def _noted_profile(run: Run) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_noted_path(run).read_text(encoding="utf-8"))
    return None


def _clear(results: Path) -> None:
    """Remove the store and every output; nothing else that lies in the folder."""
    stored = [path for path in (results / manifest.STORE).glob("*") if path.name != "lock"]
    for path in (*stored, *(results / name for name in OUTPUTS)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _run_all(run: Run, behind: Path, ran: set[str]) -> bool:
    """Whether all ran before the deadline; adds to `ran` the groups of notebooks that did."""
    over_all_seeds = []
    for notebook, seed in steps(run):
        name = notebook.stem if seed is None else f"{notebook.stem} (seed {seed})"
        if is_done(run, notebook, seed):
            print(f"{name}: done before", flush=True)
            continue
        if run.deadline is not None and time.monotonic() > run.deadline:
            return False
        behind.touch()
        print(f"{name}: started", flush=True)
        try:
            stamp = _run_one(run, notebook, seed)
        except TimeUp:
            return False
        ran.add(group(run, seed))
        print(f"{name}: done in {stamp['seconds']:.1f} s", flush=True)
        over_all_seeds += [(notebook, stamp)] if seed is None else []
    # The last of them may have written measurements; all have seen what stands there now.
    for notebook, stamp in over_all_seeds:
        stamp["measurements"] = measurements_hash(run)
        manifest.write_json(stamp_path(run, notebook, None), stamp)
    return True


def _run_one(run: Run, notebook: Path, seed: int | None) -> dict:
    """Run one notebook in a process of its own; returns, and leaves behind, its stamp."""
    parameters = {
        "profile": run.given,
        "seed": run.seeds[0] if seed is None else seed,
        "results_dir": str(run.results),
        "overrides": run.overrides | ({KEY: list(run.domains)} if run.domains else {}),
    }
    job = Job(
        notebook=str(notebook),
        parameters=parameters | ({"seeds": list(run.seeds)} if seed is None else {}),
        target=str(executed_path(run, notebook, seed)),
        scratch=str(run.results / manifest.STORE / "running" / notebook.name),
        workers=run.profile.compute.workers > 1,
    )
    made_by = key(run, notebook, seed)
    before, start = _files(run.results), time.monotonic()
    stamp_path(run, notebook, seed).unlink(missing_ok=True)
    execute(run, job)
    stamp = {
        "key": made_by,
        "seconds": round(time.monotonic() - start, 1),
        "data": data_hash(run.data),
        "measurements": measurements_hash(run) if seed is None else None,
        "files": _changed(before, run.results),
    }
    manifest.write_json(stamp_path(run, notebook, seed), stamp)
    return stamp


def execute(run: Run, job: Job) -> None:
    """Run one notebook in a process of its own; NotebookError when it does not run through, TimeUp
    when the run's deadline comes first."""
    environment = child_environment()
    if run.data is not None:
        environment["ALLO_DATA"] = str(run.data)
    job.report.parent.mkdir(parents=True, exist_ok=True)
    job.report.unlink(missing_ok=True)
    # A session of its own: Ctrl-C reaches the driver alone, which then stops the notebook.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "allo_lib.cli.execute", json.dumps(dataclasses.asdict(job))],
        stdin=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        status = process.wait(run.deadline and max(0.0, run.deadline - time.monotonic()))
    except BaseException as stop:
        process.stdin.close()  # which asks it to stop
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE + 5)
        finally:  # also when a second signal comes
            process.kill()
        if isinstance(stop, subprocess.TimeoutExpired):
            raise TimeUp from None
        raise
    finally:
        process.stdin.close()
    if status:
        reason = f"its process ended with status {status}"
        with contextlib.suppress(OSError, ValueError):
            reason = json.loads(job.report.read_text(encoding="utf-8"))["reason"]
        kept = f"; see {job.failed}" if job.failed.exists() else ""
        raise NotebookError(f"{Path(job.notebook).stem} failed: {reason}{kept}")


def write_manifest(run: Run, ran: set[str]) -> None:
    """Describe the results folder as it is now; `ran` names the groups that ran just now."""
    told, commit = machine(), manifest.commit_of(ROOT)
    if run.profile.size == "cpu":  # whatever else is in the machine
        told |= {"device": "cpu", "cuda": None}
    here = {name: told[name] for name in ("device", "threads", "python")}
    here |= {"torch": told["versions"].get("torch"), **commit}
    before = (manifest.read(run.results) or {}).get("runs", {})
    runs = {}
    for seed in [*begun_seeds(run), None]:
        name = group(run, seed)
        kept = before.get(name, {})
        origin = here if name in ran or not kept else kept
        stamps = {notebook.stem: read_stamp(run, notebook, seed) for notebook in notebooks(run)}
        seconds = {stem: stamp["seconds"] for stem, stamp in stamps.items() if stamp}
        if seconds:
            runs[name] = {**origin, "seconds": {**kept.get("seconds", {}), **seconds}}
    built = manifest.build(run.results, run.profile, run.overrides, runs, told, commit)
    manifest.write_json(run.results / manifest.NAME, built)


def _files(results: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file that the manifest lists."""
    told = {name: (results / name).stat() for name in manifest.file_names(results)}
    return {name: (one.st_mtime_ns, one.st_size) for name, one in told.items()}


def _changed(before: dict[str, tuple[int, int]], results: Path) -> list[str]:
    return [name for name, now in _files(results).items() if now != before.get(name)]


@contextlib.contextmanager
def _sole_run(results: Path):
    """Hold the results folder's lock, so that two runs never write into one folder at once; an
    error of the disk becomes an AlloError."""
    try:
        (results / manifest.STORE / "done").mkdir(parents=True, exist_ok=True)
        with (results / manifest.STORE / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise AlloError(
            f"another run is writing into {results}; wait for it, or name another --out"
        ) from None
    except OSError as error:
        reason = " ".join(str(error).split())
        raise AlloError(
            f"cannot write into {results} ({reason}): free space or permit writing, then run "
            "again; what is done is kept"
        ) from error


@contextlib.contextmanager
def _signals():
    """Turn SIGINT and SIGTERM into Stopped."""

    def stop(number, frame):
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
