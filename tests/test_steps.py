"""Points and the steps from them, with numbers worked out by hand; for NumPy and JAX alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.kernels import steps
from dask_nlsq.kernels.rules import MOST_CHANGE, VISIBLE
from dask_nlsq.kernels.steps import HatSpace, Point, Scheme, Seen

INF = np.inf
NOWHERE, UNBOUNDED = Point(), Scheme(None)


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"], autouse=True)
def xp(request):
    with jax.enable_x64(True), np.errstate(all="ignore"):
        yield request.param


def arrays(xp, *values):
    return tuple(xp.asarray(each, dtype=float) for each in values)


# ---------------------------------------------------------------------------------------------------------------------
# hat space


def hat(xp, params, gradient, scale, lower, upper):
    params, gradient, scale, *bounds = arrays(xp, params, gradient, scale, lower, upper)
    return steps.hat_space(xp, params, gradient, scale, bounds)


def test_hat_space_without_bounds_is_the_scaling(xp):
    found = hat(xp, [1, 2], [3, -4], [10, 0.1], [-INF, -INF], [INF, INF])
    np.testing.assert_array_equal(found.v, [1, 1])
    np.testing.assert_array_equal(found.d, [10, 0.1])
    np.testing.assert_array_equal(found.diagonal, [0, 0])
    np.testing.assert_array_equal(found.gradient, [30, -0.4])
    params, gradient, scale = arrays(xp, [1, 2], [3, -4], [10, 0.1])
    jax.tree.map(np.testing.assert_array_equal, steps.hat_space(xp, params, gradient, scale, None), found)


def test_hat_space_measures_the_distance_to_the_bound_ahead(xp):
    """Descending, the first parameter moves down to its lower bound 4 away, the second up to its upper bound 9 away."""
    flat = hat(xp, [5, 1], [0.5, -0.5], [1, 1], [1, -7], [6, 10])
    np.testing.assert_array_equal(flat.v, [4, 9])
    found = hat(xp, [5, 1], [2, -3], [1, 4], [1, -7], [6, 10])
    np.testing.assert_array_equal(found.v, [4, 9])
    np.testing.assert_array_equal(found.d, [2, 6])  # sqrt(v scale)
    np.testing.assert_array_equal(found.diagonal, [2, 12])  # |g| scale, never negative
    np.testing.assert_array_equal(found.gradient, [4, -18])


def test_a_bound_behind_or_across_a_flat_direction_does_not_count(xp):
    found = hat(xp, [5, 1, 2], [2, -3, 0], [1, 1, 1], [-INF, -7, 0], [6, INF, 9])
    np.testing.assert_array_equal(found.v, [1, 1, 1])
    np.testing.assert_array_equal(found.diagonal, [0, 0, 0])


def test_a_held_parameter_does_not_move(xp):
    found = hat(xp, [1 + 2e-16, 1], [2, -3], [1, 1], [1, 0], [2, 2])
    np.testing.assert_array_equal(found.d, [0, 1])
    np.testing.assert_array_equal(found.gradient, [0, -3])
    assert found.diagonal[0] == 2


def test_no_step_is_far_longer_than_its_parameter_has_been(xp):
    d, diagonal, gradient, reach, newton = arrays(
        xp, [1e44, 1, 1e44, 0, 0.5], [4, 4, 0, 4, 1], [1e44, 3, 5, 0, 1], [10, 10, 0, 1, 1e-5], [8, 6, 7, 0, 1]
    )
    here = Point()._replace(hat=HatSpace(d, diagonal, gradient, None), reach=reach, newton=newton)
    reined = steps.reined_in(xp, here, 2.0)
    most = MOST_CHANGE * 10 / 2
    np.testing.assert_allclose(reined.hat.d, [most, 1, 1e44, 0, 0.05])  # of a parameter that is 0 nothing is known
    np.testing.assert_allclose(reined.hat.diagonal, [4 * (most / 1e44) ** 2, 4, 0, 4, 0.01])
    np.testing.assert_allclose(reined.hat.gradient, [most, 3, 5, 0, 0.1])
    np.testing.assert_allclose(reined.hat.d * reined.newton, d * newton)


# ---------------------------------------------------------------------------------------------------------------------
# points


def point(xp, before=NOWHERE, full=False, scheme=UNBOUNDED, decrement=8.0, **seen):
    """Two parameters (3, -4) of 6 points; J has columns of length 1 and 2."""
    plain = dict(params=[3, -4], cost=6, gradient=[1, -10], columns=[1, 2], chi_square=16, n_points=6, size=100)
    plain |= dict(floored=0) | seen
    values = Seen(finite=True, **{name: xp.asarray(float(v) if np.ndim(v) == 0 else v) for name, v in plain.items()})
    return steps.point_at(xp, values, before, full, scheme, lambda hat: (hat.d, xp.asarray(decrement), "model"))


@pytest.mark.slow
def test_a_point_is_as_far_as_its_decrement_in_units_of_the_variance(xp):
    here = point(xp)
    assert (float(here.dof), float(here.variance), float(here.distance)) == (4, 4, 2)
    np.testing.assert_array_equal(here.newton, [1, 0.5])  # of a hat space in units of the columns
    assert here.model == "model"
    assert float(point(xp, scheme=Scheme(None, noise_known=True)).distance) == 4
    assert np.isnan(point(xp, n_points=2).distance) and np.isnan(point(xp, n_points=1).variance)
    assert float(point(xp, n_points=3).variance) == 16
    assert float(point(xp, size=1e40).distance) == 0  # less than the rounding of the data


def test_a_bound_counts_that_cuts_the_step_to_a_tenth_where_little_is_left_to_gain(xp):
    """The step without bounds is (1, 1), and predicts 8."""

    def at(lower, cost=16.1, near_below=0.5):
        scheme = Scheme(arrays(xp, [lower, -9], [INF, 1.0625]), x_scale=xp.asarray([1.0, 1.0]), near_below=near_below)
        return point(xp, gradient=[2, -3], params=[5, 1], cost=cost, scheme=scheme).hat

    near, far = at(lower=4.9375), at(lower=4.875)
    np.testing.assert_array_equal(near.diagonal, [2, 3])
    np.testing.assert_array_equal(far.diagonal, [0, 3])
    np.testing.assert_array_equal(far.d, [1, 0.25])
    np.testing.assert_array_equal(far.v, [0.125, 0.0625])  # which `gtol` is compared with
    np.testing.assert_array_equal(at(lower=4.875, cost=15.9).diagonal, [2, 3])
    np.testing.assert_array_equal(at(lower=4.875, near_below=0.0).diagonal, [2, 3])


def test_what_gtol_is_compared_with(xp):
    """The larger element of (1, 10) times the distance to the bound ahead; or of (1 / 1, 10 / 2) over the norm of r."""
    bounds = arrays(xp, [-INF, -INF], [INF, -3.5])
    assert float(point(xp).optimality) == 10
    assert float(point(xp, scheme=Scheme(bounds)).optimality) == 5
    relative = Scheme(None, gtol_relative=True)
    assert float(point(xp, scheme=relative).optimality) == pytest.approx(5 / 12**0.5)
    assert float(point(xp, scheme=relative, columns=[0.1, 0.2]).optimality) == pytest.approx(50 / 12**0.5)
    assert float(point(xp, scheme=relative, columns=[1, 0], gradient=[1, 0]).optimality) == pytest.approx(1 / 12**0.5)


def test_a_point_remembers_the_largest_parameters_and_columns(xp):
    before = point(xp, params=[-9, 1], columns=[5, 1])
    here = point(xp, before)
    np.testing.assert_array_equal(here.reach, [9, 4])
    np.testing.assert_array_equal(here.longest, [5, 2])
    np.testing.assert_array_equal(here.hat.d, [0.2, 0.5])
    scaled = point(xp, before, scheme=Scheme(None, x_scale=xp.asarray([7.0, 8.0])))
    np.testing.assert_array_equal(scaled.hat.d, [7, 8])


def test_two_full_steps_in_a_row_tell_how_slow_the_convergence_is(xp):
    """Decrements 32, 18, 8: the second step shortens the distance by sqrt(8 / 18) = 2 / 3, so that 3 times is left."""
    first = point(xp, decrement=32.0)
    second = point(xp, first, True, decrement=18.0)
    third = point(xp, second, True)
    assert [int(each.n_full) for each in (first, second, third)] == [0, 1, 2]
    assert float(second.distance) == 3 and float(third.contraction) == pytest.approx(2 / 3)
    assert float(third.distance) == pytest.approx(6)
    assert float(point(xp, second._replace(decrement=xp.asarray(0.5)), True, decrement=0.125).contraction) == 0.5
    assert float(point(xp, second._replace(decrement=xp.asarray(0.0)), True).contraction) == 0
    cut = point(xp, second, False)
    assert (int(cut.n_full), float(cut.distance)) == (0, 2)


def test_parameters_that_have_faded_count_unless_the_data_are_exact(xp):
    here = point(xp, columns=[1, 0])
    np.testing.assert_array_equal(here.undetermined, [False, True])
    assert int(here.n_faded) == 1
    assert int(point(xp, columns=[1, 0], cost=0.9 * 100 * VISIBLE**2).n_faded) == 0
    assert int(point(xp, columns=[1, 0], cost=1.1 * 100 * VISIBLE**2).n_faded) == 1


# ---------------------------------------------------------------------------------------------------------------------
# lengths of steps


def test_the_way_to_the_bound_ahead_and_which_parameters_hit_it(xp):
    def way(params, step, lower, upper):
        params, step, *bounds = arrays(xp, params, step, lower, upper)
        stride, hits = steps.to_bound(xp, params, step, bounds)
        return float(stride), list(map(bool, hits))

    assert way([1, 2], [2, -1], [0, 0], [2, 10]) == (0.5, [True, False])
    assert way([1, 2], [-2, -8], [0, 0], [2, 10]) == (0.25, [False, True])
    assert way([1, 2], [2, 4], [0, 0], [2, 4]) == (0.5, [True, True])
    assert way([1, 2], [0, 4], [1, 0], [1, 10]) == (2, [False, True])
    assert way([1, 2], [1, 1], [0, 0], [INF, INF])[0] == INF
    assert way([1, 2], [0, 0], [0, 0], [2, 2])[0] == INF


@pytest.mark.parametrize(
    "start, direction, radius, t",
    [
        ([0, 0], [3, 4], 10, 2),
        ([0, 0], [0.03, 0.04], 1, 20),
        ([1, 0], [1, 0], 3, 2),
        ([1, 0], [-1, 0], 3, 4),
        ([1, 0], [0, 2], 5, 6**0.5),
        ([3, 4], [-3, -4], 5, 2),  # across, from the sphere itself
        ([3, 4], [3, 4], 5, 0),
        ([3, 4], [4, -3], 5, 0),  # along the sphere
        ([1e9, 0], [1, 0], 1e9 + 1, 1),
    ],
)
def test_the_way_to_the_sphere(xp, start, direction, radius, t):
    start, direction = arrays(xp, start, direction)
    assert float(steps.to_sphere(xp, start, direction, radius)) == pytest.approx(t, rel=1e-7)


@pytest.mark.parametrize(
    "curvature, slope, low, high, t",
    [
        (2, -4, 0, 5, 2),
        (2, -4, 0, 1, 1),
        (2, -4, 3, 5, 3),
        (2, 4, -5, 5, -2),
        (0.5, -1, 0, 5, 2),
        (0, -1, 0, 3, 3),
        (0, 1, 0, 3, 0),
        (-2, 1, 0, 3, 3),
        (-2, 1, 0, 0.5, 0),
        (-2, 1, 0, 1, 0),  # as low at both ends
        (-2, 5, 3, 4, 4),
        (-2, 2, 0, 1.5, 0),
    ],
)
def test_the_least_of_a_parabola_in_an_interval(xp, curvature, slope, low, high, t):
    assert float(steps.minimum_along(xp, *arrays(xp, curvature, slope, low, high))) == t


def test_a_step_goes_nearly_to_the_bound_and_the_nearer_the_optimum_the_nearer(xp):
    def share(distance, optimality=1.0):
        distance, optimality = arrays(xp, distance, optimality)
        return float(steps.interior(xp, Point()._replace(distance=distance, optimality=optimality)))

    assert share(100.0) == share(0.5) == 0.995
    assert share(1e-3) == 0.999
    assert share(np.nan, 1e-4) == 0.9999


# ---------------------------------------------------------------------------------------------------------------------
# the best step; from (0, 0), with the bound x <= 1, where the step (2, 2) hits it half way and turns to (-2, 2)

ALONG = np.array([[2.0, 2], [2, 2]])  # (x + y)^2: curved along (1, 1) only
ROUND = np.array([[3.0, 1], [1, 3]])  # and as much as 1 along (-1, 1)
ACROSS = np.array([[12.0, -8], [-8, 12]])
FLAT = np.zeros((2, 2))


def best(xp, hessian, gradient, step_h, radius, upper=(1, 10), lower=(-10, -10), d=(1, 1), distance=1.0, bounded=True):
    hessian, gradient, step_h, d, *bounds = arrays(xp, hessian, gradient, step_h, d, lower, upper)
    here = Point()._replace(params=xp.zeros(2), hat=HatSpace(d, None, gradient, None), distance=xp.asarray(distance))
    return steps.best_step(xp, here, lambda a, b: a @ hessian @ b, step_h, xp.asarray(radius), bounds if bounded else None)


def assert_step(found, step, predicted, full=False):
    np.testing.assert_allclose(found.step, step, rtol=1e-12)
    assert float(found.predicted) == pytest.approx(predicted, rel=1e-12)
    assert bool(found.full) == full


def test_a_step_within_the_bounds_is_taken_whole(xp):
    found = best(xp, FLAT, [-3, -5], [0.5, 2], 8, d=(2, 1))
    assert_step(found, [1, 2], 11.5, full=True)  # on the bound; in hat space (0.5, 2)
    np.testing.assert_array_equal(found.step_h, [0.5, 2])
    assert_step(best(xp, ALONG, [-3, -5], [9, 9], 99, bounded=False), [9, 9], 72 - 324, full=True)
    assert best(xp, FLAT, [3, 5], [-0.5, -10], 20).full  # on the other one
    assert not best(xp, FLAT, [-3, -5], [0.6, 2], 8, d=(2, 1)).full
    assert not best(xp, FLAT, [3, 5], [-0.5, -11], 8).full


def test_a_reflection_ends_at_the_sphere(xp):
    """From (1, 1) for t = sqrt(3) / 2 to the sphere of radius sqrt(8); q = (x + y)^2 - 3x - 5y is -4 - 4t there."""
    assert_step(best(xp, ALONG, [-3, -5], [2, 2], 8**0.5), [1 - 3**0.5, 1 + 3**0.5], 4 + 2 * 3**0.5)


def test_a_reflection_ends_next_to_the_bound_that_it_meets(xp):
    """y <= 1.5 is met at t = 1 / 4, of which 0.995 are taken: q = -4 - 4t."""
    t = 0.995 / 4
    assert_step(best(xp, ALONG, [-3, -5], [2, 2], 8**0.5, upper=(1, 1.5)), [1 - 2 * t, 1 + 2 * t], 4 + 4 * t)


def test_a_reflection_is_one_in_hat_space(xp):
    """As before in units of d = (2, 1/2): the step is (1, 4) there, and turns to (-1, 4)."""
    t, d = 0.995 / 4, np.array([2, 0.5])
    scaled = best(xp, ALONG * np.outer(d, d), [-6, -2.5], [1, 4], 17**0.5, upper=(1, 1.5), d=d)
    assert_step(scaled, [1 - 2 * t, 1 + 2 * t], 4 + 4 * t)
    np.testing.assert_allclose(scaled.step_h, [0.5 - t, 2 + 4 * t])


@pytest.mark.parametrize("highest, room", [(10, 3**0.5 / 2), (2.5, 0.75)])
def test_a_reflection_that_leads_up_is_short_but_leaves_the_bound(xp, highest, room):
    """q = 6 x^2 - 8 x y + 6 y^2 - 9x - 7y is -12 + 4 t + 80 t^2; less than 0.995 of the step up to the bound gains.

    It is as short as that, relative to the room on the way to the sphere or to the other bound: 0.005 / 2 of it.
    """
    t = 0.0025 / room
    found = best(xp, ACROSS, [-9, -7], [2, 2], 8**0.5, upper=(1, highest))
    assert_step(found, [1 - 2 * t, 1 + 2 * t], 12 - 4 * t - 80 * t**2)


def test_a_reflection_ends_where_the_model_is_least(xp):
    """The curvature along (-2, 2) is 16, the slope -4: t = 1 / 4."""
    assert_step(best(xp, ROUND, [-3, -5], [2, 2], 8**0.5), [0.5, 1.5], 4.5)


def test_a_reflection_that_leads_up_is_not_taken_but_the_step_up_to_the_bound(xp):
    """q = 6 x^2 - 8 x y + 6 y^2 - 5x - 3y at 0.995 (1, 1)."""
    found = best(xp, ACROSS, [-5, -3], [2, 2], 8**0.5)
    assert_step(found, [0.995, 0.995], 8 * 0.995 - 4 * 0.995**2)
    d = np.array([2, 0.5])
    scaled = best(xp, ACROSS * np.outer(d, d), [-10, -1.5], [1, 4], 17**0.5, d=d)
    assert_step(scaled, [0.995, 0.995], 8 * 0.995 - 4 * 0.995**2)
    nearer = best(xp, ACROSS, [-5, -3], [2, 2], 8**0.5, distance=1e-3)
    assert_step(nearer, [0.999, 0.999], 8 * 0.999 - 4 * 0.999**2)


def test_in_a_corner_the_gradient_leads_on(xp):
    """Down (3, 5) to 0.995 of the way to y <= 1, for t = 0.199: q = 64 t^2 - 34 t; the reflection leads straight back."""
    t = 0.199
    assert_step(best(xp, ALONG, [-3, -5], [2, 2], 8**0.5, upper=(1, 1)), [3 * t, 5 * t], 34 * t - 64 * t**2)


def test_the_step_down_the_gradient_ends_at_the_sphere(xp):
    assert_step(best(xp, FLAT, [0, -5], [0.3, 0.4], 0.5, upper=(0.1, 10)), [0, 0.5], 2.5)


def test_the_step_down_the_gradient_ends_where_the_model_is_least(xp):
    """Down (1, 5), whose curvature is 26 and squared length too: t = 1."""
    assert_step(best(xp, np.eye(2), [-1, -5], [2, 0], 20, upper=(1.5, 99)), [1, 5], 13)


def test_no_reflection_leads_out_of_the_ball(xp):
    """(1, 1) is on the sphere already; downhill only 34^2 / 296 = 3.9 is to be gained, q = 8 - 12 there."""
    found = best(xp, np.array([[7.0, -3], [-3, 7]]), [-3, -5], [2, 2], 2**0.5)
    assert_step(found, [0.995, 0.995], 8 * 0.995 - 4 * 0.995**2)
