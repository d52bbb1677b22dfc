import warnings
from contextlib import nullcontext
from dataclasses import replace

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.data.align import build_data, whitened
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.model.function import intern
from dask_nlsq.solve import multistart
from dask_nlsq.solve.multistart import Search, candidates, polish, search
from dask_nlsq.solve.trust_region import NotFiniteAtStart, Options
from tests.accuracy import LIMITS, TRAPS, chunks_apart, escape, processes, sine, threads

RNG = np.random.default_rng(3)
N = 3000
X = np.linspace(0, 10, N)
TRUTH = (1.5, 1.7, 0.6, 0.4)
Y = TRUTH[0] * np.sin(2 * np.pi * TRUTH[1] * X + TRUTH[2]) + TRUTH[3] + RNG.normal(0, 0.3, N)
P0 = np.array([1, 0.6, 0, 0.0])
FREE = np.full(4, -np.inf), np.full(4, np.inf)


@pytest.fixture
def few_candidates(monkeypatch):
    """Where the claim is not that the optimum is found."""
    monkeypatch.setattr(multistart, "FEWEST_CANDIDATES", 64)
    monkeypatch.setattr(multistart, "CANDIDATES_PER_START", 8)


def search_locally(f=sine, x=X, y=Y, p0=P0, bounds=FREE, n_starts=5, seed=0, loss="linear", f_scale=1.0, **data):
    problem = build_data(x, y, **{"check": True, "omit": False} | data)
    objective = Objective(intern(f), loss, f_scale)
    with open_sweep(problem) as sweep:
        return search(objective, sweep.points(4096), np.asarray(p0, float), *np.asarray(bounds, float), n_starts, seed)


def equal(one: Search, other: Search) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def numpy_cost(params, x=X, y=Y, sigma=1.0, rho=lambda z: z, f_scale=1.0):
    r = (params[0] * np.sin(2 * np.pi * params[1] * x + params[2]) + params[3] - y) / sigma
    return 0.5 * f_scale**2 * np.sum(rho((r / f_scale) ** 2))


# ---------------------------------------------------------------- the global optimum


QUICK = ("sine, frequency in 0.1..10", "two peaks, no bounds")


def check_escapes(trap, n_starts, seeds):
    runs = {seed: escape(trap, n_starts, seed) for seed in seeds}
    for seed, run in runs.items():
        assert run.found, f"seed {seed}: {run.found_by}"
        assert run.ratio <= LIMITS.sweeps_of_many_starts
    found_by_p0 = [seed for seed, run in runs.items() if not run.trapped]
    assert len(found_by_p0) <= 0.1 * len(runs), f"seeds {found_by_p0}: p0 alone finds the optimum, which tests nothing"


