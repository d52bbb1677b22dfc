import json
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from threading import get_native_id

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from benchmarks.two_time import all_angles
from dask_nlsq import curve_fit, plan_fit
from dask_nlsq.data.align import build_data
from dask_nlsq.data.sample import spread
from dask_nlsq.demo import measurement
from dask_nlsq.engine.condensed import Sums, Tree, join_neighbours, merge
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective
from dask_nlsq.engine.sweep import PartialSweep, open_sweep
from dask_nlsq.kernels.kind import CPU
from dask_nlsq.memory.needs import READ_AHEAD
from dask_nlsq.model.function import intern
from dask_nlsq.solve.warm_start import HELD_BLOCKS

from .clusters import assert_nothing_left

RNG = np.random.default_rng(5)
N, CHUNK = 400_000, 9_000  # 45 chunks, the last one shorter
X = np.linspace(0, 10, N)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def peak(x, A, center, fwhm, eta, b0, b1):
    u = 2 * (x - center) / fwhm
    lorentz = 2 / (jnp.pi * fwhm) / (1 + u**2)
    gauss = 2 * jnp.sqrt(jnp.log(2) / jnp.pi) / fwhm * jnp.exp(-jnp.log(2) * u**2)
    return A * (eta * lorentz + (1 - eta) * gauss) + b0 + b1 * (x - 10)


DECAY = np.array([2.0, 0.5, 0.3])
PEAK = np.array([80.0, 10.03, 0.2, 0.4, 5.0, 1.0])
Y = 2 * np.exp(-0.5 * X) + 0.3 + RNG.normal(0, 0.05, N)


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


class Counted:
    """An array on disk that counts how often each of its chunks is read."""

    def __init__(self, values, chunk, spoil=None):
        self.values, self.chunks, self.reads, self.spoil = values, (chunk,), Counter(), spoil
        self.shape, self.dtype, self.ndim, self.store = values.shape, values.dtype, 1, None

    def __getitem__(self, item):
        k = item[0].start // self.chunks[0]
        self.reads[k] += item[0].stop > item[0].start  # Dask looks at an empty slice
        found = self.values[item]
        return found if self.spoil is None else self.spoil(found, self.reads[k])


def stored(values, chunk, path):
    array = zarr.create_array(store=path, shape=values.shape, dtype=values.dtype, chunks=(chunk,))
    array[...] = values
    return array


def errors_apart(found, expected):
    """Largest distance in standard errors."""
    return np.max(np.abs(found.popt - expected.popt) / expected.perr)


@pytest.mark.parametrize(
    "n, reduction", [(1, "gram"), (2, "qr"), (7, "gram"), (8, "gram"), (13, "qr"), (45, "gram"), (45, "qr")]
)
def test_a_tree_has_the_bits_of_a_merge_in_whatever_order_results_come(n, reduction):
    rng = np.random.default_rng(n)
    rows = rng.normal(size=(n, 9, 4))
    matrices = rows.swapaxes(1, 2) @ rows if reduction == "gram" else np.linalg.qr(rows, mode="r")
    costs, parts = rng.random(n), rng.random((n, 1, 5))
    expected = merge(matrices, costs, reduction)
    for order in (range(n), rng.permutation(n)):
        tree = Tree(n, reduction, joined=1)
        for done, k in enumerate(order):
            assert not tree.covers(0, k)
            tree.add(0, int(k), Sums(matrices[k], costs[k], parts[k]))
            assert tree.covers(0, int(k))
            assert len(tree.nodes) <= done + 1
        np.testing.assert_array_equal(tree.root()[0], expected[0])
        assert tree.root()[1] == expected[1]
        np.testing.assert_array_equal(tree.root()[2], join_neighbours(parts[:, 0], 1))


def test_a_tree_keeps_few_matrices():
    tree = Tree(1000, "gram")
    most = 0
    for k in range(1000):
        tree.add(0, k, Sums(np.ones((2, 2)), 1.0, np.ones((1, 3))))
        most = max(most, len(tree.nodes))
    assert most <= 10
    assert tree.root()[1] == 1000


