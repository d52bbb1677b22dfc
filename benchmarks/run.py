"""How fast the fits are: `python -m benchmarks.run` prints the table and writes benchmarks/results.md.

Ratios compare runs that alternate in one process; times are medians. What is marked "one core" runs in a child process
that may use one core only. Each row says what it times.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results.md"
RUNS = 7


class Row(NamedTuple):
    figure: str
    required: str
    measured: str
    how: str


def medians(*functions, runs=RUNS):
    """Median seconds of each function, called in turn after one call that compiles."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(runs):
        for function, list_ in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            list_.append(time.perf_counter() - begin)
    return [float(np.median(each)) for each in times]


# ---------------------------------------------------------------------------------------------------------------------
# models and data


def decay(x, a, b, c):
    import jax.numpy as jnp

    return a * jnp.exp(-b * x) + c


def decay_of_axes(axes, a, b, c):
    return decay(axes[0] + axes[1], a, b, c)


def decay_numpy(x, a, b, c):
    return a * np.exp(-b * x) + c


def gaussians(k):
    """k Gaussians and a line, p = 3 k + 2."""
    import jax.numpy as jnp

    def model(x, b0, b1, *peaks):
        y = b0 + b1 * x
        for height, center, width in zip(peaks[::3], peaks[1::3], peaks[2::3], strict=True):
            y = y + height * jnp.exp(-(((x - center) / width) ** 2))
        return y

    return model, np.array([0.1, 0.01] + [v for i in range(k) for v in (1.0, 10 * (i + 0.5) / k, 3.0 / k)])


def cosines(p):
    import jax.numpy as jnp

    def model(x, *c):
        return sum(a * jnp.cos(0.1 * k * x) for k, a in enumerate(c))

    return model, np.ones(p)


def decay_data(n, seed=0):
    x = np.linspace(0, 10, n)
    return x, decay_numpy(x, 2.0, 0.5, 0.3) + np.random.default_rng(seed).normal(0, 0.05, n)


def swept(f, params, x, y, threads=1, reduction="gram", jac_mode="auto", mask=None):
    """A function that makes one sweep over x and y held in memory."""
    from dask_nlsq.data.align import build_data
    from dask_nlsq.engine.condensed import Segmentation
    from dask_nlsq.engine.places import HeldHere
    from dask_nlsq.engine.request import Objective, Request
    from dask_nlsq.engine.sweep import Sweep
    from dask_nlsq.kernels.jac_mode import choose_jac_mode
    from dask_nlsq.kernels.kind import CPU
    from dask_nlsq.model.function import intern

    problem = build_data(x, y, None, mask, check=True, omit=False)
    model = intern(f)
    sweep = Sweep(problem, HeldHere.load(problem, threads, lambda *_: None))
    if jac_mode == "auto":
        jac_mode = choose_jac_mode(model, problem.preparation.layouts, sweep.sample, params, 10**9, CPU)
    request = Request(Objective(model), params, reduction, jac_mode, Segmentation.of(problem, len(params)))
    return lambda: sweep.run([request])


