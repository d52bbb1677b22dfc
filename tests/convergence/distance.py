"""How far a point is from a stationary one, in standard errors; from the exact Jacobian, independently of the solver.

The quadratic model of the cost at the point is minimised within the bounds. Its reduction there is

    1/2 ||r||^2 - min_s 1/2 ||J s + r||^2,   lower <= params + s <= upper,

and ``d = sqrt(2 reduction / s2)`` with ``s2 = ||r||^2 / (m - n)`` is the length of the step to that minimum in standard
errors. A parameter that its bound holds needs no rule of its own. Columns of J have length 1, so d does not depend on
units, and directions that they determine to less than `DETERMINED` are left out.
"""

import numpy as np
from scipy.optimize import lsq_linear

DETERMINED = 1e-9  # least singular value, relative, of J with columns of length 1: beyond, J's own rounding counts
FLOATS = 4  # from a bound: what is nearer stands at it, since fits end strictly inside
FAR = 0.05  # standard errors: "stationary" is nearer than that


def distance(J: np.ndarray, r: np.ndarray, params=None, bounds=None) -> float:
    """Of a point with residuals r (m,) and derivatives J (m, n); inf where they are not finite, or m <= n."""
    m, n = J.shape
    if m <= n or not (np.all(np.isfinite(J)) and np.all(np.isfinite(r))):
        return np.inf
    lengths, size = length(J), length(r)
    if size == 0:
        return 0.0
    lengths = np.where(lengths > 0, lengths, 1.0)
    U, s, Vt = np.linalg.svd(J / lengths, full_matrices=False)
    kept = s > DETERMINED * s[0]
    c = U[:, kept].T @ (r / size)  # 1/2 ||J s + r||^2 = 1/2 ||S V^T s + c||^2 + constant
    reduction = c @ c
    if bounds is not None and reduction > 0:
        lower, upper = (np.broadcast_to(each, n) for each in bounds)
        down, up = np.minimum(lower - params, 0.0), np.maximum(upper - params, 0.0)
        least = FLOATS * np.spacing(np.abs(params))
        down, up = np.where(down > -least, 0.0, down), np.where(up < least, 0.0, up)
        up = np.where(up > down, up, down + np.finfo(float).tiny)
        box = down * lengths / size, up * lengths / size
        reduction -= 2 * lsq_linear(s[kept, None] * Vt[kept], -c, box, method="bvls", tol=1e-14).cost
    return float(np.sqrt(max(reduction, 0.0) * (m - n)))


def cosine(J: np.ndarray, r: np.ndarray) -> float:
    """The largest cosine between the residual and a column of J: MINPACK's measure, where no degree of freedom is left."""
    if not (np.all(np.isfinite(J)) and np.all(np.isfinite(r))):
        return np.inf
    lengths, size = length(J), length(r)
    if size == 0:
        return 0.0
    return float(np.max(np.abs((J / np.where(lengths > 0, lengths, 1.0)).T @ (r / size))))


def length(columns: np.ndarray) -> np.ndarray:
    """Of each, also where its square would overflow."""
    largest = np.max(np.abs(columns), axis=0)
    return largest * np.linalg.norm(columns / np.where(largest > 0, largest, 1.0), axis=0)
