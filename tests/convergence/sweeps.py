"""Sweeps over the data of the fits of NIST's problems at default tolerances.

Of the 54 runs two need more than the evaluations that are allowed by default, and end there: `LEFT_OUT`. `BEFORE` is the
sum over the other 52 where fits end by SciPy's tests alone (version 0.1.0, NumPy arrays, one process of two threads): what
the gate in standard errors adds must stay small.
"""

from collections.abc import Iterator
from itertools import product

import dask_nlsq
from tests import nist

from .figure import Figure

LEFT_OUT = {("MGH17", 0), ("Bennett5", 0)}
BEFORE = 1432
MOST = 1.05  # of them


def sweeps(problem: nist.Problem, start: int) -> tuple[int, bool]:
    """Of one fit, and whether it converged."""
    try:
        fit = dask_nlsq.curve_fit(problem.model, problem.x, problem.y, p0=problem.starts[start])
    except dask_nlsq.NotConvergedError as err:
        fit = err.result
    return fit.sweeps, fit.success


def figures(quick: bool = False) -> Iterator[Figure]:
    """All of them in a quick run too: they take seconds."""
    found = {
        (problem.name, start): sweeps(problem, start)
        for problem, start in product(nist.PROBLEMS.values(), (0, 1))
        if (problem.name, start) not in LEFT_OUT
    }
    total, most = sum(n for n, _ in found.values()), int(MOST * BEFORE)
    ranked = sorted(found.items(), key=lambda each: -each[1][0])
    lines = [f"{name}, start {start + 1}: {n}{'' if done else ', not converged'}" for (name, start), (n, done) in ranked]
    met = total <= most
    yield Figure(f"NIST, {len(found)} runs at default tolerances: sweeps", f"{most}", str(total), met, [] if met else lines)
