import asyncio
import errno
import logging
import time

import dask
import dask.array as da
import fsspec
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from obstore.store import HTTPStore
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, ObjectStore, WrapperStore, ZipStore

from dask_nlsq import BadChunkError, DamagedFileError, MissingChunksError, curve_fit, fit, fit_groups, fit_map
from dask_nlsq.base.x64 import float64
from dask_nlsq.data.store import Policy, Stored, has_checksum, open_array, scan_keys
from dask_nlsq.kernels.blocks import Invalid

from .served import served

N, CHUNK = 60_000, 4_000
X = np.linspace(0, 10, N)
Y = np.random.default_rng(3).poisson(200 * np.exp(-0.5 * X) + 30).astype("u2")
P0 = [260, 0.35, 40]


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


EXPECTED = curve_fit(decay, X, Y, p0=P0, ftol=1e-12, xtol=1e-12, gtol=1e-12)


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


def write(store, name=None, values=Y, **options):
    array = zarr.create_array(
        store,
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        **dict(chunks=(CHUNK,), config={"write_empty_chunks": True}) | options,
        fill_value=0,
    )
    array[...] = values
    return array


def same(found, expected=EXPECTED):
    return np.all(np.abs(found.popt - expected.popt) < 1e-4 * expected.perr)


# ---------------------------------------------------------------------------------------------------------------------
# sources


@pytest.mark.parametrize(
    "where, version",
    [("array", 2), ("array", 3), ("member", 2), ("nested", 3), ("zip", 2), ("zip member", 3), ("url", 3), ("memory", 3)],
)
def test_a_path_or_url_is_enough(where, version, tmp_path):
    options = dict(zarr_format=version)
    path = tmp_path / "data.zarr"
    match where:
        case "array":
            write(path, **options)
            source = path
        case "member" | "nested":
            name = {"member": "y", "nested": "entry/data/y"}[where]
            zarr.create_group(path, zarr_format=version)
            write(path, name, **options)
            source = str(path / name)
        case "zip" | "zip member":
            name = None if where == "zip" else "entry/y"
            with ZipStore(tmp_path / "data.zip", mode="w") as store:
                write(store, name, **options)
            source = str(tmp_path / "data.zip") + ("" if name is None else f"/{name}")
        case "url":
            write(path, **options)
            source = path.as_uri()
        case "memory":
            source = write(MemoryStore(), **options)
    for strategy in ("streaming", "standard"):
        assert same(curve_fit(decay, X, source, p0=P0, strategy=strategy))


