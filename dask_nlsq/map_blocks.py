"""The data of a map as blocks of pixels, and what a task does with one: read, fit, return.

The blocks are those of the data along the map axes. Along the fit axes a block has to be whole, so where the data are
cut there (one chunk per energy, say) they are joined first: all at once where they fit in memory, so that each chunk is
read once, and else in as few *bands* of the map's first axis as memory allows, each of which reads all chunks.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, prod
from typing import Any, NamedTuple

import dask.array as da
import jax
import numpy as np

from .admission import open_data
from .arguments import (
    accuracy_wanted,
    axes_of,
    likelihood,
    limit,
    map_parameters,
    ready_model,
    tolerance,
)
from .budget import GB, effective_fraction, positive
from .chunks import check_integers
from .config import threads
from .environment import size
from .inputs import Coordinates, as_array, invalid_values, unmasked
from .kernels import Layout, Layouts, assemble_x, check_model, check_pointwise, choose_jac_mode
from .labels import coordinates_of, labelled
from .map_solver import Fitted, Pixels, map_kernel
from .map_step import LANE_POINTS, Limits, MapSpec
from .model import Model, advice, function_name, intern
from .plan import MemoryBudgetError, several
from .resources import active_client, available_memory, workers_memory
from .store import Policy, Stored
from .trf_jit import float64

BLOCK_VALUES = 2**22  # of y in one task: a few hundred milliseconds, and 16 bytes each beside those that are read
SPLIT_VALUES = 2**19  # of y that is in memory already: enough tasks for the threads
JOINING = 2.5  # times the data, while chunks along the fit axes are joined: as they come, their pieces, the blocks
WORKING = 24  # bytes for each value of a block that is being fitted
_first_call = threading.Lock()


@dataclass(frozen=True)
class MapPlan:
    """How a map will be fitted. Sizes in bytes.

    Attributes
    ----------
    n_pixels, n_points, n_params, n_blocks : int
        Pixels of the map, points of each, parameters, tasks.
    n_bands : int
        Parts of the map that are fitted one after the other; each reads all chunks of the data that it touches.
    read_bytes : int
        That will be read: the data as they are stored, times the bands where chunks along the fit axes are joined.
    peak_bytes : int
        Predicted for the data of all threads.
    reason : str
    """

    n_pixels: int
    n_points: int
    n_params: int
    n_blocks: int
    n_bands: int
    read_bytes: int
    peak_bytes: int
    reason: str

    def explain(self) -> None:
        """Print the plan, which is also ``str(plan)``."""
        print(self)

    def __str__(self):
        bands = several(self.n_bands, "band")
        return "\n".join(
            [
                f"map      {self.n_pixels:,} pixels of {self.n_points:,} points; {several(self.n_params, 'parameter')}",
                f"blocks   {self.n_blocks:,} in {bands}: {self.reason}",
                f"reads    {size(self.read_bytes)}",
                f"memory   {size(self.peak_bytes)} for data",
            ]
        )


class Operand(NamedTuple):
    """An argument along the axes of y: sizes 1 where it does not have them."""

    array: Any
    last: int = 0  # further axes at the end: 1 for parameters


@dataclass(frozen=True)
class BlockFit:
    """What a task does with the arrays of a block."""

    model: Model
    spec: MapSpec
    limits: Limits
    fit_axes: tuple[int, ...]
    capacity: int  # pixels that a block is filled up to, so that one compilation serves all
    x: tuple[np.ndarray | None, ...]  # (n,) each; None: comes with the block
    dtype: np.dtype
    raises: bool  # where values are not finite

    def __call__(self, y, sigma, mask, start, lower, upper, *own) -> np.ndarray:
        shape = tuple(s for k, s in enumerate(y.shape) if k not in self.fit_axes)
        rest = iter(own)
        x = tuple(self._rows(next(rest), shape) if c is None else c[None] for c in self.x)
        y, sigma, mask = self._rows(y, shape), self._rows(sigma, shape), self._rows(mask, shape)
        vectors = [self._vectors(each, shape) for each in (start, lower, upper)]
        self._check(y, sigma, mask, x, *vectors[1:])
        n_pixels, others = len(y), (sigma, mask, x, *vectors)
        others = jax.tree.map(lambda each: each if len(each) == 1 else self._filled(each), others)  # 1: shared
        pixels = Pixels(self._filled(y), *others)
        with float64():
            kernel = map_kernel(self.model, self.spec)
            shapes = tuple((each.shape, each.dtype.str) for each in jax.tree.leaves(pixels))
            known = ("map compiled", self.spec, shapes)
            with nullcontext() if known in self.model.choices else _first_call:  # two threads would both compile
                found = jax.tree.map(np.asarray, kernel(pixels, n_pixels, self.limits))
            self.model.choices[known] = True
        return self._record(Fitted(*(each[:n_pixels] for each in found))).reshape(shape)

    def _rows(self, array, shape):
        """(pixels or 1, n or 1) of an array with y's axes."""
        n_fit = len(self.fit_axes)
        array = np.moveaxis(array, self.fit_axes, range(-n_fit, 0))
        own, along = array.shape[: array.ndim - n_fit], array.shape[array.ndim - n_fit :]
        if prod(own) > 1:
            array = np.broadcast_to(array, (*shape, *along))
        return np.ascontiguousarray(array.reshape(-1, prod(along)))

    def _vectors(self, array, shape):
        """(pixels or 1, parameters)."""
        if array.ndim == 1:
            return array[None]
        array = np.squeeze(array, axis=self.fit_axes)
        if prod(array.shape[:-1]) > 1:
            array = np.broadcast_to(array, (*shape, array.shape[-1]))
        return np.ascontiguousarray(array.reshape(-1, array.shape[-1]))

    def _filled(self, array):
        missing = self.capacity - len(array)
        return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

    def _check(self, y, sigma, mask, x, lower, upper):
        if not np.all(lower < upper):
            raise ValueError(
                f"Each lower bound must be strictly less than each upper bound: {int(np.sum(~(lower < upper)))} are not, in "
                "one block; to hold a parameter use fixed="
            )
        if np.any((sigma <= 0) & ~mask):
            raise ValueError(
                "`sigma` must be positive: there are values that are zero or negative; use mask= to leave out points"
            )
        if self.spec.loss == "poisson" and np.any((y < 0) & ~mask):
            raise ValueError("loss='poisson' is for counts: there are negative values in `ydata`; mask= leaves points out")
        for c in x:
            check_integers(c, mask, "in one block")
        if self.raises:
            for name, array in (("ydata", y), ("sigma", sigma), *(("xdata", c) for c in x)):
                bad = int(np.sum(~np.isfinite(array) & ~mask))
                if bad:
                    raise ValueError(
                        f"The input contains nan or infinity: {bad} of the values of `{name}` in one block. "
                        'nan_policy="omit" leaves these points out'
                    )

    def _record(self, found: Fitted) -> np.ndarray:
        record, free = np.zeros(len(found.chi2), self.dtype), list(self.spec.free)
        record["popt"], record["chi2"], record["n_points"] = found.popt, found.chi2, found.n_points
        record["nfev"], record["status"], record["distance"] = found.nfev, found.status, found.distance
        record["at_bound"][:, free] = found.at_bound
        failed = np.isnan(found.chi2)
        record["perr"][failed] = np.nan
        with np.errstate(invalid="ignore"):
            record["perr"][:, free] = np.sqrt(np.diagonal(found.pcov, axis1=1, axis2=2))
        if "pcov" in self.dtype.names:
            record["pcov"][failed] = np.nan
            record["pcov"][:, np.array(free)[:, None], free] = found.pcov
        return record


