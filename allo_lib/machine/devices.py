"""One training on many devices, as `accelerate launch` starts it: a process for each of them.

Every process holds the model whole ("DDP", a config file without FSDP) or a part of it (FSDP2:
`torch.distributed.fsdp.fully_shard`). Each reads its own pairs of a step's batch and the results
are summed, so that they are those of one process up to rounding. torch's DistributedDataParallel
would exchange dense gradients: here the optimizer sums those of the kept entries (`MaskedAdamW`).

Scores, masks, masters and moments of a sharded model are sharded as its parameters are, along their
first dimension. Without a launcher every function here returns its argument.
"""

import contextlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from allo_lib.errors import AlloError

LARGEST, SMALLEST = dist.ReduceOp.MAX, dist.ReduceOp.MIN  # ways of `total`


def count() -> int:
    """How many processes take part; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; the first one, 0, alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def start(model) -> None:
    """Join the processes of the launcher, if there is one, with the model on this one's device.

    Where accelerate's config file says `use_fsdp` the model is sharded in place: every decoder
    layer, and all else together, tied embeddings included. Of that file's further settings none is
    read: the model keeps its dtype, gradients are reduced in float32.

    AlloError when the processes have other weights, as where only the first one loads them.
    """
    if _launched() < 2:
        return
    from accelerate import PartialState  # here, as it takes seconds, with what follows
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    cpu = not torch.accelerator.is_available() or _says("ACCELERATE_USE_CPU")
    device = PartialState(cpu=cpu).device
    if isinstance(model, fsdp.FSDPModule):
        return
    agree([value.sum(dtype=torch.float64).item() for value in model.parameters()], "weights")
    if not _says("ACCELERATE_USE_FSDP"):
        model.to(device)
        return
    how = {
        "mesh": init_device_mesh(device.type, (count(),)),
        # Else the outermost group would stay whole after a forward pass without gradients, and go
        # stale when the weights change.
        "reshard_after_forward": True,
        "mp_policy": fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for module in reversed([*model.modules()]):  # from the inside out
        if type(module).__name__ in (model._no_split_modules or ()):
            fsdp.fully_shard(module, **how)
    fsdp.fully_shard(model, **how)
    # For what reads parameters without calling their module's `forward`, as the head's.
    model.inside = lambda function, *arguments: function(*arguments)
    fsdp.register_fsdp_forward_method(model, "inside")


def inside(model, function: Callable, *arguments):
    """function(*arguments) while the parameters of a sharded model's outermost group are whole."""
    return model.inside(function, *arguments) if _is_sharded_model(model) else function(*arguments)


@contextlib.contextmanager
def quiet():
    """Within it all processes but the first print nothing."""
    with contextlib.ExitStack() as stack:
        if _launched() > 1 and os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


