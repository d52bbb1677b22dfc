import numpy as np
import pytest

from dask_nlsq.reduction import NormalEquations, factor, merge


def random_rows(n=400, p=4, condition=1.0, seed=0):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(n, p))
    J[:, 1] = J[:, 0] + J[:, 1] / condition
    return np.column_stack([J, rng.normal(size=n)])


def equations(rows, reduction):
    matrix = rows.T @ rows if reduction == "gram" else np.linalg.qr(rows, mode="r")
    return NormalEquations(matrix, 0.5 * rows[:, -1] @ rows[:, -1], reduction)


@pytest.mark.parametrize("reduction", ["gram", "qr"])
def test_both_reductions_give_the_same_factor(reduction):
    rows = random_rows()
    J, r = rows[:, :-1], rows[:, -1]
    found = factor(equations(rows, reduction))
    np.testing.assert_allclose(found.R, np.triu(found.R), atol=1e-13)
    np.testing.assert_allclose(found.R.T @ found.R, J.T @ J, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, J.T @ r, rtol=1e-11)
    np.testing.assert_allclose(found.R.T @ found.projected, J.T @ r, rtol=1e-10)
    s = np.linalg.svd(J / np.linalg.norm(J, axis=0), compute_uv=False)
    assert found.condition == pytest.approx(s[0] / s[-1], rel=1e-9)


@pytest.mark.parametrize("reduction", ["gram", "qr"])
def test_a_missing_column_has_infinite_condition(reduction):
    rows = random_rows()
    rows[:, 2] = 0
    assert factor(equations(rows, reduction)).condition == np.inf


@pytest.mark.parametrize("reduction", ["gram", "qr"])
def test_equal_columns_have_infinite_condition_or_rounding(reduction):
    rows = random_rows(condition=1e30)
    assert factor(equations(rows, reduction)).condition > 1e7


@pytest.mark.parametrize("reduction", ["gram", "qr"])
@pytest.mark.parametrize("n_blocks", [1, 2, 5, 8, 13, 64])
@pytest.mark.parametrize("size", [1, 2, 4, 16, 128])
def test_partitions_do_not_change_a_bit(reduction, n_blocks, size):
    blocks = [equations(random_rows(20, seed=k), reduction) for k in range(n_blocks)]
    matrices, costs = np.stack([b.matrix for b in blocks]), np.array([b.cost for b in blocks])
    whole = merge(matrices, costs, reduction)
    parts = [merge(matrices[k : k + size], costs[k : k + size], reduction) for k in range(0, n_blocks, size)]
    again = merge(np.stack([m for m, _ in parts]), np.array([c for _, c in parts]), reduction)
    np.testing.assert_array_equal(again[0], whole[0])
    assert again[1] == whole[1]
