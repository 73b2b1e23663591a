"""Run one notebook in a process of its own and leave the executed copy whole or absent.

The driver starts `python -m allo_lib.cli.execute JOB`, JOB being a `Job` as JSON. When the driver
goes away, however that happens, standard input closes and the notebook is stopped.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from allo_lib.machine.environment import ROOT, child_environment

# A kernel that is asked to stop gets this long, in seconds.
PATIENCE = 10
_CELL_FILE = re.compile(r"\S*ipykernel_\d+/\d+\.py")
# All of a terminal line that a later progress report has overwritten, and what a bar that has left
# nothing ends with.
_OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\n])|^ *\r$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Job:
    """One notebook to run: where it is, what it is given, where its executed copy goes."""

    notebook: str
    parameters: dict
    target: str  # the executed notebook, when it ran through
    failed: str  # ... and when it did not
    scratch: str  # the copy while it runs; same file system as `target`
    report: str  # JSON file that says why it failed
    workers: bool = False  # whether its profile trains in workers, whose server then starts early


def run(job: Job) -> int:
    """Execute the notebook with this very interpreter as its kernel; 0 when it ran through."""
    import nbformat
    import papermill

    for path in (job.scratch, job.target):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(job.scratch).unlink(missing_ok=True)
    status, reason = 0, None
    with _own_kernel("allo_lib.cli.kernel" if job.workers else "ipykernel_launcher"):
        try:
            papermill.execute_notebook(
                job.notebook,
                job.scratch,
                parameters=job.parameters,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=str(ROOT),
            )
        except Exception as error:  # whatever went wrong is reported, and the copy is kept
            status, reason = 1, _one_line(error)
    if Path(job.scratch).exists():
        notebook = nbformat.read(job.scratch, as_version=4)
        sanitise(notebook, job.parameters["results_dir"])
        nbformat.write(notebook, job.scratch)
        _move(job.scratch, job.failed if status else job.target)
    if status == 0:
        Path(job.failed).unlink(missing_ok=True)
    Path(job.report).write_text(json.dumps({"reason": reason}), encoding="utf-8")
    return status


@contextlib.contextmanager
def _own_kernel(program: str):
    """Make the kernel name `python3` mean this interpreter running the module `program`, and keep
    Jupyter out of the home."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        # Frozen modules off as ipykernel itself does for its debugger; what the kernel program
        # (not the notebook's code) logs would only stand between the notebook's lines.
        python = [sys.executable, "-Xfrozen_modules=off", "-m", program]
        argv = [*python, "--log-level=CRITICAL", "-f", "{connection_file}"]
        told = {"argv": argv, "display_name": "Python 3", "language": "python"}
        spec.write_text(json.dumps(told), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = folder
        os.environ["JUPYTER_RUNTIME_DIR"] = str(Path(folder, "runtime"))
        os.environ["IPYTHONDIR"] = str(Path(folder, "ipython"))
        os.environ.update(child_environment())
        yield


def _one_line(error: Exception) -> str:
    """The exception as one line; for an error in a cell, that cell's error."""
    name = getattr(error, "ename", type(error).__name__)
    text = str(getattr(error, "evalue", error)).strip()
    return f"{name}: {text.splitlines()[0] if text else 'no message'}"


def _move(source: str, target: str) -> None:
    with open(source, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(source, target)


def sanitise(notebook, results_dir: str) -> None:
    """Take out, in place, what tells of this machine and not of the study.

    That is papermill's paths and clock times, the random id of the injected cell, the checkout's
    and the environment's folders wherever they are printed, and overwritten progress reports.
    """
    from nbformat import from_dict

    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
    replacements = _replacements(results_dir)
    notebook.cells = [from_dict(_without_paths(cell, replacements)) for cell in notebook.cells]


def _merge_streams(outputs: list) -> list:
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = _OVERWRITTEN.sub("", output.text)
    return [output for output in merged if output.output_type != "stream" or output.text.strip()]


def _replacements(results_dir: str) -> list[tuple[str, str]]:
    """(path, what to write instead), longest paths first."""
    pairs = {
        str(Path.home()): "~",
        str(ROOT): ".",
        results_dir: f"results/{Path(results_dir).name}",
        os.environ.get("ALLO_DATA", ""): "DATA",
    }
    if sys.prefix != sys.base_prefix:
        pairs[sys.prefix] = ".venv"
    usable = [(path, name) for path, name in pairs.items() if len(path) > 1]
    return sorted(usable, key=lambda pair: -len(pair[0]))


def _without_paths(value, replacements: list[tuple[str, str]]):
    if isinstance(value, str):
        for path, name in replacements:
            value = re.sub(re.escape(path) + r"(?![\w-])", lambda _, name=name: name, value)
        return _CELL_FILE.sub("cell", value)
    if isinstance(value, list):
        return [_without_paths(item, replacements) for item in value]
    if isinstance(value, dict):
        # Pictures are base64 text, in which a path can only stand by accident.
        keep = [key for key in value if str(key).startswith("image/") and key != "image/svg+xml"]
        return {
            key: item if key in keep else _without_paths(item, replacements)
            for key, item in value.items()
        }
    return value


def _stop_with_the_driver() -> None:
    os.read(0, 1)  # nobody writes: it returns when the pipe closes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def _leave(number, frame):
    # As an exception, so that the notebook client stops its kernel on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_stop_with_the_driver, daemon=True).start()
    sys.exit(run(Job(**json.loads(sys.argv[1]))))
