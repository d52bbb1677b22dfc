"""Maps to look at: by name, in their coordinates, pixel by pixel, as HTML, pictures and pages, and opened again."""

import inspect
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import dask.array as da
import h5py
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore

from dask_nlsq import MapResult, MapStatus, UntrustedError, fit_groups, fit_map, load
from dask_nlsq.maps import viewer, views
from dask_nlsq.maps.pictures import ends_with_errors, limits
from dask_nlsq.maps.points import some_points
from tests.spectra import BLOCK, NAMES, P0, N, X, blocks_of, counted, fitted, peak, same_bits, spectra
from tests.test_dashboard import CHROMIUM, opened, wait
from tests.test_groups import LOCAL, G, T, decay
from tests.test_groups import P0 as GROUPS_P0
from tests.test_groups import Y as VALUES_OF_GROUPS

matplotlib.use("agg")
import matplotlib.pyplot as plt

Y, TRUTH = spectra((10, 6), seed=5)
ROW, COLUMN = 0.5 * np.arange(10) + 3.0, 2.0 * np.arange(6)
UNITS = dict(row={"units": "um"}, column={"units": "um"}, energy={"units": "keV", "long_name": "photon energy"})
VALUES = dict(row=ROW, column=COLUMN, energy=X)


def labelled(y=Y):
    coords = {dim: (dim, values, UNITS[dim]) for dim, values in VALUES.items()}
    return xr.DataArray(blocks_of(y), dims=("row", "column", "energy"), coords=coords, name="counts", attrs={"units": "1/s"})


def values_at(x, area, center, width, offset):
    return area * np.exp(-0.5 * ((x - center) / width) ** 2) + offset


@pytest.fixture(scope="module")
def named():
    return fit_map(peak, "energy", labelled(), P0, axis="energy").compute()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------------------
# coordinates, names and units


def zarr_with_names(folder):
    group = zarr.create_group(folder / "scan.zarr")
    y = group.create_array("counts", shape=Y.shape, chunks=(*BLOCK, N), dtype="f8", dimension_names=[*VALUES])
    y[...] = Y
    for dim, values in VALUES.items():
        group.create_array(dim, shape=values.shape, dtype="f8", attributes=UNITS[dim])[...] = values
    return str(folder / "scan.zarr" / "counts")


def nexus(folder):
    file = h5py.File(folder / "scan.nxs", "w")
    group = file.create_group("entry/data")
    group.attrs["axes"] = [*VALUES]
    group["counts"] = Y
    for dim, values in VALUES.items():
        group[dim] = values
        group[dim].attrs.update(UNITS[dim])
    return group["counts"]


