"""Arguments are declared once; what is planned is what is done, and what is refused is refused by both."""

import inspect
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from scipy.optimize import Bounds, OptimizeWarning

from dask_nlsq import CheckpointError, curve_fit, fit, fit_map, hold, models, plan_fit
from dask_nlsq.interface.cli import nlsq
from dask_nlsq.interface.cli_values import READ
from dask_nlsq.model.losses import LIKELIHOODS
from dask_nlsq.model.losses import LOSSES as RHO
from dask_nlsq.options import FITS, GROUPS, LOSSES, MAPS, WORKFLOWS
from dask_nlsq.parameters import read_parameters
from dask_nlsq.prepare import HELD

N, CHUNK = 6000, 500
X = np.linspace(0, 10, N)
Y = np.random.default_rng(0).poisson(200 * np.exp(-0.5 * X) + 30).astype("f8")
P0 = [150, 0.4, 40]


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def plane(x, a, b, c):
    return a * jnp.exp(-b * x[0]) + c * x[1]


# ---------------------------------------------------------------------------------------------------------------------
# the table

OWN = {"f", "xdata", "ydata", "curve_fit_options"}


@pytest.mark.parametrize(
    ("function", "table"),
    [(curve_fit, FITS), (fit, WORKFLOWS | {"p0": FITS["p0"]}), (fit_map, MAPS)],
    ids=["curve_fit", "fit", "fit_map"],
)
def test_signature_docstring_and_table_are_the_same(function, table):
    parameters = {name: each for name, each in inspect.signature(function).parameters.items() if name not in OWN}
    assert {name: each.default for name, each in parameters.items()} == {name: row.default for name, row in table.items()}
    head = function.__doc__.split("    Parameters\n")[1].split("    Returns\n")[0].replace("\\\n", "")
    described = {name for line in re.findall(r"^    (\S.*?)(?: :.*)?$", head, re.M) for name in re.findall(r"\w+", line)}
    assert parameters.keys() - described <= ({"workflow"} if function is fit else set())  # which has a table of its own
    for name, each in parameters.items():
        for part in (each.annotation, *get_args(each.annotation)):
            for word in get_args(part) if get_origin(part) is Literal else ():
                table[name].check(name, word)
    for name, row in table.items():
        if name not in ("p0", "bounds", "axis"):  # which are read together with the model or the data
            row.check(name, row.default)


def test_what_is_held_is_said_as_to_a_fit():
    parameters = {name: each.default for name, each in inspect.signature(hold).parameters.items() if name not in OWN}
    assert parameters == {name: FITS[name].default for name in HELD}


def test_the_losses_that_can_be_named_are_those_that_there_are():
    assert set(LOSSES) == {*RHO, *LIKELIHOODS}


def test_an_argument_of_the_command_line_is_one_of_the_fit():
    for command, table in (("fit", FITS | WORKFLOWS), ("plan", FITS | WORKFLOWS), ("map", MAPS), ("groups", GROUPS)):
        known = {each.name for each in nlsq.commands[command].params}
        assert {name for name, row in table.items() if row.option is not None} <= known
    assert all((FITS | MAPS | GROUPS)[name].option for name in READ)


@pytest.mark.parametrize(
    ("line", "absent"),
    [
        ("import dask_nlsq.interface.cli", {"jax", "zarr"}),
        ("from dask_nlsq import curve_fit, fit_map", {"dask.array", "zarr", "xarray", "pandas", "scipy.optimize"}),
    ],
    ids=["command line", "fits"],
)
def test_what_takes_long_to_import_waits_until_it_is_used(line, absent):
    subprocess.run([sys.executable, "-c", f"import sys; {line}; assert not {absent} & sys.modules.keys()"], check=True)


@pytest.mark.parametrize(
    ("call", "near"),
    [(curve_fit, "sigma"), (plan_fit, "sigma"), (fit, "workflow"), (fit_map, "axis"), (plan_fit, "workflow")],
)
def test_a_keyword_that_is_none_is_named_with_the_nearest(call, near):
    workflow = {"goal": "fast"} if near == "workflow" else {}
    with pytest.raises(TypeError, match=f"{call.__name__} has no argument '{near}s': did you mean '{near}'"):
        call(decay, X, Y, **{f"{near}s": 1}, **workflow)


# ---------------------------------------------------------------------------------------------------------------------
# what is planned is what is done


def on_disk(path, values, chunks=CHUNK):
    array = zarr.create_array(
        str(path), shape=values.shape, dtype=values.dtype, chunks=chunks, config={"write_empty_chunks": True}
    )
    array[...] = values
    return str(path)


