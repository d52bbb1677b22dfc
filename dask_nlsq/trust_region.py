"""The trust-region reflective loop over sweeps.

It minimises ``cost(params) = 1/2 sum rho(r^2)`` within bounds, and all it knows of the data is ``sweep(params,
reduction)``, which reads them once and returns cost and normal equations together. So a step costs one sweep whether it
is accepted or not, and nothing is read twice. The method is SciPy's ``trf`` [1]_: the subproblem of `trf_jit` in hat
space, the best of the trust-region step, its reflection at the first bound, and the scaled gradient as candidates,
radius and termination as there.

Three things are added. **Free steps:** the term that hat space adds to J^T J for the bounds shortens steps even where the
optimum is far from all of them, and along weakly determined directions most. So near the optimum, where a Gauss-Newton
step without it stays within the trust region and well within the bounds, and little is left to gain, that one is taken.
**Reduction:** where the condition of ``R`` says that the gram matrix has lost digits, the next sweep uses QR. **The last
digits:** once the predicted reduction is below the rounding of the cost, the actual one is noise, and SciPy's loop
refuses good steps. The gradient is still accurate then, so a step is judged by it:
it is accepted if it lowers the reduction that a Gauss-Newton step from the new point would still predict,

    decrement = 1/2 ||U^T Q^T r||^2 = 1/2 g^T (J^T J)^-1 g,

half the squared distance to the optimum in units of the standard errors (times the residual variance).

References
----------
.. [1] SciPy, ``scipy.optimize.least_squares(method="trf")``, after Branch, Coleman and Li (see `trf_jit`).
.. [2] J. E. Dennis, R. B. Schnabel, "Numerical Methods for Unconstrained Optimization", section 6.4 (radius), 7.2
       (termination).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.linalg import norm

from .reduction import Factor, NormalEquations, Read, Reduction, factor, rank_tolerance
from .trf_jit import EPS, HatSpace, Spectrum, float64, hat_space, solve_cg, solve_svd, spectrum

CG_ABOVE = 500  # parameters: beyond, an SVD of (2p, p) in each step is slower than conjugate gradients
GRAM_CONDITION_LIMIT = 1e4  # eps * 1e4^2 = 2e-8: the digits of the covariance that the gram matrix then costs
ROUNDING = 64 * EPS  # relative; rounding of the cost summed over tiles and blocks, generously
WITHIN = 0.999  # of the radius: the step is the unconstrained one
STALLS = 3  # rejected steps, each a quarter of the one before, after which the gradient counts as rounding too

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

    def __repr__(self):
        verdict = "accepted" if self.accepted else "refused"
        return (
            f"<Record {self.nfev}: {verdict}, cost {self.cost:.8g}, predicted {self.predicted:.3g}, "
            f"step {self.step_norm:.3g}, optimality {self.optimality:.2g}, {self.seconds:.2f} s>"
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

    @property
    def solver(self) -> Literal["exact", "cg"]:
        return self.tr_solver or ("exact" if len(self.lower) <= CG_ABOVE else "cg")


class Solution(NamedTuple):
    params: np.ndarray
    equations: NormalEquations
    factor: Factor
    status: int
    message: str
    nfev: int
    optimality: float
    history: list[Record]


class NotFiniteAtStart(ValueError):
    """Cost or derivatives are not finite at the start point."""


class Interrupted(Exception):
    """A sweep that ends early, since the process has been told to leave."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


class Point(NamedTuple):
    """Where the loop stands, and the model of the cost around it."""

    params: np.ndarray
    equations: NormalEquations
    factor: Factor
    scale: np.ndarray  # of the parameters, (p,)
    hat: HatSpace
    spectral: Spectrum | None  # where the subproblem is solved exactly
    optimality: float
    decrement: float


class Step(NamedTuple):
    """A candidate: step in the parameters, in hat space, and the reduction that the model predicts."""

    step: np.ndarray
    step_h: np.ndarray
    predicted: float


