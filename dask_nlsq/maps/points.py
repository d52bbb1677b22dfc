"""Data, model and residuals of maps at their points: of all of them as lazy arrays, or of a single pixel.

Models may need all points of a spectrum at once, so spectra are evaluated whole, by the blocks of the map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import dask
import numpy as np

from ..base.lazy import da
from ..base.text import several
from ..base.values import is_integer, is_number
from ..base.x64 import float64
from ..data.labels import Labels, at_labels, label, since
from ..engine.cluster import computed
from ..kernels.lane_loop import Pixels
from ..kernels.lanes import MapStatus
from ..kernels.values import PixelWhat, pixels_kernel
from ..memory.machine import large_arrays_given_back
from ..model.params import Parameter, Params
from . import pictures
from .blocks import DERIVED, BlockFit, MapProblem, Operand, threads_on_device
from .plan import capacity


@dataclass(frozen=True, repr=False, eq=False)
class Spectrum:
    """The spectrum of a pixel and its fit.

    Attributes
    ----------
    place : tuple of int
        Of the pixel in the map.
    at : dict
        Its coordinates by the names of the axes, where the map has some.
    x : tuple of ndarray
        The coordinates of its points, flat.
    y, model, residual : ndarray
        NaN in ``y`` and ``residual`` where points do not count. Residuals as in `dask_nlsq.FitResult.residuals`.
    sigma : ndarray or None
        None where the fit had none.
    params : Params
    status : MapStatus
    chi2 : float
    """

    place: tuple[int, ...]
    at: dict[str, Any]
    x: tuple[np.ndarray, ...]
    y: np.ndarray
    sigma: np.ndarray | None
    model: np.ndarray
    residual: np.ndarray
    params: Params
    status: MapStatus
    chi2: float
    word: str  # for what it is of
    labels: dict[str, str]  # of x, y and residuals in pictures, and units of the coordinates

    @property
    def drawn_x(self) -> tuple[np.ndarray, str]:
        """What it is drawn against, and the name of that: the number of the point where there are several coordinates."""
        if len(self.x) == 1:
            return self.x[0], self.labels["x"]
        return np.arange(len(self.y)), "point"

    @property
    def title(self) -> str:
        """The pixel and how its fit ended, in a line."""
        where = ", ".join(f"{name} {value:.5g} {self.labels[f'unit of {name}']}".strip() for name, value in self.at.items())
        place = ", ".join(map(str, self.place))
        return f"{self.word} ({place}){f' at {where}' if where else ''}: {pictures.status_name(self.status)}"

    def plot(self, axes=None):
        """Data, model and residuals: `dask_nlsq.plots.spectrum`."""
        return pictures.spectrum(self, axes)

    def __repr__(self):
        return f"<Spectrum of {self.title}>\n{self.params}"


def all_points(found, what: PixelWhat) -> Any:
    """Data, model values or residuals with y's axes, lazy, chunked like the data; a DataArray where they have names."""
    problem = _problem_at(found)
    task = partial(_block_values, problem.fit, what)
    parts = [problem.band(rows, task, points=True) for rows in problem.bands]
    values = parts[0] if len(parts) == 1 else da.concatenate(parts, axis=problem.map_axes[0])
    y = found.problem.y
    return values.rechunk(y.chunks) if isinstance(y, da.Array) else values


