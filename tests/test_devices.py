"""Data on devices that have memory of their own: three virtual ones, in a process of their own."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dask_nlsq import curve_fit, plan_fit
from dask_nlsq.engine.devices import OnDevices
from dask_nlsq.kernels.blocks import tile_size
from dask_nlsq.kernels.kind import CPU, GPU, kind_of
from dask_nlsq.kernels.lanes import n_lanes
from dask_nlsq.memory.device import Device, DeviceMemoryError, kind_of_all, said_if_full
from dask_nlsq.memory.machine import process_settings
from dask_nlsq.memory.plan import MemoryBudgetError
from dask_nlsq.memory.processes import HERE, ProcessMemory, advice
from tests.virtual_devices import CALLS, decay

CARD = Device("gpu", "NVIDIA H200", 1, 140e9, 1e9, "host all", True)


@pytest.fixture(scope="module")
def run():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    root = Path(__file__).parent.parent
    made = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.virtual_devices"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["n"] == 3
    return found


@pytest.mark.parametrize("name", [*CALLS, "map", "groups"])
def test_a_fit_on_devices_is_that_of_the_cpu(run, name):
    expected, found = run["expected"][name], run["found"][name]
    perr = np.array(expected["perr"])
    assert (abs(np.array(found["popt"]) - expected["popt"]) <= 1e-6 * perr).all()
    np.testing.assert_allclose(found["perr"], perr, rtol=1e-6)


def test_two_fits_on_the_same_devices_have_the_same_bits(run):
    assert run["found"] == run["again"]


def test_blocks_are_put_on_the_devices_in_turn_as_they_are_stored_and_stay(run):
    held = run["held"]
    assert held["before"] is None
    assert held["where"] == [0, 1, 2, 0, 1, 2, 0]
    assert held["dtypes"] == ["float32", "float64"]  # x and y, sigma
    assert held["same"]
    assert held["puts"] == []  # of a second fit
    assert held["after"] is None


def test_a_sweep_fetches_once_from_each_device(run):
    held = run["held"]
    assert all(len({*each}) == len(each) for each in held["fetches"])
    assert held["fetches"].count([0, 1, 2]) == held["sweeps"]


def test_blocks_without_room_stay_in_the_memory_of_the_process_and_do_not_change_a_bit(run):
    assert run["crowded"]["popt"] == run["found"]["plain"]["popt"]
    assert any("of 7 blocks do not fit" in each for each in run["crowded"]["said"])


def test_blocks_that_are_read_in_each_sweep_are_on_a_device_before_kernels_take_their_turn(run):
    ahead = run["ahead"]
    assert ahead["kinds"] == ["ArrayImpl"]
    assert 1 <= ahead["most"] <= 2 * 3  # on each of three devices
    assert ahead["popt"] == run["found"]["streamed"]["popt"]


def test_the_device_of_the_caller_gets_all_blocks(run):
    assert set(run["chosen"]["where"]) == {2}
    assert run["chosen"]["popt"] == run["found"]["plain"]["popt"]


def test_threads_take_several_devices_in_turn(run):
    assert run["by_threads"] == [0, 1, 2, 0]


def test_a_gpu_gets_long_blocks_and_many_lanes():
    assert tile_size(GPU, 3, GPU.block_points) == GPU.block_points
    assert tile_size(GPU, 53, GPU.block_points) == 2**20
    assert n_lanes(64, GPU) == 2**16
    assert kind_of("gpu") == GPU
    assert kind_of("cpu") == CPU


def test_of_workers_with_other_kinds_of_devices_data_are_cut_for_cpus():
    assert kind_of_all([CARD, CARD]) == GPU
    assert kind_of_all([CARD, Device()]) == CPU
    assert kind_of_all([]) == CPU


def test_blocks_on_devices_do_not_travel():
    there = OnDevices()
    there.blocks = [object()]
    assert pickle.loads(pickle.dumps(there)).blocks is None


def planned(monkeypatch, device, n=10**6):
    settings = process_settings() | dict(device=device)
    monkeypatch.setattr("dask_nlsq.memory.processes.process_settings", lambda: settings)
    x = np.broadcast_to(np.float32(1), n)
    return plan_fit(decay, x, x, p0=[1, 1, 0])


def test_a_plan_says_what_will_be_on_the_device(monkeypatch):
    plan = planned(monkeypatch, CARD)
    assert plan.kind == GPU
    assert "NVIDIA H200: " in str(plan)
    assert " of 129.45 GiB free" in str(plan)
    assert "cross" not in str(plan)


def test_a_plan_says_what_crosses_to_the_device_in_each_sweep(monkeypatch):
    full = CARD._replace(in_use=140e9 - 1e6)
    assert "MiB cross to it in each sweep" in str(planned(monkeypatch, full))


def test_a_device_without_room_for_one_block_is_refused_with_the_numbers(monkeypatch):
    with pytest.raises(MemoryBudgetError, match=r"a sweep takes .* on NVIDIA H200 .* which has .* JAX_PLATFORMS=cpu"):
        planned(monkeypatch, CARD._replace(total=1e7, in_use=0.0))


def test_workers_on_one_card_are_named_where_jax_takes_its_memory_for_the_first():
    ours = ProcessMemory(HERE, 1, 0, 0, 0, 0, "0.1.0", "0.10.2", "2.4.0", "3.11.7", "in each task", None, 8)
    workers = [ours._replace(name=f"tcp://{k}", device=CARD) for k in range(3)]
    (said,) = advice([ours, *workers])
    assert said.startswith("tcp://0 and 2 more: 3 workers compute on the same NVIDIA H200")
    assert "CUDA_VISIBLE_DEVICES" in said and "XLA_PYTHON_CLIENT_PREALLOCATE=false" in said
    assert advice([ours, *(each._replace(device=CARD._replace(preallocated=False)) for each in workers)]) == []
    assert advice([ours, *(each._replace(device=CARD._replace(card=each.name)) for each in workers)]) == []
    (mixed,) = advice([ours, workers[0], ours._replace(name="tcp://cpu")])
    assert "different kinds, gpu and cpu" in mixed and "dask.annotate(resources=...)" in mixed


def test_memory_that_a_device_does_not_have_is_an_error_that_says_what_to_do():
    with pytest.raises(DeviceMemoryError, match=r"not enough memory .* smaller chunks"), said_if_full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), said_if_full():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here that JAX can use")
def test_a_gpu_holds_long_blocks_and_gives_the_fit_of_the_cpu():
    x = np.linspace(0, 4, 10**6)
    y = 2.5 * np.exp(-1.3 * x) + 0.5 + np.random.default_rng(0).normal(0, 0.2, x.size)
    found, again = (curve_fit(decay, x, y, p0=[1, 1, 0]) for _ in range(2))
    assert found.plan.kind.name == "gpu"
    assert found.popt.tolist() == again.popt.tolist()
    with jax.default_device("cpu"):
        expected = curve_fit(decay, x, y, p0=[1, 1, 0])
    assert (abs(found.popt - expected.popt) <= 1e-6 * expected.perr).all()
