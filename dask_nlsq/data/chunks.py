"""A chunk that has been read becomes blocks for the kernels, and what is wrong with its values is counted."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from ..kernels.blocks import Block, Layouts
from ..kernels.kind import CPU, Kind
from ..memory.pool import ALIGNMENT, shared_pool
from .store import BadChunkError

EMPTIEST = 32  # buffers of short chunks may be filled to this fraction only; long chunks are cut, not padded
SAMPLE_POINTS = 8  # points on which a model is checked
LOOKED_AT = 1000  # values of y in each run, whether they are counts
LARGEST = 1e75  # of y in units of sigma: sums of fourth powers must be finite
MOST_INTEGER = np.iinfo(np.int64).max


class Fault(NamedTuple):
    """Values that are not as they must be: how many, and the first of them."""

    count: int  # type: ignore[assignment]  # hides a method of tuples, as the next
    index: tuple[int, ...]  # type: ignore[assignment]  # of the chunk of y
    value: float = 0.0


class Census(NamedTuple):
    """What one chunk holds, or many together; counts are of points that the mask does not leave out."""

    index: tuple[int, ...]  # type: ignore[assignment]  # () of many
    n_points: int
    n_masked: int
    n_omitted: int
    faults: dict[str, Fault]  # not finite: "xdata", "ydata", "sigma"; and "sigma <= 0", "ydata < 0", "too large", ...
    damage: tuple[BadChunkError, ...] = ()  # chunks of stores that were left out

    @property
    def n_used(self) -> int:
        return self.n_points - self.n_masked - self.n_omitted


def merge_censuses(censuses: Iterable[Census]) -> Census:
    """The census of many chunks; it does not depend on their order."""
    n_points, n_masked, n_omitted = 0, 0, 0
    faults: dict[str, Fault] = {}
    damage: set[BadChunkError] = set()  # a chunk that several chunks of y need counts once
    for census in censuses:
        n_points += census.n_points
        n_masked += census.n_masked
        n_omitted += census.n_omitted
        damage |= {*census.damage}
        for name, fault in census.faults.items():
            known = faults.get(name)
            first = fault if known is None or fault.index < known.index else known
            faults[name] = first._replace(count=fault.count + (known.count if known is not None else 0))
    return Census(
        (), n_points, n_masked, n_omitted, dict(sorted(faults.items())), tuple(sorted(damage, key=lambda err: err.args))
    )


class Chunk(NamedTuple):
    """One chunk of y, or a run of small ones, with all that belongs to it, ready for the kernels."""

    blocks: tuple[Block, ...]
    censuses: tuple[Census, ...]  # one for each chunk of y
    sample: tuple[np.ndarray, ...]  # the coordinates at a few points
    staged: tuple[np.ndarray, ...]  # buffers of the blocks that `release` gives back to the pool
    cuts: tuple[tuple[int, ...], ...]  # sizes along each axis of the chunks of y

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sum, self.cuts))


class ValuePolicy(NamedTuple):
    """Which values count."""

    check: bool  # count values that are not finite
    omit: bool = False  # leave points out where a value is not finite
    hides: bool = False  # points may be left out for their values, or since they cannot be read
    decode_cf: bool = True  # attributes of stored arrays have been applied, and are in x of predictions


class Preparation(NamedTuple):
    """How `prepare_chunk` is to treat every chunk of the data."""

    layouts: Layouts
    policy: ValuePolicy
    capacities: tuple[int, ...]  # per operand: elements of its largest piece, that of a run
    joins: tuple[int, ...]  # chunks along each axis that are joined to a run: 1 unless they are small
    own: tuple[tuple[bool, ...], ...]  # per operand and axis: it has values of its own along that
    whole: bool  # one block of exactly the chunk's length
    read_bytes: int  # of the largest run's pieces, as they are read; 0 where all are the user's own arrays
    dtypes: tuple[np.dtype, ...]  # of the operands
    kind: Kind = CPU  # of the devices that compute
    axes: tuple[int, ...] = (0,)  # that kernels tell apart: each of them with those up to the next

    @classmethod
    def of(cls, layouts: Layouts, whole: bool, decode_cf: bool) -> "Preparation":
        """Of any data with such coordinates, none of which are read."""
        return cls(layouts, ValuePolicy(check=False, decode_cf=decode_cf), (), (), (), whole, 0, ())

    @property
    def copied(self) -> bool:
        """What is read is copied, once and aligned; the user's own arrays are looked at where they lie."""
        return self.read_bytes > 0


