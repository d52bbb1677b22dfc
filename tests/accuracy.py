"""How accurate the fits are: `python -m tests.accuracy` prints every figure beside the one required.

Params are compared in standard errors, so that a figure reads as "this far inside the statistical uncertainty";
covariances entry by entry, relative to sqrt(C_ii C_jj).
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from distributed import Client, LocalCluster

import dask_nlsq
from dask_nlsq.data.align import build_data
from dask_nlsq.data.sample import sample_size
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.model.function import intern
from dask_nlsq.solve import multistart
from dask_nlsq.solve.trust_region import Options, solve
from tests import nist


class Model(NamedTuple):
    """One model written twice, and its exact derivatives, so that SciPy is not limited by finite differences."""

    jax: Callable
    numpy: Callable
    jacobian: Callable  # NumPy, (n, p)
    truth: tuple[float, ...]
    p0: tuple[float, ...]
    predictors: int = 1


def decay_jax(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def decay_numpy(x, a, b, c):
    return a * np.exp(-b * x) + c


def decay_jacobian(x, a, b, c):
    e = np.exp(-b * x)
    return np.stack([e, -a * x * e, np.ones_like(x)], axis=-1)


def peak_jax(x, height, center, width, b0, b1, b2):
    return height * jnp.exp(-0.5 * ((x - center) / width) ** 2) + b0 + b1 * x + b2 * x**2


def peak_numpy(x, height, center, width, b0, b1, b2):
    return height * np.exp(-0.5 * ((x - center) / width) ** 2) + b0 + b1 * x + b2 * x**2


def peak_jacobian(x, height, center, width, b0, b1, b2):
    z = (x - center) / width
    e = np.exp(-0.5 * z**2)
    return np.stack([e, height * e * z / width, height * e * z**2 / width, np.ones_like(x), x, x**2], axis=-1)


def plume_jax(x, a, b, c):
    return a * jnp.exp(-b * x[0]) * x[1] + c * x[1] ** 2


def plume_numpy(x, a, b, c):
    return a * np.exp(-b * x[0]) * x[1] + c * x[1] ** 2


def plume_jacobian(x, a, b, c):
    e = np.exp(-b * x[0]) * x[1]
    return np.stack([e, -a * x[0] * e, x[1] ** 2], axis=-1)


DECAY = Model(decay_jax, decay_numpy, decay_jacobian, truth=(2.5, 1.3, 0.5), p0=(1.5, 1.0, 0.0))
PEAK = Model(peak_jax, peak_numpy, peak_jacobian, truth=(5.0, 1.8, 0.3, 1.0, -0.4, 0.15), p0=(4.0, 1.9, 0.4, 0.8, -0.3, 0.1))
PLUME = Model(plume_jax, plume_numpy, plume_jacobian, truth=(2.5, 1.3, 0.5), p0=(1.5, 1.0, 0.0), predictors=2)


def measured(model: Model, n: int, noise=0.1, outliers=0.0):
    """x (n,) or (k, n), rising from 0 to 4, and noisy y (n,)."""
    rng = np.random.default_rng(20240611)
    x = np.linspace(0, 4, n)
    if model.predictors == 2:
        x = np.stack([x, rng.uniform(0.5, 2, n)])
    y = model.numpy(x, *model.truth) + noise * rng.standard_normal(n)
    wild = rng.random(n) < outliers
    return x, y + wild * rng.normal(0, 20 * noise, n)


# ---------------------------------------------------------------- against SciPy


class Case(NamedTuple):
    """A fit that is put to both sides; `options` are told to both in the same words."""

    model: Model
    options: dict
    sigma: str = "none"
    shape: tuple[int, ...] = (600,)
    masked: bool = False


class Deviation(NamedTuple):
    """Between our fit and SciPy's, and from each of them to the true optimum, which tells what limits the comparison.

    Both fits stop at tolerances of 1e-12; ours is repeated at `TIGHT`, where SciPy's would get no further.
    """

    popt: float  # standard errors
    pcov: float
    ours: float  # standard errors to the optimum
    scipys: float  # standard errors to the optimum
    ours_tight: float  # standard errors to the optimum


RHO = {
    "linear": lambda z: z,
    "soft_l1": lambda z: 2 * ((1 + z) ** 0.5 - 1),
    "huber": lambda z: jnp.where(z <= 1, z, 2 * jnp.maximum(z, 1) ** 0.5 - 1),
    "cauchy": jnp.log1p,
    "arctan": jnp.arctan,
}
SAME = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}
TIGHT = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
SIGMAS = ("none", "scalar", "points", "matrix")
ANYWHERE = (-np.inf, np.inf)
WIDE = {DECAY: (-10, 10), PEAK: (-20, 20), PLUME: (-10, 10)}
# Each cuts the optimum off: the second param of the decay and the plume, the width of the peak.
CUTTING = {
    DECAY: ([0, 0, 0], [10, 1.2, 1]),
    PEAK: ([0, 0, 0.35, -9, -9, -9], [9, 4, 2, 9, 9, 9]),
    PLUME: ([0, 0, 0], [10, 1.2, 1]),
}


MODELS = {"decay": DECAY, "peak": PEAK, "plume": PLUME}


def boxes_of(model: Model) -> dict:
    return {"no bounds": ANYWHERE, "inactive bounds": WIDE[model], "active bounds": CUTTING[model]}


def cases() -> dict[str, Case]:
    table = {}
    for name, model in MODELS.items():
        boxes = boxes_of(model)
        for loss, (box, bounds) in product(RHO, boxes.items()):
            table[f"{name}, {loss}, {box}"] = Case(model, {"loss": loss, "f_scale": 0.4, "bounds": bounds})
        for sigma, absolute in product(SIGMAS, (False, True)):
            label = f"{name}, sigma {sigma}, {'absolute' if absolute else 'relative'}"
            table[label] = Case(model, {"absolute_sigma": absolute}, sigma)
        scale = np.abs(model.truth) / np.arange(1, len(model.truth) + 1)
        for label, x_scale in {"array": scale, "jac": "jac", "1": 1.0}.items():
            table[f"{name}, x_scale {label}"] = Case(model, {"x_scale": x_scale})
        table[f"{name}, masked"] = Case(model, {}, masked=True)
        table[f"{name}, masked, sigma points"] = Case(model, {}, "points", masked=True)
        table[f"{name}, 3-D"] = Case(model, {}, shape=(5, 12, 10))
        table[f"{name}, 3-D, masked, huber, sigma points, active bounds"] = Case(
            model, {"loss": "huber", "bounds": CUTTING[model]}, "points", (5, 12, 10), masked=True
        )
    return table


# Every pair of two values of these options is in one of these fits, but for a covariance with a mask, with several axes or
# with the loss "arctan", where SciPy and we end in different ones of many minima.
MIXED = [  # model, loss, bounds, sigma, absolute_sigma, x_scale, masked, axes
    ("decay", "linear", "inactive bounds", "none", False, "array", True, "3-D"),
    ("decay", "soft_l1", "active bounds", "points", False, "array", True, "3-D"),
    ("decay", "huber", "active bounds", "scalar", True, "jac", True, "3-D"),
    ("decay", "cauchy", "no bounds", "points", True, "1", True, "3-D"),
    ("decay", "cauchy", "no bounds", "matrix", True, "array", False, "1-D"),
    ("decay", "arctan", "inactive bounds", "none", True, "jac", False, "1-D"),
    ("peak", "linear", "no bounds", "matrix", True, "array", False, "1-D"),
    ("peak", "soft_l1", "no bounds", "scalar", True, "jac", True, "3-D"),
    ("peak", "huber", "no bounds", "none", True, "1", True, "1-D"),
    ("peak", "huber", "inactive bounds", "points", False, "array", False, "3-D"),
    ("peak", "cauchy", "active bounds", "none", False, "jac", False, "3-D"),
    ("peak", "arctan", "active bounds", "points", False, "1", False, "1-D"),
    ("plume", "linear", "no bounds", "scalar", False, "1", False, "3-D"),
    ("plume", "linear", "active bounds", "points", True, "jac", True, "1-D"),
    ("plume", "soft_l1", "active bounds", "matrix", False, "1", False, "1-D"),
    ("plume", "soft_l1", "inactive bounds", "none", False, "1", True, "1-D"),
    ("plume", "huber", "inactive bounds", "matrix", True, "jac", False, "1-D"),
    ("plume", "cauchy", "inactive bounds", "scalar", True, "array", True, "1-D"),
    ("plume", "arctan", "no bounds", "none", False, "array", True, "3-D"),
    ("plume", "arctan", "active bounds", "scalar", False, "array", True, "3-D"),
]  # fmt: skip


def mixed() -> dict[str, Case]:
    table = {}
    for name, loss, box, sigma, absolute, x_scale, masked, axes in MIXED:
        model = MODELS[name]
        scale = np.abs(model.truth) / np.arange(1, len(model.truth) + 1)
        options = dict(loss=loss, f_scale=0.4, bounds=boxes_of(model)[box], absolute_sigma=absolute)
        options["x_scale"] = {"array": scale, "jac": "jac", "1": 1.0}[x_scale]
        label = f"{name}, {loss}, {box}, sigma {sigma}, x_scale {x_scale}, {axes}" + ", masked" * masked
        table[label] = Case(model, options, sigma, {"1-D": (600,), "3-D": (5, 12, 10)}[axes], masked)
    return table


def sigma_of(kind: str, x: np.ndarray):
    """None, a number, (n,) standard deviations, or an (n, n) covariance with correlated neighbours."""
    index = np.arange(x.shape[-1])
    points = 0.1 * (1 + 0.5 * np.sin(index))
    distance = np.abs(np.subtract.outer(index, index))
    return {"none": None, "scalar": 0.13, "points": points, "matrix": np.outer(points, points) * 0.5**distance}[kind]


def distances_to_optimum(case: Case, x, y, sigma, points, perr) -> list[float]:
    """Newton steps, with the full Hessian of the cost, along the params that no bound holds; in standard errors."""
    rho = RHO[case.options.get("loss", "linear")]
    f_scale = case.options.get("f_scale", 1.0)

    def whitened(r):
        if np.ndim(sigma) == 2:
            return jnp.linalg.solve(np.linalg.cholesky(sigma), r)
        return r if sigma is None else r / sigma

    def cost(params):
        return 0.5 * f_scale**2 * jnp.sum(rho((whitened(case.model.jax(x, *params) - y) / f_scale) ** 2))

    lower, upper = np.broadcast_arrays(*case.options.get("bounds", ANYWHERE), perr)[:2]

    def distance(popt, g, H):
        free = np.minimum(popt - lower, upper - popt) > 1e-3 * perr
        step = np.linalg.solve(H[np.ix_(free, free)], g[free])
        return float(np.max(np.abs(step) / perr[free]))

    with jax.enable_x64(True):
        derivatives = jax.jit(lambda params: (jax.grad(cost)(params), jax.hessian(cost)(params)))
        return [distance(popt, *map(np.asarray, derivatives(popt))) for popt in points]


def against_scipy(case: Case) -> Deviation:
    model = case.model
    x, y = measured(model, np.prod(case.shape), outliers=0.05)
    sigma = sigma_of(case.sigma, x)
    mask = np.arange(y.size) % 7 == 3 if case.masked else np.zeros(y.size, bool)
    common = {"p0": model.p0, "max_nfev": 1000} | case.options

    kept_x, kept_y = x[..., ~mask], y[~mask]
    kept_sigma = sigma[~mask] if case.sigma == "points" else sigma
    if case.sigma == "scalar":  # SciPy accepts a scalar only with numerical derivatives
        kept_sigma = np.full(kept_y.size, sigma)
    wanted, wanted_cov = scipy.optimize.curve_fit(
        model.numpy, kept_x, kept_y, sigma=kept_sigma, method="trf", jac=model.jacobian, **common, **SAME
    )

    shaped = {"sigma": sigma.reshape(case.shape) if case.sigma == "points" else sigma}
    if case.masked:
        shaped["mask"] = mask.reshape(case.shape)
    data = x.reshape(*x.shape[:-1], *case.shape), y.reshape(case.shape)
    popt, pcov = dask_nlsq.curve_fit(model.jax, *data, **shaped, **common, **SAME)
    tight, _ = dask_nlsq.curve_fit(model.jax, *data, **shaped, **common, **TIGHT)

    perr = np.sqrt(np.diag(wanted_cov))
    ours, scipys, ours_tight = distances_to_optimum(case, kept_x, kept_y, kept_sigma, (popt, wanted, tight), perr)
    return Deviation(
        popt=float(np.max(np.abs(popt - wanted) / perr)),
        pcov=float(np.max(np.abs(pcov - wanted_cov) / np.outer(perr, perr))),
        ours=ours,
        scipys=scipys,
        ours_tight=ours_tight,
    )


# ---------------------------------------------------------------- chunks, order, threads, processes

N_POINTS = 100_000
REDUCTIONS = ("gram", "qr")


def chunked_fit(model: Model, x, y, reduction: str):
    return dask_nlsq.curve_fit(model.jax, x, y, p0=model.p0, strategy="chunked", reduction=reduction)


def in_blocks(array: np.ndarray, blocks: int) -> da.Array:
    return da.from_array(array, chunks=-(-array.size // blocks))


@contextmanager
def chunks_apart():
    """Small chunks are joined by default; here each is to have a matrix of its own."""
    with mock.patch("dask_nlsq.data.joining.JOINED_POINTS", 1):
        yield


@chunks_apart()
def spread_over_chunks(model: Model, reduction: str) -> float:
    """Largest distance, in standard errors, between fits of the same points in 1, 7 and 1000 blocks, sorted and shuffled."""
    x, y = measured(model, N_POINTS)
    shuffled = np.random.default_rng(7).permutation(N_POINTS)
    fits = [
        chunked_fit(model, in_blocks(x[order], blocks), in_blocks(y[order], blocks), reduction)
        for order, blocks in product((slice(None), shuffled), (1, 7, 1000))
    ]
    return float(np.max(np.ptp([fit.popt for fit in fits], axis=0) / fits[0].perr))


@contextmanager
def threads(n: int) -> Iterator[None]:
    with dask.config.set({"nlsq.threads": n}):
        yield


@contextmanager
def processes(n: int) -> Iterator[Client]:
    cluster = LocalCluster(n_workers=n, threads_per_worker=1, processes=True, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        yield client


def differing_bits(model: Model, reduction: str, blocks: int = 37) -> int:
    """In how many of four settings (1 and 2 threads, 1 and 2 processes) popt or pcov is not the first's, bit for bit."""
    x, y = (in_blocks(a, blocks) for a in measured(model, 20 * N_POINTS))  # chunks too large to be joined
    answers = []
    for setting, n in product((threads, processes), (1, 2)):
        with setting(n), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            popt, pcov = chunked_fit(model, x, y, reduction)
        answers.append(popt.tobytes() + pcov.tobytes())
    return sum(answer != answers[0] for answer in answers)


