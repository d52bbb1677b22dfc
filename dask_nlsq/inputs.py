"""User arrays of any kind become a `Problem` of aligned chunks, and a chunk becomes blocks for the kernels.

Everything about shapes, dtypes and chunks is checked here, from metadata alone. y's chunks rule: dense operands (x,
sigma, mask of y's shape) are rechunked to them; operands that only broadcast against y (an axis vector, one mask for
all frames, a scalar) stay small and are cut along the axes that they have. What is wrong with *values* (NaN, infinity,
sigma <= 0) can only be seen when a chunk has been read: `prepare_chunk` counts it in a `Census`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product
from math import prod
from pathlib import PurePath
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from .kernels import BLOCK_POINTS, Block, Invalid, Layout, Layouts, longest_tile
from .memory import ALIGNMENT, buffer_bytes, get_memory_manager
from .store import BadChunkError

SENT_BYTES = 2**25  # of y, up to which an array in memory goes to a worker in one piece
JOINED_POINTS = 2**16  # small chunks are joined up to here: enough to start a kernel for, few enough to share out
EMPTIEST = 32  # buffers of short chunks may be filled to this fraction only; long chunks are cut, not padded
SAMPLE_POINTS = 8  # points on which a model is checked


class Census(NamedTuple):
    """What one chunk holds; counts are of points that the mask does not leave out."""

    index: tuple[int, ...]
    n_points: int
    n_masked: int
    not_finite: dict[str, int]  # per argument: "xdata", "ydata", "sigma"
    n_omitted: int
    n_sigma_not_positive: int
    damage: tuple[BadChunkError, ...] = ()  # chunks of stores that were left out


class Chunk(NamedTuple):
    """One chunk of y, or a run of small ones, with all that belongs to it, ready for the kernels."""

    blocks: tuple[Block, ...]
    censuses: tuple[Census, ...]  # one for each chunk of y
    sample: tuple[np.ndarray, ...]  # the coordinates at a few points
    staged: tuple[np.ndarray, ...]  # buffers of the blocks that `release` gives back to the MemoryManager


class Rules(NamedTuple):
    """How `prepare_chunk` is to treat every chunk of a problem."""

    layouts: Layouts
    capacities: tuple[int, ...]  # per operand: elements of the largest piece
    run: int  # chunks that are joined: 1 unless they are small
    check: bool  # count values that are not finite
    omit: bool  # leave points out where a value is not finite
    whole: bool  # one block of exactly the chunk's length
    read_bytes: int  # of the largest chunk's pieces, as they are read; 0 where all are the user's own arrays
    hides: bool  # points may be left out for their values, or since they cannot be read
    dtypes: tuple[np.dtype, ...]  # of the operands

    @property
    def copied(self) -> bool:
        """What is read is copied, once and aligned; the user's own arrays are looked at where they lie."""
        return self.read_bytes > 0


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
        total, (cuts, capacity) = 0, _cuts(self.rules, n)
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
            array = np.asarray(data)
        except ValueError as err:  # lists of different lengths
            raise ValueError(f"`{name}` is not an array: {err}") from None
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"`{name}` has dtype {array.dtype}: real numbers are needed (fit real and imaginary parts or amplitude and "
            "phase of complex data separately, convert text and dates to numbers)"
        )
    return array


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

    Raises
    ------
    ValueError
        Shapes that do not fit together, empty data, unknown chunk sizes.
    TypeError
        Data that are not real numbers.
    """
    if _is_masked(sigma):
        raise TypeError("`sigma` is a masked array: pass its data, and its mask as mask=")
    ydata, mask = _unmasked(ydata, mask)
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
        invalid=_invalid(*sentinels, y.dtype) if sentinels else None,
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
    rules = Rules(layouts, capacities, run, check, omit, whole, read_bytes, omit or hides, dtypes)
    return Problem(operands, chunks, rules)


def _invalid(mask_values, valid_range, dtype) -> Invalid | None:
    """What a value of y must not be, of what ``dtype`` can hold."""
    try:
        values = [value.item() if hasattr(value, "item") else value for value in mask_values]
        if values == ["largest"]:
            values = [np.iinfo(dtype).max] if dtype.kind == "u" and dtype.itemsize > 1 else []
        low, high = (None, None) if valid_range is None else valid_range
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


def _unmasked(ydata, mask):
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


# ---------------------------------------------------------------------------------------------------------------------
# a chunk that has been read


def prepare_chunk(rules: Rules, indices: Sequence[tuple[int, ...]], pieces: Sequence[Sequence[np.ndarray]]) -> Chunk:
    """Count what is wrong with the values of a chunk, or of a run of small ones, and cut it into blocks.

    Parameters
    ----------
    indices : sequence of tuple
        Of the chunks of y.
    pieces : sequence of sequence of ndarray
        For each chunk its piece of each operand, in the order of `Layouts`.

    Returns
    -------
    Chunk
        Its blocks look at the pieces where these lie as the kernels need them, else at copies in buffers of the shared
        `MemoryManager`. `release` gives those back; a chunk that is dropped instead takes them along.
    """
    censuses, cleaned = zip(*(_inspect(rules, *each) for each in zip(indices, pieces, strict=True)), strict=True)
    if len(cleaned) == 1:
        (pieces,) = cleaned
    else:
        one_axis = (*(1 for _ in cleaned[0][0].shape[1:]), -1)
        pieces = [
            np.concatenate([piece.ravel() for piece in parts]).reshape(one_axis) if layout.dense else parts[0]
            for layout, parts in zip(rules.layouts.operands, zip(*cleaned, strict=True), strict=True)
        ]
    shape = pieces[0].shape
    first_x = 2 + (rules.layouts.mask is not None)
    blocks, staged = _cut(rules, shape, pieces)
    return Chunk(blocks, censuses, _sample(rules, shape, pieces[first_x:]), staged)


def blank(rules: Rules, shape: tuple[int, ...], k: int) -> np.ndarray:
    """In the place of operand ``k`` of a chunk that cannot be read: a mask that hides all, and values that do no harm."""
    return (np.ones if k in (1, 2) else np.zeros)(shape, rules.dtypes[k])


def release(chunk: Chunk) -> None:
    """Give back what `prepare_chunk` has taken; no block of the chunk may be used any longer."""
    for array in chunk.staged:
        get_memory_manager().free_array(array)


def _inspect(rules, index, pieces) -> tuple[Census, list[np.ndarray]]:
    """Census of one chunk, and its pieces in native byte order with the mask that the kernels use."""
    pieces = [_native(np.asarray(piece)) for piece in pieces]
    shape = pieces[0].shape
    masked = rules.layouts.mask is not None
    names = ["ydata", "sigma", *(["mask"] if masked else []), *["xdata"] * (len(pieces) - 2 - masked)]
    hidden = stored_mask = (pieces[2] != 0) if masked else np.zeros((1,) * len(shape), bool)
    if rules.layouts.invalid is not None:
        hidden = hidden | rules.layouts.invalid.hits(pieces[0])
    not_finite = {}
    spoiled = np.zeros((1,) * len(shape), bool)
    for name, piece in zip(names, pieces, strict=True):
        if rules.check and name != "mask" and _may_spoil(piece):
            bad = ~np.isfinite(piece)
            count = int(np.count_nonzero(np.broadcast_to(bad & ~hidden, shape)))
            not_finite[name] = not_finite.get(name, 0) + count
            spoiled = spoiled | bad
    n_masked = int(np.count_nonzero(np.broadcast_to(hidden, shape)))
    n_omitted = int(np.count_nonzero(np.broadcast_to(spoiled & ~hidden, shape))) if rules.omit else 0
    if masked:
        pieces[2] = np.ascontiguousarray(np.broadcast_to(stored_mask | spoiled, shape)) if rules.hides else stored_mask
    not_positive = int(np.count_nonzero(np.broadcast_to((pieces[1] <= 0) & ~hidden, shape)))
    return Census(index, prod(shape), n_masked, not_finite, n_omitted, not_positive), pieces


def _native(piece):
    """What XLA can take: this machine's byte order (FITS and many detectors use the other one), at most 64 bits."""
    if piece.dtype.kind == "f" and piece.itemsize > 8:
        return piece.astype(np.float64)
    return piece if piece.dtype.isnative else piece.astype(piece.dtype.newbyteorder("="))


