"""The rules of acceptance, radius and termination, with numbers worked out by hand; for NumPy and JAX alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.kernels import rules
from dask_nlsq.kernels.lanes import MapStatus
from dask_nlsq.kernels.steps import HatSpace, Point, Step

ROUNDING = rules.ROUNDING


class Limits(NamedTuple):
    ftol: float = 1e-8
    xtol: float = 1e-8
    gtol: float = 1e-8


TOLERANCES = Limits()


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"], autouse=True)
def xp(request):
    with jax.enable_x64(True), np.errstate(all="ignore"):
        yield request.param


def at(xp, **values) -> Point:
    """A point with two parameters."""
    plain = dict(params=[3.0, 4.0], cost=1.0, finite=True, floored=0, n_faded=0, decrement=0.1, optimality=1.0, distance=1.0)
    plain |= dict(longest=[1.0, 1.0], newton=[0.0, 0.0], dof=10)
    hat = values.pop("hat", HatSpace(xp.asarray([1.0, 1.0]), xp.zeros(2), None, None))
    return Point()._replace(hat=hat, **{name: xp.asarray(value) for name, value in (plain | values).items()})


# ---------------------------------------------------------------------------------------------------------------------
# acceptance


def judged(xp, here, there, predicted, stalls=0):
    return rules.judge(xp, at(xp, **here), at(xp, **there), xp.asarray(predicted), xp.asarray(stalls))


def test_a_lower_cost_is_accepted_where_the_model_has_promised_about_as_much(xp):
    verdict = judged(xp, dict(cost=2.0), dict(cost=1.6), predicted=0.5)
    assert verdict.accepted and not verdict.by_gradient
    assert float(verdict.actual) == pytest.approx(0.4)
    assert float(verdict.ratio) == pytest.approx(0.8)
    assert float(verdict.relative) == pytest.approx(0.2)


def test_a_lower_cost_by_luck_is_refused(xp):
    assert not judged(xp, dict(cost=1.0), dict(cost=0.92), predicted=0.5).accepted  # 16 % of what was promised
    assert judged(xp, dict(cost=1.0), dict(cost=0.88), predicted=0.5).accepted  # 24 %
    assert judged(xp, dict(cost=3.0), dict(cost=2.0), predicted=5.0).accepted  # 20 % are enough


@pytest.mark.parametrize("cost", [1.0, 1.1])
def test_a_cost_that_is_not_lower_is_refused_and_its_ratio_is_not_positive(xp, cost):
    verdict = judged(xp, dict(cost=1.0), dict(cost=cost), predicted=0.5)
    assert not verdict.accepted
    assert float(verdict.ratio) == pytest.approx(2 * (1 - cost))


@pytest.mark.parametrize("predicted", [0.0, -0.1])
def test_where_the_model_promises_nothing_a_lower_cost_is_accepted_but_does_not_widen_the_ball(xp, predicted):
    """The cost at the point is 0, so that nothing is below its rounding."""
    verdict = judged(xp, dict(cost=0.0), dict(cost=-0.5), predicted)
    assert verdict.accepted and not verdict.by_gradient
    assert float(verdict.ratio) == float(verdict.relative) == 0.0
    assert not judged(xp, dict(cost=0.0), dict(cost=0.0), predicted).accepted


@pytest.mark.parametrize("trap", [dict(floored=1), dict(n_faded=1), dict(finite=False)])
def test_a_trial_from_which_nothing_leads_back_is_refused_and_the_radius_shrinks(xp, trap):
    verdict = judged(xp, dict(cost=1.0), dict(cost=0.5) | trap, predicted=0.5)
    assert not verdict.accepted
    assert float(rules.next_radius(xp, 8.0, verdict.ratio, 4.0)) == 1.0
    assert np.isnan(verdict.actual) == ("finite" in trap)


@pytest.mark.parametrize("same", [dict(floored=1), dict(n_faded=1)])
def test_a_trial_may_be_as_bad_as_the_point_but_not_worse(xp, same):
    assert judged(xp, dict(cost=1.0) | same, dict(cost=0.5) | same, predicted=0.5).accepted


def test_where_the_cost_is_flat_to_rounding_the_decrement_decides(xp):
    lower = judged(xp, dict(decrement=1e-16), dict(cost=1 + 1e-15, decrement=1e-17), predicted=1e-16)
    assert lower.accepted and lower.by_gradient
    assert (int(lower.stalls), float(lower.ratio), float(lower.relative)) == (0, 1.0, 1e-16)
    higher = judged(xp, dict(decrement=1e-16), dict(cost=0.9, decrement=1e-15), predicted=1e-16, stalls=1)
    assert not higher.accepted
    assert (int(higher.stalls), float(higher.ratio)) == (2, 0.0)
    equal = judged(xp, dict(decrement=1e-16), dict(decrement=1e-16), predicted=1e-16)
    assert not equal.accepted


def test_the_rounding_of_the_cost_is_relative(xp):
    edge = 4 * ROUNDING
    assert judged(xp, dict(cost=4.0), dict(cost=4.0), predicted=0.9 * edge).by_gradient
    assert judged(xp, dict(cost=4.0), dict(cost=4.0), predicted=0.0).by_gradient
    assert not judged(xp, dict(cost=4.0), dict(cost=4.0), predicted=edge, stalls=1).by_gradient
    assert int(judged(xp, dict(cost=4.0), dict(cost=4.0), predicted=edge, stalls=1).stalls) == 0
    assert not judged(xp, dict(cost=4.0), dict(cost=4.0, finite=False), predicted=0.0).by_gradient


# ---------------------------------------------------------------------------------------------------------------------
# the radius


@pytest.mark.parametrize(
    "ratio, length, radius",
    [
        (0.1, 4.0, 1.0),  # a quarter of the step
        (0.2, 4.0, 1.0),
        (0.25, 4.0, 8.0),
        (0.5, 8.0, 8.0),
        (0.75, 8.0, 8.0),
        (0.9, 8.0, 16.0),
        (0.9, 7.7, 16.0),
        (0.9, 7.6, 8.0),  # right, but inside
        (0.9, 4.0, 8.0),
        (0.5, 7.9, 8.0),  # at the edge, but not right
        (0.999, 8.0, 16.0),
        (1.0001, 8.0, 80.0),  # all but linear
        (0.9999, 8.0, 80.0),
        (1.0, 8.0, 8000.0),
        (1.5, 8.0, 16.0),
    ],
)
def test_the_radius_follows_the_model(xp, ratio, length, radius):
    """Doubled only where the model was right and the step at the edge; far more where the model is all but linear."""
    assert float(rules.next_radius(xp, 8.0, xp.asarray(ratio), length)) == pytest.approx(radius, rel=1e-3)


def test_the_radius_is_never_zero(xp):
    assert float(rules.next_radius(xp, 8.0, xp.asarray(0.0), 0.0)) == rules.LEAST_RADIUS


def test_the_first_radius_is_the_effect_of_the_parameters_or_of_the_newton_step(xp):
    def first(**values):
        return float(rules.first_radius(xp, at(xp, **values)))

    assert first() == 5.0  # (3, 4) in units of 1
    assert first(params=[0.3, 0.4], cost=0.0) == pytest.approx(0.5)
    d = HatSpace(xp.asarray([0.5, 4.0]), None, None, None)
    assert first(hat=d) == pytest.approx(np.hypot(6, 1))
    assert first(longest=[1.0, 0.0]) == 3.0  # the other has no effect
    assert first(hat=HatSpace(xp.asarray([1.0, 0.0]), None, None, None)) == 3.0  # the other is held
    assert first(params=[0.0, 0.0], newton=[5.0, 12.0]) == 13.0
    assert first(newton=[5.0, 12.0]) == 5.0
    assert first(cost=8e6) == pytest.approx(0.01 * 4000)  # of residuals that are far larger
    assert first(params=[0.0, 0.0], cost=0.0) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# termination


def test_scipys_tests_propose(xp):
    def proposed(relative, ratio, step, by_gradient=False, stalls=0, ftol=1e-8, actual=1.0, size=1.0):
        given = [xp.asarray(each) for each in (True, actual, ratio, relative, by_gradient, stalls)]
        return int(rules.proposal(xp, rules.Verdict(*given), xp.asarray(step), size, Limits(ftol=xp.asarray(ftol))))

    assert proposed(1e-9, 0.9, 1.0) == rules.FTOL
    assert proposed(1e-9, 0.26, 1.0) == rules.FTOL
    assert proposed(1e-9, 0.25, 1.0) == proposed(1e-8, 0.9, 1.0) == 0  # the model was wrong; not below the tolerance
    assert proposed(1e-3, 0.9, 1e-9) == rules.XTOL
    assert proposed(1e-3, 0.9, 1e-9, size=0.05) == 0
    assert proposed(1e-3, 0.9, 0.9e-16, size=0.0) == rules.XTOL  # xtol^2, from the origin
    assert proposed(1e-3, 0.9, 1e-8 * 1e-8, size=0.0) == 0
    assert proposed(np.nan, 0.0, 1e-9, actual=np.nan) == 0  # the trial was not finite
    assert proposed(1e-9, 0.9, 1e-9) == rules.FTOL_XTOL
    assert proposed(1e-3, 0.0, 1.0, by_gradient=True, stalls=1) == rules.FTOL
    assert proposed(1e-3, 0.0, 1e-9, by_gradient=True, stalls=1) == rules.XTOL
    assert proposed(1e-16, 1.0, 1.0, by_gradient=True) == rules.FTOL
    assert proposed(1e-16, 1.0, 1.0, by_gradient=True, ftol=1e-15) == 0  # a tolerance below rounding: by the gradient alone
    assert proposed(1e-16, 1.0, 1.0, ftol=1e-15) == rules.FTOL
    assert proposed(1e-16, 0.0, 1.0, by_gradient=True, stalls=2, ftol=1e-15) == 0
    assert proposed(1e-16, 0.0, 1.0, by_gradient=True, stalls=3, ftol=1e-15) == rules.TO_ROUNDING
    assert proposed(1e-16, 0.0, 1.0, by_gradient=True, stalls=1, ftol=ROUNDING) == 0


def followed(xp, there, step=1.0, predicted=0.5, limits=TOLERANCES, **course):
    """From a point of cost 2 with a radius of 8, by a step (step, 0) that was twice as long in hat space."""
    vector, here = xp.asarray([step, 0.0]), at(xp, cost=2.0, n_full=1)
    before = rules.Course(here, Step(vector, 2 * vector, xp.asarray(predicted), True), 8.0, 3.0, 5)._replace(**course)
    return rules.follow(xp, before, at(xp, **there), limits, lambda accepted, new, old: new if accepted else old)


def test_an_accepted_trial_is_where_the_fit_stands(xp):
    course = followed(xp, dict(cost=1.6, params=[7.0, 4.0]))
    assert (float(course.here.params[0]), course.nfev) == (7.0, 6)
    assert (float(course.radius), float(course.alpha)) == (8.0, 3.0)
    assert not course.proposed and not course.passed and not course.hopeless


def test_where_a_bound_shortens_a_parameter_no_longer_the_radius_is_in_its_new_units(xp):
    """The step was 2 long where the distance to the bound was part of its scale; it is 100 long in that of its column."""
    shortened = HatSpace(xp.asarray([0.5, 1.0]), xp.asarray([1.0, 0.0]), None, None)
    here = at(xp, cost=2.0, n_full=1, hat=shortened)
    free = HatSpace(xp.asarray([0.01, 1.0]), xp.zeros(2), None, None)
    assert float(followed(xp, dict(cost=1.6, hat=free), here=here).radius) == 8.0 * 50
    still = shortened._replace(d=free.d)  # nearer to the bound
    assert float(followed(xp, dict(cost=1.6, hat=still), here=here).radius) == 8.0
    wider = free._replace(d=xp.asarray([5.0, 1.0]))  # never shorter
    assert float(followed(xp, dict(cost=1.6, hat=wider), here=here).radius) == 8.0


def test_a_refused_trial_leaves_the_fit_where_it_was_in_a_smaller_ball(xp):
    course = followed(xp, dict(cost=2.5, params=[7.0, 4.0]))
    assert (float(course.here.params[0]), int(course.here.n_full), course.nfev) == (3.0, 0, 6)
    assert (float(course.radius), float(course.alpha)) == (0.5, 48.0)  # a quarter of 2; alpha times 8 / 0.5


def test_a_finite_start_is_accepted_whatever_its_cost(xp):
    start, there = rules.Course(Point(), Step()), at(xp, cost=1e300, n_faded=2, floored=9)
    course = rules.follow(xp, start, there, TOLERANCES, lambda accepted, new, old: new if accepted else old)
    assert (float(course.here.cost), course.nfev, float(course.alpha)) == (1e300, 1, 0.0)
    assert not course.proposed and not course.passed and not course.hopeless
    assert float(followed(xp, dict(cost=1.0), nfev=0).radius) == 5.0  # that of a start
    assert not rules.judge(xp, Point(), at(xp, finite=False), Step().predicted, 0).accepted


def test_a_small_gradient_proposes_at_the_point_where_the_fit_now_stands(xp):
    assert followed(xp, dict(cost=1.6, optimality=0.9e-8)).proposed == rules.GTOL
    assert followed(xp, dict(cost=1.6, optimality=1e-8)).proposed == 0
    assert followed(xp, dict(cost=2.5, optimality=0.9e-8)).proposed == 0  # refused
    assert followed(xp, dict(cost=1.6, optimality=0.0), limits=Limits(gtol=0.0)).proposed == rules.GTOL
    assert followed(xp, dict(cost=1.6, optimality=1e-300), limits=Limits(gtol=0.0)).proposed == 0
    assert followed(xp, dict(cost=2 - 1e-9), step=1e-8, predicted=1e-9).proposed == rules.FTOL_XTOL


def test_tests_that_have_passed_are_forgotten_after_a_step_that_gains_much(xp):
    assert followed(xp, dict(cost=2 - 1.9e-3), predicted=2e-3, passed=True).passed  # 0.95e-3 of it
    assert not followed(xp, dict(cost=2 - 2.1e-3), predicted=2e-3, passed=True).passed
    assert not followed(xp, dict(cost=2 - 1.9e-3), predicted=2e-3).passed
    assert followed(xp, dict(cost=2 - 1e-9), predicted=1e-9).passed
    assert followed(xp, dict(cost=1.0, optimality=0.0)).passed


def test_three_refusals_by_the_gradient_leave_no_hope(xp):
    verdict = rules.Course(None, None).verdict
    for stalls, hopeless in ((1, False), (2, True)):
        course = followed(xp, dict(decrement=0.2), predicted=1e-16, verdict=verdict._replace(stalls=stalls))
        assert bool(course.hopeless) == hopeless


@pytest.mark.parametrize(
    "proposed, arrived, hopeless, nfev, passed, status",
    [
        (0, False, False, 9, False, rules.RUNNING),
        (0, True, False, 9, False, rules.RUNNING),
        (rules.GTOL, True, False, 9, False, rules.GTOL),
        (rules.XTOL, True, False, 9, False, rules.XTOL),
        (rules.XTOL, True, True, 10, True, rules.XTOL),
        (rules.XTOL, False, False, 9, False, rules.RUNNING),
        (rules.XTOL, False, True, 9, False, rules.STUCK),
        (0, False, True, 10, False, rules.STUCK),
        (0, True, True, 9, False, rules.TO_ROUNDING),
        (0, True, False, 10, False, rules.EVALUATIONS),
        (rules.XTOL, False, False, 10, True, rules.STUCK),
    ],
)
def test_a_fit_ends_where_a_proposal_has_arrived_or_nothing_leads_on(xp, proposed, arrived, hopeless, nfev, passed, status):
    state = dict(proposed=proposed, hopeless=hopeless, nfev=nfev, passed=passed)
    course = rules.Course(None, None)._replace(**{name: xp.asarray(value) for name, value in state.items()})
    assert int(rules.finished(xp, course, xp.asarray(arrived), 10)) == status


ULP = 1 + 2.0**-52


@pytest.mark.parametrize(
    "first, second, better",
    [
        ((10.0, False), (9.0, False), True),  # a lower chi2 counts, success or not
        ((10.0, True), (9.0, False), True),
        ((10.0, False), (11.0, True), False),
        ((10.0 * ULP, True), (10.0, False), False),  # at one level success counts
        ((10.0, False), (10.0 * ULP, True), True),
        ((10.0, False), (10.0 * (1 + 1e-6), True), False),
        ((12.0, True), (10.0, True), True),
        ((10.0, False), (10.0, False), False),
        ((1e-6, True), (5e-7, False), False),  # the rounding of both
        ((5e-7, False), (5e-7, True), False),  # where there is nothing to be gained
        ((2e-6, False), (2e-6, True), True),
        ((10.0, False), (np.nan, False), False),
    ],
)
def test_of_two_tries_that_with_the_lower_chi2_counts_and_at_one_level_that_with_success(xp, first, second, better):
    numbers = [xp.asarray(each) for each in (*first, *second)]
    assert bool(rules.is_better(xp, *numbers, rounding=1e-6)) == better


def test_a_fit_has_converged_near_its_optimum_or_at_rounding(xp):
    def converged(distance, accuracy=0.01, **values):
        return bool(rules.converged(xp, at(xp, distance=distance, **dict(decrement=1.0) | values), accuracy))

    assert converged(0.009)
    assert not converged(0.01)
    assert converged(5.0, decrement=1e-30, floor=1e-30)  # exact data
    assert not converged(5.0, decrement=1e-30, floor=0.9e-30)
    assert converged(5.0, accuracy=np.inf)  # SciPy's tests alone
    assert not converged(0.0, floored=1)  # counts where the mean is floored
    assert not converged(0.0, floored=1, floor=2.0, accuracy=np.inf)
    assert converged(5.0, dof=1, accuracy=6.0)
    assert converged(np.nan, dof=0, cost=2.0, decrement=1.9e-4)
    assert not converged(np.nan, dof=0, cost=2.0, decrement=2.1e-4)
    assert not converged(np.nan, dof=0, cost=2.0, decrement=0.5, accuracy=0.5)
    assert converged(np.nan, dof=0, decrement=0.9, accuracy=5.0)
    assert not converged(np.nan, dof=0, decrement=1.1, accuracy=5.0)  # no more than the cost itself


def test_statuses_have_scipys_numbers_and_those_of_maps():
    own = rules.EVALUATIONS, rules.GTOL, rules.FTOL, rules.XTOL, rules.FTOL_XTOL, rules.TO_ROUNDING
    assert own == (0, 1, 2, 3, 4, 5)
    assert [*map(int, MapStatus)] == [*range(14)]
    assert (rules.STUCK, rules.UNDETERMINED) == (MapStatus.STUCK, MapStatus.UNDETERMINED)
    assert rules.RUNNING == 255 > max(MapStatus)  # of a byte


# ---------------------------------------------------------------------------------------------------------------------
# distance and rounding


def test_the_distance_is_in_standard_errors_and_counts_slow_convergence(xp):
    def distance(decrement, variance, kappa=0.0, floor=0.0):
        return float(rules.distance(xp, xp.asarray(decrement), xp.asarray(variance), kappa, floor))

    assert distance(2.0, 4.0) == 1.0
    assert distance(2.0, 4.0, 0.75) == 4.0  # 1 + 0.75 + 0.75^2 + ...
    assert distance(2.0, 4.0, 1.5) == pytest.approx(1e3)  # rounding does not contract
    assert distance(0.0, 0.0) == 0.0
    assert distance(2.0, 0.0) == 2.0  # of exact data, by their rounding
    assert np.isnan(distance(2.0, np.nan))
    assert distance(0.0, np.nan) == 0.0
    assert distance(2.0, 1e-30, floor=2.0) == 0.0  # exact data
    assert distance(2.0, 4.0, floor=1.9) == 1.0


def test_rounding_of_a_parameter_inside_the_model_is_part_of_the_floor(xp):
    """A centre of 2.4e6 and a width of 0.03: the difference of time and centre is known to 1e-8 of the width."""
    params, columns = xp.asarray([2.4e6]), xp.asarray([1 / 0.03 * 10])  # 100 points that change by 1 over a width
    expected = (2 * rules.EPS * 2.4e6 / 0.03) ** 2
    assert float(rules.rounding_floor(0.0, params, columns, 100)) == pytest.approx(expected, rel=1e-9, abs=0)
    assert float(rules.rounding_floor(1e12, params, columns, 100)) == pytest.approx(
        expected + 1e12 * ROUNDING**2, rel=1e-9, abs=0
    )
    assert float(rules.rounding_floor(3.0, params * 0, columns, 100)) == 3 * ROUNDING**2
    both = rules.rounding_floor(0.0, xp.asarray([3.0, 1.0]), xp.asarray([1.0, 4.0]), 10)
    assert float(both) == pytest.approx((2 * rules.EPS) ** 2 * 25 * 2 / 10, rel=1e-9, abs=0)
    assert float(rules.rounding_floor(0.0, params, columns, 0)) == pytest.approx(100 * expected, rel=1e-9, abs=0)


def test_data_that_are_zero_are_measured_by_what_the_model_has_been(xp):
    reach, columns = xp.asarray([3.0, 4.0]), xp.asarray([2.0, 1.0])
    assert float(rules.magnitude(xp, xp.asarray(0.0), reach, columns)) == 52.0
    assert float(rules.magnitude(xp, xp.asarray(0.5), reach, columns)) == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# parameters


def test_a_parameter_at_its_bound_is_held_where_rounding_is_all_that_lies_between(xp):
    v = xp.asarray([2e-16, 1e-3, 2e-16, 5e-324, 1e-16, 1.9e-15, 4 * rules.SAME])
    params = xp.asarray([1.0, 1.0, 1.0, 5e-324, 1e-16, 2.0, 4.0])  # the fifth has a bound at 0
    stiffening = xp.asarray([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = rules.held(xp, params, v, stiffening)
    np.testing.assert_array_equal(found, [True, False, False, True, False, False, True])


def test_a_column_is_remembered_but_not_for_ever(xp):
    scale = rules.scale(xp, xp.asarray([1.0, 2.0, 0.0, 0.0, 0.5, 0.5]), xp.asarray([1e3, 1e26, 5.0, 0.0, 0.5, 1e26]))
    np.testing.assert_array_equal(scale, [1e-3, 0.5 / rules.LENGTH_MEMORY, 0.2, 1.0, 2.0, 2 / rules.LENGTH_MEMORY])


def test_a_parameter_is_undetermined_where_its_column_is_zero_or_has_faded(xp):
    edge = 3 * rules.VISIBLE  # of data whose sum of squares is 9
    columns = xp.asarray([0.0, 1e-20, 1e-20, 1.0, edge, edge, 2e-6])
    longest, span = xp.asarray([0.0, 1.0, 1.0, 1e26, 4.0, edge, 1.0]), xp.asarray([1.0, 5.0, 1e19, 2.0, 1.0, 0.0, 0.0])
    found = rules.undetermined(xp, columns, longest, span, xp.asarray(9.0))
    np.testing.assert_array_equal(found, [True, True, False, False, True, False, False])
    again = rules.undetermined(xp, columns, longest, span * 1.1, xp.asarray(9.0))
    np.testing.assert_array_equal(again, [True, True, False, False, False, False, False])


def test_the_span_of_a_parameter_is_what_it_has_moved_or_would_have_alone(xp):
    params, start, longest = xp.asarray([1e6, 1e6, 3.0]), xp.asarray([1e6, 1e6 - 7, 3.0]), xp.asarray([2.0, 2.0, 0.0])
    np.testing.assert_array_equal(rules.span(xp, params, start, xp.asarray(8.0), longest), [2.0, 7.0, 0.0])


def test_what_two_bounds_leave_to_a_parameter_has_to_show_in_the_data(xp):
    bounds, columns = (xp.asarray([0.0, 0.0, 0.0]), xp.asarray([2.0, 2.0, np.inf])), xp.asarray([1e-12, 1e-3, 0.0])
    unmoved, unseen = rules.below_noise(xp, columns, xp.asarray(0.0), 10, bounds, xp.asarray(1.0))
    assert not np.any(unmoved)
    np.testing.assert_array_equal(unseen, [True, False, False])
    unmoved, unseen = rules.below_noise(xp, columns, xp.asarray(5e12), 1000, bounds, xp.asarray(0.0))
    np.testing.assert_array_equal(unmoved, [True, True, False])
    np.testing.assert_array_equal(unseen, [True, False, False])


def test_an_effect_vanishes_beside_the_data_or_where_they_are_zero_beside_the_one_before(xp):
    effect, before = xp.asarray([1e-12, 1e-12, 1e-9]), xp.asarray([1.0, 1e-3, 1e9])
    np.testing.assert_array_equal(rules.vanishes(xp, effect, before, xp.asarray(1.0)), [True, True, False])
    np.testing.assert_array_equal(rules.vanishes(xp, effect, before, xp.asarray(0.0)), [True, False, True])
    np.testing.assert_array_equal(rules.rounding_of_chi2(xp, xp.asarray([4.0, 0.0])), [4 * ROUNDING**2, np.inf])


def test_a_trial_is_the_point_itself_to_rounding(xp):
    trial, params = xp.asarray([2 + 2 * rules.SAME, 2 + 3 * rules.SAME, 0, 1e-300, np.nan]), xp.asarray([2.0, 2.0, 0, 0, 1])
    np.testing.assert_array_equal(rules.same(xp, trial, params), [True, False, True, False, True])


def test_starts_are_moved_off_their_bounds_in_any_unit(xp):
    def moved(params, lower, upper, share=1e-10):
        return np.asarray(rules.off_the_bounds(xp, *map(xp.asarray, (params, lower, upper)), share))

    inf = np.inf
    np.testing.assert_array_equal(moved([3e-12], [0.0], [1e-11]), [3e-12])  # not the middle
    np.testing.assert_allclose(moved([0.0], [0.0], [1e-11]), [1e-21], rtol=1e-12)
    np.testing.assert_allclose(moved([1e-11], [0.0], [1e-11]), [1e-11 - 1e-21], rtol=1e-15)
    np.testing.assert_array_equal(moved([5e-9, -7.0], [0.0, -inf], [inf, inf]), [5e-9, -7.0])
    np.testing.assert_array_equal(moved([0.0, 0.0], [-inf, 0.0], [0.0, inf], share=0.5), [-0.5, 0.5])  # of 1
    np.testing.assert_array_equal(moved([4.0, -4.0], [4.0, -inf], [inf, -4.0], share=0.5), [6.0, -6.0])  # of the bound
    np.testing.assert_array_equal(moved([6.0, -6.0], [-inf, -8.0], [8.0, inf], share=0.5), [4.0, -4.0])
    np.testing.assert_array_equal(moved([8.0], [0.5], [inf], share=0.5), [8.0])
    np.testing.assert_array_equal(moved([1.0], [0.5], [inf], share=0.5), [1.0])  # of the parameter, where that is larger
    assert 1 < moved([1.0], [1.0], [inf])[0] < 1 + 1e-9
    assert 1 < moved([1.0], [1.0], [2.0], share=0.0)[0] < 1 + 1e-15
    assert 2 - 1e-15 < moved([2.0], [1.0], [2.0], share=0.0)[0] < 2
    np.testing.assert_array_equal(moved([1.0], [1.0], [3.0], share=0.6), [2.0])  # the middle, where nothing else is left


def test_a_parameter_is_at_the_bound_that_its_error_cannot_tell_it_from(xp):
    """At the lower one, near but not at it by the error, or by the interval; at the upper one; between; without bounds."""
    lower = xp.asarray([1.0, 1.0, 1.0, 0.0, 0.0, -np.inf])
    upper = xp.asarray([9.0, 9.0, 1.1, 2.0, 2.0, np.inf])
    params = xp.asarray([1.0009, 1.0011, 1.0002, 1.9999, 1.5, 5.0])
    perr = xp.asarray([0.1, 0.1, 0.1, 0.1, 1e3, 0.1])
    np.testing.assert_array_equal(rules.at_bounds(params, perr, lower, upper), [-1, 0, 0, 1, 0, 0])


def test_an_error_that_says_nothing_counts_only_where_parameter_and_bound_agree(xp):
    """The second and third are known to 1e8 of their size: three digits of bound and parameter are the same, or not. The
    fourth has a bound at 0, the fifth one that is as good as that; the sixth has an infinite error within an interval, the
    seventh without one. The last has an upper bound that is not near."""
    inf = np.inf
    lower, upper = (
        xp.asarray([1.0, 1.0, 1.0, 0.0, 0.05, 0.0, 0.0, -inf]),
        xp.asarray([inf, inf, inf, inf, inf, 1e6, inf, 1.0]),
    )
    params = xp.asarray([1.5, 1.001, 1.5, 1e-3, 100.0, 1.0, 1.0, 0.5])
    perr = xp.asarray([1e6, 1e8, 1e8, 1e8, 1e10, inf, inf, 1e8])
    np.testing.assert_array_equal(rules.at_bounds(params, perr, lower, upper), [-1, -1, 0, -1, -1, -1, 0, 0])
    nearly = xp.asarray([1 + 0.5 * ROUNDING])
    np.testing.assert_array_equal(rules.at_bounds(nearly, xp.asarray([0.0]), xp.asarray([1.0]), xp.asarray([2.0])), [-1])
