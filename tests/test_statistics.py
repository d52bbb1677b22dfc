"""Statistics against lmfit, SciPy, and numbers worked out by hand."""

import inspect

import dask.array as da
import jax
import jax.numpy as jnp
import lmfit
import numpy as np
import pytest
import scipy.optimize
from scipy import stats

import dask_nlsq
from dask_nlsq.kernels.rules import at_bounds
from dask_nlsq.statistics import (
    Noise,
    Statistics,
    Totals,
    correlation,
    largest_correlations,
    quantile,
    root,
    statistics,
)
from tests.nist import ERRORS_IN_RESIDUALS, PROBLEMS, TIGHT

PLAIN = Noise("linear", False, False)
QUICK = {"Bennett5", "Hahn1", "Lanczos3", "MGH17", "Nelson", "Rat43"}  # nearly singular, of many parameters, of two x
COMPARED = [
    pytest.param(problem, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, problem in PROBLEMS.items()
    if name not in ERRORS_IN_RESIDUALS
]


def lmfit_result(problem, start, weights=None):
    """lmfit's result from ``start`` with exact derivatives, since forward differences have half of the digits only."""
    f, names = problem.model, list(inspect.signature(problem.model).parameters)[1:]

    def value(**given):
        with jax.enable_x64(True):
            return np.asarray(f(**given))

    value.__signature__ = inspect.signature(f)  # where lmfit finds the names
    columns = jax.jit(jax.jacfwd(lambda params: f(problem.x, *params)))

    def jacobian(params, y, weights=None, **_):
        with jax.enable_x64(True):
            J = np.array(columns(jnp.asarray([params[name].value for name in names])))  # lmfit writes into it
        return J if weights is None else J * weights[:, None]

    model = lmfit.Model(value, ["x"], names)
    options = dict(Dfun=jacobian, ftol=1e-15, xtol=1e-15, gtol=1e-15)
    start = model.make_params(**dict(zip(names, start, strict=True)))
    return model.fit(problem.y, start, x=problem.x, weights=weights, fit_kws=options, max_nfev=100_000)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("problem", COMPARED)
def test_statistics_are_those_of_lmfit(problem, weighted):
    sigma = np.random.default_rng(0).uniform(0.5, 2, problem.y.size) if weighted else None
    found = dask_nlsq.curve_fit(problem.model, problem.x, problem.y, p0=problem.starts[1], sigma=sigma, **TIGHT)
    theirs = lmfit_result(problem, found.popt, None if sigma is None else 1 / sigma)
    assert (found.dof, found.n_points) == (theirs.nfree, theirs.ndata)
    for ours, name in [
        (found.chi_square, "chisqr"),
        (found.reduced_chi_square, "redchi"),
        (found.aic, "aic"),
        (found.bic, "bic"),
    ]:
        assert ours == pytest.approx(getattr(theirs, name), rel=1e-6), name
    if not weighted:  # lmfit's has no weights
        assert 1 - found.r_squared == pytest.approx(1 - theirs.rsquared, rel=1e-6, abs=1e-14)
    errors = np.sqrt(np.diag(theirs.covar))
    np.testing.assert_allclose(found.correlation, theirs.covar / np.outer(errors, errors), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.perr, errors, rtol=1e-6)


@pytest.fixture(scope="module")
def weighted_data():
    rng = np.random.default_rng(0)
    x = np.linspace(0, 5, 300)
    sigma = rng.uniform(0.02, 0.1, x.size)
    return x, 2 * np.exp(-0.7 * x) + 0.5 + sigma * rng.standard_normal(x.size), sigma


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


@pytest.mark.parametrize("chunks, absolute", [(None, True), (70, False)])
def test_statistics_of_weighted_data_follow_their_formulas(weighted_data, chunks, absolute):
    x, y, sigma = weighted_data
    arrays = weighted_data if chunks is None else [da.from_array(each, chunks=chunks) for each in weighted_data]
    mask = x > 4
    found = dask_nlsq.curve_fit(
        decay, *arrays[:2], p0=[1, 1, 0], sigma=arrays[2], absolute_sigma=absolute, mask=mask, ftol=1e-15, xtol=1e-15
    )
    popt, pcov = scipy.optimize.curve_fit(
        lambda x, a, b, c: a * np.exp(-b * x) + c,
        x[~mask],
        y[~mask],
        [1, 1, 0],
        sigma=sigma[~mask],
        absolute_sigma=absolute,
        ftol=1e-15,
    )
    y, w, model = y[~mask], sigma[~mask] ** -2.0, popt[0] * np.exp(-popt[1] * x[~mask]) + popt[2]
    n, k = y.size, 3
    chi_square = np.sum(w * (y - model) ** 2)
    r_squared = 1 - chi_square / np.sum(w * (y - np.average(y, weights=w)) ** 2)
    aic = n * np.log(chi_square / n) + 2 * k
    expected = dict(
        chi_square=chi_square,
        dof=n - k,
        reduced_chi_square=chi_square / (n - k),
        r_squared=r_squared,
        adjusted_r_squared=1 - (1 - r_squared) * (n - 1) / (n - k),
        rmse=np.sqrt(np.average((y - model) ** 2, weights=w)),
        aic=aic,
        aicc=aic + 2 * k * (k + 1) / (n - k - 1),
        bic=n * np.log(chi_square / n) + k * np.log(n),
    )
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    q = (stats.norm if absolute else stats.t(n - k)).ppf(0.975)
    half = q * np.sqrt(np.diag(pcov))
    np.testing.assert_allclose(found.confidence_intervals(), np.stack([popt - half, popt + half], 1), rtol=1e-4)


@pytest.mark.slow
def test_statistics_of_counts_are_those_of_the_deviance():
    x = np.linspace(0, 5, 300)
    y = np.random.default_rng(0).poisson(4 * np.exp(-0.7 * x) + 0.5)
    found = dask_nlsq.curve_fit(decay, x, y, p0=[1, 1, 1], loss="poisson")
    deviance = np.sum(found.residuals() ** 2)
    assert found.chi_square == pytest.approx(deviance)
    assert found.aic == pytest.approx(deviance + 2 * 3)
    assert found.aicc == pytest.approx(deviance + 2 * 3 + 24 / 296)
    assert found.bic == pytest.approx(deviance + 3 * np.log(300))
    half = np.diff(found.confidence_intervals(0.6827), axis=1)[:, 0] / 2
    np.testing.assert_allclose(half, found.perr, rtol=1e-4)
    # a difference of AIC is one of log likelihoods
    flat = dask_nlsq.curve_fit(lambda x, c: c + 0 * x, x, y, p0=[1], loss="poisson")
    mean = [np.asarray(each.predict()) for each in (found, flat)]
    likelihoods = [np.sum(stats.poisson.logpmf(y, each)) for each in mean]
    assert found.aic - flat.aic == pytest.approx(-2 * (likelihoods[0] - likelihoods[1]) + 2 * (3 - 1))


@pytest.mark.parametrize(
    "options, missing",
    [
        (dict(loss="huber"), {*Statistics._fields} - {"dof"}),
        (dict(loss="poisson"), {"r_squared", "adjusted_r_squared", "rmse"}),
        (dict(sigma="poisson"), {"r_squared", "adjusted_r_squared", "rmse", "aic", "aicc", "bic"}),
    ],
)
def test_statistics_that_do_not_exist_are_nan(options, missing):
    x = np.linspace(0, 5, 300)
    y = np.random.default_rng(0).poisson(4 * np.exp(-0.7 * x) + 0.5)
    found = dask_nlsq.curve_fit(decay, x, y, p0=[1, 1, 1], **options)
    assert {name for name, value in found.statistics._asdict().items() if np.isnan(value)} == missing


def test_statistics_by_hand():
    """y = 1, 2, 3, 6 with the mean 3 as model: X = 4 + 1 + 0 + 9."""
    found = statistics(Totals(7.0, 4, 4.0, 12.0, 50.0), 1, PLAIN)
    assert found.chi_square == 14 and found.dof == 3 and found.reduced_chi_square == pytest.approx(14 / 3)
    assert found.r_squared == 0 and found.adjusted_r_squared == 0
    assert found.rmse == pytest.approx(3.5**0.5)
    assert found.aic == pytest.approx(4 * np.log(3.5) + 2) and found.aicc == pytest.approx(found.aic + 4 / 2)


def test_without_degrees_of_freedom_or_spread_nothing_is_made_up():
    found = statistics(Totals(0.0, 2, 2.0, 2e8, 2e16), 2, PLAIN)
    assert found.chi_square == 0 and found.rmse == 0
    assert np.isnan([found.reduced_chi_square, found.r_squared, found.adjusted_r_squared, found.aic, found.aicc]).all()
    assert np.isnan(quantile(0.95, 0, PLAIN))


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, np.nan, True, "95 %"])
def test_a_level_is_a_probability(level):
    with pytest.raises(ValueError, match="`level` must be a probability"):
        quantile(level, 10, PLAIN)


