"""Maps that `MapResult.to_zarr` has written, opened again: shown as they are, and fitted further with their data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..base.files import DamagedFileError, well_formed
from ..base.lazy import zarr
from ..base.modules import Trust
from ..results.named_model import import_model
from .fit import fit_map
from .pictures import Axis, axis_of
from .result import MapResult, origins, refuse_another
from .store import METADATA, identity_of, lost_blocks, read_about, read_done
from .views import Maps, shown

LOST = "chunks of blocks that are done are missing, which to_zarr(path, resume=True) fits again"
WITH_DATA = ("spectrum", "residuals", "predict", "refit_failed")  # what needs the data
OF_GROUPS = "groups that were fitted together and stored without their data: call fit_groups again, its `local` has the data"
STARTS = ("start", "coarse", "guess")  # in which a fit of the same data may differ once it is done
CHECKED = 3  # pixels of lazy data
SAME_CHI2 = 1e-6  # relative
SAME = ("loss", "jac_mode", "absolute_sigma", "full_covariance", "nan_policy", "on_bad_chunk", "missing_chunks")


class StoredMap(Maps):
    """Maps in a store; arrays by the names of those of a `MapResult`, read when they are used, and kept once all are done.

    Raises
    ------
    DamagedFileError
        Where they are not as they were written.
    """

    stored = True

    def __init__(self, path: Path, trust: Trust = False, done: np.ndarray | None = None):
        path = path.absolute()  # wherever the process goes
        self.path, self.about, self._trust = path, read_about(path), trust
        self._kept: dict[str, Any] = {}
        self._known = done
        with well_formed(path / METADATA, path):
            self._group: Any = zarr.open_group(path, mode="r")
        self.param_names = tuple(self.about["parameters"])
        self.word = "group" if "shared" in self.about else "pixel"
        self.derived_names = tuple(self.about.get("derived", ()))

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self.field(name)

    def field(self, name: str):
        """An array by its name; an AttributeError where there is none."""
        if name in self._kept:
            return self._kept[name]
        if name not in self._group:
            hint = f"it has {sorted(self._group.array_keys())}"
            needs_data = (
                OF_GROUPS if "shared" in self.about else "with_data(xdata, ydata) gives the data back, which it needs"
            )
            hint = needs_data if name in WITH_DATA else hint
            raise AttributeError(f"{type(self).__name__} has no {name!r}: {hint}")
        if name in self.about["fields"]:
            self._check_chunks(name)
        with well_formed(self.path / name, self.path):
            values = self._group[name][...]
        if self._known is not None:
            self._kept[name] = values
        return values

    @property
    def _done(self) -> np.ndarray:
        """Which blocks are done; not read again once all are, nor of what `compute` returns."""
        if self._known is not None:
            return self._known
        done = read_done(self.path)
        self._known = done if done.all() else None
        return done

    def _check_chunks(self, name: str) -> None:
        """DamagedFileError where chunks of this array are missing of blocks that are done."""
        done = self._done
        with well_formed(self.path / name, self.path):
            if lost_blocks(self.path, self.about, done, [name]).any():
                raise DamagedFileError(self.path / name, LOST, self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map."""
        return self._group["status"].shape

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the map as pictures have them."""
        dims = self._group["status"].metadata.dimension_names
        arrays = {dim: self._group[dim] for dim in dims if dim in self._group}
        coords = {dim: ((dim,), each[...], dict(each.attrs)) for dim, each in arrays.items()}
        return tuple(axis_of(dim, n, coords.get(dim)) for dim, n in zip(dims, self.shape, strict=True))

    @property
    def heading(self) -> str:
        """What this is, in a line."""
        done = self._done
        state = "" if done.all() else f"; {done.sum()} of {done.size} blocks are done, to_zarr(path, resume=True) continues"
        return f"StoredMap {shown(self.shape, self.param_names, self.word)}, at {self.path}{state}"

    @property
    def origin(self) -> list[tuple[str, str]]:
        """Rows about where the maps come from."""
        return [("store", str(self.path)), *origins(self.about)]

    def compute(self, progress: bool | None = None, **options) -> StoredMap:
        """The same; while blocks are missing, with those that are done by now, each array of which is read once."""
        done = self._done
        if self._known is not None:
            return self
        return StoredMap(self.path, self._trust, done)

    def to_xarray(self):
        """The `xarray.Dataset` of the store."""
        import xarray

        for name in self.about["fields"]:
            self._check_chunks(name)
        return xarray.open_zarr(self.path)

    def with_data(self, xdata, ydata=None, f=None, **options) -> MapResult:
        """The maps with the data that they were fitted to: a `MapResult`, of which `spectrum`, `refit_failed` work too.

        Parameters
        ----------
        xdata, ydata
            As in the fit; or as ``xdata`` alone the `MapResult` that the same call of `dask_nlsq.fit_map` returns.
        f : callable, optional
            The model; by default it is imported by its name, which `dask_nlsq.load` has to trust.
        **options
            Other arguments that the fit had: ``sigma``, ``mask``, ``xrange``, ``mask_values``, bounds that are arrays. The
            store knows names, numbers and bounds that all pixels share, and ``p0`` does not matter any more.

        Raises
        ------
        ValueError
            Where a `MapResult` comes with further arguments; where the model computes something else, or data or arguments
            are not those of the fit; the message says which. An `UntrustedError` where the model may not be imported.
        """
        if "shared" in self.about:
            raise ValueError(f"{self.path} has {OF_GROUPS}")
        done = self._done
        if not done.all():
            raise ValueError(
                f"{self.path}: {done.sum()} of {done.size} blocks are done. The same call of fit_map(...).to_zarr(path, "
                "resume=True) continues it"
            )
        given = dict(ydata=ydata, f=f, **options)
        if isinstance(xdata, MapResult) and (more := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"with_data: `xdata` is a MapResult, which has its own {', '.join(more)}: leave that out")
        if not isinstance(xdata, MapResult):
            self._check_shape(ydata)
        fits = xdata if isinstance(xdata, MapResult) else fit_map(f or self._model(), xdata, ydata, **self._call() | options)
        then, now = identity_of(self.about), fits.provenance
        compared = len(then["data"]) == len(now["data"]) == 3  # with a sum of the values, which lazy ones have not
        if not compared:
            then, now = ({**each, "data": each["data"][:2]} for each in (then, now))
        refuse_another(self.path, then, now, STARTS)
        record = np.empty(fits.shape, fits.record.dtype)
        for name in record.dtype.names or ():
            record[name] = self.field(name)
        found = replace(fits, record=record)
        if not compared and then["loss"] in ("linear", "poisson"):
            self._check_some(found)
        return found

    def _check_shape(self, ydata) -> None:
        """An error where data that say their shape have another one than those of the fit."""
        then, now = tuple(self.about["data"][0]), getattr(ydata, "shape", None)
        if now is not None and tuple(now) != then:
            raise ValueError(f"with_data: `ydata` has the shape {tuple(now)}, the data of {self.path} had {then}")

    def _check_some(self, fits: MapResult) -> None:
        """An error where lazy data are not those of the fit, by what some of the pixels have for chi-square."""
        known = np.argwhere(fits.success & (fits.chi2 > 0))
        for place in known[np.unique(np.linspace(0, len(known) - 1, CHECKED).astype(int))] if len(known) else ():
            spectrum = fits.spectrum(*place.tolist())
            chi2 = float(np.nansum(spectrum.residual**2))
            if not np.isclose(chi2, spectrum.chi2, rtol=SAME_CHI2):
                raise ValueError(
                    f"{self.path} is a map of another fit. Changed: values of ydata, with which pixel "
                    f"{tuple(place.tolist())} has chi2 {chi2:.6g}, in the map {spectrum.chi2:.6g}"
                )

    def _model(self):
        """Import it, by the rule of results."""
        way_out = "give it as f="
        name = self.about.get("call", {}).get("model")
        if name is None:
            raise ValueError(f"{self.path}: the model {self.about['model']} cannot be imported by name: {way_out}")
        if not (isinstance(name, list) and [*map(type, name)] == [str, str]):
            raise DamagedFileError(self.path / METADATA, "it does not name its model", self.path)
        return import_model(name, self._trust, f"the model {'.'.join(name)}", way_out)

    def _call(self) -> dict[str, Any]:
        """Arguments of the fit, as far as the store has them."""
        about, names = self.about, self.param_names
        known = {name: about[name] for name in SAME if name in about} | about["limits"]
        kept = about.get("call", {})
        known |= {name: kept[name] for name in ("bounds", "expr") if kept.get(name)}
        popt, tied = self.popt, [name for name in names if name in about.get("expr", {})]
        held = [name for k, name in enumerate(names) if k not in about["free"] and name not in tied]
        fixed = {name: popt[..., names.index(name)] for name in held}
        fixed = {name: _single(values) for name, values in fixed.items()}
        return known | dict(p0=popt, axis=tuple(about["fit_axes"]), param_names=names, fixed=fixed or None)


def _single(values):
    """The only number that there is, besides NaN; else the values."""
    found = np.unique(values[np.isfinite(values)])
    return float(found[0]) if len(found) == 1 else values
