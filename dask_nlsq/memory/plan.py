"""Where the data of a fit will be held, in which pieces, and whether that fits: decided from sizes, before any is read."""

import logging
from dataclasses import dataclass
from math import inf
from typing import Literal

from distributed import Client

from ..base.config import threads
from ..base.text import GB, at_least, several, size, table
from .needs import CLIENT_BYTES, Needs, Sizes, needs, partition_size
from .processes import HERE, ProcessMemory, Room, advice, pjrt, room_here, rooms_of_workers, wanted_resources
from .threshold import Strategy

logger = logging.getLogger("dask_nlsq")

STREAM_PER_THREAD = 8  # partitions where the data are not held: also what a sweep that breaks off has to read again
PER_THREAD, MOST_PER_THREAD = 4, 16  # partitions: many small ones even out the workers; each is a task per sweep
FEW_TASKS = 1000  # of a sweep: a scheduler takes seconds for thousands, and a thousand threads are even enough with one each


class MemoryBudgetError(MemoryError):
    """A fit that cannot work with the memory there is: the ``numbers``, and the way out."""

    def __init__(self, numbers: str, way_out: str):
        super().__init__(numbers, way_out)
        self.numbers, self.way_out = numbers, way_out

    def __str__(self):
        return f"{self.numbers}: {self.way_out}"


@dataclass(frozen=True)
class Plan:
    """How a fit will run; made by `dask_nlsq.plan_fit`, and kept in `FitResult.plan`. Sizes in bytes.

    Attributes
    ----------
    strategy : {"standard", "chunked", "streaming"}
    reason : str
        Why, in a sentence with the numbers.
    n_points, n_params, n_chunks : int
    n_partitions : int
        Tasks per sweep.
    sweep_bytes : int
        That each sweep reads: the data as they are stored.
    held_bytes : int
        That the fit holds of the data, over all processes; arrays that this process has already do not count.
    in_flight_bytes : int
        That one thread needs beside them to read one run of chunks.
    places : tuple of Place
        This process first, then the workers that hold data.
    decoded : tuple of str
        Attributes of stored arrays that are applied to their values, a line for each array.
    """

    strategy: Strategy
    reason: str
    n_points: int
    n_params: int
    n_chunks: int
    n_partitions: int
    sweep_bytes: int
    held_bytes: int
    in_flight_bytes: int
    places: tuple[ProcessMemory, ...]
    decoded: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> float:
        """Predicted peak of this process."""
        return self.places[0].peak

    @property
    def worker_peak_bytes(self) -> float:
        """Predicted peak of the fullest worker; 0 without workers."""
        return max((place.peak for place in self.places[1:]), default=0.0)

    @property
    def advice(self) -> list[str]:
        """What to change in the settings of the workers, a line each."""
        return advice(self.places)

    def warn(self) -> None:
        """Log the advice."""
        for line in self.advice:
            logger.warning("%s", line)

    def explain(self) -> None:
        """Print the plan as a table, which is also ``str(plan)``."""
        print(self)

    def __str__(self):
        where = {True: "of the workers", False: "of this process"}[len(self.places) > 1]
        held = (
            f"{size(self.held_bytes)} in the memory {where}" if self.held_bytes else "nothing beside the arrays themselves"
        )
        source = "where they are stored" if self.strategy == "streaming" else "memory"
        rows = [
            ("strategy", f"{self.strategy}: {self.reason}"),
            ("data", f"{self.n_points:,} points, {size(self.sweep_bytes)} in {several(self.n_chunks, 'chunk')}"),
            ("parameters", f"{self.n_params}"),
            ("held", held),
            ("in flight", f"{size(self.in_flight_bytes)} per thread while data are read"),
            ("a sweep", f"{size(self.sweep_bytes)} from {source}, in {several(self.n_partitions, 'task')}"),
        ]
        rows[2:2] = [("decoded", each) for each in self.decoded]
        columns = ("process", "threads", "now", "holds", "peak", "may have", "jax", "x64", "PJRT_NPROC")
        lines = [*table(rows), "", *table([columns, *map(_cells, self.places)])]
        return "\n".join([*lines, *(f"to do: {each}" for each in self.advice)])

    def __repr__(self):
        where = several(len(self.places) - 1, "worker") if len(self.places) > 1 else HERE
        return f"<Plan {self.strategy} on {where}, peak {size(self.worker_peak_bytes or self.peak_bytes)}: {self.reason}>"


