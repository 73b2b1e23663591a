"""Find or make a Python environment that meets the project's ranges, and describe it.

Run as `python -m allo_lib.machine.environment [--tests]` it prints the interpreter to use. It
needs only the standard library until an environment is there.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

from allo_lib.errors import AlloError

ROOT = Path(__file__).resolve().parents[2]
LOCK = "requirements.lock"
# Recorded beside the direct requirements: it decides how text becomes tokens.
ALSO_RECORDED = ("tokenizers",)


def requirements(root: Path = ROOT, tests: bool = False) -> list[str]:
    """The version ranges of pyproject.toml, with those of its `test` extra when asked for."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + project["optional-dependencies"]["test"] * tests


def unmet(root: Path = ROOT, tests: bool = False) -> list[str]:
    """Ranges that the running interpreter does not meet, each with what is there instead."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging: not installed"]
    missing = []
    for text in requirements(root, tests):
        required = Requirement(text)
        try:
            version = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{text}: not installed")
        else:
            if not required.specifier.contains(version, prereleases=True):
                missing.append(f"{text}: {version} is installed")
    return missing


def versions() -> dict[str, str]:
    """Installed version of each direct requirement, by name."""
    names = [text.split(">")[0].split("=")[0].strip() for text in requirements()]
    found = {}
    for name in sorted([*names, *ALSO_RECORDED]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict:
    """Python, platform, package versions, device, threads: what a number may depend on.

    torch is asked in a process of its own, so that the command which asks stays light.
    """
    code = (
        "import allo_lib, json, torch; gpu = torch.cuda.is_available(); print(json.dumps({"
        "'device': torch.cuda.get_device_name() if gpu else 'cpu', "
        "'cuda': torch.version.cuda if gpu else None, 'threads': torch.get_num_threads()}))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    unknown = {"device": "unknown", "cuda": None, "threads": None}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        **(json.loads(done.stdout) if done.returncode == 0 else unknown),
        "versions": versions(),
    }


def device_name(device: str) -> str:
    """What computes on a torch device: the GPU's name, or the processor's."""
    if device == "cpu":
        return _processor()
    import torch

    return torch.cuda.get_device_name(device)


def child_environment(root: Path = ROOT) -> dict[str, str]:
    """The environment of a Python process that has to find this checkout's `allo_lib` first."""
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(root), *(part for part in rest if part and part != str(root))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def prepare(root: Path = ROOT, tests: bool = False) -> str:
    """Path of an interpreter that meets the ranges; installs the lock into `.venv` if need be.

    Raises AlloError when the installation does not go through; the next call takes it up again.
    """
    if not unmet(root, tests):
        return sys.executable
    folder = root / ".venv"
    folder.mkdir(exist_ok=True)
    with (folder / "install.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not _is_ready(root, folder, tests):
            _install(root, folder)
    return str(folder / "bin" / "python")


def _is_ready(root: Path, folder: Path, tests: bool) -> bool:
    """Whether `.venv` was installed from this very lock, or is the user's own and meets the ranges.

    One whose installation was interrupted still has its `installing` mark and does not count.
    """
    python = folder / "bin" / "python"
    runs = python.exists() and subprocess.run([python, "-c", ""], capture_output=True)
    if not runs or runs.returncode != 0 or (folder / "installing").exists():
        return False
    stamp = folder / "installed"
    if stamp.exists():
        return stamp.read_text() == _lock_hash(root)
    command = [python, "-P", "-m", "allo_lib.machine.environment", "--check", *["--tests"] * tests]
    return subprocess.run(command, env=child_environment(root)).returncode == 0


def _install(root: Path, folder: Path) -> None:
    _say(f"installing the versions of {LOCK} into .venv (a few minutes, once)")
    mark = folder / "installing"
    mark.touch()
    (folder / "installed").unlink(missing_ok=True)
    python = folder / "bin" / "python"
    if subprocess.run([sys.executable, "-m", "venv", folder], stdout=sys.stderr).returncode:
        raise AlloError(
            f"{sys.executable} could not make .venv; install its venv module (python3-venv on "
            "Debian and Ubuntu), then type the same command again"
        )
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if subprocess.run([*pip, "-r", root / LOCK], stdout=sys.stderr).returncode:
        raise AlloError(
            f"pip could not install {LOCK} (its message stands above); "
            "when that is fixed, type the same command again"
        )
    (folder / "installed").write_text(_lock_hash(root))
    mark.unlink()


def _lock_hash(root: Path) -> str:
    return hashlib.sha256((root / LOCK).read_bytes()).hexdigest()


def _say(text: str) -> None:
    # Standard output carries only the interpreter's path, which the shell script reads.
    print(f"run_all: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Print the interpreter to use; 0 when there is one, 2 with the reason when there is none."""
    parser = argparse.ArgumentParser(prog="allo_lib.machine.environment", allow_abbrev=False)
    parser.add_argument("--tests", action="store_true", help="the test extra's ranges too")
    parser.add_argument("--check", action="store_true", help="only say whether the ranges are met")
    options = parser.parse_args()
    try:
        if options.check:
            return 1 if unmet(tests=options.tests) else 0
        print(prepare(tests=options.tests))
    except AlloError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
