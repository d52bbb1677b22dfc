import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq.base.x64 import float64
from dask_nlsq.data.align import build_data
from dask_nlsq.data.chunks import prepare_chunk
from dask_nlsq.engine.condensed import merge_neighbours
from dask_nlsq.engine.request import Objective, Request, condense_blocks, kernel_spec
from dask_nlsq.kernels.blocks import Layout, Layouts, tile_size
from dask_nlsq.kernels.checks import check_jac, check_pointwise, fingerprint, linear_places
from dask_nlsq.kernels.jac_mode import TIMING_PAYS, choose_jac_mode
from dask_nlsq.kernels.kind import CPU
from dask_nlsq.kernels.matrices import REFLECTED_UP_TO, factor_by_cholesky
from dask_nlsq.kernels.rows import sweep_kernel
from dask_nlsq.model.function import intern
from dask_nlsq.model.losses import LOSSES

BLOCK_POINTS = CPU.block_points
PARAMS = np.array([2.0, 0.7, 0.3])
LIKE_A_GPU = CPU._replace(reflected=False, pairs_up_to=6)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 5, n)
    return x, 2 * np.exp(-0.5 * x) + rng.normal(0, 0.1, n)


def chunk_of(xdata, ydata, sigma=None, mask=None, omit=False):
    problem = build_data(xdata, ydata, sigma, mask, check=True, omit=omit)
    (index,) = problem.indices()
    return problem.preparation, prepare_chunk(problem.preparation, [index], [problem.pieces(index)])


def swept(
    f, xdata, ydata, params, reduction="gram", loss="linear", f_scale=1.0, jac=None, jac_mode="columns", kind=CPU, **operands
):
    preparation, chunk = chunk_of(xdata, ydata, **operands)
    preparation = preparation._replace(kind=kind)
    request = Request(Objective(intern(f, jac), loss, f_scale), params, reduction, jac_mode)
    sums = [each for (each,) in condense_blocks(preparation, chunk.blocks, [request])]
    matrix, cost, _ = merge_neighbours(sums, reduction)
    return matrix, cost


def dense_rows(f, x, y, params, sigma=1.0):
    with float64():
        J = np.asarray(jax.jit(jax.jacfwd(lambda q: f(x, *q)))(jnp.asarray(params)))
        r = np.asarray(jax.jit(f)(x, *params)) - y
    return np.column_stack([J, r]) / np.reshape(sigma, (-1, 1))


def test_tiles_of_a_cpu_stay_in_its_cache():
    """Rows [J r] of 8 (p + 1) bytes per point in 1 MiB, 256 to 4096 points, and no more than there are."""
    assert [tile_size(CPU, p, BLOCK_POINTS) for p in (1, 31, 32, 63, 1000)] == [4096, 4096, 2048, 2048, 256]
    assert tile_size(CPU, 3, 100) == 100


@pytest.mark.parametrize("n", [1, 7, 1000, 4096, 4097, BLOCK_POINTS - 1, BLOCK_POINTS + 5, 2 * BLOCK_POINTS + 4099])
def test_gram_is_that_of_the_dense_rows_for_any_length(n):
    x, y = data(n)
    rows = dense_rows(decay, x, y, PARAMS)
    gram, cost = swept(decay, x, y, PARAMS)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-12, atol=1e-12)
    assert cost == pytest.approx(0.5 * np.sum(rows[:, -1] ** 2), rel=1e-12)


@pytest.mark.parametrize("n", [1000, BLOCK_POINTS + 5])
def test_qr_factor_has_the_same_gram_matrix(n):
    x, y = data(n)
    rows = dense_rows(decay, x, y, PARAMS)
    factor, _ = swept(decay, x, y, PARAMS, reduction="qr")
    np.testing.assert_allclose(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor, rows.T @ rows, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [CPU, LIKE_A_GPU], ids=["by reflections", "by Cholesky"])
