"""Packed numbers of CF conventions: the fit of what xarray, or a user by hand, would make of them."""

import base64
import logging
import re
import struct

import dask.array as da
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_nlsq import curve_fit, fit, fit_map, load, plan_fit, resume
from dask_nlsq.data.cf import Decoding
from dask_nlsq.engine.checkpoint import CheckpointError
from dask_nlsq.interface.cli import nlsq

N = 3000
CHUNK = 250
X = np.linspace(0, 5, N)
SCALE, OFFSET = 0.001, 1.5
Y = 2 * np.exp(-0.7 * X) + 0.3 + np.random.default_rng(7).normal(0, 0.05, N)
STORED = np.round((Y - OFFSET) / SCALE).astype("i2")
DECODED = STORED * SCALE + OFFSET
P0 = [1, 1, 0]
TIGHT = {"ftol": 1e-13, "xtol": 1e-13, "gtol": 1e-13}


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


def in_zarr(path, values, attributes, version=3):
    array = zarr.create_array(
        path, shape=values.shape, dtype=values.dtype, chunks=(CHUNK, *values.shape[1:]), zarr_format=version, fill_value=0,
        attributes=attributes, config={"write_empty_chunks": True},
    )  # fmt: skip
    array[...] = values
    return path


def in_hdf5(path, values, attributes):
    dataset = h5py.File(path, "w").create_dataset("y", data=values, chunks=(CHUNK,))
    dataset.attrs.update(attributes)
    dataset.file.close()
    return h5py.File(path, "r")["y"]


KINDS = {
    "zarr": in_zarr,
    "zarr 2": lambda path, *rest: in_zarr(path, *rest, version=2),
    "open zarr": lambda path, *rest: zarr.open_array(in_zarr(path, *rest), mode="r"),
    "hdf5": in_hdf5,
}


def same(found, expected):
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    np.testing.assert_allclose(found.pcov, expected.pcov, rtol=1e-6)
    assert (found.n_points, found.n_masked) == (expected.n_points, expected.n_masked)


SLOW = pytest.mark.slow
SPOILED = STORED.copy()
SPOILED[::50], SPOILED[7::50], SPOILED[11::50] = -32768, 32000, -9999
HIDES = {
    "_FillValue": (dict(_FillValue=-9999), SPOILED == -9999),
    "missing_value": (dict(missing_value=-32768), SPOILED == -32768),
    "several": (dict(missing_value=[-32768, 32000], _FillValue=-9999), np.isin(SPOILED, [-32768, 32000, -9999])),
    "valid_min": (dict(valid_min=-5000), SPOILED < -5000),
    "valid_max": (dict(valid_max=31999), SPOILED > 31999),
    "valid_range": (dict(valid_range=[-5000, 31999]), (SPOILED < -5000) | (SPOILED > 31999)),
    "floats": (dict(valid_range=[-5000.5, 31999.5]), (SPOILED < -5000) | (SPOILED > 31999)),
    "impossible": (dict(_FillValue=99999, missing_value=0.5), np.zeros(N, bool)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, hides",
    [
        *(pytest.param("zarr", each, marks=() if each in ("several", "floats") else SLOW) for each in HIDES),
        *((kind, "several") for kind in KINDS if kind != "zarr"),
        ("hdf5", "valid_range"),
    ],
)
def test_attributes_say_what_is_stored(kind, hides, tmp_path):
    attributes, hidden = HIDES[hides]
    y = KINDS[kind](tmp_path / "y", SPOILED, dict(scale_factor=SCALE, add_offset=OFFSET) | attributes)
    sigma = 0.1 + 0 * X
    found = curve_fit(decay, X, y, p0=P0, sigma=sigma, **TIGHT)
    same(found, curve_fit(decay, X, SPOILED * SCALE + OFFSET, p0=P0, sigma=sigma, mask=hidden, **TIGHT))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("standard", marks=SLOW), "chunked", "streaming"])
