"""Grouped fits: SciPy's dense answer, wherever the groups are; groups that cannot be fitted; errors at the door."""

import warnings

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import xarray as xr
import zarr

import dask_nlsq
from dask_nlsq import MapStatus, curve_fit, fit_groups
from dask_nlsq.groups import fit as groups_fit
from dask_nlsq.memory.plan import JoiningError

G, N = 30, 80
T = np.linspace(0.01, 5, N)
RNG = np.random.default_rng(0)
AMPLITUDE, OFFSET = RNG.uniform(1, 5, G), RNG.uniform(0, 1, G)
SHARED = np.array([0.7, 1.3])
LOCAL = ("amplitude", "offset")
P0 = dict(amplitude=2, offset=0.5, rate=1, beta=1)
TIGHT = dict(ftol=1e-14, xtol=1e-14, gtol=1e-14, accuracy=1e-6)


def decay(t, amplitude, offset, rate, beta):
    return amplitude * jnp.exp(-((rate * t) ** beta)) + offset


def clean(amplitude=AMPLITUDE, offset=OFFSET):
    return amplitude[:, None] * np.exp(-((0.7 * T) ** 1.3)) + offset[:, None]


Y = clean() + RNG.normal(0, 0.05, (G, N))
SIGMA = RNG.uniform(0.03, 0.08, (G, N))
HIDDEN = RNG.random((G, N)) < 0.1


def dense(y, sigma=1.0, mask=False, bounds=(-np.inf, np.inf)):
    """SciPy's shared and local parameters, and the covariance, of all of them at once."""
    weight = np.where(mask, 0.0, 1 / np.broadcast_to(sigma, y.shape))
    n = len(y)

    def residual(p):
        s, own = p[:2], p[2:].reshape(n, 2)
        return ((own[:, :1] * np.exp(-((s[0] * T) ** s[1])) + own[:, 1:] - y) * weight).ravel()

    def jacobian(p):
        s, own = p[:2], p[2:].reshape(n, 2)
        u, J = (s[0] * T) ** s[1], np.zeros((n, N, 2 + 2 * n))
        e = np.exp(-u)
        J[:, :, 0], J[:, :, 1] = -own[:, :1] * e * u * s[1] / s[0], -own[:, :1] * e * u * np.log(s[0] * T)
        for g in range(n):
            J[g, :, 2 + 2 * g], J[g, :, 3 + 2 * g] = e, 1
        return (J * weight[..., None]).reshape(n * N, -1)

    start = np.concatenate([[0.9, 1.1], np.stack([AMPLITUDE[:n], OFFSET[:n] + 0.1], axis=1).ravel()])
    inside = np.clip(start, bounds[0] + 1e-3, bounds[1])
    found = scipy.optimize.least_squares(
        residual, inside, jac=jacobian, bounds=bounds, x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15
    )
    free = np.abs(found.active_mask) == 0
    n_points = np.count_nonzero(weight)
    pcov = np.zeros((2 + 2 * n,) * 2)
    pcov[np.ix_(free, free)] = np.linalg.inv(found.jac[:, free].T @ found.jac[:, free])
    pcov *= 2 * found.cost / (n_points - 2 - 2 * n)
    return found.x[:2], found.x[2:].reshape(n, 2), pcov, found.cost


def assert_dense(result, expected, within=1e-6):
    shared, own, pcov, cost = expected
    perr = np.sqrt(np.diag(pcov))
    local = result.local.compute(progress=False)
    assert result.success and (local.success).all()
    assert np.max(np.abs(result.popt - shared) / perr[:2]) < within
    assert np.max(np.abs(local.popt[..., :2].reshape(-1, 2) - own) / perr[2:].reshape(-1, 2)) < within
    np.testing.assert_allclose(result.pcov, pcov[:2, :2], rtol=1e-6)
    np.testing.assert_allclose(local.perr[..., :2].ravel(), perr[2:], rtol=1e-6)
    np.testing.assert_allclose(local.perr[..., 2:].reshape(-1, 2), np.broadcast_to(perr[:2], (len(own), 2)), rtol=1e-6)
    assert result.cost == pytest.approx(cost, rel=1e-12)


CHUNKS = {"one chunk": (G, N), "a chunk for each group": (1, N), "cut along both axes": (7, 13)}
EACH = [pytest.param(cut, id=name, marks=[pytest.mark.slow] * (cut[0] == 1)) for name, cut in CHUNKS.items()]


@pytest.fixture(scope="module")
def expected():
    return dense(Y, SIGMA, HIDDEN)


@pytest.mark.parametrize("chunks", EACH)
def test_shared_and_local_parameters_and_their_errors_are_those_of_one_dense_fit(chunks, expected):
    y, sigma, mask = (da.from_array(each, chunks) for each in (Y, SIGMA, HIDDEN))
    result = fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0, sigma=sigma, mask=mask, **TIGHT)
    assert_dense(result, expected)
    assert result.n_points == np.count_nonzero(~HIDDEN) and result.n_groups == G
    assert result.dof == result.n_points - 2 - 2 * G


@pytest.mark.slow
def test_data_that_are_read_in_each_sweep_have_the_bits_of_those_held(tmp_path):
    store = zarr.create_array(tmp_path / "y", shape=Y.shape, chunks=(8, N), dtype="f8")
    store[...] = Y
    held, read = (
        fit_groups(decay, T, tmp_path / "y", P0, local=LOCAL, group_axes=0, strategy=strategy)
        for strategy in ("chunked", "streaming")
    )
    np.testing.assert_array_equal(held.popt, read.popt)
    np.testing.assert_array_equal(held.pcov, read.pcov)
    np.testing.assert_array_equal(held.local.compute().popt, read.local.compute().popt)


