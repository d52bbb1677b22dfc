"""User arrays of any kind become a `Problem` of aligned chunks.

Everything about shapes, dtypes and chunks is checked here, from metadata alone. y's chunks rule: dense operands (x,
sigma, mask of y's shape) are rechunked to them; operands that only broadcast against y (an axis vector, one mask for
all frames, a scalar) stay small and are cut along the axes that they have. What is wrong with *values* (NaN, infinity,
sigma <= 0) can only be seen when a chunk has been read: see `dask_nlsq.chunks`.
"""

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product
from math import prod
from numbers import Real
from pathlib import PurePath
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from .chunks import Rules, block_cuts
from .kernels import Invalid, Layout, Layouts
from .labels import earliest, seconds, with_dates
from .memory import buffer_bytes

SENT_BYTES = 2**25  # of y, up to which an array in memory goes to a worker in one piece
JOINED_POINTS = 2**16  # small chunks are joined up to here: enough to start a kernel for, few enough to share out


@dataclass(frozen=True)
class Problem:
    """Aligned operands of a fit. ``operands`` are NumPy or Dask arrays in the order of `Layouts`, ndim as y's."""

    operands: tuple[Any, ...]
    chunks: tuple[tuple[int, ...], ...]
    rules: Rules
    factor: np.ndarray | None = None  # (M, M) Cholesky factor of the covariance of y
    n_dropped: int = 0  # points that were left out beforehand, with a covariance matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(sizes) for sizes in self.chunks)

    @property
    def n_points(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(operand.nbytes for operand in self.operands)

    @property
    def lazy(self) -> bool:
        return any(isinstance(operand, da.Array) for operand in self.operands)

    @property
    def n_chunks(self) -> int:
        return prod(len(sizes) for sizes in self.chunks)

    @property
    def n_runs(self) -> int:
        return -(-self.n_chunks // self.rules.run)

    @property
    def run_points(self) -> int:
        """Points of the longest run of chunks that are joined."""
        return self.rules.run * self.rules.capacities[0]

    @property
    def run_nbytes(self) -> int:
        """Bytes of the longest run, in float64."""
        layouts, rules = self.rules.layouts.operands, self.rules
        return sum(8 * n * (rules.run if each.dense else 1) for each, n in zip(layouts, rules.capacities, strict=True))

    def held_nbytes(self, sent: bool) -> int:
        """Bytes of all blocks as `prepare_chunk` makes them; views of the user's arrays count where they are sent."""
        points = reduce(np.multiply.outer, [np.asarray(sizes, np.int64) for sizes in self.chunks]).ravel()
        runs = np.add.reduceat(points, np.arange(0, len(points), self.rules.run))
        lengths, counts = np.unique(runs, return_counts=True)
        return int(sum(count * self._run_held(int(n), sent) for n, count in zip(lengths, counts, strict=True)))

    def _run_held(self, n, sent):
        total, (cuts, capacity) = 0, block_cuts(self.rules, n)
        for k, (layout, operand) in enumerate(zip(self.rules.layouts.operands, self.operands, strict=True)):
            is_mask = layout is self.rules.layouts.mask
            itemsize = 1 if is_mask else min(operand.dtype.itemsize, 8)
            if not layout.dense:
                total += buffer_bytes(max(self.rules.capacities[k], 1) * itemsize)
            elif self.rules.copied or len(cuts) == 1:
                total += buffer_bytes((cuts[-1][0] + capacity) * itemsize)
            else:  # the first and the last block seldom lie as they must
                total += 2 * buffer_bytes(capacity * itemsize)
                total += n * itemsize * (sent or is_mask or not operand.dtype.isnative or operand.itemsize > 8)
        return total

    def indices(self) -> list[tuple[int, ...]]:
        """Indices of the chunks in C order."""
        return list(product(*(range(len(sizes)) for sizes in self.chunks)))

    def chunk_shape(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[i] for sizes, i in zip(self.chunks, index, strict=True))

    def places(self, index: tuple[int, ...]) -> list:
        """Where a chunk's piece of each operand is: a NumPy array, or a key where the operand is a Dask array."""
        return [cut(index) for cut in self._cuts]

    def pieces(self, index: tuple[int, ...]) -> list:
        """A chunk's piece of each operand: a NumPy array, or a Delayed one where the operand is a Dask array."""
        places = zip(self.places(index), self._delayed, strict=True)
        return [place if blocks is None else blocks[place[1:]] for place, blocks in places]

    @cached_property
    def _cuts(self):
        starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in self.chunks]

        def cutter(operand):
            narrow = [size == 1 for size in operand.shape]
            if isinstance(operand, da.Array):
                return lambda index: (operand.name, *(0 if one else i for one, i in zip(narrow, index, strict=True)))
            return lambda index: operand[
                tuple(
                    slice(None) if one else slice(start[i], start[i + 1])
                    for one, start, i in zip(narrow, starts, index, strict=True)
                )
            ]

        return [cutter(operand) for operand in self.operands]

    @cached_property
    def _delayed(self):
        return [operand.to_delayed() if isinstance(operand, da.Array) else None for operand in self.operands]


# ---------------------------------------------------------------------------------------------------------------------
# at the door


def as_array(name: str, data) -> np.ndarray | da.Array:
    """NumPy for what is in memory, Dask for what is not; real numbers only."""
    if data is None or isinstance(data, (str, bytes, PurePath)) or hasattr(data, "array_keys"):
        kind = "a group: pass one of its arrays" if hasattr(data, "array_keys") else f"{data!r}: pass an array"
        raise TypeError(f"`{name}` is {kind}. Open a store first, as with zarr.open_array(path, mode='r')")
    if hasattr(data, "dims") and hasattr(data, "data"):  # xarray
        data = data.data
    if isinstance(data, da.Array):
        array = data
        if any(np.isnan(size) for sizes in array.chunks for size in sizes):
            raise ValueError(f"`{name}` is a Dask array of unknown chunk sizes: call {name}.compute_chunk_sizes() first")
        if any(0 in sizes for sizes in array.chunks) and array.size:
            array = array.rechunk(tuple(tuple(size for size in sizes if size) for sizes in array.chunks))
    elif _on_disk(data):
        # one shard, or one chunk, is the smallest piece that a store can read by itself
        stored = getattr(data, "shards", None) or getattr(data, "chunks", None) or "auto"
        lock = not hasattr(data, "store")
        array = da.from_array(_Reopened(data) if hasattr(data, "file") else data, chunks=stored, name=False, lock=lock)
    else:
        try:
            array = np.asarray(with_dates(data))
        except ValueError as err:  # lists of different lengths
            raise ValueError(f"`{name}` is not an array: {err}") from None
    if array.dtype.kind in "mM" and name.startswith("xdata"):
        array = _seconds(array)
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"`{name}` has dtype {array.dtype}: real numbers are needed (fit real and imaginary parts or amplitude and "
            "phase of complex data separately, convert text to numbers; dates may be `xdata`)"
        )
    return array