def record_dtype(n_params: int, full_covariance: bool) -> np.dtype:
    """Of what a pixel gets, in one array, so that reading, fitting and returning are one task."""
    p = (n_params,)
    fields = [("popt", "f8", p), ("perr", "f8", p), ("chi2", "f8"), ("n_points", "i4"), ("nfev", "i4")]
    fields += [("distance", "f8"), ("status", "u1"), ("at_bound", "i1", p)]
    return np.dtype(fields + [("pcov", "f8", 2 * p)] * full_covariance)


@dataclass(frozen=True)
class MapProblem:
    """Aligned operands of a map, and what its tasks do with them."""

    fit: BlockFit
    y: da.Array
    operands: dict[str, Operand]  # sigma, mask, start, lower, upper, coordinates that come with the pixels
    bands: tuple[slice, ...]  # along the first map axis, of pixels
    blocks: tuple[tuple[int, ...], ...]  # sizes along the map axes
    plan: MapPlan
    names: tuple[str, ...]
    sources: tuple[Stored, ...]  # arrays in stores that y and the others are read from
    coarse: Operand | None = None  # the start of coarse fits, from which those of the pixels come

    @property
    def map_axes(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.y.ndim) if k not in self.fit.fit_axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(sizes) for sizes in self.blocks)

    def with_operands(self, **arrays) -> "MapProblem":
        return replace(self, operands=self.operands | arrays)

    def cut_as(self, blocks) -> "MapProblem":
        """The same in the blocks of an earlier run, and in bands of whole blocks, if possible no higher than planned."""
        most = max(band.stop - band.start for band in self.bands)
        edges, end = [0], 0
        for n in blocks[0] if blocks else ():
            if end > edges[-1] and end + n - edges[-1] > most:
                edges.append(end)
            end += n
        bands = tuple(slice(a, b) for a, b in pairwise([*edges, end])) if blocks else self.bands
        fit = replace(self.fit, capacity=_capacity(blocks, self.plan.n_points))
        return replace(self, fit=fit, bands=bands, blocks=blocks)

    def records(self) -> da.Array:
        """One record for each pixel, chunked like the map."""
        parts = [self.band(band) for band in self.bands]
        return parts[0] if len(parts) == 1 else da.concatenate(parts)

    def band(self, rows: slice) -> da.Array:
        """Records of some rows of the map, which end where blocks do."""
        axes, arguments = self.map_axes, []
        for operand in (Operand(self.y), *self.operands.values()):
            arguments += self.part(operand, rows)
        return da.blockwise(
            self.fit,
            axes,
            *arguments,
            dtype=self.fit.dtype,
            meta=np.empty((0,) * len(axes), self.fit.dtype),
            concatenate=True,
            align_arrays=False,
            token="nlsq-map",
        )

    def part(self, operand: Operand, rows: slice) -> tuple[Any, tuple[int, ...] | None]:
        """An operand on some rows of the map, in its blocks, and its axes as `blockwise` counts them."""
        array, last = operand
        axes, want = self.map_axes, {}
        if array.ndim == last or (isinstance(array, np.ndarray) and all(array.shape[k] == 1 for k in axes) and axes):
            return array, None  # the same for all pixels
        for place, (k, sizes) in enumerate(zip(axes, self.blocks, strict=True)):
            if array.shape[k] == 1:
                want[k] = (1,)
            elif place == 0:
                ends = np.cumsum(sizes)
                want[k] = tuple(n for n, end in zip(sizes, ends, strict=True) if rows.start < end <= rows.stop)
            else:
                want[k] = sizes
        if axes and array.shape[axes[0]] > 1:
            array = array[(slice(None),) * axes[0] + (rows,)]
        want |= {k: array.shape[k : k + 1] for k in range(array.ndim) if k not in axes}
        if not isinstance(array, da.Array):
            array = da.from_array(array, chunks=tuple(want[k] for k in range(array.ndim)), name=False)
        return array.rechunk(want), tuple(range(array.ndim))


