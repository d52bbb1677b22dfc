"""The rules of a trust-region fit: is a trial accepted, how does the radius change, and has the fit converged.

They are array functions, so the same rules apply to one fit (numbers) and to the lanes of a map (arrays): ``xp`` is
`numpy` or `jax.numpy`.

**SciPy's tests propose, the distance decides.** At each accepted point the quadratic model predicts how much its minimum
would still lower the cost: the decrement ``1/2 g^T (J^T J + diag(|g_k| / v_k))^-1 g``, with v_k the distance to a finite
bound that the gradient pushes against. With s2, the factor that scales the covariance there,

    distance = sqrt(2 decrement / s2)

is the length of the step to that minimum in standard errors. It does not depend on units. A small reduction of the cost or a
short step (``ftol``, ``xtol``, ``gtol`` [1]_) only proposes to stop: the fit has converged if the distance is below
``accuracy`` as well. If full steps reduce the distance only by a factor kappa (large residuals), the remaining steps are a
geometric series, and ``distance / (1 - kappa)`` counts. Exact data converge to the rounding of the residuals instead.

References
----------
.. [1] J. E. Dennis, R. B. Schnabel, "Numerical Methods for Unconstrained Optimization", sections 6.4 (radius), 7.2
       (termination); the thresholds are those of `scipy.optimize.least_squares`.
"""

from typing import Any, NamedTuple

import numpy as np

EPS = 2.0**-52  # spacing of float64 at 1
SAME = 4 * EPS  # relative difference of two values of a parameter that count as one
ROUNDING = 64 * EPS  # relative; rounding of the cost summed over tiles and blocks, generously
PARAM_ROUNDING = 2 * EPS  # relative, of a parameter inside the model: t - centre has the rounding of both
ACCURACY = 0.01  # standard errors from the optimum at which a fit has converged
SLOWEST = 0.999  # contraction of full steps that counts at most: rounding does not contract at all
LINEAR, MOST_GROWTH = 1e-3, 1e3  # misfit of a linear model, relative to the reduction; factor for the radius then
LEAST_RADIUS = 1e-300
FIRST_RADIUS = 0.01  # of the residuals, at least
LENGTH_MEMORY = 1e10  # times its present length, that a column of J is remembered to have been
LEAST_RATIO = 0.2  # of actual and predicted reduction: a lower cost by less is luck, and leads to other optima
MOST_CHANGE = 1e4  # of a parameter in one step, times the largest that it has been
SLIGHT = 1e-3  # relative reduction of the cost: after a larger one SciPy's tests have to be passed again
UNMOVED, UNSEEN = 1e-6, 1e-10  # of the noise: what a parameter changes that is to move; that is to be determined
FADED = 1e-6  # of the longest that a column of J has been: the model hardly depends on its parameter any more
GONE = EPS**3  # of it: nor does any number that is made of the column
VISIBLE = 1e3 * ROUNDING  # of the data: a fit that ends at rounding leaves amplitudes, and narrow widths raise their slopes
STALLS = 3  # refused steps, each a quarter of the one before, after which the gradient counts as rounding too
OFF_BOUND = 1e-10  # share of the interval by which a start is moved off its bounds
AT_BOUND = 1e-2  # standard errors
SHARE = 1e-3  # of the interval between two bounds, and of the size of parameter and bound
LEVEL = 1e-9  # relative difference of two values of chi2 that count as the same
TELLING = 1e6  # times the size of a parameter, above which its error says only that the data do not determine it

RUNNING = 255  # status of a fit that goes on
GTOL, FTOL, XTOL, FTOL_XTOL, TO_ROUNDING = 1, 2, 3, 4, 5  # statuses of fits that have converged
EVALUATIONS, STUCK, UNDETERMINED = 0, 11, 12  # of fits that have not


