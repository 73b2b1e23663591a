"""The objectives, each a pure function beside its equation, and how a batch becomes their loss.

Shapes: B rows (pairs), T tokens of a row (prompt and response), V vocabulary. Log-probs are natural
logs in float32. Delta = log pi_theta(y) - log pi_ref(y), of one token or summed over a response, is
called a (log-)ratio. Losses of pairs come back per row, [B]; the caller takes the mean. All raise
AlloError for unequal shapes, NaN, empty responses, and beta not above 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.method import check
from allo_lib.method.tokens import key_tokens

CLIP = 0.2  # how far PPO's ratio counts on either side of 1; arXiv 1707.06347, table 1's best
GAMMA = 1.0  # SimPO's target margin; arXiv 2405.14734 searches 0.3 to 1.6 beside a beta of 2
IGNORED = -100  # label of positions that belong to no response; the convention of transformers
ON_PAIRS = ("dpo", "rdpo", "ipo", "bco", "simpo", "learning")
ON_REJECTED = ("npo", "forgetting")
ON_SOLUTIONS = ("sft", "rft")
ON_POLICY = ("ppo", "a2c")  # on responses that the policy in training writes (`on_policy`)
# Losses that are no mean of terms, so that no process can judge a share of a batch.
INDIVISIBLE = ("bco", *ON_POLICY)

Batch = dict[str, Tensor]
Result = tuple[Tensor, dict[str, Tensor]]  # loss and metrics
Objective = Callable[[Tensor, Batch], Result]


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
    # cross_entropy fuses log-softmax and gather; an ignored target gives exactly 0. The vocabulary
    # stands last, as over another dimension all of it is added to one running sum.
    flat = logits[:, :-1].float().flatten(0, 1)  # [B * (T - 1), V]
    logps = -F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none")
    logps = logps.view_as(targets)
    check("token_logps", logps)
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
    check("dpo_loss", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta)
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
    check("token_dpo_loss", chosen_ratio, chosen_mask, beta=beta)
    check("token_dpo_loss", rejected_ratio, rejected_mask)
    chosen = (chosen_ratio * chosen_mask).sum(dim=1)  # [B, T] -> [B]
    rejected = (rejected_ratio * rejected_mask).sum(dim=1)
    return -F.logsigmoid(beta * (chosen - rejected))


def npo_loss(policy: Tensor, ref: Tensor, weights: Tensor, beta: float = 0.1) -> Tensor:
    """Token-level Negative Preference Optimization, ALLO's forgetting stage; a scalar.

    L = -(2 / beta) sum_t w_t log sigma(-beta Delta_t) / #{t : w_t != 0}
    NPO is arXiv 2404.05868, eq. 3; the token weights are ALLO's. All arguments are [B, T]:
    log-probs of rejected responses and weights, 0 outside the response. No non-zero weight: the
    loss is 0 with a zero gradient, as there is nothing to forget.
    """
    check("npo_loss", policy, ref, weights, beta=beta)
    weights = weights.to(policy.dtype)
    terms = weights * F.logsigmoid(-beta * (policy - ref))
    return -(2 / beta) * terms.sum() / (weights != 0).sum().clamp(min=1)


def sequence_npo_loss(ratio: Tensor, beta: float = 0.1) -> Tensor:
    """NPO on whole responses, arXiv 2404.05868, eq. 3: -(2 / beta) log sigma(-beta Delta); [B]."""
    check("sequence_npo_loss", ratio, beta=beta)
    return -(2 / beta) * F.logsigmoid(-beta * ratio)


def rdpo_loss(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> Tensor:
    """R-DPO, arXiv 2403.19159: DPO for the reward less alpha per token; [B].

    L = -log sigma(beta (Delta+ - Delta-) + alpha (|y+| - |y-|)); lengths are [B] tokens, at least
    1. The sign follows from the reward beta Delta + alpha |y| that the penalty leaves in the
    optimum: a pair whose chosen response is the longer one counts as partly explained, and teaches
    less.
    """
    lengths = chosen_length, rejected_length
    check("rdpo_loss", chosen_ratio, rejected_ratio, lengths=lengths, beta=beta)
    margin = chosen_ratio - rejected_ratio
    return -F.logsigmoid(beta * margin + alpha * (chosen_length - rejected_length))


def ipo_loss(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """IPO, arXiv 2310.12036, eq. 17: (Delta+ - Delta- - 1 / (2 beta))^2; [B].

    Ratios are averaged over the response's tokens, as its authors advise and TRL does; lengths are
    [B] tokens, at least 1.
    """
    lengths = chosen_length, rejected_length
    check("ipo_loss", chosen_ratio, rejected_ratio, lengths=lengths, beta=beta)
    margin = chosen_ratio / chosen_length - rejected_ratio / rejected_length
    return (margin - 1 / (2 * beta)) ** 2


def bco_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float = 0.1) -> Tensor:
    """Binary Classifier Optimization, arXiv 2404.04656: right and wrong told apart one by one; [B].

    L = -(log sigma(r+ - delta) + log sigma(-(r- - delta))) / 2 with r = beta Delta and the reward
    shift delta = (E[r+] + E[r-]) / 2, through which no gradient flows.

    delta is the mean over this batch, of its authors' moving average the part that needs no memory
    between steps: a training that was interrupted goes on to the same bits. (TRL's trainer averages
    over all batches so far.) The authors also weigh rejected responses by how much their prompts
    look like those of chosen ones; here both come to the same prompts, and that weight is 1.
    """
    check("bco_loss", chosen_ratio, rejected_ratio, beta=beta)
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    delta = torch.cat([chosen, rejected]).detach().mean()
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
    lengths = chosen_length, rejected_length
    check("simpo_loss", policy_chosen, policy_rejected, lengths=lengths, beta=beta)
    margin = policy_chosen / chosen_length - policy_rejected / rejected_length
    return -F.logsigmoid(beta * margin - gamma)


def ppo_loss(logps: Tensor, before: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Proximal Policy Optimization, arXiv 1707.06347, eq. 7, per sampled token; a scalar.

    L = -mean_t min(rho_t A_t, clip(rho_t, 1 - CLIP, 1 + CLIP) A_t), rho_t = exp(logps - before)
    All [B, T]: log-probs of the tokens now and when they were sampled, and their advantages; mask
    is 1 for tokens of a response.
    """
    check("ppo_loss", logps, before, advantages, mask)
    ratio = (logps - before).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -(gain * mask).sum() / mask.sum().clamp(min=1)


