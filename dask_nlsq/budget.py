"""How much memory a fit takes, how much it may take, and what follows: arithmetic on metadata, nothing is computed.

For n points of k coordinates and p parameters, with b bytes per number:

    data       n (k + 1) b     x and y
    jacobian   n p b           J
    solver     p^2 b + n b     J^T J and the residual
    peak       data + 1.3 jacobian + solver, since an SVD of J works on 0.3 of its size

Gigabytes are GiB, 2^30 bytes, throughout.
"""

import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from .resources import Method, active_client, available_memory, detect_memory, workers_memory

logger = logging.getLogger("dask_nlsq")

GB = 2**30  # bytes
DEFAULT_MEMORY_FRACTION = 0.75
FLOAT_MAX = sys.float_info.max
MEMORY_FRACTION_ENV_VAR = "NLSQ_MEMORY_FRACTION"
MIN_MEMORY_FRACTION, MAX_MEMORY_FRACTION = 0.1, 0.9
FALLBACK_THRESHOLD_GB = 16.0
SVD_SHARE = 0.3  # of J, that a singular value decomposition works on
JACOBIAN_OVERHEAD = 6.5  # J's at the peak of a fit that materialises J and its intermediates
LEAST_ROOM = 0.1  # of the threshold, for one chunk's Jacobian where data fill it: the margin of safety holds it

Strategy = Literal["standard", "chunked", "streaming"]


# ---------------------------------------------------------------------------------------------------------------------
# numbers at the door


