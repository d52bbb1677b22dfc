"""Names of NLSQ: the memory of a fit, and the strategy that follows. Arithmetic on metadata; data are not computed.

For n points of k coordinates and p parameters, with b bytes per number:

    data       n (k + 1) b     x and y
    jacobian   n p b           J
    peak       data + c J + v n b + s p^2 b,   (c, v, s) as in `HELD`

Gigabytes are GiB, 2^30 bytes, throughout.
"""

import logging
from bisect import bisect_right
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np

from ..base.text import GB, several, size
from ..base.values import count, positive
from ..memory.machine import active_client, available_memory
from ..memory.threshold import Strategy, effective_fraction
from ..presets import EFFECTS, TIERS, OptimizationGoal, as_goal, tolerances
from .homodyne import FALLBACK_THRESHOLD_GB, total_memory_gb

logger = logging.getLogger("dask_nlsq")
# what a fit that materialises J holds beside the data: Jacobians, vectors of n points, p x p matrices. An SVD works on 0.3
# of J, lm factors it in place, and dogbox also forms J times the step of the free variables
HELD = {"budget": (1.3, 1, 1), "lm": (1.0, 2, 1), "trf": (1.3, 2, 2), "dogbox": (1.3, 3, 3)}
LEAST_ROOM = 0.1  # of the threshold, for one chunk's Jacobian where data fill it: the margin of safety holds it


def costs(fit: str, n_params: int, data: float = 2, width: float = 8) -> tuple[float, float]:
    """Bytes for each point, ``data`` numbers of ``width`` bytes among them, and for a fit of any size."""
    jacobians, vectors, squares = HELD[fit]
    return width * (data + jacobians * n_params + vectors), width * squares * n_params**2


