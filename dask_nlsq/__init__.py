"""Nonlinear least squares on data that do not fit in memory."""

from importlib import import_module

from . import config  # noqa: F401  (defaults of dask.config)

# public name -> room. Rooms are imported when a name is first used: `dask --help` loads this package, but not JAX.
_ROOMS = {
    "BadChunkError": "store",
    "CheckpointError": "checkpoint",
    "FitResult": "result",
    "MapPlan": "map_plan",
    "MapResult": "map_result",
    "MapStatus": "map_step",
    "MemoryBudget": "budget",
    "MemoryBudgetSelector": "workflow",
    "MemoryBudgetError": "plan",
    "MemoryManager": "memory",
    "MissingChunksError": "store",
    "NLSQStrategy": "budget",
    "NotConvergedError": "admission",
    "OptimizationGoal": "workflow",
    "Plan": "plan",
    "Record": "trust_region",
    "StrategyDecision": "budget",
    "calculate_adaptive_tolerances": "workflow",
    "clear_memory_pool": "memory",
    "cluster_report": "environment",
    "create_checkpoint_directory": "workflow",
    "curve_fit": "api",
    "curve_fit_large": "api",
    "fit": "api",
    "fit_map": "maps",
    "resume": "api",
    "detect_total_system_memory": "resources",
    "estimate_peak_memory_gb": "budget",
    "load": "result",
    "get_adaptive_memory_threshold": "budget",
    "get_memory_manager": "memory",
    "get_memory_stats": "memory",
    "plan_fit": "api",
    "select_nlsq_strategy": "budget",
}

__all__ = [*_ROOMS]
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOMS[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
