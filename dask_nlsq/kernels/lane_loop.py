"""One bounded trust-region fit per pixel: all pixels of a block in one compiled loop.

Pixels need between 3 and about 100 steps (`iterate`). So that quick pixels need not wait, the lanes of finished pixels get
the next pixels of the block. This moves data, so it happens when a quarter of the lanes are finished. Active lanes are then
moved to the front, and only groups with active lanes are evaluated, so that the last pixels do not take the time of a full
block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..model.function import Model
from ..model.starts import Guess
from . import rules
from .lanes import Data, Lanes, MapSpec, MapStatus, as_x, diagonal, inverse, iterate, lanes_of, linearise
from .rules import OFF_BOUND, RUNNING, Course, places_at_bounds
from .steps import Point, Step

REFILL = 0.75  # share of the lanes that work, below which the others are given new pixels
GUESSED_TOGETHER = 64  # pixels: a guess may take far more memory than the data that it is made from
NARROWER = 4  # times fewer of the last pixels, whenever they are gathered in front


class Pixels(NamedTuple):
    """Data of a block; the first axis is that of the pixels, or has length 1 where all pixels share the values."""

    y: Any  # (pixels, n)
    sigma: Any  # (pixels or 1, n or 1)
    mask: Any  # (pixels or 1, n or 1) bool
    x: tuple[Any, ...]  # (pixels or 1, n) each
    start: Any  # (pixels or 1, all parameters)
    lower: Any  # (pixels or 1, free parameters)
    upper: Any


class Fitted(NamedTuple):
    """Results of the pixels of a block, (pixels, ...)."""

    popt: Any  # (pixels, p), of all parameters
    pcov: Any  # (pixels, p, p) of the free ones
    chi2: Any  # twice the cost
    distance: Any  # standard errors to the optimum
    n_points: Any
    nfev: Any
    status: Any
    at_bound: Any  # (pixels, p) of the free ones: -1 lower, 1 upper, 0 neither


def map_kernel(model: Model, spec: MapSpec):
    """Compiled ``(pixels, which, n, limits) -> Fitted`` for some pixels of a block; call it inside ``float64()``.

    They are the first n of ``which`` (pixels,), places of pixels.
    """
    return model.get(("map", spec), lambda: model.jit(build_fit(model, spec)))


def build_fit(model: Model, spec: MapSpec):
    """What `map_kernel` compiles."""

    def fit(pixels, which, n_pixels, limits):
        data = prepare(spec, pixels)
        if spec.guess is not None:
            data = data._replace(start=_guesses(model, spec, data))
        empty = _empty(spec, pixels)

        def unfinished(state):
            lanes, _, taken = state
            return (taken < n_pixels) | jnp.any(lanes.status == RUNNING)

        def fill_and_fit(state):
            lanes, out, taken = state
            order = jnp.argsort(lanes.status != RUNNING, stable=True)  # those that work first
            lanes = jax.tree.map(lambda each: each[..., order], lanes)
            idle = lanes.status != RUNNING
            turn = taken + jnp.cumsum(idle) - 1
            next_ones = jnp.where(turn < n_pixels, which.at[turn].get(mode="clip"), len(pixels.y))
            pixel = jnp.where(idle, next_ones, lanes.pixel)
            lanes = _load(spec, data, lanes, pixel, idle, empty.course)
            taken = jnp.minimum(taken + jnp.sum(idle), n_pixels)
            n_running = jnp.sum(lanes.status == RUNNING)
            few = jnp.where(taken < n_pixels, int(REFILL * lanes_of(spec, pixels.y)), n_running // NARROWER)

            def busy(lanes):
                return jnp.sum(lanes.status == RUNNING) > few

            lanes = lax.while_loop(busy, partial(iterate, model, spec, limits), lanes)
            return lanes._replace(data=()), _store(spec, lanes, out), taken

        return lax.while_loop(unfinished, fill_and_fit, (empty, no_result(spec, pixels), 0))[1]

    return fit


# ---------------------------------------------------------------------------------------------------------------------
# pixels in and out of the lanes


def _empty(spec, pixels: Pixels) -> Lanes:
    """Lanes without a pixel or data, at the beginning of their course."""
    p, width = len(spec.free), lanes_of(spec, pixels.y)

    def full(value, *shape):
        return jnp.full((*shape, width), value)

    nowhere, step = Point(), Step(full(jnp.inf, p), full(jnp.inf, p), full(-jnp.inf), full(False))
    course = jax.tree.map(full, Course(None, None))._replace(here=nowhere, step=step)
    lanes = Lanes((), full(len(pixels.y)), full(0.0, p), course, full(int(MapStatus.MASKED)))
    data = Data((), (), (), full(0), full(0.0), (), full(0.0, p), full(0.0, p))
    found = lanes._replace(data=data), full(0.0, p + 1, p + 1), full(0.0), full(0.0)
    point = jax.eval_shape(partial(linearise, spec), *found)
    here = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), point)
    known = {
        name: jnp.full_like(getattr(here, name), value) for name, value in nowhere._asdict().items() if value is not None
    }
    return lanes._replace(course=lanes.course._replace(here=here._replace(**known)))


def _dtype(coordinate):
    return jnp.int64 if coordinate.dtype.kind in "iu" else jnp.float64


def prepare(spec, pixels: Pixels) -> Data:
    """Data of all pixels as the steps need them."""
    x = tuple(c.astype(_dtype(c)) for c in pixels.x)
    y, sigma = pixels.y.astype(jnp.float64), pixels.sigma.astype(jnp.float64)
    valid = jnp.isfinite(y) & jnp.isfinite(sigma) & ~pixels.mask
    for c, _ in zip(x, spec.layouts.x, strict=False):  # a table, which may follow, says nothing of the points
        valid &= jnp.isfinite(c)
    if spec.layouts.invalid is not None:
        valid &= ~spec.layouts.invalid.hits(pixels.y)
    y, weight = jnp.where(valid, y, 0.0), jnp.where(valid, 1 / sigma, 0.0)
    size = jnp.sum(weight**2 * y * (1.0 if spec.loss == "poisson" else y), axis=1)
    return Data(y, weight, x, jnp.sum(valid, axis=1), size, pixels.start, pixels.lower, pixels.upper)


def _load(spec, data: Data, lanes: Lanes, pixel, idle, fresh: Course) -> Lanes:
    """Give the idle lanes new pixels, at a ``fresh`` course; a pixel behind the last one leaves its lane idle."""
    n_pixels = len(data.y)

    def rows(array):
        return array.at[pixel].get(mode="clip")

    def vectors(array):  # (pixels or 1, m) -> (m, lanes)
        return (rows(array) if len(array) > 1 else jnp.broadcast_to(array, (len(pixel), array.shape[1]))).T

    x = tuple(rows(c) if len(c) > 1 else c for c in data.x)
    start, lower, upper = map(vectors, (data.start, data.lower, data.upper))
    data = Data(rows(data.y), rows(data.weight), x, rows(data.n_points), rows(data.size), start, lower, upper)
    trial = start[jnp.array(spec.free)]
    if spec.bounded:
        trial = rules.off_the_bounds(jnp, trial, lower, upper, OFF_BOUND)
    status = jnp.where(jnp.all(jnp.isfinite(start), axis=0), RUNNING, int(MapStatus.NON_FINITE))
    status = jnp.where(data.n_points >= len(spec.free), status, int(MapStatus.TOO_FEW_POINTS))
    # masked even where the start was a guess from nothing
    status = jnp.where((data.n_points > 0) & (pixel < n_pixels), status, int(MapStatus.MASKED))
    return jax.tree.map(partial(jnp.where, idle), Lanes((), pixel, trial, fresh, status), lanes)._replace(data=data)


def _guesses(model: Model, spec, data: Data):
    """Start (pixels, all parameters) from a guess; points that do not count hold nan, or the mean of those that do.

    A ready model guesses within the bounds of each pixel, and beside the values of parameters that are held or given.
    """
    mean = jnp.sum(data.y, axis=1) / jnp.maximum(data.n_points, 1)
    ready = isinstance(spec.guess.f, Guess)
    y = jnp.where(data.weight > 0, data.y, jnp.nan if ready else mean[:, None])
    free, tied = jnp.array(spec.free), np.array(getattr(model.f, "tied", ()), dtype=int)
    held = jnp.array([k not in spec.free or (ready and k in spec.guess.f.given) for k in range(data.start.shape[1])])

    def own(values, k):
        return values[k] if len(values) > 1 else values[0]

    def one(k):
        start = own(data.start, k)
        ends = [jnp.where(held, start, start.at[free].set(own(each, k))) for each in (data.lower, data.upper)]
        more = [jnp.stack(ends, axis=1).at[tied].set(spec.guess.f.ends[tied])] if ready else []
        found = spec.guess.f(as_x(spec, tuple(own(c, k) for c in data.x)), y[k], *more)
        return jnp.stack([jnp.asarray(each, jnp.float64).reshape(()) for each in found])

    n_pixels = len(y)
    together = min(GUESSED_TOGETHER, n_pixels)
    pixels = jnp.arange(-(-n_pixels // together) * together) % n_pixels
    return jnp.where(held, data.start, lax.map(one, pixels, batch_size=together)[:n_pixels])


def no_result(spec, pixels: Pixels) -> Fitted:
    """Of pixels that have not been fitted."""
    P, p = len(pixels.y), len(spec.free)

    def full(value, *shape, dtype=jnp.float64):
        return jnp.full((P, *shape), value, dtype)

    numbers = full(0, dtype=jnp.int64), full(0, dtype=jnp.int64), full(int(MapStatus.MASKED), dtype=jnp.uint8)
    popt, pcov = full(jnp.nan, pixels.start.shape[1]), full(jnp.nan, p, p)
    return Fitted(popt, pcov, full(jnp.nan), full(jnp.nan), *numbers, full(0, p, dtype=jnp.int8))


def _store(spec, lanes: Lanes, out: Fitted) -> Fitted:
    """Results with those of the lanes that are done."""
    data, here, nfev, p = lanes.data, lanes.course.here, lanes.course.nfev, len(spec.free)
    done = (lanes.status != RUNNING) & (lanes.pixel < len(out.popt))
    target = jnp.where(done, lanes.pixel, len(out.popt))  # behind the last: dropped
    fitted = (lanes.status != MapStatus.NON_FINITE) & (nfev > 0)
    popt = data.start.at[jnp.array(spec.free)].set(here.params)
    dark = (spec.loss == "poisson") & (data.size == 0)  # without a count the mean is 0, whatever else the model has
    unknown = jnp.any(here.undetermined, axis=0) | dark
    lengths = jnp.sqrt(diagonal(here.model.gram)[:p])
    variance = 1.0 if spec.absolute_sigma else here.variance
    alone = jnp.sqrt(variance) / lengths
    lengths = jnp.where(lengths > 0, lengths, 1.0)
    lengths = lengths[:, None] * lengths
    pcov, regular = inverse(here.model.gram[:p, :p] / lengths)
    regular &= here.model.regular & ~unknown
    pcov = pcov / lengths * variance
    pcov = jnp.where(regular & ~jnp.isnan(pcov), pcov, jnp.inf)
    at_bound = jnp.zeros_like(here.params)
    if spec.bounded:
        at_bound = places_at_bounds(jnp, here.params, jnp.sqrt(diagonal(pcov)), alone, data.lower, data.upper)
    status = map_status(lanes.status, jnp.any(at_bound != 0, axis=0), regular, unknown, here.floored > 0)

    values = [popt.T, pcov.transpose(2, 0, 1), 2 * here.cost, here.distance]
    values = [jnp.where(fitted.reshape(-1, *[1] * (each.ndim - 1)), each, jnp.nan) for each in values]
    popt, pcov, chi2, distance = values
    found = Fitted(popt, pcov, chi2, distance, data.n_points, nfev, status, jnp.where(fitted, at_bound, 0).T)
    return jax.tree.map(lambda old, new: old.at[target].set(new.astype(old.dtype), mode="drop"), out, found)


def map_status(status, at_bound, regular, unknown, floored):
    """Statuses that say what the fit has found, not only why it ended."""
    converged = (status >= MapStatus.GTOL) & (status <= MapStatus.ROUNDING)
    ended = converged | (status == rules.STUCK)
    status = jnp.where(converged & at_bound, int(MapStatus.AT_BOUND), status)
    status = jnp.where(ended & ~regular, int(MapStatus.SINGULAR), status)
    status = jnp.where(ended & unknown, int(MapStatus.UNDETERMINED), status)
    return jnp.where(ended & floored, rules.STUCK, status)
