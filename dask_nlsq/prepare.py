"""All that is known of a fit before its data are read: `curve_fit` solves it, `plan_fit` shows its plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from .base.text import several, size
from .data.align import Data, whitened
from .data.arrays import check_sendable
from .data.door import align_data, count_points, needs_all_points, open_data, refuse_scaled
from .data.labels import Labels, by_name, names_of, warn_if_packed
from .data.ranges import by_place
from .data.sizes import sizes_of
from .data.store import Stored
from .engine.checkpoint import check_checkpoint, create_checkpoint_directory
from .engine.cluster import attached
from .engine.request import Objective
from .engine.sweep import Sweep, open_sweep
from .memory.machine import active_client
from .memory.plan import Plan, make_plan
from .model.function import function_name, held, intern, own_function
from .options import FITS, WORKFLOWS, Noise, checked, is_reweighted, model_first, noise_of, with_known_names
from .parameters import Parameters, read_parameters, scale
from .presets import workflow_options
from .solve.trust_region import Options

HELD_PARAMS = 20  # parameters that memory is reckoned for where the model is not known yet


class Source(NamedTuple):
    """The data of a fit: aligned, and where they will be swept, or are held already."""

    arrays: dict[str, Any]  # xdata, ydata, sigma and mask as they came, except that labelled arrays became plain ones
    labels: Labels | None  # of y
    data: Data
    stored: list[Stored]  # arrays in stores that are read
    client: Any  # whose workers take part, if any
    plan: Plan
    sweep: Sweep | None = None  # of data that `dask_nlsq.hold` holds


@dataclass(frozen=True)
class Prepared:
    """A call of `dask_nlsq.curve_fit` that has been checked, and its data aligned."""

    given: Mapping[str, Any]  # the arguments as they came, those of `hold` among them
    call: SimpleNamespace  # and as the fit takes them
    params: Parameters
    noise: Noise
    options: Options  # of the solver
    objective: Objective
    source: Source

    @property
    def data(self) -> Data:
        return self.source.data

    @property
    def plan(self) -> Plan:
        return self.source.plan

    @property
    def free(self) -> list[int]:
        return list(self.params.free)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the free parameters."""
        return self.options.names

    @property
    def start(self) -> np.ndarray:
        """Of the free parameters, (p,); within their bounds where it is to be guessed."""
        return self.params.start[self.free]

    def described(self, start: np.ndarray) -> tuple[Any, ...]:
        """What a checkpoint knows the fit by, with the ``start`` of all parameters: arguments of `describe_fit`."""
        known = dict(p0=start, bounds=(self.params.lower, self.params.upper), param_names=self.params.names)
        known |= dict(fixed=self.call.fixed, expr=self.call.expr)
        source = self.source
        return self.objective.model, source.arrays, source.data, source.stored, {**self.given, **known}

    def read_covariance(self) -> "Prepared":
        """The same with the covariance matrix of y read and factored, where there is one."""
        source = _with_factor(self.source)
        if source is not self.source:
            _admitted(self.objective, len(self.free), source.data)  # fewer points may be left
        return replace(self, source=source)


def prepare(given: Mapping[str, Any]) -> Prepared:
    """Check the arguments of `dask_nlsq.curve_fit` and align the data, reading only the keys of stores.

    Raises
    ------
    ValueError, TypeError, NotADirectoryError, MemoryBudgetError, BadChunkError, MissingChunksError
        As `dask_nlsq.curve_fit`.
    """
    call = checked(FITS, given)
    if call.method == "lm" and call.loss != "linear":
        raise ValueError("method='lm' supports only 'linear' loss function. Use 'trf' or 'dogbox' instead.")
    if call.checkpoint is not None and call.strategy not in ("auto", "streaming"):
        raise ValueError(f"`checkpoint` needs data that are read again in each sweep, not strategy={call.strategy!r}")
    f, xdata, ydata = model_first(given["f"], given["xdata"], given["ydata"])
    noise, params = noise_of(call), read_parameters(f, call)
    options, n = _solver_options(call, noise, params), len(params.free)
    model = intern(*held(f, call.jac, params.start, params.free, params.ties))
    objective = Objective(model, noise.loss, call.f_scale)
    if isinstance(xdata, HeldData):
        source = xdata.source_for(call, ydata, objective, n)
        given = {**given, **xdata.given}
    else:
        source = align(call, xdata, ydata, objective, n)
    if source.client is None and call.performance_report is not None:
        raise ValueError(
            f"performance_report={str(call.performance_report)!r} reports the work of a cluster: it needs a "
            "Client, and data on its workers"
        )
    ready = Prepared(given, call, params, noise, options, objective, source)
    if call.checkpoint is not None and not callable(call.checkpoint):
        check_checkpoint(Path(call.checkpoint), *ready.described(params.start), unknown={"p0"} if params.guessed else ())
    return ready


