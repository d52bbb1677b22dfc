"""Pictures of maps of fits, and of one of their spectra, with the names, coordinates and units of the data.

Colours range over pixels that the data determine: converged ones whose error is among the small ones, or whose value is far
from the median of the map in units of its error. So a lifetime of 1e8 +- 1e12 in a dark pixel does not make the rest of the
map black, and a bright spot with a small error stays within the range.
"""

import base64
from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from io import BytesIO
from textwrap import wrap
from typing import Literal, NamedTuple

import numpy as np

from ..data.labels import Quantity
from ..kernels.lanes import MapStatus
from ..results.plots import DATA, MODEL, PANELS, need_matplotlib

COLOURED = (2, 98)  # percentiles of what is determined between which a map is coloured
BELOW = 24  # letters below a map
ROUNDING = 1e-9  # relative: values that differ less are drawn as one
SMALL_ERROR = 10  # times the error that 10 % of the pixels are below
CERTAIN = 3  # errors from the middle of the map
DECADES = 100  # ratio of these percentiles above which colours of positive values are on a log scale
PER_ROW, PANEL = 4, 3.2  # panels beside each other; the width of one in inches
MOST_SMALL = 8  # parameters that a notebook shows in small
BINS = 60  # of a histogram
LONGEST = 26  # characters in a line of a title, or beside a map
SLIM = 2.5  # ratio of the sides of a map from which they are drawn as if they were alike
EVEN = 1e-3  # of a step, by which the steps of an even axis may differ
COLOURS = {  # of each status
    MapStatus.GTOL: "#1b7f5c", MapStatus.FTOL: "#2a9d78", MapStatus.XTOL: "#57b894", MapStatus.FTOL_XTOL: "#86cfb1",
    MapStatus.ROUNDING: "#b5e3d0", MapStatus.AT_BOUND: "#0072b2", MapStatus.SINGULAR: "#f0e442",
    MapStatus.ITERATION_LIMIT: "#e69f00", MapStatus.STUCK: "#d55e00", MapStatus.UNDETERMINED: "#b8860b",
    MapStatus.NON_FINITE: "#a0144f", MapStatus.TOO_FEW_POINTS: "#8c8c8c", MapStatus.MASKED: "#d9d9d9",
    MapStatus.NOT_FITTED_YET: "#f2f2f2",
}  # fmt: skip


class Axis(NamedTuple):
    """An axis of a map as pictures have it."""

    label: str
    unit: str
    values: np.ndarray  # numbers, one for each pixel; the number of the pixel where there are no coordinates
    known: bool  # whether they are coordinates
    begin: np.datetime64 | None = None  # the date that they are seconds since

    @property
    def even(self) -> bool:
        steps = np.diff(self.values)
        return not len(steps) or bool(np.all(np.abs(steps - steps.mean()) <= EVEN * abs(steps.mean())))

    @property
    def edges(self) -> tuple[float, float]:
        """Of the first and the last pixel, of an even axis."""
        step = (self.values[-1] - self.values[0]) / (len(self.values) - 1) if len(self.values) > 1 else 1.0
        return float(self.values[0] - step / 2), float(self.values[-1] + step / 2)


def axis_of(dim: str, n: int, coordinate) -> Axis:
    """The axis ``dim`` of n pixels; its coordinate is dims, values and attributes, or None.

    Dates are seconds since the first one.
    """
    if coordinate is None or tuple(coordinate[0]) != (dim,) or np.shape(coordinate[1]) != (n,) or n < 2:
        return Axis(dim, "", np.arange(n, dtype=float), False)
    values, quantity, begin = np.asarray(coordinate[1]), Quantity.named(dim, coordinate[2]), None
    if values.dtype.kind == "M":
        quantity = quantity._replace(unit=f"s since {str(values[0])[:19]}")
        begin = values[0]
        values = (values - begin) / np.timedelta64(1, "s")
    steps = np.diff(values.astype(float)) if values.dtype.kind in "iuf" else np.zeros(1)
    if not (np.all(steps > 0) or np.all(steps < 0)):
        return Axis(dim, "", np.arange(n, dtype=float), False)
    return Axis(str(quantity), quantity.unit, values.astype(float), True, begin)


