"""Importance scores from the preference pairs: a short DPO run, or its gradient alone."""

import torch

from allo_lib import importance
from allo_lib.batches import pair_batch
from allo_lib.forward import layout_of, response_logps, to_device
from allo_lib.objectives import objective
from allo_lib.seeds import derive
from allo_lib.stages import run_stage
from allo_lib.training import Schedule


def delta_of_dpo(model, rows, *, lr, beta, batch_size, epochs, seed, pad_token_id, label, clip,
                 checkpoints=None, accumulation=1, max_steps=None):  # fmt: skip
    """Scores |theta' - theta| / lr of vanilla DPO on every entry (`importance.delta_scores`).

    `model` holds theta, which is also the reference of `rows` (encoded pairs with
    `chosen_reference` and `rejected_reference`); afterwards it holds theta'. Both are compared in
    float32 masters.

    Returns:
        (name -> float32 scores, record). The record says which share of the entries the run moved
        in float32, and which share it would have moved as seen in bfloat16.
    """
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
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
    scores = importance.delta_scores(before, after, lr)
    record = {"loss": log.loss, "lr": lr} | _moved(before, after)
    return scores, record


def gradient_scores(model, rows, *, beta, batch_size, seed, pad_token_id, steps=None):
    """Scores sum over (at most `steps`) batches of |dL_DPO / dtheta_i| at theta; no update is made.

    The second estimator of the importance (ALLO, arXiv 2406.12606). name -> float32 scores, on the
    CPU. Each gradient is added and dropped as soon as it is complete: one of them is alive at a
    time, and the model's device holds no sum.
    """
    sums = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def add(parameter: torch.nn.Parameter) -> None:
        sums[names[parameter]] += parameter.grad.float().abs().cpu()
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(add) for p in names if p.requires_grad]
    loss_of, layout = objective("dpo", beta=beta), layout_of(model, pad_token_id)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    try:
        for start in range(0, len(order), batch_size)[:steps]:
            chunk = [rows[i] for i in order[start : start + batch_size]]
            batch = to_device(pair_batch(chunk, layout), model)
            loss_of(response_logps(model, batch), batch)[0].backward()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _moved(before: dict, after: dict) -> dict[str, float]:
    total = sum(value.numel() for value in before.values())
    shares = {}
    for key, dtype in (("moved_float32", torch.float32), ("moved_bfloat16", torch.bfloat16)):
        moved = sum(int((before[n].to(dtype) != after[n].to(dtype)).sum()) for n in before)
        shares[key] = moved / total
    return shares


def warmup_seed(study_seed: int, name: str, order: str) -> int:
    """Seed of the order of the pairs; only the variant "order" has another one."""
    return derive(study_seed, "warm-up", name, "second" if order == "order" else "first")
