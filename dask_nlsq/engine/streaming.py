"""Data larger than memory: every sweep reads them again.

A run of chunks is read, reduced and dropped; the reading of the next ones goes on while a kernel works. Results are
merged in the order of `engine.condensed`, as soon as neighbours are there, so a sweep has the same bits as one over
data that are held, in this process or on workers, and what a half-finished sweep has to keep is a few matrices.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from threading import Semaphore
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from distributed import Client

from ..base.config import setting, threads
from ..base.x64 import inherit_device
from ..data.align import Problem
from ..data.chunks import Census, Chunk, release
from ..data.loading import Load, compute_shared, plan_loads
from ..data.sample import NoSample, Sample, as_sample, pick, sample_size, spread
from ..data.store import BadChunkError
from ..kernels.blocks import Reduction
from ..memory.machine import keep_freed_memory
from ..memory.needs import READ_AHEAD, SAMPLE_POINTS
from .checkpoint import Checkpoint, Interrupted, StopOnSignal
from .cluster import Pieces
from .condensed import Condensed, Read, Tree, merge_chunks
from .evaluation import Evaluation, Partition, SweepOptions, count_not_finite, load_chunk, longest
from .sweep import Sweep

SAMPLE_SHARE = 10  # the sample takes at most one of so many runs of chunks
SAMPLE_RUNS = 64  # and no more than these, or two per parameter: enough to see all regions of the data
POINTS_SHARE = 50  # of all: the sample is fitted in about ten sweeps over it
CHECKED = 8  # points of the sample on which the model is checked


class SampleSummary(NamedTuple):
    """The sample that a fit began with."""

    n_points: int
    n_chunks: int  # runs of chunks that were read for it
    of_chunks: int  # that there are
    seconds: float
    nfev: int = 0  # passes over the sample until it was fitted


# ---------------------------------------------------------------------------------------------------------------------
# one read of everything


class LazyRuns(NamedTuple):
    """Runs of chunks that a task reads whenever it needs them, with the shared values that they need."""

    evaluation: Evaluation
    runs: list[list[Load]]
    shared: dict[Any, np.ndarray]

    def each(self, work: Callable, args: tuple, n_threads: int) -> Iterator:
        """``work(evaluation, chunk, *args)`` of each run, in order; at most ``n_threads + READ_AHEAD`` are in memory."""
        kernels, n_ahead = Semaphore(n_threads), n_threads + READ_AHEAD

        def one(run):
            chunk = load_chunk(self.evaluation.rules, run, self.shared)
            try:
                with kernels:
                    return work(self.evaluation, chunk, *args)
            finally:
                release(chunk)

        waiting = deque()
        with ThreadPoolExecutor(max(1, min(n_ahead, len(self.runs))), "nlsq-stream", inherit_device()) as pool:
            try:
                for run in self.runs:
                    waiting.append(pool.submit(copy_context().run, one, run))  # with it, Dask's meters
                    if len(waiting) > 2 * n_ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def part(self, places: Iterable[int]) -> "LazyRuns":
        return self._replace(runs=[self.runs[place] for place in places])


class Reduced(NamedTuple):
    """What a sweep finds in a run of chunks, or in many that are merged."""

    matrix: np.ndarray
    cost: float
    parts: np.ndarray
    censuses: list[Census]
    sample: tuple[np.ndarray, ...]


def reduce_chunk(evaluation: Evaluation, chunk: Chunk, params: np.ndarray, how: SweepOptions) -> Reduced:
    results = evaluation.reduce_blocks(chunk.blocks, params, how)
    found = merge_chunks([chunk], results, how.reduction, evaluation.grouping)
    return Reduced(*found, summarize(chunk.censuses, evaluation.rules.omit), chunk.sample)


def draw_points(evaluation: Evaluation, chunk: Chunk, n: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Index of the chunk and operands (operands, m) of those of ``n`` points, spread over it, that count."""
    n_all = sum(census.n_points for census in chunk.censuses)
    index = chunk.censuses[0].index
    values, counts = pick(evaluation.rules, chunk, spread(n, n_all, hash(index) % 2**32))  # integers: the same hash anywhere
    return [(index, values[:, counts])]