# ---------------------------------------------------------------- reads


class Reads(NamedTuple):
    per_block: float  # how often the fit had each block computed
    sweeps_per_trial: float
    sweeps_per_accepted: float


def reads(model: Model, blocks: int = 20) -> Reads:
    """A chunked fit whose blocks leave one byte in a file whenever they are computed."""
    x, y = measured(model, N_POINTS)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "reads")

        def logged(block):
            with log.open("ab") as file:
                file.write(b".")
            return block

        watched = in_blocks(y, blocks).map_blocks(logged, dtype=y.dtype, meta=np.empty(0))
        fit = chunked_fit(model, in_blocks(x, blocks), watched, "auto")
        computed = log.stat().st_size
    accepted = sum(record.accepted for record in fit.history)  # the start counts: its sweep is needed too
    return Reads(computed / blocks, fit.sweeps / fit.nfev, fit.sweeps / accepted)


# ---------------------------------------------------------------- many starts


def sine(x, a, f, phi, c):
    return a * jnp.sin(2 * jnp.pi * f * x + phi) + c


def two_peaks(x, h1, m1, w1, h2, m2, w2, b):
    return h1 * jnp.exp(-0.5 * ((x - m1) / w1) ** 2) + h2 * jnp.exp(-0.5 * ((x - m2) / w2) ** 2) + b


