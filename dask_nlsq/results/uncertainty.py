"""Covariance of the parameters, from the condensed matrix of all data and those of its parts, without reading data.

With ``C = (J^T J)^-1`` and the gradient ``g_b = J_b^T r_b`` of each part b, all at the optimum:

* the usual covariance is C times the variance of the noise, valid for homoscedastic, independent noise;
* the sandwich [1]_ ``C (sum_t g_t g_t^T) C`` over tiles t, at most 4096 consecutive points each, uses the scatter of the
  residuals: valid for heteroscedastic noise, and for noise that is correlated over less than a tile;
* the delete-one jackknife [2]_ leaves out each of the parts in turn: without part b the optimum moves, to first order, by
  ``(J^T J - J_b^T J_b)^-1 g_b``. It is valid like the sandwich, and also for correlations as long as a part.

References
----------
.. [1] H. White, "A heteroskedasticity-consistent covariance matrix estimator", Econometrica 48 (1980) 817-838; of
       clusters: K.-Y. Liang, S. L. Zeger, Biometrika 73 (1986) 13-22, with the factor G / (G - p) of G tiles.
.. [2] R. G. Miller, "The jackknife - a review", Biometrika 61 (1974) 1-15; in regression: C.-F. J. Wu, "Jackknife, bootstrap
       and other resampling methods in regression analysis", Ann. Statist. 14 (1986) 1261-1295.
"""

from collections.abc import Sequence

import numpy as np

from ..engine.condensed import Factor
from ..kernels.rows import SegmentSums
from ..model.params import Parameter, Params
from ..model.ties import Ties
from ..parameters import Parameters

STEEPEST = 1e6  # condition number beyond which the gradient of a part has lost its digits along the weakest direction
WHOLE = 1e-10  # share of the information on a direction, next to 1, above which one part has all of it


def covariance(factor: Factor) -> np.ndarray | None:
    """``(J^T J)^-1`` (p, p) from R; None where R is singular."""
    root = _root(factor)
    return None if root is None else root @ root.T


def _root(factor):
    """S (p, p) with ``S S^T = (J^T J)^-1``; None where R is singular."""
    if not np.isfinite(factor.condition):
        return None
    norms = np.linalg.norm(factor.R, axis=0)
    _, s, Vt = np.linalg.svd(factor.R / norms)
    return Vt.T / s / norms[:, None]


def spread_out(matrix: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """``G C G^T`` (..., n, n) of covariances C (..., p, p) and derivatives G (..., n, p); entries unknown in C stay unknown.

    Parameters that are held have rows of zeros in G, those that are fitted rows of the unit matrix.
    """
    known, turned = np.isfinite(matrix), np.swapaxes(spread, -1, -2)
    some = spread != 0
    lost = some.astype(float) @ ~known @ np.swapaxes(some, -1, -2) > 0
    unknown = np.where(np.isnan(matrix).any(axis=(-1, -2), keepdims=True), np.nan, np.inf)
    return np.where(lost, unknown, spread @ np.where(known, matrix, 0.0) @ turned)


def followers(ties: Ties, values: np.ndarray, matrix: np.ndarray, names: Sequence[str]) -> Params:
    """Tied parameters and derived quantities of these ``names``, of values and covariance of all that `Ties.spread` has."""
    place = {name: k for k, name in enumerate((*ties.names, *ties.derived))}
    errors, texts = np.sqrt(np.diag(matrix)), ties.texts
    return Params(
        *(
            Parameter(each, float(values[place[each]]), float(errors[place[each]]), 0, (-np.inf, np.inf), False, texts[each])
            for each in names
        )
    )


def with_ties(params: Parameters, popt: np.ndarray, pcov: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Params]:
    """Values, covariance and derivatives of all parameters, from the ``pcov`` of the free ones; and derived quantities."""
    p, ties = len(popt), params.ties
    if ties is None:
        spread = np.eye(p)[:, list(params.free)]
        return popt, spread_out(pcov, spread), spread, Params()
    values, spread = ties.at(popt, params.free)
    every = spread_out(pcov, spread)
    return values[:p], every[:p, :p], spread[:p], followers(ties, values, every, ties.derived)


def sandwich(factor: Factor, parts: SegmentSums) -> np.ndarray:
    """Covariance (p, p) by the scatter of the gradient over tiles.

    Nan where there are not more tiles than parameters, and where the condition number is above 1e6. A few dozen points give
    too small errors, as they do with any sandwich.
    """
    C, p, n_tiles = covariance(factor), len(factor.R), parts.n_tiles.sum()
    if C is None or n_tiles <= p or factor.condition > STEEPEST:
        return np.full((p, p), np.nan)
    g = factor.gradient  # not 0 where a bound holds a parameter
    scatter = parts.spread.sum(axis=0)[:p, :p] - np.outer(g, g) / n_tiles
    return C @ scatter @ C * (n_tiles / (n_tiles - p))


def jackknife(factor: Factor, parts: SegmentSums) -> np.ndarray:
    """Covariance (p, p) by leaving out each of the parts in turn.

    Nan where one part alone determines a parameter, where there are not more parts than parameters, and where the condition
    number is above 1e6.
    """
    root, p, used = _root(factor), len(factor.R), parts.n > 0
    n_parts = np.count_nonzero(used)
    unknown = np.full((p, p), np.nan)
    if root is None or n_parts <= p or factor.condition > STEEPEST:
        return unknown
    shares = root.T @ parts.gram[used, :p, :p] @ root  # of the information: they add up to the unit matrix
    if np.linalg.eigvalsh(shares)[:, -1].max() > 1 - WHOLE:
        return unknown
    steps = np.linalg.solve(np.eye(p) - shares, root.T @ parts.gram[used, :p, p:])[..., 0] @ root.T
    steps -= steps.mean(axis=0)
    return (n_parts - 1) / n_parts * steps.T @ steps
