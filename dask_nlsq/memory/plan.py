"""Where the data of a fit will be held, in which pieces, and whether that fits: decided from sizes, before any is read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Literal, NamedTuple

from distributed import Client

from ..base.config import threads
from ..base.text import at_least, html_text, several, size, table
from ..kernels.kind import Kind
from .device import kind_of_all, scratch
from .needs import CLIENT_BYTES, JOINED_POINTS, MOST_RUNS, Needs, Sizes, needs, partition_size
from .processes import HERE, ProcessMemory, Room, advice, has, pjrt, room_here, rooms_of_workers, wanted_resources
from .threshold import Strategy

logger = logging.getLogger("dask_nlsq")

STREAM_PER_THREAD = 8  # partitions where the data are not held: also what a sweep that breaks off has to read again
PER_THREAD, MOST_PER_THREAD = 4, 16  # partitions: many small ones even out the workers; each is a task per sweep
LEAST_GIB, MOST_GIB, LIMIT_STEP = 1e-3, 2.0**30, 1.001  # between which, and how exactly, a limit is looked for
RECHUNK = "rechunk the data into smaller chunks"
FEW_TASKS = 1000  # of a sweep: a scheduler takes seconds for thousands, and a thousand threads are even enough with one each


class MemoryBudgetError(MemoryError):
    """A fit that cannot run with the available memory: the ``numbers``, and ``ways_out``, which say what to change."""

    def __init__(self, numbers: str, *ways_out: str):
        super().__init__(numbers, *ways_out)
        self.numbers, self.ways_out = numbers, ways_out or ("run it where there is more memory",)

    def __str__(self):
        *others, last = self.ways_out
        return f"{self.numbers}: {', '.join(others)}{', or ' * bool(others)}{last}"


class JoiningError(MemoryBudgetError):
    """Chunks along the fit axes of a map that cannot be joined with the memory there is."""


@dataclass(frozen=True)
class Plan:
    """How a fit will run; from `dask_nlsq.plan_fit` or `FitResult.plan`. Sizes are in bytes.

    Attributes
    ----------
    strategy : {"standard", "chunked", "streaming"}
    reason : str
        Why, in a sentence with the numbers.
    n_points, n_params, n_chunks : int
    n_partitions : int
        Tasks per sweep.
    sweep_bytes : int
        Data that each sweep reads, as they are stored.
    held_bytes : int
        Data that the fit holds, over all processes; arrays that this process already has do not count.
    in_flight_bytes : int
        Additional memory that one thread needs to read a run of chunks.
    places : tuple of Place
        This process first, then the workers that hold data.
    decoded : tuple of str
        Applied attributes of stored arrays, a line for each array.
    keeps : bool
        There is room for memory that is freed to stay with this process: streaming can take a fifth less time then. Workers
        give it back.
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
    keeps: bool = field(default=False, compare=False)  # which is of no use in files of results

    @property
    def peak_bytes(self) -> float:
        """Predicted peak of this process."""
        return self.places[0].peak

    @property
    def worker_peak_bytes(self) -> float:
        """Predicted peak of the fullest worker; 0 without workers."""
        return max((place.peak for place in self.places[1:]), default=0.0)

    @property
    def kind(self) -> Kind:
        """Of the devices that will work on the data."""
        return kind_of_all(place.device for place in self.places[1:] or self.places)

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
            f"{size(self.held_bytes)} in the memory {where}" if self.held_bytes else "nothing except the arrays themselves"
        )
        source = "where they are stored" if self.strategy == "streaming" else "memory"
        rows = [
            ("strategy", f"{self.strategy}: {self.reason}"),
            ("data", f"{several(self.n_points, 'point')}, {size(self.sweep_bytes)} in {several(self.n_chunks, 'chunk')}"),
            ("parameters", f"{self.n_params}"),
            ("held", held),
            ("in flight", f"{size(self.in_flight_bytes)} per thread while data are read"),
            ("a sweep", f"{size(self.sweep_bytes)} from {source}, in {several(self.n_partitions, 'task')}"),
        ]
        rows[2:2] = [("decoded", each) for each in self.decoded]
        columns = ("process", "threads", "now", "holds", "peak", "may have", "jax", "x64", "PJRT_NPROC", "device")
        lines = [*table(rows), "", *table([columns, *map(_cells, self.places)])]
        return "\n".join([*lines, *(f"to do: {each}" for each in self.advice)])

    def _repr_html_(self):
        return html_text(str(self))

    def __repr__(self):
        where = several(len(self.places) - 1, "worker") if len(self.places) > 1 else HERE
        return f"<Plan {self.strategy} on {where}, peak {size(self.worker_peak_bytes or self.peak_bytes)}: {self.reason}>"


