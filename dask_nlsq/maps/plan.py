"""Blocks and bands of a map, and the memory that they take: decided from metadata."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf, prod
from typing import Any, NamedTuple

from ..base.lazy import da
from ..base.text import html_text, near, several, size, table
from ..base.values import is_integer
from ..data.arrays import made_bytes
from ..kernels.kind import CPU, Kind
from ..memory.device import kind_of_all
from ..memory.machine import active_client
from ..memory.needs import JOINING, LANE_BYTES, RESULT_COPIES, Sizes, needs
from ..memory.plan import JoiningError, MemoryBudgetError, least_limit
from ..memory.processes import Room, room_here, rooms_of_workers

BLOCK_VALUES = 2**22  # of y in one task: a few hundred milliseconds
FEWEST_VALUES = 2**16  # of y in a task, up to which chunks are joined: a millisecond of work, as much as a task costs
MANY_BLOCKS = 256  # whose tasks cost a few tenths of a second by themselves
AT_ONCE = ("standard", "chunked")  # strategies that read all of the data at once


@dataclass(frozen=True)
class MapPlan:
    """How a map will be fitted. Sizes in bytes.

    Attributes
    ----------
    n_pixels, n_points, n_params, n_blocks : int
        Pixels of the map, points of each, parameters, tasks.
    n_bands : int
        Parts of the map that are fitted one after the other; each reads all chunks of the data that it touches.
    read_bytes : int
        That will be read: the data as they are stored, times the bands where chunks along the fit axes are joined.
    peak_bytes : int
        Predicted peak of this process, or of the fullest worker of the active Client.
    reason : str
    decoded : tuple of str
        Attributes of stored arrays that are applied to their values, a line for each array.
    kind : Kind
        Of the devices that will fit the pixels.
    """

    n_pixels: int
    n_points: int
    n_params: int
    n_blocks: int
    n_bands: int
    read_bytes: int
    peak_bytes: int
    reason: str
    decoded: tuple[str, ...] = ()
    kind: Kind = CPU

    def explain(self) -> None:
        """Print the plan, which is also ``str(plan)``."""
        print(self)

    def rows(self, before: str = "") -> list[tuple[str, str]]:
        """Names, with ``before`` in front, and what there is to say of each."""
        points = several(self.n_points, "point")
        rows = [
            ("map", f"{several(self.n_pixels, 'pixel')} of {points}; {several(self.n_params, 'parameter')}"),
            ("blocks", f"{self.n_blocks:,} in {several(self.n_bands, 'band')}: {self.reason}"),
            ("reads", size(self.read_bytes)),
            *(("decoded", each) for each in self.decoded),
            ("memory", f"{size(self.peak_bytes)} at the peak"),
        ]
        return [(before + name, text) for name, text in rows]

    def __str__(self):
        return "\n".join(table(self.rows()))

    def _repr_html_(self):
        return html_text(str(self))


class AllBut(NamedTuple):
    """The fit axes, given by all other axes."""

    axes: Any
    name: str  # of the argument


def axes_of(axis, dims, ndim, name: str = "axis", ordered: bool = True) -> tuple[int, ...]:
    """Places of the fit axes of a map, in the order of y's, which those that are given must be in, if ``ordered``."""
    if isinstance(axis, AllBut):
        others = axes_of(axis.axes, dims, ndim, axis.name, ordered=False)
        if len(others) == ndim:
            raise ValueError(
                f"`{axis.name}` names all axes of `ydata`, and leaves none along which there is something to fit"
            )
        return tuple(k for k in range(ndim) if k not in others)
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    found, numbers = [], f"numbers from 0 to {ndim - 1}" if ndim > 1 else "0, its only one"
    for each in given:
        if isinstance(each, str):
            if dims is None or each not in dims:
                have = f"it has {dims}{near(each, dims, '; ')}" if dims else f"its dimensions have no names, give {numbers}"
                raise ValueError(f"`{name}` {each!r} is not a dimension of `ydata`: {have}")
            each = dims.index(each)
        if not is_integer(each) or not -ndim <= each < ndim:
            raise ValueError(f"`{name}` must name axes of `ydata`, by {numbers}: not {axis!r}")
        found.append(int(each) % ndim)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`{name}` must name one or several different axes, not {axis!r}")
    if not ordered:
        return tuple(sorted(found))
    if found != sorted(found):
        in_order = tuple(each if isinstance(each, str) else k for k, each in sorted(zip(found, given, strict=True)))
        raise ValueError(
            f"`{name}` must be in the order of the axes of `ydata`, and `xdata` with it: {in_order}, not {axis!r}"
        )
    return tuple(found)


