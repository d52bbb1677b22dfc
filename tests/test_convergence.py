"""Converged means converged: fits that once said success far from an optimum, each with its right answer.

The sets that `python -m tests.convergence` prints figures of are larger; here are their quick forms and single cases.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from scipy.optimize import OptimizeWarning, minimize

import dask_nlsq
import dask_nlsq.accessor
from dask_nlsq.interface.cli import nlsq
from dask_nlsq.kernels.lanes import MapStatus
from tests.convergence import exact, mgh, poisson
from tests.convergence.distance import FAR, cosine, distance
from tests.convergence.outcomes import Outcome, by_scipy, cost, fitted, fitted_map, jacobian, values

X = np.linspace(0.1, 5, 200)
SAME_COST = 1e-6  # relative


# ---------------------------------------------------------------------------------------------------------------------
# models and data


def exponential(x, a, b):
    return a * jnp.exp(-b * x)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def growth(x, a, b, c):
    return a * jnp.exp(b * x) + c


def gaussian(x, h, m, w):
    return h * jnp.exp(-0.5 * ((x - m) / w) ** 2)


def gaussian_on_line(x, h, m, w, c, d):
    return gaussian(x, h, m, w) + c + d * x


def gaussian_on_constant(x, h, m, w, c):
    return gaussian(x, h, m, w) + c


def sine(x, a, f, phi):
    return a * jnp.sin(2 * jnp.pi * f * x + phi)


def lorentzian(x, h, m, w):
    return h / (1 + ((x - m) / w) ** 2)


def power(x, a, b):
    return a * x**b


def logistic(x, h, m, w):
    return h / (1 + jnp.exp(-(x - m) / w))


def michaelis_menten(x, v, k):
    return v * x / (k + x)


def dip(t, depth, m, w, c):
    return c - depth * jnp.exp(-0.5 * ((t - m) / w) ** 2)


def line(x, slope, intercept):
    return slope * x + intercept


def quadratic(x, a, b, c):
    return a + b * x + c * x**2


def cubic(x, a, b, c, d):
    return a + b * x + c * x**2 + d * x**3


def step(x, position, low, high):
    return jnp.where(x < position, low, high)


def shifted_exponential(x, a, b, shift):
    return a * jnp.exp(-b * (x + shift))


def constant(x, level):
    return level * jnp.ones_like(x)


def noisy(f, x, truth, noise, seed=0):
    """(n,)"""
    return values(f, x, truth) + noise * np.random.default_rng(seed).standard_normal(len(x))


def far(f, x, y, params, bounds=None) -> float:
    """From the stationary point of the quadratic model, in standard errors."""
    return distance(jacobian(f, x, params), values(f, x, params) - y, params, bounds)


def at_the_optimum(f, x, y, params, truth) -> bool:
    least = cost(f, x, y, by_scipy("lm", f, x, y, truth))
    return far(f, x, y, params) <= FAR and cost(f, x, y, params) <= least * (1 + SAME_COST)


def stationary_or_warned(f, x, y, outcome: Outcome) -> bool:
    return bool(outcome.warned) or not outcome.success or far(f, x, y, outcome.params) <= FAR


def store(path, values, chunk) -> str:
    zarr.create_array(path, shape=values.shape, dtype=values.dtype, chunks=(chunk,))[...] = values
    return str(path)


def from_command_line(*arguments) -> np.ndarray:
    """The values of the parameters that it prints."""
    outcome = CliRunner().invoke(nlsq, ["fit", *map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    return np.array([float(each) for each in re.findall(r"^  \w+ +(\S+) +\+-", outcome.stdout, re.M)])


# ---------------------------------------------------------------------------------------------------------------------
# starts with zeros

ZERO_AMPLITUDES = {
    "exponential": (exponential, [3, 1.3], [0, 1]),
    "Gaussian": (gaussian, [3, 2.5, 0.5], [0, 2.3, 0.6]),
    "Gaussian on a line": (gaussian_on_line, [3, 2.5, 0.5, 1, 0.3], [0, 2.3, 0.6, 0, 0]),
    "sine": (sine, [3, 0.7, 0.4], [0, 0.68, 0.3]),
    "Lorentzian": (lorentzian, [3, 2.5, 0.5], [0, 2.3, 0.6]),
    "power law": (power, [3, 1.5], [0, 1]),
    "logistic": (logistic, [3, 2.5, 0.5], [0, 2.3, 0.6]),
    "Michaelis-Menten": (michaelis_menten, [3, 1], [0, 2]),
}
QUICK = ("exponential", "Gaussian on a line", "sine", "power law")
QUICK_IN_MAPS = ("Gaussian on a line",)


def of_zero_amplitude(quick):
    cases = [pytest.param(*c, id=k, marks=() if k in quick else pytest.mark.slow) for k, c in ZERO_AMPLITUDES.items()]
    return pytest.mark.parametrize("f, truth, p0", cases)


REDUCTIONS = pytest.mark.parametrize("reduction", ["auto", "gram", "qr"])
WAYS = pytest.mark.parametrize(
    "strategy, reduction", [("standard", "auto"), ("chunked", "gram"), ("chunked", "qr"), ("streaming", "auto")]
)


@of_zero_amplitude(QUICK)
def test_an_amplitude_that_starts_at_zero_is_fitted(f, truth, p0):
    y = noisy(f, X, truth, 0.01)
    found = dask_nlsq.curve_fit(f, X, y, p0)
    assert found.success and at_the_optimum(f, X, y, found.popt, truth)


@pytest.mark.slow
@of_zero_amplitude(QUICK_IN_MAPS)
def test_an_amplitude_that_starts_at_zero_is_fitted_in_maps(f, truth, p0):
    y = np.stack([noisy(f, X, truth, 0.01, seed) for seed in range(3)])
    found = dask_nlsq.fit_map(f, X, y, p0).compute()
    assert found.success.all()
    assert all(at_the_optimum(f, X, y[k], found.popt[k], truth) for k in range(3))


@WAYS
def test_an_amplitude_that_starts_at_zero_is_fitted_in_stores(tmp_path, strategy, reduction):
    y = noisy(exponential, X, [3, 1.3], 0.01)
    x, data = store(tmp_path / "x.zarr", X, 50), store(tmp_path / "y.zarr", y, 50)
    if strategy == "standard":
        x, data = X, y
    found = dask_nlsq.curve_fit(exponential, x, data, [0, 1], strategy=strategy, reduction=reduction)
    np.testing.assert_allclose(found.popt, [2.996, 1.297], atol=1e-3)
    assert found.success and at_the_optimum(exponential, X, y, found.popt, [3, 1.3])


@pytest.mark.slow
def test_an_amplitude_that_starts_at_zero_is_fitted_by_the_accessor():
    y = xr.DataArray(noisy(exponential, X, [3, 1.3], 0.01), coords={"x": X})
    several = xr.concat([y, y], "pixel")
    for each in (y, several):
        found = each.nlsq.curvefit("x", exponential, p0={"a": 0, "b": 1}).curvefit_coefficients
        np.testing.assert_allclose(found, np.broadcast_to([2.996, 1.297], found.shape), atol=1e-3)


def test_an_amplitude_that_starts_at_zero_is_fitted_from_the_command_line(tmp_path):
    data = store(tmp_path / "y.zarr", noisy(exponential, X, [3, 1.3], 0.01), 50)
    x = store(tmp_path / "x.zarr", X, 50)
    found = from_command_line(data, "--model", "exponential", "--x", x, "--p0", "amplitude=0,rate=1")
    np.testing.assert_allclose(found, [2.996, 1.297], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# scales and units

DATES = 2_457_000.5 + np.linspace(0, 1, 400)
DIP = np.array([0.01, DATES[0] + 0.43, 0.03, 1])
DIP_START = [0.02, DATES[0] + 0.45, 0.05, 1]


@pytest.fixture(scope="module")
def dimmed():
    return noisy(dip, DATES, DIP, 1e-4)


@WAYS
def test_a_center_with_a_large_offset_does_not_hide_the_width(dimmed, tmp_path, strategy, reduction):
    t, y = DATES, dimmed
    if strategy != "standard":
        t, y = store(tmp_path / "t.zarr", DATES, 100), store(tmp_path / "y.zarr", dimmed, 100)
    found = dask_nlsq.curve_fit(dip, t, y, DIP_START, strategy=strategy, reduction=reduction)
    assert found.popt[2] == pytest.approx(0.0302, abs=1e-4)
    assert found.success and at_the_optimum(dip, DATES, dimmed, found.popt, DIP)


@pytest.mark.slow
def test_a_center_with_a_large_offset_does_not_hide_the_width_in_maps(dimmed):
    found = dask_nlsq.fit_map(dip, DATES, np.stack([dimmed, dimmed]), DIP_START).compute()
    assert found.success.all()
    assert all(at_the_optimum(dip, DATES, dimmed, each, DIP) for each in found.popt)


@pytest.mark.slow
def test_a_center_with_a_large_offset_does_not_hide_the_width_from_the_accessor(dimmed):
    y = xr.DataArray(dimmed, coords={"t": DATES})
    p0 = dict(zip(("depth", "m", "w", "c"), DIP_START, strict=True))
    for each in (y, xr.concat([y, y], "pixel")):
        found = each.nlsq.curvefit("t", dip, p0=p0).curvefit_coefficients
        widths = found.sel(param="w").values
        np.testing.assert_allclose(widths, 0.0302, atol=1e-4)


def test_a_center_with_a_large_offset_does_not_hide_the_width_on_the_command_line(dimmed, tmp_path):
    data, t = store(tmp_path / "y.zarr", dimmed, 100), store(tmp_path / "t.zarr", DATES, 100)
    p0 = f"gaussian_amplitude=-0.02,gaussian_center={DIP_START[1]},gaussian_width=0.05,polynomial_c0=1"
    found = from_command_line(data, "--model", "gaussian+polynomial:0", "--x", t, "--p0", p0)
    assert found[2] == pytest.approx(0.0302, abs=1e-4)


@REDUCTIONS
def test_a_direction_is_not_dropped_by_the_scale_of_an_earlier_point(reduction):
    x = np.linspace(0, 30, 200)
    y = noisy(growth, x, [2, 0.05, 1], 0.02)
    found = dask_nlsq.curve_fit(growth, x, y, [1, 1, 1], reduction=reduction)
    assert found.cost == pytest.approx(0.04, rel=0.2)
    assert found.success and at_the_optimum(growth, x, y, found.popt, [2, 0.05, 1])


@REDUCTIONS
def test_a_direction_is_not_dropped_by_the_scale_of_the_user(reduction):
    x, truth = np.linspace(0, 8, 200), [1e9, 0.7, 0.2e9]
    y = noisy(decay, x, truth, 1e7)
    found = dask_nlsq.curve_fit(decay, x, y, [0.7e9, 0.5, 0.3e9], x_scale=1.0, reduction=reduction)
    assert found.cost == pytest.approx(0.01e18, rel=0.2)
    assert found.success and at_the_optimum(decay, x, y, found.popt, truth)


@pytest.mark.parametrize("unit", [1e-13, 1e-8, 1.0])
def test_the_default_start_serves_small_units_of_y(unit):
    x, truth = np.linspace(0, 5, 200), np.array([3, 1.3, 0.5])
    y = unit * noisy(decay, x, truth, 0.01)
    found = dask_nlsq.curve_fit(decay, x, y)
    assert found.popt[1] == pytest.approx(1.3, abs=0.02)
    assert found.success and at_the_optimum(decay, x, y, found.popt, truth * [unit, 1, unit])


@pytest.mark.parametrize("unit", [1e8, 1e13])
def test_the_default_start_ends_at_a_stationary_point_in_large_units_of_y(unit):
    """SciPy's "lm" finds the optimum from there in neither."""
    x = np.linspace(0, 5, 200)
    y = unit * noisy(decay, x, [3, 1.3, 0.5], 0.01)
    assert stationary_or_warned(decay, x, y, fitted(decay, x, y, None))


