"""Fits of all pixels of a block, and other tries of those that have failed.

Where amplitudes are far off, a fit creeps, or loses the other parameters. So a first try ends early. The second one begins
where the parameters in which the model is linear have been solved for, and a third goes on where the better of them has
ended. Which try of a pixel counts says `rules.is_better`. All tries work on the arrays of the block, and need no others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..model.function import Model
from .checks import linear_places
from .lane_loop import Fitted, Pixels, map_kernel, prepare
from .lanes import Limits, MapSpec, MapStatus, diagonal, equations_of, inverse, lanes_of, own_rows, succeeded
from .rules import is_better, rounding_of_chi2, vanishes

FIRST, FIRST_PER_PARAM = 30, 10  # evaluations of a first try: fits that do not creep need fewer
TRIED_AGAIN = MapStatus.ITERATION_LIMIT, MapStatus.SINGULAR, MapStatus.STUCK, MapStatus.UNDETERMINED

Compiling = Callable[[str, Pixels], AbstractContextManager]


def fit_pixels(model: Model, spec: MapSpec, pixels: Pixels, n_pixels: int, limits: Limits, compiling: Compiling) -> Fitted:
    """Results of the first ``n_pixels``, as arrays of NumPy; call inside ``float64()``.

    ``compiling(what, pixels)`` is entered around each call of a kernel that may compile.
    """
    kernel, n = map_kernel(model, spec), len(pixels.y)
    guessed, n_params = spec.guess is not None, pixels.start.shape[1]
    linear = () if guessed else linear_places(model, spec.layouts, pixels.y.shape[1], n_params, spec.free)

    def run(pixels, which, most):
        with compiling("map", pixels):
            found = kernel(pixels, np.resize(which, n), len(which), limits._replace(max_nfev=most))
        return Fitted(*(np.asarray(each)[which] for each in found))

    first = min(limits.max_nfev, FIRST + FIRST_PER_PARAM * len(spec.free)) if linear else limits.max_nfev
    if linear:
        start = np.broadcast_to(pixels.start, (n, n_params))
        pixels = pixels._replace(start=start)  # of one shape in all tries, for which the kernel is compiled once
    found, left = run(pixels, np.arange(n_pixels), first), limits.max_nfev - first
    failed = np.flatnonzero(np.isin(found.status, TRIED_AGAIN))
    if left and len(failed):
        with compiling("linear", pixels):
            solved = start_kernel(model, spec, linear)(pixels, np.resize(failed, n), len(failed), limits)
        start, rounding = np.array(solved[0]), rounding_of_chi2(np, np.asarray(solved[1]))
        found = _better(found, run(pixels._replace(start=start), failed, left - left // 2), failed, rounding)
        failed = np.flatnonzero(found.status == MapStatus.ITERATION_LIMIT)  # which has failed before, too
        if left // 2 and len(failed):
            start[failed] = found.popt[failed]
            found = _better(found, run(pixels._replace(start=start), failed, left // 2), failed, rounding)
    return found


def start_kernel(model: Model, spec: MapSpec, linear: tuple[int, ...]):
    """Compiled ``(pixels, which, n, limits) -> start, size``, of all pixels; call it inside ``float64()``.

    In the start (pixels, all parameters) of the first n of ``which`` (pixels,) the ``linear`` parameters are solved for.
    Those that their bounds stop stay, and those that would vanish beside the data: a fit that begins without its amplitudes
    would not know what it lost. The others are solved for beside them. The size is sum w y^2, of counts sum w y.
    """
    return model.get(("linear starts", spec, linear), lambda: model.jit(_build_start(model, spec, linear)))


def _build_start(model, spec, linear):
    rows, places = jnp.array([spec.free.index(k) for k in linear]), jnp.array(linear)
    # of any loss by least squares: a robust one hardly says how far to go, and of counts the likelihood has no gradient
    # where the mean is not positive
    squares = spec._replace(loss="linear")

    def step(gram, held):
        """To the minimum along the linear parameters, but those that are ``held``, (linear, lanes)."""
        lengths = jnp.sqrt(diagonal(gram)[rows])
        lengths = jnp.where((lengths > 0) & ~held, lengths, jnp.inf)
        inverted, _ = inverse(gram[rows][:, rows] / (lengths[:, None] * lengths))
        found = -jnp.sum(inverted * (gram[rows, -1] / lengths), axis=1) / lengths
        return jnp.where(jnp.isfinite(found), found, 0.0)

    def solved(pixels, which, n, limits):
        data = prepare(spec, pixels)
        n_pixels, width = len(data.y), min(lanes_of(spec, data.y), len(data.y))

        def some(k, start):
            own = lax.dynamic_slice_in_dim(which, jnp.minimum(k * width, n_pixels - width), width)
            gram, _, _ = equations_of(model, squares, limits, data, data.start, own)
            lower, upper = (own_rows(each, own)[:, rows].T for each in (data.lower, data.upper))
            before, lengths = data.start[own][:, places].T, jnp.sqrt(diagonal(gram)[rows])
            after = before + step(gram, jnp.zeros(before.shape, bool))
            vanish = vanishes(jnp, after * lengths, before * lengths, data.size[own])
            after = before + step(gram, (after < lower) | (after > upper) | vanish)
            return start.at[own[:, None], places].set(jnp.clip(after, lower, upper).T)

        return lax.fori_loop(0, -(-n // width), some, data.start), data.size

    return solved


def _better(found: Fitted, again: Fitted, which, rounding) -> Fitted:
    """With the results of another try of some pixels, where they are better."""
    nfev, old, new = found.nfev.copy(), *(succeeded(each) for each in (found.status[which], again.status))
    nfev[which] += again.nfev
    better = is_better(np, found.chi2[which], old, again.chi2, new, rounding[which])
    for each, other in zip(found, again, strict=True):
        each[which[better]] = other[better]
    return found._replace(nfev=nfev)
