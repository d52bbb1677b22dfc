"""The data of a map as blocks of pixels, and what a task does with one: read, fit, return.

The blocks are those of the data along the map axes. Along the fit axes a block has to be whole, so where the data are
cut there (one chunk per energy, say) they are joined first: all at once where they fit in memory, so that each chunk is
read once, and else in as few *bands* of the map's first axis as memory allows, each of which reads all chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import dask
import jax
import numpy as np
from dask.layers import ArraySliceDep
from dask.system import CPU_COUNT

from ..base.lazy import da
from ..base.warn import warn
from ..base.x64 import float64
from ..data.align import Coordinates, invalid_values
from ..data.arrays import as_array, join_masks, parted
from ..data.cf import Decoding
from ..data.chunks import check_integers, may_be_counts
from ..data.door import NOT_COUNTS, open_data, refuse_scaled, try_model
from ..data.joining import coarser
from ..data.labels import coordinates_of, labelled
from ..data.ranges import by_place
from ..data.store import Policy, Stored
from ..engine.cluster import warn_user
from ..kernels.blocks import Layout, Layouts, assemble_x
from ..kernels.checks import check_pointwise
from ..kernels.jac_mode import choose_jac_mode
from ..kernels.kind import CPU, Kind, devices_here, inherit_device, kind_here
from ..kernels.lane_loop import Fitted, Pixels
from ..kernels.lanes import Limits, MapSpec
from ..kernels.tries import fit_pixels
from ..memory.device import said_if_full
from ..model.function import Model, advice, function_name, held, intern
from ..model.ties import Ties
from ..options import Noise, noise_of
from ..parameters import Parameters, read_parameters
from ..results.uncertainty import spread_out
from .plan import MapPlan, axes_of, capacity, plan_blocks

DERIVED = ("derived", "derived_error")  # of what a pixel gets: quantities that ``expr`` derives

_first_call = threading.Lock()


class Operand(NamedTuple):
    """An argument along the axes of y: sizes 1 where it does not have them."""

    array: Any
    last: int = 0  # further axes at the end: 1 for parameters


class Kept(dict):
    """What a process keeps for other blocks, or other sweeps; it does not travel to other processes."""

    def __reduce__(self):
        return Kept, ()


class _Pixel(NamedTuple):
    """Pixels of a block by their places in the map."""

    shape: tuple[int, ...]  # of the block
    begin: list[int]
    word: str

    def first(self, bad) -> str:
        """Words for the first pixel, along the first axis, where ``bad`` is true."""
        if not self.shape:
            return f"in the only {self.word}"
        k = int(np.argmax(bad.any(axis=1)))
        place = tuple(int(a + b) for a, b in zip(np.unravel_index(k, self.shape), self.begin, strict=True))
        return f"in {self.word} {place}"


class PixelBlock(NamedTuple):
    """The data of a block as the kernels take them: of ``n_pixels`` pixels, and of some that fill it up."""

    pixels: Pixels
    n_pixels: int
    shape: tuple[int, ...]
    kept: Kept

    def on_device(self, kind: Kind) -> Pixels:
        """The pixels, with their data on the device of this thread, where they stay, if it has memory of its own."""
        if not kind.own_memory:
            return self.pixels
        if "pixels" not in self.kept:
            data = {name: jax.device_put(getattr(self.pixels, name)) for name in ("y", "sigma", "mask", "x")}
            self.kept["pixels"] = self.pixels._replace(**data)
        return self.kept["pixels"]


@dataclass(frozen=True)
class BlockFit:
    """What a task does with the arrays of a block."""

    model: Any  # Model; None where arrays are only gathered
    spec: MapSpec
    limits: Limits
    fit_axes: tuple[int, ...]
    capacity: int  # pixels that a block is filled up to, so that one compilation serves all
    x: tuple[np.ndarray | None, ...]  # (n,) each; None: comes with the block
    dtype: np.dtype
    raises: bool  # where values are not finite
    names: tuple[str, ...]  # of all parameters
    ties: Ties | None = None
    word: str = "pixel"  # for what each fit is of
    of_means: bool = False  # y are means of spectra, of whole numbers no longer
    kept: Kept = field(default_factory=Kept, compare=False)

    def __call__(self, place, *arrays, first=0) -> np.ndarray:
        """Records of the block that is ``place``, slices along the map axes, of the rows from ``first`` on."""
        block = self.gather(place, *arrays, first=first)
        with float64(), said_if_full():
            found = fit_pixels(self.model, self.spec, block.pixels, block.n_pixels, self.limits, self.compiling)
        return self.record(found).reshape(block.shape)

    @contextmanager
    def compiling(self, what: Hashable, pixels: Pixels):
        """For the first call of a kernel on arrays like these: two threads would both compile it."""
        shapes = tuple((each.shape, each.dtype.str) for each in jax.tree.leaves(pixels))
        known = (what, "compiled", self.spec, shapes)
        with nullcontext() if known in self.model.choices else _first_call:
            yield
        self.model.choices[known] = True

    def gather(self, place, y, sigma, mask, start, lower, upper, *own, first=0) -> PixelBlock:
        """The arrays of a block as the kernels take them, once they have been checked."""
        shape = tuple(s for k, s in enumerate(y.shape) if k not in self.fit_axes)
        rest, spectrum = iter(own), tuple(y.shape[k] for k in self.fit_axes)
        x = tuple(self._rows(next(rest), shape, spectrum) if c is None else c[None] for c in self.x)
        y, sigma, mask = (self._rows(each, shape, spectrum) for each in (y, sigma, mask))
        vectors = [self._vectors(each, shape) for each in (start, lower, upper)]
        begin = [each.start + (first if k == 0 else 0) for k, each in enumerate(place)]
        self._check(_Pixel(shape, begin, self.word), y, sigma, mask, x, *vectors[1:])
        n_pixels, others = len(y), (sigma, mask, x, *vectors)
        others = jax.tree.map(lambda each: each if len(each) == 1 else self._filled(each), others)  # 1: shared
        return PixelBlock(Pixels(self._filled(y), *others), n_pixels, shape, Kept())

    def _rows(self, array, shape, spectrum):
        """(pixels or 1, n or 1) of an array with y's axes; ``spectrum`` is y's shape along the fit axes."""
        n_fit = len(self.fit_axes)
        array = np.moveaxis(array, self.fit_axes, range(-n_fit, 0))
        own, along = array.shape[: array.ndim - n_fit], array.shape[array.ndim - n_fit :]
        if 1 < prod(along) < prod(spectrum):  # along some of the fit axes
            array, along = np.broadcast_to(array, (*own, *spectrum)), spectrum
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

    def _check(self, pixel, y, sigma, mask, x, lower, upper):
        """Values that cannot be fitted are an error, except in points and pixels that do not count."""

        def counted():
            invalid = self.spec.layouts.invalid
            return ~mask if invalid is None else ~(mask | invalid.hits(y))

        crossed = ~(lower < upper)
        if crossed.any():
            used = counted() & np.isfinite(y) & np.isfinite(sigma)
            for c in x:
                used = used & np.isfinite(c)
            crossed = crossed & used.any(axis=1)[:, None]
        if crossed.any():
            k, column = np.argwhere(crossed)[0]
            low, high = (each[min(k, len(each) - 1), column] for each in (lower, upper))
            raise ValueError(
                "Each lower bound must be strictly less than each upper bound: "
                f"{self.names[self.spec.free[column]]} has [{low}, {high}] {pixel.first(crossed)}; to hold a parameter use "
                "fixed="
            )
        if np.any(bad := sigma <= 0) and np.any(bad := bad & counted()):
            raise ValueError(
                f"`sigma` must be positive: it is zero or negative {pixel.first(bad)}; use mask= to leave out points"
            )
        if self.spec.loss == "poisson" and np.any(bad := y < 0) and np.any(bad := bad & counted()):
            raise ValueError(
                f"loss='poisson' is for counts: `ydata` is negative {pixel.first(bad)}; mask= leaves points out"
            )
        if self.spec.loss == "poisson" and not self.of_means and not may_be_counts(y, ~counted()):
            warn_user(NOT_COUNTS, UserWarning)
        for c in x:
            check_integers(c, mask, lambda _: "in one block")
        if self.raises:
            for name, array in (("ydata", y), ("sigma", sigma), *(("xdata", c) for c in x)):
                if np.any(bad := ~np.isfinite(array)) and np.any(bad := bad & counted()):
                    raise ValueError(
                        f"The input contains nan or infinity: {int(np.sum(bad))} of the values of `{name}` in one block, "
                        f'first {pixel.first(bad)}. nan_policy="omit" leaves these points out'
                    )

    def record(self, found: Fitted) -> np.ndarray:
        record, free = np.zeros(len(found.chi2), self.dtype), list(self.spec.free)
        record["popt"], record["chi2"], record["n_points"] = found.popt, found.chi2, found.n_points
        record["nfev"], record["status"], record["distance"] = found.nfev, found.status, found.distance
        record["at_bound"][:, free] = found.at_bound
        failed = np.isnan(found.chi2)
        record["perr"][failed] = np.nan
        with np.errstate(invalid="ignore"):
            record["perr"][:, free] = np.sqrt(np.diagonal(found.pcov, axis1=1, axis2=2))
        if "pcov" in (self.dtype.names or ()):
            record["pcov"][failed] = np.nan
            record["pcov"][:, np.array(free)[:, None], free] = found.pcov
        self.follow(record, found.popt, found.pcov, self.spec.free)
        return record

    def follow(self, record, popt, pcov, free: tuple[int, ...]) -> None:
        """Enter what follows by ``expr`` from the parameters (pixels, p), with the covariance of those at ``free``."""
        ties, p = getattr(self.model.f, "ties", None) or self.ties, len(self.names)  # of the model: one in each process
        if ties is None:
            return
        with float64():
            each = self.model.get(("ties", ties, free), lambda: jax.jit(jax.vmap(lambda params: ties.spread(params, free))))
            values, spread = map(np.asarray, each(popt))
        every = spread_out(pcov, spread)
        with np.errstate(invalid="ignore"):
            errors = np.sqrt(np.diagonal(every, axis1=1, axis2=2))
        failed = np.isnan(popt).any(axis=1)
        errors[failed] = every[failed] = np.nan
        record["popt"], record["perr"] = np.where(failed[:, None], np.nan, values[:, :p]), errors[:, :p]
        if ties.derived:
            record["derived"], record["derived_error"] = values[:, p:], errors[:, p:]
        if "pcov" in (self.dtype.names or ()):
            record["pcov"] = every[:, :p, :p]


@contextmanager
def threads_on_device() -> Iterator[None]:
    """Within, Dask's threads compute on the caller's ``jax.default_device``, or on several GPUs in turn."""
    several = len(devices_here()) > 1 and kind_here().own_memory
    if jax.config.jax_default_device is None and not several:  # type: ignore[attr-defined]  # as `kernels.kind`
        yield
        return
    n = dask.config.get("num_workers", None) or CPU_COUNT
    with ThreadPoolExecutor(n, "nlsq-device", inherit_device()) as pool, dask.config.set(pool=pool):
        yield


def record_dtype(n_params: int, full_covariance: bool, n_derived: int = 0) -> np.dtype:
    """Of what a pixel gets, in one array, so that reading, fitting and returning are one task."""
    p = (n_params,)
    fields = [("popt", "f8", p), ("perr", "f8", p), ("chi2", "f8"), ("n_points", "i4"), ("nfev", "i4")]
    fields += [("distance", "f8"), ("status", "u1"), ("at_bound", "i1", p)]
    fields += [(name, "f8", (n_derived,)) for name in DERIVED] * bool(n_derived)
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
    sources: tuple[Stored, ...]  # arrays in stores that y and the others are read from
    counting: dict[str, str]  # which points count, by the arguments that say so
    in_pieces: bool = False  # blocks are cut along the fit axes too, as the data are
    coarse: Operand | None = None  # the start of coarse fits, from which those of the pixels come

    @property
    def map_axes(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.y.ndim) if k not in self.fit.fit_axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(sizes) for sizes in self.blocks)

    @cached_property
    def arrays(self) -> list[Operand]:
        """y and the others, small chunks of which are joined where they are in one block."""

        def joined(array, last):
            if array.ndim == last:  # the same for all pixels
                return array
            sizes = {k: each for k, each in zip(self.map_axes, self.blocks, strict=True) if array.shape[k] > 1}
            return coarser(array, tuple(sizes.get(k, n) for k, n in enumerate(array.shape)))

        return [each._replace(array=joined(*each)) for each in (Operand(self.y), *self.operands.values())]

    @property
    def places(self) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Number and place of each block."""
        ends = [np.concatenate([[0], np.cumsum(sizes)]).tolist() for sizes in self.blocks]
        return [
            (index, tuple(slice(e[k], e[k + 1]) for e, k in zip(ends, index, strict=True)))
            for index in product(*(range(len(sizes)) for sizes in self.blocks))
        ]

    def named(self, index: tuple[int, ...], place: tuple[slice, ...]) -> str:
        """Words for a block."""
        return f"block {index}, {self.fit.word}s {', '.join(f'{each.start} to {each.stop - 1}' for each in place)}"

    def with_operands(self, **arrays) -> MapProblem:
        return replace(self, operands=self.operands | arrays)

    def cut_as(self, blocks) -> MapProblem:
        """The same in the blocks of an earlier run, and in bands of whole blocks, if possible no higher than planned."""
        most = max(band.stop - band.start for band in self.bands)
        edges, end = [0], 0
        for n in blocks[0] if blocks else ():
            if end > edges[-1] and end + n - edges[-1] > most:
                edges.append(end)
            end += n
        bands = tuple(slice(a, b) for a, b in pairwise([*edges, end])) if blocks else self.bands
        fit = replace(self.fit, capacity=capacity(blocks, self.plan.n_points, self.plan.kind))
        return replace(self, fit=fit, bands=bands, blocks=blocks)

    def records(self) -> da.Array:
        """One record for each pixel, chunked like the map."""
        parts = [self.band(band) for band in self.bands]
        return parts[0] if len(parts) == 1 else da.concatenate(parts)

    def band(self, rows: slice, task: Callable | None = None, points: bool = False) -> da.Array:
        """Records of some rows of the map, which end where blocks do; or what another ``task`` makes of their arrays.

        With ``points`` that is numbers with y's axes.
        """
        axes = self.map_axes
        arguments: list[Any] = []
        for operand in self.arrays:
            arguments += self.part(operand, rows)
        first, *others = self.blocks if axes else [()]
        ends = np.cumsum(first)
        inside = tuple(n for n, end in zip(first, ends, strict=True) if rows.start < end <= rows.stop)
        place = ArraySliceDep((inside, *others) if axes else ())
        dtype = self.fit.dtype if task is None else np.dtype(float if points else object)
        out = tuple(range(self.y.ndim)) if self.in_pieces or points else axes
        return da.blockwise(
            task or self.fit,
            out,
            place,
            axes,
            *arguments,
            first=rows.start,
            dtype=dtype,
            meta=np.empty((0,) * len(out), dtype),
            concatenate=True,
            align_arrays=False,
            token="nlsq-map",
        )

    def part(self, operand: Operand, rows: slice) -> tuple[Any, tuple[int, ...] | None]:
        """An operand on some rows of the map, in its blocks, and its axes as `blockwise` counts them."""
        array, last = operand
        axes = self.map_axes
        want: dict[int, tuple[int, ...]] = {}
        may_be_shared = axes and isinstance(array, np.ndarray) and array is not self.y
        of_a_block = range(self.y.ndim) if self.in_pieces else axes
        if array.ndim == last or (may_be_shared and all(array.shape[k] == 1 for k in of_a_block)):
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
        cut = self.fit.fit_axes if self.in_pieces else ()
        want |= {
            k: self.y.chunks[k] if k in cut and array.shape[k] > 1 else array.shape[k : k + 1]
            for k in range(array.ndim)
            if k not in axes
        }
        if not isinstance(array, da.Array):
            array = da.from_array(array, chunks=tuple(want[k] for k in range(array.ndim)), name=False)
        return array.rechunk(want), tuple(range(array.ndim))


