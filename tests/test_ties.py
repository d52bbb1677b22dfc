"""Parameters that follow others, and derived quantities: `expr` in fits, maps and groups."""

import os
import subprocess
import sys
from contextlib import nullcontext

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from dask_nlsq import curve_fit, fit_groups, fit_map, load, models, resume
from dask_nlsq.interface.cli import nlsq
from dask_nlsq.maps.stored import StoredMap
from dask_nlsq.model.ties import LONGEST, Ties


def peaks(x, h1, c1, w1, h2, c2, w2):
    return h1 * jnp.exp(-(((x - c1) / w1) ** 2) / 2) + h2 * jnp.exp(-(((x - c2) / w2) ** 2) / 2)


def alike(x, h1, c1, w1, h2, c2):
    """What a tie of w2 to twice w1 makes of it."""
    return peaks(x, h1, c1, w1, h2, c2, 2 * w1)


def twice(w1):
    return 2 * w1


X = np.linspace(0, 10, 300)
Y = np.asarray(peaks(X, 3, 3, 0.5, 2, 6, 1.0)) + 0.05 * np.random.default_rng(0).normal(size=300)
P0 = dict(h1=2, c1=3, w1=0.6, h2=1, c2=6)
EXPR = {"w2": "2 * w1", "area": "h1 * w1 * sqrt(2 * pi)", "total": "area + h2 * w2 * sqrt(2 * pi)"}


@pytest.fixture(scope="module")
def expected():
    return curve_fit(alike, X, Y, P0)


@pytest.fixture(scope="module")
def tied():
    return curve_fit(peaks, X, Y, P0, expr=EXPR)


def assert_like(found, expected):
    np.testing.assert_allclose(found.popt[:5], expected.popt, rtol=1e-6)
    np.testing.assert_allclose(found.pcov[:5, :5], expected.pcov, rtol=1e-4, atol=1e-9)
    assert found.dof == expected.dof and found.cost == pytest.approx(expected.cost, rel=1e-9)
    assert found["w2"].value == 2 * found["w1"].value and found["w2"].error == pytest.approx(2 * found["w1"].error)


def full_jacobian(x, *params):
    return jnp.stack(jax.jacfwd(lambda *p: peaks(x, *p), argnums=tuple(range(6)))(*params), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{}, {"jac": full_jacobian}, {"strategy": "streaming"}, {"n_starts": 3}],
    ids=["plain", "jac", "streaming", "starts"],
)
def test_a_tied_fit_is_the_fit_of_the_model_with_the_tie_written_into_it(expected, how):
    found = curve_fit(peaks, X, Y, P0, expr={"w2": "2 * w1"}, **how)
    assert_like(found, expected)
    assert found.tied == {"w2": "2 * w1"} and found.free == (0, 1, 2, 3, 4) and not found.fixed
    assert f"{found['w2']!r}".endswith("(= 2 * w1)>") and "= 2 * w1" in found.summary()
    np.testing.assert_allclose(found.confidence_band(X[:9]), expected.confidence_band(X[:9]), atol=1e-6)
    np.testing.assert_allclose(found.sandwich[:5, :5], expected.sandwich, rtol=1e-3, atol=1e-9)
    assert found.sandwich[5, 5] == pytest.approx(4 * found.sandwich[2, 2])
    assert np.isnan(found.correlation[5]).all() and not any("w2" in line for line in found.diagnostics.lines)


@pytest.mark.parametrize("rule", [twice, lambda p: 2 * p["w1"], "w1 + w1", "exp(log(2*w1))"])
def test_a_tie_is_text_or_a_function_of_names_or_of_a_dict(expected, rule):
    assert_like(curve_fit(peaks, X, Y, [2, 3, 0.6, 1, 6, 99], expr={"w2": rule}), expected)


@pytest.mark.slow
def test_derived_quantities_have_errors_by_the_delta_method(tied):
    h, w = tied.popt[0], tied.popt[2]
    assert [*tied.derived] == ["area", "total"] and tied["area"].value == pytest.approx(h * w * np.sqrt(2 * np.pi))
    G = np.zeros(6)
    G[[0, 2]] = np.sqrt(2 * np.pi) * np.array([w, h])
    assert tied["area"].error == pytest.approx(np.sqrt(G @ tied.pcov @ G))
    assert "area" in tied.summary() and "area" in tied._repr_html_() and "area" in tied.to_dict()["derived"]
    assert [*tied.params] == [*tied.param_names] and len(tied.popt) == 6
    direct = curve_fit(
        lambda x, area, c1, w1: models.gaussian(x, area / w1 / np.sqrt(2 * np.pi), c1, w1), X[:130], Y[:130], [3, 3, 1]
    )
    found = curve_fit(models.gaussian, X[:130], Y[:130], expr={"area": "amplitude * width * sqrt(2 * pi)"})
    assert found["area"].error == pytest.approx(direct.perr[0], rel=1e-4) and found.free == (0, 1, 2)


