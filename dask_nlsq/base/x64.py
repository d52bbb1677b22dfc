"""64-bit floats and the device of a thread: JAX keeps both per thread."""

import jax


def float64():
    """Context in which JAX computes in float64; JAX keeps this per thread, so every task enters it."""
    return jax.enable_x64(True)


def inherit_device():
    """Function for other threads to call, which gives them the caller's ``jax.default_device``."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX adds it when it is imported
    return lambda: jax.default_device(device).__enter__()  # for the life of the thread
