"""Goals, tolerances, and which strategy fits into memory: decisions from a few numbers, nothing is read or computed."""

import logging
from bisect import bisect_right
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from .budget import MemoryBudget, Strategy, count, positive
from .rules import ACCURACY

__all__ = [
    "MemoryBudget",
    "MemoryBudgetSelector",
    "OptimizationGoal",
    "calculate_adaptive_tolerances",
    "create_checkpoint_directory",
]

logger = logging.getLogger("dask_nlsq")

# points from which the next tolerance holds: tiny, small, medium, large, very large, huge, massive
TIERS = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_001]
TOLERANCES = [1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5]
LOOSE_ACCURACY = {1e-6: 0.03, 1e-5: 0.1}  # standard errors, of the loosest tolerances; else `rules.ACCURACY`


class OptimizationGoal(Enum):
    """What a fit is for; `EFFECTS` says what follows."""

    FAST = "fast"
    ROBUST = "robust"
    GLOBAL = "global"
    MEMORY_EFFICIENT = "memory_efficient"
    QUALITY = "quality"


class Effect(NamedTuple):
    """What a goal changes."""

    tier: int  # looser (+) or tighter (-) tolerances, in tiers
    multistart: bool
    partitions_per_thread: int | None = None  # tasks per sweep; None: as `dask_nlsq.plan` sees fit


EFFECTS = {
    OptimizationGoal.FAST: Effect(1, False),
    OptimizationGoal.ROBUST: Effect(0, True),
    OptimizationGoal.GLOBAL: Effect(0, True),  # another name for ROBUST
    OptimizationGoal.MEMORY_EFFICIENT: Effect(0, False, 16),
    OptimizationGoal.QUALITY: Effect(-1, True),
}


class Preset(NamedTuple):
    """What the name of a workflow stands for."""

    strategy: str
    tolerance: float | None  # ftol, xtol and gtol; None: by the number of points
    n_starts: int  # 0: p0 alone


PRESETS = {
    "auto": Preset("auto", None, 0),
    "standard": Preset("standard", 1e-8, 0),
    "quality": Preset("standard", 1e-10, 20),
    "fast": Preset("standard", 1e-6, 0),
    "large_robust": Preset("chunked", 1e-8, 10),
    "streaming": Preset("streaming", 1e-7, 0),
    "hpc_distributed": Preset("streaming", 1e-6, 0),
}
GOAL_STARTS = 10  # of a goal that asks for several, where the preset does not say how many


def workflow_options(workflow: str, goal, n_points: int, n_starts: int | None) -> dict[str, Any]:
    """What a preset and a goal mean as arguments of `dask_nlsq.curve_fit`.

    Raises
    ------
    ValueError
        An unknown preset or goal.
    """
    if not isinstance(workflow, str) or workflow not in PRESETS:
        raise ValueError(f"`workflow` must be one of {', '.join(map(repr, PRESETS))}, not {workflow!r}")
    preset = PRESETS[workflow]
    effect = Effect(0, preset.n_starts > 0) if goal is None else EFFECTS[as_goal(goal)]
    tier = bisect_right(TIERS, n_points) if preset.tolerance is None else TOLERANCES.index(preset.tolerance)
    if n_starts is None:
        n_starts = (preset.n_starts or GOAL_STARTS) if effect.multistart else 0
    where = dict(strategy=preset.strategy, partitions_per_thread=effect.partitions_per_thread)
    tolerances = _tolerances(tier + effect.tier)
    accuracy = LOOSE_ACCURACY.get(tolerances["ftol"], ACCURACY)
    return where | dict(n_starts=n_starts, accuracy=accuracy) | tolerances


def _tolerances(tier: int) -> dict[str, float]:
    return dict.fromkeys(("gtol", "ftol", "xtol"), TOLERANCES[min(max(tier, 0), len(TOLERANCES) - 1)])


def as_goal(goal: OptimizationGoal | str) -> OptimizationGoal:
    """The goal of that name.

    Raises
    ------
    ValueError
        An unknown name.
    """
    known = {each.value: each for each in OptimizationGoal}
    if isinstance(goal, OptimizationGoal):
        return goal
    if not isinstance(goal, str) or goal.lower() not in known:
        raise ValueError(f"`goal` must be an OptimizationGoal or one of {', '.join(map(repr, known))}, not {goal!r}")
    return known[goal.lower()]


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
    return _tolerances(tier)


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


def create_checkpoint_directory(base: str | Path | None = None, name: str | None = None) -> Path:
    """Create a new directory, ``base/name_YYYYmmdd_HHMMSS``, with a number behind it where that exists.

    Parameters
    ----------
    base : path, optional
        ``nlsq_checkpoints`` in the current directory by default; created where it is missing.
    name : str, optional
        ``fit`` by default.

    Raises
    ------
    ValueError
        A name that is not one of a directory.
    NotADirectoryError
        Where ``base`` is a file.
    """
    base = Path.cwd() / "nlsq_checkpoints" if base is None else Path(base).expanduser()
    name = "fit" if name is None else name
    if not isinstance(name, str) or name != Path(name).name or not name:
        raise ValueError(f"`name` must be the name of a directory, without a path, not {name!r}")
    if base.exists() and not base.is_dir():
        raise NotADirectoryError(f"`base` {base} is a file: name a directory")
    base.mkdir(parents=True, exist_ok=True)
    stamp = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    directory, tried = base / stamp, 0
    while True:
        try:
            directory.mkdir()  # fails where it exists, so that two processes never share one
            return directory
        except FileExistsError:
            tried += 1
            directory = base / f"{stamp}_{tried}"
