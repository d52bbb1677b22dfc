"""What pictures are labelled with, which axes are logarithmic, and images of data with several axes."""

import tracemalloc

import dask.array as da
import h5py
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from dask_nlsq import curve_fit, hold, plan_fit, plots
from dask_nlsq.base import config
from dask_nlsq.data.labels import Quantity
from dask_nlsq.kernels.kind import CPU
from dask_nlsq.memory.needs import READ_AHEAD
from dask_nlsq.model.function import coordinate_names
from dask_nlsq.results import binning
from dask_nlsq.results.binning import binned, images
from dask_nlsq.results.coordinates import between, over_decades

from .spectra import counted

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def decay(t, a, b):
    return a * jnp.exp(-b * t)


T = np.linspace(0, 4, 60)
Y = np.asarray(decay(T, 3.0, 0.5)) + np.random.default_rng(0).normal(0, 0.05, 60)


def surface(axes, height, slope):
    t, q = axes
    return height * jnp.exp(-(q**2)) + slope * t


TIME, ANGLE = np.arange(30.0) * 0.2, np.linspace(-2, 2, 90)
PLANE = np.asarray(surface((TIME[:, None], ANGLE), 3.0, 0.1)) + np.random.default_rng(1).normal(0, 0.1, (30, 90))


# ---------------------------------------------------------------- names and units


def in_xarray(tmp_path):
    t = ("time", T, {"units": "ms", "long_name": "delay"})
    return None, xr.DataArray(Y, dims="time", coords={"time": t}, name="signal", attrs={"units": "V"})


def in_zarr(tmp_path):
    for name, values, unit in (("time", T, "ms"), ("signal", Y, "V")):
        zarr.create_array(tmp_path / "run.zarr" / name, data=values, attributes={"units": unit, "long_name": name})
    return str(tmp_path / "run.zarr" / "time"), zarr.open_array(tmp_path / "run.zarr" / "signal", mode="r")


def in_nexus(tmp_path):
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["entry/time"], file["entry/signal"] = T, Y
        file["entry/time"].attrs["units"], file["entry/signal"].attrs["units"] = np.bytes_("ms"), "V"
    file = h5py.File(tmp_path / "run.h5", "r")
    return file["entry/time"], file["entry/signal"]


def in_pandas(tmp_path):
    return pd.Series(T, name="time (ms)"), pd.Series(Y, name="signal (V)")


def lazily(tmp_path):
    return da.from_array(T, 20), da.from_array(Y, 20)  # whose names nobody has given


@pytest.mark.parametrize(
    ("come", "labels"),
    [
        (in_xarray, ("delay (ms)", "signal (V)")),
        (in_zarr, ("time (ms)", "signal (V)")),
        (in_nexus, ("time (ms)", "signal (V)")),
        (in_pandas, ("time (ms)", "signal (V)")),
        (lazily, ("t", "y")),
    ],
)
def test_axes_are_labelled_with_the_names_and_units_of_the_data(come, labels, tmp_path):
    found = curve_fit(decay, *come(tmp_path), p0=[1, 1])
    top, below = plots.fit(found, residuals=True)
    assert (below.get_xlabel(), top.get_ylabel()) == labels


def test_axes_of_stored_data_have_the_names_of_their_dimensions(tmp_path):
    x, y = np.broadcast_to(T, (20, 60)), np.broadcast_to(Y, (20, 60))
    stored = zarr.create_array(tmp_path / "y.zarr", data=y, dimension_names=("frame", "pixel"), chunks=(5, 60))
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = y
        file["y"].dims[0].label, file["y"].dims[1].label = "frame", "pixel"
        for ydata in (stored, file["y"]):
            assert images(curve_fit(decay, x, ydata, p0=[1, 1])).names == ("frame", "pixel")


def test_data_that_are_held_keep_their_names(tmp_path):
    with hold(*in_xarray(tmp_path)) as held:
        assert plots.fit(curve_fit(decay, held, p0=[1, 1])).get_xlabel() == "delay (ms)"


def test_dates_are_labelled_as_seconds_since_the_first():
    dates = pd.date_range("2026-11-28", periods=60, freq="1s").to_series(name="clock")
    found = curve_fit(lambda t, a, b: a * jnp.exp(-b * t / 15), dates, Y, p0=[1, 1])
    assert plots.fit(found).get_xlabel() == "clock (s since the first date)"


