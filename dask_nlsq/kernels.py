"""From a block of data to one small matrix: residual, loss, Jacobian and their reduction, a tile at a time.

A block holds ``n`` points as flat arrays. The kernel walks over it in tiles small enough that the rows ``[J r]`` of a
tile never leave the cache, and condenses each to ``[J r]^T [J r]`` ("gram") or updates the triangular factor of all
rows so far ("qr", TSQR [1]_), so J of the whole block never exists. For a robust loss the rows are rescaled first, so
that ``J^T J`` is the Gauss-Newton matrix and ``J^T r`` the gradient of the robust cost [2]_.

Arrays come as they are stored. Geometry (length, offsets, strides) is data, not code: blocks of different length,
alignment or shape share one compilation as long as their buffers have the same capacity.

References
----------
.. [1] J. Demmel et al., "Communication-optimal Parallel and Sequential QR and LU Factorizations", SIAM J. Sci. Comput.
       34 (2012) A206-A239.
.. [2] B. Triggs et al., "Bundle Adjustment - A Modern Synthesis", 1999, section 4.3.
"""

import functools
import hashlib
import operator
import re
import time
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .model import Model, advice, check_jac_shape, check_shape, evaluate, evaluate_jac, function_name
from .rules import EPS
from .trf_jit import LOSSES, MODEL_FLOOR, float64, masked_cost, poisson_terms

Reduction = Literal["gram", "qr"]
What = Literal["residual", "model", "band"]  # that `value_kernel` computes
JacMode = Literal["columns", "arguments"]
BLOCK_POINTS = 2**18  # points per kernel call: about 1 ms of the fastest kernel against 0.1 ms to start one
TILE_BYTES = 2**20  # rows [J r] of one tile: half of a 2 MiB second-level cache
MAX_TILE = 4096  # points; longer tiles gained nothing at any number of parameters
MIN_TILE = 256  # points; below, the loop itself costs more than the cache saves
REFLECTED_UP_TO = 6  # rows: 3 parameters 9.7 against 12.1 ns per point, 8 parameters no gain
HALVED_FROM = 32  # rows from which the symmetry of the gram matrix saves more than it costs
COLUMNS_UP_TO = 8  # parameters up to which "columns" is the better guess
TIMING_RUNS = 5
VALUES_LEAD = {"residual": (), "model": (), "band": (2,)}  # axes before that of the points
TIMING_PAYS = 5e7  # points x parameters from which the better guess is replaced by a measurement: two compilations


class Layout(NamedTuple):
    """How an operand lies in memory: the part of the kernel that is code.

    ``dense`` operands have one element per point; others ("un-broadcast": an axis vector, a detector mask for all
    frames, a scalar) are looked up by the point's place along the axes of the chunk.
    """

    dense: bool
    integer: bool = False  # keep integers (as int64), so that the model can index a table
    scale: float = 1.0  # a value is ``stored * scale + offset``
    offset: float = 0.0

    def decoded(self, stored):
        """Values of what is stored, as float64; NumPy or JAX."""
        values = stored.astype("float64")
        return values if (self.scale, self.offset) == (1.0, 0.0) else values * self.scale + self.offset


class Invalid(NamedTuple):
    """Values of y, as they are stored, that stand for no data: single ones, and those below ``low`` or above ``high``."""

    values: tuple[float, ...]
    low: float | None
    high: float | None

    def hits(self, y):
        """Where ``y`` holds such a value; NumPy or JAX."""
        tests = [y != y if value != value else y == value for value in self.values]
        tests += [y < self.low] if self.low is not None else []
        tests += [y > self.high] if self.high is not None else []
        return functools.reduce(operator.or_, tests)


class Layouts(NamedTuple):
    """Operands of a block, in this order: y, sigma, mask or None, then the coordinates."""

    y: Layout
    sigma: Layout
    mask: Layout | None
    x: tuple[Layout, ...]
    x_kind: Literal["single", "stacked", "tuple", "none"]
    x_lead: tuple[int, ...]  # leading axes of a stacked x: (k,) for SciPy's (k, M)
    ndim: int  # axes of the chunk
    invalid: Invalid | None = None

    @property
    def operands(self):
        return (self.y, self.sigma, *([self.mask] if self.mask else []), *self.x)


