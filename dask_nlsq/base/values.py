"""Single values at the door: numbers, positive numbers, counts."""

import inspect
import math
import sys
from numbers import Integral, Real

import numpy as np

FLOAT_MAX = sys.float_info.max


# ---------------------------------------------------------------------------------------------------------------------
# numbers at the door


def is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def without_flags(value) -> bool:
    """Whether no True or False is among numbers, which NumPy would make 1 and 0 of."""
    if isinstance(value, (list, tuple)):
        return all(map(without_flags, value))
    return not isinstance(value, (bool, np.bool_))


def takes(function, n: int) -> bool:
    """Whether a function can be called with ``n`` values, perhaps by its defaults."""
    try:
        inspect.signature(function).bind(*range(n))
    except TypeError:
        return False
    except ValueError:  # builtins and ufuncs have no signature
        return True
    return True


def real(name: str, value, unit: str = "") -> float:
    """``value`` as a float; TypeError if it is not a real number, ValueError if it is not finite."""
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number{unit and ' of ' + unit}, not {value!r}")
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, not {value}")
    return number


def positive(name: str, value, unit: str = "") -> float:
    if real(name, value, unit) <= 0:
        raise ValueError(f"`{name}` must be more than 0{unit and ' ' + unit}, not {value}")
    return float(value)


def count(name: str, value, least: float = 1) -> int:
    """``value`` as an integer of at least ``least``; 1e8 is one."""
    if real(name, value) != int(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, not {value}")
    return int(value)


def is_address(text: str) -> bool:
    """Whether it is not a path: a URL, or several of fsspec's in a row."""
    return "://" in text or "::" in text
