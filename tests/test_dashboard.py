import json
import logging
import ssl
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest
from distributed import Client, Security

from dask_nlsq import cluster_report, curve_fit, fit_groups, fit_map
from dask_nlsq.watch.live_page import FITS, LONGEST, LivePage, _curves, _progress, _recent, _state, _values, _workers

from .browser import CHROMIUM, opened, wait
from .clusters import at_sweep, command_line, local
from .live_page import PART, STATES, states

N = 60_000
X = np.linspace(0, 10, N)
Y = 2 * np.exp(-0.5 * X) + 0.3 + np.random.default_rng(7).normal(0, 0.05, N)
TIGHT = dict(ftol=0.0, xtol=0.0, gtol=0.0, p0=[5.0, 2.0, -1.0])


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


def begun(**changed):
    """The first message of a fit."""
    sizes = dict(n_points=1, n_chunks=1, n_partitions=1, n_fits=0, accuracy=0.01)
    return dict(what="curve_fit", client="", model="line", names=("a",), strategy="", **sizes) | changed


@pytest.mark.hostile
def test_what_fits_tell_the_page_is_text():
    script = "<script>alert(1)</script>"
    fit = begun(model=script, strategy=script, names=(script,), what=script) | dict(status=script, began=0.0, sweeps=[])
    for text in (
        _progress(fit),
        _recent([fit]),
        _values(fit | dict(sweeps=[dict(params=[1.0], errors=[0.1])])),
        _workers(fit, {script: (1, 1.0)}),
    ):
        assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.slow
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
    assert fit["status"] == f"converged: {found.message}" and fit["n_sweeps"] == found.sweeps
    assert (fit["load"], fit["solve"]) == tuple(found.seconds.values())
    with client.as_current(), pytest.raises(RuntimeError, match="max_nfev"):
        curve_fit(decay, *data(), **TIGHT, max_nfev=2)
    assert "NOT CONVERGED: The maximum number" in fits(client)[-1]["status"]


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
    fit = fits(client)[-1]
    speed = fit["sweeps"][-1]["points_per_s"]
    running = {name: value for name, value in fit.items() if name != "status"}
    assert f"{speed:.3g} million points per second" in _state(running) and "B per second" not in _state(running) + text


def send(client, *messages):
    client.run_on_scheduler(lambda dask_scheduler: [dask_scheduler.log_event("nlsq", message) for message in messages])


@pytest.mark.slow
def test_the_page_of_a_fit_stays_while_more_fits_begin_than_it_keeps(client):
    with client.as_current():
        others = at_sweep(2, lambda: [curve_fit(decay, *data(), p0=[2, 0.5, 0.3]) for _ in range(FITS + 1)])
        found = curve_fit(decay, *data(), **TIGHT, callback=others)
    assert "bokeh.min.js" in get(client, "nlsq")
    kept = fits(client)
    assert len(kept) == FITS
    assert [len(fit["sweeps"]) for fit in kept if fit.get("status") == f"converged: {found.message}"][-1] == found.nfev


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_the_page_is_there_while_many_fits_run(n, client):
    def one(k):
        found = curve_fit(decay, *data(), p0=[2, 0.5, 0.3])
        assert found.strategy == "chunked"
        return found.popt

    patient = dask.config.set({"nlsq.worker-deadline": 60})  # without workers threads would wait for ever
    with patient, client.as_current(), ThreadPoolExecutor(n) as pool:
        running = [pool.submit(copy_context().run, one, k) for k in range(n)]
        while not all(each.done() for each in running):
            assert "bokeh.min.js" in get(client, "nlsq")
            time.sleep(0.1)
    assert len({each.result().tobytes() for each in running}) == 1
    assert FITS >= len(fits(client)) >= min(n, FITS)


def test_messages_that_no_fit_sends_change_nothing(client):
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT)
    before = fits(client)
    first = begun(fit="x", model="<script>alert(1)</script>" * 1000, strategy="<b>")
    swept = dict(fit="x", nfev=1, n_sweeps=1, failed=0, cost=1.0, distance=1.0, points_per_s=1.0)
    swept |= dict(params=[1.0], errors=[0.1])
    wrong = ["text", None, {}, {"fit": [1]}, {"fit": "y", "cost": 1.0}, {"fit": "y", "status": "ended"}]
    wrong += [first | {name: bad} for name in first for bad in (None, object(), [None], 10**5000)]
    wrong += [first | dict(names=["a", "a"])]
    send(client, *wrong)
    assert repr(fits(client)) == repr(before)  # of which nan are
    send(client, first, *(swept | {name: bad} for name in [*swept][1:] for bad in (None, "1", [1.0, 2.0])), {"fit": "x"})
    assert fits(client)[-1]["sweeps"] == []
    send(client, swept, dict(fit="x", names=["q", "r"]), dict(fit="x", status="<i>" * 1000))
    shown = fits(client)[-1]
    assert (len(shown["model"]), len(shown["status"]), shown["names"]) == (LONGEST, LONGEST, ("a",))
    assert "bokeh.min.js" in get(client, "nlsq")
    page = [_progress(shown), _recent([shown]), _progress({**shown, "status": "<i>"})]
    assert not any("<script" in text or "<i>" in text for text in page)


