import math
import threading
from collections import Counter
from pathlib import Path

import pytest

from dask_nlsq import MemoryBudget, MemoryBudgetSelector, OptimizationGoal, calculate_adaptive_tolerances
from dask_nlsq import create_checkpoint_directory as create
from dask_nlsq.presets import EFFECTS

GB = 2**30


# ---------------------------------------------------------------------------------------------------------------------
# tolerances


@pytest.mark.parametrize(
    "n_points, tolerance",
    [
        (1, 1e-12), (999, 1e-12), (1_000, 1e-10), (9_999, 1e-10), (10_000, 1e-9), (99_999, 1e-9), (100_000, 1e-8),
        (999_999, 1e-8), (10**6, 1e-7), (10**7 - 1, 1e-7), (10**7, 1e-6), (10**8, 1e-6), (10**8 + 1, 1e-5), (10**12, 1e-5),
    ],
)  # fmt: skip
def test_each_tier_has_its_tolerance(n_points, tolerance):
    assert calculate_adaptive_tolerances(n_points) == {"gtol": tolerance, "ftol": tolerance, "xtol": tolerance}


@pytest.mark.parametrize(
    "n_points, fast, standard, quality",
    [(500, 1e-10, 1e-12, 1e-12), (5000, 1e-9, 1e-10, 1e-12), (5_000_000, 1e-6, 1e-7, 1e-8), (10**9, 1e-5, 1e-5, 1e-6)],
)
def test_goals_shift_by_a_tier_as_far_as_there_is_one(n_points, fast, standard, quality):
    for goal in OptimizationGoal:
        expected = {"FAST": fast, "QUALITY": quality}.get(goal.name, standard)
        assert calculate_adaptive_tolerances(n_points, goal)["ftol"] == expected
        assert calculate_adaptive_tolerances(n_points, goal.value.upper())["ftol"] == expected


def test_global_is_another_name_for_robust():
    assert OptimizationGoal.GLOBAL is not OptimizationGoal.ROBUST
    assert EFFECTS[OptimizationGoal.GLOBAL] == EFFECTS[OptimizationGoal.ROBUST]
    assert set(EFFECTS) == set(OptimizationGoal)


@pytest.mark.parametrize("goal", ["best", "", 3, True])
def test_an_unknown_goal_is_refused_with_the_known_ones(goal):
    with pytest.raises(ValueError, match="'fast', 'robust', 'global', 'memory_efficient', 'quality', not"):
        calculate_adaptive_tolerances(1000, goal)


@pytest.mark.parametrize("n_points, error", [(0, ValueError), (-1, ValueError), (math.nan, ValueError), ("many", TypeError)])
def test_tolerances_need_a_number_of_points(n_points, error):
    with pytest.raises(error, match="`n_points`"):
        calculate_adaptive_tolerances(n_points)


# ---------------------------------------------------------------------------------------------------------------------
# the selector


def test_everything_that_fits_is_standard():
    strategy, config = MemoryBudgetSelector(safety_factor=0.75).select(10**6, 3, memory_limit_gb=16.0)
    assert strategy == "standard"
    assert config["budget"] == MemoryBudget.compute(10**6, 3, memory_limit_gb=16.0, safety_factor=0.75)
    assert (config["chunk_size"], config["n_chunks"]) == (10**6, 1)
    assert "fits within the threshold of 12.00 GiB" in config["reason"]


@pytest.mark.parametrize(
    "n_points, n_params, limit, safety_factor",
    [
        (10**7, 1, 0.25, 0.75), (10**7, 3, 2, 0.75), (8 * 10**8, 53, 16, 0.75), (123_456_789, 53, 16, 0.75),
        (123_456_789, 1000, 2, 0.1), (10**9, 1, 16, 0.1), (10**9, 1000, 16, 0.75), (10**11, 53, 0.25, 0.1),
    ],
)  # fmt: skip
def test_the_jacobian_of_a_chunk_fits_beside_what_is_held(n_points, n_params, limit, safety_factor):
    strategy, config = MemoryBudgetSelector(safety_factor).select(n_points, n_params, memory_limit_gb=limit)
    budget, size, n_chunks = config["budget"], config["chunk_size"], config["n_chunks"]
    assert strategy == ("streaming" if budget.data_gb > budget.threshold_gb else "chunked" if n_chunks > 1 else "standard")
    assert size * (n_chunks - 1) < n_points <= size * n_chunks
    working = size * (1.3 * n_params + 1) * 8 + n_params**2 * 8
    if strategy == "streaming":
        assert working + size * 16 <= budget.threshold_gb * GB
    elif strategy == "chunked":
        assert working <= max(budget.threshold_gb - budget.data_gb, 0.1 * budget.threshold_gb) * GB
        assert working + budget.data_gb * GB <= budget.available_gb * GB


def test_a_single_point_that_does_not_fit_is_an_error_with_numbers():
    with pytest.raises(MemoryError, match=r"a single point and the memory .* take 763\.04 MiB.*raise the memory limit"):
        MemoryBudgetSelector(0.5).select(10**6, 10_000, memory_limit_gb=1)


def test_selector_arguments_are_checked():
    for bad in (0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="`safety_factor`"):
            MemoryBudgetSelector(safety_factor=bad)
    with pytest.raises(TypeError, match="`safety_factor`"):
        MemoryBudgetSelector("most")
    with pytest.raises(ValueError, match="`memory_limit_gb`"):
        MemoryBudgetSelector().select(100, 3, memory_limit_gb=-4)


# ---------------------------------------------------------------------------------------------------------------------
# directories


def test_directories_go_under_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = create()
    assert made.is_dir() and made.parent == tmp_path / "nlsq_checkpoints"
    assert made.name.startswith("fit_20")


def test_no_directory_is_given_out_twice(tmp_path):
    made = []
    threads = [
        threading.Thread(target=lambda: made.extend(create(tmp_path / "a" / "b", "peaks") for _ in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == 160
    assert Counter(tmp_path.glob("a/b/peaks_*")) == Counter(made)


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/etc", 3])
def test_a_name_is_not_a_path(tmp_path, name):
    with pytest.raises(ValueError, match="`name`"):
        create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_base(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match="`base`"):
        create(str(tmp_path / "f"))
    assert isinstance(create(str(tmp_path / "g")), Path)
