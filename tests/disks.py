"""A small disk that can be filled: a tmpfs of its own where that may be mounted, else a limit of the size of files."""

import os
import resource
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

FILLER, PIECE = ".filler", b"x" * 4096


class Disk:
    def __init__(self, path: Path, mounted: bool):
        self.path, self.mounted = path, mounted

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes at most."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        with open(self.path / FILLER, "wb", buffering=0) as file, suppress(OSError):
            while (os.statvfs(self.path).f_bavail * 4096) > left:
                file.write(PIECE)

    def empty(self) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (self.path / FILLER).unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, nbytes: int = 2**25):
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(path)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    disk = Disk(path, mounted)
    try:
        yield disk
    finally:
        disk.empty()
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
