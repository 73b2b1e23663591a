"""Workers do not outlive the run that they work for."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from allo_lib.machine.environment import child_environment

_RUN = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from allo_lib.machine.runtime import fork_server, leave_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=fork_server(), initializer=leave_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def _runs(pid: int) -> bool:
    # A dead process stays listed until somebody asks how it ended.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_the_process_that_asked_for_it(tmp_path, number):
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=child_environment()
    )
    with run.stdout:
        worker = int(run.stdout.readline())
    try:
        assert _runs(worker)
        run.send_signal(number)
        run.wait()
        until = time.monotonic() + 10
        while _runs(worker) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _runs(worker)
    finally:
        run.kill()
        run.wait()
        if psutil.pid_exists(worker):
            psutil.Process(worker).kill()