def test_the_newest_fit_that_runs_is_shown_and_all_others_in_the_table():
    live = LivePage()
    for number, name in enumerate(["first", "second", "third"]):
        live.log_event("nlsq", begun(fit=name, model=name, client=f"client-{number}"))
    live.log_event("nlsq", dict(fit="third", status="converged: it is"))
    live.log_event("nlsq", dict(fit="first", stage="sweep 4", done=7, total=20, left=12.0, so_far=9.0))
    assert live.shown[0] == "second"
    assert "sweep 4: 7 of 20, 12 s to go" in _recent(live.fits.values())
    live.remove_client(None, "client-1")
    assert live.shown[0] == "first" and live.fits["second"]["status"].startswith("lost")
    assert "width: 35.0%" in _progress(live.fits["first"])


def test_costs_are_drawn_above_the_lowest_and_distances_with_the_accuracy():
    row = dict(points_per_s=1.0, distance=3.0)
    found = _curves(begun() | dict(sweeps=[row | dict(nfev=k, cost=cost) for k, cost in enumerate([5.0, 2.0, 2.0])]))
    np.testing.assert_array_equal(found["above"], [3.0, np.nan, np.nan])
    assert (found["sweep"], found["distance"], found["accuracy"]) == ([0, 1, 2], [3.0] * 3, [0.01] * 3)
    assert _curves(begun() | dict(sweeps=[])) == {name: [] for name in found}


def test_what_is_slow_to_begin_says_for_how_long_it_has_been_begun():
    fit = begun() | dict(sweeps=[], stage="sweep 1", done=0, total=20, left=np.nan)
    assert _state(fit | dict(so_far=1.0)) == "sweep 1: 0 of 20"
    assert _state(fit | dict(so_far=12.0)) == "sweep 1: 0 of 20, 12 s so far"
    assert _state(fit | dict(so_far=1000.0)) == "sweep 1: 0 of 20, 17 min so far"


@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_no_sweep_on_the_page_is_faster_than_the_clock(client, strategy):
    walls = []
    with client.as_current():
        found = curve_fit(decay, *data(), strategy=strategy, callback=lambda record: walls.append(time.perf_counter()))
    rows = fits(client)[-1]["sweeps"]
    speeds = np.array([row["points_per_s"] for row in rows]) * 1e6
    took = N / speeds
    assert np.all(took > 0) and took.sum() <= found.seconds["solve"]
    assert np.all(took[1:] <= np.diff(walls))
    assert [row["n_sweeps"] for row in rows][-1] == found.sweeps


@pytest.mark.slow
def test_a_map_is_on_the_page_with_its_blocks_and_the_pixels_that_failed(tmp_path):
    y = np.random.default_rng(1).normal(1, 0.1, (6, 50)) * np.exp(-np.linspace(0, 5, 50))
    y[0] = -1e300  # which nothing fits
    maps = fit_map(decay, np.linspace(0, 5, 50), da.from_array(y, (2, -1)), [1, 1, 0])
    with local(1, processes=False) as cluster, Client(cluster) as client:
        found = maps.compute()
        maps.to_zarr(tmp_path / "maps")
        told = fits(client)
    n_failed = int(np.sum(~found.success))
    for fit in told:
        assert (fit["done"], fit["fitted"], fit["failed"]) == (fit["n_chunks"], 6, n_failed)
        n = fit["n_chunks"]
        assert (fit["what"], fit["n_fits"], fit["model"], fit["n_points"]) == ("fit_map", 6, "decay", 300)
        assert fit["status"] == f"done: {6 - n_failed} of 6 pixels without a failure" and n == len(maps.problem.places)
        assert "fit_map: 6 pixels, 300 points" in _progress(fit)


@pytest.mark.slow
def test_the_maps_of_a_grouped_fit_are_not_shown_in_its_place(client):
    t = np.linspace(0, 5, 50)
    y = np.arange(1, 7)[:, None] * np.exp(-0.7 * t) + np.random.default_rng(1).normal(0, 0.01, (6, 50))
    with client.as_current():
        result = fit_groups(decay, t, da.from_array(y, (3, -1)), [1, 1, 0], local="a", group_axes=0)
        result.local.compute()
    fit = fits(client)[-1]
    assert fit["what"] == "maps of groups" and fit["status"] == "done: 6 of 6 groups without a failure"
    assert "maps of groups: 6 groups, 300 points in 2 blocks" in _progress(fit)
    shown = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["nlsq-page"].shown)
    assert shown[1]["what"] == "fit_groups"


