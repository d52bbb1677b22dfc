"""Where the data of a fit will be held, in which pieces, and what that takes: decided from metadata, before any is read.

A process that takes part in a fit, a worker of the cluster or this one, has at its peak what it has now, plus

    start      JAX, and the compilation of the kernels
    held       the prepared data, in the dtype in which they are stored, padded as `inputs` pads them
    in flight  for each thread a run of chunks being read: as it comes, and what the user's graph makes on the way
    scratch    for each thread the rows [J r] of a tile and their copies

The Jacobian of all points never exists, unless the model or a covariance matrix needs all points at once.
"""

import logging
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import dask
from distributed import Client

from ..base.config import threads
from ..base.text import GB, several, size, table
from ..base.values import positive
from ..kernels.blocks import TILE_BYTES
from .machine import available_memory, process_settings, workers_memory
from .needs import READ_AHEAD, READ_COPIES, SAMPLE_POINTS
from .processes import HERE, ProcessMemory, advice, ask_workers, pjrt, wanted_resources
from .threshold import Strategy, effective_fraction

logger = logging.getLogger("dask_nlsq")

START_BYTES, START_PER_PARAM = 120e6, 6e6  # measured with 3, 20 and 50 parameters: 97, 129 and 255 to 360 MB
WORKER_BYTES = 240e6  # at least, of a worker that has imported JAX
CLIENT_BYTES = 60e6  # of the process that talks to the workers, for graphs and connections
BOOLEANS = 3  # bytes per point while a mask or sigma is checked
SAMPLE_COPIES = 4  # of the sample with which a fit that streams begins, while it is drawn
SCRATCH = 8  # times a tile's rows
STREAM_PER_THREAD = 8  # where the data are not held: also what a sweep that breaks off has to read again
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


class _Needs(NamedTuple):
    """Bytes that a fit takes."""

    held: int  # over all processes
    start: float  # per process
    in_flight: float  # per thread
    scratch: float  # per thread
    run: int  # one run of chunks, in float64

    def working(self, n_threads: int) -> float:
        return self.start + n_threads * (self.in_flight + self.scratch)


def _needs(problem, n_params: int, sent: bool) -> _Needs:
    checked = any(each.size > 1 for each in problem.operands[1 : 2 + (problem.preparation.layouts.mask is not None)])
    run = problem.run_nbytes
    rows = 8 * (n_params + 1) * problem.n_points if problem.preparation.whole else max(TILE_BYTES, 8 * n_params**2)
    return _Needs(
        held=problem.held_nbytes(sent),
        start=START_BYTES + START_PER_PARAM * n_params,
        in_flight=(READ_COPIES * run if problem.lazy else 0) + BOOLEANS * problem.run_points * checked,
        scratch=SCRATCH * rows + (0 if problem.factor is None else problem.factor.nbytes),
        run=run,
    )


