"""A page of maps: a click on a pixel shows its spectrum, fit and values. It needs no server and nothing else.

What a click shows is in the page, as float32, so the page is bounded: of larger maps it holds every second, third, ...
pixel along each axis, maps and spectra by rules of their own, and says so. Needs the extra ``dashboard``.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..base.files import write_whole
from ..base.text import size
from ..kernels.lanes import MapStatus
from ..model.params import Parameter
from ..results.plots import DATA, MODEL
from .pictures import COLOURS, Axis, ends_with_errors, limits, shape, status_name
from .points import residual_label, some_points

CURVES = ("y", "model", "residual")
BASE64 = 4 / 3  # bytes of text for one of data
MAPS, SPECTRA = 6 * 10**6, 14 * 10**6  # bytes of a page for the maps, and for what clicks show
TEXT = 24  # bytes of a value with its error
FEWEST = 16  # pixels of which a page has to hold the spectra
WIDTH, BESIDE = 300, 480  # of a map, and of a spectrum, in pixels of the screen
FRAME = 760  # height of the page within a notebook

CLICKED = """
const nearest = (values, at) => values.reduce((best, v, k) => Math.abs(v - at) < Math.abs(values[best] - at) ? k : best, 0)
const along = (k, axis) => Math.min(Math.round(k / every[axis]), counts[axis] - 1)
if (cb_obj.x !== undefined && cb_obj.x !== null) {
  const places = axes.length > 1 ? [nearest(axes[0], cb_obj.y), nearest(axes[1], cb_obj.x)] : [nearest(axes[0], cb_obj.x)]
  chosen.tags = [places.reduce((k, place, axis) => k * counts[axis] + along(place, axis), 0)]
}
const k = chosen.tags[0]
const place = counts.length > 1 ? [Math.floor(k / counts[1]) * every[0], (k % counts[1]) * every[1]] : [k * every[0]]
const at = place.map((each, axis) => axes[axis][each])
if (axes.length > 1) chosen.data = {x: [at[1]], y: [at[0]]}
for (const line of lines) line.location = at[0]
const n = curve.data.x.length
if (n > 0) {
  const cut = name => Array.from({length: n}, (_, i) => spectra.data[name][k * n + i])
  curve.data = {x: curve.data.x, y: cut('y'), model: cut('model'), residual: cut('residual')}
}
const rows = pixels.data.values[k].split('|').map((value, i) => `<tr><td>${names[i]}</td><td>${value}</td></tr>`)
const where = units.map(([name, unit], axis) => `${name} ${Number(at[axis].toPrecision(6))} ${unit}`.trim()).join(', ')
text.text = `<b>pixel (${place.join(', ')})</b>${where ? ` at ${where}` : ''}: <b>${pixels.data.status[k]}</b>`
  + `<table class="values">${rows.join('')}</table>`
"""
STYLE = ".values td { padding: 1px 18px 1px 0; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }"


class Shown(NamedTuple):
    """What clicks show: one in ``every`` pixels along each axis."""

    every: tuple[int, ...]
    counts: tuple[int, ...]
    pixels: dict[str, list[str]]  # status and values as text
    x: np.ndarray  # (n,), ascending; none without data
    curves: dict[str, np.ndarray]  # y, model and residual, (pixels * n,) float32


@dataclass(frozen=True, repr=False)
class Viewer:
    """The page as HTML, which a notebook shows."""

    html: str

    def save(self, path: str | Path) -> Path:
        """Write it to a file, all at once."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"`path`: there is no directory {path.parent}: create it, or give another path")
        write_whole(path, [self.html.encode()])
        return path

    def _repr_html_(self):
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: {FRAME}px; border: 0"></iframe>'

    def __repr__(self):
        return f"<Viewer, {size(len(self.html))}: a notebook shows it, save(path) writes it>"


