"""The sweep of a grouped fit: all blocks of groups, evaluated at shared parameters; Dask holds what stays with the data.

A sweep has one task per block. It returns sums to the client, and keeps the state of its groups (locals and W) where it was
computed. The next sweep starts from the state at the accepted point. Dask knows how to compute each state: if a worker dies,
its states are computed again, bit-identically. A checkpoint contains the sums of each sweep, and the states at the accepted
point, each written by its own task. A resumed fit reads both instead of repeating the sweeps.
"""

import re
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import jax
import numpy as np
from dask import delayed
from dask.callbacks import Callback

from ..base.files import well_formed
from ..base.x64 import float64
from ..engine.checkpoint import LOCALS, Checkpoint, CheckpointError
from ..engine.cluster import DEATHS, computed, give_back, given_up_after, workers_of
from ..engine.condensed import Condensed, factor, merge
from ..engine.waiting import Look, StopOnSignal, Watch, unwatched
from ..kernels.blocks import Reduction
from ..kernels.checks import linear_places
from ..kernels.groups import ASTRAY, GroupSpec, GroupSums, LocalState, group_kernel, nothing_fitted
from ..kernels.lane_loop import Fitted, Pixels
from ..kernels.lanes import Limits, MapStatus
from ..kernels.pieces import PieceSums, joined_kernel, piece_kernel
from ..kernels.rows import segment_size
from ..kernels.rules import ROUNDING
from ..kernels.table import table, tabulated
from ..kernels.tries import start_kernel
from ..maps.blocks import BlockFit, Kept, MapProblem, PixelBlock
from ..memory.device import said_if_full
from ..memory.processes import room_here
from ..model.function import Model

INNER = 1e-2  # standard errors to which locals are fitted at first
FINEST = 1e-8
ENOUGH = 1e-3  # standard errors of the shared parameters, below which what locals leave is of no account
SHARE = 0.1  # of the reduction that is predicted for the shared parameters, which the locals may leave
INNER_TOLERANCE = 1e-4  # ftol, xtol and gtol of the locals: the distance decides
ENDED = (
    MapStatus.ITERATION_LIMIT,
    MapStatus.STUCK,
    MapStatus.UNDETERMINED,
)  # without success: the next fit begins afresh
STATE = re.compile(r"\d+-\d+\.npz")  # the file of a block: the sweep that it is of, and its number
NONE_USED = (
    "no group can be fitted: all have fewer valid points than parameters, or the model or its derivatives are not finite at "
    "p0 in all of them"
)


class At(NamedTuple):
    """Where a sweep evaluates: shared parameters (s,), those of the state that it starts from, and how exactly."""

    shared: np.ndarray
    base: np.ndarray | None
    limits: Limits


class Swept(NamedTuple):
    """What has been found at shared parameters."""

    params: np.ndarray
    reduction: Reduction
    sums: GroupSums  # of all blocks, (blocks, ...)
    reads: int  # sweeps that it took


def sweep_block(fit: BlockFit, spec: GroupSpec, block: PixelBlock, before: LocalState | None, at: At):
    """The task: `GroupSums` and `LocalState` of a block."""
    begun, model = _begun(spec, block, before, at), fit.model
    known = begun.used, begun.moments, begun.fitted
    with float64(), said_if_full():
        pixels = block.on_device(spec.locals.kind)._replace(start=begun.params)
        if spec.tabulated:
            model = tabulated(begun.params.shape[1], spec.locals.free, spec.shared)
            pixels = pixels._replace(x=(*pixels.x, *_table(fit, spec, begun.params[0])))
        pixels = _with_amplitudes(fit, spec, model, pixels, _from_p0(block, before), at.limits)
        with fit.compiling(("groups", spec), pixels):
            found = group_kernel(model, spec)(pixels, block.n_pixels, *known, before is None, at.limits)
    return jax.tree.map(np.asarray, found)


class Begun(NamedTuple):
    """Groups at the beginning of a sweep."""

    state: LocalState
    lower: np.ndarray
    upper: np.ndarray
    fresh: bool


def sweep_piece(fit: BlockFit, spec: GroupSpec, block: PixelBlock, before: LocalState | None, at: At, is_first: bool):
    """The task: what a piece of a block adds to its groups, and, of the first one, how they begin."""
    begun = _begun(spec, block, before, at)
    with float64(), said_if_full():
        pixels = block.on_device(spec.locals.kind)._replace(start=begun.params)
        with fit.compiling(("piece", spec), pixels):
            found = piece_kernel(fit.model, spec)(pixels, at.limits)
    first = Begun(begun, pixels.lower, pixels.upper, before is None) if is_first else None
    return jax.tree.map(np.asarray, found), first