@pytest.mark.parametrize("where", ["threads", "workers"])
def test_the_same_threads_read_in_all_sweeps(where, workers, tmp_path):
    def made(x):
        (tmp_path / f"{get_native_id()}").touch()
        return 2 * np.exp(-0.5 * x) + 0.3

    client, n_processes, n_threads = (workers, 2, 1) if where == "workers" else (None, 1, 2)
    x = da.from_array(X, CHUNK)
    data = build_data(x, x.map_blocks(made, dtype="f8", meta=np.empty(0)), check=True, omit=False)
    with (
        dask.config.set({"nlsq.threads": 2}),
        workers.as_current() if client else nullcontext(),
        open_sweep(data, "streaming", client, 8) as sweep,
    ):
        evaluator = Evaluator(sweep, Objective(intern(decay)), 3)
        for k in range(4):
            evaluator(DECAY + 0.01 * k, "gram")
    assert len([*tmp_path.iterdir()]) <= n_processes * (n_threads + READ_AHEAD)


@pytest.mark.parametrize("reduction", ["gram", "qr"])
def test_a_sweep_has_the_bits_of_one_over_held_data(reduction, workers, tmp_path):
    x, y = da.from_array(X, CHUNK), stored(Y, CHUNK, tmp_path / "y.zarr")
    problem = build_data(x, y, check=True, omit=False)
    objective, params = Objective(intern(decay), "soft_l1", 0.1), np.array([1.9, 0.6, 0.2])
    with open_sweep(problem) as held:
        expected = Evaluator(held, objective, 3)(params, reduction)
    for where, n_partitions in ((None, 1), (workers, 1), (workers, 20)):
        current = nullcontext() if where is None else workers.as_current()
        with current, open_sweep(problem, "streaming", where, n_partitions) as sweep:
            found = Evaluator(sweep, objective, 3)(params, reduction)
            np.testing.assert_array_equal(found.matrix, expected.matrix)
            assert found.cost == expected.cost
            np.testing.assert_array_equal(found.parts, expected.parts)
            assert found.read.n_points == N


