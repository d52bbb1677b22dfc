"""The page about a fit: what it says, in a browser too, and what it needs from elsewhere: nothing."""

import copy
import pickle
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import dask.array as da
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import zarr

from dask_nlsq import DamagedFileError, curve_fit, fit_map, load, plots
from dask_nlsq.base.files import read_json, write_json
from dask_nlsq.base.text import measured
from dask_nlsq.results.report import _places, page
from dask_nlsq.results.schema import VERSION

from .browser import CHROMIUM, opened, wait
from .spectra import counted

matplotlib.use("agg")
N = 30_000
NAMES = ("amplitude", "<b>rate</b>", "offset")


def decay(t, a, b, c):
    """A decay: a exp(-b t) + c, t < 10 & more."""
    return a * jnp.exp(-b * t) + c


def data(n=N):
    t = np.linspace(0, 10, n)
    return t, 2 * np.exp(-0.5 * t) + 0.3 + np.random.default_rng(3).normal(0, 0.05, n)


class Page(HTMLParser):
    """Tables as rows of texts, by the heading above; sources of pictures; tags, and open ones."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.sources, self.tags, self.open, self.heading, self.preformatted = {}, [], set(), [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href", "action", "data", "poster", "srcset") if name in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "h2" in self.open:
            self.heading = text
        if {"td", "th"} & set(self.open):
            self.tables[self.heading][-1][-1] += text
        if "pre" in self.open:
            self.preformatted += text


@pytest.fixture(scope="module")
def found():
    return curve_fit(decay, *data(), p0=[1, 1, 0], param_names=NAMES)


def test_the_page_says_what_the_result_says(found, tmp_path):
    path = found.report(tmp_path / "fit.html")
    read = Page(path.read_text())
    assert read.open == [] and path.parent == tmp_path
    rows = {row[0]: row for row in read.tables["Parameters"]}
    for name, value, error in zip(NAMES, found.popt, found.perr, strict=True):
        shown = measured(value, error)
        assert rows[name][1:3] == [f" {shown[0]}", f"± {shown[1]}"]
        ends = found.confidence_intervals()[NAMES.index(name)]
        assert rows[name][4:6] == [measured(end, error)[0] for end in ends]
    statistics = dict(read.tables["Statistics"])
    assert statistics["points used"] == "30,000"
    assert float(statistics["reduced chi-square"]) == pytest.approx(found.reduced_chi_square, rel=1e-5)
    assert [float(row[1]) for row in read.tables["Sweeps"][1:]] == pytest.approx([r.cost for r in found.history], rel=1e-8)
    assert str(found.plan) in read.preformatted
    assert "return a * jnp.exp(-b * t) + c" in read.preformatted
    assert dict(read.tables["Provenance"])["jax"] in sys.modules["jax"].__version__
    assert [row[0] for row in read.tables["Data"]] == ["", "ydata", "xdata"]


@pytest.mark.slow
def test_nothing_on_the_page_comes_from_elsewhere_or_runs(found):
    read = Page(page(found))
    assert read.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert len(read.sources) == 4 and all(source.startswith("data:image/svg+xml;base64,") for source in read.sources)
    assert not re.search(r"@import|url\(", page(found))


@pytest.mark.slow
def test_what_users_name_is_text_and_not_markup(found):
    text = page(found)
    assert "<b>" not in text and "&lt;b&gt;rate&lt;/b&gt;" in text
    assert "t &lt; 10 &amp; more" in text


def strings(value, place=()):
    """Places of the strings in JSON, without those that say what kind of thing something is."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(each, str) and key not in ("record", "stored", "dtype", "float"):
            yield (*place, key)
        yield from strings(each, (*place, key))


def put(value, place, text):
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = text


