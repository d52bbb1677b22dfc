"""Measured against predicted peak memory, each fit in a fresh process: ``python -m benchmarks.memory``.

The peak is that of the operating system (VmHWM) and the prediction that of ``FitResult.plan``, for this process or for
each worker of a LocalCluster. Data are made block by block, so that nothing but the fit holds them.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LEAST, MOST = 0.6, 1.0  # of the prediction


def model_of(p: int):
    """Model and parameters: an exponential decay with an offset (p = 3), or peaks on a line, p = 3 k + 2."""
    import jax.numpy as jnp

    if p == 3:
        return lambda x, a, b, c: a * jnp.exp(-b * x) + c, np.array([2.0, 0.5, 0.3])
    k = (p - 2) // 3

    def peaks(x, *q):
        return q[0] + q[1] * x + sum(a * jnp.exp(-(((x - m) / w) ** 2)) for a, m, w in zip(*[iter(q[2:])] * 3, strict=True))

    return peaks, np.array([0.5, 0.1, *itertools.chain(*((2.0, 10 * (j + 0.5) / k, 3 / k) for j in range(k)))])


def decay_or_peaks(x, params):
    """`model_of` in NumPy, with noise that depends on the place alone."""
    if len(params) == 3:
        y = params[0] * np.exp(-params[1] * x) + params[2]
    else:
        y = params[0] + params[1] * x
        for a, m, w in params[2:].reshape(-1, 3):
            y = y + a * np.exp(-(((x - m) / w) ** 2))
    return (y + 0.05 * np.random.default_rng(int(x.flat[0] * 1e6)).standard_normal(x.shape)).astype(x.dtype)


def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")  # making the data may have taken more than the fit will


def fit(strategy, n, p, dtype, n_workers):
    """[measured, predicted] bytes of each process that holds data, in this fresh one."""
    import dask.array as da

    import dask_nlsq

    f, params = model_of(p)
    step = min(n // 10, 10**6)
    if strategy == "standard":
        x = np.linspace(0, 10, n, dtype=dtype)
        y = np.empty_like(x)
        for k in range(0, n, step):
            y[k : k + step] = decay_or_peaks(x[k : k + step], params)
    else:
        x = da.linspace(0, 10, n, chunks=step, dtype=dtype)
        y = x.map_blocks(decay_or_peaks, params, dtype=dtype, meta=np.zeros(0, dtype))
    forget_peak()
    if not n_workers:
        plan = dask_nlsq.curve_fit(f, x, y, p0=1.01 * params, strategy=strategy).plan
        return [[peak(), plan.peak_bytes]]
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, memory_limit="8GB", dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        plan = dask_nlsq.curve_fit(f, x, y, p0=1.01 * params, strategy=strategy).plan
        measured = client.run(peak)
        return [[measured[place.name], place.peak] for place in plan.places[1:]] + [[peak(), plan.peak_bytes]]


def held_by_small_workers(n=5 * 10**8, n_workers=8):
    """A 4 GB array under ``memory_limit_gb=1`` on workers of 1.5 GB: what Dask wrote to disk, and who was restarted."""
    import dask.array as da
    from distributed import Client, LocalCluster

    import dask_nlsq

    f, params = model_of(3)
    x = da.linspace(0, 10, n, chunks=10**6, dtype="f4")
    y = x.map_blocks(decay_or_peaks, params, dtype="f4", meta=np.zeros(0, "f4"))

    def cluster(n_workers):
        return LocalCluster(n_workers=n_workers, threads_per_worker=1, memory_limit="1.5GB", dashboard_address=":0")

    with cluster(n_workers) as workers, Client(workers) as client:
        before = client.run(os.getpid)
        result = dask_nlsq.curve_fit(f, x, y, p0=1.01 * params, strategy="chunked", memory_limit_gb=1)
        spilled = sum(client.run(lambda dask_worker: dask_worker.data.spilled_total.disk).values())
        restarted = len(before.items() ^ client.run(os.getpid).items())
        worst = max(client.run(peak).values()) / result.plan.worker_peak_bytes
    print(
        f"{(x.nbytes + y.nbytes) / 1e9:.0f} GB on {n_workers} workers of 1.5 GB: {spilled} bytes spilled, {restarted} "
        f"workers restarted, measured / predicted peak {worst:.2f}, {sum(result.seconds.values()):.0f} s"
    )
    with cluster(n_workers // 2) as workers, Client(workers):
        try:
            dask_nlsq.curve_fit(f, x, y, p0=1.01 * params, strategy="chunked", memory_limit_gb=1)
        except dask_nlsq.MemoryBudgetError as err:
            print(f"on {n_workers // 2} workers refused: {err}")
        else:
            raise AssertionError("a plan that spills was not refused")


def time_of_a_plan(n_chunks=100_000):
    import dask.array as da

    import dask_nlsq

    f, params = model_of(3)
    x = da.ones(1000 * n_chunks, chunks=1000)
    dask_nlsq.plan_fit(f, x[:10], x[:10], params)  # JAX starts
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        dask_nlsq.plan_fit(f, x, x, params, memory_limit_gb=100)
        seconds.append(time.perf_counter() - begin)
    print(f"plan_fit of {n_chunks:,} chunks: {np.median(seconds):.2f} s; required 1 s")


def main(sizes=(10**6, 10**7, 10**8)):
    time_of_a_plan()
    print(f"{'strategy':<10}{'points':>8}{'params':>8}{'dtype':>7}{'workers':>9}   measured / predicted, MB (ratio)")
    worst = []
    cases = [*itertools.product(["standard"], sizes, (3, 50), ("f4", "f8"), [0])]
    cases += itertools.product(["chunked"], sizes, (3, 50), ("f4", "f8"), (0, 1, 2))
    for case in cases:
        code = f"import json, benchmarks.memory as b; print('RESULT', json.dumps(b.fit{case}))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))[7:])
        strategy, n, p, dtype, n_workers = case
        cells = (
            f"{measured / 1e6:.0f} / {predicted / 1e6:.0f} ({measured / predicted:.2f})" for measured, predicted in found
        )
        print(f"{strategy:<10}{n:>8.0e}{p:>8}{dtype:>7}{n_workers:>9}   {', '.join(cells)}", flush=True)
        worst += [measured / predicted for measured, predicted in found]
    subprocess.run([sys.executable, "-c", "import benchmarks.memory as b; b.held_by_small_workers()"], check=True)
    print(f"ratio {min(worst):.2f} to {max(worst):.2f}; required {LEAST} to {MOST}")


if __name__ == "__main__":
    main()
