"""Find or make a Python environment that meets the project's ranges, and describe it.

Run as `python -m allo_lib.machine.environment [--tests]` it prints the interpreter to use. It
needs only the standard library until an environment is there.
"""

import contextlib
import fcntl
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


def requirements(root: Path = ROOT, tests: bool = False) -> list[str]:
    """The version ranges of pyproject.toml; `tests`: with those of its `test` extra."""
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
        version = _version(required.name)
        if version is None:
            missing.append(f"{text}: not installed")
        elif not required.specifier.contains(version, prereleases=True):
            missing.append(f"{text}: {version} is installed")
    return missing


def versions() -> dict[str, str]:
    """Installed version of each direct requirement, by name."""
    names = [text.split(">")[0] for text in requirements()]
    names.append("tokenizers")  # it decides how text becomes tokens
    return {name: version for name in sorted(names) if (version := _version(name))}


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
        "processor": device_name("cpu"),
        "cores": os.cpu_count(),
        **(json.loads(done.stdout) if done.returncode == 0 else unknown),
        "versions": versions(),
    }


def device_name(device: str) -> str:
    """What computes on a torch device: the GPU's name, or the processor's."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def child_environment(root: Path = ROOT) -> dict[str, str]:
    """The environment of a Python process that has to find this checkout's `allo_lib` first."""
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(root), *(part for part in rest if part and part != str(root))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def prepare(root: Path = ROOT, tests: bool = False) -> str:
    """Path of an interpreter that meets the ranges: this one, or that of `.venv`, made if need be.

    Raises AlloError when the installation does not go through; the next call takes it up again.
    """
    if not unmet(root, tests):
        return sys.executable
    folder, wanted = root / ".venv", (root / LOCK).read_text(encoding="utf-8")
    folder.mkdir(exist_ok=True)
    python, installed = folder / "bin" / "python", folder / "installed"
    with (folder / "install.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not (installed.exists() and installed.read_text(encoding="utf-8") == wanted):
            _say(f"installing the versions of {LOCK} into .venv (a few minutes, once)")
            pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
            try:
                for command in ([sys.executable, "-m", "venv", folder], [*pip, "-r", root / LOCK]):
                    subprocess.run(command, stdout=sys.stderr, check=True)
            except subprocess.CalledProcessError as error:
                raise AlloError(
                    f"could not install {LOCK} into .venv (the message stands above; Debian's "
                    "package of venv is python3-venv); then type the same command again"
                ) from error
            installed.write_text(wanted, encoding="utf-8")
    return str(python)


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _say(text: str) -> None:
    # Standard output carries only the interpreter's path, which the shell script reads.
    print(f"run_all: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Print the interpreter to use; 0 when there is one, 2 with the reason when there is none."""
    try:
        print(prepare(tests="--tests" in sys.argv[1:]))
    except AlloError as error:
        _say(str(error))
    except OSError as error:
        _say(f"cannot make .venv here ({error}): permit writing, or activate an environment that "
             "meets pyproject.toml")  # fmt: skip
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
