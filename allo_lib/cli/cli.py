"""The commands behind `run_all.sh`: run, test, status, verify, figures, tune."""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from allo_lib.cli import driver, status, verify
from allo_lib.errors import AlloError
from allo_lib.machine.environment import ROOT
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile, parse_yaml, part_of
from allo_lib.study import manifest

DATA_VARIABLE = "ALLO_DATA"
DEFAULT_PROFILE = "tiny"
STARTED_VARIABLE = "ALLO_STARTED"  # run_all.sh puts there when it was typed, in Unix seconds
BAD_INPUT, TIME_UP = 2, 3
# Of --minutes, at most: to stop a notebook, write the manifest and tell what is missing.
ENDING_SECONDS = 40
USAGE = """\
./run_all.sh [PROFILE] [--seeds 0,1,2] [--domains A,B] [--only 01,05] [--data DIR] [--out DIR]
             [--minutes M] [-p NAME VALUE]... [--fresh]
./run_all.sh test [PYTEST ARGS]
./run_all.sh status [PROFILE] [--domains A,B] [--out DIR]
./run_all.sh verify [PROFILE] [--out DIR] [--rerun] [--data DIR]
./run_all.sh figures [PROFILE] [NAME] [--out DIR]
./run_all.sh tune [PROFILE] [--seeds 100,101] [--out DIR] [--data DIR] [-p NAME VALUE]..."""
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise AlloError(f"{message}; ./run_all.sh --help shows what there is")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input, 3 stopped because
    --minutes were over, 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    try:
        if command in COMMANDS:
            return COMMANDS[command](arguments[1:])
        return run(arguments)
    except AlloError as error:
        print(f"run_all: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except driver.NotebookError as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 1
    except (driver.Stopped, KeyboardInterrupt) as stopped:
        print(
            "\nrun_all: stopped; finished work is kept, and the same command goes on from here",
            file=sys.stderr,
        )
        return 128 + getattr(stopped, "number", signal.SIGINT)


def test(arguments: list[str]) -> int:
    """Replace this process by pytest, from the checkout's folder; by default its quick tests."""
    os.chdir(ROOT)
    sys.stdout.flush()
    chosen = arguments or ["-m", "not slow"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *chosen])


def run(arguments: list[str]) -> int:
    """Run the notebooks of a profile."""
    options = _parse(arguments, run, *OF_A_PROFILE, "--seeds", "--only", "--data", "--minutes",
                     "--fresh")  # fmt: skip
    start = time.monotonic()
    deadline = None if options.minutes is None else start + parse_minutes(options.minutes)
    asked = dataclasses.replace(_run_of(options), deadline=deadline)
    if options.fresh and (asked.only or asked.domains):
        raise AlloError("--fresh starts the whole run over; leave out --only and --domains")
    if asked.domains and asked.only and not set(asked.only) <= set(_of_domains(asked)):
        raise AlloError(
            f"--domains: notebooks {', '.join(_of_domains(asked))} look at single domains; leave "
            f"it out for --only {','.join(asked.only)}"
        )
    late = False
    try:
        written = driver.run_study(asked, fresh=options.fresh)
    except driver.TimeUp as stopped:
        late, written = True, stopped.written
    for name in written:
        print(f"wrote {shown(asked.results / name)}")
    if written and (asked.results / "claims.csv").is_file():
        from allo_lib.report import report  # loads matplotlib

        print(f"wrote {shown(report.build(asked.results))}")  # now with what the manifest tells
    seconds = time.monotonic() - start
    count = f"{len(written)} files written" if written else "nothing to do"
    print(f"{asked.profile.name}: {count}; took {int(seconds // 60)} min {seconds % 60:.0f} s")
    if not late:
        return 0
    print(f"time is up, and the same command goes on from here; missing:\n{status.missing(asked)}")
    return TIME_UP


def _of_domains(asked: driver.Run) -> list[str]:
    """Numbers of the notebooks that can be run for some of the domains."""
    return [path.name[:2] for path in driver.notebooks(asked) if driver.of_a_domain(path)]


def show_status(arguments: list[str]) -> int:
    """Print what is done, what is missing, what each stage cost."""
    print(status.describe(_run_of(_parse(arguments, show_status, *OF_A_PROFILE))))
    return 0


def check(arguments: list[str]) -> int:
    """Compare results with their hashes, or with a new run."""
    options = _parse(arguments, check, *OF_A_PROFILE, "--data", "--rerun")
    asked = verify.as_recorded(_run_of(options))
    problems = verify.check_files(asked)
    if options.rerun and not problems:
        problems = verify.rerun(asked)
    for problem in problems:
        print(f"run_all: {problem}", file=sys.stderr)
    if not problems:
        print(f"{shown(asked.results)}: verified")
    return 1 if problems else 0


