"""Nonlinear least squares on data that do not fit in memory."""

from importlib import import_module

from .base import config  # noqa: F401  (defaults of dask.config)

# public name -> module. Modules are imported when a name is first used: `dask --help` loads this package, but not JAX.
_MODULES = {
    "BadChunkError": "data.store",
    "CheckpointError": "engine.checkpoint",
    "DamagedFileError": "base.files",
    "FitResult": "results.result",
    "MapPlan": "maps.plan",
    "MapResult": "maps.result",
    "MapStatus": "kernels.lanes",
    "MemoryBudget": "compat.nlsq",
    "MemoryBudgetSelector": "compat.nlsq",
    "MemoryBudgetError": "memory.plan",
    "MemoryManager": "compat.memory_manager",
    "MissingChunksError": "data.store",
    "Interrupted": "solve.outcome",
    "NoWorkersError": "engine.waiting",
    "NLSQStrategy": "compat.homodyne",
    "NotConvergedError": "solve.outcome",
    "OptimizationGoal": "presets",
    "Plan": "memory.plan",
    "Record": "solve.trust_region",
    "StrategyDecision": "compat.homodyne",
    "UntrustedError": "base.modules",
    "calculate_adaptive_tolerances": "compat.nlsq",
    "clear_memory_pool": "compat.memory_manager",
    "cluster_report": "watch.live_page",
    "compare": "results.compare",
    "create_checkpoint_directory": "engine.checkpoint",
    "curve_fit": "fitting",
    "curve_fit_large": "fitting",
    "fit": "fitting",
    "fit_groups": "groups.fit",
    "fit_map": "maps.fit",
    "GroupResult": "groups.result",
    "HeldData": "prepare",
    "hold": "prepare",
    "resume": "fitting",
    "detect_total_system_memory": "memory.machine",
    "estimate_peak_memory_gb": "compat.homodyne",
    "load": "groups.result",
    "get_adaptive_memory_threshold": "compat.homodyne",
    "get_memory_manager": "compat.memory_manager",
    "get_memory_stats": "compat.memory_manager",
    "plan_fit": "fitting",
    "select_nlsq_strategy": "compat.homodyne",
}

_SUBMODULES = ("accessor", "dashboard", "models", "plots", "statistics")  # the public ones

__all__ = [*_MODULES]
__version__ = "0.1.0"


def __getattr__(name):
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*__all__, *_SUBMODULES, "__version__"])