@pytest.mark.slow
@pytest.mark.hostile
def test_whatever_a_saved_result_says_is_text_on_a_page_and_in_pictures(found, tmp_path):
    script, accepted = r"<script>alert('$\nope$')</script>", 0
    found.save(tmp_path / "r")
    file = tmp_path / "r" / "result.json"
    kept = read_json(file, VERSION)
    crafted = copy.deepcopy(kept)
    for place in strings(kept["result"]):
        tried = copy.deepcopy(crafted)
        put(tried["result"], place, script)
        write_json(file, **tried)
        try:
            load(tmp_path / "r")
        except DamagedFileError:
            continue
        crafted, accepted = tried, accepted + 1
    assert accepted > 10
    write_json(file, **crafted)
    again = load(tmp_path / "r")
    assert again.param_names == (script,) * 3 and again.message == script
    for text in (page(again), again.to_html()):
        assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.slow
@pytest.mark.hostile
def test_a_picture_shows_names_as_they_are(tmp_path):
    name = r"$\nope$<script>"
    (tmp_path / name).mkdir()
    t, y = data(300)
    stored = zarr.create_array(tmp_path / name / "y", data=y)
    found = curve_fit(decay, t, stored, p0=[1, 1, 0], param_names=[name, "b", "$x$"])
    text = page(found)
    assert "<script" not in text and "nope$&lt;script&gt;/y" in text  # the table of stores
    (axes,) = (plots.correlation(found),)
    axes.figure.canvas.draw()
    assert [each.get_text() for each in axes.get_xticklabels()] == [name, "b", "$x$"]
    assert not any(each.get_parse_math() for each in (*axes.get_xticklabels(), *axes.get_yticklabels()))
    drawn = plots.maps(fit_map(decay, t, np.stack([y, y, y]), [1, 1, 0.1], param_names=[name, "b", "c"]))
    assert not drawn[0].title.get_parse_math()
    drawn[0].figure.savefig(tmp_path / "map.svg")


@pytest.mark.slow
def test_a_page_reads_the_data_once_and_names_the_store(tmp_path):
    t, y = data()
    stored, reads = counted(tmp_path / "y.zarr", y, (1000,))
    found = curve_fit(decay, t, stored, p0=[1, 1, 0], strategy="streaming")
    reads.clear()
    read = Page(found.report(tmp_path / "fit.html").read_text())
    assert set(reads.values()) == {1} and len(reads) == 30
    row = read.tables["Data"][1]
    assert row[:4] == ["ydata", "30000", "float64", "Dask, 30 of up to 1000"] and row[4].endswith("y.zarr")
    assert read.tables["Sweeps"][0][-1] == "GB/s"


def test_passwords_of_addresses_are_left_out():
    class Opened:
        shape, dtype, ndim, store_path = (3,), np.dtype(float), 1, "https://me:secret@host/data.zarr"

        def __getitem__(self, item):
            return np.zeros(3)[item]

    assert _places(da.from_array(Opened(), chunks=-1, asarray=False)) == ["https://host/data.zarr"]
    assert _places(np.zeros(3)) == []


@pytest.mark.slow
def test_a_report_is_there_as_a_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = tmp_path / "fit.html"
    path.write_text("what was there")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        found.report(path)
    assert path.read_text() == "what was there"
    monkeypatch.undo()
    found.report(str(path))
    assert path.read_text().startswith("<!doctype html>")
    with pytest.raises(FileNotFoundError, match=r"no directory .*none.* create it"):
        found.report(tmp_path / "none" / "fit.html")


def test_a_result_without_the_data_has_a_page_without_their_pictures(found):
    read = Page(page(pickle.loads(pickle.dumps(found))))
    assert len(read.sources) == 2 and "Data" not in read.tables
    assert [row[0] for row in read.tables["Parameters"][1:]] == list(NAMES)


def test_a_loaded_result_has_a_page_with_the_name_of_the_model(found, tmp_path):
    found.save(tmp_path / "fit")
    text = load(tmp_path / "fit").report(tmp_path / "fit.html").read_text()
    assert "<title>Fit of tests.test_report.decay</title>" in text