def at_x(found, x) -> Any:
    """The model of each pixel at other points, (*map, *points), lazy, chunked like the map."""
    problem, layouts = found.problem, found.problem.fit.spec.layouts
    x, labels = at_labels(since(x, ()), len(layouts.x_lead))
    if layouts.x_kind == "tuple":
        parts = list(np.broadcast_arrays(*(np.asarray(each) for each in x)))
        shape = parts[0].shape
    else:
        array, n_lead = np.asarray(x), len(layouts.x_lead) if layouts.x_kind == "stacked" else 0
        shape = array.shape[n_lead:]
        parts = list(array.reshape(-1, *shape)) if n_lead else [array]
    if len(parts) != len(layouts.x):
        raise ValueError(f"`x` has {len(parts)} coordinates, the fit had {len(layouts.x)}")
    flat = tuple(each.reshape(1, -1) for each in parts)
    popt = found.popt if found.lazy else da.from_array(found.popt, chunks=(*problem.blocks, -1))
    values = popt.map_blocks(
        partial(_values_at, problem.fit, flat, shape),
        dtype=np.float64,
        drop_axis=popt.ndim - 1,
        new_axis=list(range(popt.ndim - 1, popt.ndim - 1 + len(shape))),
        chunks=(*popt.chunks[:-1], *((n,) for n in shape)),
        meta=np.empty((0,) * (popt.ndim - 1 + len(shape))),
    )
    if labels is None:
        return values
    coords = found.labels.get("coords", {}) | labels.coords
    return label(values, Labels((*found.map_dims, *labels.dims), coords))


def one_spectrum(found, place: tuple[int, ...]) -> Spectrum:
    """Of the pixel at ``place``; reads the chunks that have it."""
    problem = found.problem
    fit = replace(problem.fit, capacity=1)
    own = {name: each for name, each in problem.operands.items() if name not in ("start", "lower", "upper")}
    where = tuple(slice(k, k + 1) for k in place)
    arrays = [_some(each, where, problem.map_axes) for each in (Operand(problem.y), *own.values())]
    task = dask.delayed(list, pure=False)(dask.optimize(found.record[place], *arrays))  # which cuts what is read
    with large_arrays_given_back(problem.plan.read_bytes), threads_on_device():
        ((record, *arrays),) = computed([task], [f"{fit.word} {place}"])
    y, values = arrays[0], dict(zip(own, arrays[1:], strict=True))
    unbounded = np.full(len(fit.spec.free), np.inf)
    vectors = dict(start=np.asarray(record["popt"]), lower=-unbounded, upper=unbounded)
    ordered = [(values | vectors)[name] for name in problem.operands]
    pixels = fit.gather(where, y, *ordered).pixels
    data, model, residual = (_computed(fit, what, pixels)[0] for what in ("data", "model", "residual"))
    sigma = np.broadcast_to(pixels.sigma[0], data.shape)
    return Spectrum(
        place=place,
        at={dim: axis.values[k] for dim, axis, k in zip(found.map_dims, found.axes, place, strict=True) if axis.known},
        x=tuple(np.asarray(c[0]) for c in pixels.x),
        y=data,
        sigma=sigma if _weighted(problem) else None,
        model=model,
        residual=residual,
        params=_params(found, record),
        status=MapStatus(int(record["status"])),
        chi2=float(record["chi2"]),
        word=fit.word,
        labels={f"unit of {dim}": axis.unit for dim, axis in zip(found.map_dims, found.axes, strict=True)}
        | dict(x=found.labels.get("x", "x"), y=found.labels.get("y", "y"), residual=residual_label(problem)),
    )


def some_points(found, every: tuple[int, ...]) -> np.ndarray:
    """Data, model values and residuals, (3, *map, n), float32, of one in ``every`` pixels along each axis of the map.

    Reads the chunks that have some of these, and evaluates the model of no other pixel.
    """
    problem = _problem_of_some(_problem_at(found), tuple(slice(None, None, step) for step in every))
    tasks: Any = problem.band(problem.bands[0], partial(_points_of_block, problem.fit)).to_delayed()
    values = np.empty((3, *problem.shape, problem.plan.n_points), np.float32)
    with large_arrays_given_back(problem.plan.read_bytes), threads_on_device():
        indices = [index for index, _ in problem.places]
        blocks = computed([tasks[each] for each in indices], [f"block {each} of the spectra" for each in indices])
    for (_, place), block in zip(problem.places, blocks, strict=True):
        values[(slice(None), *place)] = block
    return values


