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
LONGEST, MOST = 200, 10_000  # kept: characters of a text, parameters of a fit
SLOWEST = 10  # workers that are listed
REFRESH = 500  # ms
HEIGHT = 240  # pixels of a plot
CELL = "style='padding: 2px 2em 2px 0; white-space: nowrap; text-align: left; border-bottom: 1px solid #ddd'"


def _text(value):
    return value[:LONGEST] if isinstance(value, str) else None


def _count(value):
    return value if isinstance(value, int) and 0 <= value < 2**63 else None


def _number(value):
    return float(value) if isinstance(value, float) or _count(value) is not None else None


def _several(check, value):
    """A list of texts or numbers; None where one of them is something else."""
    found = [check(each) for each in value] if isinstance(value, (list, tuple)) and len(value) <= MOST else [None]
    return None if None in found else tuple(found)


def _names(value):
    found = _several(_text, value)
    return found if found and len({*found}) == len(found) else None


_numbers = partial(_several, _number)
# Messages that fits send, by what they have. Anybody with a Client may send others: those are not kept.
BEGUN = dict(model=_text, names=_names, p0=_numbers, n_points=_count, n_chunks=_count, n_partitions=_count,
             sweep_bytes=_count, strategy=_text)  # fmt: skip
SWEPT = dict(nfev=_count, cost=_number, distance=_number, points_per_s=_number, gb_per_s=_number, params=_numbers,
             errors=_numbers)  # fmt: skip
LATER = (SWEPT, dict(p0=_numbers), dict(status=_text, n_left_out=_count, n_damaged=_count), dict(status=_text))


def _understood(msg, kinds):
    """The values of a message of one of these kinds; None where it is not."""
    for kind in kinds:
        found = {name: check(msg.get(name)) for name, check in kind.items()}
        if None not in found.values():
            return found
    return None


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
        if topic != TOPIC or not isinstance(msg, dict) or not isinstance(msg.get("fit"), str):
            return
        fit = self.fits.get(msg["fit"])
        told = _understood(msg, [BEGUN] if fit is None else LATER)
        n = len((fit or told or {}).get("names", ()))
        if told is None or any(name in told and len(told[name]) != n for name in ("p0", "params", "errors")):
            return
        if fit is None:
            self.fits[msg["fit"]], self.workers = {"began": time.time(), "sweeps": [], **told}, {}
        elif "cost" in told:
            for row in fit["sweeps"][-1:]:  # parameters are shown of the last sweep alone
                del row["params"], row["errors"]
            fit["sweeps"] = [*fit["sweeps"][1 - SWEEPS :], told]
        else:
            fit.update(told)
        while len(self.fits) > FITS:  # one that has ended goes first
            del self.fits[next((each for each, fit in self.fits.items() if "status" in fit), next(iter(self.fits)))]

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
    model, strategy = escape(fit["model"]), escape(fit["strategy"])
    about = f"<b>{model}</b>: {fit['n_points']:,} points, {strategy}, {len(fit['names'])} parameters. "
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
    points, gigabytes = (fit[name] / max(fit["n_partitions"], 1) for name in ("n_points", "sweep_bytes"))
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
