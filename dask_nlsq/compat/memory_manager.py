"""NLSQ's MemoryManager: a pool of buffers as fits use it, with predictions and statistics under the names of NLSQ."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import ceil, inf
from typing import Literal

import numpy as np

from ..base.text import GB, size
from ..base.values import count, positive
from ..memory.machine import process_memory
from ..memory.pool import MOST_FREE, Pool, shared_pool
from .nlsq import HELD, costs, even_chunks

ALGORITHMS = [*HELD][1:]
Algorithm = Literal["trf", "lm", "dogbox"]


class MemoryManager:
    """Aligned arrays and reservations, as in `memory.pool.Pool`, and predictions of memory; safe between threads.

    ``gc_threshold``: share of memory in use above which the pool is freed and garbage is collected. ``safety_factor``:
    by which predictions exceed the formulas, at least 1. ``limit_bytes``: of arrays and reservations together.
    """

    def __init__(self, gc_threshold: float = 0.8, safety_factor: float = 1.2, limit_bytes: float | None = None):
        if positive("gc_threshold", gc_threshold) > 1:
            raise ValueError(f"`gc_threshold` is a share of memory, at most 1, not {gc_threshold}")
        if positive("safety_factor", safety_factor) < 1:
            raise ValueError(f"`safety_factor` multiplies predictions and must be at least 1, not {safety_factor}")
        limit = inf if limit_bytes is None else positive("limit_bytes", limit_bytes, "bytes")
        self.pool, self.safety_factor, self.peak = Pool(limit, gc_threshold), safety_factor, 0

    def allocate_array(self, shape: int | tuple[int, ...], dtype=np.float64, zero: bool = True) -> np.ndarray:
        """A C-ordered array that starts on a 64-byte line; it is not initialised unless ``zero``. See `Pool.lend`."""
        return self.pool.lend(shape, dtype, zero)

    def free_array(self, arr: np.ndarray) -> None:
        """Return an array: do not use it, or a view of it, any longer. See `Pool.take_back`."""
        self.pool.take_back(arr)

    @contextmanager
    def temporary_allocation(self, shape, dtype=np.float64, zero: bool = True) -> Iterator[np.ndarray]:
        """`allocate_array` for the time of a block."""
        array = self.allocate_array(shape, dtype, zero)
        try:
            yield array
        finally:
            self.free_array(array)

    def clear_pool(self) -> None:
        """Free all buffers that are not in use."""
        self.pool.shrink()

    def optimize_memory_pool(self, max_arrays: int = MOST_FREE) -> None:
        """Keep the ``max_arrays`` largest buffers of the pool."""
        self.pool.shrink(count("max_arrays", max_arrays, 0))

    def get_available_memory(self) -> float:
        """Bytes that this thread could allocate now."""
        return self.pool.available()

    def memory_guard(self, bytes_needed: float, wait: bool = False) -> AbstractContextManager[None]:
        """Reserve memory during a block; MemoryError if less is available. See `Pool.reserve`."""
        return self.pool.reserve(positive("bytes_needed", bytes_needed, "bytes"), wait)

    def check_memory_availability(self, bytes_needed: float) -> tuple[bool, str]:
        """Whether this thread could reserve ``bytes_needed`` now, and a sentence with the numbers."""
        try:
            with self.memory_guard(bytes_needed):
                return True, f"{size(bytes_needed)} are needed, {size(self.get_available_memory())} available"
        except MemoryError as error:
            return False, str(error)

    def predict_memory_requirement(self, n_points: int, n_params: int, algorithm: Algorithm = "trf") -> int:
        """Bytes at the peak of a fit of all points in memory: ``safety_factor`` times the formula of `compat.nlsq`."""
        per_point, fixed = self._costs(n_params, algorithm)
        return ceil(count("n_points", n_points) * per_point + fixed)

    def _costs(self, n_params: int, algorithm: str) -> tuple[float, float]:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"`algorithm` must be one of {', '.join(map(repr, ALGORITHMS))}, not {algorithm!r}")
        per_point, fixed = costs(algorithm, count("n_params", n_params))
        return self.safety_factor * per_point, self.safety_factor * fixed

    def estimate_chunking_strategy(
        self, n_points: int, n_params: int, algorithm: Algorithm = "trf", memory_limit_gb: float | None = None
    ) -> dict[str, bool | int | float]:
        """The fewest even chunks that a fit can take one after the other, of ``memory_limit_gb`` (GiB) at most each.

        The limit is by default the available memory; MemoryError if not even one point fits.
        """
        total = self.predict_memory_requirement(n_points, n_params, algorithm)
        limit = self.get_available_memory() if memory_limit_gb is None else positive("memory_limit_gb", memory_limit_gb) * GB
        chunk, n_chunks = int(n_points), 1
        if total > limit:
            chunk, n_chunks = even_chunks(int(n_points), limit, *self._costs(n_params, algorithm))
        return {
            "needs_chunking": total > limit,
            "chunk_size": chunk,
            "n_chunks": n_chunks,
            "memory_per_chunk_gb": self.predict_memory_requirement(chunk, n_params, algorithm) / GB,
            "total_memory_gb": total / GB,
        }

    def get_memory_stats(self) -> dict[str, float | int]:
        """The memory that this process and this manager use."""
        pool, counts = self.pool, self.pool.counts
        current, peak = process_memory()
        self.peak = max(self.peak, peak)
        return {
            "current_usage_gb": current / GB,  # of this process, in physical memory
            "available_gb": pool.available() / GB,
            "peak_usage_gb": self.peak / GB,
            "usage_fraction": pool.usage(),  # of all memory, by whatever process
            "pool_memory_gb": pool.free_bytes() / GB,
            "pool_arrays": len(pool.free),
            "allocations": counts["allocations"],
            "reused": counts["reused"],  # of the allocations
            "efficiency": counts["requested"] / counts["used"] if counts["used"] else 1.0,
            "total_requested_gb": counts["requested"] / GB,
            "total_used_gb": counts["used"] / GB,  # by the buffers that served the requests
        }


_shared = MemoryManager()
_shared.pool = shared_pool


def get_memory_manager() -> MemoryManager:
    """The manager of the pool that the fits of this process use."""
    return _shared


def get_memory_stats() -> dict[str, float | int]:
    """Statistics of the shared manager; see `MemoryManager.get_memory_stats`."""
    return _shared.get_memory_stats()


def clear_memory_pool() -> None:
    """Clear the pool of the shared manager."""
    _shared.clear_pool()
