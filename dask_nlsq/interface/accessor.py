"""``data.nlsq.curvefit``: `xarray.DataArray.curvefit` in the same words, on Dask and JAX, for data of any size.

``import dask_nlsq.accessor`` registers it, before or after xarray. ``import dask_nlsq`` alone does not: xarray has no entry
points for accessors, so it would have to be imported, and each process that imports Dask would wait for that.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal, cast

import numpy as np
import scipy
import xarray as xr

from ..base.text import near
from ..base.warn import warn
from ..data.labels import map_values
from ..fitting import curve_fit
from ..kernels.lanes import MapStatus
from ..maps.fit import fit_map
from ..model.function import parameter_names
from ..parameters import feasible
from ..solve.outcome import NotConvergedError

FAILED = (MapStatus.ITERATION_LIMIT, MapStatus.TOO_FEW_POINTS, MapStatus.NON_FINITE)
DOUBTFUL = (MapStatus.STUCK, MapStatus.UNDETERMINED, MapStatus.SINGULAR)  # kept, with a warning
SCIPYS = ("method", "check_finite")  # options of SciPy's curve_fit that have no meaning for a map


@xr.register_dataset_accessor("nlsq")
@xr.register_dataarray_accessor("nlsq")
class Accessor:
    """The attribute ``.nlsq`` of a DataArray or Dataset."""

    def __init__(self, data: xr.DataArray | xr.Dataset):
        self._data = data

    def curvefit(
        self,
        coords: str | xr.DataArray | Iterable[str | xr.DataArray],
        func: Callable,
        reduce_dims: Hashable | Iterable[Hashable] | None = None,
        skipna: bool = True,
        p0: Mapping[str, Any] | Callable | None = None,
        bounds: Mapping[str, tuple] | None = None,
        param_names: Sequence[str] | None = None,
        errors: Literal["raise", "ignore"] = "raise",
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> xr.Dataset:
        """Fit ``func`` along some dimensions, once for each position along the others.

        Arguments and result are those of `xarray.DataArray.curvefit` and `xarray.Dataset.curvefit`.

        Parameters
        ----------
        coords : str, DataArray, or sequence of these
            Independent coordinates; the dimensions whose coordinates are among them are fitted along. Dates become seconds
            since the earliest one, durations seconds. Coordinates may differ between positions.
        func : callable
            Model ``func(x, *params)`` written with `jax.numpy`, one value per point. x is an array of shape (n,), or a tuple
            of such arrays where there are several coordinates.
        reduce_dims : hashable or sequence, optional
            Further dimensions to fit along.
        skipna : bool
            True leaves out nonfinite points; a position without points gets NaN. False: they are an error.
        p0 : dict, optional
            Start by name; numbers, or DataArrays along the dimensions that are left. Those not named: the default in the
            signature of ``func``, or 1, moved into the bounds. Or a function, as in `dask_nlsq.fit_map`.
        bounds : dict, optional
            ``{name: (lower, upper)}``; numbers or DataArrays as in ``p0``, None for no bound.
        param_names : sequence of str, optional
            Needed if the signature of ``func`` does not have them.
        errors : {"raise", "ignore"}
            Fits that do not converge, or have fewer points than parameters: an error when they are computed,
            or NaN.
        kwargs, **more
            Further options of `dask_nlsq.fit_map`, or, where no dimension is left, of `dask_nlsq.curve_fit`, such as
            ``sigma`` and ``mask`` (DataArrays go by names of dimensions; Datasets have one for each variable),
            ``absolute_sigma``, ``loss``, ``max_nfev``.

        Returns
        -------
        Dataset
            ``curvefit_coefficients`` (*left, param) and ``curvefit_covariance`` (*left, cov_i, cov_j), in a Dataset's case
            for each variable, with its name and ``_`` in front. Lazy where the data are Dask arrays and dimensions are left.
            Where none is left all points are one `dask_nlsq.curve_fit`, which is made at once.

        Raises
        ------
        ValueError, TypeError
            Arguments that do not fit together, or to the data.
        RuntimeError
            Fits that do not converge.
        """
        data, options = self._data, {**(kwargs or {}), **more}
        if errors not in ("raise", "ignore"):
            raise ValueError(f'errors must be either "raise" or "ignore", not {errors!r}')
        given = [coords] if isinstance(coords, (str, xr.DataArray)) else coords
        axes = [_named(data, each) if isinstance(each, str) else each for each in given]
        single = isinstance(reduce_dims, str) or not isinstance(reduce_dims, Iterable)
        reduced: set[Any] = {reduce_dims} - {None} if single else set(cast(Iterable, reduce_dims))
        reduced |= {dim for dim in data.dims for each in axes if each.equals(data[dim])}
        if not reduced:
            raise ValueError(
                "No arguments to `coords` were identified as a dimension on the calling object, and no dims were supplied "
                f"to `reduce_dims`. This would result in fitting on scalar data. The dimensions are {tuple(data.dims)}"
            )
        if not isinstance(bounds or {}, Mapping):
            raise TypeError(f"`bounds` must be a dict {{name: (lower, upper)}}, not {bounds!r}")
        names = list(param_names or parameter_names(func) or ())
        if not names:
            raise ValueError("`param_names` must be provided because `func` takes variable length arguments.")
        arrays = data.data_vars if isinstance(data, xr.Dataset) else {None: data}
        result = xr.Dataset(attrs=data.attrs if isinstance(data, xr.Dataset) else None)
        for variable, array in arrays.items():
            if missing := reduced - set(array.dims):
                raise ValueError(f"{variable or '`data`'} has no dimension {missing} to fit along, only {array.dims}")
            fitted = [dim for dim in array.dims if dim in reduced]
            start, ends, _ = map_values(p0, bounds or {}, None, array, fitted)
            call = {k: v[variable] if isinstance(v, xr.Dataset) else v for k, v in options.items()}
            call |= dict(f=func, xdata=axes, ydata=array, p0=start_of(func, names, start, ends), bounds=ends)
            call |= dict(param_names=names, nan_policy="omit" if skipna else "raise")
            found = _one_fit(call, errors) if len(fitted) == array.ndim else _map_of_fits(call, fitted, errors)
            # called for its dimensions, coordinates and attributes alone
            popt, pcov = xr.apply_ufunc(
                lambda _, found=found: found,
                array,
                input_core_dims=[fitted],
                output_core_dims=[["param"], ["cov_i", "cov_j"]],
                exclude_dims=reduced,
                dask="allowed",
            )
            prefix = "" if variable is None else f"{variable}_"
            result[f"{prefix}curvefit_coefficients"], result[f"{prefix}curvefit_covariance"] = popt, pcov
        return result.assign_coords(param=names, cov_i=names, cov_j=names)


def _named(data, name: str):
    """A coordinate of the data, or a variable of a Dataset.

    Raises
    ------
    ValueError
        Unknown name.
    """
    try:
        return data[name]
    except KeyError:
        known = [str(each) for each in (*data.dims, *data.coords)]
        raise ValueError(f"`coords` {name!r} is not one of {sorted({*known})}{near(name, known)}") from None


def _map_of_fits(call, fitted, errors):
    """Parameters (*left, p) and their covariances, lazy where the data are."""
    call = {name: value for name, value in call.items() if name not in SCIPYS}
    if (most := call.pop("maxfev", None)) and call.get("max_nfev") is None:
        call["max_nfev"] = most
    found = fit_map(**call | dict(axis=fitted, full_covariance=True))
    settle = partial(_settled, errors=errors, names=found.param_names)
    if call["ydata"].chunks is None:
        record = settle(found.compute().record)
    else:
        record = found.record.map_blocks(settle, dtype=found.record.dtype, meta=found.record._meta)
    return record["popt"], record["pcov"]


def _settled(record, errors, names):
    """The fits of a block, NaN where they failed, or an error; a warning where they have not converged."""
    if doubtful := _counts(record["status"], DOUBTFUL):
        warn(
            f"not converged: {doubtful} of {record.size} fits of a block; start closer with p0 or bounds, or see `status` "
            "of dask_nlsq.fit_map",
            scipy.optimize.OptimizeWarning,
        )
    failed = np.isin(record["status"], FAILED)
    if not failed.any():
        return record
    if errors == "raise":
        why = _counts(record["status"], FAILED)
        at = ", ".join(f"{k}={v:.6g}" for k, v in zip(names, record["popt"][failed][0], strict=True))
        raise RuntimeError(
            f"Optimal parameters not found for {failed.sum()} of {failed.size} fits of a block: {why}; the first ended at "
            f"{at}. Raise max_nfev, start closer with p0 or bounds, or get NaN there with errors='ignore'"
        )
    record = record.copy()
    record["popt"][failed] = record["pcov"][failed] = np.nan
    return record


def _counts(status, kinds) -> str:
    codes, counts = np.unique(status[np.isin(status, kinds)], return_counts=True)
    return ", ".join(f"{n} {MapStatus(code).name.lower()}" for code, n in zip(codes, counts, strict=True))


def _one_fit(call, errors):
    """Parameters (p,) and their covariance (p, p) of all points."""
    names = call["param_names"]
    try:
        return tuple(curve_fit(**call))
    except (NotConvergedError, ValueError) as err:
        failed = errors == "ignore" and isinstance(err, NotConvergedError)
        empty = call["nan_policy"] == "omit" and isinstance(err, ValueError) and bool(call["ydata"].isnull().all())
        if not failed and not empty:
            raise
    return np.full(len(names), np.nan), np.full((len(names), len(names)), np.nan)


def start_of(func, names, p0, bounds):
    """xarray's start: what is given, else the default in the signature, else 1, both moved into the bounds.

    None for a ready model, which guesses.
    """
    if (p0 is None and hasattr(func, "guess")) or not isinstance(p0, (Mapping, type(None))):
        return p0
    try:
        defaults = {name: each.default for name, each in signature(func).parameters.items()}
    except (TypeError, ValueError):  # builtins and ufuncs have no signature
        defaults = {}
    start = dict(p0 or {})
    for name in names:
        default = defaults.get(name)
        value = default if isinstance(default, (int, float)) else 1.0
        low, high = bounds.get(name, (None, None))
        low, high = -np.inf if low is None else low, np.inf if high is None else high
        start.setdefault(name, np.where((low <= value) & (value <= high), value, feasible(low, high)))
    return start
