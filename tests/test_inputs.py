"""Any kind of array, any chunks: the same problem."""

import gc
import pickle
from itertools import product

import dask
import dask.array as da
import dask.bag
import h5py
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xarray as xr
import zarr

from dask_nlsq import clear_memory_pool, curve_fit, fit_map, get_memory_manager, load, plan_fit, resume
from dask_nlsq.data.align import build_data
from dask_nlsq.data.chunks import merge_censuses, prepare_chunk, release
from dask_nlsq.data.loading import PassedOn, plan_loads
from dask_nlsq.engine.partition import load_chunk
from dask_nlsq.kernels.kind import CPU

N = 999
RNG = np.random.default_rng(7)
X = np.linspace(0, 5, N)
Y = 2 * np.exp(-0.7 * X) + 0.3 + RNG.normal(0, 0.05, N)
TIGHT = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


@pytest.fixture(scope="module")
def reference():
    return curve_fit(decay, X, Y, **TIGHT)


def in_zarr(array, path):
    stored = zarr.create_array(store=path / "a.zarr", shape=array.shape, dtype=array.dtype, chunks=(100,), shards=(300,))
    stored[:] = array
    return stored


def in_hdf5(array, path):
    return h5py.File(path / "a.h5", "w").create_dataset("a", data=array, chunks=(130,))


KINDS = {
    "numpy": lambda a, path: a,
    "list": lambda a, path: a.tolist(),
    "jax": lambda a, path: dask.compute(jnp.asarray(a, dtype=jnp.float32))[0],
    "pandas": lambda a, path: pd.Series(a),
    "pandas array": lambda a, path: pd.array(a),
    "dask": lambda a, path: da.from_array(a, chunks=77),
    "dask ragged": lambda a, path: da.from_array(a, chunks=((1, 500, 0, 398, 100),)),
    "zarr": in_zarr,
    "hdf5": in_hdf5,
    "xarray": lambda a, path: xr.DataArray(a, dims="t"),
    "xarray dask": lambda a, path: xr.DataArray(a, dims="t").chunk(t=200),
    "memory map": lambda a, path: mapped(a, path),
    "big endian": lambda a, path: a.astype(">f8"),
}


def mapped(array, path):
    np.save(path / "a.npy", array)
    return np.load(path / "a.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "kind_x, kind_y",
    [*(("numpy", kind) for kind in KINDS), ("dask", "numpy"), ("zarr", "numpy"), ("dask", "zarr"), ("zarr", "dask ragged")],
)
def test_any_mix_of_kinds_gives_the_same_fit(kind_x, kind_y, reference, tmp_path):
    (tmp_path / "x").mkdir()
    found = curve_fit(decay, KINDS[kind_x](X, tmp_path / "x"), KINDS[kind_y](Y, tmp_path), **TIGHT)
    distance = np.abs(found.popt - reference.popt) / reference.perr
    assert distance.max() < (1e-5 if kind_y == "jax" else 1e-9)  # float32 there
    assert found.n_points == N


@pytest.mark.parametrize("kind", ["dask", "zarr", "hdf5"])
def test_sigma_and_mask_of_other_kinds_follow(kind, tmp_path):
    sigma, mask = RNG.uniform(1, 2, N), RNG.random(N) < 0.1
    (tmp_path / "m").mkdir()
    expected = curve_fit(decay, X[~mask], Y[~mask], sigma=sigma[~mask], **TIGHT)
    found = curve_fit(decay, X, Y, sigma=KINDS[kind](sigma, tmp_path), mask=KINDS[kind](mask, tmp_path / "m"), **TIGHT)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert found.n_masked == mask.sum()


def test_a_masked_array_is_masked(reference):
    y = np.ma.array(np.append(Y, 1e6), mask=np.arange(N + 1) == N)
    found = curve_fit(decay, np.append(X, 5.0), y, **TIGHT)
    np.testing.assert_allclose(found.popt, reference.popt, rtol=1e-10)
    assert found.n_masked == 1


def test_building_a_problem_reads_nothing():
    def forbidden(dsk, keys, **kwargs):
        raise AssertionError("computed")

    y = da.random.random((100, 200), chunks=(7, 50))
    with dask.config.set(scheduler=forbidden):
        problem = build_data((np.arange(100)[:, None], np.arange(200)), y, y + 1, y > 2, check=True, omit=False)
        problem.pieces((14, 3))
    assert problem.shape == (100, 200)


