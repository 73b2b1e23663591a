"""Attention tree by tree where one row holds many of them, for devices that gain by it (CPUs).

A row of several trees (`prefix_tree`) needs no padding, but a mask over the whole row makes every
token pay for all others: of a step on a CPU, attention was then 26 to 31% for a tenth of the
arithmetic. Here the row is cut at the trees' ends, inside attention only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allo_lib.engine.prefix_tree import sees


class TreeByTree(TorchFunctionMode):
    """Within it, `scaled_dot_product_attention` over one row of trees is made for each tree alone.

    ends: int64 [1, L] (`prefix_tree.sees`). sizes: int64 [trees], tokens of each tree, in order;
    they add up to L. The mask that the model hands over is not looked at: see `no_mask`.
    """

    def __init__(self, ends: Tensor, sizes: Tensor):
        super().__init__()
        self.sizes = sizes.tolist()
        starts = sizes.cumsum(0) - sizes
        own = (ends[0] - starts.repeat_interleave(sizes)).split(self.sizes)  # [l] each
        self.masks = [sees(one[None]) for one in own]  # bool [1, 1, l, l]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions; only attention is another one."""
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, **settings) -> Tensor:
        parts = (part.split(self.sizes, dim=-2) for part in (query, key, value))
        return torch.cat(
            [
                F.scaled_dot_product_attention(*own, attn_mask=mask, **settings)
                for *own, mask in zip(*parts, self.masks, strict=True)
            ],
            dim=-2,
        )


def no_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """What a model is given for a mask inside `TreeByTree`: NaN, [1, 1, L, L], of one number.

    A model that attended with it, by another function than that one, would give NaN and not
    something that looks right.
    """
    length = ends.shape[1]
    nothing = torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=ends.device)
    return nothing.expand(1, 1, length, length)
