"""A demonstration with a known answer: simulate a beamline measurement on disk, fit it, compare with the truth.

The measurement is X-ray photon correlation spectroscopy of a fluid under laminar flow: two-time correlations

    c2(phi, i, j) = offset_phi + contrast_phi * (g_diff * g_shear)^2
    g_diff  = exp(-q^2 dt I_D / 2),        D(t) = max(D0 t^alpha + D_offset, 1e-10)
    g_shear = (sin(X) / X)^2,              G(t) = max(g0 t^beta + g_offset, 1e-10)
    X       = q L dt / (2 pi) * cos(phi0 - phi) * I_G
    I_f     = sqrt((F_i - F_j)^2 + 1e-12), F the cumulative trapezoid of f = D or G over the frames

of ``A`` angles phi and ``n`` x ``n`` pairs of frames, with 2 A + 7 parameters in one fit. The formula stands here twice:
`simulate_plane` in NumPy makes the data, `two_time_model` in JAX fits them. Neither uses the other, so that an error in
one of them cannot hide. The data are fitted twice: held in memory, and read anew from the store in each sweep, as where
they are larger than any memory; that fit is cut off after a sweep and resumed. The third fit is a certified problem of
the NIST Statistical Reference Datasets (Thurber).
"""

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from textwrap import wrap
from time import perf_counter
from typing import NamedTuple

import dask.array as da
import jax.numpy as jnp
import numpy as np
import zarr
from scipy.optimize import OptimizeWarning
from zarr.codecs import BloscCodec, Crc32cCodec

from ..fitting import curve_fit, resume

WAVEVECTOR = 0.0054  # q, 1/A
GAP = 2e6  # L, A
EXPOSURE = 0.1  # dt, s
SHORTEST = 20.0  # s; a shorter measurement does not determine the offsets of the rates, so few frames are longer frames
NOISE = 0.03  # standard deviation of c2
RATE_FLOOR = 1e-10  # D and G are never less
SMOOTHING = 1e-12  # under the root of I_f
CONTRAST, CONTRAST_SPREAD = 0.3017, 0.10  # mean, relative spread over the angles
OFFSET, OFFSET_SPREAD = 1.1061, 0.01
CHUNK = 500  # frames along each side of a chunk
MIN_FRAMES, MIN_ANGLES = 20, 3
MAX_PULL = 5.0  # one of 53 exceeds it by chance once in 30,000 demonstrations
MIN_DIGITS = 8.0  # of 11 certified ones
CERTIFIED_DIGITS = 11
MAX_APART = 1e-4  # standard errors between the two fits of the same data
TOLERANCE = 1e-12  # of the cost, for that: g0, beta and g_offset are correlated so that 1e-8 leaves a hundredth of them
MEGABYTE = 1e6
WIDTH = 100  # columns of the report
MANY = 7  # names in a message; the last ones are the physical parameters


class Physical(NamedTuple):
    """A parameter shared by all angles; the truth is a published fit of a real measurement."""

    name: str
    truth: float
    lower: float
    upper: float


PHYSICAL = (
    Physical("D0", 68480.52, 100.0, 1e5),
    Physical("alpha", -1.32694, -2.0, 2.0),
    Physical("D_offset", 1707.727, -1e5, 1e5),
    Physical("g0", 0.00199104, 1e-6, 0.5),
    Physical("beta", -0.211921, -2.0, 2.0),
    Physical("g_offset", -0.000607376, -0.1, 0.1),
    Physical("phi0", 2.00113, -10.0, 10.0),
)


class Measurement(NamedTuple):
    """What is measured. Parameters are ordered as A contrasts, A offsets, then `PHYSICAL`.

    ``angles`` (A,) degrees; ``exposure`` s per frame; ``times`` (n,) s, never 0; ``truth``, ``start``, ``lower`` and
    ``upper`` (2 A + 7,).
    """

    frames: int
    angles: np.ndarray
    exposure: float
    times: np.ndarray
    seed: int
    names: tuple[str, ...]
    truth: np.ndarray
    start: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.angles), self.frames, self.frames


class Thurber(NamedTuple):
    """The data set: ``x``, ``y`` (37,), two ``starts`` (2, 7), certified parameters and their standard errors (7,)."""

    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    popt: np.ndarray
    perr: np.ndarray


