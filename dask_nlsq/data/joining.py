"""Small chunks become runs, so that none costs more than its share of a large one.

A store that is asked for a box of small chunks answers several times sooner than where it is asked for one after the other,
and where Dask's tasks hold or read chunks, and do nothing else, no graph is needed to have these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from operator import getitem
from typing import Any

import dask
import numpy as np
from dask._task_spec import DataNode, GraphNode, TaskRef
from dask.blockwise import Blockwise
from dask.layers import ArraySliceDep
from dask.sizeof import sizeof

from ..base.lazy import da
from ..memory.needs import JOINED_POINTS
from .arrays import CHECKED, Declared

Item = tuple[slice, ...]
FEWEST_RUNS, TINY = 16, 2**10  # where there are so many chunks; points
CONSTANT_BYTES = 2**20  # constants up to here (a store's handle, a small axis) go along with each chunk that needs them

logger = logging.getLogger("dask_nlsq")


@dataclass(frozen=True)
class Reader:
    """How Dask reads an array in a store, and what compares a chunk with what was declared."""

    source: Any
    get: Callable[..., np.ndarray]
    how: Mapping[str, Any]  # asarray and lock
    declared: Declared | None

    def read(self, item: Item, index: tuple[int, ...] = ()) -> np.ndarray:
        """A box, which is the chunk of an ``index`` where that is given."""
        values = self.get(self.source, item, **self.how)
        return values if self.declared is None else self.declared(values, index, tuple(s.stop - s.start for s in item))


@dataclass(frozen=True)
class Part:
    """A chunk of an array in a store."""

    reader: Reader
    item: Item
    index: tuple[int, ...]

    def read(self) -> np.ndarray:
        return self.reader.read(self.item, self.index)


def joins_of(chunks) -> tuple[int, ...]:
    """How many neighbouring chunks are joined along each axis, so that small ones become runs of up to `JOINED_POINTS`.

    The last axis comes first, and one only after all those behind it are whole: runs follow each other in C order.
    `FEWEST_RUNS` remain unless they are tiny, for threads to share and progress to show: a small chunk may take long to
    make.
    """
    found, room = [], min(JOINED_POINTS, max(prod(map(sum, chunks)) // FEWEST_RUNS, TINY))
    for sizes in reversed(chunks):
        n = max(1, min(len(sizes), room // max(sizes)))
        found.append(n)
        room = room // sum(sizes) if n == len(sizes) else 0
    return tuple(found[::-1])


def runs_of(chunks, joins) -> tuple[tuple[int, ...], ...]:
    """Sizes along each axis where neighbouring chunks are joined."""
    return tuple(
        tuple(np.add.reduceat(sizes, range(0, len(sizes), n)).tolist()) for sizes, n in zip(chunks, joins, strict=True)
    )


def parts_of(array: da.Array) -> Callable[[tuple[int, ...]], np.ndarray | Part] | None:
    """What gives the chunk at an index: the array that Dask holds, or the part that it reads; None where tasks do more."""
    layers, name, declared = array.dask.layers, source_name(array), None
    if name != array.name:
        declared = layers[array.name].task.func
    layer = layers.get(name)
    if isinstance(layer, Blockwise):
        return _read(layers, layer, declared)
    every = np.ndindex(array.numblocks)
    if layer is None or not all(type(layer.get((name, *index))) is np.ndarray for index in every):
        return None
    if declared is None:
        return lambda index: layer[name, *index]
    return lambda index: declared(layer[name, *index], index, tuple(map(getitem, array.chunks, index)))


def source_name(array: da.Array) -> str:
    """The name of an array before its chunks are compared with what was declared."""
    return array.dask.layers[array.name].indices[0][0] if array.name.startswith(CHECKED) else array.name


def _read(layers, layer: Blockwise, declared) -> Callable | None:
    (leaf, label), *rest = layer.indices
    slices = layer.io_deps.get(str(rest[0][0])) if len(rest) == 1 else None
    if label is not None or not isinstance(slices, ArraySliceDep) or rest[0][1] != layer.output_indices:
        return None
    if layer.task.func not in (da.core.getter, da.core.getter_nofancy, da.core.getter_inline) or len(layer.task.args) != 2:
        return None
    if isinstance(leaf, TaskRef):
        leaf = layers.get(leaf.key, {}).get(leaf.key)
    source, how = leaf.value if isinstance(leaf, DataNode) else leaf, layer.task.kwargs
    if source is None or dask.is_dask_collection(source) or any(isinstance(each, GraphNode) for each in how.values()):
        return None
    if sizeof(source) > CONSTANT_BYTES:  # it would travel with each part
        return None
    reader = Reader(source, layer.task.func, how, declared)
    return lambda index: Part(reader, slices[index], index)


def read_box(parts: Sequence[Part]) -> list[np.ndarray]:
    """The values of neighbouring chunks, the first and the last of which are at the ends of a box, by one read."""
    ends = zip(parts[0].item, parts[-1].item, strict=True)
    box = tuple(slice(first.start, last.stop) for first, last in ends)
    values = parts[0].reader.read(box)
    return [
        values[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(part.item, box, strict=True))]
        for part in parts
    ]


def ends_of(chunks) -> list[np.ndarray]:
    """Where chunks end along each axis."""
    return [np.cumsum(sizes) for sizes in chunks]


def split(box: Item, ends: Sequence[np.ndarray]) -> Iterator[tuple[tuple[int, ...], Item, Item]]:
    """What lies in one chunk each: its index, the place in the box, and that in the array, in C order."""
    along = []
    for one, those in zip(box, ends, strict=True):
        first, last = np.searchsorted(those, [one.start, one.stop - 1], side="right").tolist()
        cuts = pairwise([one.start, *those[first:last].tolist(), one.stop])
        along.append([(first + k, slice(a - one.start, b - one.start), slice(a, b)) for k, (a, b) in enumerate(cuts)])
    for each in product(*along):
        yield tuple(k for k, _, _ in each), tuple(there for _, there, _ in each), tuple(part for _, _, part in each)


class Joined:
    """An array that is read in boxes of chunks, and chunk by chunk where that fails: so the error is that of one of them."""

    def __init__(self, reader: Reader, array: da.Array):
        self.reader, self.ends, self.meta = reader, ends_of(array.chunks), array._meta
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, item: Item) -> np.ndarray:
        with tried_together():
            return self.reader.read(item)
        empty = np.ma.empty if isinstance(self.meta, np.ma.MaskedArray) else np.empty
        values = empty([one.stop - one.start for one in item], self.dtype)
        for index, there, part in split(item, self.ends):
            values[there] = self.reader.read(part, index)
        return values


@contextmanager
def tried_together() -> Iterator[None]:
    """Within, several chunks are read by one request; they are to be read one by one after that has failed."""
    try:
        yield
    except Exception as err:
        logger.info("chunks could not be read together, and are read one by one: %s", err)


def coarser(array, bounds=None):
    """The same Dask array in chunks as large as its runs, where these can be read at once or are in memory.

    No run crosses the ``bounds`` of blocks, sizes along each axis; the array stays as it is where one of its chunks does.
    """
    if not isinstance(array, da.Array):
        return array
    bounds = da.core.normalize_chunks(array.shape if bounds is None else bounds, array.shape)
    ends = [{0, *each.tolist()} for each in ends_of(bounds)]
    chunks = tuple(map(_joined_within, array.chunks, joins_of(array.chunks), ends))
    if chunks == array.chunks or not all(chunks) or (part := parts_of(array)) is None:
        return array
    first = part((0,) * array.ndim)
    if isinstance(first, Part):
        source = Joined(first.reader, array)
        return da.from_array(source, chunks=chunks, name=False, asarray=False, meta=array._meta)
    whole = first.base
    if type(whole) is not np.ndarray or (whole.shape, whole.dtype) != (array.shape, array.dtype):
        return array
    its = _lies_in(whole, map(part, np.ndindex(array.numblocks)), array.chunks)
    return da.from_array(whole, chunks=chunks, name=False) if its else array


def _lies_in(whole: np.ndarray, pieces, chunks) -> bool:
    """Whether the pieces are views of an array at the places of its chunks."""
    wanted = np.array(whole.__array_interface__["data"][0])
    for ends, sizes, stride in zip(ends_of(chunks), chunks, whole.strides, strict=True):
        wanted = wanted[..., None] + stride * (ends - sizes)
    found = [(each.__array_interface__["data"][0], each.strides, each.dtype) for each in pieces]
    return all(each == (at, whole.strides, whole.dtype) for each, at in zip(found, wanted.ravel().tolist(), strict=True))


def _joined_within(sizes, n, ends) -> tuple[int, ...]:
    """Sizes of runs of at most ``n`` chunks, which end where blocks do; none where a chunk goes on behind such an end."""
    edges = np.cumsum([0, *sizes]).tolist()
    if not ends <= {*edges}:
        return ()
    found: list[int] = []
    many = n
    for size, start in zip(sizes, edges, strict=False):
        if many == n or start in ends:
            found.append(0)
            many = 0
        found[-1] += size
        many += 1
    return tuple(found)