def test_chunks_of_y_rule():
    y = da.zeros((30, 40), chunks=(7, 40))
    x = da.zeros((30, 40), chunks=(30, 9))
    problem = build_data(x, y, check=True, omit=False)
    assert problem.chunks == y.chunks
    assert all(operand.chunks == y.chunks for operand in problem.operands if operand.size == y.size)


def test_axis_vectors_stay_vectors():
    y = da.zeros((30, 40), chunks=(7, 11))
    problem = build_data((np.arange(30)[:, None], np.arange(40)), y, check=True, omit=False)
    assert [operand.size for operand in problem.operands] == [1200, 1, 30, 40]


def test_stacked_predictors_reach_the_model_as_scipy_passes_them():
    def plane(x, a, b):
        assert x.ndim == 2
        return a * x[0] + b * x[1]

    x = np.stack([X, X**2])
    found = curve_fit(plane, da.from_array(x, chunks=(1, 100)), da.from_array(3 * X - X**2, chunks=130))
    np.testing.assert_allclose(found.popt, [3, -1], rtol=1e-9)


def test_shards_are_read_whole(tmp_path):
    problem = build_data(X, in_zarr(Y, tmp_path), check=True, omit=False)
    assert problem.chunks == ((300, 300, 300, 99),)


def test_a_chunk_becomes_blocks_by_its_length_alone():
    n = 2 * CPU.block_points + 3
    problem = build_data(np.zeros(n), np.zeros(n, np.float32), check=True, omit=False)
    (index,) = problem.indices()
    chunk = prepare_chunk(problem.preparation, [index], [problem.pieces(index)])
    assert [int(block.geometry[0]) for block in chunk.blocks] == [CPU.block_points, CPU.block_points, 3]


def test_small_chunks_are_joined_and_each_keeps_its_census(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)
    y = da.zeros((40, 90), chunks=(10, 9))
    problem = build_data(y + 1, y, check=True, omit=False)
    (run,), _ = plan_loads(problem)
    chunk = load_chunk(problem.preparation, run, PassedOn({}, [run]))
    assert [census.index for census in chunk.censuses] == problem.indices()
    assert [int(block.geometry[0]) for block in chunk.blocks] == [3600]


def test_small_chunks_with_axis_vectors_are_joined_to_boxes(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 3000)
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)
    full = np.arange(2.0 * 40 * 90).reshape(2, 40, 90)
    rows, columns = np.arange(40)[:, None], np.arange(90)
    problem = build_data((rows, columns), da.from_array(full, chunks=(1, 7, 9)), check=True, omit=False)
    assert problem.preparation.joins == (1, 4, 10) and problem.runs == ((1, 1), (28, 12), (90,))
    runs, _ = plan_loads(problem)
    assert [len(run) for run in runs] == [40, 20, 40, 20]
    for run, (frame, rows_of_run) in zip(runs, product([0, 1], [slice(0, 28), slice(28, 40)]), strict=True):
        chunk = load_chunk(problem.preparation, run, PassedOn({}, [run]))
        (block,) = chunk.blocks
        wanted = full[frame, rows_of_run].ravel()
        y, _, x0, x1 = block.buffers
        np.testing.assert_array_equal(y[: wanted.size], wanted)
        assert block.geometry[0] == wanted.size and chunk.shape == (1, *full[frame, rows_of_run].shape)
        np.testing.assert_array_equal(x0[: len(rows[rows_of_run])], rows[rows_of_run, 0])
        np.testing.assert_array_equal(x1[:90], columns)


