"""Every argument of `curve_fit`, `fit` and `fit_map`, declared once.

A row says what an argument may be, its default, whether a checkpoint must have the same, whether maps have it, and how it
is given on the command line. Its check returns the value as the fit takes it. What depends on several arguments is checked
together, behind the table; the parameters of the model are read in `dask_nlsq.parameters`. The command line needs the table
before anything runs, so nothing here imports JAX.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from .base.values import FLOAT_MAX, count, is_integer, is_number, positive, without_flags
from .kernels.rules import ACCURACY
from .presets import PRESETS, as_goal

MOST_COUNT = 2**62  # evaluations, which kernels count in 64 bits
MOST_STARTS = 10**6
LOSSES = ("linear", "soft_l1", "huber", "cauchy", "arctan", "poisson")  # of `model.losses`, which imports JAX

# ---------------------------------------------------------------------------------------------------------------------
# checks of one value


def _as_given(name, value):
    return value


def _choice(*allowed):
    def check(name, value):
        if not isinstance(value, (str, Integral, np.bool_, NoneType)) or value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        return value

    return check


def _method(name, value):
    value = _choice(None, "auto", "trf", "lm", "dogbox")(name, value)
    return None if value == "auto" else value


def _flag(name, value):
    """True, False, or 0 and 1."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
        raise TypeError(f"`{name}` must be True or False, not {value!r}")
    return bool(value)


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


def _path(name, value):
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"`{name}` must be a path, not {value!r}")
    return value


def _function(name, value):
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, not {value!r}")
    return value


def _checkpoint(name, value):
    """A path, or what makes a directory."""
    return value if callable(value) else _path(name, value)


def _names(name, value):
    in_order = isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value)
    if not in_order or len(set(value)) < len(value):
        raise ValueError(f"`{name}` must be different names in a list or tuple, not {value!r}")
    return tuple(value)


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


def _mask(name, value):
    return _flag(name, value) if is_number(value) else value


def _plain(value):
    return getattr(value, "item", lambda: value)()


def _values(name, value):
    listed = isinstance(value, (list, tuple, set, frozenset, range)) or getattr(value, "ndim", 0) == 1
    if not listed or not all(is_number(_plain(each)) for each in value):
        raise ValueError(f"`{name}` must be a sequence of numbers, not {value!r}")
    return value


def _range(name, value):
    ends = list(value) if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1 else []
    known = [_plain(each) for each in ends if each is not None]
    if len(ends) != 2 or not all(map(is_number, known)) or known != sorted(known) or any(each != each for each in known):
        raise ValueError(f"`{name}` must be a pair (low, high), in order, None for no limit, not {value!r}")
    return value


def _jacobian(name, value):
    if callable(value):
        return value
    if not isinstance(value, (str, NoneType)) or value not in (None, "2-point", "3-point", "cs"):
        raise ValueError(f"`{name}` must be a callable, None, '2-point', '3-point' or 'cs', not {value!r}")
    return None


def _nan_policy(name, value):
    if isinstance(value, str) and value == "propagate":
        raise ValueError("`nan_policy='propagate'` is not supported by this function.")
    if not isinstance(value, (str, NoneType)) or value not in (None, "raise", "omit"):
        raise ValueError("nan_policy must be one of {None, 'raise', 'omit'}")
    return value


def _tolerance(name, value):
    value = 0.0 if value is None else value
    if not is_number(value) or not 0 <= value <= FLOAT_MAX:
        raise ValueError(f"`{name}` must be a number >= 0 or None, not {value!r}")
    return float(value)


def _accuracy(name, value):
    """Standard errors; inf where SciPy's tests alone decide."""
    return np.inf if value is None else positive(name, value)


def _most(name, value):
    if not is_integer(value) or value <= 0:
        raise ValueError(f"`{name}` must be None or a positive integer, not {value!r}")
    return int(min(value, MOST_COUNT))


def _scipys_most(name, value):
    return None if is_integer(value) and value == 0 else _most(name, value)


def _starts(name, value):
    if not is_integer(value) or not 0 <= value <= MOST_STARTS:
        raise ValueError(f"`{name}` must be 0 (p0 alone) or a number of starts, not {value!r}")
    return int(value)


