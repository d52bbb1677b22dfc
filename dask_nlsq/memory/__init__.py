"""What memory there is, what a fit needs of it, and a pool of buffers."""

from importlib import import_module

_MODULES = {  # public name -> module
    "DEFAULT_MEMORY_FRACTION": "memory.threshold",
    "FALLBACK_THRESHOLD_GB": "compat.homodyne",
    "MEMORY_FRACTION_ENV_VAR": "memory.threshold",
    "MemoryBudget": "compat.nlsq",
    "MemoryManager": "compat.memory_manager",
    "NLSQStrategy": "compat.homodyne",
    "StrategyDecision": "compat.homodyne",
    "available_memory": "memory.machine",
    "clear_memory_pool": "compat.memory_manager",
    "detect_total_system_memory": "memory.machine",
    "estimate_peak_memory_gb": "compat.homodyne",
    "get_adaptive_memory_threshold": "compat.homodyne",
    "get_memory_manager": "compat.memory_manager",
    "get_memory_stats": "compat.memory_manager",
    "select_nlsq_strategy": "compat.homodyne",
}

__all__ = [*_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dask_nlsq.{_MODULES[name]}"), name)
