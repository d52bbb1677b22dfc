"""How many digits of a value and of its error are written."""

import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import curve_fit
from dask_nlsq.base.text import measured, relative


@pytest.mark.parametrize(
    ("value", "error", "written"),
    [
        (20.0702, 0.04312, ("20.070", "0.043")),
        (20.0, 0.0996, ("20.00", "0.10")),  # rounded before its digits are counted
        (68480.52, 1234.0, ("68500", "1200")),
        (0.00199104, 1.24e-6, ("0.0019910", "0.0000012")),
        (6e-5, 1.2e-6, ("6.00e-05", "0.12e-05")),  # both with the exponent of the larger
        (1.5e10, 3e3, ("1.50000000e+10", "0.00000030e+10")),
        (-1e-6, 0.05, ("0.000", "0.050")),
        (0.3, 2.7417553620635461e22, ("0.3", "2.7e+22")),
        (2.0000712345, 0.0, ("2.00007123", "0")),
        (1.25, np.inf, ("1.25", "inf")),
        (np.nan, np.nan, ("nan", "nan")),
        (1.0, 1e-20, ("1", "1e-20")),
        (1e300, 1e299, ("1.00e+300", "0.10e+300")),
    ],
)
def test_two_significant_digits_of_the_error_rule_the_digits_of_the_value(value, error, written):
    assert measured(value, error) == written


def test_all_digits_are_written_where_they_are_asked_for():
    assert measured(np.float64(1 / 3), np.float64(0.1), full=True) == ("0.3333333333333333", "0.1")


@pytest.mark.parametrize(
    ("value", "error", "written"),
    [
        (2.0, 0.043, "2.15%"),
        (1.0, 8.04e-5, "0.008%"),
        (1.0, 2e-7, "2e-05%"),
        (1e-20, 2.7e2, ">999%"),
        (0.0, 1.0, ""),
        (1.0, np.inf, ""),
    ],
)
def test_a_relative_error_that_says_nothing_has_no_digits(value, error, written):
    assert relative(value, error) == written


def test_every_table_of_a_result_has_the_same_digits():
    x = np.linspace(0, 10, 400)
    y = 20 * np.exp(-0.5 * x) + np.random.default_rng(0).normal(0, 0.2, 400)
    found = curve_fit(lambda x, height, rate: height * jnp.exp(-rate * x), x, y, p0=[10, 1])
    value, error = measured(found.popt[0], found.perr[0])
    assert len(error.lstrip("0.")) == 2
    assert f"{value}  +- {error}" in found.summary() and f"{value}   +- {error}" not in found.summary(format="full")
    assert repr(float(found.popt[0])) in found.summary(format="full")
    assert f"<td>{value}</td><td>± {error}</td>" in found._repr_html_()
    assert f"{found['height']}" == f"{value} +- {error}" and f"{found['height']:.1f}" == value[:4]
    assert f"{found['height']:full}".startswith(repr(float(found.popt[0])))
    with pytest.raises(ValueError, match="`format` must be 'short' or 'full', not 'long'"):
        found.summary(format="long")