def redraw(arguments: list[str]) -> int:
    """Make claims, tables, figures and report again from a folder's own files, without torch."""
    options = _parse(arguments, redraw, "profile", "name", "--out")
    results = ROOT / "results" / Path(options.profile).stem
    results = folder_of(options.out, "--out") if options.out else results
    if not (results / "measurements.csv").is_file():
        raise AlloError(f"{shown(results)} holds no measurements.csv: run the profile first")
    from allo_lib.report import report  # loads matplotlib

    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / results.name
        shutil.copytree(results, copy, ignore=shutil.ignore_patterns(manifest.STORE, "notebooks"))
        made = report.remake(copy)
        wanted = [path for path in made if options.name in (None, path.stem)]
        if not wanted:
            names = ", ".join(sorted({path.stem for path in made}))
            raise AlloError(f"no figure or table {_cut(options.name)!r}: expected one of {names}")
        written = [results / path.relative_to(copy) for path in wanted]
        for path, target in zip(wanted, written, strict=True):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    manifest.note_redrawn(results, written, ROOT)
    for target in [*written, report.build(results)]:
        print(f"wrote {shown(target)}")
    return 0


def tune(arguments: list[str]) -> int:
    """Find every method's learning rates on SFT models that are not reported."""
    options = _parse(arguments, tune, *OF_A_PROFILE, "--seeds", "--data", seeds="100,101,102,103")
    asked = _run_of(options)
    if not options.out:  # what is tuned on is no part of what is reported
        asked = dataclasses.replace(
            asked, results=asked.results.with_name(f"{asked.profile.name}-tuning")
        )
    driver.check_folder(asked, fresh=False)
    from allo_lib.study import runs  # loads torch

    data = None if asked.data is None else str(asked.data)
    print(f"wrote {shown(runs.tune(asked.profile, asked.seeds, asked.results, data))}")
    return 0


COMMANDS = {
    "test": test, "status": show_status, "verify": check, "figures": redraw, "tune": tune,
}  # fmt: skip
OF_A_PROFILE = ("profile", "--out", "--domains", "-p")
OPTIONS = {
    "profile": {"nargs": "?", "default": DEFAULT_PROFILE, "help": "name or YAML file"},
    "name": {"nargs": "?", "help": "a figure or table, such as main_miniature; default all"},
    "--out": {"metavar": "DIR", "help": "results folder, default results/PROFILE"},
    "--data": {"metavar": "DIR", "help": f"folder of data sets, default ${DATA_VARIABLE}"},
    "--domains": {"metavar": "A,B", "help": "domains to work on, default all: a study in pieces"},
    "--seeds": {"metavar": "0,1,2", "help": "default 0 to `models` - 1; tune: 100 to 103"},
    "--only": {"metavar": "01,05", "help": "numbers of notebooks"},
    "--minutes": {"metavar": "M", "help": "end after M minutes, done or not"},
    "--fresh": {"action": "store_true", "help": "remove earlier results first"},
    "--rerun": {"action": "store_true", "help": "run again and compare cell by cell"},
    "-p": {
        "dest": "overrides", "nargs": 2, "action": "append", "default": [],
        "metavar": ("NAME", "VALUE"), "help": "set a key of the profile, dotted into its sections",
    },
}  # fmt: skip


