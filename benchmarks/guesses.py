"""How often a fit from the guess of a ready model reaches the optimum: ``python -m benchmarks.guesses [model ...]``.

200 data sets of 200 points for each model, with x ranges, parameters and noise drawn anew for each (`CASES`). The optimum
is reached where the cost is not above that of the fit which starts at the true parameters, within 1e-6 of it.
"""

from math import pi

import numpy as np

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
NOISE = 0.01, 0.10  # of the amplitude, standard deviation
REACHED = 1e-6  # relative, of the cost


class Draw:
    """Random numbers for data on x from ``begin`` to ``begin + length``."""

    def __init__(self, rng, begin, length):
        self.rng, self.begin, self.length = rng, begin, length

    def between(self, low, high):
        return self.rng.uniform(low, high)

    def decade(self, low, high):
        return np.exp(self.rng.uniform(np.log(low), np.log(high)))

    def sign(self):
        return self.rng.choice([-1.0, 1.0])

    def place(self, low=0.1, high=0.9):
        return self.begin + self.length * self.between(low, high)

    def peak(self, low=0.01, high=0.2):
        """Height, place and standard deviation of a peak; negative ones are dips."""
        return [self.decade(0.1, 1e4) * self.sign(), self.place(), self.length * self.decade(low, high)]

    def background(self, height):
        """Slope and intercept of a line that rises or falls by up to twice the height of the signal."""
        slope = self.between(-2, 2) * height / self.length
        return [slope, self.between(-3, 3) * height - slope * self.begin]

    def parabola(self, height):
        """c0, c1, c2 of a level, a slope and a curvature about the middle."""
        level, slope, bend = self.between(-2, 2), self.between(-1, 1), self.between(-1, 1)
        middle, half = self.begin + self.length / 2, self.length / 2
        c = np.array([level - slope * middle / half + bend * (middle / half) ** 2,
                      slope / half - 2 * bend * middle / half**2, bend / half**2])  # fmt: skip
        return [*(height * c)]


def peaks_apart(d, height):
    """Two peaks of unlike height and width, at least two of their widths apart."""
    one = [height * d.decade(0.3, 1), d.place(0.1, 0.9), d.length * d.decade(0.01, 0.08)]
    two = one
    while abs(two[1] - one[1]) < 2 * (one[2] + two[2]):
        two = [height * d.decade(0.3, 1), d.place(0.1, 0.9), d.length * d.decade(0.01, 0.08)]
    return [*one, *two]


def with_line(parameters):
    return lambda d: (lambda own: [*own, *d.background(abs(own[0]))])(parameters(d))


def scaled_peak(d, factor, *shape):
    """A peak whose width parameter is ``factor`` of the standard deviation of a Gaussian that is as wide."""
    height, place, width = d.peak()
    return [height, place, factor * width, *shape]


def voigt_of(d):
    height, place, width = d.peak()
    share = d.between(0.05, 0.95)
    return [2.5 * height * width, place, width * (1 - share), 1.2 * width * share]


def g2_of(d):
    return [d.between(0.95, 1.1), d.decade(0.02, 0.5), d.decade(5, 200) / d.length, d.between(0.5, 1.8)]


def g2_two(d):
    fast = d.decade(100, 2000) / d.length
    shape = d.between(0.7, 1.5), fast / d.decade(8, 100), d.between(0.7, 1.5)
    return [d.between(0.95, 1.1), d.decade(0.05, 0.5), fast, *shape, d.between(0.25, 0.75)]


def sine_of(d):
    """3 to 60 periods, of which the damping leaves from nearly all to a few."""
    frequency = d.decade(3, 60) / d.length
    rate = min(d.decade(0.1, 10) / d.length, frequency / 1.5)
    return [d.decade(0.1, 1e4), frequency, d.between(-pi, pi), rate]


ANYWHERE = lambda d: None  # noqa: E731
# name: model, x ("any" range, "positive" from 0 on, "log" spaced delays), parameters, what noise is relative to
CASES = {
    "line": (line, "any", lambda d: d.background(d.decade(0.1, 1e4))),
    "polynomial(3)": (polynomial(3), "any", lambda d: [*d.parabola(d.decade(0.1, 1e4)), 0.0]),
    "exponential": (
        exponential,
        "positive",
        lambda d: [d.decade(0.1, 1e4) * d.sign(), d.sign() * d.decade(0.5, 30) / d.length],
    ),
    "stretched_exponential": (
        stretched_exponential,
        "positive",
        lambda d: [d.decade(0.1, 1e4), d.decade(1, 50) / d.length, d.between(0.4, 1.8)],
    ),
    "power_law": (power_law, "ratio", lambda d: [d.decade(0.1, 1e4) * d.sign(), d.between(-5, 4)]),
    "gaussian": (gaussian, "any", lambda d: d.peak()),
    "lorentzian": (lorentzian, "any", lambda d: scaled_peak(d, 1.2)),
    "pseudo_voigt": (pseudo_voigt, "any", lambda d: scaled_peak(d, 2.35, d.between(0, 1))),
    "voigt": (voigt, "any", voigt_of),
    "moffat": (moffat, "any", lambda d: scaled_peak(d, 1.8, d.between(1, 5))),
    "sigmoid": (sigmoid, "any", lambda d: [d.decade(0.1, 1e4) * d.sign(), d.place(), d.length * d.decade(0.003, 0.15)]),
    "arctan_edge": (
        arctan_edge,
        "any",
        lambda d: [d.decade(0.1, 1e4) * d.sign(), d.place(), d.length * d.decade(0.003, 0.1)],
    ),
    "damped_sine": (damped_sine, "positive", sine_of),
    "g2_single": (g2_single, "log", g2_of),
    "g2_double": (g2_double, "log", g2_two),
}
