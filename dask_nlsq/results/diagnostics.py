"""What the condensed matrices of the last sweep say about a fit, in words; nothing is read.

Segments are runs of consecutive points of the data (chunks, or boxes of small ones, in C order), up to 256 of them, so that
up to 256 points are parts of their own. Their mean residuals are tested for the order of their signs [1]_. Where parts have
few points neighbours are joined for the other tests, whose sums must be nearly normal: the means for a trend, the
chi-squares for outliers by the median absolute deviation. Misfit along other coordinates than that order needs a pass over
the data: that of the pictures in a report looks for it (`along`).

The size of the residuals is judged where that of the noise is known. Of counts with the mean m the deviance of a point is on
average 1 + 1/(6 m) for large m, at most 1.161 (at m = 1.34; its variance is at most 2.41), and 0 for m = 0: a deviance is
too large if no means explain it. Pearson's chi-square of a point is 1 on average for any mean, with a variance of 2 + 1/m,
which the scatter of the parts shows. Neither is ever called too small: means near 0 make it so.

References
----------
.. [1] A. Wald, J. Wolfowitz, "On a test whether two samples are from the same population", Ann. Math. Statist. 11 (1940)
       147-162.
"""

from typing import NamedTuple

import numpy as np
import scipy

from ..base.warn import warn
from ..engine.condensed import Factor
from ..kernels.rules import UNDETERMINED
from ..solve.trust_region import Solution
from .coordinates import between
from .uncertainty import covariance

HARDLY = 1e6  # condition number from which a combination of parameters counts as hardly determined
POORLY = "parameters are poorly separated"
SEPARATED = (
    (1e2, "parameters are well separated"),
    (1e4, "parameters are separated"),
    (HARDLY, POORLY),
)  # up to a condition number
NEAR_ONE = 0.99  # correlation that is worth a word
IN_WORDS = 3  # of a kind
LEAST = 0.05  # share of a parameter in a combination, below which it is left out
FEWEST_SEGMENTS = 10  # for tests along the data
IN_A_PART, COUNTS_IN_A_PART = 32, 25  # points and, in a Poisson fit, counts at least: sums over fewer are far from normal
SIGNIFICANT = 4.0  # standard deviations
UNBALANCED = 0.1  # of all residuals, more than half of them with one sign: their noise is skewed
WORSE = 1.2  # chi-square of a part, relative to the median
DEVIANCE = 1.161, 2.41  # of a point: largest mean and variance for counts of any mean
LARGER = 1.5  # standard errors by the sandwich relative to the usual ones
EXACT = 1e-13  # residuals relative to the data, below which they are rounding
NOT_THERE = 0.1  # standard errors from the optimum


class Blocks(NamedTuple):
    """Of each part of the data, in order, (G,): points used, reduced chi-square, mean residual."""

    n: np.ndarray
    chi_square: np.ndarray
    mean_residual: np.ndarray


class Diagnostics(NamedTuple):
    """``str()`` gives the sentences.

    ``singular_values`` (p,) are those of the Jacobian with its columns scaled to norm 1; ``correlated`` pairs of names with
    their correlation; ``at_bounds`` names; ``blocks`` parts of the data, joined where they have few points; ``runs`` of
    residuals with the same sign, and the number and standard deviation that are expected of independent ones (nan for few
    points), of the means of parts that are not joined; ``distance`` to the optimum in standard errors.
    """

    lines: tuple[str, ...]
    singular_values: np.ndarray
    condition: float
    reduction: str
    correlated: tuple[tuple[str, str, float], ...]
    at_bounds: tuple[str, ...]
    blocks: Blocks
    runs: tuple[float, float, float]
    distance: float

    def __str__(self):
        return "\n".join(self.lines)

    def __repr__(self):
        return f"<Diagnostics>\n{self}"


