"""Generated problems: families of models in all units, from starts that are good, zero, or wrong by orders of magnitude.

A hundred groups of four. A group has a family, its x, and bounds or none; its four problems differ in the unit of y (1e-13
to 1e13), the truth, the noise (1e-4 to 0.1 of the amplitude) and the start. `dask_nlsq.curve_fit` fits each of them, and
`dask_nlsq.fit_map` the four as pixels, with starts and bounds of their own. SciPy has exact derivatives, its default
tolerances, 2000 evaluations.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dask_nlsq.model.function import parameter_names

from .distance import FAR, distance
from .figure import Figure, numbers
from .outcomes import Outcome, best_of_scipy, cost, fitted, fitted_map, jacobian, values

N_GROUPS, TOGETHER = 100, 4
SEED = 2024
SHARE = 0.97  # at or below SciPy's best
SAME = 1e-6  # relative: costs that differ by less are the same
DECADES_OF_Y = 13
OFFSETS = {  # of x, and the least width of its range that float64 still resolves well
    0.0: 1e-3,
    1e3: 1e-3,
    40_587.0: 1e-2,  # a modified Julian date
    2_457_000.5: 1.0,  # a Julian date
    1.7e9: 60.0,  # seconds since 1970
}


class Family(NamedTuple):
    """``f(x, *params)`` with x from 0 to 1 and y of order 1; how its parameters follow the units of x and y.

    ``units``: for each parameter what it is multiplied by, as powers of the unit of y and of the width of x.
    ``places``: the parameters that x's offset is added to.
    """

    f: Callable
    low: tuple[float, ...]  # of the truth
    high: tuple[float, ...]
    units: tuple[tuple[int, int], ...]
    places: tuple[int, ...] = ()
    movable: bool = False  # whether x may have an offset

    @property
    def amplitudes(self) -> np.ndarray:
        return np.array([y_power == 1 for y_power, _ in self.units])


def line(x, a, b):
    return a + b * x


def quadratic(x, a, b, c):
    return a + b * x + c * x**2


def decay(x, a, b):
    return a * jnp.exp(-b * x)


def decay_to_constant(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def growth(x, a, b, c):
    return a * jnp.exp(b * x) + c


def biexponential(x, a1, b1, a2, b2):
    return a1 * jnp.exp(-b1 * x) + a2 * jnp.exp(-b2 * x)


def gaussian(x, h, m, w):
    return h * jnp.exp(-0.5 * ((x - m) / w) ** 2)


def gaussian_on_constant(x, h, m, w, c):
    return gaussian(x, h, m, w) + c


def gaussian_on_line(x, h, m, w, c, d):
    return gaussian(x, h, m, w) + c + d * (x - m)


def lorentzian(x, h, m, w, c):
    return h / (1 + ((x - m) / w) ** 2) + c


def logistic(x, h, m, w):
    return h / (1 + jnp.exp(-(x - m) / w))


def sine(x, a, f, phi, c):
    return a * jnp.sin(2 * jnp.pi * f * x + phi) + c


def power(x, a, b):
    return a * x**b


def michaelis_menten(x, v, k):
    return v * x / (k + x)


Y, PLAIN, X, RATE = (1, 0), (0, 0), (0, 1), (0, -1)
FAMILIES = {
    "line": Family(line, (-2, -2), (2, 2), (Y, (1, -1))),
    "quadratic": Family(quadratic, (-2, -2, -2), (2, 2, 2), (Y, (1, -1), (1, -2))),
    "decay": Family(decay, (1, 1), (5, 8), (Y, RATE)),
    "decay to a constant": Family(decay_to_constant, (1, 2, -1), (5, 8, 1), (Y, RATE, Y)),
    "growth": Family(growth, (0.1, 1, -1), (1, 4, 1), (Y, RATE, Y)),
    "biexponential": Family(biexponential, (1, 8, 1, 0.5), (3, 20, 3, 2), (Y, RATE, Y, RATE)),
    "Gaussian": Family(gaussian, (1, 0.3, 0.05), (5, 0.7, 0.2), (Y, X, X), (1,), True),
    "Gaussian on a constant": Family(gaussian_on_constant, (-5, 0.3, 0.03, -1), (5, 0.7, 0.15, 1), (Y, X, X, Y), (1,), True),
    "Gaussian on a line": Family(
        gaussian_on_line, (1, 0.3, 0.03, -1, -1), (5, 0.7, 0.15, 1, 1), (Y, X, X, Y, (1, -1)), (1,), True
    ),
    "Lorentzian": Family(lorentzian, (1, 0.3, 0.03, -1), (5, 0.7, 0.15, 1), (Y, X, X, Y), (1,), True),
    "logistic": Family(logistic, (1, 0.3, 0.03), (5, 0.7, 0.15), (Y, X, X), (1,), True),
    "sine": Family(sine, (1, 2, -2, -1), (5, 4, 2, 1), (Y, RATE, PLAIN, Y)),
    "power law": Family(power, (1, 0.5), (5, 3), ((1, 0), PLAIN)),
    "Michaelis-Menten": Family(michaelis_menten, (1, 0.1), (5, 1), (Y, X)),
}
SIZES = (100, 200, 500)  # points, one of them for each family: another would be another compilation
STARTS = ("near", "rough", "zero amplitudes", "all amplitudes wrong", "one amplitude wrong", "amplitudes in the wrong unit")


class Problem(NamedTuple):
    label: str
    y: np.ndarray  # (n,)
    truth: np.ndarray  # (p,)
    p0: np.ndarray  # (p,)
    bounds: tuple[np.ndarray, np.ndarray] | None  # (p,) each


class Group(NamedTuple):
    family: Family
    x: np.ndarray  # (n,)
    problems: list[Problem]


def start(rng, family: Family, kind: str, truth, scale, width) -> np.ndarray:
    """(p,) in the units of the data, as ``scale`` has them; places are wrong by parts of the width of x."""
    p, amplitudes = len(truth), family.amplitudes
    spread = 0.6 if kind == "rough" else 0.2
    found = truth * np.exp(rng.normal(0, spread, p))
    for k in family.places:
        found[k] = truth[k] + rng.uniform(-0.5, 0.5) * spread * width
    if kind == "zero amplitudes":
        found[amplitudes] = 0.0
    elif kind == "all amplitudes wrong":
        found[amplitudes] *= 10 ** rng.uniform(-6, 6)
    elif kind == "one amplitude wrong":
        found[rng.choice(np.flatnonzero(amplitudes))] *= 10 ** rng.uniform(-6, 6)
    elif kind == "amplitudes in the wrong unit":
        found[amplitudes] = np.where(rng.random(amplitudes.sum()) < 0.5, 1.0, (scale * 10 ** rng.uniform(-6, 6))[amplitudes])
    return found


def box(rng, family: Family, truth, scale, p0) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (p,) that hold the start, some of them infinite; one box in three cuts the truth off in one parameter."""
    p = len(truth)
    lower, upper = truth - 10 * rng.uniform(0.2, 1, p) * scale, truth + 10 * rng.uniform(0.2, 1, p) * scale
    positive = np.array([low > 0 for low in family.low])
    positive[list(family.places)] = False
    lower[positive] = 0.0
    lower, upper = np.where(rng.random(p) < 0.3, -np.inf, lower), np.where(rng.random(p) < 0.3, np.inf, upper)
    lower, upper = np.minimum(lower, p0), np.maximum(upper, p0)
    if rng.random() < 1 / 3:
        k = rng.integers(p)
        upper[k] = truth[k] - 0.02 * scale[k]
        lower[k] = min(lower[k], upper[k] - 0.1 * scale[k])
        p0[k] = min(max(p0[k], lower[k]), upper[k])
    return lower, upper


