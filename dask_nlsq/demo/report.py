"""What the demonstration says about its fits, and the picture of them."""

from pathlib import Path
from textwrap import wrap

import numpy as np
import zarr

from ..base.text import size, table
from ..base.x64 import float64
from ..results.binning import Images
from ..results.plots import convergence, images
from .measurement import Measurement, expected_cost
from .model import two_time_model

WIDTH = 100  # columns of the report
FORMATS = (".6g", ".6g", ".6g", ".2g", ".2f")


def parameter_table(measurement: Measurement, found, pulls: np.ndarray) -> list[str]:
    """A line for each shared parameter, and one each for the contrasts and the offsets of all angles."""
    a = len(measurement.angles)
    columns = (measurement.truth, measurement.start, *found, pulls)
    texts = [[f"{value:{form}}" for value in column[2 * a :]] for column, form in zip(columns, FORMATS, strict=True)]
    names = measurement.names[2 * a :]
    rows = [("parameter", "truth", "start", "fit", "std. error", "pull"), *zip(names, *texts, strict=True)]
    of_angles = [("of each angle", "least", "most", "largest std. error", "largest pull", "rms pull")]
    for name, k in (("contrast", slice(0, a)), ("offset", slice(a, 2 * a))):
        fit, error, pull = found.popt[k], found.perr[k], pulls[k]
        ends = f"{fit.min():.4f}", f"{fit.max():.4f}", f"{error.max():.2g}"
        of_angles.append((name, *ends, f"{_largest(pull):.2f}", f"{_rms(pull):.2f}"))
    last = f"pull = (fit - truth) / std. error: largest {_largest(pulls):.2f}, root mean square {_rms(pulls):.2f}"
    return ["", *table(rows, "<>>>>>"), "", *table(of_angles, "<>>>>>"), last]


def _largest(pulls: np.ndarray) -> float:
    return float(np.abs(pulls).max())


def _rms(pulls: np.ndarray) -> float:
    return float(np.sqrt(np.mean(pulls**2)))


def reduced_chi_square(result) -> float:
    """Cost in units of the expected one: 1, except for noise, if the model is right."""
    return result.cost / expected_cost(result.dof)


def facts(result) -> list[str]:
    """How the fit went."""
    first, last = result.history[0], result.history[-1]
    later = (last.seconds - first.seconds) / max(last.nfev - first.nfev, 1)
    return [
        "",
        f"reduced chi-square {reduced_chi_square(result):.5f}, expected 1 +- {np.sqrt(2 / result.dof):.5f}",
        f"{result.n_points:,} points used, {result.n_masked:,} masked",
        *wrap(f"{result.sweeps} sweeps over the data ({result.strategy}, {result.reduction}): {result.message}", WIDTH),
        f"{result.seconds['load']:.2f} s to read the data, {first.seconds:.2f} s for the first sweep with compilation, "
        f"{later:.2f} s for each later one",
    ]


def streaming_facts(result, apart: float) -> list[str]:
    """What was read, and how far the fit ended from the one of held data."""
    nbytes = result.plan.sweep_bytes
    return [
        f"{result.sweeps} sweeps of {size(nbytes)}, {size(result.sweeps * nbytes)} read, the locals kept between them",
        f"largest distance to the fit of held data: {apart:.1e} standard errors",
    ]


def closing(directory: Path, picture: Path | None) -> list[str]:
    """Where the files are."""
    shown = picture or 'none: matplotlib is missing (pip install "dask-nlsq[plot]")'
    return ["", f"data: {directory}", f"picture: {shown}"]


def draw(measurement: Measurement, store: Path, result, params: np.ndarray, path: Path) -> Path | None:
    """Data, fit and residual of the angle nearest to the flow, and cost per sweep; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    a, n, _ = measurement.shape
    k = int(np.argmin(np.abs(measurement.angles)))
    data = np.asarray(zarr.open_array(store, mode="r")[k])
    with float64():
        of_angle = params[k], params[a + k], *params[2 * a :]
        fitted = np.asarray(two_time_model(measurement)((measurement.angles[k], *np.ogrid[:n, :n]), *of_angle))
    figure = Figure(figsize=(10.5, 9), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    seen = Images(
        names=("time of frame i (s)", "time of frame j (s)"),
        edges=(np.linspace(0.0, n * measurement.exposure, n + 1),) * 2,
        upright=True,
        log=(False,) * 3,
        data=data,
        model=np.where(np.isnan(data), np.nan, fitted),
        residual=fitted - data,
        measure="model $-$ data",
        y_name="c₂",
    )
    images(result, axes[:3], seen=seen)
    convergence(result, axes[3])
    angle = measurement.angles[k]
    figure.suptitle(f"Two-time correlation $c_2$ at {angle:.1f}°, one of {a} angles fitted at once, {n} x {n} frames")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path
