"""Values of every point of all data: residuals, the model, bands."""

import itertools

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed

from ..data.align import Problem
from ..data.chunks import release
from ..data.loading import Load, plan_loads
from ..kernels.values import VALUES_LEAD, What
from .evaluation import Evaluation, load_chunk, with_factor


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
