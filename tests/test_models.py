"""Ready-made models: formulas, derivatives, names, sums, pickling, and the guess of the start."""

import inspect
import pickle
import subprocess
import sys

import cloudpickle
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from scipy.special import expit, voigt_profile, wofz

from benchmarks.guesses import CASES, reached
from dask_nlsq import curve_fit, fit_map, models, plan_fit, resume
from dask_nlsq.base.x64 import float64
from dask_nlsq.model.faddeeva import faddeeva_real
from dask_nlsq.model.function import intern, parameter_names
from dask_nlsq.model.starts import Guess
from dask_nlsq.model.ties import Ties
from dask_nlsq.models import ReadyModel, g2_single, gaussian, line, named, polynomial, voigt

X = np.array([0.0, 0.3, 1.0, 2.5, 7.0, 40.0])
# name: parameters, the formula in NumPy
FORMULAS = {
    "line": ((2.0, -1.0), lambda x, a, b: a * x + b),
    "exponential": ((3.0, 0.4), lambda x, a, r: a * np.exp(-r * x)),
    "stretched_exponential": ((3.0, 0.4, 0.6), lambda x, a, r, b: a * np.exp(-((r * x) ** b))),
    "power_law": ((3.0, 1.7), lambda x, a, b: a * x**b),
    "gaussian": ((3.0, 2.0, 0.7), lambda x, a, c, w: a * np.exp(-((x - c) ** 2) / (2 * w**2))),
    "lorentzian": ((3.0, 2.0, 0.7), lambda x, a, c, w: a * w**2 / ((x - c) ** 2 + w**2)),
    "pseudo_voigt": (
        (3.0, 2.0, 0.7, 0.3),
        lambda x, a, c, w, f: a * (f / (1 + 4 * ((x - c) / w) ** 2) + (1 - f) * np.exp(-4 * np.log(2) * ((x - c) / w) ** 2)),
    ),
    "voigt": ((3.0, 2.0, 0.7, 0.2), lambda x, a, c, s, g: a * voigt_profile(x - c, s, g)),
    "moffat": ((3.0, 2.0, 0.7, 2.5), lambda x, a, c, w, b: a / (1 + ((x - c) / w) ** 2) ** b),
    "sigmoid": ((3.0, 2.0, 0.7), lambda x, h, c, w: h * expit((x - c) / w)),
    "arctan_edge": ((3.0, 2.0, 0.7), lambda x, h, c, w: h * (np.arctan2(x - c, w) / np.pi + 0.5)),
    "damped_sine": (
        (3.0, 0.8, 0.5, 0.1),
        lambda x, a, f, p, r: a * np.exp(-r * x) * np.imag(np.exp(1j * (2 * np.pi * f * x + p))),
    ),
    "g2_single": ((1.0, 0.3, 0.5, 1.2), lambda t, b, c, g, n: b + c * np.abs(np.exp(-((g * t) ** n))) ** 2),
    "g2_double": (
        (1.0, 0.3, 2.0, 1.2, 0.1, 0.8, 0.6),
        lambda t, b, c, g, n, h, m, f: b + c * (f * np.exp(-((g * t) ** n)) + (1 - f) * np.exp(-((h * t) ** m))) ** 2,
    ),
}
SINGLE = {name: getattr(models, name) for name in FORMULAS} | {"polynomial": polynomial(3)}
FORMULAS["polynomial"] = ((1.0, -2.0, 0.5, 0.1), lambda x, *c: np.polynomial.polynomial.polyval(x, c))
RNG = np.random.default_rng(5)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_model_is_its_formula(name):
    params, formula = FORMULAS[name]
    with float64():
        np.testing.assert_allclose(SINGLE[name](X, *params), formula(X, *params), rtol=1e-12)


