"""Grouped fits by label, with checkpoints, plans, guesses and Jacobians; what their results say and keep."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr
import zarr
from distributed import Client

import dask_nlsq
from dask_nlsq import (
    CheckpointError,
    DamagedFileError,
    GroupResult,
    MapStatus,
    NotConvergedError,
    fit_groups,
    load,
    plan_fit,
    resume,
)
from dask_nlsq.interface.describe import describe
from dask_nlsq.maps.stored import StoredMap
from dask_nlsq.models import gaussian
from dask_nlsq.results.schema import VERSION

from .clusters import local
from .test_files import changed
from .test_groups import AMPLITUDE, LOCAL, P0, TIGHT, G, N, T, Y, decay, dense

rng = np.random.default_rng(1)
ORDER = rng.permutation(G * N)
LABELS, TIMES, VALUES = np.repeat(np.arange(G) * 3, N)[ORDER], np.tile(T, G)[ORDER], Y.ravel()[ORDER]


@pytest.fixture(scope="module")
def expected():
    return fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, **TIGHT)


def assert_near(result, expected):
    assert result.success and result.n_groups == expected.n_groups
    np.testing.assert_allclose(result.popt, expected.popt, rtol=1e-9)
    np.testing.assert_allclose(result.pcov, expected.pcov, rtol=1e-7)
    one, other = (each.local.compute(progress=False) for each in (result, expected))
    np.testing.assert_allclose(one.popt, other.popt, rtol=1e-7)
    np.testing.assert_allclose(one.perr, other.perr, rtol=1e-7)


def assert_same_bits(result, expected):
    for name in ("popt", "pcov", "cost", "nfev"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
    np.testing.assert_array_equal(result.local.compute(progress=False).record, expected.local.compute(progress=False).record)


# ---------------------------------------------------------------------------------------------------------------------
# labels


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numpy", "dask", pytest.param("zarr", marks=pytest.mark.slow), "xarray", "masked"])
def test_groups_by_label_are_those_by_axis_in_whatever_order_points_come(expected, tmp_path, kind):
    x, y, labels = TIMES, VALUES, LABELS
    if kind == "dask":
        x, y, labels = (da.from_array(each, chunks=chunk) for each, chunk in ((x, 700), (y, 500), (labels, 900)))
    if kind == "zarr":
        zarr.create_array(tmp_path / "y", data=y, chunks=(500,))
        y = str(tmp_path / "y")
    if kind == "masked":
        bad = np.arange(2 * y.size) % 2 == 1
        x, labels = np.repeat(x, 2), np.repeat(labels, 2)
        y = np.ma.MaskedArray(np.where(bad, 99.0, np.repeat(y, 2)), bad)
    if kind == "xarray":
        y = xr.DataArray(y, dims="point", coords={"t": ("point", x), "run": ("point", labels)})
        x, labels = "t", "run"
    result = fit_groups(decay, x, y, P0, local=LOCAL, groups=labels, **TIGHT)
    assert_near(result, expected)
    np.testing.assert_array_equal(result.local.to_xarray().group, np.arange(G) * 3)


def test_labels_broadcast_and_leave_points_out_and_groups_differ_in_length():
    labels = np.arange(G)[:, None] // 2  # two rows of y are a group
    labels[[4, 5]] = -1
    scattered = np.broadcast_to(labels, Y.shape).copy()
    scattered[8, N // 2 :] = -1
    result = fit_groups(decay, T, Y, P0, local=LOCAL, groups=scattered, **TIGHT)
    assert result.n_groups == G // 2 - 1 and result.n_points == (G - 2) * N - N // 2
    assert result.n_masked == 2 * N + N // 2
    used = scattered >= 0
    flat = fit_groups(decay, np.broadcast_to(T, Y.shape)[used], Y[used], P0, local=LOCAL, groups=scattered[used], **TIGHT)
    assert_near(flat, result)


@pytest.mark.slow
def test_starts_and_bounds_by_label_are_in_the_order_of_the_labels(expected):
    bounds = dict(amplitude=(AMPLITUDE - 3, AMPLITUDE + 3))
    result = fit_groups(
        decay, TIMES, VALUES, P0 | dict(amplitude=AMPLITUDE), local=LOCAL, groups=LABELS, bounds=bounds, **TIGHT
    )
    assert_near(result, expected)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (LABELS + 0.5, "must be integer labels"),
        (LABELS > 3, "must be integer labels"),
        (np.array(["a"] * (G * N)), "np.unique"),
        (LABELS[:-1], r"must broadcast against `ydata`, which is of shape \(2400,\)"),
        (LABELS - 2, "labels from 0 on, or -1"),
        (np.full(G * N, -1), "leaves out all points"),
        ("run", "is neither a coordinate"),
        (None, "give either `group_axes`"),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        fit_groups(decay, TIMES, VALUES, P0, local=LOCAL, groups=groups)


def test_groups_lie_along_axes_or_have_labels_but_not_both():
    with pytest.raises(ValueError, match="give either `group_axes`"):
        fit_groups(decay, T, Y, P0, local=LOCAL, groups=LABELS, group_axes=0)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def chunked():
    return da.from_array(Y, chunks=(7, 40))


@pytest.mark.parametrize("strategy", ["standard", "streaming"])
def test_a_fit_that_was_broken_off_goes_on_to_the_same_bits(tmp_path, strategy):
    options = dict(local=LOCAL, group_axes=0, strategy=strategy, checkpoint=tmp_path / "kept")
    whole = fit_groups(decay, T, chunked(), P0, **options | dict(checkpoint=None))
    for until in (2, 4):

        def broken(record, until=until):
            if record.nfev == until:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_groups(decay, T, chunked(), P0, **options, callback=broken)
    reads = []
    y = chunked().map_blocks(lambda block: (reads.append(1), block)[1], dtype=float, meta=np.empty((0, 0)))
    again = resume(tmp_path / "kept", decay, T, y)
    assert isinstance(again, GroupResult)
    assert_same_bits(again, whole)
    held = 1 if strategy == "standard" else again.sweeps - 3
    assert len(reads) <= y.npartitions * held
    assert len(list((tmp_path / "kept" / "locals").iterdir())) == again.local.problem.plan.n_blocks  # of one point


def test_locals_that_a_killed_process_has_left_are_removed_and_nothing_else(tmp_path):
    options = dict(local=LOCAL, group_axes=0, checkpoint=tmp_path / "kept")

    def broken(record):
        if record.nfev == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_groups(decay, T, chunked(), P0, **options, callback=broken)
    here = tmp_path / "kept" / "locals"
    kept = next(here.iterdir()).read_bytes()
    for name in ("0-0.npz", "99-4.npz", "notes.npz"):  # of a point before, of the next one, of the user
        (here / name).write_bytes(kept)
    again = fit_groups(decay, T, chunked(), P0, **options)
    left = {each.name.partition("-")[0] for each in here.iterdir()} - {"notes.npz"}
    assert len(left) == 1 and left <= {f"{k}" for k in range(1, again.sweeps + 1)} and (here / "notes.npz").exists()
    assert_same_bits(again, fit_groups(decay, T, chunked(), P0, local=LOCAL, group_axes=0))


def test_a_finished_fit_reads_nothing_again(tmp_path, capsys):
    options = dict(local=LOCAL, group_axes=0, strategy="streaming", checkpoint=tmp_path / "kept")
    first = fit_groups(decay, T, chunked(), P0, **options)

    def lost(block):
        raise AssertionError("read again")

    unreadable = chunked().map_blocks(lost, dtype=float, meta=np.empty((0, 0)))
    again = fit_groups(decay, T, unreadable, P0, **options, progress=True)
    assert_same_bits(again, first)
    assert (first.resumed, again.resumed) == (0, first.sweeps)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith(f"fit_groups, resumed after {first.sweeps} sweeps: {again.sweeps} sweeps ")


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (dict(p0=P0 | dict(rate=1.1)), r"Changed: p0\. Give"),
        (dict(p0=P0 | dict(offset=0.6)), r"Changed: p0\. Give"),
        (dict(local="amplitude"), "local"),
        (dict(loss="huber"), r"Changed: loss: 'linear' then, 'huber' now\. Give"),
        (dict(sigma=2.0), r"Changed: sigma\. Give"),
        (dict(bounds=dict(rate=(0, 10))), r"Changed: bounds\. Give"),
        (dict(bounds=dict(offset=(0, 10))), r"Changed: bounds\. Give"),
        (dict(ydata=Y + 1e-9), r"Changed: ydata\. Give"),
        (dict(valid_range=(-9, 9)), "Changed: valid_range: [^;]*Give"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(tmp_path, changed, name):
    plain = dict(f=decay, xdata=T, ydata=Y, p0=P0, local=LOCAL, group_axes=0, checkpoint=tmp_path / "kept")
    fit_groups(**plain)
    with pytest.raises(CheckpointError, match=name):
        fit_groups(**plain | changed)


SCRIPT = """
import sys
import numpy as np
from dask_nlsq import fit_groups
from tests.test_groups import LOCAL, P0, T, Y, decay
from tests.test_groups_kept import chunked

