"""What a fit says about itself, and covariances for heteroscedastic noise."""

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import OptimizeWarning

from dask_nlsq import curve_fit


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def decay_data(n, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 10, n)
    return x, 2 * np.exp(-0.5 * x) + 0.3 + noise * rng.normal(size=n)


def errors(pcov):
    return np.sqrt(np.diag(pcov))


def white(result, x):
    """White's covariance, from every point."""
    a, b, _ = result.popt
    J = np.stack([np.exp(-b * x), -a * x * np.exp(-b * x), np.ones(len(x))], axis=1)
    rows = J * np.asarray(result.residuals())[:, None]
    C = np.linalg.inv(J.T @ J)
    return C @ rows.T @ rows @ C


@pytest.mark.parametrize("n", [4000, 1_000_000])
def test_sandwich_and_jackknife_are_whites_covariance_where_points_are_independent(n):
    x, y = decay_data(n, noise=np.linspace(0.02, 0.3, n))
    result = curve_fit(decay, x, y, p0=[1, 1, 0])
    expected = errors(white(result, x))
    assert np.max(errors(result.pcov) / expected) > 1.3
    np.testing.assert_allclose(errors(result.sandwich), expected, rtol=0.15)
    np.testing.assert_allclose(errors(result.jackknife), expected, rtol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1000, 7777])
def test_they_are_nearly_the_same_however_the_data_are_chunked(chunks):
    n = 200_000
    x, y = decay_data(n)
    whole = curve_fit(decay, x, y, p0=[1, 1, 0])
    parts = curve_fit(decay, da.from_array(x, chunks=chunks), da.from_array(y, chunks=chunks), p0=[1, 1, 0])
    np.testing.assert_allclose(errors(parts.sandwich), errors(whole.sandwich), rtol=0.15)
    np.testing.assert_allclose(errors(parts.jackknife), errors(whole.jackknife), rtol=0.3)


@pytest.mark.slow
def test_the_jackknife_is_that_of_fits_that_leave_a_part_out():
    x, y = decay_data(400)
    exact = dict(ftol=1e-14, xtol=1e-14, gtol=1e-14)
    result = curve_fit(decay, x, y, p0=[1, 1, 0], **exact)
    ends = np.cumsum(result.parts.n).astype(int)
    begins = ends - result.parts.n.astype(int)
    place = np.arange(400)
    left_out = [(place >= begin) & (place < end) for begin, end in zip(begins, ends, strict=True)]
    fits = np.array([curve_fit(decay, x, y, p0=result.popt, mask=mask, **exact).popt for mask in left_out])
    expected = (len(fits) - 1) / len(fits) * np.sum((fits - fits.mean(axis=0)) ** 2, axis=0)
    np.testing.assert_allclose(errors(result.jackknife), np.sqrt(expected), rtol=0.03)


def test_at_a_bound_the_sandwich_is_as_wide_as_the_jackknife():
    x, y = decay_data(4000, noise=np.linspace(0.02, 0.3, 4000))
    result = curve_fit(decay, x, y, p0=[1, 1, 0.7], bounds={"c": (0.7, None)})
    np.testing.assert_allclose(errors(result.sandwich), errors(result.jackknife), rtol=0.2)


def test_few_points_have_errors_of_the_right_size():
    ratios = []
    for seed in range(40):
        x, y = decay_data(120, noise=0.1, seed=seed)
        result = curve_fit(decay, x, y, p0=[2, 0.5, 0.3])
        ratios.append([errors(each) / errors(result.pcov) for each in (result.sandwich, result.jackknife)])
    np.testing.assert_allclose(np.median(ratios, axis=0), 1, atol=0.15)


@pytest.mark.parametrize("loss", ["huber", "poisson"])
def test_losses_have_them_too(loss):
    x, y = decay_data(20_000, noise=0)
    y = np.random.default_rng(0).poisson(20 * y)
    result = curve_fit(decay, x, y, p0=[30, 1, 4], loss=loss, f_scale=5.0, bounds={"c": (0, None)})
    np.testing.assert_allclose(errors(result.sandwich), errors(result.jackknife), rtol=0.1)
    if loss == "poisson":
        np.testing.assert_allclose(errors(result.sandwich), errors(result.pcov), rtol=0.3)


