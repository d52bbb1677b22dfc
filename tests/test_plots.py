"""What pictures show, by the numbers that are drawn, and what it costs to draw them."""

import pickle
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from itertools import pairwise

import dask
import dask.array as da
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy
from distributed import get_task_stream

from dask_nlsq import curve_fit, fit_map, models, plots
from dask_nlsq.results.binning import FEW, binned, quantile_residuals
from dask_nlsq.results.bins import FINEST, exponent, in_bins, merged

from .spectra import P0, X, counted, fitted, peak, spectra
from .spectra import N as N_SPECTRUM

matplotlib.use("agg")

START = [1.0, 1.0, 0.0]
N = 30_000


def decay(t, amplitude, rate, offset):
    return amplitude * jnp.exp(-rate * t) + offset


def data(n=N, seed=3, low=0.0, high=10.0):
    rng = np.random.default_rng(seed)
    t = rng.uniform(low, high, n)
    return t, 2 * np.exp(-0.5 * t) + 0.3 + rng.normal(0, 0.05, n)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def large():
    return curve_fit(decay, *data(), p0=START)


def drawn(container):
    """x and y of an errorbar, and the half lengths of its bars."""
    points, _, bars = container
    halves = [(stop - start)[1] / 2 for start, stop in bars[0].get_segments()] if bars else None
    return *points.get_data(), halves


def by_bin(found, t, *rows):
    """For each bin of ``found`` the rows of its points; bins hold consecutive values of t."""
    order = np.argsort(t)
    parts = [np.split(row[order], np.cumsum(found.n)[:-1]) for row in (t, *rows)]
    return list(zip(*parts, strict=True))


def test_bins_hold_what_numpy_finds_in_them(large):
    t, y = data()
    seen = binned(large, bins=50)
    residual = np.asarray(large.residuals())
    parts = by_bin(seen, t, y, residual)
    assert seen.n.sum() == N and 25 < len(seen.x) <= 50
    widths = [part[0].max() for part in parts[:-1]], [part[0].min() for part in parts[1:]]
    assert np.ptp(np.mean(widths, axis=0)[1:] - np.mean(widths, axis=0)[:-1]) < 0.02  # of equal width
    np.testing.assert_allclose(seen.x, [part[0].mean() for part in parts], rtol=1e-12)
    np.testing.assert_allclose(seen.y, [part[1].mean() for part in parts], rtol=1e-12)
    np.testing.assert_allclose(seen.model - seen.y, [part[2].mean() for part in parts], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.error, [part[2].std(ddof=1) / len(part[2]) ** 0.5 for part in parts], rtol=1e-9)
    np.testing.assert_allclose(seen.residual, [part[2].mean() for part in parts], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.spread, [part[2].std(ddof=1) for part in parts], rtol=1e-9)


def test_bins_weigh_points_by_sigma():
    t, y = data()
    sigma = np.where(np.arange(N) % 3, 0.05, 0.2)
    found = curve_fit(decay, t, y, p0=START, sigma=sigma)
    seen = binned(found, bins=20)
    for part, x, mean, error in zip(by_bin(seen, t, y, sigma), seen.x, seen.y, seen.error, strict=True):
        assert x == pytest.approx(np.average(part[0], weights=part[2] ** -2.0))
        assert mean == pytest.approx(np.average(part[1], weights=part[2] ** -2.0))
        scatter = (2 / 3 + 1 / 3 / 16) ** 0.5  # of residuals: a third of the noise is four times smaller than its sigma
        assert error == pytest.approx(np.sum(part[2] ** -2.0) ** -0.5 * scatter, rel=0.15)
    assert seen.weighted and seen.scale == 1


@pytest.mark.parametrize("chunks", [N, 7001, 501])
def test_bins_do_not_depend_on_chunks(large, chunks):
    t, y = data()
    order = np.argsort(t)  # so that chunks cover different parts of the axis
    found = curve_fit(decay, da.from_array(t[order], chunks), da.from_array(y[order], chunks), p0=START)
    one, other = binned(large), binned(found)
    np.testing.assert_array_equal(one.n, other.n)
    for field in ("x", "y", "error", "model", "residual", "spread"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), rtol=1e-7, atol=1e-7)
    assert abs(one.histogram - other.histogram).sum() <= 4  # within rounding of an edge


