"""Parameters of lmfit as `p0`, and its models, which are refused."""

import jax.numpy as jnp
import lmfit
import numpy as np
import pytest

from dask_nlsq import curve_fit, fit_map, resume


def decay(x, amplitude, rate, slower, base):
    return amplitude * (jnp.exp(-rate * x) + jnp.exp(-slower * x)) + base


NAMES = ("amplitude", "rate", "slower", "base")
X = np.linspace(0, 5, 100)
Y = np.asarray(decay(X, 2, 1, 0.5, 0.3)) + 0.01 * np.random.default_rng(0).normal(size=100)


@pytest.fixture
def params():
    found = lmfit.Parameters()
    found.add("amplitude", 1.5, min=0, max=10)
    found.add("rate", 1.2)
    found.add("slower", expr="rate / 2")
    found.add("base", 0.3, vary=False)
    found.add("area", expr="amplitude / rate")
    return found


@pytest.mark.slow
def test_starts_bounds_fixed_values_and_expressions_come_from_lmfits_parameters(params):
    def residual(p):
        return np.asarray(decay(X, *(p[name].value for name in NAMES))) - Y

    theirs = lmfit.minimize(residual, params)
    found = curve_fit(decay, X, Y, params)
    for name in params:
        assert found[name].value == pytest.approx(theirs.params[name].value, rel=1e-4)
        assert found[name].error == pytest.approx(theirs.params[name].stderr, rel=1e-2, abs=1e-12)
    assert found["amplitude"].bounds == (0, 10) and found.fixed == {"base": 0.3} and found.tied == {"slower": "rate / 2"}
    assert [*found.params.valuesdict()] == [*NAMES]


@pytest.mark.slow
def test_what_the_call_says_besides_wins(params):
    found = curve_fit(decay, X, Y, params, bounds={"amplitude": (0, 20)}, fixed={"rate": 1.0}, expr={"area": "amplitude"})
    assert found["amplitude"].bounds == (0, 20) and found.fixed == {"base": 0.3, "rate": 1.0}
    assert found["area"].value == found["amplitude"].value


def test_a_checkpoint_keeps_what_they_say(params, tmp_path):
    found = curve_fit(decay, X, Y, params, strategy="streaming", checkpoint=tmp_path / "kept")
    again = resume(tmp_path / "kept", decay)
    np.testing.assert_array_equal(again.popt, found.popt)
    assert again.tied == found.tied and again.fixed == found.fixed


def test_a_map_takes_them(params):
    problem = fit_map(decay, X, np.stack([Y, Y]), params).problem
    assert problem.fit.spec.free == (0, 1) and problem.fit.ties.derived == ("area",)


def test_a_model_of_lmfit_is_refused_in_a_sentence():
    model = lmfit.Model(lambda x, a: a * x)
    for arguments in ((model, X, Y), (X, Y, model)):
        with pytest.raises(TypeError, match=r"is a Model of lmfit: give curve_fit a function written with jax\.numpy"):
            curve_fit(*arguments)


@pytest.mark.slow
def test_ties_bounds_and_values_of_the_call_win_over_those_of_the_parameters(params):
    tied = next(name for name, each in params.items() if each.expr)
    assert curve_fit(decay, X, Y, params, fixed={tied: 0.5}).fixed[tied] == 0.5
    held = next(name for name, each in params.items() if not each.vary and not each.expr)
    assert curve_fit(decay, X, Y, params, expr={held: "0.1*amplitude"}).tied[held] == "0.1*amplitude"