@pytest.mark.slow
@pytest.mark.parametrize("n_starts", [10, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAPS])
def test_starts_find_the_optimum_that_p0_misses(name, n_starts):
    check_escapes(TRAPS[name], n_starts, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("n_starts", [10, 20])
def test_starts_find_the_optimum_for_every_seed(name, n_starts):
    check_escapes(TRAPS[name], n_starts, range(20))


@pytest.mark.parametrize("width", [0.5, -0.5])
def test_of_equivalent_optima_the_nearest_to_p0_wins(few_candidates, width):
    def peak(x, h, m, w):
        return h * jnp.exp(-0.5 * ((x - m) / w) ** 2)

    y = np.asarray(peak(X, 2, 4, 0.3)) + RNG.normal(0, 0.1, N)
    found = search_locally(peak, y=y, p0=[1, 3, width], bounds=[[-np.inf] * 3, [np.inf] * 3], n_starts=20)
    assert np.ptp(np.sign(found.params[found.basin == 0, 2])) == 2  # both signs are among them
    np.testing.assert_allclose(found.params[found.winner], [2, 4, np.copysign(0.3, width)], atol=0.05)


def test_a_model_that_is_linear_in_all_parameters_has_one_optimum(few_candidates):
    found = search_locally(lambda x, a, b: a + b * x, y=3 + 2 * X, p0=[0, 0], bounds=[[-np.inf] * 2, [np.inf] * 2])
    assert found.basin.tolist() == [0] * 5
    np.testing.assert_allclose(found.params, np.tile([3, 2], (5, 1)), rtol=1e-6)


# ---------------------------------------------------------------- starts


def test_starts_are_inside_the_bounds_and_p0_is_the_first(few_candidates):
    p0, reach = np.array([1.0, 2, -1, 30, 0]), np.ones(5)
    lower, upper = np.array([0, 0, -np.inf, 1, -np.inf]), np.array([5, np.inf, 0, 1e5, np.inf])
    starts = candidates(p0, lower, upper, reach, 1000, seed=0)
    assert starts.shape == (1000, 5)
    assert np.isfinite(starts).all()
    np.testing.assert_array_equal(starts[0], p0)
    assert ((starts >= lower) & (starts <= upper)).all()
    np.testing.assert_allclose(np.quantile(starts[1:, 0], [0.1, 0.9]), [0.5, 4.5], atol=0.02)
    np.testing.assert_allclose(np.median(starts[1:, 1:], axis=0), [2, -1, 10**2.5, 0], rtol=0.05, atol=0.02)
    bounds = np.array([[-3, 0.5, -3, -3], [3, 3, 3, 3]])
    found = search_locally(bounds=bounds)
    np.testing.assert_array_equal(found.starts[0], P0)
    for inside in (found.starts, found.params):
        assert ((inside >= bounds[0]) & (inside <= bounds[1])).all()


def test_the_seed_decides(few_candidates):
    assert equal(search_locally(seed=1), search_locally(seed=1))
    assert not equal(search_locally(seed=1), search_locally(seed=2))


def test_repr_lists_every_start_and_marks_the_winner(few_candidates):
    found = search_locally()
    lines = repr(found).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].startswith("->")
    assert f"{found.costs[found.winner]:.6g}" in lines[2]
    assert sum(" p0 " in line for line in lines) == 1


# ---------------------------------------------------------------- the sample


def points(x, y, n, chunks=None, **data):
    if chunks:
        x, y = da.from_array(x, chunks), da.from_array(y, chunks)
    problem = build_data(x, y, **{"check": True, "omit": False} | data)
    with open_sweep(problem) as sweep:
        return sweep.points(n)


@pytest.mark.parametrize(
    "chunks, apart",
    [
        ((60, 50), nullcontext),
        ((7, 50), nullcontext),
        ((40, 33), nullcontext),
        ((60, 11), chunks_apart),
        ((4, 3), chunks_apart),
    ],
)
def test_sample_does_not_depend_on_chunks(chunks, apart):
    x, y = X.reshape(60, 50), Y.reshape(60, 50)
    with apart():
        whole, parts = points(x, y, 512), points(x, y, 512, chunks)
    assert whole.n_points == parts.n_points == 512
    for one, other in zip(whole.block.buffers, parts.block.buffers, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [6400, 640_000])
