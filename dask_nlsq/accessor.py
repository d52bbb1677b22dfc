"""The public path of `dask_nlsq.interface.accessor`."""

from .interface import accessor
from .interface.accessor import Accessor as Accessor

__doc__ = accessor.__doc__