def test_the_cluster_report_opens_the_page_before_any_fit_and_it_can_be_turned_off():
    with local(1, processes=False) as cluster, Client(cluster) as client:
        with dask.config.set({"nlsq.dashboard": False}):
            curve_fit(decay, *data(), **TIGHT)
            assert cluster_report(client).page is None
        assert "nlsq-page" not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))
        report = cluster_report(client)
        assert report.page.endswith("/nlsq") and report.page in repr(report)
        with urllib.request.urlopen(report.page) as answer:
            assert "bokeh.min.js" in answer.read().decode()


def test_a_scheduler_without_a_dashboard_costs_a_line_in_the_log(caplog):
    silent = local(1, processes=False, dashboard_address=None)
    with silent as cluster, Client(cluster), caplog.at_level(logging.WARNING, "dask_nlsq"):
        curve_fit(decay, *data(), **TIGHT)
        curve_fit(decay, *data(), **TIGHT)
    assert len([record for record in caplog.records if "no live page" in record.message]) == 1


@pytest.mark.slow
def test_the_preload_lists_the_page_before_any_fit(tmp_path):
    with command_line(tmp_path, 1, "--preload", "dask_nlsq.dashboard") as (client, _, _):
        assert "/individual-nlsq" in json.loads(get(client, "individual-plots.json")).values()
        assert "bokeh.min.js" in get(client, "nlsq")
        with client.as_current():
            curve_fit(decay, *data(), **TIGHT)
        assert len(fits(client)) == 1


@pytest.mark.slow
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
        assert fits(secured)[-1]["status"] == f"converged: {found.message}"
    assert found.strategy == plain.strategy == "chunked"
    np.testing.assert_array_equal(found.popt, plain.popt)
    np.testing.assert_array_equal(found.pcov, plain.pcov)


def test_report_keeps_what_dask_saw(client, tmp_path):
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT, performance_report=tmp_path / "fit.html")
        assert "nlsq-sweep" in (tmp_path / "fit.html").read_text()
    with pytest.raises(ValueError, match="needs a Client"):
        curve_fit(decay, X, Y, performance_report=tmp_path / "none.html")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["chunked", "streaming"])
def test_time_in_jax_is_metered_apart_from_reading_in_spans_that_all_fits_share(client, strategy):
    def new_model(x, a, b, c):  # so that a worker has to compile it
        return a * jnp.exp(-b * x) + c + 0 * len(strategy)

    with client.as_current():
        for _ in range(2):
            curve_fit(new_model, *data(), **TIGHT, strategy=strategy)

    def metered(dask_scheduler):
        spans = dask_scheduler.extensions["spans"].spans.values()
        (ours,) = [span for span in spans if span.name == ("nlsq",)]
        metrics = ours.cumulative_worker_metrics
        return {key[:3] for key, value in metrics.items() if value > 0 and key[3:] == ("seconds",)}, [
            c.name for c in ours.children
        ]

    read = "nlsq-load" if strategy == "chunked" else "nlsq-sweep"
    wanted = {("execute", read, "nlsq-read")} | {("execute", "nlsq-sweep", f"jax-{what}") for what in ("compile", "execute")}
    for _ in range(50):  # heartbeats bring them
        metrics, spans = client.run_on_scheduler(metered)
        if wanted <= metrics:
            break
        time.sleep(0.1)
    assert wanted <= metrics
    assert len({*spans}) == len(spans) and ("nlsq", "nlsq-sweep") in spans


@pytest.mark.slow
def test_tasks_have_the_names_of_what_they_do(client, monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)  # 15 chunks are enough to draw a sample
    with client.as_current():
        curve_fit(decay, *data(), **TIGHT)
        curve_fit(decay, *data(), **TIGHT, strategy="streaming")
    prefixes = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    ours = {prefix for prefix in prefixes if "nlsq" in prefix}
    of_others = {"nlsq-map", "nlsq-sweep-groups", "array-nlsq-checked-nlsq-map"}  # fits that other tests have made there
    assert ours - of_others == {"nlsq-load", "nlsq-sweep", "nlsq-census", "nlsq-draw-points"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.slow
def test_a_browser_shows_each_state_of_each_kind_of_fit(tmp_path):
    with (
        local(1, threads_per_worker=4) as cluster,
        Client(cluster, set_as_default=False) as client,
        opened(cluster_report(client).page, tmp_path / "profile") as browser,
    ):
        assert [name for name, _ in states(client, browser)] == STATES


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_curves_move_in_a_browser_while_a_fit_runs(client, tmp_path):
    lengths = []
    n_shown, text = (PART % each for each in (("nlsq_sweeps", "data.sweep.length"), ("nlsq_progress", "text")))
    with client.as_current(), opened(cluster_report(client).page, tmp_path / "profile") as browser:

        def callback(record):
            wait(lambda: browser.value(n_shown) == record.nfev, "the curve does not grow")
            lengths.append(browser.value(n_shown))
            assert "decay" in browser.value(text)

        found = curve_fit(decay, *data(), **TIGHT, callback=callback)
        wait(lambda: "Converged" in browser.value(text), "the page does not say that the fit has ended")
    assert lengths == list(range(1, found.nfev + 1))
