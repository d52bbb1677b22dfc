"""Intervals and regions by the profile likelihood."""

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from dask_nlsq import curve_fit, fit_groups, plots
from dask_nlsq.base.text import measured

X = np.linspace(0, 5, 30)
Y = 2 * np.exp(-0.7 * X) + 0.3 + 0.15 * np.random.default_rng(0).normal(size=30)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def numpy_decay(x, a, b, c):
    return a * np.exp(-b * x) + c


def line(x, slope, offset):
    return slope * x + offset


@pytest.fixture(scope="module")
def fitted():
    return curve_fit(decay, X, Y, [1, 1, 0])


def end_by_hand(k, side, criterion, cost, popt, error):
    """Where ``criterion(cost(v))`` is 0, ``cost`` of the best fit with parameter k at v."""

    def at(v):
        others = np.delete(popt, k)
        best = scipy.optimize.minimize(lambda p: cost(np.insert(p, k, v)), others, method="Nelder-Mead", tol=1e-12)
        return criterion(best.fun)

    return scipy.optimize.brentq(at, popt[k], popt[k] + side * 6 * error, xtol=1e-6 * error)


def test_the_ends_are_where_the_f_test_refuses_the_fit_with_the_parameter_held(fitted):
    def cost(p):
        return 0.5 * np.sum((numpy_decay(X, *p) - Y) ** 2)

    f = scipy.stats.f.ppf(0.95, 1, 27)
    for k, found in enumerate(fitted.profile().values()):
        for side, end in zip((-1, 1), found.intervals[0], strict=True):
            about = cost, fitted.popt, fitted.perr[k]
            mine = end_by_hand(k, side, lambda c: (c - fitted.cost) / (fitted.cost / 27) - f, *about)
            assert end == pytest.approx(mine, abs=2e-3 * fitted.perr[k])
        assert found.success and found.name == "abc"[k] and (found.value, found.error) == (fitted.popt[k], fitted.perr[k])


@pytest.mark.slow
def test_counts_have_the_ends_of_the_likelihood_ratio():
    y = np.random.default_rng(1).poisson(numpy_decay(X, 9, 0.9, 1.5))
    fitted = curve_fit(decay, X, y, [5, 1, 1], bounds=(0, 30), loss="poisson")

    def cost(p):
        mean = numpy_decay(X, *p)
        return np.sum(mean - y + scipy.special.xlogy(y, y / mean)) if np.all(p >= 0) else 1e9  # the bounds

    chi2 = scipy.stats.chi2.ppf(0.9, 1)
    found = fitted.profile("b", 0.9)
    for side, end in zip((-1, 1), found.intervals[0], strict=True):
        mine = end_by_hand(1, side, lambda c: 2 * (c - fitted.cost) - chi2, cost, fitted.popt, fitted.perr[1])
        assert end == pytest.approx(mine, abs=2e-3 * fitted.perr[1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(sigma=0.2, absolute_sigma=True), dict(reduction="qr")], ids=str)
def test_of_a_linear_model_they_are_those_of_the_standard_errors_and_the_ellipse(options):
    fitted = curve_fit(line, X, Y, **options)
    for level in (0.5, 0.99):
        found = fitted.profile(level=level)
        ends = np.array([found[name].intervals[0] for name in ("slope", "offset")])
        np.testing.assert_allclose(ends, fitted.confidence_intervals(level), rtol=1e-7)
    found = fitted.contour("offset", "slope", rays=7)
    np.testing.assert_allclose(found.points, found.ellipses, rtol=1e-7)
    distance = [(p - found.value) @ np.linalg.inv(fitted.pcov[::-1, ::-1]) @ (p - found.value) for p in found.points[1]]
    known = options.get("absolute_sigma", False)
    size = scipy.stats.chi2.ppf(0.95, 2) if known else 2 * scipy.stats.f.ppf(0.95, 2, 28)
    np.testing.assert_allclose(distance, size, rtol=1e-6)


