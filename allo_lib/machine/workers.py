"""The server that worker processes are forked from, and how many threads torch takes."""

import contextlib
import multiprocessing
import os
import threading
from multiprocessing import forkserver


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
    """In a worker: end as soon as the process that asked for it has ended, in whatever way.

    Without this a worker would finish its training after a run was killed, and take the cores from
    the run that goes on. The store is made for a process that ends in the middle of writing.
    """
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
