"""Linear layers of which only some output rows are trained: no gradient is made for the others.

With y = x W^T the weight's gradient is dW = dy^T x; of its rows only dW[rows] = dy[:, rows]^T x is
computed, a share of the rows of one third of the arithmetic of a training step.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RowLinear:
    """Takes over the forward pass of a linear module until `detach`.

    rows: int64 [k], the trained rows of the weight [out, in], sorted. masters: float32 leaf of k *
    in entries, whose `.grad` gets their gradient; the weight itself gets none. The bias, if any, is
    trained as before.
    """

    def __init__(self, module: nn.Linear, rows: Tensor, masters: nn.Parameter):
        self.module, self.rows, self.masters = module, rows, masters

    def attach(self) -> None:
        """From now on the module's weight is frozen and its rows' gradient goes to the masters."""
        self.module.weight.requires_grad_(False)
        self.module.forward = self._forward  # type: ignore[assignment,method-assign]

    def detach(self) -> None:
        """Give the module its own forward pass and its trainable weight back."""
        del self.module.forward
        self.module.weight.requires_grad_(True)

    def _forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.module.weight
        bias: Tensor | None = self.module.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # as it does for the product itself, backward included
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _RowProduct.apply(x, self.masters, weight, bias, self.rows)


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, masters: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        gradient = gradient.flatten(0, -2)  # [..., out] -> [tokens, out]
        to_masters = to_bias = None
        if ctx.needs_input_grad[1]:
            # index_select along a row's entries is slower on a CPU, most in bfloat16.
            kept = gradient.gather(1, rows.expand(len(gradient), -1)).T @ x.flatten(
                0, -2
            )  # [k, in]
            to_masters = kept.flatten().float()
        if ctx.needs_input_grad[3]:
            to_bias = gradient.sum(dim=0)
        return to_x, to_masters, None, to_bias, None


def whole_rows(index: Tensor, shape: torch.Size) -> Tensor | None:
    """The rows, int64 [k], that a flat sorted index keeps whole; None if it keeps part of any."""
    if len(shape) != 2 or not index.numel() or index.numel() % shape[1]:
        return None
    table = index.view(-1, shape[1])  # [rows, columns]
    first = table[:, :1]
    columns = torch.arange(shape[1], device=index.device, dtype=index.dtype)
    if (first % shape[1]).any() or (table != first + columns).any():
        return None
    return (first[:, 0] // shape[1]).long()
