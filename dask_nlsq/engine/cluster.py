"""Pieces of the data on the workers of a cluster, and what becomes of them when a worker, the scheduler or the fit ends.

A piece is a run of chunks that one task takes. A worker that dies takes its pieces along; Dask makes them again from
their recipe, and a task has the same bits wherever it runs. Arrays that were in memory have no recipe: they are sent
again. All that a fit has on the cluster are the futures of its pieces and of the tasks that are running, which it gives
back by hand, since the traceback of an error, which a notebook keeps, would hold on to them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

from dask._task_spec import Task, TaskRef
from distributed import Client, Future, KilledWorker, as_completed, performance_report, rejoin, secede, span
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.threadpoolexecutor import thread_state

from ..base.plugins import install
from ..base.warn import warn
from ..data.loading import Load
from ..memory.needs import partition_size
from ..model.function import ModelMissing, is_known

SENT_ALONG = 2**16  # bytes of a model up to which it goes along with each task; a larger one is sent to each worker once
DEATHS = 3  # of workers that work on the same piece, until that is an error
NAMED = 3  # pieces that such an error names
SUSPECTS_COME = 0.1  # seconds: pieces that were with the same workers each time fail together, and one of them is guilty


class Deaths(SchedulerPlugin):
    """Lets Dask give up a task of a fit after so many `DEATHS`, or fewer where its configuration wants that.

    Dask's own limit holds for all tasks of a scheduler, and is one death more; tasks of a fit begin with deaths to go.
    """

    name, idempotent = "nlsq-deaths", True

    def update_graph(self, scheduler, *, tasks, **others) -> None:
        for key in tasks:
            if str(key).startswith("nlsq-"):
                state = scheduler.tasks[key]
                state.suspicious = max(state.suspicious, scheduler.allowed_failures + 1 - DEATHS)


class Pieces:
    """``runs`` of chunks on the workers of ``client``, as ``n`` pieces of equal size or a few more.

    Parameters
    ----------
    make : callable
        The task that makes a piece: ``make(first, runs, keys, *values)``, with the values of the shared tasks ``keys``. The
        data know no model: objectives come with the work.
    runs, graph
        Of `loading.plan_loads`.
    send : bool
        Whether the runs hold the data themselves, which then go straight to the workers.
    """

    def __init__(self, client: Client, make: Callable, first: Any, runs: list[list[Load]], graph, n: int, send: bool):
        size = partition_size(len(runs), n)
        self.client, self.make, self.first, self.graph, self.send, self.size = client, make, first, graph, send, size
        self.level = size.bit_length() - 1  # of a piece in the tree of the merge
        self.parts = [runs[k : k + size] for k in range(0, len(runs), size)]
        self.running: list[Future] = []
        self.working: dict[str, int] = {}
        self.futures: list[Any] = [None] * len(self.parts)
        self.sent: dict[Any, Any] = {}
        self.trusting = True  # of large objectives: futures, or names that workers are trusted to know
        self.counted = install(client, Deaths())
        self._put(range(len(self.parts)))

    def __len__(self):
        return len(self.parts)

    def _put(self, numbers: Sequence[int]) -> None:
        graph, names = dict(self.graph), []
        parts = [self.parts[k] for k in numbers]
        for part, sent in zip(parts, self.client.scatter(parts, hash=False) if self.send else parts, strict=True):
            keys = list(dict.fromkeys(key for run in part for load in run for key in load.shared))
            names.append(f"nlsq-load-{uuid4().hex}")
            if self.send:
                graph[sent.key] = sent
                sent = TaskRef(sent.key)
            graph[names[-1]] = Task(names[-1], self.make, self.first, sent, keys, *map(TaskRef, keys))
        with span("nlsq-load"):
            futures = self.client.get(graph, names, sync=False)
        for k, future in zip(numbers, futures, strict=True):
            self.futures[k] = future

    def wait(self) -> None:
        """Until all pieces are there; the first error ends it, not the last piece."""
        with self._named():
            for future in as_completed(self.futures):
                if future.status == "error":
                    future.result()

    def gather(self, function: Callable, name: str, objectives: Sequence, **fixed) -> list:
        """``function(piece, *objectives, **fixed)`` of all pieces, in order."""
        lost: Counter[int | None] = Counter()
        while True:
            try:
                with self._named():
                    self._start(function, name, range(len(self)), [], objectives, **fixed)
                    results = self.client.gather(self.running)
                self.running = []
                return results
            except (CancelledError, ModelMissing) as err:
                self._replace(err, lost)

    def each(
        self, function: Callable, name: str, numbers: Sequence[int], arguments: Sequence, objectives: Sequence, **fixed
    ) -> Iterator[tuple[int, Any]]:
        """A number and ``function(piece, its argument, *objectives, **fixed)``, as they become ready; to be closed."""
        left = dict(zip(numbers, arguments, strict=True))
        lost: Counter[int | None] = Counter()
        try:
            while left:
                try:
                    self._start(function, name, [*left], [[*left.values()]], objectives, **fixed)
                    with self._named():
                        for future in as_completed(self.running):
                            number, result = self.working[future.key], future.result()
                            del left[number]
                            yield number, result
                except (CancelledError, ModelMissing) as err:
                    self._replace(err, lost)
        finally:
            self._give_back(self.running)
            self.running = []

    def _start(self, function, name, numbers, columns, objectives, **fixed):
        futures, n = [self.futures[k] for k in numbers], len(numbers)
        columns = [*columns, *([each] * n for each in map(self._on_the_way, objectives))]
        with span(name):
            self.running = self.client.map(function, futures, *columns, **fixed, key=name, pure=False)
        self.working = dict(zip((str(future.key) for future in self.running), numbers, strict=True))

    def _on_the_way(self, objective):
        """The objective itself; a large one as a future that each worker gets once, or by name where all have it already."""
        if objective.model.nbytes <= SENT_ALONG:
            return objective
        if objective not in self.sent:
            self.client.wait_for_workers(1)
            known = self.client.run(is_known, objective.model.token)
            if self.trusting and all(known.values()):
                self.sent[objective] = objective._replace(model=objective.model.token)
            else:
                self.sent[objective] = self.client.scatter(objective, broadcast=True, hash=False)
        return self.sent[objective]

    def _replace(self, err: CancelledError | ModelMissing, lost: Counter[int | None]) -> None:
        """Make again, or send again, what went with workers that died; an error where that has happened too often."""
        if isinstance(err, CancelledError) and is_gone(self.client, err):
            raise err
        self._give_back(self.running)
        gone = [k for k, future in enumerate(self.futures) if future.cancelled()]
        lost.update(gone)
        lost[None] += not gone  # arrays that were in memory, with the workers that held them
        if max(lost.values()) >= DEATHS:
            raise RuntimeError(self._died(DEATHS, [k for k in gone if lost[k] >= DEATHS])) from err
        self.trusting = self.trusting and not isinstance(err, ModelMissing)  # a worker that came later has not seen it
        self._give_back(self._futures_sent())
        self.sent.clear()
        if gone:
            self._put(gone)

    def _futures_sent(self) -> list[Future]:
        return [each for each in self.sent.values() if isinstance(each, Future)]

    @contextmanager
    def _named(self):
        """An error about a task that kills its workers says which data it works on."""
        try:
            yield
        except KilledWorker as err:
            time.sleep(SUSPECTS_COME)
            number = {future.key: k for k, future in enumerate(self.futures)} | self.working
            failed = {future.key for future in [*self.futures, *self.running] if future.status == "error"} | {err.task}
            suspects = sorted({number[key] for key in failed & number.keys()})
            deaths = err.allowed_failures + 1
            if self.counted:
                deaths = min(DEATHS, deaths)
            raise RuntimeError(self._died(deaths, suspects, f", the last one {err.last_worker.address}")) from err

    def _died(self, n: int, suspects: Sequence[int], last: str = "") -> str:
        blocks = [_blocks(self.parts[k]) for k in suspects[:NAMED]]
        more = f", or one of {len(suspects) - NAMED} more tasks" if len(suspects) > NAMED else ""
        return (
            f"{n} workers died while they worked on {' or '.join(blocks) or 'the same task'}{more}{last}. Their logs say "
            "why: if it was memory, start workers with more of it or with fewer threads, or rechunk the data into smaller "
            "chunks; if these data make a library crash, leave them out"
        )

    def close(self) -> None:
        self._give_back([*self.running, *self._futures_sent(), *(future for future in self.futures if future is not None)])
        self.futures, self.running, self.sent = [], [], {}

    def _give_back(self, futures):
        if self.client.status == "running":  # else there is no scheduler to tell
            self.client.cancel(futures)


def _blocks(part: list[list[Load]]) -> str:
    indices = [load.index for run in part for load in run]
    if len(indices) == 1:
        return f"block {indices[0]} of the data"
    return f"blocks {indices[0]} to {indices[-1]} of the data ({len(indices)} in C order)"


def is_gone(client: Client, err: BaseException) -> bool:
    """Whether an error comes from a scheduler that went away."""
    return client.status != "running" or "scheduler-connection-lost" in str(err)


@contextmanager
def _reported(path: str):
    """Dask's performance report of what happens within; a disk that does not take it costs no result."""
    done = False
    try:
        with performance_report(path):
            yield
            done = True
    except OSError as err:
        if not done:
            raise
        warn(f"`report` {path} could not be written: {err}", RuntimeWarning)


@contextmanager
def attached(client: Client | None, report: str | Path | None = None):
    """Within, a fit uses ``client``: a lost scheduler is said to be lost, and a task that fits leaves its thread to others.

    Dask's performance report of it goes to the file ``report``; its tasks are in a span of their own.

    Raises
    ------
    ConnectionError
        Where the scheduler went away.
    """
    leaves = client is not None and getattr(thread_state, "proceed", False)  # else a worker would wait for itself
    if leaves:
        secede()
    try:
        with nullcontext() if report is None else _reported(str(report)), span("nlsq"):
            yield
    except (CancelledError, OSError) as err:
        if client is None or not is_gone(client, err):
            raise
        address = client.scheduler.address if client.scheduler is not None else "its address"
        raise ConnectionError(
            f"the scheduler at {address} went away during the fit: start one and a new Client, and fit again. A fit with "
            "checkpoint= goes on where it was, by the same call or by resume(path)"
        ) from err
    finally:
        if leaves:
            rejoin()