@pytest.mark.parametrize("p", [1, REFLECTED_UP_TO - 1, REFLECTED_UP_TO])
def test_qr_keeps_what_the_columns_hold_dead_tiny_or_nearly_parallel_ones_too(p, kind):
    def model(x, *c):
        terms = [x, 0 * x, 1e-100 * x**2, x * (1 + 1e-6 * x), 1 + 0 * x, x**3]
        return sum(each * term for each, term in zip(c, terms, strict=False))

    x, y = data(9000)
    rows = dense_rows(model, x, y, np.ones(p))
    factor, _ = swept(model, x, y, np.ones(p), reduction="qr", kind=kind)
    np.testing.assert_allclose(factor, np.triu(factor))
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1
    np.testing.assert_allclose((factor / scale).T @ (factor / scale), (rows / scale).T @ (rows / scale), atol=1e-13)


@pytest.mark.parametrize("kind", [CPU, LIKE_A_GPU], ids=["by reflections", "by Cholesky"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_qr_does_not_hide_a_value_that_is_not_finite(bad, kind):
    x, y = data(5000)
    factor, _ = swept(lambda x, a, b: a * jnp.where(x > 4.99, bad, 1.0) + b * x, x, y, np.ones(2), "qr", kind=kind)
    assert not np.isfinite(factor).all()


@pytest.mark.parametrize("m", [4, REFLECTED_UP_TO + 8])
def test_a_factor_by_cholesky_of_columns_that_depend_on_each_other_is_right_for_many_tiles_at_once(m):
    rows = np.random.default_rng(m).normal(size=(3, m, 4096))
    rows[0, 2], rows[1, 1], rows[2, 0] = 2 * rows[0, 1], 0, 0.3 * rows[2, 1] + 0.7 * rows[2, 3]
    with float64():
        factors = np.asarray(jax.jit(jax.vmap(factor_by_cholesky))(rows))
    for factor, each in zip(factors, rows, strict=True):
        np.testing.assert_allclose(factor.T @ factor, each @ each.T, rtol=1e-12, atol=1e-10)
        norms = np.linalg.norm(each, axis=1)
        assert np.linalg.svd(factor / np.where(norms > 0, norms, 1), compute_uv=False)[-1] < 1e-14


@pytest.mark.parametrize("m", [4, REFLECTED_UP_TO + 8])
@pytest.mark.parametrize("condition", [1e3, 1e8, 1e13])
def test_a_factor_by_cholesky_has_the_digits_of_one_by_reflections(m, condition):
    rng = np.random.default_rng(m)
    left, right = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in (20_000, m))
    rows = (left * np.geomspace(1, 1 / condition, m)) @ right
    rows /= np.linalg.norm(rows, axis=0)
    with float64():
        factor = np.asarray(jax.jit(factor_by_cholesky)(rows.T * 1e-6))
    least, truth = (np.linalg.svd(each, compute_uv=False)[-1] for each in (1e6 * factor, rows))
    assert least == pytest.approx(truth, rel=1e-15 * m * condition)
    np.testing.assert_allclose(1e12 * factor.T @ factor, rows.T @ rows, atol=1e-14)


@pytest.mark.slow
def test_a_tile_as_long_as_the_block_reads_the_same_points(monkeypatch):
    """As on a GPU; operands of several types start at different places of a cache line."""
    n = 2 * BLOCK_POINTS + 5000
    rng = np.random.default_rng(5)
    x, y = rng.uniform(0, 5, n + 16), rng.normal(size=n + 16).astype(np.float32)
    for start in range(16):  # at some of them the last block could be a view
        operands = x[start : start + n], y[start : start + n]
        expected, _ = swept(decay, *operands, PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr("dask_nlsq.engine.request.tile_size", lambda kind, n_params, capacity: min(capacity, BLOCK_POINTS))
            gram, _ = swept(decay, *operands, PARAMS)
        np.testing.assert_allclose(gram, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "start, dtype",
    [*((k, np.float64) for k in (0, 1, 7, 8)), (3, np.float32), (8, np.float32), (5, np.uint16), (1, np.int8)],
)
def test_alignment_of_the_users_buffer_does_not_change_a_bit(start, dtype):
    """Views that start anywhere in a cache line give the bits of a fresh copy."""
    rng = np.random.default_rng(1)
    n = 2 * BLOCK_POINTS + 777
    x, y = np.linspace(0, 5, n + 9), rng.integers(0, 100, n + 9).astype(dtype)
    viewed = swept(decay, x[start : start + n], y[start : start + n], PARAMS)
    copied = swept(decay, x[start : start + n].copy(), y[start : start + n].copy(), PARAMS)
    np.testing.assert_array_equal(viewed[0], copied[0])
    assert viewed[1] == copied[1]


def test_large_arrays_reach_xla_without_a_copy():
    x, y = data(4 * BLOCK_POINTS)
    _, chunk = chunk_of(x, y)
    shared = [np.shares_memory(block.buffers[0], y) for block in chunk.blocks]
    assert sum(shared) >= len(shared) - 2  # the first may start, the last may end, in the middle of a cache line
    assert all(buffer.ctypes.data % 64 == 0 for block in chunk.blocks for buffer in block.buffers if len(buffer) > 1)


def test_unsigned_integers_are_converted_before_they_are_subtracted():
    x = np.arange(100.0)
    y = np.full(100, 3, np.uint16)
    gram, _ = swept(lambda x, a: a + 0 * x, x, y, np.array([1.0]))
    assert gram[0, 1] == -200  # sum of 1 - 3, not of 65534


@pytest.mark.parametrize("n", [500, BLOCK_POINTS + 100])
def test_masked_points_do_not_count_whatever_they_hold(n):
    x, y = data(n)
    mask = np.random.default_rng(2).random(n) < 0.3
    spoiled = np.where(mask, np.nan, y)
    rows = dense_rows(decay, x[~mask], y[~mask], PARAMS)
    gram, cost = swept(decay, x, spoiled, PARAMS, mask=mask)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-11)
    assert cost == pytest.approx(0.5 * np.sum(rows[:, -1] ** 2), rel=1e-12)


def test_omitted_points_do_not_count():
    x, y = data(1000)
    rows = dense_rows(decay, x[10:], y[10:], PARAMS)
    x[:5], y[5:10] = np.inf, np.nan
    gram, _ = swept(decay, x, y, PARAMS, omit=True)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-11)


