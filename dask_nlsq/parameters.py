"""The parameters of a model: names, start, bounds, values that are held, ties; numbers, or in a map arrays of its shape."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import scipy

from .base.text import near, several
from .base.values import is_number, takes, without_flags
from .base.warn import warn
from .data.arrays import has_masked, plain_array
from .model.function import Model, function_name, intern, parameter_names
from .model.ready import ReadyModel
from .model.starts import Guess
from .model.ties import Ties
from .options import are_endless

ENDLESS = (-np.inf, np.inf)

NUMBERS = re.compile(r"\d+")


class Parameters(NamedTuple):
    """All parameters of a model, those held and tied among them. Values are (p,), or p numbers and arrays of a map."""

    names: tuple[str, ...]
    free: tuple[int, ...]  # places of those that are fitted
    start: Any
    lower: Any
    upper: Any
    guessed: tuple[str, ...]  # whose start is to be guessed from the data; until then it is within the bounds
    guess: Model | None  # p0(x, y) of one spectrum of a map
    ties: Ties | None  # and derived quantities


def read_parameters(f, call, shape: tuple[int, ...] | None = None) -> Parameters:
    """``p0``, ``bounds``, ``param_names``, ``fixed`` and ``expr`` of a call; ``shape`` is that of a map, None for one fit.

    Raises
    ------
    ValueError, TypeError
        What does not fit together, or to the model.
    """
    p0, bounds, guessed = ready_model(f, call)
    guess = None
    if shape is not None:
        if callable(p0) and not takes(p0, 2):
            raise TypeError(f"`p0` is the function {function_name(p0)}, which does not take x and y: write it as p0(x, y)")
        p0, guess = (None, intern(p0)) if callable(p0) else (p0, None)
    fixed = {} if call.fixed is None else call.fixed
    if not isinstance(fixed, Mapping):
        raise TypeError(f"`fixed` must be a dict of values by name, such as {{'c': 0.5}}, not {fixed!r}")
    names, starts = _named_starts(f, p0, call.param_names, fixed, shape)
    ties = None if not call.expr else Ties(names, call.expr)
    tied = () if ties is None else ties.tied
    for name in () if ties is None else ties.derived:
        _warn_of_misspelt(name, names)
    pairs = _pairs(names, bounds, shape)
    if tied:
        _check_tied(tied, fixed, _pairs(names, call.bounds, shape))
    pairs |= dict.fromkeys(tied, ENDLESS)
    _check_names(names, p0=starts, fixed=fixed, bounds=pairs)
    free = tuple(k for k, name in enumerate(names) if name not in fixed and name not in tied)
    if not free:
        raise ValueError(f"`fixed` holds {'and `expr` ties ' if tied else ''}all parameters: there is nothing to fit")
    if isinstance(p0, Mapping) and (
        missing := [n for n in names if not any(n in each for each in (starts, fixed, tied, guessed))]
    ):
        raise ValueError(f"`p0` has no {missing[0]!r}: it must name all parameters that are not fixed or tied, {names}")
    guessed = tuple(names[k] for k in free if names[k] in guessed)
    given = tuple(k for k in free if names[k] not in guessed)
    starts = {**starts, **dict.fromkeys(tied, 0.0)}  # which does not matter
    values = [_start_and_bounds(name, starts, pairs.get(name, (None, None)), fixed, shape) for name in names]
    start, lower, upper = (list(each) if shape else np.array(each, dtype=float) for each in zip(*values, strict=True))
    if guessed and shape is not None:
        known = [n in fixed or k in given or np.ndim(lower[k]) or np.ndim(upper[k]) for k, n in enumerate(names)]
        ends = zip(known, lower, upper, strict=True)  # arrays are taken for close bounds
        guess = intern(Guess(f, [(0.0, 0.0) if each else (low, high) for each, low, high in ends], given, ties))
    return Parameters(names, free, start, lower, upper, guessed, guess, ties)


def _warn_of_misspelt(derived: str, names) -> None:
    """A tie that was meant for a parameter would leave it free; names that differ in digits, as of peaks, are distinct."""
    like = get_close_matches(derived.casefold(), [each.casefold() for each in names], 1, cutoff=0.85)
    for name in names:
        if name.casefold() in like and NUMBERS.sub("", name) != NUMBERS.sub("", derived):
            warn(
                f"`expr` has {derived!r}, which is not a parameter, so it is a derived quantity, and {name!r} stays free: "
                f"write {name!r} to tie the parameter, or give the quantity a name that differs more",
                UserWarning,
            )


def ready_model(f, call) -> tuple[Any, Any, tuple[str, ...]]:
    """p0, bounds, and names of the parameters whose start is to be guessed: a ready model has them."""
    p0, bounds = call.p0, call.bounds
    if isinstance(p0, str) and p0 != "guess":
        raise ValueError(f"`p0` must be numbers or 'guess', not {p0!r}")
    if isinstance(p0, str) and not getattr(f, "can_guess", False):
        raise ValueError(
            f"`p0` is 'guess', but only models from dask_nlsq.models can guess a start; {function_name(f)} is not one of "
            "them. Give p0 as numbers, or use one of these models, or a sum of them"
        )
    if not isinstance(f, ReadyModel):
        return p0, bounds, ()
    names = f.param_names if call.param_names is None else call.param_names
    own = dict(zip(names, f.bounds.values(), strict=False))
    if isinstance(bounds, Mapping):
        bounds = own | dict(bounds)
    elif are_endless(bounds):
        bounds = bounds if getattr(call, "method", None) == "lm" else own  # "lm" knows no bounds
    if p0 is None and not f.can_guess:
        raise ValueError(
            f"`p0` is needed: {function_name(f)} cannot guess its start, since it is a product, or has functions that are "
            f"not from dask_nlsq.models. Give a value for each of {', '.join(names)}"
        )
    if p0 is None or isinstance(p0, str):
        return None, bounds, tuple(names)
    return p0, bounds, tuple(name for name in names if name not in p0) if isinstance(p0, Mapping) and f.can_guess else ()


def _named_starts(f, p0, param_names, fixed, shape) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Names of all parameters, and what ``p0`` gives for them."""
    signature = parameter_names(f)
    known = signature if param_names is None else param_names
    starts: Any
    if isinstance(p0, Mapping):
        param_names = starts = tuple(known if known is not None else {**p0, **fixed})
        _check_names(param_names, p0=p0, fixed=fixed)
    elif p0 is not None:
        starts = _listed("p0", p0, shape)
    elif known:
        starts = signature or known
    else:
        raise ValueError(
            "Unable to determine number of fit parameters. Give p0 or param_names: the model takes *params or none."
        )
    n = len(starts)
    own = signature or []
    if len(own) != n and not takes(f, 1 + n):
        raise ValueError(f"`p0` has {several(n, 'value')}, but {function_name(f)} takes {len(own)} parameters: {own}")
    if param_names is None:
        param_names = signature if signature and len(signature) == n else [f"p{k}" for k in range(n)]
    names = tuple(param_names)
    if len(names) != n or len(set(names)) != n or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`param_names` must be {n} different names, got {len(names)}: {names}")
    return names, p0 if isinstance(p0, Mapping) else {} if p0 is None else dict(zip(names, starts, strict=True))