def test_strategies_agree_on_packed_values(strategy, tmp_path, workers):
    y = in_zarr(tmp_path / "y", SPOILED, dict(scale_factor=SCALE, add_offset=OFFSET, valid_range=[-5000, 31999]))
    hidden = (SPOILED < -5000) | (SPOILED > 31999)
    expected = curve_fit(decay, X, SPOILED * SCALE + OFFSET, p0=P0, mask=hidden, **TIGHT)
    same(curve_fit(decay, X, y, p0=P0, strategy=strategy, n_starts=3, **TIGHT), expected)
    if strategy == "chunked":
        with workers.as_current():
            same(curve_fit(decay, X, y, p0=P0, strategy=strategy, **TIGHT), expected)
        with workers.as_current():
            stored = in_hdf5(tmp_path / "y.h5", STORED, dict(add_offset=OFFSET, scale_factor=SCALE))
            same(curve_fit(decay, X, stored, p0=P0, **TIGHT), curve_fit(decay, X, DECODED, p0=P0, **TIGHT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, version",
    [("i2", 2), ("u2", 3), *(pytest.param(*each, marks=SLOW) for each in [("i2", 3), ("i4", 2), ("f4", 3)])],
)
def test_a_store_that_xarray_has_packed_is_fitted_as_xarray_reads_it(dtype, version, tmp_path):
    y = np.where(np.arange(N) % 40 == 3, np.nan, Y)
    offset = 0.0 if dtype[0] == "u" else OFFSET
    fill = {"u": 65000, "f": -999.25}.get(dtype[0], -32768)
    encoding = dict(dtype=dtype, scale_factor=SCALE, add_offset=offset, missing_value=fill, chunks=(CHUNK,))
    encoding |= {} if version == 2 else dict(_FillValue=fill)
    xr.Dataset({"y": ("t", y)}).to_zarr(tmp_path / "d", encoding={"y": encoding}, zarr_format=version, consolidated=False)
    found = curve_fit(decay, X, tmp_path / "d" / "y", p0=P0, mask_values=(), **TIGHT)
    opened = xr.open_zarr(tmp_path / "d", consolidated=False).y
    expected = curve_fit(decay, X, opened.astype(float), p0=P0, nan_policy="omit", **TIGHT)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-5)  # xarray decodes two bytes in single precision
    assert found.n_points == expected.n_points == N - N // 40
    assert curve_fit(decay, X, opened.astype(float), p0=P0, nan_policy="omit", **TIGHT).plan.decoded == ()


@pytest.mark.slow
def test_the_fill_value_of_an_array_masks_nothing(tmp_path):
    y = np.where(np.arange(N) % 3, np.round(100 * Y), 0).astype("i4")
    path = in_zarr(tmp_path / "y", y, {})
    assert zarr.open_array(path).fill_value == 0
    assert curve_fit(decay, X, path, p0=P0).n_masked == 0


def test_values_are_held_as_they_are_stored(tmp_path):
    path = in_zarr(tmp_path / "y", STORED, dict(scale_factor=SCALE, add_offset=OFFSET, _FillValue=-32768))
    plain = in_zarr(tmp_path / "plain", STORED, {})
    packed, raw = (plan_fit(decay, X, each, p0=P0) for each in (path, plain))
    assert (packed.held_bytes, packed.sweep_bytes) == (raw.held_bytes, raw.sweep_bytes)


@pytest.mark.slow
def test_identity_packing_is_none(tmp_path):
    y = np.random.default_rng(0).poisson(100 * np.exp(-X)).astype("u2")
    path = in_zarr(tmp_path / "y", y, dict(scale_factor=1.0, add_offset=0, units="counts"))
    found = curve_fit(decay, X, path, p0=[90, 1, 1], loss="poisson")
    np.testing.assert_allclose(found.popt, curve_fit(decay, X, y, p0=[90, 1, 1], loss="poisson").popt, rtol=1e-9)
    assert found.plan.decoded == ()


def test_scaled_values_are_no_counts(tmp_path):
    y = np.random.default_rng(0).poisson(100 * np.exp(-X)).astype("u2")
    path = in_zarr(tmp_path / "y", y, dict(scale_factor=2.0))
    message = r"for counts, and `ydata` is scaled \(scale_factor 2\).*decode_cf=False"
    for options in (dict(loss="poisson"), dict(sigma="poisson")):
        with pytest.raises(ValueError, match=message):
            curve_fit(decay, X, path, p0=P0, **options)
        with pytest.raises(ValueError, match=message):
            plan_fit(decay, X, path, p0=P0, **options)
        curve_fit(decay, X, path, p0=[90, 1, 1], decode_cf=False, **options)
    with pytest.raises(ValueError, match=message):
        fit_map(decay, X, path, p0=P0, loss="poisson")
    with pytest.raises(ValueError, match=message):
        curve_fit(decay, np.tile(X, 2), [path, in_zarr(tmp_path / "z", y, {})], p0=P0, loss="poisson", mask_values=())


