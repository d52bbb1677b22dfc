"""What `dask_nlsq.fit_map` returns: lazy maps of parameters, and how they are computed, stored, shown and fitted again."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Self

import dask
import numpy as np

from ..base.disk import check_room, named_when_full, named_when_refused
from ..base.files import sum_of_values
from ..base.lazy import da, zarr
from ..base.modules import import_name
from ..base.text import several
from ..data.labels import Labels, label
from ..data.store import same_store
from ..engine.cluster import computed, workers_of
from ..kernels.checks import fingerprint
from ..kernels.lanes import MapStatus, succeeded
from ..memory.machine import large_arrays_given_back
from ..model.function import function_name, own_function
from ..watch.progress import MapProgress
from . import store
from .blocks import MapProblem, Operand, threads_on_device
from .pictures import Axis, axis_of
from .plan import MapPlan
from .points import PixelWhat, Spectrum, all_points, at_x, one_spectrum, place_of
from .store import attributes, inner
from .views import Maps, shown

logger = logging.getLogger("dask_nlsq")
PLAIN = (str, int, float, NoneType)  # values that an error shows
NEIGHBOURS = 2  # pixels to each side, whose median a failed pixel starts from


@dataclass(frozen=True, repr=False, eq=False)
class FittedMaps(Maps):
    """Maps from fits of data, chunked like these; Dask arrays, or NumPy after `compute`."""

    record: Any  # (*map) of `map_blocks.record_dtype`
    problem: MapProblem = field(repr=False)
    labels: dict[str, Any]  # what is known of the axes of ``ydata``, see `map_labels`

    @property
    def param_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.problem.fit.names

    @property
    def derived_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of the quantities that ``expr`` derives."""
        return () if self.problem.fit.ties is None else self.problem.fit.ties.derived

    @property
    def plan(self) -> MapPlan:
        return self.problem.plan

    @property
    def word(self) -> str:  # type: ignore[override]
        """For what each fit is of."""
        return self.problem.fit.word

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map."""
        return self.record.shape

    def field(self, name: str):
        """An array by its name; an AttributeError where the maps do not have it."""
        if name in self.record.dtype.names:
            return self.record[name]
        hint = ": ask for it with full_covariance=True" if name == "pcov" else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        return bool(self.labels) and find_spec("xarray") is not None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the map as pictures have them."""
        coords = self.labels.get("coords", {})
        return tuple(axis_of(dim, n, coords.get(dim)) for dim, n in zip(self.map_dims, self.shape, strict=True))

    @property
    def heading(self) -> str:
        """What this is, in a line."""
        return f"{type(self).__name__} {shown(self.shape, self.param_names, self.word)}"

    @property
    def origin(self) -> list[tuple[str, str]]:
        """Rows about where the maps come from."""
        return [*self.plan.rows("plan: "), *origins(self.provenance, self.labels.get("all_dims"))]

    @property
    def lazy(self) -> bool:  # type: ignore[override]
        return isinstance(self.record, da.Array)

    def compute(self, progress: bool | None = None, **options) -> Self:
        """The same with NumPy arrays; one band of the map after the other, where the plan has several.

        ``options`` go to `dask.compute`.
        """
        if not self.lazy:
            return self
        with large_arrays_given_back(self.plan.read_bytes), threads_on_device(), self._told(progress, options) as told:
            delayed: Any = self._settled(options).record.to_delayed()
            record = np.empty(self.record.shape, self.record.dtype)
            for band in self.problem.bands:
                places = [(index, place) for index, place in self.problem.places if _within(place, band)]
                tasks = [delayed[index] for index, _ in places]
                names = [self.problem.named(*each) for each in places]
                found = computed(tasks, names, told.look, told=lambda block: told(block["status"]), **options)
                for (_, place), block in zip(places, found, strict=True):
                    record[place] = block
        return replace(self, record=record)

    def _told(self, progress, options, n_before: int = 0, done_before: int = 0) -> MapProgress:
        return MapProgress(self.problem, progress, workers_of(options), n_before, done_before)

    def _settled(self, options) -> FittedMaps:
        return self

    def _cut_as(self, blocks) -> FittedMaps:
        """The same in the blocks of an earlier run."""
        raise ValueError("the data lie in other blocks than when this map was begun: write it to another path")

    # -----------------------------------------------------------------------------------------------------------------

    def to_xarray(self):
        """An `xarray.Dataset` with the dimensions and coordinates of the data along the map, and ``param``."""
        variables = {
            name: ((*self.map_dims, *inner(name)), self.record[name], attributes(name)) for name in self.record.dtype.names
        }
        attrs = self.labels.get("attrs", {}) | {"model": function_name(self.problem.fit.model.f)}
        return self.coordinates.assign(variables).assign_attrs(attrs)

    @property
    def coordinates(self):
        import xarray as xr

        named = {"param": list(self.param_names)} | ({"quantity": list(self.derived_names)} if self.derived_names else {})
        return xr.Dataset(coords={**named, **self.labels.get("coords", {})})

    @property
    def map_dims(self) -> tuple[str, ...]:
        return self.labels.get("dims") or tuple(f"axis_{k}" for k in self.problem.map_axes)

    @property
    def provenance(self):
        """What the map is a result of, as its store keeps it."""
        fit, y = self.problem.fit, self.problem.y
        spec = fit.spec
        identity = dict(
            model=function_name(fit.model.f),
            operations=fingerprint(fit.model, spec.layouts, len(self.param_names)),
            guess=None if spec.guess is None else spec.guess.token,
            parameters=list(self.param_names),
            free=list(spec.free),
            loss=spec.loss,
            jac_mode=spec.jac_mode,
            absolute_sigma=spec.absolute_sigma,
            limits={name: value if isfinite(value) else None for name, value in fit.limits._asdict().items()},
            fit_axes=list(fit.fit_axes),
            full_covariance="pcov" in (fit.dtype.names or ()),
            **self.problem.counting,
            data=_describe(y),
            blocks=self.problem.blocks,
            operands={name: _describe(each.array) for name, each in self.problem.operands.items()},
            coarse=None if self.problem.coarse is None else _describe(self.problem.coarse.array),
            coordinates=[None if c is None else _describe(c) for c in fit.x],
            decoded=list(self.plan.decoded),
            stores={each.name: each.describe() for each in self.problem.sources},
        )
        if fit.ties is not None:
            identity |= dict(expr=fit.ties.texts, derived=list(self.derived_names))
        return json.loads(json.dumps(identity))

    def _call(self) -> dict[str, Any]:
        """What `provenance` does not have of the call, as far as JSON can hold it, so that it can be made again."""
        fit, ends = self.problem.fit, [self.problem.operands[name] for name in ("lower", "upper")]
        bounds = None
        if all(isinstance(each.array, np.ndarray) and each.array.ndim == 1 for each in ends):
            pairs = zip(*(each.array.tolist() for each in ends), strict=True)
            finite = [[end if isfinite(end) else None for end in pair] for pair in pairs]
            bounds = {fit.names[k]: pair for k, pair in zip(fit.spec.free, finite, strict=True)}
        rules = {} if fit.ties is None else dict(fit.ties.expr)
        kept = all(isinstance(rule, str) for rule in rules.values())
        return dict(model=import_name(own_function(fit.model.f)), bounds=bounds, expr=rules if kept else None)

    def to_zarr(self, path: str | Path, resume: bool = False, progress: bool | None = None, **options) -> zarr.Group:
        """Fit block by block and write each when it is done, so that a killed job can continue.

        Parameters
        ----------
        path : path
            Of a new group; its arrays are named as the attributes of this class, `xarray.open_zarr` opens it.
        resume : bool
            Go on with what an earlier call of the same fit has written there; nothing is computed where that is all. Blocks
            whose chunks have been lost since are fitted again.
        **options
            For `dask.compute`.

        Raises
        ------
        FileExistsError
            Where ``path`` has a map and ``resume`` is false.
        ValueError
            Where it has something else, or a map of another fit; the message says what differs. Values of Dask arrays are
            not compared.
        OSError
            Where ``path`` cannot be written; nothing has been fitted then.
        """
        if not self.lazy:
            raise ValueError(
                "this map is computed already: call to_zarr on what fit_map returned, or to_xarray().to_zarr(path)"
            )
        for name, (_, values, _) in self.labels.get("coords", {}).items():
            if values.dtype.kind == "O" and values.size and isinstance(values.flat[0], tuple):
                raise ValueError(
                    f"the coordinate {name!r} of `ydata` is a MultiIndex, which a store cannot hold: fit "
                    f"ydata.reset_index({name!r}), which keeps its levels as coordinates"
                )
        path, identity = Path(path).resolve(), self.provenance  # where a link leads
        about: dict[str, Any] = {}
        if store.is_begun(path):
            about = store.read_about(path)
            if not resume:
                raise FileExistsError(f"{path} exists: continue it with resume=True, or give another path")
            refuse_another(path, store.identity_of(about), identity)
            blocks = tuple(map(tuple, about["blocks"]))
            if blocks != self.problem.blocks:  # there was another amount of memory when it was begun
                return self._cut_as(blocks).to_zarr(path, True, progress, **options)
        pixels: Any = reduce(np.multiply.outer, map(np.array, self.problem.blocks), np.array(1))  # in each block
        done = None
        if store.is_sealed(about) and (path / store.DONE).exists():
            done = store.read_done(path)
            done &= ~store.lost_blocks(path, about, done)
        nbytes = self.record.dtype.itemsize * int((pixels if done is None else pixels[~done]).sum())
        check_room("path", path, nbytes)
        with named_when_refused(path, "`path` "), named_when_full(path, nbytes):
            if not store.is_sealed(about):
                store.create(path, self, identity, self._call())
            elif done is None:
                store.create_done(path, self)
        done = store.read_done(path) if done is None else done
        bar = self._told(progress, options, int(pixels[done].sum()), int(done.sum()))
        with large_arrays_given_back(self.plan.read_bytes), threads_on_device(), bar as told:
            delayed: Any = None if done.all() else self._settled(options).record.to_delayed()
            for band in self.problem.bands:
                places = [each for each in self.problem.places if not done[each[0]] and _within(each[1], band)]
                write = dask.delayed(store.write_block, pure=False)
                tasks = [write(delayed[index], str(path), index, place) for index, place in places]
                computed(tasks, [self.problem.named(*each) for each in places], told.look, told=told, **options)
        return zarr.open_group(path, mode="r")

    # -----------------------------------------------------------------------------------------------------------------
    # at the points of the data, and elsewhere

    def spectrum(self, *place: int, **at: Any) -> Spectrum:
        """Data, model and residuals of a pixel, ``spectrum(3, 4)`` or ``spectrum(x=1.2, y=3.4)``; reads its chunks alone.

        Coordinates are those of the map; the nearest pixel is taken.
        """
        return one_spectrum(self, place_of(self, place, at))

    def points(self, *what: PixelWhat) -> list[Any]:
        """Lazy arrays with y's axes, of "data", NaN where they do not count, "model" or "residual"."""
        return [all_points(self, each) for each in what]

    def residuals(self):
        """``(f(x, *popt) - y) / sigma`` with y's axes; lazy, chunked like the data; a DataArray where y has names.

        NaN for points that do not count, and where there was no fit. With a Poisson likelihood those of the deviance.
        """
        return self._named(*self.points("residual"))

    def predict(self, x=None):
        """``f(x, *popt)`` of each pixel, lazy: at ``x``, along the last axes; None: at the points of the data."""
        return self._named(*self.points("model")) if x is None else at_x(self, x)

    def _named(self, values):
        dims = self.labels.get("all_dims")
        return label(values, Labels(dims, self.labels["all_coords"]) if dims and self.labelled else None)


