"""What a fit returns."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from ..base.files import RESULT, well_formed
from ..base.modules import Trust
from ..base.text import NamesOfLmfit, near
from ..data.align import Data, build_data
from ..data.arrays import decoded
from ..data.chunks import Preparation
from ..data.labels import Labels, at_labels, label, since
from ..data.store import BadChunkError
from ..engine.condensed import Factor
from ..engine.request import Objective, Request
from ..engine.sweep import SampleSummary
from ..engine.values import but_hidden, map_chunks
from ..kernels.rows import SegmentSums
from ..kernels.rules import TO_ROUNDING, places_at_bounds
from ..memory.plan import Plan
from ..model.function import function_name, held, intern, own_function
from ..model.params import Parameter, Params
from ..model.ready import ReadyModel
from ..options import Noise
from ..solve.multistart import Search
from ..solve.trust_region import Record
from . import plots, schema
from .diagnostics import Diagnostics, diagnose
from .named_model import NamedModel
from .profile import contour, profile
from .report import report
from .statistics import Groups, Statistics, Totals, correlation, quantile, root, statistics
from .summary import html, summary
from .uncertainty import jackknife, sandwich, spread_out


@dataclass(frozen=True, repr=False, eq=False)
class FitResult(NamesOfLmfit):
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
    nfev, sweeps, resumed : int
        Evaluations of the cost by the solver, reads of all data (more where the solver goes from "gram" to "qr" at the end),
        and those among them that an earlier process did, whose checkpoint the fit went on from.
    status, message, success
        Why the solver stopped, as in `scipy.optimize.least_squares`; 5: no further reduction within rounding; 11: no step
        lowers the cost although the optimum is far; 12: the model does not depend on a parameter. Success is 1 to 5.
    optimality : float
        Infinity norm of the scaled gradient.
    distance : float
        To the optimum of the quadratic model, in standard errors; nan without degrees of freedom.
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
        Points and chunks of the sample that was fitted first, and what it cost, see `dask_nlsq.solve.warm_start`.
    damage : tuple of BadChunkError
        Chunks that could not be read, or were absent, and were left out; their points are in ``n_masked``.
    n_filled : int
        Chunks that were absent and were read as fill values.
    fixed : dict
        Name and value of the parameters that were held; their error is 0.
    tied : dict
        Name and text of the parameters that ``expr`` has tied; they count neither as fitted nor as held.
    derived : Params
        Quantities that ``expr`` has derived, by name, with errors; ``result["area"]`` is one of them.
    spread : ndarray, shape (p, fitted)
        Derivatives of all parameters by those that were fitted, at popt.
    bounds : ndarray, shape (2, p)
        Lower and upper bounds of the parameters.
    noise : Noise
        The loss, whether the size of the noise was known, and whether the model gave the weights.
    totals : Totals
        Sums over all points of the last sweep, from which the statistics are made.
    parts : SegmentSums
        The same sums, and condensed matrices of the parameters that were fitted, over up to 256 runs of consecutive points.
    factor : Factor
        Of the parameters that were fitted: R with ``R^T R = J^T J``, Q^T r and J^T r.
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
    resumed: int
    status: int
    message: str
    optimality: float
    distance: float
    plan: Plan
    reduction: str
    jac_mode: str
    history: list[Record]
    seconds: dict[str, float]
    starts: Search | None
    sample: SampleSummary | None
    damage: tuple[BadChunkError, ...]
    n_filled: int
    fixed: dict[str, float]
    tied: dict[str, str]
    derived: Params
    spread: np.ndarray = field(repr=False)
    bounds: np.ndarray
    noise: Noise
    totals: Totals
    parts: SegmentSums = field(repr=False)
    factor: Factor = field(repr=False)
    objective: Objective = field(repr=False)  # of a result that was loaded: with a `NamedModel`
    preparation: Preparation = field(repr=False)
    data: Data | None = field(repr=False)  # None where the data are not at hand
    _labels: Labels | None = field(default=None, repr=False)  # of the data, where they are xarray's
    _origins: tuple[str | None, ...] = field(default=(), repr=False)  # earliest dates of the coordinates that had any

    @property
    def strategy(self) -> str:
        """ "standard", "chunked" or "streaming"."""
        return self.plan.strategy

    @property
    def success(self) -> bool:
        return 0 < self.status <= TO_ROUNDING

    @property
    def perr(self) -> np.ndarray:
        return np.sqrt(np.diag(self.pcov))

    @property
    def condition(self) -> float:
        return self.factor.condition

    @property
    def dof(self) -> int:
        """Degrees of freedom: points used less parameters that were fitted."""
        return self.n_points - len(self.free)

    @cached_property
    def statistics(self) -> Statistics:
        """All of the statistics below; `dask_nlsq.statistics` has their formulas, and says when one of them is nan."""
        return statistics(self.totals, self.n_points - self.dof, self.noise)

    chi_square = property(attrgetter("statistics.chi_square"), doc="X = sum r^2; of a likelihood the deviance")
    reduced_chi_square = property(attrgetter("statistics.reduced_chi_square"), doc="X / dof")
    r_squared = property(attrgetter("statistics.r_squared"), doc="1 - X / sum w (y - mean)^2, with the weighted mean")
    adjusted_r_squared = property(attrgetter("statistics.adjusted_r_squared"), doc="1 - (1 - R^2) (n - 1) / dof")
    rmse = property(attrgetter("statistics.rmse"), doc="sqrt(X / sum w), in the units of y")
    aic = property(attrgetter("statistics.aic"), doc="n log(X / n) + 2 k (Akaike); of a likelihood X + 2 k")
    aicc = property(attrgetter("statistics.aicc"), doc="AIC + 2 k (k + 1) / (n - k - 1), for few points")
    bic = property(attrgetter("statistics.bic"), doc="n log(X / n) + k log(n) (Schwarz); of a likelihood X + k log(n)")

    @property
    def free(self) -> tuple[int, ...]:
        """Places of the parameters that were fitted."""
        return tuple(k for k, name in enumerate(self.param_names) if name not in self.fixed | self.tied)

    @property
    def sandwich(self) -> np.ndarray:
        """Covariance (p, p) that allows for heteroscedastic noise; see `dask_nlsq.results.uncertainty`.

        From sums of the last sweep. Nan where the data do not determine the parameters, and for few points.
        """
        return spread_out(sandwich(self.factor, self.parts), self.spread)

    @property
    def jackknife(self) -> np.ndarray:
        """Covariance (p, p) by leaving out each of up to 256 parts of the data in turn; see `dask_nlsq.results.uncertainty`.

        From sums of the last sweep. Nan where one part alone determines a parameter, and for few points.
        """
        return spread_out(jackknife(self.factor, self.parts), self.spread)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Problems of the fit, in words; see `dask_nlsq.results.diagnostics`. Nothing is read."""
        held = self.data is not None and not self.data.lazy and self.preparation.whole  # as one part
        residuals = np.ravel(self.residuals()) if held else None
        return diagnose(self, residuals if residuals is None else residuals[np.isfinite(residuals)])

    @property
    def correlation(self) -> np.ndarray:
        """Correlation of the parameters (p, p); nan for those held or tied, and those that the data do not determine."""
        fitted = np.zeros(len(self.popt))
        fitted[list(self.free)] = 1.0
        return correlation(np.where(np.outer(fitted, fitted), self.pcov, 0.0))

    @property
    def at_bound(self) -> np.ndarray:
        """-1 where a parameter is at its lower bound, 1 at its upper one, else 0; (p,)."""
        alone = np.full(len(self.popt), np.inf)  # errors of parameters, if all others were known
        variance = 1.0 if self.noise.absolute else 2 * self.cost / self.dof if self.dof > 0 else np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            alone[list(self.free)] = np.sqrt(variance) / np.linalg.norm(self.factor.R, axis=0)
        return places_at_bounds(np, self.popt, self.perr, alone, *self.bounds)

    def confidence_intervals(self, level: float = 0.95) -> np.ndarray:
        """Lower and upper end for each parameter, (p, 2): ``popt -+ q perr``.

        q is the quantile of Student's t, or of the normal distribution where the noise was known (``absolute_sigma=True``,
        a likelihood). Exact for a model that is linear, in its parameters, within a few standard errors. A parameter held
        has no width; one that the data do not determine has no ends (inf); without degrees of freedom they are nan.

        Raises
        ------
        ValueError
            A level that is not a probability.
        """
        half = quantile(level, self.dof, self.noise) * self.perr
        return np.stack([self.popt - half, self.popt + half], axis=1)

    profile, contour = profile, contour

    def __iter__(self):
        return iter((self.popt, self.pcov))

    def __len__(self):
        return 2

    def __getitem__(self, item):
        if not isinstance(item, str):
            return (self.popt, self.pcov)[item]
        return self.derived[item] if item in self.derived else self.params[item]

    def _ipython_key_completions_(self):
        return [*self.param_names, *self.derived]

    @property
    def params(self) -> Params:
        """The parameters by name, with value, error, bounds, ``at_bound`` and ``fixed``; ``result["rate"]`` is one."""
        columns = zip(self.param_names, self.popt, self.perr, self.at_bound, self.bounds.T, strict=True)
        return Params(
            *(
                Parameter(
                    name,
                    float(value),
                    float(error),
                    int(place),
                    tuple(ends.tolist()),
                    name in self.fixed,
                    self.tied.get(name),
                )
                for name, value, error, place, ends in columns
            )
        )

    # -----------------------------------------------------------------------------------------------------------------
    # at the points of the data, and elsewhere

    def residuals(self):
        """``(f(x, *popt) - y) / sigma`` in y's shape; lazy where the data were Dask or Zarr, a DataArray where they were.

        NaN where masked, and in chunks that cannot be read, where ``on_bad_chunk="mask"`` or ``missing_chunks="mask"``.
        With a covariance matrix as sigma: the whitened residuals of the points used.
        """
        points, labels = self._points(None)
        return label(self._values(points, "residual"), labels)

    def predict(self, x=None):
        """``f(x, *popt)``; ``x`` as in the fit, but no path; None for the x of the fit. Lazy where x is.

        Dates count from the earliest one of the fit. xarray's x broadcast by name, and give a DataArray. NaN where x is
        masked. With None: as the data, NaN in chunks that cannot be read.
        """
        points, labels = self._points(x)
        return label(self._values(points, "model"), labels)

    def components(self, x=None) -> dict[str, Any]:
        """What a sum of models has at ``x``, as in `predict`, summand by summand: values by name, which add up to it.

        Raises
        ------
        ValueError
            Where the model is not a sum of `dask_nlsq.models`, of functions added to them, or of products of these.
        """
        model: Any = self.objective.model
        if isinstance(model, NamedModel):
            model = model.find(self.preparation.layouts, len(self.free))
        f = own_function(model.f)
        if not isinstance(f, ReadyModel):
            raise ValueError(
                f"{function_name(f)} is not a sum of models: add a function to one of dask_nlsq.models, as in gaussian + f"
            )
        points, labels = self._points(x)
        parts = {
            name: intern(held(part, None, self.popt.tolist(), self.free, getattr(model.f, "ties", None))[0])
            for name, part in f.components.items()
        }
        return {name: label(self._values(points, "model", model=part), labels) for name, part in parts.items()}

    def confidence_band(self, x=None, level: float = 0.95):
        """Lower and upper end of an interval for the mean of y at each point: ``f -+ q sqrt(J pcov J^T)``.

        By propagation of the parameters' errors through the derivatives J (p,) at popt (the delta method); q as in
        `confidence_intervals`. Each interval is for its point alone, not for all of them together.

        Parameters
        ----------
        x : array_like, optional
            As in the fit; None for the x of the fit.
        level : float
            Probability of each interval.

        Returns
        -------
        lower, upper : arrays of y's shape
            Lazy, and chunked like the data, where the data, or x, are Dask or Zarr; DataArrays where they are xarray's.

        Raises
        ------
        ValueError
            Where the data do not determine the parameters, or the level is no probability.
        """
        return self._band(x, level, 0.0)

    def prediction_band(self, x=None, level: float = 0.95, sigma=None):
        """Lower and upper end of an interval for one more measurement at each point: ``f -+ q sqrt(J pcov J^T + s^2)``.

        s is ``sigma``, times the root of the reduced chi-square unless ``absolute_sigma``; of counts, the root of the mean,
        and the interval that of a normal distribution, which is poor for less than some ten counts.

        Parameters
        ----------
        x, level
            As in `confidence_band`.
        sigma : scalar or array_like, optional
            Standard deviation at the points ``x``, where the fit had an array as sigma.

        Returns
        -------
        lower, upper : arrays of y's shape
            As in `confidence_band`.

        Raises
        ------
        ValueError
            As in `confidence_band`; where sigma is not known; after a fit with a robust loss, which says nothing about the
            noise of a single point.
        """
        noise = self.noise
        if not noise.squares:
            raise ValueError(f"there is no prediction band with loss={noise.loss!r}: it does not say how far points scatter")
        if sigma is not None and (x is None or noise.loss == "poisson"):
            raise ValueError("`sigma` is for points given as `x`, and not for counts, whose mean it is: leave it out")
        if sigma is None and noise.sigma is None and (x is not None or self.preparation.whole):
            raise ValueError("the fit had an array as sigma: give `x`, and as `sigma` the standard deviation there")
        s = noise.sigma if sigma is None else sigma
        return self._band(x, level, 1.0 if noise.absolute else self.reduced_chi_square, s)

    def _band(self, x, level, noise, sigma=None):
        q = quantile(level, self.dof, self.noise)
        if not np.isfinite(self.pcov).all():
            raise ValueError("the data do not determine the parameters (pcov is inf), so that there is no band")
        spread = root(self.pcov[np.ix_(self.free, self.free)]), noise
        points, labels = self._points(x, sigma)
        middle, error = self._values(points, "band", *spread)
        return label(middle - q * error, labels), label(middle + q * error, labels)

    def _points(self, x, sigma=None) -> tuple[Data, Labels | None]:
        """Points at x, of the fit where it is None, and the labels of what is computed there."""
        preparation = self.preparation
        if x is not None:
            parts = [decoded("x", each, preparation.policy.decode_cf)[0] for each in (x if isinstance(x, tuple) else [x])]
            x = since(tuple(parts) if isinstance(x, tuple) else parts[0], self._origins)
            x, labels = at_labels(x, len(preparation.layouts.x_lead))
            match preparation.layouts.x_kind:
                case "tuple":
                    shape = np.broadcast_shapes(*(np.shape(c) for c in x))
                case "stacked":
                    shape = np.shape(x)[len(preparation.layouts.x_lead) :]
                case _:
                    shape = np.shape(x)
            y = np.broadcast_to(0.0, shape)
            return build_data(x, y, sigma, check=False, omit=False, whole=preparation.whole), labels
        if self.data is None:
            raise ValueError("a result that was pickled or loaded does not hold the data: use predict(x), or give x")
        return self.data, self._labels

    def _values(self, points, what, *spread, model: Any = None):
        model = self.objective.model if model is None else model
        if isinstance(model, NamedModel):
            model = model.find(self.preparation.layouts, len(self.free))
        params = self.popt[list(self.free)]
        found = map_chunks(points, Request(self.objective._replace(model=model), params), what, *spread)
        return found if points is self.data else but_hidden(points, found)

    def __copy__(self):
        return replace(self)  # with the data

    def __getstate__(self):
        return self.__dict__ | {"data": None, "_labels": None}  # the data may be larger than any file

    # -----------------------------------------------------------------------------------------------------------------
    # as text, and on disk

    def save(self, path: str | Path) -> None:
        """Keep the result, without the data, as a directory of JSON and arrays; `dask_nlsq.load` gives it back.

        A result that is at ``path`` already is replaced, all at once.

        Raises
        ------
        NotADirectoryError, ValueError
            Where ``path`` is a file, a checkpoint or a Zarr store.
        """
        schema.save(Path(path), self.to_file())

    def to_file(self) -> SimpleNamespace:
        """What `save` keeps, by the fields of `schema.FIT`."""
        model: Any = self.objective.model
        if not isinstance(model, NamedModel):
            n_points = self.n_points + self.n_masked + self.n_omitted
            model = NamedModel.of(model, self.preparation, len(self.free), n_points)  # in the place of one that has no file
        about = dict(model=model, loss=self.objective.loss, f_scale=self.objective.f_scale, origins=self._origins)
        return SimpleNamespace(**{"groups": None, **vars(self), **about})

    def to_dict(self) -> dict[str, Any]:
        """Parameters, statistics and how the solver got there, as JSON can hold them; None for what is not finite."""
        ends = self.confidence_intervals()
        parameters = {
            each.name: dict(
                value=each.value,
                error=each.error,
                interval_95=interval,
                bounds=each.bounds,
                at_bound=each.at_bound,
                fixed=each.fixed,
                expr=each.expr,
            )
            for each, interval in zip(self.params.values(), ends, strict=True)
        }
        names: tuple[str, ...] = (
            "status",
            "success",
            "message",
            "cost",
            "n_points",
            "n_masked",
            "n_omitted",
            "nfev",
            "sweeps",
            "resumed",
            "optimality",
            "distance",
        )
        names += ("strategy", "reduction", "jac_mode", "condition", "seconds", "n_filled")
        derived = {each.name: dict(value=each.value, error=each.error, expr=each.expr) for each in self.derived.values()}
        return _jsonable(
            dict(parameters=parameters, derived=derived, statistics=self.statistics._asdict(), noise=self.noise._asdict())
            | dict(covariance=self.pcov, correlation=self.correlation)
            | {name: getattr(self, name) for name in names}
            | dict(damage=[str(each) for each in self.damage])
        )

    def to_xarray(self):
        """Dataset of popt, perr (param), pcov and correlation (cov_i, cov_j); statistics and message as attributes.

        Its dimensions are named as by `xarray.DataArray.curvefit`.
        """
        import xarray

        names = list(self.param_names)
        attrs = self.statistics._asdict() | dict(message=self.message, success=int(self.success), n_points=self.n_points)
        one, two = ("param",), ("cov_i", "cov_j")
        return xarray.Dataset(
            dict(popt=(one, self.popt), perr=(one, self.perr), pcov=(two, self.pcov), correlation=(two, self.correlation)),
            dict.fromkeys((*one, *two), names),
            attrs,
        )

    def summary(self, format: Literal["short", "full"] = "short") -> str:
        """The fit as text: how the solver got there, statistics, parameters with standard errors, largest correlations.

        Parameters
        ----------
        format : {"short", "full"}
            Two significant digits of each error, and as many of the value; or all digits of both.
        """
        if format not in ("short", "full"):
            raise ValueError(f"`format` must be 'short' or 'full', not {format!r}")
        return summary(self, format == "full")

    def __repr__(self):
        return f"<FitResult>\n{self.summary()}"

    def _repr_html_(self):
        return self.to_html()

    def to_html(self) -> str:
        """Heading, status, a table of the parameters, statistics and diagnostics, as notebooks show it."""
        return html(self)

    def scipy_output(self) -> tuple:
        """SciPy's ``(popt, pcov, infodict, mesg, ier)``.

        ``fjac`` and ``ipvt`` describe R as MINPACK does (R^T, and columns in their order, counted from 1), so that
        ``triu(fjac.T)`` is R; ``qtf`` is Q^T r. All three are of the parameters that were fitted.
        """
        fvec = np.asarray(self.residuals()).ravel()
        fvec = fvec if self.n_masked + self.n_omitted == 0 else fvec[~np.isnan(fvec)]
        p = len(self.free)
        info = dict(nfev=self.nfev, fvec=fvec, fjac=self.factor.R.T, ipvt=np.arange(1, p + 1), qtf=self.factor.projected)
        return self.popt, self.pcov, info, self.message, min(self.status, 4) if self.success else 5

    def plot(self, ax=None, **options):
        """Data and model against a coordinate: `dask_nlsq.plots.fit`.

        Parameters
        ----------
        ax : matplotlib axes, optional
            Two of them with ``residuals=True``.
        **options
            ``coordinate="q"``, which one, by name or number; ``residuals=True``, drawn below; ``components=True``, the
            summands of a sum of models; ``log``, ``bins``, ``x``.

        Examples
        --------
        >>> result.plot(residuals=True)  # doctest: +SKIP
        """
        known = [name for name in signature(plots.fit).parameters if name not in ("result", "ax")]
        if unknown := [name for name in options if name not in known]:
            hint = near(unknown[0], known) or f": there are ax, {', '.join(known)}"
            raise TypeError(f"plot has no argument {unknown[0]!r}{hint}")
        return plots.fit(self, ax, **options)

    def report(self, path, **options) -> Path:
        """Write one self-contained HTML page about the fit: `dask_nlsq.results.report.report`."""
        return report(self, path, **options)


def _jsonable(value):
    """With lists for arrays, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def load(path: Path, trust: Trust) -> tuple[dict[str, Any], str | None]:
    """Arguments of the `FitResult` that `FitResult.save` has kept, ``groups`` among them, and the name of their maps.

    Raises
    ------
    ValueError
        As `dask_nlsq.load`.
    """
    found, maps = schema.load(path)
    with well_formed(path / RESULT):
        schema.check_types(FitResult, found)
        model, loss, f_scale, origins, groups = map(found.pop, ("model", "loss", "f_scale", "origins", "groups"))
        schema.check_types(Objective, dict(loss=loss, f_scale=f_scale))
        if not isinstance(groups, Groups | None):
            raise TypeError("groups is not of Groups")
        objective = Objective(model._replace(trust=trust), loss, f_scale)
    return dict(found, objective=objective, data=None, _origins=origins, groups=groups), maps