def test_an_object_store_of_fsspec_is_a_url():
    write("memory://bucket/scan.zarr")
    try:
        assert same(curve_fit(decay, X, "memory://bucket/scan.zarr", p0=P0, strategy="streaming"))
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize("shards", [None, (5 * CHUNK,)])
def test_whole_shards_are_read(shards, tmp_path):
    write(tmp_path / "y.zarr", shards=shards)
    result = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming")
    assert same(result)
    assert result.residuals().chunks == (((shards or (CHUNK,))[0],) * (N // (shards or (CHUNK,))[0]),)


def test_stacked_coordinates_in_a_store_are_taken_one_by_one(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", data=np.stack([X - 1, X + 1]), chunks=(1, CHUNK))

    def middle_decay(x, a, b, c):
        return decay((x[0] + x[1]) / 2, a, b, c)

    found = curve_fit(middle_decay, str(tmp_path / "x.zarr"), Y, p0=P0, ftol=1e-12, xtol=1e-12, gtol=1e-12)
    np.testing.assert_allclose(found.popt, EXPECTED.popt, rtol=1e-9)


@pytest.mark.parametrize("as_path", [True, False])
def test_a_list_of_stores_is_one_array(as_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the workflow keeps its checkpoint
    parts = [write(tmp_path / f"{k}.zarr", values=part) for k, part in enumerate(np.split(Y, [10_000, 13_000]))]
    xs = [write(tmp_path / f"x{k}.zarr", values=part) for k, part in enumerate(np.split(X, [10_000, 13_000]))]
    if as_path:
        parts, xs = [tmp_path / f"{k}.zarr" for k in range(3)], [str(tmp_path / f"x{k}.zarr") for k in range(3)]
    assert same(curve_fit(decay, xs, parts, p0=P0, strategy="streaming"))
    assert same(fit(decay, X, parts, p0=P0, workflow="streaming"))


@pytest.mark.slow
def test_x_sigma_and_mask_may_be_stored_too(tmp_path):
    sigma, mask = 5 + X, (X > 9).astype("u1")
    for name, values in (("x", X), ("y", Y), ("sigma", sigma), ("mask", mask)):
        write(tmp_path / name, values=values)
    paths = {name: tmp_path / name for name in ("x", "y", "sigma", "mask")}
    expected = curve_fit(decay, X, Y, sigma=sigma, mask=mask, p0=P0)
    for kind in (str, type(tmp_path)):
        x, y, sigma, mask = (kind(paths[name]) for name in ("x", "y", "sigma", "mask"))
        assert same(curve_fit(decay, x, y, sigma=sigma, mask=mask, p0=P0, strategy="streaming"), expected)
    assert same(curve_fit(lambda x, *p: decay(x[0], *p), (paths["x"],), paths["y"], p0=P0))


def test_what_is_not_there_or_a_group_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`ydata`: no Zarr array at .*nothing"):
        curve_fit(decay, X, tmp_path / "nothing", p0=P0)
    write(tmp_path / "group.zarr", "counts")
    with pytest.raises(TypeError, match=r"is a group.*counts"):
        curve_fit(decay, X, tmp_path / "group.zarr", p0=P0)
    write(tmp_path / "a", values=Y.reshape(100, -1), chunks=(10, 600))
    write(tmp_path / "b", values=Y.reshape(200, -1), chunks=(10, 300))
    with pytest.raises(ValueError, match="joined along their first axis"):
        curve_fit(decay, X, [tmp_path / "a", tmp_path / "b"], p0=P0)


def test_a_file_of_another_format_is_said(tmp_path):
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["entry/counts"] = Y
    np.save(tmp_path / "y.npy", Y)
    for path in (tmp_path / "y.h5", tmp_path / "y.h5/entry/counts", str(tmp_path / "y.h5")):
        for call in (dict(xdata=X, ydata=path), dict(xdata=path, ydata=Y), dict(xdata=X, ydata=Y, sigma=path)):
            with pytest.raises(TypeError, match=r"y.h5' is an HDF5 file: open it with h5py and pass one of its datasets"):
                curve_fit(decay, **call, p0=P0)
    with pytest.raises(TypeError, match=r"`ydata`: '.*y.npy' is a file that is not a Zarr store"):
        fit_map(decay, X, tmp_path / "y.npy", P0)


def test_the_codec_pipeline_is_configured(tmp_path):
    write(tmp_path / "y")
    with dask.config.set({"nlsq.codec-pipeline": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        assert same(curve_fit(decay, X, tmp_path / "y", p0=P0))


@pytest.mark.parametrize("version", [2, 3])
def test_the_arrays_of_the_group_are_named_where_one_is_missing(version, tmp_path):
    group = zarr.create_group(tmp_path / "scan.zarr", zarr_format=version)
    for name in ("spectra", "time"):
        group.create_array(name, shape=(3,), dtype="f8")
    message = r"no Zarr array at .*spectrum'; the arrays of '.*scan.zarr' are: spectra, time; did you mean 'spectra'\?"
    with pytest.raises(FileNotFoundError, match=message):
        curve_fit(decay, X, tmp_path / "scan.zarr" / "spectrum", P0)
    with pytest.raises(FileNotFoundError, match=r"are: spectra, time$"):
        curve_fit(decay, X, Y, P0, sigma=str(tmp_path / "scan.zarr" / "zzz"))


# ---------------------------------------------------------------------------------------------------------------------
# values that are no data


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("standard", marks=pytest.mark.slow), "streaming"])
@pytest.mark.parametrize(
    "options, left_out",
    [
        ({}, lambda y: y == 65535),
        (dict(mask_values=[65535, 7]), lambda y: np.isin(y, [65535, 7])),
        (dict(mask_values=[65535, -1, 70000, np.nan]), lambda y: y == 65535),
        pytest.param(dict(valid_range=(10, 1000)), lambda y: (y < 10) | (y > 1000), marks=pytest.mark.slow),
        (dict(valid_range=(None, 999.5)), lambda y: y > 999),
        (dict(mask=X > 9), lambda y: (y == 65535) | (X > 9)),
    ],
    ids=["largest", "values", "impossible values", "range", "one limit", "with mask"],
)
def test_values_that_are_no_data_are_left_out(options, left_out, strategy, tmp_path):
    y = Y.copy()
    y[::97], y[5::1001] = 65535, 7
    write(tmp_path / "y", values=y)
    found = curve_fit(decay, X, tmp_path / "y", p0=P0, strategy=strategy, **options)
    hidden = left_out(y)
    assert same(found, curve_fit(decay, X, y, mask=hidden, p0=P0))
    assert found.n_masked == hidden.sum()
    np.testing.assert_array_equal(np.isnan(np.asarray(found.residuals())), hidden)


def test_the_largest_value_counts_where_it_is_asked_for(tmp_path):
    y = np.minimum(Y, 200).astype("u2")
    y[y == 200] = 65535
    write(tmp_path / "y", values=y)
    assert curve_fit(decay, X, tmp_path / "y", p0=P0, mask_values=()).n_masked == 0
    assert curve_fit(decay, X, y, p0=P0).n_masked == 0


FRAMES = np.random.default_rng(1).poisson(100 * np.exp(-0.5 * X[::1000]) + 30, (20, 60)).astype("u2")
FRAMES[:, 7] = 65535  # a dead column


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """The folder with FRAMES: in y.zarr, as xarray writes them, and in y.h5."""
    path = tmp_path_factory.mktemp("frames")
    labels = dict(x=X[::1000], frame=np.arange(20))
    in_chunks = xr.DataArray(FRAMES, labels, ("frame", "x"), "I").chunk(frame=5)
    in_chunks.to_dataset().to_zarr(path / "y.zarr", zarr_format=3, consolidated=False)
    signed = xr.DataArray(FRAMES.view("i2"), labels, ("frame", "x"), "I", {"_Unsigned": "true"})  # as in netCDF 3
    signed.to_dataset().to_netcdf(path / "y.nc", engine="scipy")
    with h5py.File(path / "y.h5", "w") as file:
        file.create_dataset("I", data=FRAMES, chunks=(5, 60))
    return path


def in_zarr(path):
    return da.from_zarr(str(path / "y.zarr/I"))


def opened_by_xarray(path):
    return xr.open_zarr(path / "y.zarr", consolidated=False).I


AS_STORED = {
    "from_zarr": in_zarr,
    "from_array": lambda path: da.from_array(zarr.open_array(path / "y.zarr/I")),
    "inline": lambda path: da.from_array(zarr.open_array(path / "y.zarr/I"), inline_array=True),
    "h5py": lambda path: da.from_array(h5py.File(path / "y.h5")["I"]),
    "cut": lambda path: da.concatenate([in_zarr(path)[:10], in_zarr(path)[[*range(10, 20)]]]).rechunk((7, 20)),
    "moved": lambda path: in_zarr(path).T[::-1].T,
    "open_zarr": opened_by_xarray,
    "open_dataset": lambda path: xr.open_dataset(path / "y.zarr", engine="zarr", consolidated=False).I,
    "netCDF": lambda path: xr.open_dataset(path / "y.nc", engine="scipy").I,
    "netCDF in chunks": lambda path: xr.open_dataset(path / "y.nc", engine="scipy", chunks={}).I,
    "isel": lambda path: opened_by_xarray(path).isel(frame=slice(None, None, -1)).chunk(frame=7),
}
COMPUTED = {
    "sum": lambda path: (in_zarr(path) + np.uint16(0)).astype("u2"),
    "map_blocks": lambda path: in_zarr(path).map_blocks(lambda block: block),
    "reduced": lambda path: in_zarr(path).reshape(1, 20, 60).max(0),
    "joined with others": lambda path: da.concatenate([in_zarr(path), da.zeros((1, 60), dtype="u2")])[:20],
    "from_delayed": lambda path: da.from_delayed(dask.delayed(np.asarray)(in_zarr(path)), FRAMES.shape, "u2"),
    "binned": lambda path: da.coarsen(np.max, in_zarr(path), {0: 1}),
    "read": lambda path: opened_by_xarray(path).load(),
    "in memory": lambda path: da.from_array(FRAMES, chunks=(5, 60)),
}


@pytest.mark.parametrize("kind", [*AS_STORED, *COMPUTED])
def test_the_largest_value_counts_as_invalid_in_dask_and_xarray_arrays_of_stored_values_alone(kind, frames):
    y, x = {**AS_STORED, **COMPUTED}[kind](frames), X[::1000]
    x = x[::-1] if kind == "moved" else x
    for _ in range(2):  # xarray keeps what has been read
        assert curve_fit(decay, x, y, p0=P0).n_masked == (20 if kind in AS_STORED else 0)


@pytest.mark.parametrize(
    "kind", ["from_zarr", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("open_dataset", "open_zarr", "h5py"))]
)
def test_the_largest_value_counts_as_invalid_in_maps_and_groups_of_dask_and_xarray_arrays(kind, frames):
    y, x = AS_STORED[kind](frames), X[::1000]
    assert (fit_map(decay, x, y, P0).compute().n_points == 59).all()
    for how in (dict(group_axes=0), dict(groups=np.repeat(np.arange(20), 60).reshape(20, 60))):
        by_point = x if "group_axes" in how else np.broadcast_to(x, FRAMES.shape)
        by_point = xr.DataArray(by_point, dims=y.dims) if by_point.ndim == 2 and hasattr(y, "dims") else by_point
        assert fit_groups(decay, by_point, y, P0, local="a", **how).shared.n_masked == 20


def test_floats_may_have_sentinels_in_memory():
    y = Y.astype(float)
    y[::50] = -999
    y[7::50] = np.nan
    found = curve_fit(decay, X, y, p0=P0, mask_values=[-999, np.nan])
    assert found.n_masked == 2 * N // 50
    keep = np.isfinite(y) & (y != -999)
    assert same(found, curve_fit(decay, X[keep], y[keep], p0=P0))


LIMITS = [-(2**63) - 1, -(2**63), -1, 0, 0.5, 1, 7, 255, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64,
          2.0**63, 2.0**64, 1e30, -1e30, np.inf, -np.inf, np.nan]  # fmt: skip


@pytest.mark.parametrize("dtype", ["u1", "i1", "u8", "i8", "bool", "f4", "f8"])
def test_stored_values_are_compared_exactly_with_any_number(dtype):
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore"):
        if dtype.kind == "f":
            y, limits = np.array(LIMITS, dtype), [float(dtype.type(each)) for each in LIMITS]
        else:
            least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            within = [each for each in LIMITS if isinstance(each, int) and least <= each <= most]
            y, limits = np.array([least, most - 1, most, *within], dtype), LIMITS
    exact = [*map(float if dtype.kind == "f" else int, y)]  # which Python compares exactly
    for given, limit in zip(LIMITS, limits, strict=True):
        for invalid, expected in (
            (Invalid((given,), None, None), [each == limit or (limit != limit and each != each) for each in exact]),
            (Invalid((), given, None), [each < limit for each in exact]),
            (Invalid((), None, given), [each > limit for each in exact]),
        ):
            if limit != limit and not invalid.values:
                continue  # nan is no limit
            np.testing.assert_array_equal(invalid.hits(y), expected, str(invalid))
            with float64():
                np.testing.assert_array_equal(invalid.hits(jnp.asarray(y)), expected, str(invalid))


@pytest.mark.parametrize(
    "options", [dict(mask_values=[2**64 - 1]), dict(valid_range=(0, 2**63)), dict(valid_range=(0, np.uint64(2**63)))]
)
def test_large_unsigned_integers_are_left_out(options):
    y = Y.astype("u8")
    y[::97] = 2**64 - 1 if "mask_values" in options else 2**63 + 1
    expected = curve_fit(decay, X, y, mask=y > 2**62, p0=P0)
    for strategy in ("standard", "streaming"):
        found = curve_fit(decay, X, y, p0=P0, strategy=strategy, **options)
        assert same(found, expected) and found.n_masked == len(y[::97])
    pixel = fit_map(decay, X, y[None], P0, **options).compute()
    np.testing.assert_allclose(pixel.popt[0], expected.popt, rtol=1e-4)
    assert pixel.n_points[0] == expected.n_points


@pytest.mark.parametrize(
    "options",
    [
        dict(mask_values=3),
        dict(mask_values="max"),
        dict(valid_range=5),
        dict(valid_range=(1, 2, 3)),
        dict(valid_range=("0", 9)),
    ],
)
def test_sentinels_are_checked(options):
    with pytest.raises(ValueError, match=r"`(mask_values|valid_range)` must be"):
        curve_fit(decay, X, Y, p0=P0, **options)


# ---------------------------------------------------------------------------------------------------------------------
# damage

CODECS = {
    "zstd": dict(compressors=ZstdCodec()),
    "zstd checksum": dict(compressors=ZstdCodec(checksum=True)),
    "blosc lz4": dict(compressors=BloscCodec(cname="lz4", shuffle="bitshuffle")),
    "gzip": dict(compressors=GzipCodec()),
    "crc32c": dict(compressors=[ZstdCodec(), Crc32cCodec()]),
    "raw": dict(compressors=None),
    "sharded": dict(compressors=ZstdCodec(checksum=True), shards=(CHUNK,), chunks=(1000,)),
}
CHECKED = {"zstd checksum", "gzip", "crc32c", "sharded"}


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def put_directory(path):
    path.unlink()
    path.mkdir()


def unreadable(path):
    path.unlink()
    path.symlink_to(path.name)  # root may read what has no permissions, but not a link to itself


def half(path):
    for k in range(7, 15):
        (path.parent / str(k)).unlink()


DAMAGE = {
    "truncated": truncate,
    "no bytes": lambda path: path.write_bytes(b""),
    "flipped bit": flip,
    "missing": lambda path: path.unlink(),
    "directory": put_directory,
    "unreadable": unreadable,
    "half copied": half,
}


DETECTED = [  # each codec with what a checksum is for, each damage in both strategies
    *((codec, "flipped bit", "streaming") for codec in CODECS),
    ("zstd checksum", "flipped bit", "standard"), ("raw", "flipped bit", "standard"),
    ("raw", "truncated", "streaming"), ("zstd", "truncated", "standard"), ("sharded", "truncated", "standard"),
    ("blosc lz4", "no bytes", "streaming"), ("crc32c", "no bytes", "standard"),
    ("sharded", "missing", "streaming"), ("zstd", "missing", "standard"),
    ("gzip", "directory", "streaming"), ("raw", "directory", "standard"),
    ("crc32c", "unreadable", "streaming"), ("blosc lz4", "unreadable", "standard"),
    ("zstd checksum", "half copied", "streaming"), ("sharded", "half copied", "standard"),
]  # fmt: skip


@pytest.mark.parametrize("codec, damage, strategy", DETECTED)
def test_no_damage_is_undetected_but_flipped_bits_without_a_checksum(codec, damage, strategy, tmp_path, caplog):
    array = write(tmp_path / "y.zarr", **CODECS[codec])
    assert has_checksum(array) == (codec in CHECKED)
    DAMAGE[damage](tmp_path / "y.zarr" / "c" / "9")
    with caplog.at_level(logging.WARNING, logger="dask_nlsq"):
        try:
            curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy=strategy)
        except MissingChunksError as err:
            assert damage in ("missing", "half copied")
            assert f"{1 if damage == 'missing' else 8} of 15 chunks of `ydata`" in str(err)
        except BadChunkError as err:
            assert damage not in ("missing", "half copied")
            assert (err.index, err.key) == ((9,), "c/9")
            assert "`ydata`" in err.array
            assert "y.zarr" in err.array
            assert err.cause
        else:
            assert damage == "flipped bit"
            assert codec not in CHECKED
    assert ("no checksum" in caplog.text) == (codec not in CHECKED)


@pytest.mark.parametrize(
    "damage, strategy",
    [
        ("truncated", "standard"), ("no bytes", "standard"), ("directory", "streaming"), ("missing", "standard"),
        ("flipped bit", "streaming"), ("flipped bit", "standard"), ("half copied", "streaming"),
    ],
)  # fmt: skip
def test_damaged_chunks_are_left_out_and_listed(damage, strategy, tmp_path):
    write(tmp_path / "y.zarr", **CODECS["crc32c"])
    DAMAGE[damage](tmp_path / "y.zarr" / "c" / "9")
    lost = range(7, 15) if damage == "half copied" else [9]
    found = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy=strategy, on_bad_chunk="mask", missing_chunks="mask")
    hidden = np.isin(np.arange(N) // CHUNK, lost)
    assert same(found, curve_fit(decay, X, Y, mask=hidden, p0=P0))
    assert [err.index for err in found.damage] == [(k,) for k in lost]
    assert found.n_masked == hidden.sum()
    assert f"{len(lost)} damaged or absent chunks left out, first c/{lost[0]}" in repr(found)
    residuals, model = np.asarray(found.residuals()), np.asarray(found.predict())
    np.testing.assert_array_equal(np.isnan(residuals), hidden)
    np.testing.assert_array_equal(np.isnan(model), hidden)
    np.testing.assert_allclose((model - residuals)[~hidden], Y[~hidden], rtol=1e-12)


@pytest.mark.slow
def test_damage_of_x_and_sigma_hides_points_too(tmp_path):
    for name, values in (("x", X), ("y", Y), ("sigma", 5 + X)):
        write(tmp_path / name, values=values, **CODECS["crc32c"])
    flip(tmp_path / "x" / "c" / "2")
    flip(tmp_path / "sigma" / "c" / "14")
    paths = [tmp_path / name for name in ("x", "y", "sigma")]
    with pytest.raises(BadChunkError, match="`xdata`"):
        curve_fit(decay, *paths[:2], p0=P0)
    found = curve_fit(decay, *paths[:2], sigma=paths[2], p0=P0, on_bad_chunk="mask", strategy="streaming")
    hidden = np.isin(np.arange(N) // CHUNK, [2, 14])
    assert same(found, curve_fit(decay, X, Y, sigma=5 + X, mask=hidden, p0=P0))
    assert [err.array.split()[0] for err in found.damage] == ["`sigma`", "`xdata`"]
    np.testing.assert_array_equal(np.isnan(np.asarray(found.residuals())), hidden)


def test_small_chunks_that_are_joined_lose_only_the_damaged_one(tmp_path, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 2**16)
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)
    write(tmp_path / "y.zarr", **CODECS["crc32c"])
    flip(tmp_path / "y.zarr" / "c" / "0")
    found = curve_fit(decay, X, tmp_path / "y.zarr", sigma=3.0, absolute_sigma=True, p0=P0, on_bad_chunk="mask")
    expected = curve_fit(decay, X, Y, sigma=3.0, absolute_sigma=True, mask=np.arange(N) < CHUNK, p0=P0)
    assert same(found, expected)
    np.testing.assert_allclose(found.pcov, expected.pcov, rtol=1e-5)


def test_absent_chunks_may_mean_fill_values(tmp_path):
    y = Y.copy()
    y[CHUNK : 3 * CHUNK] = 0
    write(tmp_path / "y.zarr", values=y, config={"write_empty_chunks": False})
    with pytest.raises(MissingChunksError, match=r"2 of 15 chunks .*\(1,\) \(key c/1\).*fill value 0"):
        curve_fit(decay, X, tmp_path / "y.zarr", p0=P0)
    found = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, missing_chunks="fill")
    assert same(found, curve_fit(decay, X, y, p0=P0))
    assert found.n_filled == 2
    assert "2 absent chunks read as fill values" in repr(found)


@pytest.mark.slow
def test_workers_say_which_chunk_it_is(tmp_path, workers):
    write(tmp_path / "y.zarr", **CODECS["crc32c"])
    flip(tmp_path / "y.zarr" / "c" / "9")
    with workers.as_current():
        for strategy in ("streaming", "chunked"):
            with pytest.raises(BadChunkError, match=r"chunk \(9,\) of `ydata`"):
                curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy=strategy)
            found = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy=strategy, on_bad_chunk="mask")
            assert [err.index for err in found.damage] == [(9,)]


