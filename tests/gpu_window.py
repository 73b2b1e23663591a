"""One window on a GPU: the tests marked `gpu`, a trace, the cost of a step, then the study.

    python tests/gpu_window.py --out DIR [--minutes 9] [--profile smollm2] [-p NAME VALUE]...
        [--data DIR] [--wheels DIR] [--carried DIR] [--only tests,trace,costs,study]
        [-- MORE OPTIONS OF THE STUDY, such as --domains questions --seeds 0]

Made for a bare machine without a network that is there for some minutes. To be carried to it:

- this checkout, 2 MB without `results`;
- with --wheels what its Python lacks of pyproject.toml; beside torch, transformers, accelerate,
  peft, pandas, matplotlib and pytest those are 43 wheels, 17 MB, installed for this window alone;
- with --data (or ALLO_DATA) the data sets, 11 MB;
- for smollm2 its weights, 98 MB: the GGUF file that `engine.models` names, in a folder that the
  environment variable ALLO_CACHE names. Half a minute makes the float32 folder of it there.

DIR is what comes back, whatever ends the window, if only a kill: at most 8 files of at most 16 MB,
each whole at any moment. `window.json` says what ran on which device, for how long, and with which
exit status (costs and study: 3 where time was up); `log.txt` is what was printed; `operations.txt`
and two traces are those of `gpu_trace`; `carry.tar.gz.NN`, an archive each, hold the results folder
without weights. With --carried a window goes on from those of an earlier one.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("tests", "trace", "costs", "study")
SHARE = {"wheels": 0.2, "tests": 0.44, "trace": 0.2, "costs": 0.4, "study": 1}  # of all time
FINE = {"tests": (0, 5), "costs": (0, 3), "study": (0, 3)}  # statuses; 5 is no test of a GPU
CARRY, LOG, TOLD = "carry.tar.gz.", "log.txt", "window.json"
PART, LARGEST = 14_500_000, 16_000_000  # bytes of an archive's files, and of any file in DIR
MOST = 7  # files in DIR, beside one being written
PACK_EVERY = 10  # seconds, while there are new results
# What is left out first where there are too many; then the last archives.
LESS_IMPORTANT = ("decoding.trace.json.gz", "training.trace.json.gz", "operations.txt", LOG)


class Window:
    """What the phases share: where they write, until when, and what is told of them."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out, self.results = options, options.out, options.results
        self.length, self.start = options.minutes * 60, time.monotonic()
        self.patience = min(7.5, self.length / 40)  # seconds for a phase that is asked to end
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.look_in(ROOT)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.told = {"started": now, "minutes": options.minutes, "profile": options.profile}
        self.told |= {"phases": {}, "left_out": []}
        self.tell()

    def left(self) -> float:
        """Seconds until a phase has to end: before the rest, its end and the last archive."""
        return self.start + self.length - 4 * self.patience - time.monotonic()

    def look_in(self, folder: Path) -> None:
        """Have the phases' Python look for modules in `folder` first."""
        before = self.environment.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, (str(folder), before)))
        self.environment["PYTHONPATH"] = path

    def tell(self) -> None:
        put(self.out / TOLD, (json.dumps(self.told, indent=1) + "\n").encode())

    def run(self, name: str, *command, minutes: bool = False) -> None:
        """One phase in processes of its own, for no longer than its share; told, also if it fails.

        minutes: whether it takes `--minutes`, and leaves results that are packed now and then.
        """
        begun, limit = time.monotonic(), min(SHARE[name] * self.length, self.left())
        if limit <= 0:
            self.told["phases"][name] = {"status": "no time left"}
            return
        command = [sys.executable, *map(str, command)]
        command += ["--minutes", f"{limit / 60:.3f}"] if minutes else []
        told = self.told["phases"][name] = {"command": command}
        self.tell()
        with (self.out / LOG).open("ab", buffering=0) as log:
            log.write(f"\n== {name} ==\n".encode())
            started = {"ALLO_STARTED": str(time.time())}  # `--minutes` counts from there
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | started, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and (rest := begun + limit - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(rest, PACK_EVERY))
                    if minutes:
                        self.pack()
            finally:
                end(process, self.patience)
                told |= {"seconds": round(time.monotonic() - begun, 1)}
                told |= {"status": process.returncode}
                print(f"{name}: status {process.returncode}, {told['seconds']} s", flush=True)
                self.tell()

    def pack(self) -> None:
        """Put the results into DIR, and leave out what is more than may come back."""
        archives, too_large = archives_of(self.results)
        parts = {f"{CARRY}{number:02}": content for number, content in enumerate(archives)}
        for path in self.out.iterdir():
            unfinished = path.suffix == ".part"
            if unfinished or (path.name.startswith(CARRY) and path.name not in parts):
                path.unlink()
            elif path.stat().st_size > LARGEST:
                put(path, path.read_bytes()[-LARGEST // 2 :])  # of a log the end tells most
        others = [path.name for path in self.out.iterdir() if path.name not in parts]
        excess = max(0, len(others) + len(parts) - MOST)
        gone = [name for name in LESS_IMPORTANT if name in others][:excess]
        gone += list(parts)[len(parts) - (excess - len(gone)) :] if excess > len(gone) else []
        for name in gone:
            parts.pop(name, None)
            (self.out / name).unlink(missing_ok=True)
        self.told["left_out"] = sorted({*self.told["left_out"], *gone, *too_large})
        for name, content in parts.items():
            put(self.out / name, content)
        self.tell()


def archives_of(results: Path) -> tuple[list[bytes], list[str]]:
    """The files of a results folder without weights, as gzipped tar archives; and those that are
    too large for one."""
    made: list[io.BytesIO] = []
    too_large = []
    for path in sorted(results.rglob("*")) if results.is_dir() else ():
        name = path.relative_to(results)
        if not is_carried(name) or not path.is_file():
            continue
        try:
            content, changed = path.read_bytes(), path.stat().st_mtime
        except OSError:  # gone meanwhile: the study goes on
            continue
        if len(content) > PART:
            too_large.append(str(name))
            continue
        if not made or made[-1].tell() + len(content) > PART:
            if made:
                archive.close()  # noqa: F821
            made.append(io.BytesIO())
            archive = tarfile.open(fileobj=made[-1], mode="w:gz", compresslevel=6)
        member = tarfile.TarInfo(name.as_posix())
        member.size, member.mtime = len(content), changed
        archive.addfile(member, io.BytesIO(content))
    if made:
        archive.close()
    return [part.getvalue() for part in made], too_large


def is_carried(name: Path) -> bool:
    """Whether a file of a results folder is worth carrying: no weights, and nothing half made."""
    if name.parts[0] == ".store" and name.parts[1:2] in (("lock",), ("running",)):
        return False
    hidden = any(part.startswith(".") for part in name.parts if part != ".store")
    return name.suffix != ".safetensors" and not hidden


def unpack(folder: Path, results: Path) -> list[str]:
    """Bring carried results back; the names of archives, with what is wrong with one that is."""
    told = []
    for path in sorted(folder.glob(f"{CARRY}*")):
        try:
            with tarfile.open(path) as archive:
                archive.extractall(results, filter="data")
            told.append(path.name)
        except (OSError, EOFError, tarfile.TarError) as error:
            told.append(f"{path.name}: {error}")
    return told


def put(path: Path, content: bytes) -> None:
    """Write a file so that it is at any moment the old one or the new one, whole."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def end(process: subprocess.Popen, patience: float) -> None:
    """End a process and its session, if need be the hard way."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def look_around(window: Window) -> dict:
    """The machine, as the manifest tells it, with what its Python lacks and the GPU's driver."""
    code = "import json; from allo_lib.machine.environment import machine, unmet; "
    code += "print(json.dumps(machine() | {'unmet': unmet(tests=True)}))"
    asked = [sys.executable, "-P", "-c", code]
    said = subprocess.run(asked, env=window.environment, capture_output=True, text=True)
    told = json.loads(said.stdout) if said.returncode == 0 else {"error": said.stderr[-2000:]}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        told["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout
    return told


def work(window: Window, folder: str) -> None:
    """All phases; `folder` gets the carried packages."""
    options, told = window.options, window.told
    if options.wheels:
        wheels = sorted(options.wheels.glob("*.whl"))
        window.run(
            "wheels", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
            "--target", folder, *wheels,
        )  # fmt: skip
        window.look_in(Path(folder))
    told["machine"] = look_around(window)
    print(json.dumps(told["machine"]), flush=True)
    if options.carried and not options.results.exists():
        told["carried"] = unpack(options.carried, options.results)
    window.pack()
    study = ["-P", "-m", "allo_lib.cli.cli", options.profile, "--out", options.results]
    study += ["--data", options.data] if options.data else []
    study += [part for name, value in options.overrides for part in ("-p", name, value)]
    if "tests" in options.only:
        paths = sorted((ROOT / "tests").glob("test_*.py"))
        marked = [path for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
        window.run("tests", "-m", "pytest", "-v", "-m", "gpu", "--durations=15", *marked)
    if "trace" in options.only:
        trace = ROOT / "tests" / "gpu_trace.py"
        window.run("trace", trace, "--out", options.out, "--profile", options.profile)
        with contextlib.suppress(OSError, ValueError):
            first_line = (options.out / "operations.txt").read_text().splitlines()[0]
            told["trace"] = json.loads(first_line)
    if "costs" in options.only:
        window.run("costs", *study, "--only", "07", minutes=True)
    if "study" in options.only:
        window.run("study", *study, *options.more, minutes=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of what comes back")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which all is over")
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("-p", dest="overrides", nargs=2, action="append", default=[])
    parser.add_argument("--data", type=Path, help="folder of data sets, default $ALLO_DATA")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install")
    parser.add_argument("--carried", type=Path, help="what came back of an earlier window")
    parser.add_argument("--results", type=Path, help="results folder, default a temporary one")
    parser.add_argument("--only", default=",".join(PHASES), help="phases")
    parser.add_argument("more", nargs="*", help="options of the study's run_all.sh")
    options = parser.parse_args()
    if Path(options.profile).is_file():
        options.profile = str(Path(options.profile).resolve())
    place = Path(tempfile.gettempdir(), "allo-window", Path(options.profile).stem)
    options.results, options.only = options.results or place, options.only.split(",")
    for name in ("out", "results", "data", "wheels", "carried"):  # phases run elsewhere
        path = getattr(options, name)
        setattr(options, name, path and path.resolve())
    if unknown := set(options.only) - set(PHASES):
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(PHASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    window = Window(options)
    try:
        with tempfile.TemporaryDirectory() as folder:
            work(window, folder)
    finally:
        window.pack()
    phases = window.told["phases"]
    failed = [name for name in phases if phases[name]["status"] not in FINE.get(name, (0,))]
    print(f"failed: {', '.join(failed)}" if failed else "all went well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
