"""Bad input gets one clear error, at the door: which argument, which value, which limit, what to do."""

import inspect
import math

import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from dask_nlsq import curve_fit, fit, fit_groups, fit_map, hold, load, plan_fit

from .clusters import assert_nothing_left

X = np.linspace(0, 1, 50)
Y = 2 * np.exp(-X)


def decay(x, a, b):
    return a * jnp.exp(-b * x)


def spoiled(array, value, *places):
    array = np.array(array, dtype=float)
    array[list(places)] = value
    return array


SHAPES_AND_TYPES = {
    "x and y differ in length": (
        ValueError,
        r"`xdata` of shape \(49,\) does not fit `ydata` of shape \(50,\)",
        X[:-1],
        Y,
        {},
    ),
    "no data": (ValueError, "`ydata` must not be empty", [], [], {}),
    "no x": (ValueError, "`xdata` must not be empty", [], Y, {}),
    "fewer points than params": (TypeError, "parameters=2 must not exceed the number of data points=1", X[:1], Y[:1], {}),
    "fewer points left than params": (TypeError, "data points=1 .49 more are masked", X, Y, {"mask": np.arange(50) > 0}),
    "complex": (TypeError, "`ydata` has dtype complex128: real numbers", X, Y + 1j, {}),
    "objects": (TypeError, "`xdata` has dtype object", np.array([object()] * 50), Y, {}),
    "text": (TypeError, "`ydata` has dtype <U1", X, np.array(["a"] * 50), {}),
    "dates as y": (TypeError, "`ydata` has dtype datetime64", X, np.array(["2026-01-01"] * 50, "M8[D]"), {}),
    "no date": (ValueError, "50 of the values of `xdata`", np.array(["NaT"] * 50, "M8[D]"), Y, {}),
    "unknown chunks": (
        ValueError,
        r"call ydata.compute_chunk_sizes\(\)",
        X,
        da.from_array(Y, 10)[da.from_array(Y, 10) > 1],
        {},
    ),
    "sigma of the wrong shape": (ValueError, r"`sigma` of shape \(7,\) does not fit", X, Y, {"sigma": np.ones(7)}),
    "mask of the wrong shape": (ValueError, r"`mask` of shape \(7,\) does not fit", X, Y, {"mask": np.ones(7, bool)}),
    "all masked": (ValueError, "all 50 points are masked", X, Y, {"mask": True}),
}


@pytest.mark.parametrize("kind, message, x, y, options", SHAPES_AND_TYPES.values(), ids=SHAPES_AND_TYPES)
def test_data_that_cannot_be_fitted(kind, message, x, y, options):
    with pytest.raises(kind, match=message):
        curve_fit(decay, x, y, **options)


