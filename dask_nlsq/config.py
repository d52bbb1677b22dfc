"""Defaults of the `dask.config` namespace ``nlsq``, and its values, read when they are used."""

import os
from pathlib import Path

import dask
import yaml
from dask.system import CPU_COUNT

dask.config.update_defaults(yaml.safe_load((Path(__file__).parent / "nlsq.yaml").read_text()))


def threads() -> int:
    """Threads of a fit in this process."""
    return dask.config.get("nlsq.threads") or CPU_COUNT


def compilation_cache() -> str | None:
    """Directory in which compiled kernels outlive the process; None unless the user names one."""
    if os.environ.get("NLSQ_DISABLE_PERSISTENT_CACHE") == "1":
        return None
    return dask.config.get("nlsq.compilation-cache")
