"""Data that are read again in each sweep: `python -m benchmarks.streaming [DIRECTORY [ROWS ...]]` writes stores, fits them,
prints rows: all, or those named, such as ``sweep_rows sorted_rows correlation_rows``, which count sweeps.

The stores stay in DIRECTORY (by default a temporary one that is removed), some 3 GB; each row that measures memory or
time from start to end runs in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from .run import Row
from .two_time import all_angles

COLUMNS, ROWS_PER_CHUNK = 1000, 2000  # of the counts; 2e6 points per chunk
DECAY, PEAK = np.array([200.0, 0.5, 30.0]), np.array([900.0, 10.05, 0.25, 0.4, 50.0, 6.0])
TWO_PEAKS = np.array([80.0, 3.0, 0.4, 50.0, 6.0, 0.6, 5.0, 0.5])


def decay(axes, a, b, c):
    import jax.numpy as jnp

    i, j = axes
    return a * jnp.exp(-b * (i + j)) + c


def peak(axes, A, center, fwhm, eta, b0, b1):
    import jax.numpy as jnp

    u = 2 * (axes[1] - center) / fwhm
    lorentz = 2 / (jnp.pi * fwhm) / (1 + u**2)
    gauss = 2 * jnp.sqrt(jnp.log(2) / jnp.pi) / fwhm * jnp.exp(-jnp.log(2) * u**2)
    return A * (eta * lorentz + (1 - eta) * gauss) + b0 + b1 * (axes[1] - 10)


def two_peaks(x, A1, c1, w1, A2, c2, w2, b0, b1):
    import jax.numpy as jnp

    return sum(A * jnp.exp(-(((x - c) / w) ** 2) / 2) for A, c, w in ((A1, c1, w1), (A2, c2, w2))) + b0 + b1 * x


MODELS = {"decay": (decay, DECAY, (0, 5)), "peak": (peak, PEAK, (9, 11))}


def axes_of(name, n):
    low, high = MODELS[name][2]
    return np.linspace(0, 5, n // COLUMNS)[:, None], np.linspace(low, high, COLUMNS)[None, :]


def counts(directory, name, n):
    """A store of ``n`` counts with Gaussian noise of Poisson's variance, u2, Blosc and a checksum; written once."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    path = Path(directory) / f"{name}-{n:.0e}.zarr"
    if path.exists():
        return str(path)
    f, truth, _ = MODELS[name]
    i, j = axes_of(name, n)
    array = zarr.create_array(
        path,
        shape=(n // COLUMNS, COLUMNS),
        chunks=(ROWS_PER_CHUNK, COLUMNS),
        dtype="u2",
        compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
    )

    def write(k):
        rows = slice(k * ROWS_PER_CHUNK, (k + 1) * ROWS_PER_CHUNK)
        mean = np.broadcast_to(np.asarray(f((i[rows], j), *truth), np.float32), (ROWS_PER_CHUNK, COLUMNS))
        noise = np.random.default_rng(k).standard_normal(mean.shape, np.float32)
        array[rows] = np.rint(mean + np.sqrt(mean) * noise)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(n // COLUMNS // ROWS_PER_CHUNK)))
    return str(path)


def peak_mb():
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def fitted(path, name, n):
    """Seconds, MB at the peak, and more, of a fit; for a process of its own."""
    import dask_nlsq

    begin = time.perf_counter()
    f, truth, _ = MODELS[name]
    result = dask_nlsq.curve_fit(f, axes_of(name, n), path, p0=start(name, truth), strategy="streaming")
    seconds = time.perf_counter() - begin
    return dict(seconds=seconds, peak=peak_mb(), sweeps=result.sweeps, sweep=min(r.read.seconds for r in result.history))


def start(name, truth):
    """Every parameter 30 % off; the center by 30 % of the width."""
    off = np.array([1.3, 0.7] * len(truth))[: len(truth)] * truth
    if name == "peak":
        off[1] = truth[1] + 0.3 * truth[2]
    return off


def in_process(function, *arguments):
    code = f"import json, benchmarks.streaming as b; print('RESULT', json.dumps(b.{function}(*{arguments!r})))"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))[7:])


def apart(found, held):
    return f"{np.max(np.abs(found.popt - held.popt) / held.perr):.0e}"


def sweep_rows(directory, sizes=(10**8, 2 * 10**8)):
    import dask_nlsq

    for name, n in zip(MODELS, sizes, strict=True):
        f, truth, _ = MODELS[name]
        fit = partial(dask_nlsq.curve_fit, f, axes_of(name, n), counts(directory, name, n), p0=start(name, truth))
        found, held = fit(strategy="streaming"), fit(strategy="chunked")
        yield Row(
            f"sweeps from 30 % off, {name}",
            "4 (3)",
            f"{found.sweeps}",
            f"{n:.0e} counts; held: {held.sweeps}; sample of {found.sample.n_points:,} fitted in {found.sample.nfev} passes",
        )
        yield Row(
            f"distance to the fit of held data, {name}",
            "1e-4 (1e-6)",
            apart(found, held),
            "standard errors, default tolerances",
        )


