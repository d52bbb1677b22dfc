"""Ctrl-C gives back the best point so far; workers that are gone are waited for, as long as one wants."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client

from dask_nlsq import Interrupted, NoWorkersError, curve_fit, fit, fit_groups, fit_map, resume
from dask_nlsq.engine.waiting import StopOnSignal, ToldToLeave

from .clusters import assert_nothing_left, at_sweep, command_line, local

N, CHUNK = 60_000, 2_000
X = np.linspace(0, 10, N)
Y = 2 * np.exp(-0.5 * X) + 0.3 + np.random.default_rng(7).normal(0, 0.05, N)
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, p0=[5.0, 2.0, -1.0], jac_mode="columns")
ROWS = np.exp(-0.5 * X[::600]) * np.arange(2, 42)[:, None] + np.random.default_rng(1).normal(0.3, 0.1, (40, 100))
GROUPS = dict(p0=[4.0, 2.0, -1.0], local="a", group_axes=0)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def lazy():
    return da.from_array(X, CHUNK), da.from_array(Y, CHUNK)


FITS = {
    "standard": lambda **how: curve_fit(decay, X, Y, **TIGHT, **how),
    "fit": lambda **how: fit(decay, X, Y, workflow="standard", **TIGHT, **how),
    "chunked": lambda **how: curve_fit(decay, *lazy(), **TIGHT, strategy="chunked", **how),
    "streaming": lambda **how: curve_fit(decay, *lazy(), **TIGHT, strategy="streaming", **how),
    "groups": lambda **how: fit_groups(decay, X[::600], da.from_array(ROWS, (10, 100)), **GROUPS, **how),
}


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("fit", "chunked")]


@pytest.mark.parametrize("kind", ["standard", "streaming", "groups", *SLOW])
def test_ctrl_c_gives_back_the_best_point_so_far(kind):
    points = []

    def callback(record):
        points.append(record.params)
        if record.nfev == 3:
            ctrl_c()

    with pytest.raises(KeyboardInterrupt) as stopped:
        FITS[kind](callback=callback)
    result = stopped.value.result
    assert isinstance(stopped.value, Interrupted) and result.status == -3 and not result.success
    np.testing.assert_array_equal(result.popt, points[-1])
    assert np.isfinite(result.pcov).all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert FITS[kind]().success


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streaming", *(pytest.param(k, marks=pytest.mark.slow) for k in ("chunked", "groups"))])
def test_ctrl_c_in_a_sweep_on_workers_leaves_nothing_behind(kind, workers, caplog):
    timer = threading.Timer(0.02, ctrl_c)
    with workers.as_current(), caplog.at_level(logging.ERROR, "asyncio"):
        with pytest.raises(KeyboardInterrupt) as stopped:
            FITS[kind](callback=at_sweep(2, timer.start))
            time.sleep(1)  # where the fit was quicker
        assert isinstance(stopped.value, Interrupted)
        assert stopped.value.result.nfev >= 2
        del stopped  # which holds on to the groups
        gc.collect()
        assert_nothing_left(workers)
        assert FITS[kind]().success
    asyncio.run(asyncio.sleep(0))
    assert not [record for record in caplog.records if "never retrieved" in record.message]


@pytest.mark.slow
def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector():
    def collected(phase, info):
        if phase == "start" and armed:
            armed.clear()
            ctrl_c()

    armed: list = []
    gc.callbacks.append(collected)
    try:
        with pytest.raises(Interrupted):
            FITS["standard"](callback=at_sweep(2, lambda: (armed.append(1), gc.collect())))
    finally:
        gc.callbacks.remove(collected)


def test_ctrl_c_before_there_is_a_point_and_a_second_one_work_as_always():
    with StopOnSignal(False) as stop:
        ctrl_c()
        with pytest.raises(ToldToLeave) as told:
            stop.look()
        assert isinstance(told.value.exit, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_handler_of_somebody_else_stays_where_no_checkpoint_is_kept(tmp_path):
    called = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append(1))
    try:
        assert FITS["streaming"](callback=at_sweep(2, ctrl_c)).success
        assert called == [1]
        stopped = FITS["streaming"](callback=at_sweep(2, ctrl_c), checkpoint=tmp_path / "c")
        assert (stopped.status, called) == (-3, [1])
    finally:
        signal.signal(signal.SIGINT, before)


def test_with_a_checkpoint_ctrl_c_returns_the_result_and_the_log_says_where_it_is_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dask_nlsq"):
        stopped = FITS["streaming"](callback=at_sweep(2, ctrl_c), checkpoint=tmp_path / "c")
    assert stopped.status == -3
    assert f"Completed sweeps are in {tmp_path / 'c'}, for `resume`" in caplog.text
    x, y = lazy()
    np.testing.assert_array_equal(resume(tmp_path / "c", decay, x, y).popt, FITS["streaming"]().popt)


@pytest.mark.parametrize("kind", ["streaming", "groups"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_callback_of_a_fit_with_a_checkpoint_is_not_lost(kind, number, tmp_path, caplog):
    whole = FITS[kind]()
    last = at_sweep(whole.nfev, lambda: signal.raise_signal(number))
    with caplog.at_level(logging.WARNING, "dask_nlsq"):
        stopped = FITS[kind](callback=last, checkpoint=tmp_path / "c")
    assert stopped.status == -3 and not stopped.success
    assert f"The fit had just ended: {whole.message}" in stopped.message and str(tmp_path / "c") in caplog.text
    again = FITS[kind](checkpoint=tmp_path / "c")
    for found in (stopped, again):
        np.testing.assert_array_equal(found.popt, whole.popt)
    assert (again.status, again.resumed) == (whole.status, whole.sweeps)


class Pressing:
    """An array whose reading presses Ctrl-C once it is ``armed``."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim, self.armed = values, values.shape, values.dtype, values.ndim, False

    def __getitem__(self, index):
        if self.armed and index[0].stop > index[0].start:  # Dask asks for no element, to see what it gets
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
        return self.values[index]