@pytest.mark.parametrize("unit", [1e-6, 1e-12])
def test_bounds_do_not_stop_fits_in_small_units(unit):
    x, truth, p0 = np.linspace(0, 5, 200), np.array([3, 1.3, 0.5]), np.array([2, 1, 0.3])
    y, units = unit * noisy(decay, x, truth, 0.01), np.array([unit, 1, unit])
    found = dask_nlsq.curve_fit(decay, x, y, p0 * units, bounds=(0, 10 * units))
    assert found.success and at_the_optimum(decay, x, y, found.popt, truth * units)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-12, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_bounds_do_not_stop_maps_in_small_units(unit):
    x, truth, p0 = np.linspace(0, 5, 200), np.array([3, 1.3, 0.5]), np.array([2, 1, 0.3])
    y, units = unit * noisy(decay, x, truth, 0.01), np.array([unit, 1, unit])
    found = dask_nlsq.fit_map(decay, x, y[None], p0 * units, bounds=(np.zeros(3), 10 * units)).compute()
    assert found.success.all() and at_the_optimum(decay, x, y, found.popt[0], truth * units)


def test_a_start_within_small_bounds_is_kept():
    """It is not taken for one on its bounds."""
    x, p0 = np.linspace(0, 5, 200), np.array([2e-12, 1, 0.3e-12])
    y = 1e-12 * noisy(decay, x, [3, 1.3, 0.5], 0.01)
    starts = []
    dask_nlsq.curve_fit(decay, x, y, p0, bounds=(0, [1e-11, 10, 1e-11]), callback=lambda each: starts.append(each.params))
    np.testing.assert_allclose(starts[0], p0, rtol=1e-6)


