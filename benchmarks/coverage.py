"""What error bars are worth: ``python -m benchmarks.coverage [coverage] [scatter] [flim]``.

**coverage:** how often an interval of 68 % or 95 % holds the truth, over 1000 simulated decays that `fit_map` fits at once.
A count of 1000 is itself uncertain by 1.5 points at 68 %, and by 0.7 at 95 %. Where a pixel could not be fitted its
intervals count as missed.

**scatter:** errors by the sandwich and the jackknife against a bootstrap, where the noise is not alike everywhere.

**flim:** the lifetimes that the pixels of a fluorescence image share, one fit of up to 770 parameters, with four ideas about
the noise; without a background, and with one that is fitted in each pixel and may not be negative.
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


def image_of(kinds):
    """The model of an image and its Jacobian: photons of each lifetime in each pixel, and with 3 kinds of a background."""

    def parts(x, photons):
        t, pixel = x
        return t, pixel, jnp.stack(photons).reshape(kinds, -1)[:, pixel]

    def image(x, tau1, tau2, *photons):
        t, _, (fast, slow, *flat) = parts(x, photons)
        return fast * response(t, tau1) + slow * response(t, tau2) + sum(flat) / BINS

    def image_jac(x, tau1, tau2, *photons):
        """(n, p), most of it 0: a photon belongs to one pixel."""
        t, pixel, (fast, slow, *_) = parts(x, photons)
        own = (pixel[:, None] == jnp.arange(len(photons) // kinds)).astype(float)
        one, one_slope = jax.jvp(lambda tau: response(t, tau), (tau1,), (jnp.ones(()),))
        two, two_slope = jax.jvp(lambda tau: response(t, tau), (tau2,), (jnp.ones(()),))
        slopes = jnp.stack([fast * one_slope, slow * two_slope], axis=1)
        return jnp.concatenate([slopes, own * one[:, None], own * two[:, None], *[own / BINS] * (kinds - 2)], axis=1)

    return image, image_jac


def simulated(photons, pixels, background, seed):
    """x, counts (pixels, BINS), and the photons of each kind in each pixel, (kinds, pixels)."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.3, 0.7, pixels)
    truth = photons * np.stack([(1 - background) * share, (1 - background) * (1 - share), np.full(pixels, background)])
    with jax.enable_x64(True):
        mean = np.stack([*(np.asarray(response(TIME, tau)) for tau in LIFETIMES), np.full(BINS, 1 / BINS)])
    return (TIME, np.arange(pixels)[:, None]), rng.poisson(truth.T @ mean), truth[: 3 if background else 2]


def lifetimes(weights, photons, pixels, draws, background=0.0):
    """tau1 and tau2 (draws, 2) in ns."""
    found = []
    for seed in range(draws):
        x, y, truth = simulated(photons, pixels, background, seed)
        f, jac = image_of(len(truth))
        start = [0.8, 2.6, *truth.mean(axis=1).repeat(pixels)]
        found.append(curve_fit(f, x, y, start, bounds=(1e-6, np.inf), jac=jac, ftol=1e-7, **WEIGHTS[weights](y)).popt[:2])
    return np.array(found)


def flim(photons=800, sizes=((256, 4, 0.0), (64, 8, 0.0), (64, 8, 0.02), (64, 8, 0.1))):
    for pixels, draws, background in sizes:
        print(
            f"{draws} images of {pixels} pixels, {photons} photons each, {background:.0%} of them background, that share "
            f"{LIFETIMES} ns; mean, its error, and bias:"
        )
        for weights in WEIGHTS:
            found = lifetimes(weights, photons, pixels, draws, background)
            mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / draws**0.5
            bias = mean / LIFETIMES - 1
            cells = (f"tau{k + 1} {mean[k]:.4f} +- {error[k]:.4f} ns ({bias[k]:+.1%})" for k in range(2))
            print(f"  {weights:<38}{'   '.join(cells)}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# errors from the scatter of the residuals


def scatter(points=4000, samples=1000):
    """Errors by three ways and by a bootstrap of pairs (B. Efron, Ann. Statist. 7 (1979) 1-26), noise growing with x."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, points)
    y = decay(x, *TRUTH.values()) + rng.normal(size=points) * np.linspace(0.02, 0.3, points)
    fit = curve_fit(decay, x, y, [*TRUTH.values()])
    times = rng.multinomial(points, np.full(points, 1 / points), samples)  # that a point is drawn
    weights = dict(sigma=1 / np.sqrt(np.maximum(times, 1)), mask=times == 0)
    again = fit_map(decay, x, np.broadcast_to(y, times.shape), [*fit.popt], **weights).compute()
    expected = again.popt[again.success].std(axis=0, ddof=1)
    print(f"standard errors of {', '.join(TRUTH)} from {points} points, relative to those of {samples} fits of pairs:")
    ratios = {}
    for name in ("pcov", "sandwich", "jackknife"):
        ratios[name] = np.sqrt(np.diag(getattr(fit, name))) / expected
        print(f"  {name:<10} {', '.join(f'{each:.3f}' for each in ratios[name])}")
    return ratios


if __name__ == "__main__":
    for name in sys.argv[1:] or ("coverage", "scatter", "flim"):
        {"coverage": coverage, "scatter": scatter, "flim": flim}[name]()
