"""What the words on a command line mean: models by name, coordinates, values by name. Nothing is evaluated as code."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from ..base.files import check_directory
from ..base.lazy import da, zarr
from ..base.text import several
from ..data.store import Policy, as_dask, open_array
from ..engine.checkpoint import MOST_KEPT, absolute
from ..model.ready import named

WITHIN = 1e-6  # of a step: a stop that is so little above a value leaves it out as well
INTEGER = r"\s*[-+]?\d+\s*"
RANGE = re.compile(r"(?!.*://)([^:]+):([^:]+)(?::([^:]+))?")


def model(text: str):
    """``module:function``, imported with the current directory on the path, or ready models as `dask_nlsq.models.named`.

    Raises
    ------
    ValueError
        Where there is no such module, function or ready model.
    """
    module, colon, function = text.partition(":")
    if not colon or function[:1].isdigit():
        return named(text)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except ModuleNotFoundError as err:
        if err.name != module.partition(".")[0] and err.name != module:
            raise  # of something that it imports
        raise ValueError(f"--model {text}: there is no module {module!r} in {here} or on PYTHONPATH") from None
    for part in function.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model {text}: {module} ({getattr(found, '__file__', '')}) has no {part!r}")
        found = getattr(found, part)
    return found


def coordinates(texts, array: zarr.Array, axes=None, read: bool = True, decode_cf: bool = True):
    """x for the fit axes of an array (all, if None): of ``start:stop:step``, or the path of an array.

    The k-th of them, where it is a vector, belongs to the k-th fit axis, a single one to the last; where there is one axis,
    all belong to it. Without ``read`` vectors have the right shape only. ``decode_cf`` as in `dask_nlsq.curve_fit`.

    Raises
    ------
    ValueError
        Vectors of another length than their axis; more of them than axes.
    """
    axes = range(array.ndim) if axes is None else axes
    shape = tuple(array.shape[k] for k in axes)
    last = len(shape) - 1 if len(texts) == 1 else 0
    found = tuple(_coordinate(text, last + k, shape, array, read, decode_cf) for k, text in enumerate(texts))
    return found[0] if len(found) == 1 else found


def _coordinate(text, k, shape, array, read, decode_cf):
    is_range = RANGE.fullmatch(text)
    if is_range:
        begin, step, n = _range(text, is_range.groups())
    else:
        stored = open_array("x", absolute(text))
        if stored.ndim != 1 or len(shape) == 1:
            return absolute(text)
        n = stored.size
    k = k if len(shape) > 1 else 0
    if k >= len(shape):
        raise ValueError(f"--x {text} is number {k + 1}, and there are {len(shape)} axes: give one for each, in order")
    if n != shape[k]:
        way_out = "one --x is for the last axis, several are for the axes in order"
        way_out = "start:stop:step leaves out stop, as range does" if is_range else way_out
        raise ValueError(f"--x {text} has {several(n, 'value')}, but axis {k} has {shape[k]:,} ({way_out})")
    if is_range and 8 * n > MOST_KEPT:  # lazy, in the chunks of y
        vector = begin + step * da.arange(n, chunks=(array.shards or array.chunks)[k])
    elif is_range:
        vector = begin + step * np.arange(n)
    elif read:
        vector = as_dask("x", stored, Policy(), decode_cf).array.compute()
    else:
        vector = np.broadcast_to(np.zeros((), stored.dtype), stored.shape)
    return vector.reshape(-1, *(1,) * (len(shape) - 1 - k))


def _range(text, parts):
    """Start, step and number of values; integers where all are."""
    try:
        numbers = (int(each) if re.fullmatch(INTEGER, each) else float(each) for each in parts if each)
        begin, stop, step = (*numbers, 1)[:3]
        return begin, step, math.ceil((stop - begin) / step - WITHIN)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"--x {text}: start:stop:step must be numbers, and step not 0, as in 0:10:0.1") from None


def start(texts) -> dict[str, float] | str:
    """``("a=1,b=2", "c=3")``: values by name. ``("guess",)``: that."""
    return "guess" if list(texts) == ["guess"] else values("--p0", texts)


def values(option: str, texts) -> dict[str, float]:
    return {name: _number(option, f"{name}=", value) for name, value in _pairs(option, texts)}


def bounds(texts) -> dict[str, tuple[float | None, float | None]]:
    """``("a=0:", "b=:3,c=0:1")``: pairs by name, None where an end is left out."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, value in _pairs("--bounds", texts):
        found[name] = _ends("--bounds", f"{name}=", value)
    return found


