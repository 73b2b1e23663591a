"""Bytes of tensors alive, and at most: counted by their storages, real or fake."""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is made within it, forward and backward, as long as it is alive.

    Where a fake tensor would have to be read, the answer is yes, 1, or all of them: whether an
    index is one of whole rows, say (`True` ends that question with no).
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = self._answer(function, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _answer(self, function, args, kwargs):
        if args and isinstance(args[0], FakeTensor):
            if function is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1
            if function is torch.ops.aten.nonzero.default:
                return torch.arange(args[0].numel(), device=args[0].device)[:, None]
        return function(*args, **kwargs)

    def _count(self, storage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