@pytest.mark.parametrize(
    "f, truth, where",
    [
        pytest.param(decay, DECAY, "threads", id="decay-threads", marks=pytest.mark.slow),
        pytest.param(peak, PEAK, "threads", id="peak-threads"),
        pytest.param(decay, DECAY, "workers", id="decay-workers"),
        pytest.param(peak, PEAK, "workers", id="peak-workers", marks=pytest.mark.slow),
    ],
)
def test_the_fit_is_that_of_held_data_within_three_or_four_sweeps(f, truth, where, workers, tmp_path):
    x = X if f is decay else RNG.permutation(np.linspace(9, 11, N))  # so that each chunk sees the whole peak
    clean = np.asarray(f(x, *truth))
    y = stored(clean + RNG.normal(0, 0.05, N) if f is decay else RNG.poisson(clean).astype("u2"), CHUNK, tmp_path / "y.zarr")
    arguments = dict(p0=truth * (1 + 0.3 * np.array([1, -0.01, 1, 1, -1, 1])[-len(truth) :]))
    if f is decay:
        arguments = dict(p0=truth * [1.3, 0.7, 1.3])
    tight = curve_fit(f, x, np.asarray(y[:]), ftol=1e-14, xtol=1e-14, gtol=1e-14, **arguments)
    with workers.as_current() if where == "workers" else nullcontext():
        found = curve_fit(f, da.from_array(x, CHUNK), y, strategy="streaming", **arguments)
    assert found.strategy == "streaming"
    assert found.sweeps <= (3 if f is decay else 4)
    assert errors_apart(found, tight) < 1e-4
    np.testing.assert_allclose(found.pcov, tight.pcov, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n_chunks, n_drawn", [(12, 6), (45, 6), (80, 8)])
def test_each_chunk_is_read_once_per_sweep_and_the_sample_reads_a_tenth_or_six(n_chunks, n_drawn):
    chunk = -(-N // n_chunks)
    y = Counted(Y, chunk)
    result = curve_fit(decay, da.from_array(X, chunk), y, p0=DECAY * 1.3, strategy="streaming")
    assert (result.sample.n_chunks, result.sample.of_chunks, len(y.reads)) == (n_drawn, n_chunks, n_chunks)
    assert set(y.reads.values()) == {result.sweeps, result.sweeps + 1}
    assert sum(y.reads.values()) == result.sweeps * n_chunks + n_drawn


def test_few_chunks_have_no_sample_and_are_read_once_per_sweep():
    y = Counted(Y, 50_000)
    result = curve_fit(decay, da.from_array(X, 50_000), y, p0=DECAY * 1.3, strategy="streaming")
    assert result.sample is None
    assert set(y.reads.values()) == {result.sweeps}


def two_peaks(x, A1, c1, w1, A2, c2, w2, b0, b1):
    return sum(A * jnp.exp(-(((x - c) / w) ** 2) / 2) for A, c, w in ((A1, c1, w1), (A2, c2, w2))) + b0 + b1 * x


TWO_PEAKS = np.array([80.0, 3.0, 0.4, 50.0, 6.0, 0.6, 5.0, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "f, truth, off, noise, sweeps",
    [
        pytest.param(decay, DECAY, [0.6, -0.15, 0.09], 0.05, 3, id="decay"),
        pytest.param(two_peaks, TWO_PEAKS, [24, 0.12, 0.12, -15, -0.18, -0.18, 1.5, -0.15], 3, 4, id="two peaks"),
    ],
)
def test_a_sorted_axis_in_twenty_chunks_takes_few_sweeps_from_30_percent_off(f, truth, off, noise, sweeps, sign):
    y = np.asarray(f(X, *truth)) + np.random.default_rng(0).normal(0, noise, N)
    x, y, p0 = da.from_array(X, N // 20), da.from_array(y, N // 20), truth + sign * np.array(off)
    found, held = (curve_fit(f, x, y, p0=p0, strategy=each) for each in ("streaming", "chunked"))
    assert found.sweeps <= sweeps < held.sweeps
    assert errors_apart(found, held) < 1e-4


@pytest.mark.slow  # compiles for 5 s
def test_a_two_time_correlation_of_53_parameters_takes_five_sweeps_from_30_percent_off(tmp_path):
    measured = measurement.plan_measurement(200, 23, 0)
    measurement.write_measurement(measured, tmp_path / "c2.zarr")
    lower, upper, rng = measured.lower, measured.upper, np.random.default_rng(0)
    p0 = measurement.draw_start(rng, measured.truth, lower, upper, measured.times, 0.3, 0.3)
    axes = np.ogrid[:23, :200, :200]
    arguments = dict(p0=p0, bounds=(lower, upper), mask=np.eye(200, dtype=bool)[None])
    model, store = all_angles(measured), tmp_path / "c2.zarr"
    found, held = (curve_fit(model, axes, store, strategy=each, **arguments) for each in ("streaming", "chunked"))
    assert found.sweeps <= 5 < held.sweeps
    assert errors_apart(found, held) < 1e-4


def test_the_sample_saves_sweeps():
    x, y = da.from_array(X, CHUNK), da.from_array(Y, CHUNK)
    p0 = [20, 3.0, -3]
    assert curve_fit(decay, x, y, p0=p0, strategy="streaming").sweeps <= 4
    assert curve_fit(decay, x, y, p0=p0, strategy="standard").sweeps > 6


@pytest.mark.slow
def test_records_say_what_a_sweep_has_read():
    begin = time.perf_counter()
    result = curve_fit(decay, da.from_array(X, CHUNK), da.from_array(Y, CHUNK), mask=X < 1, strategy="streaming")
    for record in result.history:
        assert record.read.nbytes == X.nbytes + Y.nbytes + N
        assert (record.read.n_points, record.read.n_left_out) == (N - (X < 1).sum(), (X < 1).sum())
        assert record.read.gb_per_s == pytest.approx(record.read.nbytes / record.read.seconds / 1e9)
        assert record.read.seconds > 0
    times = [result.sample.seconds, *(record.read.seconds for record in result.history)]
    assert min(times) > 0 and sum(times) < time.perf_counter() - begin
    assert curve_fit(decay, X, Y).history[0].read is None


class Broken(Exception):
    pass


@pytest.mark.parametrize("done", [0, 5])
def test_a_sweep_tells_how_many_of_its_pieces_are_done(done):
    """Of 45 chunks, of which ``done`` have been read before."""

    def breaks(begun):
        if len(begun.left()) == 45 - done:
            raise Broken

    told, params = [], np.array([1.9, 0.6, 0.2])
    problem = build_data(da.from_array(X, CHUNK), da.from_array(Y, CHUNK), check=True, omit=False)
    with dask.config.set(num_workers=1), open_sweep(problem, "streaming") as sweep:
        evaluator = Evaluator(sweep, Objective(intern(decay)), 3)
        if done:
            evaluator.begun = PartialSweep([evaluator.request(params)], 45, 0)
            with pytest.raises(Broken):
                sweep.run(evaluator.begun.requests, evaluator.begun, breaks)
        evaluator.watch = lambda *each: told.append(each)
        evaluator(params, "gram")
    assert told == [("sweep 1", 0, 0), *(("sweep 1", k, 45) for k in range(done + 1, 46))]


def slowly(y):
    time.sleep(0.05)
    return y


@pytest.mark.slow
def test_progress_shows_how_far_a_sweep_is_and_ends_at_the_sweeps_of_the_result(capsys):
    y = da.from_array(Y, CHUNK).map_blocks(slowly)
    found = curve_fit(decay, da.from_array(X, CHUNK), y, strategy="streaming", progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"sweep 1: \d+ of 45, \d+ s to go, [\d.e-]+ GB/s", shown)
    assert f"{found.sweeps} sweeps" in shown.split("\r")[-1]


def test_no_sweep_takes_less_time_than_its_reads():
    """One clock for all: from when the data are there, the sample that is fitted first included."""
    began, walls = time.perf_counter(), []

    def told(record):
        walls.append((record.seconds, time.perf_counter() - began))

    found = curve_fit(decay, da.from_array(X, CHUNK), da.from_array(Y, CHUNK), strategy="streaming", callback=told)
    read = np.cumsum([record.read.seconds for record in found.history])
    seconds, wall = np.transpose(walls)
    assert found.sample.nfev > 0 and found.sweeps == found.nfev
    assert np.all(read <= seconds) and np.all(seconds <= wall) and seconds[-1] <= found.seconds["solve"] <= wall[-1] + 1


HOLES = np.where(np.arange(N) % 1000 == 7, np.nan, Y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "y, options",
    [
        pytest.param(Y, dict(bounds=([0, 0, 0.31], [1.9, 9, 9])), marks=pytest.mark.slow),
        (Y + (np.arange(N) % 50 == 0), dict(loss="soft_l1", f_scale=0.1)),
        (Y, dict(sigma=0.05 + 0.01 * X, absolute_sigma=True)),
        (Y + 9 * (X > 5), dict(mask=X > 5)),
        (HOLES, dict(nan_policy="omit")),
        (Y, dict(reduction="qr")),
        pytest.param(Y, dict(method="trf", x_scale=[1, 2, 3]), marks=pytest.mark.slow),
    ],
    ids=["bounds", "loss", "sigma", "mask", "omit", "qr", "trf"],
)
def test_options_mean_what_they_mean_for_held_data(y, options):
    x, y = da.from_array(X, CHUNK), da.from_array(y, CHUNK)
    arguments = dict(p0=[1.5, 0.8, 0.5]) | options
    held = curve_fit(decay, x, y, strategy="chunked", **arguments)
    found = curve_fit(decay, x, y, strategy="streaming", **arguments)
    assert errors_apart(found, held) < 1e-3  # both stop at tolerances of 1e-8
    assert (found.n_points, found.n_masked, found.n_omitted) == (held.n_points, held.n_masked, held.n_omitted)
    assert found.sweeps <= 6
    tight = dict(ftol=1e-14, xtol=1e-14, gtol=1e-14)
    held, found = (curve_fit(decay, x, y, strategy=s, **arguments | tight) for s in ("chunked", "streaming"))
    assert errors_apart(found, held) < 1e-6


BAD = np.where(np.arange(N) == 300_000, np.nan, Y)


@pytest.mark.parametrize(
    "y, options",
    [
        (BAD, {}),
        (Y, dict(sigma=np.where(X > 5, 0.0, 1.0))),
        (Y, dict(mask=X >= 0)),
        (Y, dict(mask=np.arange(N) > 1)),
        (Y, dict(p0=[1e308, -1e3, 1e308])),
    ],
    ids=["nan", "sigma", "all masked", "too few", "not finite at p0"],
)
def test_errors_are_those_of_held_data(y, options):
    x, y = da.from_array(X, CHUNK), da.from_array(y, CHUNK)
    messages = set()
    for strategy in ("standard", "streaming"):
        with pytest.raises((ValueError, TypeError)) as caught:
            curve_fit(decay, x, y, **dict(p0=DECAY, strategy=strategy) | options)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("chunk", [CHUNK, 50_000], ids=["sample", "no sample"])
def test_a_model_that_is_not_pointwise_is_refused(chunk):
    with pytest.raises(ValueError, match="not pointwise"):
        curve_fit(
            lambda x, a, b: a * x + b * jnp.cumsum(x),
            da.from_array(X, chunk),
            da.from_array(Y, chunk),
            p0=[1, 1],
            strategy="streaming",
        )


@pytest.mark.slow
@pytest.mark.parametrize("decoy", [[3, 0.2, 0.1], [1, 2, 0.6]])
def test_a_sample_that_misleads_does_not_change_the_result(decoy):
    k = np.arange(N) // CHUNK
    other = np.where(np.isin(k, spread(6, 45)), decay(X, *decoy), Y)
    x, y = da.from_array(X, CHUNK), da.from_array(other, CHUNK)
    options = dict(p0=[2, 0.6, 0.5], ftol=1e-14, xtol=1e-14, gtol=1e-14)
    held = curve_fit(decay, x, y, strategy="chunked", **options)
    found = curve_fit(decay, x, y, strategy="streaming", **options)
    assert errors_apart(found, held) < 1e-6
    assert found.sweeps <= held.sweeps + 3


@pytest.fixture(scope="module")
def long():
    """Data that are held, but long enough for a fit of a sample to come first."""
    n = HELD_BLOCKS * CPU.block_points
    x = np.linspace(0, 10, n)
    return x, 2 * np.exp(-0.5 * x) + 0.3 + 0.05 * np.random.default_rng(0).standard_normal(n)


@pytest.mark.parametrize("strategy", ["standard", "chunked"])
def test_a_long_fit_of_held_data_begins_with_a_sample(strategy, long, monkeypatch):
    x, y = long if strategy == "standard" else (da.from_array(each, 10**6) for each in long)
    found = curve_fit(decay, x, y, p0=[1, 1, 0], strategy=strategy)
    monkeypatch.setattr("dask_nlsq.solve.warm_start.HELD_BLOCKS", np.inf)
    plain = curve_fit(decay, x, y, p0=[1, 1, 0], strategy=strategy)
    assert errors_apart(found, plain) < 1e-3
    np.testing.assert_allclose(found.pcov, plain.pcov, rtol=1e-6)
    assert found.sweeps <= 3 < plain.sweeps == plain.nfev
    assert (found.sample.n_points, plain.sample) == (len(y) // 50, None)


def test_a_narrow_peak_that_the_sample_does_not_see_is_fitted(long):
    x, y = long
    y = y + 5 * np.exp(-(((x - 4) / 2e-5) ** 2))

    def both(x, a, b, c, height):
        return decay(x, a, b, c) + height * jnp.exp(-(((x - 4) / 2e-5) ** 2))

    found = curve_fit(both, x, y, p0=[1, 1, 0, 1])
    assert found.success
    assert abs(found.popt[3] - 5) < 5 * found.perr[3] < 0.1


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_sample_with_a_point_or_two_of_a_narrow_peak_does_not_lead_away_from_it(seed, long):
    """Of the peak's 12 points; the sample would end at a cost of 5339 and succeed, or creep."""
    rng, width = np.random.default_rng(seed), 1.5e-5
    x, centre = long[0], rng.uniform(1, 9)
    y = 5 * np.exp(-(((x - centre) / width) ** 2)) + 0.05 * rng.standard_normal(len(x))

    def peak(x, height, centre, width, base):
        return height * jnp.exp(-(((x - centre) / width) ** 2)) + base

    found = curve_fit(peak, x, y, p0=[4, centre + 0.4 * width, 1.2 * width, 0.3])
    assert found.success and found.sweeps <= 8
    assert np.all(np.abs(found.popt - [5, centre, width, 0]) < 5 * found.perr)


@pytest.mark.slow
def test_params_that_the_sample_does_not_see_are_found():
    outside = [k for k in range(45) if k not in spread(6, 45)][20]
    place = jnp.arange(N) // CHUNK == outside

    def model(axes, a, b, c, extra):
        x, k = axes
        return decay(x, a, b, c) + extra * place[k]

    y = Y + 0.7 * np.asarray(place)
    coordinates = da.from_array(X, CHUNK), da.arange(N, chunks=CHUNK)
    result = curve_fit(model, coordinates, da.from_array(y, CHUNK), p0=[2.6, 0.35, 0.4, -50.0], strategy="streaming")
    np.testing.assert_allclose(result.popt, [2, 0.5, 0.3, 0.7], atol=0.01)
    assert result.sweeps <= 5


@pytest.mark.slow
def test_several_starts_are_screened_on_the_sample():
    def sine(x, a, f, phi, c):
        return a * jnp.sin(2 * jnp.pi * f * x + phi) + c

    y = da.from_array(1.5 * np.sin(2 * np.pi * 1.7 * X + 0.6) + 0.4 + RNG.normal(0, 0.3, N), CHUNK)
    x = da.from_array(X, CHUNK)
    result = curve_fit(sine, x, y, p0=[1, 0.6, 0, 0], strategy="streaming", n_starts=20)
    np.testing.assert_allclose(result.popt, [1.5, 1.7, 0.6, 0.4], atol=0.01)
    assert len(result.starts.starts) == 20
    assert result.sweeps <= 6  # two decide between a phase and its complement


def test_data_that_change_during_the_fit_are_refused():
    y = Counted(HOLES, CHUNK, spoil=lambda values, reads: np.where(values > 2.3, np.nan, values) if reads > 2 else values)
    with pytest.raises(RuntimeError, match="changed during the fit"):
        curve_fit(decay, da.from_array(X, CHUNK), y, p0=DECAY * 1.3, strategy="streaming", nan_policy="omit")


def test_workers_read_and_nothing_is_left_on_them(workers, tmp_path):
    x, y = da.from_array(X, CHUNK), stored(Y, CHUNK, tmp_path / "y.zarr")
    here = curve_fit(decay, x, y, p0=DECAY * 1.3, strategy="chunked", mask=X < 1)
    with workers.as_current():
        there = curve_fit(decay, x, y, p0=DECAY * 1.3, strategy="streaming", mask=X < 1)
        with pytest.raises(ValueError, match="nan or infinity"):
            curve_fit(decay, x, da.from_array(BAD, CHUNK), p0=DECAY, strategy="streaming")
    assert errors_apart(there, here) < 1e-6
    assert there.sample.n_chunks == 6
    assert_nothing_left(workers)


@pytest.mark.slow
def test_data_that_do_not_fit_are_streamed_without_being_asked():
    x = da.linspace(0, 1, 2 * 10**7, chunks=250_000)
    y = 2 * da.exp(-x) + 0.3
    plan = plan_fit(decay, x, y, strategy="streaming")
    result = curve_fit(decay, x, y, memory_limit_gb=plan.peak_bytes / 2**30 - plan.places[0].now / 2**30 + 0.1)
    assert (result.strategy, result.plan.held_bytes) == ("streaming", 0)
    np.testing.assert_allclose(result.popt, [2, 1, 0.3], rtol=1e-6)


FLAT = """
import json, sys
from pathlib import Path
import dask, dask.array as da, jax.numpy as jnp
import dask_nlsq

def resident(field):
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024

def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c

def fit(n):
    x, long, short, longest = (da.linspace(0, 10, n, chunks=chunk) for chunk in (10**6, 15 * 10**5, 7 * 10**5, 3 * 10**6))
    y = 2 * da.exp(-0.5 * x) + 0.3 + 0.1 * da.sin(1e4 * x)
    sigma, mask = (0.1 + 0.001 * short).astype("f4"), longest > 9.9
    return dask_nlsq.curve_fit(decay, long, y, sigma=sigma, mask=mask, p0=[2.6, 0.35, 0.4], strategy="streaming")

with dask.config.set({"nlsq.threads": 2}):
    result = fit(int(sys.argv[1]))
print("RESULT", json.dumps((resident("VmHWM"), result.sweeps, list(result.popt), result.plan.peak_bytes / 2**20)))
"""


@pytest.mark.slow
def test_memory_is_as_planned_and_flat_where_chunks_of_x_sigma_and_mask_are_other_than_those_of_y():
    root, found = Path(__file__).parent.parent, []
    for n in (10**7, 25 * 10**6):
        command = [sys.executable, "-c", FLAT, str(n)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
        found.append(json.loads(next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))[7:]))
    (small, _, _, less), (large, sweeps, popt, predicted) = found
    assert small < less and large < predicted
    assert large < 1.1 * small and predicted < 1.1 * less
    assert sweeps <= 4
    np.testing.assert_allclose(popt, DECAY, rtol=1e-3)
