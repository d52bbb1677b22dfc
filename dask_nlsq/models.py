"""The public path of `dask_nlsq.model.ready`."""

from .model import ready
from .model.ready import *  # noqa: F403

__doc__ = ready.__doc__
