"""The arguments that are not data: checked once, with errors that say what to change."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
from types import NoneType
from typing import Any

import numpy as np
from scipy.optimize import Bounds

from .base.values import FLOAT_MAX, count, positive
from .data.arrays import has_masked, plain_array
from .model.function import function_name, intern, parameter_names
from .model.losses import LIKELIHOODS, LOSSES
from .model.ready import ReadyModel

MOST_COUNT = 2**62  # evaluations, which kernels count in 64 bits
MOST_STARTS = 10**6


def model_first(f, xdata, ydata, caller="curve_fit"):
    if callable(f):
        return f, xdata, ydata
    if callable(ydata):
        return ydata, f, xdata
    raise TypeError(
        f"{caller} needs a model: pass {caller}(f, xdata, ydata) or {caller}(xdata, ydata, f), got "
        f"{type(f).__name__}, {type(xdata).__name__}, {type(ydata).__name__}"
    )


def ready_model(f, p0, bounds, param_names, method=None):
    """p0, bounds, and names of the parameters whose start is to be guessed: a ready model has them."""
    if isinstance(p0, str) and (p0 != "guess" or not isinstance(f, ReadyModel)):
        if p0 != "guess":
            raise ValueError(f"`p0` must be numbers or 'guess', not {p0!r}")
        raise ValueError(
            f"`p0` is 'guess', but only ready models can guess: {function_name(f)} is none. Give p0 as numbers, or take "
            "a model, or a sum of models, of dask_nlsq.models"
        )
    if not isinstance(f, ReadyModel):
        return p0, bounds, ()
    names = f.param_names if param_names is None else param_names
    own = dict(zip(names, f.bounds.values(), strict=False))
    if isinstance(bounds, Mapping):
        bounds = own | dict(bounds)
    elif isinstance(bounds, tuple) and all(isinstance(each, float) for each in bounds) and bounds == (-np.inf, np.inf):
        bounds = bounds if method == "lm" else tuple(zip(*own.values(), strict=True))  # "lm" knows no bounds
    if p0 is None or isinstance(p0, str):
        return None, bounds, tuple(names)
    return p0, bounds, tuple(name for name in names if name not in p0) if isinstance(p0, Mapping) else ()


def parameters(f, p0, bounds, param_names, fixed=None, guesses=()):
    """Names, bounds and start of all parameters, values of those held at the start among them, and places of the others."""
    signature, fixed = parameter_names(f), _held(fixed)
    known = param_names if param_names is not None else signature
    if isinstance(p0, Mapping):
        names = tuple(known if known is not None else {**p0, **fixed})
        _check_names(names, p0=p0, fixed=fixed)
        if missing := [name for name in names if not (name in p0 or name in fixed or name in guesses)]:
            raise ValueError(f"`p0` has no {missing[0]!r}: it must name all parameters that are not fixed, {names}")
        param_names, p0 = names, [p0.get(name, np.nan) for name in names]
    if p0 is None:
        if not known:
            raise ValueError("Unable to determine number of fit parameters. Give p0: the model takes *params or none.")
        n = len(signature or known)
    else:
        p0 = np.atleast_1d(_numbers("p0", p0))
        if p0.ndim != 1 or not len(p0):
            raise ValueError(f"`p0` must be a vector with one value per parameter, not of shape {p0.shape}")
        n = len(p0)
    if signature is not None and len(signature) != n and not _takes(f, n):
        raise ValueError(f"`p0` has {n} values, but {function_name(f)} takes {len(signature)} parameters: {signature}")
    names = tuple(
        param_names
        if param_names is not None
        else (signature if signature and len(signature) == n else (f"p{k}" for k in range(n)))
    )
    if len(names) != n or len(set(names)) != n or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`param_names` must be {n} different names, got {len(names)}: {names}")
    _check_names(names, fixed=fixed)
    free = [k for k, name in enumerate(names) if name not in fixed]
    if not free:
        raise ValueError("`fixed` holds all parameters: there is nothing to fit")

    if isinstance(bounds, Mapping):
        _check_names(names, bounds=bounds)
        pairs = [_pair(bounds.get(name, (None, None))) for name in names]
        bounds = (
            [-np.inf if low is None else low for low, _ in pairs],
            [np.inf if high is None else high for _, high in pairs],
        )
    lower, upper = (bounds.lb, bounds.ub) if isinstance(bounds, Bounds) else _pair(bounds)
    lower, upper = (_per_parameter(f"bounds[{k}]", b, n).copy() for k, b in enumerate((lower, upper)))
    if np.isnan(lower).any() or np.isnan(upper).any():
        raise ValueError("`bounds` must not contain nan: use -inf and inf where there is none")
    for k in free:
        if lower[k] >= upper[k]:
            raise ValueError(
                "Each lower bound must be strictly less than each upper bound: "
                f"{names[k]} has [{lower[k]}, {upper[k]}]; to hold a parameter, name it in `fixed`"
            )
    start = feasible(lower, upper)  # of what is to be guessed, too
    if p0 is not None:
        start = np.where([name in guesses for name in names], start, p0)
    for name, value in fixed.items():
        value = _numbers(f"fixed[{name!r}]", value)
        if value.ndim or not np.isfinite(value):
            raise ValueError(f"`fixed` must hold a finite number for {name}, not {fixed[name]!r}")
        start[names.index(name)] = value
    if not np.isfinite(start).all():
        k = int(np.argmin(np.isfinite(start)))
        raise ValueError(f"`p0` must be finite: {names[k]} is {start[k]}")
    for k in free:
        if not lower[k] <= start[k] <= upper[k]:
            raise ValueError(
                f"Initial guess is outside of provided bounds: {names[k]} = {start[k]} is not in [{lower[k]}, {upper[k]}]"
            )
    return names, lower, upper, start, free


def _held(fixed) -> Mapping:
    fixed = {} if fixed is None else fixed
    if not isinstance(fixed, Mapping):
        raise TypeError(f"`fixed` must be a dict of values by name, such as {{'c': 0.5}}, not {fixed!r}")
    return fixed


def _check_names(names, **mappings):
    for what, mapping in mappings.items():
        for name in mapping.keys() - set(names):
            near = get_close_matches(str(name), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`{what}` names {name!r}, the parameters are {names}{hint}")


def map_parameters(f, p0, bounds, param_names, fixed, map_shape):
    """Parameters of a map: all names, places of the free ones, start of all, bounds of the free ones, the guess if any.

    A value is a number, or an array of the map's shape.
    """
    signature, fixed = parameter_names(f), _held(fixed)
    by_place = None if p0 is None or callable(p0) or isinstance(p0, Mapping) else _over_the_map("p0", p0, map_shape)
    names = param_names if param_names is not None else signature
    if names is None and by_place is not None:
        names = [f"p{k}" for k in range(len(by_place))]
    if names is None:
        raise ValueError("Unable to determine number of fit parameters. Give p0 or param_names: the model takes *params.")
    names = tuple(names)
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`param_names` must be different names, got {names}")
    if signature is not None and len(signature) != len(names) and not _takes(f, len(names)):
        raise ValueError(
            f"{function_name(f)} takes {len(signature)} parameters, {signature}, and there are names for {names}"
        )
    if by_place is not None and len(by_place) != len(names):
        raise ValueError(f"`p0` has {len(by_place)} values, but {function_name(f)} takes {len(names)} parameters: {names}")
    given = dict(zip(names, by_place, strict=True)) if by_place is not None else p0 if isinstance(p0, Mapping) else {}
    pairs = bounds
    if not isinstance(bounds, Mapping):
        lower, upper = (bounds.lb, bounds.ub) if isinstance(bounds, Bounds) else _pair(bounds)
        ends = [_over_the_map(f"bounds[{k}]", each, map_shape, len(names)) for k, each in enumerate((lower, upper))]
        pairs = dict(zip(names, zip(*ends, strict=True), strict=True))
    _check_names(names, p0=given, bounds=pairs, fixed=fixed)
    free = tuple(k for k, name in enumerate(names) if name not in fixed)
    if not free:
        raise ValueError("`fixed` holds all parameters: there is nothing to fit")
    start, lower, upper = [], [], []
    for name in names:
        if name in fixed:
            start.append(_on_the_map(f"fixed[{name!r}]", fixed[name], map_shape))
            continue
        low, high = _pair(pairs.get(name, (None, None)))
        low = _on_the_map(f"bounds of {name}", -np.inf if low is None else low, map_shape)
        high = _on_the_map(f"bounds of {name}", np.inf if high is None else high, map_shape)
        if np.ndim(low) == np.ndim(high) == 0 and not low < high:  # arrays: where a pixel has points
            raise ValueError(f"Each lower bound must be strictly less than each upper bound: {name} has [{low}, {high}]")
        if isinstance(p0, Mapping) and name not in given:
            raise ValueError(f"`p0` has no {name!r}: it must name all parameters that are not fixed, {names}")
        value = _on_the_map(f"p0 of {name}", given.get(name, feasible(low, high)), map_shape)
        if np.ndim(value) == np.ndim(low) == np.ndim(high) == 0:
            if not np.isfinite(value):
                raise ValueError(f"`p0` must be finite: {name} is {value}")
            if not low <= value <= high:
                raise ValueError(f"Initial guess is outside of provided bounds: {name} = {value} is not in [{low}, {high}]")
        start.append(value)
        lower.append(low)
        upper.append(high)
    return names, free, start, lower, upper, intern(p0) if callable(p0) else None


def _over_the_map(name, values, map_shape, n=None):
    """One value for each parameter, of a sequence of them, an array (*map, p), or (``n`` given) one number for all."""
    if n is not None and not isinstance(values, (list, tuple)) and np.ndim(values) == 0:
        return [values] * n
    if getattr(values, "ndim", 1) == len(map_shape) + 1 and map_shape:
        return [values[..., k] for k in range(values.shape[-1])]
    try:
        if isinstance(values, (set, frozenset, str, bytes)):
            raise TypeError
        values = list(values)
    except TypeError:
        raise ValueError(
            f"`{name}` must be a sequence of one value per parameter, or a dict by name, not {values!r}"
        ) from None
    if n is not None and len(values) != n:
        raise ValueError(f"`{name}` has {len(values)} values: give one number, or one for each of the {n} parameters")
    return values


def _on_the_map(name, value, map_shape):
    """A number, or an array of the map's shape, NumPy or Dask."""
    value = getattr(value, "data", value) if hasattr(value, "dims") else value
    if hasattr(value, "dask"):
        value = plain_array(name, value)
    else:
        value = _numbers(name, value)
        if value.ndim == 0:
            return float(value)
    if value.shape != map_shape:
        raise ValueError(
            f"`{name}` must be a number, or an array of the map's shape {map_shape}, not of shape {value.shape}"
        )
    return value


