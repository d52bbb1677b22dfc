"""What a fit returns: tables, files, bands."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass

import dask
import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from dask_nlsq import BadChunkError, Plan, Record, curve_fit, load
from dask_nlsq.base.files import DamagedFileError, read_json, write_json
from dask_nlsq.base.text import measured
from dask_nlsq.engine.condensed import Factor
from dask_nlsq.kernels.rows import SegmentSums
from dask_nlsq.memory.processes import ProcessMemory
from dask_nlsq.results.schema import VERSION
from dask_nlsq.statistics import quantile

X = np.linspace(0, 5, 240)


def decay(x, a, b, c):
    return a * jnp.exp(-b * x) + c


def other_decay(x, a, b, c):
    return a * jnp.exp(-b * x) - c


def decay_jac(x, a, b, c):
    e = jnp.exp(-b * x)
    return jnp.stack([e, -a * x * e, jnp.ones_like(x)], axis=1)


@pytest.fixture(scope="module")
def data():
    return X, 2 * np.exp(-0.7 * X) + 0.5 + 0.1 * np.random.default_rng(0).standard_normal(X.size)


@pytest.fixture(scope="module")
def fitted(data):
    return curve_fit(decay, *data, p0=[1, 1, 0])


def in_chunks(*arrays, chunks=50):
    return [da.from_array(each, chunks=chunks) for each in arrays]


# ---------------------------------------------------------------- text


def test_a_summary_has_all_that_a_paper_needs(fitted):
    text = str(fitted.summary())
    assert "converged" in text and "240 points; 3 parameters" in text
    for name, value in [("chi-square", fitted.chi_square), ("R^2", fitted.r_squared), ("AIC", fitted.aic)]:
        assert f"{name} {value:.6g}" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("b "))
    assert " ".join(line.split()[1:4]) == f"{fitted['b']}"
    assert "correlations: b, c +0." in text
    assert text in repr(fitted)


def test_a_summary_says_which_bounds_were_hit_and_leaves_out_what_does_not_exist(data):
    found = curve_fit(decay, *data, p0=[1, 0.5, 0.1], bounds=([0, 0, 0], [9, 0.6, 9]), loss="huber")
    assert found.at_bound.tolist() == [0, 1, 0]
    (line,) = (line for line in found.summary().splitlines() if line.strip().startswith("b "))
    assert line.endswith("at its upper bound")
    assert "nan" not in found.summary() and "AIC" not in found.summary()


def test_a_table_for_notebooks_escapes_names(data):
    found = curve_fit(decay, *data, p0=[1, 1, 0], param_names=["<b>a", "k", "c & d"])
    html = found._repr_html_()
    assert "<td>&lt;b&gt;a</td>" in html and "<td>c &amp; d</td>" in html and "<b>" not in html
    assert f"<td>{measured(found.popt[1], found.perr[1])[0]}</td>" in html


def test_a_dict_is_strict_json(fitted, data):
    found = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    assert found["parameters"]["b"]["value"] == fitted.popt[1]
    assert found["parameters"]["b"]["interval_95"] == fitted.confidence_intervals()[1].tolist()
    assert found["parameters"]["b"]["bounds"] == [None, None]
    assert found["statistics"]["aic"] == fitted.aic and found["covariance"] == fitted.pcov.tolist()


def test_a_dataset_has_names_and_statistics(fitted):
    found = fitted.to_xarray()
    assert float(found.popt.sel(param="b")) == fitted.popt[1]
    assert float(found.pcov.sel(cov_i="a", cov_j="c")) == fitted.pcov[0, 2]
    assert float(found.correlation.sel(cov_i="a", cov_j="a")) == 1
    assert found.attrs["chi_square"] == fitted.chi_square


# ---------------------------------------------------------------- files

CASES = {
    "plain": dict(),
    "bounds, names": dict(bounds=([0, -np.inf, 0], np.inf), param_names=["height", "rate", "base"]),
    "fixed": dict(fixed={"c": 0.5}),
    "starts": dict(n_starts=3),
    "streaming": dict(strategy="streaming"),
    "not determined": dict(mask=X > 0),
    "damage": dict(missing_chunks="mask"),
    "counts": dict(loss="poisson"),
    "dates": dict(sigma=0.1, absolute_sigma=True),
}


def fitted_as(case, data, path):
    x, y = data
    f, p0 = decay, [1, 1, 0]
    match case:
        case "not determined":
            f, p0 = (lambda x, a: a + 0 * x), [1]
        case "streaming":
            x, y = in_chunks(x, y)
        case "counts":
            y, p0 = np.round(100 * np.abs(y)), [150, 1, 20]
        case "dates":
            x = np.datetime64("2026-01-01", "ms") + (1000 * x).astype("m8[ms]")
        case "damage":
            stored = zarr.create_array(path, shape=y.shape, dtype=y.dtype, chunks=(50,))
            stored[...] = y
            (path / "c" / "2").unlink()
            y = stored
    return curve_fit(f, x, y, p0=p0, **CASES[case])


def assert_same(one, two):
    """The same kind of value, with the same bits; NumPy's numbers are numbers."""
    one, two = (each.item() if isinstance(each, np.generic) else each for each in (one, two))
    assert type(one) is type(two)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    elif isinstance(one, float):
        assert one == two or (one != one and two != two)
    elif isinstance(one, BadChunkError):
        assert_same(one.args, two.args)
    elif isinstance(one, dict):
        assert_same([*one], [*two])
        assert_same([*one.values()], [*two.values()])
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(two)
        for each, other in zip(one, two, strict=True):
            assert_same(each, other)
    elif is_dataclass(one):
        names = [field.name for field in fields(one) if field.compare]
        assert_same(*([getattr(each, name) for name in names] for each in (one, two)))
    else:
        assert one == two


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
@pytest.mark.parametrize("case", CASES)
def test_a_saved_result_comes_back_with_the_same_bits(data, tmp_path, case):
    found = fitted_as(case, data, tmp_path / "y")
    found.save(tmp_path / "fit")
    again = load(tmp_path / "fit")
    kept = {each.name for each in fields(found)} - {"objective", "preparation", "data", "_labels"}
    for name in kept:
        assert_same(getattr(found, name), getattr(again, name))
    assert found.objective[1:] == again.objective[1:] and found.preparation.whole == again.preparation.whole
    assert again.summary() == found.summary() and again.to_dict() == found.to_dict()
    json.loads((tmp_path / "fit" / "result.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    again.save(tmp_path / "again")
    assert_same(*(json.loads((tmp_path / name / "result.json").read_text())["result"] for name in ("fit", "again")))


def saved(result, path):
    """The directory of a result, and its files: JSON, arrays."""
    result.save(path)
    (arrays,) = path.glob("*.npz")
    return path, path / "result.json", arrays


def test_a_changed_byte_of_any_file_is_refused(data, tmp_path):
    path, *files = saved(curve_fit(decay, *data, p0=[1, 1, 0]), tmp_path / "fit")
    for file in files:
        whole = file.read_bytes()
        for k in range(0, len(whole), max(1, len(whole) // 500)):
            for bit in (1, 32):
                file.write_bytes(whole[:k] + bytes([whole[k] ^ bit]) + whole[k + 1 :])
                with pytest.raises(ValueError, match=r"is damaged|has format"):
                    load(path)
        file.write_bytes(whole)
    load(path)


@pytest.mark.parametrize("which", [1, 2])
def test_a_truncated_or_lost_file_is_refused(data, tmp_path, which):
    path, *_ = files = saved(curve_fit(decay, *data, p0=[1, 1, 0]), tmp_path / "fit")
    whole = files[which].read_bytes()
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        files[which].write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=f"{files[which].name} is damaged .*fit again"):
            load(path)
    files[which].unlink()
    with pytest.raises(ValueError, match="has no result.json" if which == 1 else "it is not there"):
        load(path)


def test_a_field_that_is_missing_is_named(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    found = read_json(tmp_path / "fit" / "result.json", VERSION)
    del found["result"]["fields"]["plan"]["fields"]["places"]["tuple"][0]["fields"]["jax"]
    write_json(tmp_path / "fit" / "result.json", **found)
    with pytest.raises(ValueError, match=r"has no `result\.plan\.places\[0\]\.jax`\).*fit again"):
        load(tmp_path / "fit")


def test_names_of_classes_and_modules_are_not_in_the_file(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    text = (tmp_path / "fit" / "result.json").read_text()
    assert not [each.__name__ for each in (Factor, SegmentSums, Plan, Record, ProcessMemory) if each.__name__ in text]
    code = """
import sys
from dask_nlsq import load
from dask_nlsq.results import result, schema
for module in (result, schema):
    for each in [each for each in vars(module).values() if isinstance(each, type) and "dask_nlsq" in each.__module__]:
        each.__name__, each.__qualname__, each.__module__ = "Renamed", "Renamed", "elsewhere"
print(load(sys.argv[1]).popt.tolist())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "fit")]
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == fitted.popt.tolist()


def test_a_loaded_result_predicts_by_the_models_name_and_saves_again(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    load(tmp_path / "fit").save(tmp_path / "copy")
    again = load(tmp_path / "copy")
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    np.testing.assert_array_equal(again.confidence_band(X), fitted.confidence_band(X))
    np.testing.assert_array_equal(again.prediction_band(X), fitted.prediction_band(X))
    with pytest.raises(ValueError, match="does not hold the data: use predict"):
        again.residuals()


@pytest.mark.parametrize("why", ["lambda", "gone", "changed"])
def test_a_loaded_result_whose_model_is_not_there_says_so(data, tmp_path, monkeypatch, why):
    f = (lambda x, a, b, c: decay(x, a, b, c)) if why == "lambda" else decay
    curve_fit(f, *data, p0=[1, 1, 0]).save(tmp_path / "fit")
    if why == "gone":
        monkeypatch.delitem(globals(), "decay")
    if why == "changed":
        monkeypatch.setitem(globals(), "decay", other_decay)
    error = {"lambda": "has no name", "gone": "cannot be imported", "changed": "computes something else"}[why]
    with pytest.raises(ValueError, match=f"{error}.*popt"):
        load(tmp_path / "fit").predict(X)


def test_a_result_is_replaced_all_at_once(data, fitted, tmp_path, monkeypatch):
    def many(x, *params):
        return sum(p * x**k for k, p in enumerate(params))

    large = curve_fit(many, *data, p0=np.ones(9), ftol=1e-4)  # 81 elements of pcov go to a file of their own
    large.save(tmp_path / "fit")
    (kept,) = (tmp_path / "fit").glob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            fitted.save(tmp_path / "fit")
    assert np.array_equal(load(tmp_path / "fit").pcov, large.pcov)
    fitted.save(tmp_path / "fit")
    assert not kept.exists() and np.array_equal(load(tmp_path / "fit").pcov, fitted.pcov)


def test_a_result_is_not_saved_in_the_place_of_a_file(fitted, tmp_path):
    (tmp_path / "f").write_text("notes")
    for path in (tmp_path / "f", tmp_path / "f" / "r"):
        with pytest.raises(NotADirectoryError, match=r"`path` .*f is a file: give the path of a directory"):
            fitted.save(path)
    assert (tmp_path / "f").read_text() == "notes"


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a saved result"):
        load(tmp_path / "nothing")
    (tmp_path / "result.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="has format 99"):
        load(tmp_path)


# ---------------------------------------------------------------- bands


def dense_band(found, x, q, noise):
    with jax.enable_x64(True):
        J = np.asarray(decay_jac(jnp.asarray(x), *found.popt))
        middle = np.asarray(decay(jnp.asarray(x), *found.popt))
    half = q * np.sqrt(np.einsum("ni,ij,nj->n", J, found.pcov, J) + noise)
    return middle - half, middle + half


@pytest.mark.parametrize("jac", [None, decay_jac])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bands_are_those_of_a_dense_jacobian(data, jac, level):
    x, y = data
    sigma = np.linspace(0.05, 0.2, x.size)
    found = curve_fit(decay, x, y, p0=[1, 1, 0], sigma=sigma, jac=jac)
    q = quantile(level, found.dof, found.noise)
    np.testing.assert_allclose(found.confidence_band(level=level), dense_band(found, x, q, 0), rtol=1e-10)
    noise = found.reduced_chi_square * sigma**2
    np.testing.assert_allclose(found.prediction_band(level=level), dense_band(found, x, q, noise), rtol=1e-10)
    some = np.linspace(-1, 9, 7000)
    noise = found.reduced_chi_square * 0.3**2
    np.testing.assert_allclose(found.confidence_band(some, level), dense_band(found, some, q, 0), rtol=1e-10)
    np.testing.assert_allclose(found.prediction_band(some, level, sigma=0.3), dense_band(found, some, q, noise), rtol=1e-10)


@pytest.mark.parametrize("strategy", ["standard", "chunked", "streaming"])
def test_bands_of_dask_data_are_lazy_and_chunked_like_them(data, strategy):
    x, y = data
    found = curve_fit(decay, *in_chunks(x, y), p0=[1, 1, 0], sigma=0.1, absolute_sigma=True, strategy=strategy)
    for band, noise in [(found.confidence_band(), 0), (found.prediction_band(), 0.01)]:
        assert all(isinstance(end, da.Array) and end.chunks == ((50, 50, 50, 50, 40),) for end in band)
        np.testing.assert_allclose(dask.compute(*band), dense_band(found, x, 1.959963984540054, noise), rtol=1e-10)
    elsewhere = da.linspace(0, 9, 100, chunks=30)
    lower, upper = found.prediction_band(elsewhere)
    assert lower.chunks == elsewhere.chunks
    expected = dense_band(found, elsewhere.compute(), 1.959963984540054, 0.01)
    np.testing.assert_allclose(dask.compute(lower, upper), expected, rtol=1e-10)


def test_bands_have_the_shape_of_the_data_and_hold_masked_points(data):
    x, y = data
    shape = (12, 20)
    found = curve_fit(
        decay, x.reshape(shape), y.reshape(shape), p0=[1, 1, 0], mask=(x > 3).reshape(shape), strategy="chunked"
    )
    lower, upper = found.confidence_band()
    assert lower.shape == shape and np.all(lower < upper)


def test_bands_of_counts_have_the_noise_of_the_mean(data):
    y = np.random.default_rng(0).poisson(100 * np.exp(-0.7 * X) + 20)
    found = curve_fit(decay, X, y, p0=[90, 1, 20], loss="poisson")
    mean = found.predict()
    np.testing.assert_allclose(found.prediction_band(), dense_band(found, X, 1.959963984540054, mean), rtol=1e-10)
    again = curve_fit(decay, X, y, p0=[90, 1, 20], sigma="poisson")
    q = quantile(0.95, again.dof, again.noise)
    expected = dense_band(again, X, q, again.reduced_chi_square * mean)
    np.testing.assert_allclose(again.prediction_band(), expected, rtol=1e-9)


def test_a_prediction_band_that_cannot_be_known_is_refused(data):
    x, y = data
    by_point = curve_fit(decay, x, y, p0=[1, 1, 0], sigma=np.full(x.size, 0.1))
    with pytest.raises(ValueError, match="give `x`, and as `sigma`"):
        by_point.prediction_band(x)
    correlated = curve_fit(decay, x, y, p0=[1, 1, 0], sigma=0.01 * np.eye(x.size), absolute_sigma=True)
    with pytest.raises(ValueError, match="give `x`, and as `sigma`"):
        correlated.prediction_band()
    given = correlated.prediction_band(x, sigma=0.1)
    np.testing.assert_allclose(given, dense_band(correlated, x, 1.959963984540054, 0.01), rtol=1e-8)
    with pytest.raises(ValueError, match="no prediction band with loss='huber'"):
        curve_fit(decay, x, y, p0=[1, 1, 0], loss="huber").prediction_band()
    with pytest.raises(ValueError, match="for points given as `x`"):
        by_point.prediction_band(sigma=1.0)


@pytest.mark.filterwarnings("ignore:Covariance of the parameters")
def test_there_is_no_band_where_the_data_do_not_determine_the_parameters(data):
    found = curve_fit(lambda x, a, b: (a + b) * x, *data, p0=[1, 1])
    with pytest.raises(ValueError, match="do not determine"):
        found.confidence_band()


def test_an_interval_covers_as_many_points_as_its_level_says():
    rng = np.random.default_rng(3)
    x = np.linspace(0, 5, 2000)
    found = curve_fit(decay, x, 2 * np.exp(-0.7 * x) + 0.5 + 0.1 * rng.standard_normal(x.size), p0=[1, 1, 0])
    new = 2 * np.exp(-0.7 * x) + 0.5 + 0.1 * rng.standard_normal(x.size)
    lower, upper = found.prediction_band(level=0.9)
    assert np.mean((lower < new) & (new < upper)) == pytest.approx(0.9, abs=0.025)


def test_a_model_that_needs_all_points_at_once_is_saved_and_found_again(tmp_path):
    w = np.linspace(1, 2, 400)
    x = np.linspace(0, 1, 400)
    found = curve_fit(lambda x, a, b: a * x * jnp.asarray(w) + b, x, 2 * x * w + 0.1 * np.sin(99 * x), p0=[1, 1])
    found.save(tmp_path / "r")
    again = load(tmp_path / "r")
    np.testing.assert_array_equal(again.popt, found.popt)


def test_saving_touches_no_file_but_its_own(tmp_path):
    np.savez(tmp_path / "arrays-run7.npz", a=np.ones(3))
    x = np.linspace(0, 1, 400)
    found = curve_fit(lambda x, a, b: a * x + b, x, 2 * x + np.sin(99 * x), p0=[1, 1])
    for _ in range(2):
        found.save(tmp_path)
    assert (tmp_path / "arrays-run7.npz").exists()
    assert len([*tmp_path.iterdir()]) <= 3