def sorted_rows(directory, n=4 * 10**6, n_chunks=20):
    """Each chunk is a region of the axis: a sample from few of them says little about the others."""
    import zarr

    import dask_nlsq

    x = np.linspace(0, 10, n)
    off = TWO_PEAKS * [1.3, 1, 1.3, 0.7, 1, 0.7, 1.3, 0.7] + 0.3 * np.array([0, 0.4, 0, 0, -0.6, 0, 0, 0])
    cases = {
        "decay": (lambda x, a, b, c: decay((x, 0), a, b, c), DECAY, start("decay", DECAY), "3"),
        "two peaks": (two_peaks, TWO_PEAKS, off, "4"),
    }
    for name, (f, truth, p0, required) in cases.items():
        y = np.asarray(f(x, *truth)) + np.random.default_rng(0).normal(0, 5, n)
        path = str(Path(directory) / f"sorted-{name}.zarr")
        zarr.create_array(path, data=y, chunks=(n // n_chunks,), overwrite=True)
        found, held = (dask_nlsq.curve_fit(f, x, path, p0=p0, strategy=each) for each in ("streaming", "chunked"))
        sample = f"{found.sample.n_chunks} of {found.sample.of_chunks} chunks"
        how = f"{n:.0e} points, {len(truth)} parameters; held: {held.sweeps}; sample: {sample}"
        yield Row(f"sweeps from 30 % off, {name} on a sorted axis", required, f"{found.sweeps}", how)
        yield Row("distance to the fit of held data, the same", "1e-4 (1e-6)", apart(found, held), "standard errors")


def correlation_rows(directory):
    import dask_nlsq
    from dask_nlsq.demo import measurement as simulated

    measurement = simulated.plan_measurement(1000, 23, 0)
    path = Path(directory) / "two-time.zarr"
    if not path.exists():
        simulated.write_measurement(measurement, path)
    m = measurement
    p0 = simulated.draw_start(np.random.default_rng(0), m.truth, m.lower, m.upper, m.times, 0.3, 0.3)
    axes = np.arange(23)[:, None, None], np.arange(1000)[None, :, None], np.arange(1000)[None, None, :]
    fit = partial(
        dask_nlsq.curve_fit,
        all_angles(measurement),
        axes,
        path,
        p0=p0,
        bounds=(measurement.lower, measurement.upper),
        mask=np.eye(1000, dtype=bool)[None],
    )
    found, held = fit(strategy="streaming"), fit(strategy="chunked")
    sample = f"{found.sample.n_chunks} of {found.sample.of_chunks} chunks"
    how = f"23 M points, 53 parameters; held: {held.sweeps}; sample: {sample}"
    yield Row("sweeps from 30 % off, two-time correlation", "5", f"{found.sweeps}", how)
    yield Row("distance to the fit of held data, the same", "1e-4 (1e-6)", apart(found, held), "standard errors")


def memory_rows(directory):
    found = {n: in_process("fitted", counts(directory, "decay", n), "decay", n) for n in (10**8, 3 * 10**8, 10**9)}
    listed = ", ".join(f"{n:.0e}: {each['peak']:.0f} MB" for n, each in found.items())
    yield Row("peak memory of the process", "flat, 1.5 GB (0.8)", listed, "decay, chunks of 2e6 points")
    last = found[10**9]
    yield Row(
        "1e9 uint16 points, start to result",
        "90 s (30)",
        f"{last['seconds']:.0f} s",
        f"{last['sweeps']} sweeps, fresh process",
    )


def stack(directory, n_frames=1000, size=1000, per_chunk=10):
    """A store of images, each of which has the counts of one time of a decay; written once."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    path, times = Path(directory) / f"stack-{n_frames}-{size}.zarr", np.linspace(0, 10, n_frames)
    if path.exists():
        return str(path)
    array = zarr.create_array(
        path,
        shape=(n_frames, size, size),
        chunks=(per_chunk, size, size),
        dtype="u2",
        compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
    )

    def write(k):
        frames = slice(k * per_chunk, (k + 1) * per_chunk)
        mean = DECAY[0] * np.exp(-DECAY[1] * times[frames, None, None]) + DECAY[2]
        noise = np.random.default_rng(k).standard_normal((per_chunk, size, size), np.float32)
        array[frames] = np.rint(mean + np.sqrt(mean) * noise)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(n_frames // per_chunk)))
    return str(path)


def of_time(t, a, b, c):
    import jax.numpy as jnp

    return a * jnp.exp(-b * t) + c


def stack_fitted(path):
    """Seconds, MB at the peak, and sweeps of a fit of the images; for a process of its own."""
    import zarr

    import dask_nlsq

    begin = time.perf_counter()
    t = np.linspace(0, 10, zarr.open_array(path, mode="r").shape[0])[:, None, None]
    result = dask_nlsq.curve_fit(of_time, t, path, p0=start("decay", DECAY), strategy="streaming")
    seconds, far = time.perf_counter() - begin, np.max(np.abs(result.popt - DECAY) / result.perr)
    return dict(seconds=seconds, peak=peak_mb(), sweeps=result.sweeps, far=far)


def stack_rows(directory):
    found = in_process("stack_fitted", stack(directory))
    how = "(1000, 1000, 1000) in chunks of (10, 1000, 1000), 30 % off, fresh process"
    yield Row("1e9 counts in images: start to result", "14 s (10)", f"{found['seconds']:.1f} s", how)
    yield Row("sweeps, the same", "3", f"{found['sweeps']}", f"{found['far']:.1f} standard errors from the truth")
    yield Row("peak memory, the same", "950 MB (600)", f"{found['peak']:.0f} MB", "VmHWM")


def overlap_rows(directory, n=10**8):
    for name in MODELS:
        best = overlap(directory, name, n)
        ratio = best["stream"] / max(seconds for what, seconds in best.items() if what != "stream")
        how = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in best.items()) + f"; best of 7, {n:.0e} points"
        yield Row(f"sweep / max(reading, transfer, kernels alone), {name}", "1.3 (1.1)", f"{ratio:.2f}", how)


def overlap(directory, name, n):
    """Least seconds of a read, of the transfer to a device, of a sweep over held data, and of a sweep that reads."""
    import jax
    import zarr

    from dask_nlsq.data.align import build_data
    from dask_nlsq.data.store import Policy, open_all
    from dask_nlsq.engine.request import Objective, Request
    from dask_nlsq.engine.sweep import open_sweep
    from dask_nlsq.model.function import intern

    f, truth, _ = MODELS[name]
    path = counts(directory, name, n)
    data, _ = open_all(Policy(), xdata=axes_of(name, n), ydata=path)
    problem = build_data(data["xdata"], data["ydata"], check=True, omit=False)
    request, array = Request(Objective(intern(f)), truth), zarr.open_array(path, mode="r")

    def read():
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda k: array[k : k + ROWS_PER_CHUNK].size, range(0, array.shape[0], ROWS_PER_CHUNK)))

    def transfer():
        chunk = np.zeros(ROWS_PER_CHUNK * COLUMNS, array.dtype)
        for _ in range(n // chunk.size):
            jax.block_until_ready(jax.device_put(chunk))

    best = dict.fromkeys(("read", "transfer", "kernels", "stream"), np.inf)
    with open_sweep(problem) as held, open_sweep(problem, "streaming") as stream:
        runs = (read, transfer, lambda: held.run([request]), lambda: stream.run([request]))
        for _ in range(7):
            for what, run in zip(best, runs, strict=True):
                begin = time.perf_counter()
                run()
                best[what] = min(best[what], time.perf_counter() - begin)
    return best


def warm_up_rows(directory):
    for name in MODELS:
        ours, theirs = passes(name, 2**19)
        yield Row(f"passes over the sample, {name}", "-", f"{ours}", f"L-BFGS-B with parameters scaled by p0: {theirs}")


def passes(name, n):
    """Passes over a sample until it is fitted to a tenth of a standard error, by the trust region and by L-BFGS-B."""
    from scipy.optimize import minimize

    import dask_nlsq
    from dask_nlsq.data.align import build_data
    from dask_nlsq.engine.request import Objective, Request
    from dask_nlsq.engine.sweep import open_sweep
    from dask_nlsq.model.function import intern

    f, truth, _ = MODELS[name]
    rng = np.random.default_rng(0)
    i, j = (np.asarray(axis).ravel()[rng.integers(0, axis.size, n)] for axis in axes_of(name, 10**8))
    mean = np.asarray(f((i, j), *truth))
    y = mean + np.sqrt(mean) * rng.standard_normal(mean.shape)
    best = dask_nlsq.curve_fit(f, (i, j), y, p0=truth, ftol=1e-14, xtol=1e-14, gtol=1e-14)
    p0, enough = start(name, truth), best.cost * (1 + 0.01 / n)
    ours = dask_nlsq.curve_fit(f, (i, j), y, p0=p0, ftol=0.01 / n, gtol=None, xtol=None).nfev
    problem, seen = build_data((i, j), y, check=True, omit=False), []

    def cost_and_gradient(u):
        (found,) = sweep.run([Request(objective, u * p0)])
        seen.append(found.cost)
        return found.cost / n, found.matrix[:-1, -1] * p0 / n

    objective = Objective(intern(f))
    with open_sweep(problem) as sweep:
        options = dict(ftol=0, gtol=0, maxiter=300)
        minimize(cost_and_gradient, np.ones(len(p0)), jac=True, method="L-BFGS-B", options=options)
    return ours, next((k + 1 for k, cost in enumerate(seen) if cost <= enough), f"more than {len(seen)}")


GROUPS = (warm_up_rows, overlap_rows, sweep_rows, sorted_rows, correlation_rows, memory_rows, stack_rows)


def main(directory, names):
    for group in GROUPS:
        if names and group.__name__ not in names:
            continue
        for row in group(directory):
            print(f"{row.figure:<55}{row.required:<20}{row.measured:<42}{row.how}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(sys.argv[1], sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(directory, [])