OPTIONS = {
    "p0 outside bounds": (r"Initial guess is outside of provided bounds: a = 5.0 is not in \[0.0, 2.0\]",
                          {"p0": [5, 1], "bounds": (0, 2)}),
    "p0 of the wrong length": (r"`p0` has 3 values, but decay takes 2 parameters", {"p0": [1, 2, 3]}),
    "p0 masked": ("`p0` is a masked array, and all values are needed", {"p0": np.ma.masked_array([1.0, 2.0], [0, 1])}),
    "bounds masked": (r"`bounds\[1\]` is a masked array", {"bounds": (0, np.ma.masked_array([1.0, 2.0], [0, 1]))}),
    "p0 not finite": ("`p0` must be finite: b is nan", {"p0": [1, np.nan]}),
    "p0 a matrix": ("`p0` must be a vector", {"p0": [[1, 2]]}),
    "lower = upper": (r"strictly less than each upper bound: b has \[1.0, 1.0\]", {"bounds": ([0, 1], [1, 1])}),
    "bounds of the wrong length": (r"`bounds\[0\]` has 3 values: give one", {"bounds": ([0, 1, 2], [1, 2, 3])}),
    "bounds not a pair": ("must be a pair", {"bounds": 3}),
    "bounds not a number": ("must not contain nan", {"bounds": (np.nan, 1)}),
    "sigma zero": ("`sigma` must be positive: 3 values", {"sigma": np.where(np.arange(50) < 3, 0, 1)}),
    "sigma negative": ("`sigma` must be positive, not -1", {"sigma": -1}),
    "sigma negative everywhere": ("`sigma` must be positive: 50 values", {"sigma": -np.ones(50)}),
    "covariance in blocks": ('all points at once: use strategy="standard"', {"sigma": np.eye(50), "strategy": "chunked"}),
    "covariance not definite": ("`sigma` must be positive definite", {"sigma": -np.eye(50)}),
    "covariance of small values not symmetric": ("symmetric", {"sigma": 1e-10 * (np.tri(50) + 3 * np.eye(50))}),
    "covariance not symmetric": ("symmetric", {"sigma": np.tri(50)}),
    "unknown method": ("`method` must be one of None, 'auto', 'trf', 'lm', 'dogbox', not 'newton'", {"method": "newton"}),
    "unknown loss": ("`loss` must be one of", {"loss": "tukey"}),
    "unknown strategy": ("`strategy` must be one of", {"strategy": "magic"}),
    "unknown jac": ("`jac` must be a callable", {"jac": "4-point"}),
    "lm with bounds": ("only works for unconstrained problems", {"method": "lm", "bounds": (0, 9)}),
    "f_scale zero": ("`f_scale` must be more than 0", {"loss": "huber", "f_scale": 0}),
    "x_scale negative": ("`x_scale` must be 'jac' or positive", {"x_scale": [-1, 1]}),
    "ftol negative": ("`ftol` must be a number >= 0 or None", {"ftol": -1}),
    "max_nfev zero": ("`max_nfev` must be None or a positive integer", {"max_nfev": 0}),
    "max_nfev a fraction": ("`max_nfev` must be None or a positive integer", {"max_nfev": 2.5}),
    "ftol text": ("`ftol` must be a number", {"ftol": "1e-8"}),
    "names no text": ("`param_names` must be different names", {"param_names": [1, 2]}),
    "lm with a loss": ("supports only 'linear' loss", {"method": "lm", "loss": "huber"}),
    "list of pairs": (r"make zip\(\*bounds\)", {"bounds": [(0, 1), (0, 1), (0, 1)]}),
    "names too few": ("`param_names` must be 2 different names", {"param_names": ["a"]}),
    "nan_policy": (r"nan_policy must be one of \{None, 'raise', 'omit'\}", {"nan_policy": "drop"}),
}  # fmt: skip