def test_every_model_of_the_room_is_compared_with_its_formula():
    public = {name for name, each in vars(models).items() if isinstance(each, ReadyModel)}
    assert public | {"polynomial"} == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_derivatives_are_finite_and_those_of_the_formula(name):
    model, (params, formula) = SINGLE[name], FORMULAS[name]
    with float64():
        columns = np.asarray(jax.jit(jax.jacfwd(lambda p: model(X, *p)))(np.array(params)))
    assert np.isfinite(columns).all()
    for k, value in enumerate(params):
        step = 1e-6 * abs(value)
        up, down = (formula(X, *(p + side * step * (j == k) for j, p in enumerate(params))) for side in (1, -1))
        np.testing.assert_allclose(columns[:, k], (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "x", "params"),
    [
        ("power_law", [0.0], (2.0, 0.5)),
        ("power_law", [0.0], (2.0, 0.0)),
        ("stretched_exponential", [0.0, 1e-300, 1e300], (2.0, 3.0, 0.3)),
        ("stretched_exponential", [0.0, 1e-300, 1e300], (2.0, 3.0, 2.5)),
        ("g2_single", [0.0, 1e-300, 1e300], (1.0, 0.1, 3.0, 0.3)),
        ("g2_double", [0.0, 1e-300, 1e300], (1.0, 0.1, 3.0, 0.3, 3e-5, 2.0, 0.5)),
        ("exponential", [0.0, 1e5], (2.0, 3.0)),
        ("damped_sine", [0.0, 1e5], (2.0, 3.0, 0.1, 1.0)),
        ("sigmoid", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-3)),
        ("arctan_edge", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-3)),
        ("gaussian", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-3)),
        ("moffat", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-3, 3.0)),
        ("voigt", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-3, 1e-12)),
        ("voigt", [-1e9, 0.0, 1e9], (2.0, 0.0, 1e-6, 1e3)),
    ],
)
def test_value_and_derivatives_are_finite_at_the_edges(name, x, params):
    with float64():
        value = jax.jit(SINGLE[name])(np.array(x), *params)
        columns = jax.jit(jax.jacfwd(lambda p: SINGLE[name](np.array(x), *p)))(np.array(params))
    assert np.isfinite(value).all()
    assert np.isfinite(columns).all()


@pytest.mark.parametrize("name", ["power_law", "stretched_exponential", "g2_single", "g2_double"])
def test_where_a_formula_says_nothing_neither_does_the_model(name):
    with float64():
        assert np.isnan(SINGLE[name](np.array([-1.0]), *FORMULAS[name][0])).all()


@pytest.mark.parametrize("low", range(-12, 6, 3))
def test_faddeeva_has_thirteen_digits(low):
    x, y = 10 ** RNG.uniform(-6, 6, 12_000), 10 ** RNG.uniform(low, low + 3, 12_000)
    with float64():
        found = np.asarray(jax.jit(faddeeva_real)(x, y))
    np.testing.assert_allclose(found, wofz(x + 1j * y).real, rtol=2e-13)


def test_derivatives_of_faddeeva_have_ten_digits():
    x, y = RNG.uniform(-8, 8, 3000), 10 ** RNG.uniform(-6, 0.9, 3000)
    with float64():
        by_x, by_y = jax.jit(jax.vmap(jax.grad(faddeeva_real, (0, 1))))(x, y)
    derivative = -2 * (x + 1j * y) * wofz(x + 1j * y) + 2j / np.sqrt(np.pi)
    np.testing.assert_allclose(by_x, derivative.real, atol=1e-10 * np.abs(derivative).max(), rtol=1e-10)
    np.testing.assert_allclose(by_y, -derivative.imag, atol=1e-10 * np.abs(derivative).max(), rtol=1e-10)


# ---------------------------------------------------------------- names, bounds, sums


@pytest.mark.parametrize("name", SINGLE)
def test_a_model_has_a_docstring_names_and_bounds(name):
    model = SINGLE[name]
    assert parameter_names(model) == list(model.param_names) == [*model.bounds]
    assert inspect.getdoc(model).startswith("``")
    for parameter in model.param_names if name != "polynomial" else ("c0",):
        assert parameter in model.__doc__
    assert repr(model).startswith(name)
    params = FORMULAS[name][0]
    assert all(low < value < high for value, (low, high) in zip(params, model.bounds.values(), strict=True))


