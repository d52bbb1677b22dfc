"""Jitted pieces of the trust-region reflective method, on p x p matrices.

The loop in `trust_region` follows Branch, Coleman and Li [1]_ in the form that SciPy gave it. Around the current
``params`` the cost is modelled, in "hat" variables ``step = d * step_h``, by

    m(step_h) = g_h^T step_h + 1/2 step_h^T (J_h^T J_h + C) step_h,     J_h = J diag(d),  g_h = d * J^T r,

where ``d = sqrt(v) * scale`` joins the scaling of the parameters with the distance ``v`` to the bounds that the
gradient pushes against, and the diagonal ``C = g * dv * scale`` is what the derivative of that distance adds. Only
``R`` with ``R^T R = J^T J`` and ``projected = Q^T r`` are needed, never J: the least-squares problem

    min || [R diag(d); sqrt(C)] step_h + [projected; 0] ||     subject to ||step_h|| <= radius

has the same solution. Two ways to solve it stand side by side in `SUBPROBLEM_SOLVERS`: "exact" by the SVD and Moré's
iteration on the Levenberg-Marquardt parameter [2]_, and "cg" by conjugate gradients that stop at the boundary [3]_.

All functions are module-level singletons, so each is compiled once per number of parameters and process. Call them
inside ``float64()``.

References
----------
.. [1] M. A. Branch, T. F. Coleman, Y. Li, "A Subspace, Interior, and Conjugate Gradient Method for Large-Scale
       Bound-Constrained Minimization Problems", SIAM J. Sci. Comput. 21 (1999) 1-23.
.. [2] J. J. Moré, "The Levenberg-Marquardt Algorithm: Implementation and Theory", LNM 630 (1977) 105-116.
.. [3] T. Steihaug, "The Conjugate Gradient Method and Trust Regions in Large Scale Optimization", SIAM J. Numer.
       Anal. 20 (1983) 626-637.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..kernels.rules import EPS, MORE_ITERATIONS, MORE_RTOL

CG_RTOL = 1e-10  # ||residual|| / ||g_h||: a p x p product is nothing beside the sweep that a poor step would cost


Vector: TypeAlias = jax.Array | np.ndarray


class HatSpace(NamedTuple):
    """The scaled variables at one point; all of shape (p,)."""

    v: Vector  # Coleman-Li distance to the bound that the gradient pushes against, 1 where there is none
    d: Vector  # step = d * step_h
    diagonal: Vector  # C
    gradient: Vector  # g_h = d * g


class Spectrum(NamedTuple):
    """SVD of the augmented matrix ``[R diag(d); sqrt(C)]`` = U diag(s) V^T."""

    s: Vector  # (p,) descending
    V: Vector  # (p, p)
    uf: Vector  # (p,) U^T [projected; 0]


@jax.jit
def hat_space(params, g, lower, upper, scale):
    """Variables in which the bounds are far and the parameters alike ([1]_, eq. 2.2); arguments and fields (p,)."""
    to_upper = (g < 0) & jnp.isfinite(upper)
    to_lower = (g > 0) & jnp.isfinite(lower)
    v = jnp.where(to_upper, upper - params, jnp.where(to_lower, params - lower, 1.0))
    dv = jnp.where(to_upper, -1.0, jnp.where(to_lower, 1.0, 0.0))
    d = jnp.sqrt(jnp.where(dv != 0, v / scale, 1.0)) * scale
    return HatSpace(v, d, g * dv * scale, d * g)


def newton(R, projected, stiffness):
    """Minimiser (p,) of the quadratic model with ``J^T J + diag(stiffness)``, and the decrement: what it would lower.

    By an SVD of the columns of [R; sqrt(stiffness)], brought to norm 1, so that no unit and no scale of the trust region
    enters. No step is taken along a column that is zero.
    """
    lengths = np.sqrt(np.sum(R**2, axis=0) + stiffness)
    still = lengths == 0
    lengths = np.where(still, 1.0, lengths)
    U, s, Vt = np.linalg.svd(np.concatenate([R, np.diag(np.sqrt(stiffness) + still)]) / lengths, full_matrices=False)
    uf = U[: len(R)].T @ projected
    return -(Vt.T @ (uf / s)) / lengths, 0.5 * float(uf @ uf)


@jax.jit
def spectrum(R, projected, d, diagonal):
    """SVD for the subproblem; R (p, p), the rest (p,). Along a column that is zero no step is taken."""
    R_h = R * d
    still = (jnp.sum(R_h**2, axis=0) == 0) & (diagonal == 0)
    augmented = jnp.concatenate([R_h, jnp.diag(jnp.sqrt(diagonal) + still)])
    U, s, Vt = jnp.linalg.svd(augmented, full_matrices=False)
    return Spectrum(s, Vt.T, U[: len(d)].T @ projected)


@jax.jit
def solve_svd(spectral, radius, alpha):
    """Exact minimiser in the ball, and the Levenberg-Marquardt parameter that belongs to it.

    Parameters
    ----------
    spectral : Spectrum
    radius, alpha : float
        Trust-region radius and a first guess of the parameter (0: none).

    Returns
    -------
    step_h : (p,)
    alpha : float
        ``(J_h^T J_h + C + alpha I) step_h = -g_h``.
    """
    s, V, uf = spectral
    uf = jnp.where(s > 0, uf, 0.0)
    s = jnp.where(s > 0, s, 1.0)
    suf = s * uf
    newton = -V @ (uf / s)
    inside = jnp.linalg.norm(newton) <= radius

    def phi_and_slope(alpha):
        denominator = s**2 + alpha
        norm = jnp.linalg.norm(suf / denominator)
        return norm - radius, -jnp.sum(suf**2 / denominator**3) / norm

    upper = jnp.linalg.norm(suf) / radius
    phi0, slope0 = phi_and_slope(0.0)
    lower = -phi0 / slope0

    def inner_guess(lower, upper):
        return jnp.maximum(0.001 * upper, jnp.sqrt(lower * upper))

    def unfinished(state):
        iteration, _, _, _, phi = state
        return (iteration < MORE_ITERATIONS) & (jnp.abs(phi) >= MORE_RTOL * radius)

    def refine(state):
        iteration, alpha, lower, upper, _ = state
        alpha = jnp.where((alpha < lower) | (alpha > upper), inner_guess(lower, upper), alpha)
        phi, slope = phi_and_slope(alpha)
        upper = jnp.where(phi < 0, alpha, upper)
        lower = jnp.maximum(lower, alpha - phi / slope)
        return iteration + 1, alpha - (phi + radius) / radius * phi / slope, lower, upper, phi

    # not a number where the Newton step lies inside: the iteration is skipped then
    start = jnp.where(alpha > 0, alpha, inner_guess(lower, upper))
    first_phi = jnp.where(inside, 0.0, jnp.inf)
    _, alpha, _, _, _ = lax.while_loop(unfinished, refine, (0, start, lower, upper, first_phi))
    bounded = -V @ (suf / (s**2 + alpha))
    bounded = bounded * (radius / jnp.linalg.norm(bounded))  # on the sphere exactly, so that it never leaves it
    return jnp.where(inside, newton, bounded), jnp.where(inside, 0.0, alpha)


@jax.jit
def solve_cg(R, projected, d, diagonal, radius):
    """Conjugate gradients on the normal equations in the ball, for many parameters; returns step_h (p,) ([3]_)."""
    R_h = R * d
    g_h = R_h.T @ projected
    tolerance = CG_RTOL * jnp.linalg.norm(g_h)

    trace = jnp.sum(R_h**2) + jnp.sum(diagonal)

    def hessian(step):
        return R_h.T @ (R_h @ step) + diagonal * step

    def to_sphere(step, direction):
        a, b, c = direction @ direction, step @ direction, step @ step - radius**2
        return step + (-b + jnp.sqrt(b * b - a * c)) / a * direction

    def unfinished(state):
        iteration, _, rest, _, done = state
        return (iteration < 2 * len(d)) & ~done & (jnp.linalg.norm(rest) > tolerance)

    def advance(state):
        iteration, step, rest, direction, _ = state
        curved = hessian(direction)
        curvature = direction @ curved
        flat = curvature <= EPS * trace * (direction @ direction)
        length = (rest @ rest) / jnp.where(flat, 1.0, curvature)
        trial = step + length * direction
        leaves = flat | (jnp.linalg.norm(trial) >= radius)
        rest_new = rest - length * curved
        turned = rest_new + (rest_new @ rest_new) / (rest @ rest) * direction
        edge = jnp.where(jnp.isfinite(radius), to_sphere(step, direction), step)  # no sphere: no step along a flat one
        return iteration + 1, jnp.where(leaves, edge, trial), rest_new, turned, leaves

    start = (0, jnp.zeros_like(g_h), -g_h, -g_h, False)
    return lax.while_loop(unfinished, advance, start)[1]
