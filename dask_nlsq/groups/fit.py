"""fit_groups: one fit of data in groups, with parameters that all share and others of each group's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import scipy

from ..base.lazy import da
from ..base.text import size
from ..base.warn import warn
from ..kernels.checks import check_pointwise, is_linear
from ..kernels.groups import GroupSpec
from ..kernels.rules import ACCURACY
from ..maps.blocks import MapProblem, Operand
from ..maps.fit import align_map
from ..maps.plan import AllBut
from ..memory.machine import active_client
from ..memory.plan import MemoryBudgetError
from ..memory.processes import room_here, rooms_of_workers
from ..options import GROUPS, checked, model_first, noise_of, with_known_names
from ..prepare import HeldData
from ..solve.trust_region import Options, Record, solve
from .result import GroupResult, group_result
from .sweep import GroupSweep

TILE, LONGEST_AT_ONCE = 2**10, 2**12  # points of a group
SAMPLED = 1000  # points of it, at which the model is seen to be pointwise, and linear in the locals or not
NUMBERS_OF_A_GROUP = 10  # that a group has besides: status, cost and such
HELD_SHARE = 0.5  # of the memory that there is, which data that are held may take


@with_known_names(GROUPS)
def fit_groups(
    f: Callable,
    xdata: Any,
    ydata: Any,
    p0=None,
    *,
    local: str | Sequence[str],
    group_axes: int | str | tuple,
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
    mask_values=None,
    valid_range=None,
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    strategy: Literal["auto", "standard", "chunked", "streaming"] = "auto",
    jac_mode: Literal["auto", "columns", "arguments"] = "auto",
    memory_limit_gb: float | None = None,
    callback: Callable[[Record], None] | None = None,
) -> GroupResult:
    """Fit ``f(x, *params)`` to data in groups, with parameters that all share and ``local`` ones of each group.

    It is one least-squares problem, of s shared parameters and l local ones for each of G groups. Its cost is that of memory
    and time of G small fits: the locals are eliminated group by group, and s + 1 numbers squared are what remains.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params) -> y`` as in `dask_nlsq.curve_fit`: pointwise, written with `jax.numpy`.
    xdata, ydata, sigma, mask
        As in `dask_nlsq.fit_map`, where the groups are the pixels: ``xdata`` has the shape of the other axes, or broadcasts
        against ``ydata``.
    p0, bounds, fixed
        As in `dask_nlsq.fit_map`: numbers, or, of locals, arrays of the shape of the groups, by name.
    local : str or sequence of str
        Names of the parameters that each group has of its own.
    group_axes : int, str or tuple
        Axes of ``ydata`` along which the groups lie; names for xarray.
    strategy : {"auto", "standard", "chunked", "streaming"}
        "standard", "chunked": hold the data; "streaming": read them in each sweep; "auto": hold them where they fit.
    max_nfev : int, optional
        Most sweeps over the data.
    callback : callable, optional
        Called with a `Record` of each sweep; the fit ends where it raises StopIteration.

    Returns
    -------
    GroupResult
        ``popt, pcov = result`` are those of the shared parameters; ``result.local`` is a map of all of them.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit together.
    MemoryBudgetError
        Groups that do not fit in memory.

    Warns
    -----
    OptimizeWarning
        Where the fit has not converged, or the covariance cannot be estimated.

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
    >>> result.local.popt[:, 0].round(6)
    array([1., 2., 5.])
    """
    call = checked(GROUPS, dict(locals()))
    f, xdata, ydata = model_first(f, xdata, ydata, "fit_groups")
    if isinstance(xdata, HeldData) or isinstance(ydata, HeldData):
        raise TypeError("fit_groups does not take data that `hold` holds: pass the arrays themselves")
    call.axis, call.full_covariance = AllBut(call.group_axes, "group_axes"), False
    problem, labels = align_map(f, xdata, ydata, call)
    problem, spec, start, options = _apart(problem, call)
    sweep = GroupSweep(problem, spec, _holds(problem, spec, call))

    def settle(record: Record) -> None:
        sweep.settle(record.params, record.distance)
        if call.callback is not None:
            call.callback(record)

    solution = solve(sweep, start, replace(options, callback=settle))
    result = group_result(problem, labels, spec, sweep, solution, options)
    if not result.success:
        warn(f"Not converged: {result.message}", scipy.optimize.OptimizeWarning)
    return result


def _apart(problem: MapProblem, call) -> tuple[MapProblem, GroupSpec, np.ndarray, Options]:
    """The problem of the locals alone, and start and options of the shared parameters."""
    fit, names = problem.fit, problem.fit.names
    own = (call.local,) if isinstance(call.local, str) else tuple(call.local)
    if unknown := [name for name in own if name not in names]:
        raise ValueError(f"`local` names {unknown[0]!r}, the parameters are {names}")
    if fit.spec.guess is not None:
        raise ValueError("fit_groups does not guess: give p0 as numbers, or, of locals, as arrays of the groups' shape")
    free = fit.spec.free
    mine = tuple(k for k in free if names[k] in own)
    shared = tuple(k for k in free if names[k] not in own)
    if not mine:
        raise ValueError("`local` names no parameter that is fitted: without one this is a fit for `curve_fit`")
    if not shared:
        raise ValueError("`local` names all parameters that are fitted: without a shared one this is a map, for `fit_map`")
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
        is_long = problem.plan.n_points > LONGEST_AT_ONCE
        linear = call.loss == "linear" and is_linear(fit.model, fit.spec.layouts, sample, values, mine)
        if is_long:
            check_pointwise(fit.model, fit.spec.layouts, sample, values)
    # the rows [J r] of a long group stay in the cache, tile after tile
    locals_ = fit.spec._replace(free=mine, bounded=bounded, tile=TILE if is_long else None)
    options = Options(
        lower=lower,
        upper=upper,
        ftol=call.ftol,
        xtol=call.xtol,
        gtol=call.gtol,
        gtol_relative=not (np.isfinite(lower).any() or np.isfinite(upper).any()),
        max_nfev=call.max_nfev,
        reduction="gram",
        accuracy=call.accuracy,
        noise=noise_of(call).variance,
        names=tuple(names[k] for k in shared),
    )
    problem = replace(problem, fit=replace(fit, spec=locals_)).with_operands(**ends)
    return problem, GroupSpec(locals_, shared, linear), start, options


def _sample(problem: MapProblem) -> tuple[np.ndarray, ...] | None:
    """Coordinates of some points of the first group; None where they are not in memory, and are not read for this."""
    fit, first = problem.fit, tuple(0 if k in problem.map_axes else slice(None) for k in range(problem.y.ndim))
    own = (problem.operands[f"x{k}"].array for k, c in enumerate(fit.x) if c is None)
    spectrum = tuple(problem.y.shape[k] for k in fit.fit_axes)
    x = [next(own)[first] if c is None else c.reshape(spectrum) for c in fit.x]
    if any(isinstance(c, da.Array) for c in x):
        return None
    types = [np.int64 if each.integer else np.float64 for each in fit.spec.layouts.x]
    places = np.linspace(0, problem.plan.n_points - 1, min(problem.plan.n_points, SAMPLED)).astype(int)
    return tuple(np.broadcast_to(c, spectrum).flat[places].astype(t) for c, t in zip(x, types, strict=True))


def _number(what: str, operand: Operand, column: int) -> float:
    """A value of a shared parameter, which all groups must have alike."""
    values = np.unique(np.asarray(operand.array[..., column]))
    if len(values) > 1:
        raise ValueError(f"{what}: a parameter that all groups share has one value, not an array of the groups' shape")
    return float(values[0])


def _holds(problem: MapProblem, spec: GroupSpec, call) -> bool:
    """Whether the data stay in memory between the sweeps.

    Raises
    ------
    MemoryBudgetError
        Where what has to stay does not fit.
    """
    n_locals, n_shared, n_params = len(spec.locals.free), len(spec.shared), len(problem.fit.names)
    numbers = n_params + n_locals * (n_shared + 1 + 2 * n_locals) + NUMBERS_OF_A_GROUP
    states = 2 * 8 * numbers * problem.plan.n_pixels  # at the accepted point and at a trial
    data = problem.y.nbytes + sum(each.array.nbytes for each in problem.operands.values())
    client = active_client()
    rooms = (rooms_of_workers(client, call.memory_limit_gb) if client else []) or [room_here(call.memory_limit_gb)]
    room = sum(each.nbytes for each in rooms)
    if call.strategy == "auto":
        held = data + states < HELD_SHARE * room
    else:
        held = call.strategy != "streaming"
    if (needed := states + data * held) > room:
        raise MemoryBudgetError(
            f"the groups take {size(needed)} between the sweeps, {size(states)} of them for their local parameters; there "
            f"are {size(room)}",
            'use strategy="streaming", which holds no data' if held else "fit parts of the groups, or use more workers",
        )
    return held
