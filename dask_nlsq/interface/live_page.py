"""A live page at ``/nlsq`` of the scheduler's dashboard: what fits on the cluster do.

`LivePage` is a scheduler plugin that a fit with a Client installs, or ``dask scheduler --preload dask_nlsq.dashboard``.
Fits tell it what they do by `Client.log_event`, a small message per sweep; how far a sweep is, the scheduler knows from
its tasks. The page uses parts of Dask that are not public: where they, or bokeh, are missing, the log says so, and
everything else goes on.
"""

import logging
import time
from functools import partial
from html import escape

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from ..base.plugins import ABSENT

logger = logging.getLogger("dask_nlsq")

TOPIC = "nlsq"
PAGES = ("/nlsq", "/individual-nlsq")  # the second one is what JupyterLab's extension lists
FITS, SWEEPS = 20, 1000  # kept: fits, and sweeps of each
SLOWEST = 10  # workers that are listed
REFRESH = 500  # ms
HEIGHT = 240  # pixels of a plot
CELL = "style='padding: 2px 2em 2px 0; white-space: nowrap; text-align: left; border-bottom: 1px solid #ddd'"


class LivePage(SchedulerPlugin):
    """Keeps what the last fits have told, and serves the page.

    ``fits``: by id, what `interface.progress.Live` sends. ``workers``: by address, how many pieces of data the worker has
    swept since the newest fit began, and the seconds that its threads were busy with them.
    """

    name, idempotent = "nlsq-page", True

    def __init__(self):
        self.fits: dict[str, dict] = {}
        self.workers: dict[str, tuple[int, float]] = {}

    async def start(self, scheduler: Scheduler) -> None:
        try:
            _add_pages(scheduler, self)
        except ABSENT as err:
            logger.warning("no live page of fits at /nlsq: %s: %s", type(err).__name__, err)

    def log_event(self, topic, msg) -> None:
        if topic != TOPIC:
            return
        if msg["fit"] not in self.fits:
            self.fits[msg["fit"]], self.workers = {"began": time.time(), "sweeps": []}, {}
        fit = self.fits[msg["fit"]]
        if "cost" in msg:
            fit["sweeps"] = [*fit["sweeps"][1 - SWEEPS :], msg]
        else:
            fit.update(msg)
        while len(self.fits) > FITS:
            del self.fits[next(iter(self.fits))]

    def transition(self, key, start, finish, *args, worker=None, startstops=(), **others) -> None:
        if finish == "memory" and worker is not None and str(key).startswith("nlsq-sweep"):
            n, seconds = self.workers.get(worker, (0, 0.0))
            busy = sum(each["stop"] - each["start"] for each in startstops or () if each["action"] == "compute")
            self.workers[worker] = n + 1, seconds + busy


async def dask_setup(scheduler) -> None:
    """What ``--preload`` calls, on the scheduler; on workers there is nothing to do."""
    if isinstance(scheduler, Scheduler):
        await scheduler.register_scheduler_plugin(LivePage(), name=LivePage.name, idempotent=True)


def _add_pages(scheduler, live) -> None:
    from bokeh.server.tornado import BokehTornado
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    served = next((app for app in scheduler.http_application.applications if isinstance(app, BokehTornado)), None)
    if served is None:
        raise RuntimeError("this scheduler has no dashboard")
    documents = {page: partial(_document, live) for page in PAGES}
    pages = BokehApplication(documents, scheduler, prefix=served.prefix, template_variables=template_variables(scheduler))
    scheduler.http_application.add_application(pages)
    pages.initialize(IOLoop.current())
    pages.start()
    served._applications.update({page: pages._applications[page] for page in pages.app_paths})  # what is listed


# ---------------------------------------------------------------------------------------------------------------------
# the page


def _document(live: LivePage, scheduler, extra, doc) -> None:
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    root, update = _page(live, scheduler)
    doc.add_root(root)
    doc.title, doc.theme, doc.template = "Dask: least squares", BOKEH_THEME, env.get_template("simple.html")
    doc.template_variables.update(extra)
    doc.add_periodic_callback(update, REFRESH)


