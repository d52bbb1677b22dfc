"""Random calls: each works, or has one error that names an argument.

``FUZZ_SEED=1 make test-slow`` repeats a run; a failure prints its seed, and the call.
"""

import os
import random
import re
import reprlib
import signal
import warnings
from contextlib import contextmanager

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import dask_nlsq
from dask_nlsq.options import FITS, GROUPS, MAPS, WORKFLOWS
from dask_nlsq.prepare import HELD

X = np.linspace(0.0, 1.0, 24)
Y = 2 * np.exp(-X) + 0.01 * np.cos(20 * X)
ROWS = np.stack([Y, 2 * Y, 3 * Y])
LONGEST = 30  # seconds of a call


def decay(x, a, b):
    return a * jnp.exp(-b * x)


VALUES = [
    None, True, False, 0, 1, -1, 2, 2.5, -0.0, 1e-300, 1e300, 10**400, float("nan"), float("inf"), 1j, "", "a", "b", "auto",
    "guess", "poisson", "no/such/path", "http://", b"x", object(), int, len, decay, lambda: 1, lambda x: x, Ellipsis,
    slice(3), range(3), (), [], {}, set(), {1, 2}, {"a"}, frozenset("ab"), (1,), [1, 2], [1, 2, 3], [[1, 2], [3]], [[1, 2]],
    [None, 1], ["a", "b"], ["a", "a"], ("b", "a"), ["a", 1], [1j, 1], [True, 1], [0, np.nan], [X], (X, X), (X, None),
    {"a": 1}, {"a": 1.0, "b": 2}, {"a": None}, {"b": (0, 9)}, {"a": (None, None)}, {"a": [1, 2, 3]}, {"q": 1}, {1: 2},
    {"a": "1"}, (0, 9), (9, 0), (0, np.inf), ([0, 0], [9, 9]), ([0], [9, 9]), (None, None), (0, None), np.float32(2),
    np.int64(3), np.True_, np.array(1.0), np.arange(2.0), np.arange(3.0), np.arange(3), np.array([]), np.array(["a", "b"]),
    np.array([1j, 2]), np.array([object()]), np.array([None, 1]), X, Y, X > 0.5, X[:-1], X[::-1], np.stack([X, X]),
    np.eye(24), np.eye(2), ROWS, ROWS.T, ROWS > 2, np.full_like(Y, np.nan), np.zeros_like(Y), -Y, np.ma.masked_less(Y, 1.0),
    np.ma.masked_all(2), np.array(["2026-01-01"] * 24, "M8[D]"), np.array(["NaT"] * 24, "m8[s]"), da.from_array(Y, 10),
    da.from_array(X, 24), da.from_array(ROWS, (2, 24)), da.from_array(Y, 10)[da.from_array(Y, 10) > 1], da.zeros(3),
    xr.DataArray(Y, dims="t", coords={"t": X}), xr.DataArray(ROWS, dims=("p", "t"), coords={"t": X}), jnp.asarray(Y),
    np.rec.array([(1, 2.0)] * 24), memoryview(b"abc"), iter([1, 2]), (k for k in (1, 2)), Exception("e"),
]  # fmt: skip
ONE = dict(f=decay, xdata=X, ydata=Y)
MANY = dict(f=decay, xdata=X, ydata=ROWS, p0=[1.5, 0.5])
DATA = ["f", "xdata", "ydata"]
WAYS = {  # a function, a call that works, and its arguments
    "curve_fit": (dask_nlsq.curve_fit, ONE, [*DATA, *FITS]),
    "fit": (dask_nlsq.fit, ONE, [*DATA, *FITS, *WORKFLOWS]),
    "plan_fit": (dask_nlsq.plan_fit, ONE, [*DATA, *FITS, *WORKFLOWS, *GROUPS]),
    "fit_map": (lambda **call: dask_nlsq.fit_map(**call).compute(), MANY, [*DATA, *MAPS]),
    "fit_groups": (dask_nlsq.fit_groups, dict(MANY, local="a", group_axes=0), [*DATA, *GROUPS]),
    "hold": (lambda **call: dask_nlsq.hold(**call).close(), dict(xdata=X, ydata=Y), ["xdata", "ydata", *HELD]),
}
NAMES = re.compile(rf"\b({'|'.join({'model', *DATA, *FITS, *WORKFLOWS, *GROUPS, *MAPS})})\b")
EXPECTED = (ValueError, TypeError, MemoryError, OSError, dask_nlsq.NotConvergedError)


@contextmanager
def time_limit():
    def stop(*_):
        raise AssertionError("it hangs")

    before, left = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)  # of pytest-timeout


def drawn(rng):
    """A call with one to three arguments in place of those that work."""
    name = rng.choice(sorted(WAYS))
    function, call, arguments = WAYS[name]
    others = {argument: rng.choice(VALUES) for argument in rng.sample([*dict.fromkeys(arguments)], rng.choice([1, 1, 2, 3]))}
    return name, function, call | others, ", ".join(f"{argument}={short(value)}" for argument, value in others.items())


def short(value):
    return reprlib.repr(value) if not hasattr(value, "dtype") else f"{type(value).__name__} {value.dtype} {value.shape}"


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_random_call_works_or_its_error_names_an_argument(n, tmp_path, monkeypatch):
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(10**6))
    print(f"FUZZ_SEED={seed}")
    rng, wrong = random.Random(seed), []
    monkeypatch.chdir(tmp_path)  # into which words as paths lead
    for _ in range(n):
        name, function, call, others = drawn(rng)
        with warnings.catch_warnings(), time_limit():
            warnings.simplefilter("ignore")
            try:
                function(**call)
            except EXPECTED as err:
                if not NAMES.search(str(err)):
                    wrong.append(f"{name}({others}): {type(err).__name__} without a name: {err}")
            except Exception as err:
                wrong.append(f"{name}({others}): {type(err).__name__}: {err}")
    assert not wrong, "\n".join([f"FUZZ_SEED={seed}, {len(wrong)} of {n}", *(each[:400] for each in wrong)])
