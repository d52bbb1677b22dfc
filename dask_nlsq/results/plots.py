"""Pictures of a fit, and of maps. Each function draws on ``ax``, or on axes of a new figure, and returns them.

However large the data are, what comes back for a picture are the sums in some bins: see `dask_nlsq.results.binning`.
Nothing is shown and nothing saved: that is ``axes.figure.savefig(path)``, or the notebook's part. Names are drawn as they
are: a dollar sign in them begins no mathematics. Needs the extra ``plot``.
"""

import numpy as np

from .binning import BEYOND, Binned, binned, data_of

__all__ = ["contours", "convergence", "correlation", "fit", "maps", "profile", "residual_histogram", "residuals"]

DATA, MODEL = "#0072b2", "#d55e00"  # of M. Okabe and K. Ito, told apart by colour-blind eyes too
CURVE_POINTS = 500  # of a model between few points of data
PANELS = (5, 2)  # heights of a fit and of its residuals
LABELLED = 12  # parameters up to which each correlation is written as a number
COLOURED = (2, 98)  # percentiles of a parameter between which its map is coloured
MOST_PIXELS = 2**22  # of a map that is computed to be drawn


def fit(
    result,
    ax=None,
    x=None,
    bins: int = 200,
    *,
    coordinate: int | None = 0,
    log: bool = False,
    residuals: bool = False,
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
        As in `dask_nlsq.results.binning.binned`; ``log`` also makes the axis logarithmic.
    residuals : bool
        Whether residuals are drawn in axes below.
    seen : Binned, optional
        What `dask_nlsq.results.binning.binned` has returned: no pass then, and the three arguments before do not count.

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
        _points(top, few[0], few[1], few[3] if seen.weighted else None)
        if x is None and _smooth(result):
            between = np.geomspace if seen.log else np.linspace
            x = between(few[0, 0], few[0, -1], CURVE_POINTS)
        line = few[0], few[2]
    else:
        _points(top, seen.x, seen.y, seen.error)
        line = seen.x, seen.model
    if x is not None:
        line = np.asarray(x, float), np.asarray(result.predict(np.asarray(x, float)))
    top.plot(*line, color=MODEL, linewidth=1.5, label="model", zorder=3)
    top.set_ylabel("y" if few is not None else f"mean of y in {len(seen.x)} bins")
    if not residuals:
        top.set_xlabel(seen.name, parse_math=False)
    if seen.log:
        top.set_xscale("log")
    top.legend(frameon=False)
    return axes


def residuals(
    result, ax=None, bins: int = 200, *, coordinate: int | None = 0, log: bool = False, seen: Binned | None = None
):
    """Residuals against a coordinate, or with ``coordinate=None`` along the data.

    More than 2000 points in bins: their mean with its standard error. Parameters and errors as in `fit`.
    """
    axes = _axes(ax, figsize=(6.4, 3.2))
    _draw_residuals(seen or binned(result, coordinate, bins, log), axes)
    return axes


def residual_histogram(result, ax=None, *, seen: Binned | None = None):
    """Histogram of the residuals as a density, with the normal distribution of mean 0 and standard deviation 1.

    Residuals are ``(f - y) / sigma``; without sigma they are divided by the root of the reduced chi-square. Those of more
    than 6 are counted in the legend. Parameters and errors as in `fit`.
    """
    axes = _axes(ax, figsize=(4.8, 3.6))
    seen = seen or binned(result)
    total = seen.histogram.sum() + seen.beyond
    label = "residuals" + (f", {seen.beyond:,} beyond ±{BEYOND:g}" if seen.beyond else "")
    axes.stairs(seen.histogram / total / np.diff(seen.edges), seen.edges, fill=True, color=DATA, alpha=0.6, label=label)
    z = np.linspace(-BEYOND, BEYOND, 241)
    axes.plot(z, np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi), color=MODEL, linewidth=1.5, label="unit normal")
    unit = "" if seen.scale == 1 else f" in units of {seen.scale:.3g}"
    axes.set(xlabel=f"{seen.measure}{unit}", ylabel="density", xlim=(-BEYOND, BEYOND))
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
    axes.legend(frameon=False, fontsize="small")
    return axes


