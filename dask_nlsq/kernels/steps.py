"""The state of a fit and its candidate steps: pure functions of arrays for NumPy and JAX, like `rules`.

The method is that of Branch, Coleman and Li [1]_, as in SciPy's ``least_squares(method="trf")``. Around the
current ``params`` the cost is modelled, in "hat" variables ``step = d * step_h``, by

    m(step_h) = g_h^T step_h + 1/2 step_h^T (J_h^T J_h + C) step_h,     J_h = J diag(d),  g_h = d * J^T r,

where ``d = sqrt(v) * scale`` combines the scale of the parameters with the distance ``v`` to the bounds that the gradient
pushes against, and the diagonal ``C = g * dv * scale`` comes from the derivative of that distance. Both shorten steps even
if the optimum is far from all bounds, above all along weakly determined directions. So once little is left to gain, a bound
counts only if it would cut the step to the unbounded minimum to a small part.

The step to the minimum in a ball may leave the bounds. Then the best of three steps is taken: this step up to the bound,
its reflection at the bound, and the gradient step in hat space.

Vectors are (p,), or (p, lanes) of the lanes of a map, for which numbers are arrays (lanes,).

References
----------
.. [1] M. A. Branch, T. F. Coleman, Y. Li, "A Subspace, Interior, and Conjugate Gradient Method for Large-Scale
       Bound-Constrained Minimization Problems", SIAM J. Sci. Comput. 21 (1999) 1-23.
.. [2] J. J. Moré, "The Levenberg-Marquardt Algorithm: Implementation and Theory", LNM 630 (1977) 105-116.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from . import rules

NEAR = 0.1  # of the step to the minimum without bounds: a bound counts that would cut it to less
INTERIOR = 0.995  # of the way to a bound that a step goes at least, as in SciPy
MORE_RTOL = 0.01  # | ||step_h|| - radius | / radius at which Moré's iteration ends ([2]_: any value up to 0.1 serves)
MORE_ITERATIONS = 10  # it needs two or three; SciPy's limit


class HatSpace(NamedTuple):
    """The scaled variables at one point."""

    d: Any  # step = d * step_h; 0 for parameters that do not move: held at a bound, or without effect on the model
    diagonal: Any  # C
    gradient: Any  # g_h = d * g
    v: Any  # distance to the bound that the gradient pushes against, 1 where there is none


class Scheme(NamedTuple):
    """What all points of a fit have in common."""

    bounds: tuple[Any, Any] | None  # lower and upper
    x_scale: Any = "jac"  # of the parameters, where it does not follow the columns of J
    gtol_relative: bool = False  # MINPACK's test, a cosine, instead of the scaled gradient in the units of the data
    noise_known: bool = False  # the variance of the residuals is 1
    near_below: float = 0.0  # predicted share of the cost, below which only bounds count that are near


class Seen(NamedTuple):
    """What a sweep has measured at ``params``."""

    params: Any
    cost: Any
    gradient: Any  # J^T r
    columns: Any  # lengths of the columns of J
    chi_square: Any  # for the variance of the residuals
    n_points: Any
    size: Any  # sum w y^2
    floored: Any  # points with counts below the floor of a Poisson likelihood
    finite: Any
    left: Any = None  # what the cost may be wrong by, besides rounding; None: nothing


class Point(NamedTuple):
    """Where a fit stands, and the model of the cost around it.

    By default nowhere, as before the first sweep: nothing is remembered, and any finite point is better.
    """

    params: Any = np.zeros(1)
    cost: Any = np.inf
    finite: Any = False
    floored: Any = np.inf
    longest: Any = 0.0  # columns of J so far; 0 for those that were always zero
    reach: Any = 0.0  # the largest that each parameter has been, in size
    start: Any = 0.0  # the params of the first point
    start_cost: Any = np.inf
    hat: Any = None  # HatSpace
    newton: Any = None  # step to the minimum of the model, in hat space
    decrement: Any = np.inf
    optimality: Any = np.inf
    dof: Any = 0
    variance: Any = np.nan  # of the residuals, nan without degrees of freedom
    floor: Any = 0.0  # decrement that rounding leaves
    undetermined: Any = False  # parameters that the model does not depend on
    n_faded: Any = 2**31  # how many they are, where that counts
    n_full: Any = 0  # full steps in a row that led here
    contraction: Any = 0.0  # of the distance by two of them
    distance: Any = np.nan  # standard errors to the optimum of the quadratic model
    model: Any = None  # what a sweep says of J
    left: Any = None  # what the cost may be wrong by, besides rounding; None: nothing


class Step(NamedTuple):
    """A step in the parameters and in hat space, and the reduction that the model predicts; none by default."""

    step: Any = np.array([np.inf])
    step_h: Any = np.array([np.inf])
    predicted: Any = -np.inf
    full: Any = False  # to the minimum of the model: neither the radius nor a bound has cut it


def point_at(xp, seen: Seen, before, full, scheme: Scheme, solve_newton: Callable) -> Point:
    """The point that a step from ``before`` led to; ``solve_newton(hat)`` is its Newton step, decrement and ``model``."""
    params, cost, columns = seen.params, seen.cost, seen.columns
    longest = xp.maximum(columns, before.longest)
    reach = xp.maximum(xp.abs(params), before.reach)
    scale = rules.scale(xp, columns, longest) if isinstance(scheme.x_scale, str) else scheme.x_scale
    magnitude = rules.magnitude(xp, seen.size, reach, columns)
    felt = rules.felt(xp, columns, seen.gradient, cost)
    unmoved, unseen = rules.below_noise(xp, felt, cost, seen.n_points, scheme.bounds, magnitude)
    begun = xp.isfinite(before.start_cost)
    start, start_cost = xp.where(begun, before.start, params), xp.where(begun, before.start_cost, cost)
    span = rules.span(xp, params, start, start_cost, longest)
    undetermined = rules.undetermined(xp, felt, longest, span, magnitude) | unseen
    near = _reach_of_bounds(xp, seen, scale, scheme, solve_newton)
    hat = hat_space(xp, params, seen.gradient, scale, scheme.bounds, near, undetermined | unmoved)
    newton, decrement, model = solve_newton(hat)
    dof = seen.n_points - len(params)
    variance = xp.where(dof > 0, 1.0 if scheme.noise_known else seen.chi_square / xp.maximum(dof, 1), xp.nan)
    floor = rules.rounding_floor(magnitude, params, columns, seen.n_points)
    n_full = xp.where(full, before.n_full + 1, 0)
    shorter = xp.sqrt(decrement / xp.where(before.decrement > 0, before.decrement, xp.inf))
    contraction = xp.where(n_full > 1, shorter, 0.0)
    return Point(
        params=params,
        cost=cost,
        finite=seen.finite,
        floored=seen.floored,
        longest=longest,
        reach=reach,
        start=start,
        start_cost=start_cost,
        hat=hat,
        newton=newton,
        decrement=decrement,
        optimality=_optimality(xp, seen, hat, scheme),
        dof=dof,
        variance=variance,
        floor=floor,
        undetermined=undetermined,
        n_faded=xp.where(cost > rules.VISIBLE**2 * magnitude, undetermined.sum(axis=0), 0),  # exact data need none
        n_full=n_full,
        contraction=contraction,
        distance=rules.distance(xp, decrement, variance, contraction, floor),
        model=model,
        left=seen.left,
    )


def _reach_of_bounds(xp, seen: Seen, scale, scheme: Scheme, solve_newton: Callable):
    """As far from a bound a parameter knows of it, (p,)."""
    if scheme.bounds is None or scheme.near_below == 0:  # of lanes, where it would cost as much as it saves
        return xp.inf
    plain = hat_space(xp, seen.params, seen.gradient, scale, None)
    newton, predicted, _ = solve_newton(plain)
    return xp.where(predicted < scheme.near_below * seen.cost, NEAR * xp.abs(plain.d * newton), xp.inf)


def hat_space(xp, params, gradient, scale, bounds, near=np.inf, still: Any = False) -> HatSpace:
    """Variables with distant bounds and parameters of similar scale ([1]_, eq. 2.2).

    Bounds count as far as ``near``. Parameters that are ``still`` do not move.
    """
    lower, upper = bounds or (-xp.inf, xp.inf)
    to_upper, to_lower = (gradient < 0) & xp.isfinite(upper), (gradient > 0) & xp.isfinite(lower)
    pushed = to_upper | to_lower
    v = xp.where(to_upper, upper - params, xp.where(to_lower, params - lower, 1.0))
    counts = pushed & (v <= near)
    diagonal = xp.where(counts, xp.abs(gradient) * scale, 0.0)
    d = xp.sqrt(xp.where(counts, v / scale, 1.0)) * scale
    d = xp.where(rules.held(xp, params, v, diagonal) | still, 0.0, d)
    return HatSpace(d, diagonal, d * gradient, v)


def _optimality(xp, seen, hat, scheme):
    """What ``gtol`` is compared with: the largest element of the scaled gradient."""
    if not scheme.gtol_relative:
        return xp.max(xp.abs(seen.gradient * hat.v), axis=0)
    lengths = seen.columns * xp.sqrt(2 * seen.cost)
    return xp.max(xp.abs(seen.gradient) / xp.where(lengths > 0, lengths, 1.0), axis=0)


def reined_in(xp, here: Point, radius) -> Point:
    """The point in a hat space in which no step within the radius is longer than `MOST_CHANGE` times its parameter has been.

    A parameter whose column is all but zero would have the freedom of many orders of magnitude.
    """
    hat, reach = here.hat, here.reach
    d = xp.minimum(hat.d, xp.where(reach > 0, rules.MOST_CHANGE * reach / radius, xp.inf))
    share = xp.where(hat.d > 0, d / xp.where(hat.d > 0, hat.d, 1.0), 1.0)
    hat = hat._replace(d=d, diagonal=hat.diagonal * share**2, gradient=hat.gradient * share)
    return here._replace(hat=hat, newton=here.newton / share)


# ---------------------------------------------------------------------------------------------------------------------
# the step in the ball


def more(step_at: Callable, newton, newton_slope, gradient_length, radius, alpha):
    """Moré's iteration [2]_ for the Levenberg-Marquardt parameter that gives a step the length of the radius; by JAX.

    ``step_at(alpha)`` is a step, its length, and the derivative of that, which at 0, where the step is ``newton``, is
    ``newton_slope``. ``alpha`` is a first guess, 0 for none. Returns a step whose length is the radius to `MORE_RTOL`, its
    alpha, and the better one with which the iteration would go on.
    """
    newton_length = rules.length(jnp, newton)
    upper = gradient_length / radius
    lower = -(newton_length - radius) / newton_slope

    def inner_guess(lower, upper):
        return jnp.maximum(0.001 * upper, jnp.sqrt(lower * upper))

    def unfinished(state):
        return (state[0] < MORE_ITERATIONS) & ~jnp.all(state[-1])

    def refine(state):
        count, *before, done = state
        _, _, alpha, lower, upper = before
        alpha = jnp.where((alpha < lower) | (alpha > upper), inner_guess(lower, upper), alpha)
        step, length, slope = step_at(alpha)
        phi = length - radius
        upper = jnp.where(phi < 0, alpha, upper)
        lower = jnp.maximum(lower, alpha - phi / slope)
        after = step, alpha, alpha - length / radius * phi / slope, lower, upper
        near = (jnp.abs(phi) < MORE_RTOL * radius) | ~jnp.isfinite(phi)
        # a lane that is done stays as it is, however many turns the others take
        return count + 1, *(jnp.where(done, old, new) for old, new in zip(before, after, strict=True)), done | near

    start = jnp.where(alpha > 0, alpha, inner_guess(lower, upper))
    done = (newton_length <= radius) | ~jnp.isfinite(newton_slope)
    return lax.while_loop(unfinished, refine, (0, newton, start, start, lower, upper, done))[1:4]


# ---------------------------------------------------------------------------------------------------------------------
# the step within the bounds


def best_step(xp, here: Point, bend: Callable, step_h, radius, bounds) -> Step:
    """The best step that the bounds allow: ``step_h`` itself, or where it leaves them one of three.

    ``bend(a, b)`` is a^T (J_h^T J_h + C) b. The step is full where no bound has cut it.
    """
    d, gradient = here.hat.d, here.hat.gradient

    def reduction(step_h):
        return -(0.5 * bend(step_h, step_h) + dot(gradient, step_h))

    def along(origin, direction, low, high):
        slope = bend(origin, direction) + dot(gradient, direction)
        return minimum_along(xp, bend(direction, direction), slope, low, high)

    predicted = reduction(step_h)
    if bounds is None:
        return Step(d * step_h, step_h, predicted, True)
    lower, upper = bounds
    inner, params = interior(xp, here), here.params
    whole = xp.all((params + d * step_h >= lower) & (params + d * step_h <= upper), axis=0)

    stride, hits = to_bound(xp, params, d * step_h, bounds)
    shorter_h, turned_h = stride * step_h, xp.where(hits, -step_h, step_h)
    beyond, _ = to_bound(xp, params + d * shorter_h, d * turned_h, bounds)
    sphere = to_sphere(xp, shorter_h, turned_h, radius)
    room = xp.minimum(beyond, sphere)
    shortest, longest = (1 - inner) * stride / xp.where(room > 0, room, 1.0), xp.minimum(inner * beyond, sphere)
    reflected_h = shorter_h + along(shorter_h, turned_h, shortest, longest) * turned_h

    down_h = -gradient
    most = xp.minimum(inner * to_bound(xp, params, d * down_h, bounds)[0], radius / rules.length(xp, down_h))
    downhill_h = along(xp.zeros_like(down_h), down_h, xp.zeros_like(most), most) * down_h

    best_h, best = inner * shorter_h, reduction(inner * shorter_h)
    for other_h, allowed in ((reflected_h, (room > 0) & (shortest <= longest)), (downhill_h, True)):
        its = reduction(other_h)
        better = allowed & (its > best)
        best_h, best = xp.where(better, other_h, best_h), xp.where(better, its, best)
    best_h, best = xp.where(whole, step_h, best_h), xp.where(whole, predicted, best)
    return Step(d * best_h, best_h, best, whole)


def interior(xp, here: Point):
    """The share of the way to a bound that a step may go: nearly all of it far from the optimum, all of it near."""
    nearness = xp.where(xp.isfinite(here.distance), here.distance, here.optimality)
    return xp.maximum(INTERIOR, 1 - nearness)


def to_bound(xp, params, step, bounds):
    """Largest t with ``params + t step`` inside, and which parameters then hit a bound."""
    lower, upper = bounds
    moving = xp.where(step == 0, 1.0, step)
    strides = xp.maximum((lower - params) / moving, (upper - params) / moving)
    strides = xp.where(step == 0, xp.inf, strides)
    stride = xp.min(strides, axis=0)
    return stride, strides == stride


def to_sphere(xp, start, direction, radius):
    """t > 0 at which ``start + t direction`` leaves the ball."""
    a, b, c = dot(direction, direction), dot(start, direction), dot(start, start) - radius**2
    q = -(b + xp.copysign(xp.sqrt(xp.maximum(b * b - a * c, 0.0)), b))  # without cancellation
    return xp.maximum(q / a, xp.where(q != 0, c / xp.where(q != 0, q, 1.0), 0.0))


def minimum_along(xp, curvature, slope, low, high):
    """t in [low, high] with the least of ``curvature t^2 / 2 + slope t``."""
    t = -slope / xp.where(curvature > 0, curvature, 1.0)
    at_low, at_high = (0.5 * curvature * end**2 + slope * end for end in (low, high))
    return xp.where((curvature > 0) & (low < t) & (t < high), t, xp.where(at_low <= at_high, low, high))


def dot(a, b):
    """Products of vectors (p,), or of those of all lanes."""
    return (a * b).sum(axis=0)
