"""Blocks of points: how operands lie in memory, how long blocks and tiles are, and how a kernel reads them."""

import functools
import operator
from math import ceil, floor
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from .kind import Kind

Reduction = Literal["gram", "qr"]
JacMode = Literal["columns", "arguments"]
MIN_TILE = 256  # points; below, the loop itself costs more than the cache saves


class Layout(NamedTuple):
    """How an operand lies in memory: the part of the kernel that is code.

    ``dense`` operands have one element per point; others ("un-broadcast": an axis vector, a detector mask for all
    frames, a scalar) are looked up by the point's place along the axes of the chunk.
    """

    dense: bool
    integer: bool = False  # keep integers (as int64), so that the model can index a table
    scale: float = 1.0  # a value is ``stored * scale + offset``
    offset: float = 0.0

    def decoded(self, stored):
        """Values of what is stored, as float64; NumPy or JAX."""
        values = stored.astype("float64")
        return values if (self.scale, self.offset) == (1.0, 0.0) else values * self.scale + self.offset


class Invalid(NamedTuple):
    """Invalid stored values of y: single ones, and those below ``low`` or above ``high``."""

    values: tuple[float, ...]
    low: float | None
    high: float | None

    def hits(self, y):
        """Where ``y`` holds such a value; NumPy or JAX."""
        as_stored, (values, low, high) = y.dtype.type, self.of(y.dtype)
        tests = [y != y if value != value else y == as_stored(value) for value in values]
        tests += [y < as_stored(low)] if low is not None else []
        tests += [y > as_stored(high)] if high is not None else []
        return functools.reduce(operator.or_, tests) if tests else np.zeros(y.shape, bool)

    def of(self, dtype: np.dtype) -> "Invalid":
        """The same values and limits as numbers that ``dtype`` holds, without those that none of its values can meet.

        Comparisons take place in the dtype: integers of 64 bits have no common type with floats, nor with Python's integers.
        """
        if dtype.kind not in "biu":
            with np.errstate(over="ignore"):
                values = tuple(float(dtype.type(each)) for each in self.values)
                low, high = (None if each is None else float(dtype.type(each)) for each in (self.low, self.high))
            return Invalid(values, low, high)
        least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        values = tuple(int(each) for each in self.values if least <= each <= most and each == int(each))  # false for nan
        low, high = self.low, self.high
        if (low is not None and low > most) or (high is not None and high < least):
            return Invalid(values, most, least)  # no value counts
        low = None if low is None or low <= least else ceil(low)
        high = None if high is None or high >= most else floor(high)
        return Invalid(values, low, high)


class Layouts(NamedTuple):
    """Operands of a block, in this order: y, sigma, mask or None, then the coordinates."""

    y: Layout
    sigma: Layout
    mask: Layout | None
    x: tuple[Layout, ...]
    x_kind: Literal["single", "stacked", "tuple", "none"]
    x_lead: tuple[int, ...]  # leading axes of a stacked x: (k,) for SciPy's (k, M)
    ndim: int  # axes of the chunk; those are one that need not be told apart
    invalid: Invalid | None = None

    @property
    def operands(self):
        return (self.y, self.sigma, *([self.mask] if self.mask else []), *self.x)


class Block(NamedTuple):
    """``n`` consecutive points (C order) of one chunk, or of a run of small ones, which fill a box.

    Each buffer is flat; point q of the block is element ``offset + q`` of a dense one. For an un-broadcast operand the
    flat index of the point within the chunk, ``base + q``, is split into places along the axes of the chunk and joined
    with the operand's own strides (0 along axes that it does not have).
    """

    geometry: np.ndarray  # int64: n, base, then per operand: offset, stride along each axis of the chunk
    shape: np.ndarray  # float64 (ndim,): sizes of the axes of the chunk
    buffers: tuple[np.ndarray, ...]
    clean: Literal[True] | None = None  # no value of y is invalid, so that none needs to be looked for


