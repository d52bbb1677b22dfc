"""MemoryManager: aligned arrays from a pool, reservations, predictions. Budgets and detection are offered here too.

What is available to a thread is what the system and the manager's own limit leave, with the pool, which can be let go at
any time, less what other threads have reserved and not yet allocated from the manager. Memory that they take elsewhere
(``np.empty``) within a reservation counts twice, so the answer errs on the safe side.
"""

import gc
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .budget import (
    DEFAULT_MEMORY_FRACTION,
    FALLBACK_THRESHOLD_GB,
    GB,
    MEMORY_FRACTION_ENV_VAR,
    SVD_SHARE,
    MemoryBudget,
    NLSQStrategy,
    StrategyDecision,
    count,
    estimate_peak_memory_gb,
    even_chunks,
    fit_parts,
    get_adaptive_memory_threshold,
    positive,
    select_nlsq_strategy,
)
from .buffers import Account, BufferPool, array_bytes, capacity_of, first_line, new_buffer, size_class
from .resources import available_memory, detect_total_system_memory, process_memory

__all__ = [
    "DEFAULT_MEMORY_FRACTION",
    "FALLBACK_THRESHOLD_GB",
    "MEMORY_FRACTION_ENV_VAR",
    "MemoryBudget",
    "MemoryManager",
    "NLSQStrategy",
    "StrategyDecision",
    "available_memory",
    "clear_memory_pool",
    "detect_total_system_memory",
    "estimate_peak_memory_gb",
    "get_adaptive_memory_threshold",
    "get_memory_manager",
    "get_memory_stats",
    "select_nlsq_strategy",
]

POOL_ARRAYS = 100  # most buffers that are kept
POOL_SHARE = 0.25  # most of all memory that they take
LOOK_BYTES = 2**20  # the system is asked again after that much new memory,
LOOK_SECONDS = 0.1  # or after that time: asking takes 0.1 ms
COLLECT_SECONDS = 1.0  # least time between garbage collections, which take 0.1 s where JAX is loaded

# what an algorithm holds beside data and normal equations: Jacobians, vectors of n points, p x p matrices.
# lm factors J in place; trf works on an SVD of it; dogbox also forms J times the step of the free variables
_HELD = {"lm": (1.0, 2, 1), "trf": (1 + SVD_SHARE, 2, 2), "dogbox": (1 + SVD_SHARE, 3, 3)}


@dataclass(eq=False)
class Reservation(Account):
    """Bytes that a thread will need; those ``taken`` are arrays of the manager by now."""

    owner: int = 0
    nbytes: float = 0.0

    @property
    def outstanding(self) -> float:
        return max(0.0, self.nbytes - self.taken)


