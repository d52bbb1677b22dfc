"""The rules of acceptance, radius and termination, with numbers worked out by hand; for NumPy and JAX alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.kernels import rules


class At(NamedTuple):
    cost: float = 1.0
    decrement: float = 0.1
    floored: int = 0
    n_faded: int = 0
    finite: bool = True


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"], autouse=True)
def xp(request):
    with jax.enable_x64(True):
        yield request.param


def judged(xp, here, there, predicted, stalls=0):
    here, there = (At(*map(xp.asarray, each)) for each in (here, there))
    return rules.judge(xp, here, there, xp.asarray(predicted), xp.asarray(stalls))


def test_a_lower_cost_is_accepted_where_the_model_has_promised_about_as_much(xp):
    verdict = judged(xp, At(cost=1.0), At(cost=0.6), predicted=0.5)
    assert verdict.accepted and not verdict.by_gradient
    assert float(verdict.ratio) == pytest.approx(0.8)
    assert float(verdict.relative) == pytest.approx(0.4)


def test_a_lower_cost_by_luck_is_refused(xp):
    assert not judged(xp, At(cost=1.0), At(cost=0.92), predicted=0.5).accepted  # 16 % of what was promised
    assert judged(xp, At(cost=1.0), At(cost=0.88), predicted=0.5).accepted  # 24 %


@pytest.mark.parametrize("trap", [At(0.5, floored=1), At(0.5, n_faded=1), At(0.5, finite=False)])
def test_a_trial_from_which_nothing_leads_back_is_refused_and_the_radius_shrinks(xp, trap):
    verdict = judged(xp, At(cost=1.0), trap, predicted=0.5)
    assert not verdict.accepted
    assert float(rules.next_radius(xp, 8.0, verdict.ratio, 4.0)) == 1.0


def test_where_the_cost_is_flat_to_rounding_the_decrement_decides(xp):
    lower = judged(xp, At(decrement=1e-16), At(cost=1 + 1e-15, decrement=1e-17), predicted=1e-16)
    assert lower.accepted and lower.by_gradient
    assert int(lower.stalls) == 0
    higher = judged(xp, At(decrement=1e-16), At(decrement=1e-15), predicted=1e-16, stalls=1)
    assert not higher.accepted
    assert int(higher.stalls) == 2


@pytest.mark.parametrize(
    "ratio, length, radius",
    [(0.1, 4.0, 1.0), (0.5, 8.0, 8.0), (0.9, 8.0, 16.0), (0.9, 4.0, 8.0), (1.0001, 8.0, 80.0), (1.0, 8.0, 8000.0)],
)
def test_the_radius_follows_the_model(xp, ratio, length, radius):
    """Doubled only where the model was right and the step at the edge; far more where the model is all but linear."""
    assert float(rules.next_radius(xp, 8.0, xp.asarray(ratio), length)) == pytest.approx(radius, rel=1e-3)
    assert float(rules.next_radius(xp, 8.0, xp.asarray(0.0), 0.0)) > 0


def test_scipys_tests_propose(xp):
    def proposed(relative, ratio, step, by_gradient=False, stalls=0, ftol=1e-8):
        given = [xp.asarray(each) for each in (True, ratio, relative, by_gradient, stalls)]
        return int(rules.proposal(xp, rules.Verdict(*given), xp.asarray(step), 1.0, xp.asarray(ftol), 1e-8))

    assert proposed(1e-9, 0.9, 1.0) == rules.FTOL
    assert proposed(1e-9, 0.1, 1.0) == 0  # the model was wrong
    assert proposed(1e-3, 0.9, 1e-9) == rules.XTOL
    assert proposed(1e-9, 0.9, 1e-9) == rules.FTOL_XTOL
    assert proposed(1e-3, 0.0, 1.0, by_gradient=True, stalls=1) == rules.FTOL
    assert proposed(1e-16, 1.0, 1.0, by_gradient=True, ftol=1e-15) == 0  # a tolerance below rounding: by the gradient alone
    assert proposed(1e-16, 0.0, 1.0, by_gradient=True, stalls=3, ftol=1e-15) == rules.TO_ROUNDING


def test_the_distance_is_in_standard_errors_and_counts_slow_convergence(xp):
    def distance(decrement, variance, kappa=0.0, floor=0.0):
        return float(rules.distance(xp, xp.asarray(decrement), xp.asarray(variance), kappa, floor))

    assert distance(2.0, 4.0) == 1.0
    assert distance(2.0, 4.0, 0.75) == 4.0  # 1 + 0.75 + 0.75^2 + ...
    assert distance(2.0, 4.0, 1.5) == pytest.approx(1e3)  # rounding does not contract
    assert distance(0.0, 0.0) == 0.0
    assert np.isnan(distance(2.0, np.nan))
    assert distance(2.0, 1e-30, floor=3.0) == 0.0  # exact data


def test_contraction_is_that_of_two_full_steps(xp):
    here, there = (At(decrement=xp.asarray(each)) for each in (4.0, 1.0))
    assert float(rules.contraction(xp, here, there, True, True)) == 0.5
    assert float(rules.contraction(xp, here, there, True, False)) == 0.0


def test_a_fit_has_converged_near_its_optimum_or_at_rounding(xp):
    def converged(distance, decrement=1.0, floor=0.0, dof=10, floored=0, accuracy=0.01, cost=1.0):
        state = map(xp.asarray, (distance, decrement, cost, floor, dof, floored))
        return bool(rules.converged(xp, *state, accuracy))

    assert converged(0.009)
    assert not converged(0.011)
    assert converged(5.0, decrement=1e-30, floor=1e-29)  # exact data
    assert converged(5.0, accuracy=np.inf)  # SciPy's tests alone
    assert not converged(0.0, floored=1)  # counts where the mean is floored
    assert converged(np.nan, dof=0, decrement=0.9e-4)
    assert not converged(np.nan, dof=0, decrement=1.1e-4)


def test_rounding_of_a_parameter_inside_the_model_is_part_of_the_floor(xp):
    """A centre of 2.4e6 and a width of 0.03: the difference of time and centre is known to 1e-8 of the width."""
    params, columns = xp.asarray([2.4e6]), xp.asarray([1 / 0.03 * 10])  # 100 points that change by 1 over a width
    expected = (2 * rules.EPS * 2.4e6 / 0.03) ** 2
    assert float(rules.rounding_floor(0.0, params, columns, 100)) == pytest.approx(expected)
    assert float(rules.rounding_floor(1.0, params * 0, columns, 100)) == rules.ROUNDING**2


def test_data_that_are_zero_are_measured_by_what_the_model_has_been(xp):
    reach, columns = xp.asarray([3.0, 4.0]), xp.asarray([1.0, 1.0])
    assert float(rules.magnitude(xp, xp.asarray(0.0), reach, columns)) == 25.0
    assert float(rules.magnitude(xp, xp.asarray(7.0), reach, columns)) == 7.0


def test_a_parameter_at_its_bound_is_held_where_rounding_is_all_that_lies_between(xp):
    v, params = xp.asarray([2e-16, 1e-3, 2e-16, 5e-324]), xp.asarray([1.0, 1.0, 1.0, 5e-324])
    np.testing.assert_array_equal(rules.held(xp, params, v, xp.asarray([1.0, 1.0, 0.0, 1.0])), [True, False, False, True])


def test_a_column_is_remembered_but_not_for_ever(xp):
    lengths = rules.scale_lengths(xp, xp.asarray([1.0, 1.0, 0.0]), xp.asarray([1e3, 1e26, 5.0]))
    np.testing.assert_array_equal(lengths, [1e3, rules.LENGTH_MEMORY, 5.0])


def test_no_step_is_far_longer_than_its_parameter_has_been(xp):
    d = rules.reined_in(xp, xp.asarray([1e44, 1.0, 1e44]), xp.asarray([10.0, 10.0, 0.0]), 2.0)
    np.testing.assert_array_equal(d, [500.0, 1.0, 1e44])  # of a parameter that is 0 nothing is known


def test_a_parameter_is_undetermined_where_its_column_is_zero_or_has_faded(xp):
    columns, longest = xp.asarray([0.0, 1e-20, 1e-20, 1.0]), xp.asarray([0.0, 1.0, 1.0, 1e26])
    found = rules.undetermined(xp, columns, longest, xp.asarray([1.0, 5.0, 1e19, 2.0]), 1.0)
    np.testing.assert_array_equal(found, [True, True, False, False])


def test_starts_are_moved_off_their_bounds_in_any_unit(xp):
    def moved(params, lower, upper, share=1e-10):
        return np.asarray(rules.off_the_bounds(xp, *map(xp.asarray, (params, lower, upper)), share))

    inf = np.inf
    np.testing.assert_array_equal(moved([3e-12], [0.0], [1e-11]), [3e-12])  # not the middle
    np.testing.assert_allclose(moved([0.0], [0.0], [1e-11]), [1e-21], rtol=1e-12)
    np.testing.assert_array_equal(moved([5e-9, -7.0], [0.0, -inf], [inf, inf]), [5e-9, -7.0])
    assert 1 < moved([1.0], [1.0], [inf])[0] < 1 + 1e-9
    assert 1 < moved([1.0], [1.0], [2.0], share=0.0)[0] < 1 + 1e-15