class KernelSpec(NamedTuple):
    """Everything that needs a compilation of its own; ``tile`` None means that the whole block is one tile."""

    layouts: Layouts
    reduction: Reduction
    jac_mode: JacMode
    loss: str
    tile: int | None
    whitened: bool = False  # the last buffer of a block is the Cholesky factor L of the covariance of y
    parts: int = 0  # at most this many runs of consecutive points, whose sums are returned beside those of the block
    together: int = 1  # tiles that are evaluated together, where each is a part
    pairs: bool = False  # the gram matrix is a sum for each pair of rows
    reflected: bool = True  # the factor is by reflections, else by Cholesky's factorisation


def tile_size(kind: Kind, n_params: int, capacity: int) -> int:
    """Points per tile: the rows [J r] of a tile fit in cache, and a tile is not longer than the block."""
    fitting = 2 ** int(np.log2(kind.tile_bytes // (8 * (n_params + 1))))
    return min(max(MIN_TILE, min(kind.longest_tile, fitting)), capacity)


def assemble_x(layouts: Layouts, coordinates):
    """What the model gets as x, of a list of (n,) arrays: (n,), (*lead, n), a tuple of (n,) arrays, or None."""
    match layouts.x_kind:
        case "none":
            return None
        case "single":
            return coordinates[0]
        case "stacked":
            return jnp.stack(coordinates).reshape(*layouts.x_lead, -1)
        case "tuple":
            return tuple(coordinates)


class Tile:
    """Operands of ``length`` consecutive points from ``first`` on."""

    def __init__(self, layouts: Layouts, block: Block, first, length: int):
        self.layouts, self.block, self.first, self.length = layouts, block, first, length

    def y(self):
        return self._read(0, self.layouts.y)

    def sigma(self):
        return self._read(1, self.layouts.sigma)

    def hidden(self):
        """Which points are left out, by the mask or by their value; None where none ever are."""
        parts = []
        if self.layouts.mask is not None:
            parts.append(self._read(2, self.layouts.mask))
        if self.layouts.invalid is not None:
            parts.append(self.layouts.invalid.hits(self._stored(0, self.layouts.y)))
        if not parts:
            return None
        # A branch that is always taken: else XLA looks each point up again in the loop over the rows [J r], which then does
        # not use the vector units (2.5 times slower with axis vectors as coordinates).
        hidden = functools.reduce(jnp.logical_or, parts)
        return lax.cond(self.block.geometry[0] >= 0, lambda hidden: hidden, jnp.zeros_like, hidden)

    def x(self):
        begin = 2 + (self.layouts.mask is not None)
        return assemble_x(self.layouts, [self._read(begin + k, layout) for k, layout in enumerate(self.layouts.x)])

    def _read(self, k, layout):
        values = self._stored(k, layout)
        if layout is self.layouts.mask:
            return values
        return values.astype(jnp.int64) if layout.integer else layout.decoded(values)

    def _stored(self, k, layout):
        buffer, ndim = self.block.buffers[k], self.layouts.ndim
        offset = self.block.geometry[2 + k * (1 + ndim)]
        if layout.dense:
            return lax.dynamic_slice(buffer, (offset + self.first,), (self.length,))
        if buffer.shape == (1,):
            return jnp.broadcast_to(buffer[0], (self.length,))
        strides = self.block.geometry[3 + k * (1 + ndim) : 2 + (k + 1) * (1 + ndim)]
        index = sum(place * stride for place, stride in zip(self._places(), strides, strict=True))
        # 32 bits where they are enough: vector units convert to those only
        index = index.astype(jnp.int32 if len(buffer) < 2**31 else jnp.int64)
        return buffer.at[index].get(mode="clip")  # behind the last point: some element

    def _places(self):
        """Place of each point along each axis of the chunk, as float64.

        Quotients are exact: (q + 1/2) / size is at least 1/(2 size) away from an integer, so that the floor is right up to
        q = 2^51, and unlike integer division it uses the vector units.
        """
        q = (self.block.geometry[1] + self.first).astype(jnp.float64) + jnp.arange(self.length, dtype=jnp.int32)
        places = []
        for axis in reversed(range(1, self.layouts.ndim)):
            size = self.block.shape[axis]
            quotient = jnp.floor((q + 0.5) * (1.0 / size))
            places.append(q - quotient * size)
            q = quotient
        return [q, *reversed(places)]
