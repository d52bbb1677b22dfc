"""Presets and goals of `dask_nlsq.fit`, as data: the arguments of `dask_nlsq.curve_fit` for each workflow."""

from bisect import bisect_right
from enum import Enum
from typing import Any, NamedTuple

from .kernels.rules import ACCURACY

# points from which the next tolerance holds: tiny, small, medium, large, very large, huge, massive
TIERS = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_001]
TOLERANCES = [1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5]
LOOSE_ACCURACY = {1e-6: 0.03, 1e-5: 0.1}  # standard errors, of the loosest tolerances; else `rules.ACCURACY`


class OptimizationGoal(Enum):
    """The goal of a fit; see `dask_nlsq.presets`."""

    FAST = "fast"
    ROBUST = "robust"
    GLOBAL = "global"
    MEMORY_EFFICIENT = "memory_efficient"
    QUALITY = "quality"


class Effect(NamedTuple):
    """What a goal changes."""

    tier: int  # looser (+) or tighter (-) tolerances, in tiers
    multistart: bool
    partitions_per_thread: int | None = None  # tasks per sweep; None: as `dask_nlsq.memory.plan` sees fit


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
    """What a preset and a goal mean as arguments of `dask_nlsq.curve_fit`."""
    preset = PRESETS[workflow]
    effect = Effect(0, preset.n_starts > 0) if goal is None else EFFECTS[as_goal(goal)]
    tier = bisect_right(TIERS, n_points) if preset.tolerance is None else TOLERANCES.index(preset.tolerance)
    if n_starts is None:
        n_starts = (preset.n_starts or GOAL_STARTS) if effect.multistart else 0
    where = dict(strategy=preset.strategy, partitions_per_thread=effect.partitions_per_thread)
    tests = tolerances(tier + effect.tier)
    accuracy = LOOSE_ACCURACY.get(tests["ftol"], ACCURACY)
    return where | dict(n_starts=n_starts, accuracy=accuracy) | tests


def tolerances(tier: int) -> dict[str, float]:
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
