"""The sweep of a grouped fit: all blocks of groups, evaluated at shared parameters; Dask holds what stays with the data.

A sweep is a task for each block, which gives sums for the client and the state of its groups (locals and W), which stays
where it is made. The next sweep starts from the state at the accepted point. Dask knows how each state was made: that of a
worker that dies is made again, with the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import uuid4

import dask
import jax
import numpy as np
from dask import delayed

from ..base.x64 import float64
from ..engine.condensed import Condensed, merge
from ..kernels.groups import GroupSpec, GroupSums, LocalState, group_kernel, nothing_fitted
from ..kernels.lanes import Limits
from ..kernels.rows import segment_size
from ..maps.blocks import BlockFit, MapProblem, PixelBlock

INNER = 1e-2  # standard errors to which locals are fitted at first
FINEST = 1e-8
SHARE = 0.1  # of the reduction that is predicted for the shared parameters, which the locals may leave
INNER_TOLERANCE = 1e-4  # ftol, xtol and gtol of the locals: the distance decides
NONE_USED = (
    "no group can be fitted: none has as many points that count as it has parameters, or the model or its derivatives are "
    "not finite at p0 in all of them"
)


class At(NamedTuple):
    """Where a sweep evaluates: shared parameters (s,), those of the state that it starts from, and how exactly."""

    shared: np.ndarray
    base: np.ndarray | None
    limits: Limits


def sweep_block(fit: BlockFit, spec: GroupSpec, block: PixelBlock, before: LocalState | None, at: At):
    """The task: `GroupSums` and `LocalState` of a block."""
    pixels, n = block.pixels, block.n_pixels
    n_all, places, free = len(pixels.y), list(spec.shared), list(spec.locals.free)
    fresh = before is None
    if before is None:
        start, used = np.broadcast_to(pixels.start, (n_all, pixels.start.shape[1])).copy(), np.arange(n_all) < n
        with float64():
            fitted = jax.tree.map(np.asarray, nothing_fitted(spec, pixels))
    else:
        start, used, fitted = before.params.copy(), before.used, before.fitted
        step = np.append(at.shared - at.base, 1.0)
        start[:, free] = np.clip(start[:, free] - before.back @ step, pixels.lower, pixels.upper)
    start[:, places] = at.shared
    pixels = pixels._replace(start=start)
    with float64(), fit.compiling(("groups", spec), pixels):
        found = group_kernel(fit.model, spec)(pixels, n, used, fitted, fresh, at.limits)
    return jax.tree.map(np.asarray, found)


class GroupSweep:
    """``sweep(params, reduction)`` for `dask_nlsq.solve.trust_region.solve`, of the shared parameters (s,).

    Attributes
    ----------
    count : int
        Sweeps so far.
    """

    def __init__(self, problem: MapProblem, spec: GroupSpec, held: bool):
        self.spec, self.count = spec, 0
        tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), INNER_TOLERANCE)
        most = 100 * len(spec.locals.free)
        self.limits = problem.fit.limits._replace(max_nfev=most, accuracy=INNER, **tolerances)
        self.fit, self.name = delayed(problem.fit, pure=True, traverse=False), uuid4().hex
        bands = (problem.band(rows, problem.fit.gather) for rows in problem.bands)
        blocks = [[*band.to_delayed().ravel()] for band in bands]  # of a band are joined together, so they are read together
        self.bands = [dask.persist(*band) for band in blocks] if held else blocks
        self.states: dict[bytes, list] = {}
        self.sums: dict[bytes, GroupSums] = {}
        self.base: np.ndarray | None = None

    def __call__(self, params: np.ndarray, reduction="gram") -> Condensed:
        """The sums at shared parameters (s,).

        Raises
        ------
        ValueError
            Where no group can be fitted.
        """
        params = np.asarray(params, dtype=np.float64)
        key = params.tobytes()
        if key not in self.states:
            self.states[key], self.sums[key] = self._read(params)
            self.count += 1
        sums = self.sums[key]
        if self.base is None and not sums.n_groups.any():
            raise ValueError(NONE_USED)
        found = self._condensed(sums)
        # the groups are those of the first sweep: a trial at which one of them is not finite is refused
        lost = self.base is not None and not np.array_equal(sums.n_groups, self.accepted.n_groups)
        return found._replace(cost=np.inf) if lost else found

    def _read(self, params):
        n_blocks = sum(map(len, self.bands))
        before = iter([None] * n_blocks if self.base is None else self.states[self.base.tobytes()])
        at = delayed(At(params, self.base, self.limits), pure=True, traverse=False)
        spec = delayed(self.spec, pure=True, traverse=False)
        name = f"nlsq-groups-{self.name}-{self.count}"
        states: list = []
        sums: list[GroupSums] = []
        for band in self.bands:
            both = dask.persist(
                *(
                    delayed(sweep_block)(self.fit, spec, block, next(before), at, dask_key_name=f"{name}-{k}")
                    for k, block in enumerate(band, len(states))
                )
            )
            sums += dask.compute(*[each[0] for each in both])
            states += [each[1] for each in both]
        return states, GroupSums(*map(np.stack, zip(*sums, strict=True)))

    def _condensed(self, sums: GroupSums) -> Condensed:
        s, n_locals = len(self.spec.shared), len(self.spec.locals.free)
        matrix, cost = merge(sums.gram, sums.cost, "gram")
        free = sums.n_points - n_locals * sums.n_groups  # what the locals leave of the points
        gram, unknown = sums.gram.reshape(len(free), -1), np.full(len(free), np.nan)
        columns = np.stack([sums.cost, unknown, 2 * sums.cost, free, sums.n_groups, sums.floored], axis=1)
        parts = np.concatenate([gram, np.full_like(gram, np.nan), columns, sums.weights], axis=1)
        assert parts.shape[1] == segment_size(s)
        size = float(sums.weights[:, 1 if self.spec.locals.loss == "poisson" else 2].sum())
        return Condensed(matrix, float(cost), "gram", parts, None, size, float(sums.left.sum()))

    @property
    def accepted(self) -> GroupSums:
        """Of all blocks (blocks, ...), at the point that was accepted last."""
        assert self.base is not None
        return self.sums[self.base.tobytes()]

    def settle(self, params: np.ndarray, distance: float) -> None:
        """Keep the state at the accepted point alone; the next sweep starts from it, and is as exact as it has to be."""
        key = params.tobytes()
        self.base = params
        self.states, self.sums = {key: self.states[key]}, {key: self.sums[key]}
        n_groups = self.sums[key].n_groups.sum()
        if np.isfinite(distance) and n_groups:
            accuracy = float(np.clip(distance * np.sqrt(SHARE / n_groups), FINEST, INNER))
            self.limits = self.limits._replace(accuracy=accuracy)

    def final(self, params: np.ndarray) -> Sequence:
        """The states of all blocks at a point that has been evaluated, lazily."""
        return self.states[params.tobytes()]
