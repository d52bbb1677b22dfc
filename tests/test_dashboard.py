import base64
import json
import logging
import os
import re
import shutil
import ssl
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, Security
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from dask_nlsq import curve_fit
from dask_nlsq.interface.live_page import FITS, _progress, _recent, _workers

from .clusters import at_sweep, command_line, local

N = 60_000
X = np.linspace(0, 10, N)
Y = 2 * np.exp(-0.5 * X) + 0.3 + np.random.default_rng(7).normal(0, 0.05, N)
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, p0=[5.0, 2.0, -1.0])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def data():
    return da.from_array(X, 4000), da.from_array(Y, 4000)


@pytest.fixture(scope="module")
def client():
    with local(1) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def get(client, path):
    """A page of the scheduler's dashboard."""
    info = client.scheduler_info(n_workers=-1)
    host = info["address"].split("//")[1].split(":")[0]
    with urllib.request.urlopen(f"http://{host}:{info['services']['dashboard']}/{path}") as answer:
        return answer.read().decode()


def fits(client):
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins["nlsq-page"].fits.values()))


@pytest.mark.hostile
def test_what_fits_tell_the_page_is_text():
    script = "<script>alert(1)</script>"
    fit = dict(model=script, n_points=3, strategy=script, names=[script], status=script, began=0.0, n_chunks=1, sweeps=[])
    for text in (
        _progress(fit, None),
        _recent([fit]),
        _workers(fit | dict(n_partitions=1, sweep_bytes=1), {script: (1, 1.0)}),
    ):
        assert "<script" not in text and "&lt;script&gt;" in text


def test_a_fit_brings_the_page_to_the_scheduler_once(client):
    with client.as_current():
        for _ in range(2):
            curve_fit(decay, *data(), **TIGHT)
    for page in ("nlsq", "individual-nlsq"):
        assert "bokeh.min.js" in get(client, page)
    assert "/individual-nlsq" in json.loads(get(client, "individual-plots.json")).values()
    assert client.run_on_scheduler(lambda dask_scheduler: [*dask_scheduler.plugins].count("nlsq-page")) == 1


def test_what_fits_tell_is_what_they_return(client):
    with client.as_current():
        found = curve_fit(decay, *data(), **TIGHT)
    fit = fits(client)[-1]
    assert (fit["model"], fit["names"], fit["n_points"], fit["n_chunks"]) == ("decay", ("a", "b", "c"), N, 15)
    assert [row["nfev"] for row in fit["sweeps"]] == [record.nfev for record in found.history]
    assert [row["cost"] for row in fit["sweeps"]] == [record.cost for record in found.history]
    np.testing.assert_array_equal(fit["sweeps"][-1]["params"], found.popt)
    np.testing.assert_allclose(fit["sweeps"][-1]["errors"], found.perr, rtol=1e-6)
    assert fit["status"] == found.message
    with client.as_current(), pytest.raises(RuntimeError, match="max_nfev"):
        curve_fit(decay, *data(), **TIGHT, max_nfev=2)
    assert "maximum number" in fits(client)[-1]["status"]


def test_the_page_knows_how_fast_each_worker_sweeps(client):
    with client.as_current():
        found = curve_fit(decay, *data(), **TIGHT)
    ((address, (n, seconds)),) = client.run_on_scheduler(
        lambda dask_scheduler: dask_scheduler.plugins["nlsq-page"].workers
    ).items()
    assert n == found.sweeps * found.plan.n_partitions and 0 < seconds < 60
    text = _workers(fits(client)[-1], {address: (4, 2.0)})
    per_piece = N / found.plan.n_partitions / 1e6
    assert address in text and f">{2 * per_piece:.3g}<" in text


def send(client, *messages):
    client.run_on_scheduler(lambda dask_scheduler: [dask_scheduler.log_event("nlsq", message) for message in messages])


def test_the_page_of_a_fit_stays_while_more_fits_begin_than_it_keeps(client):
    with client.as_current():
        others = at_sweep(2, lambda: [curve_fit(decay, *data(), p0=[2, 0.5, 0.3]) for _ in range(FITS + 1)])
        found = curve_fit(decay, *data(), **TIGHT, callback=others)
    assert "bokeh.min.js" in get(client, "nlsq")
    kept = fits(client)
    assert len(kept) == FITS
    assert [len(fit["sweeps"]) for fit in kept if fit.get("status") == found.message][-1] == found.nfev


def test_the_page_is_there_while_fifty_fits_run(client):
    def one(k):
        return curve_fit(decay, *data(), **TIGHT).popt

    patient = dask.config.set({"nlsq.worker-deadline": 60})  # without workers threads would wait for ever
    with patient, client.as_current(), ThreadPoolExecutor(50) as pool:
        running = [pool.submit(one, k) for k in range(50)]
        while not all(each.done() for each in running):
            assert "bokeh.min.js" in get(client, "nlsq")
            time.sleep(0.1)
    assert len({each.result().tobytes() for each in running}) == 1
    assert len(fits(client)) == FITS


