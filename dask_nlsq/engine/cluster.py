"""Pieces of the data on the workers of a cluster, and what happens to them when a worker, the scheduler or the fit ends.

A piece is a run of chunks that one task takes. A worker that dies takes its pieces along; Dask makes them again from
their recipe, and a task has the same bits wherever it runs. Arrays that were in memory have no recipe: they are sent
again. All that a fit has on the cluster are the futures of its pieces and of the tasks that are running, which it gives
back by hand, since the traceback of an error, which a notebook keeps, would hold on to them.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

import dask
from dask._task_spec import Task, TaskRef
from dask.callbacks import Callback
from distributed import Client, Future, KilledWorker, futures_of, performance_report, rejoin, secede
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.threadpoolexecutor import thread_state
from distributed.worker import warn as warn_clients

from ..base.plugins import install
from ..base.warn import warn
from ..data.loading import Load
from ..memory.needs import partition_size
from ..model.function import ModelMissing, is_known
from .waiting import POLL, Look, Lookout, calm, coming

logger = logging.getLogger("dask_nlsq")

SENT_ALONG = 2**16  # bytes of a model up to which it goes along with each task; a larger one is sent to each worker once
DEATHS = 3  # of workers that work on the same piece, the last time on nothing else, until that is an error
NAMED = 3  # pieces that such an error names
SUSPECTS_COME = 0.1  # seconds: pieces that were with the same workers each time fail together, and one of them is guilty


class Deaths(SchedulerPlugin):
    """Lets Dask give up tasks that are annotated so after this many deaths of workers which had them.

    Dask's own limit, which counts the same deaths, holds for all tasks of a scheduler: they begin with some counted.
    """

    name, idempotent = "nlsq-deaths", True

    def update_graph(self, scheduler, *, annotations, **others) -> None:
        for key, n in annotations.get("nlsq_deaths", {}).items():
            if (state := scheduler.tasks.get(key)) is not None:
                state.suspicious = max(state.suspicious, scheduler.allowed_failures + 1 - n)


def given_up_after(n: int):
    """Within, tasks that are sent are given up after this many deaths."""
    return dask.annotate(nlsq_deaths=n)


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
        self.sent: dict[Any, Any] = {}  # of large objectives: futures, or names that workers are trusted to know
        self.trusting = True
        self.look: Look = calm
        install(client, Deaths())
        self._put(range(len(self.parts)))

    def __len__(self):
        return len(self.parts)

    def _made(self, parts: Sequence[list[list[Load]]], deaths: int) -> list[Future]:
        """Pieces with these parts."""
        graph, names = dict(self.graph), []
        for part, sent in zip(parts, self._scattered(parts) if self.send else parts, strict=True):
            keys = list(dict.fromkeys(key for run in part for load in run for key in load.shared))
            names.append(f"nlsq-load-{uuid4().hex}")
            if self.send:
                graph[sent.key] = sent
                sent = TaskRef(sent.key)
            graph[names[-1]] = Task(names[-1], self.make, self.first, sent, keys, *map(TaskRef, keys))
        with tagged("nlsq-load"), given_up_after(deaths):
            return self.client.get(graph, names, sync=False)

    def _put(self, numbers: Sequence[int]) -> None:
        for k, future in zip(numbers, self._made([self.parts[k] for k in numbers], DEATHS - 1), strict=True):
            self.futures[k] = future

    def wait(self, look: Look) -> None:
        """Until all pieces are there; the first error ends it, not the last piece."""
        lost: Counter = Counter()
        while True:
            try:
                for _ in coming(self.client, self.futures, look, results=False):
                    pass
                return
            except CancelledError as err:  # arrays that were in memory, with the worker that held them
                self._replace(err, lost)
            except KilledWorker as err:
                self._one_by_one(err, lost)

    def gather(self, function: Callable, name: str, objectives: Sequence, look: Look = calm, **fixed) -> list:
        """``function(piece, *objectives, **fixed)`` of all pieces, in order."""
        every = range(len(self))
        found = dict(self.each(function, name, every, None, objectives, look, **fixed))
        return [found[k] for k in every]

    def each(
        self,
        function: Callable,
        name: str,
        numbers: Sequence[int],
        arguments: Sequence | None,
        objectives: Sequence,
        look: Look = calm,
        **fixed,
    ) -> Iterator[tuple[int, Any]]:
        """A number and ``function(piece, its argument, *objectives, **fixed)``, as they become ready; to be closed."""
        self.look = lambda *_: look(0, 0)  # of what is done again, one by one
        left: dict[int, Any] = dict(zip(numbers, numbers if arguments is None else arguments, strict=True))
        lost: Counter = Counter()
        one = [] if arguments is None else [[0]]  # the only run of a piece

        def counted(done, total):
            look(len(numbers) - total + done, len(numbers))

        def work(piece):
            return self.client.submit(function, piece, *one, *map(self._on_the_way, objectives), **fixed, pure=False)

        try:
            while left:
                columns = [] if arguments is None else [[*left.values()]]
                try:
                    self._start(function, name, [*left], columns, objectives, **fixed)
                    for future, result in coming(self.client, self.running, counted):
                        number = self.working[str(future.key)]
                        del left[number]
                        yield number, result
                except (CancelledError, ModelMissing) as err:
                    self._replace(err, lost, work)
                except KilledWorker as err:
                    self._one_by_one(err, lost, work)
        finally:
            self._give_back(self.running)
            self.running = []

    def _start(self, function, name, numbers, columns, objectives, **fixed):
        futures, n = [self.futures[k] for k in numbers], len(numbers)
        columns = [*columns, *([each] * n for each in map(self._on_the_way, objectives))]
        with tagged(name), given_up_after(DEATHS - 1):
            self.running = self.client.map(function, futures, *columns, **fixed, key=name, pure=False)
        self.working = dict(zip((str(future.key) for future in self.running), numbers, strict=True))

    def _on_the_way(self, objective):
        """The objective itself; a large one as a future that each worker gets once, or by name where all have it already."""
        if objective.model.nbytes <= SENT_ALONG:
            return objective
        if objective not in self.sent:
            Lookout(self.client, self.look).wait_for_a_worker()
            known = self.client.run(is_known, objective.model.token, on_error="return")
            if self.trusting and all(each is True for each in known.values()):
                self.sent[objective] = objective._replace(model=objective.model.token)
            else:
                self.sent[objective] = self._scattered(objective, broadcast=True)
        return self.sent[objective]

    def _scattered(self, values, **how):
        """Values on workers; on others where those die meanwhile."""
        lookout = Lookout(self.client, self.look)
        while True:
            lookout.wait_for_a_worker()
            try:
                return self.client.scatter(values, hash=False, **how)
            except OSError as err:  # a connection that is closed, no workers any more
                if is_gone(self.client, err):
                    raise
                logger.info("data could not be sent to a worker, and are sent again: %s", err)
                time.sleep(POLL)

    def _replace(self, err: CancelledError | ModelMissing, lost: Counter, work: Callable | None = None) -> None:
        """Make again, or send again, what went with workers that died; an error where that has happened too often."""
        if isinstance(err, CancelledError) and is_gone(self.client, err):
            raise err
        self._give_back(self.running)
        gone = [k for k, future in enumerate(self.futures) if future.cancelled()]
        lost.update(gone)
        lost[None] += not gone  # arrays that were in memory, with the workers that held them
        if max(lost.values()) >= DEATHS:
            raise RuntimeError(_died([self.parts[k] for k in gone if lost[k] >= DEATHS])) from err
        self.trusting = self.trusting and not isinstance(err, ModelMissing)  # a worker that came later has not seen it
        self._forget_sent()
        self._read_alone([k for k in gone if lost[k] == DEATHS - 1], work)
        if gone:
            self._put(gone)

    def _forget_sent(self) -> None:
        self._give_back(self._futures_sent())
        self.sent.clear()

    def _futures_sent(self) -> list[Future]:
        return [each for each in self.sent.values() if isinstance(each, Future)]

    def _one_by_one(self, err: KilledWorker, lost: Counter, work: Callable | None = None) -> None:
        """Read the suspects again, run by run, one at a time: the one with which a worker dies is guilty, which is an error.

        Where none is, other things have killed the workers, and the fit goes on, unless that has happened too often.
        """
        time.sleep(SUSPECTS_COME)
        number = {future.key: k for k, future in enumerate(self.futures)} | self.working
        broken = [k for k, future in enumerate(self.futures) if future.status == "error"]
        failed = {future.key for future in [*self.futures, *self.running] if future.status == "error"} | {err.task}
        suspects = sorted({number[key] for key in failed & number.keys()})
        self._give_back([*self.running, *(self.futures[k] for k in broken)])
        lost["killed"] += 1
        if not suspects or lost["killed"] >= DEATHS:
            raise RuntimeError(_died([self.parts[k] for k in suspects], err)) from err
        self._read_alone(suspects, work)
        self._put(broken)

    def _read_alone(self, suspects: Sequence[int], work: Callable | None) -> None:
        for k in suspects:
            for run in self.parts[k]:
                self._alone([run], work)

    def _alone(self, part: list[list[Load]], work: Callable | None) -> None:
        self._forget_sent()
        tasks = self._made([part], 1)
        try:
            for _ in coming(self.client, tasks, self.look, results=False):
                pass
            if work is not None:
                with given_up_after(1):
                    tasks.append(work(tasks[0]))
                for _ in coming(self.client, tasks[1:], self.look):
                    pass
        except (KilledWorker, CancelledError) as err:  # or what was in memory is lost with its worker
            if is_gone(self.client, err):
                raise
            raise RuntimeError(_died([part], err if isinstance(err, KilledWorker) else None)) from err
        finally:
            self._give_back(tasks)

    def close(self) -> None:
        self._give_back([*self.running, *self._futures_sent(), *(future for future in self.futures if future is not None)])
        self.futures, self.running, self.sent = [], [], {}

    def _give_back(self, futures):
        give_back(self.client, futures)


def _died(parts: Sequence[list[list[Load]]], err: KilledWorker | None = None) -> str:
    named = " or ".join(map(_blocks, parts[:NAMED])) or "the same task"
    more = f", or one of {len(parts) - NAMED} more tasks" if len(parts) > NAMED else ""
    return died(f"{named}{more}", err)


def died(what: str, err: KilledWorker | None = None, n: int = DEATHS) -> str:
    """What is said of workers that died, one after the other, while they worked on something."""
    last = "" if err is None else f", the last one {err.last_worker.address}"
    return (
        f"{n} workers died while they worked on {what}{last}. Their logs say why: if it was memory, start workers with "
        "more memory or fewer threads, or rechunk the data into smaller chunks; if these data make a library crash, "
        "leave them out"
    )


def _blocks(part: list[list[Load]]) -> str:
    indices = [load.index for run in part for load in run]
    if len(indices) == 1:
        return f"block {indices[0]} of the data"
    return f"blocks {indices[0]} to {indices[-1]} of the data ({len(indices)} in C order)"


def is_gone(client: Client, err: BaseException) -> bool:
    """Whether an error comes from a scheduler that went away."""
    return client.status != "running" or "scheduler-connection-lost" in str(err)


def workers_of(options: Mapping[str, Any]) -> Client | None:
    """The client whose workers `dask.compute` with these options would use."""
    client = getattr(dask.base.get_scheduler(scheduler=options.get("scheduler")), "__self__", None)
    return client if isinstance(client, Client) else None


def computed(
    tasks: Sequence,
    names: Sequence[str],
    look: Look = calm,
    again: Callable[[int], Any] | None = None,
    told: Callable[[Any], None] | None = None,
    **options,
) -> list:
    """`dask.compute` of delayed ``tasks``; where workers die, those that may be why run one at a time, each alone.

    ``told`` is called with each result as soon as it is there.

    Raises
    ------
    RuntimeError
        Where a task kills its worker; ``names`` says which.

    Tasks that are persisted already cannot run ``again`` as they are: what does then is given, and an error either way.
    """
    if (client := workers_of(options)) is None:
        keys = {task.key for task in tasks}
        with Callback(posttask=lambda key, result, *_: told(result) if told is not None and key in keys else None):
            return [*dask.compute(*tasks, **options)]
    found: dict[int, Any] = {}
    install(client, Deaths())
    own = [] if again is None else tasks  # what is persisted has no other use, and is given back if this fails
    with attached(client), ExitStack() as on_error:
        on_error.callback(give_back, client, own)
        futures = _sent(client, tasks, DEATHS - 1, options)
        number = {future.key: k for k, future in enumerate(futures)}
        try:
            for future, result in coming(client, futures, look):
                found[number[future.key]] = result
                if told is not None:
                    told(result)
            on_error.pop_all()
            return [found[k] for k in range(len(tasks))]
        except KilledWorker as err:
            time.sleep(SUSPECTS_COME)
            suspects = [k for k, future in enumerate(futures) if future.status == "error"]
            give_back(client, [*futures, *own])
            for k in suspects:
                task = anew(tasks[k]) if again is None else again(k)
                found[k] = _alone(client, task, names[k], look, options)
                if told is not None:
                    told(found[k])
            if again is not None:
                raise RuntimeError(died(" or ".join(names[k] for k in suspects[:NAMED]), err, DEATHS - 1)) from err
        finally:
            give_back(client, futures)
    left = [k for k in range(len(tasks)) if k not in found]
    others = computed([anew(tasks[k]) for k in left], [names[k] for k in left], look, told=told, **options)
    found |= dict(zip(left, others, strict=True))
    return [found[k] for k in range(len(tasks))]


def give_back(client: Client, values: Any) -> None:
    """Cancel the futures that are in ``values``, whoever holds on to them."""
    if client.status == "running":  # otherwise the scheduler is gone
        client.cancel(futures_of(values))


def anew(task):
    """The same task, by a key that was not cancelled."""
    return dask.delayed(_itself, pure=False)(task)


def _itself(value):
    return value


def _sent(client: Client, tasks: Sequence, deaths: int, options: Mapping[str, Any]) -> list[Future]:
    with given_up_after(deaths):
        return client.compute([*tasks], **{name: value for name, value in options.items() if name != "scheduler"})


def _alone(client: Client, task, name: str, look: Look, options: Mapping[str, Any]):
    futures = _sent(client, [task], 1, options)
    try:
        ((_, result),) = coming(client, futures, look)
        return result
    except KilledWorker as err:
        raise RuntimeError(died(name, err)) from err
    finally:
        give_back(client, futures)


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
        warn(f"`performance_report` {path} could not be written: {err}", RuntimeWarning)


@contextmanager
def tagged(tag: str):
    """Within, tasks are in the span ``tag``: always the same one of the span around it.

    `distributed.span` would make a new one for each sweep, and a scheduler keeps all that it has seen.
    """
    around = dask.get_annotations().get("span", {"name": (), "ids": ()})
    own = str(uuid5(NAMESPACE_OID, "/".join([*around["ids"], tag])))
    with dask.annotate(span={"name": (*around["name"], tag), "ids": (*around["ids"], own)}):
        yield


@contextmanager
def attached(client: Client | None, report: str | Path | None = None):
    """Within, a fit uses ``client``: a lost scheduler is said to be lost, and a task that fits leaves its thread to others.

    Dask's performance report of it goes to the file ``report``; its tasks are in the span "nlsq".

    Raises
    ------
    ConnectionError
        Where the scheduler went away.
    """
    leaves = client is not None and getattr(thread_state, "proceed", False)  # else a worker would wait for itself
    if leaves:
        secede()
    try:
        with nullcontext() if report is None else _reported(str(report)), tagged("nlsq"):
            yield
    except (CancelledError, OSError) as err:
        if client is None or not is_gone(client, err):
            raise
        address = client.scheduler.address if client.scheduler is not None else "its address"
        raise ConnectionError(
            f"the scheduler at {address} went away during the fit: start one and a new Client, and fit again. A fit with "
            "checkpoint= continues with the same call or resume(path)"
        ) from err
    finally:
        if leaves:
            rejoin()


def warn_user(text: str, category: type[Warning]) -> None:
    """Warn from a task: here, and in the processes of the clients where it runs on a worker."""
    warn_clients(text, category)
