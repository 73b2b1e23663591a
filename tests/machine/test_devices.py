"""Several processes give and write what one does, whether each holds the model or a part of it."""

import contextlib
import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from tiny_models import micro
from torch import multiprocessing

from allo_lib import align
from allo_lib.data import miniature
from allo_lib.engine import trainer
from allo_lib.engine.forward import response_logps
from allo_lib.engine.trainer import Checkpoints
from allo_lib.errors import Diverged
from allo_lib.machine import devices, runtime, weights
from allo_lib.method.neurons import NeuronMask, count_ties, select_neurons

SETTINGS = {
    "share": 0.2, "batch_size": 5, "importance_rate": 1e-3, "forgetting_rate": 3e-3,
    "learning_rate": 3e-3, "rewriter_rate": 1e-3, "max_grad_norm": 0.5,
    "token_threshold": 0.015,  # two in three of the tokens lie below
}  # fmt: skip


def tied_model():
    """Its tensors of 17 rows and of 2 have parts of other lengths in 2 processes and in 3."""
    return micro(miniature.tokenizer(), feed_forward=17)


def some_pairs():
    """11 pairs of unequal lengths: of batches of 5 the last has 1, so that others have none.

    And one that is too long, which is told.
    """
    pairs = [
        {
            "prompt": p.prompt,
            "chosen": "therefore" + i % 2 * " so" + " 1",
            "rejected": i % 3 * "so " + f"so {2 + i % 5}",
        }
        for i, p in enumerate(miniature.problems("chain", "pairs", 11, 0))
    ]
    return [*pairs, pairs[0] | {"rejected": 200 * "so "}]


def aligned(folder: Path, **settings):
    config = SETTINGS | settings
    return align(
        tied_model(), miniature.tokenizer(), some_pairs(), config=config, output_dir=folder
    )


def launched(work, processes: int, config: str, *arguments) -> None:
    """work(*arguments) in as many processes, as accelerate starts them with a file of `configs`.

    On CPUs: accelerate itself would start those through MPI. All have ended afterwards.
    """
    command = ["--config_file", str(ROOT / "configs" / f"{config}.yaml"), "-m", "allo_lib"]
    options, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(command)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = prepare_multi_gpu_env(options) | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload(["allo_lib.alignment"])
    call = environment, work, arguments
    multiprocessing.start_processes(_process, call, processes, start_method="forkserver")


def _process(rank: int, environment: dict[str, str], work, arguments) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    runtime.leave_with_parent()
    work(*arguments)
    torch.distributed.destroy_process_group()