def _seconds(array):
    """Dates as seconds since the earliest one, lazily of a Dask array."""
    origin = None
    if array.dtype.kind == "M" and isinstance(array, da.Array):
        origin = da.reduction(array, _first, _first, dtype=array.dtype, meta=np.empty((), array.dtype))
    elif array.dtype.kind == "M":
        origin = earliest(array)
    return seconds(array, origin)


def _first(dates, axis, keepdims):
    return np.fmin.reduce(dates, axis=axis, keepdims=keepdims)  # no NaT, where there is any other


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
        for each in argument if isinstance(argument, tuple) else (argument,):
            mode = getattr(getattr(each, "file", None), "mode", "r")
            if mode != "r":
                raise TypeError(
                    f"`{name}` is in {each.file.filename}, which is open for writing, so that workers cannot read it: open "
                    "it with mode 'r', or use strategy=\"standard\""
                )


def _reopen(file_type, filename, name):
    return _Reopened(file_type(filename, "r")[name])


def _on_disk(data):
    array_like = all(hasattr(data, attribute) for attribute in ("shape", "dtype", "__getitem__"))
    # NumPy and JAX have the second attribute, pandas the third
    in_memory = isinstance(data, np.generic) or hasattr(data, "__array_priority__") or hasattr(data, "to_numpy")
    return array_like and not in_memory