def viewer(found) -> Viewer:
    """The page of maps with one or two axes; lazy ones are computed.

    Raises
    ------
    ValueError
        Other numbers of axes, lazy and stored maps that are too large; spectra that are too long for a page.
    ModuleNotFoundError
        Without bokeh.
    """
    try:
        from bokeh.document import Document
        from bokeh.embed import file_html
        from bokeh.layouts import column, gridplot, row
        from bokeh.models import ColumnDataSource, CustomJS, Div
        from bokeh.resources import INLINE
    except ImportError as err:
        raise ModuleNotFoundError('the viewer needs bokeh: pip install "dask_nlsq[dashboard]"', name="bokeh") from err
    found = found.drawable()
    shown, names, axes = _shown(found), [*found.param_names, *found.derived_names], [_even(each) for each in found.axes]
    panels = [*names, "chi2", "status"]
    every = _every(found.shape, MAPS / (len(panels) * 4 * BASE64))
    curve = ColumnDataSource(dict(x=shown.x, **dict.fromkeys(CURVES, 0 * shown.x)), name="curve")
    chosen = ColumnDataSource(dict(x=[], y=[]), tags=[_first(found, shown)], name="chosen")
    drawn = [_panel(found, name, axes, every, chosen) for name in panels]
    for plot, _ in drawn[1:]:
        plot.x_range = drawn[0][0].x_range
        if len(axes) > 1:
            plot.y_range = drawn[0][0].y_range
    text = Div(name="values", width=BESIDE, stylesheets=[STYLE])
    args: dict[str, Any] = dict(axes=[each.values.tolist() for each in axes], every=shown.every, counts=shown.counts)
    units = [(escape(each.label.removesuffix(f" ({each.unit})")), escape(each.unit)) for each in axes if each.known]
    args |= dict(units=units if len(units) == len(axes) else [], names=[*map(escape, names), "chi2"])
    args |= dict(curve=curve, chosen=chosen, text=text, lines=[line for _, line in drawn if line is not None])
    args |= dict(pixels=ColumnDataSource(shown.pixels), spectra=ColumnDataSource(shown.curves))
    clicked = CustomJS(args=args, code=CLICKED)
    for plot, _ in drawn:
        plot.js_on_event("tap", clicked)
    note = Div(text=_note(found, every, shown), width=2 * WIDTH + BESIDE)
    grid = gridplot(
        [plot for plot, _ in drawn],
        ncols=2 if len(drawn) <= 6 else 3,
        toolbar_location="above",
        toolbar_options=dict(logo=None),
    )
    document = Document(title=f"Maps: {found.heading}")
    document.add_root(column(note, row(grid, column(*_spectrum(found, curve), text))))
    document.js_on_event("document_ready", clicked)
    return Viewer(file_html(document, INLINE, title=document.title))


# ---------------------------------------------------------------------------------------------------------------------
# what the page holds


def _every(sizes: tuple[int, ...], most: float) -> tuple[int, ...]:
    """Steps along the axes, that leave at most ``most`` pixels."""
    step = 1
    while prod(ceil(n / step) for n in sizes) > most:
        step += 1
    return (step,) * len(sizes)


