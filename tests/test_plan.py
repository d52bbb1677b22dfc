"""What is decided before anything is read."""

import logging
import mmap
import re
import time
from html import unescape

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from dask.callbacks import Callback
from distributed import Client, LocalCluster

from dask_nlsq import MemoryBudgetError, Plan, curve_fit, fit, fit_map, hold, plan_fit
from dask_nlsq.data.align import build_data
from dask_nlsq.data.sizes import sizes_of
from dask_nlsq.engine.partition import partition_nbytes
from dask_nlsq.engine.places import HeldHere
from dask_nlsq.engine.waiting import calm
from dask_nlsq.memory.needs import partition_size
from dask_nlsq.memory.plan import count_partitions


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def lazy(n, chunks, dtype="f8"):
    x = da.linspace(0, 10, n, chunks=chunks, dtype=dtype)
    return x, x.map_blocks(lambda x: (2 * np.exp(-0.5 * x) + 0.3).astype(x.dtype), dtype=dtype, meta=np.zeros(0, dtype))


def unread(n, chunks):
    def read(block):
        raise AssertionError("was read")

    return da.zeros(n, chunks=chunks).map_blocks(read, dtype=float, meta=np.zeros(0))


class Computes(Callback):
    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def _pretask(self, key, dsk, state):
        self.count += 1


@pytest.fixture(scope="module")
def cluster():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="1.5GB", dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def client(cluster):
    """The default one for this test alone."""
    with cluster.as_current():
        yield cluster


@pytest.mark.slow
def test_a_hundred_thousand_chunks_are_planned_within_a_second_and_without_a_compute():
    y = unread(10**8, 1000)
    x = da.arange(10**8, chunks=1000)
    plan_fit(decay, x[:10], y[:10])  # JAX starts, the model is traced
    begin = time.perf_counter()
    with Computes() as computes:
        plan = plan_fit(decay, x, y, memory_limit_gb=100)
    assert time.perf_counter() - begin < 1
    assert (computes.count, plan.n_chunks, plan.n_points) == (0, 100_000, 10**8)


@pytest.mark.parametrize(
    "n, chunks, dtype, masked",
    [
        (10**6, 10**6, "f8", False), (700_003, 300_000, "f4", False), (700_003, 300_000, "f4", True),
        (10**5, 999, "f8", True), (50, 7, "i2", False),
    ],
)  # fmt: skip
def test_what_will_be_held_is_known_to_a_page_of_memory(n, chunks, dtype, masked):
    x, y = lazy(n, chunks, dtype)
    problem = build_data(x, y, None, y > 1 if masked else None, check=True, omit=False)
    held = partition_nbytes(HeldHere.load(problem, 1, calm).partition)
    known = sizes_of(problem, 3).held
    assert held <= known + mmap.PAGESIZE and known <= 1.08 * held  # where arrays begin, and so how they are aligned, varies


def test_arrays_in_this_process_are_not_held_twice():
    x = np.linspace(0, 10, 10**7)
    plan = plan_fit(decay, x, x)
    assert plan.strategy == "standard" and "already" in plan.reason
    assert plan.held_bytes < 0.06 * 2 * x.nbytes
    assert plan.peak_bytes - plan.places[0].now < 250e6


def test_the_result_keeps_its_plan_and_the_logger_has_it(caplog):
    x, y = lazy(10**5, 10**4)
    with caplog.at_level(logging.INFO, "dask_nlsq"):
        result = curve_fit(decay, x, y, p0=[1, 1, 0])
    assert isinstance(result.plan, Plan) and result.plan.strategy == result.strategy == "standard"
    assert repr(result.plan) in caplog.text and "MiB" in repr(result.plan)


def test_a_plan_takes_the_arguments_of_curve_fit_and_of_fit():
    x, y = lazy(1000, 100)
    assert plan_fit(x, y, decay, bounds=(0, 9), loss="huber", strategy="chunked").strategy == "chunked"
    assert plan_fit(decay, x, y, workflow="large_robust").strategy == "chunked"
    with pytest.raises(TypeError, match="memory_limit"):
        plan_fit(decay, x, y, memory_limit=4)
    with pytest.raises(ValueError, match="`workflow`"):
        plan_fit(decay, x, y, workflow="best")


def test_notebooks_show_a_plan_as_it_is_printed():
    fits, maps = plan_fit(decay, *lazy(1000, 100)), fit_map(decay, np.arange(9.0), np.ones((4, 9)), [1, 1, 0]).plan
    for plan in (fits, maps):
        assert unescape(plan._repr_html_()) == f"<pre>{plan}</pre>"


def test_lazy_data_go_to_the_workers_and_the_plan_shows_them(client, capsys):
    x, y = lazy(10**6, 10**4)
    plan = plan_fit(decay, x, y)
    text = str(plan)
    assert plan.explain() is None
    assert capsys.readouterr().out == text + "\n"
    assert plan.strategy == "chunked" and len(plan.places) == 3
    assert plan.held_bytes >= 16e6 and sum(place.held for place in plan.places[1:]) >= plan.held_bytes
    assert plan.n_partitions >= 4 and f"{plan.n_partitions} tasks" in text
    for address in client.scheduler_info(n_workers=-1)["workers"]:
        assert address in text
    assert "in each task" in text and "1.40 GiB" in text
    assert plan.advice == []