def prepare_chunk(
    preparation: Preparation, indices: Sequence[tuple[int, ...]], pieces: Sequence[Sequence[np.ndarray]]
) -> Chunk:
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
        pool. `release` gives those back; a chunk that is dropped instead takes them along.
    """
    cuts, joined = _join(preparation, indices, pieces)
    censuses, cleaned, invalid = _inspect(preparation, indices, cuts, joined)
    shape = cleaned[0].shape
    first_x = 2 + (preparation.layouts.mask is not None)
    blocks, staged = _cut(preparation, shape, cleaned)
    if preparation.layouts.invalid is not None and not invalid:
        blocks = tuple(block._replace(clean=True) for block in blocks)
    return Chunk(blocks, tuple(censuses), _sample(preparation, shape, cleaned[first_x:]), staged, cuts)


def _join(preparation: Preparation, indices, pieces) -> tuple[tuple[tuple[int, ...], ...], list[np.ndarray]]:
    """The pieces of a run, whose chunks fill a box, as one of each operand; and the sizes of the chunks along each axis."""
    pieces = [[np.asarray(piece) for piece in each] for each in pieces]
    if preparation.policy.hides and len(pieces) > 1:  # a chunk that cannot be read has a mask of its own
        pieces = [[y, sigma, np.broadcast_to(mask, y.shape), *x] for y, sigma, mask, *x in pieces]
    box = [last - first + 1 for first, last in zip(indices[0], indices[-1], strict=True)]
    steps = [prod(box[k + 1 :]) for k in range(len(box))]
    cuts = tuple(
        tuple(pieces[i * step][0].shape[k] for i in range(n)) for k, (n, step) in enumerate(zip(box, steps, strict=True))
    )
    if len(pieces) == 1:
        return cuts, pieces[0]
    joined = []
    for own, of_operand in zip(preparation.own, zip(*pieces, strict=True), strict=True):
        parts = [*of_operand]
        for k, n in reversed([*enumerate(box)]):
            rows = [parts[i : i + n] for i in range(0, len(parts), n)]
            parts = [np.concatenate(row, axis=k) if own[k] and n > 1 else row[0] for row in rows]
        joined.append(parts[0])
    return cuts, joined


def count_each(flags: np.ndarray, cuts: tuple[tuple[int, ...], ...]) -> list[int]:
    """How many flags of a run are set in each of its chunks."""
    if prod(map(len, cuts)) <= 1:
        return [int(np.count_nonzero(flags))]
    for k, sizes in enumerate(cuts):
        flags = np.add.reduceat(flags, np.cumsum([0, *sizes[:-1]]), axis=k, dtype=np.int64)
    return flags.ravel().tolist()


def blank(preparation: Preparation, shape: tuple[int, ...], k: int) -> np.ndarray:
    """In the place of operand ``k`` of a chunk that cannot be read: a mask that hides all, and values that do no harm."""
    return (np.ones if k in (1, 2) else np.zeros)(shape, preparation.dtypes[k])


def release(chunk: Chunk) -> None:
    """Give back what `prepare_chunk` has taken; no block of the chunk may be used any longer."""
    for array in chunk.staged:
        shared_pool.take_back(array)


def _inspect(preparation, indices, cuts, pieces) -> tuple[list[Census], list[np.ndarray], bool]:
    """Censuses of the chunks of a run, its pieces in native byte order with the mask that the kernels use, and if values are
    invalid. What is wrong anywhere in the run is in the first one.
    """
    pieces = [native(np.asarray(piece)) for piece in pieces]
    layouts, policy, shape = preparation.layouts, preparation.policy, pieces[0].shape
    masked = layouts.mask is not None
    names = ["ydata", "sigma", *(["mask"] if masked else []), *["xdata"] * (len(pieces) - 2 - masked)]
    hidden = stored_mask = (pieces[2] != 0) if masked else np.zeros((1,) * len(shape), bool)
    invalid = layouts.invalid is not None and layouts.invalid.hits(pieces[0])
    if is_invalid := bool(np.any(invalid)):
        hidden = hidden | invalid
    faults: dict[str, Fault] = {}

    def first(counts):
        return next(index for index, n in zip(indices, counts, strict=True) if n)

    def note(name, flags):
        if any(counts := _count_chunks(flags, shape, cuts)):
            known = faults.get(name, Fault(0, first(counts)))
            faults[name] = Fault(sum(counts) + known.count, min(first(counts), known.index))

    spoiled = np.zeros((1,) * len(shape), bool)
    for name, piece in zip(names, pieces, strict=True):
        if policy.check and name != "mask" and _may_spoil(piece):
            bad = ~np.isfinite(piece)
            note(name, bad & ~hidden)
            spoiled = spoiled | bad
    n_masked, n_omitted = (_count_chunks(each, shape, cuts) for each in (hidden, spoiled & ~hidden & policy.omit))
    if masked:
        pieces[2] = np.ascontiguousarray(np.broadcast_to(stored_mask | spoiled, shape)) if policy.hides else stored_mask
    note("sigma <= 0", (pieces[1] <= 0) & ~hidden)
    if pieces[0].dtype.kind != "u" and not pieces[0].min() >= 0:  # nan hides what is less
        note("ydata < 0", (pieces[0] < 0) & ~hidden)
    if not may_be_counts(pieces[0], hidden, spoiled):
        faults["ydata not whole"] = Fault(1, indices[0])
    if policy.check and (found := _too_large(layouts.y, pieces[0], pieces[1], hidden)):
        value, place = found
        at = zip(cuts, np.unravel_index(place, shape), indices[0], strict=True)
        index = tuple(first + int(np.searchsorted(np.cumsum(sizes), k, side="right")) for sizes, k, first in at)
        faults["too large"] = Fault(1, index, value)
    for layout, piece in zip(layouts.x, pieces[2 + masked :], strict=True):
        if layout.integer:
            check_integers(piece, hidden, lambda flags: f"in block {first(_count_chunks(flags, shape, cuts))}")
    n_points = [prod(sizes) for sizes in product(*cuts)]
    numbers = zip(indices, n_points, n_masked, n_omitted, strict=True)
    return [Census(*each, {} if k else faults) for k, each in enumerate(numbers)], pieces, is_invalid


def _count_chunks(flags, shape, cuts) -> list[int]:
    """`_count` for each chunk of a run."""
    if prod(map(len, cuts)) == 1 or not np.any(flags):
        return [_count(flags, shape)] * prod(map(len, cuts))
    return count_each(np.broadcast_to(flags, shape), cuts)


def may_be_counts(y, *hidden) -> bool:
    """Whether y has whole numbers at some of its points, except where one of the arrays ``hidden`` is true."""
    if y.dtype.kind != "f":
        return True
    places = np.unravel_index(np.unique(np.linspace(0, y.size - 1, LOOKED_AT).astype(np.int64)), y.shape)
    left_out = np.logical_or.reduce([np.broadcast_to(each, y.shape)[places] for each in hidden])
    some = y[places][~left_out]
    return not np.any(np.isfinite(some) & (some != np.floor(some)))


def check_integers(coordinate, hidden, where: Callable[[np.ndarray], str]) -> None:
    """Refuse coordinates that int64, in which kernels take integers, does not hold, of points that are not ``hidden``."""
    if coordinate.dtype == np.uint64 and np.any(above := (coordinate > MOST_INTEGER) & ~hidden):
        value = np.broadcast_to(coordinate, above.shape)[above][0]
        raise ValueError(
            f"`xdata` has integers above 2^63 - 1, such as {value} {where(above)}, which int64 does not hold: subtract an "
            "offset"
        )


def _too_large(layout, y, sigma, hidden) -> tuple[float, int] | None:
    """The value of y that is largest in units of sigma, and its place, where that is too large to be squared."""
    large = 2.0**64  # at least what integers and short floats may be
    if y.dtype.kind == "f" and y.itemsize > 4:
        large = max(float(y.max()), -float(y.min()))
    elif y.dtype.kind == "f":
        large = float(np.finfo(y.dtype).max)
    large = large * abs(layout.scale) + abs(layout.offset)
    if large <= LARGEST * float(sigma.min()):  # false where one of them is nan
        return None
    with np.errstate(all="ignore"):
        y = layout.decoded(y)
        sizes = np.abs(y) / sigma
    sizes = np.where(np.isfinite(y) & (sigma > 0) & ~hidden, sizes, 0.0)
    k = int(np.argmax(sizes))
    return (float(np.broadcast_to(y, sizes.shape).flat[k]), k) if sizes.flat[k] > LARGEST else None


def _count(flags, shape):
    """Of ``flags`` that broadcast against ``shape``: each one stands for as many points as any other."""
    return int(np.count_nonzero(flags)) * (prod(shape) // flags.size)


def native(piece):
    """What XLA can take: this machine's byte order (FITS and many detectors use the other one), at most 64 bits."""
    if piece.dtype.kind == "f" and piece.itemsize > 8:
        return piece.astype(np.float64)
    return piece if piece.dtype.isnative else piece.astype(piece.dtype.newbyteorder("="))


