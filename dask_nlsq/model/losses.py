"""Loss functions of least squares, and the likelihood of counts."""

from functools import partial

import jax
import jax.numpy as jnp


def _rho_linear(z):
    return z, jnp.ones_like(z), jnp.zeros_like(z)


def _rho_soft_l1(z):
    root = jnp.sqrt(1 + z)
    return 2 * z / (1 + root), 1 / root, -0.5 / root**3  # the first is 2 (root - 1), without cancellation


def _rho_huber(z):
    outlier = z > 1
    root = jnp.sqrt(jnp.where(outlier, z, 1.0))
    return (
        jnp.where(outlier, 2 * root - 1, z),
        jnp.where(outlier, 1 / root, 1.0),
        jnp.where(outlier, -0.5 / root**3, 0.0),
    )


def _rho_cauchy(z):
    t = 1 + z
    return jnp.log1p(z), 1 / t, -1 / t**2


def _rho_arctan(z):
    t = 1 + z**2
    return jnp.arctan(z), 1 / t, -2 * z / t**2


# rho(z), rho'(z), rho''(z) of z = (residual / f_scale)^2, as in scipy.optimize.least_squares. A new loss goes here.
LOSSES = {
    "linear": _rho_linear,
    "soft_l1": _rho_soft_l1,
    "huber": _rho_huber,
    "cauchy": _rho_cauchy,
    "arctan": _rho_arctan,
}


LIKELIHOODS = ("poisson",)  # losses that need more than the residual
MODEL_FLOOR = 1e-10  # counts: the least mean at which a Poisson likelihood is evaluated


def poisson_terms(r, y):
    """Mean of each point, half its deviance ``mean - y + y log(y / mean)``, and where the mean is floored.

    ``r`` = f - y, counts ``y``, all (n,). Below the floor a point without counts adds nothing.
    """
    floored = r + y <= MODEL_FLOOR
    mean = jnp.maximum(r + y, MODEL_FLOOR)
    some = jnp.where(y > 0, y, 1.0)
    t = jnp.where(floored, MODEL_FLOOR - y, r) / some
    return mean, jnp.where(y > 0, some * (t - jnp.log1p(t)), jnp.where(floored, 0.0, mean)), floored


@partial(jax.jit, static_argnames="loss")
def masked_cost(residual, valid, f_scale, loss="linear"):
    """``0.5 * f_scale^2 * sum rho((residual / f_scale)^2)`` over the valid points; residual and valid (n,)."""
    rho = LOSSES[loss]((residual / f_scale) ** 2)[0] * f_scale**2
    return 0.5 * jnp.sum(jnp.where(valid, rho, 0.0))
