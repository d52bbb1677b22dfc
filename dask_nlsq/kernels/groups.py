"""One sweep of a grouped fit over a block: the locals of each group are fitted, and eliminated from its gram matrix.

The residual of a point depends on the shared parameters s and on the locals l of its group. A group is evaluated at the
predicted locals for s. With J = [J_l J_s] of the group, H its J^T J and g its J^T r, it has ::

    A = H_ll + diag(|g_k| / v_k),  W = A^-1 [H_ls g_l],  [H_ss g_s; g_s^T r^T r] - [H_ls g_l]^T W,

where v_k is the distance of a local to a bound that its gradient pushes against. The sum of the last matrix over the groups
is the Gauss-Newton matrix of the cost as a function of s [1]_ [2]_. Locals do not leave the block. W predicts the locals at
other s: l - W [ds; 1]. The reduction that the locals still leave, 1/2 g_l^T A^-1 g_l, is summed as well.

Locals that are farther from their optimum than the sweep allows are fitted by the lanes of a map, and the group is
evaluated again. If the model is linear in them, and the loss is least squares, l - A^-1 g_l is the optimum, and the cost
there is known. Then the group is evaluated again only if the locals have moved far, for the derivatives with respect to s.

References
----------
.. [1] L. Kaufman, "A variable projection method for solving separable nonlinear least squares problems", BIT 15 (1975)
       49-57.
.. [2] A. Ruhe, P.-A. Wedin, "Algorithms for separable nonlinear least squares problems", SIAM Review 22 (1980) 318-337.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..model.function import Model
from . import rules
from .blocks import Reduction
from .lane_loop import Fitted, Pixels, build_fit, map_status, no_result, prepare
from .lanes import PIVOT, Data, Limits, MapSpec, MapStatus, diagonal, equations_of, inverse, lanes_of, own_rows
from .rules import EPS, at_bounds

MOST_DRIFT = 0.05  # relative change of linear locals, for which derivatives by the others need not be taken again
ASTRAY = 1.0  # standard errors: a fit of locals that ends without success, and farther off, has gone astray
NEAR_A_LOCAL = 2.0  # steps of a local to its minimum, as far as which a bound counts
STIFFEST = 1 / EPS**2  # what a bound adds to A at most, times the diagonal element


class GroupSpec(NamedTuple):
    """What needs a compilation of its own."""

    locals: MapSpec  # of their fit; its ``free`` are the places of the locals
    shared: tuple[int, ...]  # places of the shared parameters that are fitted
    linear: bool  # the model is linear in the locals, and the loss is least squares: no fit of them is needed
    reduction: Reduction = "gram"
    tabulated: bool = False  # the model is linear in the locals, and all groups share x: one table of it serves them all

    @property
    def fits(self) -> bool:
        """Whether locals may have to be fitted: without bounds a linear model says where they are best."""
        return not self.linear or self.locals.bounded

    @property
    def all(self) -> MapSpec:
        return self.locals._replace(free=(*self.locals.free, *self.shared))


class GroupSums(NamedTuple):
    """Sums over the groups of a block that are used; s shared parameters."""

    matrix: Any  # (s + 1, s + 1), gram matrix of [J_s r] without what the locals explain, or its triangular factor
    spread: Any  # (s + 1, s + 1), the sum of c c^T, c the last column of that of a group
    cost: Any
    left: Any  # by which the locals would still lower the cost
    worst: Any  # the largest of that in one group
    largest: Any  # cost of one group
    n_points: Any
    n_groups: Any
    floored: Any  # points with counts whose mean is below the floor of a Poisson likelihood
    weights: Any  # (3,): sums of w, w y, w y^2


class LocalState(NamedTuple):
    """What a block knows of its groups after a sweep, (groups, ...); l locals."""

    params: Any  # (groups, P), of all parameters
    back: Any  # W, (groups, l, s + 1)
    inverse: Any  # A^-1, (groups, l, l)
    regular: Any  # the data of the group determine all of its locals
    used: Any
    moments: Any  # (groups, 3): sums of w, w y, w y^2
    fitted: Fitted

    def first(self, n: int) -> "LocalState":
        """Of the first n groups."""
        return jax.tree.map(lambda each: each[:n], self)


class Eliminated(NamedTuple):
    """Groups without their locals, (groups, ...)."""

    matrix: Any  # (groups, s + 1, s + 1)
    cost: Any
    left: Any  # by which the locals would still lower the cost
    floored: Any
    back: Any  # W, (groups, l, s + 1)
    inverse: Any  # A^-1, (groups, l, l)
    pushed: Any  # a local is near a bound that its gradient pushes against
    regular: Any  # the data of the group determine all of its locals
    free: Any  # (groups, l), variances of the locals without the bounds, where that of the residuals is 1


def group_kernel(model: Model, spec: GroupSpec):
    """Compiled ``(pixels, n_pixels, used, moments, fitted, fresh, limits) -> GroupSums, LocalState``; call it inside
    ``float64()``.

    ``pixels.start`` (pixels, P) holds the shared parameters and where the locals start; ``used`` (pixels,) is false for
    groups that have been left out in an earlier sweep, of which ``moments`` and ``fitted`` are. ``fresh`` says that there
    was none.
    """
    return model.get(("groups", spec), lambda: model.jit(_build(model, spec)))


def nothing_fitted(spec: GroupSpec, pixels: Pixels) -> Fitted:
    """The state of groups before the first sweep."""
    return no_result(spec.locals, pixels)


def _build(model: Model, spec: GroupSpec):
    fit = build_fit(model, spec.locals)

    def sweep(pixels: Pixels, n_pixels, used, moments, fitted, fresh, limits):
        data, places, n = prepare(spec.locals, pixels), jnp.array(spec.locals.free), len(pixels.y)

        def refine(params, wanting, well, fitted):
            those = jnp.argsort(~wanting, stable=True)
            new = fit(pixels._replace(start=params), those, jnp.sum(wanting), limits)
            done = wanting & (new.nfev > 0) & jnp.isfinite(new.chi2)
            known = _choose(wanting, new, fitted)._replace(nfev=fitted.nfev + new.nfev)
            return jnp.where(done[:, None], new.popt, params), well & (done | ~wanting), known

        def turn(state):
            """Of those that want it: their locals are fitted, but in the first turn, and they are evaluated."""
            k, wanting, params, well, fitted, found = state
            by_fit = wanting
            if spec.linear:  # what has been evaluated says where its locals are best, if no bound is in the way
                aim, known = _aim(spec, data, params, found)
                known &= wanting & (k > 0) & ~(fresh & spec.fits)
                params = params.at[:, places].set(jnp.where(known[:, None], aim, params[:, places]))
                by_fit = wanting & ~known
            if spec.fits:
                now = params, by_fit, well, fitted
                some = (k > 0) & jnp.any(by_fit)
                params, well, fitted = lax.cond(some, refine, lambda *now: (now[0], *now[2:]), *now)
            order = jnp.argsort(~wanting, stable=True)
            found = _eliminate(model, spec, limits, data, params, order, jnp.sum(wanting), found)
            near = _distance(spec, data, found) <= limits.accuracy
            if spec.linear:
                near = stays(spec, data, params, found)
            return k + 1, wanting & ~near, params, well, fitted, found

        def unfinished(state):
            return (state[0] < 2) & jnp.any(state[1])

        moments = lax.cond(fresh, moments_of, lambda _: moments, data)
        well = jnp.ones(n, bool)
        if not spec.fits:
            fitted = unfitted(spec, data, fresh, fitted)
            well = fitted.nfev > 0
        first = jnp.where(fresh & spec.fits, 1, 0)
        begin = first, used & well, pixels.start, well, fitted, _nothing(spec, n)
        _, _, params, well, fitted, found = lax.while_loop(unfinished, turn, begin)
        return outcome(spec, limits, data, found, LocalState(params, None, None, None, used & well, moments, fitted))

    return sweep


def outcome(spec: GroupSpec, limits: Limits, data: Data, found: Eliminated, state: LocalState, linear=True):
    """`GroupSums` and the state that follows from one with the parameters at which the groups have been evaluated.

    ``linear`` says of which groups the step to the optimum of linear locals may be taken.
    """
    finite = jnp.isfinite(found.cost) & jnp.all(jnp.isfinite(found.matrix), axis=(1, 2))
    params, used, places = state.params, state.used & finite, jnp.array(spec.locals.free)
    if spec.linear:  # that step is exact, but where a bound is in the way
        aim, exact = _aim(spec, data, params, found)
        exact &= used & linear
        params = params.at[:, places].set(jnp.where(exact[:, None], aim, params[:, places]))
        left = jnp.where(exact, found.left, 0.0)
        found = found._replace(
            cost=jnp.maximum(found.cost - left, 0.0),
            left=found.left - left,
            back=found.back.at[..., -1].set(jnp.where(exact[:, None], 0.0, found.back[..., -1])),
        )
    fitted = _renewed(spec, data, limits, params, used, state.fitted, found)
    state = LocalState(params, found.back, found.inverse, found.regular, used, state.moments, fitted)
    return _added_up(spec, data, found, state), state


def unfitted(spec, data: Data, fresh, fitted: Fitted) -> Fitted:
    """Of groups whose locals need no fit; ``fitted`` as it is if it is not ``fresh``."""
    n, enough = data.n_points, data.n_points >= len(spec.locals.free)
    status = jnp.where(enough, int(MapStatus.GTOL), jnp.where(n > 0, int(MapStatus.TOO_FEW_POINTS), int(MapStatus.MASKED)))
    own = dict(n_points=n, nfev=enough, status=status)
    new = fitted._replace(**{k: each.astype(getattr(fitted, k).dtype) for k, each in own.items()})
    return jax.tree.map(lambda new, old: jnp.where(fresh, new, old), new, fitted)


def _aim(spec, data: Data, params, found: Eliminated):
    """Where linear locals are best, and whether that is so: no bound is in the way."""
    aim = params[:, jnp.array(spec.locals.free)] - found.back[..., -1]
    return aim, ~found.pushed & jnp.all((aim >= data.lower) & (aim <= data.upper), axis=1)


def _renewed(spec, data: Data, limits, params, used, fitted: Fitted, found: Eliminated) -> Fitted:
    """What is known of the fit of each group, at its locals as they are now."""
    own, distance = params[:, jnp.array(spec.locals.free)], _distance(spec, data, found)
    errors = jnp.sqrt(_variance(spec, data, found.cost)[:, None] * found.free)
    at_bound = at_bounds(own, errors, data.lower, data.upper)
    status = fitted.status.astype(jnp.int64)
    judged = (status == MapStatus.AT_BOUND) | (status == MapStatus.SINGULAR)
    came = (status == MapStatus.STUCK) & (distance <= limits.accuracy)
    status = jnp.where(judged | came, int(MapStatus.GTOL), status)
    status = map_status(status, jnp.any(at_bound != 0, axis=1), found.regular, False, found.floored > 0)
    return fitted._replace(
        chi2=jnp.where(used, 2 * found.cost, fitted.chi2),
        distance=jnp.where(used, distance, fitted.distance),
        status=jnp.where(used, status, fitted.status).astype(fitted.status.dtype),
        at_bound=jnp.where(used[:, None], at_bound, 0).astype(fitted.at_bound.dtype),
    )


def _choose(wanted, new, old):
    def one(new, old):
        return jnp.where(wanted.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(one, new, old)


def _variance(spec, data: Data, cost):
    """Of the residuals of each group, by its own points."""
    if spec.locals.absolute_sigma:
        return jnp.ones_like(cost)
    return 2 * cost / jnp.maximum(data.n_points - len(spec.locals.free), 1)


def _distance(spec, data: Data, found: Eliminated):
    """Standard errors of the locals of each group to their optimum."""
    return rules.distance(jnp, found.left, _variance(spec, data, found.cost), 0.0, 0.0)


def stays(spec, data: Data, params, found: Eliminated):
    """Whether linear locals move so little that the derivatives by shared parameters, linear in them, count as the same."""
    variance = _variance(spec, data, found.cost)[:, None]
    errors = jnp.sqrt(variance * jnp.diagonal(found.inverse, axis1=1, axis2=2))
    reach = jnp.maximum(MOST_DRIFT * abs(params[:, jnp.array(spec.locals.free)]), errors)
    return jnp.all(abs(found.back[..., -1]) <= reach, axis=1) & ~found.pushed


def _nothing(spec: GroupSpec, n: int) -> Eliminated:
    n_locals, m = len(spec.locals.free), len(spec.shared) + 1
    zero = jnp.zeros(n)
    back, inverted = jnp.zeros((n, n_locals, m)), jnp.zeros((n, n_locals, n_locals))
    no = jnp.zeros(n, bool)
    return Eliminated(jnp.zeros((n, m, m)), zero, zero, zero, back, inverted, no, no, jnp.zeros((n, n_locals)))


def _eliminate(model, spec: GroupSpec, limits: Limits, data: Data, params, order, n_wanted, known) -> Eliminated:
    """Of the first ``n_wanted`` groups in ``order``, lane after lane, as many together as in a map; others as known."""
    n_groups = len(params)
    width = min(lanes_of(spec.locals, data.y), n_groups)

    def one(k, known):
        first = jnp.minimum(k * width, n_groups - width)
        group = lax.dynamic_slice_in_dim(order, first, width)
        sums = equations_of(model, spec.all, limits, data, params, group, spec.reduction)
        found = without_locals(spec, data, params[group], group, *sums)
        return jax.tree.map(lambda whole, part: whole.at[group].set(part), known, found)

    return lax.fori_loop(0, -(-n_wanted // width), one, known)


def without_locals(spec: GroupSpec, data: Data, params, group, matrix, cost, floored) -> Eliminated:
    """Of some groups, whose parameters are ``params``, from what `equations_of` has found."""
    own = params[:, jnp.array(spec.locals.free)].T
    n_locals = len(own)
    lower, upper = (own_rows(each, group).T for each in (data.lower, data.upper))
    gram = matrix if spec.reduction == "gram" else jnp.einsum("kig,kjg->ijg", matrix, matrix)
    inverted, back, reduced, left, pushed, regular, free, stiff = eliminate(gram, own, lower, upper)
    if spec.reduction == "qr":
        reduced = eliminate_by_qr(matrix, stiff)
    columns, n_points = jnp.sqrt(diagonal(gram)[:n_locals]), data.n_points[group]
    magnitude = rules.magnitude(jnp, data.size[group], abs(own), columns)
    left = jnp.where(left <= rules.rounding_floor(magnitude, own, columns, n_points), 0.0, left)
    reduced, back, inverted = (each.transpose(2, 0, 1) for each in (reduced, back, inverted))
    floored = jnp.broadcast_to(floored, cost.shape)
    return Eliminated(reduced, cost, left, floored, back, inverted, pushed, regular, free.T)


def moments_of(data: Data):
    """Sums of w, w y and w y^2 of each group, (groups, 3)."""
    w = data.weight**2
    return jnp.stack([jnp.sum(each, axis=1) for each in (w, w * data.y, w * data.y**2)], axis=1)


def _added_up(spec: GroupSpec, data: Data, found: Eliminated, state: LocalState) -> GroupSums:
    """Sums over the groups that are used, in a fixed order. What locals leave that are stuck cannot be gained."""
    used, status = state.used, state.fitted.status
    well = (status >= MapStatus.GTOL) & (status <= MapStatus.SINGULAR) | (_distance(spec, data, found) < ASTRAY)
    gained = jnp.where(well, found.left, 0.0)
    n_groups, by_gram = len(used), spec.reduction == "gram"
    width, m = min(lanes_of(spec.locals, data.y), n_groups), len(spec.shared) + 1

    def one(k, sums):
        first = jnp.minimum(k * width, n_groups - width)  # the last ones begin early, and leave out what has been counted
        part = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=width)
        mine = part(used) & (first + jnp.arange(width) >= k * width)

        def total(each):
            return jnp.sum(jnp.where(mine.reshape(-1, *[1] * (each.ndim - 1)), each, 0.0), axis=0)

        cost, rest = total(part(found.cost)), total(part(gained))
        matrix = jnp.where(mine[:, None, None], part(found.matrix), 0.0)
        counts = total(part(data.n_points)), total(jnp.ones(width)), total(part(found.floored))
        last = matrix[..., -1] if by_gram else jnp.einsum("gki,gk->gi", matrix, matrix[..., -1])
        worst, largest = (jnp.max(jnp.where(mine, part(each), 0.0)) for each in (found.left, found.cost))
        stacked = jnp.concatenate([sums.matrix[None], matrix])
        whole = jnp.sum(stacked, axis=0) if by_gram else jnp.linalg.qr(stacked.reshape(-1, m), mode="r")
        new = GroupSums(whole, last.T @ last, cost, rest, worst, largest, *counts, total(part(state.moments)))
        most = dict(worst=jnp.maximum(sums.worst, worst), largest=jnp.maximum(sums.largest, largest))
        return jax.tree.map(jnp.add, sums, new)._replace(matrix=whole, **most)

    zero = jnp.zeros(())
    nothing = GroupSums(jnp.zeros((m, m)), jnp.zeros((m, m)), *(zero,) * 7, jnp.zeros(3))
    return lax.fori_loop(0, -(-n_groups // width), one, nothing)


def eliminate(gram, local, lower, upper):
    """A^-1 (l, l, lanes), W (l, s + 1, lanes), the gram matrix without the locals (s + 1, s + 1, lanes), what they leave,
    whether a bound is in their way, whether their rank is full, their variances without bounds, and what these add to A.

    ``gram`` (l + s + 1, l + s + 1, lanes) is that of ``[J_l J_s r]``; ``local``, ``lower`` and ``upper`` are (l, lanes).
    """
    n = len(local)
    gradient, elements = gram[:n, -1], diagonal(gram)
    distance = jnp.where(gradient > 0, local - lower, jnp.where(gradient < 0, upper - local, jnp.inf))
    plain, regular = inverse(gram[:n, :n])
    step = jnp.einsum("ijg,jg->ig", plain, gradient)
    near = jnp.isfinite(distance) & (distance < NEAR_A_LOCAL * abs(step))
    stiff = jnp.where(near, jnp.abs(gradient) / jnp.where(distance > 0, distance, EPS**8), 0.0)
    stiff = jnp.minimum(stiff, STIFFEST * elements[:n])
    inverted, _ = inverse(gram[:n, :n] + jnp.eye(n)[..., None] * stiff)
    coupling = gram[:n, n:]
    back = jnp.einsum("ijg,jkg->ikg", inverted, coupling)
    reduced = gram[n:, n:] - jnp.einsum("ijg,ikg->jkg", coupling, back)
    rounding = diagonal(reduced)[:-1] <= PIVOT * elements[n:-1]
    explained = jnp.concatenate([rounding, jnp.zeros_like(rounding[:1])])  # shared parameters that the locals stand in for
    reduced = jnp.where(explained[:, None] | explained, 0.0, reduced)
    left = 0.5 * jnp.sum(gradient * back[:, -1], axis=0)
    return inverted, back, reduced, left, jnp.any(near, axis=0), regular, diagonal(plain), stiff


def eliminate_by_qr(factor, stiff):
    """Triangular factor without the locals, (s + 1, s + 1, lanes), of one of ``[J_l J_s r]``, (l + s + 1, l + s + 1, lanes).

    It is the last block of the factor of the same rows with those of sqrt(C) below, C what bounds add: ``stiff`` (l, lanes).
    Locals that the data do not determine explain nothing: they are put last and left out, and their rows stay.
    """
    n, factor, stiff = len(stiff), factor.transpose(2, 0, 1), stiff.T
    lengths = jnp.linalg.norm(factor, axis=1)
    bounded = jnp.concatenate([jnp.eye(n) * jnp.sqrt(stiff)[:, :, None], jnp.zeros_like(factor[:, :n, n:])], axis=2)
    whole, squares = jnp.concatenate([factor[:, :n], bounded], axis=1), lengths[:, :n] ** 2 + stiff

    def without(unknown):
        """Rows from which those locals are left out, and which others nothing determines then."""
        order = jnp.argsort(unknown, axis=1, stable=True)
        own = jnp.where(unknown[:, None], 0.0, whole[:, :, :n])
        own = jnp.take_along_axis(own, order[:, None], axis=2)
        rows = jnp.linalg.qr(jnp.concatenate([own, whole[:, :, n:]], axis=2), mode="r")
        pivots = jnp.diagonal(rows[:, :n, :n], axis1=1, axis2=2)
        lost = pivots**2 <= PIVOT * jnp.take_along_axis(squares, order, axis=1)
        return rows, jnp.zeros_like(lost).at[jnp.arange(len(lost))[:, None], order].set(lost), lost

    _, unknown, _ = without(squares == 0)
    rows, _, lost = without(unknown | (squares == 0))
    left = jnp.where(lost[:, :, None], rows[:, :n, n:], 0.0)
    found = jnp.linalg.qr(jnp.concatenate([left, rows[:, n:, n:], factor[:, n:, n:]], axis=1), mode="r")
    rounding = jnp.linalg.norm(found, axis=1) <= PIVOT * lengths[:, n:]  # shared parameters that the locals stand in for
    rounding = rounding.at[:, -1].set(False)
    return jnp.where(rounding[:, None], 0.0, found).transpose(1, 2, 0)
