"""Parameters by name, and parameters that are held."""

import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from dask_nlsq import curve_fit, fit, load, plan_fit, resume


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


X = np.linspace(0, 10, 5000)
Y = 2 * np.exp(-0.5 * X) + 0.3 + 0.01 * np.random.default_rng(0).normal(size=5000)


def test_start_and_bounds_are_given_by_name():
    expected = curve_fit(decay, X, Y, p0=[1, 1, 0], bounds=([0, -np.inf, -np.inf], [np.inf, 3, np.inf]))
    found = curve_fit(decay, X, Y, p0={"c": 0, "b": 1, "a": 1}, bounds={"a": (0, None), "b": (None, 3)})
    np.testing.assert_array_equal(found.popt, expected.popt)
    np.testing.assert_array_equal(found.pcov, expected.pcov)


def test_names_of_a_dict_name_the_parameters_of_a_model_that_takes_any_number():
    found = curve_fit(lambda x, *p: p[0] * jnp.exp(-p[1] * x) + p[2], X, Y, p0={"height": 1, "rate": 1, "floor": 0})
    assert found.param_names == ("height", "rate", "floor")


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"strategy": "streaming"}, {"jac": "own"}, {"n_starts": 5}])
def test_a_parameter_that_is_held_leaves_the_fit(how):
    how = dict(how)
    if "jac" in how:
        how["jac"] = lambda x, a, b, c: jnp.stack([jnp.exp(-b * x), -a * x * jnp.exp(-b * x), jnp.ones(len(x))], axis=1)
    expected = curve_fit(lambda x, a, c: decay(x, a, 0.45, c), X, Y, p0=[1, 0])
    found = curve_fit(decay, X, Y, p0=[1, 1, 0], fixed={"b": 0.45}, x_scale=[1, 5, 1], **how)
    np.testing.assert_allclose(found.popt[[0, 2]], expected.popt, rtol=1e-6)
    np.testing.assert_allclose(found.pcov[np.ix_([0, 2], [0, 2])], expected.pcov, rtol=1e-5)
    assert found.popt[1] == 0.45 and found.perr[1] == 0 and not found.pcov[1].any()
    assert found.fixed == {"b": 0.45} and found.free == (0, 2) and found.dof == expected.dof == len(X) - 2
    assert found.param_names == ("a", "b", "c") and "fixed" in found.summary()
    np.testing.assert_allclose(found.predict(X), expected.predict(X), rtol=1e-6)
    np.testing.assert_allclose(found.residuals(), expected.residuals(), atol=1e-7)
    low, high = found.confidence_band(X[:5])
    assert np.all(low < high)
    np.testing.assert_array_equal(found.confidence_intervals()[1], 0.45)
    for matrix in (found.sandwich, found.jackknife):
        assert not matrix[1].any() and np.all(np.diag(matrix)[[0, 2]] > 0)


@pytest.mark.slow
def test_a_value_that_is_held_needs_no_start_and_may_lie_outside_of_the_bounds():
    found = curve_fit(decay, X, Y, p0={"a": 1, "b": 1}, fixed={"c": 0.3}, bounds={"c": (5, 9), "a": (0, 3)})
    assert found.popt[2] == 0.3
    assert fit(decay, X, Y, {"a": 1, "b": 1}, fixed={"c": 0.3}, workflow="standard").popt[2] == 0.3
    assert "3 parameters" not in str(plan_fit(decay, X, Y, {"a": 1, "b": 1}, fixed={"c": 0.3}))


def test_a_held_parameter_survives_a_checkpoint_and_a_file(tmp_path):
    store = zarr.create_array(store=tmp_path / "y.zarr", shape=Y.shape, dtype="f8", chunks=(500,))
    store[:] = Y
    options = dict(p0={"a": 1, "b": 1}, fixed={"c": 0.3})
    whole = curve_fit(decay, X, str(tmp_path / "y.zarr"), checkpoint=tmp_path / "c", **options)
    again = resume(tmp_path / "c", decay)
    np.testing.assert_array_equal(again.popt, whole.popt)
    np.testing.assert_array_equal(again.parts.gram, whole.parts.gram)
    np.testing.assert_array_equal(again.sandwich, whole.sandwich)
    assert again.r_squared == whole.r_squared
    with pytest.raises(ValueError, match="fixed"):
        curve_fit(decay, X, str(tmp_path / "y.zarr"), checkpoint=tmp_path / "c", p0={"a": 1, "b": 1}, fixed={"c": 0.4})
    whole.save(tmp_path / "r")
    loaded = load(tmp_path / "r")
    np.testing.assert_array_equal(loaded.predict(X), whole.predict(X))
    np.testing.assert_array_equal(loaded.jackknife, whole.jackknife)
    assert loaded.diagnostics.lines == whole.diagnostics.lines


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(p0={"a": 1, "b": 1}), ValueError, r"`p0` has no 'c': it must name all parameters that are not fixed"),
        (dict(p0={"a": 1, "b": 1, "cc": 1}), ValueError, r"`p0` names 'cc'.*did you mean 'c'"),
        (dict(bounds={"d": (0, 1)}), ValueError, r"`bounds` names 'd', the parameters are \('a', 'b', 'c'\)"),
        (dict(bounds={"a": 3}), ValueError, r"`bounds` must be a pair"),
        (dict(fixed={"k": 1}), ValueError, r"`fixed` names 'k'"),
        (dict(fixed=["a"]), TypeError, r"`fixed` must be a dict of values by name"),
        (dict(fixed={"a": 1, "b": 2, "c": 3}), ValueError, r"`fixed` holds all parameters: there is nothing to fit"),
        (dict(fixed={"a": np.nan}), ValueError, r"`fixed` must hold a finite number for a"),
        (dict(fixed={"a": [1, 2]}), ValueError, r"`fixed\['a'\]` must be a number, not of shape \(2,\)"),
        (dict(fixed={"a": "one"}), TypeError, r"`fixed\['a'\]` must be real numbers"),
        (
            dict(p0=[1, 1, 0], bounds={"a": (2, None)}),
            ValueError,
            r"outside of provided bounds: a = 1.0 is not in \[2.0, inf\]",
        ),
    ],
)
def test_wrong_names_and_values_are_named(options, error, message):
    with pytest.raises(error, match=message):
        curve_fit(decay, X, Y, **options)


def test_what_is_held_is_compiled_once_whatever_the_start():
    found = {curve_fit(decay, X, Y, p0={"a": a, "b": 1}, fixed={"c": 0.3}).objective.model.token for a in (1, 2, 3)}
    assert len(found) == 1


def test_scipys_output_is_of_the_parameters_that_were_fitted():
    popt, pcov, info, _, _ = curve_fit(decay, X, Y, p0=[1, 1, 0], fixed={"c": 0.3}, full_output=True)
    assert popt.shape == (3,) and pcov.shape == (3, 3)
    assert info["fjac"].shape == (2, 2) and info["qtf"].shape == info["ipvt"].shape == (2,)


def test_a_jacobian_needs_the_columns_of_what_is_held():
    def jac(x, a, b, c):
        return jnp.stack([jnp.exp(-b * x), -a * x * jnp.exp(-b * x)], axis=1)

    with pytest.raises(ValueError, match="column for each of 3 parameters, those held among them"):
        curve_fit(decay, X, Y, p0=[1, 1, 0], fixed={"b": 0.5}, jac=jac)