def test_workers_find_the_same_bits(workers):
    y = da.from_array(Y, (5, N))
    here = fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0)
    with workers.as_current():
        there = fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0)
        local = there.local.compute(progress=False)
    np.testing.assert_array_equal(here.popt, there.popt)
    np.testing.assert_array_equal(here.local.compute().popt, local.popt)
    del there, local


def test_axes_in_any_order_and_names_of_xarray_are_the_same_fit():
    result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0)
    turned = fit_groups(decay, T, Y.T, P0, local=LOCAL, group_axes=1)
    labelled = xr.DataArray(Y, dims=("angle", "t"), coords={"angle": np.arange(G) * 3.0, "t": T})
    named = fit_groups(decay, "t", labelled, P0, local=LOCAL, group_axes="angle")
    for other in (turned, named):
        np.testing.assert_allclose(other.popt, result.popt, rtol=1e-9)
    assert named.local.to_xarray().popt.dims == ("angle", "param")
    np.testing.assert_array_equal(named.local.to_xarray().angle, labelled.angle)


@pytest.mark.slow
def test_starts_and_bounds_of_locals_may_differ_from_group_to_group():
    low = AMPLITUDE - 0.5
    low[3] = AMPLITUDE[3] + 0.4  # cuts the optimum off
    bounds = dict(amplitude=(low, None))
    result = fit_groups(decay, T, Y, P0 | dict(amplitude=AMPLITUDE + 0.5), local=LOCAL, group_axes=0, bounds=bounds, **TIGHT)
    ends = np.full((2, 2 + 2 * G), np.inf) * [[-1], [1]]
    ends[0, 2::2] = low
    shared, _, pcov, cost = dense(Y, bounds=ends)
    local = result.local.compute(progress=False)
    assert local.status[3] == MapStatus.AT_BOUND and local.at_bound[3, 0] == -1
    assert result.cost == pytest.approx(cost, rel=1e-9)
    assert np.max(np.abs(result.popt - shared) / np.sqrt(np.diag(pcov))[:2]) < 1e-4


@pytest.mark.slow
def test_counts_have_the_likeliest_parameters():
    y = np.random.default_rng(3).poisson(20 * clean(AMPLITUDE[:4], OFFSET[:4]))
    p0 = [40, 10, 1, 1]
    result = fit_groups(decay, T, y, p0, local=LOCAL, group_axes=0, loss="poisson", **TIGHT)

    def joint(x, *p):
        k = x[1]
        own = jnp.stack(p[2:]).reshape(4, 2)
        return own[k, 0] * jnp.exp(-((p[0] * x[0]) ** p[1])) + own[k, 1]

    x = np.broadcast_to(T, y.shape).ravel(), np.repeat(np.arange(4), N)
    popt, pcov = curve_fit(joint, x, y.ravel(), [1, 1, *[40, 10] * 4], loss="poisson", ftol=1e-14, xtol=1e-14, gtol=1e-14)
    perr, local = np.sqrt(np.diag(pcov)), result.local.compute(progress=False)
    assert np.max(np.abs(result.popt - popt[:2]) / perr[:2]) < 1e-5
    np.testing.assert_allclose(result.pcov, pcov[:2, :2], rtol=1e-5)
    np.testing.assert_allclose(local.perr[:, :2].ravel(), perr[2:], rtol=1e-5)


@pytest.fixture(scope="module")
def special():
    """Groups that are masked, too short, all zero, and without an amplitude, beside good ones."""
    y, mask = clean() + 0.05 * np.random.default_rng(5).standard_normal((G, N)), np.zeros((G, N), bool)
    mask[2], mask[5, 1:] = True, True
    y[7] = 0.0
    y[11, 4] = np.nan
    mask[13, 2:] = True  # as many points as locals
    return y, mask


@pytest.mark.slow
def test_groups_that_cannot_be_fitted_have_a_status_and_change_nothing_for_the_others(special):
    y, mask = special
    result = fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0, mask=mask)
    local = result.local.compute(progress=False)
    good = np.setdiff1d(np.arange(G), [2, 5, 7])
    assert local.status[2] == MapStatus.MASKED and local.status[5] == MapStatus.TOO_FEW_POINTS
    assert np.isnan(local.popt[[2, 5]]).all()
    assert np.isfinite(local.popt[good]).all() and np.isfinite(local.perr[good]).all()
    assert local.n_points[11] == N - 1
    assert abs(local.popt[7, 0]) < 1e-6 and abs(local.popt[7, 1]) < 1e-6
    alone = fit_groups(decay, T, y[good], P0, local=LOCAL, group_axes=0)
    assert np.max(np.abs(result.popt - alone.popt) / alone.perr) < 0.1
    assert result.n_groups == G - 2


@pytest.mark.slow
def test_what_is_fixed_is_no_parameter():
    result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, fixed=dict(beta=1.3))
    assert result.shared_names == ("rate",) and result.popt.shape == (1,)
    assert (result.local.compute().popt[:, 3] == 1.3).all()


def test_a_callback_sees_each_sweep_and_may_end_the_fit():
    seen = []

    def callback(record):
        seen.append(record.cost)
        if len(seen) == 2:
            raise StopIteration

    with pytest.warns(scipy.optimize.OptimizeWarning, match="Not converged: Stopped by `callback`"):
        result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, callback=callback)
    assert len(seen) == 2 and not result.success


