"""Buffers that start on a cache line, lent from a pool, and reservations of memory among threads.

XLA takes a NumPy array without a copy if it starts on a 64-byte line, and the first touch of fresh memory costs more than
all later ones, so returned buffers are kept. A buffer is a flat uint8 array. The lent array is a view of it; arrays that the
user derives from it keep the buffer alive.

The memory available to a thread is what the system and the pool's own limit leave, plus the free buffers, which can be freed
at any time, minus the unused reservations of other threads. Memory that they allocate elsewhere (``np.empty``) within a
reservation counts twice, so the result errs on the safe side.
"""

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..base.text import size
from .machine import available_memory, detect_total_system_memory

ALIGNMENT = 64  # bytes
FRESH_STEPS = 64  # capacities per power of two: a new buffer is at most 1/64 longer than asked for, or a line
REUSE_WASTE = 4  # a free buffer serves what fills all but 1/4 of it
MOST_FREE = 100  # buffers that are kept
FREE_SHARE = 0.25  # most of all memory that they take
LOOK_BYTES = 2**26  # of new memory, after which the system is asked again how much there is, which takes 0.5 ms
COLLECT_SECONDS = 1.0  # least time between garbage collections, which take 0.1 s where JAX is loaded


@dataclass(eq=False)
class Reservation:
    """Bytes that a thread will need; buffers lent on it are part of them."""

    nbytes: float = 0.0


class Loan(NamedTuple):
    """A buffer in the hands of a user."""

    array: weakref.ref  # of what was lent
    capacity: int
    reservation: Reservation | None  # on which it was lent