def diagnose(result, residuals: np.ndarray | None = None) -> Diagnostics:
    """Diagnostics of a `FitResult`; with the ``residuals`` (n,) of all points where there are no sums over parts."""
    parts, noise, factor = result.parts, result.noise, result.factor
    names = [result.param_names[k] for k in result.free]
    used = parts.n > 0
    sums = np.stack([parts.n, parts.squares, parts.residual, parts.weights[:, 1]], axis=1)[used]
    one_by_one = sums[:, 2] if residuals is None else residuals
    runs = _runs(one_by_one)
    sums = _joined(sums, 0, IN_A_PART)
    if noise.loss == "poisson":
        sums = _joined(sums, 3, COUNTS_IN_A_PART)
    n, squares, residual, counts = sums.T
    blocks = Blocks(n, squares / n, residual / n)
    norms = np.linalg.norm(factor.R, axis=0)
    values = np.linalg.svd(factor.R / np.where(norms > 0, norms, 1.0), compute_uv=False)
    pairs = result.correlation
    near = [(i, j, float(pairs[i, j])) for i in range(len(pairs)) for j in range(i) if abs(pairs[i, j]) >= NEAR_ONE]
    near.sort(key=lambda each: -abs(each[2]))
    correlated = tuple((result.param_names[j], result.param_names[i], value) for i, j, value in near)
    ends = {-1: "lower", 1: "upper"}
    sides = {name: ends[int(side)] for name, side in zip(result.param_names, result.at_bound, strict=True) if side}
    at_bounds = tuple(name for name in sides if name not in result.fixed)
    size = max(result.totals.squares, 2 * result.history[0].cost)  # of data that are all 0: of the residuals at the start
    exact = noise.loss == "linear" and 2 * result.cost <= EXACT**2 * size
    distance = 0.0 if exact else result.distance

    words = next((words for limit, words in SEPARATED if result.condition < limit), "parameters are hardly separated")
    words = POORLY if correlated and result.condition < HARDLY else words
    lines = [f"{words}: condition number {result.condition:.1e} of the Jacobian with columns scaled to norm 1"]
    lines += combinations(factor, names)
    lines += [f"{name} is at its {sides[name]} bound: its error, which knows no bounds, says little" for name in at_bounds]
    if np.isfinite(result.condition) and result.condition < HARDLY:
        lines += [
            f"{a} and {b} are correlated to {value:+.4f}: the data determine one combination of them far better than each"
            for a, b, value in correlated[:IN_WORDS]
        ]
    lines += _goodness(result)
    if noise.squares and not exact:
        lines += _uneven(result, blocks, counts if noise.loss == "poisson" else np.inf)
        what = "parts of the data" if residuals is None and np.median(parts.n[used]) > 1 else "points"
        lines += [*_in_order(runs, one_by_one, what), *_drift(blocks)] or _compared(result, names)
    if distance > NOT_THERE:
        lines.append(f"the optimum is still {distance:.2g} standard errors away: {result.message}")
    return Diagnostics(
        tuple(lines), values, result.condition, result.reduction, correlated, at_bounds, blocks, runs, float(distance)
    )


def combinations(factor: Factor, names) -> list[str]:
    """A sentence for each combination of parameters that the data do not, or hardly, determine."""
    norms = np.linalg.norm(factor.R, axis=0)
    lines = [f"the model does not change with {name}" for name, norm in zip(names, norms, strict=True) if norm == 0]
    moving = np.flatnonzero(norms)
    if not len(moving):
        return lines
    _, s, Vt = np.linalg.svd(factor.R[:, moving] / norms[moving])
    singular = not np.isfinite(factor.condition) and not lines
    for k in range(len(s) - 1, 0, -1):
        undetermined = s[k] <= 4 * s[-1] if singular else s[k] == 0  # what is lost is kept at one small size
        if len(lines) == IN_WORDS or not (undetermined or s[k] * HARDLY < s[0]):
            break
        step = Vt[k] / norms[moving]
        shares = np.abs(Vt[k]) / np.abs(Vt[k]).max()
        step = step / np.abs(step[shares >= LEAST]).max()
        taking_part = [(names[m], value) for m, value, share in zip(moving, step, shares, strict=True) if share >= LEAST]
        words = ", ".join(f"{name} {value:+.3g}" for name, value in taking_part)
        verb = "do not" if undetermined else "hardly"
        lines.append(f"the data {verb} determine one combination: ({words}) leaves the model as it is")
    return lines


