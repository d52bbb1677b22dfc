"""The quadratic model of the cost around one point, and the step to its minimum in a ball.

Only ``R`` with ``R^T R = J^T J`` and ``projected = Q^T r`` are needed, never J: the least-squares problem in hat variables
(see `steps`)

    min || [R diag(d); sqrt(C)] step_h + [projected; 0] ||     subject to ||step_h|| <= radius

has the same solution. Two ways to solve it stand side by side: "exact" by the SVD and Moré's iteration on the
Levenberg-Marquardt parameter, and "cg" by conjugate gradients that stop at the boundary [1]_. What is jitted is a
module-level singleton, compiled once per number of parameters and process.

References
----------
.. [1] T. Steihaug, "The Conjugate Gradient Method and Trust Regions in Large Scale Optimization", SIAM J. Numer.
       Anal. 20 (1983) 626-637.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.linalg import norm

from ..base.x64 import float64
from ..engine.condensed import Condensed, Factor
from ..kernels.rules import EPS
from ..kernels.steps import HatSpace, dot, more, to_sphere

CG_RTOL = 1e-10  # ||residual|| / ||g_h||: a p x p product is nothing beside the sweep that a poor step would cost


class QuadraticModel:
    """What a sweep says of the cost around a point; all methods take the hat space in which they work."""

    def __init__(self, equations: Condensed, factor: Factor, solver: Literal["exact", "cg"]):
        self.equations, self.factor, self.solver = equations, factor, solver
        self.decomposed: tuple[np.ndarray, Any] | None = None  # kept, since refused steps change the radius alone

    def newton(self, hat: HatSpace) -> tuple[np.ndarray, float]:
        """Step to the minimum, (p,), and the decrement: what it would lower. A parameter with d = 0 stays where it is.

        In columns of norm 1, so that no unit and no scale of the trust region enters.
        """
        R, projected, root = self.factor.R * hat.d, self.factor.projected, np.sqrt(hat.diagonal)
        lengths = np.sqrt(np.sum(R**2, axis=0) + hat.diagonal)
        lengths = np.where(lengths > 0, lengths, 1.0)
        if self.solver == "cg":
            step_h = solve_cg(R / lengths, projected, root / lengths, np.inf) / lengths
            return step_h, -0.5 * float(hat.gradient @ step_h)
        s, V, uf = spectrum(R / lengths, projected, root / lengths)
        return -(V @ (uf / s)) / lengths, 0.5 * float(uf @ uf)

    def step(self, hat: HatSpace, radius: float, alpha: float) -> tuple[np.ndarray, float]:
        """Step to the minimum in the ball, which the Newton step leaves, and its Levenberg-Marquardt parameter.

        ``alpha`` is a first guess of the latter, 0 for none.
        """
        if self.solver == "cg":
            return solve_cg(self.factor.R * hat.d, self.factor.projected, np.sqrt(hat.diagonal), radius), 0.0
        if self.decomposed is None or not np.array_equal(self.decomposed[0], hat.d):
            self.decomposed = hat.d, spectrum(self.factor.R * hat.d, self.factor.projected, np.sqrt(hat.diagonal))
        with float64():
            step_h, found = solve_svd(self.decomposed[1], radius, alpha)
        return np.asarray(step_h), float(found)

    def bend(self, hat: HatSpace, a: np.ndarray, b: np.ndarray) -> float:
        """a^T (J_h^T J_h + C) b, with the digits that J has."""
        R = self.factor.R * hat.d
        return dot(R @ a, R @ b) + dot(hat.diagonal * a, b)


def spectrum(R, projected, root):
    """SVD ``U diag(s) V^T`` of [R; diag(root)]: s (p,) descending, V (p, p) and U^T [projected; 0] (p,).

    Along a column that is zero no step is taken.
    """
    still = (np.sum(R**2, axis=0) == 0) & (root == 0)
    U, s, Vt = np.linalg.svd(np.concatenate([R, np.diag(root + still)]), full_matrices=False)
    return s, Vt.T, U[: len(R)].T @ projected


@jax.jit
def solve_svd(spectral, radius, alpha):
    """Exact minimiser (p,) in the ball, and the ``alpha`` at which ``(J_h^T J_h + C + alpha I) step_h = -g_h``.

    The given ``alpha`` is a first guess, 0 for none. Steps are measured by the radius: along a direction that is all but
    undetermined their squares would overflow.
    """
    s, V, uf = spectral
    uf = jnp.where(s > 0, uf, 0.0) / radius
    s = jnp.where(s > 0, s, 1.0)

    def step_at(alpha):
        along = s * uf / (s**2 + alpha)
        length = jnp.linalg.norm(along)
        return -V @ along, length, -jnp.sum(along**2 / (s**2 + alpha)) / length

    newton, length, slope = step_at(0.0)
    _, _, alpha = more(step_at, newton, slope, jnp.linalg.norm(s * uf), 1.0, alpha)
    bounded = step_at(alpha)[0]
    bounded = bounded / jnp.linalg.norm(bounded)  # on the sphere exactly, so that it never leaves it
    inside = length <= 1.0
    return radius * jnp.where(inside, newton, bounded), jnp.where(inside, 0.0, alpha)


def solve_cg(R, projected, root, radius):
    """Conjugate gradients on the normal equations of the same problem in the ball, for many parameters; (p,) ([1]_)."""
    rest = direction = -(R.T @ projected)
    step, tolerance = np.zeros_like(rest), CG_RTOL * norm(rest)
    trace = np.sum(R**2) + np.sum(root**2)
    for _ in range(2 * len(rest)):
        if norm(rest) <= tolerance:
            break
        curved = R.T @ (R @ direction) + root**2 * direction
        curvature = direction @ curved
        flat = curvature <= EPS * trace * (direction @ direction)
        length = (rest @ rest) / (1.0 if flat else curvature)
        if flat or norm(step + length * direction) >= radius:
            # where there is no sphere, no step leads along a flat direction
            return step + to_sphere(np, step, direction, radius) * direction if radius < np.inf else step
        step, before, rest = step + length * direction, rest, rest - length * curved
        direction = rest + (rest @ rest) / (before @ before) * direction
    return step
