"""Groups of ranks that are forked from a process which has imported everything: the import takes longer than a case."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Group:
    """The ranks of one run, in a process group of their own."""

    name: str
    leader: int
    ranks: dict[int, int]
    """Ranks by process id."""
    codes: list[int | None]
    """Exit codes by rank."""
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    left: bool = False
    """Whether the ranks left processes behind."""


def fork_ranks(name: str, world_size: int, rank_main: Callable[[int], None], log: Path) -> Group:
    """Start ranks with the environment that torchrun would give them; what they print goes into `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = Group(name, 0, {}, [None] * world_size)
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, group.leader)
            run_rank(rank_main, rank, world_size, port, log)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, group.leader)  # by parent and child, whoever comes first
        group.leader = group.leader or pid
        group.ranks[pid] = rank
    return group


def run_rank(rank_main: Callable[[int], None], rank: int, world_size: int, port: int, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        rank_main(rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait_for_groups(groups: list[Group]) -> None:
    """Return when all ranks have ended; what they left behind is killed."""
    running = {pid: group for group in groups for pid in group.ranks}
    while running:
        pid, status = os.wait()
        group = running.pop(pid)
        group.codes[group.ranks[pid]] = os.waitstatus_to_exitcode(status)
        group.seconds = time.monotonic() - group.began
    for group in groups:
        deadline = time.monotonic() + 10  # orphans are zombies until the system has reaped them
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(group.leader, 0)
                time.sleep(0.05)
            os.killpg(group.leader, signal.SIGKILL)
            group.left = True
