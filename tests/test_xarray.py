"""DataArrays by name: xarray's own cases of `curvefit` through ``.nlsq.curvefit``, what it cannot do, and `curve_fit`.

The cases are those of xarray's ``tests/test_dataarray.py`` (2026.9, Apache 2.0), ``test_curvefit`` and those after it, with
models of `jax.numpy`. Left out: SciPy's words in the error of a fit that does not converge, and the private function that
takes a signature apart.
"""

import subprocess
import sys

import dask
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import dask_nlsq.accessor  # noqa: F401
from dask_nlsq import curve_fit, fit_groups, fit_map, plan_fit, resume
from dask_nlsq.interface.accessor import start_of
from dask_nlsq.models import gaussian

NAN = np.nan
IN_CHUNKS = pytest.mark.parametrize("chunks", [{"x": 1}, pytest.param(None, marks=pytest.mark.slow)], ids=["dask", "numpy"])
IN_MEMORY = pytest.mark.parametrize("chunks", [None, pytest.param({"x": 1}, marks=pytest.mark.slow)], ids=["numpy", "dask"])


def decay(t, n0, tau=1, *, np=jnp):
    return n0 * np.exp(-t / tau)


def sine(t, a, f, p, *, np=jnp):
    return a * np.sin(2 * np.pi * (f * t + p))


def maybe_chunked(data, chunks):
    return data if chunks is None else data.chunk(chunks)


def dates(seconds):
    return np.datetime64("2026-01-01", "ns") + (1e9 * np.asarray(seconds)).astype("m8[ns]")


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


@pytest.mark.slow
@IN_CHUNKS
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


@pytest.mark.slow
@IN_MEMORY
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


@pytest.mark.slow
@IN_CHUNKS
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


@pytest.mark.slow
@IN_MEMORY
def test_xarray_case_fits_that_fail(chunks):
    def line(x, a, b):
        return jnp.where(a > 10, 0.0, a * x + b)

    data = xr.DataArray([[1, 3, 5], [0, 20, 40]], coords={"x": [1, 2], "i": [0.0, 1.0, 2.0]})
    data = maybe_chunked(data, chunks)
    with pytest.raises(RuntimeError, match=r"not found for 1 of .*iteration_limit.*Raise max_nfev.*errors='ignore'"):
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
        "shifted": (("row", "u"), np.linspace([0.1, 0.3], [1.1, 1.3], 7, axis=1), {"units": "s"}),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "name"),
    [
        pytest.param("counts", "along one", marks=pytest.mark.slow),
        ("counts", "along two"),
        pytest.param("counts", "with one reduced", marks=pytest.mark.slow),
        ("counts", "with all reduced"),
        ("counts", "along one that differs from place to place"),
        pytest.param(["counts", "dark"], "along one", marks=pytest.mark.slow),
        pytest.param(["counts"], "with all reduced", marks=pytest.mark.slow),
    ],
)
def test_dimensions_coordinates_and_attributes_are_those_of_xarray(stack, variables, name):
    (coords, options, f), data = CALLS[name], stack[variables]
    names = ["a", "b", "c"] if "v" in coords else ["a", "b"]
    options = dict(param_names=names) | options
    expected = data.curvefit(coords, lambda x, *p: f(x, *p, np=np), **options)
    for chunked in (data, data.chunk(u=3, v=2)):
        found = chunked.nlsq.curvefit(coords, lambda x, *p: f(x, *p, np=jnp), **options).compute()
        xr.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # SciPy's derivatives are differences
        assert list(found) == list(expected)
        assert found.attrs == expected.attrs
        for each in (*found.coords, *found):
            assert found[each].dims == expected[each].dims
            assert found[each].attrs == expected[each].attrs


# ---------------------------------------------------------------------------------------------------------------------
# what xarray's own cannot do


def growth(t, a, rate):
    return a * jnp.exp(rate * t)


