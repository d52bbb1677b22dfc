"""What pictures show of the data of a fit: binned where the data lie, in one pass that brings back a few kilobytes.

The range of a coordinate is not known before all of it has been read. So bins have widths of 2^k and edges at multiples
of that: each block takes the smallest k with which it needs `FINE` bins at most, two blocks are merged by making the
finer bins as coarse as the others, two by two, and the bins of all data are those that all data at once would get.
"""

import inspect
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

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
from ..model.function import own_function
from ..model.losses import MODEL_FLOOR

FINE = 2048  # bins while data are merged; then neighbours are joined until there are as many as asked for
FEW = 2000  # points up to which all are shown
BEYOND = 6.0  # residuals with larger values are counted together, in units of what the noise should be
PER_BIN = 25  # points in the histogram of residuals, at least on average
MOST_TASKS = 64  # of a pass on workers, each of which sends 0.1 MB of sums
SMALLEST = -1000  # k of a block that holds but zeros


class Profile(NamedTuple):
    """Sums over points (columns, m) in the bins ``[first + i, first + i + 1) * 2^k``."""

    k: int
    first: int
    sums: np.ndarray


class Tally(NamedTuple):
    """What one pass has found in some of the data."""

    profile: Profile | None  # None without a point that counts
    histogram: np.ndarray  # (b + 2,): with what lies below and above
    points: np.ndarray | None  # (5, n): x, y, model, sigma, residual; where there are few


class Binned(NamedTuple):
    """Data, model and residuals of a fit in bins of one coordinate, (m,) each; bins without points are left out.

    ``x``, ``y`` and ``model`` are means over the points of a bin, weighted by ``1 / sigma^2`` as in the fit (with ``log``
    the geometric mean of x); ``error`` is the standard error of y, by the scatter of its points around the model, nan for
    a single point. ``residual`` and ``spread`` are mean and standard deviation of ``(model - y) / sigma``, of counts of
    ``(model - y) / sqrt(model)``.
    """

    name: str  # of the coordinate
    log: bool
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


class _Ask(NamedTuple):
    """What a task has to know."""

    factor: np.ndarray | None  # of the covariance of y
    request: Request  # whose objective comes with the work
    coordinate: int | None
    starts: np.ndarray  # of the chunks along the first axis, and the end of the last
    log: bool
    scale: float
    n_cells: int  # of the histogram
    few: bool


