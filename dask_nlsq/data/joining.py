"""Small chunks become runs, so that none costs more than its share of a large one.

A store that is asked for a box of small chunks answers several times sooner than where it is asked for one after the other,
and where Dask's tasks hold or read chunks, and do nothing else, no graph is needed to have these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import dask
import numpy as np
from dask._task_spec import DataNode, GraphNode, TaskRef
from dask.blockwise import Blockwise
from dask.layers import ArraySliceDep

from ..base.lazy import da
from ..memory.needs import JOINED_POINTS
from .arrays import CHECKED, Declared, checked

Item = tuple[slice, ...]
FEWEST_RUNS = 64  # where there are so many chunks


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
    `FEWEST_RUNS` remain, for threads to share and progress to show: a small chunk may take long to make.
    """
    found, room = [], min(JOINED_POINTS, prod(map(sum, chunks)) // FEWEST_RUNS)
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
    layers, name, declared = array.dask.layers, array.name, None
    if name.startswith(CHECKED):
        declared, name = layers[name].task.func, layers[name].indices[0][0]
    layer = layers.get(name)
    if isinstance(layer, Blockwise):
        return _read(layers, layer, declared)
    shape_of = dict(zip(np.ndindex(array.numblocks), _shapes(array), strict=True))
    if layer is None or any(type(layer.get((name, *index))) is not np.ndarray for index in shape_of):
        return None
    return lambda index: layer[name, *index] if declared is None else declared(layer[name, *index], index, shape_of[index])


def _shapes(array: da.Array):
    return (tuple(sizes[i] for sizes, i in zip(array.chunks, index, strict=True)) for index in np.ndindex(array.numblocks))


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


def coarser(array, within=None):
    """The same Dask array in chunks as large as its runs, where these can be read at once or are in memory.

    No chunk is ``within`` two of these sizes along each axis; the array stays as it is where one of its own is.
    """
    if not isinstance(array, da.Array):
        return array
    within = array.shape if within is None else within
    bounds = [{0, *np.cumsum(sizes).tolist()} for sizes in da.core.normalize_chunks(within, array.shape)]
    chunks = tuple(map(_within, array.chunks, joins_of(array.chunks), bounds))
    if chunks == array.chunks or not all(chunks) or (part := parts_of(array)) is None:
        return array
    first = part((0,) * array.ndim)
    if isinstance(first, Part):
        reader = first.reader
        found = da.from_array(reader.source, chunks=chunks, name=False, meta=array._meta, **reader.how)
        return found if reader.declared is None else checked(reader.declared.name, found)
    whole = first.base
    if whole is None or (whole.shape, whole.dtype) != (array.shape, array.dtype):
        return array
    places = zip(np.ndindex(array.numblocks), da.core.slices_from_chunks(array.chunks), strict=True)
    its = all(_looks_at(whole[place], part(index)) for index, place in places)
    return da.from_array(whole, chunks=chunks, name=False) if its else array


def _looks_at(one: np.ndarray, other) -> bool:
    """Whether two arrays are views of the same elements."""
    found = (each.__array_interface__ for each in (one, other))
    return len({(each["data"][0], each["shape"], each["strides"], each["typestr"]) for each in found}) == 1


def _within(sizes, n, bounds) -> tuple[int, ...]:
    """Sizes of runs of at most ``n`` chunks, which end where there are bounds; none where a chunk is beyond one."""
    found, many, end = [], 0, 0
    for size in sizes:
        many, start, end = many + 1, end, end + size
        if any(start < each < end for each in bounds):
            return ()
        if many == 1 or many > n or start in bounds:
            found.append(size)
            many = 1
        else:
            found[-1] += size
    return tuple(found)