def test_a_region_is_where_both_held_raise_the_cost_by_as_much(fitted):
    found = fitted.contour("b", "c", 0.9, rays=5)
    size = 2 * scipy.stats.f.ppf(0.9, 2, 27) * fitted.reduced_chi_square
    for b, c in found.points[0]:
        basis = np.exp(-b * X)
        r = (basis @ (Y - c) / (basis @ basis)) * basis + c - Y
        assert r @ r - fitted.chi_square == pytest.approx(size, rel=4e-3)
    assert not np.allclose(found.points, found.ellipses, rtol=1e-3)


def test_all_trial_fits_share_the_reads_of_data_that_are_streamed(fitted):
    counts = []

    def counted(block):
        counts.append(len(block))
        return block

    y = da.from_array(Y, chunks=10).map_blocks(counted, dtype=float, meta=np.empty(0))
    streamed = curve_fit(decay, X, y, [1, 1, 0], strategy="streaming")
    counts.clear()
    every = streamed.profile(level=[0.68, 0.95, 0.997])
    reads = every["a"].reads
    assert len(counts) == 3 * reads and reads < 20
    one = streamed.profile("c", [0.68, 0.95, 0.997])
    np.testing.assert_allclose(one.intervals, every["c"].intervals, rtol=1e-12)
    np.testing.assert_allclose(one.intervals, fitted.profile("c", [0.68, 0.95, 0.997]).intervals, rtol=1e-6)


@pytest.mark.slow
def test_an_end_at_a_bound_is_the_bound_and_where_the_data_never_object_it_is_infinite():
    x = np.linspace(1, 2, 20)
    y = np.random.default_rng(0).normal(0.1, 0.1, 20)

    def saturating(x, b):
        return 1 / (1 + b * x)

    fitted = curve_fit(saturating, x, y, [5], bounds=(4, np.inf), sigma=0.5, absolute_sigma=True)
    found = fitted.profile("b")
    assert found.intervals[0].tolist() == [4.0, np.inf]
    both = curve_fit(lambda x, b, c: c / (1 + b * x), x, y, [5, 1], bounds=(0, np.inf), sigma=0.5, absolute_sigma=True)
    assert np.isnan(both.contour("b", "c", rays=8).points).any()


@pytest.mark.slow
def test_a_region_goes_along_a_bound():
    fitted = curve_fit(line, X, 1e-3 * X + 0.2, bounds=([0, -np.inf], np.inf), sigma=1, absolute_sigma=True)
    slope, offset = fitted.contour("slope", "offset", 0.9).points[0].T
    bound = slope == 0
    assert slope.min() == 0 and 10 < bound.sum() < 38
    C, size = fitted.pcov, scipy.stats.chi2.ppf(0.9, 2)
    cut = np.linspace(-3, 3, 6001)
    inside = [p @ np.linalg.inv(C) @ p < size for p in np.column_stack([np.full(6001, -fitted.popt[0]), cut])]
    ends = fitted.popt[1] + cut[inside][[0, -1]]
    assert [offset[bound].min(), offset[bound].max()] == pytest.approx(ends, abs=2e-3)


@pytest.mark.slow
def test_parameters_held_stay_and_those_tied_follow():
    fitted = curve_fit(decay, X, Y, [1, 1, 0], fixed={"c": 0.3})
    free = curve_fit(lambda x, a, b: decay(x, a, b, 0.3), X, Y, [1, 1])
    np.testing.assert_allclose(fitted.profile("b").intervals, free.profile("b").intervals, rtol=1e-6)
    tied = curve_fit(decay, X, Y, [1, 1, 0], expr={"c": "a / 7"})
    assert [*tied.profile()] == ["a", "b"]
    with pytest.raises(ValueError, match="`name` names 'c', the fitted parameters are a, b"):
        tied.profile("c")


@pytest.mark.slow
def test_a_lower_cost_on_the_way_is_a_warning_that_says_where():
    x = np.linspace(0, 10, 100)
    y = np.sin(1.3 * x) + 0.3 * np.random.default_rng(0).normal(size=100)
    away = curve_fit(lambda x, w, a: a * jnp.sin(w * x), x, y, [2.2, 0.1])
    with pytest.warns(scipy.optimize.OptimizeWarning, match=r"not at the best optimum.*p0=dict\(w="):
        away.profile("w", 0.999)


