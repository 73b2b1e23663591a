"""Threads, memory and worker processes: what makes training on a small CPU fast and steady.

Settings of threads and memory take effect only before torch loads, so `import allo_lib` makes them
first of all. Values that the user has set in the environment are left alone.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import sys
import threading
import warnings
from multiprocessing import forkserver

# mallopt parameter numbers and values, glibc <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1
# What cuBLAS needs to add up in one order; read when CUDA starts.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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
        "attention by FlexAttention: compiled kernels, of which torch promises nothing",
        "cumsum of floating-point numbers, in sampling",
    ],
}


def configure() -> None:
    """Stop OpenMP threads from spinning for long, and keep freed memory in the process.

    Threads of two processes that spin for work slow each other by an order of magnitude; those that
    never spin are woken through the kernel at every operation, which costs a small model all that a
    second thread gains. A short spin, well under a millisecond, does neither. Memory given back to
    the system has to be touched page by page again at every step, which on virtual machines costs
    more than the arithmetic of a small model.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # libgomp's own count, over the policy
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Redrawn progress bars are off everywhere, so their missing widgets are nobody's concern.
    warnings.filterwarnings("ignore", message="IProgress not found")
    if "MALLOC_MMAP_MAX_" not in os.environ and (mallopt := _glibc("mallopt")):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


def make_deterministic(device: str) -> None:
    """On a GPU ("cuda"), have torch take deterministic algorithms where it has them.

    To be called before CUDA starts. Operations without such an algorithm run all the same and warn;
    `ON_GPU` lists those, and the manifest states them. On a CPU there is nothing to switch.
    """
    if device != "cuda":
        return
    import torch

    os.environ.setdefault(*_CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling new memory finds mistakes in kernels; it costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    # Its attention prepares itself anew for every shape, and rows have a new length at every step.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def plain_writes():
    """A block for writes to distinct places, of which no algorithm can spoil the result.

    Under `make_deterministic` torch would sort the places first and wait for the host to look at
    them, which costs more than the write.
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
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str):
    """A function of the C library, None where that is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return getattr(libc, name, None) if hasattr(libc, "gnu_get_libc_version") else None


@contextlib.contextmanager
def torch_threads(number: int):
    """Torch with `number` threads (0: as it is) inside the block.

    Results depend on the number by rounding, so whatever is trained in a worker must take as many
    when it is trained elsewhere.
    """
    import torch

    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fork_server():
    """The multiprocessing context of the workers.

    A server process imports the library once and forks a worker from itself in no time, safe where
    a fork of a notebook's own process, with its threads, is not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allo_lib.study.runs"])
    return context


def start_early() -> None:
    """Start the server now, so that it imports while the caller does something else.

    Needs no torch itself: a kernel calls it before it imports anything (`kernel`).
    """
    fork_server()
    forkserver.ensure_running()


def leave_with_parent() -> None:
    """In a worker: end as soon as the process that started it has ended, in whatever way.

    Without this a worker would finish its training after a run was killed, and take the cores from
    the run that goes on. The store is made for a process that ends in the middle of writing.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
