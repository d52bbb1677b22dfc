"""The memory that a fit or a map needs: arithmetic on a few plain numbers.

The peak of a process is the memory that it already uses, plus

* start: JAX, the compilation of the kernels, the graph, and the sample with which a fit of held data begins;
* held: prepared data, in the dtype in which they are stored, and the factor of a covariance matrix; or the chunks that a
  map joins and its results;
* shared: values of the user's graph that all chunks need, computed once;
* in flight: runs of chunks while they are read, values that are passed from one to the next, and for a streaming fit the
  sample with which it begins or, later, memory that malloc keeps;
* scratch: for each thread the rows [J r] of a tile and their copies.

The Jacobian of all points is never formed, unless the model or a covariance matrix needs all points at once. Measured with
``python -m benchmarks.memory`` and, for single constants, with tracemalloc and VmHWM on two cores (glibc 2.36).
"""

from typing import NamedTuple

from ..kernels.kind import CPU
from .machine import MAPPED_FROM, MOST_MAPPED
from .threshold import Strategy

# fits with 3, 20 and 50 parameters: 97, 129 and 255 to 360 MB
START_BYTES, START_PER_PARAM = 120e6, 6e6
# maps with 2, 6, 10, 14, 20, 30 parameters: 250, 251, 394, 501, 781, 1320 MB, and 30 to read stores
MAP_START, MAP_PER_PARAM, MAP_PER_PAIR = 275e6, 12e6, 0.82e6
WORKER_BYTES = 240e6  # at least, of a worker that has imported JAX
CLIENT_BYTES = 60e6  # of the process that talks to the workers, for connections
GRAPH_BYTES = 6e3  # per chunk, while a graph is taken apart: 3.2e3 to 6.4e3; half of it stays
READ_COPIES = 3  # of a run while it is read: pieces, what they are decoded from, and blocks; 2.1 to 2.9 by tracemalloc
MADE_BYTES = 20  # per point, at least, of what tasks of the user make, whose steps are in float64: 45 to 61 in all
BOOLEANS = 3  # bytes per point while a mask or sigma is checked
SMALL_ARRAYS = 4  # of float64 that malloc keeps of those below MAPPED_FROM, for each run: 12 to 16 MB of 2 MB, 20 of 4
# and as many for each process, or thread of a worker, whose own threads stream: 70 MB more after 160 chunks than after 40
STREAM_ARRAYS = 20
# of what is read at once that malloc keeps where it may: 9 of 20 MB, 20 of 32; larger ones are given back in any case
KEPT_ARRAYS = 20
MOST_RUNS = 256  # whose lengths are told: more than any process has in memory at once
READ_AHEAD = 2  # runs that are being read while the kernels work on others
SAMPLE_POINTS = 2**19  # held of them, or one in
POINTS_SHARE = 50  # of all: the sample is fitted in about ten sweeps over it
SAMPLE_COPIES = 4  # of the sample, while it is drawn
JOINED_POINTS = 2**16  # small chunks are joined up to here: enough to start a kernel for, few enough to share out
SCRATCH = 8  # times a tile's rows
FACTOR_COPIES = 4  # beside the factor of a covariance matrix: with it 3.4 to 4.7 times the matrix are taken
LANE_BYTES = 8  # of a number in the kernel of a map: its operands and weights; of y in float32 25 to 28 in all
JOINING = 2.5  # times the data, while chunks along the fit axes are joined: as they come, their pieces, the blocks
RESULT_COPIES = 2  # of the records of a map: its blocks, and the maps that they are joined to


class Sizes(NamedTuple):
    """The data of a fit or a map. A run is what is read at once: chunks of y that are joined, or a block of a map."""

    n_points: int
    n_params: int
    n_operands: int
    n_chunks: int
    n_runs: int
    longest: tuple[int, ...]  # points of the longest runs, as many as a process may have in memory
    nbytes: int  # as they are stored
    read: float = 0.0  # bytes per point of what is read, 0 where all is in memory
    held: float = 0.0  # bytes that are held in this process
    sent: float = 0.0  # and on workers, which get the arrays of this process too
    shared: float = 0.0  # bytes of values that are computed once, in each process
    passed: tuple[float, ...] = ()  # bytes of values that are passed on, while 1, 2, ... neighbouring runs are in memory
    making: float = 0.0  # and beside them, while the largest is made
    factor: int = 0  # bytes of the factor of a covariance matrix
    lazy: bool = True
    checked: bool = False  # there is a mask or sigma of y's shape
    whole: bool = False  # the model needs all points at once
    lanes: float = 0.0  # bytes per point of a map's block in the kernel; 0 of a fit