@pytest.mark.parametrize("message, options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_make_no_sense(message, options):
    with pytest.raises(ValueError, match=message):
        curve_fit(decay, X, Y, **options)


WRONG = {
    "True": True, "False": False, "text": "False", "None": None, "[1]": [1], "()": (), "{}": {}, "{zz: 1}": {"zz": 1},
    "nan": math.nan, "inf": math.inf, "1j": 1j, "object": object(), "array": np.arange(3.0), "texts": np.array(["a", "b"]),
    "bytes": b"x", "-1": -1, "2.5": 2.5, "1e400": 10**400, "0": 0, "ragged": [[1, 2], [3]], "[None, 1]": [None, 1],
    "[True, 1]": [True, 1.0], "['1', '2']": ["1", "2"], "[1j, 1]": [1j, 1], "np.True": np.True_, "set": {1, 2}, "1": 1,
    "complex": np.array([1j, 2]), "{a: True}": {"a": True}, "{a: '1'}": {"a": "1"}, "{a: None}": {"a": None},
    "{a: 1j}": {"a": 1j}, "{a: [1]}": {"a": [1]}, "{a: (True, 2)}": {"a": (True, 2)}, "{a: ('0', 2)}": {"a": ("0", 2)},
}  # fmt: skip
FLAG = {"True", "False", "np.True", "0", "1"}
TOLERANCE, NUMBERS = {"None", "0", "1", "2.5"}, {"1", "2.5", "[1]"}
RIGHT = {  # by argument; those that are not here take none of them
    "p0": {"None"},
    "sigma": NUMBERS | {"None", "text", "['1', '2']"},  # paths
    "absolute_sigma": FLAG,
    "check_finite": FLAG | {"None"},
    "bounds": {"{}", "ragged"},  # a vector and a number
    "method": {"None"},
    "jac": {"None"},
    "full_output": FLAG,
    "full_covariance": FLAG,
    "nan_policy": {"None"},
    "f_scale": {"1", "2.5"},
    "x_scale": NUMBERS,
    **dict.fromkeys(["ftol", "xtol", "gtol"], TOLERANCE),
    "accuracy": {"None", "1", "2.5"},
    "max_nfev": {"None", "1", "1e400"},
    "maxfev": {"None", "0", "1", "1e400"},
    "mask": FLAG | {"None", "text", "['1', '2']", "[1]", "[True, 1]"},
    "mask_values": {"None", "()", "[1]", "array", "set"},
    "valid_range": {"None", "[None, 1]"},
    "xrange": {"None", "{}", "[None, 1]"},
    "expr": {"None", "{}", "{a: '1'}"},
    "param_names": {"None", "['1', '2']"},
    "fixed": {"None", "{}"},
    "decode_cf": FLAG,
    "tr_solver": {"None"},
    "memory_limit_gb": {"None", "1", "2.5"},
    "partitions_per_thread": {"None", "1"},
    "n_starts": {"0", "1"},
    "checkpoint": {"None", "text"},
    "performance_report": {"None", "text"},
    "callback": {"None"},
    "progress": FLAG | {"None"},
    "verbose": FLAG,
    "goal": {"None"},
    "guess": {"None"},
    "axis": {"0", "1", "-1", "[1]", "None"},
}
RIGHT_OF = {
    (fit, "n_starts"): {"None", "0", "1"},
    (fit_map, "nan_policy"): set(),
    (fit_map, "bounds"): {"{}", "ragged", "[None, 1]"},
}
ARGUMENTS = [
    (function, name)
    for function in (curve_fit, plan_fit, fit, fit_map)
    for name in inspect.signature(curve_fit if function is plan_fit else function).parameters
    if name not in ("f", "xdata", "ydata", "curve_fit_options")
]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda each: getattr(each, "__name__", each))
def test_what_is_no_value_of_an_argument_is_refused_by_its_name(function, name):
    right = RIGHT_OF.get((function, name), RIGHT.get(name, set()))
    y = np.stack([Y, Y]) if function is fit_map else Y
    for label in WRONG.keys() - right:
        with pytest.raises((ValueError, TypeError), match=rf"`{name}|{name} (must|of)|Each lower bound"):
            function(decay, X, y, **{name: WRONG[label]})
            pytest.fail(f"{name}={label} was accepted")


def test_unknown_keyword_is_a_type_error():
    for call in (curve_fit, fit):
        with pytest.raises(TypeError, match=r"no argument 'report': .* performance_report=path.* result\.report\(path\)"):
            call(decay, X, Y, report="fit.html")
    with pytest.raises(TypeError, match="curve_fit has no argument 'loess': did you mean 'loss'"):
        curve_fit(decay, X, Y, loess="linear")


def test_no_model_is_a_type_error():
    with pytest.raises(TypeError, match="needs a model"):
        curve_fit(X, Y, 3)


@pytest.mark.parametrize(
    "name, value, policy",
    [("xdata", np.nan, None), ("ydata", np.inf, "raise"), ("ydata", np.nan, None), ("sigma", np.inf, None)],
)
def test_values_that_are_not_finite_are_counted_and_placed(name, value, policy):
    data = {"xdata": X, "ydata": Y, "sigma": np.ones(50)}
    data[name] = spoiled(data[name], value, 23, 24, 41)
    blocks = {key: da.from_array(array, 10) for key, array in data.items()}
    with pytest.raises(ValueError, match=rf"3 of the values of `{name}`, first in block \(2,\) of 5.*omit"):
        curve_fit(decay, **blocks, nan_policy=policy)


@pytest.mark.parametrize("name, value", [("xdata", np.inf), ("ydata", np.nan), ("sigma", np.nan)])
def test_omit_gives_the_fit_without_these_points(name, value):
    rng = np.random.default_rng(0)
    data = {"xdata": X, "ydata": Y + rng.normal(0, 0.1, 50), "sigma": rng.uniform(1, 2, 50)}
    reference = curve_fit(decay, **{key: np.delete(array, [3, 30]) for key, array in data.items()})
    data[name] = spoiled(data[name], value, 3, 30)
    found = curve_fit(decay, **{key: da.from_array(array, 11) for key, array in data.items()}, nan_policy="omit")
    assert (found.n_points, found.n_omitted) == (48, 2)
    np.testing.assert_allclose(found.popt, reference.popt, rtol=1e-9)
    np.testing.assert_allclose(found.pcov, reference.pcov, rtol=1e-7)