def _may_spoil(piece):
    if piece.dtype.kind != "f":
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return not np.isfinite(np.sum(piece))  # one pass and no temporary, right except for an overflow of the sum


def _sample(preparation, shape, coordinates):
    n = prod(shape)
    places = np.unravel_index(np.unique(np.linspace(0, n - 1, SAMPLE_POINTS).astype(np.int64)), shape)
    sample = []
    for layout, piece in zip(preparation.layouts.x, coordinates, strict=True):
        at = tuple(np.where(size == 1, 0, place) for size, place in zip(piece.shape, places, strict=True))
        sample.append(piece[at].astype(np.int64 if layout.integer else np.float64))
    return tuple(sample)


def block_cuts(preparation, n) -> tuple[list[tuple[int, int]], int]:
    """Begins and ends of the blocks of a run of ``n`` points, and the capacity of their buffers."""
    longest, most = preparation.capacities[0], preparation.kind.block_points
    if preparation.whole:
        return [(0, n)], n
    if longest > most and n > most // 2:
        return [(lo, min(lo + most, n)) for lo in range(0, n, most)], most + ALIGNMENT
    return [(0, n)], _size_class(n, min(longest, most))


def _cut(preparation, shape, pieces) -> tuple[tuple[Block, ...], tuple[np.ndarray, ...]]:
    """Blocks of at most `Kind.block_points` consecutive points, by the shape of the chunk alone; and their buffers."""
    flat = [np.ravel(piece) for piece in pieces]
    layouts = preparation.layouts.operands
    cuts, capacity = block_cuts(preparation, prod(shape))
    staged, copies = [], {}

    def copy(k, lo, hi, capacity):
        staged.append(aligned_copy(flat[k], lo, hi, capacity, preparation.kind))
        return staged[-1]

    for k, layout in enumerate(layouts):
        if not layout.dense:
            copies[k] = copy(k, 0, len(flat[k]), max(preparation.capacities[k], 1))
        elif preparation.copied or len(cuts) == 1:
            copies[k] = copy(k, 0, len(flat[k]), cuts[-1][0] + capacity)

    def view(k, lo, hi):
        if k not in copies:
            return _view(flat[k], lo, hi, capacity, preparation.kind) or (copy(k, lo, hi, capacity), 0)
        return (copies[k][lo : lo + capacity] if layouts[k].dense else copies[k]), 0

    strides = [_strides(np.multiply.reduceat(piece.shape, preparation.axes)) for piece in pieces]
    sizes = np.multiply.reduceat(shape, preparation.axes).astype(np.float64)
    blocks = []
    for lo, hi in cuts:
        views = [view(k, lo, hi) for k in range(len(layouts))]
        geometry = [hi - lo, lo]
        for (_, offset), stride in zip(views, strides, strict=True):
            geometry += [offset, *stride]
        buffers = tuple(buffer for buffer, _ in views)
        blocks.append(Block(np.array(geometry, np.int64), sizes, buffers))
    return tuple(blocks), tuple(staged)


