"""Every argument of `curve_fit`, `fit`, `fit_map` and `fit_groups`, declared once.

A row says what an argument may be, its default, whether a checkpoint must have the same, whether maps have it, and how it
is given on the command line. Its check returns the value as the fit takes it. What depends on several arguments is checked
together, behind the table; the parameters of the model are read in `dask_nlsq.parameters`. The command line needs the table
before anything runs, so nothing here imports JAX.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from .base.text import near
from .base.values import FLOAT_MAX, count, is_integer, is_number, positive, takes, without_flags
from .kernels.rules import ACCURACY
from .model.params import Parameter
from .presets import PRESETS, as_goal

MOST_COUNT = 2**62  # evaluations, which kernels count in 64 bits
MOST_STARTS = 10**6
LOSSES = ("linear", "soft_l1", "huber", "cauchy", "arctan", "poisson")  # of `model.losses`, which imports JAX

# ---------------------------------------------------------------------------------------------------------------------
# checks of one value


def _as_given(name, value):
    return value


def _plain_records(attribute: str):
    """A check that puts ``attribute`` instead of each `Parameter`, so that a result gives starts, bounds and values."""

    def plain(value):
        if isinstance(value, Mapping):
            return {name: plain(each) for name, each in value.items()}
        return getattr(value, attribute) if isinstance(value, Parameter) else value

    return lambda name, value: plain(value)


def _must(test: Callable[[Any], Any], be: str, convert=None, error: type[Exception] = ValueError):
    """A check that ``test`` is true of a value, which is converted then."""

    def check(name, value):
        if not test(value):
            raise error(f"`{name}` must be {be}, not {value!r}")
        return value if convert is None else convert(value)

    return check


def _choice(*allowed):
    kinds = (str, Integral, np.bool_, NoneType)
    check: Any = _must(
        lambda value: isinstance(value, kinds) and value in allowed, f"one of {', '.join(map(repr, allowed))}"
    )
    check.words = [each for each in allowed if isinstance(each, str)]  # of the command line
    return check


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


def _is_flag(value):
    return isinstance(value, (bool, np.bool_)) or (isinstance(value, Integral) and value in (0, 1))


def _are_names(value):
    in_order = isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value)
    return in_order and len(set(value)) == len(value)


def _plain(value):
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _is_vector(value):
    return getattr(value, "ndim", 0) == 1 and not hasattr(value, "dask")  # whose length may be unknown


def _are_numbers(value):
    listed = isinstance(value, (list, tuple, set, frozenset, range)) or _is_vector(value)
    return listed and all(is_number(_plain(each)) for each in value)


def _are_ends(value):
    ends = list(value) if isinstance(value, (list, tuple)) or _is_vector(value) else []
    known = [_plain(each) for each in ends if each is not None]
    return len(ends) == 2 and _are_numbers(known) and known == sorted(known) and all(each == each for each in known)


def _rules(name, value):
    """Expressions and functions by name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise TypeError(
            f"`{name}` must be a dict of expressions by name, such as {{'area': 'height * width'}}, not {value!r}"
        )
    for key, rule in value.items():
        if isinstance(rule, Mapping):  # as a checkpoint has it
            kept = f"`{name}` for {key!r} is the function {rule.get('function')}, which a checkpoint does not keep"
            raise ValueError(f"{kept}: pass `{name}` again, as in resume(path, {name}=...)")
        if not isinstance(rule, str) and not callable(rule):
            raise TypeError(f"`{name}` for {key!r} must be an expression or a function, not {rule!r}")
    return dict(value)


