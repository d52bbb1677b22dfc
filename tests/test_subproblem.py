"""The step to the minimum of the quadratic model in a ball, by both solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.base.x64 import float64
from dask_nlsq.engine.condensed import Condensed, Factor
from dask_nlsq.kernels.steps import HatSpace, more
from dask_nlsq.solve.subproblem import QuadraticModel, solve_cg, solve_svd, spectrum


@pytest.fixture(autouse=True)
def in_float64():
    with float64():
        yield


def exact(R, projected, radius, alpha=0.0):
    spectral = spectrum(R, projected, np.zeros(len(R)))
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
    R, root = R * rng.uniform(0.5, 2, p), np.sqrt(rng.uniform(0, 1, p))

    def reduction(step):
        step = np.asarray(step)
        return -(0.5 * np.sum((R @ step) ** 2) + 0.5 * np.sum((root * step) ** 2) + (R.T @ projected) @ step)

    by_svd = solve_svd(spectrum(R, projected, root), radius, 0.0)[0]
    by_cg = solve_cg(R, projected, root, radius)
    assert np.linalg.norm(by_cg) <= radius * (1 + 1e-12)
    # Steihaug's path leaves the ball at one point of the sphere, the exact solver takes the best one
    assert reduction(by_svd) * (1 + 1e-3) >= reduction(by_cg) >= 0.5 * reduction(by_svd)
    if radius > 100:
        np.testing.assert_allclose(by_cg, by_svd, rtol=1e-8)


def test_the_solver_is_compiled_once_per_shape():
    R, projected = np.eye(3), np.ones(3)
    for k in range(4):
        exact(R * (k + 1), projected * k + 1, radius=k + 0.5, alpha=0.1 * k)
    before = solve_svd._cache_size()
    exact(R * 7, projected, radius=3.0)
    assert solve_svd._cache_size() == before


def model_of(R, projected, solver="exact"):
    R, projected = np.asarray(R, dtype=float), np.asarray(projected, dtype=float)
    return QuadraticModel(Condensed(np.eye(len(R) + 1), 1.0, "gram"), Factor(R, projected, R.T @ projected, 1.0), solver)


def hat_of(model, d, diagonal):
    d, diagonal = np.asarray(d, dtype=float), np.asarray(diagonal, dtype=float)
    return HatSpace(d, diagonal, d * model.factor.gradient, np.ones_like(d))


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_newton_step_and_decrement_by_hand(solver):
    """J_h = diag(1, 2), C = (1, 0), g_h = (3, 8): the step is (-3 / 2, -8 / 4), the decrement (9 / 2 + 64 / 4) / 2."""
    model = model_of([[2, 0], [0, 1]], [3, 4], solver)
    step_h, decrement = model.newton(hat_of(model, [0.5, 2], [1, 0]))
    np.testing.assert_allclose(step_h, [-1.5, -2], rtol=1e-12)
    assert decrement == pytest.approx(10.25, rel=1e-12)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_a_held_parameter_and_one_without_effect_stay_where_they_are(solver):
    model = model_of(np.diag([2, 1, 0]), [3, 4, 0], solver)
    step_h, decrement = model.newton(hat_of(model, [0, 1, 1], [5, 0, 0]))
    np.testing.assert_allclose(step_h, [0, -4, 0], rtol=1e-12)
    assert decrement == pytest.approx(8, rel=1e-12)


@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("units", [1e-120, 1e120])
def test_newton_step_knows_no_units(units, solver):
    model = model_of(np.diag([2 * units, 1]), [3, 4], solver)
    step_h, decrement = model.newton(hat_of(model, [1, 1], [0, 0]))
    np.testing.assert_allclose(step_h * [units, 1], [-1.5, -4], rtol=1e-12)
    assert decrement == pytest.approx(12.5, rel=1e-12)


def test_bend_is_the_curvature_between_two_directions():
    """R_h = [[2, 6], [0, 3]] and C = (5, 7): R_h a = (14, 6), R_h b = (0, 3), so 18 + 5 * 1 * -3 + 7 * 2 * 1."""
    model = model_of([[2, 2], [0, 1]], [0, 0])
    assert model.bend(hat_of(model, [1, 3], [5, 7]), np.array([1.0, 2]), np.array([-3.0, 1])) == 18 - 15 + 14


def test_a_direction_that_is_all_but_undetermined_does_not_overflow():
    """The Newton step is 1e214 long; of a radius of 1e117 all but nothing of it is left."""
    step, alpha = exact(np.diag([1.0, 1e-113]), np.array([1e114, 1e101]), radius=1e117)
    assert np.linalg.norm(step) == pytest.approx(1e117) and alpha > 0


def test_refused_steps_share_one_decomposition():
    model = model_of([[2, 1], [0, 1]], [3, 4])
    hat = hat_of(model, [1, 1], [0, 0])
    step_h, _ = model.step(hat, 0.5, 0.0)
    kept = model.decomposed
    shorter, _ = model.step(hat, 0.25, 0.0)
    assert model.decomposed is kept
    assert np.linalg.norm(step_h) == pytest.approx(0.5) and np.linalg.norm(shorter) == pytest.approx(0.25)
    reined = hat_of(model, [1, 0.1], [0, 0])
    again, _ = model.step(reined, 0.25, 0.0)
    np.testing.assert_array_equal(again, model_of([[2, 1], [0, 1]], [3, 4]).step(reined, 0.25, 0.0)[0])


def test_conjugate_gradients_stop_where_they_leave_the_ball():
    """Down the gradient first: -(3, 4) for 25 / 25 of its length would lead beyond, so up to the sphere of radius 2."""
    np.testing.assert_allclose(solve_cg(np.eye(2), np.array([3.0, 4.0]), np.zeros(2), 2.0), [-1.2, -1.6], rtol=1e-14)
    flat = np.array([[1.0, 0], [0, 0]])
    np.testing.assert_allclose(solve_cg(flat, np.array([3.0, 4.0]), np.zeros(2), np.inf), [-3, 0], rtol=1e-14)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.6])
def test_the_parameter_makes_the_step_as_long_as_the_radius(radius):
    """R = diag(2, 4), g = (4, 16): the step is -(4 / (4 + alpha), 16 / (16 + alpha)), 1 % of the radius suffice."""
    R, projected = np.diag([2.0, 4.0]), np.array([2.0, 4.0])
    for first in (0.0, 1e-3, 1.0, 1e5):
        step, alpha = exact(R, projected, radius, first)
        length = np.hypot(4 / (4 + alpha), 16 / (16 + alpha))
        assert length == pytest.approx(radius, rel=1e-3)  # of the better alpha with which the iteration would go on
        np.testing.assert_allclose(step, -radius / length * np.array([4 / (4 + alpha), 16 / (16 + alpha)]), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Moré's iteration; the Newton step has length 4 and slope -4, the gradient 4: alpha is between 0.75 and 4 for a radius of 1


def tried(lengths, slopes, first, newton=4.0, radius=1.0):
    """The alphas at which steps of these lengths and slopes were computed, and what came out."""
    alphas, left = [], iter(zip(lengths, slopes, strict=True))

    def step_at(alpha):
        alphas.append(float(alpha))
        length, slope = next(left)
        return jnp.asarray([length, 0.0]), jnp.asarray(length), jnp.asarray(slope)

    with jax.disable_jit():
        found = more(step_at, jnp.asarray([newton, 0.0]), jnp.asarray(-4.0), jnp.asarray(4.0), radius, jnp.asarray(first))
    return alphas, [np.asarray(each) for each in found]


def test_one_step_of_the_iteration_is_exact_for_one_direction():
    """The step 4 / (1 + alpha) is 2 long at 1, with the slope -1: alpha = 1 + 2 (2 - 1) / 1."""
    alphas, (step, alpha, following) = tried([2, 1], [-1, -0.25], 1.0)
    assert alphas == [1, 3]
    assert (step[0], alpha, following) == (1, 3, 3)


@pytest.mark.parametrize("first", [0.0, 0.5, 5.0])
def test_a_guess_outside_of_what_is_possible_is_replaced_by_the_geometric_mean(first):
    assert tried([1], [-1], first)[0] == pytest.approx([3**0.5])


def test_guesses_stay_between_what_has_been_too_short_and_too_long():
    """From 2, where the step is too short, the iteration would go to -0.5; from there, too long, beyond 2 again."""
    alphas, _ = tried([0.5, 1.5, 1], [-0.1, -0.4, -1], 2.0)
    second = (0.75 * 2) ** 0.5
    assert alphas == pytest.approx([2, second, ((second + 0.5 / 0.4) * 2) ** 0.5])
    assert tried([0.5, 1], [-1e-9, -1], 3.9, newton=1.0000001)[0] == pytest.approx([3.9, 0.001 * 3.9])


@pytest.mark.parametrize("near, far", [(1.0099, 1.0101), (0.9901, 0.9899)])
def test_the_iteration_ends_within_one_percent_of_the_radius(near, far):
    assert len(tried([near], [-1], 2.0)[0]) == 1
    assert len(tried([far, near], [-1, -1], 2.0)[0]) == 2
    assert len(tried([2 * near], [-1], 1.0, radius=2.0)[0]) == 1


def test_the_iteration_ends_after_ten_steps_at_a_number_that_is_not_one_and_within_the_ball():
    assert len(tried([2] * 10, [-1e9] * 10, 2.0)[0]) == 10
    assert len(tried([np.nan], [-1], 2.0)[0]) == 1
    assert tried([], [], 2.0, newton=1.0)[0] == []


def test_lanes_that_are_done_stay_as_they_are():
    """Steps 4 / (1 + alpha) and 8 / (1 + alpha) for a radius of 1, from 3, the answer of the first; the third is inside."""
    newton = jnp.asarray([4.0, 8.0, 0.5])

    def step_at(alpha):
        length = newton / (1 + alpha)
        return length[None], length, -length / (1 + alpha)

    step, alpha, _ = more(step_at, newton[None], -newton, newton, 1.0, jnp.asarray([3.0, 3.0, 0.0]))
    np.testing.assert_allclose(step, [[1, 1, 0.5]])
    np.testing.assert_allclose(alpha[:2], [3, 7])