def test_a_condition_that_takes_the_digits_of_the_gradient_leaves_them_unknown():
    x = np.linspace(0, 1, 2000)
    y = x + np.random.default_rng(0).normal(size=2000)
    result = curve_fit(lambda x, a, b, c: a + b * (x + 1000) + c * (x + 1000) ** 2, x, y, p0=[0, 0, 0], reduction="qr")
    assert result.condition > 1e6 and np.isfinite(result.perr).all()
    assert np.isnan(result.sandwich).all() and np.isnan(result.jackknife).all()


def test_nothing_is_read_for_them():
    reads = []

    def block(x):
        reads.append(len(x))
        return 2 * np.exp(-0.5 * x) + 0.3 + 0.05 * np.sin(1e4 * x)

    x = da.linspace(0, 10, 60_000, chunks=20_000)
    y = x.map_blocks(block, dtype=float, meta=np.zeros(0))
    result = curve_fit(decay, x, y, p0=[1, 1, 0], strategy="streaming")
    before = len(reads)
    assert result.sweeps * 3 <= before
    for each in ("sandwich", "jackknife", "diagnostics", "statistics", "correlation"):
        getattr(result, each)
    result.summary(), result.confidence_intervals(), result.to_dict(), result._repr_html_()
    assert len(reads) == before


def test_a_part_that_alone_determines_a_parameter_leaves_the_jackknife_unknown():
    x = np.concatenate([np.zeros(5000), [1.0]])
    y = np.random.default_rng(0).normal(size=5001)
    result = curve_fit(lambda x, a, b: a + b * x, x, y, p0=[0, 0])
    assert np.isnan(result.jackknife).all() and np.isfinite(result.sandwich).all()


@pytest.mark.slow
def test_what_the_data_do_not_determine_is_said_in_words():
    x, y = decay_data(3000)
    with pytest.warns(
        OptimizeWarning, match=r"do not determine one combination: \(a [-+\d.e]+, b [-+\d.e]+\) leaves.*`fixed`"
    ):
        result = curve_fit(lambda x, a, b, c, d: a * b * jnp.exp(-c * x) + d, x, y, p0=[1, 2, 1, 0])
    a, b, *_ = result.popt
    words = next(line for line in result.diagnostics.lines if "do not determine" in line)
    step_a, step_b = (float(part.split()[1]) for part in words[words.index("(") + 1 : words.index(")")].split(", "))
    np.testing.assert_allclose(step_a / step_b, -a / b, rtol=1e-2)
    assert result.diagnostics.singular_values[-1] < 1e-6
    with pytest.warns(OptimizeWarning, match="the model does not change with idle"):
        result = curve_fit(lambda x, a, idle: a * x + 0 * idle, x, y, p0=[1, 1])
    assert "the model does not change with idle" in str(result.diagnostics)


def test_a_combination_that_is_hardly_determined_is_named():
    x = np.linspace(0, 1, 2000)
    y = 3 * x + np.random.default_rng(0).normal(size=2000)
    result = curve_fit(lambda x, a, b: a * x + b * (x + 1e-8 * x**2), x, y, p0=[1, 1], reduction="qr")
    assert "the data hardly determine one combination: (a +1, b -1)" in str(result.diagnostics).replace(
        "a -1, b +1", "a +1, b -1"
    )


def test_parameters_at_a_bound_and_near_perfect_correlations_are_named():
    x, y = decay_data(2000)
    result = curve_fit(decay, x, y, p0=[1, 1, 0.1], bounds={"c": (None, 0.2)})
    assert result.diagnostics.at_bounds == ("c",) and "c is at its upper bound" in str(result.diagnostics)
    x = np.linspace(1000, 1001, 5000)
    result = curve_fit(lambda x, a, b: a * x + b, x, 2 * x + np.random.default_rng(0).normal(size=5000), p0=[1, 0])
    ((first, second, value),) = result.diagnostics.correlated
    assert {first, second} == {"a", "b"} and value < -0.999 and "a and b are correlated" in str(result.diagnostics)


