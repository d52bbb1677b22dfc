"""Checks of a user's Jacobian against the derivatives of the model, before any data are swept."""

import jax
import jax.numpy as jnp
import numpy as np

from .kernels import Layouts, assemble_x
from .model import Model, evaluate, evaluate_jac
from .trf_jit import float64

SEEN = 1e-12  # of the values of the model, that a parameter has to move for its column to be compared
WRONG = 0.5  # of a column's length: an approximation that leaves out small terms is nearer


def check_jac(model: Model, layouts: Layouts, sample: tuple[np.ndarray, ...], names, *starts: np.ndarray) -> None:
    """Compare the columns of ``jac`` with exact derivatives at a few points.

    Parameters
    ----------
    sample : tuple of (n,) arrays
        Coordinates of the points.
    names : sequence of str
    starts : (p,) arrays
        Parameters at which to compare.

    Raises
    ------
    ValueError
        Where a column differs from the derivative by more than half of its length: another sign, order or factor. Where the
        model has no derivative (it rounds, say) nothing is compared.
    """
    if model.jac is None or not sample:
        return
    n = len(sample[0])

    def both(params):
        x = assemble_x(layouts, list(sample))

        def value(params):
            return jnp.broadcast_to(evaluate(model, x, tuple(params)), (n,))

        return value(params), jax.jacfwd(value)(params), evaluate_jac(model, x, tuple(params))

    for start in starts:
        with float64():
            value, exact, given = map(np.asarray, jax.jit(both)(jnp.asarray(start)))
        known = np.isfinite(exact).all(axis=1) & np.isfinite(given).all(axis=1)
        lengths, off = np.linalg.norm(exact[known], axis=0), np.linalg.norm((given - exact)[known], axis=0)
        seen = lengths * np.maximum(np.abs(start), 1.0) > SEEN * np.linalg.norm(value[known])
        wrong = seen & (lengths > 0) & (off > WRONG * np.maximum(lengths, np.linalg.norm(given[known], axis=0)))
        if wrong.any():
            k = int(np.argmax(wrong))
            ratio = float(np.sum(given[known, k] * exact[known, k]) / lengths[k] ** 2)
            raise ValueError(
                f"`jac` is not the derivative of the model: its column for {names[k]} is {ratio:.3g} times the derivative, "
                "as far as they agree. Its columns are d f / d parameter, in the order of the parameters; leave `jac` out "
                "for exact derivatives"
            )