class Trap(NamedTuple):
    """A problem whose single start from p0 ends in a local minimum."""

    f: Callable
    truth: tuple[float, ...]
    p0: tuple[float, ...]
    bounds: tuple = ANYWHERE
    noise: float = 0.2


SINE = Trap(sine, truth=(1.5, 1.7, 0.6, 0.4), p0=(1, 0.6, 0, 0), noise=0.3)
PEAKS = Trap(two_peaks, truth=(3, 3, 0.3, 2, 7, 0.4, 0.5), p0=(2, 3, 0.3, 2, 1, 0.3, 0.5))
TRAPS = {
    "sine, frequency in 0.1..10": SINE._replace(bounds=([-5, 0.1, -np.pi, -5], [5, 10, np.pi, 5])),
    "sine, no bounds": SINE,
    "two peaks, bounds": PEAKS._replace(bounds=([0, 0, 0.05, 0, 0, 0.05, -5], [10, 10, 3, 10, 10, 3, 5])),
    "two peaks, no bounds": PEAKS,
}


class Escape(NamedTuple):
    found: bool  # many starts reach the cost that a fit from the truth reaches
    trapped: bool  # the single start does not
    ratio: float  # of the sweeps to those of a single start from the winner
    found_by: multistart.Search


def escape(trap: Trap, n_starts: int, seed: int, n: int = 20_000) -> Escape:
    """Both fits of ``n`` points from 0 to 10; the seed is that of the noise and of the starts."""
    x = np.linspace(0, 10, n)
    y = np.asarray(trap.f(x, *trap.truth)) + trap.noise * np.random.default_rng(seed).standard_normal(n)
    lower, upper, p0, truth = np.array(np.broadcast_arrays(*trap.bounds, trap.p0, trap.truth)[:4], dtype=float)
    problem = build_data(x, y, check=True, omit=False)
    objective = Objective(intern(trap.f))
    options = Options(lower, upper)
    with open_sweep(problem) as sweep:
        evaluator = Evaluator(sweep, objective, len(p0))

        def single(start):
            before = evaluator.count
            return solve(evaluator, start, options).equations.cost, evaluator.count - before

        sample = sweep.points(sample_size(len(p0)))
        search = multistart.search(objective, sample, p0, lower, upper, n_starts, seed)
        assert evaluator.count == 0
        solution, search = multistart.polish(search, evaluator, options)
        sweeps, lowest, alone = evaluator.count, single(truth)[0], single(p0)[0]
        return Escape(
            found=bool(solution.equations.cost <= lowest * (1 + 1e-9)),
            trapped=bool(alone > 1.5 * lowest),
            ratio=sweeps / single(search.starts[search.winner])[1],
            found_by=search,
        )


