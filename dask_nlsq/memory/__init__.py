"""What memory there is, what a fit needs of it, and a pool of buffers."""

from importlib import import_module

_MODULES = {  # public name -> module
    "DEFAULT_MEMORY_FRACTION": "memory.threshold",
    "FALLBACK_THRESHOLD_GB": "memory.threshold",
    "MEMORY_FRACTION_ENV_VAR": "memory.threshold",
    "MemoryBudget": "compat.budget",
    "MemoryManager": "memory.pool",
    "NLSQStrategy": "compat.budget",
    "StrategyDecision": "compat.budget",
    "available_memory": "memory.machine",
    "clear_memory_pool": "memory.pool",
    "detect_total_system_memory": "memory.machine",
    "estimate_peak_memory_gb": "compat.budget",
    "get_adaptive_memory_threshold": "memory.threshold",
    "get_memory_manager": "memory.pool",
    "get_memory_stats": "memory.pool",
    "select_nlsq_strategy": "compat.budget",
}

__all__ = [*_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dask_nlsq.{_MODULES[name]}"), name)