def build_map(
    f: Callable,
    xdata: Any,
    ydata: Any,
    p0,
    *,
    axis,
    sigma,
    absolute_sigma,
    bounds,
    mask,
    nan_policy,
    loss,
    f_scale,
    ftol,
    xtol,
    gtol,
    accuracy,
    max_nfev,
    param_names,
    fixed,
    full_covariance,
    mask_values,
    valid_range,
    strategy,
    jac_mode,
    memory_limit_gb,
) -> MapProblem:
    """Check the arguments of `dask_nlsq.fit_map` and align the data; reads none of them."""
    if likelihood(loss, sigma)[1]:
        raise ValueError("sigma='poisson' is for `curve_fit`: in a map use loss='poisson', which has the same parameters")
    if nan_policy not in ("omit", "raise"):
        raise ValueError(f"`nan_policy` must be 'omit' or 'raise', not {nan_policy!r}")
    ydata, hidden = unmasked(ydata, None)
    dims = getattr(ydata, "dims", None)
    if labelled(ydata):
        xdata = coordinates_of(xdata, ydata, axes_of(axis, dims, len(dims)))
    as_given = dict(xdata=xdata, ydata=ydata, sigma=sigma, mask=mask)
    data, stored, rules = open_data(as_given, Policy(), mask_values, valid_range)
    y = as_array("ydata", data["ydata"])
    if y.size == 0:
        raise ValueError("`ydata` must not be empty!")
    fit_axes = axes_of(axis, dims, y.ndim)
    map_axes = tuple(k for k in range(y.ndim) if k not in fit_axes)
    map_shape, n = tuple(y.shape[k] for k in map_axes), prod(y.shape[k] for k in fit_axes)

    p0, bounds, guesses = ready_model(f, p0, bounds, param_names)
    p0 = f.guess if guesses and p0 is None else p0
    names, free, start, lower, upper, guess = map_parameters(f, p0, bounds, param_names, fixed, map_shape)
    model, p = intern(f), len(free)
    coordinates = Coordinates.of(data["xdata"], y.shape, fit_axes)
    layouts = Layouts(
        y=Layout(True),
        sigma=Layout(True),
        mask=Layout(True),
        x=tuple(Layout(True, coordinates.kind == "tuple" and c.dtype.kind in "iu") for c in coordinates.arrays),
        x_kind=coordinates.kind,
        x_lead=coordinates.lead,
        ndim=1,
        invalid=invalid_values(*rules["sentinels"], y.dtype),
    )
    check_model(model, layouts, n, len(names))
    if guess is not None:
        _check_guess(guess, layouts, n, names)
    shared = coordinates.shared(fit_axes)
    if jac_mode == "auto" and not any(each is None for each in shared):
        known = [guess is None and not isinstance(each, da.Array) for each in start]
        check = np.array([np.asarray(v).flat[0] if k else 1.0 for v, k in zip(start, known, strict=True)])
        check_pointwise(model, layouts, tuple(c.astype(float) for c in shared), check)
    spec = MapSpec(
        layouts=layouts,
        free=free,
        bounded=any(isinstance(each, da.Array) or np.any(np.isfinite(each)) for each in (*lower, *upper)),
        # not timed: a map that goes on after a break must get the same bits
        jac_mode=choose_jac_mode(model, layouts, (), np.ones(p), 0) if jac_mode == "auto" else jac_mode,
        loss=loss,
        absolute_sigma=bool(absolute_sigma) or loss == "poisson",
        guess=guess,
    )
    limits = Limits(
        tolerance("ftol", ftol),
        tolerance("xtol", xtol),
        tolerance("gtol", gtol),
        accuracy_wanted(accuracy),
        limit(max_nfev, None) or 100 * p,
        positive("f_scale", f_scale),
    )
    left_out = along("mask", False if data["mask"] is None else data["mask"], y.shape, fit_axes) != 0
    operands = {
        "sigma": Operand(along("sigma", 1.0 if data["sigma"] is None else data["sigma"], y.shape, fit_axes)),
        "mask": Operand(left_out if hidden is None else left_out | hidden),
        "start": over_the_map(start, y.shape, fit_axes),
        "lower": over_the_map(lower, y.shape, fit_axes),
        "upper": over_the_map(upper, y.shape, fit_axes),
    }
    operands |= {f"x{k}": Operand(c) for k, (c, s) in enumerate(zip(coordinates.arrays, shared, strict=True)) if s is None}
    bands, blocks, plan = _plan(y, fit_axes, len(names), strategy, memory_limit_gb)
    fit = BlockFit(
        model=model,
        spec=spec,
        limits=limits,
        fit_axes=fit_axes,
        capacity=_capacity(blocks, n),
        x=shared,
        dtype=record_dtype(len(names), full_covariance),
        raises=nan_policy == "raise",
    )
    return MapProblem(fit, y, operands, bands, blocks, plan, names, tuple(stored))