# ---------------------------------------------------------------- the table


class Limits(NamedTuple):
    """What is required; the printed table also says what is hoped for, where that is more."""

    popt: float = 1e-5  # standard errors from SciPy's optimum
    pcov: float = 1e-6  # from SciPy's covariance
    ours_tight: float = 1e-9  # standard errors from the true optimum
    chunks: float = 1e-7  # standard errors
    bits: int = 0
    reads_per_block: float = 1
    sweeps_per_trial: float = 1
    sweeps_of_many_starts: float = 1.5  # of those of a single start from the winner


LIMITS = Limits()


def nist_figures() -> tuple[int, list[str]]:
    """How many of the 162 runs reach their digits, and a line for each that does not."""
    shortfalls = []
    runs = list(product(nist.PROBLEMS.values(), (0, 1), nist.VARIANTS))
    for problem, start, variant in runs:
        found, wanted = nist.run(problem, start, variant), nist.required(problem)
        if found.params < wanted.params or found.errors < wanted.errors:
            shortfalls.append(
                f"{problem.name}, start {start + 1}, {variant}: "
                f"params {found.params:.1f} ({wanted.params:.0f}), errors {found.errors:.1f} ({wanted.errors:.0f})"
            )
    return len(runs) - len(shortfalls), shortfalls


