"""Run the notebooks of a study in order, doing only what is not done yet."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from allo_lib.cli.execute import PATIENCE, Job
from allo_lib.cli.marks import (
    Run,
    begun_seeds,
    data_hash,
    executed_path,
    group,
    is_done,
    key,
    mark_path,
    measurements_hash,
    notebooks,
    read_mark,
    steps,
)
from allo_lib.errors import AlloError
from allo_lib.machine.environment import ROOT, child_environment, machine
from allo_lib.profiles.profile_files import KEY
from allo_lib.study import manifest

# Everything that --fresh takes away from a results folder, besides the store and the manifest.
OUTPUTS = (
    "notebooks", "figures", "tables", "instructions", "outcomes.parquet", "measurements.csv",
    "claims.csv",
    "report.html",
)  # fmt: skip


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


def run_study(run: Run, fresh: bool = False) -> list[str]:
    """Run every asked notebook that is not done, and write the manifest when any was.

    Returns the files that were written or changed, relative to the results folder. Raises
    NotebookError at the first notebook that fails, Stopped on a signal, TimeUp at the deadline but
    with the manifest written, and AlloError when the results folder belongs to something else or
    cannot be written.
    """
    check_folder(run, fresh)
    with _signals(), _disk_errors_told(run.results), _only_run(run.results):
        if fresh:
            clear(run.results)
        before = _snapshot(run.results)
        _note_profile(run)
        pending = run.results / manifest.STORE / "done" / "manifest-is-behind"
        ran: set[str] = set()
        try:
            _run_all(run, pending, ran)
        except TimeUp:
            _finish(run, pending, ran)
            raise TimeUp(_changed(before, _snapshot(run.results))) from None
        _finish(run, pending, ran)
        return _changed(before, _snapshot(run.results))


def _finish(run: Run, pending: Path, ran: set[str]) -> None:
    if pending.exists():
        write_manifest(run, ran)
        pending.unlink()


def check_folder(run: Run, fresh: bool) -> None:
    """Raise AlloError unless the results folder is new, or this profile's own."""
    results = run.results
    if results.exists() and not results.is_dir():
        raise AlloError(f"--out {results} is a file; name a folder")
    if results == ROOT or results in ROOT.parents:
        raise AlloError(f"--out {results} holds the project itself; name another folder")
    store = results / manifest.STORE
    told = None if fresh else manifest.read(results) or _noted_profile(run)
    if told and told["profile_hash"] != run.profile.hash():
        raise AlloError(
            f"{results} holds results of profile hash {told['profile_hash'][:12]}, but this run's "
            f"is {run.profile.hash()[:12]}; name another folder with --out, or replace these "
            "results with --fresh"
        )
    ours = (results / manifest.NAME).exists() or store.exists()
    if not ours and results.exists() and any(results.iterdir()):
        raise AlloError(f"{results} holds other files; name a new or empty folder with --out")


def _noted_profile(run: Run) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run.results / manifest.STORE / "done" / "profile.json").read_text())
    return None


def _note_profile(run: Run) -> None:
    """Keep an unfinished run, which has no manifest yet, from being mixed with another profile."""
    noted = {"profile": run.profile.name, "profile_hash": run.profile.hash()}
    if _noted_profile(run) != noted:
        manifest.write_json(run.results / manifest.STORE / "done" / "profile.json", noted)


def clear(results: Path) -> None:
    """Remove the store, the manifest and every output; nothing else that lies in the folder."""
    for name in OUTPUTS:
        path = results / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (results / manifest.NAME).unlink(missing_ok=True)
    for path in (results / manifest.STORE).glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _run_all(run: Run, pending: Path, ran: set[str]) -> None:
    """Adds to `ran` the groups of which a notebook ran through; `pending` exists once one began."""
    afterwards = []
    for notebook, seed in steps(run):
        name = notebook.stem if seed is None else f"{notebook.stem} (seed {seed})"
        if is_done(run, notebook, seed):
            print(f"{name}: done before", flush=True)
            continue
        if run.deadline is not None and time.monotonic() > run.deadline:
            raise TimeUp
        pending.parent.mkdir(parents=True, exist_ok=True)
        pending.touch()
        print(f"{name}: started", flush=True)
        mark = _run_one(run, notebook, seed)
        ran.add(group(run, seed))
        print(f"{name}: done in {mark['seconds']:.1f} s", flush=True)
        if seed is None:
            afterwards.append((notebook, mark))
    # The last of them may have written measurements; all have seen what stands there now.
    for notebook, mark in afterwards:
        mark["measurements"] = measurements_hash(run)
        manifest.write_json(mark_path(run, notebook, None), mark)


