"""Data in memory, ready for the kernels: what one task works on, and the kinds of work."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from dask.sizeof import sizeof
from distributed.metrics import context_meter

from ..data.chunks import Census, Chunk, Preparation, merge_censuses, prepare_chunk
from ..data.loading import Load, PassedOn, read_together
from ..data.sample import pick, spread, stratified_places
from ..data.store import BadChunkError
from ..kernels.blocks import Block
from ..memory.machine import keep_freed_memory
from ..memory.needs import READ_COPIES
from ..memory.pool import shared_pool
from .condensed import Sums, Tree, merge_chunks
from .devices import OnDevices
from .request import Objective, Request, condense_blocks, count_not_finite

RESERVED_FROM = 2**23  # bytes of a run from which its memory is reserved: that takes 0.6 ms


class Partition(NamedTuple):
    """Runs of chunks in memory, and what is known of them; neither a model nor parameters."""

    preparation: Preparation
    chunks: Sequence[Chunk]
    census: Census
    sample: tuple[np.ndarray, ...]  # coordinates of some consecutive points
    on_devices: OnDevices | None = None  # None: the data are not held

    @classmethod
    def of(cls, preparation: Preparation, chunks: Sequence[Chunk], held: bool) -> "Partition":
        census = merge_censuses(census for chunk in chunks for census in chunk.censuses)
        sample = longest(chunk.sample for chunk in chunks)
        return cls(preparation, chunks, census, sample, OnDevices() if held else None)


@sizeof.register(Partition)
def partition_nbytes(partition: Partition) -> int:
    """What a partition holds, so that Dask knows when a worker is full; blocks that share a buffer count it once."""
    buffers = (buffer for chunk in partition.chunks for block in chunk.blocks for buffer in block.buffers)
    return sum({id(owner): owner.nbytes for owner in map(_owner, buffers)}.values())


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def longest(samples: Iterable[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """The first of the longest: a chunk of one point says nothing about its neighbours."""
    return max(samples, key=lambda sample: len(sample[0]) if sample else 0)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load_chunk(preparation: Preparation, run: list[Load], known: PassedOn) -> Chunk:
    """Read the chunks of a run and join them; where memory is short, large ones wait for other threads' turn to end.

    Chunks that cannot be read are hidden where that has been asked for.

    Raises
    ------
    MemoryError
        Where a run does not fit even alone.
    BadChunkError
        Where a chunk cannot be read.
    """
    damage = {}

    def pieces(load, read):
        try:
            with known.to(load) as values:
                return load.pieces(values, read)
        except BadChunkError as err:
            if not err.masked:
                raise
            damage[load.index] = (err.with_traceback(None),)
            return load.hidden(preparation, known.shared)

    large = preparation.read_bytes >= RESERVED_FROM
    guard = shared_pool.reserve(READ_COPIES * preparation.read_bytes, wait=True) if large else nullcontext()
    with guard, context_meter.meter("nlsq-read"):
        chunk = prepare_chunk(preparation, [load.index for load in run], [*map(pieces, run, read_together(run))])
    if not damage:
        return chunk
    return chunk._replace(censuses=tuple(each._replace(damage=damage.get(each.index, ())) for each in chunk.censuses))


def load_partition(preparation: Preparation, runs: list[list[Load]], keys: list, *values) -> Partition:
    """The task that puts a partition on a worker; ``values`` are those of the shared tasks ``keys``."""
    keep_freed_memory()
    known = PassedOn(dict(zip(keys, values, strict=True)), runs)
    return Partition.of(preparation, [load_chunk(preparation, run, known) for run in runs], held=True)


def with_factor(chunk: Chunk, factor: np.ndarray) -> Chunk:
    """The chunk with the Cholesky factor of the covariance of y as its last buffer."""
    return chunk._replace(blocks=tuple(b._replace(buffers=(*b.buffers, factor)) for b in chunk.blocks))


# ---------------------------------------------------------------------------------------------------------------------
# kinds of work


class Work(NamedTuple):
    """What all data are read for: ``of(partition, objectives, *args, share=...)`` of each partition.

    ``merge(results, *args)`` makes one result of those of neighbours, in order. ``share(function, blocks)`` is
    ``function(blocks)``, a list with something for each block, by several threads where there are any. ``name`` is that of
    its tasks, ``on_device`` whether it is done where kernels compute.
    """

    name: str
    of: Callable
    merge: Callable
    on_device: bool = False


Share = Callable[[Callable[[Sequence[Block]], list], Sequence[Block]], list]


def alone(function: Callable[[Sequence[Block]], list], blocks: Sequence[Block]) -> list:
    return function(blocks)


class Answers(NamedTuple):
    """Sums for each request, and what is known of the data that they are from."""

    sums: list[Sums]
    census: Census
    sample: tuple[np.ndarray, ...]


def _condense(partition: Partition, objectives, requests: Sequence[Request], share: Share = alone) -> Answers:
    requests = [request._replace(objective=objectives[request.objective]) for request in requests]
    blocks: Sequence[Block] = [block for chunk in partition.chunks for block in chunk.blocks]
    if partition.on_devices is not None:
        blocks = partition.on_devices.of(partition.preparation.kind, blocks, len(requests[0].params))
    found = share(partial(condense_blocks, partition.preparation, requests=requests), blocks)
    sums = [
        merge_chunks(partition.chunks, [each[k] for each in found], request.reduction, request.segmentation)
        for k, request in enumerate(requests)
    ]
    return Answers(sums, partition.census, partition.sample)


def _merge_answers(answers: Iterable[Answers], requests: Sequence[Request]) -> Answers:
    answers = [*answers]
    trees = [Tree(len(answers), request.reduction, request.segmentation.level) for request in requests]
    for k, answer in enumerate(answers):
        for tree, sums in zip(trees, answer.sums, strict=True):
            tree.add(0, k, sums)
    census = merge_censuses(answer.census for answer in answers)
    return Answers([tree.root() for tree in trees], census, longest(answer.sample for answer in answers))


def _describe(partition: Partition, objectives, share: Share = alone) -> list:
    return [(partition.census, partition.sample)]


def _count(partition: Partition, objectives: Sequence[Objective], request: Request, share: Share = alone) -> list:
    return count_not_finite(partition.preparation, partition.chunks, request._replace(objective=objectives[0]))


def _pick(partition: Partition, objectives, grid, n: int, share: Share = alone) -> list[tuple[np.ndarray, np.ndarray]]:
    """Those of `stratified_places` that are in this partition and count: which (m,), and their values (operands, m)."""
    preparation, found = partition.preparation, []
    runs, places = stratified_places(grid, n)
    by_run = np.argsort(runs, kind="stable")
    for chunk in partition.chunks:
        index = [i // n for i, n in zip(chunk.censuses[0].index, preparation.joins, strict=True)]
        run = np.ravel_multi_index(index, [len(sizes) for sizes in grid])
        mine = by_run[slice(*np.searchsorted(runs, [run, run + 1], sorter=by_run))]
        values, counts = pick(preparation, chunk, places[mine])
        found.append((mine[counts], values[:, counts]))
    return found


def _draw(partition: Partition, objectives, n: int, share: Share = alone) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Index of each chunk and operands (operands, m) of those of ``n`` points, spread over it, that count."""
    found = []
    for chunk in partition.chunks:
        n_all, index = sum(census.n_points for census in chunk.censuses), chunk.censuses[0].index
        places = spread(n, n_all, hash(index) % 2**32)  # integers: the same hash anywhere
        values, counts = pick(partition.preparation, chunk, places)
        found.append((index, values[:, counts]))
    return found


def _joined(results: Iterable[list], *args) -> list[Any]:
    return [each for found in results for each in found]


CONDENSE = Work("sweep", _condense, _merge_answers, on_device=True)
DESCRIBE = Work("census", _describe, _joined)
COUNT = Work("count", _count, _joined, on_device=True)
PICK = Work("points", _pick, _joined)
DRAW = Work("draw-points", _draw, _joined)