DAYS = 86400.0 * np.arange(12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "chunks"),
    [
        (dates(DAYS), None),
        pytest.param(dates(DAYS).astype("M8[s]"), {"t": 5}, marks=pytest.mark.slow),
        ((1e9 * DAYS).astype("m8[ns]"), {"x": 1}),
    ],
    ids=["dates", "dates in seconds, chunked", "durations"],
)
def test_dates_are_seconds_since_the_first_and_durations_seconds(time, chunks):
    y = xr.DataArray(np.stack([growth(DAYS, a, 1e-6) for a in (1, 3)]), coords={"x": [0, 1], "t": time})
    data = maybe_chunked(y, chunks)
    start = {"rate": 2e-6}
    expected = [[1, 1e-6], [3, 1e-6]]
    for coords in ("t", data.t):
        found = data.nlsq.curvefit(coords, growth, p0=start).curvefit_coefficients
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = fit_map(growth, "t", data, [1, 2e-6], axis="t").compute()
    np.testing.assert_allclose(found.popt, expected, rtol=1e-6)
    one = curve_fit(growth, "t", data[1], [1, 2e-6])
    np.testing.assert_allclose(one.popt, expected[1], rtol=1e-6)


def test_places_along_dates_keep_their_dates():
    y = np.stack([growth(DAYS, a, 1e-6) for a in (1, 3)])
    data = xr.DataArray(y, coords={"when": dates([0, 60]), "s": DAYS})
    found = data.nlsq.curvefit("s", growth, p0={"rate": 2e-6})
    assert found.when.equals(data.when)
    np.testing.assert_allclose(found.curvefit_coefficients.sel(when="2026-01-01T00:01"), [3, 1e-6], rtol=1e-6)


@pytest.fixture
def noisy():
    rng = np.random.default_rng(1)
    truth = np.stack([rng.uniform(2, 4, (3, 4)), rng.uniform(1, 2, (3, 4))])
    y = decay(T, *truth[..., None], np=np) + 0.05 * rng.standard_normal((3, 4, 10))
    coords = {"row": [0, 1, 2], "column": list("abcd"), "t": T}
    sigma = xr.DataArray(rng.uniform(0.02, 0.08, y.shape), coords, tuple(coords))
    return xr.DataArray(y, coords, tuple(coords)), sigma


@pytest.mark.slow
def test_chunked_fit_dimensions_sigma_and_mask_by_name_and_options_of_fit_map(noisy, nothing_runs):
    data, sigma = noisy
    mask = sigma > 0.07
    options = dict(absolute_sigma=True, loss="soft_l1")
    lazy = data.chunk(row=2, t=3).transpose("t", "column", "row")
    turned = dict(sigma=sigma.chunk(t=4).transpose("column", "row", "t"), mask=mask.transpose("t", ...))
    found = lazy.nlsq.curvefit("t", decay, kwargs=options, **turned)
    assert found.curvefit_coefficients.dims == ("column", "row", "param")
    with dask.config.set(scheduler="threads"):
        found = found.compute()
        same = fit_map(decay, T, data.data, axis=-1, sigma=sigma.data, mask=mask.data, full_covariance=True, **options)
        same = same.compute()
    np.testing.assert_allclose(found.curvefit_coefficients.transpose("row", "column", "param"), same.popt, rtol=1e-6)
    np.testing.assert_allclose(found.curvefit_covariance.transpose("row", ...), same.pcov, rtol=1e-5)


@pytest.mark.slow
def test_starts_and_bounds_along_a_part_of_the_map_are_broadcast_by_name(noisy):
    data, _ = noisy
    low = xr.DataArray([1.2, 1.0, 1.4], dims="row", coords={"row": data.row})
    start = xr.DataArray([1.5, 1.6, 1.7, 1.8], dims="column").chunk(column=2)
    found = data.nlsq.curvefit("t", decay, p0={"tau": start}, bounds={"tau": (low, 9)}).curvefit_coefficients
    tau = data.curvefit("t", lambda t, n0, tau: decay(t, n0, tau, np=np), bounds={"tau": (low, 9)}).curvefit_coefficients
    np.testing.assert_allclose(found.sel(param="tau"), tau.sel(param="tau"), rtol=1e-4)
    assert (found.sel(param="tau") >= low).all()


@pytest.mark.slow
def test_each_variable_of_a_dataset_has_its_own_sigma(noisy):
    data, sigma = noisy
    both = xr.Dataset({"y": data, "z": 2 * data})
    found = both.nlsq.curvefit("t", decay, "row", sigma=xr.Dataset({"y": sigma, "z": 3 + 0 * sigma}), absolute_sigma=True)
    one = data.nlsq.curvefit("t", decay, ["row"], sigma=sigma, absolute_sigma=True)
    np.testing.assert_array_equal(found.y_curvefit_coefficients, one.curvefit_coefficients)
    other = both.z.nlsq.curvefit("t", decay, ["row"], sigma=3 + 0 * sigma, absolute_sigma=True)
    np.testing.assert_array_equal(found.z_curvefit_covariance, other.curvefit_covariance)


