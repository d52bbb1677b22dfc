"""The share of memory that a fit may take, and the parts that it is made of."""

import logging
import math
import os
import warnings
from numbers import Real
from typing import Any, Literal, NamedTuple

from ..base.text import GB
from .machine import Method, active_client, detect_memory, workers_memory

logger = logging.getLogger("dask_nlsq")


DEFAULT_MEMORY_FRACTION = 0.75
MEMORY_FRACTION_ENV_VAR = "NLSQ_MEMORY_FRACTION"
MIN_MEMORY_FRACTION, MAX_MEMORY_FRACTION = 0.1, 0.9
FALLBACK_THRESHOLD_GB = 16.0
SVD_SHARE = 0.3  # of J, that a singular value decomposition works on

Strategy = Literal["standard", "chunked", "streaming"]


# ---------------------------------------------------------------------------------------------------------------------
# how much there is


def effective_fraction(argument: float | None = None) -> tuple[float, Literal["argument", "env", "default"]]:
    """The share of memory that a fit may take, and where it comes from; see `get_adaptive_memory_threshold`."""
    fraction = DEFAULT_MEMORY_FRACTION
    source: Literal["argument", "env", "default"] = "default"
    text = os.environ.get(MEMORY_FRACTION_ENV_VAR)
    if argument is not None:
        fraction, source = _fraction(argument), "argument"
    elif text is not None:
        try:
            fraction, source = _fraction(float(text)), "env"
        except ValueError:
            _warn(f"{MEMORY_FRACTION_ENV_VAR}={text!r} is not a number: {DEFAULT_MEMORY_FRACTION} is used", 3)
    clamped = min(max(fraction, MIN_MEMORY_FRACTION), MAX_MEMORY_FRACTION)
    if clamped != fraction:
        limits = f"{MIN_MEMORY_FRACTION} to {MAX_MEMORY_FRACTION}"
        _warn(f"memory fraction {fraction} (from {source}) lies outside {limits}: {clamped} is used", 3)
    return clamped, source


def _fraction(value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`memory_fraction` must be a number from {MIN_MEMORY_FRACTION} to {MAX_MEMORY_FRACTION}, not {value!r}"
        )
    if math.isnan(value):
        raise ValueError("`memory_fraction` must not be nan: leave it out for the default")
    return float(value)


def _warn(message, level):
    warnings.warn(message, UserWarning, stacklevel=level + 1)


def get_adaptive_memory_threshold(memory_fraction=None, client=None) -> tuple[float, dict[str, Any]]:
    """How many GiB a fit may take: a fraction of all the memory there is.

    Parameters
    ----------
    memory_fraction : float, optional
        Share of the memory, clamped to 0.1 ... 0.9. None: the environment variable ``NLSQ_MEMORY_FRACTION``, else 0.75.
    client : distributed.Client, False or None
        The memory is that of the workers of this client together, of the active one by default. False, or no client:
        this process.

    Returns
    -------
    threshold_gb : float
    info : dict
        ``total_memory_gb``, ``memory_fraction``, ``source`` ("argument", "env" or "default") and ``detection_method``
        ("psutil", "sysconf", "cgroup-v1", "cgroup-v2", "workers" or "fallback").

    Raises
    ------
    TypeError, ValueError
        A fraction that is not a number.

    Warns
    -----
    UserWarning
        A fraction that was clamped, an environment variable that is no number, memory that cannot be detected (the
        threshold is 16 GiB then, and ``total_memory_gb`` 0).
    """
    fraction, source = effective_fraction(memory_fraction)
    return threshold_of(fraction, source, client)


def threshold_of(fraction: float, source: str, client) -> tuple[float, dict[str, Any]]:
    client = active_client(client)
    method: Method
    total, method = detect_memory()
    if client is not None:
        total, method = sum((workers_memory(client) or {}).values()) or None, "workers"
    if total is None:
        whose = "of this system" if client is None else "of the workers (there may be none yet: client.wait_for_workers(1))"
        _warn(f"the memory {whose} cannot be detected: {FALLBACK_THRESHOLD_GB:g} GiB are taken as the threshold", 3)
        total, method = 0.0, "fallback"
    threshold_gb = total / GB * fraction if total else FALLBACK_THRESHOLD_GB
    logger.info(
        "memory threshold %.2f GiB: %.0f %% (%s) of %.2f GiB (%s)", threshold_gb, 100 * fraction, source, total / GB, method
    )
    return threshold_gb, dict(total_memory_gb=total / GB, memory_fraction=fraction, source=source, detection_method=method)


# ---------------------------------------------------------------------------------------------------------------------
# how much a fit takes


class Parts(NamedTuple):
    """Bytes of each part of a fit."""

    data: float
    jacobian: float
    residual: float
    normal: float  # J^T J

    @property
    def peak(self) -> float:
        return self.data + (1 + SVD_SHARE) * self.jacobian + self.residual + self.normal


def fit_parts(n_points: int, n_params: int, n_features: int = 1, dtype_bytes: float = 8) -> Parts:
    """The formulas of this module; n_points = 1 and 0 give their slope and intercept."""
    return Parts(
        data=n_points * (n_features + 1) * dtype_bytes,
        jacobian=n_points * n_params * dtype_bytes,
        residual=n_points * dtype_bytes,
        normal=n_params**2 * dtype_bytes,
    )


def even_chunks(n_points: int, room: float, per_point: float, fixed: float = 0.0) -> tuple[int, int]:
    """Size and number of the fewest chunks, as even as can be, that take at most ``room`` bytes each.

    Raises
    ------
    MemoryError
        Where not even one point fits.
    """
    largest = min(int((room - fixed) // per_point), n_points)
    if largest < 1:
        raise MemoryError(
            f"a single point takes {(fixed + per_point) / GB:.3g} GiB with what belongs to all points, and there are "
            f"{room / GB:.3g} GiB: raise the memory limit, or fit fewer parameters"
        )
    n_chunks = -(-n_points // largest)
    size = -(-n_points // n_chunks)
    return size, -(-n_points // size)
