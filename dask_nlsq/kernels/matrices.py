"""What the rows [J r]^T (m, n) of a tile are condensed to, by whichever way suits the device."""

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from .rules import EPS

REFLECTED_UP_TO = 12  # rows: 3 parameters 1.2 times a gram sweep, 8 parameters 1.04 (LAPACK 1.13), 20 parameters no gain
SUBSTITUTED_UP_TO = 12  # rows, by operations that are written out: 0.9 s to compile, and more with the square of them
HALVED_FROM = 32  # rows from which the symmetry of the gram matrix saves more than it costs
SHIFT = 100 * EPS  # per row, of the first gram matrix, scaled to a diagonal of 1: more than the rounding of its elements


def gram(rows, pairs: bool = False):
    """``rows @ rows.T``; with many rows without the lower left quarter, which is the upper right one.

    In ``pairs`` each element is a sum of its own, else all are products of matrices.
    """
    half = len(rows) // 2
    if pairs:
        return jnp.sum(rows[:, None] * rows, axis=-1)
    if len(rows) < HALVED_FROM:
        return rows @ rows.T
    above, below = rows[:half], rows[half:]
    upper = above @ rows.T
    return jnp.block([[upper], [upper[:, half:].T, below @ below.T]])


def update_factor(factor, rows):
    """Triangular factor of the stack of ``factor`` and ``rows.T``.

    By a Householder reflection for each column, which touches one row of the factor only and leaves it triangular;
    beyond a few columns LAPACK is as fast.
    """
    m = len(rows)
    if m > REFLECTED_UP_TO:
        return jnp.linalg.qr(jnp.concatenate([factor, rows.T]), mode="r")
    done = []
    for k in range(m):
        # the rows of columns that are left, and the part of the factor that the reflection touches
        row, column = factor[k, k:], rows[0]
        dots = rows @ column
        norm = jnp.sqrt(row[0] ** 2 + dots[0])
        diagonal = jnp.where(row[0] > 0, -norm, norm)
        head = jnp.where(dots[0] != 0, row[0] - diagonal, 1.0)  # of the vector; nothing to do for 0, NaN goes on
        share = jnp.where(dots[0] != 0, (diagonal - row[0]) / diagonal, 0.0) * (row + dots / head)
        done.append(jnp.concatenate([jnp.zeros(k), row - share]))
        rows = rows[1:] - jnp.outer(share[1:] / head, column)
    return jnp.stack(done)


def factor_by_cholesky(rows, pairs: bool = False):
    """Triangular factor of ``rows.T`` by three passes over them, each of which is that of a gram matrix [1]_.

    For devices that work on many points at once, where each reflection would be a pass over all of them, and a QR of tall
    matrices is slow. The first pass leaves rows that are orthogonal but for its rounding, the second and third all but
    orthonormal ones. Columns are scaled to norm 1 before each.

    References
    ----------
    .. [1] T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, "Shifted Cholesky QR for Computing the QR
           Factorization of Ill-Conditioned Matrices", SIAM J. Sci. Comput. 42 (2020) A477-A503.
    """
    m = len(rows)
    factor = jnp.eye(m)
    for shift in (m * SHIFT, 0.0, 0.0):
        square = gram(rows, pairs)
        norms = jnp.sqrt(jnp.diagonal(square))
        scale = jnp.where(norms == 0, 1.0, norms)
        lower = _cholesky(square / jnp.outer(scale, scale) + shift * jnp.eye(m)) * scale[:, None]
        factor = lower.T @ factor
        rows = _divided(rows, lower, norms)
    return jnp.triu(factor)


def _cholesky(matrix):
    """L with ``L L^T`` = matrix; where rounding leaves no pivot, a column of zeros."""
    m = len(matrix)
    place = jnp.arange(m)

    def column(k, state):
        rest, lower = state
        pivot = rest[k, k]
        none = pivot <= m * EPS * matrix[k, k]  # false for nan
        new = jnp.where(place < k, 0.0, rest[:, k]) / jnp.where(none, jnp.inf, jnp.sqrt(pivot))
        return rest - jnp.outer(new, new), lower.at[:, k].set(new)

    return lax.fori_loop(0, m, column, (matrix, jnp.zeros_like(matrix)))[1]


def _divided(rows, lower, norms):
    """``L^-1 rows``, rows of zeros where L has no pivot."""
    m = len(rows)
    pivots = jnp.diagonal(lower)
    some = (pivots != 0) & (norms != 0)
    if m > SUBSTITUTED_UP_TO:
        lower = jnp.where(jnp.eye(m, dtype=bool), jnp.where(some, pivots, 1.0), lower)
        return jnp.where(some[:, None], solve_triangular(lower, rows, lower=True), 0.0)
    done: list = []
    for k in range(m):
        left = rows[k] - sum(lower[k, j] * done[j] for j in range(k))
        done.append(jnp.where(some[k], left / jnp.where(some[k], pivots[k], 1.0), 0.0))
    return jnp.stack(done)