class Report(NamedTuple):
    """What `run` found: the fits, ``pulls`` (2 A + 7,), how far the two fits of the measurement are ``apart`` in standard
    errors, the fewest certified ``digits``, and what was written where."""

    result: object
    streamed: object
    thurber: object
    pulls: np.ndarray
    apart: float
    digits: float
    seconds: dict[str, float]
    directory: Path
    picture: Path | None


def run(
    frames: int = 200,
    n_angles: int = 23,
    seed: int = 0,
    directory: str | Path | None = None,
    echo: Callable[[str], None] = print,
) -> Report:
    """Simulate, store, fit and judge; what is written stays there.

    Parameters
    ----------
    frames : int
        Frames n of 0.1 s; the data are ``n_angles * n * n`` numbers of 4 bytes.
    n_angles : int
        Angles from -90 to 90 degrees.
    seed : int
        Of the truth per angle, of the start, 10 to 50 % off, and of the noise.
    directory : path, optional
        Where the stores and the picture go; made if need be. A new temporary directory if not given.
    echo : callable
        Receives the report line by line.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Too few frames or angles.
    FileExistsError
        The directory holds an earlier demonstration.
    OSError
        The disk has not enough space.
    RuntimeError
        The fit missed the truth by more than 5 standard errors, the streaming fit missed the other one by more than 1e-4
        of them, or the certified values were missed by more than 8 digits allow.
    """
    measurement = plan_measurement(frames, n_angles, seed)
    directory = prepare_directory(directory, measurement)
    seconds = {"simulate": 0.0, "write": 0.0}
    a, n, _ = measurement.shape
    echo(f"Two-time correlations: {a} angles x {n} x {n} frames = {a * n * n:,} points, {len(measurement.truth)} parameters")
    echo(f"Simulating, and writing to {directory}")
    store = write_measurement(measurement, directory / "two-time.zarr", seconds)
    echo(f"{sum(seconds.values()):.1f} s. Fitting: reading the data, compiling the model, sweeps")
    echo("")
    with timed(seconds, "fit"):
        result = fit_measurement(measurement, store, echo)
    pulls = compare(measurement, result)
    for line in [*table(measurement, result, pulls), *facts(result)]:
        echo(line)
    echo("")
    echo("The same from a store that is read anew in each sweep, cut off after the first one and resumed:")
    with timed(seconds, "streaming"):
        streamed = fit_streaming(measurement, store, directory / "streaming.ckpt", echo)
    apart = float(np.max(np.abs(streamed.popt - result.popt) / result.perr))
    for line in streaming_facts(streamed, apart):
        echo(line)
    with timed(seconds, "Thurber"):
        problem = read_thurber()
        certified = fit_thurber(problem, directory / "thurber.zarr")
    in_params = certified_digits(certified.popt, problem.popt).min()
    in_errors = certified_digits(certified.perr, problem.perr).min()
    echo("")
    echo("NIST Thurber: 37 points in 3 chunks, 7 parameters, from the farther one of its two starts")
    echo(f"correct digits of the 11 certified ones: {in_params:.1f} in parameters, {in_errors:.1f} in standard errors")
    with timed(seconds, "picture"):
        picture = draw(measurement, store, result, directory / "demo.png")
    for line in closing(seconds, result, directory, picture):
        echo(line)
    report = Report(result, streamed, certified, pulls, apart, min(in_params, in_errors), seconds, directory, picture)
    judge(measurement, report)
    return report


@contextmanager
def timed(seconds: dict[str, float], stage: str):
    """Add the time that the body takes to ``seconds[stage]``."""
    begin = perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - begin


# ---------------------------------------------------------------------------------------------------------------------
# the measurement, in NumPy


