"""Defaults of the `dask.config` namespace ``nlsq``, read when they are used."""

from pathlib import Path

import dask
import yaml

dask.config.update_defaults(yaml.safe_load((Path(__file__).parent / "nlsq.yaml").read_text()))