class Flaky(WrapperStore):
    """A store that raises an error for each chunk, or stalls where there is none."""

    def __init__(self, store, error=None):
        super().__init__(store)
        self.error, self.failed = error, 0

    async def get(self, key, prototype, byte_range=None):
        if "c/" in key:
            self.failed += 1
            if self.error is not None:
                raise self.error
            await asyncio.sleep(3600)
        return await super().get(key, prototype, byte_range)


def opened(client, url):
    """A URL as it is, or the array there by obstore."""
    if client == "fsspec":
        return url
    store = HTTPStore.from_url(url, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    return zarr.open_array(ObjectStore(store), mode="r")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.patience.BACKOFF", 0.001)
    with dask.config.set({"nlsq.read-deadline": 0.5}):
        yield


FAULTS = dict(refused=0.03, closed=0.02, stalled=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, (5 * CHUNK,)])
@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_a_server_that_fails_and_stalls_gives_the_same_bits(client, shards, tmp_path, impatient):
    write(tmp_path / "y.zarr", chunks=(500,), shards=shards)
    expected = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming")
    faults = FAULTS if shards is None else dict(refused=0.2, closed=0.2, stalled=0.1)  # there are few of them
    with served(tmp_path, metadata=client == "fsspec", **faults) as server:
        found = curve_fit(decay, X, opened(client, f"{server.url}/y.zarr"), p0=P0, strategy="streaming")
    assert {"whole", "refused", "closed", "stalled"} <= server.answered.keys()
    np.testing.assert_array_equal(found.popt, expected.popt)
    np.testing.assert_array_equal(found.pcov, expected.pcov)