def test_a_fit_says_what_it_is():
    text = repr(fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0))
    assert text.startswith("<GroupResult>\nconverged") and "30 of 30 groups, each with amplitude, offset" in text
    assert "2,400 points" in text and "rate   0.69" in text


def test_local_maps_are_written_and_read(tmp_path):
    result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0)
    result.local.to_zarr(tmp_path / "maps", progress=False)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "maps")["popt"][...], result.local.compute().popt)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(local="amplitud"), ValueError, "`local` names 'amplitud', the parameters are"),
        (dict(local=tuple(P0)), ValueError, "`local` names all fitted parameters.*`fit_map`"),
        (dict(local="beta", fixed=dict(beta=1.0)), ValueError, "`local` does not name a fitted parameter.*`curve_fit`"),
        (dict(local=()), ValueError, "`local` must be"),
        (dict(group_axes=(0, 1)), ValueError, "`group_axes` names all axes"),
        (dict(group_axes=2), ValueError, "`group_axes` must name axes of `ydata`, by numbers from 0 to 1: not 2"),
        (dict(group_axes="angle"), ValueError, "`group_axes` 'angle' is not a dimension"),
        (dict(p0=P0 | dict(rate=np.linspace(1, 2, G))), ValueError, "p0 of rate: a parameter that all groups share"),
        (dict(bounds=dict(rate=(np.linspace(0, 0.1, G), 2))), ValueError, "bounds of rate: a parameter that all groups"),
        (dict(p0=P0 | dict(amplitude=np.ones(G + 1))), ValueError, "p0 of amplitude"),
        (dict(locl="amplitude"), TypeError, "did you mean 'local'"),
        (dict(mask=np.arange(N) > 0), ValueError, "no group can be fitted"),
        (dict(sigma=np.where(np.arange(G) == 4, 0.0, 1.0)[:, None]), ValueError, r"zero or negative in group \(4,\)"),
        (dict(p0=P0 | dict(offset=np.ones(5))), ValueError, r"must be a number, or an array of shape \(30,\), not"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_at_the_door(options, error, message):
    with pytest.raises(error, match=message):
        fit_groups(decay, T, Y, **dict(p0=P0, local=LOCAL, group_axes=0) | options)


def test_group_axes_come_in_any_order():
    y = Y.reshape(5, 6, N)
    one, other = (fit_groups(decay, T, y, P0, local=LOCAL, group_axes=axes) for axes in ((0, 1), (1, 0)))
    np.testing.assert_array_equal(one.popt, other.popt)
    assert other.local.popt.shape == (5, 6, 4)


@pytest.mark.slow
def test_exact_data_have_the_exact_parameters_and_no_errors():
    result = fit_groups(decay, T, clean(), P0, local=LOCAL, group_axes=0)
    assert result.success and (result.perr < 1e-6).all()
    np.testing.assert_allclose(result.popt, SHARED, rtol=1e-7)
    with pytest.warns(scipy.optimize.OptimizeWarning, match="not change with rate|not depend on rate"):
        flat = fit_groups(decay, T, 0 * Y, P0, local=LOCAL, group_axes=0)
    assert flat.cost < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["huber", pytest.param("soft_l1", marks=pytest.mark.slow)])
def test_exact_data_converge_with_any_loss(loss):
    result = fit_groups(decay, T, clean(), P0, local=LOCAL, group_axes=0, loss=loss)
    assert result.success
    np.testing.assert_allclose(result.popt, SHARED, rtol=1e-7)


@pytest.mark.slow
def test_locals_that_have_run_away_begin_anew_and_hold_nothing_up():
    """Widths that grow without end where the shared decay is too fast."""

    def f(t, a, w, s):
        return a * jnp.exp(-((t / w) ** 2)) * jnp.exp(-s * t)

    rng, t = np.random.default_rng(0), np.linspace(0.01, 3, 50)
    w, a = rng.uniform(0.3, 2.5, (30, 1)), rng.uniform(0.05, 4, (30, 1))
    y = a * np.exp(-((t / w) ** 2)) * np.exp(-0.8 * t) + rng.normal(0, 0.05, (30, 50))
    near, far = (fit_groups(f, t, y, dict(a=1.0, w=0.5, s=s), local=("a", "w"), group_axes=0) for s in (1.0, 4.0))
    assert near.success and far.success
    assert far.cost == pytest.approx(near.cost, rel=1e-6)


@pytest.mark.slow
def test_a_group_of_as_many_points_as_locals_has_errors_by_the_noise_of_all():
    mask = np.zeros(Y.shape, bool)
    mask[3] = True
    mask[3, [5, 60]] = False
    options = dict(p0=P0, local=LOCAL, group_axes=0, mask=mask)
    plain = fit_groups(decay, T, Y, **options)
    known = fit_groups(decay, T, Y, **options, sigma=1.0, absolute_sigma=True).local.compute(progress=False)
    local, scale = plain.local.compute(progress=False), np.sqrt(2 * plain.cost / plain.dof)
    np.testing.assert_allclose(local.perr[3], known.perr[3] * scale, rtol=1e-6)
    assert local.success[3]