def test_a_signal_while_the_point_of_the_end_is_read_again_loses_no_result(tmp_path):
    x = np.linspace(0, 4, 4000)
    y = Pressing(2.5 * np.exp(-1.3 * x) + 0.5 + np.random.default_rng(0).normal(0, 0.1, x.size))

    def called(**options):
        data = (da.from_array(each, 1000, name=name) for name, each in (("x", x), ("y", y)))
        with dask.config.set({"nlsq.checkpoint-seconds": 0}):
            return curve_fit(decay, *data, [9.0, 5.0, 3.0], checkpoint=tmp_path / "c", **options)

    whole = called()
    y.armed = True
    stopped = called(max_nfev=2)
    assert not y.armed  # a point in between, of which the checkpoint has sums alone, was read again
    assert (stopped.status, stopped.nfev) == (-3, 2) and np.isfinite(stopped.sandwich).all()
    assert called().popt.tolist() == whole.popt.tolist()


@pytest.mark.parametrize("kind", ["standard", "groups"])
def test_ctrl_c_comes_before_a_limit_of_evaluations(kind):
    with pytest.raises(Interrupted):
        FITS[kind](callback=at_sweep(1, ctrl_c), max_nfev=1)


@pytest.mark.slow
def test_blocks_of_a_map_that_are_written_stay_after_ctrl_c(tmp_path):
    def interrupting(block, block_info=None):
        if block_info and block_info[0]["chunk-location"] == (2, 0) and armed:
            armed.clear()
            ctrl_c()
        return block

    armed = [1]
    y = da.from_array(ROWS, (10, 100)).map_blocks(interrupting, dtype=float, meta=np.empty((0, 0)))
    maps = fit_map(decay, X[::600], y, GROUPS["p0"])
    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(KeyboardInterrupt):
            maps.to_zarr(tmp_path / "m")
        armed.clear()
        found = maps.to_zarr(tmp_path / "m", resume=True)
    np.testing.assert_array_equal(found["popt"][...], maps.compute().popt)


