"""What pictures show of the data of a fit: binned where the data lie, in one pass that brings back a few megabytes at most.

Profiles have bins of one coordinate, images bins of two, at most 256 x 256, and the mean over all others; see
`dask_nlsq.results.bins`. One pass makes as many of them as are asked for.

Residuals of counts are randomised quantile residuals [1]_: the value of a standard normal variable whose distribution
function is a random number between P(Y < y) and P(Y <= y). They are normal for any mean if the model is right, while
``(model - y) / sqrt(model)`` is skewed and discrete where counts are few. The random numbers depend on the place of a point
in the data alone, so that pictures are the same every time, however the data are chunked.

References
----------
.. [1] P. K. Dunn, G. K. Smyth, "Randomized quantile residuals", J. Comput. Graph. Statist. 5 (1996) 236-244.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy

from ..base.x64 import float64
from ..data.align import Data
from ..data.chunks import Chunk
from ..data.sample import pick
from ..engine.cluster import attached
from ..engine.partition import Partition, Share, Work, alone
from ..engine.request import Objective, Request, kernel_spec
from ..engine.sweep import open_sweep
from ..kernels.blocks import Block
from ..kernels.values import value_kernel
from ..memory.machine import active_client
from ..model.losses import MODEL_FLOOR
from .bins import FINEST, Bins, in_bins, merged
from .coordinates import DECADES, Along, coordinate, data_of, over_decades, plane

Log = Literal["x", "y", "xy"] | bool | None

FEW = 2000  # points up to which all are shown
BEYOND = 6.0  # residuals with larger values are counted together, in units of what the noise should be
PER_BIN = 25  # points in the histogram of residuals, at least on average
MOST_TASKS = 64  # of a pass on workers, each of which sends some megabytes of sums at most
AT_ONCE = 64  # blocks of held data that threads share before their sums are added up
POSITIVE = 0.95  # share of the data that must be positive for a logarithmic axis
FARTHEST = 37.5  # standard deviations of a normal variable that has a probability in float64


class Tally(NamedTuple):
    """What one pass has found in some of the data."""

    profiles: list[Bins | None]  # of each coordinate: linear, logarithmic; None without a point that counts
    image: Bins | None
    histogram: np.ndarray  # (b + 2,): with what lies below and above
    points: np.ndarray | None  # (5, n): x, y, model, sigma, residual; where there are few


class Binned(NamedTuple):
    """Data, model and residuals of a fit in bins of one coordinate, (m,) each; bins without points are left out.

    ``x``, ``y`` and ``model`` are means over the points of a bin, weighted by ``1 / sigma^2`` as in the fit (with ``log``
    the geometric mean of x); ``error`` is the standard error of y, by the scatter of its points around the model, nan for
    a single point. ``residual`` and ``spread`` are mean and standard deviation of ``(model - y) / sigma``, of counts of
    quantile residuals.
    """

    name: str  # of the coordinate, with its unit
    log: bool  # bins of equal width in the logarithm of x
    x: np.ndarray
    n: np.ndarray
    y: np.ndarray
    error: np.ndarray
    model: np.ndarray
    residual: np.ndarray
    spread: np.ndarray
    histogram: np.ndarray  # (b,) counts of residuals divided by ``scale``
    edges: np.ndarray  # (b + 1,)
    beyond: int  # points whose residual lies outside of them
    scale: float  # what residuals should be by the noise: 1 with sigma, else root of the reduced chi-square
    weighted: bool  # whether sigma was given
    measure: str  # what residuals are, as a label
    points: np.ndarray | None  # (5, n): x, y, model, sigma, residual of all points, by x; where they are few, of one x
    y_name: str  # with its unit
    log_y: bool


class Images(NamedTuple):
    """Means over the points of each bin of two coordinates, (rows, columns); nan where no point counts."""

    names: tuple[str, str]  # of rows and columns, with their units
    edges: tuple[np.ndarray, np.ndarray]  # of the bins, in the values of a coordinate, else places
    upright: bool  # rows count upwards, as those of coordinates, not downwards, as those of a detector
    log: tuple[bool, bool, bool]  # rows, columns and colours want a logarithmic scale
    data: np.ndarray
    model: np.ndarray
    residual: np.ndarray
    measure: str
    y_name: str


class _Ask(NamedTuple):
    """What a task has to know."""

    factor: np.ndarray | None  # of the covariance of y
    request: Request  # whose objective comes with the work
    along: tuple[Along, ...]
    plane: tuple[Along, ...]
    starts: tuple[np.ndarray, ...]  # of the chunks along each axis of y, and the end of the last
    linear: bool  # bins of equal width; of all coordinates but the first in any case
    log: bool  # and in the logarithm
    scale: float
    n_cells: int  # of the histogram
    few: bool


def axes_of_log(log: Log) -> tuple[bool | None, bool | None]:
    """Whether x and y have logarithmic axes; None: decided by the data."""
    if log is None or isinstance(log, bool):
        return log, log
    if log not in ("x", "y", "xy"):
        raise ValueError(f"`log` must be None, True, False, 'x', 'y' or 'xy', not {log!r}")
    return "x" in log, "y" in log


def binned(result, coordinate: int | str | None = 0, bins: int = 200, log: Log = None) -> Binned:
    """Bin data, model and residuals of a fit, in one pass over the data.

    Several pictures share a pass where they are given what this returns.

    Parameters
    ----------
    result : FitResult
    coordinate : int, str or None
        Which array of ``xdata``, by place or name; None, and where the fit has no xdata: the place along the first axis of
        ydata.
    bins : int
        Approximate number, of equal width between the smallest and the largest value that occurs.
    log : {None, True, False, "x", "y", "xy"}
        Logarithmic axes: none, both, or these. On that of x bins have equal width in the logarithm, and points where it is
        not positive are left out. None: x where all its values are positive and span two decades, and half of the points
        lie in the lowest tenth of the range; y where the model is positive and spans two decades, and 95 % of the data are
        positive.

    Returns
    -------
    Binned

    Raises
    ------
    ValueError
        Without the data: after `pickle` or `dask_nlsq.load`; no such coordinate; no point to show.
    """
    return survey(result, [coordinate], None, bins, log)[0][0]


def images(result, along=None, log: bool | None = None) -> Images:
    """Bin data, model and residuals of a fit into images, in one pass over the data.

    Parameters
    ----------
    result : FitResult
    along : pair, optional
        Rows and columns: axes of ydata by number, or axes and coordinates by name. By default the last two axes; of data
        with one axis the first two coordinates. The images are means over all others.
    log : bool, optional
        Colours by the logarithm, the lowest for 0. None: where the model is positive and spans two decades, and 95 % of the
        data are not negative.

    Returns
    -------
    Images

    Raises
    ------
    ValueError
        As `binned`; data with one axis and one coordinate.
    """
    found = survey(result, [], plane(result, along), 1, log if log is None else bool(log))[1]
    assert found is not None
    return found


def survey(
    result, which: Sequence[int | str | None], rows_and_columns, bins: int = 200, log: Log = None
) -> tuple[list[Binned], Images | None]:
    """`binned` along each coordinate, and `images` of a `plane` where one is given, in one pass.

    A logarithmic x that is asked for is that of the first coordinate.
    """
    data, objective = data_of(result)
    if not (isinstance(bins, int | np.integer) and 1 <= bins <= FINEST[1] // 2):
        raise ValueError(f"`bins` must be a number from 1 to {FINEST[1] // 2}, not {bins!r}")
    log_x, log_y = axes_of_log(log)
    sigma = data.operands[1]
    weighted = data.factor is not None or sigma.size > 1 or not isinstance(sigma, np.ndarray) or sigma.item() != 1
    counts = objective.loss == "poisson"
    known = weighted or counts
    scale = 1.0 if known or not result.dof > 0 else float(np.sqrt(2 * result.cost / result.dof)) or 1.0
    ask = _Ask(
        factor=data.factor,
        request=Request(objective._replace(model=None), result.popt[list(result.free)]),  # type: ignore[arg-type]
        along=tuple(coordinate(result, each) for each in which),
        plane=tuple(rows_and_columns or ()),
        starts=tuple(np.cumsum([0, *sizes]) for sizes in data.chunks),
        linear=log_x is not True,
        log=log_x is not False,
        scale=scale,
        n_cells=int(np.clip(result.n_points // PER_BIN, 12, 120)) // 2 * 2,
        few=len(which) == 1 and data.n_points <= FEW and len(data.preparation.layouts.x) <= 1,
    )
    found = _tally_all(data, objective, ask)
    if ask.plane and found.image is None:
        raise ValueError("nothing to show: no point counts")
    measure = "quantile residual" if counts else r"(model $-$ y) / $\sigma$" if known else "model $-$ y"
    about = dict(measure=measure, y_name=str(data.names.y._replace(name=data.names.y.name or "y")))
    several = dict(about, weighted=weighted)
    pairs = [*zip(found.profiles[::2], found.profiles[1::2], strict=True)]
    profiles = [_profile(ask, found, each, *pair, bins, log_y, several) for each, pair in zip(ask.along, pairs, strict=True)]
    return profiles, None if found.image is None else _images(ask, found.image, data.shape, log_y, about)


# ---------------------------------------------------------------------------------------------------------------------
# the pass


def _tally_all(data: Data, objective: Objective, ask: _Ask) -> Tally:
    client = active_client() if data.lazy else None
    with attached(client), open_sweep(data, "streaming" if data.lazy else "standard", client, MOST_TASKS) as sweep:
        return merge(_in_order(sweep.place.each(TALLY, None, (objective,), ask)))


def _in_order(found: Iterable[tuple[int, Tally]]) -> Iterator[Tally]:
    """Those of units by number, from 0 on; on workers some come early and have to wait, up to one of each task."""
    early: dict[int, Tally] = {}
    number = 0
    for unit, tally in found:
        early[unit] = tally
        while number in early:
            yield early.pop(number)
            number += 1


def _tally(partition: Partition, objectives, ask: _Ask, share: Share = alone) -> Tally:
    ask = ask._replace(request=ask.request._replace(objective=objectives[0]))
    at_once = 1 if share is alone else AT_ONCE
    return merge(
        tally
        for chunk in partition.chunks
        for k in range(0, len(chunk.blocks), at_once)
        for tally in share(partial(_tally_blocks, partition.preparation, ask, chunk), chunk.blocks[k : k + at_once])
    )


def _tally_blocks(preparation, ask, chunk, blocks) -> list[Tally]:
    return [_tally_block(preparation, ask, chunk, block) for block in blocks]


def _tally_block(preparation, ask: _Ask, chunk: Chunk, block: Block) -> Tally:
    request, objective, n = ask.request, ask.request.objective, int(block.geometry[0])
    local = block.geometry[1] + np.arange(n)
    operands, counts = pick(preparation, chunk._replace(blocks=(block,)), local)
    spec = kernel_spec(preparation, request, block)
    with float64():
        kernels = (value_kernel(objective.model, spec, what) for what in ("model", "residual"))
        model, r = (np.asarray(kernel(request.params, objective.f_scale, block))[:n] for kernel in kernels)
    counts &= np.isfinite(model) & np.isfinite(r)
    drawn = (*ask.along, *ask.plane)
    by_place = objective.loss == "poisson" or any(each.axis is not None for each in drawn)
    places: Any = _places(ask.starts, chunk, local)[:, counts] if by_place else None
    operands, model, r = operands[:, counts], model[counts], r[counts]
    y, sigma = operands[:2]
    if objective.loss == "poisson":
        seeds = np.ravel_multi_index(tuple(places), [each[-1] for each in ask.starts])
        r = quantile_residuals(y, model, np.asarray(seeds))
    if ask.factor is not None:
        sigma = np.linalg.norm(ask.factor, axis=1)[counts]
    values = [operands[2 + (each.coordinate or 0)] if each.axis is None else places[each.axis] for each in drawn]
    return _sums(ask, values, y, model, sigma, r)


def _sums(ask: _Ask, drawn, y, model, sigma, r) -> Tally:
    w, d = sigma**-2.0, model - y

    def profile(x, some):
        w_, y_, d_, r_ = (row[some] for row in (w, y, d, r))
        return in_bins([x], (None, w_, w_ * x, w_ * y_, w_ * d_, w_ * d_**2, r_, r_**2))

    profiles: list[Bins | None] = []
    for k, x in enumerate(drawn[: len(ask.along)]):
        positive, linear = x > 0, ask.linear or k > 0
        wanted = ask.log and not (linear and not positive.all())  # else it is not logarithmic by itself
        profiles += [profile(x, slice(None)) if linear else None]
        profiles += [profile(np.log10(x[positive]), positive) if wanted else None]
    cells = np.clip((r / ask.scale + BEYOND) * (ask.n_cells / (2 * BEYOND)), -1, ask.n_cells)
    histogram = np.bincount(np.floor(cells).astype(np.int64) + 1, minlength=ask.n_cells + 2)
    image = in_bins(drawn[len(ask.along) :], (None, w, w * y, w * d, r)) if ask.plane else None
    points = np.stack([drawn[0], y, model, sigma, r]) if ask.few else None
    return Tally(profiles, image, histogram, points)


def _places(starts, chunk: Chunk, local: np.ndarray) -> np.ndarray:
    """Places along the axes of y, (axes, n), of points of a chunk, or of a run of small ones."""
    begin = np.array([each[i] for each, i in zip(starts, chunk.censuses[0].index, strict=True)])
    return np.array(np.unravel_index(local, chunk.shape)) + begin[:, None]


def quantile_residuals(y: np.ndarray, mean: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Of counts with a Poisson distribution of this mean; as all residuals positive where the mean is above y.

    The tail on the side of y keeps the digits. ``seeds`` are whole numbers, one for each random number.
    """
    y, mean = np.floor(y), np.maximum(mean, MODEL_FLOOR)
    above = y > mean
    of_tail = np.where(above, 1.0, -1.0)
    tails = np.empty((2, len(y)))  # with y itself, and without
    tails[:, above] = scipy.special.gammainc([y[above], y[above] + 1], mean[above])
    tails[:, ~above] = scipy.special.gammaincc([y[~above] + 1, y[~above]], mean[~above])
    at = scipy.special.ndtri(tails[1] + _uniform(seeds) * (tails[0] - tails[1]))
    return of_tail * np.maximum(at, -FARTHEST)