class Verdict(NamedTuple):
    """What a trial was worth; numbers, or arrays of the lanes."""

    accepted: Any
    actual: Any  # reduction of the cost, nan where the trial is not finite
    ratio: Any  # of actual and predicted reduction
    relative: Any  # reduction of the cost
    by_gradient: Any  # the cost is flat to rounding, and the gradient has judged
    stalls: Any  # refusals in a row where the gradient judges


def judge(xp, here, there, predicted, stalls) -> Verdict:
    """Compare a trial with the point that it started from, both of them points of the loop.

    Once the predicted reduction is below what the costs may be wrong by the actual one is noise: the trial is accepted if it
    lowers the decrement. A trial with more counts where the mean is floored (Poisson), or more parameters on which the model
    does not depend, is never accepted: the gradient knows no way back from there.
    """
    actual = xp.where(there.finite, here.cost - there.cost, xp.nan)
    noise = ROUNDING * here.cost + sum(each.left for each in (here, there) if each.left is not None)
    by_gradient = there.finite & (predicted >= 0) & (predicted < noise)
    better = xp.where(by_gradient, there.decrement < here.decrement, (actual > 0) & (actual >= LEAST_RATIO * predicted))
    accepted = there.finite & better & (there.floored <= here.floored) & (there.n_faded <= here.n_faded)
    ratio = xp.where(predicted > 0, actual / xp.where(predicted > 0, predicted, 1.0), 0.0)
    ratio = xp.where(by_gradient, xp.where(accepted, 1.0, 0.0), xp.where(accepted, ratio, xp.minimum(ratio, 0.0)))
    ratio = xp.where(there.finite, ratio, 0.0)
    relative = xp.where(by_gradient, predicted, actual) / xp.where(here.cost > 0, here.cost, xp.inf)
    return Verdict(accepted, actual, ratio, relative, by_gradient, xp.where(by_gradient & ~accepted, stalls + 1, 0))


def next_radius(xp, radius, ratio, step_norm):
    """A quarter of the step where the model was wrong, at least twice the radius where it was right up to the edge ([1]_).

    The misfit of the model grows with the step: where it is far below `LINEAR` the radius is far too small.
    """
    right = (ratio > 0.75) & (step_norm > 0.95 * radius)
    growth = xp.clip(LINEAR / xp.maximum(xp.abs(ratio - 1), EPS), 2.0, MOST_GROWTH)
    return xp.where(ratio < 0.25, xp.maximum(0.25 * step_norm, LEAST_RADIUS), xp.where(right, growth * radius, radius))


def released(xp, radius, step, before, now):
    """The radius, where parameters are released by bounds that have shortened them: in the units that they have now.

    Those were the root of their distance to the bound. The last step is as long in the new ones as it was in the old.
    """
    if before.hat is None:  # before the first point
        return radius
    d, free = now.hat.d, (before.hat.diagonal > 0) & (now.hat.diagonal == 0) & (now.hat.d > 0)
    was = length(xp, step.step_h)
    its = length(xp, xp.where(free, step.step / xp.where(free, d, 1.0), step.step_h))
    return xp.where(was > 0, xp.maximum(its / xp.where(was > 0, was, 1.0), 1.0), 1.0) * radius


def proposal(xp, verdict: Verdict, step_norm, params_norm, limits):
    """The status with which SciPy's ``ftol`` and ``xtol`` of ``limits`` would stop after a step, 0 where they would go on.

    A tolerance below rounding asks for what can be had: then only the gradient decides.
    """
    measurable = limits.ftol > ROUNDING
    tolerance = xp.where(verdict.by_gradient & ~xp.asarray(measurable), 0.0, limits.ftol)
    small = (verdict.relative < tolerance) & (verdict.ratio > 0.25)
    short = (step_norm < limits.xtol * (limits.xtol + params_norm)) & ~xp.isnan(verdict.actual)
    status = xp.where(small, xp.where(short, FTOL_XTOL, FTOL), xp.where(short, XTOL, 0))
    stalled = verdict.stalls >= xp.where(measurable, 1, STALLS)
    return xp.where((status == 0) & stalled, xp.where(measurable, FTOL, TO_ROUNDING), status)


