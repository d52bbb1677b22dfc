"""What a running fit reports: the user's callback, a progress bar, printed lines, the live page."""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite, nan, prod
from typing import Any
from uuid import uuid4

import numpy as np
from distributed import Client
from tqdm.auto import tqdm

from ..base.plugins import ABSENT
from ..base.text import several
from ..engine.condensed import factor
from ..kernels.lanes import MapStatus, succeeded
from ..memory.plan import Plan
from ..model.function import Model, function_name
from ..results.uncertainty import covariance
from ..solve.trust_region import Record
from .live_page import OF_GROUPS, SLOW, TOPIC, open_page, stage_text

logger = logging.getLogger("dask_nlsq")


PROGRESS_DELAY = 2.0  # seconds: unless asked for, quicker fits show no progress bar
TOLD_EVERY = 0.25  # seconds
COMPILING = (
    "compiling the model, {:.0f} s so far: quadratures written as Python loops compile slowly, broadcast sums do not; see "
    '"Slow compilation" in the documentation of models'
)
PERHAPS = "waiting for the first results, perhaps "  # on workers, of which only that is known


class Live:
    """Reports a fit to the dashboard of ``client``; does nothing without a client, or if ``nlsq.dashboard`` is false.

    A context manager; leaving it by an error makes that the status of the fit.
    """

    def __init__(self, client: Client | None, what: str, f, names: Sequence[str], accuracy: float, **about):
        self.client, self.id, self.what = client if open_page(client) else None, uuid4().hex, what
        owner = "" if self.client is None else self.client.id
        self.tell(what=what, client=owner, model=function_name(f), names=list(names), accuracy=float(accuracy), **about)

    @classmethod
    def of(cls, client: Client | None, what: str, f, names: Sequence[str], accuracy: float, plan: Plan, n_fits: int = 0):
        """Of a fit with a `Plan`."""
        planned = ("n_points", "n_chunks", "n_partitions", "strategy")
        return cls(client, what, f, names, accuracy, n_fits=n_fits, **{name: getattr(plan, name) for name in planned})

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.tell(status=f"failed: {kind.__name__}: {error}")

    def tell(self, **what) -> None:
        if self.client is None or self.client.status != "running":
            return
        try:
            self.client.log_event(TOPIC, dict(what, fit=self.id))
        except ABSENT as err:
            logger.warning("the live page of fits gets no more news: %s: %s", type(err).__name__, err)
            self.client = None


class Bar:
    """A progress bar, which comes after a while, or never; ``options`` are those of `tqdm`."""

    def __init__(self, progress: bool | None, verbose: int = 0, **options):
        seen = verbose == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        after = 0.0 if progress else PROGRESS_DELAY if progress is None and seen else np.inf
        self.shown_from, self.options, self.bar = time.perf_counter() + after, options, None

    def show(self, n: int, text: str) -> None:
        if self.bar is None and time.perf_counter() >= self.shown_from:
            self.bar = tqdm(**self.options)
        if self.bar is not None:
            self.bar.n = n
            self.bar.set_postfix_str(text)

    def describe(self, text: str) -> None:
        self.options["desc"] = text
        if self.bar is not None:
            self.bar.set_description_str(text)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.bar.close()


class Stages:
    """What a fit is doing just now, how far it is, and how long that still takes, for a bar and the live page."""

    def __init__(self, live: Live):
        self.live, self.stage, self.text, self.share_per_s = live, "", "", nan
        self.so_far = 0.0  # seconds
        self.began = self.told = -np.inf
        self.before: int | None = None  # done when counting began

    def __call__(self, stage: str, done: int = 0, total: int = 0, **more) -> bool:
        """Whether it has been told: a new stage always is, the rest every now and then."""
        now, new = time.perf_counter(), stage != self.stage
        if new:
            self.stage, self.began, self.before = stage, now, None
        if total and self.before is None:
            self.before = max(done - 1, 0)
        if not new and (not total or now - self.told < TOLD_EVERY):
            return False
        rate = (done - (self.before or 0)) / max(now - self.began, 1e-9)
        left = (total - done) / rate if rate > 0 else nan
        self.share_per_s = rate / total if rate > 0 else nan
        self.so_far, self.told = now - self.began, now
        self.text = stage_text(stage, done, total, left, self.so_far)
        self.live.tell(stage=stage, done=done, total=total, left=left, so_far=self.so_far, **more)
        return True


