"""This version against another one, in turns in one run: ``python -m benchmarks.against PATH_OF_ITS_CHECKOUT [ROW ...]``.

Each version runs in a process of its own, by the ``.venv`` of its checkout (``make .venv/ready``), with the public names
alone. A row is a setting that is made once and a call that is timed ``PAIRS`` times in turns; it prints the quartiles of the
ratios, this version to the other.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PAIRS = 9
SETUP = """
import sys, time, warnings, dask.array as da, jax.numpy as jnp, numpy as np, zarr
import dask_nlsq
from dask_nlsq import curve_fit, fit_map
warnings.filterwarnings("ignore")
rng = np.random.default_rng(0)
def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c
def data(n):
    x = np.linspace(0, 5, n)
    return x, 2.5 * np.exp(-1.3 * x) + 0.5 + 0.05 * rng.standard_normal(n)
def peaks(x, *p):
    return sum(a * jnp.exp(-(((x - m) / s) ** 2)) for a, m, s in zip(p[::3], p[1::3], p[2::3]))
"""
CLUSTER = """
from distributed import Client, LocalCluster
cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
client = Client(cluster)
"""
ROWS = {  # name: what is made once, the call
    "1000 points": ("x, y = data(1000)", "curve_fit(decay, x, y, p0=[1 + 0.01 * k, 1, 0])"),
    "1e7 points, 3 parameters": ("x, y = data(10**7)", "curve_fit(decay, x, y, p0=[1, 1, 0])"),
    "1e6 points, 30 parameters": (
        "x = np.linspace(0, 10, 10**6); p0 = np.ravel([[1, m + 0.5, 0.3] for m in range(10)])\n"
        "y = np.asarray(peaks(x, *(1.02 * p0))) + 0.05 * rng.standard_normal(x.size)",
        "curve_fit(peaks, x, y, p0=p0)",
    ),
    "1e7 points in 400 Dask chunks": (
        "x, y = data(10**7); x, y = (da.from_array(each, chunks=25_000) for each in (x, y))",
        "curve_fit(decay, x, y, p0=[1, 1, 0], strategy='chunked')",
    ),
    "4e7 points streamed from Zarr": (
        "n = 4 * 10**7; x, y = data(n); store = zarr.create_array(folder + '/y', shape=n, chunks=(10**6,), dtype='f4')\n"
        "store[:] = y; X = da.linspace(0, 5, n, chunks=10**6)",
        "curve_fit(decay, X, folder + '/y', p0=[1, 1, 0], strategy='streaming')",
    ),
    "4e6 points on 2 workers": (
        CLUSTER + "x, y = data(4 * 10**6); x, y = (da.from_array(each, chunks=10**5) for each in (x, y))",
        "curve_fit(decay, x, y, p0=[1, 1, 0], strategy='chunked')",
    ),
    "map of 20,000 pixels": (
        "x = np.linspace(0, 5, 64)\n"
        "y = (1 + rng.random((20_000, 1))) * np.exp(-x) + 0.02 * rng.standard_normal((20_000, 64))",
        "fit_map(decay, x, y, p0=[1, 1, 0]).compute(progress=False)",
    ),
    "10 starts": ("x, y = data(10**6)", "curve_fit(decay, x, y, p0=[1, 1, 0], n_starts=10)"),
}
SERVE = """
k = 0
if __name__ == "__main__":
    for line in sys.stdin:
        k += 1
        began = time.perf_counter()
        {call}
        print(time.perf_counter() - began, flush=True)
"""


def version(checkout: Path, setup: str, call: str) -> subprocess.Popen:
    folder = tempfile.mkdtemp(prefix="against-")
    code = f"{SETUP}\nfolder = {folder!r}\nif __name__ == '__main__':\n" + "\n".join(
        "    " + line for line in setup.splitlines()
    )
    path = Path(folder, "serve.py")
    path.write_text(code + SERVE.format(call=call))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    python = checkout / ".venv/bin/python"
    return subprocess.Popen([str(python), str(path)], env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=folder, **pipes)


def seconds(process: subprocess.Popen) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main(other: str, names):
    print(f"load {os.getloadavg()[0]:.1f}; seconds: medians of {PAIRS} calls, ratios: quartiles")
    for name in names or ROWS:
        both = [version(checkout, *ROWS[name]) for checkout in (Path.cwd(), Path(other))]
        try:
            for process in both:
                seconds(process)  # compiles
            times = np.array([[seconds(process) for process in both] for _ in range(PAIRS)])
        finally:
            for process in both:
                process.stdin.close()
                process.wait(60)
        low, middle, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
        here, there = np.median(times, axis=0)
        print(f"{name:<32} {here:8.4f} s, other {there:8.4f} s   {low:.2f} {middle:.2f} {high:.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
