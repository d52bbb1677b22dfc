"""The loop with a dense J in place of data."""

import itertools
import signal
import time
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

from dask_nlsq.base.x64 import float64
from dask_nlsq.engine.condensed import Condensed
from dask_nlsq.engine.waiting import ToldToLeave
from dask_nlsq.solve.trust_region import NotFiniteAtStart, Options, solve


class Dense:
    """A sweep over residuals given as one function of params."""

    def __init__(self, residual):
        self.residual, self.calls = residual, Counter()

    def __call__(self, params, reduction):
        self.calls[reduction] += 1
        with float64():
            rows = np.column_stack([jax.jacfwd(self.residual)(jnp.asarray(params)), self.residual(jnp.asarray(params))])
        cost = 0.5 * float(rows[:, -1] @ rows[:, -1])
        if not np.isfinite(rows).all():
            return Condensed(np.full((len(params) + 1,) * 2, np.nan), cost, reduction)
        matrix = rows.T @ rows if reduction == "gram" else np.linalg.qr(rows, mode="r")
        if len(matrix) < len(params) + 1:
            matrix = np.vstack([matrix, np.zeros((len(params) + 1 - len(matrix), len(params) + 1))])
        return Condensed(matrix, cost, reduction)


def rosenbrock(params):
    return jnp.array([10 * (params[1] - params[0] ** 2), 1 - params[0]])


def options(p, lower=-np.inf, upper=np.inf, **rest):
    return Options(np.full(p, lower, dtype=float), np.full(p, upper, dtype=float), **rest)


@pytest.mark.parametrize("reduction, tr_solver", [("gram", "exact"), ("qr", "exact"), ("auto", "exact"), ("auto", "cg")])
def test_rosenbrock(reduction, tr_solver):
    solution = solve(Dense(rosenbrock), np.array([-1.2, 1.0]), options(2, reduction=reduction, tr_solver=tr_solver))
    np.testing.assert_allclose(solution.params, [1, 1], rtol=1e-6)
    assert solution.status > 0


@pytest.mark.slow
@pytest.mark.parametrize("tr_solver", ["exact", "cg"])
def test_near_the_optimum_bounds_that_are_far_from_it_cost_no_sweep(tr_solver):
    t = jnp.linspace(0, 1, 200)
    y = 2 * np.exp(-3 * t) + 0.5 + 0.01 * np.random.default_rng(0).normal(size=200)
    scales = np.array([1.0, 1.0, 1e5])  # of parameters: a bound is as far as they are large

    def residual(params):
        a, b, c = params / scales
        return a * jnp.exp(-b * t) + c - y

    def linear(params):
        return residual(jnp.array([params[0], 3.0, params[1]]))

    start = np.array([2.0, 3.0, 5e4])  # the truth, from which the noise has moved the optimum
    free = solve(Dense(residual), start, options(3, tr_solver=tr_solver))
    bounded = Options(np.array([0, 0, 0.0]), np.array([5, 9, 1e5]), tr_solver=tr_solver)
    assert solve(Dense(residual), start, bounded).nfev <= free.nfev
    two = Options(np.array([0.0, 0.0]), np.array([5, 1e5]), tr_solver=tr_solver)
    assert solve(Dense(linear), np.array([2.0, 5e4]), two).nfev == 2  # the second is the optimum, by its gradient


@pytest.mark.parametrize(
    "upper, tr_solver", [([0.5, 2.0], "exact"), ([2.0, 0.3], "exact"), ([0.9, 0.7], "exact"), ([0.9, 0.7], "cg")]
)
def test_active_bounds_give_scipys_optimum(upper, tr_solver):
    limits = Options(np.array([-2.0, -2.0]), np.array(upper), tr_solver=tr_solver, ftol=1e-14, xtol=1e-14, gtol=1e-14)
    found = solve(Dense(rosenbrock), np.array([-1.2, 0.2]), limits)
    with float64():
        theirs = least_squares(
            lambda p: np.asarray(rosenbrock(jnp.asarray(p))),
            [-1.2, 0.2],
            bounds=([-2, -2], upper),
            ftol=1e-14,
            xtol=1e-14,
            gtol=1e-14,
        )
    assert found.equations.cost == pytest.approx(theirs.cost, rel=1e-9)
    np.testing.assert_allclose(found.params, theirs.x, rtol=1e-6)
    assert np.all(found.params < upper)


