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
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ..base.text import GB
from ..base.values import count, positive
from ..memory.machine import active_client, available_memory
from ..memory.threshold import (
    SVD_SHARE,
    Strategy,
    effective_fraction,
    even_chunks,
    fit_parts,
    get_adaptive_memory_threshold,
    threshold_of,
)

logger = logging.getLogger("dask_nlsq")
JACOBIAN_OVERHEAD = 6.5  # J's at the peak of a fit that materialises J and its intermediates
LEAST_ROOM = 0.1  # of the threshold, for one chunk's Jacobian where data fill it: the margin of safety holds it


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
            threshold_gb, info = threshold_of(safety_factor, "argument", client)
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