def test_check_finite_wins_over_omit():
    with pytest.raises(ValueError, match="1 of the values of `ydata`"):
        curve_fit(decay, X, spoiled(Y, np.nan, 5), check_finite=True, nan_policy="omit")


TOO_LARGE = {  # options, value, block of 10 points
    "one value": (dict(ydata=spoiled(Y, 1e300, 23)), r"1e\+300", 2),
    "one negative value": (dict(ydata=spoiled(Y, -1e153, 23)), r"-1e\+153", 2),
    "all of them": (dict(ydata=Y * 1e153), r"2e\+153", 0),
    "a tiny sigma": (dict(sigma=1e-150), "2", 0),
    "one tiny sigma": (dict(sigma=spoiled(np.ones(50), 1e-200, 23)), "1.25.*", 2),
    "both": (dict(ydata=Y * 1e153, sigma=1e-150), r"2e\+153", 0),
    "integers": (dict(ydata=np.full(50, 2**60), sigma=1e-60), r"1\.15292e\+18", 0),
    "counts": (dict(ydata=spoiled(Y, 1e300, 23), loss="poisson"), r"1e\+300", 2),
    "beside a nan": (dict(ydata=spoiled(spoiled(Y, 1e300, 23), np.nan, 24), nan_policy="omit"), r"1e\+300", 2),
}


