"""One bounded trust-region fit per pixel: all pixels of a block in one compiled loop.

Pixels need from 3 to some 100 steps (`map_step`). So that the quick ones need not wait, the lanes of pixels that are done
are given the next pixels of the block; that moves data, so it waits until a quarter of them are done. Those that work are
gathered in front then, and only groups of lanes with work to do are evaluated, so that the last pixels do not cost a
block's time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..model.function import Model
from . import rules
from .lanes import RUNNING, Data, Lanes, Limits, MapSpec, MapStatus, Point, as_x, inverse, iterate, n_lanes
from .rules import OFF_BOUND, at_bounds

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
    """Compiled ``(pixels, n_pixels, limits) -> Fitted`` for the first n_pixels of a block; call inside ``float64()``."""
    return model.get(("map", spec), lambda: model.jit(_build(model, spec)))


def _build(model: Model, spec: MapSpec):
    def fit(pixels, n_pixels, limits):
        data, n_points = _prepare(spec, pixels)
        if spec.guess is not None:
            pixels = pixels._replace(start=_guesses(spec, data, n_points, pixels.start))

        def unfinished(state):
            lanes, _, taken = state
            return (taken < n_pixels) | jnp.any(lanes.status == RUNNING)

        def fill_and_fit(state):
            lanes, out, taken = state
            lanes = _compacted(lanes)
            idle = lanes.status != RUNNING
            turn = taken + jnp.cumsum(idle) - 1
            pixel = jnp.where(idle, jnp.where(turn < n_pixels, turn, len(pixels.y)), lanes.pixel)
            lanes = _load(spec, pixels, data, n_points, lanes, pixel, idle)
            taken = jnp.minimum(taken + jnp.sum(idle), n_pixels)
            n_running = jnp.sum(lanes.status == RUNNING)
            few = jnp.where(taken < n_pixels, int(REFILL * n_lanes(pixels.y.shape[1])), n_running // NARROWER)

            def busy(lanes):
                return jnp.sum(lanes.status == RUNNING) > few

            lanes = lax.while_loop(busy, partial(iterate, model, spec, limits), lanes)
            return lanes, _store(spec, limits, lanes, out), taken

        state = _empty(spec, pixels), _no_result(spec, pixels), 0
        return lax.while_loop(unfinished, fill_and_fit, state)[1]

    return fit


def _compacted(lanes: Lanes) -> Lanes:
    """Lanes that work first; not their data, which are loaded again."""
    order = jnp.argsort(lanes.status != RUNNING, stable=True)
    return jax.tree.map(lambda each: each[..., order], lanes._replace(data=()))._replace(data=lanes.data)


# ---------------------------------------------------------------------------------------------------------------------
# pixels in and out of the lanes


def _empty(spec, pixels: Pixels) -> Lanes:
    p, n = len(spec.free), pixels.y.shape[1]
    width = n_lanes(n)

    def zeros(*shape, dtype=jnp.float64):
        return jnp.zeros((*shape, width), dtype)

    x = tuple(jnp.zeros((width if len(c) > 1 else 1, n), _dtype(c)) for c in pixels.x)
    here = Point(**dict.fromkeys(Point._fields, zeros()))._replace(
        **{name: zeros(p) for name in ("params", "longest", "reach", "d", "gradient", "newton")},
        gram=zeros(p + 1, p + 1),
        hessian=zeros(p, p),
        finite=zeros(dtype=bool),
        regular=zeros(dtype=bool),
        n_faded=zeros(dtype=int),
        n_full=zeros(dtype=int),
    )
    numbers = dict.fromkeys(("size", "predicted", "step_norm", "step_h_norm", "radius", "alpha"), zeros())
    return Lanes(
        data=Data(*jnp.zeros((2, width, n)), x),
        pixel=zeros(dtype=int) + len(pixels.y),
        start=zeros(pixels.start.shape[1]),
        here=here,
        **dict.fromkeys(("full", "tests_passed"), zeros(dtype=bool)),
        **dict.fromkeys(("lower", "upper", "trial"), zeros(p)),
        **numbers,
        **dict.fromkeys(("n_points", "stalls", "nfev"), zeros(dtype=int)),
        status=zeros(dtype=int) + int(MapStatus.MASKED),
    )


def _dtype(coordinate):
    return jnp.int64 if coordinate.dtype.kind in "iu" else jnp.float64


def _prepare(spec, pixels: Pixels) -> tuple[Data, Any]:
    """Data of all pixels as the steps need them, and how many points of each count."""
    x = tuple(c.astype(_dtype(c)) for c in pixels.x)
    y, sigma = pixels.y.astype(jnp.float64), pixels.sigma.astype(jnp.float64)
    valid = jnp.isfinite(y) & jnp.isfinite(sigma) & ~pixels.mask
    for c in x:
        valid &= jnp.isfinite(c)
    if spec.layouts.invalid is not None:
        valid &= ~spec.layouts.invalid.hits(pixels.y)
    return Data(jnp.where(valid, y, 0.0), jnp.where(valid, 1 / sigma, 0.0), x), jnp.sum(valid, axis=1)


def _load(spec, pixels: Pixels, data: Data, n_points, lanes: Lanes, pixel, idle) -> Lanes:
    """Give the idle lanes new pixels; a pixel behind the last one leaves its lane idle."""

    def rows(array):
        return array.at[pixel].get(mode="clip")

    def vectors(array):  # (pixels or 1, m) -> (m, lanes)
        return (rows(array) if len(array) > 1 else jnp.broadcast_to(array, (len(pixel), array.shape[1]))).T

    data = Data(rows(data.y), rows(data.weight), tuple(rows(c) if len(c) > 1 else c for c in data.x))
    n_points = rows(n_points)
    weighed = jnp.sum(data.weight**2 * data.y * (1.0 if spec.loss == "poisson" else data.y), axis=1)
    start, lower, upper = map(vectors, (pixels.start, pixels.lower, pixels.upper))
    trial = start[jnp.array(spec.free)]
    if spec.bounded:
        trial = rules.off_the_bounds(jnp, trial, lower, upper, OFF_BOUND)
    status = jnp.where(jnp.all(jnp.isfinite(start), axis=0), RUNNING, int(MapStatus.NON_FINITE))
    status = jnp.where(n_points >= len(spec.free), status, int(MapStatus.TOO_FEW_POINTS))
    status = jnp.where(n_points == 0, int(MapStatus.MASKED), status)  # even where the start was a guess from nothing
    status = jnp.where(pixel < len(pixels.y), status, int(MapStatus.MASKED))
    return lanes._replace(
        data=data,
        pixel=pixel,
        start=start,
        lower=lower,
        upper=upper,
        n_points=n_points,
        size=weighed,
        trial=jnp.where(idle, trial, lanes.trial),
        nfev=jnp.where(idle, 0, lanes.nfev),
        status=jnp.where(idle, status, lanes.status),
    )


def _guesses(spec, data: Data, n_points, start):
    """Start (pixels, all parameters) from a guess; points that do not count hold nan, or the mean of those that do."""
    mean = jnp.sum(data.y, axis=1) / jnp.maximum(n_points, 1)
    instead = jnp.nan if hasattr(spec.guess.f, "leaves_out_nan") else mean[:, None]
    y = jnp.where(data.weight > 0, data.y, instead)
    held = jnp.array([k not in spec.free for k in range(start.shape[1])])

    def one(k):
        found = spec.guess.f(as_x(spec, tuple(c[k] if len(c) > 1 else c[0] for c in data.x)), y[k])
        return jnp.stack([jnp.asarray(each, jnp.float64).reshape(()) for each in found])

    n_pixels = len(y)
    together = min(GUESSED_TOGETHER, n_pixels)
    pixels = jnp.arange(-(-n_pixels // together) * together) % n_pixels
    return jnp.where(held, start, lax.map(one, pixels, batch_size=together)[:n_pixels])


def _no_result(spec, pixels: Pixels) -> Fitted:
    P, p, p_all = len(pixels.y), len(spec.free), pixels.start.shape[1]
    return Fitted(
        popt=jnp.full((P, p_all), jnp.nan),
        pcov=jnp.full((P, p, p), jnp.nan),
        chi2=jnp.full(P, jnp.nan),
        distance=jnp.full(P, jnp.nan),
        n_points=jnp.zeros(P, jnp.int64),
        nfev=jnp.zeros(P, jnp.int64),
        status=jnp.full(P, int(MapStatus.MASKED), jnp.uint8),
        at_bound=jnp.zeros((P, p), jnp.int8),
    )


def _store(spec, limits: Limits, lanes: Lanes, out: Fitted) -> Fitted:
    """Results with those of the lanes that are done."""
    here, p = lanes.here, len(spec.free)
    free = jnp.array(spec.free)
    done = (lanes.status != RUNNING) & (lanes.pixel < len(out.popt))
    target = jnp.where(done, lanes.pixel, len(out.popt))  # behind the last: dropped
    fitted = (lanes.status != MapStatus.NON_FINITE) & (lanes.nfev > 0)
    popt = lanes.start.at[free].set(here.params)
    popt = jnp.where(fitted, popt, jnp.nan)
    lengths = jnp.sqrt(jnp.stack([here.gram[k, k] for k in range(p)]))
    magnitude = rules.magnitude(jnp, lanes.size, here.reach, lengths)
    unknown = jnp.any(rules.undetermined(jnp, lengths, here.longest, here.params, magnitude), axis=0)
    lengths = jnp.where(lengths > 0, lengths, 1.0)
    lengths = lengths[:, None] * lengths
    pcov, regular = inverse(here.gram[:p, :p] / lengths)
    regular &= here.regular & ~unknown
    pcov = pcov / lengths
    if not spec.absolute_sigma:
        dof = lanes.n_points - p
        pcov = pcov * jnp.where(dof > 0, 2 * here.cost / dof, jnp.inf)
    pcov = jnp.where(regular & ~jnp.isnan(pcov), pcov, jnp.inf)
    at_bound = jnp.zeros_like(here.params)
    if spec.bounded:
        perr = jnp.sqrt(jnp.stack([pcov[k, k] for k in range(p)]))
        at_bound = at_bounds(here.params, perr, lanes.lower, lanes.upper)
    converged = (lanes.status >= MapStatus.GTOL) & (lanes.status <= MapStatus.ROUNDING)
    status = jnp.where(converged & jnp.any(at_bound != 0, axis=0), int(MapStatus.AT_BOUND), lanes.status)
    ended = converged | (lanes.status == rules.STUCK)
    status = jnp.where(ended & ~regular, int(MapStatus.SINGULAR), status)
    status = jnp.where(ended & unknown, int(MapStatus.UNDETERMINED), status)
    status = jnp.where(ended & (here.floored > 0), rules.STUCK, status)

    def put(old, new):
        return old.at[target].set(new.astype(old.dtype), mode="drop")

    return Fitted(
        popt=put(out.popt, popt.T),
        pcov=put(out.pcov, jnp.where(fitted, pcov, jnp.nan).transpose(2, 0, 1)),
        chi2=put(out.chi2, jnp.where(fitted, 2 * here.cost, jnp.nan)),
        distance=put(out.distance, jnp.where(fitted, here.distance, jnp.nan)),
        n_points=put(out.n_points, lanes.n_points),
        nfev=put(out.nfev, lanes.nfev),
        status=put(out.status, status),
        at_bound=put(out.at_bound, jnp.where(fitted, at_bound, 0).T),
    )
