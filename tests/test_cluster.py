import asyncio
import logging
import os
import signal
import threading
import time

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dask.utils import key_split
from distributed import Client, get_client, worker_client

from dask_nlsq import curve_fit, plan_fit, resume

from .clusters import assert_nothing_left, at_sweep, command_line, local, started, wait_for

N, CHUNK = 60_000, 4_000
X = np.linspace(0, 10, N)
Y = 2 * np.exp(-0.5 * X) + 0.3 + np.random.default_rng(7).normal(0, 0.05, N)
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, jac_mode="columns", p0=[5.0, 2.0, -1.0])
KINDS = dict(chunked={}, in_memory=dict(strategy="chunked"), streaming=dict(strategy="streaming"))


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)
    monkeypatch.setattr("dask_nlsq.data.align.SENT_BYTES", 8 * CHUNK)  # into which arrays in memory are cut


def lazy():
    return da.from_array(X, CHUNK), da.from_array(Y, CHUNK)


def data(kind):
    return (X, Y) if kind == "in_memory" else lazy()


def alone(kind):
    """The fit in this process."""
    return curve_fit(decay, *lazy(), **TIGHT, strategy="streaming" if kind == "streaming" else "standard")


@pytest.fixture(scope="module")
def client():
    # a LocalCluster closes the nanny of a worker that was lost so long ago, even where it has started a new one
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),
        local() as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def assert_same(one, other):
    np.testing.assert_array_equal(one.popt, other.popt)
    np.testing.assert_array_equal(one.pcov, other.pcov)


@pytest.mark.parametrize("kind", ["chunked", pytest.param("in_memory", marks=pytest.mark.slow), "streaming"])
def test_a_worker_that_is_killed_costs_time_and_no_digit(client, kind):
    wait_for(client, 2)
    (pid, _) = client.run(os.getpid).values()
    with client.as_current():
        kill = at_sweep(2, lambda: os.kill(pid, signal.SIGKILL))
        found = curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind], callback=kill)
    assert found.nfev > 3
    assert pid not in client.run(os.getpid).values()
    assert_same(found, alone(kind))
    assert_nothing_left(client)


@pytest.mark.slow
def test_workers_that_do_not_come_back_leave_the_work_to_the_others(tmp_path):
    with command_line(tmp_path, 3) as (client, _, workers):
        for left, kind in ((2, "in_memory"), (1, "streaming")):
            with client.as_current():
                kill = at_sweep(2, workers[left].kill)
                found = curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind], callback=kill)
            assert len(client.scheduler_info(n_workers=-1)["workers"]) == left
            assert_same(found, alone(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, allowed, deaths",
    [
        ("chunked", 3, 3),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("chunked", 1, 3), ("streaming", 20, 3)]),
    ],
)
def test_a_chunk_that_kills_three_workers_is_named(strategy, allowed, deaths, tmp_path):
    def deadly(block, block_info=None):
        if block_info[0]["chunk-location"] == (7,) and "DOOMED" in os.environ:
            with open(tmp_path / "deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    x, y = da.from_array(X, CHUNK), da.from_array(Y, CHUNK)
    y = y.map_blocks(deadly, dtype=y.dtype, meta=np.empty(0))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": allowed}),
        local(env={"DOOMED": "yes"}) as cluster,
        Client(cluster) as client,
    ):
        with pytest.raises(RuntimeError, match=rf"{deaths} workers died while they worked on .*rechunk") as err:
            curve_fit(decay, x, y, **TIGHT, strategy=strategy, partitions_per_thread=8)
        assert "worked on block (7,) of the data, the last one" in str(err.value)
        assert len((tmp_path / "deaths").read_text()) == deaths
        wait_for(client, 2)
        assert_nothing_left(client)


