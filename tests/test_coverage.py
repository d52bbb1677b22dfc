"""Whether error bars are worth what they say; `benchmarks.coverage` prints the figures."""

import numpy as np
import pytest

from benchmarks.coverage import CASES, LEVELS, LIFETIMES, REPORTED, WEIGHTS, WITHIN, lifetimes, scatter


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in REPORTED])
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    shares, fitted = CASES[name].coverage()
    assert fitted == 1
    np.testing.assert_allclose(shares.mean(axis=1), LEVELS, atol=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != "no weights"])  # less precise, and hardly biased
def test_lifetimes_are_biased_by_weights_from_the_data_and_not_by_those_of_the_model(weights):
    bias = lifetimes(weights, photons=800, pixels=64, draws=4).mean(axis=0) / LIFETIMES - 1
    assert (np.abs(bias) < 0.03).all() == ("poisson" in weights)


@pytest.mark.slow
def test_sandwich_and_jackknife_agree_with_a_bootstrap_where_the_usual_errors_do_not():
    ratios = scatter()
    assert np.abs(ratios["pcov"] - 1).max() > 0.15
    np.testing.assert_allclose(ratios["sandwich"], 1, atol=0.15)
    np.testing.assert_allclose(ratios["jackknife"], 1, atol=0.15)
