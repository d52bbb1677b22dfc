"""What all tests share.

A kernel that several processes of a run need is compiled by the first of them: JAX keeps it in a directory of the run, which
workers and commands that tests start find in their environment.
"""

import gc
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import dask
import jax
import pytest
from distributed import Client

from tests.clusters import local

KERNELS = "KERNELS_OF_THE_TEST_RUN"  # a directory, named in the environment by the first process of the run


def pytest_configure(config):
    if KERNELS not in os.environ:
        config.kernels = TemporaryDirectory(prefix="dask-nlsq-kernels-")
        os.environ[KERNELS] = config.kernels.name
    for option, value in dict(compilation_cache_dir=os.environ[KERNELS], persistent_cache_min_compile_time_secs=0.1).items():
        os.environ[f"JAX_{option.upper()}"] = str(value)
        jax.config.update(f"jax_{option}", value)


@pytest.fixture
def nothing_runs():
    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.fixture(scope="session")
def workers():
    """Client of two processes with a thread each; not the default one: tests enter ``workers.as_current()``.

    They leave nothing there, and have a cluster of their own to kill, or to set up in another way.
    """
    with local() as cluster, Client(cluster, set_as_default=False) as client:
        yield client


MOST_MAPPED = 20_000  # pieces of memory in a process; Linux allows 65,530, and each compiled program takes several


@pytest.fixture(scope="module", autouse=True)
def programs_that_no_test_needs_any_more():
    """Compiled programs of one module are given up before there are too many: LLVM ends the process then."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPED:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def handler_of_ctrl_c():
    """A module that leaves another handler of Ctrl-C would spoil the tests of others in its process.

    A shell starts what runs in its background with Ctrl-C ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    left = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert left is signal.default_int_handler, f"tests of this module leave {left} as the handler of SIGINT"
