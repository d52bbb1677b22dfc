"""An objective on data, as the solver calls it: nothing is evaluated twice, and all of it goes through a checkpoint."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..base.config import setting
from ..base.files import well_formed
from ..data.chunks import Census, Fault
from ..data.store import BadChunkError
from ..kernels.blocks import JacMode, Reduction
from ..kernels.kind import CPU
from ..kernels.rows import segment_size, unpack
from .checkpoint import Checkpoint
from .condensed import MOST_SEGMENTS, SEGMENTS_BYTES, Condensed, Read, Segmentation, Sums, counted
from .request import Objective, Request
from .sweep import PartialSweep, SampleSummary, Sweep
from .waiting import StopOnSignal, Watch, unwatched

logger = logging.getLogger("dask_nlsq")
EXPECTED = 20  # sweeps of a fit, most of which take fewer
WHOLE = 4  # sweeps of which a checkpoint has the segments, seldom more
KEPT = 2  # sweeps whose results are at hand: the accepted one and a trial


class Evaluator:
    """``evaluator(params, reduction)`` is what all data are condensed to there, by one sweep.

    Attributes
    ----------
    count : int
        Sweeps so far, those of an earlier process that are in the checkpoint among them.
    found, resumed : int
        Sweeps that the checkpoint had; those of them that the fit has gone through.
    seconds : float
        What the last read of all data took; nan where it was one of an earlier process.
    latest : tuple
        Parameters and result of the last one.
    weights : ndarray, shape (k, 3)
        Of each segment the sums of w, w y and w y^2, from the first sweep.
    """

    admit: Callable[[], Any] = staticmethod(lambda: None)  # called when a sweep has seen all data
    watch: Watch = staticmethod(unwatched)  # told what is being done, and how many pieces of it are done of how many
    stop: StopOnSignal  # that says when to end early
    n_failed = 0  # of many fits: this is one
    jac_mode: JacMode = "columns"
    latest: tuple[np.ndarray, Condensed]

    def __init__(self, sweep: Sweep, objective: Objective, n_params: int, segmentation: Segmentation | None = None):
        self.sweep, self.objective, self.seconds = sweep, objective, np.nan
        self.count = self.found = self.resumed = 0
        self.segmentation = Segmentation.of(sweep.data, n_params) if segmentation is None else segmentation
        self.weights: np.ndarray | None = None
        self.drawn: SampleSummary | None = None
        self.known: dict[tuple[bytes, Reduction], Condensed] = {}  # of the last sweeps
        self.recorded: dict[tuple[bytes, Reduction], Condensed] = {}  # sweeps of an earlier process
        self.finished: list[tuple[np.ndarray, Condensed]] = []  # what a checkpoint holds
        self.begun: PartialSweep | None = None
        self.stands: bytes | None = None  # where the fit stands, params as bytes
        self.checkpoint: Checkpoint | None = None
        self.stop = StopOnSignal(False)  # which is deaf until it is entered

    def request(self, params: np.ndarray, reduction: Reduction = "gram") -> Request:
        return Request(self.objective, params, reduction, self.jac_mode, self.segmentation, self.weights is None)

    def __call__(self, params: np.ndarray, reduction: Reduction) -> Condensed:
        return self.at([params], reduction)[0]

    def at(self, points: Sequence[np.ndarray], reduction: Reduction) -> list[Condensed]:
        """The same at several points, by one read of the data."""
        points = [np.asarray(each, dtype=np.float64) for each in points]
        keys = [(each.tobytes(), reduction) for each in points]
        new = {key: each for key, each in zip(keys, points, strict=True) if key not in self.known}
        fresh = {key: self.recorded.pop(key) for key in new if key in self.recorded}
        unread = {key: each for key, each in new.items() if key not in fresh}
        self.seconds = np.nan if fresh else self.seconds
        if unread:
            fresh |= dict(zip(unread, self._read([*unread.values()], reduction), strict=True))
        self.count += bool(fresh)
        self.resumed += bool(fresh) and not unread
        recent = {key: self.known[key] for key in [*[*self.known][1 - KEPT :], *keys] if key in self.known}
        self.known = recent | {key: self._weighed(found) for key, found in fresh.items()}
        found = [self.known[key] for key in keys]
        self.latest = points[-1], found[-1]
        return found

    def _weighed(self, found: Condensed) -> Condensed:
        """With the size of y; of counts, whose weights are 1 / mean, the sum of y stands for it."""
        if self.weights is None:
            assert found.parts is not None  # as after each sweep over all data
            self.weights = unpack(found.parts, len(found.matrix) - 1).weights
        return found._replace(size=float(self.weights[:, 1 if self.objective.counts else 2].sum()))

    def _read(self, points, reduction) -> list[Condensed]:
        requests, place = [self.request(each, reduction) for each in points], self.sweep.place
        begun, self.begun = self.begun, None
        if begun is None or not _same(begun, requests, place.level):
            begun = PartialSweep(requests, place.n_runs, place.level)
        after = None if place.held else _Reading(self)
        began = time.perf_counter()
        found = self.sweep.run(requests, begun, after, self._look)
        self.seconds = time.perf_counter() - began
        if not place.held:
            self.admit()
        if self.checkpoint is not None:
            found = [self._weighed(each) for each in found]  # the first one has the weights, which are kept once
            self.finished = [*self._thinned(), *zip(points, found, strict=True)]
            self.save()
        return found

    def _thinned(self) -> list[tuple[np.ndarray, Condensed]]:
        """What is finished, with the segments of points where the fit may end: where it stands, and the lowest cost.

        Steps need only the counts of the others. A fit that ends at one of those after all reads it again, see `whole`.
        """
        lowest = min((found.cost for _, found in self.finished), default=np.nan)
        return [
            (params, found)
            if params.tobytes() == self.stands or found.cost == lowest or found.parts is None or len(found.parts) == 1
            else (params, found._replace(parts=counted(found.parts, len(params))))
            for params, found in self.finished
        ]

    def following(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """The callback of a solver, from whose records it is also known where the fit stands."""

        def told(record) -> None:
            self.stands = record.params.tobytes()
            callback(record)

        return told

    def whole(self, params: np.ndarray, found: Condensed) -> Condensed:
        """What was found at a point, with its segments, also where a checkpoint has kept their counts alone.

        The fit has ended, and a signal that comes now ends nothing: its result is returned.
        """
        assert found.parts is not None and self.weights is not None  # as after each sweep over all data
        if len(found.parts) == len(self.weights):
            return found
        stop, self.stop = self.stop, StopOnSignal(False)
        try:
            return found._replace(parts=self._read([params], found.reduction)[0].parts)
        finally:
            self.stop = stop

    def _look(self, done: int, total: int) -> None:
        self.stop.look()
        self.watch(f"sweep {self.count + 1}", done, total)

    # -----------------------------------------------------------------------------------------------------------------
    # what a checkpoint holds

    def save(self, begun: PartialSweep | None = None) -> None:
        census = self.sweep.census
        arrays: dict[str, np.ndarray] = {}
        kind = self.sweep.data.preparation.kind.name
        values: dict[str, Any] = dict(jac_mode=self.jac_mode, kind=kind, census=None if census is None else _listed(census))
        if self.finished:
            assert self.weights is not None  # as after each sweep over all data
            params, found = zip(*self.finished, strict=True)
            arrays = dict(
                params=np.stack(params),
                matrices=np.stack([each.matrix for each in found]),
                costs=np.array([each.cost for each in found]),
                parts=np.concatenate([each.parts for each in found]),
                lengths=np.array([len(each.parts) for each in found]),
                weights=self.weights,
            )
            values |= dict(reductions=[each.reduction for each in found], reads=[each.read for each in found])
        if begun is not None and begun.trees[0].nodes:
            nodes = [(k, *node, sums) for k, tree in enumerate(begun.trees) for node, sums in tree.nodes.items()]
            arrays |= dict(
                at=np.stack([request.params for request in begun.requests]),
                nodes=np.array([node[:3] for node in nodes]),
                node_matrices=np.stack([node[3].matrix for node in nodes]),
                node_costs=np.array([node[3].cost for node in nodes]),
                node_parts=np.concatenate([node[3].segments for node in nodes]),
                node_lengths=np.array([len(node[3].segments) for node in nodes]),
            )
            values |= dict(begun=begun.requests[0].reduction, level=begun.level, own=_listed(begun.censuses[0]))
        assert self.checkpoint is not None
        with self.checkpoint.tolerant():
            self.checkpoint.save("state", arrays, **values)

    def save_sample(self) -> None:
        if self.checkpoint is not None and self.sweep.drawn is not None and self.sweep.values is not None:
            with self.checkpoint.tolerant():  # without it, a fit that goes on draws the same sample again
                self.checkpoint.save("sample", dict(values=self.sweep.values), **self.sweep.drawn._asdict())

    def resume_from(self, checkpoint: Checkpoint) -> bool:
        """Keep the fit in ``checkpoint``, and take up what is there; whether there was something."""
        self.checkpoint = checkpoint
        if (found := checkpoint.load("sample")) is not None:
            with well_formed(checkpoint.path / "sample.npz"):
                self.sweep.take_sample(found[0]["values"], SampleSummary(**found[1]))
        else:
            self.save_sample()  # for a guess, which a fit that goes on no longer needs
        if (found := checkpoint.load("state")) is None:
            return False
        with well_formed(checkpoint.path / "state.npz"):
            self._take(*found)
        return True

    def _take(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """The sweeps that `save` has written."""
        self.jac_mode = values["jac_mode"]
        self.sweep.census = None if values["census"] is None else _census(values["census"])
        self.weights = arrays.get("weights")
        parts = np.split(arrays["parts"], np.cumsum(arrays["lengths"])[:-1]) if "parts" in arrays else []
        for k, reduction in enumerate(values.get("reductions", [])):
            read = Read(*values["reads"][k])
            kept = arrays["matrices"][k], float(arrays["costs"][k]), reduction, parts[k]
            self.finished.append((arrays["params"][k], Condensed(*kept, read)))
            self.recorded[arrays["params"][k].tobytes(), reduction] = self.finished[-1][1]
        self.found = len({found.read for _, found in self.finished})  # one may have been at several points
        kind, ours = values.get("kind", CPU.name), self.sweep.data.preparation.kind.name
        if kind != ours:
            logger.info("the fit goes on from %s on %s: the next sums have other bits than there", kind, ours)
        if "begun" in values and kind == ours:
            requests = [self.request(params, values["begun"]) for params in arrays["at"]]
            self.begun = PartialSweep(requests, self.sweep.place.n_runs, values["level"])
            self.begun.censuses = [_census(values["own"])]
            parts = np.split(arrays["node_parts"], np.cumsum(arrays["node_lengths"])[:-1])
            rows = arrays["nodes"], arrays["node_matrices"], arrays["node_costs"], parts
            for (k, level, node), matrix, cost, segments in zip(*rows, strict=True):
                self.begun.trees[k].nodes[int(level), int(node)] = Sums(matrix, float(cost), segments)


def state_bytes(n_params: int) -> int:
    """What the state of a fit takes on disk, and the next one while it is written."""
    row = 8 * segment_size(n_params)
    return 2 * (EXPECTED * row + WHOLE * min(row * MOST_SEGMENTS, SEGMENTS_BYTES))


def _same(begun: PartialSweep, requests: Sequence[Request], level: int) -> bool:
    """Whether a sweep that was broken off had the same requests."""
    kept, asked = ([(each.params.tobytes(), each.reduction) for each in those] for those in (begun.requests, requests))
    return (kept, begun.level) == (asked, level)


class _Reading:
    """What is done after each unit that was read: it is kept in the checkpoint at times, and a signal ends the sweep."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator, self.every = evaluator, setting("checkpoint-seconds")
        self.saved = time.perf_counter()

    def __call__(self, begun: PartialSweep) -> None:
        evaluator, now = self.evaluator, time.perf_counter()
        stop = evaluator.stop
        if evaluator.checkpoint is not None and (stop.signal is not None or now - self.saved >= self.every):
            evaluator.save(begun)
            self.saved = now
        stop.look()


def _listed(census: Census) -> list:
    return [*census[:-1], [err.args for err in census.damage]]


def _census(listed: list) -> Census:
    """What `_listed` has made JSON of."""
    index, n_points, n_masked, n_omitted, faults, damage = listed
    errors = tuple(BadChunkError(array, tuple(at), *rest) for array, at, *rest in damage)
    found = {name: Fault(n, tuple(at), value) for name, (n, at, value) in faults.items()}
    return Census(tuple(index), n_points, n_masked, n_omitted, found, errors)