@pytest.mark.parametrize("source", [lambda _: labelled(), zarr_with_names, nexus], ids=["xarray", "zarr", "nexus"])
def test_maps_are_drawn_in_the_coordinates_and_units_of_the_data(source, tmp_path):
    found = fit_map(peak, X, source(tmp_path), P0, axis=2).compute()
    ax = found.plot(names=["center"])[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("column (µm)", "row (µm)")
    assert ax.images[0].get_extent() == [-1.0, 11.0, 2.75, 7.75]
    assert ax.get_ylim() == (2.75, 7.75) and ax.get_aspect() == 1.0
    top, below = found.spectrum(2, 3).plot()
    assert below.get_xlabel() == "photon energy (keV)" and top.get_ylabel().startswith("counts")
    assert found["center"].value.dims == ("row", "column")
    np.testing.assert_array_equal(found.to_xarray().row, ROW)


RESERVED = ("distance", "status", "energy")  # the first two are arrays of a map too


def zarr_called_like_a_map(folder):
    y = zarr.create_group(folder / "scan").create_array("y", data=Y, chunks=(*BLOCK, N), dimension_names=RESERVED)
    zarr.open_group(folder / "scan")["distance"] = ROW
    return y


@pytest.mark.parametrize("source", ["xarray", "zarr"])
def test_axes_and_coordinates_called_like_arrays_of_the_result_get_another_name(source, tmp_path):
    coords = {"distance": ROW, "chi2": ("distance", 2 * ROW)}
    data = (
        xr.DataArray(blocks_of(Y), dims=RESERVED, coords=coords) if source == "xarray" else zarr_called_like_a_map(tmp_path)
    )
    found = fit_map(peak, X, data, P0, axis=2)
    found.to_zarr(tmp_path / "fits")
    found, again = found.compute(), xr.open_zarr(tmp_path / "fits")
    for each in (found.to_xarray(), again):
        assert each.popt.dims == ("distance_of_data", "status_of_data", "param")
        np.testing.assert_array_equal(each.distance_of_data, ROW)
        for name in ("distance", "status", "chi2"):
            np.testing.assert_array_equal(each[name], getattr(found, name))
    same_bits(load(tmp_path / "fits"), found)
    assert found.residuals().dims == RESERVED
    np.testing.assert_array_equal(found.residuals().distance, ROW)
    if source == "xarray":
        np.testing.assert_array_equal(again.chi2_of_data, 2 * ROW)


def test_attributes_that_only_hdf5_can_hold_are_left_out_of_a_map(tmp_path):
    data = nexus(tmp_path)
    data.parent["row"].make_scale("row")
    data.dims[0].attach_scale(data.parent["row"])
    data.parent["row"].attrs["where"] = np.bytes_("30 µm".encode("latin-1"))
    fit_map(peak, X, data, P0, axis=2).to_zarr(tmp_path / "fits")
    attrs = xr.open_zarr(tmp_path / "fits").row.attrs
    assert attrs["units"] == "um" and attrs["where"] == "30 \ufffdm" and "REFERENCE_LIST" not in attrs


def test_axes_that_cannot_be_read_are_left_out_and_the_log_says_so(tmp_path, caplog):
    path = Path(zarr_with_names(tmp_path))
    (path.parent / "row" / "c" / "0").write_bytes(b"damaged")
    found = fit_map(peak, X, str(path), P0, axis=2)
    assert set(found.labels["coords"]) == {"column"} and found.map_dims == ("row", "column")
    assert "the coordinate 'row' beside" in caplog.text
    (path.parent / "zarr.json").write_text("{")
    assert fit_map(peak, X, str(path), P0, axis=2).labels["coords"] == {}
    assert "names and coordinates of the axes beside" in caplog.text


def test_maps_without_names_have_numbers_of_pixels_and_the_first_row_at_the_top():
    ax = fitted(blocks_of(Y)).plot(names=["area"])[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_ylim()) == ("axis_1", "axis_0", (9.5, -0.5))


def test_uneven_and_descending_coordinates_and_dates_are_drawn():
    data = labelled().assign_coords(row=ROW[::-1], column=np.array([0, 1, 2, 4, 8, 16.0]))
    ax = fit_map(peak, "energy", data, P0, axis="energy").compute().plot(names=["area"])[0]
    assert ax.collections and ax.get_ylim() == (2.75, 7.75)
    dates = np.datetime64("2026-01-01", "ns") + np.timedelta64(60, "s") * np.arange(10)
    found = fit_map(peak, "energy", data.assign_coords(row=dates), P0, axis="energy").compute()
    assert found.plot(names=["area"])[0].get_ylabel() == "row (s since\n2026-01-01T00:00:00)"


def test_a_map_of_one_axis_is_a_curve_with_errors_over_its_coordinate(named):
    found = fit_map(peak, "energy", labelled()[:, 0], P0, axis="energy").compute()
    ax, status = found.plot(names=["center", "status"])
    assert ax.get_xlabel() == "row (µm)"
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), ROW)
    assert len(ax.collections) == 1
    assert [tick.get_text() for tick in status.get_yticklabels()] == ["ftol"]


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def test_runaways_do_not_black_out_a_map():
    rng = np.random.default_rng(0)
    values, errors = rng.normal(2.0, 0.1, (50, 50)), np.full((50, 50), 0.02)
    dark = rng.random((50, 50)) < 0.7
    values[dark], errors[dark] = rng.normal(0, 1e6, dark.sum()), 1e9
    low, high, _ = limits("tau", values, errors)
    assert 1.7 < low < high < 2.3


def test_a_bright_spot_that_is_certain_does_not_fall_off_the_colours():
    counts = np.random.default_rng(0).poisson(1.0, (50, 50)).astype(float)
    counts[:8, :8] = 1000.0
    assert limits("height", counts, np.sqrt(np.maximum(counts, 1)))[1] == 1000.0


def test_errors_status_and_derived_quantities_are_drawn_by_name():
    found = fitted(blocks_of(Y), expr={"double": "2 * area"})
    names = ["area.error", "double", "double.error", "status", "chi2", "distance", "n_points", "nfev"]
    axes = dict(zip(names, found.plot(names=names), strict=True))
    np.testing.assert_array_equal(axes["area.error"].images[0].get_array().filled(np.nan), found.perr[..., 0])
    np.testing.assert_array_equal(axes["double"].images[0].get_array().filled(np.nan), found.derived[..., 0])
    texts = [text.get_text() for text in axes["status"].get_legend().get_texts()]
    counts = [
        f"{n} {MapStatus(code).name.lower().replace('_', ' ')}"
        for code, n in zip(*np.unique(found.status, return_counts=True), strict=True)
    ]
    assert texts == counts
    with pytest.raises(ValueError, match=r"no map of 'areas'; did you mean 'area'\?; there are"):
        found.plot(names=["areas"])


