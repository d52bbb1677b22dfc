"""The decays of `benchmarks.groups` as SciPy fits them: one vector of parameters, an analytic sparse Jacobian."""

import numpy as np
from scipy.sparse import csr_matrix


class Decays:
    """Residuals and Jacobian of rate, beta, and amplitude and offset of each group."""

    def __init__(self, t, y):
        self.t, self.y, n_groups, n = t, y, *y.shape
        self.start = np.concatenate([[1.0, 1.0], np.tile([2.0, 0.5], n_groups)])
        own = 2 + 2 * np.arange(n_groups)[:, None, None]
        columns = np.broadcast_to(np.concatenate([0 * own, 0 * own + 1, own, own + 1], axis=2), (n_groups, n, 4))
        self.indices, self.indptr = columns.ravel().astype(np.int32), 4 * np.arange(n_groups * n + 1)

    def _parts(self, p):
        a, b = p[2::2, None], p[3::2, None]
        u = (p[0] * self.t) ** p[1]
        return a, b, u, np.exp(-u)

    def residual(self, p):
        a, b, _, e = self._parts(p)
        return (a * e + b - self.y).ravel()

    def jacobian(self, p):
        a, _, u, e = self._parts(p)
        values = np.empty((*self.y.shape, 4))
        values[..., 0], values[..., 1] = -a * e * u * p[1] / p[0], -a * e * u * np.log(p[0] * self.t)
        values[..., 2], values[..., 3] = e, 1.0
        return csr_matrix((values.ravel(), self.indices, self.indptr), shape=(self.y.size, len(p)))
