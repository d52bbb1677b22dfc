"""Re w(z), of which a Voigt profile is made, by the trapezoidal rule of [1]_; relative error 1e-13.

``w(z) = exp(-z^2) erfc(-i z)`` for z = x + i y, y >= 0, is

    (2 i h z / pi) sum_k exp(-t_k^2) / (z^2 - t_k^2) + residue,   t_k = (k + 1/2) h,

or ``k h`` where z is near a node; then the first term counts half. The real part of each term is positive, so no digits are
lost. The residue ``2 exp(-z^2) / (1 +- exp(-2 pi i z / h))`` is that of the pole that the path of integration has passed.

References
----------
.. [1] M. Al Azah, S. N. Chandler-Wilde, "Computation of the Complex Error Function Using Modified Trapezoidal Rules",
   SIAM J. Numer. Anal. 59 (2021) 2346-2367.
"""

from math import pi

import jax.numpy as jnp
import numpy as np

SQUARES = 12  # nodes of the trapezoidal rule for w(z): relative error 1e-13
SPACING = float(np.sqrt(np.pi / SQUARES))  # of them, that balances both errors of the rule [1]_


def faddeeva_real(x, y):
    """Re w(x + i y) for y >= 0."""
    x, h = jnp.abs(x), SPACING
    place = x / h - jnp.floor(x / h)
    on_nodes = (y < x) & (place >= 0.25) & (place <= 0.75)
    total = 0.0
    for k in range(SQUARES):
        square = ((k + jnp.where(on_nodes, 0.0, 0.5)) * h) ** 2
        weight = jnp.exp(-square) * (jnp.where(on_nodes, 0.5, 1.0) if k == 0 else 1.0)
        total += weight * (x**2 + y**2 + square) / ((x**2 - y**2 - square) ** 2 + 4 * x**2 * y**2)
    passed = y < jnp.maximum(x, pi / h)
    y_near = jnp.where(passed, y, 0.0)  # exp(y^2) is infinite far away
    sign = jnp.where(on_nodes, -1.0, 1.0)
    shrink, angle = jnp.exp(-2 * pi * y_near / h), 2 * pi * x / h
    real = (jnp.cos(angle) + sign * shrink) * jnp.cos(2 * x * y_near) + jnp.sin(angle) * jnp.sin(2 * x * y_near)
    residue = 2 * sign * jnp.exp(y_near**2 - x**2) * shrink * real
    residue = residue / (1 + 2 * sign * shrink * jnp.cos(angle) + shrink**2)
    return 2 * h / pi * y * total + jnp.where(passed, residue, 0.0)
