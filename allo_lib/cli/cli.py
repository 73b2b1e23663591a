"""The commands behind `run_all.sh`: run, test, status, verify, figures, tune."""

import argparse
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from allo_lib.cli import driver, verify
from allo_lib.cli.execute import NotebookError
from allo_lib.errors import AlloError, short
from allo_lib.machine.environment import ROOT
from allo_lib.profiles.config import Profile
from allo_lib.profiles.methods import stages_of
from allo_lib.profiles.profile_files import load_profile, parse_yaml, part_of
from allo_lib.study import manifest

BAD_INPUT, TIME_UP = 2, 3
_YAML = (".yaml", ".yml")
# Of --minutes, at most: to stop a notebook, write the manifest and tell what is missing.
ENDING_SECONDS = 40
USAGE = """\
./run_all.sh [PROFILE] [--seeds 0,1,2] [--domains A,B] [--only 01,05] [--data DIR] [--out DIR]
             [--minutes M] [-p NAME VALUE]... [--fresh]
./run_all.sh test [PYTEST ARGS]
./run_all.sh status [PROFILE] [--seeds 0,1,2] [--domains A,B] [--out DIR] [--data DIR]
./run_all.sh verify [PROFILE] [--out DIR] [--rerun] [--data DIR]
./run_all.sh figures [PROFILE] [NAME] [--out DIR]
./run_all.sh tune [PROFILE] [--seeds 100,101] [--domains A,B] [--out DIR] [--data DIR]
             [-p NAME VALUE]..."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input, 3 stopped because
    --minutes were over, 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["test"]:
            return test(arguments[1:])
        if arguments and arguments[0] in COMMANDS:
            return _call(COMMANDS[arguments[0]], arguments[1:])
        return _call(run, arguments)
    except AlloError as error:
        print(f"run_all: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except (NotebookError, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(
            "\nrun_all: stopped; finished work is kept, and the same command goes on from here",
            file=sys.stderr,
        )
        return 128 + getattr(stopped, "number", signal.SIGINT)


# --- the commands --------------------------------------------------------------------------------


def test(arguments: list[str]) -> int:
    """Replace this process by pytest, from the checkout's folder; by default its quick tests."""
    os.chdir(ROOT)
    sys.stdout.flush()
    chosen = arguments or ["-m", "not slow"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *chosen])


def run(options: argparse.Namespace) -> int:
    """Run the notebooks of a profile."""
    start, study = time.monotonic(), _run_of(options)
    if options.minutes:
        seconds = 60 * options.minutes - min(ENDING_SECONDS, 15 * options.minutes)
        study = dataclasses.replace(study, deadline=start + seconds)
    if options.fresh and (study.only or study.domains):
        raise AlloError("--fresh starts the whole run over; leave out --only and --domains")
    ran = driver.run_study(study, fresh=options.fresh)
    if ran and (study.results / "claims.csv").is_file():
        from allo_lib.report import report  # loads matplotlib

        print(f"wrote {shown(report.build(study.results))}")  # now with what the manifest says
    seconds = time.monotonic() - start
    count = f"{len(ran)} notebooks ran" if ran else "nothing to do"
    print(f"{study.profile.name}: {count}; took {int(seconds // 60)} min {seconds % 60:.0f} s")
    if all(step.is_done() for step in driver.steps(study)):
        return 0
    print(f"time is up, and the same command goes on from here\n\n{verify.describe(study)}")
    return TIME_UP


def status(options: argparse.Namespace) -> int:
    """Print what is done, what is missing, what each stage cost."""
    print(verify.describe(_run_of(options)))
    return 0


def check(options: argparse.Namespace) -> int:
    """Compare results with their hashes, or with a new run."""
    study = verify.as_recorded(_run_of(options))
    problems = verify.check_files(study)
    if options.rerun and not problems:
        problems = verify.rerun(study)
    for problem in problems:
        print(f"run_all: {problem}", file=sys.stderr)
    if not problems:
        print(f"{shown(study.results)}: verified")
    return 1 if problems else 0