@pytest.mark.slow
def test_locals_are_at_their_bound_where_they_end_there_and_then_count_as_held():
    def f(t, a, b, tau):
        return a * jnp.exp(-t / tau) + b

    rng, t = np.random.default_rng(1), np.linspace(0.01, 5, 40)
    a, b = rng.uniform(0.5, 2, 24), np.where(np.arange(24) % 2, 0.0, rng.uniform(0.1, 0.3, 24))
    y = a[:, None] * np.exp(-t / 1.5) + b[:, None] + rng.normal(0, 0.05, (24, 40))
    bounds = dict(b=(0, None))
    result = fit_groups(f, t, y, dict(a=0.5, b=0.1, tau=1.0), local=("a", "b"), group_axes=0, bounds=bounds)
    local = result.local.compute(progress=False)
    held = local.at_bound[:, 1] == -1
    assert 0 < held.sum() < 12 and (local.status[held] == MapStatus.AT_BOUND).all()
    assert (local.popt[held, 1] < 1e-4).all() and (local.popt[~held, 1] > 1e-4).all()
    assert (local.perr[held, 1] == 0).all() and (local.perr[~held, 1] > 0.003).all()
    assert (local.status[~held] < MapStatus.AT_BOUND).all()
    inside = np.flatnonzero(~held)

    def joint(x, *p):
        amplitude, offset = jnp.stack(p[1:25]), jnp.zeros(24).at[inside].set(jnp.stack(p[25:]))
        return amplitude[x[1]] * jnp.exp(-x[0] / p[0]) + offset[x[1]]

    x = np.tile(t, 24), np.repeat(np.arange(24), 40)
    popt, pcov = curve_fit(joint, x, y.ravel(), [1.5, *a, *local.popt[inside, 1]])
    assert abs(popt[0] - result.popt[0]) < 1e-3 * result.perr[0]
    scale = (24 * 40 - 25 - len(inside)) / result.dof  # locals that are held count as parameters here
    np.testing.assert_allclose(result.pcov[0, 0], pcov[0, 0] * scale, rtol=1e-5)


def test_one_group_is_a_fit_of_all_parameters():
    y = Y[:1]
    result = fit_groups(decay, T, y, P0, local=LOCAL, group_axes=0, **TIGHT)
    popt, pcov = dask_nlsq.curve_fit(decay, T, y[0], list(P0.values()), ftol=1e-14, xtol=1e-14, gtol=1e-14)
    perr = np.sqrt(np.diag(pcov))
    local = result.local.compute()
    assert np.max(np.abs(local.popt[0] - popt) / perr) < 1e-5
    np.testing.assert_allclose(local.perr[0], perr, rtol=1e-5)


def test_nothing_is_warned_of_where_there_is_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0)


@pytest.mark.slow
def test_long_groups_are_evaluated_in_tiles_with_coordinates_along_some_axes():
    """Three axes: x has an axis of the groups, and two of the fit, each of length 1 along the others."""
    k, i, j = np.arange(4)[:, None, None], np.arange(70)[None, :, None], np.arange(90)[None, None, :]
    scale = np.array([0.5, 1.0, 1.5, 2.0])

    def f(x, amplitude, rate, slope):
        return amplitude * jnp.exp(-rate * jnp.asarray(scale)[x[0]] * x[1] / 70) + slope * x[2]

    amplitude = np.array([1.0, 2.0, 3.0, 4.0])
    y = np.asarray(f((k, i, j), amplitude[:, None, None], 1.5, 0.01)) + np.random.default_rng(1).normal(0, 0.01, (4, 70, 90))
    p0 = dict(amplitude=1, rate=1, slope=0)
    result = fit_groups(f, (k, i, j), y, p0, local="amplitude", group_axes=0, **TIGHT)
    names = [f"a{g}" for g in range(4)]
    popt, pcov = curve_fit(
        lambda x, a0, a1, a2, a3, rate, slope: f(x, jnp.stack([a0, a1, a2, a3])[x[0]], rate, slope),
        (k, i, j), y, dict.fromkeys([*names, "rate"], 1.0) | dict(slope=0), ftol=1e-14, xtol=1e-14, gtol=1e-14,
    )  # fmt: skip
    perr, local = np.sqrt(np.diag(pcov)), result.local.compute(progress=False)
    assert np.max(np.abs(result.popt - popt[4:]) / perr[4:]) < 1e-6
    np.testing.assert_allclose(result.pcov, pcov[4:, 4:], rtol=1e-6)
    np.testing.assert_allclose(local.perr[:, 0], perr[:4], rtol=1e-6)


def test_a_long_group_needs_a_model_that_is_pointwise():
    def cumulated(t, amplitude, rate):
        return jnp.cumsum(amplitude * jnp.exp(-rate * t))

    with pytest.raises(ValueError, match="pointwise"):
        fit_groups(cumulated, np.linspace(0, 1, 5000), np.ones((3, 5000)), [1, 1], local="amplitude", group_axes=0)


# ---------------------------------------------------------------------------------------------------------------------
# nothing is lost in silence


@pytest.mark.slow
def test_a_trial_at_which_a_group_is_not_finite_is_refused_and_no_group_is_lost():
    """The root of a shared parameter that a long step makes too small for the last groups."""

    def f(t, amplitude, s):
        return amplitude * jnp.sqrt(s - t)

    t = np.linspace(0, 1, 40)
    ends = np.linspace(0.2, 1.0, 6)
    x = ends[:, None] * t
    y = np.array([1.0, 2, 3, 4, 5, 6])[:, None] * np.sqrt(1.02 - x) + np.random.default_rng(0).normal(0, 0.01, x.shape)
    result = fit_groups(f, x, y, dict(amplitude=1.0, s=30.0), local="amplitude", group_axes=0)
    assert result.success and result.n_groups == 6
    assert abs(result.popt[0] - 1.02) < 5 * result.perr[0]


