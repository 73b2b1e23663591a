"""AdamW that trains a mask: state for kept entries only, all others never change by a bit.

`DenseMaskedAdamW` is what the released code does, to compare with.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from allo_lib.errors import AlloError
from allo_lib.machine import devices
from allo_lib.machine.runtime import plain_writes
from allo_lib.method.neurons import NeuronMask
from allo_lib.method.row_linear import RowLinear, whole_rows

_WATCHED = 2**20  # kept entries, about, that `moved` looks at

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
    straight into the packed one (`row_linear`), and an index of rows is enough.

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
            update; kept entries that the earlier mask did not keep start from the weights.

    Raises:
        AlloError: a mask of another model, a mask that keeps nothing or entries of a frozen
            parameter, a model without trainable parameters, or max_grad_norm not above 0.
        ValueError: torch's own, for lr, betas, eps and weight_decay.

    Of several processes (`devices`) each has the state of the entries that it holds. `step` makes
    the packed gradients of a model that all hold whole their mean; fully_shard makes those of a
    sharded one.

    `step` also clears the packed gradients, as Trainer only clears the model's.
    """

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
            kept = _kept_anywhere(mask)
            if not kept:
                raise AlloError("MaskedAdamW: the mask keeps no entry; select a larger share")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise AlloError(f"MaskedAdamW: max_grad_norm is {max_grad_norm}, expected > 0 or None")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; float32 scalar
        # Bool scalar on the device once `guard` was called: whether a number was not finite. From
        # then on steps change nothing, so that the host may learn of it late.
        self.refused: Tensor | None = None
        # Set `watch` to have every step leave in `moved` which share of the kept entries it changed
        # in the model's own dtype, by every so many of them: bf16 rounds small updates away.
        self.watch = False
        self.moved: Tensor | None = None  # float64 scalar on the device
        self._seen: list[Tensor] | None = None  # what the last watched step left
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
        devices.average_gradients([p.master for p in self._packed if devices.is_copy(p.parameter)])
        masters = [packed.master for packed in self._packed]
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else None
        if norm is not None and self._is_sharded:
            norm = devices.total(norm.square()).sqrt()
        self.grad_norm = norm
        if norm is not None and self.refused is not None:
            self.guard(norm)
            self.found_inf = self.refused.float()  # torch's fused update reads this
        before = (self._seen or self._sample()) if self.watch else []
        if norm is not None and self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, norm)
        super().step()
        with plain_writes():
            for packed in self._packed:
                packed.write_back()
                packed.master.grad = None
        self._seen = self._sample() if self.watch else None
        if self._seen is not None:
            pairs = zip(before, self._seen, strict=True)
            changed = torch.stack([(a != b).sum() for a, b in pairs]).sum()
            looked_at: int | Tensor = sum(values.numel() for values in before)
            if self._is_sharded:
                looked_at = devices.total(changed.new_tensor(looked_at))
                changed = devices.total(changed)
            self.moved = changed.double() / looked_at
        return loss

    @property
    def _is_sharded(self) -> bool:
        return devices.is_sharded(self._packed[0].parameter)

    def guard(self, number: Tensor) -> None:
        """Let this step, and every later one, change nothing if `number` is not finite.

        It is decided where the number is; the host need not wait for it. Whoever calls this reads
        `refused`, or the number itself, when it suits, and ends the training.
        """
        refused = ~torch.isfinite(number.detach())
        self.refused = refused if self.refused is None else self.refused | refused

    def _sample(self) -> list[Tensor]:
        """Copies of evenly chosen kept values as the model holds them, by dtype; all if few."""
        kept = sum(packed.master.numel() for packed in self._packed)
        stride = max(1, kept // _WATCHED)
        chosen: dict[torch.dtype, list[Tensor]] = {}
        for packed in self._packed:
            chosen.setdefault(packed.parameter.dtype, []).append(packed.sample(stride))
        return [torch.cat(values).to(dtype) for dtype, values in chosen.items()]

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that keep entries."""
        return tuple(packed.name for packed in self._packed)

    def master_weights(self) -> dict[str, Tensor]:
        """name -> float32 copy of each trained parameter, unkept entries taken from the model."""
        return {packed.name: packed.full() for packed in self._packed}

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
            tensors = [moments.get("exp_avg"), moments.get("exp_avg_sq"), packed.index, packed.rows]
            tensors += [packed.master] if packed.owns_master else []
            held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
            held += packed.master.numel() * 4  # the packed gradient, alive from backward to step
        return held

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, the masters (bf16 weights do not determine them), the mask's hash."""
        masters = [packed.master.detach() for packed in self._packed]
        return super().state_dict() | {"masters": masters, "mask": self._mask_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the `state_dict` of the same model and mask; AlloError for any other."""
        state_dict = dict(state_dict)
        masters = state_dict.pop("masters", [])
        if state_dict.pop("mask", None) != self._mask_hash:
            raise AlloError("MaskedAdamW: the saved state is of another mask; resume with its mask")
        super().load_state_dict(state_dict)
        self._seen = None
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

    rows: the kept rows of the weight of the layer `linear`, where it keeps whole ones. index: else
    flat places, None where the tensor is kept whole.
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
        own = devices.local(parameter)
        index = None if index is None else devices.held(index, parameter)
        whole = index is None or index.numel() == own.numel()
        by_row = linear is not None and not whole and not devices.is_sharded(parameter)
        rows = whole_rows(index, parameter.shape) if index is not None and by_row else None
        self.linear = None if rows is None else linear
        kind = torch.int32 if own.numel() < 2**31 else torch.int64
        self.rows = None if rows is None else rows.to(own.device, kind)
        places = None if whole or rows is not None else index
        self.index = None if places is None else places.to(own.device, kind)
        values = self._gather(own)
        self.owns_master = not (whole and parameter.dtype == torch.float32)
        if self.owns_master:
            values = values.float() if before is None else self._gather(_refined(own, *before))
        self.master = nn.Parameter(values)

    def attach(self) -> None:
        """From now on the gradient of the kept entries gathers in `master.grad`."""
        if self.linear is None or self.rows is None:
            self.hook = self.parameter.register_post_accumulate_grad_hook(self._take_gradient)
        else:
            self.taken = RowLinear(self.linear, self.rows.long(), self.master)
            self.taken.attach()

    def detach(self) -> None:
        """Undo `attach`."""
        if self.linear is None:
            self.hook.remove()
        else:
            self.taken.detach()

    def places(self) -> Tensor | None:
        """Flat places of the kept entries, in the dtype of `index`; None for all of them."""
        if self.rows is None:
            return self.index
        columns = self.parameter.shape[1]
        inside = torch.arange(columns, device=self.rows.device, dtype=self.rows.dtype)
        return (self.rows[:, None] * columns + inside).view(-1)  # [rows, columns] -> flat

    def _gather(self, dense: Tensor) -> Tensor:
        if self.rows is not None:
            return dense.index_select(0, self.rows).view(-1)
        flat = dense.view(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

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
        weight = devices.local(self.parameter.data)
        rounded = self.master.detach().to(weight.dtype)
        if self.rows is not None:
            weight.index_copy_(0, self.rows.long(), rounded.view(-1, weight.shape[1]))
        elif self.index is None:
            weight.view(-1).copy_(rounded)
        else:
            weight.view(-1).index_copy_(0, self.index.long(), rounded)

    def sample(self, stride: int) -> Tensor:
        """Every `stride`-th master, or all of every `stride`-th kept row."""
        masters = self.master.detach()
        if self.rows is not None:
            return masters.view(-1, self.parameter.shape[1])[::stride].flatten()
        return masters[::stride]

    def full(self) -> Tensor:
        """The parameter in float32, with the masters where there are some."""
        return _refined(devices.local(self.parameter), self.places(), self.master.detach())


def _linears_by_weight(model: nn.Module) -> dict[nn.Parameter, nn.Linear]:
    """weight -> the plain linear layer it belongs to; none that several modules share, as tied
    embeddings do, and none that is used without being called, as the head is (`head`)."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    used_bare = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        parameter: modules[0]
        for parameter, modules in owners.items()
        if len(modules) == 1
        and type(modules[0]) is nn.Linear
        and modules[0].weight is parameter
        and modules[0] is not used_bare
    }


def _refined(parameter: Tensor, index: Tensor | None, values: Tensor) -> Tensor:
    """The parameter in float32 with `values` at the flat places `index` (None: everywhere)."""
    dense = parameter.detach().float().clone()
    if index is None:
        dense.view(-1).copy_(values.view(-1))
    else:
        dense.view(-1).index_copy_(0, index.long(), values)
    return dense


def _kept_anywhere(mask: NeuronMask) -> set[str]:
    """Names of the tensors of which a process keeps entries: the same ones in all processes."""
    counts = [index.numel() for index in mask.indices.values()]
    found = devices.total(torch.tensor(counts, dtype=torch.int64)).tolist()
    return {name for name, number in zip(mask.indices, found, strict=True) if number}


class DenseMaskedAdamW:
    """What the released code does: AdamW with dense moments whose update is times a dense mask.

    Its mask is bfloat16 and its masters are float32, as there. It saves neither memory nor time;
    here it is the thing to compare with. `step` reads `parameter.grad`.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: NeuronMask,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.lr, self.betas, self.eps, self.count = lr, betas, eps, 0
        self.rows: list[tuple[Any, Tensor, Tensor, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            dense = mask.dense(name).to(parameter.device, torch.bfloat16)
            whole = parameter.dtype == torch.float32
            master = parameter.detach() if whole else parameter.detach().float()
            moments = torch.zeros_like(master), torch.zeros_like(master)
            self.rows.append((parameter, dense, master, *moments))

    @torch.no_grad()
    def step(self) -> None:
        """AdamW without decay (arXiv 1711.05101, algorithm 2), the update times the mask."""
        self.count += 1
        first, second = (1 - beta**self.count for beta in self.betas)
        for parameter, mask, master, mean, square in self.rows:
            gradient = parameter.grad.float()
            mean.lerp_(gradient, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            update = (mean / first) / ((square / second).sqrt_() + self.eps)
            master.sub_(update * mask, alpha=self.lr)
            if master.data_ptr() != parameter.data_ptr():
                parameter.copy_(master)
            parameter.grad = None

    def state_bytes(self) -> int:
        """Mask, moments, masters where they are copies, and the dense gradient."""
        return sum(
            mask.nbytes
            + mean.nbytes
            + square.nbytes
            + (0 if master.data_ptr() == parameter.data_ptr() else master.nbytes)
            + parameter.nbytes
            for parameter, mask, master, mean, square in self.rows
        )
