"""Values of every point of a block: residuals, the model, its standard error."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ..model.function import Model, evaluate, evaluate_jac
from ..model.losses import MODEL_FLOOR, poisson_terms
from .blocks import KernelSpec, Tile
from .lane_loop import Pixels, prepare
from .lanes import MapSpec, as_x, group_size
from .rows import counts_of, residual_of

What = Literal["residual", "model", "band"]  # that `value_kernel` computes
PixelWhat = Literal["data", "model", "residual"]  # that `pixels_kernel` computes
VALUES_LEAD = {"residual": (), "model": (), "band": (2,)}  # axes before that of the points


def value_kernel(model: Model, spec: KernelSpec, what: What):
    """Compiled ``(params, f_scale, block) -> (capacity,)``: residuals or model values; the first n are meaningful.

    With a Poisson likelihood residuals are those of the deviance: half of their squares add up to the cost.

    "band" takes two more arguments, ``root`` (p, m) with ``root root^T = pcov``, and ``noise``, and gives (2, capacity):
    model values and their standard errors, ``sqrt(J pcov J^T + noise sigma^2)``, with the mean as sigma^2 of counts.
    """
    return model.get((what, spec), lambda: model.jit(_build_values(model, spec, what)))


def residuals_kernel(model: Model, spec: KernelSpec):
    """Compiled ``(params (k, p), f_scale, block) -> (k, capacity)``: residuals of `value_kernel`, for many params."""

    def build():
        return model.jit(jax.vmap(_build_values(model, spec, "residual"), in_axes=(0, None, None)))

    return model.get(("residuals", spec), build)


def pixels_kernel(model: Model, spec: MapSpec, what: PixelWhat):
    """Compiled ``pixels -> (pixels, n)``, with parameters as their starts: NaN where data or residuals do not count.

    Residuals as those of `value_kernel`.
    """

    def build(pixels: Pixels):
        data = prepare(spec, pixels)

        def one(k):
            y, weight, x = data.y[k], data.weight[k], tuple(c[k] if len(c) > 1 else c[0] for c in data.x)
            if what == "data":
                return jnp.where(weight > 0, y, jnp.nan)
            params = tuple(data.start[k if len(data.start) > 1 else 0])
            value = jnp.broadcast_to(evaluate(model, as_x(spec, x), params), y.shape)
            if what == "model":
                return value
            residual = (value - y) * weight
            if spec.loss == "poisson":
                residual = _of_deviance(residual, y)
            return jnp.where(weight > 0, residual, jnp.nan)

        return lax.map(one, jnp.arange(len(data.y)), batch_size=group_size(data.y.shape[1], data.start.shape[1], spec.kind))

    return model.get(("pixels", spec, what), lambda: model.jit(build))


def _of_deviance(r, y):
    """Residuals of the deviance: half of their squares add up to the cost; r = f - y."""
    return jnp.sign(r) * jnp.sqrt(2 * jnp.maximum(poisson_terms(r, y)[1], 0.0))


def _build_values(model, spec, what):
    def values(params, f_scale, block, *spread):
        capacity = block.buffers[0].shape[0]
        tile = spec.tile or capacity
        n = block.geometry[0]
        lead = VALUES_LEAD[what]

        def one_tile(i, out):
            first = jnp.maximum(jnp.minimum(i * tile, n - tile), 0)
            operands = Tile(spec.layouts, block, first, tile)
            if what == "model":
                piece = jnp.broadcast_to(evaluate(model, operands.x(), tuple(params)), (tile,))
            elif what == "band":
                piece = _band(model, spec, params, operands, *spread)
            else:
                every = jnp.ones(tile, bool)
                piece = residual_of(model, spec, params, block, first, every)
                if spec.loss == "poisson":
                    piece = _of_deviance(piece, counts_of(spec, block, first, every))
                if (hidden := operands.hidden()) is not None:
                    piece = jnp.where(hidden, jnp.nan, piece)
            return lax.dynamic_update_slice(out, piece, (*(0 for _ in lead), first))

        return lax.fori_loop(0, (n + tile - 1) // tile, one_tile, jnp.zeros((*lead, capacity)))

    return values


def _band(model, spec, params, tile, root, noise):
    """Model values and their standard errors, (2, tile.length)."""
    x, length = tile.x(), tile.length

    def value(*params):
        return jnp.broadcast_to(evaluate(model, x, params), (length,))

    if model.jac is not None:
        mean, rows = value(*params), root.T @ evaluate_jac(model, x, tuple(params)).T
    else:  # along the columns of the root, so that J itself is not needed
        mean, pushforward = jax.linearize(value, *params)
        rows = jax.vmap(lambda column: pushforward(*column))(root.T)
    scatter = jnp.maximum(mean, MODEL_FLOOR) if spec.loss == "poisson" else tile.sigma() ** 2
    variance = jnp.sum(rows**2, axis=0) + jnp.where(noise > 0, noise * scatter, 0.0)
    return jnp.stack([mean, jnp.sqrt(variance)])
