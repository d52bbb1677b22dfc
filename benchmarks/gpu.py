"""What a device makes of fits and maps: ``python -m benchmarks.gpu FILE`` prints a row for each, and keeps them in FILE.

On a machine with a GPU run it there, then with ``JAX_PLATFORMS=cpu`` and the same FILE for the host's cores: the second run
adds the ratios, and how far the parameters are apart. Medians of warm calls in one process. Data are made on the host:
loading is told apart from the sweeps and fits of held data, and maps are timed from host to host.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dask_nlsq import curve_fit, fit_map, hold
from dask_nlsq.demo import measurement as simulated

from .groups import TwoTime
from .streaming import overlap
from .two_time import all_angles

RUNS = 3
POINTS = 10**8
PIXELS = 10**6
TRUTH = 2.5, 1.3, 0.5


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def gaussian(x, height, centre, width, base):
    return height * jnp.exp(-0.5 * ((x - centre) / width) ** 2) + base


def pseudo_voigt(x, area, centre, width, eta, b0, b1):
    z = ((x - centre) / width) ** 2
    lorentzian = 2 / (np.pi * width * (1 + 4 * z))
    normal = 2 * (np.log(2) / np.pi) ** 0.5 / width * jnp.exp(-4 * np.log(2) * z)
    return area * (eta * lorentzian + (1 - eta) * normal) + b0 + b1 * (x - 10)


def warm(call):
    """Median seconds of warm calls, and what the last one gave."""
    call()
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        found = call()
        times.append(time.perf_counter() - begin)
    return float(np.median(times)), found


def sweeps(dtype):
    """Seconds of a sweep over held points, and of a fit with loading."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 4, POINTS, dtype=dtype)
    y = (TRUTH[0] * np.exp(-TRUTH[1] * x) + TRUTH[2] + 0.1 * rng.standard_normal(POINTS, dtype=np.float32)).astype(dtype)
    name = f"{POINTS:.0e} points of {np.dtype(dtype).name}, 3 parameters"
    begin = time.perf_counter()
    with hold(x, y) as data:
        curve_fit(decay, data, p0=(2.0, 1.0, 0.3))  # which puts the data on a device, and compiles
        yield f"loading {name}, and a first fit, s", time.perf_counter() - begin, None, None
        taken, fit = warm(lambda: curve_fit(decay, data, p0=(2.0, 1.0, 0.3)))
        _, careful = warm(lambda: curve_fit(decay, data, p0=(2.0, 1.0, 0.3), reduction="qr"))
    each, by_qr = ((found.history[-1].seconds - found.history[0].seconds) / (found.nfev - 1) for found in (fit, careful))
    yield f"one sweep of {name}, s", each, fit.popt, fit.perr
    yield "the same by QR, s", by_qr, careful.popt, careful.perr
    yield "by QR / by the gram matrix (4 allowed)", by_qr / each, None, None
    yield f"fit of held {name}, {fit.sweeps} sweeps, s", taken, fit.popt, fit.perr


def streamed(n=10**8):
    with tempfile.TemporaryDirectory() as directory:
        best = overlap(directory, "decay", n)
    for what, seconds in best.items():
        yield f"{n:.0e} counts in a store: {what}, s", seconds, None, None
    longest = max(seconds for what, seconds in best.items() if what != "stream")
    yield "stream / the longest of the others (1.3 allowed)", best["stream"] / longest, None, None


def correlation(frames=1000, n_angles=23):
    measurement = simulated.plan_measurement(frames, n_angles, 0)
    y = np.stack([simulated.simulate_plane(measurement, k) for k in range(n_angles)]).astype(np.float32)
    axes = np.arange(n_angles)[:, None, None], np.arange(frames)[None, :, None], np.arange(frames)[None, None, :]
    records = []

    def stop(record):
        records.append(record)
        if len(records) == 4:
            raise StopIteration

    bounds, mask = (measurement.lower, measurement.upper), np.eye(frames, dtype=bool)[None]
    options = dict(param_names=measurement.names, progress=False, callback=stop)
    curve_fit(all_angles(measurement), axes, y, measurement.start, bounds=bounds, mask=mask, **options)
    each = (records[-1].seconds - records[0].seconds) / (len(records) - 1)
    yield f"one sweep of {y.size:.1e} points, {len(measurement.names)} parameters, s", each, None, None
    problem, seconds = TwoTime(frames, n_angles), []
    problem.fit(next(problem.starts(1)), callback=lambda record: seconds.append(record.seconds), progress=False)
    each = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    yield "the same, grouped: two parameters of each angle are locals, s", each, None, None


def maps(what, f, x, truth, **options):
    rng = np.random.default_rng(1)
    spread = np.array(truth) * (1 + 0.1 * rng.standard_normal((PIXELS, len(truth))))
    with jax.enable_x64(True):
        y = np.asarray(jax.vmap(lambda p: f(jnp.asarray(x), *p))(jnp.asarray(spread)), dtype=np.float32)
    y += 0.02 * rng.standard_normal(y.shape, dtype=np.float32)
    taken, found = warm(lambda: fit_map(f, x, y, truth, **options).compute())
    good = found.success[:, None]
    yield f"map of {PIXELS:.0e} pixels, {what}, s", taken, np.where(good, found.popt, np.nan), found.perr


def rows():
    low, high = [0, -1, 0.02, -5], [9, 1, 2, 5]
    peak = gaussian, np.linspace(-1, 1, 64), (2.0, 0.1, 0.3, 0.5)
    yield from maps("Gaussian + constant, 64 points", *peak)
    yield from maps("the same, bounded", *peak, bounds=(low, high))
    low, high = [0, 9, 0.02, 0, -9, -9], [9, 11, 0.8, 1, 9, 9]
    voigt = pseudo_voigt, np.linspace(9, 11, 256), (1.0, 10.0, 0.3, 0.5, 0.4, 0.1)
    yield from maps("pseudo-Voigt + line, 256 points, bounded", *voigt, bounds=(low, high), sigma=np.full(256, 0.02))
    yield from sweeps(np.float64)
    yield from sweeps(np.float32)
    yield from streamed()
    yield from correlation()


def main(file: Path) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, float64 arithmetic", flush=True)
    kept = {}
    for name, seconds, popt, perr in rows():
        kept[name] = seconds, None if popt is None else popt.tolist()
        line = f"{name:<82} {seconds:10.4f}"
        if name in before:
            other, its = before[name]
            line += f"  {seconds / other:7.2f} times the other"
            line += "" if popt is None else f", popt {np.nanmax(np.abs(popt - np.array(its)) / perr):.1e} s.e. apart"
        print(line, flush=True)
        file.write_text(json.dumps(kept | before))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
