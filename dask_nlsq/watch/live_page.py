"""A live page at ``/nlsq`` of the scheduler's dashboard: what fits on the cluster do.

`LivePage` is a scheduler plugin that `open_page`, a fit with a Client, or ``dask scheduler --preload dask_nlsq.dashboard``
brings. Fits report to it with `Client.log_event`, a small message for each sweep and a few while one goes on. The page
uses parts of Dask that are not public. If they, or bokeh, are missing, the log says so, and everything else works.
"""

import logging
import time
from functools import partial
from html import escape
from math import inf, isfinite, nan

from distributed import Client, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from ..base.config import setting
from ..base.plugins import ABSENT, install
from ..base.text import measured, several
from ..memory.machine import active_client
from ..memory.processes import Report, processes_of

logger = logging.getLogger("dask_nlsq")

TOPIC = "nlsq"
PAGES = ("/nlsq", "/individual-nlsq")  # the second one is what JupyterLab's extension lists
FITS, SWEEPS = 20, 1000  # kept: fits, and sweeps of each
LONGEST, MOST = 500, 10_000  # kept: characters of a text, parameters of a fit
SLOWEST = 10  # workers that are listed
REFRESH = 500  # ms
SLOW = 3.0  # seconds, after which it is said how long something takes of which nothing is done yet
HEIGHT = 240  # pixels of a plot
CELL = (
    "style='padding: 2px 2em 2px 0; white-space: nowrap; text-align: left; border-bottom: 1px solid #ddd; max-width: 45em; "
    "overflow: hidden; text-overflow: ellipsis'"
)
BAR = (
    "<div style='background: #ddd; height: 8px; margin: 6px 0'><div style='background: #1f77b4; height: 8px; width: {:.1%}'>"
    "</div></div>"
)
GOOD, BAD = "#00664a", "#b3261e"
OF_GROUPS = "maps of groups"  # of a grouped fit that is done
EACH = {"fit_map": "pixel", "fit_groups": "group", OF_GROUPS: "group"}  # what there are many fits of
BY_BLOCKS = ("fit_map", OF_GROUPS)  # that tell of blocks, not of sweeps
WAITS = "No fit yet: curve_fit, fit_map and fit_groups appear here when they use this cluster."


def open_page(client: Client | None) -> bool:
    """Bring the page to the scheduler of ``client``; whether it is there. False where ``nlsq.dashboard`` is."""
    return client is not None and setting("dashboard") and install(client, LivePage())


def cluster_report(client: Client | None = None) -> Report:
    """The environment of this process and of the workers of ``client`` (by default the active one); prints as a table.

    It also opens the live page, which else the first fit does. A fit on a cluster looks at the same and logs a warning
    (logger ``dask_nlsq``) for each line of its advice.

    Raises
    ------
    ModuleNotFoundError
        Where a worker lacks this package or one that it needs.
    """
    client = active_client(client)
    link = client.dashboard_link if client is not None and open_page(client) else None
    return Report(processes_of(client), link and f"{link.removesuffix('status')}nlsq")


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
BEGUN = dict(what=_text, client=_text, model=_text, names=_names, n_points=_count, n_chunks=_count, n_partitions=_count,
             n_fits=_count, strategy=_text, accuracy=_number)  # fmt: skip
SWEPT = dict(nfev=_count, n_sweeps=_count, cost=_number, distance=_number, points_per_s=_number, failed=_count,
             params=_numbers, errors=_numbers)  # fmt: skip
STAGE = dict(stage=_text, done=_count, total=_count, left=_number, so_far=_number)
MAPPED = dict(STAGE, fitted=_count, failed=_count, per_s=_number)
ENDED = dict(status=_text, success=_count, n_sweeps=_count, load=_number, solve=_number, n_left_out=_count, n_damaged=_count)
LATER = (SWEPT, MAPPED, STAGE, ENDED, dict(status=_text), dict(resumed=_count))


def _understood(msg, kinds):
    """The values of a message of one of these kinds; None where it is not."""
    for kind in kinds:
        found = {name: check(msg.get(name)) for name, check in kind.items()}
        if None not in found.values():
            return found
    return None


