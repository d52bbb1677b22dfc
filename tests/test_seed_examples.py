"""The examples that users of NLSQ and homodyne know, run with the imports of this package.

Each is run as it stands in their documentation but for the names of the modules; what an example takes for granted (a
model, data, a function of the user's own) is in `GIVEN`.
"""

import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import NLSQStrategy
from dask_nlsq.memory.machine import available_memory

EXAMPLES = {
    "basic memory management": """
from dask_nlsq import MemoryManager
import numpy as np

# Create memory manager
mm = MemoryManager(gc_threshold=0.8, safety_factor=1.2)

# Check available memory
available = mm.get_available_memory()
print(f"Available memory: {available / 1e9:.2f} GB")

# Predict memory requirements
n_points = 1_000_000
n_params = 10
bytes_needed = mm.predict_memory_requirement(n_points, n_params, algorithm="trf")
print(f"Memory needed: {bytes_needed / 1e9:.2f} GB")

# Check if enough memory is available
is_available, message = mm.check_memory_availability(bytes_needed)
if is_available:
    print("Sufficient memory available")
else:
    print(f"Warning: {message}")
""",
    "memory-safe operations": """
from dask_nlsq import MemoryManager
import numpy as np

mm = MemoryManager()

# Estimate memory needed
n_points = 5_000_000
n_params = 5
bytes_needed = mm.predict_memory_requirement(n_points, n_params, "trf")

# Use memory guard to ensure availability
try:
    with mm.memory_guard(bytes_needed):
        # Perform memory-intensive operation
        x = np.random.randn(n_points)
        y = 2 * x + 1 + np.random.randn(n_points) * 0.1

        # Your optimization here
        result = optimize(x, y)

except MemoryError as e:
    print(f"Insufficient memory: {e}")
    # Fall back to chunked processing
""",
    "array pooling": """
from dask_nlsq import MemoryManager
import numpy as np

mm = MemoryManager()

# Allocate arrays from pool
jacobian = mm.allocate_array((1000, 10), dtype=np.float64, zero=True)
residuals = mm.allocate_array((1000,), dtype=np.float64, zero=True)

# Use arrays
jacobian[:] = compute_jacobian()
residuals[:] = compute_residuals()

# Return arrays to pool when done
mm.free_array(jacobian)
mm.free_array(residuals)

# Arrays will be reused on next allocation
jacobian2 = mm.allocate_array((1000, 10), dtype=np.float64)  # Reuses pooled array
""",
    "temporary allocations": """
from dask_nlsq import MemoryManager

mm = MemoryManager()

# Temporary array automatically returned to pool
with mm.temporary_allocation((1000, 50), dtype=np.float64) as temp_array:
    # Use temporary array
    temp_array[:] = compute_intermediate_result()
    final_result = process(temp_array)

# temp_array is now back in the pool for reuse
""",
    "chunking strategy": """
from dask_nlsq import MemoryManager

mm = MemoryManager()

# Estimate chunking for 100M points
n_points = 100_000_000
n_params = 5
memory_limit_gb = 4.0

strategy = mm.estimate_chunking_strategy(
    n_points, n_params, algorithm="trf", memory_limit_gb=memory_limit_gb
)

if strategy["needs_chunking"]:
    print(f"Chunking required:")
    print(f"  Chunk size: {strategy['chunk_size']:,} points")
    print(f"  Number of chunks: {strategy['n_chunks']}")
    print(f"  Memory per chunk: {strategy['memory_per_chunk_gb']:.2f} GB")
else:
    print("No chunking needed - dataset fits in memory")
""",
    "global memory manager": """
from dask_nlsq import get_memory_manager, get_memory_stats, clear_memory_pool

# Get global instance
mm = get_memory_manager()

# Use it
arr = mm.allocate_array((1000, 100))

# Get memory statistics
stats = get_memory_stats()
print(f"Current usage: {stats['current_usage_gb']:.2f} GB")
print(f"Peak usage: {stats['peak_usage_gb']:.2f} GB")
print(f"Pool size: {stats['pool_arrays']} arrays")
print(f"Allocation efficiency: {stats.get('efficiency', 1.0):.1%}")

# Clear pool when done
clear_memory_pool()
""",
    "large dataset": """
from dask_nlsq import curve_fit_large
from dask_nlsq import MemoryManager
import jax.numpy as jnp
import numpy as np

# Set up memory manager
mm = MemoryManager(gc_threshold=0.75)

# Check memory requirements
n_points = 50_000_000
n_params = 3
bytes_needed = mm.predict_memory_requirement(n_points, n_params, "trf")

is_available, message = mm.check_memory_availability(bytes_needed)

if not is_available:
    # Use chunking
    strategy = mm.estimate_chunking_strategy(n_points, n_params, memory_limit_gb=4.0)
    print(f"Using {strategy['n_chunks']} chunks")


# Fit with automatic memory management
def exponential(x, a, b, c):
    return a * jnp.exp(-b * x) + c


x = np.linspace(0, 10, n_points)
y = 2.0 * np.exp(-0.5 * x) + 0.3 + np.random.normal(0, 0.05, n_points)

with mm.memory_guard(bytes_needed):
    popt, pcov = curve_fit_large(
        exponential, x, y, p0=[2.5, 0.6, 0.2], memory_limit_gb=4.0
    )
""",
    "statistics": """
from dask_nlsq import MemoryManager

mm = MemoryManager()

# Perform operations
for i in range(10):
    arr = mm.allocate_array((10000, 100))
    # ... use array ...
    mm.free_array(arr)

# Get detailed statistics
stats = mm.get_memory_stats()

print("Memory Statistics:")
print(f"  Current usage: {stats['current_usage_gb']:.2f} GB")
print(f"  Available: {stats['available_gb']:.2f} GB")
print(f"  Peak usage: {stats['peak_usage_gb']:.2f} GB")
print(f"  Usage fraction: {stats['usage_fraction']:.1%}")
print(f"  Pool memory: {stats['pool_memory_gb']:.3f} GB")
print(f"  Pool arrays: {stats['pool_arrays']}")
print(f"  Total allocations: {stats['allocations']}")

if "efficiency" in stats:
    print(f"  Allocation efficiency: {stats['efficiency']:.1%}")
    print(f"  Total requested: {stats['total_requested_gb']:.2f} GB")
    print(f"  Total used: {stats['total_used_gb']:.2f} GB")

# Optimize pool if it grows too large
mm.optimize_memory_pool(max_arrays=50)
""",
    "algorithms": """
from dask_nlsq import MemoryManager

mm = MemoryManager()

n_points = 10_000
n_params = 20

algorithms = ["trf", "lm", "dogbox"]
for algo in algorithms:
    bytes_needed = mm.predict_memory_requirement(n_points, n_params, algo)
    print(f"{algo:8s}: {bytes_needed / 1e6:.2f} MB")
""",
    "configuration": """
from dask_nlsq import MemoryManager

# Conservative settings (more GC, larger safety margin)
conservative_mm = MemoryManager(gc_threshold=0.7, safety_factor=1.5)

# Aggressive settings (less GC, smaller safety margin)
aggressive_mm = MemoryManager(gc_threshold=0.9, safety_factor=1.1)

# Custom settings for specific use case
custom_mm = MemoryManager(
    gc_threshold=0.8,  # Trigger GC at 80% memory usage
    safety_factor=1.3,  # Add 30% safety margin to predictions
)
""",
    "quick start": """
from dask_nlsq import fit, curve_fit
from dask_nlsq import MemoryBudget
from dask_nlsq import MemoryBudgetSelector, OptimizationGoal
import jax.numpy as jnp
import numpy as np

def model(x, a, b, c):
    return a * jnp.exp(-b * x) + c

x = np.linspace(0, 10, 1_000_000)
y = 2.0 * np.exp(-0.5 * x) + 0.3 + np.random.normal(0, 0.05, len(x))

# Automatic selection via fit() (recommended)
result = fit(model, x, y, p0=[1, 1, 0], workflow="auto")

# Automatic selection via curve_fit()
popt, pcov = curve_fit(model, x, y, p0=[1, 1, 0], method="auto")

# Direct use of MemoryBudgetSelector
selector = MemoryBudgetSelector(safety_factor=0.75)
strategy, config = selector.select(
    n_points=len(x),
    n_params=3,
    memory_limit_gb=16.0,  # Optional override
)
print(f"Selected strategy: {strategy}")

# Inspect memory budget
budget = MemoryBudget.compute(n_points=len(x), n_params=3)
print(f"Peak memory: {budget.peak_gb:.2f} GB")
print(f"Fits in memory: {budget.fits_in_memory}")
""",
    "presets": """
from dask_nlsq import fit

# Use automatic memory-based selection
result = fit(model, x, y, p0=[1, 1, 0], workflow="auto")

# Use a named preset
result = fit(model, x, y, p0=[1, 1, 0], workflow="quality")

# Override memory detection
result = fit(model, x, y, p0=[1, 1, 0], workflow="auto", memory_limit_gb=8.0)
""",
    "adaptive tolerances": """
from dask_nlsq import calculate_adaptive_tolerances, OptimizationGoal

# 5M points with QUALITY goal
tols = calculate_adaptive_tolerances(5_000_000, goal=OptimizationGoal.QUALITY)
print(tols)  # {'gtol': 1e-08, 'ftol': 1e-08, 'xtol': 1e-08}

# 5M points with FAST goal
tols = calculate_adaptive_tolerances(5_000_000, goal=OptimizationGoal.FAST)
print(tols)  # {'gtol': 1e-06, 'ftol': 1e-06, 'xtol': 1e-06}
""",
    "strategy selection": """
from dask_nlsq import select_nlsq_strategy
decision = select_nlsq_strategy(n_points=100_000_000, n_params=53)
print(decision.strategy.value) # 'standard', 'out_of_core', or 'hybrid_streaming'
""",
    "memory threshold": """
from dask_nlsq import get_adaptive_memory_threshold
threshold_gb, info = get_adaptive_memory_threshold()
print(f"Threshold: {threshold_gb:.1f} GB")
""",
    "threshold and fraction": """
from dask_nlsq import get_adaptive_memory_threshold
threshold_gb, info = get_adaptive_memory_threshold()
pct = info['memory_fraction'] * 100
tot = info['total_memory_gb']
print(f"Threshold: {threshold_gb:.1f} GB ({pct:.0f}% of {tot:.1f} GB)")
# Override with specific fraction
threshold_gb, _ = get_adaptive_memory_threshold(memory_fraction=0.5)
# Override via environment variable
import os
os.environ["NLSQ_MEMORY_FRACTION"] = "0.6"
threshold_gb, info = get_adaptive_memory_threshold()
assert info['source'] == 'env'
""",
    "decision": """
from dask_nlsq import select_nlsq_strategy
decision = select_nlsq_strategy(100_000_000, 53)
print(decision.strategy.value)
print(decision.reason)
""",
}


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def given():
    """What the examples take for granted."""
    x = np.linspace(0, 10, 100_000)
    return {
        "np": np,
        "model": decay,
        "x": x,
        "y": 2.0 * np.exp(-0.5 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, len(x)),
        "optimize": lambda x, y: np.polyfit(x, y, 1),
        "compute_jacobian": lambda: np.full((1000, 10), 3.0),
        "compute_residuals": lambda: np.full(1000, 4.0),
        "compute_intermediate_result": lambda: np.ones((1000, 50)),
        "process": np.sum,
    }


