import importlib.metadata
import logging
import sys
import tomllib
from pathlib import Path

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from dask.sizeof import sizeof
from distributed import Client
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dask_nlsq
from dask_nlsq import cluster_report, curve_fit
from dask_nlsq.base import device_sizes as sizes
from dask_nlsq.memory import machine
from dask_nlsq.memory.processes import HERE, ProcessMemory, advice

from .clusters import local


@pytest.fixture(scope="module")
def client():
    with local(1, threads_per_worker=2, env={"PJRT_NPROC": "1"}) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def test_the_report_is_a_table_of_this_process_and_the_workers(client):
    report = cluster_report(client)
    head, here, worker, *advice = repr(report).splitlines()
    columns = ["process", "threads", "now", "limit", "dask_nlsq", "jax", "numpy", "python", "x64", "PJRT_NPROC", "device"]
    assert head.split() == columns
    assert here.startswith(HERE) and worker.startswith("tcp://")
    assert worker.split()[1] == "2"
    assert [line for line in advice if "2 threads, and JAX runs 1 kernels at once: set PJRT_NPROC=2" in line]


@pytest.mark.slow
def test_a_fit_warns_once_per_mismatch_with_what_mends_it(client, caplog):
    x = da.linspace(0, 1, 1000, chunks=100)
    with client.as_current(), caplog.at_level(logging.WARNING, "dask_nlsq"):
        curve_fit(lambda x, a: a * x, x, 2 * x)
    warned = [record.message for record in caplog.records if record.name == "dask_nlsq"]
    assert len(warned) == 1
    assert "PJRT_NPROC=2" in warned[0]


def test_a_mismatch_is_one_line_for_all_workers_that_have_it():
    here = ProcessMemory(HERE, 1, 0, 0, 0, 0, "0.1.0", "0.10.2", "2.4.0", "3.11.7", "in each task", None, 8)
    good = here._replace(name="tcp://good")
    old = [good._replace(name=f"tcp://{k}", jax="0.9.0", python="3.12.1") for k in range(3)]
    found = advice([here, good, *old])
    assert len(found) == 2
    assert found[0].startswith("tcp://0 and 2 more: jax 0.9.0, here 0.10.2: `pip install jax==0.10.2`")
    assert "Python 3.12.1, here 3.11.7" in found[1]


@pytest.mark.parametrize(
    "threads, nproc, said", [(1, None, None), (4, "4", None), (4, "2", "PJRT_NPROC=4"), (4, None, "start 8 more")]
)
def test_jax_is_to_have_as_many_threads_as_a_worker(threads, nproc, said):
    here = ProcessMemory(HERE, 1, 0, 0, 0, 0, "0.1.0", "0.10.2", "2.4.0", "3.11.7", "in each task", None, 8)
    found = advice([here, here._replace(name="tcp://worker", n_threads=threads, pjrt_nproc=nproc)])
    assert (said is None and not found) or said in found[0]


def test_where_the_package_is_on_the_path_alone_it_has_a_version(monkeypatch):
    """Without what an installation leaves."""
    monkeypatch.setattr("sys.path", [p for p in sys.path if "site-packages" not in p])
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        machine.version("dask_nlsq")
    assert machine.version_of("dask_nlsq") == dask_nlsq.__version__


def test_memory_limits_that_are_missing_or_uneven_are_named():
    here = ProcessMemory(HERE, 1, 0, 0, 0, 0, "0.1.0", "0.10.2", "2.4.0", "3.11.7", "in each task", None, 8)
    large = here._replace(name="tcp://large", limit=4 * 2**30)
    small, none = large._replace(name="tcp://small", limit=2**30), large._replace(name="tcp://none", limited=False)
    assert advice([here, large, large._replace(limit=3.9 * 2**30)]) == []
    uneven, missing = advice([here, large, small, none])
    assert uneven.startswith("tcp://small: memory limit 1.00 GiB, others 4.00 GiB") and "--memory-limit" in uneven
    assert missing.startswith("tcp://none: no memory limit") and "--memory-limit" in missing
    (single,) = advice([here, large._replace(x64="no")])
    assert "JAX_PLATFORMS=cpu" in single


@pytest.mark.slow
def test_limits_come_from_the_workers_themselves():
    with local(1, memory_limit=0) as cluster, Client(cluster) as client:
        assert any("no memory limit" in line for line in cluster_report(client).advice)


def test_jax_arrays_have_the_size_of_their_data():
    sizes.register(sizeof)
    assert sizeof(jnp.zeros(10**6, np.float32)) == 4 * 10**6
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["dask.sizeof"]["dask_nlsq"] == f"dask_nlsq.base.device_sizes:{sizes.register.__name__}"


@pytest.mark.parametrize("file", ["pinned", "oldest"])
def test_versions_for_tests_are_exact_and_those_that_the_package_allows(file):
    root = Path(__file__).parent.parent
    lines = [line.partition("#")[0].strip() for line in (root / "tests" / f"{file}.txt").read_text().splitlines()]
    versions = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [Requirement(each) for each in (*project["dependencies"], *extras["test"], *extras["plot"], *extras["docs"])]
    for each in needed:
        name = canonicalize_name(each.name)
        assert name == "dask-nlsq" or name in versions or file == "oldest", each
        assert name not in versions or each.specifier.contains(versions[name]), each
