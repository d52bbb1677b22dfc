"""Normal equations of all data: per block, merged in a fixed order, by local threads or by the workers of a cluster.

The order of the merge is a binary tree over the blocks of a chunk and then over the chunks in C order, and nothing
else enters it. A partition (the chunks that one task takes) is an aligned run of ``2^s`` chunks, that is a subtree, so
the sum has the same bits for any number of threads, workers and partitions.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
from distributed import Client

from ..base.config import threads
from ..base.x64 import inherit_device
from ..data.align import Problem
from ..data.chunks import Census, Chunk, release
from ..data.loading import Load, compute_shared, plan_loads
from ..data.sample import Sample, as_sample
from ..kernels.blocks import JacMode, Reduction
from ..kernels.rows import unpack
from ..memory.machine import keep_freed_memory
from ..model.losses import LIKELIHOODS
from .cluster import Pieces
from .condensed import Condensed, join_neighbours, merge_chunks, merge_results
from .evaluation import Evaluation, Partition, SweepOptions, count_not_finite, load_chunk, longest, pick_points, with_factor

GROUPS_PER_THREAD = 8  # runs of blocks handed to a thread: uneven blocks balance, starting a run costs 0.02 ms


class Sweep:
    """All data of a fit, held; ``sweep(params, reduction)`` reads them once and returns `Condensed`.

    A context manager: leaving it gives back what it holds. `open_sweep` makes the right one.
    """

    count = 0  # sweeps so far
    latest: tuple[np.ndarray, Condensed]  # parameters and result of the last one
    weights: np.ndarray | None = None  # (k, 3): of each part the sums of w, w y and w y^2, from the first sweep
    drawn = None  # what a sweep that does not hold the data knows beforehand
    chunks: list[Chunk]  # where they are held in this process
    jac_mode: JacMode = "columns"  # chosen once, where the fit starts, and sent along, so that all workers do the same

    def __init__(self, problem: Problem, evaluation: Evaluation):
        self.evaluation, self.grid, self.n_stored = evaluation, problem.chunks, problem.n_points

    def __call__(self, params: np.ndarray, reduction: Reduction) -> Condensed:
        self.count += 1
        params = np.asarray(params, dtype=np.float64)
        matrix, cost, parts = self._reduce(params, SweepOptions(reduction, self.jac_mode, self.weights is None))
        equations = self._weighed(Condensed(np.asarray(matrix), float(cost), reduction, parts))
        self.latest = params, equations
        return equations

    def _weighed(self, equations: Condensed) -> Condensed:
        """With the size of y; of counts, whose weights are 1 / mean, the sum of y stands for it."""
        if self.weights is None:
            assert equations.parts is not None  # as after each sweep over all data
            self.weights = unpack(equations.parts, len(equations.matrix) - 1).weights
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

    def _reduce(self, params: np.ndarray, how: SweepOptions) -> tuple[np.ndarray, float, np.ndarray]:
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


def load_partition(evaluation: Evaluation, runs: list[list[Load]], keys: list, *values) -> Partition:
    """The task that puts a partition on a worker; ``values`` are those of the shared tasks ``keys``."""
    keep_freed_memory()
    shared = dict(zip(keys, values, strict=True))
    return Partition(evaluation, [load_chunk(evaluation.rules, run, shared) for run in runs])


def sweep_partition(partition: Partition, params: np.ndarray, how: SweepOptions):
    """The task of a sweep: merged matrix, cost and parts of one partition."""
    blocks = [block for chunk in partition.chunks for block in chunk.blocks]
    results = partition.evaluation.reduce_blocks(blocks, params, how)
    return merge_chunks(partition.chunks, results, how.reduction, partition.evaluation.grouping)


def describe_partition(partition: Partition):
    return [census for chunk in partition.chunks for census in chunk.censuses], longest(
        chunk.sample for chunk in partition.chunks
    )


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
        return matrix, cost, join_neighbours(parts, max(0, self.evaluation.grouping.level - self.pieces.level))

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