@pytest.mark.slow
def test_workers_read_from_a_server_themselves(tmp_path, workers):
    write(tmp_path / "y.zarr", chunks=(500,))
    expected = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming")
    with (
        served(tmp_path, **FAULTS) as server,
        dask.config.set({"nlsq.read-deadline": 0.5}),
        workers.as_current(),
    ):
        found = curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0, strategy="streaming")
    assert server.answered["refused"] > 5
    np.testing.assert_array_equal(found.popt, expected.popt)


@pytest.mark.slow
@pytest.mark.parametrize("client", ["fsspec", "obstore"])
@pytest.mark.parametrize(
    "fault, cause, tries",
    [
        ("refused", "503 Service Unavailable|ClientResponseError: 503", 5),
        ("closed", "ClientPayloadError|GenericError", 5),
        ("stalled", "TimeoutError: no answer within 0.5 s", 5),
        ("forbidden", "ClientResponseError: 403|403 Forbidden", 1),
    ],
)
def test_an_answer_that_is_none_is_no_absent_chunk(fault, cause, tries, client, tmp_path, impatient):
    write(tmp_path / "y.zarr")
    with served(tmp_path, metadata=False, **{fault: 1.0}) as server, pytest.raises(BadChunkError, match=cause) as raised:
        stored = Stored("ydata", open_array("ydata", opened(client, f"{server.url}/y.zarr")), Policy())
        stored[0:CHUNK,]
    assert (raised.value.index, raised.value.key) == ((0,), "c/0")
    assert server.answered[fault] == tries
    if fault != "closed":  # a closed connection ends no answer that has no body
        with served(tmp_path, metadata=False, **{fault: 1.0}) as server, pytest.raises(BadChunkError, match=cause):
            curve_fit(decay, X, opened(client, f"{server.url}/y.zarr"), p0=P0, missing_chunks="mask")


