"""Sweeps over the data of all fits of NIST's problems at default tolerances.

`BEFORE` is their sum with the tests of termination of SciPy alone (version 0.1.0, strategy "standard"): what the gate in
standard errors adds must stay small.
"""

from collections.abc import Iterator
from itertools import product

import dask_nlsq
from tests import nist

from .figure import Figure

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
    runs = [*product(nist.PROBLEMS.values(), (0, 1))]
    found = [sweeps(problem, start) for problem, start in runs]
    total, most = sum(n for n, _ in found), int(MOST * BEFORE)
    ranked = sorted(zip(runs, found, strict=True), key=lambda each: -each[1][0])
    lines = [f"{problem.name}, start {k + 1}: {n}{'' if done else ', not converged'}" for (problem, k), (n, done) in ranked]
    met = total <= most
    yield Figure(f"NIST, {len(runs)} runs at default tolerances: sweeps", f"{most}", str(total), met, [] if met else lines)
