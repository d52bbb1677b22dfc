"""The public path of `dask_nlsq.interface.accessor`."""

from .interface import accessor as _source
from .interface.accessor import Accessor as Accessor

__doc__ = _source.__doc__