def _cells(place: ProcessMemory) -> tuple[str, ...]:
    sizes = map(size, (place.now, place.held, place.peak, place.limit))
    return (place.name, str(place.n_threads), *sizes, place.jax, place.x64, pjrt(place))


def make_plan(
    sizes: Sizes,
    strategy: Strategy | Literal["auto"] = "auto",
    memory_limit_gb: float | None = None,
    client: Client | None = None,
    per_thread: int | None = None,
) -> Plan:
    """Decide where the data are held.

    Parameters
    ----------
    strategy
        "auto": on the workers of ``client`` where data are lazy, else in this process; lazy data that do not fit there are
        not held but read anew in each sweep.
    memory_limit_gb : float, optional
        GiB, the most that this process, or each worker, may take for the fit. None: the share of the memory that
        `effective_fraction` allows, of what is available here or of the limit of each worker.
    per_thread : int, optional
        Partitions per thread of the workers. None: 4, more where they would not fit.

    Raises
    ------
    MemoryBudgetError
        Where the data do not fit.
    ValueError, TypeError
        Arguments that make no sense.
    """
    if sizes.whole and strategy in ("chunked", "streaming"):
        reason = "a covariance matrix as sigma" if sizes.factor else "this model, or xdata=None,"
        raise ValueError(f'{reason} needs all points at once: use strategy="standard"')
    lazy = sizes.lazy and not sizes.whole
    chosen: Strategy = "chunked" if lazy and client is not None else "standard"
    if strategy != "auto":
        chosen = strategy
    try:
        plan = _decided(sizes, chosen, memory_limit_gb, client, per_thread)
    except MemoryBudgetError as err:
        if strategy != "auto" or not lazy:
            raise
        try:
            plan = _decided(sizes, "streaming", memory_limit_gb, client, per_thread, f", since {err.numbers}")
        except MemoryBudgetError:
            raise err from None
    logger.info("%r", plan)
    return plan


def _decided(sizes, strategy, memory_limit_gb, client, per_thread, since="") -> Plan:
    on_workers = strategy in ("chunked", "streaming") and client is not None
    wanted = needs(sizes, strategy, on_workers)
    if on_workers:
        per_thread = per_thread or (STREAM_PER_THREAD if strategy == "streaming" else None)
        reason, n_partitions, places = _on_workers(
            sizes, wanted, strategy, rooms_of_workers(client, memory_limit_gb), per_thread
        )
    else:
        reason, n_partitions, places = _here(sizes, wanted, strategy, room_here(memory_limit_gb))
    readers = max(places, key=lambda place: place.n_threads).n_threads
    return Plan(
        strategy=strategy,
        reason=reason + since,
        n_points=sizes.n_points,
        n_params=sizes.n_params,
        n_chunks=sizes.n_chunks,
        n_partitions=n_partitions,
        sweep_bytes=sizes.nbytes,
        held_bytes=int(wanted.held + wanted.shared),
        in_flight_bytes=int(wanted.in_flight(readers) / readers),
        places=places,
    )


def _here(sizes: Sizes, wanted: Needs, strategy: Strategy, room: Room):
    n_threads = min(threads(), sizes.n_runs)
    working, in_flight, streams = wanted.working(n_threads), wanted.in_flight(n_threads), strategy == "streaming"
    if wanted.held + working > room.nbytes and (sizes.lazy or room.limited):
        way_out = f"raise memory_limit_gb to {at_least((wanted.held + working) / GB)}, " if room.limited else ""
        way_out += "rechunk the data into smaller chunks, " if in_flight > room.nbytes / 2 else ""
        way_out += "" if streams else 'use strategy="streaming", which holds none, '
        raise MemoryBudgetError(
            f"the data take {size(wanted.held)} in memory, and this process {size(working)} beside them, of which "
            f"{size(in_flight)} to read {several(n_threads, 'run')} of chunks at once; it may take {size(room.nbytes)} "
            f"({room.source})",
            f"{way_out}use a distributed.Client whose workers together have more memory, or fit a part of the data",
        )
    reason = "the data are in this process already"
    if streams:
        reason = "the data are read anew in each sweep"
    elif sizes.lazy:
        reason = f"the data take {size(wanted.held)}, and this process may take {size(room.nbytes)} ({room.source})"
    return reason, 1, (room.place(wanted.held + wanted.shared, wanted.held + working, n_threads),)