def test_names_in_a_sum_have_the_part_before_them():
    model = gaussian + line
    assert model.param_names == (
        "gaussian_amplitude",
        "gaussian_center",
        "gaussian_width",
        "line_slope",
        "line_intercept",
    )
    assert model.bounds["gaussian_width"] == (0, np.inf)
    assert repr(model).startswith("gaussian + line: gaussian_amplitude")
    np.testing.assert_allclose(model(X, 3, 2, 0.7, 2, -1), gaussian(X, 3, 2, 0.7) + line(X, 2, -1))


def test_several_of_a_kind_are_numbered_and_nested_sums_are_flat():
    names = ((gaussian + polynomial(0)) + (gaussian + polynomial(1))).param_names
    assert names == (
        *("gaussian1_amplitude", "gaussian1_center", "gaussian1_width", "polynomial1_c0"),
        *("gaussian2_amplitude", "gaussian2_center", "gaussian2_width", "polynomial2_c0", "polynomial2_c1"),
    )
    assert (gaussian + (line + voigt)).param_names == ((gaussian + line) + voigt).param_names


def test_parameters_may_be_given_by_name():
    np.testing.assert_array_equal(gaussian(X, 3.0, width=0.7, center=2.0), gaussian(X, 3.0, 2.0, 0.7))


def test_the_number_of_parameters_is_checked():
    with pytest.raises(TypeError, match="missing a required argument: 'width'"):
        gaussian(X, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"`p0` has 4 values, but gaussian \+ line takes 5"):
        curve_fit(gaussian + line, X, X, p0=[1, 1, 1, 1])


@pytest.mark.parametrize("degree", [-1, 21, 1.5, True, "2"])
def test_a_degree_that_is_none_is_refused(degree):
    with pytest.raises(ValueError, match="`degree` must be an integer from 0 to 20"):
        polynomial(degree)


# ---------------------------------------------------------------- pickling


def test_models_come_back_from_a_pickle():
    assert pickle.loads(pickle.dumps(gaussian)) is gaussian
    for model in (polynomial(2), gaussian + gaussian + polynomial(2)):
        again = cloudpickle.loads(cloudpickle.dumps(model))
        assert again.param_names == model.param_names
        params = np.linspace(1, 2, len(model.param_names))
        np.testing.assert_array_equal(again(X, *params), model(X, *params))


