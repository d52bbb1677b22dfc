"""Random starts: how many reach the optimum, beside SciPy's "lm" and "trf".

Starts are wide, since a narrow spread tells nothing apart. With z normal, of one seed for each model, they are

* growth: ``10 ** (0.4 z)``, around ones, whatever the truth is: b = 1 stands for exp(30) at the last point;
* power and Gaussian: the truth times ``10 ** (0.65 z)`` and ``10 ** (0.2 z)``;
* decay: the truth times ``1 + 3 z``, so that signs differ too.

The optimum is where "lm" ends from the truth. A start reaches it whose cost is no more than 1e-6 above, relatively.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .figure import Figure, numbers
from .outcomes import by_scipy, cost, fitted, values

N_STARTS = 60
SEED = 16
REACHED = 1e-6  # relative to the lowest cost


class Case(NamedTuple):
    f: Callable
    x: np.ndarray  # (n,)
    truth: np.ndarray  # (p,)
    noise: float
    start: Callable  # (truth, z) -> (p,)


def growth(x, a, b, c):
    return a * jnp.exp(b * x) + c


def power(x, a, b, c):
    return a * x**b + c


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def gaussian(x, a, m, w):
    return a * jnp.exp(-0.5 * ((x - m) / w) ** 2)


CASES = {
    "growth a exp(b x) + c": Case(
        growth, np.linspace(0, 30, 200), np.array([2, 0.05, 1]), 0.02, lambda truth, z: 10 ** (0.4 * z)
    ),
    "power a x^b + c": Case(
        power, np.linspace(0.1, 10, 200), np.array([2, 1.5, 1]), 0.1, lambda truth, z: truth * 10 ** (0.65 * z)
    ),
    "decay a exp(-b x) + c": Case(
        decay, np.linspace(0, 5, 200), np.array([3, 1.3, 0.5]), 0.02, lambda truth, z: truth * (1 + 3 * z)
    ),
    "Gaussian": Case(
        gaussian, np.linspace(0, 10, 200), np.array([5, 4, 0.8]), 0.05, lambda truth, z: truth * 10 ** (0.2 * z)
    ),
}


def figures(quick: bool = False) -> Iterator[Figure]:
    n = N_STARTS // 10 if quick else N_STARTS
    for name, (f, x, truth, noise, start) in CASES.items():
        rng = np.random.default_rng(SEED)
        y = values(f, x, truth) + noise * rng.standard_normal(len(x))
        least = cost(f, x, y, by_scipy("lm", f, x, y, truth))
        ours, lm, trf, missed = 0, 0, 0, []
        for k in range(n):
            p0 = start(truth, rng.standard_normal(len(truth)))
            outcome = fitted(f, x, y, p0)
            ends = {method: cost(f, x, y, by_scipy(method, f, x, y, p0)) for method in ("lm", "trf")}
            by_lm, by_trf = (end <= least * (1 + REACHED) for end in ends.values())
            reached = cost(f, x, y, outcome.params) <= least * (1 + REACHED)
            ours, lm, trf = ours + reached, lm + by_lm, trf + by_trf
            if not reached and (by_lm or by_trf):
                others = " and ".join(method for method, found in (("lm", by_lm), ("trf", by_trf)) if found)
                missed.append(
                    f"start {k}, {numbers(p0)}: {outcome}, at {numbers(outcome.params)}; {others} reach the optimum"
                )
        best = max(lm, trf)
        measured = f"{ours} (SciPy lm {lm}, trf {trf})"
        yield Figure(f"{name}: of {n} random starts at the optimum", str(best), measured, ours >= best, missed)
