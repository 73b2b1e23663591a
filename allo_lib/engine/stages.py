"""One training stage of any method: rows, objective and mask in, a trained model and log out."""

from dataclasses import replace

from allo_lib.engine.batching import Layout, collate, pair_batch, rejected_batch
from allo_lib.engine.forward import layout_of
from allo_lib.engine.trainer import Log, Schedule, train
from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.method.losses import (
    GAMMA,
    INDIVISIBLE,
    ON_REJECTED,
    ON_SOLUTIONS,
    objective,
    terms_of,
)
from allo_lib.method.masked_adamw import MaskedAdamW


def collator_of(objective_name: str, layout: Layout):
    """The function that makes an objective's batch of its rows; see `batches`."""
    if objective_name in ON_SOLUTIONS:
        make = collate
    else:
        make = rejected_batch if objective_name in ON_REJECTED else pair_batch
    return lambda rows: make(rows, layout)


def run_stage(
    model,
    rows: list[dict],
    objective_name: str,
    schedule: Schedule,
    *,
    pad_token_id: int,
    mask=None,
    beta: float = 0.1,
    key_share: float = 1.0,
    gamma: float = GAMMA,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    label: str = "training",
    masters: dict | None = None,
    after=None,
    checkpoints=None,
) -> Log:
    """Train `model` in place with the entries of `mask` (None: all) and return the log.

    rows: for supervised objectives `prompt` and `response`; else encoded pairs with
    `chosen_reference` and `rejected_reference`, and what the objective reads besides.
    masters: float32 values where the weights hold them rounded, see MaskedAdamW: the stage starts
    from those in the dict and leaves its own there, for the next one.
    checkpoints: see `trainer.train`.
    after: called with the optimizer before it is closed, for those who want its float32 masters.

    Several processes (`devices`) train it together, each on its share of every batch.

    The first step of a rate that rises has rate 0: where it would be the only one, none rises.
    """
    if devices.count() > 1 and objective_name in INDIVISIBLE:
        raise AlloError(f"{label}: {objective_name} judges whole batches: train it in one process")
    if schedule.steps(len(rows)) == 1:
        schedule = replace(schedule, warmup=0.0)
    optimizer = MaskedAdamW(
        model,
        mask,
        lr=schedule.learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        masters=masters,
    )
    if masters is not None:
        for name in optimizer.trained:
            masters.pop(name, None)  # copied: not held twice while the stage runs
    try:
        collator = collator_of(objective_name, layout_of(model, pad_token_id))
        loss_of = objective(objective_name, beta=beta, key_share=key_share, gamma=gamma)
        terms = terms_of(objective_name)
        collator, loss_of, terms = devices.split(collator, loss_of, terms)
        log = train(
            model,
            rows,
            collator,
            loss_of,
            optimizer,
            schedule,
            label,
            checkpoints,
            terms,
        )
        if after is not None:
            after(optimizer)
        if masters is not None:
            masters |= optimizer.packed_masters()
        return log
    finally:
        optimizer.close()
