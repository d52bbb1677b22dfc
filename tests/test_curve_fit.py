import logging
import pickle
import threading
import warnings

import cloudpickle
import dask
import dask.array as da
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, LocalCluster
from scipy.optimize import OptimizeWarning

from dask_nlsq import FitResult, curve_fit, fit_map
from dask_nlsq.solve.trust_region import Options

from .clusters import assert_nothing_left

RNG = np.random.default_rng(11)
X = np.linspace(0, 5, 3000)
Y = 2 * np.exp(-0.7 * X) + 0.3 + RNG.normal(0, 0.05, X.size)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def test_result_unpacks_to_popt_and_pcov():
    result = curve_fit(decay, X, Y)
    popt, pcov = result
    assert isinstance(result, FitResult)
    assert popt is result[0] is result.popt
    assert pcov is result[1] is result.pcov
    assert len(result) == 2
    np.testing.assert_allclose(result.perr, np.sqrt(np.diag(pcov)))


def test_data_first_is_the_same_fit():
    np.testing.assert_array_equal(curve_fit(X, Y, decay).popt, curve_fit(decay, X, Y).popt)


def test_names_come_from_the_signature_or_the_caller():
    assert curve_fit(decay, X, Y).param_names == ("a", "b", "c")
    assert curve_fit(decay, X, Y, param_names=["amplitude", "rate", "offset"]).param_names[1] == "rate"
    assert curve_fit(lambda x, *p: decay(x, *p), X, Y, p0=[1, 1, 0]).param_names == ("p0", "p1", "p2")


def test_repr_shows_params_and_why_it_stopped():
    text = repr(curve_fit(decay, X, Y))
    assert "converged: `" in text
    assert "3,000 points; 3 parameters" in text
    assert "  b   0." in text


def test_full_output_is_scipys():
    popt, pcov, info, message, status = curve_fit(decay, X, Y, full_output=True)
    np.testing.assert_allclose(info["fvec"], np.asarray(decay(X, *popt)) - Y, atol=1e-6)
    R = np.triu(info["fjac"].T)  # scipy.optimize.leastsq computes its covariance so
    s_sq = info["fvec"] @ info["fvec"] / (X.size - 3)
    np.testing.assert_allclose(np.linalg.inv(R.T @ R) * s_sq, pcov, rtol=1e-9)
    assert info["nfev"] > 1
    assert status in (1, 2, 3, 4)
    assert "satisfied" in message


def test_residuals_and_predictions():
    mask = np.arange(X.size) % 10 == 0
    result = curve_fit(decay, X, Y, sigma=0.05, mask=mask)
    residuals = result.residuals()
    assert np.isnan(residuals).sum() == mask.sum() == result.n_masked
    assert np.nanstd(residuals) == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(result.predict(), result.predict(X))
    np.testing.assert_allclose(result.predict(X)[~mask], (residuals * 0.05 + Y)[~mask])


def test_residuals_and_predictions_of_dask_arrays_are_lazy():
    x, y = da.from_array(X, 700), da.from_array(Y, 999)
    result = curve_fit(decay, x, y)
    assert result.residuals().chunks == y.chunks
    assert isinstance(result.predict(x), da.Array)
    np.testing.assert_allclose(result.residuals().compute(), (result.predict(x) - y).compute(), atol=1e-12)


@pytest.mark.slow
def test_n_dimensional_data_with_axis_vectors():
    t, q = np.linspace(0, 2, 60)[:, None], np.linspace(0.5, 2, 50)

    def model(axes, D, contrast):
        t, q = axes
        return contrast * jnp.exp(-D * q**2 * t)

    y = 0.4 * np.exp(-1.5 * q**2 * t) + RNG.normal(0, 0.01, (60, 50))
    axes = curve_fit(model, (t, q), da.from_array(y, chunks=(13, 50)))
    full = curve_fit(model, tuple(np.broadcast_arrays(t, q)), y)
    np.testing.assert_allclose(axes.popt, full.popt, rtol=1e-9)
    assert axes.residuals().shape == (60, 50)
    np.testing.assert_allclose(axes.predict((t, q)), np.asarray(model((t, q), *axes.popt)), rtol=1e-5)


