"""ALLO from top to bottom: find the neurons that matter, weigh the tokens, forget, learn.

Low-Redundant Optimization for Large Language Model Alignment (arXiv 2406.12606). theta is the model
to align, y+ and y- are the chosen and the rejected response of a pair, and Delta_t is
log pi(y_t) - log pi_ref(y_t) of one response token.

1. Neurons. `delta_of_dpo` trains theta by plain DPO for an epoch and scores every neuron (a single
   weight) by how far it moved; `gradient_scores` sums its gradient instead. `find_neurons` keeps
   the share with the highest scores. All that follows trains these alone.
2. Tokens. A rewriting reward model (`engine.rewriter`) learns to correct rejected responses; from
   its probability of each token `token_weights` takes which ones are unaligned.
3. `forget`: NPO on the rejected responses, by those weights.
4. `learn`: DPO in which a rejected response counts by its key tokens only.

The study (`study.training`) and `align` call these functions. Both stages start from the
weights that the one before left, and those are their reference. One stage of any method is
`run_stage`: rows and the name of a loss in, a trained model and its log out; the losses stand in
`method.losses`.
"""

import torch

from allo_lib.engine.batching import Layout, collate, pair_batch, rejected_batch
from allo_lib.engine.forward import layout_of, response_logps, to_device
from allo_lib.engine.trainer import Log, Schedule, train
from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.method import neurons
from allo_lib.method.losses import (
    GAMMA,
    INDIVISIBLE,
    ON_REJECTED,
    ON_SOLUTIONS,
    objective,
    terms_of,
)
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.method.neurons import NeuronMask
from allo_lib.method.tokens import unaligned_weights

# --- 1. neurons --------------------------------------------------------------------------------


def delta_of_dpo(model, pairs, schedule: Schedule, **settings):
    """Scores I(D, theta_i) = |theta'_i - theta_i| / lr of vanilla DPO on every neuron.

    `model` holds theta, which is also the reference of `pairs` (encoded, with `chosen_reference`
    and `rejected_reference`); afterwards it holds theta'. Both are compared in float32 masters, as
    weights in bfloat16 hide small updates. settings: of `run_stage`.

    Returns:
        (name -> float32 scores of the parameter's shape, record). The record says which share of
        the neurons the run moved in float32, and which share as seen in bfloat16.
    """
    parameters, lr = dict(model.named_parameters()), schedule.learning_rate
    before = {name: devices.local(p).float().clone() for name, p in parameters.items()}
    masters: dict = {}
    log = run_stage(model, pairs, "dpo", schedule, masters=masters, **settings)
    after = {name: values.view_as(before[name]) for name, (_, values) in masters.items()}
    scores = neurons.delta_scores(before, after, lr)
    record = {"loss": log.loss, "lr": lr} | _moved(before, after)
    return {name: devices.like(score, parameters[name]) for name, score in scores.items()}, record


def _moved(before: dict, after: dict) -> dict[str, float]:
    """Shares of the neurons that differ, of all processes' parts together."""
    counts = [sum(value.numel() for value in before.values())]
    for dtype in (torch.float32, torch.bfloat16):
        counts.append(sum(int((before[n].to(dtype) != after[n].to(dtype)).sum()) for n in before))
    total, *moved = devices.total(torch.tensor(counts)).tolist()
    return {"moved_float32": moved[0] / total, "moved_bfloat16": moved[1] / total}


def gradient_scores(model, pairs, schedule: Schedule, *, beta, pad_token_id):
    """Scores sum over batches of |dL_DPO / dtheta_i| at theta, once over the pairs; no update.

    The paper's second estimator. name -> float32 scores of the parameter's shape, on the CPU. Each
    gradient is added and dropped as soon as it is complete: one of them is alive at a time, and the
    model's device holds no sum. Of the schedule: every forward pass is a batch (`batch_size` over
    `accumulation` pairs), and as many pairs are read as in `max_steps` steps at most.
    """
    model.zero_grad()  # whatever gradients it carries
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
    make, loss_of, _ = devices.split(collator_of("dpo", layout), loss_of, terms_of("dpo"))
    seeded = torch.Generator().manual_seed(schedule.seed)
    order = torch.randperm(len(pairs), generator=seeded).tolist()
    size = schedule.batch_size // schedule.accumulation
    most = schedule.max_steps and schedule.max_steps * schedule.accumulation
    try:
        for start in range(0, len(order), size)[:most]:
            chunk = [pairs[i] for i in order[start : start + size]]
            batch = to_device(make(chunk), model)
            loss_of(response_logps(model, batch), batch)[0].backward()
            devices.average_gradients(copies)
            for parameter in copies:
                if parameter.grad is not None:
                    add(parameter)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[p]: devices.like(sums[names[p]], p) for p in names}


