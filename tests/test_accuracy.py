import pytest

from tests.accuracy import (
    DECAY,
    LIMITS,
    PEAK,
    REDUCTIONS,
    against_scipy,
    cases,
    differing_bits,
    reads,
    spread_over_chunks,
)

MODELS = pytest.mark.parametrize("model", [DECAY, PEAK], ids=["decay", "peak"])
CASES = cases()
FEW = [each if k % 3 == 0 else pytest.param(each, marks=pytest.mark.slow) for k, each in enumerate(CASES.values())]


@pytest.mark.parametrize("case", FEW, ids=CASES)
def test_optimum_and_covariance_are_those_of_scipy(case):
    deviation = against_scipy(case)
    assert deviation.popt <= LIMITS.popt
    assert deviation.pcov <= LIMITS.pcov
    assert deviation.ours_tight <= LIMITS.ours_tight


@MODELS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_optimum_does_not_depend_on_chunks_or_order(model, reduction):
    assert spread_over_chunks(model, reduction) <= LIMITS.chunks


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bits_do_not_depend_on_threads_or_processes(model, reduction):
    assert differing_bits(model, reduction) == LIMITS.bits


@MODELS
def test_data_are_computed_once_and_swept_once_per_trial_step(model):
    found = reads(model)
    assert found.per_block <= LIMITS.reads_per_block
    assert found.sweeps_per_trial <= LIMITS.sweeps_per_trial
