"""Fits of the same points compared."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from dask_nlsq import compare, curve_fit, fit_groups, load, models

X = np.linspace(0, 5, 200)
Y = 2 * np.exp(-0.7 * X) + 0.3 + 0.02 * X + 0.02 * np.random.default_rng(0).normal(size=200)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def sloped(x, a, b, c, slope):
    return decay(x, a, b, c) + slope * x


@pytest.fixture(scope="module")
def two():
    return curve_fit(decay, X, Y, [1, 1, 0]), curve_fit(sloped, X, Y, [1, 1, 0, 0])


def test_the_criteria_are_those_of_the_results_and_f_is_the_ratio_of_variances(two):
    small, large = two
    found = compare(*two)
    first, second = found.rows
    assert (first.name, second.name, first.n_params, second.n_params) == ("decay", "sloped", 3, 4)
    assert (first.aic, first.aicc, second.bic) == (small.aic, small.aicc, large.bic)
    f = (small.chi_square - large.chi_square) / (large.chi_square / 196)
    assert second.within == "decay" and second.statistic == pytest.approx(f)
    assert second.p == pytest.approx(scipy.stats.f.sf(f, 1, 196)) and second.p < 1e-2
    assert first.within == "" and np.isnan(first.p)
    assert found.best() == found.best("aic") == "sloped"
    with pytest.raises(ValueError, match="`criterion` must be one of aic, aicc, bic, not 'f'"):
        found.best("f")


@pytest.mark.slow
def test_where_the_smaller_model_holds_p_is_uniform():
    rng = np.random.default_rng(1)
    p = []
    for _ in range(40):
        y = 2 * X + 1 + rng.normal(size=200)
        p.append(compare(curve_fit(models.line, X, y), curve_fit(models.polynomial(2), X, y), nested=True).rows[1].p)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_a_comparison_prints_as_a_table_and_as_html(two):
    found = compare(two[0], with_slope=two[1])
    head, first, second = f"{found!r}".splitlines()
    assert head.split() == ["parameters", "chi-square", "reduced", "chi-square", "AIC", "AICc", "BIC", "F", "p"]
    assert first.startswith("decay") and second.startswith("with_slope") and second.endswith("against decay")
    assert "+0.0" in second and f"+{two[0].bic - two[1].bic:.1f}" in first
    assert found._repr_html_().count("<tr>") == 3 and "<th>BIC</th>" in found._repr_html_()


@pytest.mark.slow
def test_fixed_and_tied_parameters_make_a_model_that_is_nested(two):
    held = curve_fit(sloped, X, Y, [1, 1, 0, 0], fixed={"slope": 0})
    tied = curve_fit(sloped, X, Y, [1, 1, 0, 0], expr={"slope": "c / 10"})
    found = compare(held, tied, two[1], decay=two[0])
    assert [row.name for row in found.rows] == ["sloped 1", "sloped 2", "sloped 3", "decay"]
    assert [row.n_params for row in found.rows] == [3, 3, 4, 3]
    assert found.rows[0].aic == pytest.approx(two[0].aic) and found.rows[2].within == "sloped 1"


def test_ready_models_are_nested_by_their_terms():
    y = 3 * np.exp(-(((X - 2) / 0.5) ** 2) / 2) + 0.1 * X + 0.02 * np.random.default_rng(0).normal(size=200)
    peak = curve_fit(models.gaussian, X, y, [3, 2, 0.5])
    with_line = curve_fit(models.gaussian + models.line, X, y, [3, 2, 0.5, 0, 0])
    assert compare(with_line, peak).rows[0].within == "gaussian"
    assert compare(curve_fit(models.lorentzian, X, y, [3, 2, 0.5]), with_line).rows[1].within == ""


def test_counts_have_the_test_of_the_deviance():
    y = np.random.default_rng(0).poisson(100 * np.exp(-X) + 20)
    how = dict(loss="poisson")
    small = curve_fit(decay, X, y, [90, 1, 15], fixed={"b": 1.0}, **how)
    large = curve_fit(decay, X, y, [90, 1, 15], **how)
    row = compare(small, large).rows[1]
    assert row.statistic == small.chi_square - large.chi_square
    assert row.p == pytest.approx(scipy.stats.chi2.sf(row.statistic, 1)) and "deviance" in f"{compare(small, large)!r}"


@pytest.mark.slow
def test_only_fits_of_the_same_points_with_the_same_noise_are_compared(two):
    with pytest.raises(ValueError, match="decay and sloped are fits of different points: 200 and 100 of them"):
        compare(two[0], curve_fit(sloped, X[::2], Y[::2], [1, 1, 0, 0]))
    with pytest.raises(ValueError, match="fits of different points, or with another sigma: sums over all of their data"):
        compare(two[0], curve_fit(sloped, X, Y + 1, [1, 1, 0, 0]))
    with pytest.raises(ValueError, match="differ in loss or sigma"):
        compare(two[0], curve_fit(sloped, X, Y, [1, 1, 0, 0], sigma=0.02))
    robust = curve_fit(decay, X, Y, [1, 1, 0], loss="huber"), curve_fit(sloped, X, Y, [1, 1, 0, 0], loss="huber")
    with pytest.raises(ValueError, match="decay has no AIC: least squares"):
        compare(*robust)
    for wrong in ((), (two[0],), (two[0], 3)):
        with pytest.raises(TypeError, match="compare needs two results or more"):
            compare(*wrong)
    with pytest.raises(ValueError, match="two fits have the name 'decay'"):
        compare(two[0], decay=two[1])


def test_saved_results_and_other_chunks_of_the_same_points_are_compared(two, tmp_path):
    two[0].save(tmp_path / "kept")
    streamed = curve_fit(sloped, X, Y, [1, 1, 0, 0], strategy="streaming")
    assert compare(load(tmp_path / "kept"), streamed).rows[1].p == pytest.approx(compare(*two).rows[1].p)


@pytest.mark.slow
def test_grouped_fits_are_compared_with_one_fit_of_all():
    y = np.array([1.0, 2.0])[:, None] * np.exp(-X) + 0.01 * np.random.default_rng(0).normal(size=(2, 200))

    def scaled(x, a, b):
        return a * jnp.exp(-b * x)

    grouped = fit_groups(scaled, X, y, [1, 1], local="a", group_axes=0)
    assert compare(together=curve_fit(scaled, X, y, [1, 1]), apart=grouped).best() == "apart"


@pytest.mark.slow
def test_a_model_that_holds_what_the_other_does_not_is_no_larger_one():
    one, other = (curve_fit(sloped, X, Y, [1, 1, 0, 0], fixed={"c": value}) for value in (0.2, 0.3))
    assert [row.within for row in compare(one, other).rows] == ["", ""]
    free, held = curve_fit(sloped, X, Y, [1, 1, 0, 0]), curve_fit(sloped, X, Y, [1, 1, 0, 0], fixed={"c": 0.3})
    assert [row.within for row in compare(free=free, held=held).rows] == ["held", ""]


@pytest.mark.slow
def test_bounds_of_amplitudes_do_not_hide_that_a_model_is_a_special_case():
    x = np.linspace(0, 10, 300)
    y = 3 * np.exp(-0.5 * (x - 4) ** 2) + 0.2 * x + np.random.default_rng(0).normal(0, 0.1, 300)
    one = curve_fit(models.gaussian + models.line, x, y)
    two = curve_fit((models.gaussian + models.gaussian).positive + models.line, x, y, p0=[3, 4, 1, 0.5, 7, 1, 0.2, 0])
    assert compare(one=one, two=two).rows[1].within == "one"


def test_fits_with_other_noise_are_refused_with_the_difference_in_words(two):
    with pytest.raises(ValueError, match=r"decay has loss='linear', no sigma, sloped has loss='linear', sigma=0.02\."):
        compare(two[0], curve_fit(sloped, X, Y, [1, 1, 0, 0], sigma=0.02))
