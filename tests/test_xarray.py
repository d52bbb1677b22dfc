"""DataArrays by name: xarray's own cases of `curvefit` through ``.nlsq.curvefit``, what it cannot do, and `curve_fit`.

The cases are those of xarray's ``tests/test_dataarray.py``, ``test_curvefit`` and those after it (xarray 2026.9, Apache 2.0),
with models of `jax.numpy`. Left out: SciPy's words in the error of a fit that does not converge, and the private function
that takes a signature apart.
"""

import subprocess
import sys

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import dask_nlsq.accessor  # noqa: F401
from dask_nlsq import curve_fit, fit_map, plan_fit
from dask_nlsq.accessor import start_of

NAN = np.nan
WAYS = pytest.mark.parametrize("chunks", [None, {"x": 1}], ids=["numpy", "dask"])


def decay(t, n0, tau=1, *, np=jnp):
    return n0 * np.exp(-t / tau)


def sine(t, a, f, p, *, np=jnp):
    return a * np.sin(2 * np.pi * (f * t + p))


def with_numpy(f, *names):
    """The same model for SciPy."""
    return lambda x, *params: f(x, *params, np=np)


def maybe_chunked(data, chunks):
    return data if chunks is None else data.chunk(chunks)


def dates(seconds):
    return np.datetime64("2026-01-01", "ns") + (1e9 * np.asarray(seconds)).astype("m8[ns]")


@pytest.fixture
def nothing_runs():
    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# xarray's own cases

T = np.arange(0, 5, 0.5)
S = np.arange(0, 2, 0.02)


@pytest.fixture
def decays():
    y = np.stack([decay(T, 3, 3, np=np), decay(T, 5, 4, np=np), NAN * T], axis=-1)
    y[0, 0] = NAN
    return xr.DataArray(y, dims=("t", "x"), coords={"t": T, "x": [0, 1, 2]})


@pytest.fixture
def sines():
    return xr.DataArray(np.stack([sine(S, 1, 2, 0, np=np)] * 2), coords={"x": [0, 1], "t": S})


def coefficients(values, x, names):
    return xr.DataArray(values, coords={"x": x, "param": names})


@WAYS
def test_xarray_case_a_decay_with_missing_values(decays, chunks):
    data = maybe_chunked(decays, chunks)
    found = data.nlsq.curvefit([data.t], decay, p0={"n0": 4}, bounds={"tau": (2, 6)})
    expected = coefficients([[3, 3], [5, 4], [NAN, NAN]], [0, 1, 2], ["n0", "tau"])
    xr.testing.assert_allclose(found.curvefit_coefficients, expected, rtol=1e-3)
    assert np.isnan(found.curvefit_covariance.sel(x=2)).all()


def test_xarray_case_a_function_without_names_over_all_dimensions(decays):
    found = decays.nlsq.curvefit("t", jnp.power, reduce_dims="x", param_names=["a"])
    assert list(found.param) == ["a"]
    assert "x" not in found.dims
    expected = decays.curvefit("t", np.power, reduce_dims="x", param_names=["a"])
    xr.testing.assert_allclose(found, expected, rtol=1e-4)


def test_xarray_case_starts_come_from_the_signature_and_move_into_the_bounds():
    assert start_of(decay, ["n0", "tau"], {"n0": 4}, {"tau": [5, np.inf]}) == {"n0": 4, "tau": 6}
    assert start_of(decay, ["n0", "tau"], None, {"tau": (0, 7), "n0": (None, -2)}) == {"n0": -3, "tau": 1}
    found = start_of(decay, ["n0", "tau"], {"n0": 4}, {"tau": (np.array([3, 4]), np.inf)})
    np.testing.assert_array_equal(found["tau"], [4, 5])


@WAYS
def test_xarray_case_starts_that_differ_from_place_to_place(sines, chunks):
    data = maybe_chunked(sines, chunks)
    a, p = (xr.DataArray(values, coords=[data.x]) for values in ([1, -1], [0, 0.5]))
    found = data.nlsq.curvefit([data.t], sine, p0={"a": a, "p": p, "f": 2})
    expected = coefficients([[1, 2, 0], [-1, 2, 0.5]], [0, 1], ["a", "f", "p"])
    xr.testing.assert_allclose(found.curvefit_coefficients, expected)
    with pytest.raises(
        ValueError,
        match=r"Initial guess for 'a' has unexpected dimensions .* should only have dimensions that are in data dimensions",
    ):
        data.nlsq.curvefit([data.t], sine, p0={"a": xr.DataArray([1, 2], coords={"foo": [1, 2]})})


