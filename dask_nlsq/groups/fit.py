"""fit_groups: one fit of data in groups, with shared parameters and others for each group."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import dask
import numpy as np
import scipy

from ..base.disk import check_room
from ..base.files import sum_of_values
from ..base.lazy import da
from ..base.text import near
from ..base.warn import warn
from ..data.door import sentinels
from ..data.labels import by_name, labelled, warn_if_packed
from ..data.ranges import by_place
from ..engine.checkpoint import NOT_KEPT, Checkpoint, describe_call
from ..engine.waiting import StopOnSignal, ToldToLeave
from ..kernels.checks import check_pointwise, is_linear
from ..kernels.groups import GroupSpec
from ..kernels.lanes import succeeded
from ..kernels.rules import ACCURACY
from ..maps.blocks import MapProblem, Operand, build_map, threads_on_device
from ..maps.fit import align_map
from ..maps.plan import AllBut
from ..maps.result import MapResult, by_argument
from ..memory.machine import active_client
from ..memory.plan import JoiningError, MemoryBudgetError, Plan
from ..model.function import Model, held, intern, own_function
from ..options import GROUPS, Noise, checked, model_first, noise_of, with_known_names
from ..prepare import HeldData
from ..solve.outcome import NotConvergedError, after_signal, not_converged
from ..solve.trust_region import INTERRUPTED, Options, Record, solve
from ..watch.progress import Live, Observers, say_summary
from .diagnostics import interchangeable
from .labels import DIM, ByLabel, LabelledGroups
from .plan import plan_groups
from .result import GroupResult, group_result
from .sweep import GroupSweep

TILE = 2**12  # points of a group that are evaluated at once
LARGEST_TABLE = 2**27  # bytes, in each process
SAMPLED = 1000  # points of a group, at which the model is seen to be pointwise, and linear in the locals or not
GUESSED = 64  # groups that are fitted one by one, where the start is guessed


@dataclass(frozen=True)
class ReadyGroups:
    """A call of `dask_nlsq.fit_groups` that has been checked, and its data aligned."""

    given: Mapping[str, Any]
    call: SimpleNamespace
    problem: MapProblem  # of the locals alone
    labels: dict[str, Any]  # of the groups, as those of a map
    by_label: LabelledGroups | None  # where their points are
    spec: GroupSpec
    start: np.ndarray  # of the shared parameters, (s,)
    options: Options  # of the solver
    noise: Noise
    plan: Plan
    sample: tuple[np.ndarray, ...] | None  # coordinates of some points

    @property
    def n_points(self) -> int:
        """Of the data, without what fills rows up."""
        return self.problem.y.size if self.by_label is None else prod(self.by_label.shape)

    @property
    def state_bytes(self) -> int:
        """What the parameters of all groups take in a checkpoint, and the next ones while they are written."""
        n_params, n_locals, n_shared = len(self.values), len(self.spec.locals.free), len(self.spec.shared)
        return 2 * 8 * prod(self.problem.shape) * (3 * n_params + n_locals * (n_shared + 1) + 2 * n_locals**2)

    @property
    def decode_cf(self) -> bool:
        return self.call.decode_cf

    @property
    def values(self) -> np.ndarray:
        """Where all parameters of the first group start."""
        start = self.problem.operands["start"].array
        first = start[(0,) * (start.ndim - 1)]
        return np.asarray(first.compute() if isinstance(first, da.Array) else first)

    @property
    def typical_model(self) -> Model:
        """The model as a function of the shared parameters, the locals held where they start."""
        fit = self.problem.fit
        return intern(*held(own_function(fit.model.f), None, self.values.tolist(), self.spec.shared, fit.ties))

    @property
    def interchangeable(self) -> tuple[tuple[str, str], ...]:
        """Names of interchangeable shared parameters."""
        fit, shared, own = self.problem.fit, self.spec.shared, self.spec.locals.free
        pairs = interchangeable(fit.model, fit.spec.layouts, self.sample, self.values, shared, own)
        place = {k: n for n, k in enumerate(shared)}
        lower, upper = self.options.lower, self.options.upper
        return tuple(
            (fit.names[one], fit.names[other])
            for one, other in pairs
            if max(lower[place[one]], lower[place[other]]) < min(upper[place[one]], upper[place[other]])
        )


@with_known_names(GROUPS)
def fit_groups(
    f: Callable,
    xdata: Any,
    ydata: Any,
    p0=None,
    *,
    local: str | Sequence[str],
    group_axes: int | str | tuple | None = None,
    groups: Any = None,
    sigma=None,
    absolute_sigma: bool = False,
    bounds=(-np.inf, np.inf),
    mask=None,
    nan_policy: Literal["omit", "raise"] = "omit",
    loss: str = "linear",
    f_scale: float = 1.0,
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    accuracy: float | None = ACCURACY,
    max_nfev: int | None = None,
    param_names=None,
    fixed=None,
    expr: Mapping[str, str | Callable] | None = None,
    mask_values=None,
    valid_range=None,
    xrange=None,
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    strategy: Literal["auto", "standard", "chunked", "streaming"] = "auto",
    jac_mode: Literal["auto", "columns", "arguments"] = "auto",
    memory_limit_gb: float | None = None,
    full_covariance: bool = False,
    jac: Callable | str | None = None,
    checkpoint: str | Path | None = None,
    callback: Callable[[Record], None] | None = None,
    progress: bool | None = None,
    verbose: Literal[0, 1, 2] = 0,
) -> GroupResult:
    """Fit ``f(x, *params)`` to data in groups: some parameters are shared, the ``local`` ones belong to each group.

    This is one least-squares problem of s shared parameters and l local ones for each of G groups. It takes the memory and
    time of G small fits: the locals are eliminated group by group, which leaves an (s + 1) x (s + 1) matrix.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params) -> y`` as in `dask_nlsq.curve_fit`: pointwise, written with `jax.numpy`.
    xdata, ydata, sigma, mask
        As in `dask_nlsq.fit_map`, with groups instead of pixels: ``xdata`` has the shape of the other axes, or broadcasts
        against ``ydata``.
    p0, bounds, fixed
        As in `dask_nlsq.fit_map`, by name: numbers; for locals also arrays of the shape of the groups.
    local : str or sequence of str
        Names of the parameters that each group has for itself.
    group_axes : int, str or tuple
        Axes of ``ydata`` along which the groups lie; names for xarray. This or ``groups``.
    groups : array_like of int, or str
        Labels of the groups, which broadcast against ``ydata``, as ``xdata`` does; -1 leaves a point out. For xarray also
        the name of a coordinate. p0, bounds and the result have the groups in the order of their labels. All rows are as
        long as the largest group, so the groups should have similar sizes.
    expr : dict, optional
        As in `dask_nlsq.curve_fit`. ``result.derived`` has the ties and derived quantities of shared parameters,
        ``result.local`` those of all.
    full_covariance : bool
        Whether ``result.local`` has ``pcov``, of all parameters of each group.
    strategy : {"auto", "standard", "chunked", "streaming"}
        "standard", "chunked": hold the data; "streaming": read them in each sweep; "auto": hold them if they fit.
    checkpoint : path, optional
        Directory in which the fit saves its sweeps and the locals. If it is killed, `dask_nlsq.resume`, or the same call
        again, continues it. The workers must be able to write there, too. SIGTERM and Ctrl-C then return the best point so
        far, with status -3.
    max_nfev : int, optional
        Maximum number of sweeps.
    jac : callable, optional
        ``jac(x, *params) -> (n, p)``, as in `dask_nlsq.curve_fit`.
    callback, progress, verbose, absolute_sigma, loss, f_scale, ftol, xtol, gtol, accuracy, param_names, mask_values, \
    valid_range, xrange, nan_policy, on_bad_chunk, missing_chunks, decode_cf, jac_mode, memory_limit_gb
        As in `dask_nlsq.curve_fit` and `dask_nlsq.fit_map`. By default ``nan_policy`` is "omit" here: points that are not
        finite are left out, where `dask_nlsq.curve_fit` raises an error.

    Returns
    -------
    GroupResult
        ``popt, pcov = result`` are those of the shared parameters; ``result.local`` is a map of all parameters.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit together.
    MemoryBudgetError
        Groups that do not fit in memory.
    Interrupted
        Ctrl-C in a fit without a checkpoint; a KeyboardInterrupt, whose ``result`` is the best so far.
    NotConvergedError
        Not converged within ``max_nfev``; a RuntimeError, whose ``result`` is the best so far.
    CheckpointError
        A checkpoint of another fit.

    Warns
    -----
    OptimizeWarning
        The fit has not converged, or the covariance cannot be estimated.

    See Also
    --------
    curve_fit : All parameters are shared.
    fit_map : No parameters are shared.

    Notes
    -----
    The method is variable projection; see `dask_nlsq.kernels.groups`.

    Examples
    --------
    >>> import numpy as np, jax.numpy as jnp
    >>> from dask_nlsq import fit_groups
    >>> def decay(t, amplitude, rate):
    ...     return amplitude * jnp.exp(-rate * t)
    >>> t = np.linspace(0, 5, 50)
    >>> y = np.array([[1.0], [2.0], [5.0]]) * np.exp(-0.7 * t)
    >>> result = fit_groups(decay, t, y, p0=[1, 1], local="amplitude", group_axes=0)
    >>> result.popt.round(6)
    array([0.7])
    >>> result.local.compute().popt[:, 0].round(6)
    array([1., 2., 5.])
    """
    ready = prepare_groups(dict(locals()))
    result, solution = _run(ready)
    if result.status == 0:
        raise NotConvergedError(not_converged(solution, ready.options.names), result)
    if not result.success and result.status != INTERRUPTED:
        warn(f"Not converged: {result.message}", scipy.optimize.OptimizeWarning)
    say_summary(result, ready.call.verbose)
    return result


def prepare_groups(given: Mapping[str, Any]) -> ReadyGroups:
    """Check the arguments of `dask_nlsq.fit_groups` and align the data, of which only labels are read.

    Raises
    ------
    ValueError, TypeError, MemoryBudgetError
        As `dask_nlsq.fit_groups`.
    """
    try:
        return _prepared(given)
    except JoiningError as err:
        return _prepared(given, err)


def _prepared(given: Mapping[str, Any], too_large: JoiningError | None = None) -> ReadyGroups:
    """Groups that are ``too_large`` to be joined are left in pieces."""
    call = checked(GROUPS, given)
    call.in_pieces = too_large is not None
    f, xdata, ydata = model_first(given["f"], given["xdata"], given["ydata"], "fit_groups")
    if isinstance(xdata, HeldData) or isinstance(ydata, HeldData):
        raise TypeError("fit_groups does not take data from `hold`: pass the arrays themselves")
    if (call.group_axes is None) == (call.groups is None):
        raise ValueError("give either `group_axes`, axes of `ydata`, or `groups`, a label for each point")
    if call.groups is None:
        call.axis = AllBut(call.group_axes, "group_axes")
        (problem, labels), by_label = align_map(f, xdata, ydata, call), None
    else:
        problem, labels, by_label = _align_labels(f, xdata, ydata, call)
    _check_locals(problem, call)
    if too_large is not None and problem.fit.spec.guess is not None:
        raise MemoryBudgetError(too_large.numbers, *too_large.ways_out, "give p0 numbers, since guesses take whole groups")
    problem, spec, start, options, sample = _apart(_guessed(problem), call)
    if too_large is not None and not spec.linear:
        own = "`local` names parameters that the model is linear in, with loss='linear': then groups need not be joined"
        raise MemoryBudgetError(too_large.numbers, *too_large.ways_out, f"see that {own}")
    plan = plan_groups(problem, spec, call)
    plan = plan if by_label is None else replace(plan, n_points=prod(by_label.shape))  # without what fills rows up
    return ReadyGroups(given, call, problem, labels, by_label, spec, start, options, noise_of(call), plan, sample)


def _align_labels(f, xdata, ydata, call) -> tuple[MapProblem, dict[str, Any], LabelledGroups]:
    """The problem with groups by label along its first axis, and their labels."""
    arrange = ByLabel(call.groups, ydata)
    if call.decode_cf:
        warn_if_packed(ydata)
    if labelled(ydata):
        call.xrange = by_place(call.xrange, xdata, ydata)
        xdata, call.sigma, call.mask, _ = by_name(xdata, ydata, call.sigma, call.mask)
        call.mask_values = sentinels(call, ydata)  # of an array in memory, which it becomes here, there would be none
        ydata = ydata.data
    call.axis = 1
    problem = build_map(f, xdata, ydata, call, arrange)
    coords: dict[str, Any] = {DIM: ((DIM,), arrange.groups.labels, {})}
    return problem, dict(dims=(DIM,), coords=coords, attrs={}), arrange.groups


def _run(ready: ReadyGroups):
    """Sweep the data until the shared parameters have converged."""
    call, problem, options, began = ready.call, ready.problem, ready.options, time.perf_counter()
    client = active_client() if ready.plan.strategy != "standard" else None
    model, plan = problem.fit.model, ready.plan
    with ExitStack() as stack:
        stack.enter_context(threads_on_device())
        if client is None and active_client() is not None:
            stack.enter_context(dask.config.set(scheduler="threads"))
        about = "fit_groups", model.f, options.names, options.accuracy, plan, prod(problem.shape)
        live = stack.enter_context(Live.of(client, *about))
        observers = stack.enter_context(Observers(live, call, plan, ready.noise.absolute))
        observers.at("loading")
        sweep = GroupSweep(problem, ready.spec, plan.strategy != "streaming")
        stack.enter_context(observers.watching(sweep, model))
        on_error = stack.enter_context(ExitStack())
        on_error.callback(sweep.close)  # a traceback holds on to all
        if call.checkpoint is not None:
            sweep.resume_from(_checkpoint(ready))
            if sweep.found:
                observers.resumed()
        sweep.stop = told = stack.enter_context(StopOnSignal(call.checkpoint is not None))
        loaded = time.perf_counter()

        def settle(record: Record) -> None:
            sweep.settle(record.params, record.distance)
            observers(record)

        try:
            solution = solve(sweep, ready.start, replace(options, callback=settle, began=loaded))
        except ToldToLeave as stop:  # before there is a point to return
            raise stop.exit from stop
        sweep.stop = StopOnSignal(False)  # what is left to do is short
        seconds = dict(load=loaded - began, solve=time.perf_counter() - loaded)
        if sweep.checkpoint is not None:
            sweep.checkpoint.end()
        result = group_result(ready, sweep, solution, seconds)
        observers.ended(result)
        on_error.pop_all()
    result = after_signal(result, told, sweep.checkpoint, partial(_changed, result))
    return result, solution


def _changed(result: GroupResult, **fields) -> GroupResult:
    return replace(result, shared=replace(result.shared, **fields))


def _checkpoint(ready: ReadyGroups) -> Checkpoint:
    """The checkpoint of this fit."""
    call, given, problem = ready.call, ready.given, ready.problem
    data = {name: given[name] for name in ("xdata", "ydata", "sigma", "mask", "groups")}
    options = {name: given[name] for name in GROUPS if name not in NOT_KEPT}
    options |= {name: getattr(call, name) for name in ("p0", "bounds", "fixed", "expr")}
    described, arrays = describe_call(own_function(problem.fit.model.f), data, options)
    identity: dict[str, Any] = by_argument(MapResult(None, problem, {}).provenance)
    identity = {name: values[0] if len(values) == 1 else values for name, values in identity.items()}
    identity["local"] = [problem.fit.names[k] for k in ready.spec.locals.free]
    identity["p0"] = [*identity["p0"], ready.start.tolist()]
    if ready.by_label is not None:
        identity["groups"] = [sum_of_values(each) for each in (ready.by_label.points, ready.by_label.behind)]
    del identity["max_nfev"]
    identity["bounds"] = [*identity["bounds"], ready.options.lower.tolist(), ready.options.upper.tolist()]
    path = Path(call.checkpoint() if callable(call.checkpoint) else call.checkpoint)
    check_room("checkpoint", path, ready.state_bytes)
    return Checkpoint(path, identity, described, arrays)


def _guessed(problem: MapProblem) -> MapProblem:
    """The problem with a start that fits of some groups, one by one, have found, where the model guesses."""
    fit = problem.fit
    if fit.spec.guess is None:
        return problem
    each = max(1, round(GUESSED ** (1 / max(len(problem.map_axes), 1))))
    steps = {k: slice(None, None, max(1, problem.y.shape[k] // each)) for k in problem.map_axes}

    def few(array):
        return array[tuple(steps.get(k, slice(None)) if n > 1 else slice(None) for k, n in enumerate(array.shape))]

    y = few(problem.y)
    operands = {
        name: Operand(each.array if each.array.ndim == each.last else few(each.array), each.last)
        for name, each in problem.operands.items()
    }
    blocks = tuple((y.shape[k],) for k in problem.map_axes)
    smaller = replace(problem, y=y, operands=operands, bands=(slice(0, blocks[0][0]),)).cut_as(blocks)
    record = np.asarray(smaller.records().compute())
    good = succeeded(record["status"])
    if not good.any():
        raise ValueError("p0 could not be guessed: none of the groups that were tried can be fitted by itself; give p0")
    given = getattr(fit.spec.guess.f, "given", ())
    kept = np.array([k in given or k not in fit.spec.free for k in range(len(fit.names))])
    lib = da if isinstance(own := problem.operands["start"].array, da.Array) else np
    start = lib.where(kept, own, np.median(record["popt"][good], axis=0))
    spec = fit.spec._replace(guess=None)
    return replace(problem, fit=replace(fit, spec=spec)).with_operands(start=Operand(start, 1))


def _locals(call) -> tuple[str, ...]:
    return (call.local,) if isinstance(call.local, str) else tuple(call.local)


def _check_locals(problem: MapProblem, call) -> None:
    """An error if ``local`` names an unknown parameter, all fitted ones, or none of these."""
    names, own = problem.fit.names, _locals(call)
    if unknown := [name for name in own if name not in names]:
        raise ValueError(f"`local` names {unknown[0]!r}, the parameters are {names}{near(unknown[0], names, '; ')}")
    fitted = {names[k] for k in problem.fit.spec.free}
    if not fitted & {*own}:
        raise ValueError("`local` does not name a fitted parameter: without local parameters use `curve_fit`")
    if fitted <= {*own}:
        raise ValueError("`local` names all fitted parameters: without shared parameters use `fit_map`")


def _apart(problem: MapProblem, call):
    """The problem of the locals alone, start and options of the shared parameters, and a sample of the coordinates."""
    fit, names = problem.fit, problem.fit.names
    own, free = _locals(call), fit.spec.free
    mine = tuple(k for k in free if names[k] in own)
    shared = tuple(k for k in free if names[k] not in own)
    places = {k: column for column, k in enumerate(free)}
    start = np.array([_number(f"p0 of {names[k]}", problem.operands["start"], k) for k in shared])
    lower, upper = (
        np.array([_number(f"bounds of {names[k]}", problem.operands[end], places[k]) for k in shared])
        for end in ("lower", "upper")
    )
    columns = [places[k] for k in mine]
    ends = {end: Operand(problem.operands[end].array[..., columns], 1) for end in ("lower", "upper")}
    bounded = any(isinstance(each.array, da.Array) or np.isfinite(each.array).any() for each in ends.values())
    sample, operand = _sample(problem), problem.operands["start"].array
    values = None if isinstance(operand, da.Array) else np.asarray(operand[(0,) * (operand.ndim - 1)])
    is_long = linear = False
    if sample is not None and values is not None:
        is_long = problem.plan.n_points > TILE
        linear = is_linear(fit.model, fit.spec.layouts, sample, values, mine)
        if is_long:
            check_pointwise(fit.model, fit.spec.layouts, sample, values)
    # on a CPU the rows [J r] of a long group stay in the cache, tile after tile
    tile = TILE if is_long and not fit.spec.kind.own_memory else None
    locals_ = fit.spec._replace(free=mine, bounded=bounded, tile=tile)
    options = Options(
        lower=lower,
        upper=upper,
        ftol=call.ftol,
        xtol=call.xtol,
        gtol=call.gtol,
        gtol_relative=not (np.isfinite(lower).any() or np.isfinite(upper).any()),
        max_nfev=call.max_nfev,
        reduction="auto",
        accuracy=call.accuracy,
        noise=noise_of(call).variance,
        names=tuple(names[k] for k in shared),
    )
    problem = replace(problem, fit=replace(fit, spec=locals_, word="group")).with_operands(**ends)
    spec = GroupSpec(locals_, shared, linear and call.loss == "linear")
    spec = spec._replace(tabulated=linear and _can_be_tabulated(problem, mine, shared))
    if spec.tabulated:
        spec = spec._replace(locals=locals_._replace(layouts=locals_.layouts._replace(x_kind="tuple")))
    return problem, spec, start, options, sample


def _can_be_tabulated(problem: MapProblem, own, shared) -> bool:
    """Whether all groups share the coordinates and what is held, and a table of a model linear in the locals is small."""
    fit, start = problem.fit, problem.operands["start"].array
    held = [k for k in range(len(fit.names)) if k not in fit.spec.free]
    values = start[..., held]
    alike = (
        values.ndim == 1
        or not held
        or (isinstance(values, np.ndarray) and not np.ptp(values.reshape(-1, len(held)), axis=0).any())
    )
    nbytes = 8 * problem.plan.n_points * (1 + len(own)) * (1 + len(shared))
    return fit.model.jac is None and all(c is not None for c in fit.x) and alike and nbytes <= LARGEST_TABLE


def _sample(problem: MapProblem) -> tuple[np.ndarray, ...] | None:
    """Coordinates of some points of the first group; None where they are not in memory, and are not read for this."""
    if problem.in_pieces:  # of the first piece, which is read
        sizes = {k: problem.y.chunks[k][0] for k in problem.fit.fit_axes}
        operands = {f"x{k}": Operand(_head(problem.operands[f"x{k}"].array, sizes)) for k in range(len(problem.fit.x))}
        y = problem.y[tuple(slice(sizes.get(k)) for k in range(problem.y.ndim))]
        plan = replace(problem.plan, n_points=prod(sizes.values()))
        problem = replace(problem, y=y, operands=operands, plan=plan, in_pieces=False)
    fit, first = problem.fit, tuple(0 if k in problem.map_axes else slice(None) for k in range(problem.y.ndim))
    own = (problem.operands[f"x{k}"].array for k, c in enumerate(fit.x) if c is None)
    spectrum = tuple(problem.y.shape[k] for k in fit.fit_axes)
    x = [next(own)[first] if c is None else c.reshape(spectrum) for c in fit.x]
    if any(isinstance(c, da.Array) for c in x):
        return None
    types = [np.int64 if each.integer else np.float64 for each in fit.spec.layouts.x]
    places = np.linspace(0, problem.plan.n_points - 1, min(problem.plan.n_points, SAMPLED)).astype(int)
    return tuple(np.broadcast_to(c, spectrum).flat[places].astype(t) for c, t in zip(x, types, strict=True))


def _head(array, sizes: dict[int, int]):
    """The first piece of the first group, of an operand without further axes."""
    head = array[tuple(slice(sizes.get(k, 1)) for k in range(array.ndim))]
    return head.compute() if isinstance(head, da.Array) else head


def _number(what: str, operand: Operand, column: int) -> float:
    """A value of a shared parameter, which must be the same for all groups."""
    values = np.unique(np.asarray(operand.array[..., column]))
    if len(values) > 1:
        raise ValueError(f"{what}: a parameter that all groups share has one value, not an array of the groups' shape")
    return float(values[0])
