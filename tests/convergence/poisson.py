"""Counts under a peak on a sloping background: fits that a step into a negative mean can trap.

    f = b + m t + q t^2 + a exp(-((x - c) / s)^2 / 2),  t = (x - 5) / 5,  400 points from 0 to 10,

counts of (a, c, s, b, m, q) = (3000, 5, .3, 20, 5, -5). The 27 starts have a third, one and three times the height, the
centre of the peak half a width to the left, right, or on its spot, and half, one and twice its width, above a background
of 10; they share the counts of seed 0. The 50 seeds of noise share the start [1000, 5, .2, 10, 0, 0].

The best known point is where a fit from the truth ends, or any of these fits. A fit is off where half its deviance is
more than `OFF` above, and silently so where it is a success that no warning goes with.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .figure import Figure, numbers
from .outcomes import Outcome, fitted, fitted_map, values

X = np.linspace(0, 10, 400)
TRUTH = np.array([3000, 5, 0.3, 20, 5, -5])
START = np.array([1000, 5, 0.2, 10, 0, 0])
OFF = 0.5  # of half the deviance: one standard error
FLOOR = 1e-10  # of the mean, as in the package
N_SEEDS = 50


class Counts(NamedTuple):
    label: str
    y: np.ndarray  # (n,)
    p0: np.ndarray  # (p,)


def peak(x, a, c, s, b, m, q):
    t = (x - 5) / 5
    return b + m * t + q * t**2 + a * jnp.exp(-(((x - c) / s) ** 2) / 2)


def counts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(values(peak, X, TRUTH)).astype(float)


def problems() -> list[Counts]:
    grid = product((1 / 3, 1, 3), (-0.5, 0, 0.5), (0.5, 1, 2))
    starts = [np.array([3000 * a, 5 + 0.3 * c, 0.3 * s, 10, 0, 0]) for a, c, s in grid]
    return [Counts(f"start {k}", counts(0), p0) for k, p0 in enumerate(starts)] + [
        Counts(f"seed {seed}", counts(seed), START) for seed in range(N_SEEDS)
    ]


def half_deviance(y, mean) -> float:
    """Where the mean is not positive, points without counts cost nothing and others the most."""
    mean = np.maximum(mean, FLOOR)
    some = np.where(y > 0, y, 1.0)
    return float(np.sum(mean - y + np.where(y > 0, y * np.log(some / mean), 0.0)))


def singly(**options) -> Callable[[list[Counts]], list[Outcome]]:
    return lambda all_counts: [fitted(peak, X, y, p0, **options) for _, y, p0 in all_counts]


def as_pixels(all_counts: list[Counts]) -> list[Outcome]:
    y, p0 = np.stack([each.y for each in all_counts]), np.stack([each.p0 for each in all_counts])
    return fitted_map(peak, X, y, p0, loss="poisson")


WAYS = {
    "curve_fit": singly(loss="poisson"),
    "chunked": singly(loss="poisson", strategy="chunked"),
    'sigma="poisson"': singly(sigma="poisson"),
    "fit_map": as_pixels,
}


def figures(quick: bool = False) -> Iterator[Figure]:
    cases = problems()[:: 10 if quick else 1]
    ended = {way: fit(cases) for way, fit in WAYS.items()}
    found = {way: deviances(cases, outcomes) for way, outcomes in ended.items()}
    from_truth = WAYS["curve_fit"]([each._replace(p0=TRUTH) for each in cases])
    best = np.min([deviances(cases, from_truth), *found.values()], axis=0)
    for way, outcomes in ended.items():
        off = ~(found[way] <= best + OFF)
        silent = off & [outcome.silent for outcome in outcomes]
        lines = [
            f"{case.label}: half the deviance {reached:.6g} for {least:.6g}; {outcome}, "
            f"at {numbers(outcome.params)} from {numbers(case.p0)}"
            for case, outcome, reached, least in zip(cases, outcomes, found[way], best, strict=True)
        ]
        label, n_silent = f"{len(cases)} Poisson fits, {way}", int(silent.sum())
        yield Figure(f"{label}: ended silently off", "0", str(n_silent), not n_silent, chosen(lines, silent))
        yield Figure(f"{label}: at the optimum", "", str(int((~off).sum())), not off.any(), chosen(lines, off & ~silent))


def deviances(cases: list[Counts], outcomes: list[Outcome]) -> np.ndarray:
    """Halves of them, of each fit."""
    return np.array(
        [half_deviance(case.y, values(peak, X, outcome.params)) for case, outcome in zip(cases, outcomes, strict=True)]
    )


def chosen(lines: list[str], which) -> list[str]:
    return [line for line, wanted in zip(lines, which, strict=True) if wanted]
