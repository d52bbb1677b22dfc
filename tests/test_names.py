"""Parameters by name in results, and results as starts, bounds and values held of other fits."""

import copy
import json
import re

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from dask_nlsq import curve_fit, fit_groups, fit_map, load, resume
from dask_nlsq.base.text import LMFIT


def decay(x, amplitude, rate, base):
    return amplitude * jnp.exp(-rate * x) + base


X = np.linspace(0, 5, 200)
RATES = np.array([0.4, 0.7, 1.1])
Y = 2 * np.exp(-RATES[:, None] * X) + 0.3 + 0.01 * np.random.default_rng(3).normal(size=(3, 200))
P0 = dict(amplitude=1, rate=1, base=0)


@pytest.fixture(scope="module")
def fitted():
    return curve_fit(decay, X, Y[0], P0 | {"rate": 0.1}, bounds={"rate": (0, 0.35)}, fixed={"base": 0.3})


@pytest.fixture(scope="module")
def mapped():
    return fit_map(decay, X, da.from_array(Y, chunks=(1, -1)), P0)


@pytest.fixture(scope="module")
def grouped():
    return fit_groups(decay, X, Y, P0, local=["amplitude", "rate"], group_axes=0)


def test_a_parameter_by_name_has_value_error_bounds_and_what_became_of_it(fitted):
    free = curve_fit(decay, X, Y[0], P0)
    rate = free["rate"]
    assert (rate.value, rate.error, rate.bounds) == (free.popt[1], free.perr[1], (-np.inf, np.inf))
    assert not rate.fixed and rate.at_bound == 0
    assert f"{rate!r}".startswith("<Parameter rate 0.") and "+-" in f"{rate!r}"
    assert fitted["base"].fixed and f"{fitted['base']!r}" == "<Parameter base 0.3 (fixed)>"
    assert fitted["rate"].at_bound == 1 and fitted["rate"].bounds == (0, 0.35)
    assert f"{fitted['rate']!r}".endswith("(at its upper bound; from 0 to 0.35)>")
    popt, pcov = free  # as with SciPy
    assert popt is free[0] is free.popt and pcov is free[1]


def test_a_parameter_is_taken_for_its_value(fitted):
    rate = fitted["rate"]
    assert float(rate) == rate.value and np.exp(rate) == np.exp(rate.value)


def test_the_parameters_of_a_result_are_a_mapping_that_prints_as_the_table_of_the_summary(fitted):
    params = fitted.params
    assert [*params] == [*fitted.param_names] and len(params) == 3 and "rate" in params
    lines = f"{params!r}".splitlines()
    assert len(lines) == 3 and all(line in fitted.summary() for line in lines)
    assert params._repr_html_() in fitted._repr_html_()
    np.testing.assert_array_equal(decay(X, **params.valuesdict()), decay(X, *fitted.popt))


def test_an_unknown_name_is_answered_with_the_nearest(fitted, mapped, grouped):
    for result in (fitted, mapped, grouped):
        with pytest.raises(KeyError, match="no parameter 'rat', only amplitude, rate, base; did you mean 'rate'"):
            result["rat"]


def test_parameters_of_a_result_are_start_bounds_and_fixed_values_of_another(fitted, tmp_path):
    how = dict(checkpoint=tmp_path / "kept", strategy="streaming")
    again = curve_fit(decay, X, Y[0], fitted.params, bounds=fitted.params, fixed={"base": fitted["base"]}, **how)
    assert again.fixed == {"base": 0.3} and again["rate"].bounds == (0, 0.35)
    json.loads((tmp_path / "kept" / "fit.json").read_text())
    np.testing.assert_array_equal(resume(tmp_path / "kept").popt, again.popt)
    start = {"amplitude": fitted["amplitude"], "rate": 1, "base": 0}
    assert curve_fit(decay, X, Y[0], start).success


def test_a_saved_result_has_its_parameters_by_name(fitted, tmp_path):
    fitted.save(tmp_path / "kept")
    assert f"{load(tmp_path / 'kept').params!r}" == f"{fitted.params!r}"


@pytest.mark.slow
def test_a_map_has_values_and_errors_by_name_lazily(mapped):
    rate = mapped["rate"]
    assert isinstance(rate.value, da.Array) and f"{rate!r}" == "<Parameter rate: 3 values and errors>"
    np.testing.assert_allclose(rate.value, RATES, atol=0.02)
    np.testing.assert_array_equal(rate.error, mapped.perr[:, 1])