def redraw(options: argparse.Namespace) -> int:
    """Make claims, tables, figures and report again from a folder's own files, without torch."""
    name = options.profile
    if Path(name).suffix in _YAML:
        name = load_profile(name, device="cpu").name
    results = options.out or ROOT / "results" / name
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
            raise AlloError(f"no figure or table {short(options.name)}: expected one of {names}")
        written = [results / path.relative_to(copy) for path in wanted]
        for path, target in zip(wanted, written, strict=True):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    manifest.note_redrawn(results, written, ROOT)
    for target in [*written, report.build(results)]:
        print(f"wrote {shown(target)}")
    if results.parent == ROOT / "results":  # README tells of the committed ones
        report.update_readme(ROOT / "README.md", ROOT / "results")
    return 0


def tune(options: argparse.Namespace) -> int:
    """Find every method's learning rates on SFT models that are not reported."""
    study = _run_of(options)
    if not options.out:  # what is tuned on is no part of what is reported
        folder = study.results.with_name(f"{study.profile.name}-tuning")
        study = dataclasses.replace(study, results=folder)
    driver.check_folder(study, fresh=False)
    from allo_lib.study import runs  # loads torch

    seeds, reported = options.seeds or (100, 101, 102, 103), study.profile.first_seed
    if told := set(seeds) & set(range(reported, reported + study.profile.models)):
        raise AlloError(f"--seeds {min(told)}: a model that is reported; tune on others")
    if (study.results / "tuned.yaml").exists():
        raise AlloError(
            f"{study.results} has rates already, which would be replaced; name another folder with "
            "--out"
        )
    profile = part_of(study.profile, study.domains) if study.domains else study.profile
    data = None if study.data is None else str(study.data)
    with driver.signals(), driver.sole_run(study.results):
        manifest.own(study.results, study.profile)
        print(f"wrote {shown(runs.tune(profile, seeds, study.results, data))}")
    return 0


# --- what is typed -------------------------------------------------------------------------------


def _typed(read: Callable, expected: str) -> Callable:
    """The type of an option: `read`, and what it expects where that raises ValueError."""

    def parse(text: str):
        if not text:
            raise argparse.ArgumentTypeError("is empty: give it a value, or leave the option out")
        try:
            return read(text)
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None)
            got = f"{short(text)} ({reason})" if reason else short(text)
            raise argparse.ArgumentTypeError(f"{got}: expected {expected}") from None

    return parse


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(","))
    if min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise ValueError
    return seeds


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise ValueError
    return minutes


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    path.is_dir()  # raises for what cannot be one: too long, or with a NUL
    return path


def _data(text: str) -> Path:
    folder = _folder(text)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError
    return folder


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{int(part):02}" for part in text.split(",")))


def parse_domains(text: str, profile: Profile) -> tuple[str, ...]:
    """`maths,helpfulness` in the profile's order, () for all; AlloError for one there is not."""
    part = part_of(profile, [name.strip() for name in text.split(",")]) if text else profile
    return () if part is profile else tuple(part.domains)


def parse_value(name: str, text: str, option: str = "-p "):
    """A typed value of a key: what YAML makes of it, plain numbers, texts and lists; never code.

    option: what the name stood behind, for the AlloError.
    """
    try:
        return parse_yaml(text)
    except AlloError as error:
        raise AlloError(f"{option}{short(name)} {short(text)}: no value ({error})") from None