def test_a_sum_has_the_same_token_in_another_process():
    code = (
        "from dask_nlsq.model.function import intern; from dask_nlsq.models import gaussian, line, polynomial;"
        "print(intern((gaussian + line) + polynomial(2)).token)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == intern(gaussian + (line + polynomial(2))).token


# ---------------------------------------------------------------- the guess


def peak_on_a_line(n, noise=0.1):
    x = np.linspace(0, 10, n)
    y = 3 * np.exp(-0.5 * ((x - 7) / 0.2) ** 2) + 0.5 * x + 1
    return x, y + noise * np.random.default_rng(1).normal(size=n)


TRUTH = 3, 7, 0.2, 0.5, 1
X_LONG, Y_LONG = peak_on_a_line(20_000)
BEST = {}


def best():
    if not BEST:
        BEST["popt"] = curve_fit(gaussian + line, X_LONG, Y_LONG, p0=TRUTH, ftol=1e-12, xtol=1e-12, gtol=1e-12).popt
    return BEST["popt"]


@pytest.mark.slow
@pytest.mark.parametrize("p0", ["guess", None])
def test_a_ready_model_needs_no_start(p0):
    result = curve_fit(gaussian + line, X_LONG, Y_LONG, p0=p0)
    np.testing.assert_allclose(result.popt, best(), rtol=1e-5)
    assert result.param_names == (gaussian + line).param_names
    np.testing.assert_allclose(result.history[0].params, TRUTH, rtol=0.2)


@pytest.mark.slow
def test_what_p0_does_not_name_is_guessed():
    names = (gaussian + line).param_names
    guessed = curve_fit(gaussian + line, X_LONG, Y_LONG).history[0].params
    for fixed in ({}, {names[3]: TRUTH[3]}):
        result = curve_fit(gaussian + line, X_LONG, Y_LONG, p0={names[1]: 0.99 * TRUTH[1]}, fixed=fixed)
        free = [k for k, name in enumerate(names) if name not in fixed]
        expected = np.where(np.array(names) == names[1], 0.99 * TRUTH[1], guessed)[free]
        np.testing.assert_allclose(result.history[0].params, expected, rtol=0.1)
        assert result.history[0].params[free.index(1)] == 0.99 * TRUTH[1]
        np.testing.assert_allclose(result.popt[:3], best()[:3], rtol=1e-2)
    assert plan_fit(gaussian + line, X_LONG, Y_LONG, p0={names[0]: 1.0}).strategy == "standard"
    with pytest.raises(ValueError, match="`p0` names 'centre'"):
        curve_fit(gaussian + line, X_LONG, Y_LONG, p0={"centre": 1.0})


def test_the_guess_does_not_depend_on_the_chunks():
    runs = [curve_fit(gaussian + line, X_LONG, Y_LONG)]
    for size in (777, 5000):
        lazy = (da.from_array(each, chunks=size) for each in (X_LONG, Y_LONG))
        runs.append(curve_fit(gaussian + line, *lazy))
    costs = [run.history[0].cost for run in runs]
    np.testing.assert_allclose(costs, costs[0], rtol=1e-12)


def test_a_store_is_guessed_from_a_few_of_its_chunks_and_resumed_with_the_same_bits(tmp_path):
    store = zarr.create_array(tmp_path / "y.zarr", shape=Y_LONG.shape, chunks=(500,), dtype="f8", compressors=None)
    store[:] = Y_LONG
    first = curve_fit(gaussian + line, X_LONG, store, strategy="streaming", checkpoint=tmp_path / "fit")
    np.testing.assert_allclose(first.popt, best(), rtol=1e-5)
    again = resume(tmp_path / "fit", gaussian + line, ydata=store)
    same_call = curve_fit(gaussian + line, X_LONG, store, p0="guess", strategy="streaming", checkpoint=tmp_path / "fit")
    for other in (again, same_call):
        np.testing.assert_array_equal(other.popt, first.popt)
        assert other.nfev == first.nfev


@pytest.mark.slow
def test_points_that_do_not_count_do_not_change_the_guess():
    x, y = peak_on_a_line(400)
    with float64():
        model = jax.jit(Guess(gaussian + line))
        clean = model(x, y)
        far = np.concatenate([x, [3.0, np.nan, np.inf]]), np.concatenate([y, [np.nan, 1e9, 1e9]])
        np.testing.assert_allclose(model(*far), clean, rtol=0.1)
    hidden = np.arange(x.size) % 7 == 0
    spoiled = np.where(hidden, 1e6, y)
    masked = curve_fit(gaussian + line, x, spoiled, mask=hidden)
    omitted = curve_fit(gaussian + line, x, np.where(hidden, np.nan, y), nan_policy="omit")
    np.testing.assert_allclose(masked.popt, TRUTH, rtol=0.2)
    np.testing.assert_array_equal(masked.popt, omitted.popt)


@pytest.mark.slow
def test_the_order_of_the_points_does_not_matter():
    x, y = peak_on_a_line(400)
    order, guess = RNG.permutation(x.size), jax.jit(Guess(gaussian + line))
    with float64():
        np.testing.assert_allclose(guess(x[order], y[order]), guess(x, y), rtol=1e-6)


QUICK = ["line", "gaussian", "g2_single"]  # to compile


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SINGLE])
def test_any_data_give_a_finite_guess(name):
    guess = jax.jit(Guess(SINGLE[name]))
    for y in (np.zeros(30), np.full(30, 5.0), np.eye(30)[3], np.r_[1.0, 2.0, [np.nan] * 28]):
        with float64():
            assert np.isfinite(guess(np.arange(30.0), y)).all()


