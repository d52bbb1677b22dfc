"""The public path of `dask_nlsq.model.ready`."""

from .model import ready as _source
from .model.ready import *  # noqa: F403

__doc__ = _source.__doc__
