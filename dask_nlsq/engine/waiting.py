"""How a fit waits for others, and stops on request.

Ctrl-C does not raise where it arrives: that could be within a callback of the garbage collector, which would swallow it, or
leave a coroutine of the Client behind. It is recorded, and code that waits checks for it. Code that waits for workers also
checks whether there are any.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from distributed import Client, Future, as_completed

from ..base.config import setting

logger = logging.getLogger("dask_nlsq")

POLL = 0.1  # seconds between two looks
WORKERS_EVERY = 1.0  # seconds between two looks for workers, which ask the scheduler
PATIENCE = 10.0  # seconds without workers, until that is said
Look: TypeAlias = Callable[[int, int], None]  # told how many of how many pieces are there, 0 of 0 where that is not known


Watch: TypeAlias = Callable[[str, int, int], None]  # told what is being done, and the same


def unwatched(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def calm(done: int = 0, total: int = 0) -> None:
    """Look for nothing."""


class ToldToLeave(Exception):
    """A sweep that ends early, since the process has been told to leave."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number

    @property
    def exit(self) -> BaseException:
        """With what the process leaves."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


class StopOnSignal:
    """Within, Ctrl-C only sets ``signal``: who reads finishes what is begun. A second one works as always.

    SIGTERM too, where a checkpoint is ``kept``; without one Ctrl-C is left alone where somebody else has taken it. Outside
    of the main thread, which alone receives signals, it does nothing.
    """

    def __init__(self, kept: bool):
        self.signal: int | None = None
        free = kept or signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self.numbers = [signal.SIGINT] * free + [signal.SIGTERM] * kept
        self.before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._received) for number in self.numbers}
        return self

    def __exit__(self, *exc):
        self._restore()

    def _received(self, number, frame):
        self.signal = number
        self._restore()

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def look(self, done: int = 0, total: int = 0) -> None:
        """Raise `ToldToLeave` where a signal has come."""
        if self.signal is not None:
            raise ToldToLeave(self.signal)


class NoWorkersError(RuntimeError):
    """The cluster had no workers for longer than ``nlsq.worker-deadline``."""


class Lookout:
    """What is looked at while a fit waits for workers of ``client``."""

    def __init__(self, client: Client, look: Look):
        self.client, self.look, self.said = client, look, False
        self.asked = self.seen = time.monotonic()

    def __call__(self, done: int = 0, total: int = 0) -> None:
        self.look(done, total)
        if time.monotonic() - self.asked < WORKERS_EVERY:
            return
        n_workers, self.asked = self._n_workers(), time.monotonic()
        if n_workers:
            self.seen, self.said = self.asked, False
            return
        waited, deadline = self.asked - self.seen, setting("worker-deadline")
        if deadline is not None and waited > deadline:
            raise NoWorkersError(
                f"the cluster has had no workers for {waited:.0f} s, and `nlsq.worker-deadline` is {deadline:g}: start "
                "some, and fit again. A fit with checkpoint= continues with the same call or resume(path)"
            )
        if waited > PATIENCE and not self.said:
            self.said = True
            until = "" if deadline is None else f" for {deadline - waited:.0f} s more"
            logger.warning(
                "the cluster has had no workers for %.0f s: the fit waits for some%s (`nlsq.worker-deadline` ends that)",
                waited,
                until,
            )

    def _n_workers(self) -> int:
        try:
            known: Mapping[str, Any] = self.client.scheduler_info(n_workers=1)
        except OSError:
            known = {}
        return len(known.get("workers", [None]))  # of a scheduler that goes away, which the futures know, nothing is known

    def wait_for_a_worker(self) -> None:
        while not self._n_workers():
            time.sleep(POLL)
            self()


def coming(
    client: Client, futures: Iterable[Future], look: Look = calm, results: bool = True
) -> Iterator[tuple[Future, Any]]:
    """Futures and their ``results``, or None, as they come.

    Raises
    ------
    Exception
        That of the first future which fails, a CancelledError where one was lost; what ``look`` raises.
    NoWorkersError
        No workers for too long.
    """
    those, lookout = as_completed(futures), Lookout(client, look)
    total = those.count()
    while those.count():
        with those.thread_condition:
            if not those.has_ready():
                those.thread_condition.wait(POLL)
        batch = those.next_batch(block=False)
        lost = [future for future in batch if future.status in ("error", "cancelled")]
        well = [future for future in batch if future.status == "finished"]
        # together, since to fetch a result takes a message
        yield from zip(well, client.gather(well) if results and well else [None] * len(well), strict=True)
        for future in lost:
            future.result()  # raises
        lookout(total - those.count(), total)
