"""User arrays of any kind become a `Data` of aligned chunks.

Everything about shapes, dtypes and chunks is checked here, from metadata alone. y's chunks rule: dense operands (x,
sigma, mask of y's shape) are rechunked to them; operands that only broadcast against y (an axis vector, one mask for
all frames, a scalar) stay small and are cut along the axes that they have. What is wrong with *values* (NaN, infinity,
sigma <= 0) can only be seen when a chunk has been read: see `dask_nlsq.data.chunks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from ..base.lazy import da
from ..kernels.blocks import Invalid, Layout, Layouts
from .arrays import apart, as_array, join_masks, made_bytes, parted
from .cf import AS_STORED, Decoding
from .chunks import Preparation, ValuePolicy, native
from .joining import joins_of, parts_of, runs_of, source_name
from .labels import NAMELESS, Names
from .ranges import Ranges, of_each, parted_within

MOST_SHARED = 2**24  # points of a spectrum, up to which coordinates that all pixels share are held
SENT_BYTES = 2**25  # of y, up to which an array in memory goes to a worker in one piece


@dataclass(frozen=True)
class Data:
    """Aligned operands of a fit. ``operands`` are NumPy or Dask arrays in the order of `Layouts`, ndim as y's."""

    operands: tuple[Any, ...]
    chunks: tuple[tuple[int, ...], ...]
    preparation: Preparation
    covariance: Any = None  # (M, M) of the M values of y, NumPy's or Dask's, until `whitened` has read it
    factor: np.ndarray | None = None  # (M, M), its Cholesky factor
    n_dropped: int = 0  # points that were left out beforehand, with a covariance matrix
    decoded: tuple[str, ...] = ()  # what attributes of stored arrays have made of their values, a line each
    scaled: str = ""  # by what, where y is not as it is stored
    names: Names = NAMELESS

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

    @cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the runs of chunks, like ``chunks``."""
        return runs_of(self.chunks, self.preparation.joins)

    @property
    def n_runs(self) -> int:
        return prod(len(sizes) for sizes in self.runs)

    @property
    def run_points(self) -> int:
        """Points of the longest run."""
        return self.preparation.capacities[0]

    def numbers(self) -> list[int]:
        """The number of the run of each chunk, in C order."""
        found = np.zeros((), np.int64)
        for sizes, runs, n in zip(self.chunks, self.runs, self.preparation.joins, strict=True):
            found = found[..., None] * len(runs) + np.arange(len(sizes)) // n
        return found.ravel().tolist()

    def indices(self) -> list[tuple[int, ...]]:
        """Indices of the chunks in C order."""
        return list(product(*(range(len(sizes)) for sizes in self.chunks)))

    def chunk_shape(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[i] for sizes, i in zip(self.chunks, index, strict=True))

    def places(self, index: tuple[int, ...]) -> list:
        """Where a chunk's piece of each operand is: an array in memory, or of a Dask array a `Part` of a store, or a key."""
        return [cut(index) for cut in self._cuts]

    def pieces(self, index: tuple[int, ...]) -> list:
        """A chunk's piece of each operand: a NumPy array, or a Delayed one where the operand is a Dask array."""
        return [
            cut(index) if blocks is None else blocks[_at(operand, index)]
            for operand, cut, blocks in zip(self.operands, self._cuts, self._delayed, strict=True)
        ]

    @cached_property
    def _cuts(self):
        starts = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in self.chunks]

        def cutter(operand):
            narrow = [size == 1 for size in operand.shape]
            if isinstance(operand, da.Array):
                part = self._part(operand) or (lambda index: (operand.name, *index))
                return lambda index: part(_at(operand, index))
            return lambda index: operand[
                tuple(
                    slice(None) if one else slice(start[i], start[i + 1])
                    for one, start, i in zip(narrow, starts, index, strict=True)
                )
            ]

        return [cutter(operand) for operand in self.operands]

    def _part(self, operand) -> Callable[[tuple[int, ...]], Any] | None:
        """`parts_of` an operand; None of one whose chunks several chunks of y need, or the graph of another operand."""
        found, name = parts_of(operand), source_name(operand)
        if found is None or isinstance(found((0,) * operand.ndim), np.ndarray):
            return found
        others = (each for each in self.operands if isinstance(each, da.Array) and each is not operand)
        alone = operand.numblocks == tuple(map(len, self.chunks)) and not any(name in each.dask.layers for each in others)
        return found if alone else None

    @cached_property
    def _delayed(self):
        return [operand.to_delayed() if isinstance(operand, da.Array) else None for operand in self.operands]