def _check_tied(tied, fixed, pairs) -> None:
    """A tie is all that a parameter has: it is not held, and has no bounds of its own."""
    for name in tied:
        if name in fixed:
            raise ValueError(f"`fixed` and `expr` both name {name!r}: give one of them")
        ends = pairs.get(name, ENDLESS)
        if any(each is not None and not np.all(np.isinf(each)) for each in ends):
            raise ValueError(
                f"`bounds` has {ends} for {name}, which `expr` ties: bound the parameters that it depends on, by name"
            )


def _pairs(names, bounds, shape) -> dict[str, tuple[Any, Any]]:
    """Lower and upper bound by name."""
    if isinstance(bounds, Mapping):
        return {name: _pair(each) for name, each in bounds.items()}
    ends = (bounds.lb, bounds.ub) if isinstance(bounds, scipy.optimize.Bounds) else _pair(bounds)
    lower, upper = (_listed(f"bounds[{k}]", each, shape, len(names)) for k, each in enumerate(ends))
    return dict(zip(names, zip(lower, upper, strict=True), strict=True))


def _start_and_bounds(name, starts, pair, fixed, shape) -> tuple[Any, Any, Any]:
    """Start, or the value that is held, and bounds of one parameter."""
    ends = (ENDLESS[k] if each is None else each for k, each in enumerate(pair))
    low, high = (_value(f"bounds of {name}", each, shape) for each in ends)
    numbers = np.ndim(low) == np.ndim(high) == 0  # arrays count where a pixel has points
    if numbers and not (low == low and high == high):
        raise ValueError("`bounds` must not contain nan: use -inf and inf for unbounded parameters")
    if name in fixed:
        value = _value(f"fixed[{name!r}]", fixed[name], shape)
        if np.ndim(value) == 0 and not np.isfinite(value):
            raise ValueError(f"`fixed` must hold a finite number for {name}, not {value}")
        return value, low, high
    if numbers and not low < high:
        raise ValueError(
            f"Each lower bound must be strictly less than each upper bound: {name} has [{low}, {high}]; to hold a "
            "parameter, name it in `fixed`"
        )
    value = _value(f"p0 of {name}", starts[name] if name in starts else feasible(low, high), shape)
    if numbers and np.ndim(value) == 0 and not np.isfinite(value):
        raise ValueError(f"`p0` must be finite: {name} is {value}")
    if numbers and np.ndim(value) == 0 and not low <= value <= high:
        raise ValueError(f"Initial guess is outside of provided bounds: {name} = {value} is not in [{low}, {high}]")
    return value, low, high