def find_neurons(
    scores: dict[str, torch.Tensor], share: float, *, granularity="scalar", scope="global", **which
) -> tuple[NeuronMask, dict]:
    """Keep the share of the neurons with the highest scores (`neurons.select_neurons`).

    Returns:
        (mask, how many scores are 0 or tie at its edge). One edge, at which scores can tie, is
        there only where single neurons of all tensors are ranked together; else the dict is empty.
    """
    mask = neurons.select_neurons(scores, share, granularity=granularity, scope=scope, **which)
    ranked = (granularity, scope) == ("scalar", "global")
    return mask, neurons.count_ties(scores, mask) if ranked else {}


# --- 2. tokens ---------------------------------------------------------------------------------


def token_weights(
    probabilities: list[list[float]], rule: str = "threshold", threshold: float = 0.5
) -> list[list[float]]:
    """w_t of each token of each rejected response, from the rewriter's probability p_t of it.

    A token that the rewriter would not keep is unaligned: by the rule "threshold" w_t = 1 where
    p_t < threshold, else 0; for the other rules see `tokens.unaligned_weights`.
    """
    return [
        unaligned_weights(
            torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), rule, threshold
        )[0].tolist()
        for row in probabilities
    ]


# --- 3. forgetting -----------------------------------------------------------------------------


def forget(model, pairs, weights: list[list[float]], schedule: Schedule, **settings) -> Log:
    """Unlearn what is unaligned in the rejected responses, in place: NPO by tokens.

        L = -(2 / beta) sum_t w_t log sigma(-beta Delta_t) / #{t : w_t != 0}

    Args:
        pairs: encoded, with the log-probs of the model as it stands (`rejected_reference`).
        weights: w_t, a list for each pair, as long as its rejected response with the end token.
        settings: of `run_stage`; `mask` are the neurons that move.
    """
    rows = [row | {"rejected_weights": w} for row, w in zip(pairs, weights, strict=True)]
    return run_stage(model, rows, "forgetting", schedule, **settings)


# --- 4. learning -------------------------------------------------------------------------------


def learn(model, pairs, schedule: Schedule, keys: list[list[float]] | None = None, **settings):
    """Learn to prefer the chosen responses, in place: DPO with key tokens. Returns the log.

        L = -log sigma(beta (sum_t Delta+_t - sum_{t in K} Delta-_t))

    Args:
        pairs: encoded, with the log-probs of the model as it stands (`chosen_reference`,
            `rejected_reference`): the forgetting stage's result is the reference.
        keys: 1 for the rejected tokens of K, else 0, a list for each pair. None takes, at every
            step, the share `key_share` of a response's tokens with the lowest Delta-_t.
        settings: of `run_stage`, `key_share` among them; `mask` are the neurons that move.
    """
    if keys is not None:
        pairs = [
            pair | {"rejected_key": values, "chosen_key": [0.0] * len(pair["chosen"])}
            for pair, values in zip(pairs, keys, strict=True)
        ]
    return run_stage(model, pairs, "learning", schedule, **settings)


# --- one stage of any method -------------------------------------------------------------------


def collator_of(name: str, layout: Layout):
    """The function that makes the batch of a loss of its rows; see `batches`."""
    if name in ON_SOLUTIONS:
        make = collate
    else:
        make = rejected_batch if name in ON_REJECTED else pair_batch
    return lambda rows: make(rows, layout)


def run_stage(
    model,
    rows: list[dict],
    name: str,
    schedule: Schedule,
    *,
    pad_token_id: int,
    mask: NeuronMask | None = None,
    beta: float = 0.1,
    key_share: float = 1.0,
    gamma: float = GAMMA,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    label: str = "training",
    masters: dict | None = None,
    checkpoints=None,
) -> Log:
    """Train the neurons of `mask` (None: all) in place by the loss `name` and return the log.

    Args:
        rows: for supervised losses `prompt` and `response`; else encoded pairs with
            `chosen_reference` and `rejected_reference`, and what the loss reads besides.
        masters: float32 values where the weights hold them rounded, see MaskedAdamW: the stage
            starts from those in the dict and leaves its own there, for the next one.
        checkpoints: see `trainer.train`.

    Several processes (`devices`) train it together, each on its share of every batch.

    Raises:
        AlloError: no rows, or several processes or passes for a loss that judges whole batches.
        Diverged: log-probs, loss or gradient are not finite.
    """
    if name in INDIVISIBLE and (devices.count() > 1 or schedule.accumulation > 1):
        raise AlloError(
            f"{label}: {name} judges whole batches: train it in one process, accumulation 1"
        )
    optimizer = MaskedAdamW(
        model,
        mask,
        lr=schedule.learning_rate,
        betas=betas,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        masters=masters,
    )
    try:
        make, loss_of, terms = devices.split(
            collator_of(name, layout_of(model, pad_token_id)),
            objective(name, beta=beta, key_share=key_share, gamma=gamma),
            terms_of(name),
        )
        log = train(model, rows, make, loss_of, optimizer, schedule, label, checkpoints, terms)
        if masters is not None:
            masters |= optimizer.packed_masters()
        return log
    finally:
        optimizer.close()