def maps(found, names=None, axes=None, *, vmin=None, vmax=None, cmap=None):
    """Maps of parameters and of what else each pixel has, white where there is no success; of one or two axes.

    Parameters
    ----------
    found : MapResult
        Lazy maps are computed, and stored ones read, for the picture alone, up to 4 million pixels.
    names : sequence of str, optional
        What to draw; all parameters by default. Also derived quantities, "chi2", "distance", "status", "n_points", "nfev",
        and errors, as "rate.error".
    axes : sequence of matplotlib axes, optional
        One for each of them.
    vmin, vmax, cmap : optional
        Ends of the colours, or of y for maps of one axis, and matplotlib's colour map; of all, or dicts by name. By default
        colours range over what the data determine: see `dask_nlsq.maps.pictures`.

    Returns
    -------
    ndarray of matplotlib axes

    Raises
    ------
    ValueError
        Maps with other numbers of axes, unknown names or none, lazy and stored maps that are too large.
    """
    names = list(found.param_names if names is None else [names] if isinstance(names, str) else names)
    if not names:
        raise ValueError("`names` is empty: give what to draw, or None for all parameters")
    for name in names:
        found.check_name(name)
    for what, given in dict(vmin=vmin, vmax=vmax, cmap=cmap).items():
        if unknown := [name for name in given if name not in names] if isinstance(given, Mapping) else []:
            raise ValueError(f"`{what}` names {', '.join(unknown)}; drawn are {', '.join(names)}")
    found = found.drawable()
    axes = _axes(axes, len(names), found.axes)
    for ax, name in zip(axes, names, strict=True):
        low, high, colours = (given.get(name) if isinstance(given, Mapping) else given for given in (vmin, vmax, cmap))
        values, errors = found.values_of(name)
        if len(found.axes) == 1:
            _curve(ax, found.axes[0], name, values, errors, (low, high))
        elif name == "status":
            _categories(ax, found.axes, values)
        else:
            _image(ax, found.axes, values, limits(name, values, errors, low, high), colours)
        ax.set_title("\n".join(wrap(name, LONGEST)), parse_math=False)
    return axes


def limits(name, values, errors, low=None, high=None) -> tuple[float, float, bool]:
    """Ends of the colours of a map, as `dask_nlsq.maps.pictures` says, and whether they are on a log scale."""
    counted = values[determined(values, errors)]
    counted = counted if counted.size else values[np.isfinite(values)]
    ends = np.percentile(counted, COLOURED) if counted.size else (0.0, 1.0)
    if ends[1] - ends[0] <= ROUNDING * max(np.abs(ends)):  # the same value everywhere
        ends = np.full(2, np.mean(ends))
    low, high = (float(end if given is None else given) for end, given in zip(ends, (low, high), strict=True))
    positive = name.endswith(".error") or name in ("chi2", "distance")
    return low, high, positive and low > 0 and high > DECADES * low


def ends_with_errors(name, values, errors) -> tuple[float, float]:
    """Ends of an axis that shows the error bars of what the data determine, too."""
    low, high, _ = limits(name, values, errors)
    rounding = ROUNDING * max(abs(low), abs(high))
    shown = determined(values, errors) & (values >= low - rounding) & (values <= high + rounding)
    margin = max(0.3 * (high - low), 1.1 * errors[shown].max(initial=0.0)) or _around(high)
    return low - margin, high + margin


def determined(values, errors):
    """Pixels whose values the data determine."""
    good = np.isfinite(values)
    if errors is None or not good.any():
        return good
    good = good & np.isfinite(errors)
    if not good.any():
        return good
    small = errors <= SMALL_ERROR * np.percentile(errors[good], 10)
    return good & (small | (np.abs(values - np.median(values[good])) >= CERTAIN * errors))


