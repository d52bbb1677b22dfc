"""Full disks: a check of the free space before hours of work, and messages of their errors."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .text import size

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room, a quota, a limit of the size of files


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
        raise OSError(
            err.errno,
            f"{path} could not be written ({err.strerror}): it takes {size(nbytes)}, and its disk has "
            f"{size(free_bytes(path))} left. Free some space, or give a path on another disk",
        ) from err