def build_problem(
    xdata,
    ydata,
    sigma=None,
    mask=None,
    *,
    check: bool,
    omit: bool,
    whole: bool = False,
    split: bool = False,
    hides: bool = False,
    sentinels=(),
    counts: bool = False,
) -> Problem:
    """Check shapes and dtypes and align the operands; reads no data.

    Parameters
    ----------
    xdata, ydata, sigma, mask : array_like or None
        As in `dask_nlsq.curve_fit`, without a covariance matrix as ``sigma``.
    check, omit : bool
        Whether values that are not finite are counted, and whether their points are left out.
    whole : bool
        Whether the model must be given all points in one call.
    split : bool
        Whether arrays in memory are cut into chunks that workers can share.
    hides : bool
        Whether chunks that cannot be read are left out.
    sentinels : tuple
        ``mask_values`` and ``valid_range`` of `dask_nlsq.curve_fit`.
    counts : bool
        Whether y must not be negative.

    Raises
    ------
    ValueError
        Shapes that do not fit together, empty data, unknown chunk sizes.
    TypeError
        Data that are not real numbers.
    """
    if _is_masked(sigma):
        raise TypeError("`sigma` is a masked array: pass its data, and its mask as mask=")
    ydata, mask = unmasked(ydata, mask)
    xdata = _plain(xdata)
    y = as_array("ydata", ydata)
    x_kind, x_lead, coordinates = _coordinates(xdata, y.shape)
    if y.size == 1 and coordinates and x_kind != "tuple":  # SciPy broadcasts a single y
        y = np.broadcast_to(np.asarray(y), coordinates[0].shape)
    if y.size == 0:
        raise ValueError("`ydata` must not be empty!")
    if y.ndim == 0:
        y = y.reshape(1)
    sigma = np.ones(1) if sigma is None else as_array("sigma", sigma)
    operands = [y, _broadcastable("sigma", sigma, y.shape)]
    if mask is not None:
        operands.append(_broadcastable("mask", as_array("mask", mask), y.shape))
    elif omit or hides:
        operands.append(np.zeros((1,) * y.ndim, bool))
    operands += [_broadcastable("xdata", c, y.shape) for c in coordinates]
    chunks = next((a.chunks for a in operands if isinstance(a, da.Array) and a.shape == y.shape), None)
    if chunks is None or whole:
        sizes = "auto" if split and not whole else y.shape
        chunks = da.core.normalize_chunks(sizes, y.shape, limit=SENT_BYTES, dtype=y.dtype)
    lazy = any(isinstance(operand, da.Array) for operand in operands)
    operands = tuple(_aligned(operand, chunks, lazy) for operand in operands)

    def layout(operand, coordinate=False):
        return Layout(operand.shape == y.shape, coordinate and x_kind == "tuple" and operand.dtype.kind in "iu")

    masked = mask is not None or omit or hides
    layouts = Layouts(
        y=Layout(True),
        sigma=layout(operands[1]),
        # points that are left out for their values need a mask of their own
        mask=(Layout(True) if omit or hides else layout(operands[2])) if masked else None,
        x=tuple(layout(operand, coordinate=True) for operand in operands[2 + masked :]),
        x_kind=x_kind,
        x_lead=x_lead,
        ndim=y.ndim,
        invalid=invalid_values(*sentinels, y.dtype) if sentinels else None,
    )
    largest = [max(sizes) for sizes in chunks]
    capacities = tuple(
        prod(largest) if each.dense else prod(big for big, size in zip(largest, operand.shape, strict=True) if size > 1)
        for each, operand in zip(layouts.operands, operands, strict=True)
    )
    joinable = all(each.dense or capacity == 1 for each, capacity in zip(layouts.operands, capacities, strict=True))
    run = max(1, min(JOINED_POINTS // capacities[0], prod(len(sizes) for sizes in chunks))) if joinable else 1
    sizes = zip(operands, capacities, strict=True)
    read_bytes = sum(capacity * operand.itemsize for operand, capacity in sizes if isinstance(operand, da.Array) or split)
    dtypes = tuple(operand.dtype for operand in operands)
    rules = Rules(layouts, capacities, run, check, omit, whole, read_bytes, omit or hides, dtypes, counts)
    return Problem(operands, chunks, rules)


def invalid_values(mask_values, valid_range, dtype) -> Invalid | None:
    """What a value of y must not be, of what ``dtype`` can hold."""
    try:
        values = [value.item() if hasattr(value, "item") else value for value in mask_values]
        if values == ["largest"]:
            values = [np.iinfo(dtype).max] if dtype.kind == "u" and dtype.itemsize > 1 else []
        low, high = (None, None) if valid_range is None else valid_range
        if not all(isinstance(each, Real) for each in (*values, low or 0, high or 0)):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            "`mask_values` must be a sequence of numbers and `valid_range` a pair (low, high), None for no limit, not "
            f"{mask_values!r} and {valid_range!r}"
        ) from None
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = [value for value in values if value == value and info.min <= value <= info.max]
        low = None if low is None or low <= info.min else int(np.ceil(low))
        high = None if high is None or high >= info.max else int(np.floor(high))
    found = Invalid(tuple(values), low, high)
    return found if found != ((), None, None) else None


def _is_masked(data):
    return isinstance(getattr(data, "_meta", data), np.ma.MaskedArray)


def unmasked(ydata, mask):
    """Data and mask of a masked array, NumPy's or Dask's, joined with ``mask``."""
    if not _is_masked(ydata):
        return ydata, mask
    of = da.ma if isinstance(ydata, da.Array) else np.ma
    hidden = of.getmaskarray(ydata)
    return of.getdata(ydata), hidden if mask is None else hidden | (as_array("mask", mask) != 0)


def _plain(xdata):
    """x without masked arrays; what they hide has no place in a model, so they are refused."""
    if any(_is_masked(each) for each in (xdata if isinstance(xdata, tuple) else (xdata,))):
        raise TypeError("`xdata` is a masked array: pass its data, and its mask as mask=")
    return xdata


def _coordinates(xdata, shape) -> tuple[str, tuple[int, ...], list]:
    """How the model takes x, the leading axes of a stacked x, and x as a list of arrays that broadcast against y."""
    if xdata is None:
        return "none", (), []
    if isinstance(xdata, tuple) and not all(np.isscalar(c) for c in xdata):
        return "tuple", (), [as_array(f"xdata[{k}]", c) for k, c in enumerate(xdata)]
    x = as_array("xdata", xdata)
    lead = x.shape[: x.ndim - len(shape)]
    if lead and shape and x.shape[len(lead) :] == shape:
        return "stacked", lead, [x[index] for index in np.ndindex(lead)]
    if x.size == 0 and prod(shape):
        raise ValueError("`xdata` must not be empty!")
    return "single", (), [x]


class Coordinates(NamedTuple):
    """How the model takes x, and x as arrays: over the fit axes of a map, or with y's axes where pixels differ in it."""

    kind: str
    lead: tuple[int, ...]
    arrays: list

    @classmethod
    def of(cls, xdata, shape, fit_axes) -> "Coordinates":
        fit_shape = tuple(shape[k] for k in fit_axes)

        def own(c):
            return np.ndim(c) == len(shape) > len(fit_shape)

        parts = xdata if isinstance(xdata, tuple) else (xdata,)
        if xdata is None or not any(map(own, parts)):
            kind, lead, arrays = _coordinates(xdata, fit_shape)
            arrays = [_broadcastable("xdata", c, fit_shape) for c in arrays]
            return cls(kind, lead, [np.broadcast_to(np.asarray(c), fit_shape) for c in arrays])
        arrays = []
        for k, c in enumerate(parts):
            c = as_array(f"xdata[{k}]", c)
            if own(c):
                arrays.append(_broadcastable("xdata", c, shape))
            else:
                arrays.append(np.broadcast_to(np.asarray(_broadcastable("xdata", c, fit_shape)), fit_shape))
        return cls("tuple" if isinstance(xdata, tuple) else "single", (), arrays)

    def shared(self, fit_axes) -> tuple[np.ndarray | None, ...]:
        """(n,) each; None for one that pixels differ in."""
        return tuple(np.array(c).ravel() if c.ndim == len(fit_axes) else None for c in self.arrays)


def _broadcastable(name, array, shape):
    """``array`` with as many axes as y, each of y's size or 1."""
    fits = array.ndim <= len(shape) and all(a in (1, s) for a, s in zip(array.shape[::-1], shape[::-1], strict=False))
    if array.size == 1:
        return array.reshape((1,) * len(shape))
    if not fits:
        way_out = {
            "sigma": f"a scalar, an array that broadcasts against ydata, or a covariance matrix {(prod(shape),) * 2}",
            "mask": "an array that broadcasts against ydata",
            "xdata": f"an array of shape {shape} or {('k', *shape)}, or a tuple of arrays that broadcast against ydata",
        }[name]
        extra = "; `sigma` has incorrect shape." if name == "sigma" else ""
        raise ValueError(f"`{name}` of shape {array.shape} does not fit `ydata` of shape {shape}: give {way_out}{extra}")
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def _aligned(operand, chunks, lazy):
    if isinstance(operand, da.Array):
        return operand.rechunk(tuple((1,) if size == 1 else c for size, c in zip(operand.shape, chunks, strict=True)))
    dense = operand.size > 1 and operand.shape == tuple(sum(sizes) for sizes in chunks)
    if dense and lazy and any(len(sizes) > 1 for sizes in chunks):
        return da.from_array(operand, chunks=chunks, name=False)
    return operand


def build_whitened(xdata, ydata, covariance, mask=None, *, check: bool, omit: bool) -> Problem:
    """A problem with correlated noise: ``covariance`` (M, M) of the M values of y, ``L L^T`` by Cholesky.

    Its residual is ``L^-1 (f(x) - y)``, which needs all points at once; points left out are dropped beforehand, as SciPy
    does, so that the model sees those only that count.

    Raises
    ------
    ValueError
        Where the covariance matrix is not finite, symmetric and positive definite.
    """
    problem = build_problem(xdata, ydata, None, mask, check=check, omit=omit, whole=True)
    pieces = problem.pieces((0,) * len(problem.shape))
    pieces = [np.asarray(piece.compute() if hasattr(piece, "compute") else piece) for piece in pieces]
    layouts, dropped = problem.rules.layouts, 0
    if layouts.mask is not None:
        hidden = np.broadcast_to(pieces[2] != 0, problem.shape)
        coordinates = [np.broadcast_to(piece, problem.shape) for piece in pieces[3:]]
        if omit:
            hidden = hidden | ~np.isfinite(pieces[0])
            for coordinate in coordinates:
                hidden = hidden | ~np.isfinite(coordinate)
        keep = ~hidden.ravel()
        x = [coordinate.ravel()[keep] for coordinate in coordinates]
        x = {
            "none": lambda: None,
            "single": lambda: x[0],
            "stacked": lambda: np.stack(x).reshape(*layouts.x_lead, -1),
            "tuple": lambda: tuple(x),
        }[layouts.x_kind]()
        if not keep.any():
            raise ValueError(f"no data: all {keep.size} points are masked or omitted (mask: true leaves a point out)")
        dropped = int(keep.size - np.count_nonzero(keep))
        covariance = covariance[np.ix_(keep, keep)]
        problem = build_problem(x, pieces[0].ravel()[keep], check=check, omit=False, whole=True)
    symmetric = np.abs(covariance - covariance.T).max(initial=0) <= 1e-10 * np.abs(covariance).max(initial=0)
    if not np.isfinite(covariance).all() or not symmetric:
        raise ValueError("`sigma` of shape (M, M) must be a finite, symmetric covariance matrix")
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as err:
        raise ValueError("`sigma` must be positive definite.") from err
    return replace(problem, factor=factor, n_dropped=dropped)
