"""A start from the data: a few candidates for the nonlinear parameters, and linear least squares for the others.

Amplitudes and offsets enter a model linearly, so only positions, widths and rates have to be guessed (variable projection
[1]_). Each part proposes candidates from the data. For a peak these are boxcar windows: for each length the one that lowers
the sum of squares most, found with cumulative sums for all windows at once. For an exponential they are a ladder of rates.
Neighbouring candidates form a few groups, narrow to wide. In each group the candidate is chosen with which the columns of
the part fit the data best, together with those of all other parts, and is refined by a few Levenberg-Marquardt steps. Parts
are chosen one after the other, always together with the linear ones, and then each once more together with the final others
(backfitting [2]_). Where peaks overlap, the best candidate for the first part may be one wide peak instead of two.
Therefore several candidates are followed to the end, all parts are refined together, and the best sum is taken.

Everything stays within bounds. A parameter that is held has two equal ones: its part has this value from the first candidate
on. The parts whose places are bounded most are chosen first, so that no other takes the data there.

The code uses `jax.numpy` with shapes that depend only on the number of points, so that it runs under `jax.vmap`: one guess
for each pixel of a map. Points where x or y is not finite are left out.

References
----------
.. [1] G. Golub, V. Pereyra, "Separable nonlinear least squares", Inverse Problems 19 (2003) R1-R26.
.. [2] J. Friedman, W. Stuetzle, "Projection Pursuit Regression", J. Am. Stat. Assoc. 76 (1981) 817-823.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ENDLESS = (-np.inf, np.inf)
ROUNDS = 2  # in which every part is chosen
REFINED = 8  # candidates, of as many groups, by
STEPS = 6  # of Levenberg and Marquardt, so that what a part leaves does not hide the next one
FOLLOWED = 6  # candidates of the first part, where there are others to choose,
SIGNS = (0.0, 1.0, -1.0)  # with amplitudes of any sign, and all of one: else two bands become a wide one and a dip
RIDGE = 1e-10  # relative: columns closer to each other than its root count as the same
WINDOWS_PER_OCTAVE = 2  # of their number of points
STEP_PLACES, STEP_WIDTHS = 25, 10
RATES = 28  # from a tenth of the inverse length of the data to that of their first points
OVERSAMPLING = 4  # of frequencies: at most an eighth of a period is lost over all data


class View(NamedTuple):
    """Data as a part sees them when it proposes candidates: sorted by x, points that do not count last."""

    x: Any  # (n,)
    weight: Any  # (n,) 1 or 0
    count: Any  # points that count
    left: Any  # (n,) of y, what the columns of the other parts leave
    others: Any  # (n, m) orthonormal columns of the other parts
    ends: Any = ENDLESS  # of places of windows and steps, and of frequencies
    sign: Any = 0.0  # that all linear parameters of parts with candidates are to have; 0: any


class Part(NamedTuple):
    """What the guess of a part needs. ``shape(x, *params)`` is linear in the ``linear`` ones of them, together."""

    shape: Callable
    own: tuple[int | None, ...]  # places of its params in the model; None of those that the model does not have
    linear: tuple[int, ...]  # places
    candidates: Callable[[View], Any] | None  # (K, q) of the other parameters, in their order; None if there are none
    finish: Callable  # params of ``shape`` -> params of the model
    ends: tuple[Any, Any] = ((), ())  # lower and upper bounds, of the linear ones (2, m) and of the others (2, q)

    @property
    def others(self) -> list[int]:
        return [k for k in range(len(self.own)) if k not in self.linear]

    @property
    def place(self) -> int | None:
        """Which parameter of the model is the place of candidates."""
        return None if self.candidates is None else self.own[self.others[0]]

    def within(self, bounds, scale) -> "Part":
        """With these bounds (parameters of the model, 2), for y that has been divided by ``scale``; two equal ones hold."""
        known = np.array([k is not None for k in self.own])
        ends = jnp.asarray(bounds)[np.array([k or 0 for k in self.own])]
        ends = jnp.where(known[:, None], ends, np.array(ENDLESS)).T
        return self._replace(ends=(ends[:, np.array(self.linear)] / scale, ends[:, np.array(self.others, dtype=int)]))

    def params(self, coefficients, others):
        found = dict(zip((*self.linear, *self.others), (*coefficients, *others), strict=True))
        return [found[k] for k in range(len(self.own))]

    def columns(self, view: View, others):
        """(n, linear parameters): what one unit of each adds to the model, 0 of those held; (n,): what these add."""
        units = np.eye(len(self.linear))
        columns = jnp.stack([self.shape(view.x, *self.params(unit, others)) for unit in units], axis=1)
        columns = jnp.where(view.weight[:, None] > 0, columns, 0.0)
        low, high = self.ends[0]
        held = low == high
        return jnp.where(held, 0.0, columns), jnp.where(held, columns, 0.0) @ jnp.where(held, low, 0.0)


def guess(parts: Sequence[Part], x, y, bounds: Sequence, order: Sequence[int]):
    """Parameters (p,) of the sum of ``parts``, those of each after those of the one before, from x (n,) and y (n,).

    Each part has ``bounds`` (parameters, 2); ``order`` is that in which the parts are chosen.
    """
    x, y, weight, count = _sorted(x, y)
    scale = jnp.maximum(jnp.max(jnp.abs(y)), jnp.finfo(y.dtype).tiny)
    y = y / scale
    parts = [part.within(own, scale) for part, own in zip(parts, bounds, strict=True)]
    view = View(x, weight, count, y, jnp.zeros((len(x), 0)))
    curved = [k for k in order if parts[k].candidates is not None]
    follow = _follower(parts, curved, view)
    whole = _sum(parts)
    if len(curved) > 1:
        ways = jnp.tile(jnp.arange(FOLLOWED), len(SIGNS)), jnp.repeat(jnp.array(SIGNS), FOLLOWED)
        chosen, costs = _refined(whole, view, lax.map(follow, ways))
        others = chosen[jnp.argmin(costs)]
    else:
        others = follow((0, 0.0))
    columns, known = whole.columns(view, others)
    coefficients = _off_bounds(_solve(columns, y - known), whole.ends[0], 1.0) * scale
    params, found = whole.params(coefficients, _off_bounds(others, whole.ends[1])), []
    for part in parts:
        own, params = params[: len(part.own)], params[len(part.own) :]
        found += part.finish(own)
    return jnp.stack([jnp.asarray(each, y.dtype) for each in found])


def _follower(parts: Sequence[Part], curved: Sequence[int], view: View):
    """``(rank, sign) -> others`` of all parts: chosen one after the other in two rounds, the first one from its candidate of
    this rank, with amplitudes of this sign.

    Parts that differ in their bounds alone share the code of a turn, which takes seconds to compile.
    """
    kinds = {(parts[k].shape, parts[k].linear, parts[k].candidates): parts[k] for k in curved}
    kind = jnp.array([[*kinds].index((parts[k].shape, parts[k].linear, parts[k].candidates)) for k in curved], int)
    lengths = [len(part.others) for part in parts]
    owner = np.repeat(np.arange(len(parts)), [len(part.linear) for part in parts])  # of each column
    longest = max(lengths), max(len(part.linear) for part in parts)
    ends = [jnp.stack([_padded(parts[k].ends[m], longest[1 - m]) for k in curved]) for m in (0, 1)] if curved else []

    def cut(chosen):
        return [own[:n] for own, n in zip(chosen, lengths, strict=True)]

    def follow(rank_and_sign):
        rank, sign = rank_and_sign

        def turn(i, state):
            chosen, known = state
            here = i % len(curved)
            k = jnp.array(curved)[here]
            beside = known & (jnp.arange(len(parts)) != k)
            found = [part.columns(view, own) for part, own in zip(parts, cut(chosen), strict=True)]
            left = view.left - sum(jnp.where(beside[j], held, 0.0) for j, (_, held) in enumerate(found))
            columns = jnp.where(beside[owner], jnp.concatenate([own for own, _ in found], axis=1), 0.0)
            now = _beside(view._replace(left=left, sign=sign), columns)

            def choose(part):
                own = ends[0][here][:, : len(part.linear)], ends[1][here][:, : len(part.others)]
                return _padded(_choose(part._replace(ends=own), now, jnp.where(i == 0, rank, 0)), longest[0])

            best = lax.switch(kind[here], [partial(choose, part) for part in kinds.values()])
            return chosen.at[k].set(best), known.at[k].set(True)

        begin = jnp.ones((len(parts), longest[0])), jnp.array([k not in curved for k in range(len(parts))])
        chosen, _ = lax.fori_loop(0, ROUNDS * len(curved), turn, begin) if curved else begin
        return jnp.concatenate(cut(chosen))

    return follow


def _padded(array, n: int):
    """With zeros up to ``n`` along the last axis."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, n - array.shape[-1])])