def _uniform(seeds: np.ndarray) -> np.ndarray:
    """Random numbers between 0 and 1 that depend on their seeds alone: splitmix64 (G. L. Steele and others, OOPSLA 2014)."""
    z = (seeds.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def merge(tallies: Iterable[Tally], ask: _Ask | None = None) -> Tally:
    """One of all: each is added to the sum of those before it as soon as it comes, so that few are in memory."""
    return reduce(_pair, tallies)


def _pair(one: Tally, other: Tally) -> Tally:
    return Tally(
        [merged(pair) for pair in zip(one.profiles, other.profiles, strict=True)],
        merged([one.image, other.image]),
        one.histogram + other.histogram,
        None if one.points is None or other.points is None else np.concatenate([one.points, other.points], axis=1),
    )


TALLY = Work("bins", _tally, merge)


# ---------------------------------------------------------------------------------------------------------------------
# what has been found


def _profile(
    ask: _Ask, found: Tally, along: Along, linear: Bins | None, log: Bins | None, bins: int, log_y, about
) -> Binned:
    by_itself = linear is not None and log is not None and linear.sums[0].sum() == log.sums[0].sum()
    if log is not None and by_itself:
        n, x = log.sums[0], 10 ** (log.sums[2] / np.where(log.sums[1] > 0, log.sums[1], 1))
        by_itself = over_decades(x[n > 0], n[n > 0])
    chosen, is_log = (log, True) if linear is None or by_itself else (linear, False)
    if chosen is None:
        raise ValueError("nothing to show: no point counts" + ("" if ask.linear else f" at a positive {along.name}"))
    joined = np.arange(0, chosen.sums.shape[1], -(-chosen.sums.shape[1] // bins))
    sums = np.add.reduceat(chosen.sums, joined, axis=1)
    n, w, wx, wy, wd, wd2, r, r2 = sums[:, sums[0] > 0]
    x, y, d = wx / w, wy / w, wd / w
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.maximum(wd2 - wd * d, 0) / (n - 1) / w)
        spread = np.sqrt(np.maximum(r2 - r**2 / n, 0) / (n - 1))
    points = found.points
    if points is not None:
        points = points[:, points[0] > 0] if is_log else points
        points = points[:, np.argsort(points[0], kind="stable")]
    return Binned(
        name=along.label,
        log=is_log,
        x=10**x if is_log else x,
        n=n.astype(np.int64),
        y=y,
        error=error,
        model=y + d,
        residual=r / n,
        spread=spread,
        histogram=found.histogram[1:-1],
        edges=np.linspace(-BEYOND, BEYOND, ask.n_cells + 1),
        beyond=int(found.histogram[0] + found.histogram[-1]),
        scale=ask.scale,
        points=points,
        log_y=_wants_log(log_y, *((y > 0, y + d) if points is None else (points[1] > 0, points[2]))),
        **about,
    )


def _wants_log(log: bool | None, shown: np.ndarray, model: np.ndarray) -> bool:
    """Of the scale of y; ``shown``: which of the data it could show."""
    if log is not None or not np.min(model) > 0:
        return bool(log)
    return bool(np.log10(np.max(model) / np.min(model)) >= DECADES and np.mean(shown) >= POSITIVE)


def _images(ask: _Ask, found: Bins, shape, log: bool | None, about) -> Images:
    n, w, wy, wd, r = found.sums
    with np.errstate(invalid="ignore", divide="ignore"):
        data, difference, residual = wy / w, wd / w, r / n
    model, some = data + difference, n > 0
    (rows, columns), ends = ask.plane, found.edges
    edges = [_edges(each, there, shape) for each, there in zip(ask.plane, ends, strict=True)]
    rising = tuple(slice(None, None, 1 if each[0] < each[-1] else -1) for each in edges)
    return Images(
        names=(rows.label, columns.label),
        edges=(edges[0][rising[0]], edges[1][rising[1]]),
        upright=rows.axis is None or rows.values is not None,
        log=(_over_decades(rows), _over_decades(columns), _wants_log(log, data[some] >= 0, model[some])),
        data=data[rising],
        model=model[rising],
        residual=residual[rising],
        **about,
    )


def _over_decades(along: Along) -> bool:
    return along.values is not None and over_decades(along.values)


def _edges(along: Along, ends: np.ndarray, shape) -> np.ndarray:
    """Of the bins: in the middle between the values of neighbouring places, where an axis has values."""
    if along.axis is None:
        return ends
    ends, values = np.clip(ends, 0, shape[along.axis]), along.values
    if values is None:
        return ends - 0.5  # a place is in the middle of its pixel
    scaled = np.log(values) if over_decades(values) else values
    middles = (scaled[1:] + scaled[:-1]) / 2
    every = np.array([2 * scaled[0] - middles[0], *middles, 2 * scaled[-1] - middles[-1]])
    return (np.exp(every) if over_decades(values) else every)[ends.astype(int)]
