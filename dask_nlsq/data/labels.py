"""xarray data become plain arrays: coordinates by name, axes by name and never by place, dates as seconds.

xarray's arrays are known by their ``dims`` and ``coords``; it is imported only to label what is computed of some. Pictures
name what any kind of array is said to hold: by the attributes ``long_name`` and ``units`` (CF, NeXus), and its own name.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ..base.text import printable
from ..base.values import is_address
from ..base.warn import warn
from .cf import PACKED


class Labels(NamedTuple):
    """Names of axes, and coordinates along them."""

    dims: tuple[str, ...]
    coords: dict[str, Any]

    @classmethod
    def of(cls, arrays, dims):
        """Those of arrays that have no other axes, with the coordinates of all of them."""
        coords = {name: values for array in arrays for name, values in array.coords.items() if set(values.dims) <= set(dims)}
        return cls(tuple(dims), coords)


SYMBOLS = {"um": "µm", "micron": "µm", "microns": "µm", "angstrom": "Å", "degree": "°", "degrees": "°"}


class Quantity(NamedTuple):
    """What an array holds, as far as it says so."""

    name: str = ""  # by which it is chosen
    unit: str = ""
    title: str = ""  # what a picture calls it, where that is something else

    def __str__(self):
        return (self.title or self.name) + (f" ({self.unit})" if self.unit else "")

    @classmethod
    def of(cls, array) -> "Quantity":
        """Of an array of xarray, h5py, Zarr or pandas; others have no name that anyone has given them."""
        attrs = getattr(array, "attrs", {})
        found = cls.named(_own_name(array), attrs if isinstance(attrs, Mapping) else {})
        if is_kind(array, "mM"):
            found = found._replace(unit="s" if is_kind(array, "m") else "s since the first date")
        return found

    @classmethod
    def named(cls, name: str, attrs: Mapping) -> "Quantity":
        """Of an array of this name with these attributes."""
        unit = _text(attrs.get("units", attrs.get("unit")))
        return cls(name, "" if unit == "1" else SYMBOLS.get(unit, unit), _text(attrs.get("long_name")))


class Names(NamedTuple):
    """What y, each coordinate, and each axis of y is called; ``along`` are xarray's coordinates of axes that have any."""

    y: Quantity = Quantity()
    x: tuple[Quantity, ...] = ()
    axes: tuple[Quantity, ...] = ()
    along: tuple[Any, ...] = ()  # not their values, which only pictures and diagnostics need

    @property
    def places(self) -> tuple[np.ndarray | None, ...]:
        """The values along each axis that has any."""
        return tuple(map(_numbers_along, self.along))


NAMELESS = Names()


def names_of(xdata, ydata, stored: Mapping[str, Any]) -> Names:
    """Of the data as they came, ``stored`` the Zarr arrays among them by their names in messages."""

    def of(name, array):
        return Quantity.of(stored.get(name, stored.get(f"{name}[0]", array)))  # [0]: a list, joined along the first axis

    coords = ydata.coords if labelled(ydata) else {}
    given = [coords[each] if isinstance(each, str) and each in coords else each for each in as_given(xdata, ydata)]
    several = isinstance(xdata, tuple)
    x = tuple(of(f"xdata[{k}]" if several else "xdata", each) for k, each in enumerate(given))
    if labelled(ydata):
        along = [coords.get(dim) for dim in ydata.dims]
        axes = [Quantity(str(dim)) if c is None else Quantity.of(c) for dim, c in zip(ydata.dims, along, strict=True)]
        return Names(Quantity.of(ydata), x, tuple(axes), tuple(along))
    source = stored.get("ydata", stored.get("ydata[0]", ydata))
    dims = getattr(getattr(source, "metadata", None), "dimension_names", None)  # of Zarr; of HDF5
    dims = dims or [getattr(each, "label", "") for each in getattr(source, "dims", ())]
    return Names(Quantity.of(source), x, tuple(Quantity(_text(each)) for each in dims))


