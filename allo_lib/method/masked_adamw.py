"""AdamW that trains a mask: state for kept entries only, all others never change by a bit.

Of whole rows of a linear layer no gradient is made but theirs (`row_forward`).
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.machine.runtime import plain_writes
from allo_lib.method.neurons import NeuronMask

Masters = dict[str, tuple[Tensor | None, Tensor]]  # name -> (flat places or None for all, values)


class MaskedAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) on the kept entries of a model's parameters.

    The optimizer's own parameters are *packed*: one float32 vector per tensor with the master
    values of its kept entries, to which torch's AdamW is applied unchanged. A hook on each of the
    model's parameters gathers the kept entries of its gradient as soon as that is complete, adds
    them to the packed gradient and drops the dense one, so that at most one dense gradient is
    alive. `step` writes the masters back, rounded to the dtype of the weights.

    State per kept entry: int32 index, master, packed gradient, two moments (20 bytes). A tensor
    kept whole needs no index, and in float32 its own storage is the master. Of a linear layer of
    which whole rows are kept (`granularity="row"`) the gradient of those rows alone is computed,
    straight into the packed one, and an index of rows is enough.

    Parameters without kept entries get `requires_grad=False` until `close`, so that backward
    computes nothing for them and ends at the lowest kept one.

    Args:
        model: its trainable parameters, named as in the mask, on the device of the training.
        mask: the kept entries, or None for every trainable entry.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; decay touches kept entries only.
        max_grad_norm: clip by the global norm of the kept entries' gradient, taken at `step`, that
            is after all accumulation; None leaves gradients as they are. In `transformers.Trainer`
            set its own `max_grad_norm` to 0: the dense gradients it would clip are gone.
        masters: `packed_masters` of an earlier optimizer of this model, of any mask. Training goes
            on from these values where the weights, rounded to bf16, have lost most of a small
            update; kept entries that the earlier mask did not keep start from the weights. What is
            taken leaves the dict, so that it is not held twice.

    Raises:
        AlloError: a mask of another model, a mask that keeps nothing or entries of a frozen
            parameter, a model without trainable parameters, or max_grad_norm not above 0.
        ValueError: torch's own, for lr, betas, eps and weight_decay.

    Of several processes (`devices`) each has the state of the entries that it holds. `step` makes
    the packed gradients of a model that all hold whole their mean; fully_shard makes those of a
    sharded one.

    `step` also clears the packed gradients, as Trainer only clears the model's.
    """

    grad_scale: Tensor | None  # there while a GradScaler calls `step`

    def __init__(
        self,
        model: nn.Module,
        mask: NeuronMask | None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        masters: Masters | None = None,
    ):
        kept = None
        if mask is not None:
            mask.check(model)
            counts = torch.tensor([index.numel() for index in mask.indices.values()])
            found = devices.total(counts).tolist()  # the same names in all processes
            kept = {name for name, number in zip(mask.indices, found, strict=True) if number}
            if not kept:
                raise AlloError("MaskedAdamW: the mask keeps no entry; select a larger share")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise AlloError(f"MaskedAdamW: max_grad_norm is {max_grad_norm}, expected > 0 or None")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; float32 scalar
        # Bool scalar on the device once `guard` was called: whether a number was not finite. From
        # then on steps change nothing, so that the host may learn of it late.
        self.refused: Tensor | None = None
        self._began = False
        linears = _linears_by_weight(model)
        self._packed = [
            _Packed(
                name,
                parameter,
                None if mask is None else mask.indices.get(name),
                (masters or {}).get(name),
                linears.get(parameter),
            )
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (kept is None or name in kept)
        ]
        if not self._packed:
            raise AlloError("MaskedAdamW: the model has no trainable parameter; unfreeze some")
        trained = [packed.master for packed in self._packed]
        # Of torch's updates only the fused one can be called off on the device (`guard`).
        fused = all(master.device.type in ("cpu", "cuda", "mps", "xpu") for master in trained)
        super().__init__(
            trained, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
        # From here on nothing can fail: a refused call leaves the model as it was.
        for packed in self._packed:
            packed.attach()
            (masters or {}).pop(packed.name, None)
        taken = {id(packed.parameter) for packed in self._packed}
        others = (p for p in model.parameters() if p.requires_grad and id(p) not in taken)
        self._frozen = [parameter.requires_grad_(False) for parameter in others]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, update the masters, write them into the model; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._began:
            self._follow_model()
        self._began = True
        devices.average_gradients([p.master for p in self._packed if devices.is_copy(p.parameter)])
        masters = [packed.master for packed in self._packed]
        gradients = [master.grad for master in masters if master.grad is not None]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:  # a GradScaler's, which the fused update would undo after the cut
            torch._foreach_div_(gradients, scale)
            self.grad_scale = None
        norm = nn.utils.get_total_norm(gradients) if gradients else None
        if norm is not None and devices.is_sharded(self._packed[0].parameter):
            norm = devices.total(norm.square()).sqrt()
        self.grad_norm = norm
        if norm is not None and self.refused is not None:
            self.guard(norm)
            self.found_inf = self.refused.float()  # torch's fused update reads this
        if norm is not None and self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, norm)
        super().step()
        with plain_writes():
            for packed in self._packed:
                packed.write_back()
                packed.master.grad = None
        return loss

    def guard(self, number: Tensor) -> None:
        """Let this step, and every later one, change nothing if `number` is not finite.

        It is decided where the number is; the host need not wait for it. Whoever calls this reads
        `refused`, or the number itself, when it suits, and ends the training.
        """
        refused = ~torch.isfinite(number.detach())
        self.refused = refused if self.refused is None else self.refused | refused

    def packed_masters(self) -> Masters:
        """name -> (int32 places in the flattened tensor, float32 values), of kept entries only.

        The places are None where a tensor is kept whole. The values are the optimizer's own, not
        copies; `masters` of another optimizer takes them.
        """
        return {packed.name: (packed.places(), packed.master.detach()) for packed in self._packed}

    def state_bytes(self) -> int:
        """Bytes held beside the model itself: indices, masters, moments, and packed gradients."""
        held = 0
        for packed in self._packed:
            moments = self.state.get(packed.master, {})
            tensors = [moments.get("exp_avg"), moments.get("exp_avg_sq"), packed.index]
            tensors += [packed.master] if packed.owns_master else []
            held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
            held += packed.master.numel() * 4  # the packed gradient, alive from backward to step
        return held

    @torch.no_grad()
    def _follow_model(self) -> None:
        """Take the values of weights that somebody wrote since the masters were made, as a trainer
        does that loads a checkpoint's weights alone."""
        for packed in self._packed:
            packed.follow()

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, the masters (bf16 weights do not determine them), the mask's hash."""
        self._follow_model()
        masters = [packed.master.detach() for packed in self._packed]
        return super().state_dict() | {"masters": masters, "mask": self._mask_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the `state_dict` of the same model and mask; AlloError for any other."""
        state_dict = dict(state_dict)
        masters = state_dict.pop("masters", [])
        if state_dict.pop("mask", None) != self._mask_hash:
            raise AlloError("MaskedAdamW: the saved state is of another mask; resume with its mask")
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for packed, master in zip(self._packed, masters, strict=True):
                packed.master.copy_(master)
                packed.write_back()

    @cached_property
    def _mask_hash(self) -> str:
        """Of names, shapes and places. Kept: it copies all places to the host, and a wrapper of the
        optimizer may ask for its state at every start of a training."""
        digest = hashlib.sha256()
        for packed in self._packed:
            digest.update(f"{packed.name}:{tuple(packed.parameter.shape)};".encode())
            places = packed.places()
            if places is not None:
                digest.update(places.cpu().numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Remove the hooks and make the frozen parameters trainable again."""
        for packed in self._packed:
            packed.detach()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


class _Packed:
    """The kept entries of one parameter: where they are, their masters, their gradient.

    index: places in the weight seen as `shape`: kept rows, where a linear layer keeps whole ones
    ([-1, columns]), else kept entries ([-1]); None where the tensor is kept whole.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        index: Tensor | None,
        before: tuple[Tensor | None, Tensor] | None,
        linear: nn.Linear | None,
    ):
        self.name, self.parameter = name, parameter
        self.linear: nn.Linear | None = None  # where whole rows are kept
        self.shape: tuple[int, ...] = (-1,)
        own = devices.local(parameter)
        index = None if index is None else devices.held(index, parameter)
        if index is not None and index.numel() == own.numel():
            index = None
        if index is not None and linear is not None and not devices.is_sharded(parameter):
            columns = linear.in_features
            rows = index[::columns] // columns
            whole = index.numel() == rows.numel() * columns
            if whole and not (_places(rows, columns) != index).any():
                index, self.linear, self.shape = rows, linear, (-1, columns)
        kind = torch.int32 if own.numel() < 2**31 else torch.int64
        self.index = None if index is None else index.to(own.device, kind)
        values = self._gather(own)
        self.owns_master = index is not None or parameter.dtype != torch.float32
        if self.owns_master:
            values = values.float() if before is None else self._gather(_refined(own, *before))
        self.master = nn.Parameter(values)

    def attach(self) -> None:
        """From now on the gradient of the kept entries gathers in `master.grad`."""
        if self.linear is None or self.index is None:
            self.hook = self.parameter.register_post_accumulate_grad_hook(self._take_gradient)
        else:
            self.parameter.requires_grad_(False)
            # A partial, as a copy of the model then has its own: a closure would share this one's.
            forward = partial(row_forward, self.linear, self.index.long(), self.master)
            self.linear.forward = forward  # type: ignore[method-assign]

    def detach(self) -> None:
        """Undo `attach`."""
        if self.linear is None:
            self.hook.remove()
        else:
            vars(self.linear).pop("forward", None)
            self.parameter.requires_grad_(True)

    def places(self) -> Tensor | None:
        """Flat places of the kept entries, in the dtype of `index`; None for all of them."""
        if self.linear is None or self.index is None:
            return self.index
        return _places(self.index, self.linear.in_features)

    def _gather(self, dense: Tensor) -> Tensor:
        if self.index is None:
            return dense.view(-1)
        return dense.view(self.shape).index_select(0, self.index).view(-1)

    def _take_gradient(self, parameter: Any) -> None:
        kept = self._gather(devices.local(parameter.grad).contiguous()).float()
        parameter.grad = None
        if self.master.grad is None:
            self.master.grad = kept
        else:
            self.master.grad += kept

    def write_back(self) -> None:
        """Write the masters into the model, rounded to its dtype."""
        if not self.owns_master:
            return
        weight = devices.local(self.parameter.data).view(self.shape)
        rounded = self.master.detach().to(weight.dtype).view(self.shape)
        if self.index is None:
            weight.copy_(rounded)
        else:
            weight.index_copy_(0, self.index.long(), rounded)

    def follow(self) -> None:
        """Where the model holds another value than the master's rounded one, take that."""
        if self.owns_master:
            now = self._gather(devices.local(self.parameter.data))
            other = now != self.master.detach().to(now.dtype)
            self.master.copy_(torch.where(other, now.float(), self.master.detach()))


def row_forward(module: nn.Linear, rows: Tensor, masters: Tensor, x: Tensor) -> Tensor:
    """The output for x [..., in] of a linear layer of which only some output rows are trained.

    With y = x W^T the weight's gradient is dW = dy^T x; of its rows only dW[rows] = dy[:, rows]^T x
    is computed, a share of the rows of one third of the arithmetic of a training step.

    rows: int64 [k], of the weight [out, in], sorted. masters: float32 leaf [k * in], whose `.grad`
    gets their gradient; the weight itself gets none. The bias, if any, is trained as before.
    """
    parts: list[Tensor | None] = [x, module.weight, module.bias]
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # as it does for the product itself, backward included
        dtype = torch.get_autocast_dtype(kind)
        parts = [None if part is None else part.to(dtype) for part in parts]
    return _RowProduct.apply(*parts, masters, rows)


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, masters: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)  # [..., out] -> [tokens, out]
        to_masters = to_bias = None
        if ctx.needs_input_grad[3]:
            # index_select along a row's entries is slower on a CPU, most in bfloat16.
            kept = gradient.gather(1, rows.expand(len(gradient), -1)).T @ x  # [k, in]
            to_masters = kept.flatten().float()
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum(dim=0)
        return to_x, None, to_bias, to_masters, None


def _places(rows: Tensor, columns: int) -> Tensor:
    """Flat places of whole rows: [rows * columns], in the dtype of `rows`."""
    inside = torch.arange(columns, device=rows.device, dtype=rows.dtype)
    return (rows[:, None] * columns + inside).view(-1)


def _linears_by_weight(model: nn.Module) -> dict[Tensor, nn.Linear]:
    """weight -> the plain linear layer it belongs to; none that several modules share, as tied
    embeddings do, and none that is used without being called, as the head is (`head`)."""
    modules, head = [*model.modules()], getattr(model, "get_output_embeddings", lambda: None)()
    uses = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    linears = [m for m in modules if type(m) is nn.Linear and m is not head]
    return {m.weight: m for m in linears if uses[id(m.weight)] == 1}


def _refined(parameter: Tensor, index: Tensor | None, values: Tensor) -> Tensor:
    """The parameter in float32 with `values` at the flat places `index` (None: everywhere)."""
    dense = parameter.detach().float().clone()
    if index is None:
        dense.view(-1).copy_(values.view(-1))
    else:
        dense.view(-1).index_copy_(0, index.long(), values)
    return dense