def _sum(parts: Sequence[Part]) -> Part:
    """Their sum, as a part whose parameters are those of all, one after the other."""
    begins = np.cumsum([0, *(len(part.own) for part in parts)]).tolist()

    def shape(x, *params):
        pieces = (params[low:high] for low, high in itertools.pairwise(begins))
        return sum(part.shape(x, *own) for part, own in zip(parts, pieces, strict=True))

    linear = tuple(low + k for part, low in zip(parts, begins, strict=False) for k in part.linear)
    ends = (
        jnp.concatenate([part.ends[0] for part in parts], axis=1),
        jnp.concatenate([part.ends[1] for part in parts], axis=1),
    )
    return Part(shape, tuple(range(begins[-1])), linear, None, list, ends)


def _sorted(x, y):
    x, y = (jnp.asarray(each, jnp.result_type(float)) for each in (x, y))
    counts = jnp.isfinite(x) & jnp.isfinite(y)
    order = jnp.argsort(jnp.where(counts, x, jnp.inf))
    count = jnp.sum(counts)
    weight = (jnp.arange(len(x)) < count).astype(x.dtype)
    x, y = x[order], y[order]
    last = x[jnp.maximum(count - 1, 0)]
    return jnp.where(weight > 0, x, last), jnp.where(weight > 0, y, 0.0), weight, count