def make_plan(
    problem,
    n_params: int,
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
    limit = None if memory_limit_gb is None else positive("memory_limit_gb", memory_limit_gb, "GiB") * GB
    if problem.preparation.whole and strategy in ("chunked", "streaming"):
        reason = "a covariance matrix as sigma" if problem.factor is not None else "this model, or xdata=None,"
        raise ValueError(f'{reason} needs all points at once: use strategy="standard"')
    lazy = problem.lazy and not problem.preparation.whole
    chosen: Strategy = "chunked" if lazy and client is not None else "standard"
    if strategy != "auto":
        chosen = strategy
    try:
        needs, (reason, n_partitions, places) = _decide(problem, n_params, chosen, limit, client, per_thread)
    except MemoryBudgetError as err:
        if strategy != "auto" or not lazy:
            raise
        chosen = "streaming"
        try:
            needs, (reason, n_partitions, places) = _decide(problem, n_params, chosen, limit, client, per_thread)
        except MemoryBudgetError:
            raise err from None
        reason = f"{reason}, since {err.numbers}"
    plan = Plan(
        strategy=chosen,
        reason=reason,
        n_points=problem.n_points,
        n_params=n_params,
        n_chunks=problem.n_chunks,
        n_partitions=n_partitions,
        sweep_bytes=problem.nbytes,
        held_bytes=needs.held,
        in_flight_bytes=int(needs.in_flight),
        places=places,
        decoded=problem.decoded,
    )
    logger.info("%r", plan)
    return plan


def _decide(problem, n_params, strategy, limit, client, per_thread):
    on_workers = strategy in ("chunked", "streaming") and client is not None
    needs = _needs(problem, n_params, sent=on_workers)
    if strategy == "streaming":
        readers = 1 if on_workers else min(threads(), problem.n_runs)
        sample = SAMPLE_COPIES * 8 * min(SAMPLE_POINTS, problem.n_points) * len(problem.operands)
        in_flight = needs.in_flight * (1 + READ_AHEAD / readers)
        needs = needs._replace(held=0, in_flight=in_flight, start=needs.start + (0 if on_workers else sample))
        per_thread = per_thread or STREAM_PER_THREAD
    if on_workers:
        return needs, _on_workers(problem, needs, limit, client, per_thread)
    return needs, _here(problem, needs, limit)


def _here(problem, needs, limit):
    fraction, _ = effective_fraction()
    here, n_threads = process_settings(), min(threads(), problem.n_runs)
    may_take, source = (available_memory() * fraction, f"{fraction:.0%} of what is available")
    if limit is not None:
        may_take, source = limit, "memory_limit_gb"
    working = needs.working(n_threads)
    if needs.held + working > may_take and (problem.lazy or limit is not None):
        way_out = "" if limit is None else f"raise memory_limit_gb to {(needs.held + working) / GB:.2g}, "
        way_out += "rechunk the data into smaller chunks, " if n_threads * needs.in_flight > may_take / 2 else ""
        way_out += 'use strategy="streaming", which holds none, ' if needs.held else ""
        raise MemoryBudgetError(
            f"the data take {size(needs.held)} in memory, and this process {size(working)} beside them, of which "
            f"{size(n_threads * needs.in_flight)} to read {several(n_threads, 'run')} of chunks at once; it may take "
            f"{size(may_take)} ({source})",
            f"{way_out}use a distributed.Client whose workers together have more memory, or fit a part of the data",
        )
    reason = "the data are in this process already"
    if not needs.held:
        reason = "the data are read anew in each sweep"
    elif problem.lazy:
        reason = f"the data take {size(needs.held)}, and this process may take {size(may_take)} ({source})"
    peak = here["now"] + needs.held + working
    return reason, 1, (ProcessMemory(HERE, n_threads, held=needs.held, peak=peak, limit=here["now"] + may_take, **here),)


def tasks_per_thread(n_threads: int) -> int:
    """Partitions for each thread, where nothing asks for more."""
    return max(1, min(PER_THREAD, FEW_TASKS // max(n_threads, 1)))


def partition_size(n_runs: int, n_threads: int, per_thread: int) -> int:
    """Runs of chunks per partition: a power of two, so that partitions are subtrees of the merge."""
    size, n_threads = 1, max(n_threads, 1)  # a cluster may have no workers yet
    while size < n_runs and -(-n_runs // (2 * size)) >= per_thread * n_threads:
        size *= 2
    return size


def _on_workers(problem, needs, limit, client, per_thread):
    n_threads, found = ask_workers(client)
    total = sum(n_threads.values())
    fraction, _ = effective_fraction()
    dasks = dask.config.get("distributed.worker.memory")  # shares of process and of data, above which it writes to disk
    share, data_share = min(fraction, dasks["spill"] or 1.0), dasks["target"] or 1.0
    source = f"{share:.0%} of its memory"
    limits = dict.fromkeys(found, inf) | (workers_memory(client) or {})
    may_have = {address: share * limits[address] for address in found}
    if limit is not None:
        source = "memory_limit_gb, and " + source
        may_have = {address: min(found[address]["now"] + limit, most) for address, most in may_have.items()}
    working = {a: max(WORKER_BYTES, found[a]["now"]) + needs.working(n) for a, n in n_threads.items()}

    def held(per_thread):
        """Number of partitions, and the most bytes of them that each worker gets."""
        length = partition_size(problem.n_runs, total, per_thread)
        n = -(-problem.n_runs // length)
        share = {a: min(n, -(-n * each // total) + (n > total)) for a, each in n_threads.items()}  # one too many
        return n, {a: min(1.0, k * length / problem.n_runs) * needs.held for a, k in share.items()}

    def fits(a):
        return working[a] + holds[a] <= may_have[a] and holds[a] <= data_share * limits[a]

    wanted, most = per_thread or tasks_per_thread(total), per_thread or MOST_PER_THREAD
    n_partitions, holds = held(wanted)
    while wanted < most and not all(map(fits, found)):
        wanted *= 2
        n_partitions, holds = held(wanted)
    for a in found:
        raised = "" if limit is None else "raise memory_limit_gb, "
        if working[a] > may_have[a]:
            raise MemoryBudgetError(
                f"worker {a} may have {size(may_have[a])} ({source}) and needs {size(working[a])} before it holds any "
                f"data, of which {size(n_threads[a] * needs.in_flight)} to read runs of chunks of {size(needs.run)} in "
                f"{several(n_threads[a], 'thread')}",
                f"{raised}rechunk the data into smaller chunks, or start workers with more memory or fewer threads",
            )
        if not fits(a):
            room = sum(max(0.0, may_have[each] - working[each]) for each in found)
            raise MemoryBudgetError(
                f"the data take {size(needs.held)} and {several(len(found), 'worker')} have room for {size(room)}: worker "
                f"{a} would hold {size(holds[a])} and have {size(working[a] + holds[a])} at its peak, of "
                f"{size(may_have[a])} ({source})",
                f'{raised}use strategy="streaming", which holds none, start more workers or larger ones, or fit a part of '
                "the data",
            )
    reason = f"{several(len(found), 'worker')} hold the data of {size(needs.held)} together"
    if not needs.held:
        reason = f"{several(len(found), 'worker')} read the data anew in each sweep"
    if not found:
        reason = f"the data take {size(needs.held)}; no worker has come yet, so that nothing is known of their memory"
        with_ = f" with the resources {wanted}, as `dask worker --resources`" if (wanted := wanted_resources()) else ""
        logger.warning(
            "the cluster has no workers yet%s, and the fit waits for one: start it, as with client.cluster.scale(2)", with_
        )
    here, sent = process_settings(), 0 if problem.lazy else 2 * problem.nbytes
    peak = here["now"] + needs.start + CLIENT_BYTES + sent
    places = [ProcessMemory(HERE, 1, held=0, peak=peak, limit=inf, **here)]
    for a, n in n_threads.items():
        places.append(ProcessMemory(a, n, held=holds[a], peak=working[a] + holds[a], limit=limits[a], **found[a]))
    return reason, n_partitions, tuple(places)