def test_a_covariance_of_the_data_goes_with_a_guess():
    x, y = peak_on_a_line(400)
    plain = curve_fit(gaussian + line, x, y, sigma=0.1)
    whitened = curve_fit(gaussian + line, x, y, sigma=0.01 * np.eye(400))
    np.testing.assert_allclose(whitened.popt, plain.popt, rtol=1e-6)


def test_workers_fit_from_a_guess(workers):
    with workers.as_current():
        lazy = (da.from_array(each, chunks=2500) for each in (X_LONG, Y_LONG))
        result = curve_fit(gaussian + line, *lazy, p0="guess")
        assert result.strategy == "chunked"
        np.testing.assert_allclose(result.popt, best(), rtol=1e-5)


@pytest.mark.slow
def test_a_map_guesses_each_spectrum():
    x = np.linspace(9, 11, 80)
    center = np.linspace(9.3, 10.7, 12)[:, None]
    y = 50 * np.exp(-0.5 * ((x - center) / 0.05) ** 2) + 20 * (x - 9) + RNG.normal(0, 1, (12, 80))
    y[0, :5] = np.nan
    for p0 in ("guess", None):
        fits = fit_map(gaussian + line, x, y, p0=p0, fixed={"line_slope": 20.0}).compute()
        np.testing.assert_allclose(fits.popt[:, 1], center[:, 0], atol=0.01)
        assert (fits.popt[:, 2] > 0).all()
        np.testing.assert_array_equal(fits.popt[:, 3], 20)


def test_a_function_cannot_guess():
    for call in (curve_fit, fit_map):
        with pytest.raises(ValueError, match=r"only models from dask_nlsq\.models can guess"):
            call(lambda x, a: a * jnp.exp(-x), X, X, p0="guess")
    with pytest.raises(ValueError, match="`p0` must be numbers or 'guess', not 'best'"):
        curve_fit(gaussian, X, X, p0="best")


def test_own_bounds_win_over_those_of_the_model():
    x, y = peak_on_a_line(400)
    low, high = [-np.inf, -np.inf, 0.5, -np.inf, -np.inf], [np.inf] * 5
    assert curve_fit(gaussian + line, x, y, bounds=(low, high)).popt[2] == pytest.approx(0.5)
    assert curve_fit(gaussian + line, x, y, p0=[3, 7, 0.2, 0.5, 1], method="lm").popt[2] == pytest.approx(0.2, rel=0.2)
    with pytest.raises(ValueError, match=r"gaussian_width = -1\.0 is not in"):
        curve_fit(gaussian + line, x, y, p0=[3, 7, -1, 0.5, 1])


def test_a_plan_needs_no_start():
    assert plan_fit(gaussian + line, X_LONG, da.from_array(Y_LONG, chunks=1000)).n_points == X_LONG.size


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_fit_from_the_guess_reaches_the_optimum(name):
    least = 0.9 if "overlapping" in name else 0.95  # where a wide band may be as good as two
    assert np.mean(reached(name)) >= least


@pytest.mark.slow
def test_amplitudes_that_are_to_be_positive_are_so_in_the_guess_and_in_the_fit():
    x = np.linspace(0, 10, 400)
    y = 3 * np.exp(-0.5 * ((x - 4) / 0.8) ** 2) + 2 * np.exp(-0.5 * ((x - 5.6) / 0.6) ** 2) + 0.1 * x
    y += np.random.default_rng(0).normal(0, 0.03, 400)
    model = (gaussian + gaussian).positive + line
    assert model.__name__ == "gaussian(positive) + gaussian(positive) + line"
    assert model.param_names == (gaussian + gaussian + line).param_names
    assert next(iter(model.bounds.values())) == (0, np.inf) and [*model.bounds.values()][-1] == (-np.inf, np.inf)
    fitted = curve_fit(model, x, y)
    centers = sorted([fitted["gaussian1_center"].value, fitted["gaussian2_center"].value])
    assert centers == pytest.approx([4, 5.6], abs=0.1) and fitted.popt[[0, 3]].min() > 1
    again = pickle.loads(cloudpickle.dumps(model))
    assert again.bounds == model.bounds and intern(again).token == intern(model).token
    assert named(model.__name__).bounds == model.bounds
    assert polynomial(2).positive.terms[0].recipe == ("polynomial", 2) and g2_single.positive.bounds == g2_single.bounds


