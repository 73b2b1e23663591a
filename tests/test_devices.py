"""Several processes find and write what one does, whether each holds the model or a part of it."""

import contextlib
import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from allo_lib import align, devices, miniature, models, weights
from allo_lib.importance import NeuronMask, count_ties, select_neurons

SETTINGS = {
    "share": 0.2,
    "batch_size": 5,
    "importance_rate": 1e-3,
    "forgetting_rate": 3e-3,
    "learning_rate": 3e-3,
    "rewriter_rate": 1e-3,
    "max_grad_norm": 0.5,
}
LAUNCHES = [(2, False), (2, True), (3, False), (3, True)]


def tied_model(tokenizer):
    """Its tensors of 17 rows and of 2 have parts of other lengths in 2 processes and in 3."""
    return models.micro_llama(
        len(tokenizer),
        width=16,
        layers=2,
        heads=2,
        feed_forward=17,
        context=128,
        initializer_range=0.05,
        seed=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def some_pairs():
    """11 pairs of unequal lengths: of batches of 5 the last has 1, so that others have none."""
    return [
        {
            "prompt": p.prompt,
            "chosen": "therefore" + i % 2 * " so" + " 1",
            "rejected": i % 3 * "so " + f"so {2 + i % 5}",
        }
        for i, p in enumerate(miniature.problems("chain", "pairs", 11, 0))
    ]


def aligned(folder: Path, **settings):
    tokenizer = miniature.tokenizer()
    model = tied_model(tokenizer)
    return align(model, tokenizer, some_pairs(), config=SETTINGS | settings, output_dir=folder)


def launched(work, processes: int, sharded: bool, *arguments) -> None:
    """work(*arguments) in as many processes as a launcher would start, all ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    multiprocessing.get_context("forkserver").set_forkserver_preload(["test_devices"])
    call = processes, sharded, port, work, arguments
    multiprocessing.start_processes(_process, call, processes, start_method="forkserver")


def _process(rank: int, processes: int, sharded: bool, port: str, work, arguments) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.set_num_threads(1)
    work(*arguments)
    torch.distributed.destroy_process_group()


def _align_all(folder: Path) -> None:
    for estimator in ("delta", "gradient"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            aligned(folder / estimator, estimator=estimator)
        (folder / f"{estimator}-printed-{devices.rank()}").write_text(printed.getvalue())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    _align_all(folder)
    return folder


def _files(folder: Path) -> dict[str, bytes]:
    """Names and bytes, but those of references to weights that differ by rounding."""
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize(("processes", "sharded"), LAUNCHES)
def test_processes_write_what_one_writes(processes, sharded, alone, tmp_path):
    launched(_align_all, processes, sharded, tmp_path)
    start = weights.snapshot(tied_model(miniature.tokenizer()))
    for estimator in ("delta", "gradient"):
        one, several = _files(alone / estimator), _files(tmp_path / estimator)
        assert several.keys() == one.keys()
        assert [name for name in one if several[name] != one[name]] in (
            ["align.json", "model.safetensors"], ["model.safetensors", "align.json"],
        )  # fmt: skip
        losses = [json.loads(files["align.json"])["loss"] for files in (one, several)]
        for stage, values in losses[0].items():
            assert losses[1][stage] == pytest.approx(values, abs=1e-6), stage
        folders = alone / estimator, tmp_path / estimator
        before, after = (weights.read_tensors(path / "model.safetensors") for path in folders)
        mask = NeuronMask.load(tmp_path / estimator / "mask.safetensors")
        for name, values in before.items():
            kept = mask.dense(name)
            assert torch.allclose(after[name], values, rtol=0, atol=1e-6), name
            assert torch.equal(after[name][~kept], start[name][~kept]), name
            assert not kept.any() or (after[name] != start[name]).any(), name
        # Log-probs under the first weights, and what is printed, come from one process's own bits.
        stored = [set(path.glob(".references/reference/*/logps.safetensors")) for path in folders]
        assert len(stored[0]) == len(stored[1]) == 2
        assert {path.read_bytes() for path in stored[0]} & {p.read_bytes() for p in stored[1]}
        printed = [(tmp_path / f"{estimator}-printed-{i}").read_text() for i in range(processes)]
        assert printed == [(alone / f"{estimator}-printed-0").read_text(), *[""] * (processes - 1)]


TIED = {
    "a": torch.tensor([[3.0, 1, 1], [2, 1, 0], [1, 1, 5], [0, 1, 2], [1, 3, 1]]),
    "b": torch.tensor([1.0, 1, 0, 2, 1, 1, 1]),
    "c": torch.tensor([[1.0, 2, 1, 4]]),
}


def _select_all(folder: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    devices.start(torch.nn.Linear(1, 1))
    mesh = init_device_mesh("cpu", (devices.count(),))
    scores = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in TIED.items()}
    found = {}
    for order, scope, share in CHOICES:
        mask = select_neurons(scores, share, order=order, scope=scope)
        if order == "top":
            found[f"{order}-{scope}-{share}"] = count_ties(scores, mask)
        whole = mask.joined()
        if whole is not None:
            whole.save(folder / f"{order}-{scope}-{share}")
    if devices.rank() == 0:
        (folder / "ties.json").write_text(json.dumps(found))


CHOICES = [
    (order, scope, share)
    for order in ("top", "bottom")
    for scope in ("global", "tensor")
    for share in (0.04, 0.1, 0.3, 0.5, 0.77, 1.0)
]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_largest_of_sharded_scores_are_those_of_all_with_ties_in_order(processes, tmp_path):
    launched(_select_all, processes, False, tmp_path)
    ties = json.loads((tmp_path / "ties.json").read_text())
    for order, scope, share in CHOICES:
        name, mask = (
            f"{order}-{scope}-{share}",
            select_neurons(TIED, share, order=order, scope=scope),
        )
        several = NeuronMask.load(tmp_path / name)
        assert all(map(torch.equal, several.indices.values(), mask.indices.values())), name
        assert order == "bottom" or ties[name] == count_ties(TIED, mask), name
