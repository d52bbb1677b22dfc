"""Models that are linear in the locals as a table, which all groups share if they share x.

f = c + sum over k of l_k b_k, where c and b_k depend only on x and on the shared parameters. So they and their derivatives
with respect to the shared parameters are evaluated once per sweep, and each group needs only a few products per point.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..base.x64 import float64
from ..model.function import Model, evaluate, intern
from .blocks import Layouts, assemble_x


class Tabulated:
    """``f(x, *params)`` and its ``jac``, where x ends in c, b_1, ..., b_l and the derivatives of each by each shared one."""

    def __init__(self, n_params: int, own: tuple[int, ...], shared: tuple[int, ...]):
        self.n_params, self.own, self.shared = n_params, own, shared

    def _columns(self, x):
        """Lists of 1 + l columns: of the model, then of its derivatives."""
        m = 1 + len(self.own)
        found = x[len(x) - m * (1 + len(self.shared)) :]
        return [found[k : k + m] for k in range(0, len(found), m)]

    def _total(self, columns, params):
        constant, *others = columns
        return sum((params[k] * each for k, each in zip(self.own, others, strict=True)), start=constant)

    def __call__(self, x, *params):
        return self._total(self._columns(x)[0], params)

    def jac(self, x, *params):
        model, *derivatives = self._columns(x)
        columns = [jnp.zeros_like(model[0])] * self.n_params
        for k, each in zip(self.own, model[1:], strict=True):
            columns[k] = each
        for k, each in zip(self.shared, derivatives, strict=True):
            columns[k] = self._total(each, params)
        return jnp.stack(columns, axis=1)


@functools.cache
def tabulated(n_params: int, own: tuple[int, ...], shared: tuple[int, ...]) -> Model:
    """The model that a kernel compiles, whatever the user's is."""
    model = Tabulated(n_params, own, shared)
    return intern(model, model.jac)


def table(model: Model, layouts: Layouts, x: tuple[np.ndarray, ...], values: np.ndarray, own, shared) -> tuple[Any, ...]:
    """The columns that `Tabulated` wants, (n,) each, at ``values`` of all parameters; those of the locals do not count."""

    def columns(x, values):
        def basis(at):
            def f(locals_):
                every = [values[k] for k in range(len(values))]
                for k, value in [*zip(shared, at, strict=True), *zip(own, locals_, strict=True)]:
                    every[k] = value
                return jnp.broadcast_to(evaluate(model, assemble_x(layouts, list(x)), every), x[0].shape)

            constant, along = jax.linearize(f, jnp.zeros(len(own)))
            return jnp.stack([constant, *map(along, jnp.eye(len(own)))])

        at = values[jnp.array(shared)]
        slopes = jax.jacfwd(basis)(at)
        return *basis(at), *slopes.transpose(2, 0, 1).reshape(-1, *slopes.shape[1:2])

    run = model.get(("table", layouts, own, shared), lambda: model.jit(columns))
    with float64():
        types = [jnp.int64 if each.integer else jnp.float64 for each in layouts.x]
        return run(tuple(jnp.asarray(c, t) for c, t in zip(x, types, strict=True)), jnp.asarray(values))
