"""The one training loop of all losses on given rows, and the checkpoints it goes on from.

A run that was killed ends with the same bytes as a run that was not: weights, float32 masters,
moments, schedule, random generators and the log so far are all in a checkpoint, without pickle.
"""

import json
import math
import multiprocessing
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from allo_lib.engine.batching import Row
from allo_lib.engine.forward import response_logps, to_device
from allo_lib.engine.store import read_manifest, seal, write_json
from allo_lib.errors import AlloError, Diverged
from allo_lib.machine import devices, weights
from allo_lib.method import values_unread
from allo_lib.method.losses import Batch, Objective, terms_of
from allo_lib.method.masked_adamw import MaskedAdamW

_LONG = 15.0  # seconds after which a training shows its progress
# What must be finite, and how a divergence names it.
_FINITE = {"log-probs": "log-probs", "loss": "loss", "grad_norm": "gradient norm"}
_STEP = "step-"  # what the folders of checkpoints are called
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_TRAINER = "trainer.json"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the cosine schedule of the official code."""

    learning_rate: float
    epochs: int
    batch_size: int  # rows (pairs) per optimizer step
    seed: int  # of the order of the rows
    warmup: float = 0.1  # share of all steps with a linearly rising rate, 0 to 1
    accumulation: int = 1  # forward passes per step; batch_size is their sum
    max_steps: int | None = None  # optimizer steps at most

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise AlloError(f"warmup is {self.warmup}, expected a share of the steps, 0 to 1")

    def steps(self, rows: int) -> int:
        """Optimizer steps of a training on so many rows."""
        steps = self.epochs * math.ceil(rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rates(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """The scheduler of so many steps: up to the optimizer's rate, then down as a cosine.

        That of transformers, whose import takes longer than that of all the rest.
        """
        # The first step of a rate that rises has rate 0.
        warmup = math.ceil(steps * self.warmup) if steps > 1 else 0

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            done = (step - warmup) / max(1, steps - warmup)
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

        return LambdaLR(optimizer, factor)

    def batches(self, rows: list[Row]) -> Iterator[list[list[Row]]]:
        """The rows of every step, a list for each forward pass; every epoch in another order."""
        size = self.batch_size // self.accumulation
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(rows), generator=generator).tolist()
            passes = [
                [rows[i] for i in order[start : start + size]]
                for start in range(0, len(order), size)
            ]
            for start in range(0, len(passes), self.accumulation):
                yield passes[start : start + self.accumulation]


@dataclass
class Log:
    """One entry per optimizer step (or forward pass, under accumulation), in order.

    metrics: those of the objective (`reward_margin`, `reward_accuracy`), and per optimizer step
    `grad_norm`, over the kept entries before clipping.
    """

    loss: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    model: Any,
    rows: list[Row],
    collator: Callable[[list[Row]], Batch],
    objective: Objective,
    optimizer: MaskedAdamW,
    schedule: Schedule,
    label: str = "training",
    checkpoints: "Checkpoints | None" = None,
    terms: Callable[[Batch], Tensor] | None = None,
) -> Log:
    """Train `model` in place on `rows`; returns the log.

    Args:
        collator: rows -> batch (`batching`) with what the objective needs. Of several processes
            (`devices.split`) it takes this one's share.
        objective: (logps [B, T], batch) -> (scalar loss, metrics), see `losses.objective`.
        label: for progress lines and errors.
        checkpoints: where the training goes on from if it was interrupted, and what it leaves
            there in case it is; None for neither.
        terms: batch -> how many terms its loss is the mean of (`losses.terms_of`); under
            accumulation the gradient is then that of one batch of all. None: one a sequence.

    Raises:
        AlloError: no rows, or a batch size that is no multiple of the accumulation.
        Diverged: log-probs, loss or gradient are NaN or infinite. The weights are those before that
            step.
    """
    if not rows:
        raise AlloError(f"{label}: no rows to train on; give at least one")
    if schedule.batch_size % schedule.accumulation:
        raise AlloError(
            f"batch_size {schedule.batch_size} is no multiple of accumulation "
            f"{schedule.accumulation}; choose one that is"
        )
    started, steps, terms = time.perf_counter(), schedule.steps(len(rows)), terms or terms_of("dpo")
    torch.manual_seed(schedule.seed)  # of dropout, where a model has some
    scheduler = schedule.rates(optimizer, steps)
    begun, log = None if checkpoints is None else checkpoints.latest(), Log()
    if begun is not None:
        log = _load(begun, model, optimizer, scheduler)
    done, seconds_before = scheduler.last_epoch, log.seconds
    if done:
        print(f"{label}: goes on from its checkpoint at step {done}", flush=True)
    model.zero_grad()
    model.train()
    with Numbers(optimizer, log, label) as numbers, _bar(label, done, steps) as bar:
        for step, passes in enumerate(islice(schedule.batches(rows), done, steps), start=done):
            batches = [to_device(collator(part), model) for part in passes]
            if len(batches) > 1:
                count = torch.stack([terms(batch) for batch in batches]).sum().clamp(min=1)
            for batch in batches:
                logps = response_logps(model, batch)
                with values_unread():
                    loss, metrics = objective(logps, batch)
                numbers.forward(logps, loss, metrics)
                if len(batches) > 1:  # of unequal passes each counts by its terms
                    loss = loss * (terms(batch) / count)
                loss.backward()
            optimizer.step()
            scheduler.step()
            numbers.step(step)
            bar.set_postfix_str(f"loss {log.loss[-1]:.4f}", refresh=False)
            bar.update()
            log.seconds = round(seconds_before + time.perf_counter() - started, 3)
            if checkpoints is not None and checkpoints.due(at_end=step + 1 == steps):
                checkpoints.write(step + 1, lambda at: _save(at, model, optimizer, scheduler, log))
    return log


def _bar(label: str, done: int, steps: int) -> tqdm:
    """A bar for trainings that take long; workers, whose output would mix, show none."""
    return tqdm(
        desc=label, initial=done, total=steps, unit="step", file=sys.stdout, leave=False,
        position=0, delay=_LONG, mininterval=2.0 if sys.stdout.isatty() else _LONG,
        disable=multiprocessing.parent_process() is not None,
    )  # fmt: skip


class Numbers:
    """The numbers of a training on their way from its device to its log; entered like a file.

    They are looked at once a step, together, as a look makes the host wait for a GPU. Until then
    the optimizer sees by itself, where they are, that one is not finite, and changes nothing from
    then on (`MaskedAdamW.guard`): the weights are those before it.
    """

    def __init__(self, optimizer: MaskedAdamW, log: Log, label: str):
        self.optimizer, self.log, self.label = optimizer, log, label
        self._of_step: list[dict[str, Tensor]] = []  # of its forward passes

    def __enter__(self) -> "Numbers":
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.refused = None
        vars(self.optimizer).pop("found_inf", None)

    def forward(self, logps: Tensor, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Take what a forward pass gave."""
        numbers = {"log-probs": logps.detach().sum(), "loss": loss.detach()}
        numbers = devices.means(numbers | metrics)
        for key in ("log-probs", "loss"):
            self.optimizer.guard(numbers[key])
        self._of_step.append(numbers)

    def step(self, step: int) -> None:
        """Log the optimizer's step `step` and its passes; Diverged for a number not finite."""
        if self.optimizer.grad_norm is not None:
            self._of_step.append({"grad_norm": self.optimizer.grad_norm})
        named = [(key, value) for numbers in self._of_step for key, value in numbers.items()]
        self._of_step = []
        values = torch.stack([value.double() for _, value in named]).tolist()
        for (key, _), value in zip(named, values, strict=True):
            if key in _FINITE and not math.isfinite(value):
                raise Diverged(
                    f"{self.label}: the {_FINITE[key]} became {value} at step {step}; lower the "
                    "learning rate"
                )
            if key == "loss":
                self.log.loss.append(value)
            elif key != "log-probs":
                self.log.metrics.setdefault(key, []).append(value)