def _cells(place: ProcessMemory) -> tuple[str, ...]:
    sizes = map(size, (place.now, place.held, place.peak, place.limit))
    return (place.name, str(place.n_threads), *sizes, place.jax, place.x64, pjrt(place), _on_device(place))


def _on_device(place: ProcessMemory) -> str:
    if not (place.on_device and place.device.total):
        return has(place)
    crosses = max(0.0, place.on_device - place.device.free)
    more = f"; {size(crosses)} cross to it in each sweep" if crosses else ""
    return f"{place.device}: {size(place.on_device - crosses)} of {size(place.device.free)} free{more}"


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
        not held but read again in each sweep.
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
    tried: tuple[Strategy, ...] = (chosen, "streaming") if strategy == "auto" and lazy else (chosen,)
    try:
        plan = _decided(sizes, tried, memory_limit_gb, client, per_thread)
    except MemoryBudgetError as err:
        if len(tried) == 1:
            raise
        try:
            plan = _decided(sizes, tried[1:], memory_limit_gb, client, per_thread, f", since {err.numbers}")
        except MemoryBudgetError:
            raise err from None
    logger.info("%r", plan)
    return plan


def _check_devices(plan: Plan) -> None:
    """Refuse a fit of which not even one block fits on a device that has memory of its own."""
    for place in plan.places[1:] or plan.places:
        each = place.device
        takes, one = scratch(each.kind, plan.n_params, plan.n_points), each.total / each.n
        if 0 < one < takes:
            raise MemoryBudgetError(
                f"a sweep takes {size(takes)} on {each} of {place.name}, which has {size(one)}, beside the data",
                "use devices with more memory",
                "set JAX_PLATFORMS=cpu before Python starts",
            )


def _decided(sizes, tried, memory_limit_gb, client, per_thread, since="") -> Plan:
    """The plan by the first of the strategies that may be tried."""
    strategy = tried[0]
    on_workers = strategy in ("chunked", "streaming") and client is not None
    wanted, keeps = needs(sizes, strategy, on_workers), False
    if on_workers:
        per_thread = per_thread or (STREAM_PER_THREAD if strategy == "streaming" else None)
        reason, n_partitions, places = _on_workers(
            sizes, wanted, tried, rooms_of_workers(client, memory_limit_gb), per_thread
        )
    else:
        room = room_here(memory_limit_gb)
        if strategy == "streaming":
            more = needs(sizes, strategy, keeps=True)
            keeps = more.working(_threads_of(sizes)) <= room.nbytes
            wanted = more if keeps else wanted
        reason, n_partitions, places = _here(sizes, wanted, tried, room)
    readers = max(places, key=lambda place: place.n_threads).n_threads
    plan = Plan(
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
        keeps=keeps,
    )
    _check_devices(plan)
    return plan


def _threads_of(sizes: Sizes) -> int:
    """Of this process that have something to do."""
    return min(threads(), sizes.n_runs)


def _here(sizes: Sizes, wanted: Needs, tried: Sequence[Strategy], room: Room):
    n_threads = _threads_of(sizes)
    working, in_flight, streams = wanted.working(n_threads), wanted.in_flight(n_threads), tried[0] == "streaming"
    if not _fits_here(sizes, tried[0], [room]) and (sizes.lazy or room.limited):
        ways = ways_out(sizes, tried, [room], _fits_here)
        on_workers: Strategy = "streaming" if streams else "chunked"
        if not sizes.whole and needs(sizes, on_workers, True).working(1) <= room.nbytes:
            there = "a distributed.Client whose workers together have more memory"
            ways.append(f"use {there}" if streams else f'use strategy="chunked" and {there}')
        raise MemoryBudgetError(
            f"the data take {size(wanted.held)} in memory, and this process {size(working)} beside them, including "
            f"{size(in_flight)} to read {several(n_threads, 'run')} of chunks at once; it may take {size(room.nbytes)} "
            f"({room.source})",
            *ways,
        )
    reason = "the data are in this process already"
    if streams:
        reason = "the data are read again in each sweep"
    elif sizes.lazy:
        reason = f"the data take {size(wanted.held)}, and this process may take {size(room.nbytes)} ({room.source})"
    on_device = 0.0 if streams else float(sizes.sent)
    return reason, 1, (room.place(wanted.held + wanted.shared, wanted.held + working, n_threads, on_device),)