@pytest.mark.slow
def test_an_end_where_the_model_ends_or_rounding_hides_it_is_enclosed():
    x = np.linspace(0, 5, 60)
    y = np.sqrt(5.02 - x) + np.random.default_rng(3).normal(0, 0.3, 60)
    found = curve_fit(lambda x, a, b: a * jnp.sqrt(b - x), x, y, [1, 6]).profile()
    assert found["a"].success and 1.03 < found["a"].intervals[0, 1] < 1.06
    assert not found["b"].success and found["b"].intervals[0, 0] == pytest.approx(5, abs=1e-3)  # nan below
    x = np.linspace(0, 5, 10_000)
    y = numpy_decay(x, 2, 0.7, 0.3) + 1e-12 * np.random.default_rng(0).normal(size=10_000)
    fitted = curve_fit(decay, x, y, [1, 1, 0])
    for each in fitted.profile().values():
        ends = each.value + each.error * np.array([-1.96, 1.96])
        np.testing.assert_allclose(each.intervals[0], ends, atol=0.1 * each.error)
        assert each.reads < 60


def test_a_known_noise_needs_no_degrees_of_freedom():
    fitted = curve_fit(line, np.array([0.0, 1]), np.array([1.0, 2]), sigma=1, absolute_sigma=True)
    assert fitted.profile("slope").intervals[0] == pytest.approx(fitted.confidence_intervals()[0])


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(loss="soft_l1"), "is not a likelihood"),
        (dict(sigma="poisson", y=np.round(100 * np.abs(Y))), 'sigma="poisson" is not a likelihood'),
        (dict(y=numpy_decay(X, 1, 1, 0.5)), "the noise, which is 0 here"),
    ],
    ids=["robust", "reweighted", "exact"],
)
def test_what_has_no_profile_says_why(how, message):
    y = how.pop("y", np.abs(Y))
    fitted = curve_fit(decay, X, y, [1, 1, 0.5], **how)
    with pytest.raises(ValueError, match=message):
        fitted.profile()


@pytest.mark.slow
def test_wrong_arguments_are_named(fitted, tmp_path):
    from dask_nlsq import load

    for call, message in (
        (lambda: fitted.profile("d"), "`name` names 'd'"),
        (lambda: fitted.contour("a", "a"), "`other` must be another parameter"),
        (lambda: fitted.contour("a", "b", rays=2), "`rays` must be an integer of at least 3, not 2"),
        (lambda: fitted.profile("a", 95), "`level` must be a probability"),
        (lambda: fitted.profile([]), "`name` must be a parameter, or several, not an empty sequence"),
        (lambda: fitted.profile("a", []), "`level` must be a probability, or several, not an empty sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    fitted.save(tmp_path / "fit")
    t, rows = X, np.outer([1.0, 2.0, 3.0], Y)
    groups = fit_groups(lambda x, a, b: a * jnp.exp(-b * x), t, rows, [1, 1], local="a", group_axes=0)
    with pytest.raises(ValueError, match="trial fits need the data"):
        load(tmp_path / "fit").profile()
    with pytest.raises(ValueError, match=r"^fits of groups have no profiles$"):
        groups.profile()


@pytest.mark.slow
def test_a_profile_of_a_tied_parameter_says_that_it_is_tied():
    result = curve_fit(lambda x, a, b, c: a * x + b + c, X, Y, [1, 1, 1], expr={"c": "b"})
    with pytest.raises(ValueError, match=r"'c', which is tied \(c = b\)"):
        result.profile("c")


def test_profiles_print_as_tables_and_are_drawn(fitted):
    found = fitted.profile(["a", "c"], [0.68, 0.95])
    head, first, *_ = f"{found!r}".splitlines()[1:]
    assert head.split() == ["parameter", "value", "level", "from", "to", "s.e.", "s.e."]
    assert first.split()[:3] == ["a", measured(fitted.popt[0], fitted.perr[0])[0], "68.00%"]
    assert found._repr_html_().count("<tr>") == 5 and found["c"]._repr_html_().count("<tr>") == 3
    axes = found["c"].plot()
    assert axes.get_xlabel() == "c"
    assert [axes.get_xlabel() for axes in found.plot()] == ["a", "c"]
    region = fitted.contour("b", "c", [0.5, 0.9])
    assert "90.00%: b from" in repr(region)
    assert plots.contours(region).get_ylabel() == "c"
