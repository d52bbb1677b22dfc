"""Messages of fits that do not converge, or cannot begin."""

import logging

from ..data.chunks import LARGEST
from ..engine.checkpoint import Checkpoint
from ..engine.evaluator import Evaluator
from ..engine.waiting import StopOnSignal
from ..model.function import function_name
from .trust_region import INTERRUPTED, Solution

logger = logging.getLogger("dask_nlsq")

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


def interrupted(result, stop: StopOnSignal, checkpoint: Checkpoint | None) -> None:
    """Raise `Interrupted` after a signal; with a checkpoint, log where it is."""
    if checkpoint is None and stop.signal is not None:
        raise Interrupted(result)
    if checkpoint is not None and result.status == INTERRUPTED:
        logger.warning("%s Completed sweeps are in %s, for `resume`", result.message, checkpoint.path)


def not_converged(solution: Solution, names):
    at = ", ".join(f"{name}={value:.6g}" for name, value in zip(names, solution.params, strict=True))
    return (
        f"Optimal parameters not found: {solution.message} {solution.nfev} were made in all; the best so far has cost "
        f"{solution.equations.cost:.6g} at {at}. Raise max_nfev, start from there, or loosen ftol, xtol and gtol"
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
