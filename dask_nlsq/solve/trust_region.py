"""The trust-region reflective loop over sweeps.

It minimises ``cost(params) = 1/2 sum rho(r^2)`` within bounds. It sees the data only through ``sweep(params,
reduction)``, which reads them once and returns cost and normal equations together. So each step costs one sweep, whether it
is accepted or not. The method is SciPy's ``trf`` [1]_, its decisions in `rules`, its candidate
steps in `steps`, the step in the ball in `subproblem`.

Four things are added. **The gate:** SciPy's tests propose to stop, and the loop stops if the optimum of the quadratic
model is also near in standard errors; see `rules`. A fit that cannot progress although it is far has the status `STUCK`; if
the model does not depend on a parameter, the status is `UNDETERMINED`. **Far bounds:** once little is left to gain, they no
longer shorten steps; see `steps`. **Reduction:** if the condition of ``R`` shows that the gram matrix has lost digits, the
next sweep uses QR. **The last digits:** once the predicted reduction is below the rounding of the cost, the actual one is
noise, and SciPy's loop rejects good steps. The gradient is still accurate then, so it decides: a step is accepted if it
lowers the decrement.

References
----------
.. [1] SciPy, ``scipy.optimize.least_squares(method="trf")``, after Branch, Coleman and Li (see `steps`).
"""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.linalg import norm

from ..engine.condensed import Condensed, Factor, Read, factor
from ..engine.waiting import ToldToLeave
from ..kernels import rules
from ..kernels.blocks import Reduction
from ..kernels.rules import EVALUATIONS, OFF_BOUND, ROUNDING, RUNNING, STUCK, UNDETERMINED, Course
from ..kernels.steps import Point, Scheme, Seen, Step, best_step, point_at, reined_in
from .subproblem import QuadraticModel

CG_ABOVE = 500  # parameters: beyond, an SVD of (2p, p) in each step is slower than conjugate gradients
GRAM_CONDITION_LIMIT = 1e4  # eps * 1e4^2 = 2e-8: the digits of the covariance that the gram matrix then costs
INTERRUPTED, STOPPED = -3, -2  # statuses

