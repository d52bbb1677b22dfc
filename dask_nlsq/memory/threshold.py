"""The share of memory that a fit may take."""

import os
import warnings
from math import isnan, nan
from numbers import Real
from typing import Literal

DEFAULT_MEMORY_FRACTION = 0.75
MIN_MEMORY_FRACTION, MAX_MEMORY_FRACTION = 0.1, 0.9
MEMORY_FRACTION_ENV_VAR = "NLSQ_MEMORY_FRACTION"

Strategy = Literal["standard", "chunked", "streaming"]
Source = Literal["argument", "env", "default"]


def effective_fraction(argument: float | None = None) -> tuple[float, Source]:
    """The share of memory that a fit may take, and what says so: ``argument``, the environment variable, or the default.

    TypeError or ValueError for an argument that is not a number. A warning, at the caller of the caller, for a share outside
    0.1 to 0.9, which is clamped, and for a variable that is not a number.
    """
    source: Source = "default"
    fraction = DEFAULT_MEMORY_FRACTION
    text = os.environ.get(MEMORY_FRACTION_ENV_VAR)
    limits = f"{MIN_MEMORY_FRACTION} to {MAX_MEMORY_FRACTION}"
    if argument is not None:
        if isinstance(argument, bool) or not isinstance(argument, Real):
            raise TypeError(f"`memory_fraction` must be a number from {limits}, not {argument!r}")
        if isnan(argument):
            raise ValueError("`memory_fraction` must not be nan: leave it out for the default")
        fraction, source = float(argument), "argument"
    elif text is not None:
        try:
            given = float(text)
        except ValueError:
            given = nan
        if isnan(given):
            warnings.warn(f"{MEMORY_FRACTION_ENV_VAR}={text!r} is not a number: {fraction} is used", stacklevel=3)
        else:
            fraction, source = given, "env"
    clamped = min(max(fraction, MIN_MEMORY_FRACTION), MAX_MEMORY_FRACTION)
    if clamped != fraction:
        message = f"memory fraction {fraction} (from {source}) lies outside {limits}: {clamped} is used"
        warnings.warn(message, stacklevel=3)
    return clamped, source
