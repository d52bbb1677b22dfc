import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from dask_nlsq import curve_fit, get_memory_manager
from dask_nlsq.data.align import build_data
from dask_nlsq.data.loading import PassedOn, compute_shared, plan_loads
from dask_nlsq.memory.needs import MADE_BYTES, READ_COPIES

X = np.linspace(0, 4, 4000)
Y = 2 * np.exp(-1.3 * X) + 0.5


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def loads_of(x, y):
    data = build_data(x, y, check=True, omit=False)
    runs, common = plan_loads(data)
    return data, [load for run in runs for load in run], PassedOn(compute_shared(runs, common), runs)


def pieces(load, known):
    with known.to(load) as values:
        return load.pieces(values, {})


def in_store(values, chunks):
    array = zarr.create_array(store={}, shape=values.shape, dtype=values.dtype, chunks=chunks)
    array[...] = values
    return array


def counting(values, chunk):
    """A lazy array and the lengths of what has been read of it."""
    reads = []

    def read(block):
        reads.append(len(block))
        return block

    return da.from_array(values, chunk).map_blocks(read, dtype=float, meta=np.empty(0)), reads


def test_a_chunk_of_its_own_shares_nothing():
    _, loads, known = loads_of(da.from_array(X, 400) + 1, in_store(Y, (400,)))
    assert not any(load.shared or load.passed for load in loads) and not known.shared


@pytest.mark.parametrize("cut", [100, 1300])
def test_a_source_chunk_that_is_cut_otherwise_is_read_once_and_dropped_behind_the_last_that_needs_it(cut):
    y, reads = counting(Y, 1000)
    _, loads, known = loads_of(X, y.rechunk(cut))
    assert reads == [] and not known.shared
    found = []
    for load in loads:
        found.append(pieces(load, known)[0])
        assert len(known.promises) <= 1
    assert reads == [1000] * 4 and not known.promises
    np.testing.assert_array_equal(np.concatenate(found), Y)


def test_several_threads_read_a_source_chunk_once():
    y, reads = counting(Y, 1000)
    _, loads, known = loads_of(X, y.rechunk(100))
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda load: pieces(load, known)[0], loads)]
    assert reads == [1000] * 4 and not known.promises
    np.testing.assert_array_equal(np.concatenate(found), Y)


def test_a_part_of_the_chunks_leaves_nothing_behind():
    y, reads = counting(Y, 1000)
    data = build_data(X, y.rechunk(100), check=True, omit=False)
    runs, _ = plan_loads(data)
    loads = [load for run in runs for load in run][5::7]
    known = PassedOn({}, [loads])
    for load in loads:
        pieces(load, known)
    assert reads == [1000] * 4 and not known.promises


def test_a_mean_of_all_data_is_made_before_and_the_data_are_not_held_for_it():
    y, reads = counting(Y, 400)
    _, loads, known = loads_of(X, y - y.mean())
    assert [np.size(value) for value in known.shared.values()] == [1]
    assert not any(load.passed for load in loads)
    np.testing.assert_allclose(np.concatenate([pieces(load, known)[0] for load in loads]), Y - Y.mean())
    assert reads == [400] * 20


def test_what_source_chunks_have_in_common_is_made_once():
    made = []

    @dask.delayed(pure=True)
    def table():
        made.append(1)
        return np.full(1000, 2.0)

    y = da.from_array(Y, 1000).map_blocks(lambda block, table: block * table, table(), dtype=float, meta=np.empty(0))
    _, loads, known = loads_of(X, y.rechunk(250))
    assert made == [1] and all(len(load.passed) == 1 for load in loads)
    np.testing.assert_array_equal(np.concatenate([pieces(load, known)[0] for load in loads]), 2 * Y)
    assert made == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: y - y.mean(),
        lambda y: y.rechunk(130),
        lambda y: y.rechunk(130).rechunk(470),
        lambda y: y.rechunk(130) / y.max(),
        lambda y: da.overlap.map_overlap(lambda block: block, y, depth=3, boundary="reflect"),
        lambda y: da.concatenate([y[:1000], y[1000:]]),
        lambda y: da.cumsum(y),
    ],
    ids=["plain", "needs all", "rechunked", "twice", "both", "overlap", "concatenated", "from the first on"],
)
def test_pieces_are_those_of_dask(make):
    y = make(da.from_array(Y, 400))
    data, loads, known = loads_of(da.from_array(X, 500), y)
    found = np.concatenate([pieces(load, known)[0] for load in loads])
    np.testing.assert_array_equal(found, y.compute())
    assert [load.index for load in loads] == data.indices()
    assert not known.promises


def test_an_axis_vector_in_chunks_is_passed_on():
    rows, columns = da.arange(40, chunks=10)[:, None], np.arange(100)
    _, loads, known = loads_of((rows, columns), da.ones((40, 100), chunks=(10, 10)))
    assert all(len(load.passed) == 1 for load in loads)
    np.testing.assert_array_equal(pieces(loads[15], known)[2].ravel(), np.arange(10, 20))


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


@pytest.mark.slow
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
    one = READ_COPIES * MADE_BYTES * n
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


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(1, 20), (1, 1), (2, 20), (5, 7)])
@pytest.mark.parametrize("strategy", ["standard", "chunked", "streaming"])
def test_axis_vectors_belong_to_their_own_chunk_however_short_it_is(chunks, strategy):
    t = np.arange(30.0)[:, None]
    y = 2 * t + 1 + np.zeros((30, 20))
    y[10:15] = 1e3
    hidden = (t >= 10) & (t < 15)
    options = dict(p0=[1, 1], strategy=strategy)
    for x in (t, da.from_array(t, chunks=(7, 1)), np.broadcast_to(t, y.shape)):
        found = curve_fit(lambda t, a, b: a * t + b, x, da.from_array(y, chunks=chunks), mask=hidden, **options)
        np.testing.assert_allclose(found.popt, [2, 1], atol=1e-9)
        assert (found.n_points, found.n_masked) == (500, 100)
    sigma = np.where(hidden, 1e9, 1.0)
    found = curve_fit(
        lambda t, a, b: a * t + b, np.broadcast_to(t, y.shape), da.from_array(y, chunks=chunks), sigma=sigma, **options
    )
    np.testing.assert_allclose(found.popt, [2, 1], atol=1e-9)
