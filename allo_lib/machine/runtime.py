"""Threads, memory and worker processes: what makes training on a small CPU fast and steady.

Settings of threads and memory take effect only before torch loads, so `import allo_lib` makes them
first of all. Values that the user has set in the environment are left alone.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from multiprocessing import forkserver, resource_tracker

from allo_lib.machine.arithmetic import same_on_every_x86, vectors_of_avx2

ON_CPU = {
    "repeats": "same commit, versions, seed and number of threads: the same bytes; else within the "
    "tolerances of allo_lib/cli/verify.py",
    "not deterministic": [],
}
# From the documentation of torch.use_deterministic_algorithms and from torch's attention kernels,
# for the operations that this library runs.
ON_GPU = {
    "repeats": "not to the byte: torch takes deterministic algorithms where it has them "
    "(use_deterministic_algorithms(True, warn_only=True), CUBLAS_WORKSPACE_CONFIG=:4096:8, "
    "cudnn.benchmark off)",
    "not deterministic": [
        "backward of scaled_dot_product_attention: the flash, memory-efficient and cuDNN kernels "
        "add in any order as long as torch only warns",
        "cumsum of floating-point numbers, in sampling",
    ],
}


def configure() -> None:
    """Stop OpenMP threads from spinning for long, and keep freed memory in the process.

    Threads of two processes that spin for work slow each other by an order of magnitude; a spin
    well under a millisecond does not, and is cheaper than waking a thread. Memory given back to the
    system has to be touched page by page again, which can cost more than a small model's step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # libgomp's own count, over the policy
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    vectors_of_avx2()
    # Redrawn progress bars are off everywhere, so their missing widgets are nobody's concern.
    warnings.filterwarnings("ignore", message="IProgress not found")
    if "MALLOC_MMAP_MAX_" not in os.environ:
        # Parameters of glibc's <malloc.h>: M_MMAP_MAX, then M_TRIM_THRESHOLD.
        _glibc("mallopt", -4, 0)
        _glibc("mallopt", -1, 2**31 - 1)


def make_deterministic(device: str) -> None:
    """On a GPU ("cuda"), have torch take deterministic algorithms where it has them (`ON_GPU`).

    To be called before CUDA starts. On a CPU: `arithmetic.same_on_every_x86`.
    """
    if device != "cuda":
        same_on_every_x86()
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    torch.backends.cudnn.benchmark = False
    # Its attention prepares itself again for every shape, and rows have a new length at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def plain_writes():
    """A block for writes to distinct places, which repeat in any order.

    Under `make_deterministic` torch would sort the places first, which makes the host wait and
    costs more than the write.
    """
    import torch

    wanted = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


def give_back_freed_memory() -> None:
    """Return freed heap to the system: before other processes need it, or memory is measured."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library, where that is glibc."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "gnu_get_libc_version"):
        getattr(libc, name)(*arguments)


@contextlib.contextmanager
def torch_threads(number: int):
    """Torch with `number` threads (0: as it is) inside the block; rounding depends on it."""
    import torch

    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fork_server():
    """The multiprocessing context of the workers: forks of a server that has imported the library.

    A fork of a notebook's own process, with its threads, would not be safe.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allo_lib.study.runs"])
    return context


def start_early() -> None:
    """Start the server now, so that it imports while the caller does something else."""
    fork_server()
    resource_tracker.ensure_running()  # the server would start it, which lets signals through again
    # A notebook's kernel is interrupted as it ends, with all of its group: not while this imports.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def leave_with_parent() -> None:
    """In a worker: end as soon as the process that started it has ended, in whatever way.

    Else it would take the cores from the run that goes on after a kill.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
