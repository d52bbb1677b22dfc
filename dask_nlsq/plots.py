"""The public path of `dask_nlsq.results.plots`."""

from .results import plots as _source
from .results.plots import *  # noqa: F403

__doc__ = _source.__doc__
