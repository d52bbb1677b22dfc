"""The sweep of a grouped fit: all blocks of groups, evaluated at shared parameters; Dask holds what stays with the data.

A sweep is a task for each block, which gives sums for the client and the state of its groups (locals and W), which stays
where it is made. The next sweep starts from the state at the accepted point. Dask knows how each state was made: that of a
worker that dies is made again, with the same bits. A checkpoint keeps the sums of each sweep, and of the accepted point the
states, each of which its own task writes; a fit that goes on finds its sweeps done, and takes the states from there.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import jax
import numpy as np
from dask import delayed
from dask.callbacks import Callback

from ..base.files import read_arrays, write_arrays
from ..base.x64 import float64
from ..engine.checkpoint import Checkpoint, CheckpointError
from ..engine.cluster import DEATHS, computed, give_back, given_up_after, workers_of
from ..engine.condensed import Condensed, factor, merge
from ..engine.waiting import Look, StopOnSignal, calm
from ..kernels.groups import ASTRAY, GroupSpec, GroupSums, LocalState, group_kernel, nothing_fitted
from ..kernels.lane_loop import Fitted
from ..kernels.lanes import Limits, MapStatus
from ..kernels.rows import segment_size
from ..kernels.rules import ROUNDING
from ..maps.blocks import BlockFit, MapProblem, PixelBlock

INNER = 1e-2  # standard errors to which locals are fitted at first
FINEST = 1e-8
ENOUGH = 1e-3  # standard errors of the shared parameters, below which what locals leave is of no account
SHARE = 0.1  # of the reduction that is predicted for the shared parameters, which the locals may leave
INNER_TOLERANCE = 1e-4  # ftol, xtol and gtol of the locals: the distance decides
ENDED = (MapStatus.ITERATION_LIMIT, MapStatus.STUCK, MapStatus.UNDETERMINED)  # without success: from afar, a fit begins anew
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
    if before is None:
        start, used = np.broadcast_to(pixels.start, (n_all, pixels.start.shape[1])).copy(), np.arange(n_all) < n
        with float64():
            fitted = jax.tree.map(np.asarray, nothing_fitted(spec, pixels))
    else:
        start, used, fitted = before.params.copy(), before.used, before.fitted
        step = np.append(at.shared - at.base, 1.0)
        start[:, free] = np.clip(start[:, free] - before.back @ step, pixels.lower, pixels.upper)
        lost = np.isin(fitted.status, ENDED) & ~(fitted.distance < ASTRAY)  # where they went, no step leads back
        start[lost] = np.broadcast_to(pixels.start, start.shape)[lost]
    start[:, places] = at.shared
    pixels = pixels._replace(start=start)
    with float64(), fit.compiling(("groups", spec), pixels):
        found = group_kernel(fit.model, spec)(pixels, n, used, fitted, before is None, at.limits)
    return jax.tree.map(np.asarray, found)


def keep_state(state: LocalState, path: Path) -> None:
    """The task: write the state of a block."""
    path.parent.mkdir(exist_ok=True)
    write_arrays(path, dict(zip(LEAVES, jax.tree.leaves(state), strict=True)))


def kept_state(path: Path) -> LocalState:
    """The task: what `keep_state` has written."""
    found = read_arrays(path)
    if found is None:
        raise CheckpointError(f"the checkpoint has lost {path}: begin it anew, in another directory")
    leaves = [found[0][name] for name in LEAVES]
    n = len(LocalState._fields) - 1
    own: dict[str, Any] = dict(zip(LocalState._fields, leaves[:n], strict=False))
    return LocalState(**own, fitted=Fitted(*leaves[n:]))


LEAVES = (*LocalState._fields[:-1], *(f"fitted_{name}" for name in Fitted._fields))


class GroupSweep:
    """``sweep(params, reduction)`` for `dask_nlsq.solve.trust_region.solve`, of the shared parameters (s,).

    Attributes
    ----------
    count : int
        Sweeps so far, those of an earlier process that are in the checkpoint among them.
    latest : tuple
        Parameters and result of the last one.
    """

    stop: StopOnSignal | None = None  # that says when to end early
    watch: Callable[[float, float, float], None] | None = None  # told while a sweep goes on: its share, GB/s, seconds left
    latest: tuple[np.ndarray, Condensed]

    def __init__(self, problem: MapProblem, spec: GroupSpec, held: bool):
        self.problem, self.spec, self.count, self.nbytes = problem, spec, 0, problem.plan.read_bytes
        tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), INNER_TOLERANCE)
        most = 100 * len(spec.locals.free)
        self.limits = problem.fit.limits._replace(max_nfev=most, accuracy=INNER, **tolerances)
        gather = replace(problem.fit, model=None).gather  # which needs none: a large one travels once, to each worker
        self.fit, self.name = dask.persist(delayed(problem.fit, pure=True, traverse=False))[0], uuid4().hex
        bands = (problem.band(rows, gather) for rows in problem.bands)
        blocks = [[*band.to_delayed().ravel()] for band in bands]  # of a band are joined together, so they are read together
        self.bands = [dask.persist(*band) for band in blocks] if held else blocks
        self.states: dict[bytes, list] = {}
        self.sums: dict[bytes, GroupSums] = {}
        self.base: np.ndarray | None = None
        self.checkpoint: Checkpoint | None = None
        self.swept: list[tuple[np.ndarray, GroupSums, int]] = []  # what a checkpoint holds, and by how many sweeps
        self.recorded: dict[bytes, tuple[GroupSums, int]] = {}  # of an earlier process
        self.kept: tuple[bytes, int] | None = None  # the point whose states are there, and the sweep that they are of

    def __call__(self, params: np.ndarray, reduction="gram") -> Condensed:
        """The sums at shared parameters (s,).

        Raises
        ------
        ValueError
            Where no group can be fitted.
        ToldToLeave
            Where a signal has come.
        """
        params = np.asarray(params, dtype=np.float64)
        key = params.tobytes()
        if key not in self.sums:
            known, reads = self.recorded.pop(key, (None, 0))
            self.count += reads
            if known is None:
                before = self.count
                known = self._swept(params)
                self.swept.append((params, known, self.count - before))
            elif self.kept is not None and key == self.kept[0]:
                self.states[key] = self._kept_states(self.kept[1])
            self.sums[key] = known
        sums = self.sums[key]
        if self.base is None and not sums.n_groups.any():
            raise ValueError(NONE_USED)
        found = self._condensed(sums)
        # the groups are those of the first sweep, fewer or as many: a trial at which one of them is not finite is refused
        lost = self.base is not None and not np.array_equal(sums.n_groups, self.accepted.n_groups)
        found = found._replace(cost=np.inf) if lost else found
        self.latest = params, found
        return found

    @property
    def n_blocks(self) -> int:
        return sum(map(len, self.bands))

    def _swept(self, params) -> GroupSums:
        """The sums at a point, whose states are kept; by two sweeps where the first one leaves the locals too far."""
        key = params.tobytes()
        before = None if self.base is None else self.states[self.base.tobytes()]
        self.states[key], sums = self._read(params, self.base, before, self.limits)
        accuracy = self._wanted(sums)
        if accuracy < self.limits.accuracy:
            finer = self.limits._replace(accuracy=accuracy)
            self.states[key], sums = self._read(params, params, self.states[key], finer)
        return sums

    def _wanted(self, sums: GroupSums) -> float:
        """Standard errors of locals, with which they leave less than what the shared parameters may still gain."""
        found, n_groups = self._condensed(sums), sums.n_groups.sum()
        dof = found.n_points - len(self.spec.shared)
        if not (found.finite and n_groups and dof > 0):
            return np.inf
        variance = 1.0 if self.spec.locals.absolute_sigma else 2 * found.cost / dof
        gain = 0.5 * float(np.sum(factor(found).projected ** 2))
        most = SHARE * max(gain, 0.5 * ENOUGH**2 * variance)
        enough = found.left <= most or found.left <= ROUNDING * found.cost
        return np.inf if enough or variance <= 0 else max(FINEST, float(np.sqrt(2 * most / (n_groups * variance))))

    def _read(self, params, base, states, limits):
        """A sweep that starts from ``states`` at ``base``."""
        before = iter([None] * self.n_blocks if states is None else states)
        shared = self.spec, At(params, base, limits)
        self.count += 1
        name = f"nlsq-sweep-groups-{self.name}-{self.count}"
        found: list = []
        sums: list[GroupSums] = []
        look = calm if self.stop is None else self.stop.look
        numbered = enumerate(self.problem.places)

        def task(shared, block, state, **key):
            spec, at = shared
            return delayed(sweep_block)(self.fit, spec, block, state, at, **key)

        sent = [delayed(each, pure=False, traverse=False) for each in shared]  # once to each worker
        with self._watched(name, look):
            for band in self.bands:
                look()
                states = [next(before) for _ in band]
                places = [next(numbered) for _ in band]
                tasks = [
                    task(sent, block, state, dask_key_name=f"{name}-{k}")
                    for block, state, (k, _) in zip(band, states, places, strict=True)
                ]
                with given_up_after(DEATHS - 1):
                    both = dask.persist(*tasks)

                def again(k, band=band, states=states):
                    return task([delayed(each, pure=False, traverse=False) for each in shared], band[k], states[k])[0]

                names = [self.problem.named(*place) for _, place in places]
                sums += computed([each[0] for each in both], names, look, again)
                found += [each[1] for each in both]
        return found, GroupSums(*map(np.stack, zip(*sums, strict=True)))

    def _watched(self, name: str, look: Look):
        """What is told of each block that is done; of those on workers the dashboard tells."""
        return nullcontext() if self.watch is None or workers_of({}) else _Watched(self, name, look)

    def _condensed(self, sums: GroupSums) -> Condensed:
        s, n_locals = len(self.spec.shared), len(self.spec.locals.free)
        matrix, cost = merge(sums.gram, sums.cost, "gram")
        free = sums.n_points - n_locals * sums.n_groups  # what the locals leave of the points
        gram, spread = (each.reshape(len(free), -1) for each in (sums.gram, sums.spread))
        unknown = np.full(len(free), np.nan)  # the sum of the residuals
        columns = np.stack([sums.cost, unknown, 2 * sums.cost, free, sums.n_groups, sums.floored], axis=1)
        parts = np.concatenate([gram, spread, columns, sums.weights], axis=1)
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
        self.states = {key: self.states[key]} if key in self.states else {}
        self.sums = {key: self.sums[key]}
        n_groups = self.sums[key].n_groups.sum()
        if np.isfinite(distance) and n_groups:
            accuracy = float(np.clip(distance * np.sqrt(SHARE / n_groups), FINEST, INNER))
            self.limits = self.limits._replace(accuracy=accuracy)
        if self.checkpoint is not None and not self.recorded:
            with self.checkpoint.tolerant():
                self._save(key)

    def close(self) -> None:
        """Give back what is held by workers."""
        if client := workers_of({}):
            give_back(client, [self.fit, self.bands, [*self.states.values()]])

    def final(self, params: np.ndarray) -> Sequence:
        """The states of all blocks at a point that has been evaluated, lazily.

        Those of a sweep of an earlier process, but its last one, are not kept: they are made again by one more sweep.
        """
        key = params.tobytes()
        if key not in self.states:
            self.states[key], _ = self._read(params, None, None, self.limits)
        return self.states[key]

    # -----------------------------------------------------------------------------------------------------------------
    # what a checkpoint holds

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Keep the fit in ``checkpoint``, and take up what is there."""
        self.checkpoint = checkpoint
        if (found := checkpoint.load("state")) is None:
            return
        arrays, values = found
        sums = [GroupSums(*each) for each in zip(*(arrays[name] for name in GroupSums._fields), strict=True)]
        self.swept = list(zip(arrays["params"], sums, arrays["reads"].tolist(), strict=True))
        self.recorded = {params.tobytes(): (each, reads) for params, each, reads in self.swept}
        self.kept = arrays["base"].tobytes(), values["kept"]

    def _save(self, key: bytes) -> None:
        assert self.checkpoint is not None and self.base is not None
        before, kept = self.kept, self.kept
        params, sums, reads = zip(*self.swept, strict=True)
        arrays = {name: np.stack([getattr(each, name) for each in sums]) for name in GroupSums._fields}
        arrays |= dict(params=np.stack(params), base=self.base, reads=np.array(reads))
        old: Iterable[Path] = ()
        try:
            if before is None or key != before[0]:
                kept, old = (key, self.count), self._paths(self.count)
                dask.compute(*(delayed(keep_state)(*each) for each in zip(self.states[key], old, strict=True)))
            assert kept is not None
            self.checkpoint.save("state", arrays, kept=kept[1])
            self.kept, old = kept, () if before is None or before == kept else self._paths(before[1])
        finally:  # those of the point before, or what a disk that is full has left of the new ones
            for path in old:
                path.unlink(missing_ok=True)

    def _kept_states(self, count: int) -> list:
        return [delayed(kept_state)(path) for path in self._paths(count)]

    def _paths(self, count: int) -> list[Path]:
        assert self.checkpoint is not None
        directory = self.checkpoint.path / "locals"
        return [directory / f"{count}-{k}.npz" for k in range(self.n_blocks)]


class _Watched(Callback):
    """Tells of each block that this process has done."""

    def __init__(self, sweep: GroupSweep, name: str, look: Look):
        self.sweep, self.task, self.look, self.done, self.began = sweep, name, look, 0, time.perf_counter()
        super().__init__(posttask=self._told)

    def _told(self, key, *_):
        self.look()
        if self.sweep.watch is None or not str(key).startswith(self.task):
            return
        self.done += 1
        share, seconds = self.done / self.sweep.n_blocks, time.perf_counter() - self.began
        self.sweep.watch(share, self.sweep.nbytes * share / seconds / 1e9, seconds * (1 / share - 1))
