"""The public path of `dask_nlsq.watch.live_page`."""

from .watch import live_page as _source
from .watch.live_page import dask_setup as dask_setup

__doc__ = _source.__doc__
