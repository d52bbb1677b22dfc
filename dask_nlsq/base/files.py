"""What is kept on disk: whole files with a version and a checksum, of JSON or of arrays."""

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, TypeAlias
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np

from .disk import existing, named_when_full, named_when_refused

FIT_FILE, RESULT = "fit.json", "result.json"  # by which checkpoints and results are known
ZARR_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
KINDS = {FIT_FILE: "a checkpoint", RESULT: "a saved result", **dict.fromkeys(ZARR_METADATA, "a Zarr store")}
CHECKSUM_BYTES = 16
Buffer: TypeAlias = bytes | memoryview
PIECE = 2**16  # elements
BLANK = "0" * 2 * CHECKSUM_BYTES  # stands for the checksum while it is computed
LEFT = re.compile(r"\..+\.(json|npz|html)\.[0-9a-f]{32}")  # by a writer that was killed, see `write_whole`
NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f]")  # of files: separators, and what no terminal should get
ABANDONED = 3600.0  # seconds since it was written, from which nobody writes a file any more
NO_FSYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}  # of directories, which network and FUSE file systems may not force
MALFORMED = (  # what parsing raises where a file is not what its name says, however it came to be
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, OSError, RuntimeError, MemoryError,
    BadZipFile, zlib.error,
)  # fmt: skip


class DamagedFileError(ValueError):
    """A file that is not as it was written; ``whole`` is what to remove, if not the file; "" where that is of no use."""

    def __init__(self, path: Path | str, how: str, whole: Path | Literal[""] | None = None):
        remove = "" if whole == "" else f", or remove {whole or 'it'} and fit again"
        super().__init__(f"{path} is damaged ({how}): restore it from a copy{remove}")


@contextmanager
def well_formed(path: Path | str, whole: Path | Literal[""] | None = None) -> Iterator[None]:
    """Within, ``path`` is parsed: what it cannot be parsed for is a DamagedFileError, as `MALFORMED` lists it."""
    try:
        yield
    except DamagedFileError:
        raise
    except MALFORMED as err:
        kind = "" if type(err) is ValueError else f"{type(err).__name__}: "
        raise DamagedFileError(path, f"{kind}{err}".partition("\n")[0], whole) from None


def plain_name(name: str) -> str:
    """The nearest name of something in a directory: itself, unless it is a path, which may lead anywhere."""
    found = NOT_IN_NAMES.sub("_", name)
    return found if found.strip(".") else "_"


def check_links(directory: Path) -> None:
    """DamagedFileError where a link in a directory of ours leads out of it, so that nothing is read or written elsewhere."""
    home, left = directory.resolve(), [directory]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _stay(Path(entry), home)
                elif entry.is_dir():
                    left.append(Path(entry))


def _stay(path: Path, home: Path) -> None:
    if not (target := path.resolve()).is_relative_to(home):
        raise DamagedFileError(path, f"it is a link to {target}, outside of its directory")


def check_link(path: Path) -> None:
    """DamagedFileError where something in a directory of ours is a link out of it."""
    if path.is_symlink():
        _stay(path, path.parent.resolve())


def content_of(path: Path) -> bytes:
    """The bytes of a file of ours; FileNotFoundError where nothing is there."""
    check_link(path)
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise DamagedFileError(path, "it is a directory") from None


def remove_left(directory: Path, *names: re.Pattern, kept: str | None = None) -> None:
    """Remove what killed writers have left in a directory, and old files of these names, except the one that is ``kept``.

    What may be in use stays: a file is old by the clock of its disk, which may be that of another machine.
    """
    with os.scandir(directory) as entries:
        left = [entry for entry in entries if any(each.fullmatch(entry.name) for each in (LEFT, *names))]
    left = [entry for entry in left if entry.name != kept and entry.is_file(follow_symlinks=False)]
    with suppress(OSError):  # of a directory that cannot be written; another process may have removed it
        now = _now_on_disk(directory) if left else 0.0
        for entry in left:
            if now - entry.stat().st_mtime > ABANDONED:
                os.unlink(entry)


def _now_on_disk(directory: Path) -> float:
    """When a file is written that is written now."""
    with TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime


def checksum(content) -> bytes:
    return blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def check_directory(name: str, path: Path) -> None:
    """NotADirectoryError where the argument ``name`` cannot be a directory, since it is a file or below one."""
    there = existing(path)
    if not there.is_dir():
        raise NotADirectoryError(f"`{name}` {path}: {there} is a file: give the path of a directory, which need not exist")


def make_directory(name: str, path: Path, own: str) -> None:
    """Make the directory of the argument ``name``, which has a file ``own`` where it is one of ours already.

    Raises
    ------
    NotADirectoryError
        As `check_directory`.
    ValueError
        Where it is something else, as a store of data, which would be written into.
    OSError
        Where it cannot be made.
    """
    check_place(name, path, own)
    with named_when_refused(path, f"`{name}` "):
        path.mkdir(parents=True, exist_ok=True)


def check_place(name: str, path: Path, own: str) -> None:
    """The errors of `make_directory` before anything is made."""
    check_directory(name, path)
    if not (path / own).exists():
        for file, what in KINDS.items():
            if (path / file).exists():
                raise ValueError(f"`{name}` {path} is {what}: give the path of another directory, which need not exist")


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
    nbytes = sum(memoryview(each).nbytes for each in pieces)
    try:
        with named_when_refused(path), named_when_full(path, nbytes), open(temporary, "wb") as file:
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
        except OSError as err:
            if err.errno not in NO_FSYNC:
                raise
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
    FileNotFoundError
        If there is none.
    DamagedFileError
        Where a byte is not as it was written.
    error
        Where its ``version`` is another one.
    """
    content = content_of(path)
    with well_formed(path):
        found = json.loads(content)
    if not isinstance(found, dict) or "version" not in found:
        raise DamagedFileError(path, "it does not name a version")
    known = found.pop("checksum", None)
    if known is None:  # as of the first formats
        check_version(path, found["version"], version, error)
    if checksum(content.replace(str(known).encode(), BLANK.encode(), 1)).hex() != known:
        raise DamagedFileError(path, "its checksum does not match")
    check_version(path, found["version"], version, error)
    return found


def check_version(path: Path, found, version: int, error: type[ValueError] = ValueError) -> None:
    if found != version:
        way_out = "use the release that wrote it, or fit again"
        raise error(f"{path} has format {found}, and this release reads {version}: {way_out}")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], version: int, **values) -> None:
    """Write arrays and JSON values as one .npz file, with a checksum behind it."""
    file = BytesIO()
    text = json.dumps({"version": version} | values).encode()
    np.savez(file, __json__=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    content = file.getbuffer()
    write_whole(path, [content, checksum(content)])


def read_arrays(
    path: Path, version: int, error: type[ValueError] = ValueError
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` has written; errors as those of `read_json`."""
    content = memoryview(content_of(path))
    content, known = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum(content) != known:
        raise DamagedFileError(path, "its checksum does not match")
    with well_formed(path):
        try:
            with np.load(BytesIO(content), allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
        except ValueError:  # its text advises to allow pickles
            raise ValueError("it contains something other than arrays of numbers") from None
        values = json.loads(arrays.pop("__json__").tobytes())
        written = values.pop("version")
    check_version(path, written, version, error)
    return arrays, values