@pytest.mark.parametrize("n_coordinates", [1, 2])
def test_merged_bins_are_those_of_all_points_at_once(n_coordinates):
    rng, finest = np.random.default_rng(0), FINEST[n_coordinates]
    for scale, offset in ((1.0, 0.0), (1e-30, 0.0), (1e-3, 1e9), (1e200, -1e200)):
        x = offset + scale * rng.standard_normal((n_coordinates, 5000))
        x[:, :10] = offset  # a block of one value
        whole = in_bins(x, (None, x[0]))
        cuts = [0, 10, 11, 700, 5000]
        parts = [in_bins(x[:, lo:hi], (None, x[0, lo:hi])) for lo, hi in pairwise(cuts)]
        found = merged([merged(parts[:2]), None, merged(parts[2:])])
        assert (found.k, found.first) == (whole.k, whole.first)
        np.testing.assert_array_equal(found.sums[0], whole.sums[0])
        assert all(finest / 4 < m <= finest for m in whole.sums.shape[1:]) or offset == 1e9  # float64 has few values there
        if n_coordinates == 2:
            counts = np.histogram2d(*x, bins=whole.edges)[0]
            assert abs(counts - whole.sums[0]).sum() <= 2  # the largest value lies on the last edge of NumPy's
    assert in_bins([np.zeros(3)], (None,)).sums.shape == (1, 1)
    assert exponent(0.0, 1.0, finest) == {1: -10, 2: -7}[n_coordinates]  # [0, 1] takes half and one, and one too many finer


def test_what_does_not_count_is_not_drawn():
    t, y = data()
    y[5:50] = np.nan
    y[7000:7100] = 1e9
    mask = np.zeros(N, bool)
    mask[7000:7100] = True
    found = curve_fit(decay, da.from_array(t, 4000), da.from_array(y, 4000), p0=START, mask=mask, nan_policy="omit")
    seen = binned(found)
    assert seen.n.sum() == seen.histogram.sum() + seen.beyond == N - 145
    assert seen.y.max() < 3
    few = curve_fit(decay, t[:60], y[:60], p0=START, nan_policy="omit")
    assert binned(few).points.shape == (5, 15)
    assert len(drawn(plots.fit(few).containers[0])[0]) == 15


def test_few_points_are_drawn_each_with_the_model_between_them():
    t, y = data(200)
    found = curve_fit(decay, t, y, p0=START, sigma=np.full(200, 0.05))
    ax = plots.fit(found)
    x, height, bars = drawn(ax.containers[0])
    order = np.argsort(t)
    np.testing.assert_array_equal(x, t[order])
    np.testing.assert_array_equal(height, y[order])
    np.testing.assert_allclose(bars, 0.05)
    curve = next(line for line in ax.lines if line.get_label() == "model")
    np.testing.assert_allclose(curve.get_ydata(), found.predict(curve.get_xdata()))
    assert len(curve.get_xdata()) == 500 and ax.get_xlabel() == "t"
    unweighted = curve_fit(decay, t, y, p0=START)
    assert drawn(plots.fit(unweighted).containers[0])[2] is None
    given = plots.fit(found, x=[1.0, 2.0])
    np.testing.assert_allclose(given.lines[-1].get_ydata(), found.predict(np.array([1.0, 2.0])))


def test_many_points_are_drawn_as_means(large):
    seen = binned(large)
    top, below = plots.fit(large, residuals=True)
    x, y, bars = drawn(top.containers[0])
    np.testing.assert_array_equal(x, seen.x)
    np.testing.assert_array_equal(y, seen.y)
    np.testing.assert_allclose(bars, seen.error, rtol=1e-6)
    np.testing.assert_array_equal(top.lines[-1].get_ydata(), seen.model)
    np.testing.assert_array_equal(drawn(below.containers[0])[1], seen.residual)
    assert (below.get_xlabel(), below.get_ylabel()) == ("t", seen.measure)
    assert top.get_ylabel() == "mean of y"


def test_pictures_come_where_they_are_wanted(large):
    figure, axes = plt.subplots(2, 3)
    assert plots.fit(large, axes[0, 0]) is large.plot(axes[0, 0]) is axes[0, 0]
    assert plots.residuals(large, axes[0, 1]) is axes[0, 1]
    assert plots.residual_histogram(large, ax=axes[0, 2]) is axes[0, 2]
    assert plots.convergence(large, axes[1, 0]) is axes[1, 0]
    assert plots.correlation(large, axes[1, 1]) is axes[1, 1]
    top, below = plots.fit(large, axes[:, 2], residuals=True)
    assert top is axes[0, 2] and below is axes[1, 2]
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(TypeError, match="`ax` must be matplotlib axes, not 'x'"):
        large.plot("x")
    with pytest.raises(ValueError, match="needs 2 axes, not 1"):
        plots.fit(large, axes[0, 0], residuals=True)
    assert plots.fit(large).figure is not figure


