import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import entry_points
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from zarr.codecs import ZstdCodec

from dask_nlsq import curve_fit, fit_groups, fit_map, load
from dask_nlsq.demo import measurement as simulated
from dask_nlsq.interface.cli import nlsq
from dask_nlsq.models import exponential, gaussian, named, polynomial
from tests.models_of_a_user import decay, plane

N = 20_000
X = np.linspace(0, 10, N, endpoint=False)
Y = np.random.default_rng(3).poisson(200 * np.exp(-0.5 * X) + 30).astype("u2")
P0 = dict(a=150.0, b=0.4, c=40.0)
ROOT = Path(__file__).parent.parent


def write(path, values, chunks):
    codec, whole = ZstdCodec(checksum=True), {"write_empty_chunks": True}
    array = zarr.create_array(path, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codec, config=whole)
    array[...] = values
    return str(path)


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "y.zarr", Y, (2000,))


DECAY = ("--model", "tests.models_of_a_user:decay", "--x", "0:10:0.0005")
START = ("--p0", "a=150,b=0.4", "--p0", "c=40")


def run(*arguments):
    return CliRunner().invoke(nlsq, [str(each) for each in arguments])


def converges(*arguments):
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome


def fails(code, message, *arguments):
    """One line on stderr."""
    outcome = run(*arguments)
    assert outcome.exit_code == code, outcome.output
    assert outcome.stderr.startswith("Error: ") and outcome.stderr.count("\n") == 1
    assert re.search(message, outcome.stderr), outcome.stderr
    return outcome