def test_sample_is_spread_evenly_and_keeps_what_belongs_to_a_point_together(size):
    rows, columns = np.arange(size // 100.0)[:, None], np.arange(100)
    y = 100 * rows + columns
    weights = da.from_array(1 + y, (size // 200, 100))
    sample = points((rows, columns), da.from_array(y, (size // 200, 100)), 128, sigma=weights)
    m = sample.n_points
    found, sigma, row, column = (buffer[:m] for buffer in sample.block.buffers)
    assert column.dtype == np.int64
    np.testing.assert_array_equal(found, 100 * row + column)
    np.testing.assert_array_equal(sigma, 1 + found)
    assert m == 128
    np.testing.assert_array_equal(np.sort(found) * 128 // size, np.arange(128))
    half = np.histogram(found[:64], 4, (0, size))[0]
    assert half.min() > 8  # the first points are a sample as well


def test_sample_leaves_out_what_is_masked_or_not_finite_and_makes_up_for_it():
    y, mask = Y.copy(), np.arange(N) % 10 != 0
    y[:100] = np.nan
    sample = points(X, y, 64, mask=mask, omit=True)
    assert sample.n_total == 290
    assert 55 <= sample.n_points <= 64
    assert np.isfinite(sample.block.buffers[0]).all()
    assert np.isin(sample.block.buffers[2], X[100::10]).all()


# ---------------------------------------------------------------- costs


@pytest.mark.slow
def test_costs_count_sigma_mask_and_loss_as_the_fit_does():
    sigma, mask = 0.2 + 0.1 * np.sin(X), np.arange(N) % 7 == 3
    y = Y + 20 * (np.arange(N) % 50 == 0)
    found = search_locally(y=y, sigma=sigma, mask=mask, loss="cauchy", f_scale=2.0)
    kept = dict(x=X[~mask], y=y[~mask], sigma=sigma[~mask], rho=np.log1p, f_scale=2.0)
    np.testing.assert_allclose(found.start_costs, [numpy_cost(p, **kept) for p in found.starts], rtol=1e-9)
    np.testing.assert_allclose(found.costs, [numpy_cost(p, **kept) for p in found.params], rtol=1e-9)
    np.testing.assert_allclose(abs(found.params[found.winner][1]), TRUTH[1], atol=0.01)


def test_costs_are_scaled_to_all_data(few_candidates):
    x = np.linspace(0, 10, 50_000)
    y = np.asarray(sine(x, *TRUTH)) + RNG.normal(0, 0.3, x.size)
    found = search_locally(x=x, y=y)
    assert found.n_points == 4096
    assert found.costs[found.winner] == pytest.approx(0.5 * 0.09 * x.size, rel=0.1)


@pytest.mark.slow
def test_a_jac_of_the_user_leads_to_the_same_optimum():
    def jac(x, a, f, phi, c):
        z = 2 * jnp.pi * f * x + phi
        return jnp.stack([jnp.sin(z), 2 * jnp.pi * x * a * jnp.cos(z), a * jnp.cos(z), jnp.ones_like(x)], axis=-1)

    problem = build_data(X, Y, check=True, omit=False)
    objective = Objective(intern(sine, jac))
    with open_sweep(problem) as sweep:
        found = search(objective, sweep.points(4096), P0, *FREE, 5)
    np.testing.assert_allclose(found.costs[found.winner], search_locally().costs.min(), rtol=1e-6)


@pytest.mark.slow
def test_correlated_noise_and_models_of_all_points_are_screened_on_all_points():
    x, y = X[::20], Y[::20]
    covariance = 0.09 * 0.5 ** abs(np.subtract.outer(np.arange(x.size), np.arange(x.size)))
    for problem in (
        whitened(replace(build_data(x, y, check=True, omit=False, whole=True), covariance=covariance)),
        build_data(x, y, check=True, omit=False, whole=True, mask=np.arange(x.size) % 9 == 0),
    ):
        objective = Objective(intern(sine))
        with open_sweep(problem) as sweep:
            found = search(objective, sweep.points(64), P0, *FREE, 4)
            solution, _ = polish(found, Evaluator(sweep, objective, 4), Options(*FREE))
        assert abs(solution.params[1]) == pytest.approx(TRUTH[1], abs=0.02)
        assert solution.equations.cost == pytest.approx(found.costs.min(), rel=1e-6)


def test_a_region_where_the_model_is_not_finite_is_left_out():
    def root(x, a, b):
        return a * jnp.sqrt(b - x)

    y = 2 * np.sqrt(11 - X)
    found = search_locally(root, y=y, p0=[1, 5], bounds=[[0, -50], [10, 50]], n_starts=40)
    assert found.start_costs[0] == np.inf
    assert found.basin[0] == -1
    np.testing.assert_allclose(found.params[found.winner], [2, 11], rtol=1e-4)
    with pytest.raises(ValueError, match="not finite at any of 1024 starts: set bounds"):
        search_locally(root, y=y, p0=[1, 5], bounds=[[0, 0], [10, 9]])


# ---------------------------------------------------------------- all data


@pytest.mark.slow
def test_one_sweep_decides_between_optima_that_the_sample_cannot_tell_apart(few_candidates):
    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, 400_000)
    y = -0.01 * x + 5 * rng.standard_normal(x.size)
    problem = build_data(x, y, check=True, omit=False)
    objective = Objective(intern(lambda x, b: 20 * (b**2 - 1) + 0.01 * b * x))
    bounds = np.array([-3.0]), np.array([3.0])
    with open_sweep(problem) as sweep:
        found = search(objective, sweep.points(4096), np.array([0.9]), *bounds, 5)
        assert len(found.chosen) == 2
        rivals = found._replace(chosen=tuple(sorted(found.chosen, key=lambda k: -found.params[k, 0])))
        assert rivals.params[rivals.chosen[0], 0] == pytest.approx(1, abs=0.1)
        evaluator = Evaluator(sweep, objective, 1)
        solution, settled = polish(rivals, evaluator, Options(*bounds))
        assert evaluator.count == solution.nfev  # the one for both rivals is the first of the winner's
    assert solution.params[0] == pytest.approx(-1, abs=0.01)
    assert settled.winner == rivals.chosen[1]


@pytest.mark.slow
@pytest.mark.parametrize("roots, found_of_them", [((-1, 0, 1), 3), ((-2, -1, 0, 1, 2), 4)])
def test_no_more_than_three_optima_are_compared_on_all_data(few_candidates, roots, found_of_them):
    """The model is a polynomial in b: of noise without a signal each of its roots is as good as the others."""
    x = np.linspace(0, 10, 400_000)
    y = 5 * np.random.default_rng(0).standard_normal(x.size)

    def model(x, b):
        return 20 * jnp.prod(b - jnp.array(roots)) + 0.01 * b * x

    found = search_locally(model, x, y, [0.9], ([-3.0], [3.0]), n_starts=20)
    assert found.basin.max() + 1 == found_of_them
    assert len(found.chosen) == 3 and found.winner == found.chosen[0] == np.argmin(found.costs)
    np.testing.assert_array_equal(found.basin[list(found.chosen)], [0, 1, 2])


def test_an_optimum_that_the_sample_knows_to_be_worse_is_not_compared_on_all_data(few_candidates):
    x = np.linspace(0, 10, 400_000)
    y = -0.5 * x + 5 * np.random.default_rng(0).standard_normal(x.size)
    found = search_locally(lambda x, b: 20 * (b**2 - 1) + 0.5 * b * x, x, y, [0.9], ([-3.0], [3.0]), n_starts=20)
    assert found.basin.max() == 1  # -1 is right, and 1 a minimum as well
    assert found.chosen == (found.winner,)
    np.testing.assert_allclose(found.params[found.winner], -1, atol=0.02)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 100.0])
def test_what_starts_at_zero_is_searched_on_the_scale_that_the_data_show(few_candidates, unit):
    x = np.linspace(0, 10, N)

    def peak(x, m):
        return 3 * jnp.exp(-0.5 * ((x - m) / unit) ** 2)

    y = np.asarray(peak(x * unit, 6 * unit)) + 0.1 * np.sin(99 * x)
    found = search_locally(peak, x * unit, y, [0.0], ([-np.inf], [np.inf]))
    np.testing.assert_allclose(found.params[found.winner] / unit, 6, atol=0.01)


def test_an_optimum_that_is_not_finite_on_all_data_gives_way_to_the_next(few_candidates):
    problem = build_data(X, Y, check=True, omit=False)
    objective = Objective(intern(sine))
    with open_sweep(problem) as sweep:
        found = search(objective, sweep.points(4096), P0, *FREE, 5)
        spoiled = found.params.copy()
        spoiled[found.winner] = np.nan
        evaluator = Evaluator(sweep, objective, 4)
        solution, settled = polish(found._replace(params=spoiled), evaluator, Options(*FREE))
        assert settled.winner != found.winner
        assert np.isfinite(solution.equations.cost)
        with pytest.raises(NotFiniteAtStart, match="at any of the"):
            polish(found._replace(params=np.full_like(spoiled, np.nan)), evaluator, Options(*FREE))


@pytest.mark.slow
def test_threads_and_processes_find_the_same(few_candidates):
    x = np.linspace(0, 10, 400_000)
    y = np.asarray(sine(x, *TRUTH)) + RNG.normal(0, 0.3, x.size)
    x, y = da.from_array(x, 30_000), da.from_array(y, 30_000)
    problem = build_data(x, y, check=True, omit=False)
    objective = Objective(intern(sine))
    answers = []

    def run(client):
        with open_sweep(problem, "standard" if client is None else "chunked", client, 4) as sweep:
            answers.append(search(objective, sweep.points(4096), P0, *FREE, 4))

    for n in (1, 2):
        with threads(n):
            run(None)
    with processes(2) as client, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph")
        run(client)
    assert equal(answers[0], answers[1])
    assert equal(answers[0], answers[2])
