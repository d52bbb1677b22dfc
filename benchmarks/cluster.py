"""What a cluster costs and survives: time per sweep beyond the kernel, workers that are killed, memory of the scheduler.

``python -m benchmarks.cluster`` prints all figures; names of functions as arguments choose: ``... overhead kills``.
"""

import asyncio
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import psutil
from distributed import Client, LocalCluster, Worker
from distributed.threadpoolexecutor import ThreadPoolExecutor

import dask_nlsq
from dask_nlsq.data.align import build_data
from dask_nlsq.data.chunks import Census
from dask_nlsq.data.loading import Load
from dask_nlsq.engine.cluster import Pieces
from dask_nlsq.engine.condensed import Sums, Tree
from dask_nlsq.engine.partition import Answers, Work
from dask_nlsq.engine.places import HeldByWorkers
from dask_nlsq.engine.request import Objective, Request
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.engine.waiting import calm
from dask_nlsq.kernels.rows import segment_size
from dask_nlsq.memory.machine import process_memory
from dask_nlsq.memory.plan import PER_THREAD, count_partitions, tasks_per_thread
from dask_nlsq.model.function import intern

PARAMS = np.array([2.0, 0.5, 0.3])
P0 = [5.0, 2.0, -1.0]
KILLS = 20
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, jac_mode="columns")


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


REQUEST = Request(Objective(intern(decay)), PARAMS)


def lazy(n, chunk):
    x = da.linspace(0, 10, n, chunks=chunk)
    return x, 2 * da.exp(-0.5 * x) + 0.3 + 0.05 * da.sin(1e4 * x)


def seconds(run, n=15):
    """Least and median of the time of ``run()``, after a first one."""
    run()
    times = []
    for _ in range(n):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times), float(np.median(times))


@contextmanager
def local(n_workers=2, **options):
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),  # else it closes nannies of killed workers
        LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=":0", **options) as cluster,
        Client(cluster) as client,
    ):
        yield cluster, client


def gram_of_block(x, y, a, b, c):
    """[J r]^T [J r] of a block in NumPy, for the graph that is built anew in each iteration."""
    e = np.exp(-b * x)
    rows = np.stack([e, -a * x * e, np.ones_like(x), a * e + c - y])
    return (rows @ rows.T)[None]


