"""Names, coordinates and units of the axes of an array: of xarray, of Zarr's ``dimension_names``, of NeXus files.

A coordinate of a stored array is the array along one axis, in the same group, that has the name of this axis, as xarray
writes them. NeXus names the axes in the attribute ``axes`` of the group (NXdata), with "." for one without a name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..base.files import MALFORMED, plain_name
from ..base.lazy import zarr
from .cf import PACKED, Decoding
from .labels import labelled

logger = logging.getLogger("dask_nlsq")


class Axes(NamedTuple):
    """What is known of the axes of an array."""

    dims: tuple[str, ...]  # of all; "axis_0" where there is no name
    coords: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]]  # dims, values and attributes by name
    attrs: dict[str, Any]  # of the array
    name: str = ""


def axes_named(array: Any) -> Axes | None:
    """Of an xarray, Zarr or h5py array; None where the axes have no names, or twice the same one.

    Names and coordinates in a store are left out where they cannot be read, and the log says so: the data need none.
    """
    if labelled(array):
        known: dict[str, Any] = {name: (c.dims, c.data, _of_values(c.attrs)) for name, c in array.coords.items()}
        return Axes(tuple(map(str, array.dims)), known, _of_values(array.attrs), str(array.name or ""))
    if isinstance(array, zarr.Array):
        names = getattr(array.metadata, "dimension_names", None)
        try:
            group = _group_of(array)
        except MALFORMED as err:
            _left_out("names and coordinates of the axes", array.store_path, err)
            group = None
    elif hasattr(array, "file") and hasattr(array, "parent"):  # of h5py
        names, group = None, array.parent
    else:
        return None
    if names is None and group is not None and "axes" in group.attrs:
        found = [each.decode() if isinstance(each, bytes) else str(each) for each in np.atleast_1d(group.attrs["axes"])]
        names = [None if each == "." else each for each in found] if len(found) == len(array.shape) else None
    if names is None or not any(names):
        return None
    dims = tuple(name or f"axis_{k}" for k, name in enumerate(names))
    if len({*dims}) < len(dims):
        return None
    place = str(getattr(array, "store_path", array.name) or "")
    coords = {} if group is None else dict(_coordinates(group, dims, array.shape, place))
    return Axes(dims, coords, _plain(array.attrs), place.rpartition("/")[2].removesuffix(".zarr"))


def _coordinates(group: Any, dims, shape, place: str) -> Iterable[tuple[str, Any]]:
    """Those of the axes that have one in the group, and one that can be read."""
    for dim, n in zip(dims, shape, strict=True):
        try:
            if dim != plain_name(dim):
                raise ValueError("it is a path, not the name of an array in the same group")
            other: Any = group.get(dim)
            if getattr(other, "shape", None) == (n,):
                yield dim, ((dim,), _values(dim, other), _plain(other.attrs))
        except MALFORMED as err:
            _left_out(f"the coordinate {dim!r}", place, err)


def _left_out(what: str, place: Any, err: BaseException) -> None:
    logger.warning("%s beside %s cannot be read, and are left out: %s: %s", what, place, type(err).__name__, err)


def _group_of(array: zarr.Array) -> Any:
    """The group that a Zarr array on this machine is in; others are not asked for more than the fit needs."""
    from zarr.storage import LocalStore, MemoryStore, ZipStore

    store: Any = array.store
    if isinstance(store, LocalStore) and not array.path:  # opened by its own path
        store = store.root.parent
    elif not isinstance(store, (LocalStore, MemoryStore, ZipStore)):
        return None
    try:
        return zarr.open_group(store, path=array.path.rpartition("/")[0], mode="r", use_consolidated=False)
    except FileNotFoundError:
        return None


def _values(name: str, array: Any) -> np.ndarray:
    """Those of a stored coordinate, decoded, and NaN where they are invalid."""
    values, how = np.asarray(array[...]), Decoding.of_array(name, array)
    if how is None:
        return values
    hidden, values = how.hidden(values), how.decoded(values)
    return np.where(hidden, np.nan, values) if hidden.any() else values


def _of_values(attrs: Mapping) -> dict[Any, Any]:
    """The attributes of an array that are true of its decoded values: a copy has no others."""
    return {name: value for name, value in attrs.items() if name not in PACKED}


def _plain(attrs: Mapping) -> dict[str, Any]:
    """Attributes that are a text or a number; HDF5 has references and others too, which no other file can hold."""
    found = {}
    for name, value in _of_values(attrs).items():
        value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        if isinstance(value, (str, bool, int, float)):
            found[name] = value
    return found