@pytest.mark.slow
def test_where_the_data_determine_nothing_derived_errors_are_infinite_and_what_is_held_stays_exact():
    with pytest.warns(match="Covariance of the parameters could not be estimated"):
        found = curve_fit(
            lambda x, a, b, c: (a + b) * x + c, X, X, [1, 1, 0], fixed={"c": 0}, expr={"s": "a + b", "d": "2 * c"}
        )
    assert found["s"].error == np.inf and found["d"].error == 0 and found["c"].error == 0


@pytest.mark.slow
def test_ties_hold_with_values_that_are_fixed_and_bounds_of_others(expected):
    found = curve_fit(peaks, X, Y, P0, expr={"w2": "2 * w1"}, fixed={"c1": 3.0}, bounds={"w1": (0, None)})
    assert found.free == (0, 2, 3, 4) and found["w2"].bounds == (-np.inf, np.inf)
    assert found["w2"].value == pytest.approx(expected["w1"].value * 2, rel=0.01)
    again = curve_fit(peaks, X, Y, found.params, expr=found.tied, bounds=found.params)
    assert_like(again, expected)


def test_ties_are_pickled_to_the_same_bytes_in_every_process():
    code = "import pickle, sys; from dask_nlsq.model.ties import Ties; "
    code += "ties = Ties('abcdef', {'f': 'a+b+c', 'd': 'f+c+a+e', 'e': 'b*f'}); sys.stdout.buffer.write(pickle.dumps(ties))"
    found = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True).stdout
        for seed in "123"
    ]
    assert found[0] and len({*found}) == 1


@pytest.mark.slow
def test_ready_models_are_tied_and_guess_their_start():
    y = Y + np.asarray(peaks(X, 0, 3, 1, 1, 6, 1))
    found = curve_fit(models.gaussian + models.gaussian, X, y, expr={"gaussian2_width": "2 * gaussian1_width"})
    widths = found["gaussian1_width"].value, found["gaussian2_width"].value
    assert found.success and widths[1] == 2 * widths[0]


def test_a_result_that_was_saved_has_ties_and_derived_quantities(tied, tmp_path):
    tied.save(tmp_path / "kept")
    again = load(tmp_path / "kept", trust=True)
    assert f"{again.derived!r}" == f"{tied.derived!r}" and again.tied == tied.tied and again.dof == tied.dof
    np.testing.assert_array_equal(again.predict(X), tied.predict(X))
    np.testing.assert_array_equal(again.sandwich, tied.sandwich)


def test_a_checkpoint_keeps_expressions_and_asks_for_functions(expected, tmp_path):
    how = dict(strategy="streaming")
    found = curve_fit(peaks, X, Y, P0, expr={"w2": "2 * w1"}, checkpoint=tmp_path / "text", **how)
    np.testing.assert_array_equal(resume(tmp_path / "text", peaks).popt, found.popt)
    with pytest.raises(ValueError, match="Changed: expr"):
        curve_fit(peaks, X, Y, P0, expr={"w2": "3 * w1"}, checkpoint=tmp_path / "text", **how)
    found = curve_fit(peaks, X, Y, P0, expr={"w2": twice}, checkpoint=tmp_path / "function", **how)
    with pytest.raises(ValueError, match=r"the function twice, which a checkpoint does not keep: pass `expr` again"):
        resume(tmp_path / "function", peaks)
    np.testing.assert_array_equal(resume(tmp_path / "function", peaks, expr={"w2": twice}).popt, found.popt)


