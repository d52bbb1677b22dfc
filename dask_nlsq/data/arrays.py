"""Arrays of any kind become NumPy or Dask arrays of real numbers, and the masks that they bring along.

What a task, or the ``__getitem__`` of a foreign array, gives is compared with what was declared, chunk by chunk, before
anything is rechunked or joined: a chunk that is one value short would pair all later values with the wrong x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import dask
import numpy as np
from dask.base import tokenize
from dask.blockwise import Blockwise
from dask.layers import ArrayBlockIdDep, ArrayChunkShapeDep

from ..base.lazy import da
from ..memory.needs import MADE_BYTES
from .cf import AS_STORED, Decoding
from .labels import earliest, seconds, with_dates

CHECKED = "nlsq-checked"  # in the names of arrays whose chunks are compared with what was declared
NUMBERS = {int, float, bool, np.float64, np.int64}  # what most lists hold, of which none needs a look
MASKED = np.ma.MaskedArray
TO_DENSE = {True: "pass {name}.map_blocks(lambda block: block.toarray())", False: "pass {name}.toarray()"}


def as_array(name: str, data) -> np.ndarray | da.Array:
    """NumPy for what is in memory, Dask for what is not; real numbers only, and masked where ``data`` is.

    Raises
    ------
    TypeError
        Not an array of real numbers; the message says what to pass instead.
    ValueError
        Unknown chunk sizes, lists of different lengths.
    """
    if data is None or isinstance(data, (str, bytes, PurePath)) or hasattr(data, "array_keys"):
        kind = "a group: pass one of its arrays" if hasattr(data, "array_keys") else f"{data!r}: pass an array"
        raise TypeError(f"`{name}` is {kind}. Open a store first, as with zarr.open_array(path, mode='r')")
    if is_labelled(data):
        data = data.data
    data = stacked(name, data)
    if isinstance(data, da.Array):
        array: Any = data
        if any(np.isnan(size) for sizes in array.chunks for size in sizes):
            raise ValueError(f"`{name}` is a Dask array of unknown chunk sizes: call {name}.compute_chunk_sizes() first")
    elif _on_disk(data):
        _refuse_other_numbers(name, data.dtype)
        # one shard, or one chunk, is the smallest piece that a store can read by itself
        stored = getattr(data, "shards", None) or getattr(data, "chunks", None) or "auto"
        lock = not hasattr(data, "store")
        source = _Reopened(data) if hasattr(data, "file") else data
        empty = np.empty((0,) * len(data.shape), data.dtype)
        meta = np.ma.masked_array(empty) if _gives_masks(data) else empty
        array = da.from_array(source, chunks=stored, name=False, lock=lock, asarray=False, meta=meta)
    else:
        try:
            array = np.asanyarray(data) if has_masked(data) else np.asarray(with_dates(data))
        except ValueError as err:  # lists of different lengths
            raise ValueError(f"`{name}` is not an array: {err}") from None
    _refuse_other_numbers(name, array.dtype)
    if isinstance(array, da.Array):
        array = checked(name, array)
    if array.dtype.kind in "mM":
        array = _seconds(array)
    if isinstance(array, da.Array) and array.size and any(0 in sizes for sizes in array.chunks):
        array = array.rechunk(tuple(tuple(size for size in sizes if size) for sizes in array.chunks))
    return array


def _refuse_other_numbers(name, dtype):
    if getattr(dtype, "kind", "O") not in ("buifmM" if name.startswith("xdata") else "buif"):
        raise TypeError(
            f"`{name}` has dtype {dtype}: real numbers are needed (fit real and imaginary parts or amplitude and "
            "phase of complex data separately, convert text to numbers; dates may be `xdata`)"
        )


def _seconds(array):
    """Dates as seconds since the earliest one, lazily of a Dask array."""
    array, hidden = parted(array)
    of, ma = (da, da.ma) if isinstance(array, da.Array) else (np, np.ma)
    if hidden is not None:
        array = of.where(hidden, np.array("NaT", array.dtype), array)
    origin = None
    if array.dtype.kind == "M" and of is da:
        origin = da.reduction(array, _first, _first, dtype=array.dtype, meta=np.empty((), array.dtype))
    elif array.dtype.kind == "M":
        origin = earliest(array)
    found = seconds(array, origin)
    return found if hidden is None else ma.masked_array(found, hidden)


def _first(dates, axis, keepdims):
    return np.fmin.reduce(dates, axis=axis, keepdims=keepdims)  # no NaT, where there is any other


def stacked(name: str, data):
    """A list, or tuple, of lazy arrays as one Dask array, one of masked arrays as one; anything else as it is.

    `numpy.asarray` would compute lazy arrays, and take what masks hide for data.

    Raises
    ------
    TypeError, ValueError
        Collections that are not arrays, and lists of arrays that do not fit together.
    """
    _refuse_foreign(name, data)
    if not isinstance(data, (list, tuple)) or set(map(type, data)) <= NUMBERS:
        return data
    stored = [isinstance(each, (str, PurePath)) or (hasattr(each, "store") and _on_disk(each)) for each in data]
    if all(stored) and data and isinstance(data, tuple):
        raise TypeError(
            f"`{name}` is a tuple of stored arrays: pass a list, which is one array, joined along the first axis"
        )
    if any(stored):
        raise TypeError(
            f"`{name}` is a list of Zarr arrays or paths and of other arrays: pass one Dask array, as of "
            "dask.array.concatenate([dask.array.from_zarr(path), ...])"
        )
    if not any(map(_is_lazy, data)):
        return _masked(data) if has_masked(data) else data
    arrays = [as_array(f"{name}[{k}]", each) for k, each in enumerate(data)]
    if len({each.shape for each in arrays}) > 1:
        shapes = ", ".join(str(each.shape) for each in arrays)
        raise ValueError(
            f"`{name}` is a list of arrays of different shapes, {shapes}: pass dask.array.concatenate(...) of it"
        )
    return da.stack(arrays)


def _is_lazy(data):
    data = data.data if is_labelled(data) else data
    return isinstance(data, da.Array) or _on_disk(data)


def is_labelled(data) -> bool:
    """Whether it is one of xarray's."""
    return hasattr(type(data), "dims") and hasattr(type(data), "data")


