import json
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from dask_nlsq import CheckpointError, NotConvergedError, curve_fit, hold, resume
from dask_nlsq.base.files import sum_of_values
from dask_nlsq.options import LIMITS, SAME
from dask_nlsq.prepare import HELD
from tests.checkpointed import P0, decay

N, CHUNK = 60_000, 500
X = np.linspace(0, 10, N)
Y = np.random.default_rng(3).poisson(200 * np.exp(-0.5 * X) + 30).astype("u2")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


def write(path):
    array = zarr.create_array(path, shape=Y.shape, dtype=Y.dtype, chunks=(CHUNK,))
    array[...] = Y
    return path


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "y.zarr")


class Killed(Exception):
    pass


class Dies:
    """An array on disk that counts its reads, and breaks at one of them."""

    def __init__(self, values, at=None):
        self.values, self.chunks, self.store, self.reads, self.at = values, (CHUNK,), None, Counter(), at
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, 1

    def __getitem__(self, item):
        if item[0].stop > item[0].start:
            self.reads[item[0].start // CHUNK] += 1
            if sum(self.reads.values()) == self.at:
                raise Killed
        return self.values[item]


def same_bits(found, expected):
    for name in ("popt", "pcov", "cost", "nfev", "sweeps", "status", "message", "n_points", "n_masked"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert [record.cost for record in found.history] == [record.cost for record in expected.history]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, places",
    [
        ({}, (5, 133)),
        pytest.param(dict(bounds=([0, 0, 0], [199, 9, 99])), (133,), marks=pytest.mark.slow),
        (dict(loss="soft_l1", reduction="qr"), (250,)),
        (dict(n_starts=3), (371,)),
    ],
    ids=["plain", "bounds", "qr", "starts"],
)
def test_a_fit_that_breaks_anywhere_goes_on_with_the_same_bits(options, places, tmp_path):
    p0 = [150, 0.35, 40]
    whole = curve_fit(decay, X, Dies(Y), p0, strategy="streaming", **options)
    for at in places:
        y, path = Dies(Y, at), tmp_path / f"{at}"
        with dask.config.set({"nlsq.checkpoint-seconds": 0.0}):
            with pytest.raises(Killed):
                curve_fit(decay, X, y, p0, checkpoint=path, **options)
            found = resume(path, ydata=y)
        same_bits(found, whole)
        again = sum(y.reads.values()) - (whole.sweeps * 120 + whole.sample.n_chunks)
        in_flight = 2 * (dask.system.CPU_COUNT + 2) + 2
        assert again <= in_flight + (whole.sample.n_chunks if at <= 12 else 0)


def test_a_finished_fit_is_not_read_again(tmp_path):
    y = Dies(Y)
    first = curve_fit(decay, X, y, P0, checkpoint=tmp_path / "c")
    y.reads.clear()
    same_bits(curve_fit(decay, X, y, P0, checkpoint=tmp_path / "c"), first)
    assert not y.reads


def segments_kept(path):
    """Of how many sweeps a checkpoint has segments, and of how many it has their sums."""
    with np.load(path / "state.npz") as found:
        return np.count_nonzero(found["lengths"] > 1), len(found["lengths"])


def test_segments_are_kept_of_few_sweeps_and_a_fit_that_ends_at_another_one_reads_it_again(tmp_path):
    tight = dict(f=decay, xdata=X[:5000], p0=[20, 3, 90], ftol=1e-12, xtol=1e-12, gtol=1e-12)
    y, path = Dies(Y[:5000]), tmp_path / "c"  # too short for a sample, whose fit would save sweeps
    whole = curve_fit(ydata=y, strategy="streaming", **tight)
    same_bits(curve_fit(ydata=y, checkpoint=path, **tight), whole)
    few, n = segments_kept(path)
    assert n >= 6 and few <= 3
    y.reads.clear()
    again = resume(path, ydata=y)
    same_bits(again, whole)
    np.testing.assert_array_equal(again.sandwich, whole.sandwich)
    assert not y.reads

    with pytest.raises(NotConvergedError) as raised:
        curve_fit(ydata=y, strategy="streaming", max_nfev=3, **tight)
    early = raised.value.result
    y.reads.clear()
    with pytest.raises(NotConvergedError) as raised:
        resume(path, ydata=y, max_nfev=3)
    found = raised.value.result
    same_bits(found, early)
    np.testing.assert_array_equal(found.sandwich, early.sandwich)
    assert {*y.reads.values()} == {1} and len(y.reads) == 10


@pytest.mark.parametrize("how", [KeyboardInterrupt, StopIteration, Killed])
def test_a_callback_gets_each_sweep_once_however_often_the_fit_is_resumed(how, tmp_path):
    y, options, seen = Dies(Y[:5000]), dict(ftol=1e-12, xtol=1e-12, gtol=1e-12), []
    whole = curve_fit(decay, X[:5000], y, [20, 3, 90], strategy="streaming", **options)

    def stop_at_2_and_4(record):
        seen.append(record.nfev)
        if record.nfev in (2, 4):
            raise how

    for _ in range(2):
        with nullcontext() if how is StopIteration else pytest.raises(how):
            curve_fit(decay, X[:5000], y, [20, 3, 90], checkpoint=tmp_path / "c", callback=stop_at_2_and_4, **options)
    same_bits(resume(tmp_path / "c", ydata=y, callback=stop_at_2_and_4), whole)
    assert seen == [record.nfev for record in whole.history]


def test_a_fit_that_is_resumed_says_so_in_summary_log_and_bar(store, tmp_path, caplog, capsys):
    with pytest.raises(RuntimeError, match="maximum number"):
        curve_fit(decay, X, store, [20, 3, 90], checkpoint=tmp_path / "c", max_nfev=2, ftol=1e-12, xtol=1e-12, gtol=1e-12)
    capsys.readouterr()
    with caplog.at_level("INFO", "dask_nlsq"):
        found = resume(tmp_path / "c", max_nfev=100, progress=True)
    n, last = found.resumed, capsys.readouterr().err.split("\r")[-1]
    assert 2 <= n < found.sweeps
    assert f"{found.sweeps} sweeps, resumed after {n}, in " in found.summary()
    assert f"the fit is resumed after {n} sweeps" in caplog.text
    assert last.startswith(f"curve_fit, resumed after {n} sweeps: {found.sweeps} sweeps ")


def test_a_fit_that_is_resumed_counts_the_sweeps_that_it_goes_through(store, tmp_path):
    tight = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12)
    with pytest.raises(RuntimeError, match="maximum number"):
        curve_fit(decay, X, store, [20, 3, 90], checkpoint=tmp_path / "c", max_nfev=3, **tight)
    with pytest.raises(NotConvergedError) as caught:
        resume(tmp_path / "c", max_nfev=2)
    fit = caught.value.result
    assert fit.resumed == fit.sweeps