def solve(sweep: Callable[[np.ndarray, Reduction], NormalEquations], p0: np.ndarray, options: Options) -> Solution:
    """Minimise from ``p0`` (p,), strictly within the bounds of ``options``.

    Raises
    ------
    NotFiniteAtStart
        Where the first sweep gives no finite cost and normal equations.
    """
    started = time.perf_counter()
    lower, upper = options.lower, options.upper
    max_nfev = options.max_nfev or 100 * len(p0)
    params = strictly_feasible(np.asarray(p0, dtype=np.float64), lower, upper, rstep=1e-10)
    equations = sweep(params, "qr" if options.reduction == "qr" else "gram")
    nfev, iteration, status, alpha, stalls = 1, 0, None, 0.0, 0
    if not equations.finite:
        raise NotFiniteAtStart("the cost or its derivatives are not finite at the start point")
    here = _stand(params, equations, None, options)
    radius = float(norm(params / here.hat.d)) or 1.0
    relative: float = np.inf
    step_norm: float = np.inf
    history = [_record(iteration, nfev, here, np.nan, np.nan, np.nan, radius, True, started, equations.read)]

    while True:
        if here.optimality < options.gtol or here.optimality == 0:
            status = 1
        if status is None and nfev >= max_nfev:
            status = 0
        if options.callback is not None and _stopped(options.callback, history[-1]) and status is None:
            status = -2
        if status is not None:
            break

        candidate, alpha = _propose(here, radius, alpha, options)
        trial = strictly_feasible(here.params + candidate.step, lower, upper, rstep=0)
        try:
            equations = sweep(trial, _next_reduction(here, options))
        except Interrupted:
            status = -3
            break
        nfev += 1
        iteration += 1
        step_norm, step_h_norm = float(norm(candidate.step)), float(norm(candidate.step_h))

        if not equations.finite:
            radius = 0.25 * step_h_norm
            actual, accepted = np.nan, False
        else:
            there = _stand(trial, equations, here.scale, options)
            actual = here.equations.cost - equations.cost
            by_gradient = 0 <= candidate.predicted < ROUNDING * here.equations.cost
            if by_gradient:
                accepted = there.decrement < here.decrement
                stalls = 0 if accepted else stalls + 1
                ratio, change = (1.0 if accepted else 0.0), candidate.predicted
            else:
                accepted = actual > 0
                ratio, change = _ratio(actual, candidate.predicted), actual
            relative = change / here.equations.cost if here.equations.cost > 0 else 0.0
            # a tolerance below rounding asks for what can be had: then only the gradient decides
            measurable = options.ftol > ROUNDING
            ftol = options.ftol if measurable or not by_gradient else 0.0
            status = _terminated(relative, step_norm, norm(here.params), ratio, ftol, options.xtol)
            if status is None and stalls >= (1 if measurable else STALLS):
                status = 2 if measurable else 5
            new_radius = _update_radius(radius, ratio, step_h_norm)
            alpha *= radius / new_radius
            radius = new_radius
            if accepted:
                here = there
        step = (actual, candidate.predicted, step_norm, radius, accepted)
        history.append(_record(iteration, nfev, here, *step, started, equations.read))

    if options.reduction == "auto" and here.equations.reduction == "gram" and _lossy(here) and status != -3:
        here = _stand(here.params, sweep(here.params, "qr"), here.scale, options)
    values = dict(optimality=here.optimality, gtol=options.gtol, relative=relative, ftol=options.ftol, xtol=options.xtol)
    values |= dict(step=step_norm / (float(norm(here.params)) or 1.0), rounding=ROUNDING)
    message = MESSAGES[status].format(**values)
    return Solution(here.params, here.equations, here.factor, status, message, nfev, here.optimality, history)


def _stand(params, equations, previous_scale, options) -> Point:
    """The quadratic model at a point. With x_scale="jac" a scale never grows, as in Moré's (and SciPy's) method."""
    parts = factor(equations)
    if isinstance(options.x_scale, str):
        columns = norm(parts.R, axis=0)
        if previous_scale is None:
            scale = 1 / np.where(columns > 0, columns, 1.0)
        else:
            scale = 1 / np.maximum(columns, 1 / previous_scale)
    else:
        scale = options.x_scale
    with float64():
        hat = HatSpace(*map(np.asarray, hat_space(params, parts.gradient, options.lower, options.upper, scale)))
        if options.solver == "cg":
            spectral = None
            newton_h = np.asarray(solve_cg(parts.R, parts.projected, hat.d, hat.diagonal, np.inf))
            decrement = -0.5 * float(hat.gradient @ newton_h)
        else:
            spectral = _spectrum(parts, hat)
            kept = spectral.s > rank_tolerance(equations) * spectral.s[0]
            decrement = 0.5 * float(np.sum(spectral.uf[kept] ** 2))
    optimality = norm(parts.gradient * hat.v, np.inf)
    if options.gtol_relative:
        lengths = norm(parts.R, axis=0) * np.sqrt(2 * equations.cost)
        optimality = norm(parts.gradient / np.where(lengths > 0, lengths, 1.0), np.inf)
    return Point(params, equations, parts, scale, hat, spectral, float(optimality), decrement)