def plan_measurement(frames: int, n_angles: int, seed: int) -> Measurement:
    """Axes, truth, bounds and start; the same ``seed`` gives the same measurement."""
    for name, value, least in (("frames", frames, MIN_FRAMES), ("angles", n_angles, MIN_ANGLES)):
        if value < least:
            raise ValueError(f"{name} = {value}: at least {least} are needed to determine all parameters")
    if seed < 0:
        raise ValueError(f"seed = {seed}: it must not be negative")
    exposure = max(EXPOSURE, SHORTEST / frames)
    times = np.maximum(np.arange(frames) * exposure, exposure / 2)
    rng = np.random.default_rng(seed)
    contrast = CONTRAST * (1 + CONTRAST_SPREAD * rng.uniform(-1, 1, n_angles))
    offset = OFFSET * (1 + OFFSET_SPREAD * rng.uniform(-1, 1, n_angles))
    truth = np.concatenate([contrast, offset, [each.truth for each in PHYSICAL]])
    lower = np.repeat([0.0, 0.5], n_angles)
    upper = np.repeat([1.0, 1.5], n_angles)
    lower = np.concatenate([lower, [each.lower for each in PHYSICAL]])
    upper = np.concatenate([upper, [each.upper for each in PHYSICAL]])
    names = [f"{what}_{k:02d}" for what in ("contrast", "offset") for k in range(n_angles)]
    names = (*names, *(each.name for each in PHYSICAL))
    start = draw_start(rng, truth, lower, upper, times)
    angles = np.linspace(-90.0, 90.0, n_angles)
    return Measurement(frames, angles, exposure, times, seed, names, truth, start, lower, upper)


def draw_start(rng, truth, lower, upper, times, least: float = 0.1, most: float = 0.5) -> np.ndarray:
    """A start (p,) with every parameter 10 to 50 % off its truth, on either side, within the bounds.

    Starts whose shear rate is at its floor somewhere are drawn again: there the model does not depend on g0, beta and
    g_offset, and more of the fits from there end in the local minimum without any shear.
    """
    while True:
        off = rng.uniform(least, most, len(truth)) * rng.choice([-1, 1], len(truth))
        start = truth * (1 + off)
        start = np.where((start > lower) & (start < upper), start, truth * (1 - off))
        g0, beta, g_offset = start[-4:-1]
        if (g0 * times**beta + g_offset).min() > RATE_FLOOR:
            return start


def two_time_plane(measurement: Measurement, params: np.ndarray, k: int) -> np.ndarray:
    """c2 (n, n) of angle number ``k`` without noise, in NumPy."""
    a = len(measurement.angles)
    contrast, offset = params[k], params[a + k]
    D0, alpha, D_offset, g0, beta, g_offset, phi0 = params[2 * a :]
    dt, times = measurement.exposure, measurement.times

    def integral(rate):  # |F_i - F_j| of the floored rate
        rate = np.maximum(rate, RATE_FLOOR)
        F = np.append(0.0, np.cumsum(0.5 * (rate[1:] + rate[:-1])))
        return np.sqrt(np.subtract.outer(F, F) ** 2 + SMOOTHING)

    g_diff = np.exp(-0.5 * WAVEVECTOR**2 * dt * integral(D0 * times**alpha + D_offset))
    across = np.cos(np.radians(phi0 - measurement.angles[k]))
    X = WAVEVECTOR * GAP * dt / (2 * np.pi) * across * integral(g0 * times**beta + g_offset)
    return offset + contrast * (g_diff * np.sinc(X / np.pi) ** 2) ** 2


def simulate_plane(measurement: Measurement, k: int) -> np.ndarray:
    """Noisy c2 (n, n) float32 of angle number ``k``, NaN for i = j.

    The noise of (i, j) and (j, i) is independent. In a correlator's symmetric output each value stands twice, so that
    standard errors come out too small by sqrt(2) unless half of it is masked.
    """
    plane = two_time_plane(measurement, measurement.truth, k)
    rng = np.random.default_rng(np.random.SeedSequence(measurement.seed, spawn_key=(k,)))
    plane += NOISE * rng.standard_normal(plane.shape)
    np.fill_diagonal(plane, np.nan)
    return plane.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# the store


