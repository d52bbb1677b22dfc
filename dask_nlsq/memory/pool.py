"""MemoryManager: aligned arrays from a pool, reservations, predictions. Budgets and detection are offered here too.

XLA takes a NumPy array without a copy if it starts on a 64-byte line, and the first touch of fresh memory costs more than
all later ones, so arrays are lent from buffers that start on a line, and buffers that come back are kept. A buffer is a
flat uint8 array. The array that is lent is a view of it; what the user derives from that keeps the buffer alive.

What is available to a thread is what the system and the manager's own limit leave, with the pool, which can be let go at
any time, less what other threads have reserved and not yet allocated from the manager. Memory that they take elsewhere
(``np.empty``) within a reservation counts twice, so the answer errs on the safe side.
"""

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np

from ..base.text import GB
from ..base.values import count, positive
from .machine import available_memory, detect_total_system_memory, process_memory
from .threshold import SVD_SHARE, even_chunks, fit_parts

ALIGNMENT = 64  # bytes
FRESH_STEPS = 64  # capacities per power of two: a new buffer is at most 1/64 longer than asked for, or a line
REUSE_WASTE = 4  # a pooled one serves what fills all but 1/4 of it
POOL_ARRAYS = 100  # most buffers that are kept
POOL_SHARE = 0.25  # most of all memory that they take
LOOK_BYTES = 2**26  # of new memory, after which the system is asked again how much there is, which takes 0.5 ms
COLLECT_SECONDS = 1.0  # least time between garbage collections, which take 0.1 s where JAX is loaded

Algorithm = Literal["trf", "lm", "dogbox"]
# what an algorithm holds beside data and normal equations: Jacobians, vectors of n points, p x p matrices.
# lm factors J in place; trf works on an SVD of it; dogbox also forms J times the step of the free variables
_HELD = {"lm": (1.0, 2, 1), "trf": (1 + SVD_SHARE, 2, 2), "dogbox": (1 + SVD_SHARE, 3, 3)}


@dataclass(eq=False)
class Reservation:
    """Bytes that a thread will need; buffers lent on it are part of them."""

    nbytes: float = 0.0


