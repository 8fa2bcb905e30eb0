"""What test_faults.py runs: groups of ranks in each of which something goes wrong, all at the same time.

python -m tests.train.faulty_rank FOLDER leaves FOLDER/CASE.log, what the ranks of a case printed, and
FOLDER/results.json, how they ended. Ranks are forked after torch was imported, which takes longer than the cases.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nitscale.errors import UserError
from nitscale.train import faults
from nitscale.train.faults import FailedElsewhere, FaultsConfig, NotFinite, Watchdog
from nitscale.train.process import Process

CONFIG = FaultsConfig(startup_limit_s=60, step_limit_s=60, lost_after_s=10)
SHORT = replace(CONFIG, step_limit_s=3)


def raise_on_one(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 1:
        raise ValueError("the data are mouldy")
    dist.barrier()


def raise_on_rank_0(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 0:
        raise UserError("train: no such data")
    time.sleep(60)


def fail_together(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank != 1:
        raise FailedElsewhere("could not write (rank 1: files: the disk is full)")
    time.sleep(0.5)
    raise UserError("files: the disk is full")


def raise_at_the_end(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 1:
        time.sleep(1)
        raise ValueError("too late")


def not_finite(rank: int, process: Process, watchdog: Watchdog) -> None:
    raise NotFinite("train: not finite")


def hang(rank: int, process: Process, watchdog: Watchdog) -> None:
    multiprocessing.get_context("fork").Process(target=sleep_for_ever).start()  # as the loader's workers
    dist.barrier()
    watchdog.phase("data", step=4)
    if rank == 2:
        sleep_for_ever()
    watchdog.phase("backward", step=5)
    dist.barrier()


def sleep_for_ever() -> None:
    while True:
        time.sleep(60)


def hang_alone(rank: int, process: Process, watchdog: Watchdog) -> None:
    watchdog.phase("data", step=4)
    sleep_for_ever()


def hang_with_the_lock(rank: int, process: Process, watchdog: Watchdog) -> None:
    faults.DUMP_S = 1.0
    watchdog.phase("data", step=4)
    time.sleep(1)
    ctypes.PyDLL(None).sleep(60)  # in C, without giving Python's lock away


def slow_but_within_its_limits(rank: int, process: Process, watchdog: Watchdog) -> None:
    for step in range(4):
        watchdog.phase("forward", step=step)
        time.sleep(1)
    watchdog.phase("save", limit_s=0)
    time.sleep(3)


def die_in_a_collective(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def die(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_on_rank_0(rank: int, process: Process, watchdog: Watchdog) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def end_with_rank_0_first(rank: int, process: Process, watchdog: Watchdog) -> None:
    time.sleep(rank)


def end_with_rank_0_last(rank: int, process: Process, watchdog: Watchdog) -> None:
    time.sleep(1 - rank)


CASES = [
    (raise_on_one, 3, CONFIG),
    (raise_on_rank_0, 2, CONFIG),
    (fail_together, 3, CONFIG),
    (raise_at_the_end, 2, CONFIG),
    (not_finite, 2, CONFIG),
    (hang, 3, SHORT),
    (hang_alone, 1, SHORT),
    (hang_with_the_lock, 1, SHORT),
    (slow_but_within_its_limits, 1, SHORT),
    (die_in_a_collective, 2, CONFIG),
    (die, 3, CONFIG),
    (die_on_rank_0, 2, CONFIG),
    (end_with_rank_0_first, 2, CONFIG),
    (end_with_rank_0_last, 2, CONFIG),
]


def run_rank(case, world_size: int, config: FaultsConfig, rank: int, folder: Path) -> None:
    """A rank, as `nitscale train` is one."""
    log = os.open(folder / f"{case.__name__}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    store = dist.FileStore(str(folder / f"{case.__name__}.store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    process = Process(rank, world_size, torch.device("cpu"))
    with Watchdog(config, process, folder / case.__name__, interval_s=0.2) as watchdog:
        case(rank, process, watchdog)
    os._exit(0)


def main(folder: Path) -> None:
    started = {}
    for case, world_size, config in CASES:
        group = 0
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, group)
                run_rank(case, world_size, config, rank, folder)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, group)  # by parent and child, whoever comes first
            group = group or pid
            started[pid] = (case.__name__, rank, group)
    began = time.monotonic()
    results = {case.__name__: {"codes": [0] * size, "order": [], "left": []} for case, size, _ in CASES}
    groups = {case: group for case, _, group in started.values()}
    while started:
        pid, status = os.wait()
        case_name, rank, _ = started.pop(pid)
        result = results[case_name]
        result["codes"][rank] = os.waitstatus_to_exitcode(status)
        result["order"].append(rank)
        result["seconds"] = time.monotonic() - began
    for case_name, group in groups.items():
        deadline = time.monotonic() + 10  # orphans are zombies until the system has reaped them
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(group, 0)
                time.sleep(0.05)
            os.killpg(group, signal.SIGKILL)
            results[case_name]["left"].append(group)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