def place_of(found, place: tuple[int, ...], labels: dict[str, Any]) -> tuple[int, ...]:
    """Place of a pixel that is named by its numbers, or by its coordinates, of which the nearest is taken.

    Raises
    ------
    TypeError
        Neither, or both; numbers that are not integers.
    IndexError
        Numbers outside of the map.
    ValueError
        Names that the map does not have as axes, axes without coordinates, values outside of these.
    """
    dims, shape = found.map_dims, found.shape
    if bool(place) == bool(labels) and dims:
        raise TypeError(f"give the pixel by {len(dims)} numbers, or by its coordinates along {', '.join(dims)}")
    if not labels:
        if not all(map(is_integer, place)):
            by_name = f", or coordinates by name, as spectrum({', '.join(f'{dim}=...' for dim in dims)})"
            raise TypeError(f"a pixel is given by integers{by_name if dims else ''}, not by {place}")
        missing = f"there is no pixel {place} in a map of {' x '.join(map(str, shape))}"
        if len(place) != len(shape):
            raise IndexError(f"{missing}: give {several(len(shape), 'number')}")
        for dim, k, n in zip(dims, place, shape, strict=True):
            if not -n <= k < n:
                raise IndexError(f"{missing}: the length of axis {dim!r} is {n}")
        return tuple(int(k) % n for k, n in zip(place, shape, strict=True))
    if {*labels} != {*dims}:
        wrong = [name for name in labels if name not in dims]
        lacking = [dim for dim in dims if dim not in labels]
        what = f"not {', '.join(wrong)}" if wrong else f"give {', '.join(lacking)}, too"
        raise ValueError(f"a pixel of this map has coordinates along {', '.join(dims)}: {what}")
    return tuple(_nearest(dim, axis, labels[dim]) for dim, axis in zip(dims, found.axes, strict=True))


def _nearest(dim: str, axis: pictures.Axis, value) -> int:
    if not axis.known:
        raise ValueError(f"axis {dim!r} of the map does not have numeric coordinates: give the pixel by integers")
    given, value = value, np.asarray(value)[()]
    if axis.begin is not None and not is_number(value):
        try:
            value = float((np.datetime64(value) - axis.begin) / np.timedelta64(1, "s"))
        except (ValueError, TypeError):
            raise TypeError(f"`{dim}` is {given!r}: give a date, such as '{str(axis.begin)[:19]}'") from None
    if not is_number(value):
        raise TypeError(f"`{dim}` is {given!r}: give a number, the coordinate of a pixel along this axis")
    low, high = float(axis.values.min()), float(axis.values.max())
    step = (high - low) / max(len(axis.values) - 1, 1)
    if not low - step <= value <= high + step:
        unit = "" if axis.begin is None else f" {axis.unit}"
        raise ValueError(f"`{dim}` is {given}, outside of the map, which extends from {low:g} to {high:g}{unit}")
    return int(np.argmin(np.abs(axis.values - value)))


def _some(operand: Operand, places: tuple[slice, ...], map_axes):
    """An operand at some pixels, with its axes."""
    array, index = operand.array, [slice(None)] * operand.array.ndim
    if array.ndim == operand.last:
        return array
    for k, place in zip(map_axes, places, strict=True):
        if array.shape[k] > 1:
            index[k] = place
    return array[tuple(index)]


def _params(found, record) -> Params:
    fit = found.problem.fit
    texts = fit.ties.texts if fit.ties is not None else {}
    columns = zip(found.param_names, record["popt"], record["perr"], record["at_bound"], strict=True)
    shared = getattr(found, "shared_names", ())  # of groups
    own = {*texts, *shared, *(found.param_names[k] for k in fit.spec.free)}
    params = [
        Parameter(n, float(v), float(e), int(side), None, n not in own, texts.get(n), n in shared)
        for n, v, e, side in columns
    ]
    rows = zip(found.derived_names, *(record[name] for name in DERIVED), strict=True) if found.derived_names else ()
    return Params(*params, *(Parameter(name, float(v), float(e), 0, expr=texts[name]) for name, v, e in rows))


