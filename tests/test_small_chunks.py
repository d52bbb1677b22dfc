"""Small chunks cost as much as large ones, and each of them keeps what is said of it."""

import logging
from collections import Counter

import dask
import dask.array as da
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed.protocol import deserialize, serialize
from zarr.storage import MemoryStore, WrapperStore

from dask_nlsq import BadChunkError, curve_fit, fit_map
from dask_nlsq.data.arrays import as_array
from dask_nlsq.data.joining import coarser, joins_of, split
from dask_nlsq.data.store import Policy, Stored


@pytest.fixture(autouse=True)
def few_runs_are_enough(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)


@pytest.mark.parametrize(
    "chunks, joins",
    [
        (((1,) * 2000, (64,)), (125, 1)),  # a 16th of all points
        (((1,) * 10**6, (64,)), (1024, 1)),  # 2^16 points
        (((1,) * 30, (1000,)), (1, 1)),
        (((50,) * 4 + (13,),), (5,)),  # tiny
        (((10,) * 300, (10,) * 300), (2, 300)),
        (((1,) * 7, (5,) * 4000, (5,) * 20), (1, 131, 20)),
    ],
)
def test_so_many_chunks_are_joined_that_16_runs_remain(chunks, joins, monkeypatch):
    monkeypatch.undo()
    assert joins_of(chunks) == joins


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


class Counting:
    """An array that notes how often it is asked."""

    def __init__(self, values, short=None):
        self.values, self.shape, self.dtype, self.ndim, self.asked = values, values.shape, values.dtype, values.ndim, []
        self.short = short  # a row that is asked for in vain

    def __getitem__(self, item):
        self.asked.append(item)
        found = self.values[item]
        return found[:, 1:] if self.short is not None and item[0].start <= self.short < item[0].stop else found


@pytest.mark.parametrize("strategy", ["standard", "streaming"])
def test_small_chunks_are_read_by_one_request(strategy):
    x = np.linspace(0, 5, 25)
    source = Counting(2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (40, 25)))
    apart = da.from_array(source, chunks=(1, 25))
    found = curve_fit(decay, x, apart, p0=[1, 1, 0], strategy=strategy)
    whole = curve_fit(decay, x, source.values, p0=[1, 1, 0])
    np.testing.assert_allclose(found.popt, whole.popt, rtol=1e-9)
    asked = source.asked[1:]  # after Dask has looked at what an empty slice is
    assert set(map(str, asked)) == {str((slice(0, 40), slice(0, 25)))}
    assert len(asked) == 1 if strategy == "standard" else len(asked) <= found.nfev + 1


def test_the_chunk_to_blame_is_found_in_a_run():
    source = Counting(np.ones((40, 25)), short=17)
    with pytest.raises(ValueError, match=r"chunk \(17, 0\) of `ydata` has shape \(1, 24\)"):
        curve_fit(decay, np.linspace(0, 5, 25), da.from_array(source, chunks=(1, 25)), p0=[1, 1, 0])


