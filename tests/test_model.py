import importlib
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cloudpickle
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dask_nlsq
from dask_nlsq.data.align import build_data
from dask_nlsq.engine.evaluator import Evaluator
from dask_nlsq.engine.request import Objective
from dask_nlsq.engine.sweep import open_sweep
from dask_nlsq.model import function
from dask_nlsq.model.function import intern, parameter_names


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def make(scale):
    def model(x, a):
        return scale * a * x

    return model


def test_same_content_is_the_same_model():
    assert intern(make(2.0)) is intern(make(2.0))


def test_another_closure_is_another_model():
    assert intern(make(2.0)) is not intern(make(3.0))


def test_a_table_changed_in_place_is_another_model():
    table = np.arange(3.0)

    def model(x, a):
        return a * jnp.asarray(table)[0] * x

    before = intern(model)
    table[0] = 5
    assert intern(model) is not before


def test_a_changed_module_global_is_another_model(tmp_path, monkeypatch):
    (tmp_path / "users_models.py").write_text("SCALE = 1.0\n\ndef line(x, a):\n    return SCALE * a * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    users_models = importlib.import_module("users_models")
    before = intern(users_models.line)
    assert intern(users_models.line) is before
    users_models.SCALE = 10.0
    assert intern(users_models.line) is not before


def test_a_method_is_the_same_model_each_time():
    class Scaled:
        def line(self, x, a):
            return a * x

    scaled = Scaled()
    assert intern(scaled.line) is intern(scaled.line)


def test_pickling_gives_back_the_model_of_this_process():
    model = intern(make(2.0))
    assert pickle.loads(pickle.dumps(model)) is model
    assert cloudpickle.loads(cloudpickle.dumps(model)) is model


def test_what_cannot_be_pickled_is_a_clear_error():
    lock = threading.Lock()

    def model(x, a):
        return a * x + lock.locked()

    with pytest.raises(TypeError, match=r"cannot be pickled.*close over arrays and numbers"):
        intern(model)


def test_parameter_names_come_from_the_signature():
    assert parameter_names(lambda x, a, b=2: a) == ["a", "b"]
    assert parameter_names(lambda x, *params: x) is None
    assert parameter_names(lambda x: x) is None


@pytest.mark.slow
def test_a_function_from_main_is_compiled_once_per_worker_process():
    """64 blocks of 3 lengths on two workers: one compilation of the sweep kernel in each process."""
    script = textwrap.dedent("""
        import dask.array as da, jax, jax.numpy as jnp, numpy as np
        from distributed import Client, LocalCluster
        import dask_nlsq

        def decay(x, a, b):
            return a * jnp.exp(-b * x)

        def count():
            from dask_nlsq.model.function import _registry
            every = [item for model in _registry.values() for item in model.compiled.items()]
            return sum(kernel.run.run.run._cache_size() for key, kernel in every if key[0] == "sweep")

        if __name__ == "__main__":
            x = np.linspace(0, 1, 64 * 40_000)
            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as c, Client(c) as client:
                chunks = (*[40_000] * 62, 30_000, 50_000)  # two ragged shapes
                y = da.from_array(2 * np.exp(-x) + 0.01 * np.sin(99 * x), chunks=chunks)
                dask_nlsq.curve_fit(decay, da.from_array(x, chunks=chunks), y)
                dask_nlsq.curve_fit(decay, da.from_array(x, chunks=chunks), y, p0=[3, 1])
                print("compiled", *client.run(count).values())
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "compiled 1 1" in run.stdout, run.stdout + run.stderr


FIT = """
import jax.numpy as jnp, numpy as np, dask_nlsq
x = np.linspace(0, 1, 100)
dask_nlsq.curve_fit(lambda x, a, b: a * jnp.exp(-b * x), x, 2 * np.exp(-x))
"""


@pytest.mark.slow
@pytest.mark.parametrize("disabled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_kernels_are_kept_between_processes_where_the_user_asks(disabled, tmp_path):
    own = {"DASK_NLSQ__COMPILATION_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    environment = {key: value for key, value in os.environ.items() if "CACHE" not in key} | own
    if disabled:
        environment["NLSQ_DISABLE_PERSISTENT_CACHE"] = "1"
    root = Path(__file__).parent.parent
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", FIT], check=True, env=environment, cwd=root)
        kept.append({path for path in tmp_path.rglob("*-cache") if path.is_file()})
    assert bool(kept[0]) != disabled
    assert kept[0] == kept[1]  # the second process compiled nothing new


@pytest.mark.slow
def test_ragged_ends_along_three_axes_share_two_compilations():
    """Chunks of 40 x 50 x 60 points with a shorter one at the end of each axis: eight shapes."""
    chunks = ((40, 40, 17), (50, 50, 13), (60, 60, 7))
    t, row, column = (np.linspace(0, 1, sum(sizes)) for sizes in chunks)
    t, row = t[:, None, None], row[:, None]

    def model(axes, a, b, c):
        t, row, column = axes
        return a * jnp.exp(-b * t) + c * row * column

    y = 2 * np.exp(-0.7 * t) + 0.3 * row * column
    dask_nlsq.curve_fit(model, (t, row, column), da.from_array(y, chunks=chunks), p0=[1, 1, 1], reduction="gram")
    compiled = intern(model).compiled
    assert 1 <= sum(f.run.run.run._cache_size() for key, f in compiled.items() if key[0] == "sweep") <= 2


@pytest.mark.slow
def test_a_sweep_on_a_worker_takes_its_scratch_memory_once():
    """Under the nanny's MALLOC_TRIM_THRESHOLD_ a kernel would fetch each temporary array anew: hundreds of page faults."""

    def page_faults(dask_worker, request):
        from dask_nlsq.engine.partition import CONDENSE, Partition

        (partition,) = [value for value in dask_worker.data.values() if isinstance(value, Partition)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            CONDENSE.of(partition, [request.objective], [request._replace(objective=0)])
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

    x = da.linspace(0, 10, 2**17, chunks=2**17)
    problem = build_data(x, 2 * da.exp(-x), check=True, omit=False)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        open_sweep(problem, "chunked", client, 1) as sweep,
    ):
        evaluator = Evaluator(sweep, Objective(intern(decay)), 3)
        params = np.array([2.0, 1.1, 0.1])
        evaluator(params, "gram")
        (faults,) = client.run(page_faults, request=evaluator.request(params)).values()
    assert faults < 200, faults


def slow_to_trace(x, a):
    time.sleep(0.3)
    return a * x


def test_a_model_that_compiles_slowly_is_told_while_it_does(monkeypatch):
    monkeypatch.setattr(function, "SLOW", 0.05)
    monkeypatch.setattr(function, "EVERY", 0.05)
    model, told = intern(slow_to_trace), []
    run = model.jit(lambda x: slow_to_trace(x, 2.0))
    with model.watched(told.append):
        run(np.ones(3))
        n = len(told)
        run(np.ones(3))
    assert 2 <= n == len(told) and 0.05 <= told[0] < told[-1] < 5
    assert not model.watches


@pytest.mark.slow
def test_the_bar_and_the_log_say_that_a_model_compiles(monkeypatch, caplog, capsys):
    monkeypatch.setattr(function, "SLOW", 0.05)
    x = np.linspace(0, 1, 50)
    with caplog.at_level("INFO", "dask_nlsq"):
        dask_nlsq.curve_fit(slow_to_trace, x, 2 * x, p0=[1], progress=True)
    assert "compiling the model, 0 s so far" in capsys.readouterr().err
    assert caplog.text.count("compiling the model, ") == 1
