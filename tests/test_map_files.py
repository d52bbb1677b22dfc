"""Maps on disk: broken off while they were made, damaged, linked, hostile; what goes on and what is refused."""

import json
import resource
import shutil

import dask.array as da
import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import dask_nlsq
from dask_nlsq import DamagedFileError
from dask_nlsq.maps.store import METADATA, seal
from dask_nlsq.maps.stored import StoredMap
from tests.checkpointed import decay
from tests.damage import LINES, P0, T, lines_of, of_map, of_stored


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "whole"
    lines_of(path)
    return path


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def forget(path):
    """Let a map be one whose creation was not finished."""
    metadata = json.loads((path / METADATA).read_text())
    about = metadata["attributes"]["dask_nlsq"]
    for name in ("checksum", "sums", "attributes"):
        del about[name]
    (path / METADATA).write_text(json.dumps(metadata | {"consolidated_metadata": None}))
    shutil.rmtree(path / "done" / "c")


@pytest.mark.parametrize("limit", [100, 900, 3000], ids=["the group", "an array", "the last"])
def test_a_map_that_a_full_disk_has_broken_off_goes_on(whole, tmp_path, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a real failure to write, as a quota
    try:
        with pytest.raises(OSError, match="File too large"):
            lines_of(tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert of_map(tmp_path / "m") == of_map(whole)


@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
@pytest.mark.parametrize("which", ["done", "popt"])
def test_a_map_whose_creation_was_interrupted_is_made_again(whole, path, which, how):
    forget(path)
    damage(path / which / METADATA, how)
    assert of_map(path) == of_map(whole)


def damage(file, how):
    content = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(content[: len(content) // 2 if how == "cut" else 0])


@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_done_that_is_damaged_is_what_to_remove(whole, path, how):
    damage(path / "done" / METADATA, how)
    with pytest.raises(DamagedFileError, match=rf"done/zarr\.json is damaged .*or remove {path}/done and fit again"):
        lines_of(path)
    shutil.rmtree(path / "done")
    assert of_map(path) == of_map(whole)


@pytest.mark.parametrize("name", ["", "popt", "row"])
@pytest.mark.parametrize("how", ["empty", "cut"])
def test_other_metadata_that_are_damaged_name_the_map_to_remove(path, name, how):
    damage(path / name / METADATA, how)
    for read in (lines_of, StoredMap):
        with pytest.raises(DamagedFileError, match=rf"zarr\.json is damaged .*or remove {path} and fit again"):
            read(path)


@pytest.mark.parametrize("word", ["nfev", "attributes", "dask_nlsq", "version", "checksum", "metadata", "zarr_format"])
def test_a_changed_name_in_metadata_is_damage(path, word):
    text = (path / METADATA).read_text()
    for k in range(text.count(f'"{word}"')):
        parts = text.split(f'"{word}"')
        parts[k : k + 2] = [f'"{word[:-1]}_"'.join(parts[k : k + 2])]
        (path / METADATA).write_text(f'"{word}"'.join(parts))
        with pytest.raises(DamagedFileError, match=r"zarr\.json is damaged"):
            StoredMap(path)


def test_a_map_of_an_earlier_format_says_so(path):
    metadata = json.loads((path / METADATA).read_text())
    for name in ("version", "checksum", "sums", "attributes"):
        del metadata["attributes"]["dask_nlsq"][name]
    (path / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="m has format None, and this release reads 1"):
        lines_of(path)


def test_a_chunk_that_is_damaged_is_named(path):
    chunk = next(each for each in (path / "popt" / "c").rglob("*") if each.is_file())
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    with pytest.raises(DamagedFileError, match=rf"m/popt is damaged .*remove {path} and fit again"):
        StoredMap(path).popt  # noqa: B018
    with pytest.raises(ValueError, match="checksum"):
        xr.open_zarr(path).popt.load()


def test_a_map_is_written_where_a_link_leads(whole, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("disk", "new"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / name)
        lines_of(tmp_path / f"to {name}")
        assert of_map(tmp_path / name) == of_map(whole) and (tmp_path / f"to {name}").is_symlink()


@pytest.mark.hostile
@pytest.mark.parametrize("link", ["popt", "popt/c", "done", METADATA])
def test_links_out_of_a_map_are_not_followed(path, tmp_path, link):
    shutil.move(path / link, tmp_path / "elsewhere")
    (path / link).symlink_to(tmp_path / "elsewhere")
    for read in (lines_of, StoredMap):
        with pytest.raises(DamagedFileError, match=rf"{link} is damaged \(it is a link to .*elsewhere"):
            read(path)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")  # of who adds
def test_what_others_add_to_a_map_does_not_matter(whole, path):
    group = zarr.open_group(path, mode="r+")
    group.attrs["note"] = "mine"
    group.create_array("mine", data=np.arange(3))
    xr.Dataset(dict(yours=("row", np.arange(6))), attrs=group.attrs.asdict()).to_zarr(path, mode="a")
    lines_of(path)
    np.testing.assert_array_equal(StoredMap(path).popt, StoredMap(whole).popt)


@pytest.mark.hostile
def test_a_map_of_other_attributes_is_damage_even_if_they_are_sealed(path):
    metadata = json.loads((path / METADATA).read_text())
    del metadata["attributes"]["dask_nlsq"]["limits"]
    metadata["attributes"]["dask_nlsq"]["checksum"] = seal(metadata["attributes"])
    (path / METADATA).write_text(json.dumps(metadata))
    with pytest.raises(DamagedFileError, match="it does not describe a map"):
        lines_of(path)


@pytest.mark.hostile
@pytest.mark.filterwarnings("ignore:Object at notes is not recognized")  # which Zarr says of them
def test_nothing_but_its_own_arrays_is_removed_where_a_map_is_made_again(path):
    forget(path)
    (path / "notes").mkdir()
    (path / "notes" / "today.txt").write_text("precious")
    lines_of(path)
    assert (path / "notes" / "today.txt").read_text() == "precious"


def decays(path, **options):
    y = np.stack([np.zeros(20), *(np.exp(-k * np.linspace(0, 1, 20)) for k in (1, 2, 3))])
    y[0] = np.nan  # nothing but fill values
    maps = dask_nlsq.fit_map(lambda x, a, b: a * jnp.exp(-b * x), np.linspace(0, 1, 20), da.from_array(y, (1, 20)), [1, 1])
    maps.to_zarr(path, progress=False, **options)
    return StoredMap(path)


def chunk_files(path):
    """Of an array, by the numbers of the blocks of `decays`."""
    return sorted(each for each in (path / "c").rglob("*") if each.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["popt", "status", "chi2"])
def test_a_chunk_of_a_map_that_is_lost_is_no_fill_value(tmp_path, name):
    stored = decays(tmp_path / "maps")
    assert np.isnan(stored.popt[0]).all() and np.isfinite(stored.popt[1:]).all()
    chunk_files(tmp_path / "maps" / name)[2].unlink()
    for read in (lambda maps: maps.field(name), StoredMap.to_xarray, lambda maps: maps.sel(param="a")):
        with pytest.raises(dask_nlsq.DamagedFileError, match="chunks of blocks that are done are missing, which to_zarr"):
            read(StoredMap(tmp_path / "maps"))


def test_a_chunk_of_a_block_that_is_not_done_does_not_stand_for_one_that_is_lost(tmp_path):
    decays(tmp_path / "maps")
    chunk_files(tmp_path / "maps" / "done")[3].unlink()
    assert np.isfinite(StoredMap(tmp_path / "maps").popt[1:]).all()
    chunk_files(tmp_path / "maps" / "popt")[2].unlink()
    with pytest.raises(dask_nlsq.DamagedFileError, match="chunks of blocks that are done are missing"):
        StoredMap(tmp_path / "maps").popt  # noqa: B018


def test_pixels_of_blocks_that_are_not_done_are_not_fitted_yet(tmp_path):
    decays(tmp_path / "maps")
    for name in ("done", "status", "popt"):
        chunk_files(tmp_path / "maps" / name)[3].unlink()
    stored = StoredMap(tmp_path / "maps")
    missing = stored.status == dask_nlsq.MapStatus.NOT_FITTED_YET
    assert missing.tolist() == [False, False, False, True]
    assert "not fitted yet" in repr(stored) and "iteration limit" not in repr(stored)
    status = stored.to_xarray().status
    assert np.array_equal(status == 13, missing) and "NOT_FITTED_YET" in status.flag_meanings


@pytest.mark.parametrize("name", ["popt", "nfev"])
def test_blocks_whose_chunks_are_lost_are_fitted_again_and_no_others(tmp_path, name):
    expected = decays(tmp_path / "whole")
    decays(tmp_path / "maps")
    lost, kept = (chunk_files(tmp_path / "maps" / name)[k] for k in (2, 3))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    found = decays(tmp_path / "maps", resume=True)
    np.testing.assert_array_equal(found.field(name), expected.field(name))
    assert kept.stat().st_mtime_ns == before and of_stored(found) == of_stored(expected)


@pytest.mark.parametrize("name", ["row", "param"])
def test_a_chunk_of_a_coordinate_that_is_lost_is_no_fill_value(path, name):
    next(each for each in (path / name / "c").rglob("*") if each.is_file()).unlink()
    for read in (lines_of, StoredMap):
        with pytest.raises(DamagedFileError, match=rf"m/{name} is damaged \(chunks of it are missing\)"):
            read(path)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("how", ["path", "xarray", "xarray as stored"])
def test_how_coordinates_were_stored_is_not_copied_into_a_map(how, version, tmp_path):
    """They are decoded, so the attributes of their stored values would be applied twice."""
    row = 0.5 * np.arange(len(LINES))
    y = xr.DataArray(LINES, dims=("row", "t"), coords=dict(row=("row", row, {"units": "mm"}), t=T), name="I")
    packed = dict(dtype="i2", scale_factor=0.5, _FillValue=-1)
    (tmp_path / "d").mkdir()
    y.to_dataset().to_zarr(tmp_path / "d", zarr_format=version, consolidated=False, encoding=dict(row=packed))
    opened = xr.open_zarr(tmp_path / "d", consolidated=False, mask_and_scale=how != "xarray as stored").I
    data = tmp_path / "d" / "I" if how == "path" else opened
    fits = dask_nlsq.fit_map(decay, T, data, P0, decode_cf=how != "xarray as stored")
    fits.to_zarr(tmp_path / "m", progress=False)
    with xr.open_zarr(tmp_path / "m", consolidated=False) as found:
        if "row" in found.coords:  # format 2 has no names of axes
            assert found.row.attrs == {"units": "mm"} and "scale_factor" not in found.row.encoding
            np.testing.assert_array_equal(found.row, opened.row)


def test_nothing_is_left_of_a_map_that_a_store_cannot_hold(tmp_path):
    y = xr.DataArray(LINES, dims=("row", "t"), coords=dict(row=("row", [object()] * len(LINES))))
    for path in (tmp_path / "m", tmp_path):
        with pytest.raises((TypeError, ValueError)):
            dask_nlsq.fit_map(decay, T, y, P0).to_zarr(path, progress=False)
    assert [*tmp_path.iterdir()] == []


# ---------------------------------------------------------------------------------------------------------------------
# names that come with the data


def fits_of(name, dims=("row", "t")):
    """Lazy maps of data with a scalar coordinate, or an axis with a coordinate, of this name."""
    coords = {name: (name, np.arange(6.0))} if name in dims else {name: 7.0}
    y = xr.DataArray(LINES, dims=dims, coords=coords)
    return dask_nlsq.fit_map(decay, T, y.chunk({dims[0]: 2}), P0, axis="t")


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["{}/keep", "../keep", "..", "."])
def test_a_coordinate_that_is_called_by_a_path_removes_and_writes_nothing_elsewhere(tmp_path, name):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "notes.txt").write_text("precious")
    fits = fits_of(name.format(tmp_path))
    fits.to_zarr(tmp_path / "m", progress=False)
    forget(tmp_path / "m")
    fits.to_zarr(tmp_path / "m", resume=True, progress=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["keep", "m"]
    assert [(each.name, each.read_text()) for each in (tmp_path / "keep").iterdir()] == [("notes.txt", "precious")]
    opened = StoredMap(tmp_path / "m").to_xarray()
    (own,) = {*opened.coords} - {"param"}
    assert opened[own] == 7.0 and "/" not in own


@pytest.mark.parametrize("name", ["counts/s", "zarr.json", "a\\b", ""])
def test_a_name_that_no_directory_can_have_is_changed_in_a_map(tmp_path, name):
    fits = fits_of(name, dims=(name, "t")) if name else fits_of(name)
    fits.to_zarr(tmp_path / "m", progress=False)
    opened = StoredMap(tmp_path / "m").to_xarray()
    assert opened.popt.sizes == fits.to_xarray().popt.sizes and {*opened.coords} == {*fits.to_xarray().coords}
    np.testing.assert_array_equal(opened.popt, fits.compute().popt)


@pytest.mark.hostile
def test_axes_of_a_file_that_are_paths_have_no_coordinate_and_remove_nothing(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "notes.txt").write_text("precious")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file[f"{tmp_path}/keep"] = np.arange(6.0)
        file["entry/y"] = LINES
        file["entry"].attrs["axes"] = [f"{tmp_path}/keep", "."]
    with h5py.File(tmp_path / "y.h5") as file:
        fits = dask_nlsq.fit_map(decay, T, file["entry/y"], P0)
        fits.to_zarr(tmp_path / "m", progress=False)
    assert (tmp_path / "keep" / "notes.txt").read_text() == "precious"
    assert {*StoredMap(tmp_path / "m").to_xarray().coords} == {"param"}


def test_an_attribute_of_the_data_does_not_take_the_place_of_what_a_map_is_known_by(tmp_path):
    attrs = {"dask_nlsq": "mine", "beamline": "P10", "gain": np.float32(2), "pixels": [np.int64(3)]}
    y = xr.DataArray(LINES, dims=("row", "t"), attrs=attrs)
    dask_nlsq.fit_map(decay, T, y.chunk(row=2), P0, axis="t").to_zarr(tmp_path / "m", progress=False)
    kept = StoredMap(tmp_path / "m").to_xarray().attrs
    assert (kept["beamline"], kept["gain"], kept["pixels"]) == ("P10", 2, [3])