@pytest.mark.slow
def test_bounds_of_the_call_are_those_of_the_guess():
    x = np.linspace(0, 10, 400)
    y = 3 * np.exp(-0.5 * ((x - 3) / 0.2) ** 2) + 5 * np.exp(-0.5 * ((x - 7) / 0.2) ** 2)
    y += np.random.default_rng(0).normal(0, 0.1, 400)
    for bounds, center in (({}, 7), ({"center": (0, 5)}, 3)):
        assert curve_fit(gaussian, x, y, bounds=bounds)["center"].value == pytest.approx(center, abs=0.02)
        fits = fit_map(gaussian, x, y[None], bounds=bounds).compute()
        assert fits["center"].value[0] == pytest.approx(center, abs=0.02)


def two_bands():
    """The second is on the flank of the first: a guess that knows nothing takes the first one first."""
    x = np.linspace(0, 10, 200)
    y = 5 * np.exp(-0.5 * ((x - 3) / 0.8) ** 2) + 2 * np.exp(-0.5 * ((x - 4.6) / 0.5) ** 2) + 0.1 * x
    return x, y + np.random.default_rng(0).normal(0, 0.02, x.size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "held",
    [
        dict(fixed={"gaussian2_center": 3.0}),
        dict(bounds={"gaussian2_center": (2.97, 3.01)}),  # in which there is no point
        *(
            pytest.param(each, marks=pytest.mark.slow)  # in the other order of the parts, which is compiled by itself
            for each in (
                dict(fixed={"gaussian1_center": 4.6}),
                dict(fixed={"gaussian1_amplitude": 2.0, "gaussian1_width": 0.5, "gaussian1_center": 4.6}),
                dict(bounds={"gaussian1_width": (0.4, 0.6), "gaussian2_width": (0.7, 0.9)}),
                dict(bounds={"gaussian1_amplitude": (1.5, 2.5), "gaussian1_center": (4, 5)}),
            )
        ),
    ],
    ids=str,
)
def test_a_guess_gives_a_peak_to_the_part_that_may_have_it(held):
    x, y = two_bands()
    model, call = gaussian + gaussian + line, {"fixed": None} | held
    right = [2, 4.6, 0.5, 5, 3, 0.8, 0.1, 0]
    found = curve_fit(model, x, y, **call)
    start = dict(
        zip((name for name in model.param_names if name not in (call["fixed"] or {})), found.history[0].params, strict=True)
    )
    fitted = [found[name].value for name in model.param_names]
    np.testing.assert_allclose(fitted, right, rtol=0.05, atol=0.05)
    for name, value in start.items():
        assert value == pytest.approx(right[model.param_names.index(name)], rel=0.2, abs=0.2), name


@pytest.mark.slow
def test_in_a_map_too_a_guess_gives_a_peak_to_the_part_that_may_have_it():
    x, y = two_bands()
    lows = np.array([4.0, 2.0])
    fixed, bounds = {"line_intercept": 0.0}, {"gaussian1_center": (lows, lows + 1.5)}
    fits = fit_map(gaussian + gaussian + line, x, np.stack([y, y]), fixed=fixed, bounds=bounds).compute()
    np.testing.assert_allclose(fits.popt[:, [1, 4]], [[4.6, 3], [3, 4.6]], atol=0.02)
    assert fits.nfev.max() <= 10


# ---------------------------------------------------------------------------------------------------------------------
# equal parts of a sum

TWO = (gaussian + gaussian).positive + line
X_TWO = np.linspace(2.0, 14, 200)