def test_a_logarithmic_axis_has_logarithmic_bins(large):
    t, _ = data()
    seen = binned(large, log=True)
    parts = by_bin(seen, t)
    np.testing.assert_allclose(np.log10(seen.x), [np.log10(part[0]).mean() for part in parts])
    assert plots.fit(large, log=True).get_xscale() == "log"
    few = curve_fit(decay, *data(100), p0=START)
    np.testing.assert_allclose(np.ptp(np.diff(np.log(plots.fit(few, log=True).lines[-1].get_xdata()))), 0, atol=1e-9)
    negative = curve_fit(decay, *data(3000, low=-1.0, high=1.0), p0=START)
    assert binned(negative, log=True).n.sum() == np.sum(data(3000, low=-1.0, high=1.0)[0] > 0)


def surface(x, height, slope):
    i, q = x
    return height * jnp.exp(-(q**2)) + slope * i


def test_any_coordinate_of_several_can_be_drawn():
    i, q = np.arange(40.0)[:, None], np.linspace(-2, 2, 90)
    y = 3 * np.exp(-(q**2)) + 0.1 * i + np.random.default_rng(1).normal(0, 0.1, (40, 90))
    found = curve_fit(surface, (i, q), da.from_array(y, (7, 50)), p0=[1, 1])
    fitted = np.asarray(found.predict())
    for coordinate, x, other in ((0, i.ravel(), 1), (1, q, 0), (None, i.ravel(), 1)):
        ax = plots.fit(found, coordinate=coordinate)
        np.testing.assert_allclose(drawn(ax.containers[0])[0], x, atol=1e-12)
        np.testing.assert_allclose(drawn(ax.containers[0])[1], y.mean(axis=other), atol=1e-12)
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), fitted.mean(axis=other), atol=1e-12)
        assert ax.get_xlabel() == {0: "i", 1: "q", None: "place along i"}[coordinate]
    with pytest.raises(ValueError, match=r"`coordinate` must be from 0 to 1.*not 2"):
        plots.fit(found, coordinate=2)
    with pytest.raises(ValueError, match="one coordinate"):
        plots.fit(found, x=[1.0])


@pytest.mark.slow
def test_the_place_in_the_data_is_known_where_small_chunks_are_joined():
    q = np.broadcast_to(np.linspace(0, 4, 90), (40, 90))
    y = 2 * np.exp(-0.5 * q) + np.arange(40)[:, None]
    found = curve_fit(decay, da.from_array(q, (7, 50)), da.from_array(np.asarray(y), (7, 50)), p0=START)
    seen = binned(found, None)
    np.testing.assert_array_equal(seen.x, np.arange(40))
    np.testing.assert_allclose(seen.y, np.mean(y, axis=1))


def test_a_model_without_coordinates_is_drawn_along_the_data():
    axis = jnp.linspace(0, 10, 300)

    def closed(_, a, b):
        return a * jnp.exp(-b * axis)

    y = 2 * np.exp(-0.3 * np.asarray(axis)) + np.random.default_rng(0).normal(0, 0.05, 300)
    found = curve_fit(closed, None, y, p0=[1, 1], strategy="standard", sigma=np.diag(np.full(300, 0.0025)))
    ax = plots.fit(found)
    np.testing.assert_array_equal(drawn(ax.containers[0])[0], np.arange(300))
    np.testing.assert_allclose(drawn(ax.containers[0])[2], 0.05)
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), found.predict())
    assert ax.get_xlabel() == "point"


def test_the_histogram_counts_all_residuals_in_units_of_the_noise(large):
    residual = np.asarray(large.residuals())
    z = residual / large.reduced_chi_square**0.5
    ax = plots.residual_histogram(large)
    (bars,) = ax.patches
    density, edges, _ = bars.get_data()
    np.testing.assert_allclose(density, np.histogram(z, edges)[0] / N / np.diff(edges), atol=2 / N / np.diff(edges)[0])
    np.testing.assert_allclose(ax.lines[0].get_ydata()[120], (2 * np.pi) ** -0.5)
    assert np.sum(density * np.diff(edges)) == pytest.approx(1)
    t, y = data(500)
    y[0] += 10
    outlier = plots.residual_histogram(curve_fit(decay, t, y, p0=START, sigma=np.full(500, 0.05)))
    assert "1 beyond ±6" in outlier.get_legend().get_texts()[0].get_text()