def test_messages_that_no_fit_sends_change_nothing(client):
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT)
    before = fits(client)
    begun = dict(fit="x", names=["a"], p0=[1.0], n_points=1, n_chunks=1, n_partitions=0, sweep_bytes=8)
    begun |= dict(model="<script>alert(1)</script>" * 1000, strategy="<b>")
    swept = dict(fit="x", nfev=1, cost=1.0, distance=1.0, points_per_s=1.0, gb_per_s=1.0, params=[1.0], errors=[0.1])
    wrong = ["text", None, {}, {"fit": [1]}, {"fit": "y", "cost": 1.0}, {"fit": "y", "status": "ended"}]
    wrong += [begun | {name: bad} for name in begun for bad in (None, object(), [None], 10**5000)]
    wrong += [begun | dict(names=["a", "a"], p0=[1.0, 1.0]), begun | dict(names=["a", "b"])]
    send(client, *wrong)
    assert fits(client) == before
    send(client, begun, *(swept | {name: bad} for name in [*swept][1:] for bad in (None, "1", [1.0, 2.0])), {"fit": "x"})
    assert fits(client)[-1]["sweeps"] == []
    send(client, swept, dict(fit="x", names=["q", "r"]), dict(fit="x", status="<i>" * 1000))
    shown = fits(client)[-1]
    assert (len(shown["model"]), len(shown["status"]), shown["names"]) == (200, 200, ("a",))
    assert "bokeh.min.js" in get(client, "nlsq")
    page = [_progress(shown, None), _recent([shown]), _progress({**shown, "status": "<i>"}, None)]
    assert not any("<script" in text or "<i>" in text for text in page)


def test_the_page_can_be_turned_off(tmp_path):
    with local(1, processes=False) as cluster, Client(cluster) as client:
        with dask.config.set({"nlsq.dashboard": False}):
            curve_fit(decay, *data(), **TIGHT)
        assert "nlsq-page" not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))


def test_a_scheduler_without_a_dashboard_costs_a_line_in_the_log(caplog):
    silent = local(1, processes=False, dashboard_address=None)
    with silent as cluster, Client(cluster), caplog.at_level(logging.WARNING, "dask_nlsq"):
        curve_fit(decay, *data(), **TIGHT)
        curve_fit(decay, *data(), **TIGHT)
    assert len([record for record in caplog.records if "no live page" in record.message]) == 1


def test_the_preload_lists_the_page_before_any_fit(tmp_path):
    with command_line(tmp_path, 1, "--preload", "dask_nlsq.dashboard") as (client, _, _):
        assert "/individual-nlsq" in json.loads(get(client, "individual-plots.json")).values()
        assert "bokeh.min.js" in get(client, "nlsq")
        with client.as_current():
            curve_fit(decay, *data(), **TIGHT)
        assert len(fits(client)) == 1


def test_a_cluster_secured_by_tls_gives_the_same_bits_and_the_page_by_https(client, tmp_path):
    security = Security.temporary()
    (tmp_path / "pem").write_text(security.tls_scheduler_key + security.tls_scheduler_cert)
    files = {f"distributed.scheduler.dashboard.tls.{name}": str(tmp_path / "pem") for name in ("ca-file", "cert", "key")}
    with client.as_current():
        plain = curve_fit(decay, *data(), **TIGHT)
    with dask.config.set(files), local(1, protocol="tls://", security=security) as cluster, Client(cluster) as secured:
        assert secured.scheduler.address.startswith("tls://")
        found = curve_fit(decay, *data(), **TIGHT)
        port = secured.scheduler_info(n_workers=-1)["services"]["dashboard"]
        unsigned = ssl._create_unverified_context()  # nobody but this cluster has signed the certificate
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/nlsq", context=unsigned) as answer:
            assert "bokeh.min.js" in answer.read().decode()
        assert fits(secured)[-1]["status"] == found.message
    assert found.strategy == plain.strategy == "chunked"
    np.testing.assert_array_equal(found.popt, plain.popt)
    np.testing.assert_array_equal(found.pcov, plain.pcov)


