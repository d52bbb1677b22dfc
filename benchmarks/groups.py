"""Grouped fits: ``python -m benchmarks.groups [ROW ...]`` prints each figure beside what is asked of it.

Rows run one after the other, each in a fresh process. ``speed`` and ``scipy`` compare in one process, in turns. Data are
simulated with fixed seeds; stores go to a temporary directory that is deleted afterwards.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from .two_time import all_angles

XPCS_LOCAL = ("contrast", "offset")
STARTS = 14
MB = 1e6


def show(what: str, asked: str, measured: str) -> None:
    print(f"{what:<76} {asked:<14} {measured}", flush=True)


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def now_mb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / MB


# ---------------------------------------------------------------------------------------------------------------------
# problems


class TwoTime:
    """Two-time correlations of the demonstration, with contrast and offset of each angle as locals."""

    def __init__(self, frames: int, n_angles: int = 23):
        from dask_nlsq.demo.measurement import PHYSICAL, plan_measurement, simulate_plane

        self.measurement = m = plan_measurement(frames, n_angles, 0)
        self.y = np.stack([simulate_plane(m, k) for k in range(n_angles)])
        self.x = m.coordinates
        self.bounds = dict(contrast=(0, 1), offset=(0.5, 1.5)) | {each.name: (each.lower, each.upper) for each in PHYSICAL}

    @property
    def truth(self) -> np.ndarray:
        """Of the shared parameters."""
        return self.measurement.truth[2 * len(self.measurement.angles) :]

    def starts(self, n: int):
        """All parameters 30 % off on either side; those without shear somewhere are drawn again, as in the demonstration."""
        from dask_nlsq.demo.measurement import draw_start

        m, rng = self.measurement, np.random.default_rng(1)
        for _ in range(n):
            yield draw_start(rng, m.truth, m.lower, m.upper, m.times, 0.3, 0.3)

    def model(self):
        from dask_nlsq.demo.model import two_time_model

        return two_time_model(self.measurement)

    def fit(self, start, **options):
        from dask_nlsq import fit_groups

        p0 = self.measurement.by_name(start)
        return fit_groups(self.model(), self.x, self.y, p0, local=XPCS_LOCAL, group_axes=0, bounds=self.bounds, **options)

    def fit_dense(self, start, **options):
        from dask_nlsq import curve_fit

        m, (_, i, j) = self.measurement, self.x
        x, bounds = (np.arange(len(m.angles))[:, None, None], i, j), (m.lower, m.upper)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return curve_fit(all_angles(m), x, self.y, start, bounds=bounds, nan_policy="omit", **options)


def decays(n_groups: int, n: int = 64, seed: int = 0):
    """t, y (groups, n) of amplitude exp(-rate t) + offset; rate and the shape are shared."""
    rng, t = np.random.default_rng(seed), np.linspace(0.01, 5, n)
    amplitude, offset = rng.uniform(1, 5, (n_groups, 1)), rng.uniform(0, 1, (n_groups, 1))
    return t, amplitude * np.exp(-((0.7 * t) ** 1.3)) + offset + rng.normal(0, 0.05, (n_groups, n)), amplitude, offset


def decay(t, amplitude, offset, rate, beta):
    import jax.numpy as jnp

    return amplitude * jnp.exp(-((rate * t) ** beta)) + offset


DECAY = dict(p0=dict(amplitude=2, offset=0.5, rate=1, beta=1), local=("amplitude", "offset"), group_axes=0)


def two_lifetimes(t, a1, a2, base, tau1, tau2):
    import jax.numpy as jnp

    return a1 * jnp.exp(-t / tau1) + a2 * jnp.exp(-t / tau2) + base


def sphere(q, scale, background, radius, spread):
    """Polydisperse spheres: the mean over a normal distribution of radii, of relative width ``spread``."""
    import jax.numpy as jnp

    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    total = 0.0
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        size = 1 + spread * node
        u = q * radius * size
        total += weight * size**6 * (3 * (jnp.sin(u) - u * jnp.cos(u)) / u**3) ** 2
    return scale * total + background


# ---------------------------------------------------------------------------------------------------------------------
# rows


def exact() -> None:
    """Of a dense fit by SciPy, to 1e-15."""
    import dask.array as da

    from dask_nlsq import fit_groups
    from tests.test_groups import LOCAL, P0, TIGHT, G, N, T, Y, dense
    from tests.test_groups import decay as model

    shared, own, pcov, _ = dense(Y)
    perr = np.sqrt(np.diag(pcov))
    cuts = {"one chunk": (G, N), "a chunk per group": (1, N), "cut across both axes": (7, 33)}
    data = {name: dict(y=da.from_array(Y, chunks=chunks), x=T, group_axes=0) for name, chunks in cuts.items()}
    order = np.random.default_rng(0).permutation(Y.size)
    labels = np.repeat(np.arange(G), N)[order]
    data["labels"] = dict(y=Y.ravel()[order], x=np.tile(T, G)[order], groups=labels)
    for name, where in data.items():
        x, y = where.pop("x"), where.pop("y")
        result = fit_groups(model, x, y, P0, local=LOCAL, **where, **TIGHT)
        local = result.local.compute(progress=False)
        apart = max(
            np.max(np.abs(result.popt - shared) / perr[:2]),
            np.max(np.abs(local.popt[:, :2] - own) / perr[2:].reshape(-1, 2)),
        )
        covariance = max(
            np.max(np.abs(result.pcov / pcov[:2, :2] - 1)), np.max(np.abs(local.perr[:, :2].ravel() / perr[2:] - 1))
        )
        show(
            f"30 groups against SciPy's dense fit, {name}: s.e.; covariances", "1e-6; 1e-6", f"{apart:.1e}; {covariance:.1e}"
        )


def speed(frames: int = 400) -> None:
    """One thread; the median time between two sweeps of each, the fits in turns."""
    problem = TwoTime(frames)
    start = next(problem.starts(1))
    times: dict[str, list[float]] = {"dense": [], "grouped": []}
    for turn in range(3):
        for name, fit in (("dense", problem.fit_dense), ("grouped", problem.fit)):
            seen: list[float] = []
            fit(start, callback=lambda record, seen=seen: seen.append(record.seconds))
            if turn:  # the first one compiles
                times[name] += list(np.diff(seen)[:8])
    dense, grouped = (np.median(each) / problem.y.size * 1e9 for each in times.values())
    about = f"{dense:.0f} / {grouped:.0f} = {dense / grouped:.2f}"
    show(f"XPCS 23 x {frames} x {frames}, ns per point and evaluation, one thread: dense / grouped", "2.2 (4)", about)


def sweeps(frames: int = 1000) -> None:
    from dask_nlsq import NotConvergedError

    problem = TwoTime(frames)
    counts, far = [], []
    for start in problem.starts(STARTS):
        try:
            result = problem.fit(start)
        except NotConvergedError as err:
            result = err.result
        counts.append(result.sweeps)
        far.append(float(np.max(np.abs(result.popt - problem.truth) / result.perr)) if result.success else np.inf)
    text = f"{np.median(counts):g}, {min(counts)} to {max(counts)}; {sum(each < 5 for each in far)} at the truth"
    show(f"XPCS 23 x {frames} x {frames} from 30 % off: sweeps, median of {STARTS} starts", "8 (6)", text)


def flim(side: int = 512, n: int = 256) -> None:
    import dask.array as da
    import zarr

    from dask_nlsq import fit_groups

    t = (np.arange(n) + 0.5) * 12.5 / n
    with tempfile.TemporaryDirectory() as directory:
        rng = np.random.default_rng(0)
        counts = zarr.create_array(f"{directory}/counts", shape=(side, side, n), chunks=(64, 64, n), dtype="u2")
        for k in range(0, side, 64):
            a1, a2 = rng.uniform(5, 40, (2, 64, side, 1))
            counts[k : k + 64] = rng.poisson(a1 * np.exp(-t / 0.6) + a2 * np.exp(-t / 2.6) + 0.5)
        began, before = time.perf_counter(), now_mb()
        positive = (1e-6, None)
        result = fit_groups(
            two_lifetimes, t, da.from_zarr(counts), dict(a1=20, a2=20, base=0.5, tau1=0.4, tau2=3.5),
            local=("a1", "a2", "base"), group_axes=(0, 1), loss="poisson",
            bounds=dict(a1=positive, a2=positive, base=positive, tau1=(0.01, 20), tau2=(0.01, 20)),
        )  # fmt: skip
        result.local.to_zarr(f"{directory}/maps", progress=False)
        seconds = time.perf_counter() - began
    text = f"{seconds:.1f} s; {result.sweeps}; {(peak_mb() - before) / 1000:.2f} GB"
    pull = np.max(np.abs(result.popt - [0.6, 2.6]) / result.perr)
    show(
        f"FLIM {side} x {side} x {n} Poisson, Zarr to maps: time; sweeps; memory",
        "60 s; 9; 1.2 GB",
        f"{text} (converged {result.success}, {pull:.1f} s.e. off)",
    )


def against_scipy(n_groups: int, method: str) -> None:
    """One of the two, in a process of its own, for its memory: seconds of the second fit, memory above the data."""
    t, y, _, _ = decays(n_groups)
    before = now_mb()
    if method == "ours":
        from dask_nlsq import fit_groups

        def fit():
            return fit_groups(decay, t, y, **DECAY).popt
    else:
        from scipy.optimize import least_squares

        from benchmarks.sparse import Decays

        problem = Decays(t, y)

        def fit():
            found = least_squares(
                problem.residual, problem.start, jac=problem.jacobian, method="trf", tr_solver="lsmr", x_scale="jac"
            )
            return found.x[:2]

    times = []
    for _ in range(2):
        began = time.perf_counter()
        popt = fit()
        times.append(time.perf_counter() - began)
    print(f"{times[-1]:.4f} {peak_mb() - before:.1f} {popt[0]:.12g} {popt[1]:.12g}")


def scipy() -> None:
    for n_groups in (10**3, 10**4, 10**5):
        found = {}
        for method in ("ours", "scipy"):
            said = _in_a_process("against_scipy", str(n_groups), method).split()
            found[method] = [float(each) for each in said]
        ours, theirs = found["ours"], found["scipy"]
        apart = max(abs(a / b - 1) for a, b in zip(ours[2:], theirs[2:], strict=True))
        text = f"{theirs[0] / ours[0]:.1f} ({theirs[0]:.2f} / {ours[0]:.2f} s); {theirs[1] / max(ours[1], 1):.1f} "
        text += f"({theirs[1]:.0f} / {ours[1]:.0f} MB); popt alike to {apart:.0e}"
        show(f"SciPy trf + lsmr, sparse analytic Jacobian, {n_groups:,} groups: time; memory", "10; 5 (20)", text)


def pyglotaran(n_groups: int = 1000) -> None:
    """Two shared rates, two amplitudes and a constant for each group; the second fit of each."""
    from dask_nlsq import fit_groups

    interpreter = Path(".venv-pyglotaran/bin/python")
    if not interpreter.exists():
        show("pyglotaran", "20 (50)", "not installed: make bench-groups does it")
        return

    def model(t, a, b, c, fast, slow):
        import jax.numpy as jnp

        return a * jnp.exp(-fast * t) + b * jnp.exp(-slow * t) + c

    rng, t = np.random.default_rng(0), np.linspace(0.01, 6, 256)
    a, b = rng.uniform(1, 5, (2, n_groups, 1))
    y = a * np.exp(-1.7 * t) + b * np.exp(-0.4 * t) + rng.uniform(0, 0.5, (n_groups, 1))
    y = y + rng.normal(0, 0.05, y.shape)
    with tempfile.TemporaryDirectory() as directory:
        np.savez(f"{directory}/data.npz", t=t, y=y)
        script = Path(__file__).with_name("pyglotaran_fit.py")
        said = subprocess.run([interpreter, script, f"{directory}/data.npz"], stdout=subprocess.PIPE, text=True, check=True)
    theirs, *rates, _ = said.stdout.splitlines()[-1].split()
    p0 = dict(a=1, b=1, c=0, fast=2.5, slow=0.3)
    for _ in range(2):
        began = time.perf_counter()
        result = fit_groups(model, t, y, p0, local=("a", "b", "c"), group_axes=0)
        ours = time.perf_counter() - began
    apart = np.max(np.abs(result.popt - [float(each) for each in rates]) / result.perr)
    text = f"{float(theirs) / ours:.0f} ({float(theirs):.2f} / {ours:.3f} s), rates {apart:.1e} s.e. apart"
    show(f"pyglotaran, {n_groups:,} groups of 256 points", "20 (50)", text)


def saxs(frames: int = 1000, side: int = 500) -> None:
    import dask
    import dask.array as da

    from dask_nlsq import fit_groups

    rng = np.random.default_rng(0)
    axis = np.arange(side) - 0.4 * side
    q = 0.002 + np.hypot(axis[:, None], axis[None, :]) * 4e-4
    gaps = np.zeros((side, side), bool)
    gaps[:, side // 3 : side // 3 + 10], gaps[side // 2 : side // 2 + 10] = True, True
    import zarr

    with tempfile.TemporaryDirectory() as directory:
        stored = zarr.create_array(f"{directory}/frames", shape=(frames, side, side), chunks=(1, side, side), dtype="u4")
        shape = np.asarray(sphere(q, 1.0, 0.0, 60.0, 0.1))
        scale, background = rng.uniform(50, 150, frames), rng.uniform(1, 5, frames)
        for k in range(frames):
            frame = rng.poisson(scale[k] * shape + background[k]).astype("u4")
            frame[gaps] = 2**32 - 1
            stored[k] = frame
        reads = [0]

        def counted(block):
            reads[0] += block.size > 0
            return block

        data = da.from_zarr(stored).map_blocks(counted, dtype="u4", meta=np.empty((0, 0, 0), "u4"))
        began = time.perf_counter()
        with dask.config.set(scheduler="threads"):
            result = fit_groups(
                sphere, q, data, dict(scale=100, background=2, radius=42, spread=0.13), local=("scale", "background"),
                group_axes=0, loss="poisson", strategy="streaming", mask_values=[2**32 - 1],
                bounds=dict(scale=(1e-3, None), background=(1e-3, None), radius=(10, 300), spread=(0.01, 0.3)),
            )  # fmt: skip
        seconds = time.perf_counter() - began
    pull = np.max(np.abs(result.popt - [60, 0.1]) / result.perr)
    text = f"{reads[0] / frames / result.sweeps:.2f}; {result.sweeps} ({seconds:.0f} s, {pull:.1f} s.e. off, "
    show(
        f"SAXS ({frames}, {side}, {side}) u4 streamed with gaps: reads per sweep; sweeps",
        "1; 8 (6)",
        f"{text}{result.n_masked / stored.size:.1%} left out)",
    )


def pieces(n: int = 10**8, limit: float = 1.0) -> None:
    """Three groups, none of which fits in memory: read piece by piece."""
    import dask.array as da

    from dask_nlsq import fit_groups

    size = 10**6

    def made(block_info=None):
        (group, _), (begin, end) = block_info[None]["array-location"]
        noise = np.random.default_rng((group, begin)).normal(0, 0.05, (1, end - begin))
        return (group + 1) * np.exp(-((0.7 * times(begin, end)) ** 1.3)) + 0.1 * group + noise

    def times(begin, end):
        return 0.01 + 5.0 * np.arange(begin, end) / n

    y = da.map_blocks(made, chunks=((1,) * 3, (size,) * (n // size)), dtype=float, meta=np.empty((0, 0)))
    t = 0.01 + 5.0 * da.arange(n, chunks=size) / n
    before, began = now_mb(), time.perf_counter()
    result = fit_groups(decay, t, y, **DECAY, memory_limit_gb=limit)
    seconds, pull = time.perf_counter() - began, np.max(np.abs(result.popt - [0.7, 1.3]) / result.perr)
    text = f"{peak_mb() - before:.0f} MB; {seconds:.0f} s, {result.sweeps} sweeps, {pull:.1f} s.e. off"
    show(f"3 groups of {n:,} points ({y.nbytes / 1e9:.1f} GB), limit {limit} GB: memory", f"{limit * 1000:.0f} MB", text)


def bits() -> None:
    """Of popt, pcov and the records of all groups."""
    import hashlib
    import signal

    import dask
    from distributed import Client, LocalCluster

    from dask_nlsq import fit_groups, resume

    t, y, _, _ = decays(2000)
    import dask.array as da

    data = da.from_array(y, chunks=(130, 64))

    def digest(result) -> str:
        local = result.local.compute(progress=False).record
        return hashlib.blake2b(b"".join(np.ascontiguousarray(each).tobytes() for each in (*result, local))).hexdigest()[:12]

    found = {}
    for n in (1, 2):
        with dask.config.set(num_workers=n, **{"nlsq.threads": n}):
            found[f"{n} threads"] = digest(fit_groups(decay, t, data, **DECAY))
    for n in (1, 2, 4):
        with LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster):
            found[f"{n} processes"] = digest(fit_groups(decay, t, data, **DECAY))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        pid = next(iter(client.run(os.getpid).values()))

        def kill(record):
            if record.nfev == 3:
                os.kill(pid, signal.SIGKILL)

        found["a killed worker"] = digest(fit_groups(decay, t, data, **DECAY, callback=kill))
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.groups", "--row", "killed", directory], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == b"3":
                process.kill()
                break
        process.stdout.close()
        process.wait()
        found["kill -9 and resume"] = digest(resume(f"{directory}/kept", decay, t, data))
    alike = len({*found.values()}) == 1
    show("the same bits: " + ", ".join(found), "all", "all" if alike else str(found))


def killed(directory: str) -> None:
    import dask.array as da

    from dask_nlsq import fit_groups

    t, y, _, _ = decays(2000)
    data = da.from_array(y, chunks=(130, 64))
    fit_groups(decay, t, data, **DECAY, checkpoint=f"{directory}/kept", callback=lambda r: print(r.nfev, flush=True))


def coverage(n_sets: int = 1000, n_groups: int = 20) -> None:
    """Intervals of one standard error, of all locals of all groups; counts of some 2000 in a group."""
    from dask_nlsq import fit_groups

    rng, t = np.random.default_rng(0), np.linspace(0.05, 5, 64)
    a, b = rng.uniform(80, 300, (n_groups, 1)), rng.uniform(5, 20, (n_groups, 1))
    mean = a * np.exp(-0.7 * t) + b

    def model(t, a, b, rate):
        import jax.numpy as jnp

        return a * jnp.exp(-rate * t) + b

    inside = shared = 0
    for _ in range(n_sets):
        options = dict(p0=dict(a=200, b=10, rate=0.8), local=("a", "b"), group_axes=0, loss="poisson")
        result = fit_groups(model, t, rng.poisson(mean), **options)
        local = result.local.compute(progress=False)
        truth = np.concatenate([a, b], axis=1)
        inside += np.count_nonzero(np.abs(local.popt[:, :2] - truth) < local.perr[:, :2])
        shared += abs(result.popt[0] - 0.7) < result.perr[0]
    share = inside / (n_sets * 2 * n_groups)
    text = f"{share:.1%} (shared {shared / n_sets:.1%})"
    show(f"coverage of 68.3 % intervals of locals, {n_sets} data sets of {n_groups} groups", "within 3", text)


def million(n_groups: int = 10**6) -> None:
    import dask.array as da
    from distributed import Client, LocalCluster

    from dask_nlsq import fit_groups

    t = np.linspace(0.01, 5, 64)

    def made(block_info=None):
        (begin, end), _ = block_info[None]["array-location"]
        rng = np.random.default_rng(begin)
        a, b = rng.uniform(1, 5, (end - begin, 1)), rng.uniform(0, 1, (end - begin, 1))
        return a * np.exp(-((0.7 * t) ** 1.3)) + b + rng.normal(0, 0.05, (end - begin, 64))

    y = da.map_blocks(made, chunks=((25_000,) * (n_groups // 25_000), (64,)), dtype=float, meta=np.empty((0, 0)))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="4GiB", dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        times = []
        began = time.perf_counter()
        result = fit_groups(decay, t, y, **DECAY, callback=lambda record: times.append(record.seconds))
        seconds = time.perf_counter() - began
        peaks = client.run(peak_mb)
        success = result.success
    each = ", ".join(f"{b - a:.1f}" for a, b in zip([0, *times], times, strict=False))
    text = f"{max(peaks.values()) / 1000:.2f} GB, {seconds:.0f} s, converged {success}; sweeps of {each} s"
    show(f"{n_groups:,} groups of 64 points, 2 workers: memory of the fuller one; time", "2 GB", text)


ROWS = {
    each.__name__: each for each in (exact, speed, sweeps, flim, scipy, pyglotaran, saxs, pieces, bits, coverage, million)
}
PARTS = {each.__name__: each for each in (against_scipy, killed)}
ONE_THREAD = {"DASK_NLSQ__THREADS": "1", "DASK_NUM_WORKERS": "1"}


def _in_a_process(row: str, *arguments: str, env=None) -> str:
    command = [sys.executable, "-m", "benchmarks.groups", "--row", row, *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | (env or {}))
    return found.stdout


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        name, *arguments = sys.argv[2:]
        (ROWS | PARTS)[name](*(int(each) if each.isdigit() else each for each in arguments))
        return
    if unknown := set(sys.argv[1:]) - ROWS.keys():
        sys.exit(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {Path(sys.executable).name}", flush=True)
    for name in sys.argv[1:] or ROWS:
        print(_in_a_process(name, env=ONE_THREAD if name == "speed" else None), end="", flush=True)


if __name__ == "__main__":
    main()
