"""Names and values of the coordinates and axes of the data of a fit, for pictures and diagnostics."""

from functools import reduce
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..base.text import near
from ..data.align import Data
from ..data.labels import Quantity
from ..engine.request import Objective
from ..model.function import coordinate_names, own_function

DECADES = 1.99  # two, less the width of a bin
LOWEST = 0.1  # share of the range of a coordinate; if it contains half of the values, they are spread over decades


class Along(NamedTuple):
    """The variable on an axis of a picture: a coordinate, or the index along an axis of y."""

    label: str  # with the unit
    name: str
    coordinate: int | None = None  # its position in xdata
    axis: int | None = None  # of y; one of the two is None
    values: np.ndarray | None = None  # at each index of the axis


def data_of(result) -> tuple[Data, Objective]:
    """The data and the objective of a fit."""
    if result.data is None:
        raise ValueError(
            "this result does not hold the data, since it was pickled or loaded: pictures of the data need the result of "
            "the fit itself, so make them before, or fit again from popt"
        )
    return result.data, result.objective


def coordinates(result) -> list[Along]:
    """The coordinates in xdata, with the names from the data, or else from the model."""
    data, objective = data_of(result)
    n = len(data.preparation.layouts.x)
    argument, parts = coordinate_names(own_function(objective.model.f))
    known = data.names.x if len(data.names.x) == n else [Quantity()] * n
    named = [argument] if n == 1 else [f"{argument}[{k}]" for k in range(n)]
    if len(parts) == n:
        named = [part or name for part, name in zip(parts, named, strict=True)]
    found = [each._replace(name=each.name or name) for each, name in zip(known, named, strict=True)]
    return [Along(str(each), each.name, coordinate=k) for k, each in enumerate(found)]


