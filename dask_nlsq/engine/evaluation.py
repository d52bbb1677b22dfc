"""What a sweep evaluates: an objective on blocks of data."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
from dask.sizeof import sizeof
from distributed.metrics import context_meter

from ..base.x64 import float64
from ..data.chunks import LARGEST, Chunk, Rules, prepare_chunk
from ..data.loading import Load
from ..data.sample import pick, stratified_places
from ..data.store import BadChunkError
from ..kernels.blocks import MAX_TILE, Block, JacMode, KernelSpec, Reduction, tile_size
from ..kernels.rows import sweep_kernel
from ..kernels.values import VALUES_LEAD, What, value_kernel
from ..memory.pool import shared_pool
from ..model.function import Model
from .condensed import Segmentation

RESERVED_FROM = 2**23  # bytes of a run from which its memory is reserved: that takes 0.6 ms
READ_COPIES = 3  # of a run while it is read: as it comes, a step of the user's graph, and the blocks


class SweepOptions(NamedTuple):
    """How a sweep forms the rows [J r] and condenses them."""

    reduction: Reduction
    jac_mode: JacMode
    weigh: bool = False  # sum the weights too, and y with them


class Evaluation(NamedTuple):
    """What a sweep computes, besides at which parameters."""

    model: Model
    rules: Rules
    loss: str
    f_scale: float
    grouping: Segmentation = Segmentation()

    def spec(self, block: Block, n_params: int, how: SweepOptions) -> KernelSpec:
        layouts = self.rules.layouts
        if block.clean:
            layouts = layouts._replace(invalid=None)  # axis vectors: half the time of a sweep
        capacity, n_parts = len(block.buffers[0]), self.grouping.per_block
        tile = None if self.rules.whole else tile_size(n_params, capacity)
        if tile is not None and tile <= MAX_TILE:  # longer ones are a GPU's, which has no use for short ones
            tile = min(tile, -(-capacity // max(n_parts, 1)))
        whitened = len(block.buffers) > len(layouts.operands)
        return KernelSpec(layouts, how.reduction, how.jac_mode, self.loss, tile, whitened, n_parts)

    def reduce_blocks(self, blocks: Iterable[Block], params: np.ndarray, how: SweepOptions):
        """[(matrix, cost, parts)] of each block."""
        kernels, results = {}, []
        with float64():
            for block in blocks:
                like, label = (len(block.buffers[0]), block.clean), "jax-execute"
                if like not in kernels:
                    n_known = len(self.model.compiled)
                    kernels[like] = sweep_kernel(self.model, self.spec(block, len(params), how))
                    label = "jax-execute" if n_known == len(self.model.compiled) else "jax-compile"  # by the first call
                with context_meter.meter(label):  # else Dask counts it as idle
                    matrix, cost, parts = kernels[like](params, self.f_scale, block, how.weigh)
                    results.append((np.asarray(matrix), float(cost), np.asarray(parts)))
        return results

    def values(self, chunk: Chunk, params: np.ndarray, what: What, *spread) -> np.ndarray:
        """What `value_kernel` computes, for a chunk, in its shape; residuals are NaN where the mask is true."""
        flat = []
        with float64():
            for block in chunk.blocks:
                kernel = value_kernel(self.model, self.spec(block, len(params), SweepOptions("gram", "columns")), what)
                flat.append(np.asarray(kernel(params, self.f_scale, block, *spread))[..., : block.geometry[0]])
        return np.concatenate(flat, axis=-1).reshape(*VALUES_LEAD[what], *chunk.blocks[0].shape.astype(int))


def longest(samples):
    """The first of the longest: a chunk of one point tells nothing about its neighbours."""
    return max(samples, key=lambda sample: len(sample[0]) if sample else 0)


class Partition(NamedTuple):
    """Chunks on a worker, with what is needed to evaluate them, so that a sweep's task carries the parameters only."""

    evaluation: Evaluation
    chunks: list[Chunk]


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


def load_chunk(rules: Rules, run: list[Load], shared: dict) -> Chunk:
    """Read the chunks of a run and join them; where memory is short, large ones wait for other threads' turn to end.

    Chunks that cannot be read are hidden where that has been asked for.

    Raises
    ------
    MemoryError
        Where a run does not fit even alone.
    BadChunkError
        Where a chunk cannot be read.
    """
    nbytes, damage = len(run) * rules.read_bytes, {}

    def pieces(load):
        try:
            return load.pieces(shared)
        except BadChunkError as err:
            if not err.masked:
                raise
            damage[load.index] = (err.with_traceback(None),)
            return load.hidden(rules, shared)

    large = nbytes >= RESERVED_FROM
    guard = shared_pool.reserve(READ_COPIES * nbytes, wait=True) if large else nullcontext()
    with guard, context_meter.meter("nlsq-read"):
        chunk = prepare_chunk(rules, [load.index for load in run], [pieces(load) for load in run])
    if not damage:
        return chunk
    return chunk._replace(censuses=tuple(each._replace(damage=damage.get(each.index, ())) for each in chunk.censuses))


def count_not_finite(partition: Partition, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    """Per chunk of y: its index and how many residuals that count are not finite, or too large to be squared."""
    counts = []
    for chunk in partition.chunks:
        bad = ~(abs(partition.evaluation.values(chunk, params, "residual").ravel()) < LARGEST**2)
        ends = np.cumsum([census.n_points for census in chunk.censuses])
        for census, part in zip(chunk.censuses, np.split(bad, ends[:-1]), strict=True):
            counts.append((census.index, int(np.count_nonzero(part)) - census.n_masked - census.n_omitted))
    return counts


def pick_points(partition: Partition, grid, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of `stratified_places` that are in this partition and count: which (m,), and their values (operands, m)."""
    rules = partition.evaluation.rules
    runs, places = stratified_places(grid, rules, n)
    by_run = np.argsort(runs, kind="stable")
    orders, values = [], []
    for chunk in partition.chunks:
        run = np.ravel_multi_index(chunk.censuses[0].index, [len(sizes) for sizes in grid]) // rules.run
        mine = by_run[slice(*np.searchsorted(runs, [run, run + 1], sorter=by_run))]
        found, counts = pick(rules, chunk, places[mine])
        orders.append(mine[counts])
        values.append(found[:, counts])
    return np.concatenate(orders), np.concatenate(values, axis=1)


def with_factor(chunk: Chunk, factor: np.ndarray) -> Chunk:
    """The chunk with the Cholesky factor of the covariance of y as its last buffer."""
    return chunk._replace(blocks=tuple(b._replace(buffers=(*b.buffers, factor)) for b in chunk.blocks))
