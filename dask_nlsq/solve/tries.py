"""Other tries where a fit from p0 does not converge: amplitudes that are far off throw the other parameters away.

A first try pauses where it creeps. A second one begins where the parameters in which the model is linear have been solved
for on a sample. If it fails too, the first one goes on. Which solution counts says `rules.is_better`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..base.text import several
from ..data.sample import NoSample, sample_size
from ..engine.evaluator import Evaluator
from ..engine.waiting import ToldToLeave
from ..kernels.rules import STUCK, UNDETERMINED, is_better, rounding_of_chi2
from ..kernels.steps import Point
from ..kernels.tries import FIRST, FIRST_PER_PARAM
from .multistart import separated
from .trust_region import MESSAGES, Begin, Loop, NotFiniteAtStart, Options, Record, Solution

logger = logging.getLogger("dask_nlsq")
FAILED = (0, STUCK, UNDETERMINED)  # statuses
LAST, HARDLY, MUCH = 10, 0.1, 0.2  # evaluations that have lowered the cost by less than a share, of which another could go
LINEAR_FIRST = "from p0 with its linear parameters solved for"


def fit_in_tries(evaluator: Evaluator, p0: np.ndarray, options: Options, begin: Begin) -> Solution:
    """The fit from ``p0`` (p,), by the loop ``begin(evaluator, start, options)``, or by another one.

    The solution has the evaluations of both. With a given ``max_nfev`` the first try does not pause, and a second one has
    the rest.
    """
    seen: list[Record] = []

    def observe(record: Record) -> None:
        seen.append(record._replace(iteration=len(seen), nfev=len(seen) + 1))
        if options.callback is not None:
            options.callback(seen[-1])

    loop = Loop(begin(evaluator, p0, replace(options, callback=observe)), evaluator)
    first = loop.go_on(FIRST + FIRST_PER_PARAM * len(p0) if options.max_nfev is None else np.inf)
    if first is None and not creeps(loop.here, [each.cost for each in seen]):
        first = loop.end()
    if first is not None and first.status not in FAILED:
        return first
    n_first, left = len(seen), None if options.max_nfev is None else options.max_nfev - len(seen)
    n_points = (loop.here.model.equations if first is None else first.equations).n_points
    start = None if left == 0 else _start(evaluator, p0, options, n_points)
    if start is None:
        return first or loop.end()
    logger.info("not converged from p0: another fit begins with its linear parameters solved for")
    try:
        second = Loop(begin(evaluator, start, replace(options, callback=observe, max_nfev=left)), evaluator).end()
    except NotFiniteAtStart:
        return first or loop.end()
    except ToldToLeave as stop:
        return loop.leave(stop) if first is None else first._replace(status=-3, message=MESSAGES[-3])
    n_second = len(seen) - n_first
    if first is None and _succeeded(second) and _is_better(seen[n_first - 1].cost, False, second):
        return second._replace(message=_since(second, n_first), nfev=len(seen), history=seen)
    if first is None:
        first = loop.leave(ToldToLeave(0)) if second.status < 0 else loop.end()
    found, message = first, f"{first.message} A second try, {LINEAR_FIRST}, was no better after {n_second:,} more."
    if _is_better(first.equations.cost, _succeeded(first), second):
        found, message = second, _since(second, first.nfev)
    stopped = next((each for each in (second, first) if each.status < 0), None)
    if stopped is not None:
        found, message = found._replace(status=stopped.status), stopped.message
    return found._replace(message=message, nfev=len(seen), history=seen)


def creeps(here: Point, costs: Sequence[float]) -> bool:
    """Whether the cost has hardly changed, although by the quadratic model ``here`` much of it could vanish."""
    return here.decrement > MUCH * here.cost and here.cost > (1 - HARDLY) * costs[-1 - LAST]


def _succeeded(found: Solution) -> bool:
    return found.status > 0 and found.status not in FAILED


def _is_better(cost: float, succeeded: bool, second: Solution) -> bool:
    rounding = rounding_of_chi2(np, second.equations.size)
    return bool(is_better(np, 2 * cost, succeeded, 2 * second.equations.cost, _succeeded(second), rounding))


def _since(second: Solution, n_first: int) -> str:
    since = f", since the fit from p0 itself had not converged in {several(n_first, 'evaluation')}."
    return f"{second.message} F{LINEAR_FIRST[1:]}{since}"


def _start(evaluator: Evaluator, p0: np.ndarray, options: Options, n_points: int) -> np.ndarray | None:
    """Where a second try begins; None where there is no such place."""
    try:
        sample = evaluator.sweep.points(sample_size(len(p0)))
    except NoSample:
        return None
    assert evaluator.weights is not None  # as after each sweep over all data
    mean = evaluator.weights[:, 2].sum() / n_points
    start = separated(evaluator.objective, sample, p0, options.lower, options.upper, mean)
    return None if start is None or np.array_equal(start, p0) else start