@pytest.mark.slow
def test_the_limit_of_evaluations_may_be_raised(store, tmp_path):
    whole = curve_fit(decay, X, store, [20, 3, 90], strategy="streaming", ftol=1e-12, xtol=1e-12, gtol=1e-12)
    tight = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12)
    with pytest.raises(RuntimeError, match="maximum number"):
        curve_fit(decay, X, store, [20, 3, 90], checkpoint=tmp_path / "c", max_nfev=2, **tight)
    same_bits(resume(tmp_path / "c", max_nfev=100), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(f=lambda x, a, b, c: 1.001 * a * jnp.exp(-b * x) + c), r"Changed: f\. Give"),
        (dict(p0=[260.0, 0.35, 41.0]), r"Changed: p0: \[.*\] then, \[260.0, 0.35, 41.0\] now\. Give"),
        (dict(loss="huber"), "loss: 'linear' then, 'huber' now"),
        (dict(xdata=X * 1.01), r"Changed: content of `xdata`\. Give"),
        (dict(sigma=2.0), r"Changed: content of `sigma`\. Give"),
        (dict(sigma=np.sqrt(Y + 1)), r"Changed: content of `sigma`; shape or type of `sigma`\. Give"),
        (dict(mask=X > 9), r"Changed: content of `mask`; shape or type of `mask` or `xdata`\. Give"),
    ],
    ids=["model", "p0", "loss", "x", "sigma", "sigmas", "mask"],
)
def test_another_fit_is_refused_with_what_changed(change, message, store, tmp_path):
    call = dict(f=decay, xdata=X, ydata=store, p0=P0, checkpoint=tmp_path / "c")
    curve_fit(**call)
    with pytest.raises(CheckpointError, match=message):
        curve_fit(**call | change)


