"""Pictures of a fit. Each function draws on ``ax``, or on axes of a new figure, and returns them.

A picture needs only sums in a fixed number of bins, however large the data are: see `dask_nlsq.results.binning`. The
functions do not show or save anything: notebooks show the figure, and ``axes.figure.savefig(path)`` saves it. Names are
drawn literally; a dollar sign does not start a formula. Needs the extra ``plot``.
"""

import textwrap
from typing import Any

import numpy as np

from .binning import BEYOND, Binned, Images, Log, binned
from .binning import images as images_of
from .coordinates import coordinates

__all__ = ["contours", "convergence", "correlation", "fit", "images", "profile", "residual_histogram", "residuals"]

DATA, MODEL = "#0072b2", "#d55e00"  # palette of M. Okabe and K. Ito, for colour-blind readers too
CURVE_POINTS = 500  # at which a model is drawn between few points of data
GAP = 3.0  # typical distances between bins, from which on the model is evaluated between them
PANELS = (5, 2)  # heights of a fit and of its residuals
LABELLED = 12  # most parameters with which each correlation is written as a number
SHOWN = (0.5, 99.5)  # percentiles of the data between which images are coloured
ROOM = 1.6  # factor between the least and the most that is drawn and the ends of a logarithmic axis
ROW = 24  # most letters of all names in a row; longer rows are turned
LINE = 40  # letters in a line of a label
NARROW = 5  # numbers at most along the axis of a narrow picture, whose digits may be many
LONG = 28  # letters of a name in a picture; longer names lose their middle


def fit(
    result,
    ax=None,
    x=None,
    bins: int = 200,
    *,
    coordinate: int | str | None = 0,
    log: Log = None,
    residuals: bool = False,
    components: bool = False,
    seen: Binned | None = None,
):
    """Data and model against a coordinate.

    Up to 2000 points are drawn each, with error bars where sigma was given. More points, and those with several
    coordinates, are binned in one pass over the data: the mean of y in each bin with its standard error, and the mean of
    the model over the same points.

    Parameters
    ----------
    result : FitResult
    ax : matplotlib axes, optional
        Two of them with ``residuals``.
    x : array_like, optional
        Where to draw the model, which has to have one coordinate. By default a fine grid for few points, else the bins.
    bins, coordinate, log
        As in `dask_nlsq.results.binning.binned`: by default axes are logarithmic where the data span decades.
    residuals : bool
        Whether residuals are drawn in axes below.
    components : bool
        Whether the summands of the model are drawn, too, for a sum of models of one coordinate.
    seen : Binned, optional
        What `dask_nlsq.results.binning.binned` has returned: then the data are not read, and ``bins``,
        ``coordinate`` and ``log`` are ignored.

    Returns
    -------
    matplotlib axes
        An array of two with ``residuals``.

    Raises
    ------
    ValueError
        As `dask_nlsq.results.binning.binned`.
    ModuleNotFoundError
        Without matplotlib.
    """
    need_matplotlib()
    if x is not None and not _smooth(result):
        raise ValueError("`x` is for models of one coordinate and data of one axis")
    seen = seen or binned(result, coordinate, bins, log)
    if residuals:
        axes = _axes(ax, 2, figsize=(6.4, 5.6), sharex=True, height_ratios=PANELS)
        _draw_residuals(seen, axes[1])
        top = axes[0]
    else:
        top = axes = _axes(ax)
    if (few := seen.points) is not None:
        drawn = few[0], few[1], few[3] if seen.weighted else None
        if x is None and _smooth(result) and seen.name == coordinates(result)[0].label:
            between = np.geomspace if seen.log else np.linspace
            x = between(few[0, 0], few[0, -1], CURVE_POINTS)
        line = few[0], few[2]
    else:
        drawn, line = (seen.x, seen.y, seen.error), (seen.x, seen.model)
        if x is None and _smooth(result) and seen.name == coordinates(result)[0].label:
            line = _across_gaps(result, seen)
    if x is not None:
        line = np.asarray(x, float), np.asarray(result.predict(np.asarray(x, float)))
    if components:
        if not _smooth(result):
            raise ValueError("`components` is for models of one coordinate and data of one axis")
        for name, values in result.components(np.asarray(line[0], float)).items():
            top.plot(line[0], np.asarray(values), "--", linewidth=1, label=name, zorder=2.5)
    _points(top, *drawn, hidden=int(np.sum(~(drawn[1] > 0))) if seen.log_y else 0)
    top.plot(*line, color=MODEL, linewidth=1.5, label="model", zorder=3)
    top.set_ylabel(_wrapped(seen.y_name if few is not None else f"mean of {seen.y_name}"), parse_math=False)
    if not residuals:
        top.set_xlabel(_wrapped(seen.name), parse_math=False)
    if seen.log:
        top.set_xscale("log")
    if seen.log_y:
        _log_y(top, drawn[1], line[1])
    top.legend(frameon=False)
    return axes


