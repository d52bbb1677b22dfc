"""Which part of a user's Dask graph each chunk needs for itself, so that one task can read and prepare it alone.

A task that loads chunks runs their own part of the graph by itself, one chunk after another. So beside what is prepared
already one chunk is in memory and no more, or a run of small ones; no data travel between workers, a partition is one task
for the scheduler however many chunks it has, and an error knows its chunk. Chunks that tasks only read need no graph.

What several chunks need is of two kinds. A piece of a store, or of the user's graph, that is not cut as y is, is *passed
on*: made for the first chunk that needs it and dropped with the last (`PassedOn`), in each sweep that reads. Computed once
before, by the user's scheduler, and held is what all chunks need (a coordinate axis), what is made of data that chunks read
for themselves (their mean), and futures of a persisted array.
"""

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future as Promise
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

import dask
import numpy as np
from dask._task_spec import Alias, DataNode, GraphNode, convert_legacy_graph, execute_graph
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.sizeof import sizeof
from dask.utils import ensure_dict
from distributed import Future

from ..base.lazy import da
from .align import Data
from .chunks import Preparation, blank
from .joining import CONSTANT_BYTES, Part, read_box, tried_together

_numbers = count()


class Load:
    """How to read one chunk: for each operand its key in ``graph``, a `Part` of a store, or an array.

    ``shared`` keys come from elsewhere; other chunks need ``passed`` ones too, whose tasks are in the graph.
    """

    __slots__ = ("graph", "index", "number", "operands", "passed", "shape", "shared")

    def __init__(self, index: tuple[int, ...], shape: tuple[int, ...], operands: list):
        self.index, self.shape, self.operands, self.number = index, shape, operands, next(_numbers)
        self.graph: dict[Any, GraphNode] = {}
        self.shared: list = []
        self.passed: list = []

    def __dask_tokenize__(self):
        return type(self).__name__, os.getpid(), self.number  # Dask would pickle and unpickle each of them

    @property
    def keys(self) -> set:
        return {operand for operand in self.operands if isinstance(operand, tuple)}

    def values(self, keys: Collection, known: Mapping) -> dict:
        """Values of keys, by the tasks that they need beside what is ``known``; an error says which chunk it is."""
        needed, left = {}, [key for key in keys if key not in known]
        while left:
            if (key := left.pop()) not in needed:
                needed[key] = self.graph[key]
                left += [each for each in needed[key].dependencies if each not in known]
        with self._named():
            return dict(execute_graph(needed, dict(known), keys))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(f"raised while reading block {self.index} of the data")
            raise

    def pieces(self, known: Mapping, read: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """The chunk's piece of each operand; those that have been ``read`` with others are there."""
        values = self.values(keys, known) if (keys := self.keys) else {}
        return [read[k] if k in read else self._piece(operand, values) for k, operand in enumerate(self.operands)]

    def _piece(self, operand, values: Mapping) -> np.ndarray:
        if not isinstance(operand, Part):
            return values[operand] if isinstance(operand, tuple) else operand
        with self._named():
            return operand.read()

    def hidden(self, preparation: Preparation, known: Mapping) -> list[np.ndarray]:
        """What `pieces` gives, except that operands with one value per point are fully masked."""
        pieces = []
        for k, (operand, layout) in enumerate(zip(self.operands, preparation.layouts.operands, strict=True)):
            if k == 2 or (layout.dense and isinstance(operand, (tuple, Part))):
                pieces.append(blank(preparation, self.shape, k))
            else:
                pieces.append(self._piece(operand, self.values({operand}, known) if isinstance(operand, tuple) else {}))
        return pieces


def read_together(run: Sequence[Load]) -> list[dict[int, np.ndarray]]:
    """For each load of a run the pieces that it has from a store, by one read of all; none where that fails.

    Then each load reads for itself, and the error is that of the chunk which is to blame.
    """
    found: list[dict[int, np.ndarray]] = [{} for _ in run]
    if len(run) > 1:
        with tried_together():
            for k, operand in enumerate(run[0].operands):
                if isinstance(operand, Part):
                    for pieces, piece in zip(found, read_box([load.operands[k] for load in run]), strict=True):
                        pieces[k] = piece
    return found


class PassedOn:
    """What is known in a pass over ``runs`` of chunks: ``shared`` values, and those that are passed on."""

    def __init__(self, shared: Mapping, runs: Sequence[Sequence[Load]]):
        self.shared, self.changing = shared, threading.Lock()
        self.promises: dict[Any, Promise] = {}
        self.n_left = Counter(key for load in chain(*runs) for key in load.passed)  # loads that still need each

    @contextmanager
    def to(self, load: Load) -> Iterator[dict]:
        """All values that a load does not make for itself alone."""
        shared = {key: self.shared[key] for key in load.shared}
        try:
            yield shared | {key: self._value(key, load, shared) for key in load.passed}
        finally:
            with self.changing:
                self.n_left.subtract(load.passed)
                for key in load.passed:
                    if not self.n_left[key]:
                        self.promises.pop(key, None)

    def _value(self, key, load, shared):
        with self.changing:
            known = key in self.promises
            promise = self.promises.setdefault(key, Promise())
        if not known:
            try:
                promise.set_result(load.values({key}, shared)[key])
            except BaseException as error:  # raised below, here and in all threads that wait for the value
                promise.set_exception(error)
        return promise.result()


# ---------------------------------------------------------------------------------------------------------------------
# whose a task is


def plan_loads(data: Data) -> tuple[list[list[Load]], dict[Any, GraphNode]]:
    """A `Load` for each chunk in C order, in runs of chunks that are joined; and the graph of their shared keys."""
    loads = [Load(index, data.chunk_shape(index), data.places(index)) for index in data.indices()]
    arrays = [each for each, place in zip(data.operands, loads[0].operands, strict=True) if isinstance(place, tuple)]
    runs: list[list[Load]] = [[] for _ in range(data.n_runs)]
    for load, number in zip(loads, data.numbers(), strict=True):
        runs[number].append(load)
    if not arrays:
        return runs, {}
    merged = _by_tasks(HighLevelGraph.merge(*(array.__dask_graph__() for array in arrays)))
    outputs = set().union(*(load.keys for load in loads))
    graph = convert_legacy_graph(ensure_dict(da.optimization.optimize(merged, list(outputs))))
    if futures := outputs.union(*(node.dependencies for node in graph.values())) - graph.keys():
        given = ensure_dict(merged)  # the optimization leaves them out
        graph |= {key: given[key] for key in futures}
    shared, passed = _of_several(graph, loads)
    for load in loads:
        left = [*load.keys]
        while left:
            key = left.pop()
            if key in shared:
                load.shared += [key] if key not in load.shared else []
            elif key not in load.graph:
                load.graph[key] = graph[key]
                load.passed += [key] if key in passed else []
                left += graph[key].dependencies
    common: dict[Any, GraphNode] = {}
    left = [*shared]
    while left:
        if (key := left.pop()) not in common:
            common[key] = graph[key]
            left += _needs(graph[key])
    return runs, common


def _by_tasks(graph: HighLevelGraph) -> HighLevelGraph:
    """The graph with tasks that slice and join where workers would rechunk among themselves: with the Client active, Dask
    plans that, and only its scheduler can run it.
    """
    layers, dependencies = {**graph.layers}, {**graph.dependencies}
    for name, layer in graph.layers.items():
        if type(layer).__name__ == "P2PRechunkLayer":
            p2p: Any = layer
            source = da.Array(graph, p2p.name_input, p2p.chunks_input, dtype=np.float64)
            new = source.rechunk(p2p.chunks, method="tasks")
            for each in new.dask.layers.keys() - layers.keys():
                layers[each], dependencies[each] = new.dask.layers[each], new.dask.dependencies[each]
            layers[name] = MaterializedLayer({key: Alias(key, (new.name, *key[1:])) for key in p2p.get_output_keys()})
            dependencies[name] = {new.name}
    return HighLevelGraph(layers, dependencies)


def _of_several(graph: Mapping[Any, GraphNode], loads: Sequence[Load]) -> tuple[set, set]:
    """Keys that are computed once before, and those that are passed on; constants are neither."""
    users: dict[Any, Any] = {}  # the load that needs a task, or the set of those, except what several need already

    def claim(key, who):
        known = users.setdefault(key, who)
        if isinstance(known, set):
            known.add(who)
        elif known != who:
            users[key] = {known, who}

    for k, load in enumerate(loads):
        for key in load.keys:
            claim(key, k)
    for key in _from_the_top(graph):
        if _is_constant(graph[key]):
            users.pop(key, None)
        elif key in users and not isinstance(users[key], set):
            for each in _needs(graph[key]):
                claim(each, users[key])
    futures = {key for key in users if isinstance(graph[key], Future)}
    several = {key for key, who in users.items() if isinstance(who, set)}
    shared = futures | {key for key in several if len(users[key]) == len(loads)}
    below: dict[Any, Any] = {}  # the passed key that alone needs a task
    for top in several - shared:
        left = [*_needs(graph[top])]
        while left:
            key = left.pop()
            if key in users and key not in shared:  # chunks read it for themselves
                shared.add(top)
                break
            if key in shared or _is_constant(graph[key]):
                continue
            if key not in below:
                below[key] = top
                left += _needs(graph[key])
            elif below[key] != top:
                shared.add(key)
    return shared, several - shared


def _from_the_top(graph: Mapping[Any, GraphNode]) -> Iterator:
    """Keys, each after all that need it."""
    n_waiting = Counter(each for node in graph.values() for each in _needs(node))
    ready = [key for key in graph if not n_waiting[key]]
    while ready:
        yield (key := ready.pop())
        for each in _needs(graph[key]):
            n_waiting[each] -= 1
            if not n_waiting[each]:
                ready.append(each)


def _needs(node) -> Collection:
    return () if isinstance(node, Future) else node.dependencies


def _is_constant(node) -> bool:
    return isinstance(node, DataNode) and sizeof(node.value) <= CONSTANT_BYTES


def compute_shared(runs: Sequence[Sequence[Load]], common: dict[Any, GraphNode]) -> dict:
    """Values of the shared keys in this process, by the scheduler that the user has chosen."""
    keys = list(dict.fromkeys(key for load in chain(*runs) for key in load.shared))
    return dict(zip(keys, dask.compute(*(Delayed(key, common) for key in keys)), strict=True)) if keys else {}
