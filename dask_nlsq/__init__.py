"""Nonlinear least squares on data that do not fit in memory."""

from . import config  # noqa: F401
from .api import curve_fit
from .result import FitResult
from .trust_region import Record

__all__ = ["FitResult", "Record", "curve_fit"]
__version__ = "0.1.0"
