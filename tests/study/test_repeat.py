"""What comes out again to the byte, what within a tolerance, and what is said of GPUs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_study import open_study

from allo_lib.allo import run_stage
from allo_lib.engine import models, reference
from allo_lib.engine.forward import pair_logps
from allo_lib.engine.trainer import Schedule
from allo_lib.machine import runtime, weights
from allo_lib.machine.environment import child_environment
from allo_lib.machine.runtime import torch_threads
from allo_lib.method.neurons import NeuronMask, delta_scores, select_neurons
from allo_lib.study import manifest
from allo_lib.study.study import Study

# Wide enough, and of enough tokens (some 2,500), for torch to split the work among threads.
WORDS, WIDTH, PAIRS = 512, 128, 24
RATE = 1e-3


def new_model():
    return models.micro_llama(
        WORDS, width=WIDTH, layers=2, heads=4, feed_forward=2 * WIDTH, context=128,
        initializer_range=0.05, seed=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def new_pairs() -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(2, WORDS, (length,), generator=generator).tolist()

    return [
        {"prompt": draw(30), "chosen": draw(40 + i % 5), "rejected": draw(40 - i % 7)}
        for i in range(PAIRS)
    ]


def train(model, rows, mask=None) -> None:
    run_stage(model, rows, "dpo", Schedule(RATE, 1, 4, 0), pad_token_id=0, mask=mask)


def run_through(folder, threads: int):
    """Reference, warm-up, mask and a masked stage, their files written into `folder`."""
    folder.mkdir()
    with torch_threads(threads):
        model, rows = new_model(), new_pairs()
        before = weights.snapshot(model)
        reference.write(pair_logps(model, rows, 0, 16), folder / "reference.safetensors")
        rows = reference.attach(rows, folder / "reference.safetensors")
        train(model, rows)
        mask = select_neurons(delta_scores(before, weights.snapshot(model), RATE), 0.1)
        mask.save(folder / "mask.safetensors")
        weights.restore(model, before)
        train(model, rows, mask)
        weights.save(model, folder / "model.safetensors")
    return folder


# A process that computes as an older processor would; other kinds of processors pass over these.
OTHER_MACHINE = {
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"
}  # fmt: skip
IN_A_CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_repeat
test_repeat.run_through(Path(sys.argv[3]), 1)
"""
OTHERS = ("3 threads", "another machine")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Folders of the same stages, by what was different."""
    base = tmp_path_factory.mktemp("repeat")
    for name in ("1 thread", "3 threads", "3 threads again"):
        run_through(base / name, int(name[0]))
    here = Path(__file__).parent
    command = [sys.executable, "-c", IN_A_CHILD, here, here.parent, base / "another machine"]
    subprocess.run(command, env=child_environment() | OTHER_MACHINE, check=True)
    return base


def tensors(folder, name: str) -> torch.Tensor:
    found = weights.read_tensors(folder / f"{name}.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found)])


@pytest.mark.parametrize("name", ["reference", "mask", "model"])
def test_the_same_seed_and_threads_give_the_same_bytes(ends, name):
    first, again = (ends / f"3 threads{more}" / f"{name}.safetensors" for more in ("", " again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("other", OTHERS)
def test_elsewhere_numbers_agree_within_rounding(ends, other):
    here, there = (tensors(ends / name, "reference") for name in ("1 thread", other))
    assert len(here) > 1500 and (here - there).abs().max() <= 1e-5
    here, there = (tensors(ends / name, "model") for name in ("1 thread", other))
    assert (here - there).abs().max() <= 0.01 * RATE
    begin = weights.snapshot(new_model())
    begin = torch.cat([begin[key].flatten() for key in sorted(begin)])
    assert (here - begin).abs().max() > RATE  # so far did they go
    here, there = (NeuronMask.load(ends / n / "mask.safetensors") for n in ("1 thread", other))
    assert here.kept == there.kept and here.overlap(there) >= 0.999


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stated"), [("cpu", runtime.ON_CPU), ("gpu", runtime.ON_GPU)])
def test_a_study_on_a_gpu_takes_deterministic_algorithms(tmp_path, monkeypatch, size, stated):
    modes = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda *mode, **_: modes.extend(mode)
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    profile = dataclasses.replace(open_study(tmp_path).profile, size=size)
    assert Study(profile, 0, tmp_path).device == {"cpu": "cpu", "gpu": "cuda"}[size]
    gpu = size == "gpu"
    assert modes == [True] * gpu and torch.backends.cudnn.benchmark != gpu
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if gpu else None)
    # And the manifest states what does not repeat.
    built = manifest.build(tmp_path, profile, {}, {}, {"device": "x"}, {"commit": None})
    assert built["deterministic"] == stated and bool(stated["not deterministic"]) == gpu
