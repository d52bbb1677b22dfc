"""Nonlinear least squares on data that do not fit in memory."""

from importlib import import_module

from . import config  # noqa: F401  (defaults of dask.config)

# public name -> room. Rooms are imported when a name is first used: `dask --help` loads this package, but not JAX.
_ROOMS = {"FitResult": "result", "Record": "trust_region", "curve_fit": "api"}

__all__ = [*_ROOMS]
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
