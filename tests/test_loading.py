import gc
import threading
import time

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from dask_nlsq import curve_fit, get_memory_manager
from dask_nlsq.data.align import build_data
from dask_nlsq.data.loading import compute_shared, plan_loads

X = np.linspace(0, 4, 4000)
Y = 2 * np.exp(-1.3 * X) + 0.5


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def loads_of(x, y):
    problem = build_data(x, y, check=True, omit=False)
    runs, common = plan_loads(problem)
    return problem, [load for run in runs for load in run], common


def in_store(values, chunks):
    array = zarr.create_array(store={}, shape=values.shape, dtype=values.dtype, chunks=chunks)
    array[...] = values
    return array


def test_a_chunk_of_its_own_shares_nothing():
    _, loads, common = loads_of(da.from_array(X, 400) + 1, in_store(Y, (400,)))
    assert not common
    assert all(not load.shared for load in loads)


def test_a_source_chunk_that_is_split_is_read_once():
    reads = []

    def read(block):
        reads.append(len(block))
        return block

    y = da.from_array(Y, 2000).map_blocks(read, dtype=float, meta=np.empty(0)).rechunk(100)
    _, loads, common = loads_of(X, y)
    shared = compute_shared(common)
    assert reads == [2000, 2000]
    assert [len(load.pieces(shared)[0]) for load in loads] == [100] * 40
    np.testing.assert_array_equal(np.concatenate([load.pieces(shared)[0] for load in loads]), Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: y - y.mean(),
        lambda y: y.rechunk(130),
        lambda y: da.overlap.map_overlap(lambda block: block, y, depth=3, boundary="reflect"),
        lambda y: da.concatenate([y[:1000], y[1000:]]),
    ],
    ids=["plain", "needs all", "rechunked", "overlap", "concatenated"],
)
def test_pieces_are_those_of_dask(make):
    y = make(da.from_array(Y, 400))
    problem, loads, common = loads_of(da.from_array(X, 500), y)
    shared = compute_shared(common)
    found = np.concatenate([load.pieces(shared)[0] for load in loads])
    np.testing.assert_array_equal(found, y.compute())
    assert [load.index for load in loads] == problem.indices()


def test_an_axis_vector_in_chunks_is_shared():
    rows, columns = da.arange(40, chunks=10)[:, None], np.arange(100)
    _, loads, common = loads_of((rows, columns), da.ones((40, 100), chunks=(10, 10)))
    assert all(len(load.shared) == 1 for load in loads)
    shared = compute_shared(common)
    np.testing.assert_array_equal(loads[15].pieces(shared)[2].ravel(), np.arange(10, 20))


def test_a_persisted_array_stays_where_it_is(workers):
    y = da.from_array(Y, 400)
    with workers.as_current():
        held = workers.persist(y + 0.0)
        result = curve_fit(decay, da.from_array(X, 400), held, p0=[1, 1, 0])
        np.testing.assert_allclose(result.popt, [2, 1.3, 0.5], rtol=1e-6)
        here = curve_fit(decay, X, held, p0=[1, 1, 0], strategy="standard")
        np.testing.assert_array_equal(here.popt, result.popt)


def test_a_partition_is_one_task_however_many_chunks_it_has():
    """The scheduler sees the loads, the sweeps and nothing else of an array that is its own."""
    y = da.from_array(Y, 10) + 0.0
    options = dict(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0")
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        curve_fit(decay, da.from_array(X, 10), y, p0=[1, 1, 0])
        counted = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.task_prefixes))
        names = client.run_on_scheduler(lambda dask_scheduler: sorted(dask_scheduler.task_prefixes))
    assert counted <= 4, names


def test_large_chunks_are_read_one_after_the_other_where_memory_is_short(monkeypatch):
    n = 2**20
    x = np.linspace(0, 4, 3 * n)
    lock, reading, most = threading.Lock(), [0], [0]

    def read(x):
        with lock:
            reading[0] += 1
            most[0] = max(most[0], reading[0])
        time.sleep(0.05)
        with lock:
            reading[0] -= 1
        return 2 * np.exp(-1.3 * x) + 0.5

    def fit():
        most[0] = 0
        y = da.from_array(x, n).map_blocks(read, dtype=float, meta=np.empty(0))
        with dask.config.set({"nlsq.threads": 2}):
            return curve_fit(decay, x, y, p0=[1, 1, 0], jac_mode="columns")

    together = fit()
    assert most[0] == 2
    gc.collect()
    pool = get_memory_manager().pool
    one = 3 * 2 * 8 * n  # x and y three times
    pool.shrink()
    with monkeypatch.context() as short:
        short.setattr(pool, "limit", 1.9 * one)  # two that were read stay beside it
        in_turn = fit()
        assert most[0] == 1
        short.setattr(pool, "limit", 0.9 * one)
        with pytest.raises(MemoryError, match="missing"):
            fit()
    np.testing.assert_array_equal(in_turn.popt, together.popt)
    np.testing.assert_array_equal(in_turn.pcov, together.pcov)