def lines_given(words):
    def check(printed, names):
        assert all(word in printed for word in words)

    return check


def close_to_truth(popt):
    np.testing.assert_allclose(popt, [2.0, 0.5, 0.3], rtol=0.01)


def check_safe_operations(printed, names):
    assert "Insufficient" not in printed
    np.testing.assert_allclose(names["result"], [2, 1], atol=1e-3)


def check_pooling(printed, names):
    assert names["jacobian2"].ctypes.data == names["jacobian"].ctypes.data
    assert not names["jacobian2"].any()


def check_temporary(printed, names):
    assert names["final_result"] == 50_000
    assert names["mm"].get_memory_stats()["pool_arrays"] == 1


def check_statistics(printed, names):
    assert "Pool arrays: 1\n" in printed and "Total allocations: 10\n" in printed
    assert names["stats"]["reused"] == 9


def check_algorithms(printed, names):
    sizes = {line.split()[0]: float(line.split()[2]) for line in printed.splitlines()}
    assert 0 < sizes["lm"] < sizes["trf"] <= sizes["dogbox"]


def check_tolerances(printed, names):
    assert printed.splitlines() == [
        "{'gtol': 1e-08, 'ftol': 1e-08, 'xtol': 1e-08}",
        "{'gtol': 1e-06, 'ftol': 1e-06, 'xtol': 1e-06}",
    ]