def axes(result) -> list[Along]:
    """The axes of y, with the values of xarray's coordinate or of one that varies along this axis alone."""
    data, _ = data_of(result)
    n = len(data.shape)
    known = data.names.axes if len(data.names.axes) == n else (Quantity(),) * n
    values = data.names.places if len(data.names.along) == n else (None,) * n
    plain = ["point"] if n == 1 else [*(f"axis {k}" for k in range(n - 2)), "row", "column"]
    names = [each._replace(name=each.name or name) for each, name in zip(known, plain, strict=True)]
    found = [
        Along(str(name), name.name, axis=k, values=value) for k, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    for each in coordinates(result):
        operand = data.operands[len(data.operands) - len(data.preparation.layouts.x) + (each.coordinate or 0)]
        long = [k for k, size in enumerate(operand.shape) if size > 1]
        if len(long) == 1 and isinstance(operand, np.ndarray) and found[long[0]].values is None:
            named = found[long[0]] if each.name.endswith("]") else each  # it has no name of its own
            found[long[0]] = named._replace(
                coordinate=None, axis=long[0], values=operand.ravel().astype(np.float64, copy=False)
            )
    return found


def coordinate(result, which: int | str | None) -> Along:
    """The coordinate with this position in xdata or this name; for None or the name of an axis, the index along it."""
    of_x, of_y = coordinates(result), axes(result)
    if which is None or (not of_x and which == 0):
        return _place(of_y[0])
    if isinstance(which, str):
        return _named("coordinate", which, [*of_x, *map(_place, of_y)])
    if which not in range(len(of_x)):
        last = len(of_x) - 1
        raise ValueError(f"`coordinate` must be from 0 to {last}, a name, or None for the place in the data, not {which!r}")
    return of_x[which]


def _place(axis: Along) -> Along:
    if axis.values is None:
        return axis
    return Along(f"place along {axis.name}", axis.name, axis=axis.axis)


def _drawn(axis: Along) -> Along:
    """The axis, with its values only if they rise or fall monotonically."""
    steps = np.diff(axis.values) if axis.values is not None else np.zeros(1)
    return axis if len(steps) and (np.all(steps > 0) or np.all(steps < 0)) else _place(axis)


def plane(result, along) -> tuple[Along, Along]:
    """Rows and columns of images: two different axes of y, by number or name, or coordinates by name.

    By default these are the last two axes; for data with one axis, the first two coordinates.
    """
    of_x, of_y = coordinates(result), axes(result)
    if along is None:
        if len(of_y) == 1 and len(of_x) < 2:
            raise ValueError("images are of data with two axes, or two coordinates: these have one")
        return (_drawn(of_y[-2]), _drawn(of_y[-1])) if len(of_y) > 1 else (of_x[1], of_x[0])
    if not isinstance(along, list | tuple) or len(along) != 2:
        raise ValueError(f"`along` must be a pair of axes of ydata, or names, for rows and columns, not {along!r}")
    found = []
    for each in along:
        if isinstance(each, str):
            found.append(_named("along", each, [*of_y, *of_x]))
        elif isinstance(each, int | np.integer) and -len(of_y) <= each < len(of_y):
            found.append(of_y[each])
        else:
            raise ValueError(f"`along` must name axes of ydata, which has {len(of_y)}, or give their places, not {each!r}")
    if found[0].name == found[1].name:
        raise ValueError(f"`along` must be two different axes or coordinates, not {along!r}")
    return _drawn(found[0]), _drawn(found[1])


def _named(argument: str, name: str, known: list[Along]) -> Along:
    found = next((each for each in known if each.name == name), None)
    if found is None:
        names = [*dict.fromkeys(each.name for each in known)]
        raise ValueError(f"`{argument}` names {name!r}: there are {', '.join(names)}{near(name, names, '; ')}")
    return found


def between(result, first: int, last: int) -> str:
    """Where the used points with the numbers ``first`` to ``last``, in the order of the data, are; "" if that is unknown.

    It is known for data with several axes and points within one chunk, if all points are used, or if only a mask in memory
    leaves points out.
    """
    if result.data is None or len(result.data.shape) == 1:
        return ""
    data, layouts = result.data, result.data.preparation.layouts
    if result.n_points < data.n_points:
        mask = data.operands[2] if layouts.mask is not None else None
        if result.n_omitted or layouts.invalid is not None or not isinstance(mask, np.ndarray) or data.n_chunks > 1:
            return ""
        first, last = (_place_of(number, mask, data.shape) for number in (first, last))
    lengths: Any = reduce(np.multiply.outer, map(np.array, data.chunks))
    ends = np.cumsum(lengths)
    number = int(np.searchsorted(ends, first, side="right"))
    if last >= ends[number]:
        return ""
    index: Any = np.unravel_index(number, lengths.shape)
    begin = np.array([sum(sizes[:i]) for sizes, i in zip(data.chunks, index, strict=True)])
    shape, offset = data.chunk_shape(index), ends[number] - lengths[index]
    low, high = (np.array(np.unravel_index(each - offset, shape)) for each in (first, last))
    differ = int(np.argmax(low != high)) if (low != high).any() else len(shape)
    low[differ + 1 :], high[differ + 1 :] = 0, np.array(shape[differ + 1 :]) - 1
    words = []
    for k, (axis, a, b) in enumerate(zip(axes(result), low + begin, high + begin, strict=True)):
        if k > differ and b - a + 1 == data.shape[k]:
            continue  # the whole axis
        places = (a, b) if axis.values is None else (axis.values[a], axis.values[b])
        within = f"{axis.label} from {places[0]:.6g} to {places[1]:.6g}"
        words.append(within if a != b else f"{axis.label} = {places[0]:.6g}")
    return ", ".join(words)


def _place_of(number: int, mask: np.ndarray, shape: tuple[int, ...]) -> int:
    """Flat index of the used point with this number. Counting halves of each axis takes no memory."""
    place = 0
    for k, size in enumerate(shape):
        low, high = 0, size
        while high - low > 1:
            middle = (low + high) // 2
            part = mask[low:middle] if len(mask) > 1 else mask
            used = (part.size - int(np.count_nonzero(part))) * ((middle - low) * prod(shape[k + 1 :]) // part.size)
            low, high, number = (middle, high, number - used) if number >= used else (low, middle, number)
        mask, place = mask[low if len(mask) > 1 else 0], place * size + low
    return place


def over_decades(values: np.ndarray, counts: np.ndarray | None = None) -> bool:
    """Whether values need a logarithmic axis: positive, over two decades, most of them low; ``counts`` of points each."""
    if not len(values) or not np.min(values) > 0 or np.log10(np.max(values) / np.min(values)) < DECADES:
        return False
    order = np.argsort(values)
    cumulated = np.cumsum(np.ones(len(values)) if counts is None else counts[order])
    middle = values[order][np.searchsorted(cumulated, cumulated[-1] / 2)]
    return bool(middle <= np.min(values) + LOWEST * np.ptp(values))
