"""Where data are, and how work reaches all of them: held here or on workers, or unread in a store, read here or by workers.

All four do the same: ``each(work, runs, objectives, *args)`` yields the number of a *unit* and the result of the work on its
runs of chunks, on all of them where ``runs`` is None; held data have no other choice. A unit is ``2^level`` neighbouring
runs, so that its result is a node of the tree of the merge.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from functools import partial
from threading import Semaphore, local
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from distributed import Client

from ..base.config import threads
from ..data.align import Data
from ..data.chunks import Chunk, Preparation, release
from ..data.loading import Load, PassedOn, compute_shared, plan_loads
from ..kernels.kind import inherit_device
from ..memory.machine import give_freed_memory_back, keep_freed_memory, large_arrays_given_back
from ..memory.needs import READ_AHEAD
from .cluster import Pieces
from .devices import kernels_at_once, sent_ahead
from .partition import Partition, Work, load_chunk, load_partition, with_factor
from .request import Objective, present
from .waiting import Look, calm

Runs: TypeAlias = Sequence[int] | None
Results: TypeAlias = Generator[tuple[int, Any], None, None]

_of_thread = local()  # what a thread of a worker keeps from one task to the next
GROUPS_PER_THREAD = 8  # runs of blocks handed to a thread: uneven blocks balance, starting a run costs 0.02 ms


class HeldHere:
    """Data in this process, blocks shared out to threads; a single block is done in place. One unit."""

    held = True

    def __init__(self, partition: Partition, n_threads: int):
        self.partition, self.n_runs = partition, len(partition.chunks)
        self.level = (self.n_runs - 1).bit_length()
        n_blocks = sum(len(chunk.blocks) for chunk in partition.chunks)
        self.n_threads = 1 if partition.preparation.kind.own_memory else min(n_threads, n_blocks)  # it only starts kernels
        self.pool = ThreadPoolExecutor(self.n_threads, "nlsq-sweep", inherit_device()) if self.n_threads > 1 else None

    @classmethod
    def load(cls, data: Data, n_threads: int, look: Look) -> "HeldHere":
        chunks: list[Chunk] = []
        runs, common = plan_loads(data)
        known = PassedOn(compute_shared(runs, common), runs)
        with large_arrays_given_back(data.nbytes), ExitStack() as pools, ExitStack() as on_error:
            on_error.callback(lambda: deque(map(release, chunks), 0))
            pooled: Callable = map
            if len(runs) > 1:  # a single one is loaded in place
                pooled = pools.enter_context(ThreadPoolExecutor(min(n_threads, len(runs)), "nlsq-load")).map
            for chunk in pooled(lambda run: load_chunk(data.preparation, run, known), runs):
                chunks.append(chunk)
                look(len(chunks), len(runs))
            on_error.pop_all()
        if data.factor is not None:
            chunks = [with_factor(chunk, data.factor) for chunk in chunks]
        return cls(Partition.of(data.preparation, chunks, held=True), n_threads)

    def each(self, work: Work, runs: Runs, objectives: Sequence[Objective], *args, look: Look = calm) -> Results:
        yield 0, work.of(self.partition, objectives, *args, share=partial(self._share, look))

    def _share(self, look, function, blocks):
        if self.pool is None:
            return function(blocks)
        size = -(-len(blocks) // (self.n_threads * GROUPS_PER_THREAD))
        groups = [blocks[k : k + size] for k in range(0, len(blocks), size)]
        done = []
        for found in self.pool.map(function, groups):
            done += found
            look(len(done), len(blocks))
        return done

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for chunk in self.partition.chunks:
            release(chunk)
        self.partition = self.partition._replace(chunks=(), on_devices=None)


class HeldByWorkers:
    """Data on the workers of ``client``: one future per partition, one task per partition and sweep.

    The results, a small matrix each, are merged by the client: where tasks merged 32 of them, each had to fetch them from
    other workers, and a sweep of 938 tasks on 300 workers, simulated in two processes, took 13 s or more instead of 2.
    """

    held = True

    def __init__(self, data: Data, client: Client, n_partitions: int, look: Look):
        runs, graph = plan_loads(data)
        self.n_runs = len(runs)
        self.pieces = Pieces(client, load_partition, data.preparation, runs, graph, n_partitions, not data.lazy)
        self.level = self.pieces.level
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self.pieces.wait(look)
            on_error.pop_all()

    def each(self, work: Work, runs: Runs, objectives: Sequence[Objective], *args, look: Look = calm) -> Results:
        fixed: Any = dict(work=work, args=args)
        yield from enumerate(self.pieces.gather(work_on_partition, f"nlsq-{work.name}", objectives, look, **fixed))

    def close(self) -> None:
        self.pieces.close()


def work_on_partition(partition: Partition, *objectives: Objective, work: Work, args: tuple):
    """The task of a sweep."""
    return work.of(partition, [*map(present, objectives)], *args)


class LazyRuns(NamedTuple):
    """Runs of chunks that a task reads whenever it needs them, with the shared values that they need."""

    preparation: Preparation
    runs: list[list[Load]]
    shared: dict[Any, np.ndarray]

    def each(
        self, work: Work, places: Iterable[int], objectives, args: tuple, n_threads: int, pool: ThreadPoolExecutor
    ) -> Iterator:
        """The result of the work on each run, in order; the `readers` in the pool have one in memory each."""
        kind, n_ahead = self.preparation.kind, n_threads + READ_AHEAD
        n_kernels = kernels_at_once(kind, n_threads)
        kernels, on_device = Semaphore(n_kernels), Semaphore(n_kernels + READ_AHEAD)
        runs = [self.runs[place] for place in places]
        known = PassedOn(self.shared, runs)

        def one(run):
            chunk = load_chunk(self.preparation, run, known)
            try:
                with on_device:
                    ready = chunk._replace(blocks=sent_ahead(kind, chunk.blocks)) if work.on_device else chunk
                    with kernels:
                        return work.of(Partition.of(self.preparation, [ready], held=False), objectives, *args)
            finally:
                release(chunk)

        waiting: deque[Future] = deque()
        try:
            for run in runs:
                waiting.append(pool.submit(copy_context().run, one, run))  # with it, Dask's meters
                if len(waiting) > 2 * n_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


def readers(n_threads: int) -> ThreadPoolExecutor:
    """Threads that read for as many threads of kernels, to be kept from one sweep to the next.

    For each thread that there ever was, up to 8 per core, malloc keeps what its arrays below 4 MiB took, 30 MB and more.
    """
    return ThreadPoolExecutor(n_threads + READ_AHEAD, "nlsq-stream", inherit_device())


class UnreadHere:
    """Data that this process reads whenever they are needed, run by run."""

    held, level = False, 0

    def __init__(self, data: Data, keeps: bool):
        runs, common = plan_loads(data)
        self.lazy, self.n_runs = LazyRuns(data.preparation, runs, compute_shared(runs, common)), len(runs)
        self.nbytes, self.keeps, self.n_threads = data.nbytes, keeps, threads()
        self.pool = readers(self.n_threads)

    def each(self, work: Work, runs: Runs, objectives: Sequence[Objective], *args, look: Look = calm) -> Results:
        runs = range(self.n_runs) if runs is None else runs
        with nullcontext() if self.keeps else large_arrays_given_back(self.nbytes):
            yield from zip(runs, self.lazy.each(work, runs, objectives, args, self.n_threads, self.pool), strict=True)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        give_freed_memory_back()


class UnreadByWorkers:
    """Data that workers of ``client`` read: each unit is a task that reads its runs one by one and merges the results."""

    held = False

    def __init__(self, data: Data, client: Client, n_partitions: int):
        runs, graph = plan_loads(data)
        self.pieces = Pieces(client, _lay_out, data.preparation, runs, graph, n_partitions, False)
        self.n_runs, self.level = len(runs), self.pieces.level

    def each(self, work: Work, runs: Runs, objectives: Sequence[Objective], *args, look: Look = calm) -> Results:
        """In the order in which units are ready."""
        places: dict[int, list[int]] = {}
        for run in range(self.n_runs) if runs is None else runs:
            places.setdefault(run >> self.level, []).append(run % (1 << self.level))
        name = f"nlsq-{work.name}"
        fixed: Any = dict(work=work, args=args)
        yield from self.pieces.each(work_through, name, [*places], [*places.values()], objectives, look, **fixed)

    def close(self) -> None:
        self.pieces.close()


def _lay_out(preparation, runs, keys, *values) -> LazyRuns:
    keep_freed_memory()
    return LazyRuns(preparation, runs, dict(zip(keys, values, strict=True)))


def work_through(lazy: LazyRuns, places: Sequence[int], *objectives: Objective, work: Work, args: tuple):
    """The task of a sweep over data that are not held."""
    if not hasattr(_of_thread, "readers"):
        _of_thread.readers = readers(1)
    return work.merge(lazy.each(work, places, [*map(present, objectives)], args, 1, _of_thread.readers), *args)


Place = HeldHere | HeldByWorkers | UnreadHere | UnreadByWorkers


def open_place(data: Data, strategy: str, client: Client | None, n_partitions: int, look: Look, keeps: bool) -> Place:
    """Bring data where they will be swept, or see to it that they can be read there."""
    if strategy == "streaming":
        return UnreadHere(data, keeps) if client is None else UnreadByWorkers(data, client, n_partitions)
    return HeldHere.load(data, threads(), look) if client is None else HeldByWorkers(data, client, n_partitions, look)