def test_what_is_left_out_and_wrong_is_counted_for_each_chunk_of_a_run(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)
    y = np.arange(12.0).reshape(4, 3)
    y[0, 0], y[2, 1] = np.nan, np.inf
    mask = np.zeros((4, 3), bool)
    mask[1] = True
    for omit in (True, False):
        problem = build_data(np.arange(3.0), da.from_array(y, chunks=(1, 3)), None, mask, check=True, omit=omit)
        (run,), _ = plan_loads(problem)
        found = load_chunk(problem.preparation, run, PassedOn({}, [run])).censuses
        assert [each.index for each in found] == [(k, 0) for k in range(4)]
        assert [each.n_points for each in found] == [3] * 4 and [each.n_masked for each in found] == [0, 3, 0, 0]
        assert [each.n_omitted for each in found] == ([1, 0, 1, 0] if omit else [0] * 4)
        fault = merge_censuses(found).faults["ydata"]
        assert (fault.count, fault.index) == (2, (0, 0))
    y[0, 0] = 0
    problem = build_data(np.arange(3.0), da.from_array(y, chunks=(1, 3)), None, mask, check=True, omit=False)
    (run,), _ = plan_loads(problem)
    assert merge_censuses(load_chunk(problem.preparation, run, PassedOn({}, [run])).censuses).faults["ydata"].index == (2, 0)


def test_census_counts_by_argument():
    x, y, sigma = np.arange(10.0), np.arange(10.0), np.ones(10)
    x[0], y[[1, 2]], sigma[3], y[4] = np.nan, np.inf, np.nan, np.nan
    mask = np.arange(10) == 4
    problem = build_data(x, y, sigma, mask, check=True, omit=True)
    (index,) = problem.indices()
    census = prepare_chunk(problem.preparation, [index], [problem.pieces(index)]).censuses[0]
    assert {name: fault.count for name, fault in census.faults.items()} == {"ydata": 2, "sigma": 1, "xdata": 1}
    assert (census.n_masked, census.n_omitted, census.n_points) == (1, 4, 10)


def lent():
    """Arrays of the shared manager that are in use."""
    gc.collect()
    return len(get_memory_manager().pool.loans)