def _scale(name, value):
    if isinstance(value, str) and value != "jac":
        raise ValueError(f"`{name}` must be 'jac' or positive numbers, not {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# the table


class Option(NamedTuple):
    """How an argument is given on the command line."""

    help: str
    kind: type | None = None  # bool: a flag for what is not the default; None: words that `interface.cli_values` reads
    flag: str = ""  # where it is not called like the argument
    many: bool = False  # may be repeated


class Argument(NamedTuple):
    """A row of the table."""

    check: Callable[[str, Any], Any]  # of the name and a value: the value as the fit takes it, or an error
    default: Any = None
    checkpoint: Literal["same", "limit"] | None = None  # a fit that goes on must have the same; or may have another one
    maps: bool = False
    option: Option | None = None


def _row(check, default=None, *, same=False, limit=False, maps=False, option=None) -> Argument:
    return Argument(check, default, "same" if same else "limit" if limit else None, maps, option)


FITS = {  # of `curve_fit`, without the model and its data
    "p0": _row(_as_given, same=True, maps=True, option=Option(
        "Start: a=1,b=2; or guess, which ready models do by themselves.", many=True)),
    "sigma": _row(_sigma, maps=True, option=Option(
        "Standard deviation of y: a number, the path of a Zarr array, or poisson.")),
    "absolute_sigma": _row(_flag, False, same=True, maps=True, option=Option(
        "Sigma is known, and the errors are not scaled by the fit.", bool)),
    "check_finite": _row(_optional(_flag), same=True),
    "bounds": _row(_as_given, (-np.inf, np.inf), same=True, maps=True, option=Option("a=0: or b=:3,c=0:1", many=True)),
    "method": _row(_method, same=True),
    "jac": _row(_jacobian),
    "full_output": _row(_flag, False),
    "nan_policy": _row(_nan_policy, same=True, option=Option(
        "raise, or omit: leave out points that are not finite.")),
    "loss": _row(_choice(*LOSSES), "linear", same=True, maps=True, option=Option(f"{', '.join(LOSSES[:-1])} or poisson.")),
    "f_scale": _row(positive, 1.0, same=True, maps=True),
    "x_scale": _row(_scale, "jac", same=True),
    "ftol": _row(_tolerance, 1e-8, same=True, maps=True),
    "xtol": _row(_tolerance, 1e-8, same=True, maps=True),
    "gtol": _row(_tolerance, 1e-8, same=True, maps=True),
    "accuracy": _row(_accuracy, ACCURACY, same=True, maps=True, option=Option(
        f"Standard errors from the optimum at which a fit has converged: {ACCURACY}.", float)),
    "max_nfev": _row(_optional(_most), limit=True, maps=True, option=Option("Most sweeps over the data.", int)),
    "maxfev": _row(_optional(_scipys_most), limit=True),
    "mask": _row(_mask, maps=True, option=Option("Path of a Zarr array that is true where a point is left out.")),
    "mask_values": _row(_optional(_values), same=True, maps=True, option=Option(
        "Values of y that are no data: 65535,0; or none. By default the largest value of unsigned integers.")),
    "valid_range": _row(_optional(_range), same=True, maps=True, option=Option(
        "Lowest and highest value of y that counts: 0:1000 or 0:")),
    "on_bad_chunk": _row(_choice("raise", "mask"), "raise", same=True, maps=True, option=Option(
        "raise, or mask: leave out chunks that cannot be read.")),
    "missing_chunks": _row(_choice("error", "mask", "fill"), "error", same=True, maps=True, option=Option(
        "error, mask, or fill: what becomes of chunks that are absent.")),
    "decode_cf": _row(_flag, True, same=True, maps=True, option=Option(
        "Fit values as they are stored: scale_factor, _FillValue and such are left.", bool)),
    "param_names": _row(_optional(_names), same=True, maps=True),
    "fixed": _row(_as_given, same=True, maps=True, option=Option("Values that are not fitted: c=0.5", many=True)),
    "strategy": _row(_choice("auto", "standard", "chunked", "streaming"), "auto", maps=True, option=Option(
        "auto, standard, chunked, streaming: where the data are held.")),
    "reduction": _row(_choice("auto", "gram", "qr"), "auto", same=True),
    "jac_mode": _row(_choice("auto", "columns", "arguments"), "auto", same=True, maps=True),
    "tr_solver": _row(_choice(None, "exact", "cg"), same=True),
    "memory_limit_gb": _row(_optional(positive), limit=True, maps=True, option=Option(
        "GiB, the most that each process may take.", float, "memory-limit")),
    "partitions_per_thread": _row(_optional(count), limit=True),
    "n_starts": _row(_starts, 0, same=True, option=Option("Look for the best of so many starts.", int)),
    "checkpoint": _row(_optional(_checkpoint), option=Option("Directory from which a killed fit is resumed.", Path)),
    "callback": _row(_optional(_function)),
    "progress": _row(_optional(_flag)),
    "verbose": _row(_choice(0, 1, 2), 0),
    "report": _row(_optional(_path)),
}  # fmt: skip
WORKFLOWS = {  # of `fit`, besides
    "workflow": _row(_choice(*PRESETS), "auto", option=Option(f"{', '.join(PRESETS)}.")),
    "goal": _row(_optional(lambda _, value: as_goal(value))),
    "n_starts": _row(_optional(_starts)),
}
MAPS = {name: row for name, row in FITS.items() if row.maps} | {  # of `fit_map`
    "axis": _row(_as_given, -1, option=Option("Of the spectra in STORE; the last one by default.", int, many=True)),
    "nan_policy": _row(_choice("omit", "raise"), "omit", option=FITS["nan_policy"].option),
    "guess": _row(_choice(None, "coarse-to-fine"), option=Option(
        "coarse-to-fine: pixels start from fits of the means of their neighbourhood.")),
    "full_covariance": _row(_flag, False),
}  # fmt: skip
SAME, LIMITS = ([name for name, row in FITS.items() if row.checkpoint == kind] for kind in ("same", "limit"))


def checked(table: Mapping[str, Argument], given: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments of a call as the fit takes them."""
    return SimpleNamespace(**{name: row.check(name, given[name]) for name, row in table.items()})


def defaults(table: Mapping[str, Argument]) -> dict[str, Any]:
    return {name: row.default for name, row in table.items()}


def known_names(caller: str, table: Mapping[str, Argument], given: Iterable[str]) -> None:
    """Refuse keywords that ``caller`` does not have, with the nearest one that it has."""
    names = ["f", "xdata", "ydata", *table]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise TypeError(f"{caller} has no argument {name!r}{f': did you mean {near[0]!r}?' if near else ''}")


F = TypeVar("F", bound=Callable)


def with_known_names(table: Mapping[str, Argument]) -> Callable[[F], F]:
    """A decorator: `known_names` before a call, since Python names no near one before 3.13."""

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args, **options):
            known_names(function.__name__, table, options)
            return function(*args, **options)

        return cast(F, call)

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# arguments together


def model_first(f, xdata, ydata, caller="curve_fit"):
    if callable(f):
        return f, xdata, ydata
    if callable(ydata):
        return ydata, f, xdata
    raise TypeError(
        f"{caller} needs a model: pass {caller}(f, xdata, ydata) or {caller}(xdata, ydata, f), got "
        f"{type(f).__name__}, {type(xdata).__name__}, {type(ydata).__name__}"
    )


class Likelihood(NamedTuple):
    """What is maximised, and what scales the covariance."""

    loss: str
    reweighted: bool  # points are weighted by the model that is fitted
    known: bool  # the noise, so that the covariance is not scaled

    @property
    def variance(self) -> Literal["known", "cost", "pearson"]:
        """What the variance of the residuals is taken from."""
        return "known" if self.known else "pearson" if self.reweighted else "cost"


def likelihood(call) -> Likelihood:
    if isinstance(call.sigma, str) and call.sigma == "poisson":
        if call.loss not in ("linear", "poisson"):
            raise ValueError(f"sigma='poisson' is least squares: it does not go with loss={call.loss!r}")
        return Likelihood("poisson", True, call.absolute_sigma)
    if call.loss == "poisson" and call.sigma is not None:
        raise ValueError(f"loss={call.loss!r} has the weights that belong to it: leave out `sigma`")
    return Likelihood(call.loss, False, call.absolute_sigma or call.loss == "poisson")


def check_together(call) -> None:
    """Refuse arguments of `curve_fit` that exclude each other."""
    if call.method == "lm" and call.loss != "linear":
        raise ValueError("method='lm' supports only 'linear' loss function. Use 'trf' or 'dogbox' instead.")
    if call.checkpoint is not None and call.strategy not in ("auto", "streaming"):
        raise ValueError(f"`checkpoint` is for data that are read anew in each sweep: not for strategy={call.strategy!r}")


def finite_policy(call) -> dict[str, bool]:
    """Whether values that are not finite are counted, and whether their points are left out."""
    check = call.nan_policy is not None or call.check_finite is not False
    return dict(check=check, omit=call.nan_policy == "omit" and not call.check_finite)