@pytest.mark.parametrize("n", [40, 300, 1000, 100_000])
def test_a_fit_of_good_data_has_nothing_to_say(n):
    for seed in range(20):
        x, y = decay_data(n, seed=seed)
        result = curve_fit(decay, x, y, p0=[1, 1, 0], sigma=0.05, absolute_sigma=True)
        assert len(result.diagnostics.lines) == 1, result.diagnostics


def test_parts_of_the_data_that_do_not_fit_are_found():
    x, y = decay_data(100_000)
    y[60_000:62_000] += 0.05 * np.random.default_rng(1).normal(size=2000) * 4
    result = curve_fit(decay, x, y, p0=[1, 1, 0])
    (line,) = (line for line in result.diagnostics.lines if "chi-square is larger" in line)
    first, last = (
        int(word.replace(",", "")) for word in line[line.index("(points ") + 8 :].split(" of those")[0].split(" to ")
    )
    assert 59_000 < first < last < 63_000
    worst = int(np.argmax(result.diagnostics.blocks.chi_square))
    assert 0.59 < worst / len(result.diagnostics.blocks.n) < 0.63


def test_what_the_model_misses_along_the_data_is_found_by_runs_and_drift():
    x, y = decay_data(100_000)
    missed = curve_fit(decay, x, y + 0.01 * np.sin(3 * x), p0=[1, 1, 0])
    assert "residuals of the same sign" in str(missed.diagnostics)
    count, expected, deviation = missed.diagnostics.runs
    assert count < expected - 4 * deviation
    order = np.random.default_rng(0).permutation(len(x))
    drift = curve_fit(decay, x[order], (y[order] + np.linspace(-0.02, 0.02, len(x))), p0=[1, 1, 0])
    (line,) = (line for line in drift.diagnostics.lines if "drift" in line)
    assert "from +" in line  # residuals are model less data


def test_sigma_that_is_wrong_and_an_optimum_that_is_not_reached_are_said():
    x, y = decay_data(10_000)
    assert "sigma is too small" in str(curve_fit(decay, x, y, [1, 1, 0], sigma=0.03, absolute_sigma=True).diagnostics)
    assert "sigma is too large" in str(curve_fit(decay, x, y, [1, 1, 0], sigma=0.1, absolute_sigma=True).diagnostics)

    def stop(record):
        if record.nfev == 4:
            raise StopIteration

    early = curve_fit(decay, x, y, [1, 1, 0], callback=stop)
    assert early.diagnostics.distance > 0.1 and "standard errors away" in str(early.diagnostics)
    assert curve_fit(decay, x, y, [1, 1, 0]).diagnostics.distance < 0.01


def test_noise_that_is_not_alike_everywhere_is_said():
    n = 50_000
    x, y = decay_data(n, noise=np.where(np.arange(n) % 10 == 0, 1.0, 0.0) + 0.01)
    assert "result.sandwich" not in str(curve_fit(decay, x, y, p0=[1, 1, 0]).diagnostics)  # alike on average
    x, y = decay_data(n, noise=np.linspace(0.001, 0.3, n) ** 2)
    result = curve_fit(decay, x, y, p0=[1, 1, 0])
    rise = np.max(errors(result.sandwich) / errors(result.pcov))
    assert rise > 1.5 and f"up to {rise:.2g} times as large" in str(result.diagnostics)


def test_data_without_noise_have_nothing_to_say():
    x = np.linspace(0, 10, 400)
    assert len(curve_fit(decay, x, 2 * np.exp(-0.5 * x) + 0.3, p0=[1, 1, 0]).diagnostics.lines) == 1
    assert len(curve_fit(lambda x, a, b: a * x + b, x, 0 * x, p0=[1, 1]).diagnostics.lines) == 1


def few_points(n, missed=0.05, seed=0):
    """A decay that has a slow wave on it, of ``missed`` times the height."""
    x, y = decay_data(n, noise=0.02, seed=seed)
    return x, y + missed * np.sin(2 * x)


