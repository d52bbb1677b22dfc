"""Messages of fits that do not converge, or cannot begin."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from ..data.chunks import LARGEST
from ..engine.checkpoint import Checkpoint, keep_end
from ..engine.evaluator import Evaluator
from ..engine.waiting import StopOnSignal
from ..model.function import function_name
from .trust_region import INTERRUPTED, MESSAGES, Solution

logger = logging.getLogger("dask_nlsq")
RUNAWAY = 1e4  # condition: of exponentials and peaks that the data determine it is at most some 1000
R = TypeVar("R", bound=Any)  # `FitResult` or `GroupResult`

WAY_OUT = (
    "Start from other values, or raise max_nfev; a model with steps or corners has no optimum that derivatives can find. "
    "accuracy=None takes what SciPy's tests accept."
)


class NotConvergedError(RuntimeError):
    """Not converged within ``max_nfev``; ``result`` is the best `FitResult` so far, whose ``success`` is false."""

    def __init__(self, message: str, result):
        super().__init__(message, result)
        self.result = result

    def __str__(self):
        return self.args[0]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; ``result`` is the best result so far, with status -3, or that of a fit that had just ended."""

    def __init__(self, result):
        super().__init__("Ctrl-C: the best point so far is in the `result` of this exception")
        self.result = result


def after_signal(result: R, stop: StopOnSignal, checkpoint: Checkpoint | None, change: Callable[..., R]) -> R:
    """The result; after a signal raise `Interrupted`, or with a checkpoint let the status say so, and log where it is.

    The checkpoint of a fit that has converged says so.

    A signal may have come when the fit had just ended by itself, and must not be lost: then ``change(status=, message=)``.
    """
    if stop.signal is None:
        if checkpoint is not None and result.success:
            keep_end(checkpoint, result.message)
        return result
    if checkpoint is None:
        raise Interrupted(result)
    if result.status != INTERRUPTED:
        result = change(status=INTERRUPTED, message=f"{MESSAGES[INTERRUPTED]} The fit had just ended: {result.message}")
    logger.warning("%s Completed sweeps are in %s, for `resume`", result.message, checkpoint.path)
    return result


def not_converged(solution: Solution, names):
    at = ", ".join(f"{name}={value:.6g}" for name, value in zip(names, solution.params, strict=True))
    return (
        f"Optimal parameters not found: {solution.message} {solution.nfev} were made in all; the best so far has cost "
        f"{solution.equations.cost:.6g} at {at}. {_what_helps(solution.factor.condition)}"
    )


def _what_helps(condition: float) -> str:
    """Advice to those whose evaluations are exhausted; ``condition`` is that of J, with columns of norm 1."""
    if condition <= RUNAWAY:
        return "Raise max_nfev, start from there, or loosen ftol, xtol and gtol"
    return (
        f"There the data hardly tell the parameters apart (condition {condition:.1g}), as in a valley that leads to "
        "infinity: more evaluations would only go on in it. Start from other values, as n_starts of curve_fit does, or set "
        "bounds"
    )


def not_finite_at_start(evaluator: Evaluator, start, names):
    model = evaluator.objective.model
    bad = [(index, count) for index, count in evaluator.sweep.not_finite(evaluator.request(start)) if count]
    at = ", ".join(f"{name}={value:.6g}" for name, value in zip(names, start, strict=True))
    if not bad:
        return (
            f"the derivatives of {function_name(model.f)} are not finite in the initial point p0: {at}. Start from other "
            "values, or write the model so that it is differentiable there (jnp.where around both value and argument)"
        )
    total = sum(count for _, count in bad)
    return (
        f"Residuals are not finite in the initial point: {function_name(model.f)} gives nan or infinity, or more than "
        f"{LARGEST**2:g} times sigma, for {total} points (first in block {bad[0][0]}) at p0: {at}. Start from other values, "
        "or set bounds that keep the model finite"
    )
