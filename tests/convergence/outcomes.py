"""How fits ended, told by what a user sees: parameters, status, success, warnings. And how SciPy's fits end."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from scipy.optimize import OptimizeWarning, least_squares, leastsq

import dask_nlsq

MOST_EVALUATIONS = 2000  # of SciPy's fits, whose own limit may be lower
NO_COVARIANCE = "Covariance of the parameters could not be estimated"
REFUSED = -99  # in place of a status, where an error was raised before the first step


class Outcome(NamedTuple):
    params: np.ndarray  # (p,)
    status: int
    success: bool
    warned: tuple[str, ...]  # first lines of the warnings that a user sees
    distance: float = np.nan  # in standard errors, as the package states it where it does

    @property
    def silent(self) -> bool:
        """Whether a user takes it for the answer."""
        return self.success and not self.warned

    def __str__(self):
        words = "success" if self.success else "no success"
        stated = "" if np.isnan(self.distance) else f", states {self.distance:.2g} s.e."
        return f"status {self.status}, {words}{', warned' if self.warned else ''}{stated}"


def fitted(f: Callable, x, y, p0, **options) -> Outcome:
    """A `dask_nlsq.curve_fit`; one that gives up is an outcome too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = dask_nlsq.curve_fit(f, x, y, p0, **options)
        except dask_nlsq.NotConvergedError as err:
            result = err.result
        except ValueError as err:  # the start is not finite, which SciPy refuses too
            return Outcome(np.array(p0, dtype=float), REFUSED, False, (str(err).splitlines()[0],))
    warned = [str(each.message).splitlines()[0] for each in caught if issubclass(each.category, OptimizeWarning)]
    stated = float(getattr(result, "distance", np.nan))
    return Outcome(result.popt, result.status, bool(result.success), tuple(warned), stated)


def fitted_map(f: Callable, x, y, p0, **options) -> list[Outcome]:
    """A `dask_nlsq.fit_map` of y (pixels, n), each from its own start p0 (pixels, p); an outcome for each pixel."""
    found = dask_nlsq.fit_map(f, x, y, p0, **options).compute()
    stated = getattr(found, "distance", np.full(len(y), np.nan))
    fields = zip(found.popt, found.status, found.success, stated, strict=True)
    return [Outcome(popt, int(status), bool(success), (), float(d)) for popt, status, success, d in fields]


# ---------------------------------------------------------------------------------------------------------------------
# exact values and derivatives, in float64


@cache
def _compiled(f):
    def value(params, x):
        return f(x, *params)

    return jax.jit(value), jax.jit(jax.jacfwd(value))


def values(f: Callable, x, params) -> np.ndarray:
    """``f(x, *params)``, (n,)."""
    with jax.enable_x64(True):
        return np.array(_compiled(f)[0](np.asarray(params, dtype=float), x))


def jacobian(f: Callable, x, params) -> np.ndarray:
    """Its exact derivatives, (n, p)."""
    with jax.enable_x64(True):
        return np.array(_compiled(f)[1](np.asarray(params, dtype=float), x))


def cost(f: Callable, x, y, params) -> float:
    """Half the sum of squares, inf where it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = 0.5 * np.sum((values(f, x, params) - y) ** 2)
    return float(found) if np.isfinite(found) else np.inf


# ---------------------------------------------------------------------------------------------------------------------
# SciPy


def by_scipy(method: str, f: Callable, x, y, p0, bounds=None) -> np.ndarray:
    """Params (p,) that "lm" or "trf" end at, as `scipy.optimize.curve_fit` calls them, with exact derivatives.

    Both have their default tolerances; params are nan where SciPy refuses the start, or cannot take bounds.
    """
    lost = np.full(len(p0), np.nan)
    if method == "lm" and bounds is not None:
        return lost

    def residual(params):
        return values(f, x, params) - y

    def derivatives(params):
        return jacobian(f, x, params)

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if method == "lm":
                return leastsq(residual, p0, Dfun=derivatives, maxfev=MOST_EVALUATIONS)[0]
            box = {} if bounds is None else {"bounds": bounds}
            return least_squares(residual, p0, derivatives, method="trf", max_nfev=MOST_EVALUATIONS, **box).x
        except (ValueError, np.linalg.LinAlgError):
            return lost


def best_of_scipy(f: Callable, x, y, p0, bounds=None) -> float:
    """The lowest cost that "lm" or "trf" reaches, inf where neither has one."""
    return min(_cost_where_finite(f, x, y, by_scipy(method, f, x, y, p0, bounds)) for method in ("lm", "trf"))


def _cost_where_finite(f, x, y, params):
    return cost(f, x, y, params) if np.all(np.isfinite(params)) else np.inf