def test_quantiles_are_of_student_where_the_noise_was_estimated():
    assert quantile(0.95, 2, PLAIN) == pytest.approx(4.302653, rel=1e-6)
    assert quantile(0.95, 2, PLAIN._replace(absolute=True)) == pytest.approx(1.959964, rel=1e-6)


def test_correlations_are_nan_where_a_parameter_is_held_or_not_determined():
    pcov = np.array([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    found = correlation(pcov)
    np.testing.assert_array_equal(found, [[1, -0.5, np.nan], [-0.5, 1, np.nan], [np.nan] * 3])
    assert largest_correlations(found, 5) == [(1, 0, -0.5)]
    assert np.isnan(correlation(np.full((2, 2), np.inf))).all()


def test_the_root_of_a_covariance_gives_it_back_whatever_the_units():
    pcov = np.array([[4e-20, -3e-8, 0.0], [-3e-8, 9e4, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(root(pcov) @ root(pcov).T, pcov, rtol=1e-12)


INF = np.inf
AT_BOUNDS = {  # value, error, lower, upper, place
    "nearer than a hundredth of the error": (1e-12, 1e-3, 0, 1, -1),
    "farther": (1e-12, 1e-13, 0, 1, 0),
    "exactly, without an error": (5, 0, 0, 5, 1),
    "not determined, half-open": (5, INF, 0, INF, 0),
    "not determined, in the middle": (5, INF, 4, 6, 0),
    "not determined, at an end": (5.9999, INF, 4, 6, 1),
    "an error that tells nothing, in the middle": (5.0, 1e12, 4, 6, 0),
    "an error that tells nothing, at the end": (6.0, 1e12, 4, 6, 1),
    "an error that tells nothing, half-open": (6.0, 1e12, 4, INF, 0),
    "an error that tells nothing, from above": (-6.0, 1e12, -INF, -4, 0),
    "half-open": (1e-12, 1e-3, 0, INF, -1),
    "half-open, far below the error": (1e-25, 1e-3, 0, INF, -1),
    "half-open, just above 0": (1.1e-8, 1e-3, 1e-9, INF, -1),
    "small units": (5e-9, 1.4e-11, 0, INF, 0),
    "small units at the bound": (1e-20, 1.4e-11, 0, INF, -1),
    "a large offset": (2457000.5, 0.001, 2457000, INF, 0),
    "a large offset at the bound": (2457000 + 1e-9, 0.001, 2457000, INF, -1),
    "no bounds": (1.0, 1e12, -INF, INF, 0),
    "a wide interval": (5.0, 0.1, 0, 1e6, 0),
    "no value": (np.nan, np.nan, 0, 1, 0),
    "an error that is nan": (1e-12, np.nan, 0, 1, 0),
    "held outside of its bounds": (0.3, 0.0, 5, 9, 0),
    "the middle of a tiny interval": (1.0, 1.0, 1 - 1e-9, 1 + 1e-9, 0),
    "the end of a tiny interval": (1.0 + 1e-9, 1.0, 1 - 1e-9, 1 + 1e-9, 1),
}


@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e9])
def test_a_parameter_is_at_the_nearer_bound_if_at_any_in_all_units(unit):
    *columns, places = np.array([*AT_BOUNDS.values()], dtype=float).T
    found = at_bounds(*(unit * column for column in columns))
    wrong = {name: place for name, place in zip(AT_BOUNDS, found - places, strict=True) if place}
    assert not wrong and found.dtype == np.int8


def test_fits_and_maps_take_the_same_places_at_bounds():
    *columns, places = np.array([*AT_BOUNDS.values()], dtype=float).T
    with jax.enable_x64(True):
        found = jax.jit(at_bounds)(*map(jnp.asarray, columns))
        assert found.dtype == jnp.int8
        np.testing.assert_array_equal(found, places)


def test_the_place_of_a_peak_without_height_is_at_the_bound_where_it_ends():
    x, y = np.linspace(0, 10, 200), -abs(0.01 * np.random.default_rng(0).normal(size=200))
    found = dask_nlsq.curve_fit(
        lambda x, a, c: a * jnp.exp(-((x - c) ** 2)), x, y, [1, 5.99], bounds=([0, 4], [3, 6])
    )  # a ends at 0, c near 6 with an error of 1e8
    end = 1 if found.popt[1] > 5 else -1
    assert found.perr[1] > 1e6 and abs(found.popt[1] - 5 - end) < 1e-3
    assert found.at_bound.tolist() == [-1, end]
