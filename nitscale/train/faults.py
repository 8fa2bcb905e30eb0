"""How a run ends other than by its last step: a signal, a rank that fails, one that hangs, one that is gone.

`StopSignals` remembers that the run was asked to stop; the loop ends it after the step in progress. `Watchdog` is a
thread on every rank, which works while the main thread is stuck in a collective. It posts a heartbeat (what this rank
does, in which step, since when) to a store of its own on rank 0, and ends the process
- when the main thread has been in one phase longer than that may take: the stacks of all ranks go into RUN/hangs;
- when another rank has failed: every rank ends within seconds, and the message of the one that failed comes first;
- when another rank no longer posts: it was killed, or its node is lost.

torch is imported only where it is used: the signals must be caught before it, which takes seconds to import.
"""

import faulthandler
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from nitscale.errors import UserError
from nitscale.train.spikes import SpikeConfig

if TYPE_CHECKING:
    from nitscale.train.process import Process

FORCE_AFTER_S = 2.0
"""A Ctrl-C this long after the first one ends the run at once. Within it, a launcher may pass on what the terminal
already sent."""
NOTICE_S = 3.0
"""Longest wait of rank 0, which keeps the store, for the others to read why the run ends."""
LINGER_S = 2.0
"""Time that ranks leave to the one that failed, so that a launcher sees it end first and names it as the cause."""
DUMP_S = 60.0
"""Longest time for writing what a hang looks like, on a file system that may be why it hangs."""


class ExitCode(IntEnum):
    """How `nitscale train` ends. torchrun turns every code but 0 into its own 1; it prints the rank's code."""

    COMPLETE = 0
    """The last step is done, and in a checkpoint."""
    FAILED = 1
    """An error, of this rank or another; the message says whose."""
    STOPPED = 75
    """Asked to stop by a signal; the last step done is in a checkpoint. The same command goes on (EX_TEMPFAIL)."""
    HUNG = 76
    """A phase took longer than its limit. The stacks are in RUN/hangs; the same command goes on from the newest
    checkpoint."""
    NOT_FINITE = 77
    """Too many steps in a row had a loss or a gradient that was not finite; running again repeats them. What they
    trained on is in RUN/nonfinite.json. (2 is for a command line that cannot be read.)"""


class FailedElsewhere(UserError):
    """Another rank has failed in what all do together; it says why."""


class NotFinite(UserError):
    """Training cannot go on: step after step is not finite."""

    exit_code = ExitCode.NOT_FINITE