def _parse(arguments: list[str], command, *names: str, **defaults: str) -> argparse.Namespace:
    """What was typed after `command`, which takes the options of these names."""
    usage, described = USAGE.replace("\n", "\n       "), command.__doc__
    parser = _Parser("./run_all.sh", usage, described, allow_abbrev=False)
    for name in names:
        parser.add_argument(name, **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser.parse_args(arguments)


def _run_of(options: argparse.Namespace) -> driver.Run:
    """Check everything that was typed before anything is touched."""
    for name in ("only", "out", "data", "domains"):
        if getattr(options, name, None) == "":
            raise AlloError(f"--{name} is empty: give it a value, or leave the option out")
    overrides = {name: parse_value(name, value) for name, value in options.overrides}
    profile = load_profile(options.profile, overrides)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", profile.name):
        raise AlloError(
            f"profile name {profile.name!r} cannot name a folder: use letters, digits, . _ -"
        )
    _check_methods(profile)
    results = folder_of(options.out, "--out") if options.out else ROOT / "results" / profile.name
    path, typed = Path(options.profile), getattr(options, "seeds", None)
    asked = driver.Run(
        given=str(path.resolve()) if path.suffix in (".yaml", ".yml") else options.profile,
        profile=profile,
        results=results,
        overrides=overrides,
        seeds=tuple(range(profile.models)) if typed is None else parse_seeds(typed),
        data=data_folder(getattr(options, "data", None)),
        domains=parse_domains(options.domains or "", profile),
    )
    only = parse_only(getattr(options, "only", None) or "", driver.notebooks(asked))
    return dataclasses.replace(asked, only=only)


def _check_methods(profile: Profile) -> None:
    """AlloError for a method that there is not, before anything is trained for hours."""
    asked = [*profile.methods, *profile.ablations, *profile.replicates.once]
    for domain in profile.domains.values():
        asked += [*domain.methods, *domain.ablations]
    for name in asked:
        # Names with a share, such as dpo_last10, follow `method.share`; runs of some notebooks
        # may have set that and need none of them.
        if not any(letter.isdigit() for letter in name):
            stages_of(name, profile)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers. AlloError for text, negative numbers, and a seed named twice."""
    parts = [part.strip() for part in text.split(",")]
    # By length first: Python refuses to read numbers of thousands of digits.
    if not all(re.fullmatch("[0-9]{1,10}", part) and int(part) < 2**32 for part in parts):
        raise AlloError(
            f"--seeds {_cut(text)!r}: expected whole numbers from 0 to 2^32 - 1, as in 0,1,2"
        )
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise AlloError(f"--seeds {text!r}: a seed is named twice; name each once")
    return seeds


def parse_minutes(text: str) -> float:
    """Seconds from now until notebooks have to stop, for a command of `text` minutes in all.

    AlloError unless that is a finite number above 0.
    """
    minutes = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text) else 0.0
    if not minutes:
        raise AlloError(
            f"--minutes {_cut(text)!r}: expected a number of minutes above 0, as in 9 or 0.5"
        )
    gone = time.time() - float(os.environ.get(STARTED_VARIABLE) or time.time())
    return 60 * minutes - min(ENDING_SECONDS, 15 * minutes) - gone


def parse_only(text: str, notebooks: list[Path]) -> tuple[str, ...]:
    """`01,5` as two-digit numbers of notebooks; AlloError for one that there is not."""
    if not text:
        return ()
    known = [path.name[:2] for path in notebooks]
    asked = [f"{part.strip():0>2}" if part.strip() else part for part in text.split(",")]
    for number in asked:
        if number not in known:
            raise AlloError(
                f"--only {_cut(text)!r}: expected numbers of notebooks: {', '.join(known)}"
            )
    return tuple(asked)


def parse_domains(text: str, profile: Profile) -> tuple[str, ...]:
    """`maths,helpfulness` in the profile's order, () for all; AlloError for one there is not."""
    if not text:
        return ()
    asked = part_of(profile, [part.strip() for part in text.split(",")])
    return () if asked is profile else tuple(asked.domains)


def parse_value(name: str, text: str, option: str = "-p "):
    """A typed `-p` value: number, text, true, false, null, or a flat list of them; never code.

    option: what the name stood behind, for the AlloError.
    """
    key = _cut(name) if name.isprintable() else repr(_cut(name))
    shown_as = f"{option}{key} {_cut(text)!r}"
    try:
        value = parse_yaml(text)
    except AlloError as error:
        raise AlloError(f"{shown_as}: not a number, text or list of them ({error})") from None
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, (str, int, float)) for item in items):
        raise AlloError(f"{shown_as}: expected a number, a text, or a list of them")
    # YAML 1.1 reads 1e-4 as text because it has no point.
    items = [
        float(item) if isinstance(item, str) and _EXPONENT.fullmatch(item) else item
        for item in items
    ]
    return items if isinstance(value, list) else items[0]


def data_folder(given: str | None) -> Path | None:
    """The data folder named by --data or the environment; AlloError if it holds nothing."""
    text = given or os.environ.get(DATA_VARIABLE)
    if not text:
        return None
    source = "--data" if given else DATA_VARIABLE
    folder = folder_of(text, source)
    if not folder.is_dir():
        raise AlloError(f"{source} {text}: no such folder; name one that holds the data sets")
    if not any(folder.iterdir()):
        raise AlloError(f"{source} {text}: the folder is empty; name one that holds the data sets")
    return folder


def folder_of(text: str, source: str) -> Path:
    """The absolute path of a folder, there or not; AlloError for one that cannot be."""
    try:
        path = Path(text).resolve()
        path.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a NUL
        reason = getattr(error, "strerror", None) or error
        raise AlloError(f"{source} {_cut(text)!r}: no path ({reason}); name a folder") from None
    return path


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown(path: Path) -> str:
    """A path as a user at the checkout's folder would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