def test_one_sweep_per_trial_step():
    sweep = Dense(rosenbrock)
    solution = solve(sweep, np.array([-1.2, 1.0]), options(2))
    assert sweep.calls.total() == solution.nfev == len(solution.history)


def test_gradient_finds_the_digits_that_the_cost_cannot_see():
    """Large residuals: where the cost is flat to rounding, the params still have 1e-8 to go."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 3, 200)
    y = 5 * np.exp(-1.3 * x) + rng.normal(0, 1, x.size)

    def residual(params):
        return params[0] * jnp.exp(-params[1] * x) - y

    solution = solve(Dense(residual), np.array([1.0, 1.0]), options(2, ftol=0.0, xtol=0.0, gtol=0.0))
    with float64():
        J = np.asarray(jax.jacfwd(residual)(jnp.asarray(solution.params)))
        r = np.asarray(residual(jnp.asarray(solution.params)))
    step = np.linalg.lstsq(J, -r)[0]
    assert solution.status == 5
    assert np.max(np.abs(step / solution.params)) < 1e-14
    assert any(0 <= record.predicted < 1e-15 * record.cost for record in solution.history[1:])


def test_ill_conditioned_columns_move_the_fit_to_qr():
    x = np.linspace(0, 1, 50)

    def residual(params):  # columns differ by 1e-6
        return params[0] * x + params[1] * (x + 1e-6 * x**2) - 2 * x - 1e-6 * x**2

    sweep = Dense(residual)
    solution = solve(sweep, np.zeros(2), options(2, ftol=1e-15, xtol=1e-15, gtol=1e-15))
    assert solution.equations.reduction == "qr"
    assert sweep.calls["qr"] > 0
    np.testing.assert_allclose(solution.params, [1, 1], rtol=1e-6)


def test_a_step_where_the_model_is_not_finite_is_refused():
    def residual(params):  # not a number beyond 1
        return jnp.array([jnp.sqrt(1 - params[0]) - 0.1, 0.0])

    solution = solve(Dense(residual), np.array([-3.0]), options(1))
    assert solution.params[0] == pytest.approx(0.99, abs=1e-6)
    assert any(not record.accepted for record in solution.history)


def test_not_finite_at_the_start_is_an_error():
    with pytest.raises(NotFiniteAtStart):
        solve(Dense(lambda params: jnp.log(params)), np.array([-1.0]), options(1))


def test_callback_can_stop():
    seen = []

    def stop_at_third(record):
        seen.append(record.nfev)
        if len(seen) == 3:
            raise StopIteration

    solution = solve(Dense(rosenbrock), np.array([-1.2, 1.0]), options(2, callback=stop_at_third))
    assert seen == [1, 2, 3]
    assert solution.status == -2


def test_max_nfev_ends_with_status_zero():
    solution = solve(Dense(rosenbrock), np.array([-1.2, 1.0]), options(2, max_nfev=4))
    assert (solution.status, solution.nfev) == (0, 4)
    assert solution.message == "The maximum number of function evaluations, 4, is exceeded."


@pytest.mark.parametrize(
    "tolerances, status, message",
    [
        (dict(gtol=1e-3), 1, "scaled gradient {optimality:.2e} < 1.00e-03."),
        (dict(ftol=1e-2), 2, "relative reduction {relative:.2e} < 1.00e-02."),
        (dict(xtol=1e-3), 3, "relative step {step:.2e} < 1.00e-03."),
        (
            dict(ftol=1e-2, xtol=1e-2),
            4,
            "relative reduction {relative:.2e} < 1.00e-02, relative step {step:.2e} < 1.00e-02.",
        ),
    ],
)
def test_a_message_has_the_value_and_its_threshold(tolerances, status, message):
    def residual(params):
        return jnp.array([params[0] - 1, params[1] - 2, 0.1 * params[0] ** 2, 1.0])

    given = dict(ftol=0.0, xtol=0.0, gtol=0.0) | tolerances
    solution = solve(Dense(residual), np.array([0.0, 1.0]), options(2, **given))
    last, previous = solution.history[-1], solution.history[-2]
    step = last.step_norm / np.linalg.norm(last.params)
    values = dict(optimality=solution.optimality, relative=last.actual / previous.cost, step=step)
    assert solution.status == status
    assert solution.message.endswith(message.format(**values))


def test_a_fit_whose_derivatives_are_wrong_is_stuck_and_says_how_far_it_is():
    class Wrong(Dense):
        def __call__(self, params, reduction):
            found = super().__call__(params, reduction)
            matrix = found.matrix.copy()
            matrix[:-1, -1] *= -1
            matrix[-1, :-1] *= -1
            return found._replace(matrix=matrix)

    solution = solve(Wrong(rosenbrock), np.array([-1.2, 1.0]), options(2, accuracy=0.01, reduction="gram"))
    assert solution.status == 11
    assert solution.message.startswith("No step lowers the cost any more, but by its quadratic model it could be lower by ")
    np.testing.assert_allclose(solution.params, [-1.2, 1.0], rtol=1e-12)


def test_a_parameter_without_effect_is_named():
    found = solve(Dense(lambda params: params[:1] - 1), np.zeros(2), options(2, names=("slope", "offset")))
    assert (found.status, np.isnan(found.distance)) == (12, True)
    assert found.message == "The model does not depend on offset at the point where the fit ended."
    assert solve(Dense(lambda params: params[:1] - 1), np.zeros(2), options(2, max_nfev=1)).status == 0
    assert "parameter 1" in solve(Dense(lambda params: params[:1] - 1), np.zeros(2), options(2)).message


def test_a_signal_ends_a_fit_at_the_best_point_so_far():
    class Signalled(Dense):
        def __call__(self, params, reduction):
            if self.calls.total() == 5:
                raise ToldToLeave(signal.SIGTERM)
            return super().__call__(params, reduction)

    solution = solve(Signalled(rosenbrock), np.array([-1.2, 1.0]), options(2))
    assert (solution.status, solution.nfev, len(solution.history)) == (-3, 5, 5)
    assert solution.equations.cost == min(record.cost for record in solution.history)


def test_a_record_tells_of_each_trial():
    """The first has no step; a refused one leaves the fit where it was."""
    begin = time.perf_counter()
    history = solve(Dense(rosenbrock), np.array([-1.2, 1.0]), options(2)).history
    seconds = [each.seconds for each in history]
    assert seconds[0] >= 0 and seconds == sorted(seconds) and seconds[-1] <= time.perf_counter() - begin
    assert np.isnan([history[0].actual, history[0].predicted, history[0].step_norm]).all()
    assert [(each.iteration, each.nfev) for each in history] == [(k, k + 1) for k in range(len(history))]
    assert not all(each.accepted for each in history)
    for before, each in itertools.pairwise(history):
        if each.accepted:
            assert before.cost - each.cost == pytest.approx(each.actual)
            assert np.linalg.norm(each.params - before.params) == pytest.approx(each.step_norm)
        else:
            assert each.actual < 0.2 * each.predicted
            np.testing.assert_array_equal(each.params, before.params)


def test_a_fit_that_has_arrived_by_lossy_sums_is_confirmed_by_a_sweep_that_is_not():
    x = np.linspace(0, 1, 50)

    def residual(params):  # columns differ by 1e-5: their condition is told by the first sweep, which the start already ends
        return params[0] * x + params[1] * (x + 1e-5 * x**2) - 2 * x - 1e-5 * x**2

    sweep = Dense(residual)
    solution = solve(sweep, np.ones(2), options(2))
    assert (sweep.calls["gram"], sweep.calls["qr"]) == (1, 1)
    assert (solution.nfev, solution.equations.reduction) == (1, "qr")
    assert solve(Dense(residual), np.ones(2), options(2, reduction="gram")).equations.reduction == "gram"


def test_x_scale_makes_units_irrelevant():
    """With x_scale="jac" the path is the same in any units of the params."""
    units = np.array([1e6, 1e-6])
    plain = solve(Dense(rosenbrock), np.array([-1.2, 1.0]), options(2))
    scaled = solve(Dense(lambda params: rosenbrock(params / units)), np.array([-1.2, 1.0]) * units, options(2, xtol=0.0))
    np.testing.assert_allclose(scaled.params / units, plain.params, rtol=1e-6)


def test_far_bounds_leave_the_path_as_it_is():
    """A curved valley, and noise that remains: with the bounds counted from afar there are twice as many sweeps."""
    valley = Dense(lambda params: jnp.append(rosenbrock(params), 10.0))
    bounds = dict(lower=np.array([-3.0, -2.0]), upper=np.array([1e3, 2e3]))
    free, counted, far = (
        solve(valley, np.array([-1.2, 1.0]), replace(options(2), **each))
        for each in ({}, bounds | dict(near_below=0.0), bounds)
    )
    assert far.nfev == free.nfev and far.nfev * 2 <= counted.nfev
    for found in (counted, far):
        np.testing.assert_allclose(found.params, 1.0, rtol=1e-5)