class MapResult(FittedMaps):
    """Maps of parameters, chunked like the data; Dask arrays, or NumPy after `compute`.

    ``param_names`` and ``plan``, a `MapPlan`, say what was fitted and how.
    """

    def _settled(self, options) -> MapResult:
        """The same with starts computed, where there are several bands, each of which would compute all of them."""
        start, last = self.problem.operands["start"]
        if len(self.problem.bands) == 1 or not isinstance(start, da.Array):
            return self
        problem = self.problem.with_operands(start=Operand(start.compute(**options), last))
        return self._of(problem)

    def _of(self, problem: MapProblem) -> MapResult:
        """The result of the same fit with other blocks or computed starts."""
        return replace(self, problem=problem, record=problem.records())

    def _cut_as(self, blocks) -> MapResult:
        return self._of(self.problem.cut_as(blocks))

    def refit_failed(self, p0=None) -> MapResult:
        """Fit pixels without success once more, from other starts, and keep what converges; reads their blocks only.

        Parameters
        ----------
        p0 : array_like, shape (*map, p), optional
            Starts; by default the median of the parameters of successful pixels up to two pixels away.

        Returns
        -------
        MapResult
            Computed.
        """
        before = self.compute()
        skipped = np.isin(before.status, [MapStatus.MASKED, MapStatus.TOO_FEW_POINTS])
        failed = ~before.success & ~skipped
        if not failed.any():
            return before
        starts = before.medians_around() if p0 is None else np.asarray(p0, float)
        try:
            starts = np.broadcast_to(starts, before.popt.shape)
        except ValueError:
            raise ValueError(f"`p0` must be of shape {before.popt.shape}, or broadcast to it, not {starts.shape}") from None
        failed &= np.isfinite(starts).all(axis=-1)
        if not failed.any():
            return before
        shape, axes = self.problem.y.shape, self.problem.map_axes
        mapped = tuple(n if k in axes else 1 for k, n in enumerate(shape))
        spec = self.problem.fit.spec._replace(guess=None)
        problem = replace(self.problem, fit=replace(self.problem.fit, spec=spec)).with_operands(
            start=Operand(starts.reshape(*mapped, starts.shape[-1]), 1)
        )
        again, record = problem.records(), before.record.copy()
        places, n_mended = [(index, place) for index, place in problem.places if failed[place].any()], 0
        for (_, place), new in zip(places, dask.compute(*(again.blocks[index] for index, _ in places)), strict=True):
            better = failed[place] & succeeded(new["status"])
            record[place] = np.where(better, new, record[place])
            n_mended += int(better.sum())
        tried = several(int(failed.sum()), f"failed {self.word}")
        logger.info("refit_failed: %s fitted again, %s converged", tried, f"{n_mended:,}")
        return replace(before, record=record)

    def medians_around(self):
        good = np.where(self.success[..., None], self.popt, np.nan)
        n_map, k = self.success.ndim, 2 * NEIGHBOURS + 1
        padded = np.pad(good, [(NEIGHBOURS, NEIGHBOURS)] * n_map + [(0, 0)], constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (k,) * n_map, axis=tuple(range(n_map)))
        found = np.full(self.popt.shape, np.nan)
        wanted = ~self.success
        near = windows[wanted].reshape(int(wanted.sum()), self.popt.shape[-1], -1)
        some = ~np.isnan(near).all(axis=-1)
        medians = np.full(near.shape[:-1], np.nan)
        medians[some] = np.nanmedian(near[some], axis=-1)
        found[wanted] = medians
        return found