class Course(NamedTuple):
    """What a fit carries from one sweep to the next; the defaults are those before the first."""

    here: Any  # the point where it stands
    step: Any  # the last one, and whether it is full
    radius: Any = 0.0
    alpha: Any = 0.0  # Levenberg-Marquardt parameter of the last step in the ball, a first guess of the next
    nfev: Any = 0
    verdict: Any = Verdict(False, np.nan, 0.0, np.nan, False, 0)  # on that step
    proposed: Any = 0  # the status with which SciPy's tests would end
    passed: Any = False  # those tests, now or before
    hopeless: Any = False  # no step leads on


def follow(xp, course: Course, there, limits, choose) -> Course:
    """What follows from a sweep at a trial: where the fit now stands, the radius, and what SciPy's tests propose.

    After a step that lowers the cost by more than `SLIGHT` the tests have to be passed again. ``choose(accepted, there,
    here)`` is one of the two points.
    """
    here, step = course.here, course.step
    verdict = judge(xp, here, there, step.predicted, course.verdict.stalls)
    now = choose(verdict.accepted, there, here._replace(n_full=xp.zeros_like(here.n_full)))
    proposed = proposal(xp, verdict, length(xp, step.step), length(xp, here.params), limits)
    proposed = xp.where((now.optimality < limits.gtol) | (now.optimality == 0), GTOL, proposed)
    radius = next_radius(xp, course.radius, verdict.ratio, length(xp, step.step_h))
    radius = xp.where(verdict.accepted & (verdict.ratio > 0.25), released(xp, radius, step, here, now), radius)
    radius = xp.where(course.nfev == 0, first_radius(xp, now), radius)
    return course._replace(
        here=now,
        radius=radius,
        alpha=course.alpha * course.radius / radius,
        nfev=course.nfev + 1,
        verdict=verdict,
        proposed=proposed,
        passed=(proposed > 0) | (course.passed & (verdict.relative < SLIGHT)),
        hopeless=verdict.stalls >= STALLS,
    )


def finished(xp, course: Course, arrived, max_nfev):
    """The status with which a fit ends, or `RUNNING`.

    What SciPy's tests have proposed counts where the fit has ``arrived``. It ends as well where it is hopeless, and where
    the evaluations are exhausted: stuck if the tests had passed.
    """
    status = xp.where((course.proposed > 0) & arrived, course.proposed, RUNNING)
    status = xp.where((status == RUNNING) & course.hopeless, xp.where(arrived, TO_ROUNDING, STUCK), status)
    ended = (status == RUNNING) & (course.nfev >= max_nfev)
    return xp.where(ended, xp.where(course.passed, STUCK, EVALUATIONS), status)


def rounding_of_chi2(xp, size):
    """What is left of chi2 where a fit has come to rounding; ``size`` is sum w y^2.

    Of data that are zero all of it: only the start of a first try says how large a model is, and what vanishes beside it.
    """
    return xp.where(size > 0, ROUNDING**2 * size, xp.inf)


def is_better(xp, chi2, succeeded, other, other_succeeded, rounding):
    """Whether another try of a fit counts instead of the one with ``chi2``, by its own; ``rounding`` is that of both.

    A lower chi2 counts. At the same level it tells nothing: there success counts, unless rounding is all that is left.
    """
    same = xp.abs(other - chi2) <= xp.maximum(LEVEL * chi2, rounding)
    decided = same & (xp.asarray(succeeded) != other_succeeded)
    return xp.where(decided, xp.asarray(other_succeeded) & (chi2 > rounding), other < chi2 - rounding)


def converged(xp, here, accuracy):
    """Whether a fit may stop at a point; ``accuracy`` is inf where SciPy's tests alone decide.

    Without degrees of freedom the decrement is compared with the cost, as if there were one.
    """
    near = xp.where(here.dof > 0, here.distance < accuracy, here.decrement < xp.minimum(accuracy, 1.0) ** 2 * here.cost)
    return (near | (here.decrement <= here.floor) | (accuracy == float("inf"))) & (here.floored == 0)


