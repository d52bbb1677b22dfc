"""The best basin from many starts, found on a small sample, so that only one fit needs sweeps over all data.

Candidates are p0 and a scrambled Sobol sequence [1]_: over the box for parameters with two finite bounds, otherwise around
p0 on a scale from the data. All of them take a few Levenberg-Marquardt steps on a part of the sample; the best continue
with all of it (successive halving [2]_), until ``n_starts`` are left, which run to convergence. The result on the sample
only has to lie in the right basin; the trust-region loop continues from there on all data.

Parameters in which the model is linear (amplitudes, offsets) are found in its derivatives, and solved for before a
candidate takes its first step (variable projection [3]_), so the candidates only need to cover the others.

Two optima are compared by a paired test: the sample's costs differ by ``sum d_i``, ``d_i`` the difference at point i,
with a standard deviation of ``sqrt(m) std(d)``. If the test is not significant, one sweep over all data decides.

References
----------
.. [1] A. B. Owen, "Scrambling Sobol' and Niederreiter-Xing Points", J. Complexity 14 (1998) 466-489.
.. [2] K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification", AISTATS 2016.
.. [3] G. Golub, V. Pereyra, "Separable nonlinear least squares", Inverse Problems 19 (2003) R1-R26.
"""

from typing import NamedTuple

import numpy as np
from numpy.linalg import lstsq

from ..base.text import table
from ..base.x64 import float64
from ..data.sample import Sample
from ..engine.condensed import Condensed, factor
from ..engine.evaluator import Evaluator
from ..engine.request import Objective
from ..kernels import rules
from ..kernels.blocks import KernelSpec
from ..kernels.checks import linear_places
from ..kernels.many_starts import LINEAR_STEPS, screen_kernel
from ..kernels.values import residuals_kernel
from ..model.losses import LIKELIHOODS, LOSSES
from .trust_region import Begin, Loop, NotFiniteAtStart, Options, Solution, alone

FIRST_POINTS = 512  # on which all candidates are screened
CANDIDATES_PER_START = 64
FEWEST_CANDIDATES = 1024  # three peaks without bounds: found from 640 in 16 of 20 runs, from 1280 in 19
PARAM_PASSES = 1e8  # points x params x candidates x steps of the first screening, at most: some seconds
FIRST_STEPS, SECOND_STEPS, LAST_STEPS = 10, 20, 100  # most trials in each round
SECOND_PER_START = 4  # candidates that reach the second round
BATCH_BYTES = 2**24  # rows [J r] of one tile for a batch of candidates; the kernel holds a few such arrays
BATCH = 8  # candidates at once
TILE = 512  # points at once
DECADES = 1e3  # between positive bounds, from which candidates are spread by the logarithm
FARTHEST = 1e3  # |p0|: most that the data may stretch the scale of a parameter to, where the model hardly knows it
TAILS = 0.02  # of the Cauchy distribution that are cut: 16 scales from p0
SAME_BASIN = 4.0  # standard errors per parameter
EQUAL_COST = 1e-6  # relative: equivalent optima (peaks that change places, a phase and its complement)
DOUBT = 4.0  # standard deviations of the difference of two costs, that leave doubt which is lower
MOST_RIVALS = 3  # optima between which a sweep each decides


class Search(NamedTuple):
    """What became of each start, on the sample; row 0 is p0. Costs are scaled to all data.

    ``starts`` (n, p) and their ``start_costs`` (n,), inf where the model is not finite; ``params`` (n, p), the optimum on
    the sample that each leads to, and ``costs`` (n,). ``basin`` (n,) numbers these optima, 0 the lowest, -1 where there is
    none. ``chosen``: starts whose optima the sample cannot distinguish by their costs, the best first; ``winner``: the one
    that was then fitted to all data. ``n_candidates``, from which the starts were chosen; ``n_points`` of the sample.
    """

    starts: np.ndarray
    start_costs: np.ndarray
    params: np.ndarray
    costs: np.ndarray
    basin: np.ndarray
    chosen: tuple[int, ...]
    winner: int
    n_candidates: int
    n_points: int

    def __repr__(self):
        n_optima = self.basin.max() + 1
        lines = [
            f"{len(self.starts)} starts, the best of {self.n_candidates} candidates on {self.n_points} points, lead to "
            f"{n_optima} optim{'um' if n_optima == 1 else 'a'} of these points (-> fitted to all data, ? as good on these)",
        ]
        rows = [("", "start", "basin", "cost at start", "cost of optimum", "optimum")]
        for k in np.lexsort((np.arange(len(self.costs)), self.costs)):
            mark = "->" if k == self.winner else " ?" if k in self.chosen else ""
            at = " ".join(f"{value:.5g}" for value in self.params[k])
            costs = (f"{self.start_costs[k]:.6g}", f"{self.costs[k]:.6g}")
            rows.append((mark, "p0" if k == 0 else str(k), str(self.basin[k]), *costs, at))
        return "\n".join([*lines, *table(rows, "<>>>>")])


