"""The faster way to form the columns of J for a model."""

import time

import jax
import numpy as np

from ..base.x64 import float64
from ..model.function import Model
from .blocks import MAX_TILE, Block, JacMode, KernelSpec, Layout, Layouts, tile_size
from .rows import build_sweep

COLUMNS_UP_TO = 8  # parameters up to which "columns" is the better guess
TIMING_RUNS = 5
TIMING_PAYS = 5e7  # points x parameters from which the better guess is replaced by a measurement: two compilations


def choose_jac_mode(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], params: np.ndarray, n: int) -> JacMode:
    """The faster way to form the columns of J for this model: pushed through the linearisation together, or one by one.

    "columns" is one vectorised pass for all parameters, "arguments" one pass for each, without what does not depend on
    it. Which is faster depends on the model by factors of 2 to 8 either way, so where ``n`` points make it worth two
    compilations both are timed on one tile, made of the coordinates in ``sample``, and the model remembers the winner.
    """
    p = len(params)
    guess: JacMode = "columns" if p <= COLUMNS_UP_TO else "arguments"
    if n * p < TIMING_PAYS or not sample or model.jac is not None:
        return guess

    def measure():
        tile = tile_size(p, MAX_TILE)
        dense = layouts._replace(
            y=Layout(True), sigma=Layout(False), mask=None, x=tuple(each._replace(dense=True) for each in layouts.x), ndim=1
        )
        buffers = (np.zeros(tile), np.ones(1), *(np.resize(coordinate, tile) for coordinate in sample))
        block = Block(np.array([tile, 0, *[0, 1] * len(buffers)]), np.array([float(tile)]), buffers)
        seconds = {}
        for mode in ("columns", "arguments"):
            kernel = model.jit(build_sweep(model, KernelSpec(dense, "gram", mode, "linear", tile)))
            times = []
            for _ in range(1 + TIMING_RUNS):
                begin = time.perf_counter()
                jax.block_until_ready(kernel(params, 1.0, block))
                times.append(time.perf_counter() - begin)
            seconds[mode] = min(times[1:])  # the first compiles
        return min(seconds, key=seconds.__getitem__)

    key = ("jac_mode", layouts.x, p)
    if key not in model.choices:
        with float64():
            model.choices[key] = measure()
    return model.choices[key]
