"""Blocks and bands of a map, and the memory that they take: decided from metadata."""

from dataclasses import dataclass
from math import ceil, inf, prod

from ..base.config import threads
from ..base.lazy import da
from ..base.text import GB, several, size, table
from ..base.values import is_integer, positive
from ..kernels.lanes import LANE_POINTS
from ..memory.machine import active_client, available_memory, workers_memory
from ..memory.plan import MemoryBudgetError
from ..memory.threshold import effective_fraction

BLOCK_VALUES = 2**22  # of y in one task: a few hundred milliseconds, and 16 bytes each beside those that are read
SPLIT_VALUES = 2**19  # of y that is in memory already: enough tasks for the threads
JOINING = 2.5  # times the data, while chunks along the fit axes are joined: as they come, their pieces, the blocks
WORKING = 24  # bytes for each value of a block that is being fitted


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
        Predicted for the data of all threads.
    reason : str
    decoded : tuple of str
        Attributes of stored arrays that are applied to their values, a line for each array.
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

    def explain(self) -> None:
        """Print the plan, which is also ``str(plan)``."""
        print(self)

    def __str__(self):
        rows = [
            ("map", f"{self.n_pixels:,} pixels of {self.n_points:,} points; {several(self.n_params, 'parameter')}"),
            ("blocks", f"{self.n_blocks:,} in {several(self.n_bands, 'band')}: {self.reason}"),
            ("reads", size(self.read_bytes)),
            *(("decoded", each) for each in self.decoded),
            ("memory", f"{size(self.peak_bytes)} for data"),
        ]
        return "\n".join(table(rows))


def axes_of(axis, dims, ndim) -> tuple[int, ...]:
    """Places of the fit axes of a map."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    found = []
    for each in given:
        if isinstance(each, str):
            if dims is None or each not in dims:
                raise ValueError(f"`axis` {each!r} is not a dimension of `ydata`: {dims or 'it has no named dimensions'}")
            each = dims.index(each)
        if not is_integer(each) or not -ndim <= each < ndim:
            raise ValueError(f"`axis` must name axes of `ydata`, which has {ndim}: not {axis!r}")
        found.append(int(each) % ndim)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`axis` must name one or several different axes, not {axis!r}")
    if found != sorted(found):
        in_order = tuple(name if isinstance(name, str) else k for k, name in sorted(zip(found, given, strict=True)))
        raise ValueError(
            f"`axis` must be in the order of the axes of `ydata`, and `xdata` with it: {in_order}, not {axis!r}"
        )
    return tuple(found)


def capacity(blocks, n):
    """Pixels, of ``n`` points, of the largest block; if it is small a power of 4, which other maps may have compiled for."""
    most = prod(max(sizes) for sizes in blocks)
    few = 4 ** max(3, (most - 1).bit_length() + 1 >> 1)
    return few if few * n <= LANE_POINTS else most


def plan_blocks(y, fit_axes, n_params, strategy, memory_limit_gb):
    """Bands, blocks along the map axes, and the plan."""
    map_axes = [k for k in range(y.ndim) if k not in fit_axes]
    n = prod(y.shape[k] for k in fit_axes)
    lazy = isinstance(y, da.Array)
    chunks = [y.chunks[k] if lazy else (y.shape[k],) for k in map_axes]
    cut = lazy and any(y.numblocks[k] > 1 for k in fit_axes)
    client, fraction = active_client(), effective_fraction()[0]
    may_take = fraction * (sum((workers_memory(client) or {}).values()) if client else available_memory())
    if memory_limit_gb is not None:
        may_take = positive("memory_limit_gb", memory_limit_gb) * GB
    n_threads = sum(client.nthreads().values()) if client else threads()
    value_bytes = WORKING + 2 * y.itemsize
    half = may_take / (2 * n_threads * value_bytes)  # the other half is for what is read
    most = max(1, int(min(BLOCK_VALUES if lazy else SPLIT_VALUES, half)) // n)
    blocks = _split(chunks, most)
    largest = prod(max(sizes) for sizes in blocks) * n
    working = min(n_threads, prod(len(sizes) for sizes in blocks)) * largest * value_bytes
    rows = y.shape[map_axes[0]] if map_axes else 1
    bands, reason = (slice(0, rows),), "as the data are chunked along the map"
    if cut:
        joining, room = JOINING * y.nbytes, may_take - working
        n_bands = ceil(joining / room) if room > 0 else inf
        if n_bands > (1 if strategy in ("standard", "chunked") else rows):
            raise MemoryBudgetError(
                f"joining the chunks of `ydata` along the fit axes takes {size(joining)} at once, beside "
                f"{size(working)} for the blocks; there are {size(may_take)}",
                'raise memory_limit_gb, use strategy="auto", which reads the data several times, or rechunk them on disk',
            )
        reason = f"chunks along the fit axes are joined, which takes {size(joining / n_bands)} of {size(may_take)}"
        height = rows // n_bands
        ends = range(0, rows, height)
        bands = tuple(slice(a, min(a + height, rows)) for a in ends)
        if n_bands > 1:
            chunks[0] = tuple(band.stop - band.start for band in bands)
        blocks = _split(chunks, most)
    elif working > may_take and (lazy or memory_limit_gb is not None):
        raise MemoryBudgetError(
            f"{several(n_threads, 'thread')} with blocks of {size(largest * y.itemsize)} take {size(working)}; there are "
            f"{size(may_take)}",
            "rechunk the map axes into smaller chunks, or raise memory_limit_gb",
        )
    plan = MapPlan(
        n_pixels=y.size // n,
        n_points=n,
        n_params=n_params,
        n_blocks=prod(len(sizes) for sizes in blocks),
        n_bands=len(bands),
        read_bytes=y.nbytes * len(bands),
        peak_bytes=int(working + (joining / len(bands) if cut else 0)),
        reason=reason,
    )
    return bands, tuple(map(tuple, blocks)), plan


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
