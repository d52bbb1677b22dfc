"""The public path of `dask_nlsq.results.statistics`."""

from .results import statistics
from .results.statistics import *  # noqa: F403

__doc__ = statistics.__doc__