def align(call, xdata, ydata, objective: Objective | None, n_params: int) -> Source:
    """Align the data of a call, for an objective or, where that is None, for any whose model works on blocks of points.

    ``call`` has the arguments of `HELD`, and ``checkpoint`` where there may be one.
    """
    if call.decode_cf:
        warn_if_packed(ydata)
    f = None if objective is None else own_function(objective.model.f)
    xrange, as_they_came = by_place(call.xrange, xdata, ydata, f=f), (xdata, ydata)
    xdata, sigma, mask, labels = by_name(xdata, ydata, call.sigma, call.mask)
    arrays = dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask)
    reweighted = is_reweighted(sigma)
    opened, stored, values = open_data(arrays | (dict(sigma=None) if reweighted else {}), call)
    values["check"] = call.nan_policy is not None or call.check_finite is not False
    values["xrange"] = xrange
    values["omit"] = call.nan_policy == "omit" and not call.check_finite
    strategy: Any = call.strategy if getattr(call, "checkpoint", None) is None else "streaming"
    data = align_data(opened, strategy, values)
    if objective is not None and _admitted(objective, n_params, data):
        data = align_data(opened, strategy, values, whole=True)
    client = active_client()
    sizes = sizes_of(data, n_params)
    plan = make_plan(sizes, strategy, call.memory_limit_gb, client, call.partitions_per_thread)
    plan = replace(plan, decoded=data.decoded)
    client = None if plan.strategy == "standard" else client
    if client is not None:
        check_sendable(**arrays)
    names = names_of(*as_they_came, {each.name: each.array for each in stored})
    data = replace(data, names=names, preparation=data.preparation._replace(kind=plan.kind))
    return Source(arrays, labels, data, stored, client, plan)


def _with_factor(source: Source) -> Source:
    """The source with its covariance matrix read and factored, where it has one that is not."""
    if source.data.covariance is None:
        return source
    data = whitened(source.data)
    return source._replace(data=data, plan=replace(source.plan, n_points=data.n_points))


def _admitted(objective: Objective, n_params: int, data: Data) -> bool:
    """An error where data are not for an objective; else whether it needs all points at once."""
    if objective.counts:
        refuse_scaled(data.scaled)
    return needs_all_points(objective.model, n_params, data)


# ---------------------------------------------------------------------------------------------------------------------
# data for several fits

HELD = (  # arguments that belong to the data
    "sigma", "mask", "check_finite", "nan_policy", "mask_values", "valid_range", "xrange", "on_bad_chunk",
    "missing_chunks", "decode_cf", "strategy", "memory_limit_gb", "partitions_per_thread",
)  # fmt: skip