def _run_one(run: Run, notebook: Path, seed: int | None) -> dict:
    """Run one notebook in a process of its own; returns, and leaves behind, its mark."""
    job = _job(run, notebook, seed)
    made_by = key(run, notebook, seed)
    before, start = _snapshot(run.results), time.monotonic()
    mark_path(run, notebook, seed).unlink(missing_ok=True)
    execute(run, job)
    seconds = round(time.monotonic() - start, 1)
    mark = {
        "key": made_by,
        "seconds": seconds,
        "data": data_hash(run.data),
        "measurements": measurements_hash(run) if seed is None else None,
        "files": _changed(before, _snapshot(run.results)),
    }
    manifest.write_json(mark_path(run, notebook, seed), mark)
    return mark


def _job(run: Run, notebook: Path, seed: int | None) -> Job:
    target = executed_path(run, notebook, seed)
    scratch = run.results / manifest.STORE / "running"
    parameters = {
        "profile": run.given,
        "seed": run.seeds[0] if seed is None else seed,
        "results_dir": str(run.results),
        "overrides": run.overrides | ({KEY: list(run.domains)} if run.domains else {}),
    }
    if seed is None:
        parameters["seeds"] = list(run.seeds)
    return Job(
        notebook=str(notebook),
        parameters=parameters,
        target=str(target),
        failed=str(target.with_suffix(".failed.ipynb")),
        scratch=str(scratch / notebook.name),
        report=str(scratch / "report.json"),
        workers=run.profile.compute.workers > 1,
    )


def execute(run: Run, job: Job) -> None:
    """Run one notebook in a process of its own; NotebookError when it does not run through, TimeUp
    when the run's deadline comes first."""
    try:
        _wait_for(_start(run, job), job, run.deadline)
    except subprocess.TimeoutExpired:
        raise TimeUp from None


def _start(run: Run, job: Job) -> subprocess.Popen:
    environment = child_environment()
    if run.data is not None:
        environment["ALLO_DATA"] = str(run.data)
    Path(job.report).parent.mkdir(parents=True, exist_ok=True)
    Path(job.report).unlink(missing_ok=True)
    # A session of its own: Ctrl-C reaches the driver alone, which then stops the notebook.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "allo_lib.cli.execute", json.dumps(dataclasses.asdict(job))],
        stdin=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )


def _wait_for(process: subprocess.Popen, job: Job, deadline: float | None) -> None:
    try:
        status = process.wait(deadline and max(0.0, deadline - time.monotonic()))
    except BaseException:
        process.stdin.close()  # which asks it to stop
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE + 5)
        finally:  # also when a second signal comes
            process.kill()
        raise
    finally:
        process.stdin.close()
    if status == 0:
        return
    reason = f"its process ended with status {status}"
    with contextlib.suppress(OSError, ValueError):
        reason = json.loads(Path(job.report).read_text(encoding="utf-8"))["reason"]
    kept = f"; see {job.failed}" if Path(job.failed).exists() else ""
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
        marks = {notebook.stem: read_mark(run, notebook, seed) for notebook in notebooks(run)}
        seconds = {stem: mark["seconds"] for stem, mark in marks.items() if mark}
        if seconds:
            runs[name] = {**origin, "seconds": {**kept.get("seconds", {}), **seconds}}
    built = manifest.build(run.results, run.profile, run.overrides, runs, told, commit)
    manifest.write_json(run.results / manifest.NAME, built)


def _snapshot(results: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for name in manifest.file_names(results):
        told = (results / name).stat()
        found[name] = (told.st_mtime_ns, told.st_size)
    return found


def _changed(before: dict, after: dict) -> list[str]:
    return [name for name in after if after[name] != before.get(name)]


@contextlib.contextmanager
def _disk_errors_told(results: Path):
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise AlloError(
            f"cannot write into {results} ({reason}): free space or permit writing, then run "
            "again; what is done is kept"
        ) from error


@contextlib.contextmanager
def _only_run(results: Path):
    """Hold the results folder's lock, so that two runs never write into one folder at once."""
    store = results / manifest.STORE
    try:
        store.mkdir(parents=True, exist_ok=True)
        handle = (store / "lock").open("a")
    except OSError as error:
        raise AlloError(f"cannot write into {results} ({error.strerror}): see --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlloError(
                f"another run is writing into {results}; wait for it, or name another --out"
            ) from None
        yield


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
