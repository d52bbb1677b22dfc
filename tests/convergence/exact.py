"""Data without noise: 40 models, all ready ones among them, are to converge to the parameters that made the data.

Starts are 20 % above and 15 % below the truth in turn, or as listed. A fit counts as a success without any warning whose
parameters are right to `DIGITS`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dask_nlsq import models
from dask_nlsq.models import polynomial

from .figure import Figure, numbers
from .outcomes import fitted, values

DIGITS = 1e-6  # relative, of each parameter
WRONG_BY = (1.2, 0.85)


class Case(NamedTuple):
    f: Callable
    truth: tuple[float, ...]
    x: np.ndarray = np.linspace(0.1, 10, 200)
    p0: tuple[float, ...] | None = None


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def dip_on_a_date(t, depth, m, w, c):
    return c - depth * jnp.exp(-0.5 * ((t - m) / w) ** 2)


def michaelis_menten(x, v, k):
    return v * x / (k + x)


def hill(x, v, k, n):
    return v * x**n / (k**n + x**n)


def logistic_growth(x, k, r, m):
    return k / (1 + jnp.exp(-r * (x - m)))


def gompertz(x, a, b, c):
    return a * jnp.exp(-b * jnp.exp(-c * x))


def rational(x, a, b, c):
    return (a + b * x) / (1 + c * x)


def arrhenius(temperature, a, energy):
    return a * jnp.exp(-energy / (8.314 * temperature))


def sine(x, a, f, phi, c):
    return a * jnp.sin(2 * jnp.pi * f * x + phi) + c


def damped_pair(x, a, b, w):
    return jnp.exp(-b * x) * (a * jnp.cos(w * x) + jnp.sin(w * x))


LOGS = np.geomspace(1e-2, 1e2, 200)
DATES = 2_457_000.5 + np.linspace(0, 1, 400)
m = models
CASES = {
    "constant": Case(polynomial(0), (3,)),
    "polynomial 1": Case(polynomial(1), (3, -2)),
    "polynomial 2": Case(polynomial(2), (3, -2, 0.5)),
    "polynomial 4": Case(polynomial(4), (3, -2, 0.5, 0.1, -0.02)),
    "line": Case(m.line, (2, 3)),
    "exponential": Case(m.exponential, (3, 0.4)),
    "exponential growth": Case(m.exponential, (2, -0.2)),
    "stretched exponential": Case(m.stretched_exponential, (3, 0.4, 0.7)),
    "power law": Case(m.power_law, (2, 1.5)),
    "Porod's law": Case(m.power_law, (2e-3, -4), np.linspace(1, 10, 200)),
    "Gaussian": Case(m.gaussian, (5, 4, 0.8)),
    "Gaussian dip in units of 1e-12": Case(m.gaussian, (-5e-12, 4, 0.8)),
    "Lorentzian": Case(m.lorentzian, (5, 4, 0.8)),
    "Lorentzian in units of 1e12": Case(m.lorentzian, (5e12, 4, 0.8)),
    "pseudo-Voigt": Case(m.pseudo_voigt, (5, 4, 1.5, 0.3)),
    "Voigt": Case(m.voigt, (5, 4, 0.6, 0.4)),
    "Moffat": Case(m.moffat, (5, 4, 1, 2)),
    "sigmoid": Case(m.sigmoid, (3, 5, 0.7)),
    "arctan edge": Case(m.arctan_edge, (3, 5, 0.7)),
    "damped sine": Case(m.damped_sine, (2, 0.5, 0.4, 0.2), p0=(1, 0.48, 0, 0.1)),
    "g2, single": Case(m.g2_single, (1, 0.3, 0.5, 1.2), LOGS),
    "g2, double": Case(m.g2_double, (1, 0.3, 2, 1, 0.1, 1.2, 0.6), LOGS),
    "Gaussian + line": Case(m.gaussian + m.line, (5, 4, 0.8, 0.3, 1)),
    "Gaussian + polynomial 2": Case(m.gaussian + polynomial(2), (5, 4, 0.8, 1, -0.4, 0.1)),
    "Lorentzian + constant": Case(m.lorentzian + polynomial(0), (5, 4, 0.8, 1)),
    "two Gaussians": Case(m.gaussian + m.gaussian, (5, 3, 0.8, 3, 7, 1), p0=(4, 3.3, 0.9, 4, 6.6, 0.8)),
    "exponential + constant": Case(m.exponential + polynomial(0), (3, 0.4, 1)),
    "two exponentials": Case(m.exponential + m.exponential, (3, 2, 2, 0.2)),
    "sigmoid + line": Case(m.sigmoid + m.line, (3, 5, 0.7, 0.2, 1)),
    "decay in units of 1e-9": Case(decay, (3e-9, 0.4, 1e-9)),
    "decay in units of 1e9": Case(decay, (3e9, 0.4, 1e9)),
    "dip on a Julian date": Case(dip_on_a_date, (0.01, 2_457_000.93, 0.03, 1), DATES, (0.02, 2_457_000.95, 0.05, 1)),
    "Michaelis-Menten, micromolar": Case(michaelis_menten, (3e-6, 2e-6), 1e-6 * np.linspace(0.1, 10, 100)),
    "Hill": Case(hill, (3, 4, 2)),
    "logistic growth to 1e6": Case(logistic_growth, (1e6, 1.2, 5)),
    "Gompertz": Case(gompertz, (3, 4, 0.6)),
    "rational": Case(rational, (1, 2, 0.5)),
    "Arrhenius": Case(arrhenius, (1e13, 8e4), np.linspace(300, 600, 100), (0.9e13, 8.1e4)),
    "sine": Case(sine, (2, 0.3, 0.5, 1), p0=(1, 0.31, 0.2, 0)),
    "damped pair": Case(damped_pair, (2, 0.3, 1.5)),
}


def start(case: Case) -> np.ndarray:
    """(p,)"""
    if case.p0 is not None:
        return np.array(case.p0, dtype=float)
    return np.array(case.truth) * np.resize(WRONG_BY, len(case.truth))


def figures(quick: bool = False) -> Iterator[Figure]:
    failures, cases = [], [*CASES.items()][:: 10 if quick else 1]
    for name, case in cases:
        truth = np.array(case.truth, dtype=float)
        p0 = start(case)
        outcome = fitted(case.f, case.x, values(case.f, case.x, truth), p0)
        wrong = float(np.max(np.abs(outcome.params / truth - 1)))
        if not (outcome.silent and wrong <= DIGITS):
            failures.append(f"{name}: {outcome}, wrong by {wrong:.2g}, at {numbers(outcome.params)} from {numbers(p0)}")
    right = len(cases) - len(failures)
    yield Figure("data without noise: success at the exact parameters", str(len(cases)), str(right), not failures, failures)