def test_only_404_says_that_a_chunk_is_absent(tmp_path, impatient):
    write(tmp_path / "y.zarr")
    (tmp_path / "y.zarr" / "c" / "9").unlink()
    with served(tmp_path, refused=0.3, metadata=False) as server:
        with pytest.raises(MissingChunksError, match=r"1 of 15 chunks .*\(9,\)"):
            curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0)
        found = curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0, missing_chunks="mask", strategy="streaming")
        with pytest.raises(FileNotFoundError, match="no Zarr array"):
            curve_fit(decay, X, f"{server.url}/nothing.zarr", p0=P0)
    assert same(found, curve_fit(decay, X, Y, mask=np.arange(N) // CHUNK == 9, p0=P0))


def test_a_server_that_is_down_is_named(tmp_path, impatient):
    write(tmp_path / "y.zarr")
    with served(tmp_path, refused=1.0) as server, pytest.raises(OSError, match=r"`ydata`: the store of .*y.zarr.*503"):
        curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0)
    with pytest.raises(OSError, match=r"`ydata`: the store of .*y.zarr.*ClientConnectorError"):
        curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0)


def test_a_chunk_that_vanishes_during_the_fit_is_no_fill_value(tmp_path):
    write(tmp_path / "y.zarr")

    def remove(record):
        (tmp_path / "y.zarr" / "c" / "9").unlink(missing_ok=True)

    with pytest.raises(BadChunkError, match=r"\(9,\) of `ydata`.*it existed when the fit began"):
        curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming", callback=remove)