def _page(live: LivePage, scheduler):
    """Root of the page, and the function that brings it up to date."""
    from bokeh.layouts import column, gridplot
    from bokeh.models import BasicTicker, ColumnDataSource, Div, Whisker
    from bokeh.plotting import figure

    columns = ("sweep", "cost", "distance", "points_per_s")
    sweeps = ColumnDataSource({name: [] for name in columns}, name="nlsq_sweeps")
    params = ColumnDataSource({name: [] for name in ("name", "value", "low", "high")}, name="nlsq_params")
    text = Div(text="no fit yet", name="nlsq_progress", sizing_mode="stretch_width")
    workers, recent = (Div(name=name, sizing_mode="stretch_width") for name in ("nlsq_workers", "nlsq_fits"))
    size = dict(height=HEIGHT, sizing_mode="stretch_width", toolbar_location=None)

    def curve(title, name, **options):
        plot = figure(title=title, x_axis_label="sweep", **size, **options)
        plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
        plot.line("sweep", name, source=sweeps)
        plot.scatter("sweep", name, source=sweeps, size=5)
        return plot

    cost = curve("cost", "cost", y_axis_type="log")
    distance = curve("distance to the optimum, standard errors", "distance", y_axis_type="log")
    speed = curve("million points per second", "points_per_s")
    values = figure(title="parameters, in units of p0, with standard errors", y_range=[""], **size)
    values.scatter("value", "name", source=params, size=7)
    values.add_layout(Whisker(source=params, base="name", lower="low", upper="high", dimension="width"))

    def update():
        if not live.fits:
            return
        fit = list(live.fits.values())[-1]
        rows = fit["sweeps"]
        text.text = _progress(fit, scheduler)
        workers.text, recent.text = _workers(fit, live.workers), _recent(live.fits.values())
        if len(rows) == len(sweeps.data["sweep"]) and (not rows or rows[0]["cost"] == next(iter(sweeps.data["cost"]), None)):
            return
        sweeps.data = {"sweep": [row["nfev"] for row in rows]} | {name: [row[name] for row in rows] for name in columns[1:]}
        if rows:
            values.y_range.factors = fit["names"][::-1]
            values.height = max(HEIGHT, 14 * len(fit["names"]))
            unit = [abs(start) or 1.0 for start in fit["p0"]]
            last = list(zip(rows[-1]["params"], rows[-1]["errors"], unit, strict=True))
            params.data = {
                "name": fit["names"],
                "value": [value / one for value, _, one in last],
                "low": [(value - error) / one for value, error, one in last],
                "high": [(value + error) / one for value, error, one in last],
            }

    update()
    grid = gridplot([[cost, distance], [values, speed]], sizing_mode="stretch_width", toolbar_location=None)
    return column(text, grid, workers, recent, sizing_mode="stretch_width"), update


def _progress(fit, scheduler) -> str:
    """The fit and the sweep that is going on, in a line: its tasks are those of the newest group of that name."""
    about = f"{fit['n_points']:,} points, {escape(fit['strategy'])}, {len(fit['names'])} parameters. "
    about = f"<b>{escape(fit['model'])}</b>: {about}"
    if "status" in fit:
        left_out = f", {fit['n_left_out']:,} points masked or omitted" if fit.get("n_left_out") else ""
        damaged = f", {fit['n_damaged']:,} chunks damaged or absent" if fit.get("n_damaged") else ""
        return f"{about}{escape(fit['status'])}{left_out}{damaged}"
    for name, group in reversed(scheduler.task_groups.items()):
        states = dict(group.states)
        done, total = (
            sum(states.get(state, 0) for state in ("memory", "released", "forgotten", "erred")),
            sum(states.values()),
        )
        if name.startswith(("nlsq-sweep", "nlsq-load")) and done < total:
            spent = time.time() - group.start if 0 < group.start < time.time() else 0.0
            eta = f", {spent * (total - done) / done:.0f} s to go" if done and spent > 0 else ""
            verb = "loading" if name.startswith("nlsq-load") else f"sweep {len(fit['sweeps']) + 1}"
            return f"{about}{verb}: {done} of {total} pieces{eta}"
    rate = f", {fit['sweeps'][-1]['gb_per_s']:.3g} GB per second" if fit["sweeps"] else ""
    return f"{about}{len(fit['sweeps'])} sweeps done{rate}"


def _workers(fit, workers) -> str:
    """The workers with the lowest speed: of what they have swept, while they were busy with it."""
    points, gigabytes = (fit[name] / fit["n_partitions"] for name in ("n_points", "sweep_bytes"))
    speed = sorted((n / seconds, address, n) for address, (n, seconds) in workers.items() if seconds > 0)
    rows = [
        (address, f"{n:,}", f"{rate * points / 1e6:.3g}", f"{rate * gigabytes / 1e9:.3g}")
        for rate, address, n in speed[:SLOWEST]
    ]
    slowest = f"the slowest {SLOWEST} of {len(speed)} workers" if len(speed) > SLOWEST else "worker"
    return _table((slowest, "pieces swept", "million points per second", "GB per second"), rows)


def _recent(fits) -> str:
    rows = []
    for fit in reversed(fits):
        began = time.strftime("%H:%M:%S", time.localtime(fit["began"]))
        data = f"{fit['n_points']:,} points in {fit['n_chunks']:,} chunks"
        rows.append((began, fit["model"], data, str(len(fit["sweeps"])), fit.get("status", "running").split(":")[0]))
    return _table(("began", "model", "data", "sweeps", "status"), rows)


def _table(head, rows) -> str:
    lines = [f"<tr>{''.join(f'<th {CELL}>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td {CELL}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table style='border-collapse: collapse'>{''.join(lines)}</table>"