@WAYS
def test_xarray_case_bounds_that_differ_from_place_to_place(sines, chunks):
    data = maybe_chunked(sines, chunks)
    low, high = (xr.DataArray(values, coords=[data.x]) for values in ([0, -2], [2, 0]))
    expected = coefficients([[1, 2, 0], [-1, 2, 0.5]], [0, 1], ["a", "f", "p"])
    for bounds in ({"a": (low, high)}, {"a": (-2, high)}):
        found = data.nlsq.curvefit([data.t], sine, p0={"f": 2, "p": 0.25}, bounds=bounds)
        xr.testing.assert_allclose(found.curvefit_coefficients, expected)
    with pytest.raises(
        ValueError,
        match=r"Upper bound for 'a' has unexpected dimensions .* should only have dimensions that are in data dimensions",
    ):
        data.nlsq.curvefit([data.t], sine, bounds={"a": (0, xr.DataArray([1], coords={"foo": [1]}))})


@WAYS
def test_xarray_case_fits_that_fail(chunks):
    def line(x, a, b):
        return jnp.where(a > 10, 0.0, a * x + b)

    data = xr.DataArray([[1, 3, 5], [0, 20, 40]], coords={"x": [1, 2], "i": [0.0, 1.0, 2.0]})
    data = maybe_chunked(data, chunks)
    with pytest.raises(RuntimeError, match="not found for 1 of .*iteration_limit.*Raise max_nfev.*errors='ignore'"):
        data.nlsq.curvefit("i", line, kwargs=dict(maxfev=5)).compute()
    found = data.nlsq.curvefit("i", line, errors="ignore", kwargs=dict(maxfev=5)).compute()
    expected = coefficients([[2, 1], [NAN, NAN]], [1, 2], ["a", "b"])
    xr.testing.assert_allclose(found.curvefit_coefficients, expected)
    one = data.isel(x=1)
    with pytest.raises(RuntimeError, match="Optimal parameters not found"):
        one.nlsq.curvefit("i", line, max_nfev=5)
    assert np.isnan(one.nlsq.curvefit("i", line, errors="ignore", max_nfev=5).curvefit_coefficients).all()


# ---------------------------------------------------------------------------------------------------------------------
# the layout of the result


def plane(x, a, b, c, *, np=jnp):
    u, v = x
    return a + b * u + c * v**2


@pytest.fixture
def stack():
    rng = np.random.default_rng(0)
    coords = {
        "row": ("row", [3, 5], {"units": "mm"}),
        "u": np.linspace(0, 1, 7),
        "v": np.linspace(-1, 1, 5),
        "label": ("row", ["a", "b"]),
        "shifted": (("row", "u"), np.linspace(0, 1, 7) + [[0.1], [0.3]], {"units": "s"}),
        "sample": 7,
    }
    counts = xr.DataArray(rng.normal(1, 0.1, (7, 2, 5)), coords, ("u", "row", "v"), "counts", {"units": "1"})
    return xr.Dataset(
        {"counts": counts, "dark": 2 * counts.isel(row=0).drop_vars(("row", "label", "shifted"))}, attrs={"beamline": "P10"}
    )


CALLS = {
    "along one": (["v"], dict(param_names=["a", "b", "c"]), lambda v, a, b, c, np: a + b * v + c * v**2),
    "along two": (["u", "v"], {}, plane),
    "with one reduced": ("u", dict(reduce_dims="v"), lambda u, a, b, np: a + b * u),
    "with all reduced": ("u", dict(reduce_dims=["v", "row"]), lambda u, a, b, np: a + b * u),
    "along one that differs from place to place": ("shifted", dict(reduce_dims=["u"]), lambda u, a, b, np: a + b * u),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("variables", ["counts", ["counts", "dark"]], ids=["DataArray", "Dataset"])
def test_dimensions_coordinates_and_attributes_are_those_of_xarray(stack, name, variables):
    coords, options, f = CALLS[name]
    if "row" in options.get("reduce_dims", ()) or coords == "shifted":
        variables = variables if isinstance(variables, str) else variables[:1]
    data = stack[variables]
    names = ["a", "b", "c"] if "v" in coords else ["a", "b"]
    options = dict(param_names=names) | options
    expected = data.curvefit(coords, lambda x, *p: f(x, *p, np=np), **options)
    for chunked in (data, data.chunk(u=3, v=2)):
        found = chunked.nlsq.curvefit(coords, lambda x, *p: f(x, *p, np=jnp), **options).compute()
        xr.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
        assert list(found) == list(expected)
        assert found.attrs == expected.attrs
        for each in (*found.coords, *found):
            assert found[each].dims == expected[each].dims
            assert found[each].attrs == expected[each].attrs