def _refuse_foreign(name, data):
    """A TypeError for collections that NumPy would make an array of objects of, or compute at once."""
    if dask.is_dask_collection(data) and not isinstance(data, da.Array) and not is_labelled(data):
        raise TypeError(
            f"`{name}` is a Dask {type(data).__name__}: pass a Dask array, as of .to_dask_array(lengths=True) of a "
            "DataFrame or Series, or of dask.array.from_delayed"
        )
    if hasattr(getattr(data, "_meta", data), "todense"):
        way_out = TO_DENSE[isinstance(data, da.Array)].format(name=name)
        raise TypeError(f"`{name}` is sparse: {way_out}, the fit needs the zeros too")


def on_disk(data) -> bool:
    """Whether it is read by ``__getitem__`` only: h5py and Zarr arrays, and what else has shape and dtype."""
    return not isinstance(data, da.Array) and not is_labelled(data) and _on_disk(data)


def _on_disk(data):
    array_like = all(hasattr(data, attribute) for attribute in ("shape", "dtype", "__getitem__"))
    # NumPy and JAX have the second attribute, pandas the third
    in_memory = isinstance(data, np.generic) or hasattr(data, "__array_priority__") or hasattr(data, "to_numpy")
    return array_like and not in_memory


def _gives_masks(data):
    """Whether the slices of a foreign array are masked, by one element of it; those of h5py and Zarr never are."""
    if hasattr(data, "file") or hasattr(data, "store") or 0 in data.shape:
        return False
    return isinstance(data[(slice(0, 1),) * len(data.shape)], MASKED)


def decoded(name: str, data, decode_cf: bool) -> tuple[Any, Decoding]:
    """What attributes of a Zarr array or h5py data set make of it, lazily, and how; other data as `stacked` gives them."""
    if not (decode_cf and on_disk(data) and isinstance(getattr(data, "attrs", None), Mapping)):
        return stacked(name, data), AS_STORED
    how = Decoding.of_array(name, data) or AS_STORED
    return (data if how is AS_STORED else how.lazily(da.asarray(as_array(name, data)))), how


class _Reopened:
    """An h5py dataset that a worker opens again by its file and name, since an open one cannot be sent."""

    def __init__(self, dataset):
        self.dataset, self.shape, self.dtype, self.ndim = dataset, dataset.shape, dataset.dtype, dataset.ndim

    def __getitem__(self, item):
        return self.dataset[item]

    def __reduce__(self):
        return _reopen, (type(self.dataset.file), self.dataset.file.filename, self.dataset.name)


def check_sendable(**arguments) -> None:
    """Workers open HDF5 files themselves, which they cannot while someone writes.

    Raises
    ------
    TypeError
        Where a data set is of a file that is open for writing.
    """
    for name, argument in arguments.items():
        for each in argument if isinstance(argument, (tuple, list)) else (argument,):
            mode = getattr(getattr(each, "file", None), "mode", "r")
            if mode != "r":
                raise TypeError(
                    f"`{name}` is in {each.file.filename}, which is open for writing, so that workers cannot read it: open "
                    "it with mode 'r', or use strategy=\"standard\""
                )


def _reopen(file_type, filename, name):
    return _Reopened(file_type(filename, "r")[name])