def _intervals(name, value):
    """Intervals by place or name of a coordinate; None is the only one."""
    found = {}
    for key, given in value.items() if isinstance(value, Mapping) else [(None, value)]:
        listed = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) > 0
        pairs = [given] if _are_ends(given) else [*given] if listed else []
        known = key is None or isinstance(key, str) or (is_integer(key) and key >= 0)
        if not known or not pairs or not all(map(_are_ends, pairs)):
            raise ValueError(
                f"`{name}` must be a pair of numbers (low, high), in order, None for no limit; a list of pairs; or a dict "
                f"of them by name or place of a coordinate, not {value!r}. Limits of dates: seconds since the earliest"
            )
        place = int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON has no other keys than text
        found[place] = tuple(
            (-np.inf if low is None else float(low), np.inf if high is None else float(high)) for low, high in pairs
        )
    return found


def _sigma(name, value):
    """What is no data."""
    array = value
    try:
        if isinstance(value, (list, tuple)) and not any(hasattr(each, "dtype") for each in value):
            array = np.asarray(value)  # of others it would compute lazy ones, and lose masks
        kind = dtype.kind if isinstance(dtype := getattr(array, "dtype", None), np.dtype) else "f"
    except ValueError as err:
        raise ValueError(f"`{name}` is not an array: {err}") from None
    if kind == "b" or not without_flags(value):
        raise TypeError(f"`{name}` must be numbers, and neither True nor False: {value!r}")
    if is_number(value) and not 0 < value <= FLOAT_MAX:
        raise ValueError(f"`{name}` must be positive, not {value!r}")
    return value


def _nan_policy(name, value):
    if isinstance(value, str) and value == "propagate":
        raise ValueError("`nan_policy='propagate'` is not supported by this function.")
    if not isinstance(value, (str, NoneType)) or value not in (None, "raise", "omit"):
        raise ValueError("nan_policy must be one of {None, 'raise', 'omit'}")
    return value


def _mask(name, value):
    return _flag(name, value) if is_number(value) else value


def _accuracy(name, value):
    """Standard errors; inf where SciPy's tests alone decide."""
    return np.inf if value is None else positive(name, value)


def _is_path(value):
    return isinstance(value, (str, PathLike))


def _is_most(value):
    return is_integer(value) and value > 0


_flag = _must(_is_flag, "True or False", bool, TypeError)
_path = _must(_is_path, "a path", None, TypeError)
_callback = _must(lambda value: callable(value) and takes(value, 1), "a function of a record", None, TypeError)
_directory = _must(  # or what makes one
    lambda value: _is_path(value) or (callable(value) and takes(value, 0)), "a path", None, TypeError
)
_names = _must(_are_names, "different names in a list or tuple", tuple)
_values = _must(_are_numbers, "a sequence of numbers")
_range = _must(_are_ends, "a pair (low, high), in order, None for unlimited")
_tolerance = _must(
    lambda value: value is None or (is_number(value) and 0 <= value <= FLOAT_MAX),
    "a number >= 0 or None",
    lambda value: float(value or 0.0),
)
_most = _must(_is_most, "None or a positive integer", lambda value: int(min(value, MOST_COUNT)))
_scipys_most = _must(  # 0 is the default
    lambda value: _is_most(value) or (is_integer(value) and value == 0),
    "None or a positive integer",
    lambda value: int(min(value, MOST_COUNT)) or None,
)
_starts = _must(lambda value: is_integer(value) and 0 <= value <= MOST_STARTS, "0 (only p0) or a number of starts", int)
_scale = _must(lambda value: not isinstance(value, str) or value == "jac", "'jac' or positive numbers")
_jacobian = _must(
    lambda value: callable(value) or (isinstance(value, (str, NoneType)) and value in (None, "2-point", "3-point", "cs")),
    "a callable, None, '2-point', '3-point' or 'cs'",
    lambda value: value if callable(value) else None,
)


# ---------------------------------------------------------------------------------------------------------------------
# the table


class Option(NamedTuple):
    """How an argument is given on the command line."""

    help: str
    kind: type | None = None  # bool: a flag for what is not the default; None: words that `interface.cli_values` reads
    flag: str = ""  # where it is not called like the argument
    many: bool = False  # may be repeated


