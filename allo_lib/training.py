"""The one training loop: `transformers.Trainer` around an objective, an optimizer and rows."""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from allo_lib import checkpoints as kept
from allo_lib import weights
from allo_lib.checkpoints import Checkpoints
from allo_lib.errors import AlloError, Diverged
from allo_lib.forward import response_logps

_PRINT_EVERY = 15.0  # seconds between progress lines, short runs print none


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the cosine schedule of the official code."""

    learning_rate: float
    epochs: int
    batch_size: int  # rows (pairs) per optimizer step
    seed: int  # of the order of the rows
    warmup: float = 0.1  # share of all steps with a linearly rising rate
    accumulation: int = 1  # forward passes per step; batch_size is their sum


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
    model,
    rows: list[dict],
    collator: Callable[[list[dict]], dict],
    objective: Callable,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    label: str = "training",
    checkpoints: Checkpoints | None = None,
) -> Log:
    """Train `model` in place on `rows`; returns the log.

    Args:
        collator: rows -> batch (`batches`) with what the objective needs.
        objective: (logps, batch) -> (loss, metrics), see `objectives`.
        optimizer: a MaskedAdamW; it clips by itself if it should, Trainer's clipping is off.
        label: for progress lines and errors.
        checkpoints: where the training goes on from if it was interrupted, and what it leaves
            there in case it is; None for neither.

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
            args=_arguments(folder, schedule, model.device),
            train_dataset=rows,
            data_collator=collator,
            optimizers=(optimizer, None),
        )
        log = Log()
        trainer.objective, trainer.log_, trainer.label = objective, log, label
        trainer.checkpoints, trainer.optimizer_ = checkpoints, optimizer
        trainer.started = started
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watch(optimizer, log))
        trainer.add_callback(_Progress(label, log))
        if checkpoints is not None:
            trainer.add_callback(_WhenDue(checkpoints))
        begun = checkpoints.latest() if checkpoints is not None else None
        optimizer.check_gradient, optimizer.watch = trainer.stop_unless_gradient_finite, True
        try:
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
        finally:
            optimizer.check_gradient, optimizer.watch = None, False
    log.seconds = round(log.seconds + time.perf_counter() - started, 3)
    return log


def _arguments(folder: str, schedule: Schedule, device: torch.device) -> TrainingArguments:
    if schedule.batch_size % schedule.accumulation:
        raise AlloError(
            f"batch_size {schedule.batch_size} is no multiple of accumulation "
            f"{schedule.accumulation}; choose one that is"
        )
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=schedule.batch_size // schedule.accumulation,
        gradient_accumulation_steps=schedule.accumulation,
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup if schedule.warmup < 1 else int(schedule.warmup),
        max_grad_norm=0,
        seed=schedule.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )


class _Trainer(Trainer):
    """Trainer whose loss is an objective on the log-probs of response tokens."""

    objective: Callable
    log_: Log
    label: str
    checkpoints: Checkpoints | None
    optimizer_: torch.optim.Optimizer  # as it was given; Trainer wraps its own
    started: float  # time.perf_counter() when this process began the training

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # The loss is a mean over the batch, not a sum that Trainer should divide by tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._batch = inputs
        logps = response_logps(model, inputs)
        self._stop_unless_finite("log-probs", float(logps.detach().sum()))
        loss, metrics = self.objective(logps, inputs)
        value = float(loss.detach())
        self._stop_unless_finite("loss", value)
        self.log_.loss.append(value)
        for key, metric in metrics.items():
            self.log_.metrics.setdefault(key, []).append(metric)
        pad = self.model.config.pad_token_id
        self.log_.tokens += int((inputs["input_ids"] != pad).sum())
        return loss

    def _stop_unless_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            step, batch = self.state.global_step, self._keep_batch()
            told = f"; the batch is in {batch}" if batch else ""
            error = Diverged(
                f"{self.label}: the {what} became {value} at step {step}; "
                f"lower the learning rate{told}"
            )
            error.batch = batch
            raise error

    def stop_unless_gradient_finite(self, norm: torch.Tensor) -> None:
        """Called by the optimizer before it changes anything."""
        self._stop_unless_finite("gradient norm", float(norm))

    def _keep_batch(self) -> Path | None:
        """The batch of this step as a file beside the checkpoints."""
        if self.checkpoints is None:
            return None
        path = self.checkpoints.folder / f"not-finite-at-step-{self.state.global_step}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            weights.save_tensors(dict(self._batch), path)
        except OSError as error:
            print(f"{self.label}: the batch could not be kept ({error})", file=sys.stderr)
            return None
        return path

    # Trainer saves and resumes by these; its own versions pickle.

    def _save_checkpoint(self, model, trial) -> None:
        seconds = self.log_.seconds + time.perf_counter() - self.started
        log = asdict(self.log_) | {"seconds": seconds}

        def fill(folder: Path) -> None:
            weights.save(self.model, folder / "model.safetensors")
            self.state.save_to_json(str(folder / "trainer_state.json"))
            kept.write_state(folder, self.optimizer_, self.lr_scheduler, log)

        self.checkpoints.write(self.state.global_step, fill)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        path = Path(resume_from_checkpoint, "model.safetensors")
        weights.restore(self.model, weights.read_tensors(path))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        before = kept.read_state(Path(checkpoint), self.optimizer_, self.lr_scheduler)
        for name, value in before.items():
            setattr(self.log_, name, value)
        step = self.state.global_step
        print(f"{self.label}: goes on from its checkpoint at step {step}", flush=True)

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            kept.read_random_state(Path(checkpoint))


class _Watch(TrainerCallback):
    """Logs of every step how large its gradient was and how much of the model it moved."""

    def __init__(self, optimizer, log: Log):
        self.optimizer, self.log = optimizer, log

    def on_step_end(self, args, state, control, **_):
        for name, value in (
            ("grad_norm", self.optimizer.grad_norm),
            ("moved", self.optimizer.moved),
        ):
            if value is not None:
                self.log.metrics.setdefault(name, []).append(float(value))


class _WhenDue(TrainerCallback):
    """Asks Trainer for a checkpoint when it is time for one."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_step_end(self, args, state, control, **_):
        at_end = state.global_step >= state.max_steps
        control.should_save = self.checkpoints.due(at_end)


class _Progress(TrainerCallback):
    """A plain line now and then: survives logs and notebooks where redrawn bars do not."""

    def __init__(self, label: str, log: Log):
        self.label, self.log = label, log
        self.start = self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        if now - self.last >= _PRINT_EVERY:
            self.last = now
            print(
                f"{self.label}: step {state.global_step} of {state.max_steps}, "
                f"loss {self.log.loss[-1]:.4f}, {now - self.start:.0f} s",
                flush=True,
            )