def a2c_loss(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantage actor-critic's policy gradient, arXiv 1602.01783, sec. 4; a scalar.

    L = -mean_t A_t log pi(y_t), all [B, T] as in `ppo_loss`, whose gradient at the policy that
    sampled the tokens this is.
    """
    check("a2c_loss", logps, advantages, mask)
    return -(advantages * logps * mask).sum() / mask.sum().clamp(min=1)


def supervised_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy per response token, a scalar: -sum m log p / sum m; both [B, T]."""
    check("supervised_loss", logps, mask)
    return -(logps * mask).sum() / mask.sum().clamp(min=1)


# From a batch to its loss. `logps`, float32 [R, T], are log-probs under the policy of the batch's R
# responses; of B pairs (`batching.pair_batch`) R = 2B, the chosen ones first. `reference` in the
# batch, [R, T], are those under the reference model, made once for all methods.


def objective(name: str, *, beta: float, key_share: float = 1.0, gamma: float = GAMMA) -> Objective:
    """The function (logps, batch) -> (loss, metrics) of a method by its name.

    The loss is a scalar; metrics are scalars for the log, tensors without a gradient.

    gamma: SimPO's target margin, whose own beta is fixed (`simpo_loss`).
    key_share: of the learning stage; its key tokens come from the current policy unless the batch
    carries them as `key` (0 or 1 per token).
    ValueError for an unknown name.
    """

    def supervised(logps: Tensor, batch: Batch) -> Result:
        return supervised_loss(logps, _response(batch)), {}

    def forgetting(logps: Tensor, batch: Batch) -> Result:
        return npo_loss(logps, batch["reference"], batch["weights"], beta), {}

    def npo(logps: Tensor, batch: Batch) -> Result:
        ratio = logps.sum(dim=1) - batch["reference"].sum(dim=1)
        return sequence_npo_loss(ratio, beta).mean(), {}

    def a2c(logps: Tensor, batch: Batch) -> Result:
        return a2c_loss(logps, batch["advantages"], _response(batch)), {}

    def learning(logps: Tensor, batch: Batch) -> Result:
        ratio, inside = logps - batch["reference"], _response(batch)  # [2B, T]
        (chosen, rejected), (mask, rejected_mask) = ratio.chunk(2), inside.chunk(2)  # [B, T]
        if "key" in batch:
            key = batch["key"].chunk(2)[1].bool()
        else:
            key = key_tokens(rejected, rejected_mask, key_share)
        loss = token_dpo_loss(chosen, rejected, mask, key, beta).mean()
        return loss, _margin(chosen.sum(dim=1), rejected.sum(dim=1), beta)

    def pairs(logps: Tensor, batch: Batch) -> Result:
        return _pairs(name, logps, batch, beta, gamma)

    known: dict[str, Objective] = dict.fromkeys(ON_SOLUTIONS, supervised)
    known |= {"npo": npo, "forgetting": forgetting, "ppo": _ppo, "a2c": a2c}
    known |= dict.fromkeys(ON_PAIRS, pairs) | {"learning": learning}
    if name not in known:
        raise ValueError(f"objective {name!r}: expected one of {', '.join(known)}")
    return known[name]


def terms_of(name: str) -> Callable[[Batch], Tensor]:
    """The function batch -> how many terms an objective's loss is the mean of; int64 scalar.

    That is tokens for the supervised objectives and forgetting, sequences for all that are means
    over pairs or responses.
    """
    if name in ON_SOLUTIONS:
        return lambda batch: _response(batch).sum()
    if name == "forgetting":
        return lambda batch: (batch["weights"] != 0).sum()
    return lambda batch: torch.tensor(len(batch["labels"]))


def _response(batch: Batch) -> Tensor:
    return batch["labels"] != IGNORED  # bool [R, T]


def _ppo(logps: Tensor, batch: Batch) -> Result:
    before, mask = batch["before_update"], _response(batch)
    loss = ppo_loss(logps, before, batch["advantages"], mask)
    beyond = ((logps.detach() - before).exp() - 1).abs() > CLIP
    return loss, {"clipped": (beyond & mask).sum() / mask.sum()}


def _pairs(name: str, logps: Tensor, batch: Batch, beta: float, gamma: float) -> Result:
    chosen, rejected = logps.sum(dim=1).chunk(2)  # [2B, T] -> two of [B]
    ref_chosen, ref_rejected = batch["reference"].sum(dim=1).chunk(2)
    ratios = chosen - ref_chosen, rejected - ref_rejected
    first, second = _response(batch).sum(dim=1).chunk(2)  # lengths, two of [B]
    losses = {
        "dpo": lambda: dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta),
        "rdpo": lambda: rdpo_loss(*ratios, first, second, beta),
        "ipo": lambda: ipo_loss(*ratios, first, second, beta),
        "bco": lambda: bco_loss(*ratios, beta),
        "simpo": lambda: simpo_loss(chosen, rejected, first, second, gamma=gamma),
    }
    return losses[name]().mean(), _margin(*ratios, beta)


def _margin(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> dict[str, Tensor]:
    """Implicit rewards of DPO: beta times the log-ratio of the whole response, both [B]."""
    margin = beta * (chosen_ratio - rejected_ratio).detach()
    return {"reward_margin": margin.mean(), "reward_accuracy": (margin > 0).float().mean()}