def level(x, a):
    return a + 0 * x


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-0.1, pytest.param(0.1, marks=SLOW), pytest.param(0.07, marks=SLOW)])
def test_the_argument_valid_range_is_of_scaled_values_and_mask_values_are_stored_ones(scale, tmp_path):
    stored = (np.arange(N) % 100).astype("i2")
    decoded = stored * scale + 1.0
    path = in_zarr(tmp_path / "y", stored, dict(scale_factor=scale, add_offset=1.0))
    for edge in (stored[33] * scale + 1.0, -7.3):
        for limits in ((edge, None), (None, edge), (edge - 1, edge + 1)):
            low, high = (-np.inf if limits[0] is None else limits[0]), (np.inf if limits[1] is None else limits[1])
            hidden = (decoded < low) | (decoded > high)
            if hidden.all():
                continue
            found = curve_fit(level, X, path, p0=[1], valid_range=limits)
            assert found.n_masked == hidden.sum()
            np.testing.assert_allclose(found.popt, decoded[~hidden].mean(), rtol=1e-12)
    found = curve_fit(level, X, path, p0=[1], mask_values=[33, 50])
    assert found.n_masked == 2 * N // 100


def test_limits_of_floats_are_exact():
    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.float64):
        for scale in (0.1, -0.3, 1e-3):
            how = Decoding(scale, 2.7)
            values = rng.normal(size=200).astype(dtype)
            for limit in how.decoded(values[:20]):
                low, _ = how.stored_limits(limit, None, np.dtype(dtype))
                _, high = how.stored_limits(limit, None, np.dtype(dtype))
                kept = values >= low if scale > 0 else values <= high
                np.testing.assert_array_equal(kept, how.decoded(values) >= limit)


@pytest.mark.slow
def test_decoding_may_be_turned_off(tmp_path):
    attributes = dict(scale_factor=SCALE, add_offset=OFFSET, _FillValue=-32768)
    for kind in KINDS.values():
        y = kind(tmp_path / f"y{id(kind)}", STORED, attributes)
        found = curve_fit(decay, X, y, p0=[1000, 1, 0], decode_cf=False)
        assert np.array_equal(found.popt, curve_fit(decay, X, STORED, p0=[1000, 1, 0]).popt)
        assert found.plan.decoded == ()
    with pytest.raises(TypeError, match="`decode_cf` must be True or False, not 'no'"):
        curve_fit(decay, X, Y, p0=P0, decode_cf="no")


def test_what_is_applied_is_said_once_in_the_log_and_in_the_plan(tmp_path, caplog):
    path = in_zarr(tmp_path / "y", STORED, dict(scale_factor=SCALE, add_offset=OFFSET, _FillValue=-32768))
    with caplog.at_level(logging.INFO, "dask_nlsq"):
        found = fit(decay, X, path, P0)
    line = f"`ydata` (file://{path}): scale_factor 0.001, add_offset 1.5, _FillValue -32768"
    assert sum(line in record.getMessage() for record in caplog.records) == 1
    assert found.plan.decoded == (line,) and f"decoded     {line}" in str(found.plan)
    assert line in str(plan_fit(decay, X, path, P0)) and line in str(fit_map(decay, X, path, P0).plan)
    found.save(tmp_path / "result")
    assert load(tmp_path / "result").plan == found.plan