def distance(xp, decrement, variance, contraction, floor):
    """Standard errors to the optimum, 0 where rounding is all that is left; nan without degrees of freedom."""
    plain = xp.sqrt(2 * decrement / xp.where(variance != 0, variance, 1.0))
    return xp.where(decrement <= floor, 0.0, plain / (1 - xp.minimum(contraction, SLOWEST)))


def magnitude(xp, size, reach, columns):
    """What rounding is relative to: ``size`` = sum w y^2, or, where the data are zero, what the model has been, squared.

    ``reach``, the largest that each parameter has been, and ``columns``, the lengths of those of J, are (p,) or (p, lanes).
    """
    return xp.where(size > 0, size, ((reach * columns) ** 2).sum(axis=0))


def rounding_floor(magnitude, params, columns, n_points):
    """The decrement that rounding leaves: of residuals, relative to their ``magnitude``, and of parameters in the model.

    Rounding of a parameter's effect differs from point to point, so that p of n points' worth of it are left.
    """
    inside = ((PARAM_ROUNDING * params * columns) ** 2).sum(axis=0) * len(params) / (n_points + (n_points == 0))
    return ROUNDING**2 * magnitude + inside


def same(xp, trial, params):
    """Where a trial is the point itself, to rounding, or no number at all."""
    return ~(xp.abs(trial - params) > SAME * xp.abs(params))


def first_radius(xp, here):
    """Of the trust region, in the units of the residuals: the effect of the parameters, where they have one.

    Of parameters that start at zero nothing is known but the residuals that they are to explain; where no other can move
    yet, the Newton step alone says how far.
    """
    d = here.hat.d
    moved = length(xp, xp.where((here.longest > 0) & (d > 0), here.params / xp.where(d > 0, d, 1.0), 0.0))
    radius = xp.maximum(xp.where(moved > 0, moved, length(xp, here.newton)), FIRST_RADIUS * xp.sqrt(2 * here.cost))
    return xp.where(radius > 0, radius, 1.0)


def length(xp, vector):
    """Of a vector (p,), or of those of all lanes."""
    return xp.sqrt((vector * vector).sum(axis=0))


def held(xp, params, v, stiffening):
    """Parameters that stand at a bound which the gradient pushes against: rounding is all that lies between.

    ``v`` is the distance to that bound, and ``stiffening`` is positive where there is one.
    """
    return (stiffening > 0) & ((v <= SAME * xp.abs(params)) & (v != xp.abs(params)) | (v <= LEAST_RADIUS))


def scale(xp, columns, longest):
    """Scale of the parameters, 1 over the length of their columns of J (p,): the longest so far, as far as remembered.

    A scale never grows, as in Moré's (and SciPy's) method, except where a column has become very much shorter than it was:
    the region would leave its parameter no freedom. A zero column is not a length scale.
    """
    lengths = xp.minimum(longest, xp.where(columns > 0, LENGTH_MEMORY * columns, xp.inf))
    return 1 / xp.where(lengths > 0, lengths, 1.0)


def felt(xp, columns, gradient, cost):
    """What a parameter changes, (p,): its column of J, but where a robust loss has taken the weight of all points.

    Such columns are all but zero, and the gradient is not. By Cauchy and Schwarz it never says more than they do in least
    squares; of counts at most as much more as the root of Pearson's chi-square over the deviance.
    """
    told = (columns > 0) & (cost > 0)
    return xp.maximum(columns, xp.where(told, xp.abs(gradient) / xp.sqrt(xp.where(cost > 0, 2 * cost, 1.0)), 0.0))


