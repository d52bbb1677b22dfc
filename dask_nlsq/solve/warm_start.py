"""A fit of a sample comes first where a sweep takes long, or reads all data, to need fewer sweeps.

The sample consists of points from all data or, where they are not held, from chunks that are spread over the whole store. A
trust-region fit of it ends about sqrt(N / n) standard errors from the optimum of all N points. Full sweeps continue from
there, and decide whether the fit has converged. (L-BFGS is not used: it takes 3 to 12 times as many passes over the sample.)
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..base.config import threads
from ..data.chunks import Census, Chunk
from ..data.sample import Sample
from ..engine.condensed import Condensed, Segmentation, factor
from ..engine.evaluator import Evaluator
from ..engine.partition import Partition
from ..engine.places import HeldHere
from ..engine.sweep import SampleSummary, Sweep, first_sample_size
from ..kernels.blocks import Block, Reduction
from ..kernels.rules import OFF_BOUND, off_the_bounds
from .multistart import predicted_cost
from .trust_region import Asks, NotFiniteAtStart, Options, Solution, solve, solving

SAMPLE_PER_PARAM = 2  # points, below which a fit of the sample is useless
SAMPLE_PRECISION = 0.1  # standard errors of the sample to which it is fitted: what all data move is far more
SAMPLE_SWEEPS = 80  # over the sample at most: work of two over all data, and no reads; 53 parameters took 55
UNLIKE, RANK = 2.0, 1e-12  # times as much known of a direction is too much to be chance; of columns of norm 1
ALIKE = 3.0  # standard errors of the sample: smaller differences from the start are not significant
HELD_BLOCKS = 16  # of data that are held, from which the sweeps that a sample saves take longer than its fit
PIECES = 8  # in which a large sample is shared out to threads
PIECE_POINTS = 2**14  # at least: several tiles


def sample_evaluator(evaluator: Evaluator, sample: Sample) -> Evaluator:
    """The same objective on a sample as data of its own, in pieces that do not depend on the number of threads."""
    n, n_operands = sample.n_points, len(sample.block.buffers)
    edges = np.linspace(0, n, 1 + max(1, min(PIECES, n // PIECE_POINTS))).astype(int)
    blocks = tuple(
        Block(np.array([b - a, 0, *[a, 1] * n_operands]), np.array([float(b - a)]), sample.block.buffers)
        for a, b in itertools.pairwise(edges)
    )
    data = evaluator.sweep.data
    preparation = data.preparation._replace(layouts=sample.layouts)
    partition = Partition(preparation, [Chunk(blocks, (), (), (), ((n,),))], Census((), n, 0, 0, {}), ())
    sweep = Sweep(replace(data, preparation=preparation), HeldHere(partition, threads()))
    small = Evaluator(sweep, evaluator.objective, 0, Segmentation())
    small.jac_mode = evaluator.jac_mode
    return small


def told_apart(found: Solution, start: np.ndarray, sweep: Callable) -> np.ndarray:
    """Where the fit of a sample ended, except along directions in which the sample cannot distinguish it from ``start``.

    A peak that the sample has missed keeps its start so, instead of one from the noise. Directions are those of the
    singular vectors of J at the end, with columns of norm 1.
    """
    R, equations = found.factor.R, found.equations
    norms = np.linalg.norm(R, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    _, s, Vt = np.linalg.svd(R / norms)
    along = Vt @ (norms * (found.params - start))
    sigma = np.sqrt(2 * equations.cost / max(equations.n_points - len(start), 1))
    alike = np.abs(s * along) < ALIKE * sigma
    mixed = start + Vt[~alike].T @ along[~alike] / norms
    worse = sweep(mixed, "gram").cost - equations.cost
    return mixed if worse < 0.5 * ALIKE**2 * sigma**2 * np.count_nonzero(alike) else found.params  # false for nan


def misled(here: Condensed, there: Condensed, moved: np.ndarray) -> bool:
    """Whether a sample, ``here``, has moved the parameters where it says another thing of them than all data, ``there``.

    Where few of its points see a narrow feature, it follows their noise. Both matrices at the same params say how well
    each direction is determined; per point they differ where few points of the sample determine one. That is so if the
    sample has points from everywhere; one from a few chunks differs anyway.
    """
    if not (here.finite and there.finite):
        return False
    factors = [factor(each).R / np.sqrt(each.n_points) for each in (here, there)]
    ours, theirs = (R.T @ R for R in factors)
    lengths = np.sqrt(np.diag(theirs))
    lengths = np.where(lengths > 0, lengths, 1.0)
    size, axes = np.linalg.eigh(theirs / np.outer(lengths, lengths))
    known = size > len(size) * RANK
    axes = axes[:, known] / np.sqrt(size[known])
    share, turn = np.linalg.eigh(axes.T @ (ours / np.outer(lengths, lengths)) @ axes)
    along = turn.T @ (axes.T @ (theirs / lengths[:, None]) @ moved)
    sigma = np.sqrt(2 * there.cost) / there.n_points
    unlike = (share < 1 / UNLIKE) | (share > UNLIKE)
    return bool(np.any(unlike & (np.abs(along) > ALIKE * sigma)))


def pays(sweep: Sweep) -> bool:
    """Whether a fit of a sample saves more than it takes."""
    preparation = sweep.data.preparation
    long = sweep.data.n_points >= HELD_BLOCKS * preparation.kind.block_points
    return not sweep.place.held or (long and not preparation.whole)


def _drawn(sweep: Sweep, n_params: int) -> tuple[Sample, SampleSummary] | None:
    """The sample of a fit; None where there are too few points."""
    began, drawn = time.perf_counter(), sweep.drawn
    if sweep.place.held:
        sample, n_runs = sweep.points(first_sample_size(sweep.data.n_points, n_params)), sweep.place.n_runs
        drawn = SampleSummary(sample.n_points, n_runs, n_runs, time.perf_counter() - began)
    elif drawn is not None and drawn.n_points >= SAMPLE_PER_PARAM * n_params:
        sample = sweep.points(drawn.n_points)
    else:
        return None
    return sample, drawn


def warm_start(evaluator: Evaluator, start: np.ndarray, options: Options) -> np.ndarray:
    """Where a fit of the sample ends; ``start`` where that is better for all data, or the sample says nothing.

    All that is known of the cost at ``start`` is that of the sample. Where the next step from the new point, which
    also finds parameters that the sample does not see, promises no less for all data, the sample may have misled, and
    a sweep at ``start`` decides.
    """
    found = _drawn(evaluator.sweep, len(start))
    if found is None:
        return start
    sample, drawn = found
    coarse = max(options.ftol, SAMPLE_PRECISION**2 / sample.n_points)
    own = replace(options, ftol=coarse, max_nfev=SAMPLE_SWEEPS, reduction="gram", callback=None, accuracy=np.inf)
    evaluator.watch("fit of the sample", 0, 0)
    try:
        small = sample_evaluator(evaluator, sample)
        with small.sweep:
            solution = solve(small, start, own)
            warm = told_apart(solution, start, small)
            warm, start = (off_the_bounds(np, p, options.lower, options.upper, OFF_BOUND) for p in (warm, start))
            seen = small(warm, "gram") if evaluator.sweep.place.held else None
    except NotFiniteAtStart:
        return start
    evaluator.drawn = drawn._replace(nfev=solution.nfev)
    reduction: Reduction = "qr" if options.reduction == "qr" else "gram"
    there = evaluator(warm, reduction)
    if seen is not None and misled(seen, there, warm - start):
        return start
    expected = solution.history[0].cost / sample.n_points  # per point
    if predicted_cost(there, warm, options) / there.n_points <= expected:
        return warm
    return warm if there.finite and there.cost <= evaluator(start, reduction).cost else start


def hybrid(evaluator: Evaluator, start: np.ndarray, options: Options) -> Asks[Solution]:
    """`trust_region.solving` on all data, from where a fit of the sample ends, which comes first."""
    # what the sample has determined is near its optimum, what it has not seen is most of the cost
    return solving(warm_start(evaluator, start, options), replace(options, near_below=np.inf))
