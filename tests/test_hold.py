"""Data that several fits share, and one read that answers several requests."""

from contextlib import nullcontext
from threading import Lock

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_nlsq
from dask_nlsq import curve_fit, fit, hold, plan_fit
from dask_nlsq.data.align import build_data
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective, Request
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.model.function import intern, is_known

from .clusters import assert_nothing_left

N, CHUNK = 300_000, 25_000
LOCK = Lock()
RNG = np.random.default_rng(5)
X = np.linspace(0, 5, N)
Y = 2.5 * np.exp(-1.3 * X) + 0.5 + 0.05 * RNG.standard_normal(N)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def line(x, a, b):
    return a + b * x


class Counted:
    """An array on disk, as far as anyone can see, that counts how often each chunk is read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim, self.reads, self.lock = (
            values,
            values.shape,
            values.dtype,
            1,
            0,
            Lock(),
        )

    def __getitem__(self, item):
        with LOCK:
            self.reads += self.values[item].size
        return self.values[item]


def counted():
    y = Counted(Y)
    return y, da.from_array(y, chunks=CHUNK, asarray=False, name=False, meta=np.empty(0))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["standard", "streaming", "workers", "read by workers"])
def test_one_read_answers_two_models_at_three_points(where, workers):
    client = workers if "workers" in where else None
    current = client.as_current() if client else nullcontext()
    strategy = {"workers": "chunked", "read by workers": "streaming"}.get(where, where)
    y, lazy = counted()
    data = build_data(da.from_array(X, CHUNK), da.from_array(Y, CHUNK) if client else lazy, check=True, omit=False)
    requests = [
        Request(Objective(intern(decay)), np.array([2.0, 1.0, 0.4])),
        Request(Objective(intern(line)), np.array([2.0, -0.3]), "qr"),
        Request(Objective(intern(decay), "soft_l1", 0.1), np.array([2.2, 1.1, 0.5])),
    ]
    with current, open_sweep(data, strategy, client, 4) as sweep:
        before = y.reads
        together = sweep.run(requests)
        if where == "streaming":
            assert y.reads - before == N
        alone = [sweep.run([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.matrix, other.matrix)
        assert (one.cost, one.reduction) == (other.cost, other.reduction)


def test_several_points_of_a_fit_cost_one_read():
    y, lazy = counted()
    data = build_data(da.from_array(X, CHUNK), lazy, check=True, omit=False)
    with open_sweep(data, "streaming") as sweep:
        evaluator = Evaluator(sweep, Objective(intern(decay)), 3)
        found = evaluator.at([np.array([2.0, 1.0, 0.4]), np.array([2.1, 1.0, 0.4])], "gram")
        assert (y.reads, evaluator.count) == (N, 1)
        assert evaluator(np.array([2.0, 1.0, 0.4]), "gram") is found[0]
        assert (y.reads, evaluator.count) == (N, 1)


def test_a_second_model_costs_no_second_load():
    y, lazy = counted()
    with hold(da.from_array(X, CHUNK), lazy) as data:
        one = curve_fit(decay, data, p0=[1, 1, 0])
        two = curve_fit(line, data, p0=[1, 0], loss="soft_l1", f_scale=0.1)
        assert y.reads == N
    np.testing.assert_array_equal(one.popt, curve_fit(decay, da.from_array(X, CHUNK), lazy, p0=[1, 1, 0]).popt)
    expected = curve_fit(line, da.from_array(X, CHUNK), lazy, p0=[1, 0], loss="soft_l1", f_scale=0.1)
    np.testing.assert_array_equal(two.popt, expected.popt)
    assert (one.plan.n_params, two.plan.n_params) == (3, 2)


@pytest.mark.parametrize("options", [dict(workflow="fast"), dict(workflow="hpc_distributed"), dict(goal="memory_efficient")])
def test_a_workflow_applies_to_held_data_but_for_its_strategy(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold(X, Y) as data:
        found = fit(decay, data, p0=[1, 1, 0], **options)
        assert plan_fit(decay, data, p0=[1, 1, 0], **options) == found.plan
        with pytest.raises(ValueError, match="`strategy` belongs to the held data"):
            fit(decay, data, None, [1, 1, 0], strategy="streaming", **options)
    expected = fit(decay, X, Y, p0=[1, 1, 0], **options | dict(strategy="standard"))
    assert (found.popt == expected.popt).all() and found.strategy == "standard"
    assert not (tmp_path / "nlsq_checkpoints").exists()


def test_held_data_that_stream_keep_the_checkpoint_of_a_workflow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hold(da.from_array(X, CHUNK), da.from_array(Y, CHUNK), strategy="streaming") as data:
        assert fit(decay, data, p0=[1, 1, 0], workflow="streaming").success
    assert len([*tmp_path.glob("nlsq_checkpoints/*/fit.json")]) == 1


def test_workers_hold_data_for_several_fits(workers):
    x, y = da.from_array(X, CHUNK), da.from_array(Y, CHUNK)
    assert_nothing_left(workers)
    with workers.as_current():
        with hold(x, y, sigma=0.05, strategy="chunked") as data:
            assert '"chunked"' in repr(data)
            found = [curve_fit(decay, data, p0=p0) for p0 in ([1, 1, 0], [3, 2, 1])]
            tasks = workers.run_on_scheduler(lambda dask_scheduler: [str(key) for key in dask_scheduler.tasks])
            assert sum(key.startswith("nlsq-load") for key in tasks) == data.plan.n_partitions
        assert_nothing_left(workers)
    np.testing.assert_allclose(found[0].popt, found[1].popt, rtol=1e-6)
    expected = curve_fit(decay, X, Y, p0=[1, 1, 0], sigma=0.05)
    np.testing.assert_allclose(found[0].pcov, expected.pcov, rtol=1e-6)


@pytest.mark.slow
def test_data_that_stream_keep_their_sample(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)  # each chunk is a run
    y, lazy = counted()
    with hold(da.from_array(X, CHUNK), lazy, strategy="streaming") as data:
        first = curve_fit(decay, data, p0=[1, 1, 0])
        before = y.reads
        second = curve_fit(decay, data, p0=[1.5, 1, 0])
        assert y.reads - before == second.sweeps * N
    assert first.sample.n_points == second.sample.n_points > 0


def test_a_large_model_is_sent_to_each_worker_once(workers):
    table = np.arange(100_000.0)

    def looked_up(x, a, b):
        return a * jnp.asarray(table)[jnp.asarray(x * 1000, jnp.int64)] + b

    x = da.linspace(0, 90, 40_000, chunks=1000)
    y = 2 * da.floor(x * 1000) + 1
    with workers.as_current(), hold(x, y, strategy="chunked") as data:
        for _ in range(2):
            found = curve_fit(looked_up, data, p0=[1, 0])
        np.testing.assert_allclose(found.popt, [2, 1], rtol=1e-9)
        known = workers.run(is_known, intern(looked_up).token)
    assert all(known.values())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sigma=2.0), "`sigma` belongs to the held data"),
        (dict(ydata=Y), "`ydata` belongs to the held data"),
        (dict(strategy="streaming"), "`strategy` belongs to the held data"),
        (dict(checkpoint="here"), 'hold\\(..., strategy="streaming"\\)'),
        (dict(mask=X > 1), "`mask` belongs to the held data"),
    ],
)
def test_what_belongs_to_the_data_is_given_once(options, message):
    with hold(X, Y) as data, pytest.raises(ValueError, match=message):
        curve_fit(decay, data, p0=[1, 1, 0], **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda data: curve_fit(decay, data, [1, 1, 0]), ValueError, r"p0 goes by name: curve_fit\(f, data, p0=...\)"),
        (lambda data: curve_fit(decay, X, data), TypeError, "data from `hold` replace xdata, ydata"),
        (lambda data: fit(decay, X, data), TypeError, "data from `hold` replace xdata, ydata"),
        (lambda data: plan_fit(decay, X, data), TypeError, "data from `hold` replace xdata, ydata"),
        (lambda data: hold(decay, X, Y), TypeError, "not a model: give the model to curve_fit"),
        (lambda data: hold(X, Y, decay), TypeError, "not a model: give the model to curve_fit"),
        (lambda data: hold(X, Y, f=decay), TypeError, "not a model: give the model to curve_fit"),
        (lambda data: hold(decay, X), TypeError, "not a model: give the model to curve_fit"),
    ],
)
def test_an_argument_in_the_wrong_place_is_named(call, error, message):
    with hold(X, Y) as data, pytest.raises(error, match=message):
        call(data)


def test_data_of_a_client_that_is_closed_are_an_error():
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        with Client(cluster):
            data = hold(X, Y, strategy="chunked")
        with pytest.raises(ValueError, match="held by the workers of a Client that is closed: hold them again"):
            curve_fit(decay, data, p0=[1, 1, 0])
        data.close()


def test_a_default_may_be_given_in_any_form():
    with hold(X, Y) as data:
        expected = curve_fit(decay, data, p0=[1, 1, 0])
        for options in (dict(decode_cf=np.True_), dict(decode_cf=1), dict(strategy="auto", on_bad_chunk="raise")):
            np.testing.assert_array_equal(curve_fit(decay, data, p0=[1, 1, 0], **options).popt, expected.popt)


@pytest.mark.parametrize(
    "call",
    [
        lambda data: hold(data, Y),
        lambda data: hold(X, data),
        lambda data: hold(X, Y, sigma=data),
        lambda data: curve_fit(decay, (data, X), Y, [1, 1, 0]),
        lambda data: curve_fit(decay, [data], Y, [1, 1, 0]),
        lambda data: curve_fit(decay, X, data, [1, 1, 0]),
        lambda data: curve_fit(decay, X, Y, [1, 1, 0], mask=data),
        lambda data: dask_nlsq.fit_map(decay, (data, X), Y, [1, 1, 0]),
    ],
)
def test_held_data_are_named_where_an_array_belongs(call):
    with hold(X, Y) as data, pytest.raises(TypeError, match="data from `hold` replace"):
        call(data)


def test_data_that_were_given_back_are_an_error():
    with hold(X, Y) as data:
        pass
    with pytest.raises(ValueError, match="released"):
        curve_fit(decay, data, p0=[1, 1, 0])
    assert "released" in repr(data)


def test_negative_values_are_refused_for_counts_only():
    with hold(X, Y - 1) as data:
        curve_fit(decay, data, p0=[1, 1, 0])
        with pytest.raises(ValueError, match=r"`ydata` has .* negative value"):
            curve_fit(decay, data, p0=[1, 1, 2], loss="poisson")


def test_a_model_of_all_points_needs_the_arrays_themselves():
    weights = np.ones(1000)
    with hold(X[:1000], Y[:1000]) as data, pytest.raises(ValueError, match="all points at once"):
        curve_fit(lambda x, a, b: a * weights + b * x, data, p0=[1, 1])


def test_hold_refuses_what_is_wrong_at_once():
    with pytest.raises(ValueError, match="of shape"):
        hold(X[:-1], Y)
    with pytest.raises(ValueError, match="nan"), hold(X, np.where(X > 4, np.nan, Y)) as data:
        curve_fit(decay, data, p0=[1, 1, 0])
    assert "hold" in dask_nlsq.__all__
