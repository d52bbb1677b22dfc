"""Statistics of a fit, from a few numbers: the sums of its last sweep, its parameters and their covariance.

With ``n`` points, ``k`` parameters that were fitted, residuals ``r = (f - y) / sigma`` and weights ``w = 1 / sigma^2`` (1
without sigma):

    chi-square                   X = sum r^2                     the deviance of a Poisson likelihood
    degrees of freedom           n - k
    reduced chi-square           X / (n - k)
    R^2                          1 - X / sum w (y - mean)^2,     mean = sum w y / sum w
    adjusted R^2                 1 - (1 - R^2) (n - 1) / (n - k)
    RMSE                         sqrt(X / sum w)                 in the units of y
    -2 log likelihood            L = n log(X / n)                up to a constant; X itself for a Poisson likelihood
    AIC [1]_                     L + 2 k
    AICc [2]_                    AIC + 2 k (k + 1) / (n - k - 1)
    BIC [3]_                     L + k log(n)

AIC and BIC have the constants of lmfit: only differences between models of the same data have a meaning.
The standard deviation of the noise is not counted in ``k``.

A statistic that is not defined is nan:

* with a robust loss, whose cost is not a sum of squares: chi-square and everything derived from it;
* for counts, and with a covariance matrix as sigma: R^2 and RMSE;
* if the mean of y is above about 1e5 times its spread, so that the digits are lost: R^2;
* with weights from the model (``sigma="poisson"``), which are not a likelihood: AIC, AICc and BIC. Use ``loss="poisson"``,
  which has the same parameters and a likelihood;
* everything that divides by a number that is not positive.

References
----------
.. [1] H. Akaike, "A new look at the statistical model identification", IEEE Trans. Autom. Control 19 (1974) 716-723.
.. [2] C. M. Hurvich, C.-L. Tsai, "Regression and time series model selection in small samples", Biometrika 76 (1989)
       297-307.
.. [3] G. Schwarz, "Estimating the dimension of a model", Ann. Statist. 6 (1978) 461-464.
"""

from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import scipy  # `scipy.special` alone where it does: scipy.stats takes 0.3 s to import

from ..options import Noise

__all__ = [
    "Noise", "Statistics", "Totals", "correlation", "distance_at", "largest_correlations", "quantile", "root", "statistics",
]  # fmt: skip

FLAT = 1e-10  # of sum w y^2, below which the spread of y around its mean is no longer known to 1e-6
LARGE = 0.1  # least correlation that is worth a word, as in lmfit


class Groups(NamedTuple):
    """Of the groups of a fit that has any."""

    locals: tuple[str, ...]  # names
    n_groups: int  # used
    of_groups: int
    local_distance: float
    accuracy: float
    largest: float  # share of the cost that one group has
    interchangeable: tuple[tuple[str, str], ...]  # shared parameters


class Totals(NamedTuple):
    """Sums over all points of the last sweep; w = 1/sigma^2, 1 without sigma."""

    cost: float
    n: int  # points used
    weight: float  # sum of w
    weighted: float  # sum of w y
    squares: float  # sum of w y^2


class Statistics(NamedTuple):
    """As defined in the docstring of this module."""

    chi_square: float
    dof: int
    reduced_chi_square: float
    r_squared: float
    adjusted_r_squared: float
    rmse: float
    aic: float
    aicc: float
    bic: float