def test_colours_and_their_ends_go_through_of_all_or_by_name(named):
    axes = named.plot(names=["area", "center"], vmin={"area": 1.0}, vmax=4.0, cmap={"center": "magma"})
    area, center = (ax.images[0] for ax in axes)
    assert area.get_clim() == (1.0, 4.0) and center.get_clim()[1] == 4.0
    assert (area.get_cmap().name, center.get_cmap().name) == ("viridis", "magma")
    with pytest.raises(ValueError, match="`vmin` names height; drawn are area"):
        named.plot(names=["area"], vmin={"height": 0})


def test_maps_without_pixels_and_pictures_without_names_are_errors(named):
    with pytest.raises(ValueError, match="`names` is empty"):
        named.plot(names=[])
    with pytest.raises(ValueError, match="`ydata` must not be empty"):
        fit_map(peak, X, Y[:, :0], P0)


def test_long_names_fit_their_panels():
    names = ["the_area_of_the_first_component_of_the_line", "center", "width", "offset"]
    figure = fitted(blocks_of(Y), param_names=names).plot()[0].figure
    figure.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in figure.axes[:4]]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert boxes[0].x0 > 0 and boxes[0].y1 <= figure.bbox.y1


# ---------------------------------------------------------------------------------------------------------------------
# in a notebook


def test_a_notebook_shows_statuses_medians_and_small_maps(named):
    text = named._repr_html_()
    assert "<b>MapResult 10 x 6 pixels" in text and "<td>converged (" in text and "<td>center</td>" in text
    assert text.count("data:image/png;base64,") == 1
    name = "<script>alert(1)</script>"
    assert "<script" not in fitted(Y[:5], param_names=[name, *NAMES[1:]])._repr_html_()


def test_a_notebook_shows_the_plan_of_a_lazy_map(nothing_runs):
    lazy = fit_map(peak, "energy", labelled(), P0, axis="energy")
    assert str(lazy.plan) in lazy._repr_html_() and "lazy: compute()" in lazy._repr_html_()


def test_names_are_completed_and_have_docstrings(named):
    for name in ("popt", "perr", "chi2", "status", "distance", "at_bound", "nfev", "spectrum", "view"):
        assert name in dir(named)
        assert inspect.getdoc(getattr(MapResult, name))


def test_a_part_is_chosen_by_labels(named):
    found = named.sel(param="center").sel(row=4.1, method="nearest")
    np.testing.assert_array_equal(found.popt, named.popt[2, :, 1])


# ---------------------------------------------------------------------------------------------------------------------
# at the points of the data


def test_a_spectrum_is_read_from_the_chunk_of_its_pixel_alone(tmp_path):
    y, reads = counted(tmp_path / "y", Y, (*BLOCK, N))
    found = fit_map(peak, X, y, P0).compute()
    reads.clear()
    seen = found.spectrum(7, -2)
    assert dict(reads) == {"c/1/0/0": 1}
    np.testing.assert_array_equal(seen.y, Y[7, 4])
    np.testing.assert_allclose(seen.model, values_at(X, *found.popt[7, 4]), rtol=1e-12)
    np.testing.assert_allclose(seen.residual, seen.model - seen.y, rtol=1e-9, atol=1e-12)
    assert seen.params["width"].value == found.popt[7, 4, 2] and seen.status == found.status[7, 4]
    assert seen.place == (7, 4) and "pixel (7, 4)" in repr(seen)


def test_a_pixel_is_named_by_its_coordinates(named):
    seen = named.spectrum(row=4.6, column=5.2)
    assert seen.place == (3, 3) and seen.at == {"row": 4.5, "column": 6.0}
    assert seen.title.startswith("pixel (3, 3) at row 4.5 µm, column 6 µm: ")
    for wrong, error, message in (
        (dict(row=40.0, column=5), ValueError, "`row` is 40.0, outside of the map, which extends from 3 to 7.5"),
        (dict(row="a", column=5), TypeError, "`row` is 'a': give a number, the coordinate of a pixel"),
        (dict(row=4.0), ValueError, "coordinates along row, column: give column, too"),
        (dict(), TypeError, "by 2 numbers, or by its coordinates along row, column"),
    ):
        with pytest.raises(error, match=message):
            named.spectrum(**wrong)
    with pytest.raises(IndexError, match=r"no pixel \(3, 6\) in a map of 10 x 6: the length of axis 'column' is 6"):
        named.spectrum(3, 6)
    with pytest.raises(IndexError, match="the length of axis 'row' is 10"):
        named.spectrum(-11, 0)
    with pytest.raises(TypeError, match=r"by integers, or coordinates by name, as spectrum\(row=..., column=...\), not by"):
        named.spectrum(1.7, 3.4)
    assert named.spectrum(np.int64(-1), -6).place == (9, 0)
    with pytest.raises(ValueError, match="axis 'axis_0' of the map does not have numeric coordinates"):
        fitted(Y[:5]).spectrum(axis_0=1, axis_1=2)


