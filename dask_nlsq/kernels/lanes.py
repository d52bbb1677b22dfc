"""A step of many bounded trust-region fits at once, one in each *lane*.

The method is that of `trust_region`: the same hat space and candidates, and by the same `rules`, on the gram matrix of each
pixel's own rows ``[J r]``; its free steps are left out, which cost as much here as they save. Arrays end
in the axis of the lanes, ``params`` is (p, lanes), so that each operation on small matrices is one on vectors. The
subproblem is solved by elimination, which vectorises, in place of the SVD: where the data do not determine a direction
its pivot is rounding, and is kept at the size of it.
"""

from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..model.function import Model, evaluate
from ..model.losses import masked_cost
from . import rules
from .blocks import JacMode, Layouts, assemble_x
from .rows import poisson_rows, robust_rows, with_columns
from .rules import EPS, MORE_ITERATIONS, MORE_RTOL, ROUNDING, SLIGHT, STALLS, STUCK, TO_ROUNDING

MOST_LANES, FEWEST_LANES = 256, 16  # pixels that are fitted together: enough to make a vector of each number
LANE_POINTS = 2**18  # of all lanes: more of them would wait longer for the last pixels of a block
GROUP_BYTES, FEWEST_TOGETHER = 2**18, 4  # rows [J r] of the lanes that are evaluated together stay in the cache
PIVOT = 2**8 * EPS  # of the diagonal element: rounding of a gram matrix of some 1000 points, as measured
RUNNING = 255  # status of a pixel that is being fitted


class MapStatus(IntEnum):
    """Why the fit of a pixel ended; from 1 to 5 as in `scipy.optimize.least_squares`."""

    ITERATION_LIMIT = 0
    GTOL = 1
    FTOL = 2
    XTOL = 3
    FTOL_XTOL = 4
    ROUNDING = 5  # no step lowers the gradient further
    AT_BOUND = 6  # converged, with a parameter at its bound
    SINGULAR = 7  # converged, but the data do not determine all parameters; perr is inf
    TOO_FEW_POINTS = 8  # fewer than parameters
    NON_FINITE = 9  # the start, or the model or its derivatives there, are not finite
    MASKED = 10  # no point at all
    STUCK = 11  # no step lowers the cost, although the optimum of the quadratic model is far
    UNDETERMINED = 12  # the model does not depend on a parameter where the fit ended


class Limits(NamedTuple):
    """Numbers of `trust_region.Options`, which need no compilation."""

    ftol: float
    xtol: float
    gtol: float
    accuracy: float
    max_nfev: int
    f_scale: float


class MapSpec(NamedTuple):
    """Everything that needs a compilation of its own."""

    layouts: Layouts
    free: tuple[int, ...]  # places of the parameters that are fitted, among all
    bounded: bool
    jac_mode: JacMode
    loss: str
    absolute_sigma: bool
    guess: Model | None = None  # ``guess(x, y) -> start`` of all parameters


class Point(NamedTuple):
    """Where each lane stands, and the model of its cost around there."""

    params: Any  # (p, lanes)
    gram: Any  # (p + 1, p + 1, lanes)
    cost: Any  # (lanes,)
    floored: Any  # points with counts below the floor of a Poisson likelihood
    finite: Any
    regular: Any  # the gram matrix has not lost the digits of any direction
    n_faded: Any  # parameters that the model no longer depends on
    longest: Any  # (p, lanes) columns of J so far
    reach: Any  # the largest that each parameter has been, in size, (p, lanes)
    d: Any  # step = d * step_h
    gradient: Any  # in hat space
    hessian: Any  # in hat space, (p, p, lanes)
    newton: Any  # step in hat space
    newton_slope: Any  # derivative of its length by the Levenberg-Marquardt parameter
    decrement: Any
    floor: Any  # of the decrement, that rounding leaves
    distance: Any
    n_full: Any  # full steps in a row that led here
    optimality: Any


class Data(NamedTuple):
    """Of the pixels in the lanes."""

    y: Any  # (lanes, n)
    weight: Any  # (lanes, n): 1 / sigma, 0 for points that do not count
    x: tuple[Any, ...]  # (lanes or 1, n) each


class Lanes(NamedTuple):
    """Pixels that are being fitted; all fields but the data end in the axis of the lanes."""

    data: Data
    pixel: Any
    start: Any
    lower: Any
    upper: Any
    n_points: Any
    size: Any  # sum w y^2
    here: Point
    trial: Any  # (p, lanes)
    full: Any  # the trial is the minimum of the quadratic model
    predicted: Any
    step_norm: Any
    step_h_norm: Any
    radius: Any
    alpha: Any
    stalls: Any
    tests_passed: Any  # SciPy's, at some point
    nfev: Any
    status: Any


