"""The public path of `dask_nlsq.results.plots`."""

from .results import plots
from .results.plots import *  # noqa: F403

__doc__ = plots.__doc__
