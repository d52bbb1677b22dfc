from itertools import combinations, product

import pytest

from tests.accuracy import (
    DECAY,
    LIMITS,
    MIXED,
    PEAK,
    REDUCTIONS,
    against_scipy,
    cases,
    differing_bits,
    mixed,
    reads,
    spread_over_chunks,
)

MODELS = pytest.mark.parametrize("model", [DECAY, PEAK], ids=["decay", "peak"])
SINGLY = [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in cases().items()]
TOGETHER = [pytest.param(case, id=name) for name, case in mixed().items()]


def test_mixed_cases_have_every_pair_of_options():
    pairs = {frozenset(pair) for row in MIXED for pair in combinations(enumerate(row), 2)}
    values = [set(column) for column in zip(*MIXED, strict=True)]
    assert [len(each) for each in values] == [3, 5, 3, 4, 2, 3, 2, 2]
    every = {
        frozenset(pair)
        for i, j in combinations(range(8), 2)
        for pair in product(*({(k, v) for v in values[k]} for k in (i, j)))
    }
    left = {frozenset({(3, "matrix"), other}) for other in ((6, True), (7, "3-D"), (1, "arctan"))}
    assert every - pairs == left


@pytest.mark.slow
@pytest.mark.parametrize("case", TOGETHER + SINGLY)
def test_optimum_and_covariance_are_those_of_scipy(case):
    deviation = against_scipy(case)
    assert deviation.popt <= LIMITS.popt
    assert deviation.pcov <= LIMITS.pcov
    assert deviation.ours_tight <= LIMITS.ours_tight


@pytest.mark.parametrize(
    "model, reduction",
    [
        pytest.param(DECAY, "qr", id="decay-qr"),
        pytest.param(PEAK, "gram", id="peak-gram", marks=pytest.mark.slow),
        pytest.param(DECAY, "gram", id="decay-gram", marks=pytest.mark.slow),
        pytest.param(PEAK, "qr", id="peak-qr", marks=pytest.mark.slow),
    ],
)
def test_optimum_does_not_depend_on_chunks_or_order(model, reduction):
    assert spread_over_chunks(model, reduction) <= LIMITS.chunks


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bits_do_not_depend_on_threads_or_processes(model, reduction):
    assert differing_bits(model, reduction) == LIMITS.bits


@pytest.mark.slow
@MODELS
def test_data_are_computed_once_and_swept_once_per_trial_step(model):
    found = reads(model)
    assert found.per_block <= LIMITS.reads_per_block
    assert found.sweeps_per_trial <= LIMITS.sweeps_per_trial