@pytest.mark.parametrize("sigma", [0.5, "per point"])
def test_rows_are_divided_by_sigma(sigma):
    x, y = data(1000)
    sigma = np.random.default_rng(3).uniform(0.5, 2, 1000) if sigma == "per point" else sigma
    rows = dense_rows(decay, x, y, PARAMS, np.broadcast_to(sigma, 1000))
    gram, _ = swept(decay, x, y, PARAMS, sigma=sigma)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-12)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "linear"])
def test_robust_gradient_is_the_derivative_of_the_cost(loss):
    x, y = data(2000)

    def cost(params):
        return swept(decay, x, y, params, loss=loss, f_scale=0.1)[1]

    gram, _ = swept(decay, x, y, PARAMS, loss=loss, f_scale=0.1)
    for k in range(3):
        h = 1e-6 * np.eye(3)[k]
        assert gram[k, 3] == pytest.approx((cost(PARAMS + h) - cost(PARAMS - h)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("jac_mode", ["columns", "arguments"])
@pytest.mark.parametrize("count", [1, 9, pytest.param(40, marks=pytest.mark.slow)])
def test_both_ways_of_forming_columns_agree_with_jacfwd(count, jac_mode):
    def polynomial(x, *c):
        return sum(ck * jnp.cos(k * x + 0.1 * ck) for k, ck in enumerate(c))

    x, y = data(3000)
    params = np.linspace(0.5, 1.5, count)
    rows = dense_rows(polynomial, x, y, params)
    gram, _ = swept(polynomial, x, y, params, jac_mode=jac_mode)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-10, atol=1e-9)


def test_the_users_jacobian_is_used():
    x, y = data(1000)

    def twice(x, a, b, c):  # not the derivative, so that it shows
        return jnp.stack([x, x**2, x**3], axis=1)

    gram, _ = swept(decay, x, y, PARAMS, jac=twice, sigma=2.0)
    J = np.column_stack([x, x**2, x**3]) / 2
    np.testing.assert_allclose(gram[:3, :3], J.T @ J, rtol=1e-12)


def test_axis_vectors_are_broadcast_inside_the_kernel():
    """Three axes of odd lengths, more points than a block holds, a mask for two of the axes and sigma for one."""
    shape = (7, 311, 257)
    rng = np.random.default_rng(4)
    y = rng.normal(size=shape)
    phi, i, j = np.arange(7)[:, None, None], np.arange(311)[:, None], np.linspace(0, 1, 257)
    mask, sigma = rng.random((311, 257)) < 0.1, rng.uniform(1, 2, (7, 1, 1))
    table = np.linspace(1, 3, 311)

    def model(coordinates, a, b):
        phi, i, j = coordinates
        return a * jnp.asarray(table)[i] * j + b * phi

    params = np.array([0.3, 0.2])
    gram, cost = swept(model, (phi, i, j), y, params, mask=mask, sigma=sigma)
    weight = np.where(mask, 0, 1 / np.broadcast_to(sigma, shape))
    columns = [table[i] * j + 0 * phi, phi + 0 * table[i] * j]
    r = sum(p * c for p, c in zip(params, columns, strict=True)) - y
    rows = np.stack([(c * weight).ravel() for c in (*columns, r)], axis=1)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-11)
    assert cost == pytest.approx(0.5 * np.sum(rows[:, -1] ** 2), rel=1e-12)


