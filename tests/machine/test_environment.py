"""The lock, the ranges and the conda file tell one story; set-up is idempotent."""

import importlib.metadata
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from allo_lib.errors import AlloError
from allo_lib.machine import environment


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in wanted}


def of_the_site() -> list[str]:
    """The ranges of the extra `docs`, which no study and few tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]["docs"]


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not an exact pin"
    return specifier.version


def test_every_direct_requirement_is_pinned_within_its_range():
    versions = {name: pinned_version(requirement) for name, requirement in pins().items()}
    assert versions["torch"] == "2.13.0"
    for text in environment.requirements(tests=True) + of_the_site():
        wanted = Requirement(text)
        version = versions[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{text} against {version}"


@pytest.mark.parametrize(
    "direct",
    [environment.requirements(tests=True), pytest.param(of_the_site(), marks=pytest.mark.site)],
    ids=["tests", "site"],
)
def test_lock_holds_every_indirect_requirement(direct):
    todo, seen = [Requirement(text) for text in direct], set()
    while todo:
        name = canonicalize_name(todo.pop().name)
        # What torch itself needs depends on its build (CPU or CUDA); torch pins it.
        if name in seen or name == "torch":
            continue
        seen.add(name)
        assert name in pins(), f"{name} is not in the lock"
        needed = map(Requirement, importlib.metadata.requires(name) or [])
        todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_conda_file_installs_the_lock_and_the_same_python():
    told = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = told["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert conda == [f"python{project['requires-python']}", "pip"]


def test_this_environment_meets_the_ranges():
    assert environment.unmet(tests=True) == []


def test_unmet_names_old_and_absent_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "datasets":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.9" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert environment.unmet() == [
        "datasets>=4.0: not installed",
        "torch>=2.11: 2.10.9 is installed",
    ]


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.14.0a0+nightly"])
def test_another_build_of_torch_is_used_as_it_is(monkeypatch, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "torch" else real(name)
    )
    assert environment.prepare() == environment.sys.executable


class FakeCommands:
    """Stands in for subprocess: makes `.venv/bin/python` and counts what pip is asked."""

    def __init__(self, root):
        self.python, self.installs, self.fails = root / ".venv" / "bin" / "python", 0, False

    def __call__(self, command, **_):
        command = [str(part) for part in command]
        if command[1:3] == ["-m", "venv"]:
            self.python.parent.mkdir(parents=True, exist_ok=True)
            self.python.touch()
        if "pip" in command:
            self.installs += 1
            return subprocess.CompletedProcess(command, int(self.fails))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A checkout whose active interpreter lacks everything, and the commands it would call."""
    (tmp_path / environment.LOCK).write_text("torch==2.13.0\n")
    commands = FakeCommands(tmp_path)
    monkeypatch.setattr(environment, "unmet", lambda root, tests: ["torch: not installed"])
    monkeypatch.setattr(environment.subprocess, "run", commands)
    return tmp_path, commands


def test_set_up_installs_once_and_again_when_the_lock_changes(bare):
    root, commands = bare
    for _ in range(2):
        assert environment.prepare(root) == str(commands.python)
    assert commands.installs == 1
    (root / environment.LOCK).write_text("torch==2.13.1\n")
    environment.prepare(root)
    environment.prepare(root)
    assert commands.installs == 2


def test_interrupted_set_up_is_taken_up_again(bare):
    root, commands = bare
    commands.fails = True
    with pytest.raises(AlloError, match="pip could not install"):
        environment.prepare(root)
    commands.fails = False
    environment.prepare(root)
    environment.prepare(root)
    assert commands.installs == 2


def test_own_environment_beside_the_script_counts_when_it_meets_the_ranges(bare):
    root, commands = bare
    commands.python.parent.mkdir(parents=True)
    commands.python.touch()
    assert environment.prepare(root) == str(commands.python)
    assert commands.installs == 0
