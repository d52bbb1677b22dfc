"""Data as the programs of the field write and serve them: NeXus files, HyperSpy's .zspy, a Tiled server."""

import shutil
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from dask_nlsq import curve_fit, fit_map

ENERGY = np.linspace(7.0, 8.5, 76)
TRUTH = np.array([60.0, 7.8, 0.1, 5.0])
P0 = [40.0, 7.7, 0.2, 2.0]


def peak(energy, height, center, width, base):
    return height * jnp.exp(-(((energy - center) / width) ** 2) / 2) + base


COUNTS = np.random.default_rng(0).poisson(peak(ENERGY, *TRUTH), (40, 76)).astype("u2")


def assert_true(fit):
    assert np.all(np.abs(fit.popt - TRUTH) < 4 * fit.perr)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["standard", "streaming"])
def test_a_virtual_data_set_over_several_files_is_fitted_as_one(strategy, tmp_path):
    layout = h5py.VirtualLayout((40, 76), "u2")
    for k in range(4):
        with h5py.File(tmp_path / f"run-{k}.h5", "w") as file:
            file.create_dataset("entry/data/counts", data=COUNTS[10 * k : 10 * k + 10], chunks=(5, 76), compression="gzip")
        layout[10 * k : 10 * k + 10] = h5py.VirtualSource(f"run-{k}.h5", "entry/data/counts", (10, 76))
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file.create_virtual_dataset("entry/data/counts", layout)
    with h5py.File(tmp_path / "master.h5") as file:
        found = curve_fit(peak, ENERGY, file["entry/data/counts"], P0, loss="poisson", strategy=strategy)
    expected = curve_fit(peak, ENERGY, COUNTS, P0, loss="poisson", mask_values=[2**16 - 1])
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)
    assert_true(found)


@pytest.mark.slow
def test_a_file_that_hyperspy_has_written_is_fitted_pixel_by_pixel(tmp_path):
    """`files/hyperspy.zspy.zip` was saved as a directory by HyperSpy 2.5.0, RosettaSciIO 0.15.0 and Zarr 2.18.7."""
    shutil.unpack_archive(Path(__file__).parent / "files" / "hyperspy.zspy.zip", tmp_path / "map.zspy")
    signal = zarr.open_group(tmp_path / "map.zspy", mode="r")["Experiments/Cu K map"]
    axes = [signal[f"axis-{k}"].attrs for k in range(signal["data"].ndim)]
    energy = axes[2]["offset"] + axes[2]["scale"] * np.arange(axes[2]["size"])
    assert [(axis["name"], axis["units"], axis["navigate"]) for axis in axes] == [
        ("y", "um", True),
        ("x", "um", True),
        ("Energy", "keV", False),
    ]
    np.testing.assert_allclose(energy, ENERGY)
    for data in (signal["data"], str(tmp_path / "map.zspy/Experiments/Cu K map/data")):
        fits = fit_map(peak, energy, data, P0, loss="poisson").compute()
        assert fits.popt.shape == (4, 6, 4)
        assert np.max(np.abs((fits.popt - TRUTH) / fits.perr)) < 4.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A container of a Tiled server in this process."""
    pytest.importorskip("tiled.server", reason='needs Tiled: pip install "tiled[all]"')
    from tiled.catalog import in_memory
    from tiled.client import Context, from_context
    from tiled.server.app import build_app

    app = build_app(in_memory(writable_storage=str(tmp_path_factory.mktemp("tiled"))))
    with Context.from_app(app) as context:
        yield from_context(context).create_container("run")


@pytest.mark.filterwarnings("ignore")  # of Tiled and what it imports
@pytest.mark.parametrize("strategy", ["standard", "streaming"])
def test_arrays_of_a_tiled_server_are_fitted_chunk_by_chunk(run, strategy):
    import dask.array as da

    counts = run.write_array(da.from_array(COUNTS, chunks=(10, 76)), key=f"counts-{strategy}")
    energy = run.write_array(ENERGY, key=f"energy-{strategy}")
    found = curve_fit(peak, energy, counts, P0, loss="poisson", strategy=strategy)
    assert "in 4 chunks" in str(found.plan)
    assert_true(found)
    np.testing.assert_allclose(found.popt, curve_fit(peak, ENERGY, COUNTS, P0, loss="poisson").popt, rtol=1e-9)
    fits = fit_map(peak, energy, counts, P0, loss="poisson").compute()
    assert np.max(np.abs((fits.popt - TRUTH) / fits.perr)) < 4.5
