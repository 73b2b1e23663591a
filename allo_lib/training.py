"""The one training loop: `transformers.Trainer` around an objective, an optimizer and rows."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from allo_lib.errors import AlloError
from allo_lib.forward import response_logps

_PRINT_EVERY = 15.0  # seconds between progress lines, short runs print none


class Diverged(AlloError):
    """Training reached NaN or infinity: the learning rate is too large."""


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
    """One entry per optimizer step (or forward pass, under accumulation), in order."""

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
) -> Log:
    """Train `model` in place on `rows`; returns the log.

    Args:
        collator: rows -> batch (`batches`) with what the objective needs.
        objective: (logps, batch) -> (loss, metrics), see `objectives`.
        optimizer: clips by itself if it should; Trainer's clipping is off.
        label: for progress lines and errors.

    Raises:
        AlloError: no rows.
        Diverged: log-probs or loss are NaN or infinite; told with the step.
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
        trainer.objective, trainer.log_ = objective, Log()
        trainer.label = label
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(label, trainer.log_))
        trainer.train()
    trainer.log_.seconds = round(time.perf_counter() - started, 3)
    return trainer.log_


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

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # The loss is a mean over the batch, not a sum that Trainer should divide by tokens.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
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
            step = self.state.global_step
            raise Diverged(
                f"{self.label}: the {what} became {value} at step {step}; lower the learning rate"
            )


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
