"""From a block of data to one small matrix: residual, loss, Jacobian and their reduction, a tile at a time.

A block holds ``n`` points as flat arrays. The kernel goes through it in tiles small enough that the rows ``[J r]`` of a
tile stay in the cache. It condenses each tile to ``[J r]^T [J r]`` ("gram") or updates the triangular factor of all
rows so far ("qr", TSQR [1]_), so J of the whole block is never formed. For a robust loss the rows are rescaled first, so
that ``J^T J`` is the Gauss-Newton matrix and ``J^T r`` the gradient of the robust cost [2]_.

Arrays are passed as they are stored. Geometry (length, offsets, strides) is data, not code: blocks of different length,
alignment or shape share one compilation as long as their buffers have the same capacity.

References
----------
.. [1] J. Demmel et al., "Communication-optimal Parallel and Sequential QR and LU Factorizations", SIAM J. Sci. Comput.
       34 (2012) A206-A239.
.. [2] B. Triggs et al., "Bundle Adjustment - A Modern Synthesis", 1999, section 4.3.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..base.compile import Compiled
from ..model.function import Model, evaluate, evaluate_jac
from ..model.losses import LOSSES, masked_cost, poisson_terms
from .blocks import JacMode, KernelSpec, Tile
from .matrices import factor_by_cholesky, gram, update_factor
from .rules import EPS

N_WEIGHTS = 3  # sums of w, w y and w y^2


def sweep_kernel(model: Model, spec: KernelSpec):
    """Compiled ``(params, f_scale, block) -> matrix (p+1, p+1), cost, parts`` of one block.

    ``params`` is (p,) float64, ``matrix`` the gram matrix of ``[J r]`` or its upper triangular factor; ``parts`` what
    `SegmentSums` takes apart, except for the weights, of ``spec.parts`` runs of points at most, (k, segment_size(p) - 3).
    To be called inside ``float64()``.
    """
    return model.get(("sweep", spec), lambda: model.jit(build_sweep(model, spec), long_sums=True))


class SegmentSums(NamedTuple):
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


def segment_size(n_params: int) -> int:
    return 2 * (n_params + 1) ** 2 + 6 + N_WEIGHTS


def unpack(parts: np.ndarray, n_params: int) -> SegmentSums:
    """`SegmentSums` of the rows (k, segment_size) that sweeps add up."""
    m = n_params + 1
    grams, spread, sums, weights = np.split(parts, [m * m, 2 * m * m, 2 * m * m + 6], axis=1)
    cost, residual, squares, n, n_tiles, floored = sums.T
    shaped = grams.reshape(-1, m, m), spread.reshape(-1, m, m)
    return SegmentSums(*shaped, cost, residual, squares, n, n_tiles, floored, weights)


def weight_kernel(spec: KernelSpec):
    """Compiled ``block -> (k, 3)``, the last columns of `SegmentSums`: sums that know neither model nor parameters."""
    return _weight_kernel(spec._replace(reduction="gram", jac_mode="columns", loss="linear"))


@lru_cache(maxsize=256)
def _weight_kernel(spec: KernelSpec):
    return Compiled(partial(_sum_weights, spec), long_sums=True)


def build_sweep(model, spec):
    def sweep(params, f_scale, block):
        p, by_gram = len(params), spec.reduction == "gram"
        nothing = jnp.zeros((p + 1, p + 1))

        def of_tile(first, fresh):
            rows, sums = _condensed_rows(model, spec, params, f_scale, block, first, fresh)
            if by_gram:
                matrix = squares = gram(rows, spec.pairs)
            else:
                # else XLA forms the rows once more for each reflection: twice the time at 2 parameters
                rows = lax.optimization_barrier(rows)
                matrix = update_factor(nothing, rows) if spec.reflected else factor_by_cholesky(rows, spec.pairs)
                squares = matrix.T @ matrix  # which XLA leaves out where nothing needs it
            all_sums = jnp.concatenate([squares.ravel(), jnp.outer(squares[p], squares[p]).ravel(), sums])
            return all_sums, (matrix, sums[0])

        def add(state, condensed):
            (matrix, cost), (found, costs) = state, condensed
            if by_gram:
                return matrix + found.sum(axis=0), cost + costs.sum()
            return update_factor(matrix, found.reshape(-1, p + 1).T), cost + costs.sum()

        start, n_columns = (nothing, jnp.zeros(())), segment_size(p) - N_WEIGHTS
        return _by_tile(spec, block, n_columns, of_tile, start, add)

    return sweep


def _sum_weights(spec, block):
    def of_tile(first, fresh):
        tile = Tile(spec.layouts, block, first, len(fresh))
        one, y = (_weighted(spec, each, tile, fresh, block) for each in (jnp.ones(len(fresh)), tile.y()))
        return jnp.stack([one @ one, one @ y, y @ y]), ()

    return _by_tile(spec, block, N_WEIGHTS, of_tile, (), lambda state, condensed: state)[0]


def _by_tile(spec, block, n_columns, of_tile, start, add):
    """Walk over a block: ``of_tile(first, fresh) -> sums (n_columns,), condensed`` of each tile.

    A turn of the loop costs as much as hundreds of points, so it takes as many short tiles as make a long one.
    ``add(state, condensed)`` gets what they are condensed to, stacked; the state is ``start`` at first, and
    ends in the sums of the parts, (k, n_columns).
    """
    capacity, n = block.buffers[0].shape[0], block.geometry[0]
    tile = spec.tile or capacity
    tiles_per_part = -(-capacity // (tile * max(spec.parts, 1)))
    n_parts = -(-capacity // (tile * tiles_per_part)) if spec.parts else 0
    own_part = n_parts > 0 and tiles_per_part == 1  # of each tile
    together = spec.together if own_part else 1

    def at(k):
        begin = k * tile
        # the last tile of a ragged block starts early and leaves out what the one before has counted
        first = jnp.maximum(jnp.minimum(begin, n - tile), 0)
        point = first + jnp.arange(tile)
        return of_tile(first, (point >= begin) & (point < n))

    def turn(i, state):
        *state, parts = state
        if together == 1:
            sums, condensed = at(i)
            sums, condensed = sums[None], jax.tree.map(lambda each: each[None], condensed)
        else:
            sums, condensed = jax.vmap(at)(i * together + jnp.arange(together))
        if own_part:
            parts = lax.dynamic_update_slice(parts, sums, (i * together, 0))
        elif n_parts:
            parts = parts.at[i // tiles_per_part].add(sums[0])
        return *add(state, condensed), parts

    n_rows = -(-n_parts // together) * together
    state = (*start, jnp.zeros((n_rows, n_columns)))
    n_turns = (n + tile * together - 1) // (tile * together)
    *state, parts = turn(0, state) if tile * together >= capacity else lax.fori_loop(0, n_turns, turn, state)
    return *state, parts[:n_parts]


def _condensed_rows(model, spec, params, f_scale, block, first, fresh):
    """Rows [J r]^T (p + 1, tile) of one tile, rescaled for the loss, and the first six sums of `SegmentSums`."""
    tile = Tile(spec.layouts, block, first, len(fresh))

    def residual(params):
        return residual_of(model, spec, params, block, first, fresh)

    if model.jac is not None:
        J = evaluate_jac(model, tile.x(), tuple(params)).T
        r, J = residual(params), _weighted(spec, J, tile, fresh, block)
    else:
        r, J = with_columns(residual, params, spec.jac_mode)
    if spec.loss == "poisson":
        rows, cost, floored = poisson_rows(r, J, counts_of(spec, block, first, fresh))
        r = rows[-1]
    else:
        rows, cost = robust_rows(r, J, f_scale, spec.loss), masked_cost(r, fresh, f_scale, loss=spec.loss)
        floored = 0.0
    hidden = tile.hidden()
    n = jnp.sum(fresh if hidden is None else fresh & ~hidden, dtype=jnp.int32).astype(jnp.float64)
    squares = 2 * cost if spec.loss == "linear" else r @ r
    return rows, jnp.stack([cost, jnp.sum(r), squares, n, jnp.sign(n), floored])


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


def residual_of(model, spec, params, block, first, fresh):
    """(f(x, *params) - y) / sigma, zero for points that do not count; shape (tile,)."""
    tile = Tile(spec.layouts, block, first, len(fresh))
    value = jnp.broadcast_to(evaluate(model, tile.x(), tuple(params)), fresh.shape)
    return _weighted(spec, value - tile.y(), tile, fresh, block)


def counts_of(spec, block, first, fresh):
    """y, and 1 for points that do not count: with a residual of 0 that adds nothing."""
    tile = Tile(spec.layouts, block, first, len(fresh))
    hidden = tile.hidden()
    return jnp.where(fresh if hidden is None else fresh & ~hidden, tile.y(), 1.0)


def _weighted(spec, rows, tile, fresh, block):
    """Rows (..., tile) divided by sigma or by the factor of the covariance, zero where masked."""
    if spec.whitened:
        return jax.scipy.linalg.solve_triangular(block.buffers[-1], rows.T, lower=True).T
    hidden = tile.hidden()
    return jnp.where(fresh if hidden is None else fresh & ~hidden, rows / tile.sigma(), 0.0)