def lazy(values):
    return da.from_array(values, chunks=CHUNK)


def in_store(tmp, *, absent=(), empty=(), dtype="u2"):
    path = on_disk(tmp / "y.zarr", Y.astype(dtype))
    for k in absent:
        (tmp / "y.zarr" / "c" / f"{k}").unlink()
    for k in empty:
        (tmp / "y.zarr" / "c" / f"{k}").write_bytes(b"")
    return path


def scaled(tmp):
    path = on_disk(tmp / "packed.zarr", (Y * 10).astype("i2"))
    zarr.open_array(path, mode="r+").attrs.update(scale_factor=0.1, _FillValue=-1)
    return path


def named(values, chunks=None):
    array = xr.DataArray(values, coords={"t": X}, dims="t")
    return array if chunks is None else array.chunk(chunks)


CALLS = {  # of a temporary directory: arguments
    "arrays": lambda tmp: {},
    "lists": lambda tmp: dict(xdata=X[:50].tolist(), ydata=Y[:50].tolist()),
    "model last": lambda tmp: dict(f=X, xdata=Y, ydata=decay),
    "lazy": lambda tmp: dict(xdata=lazy(X), ydata=lazy(Y)),
    "standard": lambda tmp: dict(ydata=lazy(Y), strategy="standard"),
    "chunked": lambda tmp: dict(ydata=lazy(Y), strategy="chunked"),
    "chunked, in memory": lambda tmp: dict(strategy="chunked"),
    "streaming": lambda tmp: dict(ydata=lazy(Y), strategy="streaming"),
    "checkpoint": lambda tmp: dict(ydata=in_store(tmp), checkpoint=tmp / "c"),
    "checkpoint that is made": lambda tmp: dict(ydata=lazy(Y), checkpoint=lambda: tmp / "made"),
    "partitions": lambda tmp: dict(ydata=lazy(Y), strategy="chunked", partitions_per_thread=2),
    "memory limit": lambda tmp: dict(ydata=lazy(Y), memory_limit_gb=1),
    "memory limit of a stream": lambda tmp: dict(
        xdata=da.from_array(np.resize(X, 8 * 10**6), chunks=100_000),
        ydata=da.from_array(np.resize(Y, 8 * 10**6), chunks=100_000),
        memory_limit_gb=0.25,
    ),
    "sigma, a number": lambda tmp: dict(sigma=2.0),
    "sigma, an array": lambda tmp: dict(sigma=np.sqrt(Y + 1), absolute_sigma=True),
    "sigma, lazy": lambda tmp: dict(ydata=lazy(Y), sigma=lazy(np.sqrt(Y + 1))),
    "sigma, a covariance": lambda tmp: dict(xdata=X[::60], ydata=Y[::60], sigma=np.diag(Y[::60] + 1)),
    "sigma, poisson": lambda tmp: dict(ydata=lazy(Y), sigma="poisson"),
    "mask": lambda tmp: dict(ydata=lazy(Y), mask=X > 9),
    "mask, a flag": lambda tmp: dict(ydata=lazy(Y), mask=False),
    "masked array": lambda tmp: dict(ydata=np.ma.masked_greater(Y, 200)),
    "values that are no data": lambda tmp: dict(ydata=lazy(Y), mask_values=[30], valid_range=(0, 300)),
    "nan_policy": lambda tmp: dict(ydata=lazy(np.where(X < 1, np.nan, Y)), nan_policy="omit"),
    "not checked": lambda tmp: dict(ydata=lazy(Y), check_finite=False),
    "store": lambda tmp: dict(ydata=in_store(tmp)),
    "open store": lambda tmp: dict(ydata=zarr.open_array(in_store(tmp))),
    "stores of all": lambda tmp: dict(
        xdata=on_disk(tmp / "x", X), ydata=in_store(tmp), sigma=on_disk(tmp / "s", np.sqrt(Y + 1))
    ),
    "list of stores": lambda tmp: dict(
        ydata=[on_disk(tmp / "a", Y[:2000].astype("u2")), on_disk(tmp / "b", Y[2000:].astype("u2"))], strategy="streaming"
    ),
    "missing chunks masked": lambda tmp: dict(ydata=in_store(tmp, absent=[3]), missing_chunks="mask"),
    "missing chunks filled": lambda tmp: dict(ydata=in_store(tmp, absent=[3]), missing_chunks="fill", strategy="streaming"),
    "bad chunks masked": lambda tmp: dict(ydata=in_store(tmp, empty=[3]), on_bad_chunk="mask", strategy="chunked"),
    "attributes": lambda tmp: dict(ydata=scaled(tmp)),
    "attributes ignored": lambda tmp: dict(ydata=scaled(tmp), decode_cf=False, p0=[1500, 0.4, 400]),
    "method": lambda tmp: dict(method="lm", ydata=lazy(Y)),
    "loss": lambda tmp: dict(loss="soft_l1", f_scale=3.0, ydata=lazy(Y)),
    "counts": lambda tmp: dict(loss="poisson", ydata=lazy(Y)),
    "starts": lambda tmp: dict(n_starts=3, ydata=lazy(Y)),
    "held": lambda tmp: dict(fixed={"c": 30.0}, ydata=lazy(Y)),
    "by name": lambda tmp: dict(p0=dict(a=1, b=1, c=1), bounds={"a": (0, None), "b": (0, 5)}, x_scale=[100, 1, 10]),
    "bounds of SciPy": lambda tmp: dict(bounds=Bounds([0, 0, 0], [np.inf, 9, 99]), reduction="qr", jac_mode="arguments"),
    "Jacobian": lambda tmp: dict(
        jac=lambda x, a, b, c: jnp.stack([jnp.exp(-b * x), -a * x * jnp.exp(-b * x), 0 * x + 1], 1)
    ),
    "ready model": lambda tmp: dict(f=models.exponential + models.polynomial(0), p0=None, ydata=lazy(Y)),
    "ready model, streaming": lambda tmp: dict(
        f=models.exponential + models.polynomial(0), p0=None, ydata=lazy(Y), strategy="streaming"
    ),
    "workflow": lambda tmp: dict(workflow="large_robust", ydata=lazy(Y), n_starts=2),
    "workflow that streams": lambda tmp: dict(workflow="streaming", ydata=in_store(tmp), strategy="auto"),
    "goal": lambda tmp: dict(goal="memory_efficient", ydata=lazy(Y)),
    "labels": lambda tmp: dict(ydata=named(Y, CHUNK), xdata="t", sigma=named(np.sqrt(Y + 1)), mask=named(X > 9)),
    "labels in memory": lambda tmp: dict(ydata=named(Y), xdata=None),
    "axes": lambda tmp: dict(
        f=plane, xdata=(X[:60, None], np.arange(100.0)), ydata=da.from_array(Y.reshape(60, 100), chunks=(7, 50))
    ),
    "dates": lambda tmp: dict(
        xdata=lazy(np.datetime64("2026-01-01") + (X * 1e3).astype("m8[ms]")), ydata=lazy(Y), p0=[150, 0.4, 40]
    ),
    "says nothing": lambda tmp: dict(progress=False, verbose=0, tr_solver="exact", max_nfev=90, ftol=None),
}  # fmt: skip
ON_WORKERS = (
    "lazy", "chunked", "streaming", "checkpoint", "partitions", "missing chunks masked", "goal", "performance report",
)  # fmt: skip
REPORTED = {"performance report": lambda tmp: dict(ydata=lazy(Y), performance_report=tmp / "report.html")}  # needs a client