def statistics(totals: Totals, k: int, noise: Noise) -> Statistics:
    """All statistics of a fit of ``k`` parameters."""
    n, dof = totals.n, totals.n - k
    chi_square = 2 * totals.cost if noise.squares else np.nan
    spread = totals.squares - _ratio(totals.weighted, totals.weight) * totals.weighted
    spread = spread if noise.loss == "linear" and spread > FLAT * totals.squares else np.nan
    r_squared = 1 - chi_square / spread
    if noise.likelihood:
        minus_two_log = chi_square
    else:
        minus_two_log = float(n * np.log(chi_square / n)) if noise.loss == "linear" and chi_square > 0 else np.nan
    aic = minus_two_log + 2 * k
    return Statistics(
        chi_square=chi_square,
        dof=dof,
        reduced_chi_square=_ratio(chi_square, dof),
        r_squared=r_squared,
        adjusted_r_squared=1 - (1 - r_squared) * _ratio(n - 1, dof),
        rmse=float(np.sqrt(_ratio(chi_square, totals.weight))) if noise.loss == "linear" else np.nan,
        aic=aic,
        aicc=aic + _ratio(2 * k * (k + 1), dof - 1),
        bic=float(minus_two_log + k * np.log(n)),
    )


def by_title(found: Statistics, noise: Noise) -> dict[str, float]:
    """Those that exist, as tables call them."""
    name = "deviance" if noise.likelihood else "chi-square"
    values = {
        name: found.chi_square,
        f"reduced {name}": found.reduced_chi_square,
        "R^2": found.r_squared,
        "adjusted R^2": found.adjusted_r_squared,
        "RMSE": found.rmse,
        "AIC": found.aic,
        "AICc": found.aicc,
        "BIC": found.bic,
    }
    return {name: value for name, value in values.items() if not np.isnan(value)}


def _ratio(a, b):
    return float(a / b) if b > 0 else np.nan


def quantile(level: float, dof: int, noise: Noise) -> float:
    """Half the width of a central interval of probability ``level``, in standard errors.

    Student's t with ``dof`` degrees of freedom where the noise was estimated from the residuals, nan without any; the normal
    distribution where it was known.
    """
    check_level(level)
    if noise.absolute:
        return float(scipy.special.ndtri(0.5 + level / 2))
    return float(scipy.special.stdtrit(dof, 0.5 + level / 2)) if dof > 0 else np.nan


def check_level(level: Any) -> None:
    """An error for what is not a probability."""
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < float(level) < 1:
        raise ValueError(f"`level` must be a probability between 0 and 1, such as 0.95, not {level!r}")


def distance_at(level: float, m: int, dof: int, noise: Noise) -> float:
    """Distance from the optimum, in standard errors, at the border of the joint region of ``m`` parameters.

    ``sqrt(m F)`` with the quantile F of m and ``dof``, chi-square / m where the noise was known.
    """
    check_level(level)
    if noise.absolute:
        return float(np.sqrt(scipy.special.chdtri(m, 1 - level)))
    return float(np.sqrt(m * scipy.special.fdtri(m, dof, level)))


def correlation(pcov: np.ndarray) -> np.ndarray:
    """``pcov_ij / (perr_i perr_j)`` (p, p), 1 on the diagonal; nan for parameters held or not determined."""
    perr = np.sqrt(np.diag(pcov))
    perr = np.where((perr > 0) & np.isfinite(perr), perr, np.nan)
    found = np.clip(np.where(np.isfinite(pcov), pcov, np.nan) / np.outer(perr, perr), -1, 1)
    np.fill_diagonal(found, np.where(np.isnan(perr), np.nan, 1.0))
    return found


def largest_correlations(matrix: np.ndarray, most: int) -> list[tuple[int, int, float]]:
    """Places and values of the ``most`` pairs that are largest in size, none below `LARGE`; the largest first."""
    pairs = [(i, j, float(matrix[i, j])) for i in range(len(matrix)) for j in range(i)]
    return sorted((each for each in pairs if abs(each[2]) >= LARGE), key=lambda each: -abs(each[2]))[:most]


def root(pcov: np.ndarray) -> np.ndarray:
    """S (p, p) with ``S S^T`` = pcov, so that the variance of a linear function ``g`` of the parameters is ``|S^T g|^2``."""
    perr = np.sqrt(np.diag(pcov))
    w, V = np.linalg.eigh(np.nan_to_num(correlation(pcov), nan=0.0))  # of diagonal 1: parameters differ in units
    return perr[:, None] * V * np.sqrt(np.maximum(w, 0.0))