def _numbers_along(coordinate) -> np.ndarray | None:
    """Values of a coordinate of an axis, where they are numbers or dates."""
    if coordinate is None or coordinate.ndim != 1 or coordinate.dtype.kind not in "iufmM":
        return None
    values = coordinate.values
    return seconds(values, earliest(values)) if values.dtype.kind in "mM" else values.astype(np.float64, copy=False)


def _own_name(array) -> str:
    if hasattr(array, "store_path"):
        kind, _, place = str(array.store_path).partition("://")
        return PurePosixPath(array.path if kind == "memory" else place).name.removesuffix(".zarr").removesuffix(".zip")
    name = _text(getattr(array, "name", None))  # a table of pandas has none
    if labelled(array) or hasattr(array, "to_numpy"):
        return name
    return PurePosixPath(name).name if hasattr(array, "file") else ""


def _text(value) -> str:
    """One line of what an attribute has, empty where that is no text."""
    value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return " ".join(printable(value).split()) if isinstance(value, str) else ""


def label(values, labels: Labels | None):
    """A DataArray of the values, as they are without labels."""
    if labels is None:
        return values
    from xarray import DataArray

    return DataArray(values, labels.coords, labels.dims)


def labelled(data) -> bool:
    """Whether it is an xarray DataArray; a TypeError where it is a Dataset."""
    if hasattr(type(data), "data_vars"):  # of the object itself a Delayed has anything
        raise TypeError(f"an xarray Dataset is not an array: pass one of its variables, {list(data.data_vars)}")
    return hasattr(type(data), "dims") and hasattr(type(data), "coords")


def by_name(xdata, ydata, sigma, mask):
    """x, sigma and mask of one fit of all of an xarray ``ydata``, as plain arrays with its axes, and its labels."""
    if not labelled(ydata):
        _check_rows(xdata, ydata)
        return xdata, sigma, mask, None
    matrix = labelled(sigma) and sigma.shape == (ydata.size,) * 2 != ydata.shape  # a covariance
    sigma = sigma if matrix else along_dims("sigma", sigma, ydata)
    xdata = coordinates_of(xdata, ydata, range(ydata.ndim))
    return xdata, sigma, along_dims("mask", mask, ydata), Labels.of([ydata], ydata.dims)


def _check_rows(xdata, ydata):
    """Refuse pandas objects whose rows have other labels than those of y, since rows are paired by place."""
    for each in xdata if isinstance(xdata, tuple) else (xdata,):
        pandas = all(hasattr(one, "to_numpy") and hasattr(getattr(one, "index", None), "equals") for one in (each, ydata))
        if pandas and not each.index.equals(ydata.index):
            raise ValueError(
                "`xdata` and `ydata` have different row labels, and rows are paired by position: reindex one of them, or "
                "pass to_numpy() of both"
            )


def warn_if_packed(ydata) -> None:
    """Warn of an xarray array that was opened without decoding: its attributes are not applied."""
    packed = [name for name in PACKED if labelled(ydata) and name in ydata.attrs]
    if packed:
        warn(
            f"`ydata` has the attributes {', '.join(packed)}, which are not applied to xarray data: open them with "
            "mask_and_scale=True, or use decode_cf=False if the values are meant as they are stored",
            RuntimeWarning,
        )


def coordinates_of(xdata, ydata, axes):
    """x of an xarray ``ydata``: names of coordinates and DataArrays as plain arrays; by default those of the fit axes.

    Axes are those of the fit, or all of ydata's where x differs from pixel to pixel. A stacked x has further ones in front.
    """
    coords, fitted = ydata.coords, [ydata.dims[k] for k in axes]
    given = as_given(xdata, ydata, axes)
    named = [isinstance(each, str) and each in coords for each in given]
    for each, known in zip(given, named, strict=True):
        lost = isinstance(each, str) and not known and not Path(each).exists() and not is_address(each)
        if lost or (xdata is None and not known):
            raise ValueError(f"`xdata` {xdata!r}: `ydata` does not have a coordinate {each!r}, only {list(coords)}")
    if not any(known or labelled(each) for each, known in zip(given, named, strict=True)):
        return xdata
    fitted = [dim for dim in ydata.dims if dim in fitted]
    found = []
    for each, known in zip(given, named, strict=True):
        if known or labelled(each):
            each = coords[each] if known else each
            lead = [dim for dim in each.dims if dim not in ydata.dims] if set(fitted) <= set(each.dims) else []
            kept = fitted if set(each.dims) <= {*fitted, *lead} else list(ydata.dims)
            each = along_dims("xdata", each, ydata, [*lead, *kept])
        found.append(each)
    alone = len(found) == 1 and (named[0] or not isinstance(xdata, tuple))
    return found[0] if alone else tuple(found)