@cache
def group(number: int) -> Group:
    rng = np.random.default_rng([SEED, number])
    name, family = [*FAMILIES.items()][number % len(FAMILIES)]
    bounded, n = number // len(FAMILIES) % 2 == 1, SIZES[number % len(FAMILIES) % len(SIZES)]
    offset = float(rng.choice([*OFFSETS])) if family.movable else 0.0
    width = max(10 ** rng.uniform(-3, 3), OFFSETS[offset])
    x = offset + width * np.linspace(0.005, 1, n)
    problems = []
    for k in range(TOGETHER):
        unit, noise = 10 ** rng.uniform(-DECADES_OF_Y, DECADES_OF_Y), 10 ** rng.uniform(-4, -1)
        plain = rng.uniform(family.low, family.high)
        scale = np.array([unit**a * width**b for a, b in family.units])
        if family.f is power:  # y = a x^b where x = width u: a = y / width^b
            scale[0] /= width ** plain[1]
        truth = plain * scale
        truth[list(family.places)] += offset
        y = values(family.f, x, truth) + noise * unit * rng.standard_normal(n)
        kind = STARTS[rng.integers(len(STARTS))]
        p0 = start(rng, family, kind, truth, scale, width)
        label = f"{number}.{k} {name}, n {n}, unit {unit:.1g}, x from {offset:.8g} over {width:.2g}, {kind}"
        bounds = box(rng, family, truth, scale, p0) if bounded else None
        problems.append(Problem(f"{label}{', bounds' if bounded else ''}", y, truth, p0, bounds))
    return Group(family, x, problems)


