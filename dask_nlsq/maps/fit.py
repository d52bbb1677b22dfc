"""fit_map: one fit per pixel of data of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from dask.graph_manipulation import clone

from ..base.files import plain_name
from ..base.lazy import da
from ..data.axes import axes_named
from ..data.labels import Quantity, along_dims, as_given, labelled, map_values, warn_if_packed
from ..kernels.lanes import succeeded
from ..kernels.rules import ACCURACY
from ..options import MAPS, checked, model_first, with_known_names
from ..prepare import HeldData
from .blocks import MapProblem, Operand, build_map, record_dtype
from .plan import AllBut, axes_of
from .result import MapResult
from .store import DONE, METADATA

OF_DATA = "_of_data"  # behind the name of an axis of the data that an array of the result has
RESERVED = {*(record_dtype(1, True, 1).names or ()), "param", "param_", "quantity", DONE, METADATA}
BIN = 8  # pixels to each side of a bin of the coarse map


@with_known_names(MAPS)
def fit_map(
    f: Callable,
    xdata: Any,
    ydata: Any = None,
    p0=None,
    *,
    axis: int | str | tuple | None = None,
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
    guess: Literal["coarse-to-fine"] | None = None,
    full_covariance: bool = False,
    mask_values=None,
    valid_range=None,
    xrange=None,
    on_bad_chunk: Literal["raise", "mask"] = "raise",
    missing_chunks: Literal["error", "mask", "fill"] = "error",
    decode_cf: bool = True,
    strategy: Literal["auto", "standard", "chunked", "streaming"] = "auto",
    jac_mode: Literal["auto", "columns", "arguments"] = "auto",
    memory_limit_gb: float | None = None,
) -> MapResult:
    """Fit ``f(x, *params)`` to each pixel of a map by nonlinear least squares, lazily.

    The axes that ``axis`` names are the spectrum; all others are the map.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params) -> y`` as in `dask_nlsq.curve_fit`: pointwise, written with `jax.numpy`.
    xdata : array_like, tuple or None
        Coordinates that all pixels share: an array of the shape of the fit axes, or a tuple of arrays that broadcast against
        them. An array with as many axes as ``ydata`` differs from pixel to pixel. With an xarray ``ydata`` the name of a
        coordinate, several names, or DataArrays, as in `dask_nlsq.curve_fit`; None: the coordinates of the fit axes.
    ydata : array_like, N-D
        NumPy, Dask, a Zarr array or its path, or xarray. All axes except the fit axes are the map.
    p0 : optional
        Start: a sequence with one value per parameter, or a dict by name; each value is a number or an array of the map's
        shape. Or an array (*map, p). Or a function ``p0(x, y) -> params`` of one spectrum, written with `jax.numpy`; in its
        y, invalid points are replaced by the mean of the others. "guess", None, and what a dict leaves out: as in
        `dask_nlsq.curve_fit`, for each spectrum. Starts that differ from pixel to pixel are moved into the bounds.
    axis : int, str or tuple, optional
        The fit axes, in their order in ``ydata``; names for xarray. None: the last axis; or, if the coordinates that
        ``xdata`` names do not depend on it, the dimensions that they lie along.
    sigma, mask : array_like, optional
        As in `dask_nlsq.curve_fit`: of the shape of ydata, of the fit axes or of the map, or broadcasting to ydata. If that
        is ambiguous, with as many axes as ydata.
    absolute_sigma : bool
        As in `dask_nlsq.curve_fit`.
    bounds : pair or dict
        ``(lower, upper)`` or ``{name: (lower, upper)}``; numbers or arrays of the map's shape, None for unbounded. The
        bounds of pixels without points are not checked.
    fixed : dict, optional
        Values of parameters that are not fitted, by name; numbers or arrays of the map's shape.
    guess : {None, "coarse-to-fine"}
        Fit the mean spectrum from p0, then the means of bins of 8 x 8 pixels from there, then each pixel from its bin; this
        reads the data once more. Bins end at blocks, so other chunks of the map give other starts. A pixel that is far too
        bright can mislead its bin: mask it.
    full_covariance : bool
        Whether the result has ``pcov``.
    nan_policy : {"omit", "raise"}
        "omit": nonfinite points are left out, with a warning if a coordinate that all pixels share is not finite.
        "raise": they are an error when they are read.
    on_bad_chunk : {"raise", "mask"}
        As in `dask_nlsq.curve_fit`; the log lists the chunks that are left out, and ``n_points`` does not count them.
    strategy : {"auto", "standard", "chunked", "streaming"}
        If chunks cut the fit axes: read all at once ("standard", "chunked"), or in several passes if they do not fit in
        memory ("auto", "streaming").
    memory_limit_gb : float, optional
        GiB for the data; by default 75 % of the available memory.
    loss, f_scale, ftol, xtol, gtol, accuracy, max_nfev, param_names, expr, mask_values, valid_range, xrange, \
    missing_chunks, decode_cf, jac_mode
        As in `dask_nlsq.curve_fit`.

    Returns
    -------
    MapResult
        Lazy: data are read by ``compute()``, by ``to_zarr(path)``, or when one of its Dask arrays is computed.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit together, at once; values of sigma that are not positive, when they are read.
    MemoryBudgetError
        Blocks that do not fit in memory.
    BadChunkError, MissingChunksError
        As in `dask_nlsq.curve_fit`.

    Warns
    -----
    RuntimeWarning
        Points are left out of every pixel because a shared coordinate is not finite.

    See Also
    --------
    curve_fit : One fit of all data.
    fit_groups : One fit with shared parameters and others for each group.

    Notes
    -----
    The normal equations of a pixel are formed as a product ``J^T J``. Above a condition number of about 1e6 (with columns of
    length 1) the covariance loses digits, and above about 1e7 the pixel counts as singular; `dask_nlsq.curve_fit` uses QR
    there. See `dask_nlsq.kernels.lane_loop` for the method, and `dask_nlsq.kernels.tries` for pixels that fail at first.

    Examples
    --------
    >>> import numpy as np, jax.numpy as jnp
    >>> from dask_nlsq import fit_map
    >>> def decay(t, amplitude, rate):
    ...     return amplitude * jnp.exp(-rate * t)
    >>> t = np.linspace(0, 5, 50)
    >>> y = np.array([[1.0], [2.0], [5.0]]) * np.exp(-0.7 * t)  # three pixels
    >>> fits = fit_map(decay, t, y, p0=[1, 1]).compute()
    >>> fits.popt.round(6)
    array([[1. , 0.7],
           [2. , 0.7],
           [5. , 0.7]])
    """
    call = checked(MAPS, dict(locals()))
    f, xdata, ydata = model_first(f, xdata, ydata, "fit_map")
    if isinstance(xdata, HeldData) or isinstance(ydata, HeldData):
        raise TypeError("fit_map does not take data from `hold`: pass the arrays themselves")
    problem, labels = align_map(f, xdata, ydata, call)
    if guess is not None:
        problem = _coarse_to_fine(problem)
    return MapResult(problem.records(), problem, labels)


def align_map(f: Callable, xdata: Any, ydata: Any, call) -> tuple[MapProblem, dict[str, Any]]:
    """`build_map`, of xarray data too: with the labels that its result gets."""
    if call.decode_cf:
        warn_if_packed(ydata)
    call.axis = _fit_axes(call.axis, xdata, ydata)
    if labelled(ydata):
        fitted = [ydata.dims[k] for k in axes_of(call.axis, ydata.dims, ydata.ndim)]
        call.p0, call.bounds, call.fixed = map_values(call.p0, call.bounds, call.fixed, ydata, fitted)
        call.sigma, call.mask = along_dims("sigma", call.sigma, ydata), along_dims("mask", call.mask, ydata)
    problem = build_map(f, xdata, ydata, call)
    return problem, map_labels(ydata, problem)


def _fit_axes(axis, xdata, ydata):
    """``axis``, by default the last one, or those along which the named coordinates of an xarray ``ydata`` lie.

    Raises
    ------
    ValueError
        No coordinate depends on a fit axis, so that the model would be constant along it.
    """
    chosen = -1 if axis is None else axis
    if not labelled(ydata):
        return chosen
    places = axes_of(chosen, ydata.dims, ydata.ndim)
    given = [ydata.coords.get(each) if isinstance(each, str) else each for each in as_given(xdata, ydata, places)]
    # arrays without names may lie anywhere
    along = [{*ydata.dims} & {*each.dims} if labelled(each) else {*ydata.dims} for each in given]
    dims = [dim for dim in ydata.dims if dim in set().union(*along)]
    fitted = [ydata.dims[k] for k in places]
    if not dims or {*dims} & {*fitted}:
        return chosen
    if axis is None and all(len(each) < 2 for each in along):
        return tuple(map(ydata.dims.index, dims))
    others = f"give axis={(dims[0] if len(dims) == 1 else dims)!r}"
    way_out = "leave `group_axes` to others" if isinstance(axis, AllBut) else others
    raise ValueError(
        f"`xdata` lies along {dims}, and is constant along the fit axes, {fitted}, so there is nothing to fit: {way_out}"
    )


def map_labels(ydata: Any, problem: MapProblem) -> dict[str, Any]:
    """What is known of the axes of y; nothing where they have no names.

    ``dims``, ``coords`` and ``attrs`` of the map, as xarray takes them, in which axes and coordinates that are called like
    an array of the result, or by a path, have another name; ``all_dims`` and ``all_coords`` of y, as they are called; ``x``
    and ``y``, names for pictures of spectra.
    """
    stored = (each.array for each in problem.sources if each.name in ("ydata", "ydata[0]"))
    found = axes_named(next(stored, ydata))
    if found is None:
        return {}
    sizes, dims = dict(zip(found.dims, problem.y.shape, strict=True)), tuple(found.dims[k] for k in problem.map_axes)
    coords = {name: c for name, c in found.coords.items() if np.shape(c[1]) == tuple(sizes[str(dim)] for dim in c[0])}
    own = _own_names([*dims, *coords])
    kept = {own[n]: (tuple(own[d] for d in c[0]), *c[1:]) for n, c in coords.items() if set(c[0]) <= set(dims)}
    along = {name: c for name, c in coords.items() if not set(c[0]) <= set(dims)}
    x = problem.fit.x[0] if len(problem.fit.x) == 1 else None
    same = (str(Quantity.named(name, c[2])) for name, c in along.items() if x is not None and _same_values(x, c[1]))
    attrs = found.attrs if labelled(ydata) else {}
    names = dict(x=next(same, "x"), y=str(Quantity.named(found.name or "y", found.attrs)))
    map_dims = tuple(own[dim] for dim in dims)
    return dict(dims=map_dims, coords=kept, attrs=attrs, all_dims=found.dims, all_coords=coords, **names)


def _own_names(names) -> dict[Any, str]:
    """By the names of axes and coordinates of data those that they have in a map, where each is the name of a directory."""
    own: dict[Any, str] = {}
    for name in dict.fromkeys(names):
        other = plain_name(str(name))
        while other in RESERVED or (other != name and other in (*names, *own.values())):
            other = f"{other}{OF_DATA}"
        own[name] = other
    return own


def _same_values(x: np.ndarray, values) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind in "iuf" and np.array_equal(x, values.ravel())


def _coarse_to_fine(problem: MapProblem) -> MapProblem:
    """The problem with the start of each pixel from the fit of its bin, which starts from the fit of the mean."""
    axes, fit, last = problem.map_axes, problem.fit, problem.y.ndim
    if any(c is None for c in fit.x) or not axes:
        raise ValueError("guess='coarse-to-fine' takes means of spectra: it needs a map, and xdata that all pixels share")
    y, *arrays = _read_apart(problem.y, *(each.array for each in problem.operands.values()))
    own = {name: Operand(array, each.last) for array, (name, each) in zip(arrays, problem.operands.items(), strict=True)}
    bins = _binned(replace(problem, y=y, operands=own))
    mean = da.nanmean(bins, axis=axes, keepdims=True)
    operands = {name: _of_all(operand, axes) for name, operand in own.items()}

    def coarse(y, blocks, spec, **starts):
        """Records of a smaller map."""
        spec = spec._replace(layouts=spec.layouts._replace(invalid=None))
        smaller = replace(fit, spec=spec, capacity=prod(max(sizes) for sizes in blocks), of_means=True)
        whole = (slice(0, sum(blocks[0])),)
        return replace(problem, fit=smaller, y=y, blocks=blocks, bands=whole, operands=operands | starts).records()

    first = coarse(mean, ((1,),) * len(axes), fit.spec)["popt"]
    start = Operand(first.reshape((1,) * last + first.shape[-1:]), 1)
    blocks = tuple(tuple(-(-n // BIN) for n in sizes) for sizes in problem.blocks)
    unguessed = fit.spec._replace(guess=None)
    found = coarse(bins, blocks, unguessed, start=start)
    good = succeeded(found["status"])
    popt = da.where(good[..., None], found["popt"], first)
    popt = popt.map_blocks(_spread, dtype=popt.dtype, chunks=(*problem.blocks, popt.chunks[-1]), meta=popt._meta)
    shape = tuple(n if k in axes else 1 for k, n in enumerate(problem.y.shape))
    once = problem.plan.read_bytes // problem.plan.n_bands
    plan = replace(problem.plan, read_bytes=problem.plan.read_bytes + once)
    fine = replace(problem, fit=replace(fit, spec=unguessed), plan=plan, coarse=problem.operands["start"])
    return fine.with_operands(start=Operand(popt.reshape(*shape, popt.shape[-1]), 1))


def _read_apart(*arrays):
    """The same with tasks of their own: else all that is read for the coarse fits would be kept for those of the pixels.

    What several need, as data and their mask, is read once for them.
    """
    seed = uuid4().hex
    return [clone(array, seed=seed) if isinstance(array, da.Array) else array for array in arrays]


def _binned(problem: MapProblem) -> da.Array:
    """Means of the points that count over bins of the map, with y's axes; chunks along the fit axes are not joined."""
    axes, y, mask = problem.map_axes, problem.y, problem.operands["mask"].array
    blocks = dict(zip(axes, problem.blocks, strict=True))
    chunks = tuple(blocks.get(k, y.chunks[k] if isinstance(y, da.Array) else n) for k, n in enumerate(y.shape))
    y = y.rechunk(chunks) if isinstance(y, da.Array) else da.from_array(y, chunks=chunks, name=False)
    mask = da.asarray(mask).rechunk(tuple(c if n > 1 else 1 for n, c in zip(mask.shape, y.chunks, strict=True)))
    return da.map_blocks(
        partial(_bin_block, axes=axes, invalid=problem.fit.spec.layouts.invalid),
        y,
        mask,
        dtype=np.float64,
        meta=np.empty((0,) * y.ndim),
        chunks=tuple(tuple(-(-n // BIN) for n in c) if k in axes else c for k, c in enumerate(y.chunks)),
    )


def _bin_block(y, mask, axes, invalid):
    left_out = ~np.isfinite(y) | mask | (invalid.hits(y) if invalid is not None else False)
    total, count = np.where(left_out, 0.0, y), (~left_out).astype(float)
    for k in axes:
        edges = np.arange(0, y.shape[k], BIN)
        total, count = np.add.reduceat(total, edges, axis=k), np.add.reduceat(count, edges, axis=k)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _of_all(operand: Operand, axes) -> Operand:
    """What pixels share, of an operand that they may differ in: the middle of it."""
    array, last = operand
    if array.ndim == last or all(array.shape[k] == 1 for k in axes):
        return operand
    if array.dtype == bool:
        return Operand(np.zeros((1,) * array.ndim, bool))
    return Operand((da if isinstance(array, da.Array) else np).nanmean(array, axis=axes, keepdims=True), last)


def _spread(bins, block_info=None):
    """The values of each bin for all of its pixels."""
    shape = block_info[None]["chunk-shape"][:-1]
    for k in range(len(shape)):
        bins = np.repeat(bins, BIN, axis=k)
    return bins[tuple(slice(n) for n in shape)]
