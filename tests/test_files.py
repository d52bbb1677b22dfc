"""Files of ours are files of anyone: what they name is read, written, removed and imported only where that is allowed."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from dask_nlsq import CheckpointError, DamagedFileError, UntrustedError, curve_fit, fit_groups, fit_map, load, resume
from dask_nlsq.base.disk import named_when_full
from dask_nlsq.base.files import ABANDONED, read_json, remove_left, write_arrays, write_json
from dask_nlsq.engine import checkpoint as kept
from dask_nlsq.interface.cli import nlsq
from dask_nlsq.results import schema
from tests.checkpointed import decay

X = np.linspace(0, 5, 400)
Y = 2 * np.exp(-0.7 * X) + 0.5 + 0.1 * np.random.default_rng(0).standard_normal(X.size)
P0 = [1.0, 1.0, 0.1]


def wide(x, *params):
    """So many parameters that a file of arrays is written."""
    return sum(p * x**k for k, p in enumerate(params))


@pytest.fixture(scope="module")
def fitted():
    return curve_fit(wide, X, Y, p0=np.ones(9), ftol=1e-4)


@pytest.fixture
def store(tmp_path):
    return str(zarr.create_array(tmp_path / "y.zarr", data=Y, chunks=(50,)).store.root)


def changed(path, version, **values):
    """A JSON file with other values and the right checksum, as anybody can write it."""
    found = read_json(path, version)
    path.unlink()  # which may be a link
    write_json(path, **found | values)


# ---------------------------------------------------------------------------------------------------------------------
# places


@pytest.fixture
def taken(fitted, checkpoint, store, tmp_path):
    """Directories that are something already."""
    fitted.save(tmp_path / "result")
    zarr.create_group(tmp_path / "old.zarr", zarr_format=2)
    return {
        "a Zarr store": Path(store), "a Zarr store of format 2": tmp_path / "old.zarr",
        "a saved result": tmp_path / "result", "a checkpoint": checkpoint,
    }  # fmt: skip


def listing(path):
    return sorted(each.name for each in path.iterdir())


GROUPS = dict(ydata=Y.reshape(4, 100), p0=P0, local=["a"], group_axes=0)


@pytest.mark.parametrize("what", ["a Zarr store", "a Zarr store of format 2", "a saved result"])
def test_a_checkpoint_is_not_written_into_something_else(taken, store, what):
    path = taken[what]
    before = listing(path)
    message = f"`checkpoint` .*{path.name} is {what.removesuffix(' of format 2')}: give the path of another directory"
    with pytest.raises(ValueError, match=message):
        curve_fit(decay, X, store, P0, checkpoint=path)
    with pytest.raises(ValueError, match=message):
        fit_groups(decay, X[:100], **GROUPS, checkpoint=path)
    assert listing(path) == before


@pytest.mark.parametrize("what", ["a Zarr store", "a Zarr store of format 2", "a checkpoint"])
def test_a_result_is_not_saved_into_something_else(fitted, taken, what):
    path = taken[what]
    before = listing(path)
    message = f"`path` .*{path.name} is {what.removesuffix(' of format 2')}: give the path of another directory"
    for result in (fitted, fit_groups(decay, X[:100], **GROUPS)):
        with pytest.raises(ValueError, match=message):
            result.save(path)
    assert listing(path) == before


def test_a_checkpoint_and_a_result_may_be_in_a_directory_that_is_there(fitted, store, tmp_path):
    for name in ("c", "r"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        assert curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c").success
        fitted.save(tmp_path / "r")


@pytest.fixture
def read_only(fitted, tmp_path):
    """A directory in which this process may not write."""
    fitted.report(tmp_path / "a.html")  # which imports what another user may not read
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    user = os.geteuid()
    if not user:  # root may everywhere
        os.seteuid(65534)
    try:
        yield path
    finally:
        os.seteuid(user)
        shutil.rmtree(path)


@pytest.mark.parametrize("below", ["", "new"])
def test_a_place_that_may_not_be_written_is_named_as_it_was_given(fitted, read_only, below):
    path, way_out = read_only / below, r" could not be written \(Permission denied\): give a path where you may write"
    writers = [
        lambda: fitted.save(path),
        lambda: curve_fit(decay, X, Y, P0, strategy="streaming", checkpoint=path),
        lambda: fit_groups(decay, X[:100], **GROUPS, checkpoint=path),
        lambda: fit_map(decay, X[:100], GROUPS["ydata"], P0).to_zarr(path),
    ]
    for write in writers:
        with pytest.raises(PermissionError, match=rf"{path}\S*{way_out}"):
            write()
    with pytest.raises(PermissionError, match=rf"{read_only}/a\.html{way_out}"):
        fitted.report(read_only / "a.html")


def test_a_limit_of_the_size_of_files_is_not_taken_for_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"a\.npz could not be written \(File too large\): it takes .*ulimit -f") as raised:
            write_arrays(tmp_path / "a.npz", dict(a=np.zeros(1000)), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "left" not in str(raised.value)


def test_a_quota_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="the quota of its disk is used up") as raised, named_when_full(tmp_path, 10):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "left" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# results


@pytest.mark.hostile
@pytest.mark.parametrize(
    "name", ["../victim", "/victim", "victim", 5, ["victim"], "", "arrays-x.npz", "../arrays-" + "0" * 32 + ".npz"]
)
def test_a_result_reads_and_removes_no_file_but_its_own(fitted, tmp_path, name):
    victims = [tmp_path / "victim", tmp_path / "r" / "victim", tmp_path / f"arrays-{'0' * 32}.npz"]
    fitted.save(tmp_path / "r")
    for victim in victims:
        victim.write_text("precious")
    changed(tmp_path / "r" / "result.json", schema.VERSION, arrays=str(victims[0]) if name == "/victim" else name)
    with pytest.raises(DamagedFileError, match=r"result\.json is damaged \(it names .* as its arrays"):
        load(tmp_path / "r")
    fitted.save(tmp_path / "r")
    assert all(victim.read_text() == "precious" for victim in victims)
    np.testing.assert_array_equal(load(tmp_path / "r").popt, fitted.popt)


@pytest.mark.hostile
@pytest.mark.parametrize("which", ["result.json", "arrays"])
def test_links_out_of_a_result_are_not_followed(fitted, tmp_path, which):
    fitted.save(tmp_path / "r")
    (file,) = (tmp_path / "r").glob(f"{which}*")
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(DamagedFileError, match=r"is a link to .*elsewhere, outside of its directory"):
        load(tmp_path / "r")
    fitted.save(tmp_path / "r")
    assert (tmp_path / "elsewhere").read_bytes() == before and not file.is_symlink()
    load(tmp_path / "r")
    (tmp_path / "link").symlink_to(tmp_path / "r")  # which the user names
    load(tmp_path / "link")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe", b"{", b"[1]", b"null", b'{"version": 6}', b'{"version": 6, "arrays": 1}']
)
def test_a_damaged_old_result_never_prevents_saving_a_new_one(fitted, tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"result\.json is damaged"):
        load(tmp_path)
    fitted.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).popt, fitted.popt)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "change", [dict(sweeps="<script>"), dict(message=5), dict(popt=[1.0]), dict(param_names={"tuple": [1]}), dict(cost=None)]
)
def test_a_result_of_other_types_is_refused_at_the_door(fitted, tmp_path, change):
    fitted.save(tmp_path)
    found = read_json(tmp_path / "result.json", schema.VERSION)["result"]
    found["fields"] |= change
    changed(tmp_path / "result.json", schema.VERSION, result=found)
    with pytest.raises(DamagedFileError, match=f"TypeError: {next(iter(change))} is not of"):
        load(tmp_path)


@pytest.mark.hostile
def test_arrays_that_are_objects_are_never_loaded_nor_is_it_advised(fitted, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    fitted.save(tmp_path)
    (file,) = tmp_path.glob("*.npz")
    write_arrays(file, {"result.pcov": np.array([Evil()])}, schema.VERSION)
    with pytest.raises(DamagedFileError, match="it contains something other than arrays of numbers"):
        load(tmp_path)
    assert not (tmp_path / "run").exists()


def test_what_killed_writers_have_left_is_removed_once_nobody_can_be_writing_it(fitted, store, tmp_path):
    (tmp_path / "c" / "locals").mkdir(parents=True)
    (tmp_path / "r").mkdir()
    old = [tmp_path / "c" / f".data.npz.{'a' * 32}", tmp_path / "c" / "locals" / f".1-0.npz.{'b' * 32}"]
    old += [tmp_path / "r" / f".result.json.{'c' * 32}", tmp_path / "r" / f"arrays-{'d' * 32}.npz"]
    others = [tmp_path / "r" / "arrays-run7.npz", tmp_path / "r" / ".data.npz.1"]
    new = [path.with_name(path.name[:-6] + "e" * 6) for path in old[:3]]
    for path in (*old, *others, *new):
        path.write_text("")
    for path in (*old, *others):
        os.utime(path, times=(time.time() - 1.1 * ABANDONED,) * 2)
    fitted.save(tmp_path / "r")
    curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    assert not any(path.exists() for path in old) and all(path.exists() for path in (*others, *new))


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_result_stays_whole_where_the_clock_of_its_disk_is_another_one(fitted, tmp_path, monkeypatch, hours):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + hours * 3600)
    fitted.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).pcov, fitted.pcov)


def test_the_arrays_of_a_result_are_kept_however_old_they_are(fitted, tmp_path):
    fitted.save(tmp_path)
    (arrays,) = tmp_path.glob("arrays-*")
    os.utime(arrays, times=(time.time() - 1.1 * ABANDONED,) * 2)
    remove_left(tmp_path, schema.BESIDE["arrays"], kept=schema.beside(tmp_path)["arrays"])
    np.testing.assert_array_equal(load(tmp_path).pcov, fitted.pcov)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_forces_no_directory_is_no_failure_and_one_that_fails_is(tmp_path, monkeypatch, number):
    force = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        force(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="Input/output") if number == errno.EIO else nullcontext():
        write_json(tmp_path / "a.json", version=1)
    assert read_json(tmp_path / "a.json", 1) == dict(version=1)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.fixture
def checkpoint(store, tmp_path):
    curve_fit(decay, X, store, P0, checkpoint=tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", ["state", "data"])
def test_a_file_of_another_fit_is_not_taken_for_one_of_this(checkpoint, store, tmp_path, name):
    curve_fit(decay, X, store, [1.1, 1.0, 0.1], checkpoint=tmp_path / "other")
    shutil.copy(tmp_path / "other" / f"{name}.npz", checkpoint)
    with pytest.raises(CheckpointError, match=rf"{name}\.npz belongs to another fit than the fit\.json beside it"):
        resume(checkpoint)


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["locals", "state.npz", "fit.json"])
def test_links_out_of_a_checkpoint_are_not_followed(checkpoint, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFileError, match=rf"c/{name} is damaged \(it is a link to"):
        resume(checkpoint)
    assert not [*(tmp_path / "elsewhere").iterdir()]


CALLS = [
    dict(model=5),
    dict(model=["a"]),
    dict(data=[]),
    dict(data=dict(xdata=1)),
    dict(data=dict(ydata={"word": "http://127.0.0.1:9/y.zarr"})),
    dict(data=dict(performance_report={"path": "/tmp/x"})),
    dict(options=dict(performance_report="/tmp/x")),
    dict(options=dict(mask="http://127.0.0.1:9/y.zarr")),
    dict(options=dict(checkpoint="/tmp/x")),
    dict(options=[]),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.hostile
def test_a_call_that_is_none_is_damage(checkpoint, call):
    found = read_json(checkpoint / "fit.json", kept.VERSION)["call"]
    changed(checkpoint / "fit.json", kept.VERSION, call=found | call)
    with pytest.raises(DamagedFileError, match=r"fit\.json is damaged"):
        resume(checkpoint)


def names(checkpoint, model=None, place=None):
    """Let a checkpoint name another model, or another place of its data."""
    call = read_json(checkpoint / "fit.json", kept.VERSION)["call"]
    if model:
        call["model"] = model
    if place:
        call["data"]["ydata"] = {"path": place}
    changed(checkpoint / "fit.json", kept.VERSION, call=call)


def own_module(folder, name):
    """A module whose import leaves a trace."""
    (folder / f"{name}.py").write_text(f"""
