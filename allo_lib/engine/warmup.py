"""Importance scores from the preference pairs: a short DPO run, or its gradient alone."""

import torch

from allo_lib.allo import run_stage
from allo_lib.engine.batching import pair_batch
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.engine.trainer import Schedule
from allo_lib.machine import devices
from allo_lib.method import neurons
from allo_lib.method.losses import objective, terms_of
from allo_lib.seeds import derive


def delta_of_dpo(model, rows, *, lr, beta, batch_size, epochs, seed, pad_token_id, label, clip,
                 checkpoints=None, accumulation=1, max_steps=None):  # fmt: skip
    """Scores |theta' - theta| / lr of vanilla DPO on every entry (`neurons.delta_scores`).

    `model` holds theta, which is also the reference of `rows` (encoded pairs with
    `chosen_reference` and `rejected_reference`); afterwards it holds theta'. Both are compared in
    float32 masters.

    Returns:
        (name -> float32 scores, record). The record says which share of the entries the run moved
        in float32, and which share it would have moved as seen in bfloat16.
    """
    parameters = dict(model.named_parameters())
    before = {name: devices.local(p).float().clone() for name, p in parameters.items()}
    after: dict[str, torch.Tensor] = {}
    log = run_stage(
        model,
        rows,
        "dpo",
        Schedule(lr, epochs, batch_size, seed, accumulation=accumulation, max_steps=max_steps),
        pad_token_id=pad_token_id,
        beta=beta,
        max_grad_norm=clip,
        label=label,
        after=lambda optimizer: after.update(optimizer.master_weights()),
        checkpoints=checkpoints,
    )
    scores = neurons.delta_scores(before, after, lr)
    record = {"loss": log.loss, "lr": lr} | _moved(before, after)
    return {name: devices.like(score, parameters[name]) for name, score in scores.items()}, record


def gradient_scores(model, rows, *, beta, batch_size, seed, pad_token_id, steps=None):
    """Scores sum over (at most `steps`) batches of |dL_DPO / dtheta_i| at theta; no update is made.

    The second estimator of the importance (ALLO, arXiv 2406.12606). name -> float32 scores, on the
    CPU. Each gradient is added and dropped as soon as it is complete: one of them is alive at a
    time, and the model's device holds no sum.
    """
    sums = {n: torch.zeros(devices.local(p).shape) for n, p in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def add(parameter: torch.nn.Parameter) -> None:
        sums[names[parameter]] += devices.local(parameter.grad).float().abs().cpu()
        parameter.grad = None

    trained = [p for p in names if p.requires_grad]
    # Where several processes hold the whole model, a gradient is complete when all have theirs.
    copies = [p for p in trained if devices.is_copy(p)]
    hooks = [p.register_post_accumulate_grad_hook(add) for p in trained if not devices.is_copy(p)]
    loss_of, layout = objective("dpo", beta=beta), layout_of(model, pad_token_id)
    collate, loss_of, _ = devices.split(
        lambda few: pair_batch(few, layout), loss_of, terms_of("dpo")
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    try:
        for start in range(0, len(order), batch_size)[:steps]:
            chunk = [rows[i] for i in order[start : start + batch_size]]
            batch = to_device(collate(chunk), model)
            loss_of(response_logps(model, batch), batch)[0].backward()
            devices.average_gradients(copies)
            for parameter in copies:
                if parameter.grad is not None:
                    add(parameter)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[p]: devices.like(sums[names[p]], p) for p in names}


def _moved(before: dict, after: dict) -> dict[str, float]:
    shares, total = {}, _sum(value.numel() for value in before.values())
    for key, dtype in (("moved_float32", torch.float32), ("moved_bfloat16", torch.bfloat16)):
        moved = _sum(int((before[n].to(dtype) != after[n].to(dtype)).sum()) for n in before)
        shares[key] = moved / total
    return shares


def _sum(numbers) -> int:
    return int(devices.total(torch.tensor(sum(numbers))))


def warmup_seed(study_seed: int, name: str, order: str) -> int:
    """Seed of the order of the pairs; only the variant "order" has another one."""
    return derive(study_seed, "warm-up", name, "second" if order == "order" else "first")