def as_given(xdata, ydata, axes=None) -> list:
    """Each coordinate as it came: by default the names of the axes of an xarray ``ydata``, of those of the fit if given."""
    named = labelled(ydata)
    if xdata is None and named:
        return [ydata.dims[k] for k in (range(ydata.ndim) if axes is None else axes)]
    return [*xdata] if isinstance(xdata, (tuple, list) if named else tuple) else [xdata]


def with_dates(data):
    """``data``, of pandas with a time zone or a list of dates as an array of datetime64 (UTC)."""
    if getattr(getattr(data, "dtype", None), "tz", None) is not None:
        return np.asarray(data, dtype="M8[ns]")
    if isinstance(data, list) and data and isinstance(data[0], (np.datetime64, np.timedelta64)):
        return np.array(data)
    return data


def _by_calendar(array) -> bool:
    return np.datetime_data(array.dtype)[0] in ("Y", "M")


def seconds(array, origin):
    """Dates as float seconds since ``origin``, durations as float seconds, NaT as nan.

    Raises
    ------
    TypeError
        Durations in years or months, which have no fixed length.
    """
    if array.dtype.kind == "M":
        array = array.astype("M8[s]") - origin if _by_calendar(array) else array - origin
    if _by_calendar(array):
        raise TypeError(f"`xdata` has durations of dtype {array.dtype}, whose length varies: give days, or numbers")
    return array / np.timedelta64(1, "s")


def origins(xdata) -> tuple[str | None, ...]:
    """The earliest date of each coordinate; None where it has none, or is not in memory."""
    parts = [with_dates(each) for each in (xdata if isinstance(xdata, tuple) else (xdata,))]
    here = [not hasattr(each, "dask") and not hasattr(each, "store") and is_kind(each, "M") for each in parts]
    return tuple(str(earliest(_known(each))) if dates else None for each, dates in zip(parts, here, strict=True))


def _known(dates):
    """Dates in memory as an array, NaT where they are masked."""
    if not isinstance(dates, np.ma.MaskedArray):
        return np.asarray(dates)
    return np.where(np.ma.getmaskarray(dates), np.array("NaT", dates.dtype), np.ma.getdata(dates))


def earliest(dates: np.ndarray):
    """The earliest date that is not NaT."""
    return np.fmin.reduce(dates, axis=None) if dates.size else np.datetime64("NaT")


def is_kind(array, kinds) -> bool:
    return getattr(getattr(array, "dtype", None), "kind", " ") in kinds


def since(x, known):
    """``x`` of a prediction with dates as seconds since the earliest ones of the fit, ``known`` by `origins`.

    Raises
    ------
    TypeError
        Dates for a coordinate that had none in the fit, or whose earliest date is not known.
    """
    parts = [with_dates(each) for each in (x if isinstance(x, tuple) else (x,))]
    for k, each in enumerate(parts):
        if not is_kind(each, "mM"):
            continue
        origin = known[k] if k < len(known) else None
        if origin is None and each.dtype.kind == "M":
            raise TypeError(f"`x` has the dtype {each.dtype}: give seconds, since the earliest date of the fit")
        array = each if hasattr(each, "dims") or hasattr(each, "dask") else _known(each)
        parts[k] = seconds(array, np.datetime64(origin) if origin else None)
    return tuple(parts) if isinstance(x, tuple) else parts[0]