def _spectrum(factor, hat):
    with float64():
        return Spectrum(*map(np.asarray, spectrum(factor.R, factor.projected, hat.d, hat.diagonal)))


def _lossy(point):
    return point.factor.condition > GRAM_CONDITION_LIMIT


def _next_reduction(here, options) -> Reduction:
    if options.reduction != "auto":
        return options.reduction
    return "qr" if _lossy(here) else "gram"


def _propose(here: Point, radius: float, alpha: float, options: Options) -> tuple[Step, float]:
    hat, lower, upper = here.hat, options.lower, options.upper
    theta = max(0.995, 1 - here.optimality)  # how far towards a bound a step may go
    if np.any(hat.diagonal):
        unbounded = hat._replace(diagonal=np.zeros_like(hat.diagonal))
        free = here._replace(hat=unbounded, spectral=None if here.spectral is None else _spectrum(here.factor, unbounded))
        step_h, _ = _subproblem(free, radius, 0.0, options)
        if norm(step_h) < WITHIN * radius and theta * _to_bound(here.params, hat.d * step_h, lower, upper)[0] >= 1:
            step = _select_step(free, step_h, radius, lower, upper, theta)
            if step.predicted < options.free_below * here.equations.cost:
                return step, 0.0
    step_h, alpha = _subproblem(here, radius, alpha, options)
    return _select_step(here, step_h, radius, lower, upper, theta), alpha


def _subproblem(here: Point, radius: float, alpha: float, options: Options) -> tuple[np.ndarray, float]:
    hat = here.hat
    with float64():
        if here.spectral is None:
            step_h = solve_cg(here.factor.R, here.factor.projected, hat.d, hat.diagonal, radius)
        else:
            step_h, alpha = solve_svd(here.spectral, radius, alpha, rank_tolerance(here.equations))
    return np.asarray(step_h), float(alpha)


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


def strictly_feasible(params, lower, upper, rstep):
    """``params`` moved off the bounds: by ``rstep`` relatively, or by one float where rstep is 0."""
    if rstep == 0:
        inner_lower, inner_upper = np.nextafter(lower, upper), np.nextafter(upper, lower)
    else:
        finite_lower, finite_upper = np.where(np.isfinite(lower), lower, 0), np.where(np.isfinite(upper), upper, 0)
        inner_lower = lower + rstep * np.maximum(1, abs(finite_lower))
        inner_upper = upper - rstep * np.maximum(1, abs(finite_upper))
    inside = np.clip(params, inner_lower, inner_upper)
    tight = inner_lower > inner_upper
    return np.where(tight, lower + 0.5 * (upper - lower), inside) if tight.any() else inside


def _ratio(actual, predicted):
    if predicted > 0:
        return actual / predicted
    return 1.0 if predicted == actual == 0 else 0.0


def _update_radius(radius, ratio, step_h_norm):
    if ratio < 0.25:
        return 0.25 * step_h_norm
    if ratio > 0.75 and step_h_norm > 0.95 * radius:
        return 2.0 * radius
    return radius


def _terminated(relative, step_norm, params_norm, ratio, ftol, xtol):
    """SciPy's tests: relative reduction of the cost where the model was right about it, relative step."""
    ftol_satisfied = relative < ftol and ratio > 0.25
    xtol_satisfied = step_norm < xtol * (xtol + params_norm)
    return {(True, True): 4, (True, False): 2, (False, True): 3}.get((bool(ftol_satisfied), bool(xtol_satisfied)))


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
    )


def _stopped(callback, record):
    try:
        callback(record)
    except StopIteration:
        return True
    return False