class MemoryManager:
    """Aligned arrays from a pool, reservations and predictions of memory; safe to share between threads.

    Parameters
    ----------
    gc_threshold : float
        Share of all memory in use above which the pool is let go and garbage is collected.
    safety_factor : float
        By which predictions exceed the formulas, at least 1.
    limit_bytes : float, optional
        Most bytes that arrays and reservations may take together; by default what the system has.
    """

    def __init__(self, gc_threshold: float = 0.8, safety_factor: float = 1.2, limit_bytes: float | None = None):
        if positive("gc_threshold", gc_threshold) > 1:
            raise ValueError(f"`gc_threshold` is a share of memory, at most 1, not {gc_threshold}")
        if positive("safety_factor", safety_factor) < 1:
            raise ValueError(f"`safety_factor` multiplies predictions and must be at least 1, not {safety_factor}")
        self.gc_threshold, self.safety_factor = gc_threshold, safety_factor
        self.limit_bytes = np.inf if limit_bytes is None else positive("limit_bytes", limit_bytes, "bytes")
        # reentrant, since the garbage collector may free an array while this thread is in here
        self._changed = threading.Condition(threading.RLock())
        self._pool = BufferPool()
        self._reservations: list[Reservation] = []
        self._waiting: deque[Reservation] = deque()
        self._looked = self._collected = -np.inf  # time.monotonic
        self._new_bytes = 0  # since the system was asked
        self._pool_bytes = 0.0  # most that are kept
        self._peak = 0
        self._allocations = self._reused = self._requested = self._used = 0

    # -----------------------------------------------------------------------------------------------------------------
    # how much there is, how much is needed

    def get_available_memory(self) -> float:
        """Bytes that this thread could allocate now."""
        with self._changed:
            return max(0.0, self._room() - self._outstanding(others=True))

    def predict_memory_requirement(
        self, n_points: int, n_params: int, algorithm: Literal["trf", "lm", "dogbox"] = "trf"
    ) -> int:
        """Bytes at the peak of a fit of all points in memory.

        ``safety_factor`` times data (x and y) + c J + v vectors of n points + s matrices (p, p), with the parts of
        `dask_nlsq.budget` and (c, v, s) = (1, 2, 1) for "lm", (1.3, 2, 2) for "trf", (1.3, 3, 3) for "dogbox".

        Raises
        ------
        ValueError, TypeError
            An unknown algorithm; numbers that are not positive integers.
        """
        per_point, fixed = self._cost(count("n_params", n_params), algorithm)
        return int(np.ceil(count("n_points", n_points) * per_point + fixed))

    def _cost(self, n_params: int, algorithm: str) -> tuple[float, float]:
        """Bytes per point, and bytes whatever the number of points."""
        if algorithm not in _HELD:
            raise ValueError(f"`algorithm` must be one of {', '.join(map(repr, _HELD))}, not {algorithm!r}")
        jacobians, vectors, squares = _HELD[algorithm]
        parts = fit_parts(1, n_params)
        per_point = parts.data + jacobians * parts.jacobian + vectors * parts.residual
        return self.safety_factor * per_point, self.safety_factor * squares * parts.normal

    def estimate_chunking_strategy(
        self, n_points: int, n_params: int, algorithm: str = "trf", memory_limit_gb: float | None = None
    ) -> dict[str, bool | int | float]:
        """The fewest even chunks that a fit can take one after the other.

        Parameters
        ----------
        memory_limit_gb : float, optional
            GiB for one chunk; by default what is available.

        Returns
        -------
        dict
            ``needs_chunking``, ``chunk_size`` (points), ``n_chunks``, ``memory_per_chunk_gb``, ``total_memory_gb``.

        Raises
        ------
        MemoryError
            Where not even one point fits.
        """
        total = self.predict_memory_requirement(n_points, n_params, algorithm)
        limit = self.get_available_memory() if memory_limit_gb is None else positive("memory_limit_gb", memory_limit_gb) * GB
        size, n_chunks = int(n_points), 1
        if total > limit:
            size, n_chunks = even_chunks(int(n_points), limit, *self._cost(int(n_params), algorithm))
        per_chunk = self.predict_memory_requirement(size, n_params, algorithm)
        return {
            "needs_chunking": total > limit,
            "chunk_size": size,
            "n_chunks": n_chunks,
            "memory_per_chunk_gb": per_chunk / GB,
            "total_memory_gb": total / GB,
        }

    def check_memory_availability(self, bytes_needed: float) -> tuple[bool, str]:
        """Whether this thread could reserve ``bytes_needed`` now, and a sentence with the numbers."""
        needed = positive("bytes_needed", bytes_needed, "bytes")
        with self._changed:
            if self._fits(self._extra(needed)):
                return True, f"{needed / GB:.3g} GiB are needed and {self.get_available_memory() / GB:.3g} GiB available"
            return False, self._lacking(needed)

    # -----------------------------------------------------------------------------------------------------------------
    # reservations

    @contextmanager
    def memory_guard(self, bytes_needed: float, wait: bool = False) -> Iterator[None]:
        """Reserve memory for the time of a block.

        Guards within a guard of the same thread are part of it: only what they need beyond it is reserved.

        Parameters
        ----------
        bytes_needed : float
        wait : bool
            Where other threads' reservations alone stand in the way, wait until they end; first come, first served. A
            thread that holds a reservation never waits, or two could wait for each other.

        Raises
        ------
        MemoryError
            Where there is less; the message says how much is missing.
        """
        needed = positive("bytes_needed", bytes_needed, "bytes")
        reservation = self._reserve(needed, wait)
        try:
            yield
        finally:
            with self._changed:
                self._reservations.remove(reservation)
                self._observe()
                self._changed.notify_all()

    def _reserve(self, needed: float, wait: bool) -> Reservation:
        with self._changed:
            reservation = Reservation(owner=threading.get_ident(), nbytes=self._extra(needed))
            if wait and reservation.nbytes == needed:  # holds nothing yet
                self._wait_for(reservation)
            elif reservation.nbytes and not self._fits(reservation.nbytes):
                self._relieve(always=True)
                if not self._fits(reservation.nbytes):
                    raise MemoryError(self._lacking(needed))
            if reservation.nbytes > available_memory():
                self.clear_pool()  # it was counted as available
            self._reservations.append(reservation)
            return reservation

    def _wait_for(self, reservation: Reservation) -> None:
        """Wait until ``reservation`` is the first in the queue and fits."""
        self._waiting.append(reservation)
        try:
            while self._waiting[0] is not reservation or not self._fits(reservation.nbytes):
                # what others have reserved comes back, in use or not
                others = sum(each.nbytes for each in self._reservations)
                if reservation.nbytes > min(self._room() + others, self.limit_bytes):
                    raise MemoryError(self._lacking(reservation.nbytes))
                self._changed.wait()
        finally:
            self._waiting.remove(reservation)
            self._changed.notify_all()

    def _extra(self, needed: float) -> float:
        """What a guard must reserve beyond the guards around it."""
        return max(0.0, needed - sum(each.nbytes for each in self._own()))

    def _own(self) -> list[Reservation]:
        return [each for each in self._reservations if each.owner == threading.get_ident()]

    def _fits(self, extra: float) -> bool:
        return extra <= self._room() - self._outstanding()

    def _outstanding(self, others: bool = False) -> float:
        own = self._own() if others else []
        return sum(each.outstanding for each in self._reservations if each not in own)

    def _room(self) -> float:
        """Bytes that the system and the limit leave, reservations apart."""
        self._pool.settle()
        return min(available_memory() + self._pool.free_bytes, self.limit_bytes - self._pool.lent.taken)

    def _lacking(self, needed: float) -> str:
        available, reserved = self.get_available_memory(), self._outstanding(others=True)
        held = f" ({reserved / GB:.3g} GiB are reserved by other threads)" if reserved else ""
        return (
            f"{needed / GB:.3g} GiB are needed, {available / GB:.3g} GiB available{held}, "
            f'{max(0.0, needed - available) / GB:.3g} GiB missing: take fewer points at once (strategy "chunked" or '
            '"streaming"; estimate_chunking_strategy says how many), or a machine with more memory'
        )

    # -----------------------------------------------------------------------------------------------------------------
    # arrays

    def allocate_array(self, shape: int | tuple[int, ...], dtype=np.float64, zero: bool = True) -> np.ndarray:
        """A C-ordered array that starts on a 64-byte line, from the pool where it has one that fits.

        Parameters
        ----------
        zero : bool
            False: the array holds anything.

        Raises
        ------
        MemoryError
            Where there is less memory.
        TypeError, ValueError
            Shapes that are no sizes; dtypes of Python objects.
        """
        sizes, dtype, nbytes = array_bytes(shape, dtype)
        with self._changed:
            own = self._own()
            account = own[-1] if own else Account()
            buffer = self._pool.take(nbytes)
            reused = buffer is not None
            if not reused:
                capacity = size_class(nbytes)
                self._make_room(capacity)
                buffer = new_buffer(capacity, zero)
            array = self._pool.lend(buffer, sizes, dtype, account)
            self._allocations, self._reused = self._allocations + 1, self._reused + reused
            self._requested, self._used = self._requested + nbytes, self._used + capacity_of(buffer)
        if zero and reused:
            begin = first_line(buffer)
            buffer[begin : begin + nbytes] = 0
        return array

    def free_array(self, arr: np.ndarray) -> None:
        """Give an array back to the pool: neither it nor a view of it may be used any longer.

        Results that JAX still computes from it must have arrived (``block_until_ready``). An array that is dropped
        instead is not reused, and its memory goes with the last view of it.

        Raises
        ------
        ValueError
            Where ``arr`` was freed before, is a view, or is not of this manager.
        """
        with self._changed:
            self._pool.take_back(arr)
            self._look()
            self._pool.keep_largest(POOL_ARRAYS, self._pool_bytes)
            self._changed.notify_all()

    @contextmanager
    def temporary_allocation(self, shape, dtype=np.float64, zero: bool = True) -> Iterator[np.ndarray]:
        """`allocate_array` for the time of a block."""
        array = self.allocate_array(shape, dtype, zero)
        try:
            yield array
        finally:
            self.free_array(array)

    def _make_room(self, capacity: int) -> None:
        """Check that a new buffer fits; small ones against the system's last answer."""
        self._new_bytes += capacity
        if self._new_bytes >= LOOK_BYTES or np.isfinite(self.limit_bytes):
            self._look(capacity)
            if capacity > self.get_available_memory():
                self._relieve(always=True)
            if capacity > self.get_available_memory():
                raise MemoryError(self._lacking(capacity))
            in_use = self._pool.lent.taken + self._pool.free_bytes
            spare = min(available_memory(), self.limit_bytes - in_use) - capacity
            if spare < 0:
                self._pool.keep_largest(POOL_ARRAYS, max(0.0, self._pool.free_bytes + spare))

    def _look(self, capacity: int = 0) -> None:
        now = time.monotonic()
        if capacity >= LOOK_BYTES or self._new_bytes >= LOOK_BYTES or now - self._looked > LOOK_SECONDS:
            self._looked, self._new_bytes = now, 0
            self._observe()
            self._pool_bytes = POOL_SHARE * self._total()
            if self._usage() > self.gc_threshold:
                self._relieve()

    def _relieve(self, always: bool = False) -> None:
        """Let the pool go, and collect garbage unless that has just been done."""
        self.clear_pool()
        now = time.monotonic()
        if always or now - self._collected > COLLECT_SECONDS:
            gc.collect()
            self._collected = time.monotonic()

    def _observe(self) -> tuple[int, int]:
        current, peak = process_memory()
        self._peak = max(self._peak, peak)
        return current, self._peak

    def _total(self) -> float:
        return min(detect_total_system_memory() or available_memory(), self.limit_bytes)

    def _usage(self) -> float:
        """Share of all memory that is in use: of the system's, or of the limit if that is more."""
        total = detect_total_system_memory()
        self._pool.settle()
        used = self._pool.lent.taken + self._pool.free_bytes
        return max(1 - available_memory() / total if total else 0.0, used / self.limit_bytes)

    # -----------------------------------------------------------------------------------------------------------------
    # the pool

    def clear_pool(self) -> None:
        """Let all buffers go that are not in use."""
        self.optimize_memory_pool(0)

    def optimize_memory_pool(self, max_arrays: int = POOL_ARRAYS) -> None:
        """Keep the ``max_arrays`` largest buffers of the pool."""
        with self._changed:
            self._pool.keep_largest(count("max_arrays", max_arrays, 0), np.inf)

    def get_memory_stats(self) -> dict[str, float | int]:
        """What this process, and this manager, have taken.

        Returns
        -------
        dict
            ``current_usage_gb``, ``peak_usage_gb`` of this process in physical memory; ``available_gb``;
            ``usage_fraction`` of all memory, by whatever process; ``pool_memory_gb``, ``pool_arrays`` of the pool;
            ``allocations``, and how many of them were ``reused`` buffers; ``total_requested_gb``, the bytes asked for in
            all; ``total_used_gb``, the bytes of the buffers that served them; ``efficiency``, their ratio (0 to 1).
        """
        with self._changed:
            current, peak = self._observe()
            return {
                "current_usage_gb": current / GB,
                "available_gb": self.get_available_memory() / GB,
                "peak_usage_gb": peak / GB,
                "usage_fraction": self._usage(),
                "pool_memory_gb": self._pool.free_bytes / GB,
                "pool_arrays": self._pool.n_free,
                "allocations": self._allocations,
                "reused": self._reused,
                "efficiency": self._requested / self._used if self._used else 1.0,
                "total_requested_gb": self._requested / GB,
                "total_used_gb": self._used / GB,
            }


_shared = MemoryManager()


def get_memory_manager() -> MemoryManager:
    """The manager that this process shares."""
    return _shared


def get_memory_stats() -> dict[str, float | int]:
    """Statistics of the shared manager; see `MemoryManager.get_memory_stats`."""
    return get_memory_manager().get_memory_stats()


def clear_memory_pool() -> None:
    """Clear the pool of the shared manager."""
    get_memory_manager().clear_pool()