def test_integer_coordinates_index_a_table():
    table = np.array([3.0, 1.0, 2.0])
    index = np.arange(30) % 3
    y = 5 * table[index]
    np.testing.assert_allclose(curve_fit(lambda c, a: a * jnp.asarray(table)[c[0]], (index,), y).popt, [5])


def test_singular_fits_warn_and_have_infinite_covariance():
    with pytest.warns(OptimizeWarning, match="Covariance of the parameters could not be estimated"):
        result = curve_fit(lambda x, a, b: (a + b) * x, X, Y)
    assert np.all(np.isinf(result.pcov))


def test_several_undetermined_combinations_are_a_list():
    with pytest.warns(OptimizeWarning) as warned:
        curve_fit(lambda x, a, b, c, d: (a + b) * x + jnp.exp(-x) * (c - d), X, Y)
    first, *reasons, advice = str(warned[0].message).split("\n")
    assert first == "Covariance of the parameters could not be estimated:" and len(reasons) == 2
    assert all(each.startswith("- the data do not determine one combination: (") for each in reasons)
    assert advice.startswith("Hold one of them with `fixed`")


@pytest.mark.slow
def test_a_parameter_at_its_bound_is_said_to_be_there_where_the_covariance_is_infinite():
    def model(x, a, b, floor):
        return (a + b) * jnp.exp(-x) + floor

    y = np.exp(-X) - 0.3 + 0.05 * np.random.default_rng(0).normal(size=len(X))
    bounds = dict(floor=(0, None))
    with pytest.warns(OptimizeWarning, match="could not be estimated"):
        found = curve_fit(model, X, y, p0=[1, 1, 1], bounds=bounds)
    maps = fit_map(model, X, np.stack([y, y]), [1, 1, 1], bounds=bounds).compute()
    assert np.isinf(found.perr).all() and found.at_bound.tolist() == [0, 0, -1]
    assert np.isinf(maps.perr).all() and maps.at_bound.tolist() == [[0, 0, -1]] * 2


def test_exact_data_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = curve_fit(decay, X, np.asarray(decay(X, 2.0, 0.7, 0.3)), p0=[1, 1, 1])
    np.testing.assert_allclose(result.popt, [2, 0.7, 0.3], rtol=1e-6)


def test_callback_sees_every_step_and_can_stop():
    records = []
    full = curve_fit(decay, X, Y, callback=records.append)
    assert [r.nfev for r in records] == list(range(1, full.nfev + 1))
    assert records[-1].cost == full.cost

    def stop(record):
        if record.nfev == 3:
            raise StopIteration

    stopped = curve_fit(decay, X, Y, callback=stop)
    assert (stopped.status, stopped.success, stopped.nfev) == (-2, False, 3)
    assert "NOT CONVERGED" in repr(stopped)


def test_verbose_prints_a_line_per_sweep(capsys):
    result = curve_fit(decay, X, Y, verbose=2)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["Iteration", "Sweeps", "Cost"]
    assert sum(line.split()[0].isdigit() for line in out if line.strip()) >= result.nfev


def test_progress_shows_a_bar(capsys):
    curve_fit(decay, X, Y, progress=True)
    assert "sweeps" in capsys.readouterr().err


def test_the_fit_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="dask_nlsq"):
        curve_fit(decay, X, Y)
    assert "converged" in caplog.text


@pytest.mark.parametrize("tr_solver", ["exact", "cg"])
def test_both_subproblem_solvers_reach_the_same_optimum(tr_solver):
    expected = curve_fit(decay, X, Y, ftol=1e-14, xtol=1e-14)
    found = curve_fit(decay, X, Y, ftol=1e-14, xtol=1e-14, tr_solver=tr_solver, bounds=([0, 0, 0], [9, 9, 9]))
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-8)


