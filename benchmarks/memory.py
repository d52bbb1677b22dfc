"""Measured against planned peak memory: ``python -m benchmarks.memory [CASE ...]``.

Each case is fitted in a fresh process. Measured is what the operating system says of the process (VmHWM), planned is
``peak_bytes`` of the plan: what the process has at its peak in all; with workers the fullest of them, and this process.
Stores are written before, by another process, into a temporary directory that is deleted afterwards.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEP = 10**6  # points that are made at once
TRUTH = [2.0, 0.5, 0.3]  # of the decay


def decay(x, a, b, c):
    import jax.numpy as jnp

    return a * jnp.exp(-b * x) + c


def cosines(x, *q):
    import jax.numpy as jnp

    return sum(a * jnp.cos(0.3 * k * x) for k, a in enumerate(q))


def line(x, a, b):
    return a * x + b


def noisy(x):
    """Counts per second around the decay, with noise that depends on the place alone."""
    noise = np.random.default_rng(int(x.flat[0] * 1e6)).standard_normal(x.shape, np.float32)
    return (TRUTH[0] * np.exp(-TRUTH[1] * x) + TRUTH[2] + 0.05 * noise).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# stores


def store(directory, name, shape, chunks, dtype, values):
    """``values(begin, end)`` of the flat array, written in rows of whole chunks."""
    import zarr

    array = zarr.create_array(f"{directory}/{name}", shape=shape, chunks=chunks, dtype=dtype)
    row, height = int(np.prod(shape[1:])), max(chunks[0], STEP // chunks[0] * chunks[0])
    for k in range(0, shape[0], height):
        end = min(k + height, shape[0])
        array[k:end] = values(k * row, end * row).reshape(end - k, *shape[1:])


def columns(directory, n, y=10**6, x=1_500_000, sigma=700_000, mask=3 * 10**6):
    """y, sigma, mask and x of n points in chunks of these lengths, in float32 and float64."""

    def at(a, b):
        return np.arange(a, b) * (10 / n)

    store(directory, "y", (n,), (y,), "f4", lambda a, b: noisy(at(a, b)))
    store(directory, "x", (n,), (x,), "f8", at)
    store(directory, "sigma", (n,), (sigma,), "f4", lambda a, b: 0.05 + 0.001 * (np.arange(a, b) % 7))
    store(directory, "mask", (n,), (mask,), "bool", lambda a, b: np.arange(a, b) % 100 == 3)


def one_large_chunk(directory, n=2 * 10**7, small=250_000):
    """y in two arrays: chunks of ``small`` points, and one that is 40 times longer in their middle."""
    large = 40 * small
    store(directory, "y0", ((n - large) // 2,), (small,), "f4", lambda a, b: noisy(np.arange(a, b) * (10 / n)))
    store(directory, "y1", (large,), (large,), "f4", lambda a, b: noisy(((n - large) // 2 + np.arange(a, b)) * (10 / n)))
    store(
        directory,
        "y2",
        ((n - large) // 2,),
        (small,),
        "f4",
        lambda a, b: noisy(((n + large) // 2 + np.arange(a, b)) * (10 / n)),
    )
    store(directory, "x", (n,), (10**6,), "f8", lambda a, b: np.arange(a, b) * (10 / n))


def cube(directory, shape, chunks, dtype="f4"):
    """Spectra along the last axis."""
    n = shape[-1]

    def values(a, b):
        rng, x = np.random.default_rng(a), np.arange(a, b) % n / n
        return 2 * x + 1 + 0.05 * rng.standard_normal(b - a, np.float32)

    store(directory, "y", shape, chunks, dtype, values)


def stack(directory, shape, chunks):
    """One chunk per energy, or a few, along the first axis."""
    n, rng = shape[0], np.random.default_rng(0)
    row = int(np.prod(shape[1:]))

    def values(a, b):
        return 2 * (np.arange(a, b) // row / n) + 1 + 0.05 * rng.standard_normal(b - a, np.float32)

    store(directory, "y", shape, chunks, "f4", values)


# ---------------------------------------------------------------------------------------------------------------------
# fits


def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")  # making data in memory may have taken more than the fit will


def fit(x, y, n_workers=0, f=decay, p0=(2.02, 0.505, 0.303), **options):
    """{process: (measured, planned)} of a fit."""
    import dask_nlsq

    if not n_workers:
        plan = dask_nlsq.curve_fit(f, x, y, p0=p0, **options).plan
        return {plan.strategy: (peak(), plan.peak_bytes)}
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, memory_limit="6GB", dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        plan = dask_nlsq.curve_fit(f, x, y, p0=p0, **options).plan
        measured = client.run(peak)
        worst = max(plan.places[1:], key=lambda place: measured[place.name] / place.peak)
        found = {f"{plan.strategy}, worker": (measured[worst.name], worst.peak)}
        return found | {f"{plan.strategy}, client": (peak(), plan.peak_bytes)}


def fit_columns(directory, names=("sigma", "mask", "x"), **options):
    at = {name: f"{directory}/{name}" for name in ("y", *names)}
    return fit(at["x"], at["y"], sigma=at.get("sigma"), mask=at.get("mask"), **options)


def fit_large_chunk(directory, **options):
    return fit(f"{directory}/x", [f"{directory}/y{k}" for k in range(3)], **options)


def fit_in_memory(directory, n, n_params=3, **options):
    x = np.linspace(0, 10, n, dtype="f4")
    y = np.concatenate([noisy(x[k : k + STEP]) for k in range(0, n, STEP)])
    forget_peak()
    if n_params > 3:
        return fit(x, y, f=cosines, p0=[0.1] * n_params, **options)
    return fit(x, y, **options)


def fit_graph(directory, n, chunk, change, **options):
    """Data that a graph of the user's makes; ``change`` is what it does to y."""
    import dask.array as da

    x = da.linspace(0, 10, n, chunks=chunk)
    y = x.map_blocks(noisy, dtype="f4", meta=np.zeros(0, "f4"))
    return fit(x, change(y), **options)


