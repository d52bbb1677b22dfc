"""The model of the measurement in JAX. It shares no line with the simulation, so that an error in one cannot hide."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from .measurement import GAP, RATE_FLOOR, SMOOTHING, WAVEVECTOR, Measurement


def two_time_model(measurement: Measurement) -> Callable:
    """The model ``f((phi, i, j), contrast, offset, D0, ...)``, phi in degrees, i and j frames; differentiable everywhere."""
    log_t, dt = np.log(measurement.times), measurement.exposure
    diffusion_scale = WAVEVECTOR**2 * dt / 2
    shear_scale = WAVEVECTOR * GAP * dt / (2 * np.pi)

    def model(coordinates, contrast, offset, D0, alpha, D_offset, g0, beta, g_offset, phi0):
        phi, i, j = coordinates

        def integral(scale, exponent, constant):
            rate = jnp.maximum(scale * jnp.exp(exponent * log_t) + constant, RATE_FLOOR)
            F = jnp.concatenate([jnp.zeros(1), jnp.cumsum((rate[1:] + rate[:-1]) / 2)])
            return jnp.sqrt((F[i] - F[j]) ** 2 + SMOOTHING)

        across = shear_scale * jnp.cos(jnp.radians(phi0 - phi))
        g_diff = jnp.exp(-diffusion_scale * integral(D0, alpha, D_offset))
        g_shear = sinc(across * integral(g0, beta, g_offset)) ** 2
        return offset + contrast * (g_diff * g_shear) ** 2

    return model


def sinc(X):
    """sin(X) / X with all digits of its derivative.

    Where the flow is across the beam X is almost 0 and its derivative by phi0 is not: (X cos X - sin X) / X^2 has an
    error of eps / X there. The series is cut after X^6, which leaves 1e-14 at |X| = 0.05.
    """
    small = jnp.abs(X) < 0.05
    X2 = X * X
    series = 1 - X2 / 6 * (1 - X2 / 20 * (1 - X2 / 42))
    divisor = jnp.where(small, 1.0, X)  # keeps 0 / 0 out of the branch not taken, and out of its derivative
    return jnp.where(small, series, jnp.sin(divisor) / divisor)