@pytest.mark.slow
def test_an_answer_of_404_in_between_is_asked_again(tmp_path, impatient):
    write(tmp_path / "y.zarr", chunks=(500,))
    expected = curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming")
    with served(tmp_path, absent=0.01, metadata=False) as server:
        found = curve_fit(decay, X, f"{server.url}/y.zarr", p0=P0, strategy="streaming")
    assert server.answered["absent"] > 2
    np.testing.assert_array_equal(found.popt, expected.popt)


@pytest.mark.parametrize(
    "error, tries",
    [
        (ConnectionResetError("lost"), 5),
        (OSError(errno.EIO, "bus"), 5),
        (PermissionError("no"), 1),
        (OSError("bad gzip"), 1),
    ],
    ids=["connection", "bus", "permission", "decoding"],
)
def test_only_what_may_pass_is_tried_again(error, tries, tmp_path, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.patience.BACKOFF", 0.001)
    write(tmp_path / "y.zarr")
    flaky = Flaky(LocalStore(tmp_path / "y.zarr"), error)
    stored = Stored("ydata", zarr.open_array(flaky, mode="r+"), Policy())
    with pytest.raises(BadChunkError, match=str(error.args[-1])):
        stored[0:CHUNK,]
    assert flaky.failed == tries


def test_a_stalled_read_ends_at_the_deadline(tmp_path):
    write(tmp_path / "y.zarr")
    flaky = Flaky(LocalStore(tmp_path / "y.zarr"))
    with dask.config.set({"nlsq.read-deadline": 0.1, "nlsq.read-retries": 0}):
        stored = Stored("ydata", zarr.open_array(flaky, mode="r+"), Policy())
    begin = time.perf_counter()
    with pytest.raises(BadChunkError, match="TimeoutError"):
        stored[0:CHUNK,]
    assert time.perf_counter() - begin < 5


def test_the_look_ahead_reads_no_chunk(tmp_path):
    for store in (LocalStore(tmp_path / "y.zarr"), MemoryStore()):
        write(store)
        flaky = Flaky(store, OSError("read"))
        stored = Stored("ydata", zarr.open_array(flaky, mode="r+"), Policy())
        scan_keys(stored)
        assert flaky.failed == 0
        assert not stored.damaged


def test_a_store_that_is_written_to_during_the_fit_is_told(tmp_path):
    array = write(tmp_path / "y.zarr", compressors=None)

    def spoil(record):
        if record.nfev == 1:
            array[:100] = Y[:100] + 1

    with pytest.warns(RuntimeWarning, match="changed during the fit"):
        curve_fit(decay, X, tmp_path / "y.zarr", p0=P0, strategy="streaming", callback=spoil)


METADATA = {"zarr.json": 3, ".zarray": 2, ".zattrs": 2}


@pytest.mark.parametrize("file", METADATA)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"])
def test_damaged_metadata_of_a_store_are_named(file, content, tmp_path):
    write(tmp_path / "y.zarr", zarr_format=METADATA[file], attributes={"unit": "s"})
    (tmp_path / "y.zarr" / file).write_bytes(content)
    for path in (tmp_path / "y.zarr", f"file://{tmp_path}/y.zarr"):
        with pytest.raises(DamagedFileError, match=rf"y.zarr/{file} is damaged .*: restore it from a copy$"):
            curve_fit(decay, X, path, p0=P0)


def test_damaged_metadata_of_a_group_are_named(tmp_path):
    for file, version in (("zarr.json", 3), (".zgroup", 2)):
        path = tmp_path / file
        zarr.create_group(path, zarr_format=version)
        (path / file).write_text("{")
        with pytest.raises(DamagedFileError, match=f"{file} is damaged"):
            curve_fit(decay, X, path, p0=P0)


def test_metadata_that_zarr_does_not_understand_name_the_array(tmp_path):
    write(tmp_path / "y.zarr")
    text = (tmp_path / "y.zarr" / "zarr.json").read_text()
    (tmp_path / "y.zarr" / "zarr.json").write_text(text.replace('"shape"', '"shap"'))
    with pytest.raises(ValueError, match=r"`ydata`: Zarr cannot open the array at .*y.zarr': .*shap"):
        curve_fit(decay, X, tmp_path / "y.zarr", p0=P0)


# ---------------------------------------------------------------------------------------------------------------------
# stores behind Dask and xarray arrays


def by_xarray(path, **options):
    xr.Dataset({"y": ("t", Y)}, coords={"t": X}).to_zarr(path, encoding={"y": {"chunks": (CHUNK,)}}, consolidated=False)
    (path / "y" / "c" / "9").unlink()
    return xr.open_zarr(path, consolidated=False, **options).y


def by_dask(path, read=da.from_zarr):
    write(path)
    (path / "c" / "9").unlink()
    return read(path)


BEHIND = {
    "from_zarr": by_dask,
    "from_array": lambda path: by_dask(path, lambda path: da.from_array(zarr.open_array(path))),
    "inline": lambda path: by_dask(path, lambda path: da.from_array(zarr.open_array(path), inline_array=True)),
    "url": lambda path: by_dask(path, lambda path: da.from_zarr(f"file://{path}")),
    "computed on": lambda path: by_dask(path, lambda path: (da.from_zarr(path) * 1.0).rechunk(7_000)),
    "optimized": lambda path: by_dask(path, lambda path: dask.optimize(da.from_zarr(path) + 1)[0]),
    "joined": lambda path: by_dask(path, lambda path: da.concatenate([da.from_zarr(path)[:1], da.from_zarr(path)[1:]])),
    "xarray": by_xarray,
    "xarray without Dask": lambda path: by_xarray(path, chunks=None),
    "xarray in larger chunks": lambda path: by_xarray(path, chunks={"t": 3 * CHUNK}),
}


@pytest.mark.parametrize("how", BEHIND)
def test_absent_chunks_behind_dask_and_xarray_arrays_are_not_fitted(how, tmp_path):
    y = BEHIND[how](tmp_path / "y")
    with pytest.raises(MissingChunksError, match=r"1 of 15 chunks of `ydata` .*key (y/)?c/9.*pass the path .*zarr.Array"):
        curve_fit(decay, X, y, p0=P0)
    for option in (dict(missing_chunks="mask"), dict(on_bad_chunk="mask")):
        with pytest.raises(ValueError, match=r"=\"mask\" cannot be applied: `ydata` is an array of.*pass the path"):
            curve_fit(decay, X, y, p0=P0, **option)
    filled = curve_fit(decay, X, y, p0=P0, missing_chunks="fill")
    assert same(filled, curve_fit(decay, X, np.asarray(y), p0=P0))


def test_maps_and_groups_look_for_chunks_behind_dask_arrays(tmp_path):
    write(tmp_path / "y", values=Y.reshape(15, CHUNK), chunks=(1, CHUNK))
    (tmp_path / "y" / "c" / "9" / "0").unlink()
    y = da.from_zarr(tmp_path / "y")
    for fit_all in (
        lambda **options: fit_map(decay, X[:CHUNK], y, P0, **options),
        lambda **options: fit_groups(decay, X[:CHUNK], y, P0, local=["a"], group_axes=0, **options),
    ):
        with pytest.raises(MissingChunksError, match=r"1 of 15 chunks of `ydata`"):
            fit_all()
        with pytest.raises(ValueError, match='missing_chunks="mask" cannot be applied'):
            fit_all(missing_chunks="mask")


@pytest.mark.parametrize("name", ["xdata", "sigma", "mask"])
def test_absent_chunks_behind_other_arguments_are_found(name, tmp_path):
    data = dict(xdata=X, ydata=Y)
    data[name] = by_dask(tmp_path / name) + 1
    with pytest.raises(MissingChunksError, match=f"1 of 15 chunks of `{name}`"):
        curve_fit(decay, p0=P0, **data)


def test_absent_chunks_that_no_task_reads_are_no_error(tmp_path):
    y = by_dask(tmp_path / "y")
    n = 9 * CHUNK
    assert same(curve_fit(decay, X[:n], y[:n], p0=P0), curve_fit(decay, X[:n], Y[:n], p0=P0))
    with pytest.raises(MissingChunksError, match="1 of 15"):
        curve_fit(decay, X[: n + 1], y[: n + 1], p0=P0)


@pytest.mark.parametrize("encoding", [{}, dict(_FillValue=0, dtype="u2")])
def test_chunks_that_xarray_has_never_written_are_nan(encoding, tmp_path):
    y = np.where(np.arange(N) // CHUNK == 9, np.nan, Y)
    xr.Dataset({"y": ("t", y)}).to_zarr(tmp_path / "y", encoding={"y": {"chunks": (CHUNK,)} | encoding}, consolidated=False)
    (tmp_path / "y" / "y" / "c" / "9").unlink(missing_ok=True)
    stored = xr.open_zarr(tmp_path / "y", consolidated=False).y
    assert np.isnan(stored[9 * CHUNK])
    with pytest.raises(ValueError, match="nan or infinity"):
        curve_fit(decay, X, stored, p0=P0)
    found = curve_fit(decay, X, stored, p0=P0, nan_policy="omit")
    assert found.n_omitted == CHUNK
    assert same(found, curve_fit(decay, X, y, p0=P0, nan_policy="omit"))


def test_options_for_chunks_are_refused_where_nothing_can_know_them(tmp_path):
    with h5py.File(tmp_path / "y.h5", "w") as file:
        for y in (da.from_array(Y, chunks=CHUNK), file.create_dataset("y", data=Y, chunks=(CHUNK,))):
            for option in (dict(missing_chunks="fill"), dict(missing_chunks="mask"), dict(on_bad_chunk="mask")):
                with pytest.raises(ValueError, match="cannot be applied: `ydata` is"):
                    curve_fit(decay, X, y, p0=P0, **option)
    write(tmp_path / "y")
    (tmp_path / "y" / "c" / "9").unlink()
    hidden = da.from_array(np.arange(N) < CHUNK, chunks=CHUNK)  # the option is for the data in the store
    assert curve_fit(decay, X, tmp_path / "y", p0=P0, mask=hidden, missing_chunks="mask").n_masked == 2 * CHUNK