def test_report_keeps_what_dask_saw(client, tmp_path):
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT, performance_report=tmp_path / "fit.html")
        assert "nlsq-sweep" in (tmp_path / "fit.html").read_text()
    with pytest.raises(ValueError, match="needs a Client"):
        curve_fit(decay, X, Y, performance_report=tmp_path / "none.html")


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_time_in_jax_is_metered_apart_from_reading_in_a_span_per_fit_and_sweep(client, strategy):
    def new_model(x, a, b, c):  # so that a worker has to compile it
        return a * jnp.exp(-b * x) + c + 0 * len(strategy)

    with client.as_current():
        found = curve_fit(new_model, *data(), **TIGHT, strategy=strategy)

    def metered(dask_scheduler):
        spans = dask_scheduler.extensions["spans"].spans.values()
        last = [span for span in spans if span.name == ("nlsq",)][-1]
        metrics = last.cumulative_worker_metrics
        return {key[:3] for key, value in metrics.items() if value > 0 and key[3:] == ("seconds",)}, [
            c.name for c in last.children
        ]

    read = "nlsq-load" if strategy == "chunked" else "nlsq-sweep"
    wanted = {("execute", read, "nlsq-read")} | {("execute", "nlsq-sweep", f"jax-{what}") for what in ("compile", "execute")}
    for _ in range(50):  # heartbeats bring them
        metrics, spans = client.run_on_scheduler(metered)
        if wanted <= metrics:
            break
        time.sleep(0.1)
    assert wanted <= metrics
    assert spans.count(("nlsq", "nlsq-load")) == 1
    assert spans.count(("nlsq", "nlsq-sweep")) == found.sweeps


def test_tasks_have_the_names_of_what_they_do(client, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.align.JOINED_POINTS", 1)  # 15 chunks are enough to draw a sample
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT)
        curve_fit(decay, *data(), **TIGHT, strategy="streaming")
    prefixes = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    ours = {prefix for prefix in prefixes if "nlsq" in prefix}
    assert ours == {"nlsq-load", "nlsq-sweep", "nlsq-census", "nlsq-draw-points"}


class Browser:
    """A page in a headless Chromium, spoken to by its debugging protocol."""

    def __init__(self, loop, socket):
        self.loop, self.socket, self.count = loop, socket, 0

    def send(self, method, **params):
        self.count += 1

        async def ask():
            await self.socket.write_message(json.dumps(dict(id=self.count, method=method, params=params)))
            while (answer := json.loads(await self.socket.read_message())).get("id") != self.count:
                pass
            return answer["result"]

        return self.loop.run_sync(ask, timeout=30)

    def value(self, expression):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def opened(url, profile):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *options, "--window-size=1100,900", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = IOLoop(make_current=False)
    try:
        port = profile / "DevToolsActivePort"
        wait(lambda: port.exists() and port.read_text(), "the browser did not start")
        pages = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"

        def page():
            with urllib.request.urlopen(pages) as answer:
                return [each for each in json.loads(answer.read()) if each["type"] == "page" and "nlsq" in each["url"]]

        wait(page, "the browser opened no page")
        address = page()[0]["webSocketDebuggerUrl"]
        socket = loop.run_sync(lambda: websocket_connect(address, max_message_size=2**26))
        yield Browser(loop, socket)
        loop.run_sync(socket.close)
    finally:
        process.kill()
        process.wait()
        loop.close()


def take_picture(browser):
    """Of the page while a longer fit runs, for the README."""

    def peak(x, height, center, width, background, slope):
        return height * jnp.exp(-0.5 * ((x - center) / width) ** 2) + background + slope * x

    def callback(record):
        if record.nfev == 6:
            time.sleep(2)
            picture = browser.send("Page.captureScreenshot", format="png")["data"]
            with open(os.environ["NLSQ_PICTURE"], "wb") as file:
                file.write(base64.b64decode(picture))

    x = da.linspace(0, 10, 2 * 10**7, chunks=10**6)
    y = 3 * da.exp(-0.5 * ((x - 5.2) / 0.4) ** 2) + 1 + 0.1 * x
    y += da.random.default_rng(1).normal(0, 1, x.shape, chunks=x.chunks)
    curve_fit(peak, x, y, p0=[2, 5, 0.5, 1.2, 0.08], gtol=0.0, ftol=0.0, xtol=0.0, callback=callback)


def wait(condition, message, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, message
        time.sleep(0.1)
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_curves_move_in_a_browser_while_a_fit_runs(client, tmp_path):
    lengths = []
    n_shown = "Bokeh.documents[0].get_model_by_name('nlsq_sweeps').data.sweep.length"
    text = "Bokeh.documents[0].get_model_by_name('nlsq_progress').text"
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT)  # brings the page
        port = re.search(r":(\d+)/", client.dashboard_link).group(1)
        with opened(f"http://127.0.0.1:{port}/nlsq", tmp_path / "profile") as browser:
            wait(lambda: browser.value(n_shown), "the page shows no fit")

            def callback(record):
                wait(lambda: browser.value(n_shown) == record.nfev, "the curve does not grow")
                lengths.append(browser.value(n_shown))
                assert "decay" in browser.value(text)

            found = curve_fit(decay, *data(), **TIGHT, callback=callback)
            wait(lambda: "Converged" in browser.value(text), "the page does not say that the fit has ended")
            if "NLSQ_PICTURE" in os.environ:
                take_picture(browser)
    assert lengths == list(range(1, found.nfev + 1))