def _beside(view: View, columns) -> View:
    """What is left beside the ``columns`` (n, m) of other parts, of which those that are zero do not count."""
    norms = jnp.linalg.norm(columns, axis=0)
    last = jnp.argsort(norms == 0, stable=True)  # zero columns, which would take directions from those behind them
    columns, counts = (columns / jnp.where(norms > 0, norms, 1.0))[:, last], (norms > 0)[last]
    others = jnp.linalg.qr(columns)[0]
    others = jnp.where(counts[: others.shape[1]], others, 0.0)
    return view._replace(left=view.left - others @ (others.T @ view.left), others=others)


def _choose(part: Part, view: View, rank):
    """Where a few Levenberg-Marquardt steps from candidates lead, (q,): the best, or that of a later rank."""
    assert part.candidates is not None
    candidates = _off_bounds(part.candidates(view._replace(ends=part.ends[1][:, 0])), part.ends[1])
    costs = lax.map(partial(_cost, part, view), candidates)
    edges = np.unique(np.linspace(0, len(candidates), REFINED + 1).astype(int))
    few = jnp.stack([low + jnp.argmin(costs[low:high]) for low, high in itertools.pairwise(edges)])
    refined, costs = _refined(part, view, candidates[few])
    return refined[jnp.argsort(costs)[jnp.minimum(rank, len(few) - 1)]]


def _refined(part: Part, view: View, starts):
    """Where a few Levenberg-Marquardt steps from each of the ``starts`` (k, q) lead, and the costs (k,) there.

    The coefficients of the columns follow the others at once (variable projection), so only these take steps.
    """
    cost = partial(_cost, part, view)
    low, high = part.ends[1]

    def step(state, _):
        others, lowest, damping = state
        residual = _residual(part, view, others)[0]
        J = jax.jacfwd(lambda others: _residual(part, view, others)[0])(others) * (low < high)
        gram = J.T @ J
        lengths = jnp.diag(gram) * damping + jnp.finfo(J.dtype).tiny
        trial = _off_bounds(others - jnp.linalg.solve(gram + jnp.diag(lengths), J.T @ residual), part.ends[1])
        reached = cost(trial)
        better = reached < lowest
        state = jnp.where(better, trial, others), jnp.where(better, reached, lowest)
        return (*state, damping * jnp.where(better, 0.1, 10.0)), None

    begin = starts, jax.vmap(cost)(starts), jnp.full(len(starts), 0.01)
    refined, costs, _ = jax.vmap(lambda *each: lax.scan(step, each, length=STEPS)[0])(*begin)
    return refined, costs


def _cost(part: Part, view: View, others):
    """Sum of squares (float) beside the columns of the part; infinite outside of its bounds."""
    residual, coefficients = _residual(part, view, others)
    low, high = part.ends[1]
    allowed = jnp.all(((low < others) & (others < high)) | (low == high))
    low, high = part.ends[0]
    signs = ((coefficients >= 0) | (low < 0)) & ((coefficients <= 0) | (high > 0)) & (coefficients * view.sign >= 0)
    cost = jnp.sum(residual**2)
    return jnp.where(allowed & jnp.all(signs) & jnp.isfinite(cost), cost, jnp.inf)