def _size_class(n, longest):
    """Capacity for ``n`` points: few different ones, so that ragged ends along several axes compile one kernel or two."""
    capacity = 2 ** (longest - 1).bit_length() if longest <= 4096 else -(-longest // 4096) * 4096
    while n <= capacity // EMPTIEST:
        capacity //= EMPTIEST
    return max(capacity, 1)


def _view(flat, lo, hi, capacity, kind):
    """``capacity`` elements that start on a cache line and hold [lo, hi), and the place of ``lo`` in them.

    A view of ``flat`` for a whole block with enough elements around it, else None: a tile that is longer than the block is
    read from the beginning of the block on.
    """
    per_line = ALIGNMENT // flat.itemsize
    misfit = (flat.ctypes.data % ALIGNMENT) // flat.itemsize  # elements past a cache line at flat[0]
    start = min(lo, len(flat) - capacity)
    start -= (start + misfit) % per_line
    fits = start >= 0 and start + capacity >= hi and hi - lo >= kind.block_points
    if not fits or flat.ctypes.data % flat.itemsize:
        return None
    return flat[start : start + capacity], lo - start


def aligned_copy(flat, lo, hi, capacity, kind):
    """A copy of [lo, hi) in a buffer of the shared pool, continued with its last value as far as a tile reaches."""
    buffer = shared_pool.lend(capacity, flat.dtype, zero=False)
    buffer[: hi - lo] = flat[lo:hi]
    buffer[hi - lo : kind.longest_tile] = flat[hi - 1]
    return buffer


def _strides(shape):
    """Elements between neighbours along each axis of a C-ordered array, 0 along axes of size 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step if size > 1 else 0)
        step *= size
    return strides[::-1]