def _fits_here(sizes: Sizes, strategy: Strategy, rooms: Sequence[Room]) -> bool:
    """Whether this process, the only one of ``rooms``, can hold and work on data of these sizes."""
    wanted, (room,) = needs(sizes, strategy), rooms
    return wanted.held + wanted.working(_threads_of(sizes)) <= room.nbytes


def tasks_per_thread(n_threads: int) -> int:
    """Partitions for each thread, where nothing asks for more."""
    return max(1, min(PER_THREAD, FEW_TASKS // max(n_threads, 1)))


def count_partitions(n_runs: int, n_threads: int, per_thread: int) -> int:
    """At least this many for each thread, if there are as many runs, and fewer than twice as many."""
    return -(-n_runs // partition_size(n_runs, max(2 * per_thread * n_threads - 2, 1)))


class _Share(NamedTuple):
    """Of a worker: bytes that it takes beside the data, and of the data; whether there is memory for both."""

    works: float
    holds: float
    fits: bool


def _shared_out(sizes: Sizes, wanted: Needs, rooms: Sequence[Room], per_thread: int | None) -> tuple[int, list[_Share]]:
    """Number of partitions, the first that fits of those that may be tried, and the share of each worker."""
    total = sum(room.n_threads for room in rooms)
    tried, most = per_thread or tasks_per_thread(total), per_thread or MOST_PER_THREAD
    while True:
        n = count_partitions(sizes.n_runs, total, tried)
        length, shares = partition_size(sizes.n_runs, n), []
        for room in rooms:
            most_partitions = min(n, -(-n * room.n_threads // total) + (n > total))  # one too many
            works, holds = wanted.working(room.n_threads), min(1.0, most_partitions * length / sizes.n_runs) * wanted.held
            shares.append(_Share(works, holds, works + holds <= room.nbytes and holds <= room.most_held))
        if tried >= most or all(share.fits for share in shares):
            return n, shares
        tried *= 2


def _fits_workers(per_thread: int | None, sizes: Sizes, strategy: Strategy, rooms: Sequence[Room]) -> bool:
    return all(share.fits for share in _shared_out(sizes, needs(sizes, strategy, True), rooms, per_thread)[1])


def _on_workers(sizes: Sizes, wanted: Needs, tried: Sequence[Strategy], rooms: list[Room], per_thread: int | None):
    strategy = tried[0]
    n_partitions, shares = _shared_out(sizes, wanted, rooms, per_thread)
    for room, (works, holds, fits) in zip(rooms, shares, strict=True):
        if fits:
            continue
        may_have = f"{size(room.base + room.nbytes)} ({room.source})"
        ways = ways_out(sizes, tried, rooms, partial(_fits_workers, per_thread))
        larger = room.base + room.nbytes >= room.ceiling  # memory_limit_gb is not what is too small
        if works > room.nbytes:
            fewer = wanted.working(1) <= room.nbytes
            start = " or ".join(["more memory"] * larger + ["fewer threads"] * fewer)
            raise MemoryBudgetError(
                f"worker {room.name} may have {may_have} and needs {size(room.base + works)} before it holds any data, "
                f"including {size(wanted.in_flight(room.n_threads))} to read runs of chunks of {size(wanted.runs[0])} in "
                f"{several(room.n_threads, 'thread')}",
                *ways,
                *([f"start workers with {start}"] if start else []),
            )
        left = sum(max(0.0, each.nbytes - share.works) for each, share in zip(rooms, shares, strict=True))
        raise MemoryBudgetError(
            f"the data take {size(wanted.held)} and {several(len(rooms), 'worker')} have room for {size(left)}: worker "
            f"{room.name} would hold {size(holds)} and have {size(room.base + works + holds)} at its peak, of "
            f"{may_have}",
            *ways,
            "start more workers or larger ones" if larger else "start more workers",
        )
    reason = f"{several(len(rooms), 'worker')} hold the data of {size(wanted.held)} together"
    if strategy == "streaming":
        reason = f"{several(len(rooms), 'worker')} read the data again in each sweep"
    if not rooms:
        reason = f"the data take {size(wanted.held)}; no worker has joined yet, so their memory is unknown"
        with_ = f" with the resources {asked}, as `dask worker --resources`" if (asked := wanted_resources()) else ""
        logger.warning(
            "the cluster has no workers yet%s, and the fit waits for one: start some, as with client.cluster.scale(2)",
            with_,
        )
    sent = 0 if sizes.lazy else sizes.nbytes
    client = needs(sizes, strategy).start + CLIENT_BYTES + sent
    here = room_here(None)._replace(limit=inf).place(0, client, 1)
    return (
        reason,
        n_partitions,
        (
            here,
            *(
                room.place(holds + wanted.shared, works + holds, on_device=holds)
                for room, (works, holds, _) in zip(rooms, shares, strict=True)
            ),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# ways out


def least_limit(rooms: Sequence[Room], fits: Callable[[Sequence[Room]], bool]) -> str | None:
    """The least ``memory_limit_gb``, to two digits, with which ``fits`` is true of the rooms; None where none is."""

    def enough(gib: float) -> bool:
        return fits([room.limited_to(gib) for room in rooms])

    if not any(room.limited for room in rooms) or not enough(MOST_GIB):
        return None
    low, high = LEAST_GIB, MOST_GIB
    while high > LIMIT_STEP * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return at_least(high)


def ways_out(
    sizes: Sizes, tried: Sequence[Strategy], rooms: Sequence[Room], fits: Callable[[Sizes, Strategy, Sequence[Room]], bool]
) -> list[str]:
    """What to change: each entry would pass the check ``fits`` that ``sizes`` fails with all strategies ``tried``."""

    def passes(sizes: Sizes, rooms: Sequence[Room] = rooms) -> bool:
        return any(fits(sizes, strategy, rooms) for strategy in tried)

    limit = least_limit(rooms, partial(passes, sizes))
    ways = [] if limit is None else [f"raise memory_limit_gb to {limit}"]
    can_stream, smaller = "streaming" not in tried and not sizes.whole, _in_smaller_chunks(sizes)
    rechunked = any(map(passes, smaller))
    if rechunked:
        ways.append(RECHUNK)
    if can_stream and fits(sizes, "streaming", rooms):
        ways.append('use strategy="streaming", which does not hold the data')
    elif can_stream and not rechunked and any(fits(each, "streaming", rooms) for each in smaller):
        ways.append(f'{RECHUNK} and use strategy="streaming", which does not hold the data')
    return [*ways, "fit a part of the data"] if passes(_a_part(sizes)) else ways


def _in_smaller_chunks(sizes: Sizes) -> list[Sizes]:
    """The same data in runs of half, a quarter, ... of the points, in chunks that are alike for all arrays."""
    found, n = [], sizes.longest[0] // 2
    while sizes.lazy and not sizes.whole and n >= JOINED_POINTS:
        n_runs = -(-sizes.n_points // n)
        longest = (n,) * min(n_runs, MOST_RUNS)
        found.append(sizes._replace(n_runs=n_runs, n_chunks=n_runs, longest=longest, passed=(), making=0.0))
        n //= 2
    return found


def _a_part(sizes: Sizes) -> Sizes:
    """The smallest part of the data: one run of chunks, or of arrays in memory as many points as parameters."""
    if sizes.lazy and not sizes.whole:
        held = sizes.held / sizes.n_runs
        return sizes._replace(
            n_points=sizes.longest[0], n_chunks=1, n_runs=1, longest=sizes.longest[:1], held=held, sent=held
        )
    p = sizes.n_params
    return sizes._replace(n_points=p, n_chunks=1, n_runs=1, longest=(p,), held=0.0, sent=0.0, factor=0)
