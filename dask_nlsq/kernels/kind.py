"""Kinds of devices: how data are cut for one. These are constants, since bits depend on them, and not on free memory.

A CPU works through short tiles, whose rows [J r] stay in its cache. A GPU works on all points of a long block, or on all
pixels of a map, at once; its cores would be idle in a loop over short ones. Figures of one H200: a sweep of 1e8 points with
3 parameters takes 28 ps per point in blocks that stay on the card, and up to 1.6 times that in pieces of 2^18 points; a map
fits 1.55 million pixels per second with 2^16 lanes, and 0.04 million with 2^8.
"""

from collections.abc import Callable
from itertools import cycle
from typing import NamedTuple

import jax


class Kind(NamedTuple):
    """How data are cut for the devices of a kind."""

    name: str  # of the platform, as JAX calls it
    block_points: int  # points per kernel call
    longest_tile: int  # points that are evaluated at once
    tile_bytes: int  # and the most that their rows [J r] take
    columns_up_to: int  # parameters up to which "columns" is the better guess of how to form J
    pairs_up_to: int  # rows [J r], up to which the gram matrix is a sum for each pair of them, not a product
    reflected: bool  # whether the factor of rows [J r] is found by reflections, which are many passes over them
    timed_points: int  # whose kernel takes long against the call, 0.01 to 0.02 ms
    most_lanes: int  # pixels that are fitted together
    lane_points: int  # and the most points of all of them
    group_bytes: int  # rows [J r] of the lanes that are evaluated at once
    split_values: int  # of y in one block of a map that is in memory already
    own_memory: bool  # where blocks can stay during a fit


CPU = Kind(
    "cpu",
    block_points=2**18,  # about 1 ms of the fastest kernel against 0.1 ms to start one
    longest_tile=4096,  # longer ones gained nothing at any number of parameters
    tile_bytes=2**20,  # half of a 2 MiB second-level cache
    columns_up_to=8,
    pairs_up_to=0,
    reflected=True,
    timed_points=2**15,
    most_lanes=64,  # vectors of each number, and the last ones waste few
    lane_points=2**18,  # more of them would wait longer for the last pixels of a block
    group_bytes=2**18,  # so that they stay in the cache
    split_values=2**18,  # enough tasks for the threads
    own_memory=False,
)
GPU = Kind(
    "gpu",
    block_points=2**24,  # 0.5 ms of the fastest kernel against 0.02 ms to start one
    longest_tile=2**24,
    tile_bytes=2**29,
    columns_up_to=4,
    pairs_up_to=6,
    reflected=False,
    timed_points=2**22,
    most_lanes=2**16,
    lane_points=2**24,
    group_bytes=2**31,
    split_values=2**26,
    own_memory=True,
)
KINDS = {CPU.name: CPU}  # all other devices are cut for as a GPU


def kind_of(platform: str) -> Kind:
    return KINDS.get(platform, GPU._replace(name=platform))


def devices_here() -> list:
    """Devices that this thread may compute on: the caller's ``jax.default_device``, or all of this process."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX adds it when it is imported
    if device is None:
        return jax.local_devices()
    return jax.local_devices(backend=device) if isinstance(device, str) else [device]


def kind_here() -> Kind:
    return kind_of(devices_here()[0].platform)


def inherit_device() -> Callable[[], None]:
    """Function for other threads to call, which gives them the caller's ``jax.default_device``.

    Where the caller has none, and there are several devices with memory of their own, each thread gets another one of them.
    """
    devices = devices_here()
    several = len(devices) > 1 and kind_here().own_memory
    turn = cycle(devices if several else [jax.config.jax_default_device])  # type: ignore[attr-defined]  # as above
    return lambda: jax.default_device(next(turn)).__enter__()  # for the life of the thread