@pytest.mark.parametrize(
    "kind, strategy",
    [
        *((kind, "chunked") for kind in TOO_LARGE),
        ("one value", "standard"),
        ("a tiny sigma", "standard"),
        ("both", "streaming"),
    ],
)
def test_values_that_are_too_large_to_be_squared_are_named(kind, strategy):
    options, value, block = TOO_LARGE[kind]
    options, where = dict(xdata=X, ydata=Y) | options, ""
    if strategy != "standard":
        options = {k: da.from_array(v, 10) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        where = rf" \(first in block \({block},\)\)"
    with pytest.raises(ValueError, match=rf"`ydata` has values too large to be squared: {value}{where} is more than 1e\+75"):
        curve_fit(decay, **options, strategy=strategy)


@pytest.mark.parametrize("way", [dict(mask=np.arange(50) == 23), dict(mask_values=[1e300]), dict(valid_range=(None, 1e9))])
def test_values_that_are_too_large_may_be_masked(way):
    found = curve_fit(decay, X, spoiled(Y, 1e300, 23), **way)
    np.testing.assert_allclose(found.popt, [2, 1], rtol=1e-6)


def test_values_that_are_too_large_are_found_at_the_start_where_they_are_not_counted():
    with pytest.raises(ValueError, match=r"more than 1e\+150 times sigma, for 1 points \(first in block \(0,\)\)"):
        curve_fit(decay, X, spoiled(Y, 1e300, 23), check_finite=False)


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_large_values_that_are_not_counted_end_in_no_overflow(loss):
    y = (Y + 0.01 * np.random.default_rng(0).normal(size=50)) * 1e153
    found = curve_fit(decay, X, y, [2e153, 1], check_finite=False, loss=loss)
    assert found.summary() and found.diagnostics and found.to_dict()


@pytest.mark.parametrize("chunks", [None, 7])
def test_integer_coordinates_that_int64_does_not_hold_are_refused(chunks):
    index = np.arange(50, dtype=np.uint64) + np.uint64(2**63 - 25)
    near = index - np.uint64(25)
    y = 3.0 * (np.arange(50) % 2) + 1

    def model(x, a, b):
        return a * (x[0] % 2) + b

    def arrays(*given):
        return [each if chunks is None else da.from_array(each, chunks) for each in given]

    x, last, y = arrays(index, near, y)
    np.testing.assert_allclose(curve_fit(model, (last,), y).popt, [3, 1], rtol=1e-6)
    where = r"in block \(0,\)" if chunks is None else r"in block \(3,\)"
    with pytest.raises(ValueError, match=rf"`xdata` has integers above 2\^63 - 1, such as 92233720368547758.. {where}"):
        curve_fit(model, (x,), y)
    mask = index > 2**63 - 1
    assert curve_fit(model, (x,), y, mask=mask).n_points == 25
    if chunks is None:
        with pytest.raises(ValueError, match=r"`xdata` has integers above 2\^63 - 1"):
            fit_map(model, (x,), np.stack([y, y])).compute()


@pytest.mark.parametrize("axis", [(2, 0), (-1, 0), (2, 1)])
def test_axes_out_of_order_are_refused_since_x_follows_those_of_y(axis):
    y = np.ones((3, 4, 3))
    with pytest.raises(ValueError, match=r"`axis` must be in the order of the axes of `ydata`, and `xdata` with it: \("):
        fit_map(decay, np.ones((3, 3)), y, axis=axis)


def test_unchecked_nan_is_found_at_the_start():
    with pytest.raises(ValueError, match=r"nan or infinity,.* for 1 points"):
        curve_fit(decay, X, spoiled(Y, np.nan, 5), check_finite=False)


def branching(x, a, b):
    return a * x if a > 0 else b * x


MODELS = {
    "numpy": (TypeError, "jax.numpy", lambda x, a, b: a * np.exp(-b * x)),
    "math": (TypeError, "jax.numpy", lambda x, a, b: a * math.exp(b) * x),
    "math function": (TypeError, r"jax.numpy.*np.exp or math.exp", lambda x, a, b: a * math.exp(-b * x)),
    "branch": (TypeError, r"branches in Python.*line \d+.*jnp.where", branching),
    "branch on x": (TypeError, r"branches in Python.*jnp.where", lambda x, a, b: a * x if x > 0 else b * x),
    "boolean index": (TypeError, r"boolean index.*jnp.where.*mask=", lambda x, a, b: a * x[x > 0.1] + b),
    "no return": (TypeError, "returned None", lambda x, a, b: None),
    "complex": (TypeError, "returned complex values", lambda x, a, b: a * jnp.exp(1j * b * x)),
    "wrong shape": (ValueError, r"returned an array of shape \(3,\).*shape \(50,\), one value per point",
                    lambda x, a, b: jnp.ones(3) * a),
    "nan at p0": (ValueError, r"nan or infinity,.* for 50 points.*a=1, b=1", lambda x, a, b: a * jnp.log(x - b - 1e-9)),
    "derivative at p0": (ValueError, "derivatives of .* are not finite.*a=1, b=1", lambda x, a, b: jnp.sqrt(a - 1) + b * x),
    "not pointwise": (ValueError, "not pointwise", lambda x, a, b: a * jnp.cumsum(x) + b),
}  # fmt: skip


@pytest.mark.parametrize("kind, message, model", MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_fitted(kind, message, model):
    with pytest.raises(kind, match=message):
        curve_fit(model, X, Y)


@pytest.mark.parametrize("kind, message, model", MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_fitted_in_blocks(kind, message, model):
    with pytest.raises(kind, match=message.replace(r".*shape \(50,\)", "").replace(r"\(3,\), one", r"\(3,\).*one")):
        curve_fit(model, da.from_array(X, 9), da.from_array(Y, 7), strategy="chunked")


def test_jac_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"returned an array of shape \(3,\).*shape \(50, 2\)"):
        curve_fit(decay, X, Y, jac=lambda x, a, b: jnp.ones(3))


def test_numpy_in_jac_is_said_of_jac():
    with pytest.raises(TypeError, match=r"^jac needs concrete values.*jax\.numpy"):
        curve_fit(decay, X, Y, jac=lambda x, a, b: np.stack([np.exp(-b * x), x], axis=1))


def test_an_error_in_a_model_is_one_error():
    with pytest.raises(TypeError) as caught:
        curve_fit(lambda x, a, b: a * np.exp(-b * x), X, Y)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("data", [b"y.zarr", zarr.create_group(store={})], ids=["bytes", "group"])
def test_what_is_not_an_array_gets_advice(data):
    with pytest.raises(TypeError, match=r"`ydata` is .*zarr\.open_array"):
        curve_fit(decay, X, data)


def test_the_users_own_error_comes_through():
    def undefined(x, a):
        return a * missing_name  # noqa: F821

    with pytest.raises(NameError, match="missing_name"):
        curve_fit(undefined, X, Y)


def failing(block, block_info=None):
    if block_info and block_info[0]["chunk-location"] == (3,):
        raise OSError("disk gone")
    return block


def test_a_task_that_fails_names_its_block():
    y = da.from_array(Y, 10).map_blocks(failing, dtype=float)
    with pytest.raises(OSError, match="disk gone") as caught:
        curve_fit(decay, X, y)
    assert "block (3,)" in caught.value.__notes__[0]


@pytest.mark.slow
def test_a_task_that_fails_on_a_worker_names_its_block_and_leaves_nothing(workers):
    y = da.from_array(Y, 10).map_blocks(failing, dtype=float)
    with workers.as_current():
        with pytest.raises(OSError, match="disk gone") as caught:
            curve_fit(decay, X, y)
        assert any("block (3,)" in note for note in caught.value.__notes__)
        assert_nothing_left(workers)


@pytest.mark.parametrize("limit", ["4GB", -1, np.nan])
def test_a_memory_limit_is_a_positive_number(limit):
    with pytest.raises((TypeError, ValueError), match="`memory_limit_gb` must be"):
        curve_fit(decay, X, da.from_array(Y, 10), memory_limit_gb=limit)


def test_data_larger_than_all_workers_are_refused():
    with LocalCluster(n_workers=1, memory_limit="1GB", dashboard_address=":0") as cluster, Client(cluster):
        x = da.zeros(10**9, chunks=10**8)
        with pytest.raises(MemoryError, match=r"worker tcp.* may have 667\.57 MiB \(70% of its memory\).*rechunk"):
            curve_fit(decay, x, x)


def test_no_convergence_says_why_and_where():
    message = r"Optimal parameters not found: The maximum number of function evaluations.* 2 were made.* a=.*Raise max_nfev"
    with pytest.raises(RuntimeError, match=message):
        curve_fit(decay, X, Y + 0.1 * np.sin(9 * X), max_nfev=2)


def test_a_fit_whose_parameters_run_away_is_advised_other_starts_and_bounds_instead_of_more_evaluations():
    x = np.linspace(0, 10, 500)
    y = 2 * np.exp(-0.5 * x) + 0.3 + np.random.default_rng(0).normal(0, 0.05, 500)
    with pytest.raises(RuntimeError, match=r"condition \de\+0\d.*n_starts.*bounds") as error:
        curve_fit(lambda x, a, b, c: a * jnp.exp(-b * x) + c, x, y, [1, -1, 0])
    assert "Raise max_nfev" not in str(error.value)


def test_a_model_with_an_array_of_another_length_is_named_with_the_way_out():
    def model(x, a):
        return a * x * jnp.ones(7)

    x, y = np.arange(10.0), np.ones((3, 10))
    for call in (lambda: curve_fit(model, x, y[0], p0=[1]), lambda: fit_map(model, x, y, p0=[1], axis=1)):
        with pytest.raises(TypeError, match=r"the model model, tried on 10 points, combines .*\(10,\), \(7,\)\): .*xdata"):
            call()

    def fitting(x, a):
        return a * x * jnp.ones(10)

    assert curve_fit(fitting, x, 2 * x, p0=[1]).popt == pytest.approx([2])


@pytest.mark.parametrize("call", [curve_fit, plan_fit, fit_map])
def test_data_without_x_are_for_models_that_need_none(call):
    with pytest.raises(TypeError, match=r"gets None for x, as `xdata` is None .*: pass xdata\. .*xarray `ydata`"):
        call(decay, None, Y)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(xdata="energy"), "no Zarr array at 'energy'; names of coordinates need an xarray `ydata`"),
        (dict(xdata=("energy", X)), "names of coordinates need an xarray `ydata`"),
        (dict(sigma="poison"), "no Zarr array at 'poison': did you mean 'poisson'"),
        (dict(xdata="no/energy.zarr"), "no Zarr array at 'no/energy.zarr'$"),
    ],
)
def test_a_word_that_is_no_path_is_told_what_it_may_mean(options, message):
    with pytest.raises(FileNotFoundError, match=message):
        curve_fit(**dict(f=decay, xdata=X, ydata=Y) | options)