def correlation(result, ax=None):
    """Correlation of the parameters as coloured squares; parameters without an error, as fixed ones, are left out."""
    which = np.flatnonzero(np.isfinite(np.diag(result.correlation)))
    names, p = [result.param_names[k] for k in which], len(which)
    values = result.correlation[np.ix_(which, which)]
    side = min(2.4 + 0.4 * max(p, 2), 9.0)
    axes = _axes(ax, figsize=(side + 0.8, side))
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    every = -(-p // 40) or 1  # else names would lie on each other
    turned = dict(rotation=45, ha="right") if p > 4 else {}
    axes.set_xticks(range(0, p, every), names[::every], parse_math=False, **turned)
    axes.set_yticks(range(0, p, every), names[::every], parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if p <= LABELLED:
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=8, color="w" if abs(value) > 0.6 else "k")
    axes.figure.colorbar(image, ax=axes, label="correlation", fraction=0.046, pad=0.04)
    return axes


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
    axes.set_ylabel("distance from the optimum, standard errors")
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
    axes.legend(frameon=False, fontsize="small")
    return axes


def maps(found, names=None, axes=None):
    """Maps of parameters, white where there is no success; for maps with one or two axes.

    Parameters
    ----------
    found : MapResult
        Where it is lazy, it is computed for the picture alone, up to 4 million pixels.
    names : sequence of str, optional
        Of the parameters to draw; all by default.
    axes : sequence of matplotlib axes, optional
        One for each of them.

    Returns
    -------
    ndarray of matplotlib axes

    Raises
    ------
    ValueError
        Maps with other numbers of axes, unknown names, lazy maps that are too large.
    """
    names = list(found.param_names if names is None else names)
    if unknown := [name for name in names if name not in found.param_names]:
        raise ValueError(f"`names`: no parameter {', '.join(unknown)}; there are {', '.join(found.param_names)}")
    if found.record.ndim not in (1, 2):
        raise ValueError(f"plot draws maps with one or two axes, this one has {found.record.ndim}: take a slice of popt")
    if found.lazy and found.record.size > MOST_PIXELS:
        raise ValueError(
            f"this map of {found.record.size:,} pixels is not computed yet, and would be for a picture alone (limit "
            f"{MOST_PIXELS:,}): draw what compute() returns, or to_zarr(path) first"
        )
    found = found.compute()
    good, dims = found.success, found.map_dims
    axes = _axes(axes, 1, len(names), figsize=(3.2 * len(names), 3), squeeze=False).ravel()
    for ax, name in zip(axes, names, strict=True):
        k = found.param_names.index(name)
        values = np.where(good, found.popt[..., k], np.nan)
        if values.ndim == 1:
            _points(ax, np.arange(len(values)), values, found.perr[..., k])
        else:
            low, high = np.nanpercentile(values, COLOURED) if good.any() else (0, 1)
            image = ax.imshow(values, vmin=low, vmax=high, interpolation="nearest", aspect="auto", cmap="viridis")
            ax.spines[:].set_visible(True)
            ax.figure.colorbar(image, ax=ax, extend="both")
            ax.set_ylabel(dims[0], parse_math=False)
        ax.set_xlabel(dims[-1], parse_math=False)
        ax.set_title(name, parse_math=False)
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
        each.spines[["top", "right"]].set_visible(False)
    return flat if rows * columns > 1 or isinstance(ax, np.ndarray) else flat[0]


def _smooth(result) -> bool:
    """Whether the model can be evaluated between the points: it has one coordinate, and needs not all points at once."""
    if result.data is None:
        return False
    preparation = data_of(result)[0].preparation
    return preparation.layouts.x_kind == "single" and preparation.layouts.ndim == 1 and not preparation.whole


def _points(ax, x, y, error):
    many = len(x) > 300
    ax.errorbar(
        x, y, error, fmt=".", color=DATA, markersize=2.5 if many else 5, linewidth=0.6, alpha=0.7, label="data", zorder=2
    )  # fmt: skip


def _draw_residuals(seen, ax):
    ax.axhline(0, color=MODEL, linewidth=1, zorder=1)
    if seen.points is not None:
        _points(ax, seen.points[0], seen.points[4], None)
    else:
        _points(ax, seen.x, seen.residual, seen.spread / np.sqrt(seen.n))
    if seen.log:
        ax.set_xscale("log")
    ax.set_xlabel(seen.name, parse_math=False)
    ax.set_ylabel(seen.measure)
