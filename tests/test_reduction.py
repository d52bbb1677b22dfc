import dask.array as da
import numpy as np
import pytest

from dask_nlsq import curve_fit
from dask_nlsq.data.align import build_data
from dask_nlsq.engine.condensed import Condensed, Segmentation, factor, merge, rank_tolerance
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.kernels.rows import unpack
from dask_nlsq.model.function import intern


def random_rows(n=400, p=4, condition=1.0, seed=0):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(n, p))
    J[:, 1] = J[:, 0] + J[:, 1] / condition
    return np.column_stack([J, rng.normal(size=n)])


def equations(rows, reduction):
    matrix = rows.T @ rows if reduction == "gram" else np.linalg.qr(rows, mode="r")
    return Condensed(matrix, 0.5 * rows[:, -1] @ rows[:, -1], reduction)


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


@pytest.mark.parametrize("p, qr, gram", [(1, 2.0**-40, 2.0**-26), (16, 2.0**-40, 2.0**-24), (2**14, 2.0**-38, 2.0**-19)])
def test_what_counts_as_rounding_is_that_of_the_model_or_the_root_of_that_of_squares(p, qr, gram):
    matrix = np.broadcast_to(0.0, (p + 1, p + 1))
    assert rank_tolerance(Condensed(matrix, 1.0, "qr")) == qr
    assert rank_tolerance(Condensed(matrix, 1.0, "gram")) == gram


@pytest.mark.parametrize("reduction", ["gram", "qr"])
@pytest.mark.parametrize("n_blocks, size", [(1, 1), (5, 2), (8, 4), (13, 4), (64, 16), (13, 128)])
def test_partitions_do_not_change_a_bit(reduction, n_blocks, size):
    blocks = [equations(random_rows(20, seed=k), reduction) for k in range(n_blocks)]
    matrices, costs = np.stack([b.matrix for b in blocks]), np.array([b.cost for b in blocks])
    whole = merge(matrices, costs, reduction)
    parts = [merge(matrices[k : k + size], costs[k : k + size], reduction) for k in range(0, n_blocks, size)]
    again = merge(np.stack([m for m, _ in parts]), np.array([c for _, c in parts]), reduction)
    np.testing.assert_array_equal(again[0], whole[0])
    assert again[1] == whole[1]


def line(x, a, b):
    return a * x + b


def swept_parts(x, y, client=None, n_partitions=1, **options):
    options = dict(reduction="gram", sigma=None, mask=None, loss="linear") | options
    problem = build_data(x, y, options["sigma"], options["mask"], check=True, omit=False)
    with open_sweep(problem, "standard" if client is None else "chunked", client, n_partitions) as sweep:
        evaluator = Evaluator(sweep, Objective(intern(line), options["loss"]), 2, options.get("grouping"))
        found = evaluator(np.array([1.1, 0.2]), options["reduction"])
        return found, unpack(found.parts, 2), evaluator.weights.sum(axis=0)


@pytest.mark.parametrize("reduction", ["gram", "qr"])
@pytest.mark.parametrize("n", [7, 1000, 700_001])
def test_sums_over_parts_of_the_data_add_up_to_those_of_all(n, reduction):
    rng = np.random.default_rng(n)
    x, sigma, mask = rng.random(n), 0.5 + rng.random(n), rng.random(n) < 0.1
    y = x + rng.normal(size=n) * sigma
    found, parts, weights = swept_parts(x, y, reduction=reduction, sigma=sigma, mask=mask)
    gram = found.matrix if reduction == "gram" else found.matrix.T @ found.matrix
    np.testing.assert_allclose(parts.gram.sum(axis=0), gram, rtol=1e-9)
    use = ~mask
    r, w = ((1.1 * x + 0.2 - y) / sigma)[use], sigma[use] ** -2
    assert min(128, n // 4) <= len(parts.n) <= 256 and parts.n.sum() == use.sum()
    np.testing.assert_allclose(parts.cost.sum(), found.cost, rtol=1e-12)
    np.testing.assert_allclose(parts.squares.sum(), r @ r, rtol=1e-12)
    np.testing.assert_allclose(parts.residual.sum(), r.sum(), rtol=1e-9, atol=1e-9 * n)
    np.testing.assert_allclose(weights, [w.sum(), w @ y[use], w @ y[use] ** 2], rtol=1e-11)


def test_the_spread_of_parts_is_that_of_the_gradient_over_points_where_these_are_independent():
    n = 400_000
    rng = np.random.default_rng(1)
    x = rng.random(n)
    y = 1.1 * x + 0.2 + rng.normal(size=n) * (0.1 + x)
    _, parts, _ = swept_parts(x, y)
    rows = np.stack([x, np.ones(n)]) * (1.1 * x + 0.2 - y)
    np.testing.assert_allclose(parts.spread.sum(axis=0)[:2, :2], rows @ rows.T, rtol=0.35)


@pytest.mark.slow
def test_parts_have_the_same_bits_on_workers_however_many_tasks_there_are(workers):
    x = da.linspace(0, 1, 3_000_000, chunks=100_000)
    y = x + da.sin(1e3 * x)
    with workers.as_current():
        for grouping in (Segmentation(4, 2, 0), Segmentation(1, 1, 2), Segmentation(2, 1, 5)):
            here = swept_parts(x, y, grouping=grouping)[0].parts
            assert len(here) == -(-30 // 2**grouping.level) * grouping.per_run
            for n_partitions in (2, 5, 30):
                np.testing.assert_array_equal(swept_parts(x, y, workers, n_partitions, grouping=grouping)[0].parts, here)


@pytest.mark.parametrize("first", [0, 2])
def test_values_that_stand_for_no_data_do_not_count_wherever_they_are_first(first):
    y = (1000 + 500 * np.arange(8 * 100_000) / 8e5).astype(np.uint16)
    y[first * 100_000 :: 1000] = 65535
    x = da.arange(len(y), chunks=100_000) / 8e5
    found = curve_fit(line, x, da.from_array(y, chunks=100_000), p0=[1, 1], mask_values=[65535], strategy="chunked")
    np.testing.assert_allclose(found.popt, [500, 999.5], rtol=1e-3)
    assert found.n_masked == np.count_nonzero(y == 65535) and found.parts.n.sum() == found.n_points