def test_a_group_that_is_not_finite_at_the_start_is_left_out_and_says_so():
    def f(t, amplitude, s):
        return amplitude * jnp.sqrt(s - t)

    t = np.linspace(0, 1, 40)
    x = np.array([1.0, 1.0, 3.0])[:, None] * t
    y = 2 * np.sqrt(np.maximum(1.5 - x, 0)) + np.random.default_rng(0).normal(0, 0.01, x.shape)
    result = fit_groups(f, x, y, dict(amplitude=1.0, s=1.6), local="amplitude", group_axes=0)
    local = result.local.compute(progress=False)
    assert result.n_groups == 2 and local.status[2] == MapStatus.NON_FINITE and np.isnan(local.popt[2]).all()
    alone = fit_groups(f, x[:2], y[:2], dict(amplitude=1.0, s=1.6), local="amplitude", group_axes=0)
    np.testing.assert_allclose(result.popt, alone.popt, rtol=1e-9)


@pytest.mark.slow
def test_a_shared_parameter_that_locals_stand_in_for_is_undetermined():
    def f(t, amplitude, factor, rate):
        return amplitude * factor * jnp.exp(-rate * t)

    y = AMPLITUDE[:, None] * np.exp(-0.7 * T) + np.random.default_rng(0).normal(0, 0.05, (G, N))
    with pytest.warns(scipy.optimize.OptimizeWarning) as caught:
        result = fit_groups(f, T, y, dict(amplitude=1, factor=2, rate=1), local="amplitude", group_axes=0)
    assert any("does not depend on factor" in str(each.message) for each in caught)
    assert not result.success and not np.isfinite(result.perr).any()
    assert np.isinf(result.local.compute(progress=False).perr[:, 0]).all()


def test_the_map_of_the_groups_is_no_map_of_separate_fits(tmp_path):
    result = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0)
    assert not hasattr(result.local, "refit_failed")
    result.local.to_zarr(tmp_path / "maps", progress=False)
    other = fit_groups(decay, T, Y, P0, local=LOCAL, group_axes=0, bounds=dict(rate=(0.71, None)))
    with pytest.raises(ValueError, match="shared"):
        other.local.to_zarr(tmp_path / "maps", resume=True, progress=False)


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out():
    t, y = np.linspace(0, 1, 2000), da.zeros((40_000, 2000), chunks=(100, 2000))
    options = dict(local=LOCAL, group_axes=0, strategy="standard", memory_limit_gb=0.5)
    with pytest.raises(dask_nlsq.MemoryBudgetError, match=r'the groups take 6.* use strategy="streaming"'):
        fit_groups(decay, t, y, P0, **options)


# ---------------------------------------------------------------------------------------------------------------------
# models that are linear in the locals; shared parameters that are hard to tell apart


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(loss="poisson"), dict(loss="huber"), dict(sigma=SIGMA, mask=HIDDEN)])
def test_one_table_of_a_linear_model_serves_all_groups_that_share_x(options):
    """Where each group has coordinates of its own, the model is evaluated for each."""
    y = np.random.default_rng(3).poisson(20 * clean()) if options.get("loss") == "poisson" else Y
    start = dict(amplitude=40, offset=10, rate=1, beta=1) if options.get("loss") == "poisson" else P0
    common, own = (
        fit_groups(decay, x, y, start, local=LOCAL, group_axes=0, **options, **TIGHT)
        for x in (T, np.broadcast_to(T, Y.shape))
    )
    assert np.max(np.abs(common.popt - own.popt) / own.perr) < 1e-6
    np.testing.assert_allclose(common.pcov, own.pcov, rtol=1e-8)
    maps = [each.local.compute(progress=False) for each in (common, own)]
    np.testing.assert_allclose(maps[0].popt, maps[1].popt, rtol=0, atol=1e-6 * np.min(own.perr))
    np.testing.assert_allclose(maps[0].perr, maps[1].perr, rtol=1e-7)


@pytest.mark.slow
def test_a_model_that_is_linear_for_positive_locals_alone_is_not_taken_for_linear():
    def size(t, amplitude, offset, rate, beta):
        return decay(t, jnp.abs(amplitude), offset, rate, beta)

    one, other = (fit_groups(f, T, Y, P0, local=LOCAL, group_axes=0, **TIGHT) for f in (decay, size))
    assert np.max(np.abs(one.popt - other.popt) / one.perr) < 1e-6


@pytest.mark.slow
def test_where_points_have_no_coordinate_they_are_left_out_of_the_table_too():
    gap = np.where(np.arange(N) % 7 == 3, np.nan, T)
    with pytest.warns(RuntimeWarning, match="of 80 points are left out of every pixel"):
        with_gap = fit_groups(decay, gap, Y, P0, local=LOCAL, group_axes=0)
    some = np.isfinite(gap)
    without = fit_groups(decay, T[some], Y[:, some], P0, local=LOCAL, group_axes=0)
    assert np.max(np.abs(with_gap.popt - without.popt) / without.perr) < 1e-6
    assert with_gap.shared.n_points == without.shared.n_points


def cubic(x, a, b, s0, s1, s2):
    return a + b * jnp.exp(-0.1 * (x - 1000)) + s0 * x + s1 * x**2 * 1e-3 + s2 * x**3 * 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True])