def axes_of(axis, dims, ndim) -> tuple[int, ...]:
    """Places of the fit axes."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    found = []
    for each in given:
        if isinstance(each, str):
            if dims is None or each not in dims:
                raise ValueError(f"`axis` {each!r} is not a dimension of `ydata`: {dims or 'it has no named dimensions'}")
            each = dims.index(each)
        if not _is_integer(each) or not -ndim <= each < ndim:
            raise ValueError(f"`axis` must name axes of `ydata`, which has {ndim}: not {axis!r}")
        found.append(int(each) % ndim)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`axis` must name one or several different axes, not {axis!r}")
    if found != sorted(found):
        in_order = tuple(name if isinstance(name, str) else k for k, name in sorted(zip(found, given, strict=True)))
        raise ValueError(
            f"`axis` must be in the order of the axes of `ydata`, and `xdata` with it: {in_order}, not {axis!r}"
        )
    return tuple(found)


def _numbers(name, value):
    """``value`` as float64: True, "1", None and complex values are no numbers."""
    if has_masked(value):
        value = plain_array(name, value)
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and array.size and all(map(_is_number, array.flat)):
            array = array.astype(np.float64)
        if array.dtype.kind not in "iuf" or not _without_flags(value):
            raise TypeError
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`{name}` must be real numbers, not {value!r}") from None


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _without_flags(value):
    """Whether no True or False is among numbers, which NumPy would make 1 and 0 of."""
    if isinstance(value, (list, tuple)):
        return all(map(_without_flags, value))
    return not isinstance(value, (bool, np.bool_))


def _takes(f, n):
    """Whether f has defaults that let it be called with n parameters, as SciPy allows."""
    try:
        inspect.signature(f).bind(None, *range(n))
    except TypeError:
        return False
    return True


def _pair(bounds):
    try:
        if isinstance(bounds, (set, frozenset, Mapping, str, bytes)):
            raise TypeError
        lower, upper = bounds
    except (TypeError, ValueError) as err:
        raise ValueError(
            "`bounds` must be a pair (lower, upper) of scalars or vectors, or scipy.optimize.Bounds; of pairs make "
            "zip(*bounds)"
        ) from err
    return lower, upper


def _per_parameter(name, value, n):
    value = _numbers(name, value)
    if value.shape not in ((), (1,), (n,)):
        raise ValueError(f"`{name}` has shape {value.shape}: give a scalar or one value for each of the {n} parameters")
    return np.broadcast_to(value, (n,))


def feasible(lower, upper):
    """SciPy's start within the bounds: 1, the middle, or 1 away from the only bound."""
    low, high = (np.where(np.isfinite(each), each, 0.0) for each in (lower, upper))
    middle = low + 0.5 * (high - low)
    inside = np.where(np.isfinite(lower), lower + 1, np.where(np.isfinite(upper), upper - 1, 1.0))
    return np.where(np.isfinite(lower) & np.isfinite(upper), middle, inside)