def search(
    objective: Objective,
    sample: Sample,
    p0: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    n_starts: int,
    seed: int = 0,
) -> Search:
    """Find the optima that ``n_starts`` starts, p0 among them, lead to on the sample.

    Parameters
    ----------
    sample : Sample
        Of `engine.sweep.Sweep.points`, with about ``sample_size(p)`` points.
    p0, lower, upper : (p,) arrays
    seed : int
        Of the Sobol sequence.

    Raises
    ------
    ValueError
        Where cost and derivatives are finite at none of the candidates.
    """
    screen = _Screen(objective, sample, lower, upper)
    p0 = np.clip(np.asarray(p0, dtype=np.float64), lower, upper)
    reach = _reach(p0, screen(p0[None], 1)[2][0])
    n_candidates = _candidate_count(n_starts, len(p0), screen)
    starts = candidates(p0, lower, upper, reach, n_candidates, seed)

    params, costs, _ = screen(screen.better(starts), FIRST_STEPS, screen.first_points)
    kept = _first(np.argsort(costs, kind="stable"), SECOND_PER_START * n_starts)
    params, costs, grams = screen(params[kept], SECOND_STEPS)
    if not np.isfinite(costs).any():
        raise ValueError(
            f"cost and derivatives are not finite at any of {n_candidates} starts: set bounds that keep the model finite, "
            "or start from another p0"
        )
    basin = _basins(params, costs, grams, sample.n_points)
    near_first = np.argsort(_distance(params, p0, reach), kind="stable")
    turn = np.empty(len(kept), int)  # one start for each optimum, the nearest to p0, before a second one
    for number in range(-1, basin.max() + 1):
        members = near_first[basin[near_first] == number]
        turn[members] = np.arange(len(members))
    few = _first(np.lexsort((costs, turn, basin < 0)), n_starts)
    params, costs, grams = screen(params[few], LAST_STEPS)
    starts = starts[kept[few]]
    start_costs = screen(starts, 1)[1]
    basin = _basins(params, costs, grams, sample.n_points)
    chosen = _rivals(screen, params, costs, basin, _distance(params, p0, reach))
    weight = sample.n_total / sample.n_points
    return Search(
        starts, start_costs * weight, params, costs * weight, basin, chosen, chosen[0], n_candidates, sample.n_points
    )


def separated(objective: Objective, sample: Sample, p0: np.ndarray, lower, upper, mean: float) -> np.ndarray | None:
    """``p0`` (p,) with the parameters in which the model is linear solved for on the sample; None where it has none.

    Those that would vanish beside the data, whose w y^2 is ``mean`` on average, stay as they are.
    """
    screen = _Screen(objective, sample, lower, upper)
    if not screen.linear.any():
        return None
    start = np.clip(np.asarray(p0, dtype=np.float64), lower, upper)
    (params,), (cost,) = screen.solved(start[None])
    if not np.isfinite(cost):
        return None
    lengths = screen.lengths(start)
    vanish = rules.vanishes(np, params * lengths, start * lengths, mean * sample.n_points)
    return np.where(screen.linear & vanish, start, params)


def polish(found: Search, evaluator: Evaluator, options: Options, begin: Begin = alone) -> tuple[Solution, Search]:
    """Fit all data from the best optimum of the sample, by the loop ``begin(evaluator, params, options)``.

    Where the sample leaves doubt about which is the best, one sweep decides.

    Raises
    ------
    NotFiniteAtStart
        Where on all data cost or derivatives are finite at none of the optima.
    """
    order = list(found.chosen)
    if len(order) > 1:
        at = [found.params[k] for k in order]
        costs = [predicted_cost(*each, options) for each in zip(evaluator.at(at, "gram"), at, strict=True)]
        order = [order[k] for k in np.argsort(costs, kind="stable")]
    others = [np.flatnonzero(found.basin == b)[0] for b in range(found.basin.max() + 1)]
    for k in dict.fromkeys([*order, *others]):
        try:
            return Loop(begin(evaluator, found.params[k], options), evaluator).end(), found._replace(winner=int(k))
        except NotFiniteAtStart:  # at points that are not in the sample
            continue
    raise NotFiniteAtStart(f"the cost or its derivatives are not finite at any of the {len(others)} optima of the sample")


