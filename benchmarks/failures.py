"""What is lost when things fail: full disks, Ctrl-C, processes that are killed, and a day of fits on one cluster.

``python -m benchmarks.failures`` draws all moments anew and prints its seed; names of functions and a number as arguments
choose: ``... ctrl_c 10``. ``SEED=1`` repeats a run.
"""

import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import psutil

import dask_nlsq
import dask_nlsq.data.align
from benchmarks.cluster import local
from tests.clusters import command_line
from tests.disks import small_disk

dask_nlsq.data.joining.JOINED_POINTS = 1  # small chunks stay apart
SEED = int(os.environ.get("SEED") or random.randrange(10**6))
X = np.linspace(0, 10, 40_000)
Y = 200 * np.exp(-0.5 * X) + 30 + np.random.default_rng(3).normal(0, 3, X.size)
T, ROWS = (
    X[::200],
    np.exp(-0.5 * X[::200]) * np.arange(2, 42)[:, None] + np.random.default_rng(1).normal(0.3, 0.1, (40, 200)),
)
P0, START = [600.0, 2.0, -90.0], [4.0, 2.0, -1.0]
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, jac_mode="columns", p0=P0)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def scaled(scale, x, a, b, c):
    return scale * decay(x, a, b, c)


def lazy(values, n):
    return da.from_array(values, (n, *values.shape[1:]))


FITS = {  # all may be called with further options; the first two take a checkpoint
    "streaming": lambda **how: dask_nlsq.curve_fit(decay, X, lazy(Y, 1000), strategy="streaming", **TIGHT, **how),
    "groups": lambda **how: dask_nlsq.fit_groups(decay, T, lazy(ROWS, 4), START, local="a", group_axes=0, **how),
    "standard": lambda **how: dask_nlsq.curve_fit(decay, X, Y, **TIGHT, **how),
    "chunked": lambda **how: dask_nlsq.curve_fit(decay, lazy(X, 1000), lazy(Y, 1000), strategy="chunked", **TIGHT, **how),
}
KEPT, ON_WORKERS = ("streaming", "groups"), ("streaming", "groups", "chunked", "map")


def map_of(rows=None):
    return dask_nlsq.fit_map(decay, T, lazy(ROWS, 4) if rows is None else rows, START)


def bits(result) -> bytes:
    return b"".join(np.asarray(each).tobytes() for each in (result.popt, getattr(result, "pcov", 0)))


def once(n, act):
    """A callback that acts after ``n`` sweeps."""
    return lambda record: act() if record.nfev == n else None


def full_disks(n=20):
    """A disk fills up at a random sweep, or under a file that is saved: right or resumable, and old files as they were."""
    good, rng = 0, random.Random(SEED)
    for k in range(n):
        kind = ("streaming", "groups", "save", "report", "map")[k % 5]
        with tempfile.TemporaryDirectory() as place, small_disk(Path(place) / "disk") as disk, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = disk.path / kind
            if kind in KEPT:
                whole = FITS[kind]()
                found = FITS[kind](checkpoint=path, callback=once(rng.randint(1, 4), disk.fill))
                disk.empty()
                good += bits(found) == bits(whole) == bits(FITS[kind](checkpoint=path))
            elif kind == "map":
                maps, index = map_of(), rng.randrange(10)

                def fills(block, block_info=None, disk=disk, index=index):
                    if block_info and block_info[0]["chunk-location"][0] == index:
                        disk.fill()
                    return block

                with dask.config.set(scheduler="synchronous"), suppress(OSError):
                    map_of(lazy(ROWS, 4).map_blocks(fills, dtype=float, meta=np.empty((0, 0)))).to_zarr(path)
                disk.empty()
                good += maps.to_zarr(path, resume=True)["popt"][...].tobytes() == maps.compute().popt.tobytes()
            else:
                result = FITS["standard"]()
                write = result.save if kind == "save" else result.report
                write(path)
                before = {each: each.read_bytes() for each in [path, *path.rglob("*")] if each.is_file()}
                disk.fill(rng.choice([0, 4096, 8192]))
                with suppress(OSError):
                    write(path)
                disk.empty()
                same = all(each.read_bytes() == was for each, was in before.items())
                good += same if kind == "report" else bits(dask_nlsq.load(path)) == bits(result)
    print(f"full disks: {good} of {n} end right or are resumable, with old files intact (seed {SEED})")