@dataclass(frozen=True)
class FaultsConfig:
    """When a run ends by itself. Limits are seconds; 0 switches one off."""

    startup_limit_s: float = 1800.0
    """Longest time for each part of the start: opening the data, building and loading the model, and anything in the
    first step, which compiles."""
    step_limit_s: float = 300.0
    """Longest time for anything in a later step: the next pack, a forward, a backward, the update."""
    save_limit_s: float = 1800.0
    """Longest time that a step waits for a checkpoint."""
    validation_limit_s: float = 1800.0
    """Longest time of one validation, or of one set of sampled images."""
    lost_after_s: float = 60.0
    """A rank that gives no sign of life for so long is taken for lost. Its watchdog gives one every second, however
    busy the rank is; only a call into C that keeps Python's lock delays it."""
    nonfinite_limit: int = 10
    """So many steps in a row that are not finite, and were skipped, end the run."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        for name in ("startup_limit_s", "step_limit_s", "save_limit_s", "validation_limit_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name):g}; 0 switches it off")
        if self.lost_after_s != 0 and self.lost_after_s < 5:
            raise ValueError(f"lost_after_s must be 0 or at least 5, got {self.lost_after_s:g}")
        if self.nonfinite_limit < 1:
            raise ValueError(f"nonfinite_limit must be at least 1, got {self.nonfinite_limit}")


class StopSignals:
    """Within the block, Ctrl-C, SIGTERM and SIGUSR1 only ask to stop. A Ctrl-C two seconds or more after the first
    signal raises KeyboardInterrupt. For the main thread."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the first signal that came."""
        self._asked = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._ask_to_stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._asked = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # Not by print, which must not be entered again while it writes.
                os.write(2, f"\ntrain: {self.name}: the run stops after this step and its checkpoint\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._asked > FORCE_AFTER_S:
            raise KeyboardInterrupt

    @contextmanager
    def kept_from_children(self) -> Iterator[None]:
        """A block whose child processes never get the signals: compilers, which a scheduler's SIGTERM to the whole job
        would end in the middle of a compilation. This process acts on the signals after the block, or at once where
        another thread takes them."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Phase(NamedTuple):
    """What the main thread does."""

    name: str
    step: int
    limit_s: float
    began: float


class Beat(NamedTuple):
    """What a rank last posted."""

    number: int
    """How many came before."""
    phase: str
    step: int
    age_s: float
    """Seconds in this phase."""

    def __str__(self) -> str:
        return f"'{self.phase}' of step {self.step} for {self.age_s:.0f} s"


class Failure(NamedTuple):
    """Why the run ends."""

    message: str
    code: int


class Watchdog:
    """Ends this rank when it hangs and when another one fails, hangs or is lost. A context manager around the whole
    training on all ranks: an exception that leaves the block on one of several ranks ends them all, and no rank leaves
    it normally before all do. A single process keeps its exceptions to itself.

    Before the block it only takes note of phases.
    """

    def __init__(self, config: FaultsConfig, process: "Process", run: Path, interval_s: float = 1.0) -> None:
        """`run`: folder of the run. `interval_s`: time between two heartbeats."""
        self.config = config
        self.process = process
        self.folder = run / "hangs"
        self.interval_s = interval_s
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._over = threading.Event()
        self._ending = threading.Lock()
        """Taken for ever by the thread that ends the process, so that the other cannot, too."""
        self._count = 0
        self._missed: dict[int, tuple[bytes, int]] = {}
        """By rank: its last beat, and how often it was found unchanged."""
        self._phase = Phase("start-up", 0, config.startup_limit_s, time.monotonic())

    def phase(self, name: str, limit_s: float | None = None, step: int | None = None) -> None:
        """The main thread begins something that may take `limit_s` seconds, by default those of a step; 0 is without
        limit. Costs a microsecond."""
        limit_s = self.config.step_limit_s if limit_s is None else limit_s
        self._phase = Phase(name, self._phase.step if step is None else step, limit_s, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self.process.world_size > 1:
            self._store = open_store(self.process, self.config.lost_after_s or 300.0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._store is not None and error is not None:
            self.fail(error)
        if self._store is not None:
            self._leave_together()
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def broadcast(self, error: BaseException) -> None:
        """End all ranks of several because of an error on this one, within the block; a single process goes on."""
        if self._store is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of an error on this one. The first rank that comes here prints its message, before any
        other knows of it; what fails on the others then is only a consequence and is not printed."""
        message = f"rank {self.process.rank}: {describe(error)}"
        if isinstance(error, FailedElsewhere):
            self._thread.join(NOTICE_S)  # for the other one to be the first
        try:
            if not self._is_first():
                self._thread.join(2 * NOTICE_S)  # it ends the process with the message of the first
            elif isinstance(error, RuntimeError) and (gone := self._silent()):
                # A collective that broke off, as gloo does when the process at its other end is gone.
                message = f"{' and '.join(f'rank {rank}' for rank in gone)} ended without a message; {message}"
        except lost_store():
            self._end(Failure(f"rank 0 ended without a message; {message}", ExitCode.FAILED), tell=False)
        self._end(Failure(message, getattr(error, "exit_code", ExitCode.FAILED)), stack_of(error))

    def _watch(self) -> None:
        """The thread."""
        while not self._over.wait(self.interval_s):
            try:
                self._check_own_phase()
                if self._store is not None:
                    self._exchange()
            except lost_store() as error:
                message = f"rank {self.process.rank}: rank 0 ended without a message ({error})"
                self._end(Failure(message, ExitCode.FAILED), tell=False)

    def _check_own_phase(self) -> None:
        phase = self._phase
        if not phase.limit_s:
            faulthandler.cancel_dump_traceback_later()
            return
        left_s = phase.limit_s - (time.monotonic() - phase.began)
        if left_s > 0:
            # A net below this thread, should something keep Python's lock, or the store not answer: C code without
            # either prints the stacks and exits with 1.
            faulthandler.dump_traceback_later(left_s + DUMP_S, exit=True, file=2)
        elif self._is_first():
            self._end(Failure(self._describe_hang(phase), ExitCode.HUNG))

    def _exchange(self) -> None:
        """Post this rank's beat, and see what the others posted: rank 0 watches all, the others watch rank 0."""
        rank, world_size = self.process.rank, self.process.world_size
        self._count += 1
        self._store.set(f"beat/{rank}", json.dumps(self._own_beat()))
        watched = [other for other in (range(world_size) if rank == 0 else [0]) if other != rank]
        failure, *beats = self._store.multi_get(["failure", *(f"beat/{other}" for other in watched)])
        if failure:
            self._follow(Failure(*json.loads(failure)))
        for other, beat in zip(watched, beats, strict=True):
            last, missed = self._missed.get(other, (b"", 0))
            missed = missed + 1 if beat == last else 0
            self._missed[other] = (beat, missed)
            # Own beats are the clock: after a pause of the whole job, none of the others is late.
            if self.config.lost_after_s and missed * self.interval_s > self.config.lost_after_s:
                silence = f"gave no sign of life for {self.config.lost_after_s:g} s"
                self._end(Failure(f"rank {other}: {silence}: it was killed, or its node is lost", ExitCode.FAILED))

    def _is_first(self) -> bool:
        """Whether this rank is the first that wants to end the run."""
        if self._store is None:
            return True
        own = str(self.process.rank)
        return self._store.compare_set("first", "", own) == own.encode()

    def _end(self, failure: Failure, details: str = "", tell: bool = True) -> NoReturn:
        """Print why the run ends, `tell` the others, and exit."""
        self._ending.acquire()
        say(f"error: {failure.message}\n{details}")
        if tell and self._store is not None:
            with suppress(lost_store()):
                self._store.set("failure", json.dumps(failure))
                self._store.add("noted", 1)
        self._exit(failure)

    def _follow(self, failure: Failure) -> NoReturn:
        """End this rank because another one has ended."""
        self._ending.acquire()
        with suppress(lost_store()):
            self._store.add("noted", 1)
        say(f"rank {self.process.rank} ends, too; {failure.message.splitlines()[0]}\n")
        if failure.code != ExitCode.HUNG:
            time.sleep(LINGER_S)
        self._exit(failure)

    def _exit(self, failure: Failure) -> NoReturn:
        if failure.code == ExitCode.HUNG:
            faulthandler.dump_traceback_later(DUMP_S, exit=True, file=2)
            self._dump(failure)
        if self._store is not None and self.process.rank == 0:
            with suppress(lost_store()):
                wait_until(lambda: int(self._store.get("noted")) == self.process.world_size, NOTICE_S)
        for child in multiprocessing.active_children():  # of the loader; it would take them seconds to notice
            child.kill()
        sys.stdout.flush()
        os._exit(failure.code)

    def _leave_together(self) -> None:
        """Return when all ranks are here: until then one may fail, and the store must stay until all have read it."""
        self.phase("end", self.config.save_limit_s)
        try:
            self._store.add("arrived", 1)
            wait_until(lambda: int(self._store.get("arrived")) == self.process.world_size, math.inf)
        except lost_store() as error:
            self.fail(error)
        self._over.set()
        self._thread.join()
        with suppress(lost_store()):  # rank 0 has gone on, as it may
            self._store.add("left", 1)
            if self.process.rank == 0:
                wait_until(lambda: int(self._store.get("left")) == self.process.world_size, NOTICE_S)

    def _own_beat(self) -> Beat:
        name, step, _, began = self._phase
        return Beat(self._count, name, step, round(time.monotonic() - began, 1))

    def _beats(self) -> dict[int, Beat]:
        """What all ranks last posted."""
        if self._store is None:
            return {0: self._own_beat()}
        texts = self._store.multi_get([f"beat/{rank}" for rank in range(self.process.world_size)])
        return {rank: Beat(*json.loads(text)) for rank, text in enumerate(texts)}

    def _silent(self) -> list[int]:
        """Other ranks that post nothing in the time of a few beats."""
        before = self._beats()
        time.sleep(3 * self.interval_s)
        return [rank for rank, beat in self._beats().items() if beat == before[rank] and rank != self.process.rank]

    def _describe_hang(self, phase: Phase) -> str:
        message = f"rank {self.process.rank}: '{phase.name}' of step {phase.step} took more than {phase.limit_s:g} s"
        beats = self._beats()
        behind = laggard(beats)
        if behind is not None:
            message += f"; rank {behind} is behind the others, in {beats[behind]}"
        return f"{message}; the stacks of all ranks are in {self.folder}"

    def _dump(self, failure: Failure) -> None:
        """Write what this rank was doing: RUN/hangs/rank-NNNNN.txt, and torch's record of the last collectives as
        RUN/hangs/collectives-N; `torchfrtrace RUN/hangs` compares those of NCCL between ranks."""
        rank = self.process.rank
        others = ""
        with suppress(lost_store()):
            others = "".join(f"  rank {other}: {beat}\n" for other, beat in self._beats().items())
        when, where = time.strftime("%Y-%m-%d %H:%M:%S"), f"{socket.gethostname()}, process {os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank-{rank:05d}.txt", "a") as file:
                file.write(
                    f"{when}, rank {rank} on {where}\n{failure.message}\n\nwhat each rank said last:\n{others}\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            if self.process.world_size > 1:
                (self.folder / f"collectives-{rank}").write_bytes(recorded_collectives(self.process.device.type))
        except OSError as error:
            say(f"rank {rank}: {self.folder} cannot be written ({error}); its stacks:\n")
            faulthandler.dump_traceback(2, all_threads=True)


def say(text: str) -> None:
    """Write to stderr at once; the watchdog's thread on a new line, for it may be in the middle of a progress bar."""
    start = "" if threading.current_thread() is threading.main_thread() else "\n"
    print(f"{start}{text}", end="", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """The error in words, as the command line shows it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was finished is kept, and the same command goes on from there"
    return f"{type(error).__name__}: {error}"


def stack_of(error: BaseException) -> str:
    """The traceback, where it is not the user's error."""
    if isinstance(error, (UserError, KeyboardInterrupt)) and not os.environ.get("NITSCALE_DEBUG"):
        return ""
    return "".join(traceback.format_exception(error))


def laggard(beats: Mapping[int, Beat]) -> int | None:
    """The rank that the others wait for: in the earliest step, there the longest in its phase, because the others have
    since begun another. None if ranks are too close to tell: heartbeats are a second or so old."""
    order = sorted(beats, key=lambda rank: (beats[rank].step, -beats[rank].age_s))
    if len(order) < 2:
        return None
    first, second = beats[order[0]], beats[order[1]]
    return order[0] if second.step > first.step or first.age_s - second.age_s > 2.5 else None


def open_store(process: "Process", timeout_s: float) -> Any:
    """A store for all ranks, on rank 0, apart from torch's own, which collectives use. `timeout_s`: longest wait for an
    answer of it. All ranks must call it. UserError, on all, if rank 0 cannot be reached."""
    import torch.distributed as dist

    host = os.environ.get("MASTER_ADDR", "localhost")
    stores: list[Any] = []

    def start() -> int:
        stores.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False))
        for key in ("arrived", "left", "noted"):
            stores[0].add(key, 0)
        stores[0].set("failure", "")
        for rank in range(process.world_size):
            stores[0].set(f"beat/{rank}", json.dumps(Beat(0, "start-up", 0, 0.0)))
        return stores[0].port

    port = process.decide(start)
    with process.together(f"reach rank 0 at {host}, port {port}"):
        if not stores:
            stores.append(dist.TCPStore(host, port, is_master=False))
    stores[0].set_timeout(timedelta(seconds=timeout_s))
    return stores[0]


def lost_store() -> type[Exception]:
    """What a store raises whose rank 0 is gone."""
    import torch.distributed as dist

    return dist.DistError


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Return when the condition holds, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def record_collectives() -> None:
    """Let torch keep the last 2000 collectives of each rank, for `Watchdog` to write down. Before the first group."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def recorded_collectives(device: str) -> bytes:
    """torch's flight recorder, pickled. It has one for NCCL and one for the others."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace" if device == "cuda" else "_dump_fr_trace", None)
    return dump() if dump is not None else b""
