"""The condensed form of all data: one small matrix, a cost and sums over segments, merged in a fixed order."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.linalg import norm

from ..data.align import Data
from ..data.chunks import Chunk
from ..kernels.blocks import Reduction
from ..kernels.rows import segment_size, unpack
from ..kernels.rules import EPS, ROUNDING

COLUMN_ROUNDING = 2**12 * EPS  # of columns of norm 1, from the evaluation of the model: closer ones count as the same
MOST_SEGMENTS = 256  # the scatter of this many gives standard errors to 5 to 10 %
FEWEST_SEGMENTS, SEGMENTS_BYTES = 16, 2**21  # of many parameters


class Read(NamedTuple):
    """What a sweep that re-reads the data has read."""

    nbytes: int  # of the arrays as they are in memory
    n_points: int  # that count
    n_left_out: int  # masked or omitted
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9


class Sums(NamedTuple):
    """What a request adds up, over a block, a chunk, or all data."""

    matrix: np.ndarray  # (p+1, p+1), the gram matrix of [J r] or its triangular factor
    cost: float
    segments: np.ndarray  # (k, segment_size(p)), over runs of consecutive points, see `kernels.rows.SegmentSums`


class Condensed(NamedTuple):
    """One sweep's result: ``matrix`` (p+1, p+1) is the gram matrix of [J r] or its triangular factor."""

    matrix: np.ndarray
    cost: float
    reduction: Reduction
    parts: np.ndarray | None = None  # (k, segment_size(p)), see `kernels.rows.SegmentSums`
    read: Read | None = None  # where the data are not held
    size: float = 0.0  # sum w y^2, which says how large the rounding of the residuals is
    left: float = 0.0  # by which the cost may be above that of the best locals of groups

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
        return 0 if self.parts is None else int(unpack(self.parts, len(self.matrix) - 1).n.sum())

    @property
    def floored(self) -> int:
        """Points with counts whose mean is below the least one at which a Poisson likelihood is evaluated."""
        return 0 if self.parts is None else int(unpack(self.parts, len(self.matrix) - 1).floored.sum())


def held_at(equations: Condensed, free: Sequence[int]) -> Condensed:
    """The same for the parameters at the places ``free``, with the others held; without sums over segments."""
    columns = [*free, len(equations.matrix) - 1]
    by_gram = equations.reduction == "gram"
    rows = equations.matrix[:, columns]
    matrix = rows[columns] if by_gram else np.asarray(np.linalg.qr(rows, mode="r"))
    return equations._replace(matrix=matrix, parts=None if equations.parts is None else counted(equations.parts, len(free)))


def counted(parts: np.ndarray, n_params: int) -> np.ndarray:
    """One row of the sums over all segments, without their matrices."""
    found = np.zeros((1, segment_size(n_params)))
    n_sums = found.size - 2 * (n_params + 1) ** 2  # behind the matrices
    found[0, -n_sums:] = parts[:, -n_sums:].sum(axis=0)
    return found


class Factor(NamedTuple):
    """``R`` (p, p) with R^T R = J^T J, ``projected`` = Q^T r, gradient J^T r, both (p,)."""

    R: np.ndarray
    projected: np.ndarray
    gradient: np.ndarray
    condition: float  # of R with columns of norm 1; inf where the rank is deficient


def rank_tolerance(equations: Condensed) -> float:
    """Relative size below which a singular value of J, with columns of norm 1, is rounding.

    That of the evaluation of the model, or the root of p eps where a gram matrix holds squares. The number of rows does not
    enter: what is decomposed has p of them, however many points there are.
    """
    relative = (len(equations.matrix) - 1) * EPS
    return max(relative, COLUMN_ROUNDING) if equations.reduction == "qr" else relative**0.5


def factor(equations: Condensed) -> Factor:
    """What the trust-region method works on; all decisions about the rank are made on columns of norm 1.

    Directions in which the columns are equal to rounding are kept at the size of the tolerance, since covariances and
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


def join_neighbours(parts: np.ndarray, times: int) -> np.ndarray:
    """Add neighbouring rows (k, m), pair by pair, this many times."""
    for _ in range(times):
        even = len(parts) // 2 * 2
        parts = np.concatenate([parts[0:even:2] + parts[1:even:2], parts[even:]])
    return parts


class Segmentation(NamedTuple):
    """Which runs of consecutive points have sums of their own, beside those of all data."""

    per_block: int = 1
    per_run: int = MOST_SEGMENTS  # at most, of a run of chunks
    level: int = 0  # how many times neighbouring runs of chunks are joined

    @classmethod
    def of(cls, data: Data, n_params: int) -> "Segmentation":
        """Of all data enough parts to see how much they differ, and no more than are worth their memory."""
        most = int(np.clip(SEGMENTS_BYTES // (8 * segment_size(n_params)), FEWEST_SEGMENTS, MOST_SEGMENTS))
        n_blocks = max(-(-data.n_points // data.preparation.kind.block_points), data.n_runs)
        longest = max(data.n_points, data.run_points)
        few = 2 ** (longest - 1).bit_length()  # as the buffer of a few points is: each of them is a part of its own
        per_block = -(-min(most, few) // n_blocks)
        return cls(per_block, max(1, most // data.n_runs), max(0, -(-data.n_runs // most) - 1).bit_length())


def merge_chunks(chunks: Iterable[Chunk], results: Sequence[Sums], reduction: Reduction, segmentation: Segmentation) -> Sums:
    """Merge the sums of consecutive blocks, first within each chunk."""
    merged, begin = [], 0
    for chunk in chunks:
        end = begin + len(chunk.blocks)
        found = merge_neighbours(results[begin:end], reduction)
        times = max(0, -(-len(found.segments) // segmentation.per_run) - 1).bit_length()
        merged.append(found._replace(segments=join_neighbours(found.segments, times)))
        begin = end
    found = merge_neighbours(merged, reduction)
    return found._replace(segments=join_neighbours(found.segments, segmentation.level))


def merge_neighbours(results: Sequence[Sums], reduction: Reduction) -> Sums:
    """`merge` of matrices and costs of neighbours, and their segments one after the other."""
    matrices, costs, segments = zip(*results, strict=True)
    return Sums(*merge(np.stack(matrices), np.array(costs), reduction), np.concatenate(segments))


class Tree:
    """Sums of ``n`` runs of chunks, merged in pairs as soon as both are there, in the order of `merge`.

    ``nodes[level, k]`` are those of the runs from ``k 2^level`` on, ``2^level`` of them or up to the end. Their segments are
    added up to the level ``joined``.
    """

    def __init__(self, n: int, reduction: Reduction, joined: int = 0):
        self.n, self.reduction, self.joined = n, reduction, joined
        self.nodes: dict[tuple[int, int], Sums] = {}

    def add(self, level: int, k: int, sums: Sums) -> None:
        while (count := -(-self.n >> level)) > 1:
            if k ^ 1 < count:  # the last one of an odd number goes up as it is
                if (level, k ^ 1) not in self.nodes:
                    break
                pair = [self.nodes.pop((level, k ^ 1)), sums][:: -1 if k % 2 == 0 else 1]
                sums = merge_neighbours(pair, self.reduction)
                sums = sums._replace(segments=join_neighbours(sums.segments, int(level < self.joined)))
            level, k = level + 1, k // 2
        self.nodes[level, k] = sums

    def covers(self, level: int, k: int) -> bool:
        """Whether all runs of a node are in one that is there."""
        return any((high, k >> (high - level)) in self.nodes for high in range(level, self.n.bit_length() + 1))

    def root(self) -> Sums:
        (found,) = self.nodes.values()
        return found
