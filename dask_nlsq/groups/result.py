"""What `dask_nlsq.fit_groups` returns: the shared parameters, and a map of the locals with errors that include theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np
import scipy
from dask import delayed

from ..base.lazy import da
from ..base.text import several, table
from ..base.warn import warn
from ..kernels.groups import GroupSpec, LocalState
from ..kernels.lanes import MapStatus
from ..maps.blocks import BlockFit, MapProblem
from ..maps.result import MapResult
from ..results.uncertainty import covariance
from ..solve.trust_region import GRAM_CONDITION_LIMIT, Options, Record, Solution
from .sweep import GroupSweep


@dataclass(frozen=True, repr=False, eq=False)
class LocalMap(MapResult):
    """The map of a `GroupResult`: its records come from the fit of all groups together, not from fits of each."""

    shared: dict[str, Any] = field(default_factory=dict)  # values of the shared parameters, and their covariance

    def _settled(self, options) -> LocalMap:
        return self

    def _of(self, problem: MapProblem) -> LocalMap:
        raise ValueError("the groups lie in other blocks than when this map was begun: write it to another path")

    def refit_failed(self, p0=None) -> MapResult:
        raise ValueError("groups are not fitted one by one: call fit_groups again, with other starts of the locals in p0")

    @property
    def provenance(self):
        return super().provenance | {"shared": self.shared}


@dataclass(frozen=True, repr=False, eq=False)
class GroupResult:
    """The result of `dask_nlsq.fit_groups`; ``popt, pcov = result`` are those of the shared parameters.

    Attributes
    ----------
    popt : ndarray, shape (s,)
        The shared parameters that were fitted, in the order of ``shared_names``.
    pcov : ndarray, shape (s, s)
        Their covariance; inf where it could not be estimated.
    shared_names : tuple of str
    local : MapResult
        All parameters of each group, lazy, with ``perr`` of the locals that includes the uncertainty of the shared ones;
        ``status`` of groups that were left out says why. Of a fit on workers: use it before the Client is closed.
    cost : float
        Half the sum of squares, or of the loss, of the groups used.
    n_points, n_groups : int
        Points and groups that counted.
    dof : int
        ``n_points``, less the shared parameters, less the locals of the groups used.
    nfev, sweeps, status, message
        As in `FitResult`.
    distance : float
        Standard errors to the optimum of the quadratic model of the shared parameters.
    local_distance : float
        The same for the locals: the largest of all groups.
    history : list of Record
    """

    popt: np.ndarray
    pcov: np.ndarray
    shared_names: tuple[str, ...]
    local: MapResult
    cost: float
    n_points: int
    n_groups: int
    dof: int
    nfev: int
    sweeps: int
    status: int
    message: str
    distance: float
    local_distance: float
    accuracy: float = field(repr=False)
    history: list[Record] = field(repr=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.popt, self.pcov))

    @property
    def perr(self) -> np.ndarray:
        """Standard errors of the shared parameters, (s,)."""
        return np.sqrt(np.diag(self.pcov))

    @property
    def success(self) -> bool:
        """Whether shared parameters and locals have converged."""
        return 0 < self.status <= 5 and (self.local_distance <= self.accuracy or self.accuracy == np.inf)

    def __repr__(self) -> str:
        found = zip(self.shared_names, self.popt, self.perr, strict=True)
        rows = [(name, f"{value:.8g}", f"+- {error:.2g}") for name, value, error in found]
        names = self.local.param_names
        own = ", ".join(names[k] for k in self.local.problem.fit.spec.free)
        about = f"<GroupResult {several(self.n_groups, 'group')}, {self.n_points:,} points, {several(self.sweeps, 'sweep')}>"
        return "\n".join([about, *table(rows), f"of each group: {own}", self.message])


def group_result(problem: MapProblem, labels, spec: GroupSpec, sweep: GroupSweep, solution: Solution, options: Options):
    """What the last sweep says of all parameters."""
    equations = solution.equations
    s, sums = len(solution.params), sweep.accepted
    dof = equations.n_points - s
    variance = 1.0 if options.noise == "known" else 2 * equations.cost / dof if dof > 0 else np.nan
    pcov = covariance(solution.factor)
    if pcov is None or variance != variance:
        warn("Covariance of the shared parameters could not be estimated", scipy.optimize.OptimizeWarning)
        pcov = np.full((s, s), np.inf)
    else:
        pcov = pcov * variance
    if GRAM_CONDITION_LIMIT < solution.factor.condition < np.inf:
        warn(
            f"The condition of the shared parameters is {solution.factor.condition:.2g}: above {GRAM_CONDITION_LIMIT:g} "
            "their covariance loses digits. Hold one of them with fixed=, or make it local",
            RuntimeWarning,
        )
    states = sweep.final(solution.params)
    record = _records(problem, spec, states, solution.params, pcov, variance)
    worst = float(np.sqrt(2 * sums.worst.max() / variance)) if variance > 0 else 0.0 if variance == 0 else np.nan
    return GroupResult(
        popt=solution.params,
        pcov=pcov,
        shared_names=options.names,
        local=LocalMap(record, problem, labels, dict(popt=solution.params.tolist(), pcov=pcov.tolist())),
        cost=equations.cost,
        n_points=int(sums.n_points.sum()),
        n_groups=int(sums.n_groups.sum()),
        dof=dof,
        nfev=solution.nfev,
        sweeps=sweep.count,
        status=solution.status,
        message=solution.message if not worst > options.accuracy else _of_locals(worst, options.accuracy),
        distance=solution.distance,
        local_distance=worst,
        accuracy=options.accuracy,
        history=solution.history,
    )


def _of_locals(worst: float, accuracy: float) -> str:
    return (
        f"The locals of a group are {worst:.2g} standard errors from their optimum, and `accuracy` asks for {accuracy:.2g}: "
        "result.local.status says of which; start them from other values"
    )


def _records(problem: MapProblem, spec, states, shared, pcov, variance) -> da.Array:
    """Records as those of a map, from the states where they are."""
    grid = np.empty(len(states), object)
    for k, (state, shape) in enumerate(zip(states, product(*problem.blocks), strict=True)):
        block = delayed(block_record)(problem.fit, spec, state, shape, shared, pcov, variance)
        grid[k] = da.from_delayed(block, shape, problem.fit.dtype)
    return da.block(grid.reshape([len(sizes) for sizes in problem.blocks]).tolist())


def block_record(fit: BlockFit, spec: GroupSpec, state: LocalState, shape, shared, pcov, variance) -> np.ndarray:
    """The task: records of the groups of a block."""
    n, s = prod(shape), len(spec.shared)
    state = state.first(n)  # without what fills the block up
    T = state.back[..., :s]
    known = np.isfinite(pcov).all() and np.isfinite(variance)
    C = variance * state.inverse + T @ pcov @ T.swapaxes(1, 2) if known else np.full_like(state.inverse, np.inf)
    found, used = state.fitted, state.used
    lost = ~used & (found.status != MapStatus.MASKED) & (found.status != MapStatus.TOO_FEW_POINTS)
    C = np.where(np.isinf(found.pcov), np.inf, C)  # what the data of the group do not determine
    found = found._replace(
        popt=np.where(used[:, None], state.params, np.nan),
        pcov=np.where(used[:, None, None], C, np.nan),
        chi2=np.where(used, found.chi2, np.nan),
        status=np.where(lost, MapStatus.NON_FINITE, found.status),
    )
    record = fit.record(found)
    record["perr"][:, list(spec.shared)] = np.where(used[:, None], np.sqrt(np.diag(pcov)), np.nan)
    return record.reshape(shape)