def along_dims(name, array, ydata, dims=None):
    """Plain data of an xarray array with axes in the order of ``dims``, by default ydata's, of size 1 where it lacks one.

    Raises
    ------
    ValueError
        Dimensions that ydata does not have, or has with other labels.
    """
    if not labelled(array):
        return array
    dims = ydata.dims if dims is None else dims
    if unknown := [dim for dim in array.dims if dim not in dims]:
        raise ValueError(
            f"`{name}` has the dimensions {array.dims}, `ydata` {ydata.dims} does not have {unknown[0]!r}: rename it, "
            "or pass its .data, whose axes are matched by position"
        )
    _check_labels(name, array, ydata)
    array = array.transpose(*(dim for dim in dims if dim in array.dims))
    return array.data.reshape(tuple(array.sizes.get(dim, 1) for dim in dims))


def _check_labels(name, array, other, other_name="ydata"):
    for dim in array.dims:
        if dim not in array.coords or dim not in other.coords or array[dim].variable.equals(other[dim].variable):
            continue
        mine, others = array[dim].values, other[dim].values
        how = f"{len(mine)} and {len(others)} of them"
        if len(mine) == len(others):
            k = int(np.argmax(mine != others))
            how = f"{mine[k]} and {others[k]} at place {k}, first"
        raise ValueError(
            f"`{name}` and `{other_name}` have different labels along {dim!r}: {how}. Align them first, for example "
            "with xarray.align or reindex_like, or pass its .data, whose axes are matched by position"
        )


def at_labels(x, n_lead):
    """x of a prediction as plain arrays whose axes go by place, and the labels of what is computed at them, None if none.

    The first ``n_lead`` axes of an x of several coordinates do not belong to the points.
    """
    parts = x if isinstance(x, tuple) else (x,)
    known = [each for each in parts if labelled(each)]
    if not known:
        return x, None
    dims = list(dict.fromkeys(dim for each in known for dim in each.dims))
    for k, each in enumerate(known):
        for j, other in enumerate(known[:k]):
            _check_labels(f"x[{k}]", each, other, f"x[{j}]")
    plain = tuple(along_dims("x", each, each, dims) for each in parts)
    return plain if isinstance(x, tuple) else plain[0], Labels.of(known, dims[n_lead:])


def map_values(p0, bounds, fixed, ydata, fitted):
    """``p0``, ``bounds`` and ``fixed`` of a map with the xarray arrays among them as plain ones of the map's shape.

    An array of starts, or of bounds, of all parameters keeps their axis, as the last.
    """
    dims = [dim for dim in ydata.dims if dim not in fitted]
    shape = tuple(ydata.sizes[dim] for dim in dims)

    def plain(what, value, inner=0):
        if isinstance(value, Mapping):
            return {name: plain(f"{what} for {name!r}", each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(what, each) for each in value]
        if not labelled(value):
            return value
        unexpected = [dim for dim in value.dims if dim not in dims]
        if len(unexpected) > inner or set(unexpected) & set(fitted):
            raise ValueError(
                f"{what} has unexpected dimensions {tuple(unexpected)}. It should only have dimensions that are in data "
                f"dimensions {dims}, those of the map."
            )
        array = along_dims(what, value, ydata, [*dims, *unexpected])
        return np.broadcast_to(array, (*shape, *(value.sizes[dim] for dim in unexpected)))

    if isinstance(bounds, Mapping):
        bounds = {
            name: [plain(f"{('Lower', 'Upper')[k % 2]} bound for {name!r}", each) for k, each in enumerate(pair)]
            if isinstance(pair, (list, tuple))
            else pair
            for name, pair in bounds.items()
        }
    elif isinstance(bounds, (list, tuple)):
        bounds = type(bounds)(plain(f"bounds[{k}]", each, 1) for k, each in enumerate(bounds))  # the default stays it
    return plain("Initial guess", p0, 1), bounds, plain("Fixed value", fixed)