class HeldData:
    """Data from `dask_nlsq.hold` that several fits share. A context manager, which frees the memory."""

    def __init__(self, source: Source, given: Mapping[str, Any]):
        self._source = source = _with_factor(source)
        self.given = given  # arguments of `HELD`, as they came
        source.plan.warn()
        with attached(source.client):
            plan = source.plan
            self._sweep = open_sweep(source.data, plan.strategy, source.client, plan.n_partitions, keeps=plan.keeps)
        self.closed = False

    @property
    def plan(self) -> Plan:
        """Where the data are held, and the memory that this takes."""
        return self._source.plan

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Free the held data; fits can no longer use them."""
        if not self.closed:
            self.closed = True
            self._sweep.place.close()

    def __repr__(self):
        state = "released" if self.closed else f'"{self.plan.strategy}", {size(self.plan.held_bytes)} held'
        return f"<HeldData {several(self.plan.n_points, 'point')}, {state}>"

    def __array__(self, *args, **options):
        raise TypeError(
            "data from `hold` replace xdata, ydata, sigma and mask in a fit, as in curve_fit(f, data): elsewhere pass the "
            "arrays themselves"
        )

    def source_for(self, call: SimpleNamespace, ydata, objective: Objective, n_params: int) -> Source:
        """The data for a fit of ``objective`` by a call of `dask_nlsq.curve_fit` whose arguments have been checked.

        Raises
        ------
        ValueError
            Where they have been given back, for arguments that belong to the data, and for a model that needs all points at
            once.
        """
        if self.closed:
            raise ValueError("these data have been released: use them within `with hold(...) as data:`")
        client = self._source.client
        if client is not None and client.status != "running":
            raise ValueError("these data were held by the workers of a Client that is closed: hold them again")
        reweighted = is_reweighted(call.sigma)
        arguments = {name: (getattr(call, name), FITS[name].default) for name in HELD}
        for name, (value, default) in dict(ydata=(ydata, None), **arguments).items():
            alike = value is default or (isinstance(value, (str, bool)) and value == default)
            if not alike and not (name == "sigma" and reweighted):
                way_out = "give it to hold(...)" + "; p0 goes by name: curve_fit(f, data, p0=...)" * (name == "ydata")
                raise ValueError(f"`{name}` belongs to the held data: {way_out}")
        if (objective.counts or reweighted) and self._source.arrays["sigma"] is not None:
            raise ValueError("the model determines the weights of counts: hold them without `sigma`")
        if call.checkpoint is not None and self.plan.strategy != "streaming":
            raise ValueError('`checkpoint` is for data that are read again in each sweep: hold(..., strategy="streaming")')
        if _admitted(objective, n_params, self._source.data):
            raise ValueError(
                f"{function_name(objective.model.f)} can only be evaluated on all points at once, and the data are held in "
                "blocks: pass the arrays themselves, or write it so that it takes any number of points"
            )
        arrays = self._source.arrays | (dict(sigma=call.sigma) if reweighted else {})
        return self._source._replace(arrays=arrays, plan=replace(self.plan, n_params=n_params), sweep=self._sweep)


@with_known_names({name: FITS[name] for name in HELD})
def hold(
    xdata: Any,
    ydata: Any,
    *,
    sigma=None,
    mask=None,
    check_finite: bool | None = None,
    nan_policy: Literal["raise", "omit"] | None = None,
    mask_values=None,
    valid_range=None,
    xrange=None,
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    strategy: Literal["auto", "standard", "chunked", "streaming"] = "auto",
    memory_limit_gb: float | None = None,
    partitions_per_thread: int | None = None,
) -> HeldData:
    """Load data once for several fits: other models, starts or losses.

    Within ``with hold(x, y) as data:`` each ``curve_fit(f, data, p0=...)`` uses the held data, in this process or on the
    workers of the active Client. With ``strategy="streaming"`` only the sample that a fit begins with is held.

    Parameters
    ----------
    xdata, ydata, sigma, mask, ...
        As in `dask_nlsq.curve_fit`, which then does not accept them again; ``sigma="poisson"`` is given to the fits instead.

    Returns
    -------
    HeldData

    Raises
    ------
    ValueError, TypeError, MemoryBudgetError, BadChunkError, MissingChunksError
        As `dask_nlsq.curve_fit`; a model is a TypeError.

    See Also
    --------
    curve_fit, fit_map, compare

    Examples
    --------
    >>> with hold(x, y) as data:  # doctest: +SKIP
    ...     one = curve_fit(gaussian, data)
    ...     two = curve_fit(gaussian + line, data)
    """
    given = dict(locals())
    call = checked({name: FITS[name] for name in HELD}, given)
    if is_reweighted(call.sigma):
        raise ValueError("sigma='poisson' does not belong to the data: give it to curve_fit")
    return HeldData(align(call, xdata, ydata, None, HELD_PARAMS), {name: given[name] for name in HELD})


def _solver_options(call, noise: Noise, params: Parameters) -> Options:
    free = list(params.free)
    lower, upper = params.lower[free], params.upper[free]
    bounded = bool(np.any(np.isfinite([lower, upper])))
    if call.method == "lm" and bounded:
        raise ValueError("Method 'lm' only works for unconstrained problems. Use 'trf' or 'dogbox' instead.")
    alike = ("ftol", "xtol", "gtol", "accuracy", "reduction", "tr_solver")
    return Options(
        lower=lower,
        upper=upper,
        x_scale=scale(call.x_scale, params),
        noise=noise.variance,
        names=tuple(params.names[k] for k in free),
        max_nfev=call.maxfev if call.max_nfev is None else call.max_nfev,
        gtol_relative=call.method in (None, "auto", "lm") and not bounded,
        **{name: getattr(call, name) for name in alike},
    )


def by_workflow(f, xdata, ydata, p0, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `dask_nlsq.curve_fit` for those of `dask_nlsq.fit`; what is given wins over the workflow."""
    named = checked(WORKFLOWS, {name: given.get(name, row.default) for name, row in WORKFLOWS.items()})
    f, xdata, ydata = model_first(f, xdata, ydata)
    held = xdata.plan if isinstance(xdata, HeldData) else None
    n_points = count_points(ydata) if held is None else held.n_points
    options = workflow_options(named.workflow, named.goal, n_points, named.n_starts)
    streams = options["strategy"] == "streaming" and (held is None or held.strategy == "streaming")
    if streams and not given.keys() & {"checkpoint", "strategy"}:
        options["checkpoint"] = create_checkpoint_directory
    if held is not None:  # what belongs to the data was said of them
        options = {name: value for name, value in options.items() if name not in HELD}
    own = {name: value for name, value in given.items() if name not in WORKFLOWS}
    return dict(f=f, xdata=xdata, ydata=ydata, p0=p0) | options | own
