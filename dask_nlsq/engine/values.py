"""Values of every point of all data: residuals, the model, bands."""

import itertools

import dask
import numpy as np
from dask.delayed import Delayed

from ..base.lazy import da
from ..data.align import Data
from ..data.chunks import Preparation, release
from ..data.loading import Load, PassedOn, plan_loads
from ..kernels.values import VALUES_LEAD, What
from .partition import load_chunk, with_factor
from .request import Request, values


def chunk_values(preparation: Preparation, factor, request: Request, what: What, spread, load: Load, *shared) -> np.ndarray:
    """What `value_kernel` computes, of one chunk, NaN where it cannot be read; ``shared``: values of its shared tasks."""
    known = PassedOn(dict(zip(load.shared, shared, strict=True)), [[load]])
    chunk = load_chunk(preparation, [load], known)
    try:
        if any(census.damage for census in chunk.censuses):
            return np.full((*VALUES_LEAD[what], *load.shape), np.nan)
        return values(preparation, chunk if factor is None else with_factor(chunk, factor), request, what, *spread)
    finally:
        release(chunk)


def map_chunks(data: Data, request: Request, what: What, *spread):
    """What `value_kernel` computes, in y's shape ("band": (2, *shape)): lazy (Dask) where the data are, else NumPy."""
    runs, common = plan_loads(data)
    grid = np.empty([len(sizes) for sizes in data.chunks], dtype=object)
    task = dask.delayed(chunk_values) if data.lazy else chunk_values
    for load in itertools.chain(*runs):
        shared = [Delayed(key, common) for key in load.shared]
        found = task(data.preparation, data.factor, request, what, spread, load, *shared)
        shape = (*VALUES_LEAD[what], *load.shape)
        grid[load.index] = da.from_delayed(found, shape, dtype=np.float64) if data.lazy else found
    return da.block(grid.tolist()) if data.lazy else np.block(grid.tolist())


def but_hidden(data: Data, values):
    """Values with y's axes as their last ones, NaN where the mask of the data is true."""
    if data.preparation.layouts.mask is None:
        return values
    return (da if data.lazy else np).where(data.operands[2] != 0, np.nan, values)