class Row(NamedTuple):
    """An argument."""

    check: Callable[[str, Any], Any]  # of the name and a value: the value as the fit takes it, or an error
    default: Any
    same: bool = False  # in all calls that go on with a checkpoint
    limit: bool = False  # kept in a checkpoint as well, but may be another one
    maps: bool = False  # `fit_map` has it too
    option: Option | None = None


FITS = {  # of `curve_fit`, without the model and its data
    "p0": Row(_plain_records("value"), None, same=True, maps=True, option=Option(
        "Start: a=1,b=2; or guess, which ready models do by themselves.", many=True)),
    "sigma": Row(_sigma, None, maps=True, option=Option(
        "Standard deviation of y: a number, the path of a Zarr array, or poisson.")),
    "absolute_sigma": Row(_flag, False, same=True, maps=True, option=Option(
        "Sigma is known, and the errors are not scaled by the fit.", bool)),
    "check_finite": Row(_optional(_flag), None, same=True),
    "bounds": Row(_plain_records("bounds"), (-np.inf, np.inf), same=True, maps=True, option=Option(
        "Lowest and highest values: a=0: or b=:3,c=0:1", many=True)),
    "method": Row(_choice(None, "auto", "trf", "lm", "dogbox"), None, same=True),
    "jac": Row(_jacobian, None),
    "full_output": Row(_flag, False),
    "nan_policy": Row(_nan_policy, None, same=True, option=Option("raise, or omit: leave out points that are not finite.")),
    "loss": Row(_choice(*LOSSES), "linear", same=True, maps=True, option=Option("What a residual costs; or counts.")),
    "f_scale": Row(positive, 1.0, same=True, maps=True),
    "x_scale": Row(_scale, "jac", same=True),
    "ftol": Row(_tolerance, 1e-8, same=True, maps=True),
    "xtol": Row(_tolerance, 1e-8, same=True, maps=True),
    "gtol": Row(_tolerance, 1e-8, same=True, maps=True),
    "accuracy": Row(_accuracy, ACCURACY, same=True, maps=True, option=Option(
        f"Standard errors from the optimum at which a fit has converged: {ACCURACY}.", float)),
    "max_nfev": Row(_optional(_most), None, limit=True, maps=True, option=Option("Maximum number of sweeps.", int)),
    "maxfev": Row(_optional(_scipys_most), None, limit=True),
    "mask": Row(_mask, None, maps=True, option=Option("Path of a Zarr array that is true where a point is left out.")),
    "mask_values": Row(_optional(_values), None, same=True, maps=True, option=Option(
        "Values of y that mark invalid points: 65535,0; or none. By default the largest value of unsigned integers.")),
    "valid_range": Row(_optional(_range), None, same=True, maps=True, option=Option(
        "Lowest and highest valid value of y: 0:1000 or 0:")),
    "xrange": Row(_optional(_intervals), None, same=True, maps=True, option=Option(
        "Fit range of x, ends included: 8.9:9.6; several: 1:2,4:5; of coordinate 0 of several: 0=8.9:9.6", many=True)),
    "on_bad_chunk": Row(_choice("raise", "mask"), "raise", same=True, maps=True, option=Option(
        "mask: leave out chunks that cannot be read.")),
    "missing_chunks": Row(_choice("error", "mask", "fill"), "error", same=True, maps=True, option=Option(
        "What to do with absent chunks.")),
    "decode_cf": Row(_flag, True, same=True, maps=True, option=Option(
        "Fit the stored values, without scale_factor, _FillValue and such.", bool)),
    "param_names": Row(_optional(_names), None, same=True, maps=True),
    "fixed": Row(_plain_records("value"), None, same=True, maps=True, option=Option(
        "Values that are not fitted: c=0.5", many=True)),
    "expr": Row(_optional(_rules), None, same=True, maps=True, option=Option(
        "Parameters that follow others: width2=width1; and derived quantities: area=height*width", many=True)),
    "strategy": Row(_choice("auto", "standard", "chunked", "streaming"), "auto", maps=True, option=Option(
        "Where the data are held.")),
    "reduction": Row(_choice("auto", "gram", "qr"), "auto", same=True),
    "jac_mode": Row(_choice("auto", "columns", "arguments"), "auto", same=True, maps=True),
    "tr_solver": Row(_choice(None, "exact", "cg"), None, same=True),
    "memory_limit_gb": Row(_optional(positive), None, limit=True, maps=True, option=Option(
        "Memory that each process may use, in GiB.", float, "memory-limit")),
    "partitions_per_thread": Row(_optional(count), None, limit=True),
    "n_starts": Row(_starts, 0, same=True, option=Option("Use the best of this many starts.", int)),
    "checkpoint": Row(_optional(_directory), None, option=Option("Directory from which a killed fit is resumed.", Path)),
    "callback": Row(_optional(_callback), None),
    "progress": Row(_optional(_flag), None),
    "verbose": Row(_choice(0, 1, 2), 0),
    "performance_report": Row(_optional(_path), None),
}  # fmt: skip
WORKFLOWS = {  # of `fit`, besides
    "workflow": Row(_choice(*PRESETS), "auto", option=Option("Strategy, tolerances and starts by a name.")),
    "goal": Row(_optional(lambda _, value: as_goal(value)), None),
    "n_starts": Row(_optional(_starts), None),
}
MAPS = {name: row for name, row in FITS.items() if row.maps} | {  # of `fit_map`
    "axis": Row(_as_given, None, option=Option("Axis of the spectra in STORE; the last one by default.", int, many=True)),
    "nan_policy": Row(_choice("omit", "raise"), "omit", option=FITS["nan_policy"].option),
    "guess": Row(_choice(None, "coarse-to-fine"), None, option=Option(
        "Pixels start from fits of the means of their neighbourhood.")),
    "full_covariance": Row(_flag, False),
}  # fmt: skip
GROUPS = {name: row for name, row in MAPS.items() if name not in ("axis", "guess")} | {  # of `fit_groups`
    "local": Row(
        _must(lambda value: isinstance(value, str) or _are_names(value), "the name of a parameter, or names"), (),
        option=Option("Parameters that each group has for itself: scale,background", many=True)),
    "group_axes": Row(_as_given, None, option=Option("Axis of STORE along which the groups lie.", int, many=True)),
    "groups": Row(_as_given, None, option=Option("Path of a Zarr array of labels, instead of --group-axes.")),
} | {name: FITS[name] for name in ("jac", "checkpoint", "callback", "progress", "verbose")}  # fmt: skip
SAME = [name for name, row in FITS.items() if row.same]
LIMITS = [name for name, row in FITS.items() if row.limit]


