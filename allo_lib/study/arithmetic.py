"""The floor under a step's time: its counted operations at the rate of a large matrix product."""

import time
from contextlib import AbstractContextManager

import torch
from torch.utils.flop_counter import FlopCounterMode

# Of the square matrices: a tenth of a second in all on a CPU; on a GPU so large that starting the
# product takes no time beside it.
_SIZES = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5


def counter() -> AbstractContextManager:
    """Counts the floating-point operations (2 for a multiply-add) of matrix products and attention
    made within it, forward and backward: `.get_total_flops()`."""
    return FlopCounterMode(display=False)


@torch.no_grad()
def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a square matrix product, the best of five after a first one."""
    generator = torch.Generator(device).manual_seed(0)
    size = _SIZES[torch.device(device).type]
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    best = float("inf")
    for number in range(_REPEATS + 1):
        wait_for(device)
        start = time.perf_counter()
        left @ right
        wait_for(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait_for(device: str) -> None:
    """Return when all work given to the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
