import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import OptimizationGoal, curve_fit, fit
from dask_nlsq.presets import PRESETS, workflow_options

X = np.linspace(0, 10, 20_000)


def sine(x, a, f, phi, c):
    return a * jnp.sin(2 * jnp.pi * f * x + phi) + c


def noisy_sine(seed=0):
    return 1.5 * np.sin(2 * np.pi * 1.7 * X + 0.6) + 0.4 + 0.3 * np.random.default_rng(seed).standard_normal(X.size)


@pytest.mark.slow
@pytest.mark.parametrize("workflow", ["quality", "large_robust"])
def test_a_workflow_with_starts_finds_what_p0_misses(workflow):
    y = da.from_array(noisy_sine(), 3000)
    alone = curve_fit(sine, X, y, p0=[1, 0.6, 0, 0])
    found = fit(sine, X, y, p0=[1, 0.6, 0, 0], workflow=workflow)
    assert alone.popt[1] != pytest.approx(1.7, abs=0.01)
    np.testing.assert_allclose(found.popt, [1.5, 1.7, 0.6, 0.4], atol=0.02)
    assert len(found.starts.starts) == PRESETS[workflow].n_starts
    assert np.array_equal(found.starts.starts[0], [1, 0.6, 0, 0])
    assert alone.starts is None


def test_an_unknown_workflow_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'auto', 'standard', 'quality', .*'hpc_distributed', not 'best'"):
        fit(sine, X, noisy_sine(), workflow="best")


@pytest.mark.parametrize("workflow", ["streaming", "hpc_distributed"])
def test_a_workflow_that_streams_re_reads_the_data_and_keeps_a_checkpoint(workflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y = da.from_array(noisy_sine(), 1000)
    found = fit(sine, X, y, p0=[1, 1.69, 0.5, 0.3], workflow=workflow)
    assert found.strategy == "streaming"
    assert len(list(tmp_path.glob("nlsq_checkpoints/*/fit.json"))) == 1
    np.testing.assert_allclose(found.popt, [1.5, 1.7, 0.6, 0.4], atol=0.02)


def test_goals_shift_tolerances_and_ask_for_starts():
    def options(workflow, goal=None, n=5_000_000):
        found = workflow_options(workflow, goal, n, None)
        return found["ftol"], found["n_starts"]

    assert options("auto") == (1e-7, 0)
    assert options("auto", OptimizationGoal.QUALITY) == (1e-8, 10)
    assert options("auto", "fast") == (1e-6, 0)
    assert options("quality", "fast") == (1e-9, 0)
    assert options("quality", "robust") == (1e-10, 20)
    assert options("large_robust") == (1e-8, 10)


def test_what_the_user_gives_wins_over_the_workflow():
    with pytest.raises(RuntimeError, match="maximum number"):
        fit(sine, X, noisy_sine(), p0=[1.4, 1.69, 0.5, 0.3], workflow="fast", max_nfev=1, ftol=1e-15)


@pytest.mark.parametrize("n_starts", [-1, 2.5, True, "many"])
def test_a_number_of_starts_is_a_number(n_starts):
    with pytest.raises(ValueError, match="`n_starts`"):
        curve_fit(sine, X, noisy_sine(), n_starts=n_starts)
