"""Fits of all pixels of a block, and other tries of those that have failed.

Where amplitudes are far off, a fit creeps, or loses the other parameters. So a first try ends early. The second one begins
where the parameters in which the model is linear have been solved for, and a third goes on where the better of them has
ended. Of the tries of a pixel that with the lowest chi2 counts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np

from ..model.function import Model
from .checks import is_linear_by_structure
from .lane_loop import Fitted, Pixels, map_kernel, prepare
from .lanes import Lanes, Limits, MapSpec, MapStatus, diagonal, inverse, normal_equations, succeeded
from .rules import ROUNDING, RUNNING

FIRST, FIRST_PER_PARAM = 30, 10  # evaluations of a first try: fits that do not creep need fewer
LEVEL = 1e-9  # relative difference of two values of chi2 that count as the same
TRIED_AGAIN = MapStatus.ITERATION_LIMIT, MapStatus.SINGULAR, MapStatus.STUCK, MapStatus.UNDETERMINED

Compiling = Callable[[str, Pixels], AbstractContextManager]


def fit_pixels(model: Model, spec: MapSpec, pixels: Pixels, n_pixels: int, limits: Limits, compiling: Compiling) -> Fitted:
    """Results of the first ``n_pixels``, as arrays of NumPy; call inside ``float64()``.

    ``compiling(what, pixels)`` is entered around each call of a kernel that may compile.
    """
    kernel, linear = map_kernel(model, spec), _linear(model, spec, pixels)

    def run(pixels, n, most):
        with compiling("map", pixels):
            found = kernel(pixels, n, limits._replace(max_nfev=most))
        return Fitted(*(np.array(each)[:n] for each in found))

    first = min(limits.max_nfev, FIRST + FIRST_PER_PARAM * len(spec.free)) if linear else limits.max_nfev
    if linear:
        start = np.broadcast_to(pixels.start, (len(pixels.y), pixels.start.shape[1]))
        pixels = pixels._replace(start=start)  # of one shape in all tries, for which the kernel is compiled once
    found = run(pixels, n_pixels, first)
    left = limits.max_nfev - first
    for again, most in ((True, left // 2), (False, left - left // 2)):
        failed = np.flatnonzero(np.isin(found.status, TRIED_AGAIN if again else [MapStatus.ITERATION_LIMIT]))
        if most == 0 or not len(failed):
            continue
        some = _some(pixels, failed)
        if again:
            with compiling("linear", some):
                some = some._replace(start=np.asarray(_start_kernel(model, spec, linear)(some, limits)))
        else:
            some = _some(pixels._replace(start=_filled(found.popt, len(pixels.y))), failed)
        found = _better(found, run(some, len(failed), most), failed, _rounding(some, len(failed)))
    return found


def _linear(model: Model, spec: MapSpec, pixels: Pixels) -> tuple[int, ...]:
    """Places of free parameters in which the model is linear together; none where a guess starts each pixel."""

    def places():
        x, start = tuple(c[0] for c in pixels.x), np.ones(pixels.start.shape[1])
        found: tuple[int, ...] = ()
        for k in spec.free:
            found += (k,) if is_linear_by_structure(model, spec.layouts, x, start, (*found, k)) else ()
        return found

    key = "linear parameters", spec.layouts, spec.free
    if key not in model.choices:
        model.choices[key] = places() if spec.guess is None else ()
    return model.choices[key]


def _start_kernel(model: Model, spec: MapSpec, linear: tuple[int, ...]):
    """Compiled ``(pixels, limits) -> start`` (pixels, all parameters), where the ``linear`` ones are solved for."""
    return model.get(("linear starts", spec, linear), lambda: model.jit(_build_start(model, spec, linear)))


def _build_start(model, spec, linear):
    rows = jnp.array([spec.free.index(k) for k in linear])

    def solved(pixels, limits):
        data = prepare(spec, pixels)
        start, status = data.start.T, jnp.full(len(pixels.y), RUNNING)
        lanes = Lanes(data._replace(start=start), None, start[jnp.array(spec.free)], None, status)
        # of counts by least squares, too, which has a gradient where the mean is not positive
        gram, _, _ = normal_equations(model, spec._replace(loss="linear"), limits, lanes)
        lengths = jnp.sqrt(diagonal(gram)[rows])
        lengths = jnp.where(lengths > 0, lengths, 1.0)
        inverted, _ = inverse(gram[rows][:, rows] / (lengths[:, None] * lengths))
        step = -jnp.sum(inverted * (gram[rows, -1] / lengths), axis=1) / lengths
        return start.at[jnp.array(linear)].add(jnp.where(jnp.isfinite(step), step, 0.0)).T

    return solved


def _some(pixels: Pixels, which) -> Pixels:
    """Some of the pixels, filled up to as many."""
    n = len(pixels.y)
    return jax.tree.map(lambda each: each if len(each) == 1 < n else _filled(each[which], n), pixels)


def _filled(array, n):
    return np.concatenate([array, np.repeat(array[-1:], n - len(array), axis=0)])


def _rounding(pixels: Pixels, n: int):
    """What chi2 of the first ``n`` pixels may be wrong by."""
    values = np.where(pixels.mask, 0.0, pixels.y.astype(np.float64)) / pixels.sigma
    return ROUNDING**2 * np.sum(values**2, axis=1, where=np.isfinite(values))[:n]


def _better(found: Fitted, again: Fitted, which, rounding) -> Fitted:
    """With the results of another try of some pixels, where they are better."""
    nfev, chi2 = found.nfev.copy(), found.chi2[which]
    nfev[which] += again.nfev
    level = again.chi2 <= chi2 * (1 + LEVEL)
    better = (again.chi2 < chi2 - rounding) | level & (chi2 > rounding) & succeeded(again.status)
    for old, new in zip(found, again, strict=True):
        old[which[better]] = new[better]
    return found._replace(nfev=nfev)
