"""AlpacaEval's and Arena-Hard's own programs as judges, for a user who has a key for their models.

Nothing of theirs is imported: the programs run as processes of their own, with the user's key, in
a folder that holds our files only. Without the key or the program one line says what is missing;
the files to be judged are written before that, so that they may be judged elsewhere.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from allo_lib import benchmark_files as files
from allo_lib.errors import AlloError

KEY = "OPENAI_API_KEY"
ALPACA_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # the judge of AlpacaEval 2.0
BENCH = files.ARENA_BENCH
# Arena-Hard's script looks up what answers are compared with by this file name, whoever wrote them.
ARENA_BASELINE = "gpt-4-0314"
ARENA_CHECKOUT = "ARENA_HARD_AUTO"  # environment variable: the folder of a clone


def write_for_alpaca_eval(rows, ours, theirs, names: tuple[str, str], folder) -> Path:
    """Write both outputs for AlpacaEval; the folder that they are in.

    Args:
        rows: instructions (`realdata.load_rows`).
        ours, theirs: responses in the order of the rows; `names`: of the two models.
        folder: where to; the files are in `alpaca_eval/<our name>/` of it.

    Raises AlloError as `benchmark_files.write_alpaca_eval` does, and for two equal names.
    """
    _check_names(names)
    folder = Path(folder).absolute() / "alpaca_eval" / names[0]
    for name, texts in zip(names, (ours, theirs), strict=True):
        files.write_alpaca_eval(folder / f"{name}.json", rows, texts, name)
    return folder


def ask_alpaca_eval(folder: Path, rows, names: tuple[str, str]) -> dict[str, float]:
    """How AlpacaEval's program judges the outputs in a folder, by row id: 1 won, 0 lost.

    The judge is that of AlpacaEval 2.0, which gives a preference from 1 to 2; here minus 1. What it
    gave none for is left out. The program is asked for the plain win rate, as its length control is
    fitted to its own reference model.

    Args:
        folder: what `write_for_alpaca_eval` gave for the same rows and names.

    Raises:
        AlloError: no key or no program (told with the place of the files), or the program failed.
    """
    program = shutil.which("alpaca_eval")
    lacking = [] if program else ["the command alpaca_eval (pip install alpaca-eval)"]
    _check_able("AlpacaEval", lacking, folder)
    annotations = folder / ALPACA_ANNOTATOR / "annotations.json"
    annotations.unlink(missing_ok=True)  # an older run's must not be taken for this one's
    our_file, their_file = (folder / f"{name}.json" for name in names)
    command = [program, f"--model_outputs={our_file}", f"--reference_outputs={their_file}"]
    command += [f"--annotators_config={ALPACA_ANNOTATOR}", f"--output_path={folder}"]
    # With the published leaderboard the program would skip a name that is on it.
    command += ["--precomputed_leaderboard=None", "--fn_metric=get_winrate", "--sort_by=win_rate"]
    _run(command, "alpaca_eval", folder)
    return files.alpaca_outcomes(annotations, rows)


def write_for_arena_hard(rows, ours, theirs, names: tuple[str, str], folder) -> Path:
    """Write questions and both answers as Arena-Hard's script looks for them; their folder.

    The script takes the file of `gpt-4-0314` for the baseline. Ours holds `theirs`, and the rows in
    it say their name. The folder is `arena_hard/<our name>-<hash of the answers>`, as the script
    keeps judgements it has made: an interrupted run goes on, and other answers are judged anew.

    Args and errors: as for `write_for_alpaca_eval`.
    """
    _check_names(names)
    if names[0] == ARENA_BASELINE:
        raise AlloError(f"name {names[0]!r} is the baseline's file; expected another one for ours")
    said = json.dumps([[row["id"] for row in rows], list(ours), list(theirs), names])
    digest = hashlib.sha256(said.encode()).hexdigest()[:12]
    folder = Path(folder).absolute() / "arena_hard" / f"{names[0]}-{digest}"
    answers = folder / "data" / BENCH / "model_answer"
    files.write_arena_hard(answers / f"{names[0]}.jsonl", rows, ours, names[0])
    files.write_arena_hard(answers / f"{ARENA_BASELINE}.jsonl", rows, theirs, names[1])
    files.write_arena_questions(folder / "data" / BENCH / "question.jsonl", rows)
    return folder


def ask_arena_hard(
    folder: Path, rows, names: tuple[str, str], checkout=None
) -> dict[str, list[float]]:
    """How Arena-Hard's script judges the answers in a folder: scores of ours by row id.

    Each question is judged in both orders, and a verdict A>>B or B>>A counts three times, as in
    their table; so a row has 2 to 6 scores of 1, 0.5 or 0. Rows without two verdicts are left out.

    Args:
        folder: what `write_for_arena_hard` gave for the same rows and names.
        checkout: folder with a clone of lmarena/arena-hard-auto of 2025-04-18 or later, whose
            requirements this Python has; default the environment variable ARENA_HARD_AUTO.

    Raises:
        AlloError: no key or no clone (told with the place of the files), or the script failed.
    """
    checkout = Path(checkout or os.environ.get(ARENA_CHECKOUT) or "").expanduser().absolute()
    settings = checkout / "config" / f"{BENCH}.yaml"
    clone = (
        "a clone of github.com/lmarena/arena-hard-auto of 2025-04-18 or later, its folder named by "
        f"the environment variable {ARENA_CHECKOUT}"
    )
    _check_able("Arena-Hard", [] if settings.is_file() else [clone], folder)
    config = _yaml(settings) | {"model_list": [names[0]], "bench_name": BENCH}
    own = files.write_text(folder / "settings.yaml", yaml.safe_dump(config))
    command = [sys.executable, str(checkout / "gen_judgment.py"), f"--setting-file={own}"]
    command += [f"--endpoint-file={checkout / 'config' / 'api_config.yaml'}"]
    _run(command, "gen_judgment.py", folder)
    judged = folder / "data" / BENCH / "model_judgment" / str(config.get("judge_model"))
    scores = files.arena_scores(judged / f"{names[0]}.jsonl")
    return {row["id"]: scores[row["id"]] for row in rows if row["id"] in scores}


def _check_names(names: tuple[str, str]) -> None:
    if names[0] == names[1]:
        raise AlloError(f"both sets of outputs are named {names[0]!r}; expected two names")


def _check_able(judge: str, lacking: list[str], folder: Path) -> None:
    if not os.environ.get(KEY, "").strip():
        lacking = [f"the environment variable {KEY}", *lacking]
    if lacking:
        raise AlloError(
            f"{judge} cannot judge here: it needs {' and '.join(lacking)}; the outputs are written "
            f"to {folder}: provide that and run again, or have those files judged elsewhere"
        )


def _run(command: list[str], name: str, folder: Path) -> None:
    """Run a program in `folder`; what it prints goes to judge.log, the key blotted out."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise AlloError(f"{name} cannot be run ({error}); install it again") from error
    printed = done.stdout.replace(os.environ[KEY].strip(), "***")
    log = files.write_text(folder / "judge.log", printed)
    if done.returncode:
        last = repr(printed.strip().rpartition("\n")[2])[:200]
        raise AlloError(
            f"{name} ended with status {done.returncode} ({last}); all it printed is in {log}: "
            "mend what it says and run again"
        )


def _yaml(path: Path) -> dict:
    try:
        value = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        raise AlloError(f"{path}: not YAML ({files.short(str(error))}); clone it again") from error
    if not isinstance(value, dict):
        raise AlloError(f"{path}: {files.short(value)}; expected settings: clone it again")
    return value