class Observers:
    """The callback of the solver: reports each step to the user's callback, a progress bar, the terminal and the live page.

    ``at`` is told what happens between the steps, as `engine.waiting.Watch`. A context manager; leaving it closes the bar.
    """

    def __init__(self, live: Live, call, plan: Plan, absolute: bool):
        self.live, self.callback, self.verbose, self.plan, self.absolute = live, call.callback, call.verbose, plan, absolute
        self.bar, self.stages = Bar(call.progress, call.verbose, desc=live.what, unit=" sweeps"), Stages(live)
        self.evaluator: Any = None  # what evaluates, and knows the latest result; set as soon as there is one
        self.errors: list[float] = []
        self.said = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar.bar is not None:
            self.bar.show(self.evaluator.count if self.evaluator else 0, self.stages.text)
        self.bar.__exit__(*exc)

    def watching(self, evaluator, model: Model):
        """Within, what ``evaluator`` does, and that ``model`` compiles slowly, is told."""
        self.evaluator = evaluator
        evaluator.watch = self.at
        return model.watched(self.compiling)

    def at(self, stage: str, done: int = 0, total: int = 0) -> None:
        if not self.stages(stage, done, total):
            return
        first = stage == "sweep 1" and total and not done and self.plan.strategy == "chunked"  # which the data are there for
        if first and self.stages.so_far > SLOW:
            self.compiling(self.stages.so_far, PERHAPS)
        else:
            gb_per_s = self.stages.share_per_s * self.plan.sweep_bytes / 1e9
            known = stage.startswith("sweep") and isfinite(gb_per_s)
            self._show(self.stages.text + (f", {gb_per_s:.2g} GB/s" if known else ""))

    def compiling(self, seconds: float, before: str = "") -> None:
        text = before + COMPILING.format(seconds)
        if not self.said:
            self.said = True
            logger.info("%s", text)
        self.live.tell(stage=text, done=0, total=0, left=nan, so_far=0.0)
        self._show(text)

    def resumed(self) -> None:
        """After what an earlier process has done has been read."""
        n = self.evaluator.found
        self.bar.describe(f"{self.live.what}, resumed after {several(n, 'sweep')}")
        logger.info("the fit is resumed after %s", several(n, "sweep"))
        self.live.tell(resumed=n)

    def __call__(self, record: Record) -> None:
        if self.verbose == 2:
            _print_record(record)
        self.stages.text = f"cost {record.cost:.6g}, {distance_left(record)}"
        self._show(self.stages.text)
        if self.live.client is not None:
            self._tell(record)
        if self.callback is not None and not self._told_before:
            self.callback(record)

    @property
    def _told_before(self) -> bool:
        """Whether all sweeps so far are those of an earlier process, whose callback got their records."""
        return self.evaluator is not None and 0 < self.evaluator.count == self.evaluator.resumed

    def _show(self, text: str) -> None:
        self.bar.show(self.evaluator.count if self.evaluator else 0, text)

    def _tell(self, record: Record) -> None:
        (params, equations), seconds = self.evaluator.latest, self.evaluator.seconds
        free = equations.n_points - len(params)
        if np.array_equal(params, record.params) and (found := covariance(factor(equations))) is not None:
            scaled = found if self.absolute else found * (2 * equations.cost / max(free, 1))
            self.errors = np.sqrt(np.diag(scaled)).tolist()
        rates = dict(points_per_s=self.plan.n_points / seconds / 1e6)
        now = dict(params=record.params.tolist(), errors=self.errors or [nan] * len(record.params))
        counts = dict(nfev=record.nfev, n_sweeps=self.evaluator.count, failed=self.evaluator.n_failed)
        self.live.tell(cost=record.cost, distance=record.distance, **counts, **now, **rates)

    def ended(self, result) -> None:
        """What `FitResult.summary` begins with."""
        verdict = "converged" if result.success else "NOT CONVERGED"
        n_left_out = result.n_masked + result.n_omitted
        counts = dict(n_sweeps=result.sweeps, n_left_out=n_left_out, n_damaged=len(result.damage))
        self.live.tell(status=f"{verdict}: {result.message}", success=int(result.success), **result.seconds, **counts)


