"""The objectives, each a pure function beside its equation.

Shapes: B rows (pairs), T tokens of a row (prompt and response), V vocabulary. Log-probs are natural
logs in float32. Delta_t = log pi_theta(y_t) - log pi_ref(y_t) is called a (log-)ratio. Losses of
pairs come back per row, [B]; the caller takes the mean.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_lib.errors import AlloError

CLIP = 0.2  # how far PPO's ratio counts on either side of 1; arXiv 1707.06347, table 1's best
GAMMA = 1.0  # SimPO's target margin; arXiv 2405.14734 searches 0.3 to 1.6 beside a beta of 2
IGNORED = -100  # label of positions that belong to no response; the convention of transformers
_reads_values = True  # whether arguments are looked at, besides their shapes


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every response token given what stands before it.

    Args:
        logits: [B, T, V], any float dtype; logits[:, t] predicts token t + 1.
        labels: [B, T] int64 token ids, -100 outside the response.

    Returns:
        float32 [B, T]; out[:, t] = log p(labels[:, t] | tokens before t), and 0 at t = 0 and
        wherever the label is -100.

    Raises:
        AlloError: wrong shapes, a label outside the vocabulary, or NaN in the logits of a label.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise AlloError(
            f"token_logps: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} given; "
            "expected [B, T, V] and [B, T]"
        )
    targets = labels[:, 1:]
    unknown = targets[(targets != IGNORED) & ((targets < 0) | (targets >= logits.shape[-1]))]
    if unknown.numel():
        raise AlloError(
            f"token_logps: label {int(unknown[0])} is outside the vocabulary of "
            f"{logits.shape[-1]}; use the model's own tokenizer"
        )
    # cross_entropy fuses log-softmax and gather; an ignored target gives exactly 0.
    logps = -F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    if torch.isnan(logps).any():
        raise AlloError("token_logps: the logits hold NaN; check the model (learning rate, dtype)")
    return F.pad(logps, (1, 0))


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct Preference Optimization, arXiv 2305.18290, eq. 7; [B] log-probs of whole responses.

    L = -log sigma(beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))])
    """
    _same_shape("dpo_loss", policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _positive("dpo_loss", beta=beta)
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def token_dpo_loss(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """DPO over chosen sets of tokens, ALLO's learning stage (arXiv 2406.12606).

    L = -log sigma(beta [sum_t m+_t Delta+_t - sum_t m-_t Delta-_t]); in ALLO m+ is the whole
    chosen response and m- the key tokens of the rejected one. All arguments are [B, T]; the masks
    bool or weights. With both masks the whole responses this is `dpo_loss`.
    """
    _same_shape("token_dpo_loss", chosen_ratio, chosen_mask)
    _same_shape("token_dpo_loss", rejected_ratio, rejected_mask)
    _positive("token_dpo_loss", beta=beta)
    chosen = (chosen_ratio * chosen_mask).sum(dim=1)
    rejected = (rejected_ratio * rejected_mask).sum(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected))


def npo_loss(policy: Tensor, ref: Tensor, weights: Tensor, beta: float = 0.1) -> Tensor:
    """Token-level Negative Preference Optimization, ALLO's forgetting stage; a scalar.

    L = -(2 / beta) sum_t w_t log sigma(-beta Delta_t) / #{t : w_t != 0}
    NPO is arXiv 2404.05868, eq. 3; the token weights are ALLO's. All arguments are [B, T]:
    log-probs of rejected responses and weights, 0 outside the response. No non-zero weight: the
    loss is 0 with a zero gradient, as there is nothing to forget.
    """
    _same_shape("npo_loss", policy, ref, weights)
    _positive("npo_loss", beta=beta)
    weights = weights.to(policy.dtype)
    terms = weights * F.logsigmoid(-beta * (policy - ref))
    return -(2 / beta) * terms.sum() / (weights != 0).sum().clamp(min=1)


def sequence_npo_loss(policy: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    """NPO on whole responses, arXiv 2404.05868, eq. 3: -(2 / beta) log sigma(-beta Delta); [B]."""
    _same_shape("sequence_npo_loss", policy, ref)
    _positive("sequence_npo_loss", beta=beta)
    return -(2 / beta) * F.logsigmoid(-beta * (policy - ref))


def rdpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> Tensor:
    """R-DPO, arXiv 2403.19159: DPO for the reward less alpha per token; [B].

    L = -log sigma(beta margin + alpha (|y+| - |y-|)); lengths are [B] tokens, at least 1. The sign
    follows from the reward beta log-ratio + alpha |y| that the penalty leaves in the optimum: a
    pair whose chosen response is the longer one counts as partly explained, and teaches less.
    """
    _same_shape("rdpo_loss", policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _same_shape("rdpo_loss", policy_chosen, chosen_length, rejected_length)
    _positive("rdpo_loss", beta=beta)
    _lengths("rdpo_loss", chosen_length, rejected_length)
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin + alpha * (chosen_length - rejected_length))


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """IPO, arXiv 2310.12036, eq. 17: (margin - 1 / (2 beta))^2; [B].

    Log-ratios are averaged over the response's tokens, as its authors advise and TRL does; lengths
    are [B] tokens, at least 1.
    """
    _same_shape("ipo_loss", policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _same_shape("ipo_loss", policy_chosen, chosen_length, rejected_length)
    _positive("ipo_loss", beta=beta)
    _lengths("ipo_loss", chosen_length, rejected_length)
    chosen = (policy_chosen - ref_chosen) / chosen_length
    rejected = (policy_rejected - ref_rejected) / rejected_length
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def bco_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    shift: float | None = None,
) -> Tensor:
    """Binary Classifier Optimization, arXiv 2404.04656: right and wrong told apart one by one; [B].

    L = -(log sigma(r+ - delta) + log sigma(-(r- - delta))) / 2 with r = beta log-ratio and the
    reward shift delta = (E[r+] + E[r-]) / 2, through which no gradient flows.

    shift: delta; None takes the mean over this batch, of its authors' moving average the part that
    needs no memory between steps: a training that was interrupted goes on to the same bits. (TRL's
    trainer averages over all batches so far.) The authors also weigh rejected responses by how much
    their prompts look like those of chosen ones; here both come to the same prompts, and that
    weight is 1.
    """
    _same_shape("bco_loss", policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    _positive("bco_loss", beta=beta)
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    delta = torch.cat([chosen, rejected]).detach().mean() if shift is None else shift
    return -(F.logsigmoid(chosen - delta) + F.logsigmoid(delta - rejected)) / 2


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 2.0,
    gamma: float = GAMMA,
) -> Tensor:
    """SimPO, arXiv 2405.14734, eq. 6: no reference, log-probs per token, target margin gamma; [B].

    L = -log sigma(beta / |y+| log pi(y+) - beta / |y-| log pi(y-) - gamma)
    """
    _same_shape("simpo_loss", policy_chosen, policy_rejected, chosen_length, rejected_length)
    _positive("simpo_loss", beta=beta)
    _lengths("simpo_loss", chosen_length, rejected_length)
    margin = policy_chosen / chosen_length - policy_rejected / rejected_length
    return -F.logsigmoid(beta * margin - gamma)


def ppo_loss(
    logps: Tensor, before: Tensor, advantages: Tensor, mask: Tensor, clip: float = CLIP
) -> Tensor:
    """Proximal Policy Optimization, arXiv 1707.06347, eq. 7, per sampled token; a scalar.

    L = -mean_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t), rho_t = exp(logps - before)
    All [B, T]: log-probs of the tokens now and when they were sampled, and their advantages; mask
    is 1 for tokens of a response.
    """
    _same_shape("ppo_loss", logps, before, advantages, mask)
    _positive("ppo_loss", clip=clip)
    ratio = (logps - before).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * mask).sum() / mask.sum().clamp(min=1)


def a2c_loss(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantage actor-critic's policy gradient, arXiv 1602.01783, sec. 4; a scalar.

    L = -mean_t A_t log pi(y_t), all [B, T] as in `ppo_loss`, whose gradient at the policy that
    sampled the tokens this is.
    """
    _same_shape("a2c_loss", logps, advantages, mask)
    return -(advantages * logps * mask).sum() / mask.sum().clamp(min=1)


def supervised_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy per response token, a scalar: -sum m log p / sum m; both [B, T]."""
    _same_shape("supervised_loss", logps, mask)
    return -(logps * mask).sum() / mask.sum().clamp(min=1)


@contextlib.contextmanager
def values_unread():
    """A block in which arguments are not searched for NaN and the like: a look at a value makes the
    host wait for a GPU. For training loops, which find such numbers in what they log."""
    global _reads_values
    before, _reads_values = _reads_values, False
    try:
        yield
    finally:
        _reads_values = before


def any_of(found: Tensor) -> bool:
    """Whether a bool tensor holds True; False where values are not read (`values_unread`)."""
    return _reads_values and bool(found.any())


def _same_shape(name: str, *tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise AlloError(f"{name}: shapes {sorted(shapes)} given; expected them all equal")
    for tensor in tensors:
        if tensor.is_floating_point() and any_of(torch.isnan(tensor)):
            raise AlloError(f"{name}: an argument holds NaN; check the model's outputs")


def _lengths(name: str, *lengths: Tensor) -> None:
    for length in lengths:
        if any_of(length < 1):
            raise AlloError(f"{name}: a response has no tokens; leave such pairs out")


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise AlloError(f"{name}: {key} is {value}, expected a number above 0")
