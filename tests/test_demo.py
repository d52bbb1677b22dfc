import json
import shutil
import sys
import tracemalloc
from collections import namedtuple
from math import factorial

import jax
import numpy as np
import pytest
import zarr

from dask_nlsq import BadChunkError, MissingChunksError
from dask_nlsq.demo import measurement as simulated
from dask_nlsq.demo import model, report, run

SMALL = dict(frames=40, n_angles=5, seed=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small demonstration: its report and the lines that it printed."""
    lines = []
    found = run.run(**SMALL, directory=tmp_path_factory.mktemp("demo"), echo=lambda text: lines.extend(text.splitlines()))
    return found, lines


@pytest.fixture
def written(tmp_path):
    measurement = simulated.plan_measurement(**SMALL)
    return measurement, simulated.write_measurement(measurement, tmp_path / "two-time.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("frames", [40, 300])
@pytest.mark.parametrize("params", ["truth", "start"])
def test_simulation_and_model_agree(frames, params):
    measurement = simulated.plan_measurement(frames, 7, seed=1)
    params = getattr(measurement, params)
    (phi, i, j), by_name = measurement.coordinates, measurement.by_name(params)
    own, f = {name: by_name.pop(name) for name in ("contrast", "offset")}, model.two_time_model(measurement)
    for k in range(7):
        with jax.enable_x64(True):
            fitted = np.asarray(f((phi[k], i[0], j[0]), *(each[k] for each in own.values()), *by_name.values()))
        np.testing.assert_allclose(fitted, simulated.two_time_plane(measurement, params, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("x", [0.0, 1e-30, 1e-9, 1e-3, 0.0499, 0.0501, 0.7, -2.5])
def test_sinc_keeps_the_digits_of_its_derivative(x):
    expected = sum((-1) ** k * 2 * k * x ** (2 * k - 1) / factorial(2 * k + 1) for k in range(1, 20))
    with jax.enable_x64(True):
        derivative = float(jax.grad(model.sinc)(x))
    assert derivative == pytest.approx(expected, rel=1e-11, abs=0)


def test_noise_is_independent_and_the_diagonal_is_no_data():
    measurement = simulated.plan_measurement(400, 3, seed=0)
    noise = simulated.simulate_plane(measurement, 1) - simulated.two_time_plane(measurement, measurement.truth, 1)
    assert np.isnan(np.diagonal(noise)).all()
    assert np.isnan(noise).sum() == 400
    assert np.nanstd(noise) == pytest.approx(simulated.NOISE, rel=0.01)
    upper = np.triu_indices(400, 1)
    assert abs(np.corrcoef(noise[upper], noise.T[upper])[0, 1]) < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_starts_are_10_to_50_percent_off_within_bounds_with_shear_everywhere(seed):
    measurement = simulated.plan_measurement(200, 23, seed)
    off = np.abs(measurement.start / measurement.truth - 1)
    assert off.min() >= 0.1 - 1e-12
    assert off.max() <= 0.5 + 1e-12
    assert ((measurement.lower < measurement.start) & (measurement.start < measurement.upper)).all()
    g0, beta, g_offset = measurement.start[-4:-1]
    assert (g0 * measurement.times**beta + g_offset).min() > 0


def test_store_is_compressed_with_checksums_in_chunks_of_one_angle(written):
    measurement, path = written
    stored = json.loads((path / "zarr.json").read_text())
    assert stored["zarr_format"] == 3
    assert stored["data_type"] == "float32"
    assert stored["chunk_grid"]["configuration"]["chunk_shape"] == [1, 40, 40]
    blosc, checksum = stored["codecs"][1:]
    assert (blosc["name"], checksum["name"]) == ("blosc", "crc32c")
    assert (blosc["configuration"]["cname"], blosc["configuration"]["shuffle"]) == ("lz4", "bitshuffle")
    np.testing.assert_array_equal(zarr.open_array(path)[3], simulated.simulate_plane(measurement, 3))


def test_chunks_have_at_most_500_frames(tmp_path):
    measurement = simulated.plan_measurement(600, 3, seed=0)
    path = simulated.write_measurement(measurement, tmp_path / "two-time.zarr")
    assert zarr.open_array(path).chunks == (1, 500, 500)


def test_memory_for_writing_does_not_grow_with_the_number_of_angles(tmp_path):
    peaks = []
    for n_angles in (3, 12):
        measurement = simulated.plan_measurement(300, n_angles, seed=0)
        tracemalloc.start()
        simulated.write_measurement(measurement, tmp_path / f"{n_angles}.zarr")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_flipped_bit_in_the_store_is_noticed(written):
    measurement, path = written
    chunk = path / "c" / "2" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(BadChunkError, match="checksum"):
        run.fit_measurement(measurement, path)


def test_lost_chunk_is_noticed(written):
    measurement, path = written
    (path / "c" / "2" / "0" / "0").unlink()
    with pytest.raises(MissingChunksError, match="1 of 5 chunks"):
        run.fit_measurement(measurement, path)


def test_small_demo_finds_the_truth(small):
    found, _ = small
    assert found.pulls.shape == (17,)
    assert np.abs(found.pulls).max() < run.MAX_PULL
    assert report.reduced_chi_square(found.result) == pytest.approx(1, abs=0.05)
    assert found.result.n_points == 5 * 40 * 39
    assert found.result.n_masked == 5 * 40
    assert found.result.dof == 5 * 40 * 39 - 17


def test_the_fit_that_streams_is_resumed_and_ends_where_the_other_did(small):
    found, lines = small
    assert found.streamed.strategy == "streaming"
    assert found.apart < run.MAX_APART
    assert found.streamed.n_points == 5 * 40 * 39
    first = [line for line in lines if line.startswith("sweep   1:")]
    assert len(first) == 2  # held, cut off: a fit that is resumed goes on with the next one
    (said,) = (line for line in lines if " read, the locals kept " in line)
    assert said.startswith(f"{found.streamed.sweeps} sweeps of 31.25 kiB")


def test_two_fits_that_differ_fail(small):
    found, _ = small
    with pytest.raises(RuntimeError, match=r"streaming fit ended 1.0e-03 standard errors"):
        run.judge(simulated.plan_measurement(**SMALL), found._replace(apart=1e-3))


def test_small_demo_says_every_parameter_within_100_columns(small):
    found, lines = small
    assert max(len(line) for line in lines if str(found.directory) not in line) <= 100
    for name in (*found.result.param_names, "contrast", "offset"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert len(found.result.param_names) == 7
    assert any(str(found.picture) in line for line in lines)
    assert any(str(found.directory) in line for line in lines)


def test_small_demo_leaves_its_data_and_a_picture(small):
    found, _ = small
    assert sorted(path.name for path in found.directory.iterdir()) == [
        "demo.png",
        "streaming.ckpt",
        "two-time.zarr",
    ]
    assert found.picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_truth_than_stated_fails(tmp_path, monkeypatch):
    def spoiled(measurement, k, simulate=simulated.simulate_plane):
        truth = measurement.truth.copy()
        truth[-7] *= 1.5  # D0
        return simulate(measurement._replace(truth=truth), k)

    monkeypatch.setattr(simulated, "simulate_plane", spoiled)
    with pytest.raises(RuntimeError, match=r"missed the truth of \d+ parameters \(.*D0"):
        run.run(**SMALL, directory=tmp_path, echo=lambda line: None)


def test_pull_that_is_nan_fails(small):
    found, _ = small
    measurement = simulated.plan_measurement(**SMALL)
    pulls = np.where(np.arange(17) == 2, np.nan, found.pulls)
    with pytest.raises(RuntimeError, match=r"missed the truth of 1 parameters \(contrast_02\) by"):
        run.judge(measurement, found._replace(pulls=pulls))


def test_parameter_that_the_data_do_not_determine_fails(small):
    found, _ = small
    measurement = simulated.plan_measurement(**SMALL)
    pulls = run.compare(measurement, run.Found(measurement.truth, np.where(np.arange(17) == 12, np.inf, 1.0)))
    np.testing.assert_array_equal(pulls, np.where(np.arange(17) == 12, np.inf, 0.0))
    with pytest.raises(RuntimeError, match=r"missed the truth of 1 parameters \(D_offset\) by"):
        run.judge(measurement, found._replace(pulls=pulls))


def test_disk_without_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0\.98 MiB are needed in .* and 97\.66 kiB are free"):
        run.run(**SMALL, directory=tmp_path / "new", echo=lambda line: None)
    assert not list((tmp_path / "new").iterdir())


def test_earlier_demo_is_not_overwritten(tmp_path):
    (tmp_path / "demo.png").write_text("precious")
    with pytest.raises(FileExistsError, match="choose another directory"):
        run.run(**SMALL, directory=tmp_path, echo=lambda line: None)
    assert (tmp_path / "demo.png").read_text() == "precious"


@pytest.mark.parametrize("wrong", [dict(frames=19), dict(n_angles=2), dict(seed=-1)])
def test_sizes_that_cannot_work_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"(frames|angles|seed) = "):
        run.run(**(SMALL | wrong), directory=tmp_path / "new", echo=lambda line: None)
    assert not (tmp_path / "new").exists()


def test_missing_matplotlib_costs_the_picture_only(small, tmp_path, monkeypatch):
    found, _ = small
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    measurement = simulated.plan_measurement(**SMALL)
    assert report.draw(measurement, None, found.result, found.found.popt, tmp_path / "demo.png") is None
    assert 'pip install "dask-nlsq[plot]"' in report.closing(tmp_path, None)[-1]
