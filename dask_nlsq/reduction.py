"""Normal equations of all data: per block, merged in a fixed order, by local threads or by the workers of a cluster.

The order of the merge is a binary tree over the blocks of a chunk and then over the chunks in C order, and nothing
else enters it. A partition (the chunks that one task takes) is an aligned run of ``2^s`` chunks, that is a subtree, so
the sum has the same bits for any number of threads, workers and partitions.
"""

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed
from dask.sizeof import sizeof
from distributed import Client
from distributed.metrics import context_meter
from numpy.linalg import norm

from .chunks import LARGEST, Census, Chunk, Rules, prepare_chunk, release
from .cluster import Pieces
from .config import threads
from .inputs import Problem
from .kernels import (
    BLOCK_POINTS,
    MAX_TILE,
    VALUES_LEAD,
    Block,
    JacMode,
    KernelSpec,
    Reduction,
    What,
    part_size,
    sweep_kernel,
    take_apart,
    tile_size,
    value_kernel,
)
from .loading import Load, compute_shared, plan_loads
from .memory import get_memory_manager
from .model import Model
from .resources import keep_freed_memory
from .rules import EPS, ROUNDING
from .sample import Sample, as_sample, pick, stratified_places
from .store import BadChunkError
from .trf_jit import LIKELIHOODS, float64, inherit_device

COLUMN_ROUNDING = 2**12 * EPS  # of columns of norm 1, from the evaluation of the model: closer ones count as the same
GROUPS_PER_THREAD = 8  # runs of blocks handed to a thread: uneven blocks balance, starting a run costs 0.02 ms
RESERVED_FROM = 2**23  # bytes of a run from which its memory is reserved: that takes 0.6 ms
MOST_PARTS = 256  # the standard errors that are taken from the scatter of so many are good to 5 to 10 %
FEWEST_PARTS, PARTS_BYTES = 16, 2**21  # of many parameters
READ_COPIES = 3  # of a run while it is read: as it comes, a step of the user's graph, and the blocks


class Read(NamedTuple):
    """What a sweep that re-reads the data has read."""

    nbytes: int  # of the arrays as they are in memory
    n_points: int  # that count
    n_left_out: int  # masked or omitted
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9


class NormalEquations(NamedTuple):
    """One sweep's result: ``matrix`` (p+1, p+1) is the gram matrix of [J r] or its triangular factor."""

    matrix: np.ndarray
    cost: float
    reduction: Reduction
    parts: np.ndarray | None = None  # (k, part_size(p)) sums over consecutive runs of points, see `kernels.Parts`
    read: Read | None = None  # where the data are not held
    size: float = 0.0  # sum w y^2, which says how large the rounding of the residuals is

    @property
    def pearson(self) -> float:
        """r^T r."""
        last = self.matrix[:, -1]
        return float(last[-1] if self.reduction == "gram" else last @ last)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.cost) and np.isfinite(self.matrix).all())

    @property
    def n_points(self) -> int:
        """Points used; 0 where no sums were kept."""
        return 0 if self.parts is None else int(take_apart(self.parts, len(self.matrix) - 1).n.sum())

    @property
    def floored(self) -> int:
        """Points with counts whose mean is below the least one at which a Poisson likelihood is evaluated."""
        return 0 if self.parts is None else int(take_apart(self.parts, len(self.matrix) - 1).floored.sum())


class Factor(NamedTuple):
    """``R`` (p, p) with R^T R = J^T J, ``projected`` = Q^T r, gradient J^T r, both (p,)."""

    R: np.ndarray
    projected: np.ndarray
    gradient: np.ndarray
    condition: float  # of R with columns of norm 1; inf where the rank is deficient


def rank_tolerance(equations: NormalEquations) -> float:
    """Relative size below which a singular value of J, with columns of norm 1, is rounding.

    That of the evaluation of the model, or the root of p eps where a gram matrix holds squares. The number of rows does not
    enter: what is decomposed has p of them, however many points there are.
    """
    relative = (len(equations.matrix) - 1) * EPS
    return max(relative, COLUMN_ROUNDING) if equations.reduction == "qr" else relative**0.5