@pytest.mark.slow
def test_a_map_has_ties_and_derived_quantities_as_each_of_its_fits(tied, tmp_path):
    fits = fit_map(peaks, X, np.stack([Y, Y, np.full_like(Y, np.nan)]), P0, expr=EXPR, full_covariance=True)
    fits.to_zarr(tmp_path / "maps.zarr")
    stored = StoredMap(tmp_path / "maps.zarr")
    for name in ("w1", "w2", "area", "total"):
        np.testing.assert_allclose(stored[name].value[:2], tied[name].value, rtol=1e-5)
        np.testing.assert_allclose(stored[name].error[:2], tied[name].error, rtol=1e-3)
        assert np.isnan(stored[name].value[2]) and np.isnan(stored[name].error[2])
    np.testing.assert_allclose(stored.pcov[0], tied.pcov, rtol=1e-3, atol=1e-9)
    data = stored.to_xarray()
    np.testing.assert_array_equal(data["derived"].sel(quantity="area"), stored["area"].value)
    with pytest.raises(ValueError, match="Changed: expr"):
        fit_map(peaks, X, np.stack([Y, Y, Y * np.nan]), P0, expr=EXPR | {"area": "h1"}).to_zarr(
            tmp_path / "maps.zarr", resume=True
        )


@pytest.mark.slow
def test_functions_of_ties_and_of_sums_work_on_workers_as_they_do_here(workers):
    expr, x, y = {"w2": twice, "area": lambda h1, w1: h1 * w1}, *(da.from_array(each, chunks=100) for each in (X, Y))
    here = curve_fit(peaks, X, Y, P0, expr=expr, xrange=(1, 9))
    whole = models.gaussian + (lambda x, h, c: models.gaussian(x, h, c, 1.0))
    with workers.as_current():
        there = curve_fit(peaks, x, y, P0, expr=expr, xrange=(1, 9), strategy="chunked")
        fits = fit_map(peaks, X, da.from_array(np.stack([Y, Y]), chunks=(1, -1)), P0, expr=expr, xrange=(1, 9)).compute()
        parts = curve_fit(whole, x, y, [2, 3, 0.6, 1, 6], strategy="chunked").components()
        np.testing.assert_allclose(np.asarray(parts["own"]).max(), 2, atol=0.1)
    np.testing.assert_allclose(there.popt, here.popt, rtol=1e-9)
    assert there["area"].error == pytest.approx(here["area"].error) and there.n_masked == here.n_masked
    np.testing.assert_allclose(fits["w2"].error, here["w2"].error, rtol=1e-3)


def decay(x, amplitude, rate, slower, base):
    return amplitude * (jnp.exp(-rate * x) + jnp.exp(-slower * x)) + base


@pytest.mark.slow
def test_groups_tie_shared_parameters_and_derive_from_shared_and_local_ones(tmp_path):
    t = np.linspace(0, 5, 80)
    y = np.array([1.0, 2.0, 3.0])[:, None] * (np.exp(-t) + np.exp(-t / 2)) + 0.1
    y += 0.01 * np.random.default_rng(1).normal(size=y.shape)
    p0, how = dict(amplitude=1, rate=1.2, base=0), dict(local="amplitude", group_axes=0, full_covariance=True)
    expr = {"slower": "rate / 2", "time": "1 / rate", "speed": "amplitude * rate"}
    found = fit_groups(decay, t, y, p0, expr=expr, checkpoint=tmp_path / "kept", **how)
    expected = fit_groups(lambda x, amplitude, rate, base: decay(x, amplitude, rate, rate / 2, base), t, y, p0, **how)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-6)
    np.testing.assert_allclose(found.pcov, expected.pcov, rtol=1e-4)
    assert found["slower"].value == found["rate"].value / 2 and found["slower"].error == found["rate"].error / 2
    assert found["time"].error == pytest.approx(found["rate"].error / found["rate"].value ** 2)
    local = expected.local.compute()
    amplitude, rate = local.popt[:, 0], local.popt[:, 1]
    np.testing.assert_allclose(found["speed"].value, amplitude * rate, rtol=1e-6)
    G = np.stack([rate, amplitude, 0 * rate], axis=1)
    errors = np.sqrt(np.einsum("gi,gij,gj->g", G, local.pcov, G))
    np.testing.assert_allclose(found["speed"].error, errors, rtol=1e-4)
    np.testing.assert_array_equal(found.local["slower"].value, found.local["rate"].value / 2)
    found.save(tmp_path / "result")
    again = load(tmp_path / "result")
    assert f"{again['time']!r}" == f"{found['time']!r}"
    np.testing.assert_array_equal(again["speed"].value, found["speed"].value)
    np.testing.assert_array_equal(resume(tmp_path / "kept", decay).popt, found.popt)


