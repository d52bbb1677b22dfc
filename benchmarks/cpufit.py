"""Maps against Cpufit, the C++ library, in double precision: ``python -m benchmarks.cpufit LIBRARY``.

LIBRARY is the shared library of Cpufit (github.com/gpufit/Gpufit), in double precision: build it by its own instructions.
Two threads call it, each with half of the pixels: ctypes releases the GIL, and fits share nothing but the last error.
"""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from .maps import CASES, fit
from .run import Row, medians

THREADS = 2
TOLERANCES = (1e-4, 1e-6)  # change of chi2 that ends a fit: that of Cpufit's own comparison with Gpufit, and a tighter one
MAX_ITERATIONS = 1000
GAUSS_1D, LEAST_SQUARES, LOWER_UPPER, CONVERGED = 0, 0, 3, 0  # as Gpufit's constants.h numbers them


def pointer(dtype):
    return np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS")


def load(path):
    """The library, once it has found the parameters of a pixel without noise; it does not in single precision."""
    if not Path(path).is_file():
        sys.exit(f"{path} is not a file: give the path of Cpufit's shared library, built in double precision")
    library = ctypes.CDLL(str(Path(path).resolve()))
    real, whole, size, count = pointer(np.float64), pointer(np.intc), ctypes.c_size_t, ctypes.c_int
    begin, box = [size, size, real, ctypes.c_void_p, count, real], [real, whole]
    end = [ctypes.c_double, count, whole, count, size, real, real, whole, real, whole]
    library.cpufit.argtypes = begin + end
    library.cpufit_get_last_error.restype = ctypes.c_char_p
    if hasattr(library, "cpufit_constrained"):
        library.cpufit_constrained.argtypes = begin + box + end
    case = CASES["gauss"]
    truth = np.array([[6.0, 0.5, 1.2, 0.7]])
    found, _ = call(library, case, case.f(case.x, *truth[0])[None], False, 1e-12)
    if not np.allclose(found, truth, rtol=1e-4):
        sys.exit(f"{path} does not find the parameters of a pixel without noise: was it built in double precision?")
    return library


def call(library, case, y, bounded, tolerance):
    """Parameters (m, 4) and states (m,) of the pixels y (m, n), in one thread."""
    m, n = y.shape
    start = np.tile(np.array(case.p0, float), (m, 1))
    popt, state = np.empty_like(start), np.empty(m, np.intc)
    box = [np.tile(np.transpose(case.bounds).ravel().astype(float), (m, 1)), np.full(4, LOWER_UPPER, np.intc)]
    function = library.cpufit_constrained if bounded else library.cpufit
    failed = function(
        m, n, y, None, GAUSS_1D, start, *(box if bounded else ()), tolerance, MAX_ITERATIONS, np.ones(4, np.intc),
        LEAST_SQUARES, case.x.nbytes, case.x, popt, state, np.empty(m), np.empty(m, np.intc),
    )  # fmt: skip
    if failed:
        raise RuntimeError(library.cpufit_get_last_error().decode())
    return popt, state


def in_threads(library, case, y, bounded, tolerance):
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda part: call(library, case, part, bounded, tolerance), np.array_split(y, THREADS))
        popt, state = map(np.concatenate, zip(*parts, strict=True))
    return popt, state


def same_sign(popt):
    """Parameters with positive widths: a Gaussian of width -w is that of w."""
    return np.where(np.arange(4) == 2, np.abs(popt), popt)


def rows(library, n=100_000):
    import dask

    case = CASES["gauss"]
    _, y = case.data((n,))
    for bounded in (False, True)[: 1 + hasattr(library, "cpufit_constrained")]:
        for tolerance in TOLERANCES:
            theirs = partial(in_threads, library, case, y, bounded, tolerance)
            with dask.config.set(num_workers=THREADS):
                mine = fit(case, y, bounded).compute
                seconds = medians(mine, theirs)
                found, (popt, state) = mine(), theirs()
            far = np.abs(same_sign(popt) - same_sign(found.popt)) / found.perr
            agree = np.mean(far.max(axis=1) < 0.01)
            ours, cpufit = (n / each for each in seconds)
            kind = "bounded" if bounded else "unbounded"
            yield Row(
                f"maps, ours / Cpufit (C++, double, {THREADS} threads): {kind}, {tolerance:.0e}",
                "1.5 (3)",
                f"{ours / cpufit:.2f}",
                f"{ours:,.0f} / {cpufit:,.0f} fits/s, {n} pixels; agree within 0.01 standard errors: {agree:.2%}; "
                f"converged: {np.mean(found.success):.2%} / {np.mean(state == CONVERGED):.2%}",
            )


def main(arguments):
    if len(arguments) != 1:
        sys.exit("usage: python -m benchmarks.cpufit LIBRARY, the path of Cpufit's shared library in double precision")
    for row in rows(load(arguments[0])):
        print(f"{row.figure:<75}{row.required:<10}{row.measured:<8}{row.how}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