def _choice(*allowed):
    def check(name, value):
        if not isinstance(value, (str, Integral, np.bool_, NoneType)) or value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, not {value!r}")

    return check


def _flag(name, value):
    """True, False, or 0 and 1."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
        raise TypeError(f"`{name}` must be True or False, not {value!r}")


def _optional(check):
    def check_given(name, value):
        if value is not None:
            check(name, value)

    return check_given


def _path(name, value):
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"`{name}` must be a path, not {value!r}")


def _function(name, value):
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, not {value!r}")


def _names(name, value):
    in_order = isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value)
    if not in_order or len(set(value)) < len(value):
        raise ValueError(f"`{name}` must be different names in a list or tuple, not {value!r}")


def _sigma(name, value):
    """What is no data."""
    array = value
    try:
        if isinstance(value, (list, tuple)) and not any(hasattr(each, "dtype") for each in value):
            array = np.asarray(value)  # of others it would compute lazy ones, and lose masks
        kind = dtype.kind if isinstance(dtype := getattr(array, "dtype", None), np.dtype) else "f"
    except ValueError as err:
        raise ValueError(f"`{name}` is not an array: {err}") from None
    if kind == "b" or not _without_flags(value):
        raise TypeError(f"`{name}` must be numbers, and neither True nor False: {value!r}")
    if _is_number(value) and not 0 < value <= FLOAT_MAX:
        raise ValueError(f"`{name}` must be positive, not {value!r}")


def _mask(name, value):
    if isinstance(value, Real):
        _flag(name, value)


def _values(name, value):
    listed = isinstance(value, (list, tuple, set, frozenset, range)) or getattr(value, "ndim", 0) == 1
    if not listed or not all(_is_number(getattr(each, "item", lambda each=each: each)()) for each in value):
        raise ValueError(f"`{name}` must be a sequence of numbers, not {value!r}")


def _range(name, value):
    ends = list(value) if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1 else []
    known = [getattr(each, "item", lambda each=each: each)() for each in ends if each is not None]
    if len(ends) != 2 or not all(map(_is_number, known)) or known != sorted(known) or any(each != each for each in known):
        raise ValueError(f"`{name}` must be a pair (low, high), in order, None for no limit, not {value!r}")


def jacobian(jac):
    if callable(jac):
        return jac
    if not isinstance(jac, (str, NoneType)) or jac not in (None, "2-point", "3-point", "cs"):
        raise ValueError(f"`jac` must be a callable, None, '2-point', '3-point' or 'cs', not {jac!r}")
    return None


def tolerance(name, value):
    value = 0.0 if value is None else value
    if not _is_number(value) or not 0 <= value <= FLOAT_MAX:
        raise ValueError(f"`{name}` must be a number >= 0 or None, not {value!r}")
    return float(value)


def _most(name, value):
    if not _is_integer(value) or value <= 0:
        raise ValueError(f"`{name}` must be None or a positive integer, not {value!r}")
    return int(min(value, MOST_COUNT))


def _scipys_most(name, value):
    return None if _is_integer(value) and value == 0 else _most(name, value)


def limit(max_nfev, maxfev):
    """Most evaluations, of two names for them; None for the default, which SciPy's maxfev also calls 0."""
    if max_nfev is not None:
        return _most("max_nfev", max_nfev)
    return None if maxfev is None else _scipys_most("maxfev", maxfev)


