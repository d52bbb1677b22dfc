"""Many small fits at once: their small matrices, how many go together, and what the status of a pixel says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import MapStatus, fit_map
from dask_nlsq.kernels.lane_loop import map_status
from dask_nlsq.kernels.lanes import PIVOT, group_size, inverse, n_lanes

X = np.linspace(0, 1, 5)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def inverted(*matrices):
    """Inverses (lanes, p, p) and whether the matrices are regular."""
    found, regular = inverse(jnp.asarray(matrices, dtype=float).transpose(1, 2, 0))
    return np.asarray(found.transpose(2, 0, 1)), list(map(bool, regular))


@pytest.mark.slow
def test_inverse_by_elimination():
    plain, large = [[4, 2], [2, 2]], [[4e12, 2], [2, 2e-12]]
    found, regular = inverted(plain, large)
    np.testing.assert_allclose(found, [[[0.5, -0.5], [-0.5, 1]], [[0.5e-12, -0.5], [-0.5, 1e12]]], rtol=1e-14)
    assert regular == [True, True]
    rng = np.random.default_rng(0)
    J = rng.normal(size=(3, 9, 4))
    grams = J.transpose(0, 2, 1) @ J
    np.testing.assert_allclose(inverted(*grams)[0], np.linalg.inv(grams), rtol=1e-11)


def test_a_pivot_that_is_rounding_is_kept_at_the_size_of_it():
    """The second pivot is 1 - 1 = 0, or a rounding of that: PIVOT in its place, and not regular."""
    for second in (1.0, 1 + 0.9 * PIVOT):
        (found,), (regular,) = inverted([[1, 1], [1, second]])
        np.testing.assert_allclose(found[1, 1] * PIVOT, 1, rtol=1e-10)
        assert not regular
    (found,), (regular,) = inverted([[1, 1], [1, 1 + 2 * PIVOT]])
    np.testing.assert_allclose(found[1, 1] * 2 * PIVOT, 1, rtol=0.01)
    assert regular


def test_a_parameter_without_effect_leaves_its_row_and_column_zero():
    (found,), (regular,) = inverted([[4, 0, 2], [0, 0, 0], [2, 0, 2]])
    np.testing.assert_allclose(found, [[0.5, 0, -0.5], [0, 0, 0], [-0.5, 0, 1]], rtol=1e-14)
    assert not regular


def test_lanes_are_many_for_short_spectra_and_few_for_long_ones():
    assert [n_lanes(n) for n in (1, 2**10, 2**10 + 1, 2**12, 2**20)] == [64, 64, 64, 64, 16]
    assert [group_size(n, 3) for n in (1, 2**7, 2**8, 2**10, 2**20)] == [64, 64, 32, 8, 4]


# ---------------------------------------------------------------------------------------------------------------------
# statuses


@pytest.mark.parametrize(
    "ended, at_bound, regular, unknown, floored, status",
    [
        (MapStatus.GTOL, False, True, False, False, MapStatus.GTOL),
        (MapStatus.ROUNDING, False, True, False, False, MapStatus.ROUNDING),
        (MapStatus.GTOL, True, True, False, False, MapStatus.AT_BOUND),
        (MapStatus.ROUNDING, True, True, False, False, MapStatus.AT_BOUND),
        (MapStatus.XTOL, True, False, False, False, MapStatus.SINGULAR),
        (MapStatus.XTOL, False, False, True, False, MapStatus.UNDETERMINED),
        (MapStatus.XTOL, False, False, True, True, MapStatus.STUCK),
        (MapStatus.STUCK, True, True, False, False, MapStatus.STUCK),
        (MapStatus.STUCK, False, False, False, False, MapStatus.SINGULAR),
        (MapStatus.STUCK, False, False, True, False, MapStatus.UNDETERMINED),
        (MapStatus.ITERATION_LIMIT, True, False, True, True, MapStatus.ITERATION_LIMIT),
        (MapStatus.NON_FINITE, True, False, True, True, MapStatus.NON_FINITE),
    ],
)
def test_a_status_says_what_the_fit_has_found(ended, at_bound, regular, unknown, floored, status):
    given = (jnp.asarray([each]) for each in (int(ended), at_bound, regular, unknown, floored))
    assert int(map_status(*given)[0]) == status


def line(x, a, b):
    return a + b * x


@pytest.mark.slow
def test_each_way_to_end_has_its_status():
    """A line through 5 points; y = 1 + 2 x where nothing else is said."""
    y = np.tile(1 + 2 * X + 0.1 * np.array([1, -1, 0, -1, 1]), (6, 1))
    y[1], y[2, 1:], y[3, 2:] = np.nan, np.nan, np.nan  # none, one and two points
    start = np.zeros((6, 2))
    start[4, 0], start[5, 0] = np.nan, 1e200  # the latter's cost is not finite
    found = fit_map(line, X, y, start, full_covariance=True).compute()
    names = ("MASKED", "TOO_FEW_POINTS", "NON_FINITE", "NON_FINITE")
    assert [MapStatus(each).name for each in found.status[[1, 2, 4, 5]]] == [*names]
    assert found.success[[0, 3]].all() and not found.success[[1, 2, 4, 5]].any()
    np.testing.assert_array_equal(found.n_points, [5, 0, 1, 2, 5, 5])
    np.testing.assert_allclose(found.popt[0], np.polyfit(X, y[0], 1)[::-1], rtol=1e-8)
    covariance = np.polyfit(X, y[0], 1, cov=True)[1][::-1, ::-1]
    np.testing.assert_allclose(found.pcov[0], covariance, rtol=1e-8)
    np.testing.assert_allclose(found.perr[0], np.sqrt(np.diag(covariance)), rtol=1e-8)
    np.testing.assert_array_equal(np.isnan(found.popt).all(axis=1), [False, True, True, False, True, True])
    assert np.isinf(found.perr[3]).all()  # no degrees of freedom
    limited = fit_map(line, X, y[:1], start[:1], max_nfev=1).compute()
    assert (int(limited.status[0]), int(limited.nfev[0])) == (MapStatus.ITERATION_LIMIT, 1)
    explained = np.sum(
        np.polyval(np.polyfit(X, y[0], 1), X) ** 2
    )  # twice the decrement at the start; three degrees of freedom
    np.testing.assert_allclose(limited.distance[0], np.sqrt(explained / (np.sum(y[0] ** 2) / 3)), rtol=1e-12)


@pytest.mark.slow
def test_a_fit_whose_derivatives_are_wrong_is_stuck():
    @jax.custom_jvp
    def wrong(x, a):
        return jnp.exp(a * x)

    @wrong.defjvp
    def _(given, tangents):
        return wrong(*given), -given[0] * jnp.exp(given[1] * given[0]) * tangents[1]

    found = fit_map(lambda x, a: wrong(x, a), X, np.exp(X)[None], [0.5]).compute()
    assert found.status[0] == MapStatus.STUCK and not found.success[0]
    assert found.nfev[0] < 40  # of the 100 that are allowed


@pytest.mark.slow
def test_a_fit_whose_columns_are_alike_to_rounding_ends_where_no_more_can_be_had():
    """Along b - c the distance is rounding over rounding, which is never small."""
    x = np.linspace(0, 5, 40)
    y = 3 * np.exp(-1.3 * x) + 0.5
    found = fit_map(lambda x, a, b, c: a + b * x + c * (x + 1e-9 * x**2), x, y[None], [1.0, 1.0, 1.0]).compute()
    assert (int(found.status[0]), bool(found.success[0])) == (MapStatus.SINGULAR, False)
    assert found.nfev[0] < 30  # of 300
    assert found.popt[0, 1:].sum() == pytest.approx(np.polyfit(x, y, 1)[0], abs=0.01)
    assert np.isinf(found.perr[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_a_fit_goes_on_until_the_optimum_is_near_in_any_unit_of_y(unit):
    """SciPy's tests with a loose ``ftol`` propose to stop at once."""
    y = (np.exp(-1.5 * X) + 0.02 * np.array([1, -1, 0, -1, 1]))[None]
    plain, scaled = (
        fit_map(lambda x, a, b: a * jnp.exp(-b * x), X, s * y, [0.5 * s, 0.5], ftol=0.9).compute() for s in (1.0, unit)
    )
    assert plain.success[0] and plain.distance[0] < 0.01
    np.testing.assert_allclose(scaled.distance, plain.distance, rtol=1e-6)
    np.testing.assert_allclose(scaled.popt / [unit, 1], plain.popt, rtol=1e-9)


