"""The trust-region reflective loop over sweeps.

It minimises ``cost(params) = 1/2 sum rho(r^2)`` within bounds, and all it knows of the data is ``sweep(params,
reduction)``, which reads them once and returns cost and normal equations together. So a step costs one sweep whether it
is accepted or not, and nothing is read twice. The method is SciPy's ``trf`` [1]_: the subproblem of `trf_jit` in hat
space, the best of the trust-region step, its reflection at the first bound, and the scaled gradient as candidates,
radius and termination as there.

Four things are added. **The gate:** SciPy's tests propose to stop, and the loop stops where the optimum of the quadratic
model is near in standard errors as well; see `rules`. A fit that can go no further although it is far has the status
`STUCK`, one with a parameter that the model does not depend on `UNDETERMINED`. **Free steps:** the term that hat space adds
to J^T J for the bounds shortens steps even where the optimum is far from all of them, and along weakly determined directions
most. So near the optimum, where a Gauss-Newton step without it stays within the trust region and well within the bounds, and
little is left to gain, that one is taken. **Reduction:** where the condition of ``R`` says that the gram matrix has lost
digits, the next sweep uses QR. **The last digits:** once the predicted reduction is below the rounding of the cost, the
actual one is noise, and SciPy's loop refuses good steps. The gradient is still accurate then, so a step is judged by it: it
is accepted if it lowers the decrement.

References
----------
.. [1] SciPy, ``scipy.optimize.least_squares(method="trf")``, after Branch, Coleman and Li (see `trf_jit`).
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.linalg import norm

from ..base.x64 import float64
from ..engine.checkpoint import Interrupted
from ..engine.condensed import Condensed, Factor, Read, factor
from ..kernels import rules
from ..kernels.blocks import Reduction
from ..kernels.rules import GTOL, OFF_BOUND, ROUNDING, SLIGHT, STALLS, STUCK, TO_ROUNDING, UNDETERMINED
from .subproblem import HatSpace, hat_space, newton, solve_cg, solve_svd, spectrum

CG_ABOVE = 500  # parameters: beyond, an SVD of (2p, p) in each step is slower than conjugate gradients
GRAM_CONDITION_LIMIT = 1e4  # eps * 1e4^2 = 2e-8: the digits of the covariance that the gram matrix then costs
WITHIN = 0.999  # of the radius: the step is the unconstrained one

MESSAGES = {
    -3: "Stopped by a signal, at the best point so far; finished sweeps are kept in the checkpoint, for `resume`.",
    -2: "Stopped by `callback`.",
    0: "The maximum number of function evaluations is exceeded.",
    1: "`gtol` termination condition is satisfied: scaled gradient {optimality:.2e} < {gtol:.2e}.",
    2: "`ftol` termination condition is satisfied: relative reduction {relative:.2e} < {ftol:.2e}.",
    3: "`xtol` termination condition is satisfied: relative step {step:.2e} < {xtol:.2e}.",
    4: "Both `ftol` and `xtol` termination conditions are satisfied: relative reduction {relative:.2e} < {ftol:.2e}, "
    "relative step {step:.2e} < {xtol:.2e}.",
    5: "Converged to rounding: no step lowers the gradient further, and the predicted relative reduction {relative:.2e} "
    "is below the rounding of the cost, {rounding:.2e}.",
    STUCK: "{ended}, but {far}.",
    UNDETERMINED: "The model does not depend on {undetermined} at the point where the fit ended.",
}


class Record(NamedTuple):
    """One trial step; what ``callback`` receives and ``FitResult.history`` lists. The first has no step."""

    iteration: int
    nfev: int
    cost: float
    actual: float  # reduction of the cost by the step; nan at the start
    predicted: float  # by the quadratic model
    step_norm: float
    radius: float
    optimality: float  # norm of the scaled gradient at the point where the loop now stands
    accepted: bool
    params: np.ndarray  # where the loop now stands, (p,)
    seconds: float  # since the start
    reduction: Reduction  # at the point where the loop now stands
    read: Read | None = None  # what the trial step has read, where the data are not held
    distance: float = np.nan  # standard errors to the optimum of the quadratic model, from where the loop now stands

    def __repr__(self):
        verdict = "accepted" if self.accepted else "refused"
        return (
            f"<Record {self.nfev}: {verdict}, cost {self.cost:.8g}, predicted {self.predicted:.3g}, "
            f"step {self.step_norm:.3g}, distance {self.distance:.2g} s.e., {self.seconds:.2f} s>"
        )


@dataclass(frozen=True)
class Options:
    """Limits and choices of the loop, all as in `scipy.optimize.least_squares`."""

    lower: np.ndarray
    upper: np.ndarray
    x_scale: np.ndarray | Literal["jac"] = "jac"
    ftol: float = 1e-8
    xtol: float = 1e-8
    gtol: float = 1e-8
    gtol_relative: bool = False  # MINPACK's test, a cosine, in place of the scaled gradient in the units of the data
    max_nfev: int | None = None  # 100 p
    reduction: Literal["gram", "qr", "auto"] = "auto"
    tr_solver: Literal["exact", "cg"] | None = None  # by the number of parameters
    callback: Callable[[Record], None] | None = None
    free_below: float = 0.1  # predicted share of the cost from which free steps are taken; from farther off they go astray
    accuracy: float = np.inf  # standard errors from the optimum at which a fit has converged; inf: SciPy's tests alone
    noise: Literal["known", "cost", "pearson"] = "cost"  # what the variance of the residuals is taken from
    names: tuple[str, ...] = ()  # of the parameters, for messages

    @property
    def solver(self) -> Literal["exact", "cg"]:
        return self.tr_solver or ("exact" if len(self.lower) <= CG_ABOVE else "cg")


class Solution(NamedTuple):
    params: np.ndarray
    equations: Condensed
    factor: Factor
    status: int
    message: str
    nfev: int
    optimality: float
    history: list[Record]
    distance: float  # standard errors to the optimum of the quadratic model, nan without degrees of freedom


class NotFiniteAtStart(ValueError):
    """Cost or derivatives are not finite at the start point."""


class Point(NamedTuple):
    """Where the loop stands, and the model of the cost around it."""

    params: np.ndarray
    equations: Condensed
    factor: Factor
    longest: np.ndarray  # columns of J so far, (p,); 0 for those that were always zero
    reach: np.ndarray  # the largest that each parameter has been, in size, (p,)
    hat: HatSpace
    newton: np.ndarray  # step to the minimum of the model, (p,)
    decrement: float
    optimality: float
    variance: float  # of the residuals, nan without degrees of freedom
    dof: float
    floor: float  # decrement that rounding leaves
    distance: float
    floored: int = 0  # points with counts below the floor of a Poisson likelihood
    n_faded: int = 0  # parameters that the model no longer depends on
    n_full: int = 0  # full steps in a row that led here
    contraction: float = 0.0  # of the distance by two of them

    @property
    def cost(self) -> float:
        return self.equations.cost

    @property
    def finite(self) -> bool:
        return self.equations.finite


class Step(NamedTuple):
    """A candidate: step in the parameters, in hat space, and the reduction that the model predicts."""

    step: np.ndarray
    step_h: np.ndarray
    predicted: float
    full: bool = False  # to the minimum of the model: neither the radius nor a bound has cut it


def solve(sweep: Callable[[np.ndarray, Reduction], Condensed], p0: np.ndarray, options: Options) -> Solution:
    """Minimise from ``p0`` (p,), strictly within the bounds of ``options``.

    Raises
    ------
    NotFiniteAtStart
        Where the first sweep gives no finite cost and normal equations.
    """
    started = time.perf_counter()
    lower, upper = options.lower, options.upper
    max_nfev = options.max_nfev or 100 * len(p0)
    params = rules.off_the_bounds(np, np.asarray(p0, dtype=np.float64), lower, upper, OFF_BOUND)
    equations = sweep(params, "qr" if options.reduction == "qr" else "gram")
    nfev, iteration, status, alpha, stalls = 1, 0, None, 0.0, 0
    if not equations.finite:
        raise NotFiniteAtStart("the cost or its derivatives are not finite at the start point")
    here = linearise(params, equations, None, options)
    moved = float(norm(np.where(here.longest > 0, params / here.hat.d, 0.0)))
    radius = float(rules.first_radius(np, moved, norm(here.newton / here.hat.d), here.cost))
    relative: float = np.inf
    step_norm: float = np.inf
    proposed, tests_passed, hopeless, hopeless_at_once = 0, False, False, False  # of the last step
    history = [_record(iteration, nfev, here, np.nan, np.nan, np.nan, radius, True, started, equations.read)]

    while True:
        if here.optimality < options.gtol or here.optimality == 0:
            proposed = GTOL
        tests_passed = proposed > 0 or (tests_passed and relative < SLIGHT)
        if proposed or hopeless:
            if _arrived(here, options) and _wants_qr(here, options):
                try:
                    here = _by_qr(here, sweep, options)
                except Interrupted:
                    status = -3
                    break
            if _arrived(here, options):
                status = proposed or TO_ROUNDING
            elif hopeless:
                status = STUCK
        if status is None and nfev >= max_nfev:
            status = STUCK if tests_passed else 0
        if options.callback is not None and not hopeless_at_once and _stopped(options.callback, history[-1]):
            status = -2 if status is None else status
        if status is not None:
            break

        candidate, alpha = _propose(here, radius, alpha, options)
        trial = rules.off_the_bounds(np, here.params + candidate.step, lower, upper, 0.0)
        hopeless = hopeless_at_once = bool(np.all(rules.same(np, trial, here.params)))
        if hopeless_at_once:  # no sweep, and no record that would tell of it
            continue
        try:
            equations = sweep(trial, _next_reduction(here, options))
        except Interrupted:
            status = -3
            break
        nfev += 1
        iteration += 1
        step_norm, step_h_norm = float(norm(candidate.step)), float(norm(candidate.step_h))

        there = linearise(trial, equations, here, options, candidate.full) if equations.finite else _nowhere(here, equations)
        verdict = rules.judge(np, here, there, candidate.predicted, stalls)
        accepted, relative, stalls = bool(verdict.accepted), float(verdict.relative), int(verdict.stalls)
        proposed = 0
        if there.finite:
            proposed = int(rules.proposal(np, verdict, step_norm, norm(here.params), options.ftol, options.xtol))
        hopeless = stalls >= STALLS
        new_radius = float(rules.next_radius(np, radius, verdict.ratio, step_h_norm))
        alpha *= radius / new_radius
        radius = new_radius
        step = (here.cost - there.cost if there.finite else np.nan, candidate.predicted, step_norm, radius, accepted)
        here = there if accepted else here._replace(n_full=0)
        history.append(_record(iteration, nfev, here, *step, started, equations.read))

    if _wants_qr(here, options) and status != -3:
        with suppress(Interrupted):  # what the gram matrix says is there
            here = _by_qr(here, sweep, options)
    undetermined = _undetermined(here)
    if status > 0 and (here.floored or undetermined.any()):
        status = STUCK if here.floored else UNDETERMINED
    values: dict[str, Any] = dict(
        optimality=here.optimality, gtol=options.gtol, relative=relative, ftol=options.ftol, xtol=options.xtol
    )
    values |= dict(step=step_norm / (float(norm(here.params)) or 1.0), rounding=ROUNDING)
    exceeded = "SciPy's tests were passed before the maximum number of function evaluations was exceeded"
    values |= dict(ended="No step lowers the cost any more" if hopeless else exceeded)
    names = options.names or [f"parameter {k}" for k in range(len(p0))]
    values |= dict(undetermined=" and ".join(names[k] for k in np.flatnonzero(undetermined)), far=_far(here, options))
    message = MESSAGES[status].format(**values)
    found = here.params, here.equations, here.factor, status, message, nfev, here.optimality, history
    distance = np.nan if here.floored or undetermined.any() else here.distance  # that of the others says nothing
    return Solution(*found, distance)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def linearise(params, equations, before: Point | None, options: Options, full: bool = False) -> Point:
    """The quadratic model at a point that a step from ``before`` led to.

    With x_scale="jac" a scale never grows, as in Moré's (and SciPy's) method, except where a column has become very much
    shorter than it was. A column that is zero is no length scale.
    """
    parts, p = factor(equations), len(params)
    columns = norm(parts.R, axis=0)
    longest = columns if before is None else np.maximum(columns, before.longest)
    if isinstance(options.x_scale, str):
        lengths = rules.scale_lengths(np, columns, longest)
        scale = 1 / np.where(lengths > 0, lengths, 1.0)
    else:
        scale = options.x_scale
    with float64():
        hat = HatSpace(*map(np.asarray, hat_space(params, parts.gradient, options.lower, options.upper, scale)))
    held = rules.held(np, params, hat.v, hat.diagonal)
    stiffness = np.where(held | (hat.diagonal == 0), 0.0, np.abs(parts.gradient) / hat.v)
    step, decrement = _newton(parts, stiffness, options, held)
    optimality = norm(parts.gradient * hat.v, np.inf)
    if options.gtol_relative:
        lengths = columns * np.sqrt(2 * equations.cost)
        optimality = norm(parts.gradient / np.where(lengths > 0, lengths, 1.0), np.inf)
    n_points = equations.n_points
    dof = n_points - p
    variance = np.nan
    if dof > 0:
        known, chi_square = options.noise == "known", equations.pearson if options.noise == "pearson" else 2 * equations.cost
        variance = 1.0 if known else chi_square / dof
    reach = np.abs(params) if before is None else np.maximum(np.abs(params), before.reach)
    magnitude = float(rules.magnitude(np, equations.size, reach, columns))
    floor = float(rules.rounding_floor(magnitude, params, columns, n_points))
    point = Point(
        params, equations, parts, longest, reach, hat, step, decrement, float(optimality), variance, dof, floor, np.nan
    )
    n_full, kappa = 0, 0.0
    if before is not None and full:
        n_full = before.n_full + 1
        kappa = float(rules.contraction(np, before, point, True, n_full > 1))
    if equations.cost > ROUNDING**2 * magnitude:  # exact data without a peak need none
        point = point._replace(n_faded=int(np.sum(_undetermined(point))))
    distance = float(rules.distance(np, decrement, variance, kappa, floor))
    return point._replace(distance=distance, floored=equations.floored, n_full=n_full, contraction=kappa)


def _by_qr(here: Point, sweep, options: Options) -> Point:
    """The same point, by a sweep that loses no digits."""
    equations = sweep(here.params, "qr")
    if not equations.finite:
        return here
    there = linearise(here.params, equations, here, options)
    distance = float(rules.distance(np, there.decrement, there.variance, here.contraction, there.floor))
    return there._replace(distance=distance, n_full=here.n_full, contraction=here.contraction)


def _nowhere(here: Point, equations: Condensed) -> Point:
    """A trial at which cost or derivatives are not finite."""
    return here._replace(equations=equations)


def _newton(parts: Factor, stiffness, options: Options, held):
    """Step to the minimum of the model and the decrement; parameters that a bound has ``held`` (p,) stay where they are."""
    R = np.where(held, 0.0, parts.R)
    if options.solver == "exact":
        return newton(R, parts.projected, stiffness)
    lengths = np.sqrt(np.sum(R**2, axis=0) + stiffness)
    d = 1 / np.where(lengths > 0, lengths, 1.0)
    with float64():
        step = d * np.asarray(solve_cg(R, parts.projected, d, stiffness * d**2, np.inf))
    return step, -0.5 * float(parts.gradient @ step)


def _arrived(here: Point, options: Options) -> bool:
    state = here.distance, here.decrement, here.cost, here.floor, here.dof, here.floored
    return bool(rules.converged(np, *state, options.accuracy))


def _far(here: Point, options: Options) -> str:
    """What speaks against success, in words."""
    if here.floored:
        return f"at {here.floored:,} points with counts the mean of the model is not positive"
    if here.dof <= 0:
        return f"by its quadratic model it could be lower by {here.decrement / (here.cost or 1.0):.2g} of its value"
    return (
        f"the optimum of the quadratic model is {here.distance:.2g} standard errors away, and `accuracy` asks for "
        f"{options.accuracy:.2g}"
    )


def _wants_qr(here: Point, options: Options) -> bool:
    return options.reduction == "auto" and here.equations.reduction == "gram" and _lossy(here)


def _undetermined(here: Point) -> np.ndarray:
    columns = norm(here.factor.R, axis=0)
    magnitude = rules.magnitude(np, here.equations.size, here.reach, columns)
    return rules.undetermined(np, columns, here.longest, here.params, magnitude)


def _lossy(point):
    return point.factor.condition > GRAM_CONDITION_LIMIT


def _next_reduction(here, options) -> Reduction:
    if options.reduction != "auto":
        return options.reduction
    return "qr" if _lossy(here) else "gram"


@np.errstate(over="ignore", invalid="ignore")
def _propose(here: Point, radius: float, alpha: float, options: Options) -> tuple[Step, float]:
    hat, lower, upper = here.hat, options.lower, options.upper
    nearness = here.distance if np.isfinite(here.distance) else here.optimality
    theta = max(0.995, 1 - nearness)  # how far towards a bound a step may go
    if np.any(hat.diagonal):
        free, _ = _newton(here.factor, np.zeros_like(hat.d), options, False)
        step_h = free / rules.reined_in(np, hat.d, here.reach, radius)
        if norm(step_h) < WITHIN * radius and theta * _to_bound(here.params, free, lower, upper)[0] >= 1:
            unbounded = here._replace(hat=hat._replace(diagonal=np.zeros_like(hat.diagonal)))
            step = _select_step(unbounded, free / hat.d, radius, lower, upper, theta)
            if step.predicted < options.free_below * here.cost:
                return step._replace(full=True), 0.0
    d = rules.reined_in(np, hat.d, here.reach, radius)
    hat = hat._replace(d=d, diagonal=hat.diagonal * (d / hat.d) ** 2, gradient=hat.gradient * (d / hat.d))
    here = here._replace(hat=hat)
    step_h = here.newton / hat.d
    if norm(step_h) <= radius:
        step = _select_step(here, step_h, radius, lower, upper, theta)
        return step._replace(full=step.step_h is step_h), 0.0
    parts = here.factor
    with float64():
        if options.solver == "cg":
            step_h = solve_cg(parts.R, parts.projected, hat.d, hat.diagonal, radius)
        else:
            step_h, alpha = solve_svd(spectrum(parts.R, parts.projected, hat.d, hat.diagonal), radius, alpha)
    return _select_step(here, np.asarray(step_h), radius, lower, upper, theta), float(alpha)


def _select_step(here: Point, step_h, radius, lower, upper, theta) -> Step:
    """The best of: the trust-region step up to the bound, its reflection there, the scaled gradient ([1]_)."""
    params, d, g_h = here.params, here.hat.d, here.hat.gradient
    R_h = here.factor.R * d

    def quadratic(step_h):
        return 0.5 * (norm(R_h @ step_h) ** 2 + here.hat.diagonal @ step_h**2) + g_h @ step_h

    step = d * step_h
    if np.all((params + step >= lower) & (params + step <= upper)):
        return Step(step, step_h, -quadratic(step_h))

    stride, hits = _to_bound(params, step, lower, upper)
    reflected_h = np.where(hits, -step_h, step_h)
    step, step_h = step * stride, step_h * stride  # up to the bound
    on_bound = params + step
    to_sphere = _to_sphere(step_h, reflected_h, radius)
    beyond, _ = _to_bound(on_bound, d * reflected_h, lower, upper)
    reflection = min(beyond, to_sphere)
    candidates = [Step(theta * step, theta * step_h, -quadratic(theta * step_h))]
    if reflection > 0:
        shortest = (1 - theta) * stride / reflection
        longest = theta * beyond if reflection == beyond else to_sphere
        if shortest <= longest:
            t = _minimum_along(quadratic, step_h, reflected_h, shortest, longest)
            turned = step_h + t * reflected_h
            candidates.append(Step(d * turned, turned, -quadratic(turned)))
    down_h = -g_h
    to_edge = radius / norm(down_h)
    free, _ = _to_bound(params, d * down_h, lower, upper)
    t = _minimum_along(quadratic, np.zeros_like(down_h), down_h, 0.0, theta * free if free < to_edge else to_edge)
    candidates.append(Step(d * t * down_h, t * down_h, -quadratic(t * down_h)))
    return max(candidates, key=lambda each: each.predicted)


def _minimum_along(quadratic, origin, direction, low, high):
    """t in [low, high] that minimises ``quadratic(origin + t direction)``, from its values at three t."""
    at = [low, 0.5 * (low + high), high]
    f = [quadratic(origin + t * direction) for t in at]
    curvature = f[0] - 2 * f[1] + f[2]
    if curvature > 0:
        t = at[1] + 0.25 * (high - low) * (f[0] - f[2]) / curvature
        if low < t < high:
            at.append(t)
            f.append(quadratic(origin + t * direction))
    return at[int(np.argmin(f))]


def _to_bound(params, step, lower, upper):
    """Largest t with ``params + t step`` inside, and which parameters then hit a bound."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        strides = np.maximum((lower - params) / step, (upper - params) / step)
    strides = np.where(step == 0, np.inf, strides)
    stride = strides.min()
    return stride, strides == stride


def _to_sphere(start, direction, radius):
    """t > 0 at which ``start + t direction`` leaves the ball."""
    a, b, c = direction @ direction, start @ direction, start @ start - radius**2
    root = np.sqrt(max(b * b - a * c, 0.0))
    q = -(b + np.copysign(root, b))  # without cancellation
    return max(q / a, c / q if q else 0.0)


def _record(iteration, nfev, here, actual, predicted, step_norm, radius, accepted, started, read) -> Record:
    seconds = time.perf_counter() - started
    cost, kind = here.equations.cost, here.equations.reduction
    actual, predicted, step_norm, radius = map(float, (actual, predicted, step_norm, radius))
    return Record(
        iteration,
        nfev,
        cost,
        actual,
        predicted,
        step_norm,
        radius,
        here.optimality,
        accepted,
        here.params,
        seconds,
        kind,
        read,
        here.distance,
    )


def _stopped(callback, record):
    try:
        callback(record)
    except StopIteration:
        return True
    return False