@pytest.mark.parametrize("kind", KINDS)
def test_x_sigma_and_mask_are_decoded_too(kind, tmp_path):
    packed = dict(scale_factor=0.01, add_offset=1.0, _FillValue=-1, valid_max=480)
    x = np.arange(N, dtype="i2") % 500
    x[5::70] = -1
    sigma = (np.arange(N) % 7 + 1).astype("i2")
    sigma[9::90] = 481
    mask = (np.arange(N) % 11 == 3).astype("i1")
    mask[2::100] = -1
    y = decay(x * 0.01 + 1, 2, 0.7, 0.3) + 0.01 * np.sin(np.arange(N))
    arrays = [KINDS[kind](tmp_path / f"{k}", each, packed) for k, each in enumerate((x, sigma))]
    stored_mask = KINDS[kind](tmp_path / "mask", mask, dict(_FillValue=-1))
    hidden = (x == -1) | (sigma == 481) | (x > 480) | (mask != 0)
    expected = curve_fit(decay, x * 0.01 + 1, np.asarray(y), sigma=sigma * 0.01 + 1, mask=hidden, p0=P0, **TIGHT)
    found = curve_fit(decay, arrays[0], np.asarray(y), sigma=arrays[1], mask=stored_mask, p0=P0, **TIGHT)
    same(found, expected)
    opened = zarr.open_array(arrays[0], mode="r") if kind in ("zarr", "zarr 2") else arrays[0]
    predicted = np.where((x == -1) | (x > 480), np.nan, np.asarray(expected.predict(x * 0.01 + 1)))
    np.testing.assert_allclose(np.asarray(found.predict(opened)), predicted, rtol=1e-8)
    raw = curve_fit(lambda x, a: a + x, opened, x.astype(float), p0=[0], decode_cf=False)
    np.testing.assert_allclose(np.asarray(raw.predict(opened)), x + raw.popt, atol=1e-12)


@pytest.mark.slow
def test_coordinates_in_a_tuple_are_decoded_and_indices_stay_integers(tmp_path):
    x = in_zarr(tmp_path / "x", np.arange(N, dtype="i2"), dict(scale_factor=5 / (N - 1)))
    k = in_zarr(tmp_path / "k", np.arange(N, dtype="i4"), dict(_FillValue=17))

    def indexed(x, a, b, c):
        return decay(jnp.asarray(X)[x[1]] / 2 + x[0] / 2, a, b, c)

    found = curve_fit(indexed, (x, k), Y, p0=P0, **TIGHT)
    same(found, curve_fit(decay, X, Y, p0=P0, mask=np.arange(N) == 17, **TIGHT))


@pytest.mark.slow
def test_arrays_of_a_list_may_be_packed_differently(tmp_path):
    parts = [
        in_zarr(tmp_path / "a", STORED, dict(scale_factor=SCALE, add_offset=OFFSET)),
        in_zarr(
            tmp_path / "b", (2 * SPOILED.astype("i4")), dict(scale_factor=SCALE / 2, add_offset=OFFSET, valid_min=-10000)
        ),
    ]
    y = np.concatenate([DECODED, SPOILED * SCALE + OFFSET])
    hidden = np.concatenate([np.zeros(N, bool), 2 * SPOILED.astype(int) < -10000])
    x = np.tile(X, 2)
    same(curve_fit(decay, x, parts, p0=P0, **TIGHT), curve_fit(decay, x, y, p0=P0, mask=hidden, **TIGHT))
    alike = [in_zarr(tmp_path / name, STORED, dict(scale_factor=SCALE, add_offset=OFFSET)) for name in "cd"]
    same(curve_fit(decay, x, alike, p0=P0, **TIGHT), curve_fit(decay, x, np.tile(DECODED, 2), p0=P0, **TIGHT))


@pytest.mark.slow
def test_values_that_are_no_data_are_not_lost_in_arrays_that_differ(tmp_path):
    y = np.round(1000 * Y).astype("u2")
    short, long = in_zarr(tmp_path / "a", y, {}), in_zarr(tmp_path / "b", y.astype("u4"), {})
    packed = in_zarr(tmp_path / "c", y, dict(scale_factor=0.5))
    x = np.tile(X, 2)
    for parts, options in (([short, long], {}), ([short, packed], {}), ([short, packed], dict(mask_values=[7]))):
        with pytest.raises(ValueError, match=r"differ in dtype or packing \(uint16.*mask_values=\(\)"):
            curve_fit(decay, x, parts, p0=[1000, 1, 0], **options)
        curve_fit(decay, x, parts, p0=[1000, 1, 0], mask_values=())
    curve_fit(decay, x, [short, long], p0=[1000, 1, 0], mask_values=[7])