def counts_of(*peaks):
    y = 3 + sum(a * np.exp(-0.5 * ((X_TWO - c) / w) ** 2) for a, c, w in peaks)
    return np.random.default_rng(0).poisson(y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "p0, first",
    [
        ({"gaussian1_center": 6.1}, 0),
        ({"gaussian2_center": 6.1}, 1),
        ({"gaussian1_center": 8.6}, 1),
        ({"gaussian1_width": 0.5, "gaussian2_width": 0.35}, 1),
        ({"gaussian1_amplitude": 65, "gaussian2_amplitude": 80}, 1),
    ],
    ids=str,
)
def test_what_p0_leaves_out_is_guessed_beside_what_it_gives(p0, first):
    peaks = [(80, 6.1, 0.35), (65, 8.6, 0.5)]
    right = [*peaks[first], *peaks[1 - first], 0, 3]
    y = counts_of(*peaks)
    best = curve_fit(TWO, X_TWO, y, right, loss="poisson")
    found = curve_fit(TWO, X_TWO, y, p0, loss="poisson")
    np.testing.assert_allclose(found.popt, best.popt, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_in_a_map_too_what_p0_leaves_out_is_guessed_beside_what_it_gives():
    y = np.stack([counts_of((80, 6.1, 0.35), (65, 8.6, 0.5))] * 2)
    p0 = {"gaussian2_center": np.array([6.1, 8.6])}
    fits = fit_map(TWO, X_TWO, y, p0, loss="poisson").compute(scheduler="synchronous")
    np.testing.assert_allclose(fits.popt[:, [1, 4]], [[8.6, 6.1], [6.1, 8.6]], atol=0.05)
    np.testing.assert_allclose(fits.chi2, 167, atol=1)


@pytest.mark.slow
def test_a_map_keeps_what_p0_gives_and_guesses_the_rest():
    x = np.linspace(0, 10, 40)
    y = np.stack([a * np.exp(-0.5 * ((x - c) / 0.5) ** 2) for a, c in ((3, 4.0), (5, 6.0))])
    fits = fit_map(gaussian, x, y, {"center": np.array([4.1, 5.9])}, max_nfev=1).compute(scheduler="synchronous")
    np.testing.assert_array_equal(fits["center"].value, [4.1, 5.9])
    np.testing.assert_allclose(fits["width"].value, 0.5, rtol=0.1)
    fitted = fit_map(gaussian, x, y, {"center": 5.0, "width": 1.0}).compute(scheduler="synchronous")
    np.testing.assert_allclose(fitted.popt, [[3, 4, 0.5], [5, 6, 0.5]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("p0", [None, {"gaussian1_center": 6.1, "gaussian2_center": 7.6}], ids=str)
@pytest.mark.parametrize("high", [120, 45])
def test_a_guess_gives_a_peak_to_the_part_whose_ties_agree_with_it(p0, high):
    y = counts_of((high, 6.1, 0.35), (165 - high, 7.6, 0.5))
    tie = {"gaussian2_width": "1.4*gaussian1_width"}
    right = {"gaussian1_amplitude": high, "gaussian1_center": 6.1, "gaussian1_width": 0.35}
    right |= {"gaussian2_amplitude": 165 - high, "gaussian2_center": 7.6, "line_slope": 0, "line_intercept": 3}
    best = curve_fit(TWO, X_TWO, y, right, loss="poisson", expr=tie)
    found = curve_fit(TWO, X_TWO, y, p0, loss="poisson", expr=tie)
    np.testing.assert_allclose(found.popt, best.popt, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("expr", [None, {"gaussian2_width": "gaussian1_width"}], ids=str)
def test_equal_parts_keep_their_order_where_amplitudes_cross_over(expr):
    y = np.stack([counts_of((40 + 2 * k, 6.1, 0.4), (120 - 2 * k, 8.6, 0.4)) for k in range(0, 40, 3)])
    fits = fit_map(TWO, X_TWO, y, loss="poisson", expr=expr).compute(scheduler="synchronous")
    np.testing.assert_allclose(fits["gaussian1_center"].value, 6.1, atol=0.1)
    np.testing.assert_allclose(fits["gaussian2_center"].value, 8.6, atol=0.1)


def peaks_and_ends(*centers):
    sums = {n: ReadyModel(*(gaussian.terms * n)) for n in (2, 3)}
    model = sums[len(centers)]
    params = np.array([each for c in centers for each in (10.0, c, 0.3 + 0.01 * c)])
    return model, params, np.array([*model.bounds.values()])


def in_order(model, params, ends, ties=None):
    with float64():
        y = np.asarray(model(X_TWO, *params))
        return np.asarray(Guess(model, ties=ties).in_order(jnp.asarray(params), X_TWO, y, jnp.asarray(ends)))


def test_equal_parts_of_a_guess_go_by_their_place():
    model, params, ends = peaks_and_ends(9.0, 4.0, 7.0)
    np.testing.assert_array_equal(in_order(model, params, ends), peaks_and_ends(4.0, 7.0, 9.0)[1])
    ends[0] = 0, 50  # another part than the others
    np.testing.assert_array_equal(in_order(model, params, ends), params)
    decays = models.exponential + models.gaussian + models.exponential
    params = np.array([1, 5.0, 2, 3, 4, 6, 0.5])
    found = in_order(decays, params, np.array([*decays.bounds.values()]))
    np.testing.assert_array_equal(found, [6, 0.5, 2, 3, 4, 1, 5])


@pytest.mark.parametrize("factor, order", [(1.4, [9.0, 4.0]), (1.0, [4.0, 9.0])])
def test_ties_that_tell_equal_parts_apart_decide_on_their_order(factor, order):
    model, params, ends = peaks_and_ends(*order)
    params[[2, 5]] = 0.3, 0.3 * factor
    ties = Ties(model.param_names, {"gaussian2_width": f"{factor} * gaussian1_width"})
    for start in (params, params[[3, 4, 5, 0, 1, 2]]):
        np.testing.assert_array_equal(in_order(model, start, ends, ties), params)


@pytest.mark.slow
def test_a_guess_is_compiled_once_for_all_bounds_and_fixed_values():
    x, y = two_bands()
    model, compiled = gaussian + line, []
    kept = intern(model).compiled
    for call in (
        {},
        {"bounds": {"gaussian_center": (1, 5)}},
        {"fixed": {"gaussian_center": 3.1}},
        {"fixed": {"line_slope": 0.1}},
    ):
        curve_fit(model, x, y, **call)
        compiled += [each for each in kept.items() if each[0][0] == "guess"]
    assert len(dict(compiled)) == 1 and compiled[0][1].run.run.run._cache_size() == 1
    maps = [fit_map(model, x, y[None], bounds={"gaussian_center": (low, 5)}) for low in (0, 1)]
    assert maps[0].problem.fit.spec == maps[1].problem.fit.spec


@pytest.mark.slow
def test_a_frequency_that_is_held_is_so_in_the_guess():
    x = np.linspace(0, 10, 300)
    y = 3 * np.sin(2 * np.pi * 2 * x + 0.4) + 1.5 * np.exp(-0.1 * x) * np.sin(2 * np.pi * 0.7 * x + 1)
    found = curve_fit(models.damped_sine, x, y, fixed={"frequency": 0.7})
    best = curve_fit(models.damped_sine, x, y, p0=[1.5, 0.7, 1, 0.1], fixed={"frequency": 0.7})
    np.testing.assert_allclose(found.popt, best.popt, rtol=1e-3)


@pytest.mark.slow
def test_a_guess_is_in_double_precision_also_after_a_fit():
    x, y = peak_on_a_line(400)
    model = gaussian + line
    curve_fit(model, x, y)
    found = model.guess(x, y)
    assert found.dtype == np.float64 and found[1] == pytest.approx(7, abs=0.1)


def test_a_sum_that_cannot_guess_needs_a_start():
    x, y = peak_on_a_line(400)
    for model in (gaussian + (lambda x, k, c: k * x + c), gaussian * line):
        for call in (lambda f: curve_fit(f, x, y), lambda f: fit_map(f, x, y[None])):
            with pytest.raises(ValueError, match=r"`p0` is needed: .* cannot guess its start"):
                call(model)