@pytest.mark.slow
def test_all_points_are_one_fit_of_curve_fit(noisy):
    data, sigma = noisy
    found = data.chunk(t=3, row=1).nlsq.curvefit("t", decay, ["row", "column"], sigma=sigma, kwargs=dict(method="trf"))
    popt, pcov = curve_fit(decay, T, data.data, [1, 1], sigma=sigma.data)
    np.testing.assert_allclose(found.curvefit_coefficients, popt, rtol=1e-7)
    np.testing.assert_allclose(found.curvefit_covariance, pcov, rtol=1e-6)
    empty = (NAN * data).nlsq.curvefit("t", decay, ["row", "column"])
    assert np.isnan(empty.curvefit_coefficients).all()


BAD = {
    "errors": (dict(errors="skip"), ValueError, "errors must be either.*'skip'"),
    "no dimension": (
        dict(coords=xr.DataArray(1.0)),
        ValueError,
        r"were identified as a dimension.*\('row', 'column', 't'\)",
    ),
    "a misspelt coordinate": (dict(coords="roww"), ValueError, r"`coords` 'roww' is not one of .*: did you mean 'row'\?"),
    "unknown dimension": (dict(reduce_dims="wor"), ValueError, "no dimension {'wor'}.*'row'"),
    "parameters": (dict(func=lambda t, *p: p[0] * t), ValueError, "`param_names` must be provided"),
    "bounds": (dict(bounds=(0, 1)), TypeError, r"`bounds` must be a dict.*\(0, 1\)"),
    "p0 by a wrong name": (dict(p0={"tua": 1}), ValueError, "`p0` names 'tua'.*did you mean 'tau'"),
    "an unknown option": (dict(kwargs=dict(sgima=1)), TypeError, "no argument 'sgima': did you mean 'sigma'"),
    "missing values": (dict(skipna=False), ValueError, "nan or infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_curvefit_are_one_error_that_names_them(name, noisy):
    changed, error, message = BAD[name]
    data = noisy[0].where(noisy[0].t != 1.5)
    with pytest.raises(error, match=message):
        data.nlsq.curvefit(**dict(coords="t", func=decay) | changed)


@pytest.mark.slow
def test_the_accessor_comes_with_its_room_and_xarray_with_nothing_else():
    code = (
        "import sys, dask_nlsq; assert 'xarray' not in sys.modules; import dask_nlsq.accessor, xarray; "
        "assert xarray.DataArray().nlsq.curvefit and xarray.Dataset().nlsq.curvefit"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# curve_fit by name


@pytest.fixture
def waves():
    x, t = np.linspace(0, 1, 6), np.linspace(0, 2, 5)
    y = wave((x[:, None], t), 2.0, 3.0, 0.5, np=np)
    return xr.DataArray(y, {"x": x, "t": t, "shifted": ("x", x + 1)}, ("x", "t"))


def wave(coordinates, a, k, c, *, np=jnp):
    x, t = coordinates
    return a * np.sin(k * x) * np.exp(-c * t)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [{"x": 2, "t": 3}, pytest.param(None, marks=pytest.mark.slow)], ids=["dask", "numpy"])
def test_curve_fit_takes_coordinates_by_name(waves, chunks):
    data, p0 = maybe_chunked(waves, chunks), [1, 2.5, 1]
    for xdata, ydata in [
        (("x", "t"), data),
        (("x", "t"), data.transpose("t", "x")),
        (None, data),
        ((data.x, data.t), data),
        ((data.x.broadcast_like(data).transpose("t", "x"), "t"), data),
        (("x", data.t.data), data),
    ]:
        np.testing.assert_allclose(curve_fit(wave, xdata, ydata, p0).popt, [2, 3, 0.5], rtol=1e-6)
    assert plan_fit(wave, ("x", "t"), data, p0).strategy == "standard"
    for xdata in ("shifted", ["shifted"], data.shifted):  # alone, it is not a tuple
        found = curve_fit(xdata, data.isel(t=0), lambda x, a, k: a * jnp.sin(k * (x - 1)), p0=[1, 2.5])
        np.testing.assert_allclose(found.popt, [2, 3], rtol=1e-6)


def test_stacked_coordinates_have_their_dimension_in_front(waves):
    stacked = xr.concat(xr.broadcast(waves.x, waves.t), dim="axis").transpose("t", "axis", "x")
    assert stacked.dims == ("t", "axis", "x")
    np.testing.assert_allclose(curve_fit(wave, stacked, waves, [1, 2.5, 1]).popt, [2, 3, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_sigma_and_mask_of_curve_fit_are_aligned_by_name(waves):
    rng = np.random.default_rng(0)
    data = waves + 0.1 * rng.standard_normal(waves.shape)
    sigma = xr.DataArray(rng.uniform(0.1, 0.3, waves.shape), waves.coords)
    mask = xr.DataArray(rng.uniform(size=5) > 0.6, dims="t")
    expected = curve_fit(wave, ("x", "t"), data, [2, 3, 1], sigma=sigma.data, mask=mask.data)
    found = curve_fit(wave, ("x", "t"), data, [2, 3, 1], sigma=sigma.T.chunk(t=2), mask=mask)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-7)
    turned = curve_fit(wave, ("x", "t"), data.T, [2, 3, 1], sigma=sigma, mask=mask)
    np.testing.assert_allclose(turned.popt, expected.popt, rtol=1e-7)
    line, cov = xr.DataArray(2 * S, coords={"s": S}), np.diag(1 + S)
    for matrix in (cov, xr.DataArray(cov, dims=("s", "s_"))):
        np.testing.assert_allclose(curve_fit(lambda s, a: a * s, None, line, sigma=matrix).popt, 2)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"x": 2, "t": 3}], ids=["numpy", "dask"])