@pytest.mark.slow
def test_many_params_by_conjugate_gradients():
    """A sum of 60 hat functions, which is linear: the answer is known."""
    knots = np.linspace(0, 1, 60)

    def model(x, *heights):
        return jnp.maximum(0, 1 - 59 * jnp.abs(x[:, None] - knots)) @ jnp.stack(heights)

    x = np.linspace(0, 1, 2000)
    y = np.sin(9 * x) + RNG.normal(0, 0.1, x.size)
    result = curve_fit(model, x, y, p0=np.zeros(60), tr_solver="cg", gtol=1e-12)
    basis = np.maximum(0, 1 - 59 * np.abs(x[:, None] - knots))
    np.testing.assert_allclose(result.popt, np.linalg.lstsq(basis, y)[0], rtol=1e-9)


def test_conjugate_gradients_are_chosen_above_500_params():
    assert [Options(np.zeros(p), np.zeros(p)).solver for p in (2, 500, 501)] == ["exact", "exact", "cg"]


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)
    x, y = da.from_array(X, 100), da.from_array(Y, 137)
    with dask.config.set({"nlsq.threads": 1}):
        one = curve_fit(decay, x, y)
    with dask.config.set({"nlsq.threads": 2}):
        two = curve_fit(decay, x, y)
    np.testing.assert_array_equal(one.popt, two.popt)
    np.testing.assert_array_equal(one.pcov, two.pcov)


@pytest.fixture
def client(workers):
    with workers.as_current():
        yield workers


def test_an_active_client_is_used_and_gives_the_same_bits(client, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)  # a block for each of 22 chunks
    x, y = da.from_array(X, 100), da.from_array(Y, 137)
    here = curve_fit(decay, x, y, strategy="standard")
    there = curve_fit(decay, x, y)
    assert (here.strategy, there.strategy) == ("standard", "chunked")
    np.testing.assert_array_equal(here.popt, there.popt)
    np.testing.assert_array_equal(here.pcov, there.pcov)


def test_arrays_in_memory_go_to_the_workers_when_asked(client):
    result = curve_fit(decay, X, Y, strategy="chunked")
    np.testing.assert_array_equal(result.popt, curve_fit(decay, X, Y).popt)


def test_nothing_is_left_on_the_workers(client):
    curve_fit(decay, da.from_array(X, 100), da.from_array(Y, 137))
    with pytest.raises(RuntimeError):
        curve_fit(decay, da.from_array(X, 100), da.from_array(Y, 137), max_nfev=2)
    assert_nothing_left(client)


@pytest.mark.slow
def test_each_sweep_is_a_few_tasks_per_thread_however_many_chunks(client):
    def finished(dask_scheduler):
        return {t[0] for t in dask_scheduler.transition_log if str(t[0]).startswith("nlsq-sweep") and t[2] == "memory"}

    before = client.run_on_scheduler(finished)
    x = da.linspace(0, 5, 4_000_000, chunks=40_000)
    result = curve_fit(decay, x, 2 * da.exp(-0.7 * x) + 0.01 * da.sin(99 * x))
    tasks = client.run_on_scheduler(finished) - before
    assert result.sweeps * 8 <= len(tasks) <= result.sweeps * 16  # 100 chunks, 2 threads


def test_jac_mode_is_recorded_and_does_not_move_the_optimum():
    tight = {"ftol": 0, "xtol": 0, "gtol": 0}
    columns = curve_fit(decay, X, Y, jac_mode="columns", **tight)
    arguments = curve_fit(decay, X, Y, jac_mode="arguments", **tight)
    assert (columns.jac_mode, arguments.jac_mode) == ("columns", "arguments")
    np.testing.assert_allclose(columns.popt, arguments.popt, rtol=1e-12)
    e = jnp.exp

    def jac(x, a, b, c):
        return jnp.stack([e(-b * x), -a * x * e(-b * x), jnp.ones_like(x)], axis=1)

    assert curve_fit(decay, X, Y, jac=jac).jac_mode == "user"


def test_a_result_can_be_pickled_without_the_data():
    x, y = np.resize(X, 50_000), np.resize(Y, 50_000)
    result = curve_fit(decay, x, y)
    again = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(again.predict(X), result.predict(X))
    assert len(pickle.dumps(result)) < 100_000 < y.nbytes  # most of it is the sums over parts of the data
    with pytest.raises(ValueError, match="does not hold the data"):
        again.residuals()