def _at(operand, index: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an operand's chunk: 0 along axes that it does not have."""
    return tuple(0 if size == 1 else i for size, i in zip(operand.shape, index, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# at the door


def build_data(
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
    sentinels=((), None),
    xrange: Ranges | None = None,
    decoding: Decoding = AS_STORED,
    decoded: tuple[str, ...] = (),
    scaled: str = "",
    decode_cf: bool = True,
) -> Data:
    """Check shapes and dtypes and align the operands, without reading data.

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
    xrange : dict, optional
        Fit ranges by place of a coordinate; points outside are left out.
    decoding : Decoding
        What the stored values of y mean.
    decoded, scaled, decode_cf
        What `Data` and `Preparation` are to say of it.

    Raises
    ------
    ValueError
        Shapes that do not fit together, empty data, unknown chunk sizes.
    TypeError
        Data that are not real numbers.
    """
    y, hidden = apart("ydata", ydata)
    x_kind, x_lead, coordinates = _coordinates(xdata, y.shape)
    parts = [parted_within(c, each) for c, each in zip(coordinates, of_each(xrange, len(coordinates)), strict=True)]
    coordinates = [c for c, _ in parts]
    if y.size == 1 and coordinates and x_kind != "tuple":  # SciPy broadcasts a single y
        y = np.broadcast_to(np.asarray(y), coordinates[0].shape)
    if y.size == 0:
        raise ValueError("`ydata` must not be empty!")
    if y.ndim == 0:
        y = y.reshape(1)
    sigma, hidden_sigma = apart("sigma", np.ones(1) if sigma is None else sigma)
    operands = [y, _broadcastable("sigma", sigma, y.shape)]
    masks = [("ydata", hidden), ("sigma", hidden_sigma), *(("xdata", each) for _, each in parts)]
    if mask is not None:
        masks += [("mask", each) for each in apart("mask", mask)]
    masks = [_broadcastable(name, each, y.shape) for name, each in masks if each is not None]
    mask = masks[0] if len(masks) == 1 else join_masks(each != 0 for each in masks)
    if mask is not None:
        operands.append(mask)
    elif omit or hides:
        operands.append(np.zeros((1,) * y.ndim, bool))
    operands += [_broadcastable("xdata", c, y.shape) for c in coordinates]
    chunks = next((a.chunks for a in operands if isinstance(a, da.Array) and a.shape == y.shape), None)
    if chunks is None or whole:
        sizes = "auto" if split and not whole else y.shape
        chunks = da.core.normalize_chunks(sizes, y.shape, limit=SENT_BYTES, dtype=y.dtype)
    lazy = any(isinstance(operand, da.Array) for operand in operands)
    aligned = tuple(_aligned(operand, chunks, lazy) for operand in operands)

    def layout(operand, coordinate=False):
        return Layout(operand.shape == y.shape, coordinate and _indexes(x_kind, operand))

    axes = _merged_axes(y.shape, [each.shape for each in aligned if each.size > 1 and each.shape != y.shape])
    masked = mask is not None or omit or hides
    layouts = Layouts(
        y=Layout(True, scale=decoding.scale, offset=decoding.offset),
        sigma=layout(aligned[1]),
        # points that are left out for their values need a mask of their own
        mask=(Layout(True) if omit or hides else layout(aligned[2])) if masked else None,
        x=tuple(layout(operand, coordinate=True) for operand in aligned[2 + masked :]),
        x_kind=x_kind,
        x_lead=x_lead,
        ndim=len(axes),
        invalid=invalid_values(sentinels[0], sentinels[1], y.dtype, decoding),
    )
    joins = joins_of(chunks)
    largest = [max(sizes) for sizes in runs_of(chunks, joins)]
    capacities = tuple(
        prod(largest) if each.dense else prod(big for big, size in zip(largest, operand.shape, strict=True) if size > 1)
        for each, operand in zip(layouts.operands, aligned, strict=True)
    )
    own = tuple(
        tuple(each.dense or n > 1 for n in operand.shape) for each, operand in zip(layouts.operands, aligned, strict=True)
    )
    sizes = zip(aligned, capacities, strict=True)
    read_bytes = sum(capacity * operand.itemsize for operand, capacity in sizes if isinstance(operand, da.Array) or split)
    read_bytes = max(read_bytes, made_bytes(aligned) * capacities[0])
    dtypes = tuple(operand.dtype for operand in aligned)
    policy = ValuePolicy(check, omit, omit or hides, decode_cf)
    preparation = Preparation(layouts, policy, capacities, joins, own, whole, read_bytes, dtypes, axes=axes)
    return Data(aligned, chunks, preparation, decoded=decoded, scaled=scaled)


def _merged_axes(shape, others) -> tuple[int, ...]:
    """The first of the axes that can be one, since the arrays with ``others`` as shapes have both or neither."""
    firsts, before = [0], None
    for k in np.flatnonzero(np.array(shape) > 1):
        along = [each[k] > 1 for each in others]
        if before is not None and along != before:
            firsts.append(int(k))
        before = along
    return tuple(firsts)


def invalid_values(mask_values, valid_range, dtype, decoding: Decoding = AS_STORED) -> Invalid | None:
    """The invalid values of y for this ``dtype``: stored values, except for ``valid_range``."""
    try:
        values = [value.item() if hasattr(value, "item") else value for value in mask_values]
        if values == ["largest"]:
            values = [np.iinfo(dtype).max] if dtype.kind == "u" and dtype.itemsize > 1 else []
        ends: Any = (None, None) if valid_range is None else valid_range
        low, high = (each.item() if hasattr(each, "item") else each for each in ends)
        if not all(isinstance(each, Real) for each in (*values, low or 0, high or 0)):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            "`mask_values` must be a sequence of numbers and `valid_range` a pair (low, high), None for no limit, not "
            f"{mask_values!r} and {valid_range!r}"
        ) from None
    low, high = decoding.stored_limits(low, high, dtype)
    values = [*dict.fromkeys((*values, *decoding.missing))]
    lows, highs = ([each for each in ends if each is not None] for ends in ((low, decoding.low), (high, decoding.high)))
    low, high = max(lows, default=None), min(highs, default=None)
    found = Invalid(tuple(values), low, high)
    found = found.of(dtype) if dtype.kind in "biuf" else found
    return found if found != ((), None, None) else None


def _indexes(x_kind, coordinate) -> bool:
    """Whether the model gets a coordinate as integers, which may index a table."""
    return x_kind == "tuple" and coordinate.dtype.kind in "iu"


def _coordinates(xdata, shape) -> tuple[Any, tuple[int, ...], list]:
    """How the model takes x, the leading axes of a stacked x, and x as a list of arrays, masked where they were given so.

    Without the shape of y one array is not taken for a stack of several.
    """
    if xdata is None:
        return "none", (), []
    if isinstance(xdata, tuple) and not all(np.isscalar(c) for c in xdata):
        return "tuple", (), [as_array(f"xdata[{k}]", c) for k, c in enumerate(xdata)]
    x = as_array("xdata", xdata)
    if shape is None:
        return "single", (), [x]
    lead = x.shape[: x.ndim - len(shape)]
    if lead and shape and x.shape[len(lead) :] == shape:
        return "stacked", lead, [x[index] for index in np.ndindex(lead)]
    if x.size == 0 and prod(shape):
        raise ValueError("`xdata` must not be empty!")
    return "single", (), [x]


class Coordinates(NamedTuple):
    """How the model takes x, and x as arrays: over the fit axes of a map, or with y's axes where pixels differ in it."""

    kind: Literal["single", "stacked", "tuple", "none"]
    lead: tuple[int, ...]
    arrays: list
    hidden: list  # what masks of x leave out, with y's axes

    @classmethod
    def of(cls, xdata, shape, fit_axes, xrange: Ranges | None = None) -> "Coordinates":
        fit_shape = tuple(shape[k] for k in fit_axes)
        fitted = tuple(n if k in fit_axes else 1 for k, n in enumerate(shape))

        def own(c):
            return c.ndim == len(shape) > len(fit_shape)

        kind, lead, given = _coordinates(xdata, None)
        if not any(map(own, given)):
            kind, lead, given = _coordinates(tuple(given) if kind == "tuple" else given[0] if given else None, fit_shape)
        arrays, hidden = [], []
        for c, intervals in zip(given, of_each(xrange, len(given)), strict=True):
            if own(c):
                parts = parted_within(c, intervals)
                c, mask = (each if each is None else _broadcastable("xdata", each, shape) for each in parts)
            else:
                lazy = isinstance(c, da.Array) and c.size > MOST_SHARED
                c = c.compute() if isinstance(c, da.Array) and not lazy else c
                parts = parted_within(c, intervals)
                c, mask = (each if each is None else _broadcastable("xdata", each, fit_shape) for each in parts)
                c = da.broadcast_to(c, fit_shape).reshape(fitted) if lazy else np.broadcast_to(np.asarray(c), fit_shape)
                mask = mask if mask is None else np.broadcast_to(mask, fit_shape).reshape(fitted)
            arrays.append(c)
            hidden += [] if mask is None else [mask]
        return cls(kind, lead, arrays, hidden)

    def shared(self, fit_axes) -> tuple[np.ndarray | None, ...]:
        """(n,) each; None for one that pixels differ in."""
        return tuple(native(np.array(c).ravel()) if c.ndim == len(fit_axes) else None for c in self.arrays)

    def integer(self, k: int) -> bool:
        return _indexes(self.kind, self.arrays[k])


def _broadcastable(name, array, shape):
    """``array`` with as many axes as y, each of y's size or 1."""
    fits = array.ndim <= len(shape) and all(a in (1, s) for a, s in zip(array.shape[::-1], shape[::-1], strict=False))
    if array.size == 1:
        return array.reshape((1,) * len(shape))
    if not fits:
        way_out = {
            "sigma": f"a scalar, an array that broadcasts against ydata, or a covariance matrix {(prod(shape),) * 2}",
            "mask": "an array that broadcasts against ydata",
            "xdata": _ways_of_x(array.shape, shape),
        }[name]
        extra = "; `sigma` has incorrect shape." if name == "sigma" else ""
        raise ValueError(f"`{name}` of shape {array.shape} does not fit `ydata` of shape {shape}: give {way_out}{extra}")
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def _ways_of_x(given, shape) -> str:
    """What xdata may be for data of this shape."""
    if prod(given) == prod(shape):
        return "both the same shape, as with ydata.ravel()" if len(given) == 1 else "both the same shape"
    if len(shape) == 1:
        return f"an array of shape {shape}, or a tuple of several, one for each coordinate"
    along = [k for k, n in enumerate(shape[:-1]) if given == (n,)]
    index = ", ".join([":", *["None"] * (len(shape) - 1 - along[0])]) if along else ""
    one = f"x[{index}] for values along axis {along[0]}, " if along else ""
    return (
        f"{one}an array of shape {shape[-1:]} for values along the last axis, one of shape {shape}, or for several "
        "coordinates a tuple of arrays that broadcast against ydata"
    )


def _aligned(operand, chunks, lazy):
    if isinstance(operand, da.Array):
        return operand.rechunk(tuple((1,) if size == 1 else c for size, c in zip(operand.shape, chunks, strict=True)))
    dense = operand.size > 1 and operand.shape == tuple(sum(sizes) for sizes in chunks)
    if dense and lazy and any(len(sizes) > 1 for sizes in chunks):
        return da.from_array(operand, chunks=chunks, name=False)
    return operand


def whitened(data: Data) -> Data:
    """Data with correlated noise; reads ``data.covariance``: ``L L^T`` by Cholesky.

    Its residual is ``L^-1 (f(x) - y)``, which needs all points at once; points left out are dropped beforehand, as SciPy
    does, so that the model sees those only that count.

    Raises
    ------
    ValueError
        Where the covariance matrix is masked, or not finite, symmetric and positive definite.
    """
    covariance, hidden = parted(data.covariance)
    if hidden is not None and np.any(hidden):
        raise ValueError("`sigma` is a covariance matrix with masked elements: leave points out with mask=, and fill them")
    covariance = np.asarray(covariance, dtype=np.float64)
    layouts, policy, dropped, names = data.preparation.layouts, data.preparation.policy, 0, data.names
    if layouts.mask is not None or layouts.invalid is not None or layouts.y != Layout(True):
        pieces = data.pieces((0,) * len(data.shape))
        pieces = [np.asarray(piece.compute() if hasattr(piece, "compute") else piece) for piece in pieces]
        hidden = np.zeros(data.shape, bool)
        if layouts.mask is not None:
            hidden |= pieces.pop(2) != 0
        if layouts.invalid is not None:
            hidden |= layouts.invalid.hits(pieces[0])
        coordinates = [np.broadcast_to(piece, data.shape) for piece in pieces[2:]]
        if policy.omit:
            for each in (pieces[0], *coordinates):
                hidden |= ~np.isfinite(each)
        keep = ~hidden.ravel()
        flat = [coordinate.ravel()[keep] for coordinate in coordinates]
        x = {
            "none": lambda: None,
            "single": lambda: flat[0],
            "stacked": lambda: np.stack(flat).reshape(*layouts.x_lead, -1),
            "tuple": lambda: tuple(flat),
        }[layouts.x_kind]()
        if not keep.any():
            raise ValueError(f"no data: all {keep.size} points are masked or omitted (mask: true leaves a point out)")
        dropped = int(keep.size - np.count_nonzero(keep))
        covariance = covariance[np.ix_(keep, keep)]
        y = layouts.y.decoded(pieces[0].ravel()[keep])
        data = build_data(
            x, y, check=policy.check, omit=False, whole=True, decoded=data.decoded, scaled=data.scaled,
            decode_cf=policy.decode_cf,
        )  # fmt: skip
    symmetric = np.abs(covariance - covariance.T).max(initial=0) <= 1e-10 * np.abs(covariance).max(initial=0)
    if not np.isfinite(covariance).all() or not symmetric:
        raise ValueError("`sigma` of shape (M, M) must be a finite, symmetric covariance matrix")
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as err:
        raise ValueError("`sigma` must be positive definite.") from err
    return replace(data, covariance=None, factor=factor, n_dropped=dropped, names=names)
