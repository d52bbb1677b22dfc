"""The public path of `dask_nlsq.interface.live_page`."""

from .interface import live_page as _source
from .interface.live_page import dask_setup as dask_setup

__doc__ = _source.__doc__