def _ends(option, what, text):
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"{option} {what}{text}: two ends with a colon between them, as in {what}0:1 or {what}0:")
    low, high = (_number(option, what, each) if each.strip() else None for each in (low, high))
    return low, high


def valid_range(text: str) -> tuple[float | None, float | None]:
    """``"0:1e6"``: two ends, None where one is left out."""
    return _ends("--valid-range", "", text)


def expressions(texts) -> dict[str, str]:
    """``("width2=width1", "area=height*width")``: expressions by name."""
    found = {}
    for text in texts:
        name, equals, rule = (each.strip() for each in text.partition("="))
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"--expr {text}: one name, and what it is, as in --expr width2=width1")
        found[name] = rule
    return found


def xrange(texts) -> dict[int | None, list]:
    """``("8.9:9.6", "1:2,4:5")``, ``("0=8.9:9.6",)``: pairs by place of a coordinate, None of the only one."""
    found: dict[int | None, list] = {}
    for part in ",".join(texts).split(","):
        place, equals, ends = part.rpartition("=")
        if equals and not place.strip().isdecimal():
            raise ValueError(f"--xrange {part}: the place of a coordinate among --x, counted from 0, as in 0=8.9:9.6")
        found.setdefault(int(place) if equals else None, []).append(_ends("--xrange", place + equals, ends))
    if None in found and len(found) > 1:
        raise ValueError(f"--xrange {','.join(texts)}: give the place of the coordinate of each range, as in 0=8.9:9.6")
    return found


def mask_values(text: str) -> list[float]:
    """``"65535,0"``: numbers; of ``"none"`` no numbers, which differs from None."""
    return [] if text == "none" else [_number("--mask-values", "", each) for each in text.split(",")]


def _pairs(option, texts):
    seen = set()
    for part in ",".join(texts).split(",") if texts else ():
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not name:
            raise ValueError(f"{option} {part!r}: values go by name, as in {option} a=...,b=...")
        if name in seen:
            raise ValueError(f"{option} names {name!r} twice")
        seen.add(name)
        yield name, value


def _number(option, what, text):
    try:
        return int(text) if re.fullmatch(INTEGER, text) else float(text)
    except ValueError:
        raise ValueError(f"{option} {what}{text}: {text!r} is not a number") from None


def sigma(text: str):
    """A number, "poisson", or a path."""
    if text == "poisson":
        return text
    try:
        return float(text)
    except ValueError:
        return absolute(text)


def names(texts) -> tuple[str, ...]:
    """Those of ``a,b`` and further ones."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


READ: dict[str, Callable] = {  # by argument; what is not here is taken as it is
    "p0": start,
    "bounds": bounds,
    "fixed": partial(values, "--fixed"),
    "sigma": sigma,
    "mask": absolute,
    "mask_values": mask_values,
    "valid_range": valid_range,
    "xrange": xrange,
    "expr": expressions,
    "local": names,
    "groups": absolute,
}


def new_place(out: Path) -> None:
    """Make the directory of a result, before there is one to lose.

    Raises
    ------
    ValueError
        Where ``out`` is a directory with something else than a result in it.
    NotADirectoryError
        Where it is a file.
    OSError
        Where it cannot be made.
    """
    check_directory("--out", out)
    if out.exists() and any(out.iterdir()) and not (out / "result.json").exists():
        raise ValueError(f"--out {out} exists and is not a result: give another path, or that of a new directory")
    out.mkdir(parents=True, exist_ok=True)
