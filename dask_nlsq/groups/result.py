"""What `dask_nlsq.fit_groups` returns: the shared parameters, and a map of the locals with errors that include theirs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import product
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from dask import delayed

from ..base.files import RESULT, check_place
from ..base.lazy import da
from ..base.modules import Trust
from ..base.text import several
from ..data.chunks import Preparation
from ..engine.request import Objective
from ..kernels.groups import GroupSpec, LocalState
from ..kernels.lanes import MapStatus
from ..kernels.rows import unpack
from ..maps.blocks import BlockFit, MapProblem
from ..maps.report import distribution
from ..maps.result import FittedMaps
from ..maps.store import is_map, remove
from ..maps.stored import StoredMap
from ..model.params import Params
from ..results import result as results
from ..results import schema
from ..results.diagnostics import Diagnostics, diagnose, scaled_covariance
from ..results.report import page, written
from ..results.result import FitResult
from ..results.statistics import Groups, Totals
from ..results.uncertainty import followers, spread_out
from ..solve.trust_region import Solution
from .diagnostics import of_groups
from .sweep import GroupSweep

LOCAL_MAPS = "local.zarr"  # beside a result that is saved
NO_CURVE = (
    "the shared parameters alone give no curve: call the model with the parameters of a group, f(x, *local.popt[k]) of "
    "result.local.compute(), which also has residuals(), predict(), spectrum(k) and plot()"
)


@dataclass(frozen=True, repr=False, eq=False)
class LocalMap(FittedMaps):
    """The map of a `GroupResult`: its records come from the fit of all groups together, not from fits of each."""

    shared: dict[str, Any] = field(default_factory=dict)  # values of the shared parameters, and their covariance
    shared_names: tuple[str, ...] = ()

    @property
    def provenance(self):
        return super().provenance | {"shared": self.shared}


@dataclass(frozen=True, repr=False, eq=False)
class SharedResult(FitResult):
    """A `FitResult` of shared parameters: its degrees of freedom are those that the locals leave."""

    groups: Groups = field(kw_only=True, repr=False)

    @property
    def dof(self) -> int:
        """Points used, less the shared parameters, less the locals of the groups used."""
        return super().dof - len(self.groups.locals) * self.groups.n_groups

    @property
    def success(self) -> bool:
        """Whether shared parameters and locals have converged."""
        return super().success and not self.groups.local_distance > self.groups.accuracy

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """As for any fit, with problems of the groups."""
        found = diagnose(self)
        return found._replace(lines=(*found.lines, *of_groups(self)))

    def summary(self, format: Literal["short", "full"] = "short") -> str:
        about = self.groups
        lines = super().summary(format).split("\n")
        text = f"{about.n_groups:,} of {several(about.of_groups, 'group')}, each with {', '.join(about.locals)}"
        far = about.local_distance
        lines.insert(2, text + (f"; the locals of one up to {far:.1e} standard errors from their optimum" if far else ""))
        return "\n".join(lines)

    def to_html(self) -> str:
        about = self.groups
        names = escape(", ".join(about.locals))
        return super().to_html() + f"<p>{about.n_groups:,} of {about.of_groups:,} groups, each with {names}</p>"

    def _points(self, x, sigma=None):
        raise ValueError(NO_CURVE)

    def plot(self, ax=None, **options):
        raise ValueError(NO_CURVE)


@dataclass(frozen=True, repr=False, eq=False)
class GroupResult:
    """The result of `dask_nlsq.fit_groups`; ``popt, pcov = result`` are those of the shared parameters.

    Attributes
    ----------
    shared : FitResult
        Of the shared parameters that were fitted, with statistics of the whole fit; its attributes are those of this
        result, too: ``result.cost``, ``result.perr``.
    local : LocalMap
        All parameters of each group, lazy, with ``perr`` of the locals that includes the uncertainty of the shared ones, and
        is 0 at a bound, where they count as held; ``status`` of groups that were left out says why. Its methods are those
        of a `MapResult` but ``refit_failed``. Of a fit on workers: use it before the Client is closed. Of a result that was
        loaded: a `StoredMap`.
    """

    shared: SharedResult
    local: Any

    popt = property(attrgetter("shared.popt"), doc="Shared parameters that were fitted, (s,), as `shared_names` names them.")
    pcov = property(attrgetter("shared.pcov"), doc="Their covariance, (s, s); inf where it could not be estimated.")
    shared_names = property(attrgetter("shared.param_names"), doc="Names of the shared parameters that were fitted.")
    n_groups = property(attrgetter("shared.groups.n_groups"), doc="Groups that counted.")
    local_distance = property(
        attrgetter("shared.groups.local_distance"), doc="Standard errors of locals to their optimum, the most of all groups."
    )

    def __getattr__(self, name):
        if name.startswith("_") or name in ("shared", "local"):
            raise AttributeError(name)
        try:
            return getattr(self.shared, name)
        except AttributeError as err:
            raise AttributeError(str(err).replace("SharedResult", "GroupResult")) from None

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.popt, self.pcov))

    def __len__(self):
        return 2

    def __getitem__(self, item):
        """``result["rate"]``: the `Parameter`, of each group where it is a local one."""
        return (
            self.local[item]
            if isinstance(item, str) and item not in {*self.shared_names, *self.derived}
            else self.shared[item]
        )

    def __repr__(self) -> str:
        return f"<GroupResult>\n{self.summary()}"

    def __dir__(self):
        return sorted({*super().__dir__(), *dir(self.shared)})

    def _repr_html_(self) -> str:
        return f"{self.shared.to_html()}{self.local.to_html()}"

    def sel(self, **indexers):
        """A part of the maps of all groups, by labels, as `MapResult.sel`."""
        return self.local.sel(**indexers)

    def save(self, path: str | Path) -> None:
        """Keep the result, without the data, as a directory of JSON, arrays and maps; `dask_nlsq.load` gives it back.

        A result that is at ``path`` already is replaced. The maps are in ``local.zarr`` where there is nothing of that name.
        """
        path = Path(path)
        check_place("path", path, RESULT)
        before = schema.beside(path)["maps"]
        name = f"local-{uuid4().hex}.zarr" if os.path.lexists(path / LOCAL_MAPS) else LOCAL_MAPS
        with ExitStack() as on_error:
            if before and isinstance(self.local, StoredMap) and self.local.path.resolve() == path.resolve() / before:
                name = before
            else:
                on_error.callback(shutil.rmtree, path / name, ignore_errors=True)
                if isinstance(self.local, StoredMap):
                    shutil.copytree(self.local.path, path / name)
                else:
                    self.local.to_zarr(path / name, progress=False)
            schema.save(path, self.shared.to_file(), name)
            on_error.pop_all()
        if before and before != name:
            remove(path / before)

    def report(self, path, **options) -> Path:
        """Write one self-contained HTML page: `dask_nlsq.results.report.report`, and how the locals are distributed."""
        return written(
            path, lambda: page(self.shared, **options, groups=distribution(self.local, self.shared.groups.locals))
        )


def load(path: str | Path, trust: Trust = False) -> FitResult | GroupResult | StoredMap:
    """Load a result from ``path``: everything except the data, so residuals need a new fit.

    ``predict(x)`` and bands import the model by its name when they are called, and check that it has not changed. With maps
    that `MapResult.to_zarr` has written, ``with_data`` does so.

    Parameters
    ----------
    path : path
        Of a result, or of maps.
    trust : bool or path
        Modules that may be imported. False: installed packages and modules that are already imported; a directory: the
        modules in it as well; True: all.

    Raises
    ------
    ValueError
        No result there, a result of another version, or a file that has changed since it was written.

    See Also
    --------
    FitResult.save, GroupResult.save

    Examples
    --------
    >>> result.save("result")  # doctest: +SKIP
    >>> result = load("result")  # doctest: +SKIP
    """
    if is_map(Path(path)):
        return StoredMap(Path(path), trust)
    found, maps = results.load(Path(path), trust)
    if found["groups"] is None:
        return FitResult(**{name: value for name, value in found.items() if name != "groups"})
    shared = SharedResult(**found)
    return shared if maps is None else GroupResult(shared, StoredMap(Path(path) / maps))


def group_result(ready, sweep: GroupSweep, solution: Solution, seconds: dict[str, float]) -> GroupResult:
    """What the last sweep says of all parameters."""
    problem, spec, options, noise = ready.problem, ready.spec, ready.options, ready.noise
    equations = solution.equations
    assert equations.parts is not None  # as after each sweep
    s, sums = len(solution.params), sweep.accepted
    dof = equations.n_points - s
    variance = 1.0 if noise.absolute else 2 * equations.cost / dof if dof > 0 else np.nan
    pcov = scaled_covariance(solution, variance, options.names, "the shared parameters")
    states = sweep.final(solution.params)
    record = _records(problem, spec, states, solution.params, pcov, variance)
    worst = float(np.sqrt(2 * sums.worst.max() / variance)) if variance > 0 else 0.0 if variance == 0 else np.nan
    n_points, n_groups = int(sums.n_points.sum()), int(sums.n_groups.sum())
    names = problem.fit.names
    about = Groups(
        locals=tuple(names[k] for k in spec.locals.free),
        n_groups=n_groups,
        of_groups=problem.plan.n_pixels,
        local_distance=worst,
        accuracy=options.accuracy,
        largest=float(sums.largest.max() / equations.cost) if equations.cost > 0 else 0.0,
        interchangeable=ready.interchangeable,
    )
    shared = SharedResult(
        popt=solution.params,
        pcov=pcov,
        param_names=options.names,
        cost=equations.cost,
        n_points=n_points,
        n_masked=ready.n_points - n_points,
        n_omitted=0,
        nfev=solution.nfev,
        sweeps=sweep.count,
        resumed=sweep.resumed,
        status=solution.status,
        message=solution.message if not worst > options.accuracy else _of_locals(worst, options.accuracy),
        optimality=solution.optimality,
        distance=solution.distance,
        plan=ready.plan,
        reduction=equations.reduction,
        jac_mode="user" if problem.fit.model.jac is not None else spec.locals.jac_mode,
        history=solution.history,
        seconds=seconds,
        starts=None,
        sample=None,
        damage=(),
        n_filled=sum(len(each.absent) for each in problem.sources),
        fixed={},
        tied={},
        derived=_derived(ready, solution.params, pcov),
        spread=np.eye(s),
        bounds=np.stack([options.lower, options.upper]),
        noise=noise,
        totals=Totals(equations.cost, n_points, *sums.weights.sum(axis=0).tolist()),
        parts=unpack(equations.parts, s),
        factor=solution.factor,
        objective=Objective(ready.typical_model, noise.loss, problem.fit.limits.f_scale),
        preparation=Preparation.of(problem.fit.spec.layouts, False, ready.decode_cf),
        data=None,
        groups=about,
    )
    local = LocalMap(record, problem, ready.labels, dict(popt=solution.params.tolist(), pcov=pcov.tolist()), options.names)
    return GroupResult(shared, local)


def _derived(ready, shared: np.ndarray, pcov: np.ndarray) -> Params:
    """Tied parameters and derived quantities that are functions of what is not local."""
    ties, names, params = ready.problem.fit.ties, ready.problem.fit.names, ready.values.copy()
    if ties is None:
        return Params()
    params[list(ready.spec.shared)] = shared
    own = [names[k] for k in ready.spec.locals.free]
    values, spread = ties.at(params, ready.spec.shared)
    return followers(ties, values, spread_out(pcov, spread), ties.of_only([name for name in names if name not in own]))


def _of_locals(worst: float, accuracy: float) -> str:
    return (
        f"The locals of a group are {worst:.2g} standard errors from their optimum, and `accuracy` asks for {accuracy:.2g}: "
        "result.local.distance says of which; start them from other values"
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
    determined = state.regular & (found.status != MapStatus.UNDETERMINED)
    C = np.where(determined[:, None, None], C, np.inf)  # what the data of the group do not determine
    held = found.at_bound != 0
    C = np.where(held[:, :, None] | held[:, None, :], 0.0, C)
    T = np.where(held[..., None], 0.0, T)
    found = found._replace(
        popt=np.where(used[:, None], state.params, np.nan),
        pcov=np.where(used[:, None, None], C, np.nan),
        chi2=np.where(used, found.chi2, np.nan),
        status=np.where(lost, MapStatus.NON_FINITE, found.status),
    )
    record, shared = fit.record(found), np.array(spec.shared)
    record["perr"][:, shared] = np.where(used[:, None], np.sqrt(np.diag(pcov)), np.nan)
    if "pcov" in (fit.dtype.names or ()):
        own, cross = np.array(spec.locals.free), np.where(used[:, None, None], -T @ pcov, np.nan)
        record["pcov"][:, shared[:, None], shared] = np.where(used[:, None, None], pcov, np.nan)
        record["pcov"][:, own[:, None], shared] = cross
        record["pcov"][:, shared[:, None], own] = cross.swapaxes(1, 2)
    if fit.ties is not None:
        cross, among = -T @ pcov, np.broadcast_to(pcov, (n, s, s))
        every = np.block([[C, cross], [cross.swapaxes(1, 2), among]])
        fit.follow(record, found.popt, every, (*spec.locals.free, *spec.shared))
    return record.reshape(shape)