# ---------------------------------------------------------------------------------------------------------------------
# workers


@pytest.mark.slow
def test_a_fit_whose_workers_are_all_gone_says_so_and_ends_at_the_deadline(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dask_nlsq.engine.waiting.PATIENCE", 1.0)
    whole, kept = FITS["streaming"](), tmp_path / "c"
    with command_line(tmp_path, 1) as (client, _, workers), client.as_current():
        with (
            dask.config.set({"nlsq.worker-deadline": 3, "nlsq.checkpoint-seconds": 0.0}),
            caplog.at_level(logging.WARNING, "dask_nlsq"),
            pytest.raises(NoWorkersError, match=r"no workers for . s, and `nlsq.worker-deadline` is 3.*resume"),
        ):
            FITS["streaming"](checkpoint=kept, callback=at_sweep(2, workers[0].kill))
        assert caplog.text.count("the fit waits for some for 2 s more") == 1
        assert_nothing_left(client)
    np.testing.assert_array_equal(resume(kept, decay, *lazy()).popt, whole.popt)


@pytest.mark.slow
def test_without_a_deadline_a_fit_waits_for_workers_until_ctrl_c(tmp_path):
    with command_line(tmp_path, 1) as (client, _, workers), client.as_current():
        timer = threading.Timer(2, ctrl_c)

        def alone():
            workers[0].kill()
            timer.start()

        with pytest.raises(KeyboardInterrupt) as stopped:
            FITS["chunked"](callback=at_sweep(2, alone))
    assert isinstance(stopped.value, Interrupted)
    assert stopped.value.result.nfev == 2


def deadly(path, place):
    def read(block, block_info=None):
        if block_info and block_info[0]["chunk-location"] == place and "DOOMED" in os.environ:
            with open(path / "deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    return read


@pytest.mark.slow
@pytest.mark.parametrize("allowed, kind", [(3, "map"), *(pytest.param(*each, marks=pytest.mark.slow) for each in
                                                          [(1, "map"), (3, "zarr"), (3, "groups")])])  # fmt: skip
def test_a_block_that_kills_workers_is_named_and_no_other(allowed, kind, tmp_path):
    y = da.from_array(ROWS, (5, 100)).map_blocks(deadly(tmp_path, (5, 0)), dtype=float, meta=np.empty((0, 0)))
    allowed = {"distributed.scheduler.allowed-failures": allowed}
    with dask.config.set(allowed), local(env={"DOOMED": "yes"}, threads_per_worker=2) as cluster, Client(cluster) as client:
        with pytest.raises(RuntimeError, match="3 workers died") as err:
            if kind == "groups":
                fit_groups(decay, X[::600], y, **GROUPS, strategy="streaming")
            elif kind == "zarr":
                fit_map(decay, X[::600], y, GROUPS["p0"]).to_zarr(tmp_path / "m")
            else:
                fit_map(decay, X[::600], y, GROUPS["p0"]).compute()
        word = "groups" if kind == "groups" else "pixels"
        assert f"worked on block (5,), {word} 25 to 29, the last one" in str(err.value)
        assert len((tmp_path / "deaths").read_text()) == 3
        assert_nothing_left(client)
    if kind == "zarr":
        y = da.from_array(ROWS, (5, 100))
        found = fit_map(decay, X[::600], y, GROUPS["p0"]).to_zarr(tmp_path / "m", resume=True)
        assert np.isfinite(found["popt"][...]).all()


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_map_costs_time_and_no_digit():
    expected = fit_map(decay, X[::600], da.from_array(ROWS, (5, 100)), GROUPS["p0"]).compute()
    with local() as cluster, Client(cluster) as client:
        (pid, _) = client.run(os.getpid).values()
        shot = threading.Timer(0.3, os.kill, [pid, signal.SIGKILL])
        shot.start()
        found = fit_map(decay, X[::600], da.from_array(ROWS, (5, 100)), GROUPS["p0"]).compute()
        assert not shot.is_alive()
    np.testing.assert_array_equal(found.popt, expected.popt)