def test_parameters_of_a_map_are_starts_and_fixed_values_of_another(mapped):
    starts = {name: mapped[name] for name in mapped.param_names}
    again = fit_map(decay, X, Y, starts, fixed={"base": mapped["base"]})
    np.testing.assert_array_equal(again.problem.operands["start"].array[:, 0], mapped.popt)
    assert again.problem.fit.spec.free == (0, 1)


def test_a_map_of_labelled_data_has_labelled_values():
    y = xr.DataArray(Y, dims=("sample", "x"), coords={"sample": list("abc"), "x": X})
    rate = fit_map(decay, "x", y, P0, axis="x").compute()["rate"]
    assert rate.value.sel(sample="b") == pytest.approx(0.7, abs=0.02) and rate.error.dims == ("sample",)


def test_groups_have_shared_and_local_parameters_by_name(grouped, tmp_path):
    assert grouped["base"].value == grouped.popt[0] and grouped["base"].error == grouped.perr[0]
    np.testing.assert_allclose(grouped["rate"].value, RATES, atol=0.02)
    np.testing.assert_array_equal(grouped["rate"].error, grouped.local.perr[:, 1])
    popt, _ = grouped
    assert popt is grouped[0] is grouped.popt and [*grouped.params] == ["base"]
    grouped.save(tmp_path / "kept")
    np.testing.assert_array_equal(load(tmp_path / "kept")["rate"].value, grouped["rate"].value)


@pytest.mark.slow
def test_a_shared_parameter_is_held_in_another_fit_of_groups(grouped):
    held = fit_groups(decay, X, Y, P0, local="rate", group_axes=0, fixed={"base": grouped["base"]})
    np.testing.assert_allclose(held["rate"].value, RATES, atol=0.02)


def test_an_array_of_a_parameter_is_a_copy_where_one_is_asked_for():
    maps = fit_map(decay, X, Y, P0).compute(progress=False)
    before = maps.popt.copy()
    np.array(maps["rate"])[...] = 0
    np.testing.assert_array_equal(maps.popt, before)


def test_a_lazy_parameter_of_one_pixel_says_what_it_is():
    assert repr(fit_map(decay, X, da.from_array(Y[0], 200), P0)["rate"]) == "<Parameter rate: 1 values and errors>"


def test_names_of_lmfit_are_answered_with_ours(fitted, mapped, grouped):
    for name, own in (
        ("best_values", "params"),
        ("redchi", "reduced_chi_square"),
        ("eval_uncertainty", "confidence_band(x)"),
    ):
        with pytest.raises(AttributeError, match=f"no '{name}', which is lmfit's name: use {re.escape(own)}$"):
            getattr(fitted, name)
    with pytest.raises(AttributeError, match="GroupResult has no 'covar', which is lmfit's name: use pcov"):
        _ = grouped.covar
    with pytest.raises(AttributeError, match=r"use predict\(\)"):
        _ = mapped.best_fit
    assert not hasattr(mapped, "chisqr") and not hasattr(fitted, "chi") and copy.copy(fitted).popt is fitted.popt
    for own in LMFIT.values():
        assert hasattr(fitted, own.partition("(")[0])


def test_data_in_the_place_of_x_are_told_where_they_go():
    y = xr.DataArray(np.ones(9), dims="t")
    for fit, name in ((curve_fit, "curve_fit"), (fit_map, "fit_map")):
        with pytest.raises(TypeError, match=rf"`ydata` is missing, .* Give {name}\(f, None, data\), which takes x from"):
            fit(lambda t, a: a * t, y)
        with pytest.raises(TypeError, match=rf"Give {name}\(f, xdata, ydata\)"):
            fit(lambda t, a: a * t, y.data)


def test_a_misspelt_local_or_axis_of_groups_is_answered_with_the_nearest():
    y = xr.DataArray(Y, dims=("angle", "t"), coords={"t": X})
    for given, message in (
        (dict(local="rates", group_axes=0), "`local` names 'rates', .*; did you mean 'rate'"),
        (
            dict(local="rate", group_axes="angel"),
            r"`group_axes` 'angel' is not .*: it has \('angle', 't'\); did you mean 'angle'",
        ),
        (dict(local="rate", group_axes=2), "`group_axes` must name axes of `ydata`, by numbers from 0 to 1: not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_groups(decay, None, y, P0, **given)
    with pytest.raises(ValueError, match="its dimensions have no names, give numbers from 0 to 1"):
        fit_groups(decay, X, Y, P0, local="rate", group_axes="angle")