def _align(folder: Path, estimator: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        aligned(folder / "aligned", estimator=estimator)
    (folder / f"printed-{devices.rank()}").write_text(printed.getvalue().partition("\n")[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of estimators, to which one process has written, on one thread as each of several."""
    folder = tmp_path_factory.mktemp("alone")
    for estimator in ("delta", "gradient"):
        (folder / estimator).mkdir()
        with runtime.torch_threads(1):
            _align(folder / estimator, estimator)
    return folder


@pytest.mark.parametrize(("estimator", "processes", "config"), [
    ("delta", 2, "ddp"),
    ("gradient", 3, "ddp"),
    ("gradient", 2, "fsdp2"),
    ("delta", 3, "fsdp2"),
])  # fmt: skip
def test_processes_write_what_one_writes(estimator, processes, config, alone, tmp_path):
    launched(_align, processes, config, tmp_path, estimator)
    one, several = alone / estimator / "aligned", tmp_path / "aligned"
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in several.iterdir()} == names
    rounded = {".references", "align.json", "model.safetensors", "allo_delta.safetensors"}
    for name in names - rounded:
        assert (several / name).read_bytes() == (one / name).read_bytes(), name
    records = [json.loads((path / "align.json").read_text()) for path in (one, several)]
    assert records[0]["share"] == records[1]["share"] == pytest.approx(0.2, abs=0.01)
    losses = [record["loss"] for record in records]
    for stage, values in losses[0].items():
        assert losses[1][stage] == pytest.approx(values, rel=1e-6), stage
    expected, found = (weights.read_tensors(path / "model.safetensors") for path in (one, several))
    mask, start = NeuronMask.load(several / "mask.safetensors"), weights.snapshot(tied_model())
    for name, values in expected.items():
        kept = mask.dense(name)
        assert torch.allclose(found[name], values, rtol=0, atol=1e-6), name
        assert torch.equal(found[name][~kept], start[name][~kept]), name
        assert not kept.any() or (found[name] != start[name]).any(), name
    # Log-probs under the first weights, and what is printed, are those of one process to the bit.
    stored = [path.glob(".references/reference/*/logps.safetensors") for path in (one, several)]
    stored = [{path.read_bytes() for path in paths} for paths in stored]
    assert len(stored[0]) == len(stored[1]) == 2 and stored[0] & stored[1]
    printed = [(tmp_path / f"printed-{rank}").read_text() for rank in range(processes)]
    assert printed == [(one.parent / "printed-0").read_text(), *[""] * (processes - 1)]


TIED = {
    "a": torch.tensor([[3.0, 1, 1], [2, 1, 0], [1, 1, 5], [0, 1, 2], [1, 3, 1]]),
    "b": torch.tensor([1.0, 1, 0, 2, 1, 1, 1]),
    "c": torch.tensor([[1.0, 2, 1, 4]]),
}
CHOICES = [
    (order, scope, share)
    for order in ("top", "bottom")
    for scope in ("global", "tensor")
    for share in (0.04, 0.1, 0.3, 0.5, 0.77, 1.0)
]


def _select_all(folder: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    devices.start(torch.nn.Linear(1, 1))
    mesh = init_device_mesh("cpu", (devices.count(),))
    scores = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in TIED.items()}
    ties = {}
    for order, scope, share in CHOICES:
        mask = select_neurons(scores, share, order=order, scope=scope)
        if order == "top":
            ties[f"{order}-{scope}-{share}"] = count_ties(scores, mask)
        whole = mask.joined()
        if whole is not None:
            whole.save(folder / f"{order}-{scope}-{share}")
    if devices.rank() == 0:
        (folder / "ties.json").write_text(json.dumps(ties))


@pytest.mark.parametrize("processes", [2, 3])
def test_the_largest_of_sharded_scores_are_those_of_all_with_ties_in_order(processes, tmp_path):
    launched(_select_all, processes, "ddp", tmp_path)
    ties = json.loads((tmp_path / "ties.json").read_text())
    for order, scope, share in CHOICES:
        name, mask = (
            f"{order}-{scope}-{share}",
            select_neurons(TIED, share, order=order, scope=scope),
        )
        several = NeuronMask.load(tmp_path / name)
        assert all(map(torch.equal, several.indices.values(), mask.indices.values())), name
        assert order == "bottom" or ties[name] == count_ties(TIED, mask), name


def _stop_and_go_on(folder: Path) -> None:
    settings = {"estimator": "gradient", "checkpoint_minutes": 1e-9}
    aligned(folder / "whole", **settings)
    written, write = [], Checkpoints.write

    def stop(self, step, fill):
        write(self, step, fill)
        written.append(step)
        if len(written) == 5:  # of nine: in the second of three stages
            raise KeyboardInterrupt

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "write", stop)
        aligned(folder / "again", **settings)
    with contextlib.redirect_stdout(printed):
        aligned(folder / "again", **settings)
    assert ("forgetting: goes on from its checkpoint at step 2" in printed.getvalue()) == (
        devices.rank() == 0
    )


def test_stopped_processes_go_on_and_end_with_the_same_bytes(tmp_path):
    launched(_stop_and_go_on, 2, "fsdp2", tmp_path)
    whole, again = (tmp_path / name / "model.safetensors" for name in ("whole", "again"))
    assert whole.read_bytes() == again.read_bytes()
    assert not (tmp_path / "again" / ".checkpoints").exists()


def _diverge_in_one(folder: Path) -> None:
    def not_finite_in_one(model, batch):
        return response_logps(model, batch) * (float("nan") if devices.rank() == 1 else 1.0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged, match="rewriter|sft"):
        patch.setattr(trainer, "response_logps", not_finite_in_one)
        aligned(folder, estimator="gradient")


def test_a_number_that_is_not_finite_in_one_process_ends_all(tmp_path):
    launched(_diverge_in_one, 2, "ddp", tmp_path)