def n_lanes(n: int) -> int:
    """Lanes for spectra of ``n`` points, a power of two."""
    return 2 ** int(np.log2(min(MOST_LANES, max(FEWEST_LANES, LANE_POINTS // n))))


def group_size(n: int, n_params: int) -> int:
    """Lanes whose rows [J r], of ``n`` points each, fit in the cache: a power of two."""
    fitting = GROUP_BYTES // (8 * (n_params + 1) * n)
    return 2 ** int(np.log2(min(n_lanes(n), max(FEWEST_TOGETHER, fitting))))


def each_or_shared(x):
    """Coordinates and their axes for `jax.vmap` over the lanes, which may share them."""
    return tuple(c if len(c) > 1 else c[0] for c in x), tuple(0 if len(c) > 1 else None for c in x)


def as_x(spec, coordinates):
    return assemble_x(spec.layouts, list(coordinates))


def iterate(model, spec, limits: Limits, lanes: Lanes) -> Lanes:
    """Evaluate the trial of each lane, accept or refuse it, and propose the next one."""
    running, first, before = lanes.status == RUNNING, lanes.nfev == 0, lanes.here
    there = linearise(spec, limits, lanes, *_normal_equations(model, spec, limits, lanes))
    verdict = rules.judge(jnp, before, there, lanes.predicted, lanes.stalls)
    tests = rules.proposal(jnp, verdict, lanes.step_norm, _norm(before.params), limits.ftol, limits.xtol)
    still = jnp.all(rules.same(jnp, lanes.trial, before.params), axis=0)
    hopeless = ~first & ~verdict.accepted & ((verdict.stalls >= STALLS) | still)

    radius = rules.next_radius(jnp, lanes.radius, verdict.ratio, lanes.step_h_norm)
    whole = _norm(jnp.where((there.longest > 0) & (there.d > 0), there.params / there.d, 0.0))
    radius = jnp.where(first, rules.first_radius(jnp, whole, _norm(there.newton), there.cost), radius)
    alpha = jnp.where(first, 0.0, lanes.alpha * lanes.radius / radius)
    moves = running & (verdict.accepted | first)
    here = jax.tree.map(
        lambda new, old: jnp.where(moves, new, old), there, before._replace(n_full=jnp.zeros_like(before.n_full))
    )
    nfev = lanes.nfev + running

    proposed = jnp.where(there.finite & ~first, tests, 0)
    proposed = jnp.where((here.optimality < limits.gtol) | (here.optimality == 0), rules.GTOL, proposed)
    tests_passed = (lanes.tests_passed & ~first & (verdict.relative < SLIGHT)) | (proposed > 0)
    dof = lanes.n_points - len(spec.free)
    state = here.distance, here.decrement, here.cost, here.floor, dof, here.floored
    arrived = rules.converged(jnp, *state, limits.accuracy)
    status = jnp.where((proposed > 0) & (arrived | ~here.regular & (here.floored == 0)), proposed, RUNNING)
    status = jnp.where((status == RUNNING) & hopeless, jnp.where(arrived, TO_ROUNDING, STUCK), status)
    ended = jnp.where(tests_passed, STUCK, int(MapStatus.ITERATION_LIMIT))
    status = jnp.where((status == RUNNING) & (nfev >= limits.max_nfev), ended, status)
    status = jnp.where(first & ~there.finite, int(MapStatus.NON_FINITE), status)
    status = jnp.where(running, status, lanes.status)
    scaled = _reined_in(here, radius)
    step_h, alpha, inside = _solve_subproblem(scaled, radius, alpha)
    step_h, predicted, uncut = _select_step(spec, scaled, step_h, radius, lanes.lower, lanes.upper)
    step = scaled.d * step_h
    trial = here.params + step
    if spec.bounded:
        trial = rules.off_the_bounds(jnp, trial, lanes.lower, lanes.upper, 0.0)
    return lanes._replace(
        here=here,
        trial=trial,
        full=inside & uncut,
        predicted=predicted,
        step_norm=_norm(step),
        step_h_norm=_norm(step_h),
        radius=radius,
        alpha=alpha,
        stalls=jnp.where(first, 0, verdict.stalls),
        tests_passed=tests_passed,
        nfev=nfev,
        status=status,
    )


def _normal_equations(model, spec, limits, lanes):
    """Gram matrices (p + 1, p + 1, lanes) of [J r], costs, and counts where the mean is floored."""

    def one(params, start, coordinates, y, weight):
        valid = weight > 0

        def residual(params):
            every = [start[k] for k in range(len(start))]
            for place, value in zip(spec.free, params, strict=True):
                every[place] = value
            value = jnp.broadcast_to(evaluate(model, as_x(spec, coordinates), every), y.shape)
            return jnp.where(valid, (value - y) * weight, 0.0)

        r, J = with_columns(residual, params, spec.jac_mode)
        if spec.loss == "poisson":
            rows, cost, floored = poisson_rows(r, J, jnp.where(valid, y, 1.0))
            return rows @ rows.T, cost, floored
        rows = robust_rows(r, J, limits.f_scale, spec.loss)
        return rows @ rows.T, masked_cost(r, valid, limits.f_scale, loss=spec.loss), 0.0

    x, axes = each_or_shared(lanes.data.x)
    p, (width, n) = len(spec.free), lanes.data.y.shape
    size = group_size(n, p)
    operands = (
        lanes.trial.T,
        lanes.start.T,
        lanes.data.y,
        lanes.data.weight,
        *(c for c, a in zip(x, axes, strict=True) if a == 0),
    )

    def cut(k):
        return [lax.dynamic_slice_in_dim(each, k * size, size) for each in operands]

    def group(k, state):
        found, (params, start, y, weight, *own) = state
        rest = iter(own)
        coordinates = tuple(next(rest) if axis == 0 else c for c, axis in zip(x, axes, strict=True))
        parts = jax.vmap(one, in_axes=(0, 0, axes, 0, 0))(params, start, coordinates, y, weight)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=k * size, axis=0)
        # cut for the next group, since slices that are cut where they are used keep the loop from being vectorised
        return jax.tree.map(put, found, parts), cut(k + 1)

    n_groups = jnp.max(jnp.where(lanes.status == RUNNING, jnp.arange(width), -1)) // size + 1
    nothing = jnp.zeros((width, p + 1, p + 1)), jnp.zeros(width), jnp.zeros(width)
    (gram, cost, floored), _ = lax.fori_loop(0, n_groups, group, (nothing, cut(0)))
    return gram.transpose(1, 2, 0), cost, floored


def linearise(spec, limits, lanes, gram, cost, floored) -> Point:
    """The quadratic model at the trial of each lane (see `trust_region`)."""
    p, params, first, before = len(spec.free), lanes.trial, lanes.nfev == 0, lanes.here
    columns = jnp.sqrt(jnp.stack([gram[k, k] for k in range(p)]))
    longest = jnp.where(first, columns, jnp.maximum(columns, before.longest))
    lengths = rules.scale_lengths(jnp, columns, longest)
    scale = 1 / jnp.where(lengths > 0, lengths, 1.0)
    g = gram[:p, p]
    v = dv = jnp.zeros_like(params)
    if spec.bounded:
        to_upper, to_lower = (g < 0) & jnp.isfinite(lanes.upper), (g > 0) & jnp.isfinite(lanes.lower)
        v = jnp.where(to_upper, lanes.upper - params, jnp.where(to_lower, params - lanes.lower, 1.0))
        dv = jnp.where(to_upper, -1.0, jnp.where(to_lower, 1.0, 0.0))
        d = jnp.sqrt(jnp.where(dv != 0, v / scale, 1.0)) * scale
    else:
        d, v = scale, jnp.ones_like(params)
    diagonal = g * dv * scale
    d = jnp.where(rules.held(jnp, params, v, diagonal), 0.0, d)
    gradient = d * g
    hessian = gram[:p, :p] * d[:, None] * d
    hessian = jnp.stack([jnp.stack([hessian[i, j] + (diagonal[i] if i == j else 0.0) for j in range(p)]) for i in range(p)])
    inverted, regular = inverse(hessian)
    newton = -_times(inverted, gradient)
    newton_slope = -_dot(newton, _times(inverted, newton)) / _norm(newton)
    decrement = -0.5 * _dot(gradient, newton)
    optimality = jnp.max(jnp.abs(g * v), axis=0)
    if not spec.bounded:  # MINPACK's test, a cosine, as in `curve_fit`
        lengths = columns * jnp.sqrt(2 * cost)
        optimality = jnp.max(jnp.abs(g) / jnp.where(lengths > 0, lengths, 1.0), axis=0)
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(gram), axis=(0, 1))
    dof = lanes.n_points - p
    variance = jnp.ones_like(cost) if spec.absolute_sigma else 2 * cost / dof
    variance = jnp.where(dof > 0, variance, jnp.nan)
    n_full = jnp.where(lanes.full & ~first, before.n_full + 1, 0)
    reach = jnp.where(first, jnp.abs(params), jnp.maximum(jnp.abs(params), before.reach))
    magnitude = rules.magnitude(jnp, lanes.size, reach, columns)
    faded = jnp.sum(rules.undetermined(jnp, columns, longest, params, magnitude), axis=0)
    point = Point(
        params=params,
        gram=gram,
        cost=cost,
        floored=floored,
        finite=finite,
        regular=regular,
        n_faded=jnp.where(cost > ROUNDING**2 * magnitude, faded, 0),
        longest=longest,
        reach=reach,
        d=d,
        gradient=gradient,
        hessian=hessian,
        newton=newton,
        newton_slope=newton_slope,
        decrement=decrement,
        floor=rules.rounding_floor(magnitude, params, columns, lanes.n_points),
        distance=jnp.zeros_like(cost),
        n_full=n_full,
        optimality=optimality,
    )
    kappa = rules.contraction(jnp, before, point, n_full > 0, n_full > 1)
    return point._replace(distance=rules.distance(jnp, decrement, variance, kappa, point.floor))


def _reined_in(here: Point, radius) -> Point:
    """The point in a hat space in which no step within the radius is far longer than its parameter has been."""
    d = rules.reined_in(jnp, here.d, here.reach, radius)
    share = jnp.where(here.d > 0, d / jnp.where(here.d > 0, here.d, 1.0), 1.0)
    newton = here.newton / share
    # the derivative of the length of the step by the parameter is that of the other space, a first guess for the iteration
    return here._replace(d=d, gradient=share * here.gradient, hessian=share[:, None] * here.hessian * share, newton=newton)


def _solve_subproblem(here: Point, radius, alpha):
    """Minimiser in the ball and the Levenberg-Marquardt parameter that belongs to it, by Moré's iteration."""
    newton_length = _norm(here.newton)
    inside = newton_length <= radius
    eye = jnp.eye(len(here.d))[..., None]

    def step_and_slope(alpha):
        inverted, _ = inverse(here.hessian + alpha * eye)
        step = -_times(inverted, here.gradient)
        length = _norm(step)
        return step, length, -_dot(step, _times(inverted, step)) / length

    lower = -(newton_length - radius) / here.newton_slope
    upper = _norm(here.gradient) / radius

    def inner_guess(lower, upper):
        return jnp.maximum(0.001 * upper, jnp.sqrt(lower * upper))

    def unfinished(state):
        return (state[0] < MORE_ITERATIONS) & ~jnp.all(state[-1])

    def refine(state):
        count, *before, done = state
        alpha, lower, upper, _ = before
        alpha = jnp.where((alpha < lower) | (alpha > upper), inner_guess(lower, upper), alpha)
        found, length, slope = step_and_slope(alpha)
        phi = length - radius
        upper = jnp.where(phi < 0, alpha, upper)
        lower = jnp.maximum(lower, alpha - phi / slope)
        near = (jnp.abs(phi) < MORE_RTOL * radius) | ~jnp.isfinite(phi)
        following = jnp.where(near, alpha, alpha - length / radius * phi / slope)
        after = following, lower, upper, found * (radius / length)  # on the sphere exactly, so that it never leaves it
        # a lane that is done stays as it is, however many turns the others take
        return count + 1, *(jnp.where(done, old, new) for old, new in zip(before, after, strict=True)), done | near

    start = jnp.where(alpha > 0, alpha, inner_guess(lower, upper))
    state = (0, start, lower, upper, here.newton, inside | ~jnp.isfinite(here.newton_slope))
    _, alpha, _, _, step, _ = lax.while_loop(unfinished, refine, state)
    return jnp.where(inside, here.newton, step), jnp.where(inside, 0.0, alpha), inside


def _select_step(spec, here: Point, step_h, radius, lower, upper):
    """The best of: the step up to the bound, its reflection there, the scaled gradient; in hat space.

    With the reduction that the model predicts, and whether no bound has cut the step.
    """

    def bend(a, b):
        return _dot(a, _times(here.hessian, b))

    def reduction(step_h):
        return -(0.5 * bend(step_h, step_h) + _dot(here.gradient, step_h))

    def along(origin, direction, low, high):
        """t in [low, high] with the least of the quadratic on ``origin + t direction``."""
        a, b = bend(direction, direction), bend(origin, direction) + _dot(here.gradient, direction)
        t = -b / jnp.where(a > 0, a, 1.0)
        at_low, at_high = (0.5 * a * end**2 + b * end for end in (low, high))
        return jnp.where((a > 0) & (low < t) & (t < high), t, jnp.where(at_low <= at_high, low, high))

    if not spec.bounded:
        return step_h, reduction(step_h), jnp.ones_like(here.cost, bool)
    params, d = here.params, here.d
    nearness = jnp.where(jnp.isfinite(here.distance), here.distance, here.optimality)
    theta = jnp.maximum(0.995, 1 - nearness)
    step = d * step_h
    whole = jnp.all((params + step >= lower) & (params + step <= upper), axis=0)

    stride, hits = _to_bound(params, step, lower, upper)
    reflected_h = jnp.where(hits, -step_h, step_h)
    shorter_h = step_h * stride  # up to the bound
    to_sphere = _to_sphere(shorter_h, reflected_h, radius)
    beyond, _ = _to_bound(params + step * stride, d * reflected_h, lower, upper)
    reflection = jnp.minimum(beyond, to_sphere)
    shortest = (1 - theta) * stride / jnp.where(reflection > 0, reflection, 1.0)
    longest = jnp.where(reflection == beyond, theta * beyond, to_sphere)
    turned_h = shorter_h + along(shorter_h, reflected_h, shortest, longest) * reflected_h
    turns = (reflection > 0) & (shortest <= longest)

    down_h = -here.gradient
    to_edge = radius / _norm(down_h)
    free, _ = _to_bound(params, d * down_h, lower, upper)
    t = along(jnp.zeros_like(down_h), down_h, jnp.zeros_like(free), jnp.where(theta * free < to_edge, theta * free, to_edge))
    candidates = [theta * shorter_h, turned_h, t * down_h]
    values = [reduction(each) for each in candidates]
    values[1] = jnp.where(turns, values[1], -jnp.inf)
    best, value = candidates[0], values[0]
    for other, its in zip(candidates[1:], values[1:], strict=True):
        best, value = jnp.where(its > value, other, best), jnp.where(its > value, its, value)
    return jnp.where(whole, step_h, best), jnp.where(whole, reduction(step_h), value), whole


def _to_bound(params, step, lower, upper):
    """Largest t with ``params + t step`` inside, and which parameters then hit a bound."""
    strides = jnp.maximum((lower - params) / step, (upper - params) / step)
    strides = jnp.where(step == 0, jnp.inf, strides)
    stride = jnp.min(strides, axis=0)
    return stride, strides == stride


def _to_sphere(start, direction, radius):
    """t > 0 at which ``start + t direction`` leaves the ball."""
    a, b, c = _dot(direction, direction), _dot(start, direction), _dot(start, start) - radius**2
    root = jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))
    q = -(b + jnp.copysign(root, b))  # without cancellation
    return jnp.maximum(q / a, jnp.where(q != 0, c / q, 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# small matrices, (p, p, lanes)


def _dot(a, b):
    return jnp.sum(a * b, axis=0)


def _norm(a):
    return jnp.sqrt(_dot(a, a))


def _times(matrix, vector):
    return jnp.sum(matrix * vector, axis=1)


def inverse(matrix):
    """Inverse of symmetric matrices, and whether the rank is full, by Gauss and Jordan's elimination in place.

    Without pivoting, which positive definite matrices do not need. A pivot that is rounding against its diagonal element is
    kept at that size, so that no gradient is lost; one whose element is zero leaves its row and column zero.
    """
    p = len(matrix)
    diagonal, place = jnp.stack([matrix[k, k] for k in range(p)]), jnp.arange(p)[:, None]
    least = PIVOT * diagonal

    def eliminate(k, state):
        matrix, regular = state
        row, column = matrix[k], matrix[:, k]
        some = diagonal[k] > 0
        pivot = jnp.where(some, jnp.maximum(row[k], least[k]), 1.0)
        row = jnp.where(some, jnp.where(place == k, 1.0, row) / pivot, 0.0)
        column = jnp.where(place == k, -1.0, column)
        rest = jnp.where((place == k) | (place[:, None] == k), 0.0, matrix)
        return rest - column[:, None] * row, regular & some & (matrix[k, k] > least[k])

    # a loop, since each element of the next matrix needs several of this one: fused they would be computed over and over
    return lax.fori_loop(0, p, eliminate, (matrix, jnp.ones(matrix.shape[-1], bool)))