@pytest.mark.slow
def test_a_parameter_in_a_small_unit_is_not_taken_for_one_at_its_bound():
    y = noisy(constant, X, [5e-9], 2e-10)
    found = dask_nlsq.fit_map(constant, X, y[None], [1e-9], bounds=([0], [np.inf])).compute()
    assert found.success.all() and (found.status != MapStatus.AT_BOUND).all() and not found.at_bound.any()
    assert found.popt[0, 0] == pytest.approx(np.mean(y), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# steps that are short for another reason than being near


def test_a_line_is_found_from_a_start_next_to_zero():
    x = np.linspace(0, 5, 200)
    for noise in (0, 0.01):
        y = noisy(line, x, [2, 3], noise)
        found = dask_nlsq.curve_fit(line, x, y, [1e-9, 1e-9])
        assert found.success
        np.testing.assert_allclose(found.popt, [2, 3], atol=max(0.5 * noise, 1e-7))


def test_ones_are_a_start_for_a_line_of_1e9():
    y = noisy(line, X, [2e9, 3e9], 1e7)
    found = dask_nlsq.curve_fit(line, X, y, [1, 1])
    assert found.success and at_the_optimum(line, X, y, found.popt, [2e9, 3e9])


@pytest.mark.parametrize("f, truth", [(exponential, [3e9, 1.3]), (decay, [3e9, 1.3, 1e9])])
def test_a_fit_of_1e9_from_ones_ends_at_a_stationary_point_or_warns(f, truth):
    y = noisy(f, X, truth, 1e7)
    assert stationary_or_warned(f, X, y, fitted(f, X, y, np.ones(len(truth))))


def test_a_fit_that_refuses_nearly_all_steps_arrives_or_warns():
    """A growth that a decay is to describe: SciPy does not arrive either."""
    x = np.linspace(36, 72, 200)
    y = noisy(decay, x, [2, -0.1, 0], 0)
    assert stationary_or_warned(decay, x, y, fitted(decay, x, y, [1, 1, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("half", [1, 5])
def test_a_cubic_far_from_the_origin_is_found_from_zeros(half):
    """Its columns are nearly parallel: the cosine between them and the residual is small all the way to the optimum."""
    x, truth = np.linspace(100 - half, 100 + half, 200), [1000, -30, 0.3, -0.001]
    y = noisy(cubic, x, truth, 1.0)
    found = dask_nlsq.curve_fit(cubic, x, y, np.zeros(4))
    assert found.success and far(cubic, x, y, found.popt) <= FAR


@pytest.mark.slow
def test_the_place_of_a_step_is_named_as_undetermined():
    x = np.arange(1000.0)
    y = noisy(step, x, [300, 1, 2], 0.1)
    with pytest.warns(OptimizeWarning, match="position"):
        found = dask_nlsq.curve_fit(step, x, y, [500, 0, 0])
    assert not found.success and found.perr[0] == np.inf


@pytest.mark.parametrize("strategy", ["standard", "chunked"])
def test_a_jac_of_the_wrong_sign_is_refused(strategy):
    def wrong(x, a, b):
        return -jnp.stack([jnp.exp(-b * x), -a * x * jnp.exp(-b * x)], axis=-1)

    y = noisy(exponential, X, [3, 1.3], 0.01)
    with pytest.raises(ValueError, match="jac"):
        dask_nlsq.curve_fit(exponential, X, y, [1, 1], jac=wrong, strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name, reduction", [("Beale", "auto"), ("Bard", "qr"), ("Bard", "gram")])
def test_a_minimum_at_infinity_is_approached_or_warned_of(name, reduction):
    problem = mgh.PROBLEMS[name]
    names = [f"x{k}" for k in range(len(problem.start))]
    p0 = problem.times(10)
    outcome = fitted(problem.model, problem.x, problem.data, p0, param_names=names, reduction=reduction, max_nfev=2000)
    assert mgh.at_a_known_minimum(problem, outcome.params) or not outcome.silent


# ---------------------------------------------------------------------------------------------------------------------
# streaming


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_peak_that_the_sample_misses_keeps_its_start(tmp_path, level):
    n, truth = 2_400_000, [5, 40.3, 0.3, level]
    x = np.linspace(0, 100, n)
    y = noisy(gaussian_on_constant, x, truth, 0.1)
    x_path, y_path = store(tmp_path / "x.zarr", x, n // 24), store(tmp_path / "y.zarr", y, n // 24)
    found = dask_nlsq.curve_fit(gaussian_on_constant, x_path, y_path, [4, 40.5, 0.4, 0.5], strategy="streaming")
    assert found.success
    np.testing.assert_allclose(found.popt, truth, rtol=0.01, atol=0.001)


# ---------------------------------------------------------------------------------------------------------------------
# pixels that are degenerate


@pytest.mark.slow
@pytest.mark.parametrize("offset", [pytest.param(300, marks=pytest.mark.slow), 3000])
def test_a_pixel_of_large_condition_is_converged_or_no_success(offset):
    x = offset + np.linspace(0, 1, 50)
    u = x - offset
    rng = np.random.default_rng(0)
    y = rng.uniform(-1, 1, (50, 1)) + rng.uniform(-1, 1, (50, 1)) * u + u**2 + 0.01 * rng.standard_normal((50, 50))
    outcomes = fitted_map(quadratic, x, y, np.ones((50, 3)))
    off = [far(quadratic, x, each, o.params) for each, o in zip(y, outcomes, strict=True) if o.success]
    assert not off or max(off) <= FAR


@pytest.mark.slow
def test_no_pixel_has_finite_errors_where_parameters_are_degenerate():
    x = np.linspace(0, 5, 60)
    rng = np.random.default_rng(0)
    y = rng.uniform(1, 5, (500, 1)) * np.exp(-rng.uniform(0.5, 2, (500, 1)) * x) + 0.01 * rng.standard_normal((500, 60))
    found = dask_nlsq.fit_map(shifted_exponential, x, y, [1, 1, 0]).compute()
    assert not np.isfinite(found.perr[:, [0, 2]]).any()


# ---------------------------------------------------------------------------------------------------------------------
# counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, way",
    [
        *(pytest.param(0, way, id=f"starts-{way}") for way in poisson.WAYS),
        *(pytest.param(27, way, id=f"seeds-{way}", marks=pytest.mark.slow) for way in poisson.WAYS),
    ],
)
def test_no_step_into_a_negative_mean_traps_a_fit(way, first):
    cases = poisson.problems()[first : first + 27 : 3]
    outcomes = poisson.WAYS[way](cases)
    from_truth = poisson.WAYS["curve_fit"]([each._replace(p0=poisson.TRUTH) for each in cases])
    off = poisson.deviances(cases, outcomes) > poisson.deviances(cases, from_truth) + poisson.OFF
    assert not [case.label for case, outcome, far in zip(cases, outcomes, off, strict=True) if far and outcome.silent]


def test_the_named_poisson_fit_reaches_the_optimum():
    found = dask_nlsq.curve_fit(poisson.peak, poisson.X, poisson.counts(0), poisson.START, loss="poisson")
    assert found.cost == pytest.approx(200, rel=0.2)


def counts_of_a_falling_line():
    x = np.linspace(0, 10, 300)
    return x, np.random.default_rng(0).poisson(np.maximum(5 - x, 0)).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["likelihood", "reweighted", "map"])
def test_a_line_of_counts_that_reaches_zero_ends_at_the_likeliest(way):
    x, y = counts_of_a_falling_line()

    def likelihood(params):
        return poisson.half_deviance(y, params[0] * x + params[1])

    options = dict(xatol=1e-9, fatol=1e-10, maxiter=5000, maxfev=9999)
    starts = ([-1, 5], [-0.7, 5], [-0.9, 5.2])
    least = min(minimize(likelihood, p0, method="Nelder-Mead", options=options).fun for p0 in starts)
    if way == "map":
        (outcome,) = fitted_map(line, x, y[None], np.array([[-0.9, 5]]), loss="poisson")
    else:
        outcome = fitted(line, x, y, [-0.9, 5], **({"loss": "poisson"} if way == "likelihood" else {"sigma": "poisson"}))
    assert likelihood(outcome.params) <= least + 0.1


# ---------------------------------------------------------------------------------------------------------------------
# the measures themselves


def test_distance_is_the_length_of_the_step_in_standard_errors():
    """s2 = 169 / (3 - 2); the residual within the columns is (3, 4), each with the standard error 13."""
    J, r = np.array([[1.0, 0], [0, 1], [0, 0]]), np.array([3.0, 4, 12])
    assert distance(J, r) == pytest.approx(5 / 13)
    assert distance(J * [1e-9, 1e9], r) == pytest.approx(5 / 13)


def test_distance_leaves_out_what_a_bound_holds():
    """The step is (-3, -4): the first parameter is at its lower bound, the second may go half way."""
    J, r, at = np.array([[1.0, 0], [0, 1], [0, 0]]), np.array([3.0, 4, 12]), np.array([1.0, 2])
    assert distance(J, r, at, ([1, -np.inf], [np.inf, np.inf])) == pytest.approx(4 / 13)
    assert distance(J, r, at, ([1, 0], [9, 9])) == pytest.approx(np.sqrt(16 - 4) / 13)  # 1/2 (4^2 - 2^2) is gained
    assert distance(J, r, at, ([1, 2], [9, 9])) == 0


def test_cosine_is_the_largest():
    assert cosine(np.array([[1.0, 1], [0, 1]]), np.array([3.0, 4])) == pytest.approx(7 / (5 * 2**0.5))


@pytest.mark.parametrize("name", mgh.PROBLEMS)
def test_problems_have_the_sums_of_squares_of_the_paper(name):
    problem = mgh.PROBLEMS[name]
    assert mgh.sum_of_squares(problem, problem.times(1)) == pytest.approx(problem.at_start, rel=1e-5)
    assert mgh.at_a_known_minimum(problem, by_scipy("lm", problem.model, problem.x, problem.data, problem.times(1)))


def test_models_for_exact_data_are_forty():
    assert len(exact.CASES) == 40


SOME = ("constant", "two Gaussians", "g2, single", "decay in units of 1e9")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in [*exact.CASES][::5]]
)
def test_exact_data_converge_to_the_exact_parameters(name):
    case = exact.CASES[name]
    found = dask_nlsq.curve_fit(case.f, case.x, values(case.f, case.x, case.truth), exact.start(case))
    assert found.success
    np.testing.assert_allclose(found.popt, case.truth, rtol=exact.DIGITS)


@pytest.mark.parametrize("multiple", [pytest.param(1, marks=pytest.mark.slow), 10])
@pytest.mark.parametrize("name", ["Helical valley", "Meyer", "Kowalik and Osborne"])
def test_standard_problems_end_at_a_known_minimum(name, multiple):
    problem = mgh.PROBLEMS[name]
    names = [f"x{k}" for k in range(len(problem.start))]
    outcome = fitted(problem.model, problem.x, problem.data, problem.times(multiple), param_names=names, max_nfev=2000)
    assert mgh.at_a_known_minimum(problem, outcome.params)