def _goodness(result) -> list[str]:
    """Residuals that are larger or smaller than the noise, where its size is known."""
    noise, dof, value = result.noise, result.dof, result.reduced_chi_square
    if dof <= 0:
        return []
    if noise.loss == "poisson":
        name, explained = "chi-square", "1"
        if noise.likelihood:
            most, variance = DEVIANCE
            name, explained = "deviance", f"at most {most}"
            excess = (value - most * result.n_points / dof) / np.sqrt(variance / dof)
        else:
            sums = result.parts.squares[result.parts.n > 0]
            if len(sums) < FEWEST_SEGMENTS:
                return []
            scatter = np.sum((sums - np.mean(sums)) ** 2)  # larger than 2 dof where the mean is small
            excess = (value - 1) * dof / np.sqrt(max(scatter, 2 * dof))
        why = "the model misses something, or the values scatter more than counts do"
    elif noise.loss == "linear" and noise.absolute:
        name, explained, excess = "chi-square", "1", (value - 1) * np.sqrt(dof / 2)
        why = "the model misses something, or sigma is too small" if excess > 0 else "sigma is too large"
    else:
        return []
    if abs(excess) <= SIGNIFICANT or (noise.loss == "poisson" and excess < 0):  # which zeros have by nature
        return []
    side = "above" if excess > 0 else "below"
    return [
        f"reduced {name} {value:.4g} is {abs(excess):.0f} standard deviations {side} what noise gives, {explained}: {why}"
    ]


def _runs(mean):
    """Runs of the same sign, their expected number and its standard deviation."""
    if len(mean) < FEWEST_SEGMENTS or np.isnan(mean).any():
        return (np.nan,) * 3
    up = mean > 0
    n, n_up = len(up), np.count_nonzero(up)
    both = 2 * n_up * (n - n_up)
    expected = 1 + both / n
    deviation = np.sqrt(both * (both - n) / (n**2 * (n - 1)))
    return float(1 + np.count_nonzero(up[1:] != up[:-1])), float(expected), float(deviation)


def _joined(sums, column, least):
    """Neighbouring rows (k, m) added up until each has at least ``least`` in a column; what is left goes to the last one."""
    begins, total = [0], 0.0
    for k, value in enumerate(sums[:, column]):
        total += value
        if total >= least:
            begins.append(k + 1)
            total = 0.0
    return np.add.reduceat(sums, begins[:-1] or [0], axis=0)


def _uneven(result, blocks, counts):
    """Segments with a chi-square that is larger than elsewhere; its variance is 2 n + n^2 / counts of alike counts."""
    n, chi = blocks.n, blocks.chi_square
    if len(n) < FEWEST_SEGMENTS:
        return []
    middle, worst = np.median(chi), int(np.argmax(chi))
    spread = np.maximum(1.4826 * np.median(np.abs(chi - middle)), middle * np.sqrt(2 / n + 1 / counts))
    far = (chi > WORSE * middle) & (chi - middle > 2 * SIGNIFICANT * spread)
    if not far.any():
        return []
    end = int(n[: worst + 1].sum())
    begin = end - int(n[worst])
    place = between(result, begin, end - 1) or f"points {begin:,} to {end:,} of those used"
    return [
        f"chi-square is larger than elsewhere in {np.count_nonzero(far)} of {len(n)} parts of the data, most in part "
        f"{worst + 1} ({place}): {chi[worst] / middle:.3g} times the median"
    ]


def _in_order(runs, residuals, what):
    """Signs of the residuals that come in longer runs than by chance.

    Where the noise is skewed, as that of few counts, and heteroscedastic, its signs come in runs too. There are more of
    one sign then; the products of neighbours are 0 on average still, and must be positive for a misfit.
    """
    count, expected, deviation = runs
    if not (expected - count > SIGNIFICANT * deviation and expected > FEWEST_SEGMENTS / 2):
        return []
    products = residuals[1:] * residuals[:-1]
    skewed = abs(np.mean(residuals > 0) - 0.5) > UNBALANCED
    if skewed and np.sum(products) <= SIGNIFICANT * np.linalg.norm(products):
        return []
    return [
        f"neighbouring {what} have residuals of the same sign: {count:.0f} runs where {expected:.0f} +- {deviation:.0f} are "
        "expected; the model misses something that changes slowly along them"
    ]