@pytest.mark.slow
def test_arrays_from_memory_that_kill_three_workers_are_named(tmp_path):
    def deadly(x, a, b, c):
        if "DOOMED" in os.environ:
            with open(tmp_path / "deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return decay(x, a, b, c)

    with local(1, env={"DOOMED": "yes"}) as cluster, Client(cluster) as client:
        with pytest.raises(RuntimeError, match=r"3 workers died while they worked on block \(0,\) of the data"):
            curve_fit(deadly, X, Y, **TIGHT, strategy="chunked")
        assert len((tmp_path / "deaths").read_text()) == 3
        wait_for(client, 1)
        assert_nothing_left(client)


def interrupted(number, frame):
    """Ctrl-C; pressed again where Python would swallow it, in a `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.01, signal.raise_signal, [number]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "end, kind",
    [("success", "streaming"), ("failure", "chunked"), *(("ctrl-c", kind) for kind in KINDS),
     *(pytest.param(*each, marks=pytest.mark.slow)
       for each in [("success", "chunked"), ("success", "in_memory"), ("failure", "in_memory"), ("failure", "streaming")])],
)  # fmt: skip
def test_nothing_is_left_on_the_cluster_after(client, kind, end):
    wait_for(client, 2)

    with client.as_current():
        if end == "success":
            curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind])
        elif end == "failure":
            with pytest.raises(RuntimeError, match="max_nfev"):
                curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind], max_nfev=1)
        else:
            before = signal.signal(signal.SIGINT, interrupted)
            interrupt = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
            try:
                with pytest.raises(KeyboardInterrupt):
                    curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind], callback=at_sweep(2, interrupt.start))
                    time.sleep(1)  # where the fit was quicker
            finally:
                signal.signal(signal.SIGINT, before)
    assert_nothing_left(client)


@pytest.mark.slow
def test_a_fit_inside_a_task_leaves_its_thread_to_its_own_tasks():
    def with_worker_client():
        with worker_client():
            return curve_fit(decay, *lazy(), **TIGHT)

    def with_get_client():
        get_client()
        return curve_fit(decay, *lazy(), **TIGHT)

    expected = curve_fit(decay, *lazy(), **TIGHT)
    with local(1) as cluster, Client(cluster, set_as_default=False) as client:
        for task in (with_worker_client, with_get_client):
            found = client.submit(task).result(timeout=120)
            assert found.strategy == "chunked"
            np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-10)  # joined into other blocks there


@pytest.mark.slow
def test_an_asynchronous_client_is_refused_with_the_way_that_works(client):
    async def fits():
        async with Client(client.scheduler.address, asynchronous=True):
            with pytest.raises(TypeError, match=r"asyncio\.to_thread"):
                curve_fit(decay, *lazy(), **TIGHT)
            return await asyncio.to_thread(curve_fit, decay, *lazy(), **TIGHT)

    wait_for(client, 2)
    found = asyncio.run(fits())
    assert found.strategy == "chunked"
    assert_same(found, alone("chunked"))


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_the_fit_and_the_checkpoint_goes_on(tmp_path):
    kept = tmp_path / "kept"
    with command_line(tmp_path, 1) as (client, scheduler, _), client.as_current():
        with pytest.raises(ConnectionError, match=r"went away.*resume"):
            curve_fit(decay, *lazy(), **TIGHT, checkpoint=kept, callback=at_sweep(2, scheduler.kill))
        client.close(timeout=1)
    found = resume(kept, decay, *lazy())
    assert_same(found, alone("streaming"))


@pytest.mark.slow
def test_workers_that_join_and_leave_in_mid_fit_change_nothing():
    with local(1) as cluster, Client(cluster) as client:

        def grow():
            cluster.scale(3)
            wait_for(client, 3)

        grows, shrinks = at_sweep(2, grow), at_sweep(4, lambda: cluster.scale(1))

        def callback(record):
            grows(record)
            shrinks(record)

        found = curve_fit(decay, *lazy(), **TIGHT, callback=callback)
    assert_same(found, alone("chunked"))


SIZES = [(1, 2), *(pytest.param(n, k, marks=pytest.mark.slow) for n, k in [(1, 1), (2, 2), (3, 1), (4, 1), (4, 2)])]


@pytest.mark.parametrize("n_workers, n_threads", SIZES)
def test_every_cluster_gives_the_same_bits(n_workers, n_threads):
    with local(n_workers, threads_per_worker=n_threads) as cluster, Client(cluster):
        for kind in KINDS:
            assert_same(curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind]), alone(kind))


@pytest.mark.slow
def test_workers_of_different_size_share_a_fit(tmp_path):
    file = str(tmp_path / "scheduler.json")
    workers = [["worker", "--scheduler-file", file, "--memory-limit", limit, "--no-dashboard"] for limit in ("1GB", "3GB")]
    scheduler = ["scheduler", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", file]
    with started(scheduler, *workers), Client(scheduler_file=file, set_as_default=False, timeout=30) as client:
        wait_for(client, 2)
        with client.as_current():
            found = curve_fit(decay, *lazy(), **TIGHT)
    assert len({place.limit for place in found.plan.places[1:]}) == 2
    assert_same(found, alone("chunked"))


def keys_run_there(client):
    """By worker: what tasks of fits it has had."""

    def names(dask_worker):
        keys = [str(event.key) for event in dask_worker.state.stimulus_log if hasattr(event, "key")]
        return {key_split(key) for key in keys if key.startswith("nlsq")}

    return client.run(names)


@pytest.mark.slow
def test_a_fit_asks_for_resources_by_an_annotation(tmp_path, caplog):
    expected = {kind: alone(kind) for kind in ("chunked", "streaming")}
    file = str(tmp_path / "scheduler.json")
    scheduler = ["scheduler", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", file]
    plain = ["worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    with started(scheduler, plain, [*plain, "--resources", "GPU=1"]), Client(scheduler_file=file, timeout=30) as client:
        wait_for(client, 2)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        (has_it,) = (address for address, worker in workers.items() if worker["resources"])
        for kind in expected:
            with dask.annotate(resources={"GPU": 1}):
                found = curve_fit(decay, *data(kind), **TIGHT, **KINDS[kind], partitions_per_thread=8)
            assert [place.name for place in found.plan.places[1:]] == [has_it]
            assert_same(found, expected[kind])
            ran = keys_run_there(client)
            assert {"nlsq-load", "nlsq-sweep"} <= ran.pop(has_it)
            assert not any(ran.values())
        with dask.annotate(resources={"TPU": 1}), caplog.at_level(logging.WARNING, "dask_nlsq"):
            plan_fit(decay, *data("chunked"))
    assert "resources {'TPU': 1}" in caplog.text


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here that JAX can use")
def test_a_worker_with_a_gpu_gives_the_same_fit():
    with (
        local(1, resources={"GPU": 1}, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}) as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(jax.default_backend).result() == "gpu"
        with dask.annotate(resources={"GPU": 1}):
            found = curve_fit(decay, *lazy(), **TIGHT)
    with jax.default_device("cpu"):
        expected = alone("chunked")
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    np.testing.assert_allclose(found.pcov, expected.pcov, rtol=1e-6)