def _shown(found) -> Shown:
    """Read the chunks that have some of these pixels, if the maps have data."""
    n = found.plan.n_points if hasattr(found, "spectrum") else 0
    each = len(CURVES) * 4 * BASE64 * n + TEXT * (len(found.param_names) + len(found.derived_names) + 2)
    if each * FEWEST > SPECTRA:
        raise ValueError(
            f"a spectrum of {n:,} points takes {size(each)} in a page, which may have {size(SPECTRA)} of them, fewer than "
            f"{FEWEST} pixels: look at single ones by spectrum(...).plot()"
        )
    every = _every(found.shape, SPECTRA / each)
    taken = tuple(slice(None, None, step) for step in every)
    counts = tuple(ceil(size / step) for size, step in zip(found.shape, every, strict=True))
    values = [found.field(name)[taken].reshape(prod(counts), -1) for name in ("popt", "perr", "at_bound")]
    rows = [*zip(*values, strict=True)]
    texts = [[_text(*each) for each in zip(*row, strict=True)] for row in rows]
    if found.derived_names:
        more = (found.field(name)[taken].reshape(prod(counts), -1) for name in ("derived", "derived_error"))
        for line, one in zip(texts, zip(*more, strict=True), strict=True):
            line += [_text(value, error, 0) for value, error in zip(*one, strict=True)]
    for line, chi2 in zip(texts, found.chi2[taken].ravel(), strict=True):
        line.append(f"{chi2:.5g}")
    pixels = dict(
        status=[status_name(code) for code in found.status[taken].ravel()], values=["|".join(each) for each in texts]
    )
    if not n:
        return Shown(every, counts, pixels, np.empty(0), dict.fromkeys(CURVES, np.empty(0, np.float32)))
    x = _shared_x(found)
    x = np.arange(n) if x is None else x
    order = np.argsort(x, kind="stable")
    values = some_points(found, every).reshape(len(CURVES), -1, n)[..., order]
    return Shown(every, counts, pixels, x[order].astype(float), dict(zip(CURVES, map(np.ravel, values), strict=True)))


def _shared_x(found) -> np.ndarray | None:
    """What spectra are drawn against; None where there are several coordinates, or pixels have their own."""
    shared = found.problem.fit.x
    return shared[0] if len(shared) == 1 else None


def _text(value, error, side) -> str:
    """A value with its error, and whether it is at a bound."""
    parameter = Parameter("", float(value), float(error), int(side))
    if not np.isfinite(value):
        return ""
    _, value, error, _, remark = map(str.strip, parameter.row())
    return f"{value} {error.replace('+-', '±')} {remark}".strip()


def _first(found, shown: Shown) -> int:
    """The pixel that is shown at first: the one with the largest value of the first parameter that is not far off."""
    taken = tuple(slice(None, None, step) for step in shown.every)
    values, errors = (each[taken].ravel() for each in found.values_of(found.param_names[0]))
    _, high, _ = limits("", values, errors)
    return int(np.argmax(np.where(values <= high, values, -np.inf)))


def _note(found, every, shown: Shown) -> str:
    lines = [f"<b>{escape(found.heading)}</b>"]
    lines += [f"of the maps this page holds one in {every[0]} pixels along each axis"] if every[0] > 1 else []
    if len(shown.x):
        thinned = f"of the spectra it holds one in {shown.every[0]} along each axis, and a click shows the nearest of them"
        lines += [thinned] if shown.every[0] > 1 else []
        lines.append("click on a pixel to see its spectrum")
    else:
        lines.append("click on a pixel to see its values; with_data(xdata, ydata) brings the spectra")
    return "; ".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


def _even(axis: Axis) -> Axis:
    """An axis that images can have: of the numbers of pixels where its steps are not even."""
    return axis if axis.even else Axis(axis.label, axis.unit, np.arange(len(axis.values), dtype=float), False)


