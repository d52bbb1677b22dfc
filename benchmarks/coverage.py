"""What error bars are worth: ``python -m benchmarks.coverage [coverage] [flim]``.

**coverage:** how often an interval of 68 % or 95 % holds the truth, over 1000 simulated decays that `fit_map` fits at once.
A count of 1000 is itself uncertain by 1.5 points at 68 %, and by 0.7 at 95 %. Where a pixel could not be fitted its
intervals count as missed.

**flim:** the lifetimes that 256 pixels of a fluorescence image share, one fit of 514 parameters and 65,536 counts, with four
ideas about the noise.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc

from dask_nlsq import curve_fit, fit_map
from dask_nlsq.statistics import Noise, quantile

FITS = 1000
LEVELS = (0.68, 0.95)
WITHIN = 0.03  # of the level
X = np.linspace(0, 10, 80)
FEW = np.linspace(0, 10, 12)  # of which the noise is estimated so badly that Student's t matters
TRUTH = dict(height=1.0, rate=0.5, base=0.25)


def decay(x, height, rate, base):
    return height * jnp.exp(-rate * x) + base


class Case(NamedTuple):
    """Decays of ``height`` counts, or 1, and what is known of their noise."""

    x: np.ndarray
    height: float
    noise: float | None  # None: of counts
    absolute: bool

    def coverage(self, fits=FITS, seed=0) -> tuple[np.ndarray, float]:
        """Share of intervals (levels, p) that hold the truth, and of pixels that were fitted."""
        truth = np.array([self.height, TRUTH["rate"], self.height * TRUTH["base"]])
        mean = truth[0] * np.exp(-truth[1] * self.x) + truth[2]
        rng, shape = np.random.default_rng(seed), (fits, self.x.size)
        if self.noise is None:
            y, options = rng.poisson(mean, shape), dict(loss="poisson", bounds=(1e-9, np.inf))
        else:
            y = rng.normal(mean, self.noise, shape)
            options = dict(sigma=self.noise if self.absolute else None, absolute_sigma=self.absolute)
        found = fit_map(decay, self.x, y, dict(zip(TRUTH, truth, strict=True)), **options).compute()
        noise = Noise("poisson" if self.noise is None else "linear", self.absolute, False)
        q = np.array([quantile(level, self.x.size - truth.size, noise) for level in LEVELS])
        distance = np.abs(found.popt - truth) / found.perr
        held = (distance <= q[:, None, None]) & found.success[:, None]  # NaN is not
        return held.mean(axis=1), float(found.success.mean())


CASES = {
    "Gaussian, sigma known": Case(X, 1.0, 0.05, True),
    "Gaussian, sigma unknown, 12 points": Case(FEW, 1.0, 0.02, False),
    "Poisson likelihood, 200 counts": Case(X, 200.0, None, True),
    "Poisson likelihood, 20 counts": Case(X, 20.0, None, True),
    "Poisson likelihood, 2 counts": Case(X, 2.0, None, True),
}
REPORTED = ("Poisson likelihood, 2 counts",)  # where the parameters' errors are not those of a linear model


def coverage():
    print(f"{'':<36}{'fitted':>8}" + "".join(f"{f'{level:.0%}':>8}  {'(' + ', '.join(TRUTH) + ')':<26}" for level in LEVELS))
    for name, case in CASES.items():
        shares, fitted = case.coverage()
        cells = (f"{each.mean():>8.1%}  ({', '.join(f'{share:.1%}' for share in each)})".ljust(36) for each in shares)
        print(f"{name:<36}{fitted:>8.1%}" + "".join(cells), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# lifetimes that all pixels share

PERIOD, BINS, RESPONSE, ARRIVAL = 12.5, 256, 0.06, 1.0  # ns, of the laser; ns, standard deviation and place of the response
LIFETIMES = (0.6, 3.2)  # ns
TIME = (np.arange(BINS) + 0.5) * PERIOD / BINS
WEIGHTS = {
    "weights 1 / max(y, 1) from the data": lambda y: dict(sigma=np.sqrt(np.maximum(y, 1))),
    "no weights": lambda y: dict(),
    'sigma="poisson"': lambda y: dict(sigma="poisson"),
    'loss="poisson"': lambda y: dict(loss="poisson"),
}


def response(t, tau):
    """Share of a lifetime's photons in the bins at t, ns: a periodic exponential, convolved with a Gaussian."""
    total = 0.0
    for pulse in range(4):  # of the last ones, whose light is still arriving
        u = t - ARRIVAL + pulse * PERIOD
        arrived = 0.5 * erfc((RESPONSE / tau - u / RESPONSE) / 2**0.5)
        total = total + arrived * jnp.exp(RESPONSE**2 / (2 * tau**2) - u / tau) / tau
    return total * PERIOD / BINS


def image(x, tau1, tau2, *photons):
    """Counts; ``photons`` of the first lifetime in each pixel, and then those of the second."""
    t, pixel = x
    fast, slow = jnp.stack(photons).reshape(2, -1)[:, pixel]
    return fast * response(t, tau1) + slow * response(t, tau2)


def image_jac(x, tau1, tau2, *photons):
    """(n, p), most of it 0: a photon belongs to one pixel."""
    t, pixel = x
    fast, slow = jnp.stack(photons).reshape(2, -1)[:, pixel]
    own = (pixel[:, None] == jnp.arange(len(photons) // 2)).astype(float)
    one, one_slope = jax.jvp(lambda tau: response(t, tau), (tau1,), (jnp.ones(()),))
    two, two_slope = jax.jvp(lambda tau: response(t, tau), (tau2,), (jnp.ones(()),))
    slopes = jnp.stack([fast * one_slope, slow * two_slope], axis=1)
    return jnp.concatenate([slopes, own * one[:, None], own * two[:, None]], axis=1)


def simulated(photons, pixels, seed):
    """x, counts (pixels, BINS), and the photons of each lifetime in each pixel, (2, pixels)."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.3, 0.7, pixels)
    truth = photons * np.stack([share, 1 - share])
    with jax.enable_x64(True):
        mean = np.stack([np.asarray(response(TIME, tau)) for tau in LIFETIMES])
    return (TIME, np.arange(pixels)[:, None]), rng.poisson(truth.T @ mean), truth


def lifetimes(weights, photons, pixels, draws):
    """tau1 and tau2 (draws, 2) in ns."""
    found = []
    for seed in range(draws):
        x, y, truth = simulated(photons, pixels, seed)
        start = [0.8, 2.6, *truth.mean(axis=1).repeat(pixels)]
        fit = curve_fit(image, x, y, start, bounds=(1e-6, np.inf), jac=image_jac, ftol=1e-7, **WEIGHTS[weights](y))
        found.append(fit.popt[:2])
    return np.array(found)


def flim(photons=800, pixels=256, draws=4):
    print(
        f"{draws} images of {pixels} pixels, {photons} photons each, that share {LIFETIMES} ns; mean, its error, and bias:"
    )
    for weights in WEIGHTS:
        found = lifetimes(weights, photons, pixels, draws)
        mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / draws**0.5
        bias = mean / LIFETIMES - 1
        cells = (f"tau{k + 1} {mean[k]:.4f} +- {error[k]:.4f} ns ({bias[k]:+.1%})" for k in range(2))
        print(f"  {weights:<38}{'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("coverage", "flim"):
        {"coverage": coverage, "flim": flim}[name]()
