"""Stored arrays behind Dask and xarray arrays: the same holds for them as for stores that are given by path, where it can.

The leaves of a Dask graph are what its tasks slice: a Zarr array, an h5py dataset, or xarray's wrappers of the first. Dask
and xarray read an absent chunk as fill values, and say nothing. Here a leaf is only looked at: what the graph makes of a
chunk is unknown, so its points cannot be left out. Whether the graph changes any value is seen by the names of its layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from dask._task_spec import DataNode, GraphNode, Task, TaskRef
from dask.blockwise import Blockwise
from dask.core import flatten

from ..base.lazy import da, zarr
from .arrays import is_labelled, on_disk
from .store import Policy, Stored, is_stored, missing_error, open_array, scan_keys

WAY_OUT = "pass the path of the store or the zarr.Array instead of a Dask or xarray array"
BACKENDS = "xarray.backends."  # the modules of what reads a file
MOVING = ("getitem-", "rechunk-", "concatenate-", "stack-", "reshape-")  # Dask's layers of tasks that compute no value


class Source(NamedTuple):
    """A Zarr array that tasks read."""

    key: Any  # of the leaf in the graph; None where tasks have it among their arguments
    array: zarr.Array
    whole: bool  # whether an index of the leaf is one of the array
    decode: list[Callable]  # what xarray does with the values, the last one first


def check_sources(policy: Policy, arguments: Mapping[str, Any], n_opened: int) -> None:
    """Look for the chunks of the Zarr arrays behind arguments; ``n_opened`` arguments are stored arrays themselves.

    Raises
    ------
    BadChunkError, MissingChunksError
        A chunk that tasks read is damaged or absent, as far as a look at its key shows it. An absent one that they read as
        NaN is left to ``nan_policy``: xarray does not write chunks without values.
    ValueError
        An option that cannot be applied to any of the arguments.
    """
    lazy = [found for name, value in arguments.items() for found in _lazy(name, value)]
    sources = [(name, data, each) for name, data in lazy for each in _sources(data)]
    options = policy._asdict().items()
    useless = [f'{name}="{how}"' for name, how in options if how == "mask" or (how == "fill" and not sources)]
    if lazy and useless and not n_opened:
        raise ValueError(
            f"{' and '.join(useless)} cannot be applied: `{lazy[0][0]}` is an array of Dask, xarray or another library, and "
            "only the chunks of a path, a URL or a zarr.Array can be left out or filled in: "
            f"{WAY_OUT}, or name points with mask="
        )
    for name, data, source in sources:
        _check(name, data, source, policy)


def holds_stored_values(data) -> bool:
    """Whether all values are those of stored arrays, as these hold them: cut, joined or moved at most, none computed."""
    if isinstance(data, (list, tuple)):
        return bool(data) and all(map(holds_stored_values, data)) and len({each.dtype for each in data}) == 1
    data = _unread(data) if is_labelled(data) else data
    if not isinstance(data, da.Array):
        return _is_as_stored(data)
    return all(name.startswith(MOVING) or _only_reads(layer) for name, layer in data.dask.layers.items())


def _only_reads(layer) -> bool:
    """Whether a layer of a graph holds or slices stored arrays, and does nothing else."""
    if isinstance(layer, Blockwise):
        literals = [getattr(value, "value", value) for value, labels in layer.indices if labels is None]
        core = da.core
        reading = core.getter, core.getter_nofancy, core.getter_inline, np.transpose  # which leave values as they are
        reads = getattr(layer.task, "func", None) in reading
        return reads and all(isinstance(each, TaskRef) or _is_as_stored(each) for each in literals)
    return all(_is_as_stored(node.value if isinstance(node, DataNode) else node) for node in layer.values())


def _is_as_stored(leaf) -> bool:
    """Whether it is an array in a store or file: Zarr's, h5py's, or one that xarray reads, from any file, when asked to.

    What xarray has read once it keeps in the latter.
    """
    inner = _unwrapped(leaf)[0]
    kept = type(leaf).__name__ == "MemoryCachedArray"
    return kept or isinstance(inner, zarr.Array) or hasattr(inner, "file") or type(inner).__module__.startswith(BACKENDS)


def _unread(labelled):
    """What an array of xarray holds; its ``data`` would read it."""
    return getattr(labelled, "variable", labelled)._data


def _lazy(name: str, value) -> Iterator[tuple[str, Any]]:
    """Arrays in an argument that are not in memory, nor opened by this package."""
    if is_stored(value):
        return
    if isinstance(value, (list, tuple)):
        for k, each in enumerate(value):
            yield from _lazy(f"{name}[{k}]", each)
        return
    if is_labelled(value):
        value = _unread(value)
        if not isinstance(value, da.Array) and _behind(None, value) is None:
            return
    if isinstance(value, da.Array) or _behind(None, value) is not None or on_disk(value):
        yield name, value


def _sources(data) -> list[Source]:
    if not isinstance(data, da.Array):
        found = _behind(None, data)
        return [found] if found else []
    unique: dict[int, Source] = {}
    for layer in data.dask.layers.values():
        for key, value in _leaves(layer):
            if (source := _behind(key, value)) is not None:
                unique.setdefault(id(source.array), source)
    return [*unique.values()]


def _leaves(layer) -> Iterator[tuple[Any, Any]]:
    """Values in a layer that are not made by tasks, with their keys where they have any."""
    if isinstance(layer, Blockwise):
        yield from ((None, value) for value, labels in layer.indices if labels is None)
        return
    left = [(key, node) for key, node in layer.items()]
    while left:
        key, node = left.pop()
        if isinstance(node, Task):
            left += [(None, each) for each in (*node.args, *node.kwargs.values())]
        elif isinstance(node, DataNode):
            yield key, node.value
        elif isinstance(node, dict):  # of fused tasks
            left += [(None, each) for each in node.values()]
        elif not isinstance(node, (GraphNode, np.ndarray)):
            yield key, node


def _behind(key, leaf) -> Source | None:
    """The Zarr array that a leaf is, or that wrappers of xarray have inside."""
    inner, whole, decode = _unwrapped(leaf)
    inner = inner.get_array() if type(inner).__module__ == f"{BACKENDS}zarr" else inner
    return Source(key, inner, whole, decode) if isinstance(inner, zarr.Array) else None


def _unwrapped(leaf) -> tuple[Any, bool, list[Callable]]:
    """What the wrappers of xarray have inside, of a file the backend that reads it; ``whole`` and ``decode`` of `Source`."""
    inner, whole, decode = leaf, True, []
    while type(inner).__module__.startswith("xarray.") and not type(inner).__module__.startswith(BACKENDS):
        whole &= all(each == slice(None) for each in getattr(getattr(inner, "key", None), "tuple", ()))
        decode += [inner.func] if hasattr(inner, "func") else []
        inner = getattr(inner, "array", None)
    return inner, whole, decode


def _check(name: str, data, source: Source, policy: Policy) -> None:
    stored = Stored(name, _by_path(name, source.array), Policy("mask", "fill"))
    scan_keys(stored)
    absent = stored.absent if policy.missing_chunks != "fill" else set()
    if not (absent or stored.damaged):
        return
    wanted = _wanted(data, source, stored)
    for index in sorted(stored.damaged):
        if wanted is None or index in wanted:
            raise stored.error(index, stored.damaged[index].cause, False)
    absent = absent if wanted is None else absent & wanted
    if absent and not _reads_nan(source):
        raise missing_error(
            stored,
            sorted(absent),
            f'Complete the store; or, if absent chunks mean fill values, give missing_chunks="fill"; or {WAY_OUT}, and '
            'leave their points out with missing_chunks="mask"',
        )


def _by_path(name: str, array: zarr.Array) -> zarr.Array:
    """The same array, of whose chunks the disk is asked, where Dask has opened a directory with fsspec."""
    fs = getattr(array.store, "fs", None)
    if "file" in getattr(fs, "protocol", ()):
        return open_array(name, os.path.join(array.store.path, array.path))  # type: ignore[attr-defined]
    return array


def _wanted(data, source: Source, stored: Stored) -> set[tuple[int, ...]] | None:
    """Chunks that the tasks of the data read; None where all may be."""
    if not isinstance(data, da.Array) or source.key is None or not source.whole:
        return None
    graph, found = data.dask.cull(set(flatten(data.__dask_keys__()))), set()
    for layer in graph.layers.values():
        if isinstance(layer, Blockwise):
            reads = any(getattr(each, "key", each) == source.key for each, labels in layer.indices if labels is None)
        else:
            reads = any(source.key in getattr(node, "dependencies", ()) for node in layer.values())
        if not reads:
            continue
        if not isinstance(layer, Blockwise) or len(layer.io_deps) != 1:
            return None
        (slices,) = layer.io_deps.values()
        for key in layer.get_output_keys():
            ranges = zip(slices[key[1:]], stored.chunks, strict=True)
            found |= {*product(*(range(part.start // size, -(-part.stop // size)) for part, size in ranges))}
    return found


def _reads_nan(source: Source) -> bool:
    """Whether an absent chunk is read as NaN."""
    value = np.full(1, 0 if source.array.fill_value is None else source.array.fill_value, source.array.dtype)
    for decode in reversed(source.decode):
        value = np.asarray(decode(value))
    return value.dtype.kind == "f" and bool(np.isnan(value).all())