def _residual(part: Part, view: View, others):
    """What is left (n,) beside the columns of the part, and the coefficients of these, each of height 1.

    Coefficients outside of their bounds are moved into them for it.
    """
    columns, known = part.columns(view, others)
    norms = jnp.max(jnp.abs(columns), axis=0)
    columns = columns / jnp.where(norms > 0, norms, 1.0)
    whole = jnp.sum(columns**2, axis=0)
    columns = columns - view.others @ (view.others.T @ columns)
    left = view.left - (known - view.others @ (view.others.T @ known))
    gram = columns.T @ columns + jnp.diag(RIDGE * whole + jnp.where(whole > 0, 0.0, 1.0))
    coefficients = jnp.linalg.solve(gram, columns.T @ left)
    low, high = (jnp.where(norms > 0, end * norms, end) for end in part.ends[0])
    inside = jnp.where(
        coefficients < low, low, jnp.where(coefficients > high, high, coefficients)
    )  # `clip` of inf has no slope
    return left - columns @ jnp.where(norms > 0, inside, 0.0), coefficients


def _solve(columns, y):
    """Linear least squares; columns that are not finite count as zero."""
    columns = jnp.where(jnp.isfinite(columns), columns, 0.0)
    norms = jnp.max(jnp.abs(columns), axis=0)
    norms = jnp.where(norms > 0, norms, 1.0)
    return jnp.linalg.lstsq(columns / norms, y)[0] / norms


def _off_bounds(values, ends, scale=0.0):
    """Moved into the bounds, and off them: a start at a bound hardly leaves it."""
    low, high = ends
    off = 0.01 * jnp.where(jnp.isfinite(high - low), high - low, scale)
    return jnp.clip(values, low + off, high - off)


def _nearest(view: View, places, counts):
    """Which of the ``places`` that count are within the bounds, or next to them where none is."""
    outside = jnp.maximum(jnp.maximum(view.ends[0] - places, places - view.ends[1]), 0.0)
    outside = jnp.where(counts, outside, jnp.inf)
    return counts & (outside <= jnp.min(outside))


# ---------------------------------------------------------------------------------------------------------------------
# candidates


def peaks(rows: Sequence[Sequence[float]], n_widths: int = 1) -> Callable[[View], Any]:
    """Of a place and shapes: for the best window of each length its middle, and each of ``rows``.

    The first ``n_widths`` values of a row count in half lengths of the window, the others are as they are.
    """
    shapes = np.array(rows, dtype=float)

    def candidates(view: View):
        center, half = _windows(view)
        own = jnp.where(np.arange(shapes.shape[1]) < n_widths, half[:, None, None] * shapes, shapes)
        center = jnp.broadcast_to(center[:, None, None], (*own.shape[:2], 1))
        return jnp.concatenate([center, own], axis=2).reshape(-1, 1 + shapes.shape[1])

    return candidates


def _windows(view: View):
    """Middle and half length, (S,) each, of the window of each number of points that takes most of what is left."""
    n = len(view.x)
    half = np.unique(np.round(2 ** np.arange(0, np.log2(max(n, 2)), 1 / WINDOWS_PER_OCTAVE)).astype(int))
    k, last = jnp.arange(n), jnp.maximum(view.count - 1, 0)
    low = jnp.clip(k - half[:, None], 0, last)
    high = jnp.clip(k + half[:, None], 0, last)
    gain = _gain_of_runs(view, low, high + 1)
    best = jnp.argmax(jnp.where(_nearest(view, view.x, k <= last), gain, -1.0), axis=1)
    center = view.x[best]
    low, high = (jnp.take_along_axis(each, best[:, None], axis=1)[:, 0] for each in (low, high))
    reach = jnp.maximum(view.x[high] - center, center - view.x[low])
    least = (view.x[last] - view.x[0]) / jnp.maximum(view.count, 1)
    return center, jnp.maximum(reach, jnp.where(least > 0, least, 1.0))


def _gain_of_runs(view: View, low, high):
    """By how much the sum of squares falls with a column that is 1 from ``low`` to before ``high``, and 0 elsewhere."""

    def over(values):
        total = jnp.concatenate([jnp.zeros((1, *values.shape[1:])), jnp.cumsum(values, axis=0)])
        return total[high] - total[low]

    points = over(view.weight)
    own = points - jnp.sum(over(view.others) ** 2, axis=-1)  # of the column, what the others do not have
    return jnp.where(own > 1e-3 * points, over(view.left) ** 2 / jnp.where(own > 0, own, 1.0), 0.0)