def test_changed_data_are_refused(store, tmp_path):
    curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    zarr.open_array(store)[:10] = 1
    with pytest.raises(CheckpointError, match="`ydata` in its store"):
        resume(tmp_path / "c")


@pytest.mark.slow
def test_a_model_is_known_by_what_it_computes(store, tmp_path):
    def make(scale):
        return lambda x, a, b, c: decay(x, a, b, c) * scale

    curve_fit(make(np.array(1.0)), X, store, P0, checkpoint=tmp_path / "c")
    curve_fit(make(np.array(1.0)), X, store, P0, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="model"):
        curve_fit(make(np.array(1.5)), X, store, P0, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="cannot import the model"):
        resume(tmp_path / "c")
    resume(tmp_path / "c", make(np.array(1.0)))


def test_what_was_not_kept_is_asked_for(tmp_path):
    y = da.from_array(Y, CHUNK)
    first = curve_fit(decay, X, y, P0, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="does not keep `ydata`"):
        resume(tmp_path / "c")
    same_bits(resume(tmp_path / "c", ydata=y), first)
    with pytest.raises(CheckpointError, match=r"no fit\.json"):
        resume(tmp_path / "nothing")


def test_checkpoints_are_for_data_that_are_read_anew(tmp_path):
    with pytest.raises(ValueError, match="`checkpoint` needs data that are read again"):
        curve_fit(decay, X, Y, P0, checkpoint=tmp_path / "c", strategy="standard")


IN_MEMORY = {
    "masked": lambda values: np.ma.masked_array(values, values < 35),
    "xarray": lambda values: xr.DataArray(values),
    "pandas": pd.Series,
    "jax": jnp.asarray,
    "large": lambda values: np.concatenate([values] * 200)[: len(values)],  # kept no longer, in the test
    "reversed": lambda values: np.flip(np.flip(values).copy()),
    "tuple": lambda values: tuple(values.tolist()),
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_other_values_in_memory_are_refused_whatever_array_they_are_in(kind, tmp_path, monkeypatch):
    if kind == "large":
        monkeypatch.setattr("dask_nlsq.engine.checkpoint.MOST_KEPT", 1000)
    x, y, make = X[:2000], Y[:2000] + 1.0, IN_MEMORY[kind]
    other = y.copy()
    other[5] += 1
    first = curve_fit(decay, x, make(y), P0, checkpoint=tmp_path / "c")
    same_bits(curve_fit(decay, x, make(y), P0, checkpoint=tmp_path / "c"), first)
    with pytest.raises(CheckpointError, match="content of `ydata`"):
        curve_fit(decay, x, make(other), P0, checkpoint=tmp_path / "c")


def test_the_sum_of_values_does_not_depend_on_where_they_lie():
    values = np.arange(6 * 70_000.0).reshape(6, -1)
    for array in (values, values.T, values[::-2, 1:], np.broadcast_to(values[:1], values.shape), values > 9, values[0, 0]):
        array = np.asarray(array)
        assert sum_of_values(array) == zlib.crc32(array.tobytes())
    assert sum_of_values(values[:0]) == 0


def test_another_mask_is_refused_that_comes_with_the_values(tmp_path):
    call = dict(f=decay, xdata=X, p0=P0, checkpoint=tmp_path / "c")
    curve_fit(ydata=np.ma.masked_array(Y, X > 9), **call)
    with pytest.raises(CheckpointError, match="content of `mask of ydata`"):
        curve_fit(ydata=np.ma.masked_array(Y, X > 8), **call)


@pytest.mark.slow
def test_weights_of_the_model_are_part_of_a_fit(store, tmp_path):
    call = dict(f=decay, xdata=X, ydata=store, p0=P0, checkpoint=tmp_path / "c")
    curve_fit(**call, sigma="poisson")
    with pytest.raises(CheckpointError, match="sigma: 'poisson' then, None now"):
        curve_fit(**call)


@pytest.mark.slow
def test_mask_values_may_be_any_collection(store, tmp_path):
    first = curve_fit(decay, X, store, P0, mask_values={30, 31}, checkpoint=tmp_path / "c")
    same_bits(resume(tmp_path / "c"), first)


# ---------------------------------------------------------------------------------------------------------------------
# data that `hold` holds

OTHER = dict(check_finite=True, nan_policy="omit", mask_values=[30.0], valid_range=(0, 200), xrange=(0, 9),
             on_bad_chunk="mask", missing_chunks="mask", decode_cf=False, memory_limit_gb=2.0,
             partitions_per_thread=3)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HELD if name in SAME])