def prepare_directory(directory: str | Path | None, measurement: Measurement) -> Path:
    """An existing directory with space for the data and without an earlier demonstration."""
    if directory is None:
        directory = tempfile.mkdtemp(prefix="dask-nlsq-demo-")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("two-time.zarr", "streaming.ckpt", "thurber.zarr", "demo.png"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} exists: remove it or choose another directory")
    need = 4 * np.prod(measurement.shape, dtype=float) + MEGABYTE  # noise does not compress; picture and metadata
    free = shutil.disk_usage(directory).free
    if need > free:
        raise OSError(
            f"{need / MEGABYTE:,.0f} MB are needed in {directory} and {free / MEGABYTE:,.0f} MB are free: choose another "
            "directory or fewer frames"
        )
    return directory


def codecs(itemsize: int) -> list:
    """The fastest codec for detector data, and a checksum, without which a flipped bit reads as a wrong number."""
    return [BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=itemsize), Crc32cCodec()]


def write_measurement(measurement: Measurement, path: Path, seconds: dict[str, float]) -> Path:
    """Simulate one angle after the other into a Zarr v3 array (A, n, n) f4; holds one angle in memory."""
    chunk = min(CHUNK, measurement.frames)
    with timed(seconds, "write"):
        stored = zarr.create_array(
            path,
            shape=measurement.shape,
            dtype="f4",
            chunks=(1, chunk, chunk),
            compressors=codecs(4),
            fill_value=np.nan,
            dimension_names=("angle", "i", "j"),
            attributes={"angles_deg": measurement.angles.tolist(), "exposure_s": measurement.exposure},
        )
    for k in range(len(measurement.angles)):
        with timed(seconds, "simulate"):
            plane = simulate_plane(measurement, k)
        with timed(seconds, "write"):
            stored[k] = plane
    return path


# ---------------------------------------------------------------------------------------------------------------------
# the model, in JAX, and the fit


def two_time_model(measurement: Measurement) -> Callable:
    """The model ``f((angle, i, j), *params)`` of integer coordinates, differentiable everywhere."""
    angles, a = np.radians(measurement.angles), len(measurement.angles)
    log_t, dt = np.log(measurement.times), measurement.exposure
    diffusion_scale = WAVEVECTOR**2 * dt / 2
    shear_scale = WAVEVECTOR * GAP * dt / (2 * np.pi)

    def model(coordinates, *params):
        angle, i, j = coordinates
        contrast, offset = jnp.stack(params[:a]), jnp.stack(params[a : 2 * a])
        D0, alpha, D_offset, g0, beta, g_offset, phi0 = params[2 * a :]

        def integral(scale, exponent, constant):
            rate = jnp.maximum(scale * jnp.exp(exponent * log_t) + constant, RATE_FLOOR)
            F = jnp.concatenate([jnp.zeros(1), jnp.cumsum((rate[1:] + rate[:-1]) / 2)])
            return jnp.sqrt((F[i] - F[j]) ** 2 + SMOOTHING)

        across = shear_scale * jnp.cos(jnp.radians(phi0) - angles)
        g_diff = jnp.exp(-diffusion_scale * integral(D0, alpha, D_offset))
        g_shear = sinc(across[angle] * integral(g0, beta, g_offset)) ** 2
        return offset[angle] + contrast[angle] * (g_diff * g_shear) ** 2

    return model


def sinc(X):
    """sin(X) / X with all digits of its derivative.

    Where the flow is across the beam X is almost 0 and its derivative by phi0 is not: (X cos X - sin X) / X^2 has an
    error of eps / X there. The series is cut after X^6, which leaves 1e-14 at |X| = 0.05.
    """
    small = jnp.abs(X) < 0.05
    X2 = X * X
    series = 1 - X2 / 6 * (1 - X2 / 20 * (1 - X2 / 42))
    divisor = jnp.where(small, 1.0, X)  # keeps 0 / 0 out of the branch not taken, and out of its derivative
    return jnp.where(small, series, jnp.sin(divisor) / divisor)


def sayer(measurement: Measurement, echo: Callable[[str], None]) -> Callable:
    """A callback that says a line per sweep."""
    a, n, _ = measurement.shape
    expected = expected_cost(a * n * (n - 1), len(measurement.truth))

    def say(record):
        echo(f"sweep {record.nfev:>3}: cost {record.cost / expected:12.7f} x expected, {record.seconds:6.1f} s")

    return say