@pytest.mark.slow
def test_a_covariance_goes_with_packed_values(tmp_path):
    y, attributes = SPOILED[:CHUNK], dict(scale_factor=SCALE, add_offset=OFFSET, valid_range=[-5000, 31999])
    hidden = (y < -5000) | (y > 31999)
    matrix = 0.01 * np.eye(CHUNK)
    for kind in (in_zarr, in_hdf5):
        found = curve_fit(decay, X[:CHUNK], kind(tmp_path / kind.__name__, y, attributes), p0=P0, sigma=matrix, **TIGHT)
        expected = curve_fit(decay, X[:CHUNK], y * SCALE + OFFSET, p0=P0, sigma=matrix, mask=hidden, **TIGHT)
        same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("guess", [None, pytest.param("coarse-to-fine", marks=pytest.mark.slow)])
def test_maps_of_packed_values(guess, tmp_path):
    rng = np.random.default_rng(2)
    x = np.linspace(0, 5, 50)
    y = np.asarray(decay(x, *(rng.uniform(0.5, 2, (3, 20, 5, 1))))) + rng.normal(0, 0.01, (20, 5, 50))
    stored = np.round((y - OFFSET) / SCALE).astype("i2")
    stored[rng.random(stored.shape) < 0.05] = -9999
    hidden = stored == -9999
    attributes = dict(scale_factor=SCALE, add_offset=OFFSET, _FillValue=-9999)
    array = zarr.create_array(tmp_path / "y", shape=y.shape, chunks=(10, 5, 25), dtype="i2", attributes=attributes)
    array[...] = stored
    limits = dict(valid_range=(0.6, None))
    decoded = stored * SCALE + OFFSET
    found = fit_map(decay, x, tmp_path / "y", P0, guess=guess, **limits, **TIGHT)
    expected = fit_map(decay, x, decoded, P0, mask=hidden, guess=guess, **limits, **TIGHT).compute()
    assert found.plan.read_bytes == stored.nbytes * (1 + (guess is not None))
    found = found.compute()
    np.testing.assert_array_equal(found.n_points, expected.n_points)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-5)


def test_a_fit_is_resumed_with_the_same_decoding(tmp_path):
    path = in_zarr(tmp_path / "y", STORED, dict(scale_factor=SCALE, add_offset=OFFSET))
    call = dict(f=decay, xdata=X, ydata=path, p0=P0, checkpoint=tmp_path / "c")
    found = curve_fit(**call)
    assert np.array_equal(resume(tmp_path / "c", decay).popt, found.popt)
    with pytest.raises(CheckpointError, match="decode_cf: True then, False now"):
        curve_fit(**call, decode_cf=False)
    zarr.open_array(path).attrs["scale_factor"] = 2 * SCALE
    with pytest.raises(CheckpointError, match="decode_cf"):
        curve_fit(**call)
    raw = curve_fit(**call | dict(p0=[1000, 1, 0], checkpoint=tmp_path / "raw"), decode_cf=False)
    assert np.array_equal(resume(tmp_path / "raw", decay).popt, raw.popt)


def first(x, a, b, c):
    return decay(x[0], a, b, c)


def float64_text(value):
    return base64.standard_b64encode(struct.pack("<d", value)).decode()