import pathlib
pathlib.Path({str(folder / "trace")!r}).touch()
from tests.checkpointed import decay as found
def decay(x, a, b, c):
    return found(x, a, b, c)
""")
    return folder / "trace"


@pytest.mark.hostile
def test_a_checkpoint_imports_modules_of_packages_alone_unless_it_is_trusted(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    trace = own_module(tmp_path, "own_of_trust")
    names(checkpoint, model=["own_of_trust", "decay"])
    for trust in (False, tmp_path / "c"):
        with pytest.raises(
            UntrustedError,
            match=r"own_of_trust \(.*own_of_trust\.py\) does not belong to an installed .*name the directory",
        ):
            resume(checkpoint, trust=trust)
    assert not trace.exists()
    assert resume(checkpoint, decay).success and capsys.readouterr().out == f"{checkpoint}: opens {tmp_path / 'y.zarr'}\n"
    assert resume(checkpoint, trust=tmp_path).success and trace.exists()
    said = f"imports own_of_trust.decay ({tmp_path / 'own_of_trust.py'}); opens {tmp_path / 'y.zarr'}\n"
    assert capsys.readouterr().out == f"{checkpoint}: {said}"
    assert resume(checkpoint).success  # it is imported already


def test_a_model_is_imported_from_the_directory_that_is_trusted(checkpoint, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    own_module(tmp_path / "models", "own_of_directory")
    (tmp_path / "models" / "own_beside.py").write_text("from own_of_directory import decay")
    (tmp_path / "models" / "numbers.py").write_text("raise SystemExit('it hides a module of Python')")
    names(checkpoint, model=["own_beside", "decay"])
    before = [*sys.path]
    with pytest.raises(CheckpointError, match=r"no module 'own_beside' .*\. Pass it.* name the directory of its module"):
        resume(checkpoint, trust=True)
    with pytest.raises(
        CheckpointError, match=rf"no module 'own_beside' .*{tmp_path / 'c'}\)\. Pass it, as in resume\(path, f\)$"
    ):
        resume(checkpoint, trust=tmp_path / "c")
    assert resume(checkpoint, trust=tmp_path / "models").success
    assert f"imports own_beside.decay ({tmp_path / 'models' / 'own_beside.py'})" in capsys.readouterr().out
    names(checkpoint, model=["numbers", "decay"])
    with pytest.raises(CheckpointError, match="cannot import the model again"):
        resume(checkpoint, trust=tmp_path / "models")
    assert sys.path == before


def test_a_loaded_result_imports_its_model_from_the_directory_that_is_trusted(tmp_path):
    (tmp_path / "models").mkdir()
    own_module(tmp_path / "models", "own_of_loaded")
    curve_fit(decay, X, Y, P0).save(tmp_path / "r")
    found = read_json(tmp_path / "r" / "result.json", schema.VERSION)["result"]
    found["fields"]["model"]["fields"]["name"] = ["own_of_loaded", "decay"]
    changed(tmp_path / "r" / "result.json", schema.VERSION, result=found)
    assert np.isfinite(load(tmp_path / "r", trust=tmp_path / "models").predict(X)).all()


def test_the_command_line_names_its_own_options_for_a_model(checkpoint):
    names(checkpoint, model=["own_of_nowhere", "decay"])
    said = CliRunner().invoke(nlsq, ["resume", str(checkpoint)])
    assert said.exit_code == 2
    assert "Name it, as in --model module:function, or name the directory of its module, as in --models DIR" in said.stderr
    assert "resume(path" not in said.stderr


@pytest.mark.hostile
def test_a_package_is_judged_before_its_modules_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise SystemExit('it has run')")
    own_module(tmp_path / "own_package", "inner")
    for name in ("own_package.inner", "own_package"):
        names(checkpoint, model=[name, "decay"])
        with pytest.raises(UntrustedError, match="own_package"):
            resume(checkpoint)


@pytest.mark.hostile
@pytest.mark.parametrize("place", ["http://127.0.0.1:9/y.zarr", "memory://y", "simplecache::/y", "file:///y"])
def test_a_checkpoint_opens_no_address_unless_it_is_trusted(checkpoint, place):
    names(checkpoint, place=place)
    with pytest.raises(UntrustedError, match=f"opens {place} as `ydata`: pass ydata yourself, or trust=True"):
        resume(checkpoint)


@pytest.mark.slow
@pytest.mark.hostile
def test_resume_on_the_command_line_says_what_it_imports_and_asks_for_trust(checkpoint, tmp_path):
    trace = own_module(tmp_path, "own_of_line")
    names(checkpoint, model=["own_of_line", "decay"])

    def command(*options):
        command = [sys.executable, "-m", "dask", "nlsq", "resume", str(checkpoint), *options]
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    refused = command()
    assert refused.returncode == 2 and "own_of_line" in refused.stderr and not trace.exists()
    found = command("--models", ".")
    assert found.returncode == 0, found.stderr
    assert f"imports own_of_line.decay ({tmp_path / 'own_of_line.py'}); opens" in found.stdout and trace.exists()


@pytest.mark.hostile
@pytest.mark.parametrize("command", ["info", "resume"])
def test_a_terminal_gets_no_commands_from_a_file(checkpoint, command, tmp_path):
    names(checkpoint, model=["own\x1b]0;title\x07", "decay"], place=f"{tmp_path}/\x1b[2J")
    said = CliRunner().invoke(nlsq, [command, str(checkpoint)])
    assert "title" in said.output and not {"\x1b", "\x07"} & {*said.output}
    fitted = curve_fit(decay, X, Y, P0, param_names=["\x1b[2J", "b", "c"])
    fitted.save(tmp_path / "r")
    said = CliRunner().invoke(nlsq, ["info", str(tmp_path / "r")])
    assert "\N{REPLACEMENT CHARACTER}[2J" in said.output and "\x1b" not in said.output


def test_help_of_resume_names_what_may_be_trusted():
    said = CliRunner().invoke(nlsq, ["resume", "--help"]).output
    assert "--trust" in said and "--models" in said


@pytest.mark.hostile
def test_a_loaded_result_imports_its_model_under_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    trace = own_module(tmp_path, "own_of_result")
    curve_fit(decay, X, Y, P0).save(tmp_path / "r")
    found = read_json(tmp_path / "r" / "result.json", schema.VERSION)["result"]
    found["fields"]["model"]["fields"]["name"] = ["own_of_result", "decay"]
    changed(tmp_path / "r" / "result.json", schema.VERSION, result=found)
    with pytest.raises(UntrustedError, match=r"own_of_result .*f\(x, \*result\.popt\), or load it with trust"):
        load(tmp_path / "r").predict(X)
    assert not trace.exists()
    assert np.isfinite(load(tmp_path / "r", trust=True).predict(X)).all() and trace.exists()


# ---------------------------------------------------------------------------------------------------------------------
# copies of stores


def copied(store, place, times):
    shutil.copytree(store, place, copy_function=shutil.copy2 if times else shutil.copyfile)
    for file in [] if times else Path(place).rglob("*"):
        os.utime(file, times=(time.time() + 5,) * 2)
    return str(place)


@pytest.mark.parametrize("times", [True, False], ids=["times kept", "new times"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_copy_of_a_store_is_recognised_by_its_content(checkpoint, store, tmp_path, times, elsewhere):
    copy = copied(store, tmp_path / "copy.zarr", times)
    if not elsewhere:
        shutil.rmtree(store)
        copy = shutil.move(copy, store)
    assert resume(checkpoint, ydata=copy).success


@pytest.mark.parametrize("what", ["a chunk is younger", "other values"])
def test_a_store_that_was_written_to_is_not_a_copy(checkpoint, store, tmp_path, what):
    if what == "a chunk is younger":
        os.utime(Path(store) / "c" / "3", times=(time.time() + 5,) * 2)
    else:
        array = zarr.open_array(store, mode="r+")
        array[...] = Y[::-1]
        store = copied(store, tmp_path / "copy.zarr", False)
    with pytest.raises(CheckpointError, match="`ydata` in its store"):
        resume(checkpoint, ydata=store)
