"""The pictures of docs/gallery.md, from simulated data: ``python -m benchmarks.gallery``, which `make docs` runs."""

from pathlib import Path

import dask.array as da
import jax.numpy as jnp
import matplotlib
import numpy as np
import xarray
from PIL import Image

import dask_nlsq
from dask_nlsq import plots

matplotlib.use("Agg")
PLACE = Path(__file__).parents[1] / "docs" / "gallery"
DPI = 80


def relaxation(t, amplitude, rate, base):
    return amplitude * jnp.exp(-rate * t) + base


def spheres(q, radius, scale, background):
    u = q * radius
    return scale * (3 * (jnp.sin(u) - u * jnp.cos(u)) / u**3) ** 2 + background


def spot(x, height, row, column, width, base):
    r, c = x
    return height * jnp.exp(-0.5 * ((r - row) ** 2 + (c - column) ** 2) / width**2) + base


def line_profile(energy, height, center, width, base):
    return height * jnp.exp(-0.5 * ((energy - center) / width) ** 2) + base


def fit_of_a_decay(rng):
    t = np.linspace(0, 10, 50_000)
    y = xarray.DataArray(
        2 * np.exp(-0.5 * t) + 0.3 + rng.normal(0, 0.1, t.size),
        dims="delay",
        coords={"delay": ("delay", t, {"units": "ns"})},
        name="signal",
        attrs={"units": "mV"},
    )
    return dask_nlsq.curve_fit(relaxation, "delay", y, p0=[1, 1, 0]).plot(residuals=True)[0]


def scattering(rng):
    q = np.geomspace(0.003, 0.2, 1500)
    counts = rng.poisson(spheres(q, 80.0, 2e5, 3.0))
    y = xarray.DataArray(counts, dims="q", coords={"q": ("q", q, {"units": "1/angstrom"})}, name="counts")
    return dask_nlsq.curve_fit(spheres, "q", y, p0=[78, 1e5, 1], loss="poisson").plot()


def image(rng):
    row, column = np.arange(400)[:, None], np.arange(500)
    mean = spot((row, column), 40.0, 190.0, 260.0, 60.0, 4.0)
    counts = da.from_array(rng.poisson(mean), chunks=(100, 250))
    mask = np.zeros((400, 500), bool)
    mask[:, 120:130] = True
    start = dict(height=20, row=200, column=250, width=40, base=1)
    result = dask_nlsq.curve_fit(spot, (row, column), counts, start, loss="poisson", mask=mask)
    return plots.images(result)[0]


def few_points():
    t = np.linspace(0, 5, 30)
    y = 2 * np.exp(-0.7 * t) + 0.3 + 0.15 * np.random.default_rng(0).normal(size=30)
    return dask_nlsq.curve_fit(relaxation, t, y, p0=[1, 1, 0])


def map_of_lines(rng):
    energy = np.linspace(7100, 7160, 80)
    y, x = np.meshgrid(np.linspace(0, 24, 60), np.linspace(0, 40, 100), indexing="ij")
    center = 7128 + 4 * np.sin(x / 9) * np.cos(y / 7)
    height = 30 + 60 * np.exp(-(((x - 25) / 8) ** 2) - ((y - 12) / 6) ** 2)
    counts = rng.poisson(line_profile(energy, height[..., None], center[..., None], 5.0, 3.0))
    data = xarray.DataArray(
        counts,
        dims=("y", "x", "energy"),
        coords={
            "y": ("y", y[:, 0], {"units": "um"}),
            "x": ("x", x[0], {"units": "um"}),
            "energy": ("energy", energy, {"units": "eV"}),
        },
        name="counts",
    )
    start = dict(height=50, center=7130, width=4, base=1)
    return dask_nlsq.fit_map(line_profile, "energy", data, start, axis="energy", loss="poisson").compute()


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    few, fits = few_points(), map_of_lines(rng)
    pictures = {
        "fit": fit_of_a_decay(rng),
        "scattering": scattering(rng),
        "image": image(rng),
        "profile": few.profile("rate", [0.68, 0.95]).plot(),
        "contour": few.contour("rate", "base").plot(),
        "map": np.ravel(fits.plot(names=["height", "center"]))[0],
        "spectrum": np.ravel(fits.spectrum(x=25.0, y=12.0).plot())[0],
    }
    for name, axes in pictures.items():
        axes.figure.savefig(PLACE / f"{name}.png", dpi=DPI, metadata={"Software": None})
        Image.open(PLACE / f"{name}.png").convert("RGB").quantize(96).save(PLACE / f"{name}.png", optimize=True)
        print(f"{name}.png: {(PLACE / f'{name}.png').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