class MapProgress:
    """Tells a progress bar and the live page of the blocks of a map; to be called with the status of each that is done.

    A context manager.
    """

    def __init__(self, problem, progress: bool | None, client: Client | None, n_before: int = 0, done_before: int = 0):
        fit, self.n_fits, self.n_blocks = problem.fit, prod(problem.shape), len(problem.places)
        self.model, self.n_before, self.done, self.fitted, self.failed = fit.model, n_before, done_before, n_before, 0
        data = dict(n_points=self.n_fits * problem.plan.n_points, strategy="")
        cut = dict(n_chunks=self.n_blocks, n_partitions=self.n_blocks, n_fits=self.n_fits)
        self.word, what = fit.word, OF_GROUPS if fit.word == "group" else "fit_map"
        self.doing = "fits of blocks" if what == "fit_map" else "maps of blocks"
        self.live = Live(client, what, fit.model.f, fit.names, fit.limits.accuracy, **data, **cut)
        self.stages, self.within, self.began = Stages(self.live), ExitStack(), time.perf_counter()
        self.bar = Bar(progress, desc=what, unit=" blocks", total=self.n_blocks, initial=done_before)

    def __enter__(self):
        for each in (self.live, self.bar, self.model.watched(self.compiling)):
            self.within.enter_context(each)
        self.stages(self.doing)
        self.bar.show(self.done, "")
        return self

    def __exit__(self, *error):
        seconds, self.stages.told = time.perf_counter() - self.began, -np.inf
        self.look()
        if error[0] is None:
            status = f"done: {self.fitted - self.failed:,} of {several(self.n_fits, self.word)} without a failure"
            counts = dict(n_sweeps=0, n_left_out=0, n_damaged=0, load=0.0, solve=seconds)
            self.live.tell(status=status, success=int(self.failed < self.n_fits), **counts)
        return self.within.__exit__(*error)

    def compiling(self, seconds: float) -> None:
        self.live.tell(stage=COMPILING.format(seconds), done=0, total=0, left=nan, so_far=0.0)
        self.bar.show(self.done, COMPILING.format(seconds))

    def __call__(self, status: np.ndarray) -> None:
        self.done, self.fitted = self.done + 1, self.fitted + status.size
        self.failed += int(np.sum(has_failed(status)))
        self.look()

    def look(self, *_) -> None:
        """What is done while blocks are waited for."""
        more = dict(fitted=self.fitted, failed=self.failed, per_s=self.per_s)
        if self.stages(self.doing, self.done, self.n_blocks, **more):
            self._show()

    @property
    def per_s(self) -> float:
        return (self.fitted - self.n_before) / max(time.perf_counter() - self.began, 1e-9)

    def _show(self) -> None:
        self.bar.show(self.done, f"{self.per_s:,.0f} {self.word}s/s, {self.failed:,} failed")


def has_failed(status) -> np.ndarray:
    """Where there were points enough to fit, but no success."""
    return ~succeeded(status) & ~np.isin(status, [MapStatus.MASKED, MapStatus.TOO_FEW_POINTS])


def distance_left(record: Record) -> str:
    """How far the optimum still is, as the quadratic model sees it."""
    return (
        f"{record.distance:.2g} standard errors to go"
        if np.isfinite(record.distance)
        else f"gradient {record.optimality:.1e}"
    )


def _print_record(record: Record):
    if record.iteration == 0:
        columns = ("Iteration", "Sweeps", "Cost", "Cost reduction", "Step norm", "Distance", "Reduction", "After (s)")
        print("".join(f"{column:^15}" for column in columns))
    step = ("", "") if record.iteration == 0 else (f"{record.actual:.2e}", f"{record.step_norm:.2e}")
    values = (record.iteration, record.nfev, f"{record.cost:.6e}", *step, f"{record.distance:.2e}", record.reduction)
    print("".join(f"{value!s:^15}" for value in (*values, f"{record.seconds:.2f}")))


def say_summary(result, verbose: int) -> None:
    """The summary of a result for the log, and printed if the user asks for it; made only where somebody reads it."""
    if verbose or logger.isEnabledFor(logging.INFO):
        text = result.summary()
        logger.info("%s", text)
        if verbose:
            print(text)