def capacity(blocks, n, kind: Kind):
    """Pixels, of ``n`` points, of the largest block; if it is small a power of 4, which other maps may have compiled for."""
    most = prod(max(sizes) for sizes in blocks)
    few = 4 ** max(3, (most - 1).bit_length() + 1 >> 1)
    return few if few * n <= kind.lane_points else most


class _Map(NamedTuple):
    """A map that is to be cut into blocks."""

    sizes: Sizes
    chunks: list[tuple[int, ...]]  # of y along the map axes
    joined: int  # bytes of the arrays whose chunks are joined along the fit axes
    n: int  # points of a pixel
    kind: Kind
    most: int  # values of y in a block


class _Cut(NamedTuple):
    """How a map is cut, and what each process takes: bytes of its blocks, and of the chunks that are joined at once."""

    most: int  # pixels of a block
    blocks: list[tuple[int, ...]]
    working: list[float]
    joining: list[float]
    n_bands: float
    fits: bool


def _cut(job: _Map, strategy: str, rooms: Sequence[Room]) -> _Cut:
    most = _most_pixels(job.sizes, rooms, job.most, job.n, job.kind)
    blocks = _split(_join(job.chunks, min(most, FEWEST_VALUES // job.n)), most)
    working = _needed(job.sizes, rooms, blocks, job.n)
    joining = [JOINING * job.joined * share for share in _shares(rooms)]
    if not job.joined:
        fits = all(each <= room.nbytes for each, room in zip(working, rooms, strict=True))
        return _Cut(most, blocks, working, joining, 1, fits)
    left = [room.nbytes - each for room, each in zip(rooms, working, strict=True)]
    n_bands = max(ceil(each / spare) if spare > 0 else inf for each, spare in zip(joining, left, strict=True))
    most_bands = 1 if strategy in AT_ONCE else sum(job.chunks[0]) if job.chunks else 1
    return _Cut(most, blocks, working, joining, n_bands, n_bands <= most_bands)


def _ways_out(job: _Map, strategy: str, rooms: Sequence[Room]) -> Iterator[str]:
    """What to change, of which each passes the check that a map does not pass."""
    limit = least_limit(rooms, lambda rooms: _cut(job, strategy, rooms).fits)
    if limit is not None:
        yield f"raise memory_limit_gb to {limit}"
    if job.joined and strategy in AT_ONCE and _cut(job, "auto", rooms).fits:
        yield 'use strategy="auto", which reads the data several times'
    rechunked = job._replace(joined=0, sizes=job.sizes._replace(longest=(1,)))
    if rechunked != job and _cut(rechunked, strategy, rooms).fits:
        if job.joined:
            yield "rechunk the data on disk into chunks that the fit axes do not cut"
        else:
            yield "rechunk the map axes into smaller chunks"


def plan_blocks(arrays, fit_axes, n_params: int, record_bytes: int, call):
    """Bands, blocks along the map axes, and the plan; ``arrays`` are y and what comes along with it in its shape."""
    y, client, limit, strategy = arrays[0], active_client(), call.memory_limit_gb, call.strategy
    map_axes = [k for k in range(y.ndim) if k not in fit_axes]
    n, lazy = prod(y.shape[k] for k in fit_axes), isinstance(y, da.Array)
    chunks = [y.chunks[k] if lazy else (y.shape[k],) for k in map_axes]
    in_pieces = getattr(call, "in_pieces", False)
    joined = 0 if in_pieces else sum(each.nbytes for each in arrays if _is_cut(each, fit_axes))
    longest = prod(y.chunksize[k] for k in fit_axes) if in_pieces else n
    rooms = (rooms_of_workers(client, limit) if client else []) or [room_here(limit)]
    sizes = map_sizes(arrays, n, n_params, record_bytes)
    kind = kind_of_all(room.device for room in rooms)
    most = max(BLOCK_VALUES if lazy else 0, kind.split_values)
    job = _Map(sizes, chunks, joined, longest, kind, most)
    cut = _cut(job, strategy, rooms)
    blocks, working, may_take = cut.blocks, cut.working, size(sum(room.nbytes for room in rooms))
    rows = y.shape[map_axes[0]] if map_axes else 1
    bands: tuple[slice, ...] = (slice(0, rows),)
    reason = "as the data are chunked" + (", which cuts the groups" if in_pieces else " along the map")
    if joined:
        if not cut.fits:
            raise JoiningError(
                f"joining the chunks of `ydata` along the fit axes takes {size(sum(cut.joining))} at once, beside "
                f"{size(sum(working))} for the blocks; there are {may_take}",
                *_ways_out(job, strategy, rooms),
            )
        reason = f"chunks along the fit axes are joined, which takes {size(sum(cut.joining) / cut.n_bands)} of {may_take}"
        height = rows // int(cut.n_bands)
        bands = tuple(slice(a, min(a + height, rows)) for a in range(0, rows, height))
        if cut.n_bands > 1:
            chunks[0] = tuple(band.stop - band.start for band in bands)
            blocks = _split(chunks, cut.most)
        working = _needed(sizes._replace(held=sizes.held + JOINING * joined / len(bands)), rooms, blocks, n)
    elif not cut.fits and (lazy or limit is not None):
        largest = prod(max(sizes) for sizes in blocks) * longest
        raise MemoryBudgetError(
            f"{several(sum(room.n_threads for room in rooms), 'thread')} with blocks of {size(largest * y.itemsize)} take "
            f"{size(sum(working))}; there are {may_take}",
            *_ways_out(job, strategy, rooms),
        )
    plan = MapPlan(
        n_pixels=y.size // n,
        n_points=n,
        n_params=n_params,
        n_blocks=prod(map(len, blocks)),
        n_bands=len(bands),
        read_bytes=y.nbytes * len(bands),
        peak_bytes=int(max(room.base + each for room, each in zip(rooms, working, strict=True))),
        reason=reason,
        kind=kind,
    )
    return bands, tuple(map(tuple, blocks)), plan


def map_sizes(arrays, n: int, n_params: int, record_bytes: int) -> Sizes:
    """Sizes of a map of spectra of ``n`` points, with chunks of y as blocks."""
    return Sizes(
        n_points=arrays[0].size,
        n_params=n_params,
        n_operands=len(arrays),
        n_chunks=sum(each.npartitions for each in arrays if isinstance(each, da.Array)),
        n_runs=1,
        longest=(int(prod(arrays[0].chunksize)) if isinstance(arrays[0], da.Array) else 1,),
        nbytes=arrays[0].nbytes,
        read=max(sum(each.itemsize for each in arrays), made_bytes(arrays)),
        held=RESULT_COPIES * record_bytes * arrays[0].size // n,
        lanes=LANE_BYTES * (1 + len(arrays) + n_params * (n_params + 4) / n),
    )


def _is_cut(array, fit_axes) -> bool:
    return isinstance(array, da.Array) and any(array.numblocks[k] > 1 for k in fit_axes)


def _shares(rooms: Sequence[Room]) -> list[float]:
    """Of the work of each process."""
    return [room.n_threads / sum(each.n_threads for each in rooms) for room in rooms]


def _most_pixels(sizes: Sizes, rooms: Sequence[Room], most: int, n: int, kind: Kind) -> int:
    """Pixels of a block, so that those of all threads take half of the memory: the other half is for chunks to be joined."""
    wanted = needs(sizes._replace(longest=(most,)))
    spare = min((room.nbytes - wanted.start) / (2 * room.n_threads) for room in rooms)
    return max(1, int(min(most, max(kind.lane_points, spare / wanted.runs[0] * most))) // n)


def _needed(sizes: Sizes, rooms: Sequence[Room], blocks, n: int) -> list[float]:
    """Bytes that a map in these blocks takes in each process."""
    block, n_blocks = prod(max(each) for each in blocks) * n, prod(map(len, blocks))
    read = max(block, sizes.longest[0])  # a chunk may be several blocks
    longest = (read,) * min(n_blocks, max(room.n_threads for room in rooms))
    wanted = needs(sizes._replace(longest=longest, lanes=sizes.lanes * block / read))
    found = zip(rooms, _shares(rooms), strict=True)
    return [wanted.working(room.n_threads) + wanted.held * share for room, share in found]


def _join(chunks, few: int) -> list[tuple[int, ...]]:
    """Chunks along the map axes, if they are many joined up to ``few`` pixels, along the last axes first."""
    found = [tuple(sizes) for sizes in chunks]
    if prod(map(len, found)) <= MANY_BLOCKS:
        return found
    for k in reversed(range(len(found))):
        longest = few // prod(max(sizes) for sizes in found[:k] + found[k + 1 :])
        joined: list[int] = []
        for n in found[k]:
            if joined and joined[-1] + n <= longest:
                joined[-1] += n
            else:
                joined.append(n)
        found[k] = tuple(joined)
    return found


def _split(chunks, most: int) -> list[tuple[int, ...]]:
    """Chunks along the map axes, cut so that no block has more than ``most`` pixels; the first axes are cut first."""
    found = [tuple(sizes) for sizes in chunks]
    for k in range(len(found)):
        others = prod(max(sizes) for sizes in found[:k] + found[k + 1 :])
        longest = max(1, most // others)
        if max(found[k]) > longest:
            found[k] = tuple(
                part for n in found[k] for part in (*[longest] * (n // longest), *([n % longest] if n % longest else []))
            )
    return found