def origins(provenance, dims=None) -> list[tuple[str, str]]:
    """Rows about a fit, of what a store keeps of it; ``dims`` are the names of y's axes, where they are known."""
    fit_axes = [dims[k] if dims else k for k in provenance["fit_axes"]]
    stores = [(name, re.sub(r"//[^/@]*@", "//", each["place"])) for name, each in provenance["stores"].items()]
    shape, dtype, *_ = provenance["data"]
    limits = ", ".join(f"{name} {value:g}" for name, value in provenance["limits"].items() if value is not None)
    return [
        ("model", provenance["model"]), ("data", f"{' x '.join(map(str, shape))}, {dtype}"), *stores,
        ("fit axes", ", ".join(map(str, fit_axes))), ("loss", provenance["loss"]), ("limits", limits),
    ]  # fmt: skip


def _describe(array):
    if isinstance(array, da.Array):
        return [list(array.shape), str(array.dtype)]
    return [list(array.shape), str(array.dtype), sum_of_values(array)]


ARGUMENTS = {  # of `fit_map`, by what an identity has of them
    "model": "f", "operations": "f", "guess": "p0", "start": "p0", "coarse": "p0", "lower": "bounds", "upper": "bounds",
    "parameters": "param_names", "free": "fixed", "fit_axes": "axis", "data": "ydata", "coordinates": "xdata",
    "decoded": "decode_cf", "derived": "expr",
}  # fmt: skip