def check_quick_start(printed, names):
    assert "Selected strategy: standard\n" in printed and "Fits in memory: True" in printed
    close_to_truth(names["popt"])
    close_to_truth(names["result"].popt)


def check_decision(printed, names):
    decision, peak = names["decision"], 1e8 * 53 * 8 * 6.5 / 2**30
    expected = NLSQStrategy.OUT_OF_CORE if peak > decision.threshold_gb else NLSQStrategy.STANDARD
    assert printed.startswith(expected.value)
    assert math.isclose(decision.peak_memory_gb, peak)


CHECKS = {
    "basic memory management": lines_given(["Available memory: ", "Memory needed: 0."]),
    "memory-safe operations": check_safe_operations,
    "array pooling": check_pooling,
    "temporary allocations": check_temporary,
    "chunking strategy": lines_given(["Chunking required", "Number of chunks: 3"]),
    "global memory manager": lines_given(["Pool size: ", "Allocation efficiency: "]),
    "large dataset": lambda printed, names: close_to_truth(names["popt"]),
    "statistics": check_statistics,
    "algorithms": check_algorithms,
    "configuration": lambda printed, names: None,
    "quick start": check_quick_start,
    "presets": lambda printed, names: close_to_truth(names["result"].popt),
    "adaptive tolerances": check_tolerances,
    "strategy selection": check_decision,
    "memory threshold": lines_given(["Threshold: "]),
    "threshold and fraction": lambda printed, names: None,
    "decision": check_decision,
}


def run(name, source, capsys):
    names = given()
    np.random.seed(0)  # noqa: NPY002  (as the examples draw)
    exec(compile(source, f"<{name}>", "exec"), names)
    CHECKS[name](capsys.readouterr().out, names)


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch):
    # set first, so that what an example sets is undone
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", "0.75")
    del os.environ["NLSQ_MEMORY_FRACTION"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, capsys):
    run(name, EXAMPLES[name].replace("50_000_000", "500_000"), capsys)


@pytest.mark.slow
def test_the_large_example_runs_at_its_own_size(capsys):
    if available_memory() < 6 * 2**30:
        pytest.skip(f"it takes 6 GiB, and {available_memory() / 2**30:.1f} GiB are available")
    run("large dataset", EXAMPLES["large dataset"], capsys)
