"""The one training loop: `transformers.Trainer` around an objective, an optimizer and rows."""

import math
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from allo_lib.engine.batching import Row
from allo_lib.engine.forward import response_logps
from allo_lib.engine.trainer import (
    Checkpoints,
    read_random_state,
    read_state,
    write_state,
)
from allo_lib.errors import AlloError, Diverged
from allo_lib.machine import devices, weights
from allo_lib.method import values_unread
from allo_lib.method.losses import Batch, Objective, terms_of
from allo_lib.method.masked_adamw import MaskedAdamW

_LONG = 15.0  # seconds after which a training shows its progress
# What must be finite, and how a divergence names it.
_FINITE = {"log-probs": "log-probs", "loss": "loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the cosine schedule of the official code."""

    learning_rate: float
    epochs: int
    batch_size: int  # rows (pairs) per optimizer step
    seed: int  # of the order of the rows
    warmup: float = 0.1  # share of all steps with a linearly rising rate
    accumulation: int = 1  # forward passes per step; batch_size is their sum
    max_steps: int | None = None  # optimizer steps at most

    def steps(self, rows: int) -> int:
        """Optimizer steps of a training on so many rows."""
        steps = self.epochs * math.ceil(rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass
class Log:
    """One entry per optimizer step (or forward pass, under accumulation), in order.

    metrics: what the objective tells (`reward_margin`, `reward_accuracy`), and per optimizer step
    `grad_norm`, over the kept entries before clipping, and `moved`, the share of kept entries whose
    value in the model's dtype the step changed.
    """

    loss: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0  # read by the model, without padding, prompts included; shared ones count once
    seconds: float = 0.0


def train(
    model: Any,
    rows: list[Row],
    collator: Callable[[list[Row]], Batch],
    objective: Objective,
    optimizer: MaskedAdamW,
    schedule: Schedule,
    label: str = "training",
    checkpoints: Checkpoints | None = None,
    terms: Callable[[Batch], Tensor] | None = None,
) -> Log:
    """Train `model` in place on `rows`; returns the log.

    Args:
        collator: rows -> batch (`batching`) with what the objective needs.
        objective: (logps, batch) -> (loss, metrics), see `losses.objective`.
        optimizer: it clips by itself if it should, Trainer's clipping is off.
        label: for progress lines and errors.
        checkpoints: where the training goes on from if it was interrupted, and what it leaves
            there in case it is; None for neither.
        terms: batch -> how many terms its loss is the mean of (`losses.terms_of`); under
            accumulation the gradient is then that of one batch of all. None: one a sequence.

    Raises:
        AlloError: no rows.
        Diverged: log-probs, loss or gradient are NaN or infinite; told with the step. The weights
            are those before that step, and its batch is kept beside the checkpoints.
    """
    if not rows:
        raise AlloError(f"{label}: no rows to train on; give at least one")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # Trainer wants one, nothing is saved there
        trainer = _Trainer(
            model=model,
            args=_arguments(folder, schedule, model.device, len(rows)),
            train_dataset=rows,
            data_collator=collator,
            optimizers=(optimizer, None),
        )
        log = Log()
        kept_in = None if checkpoints is None else checkpoints.folder
        numbers = Numbers(optimizer, log, label, model.config.pad_token_id, kept_in)
        trainer.objective, trainer.numbers, trainer.optimizer_ = objective, numbers, optimizer
        trainer.started, trainer.terms = started, terms or terms_of("dpo")
        if checkpoints is not None:
            trainer.checkpoints = checkpoints
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_AfterStep(numbers, checkpoints))
        begun = checkpoints.latest() if checkpoints is not None else None
        with numbers:
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
            numbers.read()
    log.seconds = round(log.seconds + time.perf_counter() - started, 3)
    return log


def _arguments(
    folder: str, schedule: Schedule, device: torch.device, rows: int
) -> TrainingArguments:
    if schedule.batch_size % schedule.accumulation:
        raise AlloError(
            f"batch_size {schedule.batch_size} is no multiple of accumulation "
            f"{schedule.accumulation}; choose one that is"
        )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=schedule.batch_size // schedule.accumulation,
        gradient_accumulation_steps=schedule.accumulation,
        num_train_epochs=schedule.epochs,
        max_steps=-1 if schedule.max_steps is None else schedule.steps(rows),
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup if schedule.warmup < 1 else int(schedule.warmup),
        max_grad_norm=0,
        seed=schedule.seed,
        use_cpu=device.type == "cpu",
        # Neither a look at the loss nor a copy of a batch makes the host wait for a GPU.
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": device.type != "cpu"},
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )
    # Where Trainer sees several GPUs it would wrap the model in replicas; a launcher shares them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Trainer(Trainer):
    """Trainer whose loss is an objective on the log-probs of response tokens."""

    objective: Objective
    numbers: "Numbers"
    checkpoints: Checkpoints
    optimizer_: MaskedAdamW  # as it was provided; Trainer wraps its own
    started: float  # time.perf_counter() when this process began the training
    terms: Callable[[Batch], Tensor]

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        # The loss is a mean over the batch, not a sum that Trainer should divide by tokens.
        self.model_accepts_loss_kwargs = False

    # Of several processes (`devices`): the model is where and as it should be, the optimizer sums
    # gradients, and the collator takes this process's share of every batch.

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = False

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if devices.count() == 1:
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if devices.count() > 1:
            shard = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if devices.count() == 1:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        self.create_scheduler(num_training_steps=max_steps)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one step; of several also how many terms their losses together have."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) > 1:
            count = torch.stack([self.terms(batch) for batch in batches]).sum().clamp(min=1)
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        logps = response_logps(model, inputs)
        with values_unread():
            loss, metrics = self.objective(logps, inputs)
        self.numbers.forward(self.state.global_step, inputs, logps, loss, metrics)
        passes = self.current_gradient_accumulation_steps
        if passes > 1:  # Trainer takes the mean of the passes, however unequal they are
            loss = loss * (self.terms(inputs) * passes / num_items_in_batch)
        return loss

    # Trainer saves and resumes by these; its own versions pickle.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.numbers.read()  # the log is part of it, and nothing that diverged may be
        log = asdict(self.numbers.log)
        log["seconds"] += time.perf_counter() - self.started

        def fill(folder: Path) -> None:
            weights.save(self.model, folder / "model.safetensors")
            self.state.save_to_json(str(folder / "trainer_state.json"))
            write_state(folder, self.optimizer_, self.lr_scheduler, log)

        self.checkpoints.write(self.state.global_step, fill)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint, "model.safetensors")
        weights.restore(self.model, weights.read_tensors(path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        before = read_state(Path(checkpoint), self.optimizer_, self.lr_scheduler)
        vars(self.numbers.log).update(before)
        step, label = self.state.global_step, self.numbers.label
        print(f"{label}: goes on from its checkpoint at step {step}", flush=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            read_random_state(Path(checkpoint))


class Numbers:
    """The numbers of a training on their way from its device to its log; entered like a file.

    On a GPU a look at one makes the host wait until all work given so far is done, several times a
    step. So they are copied together and looked at a step later, when they have long arrived. The
    optimizer sees by itself, where they are, that one is not finite, and changes nothing from then
    on (`MaskedAdamW.guard`): a divergence is told late, but the weights are those before it. On a
    CPU everything is looked at at once.
    """

    def __init__(
        self,
        optimizer: MaskedAdamW,
        log: Log,
        label: str,
        pad_token_id: int,
        kept_in: Path | None = None,
    ):
        """kept_in: the folder for the batch of a step that diverged; None keeps it nowhere."""
        self.optimizer, self.log, self.label = optimizer, log, label
        self.pad_token_id, self.kept_in = pad_token_id, kept_in
        self.late = optimizer.param_groups[0]["params"][0].is_cuda
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._batch: Batch = {}  # of the last forward pass that was looked at

    def __enter__(self) -> "Numbers":
        self.optimizer.watch = True
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.watch, self.optimizer.refused = False, None
        vars(self.optimizer).pop("found_inf", None)

    def forward(
        self, step: int, batch: Batch, logps: Tensor, loss: Tensor, metrics: dict[str, Tensor]
    ) -> None:
        """Take what a forward pass gave; `step` is the number of steps before this one."""
        total = logps.detach().sum()
        read = (batch["input_ids"] != self.pad_token_id).sum() * batch.get("counts", 1)
        told = {"log-probs": total, "loss": loss.detach(), "tokens": read} | metrics
        told = devices.pooled(told, sums=("log-probs", "tokens"))
        for key in ("log-probs", "loss"):
            self.optimizer.guard(told[key])
        self._send(step, told, batch)

    def step(self, step: int) -> None:
        """Take what the optimizer's step `step` gave, and look at the numbers before it."""
        told = {"grad_norm": self.optimizer.grad_norm, "moved": self.optimizer.moved}
        self._send(step, {key: value for key, value in told.items() if value is not None}, None)
        self.read(before=step)

    def read(self, before: float = math.inf) -> None:
        """Look at all numbers of steps before `before`; Diverged for one that is not finite."""
        while self._waiting and self._waiting[0][0] < before:
            step, names, values, arrived, batch = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            self._note(step, dict(zip(names, values.tolist(), strict=True)), batch)

    def _send(self, step: int, told: dict[str, Tensor], batch: Batch | None) -> None:
        if not told:
            return
        together = torch.stack([value.double() for value in told.values()])
        values, arrived = together.to("cpu", non_blocking=True), None
        if together.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((step, list(told), values, arrived, batch))
        if not self.late:
            self.read()

    def _note(self, step: int, told: dict[str, float], batch: Batch | None) -> None:
        self._batch = self._batch if batch is None else batch
        for key, what in _FINITE.items():
            if not math.isfinite(told.get(key, 0.0)):
                self._diverged(step, what, told[key])
        self.log.tokens += int(told.pop("tokens", 0))
        told.pop("log-probs", None)
        if "loss" in told:
            self.log.loss.append(told.pop("loss"))
        for key, value in told.items():
            self.log.metrics.setdefault(key, []).append(value)

    def _diverged(self, step: int, what: str, value: float) -> None:
        kept = self._keep(step)
        told = f"; the batch is in {kept}" if kept else ""
        error = Diverged(
            f"{self.label}: the {what} became {value} at step {step}; lower the learning rate{told}"
        )
        error.batch = kept  # type: ignore[assignment]
        raise error

    def _keep(self, step: int) -> Path | None:
        """The batch of this step as a file beside the checkpoints."""
        if self.kept_in is None:
            return None
        path = self.kept_in / f"not-finite-at-step-{step}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            weights.save_tensors(self._batch, path)
        except OSError as error:
            print(f"{self.label}: the batch could not be kept ({error})", file=sys.stderr)
            return None
        return path


class _AfterStep(TrainerCallback):
    """After every step: its numbers go to the log, the bar moves on, a checkpoint if it is time."""

    def __init__(self, numbers: Numbers, checkpoints: Checkpoints | None):
        self.numbers, self.checkpoints = numbers, checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A bar for trainings that take long; workers, whose output would mix, show none.
        self.bar = tqdm(
            desc=self.numbers.label, total=state.max_steps, initial=state.global_step, unit="step",
            file=sys.stdout, leave=False, position=0, delay=_LONG,
            mininterval=2.0 if sys.stdout.isatty() else _LONG,
            disable=multiprocessing.parent_process() is not None,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.numbers.step(state.global_step - 1)
        loss = self.numbers.log.loss
        if loss:
            self.bar.set_postfix_str(f"loss {loss[-1]:.4f}", refresh=False)
        self.bar.update()
        if self.checkpoints is not None:
            control.should_save = self.checkpoints.due(state.global_step >= state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
