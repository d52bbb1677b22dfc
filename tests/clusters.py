"""Real clusters for tests: in this process's hands, and from the command line."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

from distributed import Client, LocalCluster


def local(n_workers=2, **options):
    options = dict(threads_per_worker=1, dashboard_address=":0") | options
    return LocalCluster(n_workers=n_workers, **options)


def wait_for(client, n_workers):
    for _ in range(600):  # what a cluster itself knows of workers that were restarted comes late
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if sum(worker["status"] == "running" for worker in workers) >= n_workers:
            return
        time.sleep(0.1)
    raise AssertionError(f"{n_workers} workers did not come")


@contextmanager
def started(*commands):
    """Processes of `dask` commands, ended by their pid."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def command_line(tmp_path, n_workers, *options):
    """`dask scheduler` with ``options`` and workers without a nanny: a client, the scheduler, the workers."""
    file = str(tmp_path / "scheduler.json")
    scheduler = ["scheduler", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", file, *options]
    worker = ["worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    with started(scheduler) as (top,):
        while not os.path.exists(file):
            time.sleep(0.05)
        with started(*[worker] * n_workers) as workers, Client(scheduler_file=file, set_as_default=False) as client:
            wait_for(client, n_workers)
            yield client, top, workers


def assert_nothing_left(client):
    """Neither futures nor data, as soon as tasks that were running have ended."""

    def held(dask_scheduler):
        return {state.key for state in dask_scheduler.tasks.values()}

    for _ in range(200):
        left = client.run_on_scheduler(held), {key for keys in client.run(lambda dask_worker: [*dask_worker.data]).values()
                                              for key in keys}  # fmt: skip
        if not any(left) and not [key for key, state in client.futures.items() if state.status != "cancelled"]:
            return
        time.sleep(0.1)
    raise AssertionError(f"left on the cluster: {left}, {client.futures}")


def at_sweep(n, act):
    """A callback that acts once, after so many sweeps."""
    todo = [act]

    def callback(record):
        if record.nfev >= n and todo:
            todo.pop()()

    return callback
