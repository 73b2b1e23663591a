"""Checkpoints of a training under way, by time: each whole or absent, without pickle.

A run that was killed goes on from the last one and ends with the same bytes as a run that was not:
weights, float32 masters, moments, schedule, random generators and the log so far are all in it.
"""

import contextlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from allo_lib.engine.store import MANIFEST, seal, sha256, write_json
from allo_lib.machine import devices, weights
from allo_lib.method.masked_adamw import MaskedAdamW

_STEP = "step-"  # what the folders are called
_OPTIMIZER, _TRAINER = "optimizer.safetensors", "trainer.json"


class Checkpoints:
    """A folder that holds the latest checkpoint of one training.

    minutes: of training between two of them; 0 or less writes none. A training that took longer
    also leaves its end, so that what follows it can be tried again. Several processes keep one
    each, of what each of them holds, and go on from it only together.
    """

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.minutes = Path(folder), minutes
        if devices.count() > 1:
            self.folder /= f"{devices.rank()}-of-{devices.count()}"
        self._began = self._last = time.monotonic()

    def due(self, at_end: bool = False) -> bool:
        """Whether it is time for one; at the end of a training, whether that is worth one."""
        since = self._began if at_end else self._last
        return devices.told(0 < self.minutes * 60 <= time.monotonic() - since)

    def latest(self) -> Path | None:
        """The last checkpoint that is whole, or None; a damaged one is named and removed."""
        found = self._own()
        steps = devices.each(torch.tensor(-1 if found is None else int(found.name[len(_STEP) :])))
        return found if (steps == steps[0]).all() else None

    def _own(self) -> Path | None:
        found = sorted(self.folder.glob(f"{_STEP}*"), key=lambda path: path.name)
        for path in reversed(found):
            if _is_whole(path):
                return path
            print(f"checkpoint {path.name} is damaged; removed", file=sys.stderr)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Keep what `fill` writes into an empty folder as the checkpoint of `step`, and no other.

        A disk that cannot take it costs the checkpoint, not the training: the reason is printed.
        """
        temporary = self.folder / f".{uuid.uuid4().hex[:8]}"
        target = self.folder / f"{_STEP}{step:09d}"
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            seal(temporary, {"step": step})
            with contextlib.suppress(OSError):  # another process was quicker
                temporary.rename(target)
        except (OSError, SafetensorError) as error:
            print(f"no checkpoint at step {step} ({error}); training goes on", file=sys.stderr)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in self.folder.glob(f"{_STEP}*"):
            if path.name < target.name and target.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        self._last = time.monotonic()


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(sha256(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_state(folder: Path, optimizer: MaskedAdamW, scheduler: Any, log: dict[str, Any]) -> None:
    """Optimizer, schedule, torch's random generators and the log, as safetensors and JSON."""
    state = optimizer.state_dict()
    tensors = {f"master.{i}": value for i, value in enumerate(state["masters"])}
    for number, moments in state["state"].items():
        tensors |= {f"state.{number}.{key}": value for key, value in moments.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states = enumerate(torch.cuda.get_rng_state_all())
        tensors |= {f"random.cuda.{number}": value for number, value in states}
    weights.save_tensors(tensors, folder / _OPTIMIZER)
    record = {"groups": state["param_groups"], "mask": state["mask"], "log": log}
    write_json(folder / _TRAINER, record | {"schedule": scheduler.state_dict()})


def read_state(folder: Path, optimizer: MaskedAdamW, scheduler: Any) -> dict[str, Any]:
    """Put optimizer and schedule back as `write_state` found them; returns the log.

    Raises:
        AlloError: the state is of another mask.
    """
    tensors = weights.read_tensors(folder / _OPTIMIZER)
    record = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("state."):
            number, key = name.split(".")[1:]
            state.setdefault(int(number), {})[key] = value
    masters = [tensors[f"master.{i}"] for i in range(len(record["groups"][0]["params"]))]
    groups = [group | {"betas": tuple(group["betas"])} for group in record["groups"]]
    optimizer.load_state_dict(
        {"state": state, "param_groups": groups, "masters": masters, "mask": record["mask"]}
    )
    scheduler.load_state_dict(record["schedule"])
    return record["log"]


def read_random_state(folder: Path) -> None:
    """Put torch's random generators back as `write_state` left them."""
    tensors = weights.read_tensors(folder / _OPTIMIZER)
    torch.set_rng_state(tensors["random.cpu"])
    for name, value in tensors.items():
        number = name.removeprefix("random.cuda.")
        if number != name and int(number) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(number))
