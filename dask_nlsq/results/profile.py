"""Profile likelihood: how far one or two parameters can be moved, with all others fitted again, at a given level.

With the cost ``c(v)`` of the best fit with a parameter held at v [1]_, [2]_:

    d(v) = sqrt(2 (c(v) - c(popt)) / s2)            in standard errors

s2 is the factor that scales pcov: 1 if the noise is known and for counts, otherwise the reduced chi-square. If the model is
linear in its parameters, d is ``|v - popt| / perr``. The interval of a level is where d is below ``sqrt(m F)``, with the
quantile F of the F distribution of m and n - p, chi-square / m of m where the noise is known; m = 1, or 2 for a contour. It
follows the shape of the cost; standard errors use only its curvature at the optimum.

The ends are found on rays from popt by the secant method: the values move along each ray until d reaches its limit. All
trial fits, of all rays and parameters, share the reads of the data; see `dask_nlsq.solve.together`.

References
----------
.. [1] D. M. Bates, D. G. Watts, "Nonlinear Regression Analysis and Its Applications" (Wiley 1988), section 6.1.
.. [2] S. A. Murphy, A. W. van der Vaart, "On profile likelihood", J. Am. Stat. Assoc. 95 (2000) 449-465.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy
from tqdm.auto import tqdm

from ..base.text import html_table, measured, near, several, table
from ..base.values import is_integer
from ..base.warn import warn
from ..data.sizes import sizes_of
from ..engine.cluster import attached
from ..engine.condensed import Segmentation, held_at
from ..engine.evaluator import Evaluator
from ..engine.sweep import open_sweep
from ..engine.waiting import StopOnSignal, ToldToLeave
from ..kernels.rules import ROUNDING, TO_ROUNDING
from ..memory.machine import active_client
from ..memory.plan import make_plan
from ..model.params import ByName
from ..solve.together import together
from ..solve.trust_region import Ask, Asks, NotFiniteAtStart, Options, solving
from . import plots
from .statistics import check_level, distance_at

TOLERANCE = 1e-3  # of d: ends are exact to that share of their distance from popt
NEAR = 0.05  # standard errors to the optimum of a trial fit, which shift d by less than that
FTOL = 1e-8  # as that of `dask_nlsq.curve_fit`
MOST_SWEEPS = 30  # of a trial fit
MOST_TRIALS = 12  # fits for one end
FASTEST = 4.0  # most that a trial goes farther than the one before
FARTHEST = 100.0  # times the distance of a linear model, where an end is not looked for any more
BETTER = 0.05  # standard errors, by which a trial fit has to be better than the fit to be worth a warning
RAYS = 48  # of a contour
PROGRESS_DELAY = 2.0  # seconds


class Trial(NamedTuple):
    """A fit with some of the parameters held."""

    r: float  # standard errors from popt, as a linear model has them
    distance: float  # d; inf where the model is not finite
    params: np.ndarray  # (q,), those that were fitted in the fit
    success: bool


class Ray(NamedTuple):
    """The border of a region along one ray."""

    end: float  # r; inf where there is none
    trials: tuple[Trial, ...]
    success: bool  # False: the end is only enclosed by two trials


@dataclass(frozen=True, repr=False, eq=False)
class LikelihoodProfile:
    """The profile of one parameter.

    Attributes
    ----------
    name : str
    value, error : float
        Of the fit, with its standard error.
    levels : tuple of float
    intervals : ndarray, shape (levels, 2)
        Lower and upper ends; a bound of the parameter if it comes first, inf if the interval is unbounded.
    values, distance : ndarray, shape (m,)
        Values at which the others were fitted, and d there, which is negative below the optimum.
    params : ndarray, shape (m, q)
        All fitted parameters there, in the order of ``names``.
    names : tuple of str
    success : bool
        Whether all trial fits have converged, and all ends are exact; else the ends are approximate.
    reads : int
        Reads of the data, which all parameters of a call share.
    """

    name: str
    value: float
    error: float
    levels: tuple[float, ...]
    intervals: np.ndarray
    values: np.ndarray
    distance: np.ndarray
    params: np.ndarray
    names: tuple[str, ...]
    success: bool
    reads: int

    def rows(self) -> list[tuple[str, ...]]:
        """Of a table: name, value, and for each level both ends, and their distances from the value in standard errors."""
        found = []
        for k, (level, ends) in enumerate(zip(self.levels, self.intervals, strict=True)):
            away = (ends - self.value) / self.error
            head = (self.name, measured(self.value, self.error)[0]) if k == 0 else ("", "")
            remark = "" if self.success or k else "approximate"
            marks = (*(measured(end, self.error)[0] for end in ends), *(f"{d:+.2f}" for d in away))
            found.append((*head, f"{level:.2%}", *marks, remark))
        return found

    def __repr__(self):
        return "\n".join(["<LikelihoodProfile>", *table([HEAD, *self.rows()], "<" + 6 * ">")])

    def _repr_html_(self):
        return html_table(HEAD, self.rows())

    def plot(self, ax=None):
        """d against the parameter: `dask_nlsq.plots.profile`."""
        return plots.profile(self, ax)


HEAD = ("parameter", "value", "level", "from", "to", "s.e.", "s.e.", "")


class LikelihoodProfiles(ByName[LikelihoodProfile]):
    """`LikelihoodProfile` by name; prints as a table."""

    def plot(self, axes=None):
        """Each of them: `dask_nlsq.plots.profile`, in an array of axes."""
        axes = plots.row_of_axes(axes, len(self))
        for each, ax in zip(self.values(), axes, strict=True):
            each.plot(ax)
        return axes

    def rows(self) -> list[tuple[str, ...]]:
        return [row for each in self.values() for row in each.rows()]

    def __repr__(self):
        return "\n".join(["<LikelihoodProfiles>", *table([HEAD, *self.rows()], "<" + 6 * ">")])

    def _repr_html_(self):
        return html_table(HEAD, self.rows())


@dataclass(frozen=True, repr=False, eq=False)
class LikelihoodContour:
    """Joint confidence regions of two parameters.

    Attributes
    ----------
    names : tuple of str
    value : ndarray, shape (2,)
        Of the fit.
    levels : tuple of float
    points : ndarray, shape (levels, rays, 2)
        The border of each region, in order around it, along a bound if that comes first; nan in unbounded directions.
    ellipses : ndarray, shape (levels, rays, 2)
        The ellipses of the covariance, along the same rays.
    success, reads
        As in `LikelihoodProfile`.
    """

    names: tuple[str, str]
    value: np.ndarray
    levels: tuple[float, ...]
    points: np.ndarray
    ellipses: np.ndarray
    success: bool
    reads: int

    def __repr__(self):
        lines = [f"<LikelihoodContour of {self.names[0]} and {self.names[1]}, {self.points.shape[1]} points each>"]
        for level, points in zip(self.levels, self.points, strict=True):
            ends = zip(self.names, np.nanmin(points, axis=0), np.nanmax(points, axis=0), strict=True)
            lines.append(f"  {level:.2%}: " + ", ".join(f"{name} from {low:.6g} to {high:.6g}" for name, low, high in ends))
        return "\n".join(lines)

    def plot(self, ax=None):
        """The regions, and the ellipses of the covariance: `dask_nlsq.plots.contours`."""
        return plots.contours(self, ax)


def profile(
    result,
    name: str | Sequence[str] | None = None,
    level: float | Sequence[float] = 0.95,
    *,
    progress: bool | None = None,
    memory_limit_gb: float | None = None,
) -> LikelihoodProfile | LikelihoodProfiles:
    """Confidence intervals by the profile likelihood: for nonlinear models, like lmfit's ``conf_interval``.

    Each end takes about three trial fits of the other parameters, of two or three sweeps each. Up to 64 of them share
    each read, so about ten reads of the data give the intervals of 30 parameters. Data are loaded as they were for the fit.

    Parameters
    ----------
    name : str or sequence of str, optional
        Fitted parameters; by default all of them.
    level : float or sequence of floats
        Probability of the interval, or of several.
    progress : bool, optional
        Progress bar; None: in a terminal or notebook, after two seconds.
    memory_limit_gb : float, optional
        As in `dask_nlsq.curve_fit`.

    Returns
    -------
    LikelihoodProfile
        For one ``name``; for several a mapping by name.

    Raises
    ------
    ValueError
        A parameter that was not fitted; a result without its data, as after `dask_nlsq.load`; a robust loss or weights from
        the model, which are not a likelihood; data that do not determine the parameters; data without noise.

    Warns
    -----
    scipy.optimize.OptimizeWarning
        A trial fit ends at a lower cost: the fit was not at the best optimum.

    Examples
    --------
    >>> result.profile("rate", level=[0.68, 0.95]).intervals  # doctest: +SKIP
    """
    names = [name] if isinstance(name, str) else [result.param_names[k] for k in result.free] if name is None else [*name]
    problem, levels = _Problem(result), _levels(level)
    if not names:
        raise ValueError("`name` must be a parameter, or several, not an empty sequence")
    places = [problem.place("name", each) for each in names]
    targets = [distance_at(each, 1, result.dof, result.noise) for each in levels]
    ways = [([k], np.array([sign * np.sqrt(problem.C[k, k])])) for k in places for sign in (-1, 1)]
    rays = [(*way, target) for way in ways for target in targets]
    found, reads = _search(problem, rays, progress, memory_limit_gb, "profile")
    each = 2 * len(levels)
    profiles = [
        _profile(problem, k, levels, found[begin : begin + each], reads)
        for k, begin in zip(places, range(0, len(found), each), strict=True)
    ]
    return profiles[0] if isinstance(name, str) else LikelihoodProfiles(*profiles)


def _profile(problem, k: int, levels, rays: Sequence[Ray], reads: int) -> LikelihoodProfile:
    """Of the parameter at place k, by rays for all levels downwards and for all upwards."""
    value, error = float(problem.popt[k]), float(np.sqrt(problem.C[k, k]))
    ends = np.array([ray.end for ray in rays]).reshape(2, -1).T * [-error, error]
    ends = np.clip(value + ends, problem.lower[k], problem.upper[k])
    trials = {float(each.params[k]): each for ray in rays for each in ray.trials if np.isfinite(each.distance)}
    values = np.array(sorted(trials))
    few = [trials[each] for each in values]
    distance = np.array([each.distance for each in few]) * np.sign(values - value)
    params = np.stack([each.params for each in few])
    success = all(each.success for each in few) and all(each.success for each in rays)
    return LikelihoodProfile(
        problem.names[k], value, error, levels, ends, values, distance, params, problem.names, success, reads
    )


def contour(
    result,
    name: str,
    other: str,
    level: float | Sequence[float] = (0.68, 0.95),
    *,
    rays: int = RAYS,
    progress: bool | None = None,
    memory_limit_gb: float | None = None,
) -> LikelihoodContour:
    """Joint confidence regions of two parameters by the profile likelihood, others fitted again.

    The border is searched along rays from the optimum. Each ray must leave the region only once.

    Parameters
    ----------
    name, other : str
        Parameters that were fitted.
    level : float or sequence of floats
        Probability that both are in the region.
    rays : int
        Points on each border.
    progress, memory_limit_gb : optional
        As in `profile`.

    Raises
    ------
    ValueError
        As `profile`.
    """
    problem, levels = _Problem(result), _levels(level)
    places = [problem.place("name", name), problem.place("other", other)]
    if name == other:
        raise ValueError(f"`other` must be another parameter than `name`, {name!r}")
    if not (is_integer(rays) and rays >= 3):
        raise ValueError(f"`rays` must be an integer of at least 3, not {rays!r}")
    angles = 2 * np.pi * np.arange(rays) / rays
    root = np.linalg.cholesky(problem.C[np.ix_(places, places)])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ root.T
    targets = [distance_at(each, 2, result.dof, result.noise) for each in levels]
    ways = [(places, each, target) for target in targets for each in directions]
    found, reads = _search(problem, ways, progress, memory_limit_gb, "contour")
    value, radii = problem.popt[places], np.reshape([ray.end for ray in found], (len(levels), rays))
    with np.errstate(invalid="ignore"):
        points = value + np.where(np.isfinite(radii), radii, np.nan)[..., None] * directions
        points = np.clip(points, problem.lower[places], problem.upper[places])
    ellipses = value + np.array(targets)[:, None, None] * directions
    success = all(ray.success and all(each.success for each in ray.trials) for ray in found)
    return LikelihoodContour((name, other), value, levels, points, ellipses, success, reads)


# ---------------------------------------------------------------------------------------------------------------------


def _levels(level) -> tuple[float, ...]:
    levels = tuple([level] if np.ndim(level) == 0 else level)
    if not levels:
        raise ValueError("`level` must be a probability, or several, not an empty sequence")
    for each in levels:
        check_level(each)
    return tuple(sorted(levels))


class _Problem:
    """What trial fits need of a fit; parameters are those that were fitted, (q,)."""

    def __init__(self, result):
        if hasattr(result, "groups"):
            raise ValueError("fits of groups have no profiles")
        if result.data is None:
            raise ValueError(
                "trial fits need the data, which this result does not have: it was loaded or pickled, so fit again from popt"
            )
        if not result.noise.squares or result.noise.reweighted:
            kind = 'sigma="poisson"' if result.noise.reweighted else f"loss={result.noise.loss!r}"
            raise ValueError(f'{kind} is not a likelihood: profiles need least squares or loss="poisson"')
        free = [*result.free]
        self.result, self.names = result, tuple(result.param_names[k] for k in free)
        self.popt, self.C = result.popt[free], result.pcov[np.ix_(free, free)]
        self.lower, self.upper = result.bounds[:, free]
        self.variance = 1.0 if result.noise.absolute else 2 * result.cost / max(result.dof, 1)  # without any, pcov is inf
        if not np.isfinite(self.C).all() or not np.all(np.diag(self.C) > 0):
            raise ValueError("the data do not determine the parameters (pcov is inf), so there is no profile")
        exact = not 2 * result.cost > ROUNDING**2 * np.nan_to_num(result.totals.squares)
        if exact and not result.noise.absolute:
            raise ValueError("a profile compares with the noise, which is 0 here: give sigma= with absolute_sigma=True")
        enough = max(FTOL, TOLERANCE * self.variance / max(result.cost, TOLERANCE * self.variance))  # of the cost, for d
        limits = dict(ftol=enough, max_nfev=MOST_SWEEPS, accuracy=NEAR, near_below=np.inf)
        self.options = Options(self.lower, self.upper, noise=result.noise.variance, **limits)

    def place(self, argument: str, name: str) -> int:
        if name in self.result.tied:
            raise ValueError(
                f"`{argument}` names {name!r}, which is tied ({name} = {self.result.tied[name]}): only fitted parameters "
                f"have a profile, {', '.join(self.names)}"
            )
        if name not in self.names:
            hint = near(str(name), self.names, "; ")
            raise ValueError(f"`{argument}` names {name!r}, the fitted parameters are {', '.join(self.names)}{hint}")
        return self.names.index(name)

    def trial(self, places: Sequence[int], direction: np.ndarray, r: float, near: Trial) -> Asks[Trial]:
        """The fit with the parameters at ``places`` held at popt + r * direction, or where bounds stop each of them.

        The others start as a linear model has them, from the trial ``near``; if that is not finite, from its own values.
        """
        free, places = [k for k in range(len(self.popt)) if k not in places], [*places]
        params = near.params.copy()
        params[places] = np.clip(self.popt[places] + r * direction, self.lower[places], self.upper[places])
        step = params[places] - near.params[places]
        shift = self.C[np.ix_(free, places)] @ np.linalg.solve(self.C[np.ix_(places, places)], step)
        if not free:
            equations = yield Ask(params, "gram")
            return self._found(r, equations.cost if equations.finite else np.inf, params, True)
        options = replace(self.options, lower=self.lower[free], upper=self.upper[free])
        for start in (near.params[free] + shift, near.params[free]):
            loop = solving(np.clip(start, self.lower[free], self.upper[free]), options)
            try:
                asked = next(loop)
                while True:
                    params = params.copy()
                    params[free] = asked.params
                    asked = loop.send(held_at((yield Ask(params, asked.reduction)), free))
            except NotFiniteAtStart:
                continue
            except StopIteration as end:
                params[free] = end.value.params
                return self._found(r, end.value.equations.cost, params, 0 < end.value.status <= TO_ROUNDING)
        return self._found(r, np.inf, params, True)

    def _found(self, r: float, cost: float, params: np.ndarray, success: bool) -> Trial:
        above = 2 * (cost - self.result.cost) / self.variance
        return Trial(r, float(np.copysign(np.sqrt(abs(above)), above)), params, success)

    def ray(self, places: Sequence[int], direction: np.ndarray, target: float) -> Asks[Ray]:
        """Trial fits along a ray until d reaches ``target``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(direction > 0, self.upper[places], self.lower[places]) - self.popt[places]
            last = float(np.max(np.where(direction != 0, room / direction, 0.0)))  # where bounds have stopped all
        trials, end = [Trial(0.0, 0.0, self.popt, True)], np.inf if last > 0 else 0.0
        for _ in range(MOST_TRIALS):
            r = min(following(trials, target), last)
            if r > FARTHEST * target or r == trials[-1].r:
                break
            known = [each for each in trials if each.success and np.isfinite(each.distance)]
            near = min(known, key=lambda each: abs(each.r - r))
            trials.append((yield from self.trial(places, direction, r, near)))
            if abs(trials[-1].distance - target) <= TOLERANCE * target or (r == last and trials[-1].distance < target):
                return Ray(min(following(trials, target), last), tuple(trials), True)
        if any(not each.distance <= target for each in trials):  # the border is enclosed, though not found exactly
            return Ray(min(following(trials, target), last), tuple(trials), False)
        return Ray(end, tuple(trials), True)


