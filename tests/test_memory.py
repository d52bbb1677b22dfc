"""What memory there is, what a fit takes, and what follows."""

import contextlib
import logging
import math
import os

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
import zarr
from distributed import Client, LocalCluster

import dask_nlsq
from dask_nlsq import (
    MemoryBudget,
    NLSQStrategy,
    detect_total_system_memory,
    estimate_peak_memory_gb,
    get_adaptive_memory_threshold,
    select_nlsq_strategy,
)
from dask_nlsq.memory import DEFAULT_MEMORY_FRACTION, FALLBACK_THRESHOLD_GB, MEMORY_FRACTION_ENV_VAR
from dask_nlsq.memory.machine import available_memory, cgroup_memory, detect_memory, workers_memory

GB = 2**30
MB = 2**20


@pytest.fixture(autouse=True)
def no_fraction_from_outside(monkeypatch):
    monkeypatch.delenv(MEMORY_FRACTION_ENV_VAR, raising=False)


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n")
    return root


def v2_group(path, limit, usage=0, cache=0):
    stat = f"anon 1\ninactive_file {cache}\nactive_file 7"
    base = f"sys/fs/cgroup/{path}".rstrip("/")
    return {f"{base}/memory.max": limit, f"{base}/memory.current": usage, f"{base}/memory.stat": stat}


def v1_group(path, limit, usage=0, cache=0):
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    base = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}
    return {f"{base}/{name}": content for name, content in names.items()}


def in_v2(path):
    return {"proc/self/cgroup": f"0::{path}"}


def in_v1(path):
    return {"proc/self/cgroup": f"9:name=systemd:/\n4:cpu,memory:{path}\n0::/"}


# ---------------------------------------------------------------------------------------------------------------------
# control groups


def test_a_v2_limit_wins_over_more_physical_memory(tmp_path):
    root = write(tmp_path, in_v2("/job/task") | v2_group("job/task", 64 * MB))
    assert detect_memory(root) == (64 * MB, "cgroup-v2")


def test_a_limit_of_an_ancestor_holds(tmp_path):
    groups = v2_group("job/task", "max") | v2_group("job", 32 * MB) | v2_group("", 48 * MB)
    assert detect_memory(write(tmp_path, in_v2("/job/task") | groups)) == (32 * MB, "cgroup-v2")


def test_a_v1_limit_wins_over_more_physical_memory(tmp_path):
    root = write(tmp_path, in_v1("/docker/abc") | v1_group("docker/abc", 64 * MB))
    assert detect_memory(root) == (64 * MB, "cgroup-v1")


def test_a_container_that_sees_only_the_top_of_the_hierarchy_finds_its_limit(tmp_path):
    assert detect_memory(write(tmp_path, in_v1("/docker/abc") | v1_group("", 64 * MB))) == (64 * MB, "cgroup-v1")
    assert detect_memory(write(tmp_path / "b", in_v2("/../../abc") | v2_group("", 96 * MB))) == (96 * MB, "cgroup-v2")


@pytest.mark.parametrize(
    "files",
    [
        {},
        in_v1("/") | v1_group("", 9223372036854771712),
        in_v2("/job") | v2_group("job", "max"),
        in_v2("/job") | v2_group("job", 2**55),
    ],
    ids=["no cgroup", "v1 without limit", "v2 without limit", "more than the machine has"],
)
def test_without_a_smaller_limit_physical_memory_counts(tmp_path, files):
    assert detect_memory(write(tmp_path, files)) == (psutil.virtual_memory().total, "psutil")


def test_available_is_what_the_group_leaves_with_its_file_cache(tmp_path):
    root = write(tmp_path, in_v2("/job") | v2_group("job", 64 * MB, usage=50 * MB, cache=30 * MB))
    assert available_memory(root) == 44 * MB
    root = write(tmp_path / "v1", in_v1("/job") | v1_group("job", 64 * MB, usage=50 * MB, cache=30 * MB))
    assert available_memory(root) == 44 * MB


