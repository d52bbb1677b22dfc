"""Counts: the likelihood of Poisson's distribution, and weights from the model."""

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import OptimizeWarning, minimize

import dask_nlsq
from dask_nlsq.kernels.lanes import MapStatus

X = np.linspace(0, 10, 4000)
TRUTH = np.array([4.0, 0.5, 0.3])


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def mean(params):
    return params[0] * np.exp(-params[1] * X) + params[2]


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(0).poisson(mean(TRUTH))


@pytest.fixture(scope="module")
def likeliest(counts):
    """The maximum of the likelihood by another method."""

    def cost(params):
        return np.sum(mean(params) - counts * np.log(mean(params)))

    found = minimize(cost, TRUTH, method="Nelder-Mead", options=dict(xatol=1e-10, fatol=1e-10, maxiter=5000, maxfev=9999))
    return found.x


def information(params):
    columns = np.stack([np.exp(-params[1] * X), -params[0] * X * np.exp(-params[1] * X), np.ones_like(X)])
    return np.linalg.inv(columns / mean(params) @ columns.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, chunks, reduction",
    [("standard", None, "gram"), ("chunked", 1000, "gram"), ("chunked", 1000, "qr"), ("streaming", 700, "gram")],
)
def test_the_likelihood_has_its_maximum_whatever_the_chunks(counts, likeliest, strategy, chunks, reduction):
    x, y = (X, counts) if chunks is None else (da.from_array(X, chunks=chunks), da.from_array(counts, chunks=chunks))
    found = dask_nlsq.curve_fit(
        decay, x, y, p0=[2, 1, 1], loss="poisson", strategy=strategy, reduction=reduction, ftol=1e-12
    )
    assert np.max(np.abs(found.popt - likeliest) / found.perr) < 1e-4
    np.testing.assert_allclose(found.pcov, information(found.popt), rtol=1e-6)


def test_the_cost_is_half_the_deviance_and_the_squared_residuals_add_up_to_it(counts):
    found = dask_nlsq.curve_fit(decay, X, counts, p0=[2, 1, 1], loss="poisson")
    mu = mean(found.popt)
    some = counts > 0
    deviance = 2 * np.sum(mu - counts) + 2 * np.sum(counts[some] * np.log(counts[some] / mu[some]))
    assert 2 * found.cost == pytest.approx(deviance, rel=1e-12)
    assert np.sum(found.residuals() ** 2) == pytest.approx(deviance, rel=1e-12)


def test_weights_from_the_model_settle_at_the_likeliest_parameters(counts):
    weighted = dask_nlsq.curve_fit(decay, X, counts, p0=[2, 1, 1], sigma="poisson")
    likely = dask_nlsq.curve_fit(decay, X, counts, p0=[2, 1, 1], loss="poisson")
    assert np.array_equal(weighted.popt, likely.popt)
    chi_square = np.sum((counts - mean(weighted.popt)) ** 2 / mean(weighted.popt))
    assert 2 * weighted.cost == pytest.approx(chi_square, rel=1e-12)
    np.testing.assert_allclose(weighted.pcov, likely.pcov * chi_square / weighted.dof, rtol=1e-10)


def test_masked_points_do_not_count_whatever_they_hold(counts):
    mask = X > 7
    spoiled = np.where(mask, -5.0, counts)
    found = dask_nlsq.curve_fit(decay, X, spoiled, p0=[2, 1, 1], loss="poisson", mask=mask)
    expected = dask_nlsq.curve_fit(decay, X[~mask], counts[~mask], p0=[2, 1, 1], loss="poisson")
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-10)
    assert found.n_masked == mask.sum()


@pytest.mark.slow
def test_a_map_has_the_parameters_of_single_fits():
    y = np.random.default_rng(1).poisson(mean(TRUTH) * 3, (3, X.size))
    maps = dask_nlsq.fit_map(decay, X, y, p0=[9, 1, 1], loss="poisson", ftol=1e-12).compute()
    for k, each in enumerate(y):
        single = dask_nlsq.curve_fit(decay, X, each, p0=[9, 1, 1], loss="poisson", ftol=1e-12)
        assert np.max(np.abs(maps.popt[k] - single.popt) / single.perr) < 1e-5
        np.testing.assert_allclose(maps.perr[k], single.perr, rtol=1e-5)
        assert maps.chi2[k] == pytest.approx(2 * single.cost, rel=1e-9)