def decided(plan):
    """What a plan says, but for how much memory there is now."""
    known = {name: value for name, value in vars(plan).items() if name not in ("places", "reason")}
    places = [(place.name, place.n_threads, place.held, place.cores, place.x64) for place in plan.places]
    takes = pytest.approx(plan.places[0].peak - plan.places[0].now, abs=1)
    return known | dict(places=places, takes=takes, reason=re.sub(r"[\d.]+ [KMG]iB", "...", plan.reason))


def planned_and_done(call):
    options = dict(f=decay, xdata=X, ydata=Y, p0=P0) | call
    with dask.config.set(scheduler=lambda *args, **kwargs: pytest.fail("something was read")):
        planned = plan_fit(**options)
    return planned, (fit if options.keys() & {"workflow", "goal"} else curve_fit)(**options).plan


QUICK = {
    "arrays", "model last", "chunked, in memory", "checkpoint that is made", "memory limit of a stream", "sigma, lazy",
    "sigma, a covariance", "sigma, poisson", "masked array", "values that are no data", "stores of all", "list of stores",
    "missing chunks masked", "bad chunks masked", "attributes", "starts", "held", "bounds of SciPy",
    "ready model, streaming", "workflow that streams", "goal", "labels", "axes", "dates",
}  # fmt: skip
QUICK_ON_WORKERS = {"chunked", "streaming", "missing chunks masked", "performance report"}