# --- checkpoints ---------------------------------------------------------------------------------


class Checkpoints:
    """A folder that holds the latest checkpoint of one training, whole or absent.

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
        return devices.of_first(0 < self.minutes * 60 <= time.monotonic() - since)

    def latest(self) -> Path | None:
        """The last checkpoint that is whole, or None; a damaged one is named and removed, and so
        are those that processes have of different steps."""
        paths = sorted(self.folder.glob(f"{_STEP}*"))
        while paths and not _is_whole(paths[-1]):
            print(f"checkpoint {paths[-1].name} is damaged; removed", file=sys.stderr)
            shutil.rmtree(paths.pop(), ignore_errors=True)
        own = int(paths[-1].name.removeprefix(_STEP)) if paths else -1
        if bool((devices.each(torch.tensor(own)) == own).all()):
            return paths[-1] if paths else None
        for path in paths:  # a later one of the same name would not take its place
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
            if not target.exists():  # as it does where another process was quicker
                temporary.rename(target)
            for path in self.folder.glob(f"{_STEP}*"):
                if path.name < target.name:
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            print(f"no checkpoint at step {step} ({error}); training goes on", file=sys.stderr)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._last = time.monotonic()


def _is_whole(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and all((path / name).exists() for name in manifest["files"])


def _save(folder: Path, model: Any, optimizer: MaskedAdamW, scheduler: Any, log: Log) -> None:
    """Write all that a training goes on from, as safetensors and JSON."""
    state = optimizer.state_dict()
    tensors = {f"master.{i}": value for i, value in enumerate(state["masters"])}
    for number, moments in state["state"].items():
        tensors |= {f"state.{number}.{key}": value for key, value in moments.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    weights.save(model, folder / _MODEL)
    weights.save_tensors(tensors, folder / _OPTIMIZER)
    record = {"groups": state["param_groups"], "mask": state["mask"], "log": asdict(log)}
    write_json(folder / _TRAINER, record | {"schedule": scheduler.state_dict()})


def _load(folder: Path, model: Any, optimizer: MaskedAdamW, scheduler: Any) -> Log:
    """Put everything back as `_save` found it; returns the log. AlloError for another mask."""
    weights.restore(model, weights.read_tensors(folder / _MODEL))
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
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    log = record["log"]
    return Log(log["loss"], log["metrics"], log["seconds"])
