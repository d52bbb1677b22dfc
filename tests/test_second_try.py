"""Fits that do not converge from p0: what they say, and the second try from their linear parameters."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import OptimizeWarning

from dask_nlsq import MapStatus, NotConvergedError, curve_fit, fit_groups, fit_map
from dask_nlsq.engine.condensed import Condensed, factor
from dask_nlsq.kernels.rules import EPS
from dask_nlsq.kernels.steps import Point
from dask_nlsq.solve import tries
from dask_nlsq.solve.trust_region import Options, Solution

X = np.linspace(0, 5, 200)
RNG = np.random.default_rng(0)
DECAYING = 3e9 * np.exp(-1.3 * X) + 5e8 + 1e7 * RNG.normal(size=200)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def test_amplitudes_that_are_nine_orders_off_are_found_by_the_second_try():
    seen = []
    fit = curve_fit(decay, X, DECAYING, [1, 1, 1], callback=seen.append)
    np.testing.assert_allclose(fit.popt, [3e9, 1.3, 5e8], rtol=0.02)
    assert fit.success
    assert "linear parameters solved for" in fit.message
    # the callback and the history see every evaluation of both
    assert [record.nfev for record in seen] == [record.nfev for record in fit.history] == [*range(1, fit.nfev + 1)]
    assert [record.iteration for record in fit.history] == [*range(fit.nfev)]
    assert np.all(np.diff([record.seconds for record in fit.history]) >= 0)
    assert abs(fit.sweeps - fit.nfev) < 8  # the second one may begin where the first has been


@pytest.mark.parametrize("loss", ["soft_l1", "cauchy", "arctan", pytest.param("huber", marks=pytest.mark.slow)])
@pytest.mark.parametrize("n_starts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_amplitudes_that_are_nine_orders_off_are_found_with_a_robust_loss(loss, n_starts):
    options = dict(loss=loss, f_scale=1e7)
    best = curve_fit(decay, X, DECAYING, [3e9, 1.3, 5e8], **options)
    fit = curve_fit(decay, X, DECAYING, [1, 1, 1], n_starts=n_starts, **options)
    assert fit.success
    assert np.all(abs(fit.popt - best.popt) < 0.01 * best.perr)


@pytest.mark.parametrize("most", [1, 20])
def test_the_second_try_never_exceeds_max_nfev(most):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = curve_fit(decay, X, DECAYING, [1, 1, 1], max_nfev=most)
    except NotConvergedError as err:
        fit = err.result
    assert fit.nfev == most
    assert not fit.success


def creeping(x, a, b, c):
    return a * jnp.exp(-b * x) + c * jnp.abs(b) ** 0.01 * (1 + 1e-3 * jnp.sin(1e4 * b))


@pytest.mark.parametrize(
    "f, y, most",
    [(creeping, DECAYING, None), (decay, np.sin(9 * X) + X, None), (creeping, DECAYING, 30)],
    ids=["second better", "first better", "one try"],
)
def test_a_fit_that_does_not_converge_says_how_many_evaluations_each_try_had(f, y, most):
    with pytest.raises(NotConvergedError) as caught:
        curve_fit(f, X, y, [1, 1, 1], max_nfev=most)
    text, nfev = str(caught.value), caught.value.result.nfev
    tries = re.findall(r"evaluations, (\d+), is|not converged in (\d+)|after (\d+) more", text)
    assert [int("".join(each)) for each in tries] == ([300, 300] if most is None else [most])
    assert f"{nfev} were made in all" in text and nfev == (most or 600)


@pytest.mark.parametrize("second, status", [((2, 1 + EPS), 2), ((2, 1.1), 11), ((11, 0.9), 11)])
def test_of_two_tries_that_end_at_one_optimum_the_one_with_success_counts(monkeypatch, second, status):
    """The first is stuck; `test_rules` has the rule."""

    def begin(evaluator, start, options):
        status, cost = second if start[0] else (11, 1.0)
        yield from ()
        equations = Condensed(np.eye(2), cost, "gram", size=1.0)
        return Solution(start, equations, factor(equations), status, "Ended.", 0, 0.0, [], 0.0)

    monkeypatch.setattr(tries, "_start", lambda *_: np.ones(1))
    found = tries.fit_in_tries(None, np.zeros(1), Options(np.full(1, -np.inf), np.full(1, np.inf)), begin)
    assert found.status == status


def test_a_stop_in_the_second_try_keeps_the_better_point():
    def stop(record):
        if record.nfev == 62:
            raise StopIteration

    alone = curve_fit(decay, X, DECAYING, [1, 1, 1], callback=lambda record: None).history[61].cost
    fit = curve_fit(decay, X, DECAYING, [1, 1, 1], callback=stop)
    assert fit.status == -2
    assert fit.cost <= alone


def test_a_fit_that_converges_has_no_second_try():
    fit = curve_fit(decay, X, DECAYING, [2e9, 1, 1e8])
    assert "linear parameters" not in fit.message


@pytest.mark.parametrize(
    "p0, way",
    [
        ([0, 1, 0], "loss"), ([0, 0, 0], "loss"), ([-40, 1, -5], "loss"), ([1e-12, 1, 0], "loss"), ([40, 1, -39], "loss"),
        ([0, 1, 0], "sigma"), ([-40, 1, -5], "sigma"),
    ],
)  # fmt: skip
def test_counts_are_fitted_from_starts_at_which_the_mean_is_not_positive(p0, way):
    counts = np.random.default_rng(0).poisson(50 * np.exp(-X) + 1)
    best = curve_fit(decay, X, counts, [50, 1, 1], loss="poisson")
    fit = curve_fit(decay, X, counts, p0, **{way: "poisson"})
    assert fit.success
    np.testing.assert_allclose(fit.popt, best.popt, atol=0.01 * best.perr.min())


@pytest.mark.slow
def test_pixels_of_counts_are_fitted_where_the_mean_is_not_positive_at_the_start():
    counts = np.random.default_rng(0).poisson(50 * np.exp(-X) + 1, size=(3, 200))
    best, fits = (fit_map(decay, X, counts, p0, loss="poisson").compute() for p0 in ([50, 1, 1], [0, 1, 0]))
    assert best.success.all() and fits.success.all()
    assert np.all(abs(fits.popt - best.popt) < 0.01 * best.perr)


INVALID = 2.0**123  # 1e37


@pytest.mark.slow
@pytest.mark.parametrize("way", ["value", "nan", "x"])
def test_values_that_do_not_count_hide_no_second_try_of_a_pixel(way):
    y, x, options = (DECAYING[None] / 1e3).astype("f4"), X, dict(nan_policy="omit")
    plain = fit_map(decay, np.delete(X, 7), np.delete(y, 7, axis=1), [1, 1, 1]).compute()
    if way == "x":
        x = np.where(np.arange(200) == 7, np.nan, np.broadcast_to(X, y.shape))
    if way == "value":
        options |= dict(mask_values=[INVALID])
    y[0, 7] = np.nan if way == "nan" else INVALID
    found = fit_map(decay, x, y, [1, 1, 1], axis=1, **options).compute()
    assert plain.success.all() and found.success.all()
    np.testing.assert_allclose(found.popt, plain.popt, rtol=1e-9)


def test_a_pixel_that_fails_begins_again_beside_one_that_has_converged():
    """Of a block only the pixels that have failed are fitted again, wherever they are."""
    y = np.stack([np.exp(-X), DECAYING, np.zeros(200), 3 * DECAYING, 2 * np.exp(-X)])
    found = fit_map(decay, X, y, [1, 1, 1]).compute()
    alone = [fit_map(decay, X, each[None], [1, 1, 1]).compute() for each in y]
    np.testing.assert_array_equal(found.popt, np.concatenate([each.popt for each in alone]))
    np.testing.assert_array_equal(found.nfev, np.concatenate([each.nfev for each in alone]))
    assert found.success[[0, 1, 3, 4]].all()


@pytest.mark.parametrize("reduction", ["auto", "gram", "qr"])
def test_columns_that_depend_on_each_other_do_not_walk_away(reduction):
    y = 3 * np.exp(-1.3 * X) + 0.5 + 0.01 * np.random.default_rng(1).normal(size=200)

    def two(x, a, b, k, c):
        return (a + b) * jnp.exp(-k * x) + c

    with pytest.warns(OptimizeWarning, match="do not determine one combination"):
        fit = curve_fit(two, X, y, [1, 1, 1, 0.1], reduction=reduction)
    assert fit.success
    np.testing.assert_allclose(fit.popt, [1.5, 1.5, 1.3, 0.5], atol=0.01)
    assert np.isinf(fit.pcov).all()


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0, np.inf)], ids=["no bounds", "bounds"])
def test_data_that_are_zero_everywhere_converge_in_few_evaluations(bounds):
    def line(x, a, b):
        return a * x + b

    fit = curve_fit(line, X, np.zeros(200), [1, 1], bounds=bounds)
    assert fit.success and fit.nfev < 100
    np.testing.assert_allclose(fit.popt, 0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [pytest.param((-np.inf, np.inf), marks=pytest.mark.slow), (0, np.inf)])
def test_pixels_that_are_zero_everywhere_converge_in_few_evaluations(bounds):
    dark = fit_map(lambda x, a, b: a * x + b, X, np.zeros((4, 200)), [1, 1], bounds=bounds).compute()
    assert dark.success.all() and dark.nfev.max() < 100


@pytest.mark.slow
def test_a_start_at_which_no_parameter_can_move_is_said_at_once():
    with pytest.warns(OptimizeWarning, match="does not change with"):
        fit = curve_fit(lambda x, a, b: a * b * x, X, X, [0, 0])
    assert (fit.status, fit.success, fit.nfev) == (12, False, 1)
    assert np.isnan(fit.distance)


@pytest.mark.slow
def test_a_parameter_that_is_pressed_against_its_bound_ends_there_in_any_unit():
    for unit in (1e-12, 1.0, 1e12):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit = curve_fit(lambda x, a: a * x, X, -3 * unit * X, [2 * unit], bounds=(unit, np.inf), ftol=1e-12, xtol=1e-12)
        assert fit.success
        assert fit.popt[0] == pytest.approx(unit, rel=1e-12)
        assert fit.at_bound[0] == -1


# ---------------------------------------------------------------------------------------------------------------------
# amplitudes of zero, or in another unit

PLACES = np.linspace(-5, 5, 64)
POSITIVE = ([0, -5, 0.05, -np.inf], [np.inf, 5, 10, np.inf])


def peak(x, a, m, w, c):
    return a * jnp.exp(-0.5 * ((x - m) / w) ** 2) + c


def peaks(unit, n=40):
    """Parameters (n, 4) and spectra (n, 64)."""
    rng = np.random.default_rng(0)
    truth = np.stack([rng.uniform(*ends, n) for ends in ((2, 10), (-1, 1), (0.5, 1.5), (-1, 2))], axis=1)
    truth[:, [0, 3]] *= unit
    return truth, np.array([peak(PLACES, *params) for params in truth]) + 0.2 * unit * rng.normal(size=(n, 64))


@pytest.mark.parametrize("unit", [1e3, *(pytest.param(unit, marks=pytest.mark.slow) for unit in (1, 1e12))])
@pytest.mark.parametrize(
    "p0, bounds", [([0, 0, 1, 0], POSITIVE), ([1, 0, 1, 1], POSITIVE), ([1, 0, 1, 1], (-np.inf, np.inf))]
)
def test_pixels_find_their_amplitudes_from_zero_and_from_other_units(unit, p0, bounds):
    truth, y = peaks(unit)
    best, fits = (fit_map(peak, PLACES, y, start, bounds=bounds).compute() for start in (list(truth.T), p0))
    good = abs(fits.chi2 / best.chi2 - 1) < 1e-6
    assert good.mean() >= 0.95
    assert good[fits.success].all()


@pytest.mark.parametrize("unit", [1, 1e3, 1e12])
def test_a_fit_finds_an_amplitude_that_starts_at_its_bound_of_zero(unit):
    truth, y = peaks(unit, 6)
    for params, values in zip(truth, y, strict=True):
        best, fit = (curve_fit(peak, PLACES, values, p0, bounds=POSITIVE) for p0 in (params, [0, 0, 1, 0]))
        assert np.all(abs(fit.popt - best.popt) < 0.01 * best.perr)


def test_what_a_fit_could_still_gain_decides_whether_it_creeps_not_how_slowly_it_converges():
    hardly, much = [1.0] * 11, [2.0, *[1.0] * 10]
    for decrement, costs, creeping in ((0.3, hardly, True), (0.1, hardly, False), (0.3, much, False)):
        here = Point(cost=1.0, decrement=decrement, contraction=0.99, distance=1e9)
        assert tries.creeps(here, costs) == creeping


def test_a_fit_that_creeps_pauses_and_goes_on_where_the_second_try_fails_too(monkeypatch):
    _, (y, *_) = peaks(1e3)
    fit = curve_fit(peak, PLACES, y, [1, 0, 1, 1], bounds=POSITIVE)
    assert "not converged in 70 evaluations" in fit.message and fit.nfev < 100
    monkeypatch.setattr(tries, "_start", lambda *_: np.array([1.0, 0.1, 1, 1]))  # no better than p0
    slow, alone = [], []
    for seen, most in ((slow, None), (alone, 400)):
        with pytest.raises(NotConvergedError):
            options = dict(bounds=POSITIVE, max_nfev=most, callback=lambda record, seen=seen: seen.append(record.params))
            curve_fit(peak, PLACES, y, [1, 0, 1, 1], **options)
    assert len(slow) == 800
    np.testing.assert_array_equal(slow[:70] + slow[470:], alone)


E = np.linspace(9, 11, 64)
AT = dict(height=40, center=10.1, width=0.3, base=1)
DEAD = {
    "no bounds": None,
    "one side": dict(height=(0, None), width=(0.01, 1)),
    "amplitudes": dict(height=(0, None), width=(0.01, 1), base=(0, None)),
    "two sides": dict(height=(0, 1e5), center=(9, 11), width=(0.01, 1)),
}


def peak_of_four(x, height, center, width, base):
    return height * jnp.exp(-(((x - center) / width) ** 2) / 2) + base


def measured(rng, shape, height, base, noise):
    return height * np.exp(-(((E - 10.1) / 0.3) ** 2) / 2) + base + noise * rng.normal(size=(*shape, 64))


def in_units(y, x, bounds):
    """Coordinates, start and bounds."""
    units = dict(height=y, base=y, center=x, width=x)
    start = {name: value * units[name] for name, value in AT.items()}
    ends = {name: tuple(None if end is None else end * units[name] for end in own) for name, own in (bounds or {}).items()}
    return x * E, start, dict(bounds=ends) if ends else {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["linear", pytest.param("soft_l1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bounds", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("level", [5.0, *(pytest.param(level, marks=pytest.mark.slow) for level in (0.0, 1 / 3))])
def test_a_dead_pixel_determines_neither_place_nor_width_of_a_peak(level, bounds, loss):
    for y, x in ((1.0, 1.0), (1e-9, 1e6)):
        points, start, ends = in_units(y, x, bounds)
        options = dict(loss=loss, f_scale=y) | ends
        found = curve_fit(peak_of_four, points, np.full(64, level * y), start, **options)
        assert found.status == 12 and not found.success and np.isinf(found.perr[[1, 2]]).all()
        maps = fit_map(peak_of_four, points, np.full((2, 64), level * y), start, **options).compute()
        assert np.all(maps.status == MapStatus.UNDETERMINED) and np.isinf(maps.perr[:, [1, 2]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [DEAD["no bounds"], DEAD["one side"]])
def test_a_group_without_a_peak_determines_no_local_place(bounds):
    rng = np.random.default_rng(0)
    y = np.concatenate([measured(rng, (3,), 40, 1, 0.5), np.full((1, 64), 5.0), np.zeros((1, 64))])
    local = "height", "center", "base"
    found = fit_groups(peak_of_four, E, y, AT, local=local, group_axes=0, bounds=bounds or (-np.inf, np.inf))
    local = found.local.compute()
    assert found.success and local.success.tolist() == [True] * 3 + [False] * 2
    assert np.isinf(local.perr[3:, 1]).all()


@pytest.mark.parametrize("level", [pytest.param(0.0, marks=pytest.mark.slow), 5.0])
@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "uint16"])
def test_dead_pixels_stand_out_in_a_map_with_masks_weights_and_coarse_starts(level, dtype):
    rng = np.random.default_rng(1)
    y = np.round(measured(rng, (6, 6), 400, 50, 5)).astype(dtype)
    y[2, 3] = y[5, 5] = level
    mask = rng.random(y.shape) < 0.05
    found = fit_map(peak_of_four, E, y, AT, bounds=DEAD["one side"], mask=mask, sigma=2.0, guess="coarse-to-fine").compute()
    dead = (y == level).all(axis=-1)
    assert np.array_equal(found.status == MapStatus.UNDETERMINED, dead) and np.array_equal(found.success, ~dead)


@pytest.mark.slow
def test_an_amplitude_that_starts_at_its_bound_0_is_found_in_groups():
    rng = np.random.default_rng(2)
    x, heights, places = np.linspace(0, 10, 100), rng.uniform(5e3, 1e4, (12, 1)), rng.uniform(4, 6, (12, 1))
    y = heights / (1 + ((x - places) / 0.3) ** 2) + 20 + rng.normal(0, 50, (12, 100))
    bounds = dict(h=(0, None), w=(0.01, 5), b=(0, None))
    found = fit_groups(
        lambda x, h, c, w, b: h / (1 + ((x - c) / w) ** 2) + b,
        x,
        y,
        dict(h=0, c=5, w=1, b=0),
        local=("h", "c", "b"),
        group_axes=0,
        bounds=bounds,
    )
    assert found.success and abs(found.popt[0] - 0.3) < 5 * found.shared.perr[0]
    assert found.local.compute().success.all()
