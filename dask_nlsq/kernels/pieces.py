"""One sweep over groups that are cut into pieces, for models that are linear in the locals, under least squares.

No task sees a whole group. So each task condenses its points to the matrix of [J_l J_s r] of each group. The matrices are
added, and the best locals follow from the sum, as in `groups`. If these are far from the values at which the group was
evaluated, it is read once more, in another sweep.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..base.compile import Compiled
from ..model.function import Model
from ..model.lapack import InTurn
from .groups import GroupSpec, LocalState, moments_of, outcome, stays, unfitted, without_locals
from .lane_loop import Pixels, prepare
from .lanes import Data, Limits, equations_of, lanes_of


class PieceSums(NamedTuple):
    """What a piece adds to each of its groups, (groups, ...)."""

    matrix: Any  # (groups, l + s + 1, l + s + 1) of [J_l J_s r], gram matrix or triangular factor
    cost: Any
    n_points: Any
    size: Any  # sum of w y^2
    moments: Any  # (groups, 3): sums of w, w y, w y^2


def piece_kernel(model: Model, spec: GroupSpec):
    """Compiled ``(pixels, limits) -> PieceSums``; call inside ``float64()``."""
    return model.get(("piece", spec), lambda: model.jit(partial(_piece, model, spec)))


def _piece(model, spec: GroupSpec, pixels: Pixels, limits: Limits) -> PieceSums:
    data, n = prepare(spec.locals, pixels), len(pixels.y)
    width, m = min(lanes_of(spec.locals, data.y), n), len(spec.locals.free) + len(spec.shared) + 1

    def one(k, found):
        group = jnp.minimum(k * width, n - width) + jnp.arange(width)
        matrix, cost, _ = equations_of(model, spec.all, limits, data, pixels.start, group, spec.reduction)
        return found[0].at[group].set(matrix.transpose(2, 0, 1)), found[1].at[group].set(cost)

    matrix, cost = lax.fori_loop(0, -(-n // width), one, (jnp.zeros((n, m, m)), jnp.zeros(n)))
    return PieceSums(matrix, cost, data.n_points, data.size, moments_of(data))


@lru_cache(maxsize=64)
def joined_kernel(spec: GroupSpec):
    """Compiled ``(pieces, state, lower, upper, fresh, limits) -> GroupSums, LocalState``; call inside ``float64()``.

    ``pieces`` are those of each group, (pieces, groups, ...); ``state`` has the parameters at which they were evaluated.
    """
    return InTurn(Compiled(partial(_joined, spec)))


def _joined(spec: GroupSpec, pieces: PieceSums, state: LocalState, lower, upper, fresh, limits: Limits):
    n = pieces.cost.shape[1]
    total = jax.tree.map(lambda each: jnp.sum(each, axis=0), pieces)
    matrix = total.matrix
    if spec.reduction == "qr":
        m = matrix.shape[-1]
        matrix = jnp.linalg.qr(pieces.matrix.transpose(1, 0, 2, 3).reshape(n, -1, m), mode="r")
    nothing = jnp.zeros((n, 1))
    data = Data(nothing, nothing, (), total.n_points, total.size, state.params, lower, upper)
    fitted = unfitted(spec, data, fresh, state.fitted)
    used, moments = state.used & (fitted.nfev > 0), jnp.where(fresh, total.moments, state.moments)
    every = jnp.arange(n)
    found = without_locals(spec, data, state.params, every, matrix.transpose(1, 2, 0), total.cost, jnp.zeros(n))
    near = stays(spec, data, state.params, found) | fresh
    return outcome(spec, limits, data, found, state._replace(used=used, moments=moments, fitted=fitted), near)