MESSAGES = {
    INTERRUPTED: "Stopped by a signal, at the best point so far.",
    STOPPED: "Stopped by `callback`.",
    EVALUATIONS: "The maximum number of function evaluations, {max_nfev}, is exceeded.",
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
    """One trial step, as ``callback`` receives it and ``FitResult.history`` lists it. The first record is the start."""

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
    seconds: float  # since the start of the fit, once the data were there
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
    gtol_relative: bool = False  # MINPACK's test, a cosine, instead of the scaled gradient in the units of the data
    max_nfev: int | None = None  # 100 p
    reduction: Literal["gram", "qr", "auto"] = "auto"
    tr_solver: Literal["exact", "cg"] | None = None  # by the number of parameters
    callback: Callable[[Record], None] | None = None
    near_below: float = 0.5  # predicted share of the cost below which only bounds count that are near; see `steps`
    accuracy: float = np.inf  # standard errors from the optimum at which a fit has converged; inf: SciPy's tests alone
    noise: Literal["known", "cost", "pearson"] = "cost"  # what the variance of the residuals is taken from
    names: tuple[str, ...] = ()  # of the parameters, for messages
    began: float | None = None  # by `time.perf_counter`: what a record's seconds count from; None: from `solve` on

    @property
    def solver(self) -> Literal["exact", "cg"]:
        return self.tr_solver or ("exact" if len(self.lower) <= CG_ABOVE else "cg")

    @property
    def most_nfev(self) -> int:
        return self.max_nfev or 100 * len(self.lower)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        bounded = np.any(np.isfinite(self.lower)) or np.any(np.isfinite(self.upper))
        return (self.lower, self.upper) if bounded else None


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


class Ask(NamedTuple):
    """A sweep that a loop needs, and the point where it stands; before the first one that is nowhere."""

    params: np.ndarray
    reduction: Reduction
    here: Point = Point()


T = TypeVar("T")
Asks: TypeAlias = Generator[Ask, Condensed, T]  # sweeps, until there is a T


def solve(sweep: Callable[[np.ndarray, Reduction], Condensed], p0: np.ndarray, options: Options) -> Solution:
    """Minimise from ``p0`` (p,), strictly within the bounds of ``options``.

    Raises
    ------
    NotFiniteAtStart
        Where the first sweep gives no finite cost and normal equations.
    """
    return Loop(solving(p0, options), sweep).end()


Begin: TypeAlias = Callable[[Any, np.ndarray, Options], Asks[Solution]]  # of evaluator, start and options


def alone(evaluator: Any, start: np.ndarray, options: Options) -> Asks[Solution]:
    """`solving`, with nothing before it."""
    return solving(start, options)


class Loop:
    """A loop of `solving`, which may pause between two of its sweeps."""

    def __init__(self, asks: Asks[Solution], sweep: Callable[[np.ndarray, Reduction], Condensed]):
        self.asks, self.sweep = asks, sweep
        self.asked: Ask | None = None  # after a pause

    def go_on(self, most: float = np.inf) -> Solution | None:
        """Its solution; None if it needs more than ``most`` sweeps from here."""
        try:
            asked = next(self.asks) if self.asked is None else self.asked
            while most > 0:
                try:
                    found = self.sweep(asked.params, asked.reduction)
                except ToldToLeave as stop:
                    asked = self.asks.throw(stop)
                else:
                    asked = self.asks.send(found)
                most -= 1
        except StopIteration as end:
            return end.value
        self.asked = asked
        return None

    @property
    def here(self) -> Point:
        """Where it stands, after a pause."""
        return Point() if self.asked is None else self.asked.here

    def end(self) -> Solution:
        """Its solution, however many sweeps it needs."""
        found = self.go_on()
        assert found is not None  # as it has all the sweeps that it asks for
        return found

    def leave(self, stop: ToldToLeave) -> Solution:
        """Where it stands, after a pause."""

        def told(*_):
            raise stop

        self.sweep = told
        return self.end()


def solving(p0: np.ndarray, options: Options) -> Asks[Solution]:
    """The loop of `solve`: yields params and reduction of each sweep that it needs, is sent what that has found.

    So several loops can share the reads of the data; see `together`.
    """
    started = time.perf_counter() if options.began is None else options.began
    params = rules.off_the_bounds(np, np.asarray(p0, dtype=np.float64), options.lower, options.upper, OFF_BOUND)
    equations = yield Ask(params, "qr" if options.reduction == "qr" else "gram")
    if not equations.finite:
        raise NotFiniteAtStart("the cost or its derivatives are not finite at the start point")
    course = follow(Course(Point(), Step()), params, equations, options)
    first = _record(course, equations.read, started)
    history = [first._replace(actual=np.nan, predicted=np.nan, step_norm=np.nan)]
    stopped = _stopped(options.callback, history[0])
    try:
        while True:
            course = yield from confirmed(course, options)
            status = finished(course, stopped, options)
            if status != RUNNING:
                break
            here, tried = course.here, propose(course, options)
            trial = rules.off_the_bounds(np, here.params + tried.step.step, options.lower, options.upper, 0.0)
            if np.all(rules.same(np, trial, here.params)):
                course = course._replace(hopeless=True)
                continue
            equations = yield Ask(trial, _next_reduction(here, options), here)
            course = follow(tried, trial, equations, options)
            history.append(_record(course, equations.read, started))
            stopped = _stopped(options.callback, history[-1])
    except ToldToLeave:
        status = INTERRUPTED
    if _wants_qr(course.here, options) and status != INTERRUPTED:
        with suppress(ToldToLeave):  # what the gram matrix says is there
            course = course._replace(here=(yield from _by_qr(course.here, options)))
    return _solution(course, status, history, options)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def follow(course: Course, trial: np.ndarray, equations: Condensed, options: Options) -> Course:
    """What follows from a sweep at a trial: the trial becomes the point where the loop stands, or it is refused."""
    if equations.finite:
        there = linearise(trial, equations, course.here, options, course.step.full)
    else:
        there = course.here._replace(cost=equations.cost, finite=False)
    return rules.follow(np, course, there, options, lambda accepted, there, here: there if accepted else here)


def confirmed(course: Course, options: Options) -> Asks[Course]:
    """The same, at a point by QR, where a fit is about to succeed by a gram matrix that has lost digits."""
    here = course.here
    ends = (course.proposed or course.hopeless) and rules.converged(np, here, options.accuracy)
    if not (ends and _wants_qr(here, options)):
        return course
    return course._replace(here=(yield from _by_qr(here, options)))


def finished(course: Course, stopped: bool, options: Options) -> int:
    """The status with which the loop ends, or `RUNNING`."""
    arrived = rules.converged(np, course.here, options.accuracy)
    status = int(rules.finished(np, course, arrived, options.most_nfev))
    return STOPPED if status == RUNNING and stopped else status


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def linearise(params, equations: Condensed, before: Point, options: Options, full: bool = False) -> Point:
    """The quadratic model at a point that a step from ``before`` led to."""
    model = QuadraticModel(equations, factor(equations), options.solver)
    columns, pearson = norm(model.factor.R, axis=0), options.noise == "pearson"
    chi_square = equations.pearson if pearson else 2 * equations.cost
    counts = equations.n_points, equations.size, equations.floored
    seen = Seen(
        params, equations.cost, model.factor.gradient, columns, chi_square, *counts, equations.finite, equations.left
    )
    scheme = Scheme(options.bounds, options.x_scale, options.gtol_relative, options.noise == "known", options.near_below)
    return point_at(np, seen, before, full, scheme, lambda hat: (*model.newton(hat), model))


def _by_qr(here: Point, options: Options) -> Asks[Point]:
    """The same point, by a sweep that loses no digits."""
    equations = yield Ask(here.params, "qr", here)
    if not equations.finite:
        return here
    there = linearise(here.params, equations, here, options)
    distance = rules.distance(np, there.decrement, there.variance, here.contraction, there.floor)
    return there._replace(distance=distance, n_full=here.n_full, contraction=here.contraction)


def _next_reduction(here: Point, options: Options) -> Reduction:
    if options.reduction != "auto":
        return options.reduction
    return "qr" if here.model.factor.condition > GRAM_CONDITION_LIMIT else "gram"


def _wants_qr(here: Point, options: Options) -> bool:
    return here.model.equations.reduction == "gram" and _next_reduction(here, options) == "qr"


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def propose(course: Course, options: Options) -> Course:
    """The course with the next step, and its Levenberg-Marquardt parameter."""
    here, radius, alpha = course.here, course.radius, 0.0
    here = reined_in(np, here, radius)
    model, step_h, inside = here.model, here.newton, norm(here.newton) <= radius
    if not inside:
        step_h, alpha = model.step(here.hat, radius, course.alpha)
    step = best_step(np, here, lambda a, b: model.bend(here.hat, a, b), step_h, radius, options.bounds)
    return course._replace(step=step._replace(full=inside & step.full), alpha=alpha)


def _solution(course: Course, status: int, history: list[Record], options: Options) -> Solution:
    here = course.here
    lost = bool(here.floored) or here.undetermined.any()
    if status > 0 and lost:
        status = STUCK if here.floored else UNDETERMINED
    found = here.params, here.model.equations, here.model.factor, status, _message(course, status, options)
    distance = np.nan if lost else float(here.distance)  # that of the other parameters says nothing
    return Solution(*found, course.nfev, float(here.optimality), history, distance)


def _message(course: Course, status: int, options: Options) -> str:
    """Why the fit ended: the value and its threshold."""
    here, most = course.here, options.most_nfev
    exceeded = f"SciPy's tests were passed before the maximum number of function evaluations, {most}, was exceeded"
    names = options.names or [f"parameter {k}" for k in range(len(here.params))]
    limits = dict(gtol=options.gtol, ftol=options.ftol, xtol=options.xtol, rounding=ROUNDING, max_nfev=most)
    step = norm(course.step.step) / (norm(here.params) or 1.0)
    return MESSAGES[status].format(
        **limits | dict(optimality=here.optimality, relative=course.verdict.relative, step=step),
        ended="No step lowers the cost any more" if course.hopeless else exceeded,
        far=_far(here, options),
        undetermined=" and ".join(names[k] for k in np.flatnonzero(here.undetermined)),
    )


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


def _record(course: Course, read: Read | None, started: float) -> Record:
    here, step, verdict = course.here, course.step, course.verdict
    return Record(
        iteration=course.nfev - 1,
        nfev=course.nfev,
        cost=here.cost,
        actual=float(verdict.actual),
        predicted=float(step.predicted),
        step_norm=float(norm(step.step)),
        radius=float(course.radius),
        optimality=float(here.optimality),
        accepted=bool(verdict.accepted),
        params=here.params,
        seconds=time.perf_counter() - started,
        reduction=here.model.equations.reduction,
        read=read,
        distance=float(here.distance),
    )


def _stopped(callback, record: Record) -> bool:
    try:
        if callback is not None:
            callback(record)
    except StopIteration:
        return True
    return False