def even_chunks(n_points: int, room: float, per_point: float, fixed: float) -> tuple[int, int]:
    """Size and number of the fewest even chunks of at most ``room`` bytes; MemoryError if not even one point fits."""
    largest = min(int((room - fixed) // per_point), n_points)
    if largest < 1:
        raise MemoryError(
            f"a single point and the memory for all points take {size(fixed + per_point)}, but {size(room)} are available: "
            "raise the memory limit, or fit fewer parameters"
        )
    chunk = -(-n_points // -(-n_points // largest))
    return chunk, -(-n_points // chunk)


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a fit needs, and its limit, in GiB."""

    available_gb: float  # to this process now, or to the workers of a cluster, or as the user limits it
    threshold_gb: float  # the part of it that a fit may take
    data_gb: float
    jacobian_gb: float  # of all points
    peak_gb: float  # of a fit that holds both
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
        data, peak, limit = (size(gb * GB) for gb in (self.data_gb, self.peak_gb, self.threshold_gb))
        return {
            "standard": f"the peak of {peak} fits within the threshold of {limit}",
            "chunked": f"the data of {data} fit within the threshold of {limit}, the peak of {peak} does not",
            "streaming": f"the data of {data} exceed the threshold of {limit}",
        }[self.strategy]

    def __str__(self):
        jacobian, available = size(self.jacobian_gb * GB), size(self.available_gb * GB)
        problem = f"{several(self.n_points, 'point')}, {several(self.n_params, 'parameter')}"
        return f"{self.strategy}: {self.reason} (Jacobian {jacobian}, available {available}, {problem})"

    def chunks(self) -> tuple[int, int]:
        """Points per chunk and number of chunks: the Jacobian of one fits beside all data, or its own with "streaming"."""
        if self.strategy == "standard":
            return self.n_points, 1
        n_points, n_params = count("n_points", self.n_points), count("n_params", self.n_params)
        per_point, fixed = costs("budget", n_params, 0, self.jacobian_gb * GB / n_points / n_params)
        if self.data_fits:
            room = max(self.threshold_gb - self.data_gb, LEAST_ROOM * self.threshold_gb)
            return even_chunks(n_points, room * GB, per_point, fixed)
        return even_chunks(n_points, self.threshold_gb * GB, per_point + self.data_gb * GB / n_points, fixed)

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
        """Budget of a fit of ``n_points`` points of ``n_features`` coordinates, with ``dtype_bytes`` bytes per number.

        Available are ``memory_limit_gb`` GiB; by default what the workers of ``client`` have in all, or this process now
        (`get_adaptive_memory_threshold`). A fit may take the share ``safety_factor``, up to 1; by default
        ``NLSQ_MEMORY_FRACTION``, else 0.75. ValueError or TypeError: arguments that are not positive numbers.
        """
        width, n_points = positive("dtype_bytes", dtype_bytes, "bytes"), count("n_points", n_points)
        needed = _needed(n_points, n_params, n_points * (count("n_features", n_features) + 1) * width, width)
        return cls(*_available(memory_limit_gb, safety_factor, client), *needed)

    @classmethod
    def from_arrays(
        cls, x, y, sigma=None, *, n_params: int, mask=None, memory_limit_gb=None, safety_factor=None, client=None
    ) -> "MemoryBudget":
        """Budget of a fit of these arrays, from their metadata; reads and computes nothing.

        Arrays as in `dask_nlsq.curve_fit`: a tuple as ``x`` holds arrays that broadcast against ``y``, as small as they
        are. The rest, and errors, as in `compute`; ValueError also for empty data and unknown sizes of chunks.
        """
        named = {"y": y, "sigma": sigma, "mask": mask}
        named |= {f"x[{k}]": each for k, each in enumerate(x)} if isinstance(x, tuple) else {"x": x}
        sized = {name: _sized(name, array) for name, array in named.items() if array is not None}
        if "y" not in sized or not sized["y"].size:
            raise ValueError("`y` must not be empty")
        needed = _needed(int(sized["y"].size), n_params, sum(int(each.nbytes) for each in sized.values()), 8)
        return cls(*_available(memory_limit_gb, safety_factor, client), *needed)


def _sized(name, array):
    array = array if hasattr(array, "nbytes") and hasattr(array, "size") else np.asarray(array)
    if isnan(array.nbytes):
        raise ValueError(f"`{name}` is a Dask array of unknown chunk sizes: call {name}.compute_chunk_sizes() first")
    return array


def _needed(n_points, n_params, data, width):
    """Data, Jacobian and peak in GiB, points and parameters."""
    n_params = count("n_params", n_params)
    per_point, fixed = costs("budget", n_params, 0, width)
    return data / GB, n_points * n_params * width / GB, (data + n_points * per_point + fixed) / GB, n_points, n_params


def _available(memory_limit_gb, safety_factor, client):
    """GiB that are available, and those that a fit may take."""
    share = effective_fraction()[0] if safety_factor is None else _share(safety_factor)
    if memory_limit_gb is not None:
        available_gb = positive("memory_limit_gb", memory_limit_gb, "GiB")
    elif (client := active_client(client)) is not None:
        available_gb = total_memory_gb(client)[0] or FALLBACK_THRESHOLD_GB / share
    else:
        available_gb = available_memory() / GB
    return available_gb, available_gb * share


def _share(safety_factor):
    if positive("safety_factor", safety_factor) > 1:
        raise ValueError(f"`safety_factor` is the share of memory that a fit may take, at most 1, not {safety_factor}")
    return safety_factor


@dataclass(frozen=True)
class MemoryBudgetSelector:
    """Chooses a strategy by `MemoryBudget`; ``safety_factor`` as in `MemoryBudget.compute`."""

    safety_factor: float | None = None

    def __post_init__(self):
        if self.safety_factor is not None:
            _share(self.safety_factor)

    def select(
        self, n_points: int, n_params: int, memory_limit_gb: float | None = None, *, n_features: int = 1, client=None
    ) -> tuple[Strategy, dict[str, Any]]:
        """ "standard", "chunked" or "streaming", and a dict; arguments and errors as in `MemoryBudget.compute`.

        The dict has ``budget``, ``chunk_size`` (points) and ``n_chunks`` such that the Jacobian of a chunk fits, and
        ``reason``. MemoryError where not even one point fits.
        """
        options = dict(memory_limit_gb=memory_limit_gb, safety_factor=self.safety_factor, client=client)
        budget = MemoryBudget.compute(n_points, n_params, n_features, **options)
        logger.info("%s", budget)
        chunk_size, n_chunks = budget.chunks()
        return budget.strategy, dict(budget=budget, chunk_size=chunk_size, n_chunks=n_chunks, reason=budget.reason)


def calculate_adaptive_tolerances(n_points: int, goal: OptimizationGoal | str | None = None) -> dict[str, float]:
    """``gtol``, ``ftol`` and ``xtol``, all the same: 1e-12 below a thousand points, looser by tiers to 1e-5 above 10^8.

    The goal QUALITY takes the next tighter tier, FAST the next looser one, as far as there is one. ValueError or TypeError:
    a number of points that is not a positive integer; an unknown goal.
    """
    tier = bisect_right(TIERS, count("n_points", n_points))
    return tolerances(tier if goal is None else tier + EFFECTS[as_goal(goal)].tier)
