"""Blocks on the devices of a process that have memory of their own: they are put there once, and stay for all sweeps.

Blocks are put on the devices in turn. Those that do not fit stay in the memory of the process, and cross to a device in each
sweep; how they are cut does not change. Blocks of data that are not held cross while others are read, or computed on. The
results of many blocks come back together, from each device by one transfer.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..base.text import several
from ..base.x64 import float64
from ..kernels.blocks import Block
from ..kernels.kind import Kind, devices_here
from ..memory.device import said_if_full, scratch

logger = logging.getLogger("dask_nlsq")
KERNELS_AHEAD = 2  # for each device: one computes while the result of another is fetched


class OnDevices:
    """The blocks of a partition on the devices of this process: a cache, which does not travel to other processes."""

    def __init__(self):
        self.blocks: list[Block] | None = None

    def __reduce__(self):
        return OnDevices, ()

    def of(self, kind: Kind, blocks: Sequence[Block], n_params: int) -> Sequence[Block]:
        """The blocks, on devices if these have memory of their own and room."""
        if not kind.own_memory:
            return blocks
        if self.blocks is None:
            self.blocks = _placed(blocks, max(scratch(kind, n_params, kind.block_points), kind.tile_bytes))
        return self.blocks


def _placed(blocks: Sequence[Block], spared: float) -> list[Block]:
    devices = devices_here()
    room = [_room(each) - spared for each in devices]
    there: dict[tuple[int, int], Any] = {}  # by device and buffer, which several blocks may share
    placed, n_left = [], 0
    with float64():
        for number, block in enumerate(blocks):
            k = number % len(devices)
            new = {id(each): each for each in block.buffers if (k, id(each)) not in there}
            room[k] -= sum(each.nbytes for each in new.values())
            if room[k] < 0:
                n_left += 1
                placed.append(block)
                continue
            there |= {(k, own): jax.device_put(each, devices[k]) for own, each in new.items()}
            placed.append(block._replace(buffers=tuple(there[k, id(each)] for each in block.buffers)))
    if n_left:
        every = several(len(blocks), "block")
        logger.warning("%d of %s do not fit on %s, and cross to it in each sweep", n_left, every, devices[0])
    return placed


def sent_ahead(kind: Kind, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks when they are on the device of this thread, if that has memory of its own."""
    if not kind.own_memory:
        return blocks
    there: dict[int, Any] = {}  # by buffer, which several blocks may share
    with float64(), said_if_full():
        for block in blocks:
            there |= {id(each): jax.device_put(each) for each in block.buffers if id(each) not in there}
        jax.block_until_ready([*there.values()])
    return tuple(block._replace(buffers=tuple(there[id(each)] for each in block.buffers)) for block in blocks)


def kernels_at_once(kind: Kind, n_threads: int) -> int:
    """How many blocks kernels work on at a time, for data that are read by this many threads and more."""
    return KERNELS_AHEAD * len(devices_here()) if kind.own_memory else n_threads


def _room(device) -> float:
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else np.inf


@jax.jit
def _packed(arrays):
    return jnp.concatenate([each.ravel() for each in arrays])


def wait_for(results: Any) -> None:
    """Until the arrays of a tree have been computed."""
    jax.block_until_ready(results)


def fetched(results: Any) -> Any:
    """A tree of arrays of float64, in the memory of this process; call inside ``float64()``."""
    leaves, tree = jax.tree.flatten(results)
    by_device: dict[Any, list[int]] = {}
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            by_device.setdefault(leaf.device, []).append(k)
    packed = [_packed([leaves[k] for k in those]) for those in by_device.values()]  # all are begun before one is waited for
    for those, whole in zip(by_device.values(), jax.device_get(packed), strict=True):
        ends = np.cumsum([leaves[k].size for k in those])
        for k, part in zip(those, np.split(whole, ends[:-1]), strict=True):
            leaves[k] = part.reshape(leaves[k].shape)
    return jax.tree.unflatten(tree, leaves)
