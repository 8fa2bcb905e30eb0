"""A group of training processes on one machine, as torchrun would start it, with readable failures."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

import torch

from nitscale.errors import UserError
from nitscale.train.faults import ExitCode

ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    # Keep freed memory: glibc gives tensors of this size back to the system after each use, a sixth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment of a rank that has one core."""


def run_ranks(arguments: Sequence[str], ranks: int, quiet: bool = False) -> None:
    """`python -m nitscale ARGUMENTS` as a group of ranks; only the first speaks, and if `quiet` none.

    Ctrl-C reaches all of them, SIGTERM is passed on, and both are theirs to answer. UserError with the last words of a
    rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    on_cpu = {} if torch.cuda.is_available() else ONE_CORE
    processes: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    with ExitStack() as stack:
        for number, handler in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, pass_on)):
            stack.callback(signal.signal, number, signal.signal(number, handler))
        silent = [quiet or rank > 0 for rank in range(ranks)]
        words = [stack.enter_context(tempfile.TemporaryFile("w+")) if silent[rank] else None for rank in range(ranks)]
        stack.callback(end, processes)
        for rank in range(ranks):
            process = subprocess.Popen(
                [sys.executable, "-m", "nitscale", *arguments],
                env=os.environ | shared | on_cpu | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL if silent[rank] else None,
                stderr=words[rank],
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                text=True,
            )
            processes.append(process)
        failed = wait_for_all(processes)
        if failed is not None:
            raise UserError(f"demo: a training process failed: {last_line(words[failed])}")


def wait_for_all(processes: Sequence[subprocess.Popen[str]]) -> int | None:
    """Wait until all have ended well, or were stopped, or one has failed; its rank."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, ExitCode.COMPLETE, ExitCode.STOPPED):
                return rank
        if None not in codes:
            return None
        time.sleep(0.05)


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Leave none running."""
    for process in processes:
        process.kill()
        process.wait()


def last_line(file: IO[str] | None) -> str:
    """What a process said last, or where to look."""
    if file is None:
        return "see its message above"
    file.seek(0)
    lines = file.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"