# --- what one process holds of a tensor ----------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without a gradient; all of a plain one."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "placements")  # a DTensor; to import that class takes seconds


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """Values of this process's part of a parameter as a tensor that is sharded as that one is."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(values, mesh, placements, shape=shape, stride=stride)


def begin(tensor: Tensor) -> int:
    """The flat place at which this process's part of a tensor begins."""
    if not is_sharded(tensor) or not tensor.numel():
        return 0
    length = tensor.shape[0]
    rows = -(-length // count())  # as torch.chunk, and so Shard(0), cuts it
    return min(rank() * rows, length) * (tensor.numel() // length)


def held(index: Tensor, tensor: Tensor) -> Tensor:
    """Of sorted flat places of a tensor those in this process's part, counted from its begin."""
    if not is_sharded(tensor):
        return index
    first = begin(tensor)
    return index[(index >= first) & (index < first + local(tensor).numel())] - first


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_weights(model) -> dict[str, Tensor] | None:
    """The state dict of a sharded model on the CPU of the first process; None if not sharded."""
    if not _is_sharded_model(model):
        return None
    seen: dict[int, Tensor] = {}  # tied ones once
    result = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            full = whole(value.detach())
            seen[id(value)] = full.cpu() if rank() == 0 else full.new_empty(0)
        result[name] = seen[id(value)]
    return result


def is_copy(parameter: Tensor) -> bool:
    """Whether every process holds this parameter whole, so that nobody else sums its gradient."""
    return count() > 1 and not is_sharded(parameter)


# --- what the processes exchange -----------------------------------------------------------------


def total(values: Tensor, how=dist.ReduceOp.SUM) -> Tensor:
    """The sum (`how`: or another reduction) over all processes, in the place of `values`."""
    if count() == 1:
        return values
    # Where the processes' backend reads them.
    on_gpu = "nccl" in dist.get_backend()
    device = torch.accelerator.current_accelerator() if on_gpu else torch.device("cpu")
    there = values.contiguous() if values.device.type == device.type else values.to(device)
    dist.all_reduce(there, how)
    return values.copy_(there) if there is not values else values


def means(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means of scalars over all processes."""
    if count() == 1:
        return numbers
    values = total(torch.stack([value.double() for value in numbers.values()])) / count()
    return dict(zip(numbers, values, strict=True))


def average_gradients(parameters: list[Tensor]) -> None:
    """Give each the mean of its gradients over the processes; None where all of them have none."""
    if count() == 1 or not parameters:
        return
    having = total(torch.tensor([int(p.grad is not None) for p in parameters]))
    for parameter, some in zip(parameters, having.tolist(), strict=True):
        if some:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = total(own).div_(count())


def each(values: Tensor) -> Tensor:
    """The values [n] of every process, [processes, n] in their order."""
    return torch.stack([other.to(values.device) for other in _of_all(values.cpu())])


def of_first(value):
    """The first process's value on all of them."""
    return _of_all(value if rank() == 0 else None)[0]


def gathered(value) -> list | None:
    """The values of all processes, on the first one; None on the others."""
    if count() == 1:
        return [value]
    values = [None] * count() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def agree(value, what: str) -> None:
    """AlloError on all processes unless all have the same value."""
    if any(other != value for other in _of_all(value)):
        raise AlloError(
            f"align: the processes have different {what}; load the same model and pairs in all, "
            "from files or with the same seed"
        )


def _of_all(value) -> list:
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


# --- shares of the work --------------------------------------------------------------------------


def turns(chunks: list) -> list:
    """This process's of some chunks of work; as many in all of them, so that some come twice."""
    rounds = range(rank(), rank() + len(chunks), count())
    return [chunks[min(i, len(chunks) - 1)] for i in rounds]


def merged(results: list[list]) -> list[list]:
    """For each place the result of a process that has one there."""
    return [next(filter(None, several), []) for several in zip(*_of_all(results), strict=True)]


def split(collator: Callable, objective: Callable, terms: Callable):
    """All three for a process that reads and judges its share of a batch.

    terms: batch -> what the loss is a mean over (`losses.terms_of`); afterwards of the whole
    batch. The loss and metrics that a process gets are weighted so that their means over the
    processes are those of the whole batch. A process without a row of its own reads one of
    another's, and counts none of it: all take the same steps.
    """
    if count() == 1:
        return collator, objective, terms

    def collated(rows: list[dict]) -> dict[str, Tensor]:
        mine = rows[rank() :: count()]
        return collator(mine or rows[:1]) | {"counts": torch.tensor(bool(mine))}

    def own(batch: dict[str, Tensor]) -> Tensor:
        return terms(batch) * batch["counts"]

    def of_all(batch: dict[str, Tensor]) -> Tensor:
        return total(own(batch))

    def judged(logps: Tensor, batch: dict[str, Tensor]):
        loss, metrics = objective(logps, batch)
        weight = own(batch) * count() / of_all(batch).clamp(min=1)
        return loss * weight, {key: value * weight for key, value in metrics.items()}

    return collated, judged, of_all


def _is_sharded_model(model) -> bool:
    return hasattr(model, "inside")


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _says(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