def test_a_killed_fit_with_weights_from_the_model_goes_on_as_one(counts, tmp_path):
    path = tmp_path / "fit.ckpt"
    found = dask_nlsq.curve_fit(decay, X, counts, p0=[2, 1, 1], sigma="poisson", checkpoint=path)
    again = dask_nlsq.resume(path, decay)
    assert np.array_equal(found.popt, again.popt) and np.array_equal(found.pcov, again.pcov)


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(loss="poisson", sigma=2.0), "leave out `sigma`"),
        (dict(loss="huber", sigma="poisson"), "cannot be combined with loss='huber'"),
    ],
)
def test_weights_that_contradict_the_likelihood_are_refused(counts, options, error):
    with pytest.raises(ValueError, match=error):
        dask_nlsq.curve_fit(decay, X, counts, p0=[2, 1, 1], **options)


@pytest.mark.parametrize("fit", [dask_nlsq.curve_fit, lambda *a, **k: dask_nlsq.fit_map(*a, **k).compute()])
def test_negative_counts_are_refused(counts, fit):
    with pytest.raises(ValueError, match="loss='poisson' is for counts"):
        fit(decay, X, counts - 1.0, p0=[2, 1, 1], loss="poisson")


@pytest.mark.parametrize("weights", [dict(loss="poisson"), dict(sigma="poisson")])
def test_counts_that_were_divided_are_warned_of_and_whole_numbers_as_floats_are_not(counts, weights):
    dask_nlsq.curve_fit(decay, X, da.from_array(counts + 0.0, chunks=1000), p0=[2, 1, 1], **weights)
    with pytest.warns(UserWarning, match="not whole numbers"):
        dask_nlsq.curve_fit(decay, X, da.from_array(counts / 10, chunks=1000), p0=[0.2, 1, 0.1], **weights)


def test_counts_that_were_divided_are_warned_of_by_maps(counts):
    y = np.stack([counts / 10, counts])[:, ::100]
    with pytest.warns(UserWarning, match="not whole numbers"):
        dask_nlsq.fit_map(decay, X[::100], y, p0=[2, 1, 1], loss="poisson").compute(scheduler="synchronous")


@pytest.mark.slow
def test_means_of_counts_from_which_a_map_starts_are_not_warned_of(counts):
    fits = dask_nlsq.fit_map(
        decay, X[::100], np.stack([counts, counts[::-1]])[:, ::100], p0=[2, 1, 1], loss="poisson", guess="coarse-to-fine"
    )
    fits.compute(scheduler="synchronous")


def peak(x, height, place, width, background):
    return height * jnp.exp(-0.5 * ((x - place) / width) ** 2) + background


POSITIVE = dict(height=(0, None), place=(0, 10), width=(0.1, 5), background=(0, None))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [{}, POSITIVE])
def test_a_dark_pixel_has_no_success_and_errors_without_end(bounds):
    x, dark = np.linspace(0, 10, 100), np.zeros(100)
    bright = np.random.default_rng(0).poisson(20 * np.exp(-0.5 * (x - 5) ** 2) + 3)
    with pytest.warns(OptimizeWarning, match="All counts are 0: they determine no parameter"):
        found = dask_nlsq.curve_fit(peak, x, dark, [5, 5, 1, 1], bounds=bounds, loss="poisson")
    assert found.status == 12 and not found.success and np.isinf(found.perr).all()
    maps = dask_nlsq.fit_map(peak, x, np.stack([dark, bright]), [5, 5, 1, 1], bounds=bounds, loss="poisson").compute()
    assert maps.status[0] == MapStatus.UNDETERMINED and maps.success.tolist() == [False, True]
    assert np.isinf(maps.perr[0]).all() and np.isfinite(maps.perr[1]).all()