@pytest.mark.parametrize("shapes, axes", [
    ([(4, 1, 1)], (0, 1)),
    ([(1, 5, 6)], (0, 1)),
    ([(4, 1, 1), (1, 5, 6)], (0, 1)),
    ([(4, 5, 1), (1, 1, 6)], (0, 2)),
    ([(4, 1, 6)], (0, 1, 2)),
    ([(4, 1, 1), (1, 5, 1), (1, 1, 6)], (0, 1, 2)),
    ([(4, 5, 6), (1, 1, 1)], (0,)),
])  # fmt: skip
def test_axes_are_one_that_no_operand_tells_apart(shapes, axes):
    rng = np.random.default_rng(len(axes))
    y, coordinates = rng.normal(size=(4, 5, 6)), tuple(rng.normal(size=shape) for shape in shapes)
    sigma = rng.uniform(1, 2, shapes[0])

    def model(x, a, b):
        return a * sum((k + 1) * each for k, each in enumerate(x)) + b

    preparation, _ = chunk_of(coordinates, y, sigma=sigma)
    assert (preparation.axes, preparation.layouts.ndim) == (axes, len(axes))
    found, cost = swept(model, coordinates, y, PARAMS[:2], sigma=sigma)
    dense = tuple(np.broadcast_to(each, y.shape).ravel() for each in coordinates)
    rows = dense_rows(model, dense, y.ravel(), PARAMS[:2], np.broadcast_to(sigma, y.shape).ravel())
    np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-11)
    assert cost == pytest.approx(0.5 * np.sum(rows[:, -1] ** 2), rel=1e-12)


def test_an_axis_of_length_one_is_a_part_of_its_neighbour():
    y, x = np.zeros((4, 1, 6)), (np.zeros((4, 1, 1)), np.zeros((1, 1, 6)))
    assert chunk_of(x, y)[0].axes == (0, 2)
    assert chunk_of(x[:1], y)[0].axes == (0, 2)
    assert chunk_of(x[0][:, :, 0], np.zeros((4, 1)))[0].axes == (0,)


def test_padding_meets_no_combination_of_axes_that_the_data_do_not_have():
    """27 points in a buffer of 32; only for these points is the root real."""
    along = 10 * np.arange(3.0)[None, :, None]
    A, B = 101 - along + np.zeros((3, 1, 1)), 100 - along + np.zeros((1, 1, 3))

    def model(x, a, b):
        return a * jnp.sqrt(x[0] - x[1]) + b * (x[0] - 90)

    gram, cost = swept(model, (A, B), np.ones((3, 3, 3)), np.array([1.0, 0.1]))
    assert np.isfinite(gram).all()
    assert np.isfinite(cost)