class Block(NamedTuple):
    """``n`` consecutive points (C order) of one chunk.

    Each buffer is flat; point q of the block is element ``offset + q`` of a dense one. For an un-broadcast operand the
    flat index of the point within the chunk, ``base + q``, is split into places along the axes of the chunk and joined
    with the operand's own strides (0 along axes that it does not have).
    """

    geometry: np.ndarray  # int64: n, base, then per operand: offset, stride along each axis of the chunk
    shape: np.ndarray  # float64 (ndim,): shape of the chunk
    buffers: tuple[np.ndarray, ...]
    clean: Literal[True] | None = None  # no value of y is invalid, so that none needs to be looked for


class KernelSpec(NamedTuple):
    """Everything that needs a compilation of its own; ``tile`` None means that the whole block is one tile."""

    layouts: Layouts
    reduction: Reduction
    jac_mode: JacMode
    loss: str
    tile: int | None
    whitened: bool = False  # the last buffer of a block is the Cholesky factor L of the covariance of y
    parts: int = 0  # at most so many runs of consecutive points, whose sums are told beside those of the block


def tile_size(n_params: int, capacity: int) -> int:
    """Points per tile: the rows [J r] of a tile fit in cache, and a tile is no longer than the block.

    On a GPU the tile is the block: its cores work on all points at once, and a loop over tiles would leave them idle.
    """
    fitting = 2 ** int(np.log2(TILE_BYTES // (8 * (n_params + 1)))) if longest_tile() == MAX_TILE else BLOCK_POINTS
    return min(max(MIN_TILE, min(longest_tile(), fitting)), capacity)


def longest_tile() -> int:
    """Points of the longest tile that any kernel may take on the device of this thread."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    on_cpu = getattr(device, "platform", device) == "cpu"  # the setting may be a device or the name of a platform
    return MAX_TILE if on_cpu else BLOCK_POINTS


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
            kernel = jax.jit(build_sweep(model, KernelSpec(dense, "gram", mode, "linear", tile)))
            times = []
            for _ in range(1 + TIMING_RUNS):
                begin = time.perf_counter()
                jax.block_until_ready(kernel(params, 1.0, block))
                times.append(time.perf_counter() - begin)
            seconds[mode] = min(times[1:])  # the first compiles
        return min(seconds, key=seconds.get)

    key = ("jac_mode", layouts.x, p)
    if key not in model.choices:
        with float64():
            model.choices[key] = measure()
    return model.choices[key]


def sweep_kernel(model: Model, spec: KernelSpec):
    """Compiled ``(params, f_scale, block) -> matrix (p+1, p+1), cost, parts (k, part_size(p))`` of one block.

    ``params`` is (p,) float64, ``matrix`` the gram matrix of ``[J r]`` or its upper triangular factor; ``parts`` what
    `Parts` takes apart, of ``spec.parts`` runs of points at most. To be called inside ``float64()``.
    """
    return model.get(("sweep", spec), lambda: jax.jit(build_sweep(model, spec)))


def value_kernel(model: Model, spec: KernelSpec, what: What):
    """Compiled ``(params, f_scale, block) -> (capacity,)``: residuals or model values; the first n are meaningful.

    With a Poisson likelihood residuals are those of the deviance: half of their squares add up to the cost.

    "band" takes two more arguments, ``root`` (p, m) with ``root root^T = pcov``, and ``noise``, and gives (2, capacity):
    model values and their standard errors, ``sqrt(J pcov J^T + noise sigma^2)``, with the mean as sigma^2 of counts.
    """
    return model.get((what, spec), lambda: jax.jit(_build_values(model, spec, what)))


def values_kernel(model: Model, spec: KernelSpec, what: Literal["residual", "model"]):
    """Compiled ``(params (k, p), f_scale, block) -> (k, capacity)``: `value_kernel` for many params."""

    def build():
        return jax.jit(jax.vmap(_build_values(model, spec, what), in_axes=(0, None, None)))

    return model.get(("values", spec, what), build)


class Parts(NamedTuple):
    """Sums over runs of consecutive points, along the first axis: those that the uncertainty of a fit is taken from.

    ``gram`` (k, p+1, p+1) is that of ``[J r]``, rescaled for the loss, and ``spread`` the sum of ``c c^T`` over tiles, c
    the last column of a tile's gram matrix. The rest is (k,), if not told otherwise.
    """

    gram: np.ndarray
    spread: np.ndarray
    cost: np.ndarray
    residual: np.ndarray  # sum of residuals, not rescaled; with a Poisson likelihood over the root of the mean
    squares: np.ndarray  # of the same
    n: np.ndarray  # points used
    n_tiles: np.ndarray  # with any of them
    floored: np.ndarray  # points with counts whose mean is below the floor of a Poisson likelihood
    weights: np.ndarray  # (k, 3): w = 1 / sigma^2, w y and w y^2; 0 in sweeps that were not asked for them


def part_size(n_params: int) -> int:
    return 2 * (n_params + 1) ** 2 + 9


def take_apart(parts: np.ndarray, n_params: int) -> Parts:
    """`Parts` of the rows (k, part_size) that sweeps add up."""
    m = n_params + 1
    gram, spread, sums, weights = np.split(parts, [m * m, 2 * m * m, 2 * m * m + 6], axis=1)
    return Parts(gram.reshape(-1, m, m), spread.reshape(-1, m, m), *sums.T, weights)


def build_sweep(model, spec):
    def sweep(params, f_scale, block, weigh=False):
        p = len(params)
        capacity = block.buffers[0].shape[0]
        tile = spec.tile or capacity
        n = block.geometry[0]
        tiles_per_part = -(-capacity // (tile * max(spec.parts, 1)))
        n_parts = -(-capacity // (tile * tiles_per_part)) if spec.parts else 0

        def add_tile(i, state):
            matrix, cost, parts = state
            begin = i * tile
            # the last tile of a ragged block starts early and leaves out what the one before has counted
            first = jnp.maximum(jnp.minimum(begin, n - tile), 0)
            point = first + jnp.arange(tile)
            fresh = (point >= begin) & (point < n)
            rows, sums = _condensed_rows(model, spec, params, f_scale, block, first, fresh)
            gram = _gram(rows) if spec.parts or spec.reduction == "gram" else None
            matrix = matrix + gram if spec.reduction == "gram" else _update_factor(matrix, rows)
            if spec.parts:
                weights = lax.cond(weigh, lambda: _weights(spec, block, first, fresh), lambda: jnp.zeros(3))
                part = jnp.concatenate([gram.ravel(), jnp.outer(gram[p], gram[p]).ravel(), sums, weights])
                parts = parts.at[i // tiles_per_part].add(part)
            return matrix, cost + sums[0], parts

        start = (jnp.zeros((p + 1, p + 1)), jnp.zeros(()), jnp.zeros((n_parts, part_size(p))))
        if spec.tile is None:
            return add_tile(0, start)
        return lax.fori_loop(0, (n + tile - 1) // tile, add_tile, start)

    return sweep


def _gram(rows):
    """``rows @ rows.T``; with many rows without the lower left quarter, which is the upper right one."""
    half = len(rows) // 2
    if len(rows) < HALVED_FROM:
        return rows @ rows.T
    above, below = rows[:half], rows[half:]
    upper = above @ rows.T
    return jnp.block([[upper], [upper[:, half:].T, below @ below.T]])


def _update_factor(factor, rows):
    """Triangular factor of the stack of ``factor`` and ``rows.T``.

    By a Householder reflection for each column, which touches one row of the factor only and leaves it triangular;
    beyond a few columns LAPACK is as fast.
    """
    m = len(rows)
    if m > REFLECTED_UP_TO:
        return jnp.linalg.qr(jnp.concatenate([factor, rows.T]), mode="r")
    for k in range(m):
        column = rows[k]
        dots = rows @ column
        norm = jnp.sqrt(factor[k, k] ** 2 + dots[k])
        diagonal = jnp.where(factor[k, k] > 0, -norm, norm)
        head = jnp.where(dots[k] != 0, factor[k, k] - diagonal, 1.0)  # of the vector; nothing to do for 0, NaN goes on
        share = jnp.where(dots[k] != 0, (diagonal - factor[k, k]) / diagonal, 0.0) * (factor[k] + dots / head)
        factor = factor.at[k].set(jnp.where(jnp.arange(m) < k, 0.0, factor[k] - share))
        rows = rows - jnp.outer(share / head, column)
    return factor


def _condensed_rows(model, spec, params, f_scale, block, first, fresh):
    """Rows [J r]^T (p + 1, tile) of one tile, rescaled for the loss, and the first six sums of `Parts`."""
    tile = _Tile(spec.layouts, block, first, len(fresh))

    def residual(params):
        return _residual(model, spec, params, block, first, fresh)

    if model.jac is not None:
        J = evaluate_jac(model, tile.x(), tuple(params)).T
        r, J = residual(params), _weighted(spec, J, tile, fresh, block)
    else:
        r, J = with_columns(residual, params, spec.jac_mode)
    if spec.loss == "poisson":
        rows, cost, floored = poisson_rows(r, J, _counts(spec, block, first, fresh))
        r = rows[-1]
    else:
        rows, cost = robust_rows(r, J, f_scale, spec.loss), masked_cost(r, fresh, f_scale, loss=spec.loss)
        floored = 0.0
    hidden = tile.hidden()
    n = jnp.sum(fresh if hidden is None else fresh & ~hidden, dtype=jnp.int32).astype(jnp.float64)
    squares = 2 * cost if spec.loss == "linear" else r @ r
    return rows, jnp.stack([cost, jnp.sum(r), squares, n, jnp.sign(n), floored])


def _weights(spec, block, first, fresh):
    """Sums over a tile of w, w y and w y^2."""
    tile = _Tile(spec.layouts, block, first, len(fresh))
    one, y = (_weighted(spec, each, tile, fresh, block) for each in (jnp.ones(len(fresh)), tile.y()))
    return jnp.stack([one @ one, one @ y, y @ y])


def with_columns(residual, params, jac_mode: JacMode):
    """r (n,) and J^T (p, n) of ``residual(params)``, by one linearisation and a pass for each unit vector."""
    p = len(params)
    r, pushforward = jax.linearize(lambda *each: residual(each), *params)
    if jac_mode == "columns":
        return r, jax.vmap(pushforward)(*jnp.eye(p))

    def along(k):  # the other arguments are constants, so that what does not depend on this one vanishes
        def one_argument(q):
            return pushforward(*[q if m == k else jnp.zeros(()) for m in range(p)])

        return jax.jvp(one_argument, (jnp.zeros(()),), (jnp.ones(()),))[1]

    return r, jnp.stack([along(k) for k in range(p)])


def poisson_rows(r, J, y):
    """[J r]^T (p + 1, n) of Fisher's scoring for counts ``y``, the cost, and how many points have counts below the floor.

    r = f - y, 0 for points that do not count. Divided by the root of the mean: J^T J is the information matrix then, and
    J^T r the gradient of the cost. Where the mean is floored it does not change with the parameters.
    """
    mean, half_deviance, floored = poisson_terms(r, y)
    J = jnp.where(floored, 0.0, J) / jnp.sqrt(mean)
    residual = jnp.where(floored & (y == 0), 0.0, (mean - y) / jnp.sqrt(mean))
    return jnp.concatenate([J, residual[None]]), jnp.sum(half_deviance), jnp.sum(floored & (y > 0), dtype=jnp.float64)


def robust_rows(r, J, f_scale, loss):
    """[J r]^T (p + 1, n), rescaled for the loss; J^T (p, n)."""
    if loss != "linear":
        _, rho1, rho2 = LOSSES[loss]((r / f_scale) ** 2)
        rescale = jnp.sqrt(jnp.maximum(rho1 + 2 * rho2 * (r / f_scale) ** 2, EPS))
        J, r = J * rescale, r * rho1 / rescale
    return jnp.concatenate([J, r[None]])


def _residual(model, spec, params, block, first, fresh):
    """(f(x, *params) - y) / sigma, zero for points that do not count; shape (tile,)."""
    tile = _Tile(spec.layouts, block, first, len(fresh))
    value = jnp.broadcast_to(evaluate(model, tile.x(), tuple(params)), fresh.shape)
    return _weighted(spec, value - tile.y(), tile, fresh, block)


def _counts(spec, block, first, fresh):
    """y, and 1 for points that do not count: with a residual of 0 that adds nothing."""
    tile = _Tile(spec.layouts, block, first, len(fresh))
    hidden = tile.hidden()
    return jnp.where(fresh if hidden is None else fresh & ~hidden, tile.y(), 1.0)


def _weighted(spec, rows, tile, fresh, block):
    """Rows (..., tile) divided by sigma or by the factor of the covariance, zero where masked."""
    if spec.whitened:
        return jax.scipy.linalg.solve_triangular(block.buffers[-1], rows.T, lower=True).T
    hidden = tile.hidden()
    return jnp.where(fresh if hidden is None else fresh & ~hidden, rows / tile.sigma(), 0.0)


def assemble_x(layouts: Layouts, coordinates):
    """What the model gets as x, of a list of (n,) arrays: (n,), (*lead, n), a tuple of (n,) arrays, or None."""
    match layouts.x_kind:
        case "none":
            return None
        case "single":
            return coordinates[0]
        case "stacked":
            return jnp.stack(coordinates).reshape(*layouts.x_lead, -1)
        case "tuple":
            return tuple(coordinates)


class _Tile:
    """Operands of ``length`` consecutive points from ``first`` on."""

    def __init__(self, layouts: Layouts, block: Block, first, length: int):
        self.layouts, self.block, self.first, self.length = layouts, block, first, length

    def y(self):
        return self._read(0, self.layouts.y)

    def sigma(self):
        return self._read(1, self.layouts.sigma)

    def hidden(self):
        """Which points are left out, by the mask or by their value; None where none ever are."""
        parts = []
        if self.layouts.mask is not None:
            parts.append(self._read(2, self.layouts.mask))
        if self.layouts.invalid is not None:
            parts.append(self.layouts.invalid.hits(self._stored(0, self.layouts.y)))
        if not parts:
            return None
        # A branch that is always taken: else XLA looks each point up again in the loop over the rows [J r], which then does
        # not use the vector units (2.5 times slower with axis vectors as coordinates).
        hidden = functools.reduce(jnp.logical_or, parts)
        return lax.cond(self.block.geometry[0] >= 0, lambda hidden: hidden, jnp.zeros_like, hidden)

    def x(self):
        begin = 2 + (self.layouts.mask is not None)
        return assemble_x(self.layouts, [self._read(begin + k, layout) for k, layout in enumerate(self.layouts.x)])

    def _read(self, k, layout):
        values = self._stored(k, layout)
        if layout is self.layouts.mask:
            return values
        return values.astype(jnp.int64) if layout.integer else layout.decoded(values)

    def _stored(self, k, layout):
        buffer, ndim = self.block.buffers[k], self.layouts.ndim
        offset = self.block.geometry[2 + k * (1 + ndim)]
        if layout.dense:
            return lax.dynamic_slice(buffer, (offset + self.first,), (self.length,))
        if buffer.shape == (1,):
            return jnp.broadcast_to(buffer[0], (self.length,))
        strides = self.block.geometry[3 + k * (1 + ndim) : 2 + (k + 1) * (1 + ndim)]
        index = sum(place * stride for place, stride in zip(self._places(), strides, strict=True))
        return buffer.at[index].get(mode="clip")

    def _places(self):
        """Place of each point along each axis of the chunk.

        Quotients are taken in float64: (q + 1/2) / size is at least 1/(2 size) away from an integer, so that the
        floor is exact up to q = 2^51, and unlike integer division it uses the vector units.
        """
        n, base = self.block.geometry[0], self.block.geometry[1]
        point = jnp.minimum(self.first + jnp.arange(self.length), n - 1)  # behind the last point: the last point again
        q = (base + point).astype(jnp.float64)
        places = []
        for axis in reversed(range(1, self.layouts.ndim)):
            size = self.block.shape[axis]
            quotient = jnp.floor((q + 0.5) * (1.0 / size))
            places.append((q - quotient * size).astype(jnp.int64))
            q = quotient
        return [q.astype(jnp.int64), *reversed(places)]


def _build_values(model, spec, what):
    def values(params, f_scale, block, *spread):
        capacity = block.buffers[0].shape[0]
        tile = spec.tile or capacity
        n = block.geometry[0]
        lead = VALUES_LEAD[what]

        def one_tile(i, out):
            first = jnp.maximum(jnp.minimum(i * tile, n - tile), 0)
            operands = _Tile(spec.layouts, block, first, tile)
            if what == "model":
                piece = jnp.broadcast_to(evaluate(model, operands.x(), tuple(params)), (tile,))
            elif what == "band":
                piece = _band(model, spec, params, operands, *spread)
            else:
                every = jnp.ones(tile, bool)
                piece = _residual(model, spec, params, block, first, every)
                if spec.loss == "poisson":
                    _, half_deviance, _ = poisson_terms(piece, _counts(spec, block, first, every))
                    piece = jnp.sign(piece) * jnp.sqrt(2 * jnp.maximum(half_deviance, 0.0))
                if (hidden := operands.hidden()) is not None:
                    piece = jnp.where(hidden, jnp.nan, piece)
            return lax.dynamic_update_slice(out, piece, (*(0 for _ in lead), first))

        return lax.fori_loop(0, (n + tile - 1) // tile, one_tile, jnp.zeros((*lead, capacity)))

    return values


def _band(model, spec, params, tile, root, noise):
    """Model values and their standard errors, (2, tile.length)."""
    x, length = tile.x(), tile.length

    def value(*params):
        return jnp.broadcast_to(evaluate(model, x, params), (length,))

    if model.jac is not None:
        mean, rows = value(*params), root.T @ evaluate_jac(model, x, tuple(params)).T
    else:  # along the columns of the root, so that J itself is not needed
        mean, pushforward = jax.linearize(value, *params)
        rows = jax.vmap(lambda column: pushforward(*column))(root.T)
    scatter = jnp.maximum(mean, MODEL_FLOOR) if spec.loss == "poisson" else tile.sigma() ** 2
    variance = jnp.sum(rows**2, axis=0) + jnp.where(noise > 0, noise * scatter, 0.0)
    return jnp.stack([mean, jnp.sqrt(variance)])


def check_model(model: Model, layouts: Layouts, n: int, n_params: int) -> None:
    """Trace the model on ``n`` points, without data, so that it fails before anything is read.

    Raises
    ------
    ModelShapeError
        Where it does not return one value per point, or jac one row per point.
    ModelError
        Where it uses NumPy functions, branches on a value, or returns nothing or complex values.
    """
    if (key := ("checked", layouts, n, n_params)) in model.choices:
        return
    x = [jax.ShapeDtypeStruct((n,), np.int64 if layout.integer else np.float64) for layout in layouts.x]
    params = [jax.ShapeDtypeStruct((), np.float64)] * n_params
    with float64(), advice(model):
        value = jax.eval_shape(lambda x, params: evaluate(model, assemble_x(layouts, x), params), x, params)
    check_shape(model, value.shape, n)
    if model.jac is not None:
        with float64(), advice(model, is_jac=True):
            columns = jax.eval_shape(lambda x, params: evaluate_jac(model, assemble_x(layouts, x), params), x, params)
        check_jac_shape(columns.shape, n, n_params)
    model.choices[key] = True  # tracing takes a millisecond, a quarter of a small fit


def fingerprint(model: Model, layouts: Layouts, n_params: int, n: int = 2) -> str:
    """A hash of what the model computes: of its operations and of the arrays that it closes over, not of its text.

    ``n`` is a number of points that it can be evaluated on.
    """
    found = hashlib.blake2b(digest_size=16)
    x = [jax.ShapeDtypeStruct((n,), np.int64 if layout.integer else np.float64) for layout in layouts.x]
    params = [jax.ShapeDtypeStruct((), np.float64)] * n_params
    for evaluated in (evaluate, evaluate_jac) if model.jac is not None else (evaluate,):
        with float64():
            traced = jax.make_jaxpr(lambda x, params, e=evaluated: e(model, assemble_x(layouts, x), params))(x, params)
        found.update(re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)).encode())  # addresses of functions
        for const in traced.consts:
            found.update(np.asarray(const).tobytes())
    return found.hexdigest()


def check_pointwise(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], *starts: np.ndarray) -> None:
    """Compare the model's values at a few points with those at some of the points in another order.

    At each of the ``starts`` (p,), since a parameter that is 0 can hide a term.

    Parameters
    ----------
    sample : tuple of (n,) arrays
        Coordinates of the points.

    Raises
    ------
    ValueError
        Where a value depends on other points than its own.
    """

    if not sample or len(sample[0]) < 2:
        return
    n = len(sample[0])
    parts = [np.arange(n), np.arange(0, n, 2), np.arange(n - 1, 0, -2)]

    def evaluate_parts(sample, params):
        def at(places):
            x = assemble_x(layouts, [c[places] for c in sample])
            return jnp.broadcast_to(evaluate(model, x, tuple(params)), places.shape)

        return [at(places) for places in parts]

    run = model.get(("pointwise", layouts, n), lambda: jax.jit(evaluate_parts))
    with float64():
        found = [list(map(np.asarray, run(sample, params))) for params in starts]
    for everything, places, part in (
        (values[0], places, part) for values in found for places, part in zip(parts[1:], values[1:], strict=True)
    ):
        if not np.allclose(part, everything[places], rtol=1e-6, atol=0, equal_nan=True):
            raise ValueError(
                f"the model {function_name(model.f)} is not pointwise: its value at a point changes when it is called "
                "with other points beside it (by a cumulative sum, a mean, a sort, an index into x). The data are "
                "evaluated piece by piece, so each value must depend on its own x only; what needs the whole axis can "
                "be computed from an axis that the model closes over"
            )
