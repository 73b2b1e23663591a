"""How each method turns the log-probs of a batch into its loss; the equations are in `losses`.

An objective takes `logps` (float32 [B, T], log-probs under the policy) and the batch they came
from, and returns the scalar loss and named scalars for the log, tensors without a gradient. A batch
of pairs holds the chosen rows first, then the rejected ones (`batches.pair_batch`); `reference` in
it are the log-probs under the reference model, per token, made once for all methods that share it.
"""

import torch
from torch import Tensor

from allo_lib.method import losses
from allo_lib.method.token_rewards import key_tokens

ON_PAIRS = ("dpo", "rdpo", "ipo", "bco", "simpo", "learning", "merged")
ON_REJECTED = ("npo", "forgetting")
ON_SOLUTIONS = ("sft", "rft")
ON_POLICY = ("ppo", "a2c")  # on responses that the policy in training writes (`on_policy`)
# Losses that are no mean of terms, so that no process can judge a share of a batch.
INDIVISIBLE = ("bco", "merged", *ON_POLICY)

Result = tuple[Tensor, dict[str, Tensor]]


def objective(name: str, *, beta: float, key_share: float = 1.0, gamma: float = losses.GAMMA):
    """The function (logps, batch) -> (loss, metrics) of a method by its name.

    gamma: SimPO's target margin, whose own beta is fixed (`losses.simpo_loss`).
    key_share: of the learning stage; its key tokens come from the current policy unless the batch
    carries them as `key` (0 or 1 per token).
    """
    if name in ON_SOLUTIONS:
        return _supervised
    if name in ON_POLICY:
        return _ppo if name == "ppo" else _a2c
    if name == "forgetting":
        return lambda logps, batch: (_forgetting(logps, batch, beta), {})
    if name == "npo":
        return lambda logps, batch: (_npo(logps, batch, beta), {})
    if name == "merged":
        return lambda logps, batch: _merged(logps, batch, beta, key_share)
    if name == "learning":
        return lambda logps, batch: _learning(logps, batch, beta, key_share)
    return lambda logps, batch: _pairs(name, logps, batch, beta, gamma)


def terms_of(name: str):
    """The function batch -> how many terms an objective's loss is the mean of; int64 scalar.

    That is tokens for the supervised objectives and forgetting, sequences for all that are means
    over pairs or responses.
    """
    if name in ON_SOLUTIONS:
        return lambda batch: _response(batch).sum()
    if name == "forgetting":
        return lambda batch: (batch["weights"] != 0).sum()
    return lambda batch: torch.tensor(len(batch["labels"]))


def _response(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"] != losses.IGNORED


def _supervised(logps: Tensor, batch: dict[str, Tensor]) -> Result:
    return losses.supervised_loss(logps, _response(batch)), {}


def _ppo(logps, batch) -> Result:
    before, mask = batch["before_update"], _response(batch)
    loss = losses.ppo_loss(logps, before, batch["advantages"], mask)
    beyond = ((logps.detach() - before).exp() - 1).abs() > losses.CLIP
    return loss, {"clipped": (beyond & mask).sum() / mask.sum()}


def _a2c(logps, batch) -> Result:
    return losses.a2c_loss(logps, batch["advantages"], _response(batch)), {}


def _forgetting(logps, batch, beta) -> Tensor:
    return losses.npo_loss(logps, batch["reference"], batch["weights"], beta)


def _npo(logps, batch, beta) -> Tensor:
    sums = logps.sum(dim=1), batch["reference"].sum(dim=1)
    return losses.sequence_npo_loss(*sums, beta=beta).mean()


def _learning(logps, batch, beta, key_share) -> Result:
    ratio = logps - batch["reference"]
    (chosen, rejected), (mask, rejected_mask) = ratio.chunk(2), _response(batch).chunk(2)
    if "key" in batch:
        key = batch["key"].chunk(2)[1].bool()
    else:
        key = key_tokens(rejected, rejected_mask, key_share)
    loss = losses.token_dpo_loss(chosen, rejected, mask, key, beta).mean()
    return loss, _margin(chosen.sum(dim=1), rejected.sum(dim=1), beta)


def _merged(logps, batch, beta, key_share) -> Result:
    """Both stages' losses in one step; the batch of pairs carries forgetting's `weights`."""
    loss, metrics = _learning(logps, batch, beta, key_share)
    rejected = {key: batch[key].chunk(2)[1] for key in ("reference", "weights")}
    return loss + _forgetting(logps.chunk(2)[1], rejected, beta), metrics


def _pairs(name, logps, batch, beta, gamma) -> Result:
    policy = logps.sum(dim=1).chunk(2)
    reference = batch["reference"].sum(dim=1).chunk(2)
    lengths = _response(batch).sum(dim=1).chunk(2)
    if name == "dpo":
        rows = losses.dpo_loss(*policy, *reference, beta=beta)
    elif name == "rdpo":
        rows = losses.rdpo_loss(*policy, *reference, *lengths, beta=beta)
    elif name == "ipo":
        rows = losses.ipo_loss(*policy, *reference, *lengths, beta=beta)
    elif name == "bco":
        rows = losses.bco_loss(*policy, *reference, beta=beta)
    elif name == "simpo":
        rows = losses.simpo_loss(*policy, *lengths, gamma=gamma)
    else:
        known = ON_PAIRS + ON_REJECTED + ON_SOLUTIONS + ON_POLICY
        raise ValueError(f"objective {name!r}: expected one of {known}")
    return rows.mean(), _margin(policy[0] - reference[0], policy[1] - reference[1], beta)


def _margin(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> dict[str, Tensor]:
    """Implicit rewards of DPO: beta times the log-ratio of the whole response."""
    margin = beta * (chosen_ratio - rejected_ratio).detach()
    return {
        "reward_margin": margin.mean(),
        "reward_accuracy": (margin > 0).float().mean(),
    }
