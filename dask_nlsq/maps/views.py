"""Views of maps of fits, whether lazy, computed or stored: by name, as text, HTML, pictures and pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..base.text import NamesOfLmfit, html_table, near, table
from ..kernels.lanes import MapStatus, succeeded
from ..model.params import Parameter, of_map
from . import pictures
from .pictures import Axis, status_name
from .report import report
from .viewer import Viewer, viewer

MOST_PIXELS = 2**22  # of a map that is computed, or read, to be drawn
MOST_TOLD = 2**20  # of a map that is read for its text in a notebook
OTHERS = ("chi2", "distance", "status", "n_points", "nfev")  # that a pixel has one number of
UNREAD = "stored, and too large to be read for a summary: use status, popt and others, or to_xarray()"
BESIDE = "display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start"  # style of tables beside each other


def _field(name: str, doc: str):
    return property(lambda self: self.field(name), doc=doc)


class Maps(NamesOfLmfit):
    """Maps by name, and pictures of them; a class of its own says where they are."""

    param_names: tuple[str, ...]
    derived_names: tuple[str, ...]
    plan: Any
    lazy = stored = False
    word = "pixel"  # for what each fit is of

    popt = _field("popt", "Parameters of each pixel, (*map, p); NaN where there was no fit.")
    perr = _field("perr", "Their standard errors, (*map, p): 0 for fixed ones, inf where the data do not determine them.")
    pcov = _field("pcov", "Their covariance, (*map, p, p); with ``full_covariance`` only.")
    chi2 = _field("chi2", "Twice the cost at popt, of the map's shape.")
    distance = _field("distance", "Standard errors to the optimum of the quadratic model; NaN without degrees of freedom.")
    n_points = _field("n_points", "Points that counted.")
    nfev = _field("nfev", "Evaluations of the model.")
    status = _field("status", "A `MapStatus` for each pixel, uint8; from 1 to 6 the fit has converged.")
    at_bound = _field("at_bound", "-1 where a parameter is at its lower bound, 1 at its upper one, else 0; (*map, p), int8.")
    derived = _field(
        "derived", "Quantities that ``expr`` derives, (*map, d), as ``derived_names`` names them; only where there are some."
    )
    derived_error = _field("derived_error", "Their standard errors, (*map, d).")

    def field(self, name: str) -> Any:
        """An array by its name; an AttributeError where the maps do not have it."""
        raise NotImplementedError

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the map as pictures have them."""
        raise NotImplementedError

    def compute(self, progress: bool | None = None, **options) -> Maps:
        raise NotImplementedError

    def to_xarray(self):
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map."""
        raise NotImplementedError

    @property
    def heading(self) -> str:
        """What this is, in a line."""
        raise NotImplementedError

    @property
    def origin(self) -> list[tuple[str, str]]:
        """Rows about where the maps come from."""
        raise NotImplementedError

    @property
    def success(self):
        """Where the fit has converged to parameters that the data determine."""
        return succeeded(self.status)

    # -----------------------------------------------------------------------------------------------------------------
    # by name

    def __getitem__(self, name: str) -> Parameter:
        """Values and errors of a parameter, of the map's shape: ``fits["rate"].value``; DataArrays where it has labels."""
        return of_map(self, name, labelled=self.labelled)

    labelled = False

    def sel(self, **indexers):
        """A part of `to_xarray`, by labels: ``fits.sel(param="rate", x=1.2, method="nearest")``, as `xarray.Dataset.sel`."""
        return self.to_xarray().sel(**indexers)

    def check_name(self, name: str) -> None:
        """ValueError where `values_of` has nothing of this name."""
        named = (*self.param_names, *self.derived_names)
        base, _, what = name.rpartition(".")
        if not (name in named or name in OTHERS or (what == "error" and base in named)):
            known = [*named, *OTHERS]
            raise ValueError(
                f"`names`: there is no map of {name!r}{near(name, known, '; ')}; there are {', '.join(known)}, and errors, "
                f'as "{named[0]}.error"'
            )

    def values_of(self, name: str):
        """A map and its errors, if any: NaN where a fit failed; of others than parameters only where there was no fit."""
        base, _, what = name.rpartition(".")
        for names, fields in ((self.param_names, ("popt", "perr")), (self.derived_names, ("derived", "derived_error"))):
            if name in names or (base in names and what == "error"):
                k, good = names.index(name if name in names else base), self.success
                values, errors = (np.where(good, self.field(each)[..., k], np.nan) for each in fields)
                return (values, errors) if name in names else (errors, None)
        values = self.field(name)
        return (values if name == "status" else np.where(np.isfinite(self.chi2), values, np.nan)), None

    # -----------------------------------------------------------------------------------------------------------------
    # seen

    def drawable(self) -> Maps:
        """The same, computed.

        Raises
        ------
        ValueError
            Maps with other numbers of axes than one or two; lazy and stored maps that are too large.
        """
        if len(self.shape) not in (1, 2):
            raise ValueError(
                f"pictures are of maps with one or two axes, this one has {len(self.shape)}: draw a slice of to_xarray()"
            )
        n = prod(self.shape)
        if self.stored and n > MOST_PIXELS:
            raise ValueError(
                f"this map of {n:,} pixels is in a store, and would be read for a picture alone (limit {MOST_PIXELS:,}): "
                "draw a part of to_xarray()"
            )
        if self.lazy and n > MOST_PIXELS:
            raise ValueError(
                f"this map of {n:,} pixels is not computed yet, and would be for a picture alone (limit {MOST_PIXELS:,}): "
                "draw what compute() returns, or to_zarr(path) first"
            )
        return self.compute()

    def plot(self, axes=None, names=None, **options):
        """Maps of parameters and of what else each pixel has: `dask_nlsq.plots.maps`.

        Parameters
        ----------
        axes : matplotlib axes, optional
            As many as ``names``.
        names : sequence of str, optional
            Of parameters, derived quantities, errors as "rate.error", "chi2", "status", ...; by default all parameters.
        **options
            ``vmin``, ``vmax``, ``cmap``.
        """
        return pictures.maps(self, names, axes, **options)

    def view(self, path: str | Path | None = None) -> Viewer | Path:
        """Maps beside each other, of which a click on a pixel shows spectrum, fit and values: `dask_nlsq.maps.viewer`.

        Parameters
        ----------
        path : path, optional
            Of an HTML file that needs nothing else; by default what is returned is shown by a notebook.
        """
        page = viewer(self)
        return page if path is None else page.save(path)

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page about the maps: `dask_nlsq.maps.report.report`."""
        return report(self, path)

    def medians(self, names: Sequence[str] | None = None) -> list[tuple[str, float, float, float, float]]:
        """Of each parameter over pixels of success: name, median, 16 and 84 %, median of the errors."""
        rows = []
        for name in (*self.param_names, *self.derived_names) if names is None else names:
            values, errors = self.values_of(name)
            if (good := np.isfinite(values)).any():
                low, middle, high = np.percentile(values[good], [16, 50, 84])
                rows.append((name, middle, low, high, float(np.median(errors[good]))))
        return rows

    def __repr__(self):
        if self.lazy:
            return f"<{self.heading}>\nlazy: compute(), to_zarr(path) or to_xarray()\n{self.plan}"
        if self._unread:
            return "\n".join([f"<{self.heading}>", UNREAD, *table(self.origin)])
        seen = self.compute()
        rows = [
            f"  {name}: median {middle:.6g}, 68 % from {low:.6g} to {high:.6g}"
            for name, middle, low, high, _ in seen.medians()
        ]
        return "\n".join([f"<{self.heading}>", *status_counts(seen.status), *rows])

    @property
    def _unread(self) -> bool:
        """Whether it is too large to be read for its text."""
        return self.stored and prod(self.shape) > MOST_TOLD

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """Statuses, medians and small maps, as notebooks show them; of lazy maps the plan, of large stores what they are."""
        head = f"<p><b>{escape(self.heading)}</b></p>"
        if self.lazy:
            return f"{head}<p>lazy: compute(), to_zarr(path) or to_xarray()</p><pre>{escape(str(self.plan))}</pre>"
        if self._unread:
            return f"{head}<p>{UNREAD}</p>{html_table(('', ''), self.origin)}"
        seen = self.compute()
        return f"{head}{seen.tables()}{pictures.thumbnails(seen)}"

    def tables(self, names: Sequence[str] | None = None) -> str:
        """HTML tables of statuses and medians, by default of all parameters."""
        rows = [
            (name, f"{middle:.5g}", f"{low:.5g} to {high:.5g}", f"{error:.2g}")
            for name, middle, low, high, error in self.medians(names)
        ]
        medians = html_table(("parameter", "median", f"68 % of the {self.word}s", "median error"), rows)
        statuses = html_table((f"{self.word}s", "status"), counted(self.status))
        return f'<div style="{BESIDE}">{statuses}{medians if rows else ""}</div>'


def counted(status) -> list[tuple[str, str]]:
    """How many pixels have each status; those that have converged by one test or another together."""
    codes, counts = np.unique(status, return_counts=True)
    rows = [
        (n, status_name(code), MapStatus.GTOL <= code <= MapStatus.ROUNDING) for code, n in zip(codes, counts, strict=True)
    ]
    by_test = [(n, name) for n, name, converged in rows if converged]
    tests = ", ".join(f"{n:,} {name}" if len(by_test) > 1 else name for n, name in by_test)
    first = [(f"{sum(n for n, _ in by_test):,}", f"converged ({tests})")] if by_test else []
    return first + [(f"{n:,}", name) for n, name, converged in rows if not converged]


def status_counts(status) -> list[str]:
    """A line for each status: of how many pixels, and its name."""
    return table([("", *row) for row in counted(status)], "<>")


def shown(shape, names, word: str) -> str:
    """Words for a map of a shape, and its parameters."""
    return f"{' x '.join(map(str, shape)) or '1'} {word}{'s' * (shape != ())}, {', '.join(names)}"