@pytest.mark.parametrize("strategy", ["standard", "streaming"])
@pytest.mark.parametrize("how", ["damaged", "absent"])
def test_of_a_run_of_small_chunks_those_are_left_out_that_cannot_be_read(strategy, how, tmp_path):
    x = np.linspace(0, 5, 25)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (40, 25))
    stored = zarr.create_array(tmp_path / "y.zarr", shape=y.shape, chunks=(1, 25), dtype=y.dtype)
    stored[:] = y
    bad = tmp_path / "y.zarr" / "c" / "7" / "0"
    bad.write_bytes(b"not a chunk") if how == "damaged" else bad.unlink()
    options = dict(p0=[1, 1, 0], strategy=strategy)
    with pytest.raises((BadChunkError, FileNotFoundError), match=r"\(7, 0\)"):
        curve_fit(decay, x, stored, **options)
    found = curve_fit(decay, x, stored, **options, on_bad_chunk="mask", missing_chunks="mask")
    assert [each.index for each in found.damage] == [(7, 0)] and (found.n_points, found.n_masked) == (39 * 25, 25)
    np.testing.assert_allclose(found.popt, curve_fit(decay, x, np.delete(y, 7, axis=0), **options).popt, rtol=1e-9)
    if how == "absent":
        filled = y.copy()
        filled[7] = 0
        found = curve_fit(decay, x, stored, **options, missing_chunks="fill")
        np.testing.assert_allclose(found.popt, curve_fit(decay, x, filled, **options).popt, rtol=1e-9)


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=pytest.mark.slow), "store", "path"])
def test_a_map_of_chunks_of_one_pixel_is_read_in_few_requests_and_has_the_same_bits(kind, tmp_path):
    x = np.linspace(0, 5, 64)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (40, 50, 64))
    given, source = tmp_path / "y.zarr", Counting(y)
    if kind == "path":
        zarr.create_array(given, shape=y.shape, chunks=(1, 1, 64), dtype=y.dtype)[:] = y
    else:
        given = da.from_array(source if kind == "store" else y, chunks=(1, 1, 64))
    fits = fit_map(decay, x, given, p0=[1, 1, 0])
    assert fits.popt.npartitions <= 4
    wanted = fit_map(decay, x, y, p0=[1, 1, 0]).compute().record
    np.testing.assert_array_equal(fits.compute().record, wanted)
    assert kind != "store" or len(source.asked) <= 6


@pytest.mark.parametrize("how", ["damaged", "absent"])
def test_of_a_map_of_small_chunks_those_are_left_out_that_cannot_be_read(how, tmp_path):
    x = np.linspace(0, 5, 64)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (6, 5, 64))
    stored = zarr.create_array(tmp_path / "y.zarr", shape=y.shape, chunks=(1, 1, 64), dtype=y.dtype)
    stored[:] = y
    bad = tmp_path / "y.zarr" / "c" / "3" / "2" / "0"
    bad.write_bytes(b"not a chunk") if how == "damaged" else bad.unlink()
    with pytest.raises((BadChunkError, FileNotFoundError), match=r"\(3, 2, 0\)"):
        fit_map(decay, x, stored, p0=[1, 1, 0]).compute()
    found = fit_map(decay, x, stored, p0=[1, 1, 0], on_bad_chunk="mask", missing_chunks="mask").compute()
    lost = np.zeros((6, 5), bool)
    lost[3, 2] = True
    np.testing.assert_array_equal(np.isnan(found.popt).all(axis=-1), lost)
    wanted = fit_map(decay, x, y, p0=[1, 1, 0]).compute().popt
    np.testing.assert_array_equal(np.asarray(found.popt)[~lost], np.asarray(wanted)[~lost])


@pytest.mark.parametrize("kind", ["turned", "exchanged", "transposed", "plain"])
def test_views_of_one_array_that_lie_otherwise_are_not_taken_for_it(kind):
    base = np.random.default_rng(0).normal(size=(8, 8))
    views = dict(turned=base[::-1], transposed=base.T).get(kind, base)
    rows = {("rows", k, 0): views[k : k + 1] for k in range(8)}
    if kind == "exchanged":
        rows["rows", 2, 0], rows["rows", 5, 0] = rows["rows", 5, 0], rows["rows", 2, 0]
    array = da.Array(rows, "rows", ((1,) * 8, (8,)), dtype=base.dtype)
    joined = coarser(array)
    assert (joined.numblocks == (1, 1)) == (kind == "plain")
    np.testing.assert_array_equal(joined, array)


@pytest.mark.parametrize("within, sizes", [((4, 6), (3, 1, 3, 3)), ((10,), (3, 3, 3, 1)), ((3, 7), (1,) * 10)])
def test_chunks_are_joined_within_bounds(within, sizes, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 60)
    y = np.random.default_rng(0).normal(size=(10, 20))
    chunks = (2, 2, 2, 2, 2) if within == (3, 7) else 1
    joined = coarser(da.from_array(y, chunks=(chunks, 20)), (within, (20,)))
    assert joined.chunks[0] == ((2,) * 5 if within == (3, 7) else sizes)
    np.testing.assert_array_equal(joined, y)