def test_a_pixel_is_named_by_a_date():
    days = np.array(["2026-01-01", "2026-01-02", "2026-01-04"], "M8[ns]")
    y = xr.DataArray(Y[:3, 0], dims=("time", "e"), coords={"time": days, "e": X})
    found = fit_map(peak, "e", y, P0).compute()
    for date, place in (("2026-01-02", 1), (days[2], 2), (datetime(2026, 1, 3, 18), 2), (y.time[1], 1), (86400.0, 1)):
        assert found.spectrum(time=date).place == (place,)
    for wrong, error, message in (
        ("soon", TypeError, "`time` is 'soon': give a date, such as '2026-01-01T00:00:00'"),
        ("2027-01-01", ValueError, "is 2027-01-01, outside of the map, which .* to 259200 s since 2026-01-01T00:00:00"),
    ):
        with pytest.raises(error, match=message):
            found.spectrum(time=wrong)


def test_a_model_of_one_length_is_told_to_take_its_array_as_a_coordinate():
    weight = np.linspace(1, 2, N)
    with pytest.raises(ValueError, match=r"cannot be evaluated on \d+ of the points .*[^.]\. It must be .*xdata=\(x, w\)"):
        fit_map(lambda x, a: a * x * weight, X, Y, p0=[1])


def test_labels_below_a_narrow_map_do_not_overlap():
    y = xr.DataArray(
        blocks_of(Y),
        dims=("row", "column", "e"),
        coords={
            "row": ("row", 0.05 * np.arange(10), {"units": "mm"}),
            "column": ("column", -123.456 + 0.13 * np.arange(6), {"units": "mm"}),
            "e": X,
        },
    )
    axes = fit_map(peak, "e", y, P0).compute().plot()
    axes[0].figure.canvas.draw()
    assert not axes[0].xaxis.get_offset_text().get_text()
    for ax in axes:
        boxes = [each.get_window_extent() for each in ax.get_xticklabels() if each.get_text()]
        low, high = ax.get_window_extent().intervalx
        boxes = [each for each in boxes if low <= (each.x0 + each.x1) / 2 <= high]
        apart = all(one.x1 < other.x0 for one, other in pairwise(boxes))
        assert len(boxes) >= 2 and (apart or ax.get_xticklabels()[0].get_rotation() == 30)
    plt.close("all")


@pytest.mark.slow
def test_values_that_are_the_same_but_for_rounding_are_drawn_as_one():
    x = np.linspace(0, 1, 20)
    found = fit_map(lambda x, a, b: a * x + b, x, (2 * x + 0.1)[None].repeat(7, axis=0), [1, 1]).compute()
    values, errors = found.values_of("a")
    low, high, _ = limits("a", values + 1e-14 * np.arange(7), errors)
    assert low == high == pytest.approx(2)
    for ax in found.plot():
        assert np.ptp(ax.get_ylim()) > 1e-3
    plt.close("all")


def test_points_that_do_not_count_are_not_in_a_spectrum():
    y = Y[:5].copy()
    y[2, 3, [4, 7]] = np.nan
    seen = fitted(y, sigma=0.15).spectrum(2, 3)
    assert list(np.flatnonzero(np.isnan(seen.y))) == list(np.flatnonzero(np.isnan(seen.residual))) == [4, 7]
    assert np.isfinite(seen.model).all() and (seen.sigma == 0.15).all()


@pytest.mark.parametrize("first", [False, True], ids=["energy last", "energy first"])
def test_residuals_and_predictions_are_lazy_and_chunked_like_the_data(first, nothing_runs_yet):
    y = np.moveaxis(Y, -1, 0) if first else Y
    chunks = (10, 5, 6) if first else (5, 6, 20)
    with nothing_runs_yet:
        lazy = fit_map(peak, X, da.from_array(y, chunks), P0, axis=0 if first else -1, sigma=0.15)
        parts = lazy.residuals(), lazy.predict()
        assert all(each.chunks == da.from_array(y, chunks).chunks for each in parts)
    residual, model = da.compute(*parts)
    popt = lazy.compute().popt
    expected = values_at(X, *np.moveaxis(popt, -1, 0)[..., None])
    expected = np.moveaxis(expected, -1, 0) if first else expected
    np.testing.assert_allclose(model, expected, rtol=1e-10)
    np.testing.assert_allclose(residual, (expected - y) / 0.15, rtol=1e-8, atol=1e-10)