def test_a_worker_with_several_threads_is_told_to_let_jax_have_them(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "1")
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        plan = plan_fit(decay, *lazy(1000, 100))
        assert len(plan.advice) == 1 and "PJRT_NPROC=2" in plan.advice[0] and "to do: " in str(plan)


def test_data_that_do_not_fit_on_the_workers_are_refused_before_they_are_read(client):
    x, y = da.zeros(10**8, chunks=10**6), unread(10**8, 10**6)
    message = r"the data take 1\.5\d GiB and 2 workers have room for .* \(70% of its memory\): use strategy=\"streaming\""
    with pytest.raises(MemoryBudgetError, match=message):
        curve_fit(decay, x, y, strategy="chunked")
    with pytest.raises(MemoryBudgetError, match=r"raise memory_limit_gb to [\d.]+") as caught:
        curve_fit(decay, x[: 10**7], y[: 10**7], memory_limit_gb=0.01)
    named = float(re.search(r"memory_limit_gb to ([\d.]+)", str(caught.value))[1])
    assert plan_fit(decay, x[: 10**7], y[: 10**7], memory_limit_gb=named).n_points == 10**7
    with pytest.raises(MemoryBudgetError, match=r"to read runs of chunks of .* rechunk the data into smaller chunks"):
        curve_fit(decay, x.rechunk(5 * 10**7), y.rechunk(5 * 10**7))


def test_lazy_data_that_do_not_fit_are_read_anew_in_each_sweep(client):
    x, y = da.linspace(0, 1, 10**9, chunks=10**6), unread(10**9, 10**6)
    plan = plan_fit(decay, x, y)
    assert plan.strategy == "streaming" and plan.held_bytes == 0
    assert "read the data again in each sweep, since the data take" in plan.reason
    assert "from where they are stored" in str(plan)


def test_data_that_do_not_fit_in_this_process_are_refused_before_they_are_read():
    x, y = da.zeros(10**7, chunks=10**6), unread(10**7, 10**6)
    with pytest.raises(MemoryBudgetError, match=r"it may take 102\.40 MiB \(memory_limit_gb\)"):
        plan_fit(decay, x, y, memory_limit_gb=0.1, strategy="standard")


def test_a_covariance_matrix_is_counted_and_refused_before_it_is_read():
    x = np.linspace(0, 10, 3000)
    matrix = unread((3000, 3000), 1000)
    with Computes() as computes:
        plan = plan_fit(decay, x, x, sigma=matrix, mask=unread(3000, 1000), nan_policy="omit")
        for call in (plan_fit, curve_fit):
            with pytest.raises(MemoryBudgetError, match=r"the data take 68\.7. MiB in memory"):
                call(decay, x, x, sigma=matrix, memory_limit_gb=0.1)
        with pytest.raises(MemoryBudgetError), hold(x, x, sigma=matrix, memory_limit_gb=0.1):
            pass
    assert computes.count == 0
    assert plan.held_bytes > 8 * 3000**2 and plan.peak_bytes > plan.places[0].now + 3 * 8 * 3000**2


WAYS_OUT = {
    "both": 'rechunk the data into smaller chunks and use strategy="streaming"',
    "raise": "raise memory_limit_gb to",
    "rechunk": "rechunk the data into smaller chunks",
    "stream": 'use strategy="streaming"',
    "client": "a distributed.Client whose workers",
    "part": "fit a part of the data",
}


@pytest.mark.parametrize(
    "n, chunks, strategy, limit, ways",
    [
        (10**7, 10**5, "standard", 0.1, ["raise"]),  # less than a fit takes of nothing
        (10**7, 10**7, "standard", 0.4, ["raise", "rechunk"]),  # a single chunk, which a stream reads as well
        (10**8, 10**5, "standard", 0.4, ["raise", "stream", "client", "part"]),
        (10**12, 10**7, "standard", None, ["stream", "client", "part"]),
        (10**12, 10**11, "standard", None, ["both"]),
        (10**12, 10**11, "auto", None, ["rechunk"]),  # which streams by itself
        (10**12, 10**11, "streaming", None, ["rechunk"]),
        (10**12, 10**11, "streaming", 8, ["raise", "rechunk"]),
    ],
)
def test_a_plan_that_is_refused_names_the_ways_out_that_there_are(n, chunks, strategy, limit, ways):
    with pytest.raises(MemoryBudgetError) as err:
        plan_fit(decay, da.zeros(n, chunks=chunks), unread(n, chunks), strategy=strategy, memory_limit_gb=limit)
    text, found = str(err.value), []
    for name, words in WAYS_OUT.items():
        if words in text:
            found.append(name)
            text = text.replace(words, "")
    assert found == ways


def test_a_covariance_matrix_can_neither_be_streamed_nor_held_by_workers():
    x = np.linspace(0, 10, 4000)
    with pytest.raises(MemoryBudgetError) as err:
        plan_fit(decay, x, x, sigma=unread((4000, 4000), 1000), memory_limit_gb=0.3)
    assert re.search(r"\): raise memory_limit_gb to [\d.]+, or fit a part of the data$", str(err.value))