def spectrum(seen, axes=None):
    """Data, model and residuals of a pixel, as `MapResult.spectrum` gives them, on two axes.

    Parameters
    ----------
    seen : Spectrum
    axes : pair of matplotlib axes, optional

    Returns
    -------
    ndarray of matplotlib axes
    """
    need_matplotlib()
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(2, 1, sharex=True, height_ratios=PANELS, layout="constrained", figsize=(6.4, 5.0))
    axes = np.ravel(axes)
    top, below = axes
    x, label = seen.drawn_x
    order = np.argsort(x, kind="stable")
    many = dict(markersize=2.5 if len(x) > 300 else 4, linewidth=0.6)
    errors = None if seen.sigma is None else seen.sigma[order]
    top.errorbar(x[order], seen.y[order], errors, fmt=".", color=DATA, alpha=0.7, label="data", zorder=2, **many)
    top.plot(x[order], seen.model[order], color=MODEL, linewidth=1.5, label="model", zorder=3)
    below.axhline(0, color=MODEL, linewidth=1, zorder=1)
    below.plot(x[order], seen.residual[order], ".", color=DATA, **many)
    top.set_title(seen.title, parse_math=False, fontsize="medium")
    top.set_ylabel(seen.labels["y"], parse_math=False)
    below.set_ylabel(seen.labels["residual"].replace(" / ", "\n/ "))
    below.set_xlabel(label, parse_math=False)
    top.legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def thumbnails(found) -> str:
    """Small maps of the parameters, as an image within HTML; nothing without matplotlib, or of more than two axes."""
    if find_spec("matplotlib") is None or len(found.shape) not in (1, 2) or 0 in found.shape:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = found.param_names[:MOST_SMALL]
    with rc_context({"font.size": 7.5}):
        figure = Figure(layout="constrained")
        maps(found, names, panels(figure, len(names), found.axes, width=2.2))
        return embedded(figure, f"maps of {', '.join(names)}", "png")


def histograms(found, names, axes) -> None:
    """How the values of parameters are distributed over the pixels whose data determine them."""
    for ax, name in zip(axes, names, strict=True):
        values, errors = found.values_of(name)
        low, high, _ = limits(name, values, errors)
        kept = values[determined(values, errors)]
        margin = 0.25 * (high - low) or _around(high)
        counts, edges = np.histogram(kept, BINS, (low - margin, high + margin))
        ax.stairs(counts, edges, fill=True, color=DATA, alpha=0.7)
        ax.set_title("\n".join(wrap(name, LONGEST)), parse_math=False)
        ax.set_ylabel(f"{found.word}s")
        ax.locator_params(axis="x", nbins=4)
        ax.spines[["top", "right"]].set_visible(False)