STORES = ["path", "memory", "h5py", "from_h5py", "from_zarr", "xarray"]


def stored_as(kind, y, directory):
    """y in chunks of a row, in a store of a kind."""
    if kind == "memory":
        return da.from_array(y, chunks=(1, -1))
    if "h5py" in kind:
        with h5py.File(directory / "y.h5", "w") as file:
            file.create_dataset("y", data=y, chunks=(1, y.shape[1]))
        dataset = h5py.File(directory / "y.h5", "r")["y"]
        return dataset if kind == "h5py" else da.from_array(dataset, chunks=(1, -1))
    array = zarr.create_array(
        directory / "y.zarr", name="y", shape=y.shape, chunks=(1, y.shape[1]), dtype=y.dtype, dimension_names=("k", "x")
    )
    array[:] = y
    path = directory / "y.zarr" / "y"
    if kind == "xarray":
        return xr.open_zarr(directory / "y.zarr", consolidated=False, chunks={}).y
    return path if kind == "path" else da.from_zarr(path)


@pytest.mark.parametrize(
    "kind, strategy",
    [
        ("path", "chunked"),
        ("path", "streaming"),
        *(
            pytest.param(kind, "chunked", marks=pytest.mark.slow)
            for kind in ("memory", "h5py", "from_h5py", "from_zarr", "xarray")
        ),
    ],
)
def test_workers_and_threads_find_the_same_bits_in_small_chunks(kind, strategy, tmp_path, workers, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dask_nlsq")
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 2500)
    x = np.linspace(0, 5, 25)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (400, 25))
    data = stored_as(kind, y, tmp_path)
    here = curve_fit(decay, x, data, p0=[1, 1, 0], strategy="streaming" if strategy == "streaming" else "standard")
    with workers.as_current():
        there = curve_fit(decay, x, data, p0=[1, 1, 0], strategy=strategy)
    assert here.popt.tobytes() == there.popt.tobytes() and here.pcov.tobytes() == there.pcov.tobytes()
    np.testing.assert_allclose(here.popt, curve_fit(decay, x, y, p0=[1, 1, 0]).popt, rtol=1e-6)
    assert "one by one" not in caplog.text


class OnceAbsent(WrapperStore):
    """A store that says once of each chunk that it is absent."""

    asked: Counter = Counter()  # of all stores: Zarr opens others of the same kind

    async def get(self, key, prototype, byte_range=None):
        self.asked[key] += 1
        return None if "c/" in key and self.asked[key] == 1 else await super().get(key, prototype, byte_range)