def feasible(lower, upper):
    """SciPy's start within the bounds: 1, the middle, or 1 away from the only bound."""
    low, high = (np.where(np.isfinite(each), each, 0.0) for each in (lower, upper))
    middle = low + 0.5 * (high - low)
    inside = np.where(np.isfinite(lower), lower + 1, np.where(np.isfinite(upper), upper - 1, 1.0))
    return np.where(np.isfinite(lower) & np.isfinite(upper), middle, inside)


def scale(x_scale, params: Parameters):
    """``x_scale`` of the free parameters, (p,), or "jac"."""
    if isinstance(x_scale, str):
        return x_scale
    found = np.array(_listed("x_scale", x_scale, None, len(params.names)))
    if not np.all(np.isfinite(found) & (found > 0)):
        raise ValueError(f"`x_scale` must be 'jac' or positive numbers, got {found}")
    return found[list(params.free)]


def _check_names(names, **mappings):
    for what, mapping in mappings.items():
        for name in mapping.keys() - set(names):
            hint = near(str(name), names, "; ")
            raise ValueError(f"`{what}` names {name!r}, the parameters are {names}{hint}")


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


def _listed(name, values, shape, n=None) -> list:
    """A value for each parameter: of a sequence, of an array (*shape, p), or, of ``n`` that are known, of one for all."""
    if not shape:
        values = np.atleast_1d(_numbers(name, values))
        if values.ndim != 1 or not values.size:
            raise ValueError(f"`{name}` must be a vector with one value per parameter, not of shape {values.shape}")
    elif not isinstance(values, (list, tuple)) and np.ndim(values) == 0 and n is not None:
        values = [values]
    elif hasattr(values, "dask"):
        values = plain_array(name, values)
    if shape and getattr(values, "ndim", 1) == len(shape) + 1:
        values = [values[..., k] for k in range(values.shape[-1])]
    if isinstance(values, (set, frozenset, str, bytes)) or not hasattr(values, "__iter__"):
        raise ValueError(f"`{name}` must be a sequence of one value per parameter, or a dict by name, not {values!r}")
    values = [*values] * (n if n is not None and len(values) == 1 else 1)
    if n is not None and len(values) != n:
        raise ValueError(
            f"`{name}` has {several(len(values), 'value')}: give one number, or one for each of the {n} parameters"
        )
    return values


def _value(name, value, shape):
    """A number, or an array of the map's shape, NumPy or Dask."""
    value = getattr(value, "data", value) if hasattr(value, "dims") else value
    value = plain_array(name, value) if shape is not None and hasattr(value, "dask") else _numbers(name, value)
    if value.ndim == 0:
        return float(value)
    if value.shape != shape:
        arrays = f", or an array of shape {shape}" if shape else ""
        raise ValueError(f"`{name}` must be a number{arrays}, not of shape {value.shape}")
    return value


def _numbers(name, value):
    """``value`` as float64: True, "1", None and complex values are not numbers."""
    if has_masked(value):
        value = plain_array(name, value)
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and array.size and all(map(is_number, array.flat)):
            array = array.astype(np.float64)
        if array.dtype.kind not in "iuf" or not without_flags(value):
            raise TypeError
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`{name}` must be real numbers, not {value!r}") from None
