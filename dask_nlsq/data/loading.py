"""Which part of a user's Dask graph each chunk needs for itself, so that one task can read and prepare it alone.

A task that loads chunks runs their own part of the graph by itself, one chunk after another. So beside what is prepared
already one chunk is in memory and no more, no data travel between workers, a partition is one task for the scheduler
however many chunks it has, and an error knows its chunk. What several chunks need (a coordinate axis, a large source
chunk that was split, futures of a persisted array) is computed once before, by the user's scheduler.
"""

from collections.abc import Mapping
from typing import Any

import dask
import numpy as np
from dask._task_spec import DataNode, GraphNode, convert_legacy_graph, execute_graph
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from dask.sizeof import sizeof
from dask.utils import ensure_dict
from distributed import Future

from ..base.lazy import da
from .align import Data
from .chunks import Preparation, blank

CONSTANT_BYTES = 2**20  # constants up to here (a store's handle, a small axis) go along with each chunk that needs them
SHARED = -1


class Load:
    """How to read one chunk: for each operand its key in ``graph`` or an array; ``shared`` keys come from elsewhere."""

    __slots__ = ("graph", "index", "operands", "shape", "shared")

    def __init__(self, index: tuple[int, ...], shape: tuple[int, ...], operands: list):
        self.index, self.shape, self.operands, self.graph, self.shared = index, shape, operands, {}, []

    def pieces(self, shared: Mapping[Any, np.ndarray]) -> list[np.ndarray]:
        """The chunk's piece of each operand; an error says which chunk it is."""
        keys = {operand for operand in self.operands if isinstance(operand, tuple)}
        with _NamedChunk(self.index):
            values = execute_graph(self.graph, {key: shared[key] for key in self.shared}, keys)
        return [values[operand] if isinstance(operand, tuple) else operand for operand in self.operands]

    def hidden(self, preparation: Preparation, shared: Mapping[Any, np.ndarray]) -> list[np.ndarray]:
        """What `pieces` gives, but for what has one value per point: the mask hides all of them."""
        pieces = []
        for k, (operand, layout) in enumerate(zip(self.operands, preparation.layouts.operands, strict=True)):
            if k == 2 or (
                layout.dense and isinstance(operand, tuple)
            ):  # preparation.layouts.mask is there: chunks are hidden
                pieces.append(blank(preparation, self.shape, k))
            elif isinstance(operand, tuple):
                pieces.append(shared[operand] if operand in shared else self._alone(operand, shared))
            else:
                pieces.append(operand)
        return pieces

    def _alone(self, key, shared):
        needed, wanted = {}, [key]
        while wanted:
            if (one := wanted.pop()) in self.graph and one not in needed:
                needed[one] = self.graph[one]
                wanted += needed[one].dependencies
        return execute_graph(needed, {key: shared[key] for key in self.shared}, {key})[key]


class _NamedChunk:
    """Adds the index of the chunk to an error that the user's own graph raises."""

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception):
            error.add_note(f"raised while reading block {self.index} of the data")


def plan_loads(problem: Data) -> tuple[list[list[Load]], dict[Any, GraphNode]]:
    """A `Load` for each chunk in C order, in runs of chunks that are joined; and the graph of what several share."""
    loads = [Load(index, problem.chunk_shape(index), problem.places(index)) for index in problem.indices()]
    arrays = [operand for operand in problem.operands if isinstance(operand, da.Array)]
    size = problem.preparation.run
    runs = [loads[k : k + size] for k in range(0, len(loads), size)]
    if not arrays:
        return runs, {}
    wanted = [[key for key in load.operands if isinstance(key, tuple)] for load in loads]
    merged = HighLevelGraph.merge(*(array.__dask_graph__() for array in arrays))
    outputs = {key for keys in wanted for key in keys}
    graph = convert_legacy_graph(ensure_dict(da.optimization.optimize(merged, list(outputs))))
    if futures := (outputs | {key for node in graph.values() for key in node.dependencies}) - graph.keys():
        given = ensure_dict(merged)  # the optimization leaves them out
        graph |= {key: given[key] for key in futures}
    owner = _owners(graph, wanted)
    for key, who in owner.items():
        if who != SHARED:
            loads[who].graph[key] = graph[key]
    common = {key: graph[key] for key, who in owner.items() if who == SHARED}
    for load in loads:
        needed = {key for node in load.graph.values() for key in node.dependencies}
        needed.update(key for key in load.operands if isinstance(key, tuple))
        for key in needed - load.graph.keys():
            if key in common:
                load.shared.append(key)
            else:
                load.graph[key] = graph[key]
    tasks = [node for node in common.values() if not isinstance(node, Future)]
    for key in {key for node in tasks for key in node.dependencies} - common.keys():
        common[key] = graph[key]
    return runs, common


def _owners(graph: Mapping[Any, GraphNode], wanted: list[list]) -> dict[Any, int]:
    """Number of the only chunk that needs a task, or `SHARED`; constants belong to nobody and are not listed."""
    owner: dict[Any, int] = {}
    stack = [(key, k) for k, keys in enumerate(wanted) for key in keys]
    while stack:
        key, who = stack.pop()
        node = graph[key]
        if isinstance(node, DataNode) and sizeof(node.value) <= CONSTANT_BYTES:
            continue
        if isinstance(node, Future):
            owner[key] = SHARED
            continue
        known = owner.get(key)
        if known in (who, SHARED):
            continue
        owner[key] = who = who if known is None else SHARED
        stack.extend((dependency, who) for dependency in node.dependencies)
    return owner


def compute_shared(common: dict[Any, GraphNode]) -> dict[Any, np.ndarray]:
    """Values of the shared tasks in this process, by the scheduler that the user has chosen."""
    keys = list(common)
    return dict(zip(keys, dask.compute(*(Delayed(key, common) for key in keys)), strict=True)) if keys else {}
