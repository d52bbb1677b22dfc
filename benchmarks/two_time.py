"""The measurement of the demonstration as one dense fit of 2 A + 7 parameters, for comparison."""

from collections.abc import Callable

import numpy as np

from dask_nlsq.demo.measurement import GAP, RATE_FLOOR, SMOOTHING, WAVEVECTOR, Measurement


def all_angles(measurement: Measurement) -> Callable:
    """The model ``f((k, i, j), *params)``, k the number of an angle: contrasts, offsets, then what all share."""
    import jax.numpy as jnp

    from dask_nlsq.demo.model import sinc

    angles, a = np.radians(measurement.angles), len(measurement.angles)
    log_t, dt = np.log(measurement.times), measurement.exposure
    diffusion_scale = WAVEVECTOR**2 * dt / 2
    shear_scale = WAVEVECTOR * GAP * dt / (2 * np.pi)

    def model(coordinates, *params):
        angle, i, j = coordinates
        contrast, offset = jnp.stack(params[:a]), jnp.stack(params[a : 2 * a])
        D0, alpha, D_offset, g0, beta, g_offset, phi0 = params[2 * a :]

        def integral(scale, exponent, constant):
            rate = jnp.maximum(scale * jnp.exp(exponent * log_t) + constant, RATE_FLOOR)
            F = jnp.concatenate([jnp.zeros(1), jnp.cumsum((rate[1:] + rate[:-1]) / 2)])
            return jnp.sqrt((F[i] - F[j]) ** 2 + SMOOTHING)

        across = shear_scale * jnp.cos(jnp.radians(phi0) - angles)  # of each angle once, not of each point
        g_diff = jnp.exp(-diffusion_scale * integral(D0, alpha, D_offset))
        g_shear = sinc(across[angle] * integral(g0, beta, g_offset)) ** 2
        return offset[angle] + contrast[angle] * (g_diff * g_shear) ** 2

    return model
