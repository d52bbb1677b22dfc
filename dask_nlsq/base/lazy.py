"""Libraries that take long to import, loaded when a name of theirs is first used.

Together they take more than JAX does, and a process that only asks for help, or plans, needs none of them. SciPy does
the same for its own subpackages.
"""

from importlib import import_module
from typing import TYPE_CHECKING


class LazyModule:
    """A module by its name; what is asked of it is asked of the module, which is imported then."""

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, attribute: str):
        return getattr(import_module(self.__name__), attribute)


if TYPE_CHECKING:
    import dask.array as da
    import zarr
else:
    da = LazyModule("dask.array")
    zarr = LazyModule("zarr")

__all__ = ["da", "zarr"]