def test_bounds_and_what_lies_on_them_are_in_the_table():
    found = curve_fit(decay, *data(), p0=[1, 1, 1], bounds=([0, 0, 0.5], np.inf))
    rows = Page(page(found)).tables["Parameters"]
    assert rows[0][6:] == ["lower bound", "upper bound", ""]
    assert [row[6:] for row in rows[1:]] == [["0", "none", ""], ["0", "none", ""], ["0.5", "none", "at its lower bound"]]


@pytest.mark.slow
def test_models_without_source_and_many_sweeps_have_a_page():
    class Line:
        """Straight."""

        def __call__(self, x, a, b):
            return a + b * x

        def __repr__(self):
            return "Line()"

    t, y = data(300)
    found = curve_fit(Line(), t, y, p0=[1, 1])
    assert "Line()\n\nStraight." in Page(page(found)).preformatted
    many = replace(found, history=found.history * 40)
    assert f"<details><summary>{40 * len(found.history)} sweeps</summary>" in page(many)
    assert "<details>" not in page(found)


def test_missing_matplotlib_is_told_before_anything_is_read(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dask_nlsq\[plot\]"'):
        found.report(tmp_path / "fit.html")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_the_table_and_the_pictures_and_asks_nobody(found, tmp_path):
    path = found.report(tmp_path / "nlsq.html")
    with opened(path.as_uri(), tmp_path / "profile") as browser:
        wait(lambda: browser.value("document.readyState") == "complete", "the page did not load")
        pictures = "[...document.images].map(i => i.complete && i.naturalWidth > 200 && i.clientWidth > 200)"
        wait(lambda: browser.value(pictures) == [True] * 4, "the pictures did not load")
        assert browser.value("document.querySelector('table').innerText").count("\n") >= 3
        assert browser.value("document.querySelector('tr:nth-child(3) td').innerText") == NAMES[1]
        asked = browser.value("performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith("data:") for name in asked)
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_a_page_of_counts_says_deviance_and_has_no_row_for_what_does_not_exist():
    t, y = data(3000)
    found = curve_fit(decay, t, np.random.default_rng(0).poisson(20 * y), p0=[40, 1, 1], loss="poisson")
    text = page(found)
    statistics = dict(Page(text).tables["Statistics"])
    assert statistics["deviance"] == f"{found.chi_square:.6g}" and "reduced deviance" in statistics
    assert not {"chi-square", "R²", "RMSE", "points masked"} & statistics.keys() and "nan" not in statistics.values()
    assert "Residuals and what normal noise gives" in text


@pytest.mark.slow
def test_a_page_begins_with_pictures_of_the_data_one_for_each_coordinate_and_images():
    def surface(axes, a, b, c):
        frame, t = axes
        return decay(t, a, b, c) + 0 * frame

    t, y = data(300)
    found = curve_fit(surface, (np.arange(8)[:, None], t), np.broadcast_to(y, (8, 300)), p0=[1, 1, 0])
    text = page(found)
    places = [text.index(f"<h2>{each}") for each in ("Data and model", "Parameters", "Statistics", "Diagnostics")]
    assert places == sorted(places) and len(Page(text).sources) == 6
    assert len(Page(page(found, "t", "x")).sources) == 6  # the frames, which begin at 0, have a linear axis
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions[0] == "Means over the points of each bin: frame against t"
    assert [each.split("against ")[1] for each in captions[1:3]] == ["frame", "t"]


@pytest.mark.slow
def test_stores_are_named_by_their_whole_path_wherever_the_page_is_read(tmp_path, monkeypatch):
    t, y = data(300)
    monkeypatch.chdir(tmp_path)
    zarr.create_array("y.zarr", data=y)
    found = curve_fit(decay, t, "y.zarr", p0=[1, 1, 0])
    assert Page(page(found)).tables["Data"][1][4] == f"file://{tmp_path}/y.zarr"


def test_a_table_for_notebooks_has_heading_status_and_diagnostics(found):
    html = found._repr_html_()
    assert "<h4>Fit of decay</h4>" in html and "<strong>converged</strong>" in html
    assert f"<li>{found.diagnostics.lines[0].split(',')[0]}" in html