def residual_label(problem: MapProblem) -> str:
    """What the residuals of a map are."""
    if problem.fit.spec.loss == "poisson":
        return "deviance residual"
    return "(model - data) / sigma" if _weighted(problem) else "model - data"


def _weighted(problem: MapProblem) -> bool:
    """Whether there is a sigma."""
    sigma = problem.operands["sigma"].array
    return sigma.size > 1 or bool(np.any(np.asarray(sigma) != 1))


def _problem_at(found) -> MapProblem:
    """The problem with the parameters that were found as its starts, and without bounds."""
    problem, popt = found.problem, found.popt
    mapped = tuple(n if k in problem.map_axes else 1 for k, n in enumerate(problem.y.shape))
    unbounded = np.full(len(problem.fit.spec.free), np.inf)
    return problem.with_operands(
        start=Operand(popt.reshape(*mapped, popt.shape[-1]), 1), lower=Operand(-unbounded, 1), upper=Operand(unbounded, 1)
    )


def _problem_of_some(problem: MapProblem, places: tuple[slice, ...]) -> MapProblem:
    """The problem of some pixels, ascending ones, in the blocks that have some of them and in one band."""
    axes, blocks = problem.map_axes, []
    for sizes, place in zip(problem.blocks, places, strict=True):
        kept = np.diff(np.searchsorted(np.arange(sum(sizes))[place], [0, *np.cumsum(sizes)]))
        blocks.append(tuple(kept[kept > 0].tolist()))
    operands = {name: Operand(_some(each, places, axes), each.last) for name, each in problem.operands.items()}
    y, band = _some(Operand(problem.y), places, axes), slice(0, sum(blocks[0]))
    fit = replace(problem.fit, capacity=capacity(blocks, problem.plan.n_points, problem.plan.kind))
    return replace(problem, fit=fit, y=y, operands=operands, blocks=tuple(blocks), bands=(band,), in_pieces=False)


def _points_of_block(fit: BlockFit, place, *arrays, first=0) -> np.ndarray:
    """The task: data, model values and residuals of a block, (3, *block, n), float32."""
    block = fit.gather(place, *arrays, first=first)
    whats: tuple[PixelWhat, ...] = ("data", "model", "residual")
    values = np.stack([_computed(fit, what, block.pixels)[: block.n_pixels] for what in whats])
    return values.reshape(3, *block.shape, -1).astype(np.float32)


def _block_values(fit: BlockFit, what: PixelWhat, place, y, *arrays, first=0) -> np.ndarray:
    """The task: values of the pixels of a block, with y's axes."""
    block = fit.gather(place, y, *arrays, first=first)
    values = _computed(fit, what, block.pixels)[: block.n_pixels]
    spectrum = tuple(y.shape[k] for k in fit.fit_axes)
    return np.moveaxis(values.reshape(*block.shape, *spectrum), range(-len(spectrum), 0), fit.fit_axes)


def _values_at(fit: BlockFit, x, shape, popt) -> np.ndarray:
    """The task: the model of the pixels of a block at coordinates ``x``, (1, n) each."""
    params = np.ascontiguousarray(popt.reshape(-1, popt.shape[-1]))
    y, one = np.zeros((len(params), x[0].shape[1])), np.ones((1, 1))
    bounds = np.zeros((1, len(fit.spec.free)))
    values = _computed(fit, "model", Pixels(y, one, one == 0, x, params, bounds, bounds))
    return values.reshape(*popt.shape[:-1], *shape)


def _computed(fit: BlockFit, what: PixelWhat, pixels: Pixels) -> np.ndarray:
    spec = fit.spec._replace(guess=None)
    with float64(), fit.compiling(what, pixels):
        return np.asarray(pixels_kernel(fit.model, spec, what)(pixels))
