"""Sums and products of ready models and the user's functions, and what their summands are."""

import cloudpickle
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import curve_fit, load, models


def efficiency(x, slope):
    return 1 + slope * x


def tail(x, height, rate):
    return height * jnp.exp(-rate * x)


X = np.linspace(0, 10, 200)
P0 = dict(gaussian_amplitude=2, gaussian_center=4, gaussian_width=1, tail_height=1, tail_rate=0.5)
SUM = models.gaussian + tail
Y = np.asarray(SUM(X, 3, 4, 0.8, 1.5, 0.4)) + 0.02 * np.random.default_rng(0).normal(size=200)


@pytest.fixture(scope="module")
def fitted():
    return curve_fit(SUM, X, Y, P0)


def test_a_sum_with_a_function_has_its_values_names_and_bounds(fitted):
    assert SUM.param_names == tuple(P0) and SUM.__name__ == "gaussian + tail"
    np.testing.assert_allclose(SUM(X, 3, 4, 0.8, 1.5, 0.4), models.gaussian(X, 3, 4, 0.8) + tail(X, 1.5, 0.4))
    assert fitted.success and fitted["gaussian_width"].bounds == (0, np.inf)
    np.testing.assert_allclose(fitted.popt, [3, 4, 0.8, 1.5, 0.4], atol=0.1)
    assert (tail + models.gaussian).param_names[:2] == ("tail_height", "tail_rate")
    assert (models.line + (lambda x, a: a * x)).param_names[-1] == "own_a"


def test_products_bind_as_python_has_it():
    product = efficiency * models.gaussian + tail * (models.line + models.polynomial(0))
    assert product.__name__ == "efficiency * gaussian + tail * (line + polynomial(0))"
    params = np.arange(1.0, 1 + len(product.param_names)) / 10
    expected = efficiency(X, 0.1) * models.gaussian(X, 0.2, 0.3, 0.4) + tail(X, 0.5, 0.6) * (0.7 * X + 0.8 + 0.9)
    np.testing.assert_allclose(product(X, *params), expected, rtol=1e-6)
    assert [*product.components] == ["efficiency * gaussian", "tail * (line + polynomial(0))"]
    again = cloudpickle.loads(cloudpickle.dumps(product))
    assert again.__name__ == product.__name__ and again.tree == product.tree
    nested = models.line + (models.gaussian + models.lorentzian)
    assert nested.tree == (models.line + models.gaussian + models.lorentzian).tree  # and has the same bits


@pytest.mark.slow
@pytest.mark.parametrize("x", [X, da.from_array(X, chunks=50)], ids=["numpy", "dask"])
def test_components_add_up_to_the_model(fitted, x):
    parts = fitted.components(x)
    assert [*parts] == ["gaussian", "tail"] and all(type(part) is type(x) for part in parts.values())
    np.testing.assert_allclose(sum(parts.values()), fitted.predict(x), rtol=1e-12)
    np.testing.assert_allclose(parts["tail"], tail(X, *fitted.popt[3:]), rtol=1e-6)


@pytest.mark.slow
def test_components_of_a_fit_with_ties_and_of_equal_models_and_of_its_own_points():
    two = models.gaussian + models.gaussian
    y = np.asarray(two(X, 3, 3, 0.5, 2, 7, 0.5))
    found = curve_fit(
        two, X, y, [2, 3, 0.6, 2, 7, 0], fixed={"gaussian1_center": 3}, expr={"gaussian2_width": "gaussian1_width"}
    )
    parts = found.components()
    assert [*parts] == ["gaussian1", "gaussian2"]
    np.testing.assert_allclose(parts["gaussian2"], models.gaussian(X, 2, 7, 0.5), atol=1e-6)


def test_a_saved_sum_of_ready_models_has_its_components(tmp_path):
    found = curve_fit(models.gaussian + models.line, X, Y, [3, 4, 0.8, 0, 1])
    found.save(tmp_path / "kept")
    again = load(tmp_path / "kept").components(X)
    for name, part in found.components(X).items():
        np.testing.assert_array_equal(again[name], part)


def test_what_has_no_components_or_no_guess_or_no_names_says_so(fitted, tmp_path):
    with pytest.raises(ValueError, match=r"tail is not a sum of models: add a function to one of dask_nlsq\.models"):
        curve_fit(tail, X, Y, [1, 1]).components()
    with pytest.raises(ValueError, match=r"only models from dask_nlsq\.models can guess a start; .* is not one of them"):
        curve_fit(SUM, X, Y, "guess")
    with pytest.raises(ValueError, match="`p0` has no 'gaussian_width'"):
        curve_fit(SUM, X, Y, {name: 1 for name in P0 if name != "gaussian_width"})
    for wrong in (lambda: models.line + 3, lambda: 2 * models.line, lambda: models.line * "a"):
        with pytest.raises(TypeError, match="is neither a model nor a function"):
            wrong()
    with pytest.raises(TypeError, match=r"the parameters of .* have no names"):
        models.line + (lambda x, *params: x)
    fitted.save(tmp_path / "kept")
    with pytest.raises(ValueError, match="has no name to import it by"):
        load(tmp_path / "kept").components(X)