def build_map(f: Callable, xdata: Any, ydata: Any, call, arrange: Callable | None = None) -> MapProblem:
    """Align the data of a call of `dask_nlsq.fit_map`, whose arguments have been checked; reads none of them.

    ``arrange`` gives the opened arrays other axes.
    """
    noise, dims = noise_of(call), getattr(ydata, "dims", ())
    if noise.reweighted:
        raise ValueError("sigma='poisson' is for `curve_fit`: use loss='poisson' here, which has the same parameters")
    if labelled(ydata):
        axes = axes_of(call.axis, dims, len(dims))
        call.xrange = by_place(call.xrange, xdata, ydata, axes)
        xdata = coordinates_of(xdata, ydata, axes)
    as_given = dict(xdata=xdata, ydata=ydata, sigma=call.sigma, mask=call.mask)
    data, stored, rules = open_data(as_given, call, masks=True)
    data = data if arrange is None else arrange(data)
    if noise.loss == "poisson":
        refuse_scaled(rules["scaled"])
    stored_size = as_array("ydata", data["ydata"]).itemsize
    y, hidden, invalid, counting = _values(data["ydata"], rules["sentinels"], rules["decoding"])
    if y.size == 0:
        raise ValueError("`ydata` must not be empty!")
    fit_axes = axes_of(call.axis, dims, y.ndim)
    params = read_parameters(f, call, tuple(n for k, n in enumerate(y.shape) if k not in fit_axes))
    xrange = by_place(call.xrange, xdata, ydata, f=f)
    coordinates, in_pieces = Coordinates.of(data["xdata"], y.shape, fit_axes, xrange), getattr(call, "in_pieces", False)
    p, ties = len(params.names), params.ties
    model = intern(*held(f, getattr(call, "jac", None), [0.0] * p, range(p), ties))  # the lanes know what is fixed
    shared = coordinates.shared(fit_axes)
    if in_pieces:
        coordinates = coordinates._replace(arrays=[along("xdata", c, y.shape, fit_axes) for c in coordinates.arrays])
        shared = (None,) * len(shared)
    layouts = _layouts(coordinates, invalid)
    spectrum = tuple(y.shape[k] for k in fit_axes)
    try_model(model, layouts, prod(spectrum), len(params.names), spectrum)
    spec = _spec(model, layouts, shared, call, noise, params)
    if params.guess is not None:
        _check_guess(params.guess, layouts, prod(y.shape[k] for k in fit_axes), params.names)
    operands = _operands(data, y.shape, fit_axes, [hidden, *coordinates.hidden], params)
    _check_shared(shared, operands["mask"].array, fit_axes, call.nan_policy)
    operands |= {f"x{k}": Operand(c) for k, (c, s) in enumerate(zip(coordinates.arrays, shared, strict=True)) if s is None}
    dtype = record_dtype(p, call.full_covariance, 0 if ties is None else len(ties.derived))
    dense = [each.array for each in operands.values() if each.array.shape == y.shape]
    bands, blocks, plan = plan_blocks([y, *dense], fit_axes, len(params.names), dtype.itemsize, call)
    plan = replace(plan, decoded=rules["decoded"], read_bytes=plan.read_bytes * stored_size // y.itemsize)
    most = call.max_nfev or 100 * len(params.free)
    fit = BlockFit(
        model=model,
        spec=spec._replace(kind=plan.kind),
        limits=Limits(call.ftol, call.xtol, call.gtol, call.accuracy, most, call.f_scale),
        fit_axes=fit_axes,
        capacity=capacity(blocks, plan.n_points, plan.kind),
        x=shared,
        dtype=dtype,
        raises=call.nan_policy == "raise",
        names=params.names,
        ties=ties,
    )
    counting |= {} if xrange is None else dict(xrange=str(xrange))
    counting |= {name: getattr(call, name) for name in ("nan_policy", *(Policy._fields if stored else ()))}
    return MapProblem(fit, y, operands, bands, blocks, plan, tuple(stored), counting, in_pieces)


def _layouts(coordinates: Coordinates, invalid) -> Layouts:
    x = tuple(Layout(True, coordinates.integer(k)) for k in range(len(coordinates.arrays)))
    own = Layout(True)
    return Layouts(own, own, own, x, x_kind=coordinates.kind, x_lead=coordinates.lead, ndim=1, invalid=invalid)


def _spec(model: Model, layouts: Layouts, shared, call, noise: Noise, params: Parameters) -> MapSpec:
    """What the kernel does; a model that is to be differentiated point by point has been tried at one start."""
    jac_mode = call.jac_mode
    if jac_mode == "auto":  # not timed: a map that goes on after a break must get the same bits
        jac_mode = choose_jac_mode(model, layouts, (), np.ones(len(params.free)), 0, CPU)
        if not any(each is None for each in shared):
            known = [params.guess is None and not isinstance(each, da.Array) for each in params.start]
            start = [np.asarray(v).flat[0] if k else 1.0 for v, k in zip(params.start, known, strict=True)]
            types = [np.int64 if each.integer else np.float64 for each in layouts.x]
            x = tuple(c.astype(t) for c, t in zip(shared, types, strict=True))
            check_pointwise(model, layouts, x, np.array(start))
    bounds = [ends[k] for ends in (params.lower, params.upper) for k in params.free]
    return MapSpec(
        layouts=layouts,
        free=params.free,
        bounded=any(isinstance(each, da.Array) or np.any(np.isfinite(each)) for each in bounds),
        jac_mode=jac_mode,
        loss=noise.loss,
        absolute_sigma=noise.absolute,
        guess=params.guess,
    )


def _operands(data, shape, fit_axes, hidden, params: Parameters) -> dict[str, Operand]:
    """What a fit needs besides y, with y's axes; points that are ``hidden`` are masked."""
    sigma, hidden_sigma = parted(along("sigma", 1.0 if data["sigma"] is None else data["sigma"], shape, fit_axes))
    masks = parted(along("mask", False if data["mask"] is None else data["mask"], shape, fit_axes))
    vectors = dict(start=params.start)
    vectors |= {name: [ends[k] for k in params.free] for name, ends in (("lower", params.lower), ("upper", params.upper))}
    return {
        "sigma": Operand(sigma),
        "mask": Operand(join_masks([each != 0 for each in (*masks, *hidden, hidden_sigma) if each is not None])),
        **{name: over_the_map(values, shape, fit_axes) for name, values in vectors.items()},
    }


def _values(ydata, sentinels, decoding: Decoding):
    """y, what hides its values, which of them stand for no data, and these in words; scaled ones are decoded when read."""
    y = as_array("ydata", ydata)
    mask_values, valid_range = sentinels
    invalid = invalid_values(mask_values, valid_range, y.dtype, decoding)
    values, *limits = invalid or ((), None, None)
    said = dict(mask_values=str(list(values)), valid_range=str(limits))
    if decoding.scaled:
        y, invalid = decoding.lazily(da.asarray(y), invalid), None
    return *parted(y), invalid, said


def _check_shared(shared, left_out, fit_axes, nan_policy) -> None:
    """Points where a coordinate that all pixels share is not finite are left out of all of them, which is said.

    Raises
    ------
    ValueError
        Where ``nan_policy`` is "raise", and no mask leaves them out.
    """
    bad = np.zeros(1, bool)
    for c in shared:
        bad = bad | (False if c is None else ~np.isfinite(c))
    if not bad.any():
        return
    if isinstance(left_out, np.ndarray):
        bad = bad & ~left_out.all(axis=tuple(k for k in range(left_out.ndim) if k not in fit_axes)).ravel()
    elif nan_policy == "raise":
        return  # blocks will tell which points count
    count, everything = int(bad.sum()), len(bad)
    if count and nan_policy == "raise":
        raise ValueError(
            f"The input contains nan or infinity: {count} of the {everything} values of `xdata`, which all pixels share. "
            "mask= leaves these points out"
        )
    if count:
        warn(
            f"{count} of {everything} points are left out of every pixel, since `xdata`, which all pixels share, is not "
            "finite there: correct it, or leave these points out with mask=",
            RuntimeWarning,
        )


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
    """``sigma`` or ``mask`` with y's axes, of y's shape, the fit axes' or the map's, or broadcasting to y's."""
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
        y = f"`ydata` of shape {shape} with fit axes {fit_axes}"
        what = f"fits {y} in several ways" if ways else f"does not fit {y}"
        raise ValueError(
            f"`{name}` of shape {array.shape} {what}: give it as many axes as ydata, of size 1 where it does not vary"
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