class LivePage(SchedulerPlugin):
    """Keeps what the last fits have told, and serves the page.

    ``fits``: by id, what `progress.Live` sends. ``workers``: by address, how many pieces of data the worker has
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
        if told is None or any(name in told and len(told[name]) != n for name in ("params", "errors")):
            return
        if fit is None:
            self.fits[msg["fit"]], self.workers = {"began": time.time(), "sweeps": [], **told}, {}
        elif "cost" in told:
            for row in fit["sweeps"][-1:]:  # parameters are shown of the last sweep alone
                del row["params"], row["errors"]
            fit["sweeps"] = [*fit["sweeps"][1 - SWEEPS :], told]
            fit["stage"] = ""
        else:
            fit.update(told)
        while len(self.fits) > FITS:  # one that has ended goes first
            del self.fits[next((each for each, fit in self.fits.items() if "status" in fit), next(iter(self.fits)))]

    def remove_client(self, scheduler, client: str) -> None:
        for fit in self.fits.values():
            if fit["client"] == client:
                fit.setdefault("status", "lost: the process of this fit has left the cluster")

    def transition(self, key, start, finish, *args, worker=None, startstops=(), **others) -> None:
        if finish == "memory" and worker is not None and str(key).startswith("nlsq-sweep"):
            n, seconds = self.workers.get(worker, (0, 0.0))
            busy = sum(each["stop"] - each["start"] for each in startstops or () if each["action"] == "compute")
            self.workers[worker] = n + 1, seconds + busy

    @property
    def shown(self) -> tuple[str, dict] | None:
        """Of the fits that are running the newest one, else of all; maps of groups only where there is nothing else."""
        fits = [each for each in self.fits.items() if each[1]["what"] != OF_GROUPS] or [*self.fits.items()]
        running = [each for each in fits if "status" not in each[1]]
        return next(reversed(running or fits), None)


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
    from bokeh.layouts import column, layout
    from bokeh.models import BasicTicker, ColumnDataSource, Div
    from bokeh.plotting import figure

    sweeps = ColumnDataSource({name: [] for name in CURVES}, name="nlsq_sweeps")
    text = Div(text=WAITS, name="nlsq_progress", sizing_mode="stretch_width")
    tables = (Div(name=name, sizing_mode="stretch_width") for name in ("nlsq_params", "nlsq_workers", "nlsq_fits"))
    values, workers, recent = tables
    size = dict(height=HEIGHT, sizing_mode="stretch_width", toolbar_location=None)

    def curve(title, name, **options):
        plot = figure(title=title, x_axis_label="sweep", **size, **options)
        plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
        plot.line("sweep", name, source=sweeps)
        plot.scatter("sweep", name, source=sweeps, size=5)
        return plot

    cost = curve("cost above the lowest", "above", y_axis_type="log")
    alike = dict(x_range=cost.x_range)
    distance = curve("standard errors to the optimum; dashed: accuracy", "distance", y_axis_type="log", **alike)
    distance.line("sweep", "accuracy", source=sweeps, line_dash="dashed", line_color=GOOD)
    speed = curve("million points per second", "points_per_s", **alike)
    panels = layout([[cost, distance], [values, speed]], sizing_mode="stretch_width", name="nlsq_panels", visible=False)
    seen: list = [None]

    def update():
        if live.shown is None:
            return
        (number, fit), rows = live.shown, live.shown[1]["sweeps"]
        text.text, recent.text = _progress(fit), _recent(live.fits.values())
        workers.text = _workers(fit, live.workers) if fit["what"] not in BY_BLOCKS else ""
        panels.visible = bool(rows)
        if [number, *rows[-1:]] != seen:
            seen[:] = [number, *rows[-1:]]
            sweeps.data, values.text = _curves(fit), _values(fit)

    update()
    return column(text, panels, workers, recent, sizing_mode="stretch_width"), update


CURVES = ("sweep", "above", "distance", "accuracy", "points_per_s")


def _curves(fit) -> dict[str, list]:
    """What is drawn of the sweeps. The lowest cost itself has no place on a logarithmic axis."""
    rows = fit["sweeps"]
    lowest = min((row["cost"] for row in rows), default=nan)
    accuracy = fit["accuracy"] if 0 < fit["accuracy"] < inf else nan
    columns = (
        [row["nfev"] for row in rows],
        [row["cost"] - lowest if row["cost"] > lowest else nan for row in rows],
        [row["distance"] if row["distance"] > 0 else nan for row in rows],
        [accuracy] * len(rows),
        [row["points_per_s"] for row in rows],
    )
    return dict(zip(CURVES, columns, strict=True))


def _values(fit) -> str:
    """A table of the parameters after the last sweep, as high as a plot."""
    if not fit["sweeps"]:
        return ""
    last = zip(fit["names"], fit["sweeps"][-1]["params"], fit["sweeps"][-1]["errors"], strict=True)
    rows = [(name, " \N{PLUS-MINUS SIGN} ".join(measured(value, error))) for name, value, error in last]
    return f"<div style='max-height: {HEIGHT}px; overflow-y: auto'>{_table(('parameter', 'value'), rows)}</div>"


def stage_text(stage: str, done: int, total: int, left: float, so_far: float) -> str:
    """What is being done, how far it is, and the seconds that are left; of what is slow to begin, those so far."""
    counted = f": {done:,} of {total:,}" if total else ""
    waiting = f", {_duration(so_far)} so far" if so_far > SLOW else ""
    return stage + counted + (f", {_duration(left)} to go" if isfinite(left) else waiting)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _progress(fit) -> str:
    """The fit, and what it does, in two lines."""
    each, n_fits = EACH.get(fit["what"]), fit["n_fits"]
    many = [several(n_fits, each)] if each else []
    about = [*many, _data(fit), fit["strategy"], several(len(fit["names"]), "parameter")]
    about += [f"resumed after {several(fit['resumed'], 'sweep')}"] if fit.get("resumed") else []
    head = f"<b>{escape(fit['model'])}</b> by {escape(fit['what'])}: {escape(', '.join(filter(None, about)))}"
    share = fit["done"] / fit["total"] if fit.get("stage") and fit.get("total") and "status" not in fit else None
    bar = "" if share is None else BAR.format(min(share, 1.0))
    color = {True: GOOD, False: BAD, None: "inherit"}[fit.get("success", 0) > 0 if "status" in fit else None]
    return f"{head}<br><span style='color: {color}'>{escape(_state(fit))}</span>{bar}"


def _state(fit) -> str:
    """What it does, or how it has ended."""
    each, last = EACH.get(fit["what"]), (fit["sweeps"] or [{}])[-1]
    failed = fit.get("failed", 0) or last.get("failed", 0)
    parts = [f"{several(failed, each)} failed"] if each and failed else []
    if "status" in fit:
        parts += [f"{fit['n_left_out']:,} points masked or omitted"] if fit.get("n_left_out") else []
        parts += [f"{fit['n_damaged']:,} chunks damaged or absent"] if fit.get("n_damaged") else []
        parts += [_times(fit)] if "solve" in fit else []
        return "; ".join([fit["status"].rstrip("."), *parts])
    if "per_s" in fit:
        parts = [f"{fit['fitted']:,} of {several(fit['n_fits'], each or 'fit')}, {fit['per_s']:,.0f} per second", *parts]
    elif each and last:
        parts = [f"{last['points_per_s'] * 1e6 * fit['n_fits'] / max(fit['n_points'], 1):,.0f} {each}s per second", *parts]
    elif last:
        parts = [f"{last['points_per_s']:.3g} million points per second", *parts]
    now = stage_text(*(fit[name] for name in STAGE)) if fit.get("stage") else several(len(fit["sweeps"]), "sweep") + " done"
    return "; ".join([now, *parts])


def _data(fit) -> str:
    piece = "block" if fit["what"] in BY_BLOCKS else "chunk"
    return f"{several(fit['n_points'], 'point')} in {several(fit['n_chunks'], piece)}"


def _times(fit) -> str:
    solve, load = (f"{fit[name]:.2f} s" for name in ("solve", "load"))
    return f"{several(fit['n_sweeps'], 'sweep')} in {solve}, after {load} of preparation" if fit["n_sweeps"] else solve


def _workers(fit, workers) -> str:
    """The workers with the lowest speed: of what they have swept, while they were busy with it."""
    points = fit["n_points"] / max(fit["n_partitions"], 1)
    speed = sorted((n / seconds, address, n) for address, (n, seconds) in workers.items() if seconds > 0)
    rows = [(address, f"{n:,}", f"{rate * points / 1e6:.3g}") for rate, address, n in speed[:SLOWEST]]
    slowest = f"the slowest {SLOWEST} of {len(speed)} workers" if len(speed) > SLOWEST else "worker"
    return _table((slowest, "pieces swept", "million points per second in a thread"), rows) if rows else ""


def _recent(fits) -> str:
    rows = []
    for fit in reversed(fits):
        began = time.strftime("%H:%M:%S", time.localtime(fit["began"]))
        state = f"{fit['status'].split(':')[0]}; {_times(fit)}" if "solve" in fit else _state(fit)
        rows.append((began, fit["what"], fit["model"], _data(fit), state))
    return _table(("began", "by", "model", "data", "progress"), rows)


def _table(head, rows) -> str:
    lines = [f"<tr>{''.join(f'<th {CELL}>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td {CELL}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table style='border-collapse: collapse'>{''.join(lines)}</table>"
