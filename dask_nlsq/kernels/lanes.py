"""A step of many bounded trust-region fits at once, one in each *lane*.

The points, candidate `steps` and `rules` are those of `trust_region`, on the gram matrix of each pixel's own rows
``[J r]``; bounds count at any distance, since checking it would cost as much as it saves. Arrays end in the axis of the
lanes, ``params`` is (p, lanes), so that each operation on small matrices is one on vectors. The subproblem is solved by
elimination, which vectorises, instead of the SVD: where the data do not determine a direction its pivot is rounding, and
is kept at the size of it.
"""

from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..model.function import Model, evaluate, evaluate_jac
from ..model.losses import masked_cost
from . import rules
from .blocks import JacMode, Layouts, Reduction, assemble_x
from .kind import CPU, Kind
from .rows import poisson_rows, robust_rows, with_columns
from .rules import EPS, RUNNING, Course, length
from .steps import HatSpace, Point, Scheme, Seen, Step, best_step, dot, more, point_at, reined_in

FEWEST_LANES, FEWEST_TOGETHER = 16, 4  # pixels that are fitted together, and evaluated together
STEEP = -float(np.finfo(np.float64).max)
PIVOT = 2**8 * EPS  # of the diagonal element: rounding of a gram matrix of some 1000 points, as measured


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
    NOT_FITTED_YET = 13  # in a store whose blocks are not all done


def succeeded(status):
    """Where a fit has converged to parameters that the data determine, by its `MapStatus`."""
    return (status >= MapStatus.GTOL) & (status <= MapStatus.AT_BOUND)


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
    tile: int | None = None  # points of a long spectrum that are evaluated at once; None: all of them
    kind: Kind = CPU  # of the device


class LaneModel(NamedTuple):
    """What a sweep says of J in each lane."""

    gram: Any  # (p + 1, p + 1, lanes)
    regular: Any  # the gram matrix has not lost the digits of any direction
    newton_slope: Any  # derivative of the length of the Newton step by the Levenberg-Marquardt parameter


class Data(NamedTuple):
    """Of the pixels of a block, or of those in the lanes."""

    y: Any  # (pixels, n)
    weight: Any  # (pixels, n): 1 / sigma, 0 for points that do not count
    x: tuple[Any, ...]  # (pixels or 1, n) each
    n_points: Any  # (pixels,)
    size: Any  # (pixels,): sum w y^2
    start: Any  # (pixels or 1, all parameters), in the lanes (all parameters, lanes)
    lower: Any  # (pixels or 1, p), in the lanes (p, lanes)
    upper: Any


class Lanes(NamedTuple):
    """Pixels that are being fitted; all fields but the data end in the axis of the lanes."""

    data: Any  # Data, while they are fitted
    pixel: Any
    trial: Any  # (p, lanes)
    course: Any  # Course
    status: Any