def same_bits(found, expected):
    for name in ("popt", "pcov", "cost", "nfev", "sweeps", "status", "message", "n_points"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


# ---------------------------------------------------------------------------------------------------------------------
# fit


def test_fit_is_curve_fit_and_writes_what_it_found(store, tmp_path):
    expected = curve_fit(decay, 0 + 0.0005 * np.arange(N), store, P0, bounds=dict(a=(0, None), b=(None, 3), c=(0, 99)))
    bounds = ("--bounds", "a=0:,b=:3", "--bounds", "c=0:99")
    outcome = converges("fit", store, *DECAY, *START, *bounds, "--out", tmp_path / "r", "--log", tmp_path / "log")
    found = load(tmp_path / "r")
    same_bits(found, expected)
    assert found.summary() in outcome.stdout
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["parameters"]["a"]["value"] == expected.popt[0] and summary["success"]
    assert "</html>" in (tmp_path / "r" / "report.html").read_text()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(expected.history)
    assert f"sweep {expected.nfev} accepted: cost {expected.history[-1].cost:.9g}" in lines[-1]


@pytest.mark.slow
def test_ready_models_and_sums_need_no_start(store):
    outcome = converges("fit", store, "--model", "exponential+polynomial:0", "--x", "0:10:0.0005")
    values = re.findall(r"^  \w+ +(\S+) +\+-", outcome.stdout, re.M)
    np.testing.assert_allclose([float(each) for each in values], [200, 0.5, 30], rtol=0.02)


@pytest.mark.slow
def test_options_mean_what_they_mean_to_curve_fit(store, tmp_path):
    x = write(tmp_path / "x.zarr", X, (3000,))
    mask = write(tmp_path / "mask.zarr", X > 9, (3000,))
    sigma = write(tmp_path / "sigma.zarr", np.sqrt(Y + 1.0), (3000,))
    options = dict(sigma=sigma, mask=mask, loss="soft_l1", absolute_sigma=True, fixed=dict(c=30.0), strategy="chunked")
    expected = curve_fit(decay, x, store, P0, **options)
    words = ("--sigma", sigma, "--mask", mask, "--loss", "soft_l1", "--absolute-sigma", "--fixed", "c=30")
    model = ("--model", "tests.models_of_a_user:decay", "--x", x, "--strategy", "chunked")
    converges("fit", store, *model, *START, *words, "--out", tmp_path / "r", "--no-report")
    same_bits(load(tmp_path / "r"), expected)
    assert not (tmp_path / "r" / "report.html").exists()


@pytest.mark.slow
def test_values_that_are_no_data_are_named_on_the_command_line(tmp_path):
    bad = Y.copy()
    bad[::100], bad[50::100] = 65535, 7
    store = write(tmp_path / "bad.zarr", bad, (2000,))
    asked = (store, *DECAY, *START, "--no-report", "--out", tmp_path / "r")
    for words, options in (
        (("--mask-values", "65535,7"), dict(mask_values=[65535, 7])),
        (("--valid-range", "8:1000"), dict(mask_values=None, valid_range=(8, 1000))),
    ):
        converges("fit", *asked, *words)
        expected = curve_fit(decay, X, store, P0, **options)
        same_bits(load(tmp_path / "r"), expected)
        assert expected.n_masked >= 400
    assert "masked" not in converges("fit", *asked, "--mask-values", "none", "--max-nfev", "200").stdout
    fails(2, "--mask-values x: 'x' is not a number", "fit", *asked, "--mask-values", "7,x")
    fails(2, "--valid-range 8: two ends with a colon between them, as in 0:1", "fit", *asked, "--valid-range", "8")


def test_a_vector_belongs_to_its_axis(tmp_path):
    rows, columns = np.arange(40)[:, None], 0.5 * np.arange(30)
    y = write(tmp_path / "y.zarr", 3 * rows + 2 * columns + 1.0, (10, 30))
    x = write(tmp_path / "x.zarr", columns, (30,))
    model = ("--model", "tests.models_of_a_user:plane")
    converges("fit", y, *model, "--x", "0:40:1", "--x", x, "--out", tmp_path / "r", "--no-report")
    expected = curve_fit(plane, (rows, columns), y)
    same_bits(load(tmp_path / "r"), expected)
    fails(2, r"--x 0:30:1 has 30 values, but axis 0 has 40", "fit", y, *model, "--x", "0:30:1", "--x", x)
    fails(2, r"is number 3, and there are 2 axes", "fit", y, *model, "--x", "0:40:1", "--x", x, "--x", "0:5:1")
    assert "1,200 points" in converges("plan", y, *model, "--x", "0:40:1", "--x", x).stdout


def test_a_workflow_sets_tolerances_and_starts(store, tmp_path):
    converges("fit", store, *DECAY, *START, "--workflow", "fast", "--out", tmp_path / "r", "--no-report")
    assert "< 1.00e-06" in load(tmp_path / "r").message
    refused = "Invalid value for '--workflow': 'faster' is not one of 'auto', "
    fails(2, refused, "fit", store, *DECAY, *START, "--workflow", "faster")


def test_no_convergence_exits_with_3_and_writes_the_best(store, tmp_path):
    out = tmp_path / "r"
    outcome = fails(3, "Raise --max-nfev", "fit", store, *DECAY, *START, "--max-nfev", "2", "--out", out, "--no-report")
    assert "NOT CONVERGED" in outcome.stdout
    found = load(out)
    assert not found.success and found.nfev == 2
    assert json.loads((out / "summary.json").read_text())["status"] == 0


@pytest.mark.slow
def test_damage_exits_with_4_or_is_left_out(store, tmp_path):
    (Path(store) / "c" / "3").write_bytes(b"")
    fails(4, r"chunk \(3,\) of `ydata`", "fit", store, *DECAY, *START)
    outcome = converges("fit", store, *DECAY, *START, "--on-bad-chunk", "mask")
    assert "1 damaged or absent chunks left out" in outcome.stdout
    (Path(store) / "c" / "3").unlink()
    fails(4, "1 of 10 chunks of `ydata`.* are absent", "fit", store, *DECAY, *START)
    (Path(store) / "zarr.json").write_bytes((Path(store) / "zarr.json").read_bytes()[:50])
    fails(4, r"y\.zarr/zarr\.json is damaged", "fit", store, *DECAY, *START)


@pytest.mark.parametrize(
    "message, arguments",
    [
        (r"no Zarr array at .*nothing\.zarr", ("fit", "nothing.zarr", *DECAY)),
        ("has no 'deacy'", ("fit", "STORE", "--model", "tests.models_of_a_user:deacy", "--x", "0:10:0.0005")),
        ("there is no module 'my_models'", ("fit", "STORE", "--model", "my_models:decay", "--x", "0:10:0.0005")),
        ("did you mean 'gaussian'", ("fit", "STORE", "--model", "gausian+line", "--x", "0:10:0.0005")),
        ("no ready model .__import__", ("fit", "STORE", "--model", "__import__('os')", "--x", "0:10:0.0005")),
        ("must be numbers, and step not 0", ("fit", "STORE", "--model", "line", "--x", "0:10:0")),
        ("must be numbers", ("fit", "STORE", "--model", "line", "--x", "0:10:10/20000")),
        ("values, but axis 0 has 20,000", ("fit", "STORE", "--model", "line", "--x", "0:1e30:1")),
        ("leaves out stop", ("fit", "STORE", *DECAY[:2], "--x", "0:10:0.001")),
        ("'d'.*the parameters are", ("fit", "STORE", *DECAY, "--p0", "a=1,b=1,c=1,d=1")),
        ("values go by name", ("fit", "STORE", *DECAY, "--p0", "1,2,3")),
        ("'one' is not a number", ("fit", "STORE", *DECAY, "--p0", "a=one")),
        ("names 'a' twice", ("fit", "STORE", *DECAY, "--fixed", "a=1,a=2")),
        ("two ends with a colon", ("fit", "STORE", *DECAY, "--bounds", "a=1")),
        ("only models from dask_nlsq.models can guess", ("fit", "STORE", *DECAY, "--p0", "guess")),
        ("No such option.*--p1.*dask|nlsq fit --help", ("fit", "STORE", *DECAY, "--p1", "a=1")),
        ("Missing argument 'STORE'", ("plan",)),
        ("No such command 'fti'", ("fti",)),
        ("'many' is not a valid", ("fit", "STORE", *DECAY, "--max-nfev", "many")),
        ("of_numpy .*jax.numpy", ("fit", "STORE", "--model", "tests.models_of_a_user:of_numpy", "--x", "0:10:0.0005")),
        (
            r"cannot be evaluated .*line \d+: return a \* x @",
            ("fit", "STORE", "--model", "tests.models_of_a_user:of_a_wrong_shape", "--x", "0:10:0.0005"),
        ),
        ("neither a result, nor a checkpoint, nor maps", ("info", "STORE")),
        ("no fit.json", ("resume", "STORE")),
    ],
)
def test_bad_usage_exits_with_2_and_one_line(message, arguments, store):
    outcome = fails(2, message, *(store if each == "STORE" else each for each in arguments))
    assert outcome.stdout == ""


def test_an_error_inside_the_model_exits_with_1_and_its_line(store):
    model = ("--model", "tests.models_of_a_user:with_a_typo", "--x", "0:10:0.0005")
    fails(1, r"NameError: name 'z'.*models_of_a_user.py, line \d+: return a", "fit", store, *model)


def test_a_cluster_that_cannot_be_reached_exits_with_1(store):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        fails(1, "tcp://127.0.0.1:1", "fit", store, *DECAY, *START, "--scheduler", "tcp://127.0.0.1:1")


def test_traceback_shows_the_rest(store):
    outcome = run("fit", store, "--model", "tests.models_of_a_user:with_a_typo", "--x", "0:10:0.0005", "--traceback")
    assert outcome.exit_code == 1
    assert "Traceback (most recent call last)" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("Error: NameError")


def test_only_a_result_is_replaced(store, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "today.txt").write_text("precious")
    fails(2, "exists and is not a result", "fit", store, *DECAY, *START, "--out", tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["today.txt"]
    fails(2, "`--out` .*today.txt is a file", "fit", store, *DECAY, *START, "--out", tmp_path / "notes" / "today.txt" / "r")
    for _ in range(2):
        converges("fit", store, *DECAY, *START, "--out", tmp_path / "r", "--no-report")


def test_no_report_of_an_earlier_fit_stays_beside_a_new_result(store, tmp_path):
    fit = ("fit", store, *DECAY, *START, "--out", tmp_path / "r")
    assert "report.html" in converges(*fit).stdout
    outcome = converges(*fit, "--no-report")
    assert "report.html" not in outcome.stdout and not (tmp_path / "r" / "report.html").exists()


def test_a_map_is_not_written_in_the_place_of_a_result(store, tmp_path):
    converges("fit", store, *DECAY, *START, "--out", tmp_path / "r", "--no-report")
    fails(2, "is not a map that to_zarr has begun: give another path", "map", store, *DECAY, "--out", tmp_path / "r")


@pytest.mark.slow
def test_a_single_spectrum_is_a_map_of_1_pixel(store, tmp_path):
    outcome = converges("map", store, *DECAY, *START, "--out", tmp_path / "m")
    for text in (outcome.stdout, converges("info", tmp_path / "m").stdout):
        assert ": 1 pixel, a, b, c of decay" in text and "\n1 of 1 converged" in text


def test_a_checkpoint_that_is_a_file_is_named(store, tmp_path):
    (tmp_path / "f").write_text("")
    for command in ("plan", "fit"):
        fails(2, "`checkpoint` .*f is a file", command, store, *DECAY, *START, "--checkpoint", tmp_path / "f")


@pytest.mark.slow
def test_a_fit_runs_on_a_scheduler_that_is_named(store, tmp_path, workers):
    expected = curve_fit(decay, 0 + 0.0005 * np.arange(N), store, P0, strategy="chunked")
    where = ("--scheduler", workers.scheduler.address)
    assert "worker" in converges("plan", store, *DECAY, *START, *where).stdout
    converges("fit", store, *DECAY, *START, *where, "--out", tmp_path / "r")
    found = load(tmp_path / "r")
    assert found.strategy == "chunked"
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# plan, info


def test_plan_reads_metadata_only(store, tmp_path):
    x = write(tmp_path / "x.zarr", X, (3000,))
    for path in (Path(store), Path(x)):
        for chunk in (path / "c").iterdir():
            chunk.write_bytes(b"not a chunk")
    model = ("--model", "tests.models_of_a_user:decay", "--x", x, *START)
    outcome = converges("plan", store, *model, "--strategy", "streaming")
    assert "strategy    streaming" in outcome.stdout and "20,000 points" in outcome.stdout
    fails(1, "raise --memory-limit to [0-9.]+", "plan", store, *model, "--memory-limit", "0.001")


def test_a_range_that_is_long_is_lazy_and_has_the_values_of_a_short_one(monkeypatch, store, tmp_path):
    expected = curve_fit(decay, 0 + 0.0005 * np.arange(N), store, P0, strategy="streaming")
    monkeypatch.setattr("dask_nlsq.interface.cli_values.MOST_KEPT", 8)
    checkpoint = ("--checkpoint", tmp_path / "c")
    converges("fit", store, *DECAY, *START, *checkpoint, "--out", tmp_path / "r", "--no-report")
    same_bits(load(tmp_path / "r"), expected)
    fails(2, "does not keep `xdata`", "resume", tmp_path / "c")
    converges("resume", tmp_path / "c", "--x", "0:10:0.0005", "--out", tmp_path / "again", "--no-report")
    same_bits(load(tmp_path / "again"), expected)


@pytest.mark.slow
def test_info_of_a_result_and_of_a_checkpoint(store, tmp_path):
    model = ("--model", "exponential+polynomial:0", "--x", "0:10:0.0005")
    out = ("--checkpoint", tmp_path / "c", "--max-nfev", "2", "--out", tmp_path / "r", "--no-report")
    fails(3, "maximum number", "fit", store, *model, "--p0", START_OF_A_SUM, *out)
    outcome = converges("info", tmp_path / "r")
    result = load(tmp_path / "r")
    assert result.summary() in outcome.stdout and result.diagnostics.lines[0] in outcome.stdout
    outcome = converges("info", tmp_path / "c")
    assert "dask_nlsq.models.exponential + polynomial(0) to " + store in outcome.stdout
    assert "finished sweeps: 2; lowest cost" in outcome.stdout
    converges("resume", tmp_path / "c", "--max-nfev", "100", "--out", tmp_path / "r", "--no-report")
    expected = curve_fit(exponential + polynomial(0), 0 + 0.0005 * np.arange(N), store, [20, 3, 90], strategy="streaming")
    found = load(tmp_path / "r")
    same_bits(found, expected)
    np.testing.assert_array_equal(found.predict(X[:9]), expected.predict(X[:9]))


START_OF_A_SUM = "exponential_amplitude=20,exponential_rate=3,polynomial_c0=90"


def test_sums_are_found_by_name_however_it_is_spelled():
    for spelling in ("gaussian + polynomial(2)", "gaussian+polynomial:2", "gaussian+polynomial2"):
        assert named(spelling).param_names == (gaussian + polynomial(2)).param_names
    assert named("g2_single").param_names[0] == "baseline"


# ---------------------------------------------------------------------------------------------------------------------
# map


@pytest.mark.slow
def test_map_goes_on_with_what_is_there_and_counts_pixels(tmp_path):
    energy = np.linspace(9, 11, 40, endpoint=False)
    rng = np.random.default_rng(0)
    spectra = 50 * np.exp(-(((energy - rng.uniform(9.6, 10.4, (6, 4, 1))) / 0.3) ** 2)) + rng.normal(size=(6, 4, 40))
    spectra[0, 0] = np.nan
    counts, x = write(tmp_path / "counts.zarr", spectra, (3, 4, 40)), write(tmp_path / "x.zarr", energy, (40,))
    start = ("--p0", "amplitude=50,center=10,width=0.3", "--bounds", "width=0.01:2")
    arguments = ("map", counts, "--model", "gaussian", "--x", x, *start, "--out", tmp_path / "m.zarr")
    outcome = converges(*arguments)
    assert "23 of 24 converged" in outcome.stdout and re.search(r"1 +masked", outcome.stdout)
    fails(2, "exists: continue it", *arguments)
    assert converges(*arguments, "--resume").stdout == outcome.stdout == converges("info", tmp_path / "m.zarr").stdout
    group = zarr.open_group(tmp_path / "m.zarr")
    expected = fit_map(gaussian, x, counts, [50, 10, 0.3], bounds=dict(width=(0.01, 2))).compute()
    np.testing.assert_array_equal(group["popt"][...], expected.popt)
    group["done"][0] = 0
    assert "1 of 2 blocks are done" in converges("info", tmp_path / "m.zarr").stdout
    nothing = write(tmp_path / "nothing.zarr", np.full_like(spectra, np.nan), (3, 4, 40))
    fails(3, "no pixel converged", "map", nothing, *arguments[2:-1], tmp_path / "none.zarr")
    (Path(counts) / "c" / "1" / "0" / "0").write_bytes(b"")
    fails(4, r"chunk \(1, 0, 0\) of `ydata`", *arguments[:-1], tmp_path / "damaged.zarr")
    outcome = converges(*arguments[:-1], tmp_path / "masked.zarr", "--on-bad-chunk", "mask")
    assert "11 of 24 converged" in outcome.stdout and re.search(r"13 +masked", outcome.stdout)
    (Path(counts) / "c" / "1" / "0" / "0").unlink()
    fails(4, "1 of 2 chunks.*--missing-chunks", *arguments[:-1], tmp_path / "missing.zarr")
    again = converges(*arguments[:-1], tmp_path / "missing.zarr", "--missing-chunks", "mask")
    assert "11 of 24 converged" in again.stdout


# ---------------------------------------------------------------------------------------------------------------------
# in a shell

DASK = Path(sys.executable).parent / "dask"


def shell(*arguments, **options):
    command = [DASK, "nlsq", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_groups_is_fit_groups_along_axes_or_by_label(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.uniform(50, 90, (6, 1)) * np.exp(-0.5 * X[::200]) + 30 + rng.normal(0, 1, (6, N // 200))
    store, labels = write(tmp_path / "y.zarr", y, (2, 50)), write(tmp_path / "run.zarr", np.arange(6)[:, None], (6, 1))
    model = ("--model", "tests.models_of_a_user:decay", "--local", "a,c", *START)
    outcome = converges("groups", store, *model, "--x", "0:10:0.1", "--group-axes", 0, "--out", tmp_path / "out")
    assert "6 of 6 groups, each with a, c" in outcome.output
    found = load(tmp_path / "out")
    expected = fit_groups(decay, X[::200], y, P0, local=("a", "c"), group_axes=0)
    np.testing.assert_allclose(found.popt, expected.popt, rtol=1e-7)
    assert found.local.popt.shape == (6, 3)
    assert "local.zarr" in converges("info", tmp_path / "out").output
    write(tmp_path / "x.zarr", np.tile(X[::200], (6, 1)), (6, 100))
    converges("groups", store, *model, "--x", tmp_path / "x.zarr", "--groups", labels, "--out", tmp_path / "other")
    np.testing.assert_allclose(load(tmp_path / "other").popt, expected.popt, rtol=1e-7)
    fails(2, "give either", "groups", store, *model, "--x", "0:10:0.1")
    fails(2, "`local` names 'b2'", "groups", store, *model, "--local", "b2", "--x", "0:10:0.1", "--group-axes", 0)


@pytest.mark.slow
def test_a_model_of_the_current_directory_is_found_by_the_executable(store, tmp_path):
    (tmp_path / "own.py").write_text("def straight(x, a, b):\n    return a * x + b\n")
    process = shell("fit", "y.zarr", "--model", "own:straight", "--x", "0:10:0.0005", "--out", "r", cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "converged" in output and "result.json, summary.json, report.html" in output


@pytest.mark.slow
def test_a_fit_that_is_told_to_leave_exits_with_3_and_is_resumed_to_the_same_bits(tmp_path):
    n = 1_000_000
    rng = np.random.default_rng(3)
    store = write(tmp_path / "y.zarr", rng.poisson(np.exp(-np.arange(n) / n) * 50).astype("u2"), (5_000,))
    model = ("--model", "tests.models_of_a_user:decay", "--x", f"0:{n}:1", "--p0", "a=9,b=9e-7,c=9")
    fit = ("fit", store, *model, "--strategy", "streaming")
    converges(*fit, "--out", tmp_path / "whole", "--no-report")
    checkpoint, log = tmp_path / "c", tmp_path / "log"
    out = ("--no-report", "--out", tmp_path / "r")
    process = shell(*fit, "--checkpoint", checkpoint, *out, "--log", log, cwd=ROOT)
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "Stopped by a signal" in errors and f"ontinue with dask nlsq resume {checkpoint}" in errors
    assert load(tmp_path / "r").status == -3
    converges("resume", checkpoint, *out)
    same_bits(load(tmp_path / "r"), load(tmp_path / "whole"))


@pytest.mark.parametrize("command", ["fit", "groups"])
def test_ctrl_c_without_a_checkpoint_prints_and_writes_the_best_so_far(tmp_path, command):
    y = np.random.default_rng(3).poisson(np.exp(-np.arange(1_000_000) / 1e6) * 50).astype("u2").reshape(200, 5_000)
    model = ("--model", "tests.models_of_a_user:decay", "--p0", "a=9,b=9e-3,c=9", "--strategy", "streaming")
    store = write(tmp_path / "y.zarr", y.ravel() if command == "fit" else y, (5_000,) if command == "fit" else (1, 5_000))
    rest = ("--x", "0:1000:0.001") if command == "fit" else ("--x", "0:5:0.001", "--local", "c", "--group-axes", 0)
    log = tmp_path / "log"

    def ctrl_c():
        while not (log.exists() and log.read_text()):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    pressed = threading.Thread(target=ctrl_c, daemon=True)
    pressed.start()
    outcome = fails(3, "stopped by Ctrl-C", command, store, *model, *rest, "--out", tmp_path / "r", "--log", log)
    pressed.join()
    found = load(tmp_path / "r")
    assert found.summary() in outcome.stdout and found.status == -3
    assert not (tmp_path / "r" / "report.html").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
@pytest.mark.filterwarnings("default")  # as on a command line
def test_a_log_on_a_full_disk_ends_no_fit(store, tmp_path):
    outcome = converges("fit", store, *DECAY, *START, "--log", "/dev/full", "--out", tmp_path / "r", "--no-report")
    assert outcome.stderr.count("--log /dev/full could not be written: No space left on device") == 1
    assert len(load(tmp_path / "r").history) > 1


# ---------------------------------------------------------------------------------------------------------------------
# demo


@pytest.mark.slow
def test_demo_prints_its_report(tmp_path):
    arguments = ["demo", "--frames", "40", "--angles", "5", "--seed", "0", "--directory", str(tmp_path / "demo")]
    outcome = CliRunner().invoke(nlsq, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "5 angles x 40 x 40 frames = 8,000 points, 17 parameters" in outcome.stdout
    assert (tmp_path / "demo" / "demo.png").exists()
    assert outcome.stderr == ""


@pytest.mark.slow
def test_demo_that_misses_the_truth_exits_with_one_line_and_status_1(tmp_path, monkeypatch):
    monkeypatch.setattr(simulated, "simulate_plane", lambda measurement, k: np.where(np.eye(40), np.nan, 1.1 + 0.1 * k))
    arguments = ["demo", "--frames", "40", "--angles", "5", "--directory", str(tmp_path / "demo")]
    outcome = CliRunner().invoke(nlsq, arguments)
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1


def test_option_that_cannot_work_exits_with_one_line_and_status_1(tmp_path):
    outcome = CliRunner().invoke(nlsq, ["demo", "--frames", "5", "--directory", str(tmp_path)])
    assert outcome.exit_code == 1
    assert outcome.stderr == "Error: frames = 5: at least 20 are needed to determine all parameters\n"


@pytest.mark.parametrize("command", ["demo", "fit", "info", "map", "plan", "resume"])
def test_help_names_the_options(command):
    outcome = converges(command, "--help")
    options = [each for each in nlsq.commands[command].params if each.param_type_name == "option"]
    assert all(option.opts[0] in outcome.stdout for option in options)
    assert command == "demo" or f"\n  dask nlsq {command} " in outcome.stdout  # an example


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fit --xr", {"--xrange"}),
        ("fit --prog", {"--progress"}),
        ("fit --strategy st", {"standard", "streaming"}),
        ("fit --model lorentzian+gau", {"lorentzian+gaussian"}),
    ],
)
def test_tab_completes_commands_options_choices_and_models(words, found):
    *before, last = words.split()
    completed = ShellComplete(nlsq, {}, "nlsq", "_NLSQ_COMPLETE").get_completions(before, last)
    assert {each.value for each in completed} == found


@pytest.mark.slow
def test_tab_completes_in_a_shell_what_dask_starts():
    words = dict(_DASK_COMPLETE="bash_complete", COMP_WORDS="dask nlsq fi", COMP_CWORD="2")
    outcome = subprocess.run([Path(sys.executable).parent / "dask"], env=os.environ | words, capture_output=True, text=True)
    assert outcome.stdout == "plain,fit\n"


def test_tab_completes_paths_of_stores():
    (one,) = ShellComplete(nlsq, {}, "nlsq", "_NLSQ_COMPLETE").get_completions(["fit"], "scan")
    assert one.type == "file"


def test_progress_is_shown_where_it_is_asked_for(store):
    assert "sweeps" in converges("fit", store, *DECAY, *START, "--progress").stderr
    assert "sweeps" not in converges("fit", store, *DECAY, *START, "--no-progress").stderr


def test_dask_finds_the_command():
    (entry,) = entry_points(group="dask_cli", name="nlsq")
    assert entry.load() is nlsq


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_dask_nlsq_demo_runs_in_a_shell(tmp_path):
    command = [sys.executable, "-m", "dask", "nlsq", "demo", "--frames", "5", "--directory", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr == "Error: frames = 5: at least 20 are needed to determine all parameters\n"


def test_info_says_that_a_fit_is_complete_and_how_its_model_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    x = np.linspace(0, 1, 50)
    curve_fit(decay, x, np.asarray(decay(x, 2.0, 1.0, 1.0)), [1, 2, 0.5], checkpoint=tmp_path / "c")
    text = converges("info", tmp_path / "c").stdout
    assert "complete: " in text and "to continue" not in text
    assert f"dask nlsq resume {tmp_path / 'c'} --models . --out result" in text
    (tmp_path / "c" / "end.npz").unlink()
    assert converges("info", tmp_path / "c").stdout.endswith(f"to continue: dask nlsq resume {tmp_path / 'c'} --models .\n")
