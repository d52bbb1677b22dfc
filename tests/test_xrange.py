"""A fit range by coordinate: `xrange` leaves out what a mask of the same points leaves out, and counts it."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_nlsq import curve_fit, fit, fit_groups, fit_map, hold, plan_fit, resume
from dask_nlsq.interface.cli import nlsq


def line(x, slope, base):
    return slope * x + base


def plane(x, a, b, c):
    return a * x[0] + b * x[1] + c


X = np.linspace(0, 10, 201)
Y = 2 * X + 1 + np.where(np.abs(X - 5) < 2, 0, 50) + 0.01 * np.random.default_rng(0).normal(size=201)
INSIDE = (X >= 3.5) & (X <= 6.5)


@pytest.fixture(scope="module")
def expected():
    return curve_fit(line, X, Y, [1, 0], mask=~INSIDE)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.popt, expected.popt)
    np.testing.assert_array_equal(found.pcov, expected.pcov)
    assert (found.n_points, found.n_masked) == (expected.n_points, expected.n_masked)


@pytest.mark.parametrize("xrange", [(3.5, 6.5), [(3.5, 6.5)], {0: (3.5, 6.5)}, [(3.5, 5), (5, 6.5)], np.array([3.5, 6.5])])
def test_a_range_is_the_mask_of_what_lies_outside(expected, xrange):
    found = curve_fit(line, X, Y, [1, 0], xrange=xrange)
    assert_same(found, expected)
    assert found.n_masked == np.sum(~INSIDE) and np.isnan(found.residuals()[~INSIDE]).all()


def test_several_intervals_and_open_ends_count_with_a_mask():
    keep = (X <= 2) | (X >= 8.9)
    mask = X == 1.0
    found = curve_fit(line, X, Y, [1, 0], xrange=[(None, 2), (8.9, None)], mask=mask)
    assert_same(found, curve_fit(line, X, Y, [1, 0], mask=~keep | mask))


def test_lazy_and_stored_coordinates_count_as_those_in_memory_and_lazy_ones_are_read_once(expected, tmp_path):
    reads = []

    def counted(block):
        reads.append(1)
        return block

    x = da.from_array(X, chunks=50).map_blocks(counted, dtype=float, meta=np.empty(0))
    found = curve_fit(line, x, da.from_array(Y, chunks=50), [1, 0], xrange=(3.5, 6.5), strategy="standard")
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert found.n_masked == expected.n_masked and len(reads) == x.npartitions
    stored = zarr.create_array(tmp_path / "x.zarr", data=X, chunks=(50,))
    found = curve_fit(line, stored, Y, [1, 0], xrange=(3.5, 6.5), strategy="streaming", checkpoint=tmp_path / "kept")
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert found.n_masked == expected.n_masked
    again = resume(tmp_path / "kept", xdata=stored)
    np.testing.assert_array_equal(again.popt, found.popt)
    with pytest.raises(ValueError, match="xrange"):
        curve_fit(line, stored, Y, [1, 0], xrange={0: (3, 6.5)}, strategy="streaming", checkpoint=tmp_path / "kept")


def test_a_coordinate_of_several_is_named_by_its_place():
    u, v = np.linspace(0, 1, 30)[:, None], np.linspace(0, 2, 40)
    y = u + 2 * v + 3
    for x in ((u, v), np.stack(np.broadcast_arrays(u, v))):
        found = curve_fit(plane, x, y, xrange={1: (0.5, 1.5), 0: (None, 0.8)})
        assert found.n_points == np.sum((v >= 0.5) & (v <= 1.5) & (u <= 0.8))
    with pytest.raises(ValueError, match=r"which of the 2 coordinates of `xdata` is it for\? Name its place"):
        curve_fit(plane, (u, v), y, xrange=(0, 1))
    with pytest.raises(ValueError, match="`xrange` has intervals for coordinate 2, but `xdata` has 2"):
        curve_fit(plane, (u, v), y, xrange={2: (0, 1)})


def test_coordinates_of_labelled_data_are_named():
    y = xr.DataArray(Y, dims="energy", coords={"energy": X})
    found = curve_fit(line, None, y, [1, 0], xrange={"energy": (3.5, 6.5)})
    assert found.n_points == INSIDE.sum()
    assert curve_fit(line, "energy", y, [1, 0], xrange=(3.5, 6.5)).n_points == INSIDE.sum()
    with pytest.raises(ValueError, match="`xrange` names 'time', but the names of `xdata` are energy"):
        curve_fit(line, None, y, [1, 0], xrange={"time": (3.5, 6.5)})
    with pytest.raises(ValueError, match="`xrange` names 'energy', but the names of `xdata` are x: give"):
        curve_fit(line, X, Y, [1, 0], xrange={"energy": (3.5, 6.5)})


def test_data_that_are_held_have_the_range(expected):
    with hold(X, Y, xrange=(3.5, 6.5)) as data:
        assert_same(curve_fit(line, data, p0=[1, 0]), expected)
        with pytest.raises(ValueError, match="`xrange` belongs to the held data"):
            curve_fit(line, data, p0=[1, 0], xrange=(3, 4))


def test_the_other_ways_to_fit_take_it():
    assert fit(line, X, Y, [1, 0], xrange=(3.5, 6.5)).n_points == INSIDE.sum()
    assert plan_fit(line, X, Y, [1, 0], xrange=(3.5, 6.5)).n_points == X.size
    with pytest.raises(ValueError, match="no data: `xrange`"):
        plan_fit(line, X, Y, [1, 0], xrange=(11, 12))


def test_one_coordinate_has_one_entry_and_empty_data_say_so():
    y = xr.DataArray(Y, dims="e", coords={"e": X})
    with pytest.raises(ValueError, match="`xrange` names a coordinate and its place"):
        curve_fit(line, None, y, [1, 0], xrange={0: (0, 2), "e": (5, 6)})
    with pytest.raises(ValueError, match="`ydata` must not be empty"):
        curve_fit(line, X[:0], Y[:0], [1, 0], xrange=(0, 1))


def test_an_omitted_point_is_no_masked_one_and_nan_is_not_hidden():
    x = np.where(X == 5.0, np.nan, X)
    found = curve_fit(line, x, Y, [1, 0], xrange=(3.5, 6.5), nan_policy="omit")
    assert (found.n_omitted, found.n_masked) == (1, np.sum(~INSIDE))
    with pytest.raises(ValueError, match="nan or infinity: 1 of the values of `xdata`"):
        curve_fit(line, x, Y, [1, 0], xrange=(3.5, 6.5))


def test_correlated_points_are_left_out_with_their_rows_of_the_covariance():
    covariance = 0.01 * np.exp(-np.abs(X[:, None] - X))
    found = curve_fit(line, X, Y, [1, 0], sigma=covariance, xrange=(3.5, 6.5))
    keep = np.ix_(INSIDE, INSIDE)
    np.testing.assert_allclose(found.popt, curve_fit(line, X[INSIDE], Y[INSIDE], [1, 0], sigma=covariance[keep]).popt)


def test_a_range_without_points_is_an_error():
    with pytest.raises(ValueError, match=r"no data: `xrange` has \(11.0, 12.0\), and `xdata` lies from 0 to 10"):
        curve_fit(line, X, Y, [1, 0], xrange=(11, 12))
    with pytest.raises(ValueError, match="no data: all 201 points are masked, outside `xrange` or omitted"):
        curve_fit(line, da.from_array(X, chunks=50), Y, [1, 0], xrange=(11, 12))


@pytest.mark.parametrize("wrong", [(6, 3), 5, [(1, 2, 3)], (np.nan, 1), [], {1.5: (0, 1)}, ("a", "b"), {-1: (0, 1)}])
def test_what_is_no_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"`xrange` must be a pair of numbers \(low, high\)"):
        curve_fit(line, X, Y, [1, 0], xrange=wrong)


@pytest.mark.slow
def test_a_map_has_the_range_in_each_pixel():
    y = np.stack([Y, 2 * Y])
    fits = fit_map(line, X, y, [1, 0], xrange=(3.5, 6.5)).compute()
    assert np.all(fits.n_points == INSIDE.sum())
    np.testing.assert_allclose(fits.popt, [[2, 1], [4, 2]], atol=0.02)
    assert fit_map(line, X, y, [1, 0], xrange=(3, 6)).provenance != fit_map(line, X, y, [1, 0]).provenance
    own = fit_map(line, np.stack([X, X + 1]), y, [1, 0], xrange=(3.5, 6.5))
    np.testing.assert_array_equal((~own.problem.operands["mask"].array).sum(axis=1), [61, 61])
    named = fit_map(
        line, None, xr.DataArray(y, dims=("k", "e"), coords={"e": X}), [1, 0], axis="e", xrange={"e": (3.5, 6.5)}
    )
    assert np.sum(~named.problem.operands["mask"].array) == INSIDE.sum()


@pytest.mark.slow
def test_groups_have_the_range():
    y = np.stack([Y, Y + 1])
    found = fit_groups(line, X, y, [1, 0], local="base", group_axes=0, xrange=(3.5, 6.5))
    assert found.n_points == 2 * INSIDE.sum() and found.popt[0] == pytest.approx(2, abs=0.02)
    labels = np.array([0, 1])[:, None]
    again = fit_groups(line, X, y, [1, 0], local="base", groups=labels, xrange=(3.5, 6.5))
    np.testing.assert_allclose(again.popt, found.popt)


def test_plans_of_groups_and_groups_by_label_take_it():
    y = np.stack([Y, Y + 1])
    for how in (dict(group_axes=0), dict(groups=np.array([0, 1])[:, None])):
        assert plan_fit(line, X, y, [1, 0], local="base", xrange=(3.5, 6.5), **how).n_points == y.size
        with pytest.raises(ValueError, match="no data: `xrange` has"):
            plan_fit(line, X, y, [1, 0], local="base", xrange=(11, 12), **how)


def test_the_command_line_takes_ranges(tmp_path):
    zarr.create_array(tmp_path / "y.zarr", data=Y)
    command = ["fit", str(tmp_path / "y.zarr"), "--model", "line", "--x", "0:201:1"]
    found = CliRunner().invoke(nlsq, [*command, "--xrange", "70:130"])
    assert found.exit_code == 0 and "61 points, 140 masked" in found.output
    found = CliRunner().invoke(nlsq, [*command, "--xrange", "0=70:99,0=100:130"])
    assert "61 points, 140 masked" in found.output
    for wrong, said in (
        ("energy=1:2", "the place of a coordinate"),
        ("5", "two ends with a colon"),
        ("0=1:2,3:4", "give the place"),
    ):
        found = CliRunner().invoke(nlsq, [*command, "--xrange", wrong])
        assert found.exit_code == 2 and f"--xrange {wrong}"[:12] in found.output and said in found.output


@pytest.mark.slow
def test_coordinates_have_the_names_by_which_the_model_unpacks_them():
    def model(qt, a):
        q, t = qt
        return a * q * t

    q, t = np.linspace(1, 2, 20), np.linspace(0, 5, 20)
    assert curve_fit(model, (q, t), q * t, p0=[1], xrange={"t": (0, 2)}).n_points == np.sum(t <= 2)
    maps = fit_map(model, (q, t), (q * t)[None], p0=[1], xrange={"q": (1.5, 2)}).compute()
    assert maps.n_points[0] == np.sum(q >= 1.5)
    with pytest.raises(ValueError, match="`xrange` names 'T', but the names of `xdata` are q, t"):
        curve_fit(model, (q, t), q * t, p0=[1], xrange={"T": (0, 2)})
