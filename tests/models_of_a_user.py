"""Models as a user of the command line has them, right and wrong."""

import jax.numpy as jnp
import numpy as np


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def plane(coordinates, a, b, c):
    rows, columns = coordinates
    return a * rows + b * columns + c


def of_numpy(x, a, b, c):
    return a * np.exp(-b * x) + c


def with_a_typo(x, a, b, c):
    return a * jnp.exp(-b * z) + c  # noqa: F821


def of_a_wrong_shape(x, a, b):
    return a * x @ jnp.ones((3, 3)) + b
