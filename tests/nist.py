"""NIST's 27 nonlinear regression problems (Statistical Reference Datasets), and how many certified digits a fit reaches.

The files in `nist/` are NIST's own (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml): y is the first column, the
certified values carry eleven digits, and each problem is to be solved from two starts, one far and one near.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import dask.array as da
import jax.numpy as jnp
import numpy as np

import dask_nlsq

FILES = Path(__file__).parent / "nist"
MAX_DIGITS = 16.0  # float64 holds no more


class Problem(NamedTuple):
    """One dataset, its model `f(x, *params)` and its certified answer; p params, n points."""

    name: str
    model: Callable
    x: np.ndarray | tuple[np.ndarray, ...]  # (n,), or one (n,) array per predictor
    y: np.ndarray  # (n,)
    starts: np.ndarray  # (2, p)
    certified: np.ndarray  # (p,)
    errors: np.ndarray  # (p,) certified standard errors
    rss: float
    dof: int


class Digits(NamedTuple):
    """Correct digits of the worst param and of the worst standard error."""

    params: float
    errors: float


# ---------------------------------------------------------------- the models


def exponential_rise(x, b1, b2):
    return b1 * (1 - jnp.exp(-b2 * x))


def damped_hyperbola(x, b1, b2, b3):
    return jnp.exp(-b1 * x) / (b2 + b3 * x)


def three_exponentials(x, b1, b2, b3, b4, b5, b6):
    return b1 * jnp.exp(-b2 * x) + b3 * jnp.exp(-b4 * x) + b5 * jnp.exp(-b6 * x)


def two_gaussians(x, b1, b2, b3, b4, b5, b6, b7, b8):
    return b1 * jnp.exp(-b2 * x) + b3 * jnp.exp(-(((x - b4) / b5) ** 2)) + b6 * jnp.exp(-(((x - b7) / b8) ** 2))


def quadratic_over_quadratic(x, b1, b2, b3, b4, b5):
    return (b1 + x * (b2 + x * b3)) / (1 + x * (b4 + x * b5))


def cubic_over_cubic(x, b1, b2, b3, b4, b5, b6, b7):
    return (b1 + x * (b2 + x * (b3 + x * b4))) / (1 + x * (b5 + x * (b6 + x * b7)))


def bennett5(x, b1, b2, b3):
    return b1 * (b2 + x) ** (-1 / b3)


def danwood(x, b1, b2):
    return b1 * x**b2


def eckerle4(x, b1, b2, b3):
    return b1 / b2 * jnp.exp(-0.5 * ((x - b3) / b2) ** 2)


def enso(x, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    year, cycle1, cycle2 = 2 * jnp.pi * x / 12, 2 * jnp.pi * x / b4, 2 * jnp.pi * x / b7
    return (
        b1
        + b2 * jnp.cos(year)
        + b3 * jnp.sin(year)
        + b5 * jnp.cos(cycle1)
        + b6 * jnp.sin(cycle1)
        + b8 * jnp.cos(cycle2)
        + b9 * jnp.sin(cycle2)
    )


def mgh09(x, b1, b2, b3, b4):
    return b1 * x * (x + b2) / (x * (x + b3) + b4)


def mgh10(x, b1, b2, b3):
    return b1 * jnp.exp(b2 / (x + b3))


def mgh17(x, b1, b2, b3, b4, b5):
    return b1 + b2 * jnp.exp(-x * b4) + b3 * jnp.exp(-x * b5)


def misra1b(x, b1, b2):
    return b1 * (1 - (1 + b2 * x / 2) ** -2)


def misra1c(x, b1, b2):
    return b1 * (1 - 1 / jnp.sqrt(1 + 2 * b2 * x))


def misra1d(x, b1, b2):
    return b1 * b2 * x / (1 + b2 * x)


def nelson(x, b1, b2, b3):
    time, temperature = x
    return b1 - b2 * time * jnp.exp(-b3 * temperature)


def rat42(x, b1, b2, b3):
    return b1 / (1 + jnp.exp(b2 - b3 * x))


def rat43(x, b1, b2, b3, b4):
    return b1 / (1 + jnp.exp(b2 - b3 * x)) ** (1 / b4)


def roszman1(x, b1, b2, b3, b4):
    return b1 - b2 * x - jnp.arctan(b3 / (x - b4)) / jnp.pi


MODELS = {
    "Bennett5": bennett5,
    "BoxBOD": exponential_rise,
    "Chwirut1": damped_hyperbola,
    "Chwirut2": damped_hyperbola,
    "DanWood": danwood,
    "ENSO": enso,
    "Eckerle4": eckerle4,
    "Gauss1": two_gaussians,
    "Gauss2": two_gaussians,
    "Gauss3": two_gaussians,
    "Hahn1": cubic_over_cubic,
    "Kirby2": quadratic_over_quadratic,
    "Lanczos1": three_exponentials,
    "Lanczos2": three_exponentials,
    "Lanczos3": three_exponentials,
    "MGH09": mgh09,
    "MGH10": mgh10,
    "MGH17": mgh17,
    "Misra1a": exponential_rise,
    "Misra1b": misra1b,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Nelson": nelson,
    "Rat42": rat42,
    "Rat43": rat43,
    "Roszman1": roszman1,
    "Thurber": cubic_over_cubic,
}

# ---------------------------------------------------------------- the files


def read(name: str) -> Problem:
    """Parse one file; two slips of the files are put right here.

    Rat43's file counts 9 degrees of freedom where 15 points and 4 params leave 11 (its standard errors use 11).
    Nelson's model describes log(y).
    """
    lines = (FILES / f"{name}.dat").read_text().splitlines()
    header = "\n".join(lines)

    def number_after(label):
        return float(re.search(rf"^{label}:\s*(\S+)", header, re.MULTILINE).group(1))

    first, last = map(int, re.search(r"Data\s+\(lines\s+(\d+)\s+to\s+(\d+)\)", header).groups())
    columns = np.array([line.split() for line in lines[first - 1 : last]], dtype=float).T
    # "b1 =   start 1   start 2   certified value   standard error", one line per param
    params = np.array(re.findall(r"^\s*b\d+ =" + r"\s+(\S+)" * 4, header, re.MULTILINE), dtype=float).T
    y, *predictors = columns
    return Problem(
        name=name,
        model=MODELS[name],
        x=predictors[0] if len(predictors) == 1 else tuple(predictors),
        y=np.log(y) if name == "Nelson" else y,
        starts=params[:2],
        certified=params[2],
        errors=params[3],
        rss=number_after("Residual Sum of Squares"),
        dof=11 if name == "Rat43" else int(number_after("Degrees of Freedom")),
    )


PROBLEMS = {name: read(name) for name in MODELS}

# ---------------------------------------------------------------- the measurement

VARIANTS = {
    "standard": {"strategy": "standard"},
    "chunked gram": {"strategy": "chunked", "reduction": "gram"},
    "chunked qr": {"strategy": "chunked", "reduction": "qr"},
}
TIGHT = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 5000}


def digits(found, certified) -> float:
    """Correct digits of the worst entry: -log10(max |found - certified| / |certified|), 0 where it is not finite."""
    error = np.max(np.abs((np.asarray(found) - certified) / certified))
    if not np.isfinite(error):
        return 0.0
    return float(min(MAX_DIGITS, -np.log10(max(error, 10**-MAX_DIGITS))))


def in_three_blocks(array: np.ndarray) -> da.Array:
    return da.from_array(array, chunks=-(-array.size // 3))


# Where the standard errors are compared as multiples of the residual standard deviation, and why.
ERRORS_IN_RESIDUALS = {
    "Lanczos1": "its residuals (rms 9e-14) stand on the last printed digits of the data: rounding those to float64 changes "
    "the residual sum of squares by 9e-4, so that no float64 fit has more than 3.4 digits of the standard errors"
}


def run(problem: Problem, start: int, variant: str) -> Digits:
    """Fit from start 0 or 1 and count digits; a fit that gives up has none."""
    x, y = problem.x, problem.y
    if variant != "standard":
        x = tuple(map(in_three_blocks, x)) if isinstance(x, tuple) else in_three_blocks(x)
        y = in_three_blocks(y)
    try:
        fit = dask_nlsq.curve_fit(problem.model, x, y, p0=problem.starts[start], **TIGHT, **VARIANTS[variant])
    except RuntimeError:
        return Digits(0.0, 0.0)
    errors, certified_errors = fit.perr, problem.errors
    if problem.name in ERRORS_IN_RESIDUALS:
        errors = errors / np.sqrt(2 * fit.cost / problem.dof)
        certified_errors = certified_errors / np.sqrt(problem.rss / problem.dof)
    return Digits(digits(fit.popt, problem.certified), digits(errors, certified_errors))


# Near-singular problems: rounding of the residuals alone moves the optimum by more than nine digits allow.
SIX_DIGITS = ("Lanczos1", "Lanczos2", "Lanczos3", "Bennett5", "MGH10")


def required(problem: Problem) -> Digits:
    return Digits(params=6 if problem.name in SIX_DIGITS else 9, errors=6)
