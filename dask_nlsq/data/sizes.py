"""The sizes of a fit's data as plain numbers, from metadata and the graph: what its memory is planned with."""

from collections.abc import Iterator
from functools import reduce
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from dask._task_spec import DataNode, Task
from dask.blockwise import Blockwise
from distributed import Future

from ..base.config import threads
from ..base.lazy import da
from ..kernels.blocks import Layout
from ..memory.needs import MOST_RUNS, READ_AHEAD, READ_COPIES, Sizes
from ..memory.pool import buffer_bytes
from .align import Data
from .arrays import made_bytes
from .chunks import block_cuts
from .loading import Load, plan_loads


def sizes_of(data: Data, n_params: int) -> Sizes:
    """Sizes of the data of a fit; their graph is looked at where chunks may share tasks."""
    preparation, operands = data.preparation, data.operands
    lengths = _run_lengths(data)
    alone = all(_shares_nothing(data, each) for each in operands)
    shared, passed, making = (0.0, (), 0.0) if alone else _of_several(data)
    return Sizes(
        n_points=data.n_points,
        n_params=n_params,
        n_operands=len(operands),
        n_chunks=data.n_chunks,
        n_runs=data.n_runs,
        longest=tuple(np.sort(lengths)[::-1][:MOST_RUNS].tolist()),
        nbytes=data.nbytes,
        read=preparation.read_bytes / preparation.capacities[0] if data.lazy else 0.0,
        held=_held(data, lengths, sent=False),
        sent=_held(data, lengths, sent=True),
        shared=shared,
        passed=passed,
        making=making,
        factor=0 if data.covariance is None else 8 * data.n_points**2,
        lazy=data.lazy or isinstance(data.covariance, da.Array),
        checked=any(each.size > 1 for each in operands[1 : 2 + (preparation.layouts.mask is not None)]),
        whole=preparation.whole,
    )


def _run_lengths(data: Data) -> np.ndarray:
    """Points of each run of chunks."""
    return reduce(np.multiply.outer, [np.asarray(sizes, np.int64) for sizes in data.runs]).ravel()


def _held(data: Data, lengths: np.ndarray, sent: bool) -> int:
    """Bytes of all blocks as `prepare_chunk` makes them; views of the user's arrays count where they are sent."""

    def operand(layout: Layout, array, k, n):
        (cuts, capacity), is_mask = block_cuts(data.preparation, n), layout is data.preparation.layouts.mask
        itemsize = 1 if is_mask else min(array.dtype.itemsize, 8)
        if not layout.dense:
            return buffer_bytes(max(data.preparation.capacities[k], 1) * itemsize)
        if data.preparation.copied or len(cuts) == 1:
            return buffer_bytes((cuts[-1][0] + capacity) * itemsize)
        copied = sent or is_mask or not array.dtype.isnative or array.itemsize > 8
        # the first and the last block seldom lie as they must
        return 2 * buffer_bytes(capacity * itemsize) + n * itemsize * copied

    each = [*zip(data.preparation.layouts.operands, data.operands, range(len(data.operands)), strict=True)]
    found = zip(*np.unique(lengths, return_counts=True), strict=True)
    return int(sum(count * sum(operand(*one, int(n)) for one in each) for n, count in found))


# ---------------------------------------------------------------------------------------------------------------------
# what several chunks need


def _shares_nothing(data: Data, array) -> bool:
    """Whether the layers of its graph alone say that no two chunks need a task in common."""
    if not isinstance(array, da.Array):
        return True
    if array.numblocks != tuple(map(len, data.chunks)):
        return False
    graph = array.dask
    for name, layer in graph.layers.items():
        if not isinstance(layer, Blockwise):
            if graph.dependencies[name] or isinstance(next(iter(layer.values()), None), Future):
                return False
            continue
        cut = {label: layer.dims[label] for label in layer.output_indices if layer.dims[label] > 1}
        for each, labels in layer.indices:
            if isinstance(each, str) and labels is not None:
                found = zip(labels, layer.numblocks[each], strict=True)
                if {label: n for label, n in found if n > 1} != cut:
                    return False
    return True


def _of_several(data: Data) -> tuple[float, tuple[float, ...], float]:
    """Bytes of shared values; of values that are passed on, while 1, 2, ... neighbouring runs are in memory; and beside them
    while the largest of those is made.
    """
    runs, common = plan_loads(data)
    as_read = [max(each.itemsize, made_bytes([each])) for each in data.operands]
    nbytes: dict[Any, float] = {}
    ends: dict[Any, list[int]] = {}  # first and last run
    making = 0.0
    for number, run in enumerate(runs):
        for load in run:
            for key, k, size in _uses(data, load):
                nbytes[key] = max(size * data.operands[k].itemsize, nbytes.get(key, 0.0))
                ends.setdefault(key, [number, number])[1] = number
                if key in load.passed:
                    making = max(making, READ_COPIES * size * as_read[k] - nbytes[key])
    shared = {key for load in chain(*runs) for key in load.shared}
    passed = [(*ends[key], size) for key, size in nbytes.items() if key not in shared]
    first, last, sizes = np.array(passed).T if passed else np.zeros((3, 0))
    held = sum(nbytes[key] for key in shared if key in nbytes and not isinstance(common[key], DataNode))
    most = tuple(_most_at_once(first, last + more, sizes) for more in range(threads() + READ_AHEAD) if passed)
    return held, most, making


def _most_at_once(first: np.ndarray, last: np.ndarray, sizes: np.ndarray) -> float:
    """The largest sum of the sizes of intervals that have a point in common."""
    places, changes = np.concatenate([first, last + 1]), np.concatenate([sizes, -sizes])
    return float(np.cumsum(changes[np.lexsort((changes, places))]).max())


def _uses(data: Data, load: Load) -> Iterator[tuple[Any, int, int]]:
    """Keys that a load has from elsewhere, or passes on; the operand that needs them, and how many elements for it."""
    outside = {*load.shared, *load.passed}
    for k, operand in enumerate(load.operands):
        left: list[tuple[Any, Any]] = [(operand, None)] if isinstance(operand, tuple) and outside else []
        seen = set()
        while left:
            key, user = left.pop()
            if key in outside:
                yield key, k, _least_size(key, user, load, data.operands[k])
            elif key not in seen:
                seen.add(key)
                left += [(each, load.graph[key]) for each in load.graph[key].dependencies]


def _least_size(key, user, load: Load, operand) -> int:
    """Elements that the value of a key must have: as far as it is sliced, else those of the piece that is made with it."""
    if user is not None:
        fused = isinstance(user, Task) and user.args and isinstance(user.args[0], dict)
        inner = user.args[0].values() if fused else [user]
        slices = [
            node.args[1]
            for node in inner
            if key in node.dependencies and getattr(getattr(node, "func", None), "__name__", "") == "getitem"
        ]
        ends = [[getattr(each, "stop", each) for each in index if each is not None] for index in slices]
        if ends and all(isinstance(end, int) for index in ends for end in index):
            return max(prod(max(end, 1) for end in index) for index in ends)
    return prod(sizes[0] if len(sizes) == 1 else n for sizes, n in zip(operand.chunks, load.shape, strict=True))
