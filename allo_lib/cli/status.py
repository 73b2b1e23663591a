"""`run_all.sh status`: what is done, what is missing, what each stage cost."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from allo_lib.cli.driver import (
    Run,
    begun_seeds,
    group,
    is_done,
    notebooks,
    of_a_seed,
    read_stamp,
    steps,
)
from allo_lib.machine.environment import ROOT, child_environment
from allo_lib.profiles.profile_files import KEY
from allo_lib.study import manifest

MISSING, STALE = "missing", "to redo"


def describe(run: Run) -> str:
    """The state of a results folder as text: notebooks by seeds, then the store's artifacts."""
    told = manifest.read(run.results)
    lines = [f"{run.profile.name}, profile hash {run.profile.hash()[:12]}, {run.results}"]
    if told is None:
        lines.append("no manifest: no run has ended here yet")
    elif told["profile_hash"] != run.profile.hash():
        lines.append(f"its manifest is of another profile hash, {told['profile_hash'][:12]}")
    seeds = sorted({*run.seeds, *begun_seeds(run), *(told or {}).get("seeds", [])})
    rows = [["notebook", *(group(run, seed) for seed in seeds)]]
    for notebook in notebooks(run):
        columns = seeds if of_a_seed(notebook) else [None]
        rows.append([notebook.stem, *(_cell(run, notebook, seed, told) for seed in columns)])
    if pieces := _pieces(run, told, seeds):
        lines += ["", "run in pieces (--domains shows one):", *pieces]
    lines += ["", *_aligned(rows), "", "(s: done here, in seconds; recorded: in the manifest only)"]
    artifacts = _artifacts(run.results / manifest.STORE)
    if artifacts:
        lines += ["", *_aligned([["artifact", "kind", "seconds", "MB"], *artifacts])]
    return "\n".join(lines)


def missing(run: Run) -> str:
    """What is not done of all that the run asks for: notebooks, and methods without a result."""
    left: dict[str, list[str]] = {}
    for notebook, seed in steps(run):
        if not is_done(run, notebook, seed):
            left.setdefault(group(run, seed), []).append(notebook.stem)
    lines = [f"{name}: notebooks {', '.join(stems)}" for name, stems in left.items()]
    # Keys are computed with torch there, which a command does without.
    overrides = run.overrides | ({KEY: list(run.domains)} if run.domains else {})
    data = None if run.data is None else str(run.data)
    given = [run.given, overrides, list(run.seeds), str(run.results), data]
    asked = subprocess.run(
        [sys.executable, "-P", "-c", "from allo_lib.study import runs; runs.print_missing()",
         json.dumps(given)],
        env=child_environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if asked.returncode:
        reason = (asked.stderr.splitlines() or ["no reason given"])[-1]
        return "\n".join([*lines, f"methods: cannot be told ({reason})"])
    return "\n".join([*lines, asked.stdout.rstrip()])


def _pieces(run: Run, told: dict | None, seeds: list[int]) -> list[str]:
    """Groups of other domains that the manifest knows, with their notebooks and seconds."""
    shown = {group(run, seed) for seed in (*seeds, None)}
    runs = {name: one for name, one in (told or {}).get("runs", {}).items() if name not in shown}
    costs = {name: one.get("seconds", {}) for name, one in runs.items()}
    return [f"  {name}: {len(s)} notebooks, {sum(s.values()):.1f} s" for name, s in costs.items()]


def _cell(run: Run, notebook: Path, seed: int | None, told: dict | None) -> str:
    mark = read_stamp(run, notebook, seed)
    if mark is not None:
        return f"{mark['seconds']:.1f} s" if is_done(run, notebook, seed) else STALE
    recorded = (told or {}).get("runs", {}).get(group(run, seed), {}).get("seconds", {})
    seconds = recorded.get(notebook.stem)
    return MISSING if seconds is None else f"{seconds:.1f} s recorded"


def _artifacts(store: Path) -> list[list[str]]:
    rows = []
    for path in sorted(store.rglob(manifest.NAME)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text(encoding="utf-8"))
            name = path.parent.relative_to(store).as_posix()
            size = f"{told['bytes'] / 1e6:.1f}"
            rows.append([name, str(told["kind"]), f"{told['seconds']:.1f}", size])
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