def n_lanes(n: int, kind: Kind = CPU) -> int:
    """Lanes for spectra of ``n`` points, a power of two."""
    return 2 ** int(np.log2(min(kind.most_lanes, max(FEWEST_LANES, kind.lane_points // n))))


def lanes_of(spec: MapSpec, y) -> int:
    """Lanes for y (pixels, n): as many for any block, since bits depend on it; for long spectra as few as there are."""
    most = n_lanes(y.shape[1], spec.kind)
    return most if spec.tile is None else min(most, 2 ** (len(y) - 1).bit_length())


def group_size(n: int, n_params: int, kind: Kind = CPU) -> int:
    """Lanes whose rows [J r], of ``n`` points each, fit in the cache: a power of two."""
    fitting = kind.group_bytes // (8 * (n_params + 1) * n)
    return 2 ** int(np.log2(min(n_lanes(n, kind), max(FEWEST_TOGETHER, fitting))))


def each_or_shared(x):
    """Coordinates and their axes for `jax.vmap` over the lanes, which may share them."""
    return tuple(c if len(c) > 1 else c[0] for c in x), tuple(0 if len(c) > 1 else None for c in x)


def as_x(spec, coordinates):
    return assemble_x(spec.layouts, list(coordinates))


def iterate(model, spec, limits: Limits, lanes: Lanes) -> Lanes:
    """Evaluate the trial of each lane, accept or refuse it, and propose the next one."""
    running, before = lanes.status == RUNNING, lanes.course
    there = linearise(spec, lanes, *normal_equations(model, spec, limits, lanes))
    course = rules.follow(jnp, before, there._replace(finite=there.finite & running), limits, _choose)
    here, still = course.here, jnp.all(rules.same(jnp, lanes.trial, before.here.params), axis=0)
    hopeless = course.hopeless | (still & ~course.verdict.accepted)
    course = course._replace(nfev=before.nfev + running, hopeless=hopeless)
    arrived = rules.converged(jnp, here, limits.accuracy) | ~here.model.regular & (here.floored == 0)
    status = rules.finished(jnp, course, arrived, limits.max_nfev)
    status = jnp.where(here.finite, status, int(MapStatus.NON_FINITE))
    step, alpha = _propose(course, _bounds(spec, lanes.data))
    trial = here.params + step.step
    if spec.bounded:
        trial = rules.off_the_bounds(jnp, trial, lanes.data.lower, lanes.data.upper, 0.0)
    course = course._replace(step=step, alpha=alpha)
    return lanes._replace(course=course, trial=trial, status=jnp.where(running, status, lanes.status))


def _choose(accepted, there: Point, here: Point) -> Point:
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), there, here)


def _bounds(spec, data: Data):
    return (data.lower, data.upper) if spec.bounded else None


def _propose(course: Course, bounds) -> tuple[Step, Any]:
    """The next step of each lane, and its Levenberg-Marquardt parameter."""
    radius, here = course.radius, reined_in(jnp, course.here, course.radius)
    hessian, gradient = _hessian(here.model.gram, here.hat), here.hat.gradient
    eye = jnp.eye(len(hessian))[..., None]

    def step_at(alpha):
        return _newton(hessian + alpha * eye, gradient)[:3]

    # of a space that has been reined in the slope is not known; a very steep one says nothing of the parameter
    reined = jnp.any(here.hat.d != course.here.hat.d, axis=0)
    slope, inside = jnp.where(reined, STEEP, here.model.newton_slope), length(jnp, here.newton) <= radius
    bounded, alpha, _ = more(step_at, here.newton, slope, length(jnp, gradient), radius, course.alpha)
    bounded = bounded * (radius / length(jnp, bounded))  # on the sphere exactly, so that it never leaves it
    step_h = jnp.where(inside, here.newton, bounded)
    step = best_step(jnp, here, lambda a, b: dot(a, _times(hessian, b)), step_h, radius, bounds)
    return step._replace(full=inside & step.full), jnp.where(inside, 0.0, alpha)


def normal_equations(model, spec, limits, lanes, reduction: Reduction = "gram"):
    """Gram matrices (p + 1, p + 1, lanes) of [J r], or triangular factors of it; costs; counts where the mean is floored."""
    m, by_gram = len(spec.free) + 1, reduction == "gram"

    def condensed(rows, above=None):
        """Of rows (p + 1, n), and of those that have been condensed before."""
        if by_gram:
            return rows @ rows.T if above is None else above + rows @ rows.T
        return jnp.linalg.qr(rows.T if above is None else jnp.concatenate([above, rows.T]), mode="r")

    def one(params, start, coordinates, y, weight):
        n, tile = len(y), spec.tile
        if tile is None or n <= tile:
            return tile_of(params, start, coordinates, y, weight)

        def add(k, sums):
            first = jnp.minimum(k * tile, n - tile)  # the last one begins early, and leaves out what has been counted
            part = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=tile)
            fresh = first + jnp.arange(tile) >= k * tile
            x = tuple(part(c) if len(c) > 1 else c for c in coordinates)
            matrix, *others = tile_of(params, start, x, part(y), jnp.where(fresh, part(weight), 0.0), sums[0])
            return matrix, *map(jnp.add, sums[1:], others)

        return lax.fori_loop(0, -(-n // tile), add, (jnp.zeros((m, m)), jnp.zeros(()), jnp.zeros(())))

    def tile_of(params, start, coordinates, y, weight, above=None):
        valid = weight > 0

        def every(params):
            found = [start[k] for k in range(len(start))]
            for place, value in zip(spec.free, params, strict=True):
                found[place] = value
            return found

        def residual(params):
            value = jnp.broadcast_to(evaluate(model, as_x(spec, coordinates), every(params)), y.shape)
            return jnp.where(valid, (value - y) * weight, 0.0)

        if model.jac is None:
            r, J = with_columns(residual, params, spec.jac_mode)
        else:
            columns = evaluate_jac(model, as_x(spec, coordinates), every(params))
            r, J = residual(params), jnp.where(valid, columns[:, jnp.array(spec.free)].T * weight, 0.0)
        if spec.loss == "poisson":
            rows, cost, floored = poisson_rows(r, J, jnp.where(valid, y, 1.0))
            return condensed(rows, above), cost, floored
        rows = robust_rows(r, J, limits.f_scale, spec.loss)
        return condensed(rows, above), masked_cost(r, valid, limits.f_scale, loss=spec.loss), 0.0

    data, p, (width, n) = lanes.data, len(spec.free), lanes.data.y.shape
    x, axes = each_or_shared(data.x)
    size = min(width, group_size(n if spec.tile is None else min(n, spec.tile), p, spec.kind))
    operands = (
        lanes.trial.T,
        data.start.T,
        data.y,
        data.weight,
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


def own_rows(array, which):
    """Those of some pixels, (which, m), of what each has, or all share."""
    return array[which] if len(array) > 1 else jnp.broadcast_to(array, (len(which), *array.shape[1:]))


def equations_of(model, spec, limits, data: Data, params, which, reduction: Reduction = "gram"):
    """`normal_equations` of the pixels ``which`` at ``params`` (pixels, all parameters)."""
    x = tuple(c[which] if len(c) > 1 else c for c in data.x)
    start = params[which].T
    own = data._replace(y=data.y[which], weight=data.weight[which], x=x, start=start)
    lanes = Lanes(own, which, start[jnp.array(spec.free)], None, jnp.full(len(which), RUNNING))
    return normal_equations(model, spec, limits, lanes, reduction)


def linearise(spec, lanes: Lanes, gram, cost, floored) -> Point:
    """The quadratic model at the trial of each lane."""
    p, data = len(spec.free), lanes.data
    finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(gram), axis=(0, 1))
    seen = Seen(
        lanes.trial, cost, gram[:p, p], jnp.sqrt(diagonal(gram)[:p]), 2 * cost, data.n_points, data.size, floored, finite
    )
    scheme = Scheme(_bounds(spec, data), gtol_relative=not spec.bounded, noise_known=spec.absolute_sigma)  # as `curve_fit`

    def solve_newton(hat):
        newton, _, slope, regular = _newton(_hessian(gram, hat), hat.gradient)
        return newton, -0.5 * dot(hat.gradient, newton), LaneModel(gram, regular, slope)

    return point_at(jnp, seen, lanes.course.here, lanes.course.step.full, scheme, solve_newton)


def _hessian(gram, hat: HatSpace):
    """J_h^T J_h + C, (p, p, lanes)."""
    p = len(hat.d)
    return gram[:p, :p] * hat.d[:, None] * hat.d + jnp.eye(p)[..., None] * hat.diagonal


def _newton(hessian, gradient):
    """The step to the minimum, its length, the derivative of that by the Levenberg-Marquardt parameter; if regular."""
    inverted, regular = inverse(hessian)
    step = -_times(inverted, gradient)
    its_length = length(jnp, step)
    return step, its_length, -dot(step, _times(inverted, step)) / its_length, regular


# ---------------------------------------------------------------------------------------------------------------------
# small matrices, (p, p, lanes)


def diagonal(matrix):
    """(p, lanes)."""
    return jnp.stack([matrix[k, k] for k in range(len(matrix))])


def _times(matrix, vector):
    return jnp.sum(matrix * vector, axis=1)


def inverse(matrix):
    """Inverse of symmetric matrices, and whether the rank is full, by Gauss and Jordan's elimination in place.

    Without pivoting, which positive definite matrices do not need. A pivot that is rounding against its diagonal element is
    kept at that size, so that no gradient is lost; one whose element is zero leaves its row and column zero.
    """
    p = len(matrix)
    elements, place = diagonal(matrix), jnp.arange(p)[:, None]
    least = PIVOT * elements

    def eliminate(k, state):
        matrix, regular = state
        row, column = matrix[k], matrix[:, k]
        some = elements[k] > 0
        pivot = jnp.where(some, jnp.maximum(row[k], least[k]), 1.0)
        row = jnp.where(some, jnp.where(place == k, 1.0, row) / pivot, 0.0)
        column = jnp.where(place == k, -1.0, column)
        rest = jnp.where((place == k) | (place[:, None] == k), 0.0, matrix)
        return rest - column[:, None] * row, regular & some & (matrix[k, k] > least[k])

    # a loop, since each element of the next matrix needs several of this one: fused they would be computed over and over
    return lax.fori_loop(0, p, eliminate, (matrix, jnp.ones(matrix.shape[-1], bool)))
