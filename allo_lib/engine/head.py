"""The language-model head on chosen positions only, without a tokens x vocabulary tensor.

A vocabulary of 49,152 in float32 makes 0.2 MB of logits a token, and autograd keeps several copies.
Here logits live for one chunk of positions at a time: forward keeps their log-sum-exp alone, and
backward makes them again where the loss has a gradient. Positions that a loss leaves out (tokens
that are no key tokens, weights of 0) cost nothing in backward.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of float32 logits alive at once


def target_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[targets], float32 [N].

    Args:
        hidden: [N, H] last hidden states, in the dtype of the weights.
        weight, bias: [V, H] and [V] (or None) of the head.
        targets: int64 [N], ids below V.

    The product is made in the dtype of the weights, everything after it in float32. Gradients go to
    hidden, weight and bias, equal to those of `log_softmax` and `gather` up to rounding.
    """
    return _TargetLogps.apply(hidden, weight, bias, targets)


@torch.no_grad()
def likeliest(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """argmax over the vocabulary of hidden @ weight.T + bias: int64 [N], the first of equal ones.

    hidden [N, H], weight [V, H], bias [V] or None. What some models do after the head (scaling by a
    positive number, capping) keeps the order of logits, and so this.
    """
    best = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    for part in _chunks(len(hidden), weight):
        best[part] = _logits(hidden[part], weight, bias).argmax(dim=-1)
    return best


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        total = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        logps = torch.empty_like(total)
        for part in _chunks(len(targets), weight):
            logits = _logits(hidden[part], weight, bias)
            total[part] = logits.logsumexp(dim=-1)
            logps[part] = logits.gather(1, targets[part, None])[:, 0] - total[part]
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        return logps

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, targets, total = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_hidden = torch.zeros_like(hidden) if needs_hidden else None
        to_weight = torch.zeros_like(weight) if needs_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        # To count those that are used, a host would have to wait for its GPU.
        everywhere = torch.arange(len(gradient), device=gradient.device)
        used = everywhere if gradient.is_cuda else gradient.nonzero()[:, 0]
        for part in _chunks(len(used), weight):
            rows = used[part]
            by_logits = _gradient_of_logits(
                _logits(hidden[rows], weight, bias), total[rows], targets[rows], gradient[rows]
            )
            if needs_bias:
                to_bias += by_logits.sum(dim=0)
            by_logits = by_logits.to(weight.dtype)
            if needs_hidden:
                to_hidden[rows] = by_logits @ weight
            if needs_weight:
                to_weight.addmm_(by_logits.T, hidden[rows])
        return to_hidden, to_weight, None if to_bias is None else to_bias.to(bias.dtype), None


def _gradient_of_logits(logits, total, targets, gradient) -> Tensor:
    """d/dlogits of sum_i g_i (logits[i, y_i] - logsumexp(logits[i])) = g (1[y] - softmax)."""
    softmax = logits.sub_(total[:, None]).exp_()
    softmax.mul_(-gradient[:, None])
    return softmax.scatter_add_(1, targets[:, None], gradient[:, None])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


def _chunks(count: int, weight: Tensor):
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