@pytest.mark.slow
def test_the_workers_together_hold_what_one_could_not(client):
    x, y = lazy(3 * 10**7, 10**6, "f4")
    result = curve_fit(decay, x, y, p0=[1, 1, 0], memory_limit_gb=0.5)
    assert result.plan.places[1].held < 0.7 * result.plan.held_bytes
    np.testing.assert_allclose(result.popt, [2, 0.5, 0.3], rtol=1e-5)
    spilled = client.run(lambda dask_worker: dask_worker.data.spilled_total.disk)
    assert set(spilled.values()) == {0}


@pytest.mark.slow
def test_small_partitions_are_a_matter_of_the_goal(client):
    x, y = lazy(10**6, 10**4)
    assert plan_fit(decay, x, y, goal="memory_efficient").n_partitions > plan_fit(decay, x, y).n_partitions
    a, b = (fit(decay, x, y, p0=[1, 1, 0], goal=goal) for goal in (None, "memory_efficient"))
    assert np.array_equal(a.popt, b.popt) and b.plan.n_partitions > a.plan.n_partitions
    with pytest.raises(ValueError, match="`partitions_per_thread`"):
        curve_fit(decay, x, y, partitions_per_thread=0)


def test_a_cluster_without_workers_is_planned_for_all_the_same():
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster):
        assert "no worker has joined yet" in plan_fit(decay, *lazy(1000, 100)).reason


@pytest.mark.parametrize("n_runs", [1, 7, 512, 100_000])
@pytest.mark.parametrize("most", [1, 2, 6, 63])
def test_partitions_are_the_smallest_of_which_there_are_not_too_many(n_runs, most):
    size = partition_size(n_runs, most)
    assert size & (size - 1) == 0 and -(-n_runs // size) <= most
    assert size == 1 or -(-n_runs // (size // 2)) > most
    assert partition_size(n_runs, -(-n_runs // size)) == size  # what the plan says is what is made


@pytest.mark.parametrize("n_runs, n_threads, per_thread", [(512, 2, 2), (100_000, 64, 4), (37, 3, 4), (5, 2, 4), (9, 1, 1)])
def test_partitions_keep_every_thread_busy_with_few_tasks(n_runs, n_threads, per_thread):
    n, wanted = count_partitions(n_runs, n_threads, per_thread), per_thread * n_threads
    assert n == n_runs < wanted or wanted <= n <= 2 * wanted


@pytest.mark.slow
def test_arrays_in_memory_are_cut_and_shared_out_to_the_workers(client):
    x = np.linspace(0, 10, 9_000_001)
    y = (2 * np.exp(-0.5 * x) + 0.3 + 0.01 * np.cos(1e5 * x)).astype("f4")
    here = curve_fit(decay, x, y, p0=[1, 1, 0])
    there = curve_fit(decay, x, y, p0=[1, 1, 0], strategy="chunked")
    assert there.plan.n_chunks > 1 and there.plan.n_partitions > 1
    np.testing.assert_allclose(there.popt, here.popt, rtol=1e-9)
    np.testing.assert_allclose(there.residuals(), here.residuals(), atol=1e-8)
    axes = (np.arange(3000)[:, None], np.arange(3000))
    plane = np.random.default_rng(0).normal(size=(3000, 3000)) + axes[0] - 2 * axes[1]
    there = curve_fit(lambda x, a, b: a * x[0] + b * x[1], axes, plane, strategy="chunked")
    np.testing.assert_allclose(there.popt, [1, -2], atol=1e-5)


def test_a_limit_holds_for_arrays_in_memory_and_the_way_out_is_to_raise_it():
    for n in (1000, 40_000, 300_000, 1_000_000, 2_600_000):
        x = np.linspace(0, 10, n)
        with pytest.raises(MemoryBudgetError, match=r"raise memory_limit_gb to [\d.]+") as caught:
            plan_fit(decay, x, x, memory_limit_gb=0.01)
        named = float(re.search(r"memory_limit_gb to ([\d.]+)", str(caught.value))[1])
        assert plan_fit(decay, x, x, memory_limit_gb=named).n_points == n


@pytest.mark.parametrize("call", [fit, plan_fit])
def test_a_misspelt_option_is_named_with_the_right_one(call):
    with pytest.raises(TypeError, match="no argument 'memory_limit': did you mean 'memory_limit_gb'"):
        call(decay, np.ones(9), np.ones(9), memory_limit=3)


def test_a_model_that_closes_over_an_array_as_long_as_the_data_is_told_to_take_it_as_a_coordinate():
    x, y = lazy(2000, 100)
    w = jnp.arange(2000.0)
    with pytest.raises(ValueError, match=r"cannot be evaluated on 8 of the points \(line .*xdata=\(x, w\)"):
        curve_fit(lambda x, a: a * x + w, x, y)


def test_a_fit_says_that_it_waits_for_a_worker(caplog):
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster):
        plan_fit(decay, *lazy(1000, 100))
    assert "no workers yet" in caplog.text