def factor(equations: NormalEquations) -> Factor:
    """What the trust-region method works on; all decisions about the rank are made on columns of norm 1.

    Directions in which the columns are alike to rounding are kept at the size of the tolerance, since covariances and
    singular values need a regular R. A factor knows that the data say nothing about them: no step leads along. A gram matrix
    may only have lost the digits, so what the gradient has along them stays unless it is rounding. A column that is zero
    stays so.
    """
    p = len(equations.matrix) - 1
    R, last = equations.matrix[:p, :p], equations.matrix[:p, p]
    by_gram = equations.reduction == "gram"
    norms = np.sqrt(np.diag(R)) if by_gram else norm(R, axis=0)
    moving = norms > 0
    D = np.where(moving, norms, 1.0)
    gradient = last if by_gram else R.T @ last
    tolerance = rank_tolerance(equations)
    if by_gram:
        w, V = np.linalg.eigh(R / D / D[:, None])
        s = np.sqrt(np.maximum(w, 0.0))
    else:
        _, s, Vt = np.linalg.svd(R / D)
        s, V = s[::-1], Vt[::-1].T
    regular = s[0] > tolerance * s[-1]
    condition = float(s[-1] / s[0]) if regular else np.inf
    if regular and not by_gram:
        return Factor(R, last, gradient, condition)
    lost = s <= tolerance * s[-1]
    s = np.where(lost, 2**0.5 * tolerance * s[-1], s)
    Q, triangular = np.linalg.qr(s[:, None] * V.T * np.where(moving, D, 0.0))
    along = V.T @ (gradient / D)
    rounding = ROUNDING * np.sqrt(equations.pearson) if by_gram else np.inf
    along = np.where(lost & (np.abs(along) <= rounding), 0.0, along)
    return Factor(triangular, Q.T @ (along / np.where(s > 0, s, 1.0)), gradient, condition)


def merge(matrices: np.ndarray, costs: np.ndarray, reduction: Reduction) -> tuple[np.ndarray, float]:
    """Merge (b, p+1, p+1) matrices and (b,) costs of neighbours, pair by pair, until one is left."""
    while len(matrices) > 1:
        even = len(matrices) // 2 * 2
        left, right = matrices[0:even:2], matrices[1:even:2]
        pairs = left + right if reduction == "gram" else np.linalg.qr(np.concatenate([left, right], axis=1), mode="r")
        matrices = np.concatenate([pairs, matrices[even:]])
        costs = np.concatenate([costs[0:even:2] + costs[1:even:2], costs[even:]])
    return matrices[0], costs[0]


def fold(parts: np.ndarray, times: int) -> np.ndarray:
    """Add neighbouring rows (k, m), pair by pair, so many times."""
    for _ in range(times):
        even = len(parts) // 2 * 2
        parts = np.concatenate([parts[0:even:2] + parts[1:even:2], parts[even:]])
    return parts


