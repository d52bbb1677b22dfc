"""A demonstration with a known answer: simulate a beamline measurement on disk, fit it, compare with the truth.

Each angle has a contrast and an offset of its own, and all share the physical parameters. The data are fitted twice: held
in memory, and read again from the store in each sweep, as where they are larger than any memory; that fit is cut off after a
sweep and resumed.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import OptimizeWarning

from ..fitting import resume
from ..groups.fit import fit_groups
from .measurement import Measurement, expected_cost, plan_measurement, prepare_directory, write_measurement
from .model import two_time_model
from .report import closing, draw, facts, parameter_table, reduced_chi_square, streaming_facts

MAX_PULL = 5.0  # one of 53 exceeds it by chance once in 30,000 demonstrations
MAX_APART = 1e-4  # standard errors between the two fits of the same data
MANY = 7  # names in a message; the last ones are the physical parameters


class Found(NamedTuple):
    """All parameters of a fit (2 A + 7,), in the order of a `Measurement`, and their standard errors."""

    popt: np.ndarray
    perr: np.ndarray


class Report(NamedTuple):
    """What `run` found: the fits, ``pulls`` (2 A + 7,), how far the fits are ``apart`` in standard errors, and the files."""

    result: Any
    streamed: Any
    found: Found
    pulls: np.ndarray
    apart: float
    directory: Path
    picture: Path | None


def run(
    frames: int = 200, n_angles: int = 23, seed: int = 0, directory: str | Path | None = None, echo: Callable = print
) -> Report:
    """Simulate, store, fit and judge; ``echo`` receives the report line by line.

    Parameters
    ----------
    frames, n_angles : int
        Frames n of 0.1 s, angles from -90 to 90 degrees; the data are ``n_angles * n * n`` numbers of 4 bytes.
    seed : int
        Of the truth per angle, of the start, 10 to 50 % off, and of the noise.
    directory : path, optional
        Where the store and the picture go and stay. A new temporary directory if not given.

    Raises
    ------
    ValueError, OSError
        Too few frames or angles; an earlier demonstration in the directory; too little space.
    RuntimeError
        The fit missed the truth by more than 5 standard errors, or the streaming fit the other one by more than 1e-4.
    """
    measurement = plan_measurement(frames, n_angles, seed)
    directory = prepare_directory(directory, measurement)
    a, n, _ = measurement.shape
    echo(f"Two-time correlations: {a} angles x {n} x {n} frames = {a * n * n:,} points, {len(measurement.truth)} parameters")
    echo("7 of them are shared; a contrast and an offset belong to each angle")
    echo(f"Simulating, and writing to {directory}")
    store = write_measurement(measurement, directory / "two-time.zarr")
    echo("Fitting: reading the data, compiling the model, sweeps\n")
    result = fit_measurement(measurement, store, echo)
    found = all_parameters(result)
    pulls = compare(measurement, found)
    echo("\n".join([*parameter_table(measurement, found, pulls), *facts(result)]))
    echo("\nThe same from a store that is read again in each sweep, interrupted after the first one and resumed:")
    streamed = fit_streaming(measurement, store, directory / "streaming.ckpt", echo)
    apart = float(np.max(np.abs(all_parameters(streamed).popt - found.popt) / found.perr))
    echo("\n".join(streaming_facts(streamed, apart)))
    picture = draw(measurement, store, result, found.popt, directory / "demo.png")
    echo("\n".join(closing(directory, picture)))
    report = Report(result, streamed, found, pulls, apart, directory, picture)
    judge(measurement, report)
    return report


def sayer(measurement: Measurement, echo: Callable[[str], None]) -> Callable:
    """A callback that says a line per sweep."""
    a, n, _ = measurement.shape
    expected = expected_cost(a * n * (n - 1) - len(measurement.truth))

    def say(record):
        echo(f"sweep {record.nfev:>3}: cost {record.cost / expected:12.7f} x expected, {record.seconds:6.1f} s")

    return say


def fit_measurement(measurement: Measurement, store: Path, echo: Callable[[str], None] = print, **options):
    """Fit the array (A, n, n) at ``store``: an angle is a group, axes are coordinates, the diagonal i = j is left out."""
    lower, upper = measurement.by_name(measurement.lower), measurement.by_name(measurement.upper)
    chosen: dict[str, Any] = dict(callback=sayer(measurement, echo), progress=False) | options  # the lines are enough
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of undetermined parameters: `judge` says it
        return fit_groups(
            two_time_model(measurement),
            measurement.coordinates,
            store,
            p0=measurement.by_name(measurement.start),
            local=("contrast", "offset"),
            group_axes=0,
            bounds={name: (lower[name], upper[name]) for name in lower},
            mask=np.eye(measurement.frames, dtype=bool),
            **chosen,
        )


def fit_streaming(measurement: Measurement, store: Path, checkpoint: Path, echo: Callable[[str], None]):
    """`fit_measurement` without holding the data, ended after one sweep, as by a queue's time limit, and resumed."""
    say = sayer(measurement, echo)

    def cut_off(record):
        say(record)
        raise StopIteration

    fit_measurement(measurement, store, strategy="streaming", checkpoint=checkpoint, callback=cut_off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)
        return resume(checkpoint, two_time_model(measurement), callback=say, progress=False)


def all_parameters(result) -> Found:
    """Contrasts and offsets of all angles, then the shared parameters."""
    local = result.local.compute(progress=False)
    own = [local.param_names.index(name) for name in ("contrast", "offset")]
    both = ((local.popt, result.popt), (local.perr, result.perr))
    return Found(*(np.concatenate([of_angles[:, own].T.ravel(), shared]) for of_angles, shared in both))


def compare(measurement: Measurement, found: Found) -> np.ndarray:
    """Pulls (2 A + 7,), ``(fit - truth) / standard error``; inf where the data did not determine the parameter."""
    determined = np.isfinite(found.perr) & (found.perr > 0)
    return np.where(determined, (found.popt - measurement.truth) / np.where(determined, found.perr, 1.0), np.inf)


def judge(measurement: Measurement, report: Report) -> None:
    """Raise where the demonstration failed."""
    # not ">": a pull that is NaN must not pass
    missed = [name for name, pull in zip(measurement.names, report.pulls, strict=True) if not abs(pull) <= MAX_PULL]
    if missed:
        raise RuntimeError(
            f"the fit missed the truth of {len(missed)} parameters ({', '.join(missed[-MANY:])}) by more than {MAX_PULL:g} "
            "standard errors or did not determine them, with a reduced chi-square of "
            f"{reduced_chi_square(report.result):.3f}: if that is much more than 1, the start "
            "led to a local minimum; another seed gives another start"
        )
    if not report.apart <= MAX_APART:
        raise RuntimeError(f"the streaming fit ended {report.apart:.1e} standard errors from the other, not {MAX_APART:g}")