def binned(result, coordinate: int | None = 0, bins: int = 200, log: bool = False) -> Binned:
    """Bin data, model and residuals of a fit, in one pass over the data.

    Several pictures share a pass where they are given what this returns.

    Parameters
    ----------
    result : FitResult
    coordinate : int or None
        Which array of ``xdata``; None, and where the fit has no xdata: the place along the first axis of ydata.
    bins : int
        About so many, of equal width between the smallest and the largest value that occurs.
    log : bool
        Bins of equal width in the logarithm of the coordinate; points where it is not positive are left out.

    Returns
    -------
    Binned

    Raises
    ------
    ValueError
        Without the data: after `pickle` or `dask_nlsq.load`; no such coordinate; no point to show.
    """
    problem, objective = data_of(result)
    layouts = problem.preparation.layouts
    if not (isinstance(bins, int | np.integer) and 1 <= bins <= FINE // 2):
        raise ValueError(f"`bins` must be a number from 1 to {FINE // 2}, not {bins!r}")
    if not layouts.x:
        coordinate = None
    if coordinate is not None and coordinate not in range(len(layouts.x)):
        last = len(layouts.x) - 1
        raise ValueError(f"`coordinate` must be from 0 to {last}, or None for the place in the data, not {coordinate!r}")
    sigma = problem.operands[1]
    weighted = problem.factor is not None or sigma.size > 1 or not isinstance(sigma, np.ndarray) or sigma.item() != 1
    known = weighted or objective.loss == "poisson"
    scale = 1.0 if known or not result.dof > 0 else float(np.sqrt(2 * result.cost / result.dof)) or 1.0
    ask = _Ask(
        factor=problem.factor,
        request=Request(objective._replace(model=None), result.popt[list(result.free)]),  # type: ignore[arg-type]
        coordinate=coordinate,
        starts=np.cumsum([0, *problem.chunks[0]]),
        log=log,
        scale=scale,
        n_cells=int(np.clip(result.n_points // PER_BIN, 12, 120)) // 2 * 2,
        few=problem.n_points <= FEW and len(layouts.x) <= 1,
    )
    found = _tally_all(problem, objective, ask)
    if found.profile is None:
        raise ValueError("nothing to show: no point counts" + (" at a positive coordinate" if log else ""))
    unit = r"\sqrt{\mathrm{model}}" if objective.loss == "poisson" else r"\sigma"
    return _result(
        ask,
        found,
        bins,
        name=_name(objective.model.f, layouts, coordinate, problem.shape),
        weighted=weighted,
        measure=f"(model $-$ y) / ${unit}$" if known else "model $-$ y",
    )


def data_of(result) -> tuple[Data, Objective]:
    """The data of a fit, and what was minimised."""
    if result.data is None:
        raise ValueError(
            "this result does not hold the data, since it was pickled or loaded: pictures of the data need the result of "
            "the fit itself, so make them before, or fit again from popt"
        )
    return result.data, result.objective


def _name(f, layouts, coordinate, shape):
    if coordinate is None:
        return "point" if len(shape) == 1 else "place along axis 0"
    f = own_function(f)
    try:
        name = next(iter(inspect.signature(f).parameters.values())).name
    except (TypeError, ValueError):  # builtins have no signature
        name = "x"
    return name if layouts.x_kind == "single" else f"{name}[{coordinate}]"


# ---------------------------------------------------------------------------------------------------------------------
# the pass


def _tally_all(data: Data, objective: Objective, ask: _Ask) -> Tally:
    client = active_client() if data.lazy else None
    with attached(client), open_sweep(data, "streaming" if data.lazy else "standard", client, MOST_TASKS) as sweep:
        found = sorted(sweep.place.each(TALLY, None, (objective,), ask), key=lambda each: each[0])
        return merge(tally for _, tally in found)


def _tally(partition: Partition, objectives, ask: _Ask, share: Share = alone) -> Tally:
    ask = ask._replace(request=ask.request._replace(objective=objectives[0]))
    tallies: list[Tally] = []
    for chunk in partition.chunks:
        along = None
        if ask.coordinate is None:
            lengths = np.diff(ask.starts)
            places = ((c, c.n_points // lengths[c.index[0]]) for c in chunk.censuses)
            along = np.concatenate([ask.starts[c.index[0]] + np.arange(c.n_points) // n for c, n in places])
        tallies += share(partial(_tally_blocks, partition.preparation, ask, chunk, along), chunk.blocks)
    return merge(tallies)


def _tally_blocks(preparation, ask, chunk, along, blocks) -> list[Tally]:
    return [_tally_block(preparation, ask, chunk, along, block) for block in blocks]


def _tally_block(preparation, ask: _Ask, chunk: Chunk, along, block: Block) -> Tally:
    request, objective, n = ask.request, ask.request.objective, int(block.geometry[0])
    places = block.geometry[1] + np.arange(n)
    operands, counts = pick(preparation, chunk._replace(blocks=(block,)), places)
    y, sigma = operands[:2]
    x = along[places] if ask.coordinate is None else operands[2 + ask.coordinate]
    spec = kernel_spec(preparation, request, block)
    with float64():
        kernels = (value_kernel(objective.model, spec, what) for what in ("model", "residual"))
        model, r = (np.asarray(kernel(request.params, objective.f_scale, block))[:n] for kernel in kernels)
    if objective.loss == "poisson":  # of the deviance they have no mean of 0 where counts are few
        r = (model - y) / np.sqrt(np.maximum(model, MODEL_FLOOR))
    if ask.factor is not None:
        sigma = np.linalg.norm(ask.factor, axis=1)
    if ask.log:
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.log10(x)
    counts &= np.isfinite(model) & np.isfinite(r) & np.isfinite(x)
    rows = (x, y, model, sigma, r)
    x, y, model, sigma, r = rows = rows if counts.all() else tuple(row[counts] for row in rows)
    cells = np.clip((r / ask.scale + BEYOND) * (ask.n_cells / (2 * BEYOND)), -1, ask.n_cells)
    histogram = np.bincount(np.floor(cells).astype(np.int64) + 1, minlength=ask.n_cells + 2)
    return Tally(_profile(x, y, model, sigma, r), histogram, np.stack(rows) if ask.few else None)


def _profile(x, y, model, sigma, r) -> Profile | None:
    if not len(x):
        return None
    k = _exponent(x.min(), x.max())
    bins = np.floor(np.ldexp(x, -k)).astype(np.int64)
    first = bins.min()
    bins -= first
    w, d = sigma**-2.0, model - y
    columns = (None, w, w * x, w * y, w * d, w * d**2, r, r**2)
    return Profile(k, int(first), np.stack([np.bincount(bins, column) for column in columns]))


def _exponent(low, high) -> int:
    """The smallest k with which [low, high] takes `FINE` bins at most, that are numbered exactly."""
    peak = max(abs(low), abs(high))
    k = int(np.frexp(peak)[1]) - 52 if peak else SMALLEST
    if high > low:
        k = max(k, int(np.frexp((high - low) / FINE)[1]) - 1)
    while np.floor(np.ldexp(high, -k)) - np.floor(np.ldexp(low, -k)) >= FINE:
        k += 1
    return k


def merge(tallies: Iterable[Tally], ask: _Ask | None = None) -> Tally:
    """One of all, in their order."""
    tallies = list(tallies)
    profiles = [each.profile for each in tallies if each.profile is not None]
    points = None if tallies[0].points is None else np.concatenate([each.points for each in tallies], axis=1)
    return Tally(_merged(profiles) if profiles else None, np.sum([each.histogram for each in tallies], axis=0), points)


TALLY = Work("bins", _tally, merge)


def _merged(profiles: list[Profile]) -> Profile:
    k = max(each.k for each in profiles)
    while True:
        shifts = [min(k - each.k, 63) for each in profiles]  # by more there is the sign left
        begins = [each.first >> shift for each, shift in zip(profiles, shifts, strict=True)]
        ends = [(each.first + each.sums.shape[1] - 1) >> shift for each, shift in zip(profiles, shifts, strict=True)]
        first, size = min(begins), max(ends) - min(begins) + 1
        if size <= FINE:
            break
        k += 1
    sums = np.zeros((len(profiles[0].sums), size))
    for each, shift in zip(profiles, shifts, strict=True):
        bins = (np.arange(each.sums.shape[1]) + each.first >> shift) - first
        for total, row in zip(sums, each.sums, strict=True):
            total += np.bincount(bins, row, size)
    return Profile(k, first, sums)


def _result(ask: _Ask, found: Tally, bins: int, **about) -> Binned:
    assert found.profile is not None
    sums = found.profile.sums
    joined = np.arange(0, sums.shape[1], -(-sums.shape[1] // bins))
    sums = np.add.reduceat(sums, joined, axis=1)
    n, w, wx, wy, wd, wd2, r, r2 = sums[:, sums[0] > 0]
    x, y, d = wx / w, wy / w, wd / w
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.maximum(wd2 - wd * d, 0) / (n - 1) / w)
        spread = np.sqrt(np.maximum(r2 - r**2 / n, 0) / (n - 1))
    points = found.points
    if points is not None:
        points = points[:, np.argsort(points[0], kind="stable")]
    if ask.log:
        x = 10**x
        points = None if points is None else np.concatenate([10 ** points[:1], points[1:]])
    return Binned(
        log=ask.log,
        x=x,
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
        **about,
    )