def test_the_fuller_ancestor_decides_what_is_available(tmp_path):
    groups = v2_group("job/task", 32 * MB, usage=2 * MB) | v2_group("job", 64 * MB, usage=60 * MB)
    found = cgroup_memory(write(tmp_path, in_v2("/job/task") | groups))
    assert found == (32 * MB, 4 * MB, 2)


def test_an_overfull_group_has_nothing_available(tmp_path):
    root = write(tmp_path, in_v2("/job") | v2_group("job", 64 * MB, usage=70 * MB))
    assert available_memory(root) == 0


def test_without_a_group_what_the_machine_has_is_available(tmp_path):
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# detection and thresholds


def fails(*args, **kwargs):
    raise OSError("no /proc")


def test_total_memory_is_a_float_of_bytes():
    assert isinstance(detect_total_system_memory(), float)
    assert 0 < detect_total_system_memory() <= psutil.virtual_memory().total


def test_sysconf_steps_in_for_psutil(monkeypatch, tmp_path):
    physical = psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    assert detect_memory(tmp_path).method == "sysconf"
    assert detect_memory(tmp_path).total == pytest.approx(physical, rel=0.05)
    assert available_memory(tmp_path) > 0


def test_memory_that_cannot_be_detected_is_taken_as_16_gb_with_a_warning(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    monkeypatch.setattr(os, "sysconf", fails)
    if detect_total_system_memory() is not None:
        pytest.skip("a control group limits this process")
    with pytest.warns(UserWarning, match="cannot be detected"):
        threshold, info = get_adaptive_memory_threshold()
    assert threshold == FALLBACK_THRESHOLD_GB == 16.0
    assert (info["total_memory_gb"], info["detection_method"]) == (0.0, "fallback")
    with pytest.raises(MemoryError, match="memory_limit_gb"):
        available_memory()


def test_the_threshold_is_three_quarters_of_the_memory():
    threshold, info = get_adaptive_memory_threshold()
    assert set(info) == {"total_memory_gb", "memory_fraction", "source", "detection_method"}
    assert info["total_memory_gb"] == detect_total_system_memory() / GB
    assert (info["memory_fraction"], info["source"]) == (DEFAULT_MEMORY_FRACTION, "default")
    assert threshold == 0.75 * info["total_memory_gb"]


def test_the_environment_is_asked_unless_an_argument_is_given(monkeypatch):
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", "0.6")
    threshold, info = get_adaptive_memory_threshold()
    assert (info["source"], info["memory_fraction"]) == ("env", 0.6)
    assert threshold == 0.6 * info["total_memory_gb"]
    assert get_adaptive_memory_threshold(0.5)[1]["source"] == "argument"


@pytest.mark.parametrize("fraction, clamped", [(0.01, 0.1), (0, 0.1), (-3, 0.1), (0.95, 0.9), (7, 0.9), (math.inf, 0.9)])
def test_fractions_are_clamped_with_a_warning_at_the_caller(monkeypatch, fraction, clamped):
    with pytest.warns(UserWarning, match=f"outside 0.1 to 0.9: {clamped} is used") as caught:
        assert get_adaptive_memory_threshold(fraction)[1]["memory_fraction"] == clamped
    assert caught[0].filename == __file__
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", str(fraction))
    with pytest.warns(UserWarning, match="from env"):
        assert get_adaptive_memory_threshold()[1]["memory_fraction"] == clamped


@pytest.mark.parametrize("text", ["a lot", "", "nan", "75%"])
def test_an_environment_variable_that_is_no_number_is_left_aside_with_a_warning(monkeypatch, text):
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", text)
    with pytest.warns(UserWarning, match="is not a number"):
        info = get_adaptive_memory_threshold()[1]
    assert (info["memory_fraction"], info["source"]) == (0.75, "default")


@pytest.mark.parametrize(
    "fraction, error", [("a lot", TypeError), (True, TypeError), (1j, TypeError), (math.nan, ValueError)]
)
def test_a_fraction_that_is_no_number_is_refused(fraction, error):
    with pytest.raises(error, match="memory_fraction"):
        get_adaptive_memory_threshold(fraction)


@contextlib.contextmanager
def cluster(n_workers, memory_limit):
    options = dict(processes=False, threads_per_worker=1, dashboard_address=":0")
    with LocalCluster(n_workers=n_workers, memory_limit=memory_limit, **options) as scheduler, Client(scheduler) as client:
        yield client


def test_the_limits_of_all_workers_count():
    with cluster(7, 256 * MB) as client:
        for argument in (None, client):
            threshold, info = get_adaptive_memory_threshold(0.5, argument)
            assert info["detection_method"] == "workers"
            assert info["total_memory_gb"] == 7 * 256 * MB / GB
            assert threshold == info["total_memory_gb"] / 2
        assert get_adaptive_memory_threshold(0.5, client=False)[1]["detection_method"] != "workers"
        budget = MemoryBudget.compute(1000, 3)
        assert budget.available_gb == 7 * 256 * MB / GB
        assert MemoryBudget.compute(1000, 3, client=False).available_gb != budget.available_gb
        assert select_nlsq_strategy(10**9, 5).threshold_gb == 0.75 * 7 * 256 * MB / GB


def test_workers_without_a_limit_share_their_machine():
    with cluster(3, 0) as client:
        limits = workers_memory(client).values()
        assert len(limits) == 3 and sum(limits) == pytest.approx(detect_total_system_memory())


def test_a_cluster_without_workers_is_a_fallback_that_says_so():
    with cluster(0, 256 * MB), pytest.warns(UserWarning, match="wait_for_workers"):
        assert get_adaptive_memory_threshold()[1]["detection_method"] == "fallback"


def test_a_client_must_be_a_client():
    with pytest.raises(TypeError, match=r"`client` must be a distributed\.Client"):
        get_adaptive_memory_threshold(client="localhost:8786")


# ---------------------------------------------------------------------------------------------------------------------
# budgets


def test_the_formulas_by_hand():
    budget = MemoryBudget.compute(10_000_000, 10, memory_limit_gb=16)
    assert budget.data_gb * GB == pytest.approx(160e6)
    assert budget.jacobian_gb * GB == pytest.approx(800e6)
    solver = 10 * 10 * 8 + 80e6
    assert budget.peak_gb * GB == pytest.approx(160e6 + 1.3 * 800e6 + solver)  # about 1.3 GB
    assert (budget.available_gb, budget.threshold_gb) == (16, 12)
    assert budget.fits_in_memory and budget.data_fits
    assert MemoryBudget.compute(10_000_000, 10, 3, memory_limit_gb=16).data_gb == pytest.approx(2 * budget.data_gb)


def test_the_threshold_itself_fits():
    assert MemoryBudget(4.0, 3.0, 1.0, 1.5, 3.0).strategy == "standard"
    assert MemoryBudget(4.0, 3.0, 3.0, 1.5, 3.1).strategy == "chunked"
    assert MemoryBudget(4.0, 3.0, 3.1, 1.5, 9.0).strategy == "streaming"


def test_what_is_available_now_counts_without_a_limit():
    budget = MemoryBudget.compute(1000, 3, client=False)
    assert budget.available_gb == pytest.approx(available_memory() / GB, rel=0.1)
    assert budget.threshold_gb == 0.75 * budget.available_gb


def test_the_environment_sets_the_share_of_a_budget(monkeypatch):
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", "0.5")
    assert MemoryBudget.compute(1000, 3, memory_limit_gb=8).threshold_gb == 4
    assert MemoryBudget.compute(1000, 3, memory_limit_gb=8, safety_factor=0.75).threshold_gb == 6


def test_a_budget_prints_its_decision_and_numbers():
    text = str(MemoryBudget.compute(10**8, 53, memory_limit_gb=16))
    assert text.startswith("chunked: the data of 1.49 GiB fit within the threshold of 12.00 GiB, the peak of 53")
    assert "100,000,000 points, 53 parameters" in text
    assert eval(repr(MemoryBudget.compute(10, 2, memory_limit_gb=1))) == MemoryBudget.compute(10, 2, memory_limit_gb=1)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(n_points=0), "`n_points` must be an integer of at least 1, not 0"),
        (dict(n_points=-5), "`n_points`"),
        (dict(n_points=2.5), "`n_points`"),
        (dict(n_points=math.nan), "`n_points` must be finite"),
        (dict(n_points=math.inf), "`n_points` must be finite"),
        (dict(n_params=0), "`n_params`"),
        (dict(n_features=0), "`n_features`"),
        (dict(memory_limit_gb=0), "`memory_limit_gb` must be more than 0 GiB, not 0"),
        (dict(memory_limit_gb=-1), "`memory_limit_gb`"),
        (dict(memory_limit_gb=math.nan), "`memory_limit_gb`"),
        (dict(memory_limit_gb=math.inf), "`memory_limit_gb`"),
        (dict(safety_factor=0), "`safety_factor`"),
        (dict(safety_factor=1.5), "`safety_factor`"),
        (dict(safety_factor=math.nan), "`safety_factor`"),
        (dict(dtype_bytes=0), "`dtype_bytes`"),
    ],
)
def test_budgets_refuse_values_without_meaning(arguments, error):
    with pytest.raises(ValueError, match=error):
        MemoryBudget.compute(**dict(n_points=100, n_params=3) | arguments)