def quick_or_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick_or_slow(CALLS, QUICK))
def test_the_plan_is_that_of_the_fit(name, tmp_path):
    planned, done = planned_and_done(CALLS[name](tmp_path))
    assert decided(planned) == decided(done)
    assert not (tmp_path / "made").exists() or done.strategy == "streaming"


@pytest.mark.parametrize("name", quick_or_slow(ON_WORKERS, QUICK_ON_WORKERS))
def test_the_plan_is_that_of_the_fit_on_workers(name, tmp_path, workers):
    with workers.as_current():
        planned, done = planned_and_done((CALLS | REPORTED)[name](tmp_path))
    assert decided(planned) == decided(done)
    assert len(planned.places) == 3


def test_a_plan_makes_no_checkpoint(tmp_path):
    assert plan_fit(decay, X, lazy(Y), P0, checkpoint=tmp_path / "c").strategy == "streaming"
    assert not (tmp_path / "c").exists()


def test_what_masks_of_chunks_take_is_planned(tmp_path):
    path = in_store(tmp_path)
    plain, masked = (plan_fit(decay, X, path, P0, missing_chunks=each, strategy="chunked") for each in ("error", "mask"))
    assert masked.held_bytes > plain.held_bytes


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def a_file(tmp):
    (tmp / "f").write_text("")
    return tmp / "f"


def kept(tmp):
    """The checkpoint of a fit."""
    curve_fit(decay, X, lazy(Y), P0, checkpoint=tmp / "c")
    return tmp / "c"


@pytest.mark.parametrize("name", ["that is a file", "below a file", "of another fit", "of another start"])
def test_a_checkpoint_that_is_refused_is_named(name, tmp_path):
    options = dict(f=decay, xdata=X, p0=P0) | REFUSED[f"checkpoint {name}"](tmp_path)
    with pytest.raises((CheckpointError, NotADirectoryError), match=r"`checkpoint` .*(a file: give|Changed: .*Give)"):
        plan_fit(**options)


def test_a_checkpoint_of_the_same_fit_is_planned(tmp_path):
    assert plan_fit(decay, X, lazy(Y), P0, checkpoint=kept(tmp_path)).strategy == "streaming"