class Loan(NamedTuple):
    """A buffer in the hands of a user."""

    array: weakref.ref  # of what was lent
    capacity: int
    reservation: Reservation | None  # on which it was lent


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
        # The garbage collector may run a finalizer that frees an array while this thread is in here. So the lock lets the
        # same thread in again, and a buffer enters or leaves `_free` and `_loans` in one indivisible step.
        self._changed = threading.Condition(threading.RLock())
        self._free: dict[int, np.ndarray] = {}  # buffers by identity
        self._loans: dict[int, Loan] = {}  # by the identity of the buffer
        self._reservations: dict[int, Reservation] = {}  # by thread
        self._waiting: list[int] = []  # threads
        self._counts = Counter(allocations=0, reused=0, requested=0, used=0)
        self._unseen = self._peak = 0  # bytes
        self._collected = -np.inf  # time.monotonic
        self._total = detect_total_system_memory() or np.inf

    # -----------------------------------------------------------------------------------------------------------------
    # how much is needed, how much there is

    def predict_memory_requirement(self, n_points: int, n_params: int, algorithm: Algorithm = "trf") -> int:
        """Bytes at the peak of a fit of all points in memory.

        ``safety_factor`` times data (x and y) + c J + v vectors of n points + s matrices (p, p), with the parts of
        `dask_nlsq.compat.budget` and (c, v, s) = (1, 2, 1) for "lm", (1.3, 2, 2) for "trf", (1.3, 3, 3) for "dogbox".
        ValueError or TypeError for an unknown algorithm, and for numbers that are not positive integers.
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
        self, n_points: int, n_params: int, algorithm: Algorithm = "trf", memory_limit_gb: float | None = None
    ) -> dict[str, bool | int | float]:
        """The fewest even chunks that a fit can take one after the other, of ``memory_limit_gb`` (GiB) at most each.

        The limit is what is available by default; MemoryError where not even one point fits.

        Returns
        -------
        dict
            ``needs_chunking``, ``chunk_size`` (points), ``n_chunks``, ``memory_per_chunk_gb``, ``total_memory_gb``.
        """
        total = self.predict_memory_requirement(n_points, n_params, algorithm)
        limit = self.get_available_memory() if memory_limit_gb is None else positive("memory_limit_gb", memory_limit_gb) * GB
        size, n_chunks = int(n_points), 1
        if total > limit:
            size, n_chunks = even_chunks(int(n_points), limit, *self._cost(int(n_params), algorithm))
        return {
            "needs_chunking": total > limit,
            "chunk_size": size,
            "n_chunks": n_chunks,
            "memory_per_chunk_gb": self.predict_memory_requirement(size, n_params, algorithm) / GB,
            "total_memory_gb": total / GB,
        }

    def __repr__(self):
        stats = self.get_memory_stats()
        return (
            f"<MemoryManager: {stats['available_gb']:.2f} GiB available, {stats['current_usage_gb']:.2f} GiB in use, "
            f"pool of {stats['pool_arrays']} arrays, {stats['pool_memory_gb']:.2f} GiB>"
        )

    def get_available_memory(self) -> float:
        """Bytes that this thread could allocate now."""
        with self._changed:
            return max(0.0, self._room() - self._reserved(own=False))

    def check_memory_availability(self, bytes_needed: float) -> tuple[bool, str]:
        """Whether this thread could reserve ``bytes_needed`` now, and a sentence with the numbers."""
        try:
            with self.memory_guard(bytes_needed):
                return True, f"{bytes_needed / GB:.3g} GiB are needed, {self.get_available_memory() / GB:.3g} GiB available"
        except MemoryError as error:
            return False, str(error)

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
        needed, thread = positive("bytes_needed", bytes_needed, "bytes"), threading.get_ident()
        with self._changed:
            outermost = thread not in self._reservations
            reservation = self._reservations.get(thread, Reservation())
            extra = max(0.0, needed - reservation.nbytes)
            if wait and outermost:
                self._wait_for(needed)
            if extra:
                self._make_room(extra + self._reserved(own=True))
            reservation.nbytes += extra
            self._reservations[thread] = reservation
        try:
            yield
        finally:
            with self._changed:
                reservation.nbytes -= extra
                if outermost:
                    del self._reservations[thread]
                self._changed.notify_all()

    def _wait_for(self, nbytes: float) -> None:
        """Wait until it is this thread's turn and ``nbytes`` are there, or never will be."""
        thread = threading.get_ident()

        def decided():
            if self._waiting[0] != thread:
                return False
            room = self._room()
            held = sum(each.nbytes for each in self._reservations.values())  # comes back, in use or not
            return nbytes <= room - self._reserved(own=False) or nbytes > min(room + held, self.limit_bytes)

        self._waiting.append(thread)
        try:
            self._changed.wait_for(decided)
        finally:
            self._waiting.remove(thread)
            self._changed.notify_all()

    def _reserved(self, own: bool) -> float:
        """Bytes that this thread, or all others, have reserved and not yet been lent."""
        reservations = [each for thread, each in self._reservations.items() if (thread == threading.get_ident()) is own]
        return sum(max(0.0, each.nbytes - self._lent_bytes(each)) for each in reservations)

    def _room(self) -> float:
        """Bytes that the system and the limit leave, reservations apart."""
        return min(available_memory() + self._free_bytes(), self.limit_bytes - self._lent_bytes())

    def _make_room(self, nbytes: float) -> None:
        """See to it that this thread can take ``nbytes``; the pool counts as available, so it makes way."""
        if (short := nbytes > self.get_available_memory()) or self._usage() > self.gc_threshold:
            self.clear_pool()
            if short or time.monotonic() - self._collected > COLLECT_SECONDS:
                gc.collect()
                self._collected = time.monotonic()
        available, reserved = self.get_available_memory(), self._reserved(own=False)
        if nbytes > available:
            held = f" ({reserved / GB:.3g} GiB are reserved by other threads)" if reserved else ""
            raise MemoryError(
                f"{nbytes / GB:.3g} GiB are needed, {available / GB:.3g} GiB available{held}, "
                f'{(nbytes - available) / GB:.3g} GiB missing: take fewer points at once (strategy "chunked" or '
                '"streaming"; estimate_chunking_strategy says how many), or a machine with more memory'
            )
        self._keep_largest(POOL_ARRAYS, available - nbytes)

    # -----------------------------------------------------------------------------------------------------------------
    # arrays and their pool

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
            buffer = self._from_pool(nbytes)
            reused = buffer is not None
            capacity = size_class(nbytes) if buffer is None else len(buffer) - ALIGNMENT
            if buffer is None:
                self._unseen += capacity
                if self._unseen >= LOOK_BYTES or np.isfinite(self.limit_bytes):
                    self._make_room(capacity)
                    self._unseen = 0
                buffer = (np.zeros if zero else np.empty)(capacity + ALIGNMENT, np.uint8)
                weakref.finalize(buffer, self._loans.pop, id(buffer), None)  # if it is dropped instead of being freed
            array = np.ndarray(sizes, dtype, buffer, offset=-buffer.ctypes.data % ALIGNMENT)
            reservation = self._reservations.get(threading.get_ident())
            self._loans[id(buffer)] = Loan(weakref.ref(array), capacity, reservation)
            self._counts.update(allocations=1, reused=reused, requested=nbytes, used=capacity)
        if zero and reused:
            array[...] = np.zeros((), dtype)
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
        buffer: Any = getattr(arr, "base", None)
        with self._changed:
            loan = self._loans.get(id(buffer))
            if loan is None or loan.array() is not arr:
                raise ValueError(
                    "the array was freed before, is a view of one, or was not allocated by this MemoryManager: free each "
                    "allocated array itself, once"
                )
            del self._loans[id(buffer)]
            self._free[id(buffer)] = buffer
            self._keep_largest(POOL_ARRAYS, POOL_SHARE * min(self._total, self.limit_bytes))
            self._changed.notify_all()

    @contextmanager
    def temporary_allocation(self, shape, dtype=np.float64, zero: bool = True) -> Iterator[np.ndarray]:
        """`allocate_array` for the time of a block."""
        array = self.allocate_array(shape, dtype, zero)
        try:
            yield array
        finally:
            self.free_array(array)

    def clear_pool(self) -> None:
        """Let all buffers go that are not in use."""
        self.optimize_memory_pool(0)

    def optimize_memory_pool(self, max_arrays: int = POOL_ARRAYS) -> None:
        """Keep the ``max_arrays`` largest buffers of the pool."""
        with self._changed:
            self._keep_largest(count("max_arrays", max_arrays, 0), np.inf)

    def _keep_largest(self, n_buffers: int, nbytes: float) -> None:
        while self._free and (len(self._free) > n_buffers or self._free_bytes() > nbytes):
            self._free.pop(id(min(list(self._free.values()), key=len, default=None)), None)

    def _from_pool(self, nbytes: int) -> np.ndarray | None:
        """The smallest free buffer that holds ``nbytes`` without wasting more than a quarter of it."""
        largest = max(nbytes * REUSE_WASTE // (REUSE_WASTE - 1), size_class(nbytes))
        fitting = [each for each in list(self._free.values()) if nbytes <= len(each) - ALIGNMENT <= largest]
        return self._free.pop(id(min(fitting, key=len, default=None)), None)

    def _free_bytes(self) -> int:
        buffers = list(self._free.values())
        return sum(map(len, buffers)) - ALIGNMENT * len(buffers)

    def _lent_bytes(self, reservation: Reservation | None = None) -> int:
        """Capacity of the buffers that are lent, on ``reservation`` or in all."""
        loans = list(self._loans.values())
        return sum(loan.capacity for loan in loans if reservation is None or loan.reservation is reservation)

    def _usage(self) -> float:
        """Share of all memory that is in use: of the system's, or of the limit if that is more."""
        used = self._lent_bytes() + self._free_bytes()
        return max(1 - available_memory() / self._total, used / self.limit_bytes)

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
            current, peak = process_memory()
            self._peak, counts = max(self._peak, peak), self._counts
            return {
                "current_usage_gb": current / GB,
                "available_gb": self.get_available_memory() / GB,
                "peak_usage_gb": self._peak / GB,
                "usage_fraction": self._usage(),
                "pool_memory_gb": self._free_bytes() / GB,
                "pool_arrays": len(self._free),
                "allocations": counts["allocations"],
                "reused": counts["reused"],
                "efficiency": counts["requested"] / counts["used"] if counts["used"] else 1.0,
                "total_requested_gb": counts["requested"] / GB,
                "total_used_gb": counts["used"] / GB,
            }


def array_bytes(shape, dtype) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and bytes of an array; ValueError or TypeError where a buffer cannot hold it."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not all(isinstance(size, Integral) for size in sizes):
        raise TypeError(f"`shape` must be an integer or a tuple of integers, not {shape!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"`shape` must not be negative, got {sizes}")
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise TypeError(f"`dtype` {dtype} holds Python objects, which a buffer of bytes cannot: use np.empty(shape, object)")
    return sizes, dtype, prod(map(int, sizes)) * dtype.itemsize


def size_class(nbytes: int) -> int:
    """Capacity of a new buffer: few different ones per power of two, so that what comes back fits what is asked next."""
    power = 1 << max(0, (nbytes - 1).bit_length() - 1)  # nbytes lies in (power, 2 power]
    step = max(ALIGNMENT, power // FRESH_STEPS)
    return max(1, -(-nbytes // step)) * step


def buffer_bytes(nbytes: int) -> int:
    """Bytes of a new buffer for an array of ``nbytes``."""
    return size_class(nbytes) + ALIGNMENT


_shared = MemoryManager()


def get_memory_manager() -> MemoryManager:
    """The manager that this process shares."""
    return _shared


def get_memory_stats() -> dict[str, float | int]:
    """Statistics of the shared manager; see `MemoryManager.get_memory_stats`."""
    return _shared.get_memory_stats()


def clear_memory_pool() -> None:
    """Clear the pool of the shared manager."""
    _shared.clear_pool()