@pytest.fixture
def nothing_runs_yet():
    import dask

    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    return dask.config.set(scheduler=refuse)


def test_predictions_elsewhere_have_the_axes_of_the_map_and_then_of_x(named):
    x = np.linspace(-1, 1, 7)
    found = named.predict(x)
    assert found.shape == (10, 6, 7) and found.chunks[:2] == ((5, 5), (6,))
    np.testing.assert_allclose(found[4, 2].compute(), values_at(x, *named.popt[4, 2]), rtol=1e-12)
    labels = named.predict(xr.DataArray(x, dims="e", coords=dict(e=x)))
    assert labels.dims == ("row", "column", "e")
    assert named.residuals().dims == ("row", "column", "energy")
    np.testing.assert_array_equal(named.residuals().energy, X)


TIMES = np.linspace(0, 3, 20)
COUNTS = np.random.default_rng(3).poisson(np.array([[3.0], [50.0]]) * np.exp(-TIMES)).astype(float)


def counting():
    return fit_map(lambda t, a: a * jnp.exp(-t), TIMES, COUNTS, [10.0], loss="poisson", bounds={"a": (0, None)})


@pytest.mark.slow
def test_residuals_of_counts_are_those_of_the_deviance():
    found = counting().compute()
    np.testing.assert_allclose((np.asarray(found.residuals()) ** 2).sum(axis=-1), found.chi2, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# opened again


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    y = Y.copy()
    y[1, 1], y[8, 4, 2:] = np.nan, np.nan
    zarr.create_array(folder / "y", data=y, chunks=(*BLOCK, N))
    starts = np.broadcast_to(P0, TRUTH.shape).copy()
    starts[3, 4] = np.nan
    fits = fit_map(peak, X, folder / "y", starts, sigma=0.15)
    fits.to_zarr(folder / "fits.zarr")
    return folder, fits.compute()


@pytest.mark.slow
def test_a_map_that_was_loaded_is_seen_like_one_that_was_fitted(kept, tmp_path):
    folder, fits = kept
    found = load(folder / "fits.zarr")
    same_bits(found, fits)
    assert repr(found).split("\n")[1:] == repr(fits).split("\n")[1:]
    assert [ax.get_title() for ax in found.plot()] == list(NAMES)
    np.testing.assert_array_equal(found["area"].value, fits["area"].value)
    assert found.sel(param="area").popt.shape == (10, 6)
    assert "non finite" in found._repr_html_()
    text = found.report(tmp_path / "maps.html").read_text()
    assert "Without spectra" in text and "10 x 6 pixels" in text
    with pytest.raises(AttributeError, match=r"no 'spectrum': with_data\(xdata, ydata\) gives the data back"):
        found.spectrum(1, 2)


def test_with_its_data_a_map_goes_on_where_it_was(kept):
    folder, fits = kept
    for again in (
        load(folder / "fits.zarr").with_data(X, folder / "y", sigma=0.15),
        load(folder / "fits.zarr").with_data(fit_map(peak, X, folder / "y", P0, sigma=0.15)),
    ):
        assert not again.lazy
        same_bits(again, fits)
        np.testing.assert_array_equal(again.spectrum(2, 2).y, Y[2, 2])
        mended = again.refit_failed()
        assert again.status[3, 4] == MapStatus.NON_FINITE and mended.success[3, 4]


def test_arguments_beside_a_map_result_are_an_error_and_not_ignored(kept):
    folder, fits = kept
    with pytest.raises(ValueError, match="`xdata` is a MapResult, which has its own ydata, f, sigma: leave that out"):
        load(folder / "fits.zarr").with_data(fits, Y, f=peak, sigma=0.3)


def other(x, area, center, width, offset):
    return area / (1 + ((x - center) / width) ** 2) + offset


def test_another_model_or_other_data_are_refused(kept, tmp_path):
    folder, _ = kept
    found = load(folder / "fits.zarr")
    zarr.create_array(tmp_path / "y", data=Y + 1.0, chunks=(*BLOCK, N))
    for arguments, what in (
        (dict(xdata=X, ydata=folder / "y", sigma=0.15, f=other), "f"),
        (dict(xdata=X + 1e-9, ydata=folder / "y", sigma=0.15), "xdata"),
        (dict(xdata=X, ydata=folder / "y"), "sigma"),
        (dict(xdata=X, ydata=tmp_path / "y", sigma=0.15), ".*ydata.*"),
        (dict(xdata=X, ydata=folder / "y", sigma=0.15, bounds=dict(width=(0.2, None))), "bounds"),
    ):
        with pytest.raises(ValueError, match=f"map of another fit. Changed: {what}. Give"):
            found.with_data(**arguments)
    for y in (Y[:3], np.moveaxis(Y, -1, 0), Y[0]):
        with pytest.raises(ValueError, match=r"with_data: `ydata` has the shape \(.*\), the data of .* had \(10, 6, "):
            found.with_data(X, y, sigma=0.15, f=peak)


def test_lazy_data_are_known_by_some_of_their_pixels(tmp_path):
    lazy = da.from_array(Y, chunks=(*BLOCK, N))
    fits = fit_map(peak, X, lazy, P0)
    fits.to_zarr(tmp_path / "m")
    found = load(tmp_path / "m")
    for same in (lazy, Y):
        same_bits(found.with_data(X, same, f=peak), found)
    fit_map(peak, X, Y, P0).to_zarr(tmp_path / "of_numpy")
    same_bits(load(tmp_path / "of_numpy").with_data(X, lazy, f=peak), found)
    with pytest.raises(ValueError, match=r"Changed: values of ydata, with which pixel .* has chi2"):
        found.with_data(X, 7 * lazy + 3, f=peak)


@pytest.mark.slow
def test_ties_that_are_functions_are_given_again(tmp_path):
    rules = {"offset": lambda area: area / 100}
    fit_map(peak, X, Y, P0, expr=rules).to_zarr(tmp_path / "m")
    found = load(tmp_path / "m")
    same_bits(found.with_data(X, Y, f=peak, expr=rules), found)


def test_a_model_that_has_no_name_has_to_be_given(tmp_path):
    counting().to_zarr(tmp_path / "m")
    with pytest.raises(ValueError, match=r"cannot be imported by name: give it as f="):
        load(tmp_path / "m").with_data(TIMES, COUNTS)
    found = load(tmp_path / "m").with_data(TIMES, COUNTS, f=lambda t, a: a * jnp.exp(-t))  # bounds and loss are in the store
    same_bits(found, load(tmp_path / "m"))


def test_a_map_that_is_not_done_takes_no_data(kept, tmp_path):
    folder, _ = kept
    shutil.copytree(folder / "fits.zarr", tmp_path / "m")
    zarr.open_array(tmp_path / "m" / "done", mode="r+")[0] = 0
    found = load(tmp_path / "m")
    assert "1 of 2 blocks are done" in repr(found)
    with pytest.raises(ValueError, match="1 of 2 blocks are done"):
        found.with_data(X, folder / "y", sigma=0.15)


@pytest.fixture
def store_reads(monkeypatch):
    """How often each file of a store on this machine is read."""
    reads, get = Counter(), LocalStore.get

    def counting(self, key, *args, **options):
        reads[key] += 1
        return get(self, key, *args, **options)

    monkeypatch.setattr(LocalStore, "get", counting)
    return reads


def test_each_array_of_a_map_that_is_not_done_is_read_once_for_its_text(kept, tmp_path, store_reads):
    folder, _ = kept
    shutil.copytree(folder / "fits.zarr", tmp_path / "m")
    zarr.open_array(tmp_path / "m" / "done", mode="r+")[0] = 0
    found = load(tmp_path / "m")
    text = repr(found)
    assert "median" in text and "1 of 2 blocks are done" in text
    assert all(store_reads[key] == 1 for key in ("popt/c/0/0/0", "popt/c/1/0/0", "perr/c/0/0/0", "status/c/0/0"))
    zarr.open_array(tmp_path / "m" / "done", mode="r+")[0] = 1
    assert "blocks are done" not in repr(found)


def test_the_text_of_a_large_stored_map_reads_no_values_and_pictures_are_refused(kept, store_reads, monkeypatch):
    folder, fits = kept
    monkeypatch.setattr(views, "MOST_TOLD", 59)
    monkeypatch.setattr(views, "MOST_PIXELS", 59)
    found = load(folder / "fits.zarr")
    for text in (repr(found), found._repr_html_()):
        assert "StoredMap 10 x 6 pixels" in text and "too large to be read" in text and str(folder / "y") in text
        assert "median" not in text
    assert not any("/c/" in key for key in store_reads)
    with pytest.raises(ValueError, match=r"60 pixels is in a store, .* \(limit 59\): draw a part of to_xarray\(\)"):
        found.plot()
    assert "median" in repr(fits)


SCRIPT = """
import dask_nlsq, numpy as np, sys
found = dask_nlsq.load("fits.zarr", trust={trust})
fits = found.with_data(np.linspace(0, 5, 30), np.load("y.npy"))
print(fits.success.all(), fits.spectrum(3).params["rate"].value == found["rate"].value[3])
"""
MODEL = "import jax.numpy as jnp\n\n\ndef decay(t, height, rate):\n    return height * jnp.exp(-rate * t)\n"


@pytest.mark.slow
@pytest.mark.hostile
def test_after_a_restart_a_model_is_imported_from_where_it_may_be(tmp_path):
    (tmp_path / "decays.py").write_text(MODEL)
    write = (
        "import dask_nlsq, numpy as np\nfrom decays import decay\nt = np.linspace(0, 5, 30)\n"
        "y = np.arange(1, 6)[:, None] * np.exp(-0.7 * t)\nnp.save('y.npy', y)\n"
        "dask_nlsq.fit_map(decay, t, y, [1, 1]).to_zarr('fits.zarr')"
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parent.parent}:{tmp_path}", "PATH": ""}

    def run(code):
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run(write).returncode == 0
    assert run(SCRIPT.format(trust=f"{str(tmp_path)!r}")).stdout.split() == ["True", "True"]
    refused = run(SCRIPT.format(trust=False))
    assert UntrustedError.__name__ in refused.stderr and "load it with trust=True" in refused.stderr


# ---------------------------------------------------------------------------------------------------------------------
# the page of a report


@pytest.mark.slow
def test_a_report_shows_maps_histograms_and_spectra_good_and_bad(kept, tmp_path):
    folder, _ = kept
    fits = load(folder / "fits.zarr").with_data(X, folder / "y", sigma=0.15)
    text = fits.report(tmp_path / "maps.html").read_text()
    assert text.startswith("<!doctype html>") and "<h1>Maps of peak</h1>" in text and "57 of 60 pixels converged" in text
    assert text.count("data:image/svg+xml;base64,") == 3 + 4 + 1  # maps, histograms; 4 good ones, 1 failed
    assert "the largest of all" in text and "non finite: the only pixel" in text
    assert str(folder / "y") in text and "<td>numpy</td>" in text
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        fits.report(tmp_path / "nowhere" / "maps.html")


# ---------------------------------------------------------------------------------------------------------------------
# the viewer

SHOWN = """(() => {
  const map = Bokeh.documents[0].get_model_by_name('map of center'), view = Bokeh.index.find_one(map)
  const box = view.el.getBoundingClientRect()
  return [box.x + view.frame.x_scale.compute(%s), box.y + view.frame.y_scale.compute(%s)]
})()"""
CURVE, TEXT = (f"Bokeh.documents[0].get_model_by_name('{name}')" for name in ("curve", "values"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_click_on_a_pixel_shows_its_spectrum_and_values(named, tmp_path):
    page = named.view(tmp_path / "nlsq-viewer.html")
    with opened(page.as_uri(), tmp_path / "profile") as browser:
        wait(lambda: "pixel" in (browser.value(f"{TEXT}?.text") or ""), "the page shows no pixel")
        for row, column in ((2, 5), (8, 0)):
            where = f"pixel ({row}, {column})</b> at row {ROW[row]:g} µm, column {COLUMN[column]:g} µm: <b>"

            def clicked(at=(COLUMN[column] + 0.4, ROW[row] - 0.1), where=where):
                """Where the page has put the pixel by now."""
                x, y = browser.value(SHOWN % at)
                for kind in ("mousePressed", "mouseReleased"):
                    browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
                return where in browser.value(f"{TEXT}.text")

            wait(clicked, "the click shows no other pixel")
            seen = named.spectrum(row, column)
            for name in ("y", "model", "residual"):
                expected = np.float32(getattr(seen, name))
                np.testing.assert_allclose(browser.value(f"Array.from({CURVE}.data.{name})"), expected, rtol=1e-6)
            shown = seen.params["center"].row()
            assert f"{shown[1].strip()} {shown[2].replace('+-', '±')}" in browser.value(f"{TEXT}.text")
        assert not browser.value("document.querySelectorAll('[src], link[href]').length")


def test_a_page_is_bounded_and_says_what_it_holds(named, monkeypatch):
    whole = named.view().html
    assert "holds one in" not in whole and len(whole) < 4e6
    monkeypatch.setattr(viewer, "SPECTRA", 17 * (3 * 4 * N * 4 // 3 + 6 * 24))
    monkeypatch.setattr(viewer, "MAPS", 1000)
    thinned = named.view().html
    assert "of the maps this page holds one in 2 pixels along each axis" in thinned
    assert "of the spectra it holds one in 2 along each axis, and a click shows the nearest of them" in thinned
    monkeypatch.setattr(viewer, "SPECTRA", 1000)
    with pytest.raises(
        ValueError, match=r"a spectrum of 40 points takes .* look at single ones by spectrum\(...\).plot\(\)"
    ):
        named.view()


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["energy last", "energy first"])
def test_a_page_has_what_spectrum_gives_and_reads_only_chunks_with_pixels_that_it_shows(first, tmp_path):
    y, sigma = np.moveaxis(Y, -1, 0) if first else Y, 0.1 + 0.01 * np.arange(6)
    data, reads = counted(tmp_path / "y", y, (N, 1, 6) if first else (1, 6, N))
    found = fit_map(peak, X, data, P0, axis=0 if first else -1, sigma=np.tile(sigma, (10, 1))).compute()
    reads.clear()
    values = some_points(found, (4, 4))
    chunks = [f"c/0/{k}/0" if first else f"c/{k}/0/0" for k in (0, 4, 8)]
    assert values.shape == (3, 3, 2, N) and {*reads} == {*chunks} and max(reads.values()) == 1
    seen = found.spectrum(8, 4)
    for part, expected in zip(values[:, 2, 1], (seen.y, seen.model, seen.residual), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.residual, (seen.model - seen.y) / sigma[4], rtol=1e-9)


@pytest.mark.slow
def test_a_page_says_what_spectra_are_drawn_against_and_what_residuals_are():
    dates = np.datetime64("2026-01-01", "ns") + np.timedelta64(60, "s") * np.arange(10)
    found = fit_map(peak, np.broadcast_to(X, Y.shape), labelled().assign_coords(row=dates), P0, axis="energy", sigma=0.2)
    found = found.compute()
    page = found.view().html
    assert '"axis_label":"point"' in page and r'"axis_label":"(model - data)\n/ sigma"' in page
    assert '["row","s since 2026-01-01T00:00:00"]' in page
    assert "at row 120 s since 2026-01-01T00:00:00, column 6 µm" in found.spectrum(2, 3).title
    assert '"axis_label":"deviance residual"' in counting().view().html


def test_a_notebook_shows_the_viewer_and_names_in_it_are_text(kept):
    folder, _ = kept
    frame = load(folder / "fits.zarr").view()._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and "brings the spectra" in frame
    name = "<script>alert(1)</script>"
    found = fitted(Y[:5, 0], param_names=[name, *NAMES[1:]]).view().html
    assert name not in found


# ---------------------------------------------------------------------------------------------------------------------
# of groups


@pytest.mark.slow
def test_the_map_of_groups_has_what_works_for_groups():
    data = xr.DataArray(
        VALUES_OF_GROUPS, dims=("angle", "t"), coords=dict(angle=("angle", 5.0 * np.arange(G), {"units": "degree"}), t=T)
    )
    result = fit_groups(decay, "t", data, GROUPS_P0, local=LOCAL, group_axes="angle")
    assert not hasattr(result.local, "refit_failed") and "refit_failed" not in dir(result.local)
    seen = result.local.spectrum(angle=20)
    assert seen.place == (4,) and seen.params["rate"].value == result["rate"].value
    np.testing.assert_array_equal(seen.y, VALUES_OF_GROUPS[4])
    np.testing.assert_allclose(np.asarray(result.local.residuals())[4], seen.residual, rtol=1e-12)
    assert result.local.plot(names=["amplitude"])[0].get_xlabel() == "angle (°)"
    assert {"popt", "cost", "local", "sel"} <= {*dir(result)}
    assert f"LocalMap {G} groups" in result._repr_html_()
    np.testing.assert_array_equal(result.sel(param="amplitude").popt, result["amplitude"].value)


def test_statuses_that_have_converged_are_counted_together():
    status = np.array([MapStatus.FTOL, MapStatus.FTOL, MapStatus.FTOL_XTOL, MapStatus.MASKED])
    assert views.counted(status) == [("3", "converged (2 ftol, 1 ftol xtol)"), ("1", "masked")]


def test_axes_of_a_curve_show_error_bars_also_where_all_values_are_equal():
    values, errors = np.full(5, 2.0), np.full(5, 0.7)
    for each in (errors, np.zeros(5)):
        low, high = ends_with_errors("a", values, each)
        assert low < 2 - each[0] and high > 2 + each[0]
