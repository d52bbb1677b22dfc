"""The public path of `dask_nlsq.results.plots` and of `dask_nlsq.maps.pictures`."""

from .maps.pictures import maps, spectrum  # noqa: F401
from .results import plots as _source
from .results.plots import *  # noqa: F403

__doc__ = _source.__doc__