def fit_map(directory, axis=-1, mask=None, sigma=None, to_zarr=False, **options):
    import dask
    import zarr

    import dask_nlsq

    y = zarr.open_array(f"{directory}/y", mode="r")
    n = y.shape[axis]
    if mask is not None:
        options["mask"] = mask(y)
    result = dask_nlsq.fit_map(line, np.arange(n) / n, y, [1.9, 1.1], axis=axis, **options)
    plan = result.plan
    with dask.config.set(num_workers=2):
        result.to_zarr(f"{directory}/found") if to_zarr else result.compute()
    return {f"map, {plan.n_bands} bands" if plan.n_bands > 1 else "map": (peak(), plan.peak_bytes)}


def masked_dask(y):
    import dask.array as da

    return da.from_zarr(y) > 1e9


CASES = {
    # name: (makes the store, its arguments, fits it, its arguments)
    "stream, all cut otherwise, 4e7": (columns, dict(n=4 * 10**7), fit_columns, dict(strategy="streaming")),
    "stream, all cut otherwise, 1.6e8": (columns, dict(n=16 * 10**7), fit_columns, dict(strategy="streaming")),
    "stream, all cut otherwise, 3.2e8": (columns, dict(n=32 * 10**7), fit_columns, dict(strategy="streaming")),
    "stream, cut alike, 4e7": (
        columns, dict(n=4 * 10**7, x=10**6, sigma=10**6, mask=10**6), fit_columns, dict(strategy="streaming"),
    ),
    "stream, sigma in one chunk, 4e7": (
        columns, dict(n=4 * 10**7, sigma=4 * 10**7), fit_columns, dict(strategy="streaming"),
    ),
    "stream on 2 workers, cut otherwise, 4e7": (
        columns, dict(n=4 * 10**7), fit_columns, dict(strategy="streaming", n_workers=2),
    ),
    "stream on 2 workers, cut otherwise, 1.6e8": (
        columns, dict(n=16 * 10**7), fit_columns, dict(strategy="streaming", n_workers=2),
    ),
    "stream, one chunk 40 times larger": (one_large_chunk, {}, fit_large_chunk, dict(strategy="streaming")),
    "standard, one chunk 40 times larger": (one_large_chunk, {}, fit_large_chunk, dict(strategy="standard")),
    "standard from Zarr, 2e7": (columns, dict(n=2 * 10**7), fit_columns, dict(strategy="standard")),
    "standard from Zarr, cut alike, 4e7": (
        columns, dict(n=4 * 10**7, x=10**6), fit_columns, dict(strategy="standard", names=("x",)),
    ),
    "chunked on 2 workers, 4e7": (columns, dict(n=4 * 10**7), fit_columns, dict(strategy="chunked", n_workers=2)),
    "standard in memory, 1e7": (None, {}, fit_in_memory, dict(n=10**7, strategy="standard")),
    "standard in memory, 1e6, 50 parameters": (None, {}, fit_in_memory, dict(n=10**6, n_params=50, strategy="standard")),
    "sent to 2 workers, 2e7": (None, {}, fit_in_memory, dict(n=2 * 10**7, strategy="chunked", n_workers=2)),
    "stream, a chunk that is split, 6e7": (
        None, {}, fit_graph, dict(n=6 * 10**7, chunk=10**7, change=lambda y: y.rechunk(10**6), strategy="streaming"),
    ),
    "stream, y - y.mean(), 2e7": (
        None, {}, fit_graph, dict(n=2 * 10**7, chunk=10**6, change=lambda y: y - y.mean(), strategy="streaming"),
    ),
    "map of 8192-point spectra": (
        cube, dict(shape=(96, 96, 8192), chunks=(32, 32, 8192)), fit_map, {},
    ),
    "map of 8192-point spectra, small chunks": (
        cube, dict(shape=(96, 96, 8192), chunks=(8, 8, 8192)), fit_map, {},
    ),
    "map joined along the fit axis": (stack, dict(shape=(200, 512, 512), chunks=(1, 512, 512)), fit_map, dict(axis=0)),
    "map joined along the fit axis, few chunks": (
        stack, dict(shape=(200, 512, 512), chunks=(50, 128, 512)), fit_map, dict(axis=0),
    ),
    "map joined in bands": (
        stack, dict(shape=(200, 512, 512), chunks=(1, 512, 512)), fit_map, dict(axis=0, memory_limit_gb=0.75),
    ),
    "masked map": (
        cube, dict(shape=(192, 256, 1024), chunks=(32, 32, 1024)), fit_map, dict(mask=masked_dask),
    ),
    "map, invalid values": (
        cube, dict(shape=(192, 256, 1024), chunks=(32, 32, 1024)), fit_map, dict(valid_range=(-9, 9)),
    ),
    "map from Zarr to Zarr": (cube, dict(shape=(192, 256, 1024), chunks=(32, 32, 1024)), fit_map, dict(to_zarr=True)),
}  # fmt: skip


def run(case, directory):
    """In a fresh process: writes the store where there is none, else fits."""
    make, made, work, how = CASES[case]
    if make is not None and not os.listdir(directory):
        make(directory, **made)
    else:
        print("RESULT", json.dumps(work(directory, **how)))


def in_process(case, directory):
    code = f"import benchmarks.memory as b; b.run({case!r}, {directory!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return next((json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT")), None)


def main(names):
    print(f"{'case':<44}{'process':<20}{'planned, MB':>12}{'measured':>10}{'ratio':>7}{'seconds':>9}")
    for case in CASES:
        if names and not any(name in case for name in names):
            continue
        with tempfile.TemporaryDirectory() as directory:
            if CASES[case][0] is not None:
                in_process(case, directory)
            begin = time.perf_counter()
            try:
                found = in_process(case, directory)
            except RuntimeError as err:
                print(f"{case:<44}failed: {str(err).splitlines()[-1]}", flush=True)
                continue
            seconds = time.perf_counter() - begin
        for process, (measured, planned) in found.items():
            numbers = f"{planned / 1e6:>12.0f}{measured / 1e6:>10.0f}{measured / planned:>7.2f}{seconds:>9.0f}"
            print(f"{case:<44}{process:<20}{numbers}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