def checked(table: Mapping[str, Row], given: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments of a call as the fit takes them."""
    call = SimpleNamespace(**{name: row.check(name, given[name]) for name, row in table.items()})
    if "p0" in table and isinstance(call.p0, Mapping) and call.p0 and all(map(_is_of_lmfit, call.p0.values())):
        _apart(call)
    return call


def _is_of_lmfit(value) -> bool:
    """Whether it is a Parameter of lmfit, which need not be installed."""
    return all(hasattr(value, each) for each in ("value", "vary", "min", "max", "expr"))


def are_endless(bounds) -> bool:
    """Whether they are those by default."""
    return isinstance(bounds, tuple) and all(isinstance(each, float) for each in bounds) and bounds == (-np.inf, np.inf)


def _apart(call) -> None:
    """What lmfit's Parameters as ``p0`` say of bounds, values that are held, and ties; what the call says besides wins."""
    given, fixed, ties = call.p0, dict(call.fixed or {}), dict(call.expr or {})
    rules = {name: each.expr for name, each in given.items() if each.expr and name not in fixed} | ties
    ends = {name: (each.min, each.max) for name, each in given.items() if name not in rules}
    held = {name: each.value for name, each in given.items() if not each.vary and name not in rules}
    call.p0 = {name: each.value for name, each in given.items() if name not in rules}
    if isinstance(call.bounds, Mapping) or are_endless(call.bounds):
        call.bounds = ends | (dict(call.bounds) if isinstance(call.bounds, Mapping) else {})
    call.fixed, call.expr = held | fixed, rules or None


F = TypeVar("F", bound=Callable)


def with_known_names(table: Mapping[str, Row]) -> Callable[[F], F]:
    """A decorator that refuses an unknown keyword, and names the nearest argument: Python names it from 3.13 on.

    And a model, where the function takes none.
    """
    names = ["f", "xdata", "ydata", *table]

    def decorate(function: F) -> F:
        takes_model = "f" in signature(function).parameters

        @wraps(function)
        def call(*args, **options):
            if not takes_model and any(map(callable, (*args, options.get("f")))):
                raise TypeError(
                    f"{function.__name__} takes xdata and ydata, not a model: give the model to curve_fit(f, data, p0=...)"
                )
            for name in options.keys() - names:
                if name == "report" and "performance_report" in names:
                    raise TypeError(
                        f"{function.__name__} has no argument 'report': Dask's report of the work on a cluster is "
                        "performance_report=path, the page about the fit result.report(path)"
                    )
                hint = ": give sigma = 1 / weights" if name == "weights" else near(name, names)
                raise TypeError(f"{function.__name__} has no argument {name!r}{hint}")
            return function(*args, **options)

        return cast(F, call)

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# arguments together


def model_first(f, xdata, ydata, caller="curve_fit"):
    if callable(f):
        if ydata is None and hasattr(xdata, "dtype"):
            how = "None, data), which takes x from its coordinates" if hasattr(xdata, "dims") else "xdata, ydata)"
            raise TypeError(
                f"`ydata` is missing, since {caller}(f, data) takes the data for `xdata`. Give {caller}(f, {how}"
            )
        return f, xdata, ydata
    if callable(ydata):
        return ydata, f, xdata
    for each in (f, ydata):
        if hasattr(each, "make_params") and hasattr(each, "eval"):
            raise TypeError(
                f"{each!r} is a Model of lmfit: give {caller} a function written with jax.numpy, or a model of "
                "dask_nlsq.models, and p0=model.make_params(...)"
            )
    raise TypeError(
        f"{caller} needs a model: pass {caller}(f, xdata, ydata) or {caller}(xdata, ydata, f), got "
        f"{type(f).__name__}, {type(xdata).__name__}, {type(ydata).__name__}"
    )


class Noise(NamedTuple):
    """What a fit takes for granted about the noise."""

    loss: str  # "poisson" with weights from the model, too
    absolute: bool  # its size is known, from ``absolute_sigma`` or as a likelihood has it: the covariance is not scaled
    reweighted: bool  # ``sigma="poisson"``
    sigma: float | None = 1.0  # None where it differs from point to point

    @property
    def likelihood(self) -> bool:
        return self.loss == "poisson" and not self.reweighted

    @property
    def squares(self) -> bool:
        """Whether the cost is half a sum of squares, or of deviances."""
        return self.loss in ("linear", "poisson")

    @property
    def variance(self) -> Literal["known", "cost", "pearson"]:
        """What the variance of the residuals is taken from."""
        return "known" if self.absolute else "pearson" if self.reweighted else "cost"


def is_reweighted(sigma) -> bool:
    return isinstance(sigma, str) and sigma == "poisson"  # other words are paths


def noise_of(call) -> Noise:
    if is_reweighted(call.sigma):
        if call.loss not in ("linear", "poisson"):
            raise ValueError(f"sigma='poisson' is least squares: it cannot be combined with loss={call.loss!r}")
        return Noise("poisson", call.absolute_sigma, True)
    if call.loss == "poisson" and call.sigma is not None:
        raise ValueError(f"loss={call.loss!r} determines the weights: leave out `sigma`")
    return Noise(call.loss, call.absolute_sigma or call.loss == "poisson", False)
