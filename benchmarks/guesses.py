"""How often a fit from the guess of a ready model reaches the optimum: ``python -m benchmarks.guesses [model ...]``.

200 data sets of 200 points for each model, with x ranges, parameters and noise drawn anew for each (`CASES`). The optimum
is reached where the cost is not above that of the fit which starts at the true parameters, within 1e-6 of it.
"""

import sys
from math import pi

import jax
import numpy as np

from dask_nlsq import fit_map
from dask_nlsq.base.x64 import float64
from dask_nlsq.models import (
    arctan_edge,
    damped_sine,
    exponential,
    g2_double,
    g2_single,
    gaussian,
    line,
    lorentzian,
    moffat,
    polynomial,
    power_law,
    pseudo_voigt,
    sigmoid,
    stretched_exponential,
    voigt,
)

N_SETS, N_POINTS = 200, 200
NOISE = 0.01, 0.10  # standard deviation, of the height of the signal; of the smaller of two
DECADES = {"log": (0.5, 2.5), "delays": (3.5, 5)}  # that x spans where its points are even on the logarithm
REACHED = 1e-6  # relative, of the cost


class Draw:
    """Random parameters for data on x from ``begin`` to ``begin + length``."""

    def __init__(self, rng, begin, length):
        self.rng, self.begin, self.length = rng, begin, length

    def between(self, low, high):
        return self.rng.uniform(low, high)

    def decades(self, low, high):
        return np.exp(self.rng.uniform(np.log(low), np.log(high)))

    def height(self):
        return self.decades(0.1, 1e4)

    def signed(self):
        return self.height() * self.rng.choice([-1.0, 1.0])

    def place(self):
        return self.begin + self.length * self.between(0.1, 0.9)

    def width(self, low=0.01, high=0.15):
        """Standard deviation of a peak: from 2 points to one that fills the data."""
        return self.length * self.decades(low, high)

    def parabola(self, height, degree=2):
        """Level, slope and curvature about the middle, of either sign and up to twice the height of the signal."""
        c = np.polynomial.Polynomial(height * self.rng.uniform(-2, 2, degree + 1), self.domain())
        c = c.convert().coef
        return [*c, *[0.0] * (degree + 1 - len(c))]

    def domain(self):
        return [self.begin, self.begin + self.length]

    def line(self, height):
        return self.parabola(height, 1)[::-1]


def peak(d):
    return [d.signed(), d.place(), d.width()]


def two_peaks(d):
    """Positive ones of unlike height and width, at least two of their widths apart."""
    height = d.height()
    one, two = ([height * d.decades(0.3, 1), d.place(), d.width(0.01, 0.06)] for _ in range(2))
    while abs(two[1] - one[1]) < 2 * (one[2] + two[2]):
        one[1], two[1] = d.place(), d.place()
    return [*one, *two]


def overlapping(d):
    """Positive ones, the second on the flank of the first, or hidden in it."""
    height, place, width = d.height(), d.place(), d.width(0.02, 0.08)
    other = width * d.decades(0.4, 2.5)
    apart = d.rng.choice([-1, 1]) * d.between(0.75, 1.9) * (width + other)
    return [height, place, width, height * d.decades(0.15, 1), place + apart, other]


def voigt_peak(d):
    (height, place, width), share = peak(d), d.between(0.05, 0.95)
    return [2.5 * height * width, place, width * (1 - share), 1.2 * width * share]


def of_width(factor, *ranges):
    """A peak whose width parameter is ``factor`` times the standard deviation of a Gaussian of the same fwhm."""

    def parameters(d):
        height, place, width = peak(d)
        return [height, place, factor * width, *(d.between(*each) for each in ranges)]

    return parameters


def step(d):
    """A rise or a fall within 1 to 60 % of the data."""
    return [d.signed(), d.place(), d.width(0.003, 0.15)]


def sine(d):
    """3 to 60 periods over all data, of which the damping leaves from all to a few."""
    frequency = d.decades(3, 60) / d.length
    return [d.height(), frequency, d.between(-pi, pi), min(d.decades(0.1, 10) / d.length, frequency / 1.5)]


def two_relaxations(d):
    fast = d.decades(100, 2000) / d.length
    slow = fast / d.decades(8, 100)
    rates = fast, d.between(0.7, 1.5), slow, d.between(0.7, 1.5)
    return [d.between(0.95, 1.1), d.decades(0.05, 0.5), *rates, d.between(0.25, 0.75)]


def beside(parameters, background):
    """With a background as high as the highest peak or step."""

    def both(d):
        own = parameters(d)
        return [*own, *background(d, abs(own[0]))]

    return both


# name: (model, how x runs, parameters, height of the signal that noise is relative to)
def first(params):
    return abs(params[0])


def smaller(params):
    return min(params[0], params[3])


