"""The measurement: two-time correlations of a fluid under laminar flow, simulated in NumPy and written to a Zarr store.

X-ray photon correlation spectroscopy of ``A`` angles phi and ``n`` x ``n`` pairs of frames, 2 A + 7 parameters:

    c2(phi, i, j) = offset_phi + contrast_phi * (g_diff * g_shear)^2
    g_diff  = exp(-q^2 dt I_D / 2),        D(t) = max(D0 t^alpha + D_offset, 1e-10)
    g_shear = (sin(X) / X)^2,              G(t) = max(g0 t^beta + g_offset, 1e-10)
    X       = q L dt / (2 pi) * cos(phi0 - phi) * I_G
    I_f     = sqrt((F_i - F_j)^2 + 1e-12), F the cumulative trapezoid of f = D or G over the frames
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ..base.text import size

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
SPARE_BYTES = 1e6  # for the picture and metadata


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

    @property
    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Degrees and frames along the axes of the data: (A, 1, 1), (1, n, 1), (1, 1, n)."""
        frames = np.arange(self.frames)
        return self.angles[:, None, None], frames[None, :, None], frames[None, None, :]

    def by_name(self, values: np.ndarray) -> dict[str, Any]:
        """Values (2 A + 7,) by the names of the model's parameters: contrast and offset (A,), then numbers."""
        a = len(self.angles)
        shared = zip((each.name for each in PHYSICAL), values[2 * a :].tolist(), strict=True)
        return dict(contrast=values[:a], offset=values[a : 2 * a], **dict(shared))


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
    lower = np.concatenate([np.repeat([0.0, 0.5], n_angles), [each.lower for each in PHYSICAL]])
    upper = np.concatenate([np.repeat([1.0, 1.5], n_angles), [each.upper for each in PHYSICAL]])
    names = tuple(f"{what}_{k:02d}" for what in ("contrast", "offset") for k in range(n_angles))
    names += tuple(each.name for each in PHYSICAL)
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


def expected_cost(dof: int) -> float:
    """Cost that the simulated noise alone leaves on average; ``dof`` is the number of points minus that of parameters."""
    return 0.5 * dof * NOISE**2


def prepare_directory(directory: str | Path | None, measurement: Measurement) -> Path:
    """An existing directory with space for the data and without an earlier demonstration."""
    if directory is None:
        directory = tempfile.mkdtemp(prefix="dask-nlsq-demo-")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("two-time.zarr", "streaming.ckpt", "demo.png"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} exists: remove it or choose another directory")
    need = 4 * np.prod(measurement.shape, dtype=float) + SPARE_BYTES  # noise does not compress
    free = shutil.disk_usage(directory).free
    if need > free:
        message = f"{size(need)} are needed in {directory} and {size(free)} are free"
        raise OSError(f"{message}: choose another directory or fewer frames")
    return directory


def write_measurement(measurement: Measurement, path: Path) -> Path:
    """Simulate one angle after the other into a Zarr v3 array (A, n, n) f4; holds one angle in memory."""
    chunk = min(CHUNK, measurement.frames)
    stored = zarr.create_array(
        path,
        shape=measurement.shape,
        dtype="f4",
        chunks=(1, chunk, chunk),
        # the fastest codec for detector data, and a checksum, without which a flipped bit reads as a wrong number
        compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=4), Crc32cCodec()],
        fill_value=np.nan,
        dimension_names=("angle", "i", "j"),
        attributes={"angles_deg": measurement.angles.tolist(), "exposure_s": measurement.exposure},
    )
    for k in range(len(measurement.angles)):
        stored[k] = simulate_plane(measurement, k)
    return path
