"""The `dask.config` namespace ``nlsq``: its defaults, and its values, looked up and checked when they are used.

``nlsq-schema.yaml`` says what each key does and which values it may have.
"""

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
import yaml
from dask.system import CPU_COUNT

HERE = Path(__file__).parent
TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "null": type(None),
}  # of JSON
PIPELINES = {"zarrs": "zarrs.ZarrsCodecPipeline"}

dask.config.update_defaults(yaml.safe_load((HERE / "nlsq.yaml").read_text()))


@cache
def schema() -> dict[str, dict]:
    """Type, limits and description of each key."""
    return yaml.safe_load((HERE / "nlsq-schema.yaml").read_text())["properties"]["nlsq"]["properties"]


def setting(key: str) -> Any:
    """The value of ``nlsq.<key>`` now.

    Raises
    ------
    ValueError
        A value that the schema does not allow.
    """
    value, allowed = dask.config.get(f"nlsq.{key}"), schema()[key]
    kinds = allowed["type"] if isinstance(allowed["type"], list) else [allowed["type"]]
    least, above = allowed.get("minimum"), allowed.get("exclusiveMinimum")
    right = any(isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds)
    if right and value is not None:  # "not >=": nan is refused
        right = (least is None or value >= least) and (above is None or value > above)
    if not right:
        limit = "" if least is None else f" of at least {least}"
        limit += "" if above is None else f" more than {above}"
        variable = f"DASK_NLSQ__{key.upper().replace('-', '_')}"
        raise ValueError(
            f"`nlsq.{key}` must be {' or '.join(kinds)}{limit}, not {value!r}: change it by dask.config.set, in the "
            f"configuration files of Dask, or in the environment variable {variable}"
        )
    return value


def threads() -> int:
    """Threads of a fit in this process."""
    return setting("threads") or CPU_COUNT


def compilation_cache() -> str | None:
    """Directory in which compiled kernels outlive the process; None unless the user names one."""
    if os.environ.get("NLSQ_DISABLE_PERSISTENT_CACHE") == "1":
        return None
    return setting("compilation-cache")


def codec_pipeline() -> str | None:
    """Import path of the class that decodes chunks; None for Zarr's own.

    Raises
    ------
    ValueError
        One that cannot be imported.
    """
    if (name := setting("codec-pipeline")) is None:
        return None
    path = PIPELINES.get(name, name)
    module, _, kind = path.rpartition(".")
    try:
        getattr(import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as err:  # ValueError: no module before the last dot
        raise ValueError(
            f"`nlsq.codec-pipeline` is {name!r}, and {path} cannot be imported ({err}): install its package, or set null"
        ) from err
    return path
