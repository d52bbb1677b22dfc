import jax
import numpy as np
import pytest

from tests.nist import PROBLEMS, VARIANTS, required, run


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", [0, 1], ids=["far", "near"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_certified_digits_are_reached(problem, start, variant):
    found, wanted = run(problem, start, variant), required(problem)
    assert found.params >= wanted.params
    assert found.errors >= wanted.errors


@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if p.name != "Lanczos1"], ids=lambda p: p.name)
def test_models_have_the_certified_residual_sum(problem):
    """Lanczos1 is left out: float64 data do not hold its residuals, see ERRORS_IN_RESIDUALS."""
    with jax.enable_x64(True):
        residual = np.asarray(problem.model(problem.x, *problem.certified)) - problem.y
    assert residual @ residual == pytest.approx(problem.rss, rel=1e-10)
    assert problem.dof == problem.y.size - problem.certified.size