def show(figure: str, required: str, measured: str) -> None:
    print(f"{figure:<72} {required:<24} {measured}", flush=True)


def main() -> None:
    show("figure", "required (hoped for)", "measured")
    reached, shortfalls = nist_figures()
    show("NIST: runs that reach 9 (6) digits of params and 6 of errors", "162", str(reached))
    for line in shortfalls:
        print(f"    {line}")

    deviations = {name: against_scipy(case) for name, case in cases().items()}
    for figure, (required, what) in {
        "popt": ("1e-5 (1e-7)", "popt from SciPy's (s.e.), both at tolerances 1e-12"),
        "pcov": ("1e-6 (1e-8)", "pcov from SciPy's, both at tolerances 1e-12"),
        "ours": ("", "  from us to the true optimum (s.e.)"),
        "scipys": ("", "  from SciPy to the true optimum (s.e.)"),
        "ours_tight": ("1e-9", "  from us to the true optimum at 1e-15 (s.e.)"),
    }.items():
        name, worst = max(deviations.items(), key=lambda item: getattr(item[1], figure))
        show(f"{len(deviations)} fits: {what}", required, f"{getattr(worst, figure):.1e}  ({name})")

    for (name, model), reduction in product({"decay": DECAY, "peak": PEAK}.items(), REDUCTIONS):
        label = f"{name}, {reduction}"
        show(
            f"{label}: 1, 7, 1000 blocks, sorted, shuffled (s.e.)",
            "1e-7 (1e-9)",
            f"{spread_over_chunks(model, reduction):.1e}",
        )
        show(f"{label}: of 4 thread and process settings, bits differ in", "0", str(differing_bits(model, reduction)))

    for name, model in {"decay": DECAY, "peak": PEAK}.items():
        per_block, per_trial, per_accepted = reads(model)
        show(f"{name}: computations of each block in a chunked fit", "1", f"{per_block:g}")
        show(f"{name}: sweeps per trial step; per accepted step", "1", f"{per_trial:g}; {per_accepted:.2f}")

    for (name, trap), n_starts in product(TRAPS.items(), (10, 20)):
        runs = [escape(trap, n_starts, seed) for seed in range(20)]
        found, trapped = (sum(getattr(run, what) for run in runs) for what in ("found", "trapped"))
        show(f"{name}: {n_starts} starts find the optimum; p0 alone", "20 of 20", f"{found}; {20 - trapped}")
    for name, trap in TRAPS.items():
        ratio = escape(trap, 20, seed=0, n=10**7).ratio
        show(f"{name}: sweeps of 20 starts by those of the winner alone, 1e7 points", "1.5", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
