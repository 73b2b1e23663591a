"""Which tokens of a rejected response to train on, by rewards of single tokens.

Two rewards. Forgetting asks a rewriting reward model whether it would keep the token
(`unaligned_weights`); learning takes the tokens with the lowest DPO reward (`key_tokens`).
"""

import torch
from torch import Tensor

from allo_lib.errors import AlloError
from allo_lib.method import check

RULES = ("threshold", "soft", "released")


def unaligned_weights(
    probs: Tensor, response_mask: Tensor, rule: str = "threshold", threshold: float = 0.5
) -> Tensor:
    """Weight of each token in forgetting, from the rewriter's probability of keeping it.

    Source: ALLO (arXiv 2406.12606), rewards by RLMEC (arXiv 2401.06081).

    Args:
        probs: float [B, T] in [0, 1], p_t = P_RM(y_t | question, solution, prediction, y_<t); read
            only inside the response.
        response_mask: bool [B, T], True on response tokens.
        rule: "threshold" w = 1[p < threshold], the paper's figure; "soft" w = 1 - p; "released"
            w = p, what the released code feeds to its loss, which forgets good tokens most.
        threshold: for the rule of that name, in [0, 1].

    Returns:
        float32 [B, T], 0 outside the response.
    """
    if rule not in RULES:
        raise AlloError(f"unaligned_weights: rule is {rule!r}, expected {' | '.join(RULES)}")
    if not 0 <= threshold <= 1:
        raise AlloError(f"unaligned_weights: threshold is {threshold}, expected 0 to 1")
    mask = _checked("unaligned_weights", probs, response_mask)
    inside = probs[mask]
    if ((inside < 0) | (inside > 1)).any():
        raise AlloError("unaligned_weights: a probability lies outside [0, 1]; pass exp(log-prob)")
    probs = probs.float()
    if rule == "threshold":
        weights = (probs < threshold).float()
    else:
        weights = 1 - probs if rule == "soft" else probs
    return torch.where(mask, weights, 0.0)


def key_tokens(ratio: Tensor, response_mask: Tensor, share: float) -> Tensor:
    """The tokens of each row with the lowest log-ratio, that is with the lowest DPO reward.

    Source: ALLO (arXiv 2406.12606), learning stage. Unlike the official code, which takes
    int(padded_length * share) and so counts prompt and padding, the number is
    max(1, round(share * response length)) of the row's own response; equal ratios are taken in the
    order of position.

    Args:
        ratio: float [B, T], Delta_t; read only inside the response.
        response_mask: bool [B, T]. A row without response tokens gets no key token.
        share: 0 < share <= 1.

    Returns:
        bool [B, T].
    """
    if not 0 < share <= 1:
        raise AlloError(f"key_tokens: share is {share}, expected 0 < share <= 1")
    mask = _checked("key_tokens", ratio, response_mask)
    lengths = mask.sum(dim=1)  # [B]
    # Doubles round as Python does; in float32 0.07 * 150 comes out on the other side of 10.5.
    counts = (share * lengths.double()).round().long().clamp(min=1).minimum(lengths)
    order = ratio.detach().float().argsort(dim=1, stable=True)  # [B, T]: positions, lowest first
    # All of the response comes before all else, even where a ratio is infinite.
    order = order.gather(1, (~mask).gather(1, order).long().argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)  # the inverse permutation of each row
    return mask & (rank < counts.unsqueeze(1))


def _checked(name: str, values: Tensor, response_mask: Tensor) -> Tensor:
    if values.ndim != 2 or values.shape != response_mask.shape:
        raise AlloError(
            f"{name}: shapes {tuple(values.shape)} and {tuple(response_mask.shape)} given; "
            "expected both [B, T]"
        )
    mask = response_mask.bool()
    check(name, values.where(mask, 0.0))
    return mask
