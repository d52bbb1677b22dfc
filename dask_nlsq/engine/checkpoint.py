"""The files from which a killed fit is resumed.

A directory of plain files: ``fit.json`` identifies the fit, ``sample.npz`` contains the sample that it began with, and
``state.npz`` all completed sweeps and the partial current one. The state of the solver is not saved: given the same sweeps,
it takes the same steps. So a resumed fit runs from its start, and finds its first sweeps already done. Segments are large,
and only saved of the points where the fit may end.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..base.files import (
    FIT_FILE,
    DamagedFileError,
    check_directory,
    check_links,
    check_place,
    checksum,
    make_directory,
    read_arrays,
    read_json,
    remove_left,
    sum_of_values,
    write_arrays,
    write_json,
)
from ..base.modules import Trust, UntrustedError, import_by, import_name, origin
from ..base.text import printable
from ..base.values import is_address
from ..base.warn import warn
from ..data.align import Data
from ..data.arrays import apart, has_masked, on_disk, stacked
from ..data.store import is_stored, same_store
from ..kernels.checks import fingerprint
from ..model.function import Model, function_name, own_function
from ..options import GROUPS, LIMITS, SAME, is_reweighted

END = "end"  # file of a fit that has converged
VERSION = 8  # of the files
LOCALS = "locals"
DATA = {"xdata", "ydata", "sigma", "mask", "groups"}  # arguments of fits that are
NOT_KEPT = DATA | {"jac", "checkpoint", "callback", "progress", "verbose"}  # of all arguments, among the options
WAY_OUT = "Pass it, as in resume(path, f)"
OF_MODULE = ', or name the directory of its module, as in trust="models"'
MOST_KEPT = 2**26  # bytes of an array in memory that is kept, so that `resume` needs the path alone


class CheckpointError(ValueError):
    """A checkpoint that belongs to another fit, or that is incomplete."""


class Checkpoint:
    """The directory at ``path``.

    Parameters
    ----------
    path : path
        Created where it is missing.
    identity : dict
        What makes the fit the fit that it is, plain values by name.
    call : dict
        What `read_call` needs to make it again.
    arrays : dict
        Arrays that belong to the call.

    Raises
    ------
    CheckpointError
        Where ``path`` has a checkpoint of another fit; the message lists what differs.
    NotADirectoryError, ValueError
        Where it is a file, a Zarr store or a saved result.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], call: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ):
        self.path, self.failed, self.warned = Path(path).absolute(), "", False
        make_directory("checkpoint", self.path, FIT_FILE)
        check_links(self.path)
        for directory in (self.path, *filter(Path.is_dir, [self.path / LOCALS])):
            remove_left(directory)
        begun = (self.path / FIT_FILE).exists()
        if begun:
            identity = _compare(self.path, identity)
        self.fit = _name_of(identity)
        if begun:
            self.load(END)  # an error where it is damaged
        else:
            if arrays:
                self.save("data", arrays)
            write_json(self.path / FIT_FILE, version=VERSION, identity=identity, call=call)

    def save(self, name: str, arrays: Mapping[str, np.ndarray], **values) -> None:
        """Write arrays and JSON values as ``name.npz``, all or nothing."""
        path = self.path / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        write_arrays(path, arrays, VERSION, fit=self.fit, **values)

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """Within, a disk that is full or fails does not end the fit: it is warned of once, and the next save tries again."""
        try:
            yield
            self.failed = ""
        except OSError as err:
            self.failed = f"{type(err).__name__}: {err}"
            if not self.warned:
                self.warned = True
                warn(
                    f"the fit goes on, but its checkpoint {self.path} could not be written ({self.failed}): each later save "
                    "tries it again",
                    RuntimeWarning,
                )

    def end(self) -> None:
        """Warn where the end of the fit is not kept."""
        if self.failed:
            warn(
                f"the fit is not resumable from where it ended, since its checkpoint {self.path} could not be written "
                f"({self.failed}): save the result elsewhere",
                RuntimeWarning,
            )

    def load(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """What `save` has written under ``name``; None where it has not."""
        return _read(self.path / f"{name}.npz", self.fit)


def _name_of(identity: Mapping[str, Any]) -> str:
    """In each file of a fit, so that none of another one is taken for it."""
    return checksum(json.dumps(identity, sort_keys=True).encode()).hex()


def _read(path: Path, fit: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    try:
        arrays, values = read_arrays(path, VERSION, CheckpointError)
    except FileNotFoundError:
        return None
    if values.pop("fit", None) != fit:
        raise CheckpointError(
            f"{path} belongs to another fit than the {FIT_FILE} beside it: remove it, or give another path"
        )
    return arrays, values


def _compare(path: Path, identity: Mapping[str, Any], unknown: Collection[str] = ()) -> dict[str, Any]:
    """The identity of the checkpoint at ``path``; a CheckpointError where it is of another fit, as far as is known yet."""
    known = read_fit(path)["identity"]
    new = json.loads(json.dumps(identity))
    changed = [
        _difference(name, known.get(name), new.get(name))
        for name in sorted((known.keys() | new.keys()) - {*unknown})
        if json.dumps(known.get(name)) != json.dumps(new.get(name))  # as text: NaN is NaN
        and not same_store(known.get(name), new.get(name))
    ]
    if changed:
        raise CheckpointError(
            f"`checkpoint` {path} belongs to another fit. Changed: {'; '.join(changed)}. Give the same arguments, or "
            "another path"
        )
    return known


def read_fit(path: Path) -> dict[str, Any]:
    """``fit.json``: ``identity`` and ``call`` of the fit.

    Raises
    ------
    CheckpointError
        No checkpoint, or one of another version; a `DamagedFileError` for a damaged one.
    """
    try:
        found = read_json(path / FIT_FILE, VERSION, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {FIT_FILE}") from None
    match found:
        case {"identity": dict(), "call": {"model": None | [str(), str()], "data": dict(data), "options": dict(options)}}:
            # what is not among these may name a file to be read or written
            if not (
                unknown := (data.keys() - DATA) | (options.keys() - {*SAME, *LIMITS, *GROUPS} | options.keys() & NOT_KEPT)
            ):
                return found
            raise DamagedFileError(path / FIT_FILE, f"{min(unknown)} is not one of its arguments")
    raise DamagedFileError(path / FIT_FILE, "it does not describe a fit")


def read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The sweeps that are kept at ``path``, of a fit in one piece or in groups; empty if there are none."""
    return _read(path / "state.npz", _name_of(read_fit(path)["identity"])) or ({}, {})


def keep_end(checkpoint: "Checkpoint", message: str) -> None:
    """Say that the fit has converged."""
    with checkpoint.tolerant():
        checkpoint.save(END, {}, message=message)


def read_end(path: Path) -> str | None:
    """The message of a fit that has converged; None of another one."""
    found = _read(path / f"{END}.npz", _name_of(read_fit(path)["identity"]))
    return None if found is None else str(found[1].get("message", ""))


OPAQUE = {  # what an identity has of arguments, in words, since its values say nothing to people
    "model": "f", "chunks": "chunks of `ydata`", "decoded": "attributes that `decode_cf` applies",
}  # fmt: skip
OPERANDS = ("`ydata`", "`sigma`", "`mask` or `xdata`")
PLAIN = (str, int, float, bool, NoneType)


def _difference(name: str, then, now) -> str:
    """What has changed, with the values where people can read them."""
    if name == "operands":
        pairs = enumerate(zip_longest(then or (), now or ()))
        which = dict.fromkeys(OPERANDS[min(k, 2)] for k, (one, other) in pairs if one != other)
        return f"shape or type of {', '.join(which)}"
    if name in OPAQUE or name.startswith("content of ") or not (_is_readable(then) and _is_readable(now)):
        return OPAQUE.get(name, name)
    return f"{name}: {_short(then)} then, {_short(now)} now"


def _is_readable(value) -> bool:
    """Plain values, and lists or dicts of them; what stands for arrays, with their checksums, is none of these."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list) and value and all(isinstance(each, list) for each in value):
        return all(isinstance(each, (int, float, NoneType)) for part in value for each in part)
    return all(isinstance(each, PLAIN) for each in value) if isinstance(value, list) else isinstance(value, PLAIN)


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------------------------
# the call


def open_checkpoint(path, *fit) -> Checkpoint:
    """The checkpoint at ``path`` of the fit with these arguments of `describe_fit`."""
    return Checkpoint(path, *describe_fit(*fit))


def check_checkpoint(path, *fit, unknown: Collection[str] = ()) -> None:
    """The errors of `open_checkpoint`, before anything is written; what is ``unknown`` yet is not compared."""
    check_place("checkpoint", path, FIT_FILE)
    if (path / FIT_FILE).exists():
        _compare(path, describe_fit(*fit)[0], unknown)


def describe_fit(model: Model, data: Mapping[str, Any], problem: Data, stored, options):
    """Identity, call and arrays of a `Checkpoint`, of ``options`` of `dask_nlsq.curve_fit` and ``data`` as they were given.

    What a Dask array holds is not looked at; what a store holds, as far as `Stored.describe` has it.
    """
    call, arrays = describe_call(own_function(model.f), data, {name: options[name] for name in (*SAME, *LIMITS)})
    identity = {name: call["options"][name] for name in SAME}
    n_free = len(getattr(model.f, "free", options["p0"]))
    identity["model"] = fingerprint(model, problem.preparation.layouts, n_free)
    identity["chunks"] = [[len(sizes), *sizes[:1], *sizes[-1:]] for sizes in problem.chunks]
    identity["operands"] = [[operand.shape, str(operand.dtype)] for operand in problem.operands]
    identity["decoded"] = list(problem.decoded)
    identity |= {f"`{each.name}` in its store": each.describe() for each in stored}
    identity["sigma"] = data["sigma"] if is_reweighted(data["sigma"]) else None
    for name, value in data.items():
        identity |= {f"content of `{part}`": sum_of_values(array) for part, array in _in_memory(name, value)}
    return identity, call, arrays


def _in_memory(name: str, value) -> Iterator[tuple[str, np.ndarray]]:
    """What an argument of `dask_nlsq.curve_fit` has in memory, arrays by name, whether they can be kept or not."""
    if value is None or is_stored(value) or on_disk(value) or hasattr(value, "dask"):
        return
    if _is_several(value):
        for k, each in enumerate(value):
            yield from _in_memory(f"{name}[{k}]", each)
        return
    array, hidden = apart(name, value)
    if isinstance(array, np.ndarray):
        yield name, array
        if hidden is not None:
            yield f"mask of {name}", hidden


def _is_several(value) -> bool:
    """Whether it is a tuple of arrays, and not of numbers."""
    return isinstance(value, tuple) and not all(map(np.isscalar, value))


def describe_call(f, data: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `read_call` makes the call of again: JSON values, and arrays by name. What cannot be kept is None."""
    arrays: dict[str, np.ndarray] = {}

    def keep(name, value):
        if value is None:
            return {"none": True}
        if name == "sigma" and is_reweighted(value):
            return {"word": value}
        if _is_several(value):
            parts = [keep(f"{name}[{k}]", each) for k, each in enumerate(value)]
            return None if None in parts else {"tuple": parts}
        if isinstance(value, (str, Path)):
            return {"path": absolute(value)}
        if isinstance(value, list) and value and all(isinstance(each, (str, Path)) for each in value):
            return {"paths": [absolute(each) for each in value]}
        if is_stored(value) or has_masked(value) or stacked(name, value) is not value:
            return None
        if hasattr(value, "dask") or not isinstance(value, (np.ndarray, np.generic, list, tuple, int, float)):
            return None
        array = np.asarray(value)
        if array.nbytes > MOST_KEPT or array.dtype.hasobject or isinstance(value, np.ma.MaskedArray):
            return None
        arrays[name] = array
        return {"array": name}

    kept = {name: keep(name, value) for name, value in data.items()}
    return dict(model=import_name(f), data=kept, options=_plain(options)), arrays


def absolute(path):
    return str(path) if is_address(str(path)) else str(Path(path).absolute())


def _plain(value):
    """JSON of options: numbers, strings, sequences of them, arrays."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, range, set, frozenset)):
        return [_plain(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if callable(value):
        return {"function": function_name(value)}  # of a tie, to be given again
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def read_call(
    path: str | Path, f, data: Mapping[str, Any], trust: Trust = False
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Model, data and options of a checkpoint; what is given (not None) wins, and what it imports and opens is printed.

    Raises
    ------
    CheckpointError
        Where something was not kept and is not given.
    UntrustedError
        Where it names a module or an address that ``trust`` does not cover.
    """
    path = Path(path)
    found = read_fit(path)
    call, kept = found["call"], _read(path / "data.npz", _name_of(found["identity"]))
    arrays, said = kept[0] if kept else {}, []

    def make(name, kept):
        match kept:
            case None:
                raise CheckpointError(
                    f"the checkpoint {path} does not keep `{name}` (a Dask array, an open array or a large one): pass it "
                    f"again, as in resume(path, {name.split('[')[0]}=...)"
                )
            case {"none": True}:
                return None
            case {"tuple": list(parts)}:
                return tuple(make(f"{name}[{k}]", each) for k, each in enumerate(parts))
            case {"word": str(word)} if is_reweighted(word):
                return word
            case {"path": str(place)}:
                return opened(name, place)
            case {"paths": list(places)} if all(isinstance(each, str) for each in places):
                return [opened(name, each) for each in places]
            case {"array": str(key)} if key in arrays:
                return arrays[key]
        raise DamagedFileError(path / FIT_FILE, f"it does not say where `{name}` is")

    def opened(name, place):
        if is_address(place) and trust is not True:
            raise UntrustedError(
                f"the checkpoint {path} opens {place} as `{name}`: pass {name.split('[')[0]} yourself, or trust=True if "
                "you know who wrote it"
            )
        said.append(f"opens {place}")
        return place

    if f is None and call["model"] is None:
        raise CheckpointError(f"the checkpoint {path} cannot import the model again. {WAY_OUT}")
    data = {name: make(name, kept) if data.get(name) is None else data[name] for name, kept in call["data"].items()}
    try:
        if f is None:
            said.insert(0, f"imports {'.'.join(call['model'])} ({origin(call['model'][0], trust)})")
        if said:
            print(printable(f"{path}: {'; '.join(said)}"), flush=True)
        return f or import_by(call["model"], trust), data, call["options"]
    except UntrustedError as err:
        raise UntrustedError(
            f"the checkpoint {path}: {err}. {WAY_OUT}{OF_MODULE}, or trust=True if you know who wrote it"
        ) from None
    except (ImportError, AttributeError) as err:
        way_out = WAY_OUT + (OF_MODULE if isinstance(trust, bool) else "")
        raise CheckpointError(f"the checkpoint {path} cannot import the model again ({err}). {way_out}") from err


def create_checkpoint_directory(base: str | Path | None = None, name: str | None = None) -> Path:
    """Create a new directory, ``base/name_YYYYmmdd_HHMMSS``, with a number appended if it exists.

    Parameters
    ----------
    base : path, optional
        By default ``nlsq_checkpoints`` in the current directory; created if it is missing.
    name : str, optional
        ``fit`` by default.

    Raises
    ------
    ValueError
        A name that is not one of a directory.
    NotADirectoryError
        Where ``base`` is a file.
    """
    base = Path.cwd() / "nlsq_checkpoints" if base is None else Path(base).expanduser()
    name = "fit" if name is None else name
    if not isinstance(name, str) or name != Path(name).name or not name:
        raise ValueError(f"`name` must be the name of a directory, without a path, not {name!r}")
    check_directory("base", base)
    base.mkdir(parents=True, exist_ok=True)
    stamp = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    directory, tried = base / stamp, 0
    while True:
        try:
            directory.mkdir()  # fails where it exists, so that two processes never share one
            return directory
        except FileExistsError:
            tried += 1
            directory = base / f"{stamp}_{tried}"
