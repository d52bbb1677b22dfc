import numpy as np
import pytest

from dask_nlsq.base.x64 import float64
from dask_nlsq.model.losses import LOSSES, masked_cost
from dask_nlsq.solve.subproblem import hat_space, solve_cg, solve_svd, spectrum

INF = np.inf
TOLERANCE = 1e-13


@pytest.fixture(autouse=True)
def in_float64():
    with float64():
        yield


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


def test_hat_space_without_bounds_is_the_scaling():
    hat = hat_space(np.array([1.0, 2.0]), np.array([3.0, -4.0]), np.full(2, -INF), np.full(2, INF), np.array([10.0, 0.1]))
    np.testing.assert_array_equal(hat.v, [1, 1])
    np.testing.assert_array_equal(hat.d, [10.0, 0.1])
    np.testing.assert_array_equal(hat.diagonal, [0, 0])
    np.testing.assert_array_equal(hat.gradient, [30.0, -0.4])


def test_hat_space_measures_the_distance_to_the_bound_ahead():
    # descending, the first parameter moves down to its lower bound 4 away, the second up to its upper bound 9 away
    hat = hat_space(np.array([5.0, 1.0]), np.array([2.0, -3.0]), np.array([1.0, -INF]), np.array([INF, 10.0]), np.ones(2))
    np.testing.assert_array_equal(hat.v, [4.0, 9.0])
    np.testing.assert_array_equal(hat.d, [2.0, 3.0])
    np.testing.assert_array_equal(hat.diagonal, [2.0, 3.0])  # g * dv, never negative
    np.testing.assert_array_equal(hat.gradient, [4.0, -9.0])


def exact(R, projected, radius, alpha=0.0):
    spectral = spectrum(R, projected, np.ones(len(R)), np.zeros(len(R)))
    step, alpha = solve_svd(spectral, radius, alpha)
    return np.asarray(step), float(alpha)


def test_gauss_newton_step_inside_the_ball():
    R, projected = np.array([[2.0, 0.0], [0.0, 4.0]]), np.array([2.0, 4.0])
    step, alpha = exact(R, projected, radius=10.0)
    np.testing.assert_allclose(step, [-1.0, -1.0], rtol=1e-14)
    assert alpha == 0


def test_step_on_the_sphere_solves_the_shifted_equations():
    R, projected = np.array([[2.0, 0.0], [0.0, 4.0]]), np.array([2.0, 4.0])
    step, alpha = exact(R, projected, radius=0.5)
    assert np.linalg.norm(step) == pytest.approx(0.5, rel=1e-14)
    shifted = -np.linalg.solve(R.T @ R + alpha * np.eye(2), R.T @ projected)
    np.testing.assert_allclose(step, shifted, rtol=0.02)  # the iteration stops at 1 % of the radius


def test_no_step_along_directions_that_the_data_do_not_determine():
    R, projected = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([2.0, 5.0])
    step, _ = exact(R, projected, radius=100.0)
    np.testing.assert_allclose(step, [-1.0, -1.0], rtol=1e-12)  # the shortest solution of s0 + s1 = -2


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 1e3])
def test_cg_and_svd_predict_the_same_reduction(radius):
    rng = np.random.default_rng(3)
    p = 12
    R, projected = np.triu(rng.normal(size=(p, p)) + 2 * np.eye(p)), rng.normal(size=p)
    d, diagonal = rng.uniform(0.5, 2, p), rng.uniform(0, 1, p)

    def reduction(step):
        step = np.asarray(step)
        return -(0.5 * np.sum((R * d @ step) ** 2) + 0.5 * diagonal @ step**2 + d * (R.T @ projected) @ step)

    by_svd = solve_svd(spectrum(R, projected, d, diagonal), radius, 0.0)[0]
    by_cg = solve_cg(R, projected, d, diagonal, radius)
    assert np.linalg.norm(by_cg) <= radius * (1 + 1e-12)
    # Steihaug's path leaves the ball at one point of the sphere, the exact solver takes the best one
    assert reduction(by_svd) * (1 + 1e-3) >= reduction(by_cg) >= 0.5 * reduction(by_svd)
    if radius > 100:
        np.testing.assert_allclose(by_cg, by_svd, rtol=1e-8)


def test_helpers_are_compiled_once_per_shape():
    R, projected = np.eye(3), np.ones(3)
    for k in range(4):
        exact(R * (k + 1), projected * k + 1, radius=k + 0.5, alpha=0.1 * k)
    before = solve_svd._cache_size(), spectrum._cache_size()
    exact(R * 7, projected, radius=3.0)
    assert (solve_svd._cache_size(), spectrum._cache_size()) == before