@pytest.mark.slow
def test_a_fit_may_take_a_hundred_evaluations_for_each_parameter():
    """Residuals a + 1 and k a^2 + a - 1 with k = 0.99: full steps go from a to about k a, and so it takes a thousand."""
    tight = dict(ftol=1e-13, xtol=1e-13, gtol=1e-13)
    slow = fit_map(lambda x, a: jnp.where(x < 0.5, a + 1, 0.99 * a**2 + a), X[[0, 4]], [[0.0, 1.0]], [0.5], **tight)
    found = slow.compute()
    assert (int(found.nfev[0]), int(found.status[0])) == (100, MapStatus.ITERATION_LIMIT)


@pytest.mark.slow
def test_a_parameter_that_cannot_move_does_not_stop_the_others():
    """From -5, where the model is all but flat, the first steps lead too far."""
    found = fit_map(lambda x, a, b: jnp.exp(a * x) + 0 * b, X, np.exp(X)[None] + 0.01 * X, [-5.0, 1.0]).compute()
    assert found.status[0] == MapStatus.UNDETERMINED
    np.testing.assert_allclose(found.popt[0], [1.0, 1.0], atol=0.02)


@pytest.mark.slow
def test_bounds_end_a_fit_next_to_them_and_a_parameter_that_starts_on_one_leaves_it():
    y = np.stack([1 + 2 * X, 1 - 2 * X, 1 + 4 * X]) + 0.1 * np.array([1, -1, 0, -1, 1])
    found = fit_map(line, X, y, [0.5, 0.0], bounds=([-9, 0], [9, 3])).compute()
    assert [MapStatus(each) == MapStatus.AT_BOUND for each in found.status] == [False, True, True]
    assert found.success.all()
    np.testing.assert_array_equal(found.at_bound, [[0, 0], [0, -1], [0, 1]])
    np.testing.assert_allclose(found.popt[:, 1], [2, 0, 3], atol=1e-8)
    np.testing.assert_allclose(found.popt[1:, 0], [y[1].mean(), (y[2] - 3 * X).mean()], atol=1e-8)