def _check_guess(guess: Model, layouts: Layouts, n: int, names) -> None:
    """Trace the user's guess of p0, without data."""
    x = [jax.ShapeDtypeStruct((n,), np.int64 if each.integer else np.float64) for each in layouts.x]
    with float64(), advice(guess):
        found = jax.eval_shape(lambda x, y: guess.f(assemble_x(layouts, x), y), x, jax.ShapeDtypeStruct((n,), np.float64))
    count = sum(prod(each.shape) for each in jax.tree.leaves(found))
    if count != len(names):
        raise ValueError(
            f"`p0` is the function {function_name(guess.f)}, which returned {count} values: it must return one for each of "
            f"the {len(names)} parameters, {names}"
        )


def along(name, array, shape, fit_axes):
    """``sigma`` or ``mask`` with as many axes as y: of y's shape, the fit axes' or the map's, or broadcasting to y's."""
    array = as_array(name, array)
    if array.ndim == 0:
        return array.reshape((1,) * len(shape))
    fitted = tuple(n if k in fit_axes else 1 for k, n in enumerate(shape))
    mapped = tuple(1 if k in fit_axes else n for k, n in enumerate(shape))
    ways = set()
    if array.ndim < len(shape) and array.shape == tuple(shape[k] for k in fit_axes):
        ways.add(fitted)
    if array.ndim < len(shape) and array.shape == tuple(n for k, n in enumerate(shape) if k not in fit_axes):
        ways.add(mapped)
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    if len(padded) == len(shape) and all(a in (1, n) for a, n in zip(padded, shape, strict=True)):
        ways.add(padded)
    if len(ways) != 1:
        what = "fits `ydata` in several ways" if ways else "does not fit `ydata`"
        raise ValueError(
            f"`{name}` of shape {array.shape} {what} of shape {shape} with fit axes {fit_axes}: give it as many axes as "
            "ydata, of size 1 where it does not vary"
        )
    return array.reshape(ways.pop())