@pytest.mark.parametrize("call, y", [(fit_map, np.ones((4, 3, 64))), (curve_fit, np.ones(64))])
def test_an_array_that_was_taken_as_several_coordinates_is_named(call, y):
    with pytest.raises(ValueError, match=r"`xdata` of shape \(3, 64\) was taken as 3 coordinates"):
        call(decay, np.ones((3, 64)), y, p0=[1, 1])


def test_data_larger_than_the_limit_are_refused_before_they_are_read():
    def read(block):
        raise AssertionError("was read")

    y = da.zeros(10_000_000, chunks=1_000_000).map_blocks(read, dtype=float, meta=np.zeros(0))
    with pytest.raises(MemoryError, match=r"take 16\d\.\d\d MiB in memory.* it may take 10\.24 MiB \(memory_limit_gb\)"):
        curve_fit(decay, da.zeros(10_000_000, chunks=1_000_000), y, memory_limit_gb=0.01)


ROWS, UNKNOWN = np.stack([Y, Y]), da.ones(3)[da.ones(3) > 0]
NAMED = {  # what names the argument, where a model or a choice is called in another way than it can be
    "jac of one argument": (curve_fit, "`jac` cannot be evaluated: .*jac.x, .params", dict(jac=lambda x: x)),
    "jac of one argument, groups": (
        fit_groups, "`jac` cannot be evaluated", dict(ydata=ROWS, local="a", group_axes=0, jac=lambda x: x),
    ),
    "a tuple for a model of one x": (curve_fit, "as `xdata` is a tuple .*pass an array", dict(xdata=(X,))),
    "None for a model that uses x": (plan_fit, "as `xdata` is None .*pass xdata", dict(xdata=None)),
    "text from a model": (plan_fit, "the model <lambda> returned str, which is not", dict(f=lambda x, a: "s")),
    "a model of x alone": (fit_map, "`p0` has 1 value, but <lambda> takes 0", dict(f=lambda x: x, ydata=ROWS, p0=[1])),
    "a guess of other arguments": (fit_map, "`p0` is the function decay, .*p0.x, y", dict(ydata=ROWS, p0=decay)),
    "sigma of pieces": (hold, "`sigma` is not an array", dict(f=None, sigma=(X, None))),
    "y of pieces": (plan_fit, "`ydata` is not an array", dict(ydata=(Y, None))),
    "ends of no known length": (plan_fit, "`valid_range` must be a pair", dict(valid_range=UNKNOWN)),
    "ends that are arrays": (plan_fit, "`valid_range` must be a pair", dict(valid_range=(X, Y))),
    "p0 of no known length": (fit_map, "`p0` is a Dask array of unknown", dict(ydata=ROWS, p0=UNKNOWN)),
    "a callback of two arguments": (curve_fit, "`callback` must be a function of a record", dict(callback=lambda a, b: 0)),
    "groups without locals": (plan_fit, "`group_axes` is not an argument of curve_fit and fit.*`local`", dict(group_axes=0)),
    "what groups do not have": (
        plan_fit, "`method` is not an argument of fit_groups", dict(ydata=ROWS, local="a", group_axes=0, method="trf"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("function, message, call", NAMED.values(), ids=NAMED)
def test_an_error_names_the_argument_that_it_is_about(function, message, call):
    call = dict(f=decay, xdata=X, ydata=Y) | call
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{name: value for name, value in call.items() if value is not None or name == "xdata"})


@pytest.mark.parametrize(
    "n, shape, message",
    [
        (60, (60, 300), r"give x\[:, None\] for values along axis 0, an array of shape \(300,\) for values along the last"),
        (50, (50, 1), r"both the same shape, as with ydata.ravel\(\)"),
    ],
)
def test_x_of_another_shape_is_refused_with_the_usual_way(n, shape, message):
    with pytest.raises(ValueError, match=message):
        curve_fit(decay, np.arange(float(n)), np.ones(shape), [1, 1])


def test_a_missing_result_is_not_called_damaged(tmp_path):
    with pytest.raises(ValueError, match="there is nothing at this path"):
        load(tmp_path / "fitz.zarr")


def test_arguments_of_lmfit_get_a_hint():
    with pytest.raises(TypeError, match=r"no argument 'weights': give sigma = 1 / weights"):
        curve_fit(decay, np.arange(9.0), np.ones(9), [1, 1], weights=2)
    with pytest.raises(ValueError, match=r"'a \^ b': write powers with \*\*"):
        curve_fit(decay, np.arange(9.0), np.ones(9), [1, 1], expr={"c": "a^b"})