def ctrl_c(n=100):
    """At a random moment of a fit: its best point is returned, nothing is left, the next fit works."""
    good, early, rng = 0, 0, random.Random(SEED)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with local() as (_, client):
        whole = {kind: bits(FITS[kind]()) for kind in FITS}
        seconds = {}  # before there is a point, and in all
        for kind in FITS:
            began, times = time.perf_counter(), []
            FITS[kind](callback=lambda record, times=times: times.append(time.perf_counter()))
            seconds[kind] = times[0] - began, time.perf_counter() - began
        for k in range(n):
            kind, points = list(FITS)[k % len(FITS)], []
            first, last = seconds[kind]
            moment = rng.uniform(0, last - first if k % 4 else first)  # one of four comes before there is a point
            timer = threading.Timer(moment, os.kill, [os.getpid(), signal.SIGINT])

            def callback(record, points=points, timer=timer, k=k):
                points.append(record.params)
                if k % 4 and len(points) == 1:
                    timer.start()

            right = False  # where the signal is lost
            try:
                if k % 4 == 0:
                    timer.start()
                FITS[kind](callback=callback)
                timer.join()
                time.sleep(1)  # where the fit was quicker
            except dask_nlsq.Interrupted as stop:
                right = np.array_equal(stop.result.popt, points[-1])
            except KeyboardInterrupt:  # before there was a point, or after the end
                early += 1
                right = not points or bits(FITS[kind]()) == whole[kind]
            right &= signal.getsignal(signal.SIGINT) is signal.default_int_handler
            good += right and bits(FITS[kind]()) == whole[kind] and nothing_left(client)
    print(f"Ctrl-C: {good} of {n} right, {early} of them before the first sweep or after the last one (seed {SEED})")


def nothing_left(client) -> bool:
    for _ in range(50):
        gc.collect()
        if not client.futures and not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
            return True
        time.sleep(0.1)
    return False


def kills(n=100):
    """kill -9 of the process, a worker or the scheduler at a random moment: the same bits, at once or when it goes on."""
    good, rng, whole = 0, random.Random(SEED), {kind: bits(FITS[kind]()) for kind in FITS}
    whole["map"] = map_of().compute().popt.tobytes()
    for k in range(n):
        with tempfile.TemporaryDirectory() as place:
            what = ("process", "worker", "scheduler")[k % 3]
            kind = rng.choice({"process": (*KEPT, "map"), "worker": ON_WORKERS, "scheduler": (*KEPT, "map")}[what])
            good += {"process": _process, "worker": _worker, "scheduler": _scheduler}[what](
                kind, Path(place), rng, whole[kind]
            )
    print(f"kill -9: {good} of {n} with the same bits (seed {SEED})")


def kept_fit(kind: str, place: Path) -> bytes:
    """A fit that goes on where an earlier process was."""
    with dask.config.set({"nlsq.checkpoint-seconds": 0.0}):
        if kind == "map":
            return map_of().to_zarr(place / "kept", resume=True)["popt"][...].tobytes()
        return bits(FITS[kind](checkpoint=place / "kept"))


def _process(kind, place, rng, whole) -> bool:
    code = f"from benchmarks.failures import *; print('on'); kept_fit({kind!r}, Path({str(place)!r}))"
    process = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(rng.uniform(0, 3))
    process.kill()
    process.communicate()
    return kept_fit(kind, place) == whole


def _worker(kind, place, rng, whole) -> bool:
    with local() as (_, client):
        pid = rng.choice([*client.run(os.getpid).values()])
        timer = threading.Timer(rng.uniform(0, 2), os.kill, [pid, signal.SIGKILL])
        timer.start()
        found = map_of().compute().popt.tobytes() if kind == "map" else bits(FITS[kind]())
        timer.join()  # while the worker is still there
        return found == whole


def _scheduler(kind, place, rng, whole) -> bool:
    with command_line(place, 2) as (client, scheduler, _), client.as_current():
        timer = threading.Timer(rng.uniform(0, 2), scheduler.kill)
        timer.start()
        with suppress(ConnectionError):
            kept_fit(kind, place)
        timer.join()
        client.close(timeout=1)
    return kept_fit(kind, place) == whole


def usage() -> tuple[float, int, int]:
    """MB, threads and descriptors of this process."""
    process = psutil.Process()
    return process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()


def day(n=2000, n_models=50):
    """Fits of many models on one cluster: what grows from the second quarter to the last one."""
    models = [partial(scaled, scale) for scale in range(1, n_models + 1)]
    with local() as (_, client):

        def everywhere():
            gc.collect()
            workers = client.run(usage).items()
            return {"client": usage(), "scheduler": client.run_on_scheduler(usage)} | dict(workers)

        seen, began = [], time.perf_counter()
        for k in range(n):
            if k % (n // 4) == 0:
                seen.append(everywhere())
            strategy = ("chunked", "streaming")[k // n_models % 2]
            dask_nlsq.curve_fit(models[k % n_models], lazy(X, 10_000), lazy(Y, 10_000), P0, strategy=strategy)
        seen.append(everywhere())
        print(f"{n} fits of {n_models} models in {time.perf_counter() - began:.0f} s; MB, threads, descriptors:")
        for who in seen[0]:
            print(f"  {who}: " + "; ".join("{:.0f} {} {}".format(*each[who]) for each in seen if who in each))


if __name__ == "__main__":
    import benchmarks.failures as this  # so that models have a module to be imported from

    names = [each for each in sys.argv[1:] if not each.isdigit()]
    numbers = [int(each) for each in sys.argv[1:] if each.isdigit()]
    for name in names or ("full_disks", "ctrl_c", "kills", "day"):
        getattr(this, name)(*numbers)
