"""The public path of `dask_nlsq.model.ready`."""

from .model import ready as _source
from .model.ready import *  # noqa: F403
from .model.ready import __getattr__  # noqa: F401  (of sums)

__doc__ = _source.__doc__