NAMES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + b*c - a/b", 2 + 3 * 5 - 2 / 3), ("-a**2", -4.0), ("(-a)**3", -8.0), ("a**0.5", 2**0.5), ("2**-1", 0.5),
        ("exp(a)*log(b)", np.exp(2) * np.log(3)), ("arctan2(a, b) + pi", np.arctan2(2, 3) + np.pi), ("e", np.e),
        ("minimum(a, b)", 2.0), ("-" * 400 + "a", 2.0), (" a ", 2.0), ("1/0", np.inf), ("9**9**9**9", np.inf),
    ],
)  # fmt: skip
def test_an_expression_has_the_value_that_python_gives_it(text, value):
    with jax.enable_x64(True):
        assert Ties(NAMES, {"d": text}).every([2.0, 3.0, 5.0])["d"] == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('false')", "a.real", "a[0]", "lambda: a", "a if b else c", "a < b", "[a]", "'a'", "True",
        "1j", "exp(a, b)", "exp(*b)", "open(a)", "(a := b)", "f'{a}'", "a and b", "a @ b", "a // b", "a % b", "exp", "a;b",
        "", "a +", "(" * 240 + "a", "a+" * LONGEST + "a", "1e999999 + " + "9" * 400, "\0",
    ],
)  # fmt: skip
def test_what_is_more_than_arithmetic_is_refused(text):
    with pytest.raises(ValueError, match="`expr`"):
        Ties(NAMES, {"d": text}).every([1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("expr", "said"),
    [
        ({"b": "amp"}, "`expr` for 'b' names 'amp', the parameters are a, b, c"),
        ({"ratio": "a", "b": "ratoi"}, "did you mean 'ratio'"),
        ({"a": "b", "b": "c * d", "d": "a"}, "`expr` is circular: "),
        ({"a": "a + 1"}, "`expr` is circular: a -> a"),
        ({"a": lambda b, z: b}, "is a function of b, z: its arguments must be named like parameters"),
        ({"a": lambda p: p["z"]}, "which fails .KeyError: 'z'.: it must return a number"),
        ({"b": "c", "a": lambda p: p["b"]}, "which fails .KeyError: 'b'"),
        ({"a": lambda b: np.sin(b)}, "with jax.numpy"),
        ({"a": lambda b: jnp.stack([b, b])}, r"returned shape \(2,\): it must be one number"),
    ],
)
def test_ties_that_cannot_be_are_one_clear_error(expr, said):
    with pytest.raises(ValueError, match=said):
        Ties(NAMES, expr)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(fixed={"w2": 1}), "`fixed` and `expr` both name 'w2'"),
        (dict(bounds={"w2": (0, 3)}), r"`bounds` has \(0, 3\) for w2, which `expr` ties"),
        (dict(expr="w2 = w1"), "`expr` must be a dict"),
        (dict(expr={"w2": 3}), "`expr` for 'w2' must be an expression or a function, not 3"),
        (dict(expr=dict.fromkeys(("h1", "c1", "w1", "h2", "c2", "w2"), "1")), "there is nothing to fit"),
    ],
)
def test_ties_that_contradict_other_arguments_are_refused(how, said):
    with pytest.raises((ValueError, TypeError), match=said):
        curve_fit(peaks, X, Y, P0, **(dict(expr={"w2": "w1"}) | how))


@pytest.mark.slow
def test_the_command_line_ties_and_derives(tmp_path):
    zarr.create_array(tmp_path / "y.zarr", data=2 * np.arange(50.0) + 1)
    command = ["fit", str(tmp_path / "y.zarr"), "--model", "line", "--x", "0:50:1"]
    found = CliRunner().invoke(nlsq, [*command, "--expr", "intercept=slope/2", "--expr", "zero = -intercept / slope"])
    assert found.exit_code == 0 and "= slope/2" in found.output and "zero" in found.output
    found = CliRunner().invoke(nlsq, [*command, "--expr", "slope"])
    assert found.exit_code == 2 and "--expr slope: one name, and what it is" in found.output


@pytest.mark.parametrize(
    "name, warned", [("amplitudes", True), ("Amplitude", True), ("amplitude2", False), ("area", False), ("am", False)]
)
def test_a_derived_quantity_whose_name_is_almost_that_of_a_parameter_is_warned_of(name, warned):
    x = np.linspace(0, 1, 20)

    def line(x, amplitude, offset):
        return amplitude * x + offset

    with pytest.warns(UserWarning, match="'amplitude' stays free") if warned else nullcontext():
        curve_fit(line, x, 2 * x + 1, p0=[1, 1], expr={name: "2 * offset"})