@pytest.mark.parametrize("name", ["n_points", "n_params", "memory_limit_gb", "safety_factor"])
@pytest.mark.parametrize("value", ["4", True, [4], 1j])
def test_budgets_refuse_what_is_no_number(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be a number"):
        MemoryBudget.compute(**dict(n_points=100, n_params=3) | {name: value})


def test_numpy_numbers_and_whole_floats_are_numbers():
    plain = MemoryBudget.compute(1000, 3, memory_limit_gb=4)
    assert MemoryBudget.compute(1e3, np.int32(3), memory_limit_gb=np.float64(4)) == plain


# ---------------------------------------------------------------------------------------------------------------------
# budgets of arrays


def stored(path, shape, dtype, chunks):
    return zarr.create_array(store=path, shape=shape, dtype=dtype, chunks=chunks)


def test_arrays_of_every_kind_give_their_own_bytes(tmp_path):
    n = 4000
    x, y = np.zeros(n), np.zeros(n, "u2")
    expected = MemoryBudget.from_arrays(x, y, n_params=3, memory_limit_gb=1)
    assert expected.data_gb * GB == n * (8 + 2)
    assert expected.jacobian_gb * GB == n * 3 * 8
    assert (expected.n_points, expected.n_params) == (n, 3)
    kinds = [
        (da.from_array(x, chunks=100), da.from_array(y, chunks=999)),
        (stored(tmp_path / "x", (n,), "f8", (100,)), stored(tmp_path / "y", (n,), "u2", (1000,))),
    ]
    for each in kinds:
        assert MemoryBudget.from_arrays(*each, n_params=3, memory_limit_gb=1) == expected


def test_axis_vectors_count_as_vectors():
    y = np.broadcast_to(np.float32(1), (100, 20, 30))
    axes = (np.zeros((100, 1, 1)), np.zeros((20, 1)), np.zeros(30))
    budget = MemoryBudget.from_arrays(axes, y, sigma=0.1, n_params=2, memory_limit_gb=1)
    assert budget.n_points == 60_000
    assert budget.data_gb * GB == 60_000 * 4 + 150 * 8 + 8


def test_a_budget_of_dask_arrays_computes_nothing():
    def read(block_info=None):
        raise AssertionError("computed")

    y = da.map_blocks(read, chunks=((10**6,) * 1000,), dtype="f4", meta=np.empty(0, "f4"))

    def scheduler(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=scheduler):
        with pytest.raises(AssertionError, match="computed"):
            y.sum().compute()
        budget = MemoryBudget.from_arrays((da.arange(10**9, chunks=10**7),), y, y, n_params=5, memory_limit_gb=8)
    assert budget.data_gb * GB == 10**9 * (8 + 4 + 4)
    assert budget.strategy == "streaming"


def test_unknown_chunk_sizes_and_empty_data_are_refused():
    unknown = da.arange(100, chunks=10)
    unknown = unknown[unknown > 50]
    with pytest.raises(ValueError, match=r"`y` .*compute_chunk_sizes"):
        MemoryBudget.from_arrays(np.zeros(3), unknown, n_params=2)
    for empty in (np.zeros(0), None):
        with pytest.raises(ValueError, match="`y` must not be empty"):
            MemoryBudget.from_arrays(np.zeros(0), empty, n_params=2)


# ---------------------------------------------------------------------------------------------------------------------
# strategies


def test_peak_by_hand():
    assert estimate_peak_memory_gb(1000, 10) * GB == pytest.approx(1000 * 10 * 8 * 6.5)
    assert estimate_peak_memory_gb(1000, 10, bytes_per_element=4, jacobian_overhead=2) * GB == pytest.approx(80_000)


@pytest.mark.parametrize(
    "arguments", [(-1, 3), (3, -1), (3, 3, 0), (3, 3, 8, 0), (3, 3, 8, math.nan), (math.nan, 3), (2.5, 3)]
)
def test_a_peak_without_meaning_is_refused(arguments):
    with pytest.raises(ValueError):
        estimate_peak_memory_gb(*arguments)


@pytest.fixture
def threshold_gb():
    return get_adaptive_memory_threshold()[0]


def test_an_index_above_the_threshold_streams_first_of_all(threshold_gb):
    decision = select_nlsq_strategy(int(threshold_gb * GB / 8 * 1.01), 1000)
    assert decision.strategy is NLSQStrategy.HYBRID_STREAMING
    assert decision.index_memory_gb == pytest.approx(1.01 * threshold_gb)
    assert decision.threshold_gb == threshold_gb
    assert "Index array" in decision.reason and f"{threshold_gb:.2f} GiB" in decision.reason


def test_a_peak_above_the_threshold_is_out_of_core(threshold_gb):
    n = int(threshold_gb * GB / (8 * 50 * 6.5))
    decision = select_nlsq_strategy(int(1.01 * n), 50)
    assert decision.strategy is NLSQStrategy.OUT_OF_CORE
    assert decision.peak_memory_gb == pytest.approx(1.01 * threshold_gb, rel=1e-3)
    assert select_nlsq_strategy(int(0.99 * n), 50).strategy is NLSQStrategy.STANDARD


def test_strategies_keep_their_values():
    assert {each.value for each in NLSQStrategy} == {"standard", "out_of_core", "hybrid_streaming"}


@pytest.mark.parametrize("n_params", [0, -3])
def test_without_parameters_only_the_index_counts(n_params, threshold_gb):
    decision = select_nlsq_strategy(10**6, n_params)
    assert (decision.strategy, decision.peak_memory_gb) == (NLSQStrategy.STANDARD, 0.0)
    assert select_nlsq_strategy(int(threshold_gb * GB), n_params).strategy is NLSQStrategy.HYBRID_STREAMING


def test_the_environment_reaches_a_decision_without_an_argument(monkeypatch, threshold_gb):
    monkeypatch.setenv("NLSQ_MEMORY_FRACTION", "0.375")
    assert select_nlsq_strategy(1000, 3).threshold_gb == pytest.approx(threshold_gb / 2)
    assert select_nlsq_strategy(1000, 3, memory_fraction=0.75).threshold_gb == threshold_gb


def test_a_negative_number_of_points_is_refused():
    with pytest.raises(ValueError, match="`n_points`"):
        select_nlsq_strategy(-1, 3)
    assert select_nlsq_strategy(0, 3).strategy is NLSQStrategy.STANDARD


def test_a_decision_is_logged_with_its_numbers(caplog):
    with caplog.at_level(logging.INFO, "dask_nlsq"):
        select_nlsq_strategy(1_000_000, 53)
    assert "standard for 1,000,000 points and 53 parameters: Peak memory (2.57 GiB)" in caplog.text
    assert "memory threshold" in caplog.text


def test_every_public_name_is_there():
    for name in dask_nlsq.__all__:
        assert getattr(dask_nlsq, name).__doc__
    for name in dask_nlsq.memory.__all__:
        assert hasattr(dask_nlsq.memory, name)