def test_predictions_have_the_labels_of_the_data_and_of_x(waves, chunks):
    data = maybe_chunked(waves, chunks)
    fit = curve_fit(wave, ("x", "t"), data, [1, 2.5, 1])
    for values in (fit.predict(), fit.residuals() + data, *fit.confidence_band()):
        assert (values.chunks is None) == (chunks is None)
        xr.testing.assert_allclose(values, waves, atol=1e-6)
    x, t = waves.x[1:4], waves.t.rename(t="later") + 1
    for given in ((x, t), (x, t.chunk(later=2))):
        found = fit.predict(given)
        assert found.dims == ("x", "later")
        np.testing.assert_array_equal(found.x, x)
        np.testing.assert_allclose(found, wave((x.data[:, None], t.data), *fit.popt, np=np), rtol=1e-12)
    same = fit.predict((xr.DataArray([0.1, 0.2], dims="place"), xr.DataArray([1.0, 2.0], dims="place")))
    assert same.dims == ("place",)
    crossed = fit.predict((xr.DataArray([0.1, 0.2], dims="one"), xr.DataArray([1.0, 2.0], dims="other")))
    assert crossed.shape == (2, 2)
    np.testing.assert_array_equal(np.diag(crossed), same)
    assert isinstance(fit.predict((np.array([0.1]), np.array([1.0]))), np.ndarray)
    with pytest.raises(ValueError, match=r"`x\[1\]` and `x\[0\]` have different labels along 'x'"):
        fit.predict((x, xr.DataArray(np.zeros(3), {"x": np.zeros(3)})))
    with pytest.raises(TypeError, match=r"`x` has the dtype datetime64.*since the earliest date"):
        fit.predict((x, xr.DataArray(dates([0, 1]), dims="t")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(xdata="u"), "`ydata` does not have a coordinate 'u', only.*'x', 't'"),
        (dict(xdata=None, ydata=xr.DataArray(S, dims="s")), "`xdata` None.*'s'"),
        (dict(sigma=xr.DataArray(np.ones(6), dims="u")), r"`sigma` has the dimensions \('u',\).*not have 'u'.*its .data"),
        (dict(mask=lambda d: d.x.isel(x=slice(5)) > 2), "`mask`.*different labels along 'x': 5 and 6"),
        (dict(sigma=lambda d: 1 + d.assign_coords(t=d.t + 0.25)), "`sigma`.*labels along 't': 0.25 and 0.0 at place 0"),
        (dict(xdata=lambda d: d.x[::-1]), "`xdata`.*labels along 'x': 1.0 and 0.0 at place 0, first.*xarray.align"),
    ],
)
def test_names_and_labels_that_do_not_fit_are_refused(waves, arguments, message):
    given = dict(xdata="x", ydata=waves) | {k: v(waves) if callable(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        curve_fit(lambda x, a: a * x, **given)
    if "ydata" not in arguments:
        with pytest.raises(ValueError, match=message):
            fit_map(lambda x, a: a * x, axis="x", **given)


def test_a_dataset_is_told_from_its_arrays(waves):
    for fit in (curve_fit, fit_map):
        with pytest.raises(TypeError, match=r"Dataset.*one of its variables, \['y'\]"):
            fit(wave, ("x", "t"), waves.to_dataset(name="y"))


def test_a_fit_by_name_is_resumed(waves, tmp_path):
    data = waves.chunk(x=2)
    fit = curve_fit(wave, ("x", "t"), data, [1, 2.5, 1], checkpoint=tmp_path / "c")
    again = resume(tmp_path / "c", wave, ydata=data)
    np.testing.assert_array_equal(again.popt, fit.popt)


@pytest.mark.slow
def test_a_map_of_a_ready_model_has_its_bounds_and_compiles_once_for_numpy_and_xarray():
    x = np.linspace(0, 10, 60)
    y = 5 * np.exp(-0.5 * ((x - 4) / 0.5) ** 2)[None].repeat(3, axis=0)
    named = xr.DataArray(y, dims=("row", "energy"), coords={"energy": x})
    plain, labelled = fit_map(gaussian, x, y).problem.fit, fit_map(gaussian, "energy", named).problem.fit
    assert plain.spec.bounded and plain.spec == labelled.spec and plain.model is labelled.model


@pytest.fixture(scope="module")
def lines():
    """Spectra along the first dimension: 2 + 3 E at each place."""
    energy = np.linspace(1, 2, 8)
    data = xr.DataArray(energy[:, None, None] * np.full((8, 2, 3), 3.0) + 2, dict(E=energy), ("E", "y", "x"))
    return data.assign_coords(k=("E", energy**0.5), warp=(("E", "y"), np.outer(energy, [1, 2])), time=("y", [0.0, 5.0]))


def line(x, a, b):
    return a + b * x


@pytest.mark.parametrize("by", ["name", "DataArray", "not an index", "Dask"])
def test_a_map_is_fitted_along_the_dimension_of_the_coordinate_that_is_named(by, lines):
    y = lines.chunk(y=1) if by == "Dask" else lines
    found = fit_map(line, {"DataArray": lines.E, "not an index": "k"}.get(by, "E"), y, [1, 1]).compute()
    assert found.shape == (2, 3) and (found.n_points == 8).all()
    if by != "not an index":
        np.testing.assert_allclose(found.popt, np.broadcast_to([2.0, 3.0], (2, 3, 2)), rtol=1e-6)


def test_a_map_is_fitted_along_the_last_axis_where_a_coordinate_depends_on_it(lines):
    turned = lines.transpose("y", "x", "E")
    for x, y in ((None, turned), ("E", turned), (("time", "E"), turned), (("E", np.arange(3.0)), lines)):
        f = line if not isinstance(x, tuple) else lambda x, a, b: a + b * x[1] + 0 * x[0]
        assert fit_map(f, x, y, [1, 1]).shape == y.shape[:2]


@pytest.mark.parametrize("call", [dict(axis="x"), dict(axis=-1), dict(axis=("y", "x"))])
def test_a_coordinate_that_is_constant_along_the_fit_axes_is_refused(call, lines):
    message = r"`xdata` lies along \['E'\], and is constant along the fit axes, .*: give axis='E'"
    with pytest.raises(ValueError, match=message):
        fit_map(line, "E", lines, [1, 1], **call)


def test_constant_coordinates_of_groups_and_of_curvefit_are_refused_and_ambiguous_ones_too(lines):
    with pytest.raises(ValueError, match=r"constant along the fit axes, \['y', 'x'\].*leave `group_axes` to others"):
        fit_groups(line, "E", lines, [1, 1], local="a", group_axes="E")
    with pytest.raises(ValueError, match=r"constant along the fit axes, \['x'\]"):
        lines.nlsq.curvefit(lines.time, line, reduce_dims="x")
    with pytest.raises(ValueError, match=r"constant along the fit axes, \['x'\].*give axis=\['E', 'y'\]"):
        fit_map(line, "warp", lines, [1, 1])