def test_a_checkpoint_knows_what_hold_was_given(name, store, tmp_path):
    with hold(X, store, strategy="streaming", **{name: OTHER[name]}) as data:
        first = curve_fit(decay, data, p0=P0, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match=f"Changed: (shape or type of .*; )?{name}: "):
        curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    with (
        hold(X, store, strategy="streaming") as data,
        pytest.raises(CheckpointError, match=f"Changed: (shape or type of .*; )?{name}: "),
    ):
        curve_fit(decay, data, p0=P0, checkpoint=tmp_path / "c")
    same_bits(resume(tmp_path / "c"), first)


@pytest.mark.slow
def test_an_unfinished_fit_of_held_data_goes_on_from_its_path_alone(tmp_path):
    y = np.where(X > 9, np.nan, Y)

    def stop(record):
        raise StopIteration

    with hold(X, y, sigma=np.sqrt(Y), nan_policy="omit", strategy="streaming") as data:
        whole = curve_fit(decay, data, p0=P0, loss="huber")
        curve_fit(decay, data, p0=P0, loss="huber", checkpoint=tmp_path / "c", callback=stop)
    same_bits(resume(tmp_path / "c"), whole)
    with hold(X, Y, strategy="streaming") as data:
        whole = curve_fit(decay, data, p0=P0, sigma="poisson")
        curve_fit(decay, data, p0=P0, sigma="poisson", checkpoint=tmp_path / "d", callback=stop)
    same_bits(resume(tmp_path / "d"), whole)


def test_the_limits_of_hold_are_kept(tmp_path):
    limits = {name: OTHER[name] for name in HELD if name in LIMITS}
    assert sorted(limits) == ["memory_limit_gb", "partitions_per_thread"]
    with hold(X, Y, strategy="streaming", **limits) as data:
        curve_fit(decay, data, p0=P0, checkpoint=tmp_path / "c")
    known = json.loads((tmp_path / "c" / "fit.json").read_text())["call"]["options"]
    assert limits.items() <= known.items()


# ---------------------------------------------------------------------------------------------------------------------