def tasks_per_thread(n_threads: int) -> int:
    """Partitions for each thread, where nothing asks for more."""
    return max(1, min(PER_THREAD, FEW_TASKS // max(n_threads, 1)))


def count_partitions(n_runs: int, n_threads: int, per_thread: int) -> int:
    """At least so many for each thread, where there are as many runs, and fewer than twice as many."""
    return -(-n_runs // partition_size(n_runs, max(2 * per_thread * n_threads - 2, 1)))


def _on_workers(sizes: Sizes, wanted: Needs, strategy: Strategy, rooms: list[Room], per_thread: int | None):
    total = sum(room.n_threads for room in rooms)
    working = [wanted.working(room.n_threads) for room in rooms]

    def shared_out(per_thread):
        """Number of partitions, and the most bytes of them that each worker gets."""
        n = count_partitions(sizes.n_runs, total, per_thread)
        length = partition_size(sizes.n_runs, n)
        most = [min(n, -(-n * room.n_threads // total) + (n > total)) for room in rooms]  # one too many
        return n, [min(1.0, k * length / sizes.n_runs) * wanted.held for k in most]

    def fits(room, working, held):
        return working + held <= room.nbytes and held <= room.most_held

    tried, most = per_thread or tasks_per_thread(total), per_thread or MOST_PER_THREAD
    n_partitions, held = shared_out(tried)
    while tried < most and not all(map(fits, rooms, working, held)):
        tried *= 2
        n_partitions, held = shared_out(tried)
    for room, works, holds in zip(rooms, working, held, strict=True):
        may_have, raised = f"{size(room.base + room.nbytes)} ({room.source})", "raise memory_limit_gb, " * room.limited
        if works > room.nbytes:
            raise MemoryBudgetError(
                f"worker {room.name} may have {may_have} and needs {size(room.base + works)} before it holds any data, of "
                f"which {size(wanted.in_flight(room.n_threads))} to read runs of chunks of {size(wanted.runs[0])} in "
                f"{several(room.n_threads, 'thread')}",
                f"{raised}rechunk the data into smaller chunks, or start workers with more memory or fewer threads",
            )
        if not fits(room, works, holds):
            left = sum(max(0.0, each.nbytes - needed) for each, needed in zip(rooms, working, strict=True))
            raise MemoryBudgetError(
                f"the data take {size(wanted.held)} and {several(len(rooms), 'worker')} have room for {size(left)}: worker "
                f"{room.name} would hold {size(holds)} and have {size(room.base + works + holds)} at its peak, of "
                f"{may_have}",
                f'{raised}use strategy="streaming", which holds none, start more workers or larger ones, or fit a part of '
                "the data",
            )
    reason = f"{several(len(rooms), 'worker')} hold the data of {size(wanted.held)} together"
    if strategy == "streaming":
        reason = f"{several(len(rooms), 'worker')} read the data anew in each sweep"
    if not rooms:
        reason = f"the data take {size(wanted.held)}; no worker has come yet, so that nothing is known of their memory"
        with_ = f" with the resources {asked}, as `dask worker --resources`" if (asked := wanted_resources()) else ""
        logger.warning(
            "the cluster has no workers yet%s, and the fit waits for one: start it, as with client.cluster.scale(2)", with_
        )
    sent = 0 if sizes.lazy else sizes.nbytes
    client = needs(sizes, strategy).start + CLIENT_BYTES + sent
    here = room_here(None)._replace(limit=inf).place(0, client, 1)
    return (
        reason,
        n_partitions,
        (here, *(room.place(h + wanted.shared, w + h) for room, w, h in zip(rooms, working, held, strict=True))),
    )