class Pool:
    """Aligned arrays and reservations, of ``limit`` bytes together at most; safe to share between threads.

    ``pressure`` is the share of all memory in use above which free buffers are let go and garbage is collected.
    """

    def __init__(self, limit: float = np.inf, pressure: float = 0.8):
        self.limit, self.pressure = limit, pressure
        # The garbage collector may run a finalizer that gives an array back while this thread is in here. So the lock lets
        # the same thread in again, and a buffer enters or leaves `free` and `loans` in one indivisible step.
        self.changed = threading.Condition(threading.RLock())
        self.free: dict[int, np.ndarray] = {}  # buffers by identity
        self.loans: dict[int, Loan] = {}  # by the identity of the buffer
        self.reservations: dict[int, Reservation] = {}  # by thread
        self.waiting: list[int] = []  # threads
        self.counts = Counter(allocations=0, reused=0, requested=0, used=0)
        self.unseen = 0  # bytes of new buffers since the system was asked
        self.collected = -np.inf  # time.monotonic
        self.total = detect_total_system_memory() or np.inf

    def available(self) -> float:
        """Bytes that this thread could take now."""
        with self.changed:
            return max(0.0, self._unlent() - self._reserved(own=False))

    def usage(self) -> float:
        """Share of all memory that is in use: of the system's, or of the limit if that is more."""
        return max(1 - available_memory() / self.total, (self._lent_bytes() + self.free_bytes()) / self.limit)

    def free_bytes(self) -> int:
        buffers = list(self.free.values())
        return sum(map(len, buffers)) - ALIGNMENT * len(buffers)

    # -----------------------------------------------------------------------------------------------------------------
    # reservations

    @contextmanager
    def reserve(self, nbytes: float, wait: bool = False) -> Iterator[None]:
        """Reserve memory for the time of a block; reservations within one of the same thread are part of it.

        MemoryError where there is less. With ``wait``, where other threads' reservations alone stand in the way, wait until
        they end; first come, first served. A thread that holds a reservation never waits, or two could wait for each other.
        """
        thread = threading.get_ident()
        with self.changed:
            outermost = thread not in self.reservations
            reservation = self.reservations.get(thread, Reservation())
            extra = max(0.0, nbytes - reservation.nbytes)
            if wait and outermost:
                self._wait_for(nbytes)
            if extra:
                self._make_room(extra + self._reserved(own=True))
            reservation.nbytes += extra
            self.reservations[thread] = reservation
        try:
            yield
        finally:
            with self.changed:
                reservation.nbytes -= extra
                if outermost:
                    del self.reservations[thread]
                self.changed.notify_all()

    def _wait_for(self, nbytes: float) -> None:
        """Wait until it is this thread's turn and ``nbytes`` are there, or never will be."""
        thread = threading.get_ident()

        def decided():
            if self.waiting[0] != thread:
                return False
            unlent = self._unlent()
            held = sum(each.nbytes for each in self.reservations.values())  # comes back, in use or not
            return nbytes <= unlent - self._reserved(own=False) or nbytes > min(unlent + held, self.limit)

        self.waiting.append(thread)
        try:
            self.changed.wait_for(decided)
        finally:
            self.waiting.remove(thread)
            self.changed.notify_all()

    def _reserved(self, own: bool) -> float:
        """Bytes that this thread, or all others, have reserved and not yet been lent."""
        reservations = [each for thread, each in self.reservations.items() if (thread == threading.get_ident()) is own]
        return sum(max(0.0, each.nbytes - self._lent_bytes(each)) for each in reservations)

    def _unlent(self) -> float:
        """Bytes that the system and the limit leave, reservations apart."""
        return min(available_memory() + self.free_bytes(), self.limit - self._lent_bytes())

    def _lent_bytes(self, reservation: Reservation | None = None) -> int:
        """Capacity of the buffers that are lent, on ``reservation`` or in all."""
        loans = list(self.loans.values())
        return sum(loan.capacity for loan in loans if reservation is None or loan.reservation is reservation)

    def _make_room(self, nbytes: float) -> None:
        """See to it that this thread can take ``nbytes``; free buffers count as available, so they make way."""
        if (short := nbytes > self.available()) or self.usage() > self.pressure:
            self.shrink()
            if short or time.monotonic() - self.collected > COLLECT_SECONDS:
                gc.collect()
                self.collected = time.monotonic()
        available, reserved = self.available(), self._reserved(own=False)
        if nbytes > available:
            held = f" ({size(reserved)} are reserved by other threads)" if reserved else ""
            raise MemoryError(
                f"{size(nbytes)} are needed, {size(available)} available{held}, {size(nbytes - available)} missing: take "
                'fewer points at once (strategy "chunked" or "streaming"), or a machine with more memory'
            )
        self.shrink(MOST_FREE, available - nbytes)

    # -----------------------------------------------------------------------------------------------------------------
    # arrays

    def lend(self, shape: int | tuple[int, ...], dtype=np.float64, zero: bool = True) -> np.ndarray:
        """A C-ordered array that starts on a 64-byte line; it holds anything unless ``zero``.

        MemoryError if there is less memory; TypeError or ValueError for invalid shapes, and dtypes of objects.
        """
        like = np.broadcast_to(np.zeros((), dtype), shape)  # has its shape, dtype and number of bytes, and takes none
        if like.dtype.hasobject:
            raise TypeError(f"`dtype` {like.dtype} holds Python objects, which a buffer cannot: use np.empty(shape, object)")
        with self.changed:
            buffer = self._fitting(like.nbytes)
            reused = buffer is not None
            if buffer is None:
                buffer = self._fresh(size_class(like.nbytes), zero)
            array = np.ndarray(like.shape, like.dtype, buffer, offset=-buffer.ctypes.data % ALIGNMENT)
            capacity, reservation = len(buffer) - ALIGNMENT, self.reservations.get(threading.get_ident())
            self.loans[id(buffer)] = Loan(weakref.ref(array), capacity, reservation)
            self.counts.update(allocations=1, reused=reused, requested=like.nbytes, used=capacity)
        if zero and reused:
            array[...] = np.zeros((), dtype)
        return array

    def _fitting(self, nbytes: int) -> np.ndarray | None:
        """The smallest free buffer that holds ``nbytes`` without wasting more than a quarter of it."""
        largest = max(nbytes * REUSE_WASTE // (REUSE_WASTE - 1), size_class(nbytes))
        fitting = [each for each in list(self.free.values()) if nbytes <= len(each) - ALIGNMENT <= largest]
        return self.free.pop(id(min(fitting, key=len, default=None)), None)

    def _fresh(self, capacity: int, zero: bool) -> np.ndarray:
        self.unseen += capacity
        if self.unseen >= LOOK_BYTES or np.isfinite(self.limit):
            self._make_room(capacity)
            self.unseen = 0
        buffer = (np.zeros if zero else np.empty)(capacity + ALIGNMENT, np.uint8)
        weakref.finalize(buffer, self.loans.pop, id(buffer), None)  # if it is dropped instead of being given back
        return buffer

    def take_back(self, array: np.ndarray) -> None:
        """Keep the buffer of an array for the next one: neither it nor a view of it may be used any longer.

        Results that JAX still computes from it must have arrived (``block_until_ready``). An array that is dropped
        instead is not reused, and its memory goes with the last view of it.
        """
        buffer: Any = getattr(array, "base", None)
        with self.changed:
            loan = self.loans.get(id(buffer))
            if loan is None or loan.array() is not array:
                raise ValueError(
                    "the array was freed before, is a view of one, or was not allocated by this MemoryManager: free each "
                    "allocated array itself, once"
                )
            del self.loans[id(buffer)]
            self.free[id(buffer)] = buffer
            self.shrink(MOST_FREE, FREE_SHARE * min(self.total, self.limit))
            self.changed.notify_all()

    def shrink(self, n_buffers: int = 0, nbytes: float = np.inf) -> None:
        """Keep the largest free buffers, at most ``n_buffers`` and ``nbytes``."""
        with self.changed:
            while self.free and (len(self.free) > n_buffers or self.free_bytes() > nbytes):
                self.free.pop(id(min(list(self.free.values()), key=len, default=None)), None)


def size_class(nbytes: int) -> int:
    """Capacity of a new buffer: few different ones per power of two, so that what comes back fits what is asked next."""
    power = 1 << max(0, (nbytes - 1).bit_length() - 1)  # nbytes lies in (power, 2 power]
    step = max(ALIGNMENT, power // FRESH_STEPS)
    return max(1, -(-nbytes // step)) * step


def buffer_bytes(nbytes: int) -> int:
    """Bytes of a new buffer for an array of ``nbytes``."""
    return size_class(nbytes) + ALIGNMENT


shared_pool = Pool()  # of the fits of this process