def embedded(figure, alt: str, kind: Literal["svg", "png"] = "svg") -> str:
    """A figure as an image within HTML."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "dask_nlsq"}):
        figure.savefig(file, format=kind, dpi=100, metadata={"Date": None} if kind == "svg" else None)
    mime = "svg+xml" if kind == "svg" else kind
    return f'<img src="data:image/{mime};base64,{base64.b64encode(file.getvalue()).decode()}" alt="{escape(alt)}">'


# ---------------------------------------------------------------------------------------------------------------------


def _axes(axes, n, along):
    """Those given, or of a new figure, of a shape that fits the map."""
    need_matplotlib()
    if axes is None:
        import matplotlib.pyplot as plt

        axes = panels(plt.figure(layout="constrained"), n, along)
    axes = np.ravel(axes)
    if len(axes) != n:
        raise ValueError(f"this picture needs {n} axes, not {len(axes)}")
    return axes


def panels(figure, n: int, along, width: float = PANEL):
    """Axes for n maps in a figure, which gets the size that they need."""
    columns, ratio = min(n, PER_ROW), shape(along)
    rows, beside = -(-n // columns), 0.45 * width  # of labels and colours
    height = 0.8 * width if ratio is None else (width - beside) * ratio + 0.75
    figure.set_size_inches(columns * width, rows * height)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.remove()
    return axes[:n]


def shape(along) -> float | None:
    """Height by width of a map whose axes have the same unit; None where the units differ, or one axis is much longer."""
    if len(along) != 2 or along[0].unit != along[1].unit or along[0].known != along[1].known:
        return None
    (bottom, top), (left, right) = (each.edges for each in along)
    ratio = abs(top - bottom) / abs(right - left)
    return ratio if 1 / SLIM <= ratio <= SLIM else None


def _mesh(ax, along, values, **options):
    """The image of a map in its coordinates: ascending ones go up; without any, the first row is at the top."""
    y, x = along
    if y.even and x.even:
        drawn = ax.imshow(values, extent=(*x.edges, *y.edges), origin="lower", interpolation="nearest", **options)
    else:
        drawn = ax.pcolormesh(x.values, y.values, values, shading="nearest", rasterized=True, **options)
    ax.set_aspect("auto" if shape(along) is None else "equal")
    ax.set_xlim(*sorted(ax.get_xlim()))
    ax.set_ylim(*sorted(ax.get_ylim(), reverse=not y.known))
    ax.set_xlabel(x.label, parse_math=False)
    ax.set_ylabel("\n".join(wrap(y.label, LONGEST)), parse_math=False)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color("#b0b0b0")
    ax.locator_params(nbins=5)
    if x.known:
        ax.ticklabel_format(axis="x", useOffset=False)  # it would stand on the label
    for most in range(5, 0, -1):
        ax.locator_params(axis="x", nbins=most)
        if sum(len(label) + 2 for label in ax.xaxis.get_major_formatter().format_ticks(_within(ax))) <= BELOW:
            break
    else:
        ax.tick_params(axis="x", labelrotation=30)  # the fewest are too long
    return drawn


def _within(ax) -> list[float]:
    """Ticks below a map."""
    low, high = ax.get_xlim()
    return [tick for tick in ax.get_xticks() if low <= tick <= high]


def _image(ax, along, values, ends, colours):
    from matplotlib.colors import LogNorm, Normalize

    low, high, log = ends
    drawn = _mesh(ax, along, values, norm=(LogNorm if log else Normalize)(low, high), cmap=colours or "viridis")
    below, above = np.nanmin(values, initial=low) < low, np.nanmax(values, initial=high) > high
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[int(below), int(above)]
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((1.04, 0, 0.05, 1)), extend=extend)
    if low == high:
        bar.set_ticks([low])


def _categories(ax, along, status):
    """Statuses as colours with their names and how many pixels have them."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    codes, place, counts = np.unique(status, return_inverse=True, return_counts=True)
    colours = [COLOURS[MapStatus(code)] for code in codes]
    drawn = dict(vmin=-0.5, vmax=len(codes) - 0.5, cmap=ListedColormap(colours))
    _mesh(ax, along, place.reshape(status.shape), **drawn)
    named = [f"{n:,} {status_name(code)}" for code, n in zip(codes, counts, strict=True)]
    handles = [Patch(facecolor=each, label=name) for each, name in zip(colours, named, strict=True)]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize="x-small",
              handlelength=1.0, handletextpad=0.4)  # fmt: skip


def _around(value: float) -> float:
    """What an axis shows to each side of the only value."""
    return 0.5 * abs(value) or 0.5


def status_name(code) -> str:
    return MapStatus(code).name.lower().replace("_", " ")


def _curve(ax, axis, name, values, errors, given):
    good = np.isfinite(values)
    many = good.sum() > 300
    ax.errorbar(
        axis.values[good], values[good], None if errors is None else errors[good], fmt=".", color=DATA,
        markersize=2.5 if many else 5, linewidth=0.6, alpha=0.7,
    )  # fmt: skip
    if errors is not None and not determined(values, errors)[good].all():
        ax.set_ylim(*ends_with_errors(name, values, errors))
    low, high = ax.get_ylim()
    if high - low <= ROUNDING * max(abs(low), abs(high)):
        ax.set_ylim(low - _around(low), high + _around(high))
    ax.set_ylim(*given)
    if name == "status":
        codes = np.unique(values)
        ax.set_yticks(codes, [status_name(code) for code in codes])
    ax.set_xlabel(axis.label, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