def predicted_cost(equations: Condensed, params: np.ndarray, options: Options) -> float:
    """Cost on all data that a Gauss-Newton step from ``params`` promises, along the parameters that no bound holds."""
    if not equations.finite:
        return np.inf
    parts = factor(equations)
    held = ((params <= options.lower) & (parts.gradient > 0)) | ((params >= options.upper) & (parts.gradient < 0))
    R = parts.R[:, ~held]
    return equations.cost - 0.5 * np.sum((R @ lstsq(R, parts.projected, rcond=None)[0]) ** 2)


def candidates(p0, lower, upper, reach, n: int, seed: int) -> np.ndarray:
    """p0 and ``n - 1`` starts inside the bounds, (n, p).

    Between two bounds they are uniform, or uniform in the logarithm where the bounds are positive and span more than
    three decades. Above one bound (or below) their distance to it has the scale of p0's, and as many are ten times as
    far as ten times as near. Without bounds they follow a Cauchy distribution around p0. ``reach`` (p,) is the scale
    where p0 gives none.
    """
    from scipy.stats import qmc  # takes 0.3 s to import

    sobol = qmc.Sobol(len(p0), scramble=True, seed=seed)
    u = np.maximum(sobol.random_base2(int(np.ceil(np.log2(max(n - 1, 1)))))[: n - 1], 1e-9).T
    starts = np.empty((n, len(p0)))
    starts[0] = p0
    tail = TAILS + (1 - 2 * TAILS) * u
    for k, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if np.isfinite(low) and np.isfinite(high):
            by_decade = low > 0 and high > DECADES * low
            column = low * (high / low) ** u[k] if by_decade else low + (high - low) * u[k]
        elif np.isfinite(low) or np.isfinite(high):
            bound, side = (low, 1) if np.isfinite(low) else (high, -1)
            column = bound + side * (abs(p0[k] - bound) or reach[k]) * tail[k] / (1 - tail[k])
        else:
            column = p0[k] + max(abs(p0[k]), reach[k]) * np.tan(np.pi * (tail[k] - 0.5))
        starts[1:, k] = np.clip(column, low, high)
    return starts


def _candidate_count(n_starts, p, screen):
    passes = screen.first_points * (screen.sample.n_points if screen.spec.whitened else 1)  # the factor is a matrix
    affordable = int(PARAM_PASSES / (p * passes * FIRST_STEPS))
    return max(SECOND_PER_START * n_starts, min(max(CANDIDATES_PER_START * n_starts, FEWEST_CANDIDATES), affordable))


def _reach(p0, gram):
    """Step in each parameter that changes the model by as much as it now misses the data, (p,)."""
    p = len(p0)
    size = np.where(p0 == 0, 1.0, np.abs(p0))
    columns = np.sqrt(np.diag(gram))
    known = columns[:p] > columns[p] / (FARTHEST * size)
    return np.where(known, columns[p] / np.where(known, columns[:p], 1.0), size)


def _distance(params, p0, reach):
    """From p0, (k,), each parameter in units of its scale."""
    return np.linalg.norm((params - p0) / np.maximum(np.abs(p0), reach), axis=1)


def _first(order, n):
    """The first ``n`` of ``order``, and 0 (p0) before them."""
    return np.concatenate([[0], order[order != 0][: n - 1]])


def _basins(params, costs, grams, n_points):
    """Number of the optimum (k,) that each of ``params`` (k, p) is at, by ascending cost; -1 where the cost is not finite.

    Two are at the same where the distance between them is a few standard errors, or where their costs are equal.
    """
    p = params.shape[1]
    basin, equal = np.full(len(costs), -1), _equal(costs)
    found: list[int] = []
    for k in np.argsort(costs, kind="stable"):
        if not np.isfinite(costs[k]):
            break
        for number, best in enumerate(found):
            doubt = SAME_BASIN**2 * p * 2 * (costs[best] + equal) / max(n_points - p, 1)
            above, step = costs[k] - costs[best], params[k] - params[best]
            with np.errstate(over="ignore", invalid="ignore"):  # a candidate may have run far away
                near = above <= doubt and step @ grams[best, :p, :p] @ step <= doubt
            if near or above <= equal:
                basin[k] = number
                break
        else:
            basin[k] = len(found)
            found.append(k)
    return basin


def _equal(costs):
    """Difference up to which costs count as equal: relative to the lowest, or to rounding where that is 0."""
    return EQUAL_COST * max(costs.min(), EQUAL_COST * np.median(costs[np.isfinite(costs)]))