def residuals(
    result,
    ax=None,
    bins: int = 200,
    *,
    coordinate: int | str | None = 0,
    log: Log = None,
    seen: Binned | None = None,
):
    """Residuals against a coordinate, or with ``coordinate=None`` along the data.

    More than 2000 points in bins: their mean with its standard error. Parameters and errors as in `fit`; their own axis is
    never logarithmic.
    """
    axes = _axes(ax, figsize=(6.4, 3.2))
    _draw_residuals(seen or binned(result, coordinate, bins, log), axes)
    return axes


def images(result, axes=None, along=None, *, log: bool | None = None, seen: Images | None = None):
    """Data, model and residuals of data with two or more axes as images; white where no point counts.

    They are binned in one pass over the data, to 256 x 256 bins at most, as means over all other axes. Data and model have
    the same colours, from percentiles of the data.

    Parameters
    ----------
    result : FitResult
    axes : three matplotlib axes, optional
    along : pair, optional
        Rows and columns: axes of ydata by number, or axes and coordinates by name; by default the last two axes.
    log : bool, optional
        Colours by the logarithm; by default where the data span two decades.
    seen : Images, optional
        What `dask_nlsq.results.binning.images` has returned: then the data are not read, and ``along``
        and ``log`` are ignored.

    Returns
    -------
    array of three matplotlib axes

    Raises
    ------
    ValueError
        As `dask_nlsq.results.binning.images`.
    ModuleNotFoundError
        Without matplotlib.
    """
    need_matplotlib()
    from matplotlib.colors import LogNorm, Normalize

    seen = seen or images_of(result, along, log)
    axes = _axes(axes, 1, 3, figsize=(11, 3.4), sharex=True, sharey=True)
    known = seen.data[np.isfinite(seen.data) & ((seen.data > 0) | ~np.bool_(seen.log[2]))]
    low, high = np.percentile(known, SHOWN) if known.size else (0.1, 1)
    colours: Any = LogNorm if seen.log[2] else Normalize
    far = np.nanpercentile(abs(seen.residual), SHOWN[1]) if np.isfinite(seen.residual).any() else 1.0
    panels = (
        ("data", seen.data, colours(low, high), "viridis", seen.y_name),
        ("model", seen.model, colours(low, high), "viridis", seen.y_name),
        ("residual", seen.residual, Normalize(-far, far), "RdBu_r", seen.measure),
    )
    for ax, (title, values, norm, cmap, label) in zip(axes, panels, strict=True):
        if isinstance(norm, LogNorm):  # which would leave 0 white, as where there are no data
            values = np.maximum(values, low)
        image = _image(ax, seen, values, norm, cmap)
        bar = ax.figure.colorbar(image, ax=ax, extend="both", fraction=0.05, pad=0.02)
        bar.set_label(_wrapped(label), parse_math=label == seen.measure)
        ax.set_title(title)
        ax.set_xlabel(_wrapped(seen.names[1]), parse_math=False)
    axes[0].set_ylabel(_wrapped(seen.names[0]), parse_math=False)
    return axes


def residual_histogram(result, ax=None, *, seen: Binned | None = None):
    """Histogram of the residuals as a density, with the normal distribution of mean 0 and standard deviation 1.

    Residuals are ``(f - y) / sigma``; without sigma they are divided by the root of the reduced chi-square; those of counts
    are quantile residuals, see `dask_nlsq.results.binning`. Those of more than 6 are counted in the legend. Parameters and
    errors as in `fit`.
    """
    axes = _axes(ax, figsize=(4.8, 3.6))
    seen = seen or binned(result)
    what, unit = seen.measure, "" if seen.scale == 1 else f" in units of {seen.scale:.3g}"
    total = seen.histogram.sum() + seen.beyond
    label = "residuals" + (f", {seen.beyond:,} beyond ±{BEYOND:g}" if seen.beyond else "")
    axes.stairs(seen.histogram / total / np.diff(seen.edges), seen.edges, fill=True, color=DATA, alpha=0.6, label=label)
    z = np.linspace(-BEYOND, BEYOND, 241)
    axes.plot(z, np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi), color=MODEL, linewidth=1.5, label="unit normal")
    axes.set(xlabel=f"{what}{unit}", ylabel="density", xlim=(-BEYOND, BEYOND))
    axes.set_ylim(0, 1.3 * axes.dataLim.ymax)
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    return axes