ATTRIBUTES = {
    "arrays of length 1": (dict(scale_factor=np.array([0.5]), add_offset=np.array([2.0], "f4")), (0.5, 2.0, ())),
    "text": (dict(scale_factor="0.5", _FillValue=b"-9"), (0.5, 0.0, (-9.0,))),
    "xarray's text": (dict(_FillValue=float64_text(-999.25)), (1.0, 0.0, (-999.25,))),
    "numpy numbers": (dict(missing_value=np.float32(7)), (1.0, 0.0, (7.0,))),
    "null": (dict(_FillValue=None, scale_factor=3), (3.0, 0.0, ())),
    "double": (dict(_FillValue=3, missing_value=[3, 4]), (1.0, 0.0, (3, 4))),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_read_as_they_are_written(name):
    attributes, expected = ATTRIBUTES[name]
    assert Decoding.of("ydata", attributes, np.dtype("f8"))[:3] == expected


def by_xarray(path, **variables):
    """A store of format 2 in which -1 marks invalid values, which xarray writes as the fill value of the array."""
    data = xr.Dataset({name: ("t", values) for name, values in variables.items()})
    data.to_zarr(path, zarr_format=2, encoding={name: dict(dtype="i2", _FillValue=-1) for name in variables})
    return path


@pytest.mark.slow
def test_the_fill_value_of_format_2_marks_invalid_values_where_xarray_takes_it_for_that(tmp_path):
    y, sigma, x = np.round(100 * Y), np.full(N, 5.0), np.round(1000 * X)
    y[::50], sigma[7::50], x[9::50] = np.nan, np.nan, np.nan
    path = by_xarray(tmp_path / "d", y=y, sigma=sigma, x=x)
    with xr.open_zarr(path) as opened:
        same = [opened[name].values for name in ("x", "y", "sigma")]
    np.testing.assert_array_equal(same, [x, y, sigma])
    p0 = [100, 1e-3, 0]
    found = curve_fit(decay, path / "x", path / "y", p0, sigma=path / "sigma")
    hidden = ~np.isfinite(x + y + sigma)
    expected = curve_fit(decay, x[~hidden], y[~hidden], p0, sigma=sigma[~hidden])
    assert found.n_masked == hidden.sum() == 3 * N // 50 and "_FillValue -1" in str(found.plan)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert fit_map(decay, path / "x", path / "y", p0, sigma=path / "sigma").compute().n_points == (~hidden).sum()
    assert curve_fit(decay, X, path / "y", p0, decode_cf=False).n_masked == 0


def test_a_mask_of_format_2_has_the_fill_value_that_xarray_gave_it(tmp_path):
    path = by_xarray(tmp_path / "d", mask=np.where(np.arange(N) % 50, 0.0, np.nan))
    assert curve_fit(decay, X, Y, P0, mask=path / "mask").n_masked == N // 50


@pytest.mark.parametrize("kind", ["counts", "a mask"])
def test_other_fill_values_of_format_2_mask_nothing(kind, tmp_path):
    dtype = "u1" if kind == "counts" else bool
    array = zarr.create_array(tmp_path / "y", shape=(N,), chunks=(CHUNK,), dtype=dtype, zarr_format=2, fill_value=0)
    array[...] = np.arange(N) % 2
    if kind == "counts":  # not of xarray
        assert curve_fit(lambda x, a, b: a * x + b, X, tmp_path / "y", [1, 1]).n_masked == 0
    else:  # both of its values are values
        array.attrs["_ARRAY_DIMENSIONS"] = ["t"]
        assert curve_fit(decay, X, Y, P0, mask=tmp_path / "y").n_masked == N // 2


@pytest.mark.slow
def test_a_fill_value_is_compared_as_the_array_rounds_it(tmp_path):
    y = np.where(np.arange(N) % 10 == 0, 1e20, Y).astype("f4")
    found = curve_fit(decay, X, in_zarr(tmp_path / "y", y, dict(missing_value=1e20)), p0=P0, strategy="streaming")
    assert found.n_masked == N // 10
    assert curve_fit(decay, X, y, p0=P0, mask_values=[1e20], strategy="streaming").n_masked == N // 10


WRONG = {
    "text": (dict(scale_factor="ten"), "scale_factor='ten'"),
    "several": (dict(scale_factor=[1, 2]), "scale_factor="),
    "zero": (dict(scale_factor=0.0), "scale_factor=0.0"),
    "nan": (dict(add_offset="nan"), "add_offset='nan'"),
    "range of one": (dict(valid_range=[3]), "valid_range="),
    "fill": (dict(_FillValue="none"), "_FillValue='none'"),
    "unsigned": (dict(_Unsigned="true"), "_Unsigned"),
}


@pytest.mark.parametrize("name", WRONG)
def test_attributes_that_are_no_numbers_are_one_error(name, tmp_path):
    attributes, message = WRONG[name]
    path = in_zarr(tmp_path / "y", STORED, attributes)
    with pytest.raises(ValueError, match=f"`ydata` has the attribute {message}.*decode_cf=False"):
        curve_fit(decay, X, path, p0=P0)
    curve_fit(decay, X, path, p0=[1000, 1, 0], decode_cf=False)


@pytest.mark.slow
def test_the_command_line_decodes_what_it_names_and_may_leave_it(tmp_path):
    y = in_zarr(tmp_path / "y", np.stack([STORED] * 2, axis=1), dict(scale_factor=SCALE, add_offset=OFFSET))
    x = in_zarr(tmp_path / "x", np.arange(N, dtype="i2"), dict(scale_factor=5 / (N - 1), _FillValue=17))
    flat = in_zarr(tmp_path / "flat", STORED, dict(scale_factor=SCALE, add_offset=OFFSET))
    options = ["--model", "exponential+polynomial:0", "--x", str(x)]

    def run(*arguments):
        outcome = CliRunner().invoke(nlsq, [str(each) for each in arguments])
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    def values(text):
        return [float(each) for each in re.findall(r"^ +(?:exponential|polynomial)\S* +(-?[\d.e+-]+)", text, re.M)]

    expected = curve_fit(decay, X, DECODED, p0=P0, mask=np.arange(N) == 17)
    said = values(run("fit", flat, *options))
    np.testing.assert_allclose(sorted(said), sorted(expected.popt), rtol=1e-4)
    assert "decoded" in run("plan", flat, *options) and "decoded" not in run("plan", flat, *options, "--no-decode-cf")
    raw = values(run("fit", flat, *options, "--no-decode-cf"))
    np.testing.assert_allclose(sorted(raw)[-1], expected.popt[0] / SCALE, rtol=1e-2)
    two = ("--model", "tests.test_cf:first", "--x", x, "--x", "0:2:1", "--p0", "a=1,b=1,c=0")
    found = curve_fit(decay, X[:, None], np.stack([DECODED] * 2, axis=1), p0=P0, mask=np.arange(N)[:, None] == 17)
    said = run("fit", y, *two)
    assert f"{found.n_points:,} points" in said
    np.testing.assert_allclose([float(each) for each in re.findall(r"^ +[abc] +(\S+)", said, re.M)], found.popt, rtol=1e-3)
    outcome = CliRunner().invoke(nlsq, ["fit", str(flat), *options, "--loss", "poisson"])
    assert outcome.exit_code == 2 and "--no-decode-cf" in outcome.stderr


@pytest.mark.slow
def test_maps_of_the_command_line_are_decoded(tmp_path):
    y = in_zarr(tmp_path / "y", np.stack([STORED] * 2, axis=1), dict(scale_factor=SCALE, add_offset=OFFSET))
    x = in_zarr(tmp_path / "x", np.arange(N, dtype="i2"), dict(scale_factor=5 / (N - 1), _FillValue=17))
    options = ["--model", "exponential+polynomial:0", "--x", str(x), "--axis", "0", "--out", str(tmp_path / "m")]
    outcome = CliRunner().invoke(nlsq, ["map", str(y), *options])
    assert outcome.exit_code == 0 and "2 of 2 converged" in outcome.stdout, outcome.output


@pytest.mark.slow
def test_a_dask_array_and_an_array_in_memory_have_no_attributes():
    assert curve_fit(decay, X, da.from_array(Y, 500), p0=P0).plan.decoded == ()


@pytest.mark.parametrize("sign, dtype", [("true", "i2"), ("false", "u2")])
def test_integers_whose_sign_an_attribute_changes_are_refused(sign, dtype, tmp_path):
    array = zarr.create_array(tmp_path / "y.zarr", shape=(20,), dtype=dtype)
    array[...] = np.arange(20)
    array.attrs["_Unsigned"] = sign
    with pytest.raises(ValueError, match="_Unsigned"):
        curve_fit(lambda x, a, b: a * x + b, np.arange(20.0), array, [1, 1])


def test_a_scale_that_is_null_is_refused(tmp_path):
    array = zarr.create_array(tmp_path / "y.zarr", shape=(20,), dtype="i2")
    array.attrs.update(scale_factor=None, add_offset=1.5)
    with pytest.raises(ValueError, match="scale_factor=None"):
        curve_fit(lambda x, a, b: a * x + b, np.arange(20.0), array, [1, 1])


def test_xarray_data_that_were_not_decoded_are_warned_of():
    y = xr.DataArray(3.0 * np.arange(20), dims="x", attrs={"scale_factor": 0.1})
    call = dict(f=lambda x, a, b: a * x + b, xdata=np.arange(20.0), ydata=y, p0=[1, 1])
    with pytest.warns(RuntimeWarning, match="scale_factor, which are not applied"):
        curve_fit(**call)
    with pytest.warns(RuntimeWarning, match="scale_factor, which are not applied"):
        fit_map(**call | {"ydata": xr.concat([y, y], "pixel")})
    curve_fit(**call, decode_cf=False)
