"""The public path of `dask_nlsq.results.statistics`."""

from .results import statistics as _source
from .results.statistics import *  # noqa: F403

__doc__ = _source.__doc__