def test_a_chunk_that_a_store_denies_once_is_asked_for_again(caplog):
    caplog.set_level(logging.INFO, "dask_nlsq")
    x = np.linspace(0, 5, 25)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (200, 25))
    memory = MemoryStore()
    zarr.create_array(memory, shape=y.shape, chunks=(1, 25), dtype=y.dtype)[:] = y
    found = curve_fit(decay, x, zarr.open_array(OnceAbsent(memory), mode="r+"), p0=[1, 1, 0])
    np.testing.assert_allclose(found.popt, curve_fit(decay, x, y, p0=[1, 1, 0]).popt, rtol=1e-9)
    assert {n for key, n in OnceAbsent.asked.items() if "c/" in key} == {3}  # denied, asked how large it is, and given
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("box", [(slice(3, 31), slice(10, 70)), (slice(0, 2), slice(0, 7)), (slice(5, 6), slice(20, 90))])
def test_a_box_of_a_store_is_that_of_its_chunks(box):
    y = np.arange(31 * 90).reshape(31, 90)
    array = zarr.create_array(MemoryStore(), shape=y.shape, chunks=(2, 7), dtype=y.dtype)
    array[:] = y
    stored = Stored("y", array, Policy())
    np.testing.assert_array_equal(stored[box], y[box])
    parts = [*split(box, stored.ends)]
    joined = np.full_like(y[box], -1)
    for index, there, part in parts:
        lies_in = [(one.start // n, (one.stop - 1) // n) for one, n in zip(part, (2, 7), strict=True)]
        assert lies_in == [(k, k) for k in index]
        joined[there] = y[part]
    np.testing.assert_array_equal(joined, y[box])


def test_values_that_others_are_made_of_are_read_once():
    x = np.linspace(0, 5, 25)
    source = Counting(2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (40, 25)))
    y = da.from_array(source, chunks=(1, 25))
    found = curve_fit(decay, x, y, sigma=da.sqrt(abs(y) + 1), p0=[1, 1, 0])
    wanted = curve_fit(decay, x, source.values, sigma=np.sqrt(abs(source.values) + 1), p0=[1, 1, 0])
    np.testing.assert_allclose(found.popt, wanted.popt, rtol=1e-9)
    assert len(source.asked) == 1 + 40


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_an_array_that_workers_would_rechunk_among_themselves_is_fitted(strategy, workers):
    x = np.linspace(0, 5, 25)
    y = 2 * np.exp(-0.7 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, (40, 25))
    options = dict(p0=[1, 1, 0], strategy=strategy)
    with workers.as_current(), dask.config.set({"array.rechunk.method": "p2p"}):
        rechunked = da.from_array(y, chunks=(25, 1)).rechunk((1, 25))
        assert any(name.startswith("rechunk-p2p") for name in rechunked.dask.layers)
        found = curve_fit(decay, x, rechunked, **options)
        sigma = da.ones((40, 25), chunks=(40, 3))
        cut_otherwise = curve_fit(decay, x, da.from_array(y, chunks=(8, 25)), sigma=sigma, **options)
        residuals = np.asarray(found.residuals())
    wanted = curve_fit(decay, x, y, p0=[1, 1, 0])
    np.testing.assert_allclose([found.popt, cut_otherwise.popt], [wanted.popt] * 2, rtol=1e-6)
    np.testing.assert_allclose(residuals, wanted.residuals(), atol=1e-6)


def test_the_chunk_to_blame_is_found_in_a_map():
    source = Counting(np.ones((3000, 25)), short=1700)
    fits = fit_map(decay, np.linspace(0, 5, 25), da.from_array(source, chunks=(1, 25)), p0=[1, 1, 0])
    assert fits.popt.npartitions < 10
    with pytest.raises(ValueError, match=r"chunk \(1700, 0\) of `ydata` has shape \(1, 24\)"):
        fits.compute()


@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "f4", "f8"])
def test_workers_can_exchange_chunks_with_masks(dtype):
    plain = da.from_array(np.arange(6).astype(dtype), chunks=6)
    masked = plain.map_blocks(lambda block: np.ma.masked_array(block, block % 3 == 1), meta=np.ma.masked_array(plain._meta))
    chunk = as_array("ydata", masked).compute(scheduler="sync")
    there = deserialize(*serialize(chunk))
    np.testing.assert_array_equal(np.ma.getmaskarray(there), [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(np.ma.getdata(there), np.arange(6))


def test_a_map_with_missing_chunks_is_fitted_by_workers(tmp_path, workers):
    x = np.linspace(0, 5, 64)
    y = np.random.default_rng(0).poisson(200 * np.exp(-0.7 * x) + 30, (12, 5, 64)).astype("u2")
    zarr.create_array(tmp_path / "y.zarr", shape=y.shape, chunks=(1, 1, 64), dtype=y.dtype)[:] = y
    (tmp_path / "y.zarr" / "c" / "3" / "2" / "0").unlink()
    options = dict(p0=[200, 1, 30], missing_chunks="mask")
    here = fit_map(decay, x, tmp_path / "y.zarr", **options).compute().record
    with workers.as_current():
        there = fit_map(decay, x, tmp_path / "y.zarr", **options).compute().record
    for name in here.dtype.names:
        np.testing.assert_array_equal(here[name], there[name])
    assert np.isnan(here["popt"][3, 2]).all() and np.isfinite(np.delete(here["popt"], 3, axis=0)).all()