REFUSED = {  # of a temporary directory: arguments
    "strategy": lambda tmp: dict(strategy="chunky"),
    "lm with bounds": lambda tmp: dict(method="lm", bounds=(0, 9e9)),
    "lm with a loss": lambda tmp: dict(method="lm", loss="huber"),
    "method": lambda tmp: dict(method="newton"),
    "max_nfev": lambda tmp: dict(max_nfev="raise"),
    "maxfev": lambda tmp: dict(maxfev=-3),
    "gtol": lambda tmp: dict(gtol={}),
    "accuracy": lambda tmp: dict(accuracy=-1),
    "sigma": lambda tmp: dict(sigma=-1),
    "sigma of True": lambda tmp: dict(sigma=[True, 1.0]),
    "shape of sigma": lambda tmp: dict(sigma=np.ones(7)),
    "covariance in a stream": lambda tmp: dict(xdata=X[:90], ydata=Y[:90], sigma=np.eye(90), strategy="streaming"),
    "covariance in little memory": lambda tmp: dict(xdata=X[:90], ydata=Y[:90], sigma=np.eye(90), memory_limit_gb=1e-3),
    "poisson twice": lambda tmp: dict(loss="huber", sigma="poisson"),
    "weights of counts": lambda tmp: dict(loss="poisson", sigma=2.0),
    "scaled counts": lambda tmp: dict(ydata=scaled(tmp), loss="poisson"),
    "shape of the mask": lambda tmp: dict(mask=np.ones(7, bool)),
    "mask_values": lambda tmp: dict(mask_values="none"),
    "valid_range": lambda tmp: dict(valid_range=(3, 1)),
    "p0": lambda tmp: dict(p0=[1, 2]),
    "p0 outside": lambda tmp: dict(bounds=(0, 100)),
    "bounds": lambda tmp: dict(bounds={"d": (0, 1)}),
    "fixed": lambda tmp: dict(fixed={"a": [1, 2]}),
    "names": lambda tmp: dict(param_names=["a"]),
    "x_scale": lambda tmp: dict(x_scale=[1, -1, 1]),
    "jac": lambda tmp: dict(jac="4-point"),
    "model": lambda tmp: dict(f=lambda x, a, b, c: a * np.exp(-b * x) + c),
    "nan_policy": lambda tmp: dict(nan_policy="propagate"),
    "memory": lambda tmp: dict(ydata=lazy(Y), memory_limit_gb=1e-3),
    "memory of a stream": lambda tmp: dict(ydata=lazy(Y), memory_limit_gb=1e-3, strategy="streaming"),
    "checkpoint of held data": lambda tmp: dict(checkpoint=tmp / "c", strategy="standard"),
    "checkpoint that is a file": lambda tmp: dict(ydata=lazy(Y), checkpoint=a_file(tmp)),
    "checkpoint below a file": lambda tmp: dict(ydata=lazy(Y), checkpoint=a_file(tmp) / "c"),
    "checkpoint of another fit": lambda tmp: dict(ydata=lazy(Y), checkpoint=kept(tmp), loss="huber"),
    "checkpoint of another start": lambda tmp: dict(ydata=lazy(Y), checkpoint=kept(tmp), p0=[9, 9, 9]),
    "performance report without a client": lambda tmp: dict(performance_report=tmp / "r.html"),
    "few points": lambda tmp: dict(xdata=X[:2], ydata=Y[:2]),
    "x and y": lambda tmp: dict(xdata=X[:-1]),
    "missing chunks": lambda tmp: dict(ydata=in_store(tmp, absent=[3])),
    "bad chunks": lambda tmp: dict(ydata=in_store(tmp, empty=[3])),
    "no store": lambda tmp: dict(ydata=str(tmp / "nothing.zarr")),
    "labels": lambda tmp: dict(ydata=named(Y), xdata="u"),
    "workflow": lambda tmp: dict(workflow="best"),
    "goal": lambda tmp: dict(goal="good"),
    "n_starts": lambda tmp: dict(n_starts=None),
    "verbose": lambda tmp: dict(verbose=3),
    "callback": lambda tmp: dict(callback=3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_fit_refuses_a_plan_refuses(name, tmp_path):
    options = dict(f=decay, xdata=X, ydata=Y, p0=P0) | REFUSED[name](tmp_path)
    said = []
    for call in (plan_fit, fit if options.keys() & {"workflow", "goal"} else curve_fit):
        with pytest.raises((ValueError, TypeError, MemoryError, OSError, RuntimeError)) as caught:
            call(**options)
        said.append((caught.type, re.sub(r"[\d.]+ [KMG]iB|raise memory_limit_gb to [\d.]+", "...", str(caught.value))))
    assert said[0] == said[1]


# ---------------------------------------------------------------------------------------------------------------------
# where a warning points, and parameters


WARNED = {
    "packed": (RuntimeWarning, lambda: plan_fit(decay, "t", named(Y).assign_attrs(scale_factor=2.0), P0)),
    "packed, fitted": (RuntimeWarning, lambda: curve_fit(decay, "t", named(Y).assign_attrs(scale_factor=2.0), P0)),
    "packed map": (RuntimeWarning, lambda: fit_map(decay, "t", named(Y).assign_attrs(scale_factor=2.0), P0, axis="t")),
    "shared": (RuntimeWarning, lambda: fit_map(decay, np.where(X > 9, np.nan, X), np.stack([Y, Y]), P0)),
    "covariance": (OptimizeWarning, lambda: curve_fit(lambda x, a, b: a * b * x, X, 3 * X, [1, 2])),
    "covariance, by a workflow": (OptimizeWarning, lambda: fit(lambda x, a, b: a * b * x, X, 3 * X, [1, 2])),
    "stuck": (OptimizeWarning, lambda: curve_fit(lambda x, a: jnp.abs(a - 1) + 1, X, np.where(X > 5, 0.0, 1.5), [3])),
}


@pytest.mark.slow
@pytest.mark.parametrize("category, call", WARNED.values(), ids=WARNED)
def test_a_warning_points_at_the_line_that_called(category, call):
    with pytest.warns(category) as caught:
        call()
    assert {each.filename for each in caught} == {__file__}


@pytest.mark.parametrize("shape", [None, (2, 3)])
def test_numbers_mean_the_same_to_a_fit_and_to_a_map(shape):
    call = SimpleNamespace(
        p0={"a": 3, "c": 1}, bounds={"a": (0, 5), "c": (None, 2)}, param_names=None, fixed={"b": 0.5}, expr=None
    )
    found = read_parameters(decay, call, shape)
    assert (found.names, found.free, found.guess) == (("a", "b", "c"), (0, 2), None)
    assert [*found.start] == [3, 0.5, 1]
    assert [*found.lower] == [0, -np.inf, -np.inf] and [*found.upper] == [5, np.inf, 2]
