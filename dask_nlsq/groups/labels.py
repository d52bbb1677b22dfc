"""Groups by integer labels: the points of each are gathered in a row, so that the groups lie along the first of two axes.

Labels are read and sorted once, before the fit. Rows are as long as the largest group; the rest of shorter rows is masked.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..base.lazy import da
from ..data.arrays import as_array
from ..data.labels import along_dims, labelled
from ..data.store import open_array

LEFT_OUT = -1
DIM = "group"


class LabelledGroups(NamedTuple):
    """Where the points of each group are."""

    labels: np.ndarray  # (G,), sorted
    points: np.ndarray  # (G, n), places in y, in C order
    behind: np.ndarray  # (G, n) bool: behind the last point of the group
    shape: tuple[int, ...]  # of y

    def gathered(self, data: dict[str, Any]) -> dict[str, Any]:
        """The arrays of a fit with the axes (group, point)."""
        x, sigma, mask = data["xdata"], data["sigma"], data["mask"]
        x = tuple(map(self._rows, x)) if isinstance(x, tuple) else self._coordinates(x)
        hidden = self.behind if mask is None else self.behind | (self._rows(mask) != 0)
        sigma = sigma if sigma is None or np.ndim(sigma) == 0 else self._rows(sigma)
        return dict(xdata=x, ydata=self._rows(data["ydata"]), sigma=sigma, mask=hidden)

    def _coordinates(self, x):
        """An array of y's shape, or several of them along a first axis."""
        x = as_array("xdata", x)
        if x.ndim <= len(self.shape):
            return self._rows(x)
        return (da if isinstance(x, da.Array) else np).stack([self._rows(x[k]) for k in range(len(x))])

    def _rows(self, array):
        array = as_array("an array", array)
        if isinstance(array, np.ma.MaskedArray):
            return np.ma.MaskedArray(self._rows(array.data), self._rows(np.ma.getmaskarray(array)))
        whole = (da if isinstance(array, da.Array) else np).broadcast_to(array, self.shape)
        flat = whole.reshape(-1)[self.points.ravel()]
        return flat.reshape(self.points.shape)


class ByLabel:
    """What rearranges opened data; ``groups`` has been seen then."""

    groups: LabelledGroups

    def __init__(self, labels: Any, ydata: Any):
        if labelled(ydata):
            labels = ydata.coords[labels] if isinstance(labels, str) and labels in ydata.coords else labels
            labels = along_dims("groups", labels, ydata)
        if isinstance(labels, (str, Path)):
            try:
                labels = open_array("groups", labels)
            except FileNotFoundError:
                raise ValueError(
                    f"`groups` {str(labels)!r} is neither a coordinate of `ydata` nor the path of a Zarr array: give an "
                    "array of integer labels"
                ) from None
        self.labels = labels

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        self.groups = read_labels(self.labels, as_array("ydata", data["ydata"]).shape)
        return self.groups.gathered(data)


def read_labels(groups: Any, shape: tuple[int, ...]) -> LabelledGroups:
    """The groups of ``groups``, integers that broadcast against y: -1 leaves a point out. Lazy ones are computed.

    Raises
    ------
    ValueError
        Labels of another shape, of another kind, or negative ones that are not -1; no label at all.
    """
    groups = groups if hasattr(groups, "dtype") else np.asarray(groups)
    if groups.dtype.kind not in "iu" or isinstance(groups, np.ma.MaskedArray):
        raise ValueError(
            f"`groups` must be integer labels, {LEFT_OUT} for points that are left out, not {groups.dtype}: for other "
            "labels use np.unique(labels, return_inverse=True)[1]"
        )
    labels = np.asarray(as_array("groups", groups))
    try:
        labels = np.broadcast_to(labels, shape).reshape(-1)
    except ValueError:
        raise ValueError(f"`groups` must broadcast against `ydata`, which is of shape {shape}: not {labels.shape}") from None
    if labels.size and labels.min() < LEFT_OUT:
        raise ValueError(f"`groups` must be labels from 0 on, or {LEFT_OUT} to leave a point out: not {labels.min()}")
    order = np.argsort(labels, kind="stable")  # points of a group stay in the order of the data
    order = order[np.searchsorted(labels[order], 0) :]
    values, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    if not len(values):
        raise ValueError(f"`groups` leaves out all points: each label is {LEFT_OUT}")
    place = np.arange(counts.max())
    behind = place >= counts[:, None]
    points = order[np.minimum(first[:, None] + place, len(order) - 1)]
    points[behind] = np.broadcast_to(order[first + counts - 1][:, None], points.shape)[behind]
    return LabelledGroups(values, points, behind, shape)