def following(trials: Sequence[Trial], target: float) -> float:
    """Where d may have the size ``target``, by the two trials that are nearest to it; within what is known to enclose it."""
    above = min((each.r for each in trials if not each.distance <= target), default=np.inf)
    below = max(each.r for each in trials if each.distance <= target and each.r < above)
    known = [each for each in trials if np.isfinite(each.distance)]
    if len(known) == 1:
        r = target
    else:
        a, b = sorted(known, key=lambda each: abs(each.distance - target))[:2]
        slope = (b.distance - a.distance) / (b.r - a.r)
        r = a.r + (target - a.distance) / slope if slope > 0 else np.inf
    if np.isfinite(above) and not below < r < above:
        return (below + above) / 2
    return min(r, FASTEST * (below or target))


def _search(problem: _Problem, rays, progress, limit, what: str) -> tuple[list[Ray], int]:
    """Search all rays; how often the data were read for them."""
    result = problem.result
    data, plan, n = result.data, result.plan, len(problem.popt)
    client = active_client() if plan.strategy != "standard" else None
    plan = make_plan(sizes_of(data, n), plan.strategy, limit, client)
    shown = progress or (progress is None and (sys.stderr.isatty() or "ipykernel" in sys.modules))
    with ExitStack() as stack:
        delay = 0 if progress else PROGRESS_DELAY
        bar = stack.enter_context(tqdm(desc=what, unit=" reads", delay=delay, disable=not shown))
        stack.enter_context(attached(client))
        sweep = stack.enter_context(open_sweep(data, plan.strategy, client, plan.n_partitions, keeps=plan.keeps))
        level = (sweep.place.n_runs - 1).bit_length()
        joined = Segmentation.of(data, n)._replace(per_run=1, level=level)  # in blocks as in the fit, so with its kernels
        evaluator = Evaluator(sweep, result.objective, n, joined)
        evaluator.jac_mode = result.jac_mode if result.jac_mode != "user" else "columns"
        evaluator.stop = stack.enter_context(StopOnSignal(False))

        def at(points, reduction):
            bar.set_postfix_str(several(len(points), "fit"), refresh=False)
            found = evaluator.at(points, reduction)
            bar.update()
            return found

        try:
            found = together(at, (problem.ray(*each) for each in rays))
            evaluator.stop.look()  # for a signal that has come after the last read
        except ToldToLeave as stop:
            raise stop.exit from stop
    best = min((trial for ray in found for trial in ray.trials), key=lambda each: each.distance)
    if best.distance < -BETTER:
        values = ", ".join(f"{name}={value:.6g}" for name, value in zip(problem.names, best.params, strict=True))
        warn(
            f"the fit is not at the best optimum: a trial fit ended at a lower cost. Fit again from p0=dict({values})",
            scipy.optimize.OptimizeWarning,
        )
    return found, evaluator.count