class Needs(NamedTuple):
    """Bytes that a fit or a map takes."""

    held: float  # over all processes
    shared: float  # per process
    start: float  # per process
    scratch: float  # per thread
    runs: tuple[float, ...]  # of the longest runs, while they are read
    passed: tuple[float, ...]
    reader: float  # for each reader beside them: what is made to be passed on, and the sample or what malloc keeps later
    ahead: int  # runs that are in memory beside one for each thread
    apart: bool  # each thread of a process reads a part of the data for itself

    def in_flight(self, n_threads: int) -> float:
        """Per process, while data are read."""
        readers = n_threads if self.apart else 1
        n_runs = n_threads + readers * self.ahead
        together = -(-n_runs // readers)
        passed = self.passed[min(together, len(self.passed)) - 1] if self.passed else 0.0
        return sum(self.runs[:n_runs]) + readers * (passed + self.reader)

    def working(self, n_threads: int) -> float:
        """Per process, beside what it holds of the data."""
        return self.start + self.shared + self.in_flight(n_threads) + n_threads * self.scratch


def sample_bytes(sizes: Sizes, strategy: Strategy) -> float:
    """Of the points with which a fit begins, in the process that calls, while they are drawn."""
    most = sizes.n_points if strategy == "streaming" else sizes.n_points // POINTS_SHARE
    return SAMPLE_COPIES * 8 * min(SAMPLE_POINTS, most) * sizes.n_operands


def _small(n: int) -> int:
    """Bytes of n values in float64, of those arrays that malloc keeps when they are freed."""
    return min(8 * n, MAPPED_FROM)


def needs(sizes: Sizes, strategy: Strategy = "standard", on_workers: bool = False, keeps: bool = False) -> Needs:
    """What the data take where a strategy has them; a map is always "standard".

    ``keeps``: malloc keeps what is freed while data are streamed.
    """
    p, streams = sizes.n_params, strategy == "streaming"
    start = START_BYTES + START_PER_PARAM * p
    if sizes.lanes:
        start = MAP_START + MAP_PER_PARAM * p + MAP_PER_PAIR * p**2
    sample = 0.0 if on_workers or sizes.lanes else sample_bytes(sizes, strategy)
    start += 0.0 if streams else sample
    start += 0.0 if on_workers else GRAPH_BYTES * sizes.n_chunks
    stream = max(sample, STREAM_ARRAYS * _small(sizes.longest[0])) if streams else 0.0
    kept = KEPT_ARRAYS * min(sizes.read * sizes.longest[0], MOST_MAPPED) if keeps else 0.0
    copies = READ_COPIES if streams or sizes.lanes else READ_COPIES - 1  # the blocks of others are counted as held

    def run(n):
        kept = SMALL_ARRAYS * _small(n) if sizes.read else 0.0
        return n * (copies * sizes.read + BOOLEANS * sizes.checked + sizes.lanes) + kept

    rows = 8 * (p + 1) * sizes.n_points if sizes.whole else max(CPU.tile_bytes, 8 * p**2)
    return Needs(
        held=0.0 if streams else sizes.sent if on_workers else sizes.held + sizes.factor,
        shared=sizes.shared,
        start=start,
        scratch=SCRATCH * rows + FACTOR_COPIES * sizes.factor,
        runs=tuple(map(run, sizes.longest)),
        passed=sizes.passed,
        reader=sizes.making + stream + kept,
        ahead=READ_AHEAD if streams else 0,
        apart=on_workers,
    )


def partition_size(n_runs: int, most: int) -> int:
    """Runs per partition, of at most this many partitions: a power of two, so that they are subtrees of the merge."""
    size = 1
    while size * most < n_runs:
        size *= 2
    return size
