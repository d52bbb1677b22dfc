"""What a fit returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .multistart import Search
from .plan import Plan
from .reduction import Factor
from .store import BadChunkError
from .streaming import Drawn
from .trust_region import Record


def covariance(factor: Factor) -> np.ndarray | None:
    """``(J^T J)^-1`` (p, p) from R; None where R is singular."""
    if not np.isfinite(factor.condition):
        return None
    norms = np.linalg.norm(factor.R, axis=0)
    _, s, Vt = np.linalg.svd(factor.R / norms)
    return (Vt.T / s**2) @ Vt / np.outer(norms, norms)


@dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """Result of a fit; ``popt, pcov = result`` works as with SciPy.

    Attributes
    ----------
    popt, perr : ndarray, shape (p,)
        Parameters and their standard errors, ``sqrt(diag(pcov))``, in the units of the parameters.
    pcov : ndarray, shape (p, p)
        Covariance of the parameters; inf where the data do not determine them.
    param_names : tuple of str
    cost : float
        ``0.5 * sum rho(((f(x) - y) / sigma)^2)`` at popt.
    n_points, n_masked, n_omitted : int
        Points that were used, that the mask left out, that ``nan_policy="omit"`` left out.
    nfev, sweeps : int
        Evaluations of the cost by the solver, and reads of all data (they differ where the solver had to go from "gram"
        to "qr" at the end).
    status, message, success
        Why the solver stopped, as in `scipy.optimize.least_squares`; 5: no further reduction within rounding.
    optimality : float
        Infinity norm of the scaled gradient.
    plan : Plan
        Where the data were held and how much memory that was predicted to take; ``plan.explain()`` prints it.
    reduction : str
        "gram" or "qr": how the rows of the last sweep were condensed.
    jac_mode : str
        "columns" or "arguments": how the columns of the Jacobian were formed; "user" with ``jac``.
    condition : float
        Condition number of the Jacobian with its columns scaled to norm 1.
    history : list of Record
        One per trial step; where the data are not held, ``record.read`` says what it has read.
    seconds : dict
        Wall time of the stages "load" and "solve".
    starts : Search or None
        With several starts: each with its cost, the optimum it leads to, and which optimum won.
    sample : Drawn or None
        With "streaming": points and chunks of the sample that was fitted first, and what it cost.
    damage : tuple of BadChunkError
        Chunks that could not be read, or were absent, and were left out; their points are in ``n_masked``.
    n_filled : int
        Chunks that were absent and were read as fill values.
    """

    popt: np.ndarray
    pcov: np.ndarray
    param_names: tuple[str, ...]
    cost: float
    n_points: int
    n_masked: int
    n_omitted: int
    nfev: int
    sweeps: int
    status: int
    message: str
    optimality: float
    plan: Plan
    reduction: str
    jac_mode: str
    history: list[Record]
    seconds: dict[str, float]
    starts: Search | None
    sample: Drawn | None
    damage: tuple[BadChunkError, ...]
    n_filled: int
    factor: Factor = field(repr=False)
    _values: Any = field(repr=False)  # (params, what) -> array of y's shape; None where the data are not at hand
    _predict: Any = field(repr=False)  # (x, params) -> array

    @property
    def strategy(self) -> str:
        """ "standard" or "chunked"."""
        return self.plan.strategy

    @property
    def success(self) -> bool:
        return self.status > 0

    @property
    def perr(self) -> np.ndarray:
        return np.sqrt(np.diag(self.pcov))

    @property
    def condition(self) -> float:
        return self.factor.condition

    @property
    def dof(self) -> int:
        """Degrees of freedom: points used less parameters."""
        return self.n_points - len(self.popt)

    @property
    def reduced_chi_square(self) -> float:
        """``2 cost / dof``; nan without degrees of freedom."""
        return 2 * self.cost / self.dof if self.dof > 0 else np.nan

    def __iter__(self):
        return iter((self.popt, self.pcov))

    def __len__(self):
        return 2

    def __getitem__(self, item):
        return (self.popt, self.pcov)[item]

    def residuals(self):
        """``(f(x, *popt) - y) / sigma`` in y's shape; a Dask array where the data were Dask or Zarr.

        NaN where masked, and in chunks that cannot be read, where ``on_bad_chunk="mask"`` or ``missing_chunks="mask"``.
        With a covariance matrix as sigma: the whitened residuals of the points used.
        """
        return self._at_the_data("residual")

    def predict(self, x=None):
        """``f(x, *popt)``; ``x`` as in the fit, None for the x of the fit. A Dask array where x is one.

        With None: NaN in chunks of the fit that cannot be read.
        """
        if x is None:
            return self._at_the_data("model")
        return self._predict(x, self.popt)

    def _at_the_data(self, what):
        if self._values is None:
            raise ValueError("a result that was pickled does not hold the data: use predict(x)")
        return self._values(self.popt, what)

    def __getstate__(self):
        return self.__dict__ | {"_values": None}  # the data may be larger than any file

    def summary(self) -> str:
        """The fit as text: parameters with standard errors, and how the solver got there."""
        width = max(len(name) for name in self.param_names)
        points = f"{self.n_points:,} points"
        points += f", {self.n_masked:,} masked" if self.n_masked else ""
        points += f", {self.n_omitted:,} omitted (not finite)" if self.n_omitted else ""
        lines = [
            f"{'converged' if self.success else 'NOT CONVERGED'}: {self.message}",
            f"{points}; {len(self.popt)} parameter{'s' * (len(self.popt) > 1)}; cost {self.cost:.6g}; reduced chi-square"
            f" {self.reduced_chi_square:.6g}",
            f"{self.sweeps} sweep{'s' * (self.sweeps != 1)} in {self.seconds['solve']:.2f} s, data loaded in "
            f'{self.seconds["load"]:.2f} s; strategy "{self.strategy}"; reduction "{self.reduction}"; condition '
            f"{self.condition:.1e}",
        ]
        if self.damage:
            lines.append(f"{len(self.damage)} damaged or absent chunks left out, first {self.damage[0].key}")
        if self.n_filled:
            lines.append(f"{self.n_filled} absent chunks read as fill values")
        for name, value, error in zip(self.param_names, self.popt, self.perr, strict=True):
            relative = f"({abs(error / value):.2%})" if value and np.isfinite(error) else ""
            lines.append(f"  {name:<{width}}  {value: .9g} +- {error:.3g} {relative}".rstrip())
        return "\n".join(lines)

    def __repr__(self):
        return f"<FitResult>\n{self.summary()}"

    def scipy_output(self) -> tuple:
        """SciPy's ``(popt, pcov, infodict, mesg, ier)``.

        ``fjac`` and ``ipvt`` describe R as MINPACK does (R^T, and columns in their order, counted from 1), so that
        ``triu(fjac.T)`` is R; ``qtf`` is Q^T r.
        """
        fvec = np.asarray(self.residuals()).ravel()
        fvec = fvec if self.n_masked + self.n_omitted == 0 else fvec[~np.isnan(fvec)]
        p = len(self.popt)
        info = dict(nfev=self.nfev, fvec=fvec, fjac=self.factor.R.T, ipvt=np.arange(1, p + 1), qtf=self.factor.projected)
        return self.popt, self.pcov, info, self.message, min(self.status, 4)