def overhead(n=2**21):
    """Per sweep, 2 single-thread workers; the kernel alone: the same points in this process on 2 threads."""
    with local() as (_, client), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph")
        for n_chunks in (32, 512, 4096):
            x, y = lazy(n, n // n_chunks)
            problem = build_data(x, y, check=True, omit=False)
            with open_sweep(problem) as sweep:
                kernel, _ = seconds(lambda sweep=sweep: sweep.run([REQUEST]))
            with open_sweep(problem, "chunked", client, 4) as sweep:
                least, median = seconds(lambda sweep=sweep: sweep.run([REQUEST]))
            print(f"{n_chunks} chunks: overhead {1e3 * (least - kernel):.1f} ms (median {1e3 * (median - kernel):.1f})")
            if n_chunks == 512:
                x, y = dask.persist(x, y)

                def graph(x=x, y=y):
                    parts = da.map_blocks(
                        gram_of_block, x, y, *PARAMS, dtype=float, new_axis=[1, 2], chunks=((1,) * 512, (4,), (4,)),
                        meta=np.empty((0, 0, 0)),
                    )  # fmt: skip
                    return parts.sum(axis=0).compute()

                rebuilt, _ = seconds(graph, 3)
                print(f"512 chunks: a graph of map_blocks per iteration {1e3 * rebuilt:.0f} ms, ours {1e3 * least:.1f} ms")


def kills(n=KILLS):
    """Fits during which a random worker gets SIGKILL at a random moment: how many have the bits of an undisturbed one."""
    x, y = lazy(10**6, 10**4)
    expected = dask_nlsq.curve_fit(decay, x, y, P0, strategy="standard", **TIGHT)
    warm = lazy(10**4, 10**3)

    def one(client, dice):
        pids = client.run(os.getpid, on_error="ignore")  # one that was shot late may still be listed
        dask_nlsq.curve_fit(decay, *warm, P0, **TIGHT)  # JAX starts
        began = time.perf_counter()
        dask_nlsq.curve_fit(decay, x, y, P0, **TIGHT)
        lasts = time.perf_counter() - began
        shot = threading.Timer(dice.uniform(0, lasts), os.kill, [dice.choice(sorted(pids.values())), signal.SIGKILL])
        shot.start()
        found = dask_nlsq.curve_fit(decay, x, y, P0, **TIGHT)
        shot.join()
        return bool(np.array_equal(found.popt, expected.popt) and np.array_equal(found.pcov, expected.pcov))

    same = 0
    with local(2) as (_, client):
        for k in range(n):
            same += one(client, random.Random(k))
            while len(client.scheduler_info(n_workers=-1)["workers"]) < 2:
                time.sleep(0.1)
    print(f"{n} fits, a worker killed that is started again: {same} with the same bits")
    same = 0
    for begin in range(0, n, 5):
        with local(6, memory_limit=0) as (cluster, client):
            for nanny in cluster.workers.values():
                nanny.auto_restart = False
            for k in range(begin, min(n, begin + 5)):
                same += one(client, random.Random(k))
    print(f"{n} fits, a worker killed that does not come back: {same} with the same bits")


def scheduler_memory(n_sweeps=200):
    """Growth of a scheduler process over so many sweeps of 512 chunks: in as many tasks as a fit takes, and in the most.

    Dask keeps the last 1000 messages to each worker (``distributed.admin.low-level-log-length``), with the tasks in them.
    """
    for n_partitions in (2 * PER_THREAD, 512):
        _scheduler_memory(n_sweeps, n_partitions)


def _scheduler_memory(n_sweeps, n_partitions):
    with tempfile.TemporaryDirectory() as directory:
        file = str(Path(directory, "scheduler.json"))
        dask_ = [sys.executable, "-m", "dask"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        commands = [[*dask_, "scheduler", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", file]]
        commands += [[*dask_, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard"]] * 2
        processes = [subprocess.Popen(commands[0], **quiet)]
        try:
            while not os.path.exists(file):
                time.sleep(0.1)
            processes += [subprocess.Popen(command, **quiet) for command in commands[1:]]
            with Client(scheduler_file=file) as client:
                client.wait_for_workers(2)
                problem = build_data(*lazy(2**21, 4096), check=True, omit=False)
                with open_sweep(problem, "chunked", client, n_partitions) as sweep:
                    n_tasks = len(sweep.place.pieces)
                    for _ in range(20):
                        sweep.run([REQUEST])
                    before = psutil.Process(processes[0].pid).memory_info().rss
                    for _ in range(n_sweeps):
                        sweep.run([REQUEST])
                    after = psutil.Process(processes[0].pid).memory_info().rss
            print(
                f"scheduler after {n_sweeps} sweeps of 512 chunks ({n_tasks} tasks each): {(after - before) / 1e6:+.1f} MB"
            )
        finally:
            for process in processes[::-1]:
                process.terminate()
                process.wait()


def scaling(n=5 * 10**7):
    """Sweeps of n points on 1 and on 2 single-thread workers, and by 2 threads without a cluster."""
    times = []
    with dask.config.set(num_workers=2), open_sweep(build_data(*lazy(n, n // 64), check=True, omit=False)) as sweep:
        here = seconds(lambda: sweep.run([REQUEST]), 5)[0]
    for n_workers in (1, 2):
        with local(n_workers, env={"PJRT_NPROC": "1"}, memory_limit=0) as (_, client):
            problem = build_data(*lazy(n, n // 64), check=True, omit=False)
            with open_sweep(problem, "chunked", client, 4 * n_workers) as sweep:
                times.append(seconds(lambda sweep=sweep: sweep.run([REQUEST]), 5)[0])
    print(
        f"{n:.0e} points held by 1 and 2 workers: {times[0]:.2f} s and {times[1]:.2f} s, {times[0] / times[1]:.2f} times; "
        f"2 workers / 2 threads without a cluster: {times[1] / here:.2f}"
    )


def closure(n=500_000, nbytes=200e6):
    """Fits of a model that closes over a large array: seconds of each, peak of each worker."""
    table = np.random.default_rng(0).random(int(nbytes / 8))

    def looked_up(x, a, b, c):
        return a * jnp.exp(-b * x) + c * jnp.asarray(table)[jnp.asarray(x * 100, jnp.int64)]

    x = np.linspace(0, 5, n)
    y = 2 * np.exp(-1.2 * x) + 0.3 * table[(x * 100).astype(int)] + np.random.default_rng(1).normal(0, 0.01, n)
    with local(memory_limit="4GB") as (_, client):
        for k in range(3):
            began = time.perf_counter()
            data = (da.from_array(each, chunks=n // 10) for each in (x, y))
            dask_nlsq.curve_fit(looked_up, *data, p0=[1, 1, 0], strategy="chunked", partitions_per_thread=5)
            print(f"fit {k + 1} of a model of {nbytes / 1e6:.0f} MB, 10 chunks: {time.perf_counter() - began:.2f} s")
        peaks = [peak / 1e9 for _, peak in client.run(process_memory).values()]
        print(f"peak of the workers: {', '.join(f'{peak:.2f} GB' for peak in peaks)}")


class Simulated(HeldByWorkers):
    """Sweeps of chunks that are not there: what is left is their tasks, merge and messages."""

    def __init__(self, client, n_chunks, n_workers):
        runs = [[Load((k,), (1,), [])] for k in range(n_chunks)]
        n = count_partitions(n_chunks, n_workers, tasks_per_thread(n_workers))
        self.n_runs, self.pieces = n_chunks, Pieces(client, empty_partition, None, runs, {}, n, False)
        self.level = self.pieces.level
        self.pieces.wait(calm)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def sweep(self):
        tree = Tree(self.n_runs, "gram")
        for unit, answers in self.each(NOTHING, None, (REQUEST.objective,), [REQUEST._replace(objective=0)]):
            tree.add(self.level, unit, answers.sums[0])
        return tree.root()


def no_work(partition, objectives, requests):
    p = len(requests[0].params)
    return Answers([Sums(np.eye(p + 1), 1.0, np.ones((len(partition), segment_size(p))))], Census((), 1, 0, 0, {}), ())


NOTHING = Work("sweep", no_work, None)


def empty_partition(preparation, runs, keys, *values):
    return [None] * len(runs)


def host(address, n_workers, directory):
    """Workers of one thread each, in one process and with one thread for all: a thousand threads would wait for the GIL."""

    async def serve():
        one = ThreadPoolExecutor(1)
        options = dict(nthreads=1, executor=one, memory_limit=0, dashboard=False, local_directory=directory)
        await asyncio.gather(*(Worker(address, name=f"{os.getpid()}-{k}", **options) for k in range(n_workers)))
        await asyncio.Event().wait()

    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set(QUIET):
        asyncio.run(serve())


# what each of a thousand workers does on its own core, many times a second
QUIET = {
    "distributed.admin.tick.interval": "1 hour",
    "distributed.admin.system-monitor.interval": "1 hour",
    "distributed.worker.profile.enabled": False,
}


def simulated_workers(n_workers=1000, n_chunks=10**5, n_processes=2):
    """Sweeps of chunks of no work: real scheduler, client and TCP; a thousand real workers that share few processes."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        LocalCluster(n_workers=0, processes=False, protocol="tcp://", dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        arguments = (client.scheduler.address, n_workers // n_processes, directory)
        hosts = [spawn.Process(target=host, args=arguments, daemon=True) for _ in range(n_processes)]
        try:
            for each in hosts:
                each.start()
            client.wait_for_workers(n_workers, timeout=300)
            with Simulated(client, n_chunks, n_workers) as place:
                n_tasks, began, runs = len(place.pieces), time.process_time(), 4
                least, median = seconds(place.sweep, runs)
                cpu = (time.process_time() - began) / (runs + 1)
        finally:
            for each in hosts:
                each.kill()
                each.join()
    print(
        f"{n_workers} workers in {n_processes} processes, {n_chunks} chunks of no work in {n_tasks} tasks: {least:.2f} s a "
        f"sweep (median {median:.2f}), of which scheduler and client computed for {cpu:.2f}"
    )


if __name__ == "__main__":
    figures = dict(
        overhead=overhead,
        kills=kills,
        scheduler_memory=scheduler_memory,
        scaling=scaling,
        simulated=simulated_workers,
        closure=closure,
    )
    for name in sys.argv[1:] or figures:
        figures[name]()