def undetermined(xp, columns, longest, span, magnitude):
    """Parameters on which the model does not depend: whose column is zero, or has faded to less than the data can show.

    ``span`` is how far each of them may plausibly move, whatever its origin.
    """
    return (columns <= GONE * longest) | (columns <= FADED * longest) & (columns * span <= VISIBLE * xp.sqrt(magnitude))


def vanishes(xp, effect, before, size):
    """Where an effect is too small for data with sum w y^2 = ``size``; where that is 0, beside that ``before``."""
    return xp.abs(effect) <= VISIBLE * xp.where(size > 0, xp.sqrt(size), xp.abs(before))


def span(xp, params, start, cost, longest):
    """How far parameters have moved since the start, or would have moved alone to explain all the residuals there."""
    alone = xp.sqrt(2 * cost) / xp.where(longest > 0, longest, xp.inf)
    return xp.maximum(xp.abs(params - start), alone)


def below_noise(xp, columns, cost, n_points, bounds, magnitude):
    """What a parameter could change between its two bounds is less than these shares of the noise: `UNMOVED`, `UNSEEN`.

    What the data cannot show, however small the noise, is not seen either; nor is it where there are not two bounds.
    """
    if bounds is None:
        return False, False
    change, noise = columns * (bounds[1] - bounds[0]), xp.sqrt(2 * cost / xp.maximum(n_points, 1))
    return change < UNMOVED * noise, change < xp.maximum(UNSEEN * noise, VISIBLE * xp.sqrt(magnitude))


def off_the_bounds(xp, params, lower, upper, share):
    """``params`` strictly inside the bounds: at least a ``share`` of the interval away from them, one float where that is 0.

    Where there is one bound only, it is a share of the parameter's size.
    """
    width = upper - lower
    either = xp.isfinite(lower) | xp.isfinite(upper)
    bound = xp.abs(xp.where(xp.isfinite(lower), lower, xp.where(xp.isfinite(upper), upper, 0.0)))
    size = xp.where(xp.isfinite(width), width, xp.maximum(bound, xp.abs(params)))
    margin = xp.where(either, share * xp.where(size > 0, size, 1.0), 0.0)
    low = xp.maximum(lower + margin, xp.nextafter(lower, upper))
    high = xp.minimum(upper - margin, xp.nextafter(upper, lower))
    middle = xp.where(xp.isfinite(width), lower, 0.0) + 0.5 * xp.where(xp.isfinite(width), width, 0.0)
    return xp.where(low > high, middle, xp.minimum(xp.maximum(params, low), high))


def at_bounds(params, perr, lower, upper):
    """-1 where a parameter is at its lower bound, 1 at its upper one, else 0; arrays (p,) of NumPy or of JAX.

    At a bound is what is nearer to it than to the other one, by less than a hundredth of a standard error, and by less than
    a thousandth of the interval between the bounds. An error without information (inf, or many times the size of parameter
    and bound) counts only where parameter and bound agree to three digits, or the bound is 0. All of it is the same in any
    units.
    """
    below, above, width = abs(params - lower), abs(upper - params), upper - lower

    def near(distance, bound):
        size = abs(params) + abs(bound)
        agree = (distance <= SHARE * size) | (abs(bound) <= SHARE * abs(params))
        told = (perr < np.inf) & (agree | (perr <= TELLING * size))
        close = (distance <= AT_BOUND * perr) & (distance <= SHARE * width) & (told | (width < np.inf) & (perr == np.inf))
        return (distance < np.inf) & (close | (distance <= ROUNDING * abs(bound)))

    at_lower, at_upper = near(below, lower) & (below <= above), near(above, upper) & (above < below)
    return at_upper.astype(np.int8) - at_lower.astype(np.int8)


def places_at_bounds(xp, params, perr, alone, lower, upper):
    """`at_bounds`; where ``perr`` is inf, the error that a parameter would have ``alone`` tells it from its bound, too."""
    found = at_bounds(params, perr, lower, upper)
    return xp.where((found == 0) & (perr == np.inf), at_bounds(params, alone, lower, upper), found)