def kernel_at(misfit, reduction="gram", parts=0):
    """The bare kernel of 3 parameters, on one block of x and y that begin ``misfit`` bytes behind a 64-byte line.

    NumPy's own large arrays begin 16 bytes behind one.
    """
    import jax

    from dask_nlsq import get_memory_manager
    from dask_nlsq.kernels.blocks import Block, KernelSpec, Layout, Layouts, tile_size
    from dask_nlsq.kernels.kind import CPU
    from dask_nlsq.kernels.rows import sweep_kernel
    from dask_nlsq.model.function import intern

    n, skip = CPU.block_points, misfit // 8
    buffers = [get_memory_manager().allocate_array(n + skip)[skip:] for _ in range(2)]
    buffers[1][:], buffers[0][:] = decay_data(n)
    layouts = Layouts(Layout(True), Layout(False), None, (Layout(True),), "single", (), 1)
    block = Block(np.array([n, 0, 0, 1, 0, 0, 0, 1]), np.array([float(n)]), (buffers[0], np.ones(1), buffers[1]))
    longest = tile_size(CPU, 3, n)
    tile = min(longest, n // max(parts, 1))
    spec = KernelSpec(layouts, reduction, "columns", "linear", tile, parts=parts, together=longest // tile)
    kernel = sweep_kernel(intern(decay), spec)

    def run():
        with jax.enable_x64(True):
            return jax.block_until_ready(kernel(np.array([2.0, 0.5, 0.3]), 1.0, block))

    return run


def naive(f, params, x, y):
    """The same in plain JAX: the full Jacobian of the block, then J^T J and J^T r."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def equations(params, x, y):
        def residual(params):
            return f(x, *params) - y

        J, r = jax.jacfwd(residual)(params), residual(params)
        return J.T @ J, J.T @ r, 0.5 * r @ r

    def run():
        with jax.enable_x64(True):
            return jax.block_until_ready(equations(jnp.asarray(params), x, y))

    return run


# ---------------------------------------------------------------------------------------------------------------------
# one core


def one_core_kernels():
    found = {}
    n = 2**20
    x, y = decay_data(n)
    params = np.array([2.0, 0.5, 0.3])
    # what runs behind the full Jacobian, which fills the caches, takes 1.8 times longer: a sweep that is not counted
    by_gram = swept(decay, params, x, y)
    _, ours, full = medians(by_gram, by_gram, naive(decay, params, x, y))
    gram, qr = medians(by_gram, swept(decay, params, x, y, reduction="qr"))
    sweep, cheap = medians(swept(decay, params, x, y), cost_only(decay, params, x, y))
    axes, counts = (np.linspace(0, 5, 1024)[:, None], np.linspace(0, 5, 1024)[None]), y.reshape(1024, 1024)
    hidden = np.random.default_rng(0).random(counts.shape) < 0.01
    whole, masked = medians(*(swept(decay_of_axes, params, axes, counts, mask=mask) for mask in (None, hidden)))
    pooled, ordinary = medians(kernel_at(0), kernel_at(16), runs=101)
    found |= {"3 full": full / ours, "3 ns": ours / n * 1e9, "qr": qr / gram, "cost": sweep / cheap, "mask": masked / whole}
    found["copy"] = (ordinary / pooled, pooled * 1e3, ordinary * 1e3)
    for reduction in ("gram", "qr"):
        plain, parted = medians(kernel_at(0, reduction), kernel_at(0, reduction, 256), runs=101)
        found[f"{reduction} parts"] = parted / plain
    for k, n in ((1, 2**20), (16, 2**18)):
        model, params = gaussians(k)
        x, y = decay_data(n)
        ours, full = medians(swept(model, params, x, y), naive(model, params, x, y), runs=5)
        found |= {f"{len(params)} full": full / ours, f"{len(params)} ns": ours / n * 1e9}
    return found


def one_core_params():
    """ns per point of a sweep for p = 2..100, and of the p x p product alone in NumPy."""
    n = 2**17
    x, y = decay_data(n)
    found = {}
    for p in (2, 5, 10, 20, 30, 50, 75, 100):
        model, params = cosines(p)
        A = np.random.default_rng(0).normal(size=(p + 1, 2048))
        ours, product = medians(swept(model, params, x, y), lambda A=A: A @ A.T, runs=5)
        found[p] = (ours / n * 1e9, product / 2048 * 1e9)
    return found


def product(p, n):
    """A function that adds up ``A @ A.T`` of tiles A of p + 1 rows, ``n`` columns in all, which stay in the cache."""
    import jax
    from jax import lax

    from dask_nlsq.base.compile import LONG
    from dask_nlsq.kernels.blocks import tile_size
    from dask_nlsq.kernels.kind import CPU

    tile = tile_size(CPU, p, n)
    tiles = np.random.default_rng(0).normal(size=(2, p + 1, tile))

    @partial(jax.jit, compiler_options=LONG)  # as our kernels
    def add(tiles):
        def one(k, found):
            A = tiles[k % 2]
            return found + A @ A.T

        return lax.fori_loop(0, n // tile, one, 0 * tiles[0, :, : p + 1])

    def run():
        with jax.enable_x64(True):
            jax.block_until_ready(add(there))

    with jax.enable_x64(True):
        there = jax.device_put(tiles)
    return run


def cost_only(f, params, x, y):
    """A function that adds up the squares of the residuals."""
    import jax
    import jax.numpy as jnp

    from dask_nlsq.base.compile import LONG

    @partial(jax.jit, compiler_options=LONG)  # as our kernels
    def cost(params, x, y):
        return 0.5 * jnp.sum((f(x, *params) - y) ** 2)

    def run():
        with jax.enable_x64(True):
            jax.block_until_ready(cost(params, *there))

    with jax.enable_x64(True):
        there = jnp.asarray(x), jnp.asarray(y)
    return run


def one_core_floor():
    """Of a sweep over 2^20 points: ns per point, and those of the cost and of the bare product alone."""
    n, found = 2**20, {}
    x, y = decay_data(n)
    models = {3: (decay, np.array([2.0, 0.5, 0.3])), **{3 * k + 2: gaussians(k) for k in (1, 3, 16)}}
    for p, (f, params) in models.items():
        times = medians(swept(f, params, x, y), cost_only(f, params, x, y), product(p, n), runs=5 if p > 11 else RUNS)
        found[p] = [each / n * 1e9 for each in times]
    return found


def peak_memory():
    """MB above the data, of a fit of 1e7 points; the peak is reset first, so that making the data does not count."""
    import dask_nlsq

    def resident(field):
        status = Path("/proc/self/status").read_text()
        return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024

    x, y = decay_data(10**7)
    dask_nlsq.curve_fit(decay, x[:1000], y[:1000], p0=[1, 1, 0])  # JAX itself
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    dask_nlsq.curve_fit(decay, x, y, p0=[1, 1, 0])
    return resident("VmHWM") - before


def in_child(function, cores=None):
    """Result of a function of this file in a fresh process that may use ``cores`` cores."""
    code = f"import json, benchmarks.run as b; print('RESULT', json.dumps(b.{function}()))"
    if cores is not None:
        code = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-{cores}:]); " + code
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))[7:])


# ---------------------------------------------------------------------------------------------------------------------
# rows


def kernel_rows():
    found = in_child("one_core_kernels", cores=1)
    what = "one sweep over 2^20 points (2^18 at 50 params), one core; full: jax.jit of jacfwd, then J.T @ J"
    yield Row("full-Jacobian JAX / ours, 3 params", "5 (8)", f"{found['3 full']:.1f} ({found['3 ns']:.1f} ns/point)", what)
    yield Row("full-Jacobian JAX / ours, 5 params", "5 (8)", f"{found['5 full']:.1f} ({found['5 ns']:.1f} ns/point)", what)
    yield Row(
        "full-Jacobian JAX / ours, 50 params", "8 (13)", f"{found['50 full']:.1f} ({found['50 ns']:.0f} ns/point)", what
    )
    for p, (ours, cost, bare) in in_child("one_core_floor", cores=1).items():
        what = (
            f"ns per point, 2^20 points, one core: {ours:.1f} / ({cost:.1f} + {bare:.1f}); the product of tiles in the cache"
        )
        yield Row(f"sweep / (cost + bare product), {p} params", "1.25 (1.1)", f"{ours / (cost + bare):.2f}", what)
    yield Row("sweep / cost-only sweep, 3 params", "4.5 (3.3)", f"{found['cost']:.1f}", "cost: jitted 0.5 sum r^2, aligned")
    ratio, pooled, ordinary = found["copy"]
    what = "kernel of 3 params on 2^18 points, one core; the ordinary array begins 16 bytes behind a cache line"
    figure = "zero-copy: NumPy buffer from the pool into the kernel / an ordinary array"
    yield Row(figure, "1.3", f"{ratio:.2f} ({pooled:.2f} ms, {ordinary:.2f} ms)", what)
    for reduction, most in (("gram", "1.03"), ("qr", "1.10")):
        what = "the same kernel, with sums of 256 parts and without"
        yield Row(f"{reduction} with sums of the parts / without", most, f"{found[f'{reduction} parts']:.2f}", what)
    yield Row("qr sweep / gram sweep, 3 params", "2 (1.6)", f"{found['qr']:.2f}", "same sweep, both reductions")
    yield Row(
        "sweep with a mask / without", "-", f"{found['mask']:.2f}", "2^20 points, 2 axis vectors, 1 % masked, 3 params"
    )


def thread_row():
    x, y = decay_data(2**23)
    params = np.array([2.0, 0.5, 0.3])
    one, two = medians(swept(decay, params, x, y, 1), swept(decay, params, x, y, 2))
    yield Row("two threads against one", "1.6 (1.9)", f"{one / two:.2f}", "one sweep over 2^23 points, 3 params")


def fit_rows():
    import jax.numpy as jnp
    import optimistix
    from jax import enable_x64
    from scipy.optimize import curve_fit as scipy_curve_fit

    import dask_nlsq

    x, y = decay_data(10**7)
    p0 = [1.0, 1.0, 0.0]
    begin = time.perf_counter()
    dask_nlsq.curve_fit(lambda x, a, b, c: decay(x, a, b, c), x, y, p0=p0)
    cold = time.perf_counter() - begin

    def levenberg_marquardt():
        with enable_x64(True):
            xd, yd = jnp.asarray(x), jnp.asarray(y)
            solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
            optimistix.least_squares(lambda q, _: decay(xd, *q) - yd, solver, jnp.array(p0)).value.block_until_ready()

    ours, lm, trf, opt = medians(
        lambda: dask_nlsq.curve_fit(decay, x, y, p0=p0),
        lambda: scipy_curve_fit(decay_numpy, x, y, p0=p0),
        lambda: scipy_curve_fit(decay_numpy, x, y, p0=p0, method="trf"),
        levenberg_marquardt,
        runs=3,
    )
    what = "whole fit of 1e7 points in memory from p0 = (1, 1, 0), default tolerances"
    yield Row("SciPy lm / ours, 1e7 points", "5 (15)", f"{lm / ours:.1f} (ours {ours:.2f} s warm, {cold:.2f} s cold)", what)
    yield Row("SciPy trf / ours", "15 (40)", f"{trf / ours:.1f}", what)
    yield Row("optimistix LevenbergMarquardt / ours", "5", f"{opt / ours:.1f}", what + ", rtol = atol = 1e-8")
    yield Row(
        "peak memory above the data", "300 MB (100)", f"{in_child('peak_memory'):.0f} MB", "fresh process, the same fit"
    )


def small_fit_row():
    from scipy.optimize import curve_fit as scipy_curve_fit

    import dask_nlsq

    x, y = decay_data(1000)
    starts = iter(np.linspace(0.9, 1.1, 1000))  # another p0 each time
    ours, scipy = medians(
        lambda: dask_nlsq.curve_fit(decay, x, y, p0=[next(starts), 1, 0]),
        lambda: scipy_curve_fit(decay_numpy, x, y, p0=[next(starts), 1, 0]),
        runs=41,
    )
    yield Row(
        "warm fit of 1000 points", "20 ms (5)", f"{ours * 1e3:.1f} ms (SciPy {scipy * 1e3:.1f} ms)", "another p0 each time"
    )
    sets = [decay_data(1000, seed)[1] for seed in range(1000)]
    begin = time.perf_counter()
    for each in sets:
        dask_nlsq.curve_fit(decay, x, each, p0=[1, 1, 0])
    yield Row("one model on 1000 data sets in a row", "2 s (1)", f"{time.perf_counter() - begin:.1f} s", "after compilation")


def overhead_rows():
    import dask.array as da
    from distributed import Client, LocalCluster

    from dask_nlsq.data.align import build_data
    from dask_nlsq.engine.request import Objective, Request
    from dask_nlsq.engine.sweep import open_sweep
    from dask_nlsq.model.function import intern

    x, y = decay_data(512 * 4096)
    request = Request(Objective(intern(decay)), np.array([2.0, 0.5, 0.3]))

    def problem(chunk):
        return build_data(da.from_array(x, chunks=chunk), da.from_array(y, chunks=chunk), check=True, omit=False)

    def local(chunk):
        aligned = problem(chunk)
        sweep = open_sweep(aligned)
        return lambda: sweep.run([request])

    small, large = medians(local(4096), local(2**18), runs=21)
    how = "2^21 points in 512 chunks; kernel time: the same points in 8 chunks on 2 threads"
    yield Row("time per sweep beyond the kernel, threads", "10 ms (2)", f"{(small - large) * 1e3:.1f} ms", how)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        aligned = problem(4096)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            sweep = open_sweep(aligned, "chunked", client, 4)
        with sweep:
            (remote,) = medians(lambda: sweep.run([request]), runs=21)
    yield Row("the same, 2-worker LocalCluster", "60 ms (25)", f"{(remote - large) * 1e3:.1f} ms", how)


COMPILED = """
import dask.array as da, jax.numpy as jnp, numpy as np
from distributed import Client, LocalCluster
import dask_nlsq

def decay(x, a, b):
    return a * jnp.exp(-b * x)

def count():
    from dask_nlsq.model.function import _registry
    return sum(f.run.run.run._cache_size() for m in _registry.values() for key, f in m.compiled.items() if key[0] == "sweep")

if __name__ == "__main__":
    chunks = (*[40_000] * 62, 30_000, 50_000)
    x = da.linspace(0, 1, sum(chunks), chunks=(chunks,))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        dask_nlsq.curve_fit(decay, x, 2 * da.exp(-x) + 0.01 * da.sin(99 * x))
        print("compiled", max(client.run(count).values()))
"""


def compilation_row():
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=root, check=True)
    found = next(line for line in run.stdout.splitlines() if line.startswith("compiled")).split()[1]
    how = "sweep kernels compiled in a worker process: function from __main__, 64 chunks of 3 lengths, 2 workers"
    yield Row("compilations per worker process", "2 (1)", found, how)


def growth_rows():
    """Seconds of a fit against points; y is made by Dask as float32, x are two axis vectors."""
    import dask.array as da

    import dask_nlsq

    seconds = {}
    for rows, repeats in ((1, 15), (10, 15), (100, 9), (1000, 3), (10_000, 1)):
        columns = 100_000
        row = np.linspace(0, 1, rows)[:, None]
        column = np.linspace(0, 9, columns)
        clean = da.from_array(row, chunks=(min(rows, 100), 1)) + da.from_array(column, chunks=columns)
        noise = da.random.default_rng(0).normal(0, 0.05, clean.shape, chunks=clean.chunks)
        y = (2 * da.exp(-0.5 * clean) + 0.3 + noise).astype(np.float32)
        fits = [dask_nlsq.curve_fit(decay_of_axes, (row, column), y, p0=[1, 1, 0]) for _ in range(repeats)]
        sweeps = [(fit.history[-1].seconds - fit.history[0].seconds) / (fit.nfev - 1) for fit in fits]
        seconds[rows * columns] = float(np.median(sweeps))
    large = np.array([n for n in seconds if n >= 10**6], dtype=float)
    slope = np.polyfit(np.log(large), np.log([seconds[int(n)] for n in large]), 1)[0]
    listed = ", ".join(f"{n:.0e}: {s * 1e3:.1f} ms" for n, s in seconds.items())
    yield Row("exponent of time per sweep against points, above 1e6", "1.00 +- 0.05", f"{slope:.3f}", listed)


def params_rows():
    found = in_child("one_core_params", cores=1)
    for p, (ours, product) in found.items():
        yield Row(
            f"sweep at p = {p}", "no cliff", f"{ours:.1f} ns/point", f"(p+1) x (p+1) product in BLAS: {product:.1f} ns/point"
        )


def streaming_rows():
    """Those of `benchmarks.streaming` that are short, at a fifth of the size and less."""
    from .streaming import overlap_rows, sweep_rows

    n = 4 * 10**7  # twenty chunks: fewer than twelve have no sample
    with tempfile.TemporaryDirectory() as directory:
        yield from sweep_rows(directory, (n, n))
        yield from overlap_rows(directory, n)


GROUPS = (kernel_rows, thread_row, fit_rows, small_fit_row, overhead_rows, compilation_row, growth_rows, params_rows)
GROUPS += (streaming_rows,)


def machine():
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy", "scipy", "dask", "optimistix"))
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {packages}"


def main():
    begin = time.perf_counter()
    rows = []
    for group in GROUPS:
        for row in group():
            print(f"{row.figure:<55}{row.required:<16}{row.measured:<42}{row.how}", flush=True)
            rows.append(row)
    header = f"# Benchmarks\n\n`make bench` on {machine()}; {time.perf_counter() - begin:.0f} s.\n\n"
    table = ["| figure | required (hoped for) | measured | what is timed |", "| --- | --- | --- | --- |"]
    RESULTS.write_text(header + "\n".join([*table, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s; written to {RESULTS}")


if __name__ == "__main__":
    main()
