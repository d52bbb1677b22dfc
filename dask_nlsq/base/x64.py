"""64-bit floats, which JAX keeps per thread."""

import jax


def float64():
    """Context in which JAX computes in float64; JAX keeps this per thread, so every task enters it."""
    return jax.enable_x64(True)
