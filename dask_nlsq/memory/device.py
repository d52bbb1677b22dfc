"""The devices of a process that have memory of their own, and a fit that does not fit there."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from platform import node
from typing import NamedTuple

import jax

from ..base.text import size
from ..kernels.kind import CPU, Kind, devices_here, kind_of

ROWS = 4  # times the rows [J r] of what is evaluated at once: they, what they are made of, and their products
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


class Device(NamedTuple):
    """What a process computes on; ``total`` and ``in_use`` are bytes of all of its devices, 0 where they have none."""

    platform: str = CPU.name
    model: str = CPU.name
    n: int = 1
    total: float = 0.0
    in_use: float = 0.0
    card: str = ""  # the same for processes that compute on the same devices
    preallocated: bool = False  # JAX takes most of the memory at its first call

    @property
    def kind(self) -> Kind:
        return kind_of(self.platform)

    @property
    def free(self) -> float:
        return self.total - self.in_use

    def __str__(self):
        return self.model if self.n == 1 else f"{self.n} x {self.model}"


def device_here() -> Device:
    """Of this thread."""
    devices = devices_here()
    first = devices[0]
    if not kind_of(first.platform).own_memory:
        return Device()
    stats = [each.memory_stats() or {} for each in devices]
    total, in_use = (sum(each.get(key, 0) for each in stats) for key in ("bytes_limit", "bytes_in_use"))
    card = f"{node()} {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"
    taken = os.environ.get(PREALLOCATE, "true").lower() not in ("false", "0")
    return Device(first.platform, first.device_kind, len(devices), total, in_use, card, taken)


def kind_of_all(devices: Iterable[Device]) -> Kind:
    """What data are cut for, if these work on them: where their kinds differ, as for CPUs, which all can work on."""
    kinds = {each.kind for each in devices}
    return kinds.pop() if len(kinds) == 1 else CPU


def scratch(kind: Kind, n_params: int, n_points: int) -> float:
    """Bytes that a sweep takes beside the data, on each device."""
    return ROWS * min(8.0 * (n_params + 1) * min(n_points, kind.block_points), kind.tile_bytes)


class DeviceMemoryError(MemoryError):
    """A device has less memory than a computation takes."""


@contextmanager
def said_if_full() -> Iterator[None]:
    """Within, JAX's error for memory that a device does not have becomes one that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as err:
        if "RESOURCE_EXHAUSTED" not in str(err):
            raise
        found = device_here()
        has = f"{found} has {size(found.total)}, of which {size(found.in_use)} are in use" if found.total else f"{found}"
        raise DeviceMemoryError(
            f"the device has not enough memory for a computation of the model: {has}. Use smaller chunks, end other "
            "processes on it, or set JAX_PLATFORMS=cpu before Python starts"
        ) from err
