"""Names of homodyne: how much memory a fit may take, and how to fit by memory alone. Gigabytes are GiB."""

import logging
import math
import warnings
from enum import Enum
from typing import Any, NamedTuple

from ..base.text import GB
from ..base.values import count, positive
from ..memory.machine import Method, active_client, detect_memory, workers_memory
from ..memory.threshold import effective_fraction

logger = logging.getLogger("dask_nlsq")
FALLBACK_THRESHOLD_GB = 16.0  # where memory cannot be detected
JACOBIAN_OVERHEAD = 6.5  # J's at the peak of a fit that materialises J and its intermediates


def get_adaptive_memory_threshold(memory_fraction=None, client=None) -> tuple[float, dict[str, Any]]:
    """GiB that a fit may take, a fraction of the total memory, and a dict with the reason.

    The memory is that of the workers of ``client`` (by default of the active one) together; with False, or without a client,
    of this process. ``memory_fraction`` is by default ``NLSQ_MEMORY_FRACTION`` of the environment, else 0.75; it is clamped
    to 0.1 ... 0.9 with a warning; TypeError or ValueError where it is not a number. The dict has ``total_memory_gb``,
    ``memory_fraction``, ``source`` ("argument", "env" or "default") and ``detection_method`` ("psutil", "sysconf",
    "cgroup-v1", "cgroup-v2", "workers" or "fallback": undetected, 16 GiB and a warning).
    """
    fraction, source = effective_fraction(memory_fraction)
    total_gb, method = total_memory_gb(client)
    threshold_gb = total_gb * fraction if total_gb else FALLBACK_THRESHOLD_GB
    info = dict(total_memory_gb=total_gb, memory_fraction=fraction, source=source, detection_method=method)
    logger.info("memory threshold %.2f GiB: %s", threshold_gb, info)
    return threshold_gb, info


def total_memory_gb(client) -> tuple[float, Method]:
    """GiB of the workers of a client, or of this process; 0, and a warning, where nothing says so."""
    client = active_client(client)
    total, method = detect_memory()
    if client is not None:
        total, method = sum((workers_memory(client) or {}).values()), "workers"
    if total:
        return total / GB, method
    whose = "of this system" if client is None else "of the workers (there may be none yet: client.wait_for_workers(1))"
    message = f"the memory {whose} cannot be detected: {FALLBACK_THRESHOLD_GB:g} GiB are used as the threshold"
    warnings.warn(message, stacklevel=3)
    return 0.0, "fallback"


def estimate_peak_memory_gb(
    n_points: int, n_params: int, bytes_per_element: float = 8, jacobian_overhead: float = JACOBIAN_OVERHEAD
) -> float:
    """GiB at the peak of a fit that materialises J with all its intermediates: ``jacobian_overhead`` times J."""
    elements = count("n_points", n_points, 0) * count("n_params", n_params, 0)
    width = positive("bytes_per_element", bytes_per_element, "bytes")
    return elements * width * positive("jacobian_overhead", jacobian_overhead) / GB


class NLSQStrategy(Enum):
    """The strategies of homodyne, whose fits hold J in memory."""

    STANDARD = "standard"  # J in memory
    OUT_OF_CORE = "out_of_core"  # J^T J summed over chunks
    HYBRID_STREAMING = "hybrid_streaming"  # L-BFGS on a sample, then Gauss-Newton over streamed data


class StrategyDecision(NamedTuple):
    """A strategy, the memory in GiB that it follows from, and the reason as a sentence."""

    strategy: NLSQStrategy
    threshold_gb: float
    index_memory_gb: float  # an int64 index of all points
    peak_memory_gb: float
    reason: str


def select_nlsq_strategy(n_points: int, n_params: int, memory_fraction=None, client=None) -> StrategyDecision:
    """Choose a strategy from memory: first from the size of an index of the points, then from the peak with J in memory.

    Without parameters the peak cannot be estimated and counts as 0. ValueError or TypeError: a number of points that is
    negative, or no number. ``memory_fraction`` and ``client`` as in `get_adaptive_memory_threshold`.
    """
    n_points, n_params = count("n_points", n_points, 0), count("n_params", n_params, -math.inf)
    threshold_gb, _ = get_adaptive_memory_threshold(memory_fraction, client)
    index_gb, peak_gb = n_points * 8 / GB, estimate_peak_memory_gb(n_points, max(n_params, 0))
    strategy, what, verb = NLSQStrategy.STANDARD, f"Peak memory ({peak_gb:.2f} GiB)", "fits within"
    if index_gb > threshold_gb:
        strategy, what, verb = NLSQStrategy.HYBRID_STREAMING, f"Index array ({index_gb:.2f} GiB)", "exceeds"
    elif peak_gb > threshold_gb:
        strategy, verb = NLSQStrategy.OUT_OF_CORE, "exceeds"
    reason = f"{what} {verb} the threshold ({threshold_gb:.2f} GiB)"
    logger.info("%s for %s points and %d parameters: %s", strategy.value, f"{n_points:,}", n_params, reason)
    return StrategyDecision(strategy, threshold_gb, index_gb, peak_gb, reason)