@pytest.mark.parametrize("dtype", [bool, np.longdouble, np.float16, np.int8])
def test_x_of_any_real_type_reaches_the_model_as_float64(dtype):
    def model(x, a):
        assert x.dtype == np.float64
        return -a * x

    x = np.array([0, 1, 1, 0, 1], dtype)
    gram, _ = swept(model, x, np.ones(5, dtype), np.array([2.0]))
    np.testing.assert_array_equal(gram[0], [3, -3 * -3])


def test_blocks_of_other_lengths_and_values_share_a_compilation():
    model = intern(decay)
    x, y = data(3 * BLOCK_POINTS + 12345)
    preparation, chunk = chunk_of(x, y)
    request = Request(Objective(model), PARAMS)
    kernel = sweep_kernel(model, kernel_spec(preparation, request, chunk.blocks[0]))
    condense_blocks(preparation, chunk.blocks[:1], [request])
    before = kernel.run.run.run._cache_size()
    condense_blocks(preparation, chunk.blocks, [request._replace(params=2 * PARAMS)])
    _, other = chunk_of(x[:-4567].copy(), y[:-4567].copy(), sigma=3.0)
    condense_blocks(preparation, other.blocks, [request])
    assert kernel.run.run.run._cache_size() == before


def test_threads_compute_on_the_callers_device():
    script = """
import threading, jax, jax.numpy as jnp
from dask_nlsq.kernels.kind import inherit_device
found = []
def work():
    found.append(jnp.ones(1).devices())
for device in jax.devices():
    with jax.default_device(device):
        adopt = inherit_device()
        thread = threading.Thread(target=lambda: (adopt(), work()))
        thread.start()
        thread.join()
        assert found[-1] == {device}, found
print(len(found))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert run.stdout.strip() == "3", run.stderr


@pytest.mark.parametrize(
    "f",
    [
        lambda x, a: a * jnp.cumsum(x),
        lambda x, a: a * (x - jnp.mean(x)),
        lambda x, a: a * x / jnp.max(x),
        lambda x, a: a * jnp.sort(x),
        lambda x, a: a * (x - x[0]),
        lambda x, a: a * x * x.size,
    ],
    ids=["cumsum", "mean", "max", "sort", "first", "size"],
)
def test_models_that_are_not_pointwise_are_recognised(f):
    preparation, chunk = chunk_of(*data(100))
    with pytest.raises(ValueError, match="not pointwise"):
        check_pointwise(intern(f), preparation.layouts, chunk.sample, np.ones(1))


def test_a_pointwise_model_with_nan_at_a_point_passes():
    preparation, chunk = chunk_of(np.linspace(-1, 1, 50), np.ones(50))
    check_pointwise(intern(lambda x, a: a * jnp.sqrt(x)), preparation.layouts, chunk.sample, np.ones(1))


def test_a_fingerprint_knows_the_arrays_that_a_model_closes_over():
    def closing_over(table):
        return intern(lambda x, a: a * jnp.interp(x, jnp.arange(3.0), table))

    layouts = chunk_of(*data(100))[0].layouts
    first, again, other = (closing_over(jnp.array(each)) for each in ([0.0, 1, 2], [0.0, 1, 2], [0.0, 1, 3]))
    assert fingerprint(first, layouts, 1) == fingerprint(again, layouts, 1) != fingerprint(other, layouts, 1)


@pytest.mark.parametrize("factor", [3, -1, 0.25])
def test_a_wrong_column_of_jac_is_named_with_its_size(factor):
    preparation, chunk = chunk_of(*data(100))

    def jac(x, a, b, c):
        e = jnp.exp(-b * x)
        return jnp.stack([e, -factor * a * x * e, jnp.ones_like(x)], axis=1)

    message = f"its column for b is {factor} times the derivative"
    with pytest.raises(ValueError, match=message):
        check_jac(intern(decay, jac), preparation.layouts, chunk.sample, "abc", PARAMS)


@pytest.mark.slow
def test_the_faster_way_of_forming_columns_is_found_by_timing():
    """Forty parameters of which each touches a fortieth of the model: one by one wins by an order of magnitude."""

    def steps(x, *heights):
        return sum(h * jnp.exp(-((x - k) ** 2)) for k, h in enumerate(heights))

    def dense(x, a, b, c):
        return a * jnp.exp(-b * x) + c

    preparation, chunk = chunk_of(*data(100))
    few = choose_jac_mode(intern(steps), preparation.layouts, chunk.sample, np.ones(40), 1000, CPU)
    many = choose_jac_mode(intern(steps), preparation.layouts, chunk.sample, np.ones(40), int(TIMING_PAYS), CPU)
    assert few == many == "arguments"
    assert choose_jac_mode(intern(dense), preparation.layouts, chunk.sample, np.ones(3), 10, CPU) == "columns"
    assert intern(steps).choices
    assert not intern(dense).choices


def summed(x, a, b, c):
    return jax.lax.scan(lambda total, each: (total + each, total * a), 0.0, x * b)[1] * c


@jax.custom_jvp
def mixed(a, b, c):
    return a + b * c


@mixed.defjvp
def _of_mixed(primals, tangents):
    (_, b, c), (ta, tb, tc) = primals, tangents
    one, other = jnp.stack([b, ta]), jnp.stack([c, ta])
    return mixed(*primals), one[1] + one[0] * tc + other[0] * tb


@jax.jit
def squared(none, k):
    k = k * k
    for n in range(none.shape[0]):
        k = k + none[n]
    return k


@pytest.mark.parametrize(
    "f, linear",
    [
        (lambda x, a, b, c: a * jnp.exp(-b * x) + c, "ac"),
        (lambda x, a, b, c: a * b * x + c, "ac"),
        (lambda x, a, b, c: a * jnp.where(x > b, x, c), "a"),
        (lambda x, a, b, c: a * jnp.exp(-b * x) + jnp.polyval(jnp.stack([c, c]), x), "ac"),
        (lambda x, a, b, c: jnp.polyval(jnp.stack([a, b, c]), x), "abc"),
        (lambda x, a, b, c: jax.jit(lambda a: a * x)(a) + b**2 + abs(c), "a"),
        (lambda x, a, b, c: jax.lax.cond(b > 0, lambda: a * x, lambda: b * x) + c, "c"),  # it is not known which
        (summed, "a"),
        (lambda x, *p: jnp.stack(p)[0] * jnp.exp(-jnp.stack(p)[1] * x) + jnp.stack(p)[2], "ac"),
        (lambda x, *p: jnp.array(p)[0] * jnp.exp(-jnp.array(p)[1:][0] * x) + 2 * jnp.array(p)[-1], "ac"),
        (lambda x, *p: (lambda q: (q * 2)[0] * x + (q * q)[1] * x + q[2] * jnp.flip(q)[0])(jnp.asarray(p)), "a"),
        (lambda x, *p: (lambda a, b, c: a * x**b + c)(*jnp.asarray(p)), "ac"),
        (lambda x, *p: jnp.asarray(p) @ jnp.stack([x, x**2, x**3]), "abc"),
        (lambda x, a, b, c: a * squared(jnp.stack([a, b, c])[3:], c) * x + b, "ab"),  # a vector of no elements
        (lambda x, a, b, c: (a * jnp.exp(-x[:, None] * jnp.ones(3) * squared(jnp.stack([a])[1:], c))).sum(1) + b, "ab"),
        (lambda x, a, b, c: mixed(a * x, b + 0 * x, c + 0 * x), "a"),
        (lambda x, *p: jnp.cumsum(jnp.asarray(p))[1] * x * p[0], "bc"),
    ],
)
def test_the_linear_parameters_are_those_of_which_derivatives_depend_on_none_of_them(f, linear):
    coordinate = Layout(True)
    layouts = Layouts(coordinate, coordinate, coordinate, (coordinate,), "single", (), ndim=1)
    assert "".join("abc"[k] for k in linear_places(intern(f), layouts, 5, 3, range(3))) == linear
