"""The live page in each of its states, in a real browser: for its test, and for the pictures in the documentation.

``python -m tests.live_page`` writes ``docs/live-*.png``. Without a Chromium it says so, and leaves those that are there.
"""

import logging
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from unittest.mock import patch

import dask.array as da
import jax.numpy as jnp
import numpy as np
from distributed import Client

from dask_nlsq import cluster_report, curve_fit, fit_groups, fit_map
from dask_nlsq.watch import progress

from .browser import CHROMIUM, opened, wait
from .clusters import local

DOCS = Path(__file__).parent.parent / "docs"
STATES = ["before", "compiling", "loading", "page", "finished", "map", "groups", "failed"]
PART = "window.Bokeh?.documents[0]?.get_model_by_name('%s')?.%s"
E = np.linspace(9, 11, 1000)  # keV
STOP = dict(ftol=0.0, xtol=0.0, gtol=0.0, accuracy=1e-6)


def spectrum(energy, amplitude, center, width, background, background_slope):
    peak = jnp.exp(-0.5 * ((energy - center) / width) ** 2)
    return amplitude * peak + background + background_slope * (energy - 10)


def quadrature(energy, amplitude, center, width, background, background_slope):
    """As nobody should write it: each node of the integral is compiled by itself."""
    total = 0.0
    for node, weight in zip(*np.polynomial.hermite.hermgauss(40), strict=True):
        total = total + weight * jnp.exp(-0.5 * ((energy - center - 0.01 * node) / width) ** 2)
    return amplitude * total / np.sqrt(np.pi) + background + background_slope * (energy - 10)


def undefined(energy, amplitude, center, width, background, background_slope):
    return spectrum(energy, amplitude, center, width, background, background_slope) * jnp.log(width - 1)


TRUTH = dict(amplitude=420.0, center=9.8423, width=0.071, background=31.5, background_slope=-2.4)
START = dict(amplitude=150.0, center=9.8, width=0.1, background=20.0, background_slope=0.0)


def scan(n, chunk, seconds):
    """Counts of ``n`` spectra, whose chunks of ``chunk`` take some time to be read."""

    def read(block):
        time.sleep(seconds)
        return block

    rng, truth = np.random.default_rng(1), np.asarray(spectrum(E, **TRUTH))
    scales = rng.uniform(0.5, 1.5, (n, 1))
    y = rng.poisson(truth * scales).astype("u2")
    y[: n // 20] = 0  # dead pixels
    return da.from_array(y, (chunk, -1)).map_blocks(read)


def states(client, browser):
    """Brings the page into one state after the other: its name, and the pixels that its picture has from the top on."""

    running = []

    def begun(*args, **options):
        running.append(pool.submit(copy_context().run, *args, **options))  # with the client
        return running[-1]

    def shows(pattern):
        def seen():
            for fit in running:
                if fit.done() and not isinstance(fit.exception(), ValueError):
                    fit.result()  # raises
            return re.search(pattern, text(browser, "nlsq_progress") or "")

        wait(seen, lambda: f"{pattern} is not in {text(browser, 'nlsq_progress')}", 60)

    def settled():
        time.sleep(1.2)  # until what has come is drawn

    with client.as_current(), ThreadPoolExecutor(1) as pool:
        shows("No fit yet")
        yield "before", 130
        with patch.object(progress, "SLOW", 0.3):
            fit = begun(curve_fit, quadrature, E, scan(40, 2, 0.0), START)
            shows("compiling the model, ")
            yield "compiling", 220
            fit.result()
        fit = begun(curve_fit, spectrum, E, scan(40, 2, 0.4), START)
        shows(r"loading: [1-9]\d* of 20")
        assert browser.value(PART % ("nlsq_sweeps", "data.sweep.length")) == 0
        yield "loading", 260
        fit.result()
        fit = begun(curve_fit, spectrum, E, scan(200, 10, 0.2), START, strategy="streaming", **STOP)
        shows(r"sweep [4-9]: \d+ of 20, .* to go")
        yield "page", 760
        fit.result()
        shows(r"converged: .*; \d+ sweeps in [\d.]+ s, after [\d.]+ s of preparation")
        settled()
        yield "finished", 800
        fits = fit_map(spectrum, E, scan(600, 10, 0.4), START)
        fit = begun(fits.compute)
        shows(r"fits of blocks: [1-9]\d* of 60, \d+ s to go; \d+ of 600 pixels, \d+ per second")
        yield "map", 330
        fit.result()
        shows(r"done: \d+ of 600 pixels")
        p0, own = dict(local=["amplitude", "background"], group_axes=0), dict(strategy="streaming", **STOP)
        fit = begun(fit_groups, spectrum, E, scan(200, 10, 0.05), START, **p0, **own)
        shows(r"sweep [3-9]: \d+ of 20.*groups per second")
        settled()
        wait(lambda: "9.84" in text(browser, "nlsq_params"), "the table of parameters stands still")
        yield "groups", 800
        fit.result()
        fit = begun(curve_fit, undefined, E, scan(40, 2, 0.0), START)
        shows("failed: ValueError")
        settled()
        assert isinstance(fit.exception(), ValueError)
        yield "failed", 360


def text(browser, name):
    return browser.value(PART % (name, "text"))


def main():
    if CHROMIUM is None:
        print("no Chromium here (apt-get install chromium): docs/live-*.png stay as they are")
        return
    logging.getLogger("dask_nlsq").setLevel(logging.ERROR)
    with (
        local(1, threads_per_worker=4) as cluster,
        Client(cluster, set_as_default=False) as client,
        tempfile.TemporaryDirectory() as profile,
    ):
        page = cluster_report(client).page
        with opened(page, Path(profile) / "profile") as browser:
            for name, height in states(client, browser):
                path = DOCS / f"live-{name}.png"
                path.write_bytes(browser.picture(height))
                print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
