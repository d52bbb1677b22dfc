"""The measurement of the demonstration as one dense fit of 2 A + 7 parameters, for comparison."""

from collections.abc import Callable

from dask_nlsq.demo.measurement import Measurement


def all_angles(measurement: Measurement) -> Callable:
    """The model ``f((k, i, j), *params)``, k the number of an angle: contrasts, offsets, then what all share."""
    import jax.numpy as jnp

    from dask_nlsq.demo.model import two_time_model

    of_angle, a = two_time_model(measurement), len(measurement.angles)

    def model(coordinates, *params):
        k, i, j = coordinates
        contrast, offset = jnp.stack(params[:a])[k], jnp.stack(params[a : 2 * a])[k]
        return of_angle((jnp.asarray(measurement.angles)[k], i, j), contrast, offset, *params[2 * a :])

    return model