def test_shared_parameters_that_are_hard_to_tell_apart_are_found_by_qr(bounded):
    """Their columns have a condition of 4e6, of which a gram matrix has lost the digits. Long double is the judge."""
    rng, x, n = np.random.default_rng(0), np.linspace(1000, 1010, 200), 7
    e, shared = np.exp(-0.1 * (x - 1000)), np.stack([x, x**2 * 1e-3, x**3 * 1e-6], axis=1)
    a, b = rng.uniform(1, 5, (2, n, 1))
    b[3] = -0.5 if bounded else b[3]
    y = a + b * e + shared @ [0.3, 0.2, -0.1] + rng.normal(0, 0.01, (n, len(x)))
    bounds = dict(b=(0, None)) if bounded else (-np.inf, np.inf)
    result = fit_groups(cubic, x, y, dict(a=1, b=1, s0=0.1, s1=0.1, s2=0.1), local=("a", "b"), group_axes=0, bounds=bounds)
    assert result.success and result.shared.reduction == "qr"

    own = [
        (k, column)
        for k in range(n)
        for column in ((np.ones_like(x), e) if not (bounded and k == 3) else (np.ones_like(x),))
    ]
    J = np.zeros((n, len(x), len(own) + 3), np.longdouble)
    for place, (k, column) in enumerate(own):
        J[k, :, place] = column
    J[:, :, -3:] = shared
    J = J.reshape(-1, J.shape[-1])
    Q, R = J.copy(), np.zeros((J.shape[1],) * 2, np.longdouble)
    for j in range(J.shape[1]):  # Gram and Schmidt's method, twice
        for i in [*range(j)] * 2:
            along = Q[:, i] @ Q[:, j]
            R[i, j] += along
            Q[:, j] -= along * Q[:, i]
        R[j, j] = np.sqrt(Q[:, j] @ Q[:, j])
        Q[:, j] /= R[j, j]
    last, R = (Q.T @ y.ravel())[-3:], R[-3:, -3:]
    residual = y.ravel() - Q @ (Q.T @ y.ravel())
    inverse = np.array([scipy.linalg.solve_triangular(R.astype(float), c) for c in np.eye(3)]).T
    expected = inverse @ last.astype(float)
    perr = np.sqrt(np.diag(inverse @ inverse.T) * float(residual @ residual) / result.shared.dof)
    assert np.max(np.abs(result.popt - expected) / perr) < 1e-4
    np.testing.assert_allclose(result.perr, perr, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# groups that do not fit in memory


LONG = 2_000_000
LIMIT = dict(memory_limit_gb=0.4, strategy="streaming")


@pytest.fixture(scope="module")
def long():
    t, k = np.linspace(0.01, 5, LONG), np.arange(3)[:, None]
    y = (k + 1) * np.exp(-((0.7 * t) ** 1.3)) + 0.1 * k + np.random.default_rng(0).normal(0, 0.05, (3, LONG))
    return t, da.from_array(y, (1, 100_000))


@pytest.mark.slow
def test_groups_that_are_too_large_to_be_joined_are_read_in_pieces(long):
    t, y = long
    plan = dask_nlsq.plan_fit(decay, t, y, P0, local=LOCAL, group_axes=0, **LIMIT)
    assert plan.reason.endswith("read in pieces")
    joined = fit_groups(decay, t, y, P0, local=LOCAL, group_axes=0)
    apart = fit_groups(decay, t, y, P0, local=LOCAL, group_axes=0, **LIMIT)
    assert apart.success and "pieces" not in joined.shared.plan.reason
    assert np.max(np.abs(apart.popt - joined.popt) / joined.perr) < 1e-4
    np.testing.assert_allclose(apart.pcov, joined.pcov, rtol=1e-6)
    one, other = (each.local.compute(progress=False) for each in (joined, apart))
    np.testing.assert_allclose(one.popt, other.popt, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(one.perr, other.perr, rtol=1e-6)


@pytest.mark.parametrize("options", [dict(loss="huber"), dict(local=("amplitude", "rate"))])
def test_pieces_are_for_locals_that_the_model_is_linear_in_under_least_squares(options, long):
    t, y = long
    with pytest.raises(dask_nlsq.MemoryBudgetError, match=r"joining the chunks .* at once.*linear in, with loss='linear'"):
        fit_groups(decay, t, y, P0, **(dict(local=LOCAL, group_axes=0) | LIMIT | options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "x, options",
    [
        (T, dict()),
        (np.broadcast_to(T, Y.shape), dict(sigma=SIGMA, mask=HIDDEN)),
        (da.from_array(np.broadcast_to(T, Y.shape), (7, 11)), dict(bounds=dict(offset=(0.3, None)))),
    ],
)
def test_pieces_have_the_fit_of_whole_groups(x, options, monkeypatch, workers):
    y = da.from_array(Y, (8, 13))
    whole = fit_groups(decay, x, y, P0, local=LOCAL, group_axes=0, **options, **TIGHT)
    prepared = groups_fit._prepared
    monkeypatch.setattr(groups_fit, "_prepared", lambda given: prepared(given, JoiningError("as if they were too large")))
    cut = fit_groups(decay, x, y, P0, local=LOCAL, group_axes=0, **options, **TIGHT)
    assert cut.success and np.max(np.abs(cut.popt - whole.popt) / whole.perr) < 1e-6
    np.testing.assert_allclose(cut.pcov, whole.pcov, rtol=1e-8)
    maps = [each.local.compute(progress=False) for each in (whole, cut)]
    np.testing.assert_allclose(maps[0].popt, maps[1].popt, rtol=1e-8)
    np.testing.assert_array_equal(maps[0].status, maps[1].status)
    if not options:
        with workers.as_current():
            there = fit_groups(decay, x, y, P0, local=LOCAL, group_axes=0, **options, **TIGHT)
        np.testing.assert_array_equal(there.popt, cut.popt)
        del there


@pytest.mark.slow
def test_pieces_of_groups_are_joined_by_qr_too(monkeypatch):
    rng, x = np.random.default_rng(0), np.linspace(1000, 1010, 200)
    y = cubic(x, rng.uniform(1, 5, (4, 1)), rng.uniform(1, 5, (4, 1)), 0.3, 0.2, -0.1) + rng.normal(0, 0.01, (4, 200))
    start = dict(a=1, b=1, s0=0.1, s1=0.1, s2=0.1)
    whole = fit_groups(cubic, x, np.asarray(y), start, local=("a", "b"), group_axes=0)
    prepared = groups_fit._prepared
    monkeypatch.setattr(groups_fit, "_prepared", lambda given: prepared(given, JoiningError("as if they were too large")))
    cut = fit_groups(cubic, x, da.from_array(np.asarray(y), (3, 60)), start, local=("a", "b"), group_axes=0)
    assert cut.success and whole.shared.reduction == cut.shared.reduction == "qr"
    assert np.max(np.abs(cut.popt - whole.popt) / whole.perr) < 1e-4
    np.testing.assert_allclose(cut.perr, whole.perr, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# models that look linear, and are not; locals that the data do not determine


def narrow(x, amplitude, width, centre):
    return amplitude * jnp.exp(-0.5 * ((x - centre) / width) ** 2)


def saturated(x, amplitude, rate):
    return jnp.minimum(amplitude * jnp.exp(-rate * x), 1500.0)


def on_an_offset(x, offset, amplitude, frequency, phase):
    return offset + amplitude * jnp.cos(frequency * x + phase)


def shares(x, one, other, rate):
    total = one + other
    share = one / total
    return total * (share * jnp.exp(-rate * x) + (1 - share))


def guarded(x, amplitude, rate):
    return jnp.where(amplitude == 0, 0.0, amplitude * jnp.exp(-rate * x))


LATER = np.linspace(0, 5, 60)
LOOK_LINEAR = {  # where the locals are tried, or at 0
    "nanometres": (narrow, 1e-9 * 2 * LATER, dict(amplitude=8, width=1.2e-9), dict(centre=np.linspace(3e-9, 7e-9, 5))),
    "saturation": (saturated, LATER, dict(rate=0.8), dict(amplitude=np.linspace(2000, 4600, 5))),
    "an offset": (on_an_offset, 2 * LATER, dict(offset=1e10, amplitude=5, frequency=2), dict(phase=np.linspace(0.5, 1, 5))),
    "not finite at 0": (shares, LATER, dict(rate=0.8), dict(one=np.linspace(1, 3, 5), other=np.full(5, 2.0))),
    "a guard at 0": (guarded, LATER, dict(rate=0.8), dict(amplitude=np.linspace(1, 3, 5))),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOK_LINEAR)
def test_what_only_looks_linear_in_the_locals_has_the_same_fit_by_any_x(case):
    f, x, shared, local = LOOK_LINEAR[case]
    names = f.__code__.co_varnames[1 : f.__code__.co_argcount]
    truth = {name: value * (1 if name == "offset" else 0.98) for name, value in shared.items()} | {
        name: v[:, None] for name, v in local.items()
    }
    with jax.enable_x64(True):
        y = np.asarray(f(x, *(truth[name] for name in names)))
    y = y + np.random.default_rng(0).normal(0, 1e-2 * np.ptp(y, axis=1).max(), y.shape)
    start = shared | {name: 0.97 * value for name, value in local.items()}
    fits = [fit_groups(f, each, y, start, local=[*local], group_axes=0) for each in (x, np.broadcast_to(x, y.shape))]
    assert all(each.success for each in fits)
    assert np.max(np.abs(fits[0].popt - fits[1].popt) / fits[1].perr) < 0.02
    np.testing.assert_allclose(fits[0].cost, fits[1].cost, rtol=1e-6)


@pytest.mark.slow
def test_models_without_x_have_groups_too():
    y = np.array([[1.0, 1.2, 0.8], [2.0, 2.1, 1.9]])
    with pytest.warns(scipy.optimize.OptimizeWarning, match="does not depend on b|not change with b"):
        result = fit_groups(lambda x, a, b: a + b, None, y, dict(a=1, b=0.5), local="a", group_axes=0)
    np.testing.assert_allclose(result.local.compute(progress=False).popt.sum(axis=1), [1, 2], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["undetermined first", "undetermined last"])
def test_locals_that_a_group_does_not_determine_take_nothing_from_the_others_by_qr(order):
    """The points of the first group are masked where its step is; the reference leaves that local out."""
    rng, x = np.random.default_rng(1), np.linspace(0.2, 1.2, 60)
    late = x > 0.7
    y = (
        rng.uniform(1, 2, (3, 1)) * late
        + rng.uniform(1, 2, (3, 1)) * np.exp(-x)
        + 2 * np.exp(-0.5 * x)
        + rng.normal(0, 1e-6, (3, 60))
    )
    mask = np.zeros((3, 60), bool)
    mask[0] = late

    def step(x, a, b, s, t):
        return a * jnp.where(x > 0.7, 1.0, 0.0) + b * jnp.exp(-x) + s * jnp.exp(-0.5 * x) + t * jnp.exp(-0.5001 * x)

    def other(x, b, a, s, t):
        return step(x, a, b, s, t)

    f = step if order == "undetermined first" else other
    columns = np.zeros((3, 60, 8))
    for g in range(3):
        columns[g, :, 2 * g], columns[g, :, 2 * g + 1] = late, np.exp(-x)
    columns[..., 6], columns[..., 7] = np.exp(-0.5 * x), np.exp(-0.5001 * x)
    J, known = np.delete(columns[~mask], 0, axis=1), y[~mask]
    U, s, Vt = np.linalg.svd(J / np.linalg.norm(J, axis=0), full_matrices=False)
    best = (Vt.T / s) @ (U.T @ known) / np.linalg.norm(J, axis=0)
    perr = np.sqrt(np.sum((Vt.T / s) ** 2, axis=1)) / np.linalg.norm(J, axis=0) * 1e-6
    result = fit_groups(
        f, x, y, dict(a=1, b=1, s=1, t=1), local=("a", "b"), group_axes=0, mask=mask, sigma=1e-6, absolute_sigma=True
    )
    assert result.shared.reduction == "qr" and result.success
    np.testing.assert_allclose(result.perr, perr[-2:], rtol=1e-3)
    assert np.max(np.abs(result.popt - best[-2:]) / perr[-2:]) < 0.05


@pytest.mark.slow
def test_nothing_warns_where_shared_params_overflow_in_each_others_place():
    two, t = np.float64(2), np.linspace(0, 8, 40)

    def f(t, offset, scale, rate):
        return offset + 1e-3 * scale * two**rate * jnp.exp(-rate * t)  # outside JAX, a power of NumPy, which warns

    y = np.array([[1.0], [2.0]]) + 50 * 2**0.5 * np.exp(-0.5 * t) + np.random.default_rng(0).normal(0, 0.1, (2, 40))
    result = fit_groups(f, t, y, dict(offset=1, scale=4e4, rate=0.4), local="offset", group_axes=0)
    assert np.all(np.abs(result.popt - [5e4, 0.5]) < 4 * result.perr)


# ---------------------------------------------------------------------------------------------------------------------
# amplitudes that start far off

PLACES = np.linspace(-5, 5, 60)


def peak(x, a, m, w, c):
    return a * jnp.exp(-0.5 * ((x - m) / w) ** 2) + c


@pytest.fixture(scope="module")
def peaks():
    """Counts of 8 peaks, (8, 60), their amplitudes, centres and widths, (8, 3), on a background of 300."""
    rng = np.random.default_rng(0)
    own = np.stack([10 ** rng.uniform(3, 4, 8), rng.uniform(-2, 2, 8), rng.uniform(0.6, 1.5, 8)], axis=1)
    a, m, w = own.T[..., None]
    return rng.poisson(a * np.exp(-0.5 * ((PLACES - m) / w) ** 2) + 300).astype(float), own


def joint_peaks(y, own):
    """SciPy's fit of all peaks at once, from the truth: the background, and the others (8, 3)."""

    def residual(p):
        a, m, w = p[1:].reshape(-1, 3).T[..., None]
        return (a * np.exp(-0.5 * ((PLACES - m) / w) ** 2) + p[0] - y).ravel()

    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    found = scipy.optimize.least_squares(residual, [300, *own.ravel()], x_scale="jac", **tight).x
    return found[0], found[1:].reshape(-1, 3)


@pytest.mark.parametrize(
    "loss, bounds",
    [
        pytest.param("poisson", dict(a=(0, np.inf)), marks=pytest.mark.slow),
        ("linear", {}),
        pytest.param("linear", dict(a=(0, np.inf)), marks=pytest.mark.slow),
        pytest.param("poisson", {}, marks=pytest.mark.slow),
    ],
)
def test_amplitudes_of_groups_are_found_from_ones(peaks, loss, bounds):
    y, own = peaks
    options = dict(local=("a", "m", "w"), group_axes=0, loss=loss, bounds=bounds or (-np.inf, np.inf))
    result = fit_groups(peak, PLACES, y, dict(a=1.0, m=np.round(own[:, 1]), w=1.0, c=1.0), **options)
    local = result.local.compute(progress=False)
    assert result.success and local.success.all()
    if loss == "linear":
        background, found = joint_peaks(y, own)
    else:
        best = fit_groups(peak, PLACES, y, dict(zip("amw", own.T, strict=True)) | dict(c=300.0), **options)
        background, found = best.popt[0], best.local.compute(progress=False).popt[:, :3]
    assert abs(result.popt[0] - background) < 0.01 * result.perr[0]
    assert np.all(abs(local.popt[:, :3] - found) < 0.01 * local.perr[:, :3])


def test_a_spectrum_of_a_group_says_which_parameters_are_shared(tmp_path):
    x = np.linspace(0, 1, 20)
    y = np.array([[1.0], [2.0], [3.0]]) + 2 * x + np.random.default_rng(0).normal(0, 0.1, (3, 20))
    result = fit_groups(lambda x, a, b, c: a * x + b + c, x, y, [1, 1, 0], local="b", group_axes=0, fixed={"c": 0.5})
    shown = result.local.spectrum(0).params
    assert [shown[name].remark for name in "abc"] == ["shared", "", "fixed"]
    assert shown["a"].error == pytest.approx(result.perr[0]) and "+-" in shown["a"].row()[2]
    result.save(tmp_path / "r")
    with pytest.raises(AttributeError, match="call fit_groups again"):
        dask_nlsq.load(tmp_path / "r").local.spectrum(0)
