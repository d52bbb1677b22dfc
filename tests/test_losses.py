"""The robust losses, and the cost that they make of residuals."""

import numpy as np
import pytest
import scipy.optimize

from dask_nlsq import curve_fit, fit_map
from dask_nlsq.base.x64 import float64
from dask_nlsq.model.losses import LOSSES, masked_cost


@pytest.fixture(autouse=True)
def in_float64():
    with float64():
        yield


def line(x, a, c):
    return a * x + c


def test_masked_cost_counts_valid_points_only():
    residual = np.array([1.0, 2.0, 100.0])
    assert float(masked_cost(residual, np.array([True, True, False]), 1.0)) == 2.5
    assert float(masked_cost(residual[:2], np.array([True, True]), 1.0)) == 2.5


def test_huber_cost_by_hand():
    # |r| = 1 is inside f_scale = 2: 1; |r| = 6 outside: z = 9, rho = 2 * 3 - 1 = 5, times f_scale^2 = 20
    assert float(masked_cost(np.array([1.0, 6.0]), np.array([True, True]), 2.0, loss="huber")) == pytest.approx(
        0.5 * (1 + 20)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_derivatives_are_those_of_rho(loss):
    z = np.array([1e-3, 0.3, 0.9, 1.7, 40.0])
    h = 1e-5 * z
    (up, slope_up, _), (down, slope_down, _) = LOSSES[loss](z + h), LOSSES[loss](z - h)
    _, rho1, rho2 = LOSSES[loss](z)
    np.testing.assert_allclose(rho1, (up - down) / (2 * h), rtol=1e-8)
    np.testing.assert_allclose(rho2, (slope_up - slope_down) / (2 * h), rtol=1e-6, atol=1e-9)


def test_a_start_where_all_points_are_outliers_is_left():
    x = np.linspace(0, 1, 20)
    y = x - 3 + np.random.default_rng(0).normal(0, 0.1, 20)
    options = dict(p0=[0.9, 5], loss="huber", f_scale=0.1, bounds=([0, -4], [2, 6]))
    expected, _ = scipy.optimize.curve_fit(lambda x, a, c: a * x + c, x, y, method="trf", x_scale="jac", **options)
    found = curve_fit(line, x, y, **options)
    each = fit_map(line, x, y[None], **options).compute()
    assert found.success and each.success.all()
    np.testing.assert_allclose([found.popt, each.popt[0]], [expected] * 2, atol=1e-3)