def partitions(per_thread):
    return None if per_thread is None else count("partitions_per_thread", per_thread)


def starts_wanted(n_starts):
    if not _is_integer(n_starts) or not 0 <= n_starts <= MOST_STARTS:
        raise ValueError(f"`n_starts` must be 0 (p0 alone) or a number of starts, not {n_starts!r}")
    return int(n_starts)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": _choice(None, "auto", "trf", "lm", "dogbox"),
    "loss": _choice(*LOSSES, *LIKELIHOODS),
    "strategy": _choice("auto", "standard", "chunked", "streaming"),
    "reduction": _choice("auto", "gram", "qr"),
    "jac_mode": _choice("auto", "columns", "arguments"),
    "tr_solver": _choice(None, "exact", "cg"),
    "on_bad_chunk": _choice("raise", "mask"),
    "missing_chunks": _choice("error", "mask", "fill"),
    "verbose": _choice(0, 1, 2),
    "nan_policy": lambda _, value: isinstance(value, str) or finite_policy(None, value),  # fits and maps know other words
    "guess": _choice(None, "coarse-to-fine"),
    "sigma": _sigma,
    "mask": _mask,
    "absolute_sigma": _flag,
    "full_output": _flag,
    "full_covariance": _flag,
    "decode_cf": _flag,
    "check_finite": _optional(_flag),
    "progress": _optional(_flag),
    "jac": lambda _, value: jacobian(value),
    "callback": _optional(_function),
    "param_names": _optional(_names),
    "f_scale": positive,
    "ftol": tolerance,
    "xtol": tolerance,
    "gtol": tolerance,
    "accuracy": _optional(positive),
    "max_nfev": _optional(_most),
    "maxfev": _optional(_scipys_most),
    "n_starts": lambda _, value: starts_wanted(value),
    "memory_limit_gb": _optional(positive),
    "partitions_per_thread": _optional(count),
    "checkpoint": lambda name, value: callable(value) or _optional(_path)(name, value),  # or what makes a directory
    "report": _optional(_path),
    "mask_values": _optional(_values),
    "valid_range": _optional(_range),
}


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse what no fit can work with, of all arguments that are neither data nor parameters."""
    for name, value in given.items():
        if name in CHECKS:
            CHECKS[name](name, value)
    if given.get("method") == "lm" and given["loss"] != "linear":
        raise ValueError("method='lm' supports only 'linear' loss function. Use 'trf' or 'dogbox' instead.")
    if given.get("checkpoint") is not None and given["strategy"] not in ("auto", "streaming"):
        raise ValueError(
            f"`checkpoint` is for data that are read anew in each sweep: not for strategy={given['strategy']!r}"
        )


def likelihood(loss, sigma):
    """The loss, and whether points are weighted by the model that is fitted."""
    if isinstance(sigma, str) and sigma == "poisson":
        if loss not in ("linear", "poisson"):
            raise ValueError(f"sigma='poisson' is least squares: it does not go with loss={loss!r}")
        return "poisson", True
    if loss in LIKELIHOODS and sigma is not None:
        raise ValueError(f"loss={loss!r} has the weights that belong to it: leave out `sigma`")
    return loss, False


def scale(x_scale, n, free):
    if isinstance(x_scale, str):
        if x_scale != "jac":
            raise ValueError(f"`x_scale` must be 'jac' or positive numbers, not {x_scale!r}")
        return "jac"
    scale = _per_parameter("x_scale", x_scale, n)
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError(f"`x_scale` must be 'jac' or positive numbers, got {scale}")
    return scale[free]


def accuracy_wanted(value):
    """Standard errors; inf where SciPy's tests alone decide."""
    return np.inf if value is None else positive("accuracy", value)


def known_names(function, options):
    """Refuse keywords that ``function`` does not have, with the nearest one that it has."""
    names = inspect.signature(function).parameters
    for name in options.keys() - names:
        near = get_close_matches(name, names, 1)
        raise TypeError(f"{function.__name__} has no argument {name!r}{f': did you mean {near[0]!r}?' if near else ''}")


def finite_policy(check_finite, nan_policy):
    """(count values that are not finite, leave their points out)."""
    if isinstance(nan_policy, str) and nan_policy == "propagate":
        raise ValueError("`nan_policy='propagate'` is not supported by this function.")
    if not isinstance(nan_policy, (str, NoneType)) or nan_policy not in (None, "raise", "omit"):
        raise ValueError("nan_policy must be one of {None, 'raise', 'omit'}")
    check = nan_policy is not None or check_finite is None or check_finite
    return check, nan_policy == "omit" and not check_finite
