"""Stages of a job that run at once: threads that hand things to each other through bounded channels, and end together.

A channel holds its sender back while it is full, so that no stage runs away from the next one and memory stays bounded.
When a stage fails, or the main thread leaves the block, every channel is stopped and every thread comes to its end.
A `Clock` adds up how long each stage worked.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Another stage has failed, or the job is being left."""


class Stoppable(Protocol):
    def stop(self) -> None:
        """Wake up everybody who waits, with Stopped."""


class Channel(Generic[T]):
    """Things in order from one thread to another (or to several), at most `limit` of them by weight, or a single
    heavier one."""

    def __init__(self, limit: float = float("inf")) -> None:
        self._limit = limit
        self._items: deque[tuple[T, float]] = deque()
        self._weight = 0.0
        self._finished = self._stopped = False
        lock = threading.Lock()
        self._more, self._room = threading.Condition(lock), threading.Condition(lock)

    def put(self, item: T, weight: float = 1) -> None:
        """Append an item; waits while there is no room. Stopped if the job ends."""
        with self._room:
            self._room.wait_for(lambda: self._stopped or not self._items or self._weight + weight <= self._limit)
            if self._stopped:
                raise Stopped
            self._items.append((item, weight))
            self._weight += weight
            self._more.notify()  # one: a hundred idle threads need not all wake up

    def finish(self) -> None:
        """There will be no more items."""
        with self._more:
            self._finished = True
            self._more.notify_all()

    def ready(self) -> bool:
        """Whether the next item, or the end, is there already."""
        return bool(self._items) or self._finished or self._stopped

    def stop(self) -> None:
        with self._more:
            self._stopped = True
            self._more.notify_all()
            self._room.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; waits for it. StopIteration behind the last one, Stopped if the job ends."""
        with self._more:
            self._more.wait_for(self.ready)
            if self._stopped:
                raise Stopped
            if not self._items:
                raise StopIteration
            item, weight = self._items.popleft()
            self._weight -= weight
            self._room.notify_all()
        return item


class Budget:
    """What may be held at once, where weights are known only when things are there: `wait` before asking for more."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._spent = 0.0
        self._stopped = False
        self._changed = threading.Condition()

    def wait(self) -> None:
        """Wait until less than the limit is spent. Stopped if the job ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._spent < self._limit)
            if self._stopped:
                raise Stopped

    def spend(self, weight: float) -> None:
        """Count `weight` more, or less if it is negative."""
        with self._changed:
            self._spent += weight
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class OrderedWork(Generic[T]):
    """Work for several threads whose results come out in the order in which it went in, at most `limit` at once. None
    is begun while `budget` is spent, which the work itself does, and who takes its results makes good."""

    def __init__(self, limit: int, budget: Budget) -> None:
        self._order: Channel[_Slot[T]] = Channel(limit)
        self._tasks: Channel[_Slot[T]] = Channel()
        self._budget = budget
        self._turn = threading.Lock()
        self._stopped = False
        self._done = threading.Condition()

    def put(self, task: Callable[[], T]) -> None:
        """Something to do; waits while too much is. Stopped if the job ends."""
        slot = _Slot(task)
        self._order.put(slot)
        self._tasks.put(slot)

    def finish(self) -> None:
        """There will be no more work."""
        self._tasks.finish()
        self._order.finish()

    def work(self) -> None:
        """Do what is there to be done, until nothing more will come."""
        while True:
            with self._turn:  # or a later task could spend what an earlier one, whose result is due first, waits for
                slot = next(self._tasks, None)
                if slot is None:
                    return
                self._budget.wait()
            try:
                slot.result = slot.task()
            except Exception as error:
                slot.error = error
            with self._done:
                slot.done = True
                self._done.notify_all()

    def stop(self) -> None:
        self._order.stop()
        self._tasks.stop()
        with self._done:
            self._stopped = True
            self._done.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next result; waits for it. Raises what its task raised."""
        slot = next(self._order)
        with self._done:
            self._done.wait_for(lambda: slot.done or self._stopped)
        if self._stopped:
            raise Stopped
        if slot.error is not None:
            raise slot.error
        return slot.result


class _Slot(Generic[T]):
    """The place of a result."""

    result: T

    def __init__(self, task: Callable[[], T]) -> None:
        self.task = task
        self.error: Exception | None = None
        self.done = False


class Stages:
    """Threads that end together: leaving the block waits for them, stops them after an error, and raises what went
    wrong first."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._stoppable: list[Stoppable] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def add(self, item: Any) -> Any:
        """`item`, to be stopped with the job."""
        self._stoppable.append(item)
        return item

    def start(self, name: str, function: Callable[[], None], wait: bool = True) -> None:
        """Run `function` in a thread. With `wait=False`, leaving the block does not wait for its end: it may be in the
        middle of something long that cannot be stopped."""
        thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=True)
        if wait:
            self._threads.append(thread)
        thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Stopped:
            pass
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException | None = None) -> None:
        """End the job, with `error` unless there was one before."""
        with self._lock:
            self._error = self._error or error
        for item in self._stoppable:
            item.stop()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.stop(None if isinstance(error, Stopped) else error)
        try:
            self._join()
        except BaseException as interruption:  # Ctrl-C
            self.stop(interruption)
            self._join()
            raise
        if self._error is not None and self._error is not error:
            raise self._error

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()


class Clock:
    """Seconds that each stage worked, over all its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time of the block as work of `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """What was counted so far, by stage."""
        with self._lock:
            return dict(self._seconds)