def fit_measurement(measurement: Measurement, store: Path, echo: Callable[[str], None] = print, **options):
    """Fit all parameters to the array (A, n, n) at ``store``; axes are coordinates, the diagonal i = j is left out."""
    a, n, _ = measurement.shape
    coordinates = np.arange(a)[:, None, None], np.arange(n)[None, :, None], np.arange(n)[None, None, :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of undetermined parameters: `judge` says it
        return curve_fit(
            two_time_model(measurement),
            coordinates,
            store,
            p0=measurement.start,
            bounds=(measurement.lower, measurement.upper),
            mask=np.eye(n, dtype=bool)[None],
            ftol=TOLERANCE,
            param_names=measurement.names,
            **dict(callback=sayer(measurement, echo), progress=False) | options,  # the lines are enough
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


def compare(measurement: Measurement, result) -> np.ndarray:
    """Pulls (2 A + 7,), ``(fit - truth) / standard error``; inf where the data did not determine the parameter."""
    determined = np.isfinite(result.perr) & (result.perr > 0)
    return np.where(determined, (result.popt - measurement.truth) / np.where(determined, result.perr, 1.0), np.inf)


# ---------------------------------------------------------------------------------------------------------------------
# the certified problem


def read_thurber() -> Thurber:
    """The data set as it comes with this package."""
    text = resources.files(__package__).joinpath("Thurber.dat").read_text()
    values = np.array([line.split("=")[1].split() for line in text.splitlines() if re.match(r"\s+b\d =", line)], float)
    rows = np.array([line.split() for line in text.rsplit("Data:", 1)[1].splitlines()[1:] if line.strip()], float)
    return Thurber(x=rows[:, 1], y=rows[:, 0], starts=values[:, :2].T, popt=values[:, 2], perr=values[:, 3])


def thurber_model(x, b1, b2, b3, b4, b5, b6, b7):
    """Cubic over cubic; ``x`` is the logarithm of an electron density."""
    return (b1 + x * (b2 + x * (b3 + x * b4))) / (1 + x * (b5 + x * (b6 + x * b7)))


def fit_thurber(problem: Thurber, path: Path):
    """Store x and y in three chunks each and fit them as tightly as float64 can."""
    group = zarr.create_group(path)
    third = -(-len(problem.x) // 3)
    for name, values in (("x", problem.x), ("y", problem.y)):
        group.create_array(name, data=values, chunks=(third,), compressors=codecs(8))
    x, y = (da.from_array(group[name], chunks=group[name].chunks) for name in ("x", "y"))
    return curve_fit(thurber_model, x, y, p0=problem.starts[0], ftol=1e-15, xtol=1e-15, gtol=1e-15)


def certified_digits(values: np.ndarray, certified: np.ndarray) -> np.ndarray:
    """Digits (p,) to which ``values`` agree with the ``certified`` ones: -log10 of the relative error, 0 to 11."""
    error = np.abs(values - certified) / np.abs(certified)
    return np.clip(-np.log10(np.maximum(error, 10.0**-CERTIFIED_DIGITS)), 0, CERTIFIED_DIGITS)


# ---------------------------------------------------------------------------------------------------------------------
# what it says


def table(measurement: Measurement, result, pulls: np.ndarray) -> list[str]:
    """One line per parameter."""
    lines = ["", f"{'parameter':<12}{'truth':>14}{'start':>14}{'fit':>14}{'std. error':>13}{'pull':>8}"]
    rows = zip(measurement.names, measurement.truth, measurement.start, result.popt, result.perr, pulls, strict=True)
    for name, truth, start, fit, error, pull in rows:
        lines.append(f"{name:<12}{truth:>14.6g}{start:>14.6g}{fit:>14.6g}{error:>13.2g}{pull:>8.2f}")
    rms = np.sqrt(np.mean(pulls**2))
    return [*lines, f"pull = (fit - truth) / std. error: largest {np.abs(pulls).max():.2f}, root mean square {rms:.2f}"]


def expected_cost(n_points: int, n_params: int) -> float:
    """Cost that the simulated noise alone leaves on average."""
    return 0.5 * (n_points - n_params) * NOISE**2


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
        f"the first sweep took {first.seconds:.2f} s with compilation, each later one {later:.2f} s, which is "
        f"{later / result.n_points * 1e9:.0f} ns per point",
    ]


def streaming_facts(result, apart: float) -> list[str]:
    """What was read, and how far the fit ended from the one of held data."""
    nbytes, sample = result.history[0].read.nbytes / MEGABYTE, result.sample
    drawn = (
        f"a sample of {sample.n_points:,} points in {sample.n_chunks} of {sample.of_chunks} chunks"
        if sample
        else "no sample"
    )
    return [
        f"{result.sweeps} sweeps of {nbytes:.1f} MB, {result.sweeps * nbytes:.0f} MB read, after {drawn}",
        f"largest distance to the fit of held data: {apart:.1e} standard errors",
    ]


def closing(seconds: dict[str, float], result, directory: Path, picture: Path | None) -> list[str]:
    """Where the time went and where the files are."""
    within = ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items())
    stages = [f"{stage} {value:.1f}" + f" ({within})" * (stage == "fit") for stage, value in seconds.items()]
    shown = picture if picture else 'none: matplotlib is missing (pip install "dask-nlsq[plot]")'
    return [
        "",
        *wrap(f"seconds: {', '.join(stages)}; {sum(seconds.values()):.1f} in all", WIDTH),
        f"data: {directory}",
        f"picture: {shown}",
    ]


def judge(measurement: Measurement, report: Report) -> None:
    """Raise where the demonstration failed."""
    # not ">": a pull that is NaN must not pass
    missed = [name for name, pull in zip(measurement.names, report.pulls, strict=True) if not abs(pull) <= MAX_PULL]
    if missed:
        raise RuntimeError(
            f"the fit missed the truth of {len(missed)} parameters ({', '.join(missed[-MANY:])}) by more than {MAX_PULL:g} "
            "standard errors or did not determine them, with a reduced chi-square of "
            f"{reduced_chi_square(report.result):.3f}: where that is much more than 1 the start "
            "led to a local minimum (2 of 40 starts did), and another seed gives another start"
        )
    if not report.apart <= MAX_APART:
        raise RuntimeError(f"the streaming fit ended {report.apart:.1e} standard errors from the other, not {MAX_APART:g}")
    if not report.digits >= MIN_DIGITS:
        raise RuntimeError(f"Thurber agrees to {report.digits:.1f} digits with the certified values, not to {MIN_DIGITS:g}")


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
    low, high = np.nanpercentile(data, [0.5, 99.5])
    draw_plane(figure, axes[0], measurement, data, "data", (low, high), "viridis")
    draw_plane(figure, axes[1], measurement, fitted, "fit", (low, high), "viridis")
    draw_plane(figure, axes[2], measurement, fitted - data, "residual, fit - data", (-4 * NOISE, 4 * NOISE), "RdBu_r")
    draw_costs(axes[3], result)
    angle = measurement.angles[k]
    figure.suptitle(f"Two-time correlation $c_2$ at {angle:.1f}°, one of {a} angles fitted at once, {n} x {n} frames")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def draw_plane(figure, axes, measurement, values, title, limits, colours) -> None:
    """One image (n, n) over both times; the diagonal, where there is no data, stays grey."""
    duration = measurement.frames * measurement.exposure
    axes.set_facecolor("0.6")
    image = axes.imshow(
        values,
        origin="lower",
        extent=(0, duration, 0, duration),
        vmin=limits[0],
        vmax=limits[1],
        cmap=colours,
        interpolation="nearest",
    )
    axes.set(title=title, xlabel="time of frame j (s)", ylabel="time of frame i (s)")
    axes.locator_params(nbins=5)
    figure.colorbar(image, ax=axes, label="$c_2$", extend="both", fraction=0.046, pad=0.02)


def draw_costs(axes, result) -> None:
    """Cost after every sweep, in units of what the noise alone gives."""
    costs = [record.cost / expected_cost(result.n_points, len(result.popt)) for record in result.history]
    axes.semilogy(np.arange(1, len(costs) + 1), costs, "o-", markersize=4)
    axes.axhline(1.0, color="0.4", linewidth=1, linestyle="--", label="noise alone")
    axes.set(title="cost", xlabel="sweep over all data", ylabel="cost / expected cost", box_aspect=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
