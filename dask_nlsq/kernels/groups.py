"""One sweep of a grouped fit over a block: the locals of each group are fitted, and eliminated from its gram matrix.

The residual of a point depends on the shared parameters s and on the locals l of its group. At given s the locals are
fitted by the lanes of a map. Then, with J = [J_l J_s] of a group, H its J^T J and g its J^T r, it has ::

    A = H_ll + diag(|g_k| / v_k),  W = A^-1 [H_ls g_l],  [H_ss g_s; g_s^T r^T r] - [H_ls g_l]^T W,

v_k the distance of a local to a bound that its gradient pushes against; the sum of the last over the groups is the gram
matrix of Gauss and Newton's method on the cost as a function of s alone [1]_ [2]_. No local number leaves the block. W
predicts where the locals are at other s: l - W [ds; 1]. What the locals still leave, 1/2 g_l^T A^-1 g_l, is summed as well.

References
----------
.. [1] L. Kaufman, "A variable projection method for solving separable nonlinear least squares problems", BIT 15 (1975)
       49-57.
.. [2] A. Ruhe, P.-A. Wedin, "Algorithms for separable nonlinear least squares problems", SIAM Review 22 (1980) 318-337.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..model.function import Model
from .lane_loop import Fitted, Pixels, build_fit, prepare
from .lanes import PIVOT, Data, Lanes, Limits, MapSpec, diagonal, inverse, lanes_of, normal_equations
from .rules import EPS, RUNNING, Course

NOWHERE = Course(None, None)
STIFFEST = 1 / EPS**2  # what a bound adds to A at most, times the diagonal element


class GroupSpec(NamedTuple):
    """What needs a compilation of its own."""

    locals: MapSpec  # of their fit; its ``free`` are the places of the locals
    shared: tuple[int, ...]  # places of the shared parameters that are fitted

    @property
    def all(self) -> MapSpec:
        return self.locals._replace(free=(*self.locals.free, *self.shared))


class GroupSums(NamedTuple):
    """Sums over the groups of a block that are used; s shared parameters."""

    gram: Any  # (s + 1, s + 1), of [J_s r] without what the locals explain
    cost: Any
    left: Any  # by which the locals would still lower the cost
    worst: Any  # the largest of that in one group
    n_points: Any
    n_groups: Any
    floored: Any  # points with counts whose mean is below the floor of a Poisson likelihood
    weights: Any  # (3,): sums of w, w y, w y^2


class LocalState(NamedTuple):
    """What a block knows of its groups after a sweep, (groups, ...); l locals."""

    params: Any  # (groups, P), of all parameters
    back: Any  # W, (groups, l, s + 1)
    inverse: Any  # A^-1, (groups, l, l)
    used: Any
    fitted: Fitted

    def first(self, n: int) -> "LocalState":
        """Of the first n groups."""
        return jax.tree.map(lambda each: each[:n], self)


def group_kernel(model: Model, spec: GroupSpec):
    """Compiled ``(pixels, n_pixels, used, limits) -> GroupSums, LocalState``; call inside ``float64()``.

    ``pixels.start`` (pixels, P) holds the shared parameters and where the locals start; ``used`` (pixels,) is false for
    groups that have been left out in an earlier sweep.
    """
    return model.get(("groups", spec), lambda: model.jit(_build(model, spec)))


def _build(model: Model, spec: GroupSpec):
    fit = build_fit(model, spec.locals)

    def sweep(pixels: Pixels, n_pixels, used, limits):
        fitted = fit(pixels, n_pixels, limits)
        used = used & (fitted.nfev > 0) & jnp.isfinite(fitted.chi2)
        params = jnp.where(used[:, None], fitted.popt, pixels.start)
        data = prepare(spec.locals, pixels)
        return _eliminate(model, spec, limits, data, params, used, fitted)

    return sweep


def _eliminate(model, spec: GroupSpec, limits: Limits, data: Data, params, used, fitted):
    """Lane after lane of groups, so many together as a map fits."""
    n_groups, n_locals, s = len(params), len(spec.locals.free), len(spec.shared)
    width = min(lanes_of(spec.locals, data.y), n_groups)
    places = jnp.array((*spec.locals.free, *spec.shared))
    state = LocalState(
        params,
        jnp.zeros((n_groups, n_locals, s + 1)),
        jnp.zeros((n_groups, n_locals, n_locals)),
        used,
        fitted,
    )

    def one(k, carried):
        sums, state = carried
        first = jnp.minimum(k * width, n_groups - width)  # the last lanes begin early, and leave out what has been counted
        group = first + jnp.arange(width)
        mine = group >= k * width
        x = tuple(c[group] if len(c) > 1 else c for c in data.x)
        cut = data._replace(y=data.y[group], weight=data.weight[group], x=x, start=params[group].T)
        trial = params[group][:, places].T
        lanes = Lanes(cut, group, trial, NOWHERE, jnp.full(width, RUNNING))
        gram, cost, floored = normal_equations(model, spec.all, limits, lanes)
        lower, upper = (_rows(each, group).T for each in (data.lower, data.upper))
        inverted, back, reduced, left = eliminate(gram, trial[:n_locals], lower, upper)
        finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(gram), axis=(0, 1))
        fresh = mine & used[group] & finite
        weight, y, n_points = cut.weight, cut.y, data.n_points[group]
        moments = jnp.stack([weight**2, weight**2 * y, (weight * y) ** 2]).sum(axis=2)

        def total(each):
            return jnp.sum(jnp.where(fresh, each, 0.0), axis=-1)

        found = GroupSums(
            total(reduced), total(cost), total(left), jnp.max(jnp.where(fresh, left, 0.0)),
            total(n_points), total(jnp.ones(width)), total(floored), total(moments),
        )  # fmt: skip
        sums = jax.tree.map(jnp.add, sums, found)._replace(worst=jnp.maximum(sums.worst, found.worst))

        def put(whole, part):
            kept = fresh.reshape(-1, *[1] * (part.ndim - 1))
            return whole.at[group].set(jnp.where(kept, part, whole[group]))

        state = state._replace(
            back=put(state.back, back.transpose(2, 0, 1)),
            inverse=put(state.inverse, inverted.transpose(2, 0, 1)),
            used=state.used.at[group].set(jnp.where(mine, fresh, state.used[group])),
        )
        return sums, state

    zero = jnp.zeros(())
    nothing = GroupSums(jnp.zeros((s + 1, s + 1)), *(zero,) * 6, jnp.zeros(3))
    return lax.fori_loop(0, -(-n_groups // width), one, (nothing, state))


def _rows(array, group):
    """Of some groups, or what all share."""
    return array[group] if len(array) > 1 else jnp.broadcast_to(array, (len(group), *array.shape[1:]))


def eliminate(gram, local, lower, upper):
    """A^-1 (l, l, lanes), W (l, s + 1, lanes), the gram matrix without the locals (s + 1, s + 1, lanes), what they leave.

    ``gram`` (l + s + 1, l + s + 1, lanes) is that of ``[J_l J_s r]``; ``local``, ``lower`` and ``upper`` are (l, lanes).
    """
    n = len(local)
    gradient = gram[:n, -1]
    distance = jnp.where(gradient > 0, local - lower, jnp.where(gradient < 0, upper - local, jnp.inf))
    elements = diagonal(gram)
    stiff = jnp.where(jnp.isfinite(distance), jnp.abs(gradient) / jnp.where(distance > 0, distance, EPS**8), 0.0)
    stiff = jnp.minimum(stiff, STIFFEST * elements[:n])
    inverted, _ = inverse(gram[:n, :n] + jnp.eye(n)[..., None] * stiff)
    coupling = gram[:n, n:]
    back = jnp.einsum("ijg,jkg->ikg", inverted, coupling)
    reduced = gram[n:, n:] - jnp.einsum("ijg,ikg->jkg", coupling, back)
    rounding = diagonal(reduced)[:-1] <= PIVOT * elements[n:-1]
    explained = jnp.concatenate([rounding, jnp.zeros_like(rounding[:1])])  # shared parameters that the locals stand in for
    reduced = jnp.where(explained[:, None] | explained, 0.0, reduced)
    return inverted, back, reduced, 0.5 * jnp.sum(gradient * back[:, -1], axis=0)