@pytest.mark.slow
def test_residuals_of_few_counts_are_normal_and_the_same_however_the_data_are_chunked():
    t, _ = data()
    y = np.random.default_rng(2).poisson(2 * np.exp(-0.5 * t) + 0.5)  # Pearson's have a skewness of 1 and few values
    found = curve_fit(decay, t, y, p0=[1.5, 1, 1], loss="poisson")
    seen = binned(found)
    assert seen.scale == 1 and abs(np.average(seen.residual, weights=seen.n)) < 0.01
    assert np.average(seen.spread, weights=seen.n) == pytest.approx(1, abs=0.02)
    normal = np.diff(scipy.special.ndtr(seen.edges)) * N
    assert np.sum((seen.histogram - normal) ** 2 / np.maximum(normal, 1)) < 2 * len(normal)
    assert plots.residuals(found).get_ylabel() == "quantile residual"
    again = binned(curve_fit(decay, da.from_array(t, 7001), da.from_array(y, 7001), p0=[1.5, 1, 1], loss="poisson"))
    np.testing.assert_allclose(again.residual, seen.residual, atol=1e-4)  # the parameters differ by rounding
    masked = curve_fit(decay, t, y, p0=[1.5, 1, 1], loss="poisson", mask=t < 5)
    assert binned(masked).n.sum() == np.sum(t >= 5)


def test_quantile_residuals_have_the_probability_of_the_counts():
    mean, seeds = np.array([0.3, 4.0, 50.0, 1e-10]), np.arange(4)
    y = np.array([0.0, 4.0, 35.0, 1.0])
    low, high = scipy.stats.poisson.cdf([y - 1, y], mean)
    z = -quantile_residuals(y, mean, seeds)[:3]
    assert np.all((low[:3] < scipy.special.ndtr(z)) & (scipy.special.ndtr(z) < high[:3]))
    tail = scipy.stats.poisson.sf([119, 120], 50.0)  # P(Y >= 120), P(Y > 120), whose complement is 1
    far = quantile_residuals(np.array([120.0]), np.array([50.0]), np.arange(1))
    assert tail[1] < scipy.special.ndtr(far[0]) < tail[0] < 1e-15
    assert np.isfinite(quantile_residuals(np.array([1e6]), np.array([1.0]), np.arange(1))).all()


def test_convergence_shows_the_cost_above_the_least_and_the_distance(large):
    ax = plots.convergence(large)
    above, distance = ax.lines
    cost = np.array([record.cost for record in large.history])
    relative = (cost - cost.min()) / (cost[0] - cost.min())
    np.testing.assert_array_equal(above.get_xdata(), np.arange(1, len(cost) + 1))
    np.testing.assert_allclose(above.get_ydata(), np.where(relative > 0, relative, np.nan))
    np.testing.assert_allclose(distance.get_ydata(), [record.distance for record in large.history])
    assert ax.get_yscale() == "log"


def test_correlations_are_drawn_with_the_names_of_the_parameters(large):
    ax = plots.correlation(large)
    expected = large.pcov / np.outer(large.perr, large.perr)
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["amplitude", "rate", "offset"]
    assert ax.texts[1].get_text() == f"{expected[0, 1]:.2f}"
    assert ax.images[0].get_clim() == (-1, 1)


def test_a_picture_reads_a_store_once(tmp_path):
    t, y = data()
    stored, reads = counted(tmp_path / "y.zarr", y, (1000,))
    found = curve_fit(decay, t, stored, p0=START)
    for draw in (plots.fit, plots.residuals, plots.residual_histogram):
        reads.clear()
        draw(found)
        assert set(reads.values()) == {1} and len(reads) == 30
    reads.clear()
    seen = binned(found)
    for draw in (plots.fit, plots.residuals, plots.residual_histogram):
        draw(found, seen=seen)
    assert sum(reads.values()) == 30


@pytest.mark.slow
def test_no_large_array_comes_to_the_client(workers):
    t = da.linspace(0, 10, 2_000_000, chunks=100_000)
    y = 2 * da.exp(-0.5 * t) + 0.3 + da.random.default_rng(1).normal(0, 0.05, t.shape, chunks=t.chunks)
    with workers.as_current():
        found = curve_fit(decay, t, y, p0=START, strategy="chunked")
        with get_task_stream(workers) as stream:
            there = binned(found)
        sizes = {task["key"]: task["nbytes"] for task in stream.data}
    assert len(sizes) == 20 + 20  # each chunk is laid out, and tallied
    assert max(sizes.values()) < 2 * 8 * 8 * FINEST[1] + 4096  # a chunk of y has 800 kB
    with dask.config.set(scheduler="threads"):
        here = binned(found)
    assert all(np.array_equal(a, b) for a, b in zip(there, here, strict=True))  # by the same merge


