"""Whether error bars are worth what they say; `benchmarks.coverage` prints the figures."""

import numpy as np
import pytest

from benchmarks.coverage import CASES, LEVELS, REPORTED, WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in REPORTED])
def test_intervals_hold_the_truth_as_often_as_they_say(name):
    shares, fitted = CASES[name].coverage()
    assert fitted == 1
    np.testing.assert_allclose(shares.mean(axis=1), LEVELS, atol=WITHIN)