@pytest.mark.parametrize(
    "kind, n", [("array", 80), ("array", 213), ("array", 400), ("chunks", 213), ("chunks", 400), ("streaming", 213),
                ("whole", 400), ("covariance", 400)],
)  # fmt: skip
def test_residuals_of_few_points_that_come_in_runs_are_found(n, kind):
    x, y = few_points(n)
    options = dict(p0=[1, 1, 0], reduction="qr")
    if kind in ("chunks", "streaming"):
        x, y = da.from_array(x, chunks=50), da.from_array(y, chunks=50)
        options["strategy"] = "streaming" if kind == "streaming" else "auto"
    elif kind == "whole":
        result = curve_fit(lambda x, a, b, c: a * jnp.exp(-b * jnp.asarray(few_points(n)[0])) + c, x, y, **options)
    elif kind == "covariance":
        options["sigma"] = 4e-4 * np.eye(n)
    if kind != "whole":
        result = curve_fit(decay, x, y, **options)
    count, expected, deviation = result.diagnostics.runs
    r = np.asarray(result.residuals()).ravel()
    if n < 256 or kind in ("whole", "covariance"):  # of single points
        assert count == 1 + np.count_nonzero(np.diff(r > 0)) and "neighbouring points" in str(result.diagnostics)
    assert count < expected - 4 * deviation and "residuals of the same sign" in str(result.diagnostics)


def test_points_that_are_masked_interrupt_no_run():
    x, y = few_points(120)
    mask = np.zeros(120, bool)
    mask[::3] = True
    result, without = curve_fit(decay, x, y, p0=[1, 1, 0], mask=mask), curve_fit(decay, x[~mask], y[~mask], p0=[1, 1, 0])
    assert result.diagnostics.runs == without.diagnostics.runs and result.diagnostics.runs[0] < 40


def test_correlated_parameters_are_not_called_separated():
    x = np.linspace(7, 8, 400)
    result = curve_fit(lambda x, a, b: a * x + b, x, 2 * x + np.random.default_rng(0).normal(size=400), p0=[1, 0])
    lines = result.diagnostics.lines
    assert result.condition < 100 and "correlated to -0.99" in lines[1]
    assert lines[0].startswith("parameters are poorly separated: condition")


def counts(n, height, seed=0):
    """Counts of a decay, the means and x."""
    x = np.linspace(0, 10, n)
    mean = height * (2 * np.exp(-0.5 * x) + 0.3)
    return x, np.random.default_rng(seed).poisson(mean), mean


@pytest.mark.parametrize("way", ["loss", "sigma"])
@pytest.mark.parametrize("height, n", [(0.02, 200), (0.3, 5000), (1.0, 200), (4.0, 5000), (1000.0, 200)])
def test_counts_that_the_model_explains_have_nothing_to_say_however_few(way, height, n):
    for seed in range(5):
        x, y, _ = counts(n, height, seed)
        if not y.any():  # nothing to fit
            continue
        result = curve_fit(
            decay, x, y, p0=[2 * height, 0.5, 0.3 * height], bounds=([0, 0.05, 1e-3 * height], np.inf), **{way: "poisson"}
        )
        words = ("reduced", "same sign", "drift", "chi-square is larger")
        assert not any(word in line for line in result.diagnostics.lines[1:] for word in words), result.diagnostics


@pytest.mark.parametrize("n", [60, 200, 5000])
def test_counts_that_the_model_does_not_explain_are_said(n):
    x, _, mean = counts(n, 100)
    y = np.random.default_rng(1).poisson(mean * (1 + 0.8 * np.sin(9 * x)))
    start = dict(p0=[200, 0.5, 30], bounds=(0, np.inf))
    found = curve_fit(decay, x, y, loss="poisson", **start)
    (line,) = (line for line in found.diagnostics.lines if "reduced deviance" in line)
    assert (
        f"reduced deviance {found.reduced_chi_square:.4g} is " in line
        and "above what noise" in line
        and "the model misses something" in line
    )
    found = curve_fit(decay, x, y, sigma="poisson", **start)
    (line,) = (line for line in found.diagnostics.lines if "reduced chi-square" in line)
    assert f"reduced chi-square {found.reduced_chi_square:.4g} is " in line and "the model misses something" in line