def over_the_map(values: list[Any], shape, fit_axes) -> Operand:
    """Numbers, or arrays of the map's shape, one for each parameter, as one operand with an axis of parameters."""
    if all(np.ndim(each) == 0 for each in values):
        return Operand(np.array(values, dtype=np.float64), 1)
    mapped = tuple(1 if k in fit_axes else n for k, n in enumerate(shape))
    lib = da if any(isinstance(each, da.Array) for each in values) else np
    return Operand(lib.stack([lib.broadcast_to(lib.reshape(lib.asarray(each), mapped) if np.ndim(each) else each, mapped)
                              for each in values], axis=-1).astype(np.float64), 1)  # fmt: skip


def _capacity(blocks, n):
    """Pixels, of ``n`` points, of the largest block; if it is small a power of 4, which other maps may have compiled for."""
    most = prod(max(sizes) for sizes in blocks)
    few = 4 ** max(3, (most - 1).bit_length() + 1 >> 1)
    return few if few * n <= LANE_POINTS else most


def _plan(y, fit_axes, n_params, strategy, memory_limit_gb):
    """Bands, blocks along the map axes, and the plan."""
    map_axes = [k for k in range(y.ndim) if k not in fit_axes]
    n = prod(y.shape[k] for k in fit_axes)
    lazy = isinstance(y, da.Array)
    chunks = [y.chunks[k] if lazy else (y.shape[k],) for k in map_axes]
    cut = lazy and any(y.numblocks[k] > 1 for k in fit_axes)
    client, fraction = active_client(), effective_fraction()[0]
    may_take = fraction * (sum((workers_memory(client) or {}).values()) if client else available_memory())
    if memory_limit_gb is not None:
        may_take = positive("memory_limit_gb", memory_limit_gb) * GB
    n_threads = sum(client.nthreads().values()) if client else threads()
    value_bytes = WORKING + 2 * y.itemsize
    half = may_take / (2 * n_threads * value_bytes)  # the other half is for what is read
    most = max(1, int(min(BLOCK_VALUES if lazy else SPLIT_VALUES, half)) // n)
    blocks = _split(chunks, most)
    largest = prod(max(sizes) for sizes in blocks) * n
    working = min(n_threads, prod(len(sizes) for sizes in blocks)) * largest * value_bytes
    rows = y.shape[map_axes[0]] if map_axes else 1
    bands, reason = (slice(0, rows),), "as the data are chunked along the map"
    if cut:
        joining, room = JOINING * y.nbytes, may_take - working
        n_bands = ceil(joining / room) if room > 0 else inf
        if n_bands > (1 if strategy in ("standard", "chunked") else rows):
            raise MemoryBudgetError(
                f"joining the chunks of `ydata` along the fit axes takes {size(joining)} at once, beside "
                f"{size(working)} for the blocks; there are {size(may_take)}",
                'raise memory_limit_gb, use strategy="auto", which reads the data several times, or rechunk them on disk',
            )
        reason = f"chunks along the fit axes are joined, which takes {size(joining / n_bands)} of {size(may_take)}"
        height = rows // n_bands
        ends = range(0, rows, height)
        bands = tuple(slice(a, min(a + height, rows)) for a in ends)
        if n_bands > 1:
            chunks[0] = tuple(band.stop - band.start for band in bands)
        blocks = _split(chunks, most)
    elif working > may_take and (lazy or memory_limit_gb is not None):
        raise MemoryBudgetError(
            f"{several(n_threads, 'thread')} with blocks of {size(largest * y.itemsize)} take {size(working)}; there are "
            f"{size(may_take)}",
            "rechunk the map axes into smaller chunks, or raise memory_limit_gb",
        )
    plan = MapPlan(
        n_pixels=y.size // n,
        n_points=n,
        n_params=n_params,
        n_blocks=prod(len(sizes) for sizes in blocks),
        n_bands=len(bands),
        read_bytes=y.nbytes * len(bands),
        peak_bytes=int(working + (joining / len(bands) if cut else 0)),
        reason=reason,
    )
    return bands, tuple(map(tuple, blocks)), plan


def _split(chunks, most: int) -> list[tuple[int, ...]]:
    """Chunks along the map axes, cut so that no block has more than ``most`` pixels; the first axes are cut first."""
    found = [tuple(sizes) for sizes in chunks]
    for k in range(len(found)):
        others = prod(max(sizes) for sizes in found[:k] + found[k + 1 :])
        longest = max(1, most // others)
        if max(found[k]) > longest:
            found[k] = tuple(
                part for n in found[k] for part in (*[longest] * (n // longest), *([n % longest] if n % longest else []))
            )
    return found
