"""Disks that are full: a fit goes on, what is written by hand says what it needs, and old files stay as they are."""

import errno
import re

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import pytest

from dask_nlsq import curve_fit, fit_groups, fit_map, load, resume

from .checkpointed import decay
from .disks import small_disk

CHUNK = 500
X = np.linspace(0, 10, 20_000)
Y = da.from_array(200 * np.exp(-0.5 * X) + 30 + np.random.default_rng(3).normal(0, 3, X.size), CHUNK)
P0 = [150, 0.35, 40]
NOT_RESUMABLE = "the fit is not resumable from where it ended"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture(autouse=True)
def small_chunks_stay_apart(monkeypatch):
    monkeypatch.setattr("dask_nlsq.data.joining.JOINED_POINTS", 1)


def at(n, act, then=None):
    """A callback that acts after ``n`` sweeps, and acts again at a later one."""

    def callback(record):
        if record.nfev == n:
            act()
        if then is not None and record.nfev == n + 1:
            then()

    return callback


def rows(x, a, b, c):
    return a * jnp.exp(-b * x) + c


GROUPS = np.stack([k * np.exp(-0.5 * X[::200]) + 0.3 for k in range(2, 42)]) + np.random.default_rng(1).normal(
    0, 0.1, (40, 100)
)
LOCAL = dict(p0=[4.0, 0.9, 0.0], local="a", group_axes=0)
FITS = {
    "streaming": lambda **options: curve_fit(decay, X, Y, P0, strategy="streaming", **options),
    "groups": lambda **options: fit_groups(rows, X[::200], da.from_array(GROUPS, (10, 100)), **LOCAL, **options),
}
AGAIN = {
    "streaming": lambda path: resume(path, ydata=Y),
    "groups": lambda path: resume(path, ydata=da.from_array(GROUPS, (10, 100))),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_disk_that_fills_up_in_mid_fit_ends_neither_the_fit_nor_what_was_kept(kind, disk):
    whole, path = FITS[kind](), disk.path / "checkpoint"
    with dask.config.set({"nlsq.checkpoint-seconds": 0.0}), pytest.warns(RuntimeWarning) as said:
        found = FITS[kind](checkpoint=path, callback=at(2, disk.fill))
    texts = [str(each.message) for each in said]
    assert len(texts) == 2 and "the fit goes on" in texts[0] and NOT_RESUMABLE in texts[1], texts
    assert str(path) in texts[0] and re.search("left|ulimit", texts[0])
    np.testing.assert_array_equal(found.popt, whole.popt)
    disk.empty()
    np.testing.assert_array_equal(AGAIN[kind](path).popt, whole.popt)
    assert not list(path.rglob(".*"))


@pytest.mark.parametrize("kind", FITS)
def test_a_save_is_tried_again_and_the_fit_is_resumable_where_the_last_one_succeeds(kind, disk):
    path = disk.path / "checkpoint"
    with pytest.warns(RuntimeWarning, match="the fit goes on") as said:
        found = FITS[kind](checkpoint=path, callback=at(1, disk.fill, disk.empty))
    assert len(said) == 1
    again = AGAIN[kind](path)
    np.testing.assert_array_equal(again.popt, found.popt)
    assert again.nfev == found.nfev


@pytest.mark.parametrize("kind", FITS)
def test_a_checkpoint_has_room_before_anything_is_read(kind, disk):
    if not disk.mounted:
        pytest.skip("no disk of its own here")
    disk.fill()
    with pytest.raises(OSError, match=r"`checkpoint` .* takes up to .*, and its disk has .* left") as err:
        FITS[kind](checkpoint=disk.path / "checkpoint")
    assert err.value.errno == errno.ENOSPC


@pytest.mark.slow
def test_what_is_saved_by_hand_names_the_path_and_what_it_takes_and_the_old_file_stays(disk):
    pytest.importorskip("matplotlib")
    result = curve_fit(decay, X, Y, P0)
    result.save(disk.path / "r")
    page = result.report(disk.path / "r.html").read_bytes()
    disk.fill()
    with pytest.raises(OSError, match=r"r/arrays-\w+.npz could not be written .*takes .* (left|ulimit)"):
        result.save(disk.path / "r")
    with pytest.raises(OSError, match=r"r.html could not be written .*takes .* (left|ulimit)"):
        result.report(disk.path / "r.html")
    disk.empty()
    np.testing.assert_array_equal(load(disk.path / "r").popt, result.popt)
    assert (disk.path / "r.html").read_bytes() == page


def test_groups_that_could_not_be_saved_can_be_saved_again(disk):
    result = FITS["groups"]()
    disk.fill()
    with pytest.raises(OSError, match=r"left|ulimit"):
        result.save(disk.path / "g")
    disk.empty()
    result.save(disk.path / "g")
    np.testing.assert_array_equal(load(disk.path / "g").popt, result.popt)


@pytest.mark.slow
def test_a_map_has_room_before_it_is_fitted_and_what_is_written_stays_when_its_disk_fills_up(disk):
    def deadly(block, block_info=None):
        if block_info and block_info[0]["chunk-location"] == (3, 0) and armed:
            disk.fill()
        return block

    armed, path = [1], disk.path / "m.zarr"
    y = da.from_array(GROUPS, (10, 100)).map_blocks(deadly, dtype=float, meta=np.empty((0, 0)))
    maps = fit_map(rows, X[::200], y, LOCAL["p0"])
    with dask.config.set(scheduler="synchronous"), pytest.raises(OSError, match=r"m.zarr could not be written .* takes"):
        maps.to_zarr(path)
    if disk.mounted:
        with pytest.raises(OSError, match=r"`path` .*m.zarr takes up to .* left"):
            maps.to_zarr(path, resume=True)
    disk.empty()
    armed.clear()
    found = maps.to_zarr(path, resume=True)
    np.testing.assert_array_equal(found["popt"][...], maps.compute().popt)


@pytest.mark.slow
def test_a_performance_report_that_cannot_be_written_costs_no_result(disk, workers):
    with workers.as_current(), pytest.warns(RuntimeWarning, match="`performance_report` .*fit.html could not be written"):
        found = curve_fit(decay, X, Y, P0, performance_report=disk.path / "fit.html", callback=at(2, disk.fill))
    assert found.success