BANDS = "any", beside(overlapping, Draw.line), smaller
CASES = {
    "line": (line, "any", lambda d: d.line(d.height()), None),
    "polynomial(3)": (polynomial(3), "any", lambda d: d.parabola(d.height(), 3), None),
    "exponential": (exponential, "from 0", lambda d: [d.signed(), d.decades(0.3, 30) / d.length], first),
    "exponential, growing": (exponential, "from 0", lambda d: [d.signed(), -d.between(0.3, 8) / d.length], None),
    "stretched_exponential": (
        stretched_exponential,
        "from 0",
        lambda d: [d.height(), d.decades(1, 50) / d.length, d.between(0.4, 1.8)],
        first,
    ),
    "power_law": (power_law, "log", lambda d: [d.signed() * d.length ** -(e := d.between(-4, 4)), e], None),
    "gaussian": (gaussian, "any", peak, first),
    "lorentzian": (lorentzian, "any", of_width(1.2), first),
    "pseudo_voigt": (pseudo_voigt, "any", of_width(2.35, (0, 1)), first),
    "voigt": (voigt, "any", voigt_peak, lambda p: abs(p[0]) / (2.5 * (p[2] + p[3]))),
    "moffat": (moffat, "any", of_width(1.8, (1, 4)), first),
    "sigmoid": (sigmoid, "any", step, first),
    "arctan_edge": (arctan_edge, "any", step, first),
    "damped_sine": (damped_sine, "from 0", sine, first),
    "g2_single": (
        g2_single,
        "delays",
        lambda d: [d.between(0.95, 1.1), d.decades(0.02, 0.5), d.decades(5, 200) / d.length, d.between(0.5, 1.8)],
        lambda p: p[1],
    ),
    "g2_double": (g2_double, "delays", two_relaxations, lambda p: p[1]),
    "gaussian + line": (gaussian + line, "any", beside(peak, Draw.line), first),
    "pseudo_voigt + line": (pseudo_voigt + line, "any", beside(of_width(2.35, (0, 1)), Draw.line), first),
    "gaussian + gaussian + polynomial(2)": (
        gaussian + gaussian + polynomial(2),
        "any",
        beside(two_peaks, Draw.parabola),
        smaller,
    ),
    "gaussian + gaussian + line, overlapping": (gaussian + gaussian + line, *BANDS),
    "gaussian + gaussian + line, overlapping, positive": ((gaussian + gaussian).positive + line, *BANDS),
    "lorentzian + lorentzian + line, overlapping": (lorentzian + lorentzian + line, *BANDS),
    "arctan_edge + gaussian + line": (
        arctan_edge + gaussian + line,
        "any",
        lambda d: [*(own := white_line(d)), *d.line(own[0])],
        first,
    ),
    "exponential + polynomial(0)": (
        exponential + polynomial(0),
        "from 0",
        lambda d: [h := d.signed(), d.decades(1, 30) / d.length, h * d.between(-2, 2)],
        first,
    ),
    "power_law + gaussian": (power_law + gaussian, "log", lambda d: small_angle(d), lambda p: abs(p[2])),
}


def white_line(d):
    """An edge in the middle of the data and a peak behind it."""
    height, place = d.height(), d.begin + d.length * d.between(0.3, 0.6)
    width = d.width(0.005, 0.03)
    return [height, place, width, height * d.decades(0.3, 2), place + d.length * d.between(0.02, 0.08), d.width(0.01, 0.04)]


def small_angle(d):
    """A peak on a decaying power law, as high as that is where the peak lies."""
    exponent, place = d.between(-4, -1), d.length * d.between(0.1, 0.5)
    level = d.height()
    return [level * place**-exponent, exponent, level * d.decades(0.5, 5), place, place * d.between(0.05, 0.2)]


def data(name: str, n_sets: int = N_SETS, seed: int = 0):
    """x (n_sets, N_POINTS), y, and the true parameters (n_sets, p)."""
    model, runs, parameters, height = CASES[name]
    rng = np.random.default_rng([seed, *name.removesuffix(", positive").encode()])
    x, truth, noise = np.empty((n_sets, N_POINTS)), [], []
    for k in range(n_sets):
        length = 10 ** rng.uniform(-3, 4)
        begin = length * rng.uniform(-5, 20) if runs == "any" else 0.0
        even = rng.random() < 0.5  # else points at random
        u = np.linspace(0, 1, N_POINTS) if even else np.sort(rng.random(N_POINTS))
        decades = rng.uniform(*DECADES[runs]) if runs in DECADES else 0.0
        x[k] = length * 10 ** (-decades * (1 - u)) if decades else begin + length * u
        truth.append(parameters(Draw(rng, begin, length)))
        noise.append(rng.uniform(*NOISE))
    truth = np.array(truth)
    with float64():
        clean = np.asarray(jax.vmap(lambda x, p: model(x, *p))(x, truth))
    heights = [np.ptp(row) if height is None else height(p) for row, p in zip(clean, truth, strict=True)]
    sigma = np.array(heights)[:, None] * np.array(noise)[:, None]
    return x, clean + sigma * rng.standard_normal(x.shape), truth


def reached(name: str, **options) -> np.ndarray:
    """(n_sets,): whether the fit from the guess is at the optimum."""
    model = CASES[name][0]
    x, y, truth = data(name, **options)
    guessed = fit_map(model, x, y, p0="guess", max_nfev=1000).compute()
    best = fit_map(model, x, y, p0=truth, max_nfev=1000).compute()
    return guessed.chi2 <= np.nan_to_num(best.chi2, nan=np.inf) * (1 + REACHED)


def main():
    for name in sys.argv[1:] or CASES:
        print(f"{name:40} {np.mean(reached(name)):6.1%}", flush=True)


if __name__ == "__main__":
    main()