def _panel(found, name: str, axes, every, chosen):
    """A map, and the line in it that marks the chosen pixel of a map with one axis."""
    from bokeh.models import FixedTicker, HoverTool, Span
    from bokeh.plotting import figure

    values, errors = found.values_of(name)
    ratio = shape(axes)
    size = dict(width=WIDTH, height=int(min(max(0.75 * WIDTH * (ratio or 0.9), 150), 420) + 70))
    plot = figure(title=name, name=f"map of {name}", tools="pan,wheel_zoom,box_zoom,reset,save", active_drag=None, **size)
    plot.xaxis.axis_label = axes[-1].label
    plot.grid.visible, plot.xaxis.ticker.desired_num_ticks, plot.xaxis.ticker.num_minor_ticks = False, 4, 0
    plot.yaxis.ticker.desired_num_ticks, plot.yaxis.ticker.num_minor_ticks = 5, 0
    if len(axes) == 1:
        line = Span(dimension="height", location=0, line_color=MODEL, line_width=2)
        plot.add_layout(line)
        x, y = axes[0].values[:: every[0]], np.where(np.isfinite(values), values, np.nan)[:: every[0]].astype(float)
        plot.scatter(x, y, color=DATA, size=4)
        if name == "status":
            plot.yaxis.ticker = FixedTicker(ticks=(codes := np.unique(values)))
            plot.yaxis.major_label_overrides = {code: status_name(code) for code in codes.tolist()}
        if errors is not None:
            error = errors[:: every[0]]
            plot.segment(x, y - error, x, y + error, color=DATA)
            plot.y_range.start, plot.y_range.end = ends_with_errors(name, values, errors)
        return plot, line
    y, x = axes
    plot.yaxis.axis_label = y.label
    (left, right), (bottom, top) = x.edges, y.edges
    image = np.unique(values, return_inverse=True)[1].reshape(values.shape) if name == "status" else values
    image = np.asarray(image, np.float32)[:: every[0], :: every[1]]
    image = image[:: -1 if bottom > top else 1, :: -1 if left > right else 1]
    low, left = min(bottom, top), min(left, right)
    mapper, bar = _colours(name, values, errors)
    box = dict(x=left, y=low, dw=abs(x.edges[1] - x.edges[0]), dh=abs(top - bottom))
    drawn = plot.image([image], color_mapper=mapper, **box)
    plot.add_layout(bar, "right")
    plot.x_range.range_padding = plot.y_range.range_padding = 0
    plot.y_range.flipped = not y.known
    plot.scatter("x", "y", source=chosen, marker="square", size=10, fill_color=None, line_color="white", line_width=4)
    plot.scatter("x", "y", source=chosen, marker="square", size=10, fill_color=None, line_color="#cc0000", line_width=2)
    if name != "status":
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=[("value", "@image")]))
    return plot, None


def _colours(name: str, values, errors):
    """Mapper and bar of the colours of a map."""
    from bokeh.models import BasicTicker, ColorBar, FixedTicker, LinearColorMapper, LogColorMapper

    look: dict[str, Any] = dict(width=12, padding=4, major_label_text_font_size="10px")
    if name == "status":
        codes = np.unique(values)
        mapper: Any = LinearColorMapper(
            low=-0.5, high=len(codes) - 0.5, palette=[COLOURS[MapStatus(code)] for code in codes]
        )
        names = {k: status_name(code) for k, code in enumerate(codes)}
        return mapper, ColorBar(color_mapper=mapper, ticker=FixedTicker(ticks=[*names]), major_label_overrides=names, **look)
    low, high, log = limits(name, values, errors)
    mapper = (LogColorMapper if log else LinearColorMapper)(palette="Viridis256", low=low, high=high, nan_color="white")
    ticker = {} if log else dict(ticker=BasicTicker(desired_num_ticks=5))
    return mapper, ColorBar(color_mapper=mapper, **ticker, **look)


def _spectrum(found, curve):
    """Data and model, and residuals below, of the chosen pixel; nothing without data."""
    from bokeh.plotting import figure

    if not len(curve.data["x"]):
        return []
    x, y = (found.labels.get(name, name) for name in "xy")
    x = "point" if _shared_x(found) is None else x
    residual = residual_label(found.problem).replace(" / ", "\n/ ")
    tools = "pan,wheel_zoom,box_zoom,reset,save"
    top = figure(width=BESIDE, height=300, y_axis_label=y, tools=tools, name="spectrum")
    top.scatter("x", "y", source=curve, color=DATA, size=4, legend_label="data")
    top.line("x", "model", source=curve, color=MODEL, line_width=2, legend_label="model")
    top.legend.background_fill_alpha = top.legend.border_line_alpha = 0
    below = figure(width=BESIDE, height=160, x_axis_label=x, y_axis_label=residual, x_range=top.x_range, tools="")
    top.toolbar.logo = below.toolbar.logo = below.toolbar_location = None
    top.toolbar_location = "above"
    for each in (top, below):
        each.min_border_left = 70
    below.scatter("x", "residual", source=curve, color=DATA, size=3)
    below.line("x", 0, source=curve, color=MODEL)
    return [top, below]
