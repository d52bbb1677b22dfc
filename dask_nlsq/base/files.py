"""What is kept on disk: whole files with a checksum, of JSON or of arrays; models by their names."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np

from .disk import named_when_full

CHECKSUM_BYTES = 16
Buffer: TypeAlias = bytes | memoryview
PIECE = 2**16  # elements
BLANK = "0" * 2 * CHECKSUM_BYTES  # in the place of a checksum, in what it is made of


class DamagedFileError(ValueError):
    """A file that is not as it was written."""

    def __init__(self, path: Path, how: str):
        super().__init__(f"{path} is damaged ({how}): restore it from a copy, or remove it and fit again")


def checksum(content) -> bytes:
    return blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def check_directory(name: str, path: Path) -> None:
    """NotADirectoryError where the argument ``name`` cannot be a directory, since it is a file or below one."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"`{name}` {path}: {there} is a file, give the path of a directory, which may be a new one")


def sum_of_values(array: np.ndarray) -> int:
    """CRC-32 of the values of an array in C order, wherever they lie; at most a piece of it is copied at a time."""
    found = 0
    if array.size:
        # no copy where the values lie in that order already
        contiguous: Any = ["readonly", "contig"]  # the second is not in NumPy's stubs
        for piece in np.nditer(array, ["external_loop", "buffered"], [contiguous], order="C", buffersize=PIECE):
            found = zlib.crc32(np.asarray(piece).data, found)
    return found


def write_whole(path: Path, pieces: Sequence[Buffer]) -> None:
    """Write a file, all or nothing: ``pieces`` of bytes under another name, forced to disk, and renamed."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with named_when_full(path, sum(memoryview(each).nbytes for each in pieces)), open(temporary, "wb") as file:
            file.writelines(pieces)
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


def write_json(path: Path, **values) -> None:
    """Write values as a JSON file with a checksum of all its bytes."""
    text = json.dumps({"checksum": BLANK} | values, indent=1).encode()
    text = text.replace(BLANK.encode(), checksum(text).hex().encode(), 1)
    write_whole(path, [text])


def read_json(path: Path, version: int, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """What `write_json` has written.

    Raises
    ------
    DamagedFileError
        Where a byte is not as it was written.
    error
        Where its ``version`` is another one.
    """
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError:
        raise DamagedFileError(path, "it is not JSON") from None
    if not isinstance(found, dict) or "version" not in found:
        raise DamagedFileError(path, "it names no version")
    if found["version"] != version:
        way_out = "use the release that has written it, or fit again"
        raise error(f"{path} has format {found['version']}, and this release reads {version}: {way_out}")
    known = str(found.pop("checksum", ""))
    if checksum(content.replace(known.encode(), BLANK.encode(), 1)).hex() != known:
        raise DamagedFileError(path, "its checksum does not match")
    return found


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], **values) -> None:
    """Write arrays and JSON values as one .npz file, with a checksum behind it."""
    file = BytesIO()
    np.savez(file, __json__=np.frombuffer(json.dumps(values).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    content = file.getbuffer()
    write_whole(path, [content, checksum(content)])


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `write_arrays` has written; None where there is no such file; DamagedFileError where a byte is another one."""
    if not path.exists():
        return None
    content = memoryview(path.read_bytes())
    content, known = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum(content) != known:
        raise DamagedFileError(path, "its checksum does not match")
    with np.load(BytesIO(content), allow_pickle=False) as found:
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
