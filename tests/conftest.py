"""Fixtures that several test files share."""

import html.parser
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import allo_lib  # noqa: F401  (before torch computes anything: `machine.arithmetic`)

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("run_all.sh", "pyproject.toml", "requirements.lock", "environment.yml")
PROFILE = "domains:\n  toy:\n    datasets: [chain]\n"

PARAMETERS = 'profile = "x"\nseed = 0\nresults_dir = "."\noverrides = {}\nseeds = []'
# What the stand-in notebooks do: those of a seed leave a row in the store, 06 merges all rows.
ROW = """
from pathlib import Path
out = Path(results_dir)
rows = out / ".store" / "rows"
rows.mkdir(parents=True, exist_ok=True)
(rows / f"{NAME}-{seed}.csv").write_text(f"{seed},sft,chain,{NAME},0.5,0.1,10\\n")
print("here is", NAME, "with seed", seed, "in", out)
"""
MERGE = """
from pathlib import Path
out = Path(results_dir)
header = "seed,method,dataset,metric,value,stderr,n\\n"
rows = sorted(path.read_text() for path in (out / ".store" / "rows").glob("*.csv"))
(out / "measurements.csv").write_text(header + "".join(rows))
(out / "figures").mkdir(exist_ok=True)
(out / "figures" / "all.txt").write_text(f"seeds {seeds}\\n")
"""


def write_notebook(folder: Path, name: str, code: str) -> Path:
    """A notebook of two cells: the shared parameters, and `code` with NAME set to its name."""
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"NAME = {name!r}\n{code}"),
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec})
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def start_run_all(project: Path, *arguments: str, **options) -> subprocess.Popen:
    """`run_all.sh` in a stand-in project, with this test's environment as the active one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [project / "run_all.sh", *arguments]
    return subprocess.Popen(command, cwd=project, env=environment, **pipes, **options)


def run_all(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The same to its end, which has to come within five minutes."""
    process = start_run_all(project, *arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


class Page(html.parser.HTMLParser):
    """Tags, attributes (name, value) and text of a page of HTML."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words += data

    def values(self, *names: str) -> list[str]:
        """Values of the attributes of these names."""
        return [value or "" for name, value in self.attributes if name in names]


def chromium() -> str | None:
    """The Chromium of this machine, for tests marked `browser`."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def cuda() -> bool:
    """Whether there is a GPU, for tests marked `gpu`."""
    import torch

    return torch.cuda.is_available()


NEEDED = {
    "browser": (chromium, "no chromium here (apt-get install chromium)"),
    "gpu": (cuda, "no CUDA device here"),
    "site": (
        lambda: importlib.util.find_spec("mkdocs_jupyter") is not None,
        "no mkdocs here (pip install -r requirements.lock)",
    ),
}


def pytest_collection_modifyitems(items):
    """Skip tests for which the machine lacks something; files with slow ones come first, so that of
    two processes neither is left with an hour's file when the other one is done."""
    for marker, (there_is_one, lack) in NEEDED.items():
        concerned = [item for item in items if item.get_closest_marker(marker)]
        if concerned and not there_is_one():
            for item in concerned:
                item.add_marker(pytest.mark.skip(reason=lack))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def project(tmp_path):
    """A checkout with the real commands and library and three quick stand-in notebooks."""
    folder = tmp_path / "project"
    (folder / "notebooks").mkdir(parents=True)
    for name in COMMANDS:
        shutil.copy2(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "allo_lib", folder / "allo_lib", ignore=ignored)
    write_notebook(folder / "notebooks", "00_first", ROW)
    write_notebook(folder / "notebooks", "01_second", ROW)
    write_notebook(folder / "notebooks", "06_merge", MERGE)
    (folder / "toy.yaml").write_text(PROFILE)
    return folder


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory):
    """A study whose SFT model, pairs and reference exist; tests may add to its store."""
    from tiny_study import open_study

    study = open_study(tmp_path_factory.mktemp("tiny_study"))
    study.encoded("miniature", "train")
    shutil.copytree(study.results_dir, study.results_dir.with_name("tiny_study_begun"))
    return study


@pytest.fixture
def theta(tiny_study):
    """The SFT model's weights."""
    from tiny_study import DOMAIN

    from allo_lib.machine import weights

    return weights.read_tensors(tiny_study.sft(DOMAIN).file("model.safetensors"))


@pytest.fixture(scope="session")
def profile():
    """That of `tiny_study`."""
    from tiny_study import PROFILE

    from allo_lib.profiles.profile_files import load_profile

    return load_profile(str(PROFILE))


@pytest.fixture
def begun(tiny_study, tmp_path):
    """A folder with a store of its own that holds what `tiny_study` began with."""
    folder = tmp_path / "results"
    shutil.copytree(tiny_study.results_dir.with_name("tiny_study_begun"), folder)
    return folder
