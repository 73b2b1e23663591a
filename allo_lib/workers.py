"""The server that worker processes are forked from: it has the library imported already."""

import multiprocessing
from multiprocessing import forkserver


def fork_server():
    """The multiprocessing context of the workers.

    A server process imports the library once and forks a worker from itself in no time, safe where
    a fork of a notebook's own process, with its threads, is not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allo_lib.parallel"])
    return context


def start_early() -> None:
    """Start the server now, so that it imports while the caller does something else."""
    fork_server()
    forkserver.ensure_running()
