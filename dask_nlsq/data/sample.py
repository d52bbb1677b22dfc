"""A small sample of the data, spread evenly over all of it, as a block of its own that every kernel can work on."""

from math import prod
from typing import NamedTuple

import numpy as np

from ..kernels.blocks import Block, Layout, Layouts
from ..kernels.kind import CPU
from .chunks import Chunk, Preparation, aligned_copy


class NoSample(ValueError):
    """All points that were read are masked or omitted."""


class Sample(NamedTuple):
    """A few of the points of a problem, or all, as one block of their own."""

    block: Block
    layouts: Layouts
    n_points: int  # of the sample, that count
    n_total: int  # of all data, that count
    whole: bool  # the block is all data, which the model needs at once


def spread(n: int, n_all: int, seed: int = 0) -> np.ndarray:
    """``n`` of the numbers below ``n_all``, one at random in each of n equal stretches; all if there are at most n."""
    if n >= n_all:
        return np.arange(n_all)
    edges = np.arange(n + 1) * n_all // n
    return edges[:-1] + (np.random.default_rng(seed).random(n) * np.diff(edges)).astype(np.int64)


def stratified_places(runs, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Run and place within it, of ``n`` points spread evenly over all data: one at random in each of n equal stretches.

    The points depend on the shape of the data and on ``n`` alone, not on the sizes of the ``runs`` along each axis.
    """
    shape = tuple(sum(sizes) for sizes in runs)
    flat = spread(n, prod(shape))
    index: list[np.ndarray] = []
    local = np.zeros(len(flat), np.int64)
    for sizes, along in zip(runs, np.unravel_index(flat, shape), strict=True):
        ends = np.cumsum(sizes)
        i = np.searchsorted(ends, along, side="right")
        index.append(i)
        local = local * np.asarray(sizes)[i] + along - (ends - sizes)[i]
    return np.ravel_multi_index(index, [len(sizes) for sizes in runs]), local


def pick(preparation: Preparation, chunk: Chunk, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of the operands except the mask, (operands, m), at ``places`` (m,) of a chunk; and which points count."""
    layouts, values = preparation.layouts, []
    begins = [block.geometry[1] for block in chunk.blocks]
    number = np.searchsorted(begins, places, side="right") - 1
    present = np.flatnonzero(np.bincount(number))
    counts = np.ones(len(places), bool)
    for k, layout in enumerate(layouts.operands):
        found = np.empty(len(places), chunk.blocks[0].buffers[k].dtype)
        for b in present:
            block, here = chunk.blocks[b], number == b
            offset, *strides = block.geometry[2 + k * (1 + layouts.ndim) : 2 + (k + 1) * (1 + layouts.ndim)]
            if layout.dense:
                at = offset + places[here] - begins[b]
            else:
                at = np.dot(strides, np.unravel_index(places[here], block.shape.astype(int)))
            found[here] = block.buffers[k][at]
        if layouts.mask is not None and k == 2:
            counts &= found == 0
        else:
            values.append(found)
    if layouts.invalid is not None:
        counts &= ~layouts.invalid.hits(values[0])
    values[0] = layouts.y.decoded(values[0])
    return np.array(values), counts & np.isfinite(values).all(axis=0)


def as_sample(layouts: Layouts, values: np.ndarray, n: int, n_total: int) -> Sample:
    """One block of at most ``n`` points, all operands dense, of their ``values`` (operands, m).

    In a fixed random order, so that the first points of the block are a smaller sample.
    """
    values = values[:, np.random.default_rng(0).permutation(values.shape[1])[:n]]
    m = values.shape[1]
    buffers = []
    for row, integer in zip(values, [False, False, *(each.integer for each in layouts.x)], strict=True):
        buffers.append(aligned_copy(row.astype(np.int64 if integer else np.float64), 0, m, n, CPU))
    dense = layouts._replace(
        y=Layout(True),
        sigma=Layout(True),
        mask=None,
        invalid=None,
        x=tuple(each._replace(dense=True) for each in layouts.x),
        ndim=1,
    )
    block = Block(np.array([m, 0, *[0, 1] * len(buffers)]), np.array([float(m)]), tuple(buffers))
    return Sample(block, dense, m, n_total, False)


SAMPLE_POINTS = 4096  # of the sample, and
POINTS_PER_PARAM = 40  # at least


def sample_size(n_params: int) -> int:
    return max(SAMPLE_POINTS, POINTS_PER_PARAM * n_params)
