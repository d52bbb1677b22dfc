"""What a fit tells while it runs: the user's callback, a progress bar, printed lines."""

import logging
import sys
import time
from typing import Any
from uuid import uuid4

import numpy as np
from distributed import Client
from tqdm.auto import tqdm

from ..base.config import setting
from ..base.plugins import ABSENT, install
from ..engine.condensed import factor
from ..memory.plan import Plan
from ..results.uncertainty import covariance
from ..solve.trust_region import Record
from .live_page import TOPIC, LivePage

logger = logging.getLogger("dask_nlsq")


PLANNED = ("n_points", "n_chunks", "n_partitions", "sweep_bytes", "strategy")  # what the dashboard is told of a plan
PROGRESS_DELAY = 2.0  # seconds: unless asked for, quicker fits show no progress bar


class Observers:
    """The callback of the solver: tells the user's callback, a progress bar and the terminal what a step did.

    A context manager; leaving it closes the bar.
    """

    def __init__(self, callback, progress: bool | None, verbose: int, live: "Live", name: str = "curve_fit"):
        self.callback, self.verbose, self.bar, self.live, self.name = callback, verbose, None, live, name
        wanted = progress or (progress is None and verbose == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules))
        self.started = time.perf_counter()
        self.bar_after = (0.0 if progress else PROGRESS_DELAY) if wanted else float("inf")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.bar.close()

    def reading(self, share: float, gb_per_s: float, left: float):
        """While a sweep reads the data anew: how much of it is done, how fast, and the seconds that are left."""
        new = self.bar is None and time.perf_counter() - self.started > self.bar_after
        if new:
            self.bar = tqdm(desc=self.name, unit=" sweeps")
        if self.bar is not None:
            self.bar.set_postfix_str(f"reading {share:.0%}, {gb_per_s:.2g} GB/s, {left:.0f} s left", refresh=new)
            self.bar.update(0)

    def __call__(self, record: Record):
        if self.verbose == 2:
            _print_record(record)
        if self.bar is None and record.seconds > self.bar_after:
            self.bar = tqdm(desc=self.name, unit=" sweeps", initial=record.nfev - 1)
        if self.bar is not None:
            self.bar.set_postfix_str(f"cost {record.cost:.6g}, {distance_left(record)}", refresh=False)
            self.bar.update()
        self.live(record)
        if self.callback is not None:
            self.callback(record)


def distance_left(record: Record) -> str:
    """How far the optimum still is, as the quadratic model sees it."""
    return (
        f"{record.distance:.2g} standard errors to go"
        if np.isfinite(record.distance)
        else f"gradient {record.optimality:.1e}"
    )


def _print_record(record: Record):
    if record.iteration == 0:
        columns = ("Iteration", "Sweeps", "Cost", "Cost reduction", "Step norm", "Distance", "Reduction", "Seconds")
        print("".join(f"{column:^15}" for column in columns))
    step = ("", "") if record.iteration == 0 else (f"{record.actual:.2e}", f"{record.step_norm:.2e}")
    values = (record.iteration, record.nfev, f"{record.cost:.6e}", *step, f"{record.distance:.2e}", record.reduction)
    print("".join(f"{value!s:^15}" for value in (*values, f"{record.seconds:.2f}")))


class Live:
    """Tells the dashboard of ``client`` how a fit goes; nothing where there is none, or ``nlsq.dashboard`` is false.

    A context manager; leaving it by an error makes that the status of the fit.
    """

    def __init__(self, client: Client | None, model: str, names, start: np.ndarray, plan: Plan, absolute_sigma: bool):
        shown = client is not None and setting("dashboard") and install(client, LivePage())
        self.client = client if shown else None
        self.id, self.plan, self.absolute, self.seconds = uuid4().hex, plan, absolute_sigma, 0.0
        self.evaluator: Any = None  # what evaluates, and knows the latest result; set as soon as there is one
        self.errors = [float("nan")] * len(start)
        about = {name: getattr(plan, name) for name in PLANNED}
        self._tell(model=model, names=list(names), p0=start.tolist(), **about)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self._tell(status=f"{kind.__name__}: {error}"[:200])

    def __call__(self, record: Record) -> None:
        if self.client is None or self.evaluator is None:
            return
        params, equations = self.evaluator.latest
        free = equations.n_points - len(params)
        if np.array_equal(params, record.params) and (found := covariance(factor(equations))) is not None:
            scaled = found if self.absolute else found * (2 * equations.cost / max(free, 1))
            self.errors = np.sqrt(np.diag(scaled)).tolist()
        seconds, self.seconds = record.seconds - self.seconds, record.seconds
        rates = dict(points_per_s=self.plan.n_points / seconds / 1e6, gb_per_s=self.plan.sweep_bytes / seconds / 1e9)
        now = dict(params=record.params.tolist(), errors=self.errors)
        self._tell(nfev=record.nfev, cost=record.cost, distance=record.distance, **now, **rates)

    def guessed(self, start: np.ndarray) -> None:
        self._tell(p0=start.tolist())

    def ended(self, status: str, n_left_out: int, n_damaged: int) -> None:
        self._tell(status=status, n_left_out=n_left_out, n_damaged=n_damaged)

    def _tell(self, **what) -> None:
        if self.client is None or self.client.status != "running":
            return
        try:
            self.client.log_event(TOPIC, dict(what, fit=self.id))
        except ABSENT as err:
            logger.warning("the live page of fits gets no more news: %s: %s", type(err).__name__, err)
            self.client = None