class Grouping(NamedTuple):
    """Which runs of consecutive points have sums of their own, beside those of all data."""

    per_block: int = 1
    per_run: int = MOST_PARTS  # at most, of a run of chunks
    level: int = 0  # so many times neighbouring runs of chunks are joined

    @classmethod
    def of(cls, problem: Problem, n_params: int) -> "Grouping":
        """Of all data enough parts to see how much they differ, and no more than are worth their memory."""
        most = int(np.clip(PARTS_BYTES // (8 * part_size(n_params)), FEWEST_PARTS, MOST_PARTS))
        n_blocks = max(-(-problem.n_points // BLOCK_POINTS), problem.n_runs)
        longest = max(problem.n_points, problem.run_points)
        few = 2 ** (longest - 1).bit_length()  # as the buffer of a few points is: each of them is a part of its own
        per_block = -(-min(most, few) // n_blocks)  # the loop over 256 takes 0.3 ms
        return cls(per_block, max(1, most // problem.n_runs), max(0, -(-problem.n_runs // most) - 1).bit_length())


class How(NamedTuple):
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
    grouping: Grouping = Grouping()

    def spec(self, block: Block, n_params: int, how: How) -> KernelSpec:
        layouts = self.rules.layouts
        if block.clean:
            layouts = layouts._replace(invalid=None)  # axis vectors: half the time of a sweep
        capacity, n_parts = len(block.buffers[0]), self.grouping.per_block
        tile = None if self.rules.whole else tile_size(n_params, capacity)
        if tile is not None and tile <= MAX_TILE:  # longer ones are a GPU's, which has no use for short ones
            tile = min(tile, -(-capacity // max(n_parts, 1)))
        whitened = len(block.buffers) > len(layouts.operands)
        return KernelSpec(layouts, how.reduction, how.jac_mode, self.loss, tile, whitened, n_parts)

    def reduce_blocks(self, blocks: Iterable[Block], params: np.ndarray, how: How):
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
                kernel = value_kernel(self.model, self.spec(block, len(params), How("gram", "columns")), what)
                flat.append(np.asarray(kernel(params, self.f_scale, block, *spread))[..., : block.geometry[0]])
        return np.concatenate(flat, axis=-1).reshape(*VALUES_LEAD[what], *chunk.blocks[0].shape.astype(int))


def merge_chunks(chunks: Iterable[Chunk], results: list, reduction: Reduction, grouping: Grouping):
    """Merge the results of consecutive blocks, first within each chunk."""
    merged, begin = [], 0
    for chunk in chunks:
        end = begin + len(chunk.blocks)
        matrix, cost, parts = merge_results(results[begin:end], reduction)
        times = max(0, -(-len(parts) // grouping.per_run) - 1).bit_length()
        merged.append((matrix, cost, fold(parts, times)))
        begin = end
    matrix, cost, parts = merge_results(merged, reduction)
    return matrix, cost, fold(parts, grouping.level)


def merge_results(results: Sequence[tuple[np.ndarray, float, np.ndarray]], reduction: Reduction):
    """`merge` of the (matrix, cost) of neighbours, and their parts one after the other."""
    matrices, costs, parts = zip(*results, strict=True)
    return *merge(np.stack(matrices), np.array(costs), reduction), np.concatenate(parts)


class Sweep:
    """All data of a fit, held; ``sweep(params, reduction)`` reads them once and returns `NormalEquations`.

    A context manager: leaving it gives back what it holds. `open_sweep` makes the right one.
    """

    count = 0  # sweeps so far
    latest: tuple[np.ndarray, NormalEquations]  # parameters and result of the last one
    weights: np.ndarray | None = None  # (k, 3): of each part the sums of w, w y and w y^2, from the first sweep
    drawn = None  # what a sweep that does not hold the data knows beforehand
    chunks: list[Chunk]  # where they are held in this process
    jac_mode: JacMode = "columns"  # chosen once, where the fit starts, and sent along, so that all workers do the same

    def __init__(self, problem: Problem, evaluation: Evaluation):
        self.evaluation, self.grid, self.n_stored = evaluation, problem.chunks, problem.n_points

    def __call__(self, params: np.ndarray, reduction: Reduction) -> NormalEquations:
        self.count += 1
        params = np.asarray(params, dtype=np.float64)
        matrix, cost, parts = self._reduce(params, How(reduction, self.jac_mode, self.weights is None))
        equations = self._weighed(NormalEquations(np.asarray(matrix), float(cost), reduction, parts))
        self.latest = params, equations
        return equations

    def _weighed(self, equations: NormalEquations) -> NormalEquations:
        """With the size of y; of counts, whose weights are 1 / mean, the sum of y stands for it."""
        if self.weights is None:
            assert equations.parts is not None  # as after each sweep over all data
            self.weights = take_apart(equations.parts, len(equations.matrix) - 1).weights
        return equations._replace(size=float(self.weights[:, 1 if self.evaluation.loss in LIKELIHOODS else 2].sum()))

    def points(self, n: int) -> Sample:
        """About ``n`` of the points that count, spread evenly over all data; no sweep.

        They do not depend on chunks, partitions or workers. All points, however many, where the model needs them at once.
        """
        n_counted = self.n_stored - sum(census.n_masked + census.n_omitted for census in self.census())
        if self.evaluation.rules.whole:
            (chunk,) = self.chunks  # all are in this process then
            return Sample(chunk.blocks[0], self.evaluation.rules.layouts, n_counted, n_counted, True)
        wanted = min(-(-n * self.n_stored // n_counted), self.n_stored)
        orders, values = zip(*self._pick(wanted), strict=True)
        order = np.argsort(np.concatenate(orders))
        return as_sample(self.evaluation.rules.layouts, np.concatenate(values, axis=1)[:, order], n, n_counted)

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        raise NotImplementedError

    def _reduce(self, params: np.ndarray, how: How) -> tuple[np.ndarray, float, np.ndarray]:
        """Matrix, cost and parts of all data."""
        raise NotImplementedError

    def _pick(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """What `pick_points` finds in all partitions."""
        raise NotImplementedError

    def census(self) -> list[Census]:
        """What is known of each chunk."""
        raise NotImplementedError

    def sample(self) -> tuple[np.ndarray, ...]:
        """Coordinates of some consecutive points."""
        raise NotImplementedError

    def not_finite(self, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
        """Per chunk: how many residuals are not finite."""
        raise NotImplementedError


class LocalSweep(Sweep):
    """Data in this process, blocks shared out to threads; a single block is done in place."""

    def __init__(self, problem: Problem, evaluation: Evaluation, n_threads: int):
        super().__init__(problem, evaluation)
        self.chunks, self.pool = [], None
        runs, common = plan_loads(problem)
        shared = compute_shared(common)
        with ExitStack() as on_error, ThreadPoolExecutor(min(n_threads, len(runs)), "nlsq-load") as pool:
            on_error.push(self)
            self.chunks.extend(pool.map(lambda run: load_chunk(evaluation.rules, run, shared), runs))
            on_error.pop_all()
        if problem.factor is not None:
            self.chunks = [with_factor(chunk, problem.factor) for chunk in self.chunks]
        self.blocks = [block for chunk in self.chunks for block in chunk.blocks]
        n_threads = min(n_threads, len(self.blocks))
        self.pool = ThreadPoolExecutor(n_threads, "nlsq-sweep", inherit_device()) if n_threads > 1 else None
        size = -(-len(self.blocks) // (n_threads * GROUPS_PER_THREAD))
        self.groups = [self.blocks[k : k + size] for k in range(0, len(self.blocks), size)]

    def __exit__(self, *exc):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for chunk in self.chunks:
            release(chunk)
        self.chunks, self.blocks, self.groups = [], [], []

    def _reduce(self, params, how):
        share = self.pool.map if self.pool is not None else map
        runs = share(lambda blocks: self.evaluation.reduce_blocks(blocks, params, how), self.groups)
        results = [result for run in runs for result in run]
        return merge_chunks(self.chunks, results, how.reduction, self.evaluation.grouping)

    def census(self) -> list[Census]:
        return [census for chunk in self.chunks for census in chunk.censuses]

    def sample(self) -> tuple[np.ndarray, ...]:
        return longest(chunk.sample for chunk in self.chunks)

    def _pick(self, n):
        return [pick_points(Partition(self.evaluation, self.chunks), self.grid, n)]

    def not_finite(self, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
        """Per chunk: how many residuals are not finite."""
        return count_not_finite(Partition(self.evaluation, self.chunks), params)


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
    guard = get_memory_manager().memory_guard(READ_COPIES * nbytes, wait=True) if large else nullcontext()
    with guard, context_meter.meter("nlsq-read"):
        chunk = prepare_chunk(rules, [load.index for load in run], [pieces(load) for load in run])
    if not damage:
        return chunk
    return chunk._replace(censuses=tuple(each._replace(damage=damage.get(each.index, ())) for each in chunk.censuses))


def load_partition(evaluation: Evaluation, runs: list[list[Load]], keys: list, *values) -> Partition:
    """The task that puts a partition on a worker; ``values`` are those of the shared tasks ``keys``."""
    keep_freed_memory()
    shared = dict(zip(keys, values, strict=True))
    return Partition(evaluation, [load_chunk(evaluation.rules, run, shared) for run in runs])


def sweep_partition(partition: Partition, params: np.ndarray, how: How):
    """The task of a sweep: merged matrix, cost and parts of one partition."""
    blocks = [block for chunk in partition.chunks for block in chunk.blocks]
    results = partition.evaluation.reduce_blocks(blocks, params, how)
    return merge_chunks(partition.chunks, results, how.reduction, partition.evaluation.grouping)


def describe_partition(partition: Partition):
    return [census for chunk in partition.chunks for census in chunk.censuses], longest(
        chunk.sample for chunk in partition.chunks
    )


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


class ClusterSweep(Sweep):
    """Data on the workers of ``client``: one future per partition, one task per partition and sweep.

    The results, a small matrix each, are merged by the client: where tasks merged 32 of them, each had to fetch them from
    other workers, and a sweep of 938 tasks on 300 workers, simulated in two processes, took 13 s or more instead of 2.
    """

    def __init__(self, problem: Problem, evaluation: Evaluation, client: Client, n_partitions: int):
        super().__init__(problem, evaluation)
        self.pieces = Pieces(client, load_partition, evaluation, *plan_loads(problem), n_partitions, not problem.lazy)
        with ExitStack() as on_error:
            on_error.push(self)
            self.pieces.wait()
            self.described = self.pieces.gather(describe_partition, "nlsq-census")
            on_error.pop_all()

    def __exit__(self, *exc):
        self.pieces.close()

    def _reduce(self, params, how):
        matrix, cost, parts = merge_results(self.pieces.gather(sweep_partition, "nlsq-sweep", params, how), how.reduction)
        return matrix, cost, fold(parts, max(0, self.evaluation.grouping.level - self.pieces.level))

    def census(self) -> list[Census]:
        return [census for part, _ in self.described for census in part]

    def sample(self) -> tuple[np.ndarray, ...]:
        return longest(sample for _, sample in self.described)

    def _pick(self, n):
        return self.pieces.gather(pick_points, "nlsq-points", self.grid, n)

    def not_finite(self, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
        """Per chunk: how many residuals are not finite."""
        return [each for part in self.pieces.gather(count_not_finite, "nlsq-count", params) for each in part]


def open_sweep(problem: Problem, evaluation: Evaluation, client: Client | None, n_partitions: int) -> Sweep:
    """Bring the data where they will be swept: to the workers of ``client`` in so many partitions, or into this process."""
    if client is not None:
        return ClusterSweep(problem, evaluation, client, n_partitions)
    return LocalSweep(problem, evaluation, threads())


def with_factor(chunk: Chunk, factor: np.ndarray) -> Chunk:
    """The chunk with the Cholesky factor of the covariance of y as its last buffer."""
    return chunk._replace(blocks=tuple(b._replace(buffers=(*b.buffers, factor)) for b in chunk.blocks))


def chunk_values(evaluation: Evaluation, factor, params, what, spread, load: Load, *values) -> np.ndarray:
    """What `value_kernel` computes, of one chunk, NaN where it cannot be read; ``values`` are those of its shared tasks."""
    chunk = load_chunk(evaluation.rules._replace(run=1), [load], dict(zip(load.shared, values, strict=True)))
    try:
        if any(census.damage for census in chunk.censuses):
            return np.full((*VALUES_LEAD[what], *load.shape), np.nan)
        return evaluation.values(chunk if factor is None else with_factor(chunk, factor), params, what, *spread)
    finally:
        release(chunk)


def map_chunks(problem: Problem, evaluation: Evaluation, params: np.ndarray, what: What, *spread):
    """What `value_kernel` computes, in y's shape ("band": (2, *shape)): lazy (Dask) where the problem is, else NumPy."""
    runs, common = plan_loads(problem)
    grid = np.empty([len(sizes) for sizes in problem.chunks], dtype=object)
    task = dask.delayed(chunk_values) if problem.lazy else chunk_values
    for load in itertools.chain(*runs):
        shared = [Delayed(key, common) for key in load.shared]
        values = task(evaluation, problem.factor, params, what, spread, load, *shared)
        shape = (*VALUES_LEAD[what], *load.shape)
        grid[load.index] = da.from_delayed(values, shape, dtype=np.float64) if problem.lazy else values
    return da.block(grid.tolist()) if problem.lazy else np.block(grid.tolist())


def but_hidden(problem: Problem, values):
    """Values with y's axes as their last ones, NaN where the mask of the problem is true."""
    if problem.rules.layouts.mask is None:
        return values
    return (da if problem.lazy else np).where(problem.operands[2] != 0, np.nan, values)