def real(name: str, value, unit: str = "") -> float:
    """``value`` as a float; TypeError where it is no real number, ValueError where it is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number{unit and ' of ' + unit}, not {value!r}")
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, not {value}")
    return number


def positive(name: str, value, unit: str = "") -> float:
    if real(name, value, unit) <= 0:
        raise ValueError(f"`{name}` must be more than 0{unit and ' ' + unit}, not {value}")
    return float(value)


def count(name: str, value, least: float = 1) -> int:
    """``value`` as an integer of at least ``least``; 1e8 is one."""
    if real(name, value) != int(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, not {value}")
    return int(value)


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
    return _threshold(fraction, source, client)


def _threshold(fraction: float, source: str, client) -> tuple[float, dict[str, Any]]:
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


@dataclass(frozen=True)
class MemoryBudget:
    """What a fit takes and what it may take, in GiB.

    Attributes
    ----------
    available_gb : float
        Memory that is available: to this process now, or to the workers of a cluster, or as the user limits it.
    threshold_gb : float
        The part of it that a fit may take.
    data_gb, jacobian_gb, peak_gb : float
        What the data, the whole Jacobian and a fit that holds both take.
    n_points, n_params : int
        The size of the problem.
    """

    available_gb: float
    threshold_gb: float
    data_gb: float
    jacobian_gb: float
    peak_gb: float
    n_points: int = 0
    n_params: int = 0

    @property
    def fits_in_memory(self) -> bool:
        return self.peak_gb <= self.threshold_gb

    @property
    def data_fits(self) -> bool:
        return self.data_gb <= self.threshold_gb

    @property
    def strategy(self) -> Strategy:
        """Data above the threshold are "streaming", a peak above it is "chunked", else "standard"."""
        return "standard" if self.fits_in_memory else "chunked" if self.data_fits else "streaming"

    @property
    def reason(self) -> str:
        """The numbers that the strategy follows from."""
        threshold = f"the threshold of {_gib(self.threshold_gb)}"
        return {
            "standard": f"the peak of {_gib(self.peak_gb)} fits within {threshold}",
            "chunked": f"the data of {_gib(self.data_gb)} fit within {threshold}, the peak of {_gib(self.peak_gb)} does not",
            "streaming": f"the data of {_gib(self.data_gb)} exceed {threshold}",
        }[self.strategy]

    def chunks(self) -> tuple[int, int]:
        """Points per chunk and number of chunks, such that one chunk's Jacobian fits beside what is held.

        Held are all data for "chunked", and those of the chunk for "streaming".
        """
        if self.strategy == "standard":
            return self.n_points, 1
        n_points, parts = count("n_points", self.n_points), fit_parts(1, self.n_params)
        per_point, room = (1 + SVD_SHARE) * self.jacobian_gb * GB / n_points + parts.residual, self.threshold_gb
        if self.data_fits:
            room = max(self.threshold_gb - self.data_gb, LEAST_ROOM * self.threshold_gb)
        else:
            per_point += self.data_gb * GB / n_points
        return even_chunks(n_points, room * GB, per_point, parts.normal)

    def __str__(self):
        return (
            f"{self.strategy}: {self.reason} (Jacobian {_gib(self.jacobian_gb)}, available {_gib(self.available_gb)}, "
            f"{self.n_points:,} points, {self.n_params} parameters)"
        )

    @classmethod
    def compute(
        cls,
        n_points: int,
        n_params: int,
        n_features: int = 1,
        *,
        memory_limit_gb: float | None = None,
        safety_factor: float | None = None,
        dtype_bytes: int = 8,
        client=None,
    ) -> "MemoryBudget":
        """Budget of a fit of ``n_points`` points.

        Parameters
        ----------
        n_points, n_params, n_features : int
            Points, parameters, coordinates per point.
        memory_limit_gb : float, optional
            GiB that are available. None: what the workers of ``client`` have in all, or this process now.
        safety_factor : float, optional
            Share of them that a fit may take, up to 1. None: ``NLSQ_MEMORY_FRACTION``, else 0.75.
        dtype_bytes : int
            Bytes per number.
        client : distributed.Client, False or None
            As in `get_adaptive_memory_threshold`.

        Raises
        ------
        ValueError, TypeError
            Arguments that are not positive numbers.
        """
        n_points, n_params = count("n_points", n_points), count("n_params", n_params)
        parts = fit_parts(n_points, n_params, count("n_features", n_features), positive("dtype_bytes", dtype_bytes, "bytes"))
        return cls._weigh(n_points, n_params, parts, memory_limit_gb, safety_factor, client)

    @classmethod
    def from_arrays(
        cls, x, y, sigma=None, *, n_params: int, mask=None, memory_limit_gb=None, safety_factor=None, client=None
    ) -> "MemoryBudget":
        """Budget of a fit of these arrays, from their metadata; reads and computes nothing.

        Parameters
        ----------
        x, y, sigma, mask : NumPy, Dask, Zarr, xarray or h5py arrays, lists or None
            As in `dask_nlsq.curve_fit`; a tuple as ``x`` holds arrays that broadcast against ``y``, as small as they are.
        n_params, memory_limit_gb, safety_factor, client
            As in `compute`.

        Raises
        ------
        ValueError, TypeError
            As in `compute`; empty data, and Dask arrays of unknown chunk sizes.
        """
        named = {"y": y, "sigma": sigma, "mask": mask}
        named |= {f"x[{k}]": each for k, each in enumerate(x)} if isinstance(x, tuple) else {"x": x}
        sizes = {name: _size_and_bytes(name, array) for name, array in named.items() if array is not None}
        if "y" not in sizes or not sizes["y"][0]:
            raise ValueError("`y` must not be empty")
        n_points, n_params = sizes["y"][0], count("n_params", n_params)
        parts = fit_parts(n_points, n_params)._replace(data=sum(nbytes for _, nbytes in sizes.values()))
        return cls._weigh(n_points, n_params, parts, memory_limit_gb, safety_factor, client)

    @classmethod
    def _weigh(cls, n_points, n_params, parts, memory_limit_gb, safety_factor, client):
        if safety_factor is None:
            safety_factor, _ = effective_fraction()
        elif positive("safety_factor", safety_factor) > 1:
            raise ValueError(f"`safety_factor` is the share of memory that a fit may take, at most 1, not {safety_factor}")
        if memory_limit_gb is not None:
            available_gb = positive("memory_limit_gb", memory_limit_gb, "GiB")
        elif (client := active_client(client)) is not None:
            threshold_gb, info = _threshold(safety_factor, "argument", client)
            available_gb = info["total_memory_gb"] or threshold_gb / safety_factor
        else:
            available_gb = available_memory() / GB
        gb = (parts.data / GB, parts.jacobian / GB, parts.peak / GB)
        return cls(available_gb, available_gb * safety_factor, *gb, n_points=n_points, n_params=n_params)


def _gib(gb: float) -> str:
    return f"{gb:.2f} GiB" if gb >= 0.01 else f"{gb * 1024:.3g} MiB"


def _size_and_bytes(name, array) -> tuple[int, int]:
    if not (hasattr(array, "nbytes") and hasattr(array, "size")):
        array = np.asarray(array)
    if math.isnan(array.nbytes):
        raise ValueError(f"`{name}` is a Dask array of unknown chunk sizes: call {name}.compute_chunk_sizes() first")
    return int(array.size), int(array.nbytes)


def estimate_peak_memory_gb(
    n_points: int, n_params: int, bytes_per_element: float = 8, jacobian_overhead: float = JACOBIAN_OVERHEAD
) -> float:
    """GiB at the peak of a fit that materialises J with all its intermediates: ``jacobian_overhead`` times J."""
    n_points, n_params = count("n_points", n_points, 0), count("n_params", n_params, 0)
    parts = fit_parts(n_points, n_params, dtype_bytes=positive("bytes_per_element", bytes_per_element, "bytes"))
    return parts.jacobian * positive("jacobian_overhead", jacobian_overhead) / GB


# ---------------------------------------------------------------------------------------------------------------------
# what follows


class NLSQStrategy(Enum):
    """How to fit where J would be materialised."""

    STANDARD = "standard"  # J in memory
    OUT_OF_CORE = "out_of_core"  # J^T J summed over chunks
    HYBRID_STREAMING = "hybrid_streaming"  # L-BFGS on a sample, then Gauss-Newton over streamed data


@dataclass(frozen=True)
class StrategyDecision:
    """A strategy, the GiB that it follows from, and the sentence that says so."""

    strategy: NLSQStrategy
    threshold_gb: float
    index_memory_gb: float  # an int64 index of all points
    peak_memory_gb: float
    reason: str


def select_nlsq_strategy(n_points: int, n_params: int, memory_fraction=None, client=None) -> StrategyDecision:
    """How to fit by memory alone: by an index of the points first, then by the peak with J in memory.

    Parameters
    ----------
    n_points : int
    n_params : int
        With none the peak cannot be estimated and counts as 0.
    memory_fraction, client
        As in `get_adaptive_memory_threshold`.

    Raises
    ------
    ValueError, TypeError
        A number of points that is negative, or no number.
    """
    n_points, n_params = count("n_points", n_points, 0), count("n_params", n_params, -math.inf)
    threshold_gb, _ = get_adaptive_memory_threshold(memory_fraction, client)
    index_gb = n_points * 8 / GB
    peak_gb = estimate_peak_memory_gb(n_points, n_params) if n_params > 0 else 0.0
    threshold = f"the threshold ({threshold_gb:.2f} GiB)"
    if index_gb > threshold_gb:
        strategy, reason = NLSQStrategy.HYBRID_STREAMING, f"Index array ({index_gb:.2f} GiB) exceeds {threshold}"
    elif peak_gb > threshold_gb:
        strategy, reason = NLSQStrategy.OUT_OF_CORE, f"Peak memory ({peak_gb:.2f} GiB) exceeds {threshold}"
    else:
        strategy, reason = NLSQStrategy.STANDARD, f"Peak memory ({peak_gb:.2f} GiB) fits within {threshold}"
    logger.info("%s for %s points and %d parameters: %s", strategy.value, f"{n_points:,}", n_params, reason)
    return StrategyDecision(strategy, threshold_gb, index_gb, peak_gb, reason)