def told(record):
    print(record.nfev, flush=True)

options = dict(local=LOCAL, group_axes=0, strategy="streaming", checkpoint=sys.argv[1], callback=told)
result = fit_groups(decay, T, chunked(), P0, **options)
print("status", result.status, flush=True)
"""


@pytest.mark.slow
def test_a_checkpoint_of_other_labels_is_refused_whatever_the_data_are(tmp_path):
    one, other = np.repeat([0, 1], G // 2)[:, None], np.array([0, 1] * (G // 2))[:, None]
    options = dict(p0=P0, local=LOCAL, checkpoint=tmp_path / "kept")
    fit_groups(decay, T, chunked(), groups=one, **options)
    with pytest.raises(CheckpointError, match="Changed: groups"):
        fit_groups(decay, T, chunked(), groups=other, **options)


def test_more_sweeps_may_be_allowed_when_a_fit_goes_on_and_the_callback_gets_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(p0=P0, local=LOCAL, group_axes=0, checkpoint="kept")

    seen = []

    def elsewhere(record):
        seen.append(record.nfev)
        (tmp_path / "sub").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "sub")

    with pytest.raises(NotConvergedError):
        fit_groups(decay, T, Y, **options, max_nfev=3, callback=elsewhere)
    monkeypatch.chdir(tmp_path)
    whole = resume("kept", max_nfev=50)
    assert_same_bits(whole, fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0))

    before = [*seen]
    assert_same_bits(fit_groups(decay, T, Y, **options, callback=elsewhere), whole)
    assert seen == before


def test_info_of_a_checkpoint_of_groups_counts_sweeps_and_has_their_cost(tmp_path):
    found = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, checkpoint=tmp_path / "kept")
    said = describe(tmp_path / "kept", load)
    assert f"finished sweeps: {found.sweeps}; lowest cost {found.cost:.9g}" in said


def test_the_callback_may_stop_groups_early_and_the_fit_goes_on_after_that(tmp_path):
    def stop(record):
        if record.nfev == 2:
            raise StopIteration

    options = dict(p0=P0, local=LOCAL, group_axes=0, checkpoint=tmp_path / "kept", callback=stop)
    with pytest.warns(scipy.optimize.OptimizeWarning, match="Stopped by `callback`"):
        early = fit_groups(decay, T, Y, **options)
    assert early.status == -2 and np.isfinite(early.local.compute(progress=False).popt).all()
    found = fit_groups(decay, T, Y, **options)
    assert_same_bits(found, fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_resumed_to_the_same_bits(tmp_path, number):
    command = [sys.executable, "-c", SCRIPT, tmp_path / "kept"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "3":
                process.send_signal(number)
                break
        rest = process.stdout.read()
    ended = {signal.SIGKILL: (-signal.SIGKILL, False), signal.SIGTERM: (0, True)}
    assert (process.returncode, "status -3" in rest) == ended[number]
    again = resume(tmp_path / "kept", decay, T, chunked())
    assert_same_bits(again, fit_groups(decay, T, chunked(), P0, local=LOCAL, group_axes=0, strategy="streaming"))


@pytest.mark.slow
def test_a_worker_that_dies_changes_no_bit(tmp_path):
    expected = fit_groups(decay, T, chunked(), P0, local=LOCAL, group_axes=0)
    with local(2) as cluster, Client(cluster) as client:
        pids = client.run(os.getpid)

        def kill(record):
            if record.nfev == 3:
                os.kill(next(iter(pids.values())), signal.SIGKILL)

        result = fit_groups(decay, T, chunked(), P0, local=LOCAL, group_axes=0, callback=kill)
        assert result.strategy == "chunked"
        assert_same_bits(result, expected)


# ---------------------------------------------------------------------------------------------------------------------
# plans, guesses, Jacobians


@pytest.mark.parametrize("options", [{}, dict(strategy="streaming"), dict(memory_limit_gb=2.0)])
def test_the_plan_is_that_of_the_fit(options):
    options |= dict(p0=P0, local=LOCAL, group_axes=0)
    plan, made = plan_fit(decay, T, chunked(), **options), fit_groups(decay, T, chunked(), **options).plan
    for name in ("strategy", "n_points", "n_params", "n_chunks", "n_partitions", "sweep_bytes", "held_bytes"):
        assert getattr(plan, name) == getattr(made, name)
    assert plan.n_params == 2 + 2 * G
    with pytest.raises(ValueError, match="`local` names 'amplitud'"):
        plan_fit(decay, T, chunked(), **options | dict(local="amplitud"))


@pytest.mark.slow
def test_ready_models_guess_their_start():
    x = np.linspace(-3, 3, 90)
    heights = np.linspace(1, 4, 20)
    y = heights[:, None] * np.exp(-((x - 0.4) ** 2) / (2 * 0.6**2)) + np.random.default_rng(0).normal(0, 0.02, (20, 90))
    for p0 in (None, {"center": 0.5}, {"amplitude": heights}):
        result = fit_groups(gaussian, x, y, p0, local="amplitude", group_axes=0)
        assert result.success and np.max(np.abs(result.popt - [0.4, 0.6]) / result.perr) < 5


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["linear", pytest.param("soft_l1", marks=pytest.mark.slow), "poisson"])
def test_a_jacobian_that_is_given_leads_to_the_same_parameters(loss):
    def jac(t, amplitude, offset, rate, beta):
        u = (rate * t) ** beta
        e = jnp.exp(-u)
        return jnp.stack(
            [e, jnp.ones_like(t), -amplitude * e * u * beta / rate, -amplitude * e * u * jnp.log(rate * t)], axis=1
        )

    y = Y if loss != "poisson" else np.random.default_rng(3).poisson(20 * np.maximum(Y, 0.1))
    p0 = P0 if loss != "poisson" else P0 | dict(amplitude=40, offset=10)
    options = dict(local=LOCAL, group_axes=0, loss=loss)
    plain, given = (fit_groups(decay, T, y, p0, **options, **each) for each in ({}, dict(jac=jac)))
    assert given.jac_mode == "user"
    np.testing.assert_allclose(given.popt, plain.popt, rtol=1e-6)
    np.testing.assert_allclose(given.pcov, plain.pcov, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# results


def test_the_shared_parameters_are_a_fit_result_with_the_statistics_of_all(expected):
    shared = expected.shared
    assert isinstance(shared, dask_nlsq.FitResult)
    assert shared.dof == G * N - 2 - 2 * G == expected.dof
    assert shared.reduced_chi_square == pytest.approx(2 * expected.cost / shared.dof)
    assert shared.reduced_chi_square == pytest.approx(0.05**2, rel=0.1)
    H, scatter = np.zeros((2, 2)), np.zeros((2, 2))
    for (a, b, rate, beta), y in zip(expected.local.compute(progress=False).popt, Y, strict=True):
        u = (rate * T) ** beta
        e = np.exp(-u)
        own, J = (
            np.stack([e, np.ones(N)], axis=1),
            np.stack([-a * e * u * beta / rate, -a * e * u * np.log(rate * T)], axis=1),
        )
        J, r = (each - own @ np.linalg.lstsq(own, each)[0] for each in (J, a * e + b - y))
        H, scatter = H + J.T @ J, scatter + np.outer(J.T @ r, J.T @ r)
    C = np.linalg.inv(H)
    np.testing.assert_allclose(shared.sandwich, C @ scatter @ C * G / (G - 2), rtol=1e-6)
    assert "30 of 30 groups" in expected.summary() and "rate" in expected.summary()
    with pytest.raises(ValueError, match="call the model with the parameters of a group"):
        shared.predict(T)


def test_the_full_covariance_is_that_of_a_dense_fit():
    result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, full_covariance=True, **TIGHT)
    _, _, pcov, _ = dense(Y)
    found = result.local.compute(progress=False).pcov
    for g in (0, 7, G - 1):
        places = [2 + 2 * g, 3 + 2 * g, 0, 1]
        np.testing.assert_allclose(found[g], pcov[np.ix_(places, places)], rtol=1e-5, atol=1e-12)


def test_a_saved_result_comes_back_with_its_map(expected, tmp_path):
    expected.save(tmp_path / "kept")
    found = load(tmp_path / "kept")
    assert isinstance(found, GroupResult) and found.summary() == expected.summary()
    np.testing.assert_array_equal(found.pcov, expected.pcov)
    local = expected.local.compute(progress=False)
    np.testing.assert_array_equal(found.local.popt, local.popt)
    np.testing.assert_array_equal(found.local.success, local.success)
    assert found.local.to_xarray().popt.shape == local.popt.shape
    with pytest.raises(AttributeError, match="no 'residuals'"):
        found.local.residuals  # noqa: B018
    found.save(tmp_path / "copy")
    for again in (load(tmp_path / "copy"), pickle.loads(pickle.dumps(found))):
        np.testing.assert_array_equal(again.local.compute().popt, local.popt)
    one = dask_nlsq.curve_fit(decay, T, Y[0], list(P0.values()))
    one.save(tmp_path / "kept")
    assert type(load(tmp_path / "kept")) is dask_nlsq.FitResult and load(tmp_path / "kept").dof == N - 4


def test_a_result_takes_the_place_of_another_with_its_map_and_of_a_damaged_one(expected, tmp_path):
    local = expected.local.compute(progress=False).popt

    def keeps(*names):
        np.testing.assert_array_equal(load(tmp_path).local.popt, local)
        maps = sorted(path.name for path in tmp_path.glob("local*"))
        assert [re.sub("[0-9a-f]{32}", "HEX", name) for name in maps] == sorted(names)

    for names in (["local.zarr"], ["local-HEX.zarr"], ["local.zarr"]):
        expected.save(tmp_path)
        keeps(*names)
    load(tmp_path).save(tmp_path)
    keeps("local.zarr")
    (tmp_path / "result.json").write_text("{")
    expected.save(tmp_path)  # whose old map nobody knows
    keeps("local.zarr", "local-HEX.zarr")
    (tmp_path / "local.zarr" / "zarr.json").unlink()
    (tmp_path / "local.zarr" / "notes.txt").write_text("precious")
    changed(tmp_path / "result.json", VERSION, maps="local.zarr")
    expected.save(tmp_path)
    assert (tmp_path / "local.zarr" / "notes.txt").exists()


@pytest.mark.parametrize("way", ["as a relative path", "by a link", "by a detour"])
def test_a_result_that_is_saved_where_it_was_loaded_from_keeps_its_maps(expected, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    expected.save(tmp_path / "kept")
    (tmp_path / "link").symlink_to("kept")
    found = load(tmp_path / "kept")
    found.save({"as a relative path": "kept", "by a link": "link", "by a detour": "kept/../kept"}[way])
    for each in (found, load("kept")):
        np.testing.assert_array_equal(each.local.popt, expected.local.compute(progress=False).popt)


def test_a_result_that_was_loaded_by_a_relative_path_is_saved_with_its_maps_elsewhere(expected, tmp_path, monkeypatch):
    other = fit_groups(decay, T, 2 * Y, P0, local=LOCAL, group_axes=0)
    for name, result in (("a", expected), ("b", other)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        result.save("kept")
    monkeypatch.chdir(tmp_path / "a")
    found = load("kept")
    monkeypatch.chdir(tmp_path / "b")
    found.save("kept")
    np.testing.assert_array_equal(load("kept").local.popt, expected.local.compute(progress=False).popt)


@pytest.mark.hostile
def test_a_link_out_of_a_result_to_other_maps_is_not_followed(expected, tmp_path):
    expected.save(tmp_path / "kept")
    shutil.move(tmp_path / "kept" / "local.zarr", tmp_path / "outside.zarr")
    (tmp_path / "kept" / "local.zarr").symlink_to("../outside.zarr")
    with pytest.raises(DamagedFileError, match=r"kept/local\.zarr is damaged \(it is a link to .*outside\.zarr"):
        load(tmp_path / "kept")
    GroupResult(expected.shared, StoredMap(tmp_path / "outside.zarr")).save(tmp_path / "kept")
    assert load(tmp_path / "kept").local.path.name != "local.zarr" and StoredMap(tmp_path / "outside.zarr").success.all()


def test_shared_parameters_are_loaded_as_such(expected, tmp_path):
    expected.shared.save(tmp_path)
    assert load(tmp_path).summary() == expected.summary() and load(tmp_path).dof == expected.dof


def test_a_report_is_one_page(expected, tmp_path):
    pytest.importorskip("matplotlib")
    text = expected.report(tmp_path / "page.html").read_text()
    assert all(word in text for word in ("rate", "beta", "converged", "degrees of freedom"))
    _, _, groups = text.partition("<h2>Groups</h2>")
    own, statuses = groups.partition("</section>")[0], expected.local.compute().status
    assert np.all(statuses == MapStatus.GTOL) and f"<tr><td>{statuses.size}</td><td>converged (gtol)</td></tr>" in own
    assert "68 % of the groups" in own and 'alt="' + ", ".join(LOCAL) + '"' in own and "pixel" not in text


def test_a_fit_that_runs_out_of_sweeps_raises_with_the_best_so_far():
    with pytest.raises(NotConvergedError, match="2, is exceeded") as caught:
        fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, max_nfev=2)
    assert isinstance(caught.value.result, GroupResult) and not caught.value.result.success


def test_progress_and_lines_tell_of_each_sweep(capsys):
    result = fit_groups(decay, T, chunked(), P0, local=LOCAL, group_axes=0, verbose=2, progress=True, strategy="streaming")
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) >= result.nfev
    assert "fit_groups" in err


# ---------------------------------------------------------------------------------------------------------------------
# diagnostics


def biexponential(t, a1, a2, tau1, tau2):
    return a1 * jnp.exp(-t / tau1) + a2 * jnp.exp(-t / tau2)


def test_diagnostics_name_what_can_change_places_unless_bounds_tell():
    a = np.random.default_rng(0).uniform(1, 3, (2, 12, 1))
    y = a[0] * np.exp(-T / 0.4) + a[1] * np.exp(-T / 2.5) + np.random.default_rng(1).normal(0, 0.01, (12, N))
    options = dict(p0=dict(a1=1, a2=1, tau1=0.5, tau2=2), local=("a1", "a2"), group_axes=0)
    text = str(fit_groups(biexponential, T, y, **options).diagnostics)
    assert "tau1 and tau2 are interchangeable" in text
    told = dict(tau1=(0.01, 1), tau2=(1, 10))
    assert "interchangeable" not in str(fit_groups(biexponential, T, y, **options, bounds=told).diagnostics)


@pytest.mark.slow
def test_diagnostics_say_where_counts_are_too_few_and_which_groups_pull():
    few = np.random.default_rng(0).poisson(1.5 * np.exp(-T / 2.0) + 0.2, (400, N))
    options = dict(p0=dict(a=2, b=0.3, tau=1.5), local=("a", "b"), group_axes=0)

    def f(t, a, b, tau):
        return a * jnp.exp(-t / tau) + b

    positive = dict(a=(0, None), b=(1e-3, None))
    assert "counts in a group are few for 2 locals" in str(
        fit_groups(f, T, few, loss="poisson", bounds=positive, **options).diagnostics
    )
    y = Y.copy()
    y[3] += 3 * np.sin(40 * T)
    text = str(fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0).diagnostics)
    assert "one group has 9" in text and "times its share" in text
    assert "times its share" not in str(fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0).diagnostics)