# ---------------------------------------------------------------------------------------------------------------------
# the fits


def single_fits(found: Group) -> list[Outcome]:
    outcomes = []
    for each in found.problems:
        options = {} if each.bounds is None else {"bounds": each.bounds}
        outcomes.append(fitted(found.family.f, found.x, each.y, each.p0, **options))
    return outcomes


def fits_of_pixels(found: Group) -> list[Outcome]:
    problems, options = found.problems, {}
    if problems[0].bounds is not None:
        lower, upper = (np.stack([each.bounds[side] for each in problems]) for side in (0, 1))
        options["bounds"] = {name: (lower[:, k], upper[:, k]) for k, name in enumerate(parameter_names(found.family.f))}
    y, p0 = np.stack([each.y for each in problems]), np.stack([each.p0 for each in problems])
    return fitted_map(found.family.f, found.x, y, p0, **options)


def from_stationary(found: Group, problem: Problem, params) -> float:
    """Distance, in standard errors."""
    f, x = found.family.f, found.x
    with np.errstate(all="ignore"):
        return distance(jacobian(f, x, params), values(f, x, params) - problem.y, params, problem.bounds)


# ---------------------------------------------------------------------------------------------------------------------
# the figures


class Ended(NamedTuple):
    group: Group
    problem: Problem
    outcome: Outcome

    def __str__(self):
        return f"{self.problem.label}: {self.outcome}, at {numbers(self.outcome.params)} from {numbers(self.problem.p0)}"


def fits(groups: list[Group], way) -> list[Ended]:
    return [
        Ended(each, problem, outcome) for each in groups for problem, outcome in zip(each.problems, way(each), strict=True)
    ]


def silently_off(name: str, ended: list[Ended]) -> Figure:
    off = []
    for each in ended:
        if each.outcome.silent:
            far = from_stationary(each.group, each.problem, each.outcome.params)
            if not far <= FAR:
                off.append(f"{each}: {far:.3g} s.e. off")
    return Figure(f"{name}: silently over {FAR} s.e. from a stationary point", "0", str(len(off)), not off, off)


def not_above_scipy(name: str, ended: list[Ended], required: str = f"{SHARE:.0%}") -> Figure:
    above = []
    for each in ended:
        f, x, (_, y, _, p0, bounds) = each.group.family.f, each.group.x, each.problem
        best, ours = best_of_scipy(f, x, y, p0, bounds), cost(f, x, y, each.outcome.params)
        allowed = max(SAME, FAR**2 / (len(x) - len(p0)))  # d^2 s2 / 2, s2 = 2 cost / dof
        if not ours <= best * (1 + allowed) and np.isfinite(best):
            above.append(f"{each}: cost {ours:.6g}, SciPy's {best:.6g}")
    share = 1 - len(above) / len(ended)
    return Figure(f"{name}: at or below the best of SciPy lm and trf", required, f"{share:.1%}", share >= SHARE, above)


def figures(quick: bool = False) -> Iterator[Figure]:
    groups = [group(number) for number in range(0, N_GROUPS, 10 if quick else 1)]
    total = TOGETHER * len(groups)
    single = fits(groups, single_fits)
    yield silently_off(f"{total} generated, curve_fit", single)
    yield not_above_scipy(f"{total} generated, curve_fit", single)
    pixels = fits(groups, fits_of_pixels)
    yield silently_off(f"{total} generated, fit_map", pixels)
    yield not_above_scipy(f"{total} generated, fit_map", pixels, required="")
    failed = [str(each) for each in pixels if not each.outcome.success]
    yield Figure(f"{total} generated, fit_map: pixels that are no success", "", str(len(failed)), not failed, failed)
