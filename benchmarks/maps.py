"""One fit per pixel against xarray and SciPy, and maps from Zarr to Zarr: ``python -m benchmarks.maps [ROWS ...]``.

xarray's ``curvefit`` calls SciPy for each pixel, on Dask threads or processes, whichever is faster. It cannot take
weights that differ from pixel to pixel, so where ours are weighted its fits are not.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .run import Row

GAUSS = dict(a=(2, 10), m=(-1.5, 1.5), w=(0.5, 1.5), c=(0, 2))
PEAK = dict(A=(200, 2000), center=(9.7, 10.3), fwhm=(0.1, 0.4), eta=(0.1, 0.9), b0=(20, 80), b1=(-10, 10))
XANES = dict(b0=(0.05, 0.15), b1=(-1e-4, 1e-4), step=(0.5, 1.5), e0=(-2, 2), w=(1, 3), h=(0.1, 0.6), s=(3, 8))


def gauss(x, a, m, w, c, np=np):
    return a * np.exp(-0.5 * ((x - m) / w) ** 2) + c


def peak(x, A, center, fwhm, eta, b0, b1, np=np):
    u = 2 * (x - center) / fwhm
    lorentz = 2 / (np.pi * fwhm) / (1 + u * u)
    normal = 2 * (np.log(2) / np.pi) ** 0.5 / fwhm * np.exp(-np.log(2) * u * u)
    return A * (eta * lorentz + (1 - eta) * normal) + b0 + b1 * (x - 10)


def xanes(e, b0, b1, step, e0, w, h, s, np=np):
    edge = 0.5 + np.arctan((e - e0) / w) / np.pi
    return b0 + b1 * e + step * edge + h * np.exp(-0.5 * ((e - e0 - 3) / s) ** 2)


def ours(f):
    import jax.numpy as jnp

    def model(x, *params):
        return f(x, *params, np=jnp)

    return model


class Case:
    """A model, its coordinates, start, bounds, and data of a map."""

    def __init__(self, f, ranges, x, p0, bounds):
        self.f, self.ranges, self.x, self.p0, self.bounds, self.names = f, ranges, x, p0, bounds, list(ranges)

    def data(self, shape, seed=0):
        """Parameters (*shape, p) and spectra (*shape, n): Poisson counts, of the peak; Gaussian noise of 0.2 otherwise."""
        rng = np.random.default_rng(seed)
        truth = np.stack([rng.uniform(*ends, shape) for ends in self.ranges.values()], axis=-1)
        mean = self.f(self.x, *np.moveaxis(truth, -1, 0)[..., None])
        if self.f is peak:
            return truth, rng.poisson(mean).astype("u2")
        return truth, mean + 0.2 * rng.standard_normal(mean.shape)


INF = np.inf
CASES = {
    "gauss": Case(gauss, GAUSS, np.linspace(-5, 5, 64), [5, 0, 1, 1], ([0, -5, 0.05, -10], [100, 5, 10, 100])),
    "peak": Case(
        peak, PEAK, np.linspace(9, 11, 256), [1000, 10, 0.25, 0.5, 50, 0],
        ([0, 9, 0.02, 0, -INF, -INF], [INF, 11, 0.8, 1, INF, INF]),
    ),
}  # fmt: skip


def fit(case, y, bounded, **options):
    import dask_nlsq

    if bounded:
        options["bounds"] = case.bounds
    return dask_nlsq.fit_map(ours(case.f), case.x, y, case.p0, param_names=case.names, **options)


def call_of_xarray(case, y, bounded):
    """The data, and arguments of `curvefit`."""
    import xarray as xr

    data = xr.DataArray(y.astype(float), dims=("pixel", "x"), coords={"x": case.x})
    bounds = dict(zip(case.names, zip(*case.bounds, strict=True), strict=True)) if bounded else None
    p0 = dict(zip(case.names, case.p0, strict=True))
    return data, dict(p0=p0, bounds=bounds, param_names=case.names, errors="ignore")


def rate_of_xarray(case, y, bounded, scheduler):
    """Pixels per second, on two threads, or on two processes that have imported everything."""
    import dask

    n, (data, call) = len(y), call_of_xarray(case, y, bounded)
    kwargs = {} if bounded else {"maxfev": 5000}

    def run(data):
        data.chunk(pixel=-(-len(data) // 8)).curvefit("x", case.f, kwargs=kwargs, **call).compute()

    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn")) if scheduler == "processes" else nullcontext()
    with pool, dask.config.set(scheduler=scheduler, num_workers=2, **({"pool": pool} if scheduler == "processes" else {})):
        run(data[:16])
        begin = time.perf_counter()
        run(data)
        return n / (time.perf_counter() - begin)


def rate_of_ours(case, y, bounded, **options):
    return len(y) / fastest(fit(case, y, bounded, **options).compute)


def rate_of_accessor(case, y, bounded, **options):
    import dask_nlsq.accessor  # noqa: F401

    data, call = call_of_xarray(case, y, bounded)
    return len(y) / fastest(lambda: data.nlsq.curvefit("x", ours(case.f), **call, **options))


def fastest(run):
    """Seconds of the fastest of five runs, after one that compiles."""
    run()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def rate_rows():
    todo = [("gauss", False, 45, 90, 16_000), ("gauss", True, 220, 450, 2400), ("peak", True, 60, 120, 1600)]
    for name, bounded, required, hoped, n in todo:
        case = CASES[name]
        _, y = case.data((40_000 if name == "gauss" else 10_000,))
        options = dict(sigma=np.sqrt(np.maximum(y, 1.0))) if name == "peak" else {}
        theirs = {each: rate_of_xarray(case, y[:n], bounded, each) for each in ("threads", "processes")}
        best = max(theirs, key=theirs.get)
        mine, named = (rate(case, y, bounded, **options) for rate in (rate_of_ours, rate_of_accessor))
        kind = "bounded" if bounded else "unbounded"
        yield Row(
            f"pixels per second, ours / xarray.curvefit: {name}, {kind}",
            f"{required} ({hoped})",
            f"{mine / theirs[best]:.0f}",
            f"{mine:,.0f} against {theirs['threads']:,.0f} on threads, {theirs['processes']:,.0f} on processes ({n} pixels)",
        )
        yield Row(
            f"pixels per second, da.nlsq.curvefit / fit_map: {name}, {kind}", "", f"{named / mine:.2f}", "with covariance"
        )


def agreement_rows(n=1000):
    """Distances from SciPy, both at tolerances 1e-12, in its standard errors; and pixels that only SciPy fits."""
    from scipy.optimize import curve_fit

    tight = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12)
    for name, bounded in (("gauss", False), ("gauss", True), ("peak", True)):
        case = CASES[name]
        _, y = case.data((n,), seed=1)
        sigma = np.sqrt(np.maximum(y, 1.0)) if name == "peak" else np.ones_like(y)
        found = fit(case, y, bounded, sigma=sigma, **tight).compute()
        far, lost, both = 0.0, 0, 0
        for k in range(n):
            try:
                popt, pcov = curve_fit(
                    case.f, case.x, y[k], case.p0, sigma[k], method="trf", x_scale="jac", max_nfev=2000, **tight,
                    **(dict(bounds=case.bounds) if bounded else {}),
                )  # fmt: skip
            except RuntimeError:
                continue
            if not found.success[k]:
                lost += 1
                continue
            cost = np.sum(((case.f(case.x, *popt) - y[k]) / sigma[k]) ** 2)
            if found.chi2[k] < cost * (1 - 1e-6):
                continue  # SciPy stands in another minimum, a worse one
            both += 1
            far = max(far, np.max(np.abs(found.popt[k] - popt) / np.sqrt(np.diag(pcov))))
        kind = "bounded" if bounded else "unbounded"
        yield Row(f"largest distance from SciPy, {name}, {kind}", "1e-4", f"{far:.0e}", f"{both} pixels, standard errors")
        yield Row("pixels that SciPy fits and we do not", "0.1 % (none)", f"{lost / n:.1%}", f"of {n}")


def peaks_store(path, shape):
    """Workload 2: counts of a diffraction peak, with dead pixels."""
    import zarr

    case = CASES["peak"]
    x = np.linspace(9, 11, shape[-1])
    codecs = [zarr.codecs.BloscCodec(cname="lz4", shuffle="bitshuffle"), zarr.codecs.Crc32cCodec()]
    array = zarr.create_array(path, shape=shape, chunks=(32, 32, shape[-1]), dtype="u2", compressors=codecs)
    for i in range(0, shape[0], 32):
        rng = np.random.default_rng(i)
        rows = (min(32, shape[0] - i), shape[1])
        truth = [rng.uniform(*ends, rows).astype("f4") for ends in case.ranges.values()]
        mean = case.f(x.astype("f4"), *(each[..., None] for each in truth))
        counts = np.rint(mean + np.sqrt(mean) * rng.standard_normal(mean.shape, np.float32)).clip(0).astype("u2")
        counts[rng.uniform(size=rows) < 0.001] = 65535
        array[i : i + 32] = counts


def zarr_to_zarr(source, target, n):
    """Seconds and peak memory of a map from store to store; for a process of its own."""
    import dask
    import zarr

    import dask_nlsq

    case = CASES["peak"]
    x = np.linspace(9, 11, n)
    begin = time.perf_counter()
    array = zarr.open_array(source, mode="r")
    result = dask_nlsq.fit_map(ours(case.f), x, array, p0, bounds=case.bounds, param_names=case.names, mask_values=[65535])
    result.to_zarr(target, num_workers=2)
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    most = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    stored = zarr.open_group(target, mode="r")
    good = np.mean(stored["status"][...] <= 6)
    begin = time.perf_counter()
    blocks = [
        (slice(i, i + 32), slice(j, j + 32)) for i in range(0, array.shape[0], 32) for j in range(0, array.shape[1], 32)
    ]
    dask.compute(*[dask.delayed(lambda b: array[b].size)(b) for b in blocks], num_workers=2)
    read = time.perf_counter() - begin
    return dict(seconds=seconds, peak=most, good=float(good), read=read, plan=str(result.plan))


def p0(x, y):
    """Start of a peak on a background: its highest point, the mean of both ends, and a width that is too large."""
    import jax.numpy as jnp

    low = (y[:8].mean() + y[-8:].mean()) / 2
    height, width = y.max() - low, 0.25
    return height * width * 1.3, x[jnp.argmax(y)], width, 0.5, low, 0.0


def workload_rows(shape=(512, 512, 1024)):
    with tempfile.TemporaryDirectory() as directory:
        source, target = str(Path(directory, "counts.zarr")), str(Path(directory, "maps.zarr"))
        peaks_store(source, shape)
        found = in_process("zarr_to_zarr", source, target, shape[-1])
    pixels = shape[0] * shape[1]
    yield Row(
        f"diffraction map {shape}, Zarr to Zarr",
        "finishes (60 s)",
        f"{found['seconds']:.0f} s",
        f"{pixels / found['seconds']:,.0f} pixels/s; reading alone {found['read']:.1f} s; {found['good']:.1%} converged",
    )
    yield Row("peak memory of that process", "2 GB", f"{found['peak'] / 1e9:.2f} GB", found["plan"].splitlines()[1])


def energies_rows(shape=(120, 512, 512)):
    """Workload 5: one chunk per energy; bytes read by the file system calls of the process against bytes stored."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory, "xanes.zarr"))
        in_process("xanes_store", path, shape)
        stored = sum(each.stat().st_size for each in Path(path).rglob("c/**/*") if each.is_file())
        for limit in (None, 0.7):
            found = in_process("fit_energies", path, limit)
            yield Row(
                f"energy stack {shape}, bytes read / stored" + (f", {limit} GiB" if limit else ""),
                "1.0" if limit is None else "as planned",
                f"{found['read'] / stored:.2f}",
                f"planned {found['bands']}; {found['seconds']:.0f} s, peak {found['peak'] / 1e9:.2f} GB",
            )


