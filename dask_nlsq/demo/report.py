"""What the demonstration says about its fits, and the picture of them."""

from pathlib import Path
from textwrap import wrap

import numpy as np
import zarr

from ..base.text import size, table
from ..results.plots import convergence
from .measurement import NOISE, Measurement, expected_cost

WIDTH = 100  # columns of the report
FORMATS = (".6g", ".6g", ".6g", ".2g", ".2f")


def parameters(measurement: Measurement, result, pulls: np.ndarray) -> list[str]:
    """One line per parameter."""
    columns = (measurement.truth, measurement.start, result.popt, result.perr, pulls)
    texts = [[f"{value:{form}}" for value in column] for column, form in zip(columns, FORMATS, strict=True)]
    rows = [("parameter", "truth", "start", "fit", "std. error", "pull"), *zip(measurement.names, *texts, strict=True)]
    largest, rms = np.abs(pulls).max(), np.sqrt(np.mean(pulls**2))
    pull = f"pull = (fit - truth) / std. error: largest {largest:.2f}, root mean square {rms:.2f}"
    return ["", *table(rows, "<>>>>>"), pull]


def reduced_chi_square(result) -> float:
    """Cost in units of the expected one: 1, but for noise, where the model is right."""
    return result.cost / expected_cost(result.n_points, len(result.popt))


def facts(result) -> list[str]:
    """How the fit went."""
    free = result.n_points - len(result.popt)
    first, last = result.history[0], result.history[-1]
    later = (last.seconds - first.seconds) / max(last.nfev - first.nfev, 1)
    return [
        "",
        f"reduced chi-square {reduced_chi_square(result):.5f}, expected 1 +- {np.sqrt(2 / free):.5f}",
        f"{result.n_points:,} points used, {result.n_masked:,} masked",
        *wrap(f"{result.sweeps} sweeps over the data ({result.strategy}, {result.reduction}): {result.message}", WIDTH),
        f"{result.seconds['load']:.2f} s to read the data, {first.seconds:.2f} s for the first sweep with compilation, "
        f"{later:.2f} s for each later one",
    ]


def streaming_facts(result, apart: float) -> list[str]:
    """What was read, and how far the fit ended from the one of held data."""
    nbytes, sample = result.history[0].read.nbytes, result.sample
    drawn = "no sample"
    if sample:
        drawn = f"a sample of {sample.n_points:,} points in {sample.n_chunks} of {sample.of_chunks} chunks"
    return [
        f"{result.sweeps} sweeps of {size(nbytes)}, {size(result.sweeps * nbytes)} read, after {drawn}",
        f"largest distance to the fit of held data: {apart:.1e} standard errors",
    ]


def closing(directory: Path, picture: Path | None) -> list[str]:
    """Where the files are."""
    shown = picture or 'none: matplotlib is missing (pip install "dask-nlsq[plot]")'
    return ["", f"data: {directory}", f"picture: {shown}"]


def draw(measurement: Measurement, store: Path, result, path: Path) -> Path | None:
    """Data, fit and residual of the angle nearest to the flow, and cost per sweep; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    a, n, _ = measurement.shape
    k = int(np.argmin(np.abs(measurement.angles)))
    data = zarr.open_array(store, mode="r")[k]
    i, j = np.arange(n)[None, :, None], np.arange(n)[None, None, :]
    fitted = np.asarray(result.predict((np.full((1, 1, 1), k), i, j))).reshape(n, n)
    figure = Figure(figsize=(10.5, 9), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    low, high = np.nanpercentile(np.asarray(data), [0.5, 99.5])
    draw_plane(figure, axes[0], measurement, data, "data", (low, high), "viridis")
    draw_plane(figure, axes[1], measurement, fitted, "fit", (low, high), "viridis")
    draw_plane(figure, axes[2], measurement, fitted - data, "residual, fit - data", (-4 * NOISE, 4 * NOISE), "RdBu_r")
    convergence(result, axes[3])
    angle = measurement.angles[k]
    figure.suptitle(f"Two-time correlation $c_2$ at {angle:.1f}°, one of {a} angles fitted at once, {n} x {n} frames")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def draw_plane(figure, axes, measurement, values, title, limits, colours) -> None:
    """One image (n, n) over both times; the diagonal, where there is no data, stays grey."""
    duration = measurement.frames * measurement.exposure
    axes.set_facecolor("0.6")
    options = dict(vmin=limits[0], vmax=limits[1], cmap=colours, interpolation="nearest")
    image = axes.imshow(values, origin="lower", extent=(0, duration, 0, duration), **options)
    axes.set(title=title, xlabel="time of frame j (s)", ylabel="time of frame i (s)")
    axes.locator_params(nbins=5)
    figure.colorbar(image, ax=axes, label="$c_2$", extend="both", fraction=0.046, pad=0.02)