def test_coordinates_without_names_have_those_that_the_model_unpacks():
    found = curve_fit(surface, (TIME[:, None], ANGLE), PLANE, p0=[1, 1])
    assert plots.fit(found, coordinate=1).get_xlabel() == plots.fit(found, coordinate="q").get_xlabel() == "q"
    with pytest.raises(ValueError, match="`coordinate` names 'tt': there are t, q; did you mean 't'"):
        plots.fit(found, coordinate="tt")


def test_names_that_a_model_unpacks_are_taken_only_where_they_are_certain():
    def twice(xt, a):
        x, t = xt
        x = x / 2
        return a * x * t

    def nested(xt, a):
        (x, _), t = xt
        return a * x * t

    assert coordinate_names(surface) == ("axes", ("t", "q"))
    assert coordinate_names(twice) == coordinate_names(nested) == coordinate_names(lambda xt, a: a * xt[0]) == ("xt", ())
    assert coordinate_names(abs) == ("x", ())
    found = curve_fit(twice, (TIME[:, None], ANGLE), PLANE, p0=[1])
    assert plots.fit(found).get_xlabel() == "xt[0]"


def test_long_labels_are_broken_into_lines():
    name = "vertical position of the sample stage, corrected for its drift"
    found = curve_fit(decay, pd.Series(T, name=name), Y, p0=[1, 1])
    ax = plots.fit(found)
    assert ax.get_xlabel().split("\n") == ["vertical position of the sample stage,", "corrected for its drift"]


# ---------------------------------------------------------------- logarithmic axes


def guinier(q, scale, radius, background):
    return scale * jnp.exp(-((q * radius) ** 2) / 3) + background


def scattering(q, noise=0.02, seed=0):
    y = np.asarray(guinier(q, 1e4, 40.0, 5.0))
    return q, y * (1 + noise * np.random.default_rng(seed).standard_normal(len(q)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [200, 5000])
def test_axes_of_data_over_decades_are_logarithmic(n):
    q, y = scattering(np.geomspace(0.003, 0.3, n))
    found = curve_fit(guinier, q, y, p0=[8e3, 30, 1], sigma=0.02 * y)
    top, below = plots.fit(found, residuals=True)
    assert (top.get_xscale(), top.get_yscale(), below.get_yscale()) == ("log", "log", "linear")
    np.testing.assert_allclose(np.diff(np.log(binned(found).x)), np.log(100) / (len(binned(found).x) - 1), rtol=0.5)
    for log, scales in ((False, ("linear", "linear")), ("x", ("log", "linear")), ("y", ("linear", "log"))):
        ax = plots.fit(found, log=log)
        assert (ax.get_xscale(), ax.get_yscale()) == scales
    with pytest.raises(ValueError, match="`log` must be None, True, False, 'x', 'y' or 'xy', not 'log'"):
        plots.fit(found, log="log")


def test_evenly_spaced_values_have_a_linear_axis_however_small_the_first_is():
    assert over_decades(np.geomspace(0.01, 1, 50))
    assert not over_decades(np.geomspace(0.1, 1, 50)) and not over_decades(np.linspace(1e-4, 10, 500))
    assert not over_decades(np.random.default_rng(0).uniform(0, 10, 5000)) and not over_decades(np.geomspace(1, 1e3, 9) - 1)


def test_noise_around_zero_has_a_linear_axis():
    y = np.asarray(decay(T, 1000.0, 3.0)) + np.random.default_rng(0).normal(0, 5, 60)
    assert plots.fit(curve_fit(decay, T, y, p0=[900, 2])).get_yscale() == "linear"


@pytest.mark.slow
def test_error_bars_reach_the_edge_of_a_logarithmic_axis_where_they_reach_down_to_zero():
    q, y = scattering(np.geomspace(0.003, 0.3, 100))
    found = curve_fit(guinier, q, y, p0=[8e3, 30, 1], sigma=np.maximum(0.02 * y, 6))
    ax = plots.fit(found)
    low, high = ax.get_ylim()
    assert 0 < low < y.min() and high > y.max()
    (bars,) = ax.containers[0].lines[2]
    ax.figure.canvas.draw()
    pixels = [ax.transData.transform(segment)[:, 1] for segment in bars.get_segments()]
    assert min(each.min() for each in pixels) <= ax.bbox.y0  # as far as the picture goes, and no further up


def test_points_that_a_logarithmic_axis_cannot_show_are_counted():
    q, y = scattering(np.geomspace(0.003, 0.3, 100))
    sigma, y[-1] = 0.02 * y, 0.0
    ax = plots.fit(curve_fit(guinier, q, y, p0=[8e3, 30, 1], sigma=np.maximum(sigma, 1)))
    assert "data, 1 not positive" in [each.get_text() for each in ax.get_legend().get_texts()]


# ---------------------------------------------------------------- images


def cut(values, rows, columns):
    """Means of bins of so many rows and columns, without what is nan."""
    m, n = values.shape
    parts = [np.split(band, range(columns, n, columns), axis=1) for band in np.split(values, range(rows, m, rows))]
    return np.array([[np.nanmean(part) if np.isfinite(part).any() else np.nan for part in band] for band in parts])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, (7, 50), (1, 3)])