# ---------------------------------------------------------------------------------------------------------------------
# declared and found


class Declared(NamedTuple):
    """What the chunks of a Dask array were said to be. Called on a chunk it gives it back, or raises ValueError.

    Numbers may be narrower than declared, or integers where floats are declared: their values are the same.
    """

    name: str
    dtype: np.dtype
    masked: bool

    def __call__(self, block, index, shape):
        if isinstance(block, MASKED):
            if not self.masked:
                raise self._error(
                    index,
                    "is a masked array",
                    "a plain one",
                    "otherwise its mask is lost: pass meta=numpy.ma.masked_array([]) to map_blocks, or pass mask=",
                )
            block = block.view()
            block.fill_value = 0  # NumPy's 999999 is too large for short integers where workers exchange them
        elif hasattr(block, "todense"):
            raise self._error(index, "is sparse", "a dense one", TO_DENSE[True].format(name=self.name))
        else:
            block = np.asarray(block)
        if block.shape != shape:
            found, declared = f"has shape {block.shape}", f"shape {shape}"
            raise self._error(index, found, declared, "as with chunks= in map_blocks")
        if not np.can_cast(block.dtype, self.dtype, "same_kind"):
            found, declared = f"has dtype {block.dtype}", f"dtype {self.dtype}"
            raise self._error(index, found, declared, "as with dtype= in map_blocks, or convert it")
        return block

    def _error(self, index, found, declared, way_out):
        where = f"chunk {tuple(map(int, index))} of `{self.name}`" if index else f"`{self.name}`"
        return ValueError(f"{where} {found}, but {declared} was declared: declare what it is, {way_out}")


def checked(name: str, array: da.Array) -> da.Array:
    """The same array; each chunk is compared with its declared shape, kind of dtype and maskedness."""
    if array.name.startswith(CHECKED):
        return array
    axes = tuple(range(array.ndim))
    return da.blockwise(
        Declared(name, array.dtype, isinstance(array._meta, MASKED)),
        axes,
        array,
        axes,
        ArrayBlockIdDep(array.chunks),
        axes,
        ArrayChunkShapeDep(array.chunks),
        axes,
        name=f"{CHECKED}-{tokenize(name, array.name)}",
        dtype=array.dtype,
        meta=array._meta,
        align_arrays=False,
    )


def made_bytes(arrays: Iterable) -> int:
    """Bytes per point that arrays take at least while they are read: 0 unless tasks make values, rather than read them."""
    layers = [each for array in arrays if isinstance(array, da.Array) for each in array.dask.layers.items()]
    made = any(isinstance(layer, Blockwise) and not name.startswith(("array-", CHECKED)) for name, layer in layers)
    return MADE_BYTES * made


# ---------------------------------------------------------------------------------------------------------------------
# masks


def has_masked(data) -> bool:
    """Whether it is a masked array, NumPy's or Dask's, or a list or tuple with one in it."""
    if isinstance(data, (list, tuple)):
        kinds = set(map(type, data))
        nested = any(issubclass(kind, (list, tuple, MASKED, da.Array)) for kind in kinds)
        return nested and any(map(has_masked, data))
    return isinstance(getattr(data, "_meta", data), MASKED)


def _masked(data):
    """The masked array of a list, at any depth."""
    if not isinstance(data, (list, tuple)):
        return np.ma.asanyarray(data)
    if any(isinstance(each, (list, tuple)) or np.ndim(each) for each in data):
        return np.ma.stack([_masked(each) for each in data])
    hidden = [isinstance(each, MASKED) and bool(np.ma.getmaskarray(each)) for each in data]
    return np.ma.array([0 if no else each for each, no in zip(data, hidden, strict=True)], mask=hidden)


def apart(name: str, data) -> tuple[Any, Any]:
    """Data of `as_array`, and what hides their points: a boolean array of their shape, None where they are not masked."""
    return parted(as_array(name, data))


def plain_array(name: str, data) -> np.ndarray | da.Array:
    """`as_array` of starts, bounds and others, which must not be masked.

    Raises
    ------
    ValueError
        Where it is masked.
    """
    array, hidden = apart(name, data)
    if hidden is not None:
        raise ValueError(
            f"`{name}` is a masked array, and all values are needed: fill the masked ones, for example with .filled(0)"
        )
    return array


def parted(array) -> tuple[Any, Any]:
    """`apart` of an array that is NumPy's or Dask's."""
    if not has_masked(array):
        return array, None
    of = da.ma if isinstance(array, da.Array) else np.ma
    return of.getdata(array), of.getmaskarray(array)


def join_masks(masks) -> Any:
    """True where any of them is, which broadcast against each other; None of none."""
    found = None
    for mask in masks:
        if mask is not None:
            found = mask if found is None else found | mask
    return found
