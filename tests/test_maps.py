"""`fit_map`: SciPy's answers, whatever the blocks and neighbours; statuses; how the data are read; errors at the door."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr
import zarr
from distributed import Client

import dask_nlsq.accessor  # noqa: F401  # registers .nlsq
from dask_nlsq import BadChunkError, MapStatus, MemoryBudgetError, MissingChunksError, fit_map, models
from dask_nlsq.parameters import read_parameters
from tests import clusters
from tests.nist import ERRORS_IN_RESIDUALS, PROBLEMS, digits, required
from tests.spectra import (
    BLOCK,
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

TIGHT = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12)
BOUNDS = ([0, -3, 0.2, -1], [20, 3, 3, 5])
NEAR = 1e-4  # standard errors
Y, TRUTH = spectra()
SLOW = pytest.mark.slow


def peak_np(x, area, center, width, offset):
    return area * np.exp(-0.5 * ((x - center) / width) ** 2) + offset


def peak_on_slope(x, height, center, width, offset, slope):
    return height / (1 + ((x - center) / width) ** 2) + offset + slope * x


def by_scipy(sigma=None, p0=P0, **options):
    """popt (*map, p) and pcov (*map, p, p), pixel by pixel."""
    popt, pcov = np.empty((*BLOCK, 4)), np.empty((*BLOCK, 4, 4))
    for place in np.ndindex(BLOCK):
        its = None if sigma is None else np.broadcast_to(sigma, Y.shape)[place]
        start = p0[place] if np.ndim(p0) > 1 else p0
        popt[place], pcov[place] = scipy.optimize.curve_fit(
            peak_np, X, Y[place], start, its, method="trf", x_scale="jac", max_nfev=5000, **TIGHT | options
        )
    return popt, pcov


def assert_near(found, popt, pcov):
    perr = np.sqrt(np.diagonal(pcov, axis1=-2, axis2=-1))
    assert np.max(np.abs(found.popt - popt) / perr) < NEAR
    assert np.max(np.abs(found.pcov - pcov) / (perr[..., None] * perr[..., None, :])) < NEAR
    np.testing.assert_allclose(found.perr, perr, rtol=NEAR)


# ---------------------------------------------------------------------------------------------------------------------
# the same answers as SciPy's

RNG = np.random.default_rng(1)
SIGMAS = {
    "none": None,
    "per point": 0.1 + 0.1 * RNG.random(N),
    "per pixel": 0.1 + 0.1 * RNG.random(BLOCK),
    "full": 0.1 + 0.1 * RNG.random((*BLOCK, N)),
}
QUICK = {("none", False), ("none", True), ("full", False)}


@pytest.mark.parametrize(
    ("kind", "bounded"),
    [pytest.param(k, b, marks=() if (k, b) in QUICK else SLOW) for k in SIGMAS for b in (False, True)],
)
def test_each_pixel_has_scipys_answer(kind, bounded):
    sigma = SIGMAS[kind]
    options = TIGHT | (dict(bounds=BOUNDS) if bounded else {})
    found = fitted(Y, sigma=sigma, full_covariance=True, **options)
    assert found.success.all()
    assert (found.n_points == N).all()
    assert_near(found, *by_scipy(sigma=sigma[..., None] if kind == "per pixel" else sigma, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "absolute_sigma"),
    [
        ("soft_l1", True),
        *(pytest.param(*each, marks=SLOW) for each in [("linear", True), ("huber", False), ("cauchy", False)]),
    ],
)
def test_losses_are_scipys(loss, absolute_sigma):
    options = dict(loss=loss, f_scale=1.3, absolute_sigma=absolute_sigma, bounds=BOUNDS, **TIGHT)
    found = fitted(Y, sigma=0.15, full_covariance=True, **options)
    assert found.success.all()
    assert_near(found, *by_scipy(sigma=0.15, **options))


@pytest.mark.slow
def test_a_loss_with_many_minima_ends_where_scipy_stays():
    options = dict(loss="arctan", f_scale=1.3, bounds=BOUNDS, **TIGHT)
    found = fitted(Y, sigma=0.15, full_covariance=True, **options)
    assert found.success.all()
    assert_near(found, *by_scipy(sigma=0.15, p0=found.popt, **options))


def test_active_bounds_are_scipys_and_told():
    bounds = ([0, -3, 0.2, 0.5], [5, 3, 1.2, 0.9])
    found = fit_map(peak, X, Y, bounds=bounds, **TIGHT).compute()
    popt, pcov = by_scipy(p0=None, bounds=bounds)
    at = np.where(popt - bounds[0] < 1e-9, -1, np.where(bounds[1] - popt < 1e-9, 1, 0))
    assert found.success.all()
    assert set(at.ravel()) == {-1, 0, 1}
    assert np.max(np.abs(found.popt - popt) / np.sqrt(np.diagonal(pcov, axis1=-2, axis2=-1))) < NEAR
    np.testing.assert_array_equal(found.at_bound, at)
    np.testing.assert_array_equal(found.status == MapStatus.AT_BOUND, at.any(axis=-1))


@pytest.mark.slow
def test_fixed_parameters_are_held_and_the_others_are_scipys():
    held, free = TRUTH[..., 1], [0, 2, 3]
    found = fit_map(peak, X, Y, dict(area=4, width=1, offset=0.5), fixed=dict(center=held), **TIGHT).compute()
    assert found.success.all()
    np.testing.assert_array_equal(found.popt[..., 1], held)
    assert (found.perr[..., 1] == 0).all()
    for place in np.ndindex(BLOCK):
        popt, pcov = scipy.optimize.curve_fit(
            lambda x, area, width, offset, center=held[place]: peak_np(x, area, center, width, offset),
            X, Y[place], [4, 1, 0.5], method="trf", x_scale="jac", **TIGHT,
        )  # fmt: skip
        assert np.max(np.abs(found.popt[place][free] - popt) / np.sqrt(np.diag(pcov))) < NEAR
        np.testing.assert_allclose(found.perr[place][free], np.sqrt(np.diag(pcov)), rtol=NEAR)


@SLOW
@pytest.mark.parametrize("start", [0.0, 1e-8, 0.01])
def test_a_parameter_far_larger_than_its_start_takes_no_more_steps(start):
    x, rng = np.linspace(-1, 1, 100), np.random.default_rng(0)
    params = [rng.uniform(*ends, (200, 1)) for ends in ((200, 2000), (-0.3, 0.3), (0.1, 0.4), (20, 80), (-10, 10))]
    y = rng.poisson(peak_on_slope(x, *params)).astype(float)
    bounds = [0, -1, 0.02, -np.inf, -np.inf], [np.inf, 1, 1, np.inf, np.inf]
    options = dict(sigma=np.sqrt(np.maximum(y, 1)), bounds=bounds)
    fits = [fit_map(peak_on_slope, x, y, [1000, 0, 0.25, 50, slope], **options).compute() for slope in (1.0, start)]
    assert all(each.success.all() for each in fits)
    assert fits[1].nfev.max() <= fits[0].nfev.max() + 3
    assert np.max(abs(fits[1].popt - fits[0].popt) / fits[0].perr) < 0.01


@pytest.mark.slow
def test_a_masked_point_is_one_that_scipy_does_not_get():
    mask = np.random.default_rng(2).random(Y.shape) < 0.2
    found = fitted(Y, mask=mask, **TIGHT)
    assert found.success.all()
    np.testing.assert_array_equal(found.n_points, N - mask.sum(axis=-1))
    same_bits(fitted(np.where(mask, np.nan, Y), **TIGHT), found)
    same_bits(fitted(np.ma.array(Y, mask=mask), **TIGHT), found)
    for place in [(0, 0), (2, 3)]:
        keep = ~mask[place]
        popt, pcov = scipy.optimize.curve_fit(peak_np, X[keep], Y[place][keep], P0, method="trf", x_scale="jac", **TIGHT)
        assert np.max(np.abs(found.popt[place] - popt) / np.sqrt(np.diag(pcov))) < NEAR


@pytest.mark.parametrize(
    "problem",
    [pytest.param(problem, id=name, marks=SLOW) for name, problem in PROBLEMS.items()],
)
def test_both_starts_reach_the_certified_digits(problem):
    tight = dict(ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=5000)
    found = fit_map(problem.model, problem.x, np.stack([problem.y] * 2), problem.starts, **tight).compute()
    wanted = required(problem)
    for k in range(2):
        errors, certified = found.perr[k], problem.errors
        if problem.name in ERRORS_IN_RESIDUALS:
            errors, certified = errors / np.sqrt(found.chi2[k] / problem.dof), certified / np.sqrt(problem.rss / problem.dof)
        near_singular = wanted.params < 9 and found.status[k] in (MapStatus.SINGULAR, MapStatus.ITERATION_LIMIT)
        assert found.success[k] or near_singular
        assert digits(found.popt[k], problem.certified) >= wanted.params or near_singular
        assert digits(errors, certified) >= wanted.errors or near_singular


# ---------------------------------------------------------------------------------------------------------------------
# the same bits whatever the blocks, the neighbours and the workers

WIDE, _ = spectra((10, 6), seed=5)


@pytest.fixture(scope="module")
def wide():
    return fitted(blocks_of(WIDE))


@pytest.mark.parametrize("rows", [pytest.param(1, marks=SLOW), 4, pytest.param(10, marks=SLOW)])
def test_bits_do_not_depend_on_the_blocks(wide, rows):
    same_bits(fitted(da.from_array(WIDE, chunks=(rows, 3, N))), wide)


def test_bits_do_not_depend_on_neighbours_or_order(wide):
    order = np.random.default_rng(1).permutation(30)
    first = (slice(0, 5),)
    pixels = WIDE[first].reshape(30, N)
    shuffled = fitted(pixels[order].reshape(Y.shape))
    for name in ("popt", "perr", "nfev", "status"):
        values = getattr(wide, name)[first].reshape(30, -1)[order]
        np.testing.assert_array_equal(getattr(shuffled, name).reshape(30, -1), values)
    mixed = WIDE[first].copy()
    mixed[::2] = 1e3 * np.random.default_rng(3).random((3, 6, N))  # other neighbours, that take other numbers of steps
    same_bits(fitted(mixed), wide, where=(slice(1, 5, 2),))


@pytest.mark.slow
def test_bits_do_not_depend_on_the_turn_in_which_a_pixel_comes(wide):
    """More pixels than lanes: they are compacted, and lanes given new pixels, at places that depend on all others."""
    many = spectra((700,), seed=6)[0].copy()
    places = np.random.default_rng(4).choice(700, 60, replace=False)
    many[places] = WIDE.reshape(60, N)
    found = fitted(many)
    for name in ("popt", "perr", "chi2", "nfev", "status"):
        values = getattr(found, name)[places]
        np.testing.assert_array_equal(values, getattr(wide, name).reshape(values.shape))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_bits_do_not_depend_on_the_threads(wide, n_threads):
    with dask.config.set(num_workers=n_threads):
        same_bits(fitted(blocks_of(WIDE)), wide)


def test_bits_do_not_depend_on_the_place_of_the_fit_axis(wide, tmp_path):
    turned = np.ascontiguousarray(np.moveaxis(WIDE, -1, 0))
    same_bits(fitted(da.from_array(turned, chunks=(-1, *BLOCK)), axis=0), wide)
    for name, chunks in dict(whole=(N, *BLOCK), cut=(7, *BLOCK)).items():
        zarr.create_array(tmp_path / name, shape=turned.shape, chunks=chunks, dtype="f8")[...] = turned
        same_bits(fitted(tmp_path / name, axis=0), wide)
    middle = np.moveaxis(WIDE, -1, 1)
    same_bits(fitted(da.from_array(middle, chunks=(5, -1, 6)), axis=1), wide)


def test_two_fit_axes_are_one_longer_one(wide):
    folded = WIDE.reshape(10, 6, 4, N // 4)
    found = fit_map(peak, X.reshape(4, -1), da.from_array(folded, chunks=(*BLOCK, -1, -1)), P0, axis=(2, -1)).compute()
    same_bits(found, wide)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_workers(wide):
    with clusters.local(2) as cluster, Client(cluster):
        same_bits(fitted(blocks_of(WIDE)), wide)


@pytest.mark.slow
def test_a_single_spectrum_is_a_map_without_axes(wide):
    found = fitted(WIDE[3, 2])
    assert found.popt.shape == (4,)
    np.testing.assert_array_equal(found.popt, wide.popt[3, 2])
    assert found.status == wide.status[3, 2]


# ---------------------------------------------------------------------------------------------------------------------
# pixels that cannot be fitted


def test_spoiled_pixels_have_statuses_and_spoil_no_other():
    sound = fitted(Y)
    spoiled = Y.copy()
    spoiled[0, 0] = np.nan
    spoiled[0, 1, 7] = np.inf
    spoiled[0, 2] = 0
    spoiled[0, 3] = 2.5
    spoiled[0, 4, 3:] = np.nan
    spoiled[0, 5] = 1e300
    spoiled[1, 0, 5:] = -np.inf
    found = fitted(spoiled)
    same_bits(found, sound, where=(slice(2, 5),))
    same_bits(found, sound, where=(1, slice(1, 6)))
    status = dict(zip(("nan", "inf", "zero", "constant", "few", "huge"), found.status[0], strict=True))
    assert status["nan"] == MapStatus.MASKED
    assert status["inf"] in range(1, 6)
    assert status["few"] == MapStatus.TOO_FEW_POINTS
    assert status["huge"] in (MapStatus.NON_FINITE, MapStatus.SINGULAR, MapStatus.ITERATION_LIMIT)
    np.testing.assert_array_equal(found.n_points[0], [0, N - 1, N, N, 3, N])
    assert found.n_points[1, 0] == 5
    for place in [(0, 0), (0, 4), (0, 5)]:
        assert np.isnan(found.popt[place]).all()
        assert np.isnan(found.perr[place]).all()
        assert np.isnan(found.chi2[place])
        assert not found.success[place]
    np.testing.assert_allclose(found.popt[0, 2:4, 0], 0, atol=1e-12)
    np.testing.assert_allclose(found.popt[0, 2:4, 3], [0, 2.5], atol=1e-12)


def test_the_place_of_a_peak_without_height_is_not_determined():
    flat = Y.copy()
    flat[0, 2], flat[0, 3] = 0, 2.5
    found = fitted(flat)
    assert (found.status[0, 2:4] == MapStatus.UNDETERMINED).all()
    assert np.isinf(found.perr[0, 2:4, 1:3]).all()


@pytest.mark.slow
def test_saturated_values_of_a_store_do_not_count(tmp_path):
    counts = np.random.default_rng(7).poisson(np.clip(300 * Y, 0, None)).astype("u2")
    counts[1, 2] = 65535
    counts[2, 2, :10] = 65535
    zarr.create_array(tmp_path / "y", shape=counts.shape, chunks=counts.shape, dtype="u2")[...] = counts
    found = fit_map(peak, X, tmp_path / "y", [1200, 0.3, 1, 150]).compute()
    assert found.status[1, 2] == MapStatus.MASKED
    assert found.n_points[2, 2] == N - 10
    others = np.ones(BLOCK, bool)
    others[1, 2] = others[2, 2] = False
    assert found.success[others].all()
    whole = fit_map(peak, X, np.where(counts == 65535, np.nan, counts), [1200, 0.3, 1, 150]).compute()
    np.testing.assert_allclose(found.popt[others], whole.popt[others], rtol=1e-5)


def test_fewer_points_than_free_parameters_is_a_status():
    mask = np.ones(Y.shape, bool)
    mask[1:, :, [10, 20, 30]] = False
    found = fitted(Y, mask=mask)
    assert (found.status[0] == MapStatus.MASKED).all()
    assert (found.status[1:] == MapStatus.TOO_FEW_POINTS).all()


def test_starts_that_are_not_finite_are_a_status():
    starts = np.broadcast_to(P0, TRUTH.shape).copy()
    starts[2, 3, 0] = starts[0, 1] = np.nan
    y = Y.copy()
    y[0, 1] = np.nan
    found = fit_map(peak, X, y, starts).compute()
    assert found.status[2, 3] == MapStatus.NON_FINITE
    assert found.status[0, 1] == MapStatus.MASKED
    assert np.sum(~found.success) == 2
    assert np.isnan(found.popt[2, 3]).all()


# ---------------------------------------------------------------------------------------------------------------------
# the fit axis in many chunks: each is read once where it fits

STACK = np.ascontiguousarray(np.moveaxis(spectra((20, 6), seed=8)[0], -1, 0))


@pytest.mark.slow
def test_one_chunk_per_energy_is_read_once(tmp_path):
    y, reads = counted(tmp_path / "y", STACK, (1, 20, 6))
    found = fit_map(peak, X, y, P0, axis=0)
    assert not reads
    assert found.plan.n_bands == 1
    assert found.plan.read_bytes == STACK.nbytes
    expected = fitted(da.from_array(STACK, chunks=(-1, 20, 6)), axis=0)
    same_bits(found.compute(), expected)
    assert len(reads) == N
    assert set(reads.values()) == {1}


def test_bands_read_each_chunk_once_each(tmp_path, monkeypatch):
    y, reads = counted(tmp_path / "y", STACK, (1, 20, 6))
    limit = limit_of_two_bands(monkeypatch, y)
    found = fit_map(peak, X, y, P0, axis=0, memory_limit_gb=limit)
    assert found.plan.n_bands == 2
    assert "in 2 bands" in str(found.plan)
    assert found.plan.read_bytes == 2 * STACK.nbytes
    assert found.plan.peak_bytes <= limit * 2**30
    computed = found.compute()
    assert set(reads.values()) == {2}
    same_bits(computed, fitted(da.from_array(STACK, chunks=(-1, 20, 6)), axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("n_bands", [pytest.param(1, marks=SLOW), 2])
def test_coarse_fits_read_the_data_once_more(tmp_path, monkeypatch, n_bands):
    y, reads = counted(tmp_path / "y", STACK, (1, 20, 6))
    limit = limit_of_two_bands(monkeypatch, y) if n_bands == 2 else None
    found = fit_map(peak, X, y, P0, axis=0, guess="coarse-to-fine", memory_limit_gb=limit)
    assert found.plan.n_bands == n_bands
    assert found.plan.read_bytes == (1 + found.plan.n_bands) * STACK.nbytes
    computed = found.compute()
    assert set(reads.values()) == {1 + found.plan.n_bands}
    reads.clear()
    found.to_zarr(tmp_path / "m")
    assert set(reads.values()) == {1 + found.plan.n_bands}
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "m" / "popt", mode="r")[...], computed.popt)


def test_what_cannot_be_joined_in_memory_is_refused(monkeypatch):
    stack = da.from_array(STACK, chunks=(1, -1, -1))
    limit = limit_of_two_bands(monkeypatch, stack)
    with pytest.raises(MemoryBudgetError, match='strategy="auto"'):
        fit_map(peak, X, stack, P0, axis=0, memory_limit_gb=limit, strategy="chunked")


@pytest.mark.parametrize("chunks", [(3, 4, 16), (3, 4, 32), (6, 2, 16)])
@pytest.mark.parametrize("strategy", ["auto", "chunked"])
def test_the_way_out_of_too_little_memory_is_a_limit_that_suffices(chunks, strategy):
    cube, x = da.ones((6, 4, 32), chunks=chunks), np.linspace(9, 11, 32)
    with pytest.raises(MemoryBudgetError) as caught:
        fit_map(peak, x, cube, P0, memory_limit_gb=0.2, strategy=strategy)
    named = re.search(r": raise memory_limit_gb to ([\d.]+)$", str(caught.value))  # any map takes more than 0.2 GiB
    plan = fit_map(peak, x, cube, P0, memory_limit_gb=float(named[1]), strategy=strategy).plan
    assert plan.n_pixels == 24
    with pytest.raises(MemoryBudgetError):
        fit_map(peak, x, cube, P0, memory_limit_gb=0.9 * float(named[1]), strategy=strategy)


def test_large_chunks_of_a_map_are_to_be_made_smaller_where_that_helps():
    cube, x = da.ones((400, 500, 1000), chunks=(200, 500, 1000)), np.linspace(9, 11, 1000)
    with pytest.raises(MemoryBudgetError, match=r"raise memory_limit_gb to [\d.]+, or rechunk the map axes"):
        fit_map(peak, x, cube, P0, memory_limit_gb=1)
    cut = cube.rechunk((400, 500, 250))
    with pytest.raises(MemoryBudgetError, match=r"raise memory_limit_gb to [\d.]+, or rechunk .* the fit axes do not cut"):
        fit_map(peak, x, cut, P0, memory_limit_gb=1, strategy="standard")


# ---------------------------------------------------------------------------------------------------------------------
# errors at the door

DX = xr.DataArray(Y, dims=("row", "column", "energy"), coords=dict(energy=X))


def by_branch(x, area, center, width, offset):
    return area if x > 0 else offset


def with_numpy(x, area, center, width, offset):
    return area * np.exp(-x) + offset


def not_pointwise(x, area, center, width, offset):
    return area * x / jnp.sum(x**2) + offset


HALF_MASKED = np.ma.masked_greater(TRUTH[..., 0], 4.5)
BAD = {
    "axis too large": (dict(axis=3), ValueError, "`axis`.*3"),
    "axis twice": (dict(axis=(2, -1)), ValueError, "`axis`.*different"),
    "axis by name": (dict(axis="energy"), ValueError, "`axis` 'energy' is not a dimension.*no names"),
    "axis is no number": (dict(axis=1.5), ValueError, "`axis`.*1.5"),
    "axis of xarray": (dict(ydata=DX, axis="energie"), ValueError, "`axis` 'energie'.*row"),
    "axis of xarray, too large": (dict(ydata=DX, axis=5), ValueError, "`axis`.*5"),
    "x too short": (dict(xdata=X[:-1]), ValueError, r"`xdata`.*39"),
    "x by an unknown name": (dict(ydata=DX, axis="energy", xdata="enrgy"), ValueError, "`xdata` 'enrgy'.*energy"),
    "x of no coordinate": (dict(ydata=DX, axis="column", xdata=None), ValueError, "`xdata` None.*'column'.*energy"),
    "p0 map": (dict(p0=np.ones((6, 5, 4))), ValueError, r"`p0 of area`.*\(5, 6\).*\(6, 5\)"),
    "p0 too long": (dict(p0=[1, 2, 3, 4, 5]), ValueError, "`p0` has 5 values.*takes 4"),
    "p0 a number": (dict(p0=3.0), ValueError, "`p0`.*3.0"),
    "p0 text": (dict(p0="abcd"), ValueError, "`p0` must be numbers or 'guess', not 'abcd'"),
    "p0 unknown name": (dict(p0=dict(aera=1)), ValueError, "`p0` names 'aera'.*did you mean 'area'"),
    "p0 lacks a name": (dict(p0=dict(area=1)), ValueError, "`p0` has no 'center'"),
    "p0 not finite": (dict(p0=[1, np.nan, 1, 1]), ValueError, "`p0` must be finite: center"),
    "p0 outside": (dict(bounds=([5, -3, 0, 0], 9)), ValueError, "outside.*area = 4.0"),
    "p0 dict map": (dict(p0=dict(area=np.ones(5), center=0, width=1, offset=0)), ValueError, r"`p0 of area`.*\(5, 6\)"),
    "bounds crossed": (dict(bounds=dict(width=(2, 1))), ValueError, "width has"),
    "bounds unknown name": (dict(bounds=dict(widht=(0, 1))), ValueError, "`bounds` names 'widht'.*'width'"),
    "bounds too short": (dict(bounds=([0, 0], [1, 1])), ValueError, r"`bounds\[0\]` has 2 values"),
    "bounds map": (dict(bounds=dict(width=(0, np.ones(6)))), ValueError, r"`bounds of width`.*\(6,\)"),
    "p0 masked": (dict(p0=[HALF_MASKED, 0, 1, 1]), ValueError, "`p0 of area` is a masked array.*fill"),
    "bounds masked": (dict(bounds=dict(width=(0, HALF_MASKED))), ValueError, "`bounds of width` is a masked array"),
    "bounds no pair": (dict(bounds=3), ValueError, "`bounds` must be a pair"),
    "fixed unknown": (dict(fixed=dict(widht=1)), ValueError, "`fixed` names 'widht'"),
    "fixed all": (dict(fixed=dict.fromkeys(NAMES, 1.0)), ValueError, "`fixed` holds all"),
    "fixed map": (dict(fixed=dict(width=np.ones(7))), ValueError, r"`fixed\['width'\]`.*\(7,\)"),
    "names": (dict(param_names=["a", "b"]), ValueError, "must be 4 different names"),
    "names twice": (dict(param_names=["a", "b", "c", "a"]), ValueError, "`param_names` must be different"),
    "sigma shape": (dict(sigma=np.ones(7)), ValueError, r"`sigma` of shape \(7,\) does not fit"),
    "sigma ambiguous": (dict(ydata=np.ones((N, N)), sigma=np.ones(N)), ValueError, r"fits `ydata` .* in several ways: give"),
    "mask shape": (dict(mask=np.ones((6, 5), bool)), ValueError, r"`mask` of shape \(6, 5\)"),
    "sigma text": (dict(sigma="wide"), (TypeError, FileNotFoundError), "`sigma`.*wide"),
    "guess wrong name": (dict(guess="neighbours"), ValueError, "`guess`.*coarse-to-fine"),
    "guess of two": (dict(p0=lambda x, y: (y.max(), 0.0)), ValueError, "`p0` is the function.*2 values.*4 parameters"),
    "guess with NumPy": (dict(p0=lambda x, y: [float(y.max()), 0, 1, 0]), TypeError, "jax.numpy"),
    "guess on own x": (dict(xdata=np.broadcast_to(X, Y.shape), guess="coarse-to-fine"), ValueError, "xdata that all"),
    "no model": (dict(f=3), TypeError, "fit_map needs a model"),
    "model branches": (dict(f=by_branch), TypeError, "by_branch.*jnp.where"),
    "model with NumPy": (dict(f=with_numpy), TypeError, "with_numpy.*jax.numpy"),
    "model not pointwise": (dict(f=not_pointwise), ValueError, "not_pointwise is not pointwise"),
    "empty": (dict(ydata=np.ones((0, 4, N))), ValueError, "`ydata` must not be empty"),
    "complex": (dict(ydata=Y + 0j), TypeError, "`ydata` has dtype complex"),
    "loss": (dict(loss="quadratic"), ValueError, "`loss`.*'quadratic'"),
    "nan_policy": (dict(nan_policy="propagate"), ValueError, "`nan_policy`"),
    "max_nfev": (dict(max_nfev=0), ValueError, "`max_nfev`"),
    "ftol": (dict(ftol=-1), ValueError, "`ftol`"),
    "strategy": (dict(strategy="fast"), ValueError, "`strategy`.*'fast'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_error_that_names_them(name):
    changed, error, message = BAD[name]
    arguments = dict(f=peak, xdata=X, ydata=Y, p0=P0) | changed
    with pytest.raises(error, match=message):
        fit_map(**arguments)


PLACES = np.arange(30).reshape(BLOCK)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(sigma=np.where(np.arange(N) == 3, 0.0, 1.0)), "`sigma` must be positive"),
        (dict(ydata=np.where(Y > 4, np.nan, Y), nan_policy="raise"), "nan or infinity.*`ydata`"),
        (dict(bounds=dict(width=(0, da.from_array(TRUTH[..., 1])))), "Each lower bound"),
        (dict(bounds=dict(width=(0, TRUTH[..., 1]))), "Each lower bound.*width has"),
        (dict(bounds=dict(width=(0, np.where(PLACES == 13, 0.0, 9.0)))), r"width has \[0.0, 0.0\] in pixel \(2, 1\)"),
        (dict(bounds=dict(width=(np.where(PLACES == 29, np.nan, 0.0), 9))), r"width has \[nan, 9.0\] in pixel \(4, 5\)"),
        (dict(sigma=np.where(PLACES == 13, 0.0, 1.0)), r"`sigma` must be positive.*in pixel \(2, 1\)"),
        (dict(ydata=np.where(PLACES[..., None] == 13, -1.0, 1.0 + 0 * Y), loss="poisson"), r"negative in pixel \(2, 1\)"),
        (dict(ydata=np.where(PLACES[..., None] == 13, np.inf, Y), nan_policy="raise"), r"first in pixel \(2, 1\)"),
    ],
    ids=["sigma", "nan", "lazy bounds", "bounds", "equal", "nan bounds", "sigma of a pixel", "counts", "infinity"],
)
def test_bad_values_are_an_error_when_they_are_met(changed, message):
    found = fit_map(**dict(f=peak, xdata=X, ydata=Y, p0=P0) | changed)
    with pytest.raises(ValueError, match=message):
        found.compute()


def test_bounds_over_the_map_have_a_start_within():
    bounds = dict(area=(0, None), center=(-2, TRUTH[..., 0]), width=(None, da.from_array(TRUTH[..., 2])))
    call = SimpleNamespace(expr=None, p0=None, bounds=bounds, param_names=None, fixed=None)
    start = read_parameters(peak, call, BLOCK).start
    assert start[0] == 1
    np.testing.assert_allclose(start[1], (TRUTH[..., 0] - 2) / 2)
    np.testing.assert_array_equal(start[2].compute(), TRUTH[..., 2] - 1)
    assert start[3] == 1


@pytest.mark.parametrize(
    "options, error",
    [(dict(fixed={"bg": 3}), "`fixed` names 'bg', the parameters are"), (dict(fixed=["base"]), "must be a dict of values")],
)
def test_fixed_parameters_that_are_none_are_refused(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        fit_map(peak, X, np.ones((2, N)), P0, **options)


def test_a_pixel_is_named_by_its_place_in_the_map_whatever_its_block_and_band(monkeypatch):
    stack, sigma = da.from_array(STACK, chunks=(1, -1, -1)), np.ones(STACK.shape[1:])
    sigma[13, 5] = 0
    found = fit_map(peak, X, stack, P0, axis=0, sigma=sigma, memory_limit_gb=limit_of_two_bands(monkeypatch, stack))
    assert len(found.problem.bands) == 2
    with pytest.raises(ValueError, match=r"in pixel \(13, 5\)"):
        found.popt[13, 5].compute()


@pytest.mark.slow
def test_bounds_and_sigma_of_pixels_without_points_need_not_make_sense():
    hidden = PLACES % 7 == 3
    upper = np.where(hidden, np.where(PLACES % 2, 0.0, np.nan), 9.0)
    masked, no_mask = hidden[..., None] & np.ones(N, bool), np.zeros(Y.shape, bool)
    nowhere = np.where(hidden[..., None], np.nan, Y)

    def fit(y, mask, sigma, upper):
        return fitted(y, mask=mask, sigma=sigma, bounds=dict(width=(0, upper)), **TIGHT)

    expected = fit(Y, masked, np.ones(BLOCK), np.full(BLOCK, 9.0))
    assert (expected.status[hidden] == MapStatus.MASKED).all()
    same_bits(fit(Y, masked, np.where(hidden, 0.0, 1.0), upper), expected)
    same_bits(fit(nowhere, no_mask, np.ones(BLOCK), upper), expected)


@pytest.mark.slow
def test_values_that_are_no_data_are_no_negative_counts():
    counts = np.round(100 * np.abs(Y)).astype("i4")
    counts[1, 2, 7:9] = -1
    found = fit_map(peak, X, counts, [400, 0, 1, 30], loss="poisson", mask_values=[-1]).compute()
    assert found.n_points[1, 2] == N - 2


@pytest.mark.slow
def test_bounds_may_be_arrays_for_some_parameters_and_numbers_for_others():
    low = TRUTH[..., 0] - 1
    found = fitted(Y, bounds=([low, -3, 0, -9], [1e4, 3, 9, 9]), **TIGHT)
    expected = fitted(Y, bounds=dict(area=(low, 1e4), center=(-3, 3), width=(0, 9), offset=(-9, 9)), **TIGHT)
    same_bits(found, expected)


@pytest.mark.slow
def test_bounds_may_be_arrays_where_a_ready_model_guesses():
    low = TRUTH[..., 0] - 1
    ready = fit_map(models.gaussian, X, Y, bounds=([low, -3, 0], [1e4, 3, 9])).compute()
    assert np.isfinite(ready.popt).all()


@pytest.mark.parametrize("shape, lazy", [((1,), False), ((1, 1), True), ((30, 1), True), ((1, 30), False)])
def test_maps_with_axes_of_length_1(shape, lazy):
    n = int(np.prod(shape))
    y = Y.reshape(-1, N)[:n].reshape(*shape, N)
    found = fitted(da.from_array(y, chunks=-1) if lazy else y, **TIGHT)
    assert found.popt.shape == (*shape, 4)
    expected = fitted(Y, **TIGHT).popt.reshape(-1, 4)[:n].reshape(*shape, 4)
    np.testing.assert_allclose(found.popt, expected, rtol=1e-7)


@pytest.mark.slow
def test_integer_coordinates_of_a_tuple_may_index_a_table():
    def indexed(x, *params):
        return peak(jnp.asarray(X)[x[0]], *params)

    found = fit_map(indexed, (np.arange(N),), Y, P0, param_names=NAMES, **TIGHT).compute()
    np.testing.assert_allclose(found.popt, fitted(Y, **TIGHT).popt, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# what chunks and masks hold


@pytest.mark.parametrize("name", ["ydata", "xdata", "sigma", "mask"])
def test_a_chunk_of_another_shape_than_declared_is_an_error(name):
    arrays = dict(ydata=Y, xdata=np.broadcast_to(X, Y.shape), sigma=np.ones(Y.shape), mask=np.zeros(Y.shape, bool))
    for change in (lambda b: b[:, :, :-1], lambda b: b[:1], lambda b: b.swapaxes(0, 1)):
        array = da.from_array(arrays[name], chunks=(5, 3, 20))
        lie = array.map_blocks(change, dtype=array.dtype, chunks=array.chunks, meta=np.empty((0, 0, 0), array.dtype))
        with pytest.raises(ValueError, match=rf"chunk \(\d, \d, \d\) of `{name}.* has shape .*was declared"):
            fit_map(peak, **arrays | {name: lie}, p0=P0).compute()


MASKED_KINDS = {
    "numpy": lambda a, hidden: np.ma.masked_array(a, hidden),
    "dask": lambda a, hidden: da.ma.masked_array(da.from_array(a), da.from_array(hidden)),
    "list": lambda a, hidden: list(np.ma.masked_array(a, hidden)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [("own x", "dask"), ("y", "numpy"), ("sigma of the map", "dask"),
     *(pytest.param(*each, marks=SLOW) for each in [("x", "numpy"), ("y", "list"), ("y", "dask"), ("sigma", "list")])],
)  # fmt: skip
def test_masks_travel_with_every_array_that_has_one(name, kind):
    rng = np.random.default_rng(3)
    array = {"x": X, "sigma of the map": np.ones(BLOCK)}.get(name, Y)
    array = {"own x": np.broadcast_to(X, Y.shape), "sigma": np.ones(Y.shape)}.get(name, array)
    hidden = rng.random(array.shape) < 0.2
    given = MASKED_KINDS[kind](np.where(hidden, 1e4, array), hidden)
    argument = {"x": "xdata", "own x": "xdata", "y": "ydata"}.get(name, "sigma")
    found = fit_map(peak, **dict(xdata=X, ydata=Y, p0=P0, **TIGHT) | {argument: given}).compute()
    mask = np.broadcast_to(hidden[..., None] if name == "sigma of the map" else hidden, Y.shape)
    expected = fitted(Y, mask=mask, **TIGHT)
    np.testing.assert_array_equal(found.n_points, expected.n_points)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-8)


@pytest.mark.slow
def test_coordinates_and_errors_may_lie_along_some_of_the_fit_axes():
    """And along the map: x and sigma have y's axes, of length 1 where they do not vary."""
    k, i, j = np.arange(3)[:, None, None], np.arange(8.0)[None, :, None], np.arange(6.0)[None, None, :]

    def plane(x, a, b, c):
        return a * x[1] + b * x[2] + c * x[0]

    y, sigma = np.asarray(plane((k, i, j), 1.0, 2.0, 3.0)) + np.cos(7 * i + j), 1 + i + 0 * k
    found = fit_map(plane, (k + 0.0, i, j), y, [1, 1, 1], axis=(1, 2), sigma=sigma).compute()
    full = np.broadcast_arrays(k + 0.0, i, j)
    expected = fit_map(plane, tuple(full), y, [1, 1, 1], axis=(1, 2), sigma=np.broadcast_to(sigma, y.shape)).compute()
    np.testing.assert_array_equal(found.n_points, 48)
    np.testing.assert_allclose(found.popt[1:], expected.popt[1:], rtol=1e-9)