def _may_spoil(piece):
    if piece.dtype.kind != "f":
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return not np.isfinite(np.sum(piece))  # one pass and no temporary, right but for an overflow of the sum


def _sample(rules, shape, coordinates):
    n = prod(shape)
    places = np.unravel_index(np.unique(np.linspace(0, n - 1, SAMPLE_POINTS).astype(np.int64)), shape)
    sample = []
    for layout, piece in zip(rules.layouts.x, coordinates, strict=True):
        at = tuple(np.where(size == 1, 0, place) for size, place in zip(piece.shape, places, strict=True))
        sample.append(piece[at].astype(np.int64 if layout.integer else np.float64))
    return tuple(sample)


def _cuts(rules, n) -> tuple[list[tuple[int, int]], int]:
    """Begins and ends of the blocks of a run of ``n`` points, and the capacity of their buffers."""
    longest = rules.run * rules.capacities[0]
    if rules.whole:
        return [(0, n)], n
    if longest > BLOCK_POINTS and n > BLOCK_POINTS // 2:
        return [(lo, min(lo + BLOCK_POINTS, n)) for lo in range(0, n, BLOCK_POINTS)], BLOCK_POINTS + ALIGNMENT
    return [(0, n)], _size_class(n, min(longest, BLOCK_POINTS))


