"""Run one notebook in a process of its own and leave the executed copy whole or absent.

The driver starts `python -m allo_lib.cli.execute JOB`, JOB being a `Job` as JSON. When the driver
goes away, however that happens, standard input closes and the notebook is stopped. The notebook's
kernel is this module again (`kernel`), so that the server of workers starts with it.
"""

import ast
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

from allo_lib.machine import runtime
from allo_lib.machine.environment import ROOT, child_environment

# A kernel that is asked to stop gets this long, in seconds.
PATIENCE = 10
_CELL_FILE = re.compile(r"\S*ipykernel_\d+/\d+\.py")
# Of progress reports: what a later one has overwritten, what a bar that left nothing ends with,
# and a bar's last line.
_PROGRESS = re.compile(r"[^\n]*\r(?=[^\n])|^ *\r$|(?:^|(?<=\r))[^\n]*\d%\|[^\n]*\n?", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Job:
    """One notebook to run: where it is, what it is given, where its executed copy goes."""

    notebook: str
    parameters: dict
    target: str  # the executed notebook, when it ran through
    scratch: str  # the copy while it runs; same file system as `target`
    workers: bool = False  # whether its profile trains in workers, whose server then starts early

    @property
    def failed(self) -> Path:
        """The executed notebook, when it did not run through."""
        return Path(self.target).with_suffix(".failed.ipynb")

    @property
    def report(self) -> Path:
        """JSON file that says why it failed."""
        return Path(self.scratch).with_name("report.json")


def run(job: Job) -> int:
    """Execute the notebook with this very interpreter as its kernel; 0 when it ran through."""
    import nbformat
    import papermill

    for path in (job.scratch, job.target):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(job.scratch).unlink(missing_ok=True)
    reason = None
    with _own_kernel(job.workers):
        try:
            papermill.execute_notebook(
                job.notebook,
                job.scratch,
                parameters=injected(job.parameters, papermill.inspect_notebook(job.notebook)),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=str(ROOT),
            )
        except Exception as error:  # whatever went wrong is reported, and the copy is kept
            name = getattr(error, "ename", type(error).__name__)  # of the cell's error
            text = str(getattr(error, "evalue", error)).strip() or "no message"
            reason = f"{name}: {text.splitlines()[0]}"
    if Path(job.scratch).exists():
        notebook = nbformat.read(job.scratch, as_version=4)
        sanitise(notebook, job.parameters["results_dir"])
        nbformat.write(notebook, job.scratch)
        with open(job.scratch, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(job.scratch, job.failed if reason else job.target)
    if reason is None:
        job.failed.unlink(missing_ok=True)
    job.report.write_text(json.dumps({"reason": reason}), encoding="utf-8")
    return int(reason is not None)


def injected(parameters: dict, of_notebook: dict[str, dict]) -> dict:
    """Those parameters that the notebook does not have by itself (`papermill.inspect_notebook`).

    Of a run at the notebook's own values none is left: the executed copy has the notebook's cells
    and nothing else, so that the copy can take the notebook's place.
    """
    meant = dict(parameters)
    if parameters["results_dir"] == str(ROOT / "results" / parameters["profile"]):
        meant["results_dir"] = ""
    if parameters.get("seeds") == [parameters["seed"]]:
        meant["seeds"] = None
    own = {name: ast.literal_eval(told["default"]) for name, told in of_notebook.items()}
    return {n: value for n, value in parameters.items() if n not in own or meant[n] != own[n]}


@contextlib.contextmanager
def _own_kernel(early_workers: bool):
    """Make the kernel name `python3` mean this interpreter, and keep Jupyter out of the home."""
    program = ["allo_lib.cli.execute", "kernel"] if early_workers else ["ipykernel_launcher"]
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        # Frozen modules off as ipykernel itself does for its debugger; what the kernel program
        # (not the notebook's code) logs would only stand between the notebook's lines.
        python = [sys.executable, "-Xfrozen_modules=off", "-m", *program]
        argv = [*python, "--log-level=CRITICAL", "-f", "{connection_file}"]
        told = {"argv": argv, "display_name": "Python 3", "language": "python"}
        spec.write_text(json.dumps(told), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = folder
        os.environ["JUPYTER_RUNTIME_DIR"] = str(Path(folder, "runtime"))
        os.environ["IPYTHONDIR"] = str(Path(folder, "ipython"))
        os.environ.update(child_environment())
        yield


def kernel(arguments: list[str]) -> None:
    """A kernel whose server of workers starts with it: both import the library, several seconds
    each, now at the same time."""
    from ipykernel import kernelapp

    runtime.start_early()
    kernelapp.launch_new_instance(argv=arguments)


def sanitise(notebook, results_dir: str) -> None:
    """Take out, in place, what tells of this machine and not of the study.

    That is papermill's paths and clock times, the random id of the injected cell, the checkout's
    and the environment's folders wherever they are printed, and progress reports.
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
    folders = {
        str(Path.home()): "~",
        str(ROOT): ".",
        results_dir: f"results/{Path(results_dir).name}",
        os.environ.get("ALLO_DATA", ""): "DATA",
        sys.prefix: ".venv" if sys.prefix != sys.base_prefix else sys.prefix,
    }
    longest_first = sorted((path for path in folders if len(path) > 1), key=len, reverse=True)
    names = {path: folders[path] for path in longest_first}
    notebook.cells = [from_dict(_without_paths(cell, names)) for cell in notebook.cells]


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
            output.text = _PROGRESS.sub("", output.text)
    return [output for output in merged if output.output_type != "stream" or output.text.strip()]


def _without_paths(value, names: dict[str, str]):
    if isinstance(value, str):
        for path, name in names.items():
            value = re.sub(re.escape(path) + r"(?![\w-])", lambda _, name=name: name, value)
        return _CELL_FILE.sub("cell", value)
    if isinstance(value, list):
        return [_without_paths(item, names) for item in value]
    if isinstance(value, dict):
        # Pictures are base64 text, in which a path can only stand by accident.
        keep = [key for key in value if str(key).startswith("image/") and key != "image/svg+xml"]
        return {k: item if k in keep else _without_paths(item, names) for k, item in value.items()}
    return value


def _stop_with_the_driver() -> None:
    os.read(0, 1)  # nobody writes: it returns when the pipe closes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def _leave(number, frame):
    # As an exception, so that the notebook client stops its kernel on the way out.
    sys.exit(128 + number)


if __name__ == "__main__":  # workers of a kernel load this module, too, and need neither
    if sys.argv[1] == "kernel":
        kernel(sys.argv[2:])
    else:
        signal.signal(signal.SIGTERM, _leave)
        threading.Thread(target=_stop_with_the_driver, daemon=True).start()
        sys.exit(run(Job(**json.loads(sys.argv[1]))))