def test_images_have_the_means_of_their_bins_however_the_data_are_chunked(chunks):
    rng, q = np.random.default_rng(2), np.linspace(-2, 2, 700)
    y = np.asarray(surface((TIME[:, None], q), 3.0, 0.1)) + rng.normal(0, 0.1, (30, 700))
    mask = rng.random((30, 700)) < 0.2
    mask[10:13], mask[:, 400:420] = True, True
    data = y if chunks is None else da.from_array(y, (chunks[0], chunks[1] * 7))
    found = curve_fit(surface, (TIME[:, None], q), data, p0=[1, 1], mask=mask)
    seen, kept = images(found), np.where(mask, np.nan, y)
    np.testing.assert_allclose(seen.data, cut(kept, 1, 4), atol=1e-12)  # 700 columns in bins of 4
    np.testing.assert_allclose(seen.model, cut(np.where(mask, np.nan, np.asarray(found.predict())), 1, 4), atol=1e-12)
    np.testing.assert_allclose(seen.residual, cut(np.asarray(found.residuals()), 1, 4), atol=1e-12)
    assert np.isnan(seen.data[10:13]).all() and np.isnan(seen.data[:, 100:105]).all()
    assert seen.names == ("t", "q") and seen.edges[0][0] == pytest.approx(-0.1)


@pytest.mark.slow
def test_images_are_means_over_all_axes_but_two():
    frames = np.stack([PLANE, PLANE + 1, PLANE + 5])
    k = np.arange(3.0)[:, None, None]

    def model(axes, height, slope, rise):
        frame, t, q = axes
        return surface((t, q), height, slope) + rise * frame

    found = curve_fit(model, (k, TIME[:, None], ANGLE), da.from_array(frames, (1, 30, 90)), p0=[1, 1, 1])
    np.testing.assert_allclose(images(found).data, frames.mean(axis=0), atol=1e-12)
    for along in ((0, -1), ("frame", "q"), [0, "q"]):
        seen = images(found, along)
        np.testing.assert_allclose(seen.data, frames.mean(axis=1), atol=1e-12)
        assert seen.names == ("frame", "q")
    for along, message in (
        ((0, 3), "`along` must name axes of ydata, which has 3, or give their places, not 3"),
        ((0, 0), "two different axes"),
        (("frame", "angle"), "`along` names 'angle': there are frame, t, q"),
        ("q", "`along` must be a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            images(found, along)


@pytest.mark.slow
def test_scattered_points_with_two_coordinates_have_images():
    rng = np.random.default_rng(0)
    t, q = rng.uniform(0, 6, 20_000), rng.uniform(-2, 2, 20_000)
    y = np.asarray(surface((t, q), 3.0, 0.1)) + rng.normal(0, 0.1, 20_000)
    found = curve_fit(surface, (da.from_array(t, 3000), da.from_array(q, 3000)), da.from_array(y, 3000), p0=[1, 1])
    seen = images(found)
    assert seen.names == ("q", "t") and max(seen.data.shape) <= 256
    n, sums = (np.histogram2d(q, t, bins=seen.edges, weights=weights)[0] for weights in (None, y))
    np.testing.assert_allclose(seen.data[n > 1], (sums / np.maximum(n, 1))[n > 1], atol=1e-9)
    with pytest.raises(ValueError, match="data with two axes, or two coordinates"):
        images(curve_fit(decay, T, Y, p0=[1, 1]))


@pytest.mark.slow
def test_data_and_model_have_the_same_colours_and_residuals_are_white_at_zero():
    mask = np.zeros(PLANE.shape, bool)
    mask[5:9] = True
    found = curve_fit(surface, (TIME[:, None], ANGLE), PLANE, p0=[1, 1], mask=mask)
    axes = plots.images(found)
    data, model, residual = (ax.images[0] for ax in axes)
    assert data.get_clim() == model.get_clim() == tuple(np.percentile(PLANE[~mask], [0.5, 99.5]))
    assert residual.get_clim()[0] == -residual.get_clim()[1] and residual.get_cmap().name == "RdBu_r"
    assert np.ma.getmaskarray(data.get_array())[5:9].all() and [ax.get_title() for ax in axes] == [
        "data",
        "model",
        "residual",
    ]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("q", "t")


@pytest.mark.slow
def test_images_of_counts_over_decades_have_logarithmic_colours_and_rows_of_a_detector_run_down():
    def rings(axes, scale, width):
        i, j = axes
        return scale * jnp.exp(-((i - 40) ** 2 + (j - 40) ** 2) / width**2) + 0.5

    y = np.random.default_rng(0).poisson(rings((np.arange(80)[:, None], np.arange(80)), 900.0, 25.0))
    mask = np.zeros(y.shape, bool)
    mask[:, 20] = True
    found = curve_fit(rings, tuple(np.ogrid[:80, :80]), y, p0=[800, 20], loss="poisson", mask=mask)
    assert images(found).log == (False, False, True)
    axes = plots.images(found)
    assert [ax.images[0].norm.__class__.__name__ for ax in axes] == ["LogNorm", "LogNorm", "Normalize"]
    drawn = axes[0].images[0].norm(axes[0].images[0].get_array())
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), mask)  # no counts are not white, as what is masked is
    assert axes[0].get_ylim() == (-0.5, 79.5)  # i and j are coordinates, which run up
    plain = curve_fit(lambda x, a: a + 0 * x, np.broadcast_to(T, (20, 60)), np.broadcast_to(Y, (20, 60)), p0=[1])
    assert plots.images(plain)[0].get_ylim() == (19.5, -0.5)
    assert plots.images(found, log=False)[0].images[0].norm.__class__.__name__ == "Normalize"


