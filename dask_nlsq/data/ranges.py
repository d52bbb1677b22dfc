"""A fit range by coordinate: what lies in none of the intervals of ``xrange`` is hidden, as what a mask hides."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..base.text import near
from ..model.function import coordinate_names
from .arrays import join_masks, parted
from .labels import as_given, labelled

Intervals = Sequence[tuple[float, float]]  # ends belong to them
Ranges = Mapping[Any, Intervals]  # by place or name of a coordinate; None is the only one


def by_place(xrange: Ranges | None, xdata, ydata, axes=None, f=None) -> Ranges | None:
    """``xrange`` with places for the names of xarray's coordinates; the ``axes`` of the fit are all of y's if None.

    Coordinates without names have those by which the model ``f`` unpacks its x.

    Raises
    ------
    ValueError
        A name that is not one of theirs.
    """
    names = [each for each in xrange or () if isinstance(each, str)]
    if xrange is None or not names:
        return xrange
    of_labels, given = labelled(ydata), as_given(xdata, ydata, axes)
    known = [getattr(each, "name", None) if labelled(each) else each if of_labels else None for each in given]
    known = [each if isinstance(each, str) else None for each in known]
    if f is not None and not any(known):
        name, parts = coordinate_names(f)
        known = [name] if len(given) == 1 else [*parts] if len(parts) == len(given) else known
    if unknown := [name for name in names if name not in known]:
        have = (
            f"the names of `xdata` are {', '.join(filter(None, known))}{near(unknown[0], filter(None, known), '; ')}"
            if any(known)
            else "`xdata` has no names"
        )
        raise ValueError(f"`xrange` names {unknown[0]!r}, but {have}: give the place of a coordinate, as in {{0: (1, 2)}}")
    found = {known.index(name) if name in names else name: intervals for name, intervals in xrange.items()}
    if len(found) < len(xrange):
        raise ValueError(f"`xrange` names a coordinate and its place: {[*xrange]}. Give one of them a list of pairs")
    return found


def of_each(xrange: Ranges | None, n: int) -> list[Intervals | None]:
    """The intervals of each of ``n`` coordinates, None where it has none.

    Raises
    ------
    ValueError
        Places that do not exist, and one pair for several coordinates.
    """
    if xrange is None:
        return [None] * n
    if None in xrange and n == 1:
        return [xrange[None]]
    if None in xrange:
        why = f"the {n} coordinates of `xdata` is it for? Name its place" if n else "coordinate is it for? Give `xdata`"
        raise ValueError(f"`xrange` is {[*xrange[None]]}: which of {why}, as in xrange={{0: (1, 2)}}")
    if unknown := [place for place in xrange if not place < n]:
        raise ValueError(f"`xrange` has intervals for coordinate {unknown[0]}, but `xdata` has {n}, counted from 0")
    return [xrange.get(k) for k in range(n)]


def parted_within(coordinate, intervals: Intervals | None) -> tuple[Any, Any]:
    """`parted`, and hidden too is what lies in none of the ``intervals``; not nan, which is an error or omitted.

    Raises
    ------
    ValueError
        Where nothing in memory lies within.
    """
    values, hidden = parted(coordinate)
    if intervals is None:
        return values, hidden
    outside = np.bool_(True)
    for low, high in intervals:
        outside = outside & ((values < low) | (values > high))
    if isinstance(outside, np.ndarray) and outside.size and outside.all():
        raise ValueError(
            f"no data: `xrange` has {', '.join(map(str, intervals))}, and `xdata` lies from {np.nanmin(values):g} to "
            f"{np.nanmax(values):g}"
        )
    return values, join_masks([hidden, outside])
