"""Run one notebook by papermill and leave the executed copy whole or absent.

The kernel is stopped when an exception, such as that of a signal, ends the run, and by ipykernel's
own watch over its parent when this process is killed.
"""

import ast
import contextlib
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

from allo_lib.evaluation import outcomes
from allo_lib.machine.environment import ROOT, child_environment

# Of progress reports: what a later one has overwritten, what a bar that left nothing ends with,
# and a bar's last line.
_PROGRESS = re.compile(r"[^\n]*\r(?=[^\n])|^ *\r$|(?:^|(?<=\r))[^\n]*\d%\|[^\n]*\n?", re.MULTILINE)


class NotebookError(Exception):
    """A notebook did not run through; the message is one line."""


def execute(notebook: Path, parameters: dict, target: Path, scratch: Path) -> None:
    """Execute a notebook with this very interpreter as its kernel.

    target: the executed copy, when it ran through; scratch: the copy while it runs.

    Raises NotebookError when it does not run through; the copy is then kept as `.failed.ipynb`.
    """
    import nbformat
    import papermill

    for library in ("asyncio", "papermill"):  # whose kernel dies when the run is stopped
        logging.getLogger(library).setLevel(logging.CRITICAL)
    failed, reason = target.with_suffix(".failed.ipynb"), None
    for path in (scratch, target):
        path.parent.mkdir(parents=True, exist_ok=True)
    scratch.unlink(missing_ok=True)
    with _own_kernel():
        try:
            papermill.execute_notebook(
                str(notebook),
                str(scratch),
                parameters=injected(parameters, papermill.inspect_notebook(str(notebook))),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=str(ROOT),
            )
        except Exception as error:  # whatever went wrong becomes the reason
            name = getattr(error, "ename", type(error).__name__)  # of the cell's error
            text = str(getattr(error, "evalue", error)).strip() or "no message"
            reason = f"{target.stem} failed: {name}: {text.splitlines()[0]}"
    if scratch.exists():
        text = sanitised(nbformat.read(scratch, as_version=4), parameters["results_dir"])
        outcomes.replace_file(scratch, text.encode("utf-8"))
        scratch.replace(failed if reason else target)
        reason = reason and f"{reason}; see {failed}"
    if reason:
        raise NotebookError(reason)
    failed.unlink(missing_ok=True)


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
    own = {name: ast.literal_eval(one["default"]) for name, one in of_notebook.items()}
    return {n: value for n, value in parameters.items() if n not in own or meant[n] != own[n]}


@contextlib.contextmanager
def _own_kernel():
    """Make the kernel name `python3` mean this interpreter, and keep Jupyter out of the home."""
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "kernels", "python3")
        # What the kernel program, not the notebook's code, logs would stand between its lines.
        write_kernel_spec(
            spec,
            extra_arguments=["--log-level=CRITICAL"],
            python_arguments=["-Xfrozen_modules=off"],
        )
        own = {"JUPYTER_PATH": folder, "JUPYTER_RUNTIME_DIR": folder, "IPYTHONDIR": folder}
        os.environ.update(child_environment() | own)
        yield


def sanitised(notebook, results_dir: str) -> str:
    """The notebook as JSON, without what tells of this machine and not of the study.

    That is papermill's paths and clock times, the random id of the injected cell, the checkout's
    and the environment's folders wherever they are printed, and progress reports.
    """
    import nbformat

    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
    names = {
        str(Path.home()): "~",
        str(ROOT): ".",
        results_dir: f"results/{Path(results_dir).name}",
        os.environ.get("ALLO_DATA", ""): "DATA",
        sys.prefix if sys.prefix != sys.base_prefix else "": ".venv",
    }
    text = nbformat.writes(notebook)
    names.pop("/", None)  # a container's home may be
    for path in sorted(filter(None, names), key=len, reverse=True):
        # In a picture's base64 text a short path can stand by accident, among letters.
        text = re.sub(rf"(?<![\w+]){re.escape(path)}(?![\w+-])", names[path], text)
    return f"{text}\n"


def _merge_streams(outputs: list) -> list:
    """Neighbouring pieces of one stream as one, without progress reports and empty ones."""
    merged: list = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = _PROGRESS.sub("", output.text)
    return [output for output in merged if output.output_type != "stream" or output.text.strip()]
