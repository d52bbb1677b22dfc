"""Full disks: a check of the free space before hours of work, and messages of their errors."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .text import size

LIMITS = {  # which are met although the disk has space left
    errno.EFBIG: "it is larger than files may be here. Raise the limit (ulimit -f)",
    errno.EDQUOT: "the quota of its disk is used up. Free some of it",
}
FULL = {errno.ENOSPC, *LIMITS}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def existing(path: Path) -> Path:
    """It, or the nearest directory above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def free_bytes(path: Path) -> int:
    """What is left on the disk on which ``path`` is, or will be."""
    return shutil.disk_usage(existing(path)).free


def check_room(name: str, path: Path, nbytes: int) -> None:
    """OSError where the argument ``name`` is a path on a disk that has less than ``nbytes`` left."""
    if nbytes > (free := free_bytes(path)):
        raise OSError(
            errno.ENOSPC,
            f"`{name}` {path} takes up to {size(nbytes)}, and its disk has {size(free)} left: free some space, or give a "
            "path on another disk",
        )


@contextmanager
def named_when_full(path: Path, nbytes: int) -> Iterator[None]:
    """Within, an error of a full disk says what is written, and what it takes."""
    try:
        yield
    except OSError as err:
        if err.errno not in FULL:
            raise
        full = f"its disk has {size(free_bytes(path))} left. Free some space" if err.errno == errno.ENOSPC else ""
        raise OSError(
            err.errno,
            f"{path} could not be written ({err.strerror}): it takes {size(nbytes)}, and "
            f"{LIMITS.get(err.errno, full)}, or give a path on another disk",
        ) from err


@contextmanager
def named_when_refused(path: Path, argument: str = "") -> Iterator[None]:
    """Within, an error of missing rights names ``path``, and not what was to be written below or beside it."""
    try:
        yield
    except OSError as err:
        if err.errno not in REFUSED:
            raise
        raise OSError(
            err.errno, f"{argument}{path} could not be written ({err.strerror}): give a path where you may write"
        ) from err