def convergence(result, ax=None):
    """How the fit came to its end: by sweep, the cost above the least one, and the standard errors to the optimum."""
    axes = _axes(ax, figsize=(4.8, 3.6))
    cost = np.array([record.cost for record in result.history])
    distance = np.array([record.distance for record in result.history])
    above = cost - np.nanmin(cost)
    rows = (
        ("cost above the least, relative to the start", above, cost[0] - np.nanmin(cost), "o-", DATA),
        ("distance to the optimum, standard errors", distance, 1.0, "s--", MODEL),
    )
    sweeps = np.arange(1, len(cost) + 1)
    for label, values, first, marks, colour in rows:
        drawn = np.where((values > 0) & np.isfinite(values), values, np.nan) / (first if first > 0 else 1.0)
        axes.plot(sweeps, drawn, marks, color=colour, markersize=4, label=label)
    axes.set(xlabel="sweep", yscale="log", xlim=(0.5, len(cost) + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # for the legend
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    return axes


def correlation(result, ax=None):
    """Correlation of the parameters as coloured squares; parameters without an error, as fixed ones, are left out."""
    which = np.flatnonzero(np.isfinite(np.diag(result.correlation)))
    names, p = [_short(result.param_names[k]) for k in which], len(which)
    values = result.correlation[np.ix_(which, which)]
    side = min(2.4 + 0.4 * max(p, 2), 9.0)
    axes = _axes(ax, figsize=(side + 0.8, side))
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    every = -(-p // 40) or 1  # else names would lie on each other
    turned = dict(rotation=45, ha="right") if p * max(map(len, names)) > ROW else {}
    axes.set_xticks(range(0, p, every), names[::every], parse_math=False, **turned)
    axes.set_yticks(range(0, p, every), names[::every], parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if p <= LABELLED:
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=8, color="w" if abs(value) > 0.6 else "k")
    axes.figure.colorbar(image, ax=axes, label="correlation", fraction=0.046, pad=0.04)
    return axes


def row_of_axes(axes, n: int):
    """An array of ``n`` matplotlib axes beside each other: the given ones, or new ones."""
    return np.ravel(_axes(axes, 1, n, figsize=(4.8 * n, 3.6), squeeze=False))


def profile(found, ax=None):
    """Distance d of a `LikelihoodProfile` against the parameter, beside the straight line that the standard error gives."""
    axes = _axes(ax, figsize=(4.8, 3.6))
    span = np.array([found.values[0], found.values[-1]])
    axes.plot(span, (span - found.value) / found.error, "--", color="grey", linewidth=1, label="by the standard error")
    if len(found.values) > 3 and np.all(np.diff(found.distance) > 0):
        from scipy.interpolate import PchipInterpolator

        d = np.linspace(found.distance[0], found.distance[-1], CURVE_POINTS)
        axes.plot(PchipInterpolator(found.distance, found.values)(d), d, color=DATA, label="profile")
    axes.plot(found.values, found.distance, ".", color=DATA)
    for level, ends in zip(found.levels, found.intervals, strict=True):
        for end in ends[np.isfinite(ends)]:
            axes.axvline(end, color=MODEL, linewidth=0.8)
        if np.isfinite(ends[1]):
            axes.annotate(f" {100 * level:.3g} %", (ends[1], found.distance[0]), color=MODEL, fontsize="small")
    axes.set_xlabel(found.name, parse_math=False)
    axes.set_ylabel("distance (standard errors)")
    axes.locator_params(axis="x", nbins=NARROW)
    axes.legend(frameon=False, fontsize="small")
    return axes


def contours(found, ax=None):
    """The joint regions of a `LikelihoodContour`, beside the ellipses of the covariance."""
    axes = _axes(ax, figsize=(4.8, 4.2))
    for k, level in enumerate(found.levels):
        for points, style, colour in ((found.ellipses, "--", "grey"), (found.points, "-", DATA)):
            x, y = np.concatenate([points[k], points[k, :1]]).T
            axes.plot(x, y, style, color=colour, linewidth=1 if style == "--" else 1.5)
        if np.isfinite(found.points[k]).all():
            top = found.points[k, np.argmax(found.points[k, :, 1])]
            axes.annotate(f"{100 * level:.3g} %", top, color=DATA, fontsize="small", ha="center", va="bottom")
    axes.plot([], [], "-", color=DATA, label="profile likelihood")
    axes.plot([], [], "--", color="grey", label="covariance")
    axes.plot(*found.value, "+", color=MODEL, markersize=9)
    axes.set_xlabel(found.names[0], parse_math=False)
    axes.set_ylabel(found.names[1], parse_math=False)
    axes.locator_params(axis="x", nbins=NARROW)
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # off the optimum
    return axes


# ---------------------------------------------------------------------------------------------------------------------


def need_matplotlib():
    """The module; an error with the way out where it is missing."""
    try:
        import matplotlib
    except ImportError as err:
        raise ModuleNotFoundError('pictures need matplotlib: pip install "dask_nlsq[plot]"', name="matplotlib") from err
    return matplotlib


def _axes(ax, rows=1, columns=1, **layout):
    """The given axes, or those of a new figure, without what carries no information."""
    need_matplotlib()
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(rows, columns, layout="constrained", **layout)
    flat = np.ravel(ax)
    if len(flat) != rows * columns:
        raise ValueError(f"this picture needs {rows * columns} axes, not {len(flat)}")
    for each in flat:
        if not hasattr(each, "spines"):
            raise TypeError(f"`ax` must be matplotlib axes, not {each.item() if isinstance(each, np.generic) else each!r}")
        each.spines[["top", "right"]].set_visible(False)
    return flat if rows * columns > 1 or isinstance(ax, np.ndarray) else flat[0]


def _smooth(result) -> bool:
    """Whether the model can be evaluated between the points: it has one coordinate, and needs not all points at once."""
    if result.data is None:
        return False
    preparation = result.data.preparation
    return preparation.layouts.x_kind == "single" and preparation.layouts.ndim == 1 and not preparation.whole


def _across_gaps(result, seen: Binned) -> tuple[np.ndarray, np.ndarray]:
    """The model in the bins, and evaluated where bins between them have no points."""
    x = np.log10(seen.x) if seen.log else seen.x
    steps = np.diff(x)
    gaps = np.flatnonzero(steps > GAP * np.median(steps if len(steps) else 0))
    if not len(gaps):
        return seen.x, seen.model
    n = max(CURVE_POINTS // len(gaps), 1)
    between = np.linspace(x[:-1][gaps], x[1:][gaps], n + 2)[1:-1].T.ravel()
    between = 10**between if seen.log else between
    at = np.repeat(gaps + 1, n)
    return np.insert(seen.x, at, between), np.insert(seen.model, at, np.asarray(result.predict(between)))


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, LINE))


def _short(name: str) -> str:
    half = LONG // 2
    return name if len(name) <= LONG else f"{name[: half - 1]}…{name[-half:]}"


def _points(ax, x, y, error, hidden: int = 0):
    many = len(x) > 300
    style = dict(fmt=".", color=DATA, markersize=2.5 if many else 5, linewidth=0.6, alpha=0.7, zorder=2)
    ax.errorbar(x, y, error, label=f"data, {hidden:,} not positive" if hidden else "data", **style)


def _log_y(ax, *drawn):
    """A logarithmic axis to whose edge error bars run that reach down to 0."""
    values = np.concatenate([each[np.isfinite(each) & (each > 0)] for each in map(np.asarray, drawn)])
    ax.set_yscale("log", nonpositive="clip")
    if values.size:
        ax.set_ylim(values.min() / ROOM, values.max() * ROOM)


def _draw_residuals(seen, ax):
    ax.axhline(0, color=MODEL, linewidth=1, zorder=1)
    if seen.points is not None:
        _points(ax, seen.points[0], seen.points[4], None)
    else:
        _points(ax, seen.x, seen.residual, seen.spread / np.sqrt(seen.n))
    if seen.log:
        ax.set_xscale("log")
    ax.set_xlabel(_wrapped(seen.name), parse_math=False)
    ax.set_ylabel(seen.measure)


def _image(ax, seen: Images, values, norm, cmap):
    """Bins as pixels, of their width where they differ in it."""
    rows, columns = seen.edges
    ax.spines[:].set_visible(True)
    alike = all(np.allclose(np.diff(each), each[1] - each[0], rtol=1e-3) for each in seen.edges)
    if alike:
        low, high = rows[[0, -1]] if seen.upright else rows[[-1, 0]]
        values = values if seen.upright else values[::-1]
        style = dict(norm=norm, cmap=cmap, interpolation="nearest", aspect="auto", origin="lower")
        return ax.imshow(values, extent=(columns[0], columns[-1], low, high), **style)
    if seen.log[0]:
        ax.set_yscale("log")
    if seen.log[1]:
        ax.set_xscale("log")
    image = ax.pcolormesh(columns, rows, values, norm=norm, cmap=cmap, rasterized=True)
    if not seen.upright and not ax.yaxis_inverted():
        ax.invert_yaxis()
    return image