def _drift(blocks):
    """A trend of the mean residuals along the data."""
    n = blocks.n
    if len(n) < FEWEST_SEGMENTS or np.isnan(blocks.mean_residual).any():
        return []
    place = np.linspace(-1, 1, len(n))
    slope = np.polynomial.polynomial.polyfit(place, blocks.mean_residual, 1, w=np.sqrt(n))
    error = np.sqrt(np.average(blocks.chi_square, weights=n) / (n @ (place - np.average(place, weights=n)) ** 2))
    if abs(slope[1]) <= SIGNIFICANT * error:
        return []
    return [f"residuals drift along the data, from {slope[0] - slope[1]:+.2g} to {slope[0] + slope[1]:+.2g} on average"]


def along(seen) -> list[str]:
    """Of residuals in the bins of a coordinate (`dask_nlsq.results.binning.Binned`): a sentence where they follow it."""
    some = seen.n > 1
    n, mean = seen.n[some], seen.residual[some]
    noise = np.sqrt(np.average(seen.spread[some] ** 2, weights=n)) if some.any() else 0.0
    if len(n) < FEWEST_SEGMENTS or not noise > 0:
        return []
    z = mean * np.sqrt(n) / noise
    excess = (z @ z - len(z)) / np.sqrt(2 * len(z))
    if excess <= SIGNIFICANT:
        return []
    worst = int(np.argmax(abs(z)))
    return [
        f"residuals follow {seen.name}: their means in {len(z)} bins scatter {np.sqrt(np.mean(z**2)):.2g} times as much as "
        f"by chance, most near {seen.x[some][worst]:.4g}"
    ]


def _compared(result, names):
    """Errors by the sandwich that are larger than the usual ones, and not by chance."""
    C, free = covariance(result.factor), list(result.free)
    if C is None:
        return []
    pulls = result.parts.gram[:, :-1, -1] @ C  # of the parts on the parameters
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        squares = pulls**2  # which add up to the sandwich
        doubt = 0.5 * np.sqrt(np.sum(squares**2, axis=0) / np.sum(squares, axis=0) ** 2 - 1 / len(squares))
        ratio = np.nan_to_num(np.sqrt(np.diag(result.sandwich)[free]) / result.perr[free])
        ratio = np.where(ratio * (1 - 3 * doubt) > 1, ratio, 0.0)
    k = int(np.argmax(ratio))
    if ratio[k] <= LARGER:
        return []
    return [
        f"the residuals scatter so that errors are up to {ratio[k]:.2g} times as large ({names[k]}): `result.sandwich` "
        "has the covariance for heteroscedastic noise"
    ]


NO_COUNTS = "All counts are 0: they determine no parameter."
CHANGE = {
    True: "Start from values at which it does, see that x has the unit that the model expects (dates are seconds), or hold "
    "it with `fixed`. A model with steps has no derivatives",
    False: "Hold one of them with `fixed`, or start components that are alike from different values",
}


def scaled_covariance(solution: Solution, variance: float, names, of: str = "the parameters") -> np.ndarray:
    """Covariance times the variance of the noise; inf, with a warning, where that is nan or there is none."""
    pcov = covariance(solution.factor) if solution.status != UNDETERMINED else None
    if pcov is not None and variance == variance:
        return pcov * variance
    reasons = combinations(solution.factor, names)
    if not reasons and solution.status == UNDETERMINED:  # columns of J that have faded
        reasons = [solution.message[0].lower() + solution.message[1:].rstrip(".")]
    why = f": {reasons[0]}. " if len(reasons) == 1 else "".join([":", *(f"\n- {each}" for each in reasons), "\n"])
    why = why + CHANGE[solution.status == UNDETERMINED] if reasons else ""
    if solution.message == NO_COUNTS:
        why = f": {NO_COUNTS}"
    warn(f"Covariance of {of} could not be estimated{why}", scipy.optimize.OptimizeWarning)
    return np.full((len(names),) * 2, np.inf)