OPTIONS = {
    "profile": {"nargs": "?", "default": "tiny", "help": "name or YAML file"},
    "name": {"nargs": "?", "help": "a figure or table, such as main_miniature; default all"},
    "--out": {
        "metavar": "DIR", "help": "results folder, default results/PROFILE",
        "type": _typed(_folder, "a path that can be a folder"),
    },
    "--data": {
        "metavar": "DIR", "help": f"folder of data sets, default ${driver.DATA_VARIABLE}",
        "type": _typed(_data, "a folder that holds the data sets"),
    },
    "--domains": {
        "metavar": "A,B", "help": "domains to work on, default all: a study in pieces",
        "type": _typed(str, "names"),
    },
    "--seeds": {
        "metavar": "0,1,2", "help": "default: `models` from `first_seed`; tune: 100 to 103",
        "type": _typed(_seeds, "whole numbers from 0 to 2^32 - 1, each once, as in 0,1,2"),
    },
    "--only": {
        "metavar": "01,05", "help": "numbers of notebooks", "default": (),
        "type": _typed(_numbers, "numbers of notebooks, as in 01,05"),
    },
    "--minutes": {
        "metavar": "M", "help": "end after M minutes, done or not",
        "type": _typed(_minutes, "a number of minutes above 0, as in 9 or 0.5"),
    },
    "--fresh": {"action": "store_true", "help": "remove earlier results first"},
    "--rerun": {"action": "store_true", "help": "run again and compare cell by cell"},
    "-p": {
        "dest": "overrides", "nargs": 2, "action": "append", "default": [],
        "metavar": ("NAME", "VALUE"), "help": "set a key of the profile, dotted into its sections",
    },
}  # fmt: skip
COMMANDS = {"status": status, "verify": check, "figures": redraw, "tune": tune}
_OF_A_PROFILE = ("profile", "--out", "--domains", "-p")
OPTIONS_OF = {
    run: (*_OF_A_PROFILE, "--seeds", "--only", "--data", "--minutes", "--fresh"),
    status: (*_OF_A_PROFILE, "--seeds", "--data"),
    check: ("profile", "--out", "-p", "--data", "--rerun"),
    redraw: ("profile", "name", "--out"),
    tune: (*_OF_A_PROFILE, "--seeds", "--data"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        message = re.sub("^argument ([^:]*): ", r"\1 ", message)
        raise AlloError(f"{message[:300]}; ./run_all.sh --help shows what there is")


def _call(command: Callable, arguments: list[str]) -> int:
    usage = USAGE.replace("\n", "\n       ")
    parser = _Parser("./run_all.sh", usage, command.__doc__, allow_abbrev=False)
    for name in OPTIONS_OF[command]:
        parser.add_argument(name, **OPTIONS[name])
    if "--data" in OPTIONS_OF[command]:
        parser.set_defaults(data=os.environ.get(driver.DATA_VARIABLE) or None)
    return command(parser.parse_args(arguments))


def _run_of(options: argparse.Namespace) -> driver.Run:
    """Check everything that was typed before anything is touched."""
    overrides = {name: parse_value(name, value) for name, value in options.overrides}
    profile = load_profile(options.profile, overrides)
    _check_methods(profile)
    path, first = Path(options.profile), profile.first_seed
    study = driver.Run(
        profile_name=str(path.resolve()) if path.suffix in _YAML else options.profile,
        profile=profile,
        results=options.out or ROOT / "results" / profile.name,
        overrides=overrides,
        seeds=getattr(options, "seeds", None) or tuple(range(first, first + profile.models)),
        only=getattr(options, "only", ()),
        domains=parse_domains(getattr(options, "domains", None) or "", profile),
        data=getattr(options, "data", None),
    )
    known = [path.name[:2] for path in driver.notebooks(study)]
    if unknown := [number for number in study.only if number not in known]:
        raise AlloError(f"--only {unknown[0]}: expected numbers of notebooks: {', '.join(known)}")
    if len(driver.steps(study)) < len(study.only):
        raise AlloError(
            f"--domains: 07 looks at all domains; leave it out for --only {','.join(study.only)}"
        )
    return study


def _check_methods(profile: Profile) -> None:
    """AlloError for a method that there is not, before anything is trained for hours."""
    requested = [*profile.methods, *profile.ablations, *profile.replicates.once]
    for domain in profile.domains.values():
        requested += [*domain.methods, *domain.ablations, *domain.one_model]
    for name in requested:
        # Names with a share, such as dpo_last10, follow `method.share`; runs of some notebooks
        # may have set that and need none of them.
        if not re.search(r"_(top|last|random)\d", name):
            stages_of(name, profile)


def shown(path: Path) -> str:
    """A path as a user at the checkout's folder would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