@pytest.mark.slow
def test_a_hundred_million_points_are_drawn_in_bounded_memory():
    script = """
        import dask.array as da, jax.numpy as jnp, matplotlib, sys
        matplotlib.use("agg")
        from dask_nlsq import curve_fit, plots
        from dask_nlsq.memory.machine import process_memory

        def line(x, a, b):
            return a + b * x

        def data(n):
            x = da.linspace(0, 1, n, chunks=10**6)
            return x, 1 + 2 * x + da.random.default_rng(1).normal(0, 1, n, chunks=10**6)

        for n in (10**6 * 4, 10**8):
            found = curve_fit(line, *data(n), p0=[1, 1], strategy="streaming")
            axes = plots.fit(found, residuals=True)
            print(process_memory()[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 200e6  # x and y have 1600 MB


def test_data_that_are_gone_are_told_of(large):
    found = pickle.loads(pickle.dumps(large))
    with pytest.raises(ValueError, match="does not hold the data"):
        plots.fit(found)
    assert plots.convergence(found).lines and plots.correlation(found).images
    assert plots.fit(found, seen=binned(large)).lines


def test_nothing_to_draw_and_wrong_bins_are_told_of(large):
    below = curve_fit(decay, *data(3000, low=-2.0, high=-1.0), p0=START)
    with pytest.raises(ValueError, match="no point counts at a positive t"):
        plots.fit(below, log=True)
    with pytest.raises(ValueError, match="`bins` must be a number from 1 to 1024, not 0"):
        plots.fit(large, bins=0)


def test_missing_matplotlib_is_told_with_the_way_out(large, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plots.fit, plots.convergence, plots.correlation):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "dask_nlsq\[plot\]"'):
            draw(large)


def test_maps_of_chosen_parameters_are_drawn():
    y, _ = spectra()
    found = fitted(y)
    axes = plots.maps(found, ["width", "area"])
    for ax, k in zip(axes, (2, 0), strict=True):
        values = np.where(found.success, found.popt[..., k], np.nan)
        np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), values)
    assert [ax.get_title() for ax in axes] == ["width", "area"]
    with pytest.raises(ValueError, match="no map of 'height'; there are area, center, width, offset, chi2"):
        plots.maps(found, ["height"])


def test_a_large_map_is_not_computed_for_a_picture_alone():
    y = da.zeros((3000, 3000, N_SPECTRUM), chunks=(500, 500, -1))
    with pytest.raises(ValueError, match=r"9,000,000 pixels is not computed.*compute\(\)"):
        plots.maps(fit_map(peak, X, y, P0))


def test_pictures_in_threads_do_not_disturb_each_other(large):
    seen, results = binned(large), Counter()

    def draw():
        results[binned(large).y.tobytes() == seen.y.tobytes()] += 1

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {True: 4}


def test_the_few_are_few():
    t, y = data(FEW + 1)
    assert binned(curve_fit(decay, t, y, p0=START)).points is None
    assert binned(curve_fit(decay, t[1:], y[1:], p0=START)).points.shape == (5, FEW)


@pytest.mark.slow
def test_the_summands_of_a_model_are_drawn():
    t, y = data(300)
    result = curve_fit(models.exponential + models.polynomial(0), t, y)
    lines = {line.get_label(): line for line in result.plot(components=True).get_lines()}
    assert {"model", "exponential", "polynomial(0)"} <= lines.keys()
    total = lines["exponential"].get_ydata() + lines["polynomial(0)"].get_ydata()
    np.testing.assert_allclose(total, lines["model"].get_ydata())
    with pytest.raises(ValueError, match="decay is not a sum of models"):
        curve_fit(decay, t, y, START).plot(components=True)


def test_the_model_is_evaluated_across_a_gap_of_binned_data():
    x = np.r_[np.linspace(2, 7.5, 2000), np.linspace(10, 18, 2000)]
    result = curve_fit(models.gaussian, x, 5 * np.exp(-0.5 * ((x - 9) / 1.0) ** 2), [4, 9.1, 1.1])
    assert len(x) > FEW
    line = next(each for each in result.plot().lines if each.get_label() == "model")
    at, drawn = line.get_data()
    within = (at > 8) & (at < 9.9)
    assert within.sum() > 50 and np.allclose(drawn[within], result.predict(at[within]))
    plt.close("all")


def test_a_wrong_argument_of_a_plot_names_the_right_one():
    result = curve_fit(models.line, np.arange(9.0), np.arange(9.0) ** 1.1)
    with pytest.raises(TypeError, match="plot has no argument 'residual': did you mean 'residuals'"):
        result.plot(residual=True)