def join_pieces(spec: GroupSpec, at: At, pieces: Sequence[tuple[PieceSums, Begun | None]]):
    """The task: `GroupSums` and `LocalState` of a block, from its pieces, in their order."""
    sums, (begun, *_) = zip(*pieces, strict=True)
    with float64():
        found = joined_kernel(spec)(jax.tree.map(lambda *each: np.stack(each), *sums), *begun, at.limits)
    return jax.tree.map(np.asarray, found)


def _begun(spec: GroupSpec, block: PixelBlock, before: LocalState | None, at: At) -> LocalState:
    """Where the groups of a block are evaluated: where their locals are expected; of the rest of the state what is known."""
    pixels, n = block.pixels, block.n_pixels
    n_all, places, free = len(pixels.y), list(spec.shared), list(spec.locals.free)
    if before is None:
        start, used = np.broadcast_to(pixels.start, (n_all, pixels.start.shape[1])).copy(), np.arange(n_all) < n
        moments = np.zeros((n_all, 3))
        with float64():
            fitted = jax.tree.map(np.asarray, nothing_fitted(spec, pixels))
    else:
        start, used, moments, fitted = before.params.copy(), before.used, before.moments, before.fitted
        step = np.append(at.shared - at.base, 1.0)
        start[:, free] = np.clip(start[:, free] - before.back @ step, pixels.lower, pixels.upper)
        lost = _from_p0(block, before)
        start[lost] = np.broadcast_to(pixels.start, start.shape)[lost]
    start[:, places] = at.shared
    if before is None:
        n_locals = len(free)
        back, inverse = np.zeros((n_all, n_locals, len(places) + 1)), np.zeros((n_all, n_locals, n_locals))
        return LocalState(start, back, inverse, np.ones(n_all, bool), used, moments, fitted)
    return before._replace(params=start)


def _from_p0(block: PixelBlock, before: LocalState | None) -> np.ndarray:
    """Groups whose locals begin where they start: in the first sweep all, later those from where no step leads back."""
    if before is None:
        return np.arange(len(block.pixels.y)) < block.n_pixels
    return np.isin(before.fitted.status, ENDED) & ~(before.fitted.distance < ASTRAY)


def _with_amplitudes(fit: BlockFit, spec: GroupSpec, model: Model, pixels: Pixels, those, limits: Limits) -> Pixels:
    """With the locals of ``those`` groups solved for, in which the model is linear, unless the sweep itself does that.

    To be called inside ``float64()``.
    """
    n, n_params = pixels.start.shape
    own, which = spec.locals, np.flatnonzero(those)
    if spec.linear or not len(which):
        return pixels
    linear = own.free if spec.tabulated else linear_places(model, own.layouts, pixels.y.shape[1], n_params, own.free)
    if not linear:
        return pixels
    with fit.compiling("linear", pixels):
        start, _ = start_kernel(model, own, linear)(pixels, np.resize(which, n), len(which), limits)
    return pixels._replace(start=np.asarray(start))


_tables = threading.Lock()


def _table(fit: BlockFit, spec: GroupSpec, values: np.ndarray):
    """That of this process, which keeps one: that of the sweep."""
    key = values[list(spec.shared)].tobytes()
    with _tables:
        if key not in fit.kept:
            fit.kept.clear()
            x = tuple(c for c in fit.x if c is not None)
            columns = table(fit.model, fit.spec.layouts, x, values, spec.locals.free, spec.shared)
            fit.kept[key] = tuple(np.asarray(each)[None] for each in columns)
        return fit.kept[key]


def keep_state(state: LocalState, checkpoint: Checkpoint, name: str) -> None:
    """The task: write the state of a block."""
    checkpoint.save(name, dict(zip(LEAVES, jax.tree.leaves(state), strict=True)))