@pytest.mark.parametrize("name", ["p0", "bounds", "fixed"])
def test_starts_and_bounds_are_compared_with_what_they_declare(name):
    plane = da.from_array(TRUTH[..., 2], chunks=(3, 3))
    lie = plane.map_blocks(lambda b: b[:, :2], dtype=float, chunks=plane.chunks, meta=np.empty((0, 0)))
    call = dict(
        p0=dict(p0=dict(zip(NAMES, [4, 0, lie, 0], strict=True))),
        bounds=dict(p0=P0, bounds=dict(width=(0, lie))),
        fixed=dict(p0=P0, fixed=dict(width=lie)),
    )[name]
    with pytest.raises(ValueError, match=r"chunk \(\d, \d\) of `.*width.*` has shape \(\d, 2\), but shape"):
        fit_map(peak, X, Y, **call).compute()


@pytest.mark.slow
def test_a_shared_coordinate_that_is_not_finite_is_told():
    x = np.where(np.arange(N) % 20 == 3, np.nan, X)
    with pytest.warns(RuntimeWarning, match="2 of 40 points are left out of every pixel.*`xdata`"):
        found = fit_map(peak, x, Y, P0, **TIGHT)
    same_bits(found.compute(), fit_map(peak, x, Y, P0, mask=np.isnan(x), **TIGHT).compute())  # told by the mask: no warning
    with pytest.warns(RuntimeWarning, match="1 of 40 points"):
        fit_map(peak, x, Y, P0, mask=np.arange(N) == 3)
    with pytest.raises(ValueError, match="2 of the 40 values of `xdata`, which all pixels share"):
        fit_map(peak, x, Y, P0, nan_policy="raise")
    fit_map(peak, x, Y, P0, nan_policy="raise", mask=np.isnan(x), **TIGHT).compute()
    with pytest.warns(RuntimeWarning, match="2 of 40 points"):
        DX.assign_coords(energy=x).nlsq.curvefit("energy", peak, p0=dict(zip(NAMES, P0, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# stores that are damaged or incomplete


def damaged(tmp_path):
    """A store of Y in chunks of 2 x 6 x 20, of which one is truncated and one absent."""
    stored = zarr.create_array(
        tmp_path / "y", shape=Y.shape, dtype=float, chunks=(2, 6, 20), config={"write_empty_chunks": True}
    )
    stored[...] = Y
    (tmp_path / "y/c/0/0/1").write_bytes((tmp_path / "y/c/0/0/1").read_bytes()[:20])
    (tmp_path / "y/c/2/0/0").unlink()
    hidden = np.zeros(Y.shape, bool)
    hidden[:2, :, 20:] = hidden[4:, :, :20] = True
    return hidden


def test_damaged_and_absent_chunks_are_errors_that_name_them(tmp_path):
    damaged(tmp_path)
    with pytest.raises(MissingChunksError, match=r"1 of 6 chunks.*\(2, 0, 0\)"):
        fit_map(peak, X, tmp_path / "y", P0)
    with pytest.raises(BadChunkError, match=r"chunk \(0, 0, 1\) of `ydata`"):
        fit_map(peak, X, tmp_path / "y", P0, missing_chunks="mask").compute()
    with pytest.raises(ValueError, match="`missing_chunks` must be one of"):
        fit_map(peak, X, tmp_path / "y", P0, missing_chunks="omit")


@pytest.mark.parametrize("guess", [None, pytest.param("coarse-to-fine", marks=SLOW)])
def test_damaged_and_absent_chunks_may_be_left_out(tmp_path, guess, caplog):
    hidden = damaged(tmp_path)
    options = dict(on_bad_chunk="mask", missing_chunks="mask", guess=guess, **TIGHT)
    found = fit_map(peak, X, tmp_path / "y", P0, **options).compute()
    expected = fit_map(peak, X, Y, P0, mask=hidden, guess=guess, **TIGHT).compute()
    np.testing.assert_array_equal(found.n_points, expected.n_points)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-5)
    assert "left out: chunk (0, 0, 1) of `ydata`" in caplog.text


def test_absent_chunks_may_mean_fill_values(tmp_path):
    damaged(tmp_path)
    options = dict(on_bad_chunk="mask", missing_chunks="fill", **TIGHT)
    found = fit_map(peak, X, tmp_path / "y", P0, **options).compute()
    expected = Y.copy()
    expected[4:, :, :20] = 0
    np.testing.assert_array_equal(found.popt[2:], fitted(expected, **TIGHT).popt[2:])
    assert (found.n_points[:2] == 20).all()


@pytest.mark.slow
def test_threads_of_maps_and_groups_compute_on_the_callers_device():
    """With three devices in one process; the caller has chosen the last one."""
    script = """
import jax, numpy as np, dask.array as da, jax.numpy as jnp
from dask_nlsq import fit_groups, fit_map
from dask_nlsq.groups import sweep
from dask_nlsq.kernels import tries

seen = set()
def spied(module, name):
    build = getattr(module, name)
    def kernel(*args):
        run = build(*args)
        def call(*args):
            found = run(*args)
            seen.update(*(each.devices() for each in jax.tree.leaves(found)))
            return found
        return call
    setattr(module, name, kernel)
spied(tries, "map_kernel"), spied(sweep, "group_kernel")

def decay(t, amplitude, rate):
    return amplitude * jnp.exp(-rate * t)
t = np.linspace(0, 3, 20)
y = da.from_array(np.arange(1, 9)[:, None] * np.exp(-t), chunks=(2, 20))
for device in jax.devices()[::2]:
    with jax.default_device(device):
        fit_map(decay, t, y, [1, 0.5], axis=1).compute(progress=False)
        assert seen == {device}, seen
        fit_groups(decay, t, y, [1, 0.5], local="amplitude", group_axes=0)
        assert seen == {device}, seen
    seen.clear()
print("done")
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert run.stdout.strip() == "done", run.stderr


@pytest.mark.slow
def test_chunks_of_a_pixel_are_joined_to_blocks():
    y = np.random.default_rng(0).normal(size=(20, 15, 16))
    x = np.linspace(0, 1, 16)

    def line(x, a, b):
        return a + b * x

    one, many = (fit_map(line, x, da.from_array(y, chunks), [0, 1], axis=2) for chunks in ((20, 15, 16), (1, 1, 16)))
    assert many.plan.n_blocks == 1
    np.testing.assert_array_equal(one.compute(progress=False).popt, many.compute(progress=False).popt)


OSCILLATORS = """
import dask.array as da, jax.numpy as jnp, numpy as np
from dask_nlsq import fit_map

def upper(x, coupling, scale):
    H = jnp.diag(jnp.linspace(0.0, 1.0, 12)) + x[..., None, None] * coupling * (jnp.eye(12, k=1) + jnp.eye(12, k=-1))
    return scale * jnp.linalg.eigvalsh(H)[..., -1]

x = np.linspace(0, 3, 300)
y = da.from_array(np.tile(2 * np.array(upper(x, 1.3, 1.0)), (64, 1)), chunks=(16, 300))
found = fit_map(upper, x, y, p0=[1.0, 1.0]).compute(scheduler="threads", num_workers=2)
np.testing.assert_allclose(found.popt, np.tile([1.3, 2.0], (64, 1)), rtol=1e-5)
"""


@pytest.mark.slow
def test_a_model_that_calls_lapack_for_each_point_does_not_hang_where_as_many_blocks_are_fitted_as_jax_has_threads():
    root, environment = Path(__file__).parent.parent, os.environ | {"PJRT_NPROC": "2"}
    run = subprocess.run(
        [sys.executable, "-c", OSCILLATORS], capture_output=True, text=True, env=environment, cwd=root, timeout=60
    )
    assert run.returncode == 0, run.stderr