def xanes_store(path, shape):
    import zarr

    rng = np.random.default_rng(0)
    e = np.linspace(-60, 90, shape[0])
    truth = [rng.uniform(*ends, shape[1:]).astype("f4") for ends in XANES.values()]
    array = zarr.create_array(path, shape=shape, chunks=(1, *shape[1:]), dtype="f4")
    for k, each in enumerate(e):
        array[k] = xanes(np.float32(each), *truth) + 0.01 * rng.standard_normal(shape[1:], np.float32)


def fit_energies(path, limit):
    import dask
    import zarr

    import dask_nlsq

    array = zarr.open_array(path, mode="r")
    start = [0.1, 0, 1, 0, 2, 0.3, 5]
    e = np.linspace(-60, 90, array.shape[0])
    result = dask_nlsq.fit_map(ours(xanes), e, array, start, param_names=list(XANES), axis=0, memory_limit_gb=limit)
    before = read_so_far()
    begin = time.perf_counter()
    with dask.config.set(num_workers=2):
        computed = result.compute()
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    most = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    print(computed)
    return dict(read=read_so_far() - before, bands=result.plan.n_bands, seconds=seconds, peak=most)


def read_so_far():
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1])


def spoiled_rows(n=20_000):
    case = CASES["gauss"]
    _, clean = case.data((n,), seed=2)
    rng = np.random.default_rng(3)
    bad = rng.permutation(n)[: n // 100]
    y = clean.copy()
    for k, pixel in enumerate(bad):
        y[pixel] = (np.nan, np.inf, 0.0, 3.0, 65535.0)[k % 5]
    before, after = fit(case, clean, True).compute(), fit(case, y, True).compute()
    good = np.ones(n, bool)
    good[bad] = False
    same = all(np.array_equal(before.record[name][good], after.record[name][good]) for name in before.record.dtype.names)
    yield Row(
        "1 % of the pixels spoiled: the others",
        "bitwise unaffected",
        "the same bits" if same else "DIFFERENT",
        f"{n} pixels",
    )


def chunk_rows(n=20_000):
    """Chunks of one pixel against one chunk: a map, a fit of all points, and a store, which is also read as it is."""
    import dask
    import dask.array as da
    import zarr

    import dask_nlsq

    case = CASES["gauss"]
    _, y = case.data((n,))
    one, single = da.from_array(y, chunks=(-1, -1)), da.from_array(y, chunks=(1, -1))
    model = ours(case.f)

    def fit_all(y):
        dask_nlsq.curve_fit(model, case.x, y, p0=case.p0)

    def row(name, slow, quick, required, what):
        yield Row(name, required, f"{slow / quick:.1f}", f"{slow:.2f} s, {quick:.2f} s{what}")

    name = f"{n} pixels in chunks of one pixel / in one chunk"
    with dask.config.set(num_workers=2):
        begin = time.perf_counter()
        single.map_blocks(lambda block: block, dtype=float).sum().compute()
        touched = time.perf_counter() - begin
        sum_of_dask = f"; Dask's sum over these chunks alone {touched:.1f} s"
        slow, quick = (fastest(lambda y=y: fit(case, y, False).compute()) for y in (single, one))
        yield from row(name, slow, quick, "2 (1.3)", sum_of_dask)
        slow, quick = (fastest(lambda y=y: fit_all(y)) for y in (single, one))
        yield from row(f"{name}: one fit of all points", slow, quick, "-", sum_of_dask)
        with tempfile.TemporaryDirectory() as directory:
            stored = zarr.create_array(f"{directory}/y.zarr", shape=y.shape, chunks=(1, y.shape[1]), dtype=y.dtype)
            stored[:] = y
            read = fastest(lambda: stored[:])
            for what, run in (("map", lambda y: fit(case, y, False).compute()), ("fit of all points", fit_all)):
                seconds = fastest(lambda run=run: run(f"{directory}/y.zarr"))
                yield from row(f"{what} of such a store / reading it by zarr-python", seconds, read, "-", "")


def in_process(function, *arguments):
    code = f"import json, benchmarks.maps as b; print('RESULT', json.dumps(b.{function}(*{arguments!r})))"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=os.environ)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))[7:])


GROUPS = dict(
    rates=rate_rows, agreement=agreement_rows, spoiled=spoiled_rows, chunks=chunk_rows,
    energies=energies_rows, workload=workload_rows,
    small=partial(workload_rows, (64, 64, 1024)),
)  # fmt: skip


def main(names):
    for name, group in GROUPS.items():
        if (names and name not in names) or (not names and name == "small"):
            continue
        for row in group():
            print(f"{row.figure:<70}{row.required:<20}{row.measured:<16}{row.how}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
