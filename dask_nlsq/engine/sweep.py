"""One read of all data answers requests: per block, merged in a fixed order, wherever the data are.

The order of the merge depends only on the chunks: it is a binary tree over the blocks of a chunk and then over the runs of
chunks in C order. A task processes an aligned run of ``2^s`` of these runs, which is a subtree. So the sums are
bit-identical for any number of threads, workers and partitions, whether the data are held or read again. The state of an
incomplete sweep is a few matrices.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, cast

import numpy as np
from distributed import Client

from ..base.lazy import da
from ..data.align import Data
from ..data.chunks import Census, merge_censuses
from ..data.sample import NoSample, Sample, as_sample, sample_size, spread
from ..data.store import BadChunkError
from ..memory.needs import POINTS_SHARE, SAMPLE_POINTS
from .condensed import Condensed, Read, Sums, Tree
from .partition import CONDENSE, COUNT, DESCRIBE, DRAW, PICK, Answers, longest
from .places import HeldHere, Place, open_place
from .request import Request
from .waiting import Look, calm

SAMPLE_SHARE = 10  # the sample takes one in this number of runs of chunks,
SAMPLE_REGIONS = 6  # at least this number: two peaks on a sorted axis took 4 sweeps from six regions, 4 to 15 from two
SAMPLE_RUNS = 64  # and at most these, or two per parameter: enough to see all regions of the data
CHECKED = 8  # points of the sample on which the model is checked


class SampleSummary(NamedTuple):
    """The sample that a fit began with."""

    n_points: int
    n_chunks: int  # runs of chunks that it is from
    of_chunks: int  # that there are
    seconds: float
    nfev: int = 0  # passes over the sample until it was fitted


def first_sample_size(n_points: int, n_params: int) -> int:
    """Points of the sample that a fit begins with."""
    return min(SAMPLE_POINTS, max(n_points // POINTS_SHARE, sample_size(n_params)))


class PartialSweep:
    """A sweep that is not finished: the sums of the units that are done."""

    def __init__(self, requests: Sequence[Request], n_runs: int, level: int):
        self.requests, self.n_runs, self.level = requests, n_runs, level
        self.trees = [Tree(n_runs, request.reduction, request.segmentation.level) for request in requests]
        self.censuses: list[Census] = []
        self.sample: tuple[np.ndarray, ...] = ()

    def add(self, unit: int, answers: Answers) -> None:
        for tree, sums in zip(self.trees, answers.sums, strict=True):
            tree.add(self.level, unit, sums)
        self.censuses = [merge_censuses([*self.censuses, answers.census])]
        self.sample = longest([self.sample, answers.sample])

    def left(self) -> list[int]:
        """Runs of the units that are not done."""
        tree = self.trees[0]
        return [run for run in range(self.n_runs) if not (tree.nodes and tree.covers(self.level, run >> self.level))]


class Sweep:
    """Data where they are swept; it knows neither a model nor the solver. A context manager, which gives back what it holds.

    ``census`` and ``sample``, coordinates of some consecutive points, are None and () until all data have been read once.
    """

    drawn: SampleSummary | None = None  # of data that are not held
    values: np.ndarray | None = None  # of the sample, (operands, m)

    def __init__(self, data: Data, place: Place):
        self.data, self.place = data, place
        self.nbytes = sum(int(operand.nbytes) for operand in data.operands if isinstance(operand, da.Array))
        self.census: Census | None = None
        self.sample: tuple[np.ndarray, ...] = ()
        if place.held:
            found = [each for _, part in place.each(DESCRIBE, None, ()) for each in part]
            self.census, self.sample = merge_censuses(census for census, _ in found), longest(each for _, each in found)

    @property
    def damage(self) -> tuple[BadChunkError, ...]:
        """Chunks of stores that were left out."""
        return () if self.census is None else self.census.damage

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.place.close()

    def run(
        self,
        requests: Sequence[Request],
        begun: PartialSweep | None = None,
        after: Callable[[PartialSweep], None] | None = None,
        look: Look = calm,
    ) -> list[Condensed]:
        """What the data are condensed to for each request, by one read.

        Parameters
        ----------
        requests : sequence of Request
        begun : PartialSweep, optional
            The same requests to the same data, of which a part is complete.
        after : callable, optional
            Is told after each unit, and may raise.
        look : callable, optional
            Is told how many pieces of the data are done, also while the sweep waits, and may raise.

        Raises
        ------
        RuntimeError
            Where the data are not those of the first sweep any more.
        """
        began, place = time.perf_counter(), self.place
        begun = PartialSweep(requests, place.n_runs, place.level) if begun is None else begun
        objectives = [*dict.fromkeys(request.objective for request in requests)]
        numbered: Any = [request._replace(objective=cast(Any, objectives.index(request.objective))) for request in requests]
        runs = None if place.held else begun.left()
        look(0, 0)
        n_left, n_units = len({run >> place.level for run in runs or ()}), -(-place.n_runs >> place.level)
        found = place.each(CONDENSE, runs, objectives, numbered, look=look if place.held else lambda *_: look(0, 0))
        with closing(found):
            for unit, answers in found:
                begun.add(unit, answers)
                if after is not None:
                    after(begun)
                if not place.held:  # else the place tells, of pieces that this sweep has not done before as well
                    n_left -= 1
                    look(n_units - n_left, n_units)
        read = None
        if not place.held:
            census = self._know(begun)
            left_out = census.n_masked + census.n_omitted
            read = Read(self.nbytes, census.n_used, left_out, time.perf_counter() - began)
        return [condensed(tree.root(), request, read) for tree, request in zip(begun.trees, requests, strict=True)]

    def _know(self, begun: PartialSweep) -> Census:
        """What is in the data, from the first sweep; later ones must find the same."""
        (census,) = begun.censuses
        if self.census is None:
            self.census = census
            self.sample = self.sample or begun.sample
        elif census != self.census:
            raise RuntimeError(
                "the data changed during the fit: masked, nonfinite or unreadable points are not those of the first sweep. "
                "Fit a copy that nothing writes to"
            )
        return census

    def not_finite(self, request: Request) -> list[tuple[tuple[int, ...], int]]:
        """Per chunk: how many residuals are not finite. One more read, to say what is wrong."""
        asked = request._replace(objective=cast(Any, 0))
        return sorted(each for _, part in self.place.each(COUNT, None, (request.objective,), asked) for each in part)

    # -----------------------------------------------------------------------------------------------------------------
    # a few of the points

    def points(self, n: int) -> Sample:
        """About ``n`` of the points that count, spread evenly over all data; no sweep.

        They do not depend on chunks, partitions or workers where the data are held; else they are of those that `draw` has
        read. All points, however many, where a model needs them at once.
        """
        layouts, n_stored = self.data.preparation.layouts, self.data.n_points
        if not self.place.held:
            if self.drawn is None or self.values is None or self.drawn.n_points == 0:
                raise NoSample("all points of the sample are masked or omitted: give p0 near the optimum, and n_starts=0")
            n_total = round(n_stored * self.values.shape[1] / max(self.drawn.n_points, 1))
            return as_sample(layouts, self.values, min(n, self.values.shape[1]), n_total)
        assert self.census is not None
        n_counted = self.census.n_used
        if self.data.preparation.whole:
            assert isinstance(self.place, HeldHere)
            (chunk,) = self.place.partition.chunks
            return Sample(chunk.blocks[0], layouts, n_counted, n_counted, True)
        wanted = min(-(-n * n_stored // n_counted), n_stored)
        found = [each for _, part in self.place.each(PICK, None, (), self.data.runs, wanted) for each in part]
        orders, values = zip(*found, strict=True)
        order = np.argsort(np.concatenate(orders))
        return as_sample(layouts, np.concatenate(values, axis=1)[:, order], n, n_counted)

    def draw(self, n_params: int, needed: int, look: Look = calm) -> None:
        """Read a sample of data that are not held, from a tenth of the runs of chunks, but from six, and from ``needed``.

        Where the axis is sorted, each run is a region of its own. A model that was fitted to one or two is far off in the
        others, which costs more sweeps than the reads save. Where six are more than half, there is no sample.
        """
        began, n_runs = time.perf_counter(), self.place.n_runs
        if self.place.held or self.drawn is not None:
            return
        regions = max(n_runs // SAMPLE_SHARE, SAMPLE_REGIONS) if n_runs >= 2 * SAMPLE_REGIONS else 0
        n_drawn = min(max(regions, needed), max(SAMPLE_RUNS, 2 * n_params), n_runs)
        if n_drawn == 0:
            return
        n = first_sample_size(self.data.n_points, n_params)
        runs = spread(n_drawn, n_runs).tolist()
        drawn = [each for _, part in self.place.each(DRAW, runs, (), -(-n // n_drawn), look=look) for each in part]
        values = np.concatenate([found for _, found in sorted(drawn, key=lambda each: each[0])], axis=1)
        self.take_sample(values, SampleSummary(values.shape[1], n_drawn, n_runs, time.perf_counter() - began))

    def take_sample(self, values: np.ndarray, drawn: SampleSummary) -> None:
        self.values, self.drawn = values, drawn
        layouts, few = self.data.preparation.layouts.x, values[2:, :: max(1, values.shape[1] // CHECKED)]
        self.sample = tuple(
            row.astype(np.int64 if layout.integer else np.float64) for layout, row in zip(layouts, few, strict=True)
        )


def condensed(sums: Sums, request: Request, read: Read | None) -> Condensed:
    return Condensed(np.asarray(sums.matrix), float(sums.cost), request.reduction, sums.segments, read)


def open_sweep(
    data: Data,
    strategy: str = "standard",
    client: Client | None = None,
    n_partitions: int = 1,
    look: Look = calm,
    keeps: bool = False,
) -> Sweep:
    """Bring data where they will be swept: into this process, to the workers of ``client``, or nowhere ("streaming").

    ``keeps``: memory that is freed while they are read may stay with this process.
    """
    with ExitStack() as on_error:
        place = open_place(data, strategy, client, n_partitions, look, keeps)
        on_error.callback(place.close)
        sweep = Sweep(data, place)
        on_error.pop_all()
    return sweep
