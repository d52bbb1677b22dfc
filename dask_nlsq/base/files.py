"""What is kept on disk: whole files, values as JSON with arrays beside them, models by their names."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

VERSION, RESULT = 2, "result.json"  # of the files
INLINE = 64  # elements of an array up to which it is written into the JSON, where people can read it


def write_whole(path: Path, write: Callable) -> None:
    """Write a file, all or nothing: ``write(file)`` under another name, forced to disk, and renamed."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the name is on disk when the directory is
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], **values) -> None:
    """Write arrays and JSON values as one .npz file."""
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    write_whole(path, lambda file: np.savez(file, __json__=text, **arrays))  # type: ignore[arg-type]


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `write_arrays` has written; None where there is no such file."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    return arrays, json.loads(arrays.pop("__json__").tobytes())


def import_name(f) -> list[str] | None:
    """Module and name by which another process can import ``f``; None where it cannot: a lambda, a notebook's function."""
    module, qualname = getattr(f, "__module__", None), getattr(f, "__qualname__", "<>")
    return None if module in (None, "__main__") or "<" in qualname else [module, qualname]


def import_by(name: list[str]):
    """What `import_name` has named.

    Raises
    ------
    ImportError, AttributeError
        Where it is not there any more.
    """
    module, qualname = name
    found = import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# records


def encode(value, arrays: dict[str, np.ndarray]):
    """JSON of numbers, texts, tuples, lists, dicts, arrays and records of them; large arrays go to ``arrays`` by a number.

    What JSON does not tell apart is an object with its kind as the only key: ``{"tuple": [...]}``. Numbers come back with
    the same bits.
    """

    def walk(each):
        return encode(each, arrays)

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.dtype):
        return {"dtype": value.str}
    if isinstance(value, np.ndarray):
        if value.size <= INLINE and np.isfinite(value).all():
            return {"array": value.tolist(), "dtype": value.dtype.str}
        arrays[str(len(arrays))] = value
        return {"stored": str(len(arrays) - 1)}
    if isinstance(value, Mapping):
        return {"dict": [[walk(k), walk(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [walk(each) for each in value]
    if hasattr(value, "_fields") or is_dataclass(value):
        names = value._fields if hasattr(value, "_fields") else [each.name for each in fields(value) if each.init]
        return {"record": type(value).__name__, "fields": {name: walk(getattr(value, name)) for name in names}}
    if isinstance(value, tuple):
        return {"tuple": [walk(each) for each in value]}
    if isinstance(value, Exception):
        return {"record": type(value).__name__, "arguments": [walk(each) for each in value.args]}
    raise TypeError(f"cannot write {value!r} as JSON")


def decode(value, arrays: Mapping[str, np.ndarray], records: Mapping[str, type]):
    """What `encode` was given; ``records`` are the classes that may appear, by name."""

    def walk(each):
        return decode(each, arrays, records)

    match value:
        case list():
            return [walk(each) for each in value]
        case {"array": numbers, "dtype": dtype}:
            return np.array(numbers, dtype=dtype)
        case {"float": text}:
            return float(text)
        case {"stored": number}:
            return arrays[number]
        case {"dtype": dtype}:
            return np.dtype(dtype)
        case {"dict": pairs}:
            return {walk(k): walk(v) for k, v in pairs}
        case {"tuple": parts}:
            return tuple(map(walk, parts))
        case {"record": name, "fields": found}:
            return records[name](**{each: walk(part) for each, part in found.items()})
        case {"record": name, "arguments": found}:
            return records[name](*map(walk, found))
    return value


def save_record(path: Path, record) -> None:
    """Write a record as ``result.json`` in the directory ``path``, which names the file of its large arrays.

    What was there is replaced when all is written.
    """
    arrays: dict[str, np.ndarray] = {}
    text = encode(record, arrays)
    path.mkdir(parents=True, exist_ok=True)
    before = json.loads((path / RESULT).read_text()).get("arrays") if (path / RESULT).exists() else None
    name = f"arrays-{uuid4().hex}.npz" if arrays else None
    if name:
        write_arrays(path / name, arrays)
    found = json.dumps(dict(version=VERSION, arrays=name, result=text), indent=1, allow_nan=False)
    write_whole(path / RESULT, lambda file: file.write(found.encode()))
    if before:
        (path / before).unlink(missing_ok=True)


def load_record(path: Path, records: Mapping[str, type]):
    """What `save_record` has written.

    Raises
    ------
    ValueError
        Where there is none, or one of another version.
    """
    try:
        found = json.loads((path / RESULT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a saved result: it has no {RESULT}") from None
    if found["version"] != VERSION:
        raise ValueError(f"the result {path} has format {found['version']}, this version reads {VERSION}: fit again")
    arrays, _ = (read_arrays(path / found["arrays"]) if found["arrays"] else None) or ({}, None)
    return decode(found["result"], arrays, records)
