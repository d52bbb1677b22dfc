"""Goals, tolerances, and which strategy fits into memory: decisions from a few numbers, nothing is read or computed."""

import logging
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from ..base.values import count, positive
from ..engine.checkpoint import create_checkpoint_directory
from ..memory.threshold import Strategy
from ..presets import EFFECTS, TIERS, OptimizationGoal, as_goal, tolerances
from .budget import MemoryBudget

__all__ = [
    "MemoryBudget",
    "MemoryBudgetSelector",
    "OptimizationGoal",
    "calculate_adaptive_tolerances",
    "create_checkpoint_directory",
]

logger = logging.getLogger("dask_nlsq")


def calculate_adaptive_tolerances(n_points: int, goal: OptimizationGoal | str | None = None) -> dict[str, float]:
    """Tolerances for a number of points: 1e-12 below a thousand, looser by tiers to 1e-5 above 10^8.

    Parameters
    ----------
    n_points : int
    goal : OptimizationGoal or str, optional
        QUALITY takes the next tighter tier, FAST the next looser one, as far as there is one.

    Returns
    -------
    dict
        ``gtol``, ``ftol`` and ``xtol``, all the same.

    Raises
    ------
    ValueError, TypeError
        A number of points that is not a positive integer; an unknown goal.
    """
    tier = bisect_right(TIERS, count("n_points", n_points))
    if goal is not None:
        tier += EFFECTS[as_goal(goal)].tier
    return tolerances(tier)


@dataclass(frozen=True)
class MemoryBudgetSelector:
    """Chooses a strategy by `MemoryBudget`.

    Attributes
    ----------
    safety_factor : float, optional
        Share of the available memory that a fit may take. None: ``NLSQ_MEMORY_FRACTION``, else 0.75.
    """

    safety_factor: float | None = None

    def __post_init__(self):
        if self.safety_factor is not None and positive("safety_factor", self.safety_factor) > 1:
            raise ValueError(
                f"`safety_factor` is the share of memory that a fit may take, at most 1, not {self.safety_factor}"
            )

    def select(
        self,
        n_points: int,
        n_params: int,
        memory_limit_gb: float | None = None,
        *,
        n_features: int = 1,
        client=None,
    ) -> tuple[Strategy, dict[str, Any]]:
        """Strategy and its numbers; arguments and errors as in `MemoryBudget.compute`.

        Returns
        -------
        strategy : {"standard", "chunked", "streaming"}
        config : dict
            ``budget``, the `MemoryBudget`; ``chunk_size`` (points) and ``n_chunks``, such that the Jacobian of a chunk
            fits; ``reason``.

        Raises
        ------
        MemoryError
            Where not even one point fits.
        """
        budget = MemoryBudget.compute(
            n_points,
            n_params,
            n_features,
            memory_limit_gb=memory_limit_gb,
            safety_factor=self.safety_factor,
            client=client,
        )
        logger.info("%s", budget)
        chunk_size, n_chunks = budget.chunks()
        return budget.strategy, dict(budget=budget, chunk_size=chunk_size, n_chunks=n_chunks, reason=budget.reason)
