"""Readers under coverage-guided fuzzing: refused in one line or read, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from real_like import write_data

from allo_lib import published, reference, weights
from allo_lib.importance import select_neurons

pytest.importorskip("atheris", reason="atheris has no wheel for this machine")

RUNS = int(os.environ.get("ALLO_FUZZ_RUNS", "2000"))  # inputs a reader
RESULTS = ROOT / "results" / "tiny"
SCRIPT = Path(__file__).with_name("fuzz_readers.py")

pytestmark = pytest.mark.slow


def _mask(path: Path) -> None:
    select_neurons({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, 0.5).save(path)


def _rows(path: Path) -> None:
    write_data(path.parent / "data")
    path.write_bytes(next((path.parent / "data").glob("*/train.jsonl")).read_bytes()[:2000])


def _copied(source: Path):
    return lambda path: path.write_bytes(source.read_bytes()[:4000])


# A sound file of each kind, from which the fuzzer starts.
SOUND = {
    "mask": _mask,
    "tensors": lambda path: weights.save_tensors({"a": torch.ones(3)}, path),
    "reference": lambda path: reference.write([{"chosen": [-1.0], "rejected": [-2.0]}], path),
    "measurements": _copied(RESULTS / "measurements.csv"),
    "claims": _copied(RESULTS / "claims.csv"),
    "efficiency": _copied(RESULTS / "tables" / "efficiency.csv"),
    "manifest": _copied(RESULTS / "manifest.json"),
    "published": _copied(published.PAPER_DIR / "empirical_study.csv"),
    "profile": _copied(ROOT / "allo_lib" / "profiles" / "tiny.yaml"),
    "rows": _rows,
}


@pytest.mark.parametrize("reader", SOUND)
def test_a_reader_reads_or_refuses_in_one_line(reader, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    SOUND[reader](corpus / "sound")
    run = subprocess.run(
        [sys.executable, SCRIPT, reader, corpus, str(RUNS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Done {RUNS} runs" in run.stderr