def test_what_a_chunk_copies_comes_back_with_it(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.FEWEST_RUNS", 1)
    x, y = np.arange(10.0), np.arange(10.0) ** 2
    before = lent()
    problem = build_data(x, da.from_array(y, chunks=5), 2.0, check=True, omit=True)
    (run,), _ = plan_loads(problem)
    chunk = load_chunk(problem.preparation, run, PassedOn({}, [run]))
    buffers = [buffer for block in chunk.blocks for buffer in block.buffers]
    assert all(any(np.shares_memory(buffer, each) for each in chunk.staged) for buffer in buffers)
    assert lent() == before + 4
    release(chunk)
    assert lent() == before
    for each in chunk.staged:
        each[...] = -1
    np.testing.assert_array_equal(chunk.sample[0], [0, 1, 2, 3, 5, 6, 7, 9])  # not in a buffer that is given back


def test_buffers_come_back_after_a_fit_and_after_one_that_fails():
    x, y = da.from_array(X, chunks=100), da.from_array(Y, chunks=100)

    def fit():
        return curve_fit(decay, x, y)

    def fit_without_end():
        with pytest.raises(RuntimeError, match="not found"):
            curve_fit(decay, x, y, max_nfev=2)

    def fit_of_nan():
        with pytest.raises(ValueError, match="contains nan"):
            curve_fit(decay, x, da.where(x > 4, np.nan, y))

    clear_memory_pool()  # full of larger buffers by now
    result, before = fit(), lent()
    residuals = result.residuals().compute(scheduler="sync")
    found = residuals.copy()
    for each in (fit, fit_without_end, fit_of_nan, lambda: result.residuals().compute(scheduler="sync")):
        stats = get_memory_manager().get_memory_stats()
        each()
        new = get_memory_manager().get_memory_stats()
        assert new["allocations"] - stats["allocations"] == new["reused"] - stats["reused"] > 0, each
    assert lent() == before
    np.testing.assert_array_equal(residuals, found)
    np.testing.assert_allclose(found, result.predict(X) - Y, atol=1e-14)


def test_buffers_come_back_when_reading_fails():
    n = 4 * 2**16

    def fail(block):
        if block[0] > 3:
            raise KeyError("no such block")
        return block

    clear_memory_pool()
    y = da.linspace(0, 5, n, chunks=n // 4)
    with dask.config.set({"nlsq.threads": 1}), pytest.raises(KeyError) as caught:
        curve_fit(decay, np.linspace(0, 5, n), y.map_blocks(fail, dtype=float, meta=np.empty(0)))
    assert caught.traceback
    assert get_memory_manager().get_memory_stats()["pool_arrays"] == 3 * 3


# ---------------------------------------------------------------------------------------------------------------------
# what chunks are declared to be, and what they are

CHUNKED = dict(xdata=X, ydata=Y, sigma=np.full(N, 0.05), mask=X > 4.9)


def lying(array, change):
    """A Dask array whose chunks are ``change`` of those that it declares."""
    dask_array = da.from_array(array, chunks=300)
    return dask_array.map_blocks(change, dtype=array.dtype, chunks=dask_array.chunks, meta=np.empty(0, array.dtype))


def hiding(block):
    return np.ma.masked_array(block, np.arange(len(block)) % 7 == 3)


LIES = {
    "half": (
        lambda b: b[: len(b) // 2],
        r"chunk \(\d,\) of `{}` has shape \((150|49),\), but shape \((300|99),\) was declared",
    ),
    "one short": (lambda b: b[:-1], r"of `{}` has shape \((299|98),\), but shape \((300|99),\) was declared.*chunks="),
    "another axis": (lambda b: b[:, None], r"of `{}` has shape \((300|99), 1\), but"),
    "masked": (hiding, r"of `{}` is a masked array, but a plain one was declared.*meta=numpy.ma.masked_array"),
    "objects": (lambda b: b.astype(object), r"of `{}` has dtype object, but dtype (float64|bool) was declared"),
    "complex": (lambda b: b + 1j, r"of `{}` has dtype complex128, but dtype (float64|bool) was declared"),
    "sparse": (lambda b: scipy.sparse.coo_array(b[None]), r"of `{}` is sparse, but a dense one was declared.*toarray"),
}


@pytest.mark.parametrize(
    "name, lie", [*(("ydata", lie) for lie in LIES), ("xdata", "half"), ("sigma", "masked"), ("mask", "one short")]
)
def test_a_chunk_that_is_not_what_was_declared_is_an_error(name, lie):
    change, message = LIES[lie]
    call = CHUNKED | {name: lying(CHUNKED[name], change)}
    with pytest.raises(ValueError, match=message.format(name)):
        curve_fit(decay, **call, p0=[1, 1, 0])


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
@pytest.mark.parametrize("name", ["xdata", "ydata"])
def test_a_short_chunk_is_an_error_with_each_strategy(name, strategy):
    call = CHUNKED | {name: lying(CHUNKED[name], lambda b: b[:-1])}
    with pytest.raises(ValueError, match=f"of `{name}` has shape"):
        curve_fit(decay, **call, p0=[1, 1, 0], strategy=strategy)


def test_a_short_chunk_is_an_error_before_it_is_joined_with_others():
    x = da.from_array(X, chunks=111)
    y = lying(Y, lambda b: b[:-1])
    for call in (dict(xdata=x, ydata=y), dict(xdata=y, ydata=x), dict(xdata=(x, y), ydata=x)):
        model = (lambda x, a, b, c: decay(x[0], a, b, c)) if isinstance(call["xdata"], tuple) else decay
        with pytest.raises(ValueError, match="has shape"):
            curve_fit(model, **call, p0=[1, 1, 0])


def test_a_short_chunk_of_coordinates_of_a_prediction_is_an_error(reference):
    with pytest.raises(ValueError, match="of `xdata` has shape"):
        reference.predict(lying(X, lambda b: b[:-1])).compute()


def test_a_short_chunk_of_a_covariance_is_an_error():
    sigma = da.from_array(np.eye(50), chunks=(25, 50)).map_blocks(lambda b: b[:-1], dtype=float, chunks=((25, 25), (50,)))
    with pytest.raises(ValueError, match=r"of `sigma` has shape \(24, 50\)"):
        curve_fit(decay, X[:50], Y[:50], sigma=sigma, p0=[1, 1, 0])


def test_a_short_chunk_is_an_error_on_a_worker(workers):
    with workers.as_current(), pytest.raises(ValueError, match="of `ydata` has shape"):
        curve_fit(decay, X, lying(Y, lambda b: b[:-1]), p0=[1, 1, 0])


def test_floats_where_integers_are_declared_are_an_error_and_integers_where_floats_are_declared_are_not():
    k = np.arange(N)
    table = jnp.asarray(X)

    def indexed(x, a, b, c):
        return decay(table[x[0]], a, b, c)

    with pytest.raises(ValueError, match=r"`xdata\[0\]` has dtype float64, but dtype int64 was declared.*dtype="):
        curve_fit(indexed, (lying(k, lambda b: b + 0.7),), Y, p0=[1, 1, 0])
    whole = lying(np.round(100 * Y), lambda b: b.astype("i4"))
    found, expected = (curve_fit(decay, X, y, p0=[1, 1, 0]).popt for y in (whole, np.round(100 * Y)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


class Foreign:
    """An array of a library that gives slices and no more, by default masked ones, as netCDF4 does."""

    def __init__(self, values, slices=hiding):
        self.values, self.slices, self.shape, self.dtype = values, slices, values.shape, values.dtype

    def __getitem__(self, item):
        return self.slices(self.values[item])


@pytest.mark.parametrize("name", ["xdata", "ydata", "sigma"])
def test_slices_that_are_masked_leave_points_out(name):
    hidden = np.arange(N) % 7 == 3
    arrays = dict(xdata=X, ydata=Y, sigma=np.full(N, 0.05))
    spoiled = np.where(hidden, -99.0, arrays[name])
    found = curve_fit(decay, **arrays | {name: Foreign(spoiled, lambda b: np.ma.masked_less(b, -98))}, **TIGHT)
    assert np.array_equal(found.popt, curve_fit(decay, **arrays, mask=hidden, **TIGHT).popt)
    assert found.n_masked == hidden.sum()


def test_slices_of_a_foreign_array_are_compared_with_what_it_declares():
    with pytest.raises(ValueError, match="`ydata` has shape"):
        curve_fit(decay, X, Foreign(Y, lambda b: b[:-1]))
    sometimes = Foreign(Y, lambda b: hiding(b) if len(b) > 1 else b)
    with pytest.raises(ValueError, match="`ydata` is a masked array, but a plain one was declared"):
        curve_fit(decay, X, sometimes)


MASKS = {
    "numpy": lambda a, hidden: np.ma.masked_array(a, hidden),
    "dask": lambda a, hidden: da.ma.masked_array(da.from_array(a, 250), da.from_array(hidden, 250)),
    "list": lambda a, hidden: [np.ma.masked if h else float(v) for v, h in zip(a, hidden, strict=True)],
    "list of one": lambda a, hidden: [np.ma.masked_array(a, hidden)],
    "list of lists": lambda a, hidden: [[np.ma.masked_array(a, hidden)]],
    "list of dask": lambda a, hidden: [da.ma.masked_array(da.from_array(a, 250), da.from_array(hidden, 250))],
}


@pytest.mark.parametrize(
    "name, kind", [*(("ydata", kind) for kind in MASKS), ("xdata", "numpy"), ("sigma", "dask"), ("xdata", "list of dask")]
)
def test_masks_travel_with_every_array_that_has_one(name, kind):
    hidden = np.arange(N) % 5 == 2
    arrays = dict(xdata=X, ydata=Y, sigma=np.full(N, 0.05))
    expected = curve_fit(decay, **arrays, mask=hidden | (X > 4.9), **TIGHT)
    given = MASKS[kind](np.where(hidden, 1e3, arrays[name]), hidden)
    n_axes = 3 if kind == "list of lists" else 2 if kind.startswith("list of") else 1
    arrays = {each: value.reshape((1,) * (n_axes - 1) + (N,)) for each, value in arrays.items()}
    found = curve_fit(decay, **arrays | {name: given}, mask=X > 4.9, **TIGHT)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert found.n_masked == expected.n_masked


def test_a_masked_mask_hides_what_it_does_not_know():
    hidden = np.ma.masked_array(X > 4.9, np.arange(N) % 5 == 2)
    found = curve_fit(decay, X, Y, mask=hidden, **TIGHT)
    assert np.array_equal(found.popt, curve_fit(decay, X, Y, mask=hidden.filled(True), **TIGHT).popt)


def test_one_coordinate_of_several_may_be_masked():
    y = np.stack([Y, Y])
    row, column = np.arange(2.0)[:, None], np.ma.masked_array(X, np.arange(N) % 5 == 2)
    found = curve_fit(lambda x, a, b, c: decay(x[1], a, b, c) + 0 * x[0], (row, column), y, p0=[1, 1, 0], **TIGHT)
    np.testing.assert_allclose(found.popt, curve_fit(decay, X, Y, mask=column.mask, p0=[1, 1, 0], **TIGHT).popt, rtol=1e-9)
    assert found.n_masked == 2 * column.mask.sum()


def test_a_masked_covariance_is_refused():
    with pytest.raises(ValueError, match="`sigma` is a covariance matrix with masked elements"):
        curve_fit(decay, X[:9], Y[:9], sigma=np.ma.masked_array(np.eye(9), np.eye(9) * (np.arange(9) == 3)))


def test_values_that_are_no_data_do_not_count_with_a_covariance():
    y, matrix = np.where(X > 4, -999, Y), 0.0025 * np.eye(N)
    expected = curve_fit(decay, X, Y, sigma=matrix, mask=X > 4, **TIGHT)
    for options in (dict(mask_values=[-999]), dict(valid_range=(-9, None))):
        found = curve_fit(decay, X, y, sigma=matrix, **options, **TIGHT)
        assert np.array_equal(found.popt, expected.popt)
        assert found.n_masked == (X > 4).sum()


def test_predictions_are_nan_where_x_is_masked(reference):
    hidden = np.arange(N) % 5 == 2
    expected = np.where(hidden, np.nan, np.asarray(reference.predict(X)))
    spoiled = np.ma.masked_array(np.where(hidden, -1e3, X), hidden)
    np.testing.assert_array_equal(reference.predict(spoiled), expected)
    np.testing.assert_array_equal(reference.predict(da.from_array(spoiled, 100, asarray=False)).compute(), expected)
    assert np.isnan(reference.confidence_band(spoiled)[0][hidden]).all()


def test_a_list_of_lazy_arrays_is_not_computed_at_the_door(nothing_runs, tmp_path):
    parts = [da.from_array(X, 100), da.from_array(X, 100)]
    build_data(parts, [da.from_array(Y, 100)] * 2, parts, check=True, omit=False)
    plan_fit(decay, parts, parts, p0=[1, 1, 0], sigma=parts, mask=parts)


@pytest.mark.parametrize("kind", ["dask", "hdf5", "xarray dask"])
def test_a_list_of_lazy_arrays_is_their_stack(kind, reference, tmp_path):
    made = KINDS[kind](Y, tmp_path)
    found = curve_fit(decay, [X, X], [made, made], **TIGHT)
    np.testing.assert_allclose(found.popt, reference.popt, rtol=1e-7)
    assert found.n_points == 2 * N


STORED = zarr.create_array({}, shape=(N,), dtype=float, chunks=(100,), fill_value=0)
FOREIGN = {
    "sparse": (scipy.sparse.csr_matrix(np.ones((N, 1))), TypeError, r"`ydata` is sparse: pass ydata.toarray\(\)"),
    "dask of sparse": (
        da.from_array(np.ones((N, 1))).map_blocks(scipy.sparse.csr_matrix),
        TypeError,
        r"`ydata` is sparse: pass ydata.map_blocks\(lambda block: block.toarray\(\)\)",
    ),
    "tuple of paths": (("a.zarr", "b.zarr"), TypeError, "`ydata` is a tuple of stored arrays: pass a list"),
    "tuple of stores": ((STORED, STORED), TypeError, "`ydata` is a tuple of stored arrays: pass a list"),
    "zarr and dask": ([STORED, da.ones(N)], TypeError, r"`ydata` is a list of Zarr.*dask.array.concatenate"),
    "path and numpy": (["a.zarr", Y], TypeError, r"`ydata` is a list of Zarr.*dask.array.concatenate"),
    "different lengths": ([da.ones(N), da.ones(3)], ValueError, r"different shapes, \(999,\), \(3,\).*concatenate"),
    "delayed": (dask.delayed(Y), TypeError, "`ydata` is a Dask Delayed.*: pass a Dask array.*from_delayed"),
    "bag": (dask.bag.from_sequence([1, 2]), TypeError, "`ydata` is a Dask Bag: pass a Dask array"),
    "objects": (Y.astype(object), TypeError, "`ydata` has dtype object"),
    "dask of objects": (da.from_array(Y.astype(object), chunks=100), TypeError, "`ydata` has dtype object"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_kinds_of_data_are_refused_with_what_to_pass_instead(kind):
    data, error, message = FOREIGN[kind]
    for name in ("ydata", "xdata", "sigma", "mask"):
        if kind.startswith("tuple") and name == "xdata":
            continue  # coordinates
        with pytest.raises(error, match=message.replace("ydata", name)):
            curve_fit(decay, **CHUNKED | {name: data}, p0=[1, 1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# dates

SECONDS = np.linspace(0, 5, 60)
DATES = np.datetime64("2026-01-01", "ns") + (1e9 * SECONDS).astype("m8[ns]")
SIGNAL = 2 * np.exp(-0.7 * SECONDS) + 0.01 * np.random.default_rng(0).normal(size=60)
ORDER = np.random.default_rng(1).permutation(60)


def fading(x, a, b):
    return a * jnp.exp(-b * x)


def fading_of_first(x, a, b):
    return fading(x[0], a, b)


DATED = {
    "datetime64": lambda: DATES,
    "microseconds": lambda: DATES.astype("M8[us]"),
    "timedelta64": lambda: DATES - DATES[0],
    "list": lambda: list(DATES),
    "Series": lambda: pd.Series(DATES),
    "DatetimeIndex": lambda: pd.DatetimeIndex(DATES),
    "time zone": lambda: pd.Series(DATES).dt.tz_localize("Europe/Berlin"),
    "TimedeltaIndex": lambda: pd.DatetimeIndex(DATES) - pd.Timestamp(DATES[0]),
    "DataArray": lambda: xr.DataArray(DATES, dims="t"),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", DATED.values(), ids=DATED)
def test_dates_are_seconds_since_the_earliest_one_in_fits_maps_and_predictions(make):
    x, expected = make(), curve_fit(fading, SECONDS, SIGNAL)
    y = xr.DataArray(SIGNAL, dims="t") if isinstance(x, xr.DataArray) else SIGNAL
    found = curve_fit(fading, x, y)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-6)
    assert plan_fit(fading, x, y).n_points == 60
    for part in (slice(None), slice(10, 20)):
        np.testing.assert_allclose(found.predict(x[part]), expected.predict(SECONDS[part]), rtol=1e-6)
        np.testing.assert_allclose(found.confidence_band(x[part]), expected.confidence_band(SECONDS[part]), rtol=1e-6)
    np.testing.assert_allclose(found.predict(SECONDS), expected.predict(SECONDS), rtol=1e-6)
    if not isinstance(x, xr.DataArray):
        np.testing.assert_allclose(curve_fit(fading_of_first, (x,), y).predict((x,)), expected.predict(), rtol=1e-6)
        np.testing.assert_allclose(fit_map(fading, x, np.stack([y, y])).compute().popt[1], expected.popt, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_dates_in_dask_arrays_and_stores_become_seconds_lazily(strategy, tmp_path):
    expected = curve_fit(fading, SECONDS, SIGNAL)
    store = zarr.create_array(store=tmp_path / "t", data=DATES[ORDER].astype("i8"), chunks=(20,))
    lazy = da.from_array(DATES[ORDER], 7)
    for x in (lazy, da.from_array(store, 20).astype("M8[ns]")):
        found = curve_fit(fading, x, da.from_array(SIGNAL[ORDER], 11), strategy=strategy)
        np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-6)
        with pytest.raises(TypeError, match=r"`x` has the dtype datetime64.*since the earliest date of the fit"):
            found.predict(x)


@pytest.mark.parametrize("lazy", [False, True])
def test_dates_that_are_masked_are_left_out_and_are_not_the_earliest_one(lazy):
    hidden = np.arange(60) % 9 == 4
    x = np.ma.masked_array(np.where(hidden, np.datetime64("1900-01-01", "ns"), DATES), hidden)
    given = da.from_array(x, chunks=20, asarray=False) if lazy else x
    found, expected = curve_fit(fading, given, SIGNAL), curve_fit(fading, SECONDS, SIGNAL, mask=hidden)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-6)
    assert found.n_masked == hidden.sum()
    if not lazy:
        predicted = np.where(hidden, np.nan, np.asarray(expected.predict(SECONDS)))
        np.testing.assert_allclose(np.asarray(found.predict(x)), predicted, rtol=1e-6)


def test_a_date_of_a_coordinate_that_had_none_in_the_fit_is_refused():
    with pytest.raises(TypeError, match=r"`x` has the dtype datetime64"):
        curve_fit(fading, SECONDS, SIGNAL).predict(DATES)


def test_the_earliest_date_of_a_fit_survives_files_and_checkpoints(tmp_path):
    found = curve_fit(fading, DATES, SIGNAL)
    found.save(tmp_path / "result")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).predict(DATES[5:9]), found.predict(DATES[5:9]))
    np.testing.assert_array_equal(load(tmp_path / "result").predict(DATES[5:9]), found.predict(DATES[5:9]))
    kept = curve_fit(fading, DATES, SIGNAL, checkpoint=tmp_path / "checkpoint")
    again = resume(tmp_path / "checkpoint", fading)
    np.testing.assert_array_equal(again.popt, kept.popt)
    np.testing.assert_array_equal(again.predict(DATES[5:9]), kept.predict(DATES[5:9]))


@pytest.mark.parametrize("kind", ["datetime64", "Series", "dask", "DataArray"])
def test_a_date_that_is_missing_is_counted_or_left_out_alone(kind):
    dates = DATES.copy()
    dates[[0, 3]] = np.datetime64("NaT")
    of = {"Series": pd.Series, "dask": lambda x: da.from_array(x, 7), "DataArray": lambda x: xr.DataArray(x, dims="t")}
    x = of.get(kind, np.asarray)(dates)
    y = xr.DataArray(SIGNAL, dims="t") if kind == "DataArray" else SIGNAL
    with pytest.raises(ValueError, match=r"2 of the values of `xdata`.*nan_policy"):
        curve_fit(fading, x, y)
    found = curve_fit(fading, x, y, nan_policy="omit")
    expected = curve_fit(fading, np.delete(SECONDS, [0, 3]) - SECONDS[1], np.delete(SIGNAL, [0, 3]))
    assert found.n_omitted == 2
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-6)


def test_dates_by_the_calendar_become_seconds_and_durations_by_it_are_refused():
    years = np.array(["2000", "2001", "2002", "2003"], "M8[Y]")
    fit = curve_fit(lambda x, a, b: a * x / 86400 + b, years, [0.0, 366, 731, 1096], [2, 1])
    np.testing.assert_allclose(fit.popt, [1, 0], atol=1e-6)
    with pytest.raises(TypeError, match="whose length varies"):
        curve_fit(lambda x, a, b: a * x + b, np.arange(5).astype("m8[M]"), np.arange(5.0), [1, 1])


def test_a_table_of_pandas_is_data_with_two_axes():
    table = pd.DataFrame(2 * np.arange(6.0)[:, None] + 3 * np.arange(3.0), columns=["name", "low", "high"])
    found = curve_fit(lambda axes, a, b: a * axes[0] + b * axes[1], (np.arange(6.0)[:, None], np.arange(3.0)), table, [1, 1])
    np.testing.assert_allclose(found.popt, [2, 3])
    found = curve_fit(lambda x, a, b: a * x[0] + b * x[1], table[["name", "low"]].T, np.arange(6.0), [1, 1])
    np.testing.assert_allclose(found.popt, [0.5, 0], atol=1e-9)


def test_pandas_rows_with_other_labels_are_refused():
    x, y = pd.Series(np.arange(5.0)), pd.Series(2 * np.arange(5.0) + 1)
    with pytest.raises(ValueError, match="different row labels"):
        curve_fit(lambda x, a, b: a * x + b, x, y[::-1], [1, 1])
    np.testing.assert_allclose(curve_fit(lambda x, a, b: a * x + b, x, y, [1, 1]).popt, [2, 1])


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">i4", np.longdouble])
def test_coordinates_of_all_pixels_may_have_any_byte_order(dtype):
    x = np.arange(8.0)
    y = 2 * np.exp(-0.7 * x) + 0.8 + np.random.default_rng(0).normal(0, 0.05, (20, 8))
    found, wanted = (fit_map(decay, each, y, p0=[2, 1, 0.5]).compute().record for each in (x.astype(dtype), x))
    np.testing.assert_array_equal(found, wanted)
