"""Buffers that start on a cache line, lent as arrays and reused.

XLA takes a NumPy array without a copy if it starts on a 64-byte line, and the first touch of fresh memory costs more
than all later ones, so buffers that come back are kept. A buffer is a flat uint8 array; the array that is lent is the
one view of it that has been registered, and whatever the user derives from that keeps the buffer alive, not the pool.
"""

import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from operator import index
from typing import NamedTuple

import numpy as np

ALIGNMENT = 64  # bytes
FRESH_STEPS = 8  # capacities per power of two: a new buffer is at most 1/8 longer than asked for, or a line
REUSE_WASTE = 4  # a pooled one serves what fills all but 1/4 of it


def array_bytes(shape, dtype) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and bytes of an array that a buffer can hold.

    Raises
    ------
    TypeError
        Sizes that are no integers; a dtype that holds Python objects.
    ValueError
        Negative sizes.
    """
    sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
    try:
        sizes = tuple(index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"`shape` must be an integer or a tuple of integers, not {shape!r}") from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"`shape` must not be negative, got {sizes}")
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise TypeError(f"`dtype` {dtype} holds Python objects, which a buffer of bytes cannot: use np.empty(shape, object)")
    return sizes, dtype, prod(sizes) * dtype.itemsize


def size_class(nbytes: int) -> int:
    """Capacity of a new buffer: one of eight per power of two, so that what comes back fits what is asked next."""
    power = 1 << max(0, (nbytes - 1).bit_length() - 1)  # nbytes lies in (power, 2 power]
    step = max(ALIGNMENT, power // FRESH_STEPS)
    return max(1, -(-nbytes // step)) * step


def new_buffer(capacity: int, zero: bool = False) -> np.ndarray:
    """Flat uint8 buffer with a whole ``capacity`` from its first cache line on."""
    return (np.zeros if zero else np.empty)(capacity + ALIGNMENT, np.uint8)


def capacity_of(buffer: np.ndarray) -> int:
    return buffer.size - ALIGNMENT


def first_line(buffer: np.ndarray) -> int:
    """Offset of the first cache line."""
    return -buffer.ctypes.data % ALIGNMENT


@dataclass(eq=False)
class Account:
    """Bytes that are lent on it."""

    taken: int = 0


class Loan(NamedTuple):
    """A buffer in the hands of a user, kept track of without keeping it alive."""

    array: weakref.ref  # the array that was lent
    buffer: weakref.ref  # dies with the last view of it
    capacity: int
    account: Account


class BufferPool:
    """Buffers that were given back, and loans of those that were not.

    Its user holds a lock around each call, and lets the same thread in again: a finalizer may free an array at any time.
    """

    def __init__(self):
        self._free: dict[int, list[np.ndarray]] = {}  # by capacity
        self._loans: dict[int, Loan] = {}  # by the identity of the buffer
        self._died: deque[tuple[int, weakref.ref]] = deque()  # filled by the garbage collector, at any time
        self.lent = Account()

    @property
    def n_free(self) -> int:
        return sum(len(buffers) for buffers in list(self._free.values()))

    @property
    def free_bytes(self) -> int:
        return sum(capacity * len(buffers) for capacity, buffers in list(self._free.items()))

    def take(self, nbytes: int) -> np.ndarray | None:
        """The smallest free buffer that holds ``nbytes`` without wasting more than a quarter of it."""
        largest = max(nbytes * REUSE_WASTE // (REUSE_WASTE - 1), size_class(nbytes))
        for capacity in sorted(capacity for capacity in list(self._free) if nbytes <= capacity <= largest):
            with suppress(KeyError, IndexError):  # a finalizer may come in between
                return self._free[capacity].pop()
        return None

    def lend(self, buffer: np.ndarray, shape, dtype: np.dtype, account: Account) -> np.ndarray:
        """The array of ``shape`` at the beginning of ``buffer``."""
        self.settle()
        array = np.ndarray(shape, dtype, buffer=buffer, offset=first_line(buffer))
        key = id(buffer)
        died = weakref.ref(buffer, lambda dead: self._died.append((key, dead)))
        self._loans[key] = Loan(weakref.ref(array), died, capacity_of(buffer), account)
        self.lent.taken += capacity_of(buffer)
        account.taken += capacity_of(buffer)
        return array

    def take_back(self, array: np.ndarray) -> None:
        """End the loan of ``array`` and keep its buffer.

        Raises
        ------
        ValueError
            Where it is no array that is lent now.
        """
        self.settle()
        buffer = getattr(array, "base", None)
        loan = self._loans.get(id(buffer))
        if loan is None:
            raise ValueError("the array was freed before, or was not allocated by this MemoryManager: free each array once")
        if loan.array() is not array:
            raise ValueError(
                "a view of an allocated array, or an array freed before, cannot be freed: free the array itself"
            )
        self._end(id(buffer))
        self._free.setdefault(loan.capacity, []).append(buffer)

    def settle(self) -> None:
        """End the loans whose arrays were dropped by the user."""
        with suppress(IndexError):
            while True:
                key, dead = self._died.popleft()
                if key in self._loans and self._loans[key].buffer is dead:
                    self._end(key)

    def _end(self, key):
        loan = self._loans.pop(key)
        self.lent.taken -= loan.capacity
        loan.account.taken -= loan.capacity

    def keep_largest(self, n_buffers: int, nbytes: float) -> None:
        """Let free buffers go, the smallest first, until at most ``n_buffers`` of ``nbytes`` together remain."""
        n_free, free_bytes = self.n_free, self.free_bytes
        for capacity in sorted(self._free):
            buffers = self._free.get(capacity, [])
            while buffers and (n_free > n_buffers or free_bytes > nbytes):
                buffers.pop()
                n_free, free_bytes = n_free - 1, free_bytes - capacity
            if not buffers:
                self._free.pop(capacity, None)
