"""The faster way to form the columns of J for a model."""

import time

import jax
import numpy as np

from ..base.x64 import float64
from ..model.function import Model
from .blocks import Block, JacMode, KernelSpec, Layout, Layouts, tile_size
from .kind import Kind, kind_here
from .rows import build_sweep

TIMING_RUNS = 15  # of each way, in turns
TIMING_PAYS = 5e7  # points x parameters from which the better guess is replaced by a measurement: two compilations


def choose_jac_mode(
    model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], params: np.ndarray, n: int, kind: Kind
) -> JacMode:
    """The faster way to form the columns of J for this model: pushed through the linearisation together, or one by one.

    "columns" is one vectorised pass for all parameters, "arguments" one pass for each, without what does not depend on
    it. Which is faster depends on the model by factors of 2 to 8 either way, so where ``n`` points make it worth two
    compilations both are timed in turns on a few tiles, made of the coordinates in ``sample``, and the model remembers the
    one whose shortest run, which nothing else has slowed down, is less. Devices of another ``kind`` are not timed here.
    """
    p = len(params)
    guess: JacMode = "columns" if p <= kind.columns_up_to else "arguments"
    if n * p < TIMING_PAYS or not sample or model.jac is not None or kind != kind_here():
        return guess

    def measure():
        n = kind.timed_points
        tile = tile_size(kind, p, n)
        dense = layouts._replace(
            y=Layout(True), sigma=Layout(False), mask=None, x=tuple(each._replace(dense=True) for each in layouts.x), ndim=1
        )
        buffers = (np.zeros(n), np.ones(1), *(np.resize(coordinate, n) for coordinate in sample))
        block = jax.device_put(Block(np.array([n, 0, *[0, 1] * len(buffers)]), np.array([float(n)]), buffers))
        modes: tuple[JacMode, ...] = "columns", "arguments"
        kernels = [model.jit(build_sweep(model, KernelSpec(dense, "gram", mode, "linear", tile))) for mode in modes]
        seconds = np.zeros((1 + TIMING_RUNS, len(modes)))
        for run, k in np.ndindex(seconds.shape):
            begin = time.perf_counter()
            jax.block_until_ready(kernels[k](params, 1.0, block))
            seconds[run, k] = time.perf_counter() - begin
        return modes[int(np.argmin(seconds[1:].min(axis=0)))]  # the first run compiles

    key = ("jac_mode", layouts.x, p, kind)
    if key not in model.choices:
        with float64():
            model.choices[key] = measure()
    return model.choices[key]