def _rivals(screen, params, costs, basin, distance):
    """Starts (the best first) that stand for the optima whose costs the sample cannot distinguish.

    Of equivalent ones the nearest to p0 counts, by ``distance`` (k,).
    """
    optima = []
    for number in range(basin.max() + 1):
        members = np.flatnonzero(basin == number)
        alike = members[costs[members] <= costs[members].min() + _equal(costs)]
        optima.append(int(alike[np.argmin(distance[alike])]))
    if screen.sample.n_points == screen.sample.n_total:
        return (optima[0],)
    points = screen.point_costs(params[optima])
    doubtful = []
    for k, d in zip(optima, points - points[0], strict=True):
        if d.sum() <= DOUBT * np.sqrt(d.size) * d.std():
            doubtful.append(k)
    return tuple(doubtful[:MOST_RIVALS])


class _Screen:
    """The sample and the kernels that work on it for many params at once, in batches of one size."""

    def __init__(self, objective: Objective, sample: Sample, lower, upper):
        self.sample, self.objective, p = sample, objective, len(lower)
        self.bounds = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
        block, layouts = sample.block, sample.layouts
        capacity = len(block.buffers[0])
        self.linear = np.isin(np.arange(p), linear_places(objective.model, layouts, capacity, p, range(p)))
        tile = None if sample.whole else min(TILE, capacity)
        layouts = layouts._replace(invalid=None) if block.clean else layouts
        self.spec = KernelSpec(layouts, "gram", "columns", objective.loss, tile, len(block.buffers) > len(layouts.operands))
        self.batch = max(1, min(BATCH, BATCH_BYTES // (8 * (p + 1) * (tile or capacity))))
        self.first_points = sample.n_points if sample.whole else min(FIRST_POINTS, sample.n_points)

    def __call__(self, starts, steps, n_points=None):
        """params (k, p), costs (k,) and grams (k, p+1, p+1) after at most ``steps`` steps on the first ``n_points``."""
        linear = self.linear & (steps > 1) & (self.spec.loss == "linear")  # others solve for them before, see `better`
        return self._run(self.spec, starts, linear, steps, n_points)

    def solved(self, starts, n_points=None):
        """Starts (k, p), with the linear parameters solved for by least squares, and the sums of squares there (k,).

        For any loss: a robust one hardly says how far to go, and of counts the likelihood has no gradient where the mean
        is not positive.
        """
        squares = self.spec._replace(loss="linear")
        return self._run(squares, starts, self.linear, 1 + LINEAR_STEPS, n_points)[:2]

    def lengths(self, params):
        """Of the columns of J (p,) at ``params``, by least squares as in `solved`."""
        _, _, grams = self._run(self.spec._replace(loss="linear"), params[None], np.zeros_like(self.linear), 1, None)
        return np.sqrt(np.diagonal(grams[0])[:-1])

    def better(self, starts):
        """Starts (k, p), with the linear parameters solved for where that is better by a loss of other than squares."""
        if self.spec.loss == "linear" or not self.linear.any():
            return starts
        found, _ = self.solved(starts, self.first_points)
        before, after = (self(each, 1, self.first_points)[1] for each in (starts, found))
        return np.where((after < before)[:, None], found, starts)

    def _run(self, spec, starts, linear, steps, n_points):
        kernel = screen_kernel(self.objective.model, spec)
        block = self.sample.block
        if not self.sample.whole:
            geometry = block.geometry.copy()
            geometry[0] = n_points or self.sample.n_points
            block = block._replace(geometry=geometry)
        rest = (self.objective.f_scale, block, *self.bounds, linear, steps)
        return self._batches(kernel, starts, *rest)

    def residuals(self, params):
        """Residuals (k, m) of the sample; NaN where a mask leaves a point out of a whole problem."""
        kernel = residuals_kernel(self.objective.model, self.spec)
        (values,) = self._batches(kernel, params, self.objective.f_scale, self.sample.block)
        values = values[:, : self.sample.block.geometry[0]]
        return values[:, np.isfinite(values[0]) | np.isfinite(values).any(axis=0)]

    def point_costs(self, params):
        """What each point adds to the cost, (k, m)."""
        rho_of = LOSSES["linear" if self.spec.loss in LIKELIHOODS else self.spec.loss]  # of the deviance's residuals
        with float64():
            rho = rho_of((self.residuals(params) / self.objective.f_scale) ** 2)[0]
        return 0.5 * self.objective.f_scale**2 * np.asarray(rho)

    def _batches(self, kernel, params, *rest):
        """What ``kernel`` gives for each batch of ``params`` (k, p), as a tuple."""

        def run(part):
            full = np.concatenate([part, np.repeat(part[-1:], self.batch - len(part), axis=0)])
            with float64():
                found = kernel(full, *rest)
            return [np.asarray(each)[: len(part)] for each in (found if isinstance(found, tuple) else (found,))]

        found = [run(params[k : k + self.batch]) for k in range(0, len(params), self.batch)]
        return [np.concatenate(each) for each in zip(*found, strict=True)]