def count_chunk(evaluation: Evaluation, chunk: Chunk, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    return count_not_finite(Partition(evaluation, [chunk]), params)


def summarize(censuses: Iterable[Census], omit: bool) -> list[Census]:
    """One census with the sums, of index (), and behind it those of chunks in which values are not as they must be."""
    n_points = n_masked = n_omitted = 0
    wrong, damage = [], ()
    for census in censuses:
        not_finite = any(census.not_finite.values()) and not omit
        if not_finite or census.n_sigma_not_positive or census.n_negative or census.too_large:
            wrong.append(census)
        else:
            n_points += census.n_points
            n_masked += census.n_masked
            n_omitted += census.n_omitted
            damage += census.damage
    total = Census((), n_points, n_masked, {}, n_omitted, 0, 0, 0.0, tuple(sorted(damage, key=lambda err: err.args)))
    return [total, *sorted(wrong, key=lambda census: census.index)]


class LocalReader:
    """Reads in this process, run by run."""

    level = 0  # of a unit in the tree

    def __init__(self, problem: Problem, evaluation: Evaluation):
        runs, common = plan_loads(problem)
        self.unread = LazyRuns(evaluation, runs, compute_shared(common))
        self.n_runs = len(runs)

    def each(self, work: Callable, runs: Sequence[int], *args) -> Iterator[tuple[int, Any]]:
        """Number of a run and ``work(evaluation, chunk, *args)``, in order."""
        yield from zip(runs, self.unread.part(runs).each(work, args, threads()), strict=True)

    def close(self):
        pass


class WorkerReader:
    """Reads on the workers of ``client``: each unit is a task that reads its runs one after the other and merges them."""

    def __init__(self, problem: Problem, evaluation: Evaluation, client: Client, n_partitions: int):
        runs, graph = plan_loads(problem)
        self.pieces = Pieces(client, _lay_out, evaluation, runs, graph, n_partitions, False)
        self.n_runs, self.level = len(runs), self.pieces.level

    def each(self, work: Callable, runs: Sequence[int], *args) -> Iterator[tuple[int, Any]]:
        """Number of a unit and the results of its runs together, in the order in which they are ready."""
        places: dict[int, list[int]] = {}
        for run in runs:
            places.setdefault(run >> self.level, []).append(run % (1 << self.level))
        name = "nlsq-sweep" if work is reduce_chunk else f"nlsq-{work.__name__.replace('_', '-')}"
        yield from self.pieces.each(_work_through, name, [*places], [*places.values()], work=work, args=args)

    def close(self):
        self.pieces.close()


def _lay_out(evaluation, runs, keys, *values) -> LazyRuns:
    keep_freed_memory()
    return LazyRuns(evaluation, runs, dict(zip(keys, values, strict=True)))


def _work_through(unread: LazyRuns, places, work, args):
    results = unread.part(places).each(work, args, 1)
    if work is reduce_chunk:
        return merge_reduced(unread, results, args[1].reduction)
    return [each for found in results for each in found]


def merge_reduced(unread: LazyRuns, results: Iterable[Reduced], reduction: Reduction) -> Reduced:
    tree, censuses, samples = Tree(len(unread.runs), reduction, unread.evaluation.grouping.level), [], [()]
    for k, found in enumerate(results):
        tree.add(0, k, found.matrix, found.cost, found.parts)
        censuses += found.censuses
        samples.append(found.sample)
    return Reduced(*tree.root(), summarize(censuses, unread.evaluation.rules.omit), longest(samples))


class PartialSweep(NamedTuple):
    """A sweep that is not finished."""

    params: np.ndarray
    tree: Tree
    level: int  # of the units that it reads
    censuses: list[Census]

    def is_at(self, params, reduction, level) -> bool:
        return (self.params.tobytes(), self.tree.reduction, self.level) == (params.tobytes(), reduction, level)


def _listed(censuses: list[Census]) -> list:
    return [[*census[:-1], [err.args for err in census.damage]] for census in censuses]


def _censuses(listed: list) -> list[Census]:
    """What `_listed` has made JSON of."""
    found = []
    for index, *numbers, damage in listed:
        errors = tuple(BadChunkError(array, tuple(at), *rest) for array, at, *rest in damage)
        found.append(Census(tuple(index), *numbers, errors))
    return found


class StreamingSweep(Sweep):
    """All data of a fit, read anew in each sweep."""

    admit: Callable[[], Any] = staticmethod(lambda: None)  # called when the first sweep has seen all data
    watch: Callable[[float, float, float], None] | None = None  # told while a sweep goes on: its share, GB/s, seconds left
    drawn: SampleSummary | None = None
    checkpoint: Checkpoint | None = None
    leave: StopOnSignal | None = None  # that tells when to end early

    def __init__(self, problem: Problem, evaluation: Evaluation, client: Client | None, n_partitions: int = 1):
        super().__init__(problem, evaluation)
        self.reader = (
            LocalReader(problem, evaluation) if client is None else WorkerReader(problem, evaluation, client, n_partitions)
        )
        self.nbytes = sum(operand.nbytes for operand in problem.operands if isinstance(operand, da.Array))
        self.known: dict[bytes, Condensed] = {}  # of the last sweeps, so that nothing is read twice
        self.censuses: list[Census] = []
        self.coordinates: tuple[np.ndarray, ...] = ()
        self.values: np.ndarray | None = None  # of the sample, (operands, m)
        self.recorded: dict[bytes, Condensed] = {}  # sweeps of an earlier process
        self.finished: list[tuple[np.ndarray, Condensed]] = []  # what a checkpoint holds
        self.begun: PartialSweep | None = None

    def __exit__(self, *exc):
        self.reader.close()

    def __call__(self, params: np.ndarray, reduction: Reduction) -> Condensed:
        params = np.asarray(params, dtype=np.float64)
        key = params.tobytes() + reduction.encode()
        if key not in self.known:
            found = self.recorded.pop(key, None)
            if found is None:
                found = self._read(params, reduction)
            self.count += 1
            found = self._weighed(found)
            self.known = dict([*self.known.items()][-1:]) | {key: found}
        self.latest = params, self.known[key]
        return self.known[key]

    def _read(self, params, reduction) -> Condensed:
        began, reader, begun = time.perf_counter(), self.reader, self.begun
        if begun is None or not begun.is_at(params, reduction, reader.level):
            begun = PartialSweep(params, Tree(reader.n_runs, reduction, self.evaluation.grouping.level), reader.level, [])
        tree, self.begun = begun.tree, None
        saved, every = began, setting("checkpoint-seconds")
        todo = [run for run in range(reader.n_runs) if not tree.covers(reader.level, run >> reader.level)]
        n_units = len({run >> reader.level for run in todo})
        how = SweepOptions(reduction, self.jac_mode, self.weights is None)
        with closing(reader.each(reduce_chunk, todo, params, how)) as results:
            for done, (unit, found) in enumerate(results, 1):
                tree.add(reader.level, unit, found.matrix, found.cost, found.parts)
                begun.censuses.extend(found.censuses)
                if not self.coordinates:
                    self.coordinates = found.sample
                now, share = time.perf_counter(), done / n_units
                if self.watch is not None:
                    rate = len(todo) / reader.n_runs * self.nbytes * share / (now - began)
                    self.watch(1 - (1 - share) * len(todo) / reader.n_runs, rate / 1e9, (now - began) * (1 / share - 1))
                leaving = self.leave is not None and self.leave.signal is not None
                if self.checkpoint is not None and (leaving or now - saved >= every):
                    self._save(begun)
                    saved = now
                if leaving:
                    raise Interrupted(self.leave.signal)
        self._count(summarize(begun.censuses, self.evaluation.rules.omit))
        matrix, cost, parts = tree.root()
        total = self.censuses[0]
        left_out = total.n_masked + total.n_omitted
        read = Read(self.nbytes, total.n_points - left_out, left_out, time.perf_counter() - began)
        equations = Condensed(np.asarray(matrix), float(cost), reduction, parts, read)
        if self.checkpoint is not None:
            self.finished.append((params, equations))
            self._save()
        return equations

    def _count(self, censuses):
        """What is in the data, from the first sweep; later ones must find the same."""
        if not self.censuses:
            self.censuses = censuses
            self.admit()
        elif censuses != self.censuses:
            raise RuntimeError(
                "the data have changed during the fit: points masked, not finite or not readable are not those of the first "
                "sweep. Fit a copy that nobody writes to"
            )

    def _save(self, begun: "PartialSweep | None" = None) -> None:
        arrays, values = {}, dict(jac_mode=self.jac_mode, censuses=_listed(self.censuses))
        if self.finished:
            params, equations = zip(*self.finished, strict=True)
            arrays = dict(
                params=np.stack(params),
                matrices=np.stack([each.matrix for each in equations]),
                costs=np.array([each.cost for each in equations]),
                parts=np.stack([each.parts for each in equations]),
            )
            values |= dict(reductions=[each.reduction for each in equations], reads=[each.read for each in equations])
        if begun is not None and begun.tree.nodes:
            matrices, costs, parts = zip(*begun.tree.nodes.values(), strict=True)
            arrays |= dict(
                at=begun.params,
                nodes=np.array([*begun.tree.nodes]),
                node_matrices=np.stack(matrices),
                node_costs=np.array(costs),
                node_parts=np.concatenate(parts),
                node_lengths=np.array([len(each) for each in parts]),
            )
            own = summarize(begun.censuses, self.evaluation.rules.omit)
            values |= dict(begun=begun.tree.reduction, level=begun.level, own=_listed(own))
        self.checkpoint.save("state", arrays, **values)

    def resume_from(self, checkpoint: Checkpoint) -> bool:
        """Keep the fit in ``checkpoint``, and take up what is there; whether there was something."""
        self.checkpoint = checkpoint
        if (found := checkpoint.load("sample")) is not None:
            self._take_sample(found[0]["values"], SampleSummary(**found[1]))
        elif self.drawn is not None:  # for a guess, which a fit that goes on no longer needs
            checkpoint.save("sample", dict(values=self.values), **self.drawn._asdict())
        if (found := checkpoint.load("state")) is None:
            return False
        arrays, values = found
        self.jac_mode, self.censuses = values["jac_mode"], _censuses(values["censuses"])
        for k, reduction in enumerate(values.get("reductions", [])):
            read = Read(*values["reads"][k])
            equations = Condensed(arrays["matrices"][k], float(arrays["costs"][k]), reduction, arrays["parts"][k], read)
            self._weighed(equations)
            self.finished.append((arrays["params"][k], equations))
            self.recorded[arrays["params"][k].tobytes() + reduction.encode()] = equations
        if "begun" in values:
            tree = Tree(self.reader.n_runs, values["begun"], self.evaluation.grouping.level)
            parts = np.split(arrays["node_parts"], np.cumsum(arrays["node_lengths"])[:-1])
            for node, *found in zip(arrays["nodes"], arrays["node_matrices"], arrays["node_costs"], parts, strict=True):
                tree.nodes[tuple(node.tolist())] = tuple(found)
            self.begun = PartialSweep(arrays["at"], tree, values["level"], _censuses(values["own"]))
        return True

    def census(self) -> list[Census]:
        return self.censuses

    def sample(self) -> tuple[np.ndarray, ...]:
        return self.coordinates

    def not_finite(self, params: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
        """Per chunk: how many residuals are not finite. One more read, to say what is wrong."""
        found = self.reader.each(count_chunk, range(self.reader.n_runs), params)
        return sorted(each for _, counts in found for each in counts)

    def draw(self, n_params: int, needed: int) -> None:
        """Read the sample: a tenth of the runs of chunks at most, but ``needed`` of them, for several starts or a guess."""
        began, n_runs = time.perf_counter(), self.reader.n_runs
        if self.drawn is not None:
            return
        n_drawn = min(max(n_runs // SAMPLE_SHARE, needed), max(SAMPLE_RUNS, 2 * n_params), n_runs)
        if n_drawn == 0:
            return
        n = min(SAMPLE_POINTS, max(self.n_stored // POINTS_SHARE, sample_size(n_params)))
        runs = spread(n_drawn, n_runs).tolist()
        found = sorted(
            (each for _, part in self.reader.each(draw_points, runs, -(-n // n_drawn)) for each in part),
            key=lambda each: each[0],
        )
        values = np.concatenate([values for _, values in found], axis=1)
        drawn = SampleSummary(values.shape[1], n_drawn, n_runs, time.perf_counter() - began)
        if self.checkpoint is not None:
            self.checkpoint.save("sample", dict(values=values), **drawn._asdict())
        self._take_sample(values, drawn)

    def _take_sample(self, values, drawn):
        self.values, self.drawn = values, drawn
        layouts, few = self.evaluation.rules.layouts.x, values[2:, :: max(1, values.shape[1] // CHECKED)]
        self.coordinates = tuple(
            row.astype(np.int64 if layout.integer else np.float64) for layout, row in zip(layouts, few, strict=True)
        )

    def points(self, n: int) -> Sample:
        """About ``n`` of the points of the sample."""
        if self.drawn is None or self.drawn.n_points == 0:
            raise NoSample("none of the points of the sample counts: give p0 near the optimum, and n_starts=0")
        n_total = round(self.n_stored * self.values.shape[1] / max(self.drawn.n_points, 1))
        return as_sample(self.evaluation.rules.layouts, self.values, min(n, self.values.shape[1]), n_total)
