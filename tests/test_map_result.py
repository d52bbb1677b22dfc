"""What `fit_map` returns: lazy until asked, one task per block, to Zarr and on from there, xarray, mended, drawn."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import dask
import dask.array as da
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import xarray as xr
import zarr
from dask._task_spec import Task
from distributed import Client

from dask_nlsq import MapStatus, fit_map, load
from tests import clusters
from tests.spectra import (
    BLOCK,
    FIELDS,
    NAMES,
    P0,
    N,
    X,
    blocks_of,
    counted,
    fitted,
    limit_of_two_bands,
    peak,
    same_bits,
    spectra,
)

ROOT = Path(__file__).parent.parent
Y, TRUTH = spectra((10, 6), seed=5)
COORDS = dict(
    row=("row", 0.5 * np.arange(10), {"units": "mm"}),
    time=("row", np.datetime64("2026-01-01", "ns") + np.arange(10)),
    label=("column", list("abcdef")),
    energy=("energy", X, {"units": "keV"}),
    detuning=("energy", X + 1.0),
    sample=7,
)


def labelled(y):
    return xr.DataArray(y, dims=("row", "column", "energy"), coords=COORDS, name="counts", attrs={"beamline": "P10"})


@pytest.fixture(scope="module")
def whole():
    return fitted(blocks_of(Y))


def refuse_to_fit(*args, **kwargs):
    raise AssertionError("a block was fitted")


# ---------------------------------------------------------------------------------------------------------------------
# lazy, one task per block


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(p0=da.from_array(TRUTH)),
        dict(p0=dict(area=da.from_array(TRUTH[..., 0]), center=0, width=1, offset=TRUTH[..., 3])),
        dict(sigma=da.ones(Y.shape), mask=da.zeros(Y.shape, bool), bounds=dict(width=(da.zeros((10, 6)), np.inf))),
        dict(p0=lambda x, y: (y.max() - y.min(), x[y.argmax()], 1.0, y.min()), guess="coarse-to-fine"),
        dict(fixed=dict(width=da.ones((10, 6))), guess="coarse-to-fine"),
    ],
    ids=["p0", "p0 map", "p0 by name", "operands", "guesses", "fixed"],
)
def test_nothing_is_computed_before_it_is_asked_for(nothing_runs, options):
    found = fit_map(peak, X, labelled(blocks_of(Y)), **dict(p0=P0, axis="energy") | options)
    assert found.lazy
    assert isinstance(found.popt, da.Array)
    assert found.popt.shape == (10, 6, 4)
    assert found.popt.chunks[:2] == ((5, 5), (6,))
    assert "lazy" in repr(found)
    assert found.success.dtype == bool
    assert isinstance(found.to_xarray()["popt"].data, da.Array)
    with pytest.raises(AttributeError, match="full_covariance"):
        found.pcov  # noqa: B018


@pytest.mark.slow
def test_a_block_is_read_and_fitted_in_one_task(tmp_path):
    y, reads = counted(tmp_path / "y", Y, (*BLOCK, N))
    found = fit_map(peak, X, y, P0)
    (optimized,) = dask.optimize(found.record)
    calls = [task for task in dict(optimized.__dask_graph__()).values() if isinstance(task, Task)]
    assert len(calls) == found.plan.n_blocks == 2
    both = dask.compute(found.popt, found.perr)
    assert set(reads.values()) == {1}
    same = fitted(blocks_of(Y))
    for values, expected in zip(both, (same.popt, same.perr), strict=True):
        np.testing.assert_array_equal(values, expected)


def test_a_part_of_the_map_is_fitted_alone(whole, tmp_path):
    y, reads = counted(tmp_path / "y", Y, (*BLOCK, N))
    found = fit_map(peak, X, y, P0).popt[7, 2].compute()
    np.testing.assert_array_equal(found, whole.popt[7, 2])
    assert len(reads) == 1


# ---------------------------------------------------------------------------------------------------------------------
# starts and bounds of every kind


def test_starts_of_every_kind_arrive_at_the_same_maps(whole):
    starts = dict(zip(NAMES, P0, strict=True))
    same_bits(fit_map(peak, X, blocks_of(Y), starts).compute(), whole)
    full = np.broadcast_to(P0, TRUTH.shape)
    by_pixel = fit_map(peak, X, blocks_of(Y), full).compute()
    same_bits(by_pixel, whole)
    same_bits(fit_map(peak, X, blocks_of(Y), da.from_array(full, chunks=3)).compute(), whole)
    mixed = starts | dict(center=np.full((10, 6), 0.3))
    same_bits(fit_map(peak, X, blocks_of(Y), mixed).compute(), whole)


@pytest.mark.slow
def test_a_function_guesses_starts(whole):
    def guess(x, y):
        return jnp.max(y) - jnp.min(y), x[jnp.argmax(y)], 1.0, jnp.min(y)

    found = fit_map(peak, X, blocks_of(Y), guess).compute()
    assert found.success.all()
    assert found.nfev.mean() < whole.nfev.mean()
    np.testing.assert_allclose(found.popt, whole.popt, rtol=1e-3, atol=1e-3)


def test_bounds_by_name_are_bounds_by_place():
    low, high = [0, -3, 0.2, -1], [20, 3, 3, 5]
    by_place = fitted(blocks_of(Y), bounds=(low, high))
    pairs = dict(zip(NAMES, zip(low, high, strict=True), strict=True))
    same_bits(fitted(blocks_of(Y), bounds=pairs), by_place)


def far_map():
    """Peaks whose centres drift so far over the map that one start does not serve all of it."""
    rng = np.random.default_rng(9)
    center = np.linspace(-4, 4, 16)[:, None] + np.zeros((16, 16))
    y = 5 * np.exp(-0.5 * ((X - center[..., None]) / 0.6) ** 2) + 1 + rng.normal(0, 0.2, (16, 16, N))
    return y, center


FAR_P0 = [5.0, -3.5, 0.6, 1.0]


@pytest.mark.slow
def test_coarse_to_fine_finds_what_one_start_does_not():
    y, center = far_map()
    blocks = da.from_array(y, chunks=(8, 16, N))
    plain = fit_map(peak, X, blocks, np.broadcast_to(FAR_P0, (16, 16, 4))).compute()
    found = fit_map(peak, X, blocks, FAR_P0, guess="coarse-to-fine")
    one = found.compute(scheduler="synchronous")
    near = [(np.abs(each.popt[..., 1] - center) < 0.3) & each.success for each in (plain, one)]
    assert near[0].mean() < 0.7
    assert near[1].mean() > 0.95
    same_bits(found.compute(num_workers=2), one)


@pytest.mark.slow
def test_coarse_to_fine_has_the_same_bits_on_workers():
    found = fit_map(peak, X, da.from_array(far_map()[0], chunks=(8, 16, N)), FAR_P0, guess="coarse-to-fine")
    here = found.compute(scheduler="synchronous")
    for n_workers in (1, 2):
        with clusters.local(n_workers) as cluster, Client(cluster):
            same_bits(found.compute(), here)


# ---------------------------------------------------------------------------------------------------------------------
# xarray


def test_names_coordinates_and_attributes_are_kept(whole):
    found = fit_map(peak, None, labelled(blocks_of(Y)), P0, axis="energy")
    same_bits(found.compute(), whole)
    for data in (found.to_xarray(), found.compute().to_xarray()):
        assert data["popt"].dims == ("row", "column", "param")
        assert list(data["param"].values) == list(NAMES)
        assert set(data.coords) == {"param", "row", "time", "label", "sample"}
        assert data["row"].attrs == {"units": "mm"}
        assert data.attrs["beamline"] == "P10"
        assert data["popt"].sel(param="center", row=1.5)[2] == whole.popt[3, 2, 1]


def test_coordinates_are_taken_by_name():
    data = labelled(blocks_of(Y))
    found = fit_map(peak, "detuning", data, P0, axis="energy").compute()
    same_bits(found, fit_map(peak, X + 1.0, blocks_of(Y), P0).compute())
    turned = fit_map(peak, "detuning", data.transpose("energy", "column", "row"), P0, axis="energy").compute()
    np.testing.assert_allclose(turned.popt.swapaxes(0, 1), found.popt, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sigma_and_mask_of_xarray_are_aligned_by_name():
    sigma = 0.1 + 0.1 * np.random.default_rng(2).random(Y.shape)
    mask = sigma > 0.19
    data = labelled(blocks_of(Y))
    turned = dict(
        sigma=xr.DataArray(sigma, dims=data.dims).transpose("energy", "row", "column"),
        mask=xr.DataArray(mask, dims=data.dims).transpose("column", "energy", "row"),
    )
    found = fit_map(peak, None, data, P0, axis="energy", **turned).compute()
    same_bits(found, fitted(blocks_of(Y), sigma=sigma, mask=mask))


def test_starts_of_xarray_are_aligned_by_name():
    y, truth = spectra(BLOCK, seed=3)
    data = xr.DataArray(y, dims=("row", "column", "energy"))
    starts = dict(zip(NAMES, P0, strict=True)) | dict(center=truth[..., 1])
    turned = starts | dict(center=xr.DataArray(truth[..., 1].T, dims=("column", "row")))
    found = [fit_map(peak, X, data, p0, axis="energy").compute() for p0 in (starts, turned)]
    same_bits(*found)
    every = xr.DataArray(truth, dims=("row", "column", "param"))
    by_name = [
        fit_map(peak, X, data, p0, axis="energy").compute() for p0 in (truth, every.transpose("param", "column", "row"))
    ]
    same_bits(*by_name)


def test_a_map_in_a_store_opens_with_xarray(whole, tmp_path):
    fit_map(peak, None, labelled(blocks_of(Y)), P0, axis="energy").to_zarr(tmp_path / "m")
    with xr.open_zarr(tmp_path / "m") as data:
        for name in FIELDS:
            np.testing.assert_array_equal(data[name].values, getattr(whole, name))
            assert data[name].dtype == getattr(whole, name).dtype
        assert data["popt"].dims == ("row", "column", "param")
        assert list(data["param"].values) == list(NAMES)
        assert list(data["label"].values) == list("abcdef")
        assert data["row"].attrs["units"] == "mm"
        np.testing.assert_array_equal(data["time"].values, COORDS["time"][1])
        assert data["sample"] == 7
        assert data.attrs["beamline"] == "P10"
        assert data.attrs["dask_nlsq"]["parameters"] == list(NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# to Zarr, and on from there


def stored(path):
    group = zarr.open_group(path, mode="r")
    return type("Stored", (), {name: group[name][...] for name in FIELDS})


def test_a_path_that_exists_is_refused_before_anything_is_fitted(nothing_runs, tmp_path):
    found = fit_map(peak, X, blocks_of(Y), P0)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("m", "file"):
        for resume in (False, True):
            with pytest.raises(ValueError, match="is not a map that to_zarr has begun: give another path"):
                found.to_zarr(tmp_path / name, resume=resume)
    assert (tmp_path / "file").read_text() == (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_fitted(nothing_runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        fit_map(peak, X, blocks_of(Y), P0).to_zarr(tmp_path / "file" / "m")


def test_a_finished_map_is_not_fitted_again(whole, tmp_path):
    y, reads = counted(tmp_path / "y", Y, (*BLOCK, N))
    found = fit_map(peak, X, y, P0)
    found.to_zarr(tmp_path / "m", resume=True)
    same_bits(stored(tmp_path / "m"), whole)
    reads.clear()
    fit_map(peak, X, y, P0).to_zarr(tmp_path / "m", resume=True)
    assert not reads
    with pytest.raises(FileExistsError, match=r"m exists: .*resume=True"):
        found.to_zarr(tmp_path / "m")
    same_bits(load(tmp_path / "m"), whole)
    with pytest.raises(ValueError, match="computed already"):
        found.compute().to_zarr(tmp_path / "n")


def test_another_fit_does_not_go_on(tmp_path):
    zarr.create_array(tmp_path / "y", shape=Y.shape, chunks=(*BLOCK, N), dtype="f8")[...] = Y
    fit_map(peak, X, tmp_path / "y", P0).to_zarr(tmp_path / "m")

    def other(x, area, center, width, offset):
        return area / (1 + ((x - center) / width) ** 2) + offset

    changes = {
        "p0": dict(p0=[4.0, 0.3, 1.0, 0.6]),
        "f": dict(f=other),
        "loss: linear then, huber now": dict(loss="huber"),
        "ftol: 1e-08 then, 1e-06 now": dict(ftol=1e-6),
        "bounds": dict(bounds={"offset": (0, None)}),
        "sigma": dict(sigma=2.0),
        "mask": dict(mask=np.arange(N) == 3),
        "guess": dict(guess="coarse-to-fine"),
        "fixed": dict(fixed=dict(offset=1.0)),
        "xdata": dict(xdata=X + 1e-9),
        "param_names": dict(param_names=["a", "b", "c", "d"]),
        "`ydata` in its store, ydata, missing_chunks: .*, on_bad_chunk: raise then, None now": dict(ydata=Y),
        r"mask_values: \[\] then, \[.*\] now": dict(mask_values=[float(Y[0, 0, 0])]),
        "valid_range: .*": dict(valid_range=(None, 3.0)),
        "nan_policy: omit then, raise now": dict(nan_policy="raise"),
        "(mask, )?on_bad_chunk: raise then, mask now": dict(on_bad_chunk="mask"),
        "(mask, )?missing_chunks: error then, fill now": dict(missing_chunks="fill"),
        "full_covariance: False then, True now": dict(full_covariance=True),
    }
    for what, change in changes.items():
        changed = fit_map(**dict(f=peak, xdata=X, ydata=tmp_path / "y", p0=P0) | change)
        with pytest.raises(ValueError, match=f"map of another fit. Changed: {what}. Give"):
            changed.to_zarr(tmp_path / "m", resume=True)
    fit_map(peak, X, Y[:5], P0).to_zarr(tmp_path / "n")
    with pytest.raises(ValueError, match=r"Changed: ydata\. Give"):
        fit_map(peak, X, Y[:5] + 1e-9, P0).to_zarr(tmp_path / "n", resume=True)


def test_what_counts_of_scaled_values_is_part_of_a_map(tmp_path):
    y = zarr.create_array(tmp_path / "y", shape=Y.shape, chunks=(*BLOCK, N), dtype="i2", attributes={"scale_factor": 0.001})
    y[...] = np.round(Y * 1000)
    fit_map(peak, X, tmp_path / "y", P0, mask_values=[7, np.nan]).to_zarr(tmp_path / "m")
    fit_map(peak, X, tmp_path / "y", P0, mask_values={7}).to_zarr(tmp_path / "m", resume=True)  # no integer is nan
    for what, change in dict(mask_values=dict(mask_values=[8]), valid_range=dict(valid_range=(0.1, None))).items():
        with pytest.raises(ValueError, match=f"map of another fit. Changed: .*{what}: "):
            fit_map(peak, X, tmp_path / "y", P0, **change).to_zarr(tmp_path / "m", resume=True)


@pytest.mark.slow
def test_the_same_map_with_nan_among_its_mask_values_goes_on(tmp_path):
    for _ in range(2):
        fit_map(peak, X, blocks_of(Y), P0, mask_values=[np.nan]).to_zarr(tmp_path / "m", resume=True)


def test_a_map_goes_on_where_there_is_another_amount_of_memory(tmp_path, monkeypatch):
    stack, _ = spectra((20, 6), seed=8)
    zarr.create_array(tmp_path / "y", shape=(N, 20, 6), chunks=(1, 20, 6), dtype="f8")[...] = np.moveaxis(stack, -1, 0)
    limit = limit_of_two_bands(monkeypatch, tmp_path / "y")
    little = fit_map(peak, X, tmp_path / "y", P0, axis=0, memory_limit_gb=limit)
    much = fit_map(peak, X, tmp_path / "y", P0, axis=0)
    assert little.plan.n_blocks > much.plan.n_blocks
    for begun, other in ((little, much), (much, little)):
        path = tmp_path / f"m{begun.plan.n_blocks}"
        begun.to_zarr(path)
        expected = stored(path)
        done = zarr.open_array(path / "done", mode="r+")
        done[1:] = 0
        done[0] = 0
        zarr.open_array(path / "chi2", mode="r+")[...] = 0
        other.to_zarr(path, resume=True)
        same_bits(stored(path), expected)
        assert zarr.open_array(path / "done", mode="r")[...].all()


def run_mapped(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "tests.mapped", *map(str, arguments)], cwd=ROOT, env=environment)


def n_done(path):
    return len([file for file in (path / "done" / "c").rglob("*") if file.is_file()]) if path.exists() else 0


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_map_goes_on_with_the_same_bits_and_fits_no_block_twice(tmp_path, kills):
    rows = 40 if kills == 1 else 100
    y, _ = spectra((rows, 18), seed=11)
    zarr.create_array(tmp_path / "y", shape=y.shape, chunks=(*BLOCK, N), dtype="f8")[...] = y
    n_blocks, rng, log = rows // 5 * 3, np.random.default_rng(), tmp_path / "log"
    for k in range(kills):
        process = run_mapped(tmp_path / "y", tmp_path / "m", log, *["resume"] * (k > 0))
        goal = 2 + int(rng.integers(8)) if kills == 1 else min(n_done(tmp_path / "m") + 1 + int(rng.integers(2)), n_blocks)
        while process.poll() is None and n_done(tmp_path / "m") < goal:
            time.sleep(0.005)
        time.sleep(0.1 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = zarr.open_array(tmp_path / "m" / "done", mode="r")[...].ravel()
    finished = {f"c/{k // 3}/{k % 3}/0" for k in np.flatnonzero(done)}
    assert 0 < len(finished) < n_blocks
    n_before = len(log.read_text().split())
    assert run_mapped(tmp_path / "y", tmp_path / "m", log, "resume").wait() == 0
    again = log.read_text().split()[n_before:]
    assert not set(again) & finished
    assert len(again) == len(set(again)) == n_blocks - len(finished)
    assert len(log.read_text().split()) <= n_blocks + 2 * kills  # only those in flight, on two threads, are read again
    same_bits(stored(tmp_path / "m"), fitted(blocks_of(y)))


@pytest.mark.slow
def test_a_worker_that_dies_loses_nothing(whole, tmp_path):
    y, _ = spectra((40, 18), seed=11)
    with clusters.local(2) as cluster, Client(cluster) as client:
        found = fit_map(peak, X, blocks_of(y), P0)
        pids = list(client.run(os.getpid).values())
        killer = threading.Thread(
            target=lambda: (wait_until(lambda: n_done(tmp_path / "m")), os.kill(pids[0], signal.SIGKILL))
        )
        killer.start()
        found.to_zarr(tmp_path / "m")
        killer.join()
    same_bits(stored(tmp_path / "m"), fitted(blocks_of(y)))


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


# ---------------------------------------------------------------------------------------------------------------------
# mended and drawn


def test_failed_pixels_are_mended_and_others_left(tmp_path):
    starts = np.broadcast_to(P0, TRUTH.shape).copy()
    lost = np.zeros((10, 6), bool)
    lost[1, 1] = lost[3, 4] = lost[0, 5] = True
    starts[lost] = np.nan
    y, reads = counted(tmp_path / "y", Y, (*BLOCK, N))
    found = fit_map(peak, X, y, starts).compute()
    assert (found.status[lost] == MapStatus.NON_FINITE).all()
    reads.clear()
    mended = found.refit_failed()
    assert mended.success.all()
    assert sum(reads.values()) == 1  # the other block has no failed pixel
    same_bits(mended, found, where=(~lost,))
    np.testing.assert_allclose(mended.popt[lost], fitted(blocks_of(Y)).popt[lost], rtol=1e-3, atol=1e-3)
    given = found.refit_failed(TRUTH)
    same_bits(given, found, where=(~lost,))
    assert given.success.all()
    with pytest.raises(ValueError, match=r"`p0`.*\(10, 6, 4\).*\(3,\)"):
        found.refit_failed([1, 2, 3])


def test_what_has_no_data_is_not_fitted_again():
    y = Y.copy()
    y[2, 2] = np.nan
    y[4, 4, 2:] = np.nan
    found = fitted(blocks_of(y))
    same_bits(found.refit_failed(), found)


def test_maps_are_drawn_white_where_there_is_no_success(whole):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    y = Y.copy()
    y[2, 2] = np.nan
    found = fitted(blocks_of(y))
    axes = found.plot()
    assert [ax.get_title() for ax in axes] == list(NAMES)
    for ax, values in zip(axes, np.moveaxis(found.popt, -1, 0), strict=True):
        (image,) = ax.images
        np.testing.assert_array_equal(np.isnan(image.get_array().filled(np.nan)), ~found.success)
        low, high = image.get_clim()
        assert np.nanmin(values) <= low < high <= np.nanmax(values)
    assert axes[0].get_ylabel() == "axis_0"
    line = fitted(Y[:5].reshape(30, N)).plot()
    assert len(line) == 4
    with pytest.raises(ValueError, match="one or two axes"):
        fitted(Y[None]).plot()
    nothing = fitted(blocks_of(np.full_like(Y, np.nan))).plot()
    assert len(nothing) == 4
    plt.close("all")


def test_a_summary_counts_statuses_and_shows_medians(whole):
    text = repr(whole)
    assert "10 x 6" in text
    assert "area: median" in text
    assert Counter(whole.status.ravel()).most_common(1)[0][0] in {s.value for s in MapStatus}


def test_coarse_fits_from_another_start_are_another_map(tmp_path):
    def lazy(p0):
        return fit_map(peak, X, blocks_of(Y), p0, guess="coarse-to-fine")

    lazy(P0).to_zarr(tmp_path / "maps.zarr")
    with pytest.raises(ValueError, match=r"another fit\. Changed: p0\. Give"):
        lazy([2 * P0[0], *P0[1:]]).to_zarr(tmp_path / "maps.zarr", resume=True)


def test_a_multiindex_is_refused_before_anything_is_fitted_or_written(tmp_path):
    stacked = labelled(Y).drop_vars(["time", "label"]).stack(pixel=("row", "column")).transpose("pixel", "energy")
    found = fit_map(peak, "energy", stacked, P0, axis="energy")
    with pytest.raises(ValueError, match=r"'pixel' of `ydata` is a MultiIndex.*ydata.reset_index\('pixel'\)"):
        found.to_zarr(tmp_path / "maps")
    assert not (tmp_path / "maps").exists()
    again = fit_map(peak, "energy", stacked.reset_index("pixel"), P0, axis="energy")
    again.to_zarr(tmp_path / "maps")
    opened = xr.open_zarr(tmp_path / "maps", consolidated=False)
    np.testing.assert_array_equal(opened.row, np.repeat(COORDS["row"][1], 6))


def test_the_bar_of_a_map_counts_blocks_and_pixels_also_where_it_goes_on(tmp_path, capsys):
    fits = fit_map(peak, X, da.from_array(Y, (*BLOCK, N)), P0)
    n = len(fits.problem.places)
    fits.compute(progress=True)
    assert re.search(rf"fit_map: 100%.* {n}/{n} .*, [\d,]+ pixels/s, \d+ failed", capsys.readouterr().err.split("\r")[-1])
    fits.to_zarr(tmp_path / "m", progress=True)
    zarr.open_array(tmp_path / "m" / "done")[0, 0] = 0
    capsys.readouterr()
    fits.to_zarr(tmp_path / "m", resume=True, progress=True)
    shown = capsys.readouterr().err
    assert f" {n - 1}/{n} " in shown and f" {n}/{n} " in shown.split("\r")[-1]