def test_files_are_plain_arrays_and_json(store, tmp_path):
    curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["data.npz", "end.npz", "fit.json", "sample.npz", "state.npz"]
    for path in (tmp_path / "c").glob("*.npz"):
        with np.load(path, allow_pickle=False) as found:
            assert all(found[name].dtype.kind in "ufi" for name in found.files)
    known = json.loads((tmp_path / "c" / "fit.json").read_text())["identity"]
    assert known["chunks"] == [[len(X) // CHUNK, CHUNK, CHUNK]]  # however many there are


def test_a_changed_byte_of_any_file_is_refused(store, tmp_path):
    curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    for path in (tmp_path / "c").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        with pytest.raises(ValueError, match=f"{path.name} is damaged .* remove it and fit again"):
            resume(tmp_path / "c")
        path.write_bytes(whole)


def test_damage_is_remembered(store, tmp_path):
    (store / "c" / "9").write_bytes(b"")
    options = dict(on_bad_chunk="mask", checkpoint=tmp_path / "c")
    first = curve_fit(decay, X, store, P0, **options)
    again = resume(tmp_path / "c")
    same_bits(again, first)
    assert [err.index for err in again.damage] == [err.index for err in first.damage] == [(9,)]


@pytest.mark.slow
def test_workers_and_threads_go_on_with_each_others_sweeps(tmp_path, workers):
    y = da.from_array(Y, CHUNK)
    tight = dict(ftol=1e-13, xtol=1e-13, gtol=1e-13)
    whole = curve_fit(decay, X, y, P0, strategy="streaming", **tight)

    def stop(record):
        if record.nfev == 2:
            raise StopIteration

    with workers.as_current():
        stopped = curve_fit(decay, X, y, P0, checkpoint=tmp_path / "c", callback=stop, **tight)
    assert stopped.sweeps == 2
    same_bits(resume(tmp_path / "c", ydata=y), whole)


# ---------------------------------------------------------------------------------------------------------------------
# in processes of their own


def start(*arguments):
    code = (
        "import dask_nlsq.data.joining as inputs; inputs.JOINED_POINTS = 1; import sys; from tests.checkpointed import main;"
    )
    command = [sys.executable, "-c", code + " main(*sys.argv[1:])", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Of the same data in another store."""
    place = tmp_path_factory.mktemp("whole")
    finish(start(write(place / "y.zarr"), place / "c", place / "out.json"))
    return json.loads((place / "out.json").read_text())


def wait_for_sweeps(process, path, n):
    """Until a fit has finished ``n`` sweeps and begun another."""
    for _ in range(6000):
        if process.poll() is not None:
            return
        if (path / "state.npz").exists():
            with np.load(path / "state.npz") as found:
                values = json.loads(found["__json__"].tobytes())
            if len(values.get("reductions", [])) >= n and "begun" in values:
                return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_fit_at_the_best_point_and_resume_goes_on(number, store, tmp_path, uninterrupted):
    process = start(store, tmp_path / "c", tmp_path / "out.json")
    wait_for_sweeps(process, tmp_path / "c", 1)
    process.send_signal(number)
    finish(process)
    left = json.loads((tmp_path / "out.json").read_text())
    assert left["status"] == -3
    assert "Stopped by a signal" in left["message"]
    assert left["cost"] == left["history"][-1] == uninterrupted["history"][len(left["history"]) - 1]
    finish(start(store, tmp_path / "c", tmp_path / "again.json", "resume"))
    assert json.loads((tmp_path / "again.json").read_text()) == uninterrupted


@pytest.mark.slow
def test_a_signal_before_there_is_a_point_ends_the_process(store, tmp_path):
    process = start(store, tmp_path / "c", tmp_path / "out.json")
    wait_for_sweeps(process, tmp_path / "c", 0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_fit_that_is_killed_goes_on_with_the_same_bits(kills, store, tmp_path, uninterrupted):
    rng = np.random.default_rng(1)
    for k in range(kills):
        path, out = tmp_path / f"c{k}", tmp_path / f"{k}.json"
        process = start(store, path, out)
        while not (path / "fit.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 2.0))
        process.kill()
        process.communicate()
        finish(start(store, path, out, "resume"))
        assert json.loads(out.read_text()) == uninterrupted