def _cut(rules, shape, pieces) -> tuple[tuple[Block, ...], tuple[np.ndarray, ...]]:
    """Blocks of at most `BLOCK_POINTS` consecutive points, which the shape of the chunk alone decides; and their buffers."""
    flat = [np.ravel(piece) for piece in pieces]
    layouts = rules.layouts.operands
    cuts, capacity = _cuts(rules, prod(shape))
    staged, copies = [], {}

    def copy(k, lo, hi, capacity):
        staged.append(aligned_copy(flat[k], lo, hi, capacity))
        return staged[-1]

    for k, layout in enumerate(layouts):
        if not layout.dense:
            copies[k] = copy(k, 0, len(flat[k]), max(rules.capacities[k], 1))
        elif rules.copied or len(cuts) == 1:
            copies[k] = copy(k, 0, len(flat[k]), cuts[-1][0] + capacity)

    def view(k, lo, hi):
        if k not in copies:
            return _view(flat[k], lo, hi, capacity) or (copy(k, lo, hi, capacity), 0)
        return (copies[k][lo : lo + capacity] if layouts[k].dense else copies[k]), 0

    strides = [_strides(piece.shape) for piece in pieces]
    blocks = []
    for lo, hi in cuts:
        views = [view(k, lo, hi) for k in range(len(layouts))]
        geometry = [hi - lo, lo]
        for (_, offset), stride in zip(views, strides, strict=True):
            geometry += [offset, *stride]
        buffers = tuple(buffer for buffer, _ in views)
        blocks.append(Block(np.array(geometry, np.int64), np.array(shape, np.float64), buffers))
    return tuple(blocks), tuple(staged)


def _size_class(n, longest):
    """Capacity for ``n`` points: few different ones, so that ragged ends along several axes compile one kernel or two."""
    capacity = 2 ** (longest - 1).bit_length() if longest <= 4096 else -(-longest // 4096) * 4096
    while n <= capacity // EMPTIEST:
        capacity //= EMPTIEST
    return max(capacity, 1)


def _view(flat, lo, hi, capacity):
    """``capacity`` elements that start on a cache line and hold [lo, hi), and the place of ``lo`` in them.

    A view of ``flat`` for a whole block with enough elements around it, else None: a tile that is longer than the block is
    read from the beginning of the block on.
    """
    per_line = ALIGNMENT // flat.itemsize
    misfit = (flat.ctypes.data % ALIGNMENT) // flat.itemsize  # elements past a cache line at flat[0]
    start = min(lo, len(flat) - capacity)
    start -= (start + misfit) % per_line
    fits = start >= 0 and start + capacity >= hi and hi - lo >= BLOCK_POINTS
    if not fits or flat.ctypes.data % flat.itemsize:
        return None
    return flat[start : start + capacity], lo - start


def aligned_copy(flat, lo, hi, capacity):
    """A copy of [lo, hi) in a buffer of the shared MemoryManager, continued with its last value as far as a tile reaches."""
    buffer = get_memory_manager().allocate_array(capacity, flat.dtype, zero=False)
    buffer[: hi - lo] = flat[lo:hi]
    buffer[hi - lo : longest_tile()] = flat[hi - 1]
    return buffer


def _strides(shape):
    """Elements between neighbours along each axis of a C-ordered array, 0 along axes of size 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step if size > 1 else 0)
        step *= size
    return strides[::-1]


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