def kept_state(checkpoint: Checkpoint, name: str) -> LocalState:
    """The task: what `keep_state` has written."""
    found, path = checkpoint.load(name), checkpoint.path / f"{name}.npz"
    if found is None:
        raise CheckpointError(f"the checkpoint has lost {path}: start the fit again, in another directory")
    with well_formed(path):
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
    found, resumed : int
        Sweeps that the checkpoint had; those of them that the fit has gone through.
    seconds : float
        What the last one took; nan where it was one of an earlier process.
    latest : tuple
        Parameters and result of the last one.
    """

    stop: StopOnSignal  # that says when to end early
    watch: Watch = staticmethod(unwatched)  # told what is being done, and how many pieces of it are done of how many
    latest: tuple[np.ndarray, Condensed]

    def __init__(self, problem: MapProblem, spec: GroupSpec, held: bool):
        self.problem, self.spec, self.seconds = problem, spec, np.nan
        self.count = self.found = self.resumed = 0
        self.in_pieces = problem.in_pieces
        tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), INNER_TOLERANCE)
        most = 100 * len(spec.locals.free)
        self.limits = problem.fit.limits._replace(max_nfev=most, accuracy=INNER, **tolerances)
        gather = replace(problem.fit, model=None).gather  # which needs none: a large one travels once, to each worker
        fit = replace(problem.fit, kept=Kept())  # that ends with the sweeps
        self.fit, self.name = dask.persist(delayed(fit, traverse=False))[0], uuid4().hex
        bands = (problem.band(rows, gather) for rows in problem.bands)
        blocks = [_by_block(problem, band) for band in bands]  # of a band are joined together, so they are read together
        self.bands = [[*dask.persist(*band)] for band in blocks] if held else blocks
        self.states: dict[bytes, list] = {}
        self.sums: dict[bytes, Swept] = {}  # of each point the last one
        self.base: np.ndarray | None = None
        self.checkpoint: Checkpoint | None = None
        self.stop = StopOnSignal(False)  # which is deaf until it is entered
        self.swept: list[Swept] = []  # what a checkpoint holds
        self.recorded: dict[tuple[bytes, Reduction], Swept] = {}  # of an earlier process
        self.kept: tuple[bytes, int] | None = None  # the point whose states are there, and the sweep that they are of

    def __call__(self, params: np.ndarray, reduction: Reduction = "gram") -> Condensed:
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
        if key not in self.sums or self.sums[key].reduction != reduction:
            known = self.recorded.pop((key, reduction), None)
            if known is None:
                known = self._swept(params, reduction)
                self.swept.append(known)
            else:
                self.count, self.resumed = self.count + known.reads, self.resumed + known.reads
                self.seconds = np.nan
                if self.kept is not None and key == self.kept[0]:
                    self.states[key] = self._kept_states(self.kept[1])
            self.sums[key] = known
        sums = self.sums[key].sums
        if self.base is None and not sums.n_groups.any():
            raise ValueError(NONE_USED)
        found = self._condensed(sums, reduction)
        # the groups are those of the first sweep, fewer or as many: a trial at which one of them is not finite is refused
        lost = self.base is not None and not np.array_equal(sums.n_groups, self.accepted.n_groups)
        found = found._replace(cost=np.inf) if lost else found
        self.latest = params, found
        return found

    @property
    def n_blocks(self) -> int:
        return sum(map(len, self.bands))

    @property
    def n_tasks(self) -> int:
        """Of a sweep, as many as there are pieces where the blocks are cut."""
        return sum(len(block) for band in self.bands for block in band) if self.in_pieces else self.n_blocks

    def _swept(self, params, reduction: Reduction) -> Swept:
        """The sums at a point, whose states are kept; by two sweeps where the first one leaves the locals too far."""
        key, begun, spec = params.tobytes(), self.count, self.spec._replace(reduction=reduction)
        before = None if self.base is None else self.states[self.base.tobytes()]
        self.states[key], sums = self._read(spec, At(params, self.base, self.limits), before)
        accuracy = self._wanted(self._condensed(sums, reduction), sums.n_groups.sum())
        if accuracy < self.limits.accuracy:
            finer = self.limits._replace(accuracy=accuracy)
            self.states[key], sums = self._read(spec, At(params, params, finer), self.states[key])
        return Swept(params, reduction, sums, self.count - begun)

    def _wanted(self, found: Condensed, n_groups: int) -> float:
        """Standard errors of locals, with which they leave less than what the shared parameters may still gain."""
        dof = found.n_points - len(self.spec.shared)
        if not (found.finite and n_groups and dof > 0):
            return np.inf
        variance = 1.0 if self.spec.locals.absolute_sigma else 2 * found.cost / dof
        gain = 0.5 * float(np.sum(factor(found).projected ** 2))
        most = SHARE * max(gain, 0.5 * ENOUGH**2 * variance)
        enough = found.left <= most or found.left <= ROUNDING * found.cost
        return np.inf if enough or variance <= 0 else max(FINEST, float(np.sqrt(2 * most / (n_groups * variance))))

    def _read(self, spec: GroupSpec, at: At, states):
        """A sweep that starts from ``states``, those of all blocks at the base."""
        before = iter([None] * self.n_blocks if states is None else states)
        shared = spec, at
        self.count += 1
        name = f"nlsq-sweep-groups-{self.name}-{self.count}"
        found: list = []
        sums: list[GroupSums] = []
        began, numbered = time.perf_counter(), enumerate(self.problem.places)

        def look(done=0, total=0):
            self.stop.look()
            self.watch(f"sweep {self.count}", len(found) + done, self.n_blocks if total else 0)

        def task(shared, block, state, **key):
            spec, at = shared
            return delayed(sweep_block)(self.fit, spec, block, state, at, **key)

        sent = [delayed(each, pure=False, traverse=False) for each in shared]  # once to each worker
        with nullcontext() if workers_of({}) else _Watched(self, name, look):  # there `computed` looks
            for band in self.bands:
                look()
                states = [next(before) for _ in band]
                places = [next(numbered) for _ in band]
                names = [f"{name}-{k}" for k, _ in places]
                with given_up_after(DEATHS - 1):
                    if self.in_pieces:
                        ready = self._pieces(sent, band, states, names, look)
                        tasks = [delayed(join_pieces)(*sent, each) for each in ready]
                    else:
                        each = zip(band, states, names, strict=True)
                        tasks = [self._task(sent, block, state, dask_key_name=key) for block, state, key in each]
                    both = dask.persist(*tasks)

                def again(k, band=band, states=states):
                    return self._task([delayed(each, pure=False, traverse=False) for each in shared], band[k], states[k])[0]

                sums += computed(
                    [each[0] for each in both], [self.problem.named(*place) for _, place in places], look, again
                )
                found += [each[1] for each in both]
        self.seconds = time.perf_counter() - began
        return found, GroupSums(*map(np.stack, zip(*sums, strict=True)))

    def _task(self, shared, block, state, **key):
        """The sums and the state of a block, lazily."""
        spec, at = shared
        if not self.in_pieces:
            return delayed(sweep_block)(self.fit, spec, block, state, at, **key)
        pieces = [delayed(sweep_piece)(self.fit, spec, each, state, at, k == 0) for k, each in enumerate(block)]
        return delayed(join_pieces)(spec, at, pieces, **key)

    def _pieces(self, shared, band, states, names, look: Look) -> list[list]:
        """What the pieces of each block add. The same points of all groups are read together, and few of them at once."""
        spec, at = shared
        tasks = [
            [
                delayed(sweep_piece)(self.fit, spec, each, state, at, k == 0, dask_key_name=f"{name}-{k}")
                for k, each in enumerate(block)
            ]
            for block, state, name in zip(band, states, names, strict=True)
        ]
        order = [(j, k) for k in range(len(tasks[0])) for j in range(len(tasks))]
        most = 2 * room_here(None).n_threads
        for some in (order[k : k + most] for k in range(0, len(order), most)):
            look(0, 0)
            for (j, k), done in zip(some, dask.persist(*(tasks[j][k] for j, k in some)), strict=True):
                tasks[j][k] = done
        return tasks

    def _condensed(self, sums: GroupSums, reduction: Reduction) -> Condensed:
        s, n_locals = len(self.spec.shared), len(self.spec.locals.free)
        matrix, cost = merge(sums.matrix, sums.cost, reduction)
        grams = sums.matrix if reduction == "gram" else sums.matrix.transpose(0, 2, 1) @ sums.matrix
        free = sums.n_points - n_locals * sums.n_groups  # what the locals leave of the points
        gram, spread = (each.reshape(len(free), -1) for each in (grams, sums.spread))
        unknown = np.full(len(free), np.nan)  # the sum of the residuals
        columns = np.stack([sums.cost, unknown, 2 * sums.cost, free, sums.n_groups, sums.floored], axis=1)
        parts = np.concatenate([gram, spread, columns, sums.weights], axis=1)
        assert parts.shape[1] == segment_size(s)
        size = float(sums.weights[:, 1 if self.spec.locals.loss == "poisson" else 2].sum())
        return Condensed(matrix, float(cost), reduction, parts, None, size, float(sums.left.sum()))

    @property
    def n_failed(self) -> int:
        """Groups that are left out, since they cannot be fitted."""
        return 0 if self.base is None else self.problem.plan.n_pixels - int(self.accepted.n_groups.sum())

    @property
    def accepted(self) -> GroupSums:
        """Of all blocks (blocks, ...), at the point that was accepted last."""
        assert self.base is not None
        return self.sums[self.base.tobytes()].sums

    def settle(self, params: np.ndarray, distance: float) -> None:
        """Keep the state at the accepted point alone; the next sweep starts from it, and is as exact as it has to be."""
        key = params.tobytes()
        self.base = params
        self.states = {key: self.states[key]} if key in self.states else {}
        self.sums = {key: self.sums[key]}
        n_groups = self.accepted.n_groups.sum()
        if np.isfinite(distance) and n_groups:
            accuracy = float(np.clip(distance * np.sqrt(SHARE / n_groups), FINEST, INNER))
            self.limits = self.limits._replace(accuracy=accuracy)
        if self.checkpoint is not None and not self.recorded:
            with self.checkpoint.tolerant():
                self._save(key)

    def close(self) -> None:
        """Give back what is held by workers."""
        if client := workers_of({}):
            for each in ([*self.states.values()], self.bands, self.fit):  # what depends on others first
                give_back(client, each)

    def final(self, params: np.ndarray) -> Sequence:
        """The states of all blocks at a point that has been evaluated, lazily.

        Those of a sweep of an earlier process, but its last one, are not kept: they are made again by one more sweep.
        """
        key = params.tobytes()
        if key not in self.states:
            self.states[key], _ = self._read(self.spec, At(params, None, self.limits), None)
        return self.states[key]

    # -----------------------------------------------------------------------------------------------------------------
    # what a checkpoint holds

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Keep the fit in ``checkpoint``, and take up what is there."""
        self.checkpoint = checkpoint
        if (found := checkpoint.load("state")) is None:
            return
        arrays, values = found
        with well_formed(checkpoint.path / "state.npz"):
            sums = [GroupSums(*each) for each in zip(*(arrays[name] for name in GroupSums._fields), strict=True)]
            how = values["reductions"], sums, arrays["reads"].tolist()
            self.swept = [Swept(*each) for each in zip(arrays["params"], *how, strict=True)]
            self.recorded = {(each.params.tobytes(), each.reduction): each for each in self.swept}
            self.found = sum(each.reads for each in self.swept)
            self.kept = arrays["base"].tobytes(), int(values["kept"])

    def _save(self, key: bytes) -> None:
        assert self.checkpoint is not None and self.base is not None
        kept = self.kept
        params, reductions, sums, reads = zip(*self.swept, strict=True)
        arrays = {name: np.stack([getattr(each, name) for each in sums]) for name in GroupSums._fields}
        arrays |= dict(params=np.stack(params), base=self.base, reads=np.array(reads))
        try:
            if kept is None or key != kept[0]:
                kept = key, self.count
                states = zip(self.states[key], self._names(self.count), strict=True)
                dask.compute(*(delayed(keep_state)(state, self.checkpoint, name) for state, name in states))
            self.checkpoint.save("state", arrays, kept=kept[1], reductions=reductions)
            self.kept = kept
        finally:  # those of points before, of a process that was killed, or what a full disk has left of the new ones
            owned = set() if self.kept is None else {f"{name}.npz" for name in self._names(self.kept[1])}
            for each in (self.checkpoint.path / LOCALS).glob("*.npz"):
                if STATE.fullmatch(each.name) and f"{LOCALS}/{each.name}" not in owned:
                    each.unlink(missing_ok=True)

    def _kept_states(self, count: int) -> list:
        return [delayed(kept_state)(self.checkpoint, name) for name in self._names(count)]

    def _names(self, count: int) -> list[str]:
        return [f"{LOCALS}/{count}-{k}" for k in range(self.n_blocks)]


def _by_block(problem: MapProblem, band) -> list:
    """What is there of each block of a band, lazily: itself, or the list of its pieces, in the order of the data."""
    grid = band.to_delayed()
    if not problem.in_pieces:
        return [*grid.ravel()]
    fit_axes, n_map = problem.fit.fit_axes, len(problem.map_axes)
    grid = np.moveaxis(grid, fit_axes, range(-len(fit_axes), 0))
    return grid.reshape(prod(grid.shape[:n_map]), -1).tolist()


class _Watched(Callback):
    """Tells of each block that this process has done."""

    def __init__(self, sweep: GroupSweep, name: str, look: Look):
        self.sweep, self.task, self.look, self.done = sweep, name, look, 0
        super().__init__(posttask=self._told)

    def _told(self, key, *_):
        self.look(0, 0)
        if str(key).startswith(self.task):
            self.done += 1
            self.sweep.watch(f"sweep {self.sweep.count}", self.done, self.sweep.n_tasks)
