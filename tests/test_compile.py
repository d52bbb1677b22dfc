"""What is compiled with long vectors has the values that it has with short ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dask_nlsq
from dask_nlsq.base.compile import COMPARED, LONG, WRONG, Compiled, options_of

# elementwise functions of JAX, to which the others come down
UNARY = """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1
    floor lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh reciprocal
"""
BINARY = "add sub mul div rem pow max min atan2 nextafter"
COMPLEX = "abs cos cosh exp expm1 log log1p sin sinh sqrt tan tanh real imag conj acos acosh asin asinh atanh"
RNG = np.random.default_rng(0)
REAL = np.concatenate(
    [
        RNG.uniform(-3, 3, 400),
        RNG.uniform(-1e3, 1e3, 200),
        10.0 ** RNG.uniform(-30, 30, 400) * RNG.choice([-1, 1], 400),
        [0.0, -0.0, 1, -1, 0.5, np.inf, -np.inf, np.nan, 1e-310, 708, -745],
    ]
)


def check(function, *args):
    with jax.enable_x64(True):
        short, long = (np.asarray(jax.jit(function, compiler_options=each)(*args)) for each in ({}, LONG))
    with np.errstate(all="ignore"):
        same = (long == short) | (np.isnan(long) & np.isnan(short))
        close = np.abs(long - short) <= 16 * np.finfo(short.dtype).eps * np.abs(short)
    assert np.all(same | close), (long[~(same | close)][:3], short[~(same | close)][:3])


@pytest.mark.parametrize("name", [each for each in UNARY.split() if each not in WRONG])
def test_functions_of_long_vectors_are_right(name):
    check(getattr(lax, name), REAL)


@pytest.mark.parametrize("name", BINARY.split())
def test_functions_of_two_long_vectors_are_right(name):
    check(getattr(lax, name), REAL, np.roll(REAL, 7))


@pytest.mark.parametrize("name", COMPLEX.split())
def test_functions_of_long_complex_vectors_are_right(name):
    check(getattr(lax, name), REAL[:1000] + 1j * np.roll(REAL[:1000], 7))


def test_functions_that_long_vectors_get_wrong_keep_to_short_ones():
    x = np.linspace(-20, 20, 4096)

    def within(x):
        return lax.fori_loop(0, 3, lambda k, sum: sum + jnp.arctan(x), jnp.zeros_like(x))

    with jax.enable_x64(True):
        assert options_of(jax.make_jaxpr(within)(x)) == {}
        assert options_of(jax.make_jaxpr(jnp.exp)(x)) == (LONG if COMPARED else {})
        np.testing.assert_allclose(Compiled(within)(x), 3 * np.arctan(x), rtol=1e-14)


def test_a_model_with_an_arctangent_is_fitted():
    def step(x, height, center, width, base):
        return height * jnp.arctan((x - center) / width) + base

    x = np.linspace(-5, 5, 20_000)
    y = 3 * np.arctan((x - 0.5) / 0.3) + 1 + 0.1 * np.random.default_rng(1).standard_normal(len(x))
    result = dask_nlsq.curve_fit(step, x, y, p0=[1, 0, 1, 0])
    truth = np.array([3, 0.5, 0.3, 1])
    assert np.all(np.abs(result.popt - truth) < 5 * result.perr)