def steps(view: View):
    """Of a place and a width: the best place of a sudden step and others all over the data, with widths narrow to wide."""
    k, last = jnp.arange(len(view.x)), jnp.maximum(view.count - 1, 0)
    gain = _gain_of_runs(view, k, jnp.maximum(view.count, k))
    best = jnp.argmax(jnp.where(_nearest(view, view.x, (k > 0) & (k <= last)), gain, -1.0))
    spread = jnp.linspace(0.02, 0.98, STEP_PLACES) * last
    center = jnp.concatenate([view.x[best][None], view.x[spread.astype(int)]])
    length = _length(view)
    width = length * jnp.geomspace(1.0 / len(view.x), 0.5, STEP_WIDTHS)
    return _product(center, width)


def rates(*others: Sequence[float], both_signs: bool = False) -> Callable[[View], Any]:
    """Of a rate and shapes: a ladder of rates from the length of the data to their first points, and values of others."""

    def candidates(view: View):
        rate = _ladder(view, RATES)
        return _product(jnp.concatenate([rate, -rate[: RATES // 2]]) if both_signs else rate, *map(jnp.asarray, others))

    return candidates


def _ladder(view: View, n):
    """``n`` rates, from those that are hardly seen over all data to those of the first few points."""
    begin, length = view.x[0], _length(view)
    few = view.x[jnp.minimum(2, jnp.maximum(view.count - 1, 0))] - begin
    short = jnp.clip(jnp.maximum(few, begin), 1e-6 * length, length / 30)  # delays that are even on the logarithm
    slow, fast = 0.1 / length, 3.0 / short
    return slow * (fast / slow) ** jnp.linspace(0, 1, n)


def two_rates(n: int, *others: Sequence[float]) -> Callable[[View], Any]:
    """Of two different rates, the higher one first, each followed by its exponent 1, and values of others."""
    fast, slow = np.tril_indices(n, -1)

    def candidates(view: View):
        ladder = _ladder(view, n)
        shapes = _product(*map(jnp.asarray, others))
        pair = jnp.stack([ladder[fast], jnp.ones(len(fast)), ladder[slow], jnp.ones(len(fast))], axis=1)
        both = jnp.repeat(pair, len(shapes), axis=0), jnp.tile(shapes, (len(pair), 1))
        return jnp.concatenate(both, axis=1)

    return candidates


def exponents(low: float, high: float, n: int) -> Callable[[View], Any]:
    return lambda view: jnp.linspace(low, high, n)[:, None]


def frequencies(view: View):
    """Of a frequency and a damping rate: up to one period for two points, and from none to fast.

    The best frequencies are those of periodograms with each damping, since fast damping makes their peaks wide.
    """
    n = len(view.x)
    length, last = _length(view), jnp.maximum(view.count - 1, 0)
    damping = jnp.array([0.0, 1.0, 3.0, 9.0, 27.0]) / length

    def power(frequency, rate):
        since = view.x - view.x[0]
        decay = jnp.exp(-rate * since) * view.weight
        turn = 2 * jnp.pi * frequency * since
        pair = jnp.stack([decay * jnp.sin(turn), decay * jnp.cos(turn)], axis=1)
        pair = pair - view.others @ (view.others.T @ pair)
        gram, slope = pair.T @ pair, pair.T @ view.left
        gram = gram + (1e-6 * jnp.trace(gram) + jnp.finfo(slope.dtype).tiny) * jnp.eye(2)
        return slope @ jnp.linalg.solve(gram, slope)

    grid = jnp.arange(1, OVERSAMPLING * n // 2 + 1) / (OVERSAMPLING * length)
    grid = jnp.where(grid <= (last + 1) / (2 * length), grid, grid[0])
    powers = lax.map(lambda f: jnp.stack([power(f, rate) for rate in damping]), grid)
    best = grid[jnp.argmax(jnp.where(_nearest(view, grid, grid > 0)[:, None], powers, -1.0), axis=0)]
    fine = (best[:, None] + jnp.array([-0.5, 0.0, 0.5]) / (OVERSAMPLING * length)).ravel()
    return _product(fine, damping)


def _length(view: View):
    length = view.x[jnp.maximum(view.count - 1, 0)] - view.x[0]
    return jnp.where(length > 0, length, 1.0)


def _product(*values):
    return jnp.stack([each.ravel() for each in jnp.meshgrid(*values, indexing="ij")], axis=1)