def test_bins_of_unequal_width_are_drawn_so():
    energy = np.concatenate([np.arange(0, 10, 2.0), np.arange(10, 20, 0.5), np.arange(20, 41, 4.0)])

    def edge(axes, height, position):
        e, _ = axes
        return height * (0.5 + jnp.arctan(e - position) / jnp.pi)

    y = np.asarray(edge((energy[:, None], np.arange(9)), 1.0, 14.0)) + np.random.default_rng(0).normal(
        0, 0.02, (len(energy), 9)
    )
    found = curve_fit(edge, (energy[:, None], np.arange(9)), y, p0=[2, 13])
    axes = plots.images(found)
    (mesh,) = axes[0].collections
    np.testing.assert_allclose(mesh.get_coordinates()[[0, 1, -1], 0, 1], [-1, 1, 42])
    assert axes[0].get_xlabel() == "column"  # of what the model does not unpack a name


@pytest.mark.slow
def test_images_read_a_store_once(tmp_path):
    stored, reads = counted(tmp_path / "y.zarr", PLANE, (10, 30))
    found = curve_fit(surface, (TIME[:, None], ANGLE), stored, p0=[1, 1], strategy="streaming")
    reads.clear()
    plots.images(found)
    assert set(reads.values()) == {1} and len(reads) == 9
    reads.clear()
    found.report(tmp_path / "fit.html")  # with a panel for each coordinate
    assert set(reads.values()) == {1}


def tilted(axes, a, b):
    return a + b * axes[0] - axes[1]


@pytest.fixture
def at_once(monkeypatch):
    """How many tallies are in memory at once, at most."""

    class Counted(binning.Tally):
        alive = peak = 0

        def __new__(cls, *args):
            Counted.alive += 1
            Counted.peak = max(Counted.peak, Counted.alive)
            return super().__new__(cls, *args)

        def __del__(self):
            Counted.alive -= 1

    monkeypatch.setattr(binning, "Tally", Counted)
    return Counted


@pytest.mark.parametrize(("n", "chunks"), [(6 * CPU.block_points, None), (6 * CPU.block_points, -1), (40_000, 1000)])
def test_the_bins_in_memory_do_not_grow_with_the_number_of_blocks(n, chunks, at_once, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)
    monkeypatch.setattr(binning, "AT_ONCE", 2)
    t, q = (np.random.default_rng(k).uniform(0, 1, n) for k in (0, 1))
    data = [each if chunks is None else da.from_array(each, chunks) for each in (t, q, 2 + t - q)]
    found = curve_fit(tilted, (data[0], data[1]), data[2], p0=[1, 1])
    few = images(found)
    assert few.data.shape == (256, 256) and np.nanmax(few.data) > 2.9
    in_flight = 2 * (config.threads() + READ_AHEAD) + config.threads() if chunks == 1000 else 2
    assert 2 <= at_once.peak <= in_flight + 3
    if chunks is None:
        monkeypatch.setattr(binning, "AT_ONCE", 64)
        many = images(found)
        assert all(np.array_equal(getattr(few, each), getattr(many, each), equal_nan=True) for each in ("data", "residual"))