def refuse_another(path, known, identity, ignored: Collection[str] = ()) -> None:
    """An error where the map at ``path`` is of another fit, which names the arguments that differ, but those ``ignored``."""
    then, now = by_name(known), by_name(identity)
    names = then.keys() | now.keys()
    differ = {name for name in names if then.get(name) != now.get(name) and not same_store(then.get(name), now.get(name))}
    differ -= set(ignored)
    if "free" in differ:
        differ -= {"start", "lower", "upper", "max_nfev"}  # of fewer or more parameters
    if "coarse" in differ:
        differ -= {"start"}
    said = {}
    for name in sorted(differ):
        what = "guess" if name == "coarse" and None in (then[name], now[name]) else ARGUMENTS.get(name, name)
        what = "xdata" if re.fullmatch(r"x\d+", name) else what
        plain = what == name and all(isinstance(each.get(name), PLAIN) for each in (then, now))
        said[what] = f"{what}: {then.get(name)} then, {now.get(name)} now" if plain else what
    if said:
        changed, way_out = ", ".join(said.values()), "Give what it was made with, or another path"
        raise ValueError(f"{path} is a map of another fit. Changed: {changed}. {way_out}")


def by_argument(identity) -> dict[str, list]:
    """The same by the arguments of `fit_map`."""
    found: dict[str, list] = {}
    for name, value in by_name(identity).items():
        found.setdefault("xdata" if re.fullmatch(r"x\d+", name) else ARGUMENTS.get(name, name), []).append(value)
    return found


def by_name(identity) -> dict[str, Any]:
    """What must be the same in a fit that goes on: all but the blocks."""
    nested = {**identity["limits"], **identity["operands"]}
    nested |= {f"`{name}` in its store": value for name, value in identity["stores"].items()}
    return {
        name: value for name, value in identity.items() if name not in ("blocks", "limits", "operands", "stores")
    } | nested


def _within(place: tuple[slice, ...], band: slice) -> bool:
    return not place or band.start <= place[0].start < band.stop
