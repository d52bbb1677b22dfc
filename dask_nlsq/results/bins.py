"""Sums in the bins of one or two coordinates whose ranges are not known before all data have been read.

Bins have widths of 2^k and edges at multiples of that. Each block takes the smallest k for which `FINEST` bins cover it. To
merge two blocks, neighbouring bins of the finer one are joined in pairs until both have the same k. The result has the bins
that all data together would get.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

FINEST = {1: 2048, 2: 256}  # most bins along each coordinate while data are merged, by the number of coordinates
SMALLEST = -1000  # k of a block of zeros
UNIT = 0  # k of integers, whose bins are not finer


class Bins(NamedTuple):
    """Sums over points (columns, *m), in the bins ``[first + i, first + i + 1) * 2^k`` of each coordinate."""

    k: tuple[int, ...]
    first: tuple[int, ...]
    sums: np.ndarray

    @property
    def edges(self) -> list[np.ndarray]:
        return [
            np.ldexp(float(first) + np.arange(m + 1), k)
            for k, first, m in zip(self.k, self.first, self.sums.shape[1:], strict=True)
        ]


def exponent(low: float, high: float, finest: int) -> int:
    """The smallest k for which at most ``finest`` bins cover [low, high], and float64 has their numbers exactly."""
    peak = max(abs(low), abs(high))
    k = int(np.frexp(peak)[1]) - 52 if peak else SMALLEST
    if high > low:
        k = max(k, int(np.frexp((high - low) / finest)[1]) - 1)
    while np.floor(np.ldexp(high, -k)) - np.floor(np.ldexp(low, -k)) >= finest:
        k += 1
    return k


def in_bins(coordinates: Sequence[np.ndarray], columns: Sequence[np.ndarray | None]) -> Bins | None:
    """Sums of columns (n,) over points; None is a column of ones. Integer coordinates have bins of width 1 or more."""
    if not len(coordinates[0]):
        return None
    ks, firsts, places = [], [], []
    for x in coordinates:
        k = exponent(x.min(), x.max(), FINEST[len(coordinates)])
        k = max(k, UNIT) if x.dtype.kind in "iu" else k
        place = np.floor(np.ldexp(x.astype(np.float64, copy=False), -k)).astype(np.int64)
        ks.append(k)
        firsts.append(int(place.min()))
        places.append(place - firsts[-1])
    shape = [int(place.max()) + 1 for place in places]
    flat = np.ravel_multi_index(places, shape)
    sums = np.stack([np.bincount(flat, column, prod(shape)).reshape(shape) for column in columns])
    return Bins(tuple(ks), tuple(firsts), sums)


def merged(parts: Sequence[Bins | None]) -> Bins | None:
    """The bins of all parts; None if all parts are None."""
    found = [each for each in parts if each is not None]
    if not found:
        return None
    n_columns, n = len(found[0].sums), len(found[0].k)
    ks, firsts, sizes, shifts = zip(*(_common(found, d) for d in range(n)), strict=True)
    sums = np.zeros((n_columns, *sizes))
    for number, each in enumerate(found):
        places = [
            (np.arange(m) + first >> shift[number]) - begin
            for m, first, shift, begin in zip(each.sums.shape[1:], each.first, shifts, firsts, strict=True)
        ]
        if not any(shift[number] for shift in shifts):
            sums[:, *(slice(place[0], place[-1] + 1) for place in places)] += each.sums
            continue
        flat = np.ravel_multi_index(np.ix_(*places), sizes).ravel()
        for total, row in zip(sums, each.sums, strict=True):
            total += np.bincount(flat, row.ravel(), total.size).reshape(total.shape)
    return Bins(ks, firsts, sums)


def _common(parts: Sequence[Bins], d: int) -> tuple[int, int, int, list[int]]:
    """Along coordinate ``d``: common k, first bin and number of bins, and by how much k exceeds that of each part."""
    k = max(each.k[d] for each in parts)
    while True:
        shifts = [min(k - each.k[d], 63) for each in parts]  # larger shifts leave only the sign
        begins = [each.first[d] >> shift for each, shift in zip(parts, shifts, strict=True)]
        ends = [each.first[d] + each.sums.shape[1 + d] - 1 >> s for each, s in zip(parts, shifts, strict=True)]
        first, size = min(begins), max(ends) - min(begins) + 1
        if size <= FINEST[len(parts[0].k)]:
            return k, first, size, shifts
        k += 1