# ---------------------------------------------------------------- where


def uneven(result):
    return next(line for line in result.diagnostics.lines if line.startswith("chi-square is larger"))


@pytest.mark.parametrize("chunks", [None, (1, 40, 90)])
def test_a_part_of_data_with_several_axes_is_named_by_its_places(chunks):
    rng, frames = np.random.default_rng(0), 6
    noise = rng.normal(0, 0.1, (frames, 40, 90))
    noise[3, 10:20] *= 8
    t = np.arange(40.0)[:, None] * 0.5

    def model(axes, height, slope):
        t, q = axes
        return surface((t, q), height, slope)

    y = np.asarray(surface((t, ANGLE), 3.0, 0.1)) + noise
    found = curve_fit(model, (t, ANGLE), y if chunks is None else da.from_array(y, chunks), p0=[1, 1])
    assert "(axis 0 = 3, t from " in uneven(found)
    low, high = (float(each) for each in uneven(found).split(", t from ")[1].split(")")[0].split(" to "))
    assert 4.5 <= low <= high <= 10.5  # rows 10 to 19, half a unit each


def level(y, a):
    return a + 0 * y


@pytest.mark.slow
@pytest.mark.parametrize("cut", [(8, 400, 1000), (400, 1000), (8, 400, 1)])
def test_a_part_of_masked_data_is_found_without_an_array_of_their_size(cut):
    shape = (8, 400, 1000)
    mask = np.random.default_rng(0).random(cut) < 0.3
    found = curve_fit(level, np.arange(1000.0), np.ones(shape), p0=[0.5], mask=mask)
    places = np.argwhere(np.broadcast_to(~mask, shape))
    assert found.n_points == len(places)
    between(found, 0, 0)  # which imports what it needs
    for number in (0, len(places) // 2, len(places) - 1):
        tracemalloc.start()
        where = between(found, number, number)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert where == "axis 0 = {}, row = {}, y = {}".format(*places[number])
        assert peak < 1e6  # a mask of all points takes 3.2e6; other threads of the process are counted, too


def test_coordinates_of_axes_are_read_by_pictures_alone():
    reads = []

    def energies(x):
        reads.append(len(x))
        return x + 8.0

    energy = da.from_array(ANGLE, 45).map_blocks(energies, meta=np.zeros(0))
    coords = xr.Coordinates({"energy": ("energy", energy)}, indexes={})  # those with an index are in memory
    y = xr.DataArray(PLANE, dims=("frame", "energy"), coords=coords)
    x = TIME[:, None], ANGLE
    plan_fit(surface, x, y, p0=[1, 1])
    found = curve_fit(surface, x, y, p0=[1, 1])
    found.summary()
    assert not reads
    assert images(found).edges[1][[0, -1]] == pytest.approx([6, 10], abs=0.03) and reads


@pytest.mark.slow
def test_residuals_that_follow_a_coordinate_are_named_in_the_report(tmp_path):
    y = np.broadcast_to(3 * np.exp(-(ANGLE**2)) + 0.3 * np.sin(4 * ANGLE), (300, 90))
    y = y + np.random.default_rng(0).normal(0, 0.5, y.shape)
    found = curve_fit(surface, (np.arange(300.0)[:, None], ANGLE), y, p0=[1, 1])
    page = found.report(tmp_path / "fit.html").read_text()
    assert "residuals follow q: their means in" in page and "residuals follow t" not in page


def test_a_name_with_a_slash_is_whole_and_only_paths_are_cut(tmp_path):
    assert str(Quantity.of(xr.DataArray([1.0], dims="x", name="counts/s", attrs={"file": "run/7"}))) == "counts/s"
    assert str(Quantity.of(pd.Series([1.0], name="I/I0"))) == "I/I0"
    with h5py.File(tmp_path / "run.h5", "w") as file:
        assert str(Quantity.of(file.create_dataset("entry/counts", data=[1.0]))) == "counts"