@pytest.mark.slow
def test_a_cluster_whose_workers_come_later_is_waited_for():
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster):
        later = threading.Timer(1.0, cluster.scale, [1])
        later.start()
        result = curve_fit(decay, da.from_array(X, 500), da.from_array(Y, 500))
        later.join()
    np.testing.assert_array_equal(result.popt, curve_fit(decay, da.from_array(X, 500), da.from_array(Y, 500)).popt)


def test_hdf5_is_read_by_the_workers(client, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = X, Y
        with pytest.raises(TypeError, match="open for writing"):
            curve_fit(decay, file["x"], file["y"])
    with h5py.File(tmp_path / "a.h5", "r") as file:
        np.testing.assert_array_equal(curve_fit(decay, file["x"], file["y"]).popt, curve_fit(decay, X, Y).popt)


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1e9])
def test_units_of_the_data_do_not_matter(unit):
    expected = curve_fit(decay, X, Y, p0=[1, 1, 0])
    found = curve_fit(decay, X, unit * Y, p0=[unit, 1, 0])
    np.testing.assert_allclose(found.popt / [unit, 1, unit], expected.popt, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["auto", "qr"])
@pytest.mark.parametrize(
    "f",
    [lambda x, a, b, c: a * jnp.exp(-b * x + c), lambda x, a, b, c: a * x / b + c],
    ids=["exponent and factor", "ratio"],
)
def test_equivalent_params_have_infinite_covariance_however_many_points(f, reduction):
    x = np.linspace(0, 5, 100_000)
    with pytest.warns(OptimizeWarning):
        result = curve_fit(f, x, 2 * np.exp(-0.7 * x) + 0.01 * np.sin(99 * x), p0=[1, 1, 0.1], reduction=reduction)
    assert np.all(np.isinf(result.pcov))


def test_the_warning_names_params_that_do_nothing():
    with pytest.warns(OptimizeWarning, match="does not change with b"):
        curve_fit(lambda x, a, b: a * x, X, Y)


@pytest.mark.parametrize("chunks", [3000, ((1, 1499, 1500),)])
def test_a_term_hidden_at_p0_is_still_not_pointwise(chunks):
    x, y = (da.from_array(a, chunks=chunks) for a in (X, Y))
    with pytest.raises(ValueError, match="not pointwise"):
        curve_fit(lambda x, a, b: a * x + b * jnp.cumsum(x), x, y, p0=[1, 0])


def test_a_masked_dask_array_is_masked():
    spoiled = np.where(np.arange(X.size) % 7 == 0, 1e6, Y)
    y = da.ma.masked_greater(da.from_array(spoiled, 400), 1e5)
    kept = np.arange(X.size) % 7 != 0
    np.testing.assert_allclose(curve_fit(decay, X, y).popt, curve_fit(decay, X[kept], Y[kept]).popt, rtol=1e-7)
    found, expected = curve_fit(decay, np.ma.masked_less(X, 1), Y), curve_fit(decay, X[X >= 1], Y[X >= 1])
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-7)


def test_residuals_of_dask_arrays_do_not_carry_all_of_x_in_each_task():
    x = np.linspace(0, 5, 400_000)
    y = da.from_array(2 * np.exp(-0.7 * x), chunks=10_000)
    residuals = curve_fit(decay, da.from_array(x, chunks=10_000), y, p0=[1, 1, 1]).residuals()
    assert len(cloudpickle.dumps(residuals.dask)) < 5 * x.nbytes


def test_chunks_of_size_zero_are_no_obstacle():
    y = da.from_array(Y[:2000], chunks=((0, 500, 0, 1500),))
    x = da.concatenate([da.from_array(X[:2000], 700), da.zeros(0)])
    result = curve_fit(decay, x, y)
    np.testing.assert_allclose(result.popt, curve_fit(decay, X[:2000], Y[:2000]).popt, rtol=1e-7)
    assert result.residuals().compute().shape == (2000,)
